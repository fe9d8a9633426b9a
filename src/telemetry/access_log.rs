//! The access log: one JSON line a call, written by a thread of its own.
//!
//! A worker hands a reference over and goes on; a reader that stalls costs lines (counted), never a call. What a line
//! says is put into words on that thread too.

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

use super::{record::Record, verdict::Kind};
use crate::config;
use output::Output;
pub use output::Target;

/// Calls that may wait for a slow reader; then they are lost and counted.
const QUEUE: usize = 4096;
/// Lines are gathered for so long: a worker that hands one over need not wake the thread each time.
const GATHER: Duration = Duration::from_millis(10);
/// Lines that are written at once.
const BATCH: u64 = 512;
/// What the end of the process waits for a reader that stalls.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The access log. It does nothing until it is told where to write.
#[derive(Debug, Default)]
pub struct AccessLog {
    /// 0 off, 1 errors, 2 all.
    mode: AtomicU8,
    queue: OnceLock<SyncSender<Order>>,
    wishes: Arc<Mutex<Wishes>>,
    lines: Arc<Lines>,
    /// Says that the thread is through.
    through: Mutex<Option<Receiver<()>>>,
}

/// Lines since the start.
#[derive(Debug, Default)]
pub struct Lines {
    pub written: AtomicU64,
    /// Lost, as they were not read fast enough.
    pub dropped: AtomicU64,
    /// Lost, as they could not be written.
    pub failed: AtomicU64,
}

#[derive(Debug)]
enum Order {
    Call(Arc<Record>),
    /// There are wishes. May be lost where the queue is full: the thread looks whenever it goes on.
    Look,
    Stop,
}

/// What the thread is to do before it writes on.
#[derive(Debug, Default)]
struct Wishes {
    output: Option<Output>,
    reopen: bool,
}

/// Why there can be no access log.
#[derive(Debug, thiserror::Error)]
pub enum AccessLogError {
    #[error("cannot open the access log {} ([telemetry] access_log_file): {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("the access log's thread could not be started: {0}")]
    Thread(io::Error),
}

impl AccessLog {
    /// Starts, or goes on as configured. Where the file cannot be opened, nothing is changed.
    pub fn configure(
        &self,
        mode: config::AccessLog,
        file: Option<&PathBuf>,
        elsewhere: Target,
    ) -> Result<(), AccessLogError> {
        if mode != config::AccessLog::Off {
            let target = file.cloned().map_or(elsewhere, Target::File);
            let output = Output::open(target)?;
            match self.queue.get() {
                // The thread may have to wait for its reader; whoever configures does not wait for the thread.
                Some(_) => self.wish(|wishes| wishes.output = Some(output)),
                None => self.start(output)?,
            }
        }
        self.mode.store(mode as u8, Ordering::Relaxed);
        Ok(())
    }

    fn start(&self, output: Output) -> Result<(), AccessLogError> {
        let (queue, orders) = mpsc::sync_channel(QUEUE);
        let (say, through) = mpsc::sync_channel(1);
        let lines = Arc::clone(&self.lines);
        let wishes = Arc::clone(&self.wishes);
        thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || {
                write_all(&orders, &wishes, &lines, output);
                let _ = say.send(());
            })
            .map_err(AccessLogError::Thread)?;
        *self.through.lock().unwrap_or_else(PoisonError::into_inner) = Some(through);
        let _ = self.queue.set(queue);
        Ok(())
    }

    /// Whether a call of this kind gets a line.
    pub fn wants(&self, kind: Kind) -> bool {
        match self.mode.load(Ordering::Relaxed) {
            0 => false,
            1 => matches!(kind, Kind::Failed | Kind::Retried),
            _ => true,
        }
    }

    /// Hands a call over to be written; never waits.
    pub fn send(&self, record: Arc<Record>) {
        let Some(queue) = self.queue.get() else { return };
        if let Err(TrySendError::Full(_)) = queue.try_send(Order::Call(record)) {
            self.lines.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Opens the file anew: it was rotated.
    pub fn reopen(&self) {
        self.wish(|wishes| wishes.reopen = true);
    }

    fn wish(&self, wish: impl FnOnce(&mut Wishes)) {
        let Some(queue) = self.queue.get() else { return };
        wish(&mut self.wishes.lock().unwrap_or_else(PoisonError::into_inner));
        let _ = queue.try_send(Order::Look);
    }

    pub fn lines(&self) -> &Lines {
        &self.lines
    }

    /// Writes what is queued and ends; waits for a reader only so long.
    #[expect(clippy::disallowed_methods, reason = "no worker is left")]
    pub fn finish(&self) {
        let through = self.through.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (Some(queue), Some(through)) = (self.queue.get(), through) else { return };
        self.mode.store(0, Ordering::Relaxed);
        let until = std::time::Instant::now() + LAST_WORDS;
        while let Err(TrySendError::Full(_)) = queue.try_send(Order::Stop) {
            if std::time::Instant::now() >= until {
                return;
            }
            thread::sleep(GATHER);
        }
        if through.recv_timeout(LAST_WORDS) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("the access log's reader has stalled: its last lines are lost");
        }
    }
}

/// Writes lines in batches until told to stop.
#[expect(clippy::disallowed_methods, reason = "on a thread of its own")]
fn write_all(orders: &Receiver<Order>, wishes: &Mutex<Wishes>, lines: &Lines, mut output: Output) {
    let mut batch = Vec::new();
    let mut waiting = 0;
    let mut troubled = false;
    'life: loop {
        let Ok(mut order) = orders.recv() else { break };
        if matches!(order, Order::Call(_)) {
            thread::sleep(GATHER);
        }
        heed(wishes, &mut output);
        loop {
            match order {
                Order::Call(record) => {
                    line::write(&mut batch, &record);
                    waiting += 1;
                }
                Order::Look => {
                    flush(&mut output, &mut batch, &mut waiting, lines, &mut troubled);
                    heed(wishes, &mut output);
                }
                Order::Stop => break 'life,
            }
            if waiting >= BATCH {
                flush(&mut output, &mut batch, &mut waiting, lines, &mut troubled);
                heed(wishes, &mut output);
            }
            order = match orders.try_recv() {
                Ok(order) => order,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => break 'life,
            };
        }
        flush(&mut output, &mut batch, &mut waiting, lines, &mut troubled);
    }
    flush(&mut output, &mut batch, &mut waiting, lines, &mut troubled);
}

/// Goes over to another output, or opens the file anew, where that was wished for.
fn heed(wishes: &Mutex<Wishes>, output: &mut Output) {
    let wishes = std::mem::take(&mut *wishes.lock().unwrap_or_else(PoisonError::into_inner));
    if let Some(other) = wishes.output {
        *output = other;
    } else if wishes.reopen {
        output.reopen();
    }
}

/// Writes what was gathered. `troubled`: it did not go well the last time, which has been said.
fn flush(output: &mut Output, batch: &mut Vec<u8>, waiting: &mut u64, lines: &Lines, troubled: &mut bool) {
    if batch.is_empty() {
        return;
    }
    let count = std::mem::take(waiting);
    match output.write(batch) {
        Ok(()) => {
            *troubled = false;
            lines.written.fetch_add(count, Ordering::Relaxed);
        }
        Err(error) => {
            if !std::mem::replace(troubled, true) {
                tracing::warn!(%error, to = %output, "the access log cannot be written; lines are lost and counted");
            }
            lines.failed.fetch_add(count, Ordering::Relaxed);
        }
    }
    batch.clear();
}
