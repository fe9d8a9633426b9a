//! The policy of a call, after inheritance: `[defaults]`, overridden by the upstream, overridden by the route.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::resilience::deadline::AttemptTimeout;
use crate::{
    resilience::{
        breaker::BreakerSettings, fallback::FallbackSettings, fault::FaultSettings, hedge::HedgeSettings,
        limit::LimitSettings, outlier::OutlierSettings, rate::RateSettings, retry::RetrySettings,
    },
    units::{HumanDuration, Toggle},
};

/// What holds for a call. Every key may stand in `[defaults]`, `[[upstream]]` and `[[upstream.route]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// TCP connect (and TLS handshake) of one try.
    pub connect_timeout: HumanDuration,
    /// All tries and waits, to response headers, from when the request's body has been sent. 0 = none.
    pub timeout: HumanDuration,
    /// One try, likewise.
    pub attempt_timeout: AttemptTimeout,
    /// A body in which nothing moves, either way. 0 = none.
    pub idle_timeout: HumanDuration,
    /// The same for TCP, CONNECT, upgrades and gRPC streams. 0 = none.
    pub tunnel_idle_timeout: HumanDuration,
    /// The whole exchange, body included. 0 = none.
    pub max_duration: HumanDuration,
    /// Further attempts; `false`: none.
    pub retry: Toggle<RetrySettings>,
    /// Stops requests to an upstream that fails.
    pub breaker: Toggle<BreakerSettings>,
    /// Takes an endpoint that fails out for a while.
    pub outlier: Toggle<OutlierSettings>,
    /// How much may be in flight.
    pub limits: Toggle<LimitSettings>,
    /// How many requests a second.
    pub rate_limit: Toggle<RateSettings>,
    /// A second copy of a request where the first is slow.
    pub hedge: Toggle<HedgeSettings>,
    /// Injected failures, to rehearse.
    pub fault: Toggle<FaultSettings>,
    /// The response where all else has failed.
    pub fallback: Toggle<FallbackSettings>,
    /// Whether a route (not the upstream or the defaults) set `timeout` / `attempt_timeout`: gRPC calls heed only those.
    #[serde(skip)]
    pub route_sets_timeout: bool,
    #[serde(skip)]
    pub route_sets_attempt_timeout: bool,
    /// Whether the configuration, not a default, limits requests: `limits` of its own with another key than
    /// `max_connections`, which holds for byte streams, too; or inherited ones that differ from what is built in.
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
            route_sets_timeout: false,
            route_sets_attempt_timeout: false,
            sets_request_limits: false,
        }
    }
}

impl Policy {
    /// What `[inbound]` starts from: it inherits nothing; timeouts 0, retry and breaker off, no limits unless set.
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
