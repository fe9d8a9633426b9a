use http::HeaderValue;

use super::*;

const LOST: Reset = Reset { reused: false, request_sent: true, response_started: false };

/// One of each kind, with all variations that matter.
pub fn every_outcome_kind() -> Vec<OutcomeKind> {
    let mut all: Vec<OutcomeKind> =
        [200, 204, 301, 400, 404, 408, 409, 425, 429, 500, 501, 502, 503, 504, 505, 599]
            .iter()
            .filter_map(|code| StatusCode::from_u16(*code).ok())
            .map(OutcomeKind::Http)
            .collect();
    all.extend((0..=16).map(|code| OutcomeKind::Grpc(GrpcStatus::from_code(code))));
    use ConnectFailure::{Handshake, LocalResource, PeerIdentity, Refused, Timeout, Tls};
    all.extend([Refused, Timeout, Tls, PeerIdentity, Handshake, LocalResource].map(OutcomeKind::Connect));
    for bits in 0..8 {
        let reset =
            Reset { reused: bits & 1 > 0, request_sent: bits & 2 > 0, response_started: bits & 4 > 0 };
        all.push(OutcomeKind::Reset(reset));
    }
    all.extend([
        OutcomeKind::RefusedStream,
        OutcomeKind::AttemptTimeout,
        OutcomeKind::ClientShare,
        OutcomeKind::Timeout,
        OutcomeKind::ClientDeadline,
        OutcomeKind::ClientGone,
        OutcomeKind::LocalRefusal,
    ]);
    all
}

fn http(code: u16) -> AttemptOutcome {
    AttemptOutcome::new(OutcomeKind::Http(StatusCode::from_u16(code).unwrap()))
}

fn grpc(status: GrpcStatus) -> AttemptOutcome {
    AttemptOutcome::grpc(status, RetryAdvice::None, None)
}

#[test]
fn only_server_failures_count() {
    for code in [500, 502, 503, 504, 507, 599] {
        assert_eq!(http(code).health(), Health::Failure, "{code}");
    }
    for code in [200, 204, 301, 400, 401, 404, 408, 409, 499, 501, 505] {
        assert_eq!(http(code).health(), Health::Success, "{code}");
    }
    assert_eq!(http(429).health(), Health::Neutral);
    for ending in [
        OutcomeKind::LocalRefusal,
        OutcomeKind::ClientGone,
        OutcomeKind::ClientDeadline,
        OutcomeKind::RefusedStream,
        OutcomeKind::ClientShare,
        OutcomeKind::Connect(ConnectFailure::LocalResource),
    ] {
        assert_eq!(AttemptOutcome::new(ending).health(), Health::Neutral, "{ending:?}");
    }
    for ending in [
        OutcomeKind::Connect(ConnectFailure::Refused),
        OutcomeKind::Reset(LOST),
        OutcomeKind::AttemptTimeout,
        OutcomeKind::Timeout,
    ] {
        assert_eq!(AttemptOutcome::new(ending).health(), Health::Failure, "{ending:?}");
    }
    use GrpcStatus as G;
    for status in [G::Unknown, G::DeadlineExceeded, G::Internal, G::Unavailable, G::DataLoss] {
        assert_eq!(grpc(status).health(), Health::Failure, "{status:?}");
    }
    for status in [G::Ok, G::NotFound, G::PermissionDenied, G::Unimplemented, G::Aborted] {
        assert_eq!(grpc(status).health(), Health::Success, "{status:?}");
    }
    assert_eq!(grpc(G::ResourceExhausted).health(), Health::Neutral);
}

#[test]
fn a_failure_of_a_later_hop_is_neutral_for_the_endpoint() {
    let outcome = AttemptOutcome { advice: RetryAdvice::No, ..http(503) };
    assert!(outcome.is_failure());
    assert_eq!(outcome.health(), Health::Neutral);
    let refused = AttemptOutcome { advice: RetryAdvice::Elsewhere, ..http(503) };
    assert_eq!(refused.health(), Health::Failure);
    assert!(refused.is_unprocessed());
    let success = AttemptOutcome { advice: RetryAdvice::Elsewhere, ..http(200) };
    assert!(!success.is_unprocessed() && success.health() == Health::Success);
    assert!(!outcome.is_unprocessed());
}

#[test]
fn a_lost_connection_counts_once() {
    let loss = ConnectionLoss::default();
    let counted: Vec<Health> = (0..100).map(|_| loss.count_once(Health::Failure)).collect();
    assert_eq!(counted[0], Health::Failure);
    assert!(counted[1..].iter().all(|health| *health == Health::Neutral));
}

#[test]
fn a_service_that_stops_at_the_client_deadline_is_not_counted() {
    let at = |left| AttemptOutcome::grpc(GrpcStatus::DeadlineExceeded, RetryAdvice::None, left).health();
    assert_eq!(at(Some(Duration::ZERO)), Health::Neutral);
    assert_eq!(at(Some(Duration::from_millis(4))), Health::Neutral);
    assert_eq!(at(Some(Duration::from_secs(4))), Health::Failure);
    assert_eq!(at(None), Health::Failure);
}

/// The upstream's sidecar knows the client's deadline and returns 504 just before the proxy's own timer fires.
#[test]
fn a_504_at_the_client_deadline_is_neutral() {
    let at = |status, left| AttemptOutcome::http(status, RetryAdvice::None, left).health();
    let ms = Duration::from_millis;
    assert_eq!(at(StatusCode::GATEWAY_TIMEOUT, Some(ms(1))), Health::Neutral);
    assert_eq!(at(StatusCode::GATEWAY_TIMEOUT, Some(ms(100))), Health::Failure);
    assert_eq!(at(StatusCode::GATEWAY_TIMEOUT, None), Health::Failure);
    assert_eq!(at(StatusCode::SERVICE_UNAVAILABLE, Some(ms(1))), Health::Failure);
}

#[test]
fn only_refused_or_unsent_requests_are_unprocessed() {
    for ending in every_outcome_kind() {
        let sure = match ending {
            OutcomeKind::Connect(_) | OutcomeKind::RefusedStream | OutcomeKind::LocalRefusal => true,
            OutcomeKind::Reset(reset) => !reset.request_sent,
            _ => false,
        };
        assert_eq!(AttemptOutcome::new(ending).is_unprocessed(), sure, "{ending:?}");
    }
}

#[test]
fn conditions_match_their_outcomes() {
    assert!(http(503).matches(RetryCondition::GatewayError) && http(503).matches(RetryCondition::Default));
    assert!(
        !http(500).matches(RetryCondition::GatewayError) && http(500).matches(RetryCondition::ServerError)
    );
    assert!(http(429).matches(RetryCondition::Status(429)) && !http(429).matches(RetryCondition::Default));
    assert!(grpc(GrpcStatus::Unavailable).matches(RetryCondition::Default));
    assert!(!grpc(GrpcStatus::Internal).matches(RetryCondition::Default));
    assert!(!AttemptOutcome::new(OutcomeKind::Timeout).matches(RetryCondition::AttemptTimeout));
    for ending in [OutcomeKind::ClientGone, OutcomeKind::ClientDeadline, OutcomeKind::LocalRefusal] {
        let outcome = AttemptOutcome::new(ending);
        assert!(!outcome.matches(RetryCondition::Default) && !outcome.matches(RetryCondition::ServerError));
    }
}

#[test]
fn reads_the_retry_advice() {
    let mut headers = HeaderMap::new();
    assert_eq!(RetryAdvice::from_headers(&headers), RetryAdvice::None);
    for advice in [RetryAdvice::No, RetryAdvice::Elsewhere] {
        headers.insert(RETRY_ADVICE, HeaderValue::from_static(advice.word().unwrap()));
        assert_eq!(RetryAdvice::from_headers(&headers), advice);
    }
    headers.insert(RETRY_ADVICE, HeaderValue::from_static("perhaps"));
    assert_eq!(RetryAdvice::from_headers(&headers), RetryAdvice::None);
}
