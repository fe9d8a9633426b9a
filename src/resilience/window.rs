//! A sliding-window counter for many workers, without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

/// The number of slices in a window, which moves by one slice at a time. A power of two, so that slice numbers
/// may wrap.
pub const SLICES: usize = 16;

/// Counts per slice of time. Each slot holds the number of its slice (upper half) and the count (lower half), so
/// that reusing the slot of an older slice and counting are one atomic step.
#[derive(Debug, Default)]
pub struct SlidingCount {
    slots: [AtomicU64; SLICES],
}

impl SlidingCount {
    /// Adds one to a slice. Slices are numbered in time order.
    pub fn add(&self, slice: u32) {
        let slot = &self.slots[slice as usize % SLICES];
        let seen = slot.load(Ordering::Relaxed);
        // A worker that read its clock earlier must not reset the slot to an older slice; it counts in the later one.
        let current = seen != 0 && slice_number(seen).wrapping_sub(slice) < u32::MAX / 2;
        let reused =
            || slot.compare_exchange(seen, first_count(slice), Ordering::Relaxed, Ordering::Relaxed).is_ok();
        // If another worker has just reused the slot, this one counts in that slice.
        if current || !reused() {
            slot.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The sum over the window that ends with this slice.
    pub fn sum(&self, slice: u32) -> u64 {
        self.slots
            .iter()
            .map(|slot| slot.load(Ordering::Relaxed))
            .filter(|seen| (slice.wrapping_sub(slice_number(*seen)) as usize) < SLICES)
            .map(|seen| seen & u64::from(u32::MAX))
            .sum()
    }

    pub fn clear(&self) {
        for slot in &self.slots {
            slot.store(0, Ordering::Relaxed);
        }
    }
}

const fn slice_number(slot: u64) -> u32 {
    (slot >> 32) as u32
}

const fn first_count(slice: u32) -> u64 {
    ((slice as u64) << 32) | 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn counts_like_a_list(steps in prop::collection::vec((0u32..22, 1u32..5), 1..60)) {
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
    fn an_earlier_clock_reading_loses_no_count() {
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
