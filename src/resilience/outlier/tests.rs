use proptest::prelude::*;

use super::*;
use crate::units::HumanDuration;

const S: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);

struct Fleet {
    outliers: Outliers,
    addresses: Vec<SocketAddr>,
}

impl Fleet {
    fn new(count: u16, settings: OutlierSettings, now: Instant) -> Self {
        let addresses: Vec<_> = (1..=count).map(|port| SocketAddr::from(([10, 0, 0, 1], port))).collect();
        let outliers = Outliers::new(settings, now);
        outliers.update(&addresses, now);
        Self { outliers, addresses }
    }

    fn health(&self, index: usize) -> Arc<EndpointHealth> {
        self.outliers.endpoint(&self.addresses[index]).unwrap()
    }

    /// An attempt that began and ended now.
    fn report(&self, index: usize, evidence: Evidence, now: Instant) -> Option<Change> {
        self.late_report(index, evidence, (now, now))
    }

    fn late_report(&self, index: usize, evidence: Evidence, times: (Instant, Instant)) -> Option<Change> {
        let address = &self.addresses[index];
        let endpoint = self.outliers.endpoint(address)?;
        self.outliers.report(address, &endpoint, evidence, times, 0.0)
    }

    fn fail(&self, index: usize, times: u32, now: Instant) -> Option<Ejection> {
        let changes = (0..times).filter_map(|_| self.report(index, Evidence::Failure, now));
        changes
            .filter_map(|change| if let Change::Ejected(ejection) = change { Some(ejection) } else { None })
            .last()
    }

    fn out(&self, now: Instant) -> usize {
        let out = |address| self.outliers.endpoint(address).is_some_and(|e| e.is_ejected(now));
        self.addresses.iter().filter(|address| out(address)).count()
    }

    fn absent(&self) -> usize {
        (0..self.addresses.len()).filter(|index| self.health(*index).is_absent()).count()
    }
}

#[test]
fn how_many_may_be_out_for_every_size() {
    let most = |ratio: f64, endpoints| {
        let settings = OutlierSettings { max_ejected: Ratio::constant(ratio), ..Default::default() };
        settings.most_ejected(endpoints)
    };
    assert_eq!((0..=6).map(|n| most(0.5, n)).collect::<Vec<_>>(), [0, 0, 1, 1, 2, 2, 3]);
    assert_eq!((0..=4).map(|n| most(1.0, n)).collect::<Vec<_>>(), [0, 0, 1, 2, 3]);
    assert_eq!((0..=4).map(|n| most(0.1, n)).collect::<Vec<_>>(), [0, 0, 1, 1, 1]);
    assert_eq!((most(0.3, 10), most(0.5, 1000), most(0.0, 10)), (3, 500, 0));
}

#[test]
fn the_only_one_stays() {
    let now = Instant::now();
    let fleet = Fleet::new(1, OutlierSettings::default(), now);
    assert_eq!(fleet.fail(0, 1000, now), None);
    assert_eq!(fleet.out(now), 0);
}

#[test]
fn of_two_and_of_three_one_may_go() {
    let now = Instant::now();
    for count in [2, 3] {
        let fleet = Fleet::new(count, OutlierSettings::default(), now);
        assert_eq!(fleet.fail(0, 4, now), None);
        assert_eq!(fleet.report(0, Evidence::Success, now), None);
        assert_eq!(fleet.fail(0, 4, now), None, "a success ends the row");
        let ejection = fleet.fail(0, 1, now).unwrap();
        assert_eq!((ejection.failures_in_a_row, ejection.until), (5, now + S * 10));
        assert_eq!(fleet.fail(1, 100, now), None, "no room");
        assert_eq!(fleet.out(now + S * 9), 1);
        assert_eq!(fleet.out(now + S * 11), 0);
        assert!(fleet.fail(1, 1, now + S * 11).is_some(), "there is room now");
    }
}

#[test]
fn what_was_under_way_when_it_was_taken_out_adds_nothing() {
    let now = Instant::now();
    let fleet = Fleet::new(6, OutlierSettings::default(), now);
    let until = fleet.fail(0, 5, now).unwrap().until;
    assert_eq!(fleet.fail(0, 100, now + S), None);
    assert_eq!(fleet.out(until + S), 0);
    assert_eq!(fleet.fail(0, 4, until + S), None, "the row begins anew");
}

#[test]
fn a_relapse_doubles_and_a_good_while_forgives() {
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
fn state_is_kept_by_address_over_updates() {
    let now = Instant::now();
    let fleet = Fleet::new(4, OutlierSettings::default(), now);
    fleet.fail(0, 5, now).unwrap();
    fleet.fail(1, 4, now);
    fleet.outliers.update(&fleet.addresses[1..], now);
    fleet.outliers.update(&fleet.addresses, now + S);
    assert_eq!(fleet.out(now + S), 1, "who left while out is still out when back");
    assert!(fleet.fail(1, 1, now + S).is_some(), "who stayed keeps the row");
    fleet.outliers.update(&fleet.addresses[2..], now + S * 60);
    assert!(fleet.outliers.endpoint(&fleet.addresses[0]).is_none(), "and who is gone is forgotten");
}

#[test]
fn an_endpoint_that_refuses_is_absent_at_once_whatever_may_be_ejected() {
    let now = Instant::now();
    for evidence in [Evidence::Refused, Evidence::ConnectTimeout, Evidence::NoService] {
        let none = OutlierSettings { max_ejected: Ratio::constant(0.0), ..OutlierSettings::default() };
        let fleet = Fleet::new(3, none, now);
        for index in 0..3 {
            assert_eq!(fleet.report(index, evidence, now), Some(Change::Absent), "{evidence:?}");
            assert!(!fleet.health(index).is_available(now));
        }
        assert_eq!((fleet.absent(), fleet.out(now)), (3, 0));
    }
}

#[test]
fn absent_endpoints_leave_the_others_room_to_be_ejected_but_the_last() {
    let now = Instant::now();
    let fleet = Fleet::new(4, OutlierSettings::default(), now);
    fleet.report(0, Evidence::Refused, now);
    fleet.report(1, Evidence::NoService, now);
    assert!(fleet.fail(2, 5, now).is_some());
    assert_eq!(fleet.fail(3, 100, now), None, "nobody else serves");
    assert!(!fleet.health(3).is_serving(now), "and it is known to fail");
}

#[test]
fn an_endpoint_that_refuses_is_asked_for_a_connection_and_then_for_a_request() {
    let now = Instant::now();
    let fleet = Fleet::new(3, OutlierSettings::default(), now);
    assert_eq!(fleet.outliers.next_question(), None);
    fleet.report(0, Evidence::Refused, now);
    let mut at = fleet.outliers.next_question().unwrap();
    assert_eq!(at, now + MS * 10);
    assert_eq!(fleet.outliers.questions(9, now), [], "not yet");
    let mut asked = 0;
    while at < now + S * 8 {
        assert_eq!(fleet.outliers.questions(9, at), [Question::Connection(fleet.addresses[0])]);
        assert_eq!(fleet.outliers.questions(9, at), [], "once at a time");
        assert!(!fleet.health(0).claim_probe(true, at));
        assert!(!fleet.outliers.answered(&fleet.addresses[0], false, at));
        let next = fleet.outliers.next_question().unwrap();
        assert!(next - at >= MS * 10 && next - at <= MS * 100, "{:?}", next - at);
        (at, asked) = (next, asked + 1);
    }
    assert!(asked < 400, "{asked} in 8 s");
    assert!(!fleet.outliers.answered(&fleet.addresses[1], true, at), "another one is not absent");
    fleet.outliers.questions(9, at);
    assert!(fleet.outliers.answered(&fleet.addresses[0], true, at));
    assert!(!fleet.health(0).is_available(at), "that it accepts connections is not enough");
    assert_eq!(fleet.outliers.next_question(), None);
    assert!(fleet.health(0).claim_probe(true, at));
    assert!(!fleet.health(0).claim_probe(true, at), "by one request");
    assert!(fleet.health(0).claim_probe(true, at + S), "and another one if nothing came of it");
    assert_eq!(fleet.report(0, Evidence::Success, at + S), Some(Change::Present));
    assert!(fleet.health(0).is_available(at + S));
    assert!(!fleet.outliers.any_absent());
}

#[test]
fn what_was_under_way_when_it_became_absent_says_nothing() {
    let now = Instant::now();
    let fleet = Fleet::new(2, OutlierSettings::default(), now);
    fleet.report(0, Evidence::Refused, now + S);
    assert_eq!(fleet.late_report(0, Evidence::Success, (now, now + S * 2)), None);
    assert_eq!(fleet.absent(), 1);
    // Many attempts that fail together move the next question once.
    let next = fleet.outliers.next_question();
    for _ in 0..50 {
        assert_eq!(fleet.late_report(0, Evidence::Failure, (now, now + S * 2)), None);
        assert_eq!(fleet.report(0, Evidence::Refused, now + S), None);
    }
    assert_eq!(fleet.outliers.next_question(), next);
}

#[test]
fn an_endpoint_whose_sidecar_is_alone_is_asked_by_requests_in_proportion_to_its_absence() {
    let now = Instant::now();
    let fleet = Fleet::new(2, OutlierSettings::default(), now);
    fleet.report(0, Evidence::NoService, now);
    let mut at = now;
    let mut asked = 0;
    while at < now + S * 30 {
        let next = fleet.outliers.next_question().unwrap();
        assert!(next - at >= MS * 50 && next - at <= S, "{:?}", next - at);
        assert!(!fleet.health(0).claim_probe(true, next - MS * 2));
        assert_eq!(fleet.outliers.questions(9, next), [Question::Request(fleet.addresses[0])]);
        assert!(fleet.health(0).claim_probe(true, next));
        fleet.report(0, Evidence::NoService, next);
        (at, asked) = (next, asked + 1);
    }
    assert!(asked < 100, "{asked} in 30 s");
}

#[test]
fn an_endpoint_that_accepts_connections_and_fails_is_asked_less_and_less() {
    let now = Instant::now();
    let fleet = Fleet::new(2, OutlierSettings::default(), now);
    fleet.report(0, Evidence::Refused, now);
    fleet.outliers.questions(9, now + S);
    assert!(fleet.outliers.answered(&fleet.addresses[0], true, now + S));
    let mut at = now + S;
    for doublings in 0..12u32 {
        assert!(fleet.health(0).claim_probe(true, at));
        assert_eq!(fleet.report(0, Evidence::Failure, at), Some(Change::StillAbsent));
        let next = fleet.outliers.next_question().unwrap();
        assert_eq!(next - at, (MS * 50 * (1 << doublings.min(10))).min(S * 60));
        at = next + MS;
    }
    assert!(fleet.out(at) == 0 && fleet.absent() == 1);
}

#[test]
fn a_request_that_must_not_be_repeated_probes_only_where_no_other_has_come() {
    let now = Instant::now();
    let fleet = Fleet::new(2, OutlierSettings::default(), now);
    fleet.report(0, Evidence::Refused, now);
    let now = now + S;
    fleet.outliers.answered(&fleet.addresses[0], true, now);
    assert!(!fleet.health(0).claim_probe(false, now + MS * 900));
    assert!(fleet.health(0).claim_probe(false, now + MS * 1000));
}

#[test]
fn one_that_left_is_not_asked_and_comes_back_as_new() {
    let now = Instant::now();
    let fleet = Fleet::new(4, OutlierSettings::default(), now);
    fleet.report(0, Evidence::Refused, now);
    fleet.report(1, Evidence::Refused, now);
    assert_eq!(fleet.outliers.questions(1, now + S).len(), 1, "no more at a time than wanted");
    fleet.outliers.update(&fleet.addresses[2..], now + S);
    assert!(!fleet.outliers.any_absent());
    assert_eq!(fleet.outliers.next_question(), None);
    fleet.outliers.update(&fleet.addresses, now + S);
    assert_eq!(fleet.absent(), 0);
}

#[test]
fn an_endpoint_that_fails_in_a_row_is_avoided_but_for_a_request_now_and_then() {
    let now = Instant::now();
    let fleet = Fleet::new(3, OutlierSettings::default(), now);
    fleet.fail(0, 1, now);
    assert!(!fleet.health(0).is_avoided(now), "once is no pattern");
    fleet.fail(0, 1, now);
    assert!(fleet.health(0).is_avoided(now + MS * 199));
    let at = now + MS * 200;
    assert!(!fleet.health(0).is_avoided(at));
    fleet.health(0).chosen(at);
    assert!(fleet.health(0).is_avoided(at), "one at a time");
    fleet.fail(0, 1, at);
    assert!(fleet.health(0).is_avoided(at + MS * 399));
    fleet.report(0, Evidence::Success, at);
    assert!(!fleet.health(0).is_avoided(at));
    // One that was ejected begins with a single request.
    let until = fleet.fail(0, 5, at).unwrap().until + MS;
    assert!(fleet.health(0).is_available(until) && !fleet.health(0).is_avoided(until));
    fleet.health(0).chosen(until);
    assert!(fleet.health(0).is_avoided(until));
}

/// Of several that vanish at the same moment, each is avoided from the first broken connection on.
#[test]
fn an_endpoint_is_avoided_as_soon_as_a_connection_to_it_breaks() {
    let now = Instant::now();
    for (evidence, counts) in [(Evidence::Reset, true), (Evidence::StaleConnection, false)] {
        let settings = OutlierSettings { consecutive_failures: 2, ..OutlierSettings::default() };
        let fleet = Fleet::new(3, settings, now);
        fleet.report(0, evidence, now);
        assert!(fleet.health(0).is_avoided(now + MS * 199), "{evidence:?}");
        assert!(!fleet.health(0).is_avoided(now + MS * 200), "{evidence:?}");
        fleet.report(0, Evidence::Success, now);
        assert!(!fleet.health(0).is_avoided(now), "{evidence:?}: it serves");
        for _ in 0..2 {
            fleet.report(0, evidence, now);
        }
        assert_eq!(fleet.health(0).is_ejected(now), counts, "{evidence:?}");
    }
}

#[test]
fn off_ejects_nobody() {
    let now = Instant::now();
    let off = OutlierSettings { consecutive_failures: 0, ..OutlierSettings::default() };
    assert_eq!(Fleet::new(5, off, now).fail(0, 1000, now), None);
}

proptest! {
    #[test]
    fn never_more_are_out_than_may_be(
        count in 1u16..12, ratio in 0.0f64..=1.0,
        events in prop::collection::vec((any::<prop::sample::Index>(), 0u8..4, 0u64..4000), 1..300),
    ) {
        let settings = OutlierSettings {
            max_ejected: Ratio::constant(ratio), consecutive_failures: 2,
            eject_for: Growing { base: HumanDuration::from_secs(5), max: HumanDuration::from_secs(60) },
        };
        let mut now = Instant::now();
        let fleet = Fleet::new(count, settings, now);
        for (index, kind, pass) in events {
            let evidence = [Evidence::Success, Evidence::Failure, Evidence::Failure, Evidence::Refused][usize::from(kind)];
            fleet.report(index.index(fleet.addresses.len()), evidence, now);
            prop_assert!(fleet.out(now) <= settings.most_ejected(count.into()));
            prop_assert!(fleet.out(now) < usize::from(count));
            if kind == 3 { now += Duration::from_millis(pass); }
        }
        prop_assert_eq!(fleet.out(now + S * 61), 0, "nobody is out for ever");
    }
}
