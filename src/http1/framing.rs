//! Where a body ends, and its chunks (RFC 9112 §6 and §7).

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version,
    header::{
        AUTHORIZATION, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HOST,
        MAX_FORWARDS, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING,
    },
};

use crate::present::{Field, Present};

/// Bytes of chunk extensions in one body: more is an attack, as nobody uses them.
pub const MAX_EXTENSIONS: usize = 16 * 1024;
/// Bytes of a trailer section, as of a head.
pub const MAX_TRAILERS: usize = super::MAX_HEAD_BYTES;
/// Fields of a trailer section.
pub const MAX_TRAILER_FIELDS: usize = 100;
/// What `h2` is told to accept of an upstream's header blocks. Above it drops fields without a word, so it has to be well
/// above [`MAX_TRAILERS`], which is checked afterwards.
pub const MAX_HEADER_LIST: u32 = 16 * MAX_TRAILERS as u32;

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
    #[error("a chunk size is not a hexadecimal number followed by CR LF")]
    ChunkSize,
    #[error("a chunk does not end with CR LF where its size says")]
    ChunkEnd,
    #[error("a chunk extension has a control character")]
    ExtensionByte,
    #[error("its chunk extensions have more than {MAX_EXTENSIONS} bytes")]
    Extensions,
    #[error("its trailers are malformed")]
    Trailers,
    #[error("a line of its trailers ends with LF without CR")]
    TrailerLineEnd,
    #[error("its trailers have more than {MAX_TRAILERS} bytes or {MAX_TRAILER_FIELDS} fields")]
    TooManyTrailers,
    #[error(
        "on HTTP/2, its trailers are malformed or have more than {MAX_TRAILERS} bytes, or its data has not the length that its Content-Length says"
    )]
    Http2,
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
            // No body follows, but the length may be passed on.
            length(fields, present)?;
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

/// Writes a chunk's first line.
pub fn write_chunk_line(out: &mut Vec<u8>, length: usize) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = (usize::BITS - length.leading_zeros()).div_ceil(4).max(1);
    out.extend((0..digits).rev().map(|place| DIGITS[length >> (4 * place) & 15]));
    out.extend_from_slice(b"\r\n");
}

/// Whether a trailer section is larger than is passed on, as HTTP/2 counts it (RFC 9113 §10.5.1).
pub fn is_too_large(trailers: &HeaderMap) -> bool {
    let size = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + 32;
    trailers.iter().map(size).sum::<usize>() > MAX_TRAILERS
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
