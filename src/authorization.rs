//! Who may call what: the entries of `[[inbound.allow]]` against one call. Pure: no I/O, nothing remembered.
//!
//! No entry: everybody who got as far as this may call. One or more: a call that matches none is refused, and told
//! which entry came nearest.

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

/// `[[inbound.allow]]`: what matches no entry is refused with 403.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Allow {
    /// SPIFFE IDs; a `*` at the end stands for anything.
    pub identity: Vec<String>,
    /// None: all.
    #[serde(default)]
    pub methods: Vec<String>,
    /// None: all. A `*` at the end stands for anything.
    #[serde(default)]
    pub paths: Vec<String>,
    /// What the JWT must hold.
    #[serde(default)]
    pub claims: BTreeMap<String, String>,
}

/// All entries, in the order of the file.
#[derive(Debug, Default)]
pub struct Rules(Vec<Entry>);

/// One `[[inbound.allow]]`: all that it names must fit.
#[derive(Debug)]
pub struct Entry {
    identity: Vec<Pattern>,
    /// None: all.
    methods: Vec<Method>,
    /// None: all.
    paths: Vec<PathPattern>,
    claims: Vec<(String, String)>,
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Whom the caller's certificate proved to be.
    pub peer: Option<&'a Peer>,
    pub what: What<'a>,
    pub token: Token<'a>,
}

#[derive(Clone, Copy, Debug)]
pub enum What<'a> {
    /// `path` as it came, without the query.
    Call { method: &'a Method, path: &'a str },
    /// Bytes that are not HTTP: what names a method, a path or a claim does not fit them.
    Bytes,
}

/// What is known of the end user.
#[derive(Clone, Copy, Debug)]
pub enum Token<'a> {
    /// Not looked at yet: a claim that is asked for may turn out to be there.
    Unread,
    None,
    Good(&'a ClaimSet),
}

/// Why nobody let the call in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    who: String,
    asked: String,
    nearest: Option<Nearest>,
}

/// The entry that fitted best, counted from 1, and the first thing of it that did not fit.
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
    /// Texts that are no patterns were refused when the configuration was loaded; here they fit nobody.
    fn new(allow: &Allow) -> Self {
        Self {
            identity: allow.identity.iter().filter_map(|id| id.parse().ok()).collect(),
            methods: allow.methods.iter().filter_map(|method| method.parse().ok()).collect(),
            paths: allow.paths.iter().map(|path| PathPattern::new(path)).collect(),
            claims: allow.claims.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        }
    }

    /// Whether it names the peer: by its SPIFFE ID, or by a DNS name where its certificate has none.
    fn names(&self, peer: Option<&Peer>) -> bool {
        let Some(peer) = peer else { return false };
        self.identity.iter().any(|pattern| match &peer.spiffe {
            Some(id) => pattern.matches(id),
            None => peer.dns.iter().any(|name| pattern.matches_dns(name)),
        })
    }

    /// The first thing that does not fit, in the order in which they are told.
    fn lacks(&self, asked: &Asked<'_>, path: &str) -> Option<Lacks> {
        if !self.names(asked.peer) {
            return Some(Lacks::Identity);
        }
        if let Some(lacks) = self.lacks_of(asked.what, path) {
            return Some(lacks);
        }
        let has = |(name, wanted): &&(String, String)| match asked.token {
            Token::Unread => !matches!(asked.what, What::Bytes),
            Token::None => false,
            Token::Good(claims) => claims.has(name, wanted),
        };
        let missing = self.claims.iter().find(|claim| !has(claim));
        missing.map(|(name, wanted)| Lacks::Claim(format!("{name} = {wanted:?}")))
    }

    /// What does not fit of method and path.
    fn lacks_of(&self, what: What<'_>, path: &str) -> Option<Lacks> {
        match what {
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

    /// Whether it lets anybody do this.
    pub fn takes(&self, what: What<'_>) -> bool {
        let path = what.normal_path();
        !matches!(self.lacks_of(what, &path), Some(Lacks::Method | Lacks::Path))
    }

    /// Whether every call that the other lets in is let in by this one.
    pub fn covers(&self, other: &Self) -> bool {
        let named = |theirs: &Pattern| self.identity.iter().any(|ours| pattern_covers(ours, theirs));
        let method = |theirs: &Method| self.methods.contains(theirs);
        let path = |theirs: &PathPattern| self.paths.iter().any(|ours| ours.covers(theirs));
        other.identity.iter().all(named)
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

    /// Whether nothing is asked.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn entries(&self) -> &[Entry] {
        &self.0
    }

    /// Whether any entry looks at paths: then no path may be read in two ways.
    pub fn look_at_paths(&self) -> bool {
        self.0.iter().any(|entry| !entry.paths.is_empty())
    }

    pub fn look_at_methods(&self) -> bool {
        self.0.iter().any(|entry| !entry.methods.is_empty())
    }

    /// Whether any entry asks for claims: then the verdict is not the last one before the token is read.
    pub fn look_at_claims(&self) -> bool {
        self.0.iter().any(|entry| !entry.claims.is_empty())
    }

    /// The entry that lets a call in, counted from 0; `None` where there are no entries.
    ///
    /// # Errors
    /// No entry does.
    pub fn decide(&self, asked: &Asked<'_>) -> Result<Option<usize>, Refusal> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let path = asked.what.normal_path();
        let mut nearest: Option<Nearest> = None;
        for (at, entry) in self.0.iter().enumerate() {
            let Some(lacks) = entry.lacks(asked, &path) else { return Ok(Some(at)) };
            if lacks != Lacks::Identity && nearest.as_ref().is_none_or(|best| lacks.is_nearer(&best.lacks)) {
                nearest = Some(Nearest { entry: at + 1, lacks });
            }
        }
        Err(Refusal {
            who: asked.peer.map_or_else(|| "a caller without a certificate".to_owned(), ToString::to_string),
            asked: match asked.what {
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
    /// Fits in more.
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
    /// Whether nothing but a claim of the end user's token is missing (RFC 6750 §3.1, `insufficient_scope`).
    pub fn is_for_claims(&self) -> bool {
        matches!(&self.nearest, Some(Nearest { lacks: Lacks::Claim(_), .. }))
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { who, asked, nearest } = self;
        match nearest {
            None => write!(f, "no allow entry names {who}"),
            Some(Nearest { entry, lacks }) => {
                write!(f, "no allow entry lets {who} do {asked}; nearest: entry {entry} has ")?;
                match lacks {
                    Lacks::Identity => f.write_str("another identity"),
                    Lacks::Method => f.write_str("the identity but not the method"),
                    Lacks::Path => f.write_str("the identity and the method but not the path"),
                    Lacks::Claim(claim) => write!(f, "all but the claim {claim}, which the token must hold"),
                }
            }
        }
    }
}
