//! The read buffer of a connection. Reads go into a buffer that the connections of a thread share, so that an idle
//! one holds none.

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
    decoder::{DecodeResult, Decoder},
    head::HeadError,
};

/// The size of the shared buffer.
const BUFFER_SIZE: usize = 16 * 1024;
/// A body of which at least this much is expected is read into a buffer of its own, to save the copy.
const LARGE_BODY: u64 = BUFFER_SIZE as u64;
/// The largest such buffer.
const MAX_BUFFER: usize = 64 * 1024;

thread_local! {
    static SHARED: Cell<Box<[u8]>> = Cell::default();
}

/// Bytes that were read and not consumed yet.
#[derive(Debug, Default)]
pub struct ReadBuffer {
    unread: BytesMut,
    /// The length of the incomplete head when it was last parsed.
    parsed: usize,
}

impl ReadBuffer {
    pub fn new(unread: Bytes) -> Self {
        Self { unread: unread.into(), parsed: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.unread.is_empty()
    }

    pub fn into_unread(self) -> Bytes {
        self.unread.freeze()
    }

    /// The bytes not consumed yet: of a message that failed to parse, or after a message.
    pub fn unread(&self) -> &[u8] {
        &self.unread
    }

    /// Whether a message has started: empty lines before it do not count.
    pub fn has_message_started(&self) -> bool {
        !matches!(&self.unread[..], [] | [b'\r'])
    }

    /// Drops empty lines, which some clients send after a body (RFC 9112 §2.2).
    pub fn skip_empty_lines(&mut self) {
        let blank = empty_lines(&self.unread);
        if blank > 0 {
            self.advance(blank);
        }
    }

    /// Reads a head: `parse` returns it with its length. Empty lines before it are dropped.
    ///
    /// All calls of `parse` together see no more than a few times the received bytes, however these are split into
    /// reads.
    pub fn poll_head<S: AsyncRead + Unpin, T>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        mut parse: impl FnMut(&[u8]) -> Result<Option<(usize, T)>, HeadError>,
    ) -> Poll<Result<T, Error>> {
        self.skip_empty_lines();
        // Bytes left over by the previous message.
        if self.parsed == 0
            && !self.unread.is_empty()
            && let Some(head) = self.parse(&mut parse)?
        {
            return Poll::Ready(Ok(head));
        }
        loop {
            let found = poll_read_shared(stream, cx, |input| {
                if input.is_empty() {
                    return Err(if self.unread.is_empty() { Error::Closed } else { Error::UnexpectedEnd });
                }
                // Usually the whole head arrives at once and need not be stored.
                if self.unread.is_empty() {
                    let input = &input[empty_lines(input)..];
                    // A rejected head is stored, so that it can be logged.
                    let found = if input.is_empty() { Ok(None) } else { parse(input) };
                    if let Some((length, head)) =
                        found.inspect_err(|_| self.unread.extend_from_slice(input))?
                    {
                        self.unread = BytesMut::from(input.get(length..).unwrap_or_default());
                        return Ok(Some(head));
                    }
                    self.append(input);
                    self.parsed = input.len();
                    return Ok(None);
                }
                let before = self.unread.len();
                self.append(input);
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

    /// Reads the next part of a body. `None`: it is complete.
    pub fn poll_body<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        decoder: &mut Decoder,
    ) -> Poll<Result<Option<BodyPart>, Error>> {
        loop {
            match decoder.decode(&mut self.unread)? {
                DecodeResult::Data(data) => return Poll::Ready(Ok(Some(BodyPart::Data(data)))),
                DecodeResult::Trailers(trailers) => {
                    return Poll::Ready(Ok(Some(BodyPart::Trailers(trailers))));
                }
                DecodeResult::End => return Poll::Ready(Ok(None)),
                DecodeResult::NeedMore => {}
            }
            if ready!(self.poll_more(stream, cx, decoder.expected_bytes()))? == 0 {
                return Poll::Ready(if decoder.is_close_delimited() {
                    Ok(None)
                } else {
                    Err(Error::UnexpectedEnd)
                });
            }
        }
    }

    /// Reads more. `expected`: how many bytes of the current body follow. Returns 0 if the connection was closed.
    pub fn poll_more<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        expected: u64,
    ) -> Poll<io::Result<usize>> {
        if expected < LARGE_BODY || !self.unread.is_empty() {
            return poll_read_shared(stream, cx, |input| {
                self.append(input);
                input.len()
            });
        }
        let mut own =
            BytesMut::with_capacity(usize::try_from(expected).unwrap_or(MAX_BUFFER).min(MAX_BUFFER));
        // Holds no state between two polls except the buffer.
        let count = ready!(pin!(stream.read_buf(&mut own)).poll(cx))?;
        // A part keeps its whole buffer alive, so a small one is copied.
        self.unread = if count < own.capacity() / 2 { BytesMut::from(&own[..]) } else { own };
        Poll::Ready(Ok(count))
    }

    /// Parses the buffered part of a head.
    fn parse<T>(
        &mut self,
        parse: &mut impl FnMut(&[u8]) -> Result<Option<(usize, T)>, HeadError>,
    ) -> Result<Option<T>, Error> {
        self.parsed = self.unread.len();
        let Some((length, head)) = parse(&self.unread)? else { return Ok(None) };
        self.advance(length);
        Ok(Some(head))
    }

    /// Whether the bytes appended from `from` on may complete a head, or are so many that it is parsed to reject
    /// invalid input early.
    fn is_worth_parsing(&self, from: usize) -> bool {
        let appended = self.unread.get(from..).unwrap_or_default();
        // The line end may have started before.
        let tail = self.unread.get(from.saturating_sub(2)..).unwrap_or_default();
        appended.contains(&b'\n') && (self.unread.len() >= 2 * self.parsed || has_empty_line(tail))
    }

    fn append(&mut self, input: &[u8]) {
        self.unread.extend_from_slice(input);
    }

    fn advance(&mut self, length: usize) {
        self.parsed = 0;
        self.unread.advance(length);
        if self.unread.is_empty() {
            // Release the buffer that it was split from.
            self.unread = BytesMut::new();
        }
    }
}

/// How many of the first bytes are empty lines.
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
pub enum BodyPart {
    Data(Bytes),
    Trailers(http::HeaderMap),
}

/// Reads into the thread's buffer and passes the bytes to `consume`.
fn poll_read_shared<S: AsyncRead + Unpin, T>(
    stream: &mut S,
    cx: &mut Context<'_>,
    consume: impl FnOnce(&[u8]) -> T,
) -> Poll<io::Result<T>> {
    with_shared_buffer(|buffer| {
        let mut read = ReadBuf::new(buffer);
        Pin::new(stream).poll_read(cx, &mut read).map_ok(|()| consume(read.filled()))
    })
}

/// Borrows the thread's buffer.
pub fn with_shared_buffer<T>(use_buffer: impl FnOnce(&mut [u8]) -> T) -> T {
    // Taken out meanwhile: a stream may poll another one.
    let mut buffer = SHARED.take();
    if buffer.is_empty() {
        buffer = vec![0; BUFFER_SIZE].into();
    }
    let result = use_buffer(&mut buffer);
    SHARED.set(buffer);
    result
}

#[cfg(test)]
mod tests;
