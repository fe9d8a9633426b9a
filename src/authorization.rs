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
pub use path::{AmbiguousPath, PathPattern, check_unambiguous};
pub use peer::{Peer, PeerError};
pub use spiffe::{IdentityPattern, InvalidId, SpiffeId, TrustDomain};

use crate::url_path::normalise;

/// `[[inbound.allow]]`: a request that matches no entry is refused with 403.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AllowSettings {
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
pub struct AllowList(Vec<AllowEntry>);

/// One `[[inbound.allow]]`: everything that it names must match.
#[derive(Debug)]
pub struct AllowEntry {
    identity: Vec<IdentityPattern>,
    /// Empty: all.
    methods: Vec<Method>,
    /// Empty: all.
    paths: Vec<PathPattern>,
    claims: Vec<(String, String)>,
}

/// One request or byte stream to be authorized.
#[derive(Clone, Copy, Debug)]
pub struct AuthorizationRequest<'a> {
    /// The verified identity of the client, if it has one.
    pub peer: Option<&'a Peer>,
    pub operation: RequestedOperation<'a>,
    pub token: EndUserToken<'a>,
}

#[derive(Clone, Copy, Debug)]
pub enum RequestedOperation<'a> {
    /// An HTTP request. `path` as received, without the query.
    Http { method: &'a Method, path: &'a str },
    /// Bytes that are not HTTP: an entry that names a method, a path or a claim does not match them.
    ByteStream,
}

/// The end user's token.
#[derive(Clone, Copy, Debug)]
pub enum EndUserToken<'a> {
    /// Not verified yet: required claims count as present.
    Unverified,
    None,
    Valid(&'a ClaimSet),
}

/// Why no entry allows the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    client: String,
    operation: String,
    nearest: Option<Nearest>,
}

/// The entry that matched best, counted from 1, and the first condition of it that did not match.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Nearest {
    entry: usize,
    mismatch: Mismatch,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Mismatch {
    Identity,
    Method,
    Path,
    Claim(String),
}

impl AllowEntry {
    /// Loading the configuration rejects invalid patterns; here they match nothing.
    fn new(allow: &AllowSettings) -> Self {
        Self {
            identity: allow.identity.iter().filter_map(|id| id.parse().ok()).collect(),
            methods: allow.methods.iter().filter_map(|method| method.parse().ok()).collect(),
            paths: allow.paths.iter().map(|path| PathPattern::new(path)).collect(),
            claims: allow.claims.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        }
    }

    /// Whether it names the peer: by its SPIFFE ID, or by a DNS name if its certificate has none.
    fn matches_peer(&self, peer: Option<&Peer>) -> bool {
        let Some(peer) = peer else { return false };
        self.identity.iter().any(|pattern| match &peer.spiffe {
            Some(id) => pattern.matches(id),
            None => peer.dns.iter().any(|name| pattern.matches_dns(name)),
        })
    }

    /// The first condition that does not match: identity, method, path, claims.
    fn first_mismatch(&self, request: &AuthorizationRequest<'_>, path: &str) -> Option<Mismatch> {
        if !self.matches_peer(request.peer) {
            return Some(Mismatch::Identity);
        }
        if let Some(lacks) = self.method_or_path_mismatch(request.operation, path) {
            return Some(lacks);
        }
        let has = |(name, wanted): &&(String, String)| match request.token {
            EndUserToken::Unverified => !matches!(request.operation, RequestedOperation::ByteStream),
            EndUserToken::None => false,
            EndUserToken::Valid(claims) => claims.has(name, wanted),
        };
        let missing = self.claims.iter().find(|claim| !has(claim));
        missing.map(|(name, wanted)| Mismatch::Claim(format!("{name} = {wanted:?}")))
    }

    /// The first of method and path that does not match.
    fn method_or_path_mismatch(&self, operation: RequestedOperation<'_>, path: &str) -> Option<Mismatch> {
        match operation {
            RequestedOperation::Http { method, .. } => {
                if !self.methods.is_empty() && !self.methods.contains(method) {
                    return Some(Mismatch::Method);
                }
                if !self.paths.is_empty() && !self.paths.iter().any(|pattern| pattern.matches(path)) {
                    return Some(Mismatch::Path);
                }
            }
            RequestedOperation::ByteStream if !self.methods.is_empty() => return Some(Mismatch::Method),
            RequestedOperation::ByteStream if !self.paths.is_empty() => return Some(Mismatch::Path),
            RequestedOperation::ByteStream => {}
        }
        None
    }

    /// Whether it allows this operation for some identity.
    pub fn allows_operation(&self, operation: RequestedOperation<'_>) -> bool {
        let path = operation.normalized_path();
        !matches!(self.method_or_path_mismatch(operation, &path), Some(Mismatch::Method | Mismatch::Path))
    }

    /// Whether it allows every request that the other one allows.
    pub fn covers(&self, other: &Self) -> bool {
        let identity =
            |narrow: &IdentityPattern| self.identity.iter().any(|wide| pattern_covers(wide, narrow));
        let method = |narrow: &Method| self.methods.contains(narrow);
        let path = |narrow: &PathPattern| self.paths.iter().any(|wide| wide.covers(narrow));
        other.identity.iter().all(identity)
            && (self.methods.is_empty() || !other.methods.is_empty() && other.methods.iter().all(method))
            && (self.paths.is_empty() || !other.paths.is_empty() && other.paths.iter().all(path))
            && self.claims.iter().all(|claim| other.claims.contains(claim))
    }
}

fn pattern_covers(wide: &IdentityPattern, narrow: &IdentityPattern) -> bool {
    match (wide, narrow) {
        (IdentityPattern::Prefix(prefix), IdentityPattern::Prefix(other)) => other.starts_with(&**prefix),
        (_, IdentityPattern::Exactly(id)) => wide.matches(id),
        _ => wide == narrow,
    }
}

impl AllowList {
    pub fn new(entries: &[AllowSettings]) -> Self {
        Self(entries.iter().map(AllowEntry::new).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn entries(&self) -> &[AllowEntry] {
        &self.0
    }

    /// Whether any entry names paths: then ambiguous paths must be rejected first.
    pub fn uses_paths(&self) -> bool {
        self.0.iter().any(|entry| !entry.paths.is_empty())
    }

    pub fn uses_methods(&self) -> bool {
        self.0.iter().any(|entry| !entry.methods.is_empty())
    }

    /// Whether any entry names claims: then the decision must be repeated once the token is verified.
    pub fn uses_claims(&self) -> bool {
        self.0.iter().any(|entry| !entry.claims.is_empty())
    }

    /// The entry that allows the request, counted from 0; `None` if there are no entries.
    ///
    /// # Errors
    /// No entry allows it.
    pub fn decide(&self, request: &AuthorizationRequest<'_>) -> Result<Option<usize>, Denial> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let path = request.operation.normalized_path();
        let mut nearest: Option<Nearest> = None;
        for (at, entry) in self.0.iter().enumerate() {
            let Some(lacks) = entry.first_mismatch(request, &path) else { return Ok(Some(at)) };
            if lacks != Mismatch::Identity
                && nearest.as_ref().is_none_or(|best| lacks.is_nearer(&best.mismatch))
            {
                nearest = Some(Nearest { entry: at + 1, mismatch: lacks });
            }
        }
        Err(Denial {
            client: request
                .peer
                .map_or_else(|| "a client without a certificate".to_owned(), ToString::to_string),
            operation: match request.operation {
                RequestedOperation::Http { method, .. } => format!("{method} {path}"),
                RequestedOperation::ByteStream => "bytes that are not HTTP".to_owned(),
            },
            nearest,
        })
    }
}

impl<'a> RequestedOperation<'a> {
    fn normalized_path(&self) -> Cow<'a, str> {
        match self {
            Self::Http { path, .. } => normalise(path),
            Self::ByteStream => Cow::Borrowed(""),
        }
    }
}

impl Mismatch {
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

impl Denial {
    /// Whether only a claim of the end user's token is missing (RFC 6750 §3.1, `insufficient_scope`).
    pub fn lacks_claim_only(&self) -> bool {
        matches!(&self.nearest, Some(Nearest { mismatch: Mismatch::Claim(_), .. }))
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { client, operation, nearest } = self;
        match nearest {
            None => write!(f, "no allow entry names {client}"),
            Some(Nearest { entry, mismatch: lacks }) => {
                write!(f, "no allow entry permits {operation} for {client}; nearest: entry {entry} has ")?;
                match lacks {
                    Mismatch::Identity => f.write_str("another identity"),
                    Mismatch::Method => f.write_str("the identity but not the method"),
                    Mismatch::Path => f.write_str("the identity and the method but not the path"),
                    Mismatch::Claim(claim) => {
                        write!(f, "all but the claim {claim}, which the token must contain")
                    }
                }
            }
        }
    }
}
