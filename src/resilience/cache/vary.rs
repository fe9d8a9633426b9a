//! `Vary`: which of several stored responses fits a request (RFC 9111 §4.1).

use http::{HeaderMap, HeaderName, header::VARY};

/// More fields than this in `Vary` count as `*`.
const MAX_FIELDS: usize = 16;

/// The fields that a response was selected by, with the values that the request had.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection(Vec<(HeaderName, Vec<u8>)>);

/// The names in `Vary`, sorted; `None`: `*`, or more than can be compared.
pub fn names(headers: &HeaderMap) -> Option<Vec<HeaderName>> {
    let mut names = Vec::new();
    for value in headers.get_all(VARY) {
        for name in value.to_str().ok()?.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            // Also `*`, which is a token.
            if name == "*" {
                return None;
            }
            names.push(HeaderName::from_bytes(name.as_bytes()).ok()?);
        }
    }
    names.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
    names.dedup();
    (names.len() <= MAX_FIELDS).then_some(names)
}

impl Selection {
    /// What a response with these names in `Vary` was selected by.
    pub fn new(names: Vec<HeaderName>, request: &HeaderMap) -> Self {
        Self(names.into_iter().map(|name| (name.clone(), normalized(request, &name))).collect())
    }

    /// Whether the request has the same values.
    pub fn matches(&self, request: &HeaderMap) -> bool {
        self.0.iter().all(|(name, value)| *value == normalized(request, name))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn names(&self) -> impl Iterator<Item = &HeaderName> {
        self.0.iter().map(|(name, _)| name)
    }

    /// The memory that it takes.
    pub fn size(&self) -> usize {
        self.0.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
    }
}

/// The values of a field as one: lines joined, space around commas removed. An absent field is not an empty one.
fn normalized(request: &HeaderMap, name: &HeaderName) -> Vec<u8> {
    let mut joined = Vec::new();
    for (index, value) in request.get_all(name).iter().enumerate() {
        joined.push(if index == 0 { b'=' } else { b',' });
        let mut parts = value.as_bytes().split(|byte| *byte == b',');
        if let Some(first) = parts.next() {
            joined.extend_from_slice(first.trim_ascii());
        }
        for part in parts {
            joined.push(b',');
            joined.extend_from_slice(part.trim_ascii());
        }
    }
    joined
}
