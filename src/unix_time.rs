//! The time of day in milliseconds, as the store keeps it, and a clock that does not jump.

use std::{
    ops::Add,
    time::{Duration, Instant, SystemTime},
};

/// Milliseconds since 1970-01-01 UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    /// The wall clock; 0 before 1970.
    pub fn now() -> Self {
        Self::from(SystemTime::now())
    }

    /// The time since `earlier`, zero if that is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    pub fn before(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(millis(duration)))
    }
}

impl From<SystemTime> for UnixMillis {
    fn from(time: SystemTime) -> Self {
        Self(millis(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()))
    }
}

impl From<UnixMillis> for SystemTime {
    fn from(time: UnixMillis) -> Self {
        Self::UNIX_EPOCH + Duration::from_millis(time.0)
    }
}

impl Add<Duration> for UnixMillis {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(millis(duration)))
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The wall clock at one moment, carried on by the monotonic clock: when the wall clock is set while the process runs,
/// no message becomes due or expires.
#[derive(Clone, Copy, Debug)]
pub struct SteadyClock {
    wall: UnixMillis,
    at: Instant,
}

impl SteadyClock {
    /// Begins with this time of day.
    pub fn starting_at(wall: UnixMillis) -> Self {
        Self { wall, at: Instant::now() }
    }

    pub fn now(&self) -> UnixMillis {
        self.wall + self.at.elapsed()
    }
}

impl Default for SteadyClock {
    fn default() -> Self {
        Self::starting_at(UnixMillis::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converts_and_saturates() {
        let time = UnixMillis(1_500);
        assert_eq!(UnixMillis::from(SystemTime::from(time)), time);
        assert_eq!(time + Duration::from_secs(1), UnixMillis(2_500));
        assert_eq!((time + Duration::MAX, time.before(Duration::MAX)), (UnixMillis(u64::MAX), UnixMillis(0)));
        assert_eq!(time.since(UnixMillis(2_000)), Duration::ZERO);
        assert!(SteadyClock::starting_at(time).now() >= time);
    }
}
