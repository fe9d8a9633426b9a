//! The write buffer of a connection: heads and chunk lines, and body data, which is not copied.

use std::{
    cell::Cell,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use tokio::io::AsyncWrite;

use super::{
    framing::{Framing, write_chunk_line},
    head::write_fields,
};

/// Shorter data is copied behind the bytes before it: another slice in a vectored write costs more.
const COPY_BELOW: usize = 2048;
/// With this many bytes buffered, write at once instead of adding more.
const BATCH_SIZE: usize = 16 * 1024;

thread_local! {
    /// A buffer that the connections of a thread reuse.
    static FREE_BUFFER: Cell<Vec<u8>> = Cell::default();
}

/// What is to be written: at most one part of a body at a time, with the bytes around it.
#[derive(Debug, Default)]
pub struct WriteBuffer {
    /// A head, a chunk line, short data.
    before: Vec<u8>,
    /// How much of `before` is written.
    written: usize,
    data: Bytes,
    after: &'static [u8],
    /// All bytes ever written.
    total: u64,
}

impl WriteBuffer {
    pub fn is_empty(&self) -> bool {
        self.written == self.before.len() && self.data.is_empty() && self.after.is_empty()
    }

    /// How many bytes are still to be written.
    pub fn remaining(&self) -> usize {
        self.before.len() - self.written + self.data.len() + self.after.len()
    }

    /// Whether more may be added before anything is written.
    pub fn accepts_more(&self) -> bool {
        self.data.is_empty() && self.after.is_empty() && self.before.len() < BATCH_SIZE
    }

    /// The buffer for a head. Only while no body data is pending.
    pub fn head_buffer(&mut self) -> &mut Vec<u8> {
        if self.before.capacity() == 0 {
            self.before = FREE_BUFFER.take();
        }
        &mut self.before
    }

    /// Adds a part of a body, after a head or to an empty buffer. `last`: nothing follows it.
    pub fn push_data(&mut self, framing: Framing, data: Bytes, last: bool) {
        if framing == Framing::Chunked {
            if data.is_empty() {
                // An empty chunk would end the body.
                if last {
                    self.push_end(framing);
                }
                return;
            }
            write_chunk_line(self.head_buffer(), data.len());
            self.after = if last { b"\r\n0\r\n\r\n" } else { b"\r\n" };
        }
        if data.len() < COPY_BELOW {
            let after = std::mem::take(&mut self.after);
            let before = self.head_buffer();
            before.extend_from_slice(&data);
            before.extend_from_slice(after);
        } else {
            self.data = data;
        }
    }

    /// Adds the trailers, which end the body.
    pub fn push_trailers(&mut self, framing: Framing, trailers: &HeaderMap) {
        if framing == Framing::Chunked {
            let before = self.head_buffer();
            before.extend_from_slice(b"0\r\n");
            write_fields(before, trailers, None);
            before.extend_from_slice(b"\r\n");
        }
    }

    /// Adds the end of a body whose last part was not known to be the last.
    pub fn push_end(&mut self, framing: Framing) {
        if framing == Framing::Chunked {
            self.head_buffer().extend_from_slice(b"0\r\n\r\n");
        }
    }

    /// Writes everything. TLS may still buffer it: flush afterwards.
    pub fn poll_write<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            let before = &self.before[self.written..];
            let count = if self.data.is_empty() && self.after.is_empty() {
                Pin::new(&mut *stream).poll_write(cx, before)
            } else {
                let pieces = [IoSlice::new(before), IoSlice::new(&self.data), IoSlice::new(self.after)];
                Pin::new(&mut *stream).poll_write_vectored(cx, &pieces)
            };
            let count = ready!(count)?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(count);
        }
        // An idle connection holds no buffer.
        let mut buffer = std::mem::take(&mut self.before);
        self.written = 0;
        if (1..=2 * BATCH_SIZE).contains(&buffer.capacity()) {
            buffer.clear();
            FREE_BUFFER.set(buffer);
        }
        Poll::Ready(Ok(()))
    }

    /// How many bytes were written in total.
    pub const fn total_written(&self) -> u64 {
        self.total
    }

    fn advance(&mut self, mut count: usize) {
        self.total += count as u64;
        let of_before = count.min(self.before.len() - self.written);
        self.written += of_before;
        count -= of_before;
        let of_data = count.min(self.data.len());
        self.data.advance(of_data);
        if self.data.is_empty() {
            self.data = Bytes::new();
        }
        let after: &'static [u8] = self.after;
        self.after = after.get(count - of_data..).unwrap_or_default();
    }
}
