//! The effective configuration as a tree, without secrets.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    config::Config,
    redact::{REDACTED, is_credential_name, redact_secrets, redact_userinfo},
    resilience::cache::AuthorizationRule,
};

/// Every section with every key, defaults included. Unset keys are omitted.
pub fn tree(config: &Config) -> Value {
    let Config {
        service,
        runtime,
        inbound,
        outbound,
        identity,
        admin,
        telemetry,
        defaults,
        upstreams,
        store,
        queues,
        env_secrets: concealed,
    } = config;
    let mut tree = json!({
        "service": service, "runtime": runtime, "inbound": inbound, "outbound": outbound, "identity": identity,
        "admin": admin, "telemetry": telemetry, "store": store,
        "queue": queues, "defaults": defaults, "upstream": upstreams,
    });
    clean(&mut tree, concealed);
    tree
}

fn clean(value: &mut Value, concealed: &[String]) {
    match value {
        Value::Object(map) => clean_map(map, concealed),
        Value::Array(list) => list.iter_mut().for_each(|item| clean(item, concealed)),
        Value::String(text) => *text = redact_secrets(concealed, redact_userinfo(text).into_owned()),
        _ => {}
    }
}

/// Names of lists in the code (left) and of the table in the file (right).
const FILE_NAMES: &[(&str, &str)] = &[("ports", "port"), ("routes", "route"), ("matches", "match")];

/// `authorization` of a cache takes a word, not a credential.
fn is_authorization_rule(value: &Value) -> bool {
    AuthorizationRule::deserialize(value).is_ok()
}

fn clean_map(map: &mut Map<String, Value>, concealed: &[String]) {
    map.retain(|_, value| !value.is_null());
    // Policy keys are on the same level as the other keys.
    if let Some(Value::Object(policy)) = map.shift_remove("policy") {
        map.extend(policy);
        map.retain(|_, value| !value.is_null());
    }
    for (name, file_name) in FILE_NAMES {
        if let Some(value) = map.shift_remove(*name) {
            map.insert((*file_name).to_owned(), value);
        }
    }
    for (key, value) in map {
        if value.is_string() && is_credential_name(key) && !is_authorization_rule(value) {
            *value = REDACTED.into();
        } else {
            clean(value, concealed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Endpoints, HeaderEdits, Policy, Route, RouteMatch, Upstream};
    use crate::redact::Secret;

    #[test]
    fn the_tree_has_every_section_and_no_secret() {
        let mut upstream = Upstream::new("payments", Endpoints::Fixed(Vec::new()), Policy::default());
        let set = [("authorization", "Bearer abc"), ("x-api-key", "abc"), ("x-tier", "1")];
        upstream.routes.push(Route {
            request_headers: HeaderEdits {
                set: set.map(|(k, v)| (k.to_owned(), Secret::redact_url(v))).into_iter().collect(),
                remove: Vec::new(),
            },
            ..Route::new(RouteMatch::default(), Policy::default())
        });
        let mut config = Config { upstreams: vec![upstream], ..Config::default() };
        config.admin.token_file = Some("/run/token".into());
        let tree = tree(&config);
        assert_eq!(tree["outbound"]["listen"], "localhost:4140");
        assert_eq!(tree["defaults"]["timeout"], "15s");
        assert_eq!(tree["upstream"][0]["timeout"], "15s", "formatted as in the file, and inherited");
        assert_eq!(tree["admin"]["token_file"], "/run/token");
        assert_eq!(tree["upstream"][0]["route"][0]["request_headers"]["set"]["x-tier"], "1");
        assert!(!tree.to_string().contains("abc"), "{tree}");
        assert!(toml::to_string(&tree).is_ok());
    }
}
