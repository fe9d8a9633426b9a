//! A thread that writes lines, fed by a bounded channel.

use std::{
    borrow::Cow,
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, SyncSender, TrySendError},
    },
    thread::JoinHandle,
};

use tracing_subscriber::fmt::MakeWriter;

use crate::redact;

/// Lines that may wait for a slow reader; then they are lost and counted.
const QUEUE: usize = 4096;

/// The sending side: cheap to clone, never blocks.
#[derive(Clone, Debug)]
pub struct Lines {
    queue: SyncSender<Order>,
    dropped: Arc<AtomicU64>,
}

/// The thread; dropping it writes what is queued.
#[derive(Debug)]
pub struct Writer {
    lines: Lines,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Order {
    Write(Vec<u8>),
    Stop,
}

pub fn start(output: impl Write + Send + 'static) -> io::Result<(Lines, Writer)> {
    let (queue, orders) = mpsc::sync_channel(QUEUE);
    let dropped = Arc::new(AtomicU64::new(0));
    let lines = Lines { queue, dropped: Arc::clone(&dropped) };
    let thread = std::thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || write_all(&orders, &dropped, output))?;
    Ok((lines.clone(), Writer { lines, thread: Some(thread) }))
}

fn write_all(orders: &mpsc::Receiver<Order>, dropped: &AtomicU64, mut output: impl Write) {
    let mut told = 0;
    // Nobody is left to tell that stderr is gone, so errors of writing are let go.
    while let Ok(Order::Write(line)) = orders.recv() {
        let _ = output.write_all(&line);
        let lost = dropped.load(Ordering::Relaxed);
        if lost > told {
            let _ = writeln!(output, "{} log lines lost: stderr was not read fast enough", lost - told);
            told = lost;
        }
    }
    let _ = output.flush();
}

impl Lines {
    pub fn send(&self, line: Vec<u8>) {
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Order::Write(line)) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Writer {
    pub fn dropped(&self) -> u64 {
        self.lines.dropped.load(Ordering::Relaxed)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Behind everything that was logged before. Blocks only while the reader of stderr does.
        if self.lines.queue.send(Order::Stop).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

/// One line: collected, then sent as a whole.
#[derive(Debug)]
pub struct Line<'a> {
    lines: &'a Lines,
    bytes: Vec<u8>,
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { lines: self, bytes: Vec::new() }
    }
}

impl Write for Line<'_> {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        if !self.bytes.is_empty() {
            self.lines.send(without_credentials(std::mem::take(&mut self.bytes)));
        }
    }
}

/// A line in which no URL shows its userinfo, wherever it comes from: the texts of libraries' errors name URLs, too.
fn without_credentials(line: Vec<u8>) -> Vec<u8> {
    if !line.contains(&b'@') {
        return line;
    }
    match String::from_utf8(line) {
        Ok(text) => match redact::without_userinfo(&text) {
            Cow::Borrowed(_) => text.into_bytes(),
            Cow::Owned(shown) => shown.into_bytes(),
        },
        Err(bytes) => bytes.into_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// A stderr that nobody reads until it is opened.
    #[derive(Clone, Default)]
    struct Output {
        written: Arc<Mutex<Vec<u8>>>,
        gate: Arc<Mutex<()>>,
    }

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            drop(self.gate.lock());
            self.written.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_is_queued_is_written_at_the_end() {
        let output = Output::default();
        let (lines, writer) = start(output.clone()).unwrap();
        for n in 0..100 {
            let _ = writeln!(lines.make_writer(), "line {n}");
        }
        drop(writer);
        let written = String::from_utf8(output.written.lock().unwrap().clone()).unwrap();
        assert_eq!(written.lines().count(), 100);
        assert!(written.ends_with("line 99\n"));
    }

    #[test]
    fn a_stalled_reader_costs_lines_and_nothing_else() {
        let output = Output::default();
        let gate = output.gate.clone();
        let stalled = gate.lock().unwrap();
        let (lines, writer) = start(output.clone()).unwrap();
        for _ in 0..QUEUE + 100 {
            lines.send(b"x\n".to_vec()); // would hang here if it waited
        }
        assert!(writer.dropped() >= 99, "{}", writer.dropped());
        drop(stalled);
        drop(writer);
        let written = String::from_utf8(output.written.lock().unwrap().clone()).unwrap();
        assert!(written.contains("log lines lost"));
    }
}
