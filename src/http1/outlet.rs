//! What goes out: heads and chunks, and the data of bodies, which is not copied.

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

/// Data that is shorter is copied behind what goes before it: one more piece to write costs more.
const SHORT: usize = 2048;
/// With this much there is no wait for more to write at once.
const ENOUGH: usize = 16 * 1024;

thread_local! {
    /// Room that whoever has nothing to write leaves to the next one.
    static SPARE: Cell<Vec<u8>> = Cell::default();
}

/// What is to be written: at most one part of a body at a time, with what stands around it.
#[derive(Debug, Default)]
pub struct Outlet {
    /// A head, a chunk's first line, short data.
    before: Vec<u8>,
    /// How much of that is written.
    written: usize,
    data: Bytes,
    after: &'static [u8],
    /// Of all that was ever here.
    so_far: u64,
}

impl Outlet {
    pub fn is_empty(&self) -> bool {
        self.written == self.before.len() && self.data.is_empty() && self.after.is_empty()
    }

    /// How many bytes are still to be written.
    pub fn left(&self) -> usize {
        self.before.len() - self.written + self.data.len() + self.after.len()
    }

    /// Whether more may be added before anything is written.
    pub fn has_room(&self) -> bool {
        self.data.is_empty() && self.after.is_empty() && self.before.len() < ENOUGH
    }

    /// Where a head is written to. Only when nothing of a body is there.
    pub fn head(&mut self) -> &mut Vec<u8> {
        if self.before.capacity() == 0 {
            self.before = SPARE.take();
        }
        &mut self.before
    }

    /// Adds a part of a body, behind a head or to an empty outlet. `last`: nothing comes behind it.
    pub fn data(&mut self, framing: Framing, data: Bytes, last: bool) {
        if framing == Framing::Chunked {
            if data.is_empty() {
                // A chunk of no bytes would be the last one.
                if last {
                    self.end(framing);
                }
                return;
            }
            write_chunk_line(self.head(), data.len());
            self.after = if last { b"\r\n0\r\n\r\n" } else { b"\r\n" };
        }
        if data.len() < SHORT {
            let after = std::mem::take(&mut self.after);
            let before = self.head();
            before.extend_from_slice(&data);
            before.extend_from_slice(after);
        } else {
            self.data = data;
        }
    }

    /// Adds the trailers, and with them the end.
    pub fn trailers(&mut self, framing: Framing, trailers: &HeaderMap) {
        if framing == Framing::Chunked {
            let before = self.head();
            before.extend_from_slice(b"0\r\n");
            write_fields(before, trailers, None);
            before.extend_from_slice(b"\r\n");
        }
    }

    /// Adds the end of a body of which it was not known that it would be.
    pub fn end(&mut self, framing: Framing) {
        if framing == Framing::Chunked {
            self.head().extend_from_slice(b"0\r\n\r\n");
        }
    }

    /// Writes all that there is; that does not mean that it is with the system yet.
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
        // An idle connection holds no room.
        let mut room = std::mem::take(&mut self.before);
        self.written = 0;
        if (1..=2 * ENOUGH).contains(&room.capacity()) {
            room.clear();
            SPARE.set(room);
        }
        Poll::Ready(Ok(()))
    }

    /// How many bytes have been written by this, ever.
    pub const fn written_so_far(&self) -> u64 {
        self.so_far
    }

    fn advance(&mut self, mut count: usize) {
        self.so_far += count as u64;
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
