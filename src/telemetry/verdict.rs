//! The verdict on a request, and its explanation: one stable word for machines, one sentence for people.
//!
//! Both are derived from the record when it is reported. The sentence is not built for a plain success.

use std::{borrow::Cow, fmt::Write, net::SocketAddr, time::Duration};

use super::record::{AttemptRecord, RequestEnd, RequestRecord};
use crate::resilience::{
    breaker::BreakerState,
    classify::{AttemptOutcome, ConnectFailure, GrpcStatus, OutcomeKind},
    retry::AttemptKind,
};

/// A request whose response head takes this long is reported as slow.
pub const SLOW_AFTER: Duration = Duration::from_secs(1);

/// The longest explanation, in bytes.
const MAX_EXPLANATION: usize = 1000;

/// How a request is classified for access log and `GET /requests`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// An ordinary success.
    Plain,
    /// The client got no good response, or only a fallback.
    Failed,
    /// It took more than one attempt.
    Retried,
    /// Its response head took [`SLOW_AFTER`] or longer.
    Slow,
}

impl Verdict {
    pub const fn word(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Failed => "failed",
            Self::Retried => "retried",
            Self::Slow => "slow",
        }
    }
}

impl RequestRecord {
    pub fn verdict(&self) -> Verdict {
        let gone = self.end == RequestEnd::ClientGone && self.status.is_none();
        let broken = matches!(self.end, RequestEnd::Broken | RequestEnd::Cut);
        let status = self.status.is_some_and(|status| status.is_server_error());
        let grpc = self.grpc_status.is_some_and(is_failure);
        let replaced = self.replaced_cause.is_some();
        if gone || broken || status || grpc || replaced || self.local_response.is_some() {
            Verdict::Failed
        } else if self.attempts.count() > 1 {
            Verdict::Retried
        } else if self.response_time().is_some_and(|took| took >= SLOW_AFTER) {
            Verdict::Slow
        } else {
            Verdict::Plain
        }
    }

    /// From the start of the request to the response head.
    fn response_time(&self) -> Option<Duration> {
        self.response_head_at.map(|at| at.saturating_duration_since(self.started_at))
    }

    /// The stable word for why the request was not a plain success: a cause of `docs/errors.md`, how it ended, or the
    /// outcome of an attempt.
    pub fn reason(&self) -> Option<Cow<'static, str>> {
        match self.stale_cause() {
            Some(cause) => Some(format!("stale: {}", cause.replace('_', " ")).into()),
            None => self.reason_word().map(Cow::Borrowed),
        }
    }

    fn reason_word(&self) -> Option<&'static str> {
        if let Some(refusal) = &self.local_response {
            return Some(refusal.cause.word());
        }
        if let Some(failure) = self.fallback_cause() {
            return Some(failure);
        }
        if self.end != RequestEnd::Complete {
            return Some(self.end.word());
        }
        if let Some(status) = self.grpc_status.filter(|status| *status != GrpcStatus::Ok) {
            return Some(status.label());
        }
        if let Some(status) = self.status.filter(|status| status.as_u16() >= 400) {
            return Some(AttemptOutcome::new(OutcomeKind::Http(status)).label());
        }
        // The last attempt succeeded, so the reason is the outcome of the last failed one.
        let failed =
            self.attempts.iter().filter_map(|one| one.outcome).filter(|outcome| !is_good(outcome)).last();
        match self.verdict() {
            Verdict::Retried => Some(failed.map_or("retried", |outcome| outcome.label())),
            Verdict::Slow => Some("slow"),
            Verdict::Failed | Verdict::Plain => None,
        }
    }

    /// The same as a sentence; none for a plain success.
    pub fn explanation(&self) -> Option<String> {
        self.reason()?;
        let mut clauses = Vec::new();
        clauses.extend(self.describe_attempts());
        let lone =
            self.local_response.is_none() && self.fallback_cause().is_none() && self.attempts.count() <= 1;
        if lone && clauses.is_empty() && self.end == RequestEnd::Complete {
            clauses.push(self.describe_response());
        }
        // Inbound has no retries unless configured, so their absence needs no explanation.
        if let Some(stopped) =
            self.retry_stopped.filter(|word| *word != "not_retryable" || !self.is_inbound())
        {
            clauses.push(format!("no further attempt: {}", describe_stop(stopped)));
        }
        if let Some(refusal) = &self.local_response {
            let repeated = self.attempts.last().and_then(|one| one.error.as_ref()) == Some(&refusal.detail);
            if !repeated || self.attempts.count() == 1 {
                // The refusal describes the failure of a single attempt in more detail.
                clauses.retain(|_| !repeated);
                clauses.push(refusal.detail.clone());
            }
        }
        if let Some(failure) = self.fallback_cause() {
            let to_upstream = self.attempts.iter().any(|one| one.reason == AttemptKind::Fallback);
            let what = if to_upstream {
                "the request went to the fallback upstream"
            } else {
                "the configured response was sent"
            };
            clauses.push(format!("fallback ({failure}): {what}"));
        }
        if let Some(cause) = self.stale_cause() {
            clauses.push(format!("a stored response was sent, which is stale ({cause})"));
        }
        clauses.extend(self.describe_end());
        if self.local_response.is_none() && self.attempts.count() <= 1 && clauses.is_empty() {
            clauses.push(self.describe_response());
        }
        if let Some(took) = self.response_time().filter(|took| *took >= SLOW_AFTER) {
            clauses.push(format!("the response began after {took:.1?}"));
        }
        clauses.extend(self.describe_guards());
        Some(truncate(clauses.join("; ")))
    }

    /// `connect to 10.0.0.3:8080 refused twice, third attempt answered 200`.
    fn describe_attempts(&self) -> Option<String> {
        if self.attempts.count() < 2 {
            return self.attempts.last().filter(|one| one.error.is_some()).map(describe_attempt);
        }
        let recorded: Vec<&AttemptRecord> = self.attempts.iter().collect();
        let mut out = String::new();
        let mut at = 0;
        let mut before = None;
        while let Some(one) = recorded.get(at) {
            let words = describe_attempt(one);
            let same = recorded[at..].iter().take_while(|other| describe_attempt(other) == words).count();
            let last = at + same == recorded.len();
            if at > 0 {
                out.push_str(", ");
            }
            if same == 1 && at > 0 && (last || one.reason != AttemptKind::Retry) {
                let _ = write!(out, "{} {}", attempt_name(at + 1, one.reason), describe_outcome(one, before));
            } else {
                out.push_str(&words);
                out.push_str(&times(same));
            }
            before = Some(one.endpoint);
            at += same;
        }
        let unrecorded = self.attempts.count() as usize - recorded.len();
        if unrecorded > 0 {
            let _ = write!(out, ", {unrecorded} more attempts");
        }
        let waited: Duration = recorded.iter().map(|one| one.delay).sum();
        if !waited.is_zero() {
            let _ = write!(out, ", after {waited:.0?} of waiting in between");
        }
        Some(out)
    }

    fn describe_end(&self) -> Option<String> {
        let took = self.duration();
        match (self.end, self.status) {
            (RequestEnd::Complete, _) => None,
            (RequestEnd::ClientGone, None) => {
                Some(format!("the client closed its connection after {took:.1?}, before the response"))
            }
            (RequestEnd::ClientGone, Some(_)) => {
                Some("the client closed its connection before the end of the response".to_owned())
            }
            (RequestEnd::Broken, _) => Some(format!("the response broke off after {} bytes", self.bytes_out)),
            (RequestEnd::Cut, _) => Some(format!(
                "cut off after {took:.1?}: no byte moved for `idle_timeout`, or `max_duration` elapsed"
            )),
        }
    }

    fn describe_response(&self) -> String {
        let is_response = |one: &AttemptRecord| {
            one.outcome
                .is_none_or(|outcome| matches!(outcome.kind, OutcomeKind::Http(_) | OutcomeKind::Grpc(_)))
        };
        match (self.attempts.last(), self.status) {
            (Some(one), Some(status)) if is_response(one) => {
                let grpc = self.grpc_status.filter(|status| *status != GrpcStatus::Ok);
                let what =
                    grpc.map_or_else(|| status.as_u16().to_string(), |status| status.label().to_owned());
                match self.is_inbound() {
                    true => format!("the service answered {what}"),
                    false => format!("{} answered {what}", one.endpoint),
                }
            }
            (Some(one), _) => describe_attempt(one),
            (None, Some(status)) => format!("answered {}", status.as_u16()),
            (_, None) => "no response".to_owned(),
        }
    }

    /// The effect on the policy state: `breaker 7/20 failures`, an endpoint that was ejected.
    fn describe_guards(&self) -> Vec<String> {
        let mut clauses: Vec<String> = self
            .attempts
            .iter()
            .filter(|one| one.ejected_endpoint)
            .map(|one| format!("{} was ejected", one.endpoint))
            .collect();
        if self.retry_stopped == Some("breaker_open") {
            // The reason says it already.
        } else if let Some(state) = self.attempts.iter().filter_map(|one| one.breaker_change).last() {
            let state = match state {
                BreakerState::Closed => "closed",
                BreakerState::HalfOpen => "half opened",
                BreakerState::Open => "opened",
            };
            clauses.push(format!("the breaker {state}"));
        } else if let Some((failures, attempts)) = self.breaker_window.filter(|(failures, _)| *failures > 0) {
            clauses.push(format!("breaker {failures}/{attempts} failures"));
        }
        clauses
    }
}

/// Whether a gRPC status is the service's failure, as opposed to an error in the request.
fn is_failure(status: GrpcStatus) -> bool {
    AttemptOutcome::new(OutcomeKind::Grpc(status)).is_failure() || status == GrpcStatus::ResourceExhausted
}

fn is_good(outcome: &AttemptOutcome) -> bool {
    match outcome.kind {
        OutcomeKind::Http(status) => status.as_u16() < 400,
        OutcomeKind::Grpc(status) => status == GrpcStatus::Ok,
        _ => false,
    }
}

/// The outcome of an attempt, with the endpoint.
fn describe_attempt(one: &AttemptRecord) -> String {
    let at = one.endpoint;
    match one.outcome.map(|outcome| outcome.kind) {
        None => format!("the attempt at {at} was cancelled"),
        Some(OutcomeKind::Http(status)) => format!("{at} answered {}", status.as_u16()),
        Some(OutcomeKind::Grpc(status)) => format!("{at} answered {}", status.label()),
        Some(OutcomeKind::Connect(failure)) => match failure {
            ConnectFailure::Refused => format!("connect to {at} refused"),
            ConnectFailure::Timeout => format!("connect to {at} timed out"),
            ConnectFailure::Tls => format!("TLS with {at} failed"),
            ConnectFailure::PeerIdentity => format!("the identity of {at} is not the configured one"),
            ConnectFailure::LocalResource => {
                format!("no connection to {at}: no port, descriptor or route left on this side")
            }
            ConnectFailure::Handshake => format!("the HTTP/2 handshake with {at} failed"),
        },
        Some(OutcomeKind::RefusedStream) => format!("{at} refused the stream"),
        Some(OutcomeKind::Reset(reset)) if reset.is_stale() => {
            format!("{at} had just closed the pooled connection")
        }
        Some(OutcomeKind::Reset(_)) => format!("{at} broke the connection"),
        Some(OutcomeKind::AttemptTimeout) => format!("no response from {at} within attempt_timeout"),
        Some(OutcomeKind::ClientShare) => {
            format!("no response from {at} within half of what was left of the client's deadline")
        }
        Some(OutcomeKind::Timeout) => format!("no response from {at} within timeout"),
        Some(OutcomeKind::ClientDeadline) => format!("no response from {at} within the client's deadline"),
        Some(OutcomeKind::ClientGone) => format!("the client closed its connection before {at} responded"),
        Some(OutcomeKind::ClientError) => format!("the request to {at} was aborted: its body is malformed"),
        Some(OutcomeKind::LocalRefusal) => format!("a connection to {at} was not allowed"),
    }
}

/// The outcome, to follow the attempt's name. Names the endpoint unless it is that of the previous attempt.
fn describe_outcome(one: &AttemptRecord, before: Option<SocketAddr>) -> String {
    let answered = match one.outcome.map(|outcome| outcome.kind) {
        Some(OutcomeKind::Http(status)) => format!("answered {}", status.as_u16()),
        Some(OutcomeKind::Grpc(status)) => format!("answered {}", status.label()),
        _ => return format!("failed: {}", describe_attempt(one)),
    };
    if before == Some(one.endpoint) { answered } else { format!("at {} {answered}", one.endpoint) }
}

fn attempt_name(number: usize, why: AttemptKind) -> String {
    const NAMES: [&str; 6] = ["first", "second", "third", "fourth", "fifth", "sixth"];
    match why {
        AttemptKind::Hedge => "hedge".to_owned(),
        AttemptKind::Fallback => "the fallback".to_owned(),
        AttemptKind::Sibling => "the host's other address".to_owned(),
        AttemptKind::First | AttemptKind::Retry | AttemptKind::Reconnect | AttemptKind::NextEndpoint => {
            match NAMES.get(number - 1) {
                Some(name) => format!("{name} attempt"),
                None => format!("attempt {number}"),
            }
        }
    }
}

fn times(count: usize) -> String {
    match count {
        1 => String::new(),
        2 => " twice".to_owned(),
        count => format!(" {count} times"),
    }
}

/// Explains an `outcome` of `outrigger_retries_total`.
fn describe_stop(word: &str) -> &str {
    match word {
        "not_retryable" => "`retry.on` does not list this",
        "suppressed" => "the upstream's sidecar advised against it (x-outrigger-retry)",
        "committed" => "the response had started",
        "max_attempts" => "`retry.max` is used up",
        "method" => "the method is not retried (`retry.methods`)",
        "body_not_kept" => "the request's body is larger than `retry.body_limit`",
        "deadline" => "no time was left before the deadline",
        "retry_after" => "the upstream's Retry-After is longer than the time left",
        "pushback" => "the upstream forbade it (grpc-retry-pushback-ms)",
        "budget" => "the retry budget is spent",
        "breaker_open" => "the breaker opened",
        word => word,
    }
}

fn truncate(mut text: String) -> String {
    if text.len() > MAX_EXPLANATION {
        let end = (0..=MAX_EXPLANATION).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
pub(crate) mod tests;
