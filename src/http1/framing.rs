//! Where a body ends, and its chunks (RFC 9112 §6 and §7).

use bytes::{Buf, Bytes};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version,
    header::{
        AUTHORIZATION, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HOST,
        MAX_FORWARDS, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING,
    },
};

use crate::present::{Field, Present};

/// A chunk's first line: its size, and what else is said there, which is let go.
const MAX_CHUNK_LINE: usize = 1024;
/// Of such lines' further sayings, in one body.
const MAX_EXTENSIONS: usize = 16 * 1024;
const MAX_TRAILERS: usize = 16 * 1024;
/// Fields of a trailer section.
const MAX_TRAILER_FIELDS: usize = 100;

/// How it is told where a body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// In bytes; 0: there is none.
    Length(u64),
    Chunked,
    /// By the end of the connection.
    UntilClose,
}

/// What is wrong with a body's framing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FramingError {
    #[error("its Content-Length is not one number")]
    Length,
    #[error("its Transfer-Encoding does not end in `chunked`")]
    Coding,
    #[error("it has a Transfer-Encoding, and is of HTTP/1.0")]
    CodingOf10,
    #[error("a chunk's size is malformed")]
    ChunkSize,
    #[error("a chunk does not end where it should")]
    ChunkEnd,
    #[error("its chunks say more than {MAX_EXTENSIONS} bytes beside their sizes")]
    Extensions,
    #[error("its trailers are malformed, or too many")]
    Trailers,
}

impl Framing {
    pub const EMPTY: Self = Self::Length(0);

    /// Of a request's body (RFC 9112 §6.3). Both a Transfer-Encoding and a Content-Length is for the caller of this to
    /// refuse; here the first one wins.
    ///
    /// # Errors
    ///
    /// Where its end can't be told.
    pub fn of_request(version: Version, fields: &HeaderMap, present: Present) -> Result<Self, FramingError> {
        match coded(version, fields, present)? {
            Some(true) => Ok(Self::Chunked),
            Some(false) => Err(FramingError::Coding),
            None => Ok(Self::Length(length(fields, present)?.unwrap_or(0))),
        }
    }

    /// Of the body of the response to a request (RFC 9112 §6.3).
    ///
    /// # Errors
    ///
    /// Where its end can't be told.
    pub fn of_response(
        method: &Method,
        status: StatusCode,
        version: Version,
        fields: &HeaderMap,
        present: Present,
    ) -> Result<Self, FramingError> {
        if *method == Method::HEAD || has_no_body(status) {
            return Ok(Self::EMPTY);
        }
        match coded(version, fields, present)? {
            Some(true) => Ok(Self::Chunked),
            Some(false) => Ok(Self::UntilClose),
            None => Ok(length(fields, present)?.map_or(Self::UntilClose, Self::Length)),
        }
    }
}

/// Whether a response has no body whatever its fields say (RFC 9110 §6.4.1).
pub fn has_no_body(status: StatusCode) -> bool {
    status.is_informational() || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED
}

/// Whether a body is coded for its transfer, and `chunked` at last.
fn coded(version: Version, fields: &HeaderMap, present: Present) -> Result<Option<bool>, FramingError> {
    if !present.has(Field::TransferEncoding) {
        return Ok(None);
    }
    let Some(last) = fields.get_all(TRANSFER_ENCODING).iter().next_back() else { return Ok(None) };
    if version == Version::HTTP_10 {
        return Err(FramingError::CodingOf10);
    }
    let last = last.as_bytes().rsplit(|byte| *byte == b',').next().unwrap_or_default();
    Ok(Some(last.trim_ascii().eq_ignore_ascii_case(b"chunked")))
}

fn length(fields: &HeaderMap, present: Present) -> Result<Option<u64>, FramingError> {
    if present.has(Field::ContentLength) { content_length(fields) } else { Ok(None) }
}

/// What `Content-Length` says; it may be said more than once, but only the same (RFC 9110 §8.6).
///
/// # Errors
///
/// Where it says no number, or two.
pub fn content_length(fields: &HeaderMap) -> Result<Option<u64>, FramingError> {
    let mut values = fields.get_all(CONTENT_LENGTH).iter();
    let Some(first) = values.next() else { return Ok(None) };
    let mut found = number(first.as_bytes());
    if found.is_some() && values.next().is_none() {
        // As nearly all say it.
        return Ok(found);
    }
    for value in fields.get_all(CONTENT_LENGTH) {
        for length in value.as_bytes().split(|byte| *byte == b',') {
            let length = number(length.trim_ascii()).ok_or(FramingError::Length)?;
            if found.replace(length).is_some_and(|other| other != length) {
                return Err(FramingError::Length);
            }
        }
    }
    Ok(found)
}

/// Digits and nothing else.
fn number(digits: &[u8]) -> Option<u64> {
    let add = |sum: u64, digit: &u8| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        sum.checked_mul(10)?.checked_add(digit)
    };
    if digits.is_empty() { None } else { digits.iter().try_fold(0, add) }
}

/// What comes of a body.
#[derive(Debug)]
pub enum Decoded {
    Data(Bytes),
    Trailers(HeaderMap),
    /// It is over, and stays so.
    End,
    /// What there is does not suffice.
    More,
}

/// Takes a body out of the bytes it came in.
#[derive(Debug)]
pub struct Decoder(State);

#[derive(Debug)]
enum State {
    Length(u64),
    UntilClose,
    /// A chunk's first line comes.
    ChunkLine {
        extensions: usize,
    },
    ChunkData {
        left: u64,
        extensions: usize,
    },
    /// What closes a chunk comes.
    ChunkEnd {
        extensions: usize,
    },
    Trailers,
}

impl Decoder {
    pub const fn new(framing: Framing) -> Self {
        Self(match framing {
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::ChunkLine { extensions: 0 },
            Framing::UntilClose => State::UntilClose,
        })
    }

    /// Whether it is known that nothing more comes.
    pub const fn is_over(&self) -> bool {
        matches!(self.0, State::Length(0))
    }

    /// Whether the end of the connection is the body's.
    pub const fn ends_by_close(&self) -> bool {
        matches!(self.0, State::UntilClose)
    }

    /// How much of the body is still to come, where that was told.
    pub const fn length(&self) -> Option<u64> {
        match self.0 {
            State::Length(left) => Some(left),
            _ => None,
        }
    }

    /// How many bytes still come, as far as that is known.
    pub const fn expects(&self) -> u64 {
        match self.0 {
            State::Length(left) => left,
            // With what closes it.
            State::ChunkData { left, .. } => left.saturating_add(2),
            State::UntilClose => u64::MAX,
            State::ChunkLine { .. } | State::ChunkEnd { .. } | State::Trailers => 0,
        }
    }

    /// Takes the next part out of what came. What is left of that belongs behind it.
    ///
    /// # Errors
    ///
    /// Where the chunks are malformed. Nothing that comes behind can be told apart then.
    pub fn decode(&mut self, came: &mut Bytes) -> Result<Decoded, FramingError> {
        loop {
            match &mut self.0 {
                State::Length(0) => return Ok(Decoded::End),
                _ if came.is_empty() => return Ok(Decoded::More),
                State::Length(left) => {
                    let data = take(came, *left);
                    *left -= data.len() as u64;
                    return Ok(Decoded::Data(data));
                }
                State::UntilClose => return Ok(Decoded::Data(std::mem::take(came))),
                State::ChunkLine { extensions } => {
                    let Some((size, line, more)) = chunk_line(came)? else { return Ok(Decoded::More) };
                    let extensions = *extensions + more;
                    if extensions > MAX_EXTENSIONS {
                        return Err(FramingError::Extensions);
                    }
                    came.advance(line);
                    self.0 = match size {
                        0 => State::Trailers,
                        left => State::ChunkData { left, extensions },
                    };
                }
                State::ChunkData { left, extensions } => {
                    let data = take(came, *left);
                    *left -= data.len() as u64;
                    if *left == 0 {
                        self.0 = State::ChunkEnd { extensions: *extensions };
                    }
                    return Ok(Decoded::Data(data));
                }
                State::ChunkEnd { extensions } => match &came[..] {
                    [b'\r', b'\n', ..] => {
                        came.advance(2);
                        self.0 = State::ChunkLine { extensions: *extensions };
                    }
                    [b'\r'] => return Ok(Decoded::More),
                    _ => return Err(FramingError::ChunkEnd),
                },
                State::Trailers => {
                    let Some((trailers, length)) = trailers(came)? else { return Ok(Decoded::More) };
                    came.advance(length);
                    self.0 = State::Length(0);
                    return Ok(if trailers.is_empty() { Decoded::End } else { Decoded::Trailers(trailers) });
                }
            }
        }
    }
}

fn take(came: &mut Bytes, most: u64) -> Bytes {
    if came.len() as u64 <= most {
        std::mem::take(came)
    } else {
        came.split_to(usize::try_from(most).unwrap_or(usize::MAX))
    }
}

/// A chunk's size, the length of the line that says so, and how much of that is something else. `None`: there is more
/// to come.
fn chunk_line(came: &[u8]) -> Result<Option<(u64, usize, usize)>, FramingError> {
    let Some(end) = came.iter().take(MAX_CHUNK_LINE).position(|byte| *byte == b'\n') else {
        return if came.len() < MAX_CHUNK_LINE { Ok(None) } else { Err(FramingError::ChunkSize) };
    };
    let line = came[..end].strip_suffix(b"\r").ok_or(FramingError::ChunkSize)?;
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (size, rest) = line.split_at(digits);
    let add = |sum: u64, digit: &u8| {
        let digit = char::from(*digit).to_digit(16)?;
        sum.checked_mul(16)?.checked_add(u64::from(digit))
    };
    let size = size.iter().try_fold(0, add).filter(|_| digits > 0).ok_or(FramingError::ChunkSize)?;
    let fits = matches!(rest.trim_ascii_start(), [] | [b';', ..]);
    if !fits || rest.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') {
        return Err(FramingError::ChunkSize);
    }
    Ok(Some((size, end + 1, rest.len())))
}

/// The trailers, and the length of what they are written in. `None`: there is more to come.
fn trailers(came: &[u8]) -> Result<Option<(HeaderMap, usize)>, FramingError> {
    let mut parsed = [httparse::EMPTY_HEADER; MAX_TRAILER_FIELDS];
    let (length, parsed) = match httparse::parse_headers(came, &mut parsed) {
        Ok(httparse::Status::Complete(found)) => found,
        Ok(httparse::Status::Partial) if came.len() < MAX_TRAILERS => return Ok(None),
        _ => return Err(FramingError::Trailers),
    };
    let mut trailers = HeaderMap::with_capacity(parsed.len());
    for field in parsed {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| FramingError::Trailers)?;
        let value = HeaderValue::from_bytes(field.value).map_err(|_| FramingError::Trailers)?;
        trailers.append(name, value);
    }
    Ok(Some((trailers, length)))
}

/// Writes a chunk's first line.
pub fn write_chunk_line(out: &mut Vec<u8>, length: usize) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = (usize::BITS - length.leading_zeros()).div_ceil(4).max(1);
    out.extend((0..digits).rev().map(|place| DIGITS[length >> (4 * place) & 15]));
    out.extend_from_slice(b"\r\n");
}

/// What changes the meaning of what went before it (RFC 9110 §6.5.1).
const NEVER_TRAILERS: [HeaderName; 12] = [
    AUTHORIZATION,
    CACHE_CONTROL,
    CONTENT_ENCODING,
    CONTENT_LENGTH,
    CONTENT_RANGE,
    CONTENT_TYPE,
    HOST,
    MAX_FORWARDS,
    SET_COOKIE,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
];

/// Leaves the trailers that the head has announced (RFC 9110 §6.6.2): who reads a message that way may rely on it; and
/// none that changes what the head has said.
pub fn announced(head: &HeaderMap, mut trailers: HeaderMap) -> HeaderMap {
    for name in NEVER_TRAILERS {
        trailers.remove(name);
    }
    let names = head.get_all(TRAILER);
    let is_announced = |name: &HeaderName| {
        let lists = names.iter().flat_map(|list| list.as_bytes().split(|byte| *byte == b','));
        lists.into_iter().any(|one| one.trim_ascii().eq_ignore_ascii_case(name.as_str().as_bytes()))
    };
    let others: Vec<HeaderName> = trailers.keys().filter(|name| !is_announced(name)).cloned().collect();
    for name in others {
        trailers.remove(name);
    }
    trailers
}
