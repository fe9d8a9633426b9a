//! The program's own log: to stderr, off the threads that work.
//!
//! Lines go through a bounded channel to a thread that writes them. A reader of stderr that stalls costs lines
//! (counted and said), never a request. What repeats is limited, so that one failing upstream cannot fill a disk.

mod limit;
mod writer;

use std::{io::IsTerminal, str::FromStr, sync::Arc};

use clap::ValueEnum;
use tracing_subscriber::{EnvFilter, Layer, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt};

use limit::RepeatLimit;
use writer::Lines;

/// What is logged where nobody says otherwise.
pub const DEFAULT_FILTER: &str = "info";

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What is logged, in tracing-subscriber's syntax: `info`, `warn,outrigger::upstream=debug`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFilter(String);

/// The running log: its filter can be changed, and what is queued is written when it is dropped.
#[derive(Debug)]
pub struct Log {
    handle: LogHandle,
    writer: writer::Writer,
}

/// Changes the filter of the running log.
#[derive(Clone, Debug)]
pub struct LogHandle {
    reload: reload::Handle<EnvFilter, Registry>,
}

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("the log's thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
    #[error("a log is already running in this process")]
    AlreadyRunning,
    #[error("the log's filter could not be changed: {0}")]
    Reload(#[from] reload::Error),
}

impl Log {
    /// Starts the process-wide log. Keep what is returned until the end: dropping it flushes.
    pub fn start(format: LogFormat, filter: &LogFilter) -> Result<Self, LogError> {
        let (lines, writer) = writer::start(std::io::stderr())?;
        let (filter, handle) = reload::Layer::new(filter.to_env_filter());
        let output = match format {
            LogFormat::Text => tracing_subscriber::fmt::layer()
                .with_writer(lines.clone())
                .with_ansi(std::io::stderr().is_terminal())
                .boxed(),
            LogFormat::Json => tracing_subscriber::fmt::layer()
                .json()
                .flatten_event(true)
                .with_current_span(false)
                .with_span_list(false)
                .with_writer(lines.clone())
                .boxed(),
        };
        let limit = Arc::new(RepeatLimit::new(move |note: &str| suppressed(&lines, format, note)));
        tracing_subscriber::registry()
            .with(filter)
            .with(output.with_filter(limit::Repeats(limit)))
            .try_init()
            .map_err(|_| LogError::AlreadyRunning)?;
        Ok(Self { handle: LogHandle { reload: handle }, writer })
    }

    pub fn handle(&self) -> LogHandle {
        self.handle.clone()
    }

    /// Lines that were lost since stderr was not read fast enough.
    pub fn dropped(&self) -> u64 {
        self.writer.dropped()
    }
}

/// Says that lines were held back, past the limit that held them back.
fn suppressed(lines: &Lines, format: LogFormat, note: &str) {
    let line = match format {
        LogFormat::Text => format!("  … {note}\n"),
        LogFormat::Json => format!("{}\n", serde_json::json!({ "level": "INFO", "message": note })),
    };
    lines.send(line.into_bytes());
}

impl LogHandle {
    pub fn set(&self, filter: &LogFilter) -> Result<(), LogError> {
        Ok(self.reload.reload(filter.to_env_filter())?)
    }
}

impl LogFilter {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn to_env_filter(&self) -> EnvFilter {
        // Checked when it was read, so `new`, which skips what it does not understand, skips nothing.
        EnvFilter::new(&self.0)
    }
}

impl Default for LogFilter {
    fn default() -> Self {
        Self(DEFAULT_FILTER.to_owned())
    }
}

impl FromStr for LogFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.is_empty() {
            return Err("a log filter is missing: write e.g. \"info\" or \"warn,outrigger=debug\"".to_owned());
        }
        // A bare word that is no level would be taken for a target, and silence everything else: a typo, surely.
        let is_level = |word: &str| {
            ["off", "error", "warn", "info", "debug", "trace"].contains(&word.to_ascii_lowercase().as_str())
        };
        if let Some(word) = text.split(',').map(str::trim).find(|part| {
            part.chars().all(|c| c.is_ascii_alphanumeric()) && !is_level(part) && *part != "outrigger"
        }) {
            return Err(format!("`{word}` is not a log level: use off, error, warn, info, debug or trace"));
        }
        // It would be taken for `trace`.
        if let Some(part) = text.split(',').map(str::trim).find(|part| part.ends_with('=')) {
            return Err(format!("`{part}` has no log level: write e.g. \"{part}debug\""));
        }
        EnvFilter::try_new(text).map(|_| Self(text.to_owned())).map_err(|error| {
            format!("`{text}` is not a log filter ({error}): write e.g. \"info\" or \"warn,outrigger=debug\"")
        })
    }
}

impl std::fmt::Display for LogFilter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A handle on a log that nobody writes; it works while the second part lives.
#[cfg(test)]
pub fn detached() -> (LogHandle, reload::Layer<EnvFilter, Registry>) {
    let (layer, handle) = reload::Layer::new(EnvFilter::new(DEFAULT_FILTER));
    (LogHandle { reload: handle }, layer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_checked_before_they_are_used() {
        for good in ["info", "warn,outrigger::upstream=debug", "OFF", " debug ", "outrigger=trace"] {
            assert!(good.parse::<LogFilter>().is_ok(), "{good}");
        }
        for bad in ["", "inf", "verbose", "outrigger=loud", "outrigger=", "warn, h2= ,info", "info,,[["] {
            assert!(bad.parse::<LogFilter>().is_err(), "{bad}");
        }
    }
}
