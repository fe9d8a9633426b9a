//! The chunked transfer coding (RFC 9112 §7.1).

use super::{FramingError as E, *};
use crate::http1::framing::{MAX_EXTENSIONS, MAX_TRAILER_FIELDS};

const HEAD: &str = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";

/// Reads a request with this body.
fn read_body(section: &str, body: &[u8]) -> (Vec<Message>, End) {
    read_alike(section, &[HEAD.as_bytes(), body].concat(), read_requests)
}

/// Checks a complete body, which another request follows.
fn body(section: &str, sent: impl AsRef<[u8]>, expected: &str) {
    let sent = [sent.as_ref(), b"GET /next HTTP/1.1\r\n\r\n"].concat();
    let (messages, end) = read_body(section, &sent);
    assert_eq!((messages.len(), end), (2, End::Closed), "{section}: {}", sent.escape_ascii());
    assert_eq!(String::from_utf8_lossy(&messages[0].body), expected, "{section}: {}", sent.escape_ascii());
    assert_eq!(messages[1].start_line, "GET /next HTTP/1.1", "{section}");
}

/// Checks the trailers of a body that is otherwise empty.
fn trailers(section: &str, sent: &str, expected: &[(&str, &str)]) {
    let sent = format!("0\r\n{sent}\r\nGET /next HTTP/1.1\r\n\r\n");
    let (messages, end) = read_body(section, sent.as_bytes());
    assert_eq!((messages.len(), end), (2, End::Closed), "{section}: {sent:?}");
    let expected = expected.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec()));
    assert_eq!(messages[0].trailers, expected.collect::<Vec<_>>(), "{section}: {sent:?}");
}

/// Checks that a body is refused. What follows it is never read as a request.
fn refused(section: &str, sent: impl AsRef<[u8]>, expected: FramingError) {
    let (messages, end) = read_body(section, sent.as_ref());
    assert_eq!(
        (messages.len(), end),
        (1, End::Framing(expected)),
        "{section}: {}",
        sent.as_ref().escape_ascii()
    );
}

/// Checks that a body is incomplete.
fn truncated(section: &str, sent: &str) {
    let (messages, end) = read_body(section, sent.as_bytes());
    assert_eq!((messages.len(), end), (1, End::Truncated), "{section}: {sent:?}");
}

cases! { body:
    two_chunks, "RFC 9112 §7.1", "4\r\nWiki\r\n5\r\npedia\r\n0\r\n\r\n", "Wikipedia";
    no_chunks, "RFC 9112 §7.1", "0\r\n\r\n", "";
    a_size_in_lower_case, "RFC 9112 §7.1", "a\r\n0123456789\r\n0\r\n\r\n", "0123456789";
    a_size_in_upper_case, "RFC 9112 §7.1", "A\r\n0123456789\r\n0\r\n\r\n", "0123456789";
    a_size_of_two_digits, "RFC 9112 §7.1", "1e\r\nall your base are belong to us\r\n0\r\n\r\n",
        "all your base are belong to us";
    a_size_with_zeros, "RFC 9112 §7.1", "0005\r\nhello\r\n0\r\n\r\n", "hello";
    a_size_of_sixteen_digits, "RFC 9112 §7.1", "0000000000000005\r\nhello\r\n0\r\n\r\n", "hello";
    a_last_chunk_of_many_zeros, "RFC 9112 §7.1", "5\r\nhello\r\n6\r\n world\r\n000\r\n\r\n", "hello world";
    data_that_looks_like_a_last_chunk, "RFC 9112 §7.1", "5\r\n0\r\n\r\n\r\n0\r\n\r\n", "0\r\n\r\n";
    data_that_looks_like_a_request, "RFC 9112 §7.1",
        "1b\r\n0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n\r\n0\r\n\r\n", "0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n";
    data_of_line_ends, "RFC 9112 §7.1", "4\r\n\r\n\r\n\r\n2\r\n\n\r\r\n0\r\n\r\n", "\r\n\r\n\n\r";
    an_extension, "RFC 9112 §7.1.1", "1;extension\r\nx\r\n0\r\n\r\n", "x";
    an_extension_with_a_value, "RFC 9112 §7.1.1", "5;a=b\r\nhello\r\n0;c\r\n\r\n", "hello";
    several_extensions, "RFC 9112 §7.1.1",
        "5;ilovew3;somuchlove=aretheseparametersfor;another=withvalue\r\nhello\r\n6;blahblah;blah\r\n world\r\n0\r\n\r\n",
        "hello world";
    an_extension_in_quotes, "RFC 9112 §7.1.1", "5;a=\"I \\\"love\\\"; \\\\extensions\\\\\";b\r\nhello\r\n0\r\n\r\n",
        "hello";
    an_extension_that_looks_like_a_size, "RFC 9112 §7.1.1", "1;5\r\nx\r\n0;1\r\n\r\n", "x";
    whitespace_around_an_extension, "RFC 9112 §7.1.1", "3 \t ; extension = 123\r\nabc\r\n0\r\n\r\n", "abc";
    obs_text_in_an_extension, "RFC 9110 §5.6.4", b"1;a=\"\xe4\"\r\nx\r\n0\r\n\r\n", "x";
}

// No grammar allows these, every known recipient does or ignores them, and none of them moves the end of a line:
// extensions are dropped and the size is written anew.
cases! { body:
    an_extension_without_a_name, "RFC 9112 §7.1.1", "2;\r\naa\r\n0\r\n\r\n", "aa";
    extensions_without_names, "RFC 9112 §7.1.1", "1;;;  ;\r\nx\r\n0\r\n\r\n", "x";
    an_extension_with_an_open_quote, "RFC 9112 §7.1.1", "5;a=\"abc\";b=\"def; ghi\r\nhello\r\n0\r\n\r\n", "hello";
    whitespace_after_a_size, "RFC 9112 §7.1", "5  \r\nhello\r\n0  \r\n\r\n", "hello";
}

cases! { refused:
    no_size, "RFC 9112 §7.1", "\r\n\r\n", E::ChunkSize;
    a_size_that_is_a_word, "RFC 9112 §7.1", "INVALID!!!\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", E::ChunkSize;
    a_size_with_a_letter_behind_it, "RFC 9112 §7.1", "1X\r\nx\r\n0\r\n\r\n", E::ChunkSize;
    a_size_with_minus, "RFC 9112 §7.1", "-1\r\nx\r\n0\r\n\r\n", E::ChunkSize;
    a_size_of_minus_0, "RFC 9112 §7.1", "-0x0\r\n\r\n", E::ChunkSize;
    a_size_with_plus, "RFC 9112 §7.1", "+5\r\nhello\r\n0\r\n\r\n", E::ChunkSize;
    a_size_with_0x, "RFC 9112 §7.1", "0x5\r\nhello\r\n0\r\n\r\n", E::ChunkSize;
    a_size_with_an_underscore, "RFC 9112 §7.1", "0_2e\r\n\r\nGET / HTTP/1.1\r\n\r\n0\r\n\r\n", E::ChunkSize;
    a_size_after_spaces, "RFC 9112 §7.1", "           0\r\n\r\n", E::ChunkSize;
    a_size_after_a_tab, "RFC 9112 §7.1", "\t5\r\nhello\r\n0\r\n\r\n", E::ChunkSize;
    a_size_in_quotes, "RFC 9112 §7.1", "\"5\"\r\nhello\r\n0\r\n\r\n", E::ChunkSize;
    two_sizes, "RFC 9112 §7.1", "1 A\r\nx\r\n0\r\n\r\n", E::ChunkSize;
    an_extension_without_a_semicolon, "RFC 9112 §7.1.1", "2 erfrferferf\r\naa\r\n0 rrrr\r\n\r\n", E::ChunkSize;
    an_extension_without_a_semicolon_or_space, "RFC 9112 §7.1.1", "1these-bytes\r\nZ\r\n0\r\n\r\n", E::ChunkSize;
    a_size_of_65_bits, "RFC 9112 §7.1", "10000000000000000\r\nx", E::ChunkSize;
    a_size_that_overflows, "RFC 9112 §7.1", "f0000000000000003\r\nabc\r\n0\r\n\r\n", E::ChunkSize;
    a_size_of_seventeen_zeros, "RFC 9112 §7.1", "00000000000000000\r\n\r\n", E::ChunkSize;
    a_size_before_a_bare_lf, "RFC 9112 §7.1", "5\nhello\r\n0\r\n\r\n", E::ChunkSize;
    a_last_chunk_before_a_bare_lf, "RFC 9112 §7.1", "0\n\r\n", E::ChunkSize;
    a_size_before_a_bare_cr, "RFC 9112 §7.1", "F\rF", E::ChunkSize;
    a_size_before_two_carriage_returns, "RFC 9112 §7.1", "5\r\r;ABCD\r\n34\r\nE\r\n0\r\n\r\n", E::ChunkSize;
    a_bare_cr_in_an_extension, "RFC 9112 §7.1.1", "5;a=b\r\rXXXXX\r\n0\r\n\r\n", E::ChunkSize;
    a_bare_lf_in_an_extension, "RFC 9112 §7.1.1", "1;reject\nnewlines\r\nx\r\n0\r\n\r\n", E::ExtensionByte;
    a_bare_lf_after_an_extension, "RFC 9112 §7.1.1", "1;a\nx\r\n0\r\n\r\n", E::ExtensionByte;
    nul_in_an_extension, "RFC 9112 §7.1.1", "1;a\0b\r\nx\r\n0\r\n\r\n", E::ExtensionByte;
    a_quoted_line_end_in_an_extension, "RFC 9112 §7.1.1", "1;a=\"\r\n\"\r\nx\r\n0\r\n\r\n", E::ChunkSize;
    data_longer_than_its_size, "RFC 9112 §7.1", "5\r\nhello!\r\n0\r\n\r\n", E::ChunkEnd;
    data_shorter_than_its_size, "RFC 9112 §7.1", "6\r\nhello\r\n0\r\n\r\n", E::ChunkEnd;
    data_before_a_bare_lf, "RFC 9112 §7.1", "a\r\n0123456789\n0\r\n\r\n", E::ChunkEnd;
    data_before_a_bare_cr, "RFC 9112 §7.1", "5\r\nhello\r0\r\n\r\n", E::ChunkEnd;
    data_before_two_other_bytes, "RFC 9112 §7.1", "5\r\nhelloXX0\r\n\r\n", E::ChunkEnd;
    data_without_a_line_end, "RFC 9112 §7.1", "5\r\nhello0\r\n\r\n", E::ChunkEnd;
    an_empty_line_before_the_last_chunk, "RFC 9112 §7.1", "3\r\nfoo\r\n\r\n0\r\n\r\n", E::ChunkSize;
}

// The trailer section (§7.1.2).
cases! { trailers:
    trailers_after_the_last_chunk, "RFC 9112 §7.1.2", "Vary: *\r\nContent-Type: text/plain\r\n",
        &[("vary", "*"), ("content-type", "text/plain")];
    an_empty_trailer, "RFC 9110 §5.5", "A:\r\n", &[("a", "")];
    a_trailer_that_looks_like_a_request, "RFC 9112 §7.1.2", "X:POST / HTTP/1.1\r\n", &[("x", "POST / HTTP/1.1")];
    a_trailer_that_repeats, "RFC 9110 §5.3", "A: 1\r\nA: 2\r\n", &[("a", "1"), ("a", "2")];
}

cases! { refused:
    a_trailer_without_a_colon, "RFC 9112 §5", "0\r\nvary\r\n\r\n", E::Trailers;
    a_trailer_with_a_space_before_the_colon, "RFC 9112 §5.1", "0\r\nA : 1\r\n\r\n", E::Trailers;
    a_trailer_that_is_folded, "RFC 9112 §5.2", "0\r\nA: 1\r\n 2\r\n\r\n", E::Trailers;
    a_trailer_after_a_space, "RFC 9112 §5.2", "0\r\n A: 1\r\n\r\n", E::Trailers;
    a_trailer_with_an_empty_name, "RFC 9112 §5", "0\r\n: 1\r\n\r\n", E::Trailers;
    a_trailer_with_nul, "RFC 9110 §5.5", "0\r\nA: \0\r\n\r\n", E::Trailers;
    a_trailer_with_a_bare_cr, "RFC 9112 §2.2", "0\r\nA: 1\rB: 2\r\n\r\n", E::Trailers;
    a_trailer_before_a_bare_lf, "RFC 9112 §2.2", "0\r\nA: 1\n\r\n", E::TrailerLineEnd;
    two_carriage_returns_after_the_last_chunk, "RFC 9112 §2.2", "0\r\n\r\r\n\r\n", E::Trailers;
    a_bare_lf_after_the_last_chunk, "RFC 9112 §2.2", "0\r\n\nGET / HTTP/1.1\r\n\r\n", E::TrailerLineEnd;
    two_bytes_in_place_of_the_last_line_end, "RFC 9112 §7.1", "0\r\nXXGET / HTTP/1.1\r\n\r\n", E::Trailers;
}

// The end of the connection (§8).
cases! { truncated:
    an_end_before_a_size, "RFC 9112 §8", "";
    an_end_in_a_size, "RFC 9112 §8", "F";
    an_end_after_a_size, "RFC 9112 §8", "9\r\n";
    an_end_in_an_extension, "RFC 9112 §8", "1;no CRLF";
    an_end_in_data, "RFC 9112 §8", "9\r\nfoo bar";
    an_end_after_data, "RFC 9112 §8", "3\r\nfoo";
    an_end_in_the_line_end_after_data, "RFC 9112 §8", "3\r\nfoo\r";
    an_end_before_the_last_chunk, "RFC 9112 §8", "3\r\nfoo\r\n";
    an_end_after_the_last_chunk, "RFC 9112 §8", "3\r\nfoo\r\n0\r\n";
    an_end_in_the_last_line_end, "RFC 9112 §8", "3\r\nfoo\r\n0\r\n\r";
    an_end_in_a_trailer, "RFC 9112 §8", "0\r\nA: 1";
    an_end_after_a_trailer, "RFC 9112 §8", "0\r\nA: 1\r\n";
    an_end_in_a_chunk_of_the_largest_size, "RFC 9112 §7.1", "ffffffffffffffff\r\nabc";
}

/// RFC 9112 §7.1.1: a server ought to limit the total length of extensions.
#[test]
fn extensions_are_limited_for_a_body_not_for_a_chunk() {
    let sent = |each: usize, count: usize| format!("1;{}\r\nx\r\n", "a".repeat(each - 1)).repeat(count);
    let most = format!("{}0\r\n\r\n", sent(MAX_EXTENSIONS / 8, 8));
    body("RFC 9112 §7.1.1", most, "xxxxxxxx");
    refused("RFC 9112 §7.1.1", sent(MAX_EXTENSIONS / 8, 9), E::Extensions);
    refused("RFC 9112 §7.1.1", sent(MAX_EXTENSIONS + 1, 1), E::Extensions);
}

#[test]
fn a_trailer_section_has_at_most_100_fields() {
    let sent = |count: usize| format!("0\r\n{}\r\n", "a: b\r\n".repeat(count));
    let (messages, end) = read_body("RFC 9112 §7.1.2", sent(MAX_TRAILER_FIELDS).as_bytes());
    assert_eq!((messages[0].trailers.len(), end), (MAX_TRAILER_FIELDS, End::Closed));
    refused("RFC 9112 §7.1.2", sent(MAX_TRAILER_FIELDS + 1), E::TooManyTrailers);
}
