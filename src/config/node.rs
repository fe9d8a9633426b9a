//! The configuration tree as written: every key and value has its place in a file.

use std::collections::BTreeMap;

use super::source::Origin;

/// A value and its place. No origin: built in.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub origin: Option<Origin>,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    String {
        text: String,
        /// Whether it contained `${VAR}`: such a text may also be a number or a boolean.
        expanded: bool,
    },
    Integer(i64),
    Float(f64),
    Bool(bool),
    /// Part of TOML, but no key has such a value.
    Datetime(String),
    Array(Vec<Node>),
    Table(Table),
    /// A value that could not be read. The problem has been reported; the value causes no further ones.
    Unknown,
}

pub type Table = BTreeMap<String, NodeEntry>;

/// A key's place and its value.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeEntry {
    pub key: Option<Origin>,
    pub node: Node,
}

impl Node {
    pub fn table(origin: Option<Origin>) -> Self {
        Self { origin, value: Value::Table(Table::new()) }
    }

    pub fn text(text: impl Into<String>) -> Self {
        Self { origin: None, value: Value::String { text: text.into(), expanded: false } }
    }

    pub fn bool(value: bool) -> Self {
        Self { origin: None, value: Value::Bool(value) }
    }

    pub fn as_table(&self) -> Option<&Table> {
        match &self.value {
            Value::Table(table) => Some(table),
            _ => None,
        }
    }

    pub fn as_array(&self) -> Option<&[Self]> {
        match &self.value {
            Value::Array(items) => Some(items),
            _ => None,
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String { text, .. } => Some(text),
            _ => None,
        }
    }

    /// A list that is not empty, whether its items could be read or not.
    pub fn is_filled_list(&self) -> bool {
        self.as_array().is_some_and(|items| !items.is_empty())
    }

    /// The value of a key, if this is a table that has it.
    pub fn get(&self, key: &str) -> Option<&Self> {
        self.as_table()?.get(key).map(|entry| &entry.node)
    }

    /// The item of an array.
    pub fn item(&self, index: usize) -> Option<&Self> {
        self.as_array()?.get(index)
    }

    /// The type of the value, for messages.
    pub fn kind(&self) -> &'static str {
        match &self.value {
            Value::String { .. } => "a string",
            Value::Integer(_) => "a whole number",
            Value::Float(_) => "a number",
            Value::Bool(_) => "a boolean",
            Value::Datetime(_) => "a date",
            Value::Array(_) => "an array",
            Value::Table(_) => "a table",
            Value::Unknown => "something unknown",
        }
    }
}
