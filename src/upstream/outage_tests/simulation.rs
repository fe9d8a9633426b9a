//! The simulated replicas and their clients.

use super::*;
use crate::{resilience::outlier::AttemptTimes, upstream::policy_state::BreakerOutcome};

pub(super) const MS: Duration = Duration::from_millis(1);
pub(super) const LATENCY: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
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
pub(super) type Schedule = Vec<(u64, Mode)>;

pub(super) struct Attempt {
    pub(super) index: usize,
    pub(super) started: Duration,
    pub(super) permit: BreakerPermit,
    pub(super) outcome: AttemptOutcome,
    pub(super) _in_flight: InFlight,
}

#[derive(Default)]
pub(super) struct SimulatedRequest {
    pub(super) attempts: u32,
    pub(super) tried: Vec<usize>,
    pub(super) free_retry_used: bool,
    pub(super) waiting_since: Option<Duration>,
    pub(super) attempt: Option<Attempt>,
}

pub(super) struct Simulation {
    pub(super) upstream: Arc<Upstream>,
    pub(super) local: Rc<LocalUpstream>,
    pub(super) endpoints: Rc<[Rc<LocalEndpoint>]>,
    pub(super) schedules: Vec<Schedule>,
    /// Idle connections to each replica.
    pub(super) pooled: Vec<u32>,
    pub(super) retries: RetryPolicy,
    pub(super) rng: Rng,
    pub(super) start: Instant,
    pub(super) now: Duration,
    pub(super) events: BTreeMap<(Duration, u64), SimulatedRequest>,
    pub(super) number: u64,
    pub(super) sent: u32,
    /// When requests failed.
    pub(super) failed: Vec<Duration>,
    pub(super) openings: u32,
}

impl Simulation {
    pub(super) fn new(schedules: Vec<Schedule>, balance: &Balance, seed: u64) -> Self {
        let upstream = Upstream::new("up");
        let discovered = |(port, _): (usize, _)| DiscoveredEndpoint {
            address: ([10, 0, 0, 1], port as u16 + 1).into(),
            host: None,
            weight: 1,
        };
        upstream.publish(schedules.iter().enumerate().map(discovered).collect());
        upstream.policy_state.configure(&Policy::default(), Instant::now());
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

    pub(super) fn mode(&self, index: usize, at: Duration) -> Mode {
        let past = self.schedules[index].iter().take_while(|(from, _)| Duration::from_millis(*from) <= at);
        past.last().map_or(Mode::Healthy, |(_, mode)| *mode)
    }

    /// When a replica goes down during a request.
    pub(super) fn goes_down(&self, index: usize, end: Duration) -> Option<Duration> {
        let changes = self.schedules[index].iter().map(|(from, mode)| (Duration::from_millis(*from), *mode));
        let mut downs = changes.filter(|(_, mode)| *mode == Mode::Down).map(|(from, _)| from);
        downs.find(|from| *from > self.now && *from <= end)
    }

    pub(super) fn at(&self) -> Instant {
        self.start + self.now
    }

    pub(super) fn schedule(&mut self, at: Duration, request: SimulatedRequest) {
        self.number += 1;
        self.events.insert((at, self.number), request);
    }

    /// Sends requests at a fixed rate for this many seconds.
    pub(super) fn run(&mut self, rate: u64, seconds: u64) -> &mut Self {
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
    pub(super) fn probe_absent(&mut self, until: Duration) {
        let policy_state = Arc::clone(&self.upstream.policy_state);
        while let Some(at) = policy_state.outliers.next_probe_at().filter(|at| *at <= self.start + until) {
            self.now = self.now.max(at.saturating_duration_since(self.start));
            for question in policy_state.outliers.take_due_probes(16, self.at().max(at)) {
                let may_try = match question {
                    DueProbe::Request(_) => true,
                    DueProbe::Connection(address) => {
                        let index = usize::from(address.port()) - 1;
                        let accepts = self.mode(index, self.now) != Mode::Down;
                        policy_state.outliers.record_connection_probe(&address, accepts, self.at())
                    }
                };
                if may_try {
                    policy_state.breaker.allow_early_trial();
                }
            }
        }
    }

    pub(super) fn step(&mut self, mut request: SimulatedRequest) {
        match request.attempt.take() {
            Some(attempt) => self.record_outcome(request, attempt),
            None => self.attempt(request),
        }
    }

    pub(super) fn attempt(&mut self, mut request: SimulatedRequest) {
        let (policy_state, now) = (Arc::clone(&self.upstream.policy_state), self.at());
        if request.attempts == 1 && request.tried.is_empty() && request.waiting_since.is_none() {
            policy_state.budget.deposit();
        }
        let admission = policy_state.breaker.admit(now);
        policy_state.record_transition("up", admission.transition);
        let Ok(permit) = admission.permit else {
            let since = *request.waiting_since.get_or_insert(self.now);
            if policy_state.reachability.is_unreachable()
                && self.now - since < self.retries.max_absence_wait()
            {
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

    pub(super) fn record_outcome(&mut self, mut request: SimulatedRequest, attempt: Attempt) {
        let Attempt { index, started, permit, outcome, _in_flight } = attempt;
        let (policy_state, now) = (Arc::clone(&self.upstream.policy_state), self.at());
        let endpoint = Rc::clone(&self.endpoints[index]);
        let health = outcome.health();
        if health == Health::Success {
            endpoint.observe_latency(self.now - started, now);
        } else {
            endpoint.observe_failure(self.now - started, now);
        }
        let evidence = EndpointOutcome::new(&outcome, health, false);
        let random = self.rng.unit_f64();
        endpoint.report(
            &self.upstream,
            evidence,
            AttemptTimes { began: self.start + started, ended: now },
            || random,
        );
        let blamed = self.local.health_for_breaker(&endpoint, health, now);
        let transition = policy_state.report(
            "up",
            permit,
            BreakerOutcome { health: blamed, is_absence: evidence.makes_absent() },
            now,
            random,
        );
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
            && self.retries.may_switch_endpoint(&outcome, endpoint.is_absent(), Replayability::Unread)
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
            body: Replayability::Unread,
            is_committed: false,
        };
        let moment = RetryContext {
            now,
            time_left: None,
            hint: RetryHint::None,
            random,
            budget: &policy_state.budget,
        };
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

    pub(super) fn last_failure(&self) -> Duration {
        self.failed.iter().copied().max().unwrap_or_default()
    }
}
