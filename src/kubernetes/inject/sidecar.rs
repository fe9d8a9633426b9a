//! The containers and volumes that injection adds.

use serde_json::{Map, Value, json};

use super::{
    IDENTITY_DIRECTORY, REDIRECT, SIDECAR, SPIRE_SOCKET,
    proxy_config::{self, INBOUND, OUTBOUND, PROBE},
    settings::{Identity, Mode, ProxyLayers, Settings, amount},
};

/// The user that the proxy runs as; redirection exempts its traffic.
pub const UID: u16 = 4140;
/// Where the ConfigMap is mounted.
const CONFIG_DIRECTORY: &str = "/etc/outrigger";
/// The ConfigMap that is used if it exists.
pub const CONFIG_MAP: &str = "outrigger";
/// Its key.
pub const CONFIG_KEY: &str = "outrigger.toml";
/// Ten thousand idle connections need 150 MiB in plaintext and 360 MiB with mutual TLS; more would be a leak.
const MEMORY_LIMIT: &str = "512Mi";
/// The CPU request of the init container for redirection.
const REDIRECT_CPU: &str = "10m";
/// The limit for startup, in seconds.
const STARTUP_SECONDS: u64 = 60;

const CONFIG_VOLUME: &str = "outrigger-config";
const RUN_VOLUME: &str = "outrigger-run";
const IDENTITY_VOLUME: &str = "outrigger-identity";

/// The init container that installs redirection: the only part that needs a capability.
pub fn redirect(settings: &Settings) -> Value {
    let mut args = vec!["redirect".to_owned(), "apply".to_owned()];
    for (option, value) in [
        ("--inbound-port", INBOUND.to_string()),
        ("--outbound-port", OUTBOUND.to_string()),
        ("--uid", UID.to_string()),
        ("--skip-inbound-ports", compact(&settings.skip_inbound_ports)),
        ("--skip-outbound-ports", compact(&settings.skip_outbound_ports)),
    ] {
        if !value.is_empty() {
            args.push(format!("{option}={value}"));
        }
    }
    json!({
        "name": REDIRECT,
        "image": settings.image,
        "args": args,
        "resources": resources([REDIRECT_CPU, "16Mi"], settings.cpu_limit.as_deref(), "64Mi"),
        "securityContext": {
            "runAsUser": 0,
            "runAsGroup": 0,
            "runAsNonRoot": false,
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]},
            "seccompProfile": {"type": "RuntimeDefault"}
        }
    })
}

fn compact(list: &str) -> String {
    list.split(',').map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(",")
}

/// The proxy's container. `probes`: the kubelet probes that it executes.
pub fn sidecar(spec: &Value, settings: &Settings, service: &str, probes: &Map<String, Value>) -> Value {
    let mut args = vec!["run".to_owned()];
    let mut config = |from: String| args.extend(["-c".to_owned(), from]);
    config("env:OUTRIGGER_BASE".to_owned());
    if settings.proxy.defaults.is_some() {
        config("env:OUTRIGGER_DEFAULTS".to_owned());
    }
    let optional = if settings.config.is_none() { "optional:" } else { "" };
    config(format!("{optional}{CONFIG_DIRECTORY}/{CONFIG_KEY}"));
    if settings.proxy.overrides.is_some() {
        config("env:OUTRIGGER_PROXY".to_owned());
    }
    config("env:OUTRIGGER_POD".to_owned());

    let mut env = vec![
        variable("OTEL_SERVICE_NAME", service),
        variable("OUTRIGGER_BASE", &proxy_config::base_layer(spec, settings)),
        variable("OUTRIGGER_POD", &proxy_config::pod_layer(settings)),
    ];
    let ProxyLayers { overrides: above, defaults: beneath } = &settings.proxy;
    for (name, text) in [("OUTRIGGER_DEFAULTS", beneath), ("OUTRIGGER_PROXY", above)] {
        env.extend(text.as_deref().map(|text| variable(name, text)));
    }
    if let Some(filter) = &settings.log {
        env.push(variable("OUTRIGGER_LOG", filter));
    }
    if settings.mode == Mode::Redirect {
        env.push(variable("OUTRIGGER_REDIRECTED", "true"));
    }
    if !probes.is_empty() {
        env.push(variable("OUTRIGGER_PROBES", &Value::Object(probes.clone()).to_string()));
        env.push(
            json!({"name": "OUTRIGGER_POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}),
        );
    }

    let http_get = |path: &str| json!({"path": path, "port": PROBE});
    let mut lifecycle = json!({"preStop": {"exec": {"command": ["/outrigger", "drain"]}}});
    let mut container = json!({"name": SIDECAR, "image": settings.image});
    if settings.native_sidecar {
        container["restartPolicy"] = "Always".into();
    } else {
        // Containers start in order, and each waits for the postStart hook of the previous one.
        let wait = ["/outrigger", "status", "--wait", &format!("{STARTUP_SECONDS}s")].map(ToOwned::to_owned);
        lifecycle["postStart"] = json!({"exec": {"command": wait}});
    }
    container["args"] = args.into();
    container["env"] = env.into();
    container["ports"] = json!([
        {"name": "outrigger-in", "containerPort": INBOUND},
        {"name": "outrigger-probe", "containerPort": PROBE}
    ]);
    container["startupProbe"] =
        json!({"httpGet": http_get("/ready"), "periodSeconds": 1, "failureThreshold": STARTUP_SECONDS});
    container["livenessProbe"] = json!({"httpGet": http_get("/live"), "periodSeconds": 10});
    container["readinessProbe"] = json!({"httpGet": http_get("/ready"), "periodSeconds": 5});
    container["lifecycle"] = lifecycle;
    container["resources"] = resources(
        [&settings.cpu, &settings.memory],
        settings.cpu_limit.as_deref(),
        &memory_limit_for(&settings.memory),
    );
    container["securityContext"] = json!({
        "runAsUser": UID,
        "runAsGroup": UID,
        "runAsNonRoot": true,
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"}
    });
    let mut mounts = vec![
        // The directory, not the file: a subPath mount would never see a change.
        json!({"name": CONFIG_VOLUME, "mountPath": CONFIG_DIRECTORY, "readOnly": true}),
        // For the admin token that `outrigger drain` needs.
        json!({"name": RUN_VOLUME, "mountPath": "/tmp"}),
    ];
    if settings.identity != Identity::None {
        let directory = match settings.identity {
            Identity::Spire => SPIRE_SOCKET.rsplit_once('/').map_or(SPIRE_SOCKET, |(directory, _)| directory),
            _ => IDENTITY_DIRECTORY,
        };
        mounts.push(json!({"name": IDENTITY_VOLUME, "mountPath": directory, "readOnly": true}));
    }
    container["volumeMounts"] = mounts.into();
    container
}

/// Requests and limits. A request above the limit would make the pod invalid.
fn resources([cpu, memory]: [&str; 2], cpu_limit: Option<&str>, memory_limit: &str) -> Value {
    let cpu = cpu_limit.filter(|limit| amount(limit) < amount(cpu)).unwrap_or(cpu);
    let mut limits = json!({"memory": memory_limit});
    if let Some(cpu_limit) = cpu_limit {
        limits["cpu"] = cpu_limit.into();
    }
    json!({"requests": {"cpu": cpu, "memory": memory}, "limits": limits})
}

fn variable(name: &str, value: &str) -> Value {
    json!({"name": name, "value": literal(value)})
}

/// Escapes `$(NAME)`, which Kubernetes would expand.
fn literal(value: &str) -> String {
    value.replace("$(", "$$(")
}

/// The memory limit: at least the request.
fn memory_limit_for(request: &str) -> String {
    if amount(request) > amount(MEMORY_LIMIT) { request.to_owned() } else { MEMORY_LIMIT.to_owned() }
}

/// The volumes that the sidecar mounts.
pub fn volumes(settings: &Settings) -> Vec<Value> {
    let mut config = json!({"name": settings.config.as_deref().unwrap_or(CONFIG_MAP)});
    if settings.config.is_none() {
        config["optional"] = true.into();
    }
    let mut volumes = vec![
        json!({"name": CONFIG_VOLUME, "configMap": config}),
        json!({"name": RUN_VOLUME, "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}),
    ];
    let source = match &settings.identity {
        Identity::None => return volumes,
        Identity::CsiSpiffe => ("csi", json!({"driver": "spiffe.csi.cert-manager.io", "readOnly": true})),
        Identity::Spire => ("csi", json!({"driver": "csi.spiffe.io", "readOnly": true})),
        Identity::Secret(name) => ("secret", json!({"secretName": name})),
    };
    volumes.push(json!({"name": IDENTITY_VOLUME, (source.0): source.1}));
    volumes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_never_below_the_request() {
        for (request, expected) in
            [("32Mi", "512Mi"), ("600000k", "600000k"), ("1Gi", "1Gi"), ("512Mi", "512Mi")]
        {
            assert_eq!(memory_limit_for(request), expected);
        }
    }

    #[test]
    fn kubernetes_does_not_expand_values() {
        assert_eq!(variable("X", "a = \"$(B) ${C}\"")["value"], "a = \"$$(B) ${C}\"");
    }
}
