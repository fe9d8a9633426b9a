//! What a pod gets, and why it gets none: a pure function from a pod to a JSON Patch.
//!
//! The order of containers: rules first, then the sidecar, then the pod's own init containers, whose calls the running
//! sidecar carries. Where there are no native sidecars, the rules come last, since until the sidecar runs nothing else
//! could connect to anything; the pod's own init containers then do without it.

mod editor;
mod environment;
mod probes;
pub mod proxy_config;
mod settings;
mod sidecar;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value, json};

use editor::{Editor, Written};
pub use editor::{RECORD, Step, resolve, undo};
pub use settings::{Defaults, KEYS, PREFIX};
use settings::{Mode, Settings};
pub use sidecar::{CONFIG_KEY, CONFIG_MAP, UID};

use super::patch::{NoSuchPlace, Operation};

/// The proxy's container.
pub const SIDECAR: &str = "outrigger";
/// The one that sets the kernel's rules.
pub const REDIRECT: &str = "outrigger-redirect";
/// The label or annotation that lets a pod in or out.
pub const SWITCH: &str = "outrigger.dev/inject";
/// Where a certificate's files are.
pub const IDENTITY_DIRECTORY: &str = "/var/run/secrets/outrigger";
/// Where SPIRE's CSI driver puts the agent's socket.
pub const SPIRE_SOCKET: &str = "/spiffe-workload-api/spire-agent.sock";

/// What is wrong with a pod, so that running it without a sidecar in silence would be worse than not at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InjectError {
    #[error("{PREFIX}{key}: {reason}")]
    Annotation { key: String, reason: String },
    #[error("the defaults: {0}")]
    Defaults(String),
    #[error("{what} is not {wanted}")]
    Shape { what: String, wanted: &'static str },
    #[error("there is a {what} `{name}` that injection has not put there: give it another name")]
    Taken { what: &'static str, name: String },
    #[error(
        "{whose} runs as user {UID}, which is the proxy's own: its calls would go past the proxy; choose another runAsUser"
    )]
    User { whose: String },
    #[error("the annotation {RECORD} cannot be used ({0}): take it and the sidecar out by hand")]
    Record(String),
    #[error("the annotation {RECORD} does not fit the pod: {0}")]
    Misfit(#[from] NoSuchPlace),
}

/// Something to tell whoever injects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note(pub String);

impl Note {
    fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

/// What comes of a pod.
#[derive(Debug)]
pub enum Outcome {
    Patch {
        operations: Vec<Operation>,
        notes: Vec<Note>,
    },
    /// It stays as it is; why, if that is not what it asked for.
    Leave(Option<String>),
}

/// What is known of a pod besides itself.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'o> {
    /// Job, Deployment and so on; Pod where nothing owns it.
    pub kind: &'o str,
    pub name: &'o str,
}

/// What a pod (or a template of one) gets. `written` says how a value at a place (by names) is written, if it is to be
/// put back to the letter some day.
///
/// # Errors
///
/// Where what the pod says of its sidecar cannot be done.
pub fn inject(
    pod: &Value,
    owner: Owner<'_>,
    defaults: &Defaults,
    written: Written<'_>,
) -> Result<Outcome, InjectError> {
    let (spec, annotations) = (&pod["spec"], &pod["metadata"]["annotations"]);
    if opted_out(pod) {
        return Ok(Outcome::Leave(None));
    }
    if let Some(reason) = cannot_take_one(spec) {
        return Ok(Outcome::Leave(Some(reason.to_owned())));
    }
    let mut settings = defaults.read(annotations)?;
    let ends = ["Job", "CronJob"].contains(&owner.kind);
    if ends && !settings.native_sidecar {
        let reason = "a sidecar that is no native one never ends, and neither would the Job: take outrigger.dev/native-sidecar away, or start the command with `outrigger run -- CMD`";
        return Ok(Outcome::Leave(Some(reason.to_owned())));
    }
    check(pod, &settings)?;

    let mut notes = Vec::new();
    let serves = spec["restartPolicy"].as_str().is_none_or(|policy| policy == "Always");
    if !serves && !settings.drain_delay_is_own {
        // It ends when its work is done, and no client waits for it: its sidecar would only make the Job last longer.
        settings.drain_delay = 0;
    }
    // A sleep longer than the pod's grace period makes the pod invalid, and calls in flight need time too.
    let grace = proxy_config::grace(spec);
    let most = grace / 2;
    if settings.drain_delay > most {
        notes.extend(annotations.get("outrigger.dev/drain-delay").map(|_| {
            Note::new(format!("drain-delay is shortened to {most}s, half of terminationGracePeriodSeconds"))
        }));
        settings.drain_delay = most;
    }
    let mut editor = Editor::new(pod.clone(), written);
    let probes = match settings.mode {
        Mode::Redirect => probes::rewrite(&mut editor, &settings, &mut notes)?,
        Mode::Env => {
            environment::extend(&mut editor, &mut notes)?;
            Map::new()
        }
    };
    if settings.drain_delay > 0 && serves {
        linger(&mut editor, &settings, linger_seconds(settings.drain_delay, grace), &mut notes)?;
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
    let added = our_annotations(spec, annotations, &settings, &mut notes);
    Ok(Outcome::Patch { operations: editor.finish(added)?, notes })
}

/// Whether the pod is injected already.
pub fn is_injected(pod: &Value) -> bool {
    let there = |list: &str| members(&pod["spec"], list).any(|container| container["name"] == SIDECAR);
    pod["metadata"]["annotations"].get(RECORD).is_some() && (there("initContainers") || there("containers"))
}

/// Whether a workload or pod says that it wants no sidecar, by label or annotation.
pub fn opted_out(object: &Value) -> bool {
    ["annotations", "labels"].iter().any(|kind| object["metadata"][kind][SWITCH] == "disabled")
}

fn members<'v>(spec: &'v Value, list: &str) -> impl Iterator<Item = &'v Value> {
    spec[list].as_array().into_iter().flatten()
}

fn cannot_take_one(spec: &Value) -> Option<&'static str> {
    if spec["hostNetwork"] == true {
        return Some("it shares the node's network (hostNetwork), whose traffic is not the pod's to steer");
    }
    if spec["os"]["name"] == "windows" || spec["nodeSelector"]["kubernetes.io/os"] == "windows" {
        return Some("it runs on Windows, where there is no sidecar");
    }
    None
}

fn check(pod: &Value, settings: &Settings) -> Result<(), InjectError> {
    let spec = &pod["spec"];
    let taken = |what, name: &str| Err(InjectError::Taken { what, name: name.to_owned() });
    if members(spec, "containers").next().is_none() {
        return Err(InjectError::Shape {
            what: "spec.containers".to_owned(),
            wanted: "a list of containers",
        });
    }
    let uid = |context: &Value| context["runAsUser"].as_u64() == Some(UID.into());
    for container in members(spec, "initContainers").chain(members(spec, "containers")) {
        let Some(name) = container["name"].as_str() else {
            return Err(InjectError::Shape { what: "the name of a container".to_owned(), wanted: "there" });
        };
        if name == SIDECAR || name == REDIRECT {
            return taken("container", name);
        }
        if settings.mode == Mode::Redirect && uid(&container["securityContext"]) {
            return Err(InjectError::User { whose: format!("container `{name}`") });
        }
    }
    if settings.mode == Mode::Redirect && uid(&spec["securityContext"]) {
        return Err(InjectError::User { whose: "the pod".to_owned() });
    }
    match members(spec, "volumes")
        .filter_map(|volume| volume["name"].as_str())
        .find(|name| name.starts_with("outrigger-"))
    {
        Some(name) => taken("volume", name),
        None => Ok(()),
    }
}

/// How much longer than the sidecar accepts connections its service serves: kept connections may bring a request until a
/// second after that, and what is under way then has to be answered.
const LINGER: u64 = 3;

/// How long containers stay once the pod is told to end. Both hooks begin at that moment, and a service that goes before its
/// sidecar has stopped accepting leaves it nobody to ask. Where the grace period is short, half of what is left of it.
fn linger_seconds(drain_delay: u64, grace: u64) -> u64 {
    drain_delay + LINGER.min(grace.saturating_sub(drain_delay) / 2).max(1)
}

/// Clients hear late that a pod ends: a container without a preStop of its own stays for a moment.
fn linger(
    editor: &mut Editor<'_>,
    settings: &Settings,
    seconds: u64,
    notes: &mut Vec<Note>,
) -> Result<(), InjectError> {
    let sleep = match settings.native_sidecar {
        true => json!({"sleep": {"seconds": seconds}}),
        // Clusters without native sidecars do not know that one. An image without `sleep` only gets an event.
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
            Some(own) => notes.extend(slept(own).filter(|slept| *slept < seconds).map(|slept| {
                Note::new(format!(
                    "the preStop of container `{name}` sleeps for {slept}s, and the sidecar sends it requests for up to {seconds}s after the pod is told to end: let it sleep for {seconds}s, or shorten outrigger.dev/drain-delay"
                ))
            })),
        }
    }
    Ok(())
}

/// How long a hook sleeps, where that is what it does.
fn slept(hook: &Value) -> Option<u64> {
    let command = || {
        let words: Vec<&str> = hook["exec"]["command"].as_array()?.iter().filter_map(Value::as_str).collect();
        let seconds = words.join(" ");
        let seconds = seconds.trim_start_matches("sh -c ").trim_start_matches("/bin/sh -c ");
        seconds.strip_prefix("sleep ").or_else(|| seconds.strip_prefix("/bin/sleep "))?.trim().parse().ok()
    };
    hook["sleep"]["seconds"].as_u64().or_else(command)
}

/// Where the sidecar's metrics are, unless the pod is scraped by its own word.
fn our_annotations(
    spec: &Value,
    there: &Value,
    settings: &Settings,
    notes: &mut Vec<Note>,
) -> Map<String, Value> {
    let mut added = Map::new();
    let mut set = |key: &str, value: String| added.insert(key.to_owned(), value.into());
    let own = there.as_object().into_iter().flatten().any(|(key, _)| key.starts_with("prometheus.io/"));
    if own {
        notes.push(Note::new(format!(
            "it is scraped by its own prometheus.io annotations, which stay; the sidecar's metrics are on port {}",
            proxy_config::PROBE
        )));
    } else {
        set("prometheus.io/scrape", "true".to_owned());
        set("prometheus.io/port", proxy_config::PROBE.to_string());
        set("prometheus.io/path", "/metrics".to_owned());
    }
    // `kubectl logs` takes the first container where nothing is said.
    let default = "kubectl.kubernetes.io/default-container";
    let first = members(spec, "containers").find_map(|container| container["name"].as_str());
    if let (false, None, Some(first)) = (settings.native_sidecar, there.get(default), first) {
        set(default, first.to_owned());
    }
    added
}

/// The name by which telemetry knows the service: the label that is made for it, else what owns the pod.
fn service_name(pod: &Value, owner: Owner<'_>) -> String {
    let metadata = &pod["metadata"];
    if let Some(name) = metadata["labels"]["app.kubernetes.io/name"].as_str().filter(|name| !name.is_empty())
    {
        return name.to_owned();
    }
    let name = match (owner.kind, metadata["labels"]["pod-template-hash"].as_str()) {
        ("ReplicaSet", Some(hash)) => owner.name.strip_suffix(hash).and_then(|name| name.strip_suffix('-')),
        // A CronJob's Jobs are named for the minute.
        ("Job", _) => owner.name.rsplit_once('-').and_then(|(name, minute)| {
            (minute.len() >= 8 && minute.bytes().all(|byte| byte.is_ascii_digit())).then_some(name)
        }),
        _ => None,
    };
    name.unwrap_or(owner.name).to_owned()
}
