//! What a route changes in the headers of its requests and responses, parsed once.

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::{
    config::{HeaderEdits, Route},
    resilience::deprecation::Deprecation,
};

/// Header edits of a route, parsed once.
#[derive(Clone, Debug, Default)]
pub struct CompiledEdits {
    pub request: Edits,
    pub response: Edits,
    /// Announced in its responses.
    pub deprecation: Option<Deprecation>,
}

#[derive(Clone, Debug, Default)]
pub struct Edits {
    set: Vec<(HeaderName, HeaderValue)>,
    remove: Vec<HeaderName>,
}

impl CompiledEdits {
    pub fn new(route: &Route) -> Self {
        Self {
            request: Edits::new(&route.request_headers),
            response: Edits::new(&route.response_headers),
            // A validated configuration has no invalid link.
            deprecation: route.deprecation.as_ref().and_then(|settings| Deprecation::new(settings).ok()),
        }
    }
}

impl Edits {
    /// Names and values were checked when the configuration was loaded.
    fn new(edits: &HeaderEdits) -> Self {
        let set = edits
            .set
            .iter()
            .filter_map(|(name, value)| Some((name.parse().ok()?, value.expose().parse().ok()?)))
            .collect();
        Self { set, remove: edits.remove.iter().filter_map(|name| name.parse().ok()).collect() }
    }

    pub fn sets(&self, name: &HeaderName) -> bool {
        self.set.iter().any(|(set, _)| set == name)
    }

    pub fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
    }
}
