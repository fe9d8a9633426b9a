//! Thousands of schedules in virtual time: the machine with the real breaker, budget, back-off and outlier detection. The
//! rules are written anew here, from the documentation and not from the code.

use std::{
    collections::BTreeMap,
    hash::RandomState,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{Method, StatusCode};
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

use super::{
    super::{
        super::{
            backoff::{BackoffSettings, RetryHint},
            breaker::{Breaker, BreakerPermit, BreakerSettings, GrowingDuration},
            budget::{BudgetSettings, RetryBudget},
            classify::{AttemptOutcome, ConnectFailure, Reset},
            hedge::{self, HedgeAfter, HedgeSettings},
            outlier::{EndpointHealth, EndpointOutcome, OutlierDetector, OutlierSettings},
            rate::{RateKey, RateLimit, RateSettings},
        },
        RetryMethods, RetrySettings,
        decide::BodyState,
    },
    *,
};
use crate::units::{HumanDuration, Ratio};

const MS: Duration = Duration::from_millis(1);
/// More actions than any request can need here.
const MOST_ACTIONS: u32 = 100;

/// What an attempt meets.
#[derive(Clone, Copy, Debug)]
struct Scripted {
    took_ms: u64,
    ending: OutcomeKind,
    advice: RetryAdvice,
    hint: RetryHint,
    /// The attempt read more of the body than is kept.
    loses_body: bool,
}

/// A request and its moment.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    after_ms: u64,
    method: u8,
    idempotency_key: bool,
    is_grpc: bool,
    deadline_ms: Option<u64>,
    /// The client gives up.
    leaves_ms: Option<u64>,
}

#[derive(Clone, Debug)]
struct Setup {
    retry: Option<RetrySettings>,
    breaker: BreakerSettings,
    hedge_ms: Option<u64>,
    observes_retries: bool,
    endpoints: usize,
    /// The balancer never chooses the last endpoint: its health checks fail.
    last_is_unhealthy: bool,
    /// All are addresses of one loopback host.
    are_siblings: bool,
    script: Vec<Scripted>,
    arrivals: Vec<Arrival>,
    seed: u64,
}

/// An attempt under way.
struct Flight {
    endpoint: usize,
    began: Duration,
    permit: BreakerPermit,
    scripted: Scripted,
    /// Of all sendings; 0 before it is sent.
    number: u32,
}

struct Request<'a> {
    plan: RetryPlan<'a>,
    arrival: Arrival,
    deadline: Option<Duration>,
    permit: Option<BreakerPermit>,
    first: Option<Flight>,
    copy: Option<Flight>,
    is_hedged: bool,
    was_hedged: bool,
    recovery_until: Duration,
    /// When the budget granted the attempt that is to be sent.
    granted: Option<Duration>,
    /// A response that is not a failure has gone to the client.
    is_committed: bool,
    /// A byte of it may have reached the service.
    is_touched: bool,
    has_lost_body: bool,
    is_over: bool,
    actions: u32,
    counting: u32,
    reconnects: u32,
    elsewhere: u32,
}

#[derive(Clone, Copy, Debug)]
enum Due {
    Arrival,
    Ready,
    Recovery,
    Hedge(u32),
    End(RequestCopy, u32),
    Leave,
}

struct World<'a> {
    setup: &'a Setup,
    policy: &'a RetryPolicy,
    limits: SharedLimits<'a>,
    breaker: Arc<Breaker>,
    outliers: OutlierDetector,
    health: Vec<Arc<EndpointHealth>>,
    requests: Vec<Request<'a>>,
    queue: BTreeMap<(Duration, u32), (usize, Due)>,
    number: u32,
    used: usize,
    seed: u64,
    start: Instant,
    now: Duration,
    arrived: Vec<Duration>,
    /// When the budget granted each attempt that was sent and had to be granted.
    charged: Vec<Duration>,
    sent: u32,
}

fn address(endpoint: usize) -> SocketAddr {
    ([127, 0, 0, 1], endpoint as u16 + 1).into()
}

const METHODS: [Method; 4] = [Method::GET, Method::POST, Method::DELETE, Method::PATCH];

impl<'a> World<'a> {
    fn new(setup: &'a Setup, policy: &'a RetryPolicy, limits: SharedLimits<'a>, start: Instant) -> Self {
        let outliers = OutlierDetector::new(OutlierSettings::default(), start);
        let addresses: Vec<_> = (0..setup.endpoints).map(address).collect();
        outliers.update(&addresses, start);
        let health = addresses.iter().map(|address| outliers.endpoint(address).unwrap()).collect();
        let mut world = Self {
            setup,
            policy,
            limits,
            breaker: Breaker::new(setup.breaker, start),
            outliers,
            health,
            requests: Vec::new(),
            queue: BTreeMap::new(),
            number: 0,
            used: 0,
            seed: setup.seed,
            start,
            now: Duration::ZERO,
            arrived: Vec::new(),
            charged: Vec::new(),
            sent: 0,
        };
        let mut at = Duration::ZERO;
        for arrival in &setup.arrivals {
            at += MS * u32::try_from(arrival.after_ms).unwrap();
            let method = &METHODS[usize::from(arrival.method)];
            let traits = RequestTraits {
                is_repeatable: policy.is_repeatable(method, arrival.idempotency_key),
                is_grpc: arrival.is_grpc,
                keeps_head: false,
                observes_retries: setup.observes_retries,
            };
            world.requests.push(Request {
                plan: RetryPlan::new(policy, limits, traits, AttemptKind::First),
                arrival: *arrival,
                deadline: arrival.deadline_ms.map(|ms| at + Duration::from_millis(ms)),
                permit: None,
                first: None,
                copy: None,
                is_hedged: false,
                was_hedged: false,
                recovery_until: Duration::ZERO,
                granted: None,
                is_committed: false,
                is_touched: false,
                has_lost_body: false,
                is_over: false,
                actions: 0,
                counting: 0,
                reconnects: 0,
                elsewhere: 0,
            });
            let index = world.requests.len() - 1;
            world.schedule(at, index, Due::Arrival);
            if let Some(ms) = arrival.leaves_ms {
                world.schedule(at + Duration::from_millis(ms), index, Due::Leave);
            }
        }
        world
    }

    fn schedule(&mut self, at: Duration, index: usize, due: Due) {
        self.number += 1;
        self.queue.insert((at, self.number), (index, due));
    }

    fn random(&mut self) -> f64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.seed >> 11) as f64 / (1u64 << 53) as f64
    }

    fn at(&self) -> Instant {
        self.start + self.now
    }

    fn time_left(&self, index: usize) -> Option<Duration> {
        self.requests[index].deadline.map(|deadline| deadline.saturating_sub(self.now))
    }

    fn run(&mut self) {
        while let Some(((at, _), (index, due))) = self.queue.pop_first() {
            self.now = at;
            if self.requests[index].is_over {
                continue;
            }
            match due {
                Due::Arrival => {
                    self.arrived.push(at);
                    self.limits.budget.deposit();
                    let time_left = self.time_left(index);
                    self.step(index, Event::Ready { time_left });
                }
                Due::Ready => {
                    let time_left = self.time_left(index);
                    self.step(index, Event::Ready { time_left });
                }
                Due::Recovery => self.recover(index),
                Due::Hedge(number) => self.hedge(index, number),
                Due::End(copy, number) => self.ended(index, copy, number),
                // Dropping the future drops machine, permits and copies.
                Due::Leave => self.forget(index),
            }
        }
    }

    fn forget(&mut self, index: usize) {
        let traits = RequestTraits {
            is_repeatable: false,
            is_grpc: false,
            keeps_head: false,
            observes_retries: false,
        };
        let request = &mut self.requests[index];
        request.plan = RetryPlan::new(self.policy, self.limits, traits, AttemptKind::First);
        (request.permit, request.first, request.copy) = (None, None, None);
        request.is_over = true;
    }

    fn step(&mut self, index: usize, event: Event) {
        let mut event = event;
        loop {
            let now = self.at();
            let action = self.requests[index].plan.next(event, now);
            check_answer(&event, &action);
            if let Event::Failed(_) = event {
                self.requests[index].granted = Some(self.now);
            }
            self.requests[index].actions += 1;
            assert!(self.requests[index].actions <= MOST_ACTIONS, "it does not end");
            event = match action {
                Action::Admit => {
                    assert!(self.requests[index].permit.is_none(), "two permits for one attempt");
                    self.admit(index)
                }
                Action::AwaitRecovery { until, .. } => {
                    let until = until.saturating_duration_since(self.start);
                    let deadline = self.requests[index].deadline;
                    assert!(
                        deadline.is_none_or(|deadline| until + MS <= deadline),
                        "it waits beyond its deadline"
                    );
                    assert!(until <= self.now + MS * 250, "it waits for long");
                    self.requests[index].recovery_until = until;
                    return self.recover(index);
                }
                Action::Pick => self.pick(index),
                Action::Send(next) => return self.send(index, next),
                Action::Wait(wait) => {
                    assert!(!wait.is_zero());
                    let request = &self.requests[index];
                    let at = self.now + wait;
                    assert!(
                        request.deadline.is_none_or(|deadline| at < deadline),
                        "it waits to its deadline"
                    );
                    return self.schedule(at, index, Due::Ready);
                }
                Action::PickCopy => match self.pick_copy(index) {
                    Some(event) => event,
                    None => return,
                },
                Action::SendCopy => return self.send_copy(index),
                Action::AwaitCopies => {
                    let request = &mut self.requests[index];
                    if !request.is_hedged {
                        // What admitted a copy that the budget does not.
                        request.copy = None;
                    }
                    return;
                }
                Action::Settle(copy) => {
                    let request = &mut self.requests[index];
                    let (flight, other) = match copy {
                        RequestCopy::First => (&mut request.first, &request.copy),
                        RequestCopy::Hedge => (&mut request.copy, &request.first),
                    };
                    let flight = flight.take().expect("the copy that has ended");
                    assert!(flight.scripted.is_success() || other.is_none(), "the other copy may succeed");
                    (request.first, request.copy, request.is_hedged) = (None, None, false);
                    self.judge(index, flight)
                }
                Action::Finish(finish) => return self.finish(index, finish),
            };
        }
    }

    fn admit(&mut self, index: usize) -> Event {
        match self.breaker.admit(self.at()).permit {
            Ok(permit) => {
                self.requests[index].permit = Some(permit);
                Event::Admitted
            }
            Err(refused) => {
                Event::Refused { retry_after: refused.retry_after, time_left: self.time_left(index) }
            }
        }
    }

    fn recover(&mut self, index: usize) {
        let event = self.admit(index);
        if let Event::Refused { .. } = event
            && self.now < self.requests[index].recovery_until
            && self.outliers.any_absent()
        {
            let at = (self.now + MS * 5).min(self.requests[index].recovery_until);
            return self.schedule(at, index, Due::Recovery);
        }
        self.step(index, event);
    }

    fn healthy(&self) -> usize {
        let all = self.setup.endpoints;
        if self.setup.last_is_unhealthy && all > 1 { all - 1 } else { all }
    }

    fn pick(&mut self, index: usize) -> Event {
        let random = self.random();
        if random < 0.02 {
            return Event::Unavailable;
        }
        let (healthy, now) = (self.healthy(), self.at());
        let failed = self.requests[index].plan.failed_endpoints();
        let best =
            (0..healthy).find(|other| !failed.contains(other) && self.health[*other].is_available(now));
        let other = best.unwrap_or((random * healthy as f64) as usize % healthy);
        let request = &mut self.requests[index];
        let has_body = !request.has_lost_body;
        let (permit, scripted) = (request.permit.take().expect("a permit"), self.next_scripted());
        let flight = Flight { endpoint: other, began: self.now, permit, scripted, number: 0 };
        self.requests[index].first = Some(flight);
        Event::Picked { has_body }
    }

    fn next_scripted(&mut self) -> Scripted {
        self.used += 1;
        self.setup.script[(self.used - 1) % self.setup.script.len()]
    }

    /// What holds whenever a byte may go out.
    fn check_send(&mut self, index: usize, kind: AttemptKind) {
        self.sent += 1;
        let (setup, now) = (self.setup, self.now);
        let request = &mut self.requests[index];
        assert!(!request.is_over && !request.is_committed, "a response has gone to the client");
        assert!(request.deadline.is_none_or(|deadline| now + MS <= deadline), "no time is left");
        assert!(!request.has_lost_body, "its body cannot be sent again");
        assert!(request.first.is_some(), "no permit");
        let method = &METHODS[usize::from(request.arrival.method)];
        let is_idempotent = [Method::GET, Method::DELETE].contains(method) || request.arrival.idempotency_key;
        let may_repeat = match setup.retry.as_ref().map(|retry| &retry.methods) {
            None | Some(RetryMethods::Idempotent) => is_idempotent,
            Some(RetryMethods::All) => true,
            Some(RetryMethods::Listed(names)) => names.iter().any(|name| name == method.as_str()),
        };
        // What is hedged is idempotent, and was sent twice already.
        let may_repeat = may_repeat || (is_idempotent && request.was_hedged);
        assert!(may_repeat || !request.is_touched, "{method} a second time");
        match kind {
            AttemptKind::First | AttemptKind::Fallback => request.counting += 1,
            AttemptKind::Retry | AttemptKind::Hedge => {
                assert!(kind == AttemptKind::Hedge || !setup.observes_retries, "retries are only observed");
                request.counting += 1;
                let granted =
                    if kind == AttemptKind::Hedge { now } else { request.granted.expect("a grant") };
                self.charged.push(granted);
            }
            AttemptKind::Reconnect => request.reconnects += 1,
            AttemptKind::NextEndpoint | AttemptKind::Sibling => request.elsewhere += 1,
        }
        let max = setup.retry.as_ref().map_or(0, |retry| retry.max);
        assert!(request.counting <= 1 + max, "{} attempts", request.counting);
        let is_at_most_once = setup.retry.as_ref().is_some_and(|retry| retry.max == 0);
        let free = if is_at_most_once { 0 } else { 1 + MAX_RESENDS };
        assert!(request.reconnects <= free, "{} free attempts", request.reconnects);
        assert!(request.elsewhere <= setup.endpoints as u32, "{} moves", request.elsewhere);
    }

    fn send(&mut self, index: usize, next: NextAttempt) {
        self.check_send(index, next.kind);
        let request = &mut self.requests[index];
        request.is_hedged = false;
        let method = &METHODS[usize::from(request.arrival.method)];
        let call = hedge::HedgeCandidate {
            method,
            idempotency_key: request.arrival.idempotency_key,
            body_ready: true,
            // That is the machine's to count.
            attempts: 0,
            max_retries: 1,
            breaker_closed: self.breaker.is_closed(),
        };
        let after = |ms| HedgeSettings { after: HedgeAfter::Fixed(HumanDuration::from_millis(ms)) };
        let hedge = self.setup.hedge_ms.and_then(|ms| after(ms).delay(&call, |_| None));
        self.fly(index, RequestCopy::First);
        if let Some(delay) = hedge {
            let sent = self.sent;
            self.schedule(self.now + delay, index, Due::Hedge(sent));
        }
    }

    /// Schedules the end of a copy, which the deadline may bring.
    fn fly(&mut self, index: usize, copy: RequestCopy) {
        let (now, sent) = (self.now, self.sent);
        let request = &mut self.requests[index];
        let flight = if copy == RequestCopy::First { &mut request.first } else { &mut request.copy };
        let flight = flight.as_mut().expect("a copy to be sent");
        flight.number = sent;
        let mut end = now + Duration::from_millis(flight.scripted.took_ms);
        if let Some(deadline) = request.deadline.filter(|deadline| *deadline < end) {
            end = deadline;
            flight.scripted =
                Scripted { ending: OutcomeKind::Timeout, advice: RetryAdvice::None, ..flight.scripted };
        }
        self.schedule(end, index, Due::End(copy, sent));
    }

    fn hedge(&mut self, index: usize, number: u32) {
        if self.requests[index].first.as_ref().is_none_or(|first| first.number != number) {
            return;
        }
        let time_left = self.time_left(index);
        self.step(index, Event::HedgeDue { time_left });
    }

    fn pick_copy(&mut self, index: usize) -> Option<Event> {
        let (healthy, now) = (self.healthy(), self.at());
        let request = &self.requests[index];
        let avoided = request.first.as_ref().map(|flight| flight.endpoint);
        let failed = request.plan.failed_endpoints();
        let endpoint = (0..healthy).find(|other| !failed.contains(other) && Some(*other) != avoided)?;
        if !self.breaker.is_closed() {
            return None;
        }
        let permit = self.breaker.admit(now).permit.ok()?;
        let scripted = self.next_scripted();
        self.requests[index].copy = Some(Flight { endpoint, began: self.now, permit, scripted, number: 0 });
        Some(Event::CopyAdmitted { endpoint })
    }

    fn send_copy(&mut self, index: usize) {
        // A copy of what may be under way.
        let request = &mut self.requests[index];
        (request.is_hedged, request.was_hedged) = (true, true);
        self.check_send(index, AttemptKind::Hedge);
        self.fly(index, RequestCopy::Hedge);
    }

    fn ended(&mut self, index: usize, copy: RequestCopy, number: u32) {
        let request = &mut self.requests[index];
        let flight = if copy == RequestCopy::First { &request.first } else { &request.copy };
        // Timers of earlier attempts do not matter any more.
        let Some(flight) = flight.as_ref().filter(|flight| flight.number == number) else { return };
        if !request.is_hedged {
            let flight = request.first.take().expect("an attempt");
            let event = self.judge(index, flight);
            return self.step(index, event);
        }
        let succeeded = flight.scripted.is_success();
        self.step(index, Event::CopyEnded { copy, succeeded });
        // The copy that lost is reported, and its permit with it.
        let request = &mut self.requests[index];
        let flight = if copy == RequestCopy::First { &mut request.first } else { &mut request.copy };
        if let Some(lost) = flight.take_if(|flight| flight.number == number) {
            self.judge(index, lost);
        }
    }

    /// Reports an outcome as the proxy does.
    fn judge(&mut self, index: usize, flight: Flight) -> Event {
        let Flight { endpoint, began, permit, scripted, .. } = flight;
        let (now, outcome) = (self.at(), scripted.outcome());
        let (breaker, random) = (Arc::clone(&self.breaker), self.random());
        let evidence = EndpointOutcome::new(&outcome, outcome.health(), false);
        self.outliers.report(
            &address(endpoint),
            &self.health[endpoint],
            evidence,
            (self.start + began, now),
            random,
        );
        breaker.report(permit, outcome.health(), now, random);
        let reached = match outcome.kind {
            OutcomeKind::Connect(_) | OutcomeKind::RefusedStream => false,
            OutcomeKind::Reset(reset) => reset.request_sent,
            _ => outcome.advice != RetryAdvice::Elsewhere,
        };
        let time_left = self.time_left(index);
        let healthy = self.healthy();
        let request = &mut self.requests[index];
        request.is_touched |= reached;
        if scripted.is_success() {
            request.is_committed = true;
            return Event::Succeeded;
        }
        request.has_lost_body |= scripted.loses_body;
        let failed = request.plan.failed_endpoints();
        let untried = |other: &usize| *other != endpoint && !failed.contains(other);
        Event::Failed(AttemptFailure {
            endpoint,
            outcome,
            hint: scripted.hint,
            body: if request.has_lost_body { BodyState::NotKept } else { BodyState::Replayable },
            time_left,
            random,
            is_absent: self.health[endpoint].is_absent(),
            has_alternative: (0..healthy).filter(untried).any(|other| self.health[other].is_available(now)),
            has_sibling: self.setup.are_siblings && (0..self.setup.endpoints).any(|other| untried(&other)),
        })
    }

    fn finish(&mut self, index: usize, finish: Finish) {
        let (now, granted) = (self.at(), self.now);
        let request = &mut self.requests[index];
        if finish == Finish::Result(Stop::Observed) {
            // It would have been sent, and is charged as if it were.
            self.charged.push(granted);
        }
        // Whatever comes after that, nothing is done any more.
        let events = [
            Event::Ready { time_left: None },
            Event::Admitted,
            Event::Picked { has_body: true },
            Event::Succeeded,
            Event::HedgeDue { time_left: None },
            Event::CopyAdmitted { endpoint: 0 },
        ];
        for event in events {
            let action = request.plan.next(event, now);
            assert!(matches!(action, Action::Finish(_)), "{action:?} after the end");
        }
        (request.permit, request.first, request.copy) = (None, None, None);
        request.is_over = true;
    }

    /// What holds when all requests are over.
    fn check_end(&mut self) {
        assert!(self.requests.iter().all(|request| request.is_over), "a request was forgotten");
        let budget = self.setup.retry.clone().unwrap_or_default().budget;
        let window = budget.window.0;
        self.charged.sort_unstable();
        for from in &self.charged {
            let within = |at: &&Duration| **at >= *from && **at <= *from + window;
            let (charged, requests) =
                (self.charged.iter().filter(within).count(), self.arrived.iter().filter(within).count());
            let bound = budget.bound(requests as u64);
            assert!(charged as f64 <= bound + 1e-6, "{charged} retries, {bound} allowed");
        }
        // Whatever was granted and not sent has gone back.
        if *budget.ratio == 0.0 {
            let open = self.charged.iter().filter(|at| self.now - **at <= window).count();
            let places = (f64::from(budget.min_per_second) * window.as_secs_f64()) as usize;
            assert_eq!(self.limits.budget.available(self.at()), places - open, "grants are lost");
        }
        // A trial's permit holds the breaker.
        assert_eq!(Arc::strong_count(&self.breaker), 1, "permits are lost");
    }
}

/// An event must be followed by what it allows, and the machine must not give up where it need not.
fn check_answer(event: &Event, action: &Action) {
    let in_time = |time_left: &Option<Duration>| time_left.is_none_or(|left| left >= MS);
    match event {
        Event::Ready { time_left } if in_time(time_left) => assert_eq!(*action, Action::Admit),
        Event::Admitted => assert_eq!(*action, Action::Pick),
        Event::Picked { has_body: true } => assert!(matches!(action, Action::Send(_)), "{action:?}"),
        Event::Failed(failed) if failed.body == BodyState::NotKept => {
            // That one of two loopback addresses refuses a connection is found out before the body matters.
            let is_sibling = failed.has_sibling && matches!(failed.outcome.kind, OutcomeKind::Connect(_));
            assert!(is_sibling || matches!(action, Action::Finish(_)), "{action:?} without a body");
        }
        _ => {}
    }
}

impl Scripted {
    fn is_success(&self) -> bool {
        matches!(self.ending, OutcomeKind::Http(status) if status.is_success())
    }

    fn outcome(&self) -> AttemptOutcome {
        AttemptOutcome { kind: self.ending, advice: self.advice }
    }
}

fn http(code: u16) -> OutcomeKind {
    OutcomeKind::Http(StatusCode::from_u16(code).unwrap())
}

fn ending() -> impl Strategy<Value = OutcomeKind> {
    let reset = |(reused, request_sent, response_begun)| {
        OutcomeKind::Reset(Reset { reused, request_sent, response_started: response_begun })
    };
    prop_oneof![
        4 => Just(http(200)),
        4 => Just(http(503)),
        1 => Just(http(500)),
        3 => Just(OutcomeKind::Connect(ConnectFailure::Refused)),
        1 => Just(OutcomeKind::Connect(ConnectFailure::PeerIdentity)),
        2 => Just(OutcomeKind::RefusedStream),
        3 => (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(reset),
        2 => Just(OutcomeKind::AttemptTimeout),
    ]
}

fn scripted() -> impl Strategy<Value = Scripted> {
    let advice = prop_oneof![6 => Just(RetryAdvice::None), 1 => Just(RetryAdvice::No), 2 => Just(RetryAdvice::Elsewhere)];
    let hint = prop_oneof![
        8 => Just(RetryHint::None),
        1 => (1u64..200).prop_map(|ms| RetryHint::After(Duration::from_millis(ms))),
        1 => (0u64..200).prop_map(|ms| RetryHint::Exactly(Duration::from_millis(ms))),
        1 => Just(RetryHint::Never),
    ];
    (0u64..60, ending(), advice, hint, prop::bool::weighted(0.05)).prop_map(
        |(took_ms, ending, advice, hint, loses_body)| {
            // Only a response can bring advice, and one that is no failure is not refused.
            let is_failure = matches!(ending, OutcomeKind::Http(status) if status.is_server_error());
            let advice = if is_failure { advice } else { RetryAdvice::None };
            Scripted { took_ms, ending, advice, hint, loses_body }
        },
    )
}

fn arrival() -> impl Strategy<Value = Arrival> {
    (
        0u64..30,
        0u8..4,
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.1),
        prop::option::of(1u64..300),
        prop::option::weighted(0.1, 0u64..200),
    )
        .prop_map(|(after_ms, method, idempotency_key, is_grpc, deadline_ms, leaves_ms)| Arrival {
            after_ms,
            method,
            idempotency_key,
            is_grpc,
            deadline_ms,
            leaves_ms,
        })
}

fn retry() -> impl Strategy<Value = Option<RetrySettings>> {
    let methods = prop_oneof![
        4 => Just(RetryMethods::Idempotent),
        1 => Just(RetryMethods::All),
        1 => Just(RetryMethods::Listed(vec!["PATCH".to_owned(), "GET".to_owned()])),
    ];
    let budget = (prop_oneof![Just(0.0), Just(0.2), Just(1.0)], 0u32..40, 100u64..2000).prop_map(
        |(ratio, min_per_second, window)| BudgetSettings {
            ratio: Ratio::constant(ratio),
            min_per_second,
            window: HumanDuration::from_millis(window),
        },
    );
    let settings = (0u32..4, methods, budget, 0u64..40).prop_map(|(max, methods, budget, base)| {
        let backoff = BackoffSettings { base: HumanDuration::from_millis(base), ..Default::default() };
        RetrySettings { max, methods, budget, backoff, ..RetrySettings::default() }
    });
    prop::option::weighted(0.9, settings)
}

fn setup() -> impl Strategy<Value = Setup> {
    let breaker = (1u32..12, 1u32..4, 1u64..200).prop_map(|(failures, trial_requests, open_ms)| {
        let open_for =
            GrowingDuration { base: HumanDuration::from_millis(open_ms), max: HumanDuration::from_secs(60) };
        BreakerSettings { consecutive_failures: failures, trial_requests, open_for, ..Default::default() }
    });
    let endpoints = (1usize..4, any::<bool>(), prop::bool::weighted(0.2));
    (
        retry(),
        breaker,
        prop::option::of(0u64..40),
        prop::bool::weighted(0.1),
        endpoints,
        prop::collection::vec(scripted(), 1..30),
        prop::collection::vec(arrival(), 1..25),
        any::<u64>(),
    )
        .prop_map(|(retry, breaker, hedge_ms, observes_retries, endpoints, script, arrivals, seed)| {
            let (endpoints, last_is_unhealthy, are_siblings) = endpoints;
            Setup {
                retry,
                breaker,
                hedge_ms,
                observes_retries,
                endpoints,
                last_is_unhealthy,
                are_siblings,
                script,
                arrivals,
                seed,
            }
        })
}

/// Plays a schedule to its end. Returns how many retries, hedges, free attempts and moves there were.
fn play(setup: &Setup) -> [u32; 4] {
    let policy = RetryPolicy::new(setup.retry.clone());
    let start = Instant::now();
    let budget = RetryBudget::new(setup.retry.clone().unwrap_or_default().budget);
    let moves = RateSettings { rate: 1000, burst: 1000, per: RateKey::Upstream };
    let moves = RateLimit::new(&moves, start, RandomState::new());
    let limits = SharedLimits { budget: &budget, moves: &moves };
    let mut world = World::new(setup, &policy, limits, start);
    world.run();
    world.check_end();
    let sum = |what: fn(&Request<'_>) -> u32| world.requests.iter().map(what).sum();
    [
        sum(|request| request.counting.saturating_sub(1)),
        sum(|request| u32::from(request.was_hedged)),
        sum(|request| request.reconnects),
        sum(|request| request.elsewhere),
    ]
}

/// Schedules in which nothing happens would show nothing.
#[test]
fn the_schedules_have_everything_that_can_happen() {
    let mut runner = TestRunner::deterministic();
    let mut met = [0; 4];
    for _ in 0..100 {
        let setup = setup().new_tree(&mut runner).unwrap().current();
        met.iter_mut().zip(play(&setup)).for_each(|(all, one)| *all += one);
    }
    assert!(met.iter().all(|count| *count > 20), "{met:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Attempts within their number, budget, deadline; nothing after the response, nothing twice that must not be; every
    /// permit and grant returned; an end.
    #[test]
    fn no_schedule_breaks_a_rule_of_retries(setup in setup()) {
        play(&setup);
    }
}
