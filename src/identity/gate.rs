//! What an inbound call must show before the service sees it: the settings, compiled once per configuration.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use http::HeaderName;

use super::jwt::{Expected, Issuer};
use crate::{
    authorization::{PathPattern, Rules},
    config::{Config, Jwt, Observed},
};

#[derive(Debug)]
pub struct Gate {
    pub rules: Rules,
    pub users: Option<Users>,
    /// Whether any path decides: then none may be read in two ways.
    pub looks_at_paths: bool,
    /// Refusals are counted and logged, and the call goes on.
    pub observe_allow: bool,
    pub observe_jwt: bool,
}

/// `[inbound.jwt]`: the end users on whose behalf others call.
#[derive(Debug)]
pub struct Users {
    pub expected: Expected,
    pub issuer: Arc<Issuer>,
    /// Tells these expectations from all others, for what was found under them.
    pub number: u64,
    /// Paths that need no token.
    except: Vec<PathPattern>,
    /// Header fields and the claims they get.
    pub claim_headers: Arc<[(HeaderName, String)]>,
}

impl Gate {
    /// `None`: nothing is asked of anybody. `issuer` is there where `[inbound.jwt]` is.
    pub fn new(config: &Config, issuer: Option<Arc<Issuer>>) -> Option<Self> {
        let rules = Rules::new(&config.inbound.allow);
        let users = config.inbound.jwt.as_ref().zip(issuer).map(|(jwt, issuer)| Users::new(jwt, issuer));
        if rules.is_empty() && users.is_none() {
            return None;
        }
        let observes = |policy| config.runtime.observe.contains(&policy);
        let excepts = users.as_ref().is_some_and(|users| !users.except.is_empty());
        Some(Self {
            looks_at_paths: rules.look_at_paths() || excepts,
            rules,
            users,
            observe_allow: observes(Observed::Allow),
            observe_jwt: observes(Observed::Jwt),
        })
    }
}

impl Users {
    fn new(jwt: &Jwt, issuer: Arc<Issuer>) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let names = jwt.claim_headers.iter();
        Self {
            expected: Expected { issuer: jwt.issuer.clone(), audiences: jwt.audiences.clone() },
            issuer,
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            except: jwt.except.iter().map(|path| PathPattern::new(path)).collect(),
            claim_headers: names
                .filter_map(|(name, claim)| Some((name.parse().ok()?, claim.clone())))
                .collect(),
        }
    }

    /// Whether a call to this path, in normal form, needs a token.
    pub fn are_asked(&self, path: &str) -> bool {
        !self.except.iter().any(|pattern| pattern.matches(path))
    }
}
