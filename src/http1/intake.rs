//! What comes: read into room that a thread's connections share, so that one that waits holds none.

use std::{
    cell::Cell,
    future::Future,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

use super::{
    Error, MAX_HEAD_BYTES,
    framing::{Decoded, Decoder},
    head::HeadError,
};

/// Of the room that is shared.
const ROOM: usize = 16 * 1024;
/// From here on a body is read into room of its own, and not copied.
const LARGE: u64 = ROOM as u64;
/// Of such room.
const MOST: usize = 64 * 1024;

thread_local! {
    static SHARED: Cell<Box<[u8]>> = Cell::default();
}

/// What was read and is not used yet.
#[derive(Debug, Default)]
pub struct Intake {
    unread: Bytes,
}

impl Intake {
    pub const fn new(unread: Bytes) -> Self {
        Self { unread }
    }

    pub fn is_empty(&self) -> bool {
        self.unread.is_empty()
    }

    pub fn into_unread(self) -> Bytes {
        self.unread
    }

    /// Reads a head: `parse` finds it, and how many bytes it takes.
    pub fn poll_head<S: AsyncRead + Unpin, T>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        mut parse: impl FnMut(&[u8]) -> Result<Option<(usize, T)>, HeadError>,
    ) -> Poll<Result<T, Error>> {
        if !self.unread.is_empty()
            && let Some((length, head)) = parse(&self.unread)?
        {
            self.advance(length);
            return Poll::Ready(Ok(head));
        }
        loop {
            let found = poll_read_shared(stream, cx, |came| {
                if came.is_empty() {
                    return Err(if self.unread.is_empty() { Error::Closed } else { Error::CutOff });
                }
                // As a rule it comes whole, and need not be kept.
                if self.unread.is_empty()
                    && let Some((length, head)) = parse(came)?
                {
                    self.unread = Bytes::copy_from_slice(came.get(length..).unwrap_or_default());
                    return Ok(Some(head));
                }
                self.append(came);
                // Looked at once a line, not once a byte.
                if came.contains(&b'\n')
                    && let Some((length, head)) = parse(&self.unread)?
                {
                    self.advance(length);
                    return Ok(Some(head));
                }
                Ok(None)
            });
            if let Some(head) = ready!(found)?? {
                return Poll::Ready(Ok(head));
            }
            if self.unread.len() > MAX_HEAD_BYTES {
                return Poll::Ready(Err(HeadError::TooLarge.into()));
            }
        }
    }

    /// Reads the next part of a body. `None`: it is over.
    pub fn poll_body<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        decoder: &mut Decoder,
    ) -> Poll<Result<Option<Part>, Error>> {
        loop {
            match decoder.decode(&mut self.unread)? {
                Decoded::Data(data) => return Poll::Ready(Ok(Some(Part::Data(data)))),
                Decoded::Trailers(trailers) => return Poll::Ready(Ok(Some(Part::Trailers(trailers)))),
                Decoded::End => return Poll::Ready(Ok(None)),
                Decoded::More => {}
            }
            if ready!(self.poll_more(stream, cx, decoder.expects()))? == 0 {
                return Poll::Ready(if decoder.ends_by_close() { Ok(None) } else { Err(Error::CutOff) });
            }
        }
    }

    /// Reads more of what was begun, of which this much is expected. 0: nothing comes any more.
    pub fn poll_more<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        expected: u64,
    ) -> Poll<io::Result<usize>> {
        if expected < LARGE || !self.unread.is_empty() {
            return poll_read_shared(stream, cx, |came| {
                self.append(came);
                came.len()
            });
        }
        let mut own = BytesMut::with_capacity(usize::try_from(expected).unwrap_or(MOST).min(MOST));
        // Holds nothing between two polls but the room.
        let count = ready!(pin!(stream.read_buf(&mut own)).poll(cx))?;
        // Whoever keeps a part keeps the room that it lies in.
        self.unread = if count < own.capacity() / 4 { Bytes::copy_from_slice(&own) } else { own.freeze() };
        Poll::Ready(Ok(count))
    }

    fn append(&mut self, came: &[u8]) {
        self.unread = if self.unread.is_empty() {
            Bytes::copy_from_slice(came)
        } else {
            [&self.unread[..], came].concat().into()
        };
    }

    fn advance(&mut self, length: usize) {
        self.unread.advance(length);
        if self.unread.is_empty() {
            // What it was cut from is not held any longer.
            self.unread = Bytes::new();
        }
    }
}

/// A part of a body.
#[derive(Debug)]
pub enum Part {
    Data(Bytes),
    Trailers(http::HeaderMap),
}

/// Reads into the thread's room, and shows what came.
fn poll_read_shared<S: AsyncRead + Unpin, T>(
    stream: &mut S,
    cx: &mut Context<'_>,
    show: impl FnOnce(&[u8]) -> T,
) -> Poll<io::Result<T>> {
    with_room(|room| {
        let mut read = ReadBuf::new(room);
        Pin::new(stream).poll_read(cx, &mut read).map_ok(|()| show(read.filled()))
    })
}

/// Lends the thread's room.
pub fn with_room<T>(what: impl FnOnce(&mut [u8]) -> T) -> T {
    // Taken out for that time: a stream may run inside of another one.
    let mut room = SHARED.take();
    if room.is_empty() {
        room = vec![0; ROOM].into();
    }
    let done = what(&mut room);
    SHARED.set(room);
    done
}
