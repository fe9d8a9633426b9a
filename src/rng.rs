//! A small, fast random number generator for values that are not secret: choices, jitter, trace and request IDs.
//!
//! xoshiro256++ (Blackman and Vigna, 2018): sub-nanosecond, 256 bits of state, no system call after the seed. Each
//! worker owns one, so nothing is shared. Never use it for keys, tokens and nonces.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hasher},
};

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct Rng {
    state: [u64; 4],
}

impl Rng {
    /// Seeded from the operating system; two generators of one process differ.
    pub fn new() -> Self {
        // Each `RandomState` has its own keys, seeded by the system once per thread.
        let word = |index: u64| {
            let mut hasher = RandomState::new().build_hasher();
            hasher.write_u64(index);
            hasher.finish()
        };
        Self::from_state([word(0), word(1), word(2), word(3)])
    }

    /// The same seed gives the same sequence: for tests and simulations.
    pub fn from_seed(seed: u64) -> Self {
        // SplitMix64 expands the seed, as the authors of xoshiro recommend.
        let mut x = seed;
        Self::from_state(std::array::from_fn(|_| {
            x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(x)
        }))
    }

    fn from_state(state: [u64; 4]) -> Self {
        // xoshiro never leaves the state of all zeros.
        if state == [0; 4] { Self { state: [1, 0, 0, 0] } } else { Self { state } }
    }

    pub fn next_u64(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.state;
        let result = a.wrapping_add(*d).rotate_left(23).wrapping_add(*a);
        let t = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= t;
        *d = d.rotate_left(45);
        result
    }

    /// Uniform in `0..n`; 0 if `n` is 0. The bias is below n / 2^64.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Uniform in `0.0..1.0`.
    pub fn unit_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// True with the probability `p` (0 or less: never; 1 or more: always).
    pub fn chance(&mut self, p: f64) -> bool {
        self.unit_f64() < p
    }

    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        for chunk in out.chunks_mut(8) {
            chunk.copy_from_slice(&self.next_u64().to_le_bytes()[..chunk.len()]);
        }
        out
    }

    /// `duration` plus or minus up to `ratio` of it, so that periodic work that starts together spreads out.
    pub fn jitter(&mut self, duration: std::time::Duration, ratio: f64) -> std::time::Duration {
        duration.mul_f64(1.0 + ratio.clamp(0.0, 1.0) * (2.0 * self.unit_f64() - 1.0))
    }
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

/// Mixes the bits of `x` (the finisher of SplitMix64): a hash for integer keys.
pub const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, time::Duration};

    use super::*;

    #[test]
    fn matches_the_reference_implementation() {
        // The reference implementation's first outputs for the state 1, 2, 3, 4.
        let mut rng = Rng::from_state([1, 2, 3, 4]);
        let expected = [41_943_041, 58_720_359, 3_588_806_011_781_223, 3_591_011_842_654_386];
        assert_eq!(std::array::from_fn(|_| rng.next_u64()), expected);
    }

    #[test]
    fn seeds_repeat_and_new_generators_differ() {
        let draw = |mut rng: Rng| rng.bytes::<16>();
        assert_eq!(draw(Rng::from_seed(7)), draw(Rng::from_seed(7)));
        let fresh: HashSet<_> = (0..1000).map(|_| draw(Rng::new())).collect();
        assert_eq!(fresh.len(), 1000);
    }

    #[test]
    fn below_covers_its_range_evenly() {
        let mut rng = Rng::from_seed(1);
        let mut counts = [0u32; 10];
        for _ in 0..100_000 {
            counts[rng.below(10)] += 1;
        }
        assert!(counts.iter().all(|&n| (9_500..10_500).contains(&n)), "{counts:?}");
        assert_eq!((rng.below(0), rng.below(1)), (0, 0));
    }

    #[test]
    fn values_stay_within_their_bounds() {
        let mut rng = Rng::from_seed(2);
        let base = Duration::from_secs(10);
        for _ in 0..10_000 {
            assert!((0.0..1.0).contains(&rng.unit_f64()));
            let jittered = rng.jitter(base, 0.1);
            assert!(jittered >= base.mul_f64(0.9) && jittered <= base.mul_f64(1.1));
        }
        assert!(!rng.chance(0.0) && rng.chance(1.0));
    }

    #[test]
    fn bytes_fills_any_length() {
        assert!((0..20).any(|seed| Rng::from_seed(seed).bytes::<3>()[2] != 0));
    }
}
