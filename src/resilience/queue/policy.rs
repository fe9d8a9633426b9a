//! What an attempt to deliver means: done, another attempt, a dead letter; or that the service is away.

use std::{fmt, str::FromStr, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DeadReason, Verdict};
use crate::{resilience::backoff::BackoffSettings, text_value, units::HumanDuration, unix_time::UnixMillis};

/// A `Retry-After` is obeyed up to here, or to `backoff.max` if that is longer.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// The keys of `[[queue]]` by which deliveries are made.
#[derive(Clone, Debug, PartialEq)]
pub struct DeliveryPolicy {
    /// Deliveries at a time.
    pub concurrency: usize,
    /// Deliveries begun in a second; 0: no limit.
    pub rate: u32,
    /// Attempts that reached the service, before the delivery is a dead letter.
    pub attempts: u32,
    /// Between attempts, and between the probes of a paused queue.
    pub backoff: BackoffSettings,
    /// Responses after which another attempt is useless.
    pub permanent: Vec<PermanentStatus>,
    /// What becomes of a delivery that may have been processed.
    pub ambiguous: AmbiguousPolicy,
    /// After acceptance; 0: never.
    pub expires: HumanDuration,
}

impl Default for DeliveryPolicy {
    fn default() -> Self {
        Self {
            concurrency: 5,
            rate: 0,
            attempts: 12,
            backoff: BackoffSettings {
                base: HumanDuration::from_secs(1),
                max: HumanDuration::from_secs(600),
            },
            permanent: vec![PermanentStatus::Class(4), PermanentStatus::Code(501)],
            ambiguous: AmbiguousPolicy::Retry,
            expires: HumanDuration::from_secs(86_400),
        }
    }
}

/// `ambiguous`: what becomes of a delivery that may have been processed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AmbiguousPolicy {
    /// Another attempt: at least once.
    #[default]
    Retry,
    /// A dead letter: never twice.
    Dead,
}

/// A status or a class of them: `501`, `4xx`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum PermanentStatus {
    /// `4` is 4xx, without those that say "later": 408, 409, 423, 425, 429.
    Class(u16),
    Code(u16),
}

/// Of a class that is permanent, these are not.
const LATER: [u16; 5] = [408, 409, 423, 425, 429];

impl PermanentStatus {
    fn contains(self, status: u16) -> bool {
        match self {
            Self::Class(class) => status / 100 == class && !LATER.contains(&status),
            Self::Code(code) => status == code,
        }
    }
}

impl FromStr for PermanentStatus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a status: write e.g. \"501\" or \"4xx\"");
        if let Some(class) = text.strip_suffix("xx") {
            return class
                .parse()
                .ok()
                .filter(|class| (4..=5).contains(class))
                .map(Self::Class)
                .ok_or_else(wrong);
        }
        text.parse().ok().filter(|code| (400..=599).contains(code)).map(Self::Code).ok_or_else(wrong)
    }
}

impl fmt::Display for PermanentStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Class(class) => write!(f, "{class}xx"),
            Self::Code(code) => code.fmt(f),
        }
    }
}

text_value!(
    PermanentStatus,
    "PermanentStatus",
    "a status, e.g. \"501\", or a class, e.g. \"4xx\"",
    r"[45]xx|[45][0-9]{2}"
);

/// What happened to an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryOutcome {
    /// The service responded.
    Response { status: u16, retry_after: Option<Duration> },
    /// It surely did not reach the service: breaker open, no address, connection refused, a limit of this proxy.
    NotSent { retry_after: Option<Duration> },
    /// It was sent, and no response came: a timeout, a reset.
    NoResponse,
    /// This process stopped it: a drain.
    Interrupted { sent: bool },
    /// What is stored is not a request.
    Unreadable,
    /// Its client is no longer allowed to send it.
    NotAllowed,
    /// The upstream that it is for is not configured any more.
    NoUpstream,
}

impl DeliveryOutcome {
    /// Whether the system is down, with what it says about how long.
    pub(super) const fn is_down(self) -> Option<Option<Duration>> {
        match self {
            Self::NotSent { retry_after } => Some(retry_after),
            Self::Response { status: 503, retry_after: after @ Some(_) } => Some(after),
            _ => None,
        }
    }

    /// Whether it shows that the service can be reached.
    pub(super) const fn is_up(self) -> bool {
        matches!(self, Self::Response { .. } | Self::NoResponse) && self.is_down().is_none()
    }
}

impl DeliveryPolicy {
    /// What an attempt means. `attempts`: before this one; `random`: from 0 to 1.
    pub fn judge(&self, outcome: DeliveryOutcome, attempts: u32, now: UnixMillis, random: f64) -> Verdict {
        if outcome.is_down().is_some() {
            return Verdict::Release;
        }
        let never_twice = self.ambiguous == AmbiguousPolicy::Dead;
        match outcome {
            DeliveryOutcome::Unreadable | DeliveryOutcome::NotAllowed | DeliveryOutcome::NoUpstream => {
                Verdict::Dead(DeadReason::Poison)
            }
            DeliveryOutcome::Interrupted { sent } if sent && never_twice => {
                Verdict::Dead(DeadReason::Ambiguous)
            }
            DeliveryOutcome::Interrupted { .. } | DeliveryOutcome::NotSent { .. } => Verdict::Release,
            DeliveryOutcome::Response { status: ..400, .. } => Verdict::Done,
            DeliveryOutcome::Response { status, .. } if self.is_permanent(status) => {
                Verdict::Dead(DeadReason::Permanent)
            }
            // A service that fails may have done part of it; 503 says that it has not.
            DeliveryOutcome::Response { status: 500..=502 | 504.., .. } | DeliveryOutcome::NoResponse
                if never_twice =>
            {
                Verdict::Dead(DeadReason::Ambiguous)
            }
            DeliveryOutcome::Response { .. } | DeliveryOutcome::NoResponse
                if attempts + 1 >= self.attempts =>
            {
                Verdict::Dead(DeadReason::Attempts)
            }
            DeliveryOutcome::Response { retry_after, .. } => {
                Verdict::Wait { until: now + self.wait(attempts + 1, retry_after, random) }
            }
            DeliveryOutcome::NoResponse => {
                Verdict::Wait { until: now + self.wait(attempts + 1, None, random) }
            }
        }
    }

    fn is_permanent(&self, status: u16) -> bool {
        self.permanent.iter().any(|permanent| permanent.contains(status))
    }

    /// Full jitter; a `Retry-After` is obeyed up to an hour or `backoff.max`, jitter is only added to it.
    pub(super) fn wait(&self, n: u32, retry_after: Option<Duration>, random: f64) -> Duration {
        let jitter = self.backoff.ceiling(n).mul_f64(random.clamp(0.0, 1.0));
        let longest = LONGEST_RETRY_AFTER.max(self.backoff.max.0);
        retry_after.unwrap_or_default().min(longest).saturating_add(jitter)
    }

    /// When a delivery that was accepted then becomes a dead letter.
    pub(super) fn expiry(&self, since: UnixMillis) -> UnixMillis {
        self.expires.limit().map_or(UnixMillis(u64::MAX), |expires| since + expires)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMillis = UnixMillis(1_000_000);

    fn response(status: u16) -> DeliveryOutcome {
        DeliveryOutcome::Response { status, retry_after: None }
    }

    fn later(status: u16) -> DeliveryOutcome {
        DeliveryOutcome::Response { status, retry_after: Some(Duration::from_secs(30)) }
    }

    #[test]
    fn each_outcome_has_its_verdict() {
        let (at_least_once, never_twice) = (
            DeliveryPolicy::default(),
            DeliveryPolicy { ambiguous: AmbiguousPolicy::Dead, ..Default::default() },
        );
        let wait = |ms| Verdict::Wait { until: UnixMillis(NOW.0 + ms) };
        let dead = Verdict::Dead;
        use DeadReason::{Ambiguous, Permanent, Poison};
        for (outcome, retry, once) in [
            (response(200), Verdict::Done, Verdict::Done),
            (response(302), Verdict::Done, Verdict::Done),
            (response(400), dead(Permanent), dead(Permanent)),
            (response(501), dead(Permanent), dead(Permanent)),
            (response(409), wait(500), wait(500)),
            (later(429), wait(30_500), wait(30_500)),
            (response(500), wait(500), dead(Ambiguous)),
            (response(503), wait(500), wait(500)),
            (response(504), wait(500), dead(Ambiguous)),
            (later(503), Verdict::Release, Verdict::Release),
            (DeliveryOutcome::NotSent { retry_after: None }, Verdict::Release, Verdict::Release),
            (DeliveryOutcome::NoResponse, wait(500), dead(Ambiguous)),
            (DeliveryOutcome::Interrupted { sent: false }, Verdict::Release, Verdict::Release),
            (DeliveryOutcome::Interrupted { sent: true }, Verdict::Release, dead(Ambiguous)),
            (DeliveryOutcome::Unreadable, dead(Poison), dead(Poison)),
            (DeliveryOutcome::NotAllowed, dead(Poison), dead(Poison)),
            (DeliveryOutcome::NoUpstream, dead(Poison), dead(Poison)),
        ] {
            assert_eq!(at_least_once.judge(outcome, 0, NOW, 0.5), retry, "{outcome:?}");
            assert_eq!(never_twice.judge(outcome, 0, NOW, 0.5), once, "{outcome:?}, never twice");
        }
        assert_eq!(at_least_once.judge(response(500), 11, NOW, 0.5), dead(DeadReason::Attempts));
        assert_eq!(at_least_once.judge(later(503), 11, NOW, 0.5), Verdict::Release);
        assert_eq!(at_least_once.judge(response(500), 10, NOW, 1.0), wait(600_000));
    }

    #[test]
    fn an_endless_retry_after_is_an_hour_or_the_longest_backoff() {
        let endless = DeliveryOutcome::Response {
            status: 429,
            retry_after: Some(Duration::from_secs(99_999_999_999_999_999)),
        };
        let until = |policy: &DeliveryPolicy| policy.judge(endless, 0, NOW, 0.0);
        let mut policy = DeliveryPolicy::default();
        assert_eq!(until(&policy), Verdict::Wait { until: NOW + Duration::from_secs(3600) });
        policy.backoff.max = HumanDuration::from_secs(7200);
        assert_eq!(until(&policy), Verdict::Wait { until: NOW + Duration::from_secs(7200) });
    }

    #[test]
    fn permanent_statuses_are_classes_and_codes() {
        for text in ["4xx", "5xx", "501", "409"] {
            assert_eq!(text.parse::<PermanentStatus>().map(|status| status.to_string()), Ok(text.to_owned()));
        }
        for text in ["", "200", "2xx", "xx", "4xxx", "600"] {
            assert!(text.parse::<PermanentStatus>().is_err(), "{text}");
        }
        // A code by its name counts, even one that a class leaves out.
        assert!(PermanentStatus::Code(409).contains(409) && !PermanentStatus::Class(4).contains(409));
    }
}
