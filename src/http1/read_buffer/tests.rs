//! The cost of reading, measured in bytes parsed instead of time.

use std::task::Waker;

use super::{super::head::parse_request, *};

/// Returns this many bytes per read, and is pending before each.
struct SlowSource<'a> {
    left: &'a [u8],
    size: usize,
    paused: bool,
}

impl AsyncRead for SlowSource<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.paused = !self.paused;
        if self.paused {
            return Poll::Pending;
        }
        let (now, later) = self.left.split_at(self.size.min(self.left.len()));
        buf.put_slice(now);
        self.left = later;
        Poll::Ready(Ok(()))
    }
}

/// Reads a head in small pieces. Returns how many bytes were parsed in total, and the result.
fn parsed(head: &[u8], size: usize) -> (usize, Result<usize, Error>) {
    let (mut source, mut intake) = (SlowSource { left: head, size, paused: false }, ReadBuffer::default());
    let (mut cx, mut parsed) = (Context::from_waker(Waker::noop()), 0);
    let found = loop {
        let polled = intake.poll_head(&mut source, &mut cx, |input| {
            parsed += input.len();
            parse_request(input, false)
        });
        if let Poll::Ready(found) = polled {
            break found;
        }
    };
    (parsed, found.map(|head| head.fields.len()))
}

#[test]
fn a_head_in_one_byte_segments_is_parsed_in_linear_time() {
    let one = format!("GET / HTTP/1.1\r\nhost: up\r\na: {}\r\n\r\n", "x".repeat(60_000));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", format!("a: {}\r\n", "x".repeat(600)).repeat(99));
    let blank = format!("{}GET / HTTP/1.1\r\nhost: up\r\n\r\n", "\r\n".repeat(30_000));
    for (head, fields) in [(&one, 2), (&many, 99), (&blank, 1)] {
        for size in [1, 2, 3, 100] {
            let (parsed, found) = parsed(head.as_bytes(), size);
            assert_eq!(found.unwrap(), fields);
            assert!(parsed <= 4 * head.len(), "{parsed} bytes parsed of {}, in {size}s", head.len());
        }
    }
}

#[test]
fn an_invalid_head_is_rejected_before_its_end() {
    for (head, fits) in [("GET / HTTP/3.0\r\n", 0), ("G(T / HTTP/1.1\r\n", 0), ("GET /\u{1} HTTP/1.1\r\n", 0)]
    {
        let endless = format!("{head}{}", "a: b\r\n".repeat(50));
        assert!(matches!(parsed(endless.as_bytes(), 1).1, Err(Error::Head(_))), "{head} {fits}");
    }
}

#[test]
fn the_end_of_a_head_is_found_however_it_is_split() {
    let head = "GET / HTTP/1.1\r\nhost: up\r\n\r\n";
    for size in 1..head.len() {
        assert_eq!(parsed(head.as_bytes(), size).1.unwrap(), 1, "{head:?} in {size}s");
    }
    // A bare LF is rejected without waiting for more.
    let head = "GET / HTTP/1.1\nhost: up\n\n";
    for size in 1..head.len() {
        let error = parsed(head.as_bytes(), size).1;
        assert!(matches!(error, Err(Error::Head(HeadError::LineEnd))), "{error:?} in {size}s");
    }
}

#[test]
fn empty_lines_do_not_start_a_request() {
    for (input, started) in
        [("", false), ("\r", false), ("\r\n", false), ("\r\n\r\n\r", false), ("\r\nG", true)]
    {
        let mut intake = ReadBuffer::new(Bytes::copy_from_slice(input.as_bytes()));
        intake.skip_empty_lines();
        assert_eq!(intake.has_message_started(), started, "{input:?}");
    }
}
