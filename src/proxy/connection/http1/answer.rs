//! The head of an answer, and how its body goes out (RFC 9112 §6 and §9).

use std::{cell::Cell, io::Write, time::SystemTime};

use bytes::Bytes;
use http::{
    HeaderMap, Method, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_LENGTH, DATE, TRAILER, TRANSFER_ENCODING},
};
use http_body::{Body, Frame};

use crate::{
    http1::{
        Error,
        framing::{Framing, announced, content_length, has_no_body},
        head::{
            RequestHead, Spelling, Wish, decimal, persists, write_field, write_fields, write_status_line,
        },
        outlet::Outlet,
    },
    present::{Field, Present},
    proxy::{body::ResponseBody, headers::accepts_trailers},
    upstream::BodyError,
};

/// What of a request its answer depends on.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    version: Version,
    head: bool,
    connect: bool,
    /// The connection may serve another request.
    pub persists: bool,
    trailers: bool,
}

impl Asked {
    pub fn of(head: &RequestHead) -> Self {
        let present = head.present;
        Self {
            version: head.version,
            head: head.method == Method::HEAD,
            connect: head.method == Method::CONNECT,
            persists: persists(head.version, head.connection, &head.fields, present),
            trailers: present.has(Field::Te) && accepts_trailers(&head.fields),
        }
    }

    /// Of a request after which the connection ends.
    pub fn closing(version: Version, method: &Method) -> Self {
        let (head, connect) = (*method == Method::HEAD, *method == Method::CONNECT);
        Self { version, head, connect, persists: false, trailers: false }
    }

    /// Whether bytes meant for another protocol may follow the request, whatever the answer says.
    pub const fn may_switch(&self) -> bool {
        self.connect
    }

    /// Whether what follows an answer is another protocol.
    pub fn is_switched_by(&self, status: StatusCode) -> bool {
        status == StatusCode::SWITCHING_PROTOCOLS || (self.connect && status.is_success())
    }
}

/// How an answer goes out.
#[derive(Debug)]
pub struct Plan {
    framing: Framing,
    /// There is no body, whatever there seems to be.
    pub bodiless: bool,
    /// The connection may serve another request.
    pub persists: bool,
    /// The `Trailer` fields of an answer whose trailers are passed on.
    trailer: Option<Box<HeaderMap>>,
}

/// What matters of an answer's fields.
#[derive(Default)]
struct Found {
    date: bool,
    lengths: u8,
    /// One of those is what is so.
    right_length: bool,
    /// One of those is a number and nothing else.
    number: bool,
    coding: bool,
    connection: bool,
    trailer: bool,
}

impl Found {
    fn of(fields: &HeaderMap, length: Option<&[u8]>) -> Self {
        let mut found = Self::default();
        for (name, value) in fields {
            match *name {
                DATE => found.date = true,
                CONTENT_LENGTH => {
                    found.lengths = found.lengths.saturating_add(1);
                    found.right_length = length == Some(value.as_bytes());
                    found.number = !value.is_empty() && value.as_bytes().iter().all(u8::is_ascii_digit);
                }
                TRANSFER_ENCODING => found.coding = true,
                CONNECTION => found.connection = true,
                TRAILER => found.trailer = true,
                _ => {}
            }
        }
        found
    }
}

/// Writes the head of an answer. `may_persist`: the request has come to its end, or will.
pub fn write_head(
    out: &mut Vec<u8>,
    response: &mut Response<ResponseBody>,
    asked: &Asked,
    may_persist: bool,
) -> Plan {
    let (status, http10) = (response.status(), asked.version == Version::HTTP_10);
    let switched = asked.is_switched_by(status);
    let bodiless = asked.head || switched || has_no_body(status);
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
    let length = length.map(|length| decimal(&mut digits, length));
    let found = Found::of(fields, length);
    // That of a body that is not sent.
    let of_other = bodiless && (asked.head || status == StatusCode::NOT_MODIFIED);
    let keeps_length = found.lengths == 1 && (found.right_length || of_other && found.number);
    let length = match length {
        None if asked.head && found.lengths == 0 => {
            exact.filter(|exact| *exact > 0).map(|exact| decimal(&mut digits, exact))
        }
        length => length,
    };
    // What is said of the body, and isn't so.
    if found.lengths > 0 && !keeps_length {
        fields.remove(CONTENT_LENGTH);
    }
    if found.coding {
        fields.remove(TRANSFER_ENCODING);
    }
    let mut trailer = None;
    if found.trailer && framing == Framing::Chunked {
        let copy = || fields.get_all(TRAILER).iter().map(|value| (TRAILER, value.clone())).collect();
        trailer = asked.trailers.then(|| Box::new(copy()));
    } else if found.trailer {
        fields.remove(TRAILER);
    }

    let says_close =
        found.connection && !persists(Version::HTTP_11, Wish::default(), fields, Present::of(fields));
    // Behind a refused CONNECT may come what was meant for its tunnel: that is no request.
    let persists =
        may_persist && asked.persists && !asked.connect && framing != Framing::UntilClose && !says_close;
    out.reserve(128 + fields.len() * 48);
    let extensions = response.extensions();
    write_status_line(out, status, asked.version, extensions.get());
    write_fields(out, response.headers(), extensions.get::<Spelling>());
    if let Some(length) = length.filter(|_| !keeps_length) {
        write_field(out, b"content-length", length);
    }
    if framing == Framing::Chunked {
        write_field(out, b"transfer-encoding", b"chunked");
    }
    if !found.date {
        write_date(out);
    }
    match (persists, http10) {
        _ if switched || says_close => {}
        (true, true) => write_field(out, b"connection", b"keep-alive"),
        (false, false) => write_field(out, b"connection", b"close"),
        (true, false) | (false, true) => {}
    }
    out.extend_from_slice(b"\r\n");
    Plan { framing, bodiless, persists, trailer }
}

impl Plan {
    /// Whether only the end of the connection tells where the body ends.
    pub const fn ends_by_close(&self) -> bool {
        matches!(self.framing, Framing::UntilClose)
    }

    /// Puts the next part of the body into the outlet. Says whether it was the last one.
    pub fn put(
        &mut self,
        outlet: &mut Outlet,
        part: Option<Result<Frame<Bytes>, BodyError>>,
        last: bool,
    ) -> Result<bool, Error> {
        let part = part.transpose().map_err(|_| Error::BrokenOff)?;
        match part.map(Frame::into_data) {
            Some(Ok(data)) => {
                if let Framing::Length(left) = &mut self.framing {
                    *left = left.checked_sub(data.len() as u64).ok_or(Error::WrongLength)?;
                }
                outlet.data(self.framing, data, last);
                if !last {
                    return Ok(false);
                }
            }
            Some(Err(frame)) => match frame.into_trailers().ok().and_then(|trailers| self.trailers(trailers))
            {
                Some(trailers) => outlet.trailers(self.framing, &trailers),
                None => outlet.end(self.framing),
            },
            None => outlet.end(self.framing),
        }
        if matches!(self.framing, Framing::Length(1..)) { Err(Error::WrongLength) } else { Ok(true) }
    }

    /// Those trailers that the head has announced to a caller that takes them.
    fn trailers(&self, trailers: HeaderMap) -> Option<HeaderMap> {
        let trailers = announced(self.trailer.as_deref()?, trailers);
        (!trailers.is_empty()).then_some(trailers)
    }
}

/// As `Date` has it.
const DATE_LENGTH: usize = "Sun, 06 Nov 1994 08:49:37 GMT".len();

thread_local! {
    /// The second since 1970, and what it is called.
    static NOW: Cell<(u64, [u8; DATE_LENGTH])> = const { Cell::new((0, [0; DATE_LENGTH])) };
}

/// What `Date` says now. Put into words once a second.
pub fn date() -> [u8; DATE_LENGTH] {
    let now = SystemTime::now();
    let second = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let (known, mut text) = NOW.get();
    if known != second {
        // It has this length until the year 10000.
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
    fn numbers_are_written_as_everybody_does() {
        for number in [0, 7, 10, 1024, u64::MAX] {
            assert_eq!(decimal(&mut [0; 20], number), number.to_string().as_bytes());
        }
    }

    #[test]
    fn a_date_is_one() {
        for _ in 0..2 {
            let mut out = Vec::new();
            write_date(&mut out);
            let text = String::from_utf8(out).unwrap();
            let date = text.strip_prefix("date: ").and_then(|text| text.strip_suffix("\r\n")).unwrap();
            let told = httpdate::parse_http_date(date).unwrap();
            assert!(told.elapsed().unwrap().as_secs() < 5, "{text}");
        }
    }
}
