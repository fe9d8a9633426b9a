//! Reversible edits of a pod.
//!
//! Every change is a JSON Patch operation, applied at once, and records the previous value. The record is stored in an
//! annotation of the pod, so that the original can be restored from the injected pod.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::InjectError;
use crate::kubernetes::patch::{Operation, escape, segments};

/// The annotation that contains the [`InjectionRecord`].
pub const RECORD_ANNOTATION: &str = "outrigger.dev/injected";

/// The changes that injection made to a pod.
#[derive(Debug, Serialize, Deserialize)]
pub struct InjectionRecord {
    /// The version of Outrigger that injected.
    pub version: String,
    pub undo: Vec<Undo>,
}

/// How to revert one change. Paths are JSON Pointers in which list members are addressed by their `name`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Undo {
    /// Members were added to a map or a list.
    Put {
        at: String,
        members: Vec<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        before: Option<PreviousValue>,
    },
    /// A value was replaced.
    Set { at: String, was: PreviousValue },
}

/// The previous value.
#[derive(Debug, Serialize, Deserialize)]
pub struct PreviousValue {
    /// `None`: the key did not exist; null is a value.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub value: Option<Value>,
    /// Its original text, if it differs from the default formatting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// A patch operation, with the original text to restore if there is one.
#[derive(Debug)]
pub struct PatchStep {
    pub operation: Operation,
    /// The original text of the value.
    pub text: Option<String>,
}

/// Returns the original text of the value at a path, if it differs from the default formatting.
pub type OriginalText<'w> = &'w dyn Fn(&str) -> Option<String>;

pub struct PodEditor<'w> {
    pod: Value,
    operations: Vec<Operation>,
    undo: Vec<Undo>,
    written: OriginalText<'w>,
}

/// The map member with that key, or the list member with that `name`.
fn member<'v>(value: &'v Value, segment: &str) -> Option<(String, &'v Value)> {
    match value {
        Value::Object(map) => map.get(segment).map(|member| (escape(segment), member)),
        Value::Array(list) => list
            .iter()
            .enumerate()
            .find(|(_, item)| item["name"] == segment)
            .map(|(index, member)| (index.to_string(), member)),
        _ => None,
    }
}

/// Converts a path by names to a JSON Pointer, and returns its value.
pub fn resolve<'v>(pod: &'v Value, at: &str) -> Option<(String, &'v Value)> {
    segments(at).iter().try_fold((String::new(), pod), |(path, value), segment| {
        member(value, segment).map(|(step, value)| (format!("{path}/{step}"), value))
    })
}

impl<'w> PodEditor<'w> {
    pub fn new(pod: Value, written: OriginalText<'w>) -> Self {
        Self { pod, operations: Vec::new(), undo: Vec::new(), written }
    }

    pub fn pod(&self) -> &Value {
        &self.pod
    }

    fn apply(&mut self, operation: Operation) -> Result<(), InjectError> {
        operation.apply(&mut self.pod)?;
        self.operations.push(operation);
        Ok(())
    }

    fn before(&self, at: &str, value: Option<Value>) -> PreviousValue {
        PreviousValue { text: value.as_ref().and_then(|_| (self.written)(at)), value }
    }

    /// Adds entries to a map, which is created if missing.
    pub fn put_entries(&mut self, at: &str, entries: Map<String, Value>) -> Result<(), InjectError> {
        if entries.is_empty() {
            return Ok(());
        }
        let members = entries.keys().cloned().collect();
        match resolve(&self.pod, at) {
            Some((path, Value::Object(existing))) if !existing.is_empty() => {
                for (key, value) in entries {
                    self.apply(Operation::Add { path: format!("{path}/{}", escape(&key)), value })?;
                }
                self.undo.push(Undo::Put { at: at.to_owned(), members, before: None });
                Ok(())
            }
            None | Some((_, Value::Object(_) | Value::Null)) => self.set_whole(at, entries.into(), members),
            Some(_) => Err(InjectError::Shape { path: at.to_owned(), expected: "a map" }),
        }
    }

    /// Inserts items, each with a `name`, into a list at an index.
    pub fn put_items(&mut self, at: &str, index: usize, items: Vec<Value>) -> Result<(), InjectError> {
        if items.is_empty() {
            return Ok(());
        }
        let members = items.iter().filter_map(|item| item["name"].as_str()).map(ToOwned::to_owned).collect();
        match resolve(&self.pod, at) {
            Some((path, Value::Array(existing))) if !existing.is_empty() => {
                let index = index.min(existing.len());
                for (offset, value) in items.into_iter().enumerate() {
                    self.apply(Operation::Add { path: format!("{path}/{}", index + offset), value })?;
                }
                self.undo.push(Undo::Put { at: at.to_owned(), members, before: None });
                Ok(())
            }
            None | Some((_, Value::Array(_) | Value::Null)) => self.set_whole(at, items.into(), members),
            Some(_) => Err(InjectError::Shape { path: at.to_owned(), expected: "a list" }),
        }
    }

    /// Sets the whole value if there is none, or an empty one.
    fn set_whole(&mut self, at: &str, value: Value, members: Vec<String>) -> Result<(), InjectError> {
        if let Some((path, existing)) = resolve(&self.pod, at) {
            let before = Some(self.before(at, Some(existing.clone())));
            self.apply(Operation::Replace { path, value })?;
            self.undo.push(Undo::Put { at: at.to_owned(), members, before });
            return Ok(());
        }
        let Some((parent, key)) = at.rsplit_once('/') else {
            return Err(InjectError::Shape { path: at.to_owned(), expected: "a map" });
        };
        match resolve(&self.pod, parent) {
            Some((path, Value::Object(map))) if !map.is_empty() => {
                self.apply(Operation::Add { path: format!("{path}/{key}"), value })?;
                let before = Some(PreviousValue { value: None, text: None });
                self.undo.push(Undo::Put { at: at.to_owned(), members, before });
                Ok(())
            }
            None | Some((_, Value::Object(_) | Value::Null)) => {
                self.put_entries(parent, Map::from_iter([(key.to_owned(), value)]))
            }
            Some(_) => Err(InjectError::Shape { path: parent.to_owned(), expected: "a map" }),
        }
    }

    /// Replaces an existing value.
    pub fn set(&mut self, at: &str, value: Value) -> Result<(), InjectError> {
        let Some((path, existing)) = resolve(&self.pod, at) else {
            return Err(InjectError::Shape { path: at.to_owned(), expected: "present" });
        };
        let was = self.before(at, Some(existing.clone()));
        self.apply(Operation::Replace { path, value })?;
        self.undo.push(Undo::Set { at: at.to_owned(), was });
        Ok(())
    }

    /// Adds annotations, including the record, and returns all operations.
    pub fn finish(mut self, mut annotations: Map<String, Value>) -> Result<Vec<Operation>, InjectError> {
        annotations.insert(RECORD_ANNOTATION.to_owned(), Value::Null);
        self.put_entries("/metadata/annotations", annotations)?;
        let record = InjectionRecord {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            undo: std::mem::take(&mut self.undo),
        };
        let record =
            serde_json::to_string(&record).map_err(|error| InjectError::Record(error.to_string()))?;
        // The record also covers its own annotation, so it is filled in last.
        for operation in self.operations.iter_mut().rev() {
            let (Operation::Add { path, value } | Operation::Replace { path, value }) = operation else {
                continue;
            };
            let target = match path.ends_with(&escape(RECORD_ANNOTATION)) {
                true => Some(value),
                false if path.ends_with("/annotations") => value.get_mut(RECORD_ANNOTATION),
                false => value.pointer_mut(&format!("/annotations/{}", escape(RECORD_ANNOTATION))),
            };
            if let Some(target) = target {
                *target = record.into();
                return Ok(self.operations);
            }
        }
        Err(InjectError::Record("no operation adds the annotation".to_owned()))
    }
}

/// The record of injection in this pod; `None` if it is not injected.
///
/// # Errors
///
/// If the annotation is not a valid record.
pub fn record(pod: &Value) -> Result<Option<InjectionRecord>, InjectError> {
    let Some(text) = pod["metadata"]["annotations"].get(RECORD_ANNOTATION) else { return Ok(None) };
    let text = text.as_str().unwrap_or_default();
    serde_json::from_str(text).map(Some).map_err(|error| InjectError::Record(error.to_string()))
}

/// The steps that revert injection. Later changes by others are kept.
///
/// # Errors
///
/// If the record does not match the pod.
pub fn undo(pod: &Value) -> Result<Vec<PatchStep>, InjectError> {
    let Some(record) = record(pod)? else { return Ok(Vec::new()) };
    let (mut pod, mut steps) = (pod.clone(), Vec::new());
    let mut step = |pod: &mut Value, operation: Operation, text| {
        operation.apply(pod)?;
        steps.push(PatchStep { operation, text });
        Ok::<_, InjectError>(())
    };
    for change in record.undo.into_iter().rev() {
        match change {
            Undo::Set { at, was } => {
                // A value that is gone needs no restoring.
                let Some((path, _)) = resolve(&pod, &at) else { continue };
                let value = was.value.unwrap_or_default();
                step(&mut pod, Operation::Replace { path, value }, was.text)?;
            }
            Undo::Put { at, members, before } => {
                let Some((path, existing)) = resolve(&pod, &at) else { continue };
                let injected_count = members.iter().filter(|name| member(existing, name).is_some()).count();
                let size =
                    existing.as_array().map(Vec::len).or(existing.as_object().map(Map::len)).unwrap_or(0);
                match before {
                    Some(PreviousValue { value: None, .. }) if injected_count == size => {
                        step(&mut pod, Operation::Remove { path }, None)?;
                    }
                    Some(PreviousValue { value: Some(value), text }) if injected_count == size => {
                        step(&mut pod, Operation::Replace { path, value }, text)?;
                    }
                    _ => {
                        for name in members.iter().rev() {
                            if let Some((path, _)) = resolve(&pod, &format!("{at}/{}", escape(name))) {
                                step(&mut pod, Operation::Remove { path }, None)?;
                            }
                        }
                    }
                }
            }
        }
    }
    Ok(steps)
}
