use http::{Method, StatusCode, Version};
use tokio::time::Instant;

use super::*;
use crate::{
    cause::Cause,
    resilience::classify::{Reset, RetryAdvice},
    rng::Rng,
    telemetry::{
        metrics::EntryPoint,
        record::{LocalResponse, RequestStart},
    },
    trace_context::{IncomingContext, TraceContext},
};

const A: &str = "10.0.0.3:8080";
const B: &str = "10.0.0.4:8080";
const REFUSED: OutcomeKind = OutcomeKind::Connect(ConnectFailure::Refused);
const LOST: OutcomeKind =
    OutcomeKind::Reset(Reset { reused: false, request_sent: true, response_started: false });

pub fn record(status: u16) -> RequestRecord {
    let context = TraceContext::new(&IncomingContext::default(), &mut Rng::from_seed(1), |_| false);
    let peer = "127.0.0.1:40000".parse().unwrap();
    let now = Instant::now();
    let record = RequestRecord::new(RequestStart {
        entry_point: EntryPoint::Host,
        peer,
        method: Method::GET,
        version: Version::HTTP_11,
        context,
        started_at: now,
    });
    let status = StatusCode::from_u16(status).ok();
    RequestRecord { status, response_head_at: status.map(|_| now), ended_at: Some(now), ..record }
}

fn http(status: u16) -> OutcomeKind {
    OutcomeKind::Http(StatusCode::from_u16(status).unwrap())
}

fn with(mut record: RequestRecord, attempts: &[(&str, OutcomeKind)]) -> RequestRecord {
    for (number, (endpoint, ending)) in attempts.iter().enumerate() {
        let why = if number == 0 { AttemptKind::First } else { AttemptKind::Retry };
        let mut one = AttemptRecord::new(
            why,
            record.context.span,
            endpoint.parse().unwrap(),
            Version::HTTP_11,
            record.started_at,
        );
        one.outcome = Some(AttemptOutcome { kind: *ending, advice: RetryAdvice::None });
        record.attempts.push(one);
    }
    record
}

fn refuse(mut record: RequestRecord, cause: Cause, detail: &str) -> RequestRecord {
    record.local_response = Some(LocalResponse { cause, detail: detail.to_owned() });
    record
}

#[track_caller]
fn check(record: &RequestRecord, kind: Verdict, reason: &str, why: &str) {
    assert_eq!(
        (record.verdict(), record.reason().as_deref(), record.explanation().as_deref()),
        (kind, Some(reason), Some(why))
    );
}

#[test]
fn a_plain_success_needs_no_explanation() {
    let plain = with(record(200), &[(A, http(200))]);
    assert_eq!(
        (plain.verdict(), plain.reason().as_deref(), plain.explanation()),
        (Verdict::Plain, None, None)
    );
}

#[test]
fn attempts_are_described_in_a_sentence() {
    let recovered = with(record(200), &[(A, REFUSED), (A, REFUSED), (B, http(200))]);
    let why = "connect to 10.0.0.3:8080 refused twice, third attempt at 10.0.0.4:8080 answered 200";
    check(&recovered, Verdict::Retried, "connect_refused", why);

    let mut recovered = with(record(200), &[(A, http(503)), (A, http(200))]);
    recovered.attempts.get_mut(1).unwrap().delay = Duration::from_millis(40);
    let why = "10.0.0.3:8080 answered 503, second attempt answered 200, after 40ms of waiting in between";
    check(&recovered, Verdict::Retried, "503", why);

    let mut spent = with(record(503), &[(A, LOST), (B, http(503))]);
    spent.retry_stopped = Some("budget");
    spent.breaker_window = Some((7, 20));
    spent.attempts.get_mut(1).unwrap().ejected_endpoint = true;
    let why = "10.0.0.3:8080 broke the connection, second attempt at 10.0.0.4:8080 answered 503; \
               no further attempt: the retry budget is spent; 10.0.0.4:8080 was ejected; breaker 7/20 failures";
    check(&spent, Verdict::Failed, "503", why);

    let mut hedged = with(record(200), &[(A, http(200)), (B, http(200))]);
    hedged.attempts.get_mut(0).unwrap().outcome = None;
    hedged.attempts.get_mut(1).unwrap().reason = AttemptKind::Hedge;
    let why = "the attempt at 10.0.0.3:8080 was cancelled, hedge at 10.0.0.4:8080 answered 200";
    check(&hedged, Verdict::Retried, "retried", why);

    let many = with(record(504), &[(A, OutcomeKind::AttemptTimeout); 40]);
    let why = "no response from 10.0.0.3:8080 within attempt_timeout 16 times, 24 more attempts";
    check(&many, Verdict::Failed, "504", why);
}

#[test]
fn a_refusal_says_its_detail_once() {
    let open =
        refuse(record(503), Cause::BreakerOpen, "up: its circuit breaker is open (10 failures in a row)");
    check(&open, Verdict::Failed, "breaker_open", "up: its circuit breaker is open (10 failures in a row)");

    let mut refused =
        refuse(with(record(502), &[(A, REFUSED)]), Cause::ConnectRefused, "up: 10.0.0.3 refused");
    refused.attempts.get_mut(0).unwrap().error = Some("up: 10.0.0.3 refused".to_owned());
    check(&refused, Verdict::Failed, "connect_refused", "up: 10.0.0.3 refused");

    let mut twice =
        refuse(with(record(502), &[(A, REFUSED), (B, REFUSED)]), Cause::ConnectRefused, "the same");
    twice.attempts.get_mut(1).unwrap().error = Some("the same".to_owned());
    twice.retry_stopped = Some("max_attempts");
    let why = "connect to 10.0.0.3:8080 refused, second attempt failed: connect to 10.0.0.4:8080 refused; \
               no further attempt: `retry.max` is used up";
    check(&twice, Verdict::Failed, "connect_refused", why);
}

/// The explanation of a failing service's response does not mention a retry that inbound does not do.
#[test]
fn the_response_of_the_service_comes_first() {
    let inbound = |mut record: RequestRecord| {
        record.entry_point = EntryPoint::Inbound;
        record.retry_stopped = Some("not_retryable");
        record
    };
    let failed = inbound(with(record(502), &[(A, http(502))]));
    check(&failed, Verdict::Failed, "502", "the service answered 502");
    let mut grpc = inbound(with(record(200), &[(A, OutcomeKind::Grpc(GrpcStatus::Unavailable))]));
    grpc.grpc_status = Some(GrpcStatus::Unavailable);
    check(&grpc, Verdict::Failed, "grpc_unavailable", "the service answered grpc_unavailable");

    let mut outbound = with(record(500), &[(A, http(500))]);
    outbound.retry_stopped = Some("not_retryable");
    let why = "10.0.0.3:8080 answered 500; no further attempt: `retry.on` does not list this";
    check(&outbound, Verdict::Failed, "5xx", why);
}

#[test]
fn ends_and_statuses_are_explained() {
    check(&with(record(500), &[(A, http(500))]), Verdict::Failed, "5xx", "10.0.0.3:8080 answered 500");
    check(&with(record(404), &[(A, http(404))]), Verdict::Plain, "4xx", "10.0.0.3:8080 answered 404");

    let mut grpc = with(record(200), &[(A, http(200))]);
    grpc.grpc_status = Some(GrpcStatus::Unavailable);
    check(&grpc, Verdict::Failed, "grpc_unavailable", "10.0.0.3:8080 answered grpc_unavailable");

    let gone = RequestRecord { end: RequestEnd::ClientGone, ..record(0) };
    let why = "the client closed its connection after 0.0ns, before the response";
    check(&gone, Verdict::Failed, "caller_gone", why);
    let broken = RequestRecord { end: RequestEnd::Broken, bytes_out: 512, ..record(200) };
    check(&broken, Verdict::Failed, "broken", "the response broke off after 512 bytes");
    // A stream that the client closes is not a failure.
    let left = RequestRecord { end: RequestEnd::ClientGone, ..record(200) };
    check(
        &left,
        Verdict::Plain,
        "caller_gone",
        "the client closed its connection before the end of the response",
    );

    let mut slow = with(record(200), &[(A, http(200))]);
    slow.response_head_at = Some(slow.started_at + Duration::from_millis(2300));
    check(&slow, Verdict::Slow, "slow", "10.0.0.3:8080 answered 200; the response began after 2.3s");
}

#[test]
fn a_fallback_is_reported() {
    let given = RequestRecord { replaced_cause: Some("breaker_open"), ..record(200) };
    let why = "fallback (breaker_open): the configured response was sent";
    check(&given, Verdict::Failed, "breaker_open", why);
}

#[test]
fn the_explanation_is_bounded() {
    let long = refuse(record(502), Cause::Reset, &"é".repeat(5000));
    assert!(long.explanation().is_some_and(|why| why.len() <= MAX_EXPLANATION + '…'.len_utf8()));
}
