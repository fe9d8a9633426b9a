//! `[[upstream.route]]` and `[[inbound.route]]`: which requests it matches, and what it does with them.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Policy;
use crate::{
    redact::HeaderFields,
    resilience::{
        deprecation::DeprecationSettings,
        mirror::MirrorSettings,
        queue::keys::RouteQueue,
        split::{RouteTo, StickyKey},
    },
};

/// `[[upstream.route]]` or `[[inbound.route]]`, resolved.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Route {
    /// Its name in commands, metrics and status.
    pub name: Option<String>,
    pub matches: RouteMatch,
    /// The upstreams that serve the matching requests.
    pub to: Option<RouteTo>,
    /// What keeps a client on one upstream of `to`.
    pub sticky: StickyKey,
    /// Replaces the matched literal prefix.
    pub path_rewrite: Option<String>,
    pub request_headers: HeaderEdits,
    pub response_headers: HeaderEdits,
    /// Announces the end of the version that the route serves.
    pub deprecation: Option<DeprecationSettings>,
    /// Sends copies of requests to another upstream.
    pub mirror: Option<MirrorSettings>,
    /// Keeps requests and delivers them later.
    pub queue: Option<RouteQueue>,
    pub policy: Policy,
}

impl Route {
    /// A route with all defaults.
    pub fn new(matches: RouteMatch, policy: Policy) -> Self {
        Self {
            name: None,
            matches,
            to: None,
            sticky: StickyKey::default(),
            path_rewrite: None,
            request_headers: HeaderEdits::default(),
            response_headers: HeaderEdits::default(),
            deprecation: None,
            mirror: None,
            queue: None,
            policy,
        }
    }

    /// How commands, metrics and status call it.
    pub fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.matches.to_string())
    }
}

/// `match = { … }`: all given conditions must hold.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RouteMatch {
    /// The methods that match; empty: all.
    pub methods: Vec<String>,
    /// The path that matches, or a prefix if it ends in `*`.
    pub path: Option<String>,
    /// Header names and the values they must have.
    pub headers: HeaderFields,
    /// The API version that the request asks for.
    pub version: Option<VersionMatch>,
}

/// `match.version = { header = "accept-version", is = "1" }`: exactly one of `header`, `media_type` and `path`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VersionMatch {
    /// The header field that names the version.
    #[serde(default)]
    pub header: Option<String>,
    /// The parameter of a media type in `Accept` that names it.
    #[serde(default)]
    pub media_type: Option<String>,
    /// What comes before it in the path: with "/v", version 3 is at `/v3` and `/v3/…`.
    #[serde(default)]
    pub path: Option<String>,
    /// The version.
    pub is: String,
}

/// What names the version of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VersionSource<'a> {
    Header(&'a str),
    MediaType(&'a str),
    Path(&'a str),
}

impl VersionMatch {
    /// The one that is set; `None`: none or several are.
    pub fn source(&self) -> Option<VersionSource<'_>> {
        match (&self.header, &self.media_type, &self.path) {
            (Some(name), None, None) => Some(VersionSource::Header(name)),
            (None, Some(name), None) => Some(VersionSource::MediaType(name)),
            (None, None, Some(prefix)) => Some(VersionSource::Path(prefix)),
            _ => None,
        }
    }
}

impl fmt::Display for VersionMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source() {
            Some(VersionSource::Header(name)) => write!(f, "{name}: {}", self.is),
            Some(VersionSource::MediaType(name)) => write!(f, "accept: *; {name}={}", self.is),
            Some(VersionSource::Path(prefix)) => write!(f, "{prefix}{}", self.is),
            None => f.write_str("no version"),
        }
    }
}

impl RouteMatch {
    /// The pattern of the path: `path`, or that of the version.
    pub fn path_pattern(&self) -> Option<String> {
        let version = || self.version.as_ref().filter(|version| version.path.is_some());
        self.path.clone().or_else(|| version().map(|version| format!("{version}*")))
    }
}

impl fmt::Display for RouteMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.methods.is_empty() {
            parts.push(self.methods.join("|"));
        }
        parts.extend(self.path.clone());
        parts.extend(self.version.as_ref().map(ToString::to_string));
        parts.extend(self.headers.iter().map(|(name, value)| format!("{name}: {value}")));
        f.write_str(&if parts.is_empty() { "any request".to_owned() } else { parts.join(" ") })
    }
}

/// `request_headers`, `response_headers`.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HeaderEdits {
    /// Fields to set; existing values are replaced.
    pub set: HeaderFields,
    /// Fields to remove.
    pub remove: Vec<String>,
}
