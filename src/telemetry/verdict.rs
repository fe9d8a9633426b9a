//! What a call was worth telling of, and why: one word for machines, a sentence for people.
//!
//! Read off the record when the call is over, by whoever tells; nothing here runs for a call that went well.

use std::{fmt::Write, net::SocketAddr, time::Duration};

use super::record::{End, Record, Try};
use crate::resilience::{
    breaker::State,
    classify::{ConnectFailure, Ending, GrpcStatus, Outcome},
    retry::AttemptKind,
};

/// An answer whose head takes as long is worth a look.
pub const SLOW: Duration = Duration::from_secs(1);

/// No sentence is longer, in bytes.
const MOST_WORDS: usize = 1000;

/// What a call is remembered as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing to tell.
    Plain,
    /// The caller did not get what it asked for from the service, or only a fallback.
    Failed,
    /// It took more than one try.
    Retried,
    /// Its answer began after [`SLOW`].
    Slow,
}

impl Kind {
    pub const fn word(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Failed => "failed",
            Self::Retried => "retried",
            Self::Slow => "slow",
        }
    }
}

impl Record {
    pub fn kind(&self) -> Kind {
        let gone = self.end == End::CallerGone && self.status.is_none();
        let broken = matches!(self.end, End::Broken | End::Cut);
        let status = self.status.is_some_and(|status| status.is_server_error());
        let grpc = self.grpc_status.is_some_and(is_failure);
        if gone || broken || status || grpc || self.refused.is_some() || self.fell_back.is_some() {
            Kind::Failed
        } else if self.tries.made() > 1 {
            Kind::Retried
        } else if self.head_took().is_some_and(|took| took >= SLOW) {
            Kind::Slow
        } else {
            Kind::Plain
        }
    }

    /// From the call's beginning to its answer's.
    fn head_took(&self) -> Option<Duration> {
        self.answered.map(|at| at.saturating_duration_since(self.started))
    }

    /// In one stable word what kept the call from being a plain success: a cause of `docs/errors.md`, how it ended,
    /// or the outcome of a try.
    pub fn reason(&self) -> Option<&'static str> {
        if let Some(refusal) = &self.refused {
            return Some(refusal.cause.word());
        }
        if let Some(failure) = self.fell_back {
            return Some(failure);
        }
        if self.end != End::Complete {
            return Some(self.end.word());
        }
        if let Some(status) = self.grpc_status.filter(|status| *status != GrpcStatus::Ok) {
            return Some(status.label());
        }
        if let Some(status) = self.status.filter(|status| status.as_u16() >= 400) {
            return Some(Outcome::new(Ending::Http(status)).label());
        }
        // The last try answered well, so what is to be told is what the one before came to.
        let failed =
            self.tries.iter().filter_map(|one| one.outcome).filter(|outcome| !is_good(outcome)).last();
        match self.kind() {
            Kind::Retried => Some(failed.map_or("retried", |outcome| outcome.label())),
            Kind::Slow => Some("slow"),
            Kind::Failed | Kind::Plain => None,
        }
    }

    /// The same in plain words; none for a plain success.
    pub fn why(&self) -> Option<String> {
        self.reason()?;
        let mut clauses = Vec::new();
        clauses.extend(self.tries_in_words());
        let lone = self.refused.is_none() && self.fell_back.is_none() && self.tries.made() <= 1;
        if lone && clauses.is_empty() && self.end == End::Complete {
            clauses.push(self.answer_in_words());
        }
        // Nobody expects a retry where a request is handed to its service.
        if let Some(stopped) = self.stopped.filter(|word| *word != "not_retryable" || !self.is_inbound()) {
            clauses.push(format!("no further try: {}", stop_in_words(stopped)));
        }
        if let Some(refusal) = &self.refused {
            let told = self.tries.last().and_then(|one| one.error.as_ref()) == Some(&refusal.detail);
            if !told || self.tries.made() == 1 {
                // What a lone try came to is said by whoever refused, in more words.
                clauses.retain(|_| !told);
                clauses.push(refusal.detail.clone());
            }
        }
        if let Some(failure) = self.fell_back {
            let asked = self.tries.iter().any(|one| one.why == AttemptKind::Fallback);
            let what = if asked {
                "another upstream was asked in its place"
            } else {
                "the configured answer was given"
            };
            clauses.push(format!("fell back ({failure}): {what}"));
        }
        clauses.extend(self.end_in_words());
        if self.refused.is_none() && self.tries.made() <= 1 && clauses.is_empty() {
            clauses.push(self.answer_in_words());
        }
        if let Some(took) = self.head_took().filter(|took| *took >= SLOW) {
            clauses.push(format!("the answer began after {took:.1?}"));
        }
        clauses.extend(self.guards_in_words());
        Some(shortened(clauses.join("; ")))
    }

    /// `connect to 10.0.0.3:8080 refused twice, third try answered 200`.
    fn tries_in_words(&self) -> Option<String> {
        if self.tries.made() < 2 {
            return self.tries.last().filter(|one| one.error.is_some()).map(in_words);
        }
        let told: Vec<&Try> = self.tries.iter().collect();
        let mut out = String::new();
        let mut at = 0;
        let mut before = None;
        while let Some(one) = told.get(at) {
            let words = in_words(one);
            let same = told[at..].iter().take_while(|other| in_words(other) == words).count();
            let last = at + same == told.len();
            if at > 0 {
                out.push_str(", ");
            }
            if same == 1 && at > 0 && (last || one.why != AttemptKind::Retry) {
                let _ = write!(out, "{} {}", name_of(at + 1, one.why), ending_in_words(one, before));
            } else {
                out.push_str(&words);
                out.push_str(&times(same));
            }
            before = Some(one.endpoint);
            at += same;
        }
        let untold = self.tries.made() as usize - told.len();
        if untold > 0 {
            let _ = write!(out, ", {untold} more tries");
        }
        let waited: Duration = told.iter().map(|one| one.waited).sum();
        if !waited.is_zero() {
            let _ = write!(out, ", after {waited:.0?} of waiting in between");
        }
        Some(out)
    }

    fn end_in_words(&self) -> Option<String> {
        let took = self.took();
        match (self.end, self.status) {
            (End::Complete, _) => None,
            (End::CallerGone, None) => {
                Some(format!("the caller left after {took:.1?}, before there was an answer"))
            }
            (End::CallerGone, Some(_)) => Some("the caller left before it had all of the answer".to_owned()),
            (End::Broken, _) => Some(format!("the answer broke off after {} bytes", self.bytes_out)),
            (End::Cut, _) => Some(format!(
                "cut after {took:.1?}: nothing moved for `idle_timeout`, or `max_duration` was over"
            )),
        }
    }

    fn answer_in_words(&self) -> String {
        let is_response = |one: &Try| {
            one.outcome.is_none_or(|outcome| matches!(outcome.ending, Ending::Http(_) | Ending::Grpc(_)))
        };
        match (self.tries.last(), self.status) {
            (Some(one), Some(status)) if is_response(one) => {
                let grpc = self.grpc_status.filter(|status| *status != GrpcStatus::Ok);
                let what =
                    grpc.map_or_else(|| status.as_u16().to_string(), |status| status.label().to_owned());
                match self.is_inbound() {
                    true => format!("the service answered {what}"),
                    false => format!("{} answered {what}", one.endpoint),
                }
            }
            (Some(one), _) => in_words(one),
            (None, Some(status)) => format!("answered {}", status.as_u16()),
            (_, None) => "there was no answer".to_owned(),
        }
    }

    /// What the guards made of it: `breaker 7/20 failures`, an endpoint that was ejected.
    fn guards_in_words(&self) -> Vec<String> {
        let mut clauses: Vec<String> = self
            .tries
            .iter()
            .filter(|one| one.ejected)
            .map(|one| format!("{} was ejected for it", one.endpoint))
            .collect();
        if self.stopped == Some("breaker_open") {
            // Said already.
        } else if let Some(state) = self.tries.iter().filter_map(|one| one.breaker).last() {
            let state = match state {
                State::Closed => "closed",
                State::HalfOpen => "half opened",
                State::Open => "opened",
            };
            clauses.push(format!("the breaker {state}"));
        } else if let Some((failures, tries)) = self.window.filter(|(failures, _)| *failures > 0) {
            clauses.push(format!("breaker {failures}/{tries} failures"));
        }
        clauses
    }
}

/// The service's failures, as opposed to what was wrong with the request.
fn is_failure(status: GrpcStatus) -> bool {
    Outcome::new(Ending::Grpc(status)).is_failure() || status == GrpcStatus::ResourceExhausted
}

fn is_good(outcome: &Outcome) -> bool {
    match outcome.ending {
        Ending::Http(status) => status.as_u16() < 400,
        Ending::Grpc(status) => status == GrpcStatus::Ok,
        _ => false,
    }
}

/// What came of a try, with the endpoint.
fn in_words(one: &Try) -> String {
    let at = one.endpoint;
    match one.outcome.map(|outcome| outcome.ending) {
        None => format!("{at} was given up"),
        Some(Ending::Http(status)) => format!("{at} answered {}", status.as_u16()),
        Some(Ending::Grpc(status)) => format!("{at} answered {}", status.label()),
        Some(Ending::Connect(failure)) => match failure {
            ConnectFailure::Refused => format!("connect to {at} refused"),
            ConnectFailure::Timeout => format!("connect to {at} timed out"),
            ConnectFailure::Tls => format!("TLS with {at} failed"),
            ConnectFailure::PeerIdentity => format!("{at} is not who it should be"),
            ConnectFailure::LocalResource => {
                format!("no connection to {at}: no port, descriptor or route left on this side")
            }
            ConnectFailure::Handshake => format!("the HTTP/2 handshake with {at} failed"),
        },
        Some(Ending::RefusedStream) => format!("{at} refused the stream"),
        Some(Ending::Reset(reset)) if reset.is_stale() => {
            format!("{at} had just closed the pooled connection")
        }
        Some(Ending::Reset(_)) => format!("{at} broke the connection"),
        Some(Ending::AttemptTimeout) => format!("no answer from {at} within attempt_timeout"),
        Some(Ending::ClientShare) => {
            format!("no answer from {at} within half of what was left of the client's deadline")
        }
        Some(Ending::Timeout) => format!("no answer from {at} within timeout"),
        Some(Ending::CallersDeadline) => format!("no answer from {at} within the caller's deadline"),
        Some(Ending::CallerGone) => format!("the caller left while {at} was asked"),
        Some(Ending::ClientError) => format!("the request to {at} was broken off: its body is malformed"),
        Some(Ending::LocalRefusal) => format!("a connection to {at} was not allowed"),
    }
}

/// The same behind the name of the try, which has the endpoint unless it is that of the one before.
fn ending_in_words(one: &Try, before: Option<SocketAddr>) -> String {
    let answered = match one.outcome.map(|outcome| outcome.ending) {
        Some(Ending::Http(status)) => format!("answered {}", status.as_u16()),
        Some(Ending::Grpc(status)) => format!("answered {}", status.label()),
        _ => return format!("failed: {}", in_words(one)),
    };
    if before == Some(one.endpoint) { answered } else { format!("at {} {answered}", one.endpoint) }
}

fn name_of(number: usize, why: AttemptKind) -> String {
    const NAMES: [&str; 6] = ["first", "second", "third", "fourth", "fifth", "sixth"];
    match why {
        AttemptKind::Hedge => "hedge".to_owned(),
        AttemptKind::Fallback => "the fallback".to_owned(),
        AttemptKind::Sibling => "the host's other address".to_owned(),
        AttemptKind::First | AttemptKind::Retry | AttemptKind::Reconnect | AttemptKind::NextEndpoint => {
            match NAMES.get(number - 1) {
                Some(name) => format!("{name} try"),
                None => format!("try {number}"),
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

/// The words of `outrigger_retries_total`'s `outcome`.
fn stop_in_words(word: &str) -> &str {
    match word {
        "not_retryable" => "`retry.on` does not name this",
        "suppressed" => "the upstream's sidecar said that none helps",
        "committed" => "the answer had begun",
        "max_tries" => "`retry.max` is used up",
        "method" => "the method may not be repeated",
        "body_gone" => "the request's body is larger than `retry.body_limit`",
        "deadline" => "no time was left",
        "retry_after" => "the upstream asked for a longer wait than there was time",
        "pushback" => "the upstream forbade it (grpc-retry-pushback-ms)",
        "budget" => "the retry budget is spent",
        "breaker_open" => "the breaker opened",
        word => word,
    }
}

fn shortened(mut text: String) -> String {
    if text.len() > MOST_WORDS {
        let end = (0..=MOST_WORDS).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
pub(super) mod tests;
