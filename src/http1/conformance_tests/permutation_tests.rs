//! A framing field with one byte in a wrong place, for every byte that a tool inserts there: controls, whitespace, DEL,
//! and all bytes above ASCII. The sets and the places are those of defparam's smuggler and of PortSwigger's HTTP Request
//! Smuggler (`midspace`, `postspace`, `prespace`, `endspace`, `namesuffix1`, `spacefix1`, …).
//!
//! Two recipients must not disagree: the field either counts, or the message is refused, or the bytes belong to another
//! field for everyone.

use super::*;

/// What a recipient makes of the message.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Verdict {
    Refused,
    Chunked,
    /// By its Content-Length of 3.
    Length,
}
use Verdict::{Chunked, Length, Refused};

fn verdict((messages, end): (Vec<Message>, End)) -> Verdict {
    match (messages.first(), end) {
        (None, End::Head(_) | End::Framing(_)) => Refused,
        (Some(Message { framing: Framing::Chunked, .. }), _) => Chunked,
        (Some(Message { framing: Framing::Length(3), .. }), _) => Length,
        other => panic!("{other:?}"),
    }
}

/// Inserts each byte at the `_` of `gadget`; `expected` says what becomes of the message.
fn check(
    section: &str,
    (start, gadget): (&str, &str),
    expected: fn(u8) -> Verdict,
    read: impl Fn(Pieces<'_>) -> (Vec<Message>, End),
) {
    let (before, after) = gadget.split_once('_').unwrap();
    for byte in (1..=b' ').chain(0x7f..=u8::MAX) {
        let head = [start.as_bytes(), before.as_bytes(), &[byte], after.as_bytes(), b"\r\n\r\n"].concat();
        for delivery in deliveries(&head).take(2) {
            assert_eq!(verdict(read(delivery)), expected(byte), "{section}: {}", head.escape_ascii());
        }
    }
}

/// The field beside a Content-Length, in a request.
fn coding(section: &str, gadget: &str, expected: fn(u8) -> Verdict) {
    let start = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n";
    check(section, (start, gadget), expected, read_requests);
}

/// The same in a response.
fn response_coding(section: &str, gadget: &str, expected: fn(u8) -> Verdict) {
    let read = |pieces: Pieces<'_>| read_responses(&Method::GET, pieces);
    check(section, ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n", gadget), expected, read);
}

/// A Content-Length alone, in a request.
fn length(section: &str, gadget: &str, expected: fn(u8) -> Verdict) {
    check(section, ("POST / HTTP/1.1\r\nHost: a\r\n", gadget), expected, read_requests);
}

const fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

cases! { coding:
    a_byte_before_the_coding, "RFC 9110 §5.5", "Transfer-Encoding:_chunked",
        |byte| if is_blank(byte) { Chunked } else { Refused };
    a_byte_before_the_coding_after_a_space, "RFC 9110 §5.5", "Transfer-Encoding: _chunked",
        |byte| if is_blank(byte) { Chunked } else { Refused };
    a_byte_after_the_coding, "RFC 9110 §5.5", "Transfer-Encoding: chunked_",
        |byte| if is_blank(byte) { Chunked } else { Refused };
    a_byte_inside_the_coding, "RFC 9112 §7", "Transfer-Encoding: chun_ked", |_| Refused;
    a_byte_before_the_name, "RFC 9112 §5.2", "_Transfer-Encoding: chunked", |_| Refused;
    a_byte_inside_the_name, "RFC 9110 §5.6.2", "Transfer_Encoding: chunked", |_| Refused;
    a_byte_before_the_colon, "RFC 9112 §5.1", "Transfer-Encoding_: chunked", |_| Refused;
    a_byte_in_place_of_a_line_end_before, "RFC 9112 §2.2", "X: X_Transfer-Encoding: chunked",
        |byte| if is_blank(byte) || byte > 0x7f { Length } else { Refused };
    a_byte_in_place_of_a_line_end_after, "RFC 9112 §2.2", "Transfer-Encoding: chunked_X: X", |_| Refused;
    a_byte_in_place_of_lf_before, "RFC 9112 §2.2", "X: X\r_Transfer-Encoding: chunked",
        |byte| if byte == b'\n' { Chunked } else { Refused };
    a_byte_in_place_of_cr_before, "RFC 9112 §2.2", "X: X_\nTransfer-Encoding: chunked",
        |byte| if byte == b'\r' { Chunked } else { Refused };
    a_byte_in_place_of_lf_after, "RFC 9112 §2.2", "Transfer-Encoding: chunked\r_X: X",
        |byte| if byte == b'\n' { Chunked } else { Refused };
    a_byte_in_place_of_cr_after, "RFC 9112 §2.2", "Transfer-Encoding: chunked_\nX: X",
        |byte| if byte == b'\r' { Chunked } else { Refused };
}

cases! { length:
    a_byte_before_the_length, "RFC 9110 §5.5", "Content-Length:_3",
        |byte| if is_blank(byte) { Length } else { Refused };
    a_byte_after_the_length, "RFC 9110 §5.5", "Content-Length: 3_",
        |byte| if is_blank(byte) { Length } else { Refused };
    a_byte_between_digits, "RFC 9110 §8.6", "Content-Length: 0_3", |_| Refused;
    a_byte_before_the_name_of_the_length, "RFC 9112 §5.2", "_Content-Length: 3", |_| Refused;
    a_byte_inside_the_name_of_the_length, "RFC 9110 §5.6.2", "Content_Length: 3", |_| Refused;
    a_byte_before_the_colon_of_the_length, "RFC 9112 §5.1", "Content-Length_: 3", |_| Refused;
}

// Whitespace before a colon is removed from a response, a coding that is unknown ends by close (and is refused above).
cases! { response_coding:
    a_byte_before_the_colon_in_a_response, "RFC 9112 §5.1", "Transfer-Encoding_: chunked",
        |byte| if is_blank(byte) { Chunked } else { Refused };
    a_byte_before_the_name_in_a_response, "RFC 9112 §5.2", "_Transfer-Encoding: chunked", |_| Refused;
    a_byte_inside_the_name_in_a_response, "RFC 9110 §5.6.2", "Transfer_Encoding: chunked", |_| Refused;
    a_byte_in_place_of_a_line_end_in_a_response, "RFC 9112 §2.2", "X: X_Transfer-Encoding: chunked",
        |byte| if is_blank(byte) || byte > 0x7f { Length } else { Refused };
    a_byte_in_place_of_lf_in_a_response, "RFC 9112 §2.2", "Transfer-Encoding: chunked\r_X: X",
        |byte| if byte == b'\n' { Chunked } else { Refused };
    a_byte_in_place_of_cr_in_a_response, "RFC 9112 §2.2", "Transfer-Encoding: chunked_\nX: X",
        |byte| if byte == b'\r' { Chunked } else { Refused };
}
