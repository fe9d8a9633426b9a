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

/// Lines that wait for a slow reader at most; further ones are dropped and counted.
const QUEUE: usize = 4096;

/// The sending side: cheap to clone, never blocks.
#[derive(Clone, Debug)]
pub struct LineSender {
    queue: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

/// The writer thread. Dropping this writes what is queued and joins the thread.
#[derive(Debug)]
pub struct Writer {
    lines: LineSender,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Message {
    Write(Vec<u8>),
    Stop,
}

pub fn start(output: impl Write + Send + 'static) -> io::Result<(LineSender, Writer)> {
    let (queue, messages) = mpsc::sync_channel(QUEUE);
    let dropped = Arc::new(AtomicU64::new(0));
    let lines = LineSender { queue, dropped: Arc::clone(&dropped) };
    let thread = std::thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || write_all(&messages, &dropped, output))?;
    Ok((lines.clone(), Writer { lines, thread: Some(thread) }))
}

fn write_all(messages: &mpsc::Receiver<Message>, dropped: &AtomicU64, mut output: impl Write) {
    let mut reported = 0;
    // Write errors are ignored: without stderr there is no place to report them.
    while let Ok(Message::Write(line)) = messages.recv() {
        let _ = output.write_all(&line);
        let lost = dropped.load(Ordering::Relaxed);
        if lost > reported {
            let _ = writeln!(output, "{} log lines lost: stderr was not read fast enough", lost - reported);
            reported = lost;
        }
    }
    let _ = output.flush();
}

impl LineSender {
    pub fn send(&self, line: Vec<u8>) {
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Message::Write(line)) {
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
        // Queued behind everything logged before. Blocks only while the reader of stderr does.
        if self.lines.queue.send(Message::Stop).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

/// Collects one line; dropping it sends the line as a whole.
#[derive(Debug)]
pub struct LineBuffer<'a> {
    lines: &'a LineSender,
    bytes: Vec<u8>,
}

impl<'a> MakeWriter<'a> for LineSender {
    type Writer = LineBuffer<'a>;

    fn make_writer(&'a self) -> LineBuffer<'a> {
        LineBuffer { lines: self, bytes: Vec::new() }
    }
}

impl Write for LineBuffer<'_> {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LineBuffer<'_> {
    fn drop(&mut self) {
        if !self.bytes.is_empty() {
            self.lines.send(without_credentials(std::mem::take(&mut self.bytes)));
        }
    }
}

/// Removes the userinfo of every URL in a line: error texts of libraries contain URLs too.
fn without_credentials(line: Vec<u8>) -> Vec<u8> {
    if !line.contains(&b'@') {
        return line;
    }
    match String::from_utf8(line) {
        Ok(text) => match redact::redact_userinfo(&text) {
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

    /// A stderr that is not read while `gate` is locked.
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
    fn queued_lines_are_written_on_drop() {
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
