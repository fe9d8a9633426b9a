//! Age and freshness of a stored response, and what a request may do with it (RFC 9111 §4, RFC 5861).

use std::time::{Duration, SystemTime};

use http::{
    HeaderMap, HeaderName, StatusCode,
    header::{AGE, DATE, EXPIRES, LAST_MODIFIED},
};

use super::{
    CacheSettings,
    directives::{RequestDirectives, ResponseDirectives},
};

/// A response without explicit freshness is fresh for this part of the time since it was last modified (RFC 9111
/// §4.2.2).
const HEURISTIC_PART: u32 = 10;
/// At most this long.
const MAX_HEURISTIC: Duration = Duration::from_secs(3600);

/// What freshness is computed from.
#[derive(Clone, Debug)]
pub struct Timing {
    /// How old the response was when it arrived: `corrected_initial_age`.
    initial_age: Duration,
    received_at: SystemTime,
    lifetime: Duration,
    directives: ResponseDirectives,
}

/// What a request may do with a stored response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// Send it.
    Fresh,
    /// The request itself accepts a stale one (`max-stale`): send it.
    AcceptedStale,
    /// Send it, and fetch it anew meanwhile.
    WhileRevalidating,
    /// Forward the request.
    Validate,
}

/// A stored response as one request finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assessment {
    pub reuse: Reuse,
    pub age: Duration,
    /// Seconds of freshness that are left; negative once it is stale.
    pub ttl: i64,
    /// Whether it may be sent if forwarding fails.
    pub on_error: bool,
    /// Forwarded because the request asked for it, not because the response is stale.
    pub request_forces: bool,
}

impl Timing {
    /// `requested_at`: when the request was sent that this is the response to.
    pub fn new(
        status: StatusCode,
        headers: &HeaderMap,
        requested_at: SystemTime,
        received_at: SystemTime,
    ) -> Self {
        let since = |earlier: SystemTime| received_at.duration_since(earlier).unwrap_or_default();
        let date = date(headers, &DATE);
        let apparent_age = date.map_or(Duration::ZERO, since);
        let corrected = age_value(headers) + since(requested_at);
        let directives = ResponseDirectives::of(headers);
        let lifetime = lifetime(status, headers, &directives, date.unwrap_or(received_at));
        Self { initial_age: apparent_age.max(corrected), received_at, lifetime, directives }
    }

    pub fn directives(&self) -> &ResponseDirectives {
        &self.directives
    }

    pub fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// `current_age`.
    pub fn age(&self, now: SystemTime) -> Duration {
        self.initial_age + now.duration_since(self.received_at).unwrap_or_default()
    }

    /// Whether it can be sent without validation, to a request without directives of its own.
    pub fn is_fresh(&self, now: SystemTime) -> bool {
        !self.directives.no_cache && self.age(now) < self.lifetime
    }

    pub fn ttl(&self, now: SystemTime) -> i64 {
        let seconds = |time: Duration| i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
        let age = self.age(now);
        if age < self.lifetime {
            seconds(self.lifetime - age)
        } else {
            // Stale from the first moment on, also within the second.
            -seconds(age - self.lifetime).max(1)
        }
    }

    /// What a request may do with it.
    pub fn assess(
        &self,
        request: &RequestDirectives,
        settings: &CacheSettings,
        now: SystemTime,
    ) -> Assessment {
        let age = self.age(now);
        let staleness = age.saturating_sub(self.lifetime);
        let stale_allowed = !self.directives.forbids_stale();
        let window = self.directives.stale_if_error.or(request.stale_if_error);
        let on_error =
            stale_allowed && !request.no_cache && staleness < window.unwrap_or(*settings.stale_if_error);
        let is_fresh = self.is_fresh(now);
        let too_old = request.max_age.is_some_and(|max| age > max || max.is_zero())
            || request.min_fresh.is_some_and(|left| self.lifetime.saturating_sub(age) < left);
        let reuse = if request.no_cache {
            Reuse::Validate
        } else if is_fresh && !too_old {
            Reuse::Fresh
        } else if !stale_allowed || (is_fresh && too_old) {
            Reuse::Validate
        } else if request.max_stale.is_some_and(|max| staleness <= max) && !too_old {
            Reuse::AcceptedStale
        } else if staleness
            < self.directives.stale_while_revalidate.unwrap_or(*settings.stale_while_revalidate)
            && !too_old
        {
            Reuse::WhileRevalidating
        } else {
            Reuse::Validate
        };
        Assessment { reuse, age, ttl: self.ttl(now), on_error, request_forces: is_fresh }
    }
}

/// `freshness_lifetime` (RFC 9111 §4.2.1), for a shared cache.
fn lifetime(
    status: StatusCode,
    headers: &HeaderMap,
    directives: &ResponseDirectives,
    date: SystemTime,
) -> Duration {
    if let Some(explicit) = directives.s_maxage.or(directives.max_age) {
        return explicit;
    }
    if headers.contains_key(EXPIRES) {
        // An invalid date, above all `0`, is in the past (§5.3); of several the earliest counts.
        let all = headers.get_all(EXPIRES).iter().map(|value| value.to_str().ok().and_then(parse_date));
        let earliest = all.map(|at| at.unwrap_or(SystemTime::UNIX_EPOCH)).min();
        return earliest.and_then(|at| at.duration_since(date).ok()).unwrap_or_default();
    }
    if !(directives.public || is_heuristically_cacheable(status)) {
        return Duration::ZERO;
    }
    let modified = self::date(headers, &LAST_MODIFIED).and_then(|at| date.duration_since(at).ok());
    modified.map_or(Duration::ZERO, |since| (since / HEURISTIC_PART).min(MAX_HEURISTIC))
}

/// RFC 9110 §15.1, without 206: partial responses are not stored.
pub fn is_heuristically_cacheable(status: StatusCode) -> bool {
    matches!(status.as_u16(), 200 | 203 | 204 | 300 | 301 | 308 | 404 | 405 | 410 | 414 | 501)
}

/// The age that the response came with; the first of several counts (RFC 9111 §5.1). What is not a number is ignored.
fn age_value(headers: &HeaderMap) -> Duration {
    let first = headers.get_all(AGE).iter().next();
    let text = first.and_then(|value| value.to_str().ok()).unwrap_or_default();
    let text = text.split(',').next().unwrap_or_default().trim();
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Duration::ZERO;
    }
    Duration::from_secs(text.parse::<u64>().unwrap_or(1 << 31).min(1 << 31))
}

/// A date field; none where it is absent or invalid.
pub fn date(headers: &HeaderMap, name: &HeaderName) -> Option<SystemTime> {
    headers.get(name).and_then(|value| value.to_str().ok()).and_then(parse_date)
}

/// The three formats of RFC 9110 §5.6.7.
pub fn parse_date(text: &str) -> Option<SystemTime> {
    httpdate::parse_http_date(text).ok()
}
