//! Field lines (RFC 9112 §5, RFC 9110 §5), of requests and of responses.

use super::{super::head::MAX_FIELDS, HeadError::*, *};

type Fields = [(&'static str, &'static [u8])];

/// Checks the fields of a request.
fn fields(section: &str, lines: impl AsRef<[u8]>, expected: Result<&Fields, HeadError>) {
    let input = [b"GET / HTTP/1.1\r\n", lines.as_ref(), b"\r\n\r\n"].concat();
    let parsed = request(section, &input, expected.map(drop));
    assert_same(section, parsed, expected);
}

/// Checks the fields of a response.
fn response_fields(section: &str, lines: impl AsRef<[u8]>, expected: Result<&Fields, HeadError>) {
    let input = [b"HTTP/1.1 200 OK\r\n", lines.as_ref(), b"\r\n\r\n"].concat();
    let parsed = response(section, &input, expected.map(drop));
    assert_same(section, parsed, expected);
}

fn assert_same(section: &str, parsed: Option<Message>, expected: Result<&Fields, HeadError>) {
    let expected = expected.ok().map(|fields| {
        let owned = fields.iter().map(|(name, value)| ((*name).to_owned(), value.to_vec()));
        owned.collect::<Vec<_>>()
    });
    assert_eq!(parsed.map(|message| message.fields), expected, "{section}");
}

cases! { fields:
    no_space_after_the_colon, "RFC 9112 §5.1", "Host:foo.com", Ok(&[("host", b"foo.com")]);
    whitespace_around_a_value, "RFC 9110 §5.5", "Host: \tfoo.com\t ", Ok(&[("host", b"foo.com")]);
    a_tab_inside_a_value, "RFC 9110 §5.5", "User-Agent: some\tagent", Ok(&[("user-agent", b"some\tagent")]);
    an_empty_value, "RFC 9110 §5.5", "Cookie:", Ok(&[("cookie", b"")]);
    a_value_of_whitespace, "RFC 9110 §5.5", "Cookie: \t ", Ok(&[("cookie", b"")]);
    an_empty_value_does_not_join_the_next_line, "RFC 9112 §5", "Pragma: \r\nLocation: /",
        Ok(&[("pragma", b""), ("location", b"/")]);
    obs_text_in_a_value, "RFC 9110 §5.5", b"Test: D\xfcsseldorf", Ok(&[("test", b"D\xfcsseldorf")]);
    byte_255_in_a_value, "RFC 9110 §5.5", b"Header1: \xffValue2", Ok(&[("header1", b"\xffValue2")]);
    a_no_break_space_is_not_whitespace, "RFC 9110 §5.6.3", b"User: \x85admin\xa0", Ok(&[("user", b"\x85admin\xa0")]);
    a_colon_in_a_value, "RFC 9110 §5.5", "A: b:c: d", Ok(&[("a", b"b:c: d")]);
    a_comma_in_a_quoted_string, "RFC 9110 §5.5", "Example: \"a, b\", c", Ok(&[("example", b"\"a, b\", c")]);
    names_are_case_insensitive, "RFC 9110 §5.1", "hOsT: a", Ok(&[("host", b"a")]);
    a_name_is_any_token, "RFC 9110 §5.6.2", "!#$%&'*+-.^_`|~09azAZ: x", Ok(&[("!#$%&'*+-.^_`|~09azaz", b"x")]);
    repeated_fields_keep_their_order, "RFC 9110 §5.3", "Link: a\r\nX: y\r\nLink: b",
        Ok(&[("link", b"a"), ("link", b"b"), ("x", b"y")]);
    a_field_may_be_named_like_another_with_an_underscore, "RFC 9110 §5.1", "Content_Length: 3",
        Ok(&[("content_length", b"3")]);
}

// Whitespace where none may be: before the colon (400, §5.1), before the first field (§2.2), at the start of a line
// (obs-fold: 400, §5.2).
cases! { fields:
    a_space_before_the_colon, "RFC 9112 §5.1", "Content-Length : 34", Err(Field);
    a_tab_before_the_colon, "RFC 9112 §5.1", "Transfer-Encoding\t:\tchunked", Err(Field);
    a_word_before_the_colon, "RFC 9112 §5.1", "Transfer-Encoding x: chunked", Err(Field);
    a_space_before_the_first_field, "RFC 9112 §2.2", " Host: foo", Err(Field);
    a_tab_before_the_first_field, "RFC 9112 §2.2", "\tContent-Length: 1", Err(Field);
    a_fold_with_a_space, "RFC 9112 §5.2", "Foo: bar\r\n Content-Length: 38", Err(Field);
    a_fold_with_a_tab, "RFC 9112 §5.2", "Line1: abc\r\n\tdef", Err(Field);
    a_fold_right_after_the_colon, "RFC 9112 §5.2", "Connection:\r\n close", Err(Field);
    a_fold_of_whitespace_only, "RFC 9112 §5.2", "A: b\r\n \r\nC: d", Err(Field);
    a_fold_at_the_end_of_the_head, "RFC 9112 §5.2", "A: b\r\n ", Err(Field);
    a_name_that_is_folded, "RFC 9112 §5.2", "name\r\n : value", Err(Field);
    a_name_that_continues_on_the_next_line, "RFC 9112 §5", "Transfer-\r\nEncoding: chunked", Err(Field);
}

// Names that are none.
cases! { fields:
    an_empty_name, "RFC 9112 §5", ": ignored\r\nHost: a", Err(Field);
    a_colon_alone, "RFC 9112 §5", ":\r\nI: am chopped off", Err(Field);
    a_line_without_a_colon, "RFC 9112 §5", "garbage", Err(Field);
    a_space_in_place_of_the_colon, "RFC 9112 §5", "Content-Length 10", Err(Field);
    a_name_with_at, "RFC 9110 §5.6.2", "Fo@: Failure", Err(Field);
    a_name_with_a_control_byte, "RFC 9110 §5.6.2", "Foo\x01test: Bar", Err(Field);
    a_name_with_nul, "RFC 9110 §5.6.2", "Access-Control-Allow-Cred\0entials: hello", Err(Field);
    a_name_with_a_carriage_return, "RFC 9112 §2.2", "Content\rLength: 003", Err(Field);
    a_name_with_a_space, "RFC 9110 §5.6.2", "en-US Content-Type: text/xml", Err(Field);
    a_name_that_begins_above_ascii, "RFC 9110 §5.6.2", b"\xefoo: bar", Err(Field);
    a_name_that_ends_with_nel, "RFC 9110 §5.6.2", b"Content-Length\x85: 10", Err(Field);
    a_name_that_is_percent_encoded, "RFC 9110 §5.1", "Transfer-%45ncoding: chunked",
        Ok(&[("transfer-%45ncoding", b"chunked")]);
    a_name_with_a_backslash, "RFC 9110 §5.6.2", "Transfer\\Encoding: chunked", Err(Field);
}

// Line ends and control bytes.
cases! { fields:
    a_bare_cr_between_fields, "RFC 9112 §2.2", "Foo: 1\rBar: 2", Err(Field);
    a_bare_cr_after_an_empty_value, "RFC 9112 §2.2", "x:\rTransfer-Encoding: chunked", Err(Field);
    a_bare_cr_at_the_end_of_a_value, "RFC 9112 §2.2", "Transfer-Encoding: chunked\r", Err(Field);
    a_bare_cr_at_the_start_of_a_line, "RFC 9112 §2.2", "Foo: bar\r\n\rTransfer-Encoding: chunked", Err(StartLine);
    a_bare_cr_before_another_byte_at_the_end, "RFC 9112 §2.2", "Host: a\r\n\rZGET /evil: HTTP/1.1", Err(StartLine);
    a_bare_lf_between_fields, "RFC 9112 §2.2", "Dummy: x\nContent-Length: 23", Err(LineEnd);
    a_bare_lf_after_an_empty_value, "RFC 9112 §2.2", "x:\nTransfer-Encoding: chunked", Err(LineEnd);
    a_bare_lf_before_the_empty_line, "RFC 9112 §2.2", "A: b\n", Err(LineEnd);
    a_bare_lf_for_the_empty_line, "RFC 9112 §2.2", "A: b\r\n\n", Err(LineEnd);
    a_bare_lf_and_a_space_before_a_value, "RFC 9112 §2.2", "Transfer-Encoding:\n chunked", Err(Field);
    nul_inside_a_value, "RFC 9110 §5.5", "Host: google.com\0.kallus.org", Err(Field);
    nul_at_the_end_of_a_value, "RFC 9110 §5.5", "Evil: evil\0", Err(Field);
    nul_and_carriage_return_in_a_value, "RFC 9110 §5.5", "Header: v\0\ralue", Err(Field);
    a_vertical_tab_in_a_value, "RFC 9110 §5.5", "Transfer-Encoding: \x0bchunked", Err(Field);
}

// A response: whitespace before the colon is removed (§5.1); a fold is refused, which the client sees as 502 (§5.2).
cases! { response_fields:
    a_response_with_a_space_before_a_colon, "RFC 9112 §5.1", "X-A : true\r\nBread: baguette",
        Ok(&[("x-a", b"true"), ("bread", b"baguette")]);
    a_response_with_tabs_before_a_colon, "RFC 9112 §5.1", "X-A\t \t: true", Ok(&[("x-a", b"true")]);
    a_response_with_a_fold, "RFC 9112 §5.2", "Line-Folded-Header: hello\r\n there", Err(Field);
    a_response_with_an_empty_fold, "RFC 9112 §5.2", "Line-Folded-Header:\r\n \r\n hello", Err(Field);
    a_response_with_a_space_before_the_first_field, "RFC 9112 §2.2", " Host: foo", Err(Field);
    a_response_with_an_empty_name, "RFC 9112 §5", ": hello\r\nBread: baguette", Err(Field);
    a_response_with_only_whitespace_for_a_name, "RFC 9112 §5", " : hello", Err(Field);
    a_response_with_a_line_without_a_colon, "RFC 9112 §5", "X-A   \r\n hello", Err(Field);
    a_response_with_a_space_in_a_name, "RFC 9110 §5.6.2", "en-US Content-Type: text/xml", Err(Field);
    a_response_with_nul_before_a_colon, "RFC 9110 §5.6.2", "X-A   \0: hello", Err(Field);
    a_response_with_nul_in_a_value, "RFC 9110 §5.5", "X-A: hell\0o", Err(Field);
    a_response_with_a_control_byte_in_a_value, "RFC 9110 §5.5", "X-A: hell\x01o", Err(Field);
    a_response_with_a_bare_cr_between_fields, "RFC 9112 §2.2", "Foo: 1\rBar: 2", Err(Field);
    a_response_with_a_bare_lf_between_fields, "RFC 9112 §2.2", "Foo: abc\nBar: def", Err(LineEnd);
    a_response_with_a_dollar_in_a_name, "RFC 9110 §5.6.2", "X-$PrototypeBI-Version: 1.6.0.3",
        Ok(&[("x-$prototypebi-version", b"1.6.0.3")]);
}

/// RFC 9112 §2.2: CR, LF and NUL; RFC 9110 §5.5: other control bytes too.
#[test]
fn no_control_byte_is_accepted_in_a_value() {
    for byte in (0..b' ').filter(|byte| *byte != b'\t').chain([0x7f]) {
        for value in [&[byte][..], &[b'a', byte], &[byte, b'a'], &[b'a', byte, b'b']] {
            let sent = [b"GET / HTTP/1.1\r\nA: ", value, b"\r\nHost: a\r\n\r\n"].concat();
            assert!(parse_request(&sent, false).is_err(), "{}", sent.escape_ascii());
            let sent = [b"HTTP/1.1 200 OK\r\nA: ", value, b"\r\nB: c\r\n\r\n"].concat();
            assert!(parse_response(&sent, false).is_err(), "{}", sent.escape_ascii());
        }
    }
}

/// RFC 9110 §5.6.2: a name consists of these bytes only.
#[test]
fn no_byte_outside_of_a_token_is_accepted_in_a_name() {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    for byte in (0..=u8::MAX).filter(|byte| *byte != b':') {
        for name in [&[byte][..], &[b'a', byte], &[byte, b'a'], &[b'a', byte, b'b']] {
            let sent = [b"GET / HTTP/1.1\r\n", name, b": b\r\nHost: a\r\n\r\n"].concat();
            assert_eq!(parse_request(&sent, false).is_ok(), is_token(byte), "{}", sent.escape_ascii());
        }
    }
}

#[test]
fn a_head_of_line_feeds_is_refused() {
    for sent in
        ["GET / HTTP/1.1\nHost: a\n\n", "GET / HTTP/1.1\n\n", "GET / HTTP/1.1\n\r\n", "GET / HTTP/1.1\r\n\n"]
    {
        request("RFC 9112 §2.2", sent.as_bytes(), Err(LineEnd));
    }
    for sent in ["HTTP/1.1 200 OK\nContent-Length: 0\n\n", "HTTP/1.1 200 OK\n\r\n", "HTTP/1.1 200 OK\r\n\n"] {
        response("RFC 9112 §2.2", sent.as_bytes(), Err(LineEnd));
    }
}

/// RFC 9112 §5, RFC 6585 §5: limits are for the recipient to choose.
#[test]
fn a_head_has_at_most_100_fields() {
    let head = |count: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(count));
    let found = request("RFC 6585 §5", head(MAX_FIELDS).as_bytes(), Ok(()));
    assert_eq!(found.unwrap().fields.len(), MAX_FIELDS);
    request("RFC 6585 §5", head(MAX_FIELDS + 1).as_bytes(), Err(TooManyFields));
    let head = head(MAX_FIELDS + 1).replace("GET / HTTP/1.1", "HTTP/1.1 200 OK");
    response("RFC 6585 §5", head.as_bytes(), Err(TooManyFields));
}

/// However the head is split into reads, and however much of a body is read with it.
#[test]
fn a_head_has_at_most_64_kib() {
    let head = |length: usize, body: usize| {
        let start = format!("GET / HTTP/1.1\r\nContent-Length: {body}\r\nA: ");
        let value = "a".repeat(length - start.len() - 4);
        format!("{start}{value}\r\n\r\n{}", "b".repeat(body))
    };
    for body in [0, 1, 20_000] {
        let largest = head(super::super::MAX_HEAD_BYTES, body);
        for size in [1, 16_383, 100_000] {
            let (messages, end) = read_requests(Pieces(largest.as_bytes().chunks(size).collect()));
            assert_eq!((messages.len(), end), (1, End::Closed), "in reads of {size}");
            assert_eq!(messages[0].body.len(), body);
        }
        let larger = head(super::super::MAX_HEAD_BYTES + 1, body);
        for size in [1, 16_383, 100_000] {
            let (messages, end) = read_requests(Pieces(larger.as_bytes().chunks(size).collect()));
            assert_eq!((messages.len(), end), (0, End::Head(TooLarge)), "in reads of {size}");
        }
    }
}
