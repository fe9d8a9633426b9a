//! Injection into files: YAML in, YAML out, all that is not ours as it was.

use serde_json::Value;

use super::{
    inject::{self, Defaults, InjectError, Outcome, Owner, Step, resolve},
    patch::Operation,
    yaml::{self, Document, YamlError, edit, write},
};

/// What comes out.
#[derive(Debug, Default)]
pub struct Injected {
    pub text: String,
    /// What the user should know, a line each.
    pub notes: Vec<String>,
}

/// Why a file stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("line {line}: this is no YAML: {reason}{hint}")]
    Yaml { line: usize, reason: String, hint: &'static str },
    #[error("{who}: {source}")]
    Inject { who: String, source: InjectError },
}

/// Puts the sidecar into all workloads of a stream of documents, anew where it was put in before; without `defaults`,
/// takes it out.
///
/// # Errors
///
/// All that is wrong, in the order of the file.
pub fn inject(text: &str, defaults: Option<&Defaults>) -> Result<Injected, Vec<ManifestError>> {
    let (mut done, mut errors, mut line) = (Injected::default(), Vec::new(), 0);
    for part in yaml::documents(text) {
        match document(part, defaults, &mut done.notes) {
            Ok(part) => done.text += &part,
            Err(Wrong::Yaml(error)) => {
                let hint = match part.contains("{{") {
                    true => " (a template must be rendered first: helm template … | outrigger inject)",
                    false => "",
                };
                errors.push(ManifestError::Yaml { line: line + error.line, reason: error.reason, hint });
            }
            Err(Wrong::Inject(who, source)) => errors.push(ManifestError::Inject { who, source }),
        }
        line += part.matches('\n').count();
    }
    if errors.is_empty() { Ok(done) } else { Err(errors) }
}

enum Wrong {
    Yaml(YamlError),
    Inject(String, InjectError),
}

fn document(part: &str, defaults: Option<&Defaults>, notes: &mut Vec<String>) -> Result<String, Wrong> {
    let value = Document::parse(part).map_err(Wrong::Yaml)?.value();
    let mut targets = Vec::new();
    find(&value, String::new(), &mut targets);
    let mut draft = Draft { text: part.to_owned(), value, rewritten: false };
    for target in targets {
        let who = target.who(&draft.value);
        draft.workload(&target, defaults, &who, notes).map_err(|error| Wrong::Inject(who.clone(), error))?;
        if std::mem::take(&mut draft.rewritten) {
            notes.push(format!(
                "{who}: {}, so the document was written anew, without comments",
                edit::TooUnusual
            ));
        }
    }
    Ok(draft.text)
}

/// A workload in a document.
struct Target {
    /// Where it is.
    object: String,
    /// Where in it the pod is.
    pod: &'static str,
}

impl Target {
    fn who(&self, document: &Value) -> String {
        let object = document.pointer(&self.object).unwrap_or(&Value::Null);
        let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
        match object["metadata"]["namespace"].as_str() {
            Some(namespace) => format!("{} {namespace}/{}", text(&object["kind"]), name(object)),
            None => format!("{} {}", text(&object["kind"]), name(object)),
        }
    }
}

fn name(object: &Value) -> &str {
    let metadata = &object["metadata"];
    let generated = || metadata["generateName"].as_str().map(|prefix| prefix.trim_end_matches('-'));
    metadata["name"].as_str().or_else(generated).unwrap_or("?")
}

/// Where a workload of this kind says what its pods are.
fn pod_of(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "Pod" => "",
        "Deployment" | "StatefulSet" | "DaemonSet" | "Job" | "ReplicaSet" | "ReplicationController" => {
            "/spec/template"
        }
        "CronJob" => "/spec/jobTemplate/spec/template",
        _ => return None,
    })
}

fn find(object: &Value, at: String, targets: &mut Vec<Target>) {
    let Some(kind) = object["kind"].as_str() else { return };
    // A thing of another's making may have the same name and another shape.
    let known =
        object["apiVersion"].as_str().is_some_and(|version| ["v1", "apps/v1", "batch/v1"].contains(&version));
    if let (true, Some(pod)) = (known, pod_of(kind)) {
        if object.pointer(pod).is_some_and(|pod| pod["spec"].is_object()) {
            targets.push(Target { object: at, pod });
        }
    } else if kind.ends_with("List") && object["items"].is_array() {
        for (index, item) in object["items"].as_array().into_iter().flatten().enumerate() {
            find(item, format!("{at}/items/{index}"), targets);
        }
    }
}

/// A document that is being changed: what it says, and how.
struct Draft {
    text: String,
    value: Value,
    rewritten: bool,
}

impl Draft {
    fn workload(
        &mut self,
        target: &Target,
        defaults: Option<&Defaults>,
        who: &str,
        notes: &mut Vec<String>,
    ) -> Result<(), InjectError> {
        let place = format!("{}{}", target.object, target.pod);
        let steps = inject::undo(self.pod(&place))?;
        self.change(&place, steps)?;
        let Some(defaults) = defaults else { return Ok(()) };

        let object = self.pod(&target.object);
        if inject::opted_out(object) {
            return Ok(());
        }
        let (kind, name) = (object["kind"].as_str().unwrap_or_default(), name(object));
        if !target.pod.is_empty() {
            let own = object["metadata"]["annotations"].as_object().into_iter().flatten();
            for (key, _) in own.filter(|(key, _)| key.starts_with(inject::PREFIX) && *key != inject::SWITCH) {
                notes.push(format!(
                    "{who}: {key} has no effect here, it belongs to the pod's annotations ({}/metadata)",
                    target.pod.trim_start_matches('/')
                ));
            }
        }
        let pod = self.pod(&place);
        let document = Document::parse(&self.text).ok();
        let written = |at: &str| {
            let (path, value) = resolve(pod, at)?;
            let (document, path) = (document.as_ref()?, format!("{place}{path}"));
            let raw = edit::raw(&self.text, document, &path)?;
            (!edit::is_usual(&self.text, document, &path, value)).then(|| raw.to_owned())
        };
        match inject::inject(pod, Owner { kind, name }, defaults, &written)? {
            Outcome::Leave(None) => Ok(()),
            Outcome::Leave(Some(reason)) => {
                notes.push(format!("{who}: left as it is: {reason}"));
                Ok(())
            }
            Outcome::Patch { operations, notes: told } => {
                notes.extend(told.into_iter().map(|note| format!("{who}: {}", note.0)));
                let steps = operations.into_iter().map(|operation| Step { operation, text: None });
                self.change(&place, steps.collect())
            }
        }
    }

    fn pod(&self, place: &str) -> &Value {
        self.value.pointer(place).unwrap_or(&Value::Null)
    }

    /// Makes changes in value and text. What the text then says is read, and decides.
    fn change(&mut self, place: &str, steps: Vec<Step>) -> Result<(), InjectError> {
        if steps.is_empty() {
            return Ok(());
        }
        let before = self.text.clone();
        let mut text = Ok(before.clone());
        for Step { operation, text: written } in steps {
            let operation = within(place, operation);
            operation.apply(&mut self.value)?;
            text = text.and_then(|text| match written {
                Some(raw) => edit::restore(&text, operation.path(), &raw),
                None => edit::apply(&text, &operation),
            });
        }
        let says = |text: &String| Document::parse(text).is_ok_and(|document| document.value() == self.value);
        // What follows it in the stream begins on a line of its own.
        let ends = |text: &String| text.ends_with('\n') || !before.ends_with('\n');
        self.text = match text {
            Ok(text) if says(&text) && ends(&text) => text,
            _ => {
                self.rewritten = true;
                let marker =
                    before.split_inclusive('\n').find(|line| line.starts_with("---")).map(|_| "---\n");
                marker.unwrap_or_default().to_owned() + &write::document(&self.value)
            }
        };
        Ok(())
    }
}

/// The operation on the pod as one on the document that holds it.
fn within(place: &str, operation: Operation) -> Operation {
    let put = |path: String| format!("{place}{path}");
    match operation {
        Operation::Add { path, value } => Operation::Add { path: put(path), value },
        Operation::Replace { path, value } => Operation::Replace { path: put(path), value },
        Operation::Remove { path } => Operation::Remove { path: put(path) },
    }
}
