//! When a failed try may be followed by another (RFC 9110 §9.2.2, RFC 9113 §8.7, gRPC A6).

mod decide;
mod plan;
#[cfg(test)]
mod tests;

pub use decide::{Body, Decision, FailedAttempt, MOST_RESENT, Moment, Reason, Retry, RetryPolicy};
pub use plan::{
    Action, AttemptKind, AttemptOutcome, Event, Finish, NextAttempt, RequestCopy, RequestTraits, RetryPlan,
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
    /// Tries after the first, hedges included. 0 = sent at most once, always.
    pub max: u32,
    /// Which failures are tried again. `default` names the built-in list.
    pub on: Vec<Condition>,
    /// `idempotent`, `all`, or a list of methods. A try that surely never reached the service is repeated for any.
    pub methods: Methods,
    /// The wait before a further try: full jitter.
    pub backoff: BackoffSettings,
    /// Bounds retries and hedges together, per upstream.
    pub budget: BudgetSettings,
    /// Request bodies up to and with this size are kept to be sent again; a larger one streams and is not retried.
    pub body_limit: ByteSize,
}

impl Default for RetrySettings {
    fn default() -> Self {
        Self {
            max: 2,
            on: Condition::DEFAULT.to_vec(),
            methods: Methods::Idempotent,
            backoff: BackoffSettings::default(),
            budget: BudgetSettings::default(),
            body_limit: ByteSize(64 << 10),
        }
    }
}

/// A kind of failure that `retry.on` can name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Condition {
    /// Stands for [`Condition::DEFAULT`].
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

impl Condition {
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

impl FromStr for Condition {
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

impl fmt::Display for Condition {
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
    Condition,
    "RetryCondition",
    "a failure to try again: default, connect-failure, refused-stream, reset, gateway-error, attempt-timeout, 5xx, a status code, grpc-unavailable, …",
    r"default|connect-failure|refused-stream|reset|gateway-error|attempt-timeout|5xx|[0-9]{3}|grpc-[a-z-]+"
);

/// The methods whose failed calls may be sent again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Methods {
    /// GET, HEAD, OPTIONS, TRACE, PUT, DELETE (RFC 9110 §9.2.2), and calls with an `Idempotency-Key`.
    Idempotent,
    All,
    Listed(Vec<String>),
}

impl Serialize for Methods {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Idempotent => serializer.serialize_str("idempotent"),
            Self::All => serializer.serialize_str("all"),
            Self::Listed(methods) => methods.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Methods {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WordOrList;
        impl<'de> de::Visitor<'de> for WordOrList {
            type Value = Methods;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"idempotent\", \"all\" or an array of methods")
            }
            fn visit_str<E: de::Error>(self, word: &str) -> Result<Methods, E> {
                match word {
                    "idempotent" => Ok(Methods::Idempotent),
                    "all" => Ok(Methods::All),
                    _ => Err(E::invalid_value(de::Unexpected::Str(word), &self)),
                }
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Methods, A::Error> {
                let mut methods = Vec::new();
                while let Some(method) = seq.next_element()? {
                    methods.push(method);
                }
                Ok(Methods::Listed(methods))
            }
        }
        deserializer.deserialize_any(WordOrList)
    }
}

impl JsonSchema for Methods {
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

impl Methods {
    /// Whether a call that may have been processed may be sent again. A proxy must not do that on its own to a
    /// method that isn't idempotent (RFC 9110 §9.2.2); `all` and a list are the operator's word that it may.
    pub fn allow(&self, method: &Method, idempotency_key: bool) -> bool {
        match self {
            _ if is_idempotent(method) && !matches!(self, Self::Listed(_)) => true,
            Self::All => true,
            Self::Idempotent => idempotency_key,
            Self::Listed(names) => names.iter().any(|name| name == method.as_str()),
        }
    }
}

/// RFC 9110 §9.2.2. Unlike `Method::is_idempotent` this is ours to keep.
pub fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE
    )
}
