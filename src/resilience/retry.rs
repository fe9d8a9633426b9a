//! When a failed try may be followed by another (RFC 9110 §9.2.2, RFC 9113 §8.7, gRPC A6).

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
    "a failure to try again: default, connect-failure, refused-stream, reset, gateway-error, attempt-timeout, 5xx, a status code, grpc-unavailable, …"
);

/// The methods whose failed calls may be sent again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Methods {
    /// GET, HEAD, OPTIONS, TRACE, PUT, DELETE (RFC 9110 §9.2.2), and calls with an `Idempotency-Key`.
    Idempotent,
    All,
    #[serde(untagged)]
    Listed(Vec<String>),
}
