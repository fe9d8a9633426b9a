use http::StatusCode;
use proptest::prelude::*;

use super::*;
use crate::{resilience::classify::ConnectFailure, units::HumanDuration};

const S: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);
const REFUSED: (Ending, Health) = (Ending::Connect(ConnectFailure::Refused), Health::Failure);
const BAD_ANSWER: (Ending, Health) = (Ending::Http(StatusCode::BAD_GATEWAY), Health::Failure);

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

    fn tell(&self, index: usize, health: Health, now: Instant) -> Option<Ejection> {
        self.end(index, (Ending::Http(StatusCode::OK), health), now)
    }

    fn end(&self, index: usize, end: (Ending, Health), now: Instant) -> Option<Ejection> {
        let address = &self.addresses[index];
        let endpoint = self.outliers.endpoint(address)?;
        self.outliers.report(address, &endpoint, end, now, 0.0)
    }

    /// Connections are refused until it is taken out.
    fn refuse(&self, index: usize, now: Instant) -> Ejection {
        (0..5).find_map(|_| self.end(index, REFUSED, now)).unwrap()
    }

    fn fail(&self, index: usize, times: u32, now: Instant) -> Option<Ejection> {
        (0..times).filter_map(|_| self.tell(index, Health::Failure, now)).last()
    }

    fn out(&self, now: Instant) -> usize {
        let out = |address| self.outliers.endpoint(address).is_some_and(|e| e.is_ejected(now));
        self.addresses.iter().filter(|address| out(address)).count()
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
        assert_eq!(fleet.tell(0, Health::Success, now), None);
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
fn one_that_nobody_could_connect_to_is_asked_and_comes_back() {
    let now = Instant::now();
    let fleet = Fleet::new(3, OutlierSettings::default(), now);
    assert_eq!(fleet.outliers.next_question(now), None);
    assert!(fleet.refuse(0, now).found_nobody);
    let mut at = fleet.outliers.next_question(now).unwrap();
    assert_eq!(at, now + SHORTEST_PAUSE);
    assert_eq!(fleet.outliers.questions(9, now), [], "not yet");
    let mut asked = 0;
    while at < now + S * 8 {
        assert_eq!(fleet.outliers.questions(9, at), [fleet.addresses[0]]);
        assert_eq!(fleet.outliers.questions(9, at), [], "once at a time");
        let next = fleet.outliers.next_question(at).unwrap();
        assert!(next - at >= SHORTEST_PAUSE && next - at <= LONGEST_PAUSE, "{:?}", next - at);
        (at, asked) = (next, asked + 1);
    }
    assert!(asked < 400, "{asked} in 8 s");
    assert!(!fleet.outliers.recall(&fleet.addresses[1], at), "another one was not out");
    assert!(fleet.outliers.recall(&fleet.addresses[0], at));
    assert_eq!((fleet.out(at), fleet.outliers.next_question(at)), (0, None));
    assert!(!fleet.outliers.recall(&fleet.addresses[0], at), "it is back already");
}

#[test]
fn the_next_that_restarts_finds_room_at_once() {
    let now = Instant::now();
    let fleet = Fleet::new(2, OutlierSettings::default(), now);
    fleet.refuse(0, now);
    for _ in 0..20 {
        assert_eq!(fleet.end(1, REFUSED, now + S), None, "no room as long as the first is out");
    }
    assert!(fleet.outliers.recall(&fleet.addresses[0], now + S));
    assert!(fleet.end(1, REFUSED, now + S).is_some_and(|ejection| ejection.found_nobody));
}

#[test]
fn one_that_answered_badly_stays_out_for_its_time() {
    let now = Instant::now();
    for row in [[BAD_ANSWER; 5], [BAD_ANSWER, REFUSED, REFUSED, REFUSED, REFUSED]] {
        let fleet = Fleet::new(2, OutlierSettings::default(), now);
        let ejection = row.into_iter().find_map(|end| fleet.end(0, end, now)).unwrap();
        assert!(!ejection.found_nobody, "{row:?}");
        assert_eq!(fleet.outliers.next_question(now), None);
        assert!(!fleet.outliers.recall(&fleet.addresses[0], now + S));
        assert_eq!((fleet.out(now + S * 9), fleet.out(now + S * 11)), (1, 0));
    }
}

#[test]
fn one_that_only_accepts_connections_is_believed_less_and_less() {
    let mut now = Instant::now();
    let fleet = Fleet::new(2, OutlierSettings::default(), now);
    let accept = |now: Instant| {
        let at = fleet.outliers.next_question(now).unwrap();
        assert!(fleet.outliers.recall(&fleet.addresses[0], at));
        (at, at - now)
    };
    for times in 0..6 {
        let ejection = fleet.refuse(0, now);
        assert_eq!(ejection.until, now + (S * 10 * (1 << times)).min(S * 300));
        let (at, pause) = accept(now);
        assert_eq!(pause, SHORTEST_PAUSE * (1 << times));
        now = at + MS * 500;
    }
    assert_eq!(fleet.tell(0, Health::Success, now), None);
    assert_eq!(fleet.refuse(0, now).until, now + S * 10, "a call that went well makes good");
    assert_eq!(accept(now).1, SHORTEST_PAUSE);
}

#[test]
fn one_that_left_or_whose_time_is_over_is_not_asked() {
    let now = Instant::now();
    let fleet = Fleet::new(4, OutlierSettings::default(), now);
    fleet.refuse(0, now);
    fleet.refuse(1, now);
    assert_eq!(fleet.outliers.questions(1, now + S).len(), 1, "no more at a time than wanted");
    fleet.outliers.update(&fleet.addresses[1..], now + S);
    assert!(!fleet.outliers.recall(&fleet.addresses[0], now + S));
    assert!(fleet.outliers.next_question(now + S).is_some(), "the other one is");
    assert_eq!(fleet.outliers.next_question(now + S * 11), None);
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
            let health = if kind == 0 { Health::Success } else { Health::Failure };
            fleet.tell(index.index(fleet.addresses.len()), health, now);
            prop_assert!(fleet.out(now) <= settings.most_ejected(count.into()));
            prop_assert!(fleet.out(now) < usize::from(count));
            if kind == 3 { now += Duration::from_millis(pass); }
        }
        prop_assert_eq!(fleet.out(now + S * 61), 0, "nobody is out for ever");
    }
}
