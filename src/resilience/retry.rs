//! Whether a failed attempt may be retried (RFC 9110 §9.2.2, RFC 9113 §8.7, gRPC A6).

mod decide;
mod plan;
#[cfg(test)]
mod tests;

pub use decide::{
    FailedAttempt, MAX_RESENDS, Replayability, Retry, RetryContext, RetryDecision, RetryPolicy, StopReason,
};
pub use plan::{
    Action, AttemptFailure, AttemptKind, Event, Finish, NextAttempt, RequestCopy, RequestTraits, RetryPlan,
    SharedLimits, Stop,
};

use std::{fmt, str::FromStr};

use http::Method;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de};

use super::{backoff::BackoffSettings, budget::BudgetSettings};
use crate::{text_value, units::ByteSize};

/// `[defaults.retry]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RetrySettings {
    /// Attempts after the first, hedges included. 0 = sent at most once, always.
    pub max: u32,
    /// Which failures are retried. `default` stands for the built-in list.
    pub on: Vec<RetryCondition>,
    /// `idempotent`, `all`, or a list of methods. A request that certainly did not reach the service may have any.
    pub methods: RetryMethods,
    /// The wait before a retry: full jitter.
    pub backoff: BackoffSettings,
    /// Bounds retries and hedges together, per upstream.
    pub budget: BudgetSettings,
    /// A request body of at most this size is kept for retries; a larger one streams through and is not retried.
    pub body_limit: ByteSize,
}

impl Default for RetrySettings {
    fn default() -> Self {
        Self {
            max: 2,
            on: RetryCondition::DEFAULT.to_vec(),
            methods: RetryMethods::Idempotent,
            backoff: BackoffSettings::default(),
            budget: BudgetSettings::default(),
            body_limit: ByteSize(64 << 10),
        }
    }
}

/// A kind of failure that `retry.on` can name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum RetryCondition {
    /// Stands for [`RetryCondition::DEFAULT`].
    Default,
    ConnectFailure,
    RefusedStream,
    Reset,
    /// 502, 503, 504.
    GatewayError,
    AttemptTimeout,
    /// `5xx`
    ServerError,
    Status(u16),
    GrpcUnavailable,
    GrpcResourceExhausted,
    GrpcDeadlineExceeded,
    GrpcInternal,
    GrpcCancelled,
}

impl RetryCondition {
    pub const DEFAULT: [Self; 6] = [
        Self::ConnectFailure,
        Self::RefusedStream,
        Self::Reset,
        Self::GatewayError,
        Self::AttemptTimeout,
        Self::GrpcUnavailable,
    ];

    const NAMED: [(&str, Self); 12] = [
        ("default", Self::Default),
        ("connect-failure", Self::ConnectFailure),
        ("refused-stream", Self::RefusedStream),
        ("reset", Self::Reset),
        ("gateway-error", Self::GatewayError),
        ("attempt-timeout", Self::AttemptTimeout),
        ("5xx", Self::ServerError),
        ("grpc-unavailable", Self::GrpcUnavailable),
        ("grpc-resource-exhausted", Self::GrpcResourceExhausted),
        ("grpc-deadline-exceeded", Self::GrpcDeadlineExceeded),
        ("grpc-internal", Self::GrpcInternal),
        ("grpc-cancelled", Self::GrpcCancelled),
    ];
}

impl FromStr for RetryCondition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((_, condition)) = Self::NAMED.iter().find(|(name, _)| *name == text) {
            return Ok(*condition);
        }
        match text.parse::<u16>() {
            Ok(code @ 400..=599) => Ok(Self::Status(code)),
            _ => {
                let names: Vec<&str> = Self::NAMED.iter().map(|(name, _)| *name).collect();
                Err(format!(
                    "`{text}` is not a retry condition: use {}, or a status code from 400 to 599",
                    names.join(", ")
                ))
            }
        }
    }
}

impl fmt::Display for RetryCondition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(code) => write!(f, "{code}"),
            named => {
                let name =
                    Self::NAMED.iter().find(|(_, condition)| condition == named).map_or("", |(name, _)| name);
                f.write_str(name)
            }
        }
    }
}

text_value!(
    RetryCondition,
    "RetryCondition",
    "an outcome to retry: default, connect-failure, refused-stream, reset, gateway-error, attempt-timeout, 5xx, a status code, grpc-unavailable, …",
    r"default|connect-failure|refused-stream|reset|gateway-error|attempt-timeout|5xx|[0-9]{3}|grpc-[a-z-]+"
);

/// The methods whose failed requests may be retried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RetryMethods {
    /// GET, HEAD, OPTIONS, TRACE, PUT, DELETE (RFC 9110 §9.2.2), and requests with an `Idempotency-Key`.
    Idempotent,
    All,
    Listed(Vec<String>),
}

impl Serialize for RetryMethods {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Idempotent => serializer.serialize_str("idempotent"),
            Self::All => serializer.serialize_str("all"),
            Self::Listed(methods) => methods.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for RetryMethods {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WordOrList;
        impl<'de> de::Visitor<'de> for WordOrList {
            type Value = RetryMethods;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"idempotent\", \"all\" or an array of methods")
            }
            fn visit_str<E: de::Error>(self, word: &str) -> Result<RetryMethods, E> {
                match word {
                    "idempotent" => Ok(RetryMethods::Idempotent),
                    "all" => Ok(RetryMethods::All),
                    _ => Err(E::invalid_value(de::Unexpected::Str(word), &self)),
                }
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<RetryMethods, A::Error> {
                let mut methods = Vec::new();
                while let Some(method) = seq.next_element()? {
                    methods.push(method);
                }
                Ok(RetryMethods::Listed(methods))
            }
        }
        deserializer.deserialize_any(WordOrList)
    }
}

impl JsonSchema for RetryMethods {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "RetryMethods".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "anyOf": [
            { "enum": ["idempotent", "all"] },
            { "type": "array", "items": { "type": "string" }, "description": "methods" },
        ] })
    }
}

impl RetryMethods {
    /// Whether a request that may have been processed may be sent again. A proxy must not retry a method that is not
    /// idempotent on its own (RFC 9110 §9.2.2). With `all` or a list, the operator permits it.
    pub fn allows(&self, method: &Method, idempotency_key: bool) -> bool {
        match self {
            _ if is_idempotent(method) && !matches!(self, Self::Listed(_)) => true,
            Self::All => true,
            Self::Idempotent => idempotency_key,
            Self::Listed(names) => names.iter().any(|name| name == method.as_str()),
        }
    }
}

/// RFC 9110 §9.2.2. Not `Method::is_idempotent`, which a new version of the `http` crate could change.
pub fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE
    )
}
