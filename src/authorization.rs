//! Authorization: the entries of `[[inbound.allow]]` against one request. Pure: no I/O, no state.
//!
//! Without entries every request is allowed. With entries, a request that matches none is denied, and the denial
//! names the entry that came nearest.

mod claims;
mod path;
pub mod peer;
mod spiffe;
#[cfg(test)]
mod tests;

use std::{borrow::Cow, collections::BTreeMap, fmt};

use http::Method;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use claims::ClaimSet;
pub use path::{Ambiguous, PathPattern, unambiguous};
pub use peer::{Peer, PeerError};
pub use spiffe::{InvalidId, Pattern, SpiffeId, TrustDomain};

use crate::url_path::normalise;

/// `[[inbound.allow]]`: a request that matches no entry is refused with 403.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Allow {
    /// SPIFFE IDs of clients; a `*` at the end matches anything.
    pub identity: Vec<String>,
    /// Allowed methods; none: all.
    #[serde(default)]
    pub methods: Vec<String>,
    /// Allowed paths; none: all. A `*` at the end matches anything.
    #[serde(default)]
    pub paths: Vec<String>,
    /// Claims that the JWT must have.
    #[serde(default)]
    pub claims: BTreeMap<String, String>,
}

/// The allow list: all entries, in the order of the file.
#[derive(Debug, Default)]
pub struct Rules(Vec<Entry>);

/// One `[[inbound.allow]]`: everything that it names must match.
#[derive(Debug)]
pub struct Entry {
    identity: Vec<Pattern>,
    /// Empty: all.
    methods: Vec<Method>,
    /// Empty: all.
    paths: Vec<PathPattern>,
    claims: Vec<(String, String)>,
}

/// One request or byte stream to be authorized.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The verified identity of the client, if it has one.
    pub peer: Option<&'a Peer>,
    pub what: What<'a>,
    pub token: Token<'a>,
}

#[derive(Clone, Copy, Debug)]
pub enum What<'a> {
    /// An HTTP request. `path` as received, without the query.
    Call { method: &'a Method, path: &'a str },
    /// Bytes that are not HTTP: an entry that names a method, a path or a claim does not match them.
    Bytes,
}

/// The end user's token.
#[derive(Clone, Copy, Debug)]
pub enum Token<'a> {
    /// Not verified yet: required claims count as present.
    Unread,
    None,
    Good(&'a ClaimSet),
}

/// Why no entry allows the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    client: String,
    operation: String,
    nearest: Option<Nearest>,
}

/// The entry that matched best, counted from 1, and the first condition of it that did not match.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Nearest {
    entry: usize,
    lacks: Lacks,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Lacks {
    Identity,
    Method,
    Path,
    Claim(String),
}

impl Entry {
    /// Loading the configuration rejects invalid patterns; here they match nothing.
    fn new(allow: &Allow) -> Self {
        Self {
            identity: allow.identity.iter().filter_map(|id| id.parse().ok()).collect(),
            methods: allow.methods.iter().filter_map(|method| method.parse().ok()).collect(),
            paths: allow.paths.iter().map(|path| PathPattern::new(path)).collect(),
            claims: allow.claims.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        }
    }

    /// Whether it names the peer: by its SPIFFE ID, or by a DNS name if its certificate has none.
    fn names(&self, peer: Option<&Peer>) -> bool {
        let Some(peer) = peer else { return false };
        self.identity.iter().any(|pattern| match &peer.spiffe {
            Some(id) => pattern.matches(id),
            None => peer.dns.iter().any(|name| pattern.matches_dns(name)),
        })
    }

    /// The first condition that does not match: identity, method, path, claims.
    fn lacks(&self, request: &Asked<'_>, path: &str) -> Option<Lacks> {
        if !self.names(request.peer) {
            return Some(Lacks::Identity);
        }
        if let Some(lacks) = self.lacks_of(request.what, path) {
            return Some(lacks);
        }
        let has = |(name, wanted): &&(String, String)| match request.token {
            Token::Unread => !matches!(request.what, What::Bytes),
            Token::None => false,
            Token::Good(claims) => claims.has(name, wanted),
        };
        let missing = self.claims.iter().find(|claim| !has(claim));
        missing.map(|(name, wanted)| Lacks::Claim(format!("{name} = {wanted:?}")))
    }

    /// The first of method and path that does not match.
    fn lacks_of(&self, operation: What<'_>, path: &str) -> Option<Lacks> {
        match operation {
            What::Call { method, .. } => {
                if !self.methods.is_empty() && !self.methods.contains(method) {
                    return Some(Lacks::Method);
                }
                if !self.paths.is_empty() && !self.paths.iter().any(|pattern| pattern.matches(path)) {
                    return Some(Lacks::Path);
                }
            }
            What::Bytes if !self.methods.is_empty() => return Some(Lacks::Method),
            What::Bytes if !self.paths.is_empty() => return Some(Lacks::Path),
            What::Bytes => {}
        }
        None
    }

    /// Whether it allows this operation for some identity.
    pub fn takes(&self, operation: What<'_>) -> bool {
        let path = operation.normal_path();
        !matches!(self.lacks_of(operation, &path), Some(Lacks::Method | Lacks::Path))
    }

    /// Whether it allows every request that the other one allows.
    pub fn covers(&self, other: &Self) -> bool {
        let identity = |narrow: &Pattern| self.identity.iter().any(|wide| pattern_covers(wide, narrow));
        let method = |narrow: &Method| self.methods.contains(narrow);
        let path = |narrow: &PathPattern| self.paths.iter().any(|wide| wide.covers(narrow));
        other.identity.iter().all(identity)
            && (self.methods.is_empty() || !other.methods.is_empty() && other.methods.iter().all(method))
            && (self.paths.is_empty() || !other.paths.is_empty() && other.paths.iter().all(path))
            && self.claims.iter().all(|claim| other.claims.contains(claim))
    }
}

fn pattern_covers(wide: &Pattern, narrow: &Pattern) -> bool {
    match (wide, narrow) {
        (Pattern::Prefix(prefix), Pattern::Prefix(other)) => other.starts_with(&**prefix),
        (_, Pattern::Exactly(id)) => wide.matches(id),
        _ => wide == narrow,
    }
}

impl Rules {
    pub fn new(entries: &[Allow]) -> Self {
        Self(entries.iter().map(Entry::new).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn entries(&self) -> &[Entry] {
        &self.0
    }

    /// Whether any entry names paths: then ambiguous paths must be rejected first.
    pub fn look_at_paths(&self) -> bool {
        self.0.iter().any(|entry| !entry.paths.is_empty())
    }

    pub fn look_at_methods(&self) -> bool {
        self.0.iter().any(|entry| !entry.methods.is_empty())
    }

    /// Whether any entry names claims: then the decision must be repeated once the token is verified.
    pub fn look_at_claims(&self) -> bool {
        self.0.iter().any(|entry| !entry.claims.is_empty())
    }

    /// The entry that allows the request, counted from 0; `None` if there are no entries.
    ///
    /// # Errors
    /// No entry allows it.
    pub fn decide(&self, request: &Asked<'_>) -> Result<Option<usize>, Refusal> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let path = request.what.normal_path();
        let mut nearest: Option<Nearest> = None;
        for (at, entry) in self.0.iter().enumerate() {
            let Some(lacks) = entry.lacks(request, &path) else { return Ok(Some(at)) };
            if lacks != Lacks::Identity && nearest.as_ref().is_none_or(|best| lacks.is_nearer(&best.lacks)) {
                nearest = Some(Nearest { entry: at + 1, lacks });
            }
        }
        Err(Refusal {
            client: request
                .peer
                .map_or_else(|| "a client without a certificate".to_owned(), ToString::to_string),
            operation: match request.what {
                What::Call { method, .. } => format!("{method} {path}"),
                What::Bytes => "bytes that are not HTTP".to_owned(),
            },
            nearest,
        })
    }
}

impl<'a> What<'a> {
    fn normal_path(&self) -> Cow<'a, str> {
        match self {
            Self::Call { path, .. } => normalise(path),
            Self::Bytes => Cow::Borrowed(""),
        }
    }
}

impl Lacks {
    /// Whether more conditions matched before this one failed.
    fn is_nearer(&self, other: &Self) -> bool {
        let rank = |lacks: &Self| match lacks {
            Self::Identity => 0,
            Self::Method => 1,
            Self::Path => 2,
            Self::Claim(_) => 3,
        };
        rank(self) > rank(other)
    }
}

impl Refusal {
    /// Whether only a claim of the end user's token is missing (RFC 6750 §3.1, `insufficient_scope`).
    pub fn is_for_claims(&self) -> bool {
        matches!(&self.nearest, Some(Nearest { lacks: Lacks::Claim(_), .. }))
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { client, operation, nearest } = self;
        match nearest {
            None => write!(f, "no allow entry names {client}"),
            Some(Nearest { entry, lacks }) => {
                write!(f, "no allow entry permits {operation} for {client}; nearest: entry {entry} has ")?;
                match lacks {
                    Lacks::Identity => f.write_str("another identity"),
                    Lacks::Method => f.write_str("the identity but not the method"),
                    Lacks::Path => f.write_str("the identity and the method but not the path"),
                    Lacks::Claim(claim) => {
                        write!(f, "all but the claim {claim}, which the token must contain")
                    }
                }
            }
        }
    }
}
