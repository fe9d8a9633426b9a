//! Validation of a route by itself.

use std::collections::HashSet;

use super::{Check, sections::is_url, upstream::is_name};
use crate::{
    config::{HeaderEdits, Node, Route, RouteMatch, VersionMatch, VersionSource, diagnostic::Problems},
    resilience::{
        deprecation::{AfterSunset, Deprecation},
        split::{RouteTo, StickyKey},
    },
    url_path::normalise,
};

/// The most upstreams that a route divides its requests among: each costs every request.
const MAX_TARGETS: usize = 16;

/// Fields that belong to one connection or to the message's framing: an edit would break them.
const NOT_TO_EDIT: [&str; 9] = [
    "connection",
    "content-length",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
];

/// Checks a route by itself.
pub(in super::super) fn route(route: &Route, node: &Node, problems: &mut Problems) {
    let mut check = Check { node, problems };
    check.matches(&route.matches);
    if let Some(to) = &route.path_rewrite {
        let matched = route.matches.path_pattern().is_some();
        let help = "add `match = { path = \"/…*\" }`, whose literal prefix is replaced";
        check.require_present(matched, &["path_rewrite"], "there is no matched path to rewrite", help);
        let fits = to.starts_with('/') && !to.contains(['?', '#', '*']);
        let fits = fits && http::uri::PathAndQuery::try_from(to.as_str()).is_ok();
        let help = "write e.g. \"/charge\"; the rest of the path and the query are kept";
        check.require(fits, &["path_rewrite"], "this is not a path", help);
    }
    if let Some(name) = &route.name {
        let help = "use 1 to 128 letters, digits, `-`, `_` and `.`";
        check.require(is_name(name), &["name"], "this cannot be a route's name", help);
    }
    check.split(route);
    check.deprecation(route);
    check.mirror(route);
    check.edits("request_headers", &route.request_headers);
    check.edits("response_headers", &route.response_headers);
}

/// RFC 9110 §5.6.2.
fn is_token(text: &str) -> bool {
    let is_symbol = |byte: u8| b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || is_symbol(byte))
}

impl Check<'_> {
    /// `to` and `sticky` of a route.
    fn split(&mut self, route: &Route) {
        let help =
            "write e.g. [{ upstream = \"legacy\", weight = 90 }, { upstream = \"next\", weight = 10 }]";
        let targets = match &route.to {
            Some(RouteTo::Split(targets)) => targets.as_slice(),
            Some(RouteTo::One(_)) | None => {
                let message = "`sticky` has no effect: the requests are not divided";
                let several = "give `to` several upstreams with weights, or remove it";
                return self.require(route.sticky == StickyKey::None, &["sticky"], message, several);
            }
        };
        self.require_items(targets, &["to"], "there is no upstream to send requests to", help);
        if targets.len() > MAX_TARGETS {
            let message = format!("{} upstreams are more than a route can divide among", targets.len());
            self.error(&["to"], message, format!("at most {MAX_TARGETS}"));
        }
        if !targets.is_empty() && targets.iter().all(|target| target.weight == 0) {
            self.error(&["to"], "no upstream would get a request: all weights are 0", help);
        }
        let mut seen = HashSet::new();
        for (at, target) in targets.iter().enumerate() {
            if !seen.insert(&target.upstream) {
                let message = format!("`{}` is named twice", target.upstream);
                self.error(&["to", &at.to_string(), "upstream"], message, "add its weights");
            }
        }
        if let StickyKey::Header(name) = &route.sticky {
            self.header_name(&["sticky"], name);
        }
    }

    fn matches(&mut self, matches: &RouteMatch) {
        for (at, method) in matches.methods.iter().enumerate() {
            self.method(&["match", "methods", &at.to_string()], method);
        }
        if let Some(path) = &matches.path {
            self.path_pattern(&["match", "path"], path);
        }
        if let Some(version) = &matches.version {
            self.version(version, matches.path.is_some());
        }
        for (name, value) in matches.headers.iter() {
            self.header_name(&["match", "headers", name], name);
            self.header_value(&["match", "headers", name], value.expose());
        }
    }

    fn version(&mut self, version: &VersionMatch, has_path: bool) {
        let at = ["match", "version"];
        let key = |key| ["match", "version", key];
        let help = "write e.g. `{ header = \"accept-version\", is = \"1\" }`";
        match version.source() {
            None => {
                let message = "a version needs exactly one of `header`, `media_type` and `path`";
                self.require_present(false, &at, message, help);
            }
            Some(VersionSource::Header(name)) => {
                self.header_name(&key("header"), name);
                self.header_value(&key("is"), &version.is);
            }
            Some(VersionSource::MediaType(name)) => {
                self.require(is_token(name), &key("media_type"), "this is not the name of a parameter", help);
                self.require(
                    !version.is.contains(['"', '\\']),
                    &key("is"),
                    "a quote cannot be matched",
                    help,
                );
            }
            Some(VersionSource::Path(_)) if has_path => {
                let help = "write the version into `path`, or remove it";
                self.error(&key("path"), "`match.path` and `match.version.path` exclude each other", help);
            }
            Some(VersionSource::Path(_)) => self.path_pattern(&key("path"), &version.to_string()),
        }
        self.require(!version.is.is_empty(), &key("is"), "this version is empty", help);
    }

    fn mirror(&mut self, route: &Route) {
        let Some(mirror) = &route.mirror else { return };
        let has_methods = !mirror.methods.is_empty();
        let help = "write e.g. [\"GET\", \"HEAD\"], or omit it";
        self.require(has_methods, &["mirror", "methods"], "no request would be copied", help);
        for (at, method) in mirror.methods.iter().enumerate() {
            let at = at.to_string();
            let path = ["mirror", "methods", &at];
            self.method(&path, method);
            let is_safe = method.parse::<http::Method>().is_ok_and(|method| method.is_safe());
            if !is_safe && !mirror.allows_unsafe {
                let message = format!("copies of {method} would change something twice");
                let help =
                    "add `unsafe = true` if the other upstream has data of its own, or remove the method";
                self.error(&path, message, help);
            }
        }
        let has_time = !mirror.timeout.is_zero();
        self.require(has_time, &["mirror", "timeout"], "every copy would be given up", "write e.g. \"5s\"");
        let message = "every copy would be dropped";
        self.require(mirror.max_in_flight > 0, &["mirror", "max_in_flight"], message, "write at least 1");
    }

    fn deprecation(&mut self, route: &Route) {
        let Some(deprecation) = &route.deprecation else { return };
        let help = "write https://…";
        let is_link = Deprecation::new(deprecation).is_ok() && deprecation.link.as_deref().is_none_or(is_url);
        self.require(is_link, &["deprecation", "link"], "this is not a URL", help);
        let in_order = deprecation.sunset.is_none_or(|sunset| sunset >= deprecation.since);
        let message = "the sunset is before the deprecation (RFC 9745 §4)";
        self.require(in_order, &["deprecation", "sunset"], message, "write a date after `since`");
        let ends = deprecation.sunset.is_some() || deprecation.after == AfterSunset::Serve;
        let message = "`after = \"410\"` needs a date";
        self.require(ends, &["deprecation", "after"], message, "add `sunset = 2027-06-01`");
    }

    pub(super) fn path_pattern(&mut self, at: &[&str], path: &str) {
        let literal = path.strip_suffix('*').unwrap_or(path);
        if !path.starts_with('/') {
            self.error(at, "a path begins with `/`", format!("write \"/{}\"", path.trim_start_matches('*')));
        } else if literal.contains('*') {
            self.error(
                at,
                "a `*` is allowed only at the end of a path",
                "write a literal path, or a prefix and `*`",
            );
        } else if literal.contains(['?', '#']) {
            self.error(at, "the query is not matched", "remove everything from `?` or `#` on");
        } else {
            // As in the routing table: after a prefix the path continues.
            let open = if literal.len() < path.len() { "x" } else { "" };
            let written = format!("{literal}{open}");
            let normal = normalise(&written);
            if normal != written {
                let star = if open.is_empty() { "" } else { "*" };
                let normal = normal.strip_suffix(open).unwrap_or(&normal).to_owned();
                self.error(at, "paths are matched in their normal form", format!("write \"{normal}{star}\""));
            }
        }
    }

    fn edits(&mut self, key: &str, edits: &HeaderEdits) {
        for (name, value) in edits.set.iter() {
            self.edited(&[key, "set", name], name);
            self.header_value(&[key, "set", name], value.expose());
        }
        for (at, name) in edits.remove.iter().enumerate() {
            self.edited(&[key, "remove", &at.to_string()], name);
        }
    }

    fn edited(&mut self, path: &[&str], name: &str) {
        self.header_name(path, name);
        if NOT_TO_EDIT.contains(&name.to_ascii_lowercase().as_str()) {
            let message = format!("`{name}` belongs to the connection and cannot be edited");
            self.error(path, message, "the proxy sets it as each side needs");
        }
    }
}
