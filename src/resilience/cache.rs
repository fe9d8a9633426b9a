//! Whether a response may be stored, reused, reused although it is stale, or has to be validated: RFC 9111 as a shared
//! cache, RFC 5861. Pure: the time is an argument, the store is elsewhere (`src/cache`).
//!
//! ```text
//! request ─▶ check_request: Ok (look into the store) | Bypass (forward)
//! stored timing + request + now ─▶ assess ─▶ Fresh | WhileRevalidating (send, fetch anew meanwhile) | Validate (forward; on error: stale?)
//! response ─▶ check_storable: Ok (the store) | NotStored
//! 304 ─▶ update_head
//! ```

pub mod conditional;
pub mod directives;
pub mod freshness;
pub mod range;
pub mod storable;
pub mod vary;

#[cfg(test)]
mod tests;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::{ByteSize, HumanDuration};

/// `[defaults.cache]`; absent = none. Stores responses in memory, for all workers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CacheSettings {
    /// The memory of the store. All routes share one store; the largest value counts.
    pub max_bytes: ByteSize,
    /// Larger responses are not stored.
    pub object_limit: ByteSize,
    /// How long after its freshness a response may replace a failure, where it does not say so itself. 0 = not.
    pub stale_if_error: HumanDuration,
    /// How long after its freshness a response may be sent while it is fetched anew. 0 = not.
    pub stale_while_revalidate: HumanDuration,
    /// How long requests wait for the same response that another one fetches, before they go alone. 0 = not.
    pub coalesce: HumanDuration,
    /// Responses to requests with `Authorization`: `refuse` stores them only where the response allows it.
    pub authorization: AuthorizationRule,
    /// Whether clients with different verified identities share stored responses.
    pub shared_between_peers: bool,
}

impl Default for CacheSettings {
    fn default() -> Self {
        Self {
            max_bytes: ByteSize(32 << 20),
            object_limit: ByteSize(1 << 20),
            stale_if_error: HumanDuration::from_secs(600),
            stale_while_revalidate: HumanDuration::default(),
            coalesce: HumanDuration::from_secs(5),
            authorization: AuthorizationRule::Refuse,
            shared_between_peers: false,
        }
    }
}

/// What the cache does with requests that carry `Authorization`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AuthorizationRule {
    /// Stores their responses only with `public`, `s-maxage` or `must-revalidate` (RFC 9111 §3.5).
    #[default]
    Refuse,
    /// Stores a response for each credential.
    Key,
}
