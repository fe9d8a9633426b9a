//! Parsing and writing message heads (RFC 9112 §2 to §5).

use std::{cell::RefCell, mem::MaybeUninit};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Uri, Version, header::CONNECTION,
};
use hyper::ext::ReasonPhrase;

use super::target::{RawTarget, RequestTarget, mask_non_ascii_target, refine_error};
use crate::field_set::{Field, FieldSet};

/// The most fields of a head.
pub const MAX_FIELDS: usize = 100;
/// Capacity reserved for the fields that a proxy adds to a request. More fields reallocate.
const RESERVED_FIELDS: usize = 5;

/// What is wrong with a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    #[error("its start line is not HTTP")]
    StartLine,
    #[error("its HTTP version is neither 1.0 nor 1.1")]
    Version,
    #[error("its target is not a URI")]
    Target,
    #[error("its target has a fragment, which must not be sent (RFC 9110 §7.1)")]
    Fragment,
    #[error("its target has a space")]
    SpaceInTarget,
    #[error("its target has the control byte {0:#04x}")]
    TargetByte(u8),
    #[error("a header field is malformed")]
    Field,
    #[error("a line of its head ends with LF without CR")]
    LineEnd,
    #[error("it has more than {MAX_FIELDS} header fields")]
    TooManyFields,
    #[error("its head has more than {} bytes", super::MAX_HEAD_BYTES)]
    TooLarge,
}

impl From<httparse::Error> for HeadError {
    fn from(error: httparse::Error) -> Self {
        match error {
            httparse::Error::TooManyHeaders => Self::TooManyFields,
            httparse::Error::Version => Self::Version,
            httparse::Error::HeaderName | httparse::Error::HeaderValue => Self::Field,
            _ => Self::StartLine,
        }
    }
}

/// The head of a request.
#[derive(Debug)]
pub struct RequestHead {
    pub method: Method,
    pub target: Uri,
    pub raw_target: Option<RawTarget>,
    pub version: Version,
    pub fields: HeaderMap,
    /// Which of the fields that a proxy acts on are present.
    pub present: FieldSet,
    pub connection: ConnectionOptions,
    pub spelling: Option<Spelling>,
}

/// The head of a response.
#[derive(Debug)]
pub struct ResponseHead {
    pub status: StatusCode,
    /// If it differs from the canonical reason phrase of the status.
    pub reason: Option<ReasonPhrase>,
    pub version: Version,
    pub fields: HeaderMap,
    /// Which of the fields that a proxy acts on are present.
    pub present: FieldSet,
    pub connection: ConnectionOptions,
    pub spelling: Option<Spelling>,
}

impl ResponseHead {
    /// Converts it; reason and spelling become extensions.
    pub fn into_response(self) -> Response<()> {
        let mut response = Response::new(());
        *response.status_mut() = self.status;
        *response.version_mut() = self.version;
        *response.headers_mut() = self.fields;
        if let Some(reason) = self.reason {
            response.extensions_mut().insert(reason);
        }
        if let Some(spelling) = self.spelling {
            response.extensions_mut().insert(spelling);
        }
        response
    }
}

/// The most header maps in a thread's free list, and the most fields of one.
const MAX_FREE_MAPS: usize = 8;
const MAX_FREE_CAPACITY: usize = 48;

thread_local! {
    static FREE_MAPS: RefCell<Vec<HeaderMap>> = const { RefCell::new(Vec::new()) };
}

/// Returns a header map to the thread's free list, for the next head.
pub fn recycle_header_map(mut fields: HeaderMap) {
    if (1..=MAX_FREE_CAPACITY).contains(&fields.capacity()) {
        fields.clear();
        FREE_MAPS.with_borrow_mut(|spare| {
            if spare.len() < MAX_FREE_MAPS {
                spare.push(fields);
            }
        });
    }
}

/// The options of a `Connection` field with a single option, `close` or `keep-alive`, as nearly all are. It is
/// hop-by-hop and not stored among the fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionOptions {
    close: bool,
    keep_alive: bool,
}

impl ConnectionOptions {
    /// Records a field. Returns whether the field needs no further handling.
    fn record_field(&mut self, name: &str, value: &[u8]) -> bool {
        const NAME: &str = "connection";
        if name.len() != NAME.len() || !name.eq_ignore_ascii_case(NAME) {
            return false;
        }
        let (close, keep_alive) =
            (value.eq_ignore_ascii_case(b"close"), value.eq_ignore_ascii_case(b"keep-alive"));
        self.close |= close;
        self.keep_alive |= keep_alive;
        close || keep_alive
    }
}

/// The original spelling of field names, for endpoints and clients that insist on it.
#[derive(Clone, Debug, Default)]
pub struct Spelling(HeaderMap<Bytes>);

/// Parses the head of a request. Returns it with its length, or `None` if it is incomplete.
///
/// # Errors
///
/// If it is malformed. The bytes after it cannot be interpreted then.
pub fn parse_request(input: &[u8], keep_spelling: bool) -> Result<Option<(usize, RequestHead)>, HeadError> {
    match parse_with_target(input, None, keep_spelling) {
        Err(HeadError::StartLine) => {
            let (masked, target) =
                mask_non_ascii_target(input).ok_or_else(|| refine_error(input, HeadError::StartLine))?;
            parse_with_target(&masked, Some(&target), keep_spelling)
        }
        Err(error) => Err(refine_error(input, error)),
        parsed => parsed,
    }
}

/// The same. `target`: replaces the one in the input.
fn parse_with_target(
    input: &[u8],
    target: Option<&Bytes>,
    keep_spelling: bool,
) -> Result<Option<(usize, RequestHead)>, HeadError> {
    let mut fields = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut []);
    let length = match request.parse_with_uninit_headers(input, &mut fields)? {
        httparse::Status::Complete(length) => length,
        httparse::Status::Partial => return Ok(None),
    };
    let head = CompleteHead::new(input, length)?;
    let method = request.method.unwrap_or_default();
    let method = Method::from_bytes(method.as_bytes()).map_err(|_| HeadError::StartLine)?;
    let found = request.path.unwrap_or_default().as_bytes();
    let RequestTarget { uri: target, raw: raw_target } = match target {
        Some(target) => RequestTarget::parse(&method, target.clone(), target)?,
        None => RequestTarget::parse(&method, head.part(found), found)?,
    };
    let version = version(request.version);
    let ParsedFields { fields, present, connection, spelling } =
        head.fields(request.headers, RESERVED_FIELDS, keep_spelling)?;
    let head = RequestHead { method, target, raw_target, version, fields, present, connection, spelling };
    Ok(Some((length, head)))
}

/// Parses the head of a response. Returns it with its length, or `None` if it is incomplete.
///
/// # Errors
///
/// If it is malformed. The bytes after it cannot be interpreted then.
pub fn parse_response(input: &[u8], keep_spelling: bool) -> Result<Option<(usize, ResponseHead)>, HeadError> {
    let mut fields = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut response = httparse::Response::new(&mut []);
    // A proxy removes whitespace after a field's name from responses (RFC 9112 §5.1), as this parser does.
    let mut parser = httparse::ParserConfig::default();
    parser.allow_spaces_after_header_name_in_responses(true);
    let length = match parser.parse_response_with_uninit_headers(&mut response, input, &mut fields)? {
        httparse::Status::Complete(length) => length,
        httparse::Status::Partial => return Ok(None),
    };
    let head = CompleteHead::new(input, length)?;
    let status = response.code.unwrap_or_default();
    let status = StatusCode::from_u16(status).map_err(|_| HeadError::StartLine)?;
    let reason = response.reason.filter(|reason| status.canonical_reason() != Some(reason));
    let reason = reason.and_then(|reason| ReasonPhrase::try_from(reason.as_bytes()).ok());
    let version = version(response.version);
    let ParsedFields { fields, present, connection, spelling } =
        head.fields(response.headers, 0, keep_spelling)?;
    Ok(Some((length, ResponseHead { status, reason, version, fields, present, connection, spelling })))
}

fn version(minor: Option<u8>) -> Version {
    if minor == Some(0) { Version::HTTP_10 } else { Version::HTTP_11 }
}

/// The parsed fields of a head.
struct ParsedFields {
    fields: HeaderMap,
    present: FieldSet,
    connection: ConnectionOptions,
    spelling: Option<Spelling>,
}

/// The bytes of a complete head, and a copy of them that its parts share.
struct CompleteHead<'a> {
    found: &'a [u8],
    copy: Bytes,
}

impl<'a> CompleteHead<'a> {
    fn new(input: &'a [u8], length: usize) -> Result<Self, HeadError> {
        let found = input.get(..length).filter(|head| head.len() <= super::MAX_HEAD_BYTES);
        let found = found.ok_or(HeadError::TooLarge)?;
        // The line ends in between are checked when the fields are parsed.
        if !found.ends_with(b"\r\n\r\n") || found.first() == Some(&b'\n') {
            return Err(HeadError::LineEnd);
        }
        Ok(Self { found, copy: Bytes::copy_from_slice(found) })
    }

    /// The slice of the copy that corresponds to a part of the input.
    fn part(&self, part: &[u8]) -> Bytes {
        let begin = part.as_ptr().addr().wrapping_sub(self.found.as_ptr().addr());
        match begin.checked_add(part.len()) {
            Some(end) if end <= self.copy.len() => self.copy.slice(begin..end),
            // It is not part of the input.
            _ => Bytes::copy_from_slice(part),
        }
    }

    /// Whether CR LF precedes a field: the parser also accepts a bare LF as the end of a line (RFC 9112 §2.2).
    fn follows_line_end(&self, name: &str) -> bool {
        let begin = name.as_ptr().addr().wrapping_sub(self.found.as_ptr().addr());
        begin.checked_sub(2).and_then(|at| self.found.get(at..begin)) == Some(b"\r\n")
    }

    fn fields(
        &self,
        parsed: &[httparse::Header<'_>],
        more: usize,
        keep_spelling: bool,
    ) -> Result<ParsedFields, HeadError> {
        let mut fields = FREE_MAPS.with_borrow_mut(Vec::pop).unwrap_or_default();
        fields.reserve(parsed.len() + more);
        let mut spelling = keep_spelling.then(Spelling::default);
        let (mut present, mut connection) = (FieldSet::default(), ConnectionOptions::default());
        for field in parsed {
            if !self.follows_line_end(field.name) {
                return Err(HeadError::LineEnd);
            }
            if connection.record_field(field.name, field.value) {
                continue;
            }
            let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| HeadError::Field)?;
            let value =
                HeaderValue::from_maybe_shared(self.part(field.value)).map_err(|_| HeadError::Field)?;
            if let Some(Spelling(spelt)) = &mut spelling {
                spelt.append(&name, self.part(field.name.as_bytes()));
            }
            present.add(&name);
            fields.append(name, value);
        }
        Ok(ParsedFields { fields, present, connection, spelling })
    }
}

/// Writes a request line. `raw`: path and query to be forwarded unchanged.
pub fn write_request_line(out: &mut Vec<u8>, method: &Method, target: &Uri, raw: Option<&RawTarget>) {
    out.extend_from_slice(method.as_str().as_bytes());
    out.push(b' ');
    if let Some(raw) = raw {
        out.extend_from_slice(raw.as_bytes());
        return out.extend_from_slice(b" HTTP/1.1\r\n");
    }
    let path = target.path_and_query().map_or("/", |path| path.as_str());
    if path.starts_with('?') {
        // Of a URI with an empty path (RFC 9112 §3.2.1).
        out.push(b'/');
    }
    out.extend_from_slice(path.as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
}

/// Writes a status line. Without a `reason`, with the canonical one of the status.
pub fn write_status_line(
    out: &mut Vec<u8>,
    status: StatusCode,
    version: Version,
    reason: Option<&ReasonPhrase>,
) {
    // The usual case.
    if status == StatusCode::OK && version == Version::HTTP_11 && reason.is_none() {
        return out.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
    }
    out.extend_from_slice(if version == Version::HTTP_10 { b"HTTP/1.0 " } else { b"HTTP/1.1 " });
    out.extend_from_slice(status.as_str().as_bytes());
    out.push(b' ');
    // The reason has no meaning (RFC 9112 §4), but the space before it is required.
    let known = || status.canonical_reason().unwrap_or_default().as_bytes();
    out.extend_from_slice(reason.map_or_else(known, ReasonPhrase::as_bytes));
    out.extend_from_slice(b"\r\n");
}

/// Writes one field.
pub fn write_field(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Formats a number in decimal.
pub fn format_decimal(digits: &mut [u8; 20], mut number: u64) -> &[u8] {
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &digits[at..];
        }
    }
}

/// Writes fields, without the empty line after them.
pub fn write_fields(out: &mut Vec<u8>, fields: &HeaderMap, spelling: Option<&Spelling>) {
    let Some(Spelling(spelt)) = spelling else {
        for (name, value) in fields {
            write_field(out, name.as_str().as_bytes(), value.as_bytes());
        }
        return;
    };
    for name in fields.keys() {
        let mut spellings = spelt.get_all(name).iter();
        for value in fields.get_all(name) {
            let name = spellings.next().map_or(name.as_str().as_bytes(), |spelling| &spelling[..]);
            write_field(out, name, value.as_bytes());
        }
    }
}

/// Whether a message lets its connection persist (RFC 9112 §9.3), by its single `Connection` options and by the
/// remaining fields.
pub fn is_persistent(
    version: Version,
    options: ConnectionOptions,
    fields: &HeaderMap,
    present: FieldSet,
) -> bool {
    let ConnectionOptions { mut close, keep_alive: mut keep } = options;
    let more = present.has(Field::Connection).then(|| fields.get_all(CONNECTION));
    for value in more.iter().flatten() {
        for option in value.as_bytes().split(|byte| *byte == b',') {
            let option = option.trim_ascii();
            close |= option.eq_ignore_ascii_case(b"close");
            keep |= option.eq_ignore_ascii_case(b"keep-alive");
        }
    }
    !close && (keep || version == Version::HTTP_11)
}
