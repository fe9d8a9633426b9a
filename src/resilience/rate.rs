//! The rate limit: GCRA, a token bucket that stores one instant per key.

use std::{
    fmt,
    hash::{BuildHasher, RandomState},
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::text_value;

/// `[defaults.rate_limit]`; absent = no limit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RateSettings {
    /// Requests per second.
    pub rate: u32,
    /// How many requests may arrive at once.
    #[serde(default = "one")]
    pub burst: u32,
    /// Which requests share one allowance.
    #[serde(default)]
    pub per: RateKey,
}

const fn one() -> u32 {
    1
}

/// Which requests share one allowance: `upstream`, `peer` or `header:NAME`.
#[derive(Clone, PartialEq, Eq, Default)]
pub enum RateKey {
    #[default]
    Upstream,
    Peer,
    Header(String),
}

impl FromStr for RateKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("header:")) {
            ("upstream", _) => Ok(Self::Upstream),
            ("peer", _) => Ok(Self::Peer),
            (_, Some(name)) if !name.is_empty() => Ok(Self::Header(name.to_ascii_lowercase())),
            _ => Err(format!("`{text}` is not a rate limit key: use upstream, peer or header:NAME")),
        }
    }
}

impl fmt::Display for RateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Upstream => f.write_str("upstream"),
            Self::Peer => f.write_str("peer"),
            Self::Header(name) => write!(f, "header:{name}"),
        }
    }
}

text_value!(RateKey, "RateKey", "upstream, peer or header:NAME", r"upstream|peer|header:.+");

/// The most keys that are distinguished; a further key replaces one that has been idle longest.
pub const MAX_KEYS: usize = 4096;

/// The number of slots in a set, in which a key's state may be: few enough to check all of them.
const WAYS: usize = 8;

/// The rate limit of an upstream or an inbound side, shared by all workers, without a lock.
///
/// GCRA: it stores for each key the moment at which its allowance is full again. A request advances it by `1 / rate`
/// and is refused if it would be more than `burst` requests ahead of now.
#[derive(Debug)]
pub struct RateLimit {
    /// Nanoseconds that one request uses up.
    cost: u64,
    /// How far ahead of now the moment may be, in nanoseconds.
    allowance: u64,
    epoch: Instant,
    /// Keyed, so that clients cannot choose header values that share a slot.
    hasher: RandomState,
    slots: Box<[Slot]>,
}

#[derive(Debug, Default)]
struct Slot {
    /// The hash of the key; 0 = unused.
    key: AtomicU64,
    /// When the allowance is full again, in nanoseconds since the epoch.
    full_at: AtomicU64,
}

impl RateLimit {
    /// `hasher` is an argument, like all randomness. A rate of 0 refuses everything.
    pub fn new(settings: &RateSettings, now: Instant, hasher: RandomState) -> Self {
        let cost = 1_000_000_000u64.checked_div(settings.rate.into()).unwrap_or(u64::MAX);
        let slots = if settings.per == RateKey::Upstream { 1 } else { MAX_KEYS };
        Self {
            cost,
            allowance: cost.saturating_mul(settings.burst.max(1).into()),
            epoch: now,
            hasher,
            slots: (0..slots).map(|_| Slot::default()).collect(),
        }
    }

    /// Admits one request of this key, or returns how long to wait. With `per = "upstream"` the key is ignored.
    pub fn admit(&self, key: &[u8], now: Instant) -> Result<(), Duration> {
        if self.cost == u64::MAX {
            return Err(Duration::from_secs(1));
        }
        let now = u64::try_from(now.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX);
        let slot = self.slot(key);
        let mut full_at = slot.full_at.load(Ordering::Relaxed);
        loop {
            let next = full_at.max(now).saturating_add(self.cost);
            let ahead = next - now;
            if ahead > self.allowance {
                return Err(Duration::from_nanos(ahead - self.allowance));
            }
            match slot.full_at.compare_exchange_weak(full_at, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(seen) => full_at = seen,
            }
        }
    }

    /// The key's own slot, or the stalest one of its set. A new key inherits the moment in that slot, which has passed
    /// unless thousands of keys are busy at once; then the limit is stricter than configured.
    fn slot(&self, key: &[u8]) -> &Slot {
        if let [only] = &*self.slots {
            return only;
        }
        let hash = self.hasher.hash_one(key).max(1);
        let sets = self.slots.len() / WAYS;
        // The upper bits choose the set.
        let first = (hash >> 32) as usize % sets * WAYS;
        let set = &self.slots[first..first + WAYS];
        loop {
            if let Some(slot) = set.iter().find(|slot| slot.key.load(Ordering::Relaxed) == hash) {
                return slot;
            }
            let stale = set.iter().min_by_key(|slot| slot.full_at.load(Ordering::Relaxed)).unwrap_or(&set[0]);
            let owner = stale.key.load(Ordering::Relaxed);
            if owner == hash
                || stale.key.compare_exchange(owner, hash, Ordering::Relaxed, Ordering::Relaxed).is_ok()
            {
                return stale;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn limit(rate: u32, burst: u32, per: RateKey) -> (RateLimit, Instant) {
        let now = Instant::now();
        (RateLimit::new(&RateSettings { rate, burst, per }, now, RandomState::new()), now)
    }

    #[test]
    fn admits_a_burst_and_then_the_rate() {
        let (limit, now) = limit(100, 50, RateKey::Upstream);
        assert_eq!((0..80).filter(|_| limit.admit(b"", now).is_ok()).count(), 50);
        assert_eq!(limit.admit(b"", now), Err(MS * 10));
        assert_eq!(limit.admit(b"", now + MS * 4), Err(MS * 6));
        assert_eq!(limit.admit(b"", now + MS * 10), Ok(()), "the returned wait is exact");
        assert!(limit.admit(b"", now + MS * 10).is_err());
        let later = now + Duration::from_secs(3600);
        assert_eq!((0..80).filter(|_| limit.admit(b"", later).is_ok()).count(), 50, "no more than the burst");
    }

    #[test]
    fn keys_do_not_share() {
        let (limit, now) = limit(1, 1, RateKey::Peer);
        assert!(limit.admit(b"a", now).is_ok() && limit.admit(b"b", now).is_ok());
        assert!(limit.admit(b"a", now).is_err() && limit.admit(b"b", now).is_err());
        let (whole, now) = super::tests::limit(1, 1, RateKey::Upstream);
        assert!(whole.admit(b"a", now).is_ok() && whole.admit(b"b", now).is_err());
    }

    #[test]
    fn a_flood_of_keys_does_not_evict_a_key_over_its_limit() {
        let (limit, now) = limit(1, 100, RateKey::Header("x-user".to_owned()));
        while limit.admit(b"greedy", now).is_ok() {}
        for n in 0..100_000u32 {
            let _ = limit.admit(&n.to_ne_bytes(), now);
        }
        assert!(limit.admit(b"greedy", now).is_err());
        assert_eq!(limit.slots.len(), MAX_KEYS);
    }

    #[test]
    fn a_rate_of_zero_refuses() {
        let (limit, now) = limit(0, 5, RateKey::Upstream);
        assert!(limit.admit(b"", now).is_err());
    }

    #[test]
    fn workers_share_one_allowance() {
        let (limit, now) = limit(1000, 500, RateKey::Peer);
        let granted: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..1000).filter(|_| limit.admit(b"p", now).is_ok()).count()))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(granted, 500);
    }

    proptest! {
        #[test]
        fn no_window_exceeds_burst_and_rate(
            rate in 1u32..2000, burst in 1u32..50, passes in prop::collection::vec(0u64..30_000, 1..300),
        ) {
            let (limit, start) = limit(rate, burst, RateKey::Upstream);
            let (mut now, mut granted) = (0u64, Vec::new());
            for pass in passes {
                now += pass;
                if limit.admit(b"", start + Duration::from_micros(now)).is_ok() { granted.push(now); }
            }
            for (first, from) in granted.iter().enumerate() {
                for (count, to) in granted[first..].iter().enumerate() {
                    let allowed = f64::from(burst) + f64::from(rate) * (to - from) as f64 / 1e6;
                    prop_assert!((count + 1) as f64 <= allowed + 0.01);
                }
            }
        }

        #[test]
        fn the_returned_wait_is_enough(rate in 1u32..2000, burst in 1u32..50, taken in 0u32..100) {
            let (limit, now) = limit(rate, burst, RateKey::Upstream);
            for _ in 0..taken { let _ = limit.admit(b"", now); }
            if let Err(wait) = limit.admit(b"", now) {
                prop_assert_eq!(limit.admit(b"", now + wait), Ok(()));
            }
        }
    }
}
