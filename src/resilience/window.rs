//! Counting successes over the last while, from many workers, without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

/// A window is this many slices, and moves by one at a time. A power of two, so that slice numbers may wrap round.
pub const SLICES: usize = 16;

/// Counts per slice of time. Each slot holds the number of its slice (upper half) and the count (lower half), so
/// that a slot is taken over from an older slice and counted in one atomic step.
#[derive(Debug, Default)]
pub struct SlidingCount {
    slots: [AtomicU64; SLICES],
}

impl SlidingCount {
    /// Counts one in a slice. Slices are numbered in the order of time.
    pub fn add(&self, slice: u32) {
        let slot = &self.slots[slice as usize % SLICES];
        let seen = slot.load(Ordering::Relaxed);
        // A worker whose clock was read a moment earlier must not throw the slot back; it counts in the later slice.
        let current = seen != 0 && number(seen).wrapping_sub(slice) < u32::MAX / 2;
        let taken_over =
            || slot.compare_exchange(seen, first_of(slice), Ordering::Relaxed, Ordering::Relaxed).is_ok();
        // Where another worker took the slot over just now, this one counts there.
        if current || !taken_over() {
            slot.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The sum over the window that ends with this slice.
    pub fn sum(&self, slice: u32) -> u64 {
        self.slots
            .iter()
            .map(|slot| slot.load(Ordering::Relaxed))
            .filter(|seen| (slice.wrapping_sub(number(*seen)) as usize) < SLICES)
            .map(|seen| seen & u64::from(u32::MAX))
            .sum()
    }

    pub fn clear(&self) {
        for slot in &self.slots {
            slot.store(0, Ordering::Relaxed);
        }
    }
}

const fn number(slot: u64) -> u32 {
    (slot >> 32) as u32
}

const fn first_of(slice: u32) -> u64 {
    ((slice as u64) << 32) | 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn counts_what_a_list_of_all_would(steps in prop::collection::vec((0u32..22, 1u32..5), 1..60)) {
            let (count, mut log, mut slice) = (SlidingCount::default(), Vec::new(), u32::MAX - 30);
            for (pass, times) in steps {
                slice = slice.wrapping_add(pass);
                for _ in 0..times {
                    count.add(slice);
                    log.push(slice);
                }
                let expected = log.iter().filter(|at| (slice.wrapping_sub(**at) as usize) < SLICES).count();
                prop_assert_eq!(count.sum(slice), expected as u64);
            }
        }
    }

    #[test]
    fn a_clock_read_earlier_takes_nothing_away() {
        let count = SlidingCount::default();
        let (earlier, later) = (5, 5 + SLICES as u32);
        count.add(later);
        count.add(earlier);
        assert_eq!(count.sum(later), 2);
    }

    #[test]
    fn workers_lose_no_count() {
        let count = SlidingCount::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10_000).for_each(|n| count.add(n / 2_000)));
            }
        });
        assert_eq!(count.sum(5), 40_000);
        count.clear();
        assert_eq!(count.sum(5), 0);
    }
}
