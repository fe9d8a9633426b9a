use proptest::prelude::*;

use super::*;
use crate::units::HumanDuration;

const S: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);

struct Fleet {
    outliers: OutlierDetector,
    addresses: Vec<SocketAddr>,
}

impl Fleet {
    fn new(count: u16, settings: OutlierSettings, now: Instant) -> Self {
        let addresses: Vec<_> = (1..=count).map(|port| SocketAddr::from(([10, 0, 0, 1], port))).collect();
        let outliers = OutlierDetector::new(settings, now);
        outliers.update(&addresses, now);
        Self { outliers, addresses }
    }

    fn health(&self, index: usize) -> Arc<EndpointHealth> {
        self.outliers.endpoint(&self.addresses[index]).unwrap()
    }

    /// An attempt that began and ended now.
    fn report(&self, index: usize, outcome: EndpointOutcome, now: Instant) -> Option<EndpointChange> {
        self.late_report(index, outcome, AttemptTimes { began: now, ended: now })
    }

    fn late_report(
        &self,
        index: usize,
        outcome: EndpointOutcome,
        times: AttemptTimes,
    ) -> Option<EndpointChange> {
        let address = &self.addresses[index];
        let endpoint = self.outliers.endpoint(address)?;
        self.outliers.report(address, &endpoint, outcome, times, 0.0)
    }

    fn fail(&self, index: usize, times: u32, now: Instant) -> Option<Ejection> {
        let changes = (0..times).filter_map(|_| self.report(index, EndpointOutcome::Failure, now));
        changes
            .filter_map(
                |change| if let EndpointChange::Ejected(ejection) = change { Some(ejection) } else { None },
            )
            .last()
    }

    fn ejected(&self, now: Instant) -> usize {
        let is_ejected = |address| self.outliers.endpoint(address).is_some_and(|e| e.is_ejected(now));
        self.addresses.iter().filter(|address| is_ejected(address)).count()
    }

    fn absent(&self) -> usize {
        (0..self.addresses.len()).filter(|index| self.health(*index).is_absent()).count()
    }
}

#[test]
fn max_ejected_for_every_number_of_endpoints() {
    let most = |ratio: f64, endpoints| {
        let settings = OutlierSettings { max_ejected: Ratio::constant(ratio), ..Default::default() };
        settings.ejection_limit(endpoints)
    };
    assert_eq!((0..=6).map(|n| most(0.5, n)).collect::<Vec<_>>(), [0, 0, 1, 1, 2, 2, 3]);
    assert_eq!((0..=4).map(|n| most(1.0, n)).collect::<Vec<_>>(), [0, 0, 1, 2, 3]);
    assert_eq!((0..=4).map(|n| most(0.1, n)).collect::<Vec<_>>(), [0, 0, 1, 1, 1]);
    assert_eq!((most(0.3, 10), most(0.5, 1000), most(0.0, 10)), (3, 500, 0));
}

#[test]
fn a_single_endpoint_is_never_ejected() {
    let now = Instant::now();
    let fleet = Fleet::new(1, OutlierSettings::default(), now);
    assert_eq!(fleet.fail(0, 1000, now), None);
    assert_eq!(fleet.ejected(now), 0);
}

#[test]
fn one_of_two_and_of_three_may_be_ejected() {
    let now = Instant::now();
    for count in [2, 3] {
        let fleet = Fleet::new(count, OutlierSettings::default(), now);
        assert_eq!(fleet.fail(0, 4, now), None);
        assert_eq!(fleet.report(0, EndpointOutcome::Success, now), None);
        assert_eq!(fleet.fail(0, 4, now), None, "a success resets the count");
        let ejection = fleet.fail(0, 1, now).unwrap();
        assert_eq!((ejection.consecutive_failures, ejection.until), (5, now + S * 10));
        assert_eq!(fleet.fail(1, 100, now), None, "max_ejected is reached");
        assert_eq!(fleet.ejected(now + S * 9), 1);
        assert_eq!(fleet.ejected(now + S * 11), 0);
        assert!(fleet.fail(1, 1, now + S * 11).is_some(), "one is restored");
    }
}

#[test]
fn attempts_in_flight_at_the_ejection_are_not_counted() {
    let now = Instant::now();
    let fleet = Fleet::new(6, OutlierSettings::default(), now);
    let until = fleet.fail(0, 5, now).unwrap().until;
    assert_eq!(fleet.fail(0, 100, now + S), None);
    assert_eq!(fleet.ejected(until + S), 0);
    assert_eq!(fleet.fail(0, 4, until + S), None, "the count restarts");
}

#[test]
fn a_relapse_doubles_the_ejection_time_and_a_long_success_resets_it() {
    let mut now = Instant::now();
    let fleet = Fleet::new(3, OutlierSettings::default(), now);
    for expected in [10u32, 20, 40, 80, 160, 300, 300] {
        let ejection = fleet.fail(0, 5, now).unwrap();
        assert_eq!(ejection.until, now + S * expected);
        now = ejection.until + S;
    }
    now += S * 301;
    assert_eq!(fleet.fail(0, 5, now).unwrap().until, now + S * 10);
}

#[test]
fn updates_keep_state_by_address() {
    let now = Instant::now();
    let fleet = Fleet::new(4, OutlierSettings::default(), now);
    fleet.fail(0, 5, now).unwrap();
    fleet.fail(1, 4, now);
    fleet.outliers.update(&fleet.addresses[1..], now);
    fleet.outliers.update(&fleet.addresses, now + S);
    assert_eq!(
        fleet.ejected(now + S),
        1,
        "an endpoint removed while ejected is still ejected when added again"
    );
    assert!(fleet.fail(1, 1, now + S).is_some(), "an endpoint that stayed keeps its count");
    fleet.outliers.update(&fleet.addresses[2..], now + S * 60);
    assert!(fleet.outliers.endpoint(&fleet.addresses[0]).is_none(), "an endpoint that is gone is forgotten");
}

#[test]
fn a_refused_connection_makes_absent_whatever_max_ejected() {
    let now = Instant::now();
    for outcome in [EndpointOutcome::Refused, EndpointOutcome::ConnectTimeout, EndpointOutcome::NoService] {
        let none = OutlierSettings { max_ejected: Ratio::constant(0.0), ..OutlierSettings::default() };
        let fleet = Fleet::new(3, none, now);
        for index in 0..3 {
            assert_eq!(fleet.report(index, outcome, now), Some(EndpointChange::Absent), "{outcome:?}");
            assert!(!fleet.health(index).is_available(now));
        }
        assert_eq!((fleet.absent(), fleet.ejected(now)), (3, 0));
    }
}

#[test]
fn absent_endpoints_do_not_count_as_ejected_but_the_last_one_stays() {
    let now = Instant::now();
    let fleet = Fleet::new(4, OutlierSettings::default(), now);
    fleet.report(0, EndpointOutcome::Refused, now);
    fleet.report(1, EndpointOutcome::NoService, now);
    assert!(fleet.fail(2, 5, now).is_some());
    assert_eq!(fleet.fail(3, 100, now), None, "no other endpoint serves");
    assert!(!fleet.health(3).is_serving(now), "and it is known to fail");
}

#[test]
fn a_refusing_endpoint_is_probed_by_connections_then_by_a_request() {
    let now = Instant::now();
    let fleet = Fleet::new(3, OutlierSettings::default(), now);
    assert_eq!(fleet.outliers.next_probe_at(), None);
    fleet.report(0, EndpointOutcome::Refused, now);
    let mut at = fleet.outliers.next_probe_at().unwrap();
    assert_eq!(at, now + MS * 10);
    assert_eq!(fleet.outliers.take_due_probes(9, now), [], "not yet");
    let mut probes = 0;
    while at < now + S * 8 {
        assert_eq!(fleet.outliers.take_due_probes(9, at), [DueProbe::Connection(fleet.addresses[0])]);
        assert_eq!(fleet.outliers.take_due_probes(9, at), [], "once at a time");
        assert!(!fleet.health(0).claim_probe(true, at));
        assert!(!fleet.outliers.record_connection_probe(&fleet.addresses[0], false, at));
        let next = fleet.outliers.next_probe_at().unwrap();
        assert!(next - at >= MS * 10 && next - at <= MS * 100, "{:?}", next - at);
        (at, probes) = (next, probes + 1);
    }
    assert!(probes < 400, "{probes} in 8 s");
    assert!(
        !fleet.outliers.record_connection_probe(&fleet.addresses[1], true, at),
        "another one is not absent"
    );
    fleet.outliers.take_due_probes(9, at);
    assert!(fleet.outliers.record_connection_probe(&fleet.addresses[0], true, at));
    assert!(!fleet.health(0).is_available(at), "that it accepts connections is not enough");
    assert_eq!(fleet.outliers.next_probe_at(), None);
    assert!(fleet.health(0).claim_probe(true, at));
    assert!(!fleet.health(0).claim_probe(true, at), "by one request");
    assert!(fleet.health(0).claim_probe(true, at + S), "and by another one if there is no result");
    assert_eq!(fleet.report(0, EndpointOutcome::Success, at + S), Some(EndpointChange::Present));
    assert!(fleet.health(0).is_available(at + S));
    assert!(!fleet.outliers.any_absent());
}

#[test]
fn attempts_that_began_before_the_absence_are_ignored() {
    let now = Instant::now();
    let fleet = Fleet::new(2, OutlierSettings::default(), now);
    fleet.report(0, EndpointOutcome::Refused, now + S);
    assert_eq!(
        fleet.late_report(0, EndpointOutcome::Success, AttemptTimes { began: now, ended: now + S * 2 }),
        None
    );
    assert_eq!(fleet.absent(), 1);
    // Many attempts that fail together move the next probe once.
    let next = fleet.outliers.next_probe_at();
    for _ in 0..50 {
        assert_eq!(
            fleet.late_report(0, EndpointOutcome::Failure, AttemptTimes { began: now, ended: now + S * 2 }),
            None
        );
        assert_eq!(fleet.report(0, EndpointOutcome::Refused, now + S), None);
    }
    assert_eq!(fleet.outliers.next_probe_at(), next);
}

#[test]
fn an_endpoint_without_service_is_probed_in_proportion_to_its_absence() {
    let now = Instant::now();
    let fleet = Fleet::new(2, OutlierSettings::default(), now);
    fleet.report(0, EndpointOutcome::NoService, now);
    let mut at = now;
    let mut probes = 0;
    while at < now + S * 30 {
        let next = fleet.outliers.next_probe_at().unwrap();
        assert!(next - at >= MS * 50 && next - at <= S, "{:?}", next - at);
        assert!(!fleet.health(0).claim_probe(true, next - MS * 2));
        assert_eq!(fleet.outliers.take_due_probes(9, next), [DueProbe::Request(fleet.addresses[0])]);
        assert!(fleet.health(0).claim_probe(true, next));
        fleet.report(0, EndpointOutcome::NoService, next);
        (at, probes) = (next, probes + 1);
    }
    assert!(probes < 100, "{probes} in 30 s");
}

#[test]
fn failed_probes_double_the_interval() {
    let now = Instant::now();
    let fleet = Fleet::new(2, OutlierSettings::default(), now);
    fleet.report(0, EndpointOutcome::Refused, now);
    fleet.outliers.take_due_probes(9, now + S);
    assert!(fleet.outliers.record_connection_probe(&fleet.addresses[0], true, now + S));
    let mut at = now + S;
    for doublings in 0..12u32 {
        assert!(fleet.health(0).claim_probe(true, at));
        assert_eq!(fleet.report(0, EndpointOutcome::Failure, at), Some(EndpointChange::StillAbsent));
        let next = fleet.outliers.next_probe_at().unwrap();
        assert_eq!(next - at, (MS * 50 * (1 << doublings.min(10))).min(S * 60));
        at = next + MS;
    }
    assert!(fleet.ejected(at) == 0 && fleet.absent() == 1);
}

#[test]
fn a_request_that_cannot_be_retried_probes_only_after_a_second() {
    let now = Instant::now();
    let fleet = Fleet::new(2, OutlierSettings::default(), now);
    fleet.report(0, EndpointOutcome::Refused, now);
    let now = now + S;
    fleet.outliers.record_connection_probe(&fleet.addresses[0], true, now);
    assert!(!fleet.health(0).claim_probe(false, now + MS * 900));
    assert!(fleet.health(0).claim_probe(false, now + MS * 1000));
}

#[test]
fn a_removed_endpoint_is_not_probed_and_returns_as_new() {
    let now = Instant::now();
    let fleet = Fleet::new(4, OutlierSettings::default(), now);
    fleet.report(0, EndpointOutcome::Refused, now);
    fleet.report(1, EndpointOutcome::Refused, now);
    assert_eq!(fleet.outliers.take_due_probes(1, now + S).len(), 1, "at most as many as requested");
    fleet.outliers.update(&fleet.addresses[2..], now + S);
    assert!(!fleet.outliers.any_absent());
    assert_eq!(fleet.outliers.next_probe_at(), None);
    fleet.outliers.update(&fleet.addresses, now + S);
    assert_eq!(fleet.absent(), 0);
}

#[test]
fn consecutive_failures_make_an_endpoint_avoided() {
    let now = Instant::now();
    let fleet = Fleet::new(3, OutlierSettings::default(), now);
    fleet.fail(0, 1, now);
    assert!(!fleet.health(0).is_avoided(now), "a single failure is not enough");
    fleet.fail(0, 1, now);
    assert!(fleet.health(0).is_avoided(now + MS * 199));
    let at = now + MS * 200;
    assert!(!fleet.health(0).is_avoided(at));
    fleet.health(0).record_chosen(at);
    assert!(fleet.health(0).is_avoided(at), "one at a time");
    fleet.fail(0, 1, at);
    assert!(fleet.health(0).is_avoided(at + MS * 399));
    fleet.report(0, EndpointOutcome::Success, at);
    assert!(!fleet.health(0).is_avoided(at));
    // A restored endpoint first gets a single request.
    let until = fleet.fail(0, 5, at).unwrap().until + MS;
    assert!(fleet.health(0).is_available(until) && !fleet.health(0).is_avoided(until));
    fleet.health(0).record_chosen(until);
    assert!(fleet.health(0).is_avoided(until));
}

/// Of several endpoints that fail at the same moment, each is avoided from its first broken connection on.
#[test]
fn the_first_broken_connection_makes_an_endpoint_avoided() {
    let now = Instant::now();
    for (outcome, counts) in [(EndpointOutcome::Reset, true), (EndpointOutcome::StaleConnection, false)] {
        let settings = OutlierSettings { consecutive_failures: 2, ..OutlierSettings::default() };
        let fleet = Fleet::new(3, settings, now);
        fleet.report(0, outcome, now);
        assert!(fleet.health(0).is_avoided(now + MS * 199), "{outcome:?}");
        assert!(!fleet.health(0).is_avoided(now + MS * 200), "{outcome:?}");
        fleet.report(0, EndpointOutcome::Success, now);
        assert!(!fleet.health(0).is_avoided(now), "{outcome:?}: it serves");
        for _ in 0..2 {
            fleet.report(0, outcome, now);
        }
        assert_eq!(fleet.health(0).is_ejected(now), counts, "{outcome:?}");
    }
}

/// Requests may report no success for long, as gRPC streams that their clients cancel: the endpoint gets its share again.
#[test]
fn suspicion_passes_without_a_success() {
    let now = Instant::now();
    for outcome in [EndpointOutcome::Reset, EndpointOutcome::StaleConnection] {
        let fleet = Fleet::new(3, OutlierSettings::default(), now);
        fleet.report(0, outcome, now);
        assert!(fleet.health(0).is_suspected(now + MS * 1990), "{outcome:?}");
        for pause in [200, 250, 3000] {
            let at = now + MS * pause;
            assert!(!fleet.health(0).is_avoided(at), "{outcome:?} after {pause} ms");
            fleet.health(0).record_chosen(at);
        }
        assert!(!fleet.health(0).is_suspected(now + MS * 2010), "{outcome:?}");
    }
}

/// The reset of one HTTP/2 stream says nothing about its connection.
#[test]
fn a_reset_stream_raises_no_suspicion() {
    let now = Instant::now();
    let fleet = Fleet::new(3, OutlierSettings::default(), now);
    for outcome in [EndpointOutcome::Reset.of_stream(), EndpointOutcome::StaleConnection.of_stream()] {
        fleet.report(0, outcome, now);
        assert!(!fleet.health(0).is_avoided(now) && !fleet.health(0).is_suspected(now), "{outcome:?}");
    }
    assert_eq!(EndpointOutcome::Reset.of_stream(), EndpointOutcome::Failure, "it counts towards an ejection");
}

#[test]
fn off_ejects_nothing() {
    let now = Instant::now();
    let off = OutlierSettings { consecutive_failures: 0, ..OutlierSettings::default() };
    assert_eq!(Fleet::new(5, off, now).fail(0, 1000, now), None);
}

proptest! {
    #[test]
    fn never_ejects_more_than_allowed(
        count in 1u16..12, ratio in 0.0f64..=1.0,
        events in prop::collection::vec((any::<prop::sample::Index>(), 0u8..4, 0u64..4000), 1..300),
    ) {
        let settings = OutlierSettings {
            max_ejected: Ratio::constant(ratio), consecutive_failures: 2,
            eject_for: GrowingDuration { base: HumanDuration::from_secs(5), max: HumanDuration::from_secs(60) },
        };
        let mut now = Instant::now();
        let fleet = Fleet::new(count, settings, now);
        for (index, kind, pass) in events {
            let outcome = [EndpointOutcome::Success, EndpointOutcome::Failure, EndpointOutcome::Failure, EndpointOutcome::Refused][usize::from(kind)];
            fleet.report(index.index(fleet.addresses.len()), outcome, now);
            prop_assert!(fleet.ejected(now) <= settings.ejection_limit(count.into()));
            prop_assert!(fleet.ejected(now) < usize::from(count));
            if kind == 3 { now += Duration::from_millis(pass); }
        }
        prop_assert_eq!(fleet.ejected(now + S * 61), 0, "no ejection lasts for ever");
    }
}
