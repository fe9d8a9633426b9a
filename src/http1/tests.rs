use std::{
    pin::Pin,
    task::{Context, Poll, Waker},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, StatusCode, Uri, Version, header::CONNECTION};
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    Error,
    decoder::{DecodeResult, Decoder},
    framing::{Framing, FramingError, content_length, retain_announced_trailers},
    head::{
        HeadError, RequestHead, is_persistent, parse_request, parse_response, write_fields,
        write_request_line, write_status_line,
    },
    read_buffer::{BodyPart, ReadBuffer},
    write_buffer::WriteBuffer,
};
use crate::field_set::FieldSet;

fn fields(text: &str) -> HeaderMap {
    let head = format!("GET / HTTP/1.1\r\n{text}\r\n");
    parse_request(head.as_bytes(), false).unwrap().unwrap().1.fields
}

// ---------------------------------------------------------------------------------------------------------------
// Heads

#[test]
fn a_request_is_parsed_up_to_the_end_of_its_head() {
    let input = b"POST /a?b HTTP/1.1\r\nHost: up\r\nX-A: 1\r\nx-a:  two words \r\n\r\nbody";
    let (length, head) = parse_request(input, false).unwrap().unwrap();
    assert_eq!(&input[length..], b"body");
    assert_eq!(
        (head.method, head.target, head.version),
        (Method::POST, "/a?b".parse().unwrap(), Version::HTTP_11)
    );
    assert_eq!(head.fields["host"], "up");
    assert_eq!(head.fields.get_all("x-a").iter().collect::<Vec<_>>(), ["1", "two words"]);
    for end in 0..length {
        assert!(parse_request(&input[..end], false).unwrap().is_none(), "{end} bytes are not a head");
    }
}

#[test]
fn a_malformed_head_has_a_specific_error() {
    let request = |head: &str| parse_request(head.as_bytes(), false).map(drop).unwrap_err();
    assert_eq!(request("GET / HTTP/2.0\r\n\r\n"), HeadError::Version);
    assert_eq!(request("GET / HTTP/1.1\r\nHost : up\r\n\r\n"), HeadError::Field);
    assert_eq!(request("GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n"), HeadError::Field);
    assert_eq!(request("GET / HTTP/1.1\r\nA: b\0\r\n\r\n"), HeadError::Field);
    assert_eq!(request("GET http://[ HTTP/1.1\r\n\r\n"), HeadError::Target);
    assert_eq!(request("G(T / HTTP/1.1\r\n\r\n"), HeadError::StartLine);
    assert_eq!(request("GET /a#b HTTP/1.1\r\n\r\n"), HeadError::Fragment);
    assert_eq!(request("GET /a b HTTP/1.1\r\n\r\n"), HeadError::SpaceInTarget);
    assert_eq!(request("GET /a\u{7f} HTTP/1.1\r\n\r\n"), HeadError::TargetByte(0x7f));
    assert_eq!(request("GET /\0 HTTP/1.1\r\n\r\n"), HeadError::TargetByte(0));
    let many = "a: b\r\n".repeat(101);
    assert_eq!(request(&format!("GET / HTTP/1.1\r\n{many}\r\n")), HeadError::TooManyFields);
    let long = "a".repeat(super::MAX_HEAD_BYTES);
    assert_eq!(request(&format!("GET / HTTP/1.1\r\na: {long}\r\n\r\n")), HeadError::TooLarge);
}

#[test]
fn a_response_keeps_a_custom_reason_phrase() {
    let reason = |line: &str| {
        let head = format!("HTTP/1.1 {line}\r\n\r\n");
        parse_response(head.as_bytes(), false).unwrap().unwrap().1.reason
    };
    assert!(reason("200 OK").is_none());
    assert_eq!(reason("200 Fine").unwrap().as_bytes(), b"Fine");
    let mut out = Vec::new();
    write_status_line(&mut out, StatusCode::OK, Version::HTTP_11, reason("200 Fine").as_ref());
    write_status_line(&mut out, StatusCode::OK, Version::HTTP_11, None);
    write_status_line(&mut out, StatusCode::NOT_FOUND, Version::HTTP_10, None);
    assert_eq!(out, b"HTTP/1.1 200 Fine\r\nHTTP/1.1 200 OK\r\nHTTP/1.0 404 Not Found\r\n");
}

#[test]
fn a_response_field_may_have_spaces_after_its_name() {
    let (_, head) = parse_response(b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n", false).unwrap().unwrap();
    assert_eq!(head.fields["a"], "b");
}

#[test]
fn original_spelling_of_names_is_kept_on_request() {
    let input = b"GET / HTTP/1.1\r\nX-CasE: 1\r\nB: 2\r\nx-cASe: 3\r\n\r\n";
    let (_, mut head) = parse_request(input, true).unwrap().unwrap();
    head.fields.append("x-case", "4".parse().unwrap());
    let mut out = Vec::new();
    write_fields(&mut out, &head.fields, head.spelling.as_ref());
    assert_eq!(out, b"X-CasE: 1\r\nx-cASe: 3\r\nx-case: 4\r\nB: 2\r\n");
    out.clear();
    write_fields(&mut out, &head.fields, None);
    assert!(out.starts_with(b"x-case: 1\r\n"));
}

#[test]
fn a_target_without_a_path_gets_one() {
    let line = |uri: &str| {
        let mut out = Vec::new();
        let path = uri.parse::<Uri>().unwrap().into_parts().path_and_query.unwrap();
        write_request_line(&mut out, &Method::GET, &Uri::from(path), None);
        String::from_utf8(out).unwrap()
    };
    assert_eq!(line("http://up?q"), "GET /?q HTTP/1.1\r\n");
    assert_eq!(line("http://up"), "GET / HTTP/1.1\r\n");
    assert_eq!(line("*"), "GET * HTTP/1.1\r\n");
    assert_eq!(line("/a/b?c=d"), "GET /a/b?c=d HTTP/1.1\r\n");
}

#[test]
fn a_connection_persists_unless_one_side_closes_it() {
    let head = |minor: u8, text: &str| {
        let head = format!("GET / HTTP/1.{minor}\r\n{text}\r\n");
        parse_request(head.as_bytes(), true).unwrap().unwrap().1
    };
    let persists = |minor, text: &str| {
        let RequestHead { version, connection, fields, present, .. } = head(minor, text);
        is_persistent(version, connection, &fields, present)
    };
    assert!(persists(1, ""));
    assert!(!persists(0, ""));
    assert!(persists(0, "Connection: Keep-Alive\r\n"));
    assert!(!persists(1, "connection: Close\r\n"));
    assert!(!persists(1, "Connection: upgrade, Close\r\n"));
    for (one, other) in [("close", "keep-alive"), ("keep-alive", "close"), ("keep-alive", "te, close")] {
        let options = format!("Connection: {one}\r\nConnection: {other}\r\n");
        assert!(!persists(1, &options), "{options}");
    }
    // Fields with further options are kept for later stages, single options are not.
    let kept = |text| head(1, text).fields.get_all(CONNECTION).iter().count();
    assert_eq!(kept("Connection: keep-alive\r\nCONNECTION: CLOSE\r\n"), 0);
    assert_eq!(kept("Connection: keep-alive\r\nConnection: keep-alive, x\r\nConnection: upgrade\r\n"), 2);
}

// ---------------------------------------------------------------------------------------------------------------
// Framing

#[test]
fn framing_is_determined_by_the_head() {
    use Framing::{Chunked, Length, UntilClose};
    let request = |version, text| {
        let fields = fields(text);
        Framing::of_request(version, &fields, FieldSet::of(&fields))
    };
    assert_eq!(request(Version::HTTP_11, ""), Ok(Framing::EMPTY));
    assert_eq!(request(Version::HTTP_11, "Content-Length: 5\r\n"), Ok(Length(5)));
    assert_eq!(request(Version::HTTP_11, "Transfer-Encoding: Chunked\r\n"), Ok(Chunked));
    assert_eq!(
        request(Version::HTTP_11, "Transfer-Encoding: chunked, gzip\r\n"),
        Err(FramingError::TransferEncoding)
    );
    assert_eq!(
        request(Version::HTTP_10, "Transfer-Encoding: chunked\r\n"),
        Err(FramingError::TransferEncodingInHttp10)
    );
    let response = |method: &Method, status: u16, text| {
        let status = StatusCode::from_u16(status).unwrap();
        let fields = fields(text);
        Framing::of_response(method, status, Version::HTTP_11, &fields, FieldSet::of(&fields))
    };
    let five = "Content-Length: 5\r\n";
    assert_eq!(response(&Method::GET, 200, five), Ok(Length(5)));
    assert_eq!(response(&Method::GET, 200, ""), Ok(UntilClose));
    assert_eq!(response(&Method::GET, 200, "Transfer-Encoding: gzip\r\n"), Ok(UntilClose));
    assert_eq!(response(&Method::GET, 200, "Transfer-Encoding: gzip, chunked\r\n"), Ok(Chunked));
    assert_eq!(response(&Method::HEAD, 200, five), Ok(Framing::EMPTY));
    for status in [204, 304, 101] {
        assert_eq!(response(&Method::GET, status, five), Ok(Framing::EMPTY));
    }
    // No body follows, but the length is forwarded.
    for (method, status) in [(&Method::HEAD, 200), (&Method::GET, 304), (&Method::GET, 204)] {
        let wrong = "Content-Length: 5 GET /x\r\n";
        assert_eq!(response(method, status, wrong), Err(FramingError::Length), "{method} {status}");
    }
}

#[test]
fn a_content_length_is_one_number() {
    let length = |text: &str| content_length(&fields(text));
    assert_eq!(length(""), Ok(None));
    assert_eq!(length("Content-Length: 18446744073709551615\r\n"), Ok(Some(u64::MAX)));
    assert_eq!(length("Content-Length: 5, 5\r\nContent-Length: 5\r\n"), Ok(Some(5)));
    for wrong in ["", "+5", "-5", "0x5", "5 5", "5,", "5, 6", "18446744073709551616", "５"] {
        assert_eq!(length(&format!("Content-Length: {wrong}\r\n")), Err(FramingError::Length), "{wrong}");
    }
}

/// Decodes a whole body from these pieces; returns the bytes left after it as well.
fn decode(framing: Framing, pieces: &[&[u8]]) -> Result<(Vec<u8>, Option<HeaderMap>, Bytes), FramingError> {
    let (mut decoder, mut input) = (Decoder::new(framing), BytesMut::new());
    let (mut data, mut trailers, mut pieces) = (Vec::new(), None, pieces.iter());
    loop {
        match decoder.decode(&mut input)? {
            DecodeResult::Data(part) => data.extend_from_slice(&part),
            DecodeResult::Trailers(section) => trailers = Some(section),
            DecodeResult::End => break,
            DecodeResult::NeedMore => match pieces.next() {
                Some(piece) => input.extend_from_slice(piece),
                None => break,
            },
        }
    }
    let rest = pieces.fold(input, |mut rest, piece| {
        rest.extend_from_slice(piece);
        rest
    });
    Ok((data, trailers, rest.freeze()))
}

#[test]
fn malformed_chunks_are_rejected() {
    for (wrong, why) in [
        ("\r\n", FramingError::ChunkSize),
        ("g\r\n", FramingError::ChunkSize),
        ("-1\r\n", FramingError::ChunkSize),
        ("0x1\r\na\r\n", FramingError::ChunkSize),
        ("1\na\r\n", FramingError::ChunkSize),
        ("1 1\r\na\r\n", FramingError::ChunkSize),
        ("1;a\rb\r\na\r\n", FramingError::ChunkSize),
        ("1;a\x01b\r\na\r\n", FramingError::ExtensionByte),
        ("1\r\nab\r\n", FramingError::ChunkEnd),
        ("1\r\na\n", FramingError::ChunkEnd),
        ("10000000000000000\r\n", FramingError::ChunkSize),
        ("0\r\nno field\r\n\r\n", FramingError::Trailers),
    ] {
        assert_eq!(decode(Framing::Chunked, &[wrong.as_bytes()]).unwrap_err(), why, "{wrong:?}");
    }
}

#[test]
fn only_announced_trailers_are_sent() {
    let trailers = fields("a: 1\r\nb: 2\r\nc: 3\r\nhost: evil\r\nauthorization: evil\r\n");
    let left = retain_announced_trailers(&fields("Trailer: C, a, host, authorization\r\n"), trailers);
    assert_eq!(left.keys().map(|name| name.as_str()).collect::<Vec<_>>(), ["a", "c"]);
}

proptest! {
    /// However a chunked body is split, decoding restores it and leaves the bytes after it alone.
    #[test]
    fn a_chunked_body_is_decoded_completely(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 0..8),
        cuts in prop::collection::vec(1_usize..5000, 0..40),
        with_trailers in any::<bool>(),
        last_is_known in any::<bool>(),
    ) {
        let trailers = fields("a: 1\r\n");
        let mut sent = Sink::default();
        for (index, part) in parts.iter().enumerate() {
            let last = last_is_known && !with_trailers && index + 1 == parts.len();
            sent.outlet.push_data(Framing::Chunked, Bytes::copy_from_slice(part), last);
            sent.write();
        }
        if with_trailers {
            sent.outlet.push_trailers(Framing::Chunked, &trailers);
        } else if !last_is_known || parts.is_empty() {
            sent.outlet.push_end(Framing::Chunked);
        }
        sent.write();
        let mut bytes = sent.written;
        bytes.extend_from_slice(b"GET next");
        let mut pieces = Vec::new();
        let mut left = &bytes[..];
        for cut in cuts {
            let (piece, rest) = left.split_at(cut.min(left.len()));
            pieces.push(piece);
            left = rest;
        }
        pieces.push(left);
        let (data, found, rest) = decode(Framing::Chunked, &pieces).unwrap();
        prop_assert_eq!(data, parts.concat());
        prop_assert_eq!(found, with_trailers.then_some(trailers));
        prop_assert_eq!(&rest[..], b"GET next");
    }

    /// No input panics, and the decoded data is no longer than the input.
    #[test]
    fn no_input_panics(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = parse_request(&bytes, true);
        let _ = parse_response(&bytes, true);
        if let Ok((data, _, rest)) = decode(Framing::Chunked, &[&bytes]) {
            prop_assert!(data.len() + rest.len() <= bytes.len());
        }
    }

    #[test]
    fn a_chunk_line_states_its_length(length in any::<usize>()) {
        let mut line = Vec::new();
        super::framing::write_chunk_line(&mut line, length);
        prop_assert_eq!(line, format!("{length:x}\r\n").into_bytes());
    }
}

// ---------------------------------------------------------------------------------------------------------------
// In and out

/// Accepts a few bytes at a time.
#[derive(Default)]
struct Sink {
    outlet: WriteBuffer,
    written: Vec<u8>,
}

impl Sink {
    fn write(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        let mut narrow = Narrow(std::mem::take(&mut self.written), 1);
        let Poll::Ready(Ok(())) = self.outlet.poll_write(&mut narrow, &mut cx) else { panic!("not written") };
        self.written = narrow.0;
        assert!(self.outlet.is_empty());
    }
}

struct Narrow(Vec<u8>, usize);

impl AsyncWrite for Narrow {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        // Of varying lengths, so that the data is split everywhere.
        self.1 = self.1 % 611 + 7;
        let count = buf.len().min(self.1);
        self.0.extend_from_slice(&buf[..count]);
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let all: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
        self.poll_write(cx, &all)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Returns these pieces, then the end.
struct Source(Vec<Vec<u8>>);

impl AsyncRead for Source {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let Some(first) = self.0.first_mut() else { return Poll::Ready(Ok(())) };
        let count = first.len().min(buf.remaining());
        buf.put_slice(&first[..count]);
        first.drain(..count);
        if first.is_empty() {
            self.0.remove(0);
        }
        Poll::Ready(Ok(()))
    }
}

/// Two requests, the first with a body of this length, in pieces of this length.
fn two_requests(body: usize, piece: usize) -> Source {
    let head = format!("POST / HTTP/1.1\r\nContent-Length: {body}\r\n\r\n");
    let bytes = [head.as_bytes(), &vec![b'x'; body], b"GET /next HTTP/1.1\r\n\r\n"].concat();
    Source(bytes.chunks(piece).map(<[u8]>::to_vec).collect())
}

fn ready<T>(polled: Poll<T>) -> T {
    match polled {
        Poll::Ready(polled) => polled,
        Poll::Pending => panic!("it is pending"),
    }
}

#[test]
fn messages_are_separated_however_they_are_split() {
    for (body, piece) in
        [(0, 1), (10, 1), (10, 7), (100, 10_000), (100_000, 50), (100_000, 200_000), (70_000, 16_384)]
    {
        let (mut source, mut intake) = (two_requests(body, piece), ReadBuffer::default());
        let mut cx = Context::from_waker(Waker::noop());
        let parse = |input: &[u8]| parse_request(input, false);
        let head = ready(intake.poll_head(&mut source, &mut cx, parse)).unwrap();
        let mut decoder =
            Decoder::new(Framing::of_request(head.version, &head.fields, head.present).unwrap());
        let mut received = 0;
        while let Some(part) = ready(intake.poll_body(&mut source, &mut cx, &mut decoder)).unwrap() {
            let BodyPart::Data(data) = part else { panic!("{part:?}") };
            received += data.len();
        }
        assert_eq!(received, body, "in pieces of {piece}");
        let head = ready(intake.poll_head(&mut source, &mut cx, parse)).unwrap();
        assert_eq!(head.target.path(), "/next");
        assert!(intake.is_empty());
        let end = ready(intake.poll_head(&mut source, &mut cx, parse)).unwrap_err();
        assert!(matches!(end, Error::Closed), "{end}");
    }
}

#[test]
fn an_end_in_a_message_differs_from_one_between_messages() {
    let mut cx = Context::from_waker(Waker::noop());
    let parse = |input: &[u8]| parse_request(input, false);
    let mut cut = Source(vec![b"GET / HTTP".to_vec()]);
    let end = ready(ReadBuffer::default().poll_head(&mut cut, &mut cx, parse)).unwrap_err();
    assert!(matches!(end, Error::UnexpectedEnd), "{end}");
    let mut intake = ReadBuffer::default();
    let mut decoder = Decoder::new(Framing::Length(5));
    let mut cut = Source(vec![b"abc".to_vec()]);
    assert!(ready(intake.poll_body(&mut cut, &mut cx, &mut decoder)).is_ok());
    assert!(matches!(ready(intake.poll_body(&mut cut, &mut cx, &mut decoder)), Err(Error::UnexpectedEnd)));
    let mut decoder = Decoder::new(Framing::UntilClose);
    assert!(matches!(ready(intake.poll_body(&mut cut, &mut cx, &mut decoder)), Ok(None)));
}

/// Parts of a body may be buffered for a retry, and count by their length.
#[test]
fn small_parts_use_no_more_memory_than_their_length() {
    let (mut source, mut intake) = (two_requests(100_000, 7), ReadBuffer::default());
    let mut cx = Context::from_waker(Waker::noop());
    ready(intake.poll_head(&mut source, &mut cx, |input| parse_request(input, false))).unwrap();
    let mut decoder = Decoder::new(Framing::Length(100_000));
    let mut max = 0;
    while let Some(BodyPart::Data(data)) =
        ready(intake.poll_body(&mut source, &mut cx, &mut decoder)).unwrap()
    {
        // Data in the same piece as the end of the head shares its buffer.
        max = max.max(data.try_into_mut().map_or(0, |data| data.capacity()));
    }
    assert!((1..=64).contains(&max), "{max}");
}

#[test]
fn a_head_that_never_ends_is_rejected() {
    let mut cx = Context::from_waker(Waker::noop());
    let mut endless = Source(vec![b"GET / HTTP/1.1\r\na: ".to_vec(), vec![b'a'; 200_000]]);
    let parse = |input: &[u8]| parse_request(input, false);
    let rejection = ready(ReadBuffer::default().poll_head(&mut endless, &mut cx, parse)).unwrap_err();
    assert!(matches!(rejection, Error::Head(HeadError::TooLarge)), "{rejection}");
}
