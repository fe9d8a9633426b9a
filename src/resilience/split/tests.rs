use proptest::prelude::*;

use super::*;
use crate::rng::Rng;

fn split(weights: &[u32]) -> Split {
    let target = |(at, weight): (usize, &u32)| SplitTarget { upstream: format!("up-{at}"), weight: *weight };
    Split::new(&weights.iter().enumerate().map(target).collect::<Vec<_>>())
}

fn keys(seed: u64, count: usize) -> Vec<u64> {
    let mut rng = Rng::from_seed(seed);
    (0..count).map(|_| rng.next_u64()).collect()
}

fn shares(split: &Split, keys: &[u64]) -> Vec<f64> {
    let mut counts = vec![0.0; split.targets.len()];
    for key in keys {
        counts[split.choose(*key).expect("a target")] += 1.0;
    }
    counts.iter().map(|count| count / keys.len() as f64).collect()
}

#[test]
fn requests_are_divided_by_weight_within_one_percent() {
    for weights in [&[90, 10][..], &[1, 1], &[99, 1], &[5, 0, 15], &[3, 2, 5, 10]] {
        let sum: u32 = weights.iter().sum();
        for (share, weight) in shares(&split(weights), &keys(7, 10_000)).iter().zip(weights) {
            let expected = f64::from(*weight) / f64::from(sum);
            // 10,000 draws: three standard deviations are at most 1.5 %.
            assert!((share - expected).abs() < 0.015, "{weights:?}: {share} instead of {expected}");
        }
    }
}

#[test]
fn small_consecutive_keys_are_divided_as_well_as_random_ones() {
    let keys: Vec<u64> = (0..10_000).collect();
    let share = shares(&split(&[90, 10]), &keys)[1];
    assert!((share - 0.1).abs() < 0.015, "{share}");
}

#[test]
fn a_target_without_weight_gets_no_request() {
    let split = split(&[1, 0]);
    assert!(keys(1, 1000).iter().all(|key| split.choose(*key) == Some(0)));
}

#[test]
fn no_weight_at_all_chooses_no_target() {
    assert_eq!(split(&[0, 0]).choose(1), None);
    assert_eq!(split(&[]).choose(1), None);
}

#[test]
fn the_last_target_gets_the_percentage_that_is_set_and_the_others_the_rest() {
    let split = split(&[30, 10, 0]);
    split.set_last(Some(60));
    let close = |share: f64, expected: f64| (share - expected).abs() < 1e-9;
    let report = split.report();
    assert!(
        close(report[0].share, 0.3) && close(report[1].share, 0.1) && close(report[2].share, 0.6),
        "{report:?}"
    );
    for (percent, last) in [(0, 0.0), (100, 1.0)] {
        split.set_last(Some(percent));
        assert_eq!(shares(&split, &keys(3, 1000))[2], last);
    }
    split.set_last(None);
    assert_eq!(split.last_percent(), None);
    assert!(close(split.report()[0].share, 0.75));
}

#[test]
fn the_rest_goes_somewhere_even_where_the_others_have_no_weight() {
    let split = split(&[0, 10]);
    split.set_last(Some(40));
    assert!((split.report()[0].share - 0.6).abs() < 1e-9);
}

#[test]
fn a_key_is_assigned_alike_in_every_process() {
    // Fixed values: another result would move all clients at an update.
    let split = split(&[50, 50]);
    let chosen: Vec<_> = (0..12).map(|key| split.choose(key).expect("a target")).collect();
    let again: Vec<_> = (0..12).map(|key| split.choose(key).expect("a target")).collect();
    assert_eq!(chosen, again);
    assert!(chosen.contains(&0) && chosen.contains(&1), "{chosen:?}");
}

#[test]
fn sticky_keys_and_targets_are_read_as_the_configuration_writes_them() {
    for text in ["none", "peer", "header:x-user", "cookie:session"] {
        assert_eq!(text.parse::<StickyKey>().map(|key| key.to_string()), Ok(text.to_owned()));
    }
    assert!("header:".parse::<StickyKey>().is_err());
    assert!("ip".parse::<StickyKey>().is_err_and(|error| error.contains("header:NAME")));
}

proptest! {
    /// Raising the weight of the last target, in the file or live, never moves a client away from it.
    #[test]
    fn a_raised_weight_moves_clients_only_to_its_target(
        weights in proptest::collection::vec(0u32..100, 1..5), last in 1u32..100, more in 1u32..100, seed: u64,
    ) {
        let with = |last| split(&[weights.as_slice(), &[last]].concat());
        let (before, after) = (with(last), with(last + more));
        let at = weights.len();
        for key in keys(seed, 200) {
            let (old, new) = (before.choose(key), after.choose(key));
            prop_assert!(old == new || new == Some(at), "{old:?} → {new:?}");
        }
    }

    /// The same for percentages: every step of a roll-out keeps those who were moved before.
    #[test]
    fn steps_up_never_move_a_client_back(weight in 1u32..100, step in 0u8..=99, seed: u64) {
        let split = split(&[weight, 1]);
        for key in keys(seed, 200) {
            split.set_last(Some(step));
            let old = split.choose(key);
            split.set_last(Some(step + 1));
            let new = split.choose(key);
            prop_assert!(old == new || new == Some(1));
        }
    }
}
