//! Injection into files: YAML in, YAML out; all other YAML is left byte for byte unchanged.

use serde_json::Value;

use super::{
    inject::{self, Defaults, InjectError, InjectOutcome, Owner, PatchStep, resolve},
    patch::Operation,
    yaml::{self, Document, YamlError, edit, write},
};

/// The injected stream.
#[derive(Debug, Default)]
pub struct InjectedManifest {
    pub text: String,
    /// Warnings, a line each.
    pub notes: Vec<String>,
}

/// Why a file is not injected.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("line {line}: invalid YAML: {reason}{hint}")]
    Yaml { line: usize, reason: String, hint: &'static str },
    #[error("{workload}: {source}")]
    Inject { workload: String, source: InjectError },
}

/// Injects the sidecar into all workloads of a YAML stream, and updates it in injected ones; without `defaults`,
/// removes it.
///
/// # Errors
///
/// All errors, in the order of the file.
pub fn inject(text: &str, defaults: Option<&Defaults>) -> Result<InjectedManifest, Vec<ManifestError>> {
    let (mut done, mut errors, mut line) = (InjectedManifest::default(), Vec::new(), 0);
    for part in yaml::documents(text) {
        match document(part, defaults, &mut done.notes) {
            Ok(part) => done.text += &part,
            Err(DocumentError::Yaml(error)) => {
                let hint = match part.contains("{{") {
                    true => " (a template must be rendered first: helm template … | outrigger inject)",
                    false => "",
                };
                errors.push(ManifestError::Yaml { line: line + error.line, reason: error.reason, hint });
            }
            Err(DocumentError::Inject(workload, source)) => {
                errors.push(ManifestError::Inject { workload, source })
            }
        }
        line += part.matches('\n').count();
    }
    if errors.is_empty() { Ok(done) } else { Err(errors) }
}

enum DocumentError {
    Yaml(YamlError),
    Inject(String, InjectError),
}

fn document(
    part: &str,
    defaults: Option<&Defaults>,
    notes: &mut Vec<String>,
) -> Result<String, DocumentError> {
    let value = Document::parse(part).map_err(DocumentError::Yaml)?.value();
    let mut targets = Vec::new();
    find_workloads(&value, String::new(), &mut targets);
    let mut draft = Draft { text: part.to_owned(), value, rewritten: false };
    for target in targets {
        let workload = target.display_name(&draft.value);
        draft
            .inject_workload(&target, defaults, &workload, notes)
            .map_err(|error| DocumentError::Inject(workload.clone(), error))?;
        if std::mem::take(&mut draft.rewritten) {
            notes.push(format!(
                "{workload}: {}, so the document was rewritten without comments",
                edit::UnsupportedLayout
            ));
        }
    }
    Ok(draft.text)
}

/// A workload in a document.
struct Workload {
    /// The JSON Pointer to it.
    object: String,
    /// The pointer from there to the pod or template.
    pod: &'static str,
}

impl Workload {
    fn display_name(&self, document: &Value) -> String {
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

/// The pointer to the pod template in a workload of this kind.
fn template_path(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "Pod" => "",
        "Deployment" | "StatefulSet" | "DaemonSet" | "Job" | "ReplicaSet" | "ReplicationController" => {
            "/spec/template"
        }
        "CronJob" => "/spec/jobTemplate/spec/template",
        _ => return None,
    })
}

fn find_workloads(object: &Value, at: String, targets: &mut Vec<Workload>) {
    let Some(kind) = object["kind"].as_str() else { return };
    // Other API groups may have kinds with the same name and another schema.
    let is_known_api =
        object["apiVersion"].as_str().is_some_and(|version| ["v1", "apps/v1", "batch/v1"].contains(&version));
    if let (true, Some(pod)) = (is_known_api, template_path(kind)) {
        if object.pointer(pod).is_some_and(|pod| pod["spec"].is_object()) {
            targets.push(Workload { object: at, pod });
        }
    } else if kind.ends_with("List") && object["items"].is_array() {
        for (index, item) in object["items"].as_array().into_iter().flatten().enumerate() {
            find_workloads(item, format!("{at}/items/{index}"), targets);
        }
    }
}

/// A document that is being changed: its value and its text.
struct Draft {
    text: String,
    value: Value,
    rewritten: bool,
}

impl Draft {
    fn inject_workload(
        &mut self,
        target: &Workload,
        defaults: Option<&Defaults>,
        workload: &str,
        notes: &mut Vec<String>,
    ) -> Result<(), InjectError> {
        let pod_path = format!("{}{}", target.object, target.pod);
        let steps = inject::undo(self.pod(&pod_path))?;
        self.change(&pod_path, steps)?;
        let Some(defaults) = defaults else { return Ok(()) };

        let object = self.pod(&target.object);
        if inject::opted_out(object) {
            return Ok(());
        }
        let (kind, name) = (object["kind"].as_str().unwrap_or_default(), name(object));
        if !target.pod.is_empty() {
            let own = object["metadata"]["annotations"].as_object().into_iter().flatten();
            for (key, _) in
                own.filter(|(key, _)| key.starts_with(inject::PREFIX) && *key != inject::INJECT_KEY)
            {
                notes.push(format!(
                    "{workload}: {key} has no effect here: move it to the pod's annotations ({}/metadata)",
                    target.pod.trim_start_matches('/')
                ));
            }
        }
        let pod = self.pod(&pod_path);
        let document = Document::parse(&self.text).ok();
        let written = |at: &str| {
            let (path, value) = resolve(pod, at)?;
            let (document, path) = (document.as_ref()?, format!("{pod_path}{path}"));
            let raw = edit::original_text(&self.text, document, &path)?;
            (!edit::is_default_format(&self.text, document, &path, value)).then(|| raw.to_owned())
        };
        match inject::inject(pod, Owner { kind, name }, defaults, &written)? {
            InjectOutcome::Skip(None) => Ok(()),
            InjectOutcome::Skip(Some(reason)) => {
                notes.push(format!("{workload}: left as it is: {reason}"));
                Ok(())
            }
            InjectOutcome::Patch { operations, notes: pod_notes } => {
                notes.extend(pod_notes.into_iter().map(|note| format!("{workload}: {}", note.0)));
                let steps = operations.into_iter().map(|operation| PatchStep { operation, text: None });
                self.change(&pod_path, steps.collect())
            }
        }
    }

    fn pod(&self, path: &str) -> &Value {
        self.value.pointer(path).unwrap_or(&Value::Null)
    }

    /// Applies changes to value and text. If the edited text does not parse to the value, the document is rewritten.
    fn change(&mut self, path: &str, steps: Vec<PatchStep>) -> Result<(), InjectError> {
        if steps.is_empty() {
            return Ok(());
        }
        let before = self.text.clone();
        let mut text = Ok(before.clone());
        for PatchStep { operation, text: written } in steps {
            let operation = prefixed(path, operation);
            operation.apply(&mut self.value)?;
            text = text.and_then(|text| match written {
                Some(raw) => edit::restore(&text, operation.path(), &raw),
                None => edit::apply(&text, &operation),
            });
        }
        let matches_value =
            |text: &String| Document::parse(text).is_ok_and(|document| document.value() == self.value);
        // The next document of the stream must begin on its own line.
        let ends_line = |text: &String| text.ends_with('\n') || !before.ends_with('\n');
        self.text = match text {
            Ok(text) if matches_value(&text) && ends_line(&text) => text,
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

/// Converts an operation on the pod to one on its document.
fn prefixed(prefix: &str, operation: Operation) -> Operation {
    let put = |path: String| format!("{prefix}{path}");
    match operation {
        Operation::Add { path, value } => Operation::Add { path: put(path), value },
        Operation::Replace { path, value } => Operation::Replace { path: put(path), value },
        Operation::Remove { path } => Operation::Remove { path: put(path) },
    }
}
