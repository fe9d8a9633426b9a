//! What the caller gets when breaker, timeout or tries are exhausted.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[defaults.fallback]`; absent = none. A fixed answer, or another upstream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FallbackSettings {
    /// The status of the response.
    pub status: u16,
    /// The body of the response.
    pub body: String,
    /// Its media type.
    pub content_type: String,
    /// Another upstream to ask instead of answering.
    pub upstream: Option<String>,
}

impl Default for FallbackSettings {
    fn default() -> Self {
        Self { status: 200, body: String::new(), content_type: "application/json".to_owned(), upstream: None }
    }
}
