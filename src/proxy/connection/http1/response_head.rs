//! The head of a response and the framing of its body (RFC 9112 §6 and §9).

use std::{cell::Cell, io::Write, time::SystemTime};

use bytes::Bytes;
use http::{
    HeaderMap, Method, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_LENGTH, DATE, TRAILER, TRANSFER_ENCODING},
};
use http_body::{Body, Frame};

use crate::{
    field_set::{Field, FieldSet},
    http1::{
        Error,
        framing::{Framing, content_length, has_no_body, retain_announced_trailers},
        head::{
            ConnectionOptions, RequestHead, Spelling, format_decimal, is_persistent, write_field,
            write_fields, write_status_line,
        },
        write_buffer::WriteBuffer,
    },
    proxy::{body::ResponseBody, headers::accepts_trailers},
    upstream::BodyError,
};

/// What the response's framing depends on in the request.
#[derive(Clone, Copy, Debug)]
pub struct RequestInfo {
    version: Version,
    head: bool,
    connect: bool,
    /// Whether the connection may serve another request.
    pub persists: bool,
    trailers: bool,
}

impl RequestInfo {
    pub fn of(head: &RequestHead) -> Self {
        let present = head.present;
        Self {
            version: head.version,
            head: head.method == Method::HEAD,
            connect: head.method == Method::CONNECT,
            persists: is_persistent(head.version, head.connection, &head.fields, present),
            trailers: present.has(Field::Te) && accepts_trailers(&head.fields),
        }
    }

    /// For a request after which the connection closes.
    pub fn closing(version: Version, method: &Method) -> Self {
        let (head, connect) = (*method == Method::HEAD, *method == Method::CONNECT);
        Self { version, head, connect, persists: false, trailers: false }
    }

    /// Whether bytes of another protocol may follow the request, whatever the response is.
    pub const fn may_switch_protocol(&self) -> bool {
        self.connect
    }

    /// Whether a response with this status changes the protocol.
    pub fn switches_protocol(&self, status: StatusCode) -> bool {
        status == StatusCode::SWITCHING_PROTOCOLS || (self.connect && status.is_success())
    }
}

/// How a response is sent.
#[derive(Debug)]
pub struct ResponsePlan {
    framing: Framing,
    /// No body is sent, even if there is one.
    pub bodiless: bool,
    /// Whether the connection may serve another request.
    pub persists: bool,
    /// The `Trailer` fields of a response whose trailers are forwarded.
    trailer: Option<Box<HeaderMap>>,
}

/// The header fields of a response that matter for its framing.
#[derive(Default)]
struct FieldSummary {
    date: bool,
    lengths: u8,
    /// One Content-Length is the true length.
    right_length: bool,
    /// One Content-Length is a number of digits only.
    is_number: bool,
    coding: bool,
    connection: bool,
    trailer: bool,
}

impl FieldSummary {
    fn of(fields: &HeaderMap, length: Option<&[u8]>) -> Self {
        let mut summary = Self::default();
        for (name, value) in fields {
            match *name {
                DATE => summary.date = true,
                CONTENT_LENGTH => {
                    summary.lengths = summary.lengths.saturating_add(1);
                    summary.right_length = length == Some(value.as_bytes());
                    summary.is_number = !value.is_empty() && value.as_bytes().iter().all(u8::is_ascii_digit);
                }
                TRANSFER_ENCODING => summary.coding = true,
                CONNECTION => summary.connection = true,
                TRAILER => summary.trailer = true,
                _ => {}
            }
        }
        summary
    }
}

/// Writes the head of a response. `may_persist`: the request was, or will be, received completely.
pub fn write_head(
    out: &mut Vec<u8>,
    response: &mut Response<ResponseBody>,
    request_info: &RequestInfo,
    may_persist: bool,
) -> ResponsePlan {
    let (status, http10) = (response.status(), request_info.version == Version::HTTP_10);
    let switched = request_info.switches_protocol(status);
    let bodiless = request_info.head || switched || has_no_body(status);
    let (ended, exact) = (response.body().is_end_stream(), response.body().size_hint().exact());
    let fields = response.headers_mut();
    let length = match (bodiless, ended) {
        (true, _) => None,
        (false, true) => Some(0),
        (false, false) => exact.or_else(|| content_length(fields).ok().flatten()),
    };
    let framing = match length {
        _ if bodiless => Framing::EMPTY,
        Some(length) => Framing::Length(length),
        None if http10 => Framing::UntilClose,
        None => Framing::Chunked,
    };
    let mut digits = [0; 20];
    let length = length.map(|length| format_decimal(&mut digits, length));
    let summary = FieldSummary::of(fields, length);
    // The length of a body that is not sent (HEAD, 304).
    let of_other = bodiless && (request_info.head || status == StatusCode::NOT_MODIFIED);
    let keeps_length = summary.lengths == 1 && (summary.right_length || of_other && summary.is_number);
    let length = match length {
        None if request_info.head && summary.lengths == 0 => {
            exact.filter(|exact| *exact > 0).map(|exact| format_decimal(&mut digits, exact))
        }
        length => length,
    };
    // Remove framing fields that are wrong.
    if summary.lengths > 0 && !keeps_length {
        fields.remove(CONTENT_LENGTH);
    }
    if summary.coding {
        fields.remove(TRANSFER_ENCODING);
    }
    let mut trailer = None;
    if summary.trailer && framing == Framing::Chunked {
        let copy = || fields.get_all(TRAILER).iter().map(|value| (TRAILER, value.clone())).collect();
        trailer = request_info.trailers.then(|| Box::new(copy()));
    } else if summary.trailer {
        fields.remove(TRAILER);
    }

    let has_close = summary.connection
        && !is_persistent(Version::HTTP_11, ConnectionOptions::default(), fields, FieldSet::of(fields));
    // After a refused CONNECT the client may still send bytes of the tunnel, which are no request.
    let persists = may_persist
        && request_info.persists
        && !request_info.connect
        && framing != Framing::UntilClose
        && !has_close;
    out.reserve(128 + fields.len() * 48);
    let extensions = response.extensions();
    write_status_line(out, status, request_info.version, extensions.get());
    write_fields(out, response.headers(), extensions.get::<Spelling>());
    if let Some(length) = length.filter(|_| !keeps_length) {
        write_field(out, b"content-length", length);
    }
    if framing == Framing::Chunked {
        write_field(out, b"transfer-encoding", b"chunked");
    }
    if !summary.date {
        write_date(out);
    }
    match (persists, http10) {
        _ if switched || has_close => {}
        (true, true) => write_field(out, b"connection", b"keep-alive"),
        (false, false) => write_field(out, b"connection", b"close"),
        (true, false) | (false, true) => {}
    }
    out.extend_from_slice(b"\r\n");
    ResponsePlan { framing, bodiless, persists, trailer }
}

impl ResponsePlan {
    /// Whether the end of the connection ends the body.
    pub const fn ends_by_close(&self) -> bool {
        matches!(self.framing, Framing::UntilClose)
    }

    /// Puts the next frame of the body into the output buffer. Returns whether it was the last one.
    pub fn put(
        &mut self,
        outlet: &mut WriteBuffer,
        part: Option<Result<Frame<Bytes>, BodyError>>,
        last: bool,
    ) -> Result<bool, Error> {
        let part = part.transpose().map_err(|_| Error::BodyEndedEarly)?;
        match part.map(Frame::into_data) {
            Some(Ok(data)) => {
                if let Framing::Length(left) = &mut self.framing {
                    *left = left.checked_sub(data.len() as u64).ok_or(Error::LengthMismatch)?;
                }
                outlet.push_data(self.framing, data, last);
                if !last {
                    return Ok(false);
                }
            }
            Some(Err(frame)) => match frame.into_trailers().ok().and_then(|trailers| self.trailers(trailers))
            {
                Some(trailers) => outlet.push_trailers(self.framing, &trailers),
                None => outlet.push_end(self.framing),
            },
            None => outlet.push_end(self.framing),
        }
        if matches!(self.framing, Framing::Length(1..)) { Err(Error::LengthMismatch) } else { Ok(true) }
    }

    /// The trailers that the head has announced, for a client that accepts trailers.
    fn trailers(&self, trailers: HeaderMap) -> Option<HeaderMap> {
        let trailers = retain_announced_trailers(self.trailer.as_deref()?, trailers);
        (!trailers.is_empty()).then_some(trailers)
    }
}

/// The length of a `Date` value.
const DATE_LENGTH: usize = "Sun, 06 Nov 1994 08:49:37 GMT".len();

thread_local! {
    /// The last second since 1970 that was formatted, and its text.
    static NOW: Cell<(u64, [u8; DATE_LENGTH])> = const { Cell::new((0, [0; DATE_LENGTH])) };
}

/// The current `Date` value. Formatted once a second.
pub fn date() -> [u8; DATE_LENGTH] {
    let now = SystemTime::now();
    let second = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let (known, mut text) = NOW.get();
    if known != second {
        // The text has this length until the year 10000.
        let _ = write!(&mut text[..], "{}", httpdate::HttpDate::from(now));
        NOW.set((second, text));
    }
    text
}

fn write_date(out: &mut Vec<u8>) {
    write_field(out, b"date", &date());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimal_agrees_with_to_string() {
        for number in [0, 7, 10, 1024, u64::MAX] {
            assert_eq!(format_decimal(&mut [0; 20], number), number.to_string().as_bytes());
        }
    }

    #[test]
    fn the_date_field_is_the_current_time() {
        for _ in 0..2 {
            let mut out = Vec::new();
            write_date(&mut out);
            let text = String::from_utf8(out).unwrap();
            let date = text.strip_prefix("date: ").and_then(|text| text.strip_suffix("\r\n")).unwrap();
            let parsed = httpdate::parse_http_date(date).unwrap();
            assert!(parsed.elapsed().unwrap().as_secs() < 5, "{text}");
        }
    }
}
