//! How long an HTTP/1.1 connection may lie idle: what the upstream says, and what its closes teach.

use std::time::Duration;

use tokio::time::Instant;

/// Never learned below this.
const FLOOR: Duration = Duration::from_millis(100);
/// What was learned doubles in this time: a server that does close early is met again with each doubling, which costs a look
/// at one connection.
const DOUBLES_IN: Duration = Duration::from_secs(5 * 60);
/// What has grown beyond this limits nothing any more.
const FORGOTTEN: Duration = Duration::from_secs(3600);
/// Closes within this time are one event. Also how much later than it happened a close may be noticed.
const ONE_EVENT: Duration = Duration::from_secs(1);
/// A first event that no second one confirms in this time is forgotten.
const UNCONFIRMED: Duration = Duration::from_secs(5 * 60);

/// What the upstream's closes have taught about its idle time: shorter once it is sure, longer slowly.
///
/// One event teaches nothing: a restart closes all idle connections at once, however young they are. An idle timeout is
/// known by a second event, of connections that were as old; while none that is older turns out to be open, and the
/// endpoint takes connections all the time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Learned {
    limit: Option<(Duration, Instant)>,
    suspected: Option<Event>,
}

/// Closes at one time.
#[derive(Clone, Copy, Debug)]
struct Event {
    /// How long the youngest of the connections had been idle.
    age: Duration,
    since: Instant,
}

impl Learned {
    /// The upstream has closed a connection that had been idle for `age`.
    pub fn closed(&mut self, age: Duration, now: Instant) {
        let earlier = self.suspected.filter(|event| now.saturating_duration_since(event.since) < UNCONFIRMED);
        if let Some(event) = earlier
            && now.saturating_duration_since(event.since) < ONE_EVENT
        {
            self.suspected = Some(Event { age: event.age.min(age), ..event });
            return;
        }
        self.suspected = Some(Event { age, since: now });
        if let Some(event) = earlier.filter(|event| is_alike(event.age, age)) {
            let shorter = (event.age.min(age) * 3 / 4).max(FLOOR);
            if self.limit(now).is_none_or(|limit| shorter < limit) {
                self.limit = Some((shorter, now));
            }
        }
    }

    /// A connection that had been idle for `age` is still open: those that were closed younger were closed for another
    /// reason.
    pub fn outlived(&mut self, age: Duration) {
        if self.suspected.is_some_and(|event| event.age <= age) {
            self.suspected = None;
        }
    }

    /// The upstream takes no connections.
    pub fn restarted(&mut self) {
        self.suspected = None;
    }

    /// How long a connection may lie idle, as far as closes tell; `None` = they don't.
    pub fn limit(&self, now: Instant) -> Option<Duration> {
        let (limit, since) = self.limit?;
        let doublings = now.saturating_duration_since(since).as_secs_f64() / DOUBLES_IN.as_secs_f64();
        let grown = limit.as_secs_f64() * doublings.exp2();
        (grown < FORGOTTEN.as_secs_f64()).then(|| Duration::from_secs_f64(grown))
    }
}

/// Whether two ages can be of one idle timeout. A close may be noticed late by [`ONE_EVENT`].
fn is_alike(one: Duration, other: Duration) -> bool {
    let (shorter, longer) = (one.min(other), one.max(other));
    let late = if shorter >= ONE_EVENT { ONE_EVENT } else { Duration::ZERO };
    longer <= shorter + (shorter / 2).max(late)
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

    const SECOND: Duration = Duration::from_secs(1);

    /// Closes of connections that had been idle for `age` seconds each, two seconds apart.
    fn after_closes(ages: &[f64]) -> (Learned, Instant) {
        let (mut learned, mut now) = (Learned::default(), Instant::now());
        for age in ages {
            now += SECOND * 2;
            learned.closed(Duration::from_secs_f64(*age), now);
        }
        (learned, now)
    }

    #[test]
    fn a_second_close_at_the_same_age_shortens_the_idle_time() {
        let limit = |ages: &[f64]| {
            let (learned, now) = after_closes(ages);
            learned.limit(now).map(|limit| (limit.as_secs_f64() * 10.0).round() / 10.0)
        };
        assert_eq!(limit(&[2.0]), None, "one may have another reason");
        assert_eq!(limit(&[2.0, 2.1]), Some(1.5));
        assert_eq!(limit(&[3.0, 2.0]), Some(1.5), "noticed a second late");
        assert_eq!(limit(&[3.5, 0.2]), None, "not alike");
        assert_eq!(limit(&[2.0, 2.0, 3.0, 3.0]), Some(1.5), "a later close teaches nothing new");
        assert_eq!(limit(&[0.001, 0.001]), Some(0.1), "no less than the floor");
    }

    /// A restart closes all connections, whatever their age.
    #[test]
    fn simultaneous_closes_teach_nothing() {
        let (mut learned, mut now) = (Learned::default(), Instant::now());
        for age in [0.05, 0.1, 0.1, 0.3, 2.0, 3.9] {
            now += Duration::from_millis(20);
            learned.closed(Duration::from_secs_f64(age), now);
        }
        assert_eq!(learned.limit(now), None);
    }

    #[test]
    fn closes_during_a_restart_teach_nothing() {
        let (mut learned, start) = (Learned::default(), Instant::now());
        let age = Duration::from_millis(100);
        for restart in 0..5 {
            // The next one goes before the endpoint takes connections again.
            learned.closed(age, start + SECOND * 10 * restart);
            learned.restarted();
        }
        assert_eq!(learned.limit(start + SECOND * 50), None);
        for restart in 0..5 {
            // It never refused one; but connections grow older than those that were closed.
            learned.closed(age, start + SECOND * (60 + 10 * restart));
            learned.outlived(age * 3);
        }
        assert_eq!(learned.limit(start + SECOND * 120), None);
        learned.closed(age, start + SECOND * 200);
        learned.closed(age, start + SECOND * 200 + UNCONFIRMED);
        assert_eq!(learned.limit(start + SECOND * 600), None, "too long ago");
    }

    #[test]
    fn what_was_learned_fades() {
        let (mut learned, start) = after_closes(&[4.0, 4.0]);
        let after = |minutes: u64| start + Duration::from_secs(minutes * 60);
        for (minutes, seconds) in [(0, 3), (5, 6), (10, 12), (20, 48)] {
            assert_eq!(
                learned.limit(after(minutes)),
                Some(Duration::from_secs(seconds)),
                "after {minutes} min"
            );
        }
        assert_eq!(learned.limit(after(60)), None, "forgotten");
        assert_eq!(learned.limit(after(60 * 24 * 365)), None);
        learned.closed(Duration::from_secs(8), after(10));
        learned.closed(Duration::from_secs(8), after(10) + SECOND * 9);
        assert_eq!(
            learned.limit(after(10) + SECOND * 9),
            Some(Duration::from_secs(6)),
            "what is seen again is learned again"
        );
    }
}
