use proptest::prelude::*;

use super::*;
use crate::rng::Rng;

#[derive(Clone, Debug)]
struct Fake {
    usable: bool,
    avoided: bool,
    suspected: bool,
    latency: f64,
    in_flight: u32,
    weight: u32,
    key: u64,
}

impl Candidate for Fake {
    fn usable(&self, _: Instant) -> bool {
        self.usable
    }
    fn avoided(&self, _: Instant) -> bool {
        self.avoided
    }
    fn suspected(&self) -> bool {
        self.suspected
    }
    fn latency(&self, _: Instant) -> f64 {
        self.latency
    }
    fn in_flight(&self) -> u32 {
        self.in_flight
    }
    fn weight(&self) -> u32 {
        self.weight
    }
    fn key(&self) -> u64 {
        self.key
    }
}

const KINDS: [fn() -> Balance; 4] = [
    || Balance::P2c,
    || Balance::LeastRequest,
    || Balance::RoundRobin,
    || Balance::HashHeader("x-user".to_owned()),
];

fn endpoints(weights: &[u32]) -> Vec<Fake> {
    let endpoint = |(i, weight): (usize, &u32)| Fake {
        usable: true,
        avoided: false,
        suspected: false,
        latency: 0.01,
        in_flight: 0,
        weight: *weight,
        key: hash_key(format!("10.0.0.{i}:80").as_bytes()),
    };
    weights.iter().enumerate().map(endpoint).collect()
}

/// How often each is picked in `n` picks with keys 0, 1, 2, …
fn shares(balance: &Balance, candidates: &[Fake], n: u64, tried: &[usize]) -> Vec<u64> {
    let (mut rng, now) = (Rng::from_seed(1), Instant::now());
    let mut balancer = Balancer::new(balance);
    balancer.rebuild(candidates, &mut rng);
    let mut counts = vec![0; candidates.len()];
    for key in 0..n {
        let hash = Some(hash_key(&key.to_le_bytes()));
        if let Some(i) = balancer.pick(candidates, now, &mut rng, tried, hash) {
            counts[i] += 1;
        }
    }
    counts
}

#[test]
fn traffic_follows_the_weights_when_nothing_else_differs() {
    for kind in KINDS {
        for weights in [&[1, 1, 1, 1][..], &[1, 3], &[5, 1, 1], &[10, 20, 30, 40]] {
            let balance = kind();
            let counts = shares(&balance, &endpoints(weights), 40_000, &[]);
            let total: u32 = weights.iter().sum();
            for (count, weight) in counts.iter().zip(weights) {
                let expected = 40_000.0 * f64::from(*weight) / f64::from(total);
                let off = (*count as f64 - expected).abs() / expected;
                assert!(off < 0.06, "{balance} {weights:?}: {counts:?}");
            }
        }
    }
}

#[test]
fn smooth_round_robin_does_not_bunch() {
    let candidates = endpoints(&[5, 1, 1]);
    for seed in 0..50 {
        let (mut rng, now) = (Rng::from_seed(seed), Instant::now());
        let mut balancer = Balancer::new(&Balance::RoundRobin);
        balancer.rebuild(&candidates, &mut rng);
        let picks: Vec<_> =
            (0..70).filter_map(|_| balancer.pick(&candidates, now, &mut rng, &[], None)).collect();
        // Of 7 in a row, wherever one starts, 5 go to the heavy one.
        for window in picks.windows(7) {
            assert_eq!(window.iter().filter(|i| **i == 0).count(), 5, "seed {seed}: {picks:?}");
        }
    }
}

#[test]
fn p2c_prefers_the_faster_and_the_less_busy() {
    let mut candidates = endpoints(&[1; 5]);
    candidates[2].latency = 1.0;
    let slow = shares(&Balance::P2c, &candidates, 10_000, &[]);
    assert_eq!(slow[2], 0, "{slow:?}");

    let mut candidates = endpoints(&[1; 5]);
    candidates[2].in_flight = 10;
    assert_eq!(shares(&Balance::P2c, &candidates, 10_000, &[])[2], 0);
}

#[test]
fn least_request_takes_the_least_busy_per_weight() {
    let mut candidates = endpoints(&[1, 4, 1]);
    candidates[0].in_flight = 2;
    candidates[1].in_flight = 7;
    candidates[2].in_flight = 2;
    assert_eq!(shares(&Balance::LeastRequest, &candidates, 100, &[]), [0, 100, 0]);
}

#[test]
fn a_caller_without_a_hash_key_still_gets_an_endpoint() {
    let (mut rng, now) = (Rng::from_seed(1), Instant::now());
    let candidates = endpoints(&[1, 1]);
    let mut balancer = Balancer::new(&KINDS[3]());
    balancer.rebuild(&candidates, &mut rng);
    let picks: Vec<_> =
        (0..100).filter_map(|_| balancer.pick(&candidates, now, &mut rng, &[], None)).collect();
    assert!(picks.contains(&0) && picks.contains(&1) && picks.len() == 100);
}

#[test]
fn sets_of_none_and_of_one_work() {
    for kind in KINDS {
        assert_eq!(shares(&kind(), &[], 10, &[]), [0; 0]);
        assert_eq!(shares(&kind(), &endpoints(&[7]), 10, &[]), [10]);
        assert_eq!(shares(&kind(), &endpoints(&[7]), 10, &[0]), [10], "tried, but nothing else is there");
    }
}

#[test]
fn hash_keys_do_not_change_between_versions() {
    assert_eq!(hash_key(b""), 0xf52a_15e9_a9b5_e89b);
    assert_eq!(hash_key(b"payments"), hash_key(b"payments"));
    assert_ne!(hash_key(b"payments"), hash_key(b"payment"));
}

fn any_endpoints() -> impl Strategy<Value = Vec<Fake>> {
    let endpoint = (any::<bool>(), 0.001..1.0f64, 0u32..50, 0u32..200).prop_map(
        |(usable, latency, in_flight, weight)| Fake {
            usable,
            avoided: false,
            suspected: false,
            latency,
            in_flight,
            weight,
            key: 0,
        },
    );
    prop::collection::vec(endpoint, 1..40).prop_map(|mut list| {
        for (i, endpoint) in list.iter_mut().enumerate() {
            endpoint.key = hash_key(&i.to_le_bytes());
        }
        list
    })
}

proptest! {
    #[test]
    fn never_the_unusable_and_the_tried_only_when_alone(
        candidates in any_endpoints(),
        tried in prop::collection::vec(0usize..40, 0..5),
        kind in 0usize..4,
        seed: u64,
    ) {
        let (mut rng, now) = (Rng::from_seed(seed), Instant::now());
        let mut balancer = Balancer::new(&KINDS[kind]());
        balancer.rebuild(&candidates, &mut rng);
        let usable: Vec<_> = (0..candidates.len()).filter(|i| candidates[*i].usable).collect();
        let fresh = usable.iter().any(|i| !tried.contains(i));
        for key in 0..50u64 {
            match balancer.pick(&candidates, now, &mut rng, &tried, Some(mix(key))) {
                None => prop_assert!(usable.is_empty()),
                Some(i) => {
                    prop_assert!(usable.contains(&i));
                    prop_assert!(!fresh || !tried.contains(&i));
                }
            }
        }
    }

    #[test]
    fn an_endpoint_that_goes_moves_only_its_own_keys(
        weights in prop::collection::vec(1u32..10, 2..50),
        gone in any::<prop::sample::Index>(),
        unhealthy: bool,
    ) {
        let (mut rng, now) = (Rng::from_seed(0), Instant::now());
        let before = endpoints(&weights);
        let gone = gone.index(before.len());
        let mut after = before.clone();
        // Whether it left the set or can't be used for a while makes no difference.
        if unhealthy {
            after[gone].usable = false;
        } else {
            after.remove(gone);
        }
        let mut pick = |set: &[Fake], key: u64| {
            let mut balancer = Balancer::new(&KINDS[3]());
            balancer.rebuild(set, &mut rng);
            balancer.pick(set, now, &mut rng, &[], Some(mix(key))).map(|i| set[i].key)
        };
        for key in 0..200 {
            let (old, new) = (pick(&before, key), pick(&after, key));
            prop_assert!(old == new || old == Some(before[gone].key));
        }
    }

    #[test]
    fn the_average_stays_between_what_was_seen(latencies in prop::collection::vec((1u64..2_000, 0u64..20_000), 1..50)) {
        let mut now = Instant::now();
        let mut average = PeakEwma::new(now);
        let mut highest = PeakEwma::UNKNOWN.as_secs_f64();
        for (latency, gap) in latencies {
            now += Duration::from_millis(gap);
            let latency = Duration::from_millis(latency);
            average.observe(latency, now);
            highest = highest.max(latency.as_secs_f64());
            let cost = average.cost(now);
            prop_assert!(cost >= latency.as_secs_f64() * 0.999 && cost <= highest * 1.001);
        }
    }
}

#[test]
fn bad_news_count_at_once_and_fade() {
    let start = Instant::now();
    let at = |s: u64| start + Duration::from_secs(s);
    let mut average = PeakEwma::new(start);
    average.observe(Duration::from_millis(10), at(60));
    let calm = average.cost(at(60));
    assert!((0.010..0.011).contains(&calm), "{calm}");

    average.observe(Duration::from_secs(2), at(60));
    assert!(average.cost(at(60)) >= 2.0);
    // Good answers pull it down only as time passes.
    average.observe(Duration::from_millis(10), at(60));
    assert!(average.cost(at(60)) >= 1.9);
    average.observe(Duration::from_millis(10), at(70));
    let later = average.cost(at(70));
    assert!((0.7..0.8).contains(&later), "{later}");
    // And so does silence: it will be tried again.
    assert!(average.cost(at(170)) < 0.001);
}

#[test]
fn a_clock_that_goes_back_does_no_harm() {
    let now = Instant::now() + Duration::from_secs(100);
    let mut average = PeakEwma::new(now);
    average.observe(Duration::from_millis(5), now - Duration::from_secs(50));
    assert!(average.cost(now - Duration::from_secs(60)).is_finite());
}

/// By load or latency only: in turn or by hash, each gets its share.
#[test]
fn the_avoided_are_left_out_and_the_suspected_by_whoever_has_failed_once() {
    let now = Instant::now();
    for (balance, chooses) in KINDS.into_iter().zip([true, true, false, false]) {
        let mut rng = Rng::from_seed(7);
        let mut all = endpoints(&[1; 4]);
        let mut balancer = Balancer::new(&balance());
        let mut picked = |all: &[Fake], tried: &[usize]| -> Vec<usize> {
            let mut picked: Vec<usize> = (0..400)
                .filter_map(|hash| balancer.pick(all, now, &mut rng, tried, Some(mix(hash))))
                .collect();
            picked.sort_unstable();
            picked.dedup();
            picked
        };
        assert_eq!(picked(&all, &[0]), [1, 2, 3]);
        (all[0].avoided, all[0].suspected, all[1].suspected) = (true, true, true);
        assert_eq!(picked(&all, &[]), if chooses { vec![1, 2, 3] } else { vec![0, 1, 2, 3] });
        assert_eq!(picked(&all, &[2]), if chooses { vec![3] } else { vec![0, 1, 3] });
        all[3].usable = false;
        assert_eq!(picked(&all, &[2]), if chooses { vec![1] } else { vec![0, 1] }, "no other is left");
        all[1].usable = false;
        assert_eq!(picked(&all, &[2]), [0], "nor is this");
    }
}
