//! Injection: a pure function from a pod to a JSON Patch, or to the reason for skipping it.
//!
//! The order of containers: redirection first, then the sidecar, then the pod's own init containers, whose requests
//! the running sidecar proxies. Without native sidecars the redirection comes last, because with it no container can
//! connect until the sidecar runs; the pod's own init containers then bypass the proxy.

mod editor;
mod environment;
mod probes;
pub mod proxy_config;
mod settings;
mod sidecar;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value, json};

use editor::{OriginalText, PodEditor};
pub use editor::{PatchStep, RECORD_ANNOTATION, resolve, undo};
pub use settings::{Defaults, KEYS, PREFIX};
use settings::{Mode, Settings};
pub use sidecar::{CONFIG_KEY, CONFIG_MAP, UID};

use super::patch::{NoSuchPath, Operation};

/// The name of the proxy's container.
pub const SIDECAR: &str = "outrigger";
/// The name of the init container that installs the kernel rules.
pub const REDIRECT: &str = "outrigger-redirect";
/// The label or annotation that opts a pod in or out.
pub const INJECT_KEY: &str = "outrigger.dev/inject";
/// Where certificate files are mounted.
pub const IDENTITY_DIRECTORY: &str = "/var/run/secrets/outrigger";
/// The agent's socket, as SPIRE's CSI driver mounts it.
pub const SPIRE_SOCKET: &str = "/spiffe-workload-api/spire-agent.sock";

/// Why a pod is rejected: running it silently without a sidecar would be worse.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InjectError {
    #[error("{PREFIX}{key}: {reason}")]
    Annotation { key: String, reason: String },
    #[error("the defaults: {0}")]
    Defaults(String),
    #[error("{path} is not {expected}")]
    Shape { path: String, expected: &'static str },
    #[error("there is a {kind} `{name}` that injection did not add: rename it")]
    NameConflict { kind: &'static str, name: String },
    #[error(
        "{whose} runs as user {UID}, the proxy's user: its requests would bypass the proxy; choose another runAsUser"
    )]
    ReservedUser { whose: String },
    #[error("the annotation {RECORD_ANNOTATION} is invalid ({0}): remove it and the sidecar by hand")]
    Record(String),
    #[error("the annotation {RECORD_ANNOTATION} does not match the pod: {0}")]
    RecordMismatch(#[from] NoSuchPath),
}

/// A warning for the user who injects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note(pub String);

impl Note {
    fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

/// The outcome of injection.
#[derive(Debug)]
pub enum InjectOutcome {
    Patch {
        operations: Vec<Operation>,
        notes: Vec<Note>,
    },
    /// The pod is left unchanged; the reason, unless it opted out.
    Skip(Option<String>),
}

/// The controller of a pod.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'o> {
    /// Job, Deployment and so on; Pod if it has no controller.
    pub kind: &'o str,
    pub name: &'o str,
}

/// Injects the sidecar into a pod or pod template. `written` returns the original text of a value at a path (by names),
/// for an exact undo.
///
/// # Errors
///
/// If the pod's annotations are invalid or the pod conflicts with the sidecar.
pub fn inject(
    pod: &Value,
    owner: Owner<'_>,
    defaults: &Defaults,
    written: OriginalText<'_>,
) -> Result<InjectOutcome, InjectError> {
    let (spec, annotations) = (&pod["spec"], &pod["metadata"]["annotations"]);
    if opted_out(pod) {
        return Ok(InjectOutcome::Skip(None));
    }
    if let Some(reason) = unsupported_reason(spec) {
        return Ok(InjectOutcome::Skip(Some(reason.to_owned())));
    }
    let mut settings = defaults.read(annotations)?;
    let is_job = ["Job", "CronJob"].contains(&owner.kind);
    if is_job && !settings.native_sidecar {
        let reason = "without native sidecars the sidecar never ends, so neither would the Job: remove outrigger.dev/native-sidecar, or start the command with `outrigger run -- CMD`";
        return Ok(InjectOutcome::Skip(Some(reason.to_owned())));
    }
    check(pod, &settings)?;

    let mut notes = Vec::new();
    let is_long_running = spec["restartPolicy"].as_str().is_none_or(|policy| policy == "Always");
    if !is_long_running && !settings.has_own_drain_delay {
        // It ends with its work and serves no clients: a drain delay would only make the Job take longer.
        settings.drain_delay = 0;
    }
    // A preStop sleep longer than the grace period makes the pod invalid, and requests in flight need time too.
    let grace = proxy_config::grace(spec);
    let max_delay = grace / 2;
    if settings.drain_delay > max_delay {
        notes.extend(annotations.get("outrigger.dev/drain-delay").map(|_| {
            Note::new(format!(
                "drain-delay is shortened to {max_delay}s, half of terminationGracePeriodSeconds"
            ))
        }));
        settings.drain_delay = max_delay;
    }
    let mut editor = PodEditor::new(pod.clone(), written);
    let probes = match settings.mode {
        Mode::Redirect => probes::rewrite(&mut editor, &settings, &mut notes)?,
        Mode::Env => {
            environment::extend(&mut editor, &mut notes)?;
            Map::new()
        }
    };
    if settings.drain_delay > 0 && is_long_running {
        add_prestop_sleep(&mut editor, &settings, prestop_seconds(settings.drain_delay, grace), &mut notes)?;
    }
    let service = service_name(pod, owner);
    let proxy = sidecar::sidecar(spec, &settings, &service, &probes);
    let rules = (settings.mode == Mode::Redirect).then(|| sidecar::redirect(&settings));
    if settings.native_sidecar {
        editor.put_items("/spec/initContainers", 0, rules.into_iter().chain([proxy]).collect())?;
    } else {
        editor.put_items("/spec/initContainers", usize::MAX, rules.into_iter().collect())?;
        editor.put_items("/spec/containers", 0, vec![proxy])?;
    }
    editor.put_items("/spec/volumes", usize::MAX, sidecar::volumes(&settings))?;
    let added = metadata_annotations(spec, annotations, &settings, &mut notes);
    Ok(InjectOutcome::Patch { operations: editor.finish(added)?, notes })
}

/// Whether the pod is already injected.
pub fn is_injected(pod: &Value) -> bool {
    let existing = |list: &str| members(&pod["spec"], list).any(|container| container["name"] == SIDECAR);
    pod["metadata"]["annotations"].get(RECORD_ANNOTATION).is_some()
        && (existing("initContainers") || existing("containers"))
}

/// Whether a workload or pod opts out, by label or annotation.
pub fn opted_out(object: &Value) -> bool {
    ["annotations", "labels"].iter().any(|kind| object["metadata"][kind][INJECT_KEY] == "disabled")
}

fn members<'v>(spec: &'v Value, list: &str) -> impl Iterator<Item = &'v Value> {
    spec[list].as_array().into_iter().flatten()
}

fn unsupported_reason(spec: &Value) -> Option<&'static str> {
    if spec["hostNetwork"] == true {
        return Some("it uses the node's network (hostNetwork), whose traffic must not be redirected");
    }
    if spec["os"]["name"] == "windows" || spec["nodeSelector"]["kubernetes.io/os"] == "windows" {
        return Some("it runs on Windows, which the sidecar does not support");
    }
    None
}

fn check(pod: &Value, settings: &Settings) -> Result<(), InjectError> {
    let spec = &pod["spec"];
    let conflict = |kind, name: &str| Err(InjectError::NameConflict { kind, name: name.to_owned() });
    if members(spec, "containers").next().is_none() {
        return Err(InjectError::Shape {
            path: "spec.containers".to_owned(),
            expected: "a list of containers",
        });
    }
    let uid = |context: &Value| context["runAsUser"].as_u64() == Some(UID.into());
    for container in members(spec, "initContainers").chain(members(spec, "containers")) {
        let Some(name) = container["name"].as_str() else {
            return Err(InjectError::Shape {
                path: "the name of a container".to_owned(),
                expected: "present",
            });
        };
        if name == SIDECAR || name == REDIRECT {
            return conflict("container", name);
        }
        if settings.mode == Mode::Redirect && uid(&container["securityContext"]) {
            return Err(InjectError::ReservedUser { whose: format!("container `{name}`") });
        }
    }
    if settings.mode == Mode::Redirect && uid(&spec["securityContext"]) {
        return Err(InjectError::ReservedUser { whose: "the pod".to_owned() });
    }
    match members(spec, "volumes")
        .filter_map(|volume| volume["name"].as_str())
        .find(|name| name.starts_with("outrigger-"))
    {
        Some(name) => conflict("volume", name),
        None => Ok(()),
    }
}

/// How much longer, in seconds, the service must run than the sidecar's drain delay: keep-alive connections may bring a
/// request up to a second later, and requests in flight have to finish.
const SLEEP_MARGIN: u64 = 3;

/// How long the preStop hook of a container sleeps. All hooks start when termination begins, and a service that ends
/// before its sidecar stops accepting causes failed requests. With a short grace period: half of what the drain delay
/// leaves.
fn prestop_seconds(drain_delay: u64, grace: u64) -> u64 {
    drain_delay + SLEEP_MARGIN.min(grace.saturating_sub(drain_delay) / 2).max(1)
}

/// Adds a sleep to containers without a preStop hook, because clients learn of the termination with a delay.
fn add_prestop_sleep(
    editor: &mut PodEditor<'_>,
    settings: &Settings,
    seconds: u64,
    notes: &mut Vec<Note>,
) -> Result<(), InjectError> {
    let sleep = match settings.native_sidecar {
        true => json!({"sleep": {"seconds": seconds}}),
        // Clusters without native sidecars do not support `sleep` actions. An image without `sleep` only causes an
        // event.
        false => json!({"exec": {"command": ["sleep", seconds.to_string()]}}),
    };
    let containers: Vec<Value> = members(&editor.pod()["spec"], "containers").cloned().collect();
    for container in &containers {
        let Some(name) = container["name"].as_str() else { continue };
        match container["lifecycle"].get("preStop") {
            None => {
                let entry = Map::from_iter([("preStop".to_owned(), sleep.clone())]);
                editor.put_entries(&format!("/spec/containers/{name}/lifecycle"), entry)?;
            }
            Some(own) => notes.extend(sleep_seconds(own).filter(|sleep_seconds| *sleep_seconds < seconds).map(|sleep_seconds| {
                Note::new(format!(
                    "the preStop of container `{name}` sleeps for {sleep_seconds}s, and the sidecar sends it requests for up to {seconds}s after termination begins: let it sleep for {seconds}s, or shorten outrigger.dev/drain-delay"
                ))
            })),
        }
    }
    Ok(())
}

/// How long a hook sleeps, if it does nothing else.
fn sleep_seconds(hook: &Value) -> Option<u64> {
    let command = || {
        let words: Vec<&str> = hook["exec"]["command"].as_array()?.iter().filter_map(Value::as_str).collect();
        let seconds = words.join(" ");
        let seconds = seconds.trim_start_matches("sh -c ").trim_start_matches("/bin/sh -c ");
        seconds.strip_prefix("sleep ").or_else(|| seconds.strip_prefix("/bin/sleep "))?.trim().parse().ok()
    };
    hook["sleep"]["seconds"].as_u64().or_else(command)
}

/// Annotations for scraping the sidecar's metrics, unless the pod has its own.
fn metadata_annotations(
    spec: &Value,
    existing: &Value,
    settings: &Settings,
    notes: &mut Vec<Note>,
) -> Map<String, Value> {
    let mut added = Map::new();
    let mut set = |key: &str, value: String| added.insert(key.to_owned(), value.into());
    let own = existing.as_object().into_iter().flatten().any(|(key, _)| key.starts_with("prometheus.io/"));
    if own {
        notes.push(Note::new(format!(
            "the pod has its own prometheus.io annotations, which are kept; the sidecar's metrics are on port {}",
            proxy_config::PROBE
        )));
    } else {
        set("prometheus.io/scrape", "true".to_owned());
        set("prometheus.io/port", proxy_config::PROBE.to_string());
        set("prometheus.io/path", "/metrics".to_owned());
    }
    // `kubectl logs` defaults to the first container.
    let default = "kubectl.kubernetes.io/default-container";
    let first = members(spec, "containers").find_map(|container| container["name"].as_str());
    if let (false, None, Some(first)) = (settings.native_sidecar, existing.get(default), first) {
        set(default, first.to_owned());
    }
    added
}

/// The service name in telemetry: the standard label, else the name of the controller.
fn service_name(pod: &Value, owner: Owner<'_>) -> String {
    let metadata = &pod["metadata"];
    if let Some(name) = metadata["labels"]["app.kubernetes.io/name"].as_str().filter(|name| !name.is_empty())
    {
        return name.to_owned();
    }
    let name = match (owner.kind, metadata["labels"]["pod-template-hash"].as_str()) {
        ("ReplicaSet", Some(hash)) => owner.name.strip_suffix(hash).and_then(|name| name.strip_suffix('-')),
        // A CronJob's Jobs end in the minute of their schedule.
        ("Job", _) => owner.name.rsplit_once('-').and_then(|(name, minute)| {
            (minute.len() >= 8 && minute.bytes().all(|byte| byte.is_ascii_digit())).then_some(name)
        }),
        _ => None,
    };
    name.unwrap_or(owner.name).to_owned()
}
