//! Suppresses repeated log lines.

use std::{
    collections::HashMap,
    fmt::{self, Write},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::{Event, Level, Metadata, Subscriber, field::Field};
use tracing_subscriber::layer::{Context, Filter};

/// Length of the window that lines are counted in.
const WINDOW: Duration = Duration::from_secs(10);
/// How often the same line is written in a window.
const MAX_SAME: u32 = 5;
/// How many lines of one callsite, whatever their fields, are written in a window.
const MAX_CALLSITE: u32 = 200;
/// Distinct lines and callsites that are counted; further ones are not limited until a window ends.
const MAX_COUNTED: usize = 1024;

/// Counts lines by a hash of what identifies them. A fixed window is coarse, cheap, and good enough for a log.
#[derive(Debug, Default)]
struct Counts {
    counts: HashMap<u64, Count>,
}

#[derive(Debug)]
struct Count {
    since: Instant,
    seen: u32,
}

#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Write,
    /// Write, after a note that so many were suppressed.
    WriteAfter(u32),
    Suppress,
}

impl Counts {
    fn count(&mut self, key: u64, burst: u32, now: Instant) -> Decision {
        if self.counts.len() >= MAX_COUNTED && !self.counts.contains_key(&key) {
            self.counts.retain(|_, count| now.saturating_duration_since(count.since) < WINDOW);
            if self.counts.len() >= MAX_COUNTED {
                return Decision::Write;
            }
        }
        let count = self.counts.entry(key).or_insert(Count { since: now, seen: 0 });
        let mut suppressed = 0;
        if now.saturating_duration_since(count.since) >= WINDOW {
            suppressed = count.seen.saturating_sub(burst);
            *count = Count { since: now, seen: 0 };
        }
        count.seen = count.seen.saturating_add(1);
        match (count.seen <= burst, suppressed) {
            (true, 0) => Decision::Write,
            (true, n) => Decision::WriteAfter(n),
            (false, _) => Decision::Suppress,
        }
    }
}

/// The limit, and the function that writes notes about suppressed lines.
pub struct RepeatLimit {
    counts: Mutex<Counts>,
    note: Box<dyn Fn(&str) + Send + Sync>,
}

impl RepeatLimit {
    pub fn new(note: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self { counts: Mutex::default(), note: Box::new(note) }
    }

    fn allows(&self, event: &Event<'_>, now: Instant) -> bool {
        let callsite = hash(&event.metadata().callsite());
        let mut fields = FieldHasher(DefaultHasher::new());
        callsite.hash(&mut fields.0);
        event.record(&mut fields);
        let same = fields.0.finish();
        let decision = {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            match counts.count(same, MAX_SAME, now) {
                Decision::Suppress => Decision::Suppress,
                written => match counts.count(callsite, MAX_CALLSITE, now) {
                    Decision::Write => written,
                    other => other,
                },
            }
        };
        if let Decision::WriteAfter(n) = decision {
            (self.note)(&format!("{n} lines like the next one were suppressed"));
        }
        decision != Decision::Suppress
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Hashes the fields of an event as they would be written.
struct FieldHasher(DefaultHasher);

impl tracing::field::Visit for FieldHasher {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        field.index().hash(&mut self.0);
        let _ = write!(self, "{value:?}");
    }
}

impl fmt::Write for FieldHasher {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        self.0.write(part.as_bytes());
        Ok(())
    }
}

/// The limit as a layer's filter. Debug and trace are never limited: they are off unless asked for.
pub struct RepeatFilter(pub Arc<RepeatLimit>);

impl<S: Subscriber> Filter<S> for RepeatFilter {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        *event.metadata().level() > Level::INFO || self.0.allows(event, Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_the_rest_is_counted() {
        let mut counts = Counts::default();
        let start = Instant::now();
        for _ in 0..MAX_SAME {
            assert_eq!(counts.count(1, MAX_SAME, start), Decision::Write);
        }
        for _ in 0..7 {
            assert_eq!(counts.count(1, MAX_SAME, start + WINDOW / 2), Decision::Suppress);
        }
        assert_eq!(counts.count(2, MAX_SAME, start), Decision::Write, "another line is not limited");
        assert_eq!(counts.count(1, MAX_SAME, start + WINDOW), Decision::WriteAfter(7));
        assert_eq!(counts.count(1, MAX_SAME, start + WINDOW), Decision::Write);
    }

    #[test]
    fn memory_is_bounded() {
        let mut counts = Counts::default();
        let start = Instant::now();
        for key in 0..10 * MAX_COUNTED as u64 {
            assert_eq!(counts.count(key, MAX_SAME, start), Decision::Write);
        }
        assert!(counts.counts.len() <= MAX_COUNTED);
    }

    #[test]
    fn lines_with_other_fields_are_not_suppressed() {
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
        let subscriber = tracing_subscriber::registry().with(seen.clone().with_filter(RepeatFilter(limit)));
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
        assert_eq!(count(Level::WARN), MAX_SAME as usize);
        assert_eq!(count(Level::DEBUG), 50);
        assert_eq!(count(Level::INFO), 50);
        assert!(notes.lock().unwrap().is_empty(), "no note before the window ends");
    }
}
