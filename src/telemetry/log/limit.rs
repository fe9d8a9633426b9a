//! Holds back what repeats.

use std::{
    collections::HashMap,
    fmt::{self, Write},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::{Event, Level, Metadata, Subscriber, field::Field};
use tracing_subscriber::layer::{Context, Filter};

/// In each window,
const WINDOW: Duration = Duration::from_secs(10);
/// the very same line is written this often,
const SAME: u32 = 5;
/// and lines from one place in the code, whatever they say, this often.
const PLACE: u32 = 200;
/// Kinds of lines that are told apart; beyond, nothing more is limited until a window ends.
const KINDS: usize = 1024;

/// Counts lines by kind. A fixed window is coarse and cheap, and good enough for a log.
#[derive(Debug, Default)]
struct Counts {
    kinds: HashMap<u64, Count>,
}

#[derive(Debug)]
struct Count {
    since: Instant,
    seen: u32,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Write,
    /// Write, and say first that so many were held back.
    WriteAfter(u32),
    HoldBack,
}

impl Counts {
    fn count(&mut self, kind: u64, burst: u32, now: Instant) -> Verdict {
        if self.kinds.len() >= KINDS && !self.kinds.contains_key(&kind) {
            self.kinds.retain(|_, count| now.saturating_duration_since(count.since) < WINDOW);
            if self.kinds.len() >= KINDS {
                return Verdict::Write;
            }
        }
        let count = self.kinds.entry(kind).or_insert(Count { since: now, seen: 0 });
        let mut held_back = 0;
        if now.saturating_duration_since(count.since) >= WINDOW {
            held_back = count.seen.saturating_sub(burst);
            *count = Count { since: now, seen: 0 };
        }
        count.seen = count.seen.saturating_add(1);
        match (count.seen <= burst, held_back) {
            (true, 0) => Verdict::Write,
            (true, n) => Verdict::WriteAfter(n),
            (false, _) => Verdict::HoldBack,
        }
    }
}

/// The limit, and whom to tell what was held back.
pub struct RepeatLimit {
    counts: Mutex<Counts>,
    note: Box<dyn Fn(&str) + Send + Sync>,
}

impl RepeatLimit {
    pub fn new(note: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self { counts: Mutex::default(), note: Box::new(note) }
    }

    fn lets_through(&self, event: &Event<'_>, now: Instant) -> bool {
        let place = hash(&event.metadata().callsite());
        let mut fields = Fields(DefaultHasher::new());
        place.hash(&mut fields.0);
        event.record(&mut fields);
        let same = fields.0.finish();
        let verdict = {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            match counts.count(same, SAME, now) {
                Verdict::HoldBack => Verdict::HoldBack,
                written => match counts.count(place, PLACE, now) {
                    Verdict::Write => written,
                    other => other,
                },
            }
        };
        if let Verdict::WriteAfter(n) = verdict {
            (self.note)(&format!("{n} lines like the next one were held back"));
        }
        verdict != Verdict::HoldBack
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Hashes the fields of an event as they would be written.
struct Fields(DefaultHasher);

impl tracing::field::Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        field.index().hash(&mut self.0);
        let _ = write!(self, "{value:?}");
    }
}

impl fmt::Write for Fields {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        self.0.write(part.as_bytes());
        Ok(())
    }
}

/// The limit as a filter of a layer. Debug and trace are never limited: who asks for them wants them.
pub struct Repeats(pub Arc<RepeatLimit>);

impl<S: Subscriber> Filter<S> for Repeats {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        *event.metadata().level() > Level::INFO || self.0.lets_through(event, Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_the_rest_is_counted() {
        let mut counts = Counts::default();
        let start = Instant::now();
        for _ in 0..SAME {
            assert_eq!(counts.count(1, SAME, start), Verdict::Write);
        }
        for _ in 0..7 {
            assert_eq!(counts.count(1, SAME, start + WINDOW / 2), Verdict::HoldBack);
        }
        assert_eq!(counts.count(2, SAME, start), Verdict::Write, "another kind is not touched");
        assert_eq!(counts.count(1, SAME, start + WINDOW), Verdict::WriteAfter(7));
        assert_eq!(counts.count(1, SAME, start + WINDOW), Verdict::Write);
    }

    #[test]
    fn its_memory_is_bounded() {
        let mut counts = Counts::default();
        let start = Instant::now();
        for kind in 0..10 * KINDS as u64 {
            assert_eq!(counts.count(kind, SAME, start), Verdict::Write);
        }
        assert!(counts.kinds.len() <= KINDS);
    }

    #[test]
    fn lines_that_say_something_else_are_not_held_back() {
        let notes = Arc::new(Mutex::new(Vec::new()));
        let limit = {
            let notes = Arc::clone(&notes);
            Arc::new(RepeatLimit::new(move |note: &str| notes.lock().unwrap().push(note.to_owned())))
        };
        use tracing_subscriber::{Layer, layer::SubscriberExt};
        #[derive(Clone, Default)]
        struct Counter(Arc<Mutex<Vec<Level>>>);
        impl<S: Subscriber> Layer<S> for Counter {
            fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
                self.0.lock().unwrap().push(*event.metadata().level());
            }
        }
        let seen = Counter::default();
        let subscriber = tracing_subscriber::registry().with(seen.clone().with_filter(Repeats(limit)));
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..50 {
                tracing::warn!(upstream = "payments", "refused");
                tracing::debug!("not limited");
            }
            for n in 0..50 {
                tracing::info!(n, "differs");
            }
        });
        let seen = seen.0.lock().unwrap();
        let count = |level| seen.iter().filter(|l| **l == level).count();
        assert_eq!(count(Level::WARN), SAME as usize);
        assert_eq!(count(Level::DEBUG), 50);
        assert_eq!(count(Level::INFO), 50);
        assert!(notes.lock().unwrap().is_empty(), "nothing to tell before the window ends");
    }
}
