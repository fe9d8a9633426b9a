//! The claims of an end user's token, as `[[inbound.allow]]` reads them.

use serde_json::{Map, Value};

/// The claims of a token that was verified.
#[derive(Clone, Debug, PartialEq)]
pub struct ClaimSet(pub Map<String, Value>);

impl ClaimSet {
    /// A claim by its name.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// Whether a claim equals `wanted`, or is a list that contains it: an array, or words separated by spaces as in
    /// `scope` (RFC 8693 §4.2). Numbers and booleans are compared in their JSON form.
    pub fn has(&self, name: &str, wanted: &str) -> bool {
        let is = |value: &Value| match value {
            Value::String(text) => text == wanted,
            Value::Number(number) => number.to_string() == wanted,
            Value::Bool(yes) => wanted == if *yes { "true" } else { "false" },
            _ => false,
        };
        match self.0.get(name) {
            Some(Value::Array(list)) => list.iter().any(is),
            Some(Value::String(text)) => text == wanted || text.split(' ').any(|word| word == wanted),
            Some(value) => is(value),
            None => false,
        }
    }
}
