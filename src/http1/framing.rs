//! The framing of bodies: where one ends, and its chunks (RFC 9112 §6 and §7).

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version,
    header::{
        AUTHORIZATION, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HOST,
        MAX_FORWARDS, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING,
    },
};

use crate::field_set::{Field, FieldSet};

/// The most bytes of chunk extensions in one body. More is an attack: no real sender uses them.
pub const MAX_EXTENSIONS: usize = 16 * 1024;
/// The most bytes of a trailer section, as of a head.
pub const MAX_TRAILERS: usize = super::MAX_HEAD_BYTES;
/// The most fields of a trailer section.
pub const MAX_TRAILER_FIELDS: usize = 100;
/// The limit that `h2` gets for an upstream's header blocks. Above it `h2` drops fields silently, so it has to be
/// well above [`MAX_TRAILERS`], which is checked afterwards.
pub const MAX_HEADER_LIST: u32 = 16 * MAX_TRAILERS as u32;

/// How the end of a body is determined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// In bytes; 0: no body.
    Length(u64),
    Chunked,
    /// By the end of the connection.
    UntilClose,
}

/// What is wrong with the framing of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FramingError {
    #[error("its Content-Length is not one number")]
    Length,
    #[error("its Transfer-Encoding does not end in `chunked`")]
    TransferEncoding,
    #[error("it has a Transfer-Encoding, although it is HTTP/1.0")]
    TransferEncodingInHttp10,
    #[error("a chunk size is not a hexadecimal number followed by CR LF")]
    ChunkSize,
    #[error("a chunk does not end with CR LF after the data that its size announces")]
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
        "on HTTP/2, its trailers are malformed or have more than {MAX_TRAILERS} bytes, \
         or the length of its data does not match its Content-Length"
    )]
    Http2,
}

impl Framing {
    pub const EMPTY: Self = Self::Length(0);

    /// Of a request's body (RFC 9112 §6.3). A request with both Transfer-Encoding and Content-Length is for the
    /// caller to reject; here the former wins.
    ///
    /// # Errors
    ///
    /// If the end of the body cannot be determined.
    pub fn of_request(version: Version, fields: &HeaderMap, present: FieldSet) -> Result<Self, FramingError> {
        match transfer_coding(version, fields, present)? {
            Some(true) => Ok(Self::Chunked),
            Some(false) => Err(FramingError::TransferEncoding),
            None => Ok(Self::Length(length(fields, present)?.unwrap_or(0))),
        }
    }

    /// Of the body of the response to a request (RFC 9112 §6.3).
    ///
    /// # Errors
    ///
    /// If the end of the body cannot be determined.
    pub fn of_response(
        method: &Method,
        status: StatusCode,
        version: Version,
        fields: &HeaderMap,
        present: FieldSet,
    ) -> Result<Self, FramingError> {
        if *method == Method::HEAD || has_no_body(status) {
            // No body follows, but the length is checked, because it may be forwarded.
            length(fields, present)?;
            return Ok(Self::EMPTY);
        }
        match transfer_coding(version, fields, present)? {
            Some(true) => Ok(Self::Chunked),
            Some(false) => Ok(Self::UntilClose),
            None => Ok(length(fields, present)?.map_or(Self::UntilClose, Self::Length)),
        }
    }
}

/// Whether a response has no body regardless of its fields (RFC 9110 §6.4.1).
pub fn has_no_body(status: StatusCode) -> bool {
    status.is_informational() || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED
}

/// Whether a body has a transfer coding, and whether the last one is `chunked`.
fn transfer_coding(
    version: Version,
    fields: &HeaderMap,
    present: FieldSet,
) -> Result<Option<bool>, FramingError> {
    if !present.has(Field::TransferEncoding) {
        return Ok(None);
    }
    let Some(last) = fields.get_all(TRANSFER_ENCODING).iter().next_back() else { return Ok(None) };
    if version == Version::HTTP_10 {
        return Err(FramingError::TransferEncodingInHttp10);
    }
    let last = last.as_bytes().rsplit(|byte| *byte == b',').next().unwrap_or_default();
    Ok(Some(last.trim_ascii().eq_ignore_ascii_case(b"chunked")))
}

fn length(fields: &HeaderMap, present: FieldSet) -> Result<Option<u64>, FramingError> {
    if present.has(Field::ContentLength) { content_length(fields) } else { Ok(None) }
}

/// The value of `Content-Length`. It may be repeated, but only with the same value (RFC 9110 §8.6).
///
/// # Errors
///
/// If a value is not a number, or they differ.
pub fn content_length(fields: &HeaderMap) -> Result<Option<u64>, FramingError> {
    let mut values = fields.get_all(CONTENT_LENGTH).iter();
    let Some(first) = values.next() else { return Ok(None) };
    let mut length_found = number(first.as_bytes());
    if length_found.is_some() && values.next().is_none() {
        // The usual case.
        return Ok(length_found);
    }
    for value in fields.get_all(CONTENT_LENGTH) {
        for length in value.as_bytes().split(|byte| *byte == b',') {
            let length = number(length.trim_ascii()).ok_or(FramingError::Length)?;
            if length_found.replace(length).is_some_and(|other| other != length) {
                return Err(FramingError::Length);
            }
        }
    }
    Ok(length_found)
}

/// Parses digits and nothing else.
fn number(digits: &[u8]) -> Option<u64> {
    let add = |sum: u64, digit: &u8| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        sum.checked_mul(10)?.checked_add(digit)
    };
    if digits.is_empty() { None } else { digits.iter().try_fold(0, add) }
}

/// Writes a chunk line.
pub fn write_chunk_line(out: &mut Vec<u8>, length: usize) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = (usize::BITS - length.leading_zeros()).div_ceil(4).max(1);
    out.extend((0..digits).rev().map(|place| DIGITS[length >> (4 * place) & 15]));
    out.extend_from_slice(b"\r\n");
}

/// Whether a trailer section exceeds the limit, by the size that HTTP/2 counts (RFC 9113 §10.5.1).
pub fn is_trailer_section_too_large(trailers: &HeaderMap) -> bool {
    let size = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + 32;
    trailers.iter().map(size).sum::<usize>() > MAX_TRAILERS
}

/// Fields that change the meaning of the message before them (RFC 9110 §6.5.1).
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

/// Keeps only trailers that the head announces (RFC 9110 §6.6.2), because recipients may rely on that, and none that
/// changes the meaning of the head.
pub fn retain_announced_trailers(head: &HeaderMap, mut trailers: HeaderMap) -> HeaderMap {
    for name in NEVER_TRAILERS {
        trailers.remove(name);
    }
    let names = head.get_all(TRAILER);
    let is_announced = |name: &HeaderName| {
        let lists = names.iter().flat_map(|list| list.as_bytes().split(|byte| *byte == b','));
        lists.into_iter().any(|one| one.trim_ascii().eq_ignore_ascii_case(name.as_str().as_bytes()))
    };
    let removed: Vec<HeaderName> = trailers.keys().filter(|name| !is_announced(name)).cloned().collect();
    for name in removed {
        trailers.remove(name);
    }
    trailers
}
