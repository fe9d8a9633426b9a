//! How long an HTTP/1.1 connection may stay idle: announced by the upstream, or learned from the connections that it
//! closes.

use std::time::Duration;

use tokio::time::Instant;

/// The shortest limit that is learned.
const MIN_LIMIT: Duration = Duration::from_millis(100);
/// The learned limit doubles in this time. A server that does close early is detected again after each doubling,
/// which costs a check of one connection.
const DOUBLING_TIME: Duration = Duration::from_secs(5 * 60);
/// A learned limit that has grown beyond this is dropped.
const MAX_LIMIT: Duration = Duration::from_secs(3600);
/// Closes within this time are one event. Also how late a close may be noticed.
const EVENT_WINDOW: Duration = Duration::from_secs(1);
/// A first event is dropped if no second one confirms it within this time.
const CONFIRMATION_WINDOW: Duration = Duration::from_secs(5 * 60);

/// The idle timeout of an upstream, learned from the connections that it closes: shortened once confirmed, extended
/// slowly.
///
/// One event proves nothing: a restart closes all idle connections at once, whatever their age. A second event with
/// connections of about the same age confirms an idle timeout, unless an older connection turns out to be open in
/// between or the endpoint refuses connections.
#[derive(Clone, Copy, Debug, Default)]
pub struct LearnedIdleTimeout {
    limit: Option<(Duration, Instant)>,
    suspected: Option<CloseEvent>,
}

/// Connections that the upstream closed at about the same time.
#[derive(Clone, Copy, Debug)]
struct CloseEvent {
    /// How long the youngest of the connections had been idle.
    age: Duration,
    since: Instant,
}

impl LearnedIdleTimeout {
    /// Records that the upstream closed a connection that had been idle for `age`.
    pub fn record_close(&mut self, age: Duration, now: Instant) {
        let earlier =
            self.suspected.filter(|event| now.saturating_duration_since(event.since) < CONFIRMATION_WINDOW);
        if let Some(event) = earlier
            && now.saturating_duration_since(event.since) < EVENT_WINDOW
        {
            self.suspected = Some(CloseEvent { age: event.age.min(age), ..event });
            return;
        }
        self.suspected = Some(CloseEvent { age, since: now });
        if let Some(event) = earlier.filter(|event| is_alike(event.age, age)) {
            let shorter = (event.age.min(age) * 3 / 4).max(MIN_LIMIT);
            if self.limit(now).is_none_or(|limit| shorter < limit) {
                self.limit = Some((shorter, now));
            }
        }
    }

    /// Records that a connection that had been idle for `age` is still open: younger ones were closed for another
    /// reason.
    pub fn record_survivor(&mut self, age: Duration) {
        if self.suspected.is_some_and(|event| event.age <= age) {
            self.suspected = None;
        }
    }

    /// Records that the upstream accepts no connections: it is restarting, and pending observations are dropped.
    pub fn record_restart(&mut self) {
        self.suspected = None;
    }

    /// The learned limit for an idle connection; `None` = unknown.
    pub fn limit(&self, now: Instant) -> Option<Duration> {
        let (limit, since) = self.limit?;
        let doublings = now.saturating_duration_since(since).as_secs_f64() / DOUBLING_TIME.as_secs_f64();
        let grown = limit.as_secs_f64() * doublings.exp2();
        (grown < MAX_LIMIT.as_secs_f64()).then(|| Duration::from_secs_f64(grown))
    }
}

/// Whether two ages can be of the same idle timeout. A close may be noticed late by [`EVENT_WINDOW`].
fn is_alike(one: Duration, other: Duration) -> bool {
    let (shorter, longer) = (one.min(other), one.max(other));
    let late = if shorter >= EVENT_WINDOW { EVENT_WINDOW } else { Duration::ZERO };
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
    fn keep_alive_timeout_is_parsed_as_servers_write_it() {
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
    fn after_closes(ages: &[f64]) -> (LearnedIdleTimeout, Instant) {
        let (mut learned, mut now) = (LearnedIdleTimeout::default(), Instant::now());
        for age in ages {
            now += SECOND * 2;
            learned.record_close(Duration::from_secs_f64(*age), now);
        }
        (learned, now)
    }

    #[test]
    fn a_second_close_at_the_same_age_shortens_the_idle_time() {
        let limit = |ages: &[f64]| {
            let (learned, now) = after_closes(ages);
            learned.limit(now).map(|limit| (limit.as_secs_f64() * 10.0).round() / 10.0)
        };
        assert_eq!(limit(&[2.0]), None, "a single close may have another reason");
        assert_eq!(limit(&[2.0, 2.1]), Some(1.5));
        assert_eq!(limit(&[3.0, 2.0]), Some(1.5), "noticed a second late");
        assert_eq!(limit(&[3.5, 0.2]), None, "not alike");
        assert_eq!(limit(&[2.0, 2.0, 3.0, 3.0]), Some(1.5), "a later close changes nothing");
        assert_eq!(limit(&[0.001, 0.001]), Some(0.1), "no less than the floor");
    }

    /// A restart closes all connections, whatever their age.
    #[test]
    fn simultaneous_closes_set_no_limit() {
        let (mut learned, mut now) = (LearnedIdleTimeout::default(), Instant::now());
        for age in [0.05, 0.1, 0.1, 0.3, 2.0, 3.9] {
            now += Duration::from_millis(20);
            learned.record_close(Duration::from_secs_f64(age), now);
        }
        assert_eq!(learned.limit(now), None);
    }

    #[test]
    fn closes_during_a_restart_set_no_limit() {
        let (mut learned, start) = (LearnedIdleTimeout::default(), Instant::now());
        let age = Duration::from_millis(100);
        for restart in 0..5 {
            // The next close comes before the endpoint accepts connections again.
            learned.record_close(age, start + SECOND * 10 * restart);
            learned.record_restart();
        }
        assert_eq!(learned.limit(start + SECOND * 50), None);
        for restart in 0..5 {
            // The endpoint never refused a connection, but other connections outlive those that were closed.
            learned.record_close(age, start + SECOND * (60 + 10 * restart));
            learned.record_survivor(age * 3);
        }
        assert_eq!(learned.limit(start + SECOND * 120), None);
        learned.record_close(age, start + SECOND * 200);
        learned.record_close(age, start + SECOND * 200 + CONFIRMATION_WINDOW);
        assert_eq!(learned.limit(start + SECOND * 600), None, "too long ago");
    }

    #[test]
    fn a_learned_limit_expires() {
        let (mut learned, start) = after_closes(&[4.0, 4.0]);
        let after = |minutes: u64| start + Duration::from_secs(minutes * 60);
        for (minutes, seconds) in [(0, 3), (5, 6), (10, 12), (20, 48)] {
            assert_eq!(
                learned.limit(after(minutes)),
                Some(Duration::from_secs(seconds)),
                "after {minutes} min"
            );
        }
        assert_eq!(learned.limit(after(60)), None, "dropped");
        assert_eq!(learned.limit(after(60 * 24 * 365)), None);
        learned.record_close(Duration::from_secs(8), after(10));
        learned.record_close(Duration::from_secs(8), after(10) + SECOND * 9);
        assert_eq!(
            learned.limit(after(10) + SECOND * 9),
            Some(Duration::from_secs(6)),
            "a timeout that is seen again is learned again"
        );
    }
}
