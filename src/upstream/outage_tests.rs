//! Partial and whole outages in virtual time: the decisions that run (balancer, outlier detection, breaker, budget,
//! retries) before simulated replicas.

use std::{
    collections::BTreeMap,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{Method, StatusCode};
use proptest::prelude::*;

use super::{
    Found, Upstream,
    balance::hash_key,
    local::{InFlight, LocalEndpoint, LocalUpstream, Probe, Wanted},
};
use crate::{
    config::{Balance, Policy},
    resilience::{
        backoff::Hint,
        breaker::{Permit, State},
        classify::{Advice, ConnectFailure, Ending, Health, Outcome, Reset},
        outlier::{Evidence, Question},
        retry::{Body, Decision, Moment, RetryPolicy, RetrySettings, Tried},
    },
    rng::Rng,
};

const MS: Duration = Duration::from_millis(1);
const LATENCY: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Well,
    /// Its port refuses, its connections are reset.
    Down,
    /// Its sidecar accepts, and has no service behind it.
    Elsewhere,
    /// It answers 503.
    Failing,
    /// It accepts connections and resets them, those that are pooled as well, once a request comes.
    Resetting,
    /// The TLS handshake fails, as by a mistaken CRL.
    Untrusted,
}

/// What a replica is like, from when on, in milliseconds.
type Schedule = Vec<(u64, Mode)>;

struct Attempt {
    index: usize,
    began: Duration,
    permit: Permit,
    outcome: Outcome,
    _in_flight: InFlight,
}

#[derive(Default)]
struct Call {
    tries: u32,
    tried: Vec<usize>,
    free_used: bool,
    waiting_since: Option<Duration>,
    attempt: Option<Attempt>,
}

struct Lab {
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
    events: BTreeMap<(Duration, u64), Call>,
    number: u64,
    sent: u32,
    /// When a call failed.
    failed: Vec<Duration>,
    openings: u32,
}

impl Lab {
    fn new(schedules: Vec<Schedule>, balance: &Balance, seed: u64) -> Self {
        let upstream = Upstream::new("up");
        let found = |(port, _): (usize, _)| Found {
            address: ([10, 0, 0, 1], port as u16 + 1).into(),
            host: None,
            weight: 1,
        };
        upstream.publish(schedules.iter().enumerate().map(found).collect());
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
        past.last().map_or(Mode::Well, |(_, mode)| *mode)
    }

    /// When a replica goes down within a request's time.
    fn goes_down(&self, index: usize, end: Duration) -> Option<Duration> {
        let changes = self.schedules[index].iter().map(|(from, mode)| (Duration::from_millis(*from), *mode));
        let mut downs = changes.filter(|(_, mode)| *mode == Mode::Down).map(|(from, _)| from);
        downs.find(|from| *from > self.now && *from <= end)
    }

    fn at(&self) -> Instant {
        self.start + self.now
    }

    fn schedule(&mut self, at: Duration, call: Call) {
        self.number += 1;
        self.events.insert((at, self.number), call);
    }

    /// Calls at a fixed rate for so long.
    fn run(&mut self, rate: u64, seconds: u64) -> &mut Self {
        for number in 0..rate * seconds {
            let at = Duration::from_micros(number * 1_000_000 / rate);
            self.schedule(at, Call { tries: 1, ..Call::default() });
            self.sent += 1;
        }
        while let Some(((at, _), call)) = self.events.pop_first() {
            self.ask_absent(at);
            self.now = at;
            self.step(call);
        }
        self
    }

    /// What the control thread does up to then.
    fn ask_absent(&mut self, until: Duration) {
        let guards = Arc::clone(&self.upstream.guards);
        while let Some(at) = guards.outliers.next_question().filter(|at| *at <= self.start + until) {
            self.now = self.now.max(at.saturating_duration_since(self.start));
            for question in guards.outliers.questions(16, self.at().max(at)) {
                let may_try = match question {
                    Question::Request(_) => true,
                    Question::Connection(address) => {
                        let index = usize::from(address.port()) - 1;
                        let accepts = self.mode(index, self.now) != Mode::Down;
                        guards.outliers.answered(&address, accepts, self.at())
                    }
                };
                if may_try {
                    guards.breaker.offer_trial();
                }
            }
        }
    }

    fn step(&mut self, mut call: Call) {
        match call.attempt.take() {
            Some(attempt) => self.finished(call, attempt),
            None => self.attempt(call),
        }
    }

    fn attempt(&mut self, mut call: Call) {
        let (guards, now) = (Arc::clone(&self.upstream.guards), self.at());
        if call.tries == 1 && call.tried.is_empty() && call.waiting_since.is_none() {
            guards.budget.deposit();
        }
        let admission = guards.breaker.admit(now);
        guards.note("up", admission.transition);
        let Ok(permit) = admission.permit else {
            let since = *call.waiting_since.get_or_insert(self.now);
            if guards.absence.is_absent() && self.now - since < self.retries.patience() {
                return self.schedule(self.now + MS * 5, call);
            }
            return self.failed.push(self.now);
        };
        let wanted = Wanted { tried: &call.tried, hash: None, probe: Some(Probe::Repeatable) };
        let Some(index) = self.local.pick(&self.endpoints, &wanted, now, &mut self.rng) else {
            return self.failed.push(self.now);
        };
        let reused = self.pooled[index] > 0;
        self.pooled[index] -= u32::from(reused);
        let http = |status| Ending::Http(StatusCode::from_u16(status).unwrap());
        let (took, ending, advice) = match self.mode(index, self.now) {
            Mode::Well => (LATENCY, http(200), Advice::None),
            Mode::Down => (MS, Ending::Connect(ConnectFailure::Refused), Advice::None),
            Mode::Elsewhere => (MS * 2, http(502), Advice::Elsewhere),
            Mode::Failing => (MS * 2, http(503), Advice::None),
            Mode::Resetting => {
                let reset = Reset { reused, request_sent: true, response_begun: false };
                (MS, Ending::Reset(reset), Advice::None)
            }
            Mode::Untrusted => (MS * 3, Ending::Connect(ConnectFailure::PeerIdentity), Advice::None),
        };
        let mut outcome = Outcome { ending, advice };
        let mut end = self.now + took;
        if let Some(down) = self.goes_down(index, end).filter(|_| ending == http(200)) {
            let reset = Reset { reused: false, request_sent: true, response_begun: false };
            (end, outcome) = (down, Outcome::new(Ending::Reset(reset)));
        }
        let _in_flight = self.endpoints[index].ask(now);
        call.attempt = Some(Attempt { index, began: self.now, permit, outcome, _in_flight });
        self.schedule(end, call);
    }

    fn finished(&mut self, mut call: Call, attempt: Attempt) {
        let Attempt { index, began, permit, outcome, _in_flight } = attempt;
        let (guards, now) = (Arc::clone(&self.upstream.guards), self.at());
        let endpoint = Rc::clone(&self.endpoints[index]);
        let health = outcome.health();
        if health == Health::Success {
            endpoint.observe(self.now - began, now);
        } else {
            endpoint.observe_failure(self.now - began, now);
        }
        let evidence = Evidence::new(&outcome, health, false);
        let random = self.rng.unit_f64();
        endpoint.report(&self.upstream, evidence, (self.start + began, now), || random);
        let blamed = self.local.blame(&endpoint, health, now);
        let transition = guards.report("up", permit, (blamed, evidence.is_absence()), now, random);
        self.openings += u32::from(transition.is_some_and(|transition| transition.to == State::Open));
        if outcome.ending.is_answer() {
            self.pooled[index] += 1;
        }
        if health == Health::Success {
            return;
        }
        let another = |(other, endpoint): (usize, &Rc<LocalEndpoint>)| {
            other != index && !call.tried.contains(&other) && endpoint.is_usable(now)
        };
        if !call.tried.contains(&index)
            && self.retries.may_move_on(&outcome, endpoint.is_absent(), Body::Untouched)
            && self.endpoints.iter().enumerate().any(another)
        {
            call.tried.push(index);
            return self.schedule(self.now, call);
        }
        let tried = Tried {
            method: &Method::GET,
            grpc: false,
            idempotency_key: false,
            tries: call.tries,
            free_used: call.free_used,
            resent: 0,
            body: Body::Untouched,
            committed: false,
        };
        let moment = Moment { now, time_left: None, hint: Hint::None, random, budget: &guards.budget };
        match self.retries.decide(&tried, &outcome, &moment) {
            Decision::Retry(retry) if retry.free => {
                call.free_used = true;
                self.schedule(self.now, call);
            }
            Decision::Retry(retry) => {
                call.tries += 1;
                call.tried.push(index);
                self.schedule(self.now + retry.wait, call);
            }
            Decision::Stop(_) => self.failed.push(self.now),
        }
    }

    fn last_failure(&self) -> Duration {
        self.failed.iter().copied().max().unwrap_or_default()
    }
}

/// The same steps for each replica, one after the other, from the second second on.
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
    use Mode::{Down, Elsewhere, Failing, Well};
    vec![
        ("sidecar up before its service", in_turn(&[(Elsewhere, 1500), (Well, 1000)])),
        (
            "service goes before its sidecar",
            in_turn(&[(Elsewhere, 1000), (Down, 500), (Elsewhere, 1000), (Well, 1000)]),
        ),
        ("kill -9", in_turn(&[(Down, 1500), (Well, 1000)])),
        ("one of three dies", vec![vec![(1000, Down), (9000, Well)], vec![], vec![]]),
        (
            "two of three die",
            vec![vec![(1000, Down), (9000, Well)], vec![(1000, Down), (8000, Well)], vec![]],
        ),
        ("one warming", vec![vec![(1000, Down), (1500, Failing), (4500, Well)], vec![], vec![]]),
        ("rolling, 503 for a second each", in_turn(&[(Failing, 1000), (Down, 1000), (Well, 1000)])),
        (
            "rolling, two away at a time",
            (0..3)
                .map(|n| vec![(1000 + n * 1000, Failing), (2000 + n * 1000, Down), (3000 + n * 1000, Well)])
                .collect(),
        ),
        (
            "two of three fail",
            vec![vec![(1000, Failing), (9000, Well)], vec![(1000, Failing), (8000, Well)], vec![]],
        ),
    ]
}

#[test]
fn what_some_replicas_can_serve_does_not_fail() {
    for (name, schedules) in partial_outages() {
        for balance in [Balance::P2c, Balance::LeastRequest] {
            for rate in [5, 50, 500] {
                let mut lab = Lab::new(schedules.clone(), &balance, rate);
                lab.run(rate, 14);
                println!("{name}, {balance}, {rate}/s: {} of {} failed", lab.failed.len(), lab.sent);
                // Where two are away, the third may go some milliseconds before the first is known to be back.
                assert!(
                    lab.failed.len() as u32 <= lab.sent / 500,
                    "{name}, {balance}, {rate}/s: {:?}",
                    lab.failed
                );
                assert_eq!(lab.openings, 0, "{name}, {balance}, {rate}/s");
            }
        }
    }
}

/// Four of five accept connections and reset them from one moment on. Whoever meets one keeps the others from it, so that
/// few requests meet four of them.
#[test]
fn what_is_left_of_five_serves_where_four_reset_at_the_same_moment() {
    const RUNS: u64 = 300;
    let schedules = [vec![vec![(1000, Mode::Resetting)]; 4], vec![vec![]]].concat();
    for balance in [Balance::P2c, Balance::LeastRequest] {
        for rate in [50, 100, 200] {
            let failed = |seed| Lab::new(schedules.clone(), &balance, seed).run(rate, 3).failed.len();
            let failed: usize = (0..RUNS).map(failed).sum();
            println!("{balance}, {rate}/s: {failed} requests failed in {RUNS} runs");
            assert!(failed as u64 * 2 <= RUNS, "{balance}, {rate}/s: {failed} failed in {RUNS} runs");
        }
    }
}

/// When an upstream is well again after an outage of this length, at the latest: `open_for.base` and 1.25 × the outage.
fn well_within(outage: Duration) -> Duration {
    Duration::from_secs(5) + outage.mul_f64(1.25) + MS * 100
}

/// Seconds for which calls go on after that, to see that it stays well.
const AFTERWARDS: u64 = 10;

/// Nothing is served during an outage of all. Then it is: at most `open_for.base` and 1.25 × the outage after its end; at
/// once where no endpoint answered badly.
#[test]
fn every_whole_outage_ends_in_time() {
    use Mode::{Down, Elsewhere, Failing, Untrusted, Well};
    let all = |steps: &[(u64, Mode)]| vec![steps.to_vec(); 3];
    for length in [50, 500, 2000, 5000, 20_000, 60_000] {
        let end = 1000 + length;
        let outages = [
            ("refusing", true, all(&[(1000, Down), (end, Well)])),
            ("behind a live sidecar", true, all(&[(1000, Elsewhere), (end, Well)])),
            ("untrusted", false, all(&[(1000, Untrusted), (end, Well)])),
            ("503", false, all(&[(1000, Failing), (end, Well)])),
            ("refusing, then warming", true, all(&[(1000, Down), (1000 + length / 2, Failing), (end, Well)])),
            (
                "one refusing, one warming, one behind a live sidecar",
                false,
                vec![
                    vec![(1000, Down), (end, Well)],
                    vec![(1000, Failing), (end, Well)],
                    vec![(1000, Elsewhere), (end, Well)],
                ],
            ),
            ("a single one, behind a live sidecar", true, vec![vec![(1000, Elsewhere), (end, Well)]]),
            (
                "a single one refusing, then warming",
                true,
                vec![vec![(1000, Down), (1000 + length / 2, Failing), (end, Well)]],
            ),
        ];
        // Long outages make many calls; what a high rate changes shows in short ones.
        let rates = if length <= 5000 { [50, 500] } else { [50, 100] };
        for (name, at_once, schedules) in outages {
            for rate in rates {
                let mut lab = Lab::new(schedules.clone(), &Balance::P2c, length);
                let bound = well_within(Duration::from_millis(length));
                lab.run(rate, end / 1000 + bound.as_secs() + AFTERWARDS);
                let (length, end) = (Duration::from_millis(length), Duration::from_millis(end));
                let late = lab.last_failure().saturating_sub(end);
                println!("{name} for {length:?} at {rate}/s: well {late:?} after");
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

/// What belongs together by its hash stays together, also while an absent endpoint waits to be probed.
#[test]
fn a_request_that_is_balanced_by_hash_probes_no_other_endpoint() {
    let mut lab = Lab::new(vec![vec![]; 3], &Balance::HashHeader("x-user".to_owned()), 7);
    let pick = |lab: &Lab, user: u32| {
        let hash = Some(hash_key(&user.to_be_bytes()));
        let wanted = Wanted { tried: &[], hash, probe: Some(Probe::Repeatable) };
        lab.local.pick(&lab.endpoints, &wanted, lab.at(), &mut Rng::from_seed(1)).unwrap()
    };
    let homes: Vec<usize> = (0..300).map(|user| pick(&lab, user)).collect();
    let gone = Rc::clone(&lab.endpoints[0]);
    gone.report(&lab.upstream, Evidence::NoService, (lab.at(), lab.at()), || 0.5);
    assert!(gone.is_absent());
    let mut probes = 0;
    for (user, home) in homes.into_iter().enumerate() {
        lab.now += Duration::from_secs(20);
        let picked = pick(&lab, user as u32);
        match home {
            0 => probes += u32::from(picked == 0),
            home => assert_eq!(picked, home, "user {user}"),
        }
    }
    assert!(probes > 50, "{probes} of about 100 requests whose endpoint it is");
}

fn any_schedule() -> impl Strategy<Value = Schedule> {
    use Mode::{Down, Elsewhere, Failing, Untrusted, Well};
    let mode = prop_oneof![Just(Well), Just(Down), Just(Elsewhere), Just(Failing), Just(Untrusted)];
    prop::collection::vec((mode, 20u64..4000), 0..6).prop_map(|steps| {
        let mut at = 1000;
        let mut schedule = Schedule::new();
        for (mode, time) in steps {
            schedule.push((at, mode));
            at += time;
        }
        schedule.push((at, Well));
        schedule
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn the_breaker_stays_closed_while_one_replica_is_well(
        one in any_schedule(), other in any_schedule(), seed in any::<u64>(),
    ) {
        let mut lab = Lab::new(vec![one, other, vec![]], &Balance::P2c, seed);
        lab.run(100, 25);
        prop_assert_eq!(lab.openings, 0);
        prop_assert!(lab.failed.len() as u32 <= lab.sent / 100, "{:?}", lab.failed);
    }

    #[test]
    fn any_mix_is_well_in_time(schedules in prop::collection::vec(any_schedule(), 1..4), seed in any::<u64>()) {
        let end = schedules.iter().filter_map(|schedule| schedule.last()).map(|(at, _)| *at).max().unwrap_or(1000);
        let mut lab = Lab::new(schedules, &Balance::P2c, seed);
        let bound = well_within(Duration::from_millis(end - 1000));
        lab.run(100, end / 1000 + bound.as_secs() + AFTERWARDS);
        let end = Duration::from_millis(end);
        prop_assert!(lab.last_failure().saturating_sub(end) <= bound, "{:?}", lab.last_failure());
    }
}
