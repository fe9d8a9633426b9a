//! Converts a tree into a typed value, by serde. Reports every problem at its place, not only the first.
//!
//! serde stops at the first error. So each wrong node is reported and skipped, and the value is read again, until the
//! rest is valid.

use std::{cell::RefCell, collections::HashSet, fmt};

use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, Visitor};

use super::{
    diagnostic::{Problem, Problems, did_you_mean},
    hints,
    node::{Node, NodeEntry, Value},
    source::Origin,
};
use crate::{
    redact::{REDACTED, SECRET_TYPE_NAME, is_credential_name},
    units::DATE_TYPE_NAME,
};

/// Reads a value and reports what is invalid; `None` if no value can be made of the rest.
///
/// `also` names keys that are valid in this table besides those of `T`, for suggestions.
pub(super) fn read<T: DeserializeOwned>(node: &Node, also: &[&str], problems: &mut Problems) -> Option<T> {
    if node.value == Value::Unknown {
        return None;
    }
    let shared =
        Shared { skipped: RefCell::default(), problems: RefCell::new(problems), root: id(node), also };
    loop {
        let reader = Reader { node, shared: &shared };
        let error = match T::deserialize(reader).map_err(|error| error.at(node)) {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        // A key that is missing because it was skipped for another problem is not reported again.
        let at = error.id;
        let is_consequence = match &error.kind {
            ErrorKind::Missing(key) => shared.has_skipped(at, node, |name| name == *key),
            ErrorKind::Message(_) => shared.has_skipped(at, node, |_| true),
            _ => false,
        };
        if !is_consequence {
            shared.problems.borrow_mut().push(error.problem());
        }
        let full = shared.problems.borrow().is_full();
        if at == shared.root || full || !shared.skipped.borrow_mut().insert(at) {
            return None;
        }
    }
}

struct Shared<'a> {
    /// Nodes to skip.
    skipped: RefCell<HashSet<usize>>,
    problems: RefCell<&'a mut Problems>,
    root: usize,
    also: &'a [&'a str],
}

impl Shared<'_> {
    fn is_skipped(&self, node: &Node) -> bool {
        node.value == Value::Unknown || self.skipped.borrow().contains(&id(node))
    }

    /// Whether the table with this ID, at or below `node`, has such a key that was skipped.
    fn has_skipped(&self, table: usize, node: &Node, such: impl Fn(&str) -> bool + Copy) -> bool {
        match &node.value {
            Value::Table(entries) if id(node) == table => {
                entries.iter().any(|(key, entry)| such(key) && self.is_skipped(&entry.node))
            }
            Value::Table(entries) => entries.values().any(|entry| self.has_skipped(table, &entry.node, such)),
            Value::Array(items) => items.iter().any(|item| self.has_skipped(table, item, such)),
            _ => false,
        }
    }
}

/// A node's identity during one call: its address, since the tree does not change meanwhile.
fn id(node: &Node) -> usize {
    std::ptr::from_ref(node).addr()
}

#[derive(Clone, Copy)]
struct Reader<'a, 'p> {
    node: &'a Node,
    shared: &'a Shared<'p>,
}

#[derive(Debug)]
struct Error {
    kind: ErrorKind,
    /// The node it is about; 0 until known.
    id: usize,
    origin: Option<Origin>,
}

#[derive(Debug)]
enum ErrorKind {
    Message(String),
    WrongType { found: String, expected: String, hint: Option<String> },
    UnknownKey { key: String, valid: Vec<String> },
    UnknownWord { word: String, valid: &'static [&'static str] },
    Missing(&'static str),
}

impl Error {
    fn new(kind: ErrorKind) -> Self {
        Self { kind, id: 0, origin: None }
    }

    /// Sets the place, unless it is known already: the innermost place is the most precise.
    fn at(mut self, node: &Node) -> Self {
        if self.id == 0 {
            self.id = id(node);
            self.origin = node.origin;
            if let ErrorKind::WrongType { found, .. } = &mut self.kind
                && found.is_empty()
            {
                *found = node.kind().to_owned();
            }
        }
        self
    }

    /// Adds what to write instead, if the value of the key makes it clear.
    fn hint(mut self, key: &str, node: &Node) -> Self {
        if let ErrorKind::WrongType { hint, .. } = &mut self.kind
            && self.id == id(node)
        {
            *hint = hints::suggest_value(key, node);
        }
        // A credential, written where a key takes one of several words.
        if let ErrorKind::UnknownWord { word, .. } = &mut self.kind
            && self.id == id(node)
            && is_credential_name(key)
        {
            *word = REDACTED.to_owned();
        }
        self
    }

    fn problem(self) -> Problem {
        let new = |message: String| Problem::error(self.origin, message);
        match self.kind {
            // "what is wrong: what to write", the form of the errors in `units` and `schema`.
            ErrorKind::Message(text) => match text.split_once(": ").or_else(|| text.split_once("; ")) {
                Some((wrong, remedy)) => new(wrong.to_owned()).help(remedy),
                None => new(text),
            },
            ErrorKind::WrongType { found, expected, hint } => {
                let problem = new("this value has the wrong type".to_owned())
                    .label(format!("expected {expected}, found {found}"));
                match hint {
                    Some(hint) => problem.help(hint),
                    None => problem,
                }
            }
            ErrorKind::UnknownWord { word, valid } => {
                let problem = new(format!("`{word}` is not one of the possible values"));
                let known = hints::suggest_word(&word, |value| valid.contains(&value));
                let problem = match known.or_else(|| did_you_mean(&word, valid.iter().copied())) {
                    Some(near) => problem.label(format!("did you mean \"{near}\"?")),
                    None => problem,
                };
                problem.help(format!("possible are {}", quoted(valid)))
            }
            ErrorKind::Missing(key) => {
                new(format!("`{key}` is missing here")).help(format!("add `{key} = …`")).about_missing()
            }
            ErrorKind::UnknownKey { key, valid } => {
                unknown_key(&key, self.origin, valid.iter().map(String::as_str))
            }
        }
    }
}

/// The problem of a key that does not exist, with the nearest that does.
pub(super) fn unknown_key<'a>(
    key: &str,
    origin: Option<Origin>,
    valid: impl IntoIterator<Item = &'a str> + Clone,
) -> Problem {
    let mut names: Vec<&str> = valid.clone().into_iter().collect();
    names.sort_unstable();
    let problem = Problem::error(origin, format!("unknown key `{key}`"));
    let problem = match (hints::suggest_key(key), did_you_mean(key, valid)) {
        (Some(hint), _) => problem.label(hint),
        (None, Some(near)) => problem.label(format!("did you mean `{near}`?")),
        (None, None) => problem,
    };
    problem.help(format!("keys here are {}", names.join(", ")))
}

fn quoted(words: &[&str]) -> String {
    words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(", ")
}

/// serde's name of a type, in the terms of the file.
fn plain_type_name(expected: &dyn de::Expected) -> String {
    let text = expected.to_string();
    match text.as_str() {
        "u8" => "a whole number from 0 to 255".to_owned(),
        "u16" => "a whole number from 0 to 65535".to_owned(),
        "u32" => "a whole number from 0 to 4294967295".to_owned(),
        "u64" => "a whole number from 0 up".to_owned(),
        "f64" => "a number".to_owned(),
        "a sequence" => "an array".to_owned(),
        "a map" => "a table".to_owned(),
        _ if text.starts_with("struct ") => "a table".to_owned(),
        _ if text.starts_with("enum ") || text == "string or map" => "a string".to_owned(),
        _ => text,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.kind)
    }
}

impl std::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(ErrorKind::Message(message.to_string()))
    }

    fn invalid_type(_: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::new(ErrorKind::WrongType {
            found: String::new(),
            expected: plain_type_name(expected),
            hint: None,
        })
    }

    fn invalid_value(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        let found = match found {
            de::Unexpected::Signed(number) => number.to_string(),
            de::Unexpected::Unsigned(number) => number.to_string(),
            de::Unexpected::Bool(flag) => flag.to_string(),
            de::Unexpected::Str(text) => format!("{text:?}"),
            _ => String::new(),
        };
        Self::new(ErrorKind::WrongType { found, expected: plain_type_name(expected), hint: None })
    }

    fn unknown_variant(word: &str, valid: &'static [&'static str]) -> Self {
        Self::new(ErrorKind::UnknownWord { word: word.to_owned(), valid })
    }

    fn unknown_field(key: &str, valid: &'static [&'static str]) -> Self {
        Self::new(ErrorKind::UnknownKey {
            key: key.to_owned(),
            valid: valid.iter().map(ToString::to_string).collect(),
        })
    }

    fn missing_field(key: &'static str) -> Self {
        Self::new(ErrorKind::Missing(key))
    }
}

impl<'de, 'a, 'p> Reader<'a, 'p> {
    fn any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.node.value {
            Value::String { text, .. } => visitor.visit_str(text),
            Value::Integer(number) => visitor.visit_i64(*number),
            Value::Float(number) => visitor.visit_f64(*number),
            Value::Bool(flag) => visitor.visit_bool(*flag),
            Value::Datetime(_) | Value::Unknown => {
                Err(de::Error::invalid_type(de::Unexpected::Other(""), &visitor))
            }
            Value::Array(items) => visitor.visit_seq(Items { items: items.iter(), shared: self.shared }),
            Value::Table(table) => visitor.visit_map(Entries {
                entries: table.iter(),
                at: None,
                is_root: id(self.node) == self.shared.root,
                shared: self.shared,
            }),
        }
        .map_err(|error| error.at(self.node))
    }

    /// The text, if it came from the environment: then it may also be a number or a boolean.
    fn expanded(self) -> Option<&'a str> {
        match &self.node.value {
            Value::String { text, expanded: true } => Some(text.trim()),
            _ => None,
        }
    }
}

macro_rules! scalars {
    ($($method:ident: $type:ty => $visit:ident),+ $(,)?) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            match self.expanded().and_then(|text| text.parse::<$type>().ok()) {
                Some(value) => visitor.$visit(value).map_err(|error: Error| error.at(self.node)),
                None => self.any(visitor),
            }
        })+
    };
}

impl<'de> de::Deserializer<'de> for Reader<'_, '_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.any(visitor)
    }

    scalars! {
        deserialize_bool: bool => visit_bool,
        deserialize_i8: i64 => visit_i64, deserialize_i16: i64 => visit_i64,
        deserialize_i32: i64 => visit_i64, deserialize_i64: i64 => visit_i64,
        deserialize_u8: i64 => visit_i64, deserialize_u16: i64 => visit_i64,
        deserialize_u32: i64 => visit_i64, deserialize_u64: i64 => visit_i64,
        deserialize_f32: f64 => visit_f64, deserialize_f64: f64 => visit_f64,
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        if name == SECRET_TYPE_NAME {
            return match &self.node.value {
                Value::String { text, expanded: true } => visitor.visit_bytes(text.as_bytes()),
                _ => self.any(visitor),
            };
        }
        if name == DATE_TYPE_NAME
            && let Value::Datetime(text) = &self.node.value
        {
            return visitor.visit_str(text).map_err(|error: Error| error.at(self.node));
        }
        visitor.visit_newtype_struct(self).map_err(|error: Error| error.at(self.node))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let result = match &self.node.value {
            Value::String { text, .. } => visitor.visit_enum(text.as_str().into_deserializer()),
            _ => Err(de::Error::invalid_type(de::Unexpected::Other(""), &"a string")),
        };
        result.map_err(|error: Error| error.at(self.node))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    /// serde's derived code would also accept an array, by position, which is never intended.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match &self.node.value {
            Value::Table(_) => self.any(visitor),
            _ => Err(Error::at(de::Error::invalid_type(de::Unexpected::Other(""), &"a table"), self.node)),
        }
    }

    serde::forward_to_deserialize_any! {
        i128 u128 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map identifier
    }
}

struct Items<'a, 'p> {
    items: std::slice::Iter<'a, Node>,
    shared: &'a Shared<'p>,
}

impl<'de> de::SeqAccess<'de> for Items<'_, '_> {
    type Error = Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Error> {
        match self.items.find(|item| !self.shared.is_skipped(item)) {
            Some(node) => {
                let reader = Reader { node, shared: self.shared };
                seed.deserialize(reader).map(Some).map_err(|error| error.at(node))
            }
            None => Ok(None),
        }
    }
}

struct Entries<'a, 'p> {
    entries: std::collections::btree_map::Iter<'a, String, NodeEntry>,
    at: Option<(&'a str, &'a Node)>,
    is_root: bool,
    shared: &'a Shared<'p>,
}

impl<'de> de::MapAccess<'de> for Entries<'_, '_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some((key, entry)) = self.entries.find(|(_, entry)| !self.shared.is_skipped(&entry.node)) else {
            return Ok(None);
        };
        self.at = Some((key, &entry.node));
        let key_deserializer: de::value::StrDeserializer<'_, Error> = key.as_str().into_deserializer();
        seed.deserialize(key_deserializer).map(Some).map_err(|mut error| {
            error.id = id(&entry.node);
            error.origin = entry.key;
            if let ErrorKind::UnknownKey { valid, .. } = &mut error.kind
                && self.is_root
            {
                valid.extend(self.shared.also.iter().map(ToString::to_string));
            }
            error
        })
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        let before = || Error::new(ErrorKind::Message("a value before its key".to_owned()));
        let (key, node) = self.at.ok_or_else(before)?;
        seed.deserialize(Reader { node, shared: self.shared }).map_err(|error| error.at(node).hint(key, node))
    }
}
