//! The keys that a reload cannot change.

use std::collections::HashMap;

use super::Config;
use crate::queue::store::settings::StoreSettings;

/// The keys that differ between two configurations and take effect only after a restart, e.g. `inbound.listen`.
pub fn keys_needing_restart(old: &Config, new: &Config) -> Vec<String> {
    let mut keys = Vec::new();
    let mut differs = |key: &str, changed: bool| {
        if changed {
            keys.push(key.to_owned());
        }
    };
    differs("service.name", old.service != new.service);
    differs("runtime.workers", old.runtime.workers != new.runtime.workers);
    differs("inbound.listen", old.inbound.listen != new.inbound.listen);
    differs("outbound.listen", old.outbound.listen != new.outbound.listen);
    differs("admin.listen", old.admin.listen != new.admin.listen);
    differs("admin.probe_listen", old.admin.probe_listen != new.admin.probe_listen);
    differs("admin.token_file", old.admin.token_file != new.admin.token_file);
    differs("telemetry.otlp", old.telemetry.otlp != new.telemetry.otlp);
    differs("telemetry.protocol", old.telemetry.protocol != new.telemetry.protocol);
    type StoreKey = fn(&StoreSettings) -> String;
    let store: [(&str, StoreKey); 5] = [
        ("store.path", |store| store.path.display().to_string()),
        ("store.durability", |store| format!("{:?}", store.durability)),
        ("store.max_bytes", |store| store.max_bytes.to_string()),
        ("store.reserve", |store| store.reserve.to_string()),
        ("store.key_file", |store| format!("{:?}", store.key_file)),
    ];
    for (key, value) in store {
        differs(key, old.store.as_ref().map(value) != new.store.as_ref().map(value));
    }
    let listeners = |config: &Config| -> HashMap<String, String> {
        let of =
            |upstream: &super::Upstream| Some((upstream.name.clone(), upstream.listen.as_ref()?.to_string()));
        config.upstreams.iter().filter_map(of).collect()
    };
    let (before, after) = (listeners(old), listeners(new));
    let mut names: Vec<&String> = before.keys().chain(after.keys()).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        if before.get(name) != after.get(name) {
            keys.push(format!("upstream.{name}.listen"));
        }
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Endpoints, Policy, Upstream};

    #[test]
    fn lists_only_keys_that_need_a_restart() {
        let old = Config::default();
        assert_eq!(keys_needing_restart(&old, &old), [""; 0]);
        let mut new = old.clone();
        new.runtime.workers = Some(4);
        new.runtime.drain_delay = crate::units::HumanDuration::from_secs(9);
        new.defaults.timeout = crate::units::HumanDuration::from_secs(9);
        new.admin.probe_listen = "[::]:4192".parse().ok();
        let mut db = Upstream::new("db", Endpoints::Fixed(Vec::new()), Policy::default());
        db.listen = "127.0.0.1:5432".parse().ok();
        new.upstreams.push(db);
        let expected = ["runtime.workers", "admin.probe_listen", "upstream.db.listen"];
        assert_eq!(keys_needing_restart(&old, &new), expected);
        assert_eq!(keys_needing_restart(&new, &old), expected);
    }
}
