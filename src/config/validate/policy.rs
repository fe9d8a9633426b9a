//! Validation of policies.

use std::time::Duration;

use super::Check;
use crate::{
    config::{Node, Policy, diagnostic::Problems},
    resilience::{
        breaker::{BreakerSettings, GrowingDuration},
        fallback::FallbackSettings,
        hedge::HedgeAfter,
        limit::LimitSettings,
        rate::{RateKey, RateSettings},
        retry::{RetryMethods, RetrySettings},
    },
    units::HumanDuration,
};

/// More retries only add load.
const MAX_RETRIES: u32 = 20;
/// Kept for every request in flight.
const MAX_BODY_LIMIT: u64 = 64 << 20;
/// A window is divided into slices, which must be several milliseconds long.
const MIN_WINDOW: Duration = Duration::from_secs(1);
/// Below it the store could hold next to nothing.
const MIN_CACHE: u64 = 64 << 10;
const MAX_OBJECT: u64 = 1 << 30;
const MAX_WINDOW: Duration = Duration::from_secs(3600);

/// `node` is the table of effective policy keys.
pub(in super::super) fn policy(policy: &Policy, node: &Node, problems: &mut Problems) {
    let mut check = Check { node, problems };
    if policy.connect_timeout.is_zero() {
        check.error(&["connect_timeout"], "a connect timeout of 0 would never connect", "write e.g. \"1s\"");
    }
    if let Some(retry) = &policy.retry.0 {
        check.retry(retry);
    }
    if let Some(breaker) = &policy.breaker.0 {
        check.breaker(breaker);
    }
    if let Some(outlier) = &policy.outlier.0 {
        check.growing(&["outlier", "eject_for"], outlier.eject_for);
    }
    if let Some(limits) = &policy.limits.0 {
        check.limits(limits);
    }
    if let Some(rate) = &policy.rate_limit.0 {
        check.rate(rate);
    }
    if let Some(hedge) = &policy.hedge.0
        && let HedgeAfter::Fixed(after) = hedge.after
    {
        let help = "write a duration, e.g. \"50ms\", or a quantile, e.g. \"p95\"";
        check.require(
            !after.is_zero(),
            &["hedge", "after"],
            "a hedge after 0 would double every request",
            help,
        );
    }
    if let Some(status) = policy.fault.0.as_ref().and_then(|fault| fault.abort) {
        check.status(&["fault", "abort"], status);
    }
    if let Some(fallback) = &policy.fallback.0 {
        check.fallback(fallback);
    }
    if let Some(cache) = &policy.cache.0 {
        let least = *cache.max_bytes >= MIN_CACHE;
        let help = "at least 64KiB; `cache = false` switches it off";
        check.require(least, &["cache", "max_bytes"], "the cache has no memory", help);
        check.require(
            *cache.object_limit <= MAX_OBJECT,
            &["cache", "object_limit"],
            "this is too large for one response in memory",
            "at most 1GiB",
        );
    }
}

impl Check<'_> {
    fn retry(&mut self, retry: &RetrySettings) {
        if retry.max > MAX_RETRIES {
            self.error(&["retry", "max"], "too many retries", format!("at most {MAX_RETRIES}"));
        }
        if *retry.body_limit > MAX_BODY_LIMIT {
            let help = "at most 64MiB: this much may be kept for every request in flight";
            self.error(&["retry", "body_limit"], "the body limit is too large", help);
        }
        if let RetryMethods::Listed(methods) = &retry.methods {
            for (at, method) in methods.iter().enumerate() {
                self.method(&["retry", "methods", &at.to_string()], method);
            }
        }
        if retry.backoff.base > retry.backoff.max {
            let help = "make `max` at least `base`";
            self.error(&["retry", "backoff"], "the back-off begins above its maximum", help);
        }
        self.window(&["retry", "budget", "window"], retry.budget.window);
    }

    fn breaker(&mut self, breaker: &BreakerSettings) {
        self.window(&["breaker", "window"], breaker.window);
        self.growing(&["breaker", "open_for"], breaker.open_for);
        let help = "write at least 1; `breaker = false` switches it off";
        let trials = &["breaker", "trial_requests"];
        self.require(breaker.trial_requests > 0, trials, "without trials it would stay open for ever", help);
        let least = &["breaker", "min_requests"];
        self.require(
            breaker.min_requests > 0,
            least,
            "a rate needs at least one request",
            "write at least 1",
        );
    }

    fn limits(&mut self, limits: &LimitSettings) {
        let help = "write at least 1; `limits = false` switches all limits off";
        let message = "a limit of 0 would refuse every request";
        self.require(limits.max_connections > 0, &["limits", "max_connections"], message, help);
        self.require(limits.max_requests > 0, &["limits", "max_requests"], message, help);
    }

    fn rate(&mut self, rate: &RateSettings) {
        let help = "write at least 1; `rate_limit = false` switches it off";
        let message = "a rate limit of 0 would refuse every request";
        self.require(rate.rate > 0, &["rate_limit", "rate"], message, help);
        self.require(rate.burst > 0, &["rate_limit", "burst"], message, help);
        if let RateKey::Header(name) = &rate.per {
            self.header_name(&["rate_limit", "per"], name);
        }
    }

    fn fallback(&mut self, fallback: &FallbackSettings) {
        self.status(&["fallback", "status"], fallback.status);
        self.header_value(&["fallback", "content_type"], &fallback.content_type);
        let written = self.node.get("fallback");
        let response_keys = ["status", "body", "content_type"];
        let response_key =
            response_keys.into_iter().find(|key| written.is_some_and(|table| table.get(key).is_some()));
        if let (Some(_), Some(key)) = (&fallback.upstream, response_key) {
            let message = "a fallback is a fixed response or another upstream, not both";
            self.error(&["fallback", key], message, "remove `upstream`, or everything else");
        }
    }

    fn status(&mut self, path: &[&str], status: u16) {
        self.require(
            (200..=599).contains(&status),
            path,
            "this is not a final status code",
            "write 200 to 599",
        );
    }

    fn window(&mut self, path: &[&str], window: HumanDuration) {
        let fits = (MIN_WINDOW..=MAX_WINDOW).contains(&*window);
        self.require(fits, path, "this window is too short or too long", "write \"1s\" to \"1h\"");
    }

    pub(super) fn growing(&mut self, path: &[&str], growing: GrowingDuration) {
        if growing.base.is_zero() {
            self.error(path, "`base` is 0", "write e.g. `base = \"5s\"`");
        } else if growing.base > growing.max {
            self.error(path, "`base` is above `max`", "make `max` at least `base`");
        }
    }
}
