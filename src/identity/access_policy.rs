//! The access policy of inbound requests: `[[inbound.allow]]` and `[inbound.jwt]`, compiled once per configuration.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use http::HeaderName;

use super::jwt::{Issuer, TokenRequirements};
use crate::{
    authorization::{AllowList, PathPattern},
    config::{Config, Jwt, ObservablePolicy},
};

/// What an inbound request must satisfy before it reaches the service.
#[derive(Debug)]
pub struct AccessPolicy {
    pub allow_list: AllowList,
    pub jwt: Option<JwtPolicy>,
    /// Whether any rule names paths: then ambiguous paths are rejected.
    pub uses_paths: bool,
    /// Denials are counted and logged, and the request proceeds.
    pub observe_allow: bool,
    pub observe_jwt: bool,
}

/// `[inbound.jwt]`: the tokens that requests must carry.
#[derive(Debug)]
pub struct JwtPolicy {
    pub expected: TokenRequirements,
    pub issuer: Arc<Issuer>,
    /// Unique for these settings; keys the cache of verified tokens.
    pub id: u64,
    /// Paths that need no token.
    except: Vec<PathPattern>,
    /// Header fields and the claims that fill them.
    pub claim_headers: Arc<[(HeaderName, String)]>,
}

impl AccessPolicy {
    /// `None`: every request is allowed. `issuer` is set if `[inbound.jwt]` is.
    pub fn new(config: &Config, issuer: Option<Arc<Issuer>>) -> Option<Self> {
        let rules = AllowList::new(&config.inbound.allow);
        let users = config.inbound.jwt.as_ref().zip(issuer).map(|(jwt, issuer)| JwtPolicy::new(jwt, issuer));
        if rules.is_empty() && users.is_none() {
            return None;
        }
        let observes = |policy| config.runtime.observe.contains(&policy);
        let has_exceptions = users.as_ref().is_some_and(|users| !users.except.is_empty());
        Some(Self {
            uses_paths: rules.uses_paths() || has_exceptions,
            allow_list: rules,
            jwt: users,
            observe_allow: observes(ObservablePolicy::Allow),
            observe_jwt: observes(ObservablePolicy::Jwt),
        })
    }
}

impl JwtPolicy {
    fn new(jwt: &Jwt, issuer: Arc<Issuer>) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let names = jwt.claim_headers.iter();
        Self {
            expected: TokenRequirements { issuer: jwt.issuer.clone(), audiences: jwt.audiences.clone() },
            issuer,
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            except: jwt.except.iter().map(|path| PathPattern::new(path)).collect(),
            claim_headers: names
                .filter_map(|(name, claim)| Some((name.parse().ok()?, claim.clone())))
                .collect(),
        }
    }

    /// Whether a request to this path, in normal form, needs a token.
    pub fn requires_token(&self, path: &str) -> bool {
        !self.except.iter().any(|pattern| pattern.matches(path))
    }
}
