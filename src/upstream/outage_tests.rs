//! Partial and whole outages in virtual time: the real decisions (balancer, outlier detection, breaker, budget,
//! retries) with simulated replicas.

use std::{
    collections::BTreeMap,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{Method, StatusCode};
use proptest::prelude::*;

use super::{
    DiscoveredEndpoint, Upstream,
    balance::hash_key,
    local::{InFlight, LocalEndpoint, LocalUpstream, PickCriteria, Probe},
};
use crate::{
    config::{Balance, Policy},
    resilience::{
        backoff::RetryHint,
        breaker::{BreakerPermit, BreakerState},
        classify::{AttemptOutcome, ConnectFailure, Health, OutcomeKind, Reset, RetryAdvice},
        outlier::{DueProbe, EndpointOutcome},
        retry::{BodyState, FailedAttempt, RetryContext, RetryDecision, RetryPolicy, RetrySettings},
    },
    rng::Rng,
};

const MS: Duration = Duration::from_millis(1);
const LATENCY: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Healthy,
    /// It refuses connections, and those that it has are reset.
    Down,
    /// Its sidecar accepts connections, but has no service behind it.
    NoService,
    /// It responds with 503.
    Failing,
    /// It accepts connections and resets them, pooled ones too, as soon as a request arrives.
    Resetting,
    /// The TLS handshake fails, as with a mistaken CRL.
    Untrusted,
}

/// The mode of a replica from each time on, in milliseconds.
type Schedule = Vec<(u64, Mode)>;

struct Attempt {
    index: usize,
    started: Duration,
    permit: BreakerPermit,
    outcome: AttemptOutcome,
    _in_flight: InFlight,
}

#[derive(Default)]
struct SimulatedRequest {
    attempts: u32,
    tried: Vec<usize>,
    free_retry_used: bool,
    waiting_since: Option<Duration>,
    attempt: Option<Attempt>,
}

struct Simulation {
    upstream: Arc<Upstream>,
    local: Rc<LocalUpstream>,
    endpoints: Rc<[Rc<LocalEndpoint>]>,
    schedules: Vec<Schedule>,
    /// Idle connections to each replica.
    pooled: Vec<u32>,
    retries: RetryPolicy,
    rng: Rng,
    start: Instant,
    now: Duration,
    events: BTreeMap<(Duration, u64), SimulatedRequest>,
    number: u64,
    sent: u32,
    /// When requests failed.
    failed: Vec<Duration>,
    openings: u32,
}

impl Simulation {
    fn new(schedules: Vec<Schedule>, balance: &Balance, seed: u64) -> Self {
        let upstream = Upstream::new("up");
        let discovered = |(port, _): (usize, _)| DiscoveredEndpoint {
            address: ([10, 0, 0, 1], port as u16 + 1).into(),
            host: None,
            weight: 1,
        };
        upstream.publish(schedules.iter().enumerate().map(discovered).collect());
        upstream.guards.configure(&Policy::default(), Instant::now());
        let (local, mut rng) = (LocalUpstream::new(Arc::clone(&upstream), balance), Rng::from_seed(seed));
        Self {
            endpoints: local.endpoints(&mut rng),
            retries: RetryPolicy::new(Some(RetrySettings::default())),
            start: Instant::now(),
            now: Duration::ZERO,
            events: BTreeMap::new(),
            number: 0,
            sent: 0,
            failed: Vec::new(),
            openings: 0,
            pooled: vec![0; schedules.len()],
            upstream,
            local,
            schedules,
            rng,
        }
    }

    fn mode(&self, index: usize, at: Duration) -> Mode {
        let past = self.schedules[index].iter().take_while(|(from, _)| Duration::from_millis(*from) <= at);
        past.last().map_or(Mode::Healthy, |(_, mode)| *mode)
    }

    /// When a replica goes down during a request.
    fn goes_down(&self, index: usize, end: Duration) -> Option<Duration> {
        let changes = self.schedules[index].iter().map(|(from, mode)| (Duration::from_millis(*from), *mode));
        let mut downs = changes.filter(|(_, mode)| *mode == Mode::Down).map(|(from, _)| from);
        downs.find(|from| *from > self.now && *from <= end)
    }

    fn at(&self) -> Instant {
        self.start + self.now
    }

    fn schedule(&mut self, at: Duration, request: SimulatedRequest) {
        self.number += 1;
        self.events.insert((at, self.number), request);
    }

    /// Sends requests at a fixed rate for this many seconds.
    fn run(&mut self, rate: u64, seconds: u64) -> &mut Self {
        for number in 0..rate * seconds {
            let at = Duration::from_micros(number * 1_000_000 / rate);
            self.schedule(at, SimulatedRequest { attempts: 1, ..SimulatedRequest::default() });
            self.sent += 1;
        }
        while let Some(((at, _), request)) = self.events.pop_first() {
            self.probe_absent(at);
            self.now = at;
            self.step(request);
        }
        self
    }

    /// What the control thread does until that time.
    fn probe_absent(&mut self, until: Duration) {
        let guards = Arc::clone(&self.upstream.guards);
        while let Some(at) = guards.outliers.next_probe_at().filter(|at| *at <= self.start + until) {
            self.now = self.now.max(at.saturating_duration_since(self.start));
            for question in guards.outliers.take_due_probes(16, self.at().max(at)) {
                let may_try = match question {
                    DueProbe::Request(_) => true,
                    DueProbe::Connection(address) => {
                        let index = usize::from(address.port()) - 1;
                        let accepts = self.mode(index, self.now) != Mode::Down;
                        guards.outliers.record_connection_probe(&address, accepts, self.at())
                    }
                };
                if may_try {
                    guards.breaker.allow_early_trial();
                }
            }
        }
    }

    fn step(&mut self, mut request: SimulatedRequest) {
        match request.attempt.take() {
            Some(attempt) => self.record_outcome(request, attempt),
            None => self.attempt(request),
        }
    }

    fn attempt(&mut self, mut request: SimulatedRequest) {
        let (guards, now) = (Arc::clone(&self.upstream.guards), self.at());
        if request.attempts == 1 && request.tried.is_empty() && request.waiting_since.is_none() {
            guards.budget.deposit();
        }
        let admission = guards.breaker.admit(now);
        guards.record_transition("up", admission.transition);
        let Ok(permit) = admission.permit else {
            let since = *request.waiting_since.get_or_insert(self.now);
            if guards.reachability.is_unreachable() && self.now - since < self.retries.max_absence_wait() {
                return self.schedule(self.now + MS * 5, request);
            }
            return self.failed.push(self.now);
        };
        let wanted = PickCriteria { tried: &request.tried, hash: None, probe: Some(Probe::Repeatable) };
        let Some(index) = self.local.pick(&self.endpoints, &wanted, now, &mut self.rng) else {
            return self.failed.push(self.now);
        };
        let reused = self.pooled[index] > 0;
        self.pooled[index] -= u32::from(reused);
        let http = |status| OutcomeKind::Http(StatusCode::from_u16(status).unwrap());
        let (took, ending, advice) = match self.mode(index, self.now) {
            Mode::Healthy => (LATENCY, http(200), RetryAdvice::None),
            Mode::Down => (MS, OutcomeKind::Connect(ConnectFailure::Refused), RetryAdvice::None),
            Mode::NoService => (MS * 2, http(502), RetryAdvice::Elsewhere),
            Mode::Failing => (MS * 2, http(503), RetryAdvice::None),
            Mode::Resetting => {
                let reset = Reset { reused, request_sent: true, response_started: false };
                (MS, OutcomeKind::Reset(reset), RetryAdvice::None)
            }
            Mode::Untrusted => {
                (MS * 3, OutcomeKind::Connect(ConnectFailure::PeerIdentity), RetryAdvice::None)
            }
        };
        let mut outcome = AttemptOutcome { kind: ending, advice };
        let mut end = self.now + took;
        if let Some(down) = self.goes_down(index, end).filter(|_| ending == http(200)) {
            let reset = Reset { reused: false, request_sent: true, response_started: false };
            (end, outcome) = (down, AttemptOutcome::new(OutcomeKind::Reset(reset)));
        }
        let _in_flight = self.endpoints[index].start_request(now);
        request.attempt = Some(Attempt { index, started: self.now, permit, outcome, _in_flight });
        self.schedule(end, request);
    }

    fn record_outcome(&mut self, mut request: SimulatedRequest, attempt: Attempt) {
        let Attempt { index, started, permit, outcome, _in_flight } = attempt;
        let (guards, now) = (Arc::clone(&self.upstream.guards), self.at());
        let endpoint = Rc::clone(&self.endpoints[index]);
        let health = outcome.health();
        if health == Health::Success {
            endpoint.observe_latency(self.now - started, now);
        } else {
            endpoint.observe_failure(self.now - started, now);
        }
        let evidence = EndpointOutcome::new(&outcome, health, false);
        let random = self.rng.unit_f64();
        endpoint.report(&self.upstream, evidence, (self.start + started, now), || random);
        let blamed = self.local.health_for_breaker(&endpoint, health, now);
        let transition = guards.report("up", permit, (blamed, evidence.makes_absent()), now, random);
        self.openings += u32::from(transition.is_some_and(|transition| transition.to == BreakerState::Open));
        if outcome.kind.is_response() {
            self.pooled[index] += 1;
        }
        if health == Health::Success {
            return;
        }
        let another = |(other, endpoint): (usize, &Rc<LocalEndpoint>)| {
            other != index && !request.tried.contains(&other) && endpoint.is_usable(now)
        };
        if !request.tried.contains(&index)
            && self.retries.may_switch_endpoint(&outcome, endpoint.is_absent(), BodyState::Unread)
            && self.endpoints.iter().enumerate().any(another)
        {
            request.tried.push(index);
            return self.schedule(self.now, request);
        }
        let failed = FailedAttempt {
            is_repeatable: self.retries.is_repeatable(&Method::GET, false),
            is_grpc: false,
            attempts: request.attempts,
            free_retry_used: request.free_retry_used,
            resends: 0,
            body: BodyState::Unread,
            is_committed: false,
        };
        let moment =
            RetryContext { now, time_left: None, hint: RetryHint::None, random, budget: &guards.budget };
        match self.retries.decide(&failed, &outcome, &moment) {
            RetryDecision::Retry(retry) if retry.free => {
                request.free_retry_used = true;
                self.schedule(self.now, request);
            }
            RetryDecision::Retry(retry) => {
                request.attempts += 1;
                request.tried.push(index);
                self.schedule(self.now + retry.wait, request);
            }
            RetryDecision::Stop(_) => self.failed.push(self.now),
        }
    }

    fn last_failure(&self) -> Duration {
        self.failed.iter().copied().max().unwrap_or_default()
    }
}

/// The same steps for each replica, one after the other, starting after one second.
fn in_turn(steps: &[(Mode, u64)]) -> Vec<Schedule> {
    let mut at = 1000;
    (0..3)
        .map(|_| {
            let mut schedule = Schedule::new();
            for (mode, time) in steps {
                schedule.push((at, *mode));
                at += time;
            }
            schedule
        })
        .collect()
}

fn partial_outages() -> Vec<(&'static str, Vec<Schedule>)> {
    use Mode::{Down, Failing, Healthy, NoService};
    vec![
        ("sidecar up before its service", in_turn(&[(NoService, 1500), (Healthy, 1000)])),
        (
            "service goes before its sidecar",
            in_turn(&[(NoService, 1000), (Down, 500), (NoService, 1000), (Healthy, 1000)]),
        ),
        ("kill -9", in_turn(&[(Down, 1500), (Healthy, 1000)])),
        ("one of three dies", vec![vec![(1000, Down), (9000, Healthy)], vec![], vec![]]),
        (
            "two of three die",
            vec![vec![(1000, Down), (9000, Healthy)], vec![(1000, Down), (8000, Healthy)], vec![]],
        ),
        ("one warming", vec![vec![(1000, Down), (1500, Failing), (4500, Healthy)], vec![], vec![]]),
        ("rolling, 503 for a second each", in_turn(&[(Failing, 1000), (Down, 1000), (Healthy, 1000)])),
        (
            "rolling, two away at a time",
            (0..3)
                .map(|n| {
                    vec![(1000 + n * 1000, Failing), (2000 + n * 1000, Down), (3000 + n * 1000, Healthy)]
                })
                .collect(),
        ),
        (
            "two of three fail",
            vec![vec![(1000, Failing), (9000, Healthy)], vec![(1000, Failing), (8000, Healthy)], vec![]],
        ),
    ]
}

#[test]
fn no_request_fails_that_some_replica_can_serve() {
    for (name, schedules) in partial_outages() {
        for balance in [Balance::P2c, Balance::LeastRequest] {
            for rate in [5, 50, 500] {
                let mut simulation = Simulation::new(schedules.clone(), &balance, rate);
                simulation.run(rate, 14);
                println!(
                    "{name}, {balance}, {rate}/s: {} of {} failed",
                    simulation.failed.len(),
                    simulation.sent
                );
                // With two away, the third may go some milliseconds before the first is known to be back.
                assert!(
                    simulation.failed.len() as u32 <= simulation.sent / 500,
                    "{name}, {balance}, {rate}/s: {:?}",
                    simulation.failed
                );
                assert_eq!(simulation.openings, 0, "{name}, {balance}, {rate}/s");
            }
        }
    }
}

/// Four of five accept connections and reset them from the same moment on. Each request that hits one keeps other
/// requests away from it, so few requests hit all four.
#[test]
fn the_last_of_five_serves_when_four_reset_at_the_same_moment() {
    const RUNS: u64 = 300;
    let schedules = [vec![vec![(1000, Mode::Resetting)]; 4], vec![vec![]]].concat();
    for balance in [Balance::P2c, Balance::LeastRequest] {
        for rate in [50, 100, 200] {
            let failed = |seed| Simulation::new(schedules.clone(), &balance, seed).run(rate, 3).failed.len();
            let failed: usize = (0..RUNS).map(failed).sum();
            println!("{balance}, {rate}/s: {failed} requests failed in {RUNS} runs");
            assert!(failed as u64 * 2 <= RUNS, "{balance}, {rate}/s: {failed} failed in {RUNS} runs");
        }
    }
}

/// The last endpoint begins to fail just before the first one is back: its probe is in flight when the breaker opens.
#[test]
fn a_probe_that_succeeds_after_the_breaker_opened_leads_to_a_trial() {
    use Mode::{Down, Failing, Healthy};
    for gap in (0..100).step_by(2) {
        for rate in [50, 500] {
            let back = 2000 + gap;
            let schedules = vec![
                vec![(1000, Down), (back, Healthy)],
                vec![(1000, Down), (9000, Healthy)],
                vec![(2000, Failing), (9000, Healthy)],
            ];
            let mut simulation = Simulation::new(schedules, &Balance::P2c, gap);
            simulation.run(rate, 9);
            let late = simulation.last_failure().saturating_sub(Duration::from_millis(back));
            assert!(late <= MS * 200, "back after {gap} ms at {rate}/s: failed for {late:?} more");
        }
    }
}

/// The latest time by which an upstream recovers after an outage of this length: `open_for.base` and 1.25 × the
/// outage.
fn recovery_bound(outage: Duration) -> Duration {
    Duration::from_secs(5) + outage.mul_f64(1.25) + MS * 100
}

/// Seconds for which requests continue after that, to see that it stays healthy.
const COOL_DOWN: u64 = 10;

/// Nothing is served during a complete outage. Afterwards it is: at most `open_for.base` and 1.25 × the outage after
/// its end; at once if no endpoint responded with an error.
#[test]
fn every_complete_outage_ends_in_time() {
    use Mode::{Down, Failing, Healthy, NoService, Untrusted};
    let all = |steps: &[(u64, Mode)]| vec![steps.to_vec(); 3];
    for length in [50, 500, 2000, 5000, 20_000, 60_000] {
        let end = 1000 + length;
        let outages = [
            ("refusing", true, all(&[(1000, Down), (end, Healthy)])),
            ("behind a live sidecar", true, all(&[(1000, NoService), (end, Healthy)])),
            ("untrusted", false, all(&[(1000, Untrusted), (end, Healthy)])),
            ("503", false, all(&[(1000, Failing), (end, Healthy)])),
            (
                "refusing, then warming",
                true,
                all(&[(1000, Down), (1000 + length / 2, Failing), (end, Healthy)]),
            ),
            (
                "one refusing, one warming, one behind a live sidecar",
                false,
                vec![
                    vec![(1000, Down), (end, Healthy)],
                    vec![(1000, Failing), (end, Healthy)],
                    vec![(1000, NoService), (end, Healthy)],
                ],
            ),
            ("a single one, behind a live sidecar", true, vec![vec![(1000, NoService), (end, Healthy)]]),
            (
                "a single one refusing, then warming",
                true,
                vec![vec![(1000, Down), (1000 + length / 2, Failing), (end, Healthy)]],
            ),
        ];
        // Long outages mean many requests; the effect of a high rate shows in short ones.
        let rates = if length <= 5000 { [50, 500] } else { [50, 100] };
        for (name, at_once, schedules) in outages {
            for rate in rates {
                let mut simulation = Simulation::new(schedules.clone(), &Balance::P2c, length);
                let bound = recovery_bound(Duration::from_millis(length));
                simulation.run(rate, end / 1000 + bound.as_secs() + COOL_DOWN);
                let (length, end) = (Duration::from_millis(length), Duration::from_millis(end));
                let late = simulation.last_failure().saturating_sub(end);
                println!("{name} for {length:?} at {rate}/s: healthy after {late:?}");
                assert!(late <= bound, "{name} for {length:?} at {rate}/s: {late:?}");
                if at_once && !name.contains("warming") {
                    assert!(
                        late <= Duration::from_millis(1200),
                        "{name} for {length:?} at {rate}/s: {late:?}"
                    );
                }
            }
        }
    }
}

/// Requests with the same hash stay together, even while an absent endpoint waits to be probed.
#[test]
fn a_request_balanced_by_hash_probes_no_other_endpoint() {
    let mut simulation = Simulation::new(vec![vec![]; 3], &Balance::HashHeader("x-user".to_owned()), 7);
    let pick = |simulation: &Simulation, user: u32| {
        let hash = Some(hash_key(&user.to_be_bytes()));
        let wanted = PickCriteria { tried: &[], hash, probe: Some(Probe::Repeatable) };
        simulation
            .local
            .pick(&simulation.endpoints, &wanted, simulation.at(), &mut Rng::from_seed(1))
            .unwrap()
    };
    let homes: Vec<usize> = (0..300).map(|user| pick(&simulation, user)).collect();
    let gone = Rc::clone(&simulation.endpoints[0]);
    gone.report(&simulation.upstream, EndpointOutcome::NoService, (simulation.at(), simulation.at()), || 0.5);
    assert!(gone.is_absent());
    let mut probes = 0;
    for (user, home) in homes.into_iter().enumerate() {
        simulation.now += Duration::from_secs(20);
        let picked = pick(&simulation, user as u32);
        match home {
            0 => probes += u32::from(picked == 0),
            home => assert_eq!(picked, home, "user {user}"),
        }
    }
    assert!(probes > 50, "{probes} of about 100 requests whose endpoint it is");
}

fn any_schedule() -> impl Strategy<Value = Schedule> {
    use Mode::{Down, Failing, Healthy, NoService, Untrusted};
    let mode = prop_oneof![Just(Healthy), Just(Down), Just(NoService), Just(Failing), Just(Untrusted)];
    prop::collection::vec((mode, 20u64..4000), 0..6).prop_map(|steps| {
        let mut at = 1000;
        let mut schedule = Schedule::new();
        for (mode, time) in steps {
            schedule.push((at, mode));
            at += time;
        }
        schedule.push((at, Healthy));
        schedule
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn the_breaker_stays_closed_while_one_replica_is_healthy(
        one in any_schedule(), other in any_schedule(), seed in any::<u64>(),
    ) {
        let mut simulation = Simulation::new(vec![one, other, vec![]], &Balance::P2c, seed);
        simulation.run(100, 25);
        prop_assert_eq!(simulation.openings, 0);
        prop_assert!(simulation.failed.len() as u32 <= simulation.sent / 100, "{:?}", simulation.failed);
    }

    #[test]
    fn any_mix_recovers_in_time(schedules in prop::collection::vec(any_schedule(), 1..4), seed in any::<u64>()) {
        let end = schedules.iter().filter_map(|schedule| schedule.last()).map(|(at, _)| *at).max().unwrap_or(1000);
        let mut simulation = Simulation::new(schedules, &Balance::P2c, seed);
        let bound = recovery_bound(Duration::from_millis(end - 1000));
        simulation.run(100, end / 1000 + bound.as_secs() + COOL_DOWN);
        let end = Duration::from_millis(end);
        prop_assert!(simulation.last_failure().saturating_sub(end) <= bound, "{:?}", simulation.last_failure());
    }
}
