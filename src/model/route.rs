//! Which upstream and route a call takes. Compiled once per configuration; asked for every call.
//!
//! - Hosts: exact before `*.suffix` (the longest) before `*`; with each, a named port before none.
//! - Routes of an upstream, the most specific first: exact path, then the longest literal prefix, then none; then
//!   more headers; then methods given; the order in the file decides what is still equal.
//!
//! Paths are compared in one normal form ([`normalise`]), so that `/a/%2e%2e/b` cannot slip past a rule for `/b`;
//! what is forwarded stays as it came. Neither lookup grows with the number of hosts or routes: a hash per distinct
//! prefix length, or label of the host.

use std::{borrow::Cow, cmp::Reverse, collections::HashMap};

use http::{HeaderMap, HeaderName, HeaderValue, Method, uri::PathAndQuery};

use crate::config::{Config, HostMatch, HostPattern, Route};
pub use crate::url_path::normalise;

/// All hosts and routes of a configuration.
#[derive(Debug, Default)]
pub struct Router {
    exact: HashMap<String, ByPort>,
    /// Keys begin with the dot: `.example`.
    suffixes: HashMap<String, ByPort>,
    any: ByPort,
    routes: Vec<Routes>,
}

/// The upstreams of one host name.
#[derive(Debug, Default)]
struct ByPort {
    portless: Option<usize>,
    ports: Vec<(u16, usize)>,
}

impl Router {
    pub fn new(config: &Config) -> Self {
        let mut router = Self::default();
        for (index, upstream) in config.upstreams.iter().enumerate() {
            for host in &upstream.hosts {
                router.add_host(host, index);
            }
            router.routes.push(Routes::new(&upstream.routes));
        }
        router
    }

    fn add_host(&mut self, pattern: &HostPattern, upstream: usize) {
        let by_port = match &pattern.host {
            HostMatch::Exact(host) => self.exact.entry(host.clone()).or_default(),
            HostMatch::Suffix(suffix) => self.suffixes.entry(suffix.clone()).or_default(),
            HostMatch::Any => &mut self.any,
        };
        match pattern.port {
            None => {
                by_port.portless.get_or_insert(upstream);
            }
            Some(port) => by_port.ports.push((port, upstream)),
        }
    }

    /// The index in `config.upstreams` of the one that serves this host.
    ///
    /// `port` is the one the caller asked for, or that of the scheme where none was written. Brackets of an IPv6
    /// address and a trailing dot make no difference. Allocates only for hosts with upper-case letters.
    pub fn upstream(&self, host: &str, port: Option<u16>) -> Option<usize> {
        let host = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        let host = host.strip_suffix('.').unwrap_or(host);
        let host = if host.bytes().any(|byte| byte.is_ascii_uppercase()) {
            Cow::Owned(host.to_ascii_lowercase())
        } else {
            Cow::Borrowed(host)
        };
        self.exact
            .get(host.as_ref())
            .and_then(|by_port| by_port.find(port))
            .or_else(|| self.by_suffix(&host, port))
            .or_else(|| self.any.find(port))
    }

    fn by_suffix(&self, host: &str, port: Option<u16>) -> Option<usize> {
        if self.suffixes.is_empty() {
            return None;
        }
        // A suffix stands for at least one character before its dot.
        let dots = host.char_indices().filter(|(at, c)| *c == '.' && *at > 0);
        dots.filter_map(|(at, _)| self.suffixes.get(&host[at..])).find_map(|by_port| by_port.find(port))
    }

    /// The routes of an upstream.
    pub fn routes(&self, upstream: usize) -> Option<&Routes> {
        self.routes.get(upstream)
    }
}

impl ByPort {
    fn find(&self, port: Option<u16>) -> Option<usize> {
        let named = self.ports.iter().find(|(named, _)| Some(*named) == port).map(|(_, upstream)| *upstream);
        named.or(self.portless)
    }
}

/// The routes of an upstream.
#[derive(Debug, Default)]
pub struct Routes {
    exact: HashMap<String, Vec<Rule>>,
    prefixes: HashMap<String, Vec<Rule>>,
    /// The distinct lengths of `prefixes`, the longest first.
    lengths: Vec<usize>,
    pathless: Vec<Rule>,
    /// By index of the route.
    rewrites: Vec<Option<Rewrite>>,
}

/// What beside the path must hold.
#[derive(Debug)]
struct Rule {
    route: usize,
    /// Empty: any.
    methods: Vec<Method>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

#[derive(Debug)]
struct Rewrite {
    /// How much of the normal path the match took; `None`: all of it.
    prefix: Option<usize>,
    replacement: String,
}

impl Routes {
    pub fn new(routes: &[Route]) -> Self {
        let mut compiled = Self::default();
        for (index, route) in routes.iter().enumerate() {
            compiled.rewrites.push(None);
            // A configuration that was checked has only valid names; one that has not gets rules that never match.
            let Some(rule) = Rule::new(index, route) else { continue };
            let bucket = match route.matches.path.as_deref().map(Pattern::new) {
                None => &mut compiled.pathless,
                Some(pattern) => {
                    compiled.rewrites[index] = route.path_rewrite.as_ref().map(|replacement| Rewrite {
                        prefix: pattern.is_prefix.then_some(pattern.literal.len()),
                        replacement: replacement.clone(),
                    });
                    let paths = if pattern.is_prefix { &mut compiled.prefixes } else { &mut compiled.exact };
                    paths.entry(pattern.literal).or_default()
                }
            };
            bucket.push(rule);
        }
        compiled.lengths = compiled.prefixes.keys().map(String::len).collect();
        compiled.lengths.sort_unstable_by_key(|length| Reverse(*length));
        compiled.lengths.dedup();
        let buckets = compiled.exact.values_mut().chain(compiled.prefixes.values_mut());
        for bucket in buckets.chain([&mut compiled.pathless]) {
            // Stable: what is equally specific stays in the order of the file.
            bucket.sort_by_key(|rule| (Reverse(rule.headers.len()), rule.methods.is_empty()));
        }
        compiled
    }

    /// The index of the most specific route that matches. `path` is the raw path; a query is not looked at.
    pub fn find(&self, method: &Method, path: &str, headers: &HeaderMap) -> Option<usize> {
        let first =
            |rules: &Vec<Rule>| rules.iter().find(|rule| rule.holds(method, headers)).map(|r| r.route);
        if self.exact.is_empty() && self.prefixes.is_empty() {
            return first(&self.pathless);
        }
        let path = normalise(path);
        self.exact
            .get(path.as_ref())
            .and_then(first)
            .or_else(|| {
                let prefixes = self.lengths.iter().filter_map(|length| path.get(..*length));
                prefixes.filter_map(|prefix| self.prefixes.get(prefix)).find_map(first)
            })
            .or_else(|| first(&self.pathless))
    }

    /// What to forward instead, where the route rewrites the path; the query stays.
    ///
    /// Of a path that came in another than the normal form, the normal form is rewritten: what was matched is what
    /// the upstream sees.
    pub fn rewrite(&self, route: usize, from: &PathAndQuery) -> Option<PathAndQuery> {
        let rewrite = self.rewrites.get(route)?.as_ref()?;
        let path = normalise(from.path());
        let rest = rewrite.prefix.map_or("", |length| path.get(length..).unwrap_or(""));
        // `/v1*` → `/` makes `/x` of `/v1/x`, not `//x`.
        let rest = if rewrite.replacement.ends_with('/') { rest.trim_start_matches('/') } else { rest };
        let mut to = format!("{}{rest}", rewrite.replacement);
        if let Some(query) = from.query() {
            to.push('?');
            to.push_str(query);
        }
        PathAndQuery::try_from(to).ok()
    }
}

impl Rule {
    fn new(route: usize, settings: &Route) -> Option<Self> {
        let methods = settings.matches.methods.iter().map(|method| method.parse().ok());
        let headers = settings
            .matches
            .headers
            .iter()
            .map(|(name, value)| Some((name.parse().ok()?, HeaderValue::from_str(value.expose()).ok()?)));
        Some(Self {
            route,
            methods: methods.collect::<Option<_>>()?,
            headers: headers.collect::<Option<_>>()?,
        })
    }

    fn holds(&self, method: &Method, headers: &HeaderMap) -> bool {
        (self.methods.is_empty() || self.methods.contains(method))
            && self
                .headers
                .iter()
                .all(|(name, value)| headers.get_all(name).iter().any(|other| other == value))
    }
}

/// `match.path`: a literal, or a prefix where it ends in `*`.
struct Pattern {
    literal: String,
    is_prefix: bool,
}

impl Pattern {
    fn new(text: &str) -> Self {
        match text.strip_suffix('*') {
            // The path goes on behind a prefix, so dots at its end are no segment of their own yet.
            Some(prefix) => {
                let mut literal = normalise(&format!("{prefix}x")).into_owned();
                literal.pop();
                Self { literal, is_prefix: true }
            }
            None => Self { literal: normalise(text).into_owned(), is_prefix: false },
        }
    }
}

#[cfg(test)]
mod tests;
