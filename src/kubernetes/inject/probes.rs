//! Probes and lifecycle hooks that the kubelet executes over the network.
//!
//! Redirection would send them to the sidecar: strict mutual TLS rejects the kubelet, which has no certificate, and a
//! TCP probe would test the sidecar, not the service. The kubelet cannot be recognised by its address, which depends
//! on the network plugin. So such a probe is pointed at the sidecar's probe port, where `/probe/CONTAINER/KIND`
//! executes the original one from inside the pod. Probes that run a command are not changed.

use serde_json::{Map, Value, json};

use super::{
    InjectError, Note,
    editor::PodEditor,
    proxy_config::PROBE,
    settings::{Settings, ranges},
};

/// The fields of a container with probes and hooks, and their names in the path.
const PROBE_FIELDS: &[(&str, &str)] = &[
    ("startupProbe", "startup"),
    ("readinessProbe", "readiness"),
    ("livenessProbe", "liveness"),
    ("lifecycle/postStart", "post-start"),
    ("lifecycle/preStop", "pre-stop"),
];
/// The kubelet's default timeout, in seconds.
const TIMEOUT: u64 = 1;
/// The timeout of hooks, in seconds: the default grace period.
const HOOK_TIMEOUT: u64 = 30;

/// Points the probes of all containers at the sidecar. Returns the original ones for `OUTRIGGER_PROBES`.
pub fn rewrite(
    editor: &mut PodEditor<'_>,
    settings: &Settings,
    notes: &mut Vec<Note>,
) -> Result<Map<String, Value>, InjectError> {
    let mut probes = Map::new();
    let skipped = ranges(&settings.skip_inbound_ports).unwrap_or_default();
    for list in ["initContainers", "containers"] {
        let containers = editor.pod()["spec"][list].as_array().cloned().unwrap_or_default();
        for container in containers {
            let Some(name) = container["name"].as_str() else { continue };
            for (field, kind) in PROBE_FIELDS {
                let Some(original) = container.pointer(&format!("/{field}")) else { continue };
                let Some(target) = original_probe(original, &container) else { continue };
                let Some(port) = target["port"].as_u64().and_then(|port| u16::try_from(port).ok()) else {
                    notes.push(Note::new(format!(
                        "{field} of container `{name}` names a port that the container does not have: not changed"
                    )));
                    continue;
                };
                if skipped.iter().any(|range| range.contains(&port)) {
                    continue;
                }
                let mut target = target;
                let hook = field.starts_with("lifecycle");
                let timeout =
                    original["timeoutSeconds"].as_u64().unwrap_or(if hook { HOOK_TIMEOUT } else { TIMEOUT });
                target["timeout"] = timeout.into();
                probes.insert(format!("{name}/{kind}"), target);
                editor
                    .set(&format!("/spec/{list}/{name}/{field}"), redirected_probe(original, name, kind))?;
            }
        }
    }
    Ok(probes)
}

/// The original probe, with a numeric port; `None` if it does not use the network, or addresses another host.
fn original_probe(probe: &Value, container: &Value) -> Option<Value> {
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
        let mut target = json!({"port": number(&http["port"]), "http": http["path"].as_str().unwrap_or("/")});
        if http["scheme"] == "HTTPS" {
            target["tls"] = true.into();
        }
        if let Some(headers) = http["httpHeaders"].as_array().filter(|headers| !headers.is_empty()) {
            target["headers"] =
                headers.iter().map(|header| json!([header["name"], header["value"]])).collect();
        }
        Some(target)
    } else if let Some(grpc) = probe.get("grpc") {
        Some(json!({"port": number(&grpc["port"]), "grpc": grpc["service"].as_str().unwrap_or("")}))
    } else if let Some(tcp) = probe.get("tcpSocket") {
        let elsewhere = tcp["host"].as_str().is_some_and(|host| !host.is_empty());
        (!elsewhere).then(|| json!({"port": number(&tcp["port"]), "tcp": true}))
    } else {
        None
    }
}

/// The same probe, pointed at the sidecar.
fn redirected_probe(original: &Value, container: &str, kind: &str) -> Value {
    let mut probe = Map::new();
    let http_get = json!({"path": format!("/probe/{container}/{kind}"), "port": PROBE});
    for (key, value) in original.as_object().into_iter().flatten() {
        match &**key {
            "httpGet" | "grpc" | "tcpSocket" => probe.insert("httpGet".to_owned(), http_get.clone()),
            _ => probe.insert(key.clone(), value.clone()),
        };
    }
    Value::Object(probe)
}
