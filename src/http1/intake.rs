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
    decoder::{Decoded, Decoder},
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
    unread: BytesMut,
    /// How many bytes of a head there were when it was last parsed in vain.
    parsed: usize,
}

impl Intake {
    pub fn new(unread: Bytes) -> Self {
        Self { unread: unread.into(), parsed: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.unread.is_empty()
    }

    pub fn into_unread(self) -> Bytes {
        self.unread.freeze()
    }

    /// What has come and is not used yet: of a message that was not understood, or behind one.
    pub fn unread(&self) -> &[u8] {
        &self.unread
    }

    /// Whether a message has begun: empty lines before it do not count.
    pub fn has_begun(&self) -> bool {
        !matches!(&self.unread[..], [] | [b'\r'])
    }

    /// Drops empty lines, as some clients send them behind a body (RFC 9112 §2.2).
    pub fn skip_empty_lines(&mut self) {
        let blank = empty_lines(&self.unread);
        if blank > 0 {
            self.advance(blank);
        }
    }

    /// Reads a head: `parse` finds it, and how many bytes it takes. Empty lines before it are dropped.
    ///
    /// What `parse` looks at in all is no more than a few times what arrives, however that is cut into reads.
    pub fn poll_head<S: AsyncRead + Unpin, T>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        mut parse: impl FnMut(&[u8]) -> Result<Option<(usize, T)>, HeadError>,
    ) -> Poll<Result<T, Error>> {
        self.skip_empty_lines();
        // Whatever a message before it has left.
        if self.parsed == 0
            && !self.unread.is_empty()
            && let Some(head) = self.parse(&mut parse)?
        {
            return Poll::Ready(Ok(head));
        }
        loop {
            let found = poll_read_shared(stream, cx, |came| {
                if came.is_empty() {
                    return Err(if self.unread.is_empty() { Error::Closed } else { Error::CutOff });
                }
                // As a rule it comes whole, and need not be kept.
                if self.unread.is_empty() {
                    let came = &came[empty_lines(came)..];
                    // What is refused is kept, to be told of.
                    let found = if came.is_empty() { Ok(None) } else { parse(came) };
                    if let Some((length, head)) =
                        found.inspect_err(|_| self.unread.extend_from_slice(came))?
                    {
                        self.unread = BytesMut::from(came.get(length..).unwrap_or_default());
                        return Ok(Some(head));
                    }
                    self.append(came);
                    self.parsed = came.len();
                    return Ok(None);
                }
                let before = self.unread.len();
                self.append(came);
                self.skip_empty_lines();
                if self.is_worth_parsing(before) { self.parse(&mut parse) } else { Ok(None) }
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
        self.unread = if count < own.capacity() / 2 { BytesMut::from(&own[..]) } else { own };
        Poll::Ready(Ok(count))
    }

    /// Parses what there is of a head.
    fn parse<T>(
        &mut self,
        parse: &mut impl FnMut(&[u8]) -> Result<Option<(usize, T)>, HeadError>,
    ) -> Result<Option<T>, Error> {
        self.parsed = self.unread.len();
        let Some((length, head)) = parse(&self.unread)? else { return Ok(None) };
        self.advance(length);
        Ok(Some(head))
    }

    /// Whether what has been appended, from `from` on, may end a head; or there is so much of it that it is looked at in
    /// order to refuse early what is none.
    fn is_worth_parsing(&self, from: usize) -> bool {
        let appended = self.unread.get(from..).unwrap_or_default();
        // The line may have begun before.
        let tail = self.unread.get(from.saturating_sub(2)..).unwrap_or_default();
        appended.contains(&b'\n') && (self.unread.len() >= 2 * self.parsed || has_empty_line(tail))
    }

    fn append(&mut self, came: &[u8]) {
        self.unread.extend_from_slice(came);
    }

    fn advance(&mut self, length: usize) {
        self.parsed = 0;
        self.unread.advance(length);
        if self.unread.is_empty() {
            // What it was cut from is not held any longer.
            self.unread = BytesMut::new();
        }
    }
}

/// How many bytes of empty lines stand in front.
fn empty_lines(bytes: &[u8]) -> usize {
    let mut at = 0;
    loop {
        match &bytes[at..] {
            [b'\r', b'\n', ..] => at += 2,
            _ => return at,
        }
    }
}

/// Whether a line ends and an empty one follows.
fn has_empty_line(bytes: &[u8]) -> bool {
    let mut lines = bytes.split(|byte| *byte == b'\n').skip(1).peekable();
    while let Some(line) = lines.next() {
        if matches!(line, [] | [b'\r']) && lines.peek().is_some() {
            return true;
        }
    }
    false
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

#[cfg(test)]
mod tests;
