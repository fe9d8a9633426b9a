//! The policy of a request, after inheritance: `[defaults]`, overridden by the upstream, overridden by the route.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::resilience::deadline::AttemptTimeout;
use crate::{
    resilience::{
        breaker::BreakerSettings, cache::CacheSettings, fallback::FallbackSettings, fault::FaultSettings,
        hedge::HedgeSettings, limit::LimitSettings, outlier::OutlierSettings, rate::RateSettings,
        retry::RetrySettings,
    },
    units::{HumanDuration, Toggle},
};

/// The policy of a request. Every key is valid in `[defaults]`, `[[upstream]]` and `[[upstream.route]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// TCP connect (and TLS handshake) of one attempt.
    pub connect_timeout: HumanDuration,
    /// All attempts and waits, to response headers, from when the request body has been sent. 0 = none.
    pub timeout: HumanDuration,
    /// One attempt, likewise.
    pub attempt_timeout: AttemptTimeout,
    /// A body without progress, in either direction. 0 = none.
    pub idle_timeout: HumanDuration,
    /// The same for TCP, CONNECT, upgrades and gRPC streams. 0 = none.
    pub tunnel_idle_timeout: HumanDuration,
    /// The whole exchange, body included. 0 = none.
    pub max_duration: HumanDuration,
    /// Retries; `false`: none.
    pub retry: Toggle<RetrySettings>,
    /// Stops requests to an upstream that fails.
    pub breaker: Toggle<BreakerSettings>,
    /// Ejects an endpoint that fails for a while.
    pub outlier: Toggle<OutlierSettings>,
    /// The most connections and requests in flight.
    pub limits: Toggle<LimitSettings>,
    /// The most requests per second.
    pub rate_limit: Toggle<RateSettings>,
    /// A second copy of a slow request.
    pub hedge: Toggle<HedgeSettings>,
    /// Injected failures, to rehearse.
    pub fault: Toggle<FaultSettings>,
    /// The response when breaker, timeout or retries are exhausted.
    pub fallback: Toggle<FallbackSettings>,
    /// Stored responses.
    pub cache: Toggle<CacheSettings>,
    /// Whether a route (not the upstream or the defaults) sets `timeout` / `attempt_timeout`: for gRPC only those
    /// apply.
    #[serde(skip)]
    pub route_sets_timeout: bool,
    #[serde(skip)]
    pub route_sets_attempt_timeout: bool,
    /// Whether the configuration, not a default, limits requests: its own `limits` with another key than
    /// `max_connections`, which applies to byte streams too; or inherited ones that differ from the built-in defaults.
    #[serde(skip)]
    pub sets_request_limits: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            connect_timeout: HumanDuration::from_secs(1),
            timeout: HumanDuration::from_secs(15),
            attempt_timeout: AttemptTimeout::Auto,
            idle_timeout: HumanDuration::from_secs(5 * 60),
            tunnel_idle_timeout: HumanDuration::from_secs(60 * 60),
            max_duration: HumanDuration::default(),
            retry: Toggle::on(RetrySettings::default()),
            breaker: Toggle::on(BreakerSettings::default()),
            outlier: Toggle::on(OutlierSettings::default()),
            limits: Toggle::on(LimitSettings::default()),
            rate_limit: Toggle::off(),
            hedge: Toggle::off(),
            fault: Toggle::off(),
            fallback: Toggle::off(),
            cache: Toggle::off(),
            route_sets_timeout: false,
            route_sets_attempt_timeout: false,
            sets_request_limits: false,
        }
    }
}

impl Policy {
    /// The defaults of `[inbound]`, which inherits nothing: timeouts 0, retry and breaker off, no limits unless set.
    pub fn inbound() -> Self {
        Self {
            timeout: HumanDuration::default(),
            retry: Toggle::off(),
            breaker: Toggle::off(),
            outlier: Toggle::off(),
            limits: Toggle::off(),
            ..Self::default()
        }
    }
}
