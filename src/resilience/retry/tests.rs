use std::time::{Duration, Instant};

use http::{Method, StatusCode};

use super::{
    super::{
        backoff::RetryHint,
        budget::{BudgetSettings, RetryBudget},
        classify::{
            AttemptOutcome, ConnectFailure, GrpcStatus, OutcomeKind, Reset, RetryAdvice,
            tests::every_outcome_kind,
        },
    },
    *,
};
use crate::units::{HumanDuration, Ratio};

const METHODS: [Method; 9] = [
    Method::GET,
    Method::HEAD,
    Method::OPTIONS,
    Method::TRACE,
    Method::PUT,
    Method::DELETE,
    Method::POST,
    Method::PATCH,
    Method::CONNECT,
];
const BODIES: [Replayability; 3] = [Replayability::Unread, Replayability::Buffered, Replayability::NotKept];

fn ample_budget() -> RetryBudget {
    let window = HumanDuration::from_secs(1);
    RetryBudget::new(BudgetSettings { ratio: Ratio::constant(1.0), min_per_second: 1 << 20, window })
}

fn context(budget: &RetryBudget) -> RetryContext<'_> {
    RetryContext {
        now: Instant::now(),
        time_left: Some(Duration::from_secs(10)),
        hint: RetryHint::None,
        random: 0.5,
        budget,
    }
}

/// The first attempt of a request without an `Idempotency-Key`, under this policy.
fn first(policy: &RetryPolicy, method: &Method) -> FailedAttempt {
    FailedAttempt {
        is_repeatable: policy.is_repeatable(method, false),
        is_grpc: false,
        attempts: 1,
        free_retry_used: false,
        resends: 0,
        body: Replayability::Unread,
        is_committed: false,
    }
}

fn http(code: u16) -> AttemptOutcome {
    AttemptOutcome::new(OutcomeKind::Http(http::StatusCode::from_u16(code).unwrap()))
}

fn every_outcome() -> impl Iterator<Item = AttemptOutcome> {
    every_outcome_kind().into_iter().flat_map(|ending| {
        [RetryAdvice::None, RetryAdvice::No, RetryAdvice::Elsewhere]
            .map(|advice| AttemptOutcome { kind: ending, advice })
    })
}

/// The safety rule, written again from the standards and not from the code: may this request be sent again?
fn may_be_sent_again(
    policy: &Option<RetrySettings>,
    (method, idempotency_key): (&Method, bool),
    attempt: &FailedAttempt,
    outcome: &AttemptOutcome,
) -> bool {
    let idempotent =
        ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"].contains(&method.as_str()) || idempotency_key;
    let unprocessed = match outcome.kind {
        OutcomeKind::Connect(_) | OutcomeKind::RefusedStream | OutcomeKind::LocalRefusal => true,
        OutcomeKind::Reset(reset) => !reset.request_sent,
        OutcomeKind::Http(status) if status.as_u16() < 400 => false,
        _ => outcome.advice == RetryAdvice::Elsewhere,
    } || (outcome.advice == RetryAdvice::Elsewhere
        && !matches!(outcome.kind, OutcomeKind::Http(_)));
    let stale = matches!(outcome.kind, OutcomeKind::Reset(r) if r.reused && !r.response_started);
    let unsent = attempt.resends < 2
        && match outcome.kind {
            OutcomeKind::RefusedStream => true,
            OutcomeKind::Reset(reset) => !reset.request_sent && !stale,
            _ => false,
        };
    let on_request =
        !attempt.is_committed && attempt.body != Replayability::NotKept && outcome.advice != RetryAdvice::No;
    on_request
        && match policy {
            None => unsent || (stale && !attempt.free_retry_used && (idempotent || unprocessed)),
            Some(settings) => {
                let methods = match &settings.methods {
                    RetryMethods::All => true,
                    RetryMethods::Idempotent => idempotent,
                    RetryMethods::Listed(list) => list.iter().any(|m| m == method.as_str()),
                };
                settings.max > 0
                    && (attempt.attempts <= settings.max || unsent || (stale && !attempt.free_retry_used))
                    && (methods || unprocessed)
            }
        }
}

#[test]
fn sends_twice_only_when_allowed() {
    let budget = ample_budget();
    let with = |max, methods: RetryMethods| Some(RetrySettings { max, methods, ..RetrySettings::default() });
    let every_condition = RetrySettings {
        on: (400..600).map(RetryCondition::Status).chain(RetryCondition::NAMED.map(|(_, c)| c)).collect(),
        methods: RetryMethods::All,
        ..RetrySettings::default()
    };
    let policies = [
        None,
        with(0, RetryMethods::All),
        with(2, RetryMethods::Idempotent),
        with(2, RetryMethods::All),
        with(1, RetryMethods::Listed(vec!["POST".to_owned()])),
        Some(every_condition),
    ];
    let outcomes: Vec<AttemptOutcome> = every_outcome().collect();
    let (mut sent, mut rejected) = (0u32, 0u32);
    for settings in policies {
        let policy = RetryPolicy::new(settings.clone());
        for (method, body) in METHODS.iter().flat_map(|method| BODIES.map(|body| (method, body))) {
            for bits in 0..32u32 {
                let idempotency_key = bits & 2 > 0;
                let attempt = FailedAttempt {
                    is_repeatable: policy.is_repeatable(method, idempotency_key),
                    is_grpc: bits & 1 > 0,
                    attempts: 1 + (bits & 4) / 2,
                    free_retry_used: bits & 8 > 0,
                    resends: bits / 16 * 2,
                    body,
                    is_committed: false,
                };
                for outcome in &outcomes {
                    for attempt in [attempt, FailedAttempt { is_committed: true, ..attempt }] {
                        match policy.eligible(&attempt, outcome) {
                            Ok(_) => {
                                sent += 1;
                                assert!(
                                    may_be_sent_again(
                                        &settings,
                                        (method, idempotency_key),
                                        &attempt,
                                        outcome
                                    ),
                                    "{settings:?} {method} {attempt:?} {outcome:?}"
                                );
                            }
                            Err(_) => rejected += 1,
                        }
                    }
                }
            }
        }
    }
    assert!(sent > 1000 && rejected > sent, "{sent} {rejected}");
    // The same through the whole decision, for requests that may have been processed and are not idempotent.
    let policy = RetryPolicy::new(Some(RetrySettings::default()));
    for outcome in outcomes.iter().filter(|outcome| !outcome.is_unprocessed()) {
        let decision = policy.decide(&first(&policy, &Method::POST), outcome, &context(&budget));
        assert!(matches!(decision, RetryDecision::Stop(_)), "{outcome:?}");
    }
}

#[test]
fn retries_retryable_outcomes() {
    let budget = ample_budget();
    let policy = RetryPolicy::new(Some(RetrySettings::default()));
    let retries = |attempt: FailedAttempt, outcome| {
        matches!(policy.decide(&attempt, &outcome, &context(&budget)), RetryDecision::Retry(_))
    };
    let (get, post) = (first(&policy, &Method::GET), first(&policy, &Method::POST));
    let is_repeatable = policy.is_repeatable(&Method::POST, true);
    for code in [502, 503, 504] {
        assert!(retries(get, http(code)));
        assert!(!retries(post, http(code)));
        assert!(retries(FailedAttempt { is_repeatable, ..post }, http(code)));
    }
    assert!(!retries(get, http(500)));
    assert!(!retries(get, http(200)));
    assert!(retries(post, AttemptOutcome::new(OutcomeKind::RefusedStream)));
    let elsewhere = AttemptOutcome { advice: RetryAdvice::Elsewhere, ..http(503) };
    assert!(retries(post, elsewhere));
    let success = AttemptOutcome { advice: RetryAdvice::Elsewhere, ..http(200) };
    assert!(!retries(get, success), "a success is not retried, whatever the advice");
    let grpc = FailedAttempt { is_grpc: true, ..post };
    let unavailable = AttemptOutcome::grpc(GrpcStatus::Unavailable, RetryAdvice::None, None);
    assert!(!retries(grpc, unavailable));
    let all = RetrySettings { methods: RetryMethods::All, ..RetrySettings::default() };
    let all = RetryPolicy::new(Some(all));
    let grpc = FailedAttempt { is_grpc: true, ..first(&all, &Method::POST) };
    let decision = all.decide(&grpc, &unavailable, &context(&budget));
    assert!(matches!(decision, RetryDecision::Retry(_)));
}

#[test]
fn stops_with_the_right_reason() {
    let budget = ample_budget();
    let policy = RetryPolicy::new(Some(RetrySettings::default()));
    let (get, post) = (first(&policy, &Method::GET), first(&policy, &Method::POST));
    let reason = |attempt: FailedAttempt, outcome: AttemptOutcome, context: RetryContext<'_>| match policy
        .decide(&attempt, &outcome, &context)
    {
        RetryDecision::Stop(reason) => reason,
        RetryDecision::Retry(retry) => panic!("{retry:?}"),
    };
    let now = context(&budget);
    assert_eq!(reason(get, http(404), now), StopReason::NotRetryable);
    assert_eq!(
        reason(get, AttemptOutcome { advice: RetryAdvice::No, ..http(503) }, now),
        StopReason::Suppressed
    );
    assert_eq!(
        reason(get, AttemptOutcome { advice: RetryAdvice::No, ..http(404) }, now),
        StopReason::NotRetryable
    );
    assert_eq!(reason(FailedAttempt { is_committed: true, ..get }, http(503), now), StopReason::Committed);
    assert_eq!(reason(FailedAttempt { attempts: 3, ..get }, http(503), now), StopReason::MaxAttempts);
    assert_eq!(reason(post, http(503), now), StopReason::Method);
    assert_eq!(
        reason(FailedAttempt { body: Replayability::NotKept, ..get }, http(503), now),
        StopReason::BodyNotKept
    );
    let short_of_time = RetryContext { time_left: Some(Duration::from_millis(5)), ..now };
    assert_eq!(reason(get, http(503), short_of_time), StopReason::Deadline);
    let asked = RetryContext { hint: RetryHint::After(Duration::from_secs(30)), ..now };
    assert_eq!(reason(get, http(503), asked), StopReason::RetryAfter);
    assert_eq!(reason(get, http(503), RetryContext { hint: RetryHint::Never, ..now }), StopReason::Pushback);
    let empty_budget = RetryBudget::new(BudgetSettings {
        ratio: Ratio::constant(0.0),
        min_per_second: 0,
        window: HumanDuration::from_secs(10),
    });
    assert_eq!(reason(get, http(503), RetryContext { budget: &empty_budget, ..now }), StopReason::Budget);
}

#[test]
fn retries_a_stale_keep_alive_race_once_for_free() {
    let empty_budget = RetryBudget::new(BudgetSettings {
        ratio: Ratio::constant(0.0),
        min_per_second: 0,
        window: HumanDuration::from_secs(10),
    });
    let now = context(&empty_budget);
    let race = |request_sent| {
        AttemptOutcome::new(OutcomeKind::Reset(Reset { reused: true, request_sent, response_started: false }))
    };
    let free = RetryDecision::Retry(Retry { wait: Duration::ZERO, free: true });
    for settings in [None, Some(RetrySettings::default())] {
        let policy = RetryPolicy::new(settings);
        let (get, post) = (first(&policy, &Method::GET), first(&policy, &Method::POST));
        assert_eq!(policy.decide(&get, &race(true), &now), free);
        assert_eq!(policy.decide(&post, &race(false), &now), free);
        let stop = |attempt: FailedAttempt, outcome: AttemptOutcome| {
            matches!(policy.decide(&attempt, &outcome, &now), RetryDecision::Stop(_))
        };
        assert!(stop(post, race(true)));
        assert!(stop(FailedAttempt { free_retry_used: true, ..get }, race(true)));
    }
    let never = RetryPolicy::new(Some(RetrySettings { max: 0, ..RetrySettings::default() }));
    assert_eq!(
        never.decide(&first(&never, &Method::GET), &race(false), &now),
        RetryDecision::Stop(StopReason::MaxAttempts),
        "max = 0 is at most once, always"
    );
}

/// A refused stream, one above the last ID of a GOAWAY, a connection lost before the first byte: resent whatever the
/// method, with retries off and without any budget, but a bounded number of times.
#[test]
fn resends_an_unsent_request_for_free() {
    let empty_budget = RetryBudget::new(BudgetSettings {
        ratio: Ratio::constant(0.0),
        min_per_second: 0,
        window: HumanDuration::from_secs(10),
    });
    let now = context(&empty_budget);
    let unwritten = Reset { reused: false, request_sent: false, response_started: false };
    for outcome in [OutcomeKind::RefusedStream, OutcomeKind::Reset(unwritten)].map(AttemptOutcome::new) {
        let off = RetryPolicy::new(None);
        let post = first(&off, &Method::POST);
        let free = RetryDecision::Retry(Retry { wait: Duration::ZERO, free: true });
        for resent in 0..MAX_RESENDS {
            let attempt = FailedAttempt { resends: resent, ..post };
            assert_eq!(off.decide(&attempt, &outcome, &now), free, "{outcome:?} {resent}");
        }
        let spent = FailedAttempt { resends: MAX_RESENDS, ..post };
        assert_eq!(off.decide(&spent, &outcome, &now), RetryDecision::Stop(StopReason::NotRetryable));
        let gone = FailedAttempt { body: Replayability::NotKept, ..post };
        assert_eq!(off.decide(&gone, &outcome, &now), RetryDecision::Stop(StopReason::BodyNotKept));
        let never = RetryPolicy::new(Some(RetrySettings { max: 0, ..RetrySettings::default() }));
        assert!(matches!(never.decide(&first(&never, &Method::GET), &outcome, &now), RetryDecision::Stop(_)));
    }
}

#[test]
fn keeps_a_body_only_where_a_retry_could_use_it() {
    let limit = *RetrySettings::default().body_limit;
    let on = RetryPolicy::new(Some(RetrySettings::default()));
    assert_eq!(
        on.body_limit(&Method::POST, false, true),
        limit,
        "a refused stream is sent again for any method"
    );
    let off = RetryPolicy::new(None);
    let kept = |method, refusable| off.body_limit(method, false, refusable);
    assert_eq!((kept(&Method::PUT, false), kept(&Method::POST, false)), (limit, 0));
    assert_eq!(kept(&Method::POST, true), limit, "here, too");
    let once = RetryPolicy::new(Some(RetrySettings { max: 0, ..RetrySettings::default() }));
    assert_eq!(once.body_limit(&Method::PUT, true, true), 0);
    assert!(on.has_attempt_left(2) && !on.has_attempt_left(3) && !once.has_attempt_left(1));
}

#[test]
fn switches_endpoint_only_for_unprocessed_requests_to_absent_endpoints() {
    let policy = RetryPolicy::new(Some(RetrySettings::default()));
    let refused = AttemptOutcome::new(OutcomeKind::Connect(ConnectFailure::Refused));
    let http = |advice| AttemptOutcome { kind: OutcomeKind::Http(StatusCode::SERVICE_UNAVAILABLE), advice };
    assert!(policy.may_switch_endpoint(&refused, true, Replayability::Unread));
    assert!(policy.may_switch_endpoint(&http(RetryAdvice::Elsewhere), true, Replayability::Buffered));
    assert!(
        !policy.may_switch_endpoint(&http(RetryAdvice::Elsewhere), false, Replayability::Buffered),
        "its limits are full"
    );
    assert!(!policy.may_switch_endpoint(&http(RetryAdvice::Elsewhere), true, Replayability::NotKept));
    assert!(
        !policy.may_switch_endpoint(&http(RetryAdvice::None), true, Replayability::Unread),
        "it may have been processed"
    );
    assert!(
        !RetryPolicy::new(None).may_switch_endpoint(&refused, true, Replayability::Unread),
        "retry = false"
    );
    let once = RetrySettings { max: 0, ..RetrySettings::default() };
    assert!(
        !RetryPolicy::new(Some(once)).may_switch_endpoint(&refused, true, Replayability::Unread),
        "max = 0"
    );
}
