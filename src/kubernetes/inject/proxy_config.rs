//! The layers of an injected sidecar's configuration, and the validation of a layer.
//!
//! ```text
//! env:OUTRIGGER_BASE        derived from the pod's spec
//! env:OUTRIGGER_DEFAULTS    [proxy-defaults] of `--defaults`
//! outrigger.toml            the ConfigMap
//! env:OUTRIGGER_PROXY       [proxy] of `--defaults`
//! env:OUTRIGGER_POD         annotations, and the ports that redirection, probes and Services rely on
//! ```
//!
//! Later layers override earlier ones.

use serde_json::Value;

use super::{
    IDENTITY_DIRECTORY, SPIRE_SOCKET,
    settings::{Identity, Settings},
};
use crate::config::{self, Source, Sources};

/// The inbound port.
pub const INBOUND: u16 = 4143;
/// The outbound port.
pub const OUTBOUND: u16 = 4140;
/// The probe port, for kubelet and Prometheus.
pub const PROBE: u16 = 4192;
/// Draining must end this many seconds before the grace period.
const MARGIN: u64 = 1;
/// The default drain timeout, as without Kubernetes, in seconds.
const MAX_DRAIN: u64 = 25;
const GRACE: u64 = 30;

/// The pod's termination grace period, in seconds.
pub fn grace(spec: &Value) -> u64 {
    spec["terminationGracePeriodSeconds"].as_u64().unwrap_or(GRACE)
}

/// The layer derived from the pod's spec: the service's port and the drain timeout.
pub fn base_layer(spec: &Value, settings: &Settings) -> String {
    let drain = grace(spec).saturating_sub(settings.drain_delay + MARGIN).clamp(1, MAX_DRAIN);
    let mut text = format!("[runtime]\ndrain_timeout = \"{drain}s\"\n");
    if let Some(port) = first_port(spec) {
        text += &format!("\n[inbound]\nforward_to = \"127.0.0.1:{port}\"\n");
    }
    text
}

fn first_port(spec: &Value) -> Option<u64> {
    let containers = spec["containers"].as_array().into_iter().flatten();
    let mut ports = containers.flat_map(|container| container["ports"].as_array().into_iter().flatten());
    let tcp = |port: &&Value| port["protocol"].as_str().is_none_or(|protocol| protocol == "TCP");
    ports.find(tcp)?["containerPort"].as_u64()
}

/// The layer above the ConfigMap.
pub fn pod_layer(settings: &Settings) -> String {
    let mut text = format!(
        "[runtime]\ndrain_delay = \"{}s\"\n\n[inbound]\nlisten = \"[::]:{INBOUND}\"\n",
        settings.drain_delay
    );
    if let Some(port) = settings.app_port {
        text += &format!("forward_to = \"127.0.0.1:{port}\"\n");
    }
    text += &format!(
        "\n[outbound]\nlisten = \"localhost:{OUTBOUND}\"\n\n[admin]\nprobe_listen = \"[::]:{PROBE}\"\n"
    );
    text + &match &settings.identity {
        Identity::None => String::new(),
        Identity::CsiSpiffe | Identity::Secret(_) => format!(
            "\n[identity]\ncert = \"{IDENTITY_DIRECTORY}/tls.crt\"\nkey = \"{IDENTITY_DIRECTORY}/tls.key\"\nca = \"{IDENTITY_DIRECTORY}/ca.crt\"\n"
        ),
        Identity::Spire => format!("\n[identity]\nspiffe = \"unix://{SPIRE_SOCKET}\"\n"),
    }
}

/// A placeholder for the certificate that an annotation will configure, so that `mtls = "strict"` is valid in a
/// ConfigMap.
const PLACEHOLDER_IDENTITY: &str = "[identity]\nspiffe = \"unix:///annotation\"\n";

/// Validates a layer and returns its warnings. The pod's environment variables are not known here.
///
/// # Errors
///
/// All errors, with file and line, in the form of `outrigger check`.
pub fn check(name: &str, text: &str) -> Result<Vec<String>, String> {
    let own = text.parse::<toml::Table>().is_ok_and(|table| table.contains_key("identity"));
    let identity = (!own).then(|| Source { path: "identity".into(), text: PLACEHOLDER_IDENTITY.to_owned() });
    let own = Source { path: name.into(), text: text.to_owned() };
    let sources = Sources(identity.into_iter().chain([own]).collect());
    // "1" is valid where a name is expected, and where a number is.
    config::load_sources(sources, &|name| (!name.starts_with("OTEL_")).then(|| "1".to_owned()))
        .map(|loaded| loaded.warnings.lines())
        .map_err(|problems| problems.render(false).trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::settings::Defaults, *};

    #[test]
    fn generated_layers_are_valid() {
        for identity in ["none", "csi-spiffe", "spire", "secret/x"] {
            let annotations = json!({"outrigger.dev/identity": identity, "outrigger.dev/app-port": "3000"});
            let settings = Defaults::default().read(&annotations).unwrap();
            check("pod", &pod_layer(&settings)).unwrap();
            let spec = json!({"containers": [{"ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 80}]}]});
            assert!(base_layer(&spec, &settings).contains("127.0.0.1:80\""));
            check("base", &base_layer(&spec, &settings)).unwrap();
        }
    }

    #[test]
    fn draining_fits_the_grace_period() {
        let settings = Defaults::default().read(&Value::Null).unwrap();
        for (grace, expected) in [(None, "24s"), (Some(120), "25s"), (Some(10), "4s"), (Some(0), "1s")] {
            let spec = json!({"terminationGracePeriodSeconds": grace});
            assert!(base_layer(&spec, &settings).contains(expected), "{grace:?}");
        }
    }

    #[test]
    fn errors_have_their_line() {
        assert_eq!(check("x", "[inbound]\nmtls = \"strict\"\n"), Ok(Vec::new()));
        assert_eq!(check("x", "[identity]\ncert = \"a\"\nkey = \"b\"\nca = \"c\"\n"), Ok(Vec::new()));
        let error = check("shop/outrigger", "[inbound]\nforward_too = \"${APP}:1\"\n").unwrap_err();
        assert!(error.contains("shop/outrigger:2") && error.contains("forward_to"), "{error}");
        assert_eq!(check("x", "[inbound]\nforward_to = \"127.0.0.1:${PORT}\"\n"), Ok(Vec::new()));
    }
}
