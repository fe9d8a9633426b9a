//! How long an HTTP/1.1 connection may lie idle: what the upstream says, and what its closes teach.

use std::time::Duration;

use tokio::time::Instant;

/// Never learned below this.
const FLOOR: Duration = Duration::from_millis(100);
/// What was learned doubles in this time. One restart closes all idle connections, however young they are, and says
/// nothing of the next hours; a server that does close early is met again with each doubling, which costs a look at
/// one connection.
const DOUBLES_IN: Duration = Duration::from_secs(5 * 60);
/// What has grown beyond this limits nothing any more.
const FORGOTTEN: Duration = Duration::from_secs(3600);

/// What the upstream's closes have taught about its idle time: shorter at once, longer slowly.
#[derive(Clone, Copy, Debug, Default)]
pub struct Learned(Option<(Duration, Instant)>);

impl Learned {
    /// The upstream closed a connection that had been idle for `age`: the next ones are not kept that long.
    pub fn closed(&mut self, age: Duration, now: Instant) {
        let shorter = (age * 3 / 4).max(FLOOR);
        if self.limit(now).is_none_or(|limit| shorter < limit) {
            self.0 = Some((shorter, now));
        }
    }

    /// How long a connection may lie idle, as far as closes tell; `None` = they don't.
    pub fn limit(&self, now: Instant) -> Option<Duration> {
        let (limit, since) = self.0?;
        let doublings = now.saturating_duration_since(since).as_secs_f64() / DOUBLES_IN.as_secs_f64();
        let grown = limit.as_secs_f64() * doublings.exp2();
        (grown < FORGOTTEN.as_secs_f64()).then(|| Duration::from_secs_f64(grown))
    }
}

/// The `timeout` parameter of a `Keep-Alive` field, in seconds.
pub fn keep_alive_timeout(value: &str) -> Option<Duration> {
    let seconds = value.split(',').find_map(|part| {
        let (name, value) = part.split_once('=')?;
        name.trim().eq_ignore_ascii_case("timeout").then(|| value.trim().parse::<u32>().ok())?
    })?;
    Some(Duration::from_secs(seconds.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keep_alive_is_read_as_servers_write_it() {
        for (value, seconds) in [
            ("timeout=5", Some(5)),
            ("timeout=5, max=100", Some(5)),
            ("max=100, Timeout = 72", Some(72)),
            ("max=100", None),
            ("timeout=-1", None),
            ("timeout=x", None),
        ] {
            assert_eq!(keep_alive_timeout(value), seconds.map(Duration::from_secs), "{value}");
        }
    }

    #[test]
    fn a_close_shortens_the_idle_time_at_once() {
        let (mut learned, now) = (Learned::default(), Instant::now());
        assert_eq!(learned.limit(now), None);
        learned.closed(Duration::from_secs(2), now);
        assert_eq!(learned.limit(now), Some(Duration::from_millis(1500)));
        learned.closed(Duration::from_secs(3), now);
        assert_eq!(
            learned.limit(now),
            Some(Duration::from_millis(1500)),
            "a later close teaches nothing new"
        );
        learned.closed(Duration::from_millis(1), now);
        assert_eq!(learned.limit(now), Some(FLOOR));
    }

    #[test]
    fn what_was_learned_fades() {
        let (mut learned, start) = (Learned::default(), Instant::now());
        let after = |minutes: u64| start + Duration::from_secs(minutes * 60);
        learned.closed(Duration::from_secs(4), start);
        for (minutes, seconds) in [(0, 3), (5, 6), (10, 12), (20, 48)] {
            assert_eq!(
                learned.limit(after(minutes)),
                Some(Duration::from_secs(seconds)),
                "after {minutes} min"
            );
        }
        let mut again = learned;
        again.closed(Duration::from_secs(8), after(10));
        assert_eq!(
            again.limit(after(10)),
            Some(Duration::from_secs(6)),
            "what is seen again is learned again"
        );
        assert_eq!(learned.limit(after(60)), None, "forgotten");
        assert_eq!(learned.limit(after(60 * 24 * 365)), None);
    }
}
