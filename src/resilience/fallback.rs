//! The response that the client gets when breaker, timeout or retries are exhausted.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[defaults.fallback]`; absent = none. A fixed response, or another upstream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FallbackSettings {
    /// The status of the response.
    pub status: u16,
    /// The body of the response.
    pub body: String,
    /// Its media type.
    pub content_type: String,
    /// Another upstream to send the request to, instead of the fixed response.
    pub upstream: Option<String>,
}

impl Default for FallbackSettings {
    fn default() -> Self {
        Self { status: 200, body: String::new(), content_type: "application/json".to_owned(), upstream: None }
    }
}
