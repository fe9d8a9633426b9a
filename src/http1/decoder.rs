//! Decodes the body of a message from its framing (RFC 9112 §6 and §7).
//!
//! Every byte is scanned once, however the bytes are split into reads, and small chunks that arrive together are
//! returned together: the cost of a body depends on its length, not on how its sender splits it.

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::framing::{Framing, FramingError, MAX_EXTENSIONS, MAX_TRAILER_FIELDS, MAX_TRAILERS};

/// Less than this of a chunk is joined with the chunks around it. More is returned without a copy.
const SMALL: usize = 8 * 1024;
/// The most digits in a chunk size, leading zeros included.
const MAX_SIZE_DIGITS: u8 = 16;

/// The result of one step.
#[derive(Debug)]
pub enum DecodeResult {
    Data(Bytes),
    Trailers(HeaderMap),
    /// The body is complete; all further calls return this.
    End,
    /// More bytes are needed.
    NeedMore,
}

/// See the [module](self).
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
    /// Whitespace after a chunk size.
    ChunkBlank(u64),
    ChunkExtension(u64),
    /// LF must follow the CR of a chunk line.
    ChunkLineFeed(u64),
    ChunkData(u64),
    /// CR and LF must follow the data of a chunk.
    DataReturn,
    DataLineFeed,
    Trailers {
        /// The first byte of the trailer section that has not been scanned.
        scanned: usize,
        /// The start of the line that contains this byte.
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

    /// Whether the body is complete.
    pub const fn is_complete(&self) -> bool {
        matches!(self.state, State::Length(0))
    }

    /// Whether the end of the connection is the end of the body.
    pub const fn is_close_delimited(&self) -> bool {
        matches!(self.state, State::UntilClose)
    }

    /// The remaining length of the body, if its head announced one.
    pub const fn remaining_length(&self) -> Option<u64> {
        match self.state {
            State::Length(left) => Some(left),
            _ => None,
        }
    }

    /// How many more bytes follow for certain.
    pub const fn expected_bytes(&self) -> u64 {
        match self.state {
            State::Length(left) => left,
            // Including the CR and LF after the data.
            State::ChunkData(left) => left.saturating_add(2),
            State::UntilClose => u64::MAX,
            _ => 0,
        }
    }

    /// Takes the next part of the body out of `input`. What remains there once the body is complete follows the body.
    ///
    /// # Errors
    ///
    /// If chunks or trailers are malformed. The end of the body cannot be determined then.
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<DecodeResult, FramingError> {
        match &mut self.state {
            State::Length(0) => Ok(DecodeResult::End),
            _ if input.is_empty() => Ok(DecodeResult::NeedMore),
            State::Length(left) => {
                let data = take(input, *left);
                *left -= data.len() as u64;
                Ok(DecodeResult::Data(data))
            }
            State::UntilClose => Ok(DecodeResult::Data(std::mem::take(input).freeze())),
            State::Trailers { .. } => self.trailers(input),
            _ => self.chunks(input),
        }
    }

    /// Takes the data of as many chunks as have arrived. The data of the first one stays in place; small ones after
    /// it are moved up to it.
    fn chunks(&mut self, input: &mut BytesMut) -> Result<DecodeResult, FramingError> {
        let (mut at, mut start, mut joined) = (0, 0, 0);
        while at < input.len() {
            let state = match self.state {
                State::ChunkData(left) => {
                    let available = usize::try_from(left).unwrap_or(usize::MAX).min(input.len() - at);
                    if joined == 0 {
                        start = at;
                    } else if available >= SMALL {
                        break;
                    } else {
                        input.copy_within(at..at + available, start + joined);
                    }
                    (at, joined) = (at + available, joined + available);
                    let left = left - available as u64;
                    self.state = if left == 0 { State::DataReturn } else { State::ChunkData(left) };
                    if available >= SMALL {
                        break;
                    }
                    continue;
                }
                // Consume an end without trailers as well.
                State::Trailers { .. } if joined > 0 && input[at..].starts_with(b"\r\n") => {
                    at += 2;
                    self.state = State::Length(0);
                    break;
                }
                State::Trailers { .. } => break,
                state => state,
            };
            self.state = self.next(state, input[at])?;
            at += 1;
        }
        if joined > 0 {
            return Ok(DecodeResult::Data(split_off(input, start, joined, at)));
        }
        discard(input, at);
        match self.state {
            State::Trailers { .. } if !input.is_empty() => self.trailers(input),
            _ => Ok(DecodeResult::NeedMore),
        }
    }

    /// The state after one byte of the chunk framing.
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

    /// Parses the trailer section once all of it has arrived.
    fn trailers(&mut self, input: &mut BytesMut) -> Result<DecodeResult, FramingError> {
        let State::Trailers { scanned, line } = &mut self.state else { return Ok(DecodeResult::NeedMore) };
        while let Some(offset) = input[*scanned..].iter().position(|byte| *byte == b'\n') {
            let feed = *scanned + offset;
            if feed == *line || input[feed - 1] != b'\r' {
                return Err(FramingError::TrailerLineEnd);
            }
            let is_empty = feed == *line + 1;
            (*scanned, *line) = (feed + 1, feed + 1);
            if *scanned > MAX_TRAILERS {
                return Err(FramingError::TooManyTrailers);
            }
            if is_empty {
                let trailers = parse_trailers(&input[..=feed])?;
                discard(input, feed + 1);
                self.state = State::Length(0);
                return Ok(if trailers.is_empty() {
                    DecodeResult::End
                } else {
                    DecodeResult::Trailers(trailers)
                });
            }
        }
        *scanned = input.len();
        if input.len() > MAX_TRAILERS {
            Err(FramingError::TooManyTrailers)
        } else {
            Ok(DecodeResult::NeedMore)
        }
    }
}

fn take(input: &mut BytesMut, max: u64) -> Bytes {
    if input.len() as u64 <= max {
        std::mem::take(input).freeze()
    } else {
        input.split_to(usize::try_from(max).unwrap_or(usize::MAX)).freeze()
    }
}

/// The `length` bytes from `start` on; everything up to `end` is dropped. A few bytes do not keep a large buffer
/// alive.
fn split_off(input: &mut BytesMut, start: usize, length: usize, end: usize) -> Bytes {
    if end == input.len() && length * 2 >= input.capacity() {
        let mut all = std::mem::take(input);
        all.truncate(start + length);
        all.advance(start);
        return all.freeze();
    }
    if length >= SMALL {
        input.advance(start);
        let data = input.split_to(length).freeze();
        discard(input, end - start - length);
        return data;
    }
    let data = Bytes::copy_from_slice(&input[start..start + length]);
    discard(input, end);
    data
}

/// Drops bytes from the front; and the buffer once it is empty.
fn discard(input: &mut BytesMut, count: usize) {
    if count == input.len() {
        *input = BytesMut::new();
    } else {
        input.advance(count);
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
