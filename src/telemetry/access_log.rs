//! The access log: one JSON line a request, written by a thread of its own.
//!
//! A worker sends that thread a reference to the record, and the thread formats the line. A stalled reader costs lines
//! (counted), never a request.

mod delivery;
mod line;
mod output;

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError},
    },
    thread,
    time::Duration,
};

use super::{record::RequestRecord, verdict::Verdict};
use crate::config;
pub use delivery::DeliveryEnd;
pub use output::AccessLogTarget;
use output::Output;

/// Records that wait for a slow reader at most; further ones are dropped and counted.
const QUEUE: usize = 4096;
/// How long lines are gathered, so that a worker need not notify the thread for each record.
const GATHER: Duration = Duration::from_millis(10);
/// The most lines that are written at once.
const BATCH: u64 = 512;
/// How long the end of the process waits for a stalled reader.
const FINAL_FLUSH: Duration = Duration::from_secs(2);

/// The access log. It does nothing until it is configured.
#[derive(Debug, Default)]
pub struct AccessLog {
    /// 0 off, 1 errors, 2 all.
    mode: AtomicU8,
    queue: OnceLock<SyncSender<Message>>,
    changes: Arc<Mutex<OutputChanges>>,
    lines: Arc<LineCounts>,
    /// Receives a message when the thread has finished.
    finished: Mutex<Option<Receiver<()>>>,
}

/// Counts of lines since the start.
#[derive(Debug, Default)]
pub struct LineCounts {
    pub written: AtomicU64,
    /// Lost because they were not read fast enough.
    pub dropped: AtomicU64,
    /// Lost because writing failed.
    pub failed: AtomicU64,
}

#[derive(Debug)]
enum Message {
    Request(Arc<RequestRecord>),
    /// Boxed: it is rare.
    Delivery(Box<DeliveryEnd>),
    /// There are output changes. May be dropped where the queue is full: the thread checks before each batch anyway.
    CheckChanges,
    Stop,
}

/// Changes of the output that the thread applies before it writes the next batch.
#[derive(Debug, Default)]
struct OutputChanges {
    output: Option<Output>,
    reopen: bool,
}

/// Why the access log cannot be configured.
#[derive(Debug, thiserror::Error)]
pub enum AccessLogError {
    #[error("cannot open the access log {} ([telemetry] access_log_file): {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("cannot start the access log thread: {0}")]
    Thread(io::Error),
}

impl AccessLog {
    /// Starts the access log, or applies new settings to it. On an error nothing changes.
    pub fn configure(
        &self,
        mode: config::AccessLog,
        file: Option<&PathBuf>,
        default: AccessLogTarget,
    ) -> Result<(), AccessLogError> {
        if mode != config::AccessLog::Off {
            let target = file.cloned().map_or(default, AccessLogTarget::File);
            let output = Output::open(target)?;
            match self.queue.get() {
                // Does not wait for the thread, which may be blocked by its reader.
                Some(_) => self.change_output(|changes| changes.output = Some(output)),
                None => self.start(output)?,
            }
        }
        self.mode.store(mode as u8, Ordering::Relaxed);
        Ok(())
    }

    fn start(&self, output: Output) -> Result<(), AccessLogError> {
        let (queue, messages) = mpsc::sync_channel(QUEUE);
        let (done, finished) = mpsc::sync_channel(1);
        let lines = Arc::clone(&self.lines);
        let changes = Arc::clone(&self.changes);
        thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || {
                write_all(&messages, &changes, &lines, output);
                let _ = done.send(());
            })
            .map_err(AccessLogError::Thread)?;
        *self.finished.lock().unwrap_or_else(PoisonError::into_inner) = Some(finished);
        let _ = self.queue.set(queue);
        Ok(())
    }

    /// Whether a request with this verdict gets a line.
    pub fn wants(&self, kind: Verdict) -> bool {
        match self.mode.load(Ordering::Relaxed) {
            0 => false,
            1 => matches!(kind, Verdict::Failed | Verdict::Retried),
            _ => true,
        }
    }

    /// Queues a record; never blocks.
    pub fn send(&self, record: Arc<RequestRecord>) {
        self.queue_line(Message::Request(record));
    }

    /// Queues the end of a delivery, if the mode wants it; never blocks.
    pub fn send_delivery(&self, end: DeliveryEnd) {
        if self.wants(if end.dead.is_some() { Verdict::Failed } else { Verdict::Plain }) {
            self.queue_line(Message::Delivery(Box::new(end)));
        }
    }

    fn queue_line(&self, line: Message) {
        let Some(queue) = self.queue.get() else { return };
        if let Err(TrySendError::Full(_)) = queue.try_send(line) {
            self.lines.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Reopens the file after a rotation.
    pub fn reopen(&self) {
        self.change_output(|changes| changes.reopen = true);
    }

    fn change_output(&self, change: impl FnOnce(&mut OutputChanges)) {
        let Some(queue) = self.queue.get() else { return };
        change(&mut self.changes.lock().unwrap_or_else(PoisonError::into_inner));
        let _ = queue.try_send(Message::CheckChanges);
    }

    pub fn line_counts(&self) -> &LineCounts {
        &self.lines
    }

    /// Writes what is queued and ends the thread; waits at most twice [`FINAL_FLUSH`] for a stalled reader.
    #[expect(clippy::disallowed_methods, reason = "no worker is left")]
    pub fn finish(&self) {
        let finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (Some(queue), Some(finished)) = (self.queue.get(), finished) else { return };
        self.mode.store(0, Ordering::Relaxed);
        let until = std::time::Instant::now() + FINAL_FLUSH;
        while let Err(TrySendError::Full(_)) = queue.try_send(Message::Stop) {
            if std::time::Instant::now() >= until {
                return;
            }
            thread::sleep(GATHER);
        }
        if finished.recv_timeout(FINAL_FLUSH) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("the reader of the access log has stalled: its last lines are lost");
        }
    }
}

/// Writes lines in batches until [`Message::Stop`].
#[expect(clippy::disallowed_methods, reason = "on a thread of its own")]
fn write_all(
    messages: &Receiver<Message>,
    changes: &Mutex<OutputChanges>,
    lines: &LineCounts,
    mut output: Output,
) {
    let mut batch = Vec::new();
    let mut pending = 0;
    let mut failing = false;
    'thread: loop {
        let Ok(mut message) = messages.recv() else { break };
        if matches!(message, Message::Request(_) | Message::Delivery(_)) {
            thread::sleep(GATHER);
        }
        apply_changes(changes, &mut output);
        loop {
            match message {
                Message::Request(record) => {
                    line::write(&mut batch, &record);
                    pending += 1;
                }
                Message::Delivery(end) => {
                    delivery::write(&mut batch, &end);
                    pending += 1;
                }
                Message::CheckChanges => {
                    flush(&mut output, &mut batch, &mut pending, lines, &mut failing);
                    apply_changes(changes, &mut output);
                }
                Message::Stop => break 'thread,
            }
            if pending >= BATCH {
                flush(&mut output, &mut batch, &mut pending, lines, &mut failing);
                apply_changes(changes, &mut output);
            }
            message = match messages.try_recv() {
                Ok(message) => message,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => break 'thread,
            };
        }
        flush(&mut output, &mut batch, &mut pending, lines, &mut failing);
    }
    flush(&mut output, &mut batch, &mut pending, lines, &mut failing);
}

/// Switches to another output, or reopens the file, where that was requested.
fn apply_changes(changes: &Mutex<OutputChanges>, output: &mut Output) {
    let changes = std::mem::take(&mut *changes.lock().unwrap_or_else(PoisonError::into_inner));
    if let Some(other) = changes.output {
        *output = other;
    } else if changes.reopen {
        output.reopen();
    }
}

/// Writes the batch. `failing`: the last write failed and was logged.
fn flush(
    output: &mut Output,
    batch: &mut Vec<u8>,
    pending: &mut u64,
    lines: &LineCounts,
    failing: &mut bool,
) {
    if batch.is_empty() {
        return;
    }
    let count = std::mem::take(pending);
    match output.write(batch) {
        Ok(()) => {
            *failing = false;
            lines.written.fetch_add(count, Ordering::Relaxed);
        }
        Err(error) => {
            if !std::mem::replace(failing, true) {
                tracing::warn!(%error, to = %output, "cannot write the access log; lines are lost and counted");
            }
            lines.failed.fetch_add(count, Ordering::Relaxed);
        }
    }
    batch.clear();
}
