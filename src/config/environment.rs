//! Telemetry settings from OpenTelemetry's environment variables. Every file overrides them.
//!
//! <https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/>. As specified there, an invalid
//! value is ignored. `src/telemetry/export` reads the variables that only the exporter needs.

use super::{
    node::{Node, NodeEntry, Table, Value},
    parse::Env,
};

/// `[telemetry]` as set by the environment.
pub(super) fn telemetry(env: Env<'_>) -> Node {
    let get = |names: &[&str]| {
        let set =
            |name: &&str| env(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        names.iter().find_map(set)
    };
    let mut table = Table::new();
    let mut set = |key: &str, node: Node| table.insert(key.to_owned(), NodeEntry { key: None, node });

    let protocol =
        match get(&["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"]).as_deref() {
            Some("grpc") => Some("grpc"),
            Some("http/protobuf") => Some("http"),
            _ => None,
        };
    if let Some(protocol) = protocol {
        set("protocol", Node::text(protocol));
    }
    let traces_endpoint = get(&["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]);
    // The signal's path is appended to the endpoint for all signals.
    let base = get(&["OTEL_EXPORTER_OTLP_ENDPOINT"]).map(|base| {
        let is_http =
            protocol == Some("http") || (protocol.is_none() && base.trim_end_matches('/').ends_with(":4318"));
        if is_http { format!("{}/v1/traces", base.trim_end_matches('/')) } else { base }
    });
    let is_url = |url: &String| ["http://", "https://"].iter().any(|scheme| url.starts_with(scheme));
    if let Some(url) = traces_endpoint.or(base).filter(is_url) {
        set("otlp", Node::text(url));
    }
    let argument = get(&["OTEL_TRACES_SAMPLER_ARG"]).and_then(|text| text.parse::<f64>().ok());
    let share = match get(&["OTEL_TRACES_SAMPLER"]).as_deref() {
        // A sampled client trace is always continued, so `parentbased_` makes no difference.
        Some("always_on" | "parentbased_always_on") => Some(1.0),
        Some("always_off" | "parentbased_always_off") => Some(0.0),
        Some("traceidratio" | "parentbased_traceidratio") => {
            Some(argument.filter(|share| (0.0..=1.0).contains(share)).unwrap_or(1.0))
        }
        _ => None,
    };
    if let Some(share) = share {
        set("sample", Node { origin: None, value: Value::Float(share) });
    }

    let mut root = Table::new();
    if !table.is_empty() {
        let node = Node { origin: None, value: Value::Table(table) };
        root.insert("telemetry".to_owned(), NodeEntry { key: None, node });
    }
    Node { origin: None, value: Value::Table(root) }
}

/// Whether the environment disables traces, overriding the files.
pub(super) fn disables_traces(env: Env<'_>) -> bool {
    let is = |name: &str, word: &str| env(name).is_some_and(|value| value.trim().eq_ignore_ascii_case(word));
    is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none")
}

#[cfg(test)]
mod tests {
    use crate::config::{OtlpProtocol, Sources, Telemetry, load_sources, source::Source};
    use crate::redact::Secret;

    fn loaded(file: &str, env: &[(&str, &str)]) -> Telemetry {
        let sources = Sources(vec![Source { path: "a.toml".into(), text: file.to_owned() }]);
        let get = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        load_sources(sources, &get).expect("valid").config.telemetry.clone()
    }

    #[test]
    fn files_override_the_environment() {
        let env = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317"),
            ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
        ];
        let telemetry = loaded("", &env);
        assert_eq!(telemetry.otlp.as_ref().map(Secret::expose), Some("http://collector:4317"));
        assert_eq!((telemetry.protocol, *telemetry.sample), (None, 0.25));
        let telemetry = loaded("[telemetry]\notlp = 'http://other:4317'\nsample = 1", &env);
        assert_eq!(telemetry.otlp.as_ref().map(Secret::expose), Some("http://other:4317"));
        assert_eq!(*telemetry.sample, 1.0);
        assert_eq!(loaded("", &[]), Telemetry::default());
    }

    #[test]
    fn the_general_endpoint_gets_the_path_of_traces() {
        let otlp = |env: &[(&str, &str)]| loaded("", env).otlp;
        let base = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318/");
        assert_eq!(otlp(&[base]).as_ref().map(Secret::expose), Some("http://c:4318/v1/traces"));
        let protocol = ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
        let base = ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://c/otlp");
        assert_eq!(otlp(&[base, protocol]).as_ref().map(Secret::expose), Some("https://c/otlp/v1/traces"));
        let traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://c/exactly");
        assert_eq!(otlp(&[base, protocol, traces]).as_ref().map(Secret::expose), Some("https://c/exactly"));
        assert_eq!(loaded("", &[base, protocol]).protocol, Some(OtlpProtocol::Http));
    }

    #[test]
    fn invalid_values_are_ignored_and_off_is_off() {
        let bad = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
            ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
        ];
        assert_eq!(loaded("", &bad), Telemetry::default());
        for off in [("OTEL_SDK_DISABLED", "TRUE"), ("OTEL_TRACES_EXPORTER", "none")] {
            assert_eq!(loaded("[telemetry]\notlp = 'http://c:4317'", &[off]).otlp, None, "{off:?}");
        }
    }
}
