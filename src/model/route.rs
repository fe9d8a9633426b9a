//! Finds the upstream and the route of a request. Compiled once per configuration, used for every request.
//!
//! - Hosts: exact before `*.suffix` (the longest) before `*`; with each, a named port before none.
//! - Routes of an upstream, the most specific first: exact path, then the longest literal prefix, then none; then
//!   more headers; then methods given; the order in the file decides what is still equal.
//!
//! Paths are compared in one normal form ([`normalise`]), so that `/a/%2e%2e/b` cannot slip past a rule for `/b`;
//! the path is forwarded as received. The cost of neither lookup grows with the number of hosts or routes: one hash
//! lookup per distinct prefix length, or per label of the host.

mod version;

use std::{borrow::Cow, cmp::Reverse, collections::HashMap};

use http::{HeaderMap, HeaderName, HeaderValue, Method, uri::PathAndQuery};

use super::queue_route::DELIVERIES;
use crate::config::{Config, HostMatch, HostPattern, Route};
pub use crate::url_path::normalise;
use version::VersionRule;

/// All hosts and routes of a configuration.
#[derive(Debug, Default)]
pub struct Router {
    exact: HashMap<String, ByPort>,
    /// Keys include the leading dot: `.example`.
    suffixes: HashMap<String, ByPort>,
    any: ByPort,
    routes: Vec<Routes>,
    /// Those of `[inbound]`, if there are any.
    inbound: Option<Routes>,
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
        let inbound = &config.inbound.routes;
        router.inbound = (!inbound.is_empty()).then(|| Routes::new(inbound));
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

    /// The index in `config.upstreams` of the upstream of this host.
    ///
    /// `port` is the port in the request, or the scheme's default port. Brackets of an IPv6 address and a trailing dot
    /// are ignored. Allocates only for hosts with upper-case letters.
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
        // `*` matches at least one character before the dot.
        let dots = host.char_indices().filter(|(at, c)| *c == '.' && *at > 0);
        dots.filter_map(|(at, _)| self.suffixes.get(&host[at..])).find_map(|by_port| by_port.find(port))
    }

    /// The routes of `[inbound]`; `None`: it has none.
    pub fn inbound(&self) -> Option<&Routes> {
        self.inbound.as_ref()
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
    /// Indexed by route.
    rewrites: Vec<Option<Rewrite>>,
}

/// The conditions of a route besides the path.
#[derive(Debug)]
struct Rule {
    route: usize,
    /// Empty: any method.
    methods: Vec<Method>,
    headers: Vec<(HeaderName, HeaderValue)>,
    version: Option<VersionRule>,
}

#[derive(Debug)]
struct Rewrite {
    /// The length of the matched prefix of the normal path; `None`: all of it.
    prefix: Option<usize>,
    replacement: String,
}

impl Routes {
    pub fn new(routes: &[Route]) -> Self {
        let mut compiled = Self::default();
        for (index, route) in routes.iter().enumerate() {
            compiled.rewrites.push(None);
            // A validated configuration has only valid names; a rule with an invalid one never matches.
            let Some(rule) = Rule::new(index, route) else { continue };
            let bucket = match route.matches.path_pattern().as_deref().map(Pattern::new) {
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
        if routes.iter().any(|route| route.queue.is_some()) {
            // Its index follows those of the routes: see `queue_routes`.
            let deliveries =
                Rule { route: routes.len(), methods: Vec::new(), headers: Vec::new(), version: None };
            compiled.prefixes.entry(DELIVERIES.to_owned()).or_default().insert(0, deliveries);
        }
        compiled.lengths = compiled.prefixes.keys().map(String::len).collect();
        compiled.lengths.sort_unstable_by_key(|length| Reverse(*length));
        compiled.lengths.dedup();
        let buckets = compiled.exact.values_mut().chain(compiled.prefixes.values_mut());
        for bucket in buckets.chain([&mut compiled.pathless]) {
            // A stable sort: equally specific routes keep the order of the file.
            bucket.sort_by_key(|rule| (Reverse(rule.fields()), rule.methods.is_empty()));
        }
        compiled
    }

    /// The index of the most specific route that matches. `path` is the raw path; a query is ignored.
    pub fn find(&self, method: &Method, path: &str, headers: &HeaderMap) -> Option<usize> {
        if self.exact.is_empty() && self.prefixes.is_empty() {
            return first(&self.pathless, method, path, headers);
        }
        let path = normalise(path);
        let first = |rules: &Vec<Rule>| first(rules, method, &path, headers);
        self.exact
            .get(path.as_ref())
            .and_then(first)
            .or_else(|| {
                let prefixes = self.lengths.iter().filter_map(|length| path.get(..*length));
                prefixes.filter_map(|prefix| self.prefixes.get(prefix)).find_map(first)
            })
            .or_else(|| first(&self.pathless))
    }

    /// The path and query to forward, if the route rewrites the path; the query is unchanged.
    ///
    /// The normal form of the path is rewritten, so that the upstream sees what was matched.
    pub fn rewrite(&self, route: usize, from: &PathAndQuery) -> Option<PathAndQuery> {
        let rewrite = self.rewrites.get(route)?.as_ref()?;
        let path = normalise(from.path());
        let rest = rewrite.prefix.map_or("", |length| path.get(length..).unwrap_or(""));
        // `/v1*` → `/` turns `/v1/x` into `/x`, not `//x`.
        let rest = if rewrite.replacement.ends_with('/') { rest.trim_start_matches('/') } else { rest };
        let mut to = format!("{}{rest}", rewrite.replacement);
        if let Some(query) = from.query() {
            to.push('?');
            to.push_str(query);
        }
        PathAndQuery::try_from(to).ok()
    }
}

/// The first rule that matches a request.
fn first(rules: &[Rule], method: &Method, path: &str, headers: &HeaderMap) -> Option<usize> {
    rules.iter().find(|rule| rule.matches(method, path, headers)).map(|rule| rule.route)
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
            version: match &settings.matches.version {
                Some(version) => Some(VersionRule::new(version)?),
                None => None,
            },
        })
    }

    /// How many fields it compares.
    fn fields(&self) -> usize {
        self.headers.len() + usize::from(self.version.is_some())
    }

    fn matches(&self, method: &Method, path: &str, headers: &HeaderMap) -> bool {
        (self.methods.is_empty() || self.methods.contains(method))
            && self
                .headers
                .iter()
                .all(|(name, value)| headers.get_all(name).iter().any(|other| other == value))
            && self.version.as_ref().is_none_or(|version| version.matches(path, headers))
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
            // More of the path may follow a prefix, so trailing dots are not a segment of their own yet.
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
