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
    fn suspected(&self, _: Instant) -> bool {
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

const ALGORITHMS: [fn() -> Balance; 4] = [
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
    for algorithm in ALGORITHMS {
        for weights in [&[1, 1, 1, 1][..], &[1, 3], &[5, 1, 1], &[10, 20, 30, 40]] {
            let balance = algorithm();
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
fn smooth_round_robin_spreads_picks() {
    let candidates = endpoints(&[5, 1, 1]);
    for seed in 0..50 {
        let (mut rng, now) = (Rng::from_seed(seed), Instant::now());
        let mut balancer = Balancer::new(&Balance::RoundRobin);
        balancer.rebuild(&candidates, &mut rng);
        let picks: Vec<_> =
            (0..70).filter_map(|_| balancer.pick(&candidates, now, &mut rng, &[], None)).collect();
        // Of any 7 in a row, 5 go to the heavy one.
        for window in picks.windows(7) {
            assert_eq!(window.iter().filter(|i| **i == 0).count(), 5, "seed {seed}: {picks:?}");
        }
    }
}

#[test]
fn p2c_prefers_low_latency_and_load() {
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
fn a_request_without_a_hash_key_still_gets_an_endpoint() {
    let (mut rng, now) = (Rng::from_seed(1), Instant::now());
    let candidates = endpoints(&[1, 1]);
    let mut balancer = Balancer::new(&ALGORITHMS[3]());
    balancer.rebuild(&candidates, &mut rng);
    let picks: Vec<_> =
        (0..100).filter_map(|_| balancer.pick(&candidates, now, &mut rng, &[], None)).collect();
    assert!(picks.contains(&0) && picks.contains(&1) && picks.len() == 100);
}

#[test]
fn sets_of_zero_and_one_work() {
    for algorithm in ALGORITHMS {
        assert_eq!(shares(&algorithm(), &[], 10, &[]), [0; 0]);
        assert_eq!(shares(&algorithm(), &endpoints(&[7]), 10, &[]), [10]);
        assert_eq!(shares(&algorithm(), &endpoints(&[7]), 10, &[0]), [10], "tried, but the only one");
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
    fn never_an_unusable_one_and_a_tried_one_only_as_a_last_resort(
        candidates in any_endpoints(),
        tried in prop::collection::vec(0usize..40, 0..5),
        algorithm in 0usize..4,
        seed: u64,
    ) {
        let (mut rng, now) = (Rng::from_seed(seed), Instant::now());
        let mut balancer = Balancer::new(&ALGORITHMS[algorithm]());
        balancer.rebuild(&candidates, &mut rng);
        let usable: Vec<_> = (0..candidates.len()).filter(|i| candidates[*i].usable).collect();
        let has_untried = usable.iter().any(|i| !tried.contains(i));
        for key in 0..50u64 {
            match balancer.pick(&candidates, now, &mut rng, &tried, Some(mix(key))) {
                None => prop_assert!(usable.is_empty()),
                Some(i) => {
                    prop_assert!(usable.contains(&i));
                    prop_assert!(!has_untried || !tried.contains(&i));
                }
            }
        }
    }

    #[test]
    fn a_removed_endpoint_moves_only_its_own_keys(
        weights in prop::collection::vec(1u32..10, 2..50),
        removed in any::<prop::sample::Index>(),
        unhealthy: bool,
    ) {
        let (mut rng, now) = (Rng::from_seed(0), Instant::now());
        let before = endpoints(&weights);
        let removed = removed.index(before.len());
        let mut after = before.clone();
        // Whether it was removed or is unusable for a while makes no difference.
        if unhealthy {
            after[removed].usable = false;
        } else {
            after.remove(removed);
        }
        let mut pick = |set: &[Fake], key: u64| {
            let mut balancer = Balancer::new(&ALGORITHMS[3]());
            balancer.rebuild(set, &mut rng);
            balancer.pick(set, now, &mut rng, &[], Some(mix(key))).map(|i| set[i].key)
        };
        for key in 0..200 {
            let (old, new) = (pick(&before, key), pick(&after, key));
            prop_assert!(old == new || old == Some(before[removed].key));
        }
    }

    #[test]
    fn the_average_stays_between_the_observed_latencies(
        latencies in prop::collection::vec((1u64..2_000, 0u64..20_000), 1..50),
    ) {
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
fn a_high_latency_counts_at_once_and_decays() {
    let start = Instant::now();
    let at = |s: u64| start + Duration::from_secs(s);
    let mut average = PeakEwma::new(start);
    average.observe(Duration::from_millis(10), at(60));
    let calm = average.cost(at(60));
    assert!((0.010..0.011).contains(&calm), "{calm}");

    average.observe(Duration::from_secs(2), at(60));
    assert!(average.cost(at(60)) >= 2.0);
    // Fast responses pull it down only as time passes.
    average.observe(Duration::from_millis(10), at(60));
    assert!(average.cost(at(60)) >= 1.9);
    average.observe(Duration::from_millis(10), at(70));
    let later = average.cost(at(70));
    assert!((0.7..0.8).contains(&later), "{later}");
    // So does silence: it will be used again.
    assert!(average.cost(at(170)) < 0.001);
}

#[test]
fn a_clock_that_goes_back_is_harmless() {
    let now = Instant::now() + Duration::from_secs(100);
    let mut average = PeakEwma::new(now);
    average.observe(Duration::from_millis(5), now - Duration::from_secs(50));
    assert!(average.cost(now - Duration::from_secs(60)).is_finite());
}

/// By load or latency only: round-robin and hash give each its share.
#[test]
fn requests_skip_avoided_endpoints_and_retries_suspected_ones_too() {
    let now = Instant::now();
    for (algorithm, skips) in ALGORITHMS.into_iter().zip([true, true, false, false]) {
        let mut rng = Rng::from_seed(7);
        let mut all = endpoints(&[1; 4]);
        let mut balancer = Balancer::new(&algorithm());
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
        assert_eq!(picked(&all, &[]), if skips { vec![1, 2, 3] } else { vec![0, 1, 2, 3] });
        assert_eq!(picked(&all, &[2]), if skips { vec![3] } else { vec![0, 1, 3] });
        all[3].usable = false;
        assert_eq!(picked(&all, &[2]), if skips { vec![1] } else { vec![0, 1] }, "no other is left");
        all[1].usable = false;
        assert_eq!(picked(&all, &[2]), [0], "nor is endpoint 1");
    }
}
