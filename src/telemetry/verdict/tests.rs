use http::{Method, StatusCode, Version};
use tokio::time::Instant;

use super::*;
use crate::{
    proxy::error::Cause,
    resilience::classify::{Advice, Reset},
    rng::Rng,
    telemetry::{
        metrics::Way,
        propagation::{Context, Said},
        record::Refusal,
    },
};

const A: &str = "10.0.0.3:8080";
const B: &str = "10.0.0.4:8080";
const REFUSED: Ending = Ending::Connect(ConnectFailure::Refused);
const LOST: Ending = Ending::Reset(Reset { reused: false, request_sent: true, response_begun: false });

pub fn record(status: u16) -> Record {
    let context = Context::new(&Said::default(), &mut Rng::from_seed(1), |_| false);
    let peer = "127.0.0.1:40000".parse().unwrap();
    let now = Instant::now();
    let record = Record::new(Way::Host, peer, Method::GET, Version::HTTP_11, context, now);
    let status = StatusCode::from_u16(status).ok();
    Record { status, answered: status.map(|_| now), ended: Some(now), ..record }
}

fn http(status: u16) -> Ending {
    Ending::Http(StatusCode::from_u16(status).unwrap())
}

fn with(mut record: Record, tries: &[(&str, Ending)]) -> Record {
    for (number, (endpoint, ending)) in tries.iter().enumerate() {
        let why = if number == 0 { AttemptKind::First } else { AttemptKind::Retry };
        let mut one =
            Try::new(why, record.context.span, endpoint.parse().unwrap(), Version::HTTP_11, record.started);
        one.outcome = Some(Outcome { ending: *ending, advice: Advice::None });
        record.tries.push(one);
    }
    record
}

fn refuse(mut record: Record, cause: Cause, detail: &str) -> Record {
    record.refused = Some(Refusal { cause, detail: detail.to_owned() });
    record
}

#[track_caller]
fn check(record: &Record, kind: Kind, reason: &str, why: &str) {
    assert_eq!((record.kind(), record.reason(), record.why().as_deref()), (kind, Some(reason), Some(why)));
}

#[test]
fn a_plain_success_needs_no_words() {
    let plain = with(record(200), &[(A, http(200))]);
    assert_eq!((plain.kind(), plain.reason(), plain.why()), (Kind::Plain, None, None));
}

#[test]
fn tries_are_told_as_a_person_would() {
    let mended = with(record(200), &[(A, REFUSED), (A, REFUSED), (B, http(200))]);
    let why = "connect to 10.0.0.3:8080 refused twice, third try at 10.0.0.4:8080 answered 200";
    check(&mended, Kind::Retried, "connect_refused", why);

    let mut mended = with(record(200), &[(A, http(503)), (A, http(200))]);
    mended.tries.get_mut(1).unwrap().waited = Duration::from_millis(40);
    let why = "10.0.0.3:8080 answered 503, second try answered 200, after 40ms of waiting in between";
    check(&mended, Kind::Retried, "503", why);

    let mut spent = with(record(503), &[(A, LOST), (B, http(503))]);
    spent.stopped = Some("budget");
    spent.window = Some((7, 20));
    spent.tries.get_mut(1).unwrap().ejected = true;
    let why = "10.0.0.3:8080 broke the connection, second try at 10.0.0.4:8080 answered 503; \
               no further try: the retry budget is spent; 10.0.0.4:8080 was ejected for it; breaker 7/20 failures";
    check(&spent, Kind::Failed, "503", why);

    let mut hedged = with(record(200), &[(A, http(200)), (B, http(200))]);
    hedged.tries.get_mut(0).unwrap().outcome = None;
    hedged.tries.get_mut(1).unwrap().why = AttemptKind::Hedge;
    let why = "10.0.0.3:8080 was given up, hedge at 10.0.0.4:8080 answered 200";
    check(&hedged, Kind::Retried, "retried", why);

    let many = with(record(504), &[(A, Ending::AttemptTimeout); 40]);
    let why = "no answer from 10.0.0.3:8080 within attempt_timeout 16 times, 24 more tries";
    check(&many, Kind::Failed, "504", why);
}

#[test]
fn a_refusal_says_its_detail_once() {
    let open =
        refuse(record(503), Cause::BreakerOpen, "up: its circuit breaker is open (10 failures in a row)");
    check(&open, Kind::Failed, "breaker_open", "up: its circuit breaker is open (10 failures in a row)");

    let mut refused =
        refuse(with(record(502), &[(A, REFUSED)]), Cause::ConnectRefused, "up: 10.0.0.3 refused");
    refused.tries.get_mut(0).unwrap().error = Some("up: 10.0.0.3 refused".to_owned());
    check(&refused, Kind::Failed, "connect_refused", "up: 10.0.0.3 refused");

    let mut twice =
        refuse(with(record(502), &[(A, REFUSED), (B, REFUSED)]), Cause::ConnectRefused, "the same");
    twice.tries.get_mut(1).unwrap().error = Some("the same".to_owned());
    twice.stopped = Some("max_tries");
    let why = "connect to 10.0.0.3:8080 refused, second try failed: connect to 10.0.0.4:8080 refused; \
               no further try: `retry.max` is used up";
    check(&twice, Kind::Failed, "connect_refused", why);
}

/// The service's own failure is told as what it is, not as a retry that nobody expects.
#[test]
fn what_the_service_answered_comes_first() {
    let inbound = |mut record: Record| {
        record.way = Way::Inbound;
        record.stopped = Some("not_retryable");
        record
    };
    let failed = inbound(with(record(502), &[(A, http(502))]));
    check(&failed, Kind::Failed, "502", "the service answered 502");
    let mut grpc = inbound(with(record(200), &[(A, Ending::Grpc(GrpcStatus::Unavailable))]));
    grpc.grpc_status = Some(GrpcStatus::Unavailable);
    check(&grpc, Kind::Failed, "grpc_unavailable", "the service answered grpc_unavailable");

    let mut outbound = with(record(500), &[(A, http(500))]);
    outbound.stopped = Some("not_retryable");
    let why = "10.0.0.3:8080 answered 500; no further try: `retry.on` does not name this";
    check(&outbound, Kind::Failed, "5xx", why);
}

#[test]
fn ends_and_statuses_have_their_words() {
    check(&with(record(500), &[(A, http(500))]), Kind::Failed, "5xx", "10.0.0.3:8080 answered 500");
    check(&with(record(404), &[(A, http(404))]), Kind::Plain, "4xx", "10.0.0.3:8080 answered 404");

    let mut grpc = with(record(200), &[(A, http(200))]);
    grpc.grpc_status = Some(GrpcStatus::Unavailable);
    check(&grpc, Kind::Failed, "grpc_unavailable", "10.0.0.3:8080 answered grpc_unavailable");

    let gone = Record { end: End::CallerGone, ..record(0) };
    let why = "the caller left after 0.0ns, before there was an answer";
    check(&gone, Kind::Failed, "caller_gone", why);
    let broken = Record { end: End::Broken, bytes_out: 512, ..record(200) };
    check(&broken, Kind::Failed, "broken", "the answer broke off after 512 bytes");
    // A stream that its caller has seen enough of is no failure.
    let left = Record { end: End::CallerGone, ..record(200) };
    check(&left, Kind::Plain, "caller_gone", "the caller left before it had all of the answer");

    let mut slow = with(record(200), &[(A, http(200))]);
    slow.answered = Some(slow.started + Duration::from_millis(2300));
    check(&slow, Kind::Slow, "slow", "10.0.0.3:8080 answered 200; the answer began after 2.3s");
}

#[test]
fn a_fallback_is_told() {
    let given = Record { fell_back: Some("breaker_open"), ..record(200) };
    let why = "fell back (breaker_open): the configured answer was given";
    check(&given, Kind::Failed, "breaker_open", why);
}

#[test]
fn no_sentence_is_endless() {
    let endless = refuse(record(502), Cause::Reset, &"é".repeat(5000));
    assert!(endless.why().is_some_and(|why| why.len() <= MOST_WORDS + '…'.len_utf8()));
}
