//! How the end of a body is determined (RFC 9112 §6, RFC 9110 §8.6).
//!
//! [`Framing`] has the rules that requests and responses share. The proxy refuses more: a Content-Length that is a
//! list, a transfer coding that is not `chunked` alone; see `proxy::connection::http1::conformance_tests`.

use super::{
    Framing::{Chunked, Length, UntilClose},
    FramingError as E, *,
};

const EMPTY: Result<Framing, E> = Ok(Framing::EMPTY);

/// Checks the framing of a message of which nothing but the head arrives.
fn check(
    section: &str,
    head: &[u8],
    expected: Result<Framing, E>,
    read: impl Fn(Pieces<'_>) -> (Vec<Message>, End),
) {
    let (messages, end) = read_alike(section, head, read);
    match expected {
        Ok(framing) => {
            assert_eq!(messages.len(), 1, "{section}: {}: {end:?}", head.escape_ascii());
            assert_eq!(messages[0].framing, framing, "{section}: {}", head.escape_ascii());
            let complete = matches!(framing, Framing::EMPTY | UntilClose);
            assert_eq!(end, if complete { End::Closed } else { End::Truncated }, "{section}");
        }
        Err(error) => {
            assert_eq!((messages, end), (vec![], End::Framing(error)), "{section}: {}", head.escape_ascii());
        }
    }
}

fn of_request(section: &str, fields: impl AsRef<[u8]>, expected: Result<Framing, E>) {
    let head = [b"POST / HTTP/1.1\r\nHost: a\r\n", fields.as_ref(), b"\r\n"].concat();
    check(section, &head, expected, read_requests);
}

fn of_http10_request(section: &str, fields: &str, expected: Result<Framing, E>) {
    let head = format!("POST / HTTP/1.0\r\nHost: a\r\n{fields}\r\n");
    check(section, head.as_bytes(), expected, read_requests);
}

/// `start`: method of the request, status line.
fn of_response(section: &str, start: &str, fields: &str, expected: Result<Framing, E>) {
    let (method, line) = start.split_once(' ').unwrap();
    let method = Method::from_bytes(method.as_bytes()).unwrap();
    let head = format!("{line}\r\n{fields}\r\n");
    check(section, head.as_bytes(), expected, |pieces| read_responses(&method, pieces));
}

// Content-Length of requests.
cases! { of_request:
    no_length_is_no_body, "RFC 9112 §6.3 rule 7", "", EMPTY;
    length_0_is_no_body, "RFC 9112 §6.3 rule 6", "Content-Length: 0\r\n", EMPTY;
    a_length, "RFC 9112 §6.2", "Content-Length: 3495\r\n", Ok(Length(3495));
    a_length_in_odd_case, "RFC 9110 §5.1", "conTENT-Length: 5\r\n", Ok(Length(5));
    a_length_between_spaces, "RFC 9110 §5.5", "Content-Length:  42 \r\n", Ok(Length(42));
    a_length_between_tabs, "RFC 9110 §5.5", "Content-Length:\t42\t \r\n", Ok(Length(42));
    a_length_with_zeros_is_decimal, "RFC 9110 §8.6", "Content-Length: 010\r\n", Ok(Length(10));
    the_largest_length, "RFC 9110 §8.6", "Content-Length: 18446744073709551615\r\n", Ok(Length(u64::MAX));
    two_equal_lengths, "RFC 9110 §8.6", "Content-Length: 42\r\nContent-Length: 42\r\n", Ok(Length(42));
    a_list_of_equal_lengths, "RFC 9110 §8.6", "Content-Length: 42, 42\r\n", Ok(Length(42));
    two_lengths_that_differ, "RFC 9112 §6.3 rule 5", "Content-Length: 1\r\nContent-Length: 0\r\n", Err(E::Length);
    two_lengths_that_differ_larger_last, "RFC 9112 §6.3 rule 5", "Content-Length: 0\r\nContent-Length: 31\r\n",
        Err(E::Length);
    two_lengths_of_equal_value_and_other_digits, "RFC 9110 §8.6", "Content-Length: 5\r\nContent-Length: 05\r\n",
        Ok(Length(5));
    a_list_of_lengths_that_differ, "RFC 9112 §6.3 rule 5", "Content-Length: 5, 6\r\n", Err(E::Length);
    an_empty_length, "RFC 9110 §8.6", "Content-Length:\r\n", Err(E::Length);
    an_empty_length_before_a_length, "RFC 9110 §8.6", "Content-Length: \r\nContent-Length: 43\r\n", Err(E::Length);
    an_empty_length_after_a_length, "RFC 9110 §8.6", "Content-Length: 43\r\nContent-Length: \r\n", Err(E::Length);
    a_length_that_overflows, "RFC 9110 §8.6", "Content-Length: 1000000000000000000000\r\n", Err(E::Length);
    a_length_one_above_64_bits, "RFC 9110 §8.6", "Content-Length: 18446744073709551616\r\n", Err(E::Length);
    two_numbers_in_a_length, "RFC 9110 §8.6", "Content-Length: 13 37\r\n", Err(E::Length);
    a_length_with_a_letter, "RFC 9110 §8.6", "Content-Length: 1Z\r\n", Err(E::Length);
    a_length_with_plus, "RFC 9110 §8.6", "Content-Length: +10\r\n", Err(E::Length);
    a_length_with_minus, "RFC 9110 §8.6", "Content-Length: -48\r\n", Err(E::Length);
    a_length_with_an_underscore, "RFC 9110 §8.6", "Content-Length: +1_0\r\n", Err(E::Length);
    a_length_in_hex, "RFC 9110 §8.6", "Content-Length: 0x10\r\n", Err(E::Length);
    a_length_with_a_fraction, "RFC 9110 §8.6", "Content-Length: 5.0\r\n", Err(E::Length);
    a_length_with_an_exponent, "RFC 9110 §8.6", "Content-Length: 5e0\r\n", Err(E::Length);
    a_length_after_a_comma, "RFC 9110 §8.6", "Content-Length: ,5\r\n", Err(E::Length);
    a_length_before_a_comma, "RFC 9110 §8.6", "Content-Length: 5,\r\n", Err(E::Length);
    a_length_in_quotes, "RFC 9110 §8.6", "Content-Length: \"5\"\r\n", Err(E::Length);
    a_length_of_wide_digits, "RFC 9110 §8.6", "Content-Length: \u{ff15}\r\n", Err(E::Length);
    a_length_after_a_no_break_space, "RFC 9110 §5.6.3", b"Content-Length: \xa05\r\n", Err(E::Length);
    a_name_longer_than_content_length, "RFC 9110 §5.1", "Content-Length-X: 5\r\n", EMPTY;
    an_underscore_makes_another_field, "RFC 9110 §5.1", "Content_Length: 5\r\n", EMPTY;
}

// Transfer-Encoding of requests.
cases! { of_request:
    chunked, "RFC 9112 §6.1", "Transfer-Encoding: chunked\r\n", Ok(Chunked);
    chunked_in_other_case, "RFC 9112 §7", "TRANSFER-ENCODING: cHuNkeD\r\n", Ok(Chunked);
    chunked_between_tabs, "RFC 9110 §5.5", "Transfer-Encoding:\tchunked\t\r\n", Ok(Chunked);
    gzip_then_chunked, "RFC 9112 §6.1", "Transfer-Encoding: gzip, chunked\r\n", Ok(Chunked);
    gzip_then_chunked_in_two_fields, "RFC 9112 §6.1", "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
        Ok(Chunked);
    chunked_overrides_a_length, "RFC 9112 §6.3 rule 3", "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        Ok(Chunked);
    chunked_overrides_a_length_that_follows, "RFC 9112 §6.3 rule 3",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", Ok(Chunked);
    gzip_alone, "RFC 9112 §6.3 rule 4", "Transfer-Encoding: gzip\r\n", Err(E::TransferEncoding);
    an_unknown_coding, "RFC 9112 §6.3 rule 4", "Transfer-Encoding: pigeons\r\n", Err(E::TransferEncoding);
    identity, "RFC 9112 §6.3 rule 4", "Transfer-Encoding: identity\r\nContent-Length: 1\r\n", Err(E::TransferEncoding);
    chunked_then_deflate, "RFC 9112 §6.3 rule 4", "Transfer-Encoding: chunked, deflate\r\n", Err(E::TransferEncoding);
    chunked_then_deflate_in_two_fields, "RFC 9112 §6.3 rule 4",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: deflate\r\n", Err(E::TransferEncoding);
    chunked_between_identities, "RFC 9112 §6.3 rule 4", "Transfer-Encoding: identity, chunked, identity\r\n",
        Err(E::TransferEncoding);
    chunked_then_an_empty_field, "RFC 9112 §6.3 rule 4", "Transfer-Encoding: chunked\r\nTransfer-Encoding:\r\n",
        Err(E::TransferEncoding);
    an_empty_coding, "RFC 9112 §6.3 rule 4", "Transfer-Encoding:\r\n", Err(E::TransferEncoding);
    empty_codings_beside_a_length, "RFC 9112 §6.3 rule 4",
        "Content-Length: 10\r\nTransfer-Encoding:\r\nTransfer-Encoding:\r\n", Err(E::TransferEncoding);
    chunked_before_a_comma, "RFC 9110 §5.6.1", "Transfer-Encoding: chunked,\r\n", Err(E::TransferEncoding);
    chunked_twice_in_one_word, "RFC 9112 §6.3 rule 4", "Transfer-Encoding: chunkedchunked\r\n",
        Err(E::TransferEncoding);
    chunked_with_a_letter_before_it, "RFC 9112 §6.3 rule 4", "Transfer-Encoding: xchunked\r\n",
        Err(E::TransferEncoding);
    chunked_with_letters_missing, "RFC 9112 §6.3 rule 4", "Transfer-Encoding: chunk\r\n", Err(E::TransferEncoding);
    chunked_in_quotes, "RFC 9112 §7", "Transfer-Encoding: \"chunked\"\r\n", Err(E::TransferEncoding);
    chunked_in_apostrophes, "RFC 9112 §7", "Transfer-Encoding: 'chunked'\r\n", Err(E::TransferEncoding);
    chunked_with_a_parameter, "RFC 9112 §7", "Transfer-Encoding: chunked;q=1\r\n", Err(E::TransferEncoding);
    chunked_among_words, "RFC 9112 §7", "Transfer-Encoding: identity chunked bar\r\n", Err(E::TransferEncoding);
    chunked_as_an_encoded_word, "RFC 9112 §7", "Transfer-Encoding: =?UTF-8?B?Y2h1bmtlZA==?=\r\n",
        Err(E::TransferEncoding);
    chunked_with_an_accent, "RFC 9112 §7", b"Transfer-Encoding: ch\x96nked\r\n", Err(E::TransferEncoding);
    chunked_between_no_break_spaces, "RFC 9110 §5.6.3", b"Transfer-Encoding: \xa0chunked\xa0\r\n",
        Err(E::TransferEncoding);
    content_encoding_is_no_transfer_encoding, "RFC 9110 §8.4", "Content-Encoding: chunked\r\n", EMPTY;
    te_is_no_transfer_encoding, "RFC 9110 §10.1.4", "TE: chunked\r\n", EMPTY;
}

// HTTP/1.0 has no transfer codings: framing with one is faulty, even with a length (§6.1).
cases! { of_http10_request:
    http_1_0_without_a_length_has_no_body, "RFC 9112 §6.3 rule 7", "", EMPTY;
    http_1_0_with_a_length, "RFC 9112 §6.3 rule 6", "Content-Length: 10\r\n", Ok(Length(10));
    http_1_0_with_chunked, "RFC 9112 §6.1", "Transfer-Encoding: chunked\r\n", Err(E::TransferEncodingInHttp10);
    http_1_0_with_chunked_and_a_length, "RFC 9112 §6.1", "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        Err(E::TransferEncodingInHttp10);
    http_1_0_with_another_coding, "RFC 9112 §6.1", "Transfer-Encoding: identity\r\n",
        Err(E::TransferEncodingInHttp10);
}

// Responses.
cases! { of_response:
    a_response_to_head_with_a_length, "RFC 9112 §6.3 rule 1", "HEAD HTTP/1.1 200 OK", "Content-Length: 8\r\n", EMPTY;
    a_response_to_head_with_chunked, "RFC 9112 §6.3 rule 1", "HEAD HTTP/1.1 200 OK", "Transfer-Encoding: chunked\r\n",
        EMPTY;
    a_response_to_head_without_a_length, "RFC 9112 §6.3 rule 1", "HEAD HTTP/1.1 200 OK", "", EMPTY;
    an_error_to_head, "RFC 9112 §6.3 rule 1", "HEAD HTTP/1.1 404 Not Found", "Content-Length: 8\r\n", EMPTY;
    head_in_lower_case_is_another_method, "RFC 9110 §9.1", "head HTTP/1.1 200 OK", "Content-Length: 8\r\n",
        Ok(Length(8));
    status_100, "RFC 9112 §6.3 rule 1", "GET HTTP/1.1 100 Continue", "Content-Length: 8\r\n", EMPTY;
    status_101_with_a_length, "RFC 9112 §6.3 rule 1", "GET HTTP/1.1 101 Switching Protocols", "Content-Length: 4\r\n",
        EMPTY;
    status_101_with_chunked, "RFC 9112 §6.3 rule 1", "GET HTTP/1.1 101 Switching Protocols",
        "Transfer-Encoding: chunked\r\n", EMPTY;
    status_103, "RFC 9112 §6.3 rule 1", "GET HTTP/1.1 103 Early Hints", "Transfer-Encoding: chunked\r\n", EMPTY;
    status_199, "RFC 9112 §6.3 rule 1", "GET HTTP/1.1 199 Unknown", "", EMPTY;
    status_204, "RFC 9112 §6.3 rule 1", "GET HTTP/1.1 204 No Content", "Content-Length: 8\r\n", EMPTY;
    status_204_with_chunked, "RFC 9112 §6.3 rule 1", "GET HTTP/1.1 204 No Content", "Transfer-Encoding: chunked\r\n",
        EMPTY;
    status_304_with_a_length, "RFC 9112 §6.3 rule 1", "GET HTTP/1.1 304 Not Modified", "Content-Length: 10\r\n", EMPTY;
    status_304_with_chunked, "RFC 9112 §6.3 rule 1", "GET HTTP/1.1 304 Not Modified", "Transfer-Encoding: chunked\r\n",
        EMPTY;
    status_205_has_a_body_if_it_says_so, "RFC 9110 §15.3.6", "GET HTTP/1.1 205 Reset Content", "Content-Length: 1\r\n",
        Ok(Length(1));
    a_response_with_chunked, "RFC 9112 §6.3 rule 4", "GET HTTP/1.1 200 OK", "Transfer-Encoding: chunked\r\n",
        Ok(Chunked);
    a_response_with_gzip_then_chunked, "RFC 9112 §6.3 rule 4", "GET HTTP/1.1 200 OK",
        "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", Ok(Chunked);
    a_response_with_gzip_alone_ends_by_close, "RFC 9112 §6.3 rule 4", "GET HTTP/1.1 200 OK",
        "Transfer-Encoding: gzip\r\n", Ok(UntilClose);
    a_response_with_chunked_then_identity_ends_by_close, "RFC 9112 §6.3 rule 4", "GET HTTP/1.1 200 OK",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", Ok(UntilClose);
    a_coding_other_than_chunked_overrides_a_length, "RFC 9112 §6.3 rule 3", "GET HTTP/1.1 200 OK",
        "Transfer-Encoding: identity\r\nContent-Length: 5\r\n", Ok(UntilClose);
    a_response_with_chunked_and_a_length, "RFC 9112 §6.3 rule 3", "GET HTTP/1.1 200 OK",
        "Content-Length: 10\r\nTransfer-Encoding: chunked\r\n", Ok(Chunked);
    a_response_whose_length_has_another_name, "RFC 9110 §5.1", "GET HTTP/1.1 200 OK",
        "Content-Length-X: 0\r\nTransfer-Encoding: chunked\r\n", Ok(Chunked);
    a_response_with_a_space_before_the_colon_of_its_length, "RFC 9112 §5.1", "GET HTTP/1.1 200 OK",
        "Content-Length : 5\r\n", Ok(Length(5));
    a_response_with_a_space_before_the_colon_of_its_coding, "RFC 9112 §5.1", "GET HTTP/1.1 200 OK",
        "Transfer-Encoding : chunked\r\nContent-Length: 5\r\n", Ok(Chunked);
    a_response_with_equal_lengths, "RFC 9110 §8.6", "GET HTTP/1.1 200 OK",
        "Content-Length: 8\r\nContent-Length: 8\r\n", Ok(Length(8));
    a_response_with_lengths_that_differ, "RFC 9112 §6.3 rule 5", "GET HTTP/1.1 200 OK",
        "Content-Length: 8\r\nContent-Length: 9\r\n", Err(E::Length);
    a_response_with_a_length_with_plus, "RFC 9112 §6.3 rule 5", "GET HTTP/1.1 200 OK", "Content-Length: +8\r\n",
        Err(E::Length);
    a_response_with_an_empty_length, "RFC 9112 §6.3 rule 5", "GET HTTP/1.1 200 OK", "Content-Length:\r\n",
        Err(E::Length);
    a_response_to_head_with_an_invalid_length, "RFC 9110 §8.6", "HEAD HTTP/1.1 200 OK", "Content-Length: 5 GET\r\n",
        Err(E::Length);
    a_response_without_a_length_ends_by_close, "RFC 9112 §6.3 rule 8", "GET HTTP/1.1 200 OK", "", Ok(UntilClose);
    a_response_of_http_1_0_without_a_length, "RFC 9112 §6.3 rule 8", "GET HTTP/1.0 200 OK",
        "Connection: keep-alive\r\n", Ok(UntilClose);
    a_response_of_http_1_0_with_chunked, "RFC 9112 §6.1", "GET HTTP/1.0 200 OK", "Transfer-Encoding: chunked\r\n",
        Err(E::TransferEncodingInHttp10);
    a_refused_connect_has_a_body, "RFC 9112 §6.3 rule 2", "CONNECT HTTP/1.1 400 Bad Request", "", Ok(UntilClose);
}
