use std::time::{Duration, Instant};

use http::{Method, StatusCode};

use super::{
    super::{
        backoff::Hint,
        budget::{BudgetSettings, RetryBudget},
        classify::{Advice, ConnectFailure, Ending, GrpcStatus, Outcome, Reset, tests::every_outcome_kind},
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
const BODIES: [Body; 3] = [Body::Untouched, Body::Replayable, Body::Gone];

fn ample_budget() -> RetryBudget {
    let window = HumanDuration::from_secs(1);
    RetryBudget::new(BudgetSettings { ratio: Ratio::constant(1.0), min_per_second: 1 << 20, window })
}

fn context(budget: &RetryBudget) -> Moment<'_> {
    Moment {
        now: Instant::now(),
        time_left: Some(Duration::from_secs(10)),
        hint: Hint::None,
        random: 0.5,
        budget,
    }
}

fn attempt(method: &Method) -> Tried<'_> {
    Tried {
        method,
        grpc: false,
        idempotency_key: false,
        tries: 1,
        free_used: false,
        resent: 0,
        body: Body::Untouched,
        committed: false,
    }
}

fn http(code: u16) -> Outcome {
    Outcome::new(Ending::Http(http::StatusCode::from_u16(code).unwrap()))
}

fn every_outcome() -> impl Iterator<Item = Outcome> {
    every_outcome_kind().into_iter().flat_map(|ending| {
        [Advice::None, Advice::No, Advice::Elsewhere].map(|advice| Outcome { ending, advice })
    })
}

/// The safety rule, written again from the standards and not from the code: may this request be sent again?
fn may_be_sent_again(policy: &Option<RetrySettings>, attempt: &Tried<'_>, outcome: &Outcome) -> bool {
    let idempotent = ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"].contains(&attempt.method.as_str())
        || attempt.idempotency_key;
    let unprocessed = match outcome.ending {
        Ending::Connect(_) | Ending::RefusedStream | Ending::LocalRefusal => true,
        Ending::Reset(reset) => !reset.request_sent,
        Ending::Http(status) if status.as_u16() < 400 => false,
        _ => outcome.advice == Advice::Elsewhere,
    } || (outcome.advice == Advice::Elsewhere
        && !matches!(outcome.ending, Ending::Http(_)));
    let stale = matches!(outcome.ending, Ending::Reset(r) if r.reused && !r.response_begun);
    let unsent = attempt.resent < 2
        && match outcome.ending {
            Ending::RefusedStream => true,
            Ending::Reset(reset) => !reset.request_sent && !stale,
            _ => false,
        };
    let on_request = !attempt.committed && attempt.body != Body::Gone && outcome.advice != Advice::No;
    on_request
        && match policy {
            None => unsent || (stale && !attempt.free_used && (idempotent || unprocessed)),
            Some(settings) => {
                let methods = match &settings.methods {
                    Methods::All => true,
                    Methods::Idempotent => idempotent,
                    Methods::Listed(list) => list.iter().any(|m| m == attempt.method.as_str()),
                };
                settings.max > 0
                    && (attempt.tries <= settings.max || unsent || (stale && !attempt.free_used))
                    && (methods || unprocessed)
            }
        }
}

#[test]
fn sends_twice_only_when_allowed() {
    let budget = ample_budget();
    let with = |max, methods: Methods| Some(RetrySettings { max, methods, ..RetrySettings::default() });
    let every_condition = RetrySettings {
        on: (400..600).map(Condition::Status).chain(Condition::NAMED.map(|(_, c)| c)).collect(),
        methods: Methods::All,
        ..RetrySettings::default()
    };
    let policies = [
        None,
        with(0, Methods::All),
        with(2, Methods::Idempotent),
        with(2, Methods::All),
        with(1, Methods::Listed(vec!["POST".to_owned()])),
        Some(every_condition),
    ];
    let outcomes: Vec<Outcome> = every_outcome().collect();
    let (mut sent, mut rejected) = (0u32, 0u32);
    for settings in policies {
        let policy = RetryPolicy::new(settings.clone());
        for (method, body) in METHODS.iter().flat_map(|method| BODIES.map(|body| (method, body))) {
            for bits in 0..32u32 {
                let attempt = Tried {
                    method,
                    grpc: bits & 1 > 0,
                    idempotency_key: bits & 2 > 0,
                    tries: 1 + (bits & 4) / 2,
                    free_used: bits & 8 > 0,
                    resent: bits / 16 * 2,
                    body,
                    committed: false,
                };
                for outcome in &outcomes {
                    for attempt in [attempt, Tried { committed: true, ..attempt }] {
                        match policy.eligible(&attempt, outcome) {
                            Ok(_) => {
                                sent += 1;
                                assert!(
                                    may_be_sent_again(&settings, &attempt, outcome),
                                    "{settings:?} {attempt:?} {outcome:?}"
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
    for outcome in outcomes.iter().filter(|outcome| !outcome.never_reached()) {
        let decision = policy.decide(&attempt(&Method::POST), outcome, &context(&budget));
        assert!(matches!(decision, Decision::Stop(_)), "{outcome:?}");
    }
}

#[test]
fn retries_retryable_outcomes() {
    let budget = ample_budget();
    let policy = RetryPolicy::new(Some(RetrySettings::default()));
    let retries = |attempt: Tried<'_>, outcome| {
        matches!(policy.decide(&attempt, &outcome, &context(&budget)), Decision::Retry(_))
    };
    for code in [502, 503, 504] {
        assert!(retries(attempt(&Method::GET), http(code)));
        assert!(!retries(attempt(&Method::POST), http(code)));
        assert!(retries(Tried { idempotency_key: true, ..attempt(&Method::POST) }, http(code)));
    }
    assert!(!retries(attempt(&Method::GET), http(500)));
    assert!(!retries(attempt(&Method::GET), http(200)));
    assert!(retries(attempt(&Method::POST), Outcome::new(Ending::RefusedStream)));
    let elsewhere = Outcome { advice: Advice::Elsewhere, ..http(503) };
    assert!(retries(attempt(&Method::POST), elsewhere));
    let success = Outcome { advice: Advice::Elsewhere, ..http(200) };
    assert!(!retries(attempt(&Method::GET), success), "a success is not retried, whatever the advice");
    let grpc = Tried { grpc: true, ..attempt(&Method::POST) };
    let unavailable = Outcome::grpc(GrpcStatus::Unavailable, Advice::None, None);
    assert!(!retries(grpc, unavailable));
    let all = RetrySettings { methods: Methods::All, ..RetrySettings::default() };
    let decision = RetryPolicy::new(Some(all)).decide(&grpc, &unavailable, &context(&budget));
    assert!(matches!(decision, Decision::Retry(_)));
}

#[test]
fn stops_with_the_right_reason() {
    let budget = ample_budget();
    let policy = RetryPolicy::new(Some(RetrySettings::default()));
    let get = attempt(&Method::GET);
    let reason = |attempt: Tried<'_>, outcome: Outcome, context: Moment<'_>| match policy
        .decide(&attempt, &outcome, &context)
    {
        Decision::Stop(reason) => reason,
        Decision::Retry(retry) => panic!("{retry:?}"),
    };
    let now = context(&budget);
    assert_eq!(reason(get, http(404), now), Reason::NotRetryable);
    assert_eq!(reason(get, Outcome { advice: Advice::No, ..http(503) }, now), Reason::Suppressed);
    assert_eq!(reason(get, Outcome { advice: Advice::No, ..http(404) }, now), Reason::NotRetryable);
    assert_eq!(reason(Tried { committed: true, ..get }, http(503), now), Reason::Committed);
    assert_eq!(reason(Tried { tries: 3, ..get }, http(503), now), Reason::MaxTries);
    assert_eq!(reason(attempt(&Method::POST), http(503), now), Reason::Method);
    assert_eq!(reason(Tried { body: Body::Gone, ..get }, http(503), now), Reason::BodyGone);
    let short_of_time = Moment { time_left: Some(Duration::from_millis(5)), ..now };
    assert_eq!(reason(get, http(503), short_of_time), Reason::Deadline);
    let asked = Moment { hint: Hint::After(Duration::from_secs(30)), ..now };
    assert_eq!(reason(get, http(503), asked), Reason::RetryAfter);
    assert_eq!(reason(get, http(503), Moment { hint: Hint::Never, ..now }), Reason::Pushback);
    let empty_budget = RetryBudget::new(BudgetSettings {
        ratio: Ratio::constant(0.0),
        min_per_second: 0,
        window: HumanDuration::from_secs(10),
    });
    assert_eq!(reason(get, http(503), Moment { budget: &empty_budget, ..now }), Reason::Budget);
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
        Outcome::new(Ending::Reset(Reset { reused: true, request_sent, response_begun: false }))
    };
    let free = Decision::Retry(Retry { wait: Duration::ZERO, free: true });
    for settings in [None, Some(RetrySettings::default())] {
        let policy = RetryPolicy::new(settings);
        assert_eq!(policy.decide(&attempt(&Method::GET), &race(true), &now), free);
        assert_eq!(policy.decide(&attempt(&Method::POST), &race(false), &now), free);
        let stop = |attempt: Tried<'_>, outcome: Outcome| {
            matches!(policy.decide(&attempt, &outcome, &now), Decision::Stop(_))
        };
        assert!(stop(attempt(&Method::POST), race(true)));
        assert!(stop(Tried { free_used: true, ..attempt(&Method::GET) }, race(true)));
    }
    let never = RetryPolicy::new(Some(RetrySettings { max: 0, ..RetrySettings::default() }));
    assert_eq!(
        never.decide(&attempt(&Method::GET), &race(false), &now),
        Decision::Stop(Reason::MaxTries),
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
    let unwritten = Reset { reused: false, request_sent: false, response_begun: false };
    for outcome in [Ending::RefusedStream, Ending::Reset(unwritten)].map(Outcome::new) {
        let off = RetryPolicy::new(None);
        let free = Decision::Retry(Retry { wait: Duration::ZERO, free: true });
        for resent in 0..MOST_RESENT {
            let attempt = Tried { resent, ..attempt(&Method::POST) };
            assert_eq!(off.decide(&attempt, &outcome, &now), free, "{outcome:?} {resent}");
        }
        let spent = Tried { resent: MOST_RESENT, ..attempt(&Method::POST) };
        assert_eq!(off.decide(&spent, &outcome, &now), Decision::Stop(Reason::NotRetryable));
        let gone = Tried { body: Body::Gone, ..attempt(&Method::POST) };
        assert_eq!(off.decide(&gone, &outcome, &now), Decision::Stop(Reason::BodyGone));
        let never = RetryPolicy::new(Some(RetrySettings { max: 0, ..RetrySettings::default() }));
        assert!(matches!(never.decide(&attempt(&Method::GET), &outcome, &now), Decision::Stop(_)));
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
    assert!(on.another_possible(2) && !on.another_possible(3) && !once.another_possible(1));
}

#[test]
fn switches_endpoint_only_for_unprocessed_requests_to_absent_endpoints() {
    let policy = RetryPolicy::new(Some(RetrySettings::default()));
    let refused = Outcome::new(Ending::Connect(ConnectFailure::Refused));
    let http = |advice| Outcome { ending: Ending::Http(StatusCode::SERVICE_UNAVAILABLE), advice };
    assert!(policy.may_move_on(&refused, true, Body::Untouched));
    assert!(policy.may_move_on(&http(Advice::Elsewhere), true, Body::Replayable));
    assert!(!policy.may_move_on(&http(Advice::Elsewhere), false, Body::Replayable), "its limits are full");
    assert!(!policy.may_move_on(&http(Advice::Elsewhere), true, Body::Gone));
    assert!(!policy.may_move_on(&http(Advice::None), true, Body::Untouched), "it may have been processed");
    assert!(!RetryPolicy::new(None).may_move_on(&refused, true, Body::Untouched), "retry = false");
    let once = RetrySettings { max: 0, ..RetrySettings::default() };
    assert!(!RetryPolicy::new(Some(once)).may_move_on(&refused, true, Body::Untouched), "max = 0");
}
