//! Probes and lifecycle hooks that the kubelet makes over the network.
//!
//! Redirected, they would meet the sidecar: under strict mutual TLS the kubelet, which has no certificate, would be refused,
//! and a TCP probe would find the sidecar alive, not the service. The kubelet cannot be told apart by its address either,
//! which depends on the network plugin. So such a probe asks the sidecar's probe port, where `/probe/CONTAINER/KIND` makes
//! the original one from inside the pod and tells what came of it. What runs a command is left alone.

use serde_json::{Map, Value, json};

use super::{
    InjectError, Note,
    editor::Editor,
    proxy_config::PROBE,
    settings::{Settings, ranges},
};

/// Where they stand in a container, and what they are called in the path.
const PLACES: &[(&str, &str)] = &[
    ("startupProbe", "startup"),
    ("readinessProbe", "readiness"),
    ("livenessProbe", "liveness"),
    ("lifecycle/postStart", "post-start"),
    ("lifecycle/preStop", "pre-stop"),
];
/// What the kubelet waits for, unless told.
const TIMEOUT: u64 = 1;
/// A hook may take as long as the pod has.
const HOOK_TIMEOUT: u64 = 30;

/// Turns the probes of all containers to the sidecar; returns what it is to ask, as `OUTRIGGER_PROBES` holds it.
pub fn rewrite(
    editor: &mut Editor<'_>,
    settings: &Settings,
    notes: &mut Vec<Note>,
) -> Result<Map<String, Value>, InjectError> {
    let mut probes = Map::new();
    let skipped = ranges(&settings.skip_inbound_ports).unwrap_or_default();
    for list in ["initContainers", "containers"] {
        let containers = editor.pod()["spec"][list].as_array().cloned().unwrap_or_default();
        for container in containers {
            let Some(name) = container["name"].as_str() else { continue };
            for (place, kind) in PLACES {
                let Some(original) = container.pointer(&format!("/{place}")) else { continue };
                let Some(asked) = question(original, &container) else { continue };
                let Some(port) = asked["port"].as_u64().and_then(|port| u16::try_from(port).ok()) else {
                    notes.push(Note::new(format!(
                        "{place} of container `{name}` names a port that the container does not have: left as it is"
                    )));
                    continue;
                };
                if skipped.iter().any(|range| range.contains(&port)) {
                    continue;
                }
                let mut asked = asked;
                let hook = place.starts_with("lifecycle");
                let timeout =
                    original["timeoutSeconds"].as_u64().unwrap_or(if hook { HOOK_TIMEOUT } else { TIMEOUT });
                asked["timeout"] = timeout.into();
                probes.insert(format!("{name}/{kind}"), asked);
                editor.set(&format!("/spec/{list}/{name}/{place}"), turned(original, name, kind))?;
            }
        }
    }
    Ok(probes)
}

/// What is asked, with the port's number; none where the network is not needed, or somebody else is asked.
fn question(probe: &Value, container: &Value) -> Option<Value> {
    let number = |port: &Value| match port {
        Value::String(name) => name.parse().ok().or_else(|| {
            let ports = container["ports"].as_array()?;
            ports.iter().find(|port| port["name"] == **name)?["containerPort"].as_u64()
        }),
        port => port.as_u64(),
    };
    if let Some(http) = probe.get("httpGet") {
        if http["host"].as_str().is_some_and(|host| !host.is_empty()) {
            return None;
        }
        let mut asked = json!({"port": number(&http["port"]), "http": http["path"].as_str().unwrap_or("/")});
        if http["scheme"] == "HTTPS" {
            asked["tls"] = true.into();
        }
        if let Some(headers) = http["httpHeaders"].as_array().filter(|headers| !headers.is_empty()) {
            asked["headers"] = headers.iter().map(|field| json!([field["name"], field["value"]])).collect();
        }
        Some(asked)
    } else if let Some(grpc) = probe.get("grpc") {
        Some(json!({"port": number(&grpc["port"]), "grpc": grpc["service"].as_str().unwrap_or("")}))
    } else if let Some(tcp) = probe.get("tcpSocket") {
        let elsewhere = tcp["host"].as_str().is_some_and(|host| !host.is_empty());
        (!elsewhere).then(|| json!({"port": number(&tcp["port"]), "tcp": true}))
    } else {
        None
    }
}

/// The same probe, asking the sidecar.
fn turned(original: &Value, container: &str, kind: &str) -> Value {
    let mut probe = Map::new();
    let asks = json!({"path": format!("/probe/{container}/{kind}"), "port": PROBE});
    for (key, value) in original.as_object().into_iter().flatten() {
        match &**key {
            "httpGet" | "grpc" | "tcpSocket" => probe.insert("httpGet".to_owned(), asks.clone()),
            _ => probe.insert(key.clone(), value.clone()),
        };
    }
    Value::Object(probe)
}
