//! What is known of a call when it is over: small, of fixed size, written as the call goes its way.
//!
//! It lies beside the call's [`Progress`](crate::proxy::progress::Progress), so that whoever carries a part of the
//! call can note it, and a call that goes well allocates nothing for it. Spans, metrics, access log and `/requests`
//! are all made of it, in [`finished`](super::finished).

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{HeaderMap, Method, StatusCode, Version};
use tokio::time::Instant;

use super::{
    metrics::Way,
    propagation::{Context, Span},
    spans::Asked,
};
use crate::{
    identity::Peer,
    proxy::error::Cause,
    resilience::{
        breaker::State,
        classify::{GrpcStatus, Outcome},
        retry::AttemptKind,
    },
    runtime::Whom,
};

/// Tries of a call that are told one by one; further ones are only counted.
pub const MOST_TRIES: usize = 16;

/// A call, from its head to the last byte of its answer.
#[derive(Debug)]
pub struct Record {
    pub way: Way,
    /// The caller's end of its connection.
    pub peer: SocketAddr,
    /// The caller came by TLS.
    pub tls: bool,
    /// Whom its certificate proved it to be.
    pub identity: Option<Arc<Peer>>,
    pub method: Method,
    /// By which the caller came.
    pub version: Version,
    pub grpc: bool,
    /// Where it stands in its trace.
    pub context: Context,
    /// What was asked, where spans may be made of this.
    pub asked: Option<Asked>,
    /// Whose routes were looked at. None: the call never got that far.
    pub matched: Option<Arc<Whom>>,
    /// Index in `matched`'s routes.
    pub route: Option<usize>,
    /// Who was asked: the same, unless a route or a fallback leads to another upstream.
    pub served: Option<Arc<Whom>>,
    pub tries: Tries,
    /// Why no further try followed a failure.
    pub stopped: Option<&'static str>,
    /// Failures and tries in the breaker's window, as of the last try that failed.
    pub window: Option<(u32, u32)>,
    /// Where the proxy answered in place of the service: why.
    pub refused: Option<Refusal>,
    /// What failed, where the configured fallback was the answer.
    pub fell_back: Option<&'static str>,
    /// What the caller was told.
    pub status: Option<StatusCode>,
    /// The status of a gRPC call, from headers or trailers.
    pub grpc_status: Option<GrpcStatus>,
    pub started: Instant,
    /// When the answer's head went out.
    pub answered: Option<Instant>,
    /// When the answer's body was out, or the call was cut.
    pub ended: Option<Instant>,
    pub end: End,
    /// Of the request's body.
    pub bytes_in: u64,
    /// Of the answer's body.
    pub bytes_out: u64,
}

/// An answer of the proxy's own.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub cause: Cause,
    /// In plain words.
    pub detail: String,
}

/// How an exchange ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum End {
    /// The answer went out to its last byte.
    #[default]
    Complete,
    /// The caller left, or took no more, before it had all of it.
    CallerGone,
    /// The upstream broke off in the middle of its answer.
    Broken,
    /// Nothing moved for `idle_timeout`, or `max_duration` was over.
    Cut,
}

impl End {
    /// A stable word, for spans and logs.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::CallerGone => "caller_gone",
            Self::Broken => "broken",
            Self::Cut => "cut",
        }
    }
}

/// One try of a call.
#[derive(Clone, Debug)]
pub struct Try {
    pub why: AttemptKind,
    pub span: Span,
    pub endpoint: SocketAddr,
    /// By which it was sent.
    pub version: Version,
    /// Over TLS.
    pub tls: bool,
    pub began: Instant,
    /// For how long it was held back: the back-off, and the wait for an upstream that nobody could connect to.
    pub waited: Duration,
    /// There was a connection to carry it.
    pub carried: bool,
    /// When a new connection was there; none where one of the pool was used.
    pub connected: Option<Instant>,
    /// When its answer's head came, or it had failed. None: it was given up, as its caller left or another copy won.
    pub ended: Option<Instant>,
    pub outcome: Option<Outcome>,
    /// Why it has no answer, in plain words.
    pub error: Option<String>,
    /// It was the half-open breaker's trial.
    pub trial: bool,
    /// What the breaker changed to by its outcome.
    pub breaker: Option<State>,
    /// Its endpoint was ejected by its outcome.
    pub ejected: bool,
}

/// The tries of a call. The first needs no room of its own: most calls have no other.
#[derive(Debug, Default)]
pub struct Tries {
    first: Option<Try>,
    more: Vec<Try>,
    /// All that were made, told or not.
    made: u32,
}

impl Tries {
    /// Adds one; returns by which number to find it.
    pub fn push(&mut self, new: Try) -> usize {
        let number = self.made as usize;
        self.made = self.made.saturating_add(1);
        if self.first.is_none() {
            self.first = Some(new);
        } else if number < MOST_TRIES {
            self.more.push(new);
        }
        number
    }

    pub fn get_mut(&mut self, number: usize) -> Option<&mut Try> {
        match number.checked_sub(1) {
            None => self.first.as_mut(),
            Some(index) => self.more.get_mut(index),
        }
    }

    /// How many were made.
    pub const fn made(&self) -> u32 {
        self.made
    }

    pub fn iter(&self) -> impl Iterator<Item = &Try> {
        self.first.iter().chain(&self.more)
    }

    /// The last one that is told.
    pub fn last(&self) -> Option<&Try> {
        self.more.last().or(self.first.as_ref())
    }
}

impl Try {
    pub fn new(why: AttemptKind, span: Span, endpoint: SocketAddr, version: Version, began: Instant) -> Self {
        Self {
            why,
            span,
            endpoint,
            version,
            tls: false,
            began,
            waited: Duration::ZERO,
            carried: false,
            connected: None,
            ended: None,
            outcome: None,
            error: None,
            trial: false,
            breaker: None,
            ejected: false,
        }
    }
}

impl Record {
    pub fn new(
        way: Way,
        peer: SocketAddr,
        method: Method,
        version: Version,
        context: Context,
        started: Instant,
    ) -> Self {
        Self {
            way,
            peer,
            tls: false,
            identity: None,
            method,
            version,
            grpc: false,
            context,
            asked: None,
            matched: None,
            route: None,
            served: None,
            tries: Tries::default(),
            stopped: None,
            window: None,
            refused: None,
            fell_back: None,
            status: None,
            grpc_status: None,
            started,
            answered: None,
            ended: None,
            end: End::default(),
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    /// Whether others call this service, as opposed to its own calls.
    pub fn is_inbound(&self) -> bool {
        self.way == Way::Inbound
    }

    /// `inbound` or `outbound`.
    pub fn direction(&self) -> &'static str {
        if self.is_inbound() { "inbound" } else { "outbound" }
    }

    /// Who called: the name that its certificate proved, else its address.
    pub fn caller(&self) -> String {
        self.identity.as_ref().map_or_else(|| dotted(self.peer.ip()), |peer| peer.to_string())
    }

    /// What its route matches, as it is configured: `POST /v1/charge*`.
    pub fn route_name(&self) -> Option<String> {
        let routes = &self.matched.as_ref()?.cluster.settings.routes;
        Some(routes.get(self.route?)?.matches.to_string())
    }

    /// Reads what a gRPC call ended with.
    pub fn trailers(&mut self, trailers: &HeaderMap) {
        if self.grpc {
            self.grpc_status = GrpcStatus::from_headers(trailers).or(self.grpc_status);
        }
    }

    /// The name of the upstream that was asked.
    pub fn upstream(&self) -> Option<&str> {
        self.served.as_ref().map(|whom| whom.cluster.settings.name.as_str())
    }

    /// The address of the last try.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        self.tries.last().map(|one| one.endpoint)
    }

    /// Whether it failed or was retried: worth telling even where its trace was not sampled.
    pub fn is_notable(&self) -> bool {
        let failed = match self.grpc_status {
            Some(status) => status.is_failure(),
            None => self.status.is_some_and(|status| status.is_server_error()),
        };
        failed
            || self.tries.made() > 1
            || self.fell_back.is_some()
            || matches!(self.end, End::Broken | End::Cut)
    }

    /// How many spans it makes.
    pub fn spans(&self) -> u64 {
        if self.is_inbound() { 1 } else { 1 + self.tries.iter().count() as u64 }
    }

    /// From its head to the last byte of its answer.
    pub fn took(&self) -> Duration {
        self.ended.map_or(Duration::ZERO, |ended| ended.saturating_duration_since(self.started))
    }
}

/// An address in words, as `Display` has it, in a fifth of the time.
pub(super) fn dotted(ip: IpAddr) -> String {
    let IpAddr::V4(ip) = ip else { return ip.to_string() };
    let mut text = String::with_capacity("255.255.255.255:65535".len());
    for (place, octet) in ip.octets().into_iter().enumerate() {
        if place > 0 {
            text.push('.');
        }
        push(&mut text, octet.into());
    }
    text
}

/// The same with its port.
pub(super) fn dotted_with_port(address: SocketAddr) -> String {
    if address.is_ipv6() {
        return address.to_string();
    }
    let mut text = dotted(address.ip());
    text.push(':');
    push(&mut text, address.port());
    text
}

fn push(text: &mut String, number: u16) {
    if number > 9 {
        push(text, number / 10);
    }
    text.push(char::from(b'0' + (number % 10) as u8));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every call in flight holds one.
    #[test]
    fn a_record_is_small() {
        assert!(size_of::<Record>() <= 700, "{} bytes", size_of::<Record>());
    }

    #[test]
    fn addresses_are_written_as_everywhere() {
        for address in [
            "127.0.0.1:0",
            "10.200.0.99:65535",
            "255.255.255.255:80",
            "[2001:db8::1]:443",
            "[::ffff:1.2.3.4]:9",
        ] {
            let address: SocketAddr = address.parse().unwrap();
            assert_eq!(dotted_with_port(address), address.to_string());
            assert_eq!(dotted(address.ip()), address.ip().to_string());
        }
    }

    #[test]
    fn tries_are_told_up_to_a_bound_and_counted_beyond() {
        let mut tries = Tries::default();
        assert!(tries.last().is_none() && tries.get_mut(0).is_none());
        let (began, span) = (Instant::now(), Span::new(1).unwrap());
        for port in 0..100 {
            let endpoint = SocketAddr::from(([127, 0, 0, 1], port));
            let number = tries.push(Try::new(AttemptKind::Retry, span, endpoint, Version::HTTP_11, began));
            assert_eq!(number, usize::from(port));
            assert_eq!(tries.get_mut(number).map(|one| one.endpoint.port()), (port < 16).then_some(port));
        }
        assert_eq!((tries.made(), tries.iter().count()), (100, MOST_TRIES));
        assert_eq!(tries.last().map(|one| one.endpoint.port()), Some(15));
    }
}
