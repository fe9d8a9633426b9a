//! Takes the body of a message out of the bytes it arrives in (RFC 9112 §6 and §7).
//!
//! Every byte is looked at once, however the bytes are cut into reads, and small chunks that arrive together leave
//! together: what a body costs depends on its length, not on how its sender cuts it.

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::framing::{Framing, FramingError, MAX_EXTENSIONS, MAX_TRAILER_FIELDS, MAX_TRAILERS};

/// A chunk of which less has arrived is joined with the chunks around it. A larger one is passed on without a copy.
const SMALL: usize = 8 * 1024;
/// More zeros than any sender writes.
const MAX_SIZE_DIGITS: u8 = 16;

/// What was found in a body.
#[derive(Debug)]
pub enum Decoded {
    Data(Bytes),
    Trailers(HeaderMap),
    /// The body is over, and stays so.
    End,
    /// More bytes are needed.
    More,
}

/// See the first lines of this file.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    /// Bytes of chunk extensions so far.
    extensions: usize,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Length(u64),
    UntilClose,
    ChunkSize {
        size: u64,
        digits: u8,
    },
    /// Whitespace behind a chunk size.
    ChunkBlank(u64),
    ChunkExtension(u64),
    /// LF must follow the CR of a chunk's first line.
    ChunkLineFeed(u64),
    ChunkData(u64),
    /// CR and LF must follow a chunk's data.
    DataReturn,
    DataLineFeed,
    Trailers {
        /// The first byte of the trailer section that has not been looked at.
        scanned: usize,
        /// Where the line begins that this byte is in.
        line: usize,
    },
}

const CHUNK: State = State::ChunkSize { size: 0, digits: 0 };
const TRAILERS: State = State::Trailers { scanned: 0, line: 0 };

impl Decoder {
    pub const fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => CHUNK,
            Framing::UntilClose => State::UntilClose,
        };
        Self { state, extensions: 0 }
    }

    /// Whether nothing more of the body follows.
    pub const fn is_over(&self) -> bool {
        matches!(self.state, State::Length(0))
    }

    /// Whether the end of the connection is the end of the body.
    pub const fn ends_by_close(&self) -> bool {
        matches!(self.state, State::UntilClose)
    }

    /// How much of the body is still to come, where its head said so.
    pub const fn length(&self) -> Option<u64> {
        match self.state {
            State::Length(left) => Some(left),
            _ => None,
        }
    }

    /// How many bytes follow for certain.
    pub const fn expects(&self) -> u64 {
        match self.state {
            State::Length(left) => left,
            // With the CR and LF behind them.
            State::ChunkData(left) => left.saturating_add(2),
            State::UntilClose => u64::MAX,
            _ => 0,
        }
    }

    /// Takes the next part out of what has arrived. What is left of that belongs behind it.
    ///
    /// # Errors
    ///
    /// Where the chunks or trailers are malformed. The end of the body cannot be found then.
    pub fn decode(&mut self, came: &mut BytesMut) -> Result<Decoded, FramingError> {
        match &mut self.state {
            State::Length(0) => Ok(Decoded::End),
            _ if came.is_empty() => Ok(Decoded::More),
            State::Length(left) => {
                let data = take(came, *left);
                *left -= data.len() as u64;
                Ok(Decoded::Data(data))
            }
            State::UntilClose => Ok(Decoded::Data(std::mem::take(came).freeze())),
            State::Trailers { .. } => self.trailers(came),
            _ => self.chunks(came),
        }
    }

    /// Takes the data of as many chunks as have arrived. The first one stays where it lies, small ones behind it are
    /// moved up to it.
    fn chunks(&mut self, came: &mut BytesMut) -> Result<Decoded, FramingError> {
        let (mut at, mut start, mut gathered) = (0, 0, 0);
        while at < came.len() {
            let state = match self.state {
                State::ChunkData(left) => {
                    let here = usize::try_from(left).unwrap_or(usize::MAX).min(came.len() - at);
                    if gathered == 0 {
                        start = at;
                    } else if here >= SMALL {
                        break;
                    } else {
                        came.copy_within(at..at + here, start + gathered);
                    }
                    (at, gathered) = (at + here, gathered + here);
                    let left = left - here as u64;
                    self.state = if left == 0 { State::DataReturn } else { State::ChunkData(left) };
                    if here >= SMALL {
                        break;
                    }
                    continue;
                }
                // An end without trailers is taken along.
                State::Trailers { .. } if gathered > 0 && came[at..].starts_with(b"\r\n") => {
                    at += 2;
                    self.state = State::Length(0);
                    break;
                }
                State::Trailers { .. } => break,
                state => state,
            };
            self.state = self.next(state, came[at])?;
            at += 1;
        }
        if gathered > 0 {
            return Ok(Decoded::Data(split_off(came, start, gathered, at)));
        }
        discard(came, at);
        match self.state {
            State::Trailers { .. } if !came.is_empty() => self.trailers(came),
            _ => Ok(Decoded::More),
        }
    }

    /// The state behind one byte of what stands around the data of chunks.
    fn next(&mut self, state: State, byte: u8) -> Result<State, FramingError> {
        Ok(match (state, byte) {
            (State::ChunkSize { size, digits }, _) if byte.is_ascii_hexdigit() => {
                let digit = char::from(byte).to_digit(16).unwrap_or_default();
                let size = size.checked_mul(16).and_then(|size| size.checked_add(digit.into()));
                if digits == MAX_SIZE_DIGITS {
                    return Err(FramingError::ChunkSize);
                }
                State::ChunkSize { size: size.ok_or(FramingError::ChunkSize)?, digits: digits + 1 }
            }
            (State::ChunkSize { digits: 0, .. }, _) => return Err(FramingError::ChunkSize),
            (
                State::ChunkSize { size, .. } | State::ChunkBlank(size) | State::ChunkExtension(size),
                b'\r',
            ) => State::ChunkLineFeed(size),
            (State::ChunkSize { size, .. } | State::ChunkBlank(size), b' ' | b'\t') => {
                self.count_extension()?;
                State::ChunkBlank(size)
            }
            (State::ChunkSize { size, .. } | State::ChunkBlank(size), b';') => {
                self.count_extension()?;
                State::ChunkExtension(size)
            }
            (State::ChunkExtension(size), _) => {
                if byte.is_ascii_control() && byte != b'\t' {
                    return Err(FramingError::ExtensionByte);
                }
                self.count_extension()?;
                State::ChunkExtension(size)
            }
            (State::ChunkLineFeed(0), b'\n') => TRAILERS,
            (State::ChunkLineFeed(size), b'\n') => State::ChunkData(size),
            (State::DataReturn, b'\r') => State::DataLineFeed,
            (State::DataLineFeed, b'\n') => CHUNK,
            (State::DataReturn | State::DataLineFeed, _) => return Err(FramingError::ChunkEnd),
            _ => return Err(FramingError::ChunkSize),
        })
    }

    fn count_extension(&mut self) -> Result<(), FramingError> {
        self.extensions += 1;
        if self.extensions > MAX_EXTENSIONS { Err(FramingError::Extensions) } else { Ok(()) }
    }

    /// Reads the trailer section, once all of it has arrived.
    fn trailers(&mut self, came: &mut BytesMut) -> Result<Decoded, FramingError> {
        let State::Trailers { scanned, line } = &mut self.state else { return Ok(Decoded::More) };
        while let Some(offset) = came[*scanned..].iter().position(|byte| *byte == b'\n') {
            let feed = *scanned + offset;
            if feed == *line || came[feed - 1] != b'\r' {
                return Err(FramingError::TrailerLineEnd);
            }
            let is_empty = feed == *line + 1;
            (*scanned, *line) = (feed + 1, feed + 1);
            if *scanned > MAX_TRAILERS {
                return Err(FramingError::TooManyTrailers);
            }
            if is_empty {
                let trailers = parse_trailers(&came[..=feed])?;
                discard(came, feed + 1);
                self.state = State::Length(0);
                return Ok(if trailers.is_empty() { Decoded::End } else { Decoded::Trailers(trailers) });
            }
        }
        *scanned = came.len();
        if came.len() > MAX_TRAILERS { Err(FramingError::TooManyTrailers) } else { Ok(Decoded::More) }
    }
}

fn take(came: &mut BytesMut, most: u64) -> Bytes {
    if came.len() as u64 <= most {
        std::mem::take(came).freeze()
    } else {
        came.split_to(usize::try_from(most).unwrap_or(usize::MAX)).freeze()
    }
}

/// The `length` bytes from `start` on, while all up to `end` is dropped. Few bytes do not keep a large buffer alive.
fn split_off(came: &mut BytesMut, start: usize, length: usize, end: usize) -> Bytes {
    if end == came.len() && length * 2 >= came.capacity() {
        let mut all = std::mem::take(came);
        all.truncate(start + length);
        all.advance(start);
        return all.freeze();
    }
    if length >= SMALL {
        came.advance(start);
        let data = came.split_to(length).freeze();
        discard(came, end - start - length);
        return data;
    }
    let data = Bytes::copy_from_slice(&came[start..start + length]);
    discard(came, end);
    data
}

/// Drops bytes from the front; the buffer, too, once nothing is left.
fn discard(came: &mut BytesMut, count: usize) {
    if count == came.len() {
        *came = BytesMut::new();
    } else {
        came.advance(count);
    }
}

fn parse_trailers(section: &[u8]) -> Result<HeaderMap, FramingError> {
    let mut parsed = [httparse::EMPTY_HEADER; MAX_TRAILER_FIELDS];
    let parsed = match httparse::parse_headers(section, &mut parsed) {
        Ok(httparse::Status::Complete((_, parsed))) => parsed,
        Err(httparse::Error::TooManyHeaders) => return Err(FramingError::TooManyTrailers),
        _ => return Err(FramingError::Trailers),
    };
    let mut trailers = HeaderMap::with_capacity(parsed.len());
    for field in parsed {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| FramingError::Trailers)?;
        let value = HeaderValue::from_bytes(field.value).map_err(|_| FramingError::Trailers)?;
        trailers.append(name, value);
    }
    Ok(trailers)
}

#[cfg(test)]
mod tests;
