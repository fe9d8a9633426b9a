//! The proxy's own log, on stderr, written by a thread of its own.
//!
//! Lines go through a bounded channel to that thread. A stalled reader of stderr costs log lines (counted and logged),
//! never a request. Repeated lines are rate limited, so that one failing upstream cannot fill a disk.

mod limit;
mod writer;

use std::{io::IsTerminal, str::FromStr, sync::Arc};

use clap::ValueEnum;
use tracing_subscriber::{EnvFilter, Layer, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt};

use limit::RepeatLimit;
use writer::LineSender;

/// The default filter.
pub const DEFAULT_FILTER: &str = "info";

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// Human-readable text.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Selects what is logged, in tracing-subscriber's syntax: `info`, `warn,outrigger::upstream=debug`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFilter(String);

/// The running log. Dropping it writes what is queued.
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
    #[error("cannot start the log thread: {0}")]
    Thread(#[from] std::io::Error),
    #[error("a log is already running in this process")]
    AlreadyRunning,
    #[error("cannot change the log filter: {0}")]
    Reload(#[from] reload::Error),
}

impl Log {
    /// Starts the process-wide log. Keep the returned value until the process ends: dropping it flushes.
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
        let limit = Arc::new(RepeatLimit::new(move |note: &str| write_note(&lines, format, note)));
        tracing_subscriber::registry()
            .with(filter)
            .with(output.with_filter(limit::RepeatFilter(limit)))
            .try_init()
            .map_err(|_| LogError::AlreadyRunning)?;
        Ok(Self { handle: LogHandle { reload: handle }, writer })
    }

    pub fn handle(&self) -> LogHandle {
        self.handle.clone()
    }

    /// Lines lost because stderr was not read fast enough.
    pub fn dropped(&self) -> u64 {
        self.writer.dropped()
    }
}

/// Writes a note about suppressed lines. It bypasses the limit that suppressed them.
fn write_note(lines: &LineSender, format: LogFormat, note: &str) {
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
        // `new` skips invalid directives, but the text was validated when it was parsed.
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
        // EnvFilter takes a bare word that is not a level for a target and silences everything else: most likely a
        // typo.
        let is_level = |word: &str| {
            ["off", "error", "warn", "info", "debug", "trace"].contains(&word.to_ascii_lowercase().as_str())
        };
        if let Some(word) = text.split(',').map(str::trim).find(|part| {
            part.chars().all(|c| c.is_ascii_alphanumeric()) && !is_level(part) && *part != "outrigger"
        }) {
            return Err(format!("`{word}` is not a log level: use off, error, warn, info, debug or trace"));
        }
        // EnvFilter takes an empty level for `trace`.
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

/// A handle on a log without output; it works while the returned layer lives.
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
