//! What `/status` says of tokens: the keys that check those of callers, and those that are shown to upstreams. Never a
//! token itself.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{identity::oauth2::OwnToken, model::Snapshot};

/// The keys of the issuer that `[inbound.jwt]` names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeysStatus {
    /// The URL or file they come from.
    pub source: String,
    /// How many are known; 0 until some were had.
    pub known: usize,
    pub fetched: u64,
    pub failed: u64,
    /// When keys were last brought.
    pub last_seconds_ago: Option<u64>,
    /// Why the last fetch failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl KeysStatus {
    pub fn of(snapshot: &Snapshot) -> Option<Self> {
        let jwt = snapshot.config.inbound.jwt.as_ref()?;
        let issuer = &snapshot.gate.as_ref()?.users.as_ref()?.issuer;
        let told = issuer.told();
        Some(Self {
            source: jwt.jwks.to_string(),
            known: issuer.keys().map_or(0, |keys| keys.keys.len()),
            fetched: told.fetched,
            failed: told.failed,
            last_seconds_ago: told.last.map(|last| last.elapsed().as_secs()),
            error: told.error,
        })
    }
}

/// The token that an upstream's calls carry: `oauth2`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenStatus {
    /// For how long it is still used; none where there is none.
    pub good_for_seconds: Option<u64>,
    pub fetched: u64,
    pub failed: u64,
    /// Why the last request for one failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl TokenStatus {
    pub fn of(token: &OwnToken) -> Self {
        let told = token.told();
        Self {
            good_for_seconds: token.good_for(Instant::now()).as_ref().map(Duration::as_secs),
            fetched: told.fetched,
            failed: told.failed,
            error: told.error,
        }
    }
}
