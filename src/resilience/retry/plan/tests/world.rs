//! The requests, upstream and clock of one schedule, and the rules that hold at each step.

use super::*;

pub(super) const MS: Duration = Duration::from_millis(1);
/// More actions than any request can need here.
pub(super) const MOST_ACTIONS: u32 = 100;

/// What an attempt meets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scripted {
    pub(super) took_ms: u64,
    pub(super) ending: OutcomeKind,
    pub(super) advice: RetryAdvice,
    pub(super) hint: RetryHint,
    /// The attempt read more of the body than is kept.
    pub(super) loses_body: bool,
}

/// A request and its moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival {
    pub(super) after_ms: u64,
    pub(super) method: u8,
    pub(super) idempotency_key: bool,
    pub(super) is_grpc: bool,
    pub(super) deadline_ms: Option<u64>,
    /// The client gives up.
    pub(super) leaves_ms: Option<u64>,
}

#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) retry: Option<RetrySettings>,
    pub(super) breaker: BreakerSettings,
    pub(super) hedge_ms: Option<u64>,
    pub(super) observes_retries: bool,
    pub(super) endpoints: usize,
    /// The balancer never chooses the last endpoint: its health checks fail.
    pub(super) last_is_unhealthy: bool,
    /// All are addresses of one loopback host.
    pub(super) are_siblings: bool,
    pub(super) script: Vec<Scripted>,
    pub(super) arrivals: Vec<Arrival>,
    pub(super) seed: u64,
}

/// An attempt under way.
pub(super) struct Flight {
    pub(super) endpoint: usize,
    pub(super) began: Duration,
    pub(super) permit: BreakerPermit,
    pub(super) scripted: Scripted,
    /// Of all sendings; 0 before it is sent.
    pub(super) number: u32,
}

pub(super) struct Request<'a> {
    pub(super) plan: RetryPlan<'a>,
    pub(super) arrival: Arrival,
    pub(super) deadline: Option<Duration>,
    pub(super) permit: Option<BreakerPermit>,
    pub(super) first: Option<Flight>,
    pub(super) copy: Option<Flight>,
    pub(super) is_hedged: bool,
    pub(super) was_hedged: bool,
    pub(super) recovery_until: Duration,
    /// When the budget granted the attempt that is to be sent.
    pub(super) granted: Option<Duration>,
    /// A response that is not a failure has gone to the client.
    pub(super) is_committed: bool,
    /// A byte of it may have reached the service.
    pub(super) is_touched: bool,
    pub(super) has_lost_body: bool,
    pub(super) is_over: bool,
    pub(super) actions: u32,
    pub(super) counting: u32,
    pub(super) reconnects: u32,
    pub(super) elsewhere: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Due {
    Arrival,
    Ready,
    Recovery,
    Hedge(u32),
    End(RequestCopy, u32),
    Leave,
}

pub(super) struct World<'a> {
    pub(super) setup: &'a Setup,
    pub(super) policy: &'a RetryPolicy,
    pub(super) limits: SharedLimits<'a>,
    pub(super) breaker: Arc<Breaker>,
    pub(super) outliers: OutlierDetector,
    pub(super) health: Vec<Arc<EndpointHealth>>,
    pub(super) requests: Vec<Request<'a>>,
    pub(super) queue: BTreeMap<(Duration, u32), (usize, Due)>,
    pub(super) number: u32,
    pub(super) used: usize,
    pub(super) seed: u64,
    pub(super) start: Instant,
    pub(super) now: Duration,
    pub(super) arrived: Vec<Duration>,
    /// When the budget granted each attempt that was sent and had to be granted.
    pub(super) charged: Vec<Duration>,
    pub(super) sent: u32,
}

pub(super) fn address(endpoint: usize) -> SocketAddr {
    ([127, 0, 0, 1], endpoint as u16 + 1).into()
}

pub(super) const METHODS: [Method; 4] = [Method::GET, Method::POST, Method::DELETE, Method::PATCH];

impl<'a> World<'a> {
    pub(super) fn new(
        setup: &'a Setup,
        policy: &'a RetryPolicy,
        limits: SharedLimits<'a>,
        start: Instant,
    ) -> Self {
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

    pub(super) fn schedule(&mut self, at: Duration, index: usize, due: Due) {
        self.number += 1;
        self.queue.insert((at, self.number), (index, due));
    }

    pub(super) fn random(&mut self) -> f64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.seed >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(super) fn at(&self) -> Instant {
        self.start + self.now
    }

    pub(super) fn time_left(&self, index: usize) -> Option<Duration> {
        self.requests[index].deadline.map(|deadline| deadline.saturating_sub(self.now))
    }

    pub(super) fn run(&mut self) {
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

    pub(super) fn forget(&mut self, index: usize) {
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

    pub(super) fn step(&mut self, index: usize, event: Event) {
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

    pub(super) fn admit(&mut self, index: usize) -> Event {
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

    pub(super) fn recover(&mut self, index: usize) {
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

    pub(super) fn healthy(&self) -> usize {
        let all = self.setup.endpoints;
        if self.setup.last_is_unhealthy && all > 1 { all - 1 } else { all }
    }

    pub(super) fn pick(&mut self, index: usize) -> Event {
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

    pub(super) fn next_scripted(&mut self) -> Scripted {
        self.used += 1;
        self.setup.script[(self.used - 1) % self.setup.script.len()]
    }

    pub(super) fn ended(&mut self, index: usize, copy: RequestCopy, number: u32) {
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
}
