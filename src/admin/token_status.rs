//! Tokens in `/status`: the keys that verify tokens of clients, and the state of tokens for upstreams. Never a token
//! itself.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{identity::oauth2::UpstreamToken, model::Snapshot};

/// The keys of the issuer that `[inbound.jwt]` names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JwksStatus {
    /// The URL or file they come from.
    pub source: String,
    /// The number of keys; 0 until the first successful fetch.
    pub known: usize,
    pub fetched: u64,
    pub failed: u64,
    /// The age of the last successful fetch.
    pub last_seconds_ago: Option<u64>,
    /// Why the last fetch failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl JwksStatus {
    pub fn of(snapshot: &Snapshot) -> Option<Self> {
        let jwt = snapshot.config.inbound.jwt.as_ref()?;
        let issuer = &snapshot.gate.as_ref()?.jwt.as_ref()?.issuer;
        let report = issuer.report();
        Some(Self {
            source: jwt.jwks.to_string(),
            known: issuer.keys().map_or(0, |keys| keys.keys.len()),
            fetched: report.fetched,
            failed: report.failed,
            last_seconds_ago: report.last_success.map(|last| last.elapsed().as_secs()),
            error: report.error,
        })
    }
}

/// The token for requests to an upstream: `oauth2`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenStatus {
    /// How long it will still be used; `None` if there is no token.
    pub good_for_seconds: Option<u64>,
    pub fetched: u64,
    pub failed: u64,
    /// Why the last token request failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl TokenStatus {
    pub fn of(token: &UpstreamToken) -> Self {
        let report = token.report();
        Self {
            good_for_seconds: token.valid_for(Instant::now()).as_ref().map(Duration::as_secs),
            fetched: report.fetched,
            failed: report.failed,
            error: report.error,
        }
    }
}
