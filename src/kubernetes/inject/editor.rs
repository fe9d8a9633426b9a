//! A pod that is changed step by step, and how to change it back.
//!
//! Every change is a JSON Patch operation, applied at once, and leaves word of what was there before. The words go into
//! an annotation of the pod, so that whoever has the injected pod can have the other one.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::InjectError;
use crate::kubernetes::patch::{Operation, escape, segments};

/// The annotation that holds the [`Record`].
pub const RECORD: &str = "outrigger.dev/injected";

/// What injection has done to a pod.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    /// Who did it.
    pub version: String,
    pub undo: Vec<Undo>,
}

/// One change, to be taken back. Places are pointers in which a list's members go by their names.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Undo {
    /// Members put into a map or a list.
    Put {
        at: String,
        members: Vec<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        before: Option<Before>,
    },
    /// Another value in place of the one that was there.
    Set { at: String, was: Before },
}

/// What stood there.
#[derive(Debug, Serialize, Deserialize)]
pub struct Before {
    /// None: nothing, not even the key; null is a value.
    #[serde(default, deserialize_with = "there", skip_serializing_if = "Option::is_none")]
    pub value: Option<Value>,
    /// How it was written, where that is not how it would be written anyhow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

fn there<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// An operation that takes something back.
#[derive(Debug)]
pub struct Step {
    pub operation: Operation,
    /// The very letters that stood there.
    pub text: Option<String>,
}

/// Says how a value at a place is written, if that is worth keeping.
pub type Written<'w> = &'w dyn Fn(&str) -> Option<String>;

pub struct Editor<'w> {
    pod: Value,
    operations: Vec<Operation>,
    undo: Vec<Undo>,
    written: Written<'w>,
}

/// The member of that name, or of that key.
fn member<'v>(value: &'v Value, segment: &str) -> Option<(String, &'v Value)> {
    match value {
        Value::Object(map) => map.get(segment).map(|found| (escape(segment), found)),
        Value::Array(list) => list
            .iter()
            .enumerate()
            .find(|(_, item)| item["name"] == segment)
            .map(|(index, found)| (index.to_string(), found)),
        _ => None,
    }
}

/// A place by names as a JSON Pointer, and what is there.
pub fn resolve<'v>(pod: &'v Value, at: &str) -> Option<(String, &'v Value)> {
    segments(at).iter().try_fold((String::new(), pod), |(path, value), segment| {
        member(value, segment).map(|(step, found)| (format!("{path}/{step}"), found))
    })
}

impl<'w> Editor<'w> {
    pub fn new(pod: Value, written: Written<'w>) -> Self {
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

    fn before(&self, at: &str, value: Option<Value>) -> Before {
        Before { text: value.as_ref().and_then(|_| (self.written)(at)), value }
    }

    /// Puts entries into a map, which is made where there is none.
    pub fn put_entries(&mut self, at: &str, entries: Map<String, Value>) -> Result<(), InjectError> {
        if entries.is_empty() {
            return Ok(());
        }
        let members = entries.keys().cloned().collect();
        match resolve(&self.pod, at) {
            Some((path, Value::Object(there))) if !there.is_empty() => {
                for (key, value) in entries {
                    self.apply(Operation::Add { path: format!("{path}/{}", escape(&key)), value })?;
                }
                self.undo.push(Undo::Put { at: at.to_owned(), members, before: None });
                Ok(())
            }
            None | Some((_, Value::Object(_) | Value::Null)) => self.put_whole(at, entries.into(), members),
            Some(_) => Err(InjectError::Shape { what: at.to_owned(), wanted: "a map" }),
        }
    }

    /// Puts items, each with a name, into a list at an index.
    pub fn put_items(&mut self, at: &str, index: usize, items: Vec<Value>) -> Result<(), InjectError> {
        if items.is_empty() {
            return Ok(());
        }
        let members = items.iter().filter_map(|item| item["name"].as_str()).map(ToOwned::to_owned).collect();
        match resolve(&self.pod, at) {
            Some((path, Value::Array(there))) if !there.is_empty() => {
                let index = index.min(there.len());
                for (offset, value) in items.into_iter().enumerate() {
                    self.apply(Operation::Add { path: format!("{path}/{}", index + offset), value })?;
                }
                self.undo.push(Undo::Put { at: at.to_owned(), members, before: None });
                Ok(())
            }
            None | Some((_, Value::Array(_) | Value::Null)) => self.put_whole(at, items.into(), members),
            Some(_) => Err(InjectError::Shape { what: at.to_owned(), wanted: "a list" }),
        }
    }

    /// Where there is nothing, or something empty.
    fn put_whole(&mut self, at: &str, value: Value, members: Vec<String>) -> Result<(), InjectError> {
        if let Some((path, there)) = resolve(&self.pod, at) {
            let before = Some(self.before(at, Some(there.clone())));
            self.apply(Operation::Replace { path, value })?;
            self.undo.push(Undo::Put { at: at.to_owned(), members, before });
            return Ok(());
        }
        let Some((parent, key)) = at.rsplit_once('/') else {
            return Err(InjectError::Shape { what: at.to_owned(), wanted: "a map" });
        };
        match resolve(&self.pod, parent) {
            Some((path, Value::Object(map))) if !map.is_empty() => {
                self.apply(Operation::Add { path: format!("{path}/{key}"), value })?;
                let before = Some(Before { value: None, text: None });
                self.undo.push(Undo::Put { at: at.to_owned(), members, before });
                Ok(())
            }
            None | Some((_, Value::Object(_) | Value::Null)) => {
                self.put_entries(parent, Map::from_iter([(key.to_owned(), value)]))
            }
            Some(_) => Err(InjectError::Shape { what: parent.to_owned(), wanted: "a map" }),
        }
    }

    /// Puts a value in place of the one that is there.
    pub fn set(&mut self, at: &str, value: Value) -> Result<(), InjectError> {
        let Some((path, there)) = resolve(&self.pod, at) else {
            return Err(InjectError::Shape { what: at.to_owned(), wanted: "there" });
        };
        let was = self.before(at, Some(there.clone()));
        self.apply(Operation::Replace { path, value })?;
        self.undo.push(Undo::Set { at: at.to_owned(), was });
        Ok(())
    }

    /// Adds annotations, the record among them, and ends.
    pub fn finish(mut self, mut annotations: Map<String, Value>) -> Result<Vec<Operation>, InjectError> {
        annotations.insert(RECORD.to_owned(), Value::Null);
        self.put_entries("/metadata/annotations", annotations)?;
        let record =
            Record { version: env!("CARGO_PKG_VERSION").to_owned(), undo: std::mem::take(&mut self.undo) };
        let record =
            serde_json::to_string(&record).map_err(|error| InjectError::Record(error.to_string()))?;
        // The record tells how to take back the annotation that holds it, so it is filled in last.
        for operation in self.operations.iter_mut().rev() {
            let (Operation::Add { path, value } | Operation::Replace { path, value }) = operation else {
                continue;
            };
            let slot = match path.ends_with(&escape(RECORD)) {
                true => Some(value),
                false if path.ends_with("/annotations") => value.get_mut(RECORD),
                false => value.pointer_mut(&format!("/annotations/{}", escape(RECORD))),
            };
            if let Some(slot) = slot {
                *slot = record.into();
                return Ok(self.operations);
            }
        }
        Err(InjectError::Record("there is no place for it".to_owned()))
    }
}

/// What injection has done to this pod; none where it has done nothing.
///
/// # Errors
///
/// Where the annotation holds something else.
pub fn record(pod: &Value) -> Result<Option<Record>, InjectError> {
    let Some(text) = pod["metadata"]["annotations"].get(RECORD) else { return Ok(None) };
    let text = text.as_str().unwrap_or_default();
    serde_json::from_str(text).map(Some).map_err(|error| InjectError::Record(error.to_string()))
}

/// The steps that take injection back. What was changed by others since then stays.
///
/// # Errors
///
/// Where the record does not fit the pod.
pub fn undo(pod: &Value) -> Result<Vec<Step>, InjectError> {
    let Some(record) = record(pod)? else { return Ok(Vec::new()) };
    let (mut pod, mut steps) = (pod.clone(), Vec::new());
    let mut step = |pod: &mut Value, operation: Operation, text| {
        operation.apply(pod)?;
        steps.push(Step { operation, text });
        Ok::<_, InjectError>(())
    };
    for done in record.undo.into_iter().rev() {
        match done {
            Undo::Set { at, was } => {
                // What is gone needs no way back.
                let Some((path, _)) = resolve(&pod, &at) else { continue };
                let value = was.value.unwrap_or_default();
                step(&mut pod, Operation::Replace { path, value }, was.text)?;
            }
            Undo::Put { at, members, before } => {
                let Some((path, there)) = resolve(&pod, &at) else { continue };
                let ours = members.iter().filter(|name| member(there, name).is_some()).count();
                let size = there.as_array().map(Vec::len).or(there.as_object().map(Map::len)).unwrap_or(0);
                match before {
                    Some(Before { value: None, .. }) if ours == size => {
                        step(&mut pod, Operation::Remove { path }, None)?;
                    }
                    Some(Before { value: Some(value), text }) if ours == size => {
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
