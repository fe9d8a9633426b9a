//! The grammar and the examples of RFC 9112 and RFC 9110, case by case, and what public corpora add to them.
//!
//! A row of a table is a test: its name, the section that decides it, the input, what is expected. Each input is
//! delivered whole, byte by byte, and split at each position. Where the RFC leaves a choice, the expectation is to
//! refuse.
//!
//! Inputs are written anew from cases of: llhttp (`test/*.md`, MIT), httparse and hyper (unit tests, MIT), http-garden
//! (its list of bugs), PortSwigger's HTTP Request Smuggler and defparam's smuggler (their lists of permutations).

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use http::{HeaderMap, Method};
use tokio::io::{AsyncRead, ReadBuf};

use super::{
    Error,
    decoder::Decoder,
    framing::{Framing, FramingError},
    head::{HeadError, is_persistent, parse_request, parse_response},
    read_buffer::{BodyPart, ReadBuffer},
};

/// Makes a test of each row.
macro_rules! cases {
    ($check:ident: $($name:ident, $section:literal, $($argument:expr),+;)+) => {
        $(
            #[test]
            fn $name() {
                $check($section, $($argument),+);
            }
        )+
    };
}

mod chunked_body_tests;
mod field_tests;
mod framing_tests;
mod message_tests;
mod permutation_tests;
mod persistence_tests;
mod request_line_tests;
mod status_line_tests;

/// A stream of these pieces, which then ends.
struct Pieces<'a>(VecDeque<&'a [u8]>);

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let Some(first) = self.0.front_mut() else { return Poll::Ready(Ok(())) };
        let (now, later) = first.split_at(first.len().min(buf.remaining()));
        buf.put_slice(now);
        *first = later;
        if later.is_empty() {
            self.0.pop_front();
        }
        Poll::Ready(Ok(()))
    }
}

/// All deliveries of some bytes: whole first, then byte by byte, then split in two; a long input not at each position.
fn deliveries(input: &[u8]) -> impl Iterator<Item = Pieces<'_>> {
    let whole = Pieces([input].into());
    let bytes = Pieces(input.chunks(1).collect());
    let halves = (1..input.len()).step_by(1 + input.len() / 2000).map(|at| {
        let (first, second) = input.split_at(at);
        Pieces([first, second].into())
    });
    [whole, bytes].into_iter().chain(halves)
}

/// A message as it was read.
#[derive(Debug, PartialEq)]
struct Message {
    /// `GET /path HTTP/1.1`, `HTTP/1.1 200 reason`.
    start_line: String,
    fields: Vec<(String, Vec<u8>)>,
    framing: Framing,
    body: Vec<u8>,
    trailers: Vec<(String, Vec<u8>)>,
    /// Whether its connection may carry another message.
    persists: bool,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Closed,
    Truncated,
    Head(HeadError),
    Framing(FramingError),
}

impl End {
    /// The errors that a client can distinguish by the status of its response. Which error an input has may depend on how
    /// much of it has arrived.
    fn class(self) -> u16 {
        match self {
            Self::Closed => 0,
            Self::Truncated => 1,
            Self::Head(HeadError::TooManyFields | HeadError::TooLarge) => 431,
            Self::Head(_) | Self::Framing(_) => 400,
        }
    }
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        match error {
            Error::Closed => Self::Closed,
            Error::UnexpectedEnd => Self::Truncated,
            Error::Head(error) => Self::Head(error),
            Error::Framing(error) => Self::Framing(error),
            other => panic!("{other}"),
        }
    }
}

fn list(fields: &HeaderMap) -> Vec<(String, Vec<u8>)> {
    fields.iter().map(|(name, value)| (name.to_string(), value.as_bytes().to_vec())).collect()
}

fn ready<T>(polled: Poll<T>) -> T {
    match polled {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it is pending"),
    }
}

/// Reads messages until the end.
fn read(
    mut pieces: Pieces<'_>,
    mut head: impl FnMut(&mut ReadBuffer, &mut Pieces<'_>) -> Result<Message, Error>,
) -> (Vec<Message>, End) {
    let (mut buffer, mut messages) = (ReadBuffer::default(), Vec::new());
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        let mut message = match head(&mut buffer, &mut pieces) {
            Ok(message) => message,
            Err(error) => return (messages, error.into()),
        };
        let mut decoder = Decoder::new(message.framing);
        loop {
            match ready(buffer.poll_body(&mut pieces, &mut cx, &mut decoder)) {
                Ok(Some(BodyPart::Data(data))) => message.body.extend_from_slice(&data),
                Ok(Some(BodyPart::Trailers(trailers))) => message.trailers = list(&trailers),
                Ok(None) => break,
                Err(error) => {
                    // How much of it was read before the error depends on the delivery.
                    message.body.clear();
                    messages.push(message);
                    return (messages, error.into());
                }
            }
        }
        messages.push(message);
    }
}

/// Reads the requests of a connection.
fn read_requests(pieces: Pieces<'_>) -> (Vec<Message>, End) {
    let mut cx = Context::from_waker(Waker::noop());
    read(pieces, |buffer, pieces| {
        let head = ready(buffer.poll_head(pieces, &mut cx, |input| parse_request(input, false)))?;
        let framing = Framing::of_request(head.version, &head.fields, head.present)?;
        let persists = is_persistent(head.version, head.connection, &head.fields, head.present);
        let start_line = format!("{} {} {:?}", head.method, head.target, head.version);
        let (body, trailers) = (Vec::new(), Vec::new());
        Ok(Message { start_line, fields: list(&head.fields), framing, body, trailers, persists })
    })
}

/// Reads the responses to requests with this method.
fn read_responses(method: &Method, pieces: Pieces<'_>) -> (Vec<Message>, End) {
    let mut cx = Context::from_waker(Waker::noop());
    read(pieces, |buffer, pieces| {
        let head = ready(buffer.poll_head(pieces, &mut cx, |input| parse_response(input, false)))?;
        let framing = Framing::of_response(method, head.status, head.version, &head.fields, head.present)?;
        let persists = is_persistent(head.version, head.connection, &head.fields, head.present);
        let reason = head.reason.as_ref().map_or_else(
            || head.status.canonical_reason().unwrap_or_default().to_owned(),
            |reason| String::from_utf8_lossy(reason.as_bytes()).into_owned(),
        );
        let start_line = format!("{:?} {} {reason}", head.version, head.status.as_str());
        let (body, trailers) = (Vec::new(), Vec::new());
        Ok(Message { start_line, fields: list(&head.fields), framing, body, trailers, persists })
    })
}

/// Checks that each delivery of an input gives the same messages, and returns them with the end of the whole delivery.
fn read_alike(
    section: &str,
    input: &[u8],
    read: impl Fn(Pieces<'_>) -> (Vec<Message>, End),
) -> (Vec<Message>, End) {
    let mut all = deliveries(input).map(read);
    let (messages, end) = all.next().expect("the whole input");
    for (index, (others, other)) in all.enumerate() {
        let shown = input[..input.len().min(300)].escape_ascii();
        assert_eq!(others, messages, "{section}: delivery {index} of {shown}");
        assert_eq!(
            other.class(),
            end.class(),
            "{section}: delivery {index} of {shown}: {other:?}, not {end:?}"
        );
    }
    (messages, end)
}

/// Checks how a request is parsed, or why it is not. Returns it.
fn request(section: &str, input: &[u8], expected: Result<(), HeadError>) -> Option<Message> {
    let (mut messages, end) = read_alike(section, input, read_requests);
    let shown = input[..input.len().min(300)].escape_ascii();
    match expected {
        Ok(()) => {
            assert_eq!((messages.len(), end), (1, End::Closed), "{section}: {shown}");
            messages.pop()
        }
        Err(error) => {
            assert_eq!((messages.len(), end), (0, End::Head(error)), "{section}: {shown}");
            None
        }
    }
}

/// The same for a response to GET whose body, if any, is delimited by close.
fn response(section: &str, input: &[u8], expected: Result<(), HeadError>) -> Option<Message> {
    let (mut messages, end) = read_alike(section, input, |pieces| read_responses(&Method::GET, pieces));
    let shown = input[..input.len().min(300)].escape_ascii();
    match expected {
        Ok(()) => {
            assert_eq!((messages.len(), end), (1, End::Closed), "{section}: {shown}");
            messages.pop()
        }
        Err(error) => {
            assert_eq!((messages.len(), end), (0, End::Head(error)), "{section}: {shown}");
            None
        }
    }
}
