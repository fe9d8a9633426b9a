use std::time::{Duration, Instant};

use http::{Method, StatusCode};

use super::{
    super::{
        backoff::Hint,
        budget::{BudgetSettings, RetryBudget},
        classify::{Advice, ConnectFailure, Ending, GrpcStatus, Outcome, Reset, tests::every_ending},
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

fn rich() -> RetryBudget {
    let window = HumanDuration::from_secs(1);
    RetryBudget::new(BudgetSettings { ratio: Ratio::constant(1.0), min_per_second: 1 << 20, window })
}

fn moment(budget: &RetryBudget) -> Moment<'_> {
    Moment {
        now: Instant::now(),
        time_left: Some(Duration::from_secs(10)),
        hint: Hint::None,
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
        free_used: false,
        resent: 0,
        body: Body::Untouched,
        is_committed: false,
    }
}

fn http(code: u16) -> Outcome {
    Outcome::new(Ending::Http(http::StatusCode::from_u16(code).unwrap()))
}

fn every_outcome() -> impl Iterator<Item = Outcome> {
    every_ending().into_iter().flat_map(|ending| {
        [Advice::None, Advice::No, Advice::Elsewhere].map(|advice| Outcome { ending, advice })
    })
}

/// The safety rule written anew, from the standards and not from the code: may this be sent again at all?
fn may_be_sent_again(
    policy: &Option<RetrySettings>,
    (method, idempotency_key): (&Method, bool),
    attempt: &FailedAttempt,
    outcome: &Outcome,
) -> bool {
    let idempotent =
        ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"].contains(&method.as_str()) || idempotency_key;
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
    let on_request = !attempt.is_committed && attempt.body != Body::Gone && outcome.advice != Advice::No;
    on_request
        && match policy {
            None => unsent || (stale && !attempt.free_used && (idempotent || unprocessed)),
            Some(settings) => {
                let methods = match &settings.methods {
                    Methods::All => true,
                    Methods::Idempotent => idempotent,
                    Methods::Listed(list) => list.iter().any(|m| m == method.as_str()),
                };
                settings.max > 0
                    && (attempt.attempts <= settings.max || unsent || (stale && !attempt.free_used))
                    && (methods || unprocessed)
            }
        }
}

#[test]
fn never_sent_twice_unless_it_may_be() {
    let budget = rich();
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
    let (mut sent, mut held) = (0u32, 0u32);
    for settings in policies {
        let policy = RetryPolicy::new(settings.clone());
        for (method, body) in METHODS.iter().flat_map(|method| BODIES.map(|body| (method, body))) {
            for bits in 0..32u32 {
                let idempotency_key = bits & 2 > 0;
                let attempt = FailedAttempt {
                    is_repeatable: policy.is_repeatable(method, idempotency_key),
                    is_grpc: bits & 1 > 0,
                    attempts: 1 + (bits & 4) / 2,
                    free_used: bits & 8 > 0,
                    resent: bits / 16 * 2,
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
                            Err(_) => held += 1,
                        }
                    }
                }
            }
        }
    }
    assert!(sent > 1000 && held > sent, "{sent} {held}");
    // And the same through the whole decision, for what most need it.
    let policy = RetryPolicy::new(Some(RetrySettings::default()));
    for outcome in outcomes.iter().filter(|outcome| !outcome.never_reached()) {
        let decision = policy.decide(&first(&policy, &Method::POST), outcome, &moment(&budget));
        assert!(matches!(decision, Decision::Stop(_)), "{outcome:?}");
    }
}

#[test]
fn what_should_be_retried_is() {
    let budget = rich();
    let policy = RetryPolicy::new(Some(RetrySettings::default()));
    let retries = |attempt: FailedAttempt, outcome| {
        matches!(policy.decide(&attempt, &outcome, &moment(&budget)), Decision::Retry(_))
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
    assert!(retries(post, Outcome::new(Ending::RefusedStream)));
    let elsewhere = Outcome { advice: Advice::Elsewhere, ..http(503) };
    assert!(retries(post, elsewhere));
    let well = Outcome { advice: Advice::Elsewhere, ..http(200) };
    assert!(!retries(get, well), "what went well is not done again, whatever is said");
    let grpc = FailedAttempt { is_grpc: true, ..post };
    let unavailable = Outcome::grpc(GrpcStatus::Unavailable, Advice::None, None);
    assert!(!retries(grpc, unavailable));
    let all = RetrySettings { methods: Methods::All, ..RetrySettings::default() };
    let all = RetryPolicy::new(Some(all));
    let grpc = FailedAttempt { is_grpc: true, ..first(&all, &Method::POST) };
    let decision = all.decide(&grpc, &unavailable, &moment(&budget));
    assert!(matches!(decision, Decision::Retry(_)));
}

#[test]
fn every_reason_is_given_where_it_holds() {
    let budget = rich();
    let policy = RetryPolicy::new(Some(RetrySettings::default()));
    let (get, post) = (first(&policy, &Method::GET), first(&policy, &Method::POST));
    let reason = |attempt: FailedAttempt, outcome: Outcome, moment: Moment<'_>| match policy
        .decide(&attempt, &outcome, &moment)
    {
        Decision::Stop(reason) => reason,
        Decision::Retry(retry) => panic!("{retry:?}"),
    };
    let now = moment(&budget);
    assert_eq!(reason(get, http(404), now), Reason::NotRetryable);
    assert_eq!(reason(get, Outcome { advice: Advice::No, ..http(503) }, now), Reason::Suppressed);
    assert_eq!(reason(get, Outcome { advice: Advice::No, ..http(404) }, now), Reason::NotRetryable);
    assert_eq!(reason(FailedAttempt { is_committed: true, ..get }, http(503), now), Reason::Committed);
    assert_eq!(reason(FailedAttempt { attempts: 3, ..get }, http(503), now), Reason::MaxTries);
    assert_eq!(reason(post, http(503), now), Reason::Method);
    assert_eq!(reason(FailedAttempt { body: Body::Gone, ..get }, http(503), now), Reason::BodyGone);
    let hurry = Moment { time_left: Some(Duration::from_millis(5)), ..now };
    assert_eq!(reason(get, http(503), hurry), Reason::Deadline);
    let asked = Moment { hint: Hint::After(Duration::from_secs(30)), ..now };
    assert_eq!(reason(get, http(503), asked), Reason::RetryAfter);
    assert_eq!(reason(get, http(503), Moment { hint: Hint::Never, ..now }), Reason::Pushback);
    let poor = RetryBudget::new(BudgetSettings {
        ratio: Ratio::constant(0.0),
        min_per_second: 0,
        window: HumanDuration::from_secs(10),
    });
    assert_eq!(reason(get, http(503), Moment { budget: &poor, ..now }), Reason::Budget);
}

#[test]
fn the_stale_keep_alive_race_is_mended_once_and_free() {
    let poor = RetryBudget::new(BudgetSettings {
        ratio: Ratio::constant(0.0),
        min_per_second: 0,
        window: HumanDuration::from_secs(10),
    });
    let now = moment(&poor);
    let race = |request_sent| {
        Outcome::new(Ending::Reset(Reset { reused: true, request_sent, response_begun: false }))
    };
    let free = Decision::Retry(Retry { wait: Duration::ZERO, free: true });
    for settings in [None, Some(RetrySettings::default())] {
        let policy = RetryPolicy::new(settings);
        let (get, post) = (first(&policy, &Method::GET), first(&policy, &Method::POST));
        assert_eq!(policy.decide(&get, &race(true), &now), free);
        assert_eq!(policy.decide(&post, &race(false), &now), free);
        let stop = |attempt: FailedAttempt, outcome: Outcome| {
            matches!(policy.decide(&attempt, &outcome, &now), Decision::Stop(_))
        };
        assert!(stop(post, race(true)));
        assert!(stop(FailedAttempt { free_used: true, ..get }, race(true)));
    }
    let never = RetryPolicy::new(Some(RetrySettings { max: 0, ..RetrySettings::default() }));
    assert_eq!(
        never.decide(&first(&never, &Method::GET), &race(false), &now),
        Decision::Stop(Reason::MaxTries),
        "max = 0 is at most once, always"
    );
}

/// A refused stream, one above the last id of a GOAWAY, a connection that ended before the first byte: whatever the
/// method, with retries off and without any budget; but an endpoint that refuses everything is not asked for ever.
#[test]
fn what_was_never_sent_goes_out_again_for_free() {
    let poor = RetryBudget::new(BudgetSettings {
        ratio: Ratio::constant(0.0),
        min_per_second: 0,
        window: HumanDuration::from_secs(10),
    });
    let now = moment(&poor);
    let unwritten = Reset { reused: false, request_sent: false, response_begun: false };
    for outcome in [Ending::RefusedStream, Ending::Reset(unwritten)].map(Outcome::new) {
        let off = RetryPolicy::new(None);
        let post = first(&off, &Method::POST);
        let free = Decision::Retry(Retry { wait: Duration::ZERO, free: true });
        for resent in 0..MOST_RESENT {
            let attempt = FailedAttempt { resent, ..post };
            assert_eq!(off.decide(&attempt, &outcome, &now), free, "{outcome:?} {resent}");
        }
        let spent = FailedAttempt { resent: MOST_RESENT, ..post };
        assert_eq!(off.decide(&spent, &outcome, &now), Decision::Stop(Reason::NotRetryable));
        let gone = FailedAttempt { body: Body::Gone, ..post };
        assert_eq!(off.decide(&gone, &outcome, &now), Decision::Stop(Reason::BodyGone));
        let never = RetryPolicy::new(Some(RetrySettings { max: 0, ..RetrySettings::default() }));
        assert!(matches!(never.decide(&first(&never, &Method::GET), &outcome, &now), Decision::Stop(_)));
    }
}

#[test]
fn a_body_is_kept_only_where_a_copy_could_be_of_use() {
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
fn what_an_absent_endpoint_never_saw_moves_on_and_nothing_else() {
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
