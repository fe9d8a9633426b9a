//! Status lines (RFC 9112 §4).

use super::{HeadError::*, *};

/// Checks a status line.
fn line(section: &str, line: impl AsRef<[u8]>, expected: Result<&str, HeadError>) {
    let input = [line.as_ref(), b"\r\nContent-Length: 0\r\n\r\n"].concat();
    let parsed = response(section, &input, expected.map(drop));
    assert_eq!(parsed.map(|message| message.start_line).as_deref(), expected.ok(), "{section}");
}

cases! { line:
    a_status_line, "RFC 9112 §4", "HTTP/1.1 200 OK", Ok("HTTP/1.1 200 OK");
    a_status_line_of_http_1_0, "RFC 9112 §4", "HTTP/1.0 404 Not Found", Ok("HTTP/1.0 404 Not Found");
    an_empty_reason, "RFC 9112 §4", "HTTP/1.1 200 ", Ok("HTTP/1.1 200 ");
    no_space_before_an_absent_reason, "RFC 9112 §4", "HTTP/1.1 301", Ok("HTTP/1.1 301 ");
    a_reason_of_other_words, "RFC 9112 §4", "HTTP/1.1 301 MovedPermanently", Ok("HTTP/1.1 301 MovedPermanently");
    a_reason_that_begins_with_a_space, "RFC 9112 §4", "HTTP/1.1 200  OK", Ok("HTTP/1.1 200  OK");
    a_reason_that_ends_with_a_tab, "RFC 9112 §4", "HTTP/1.1 200 Fine\t", Ok("HTTP/1.1 200 Fine\t");
    a_reason_with_obs_text_is_dropped, "RFC 9112 §4", b"HTTP/1.1 500 Ori\xebntatieprobleem", Ok("HTTP/1.1 500 ");
    a_status_without_a_name, "RFC 9110 §15", "HTTP/1.1 299 Unnamed", Ok("HTTP/1.1 299 Unnamed");
    an_empty_line_before_a_response, "RFC 9112 §2.2", "\r\nHTTP/1.1 200 OK", Ok("HTTP/1.1 200 OK");
}

cases! { line:
    a_status_of_one_digit, "RFC 9112 §4", "HTTP/1.1 2 OK", Err(StartLine);
    a_status_of_two_digits, "RFC 9112 §4", "HTTP/1.1 20 OK", Err(StartLine);
    a_status_of_four_digits, "RFC 9112 §4", "HTTP/1.1 2000 OK", Err(StartLine);
    a_status_below_100, "RFC 9110 §15", "HTTP/1.1 099 OK", Err(StartLine);
    a_status_that_is_no_number, "RFC 9112 §4", "HTTP/1.1 abc OK", Err(StartLine);
    a_status_with_a_sign, "RFC 9112 §4", "HTTP/1.1 +20 OK", Err(StartLine);
    a_status_line_without_a_status, "RFC 9112 §4", "HTTP/1.1", Err(Version);
    two_numbers_for_a_status, "RFC 9112 §4", "HTTP/1.1 99 200 OK", Err(StartLine);
    two_spaces_before_the_status, "RFC 9112 §4", "HTTP/1.1  200 OK", Err(StartLine);
    a_tab_before_the_status, "RFC 9112 §4", "HTTP/1.1\t200 OK", Err(Version);
    a_bare_cr_before_the_reason, "RFC 9112 §2.2", "HTTP/1.1 200\rOK", Err(StartLine);
    a_bare_cr_after_the_reason, "RFC 9112 §2.2", "HTTP/1.1 200 OK\rContent-Length: 4", Err(StartLine);
    two_carriage_returns_after_the_reason, "RFC 9112 §2.2", "HTTP/1.1 200 OK\r\rContent-Length: 4", Err(StartLine);
    a_bare_cr_before_a_response, "RFC 9112 §2.2", "\rHTTP/1.1 200 OK", Err(StartLine);
    a_bare_lf_before_a_response, "RFC 9112 §2.2", "\nHTTP/1.1 200 OK", Err(LineEnd);
    a_bare_lf_after_the_reason, "RFC 9112 §2.2", "HTTP/1.1 200 OK\nX: y", Err(LineEnd);
    a_bare_lf_after_the_status, "RFC 9112 §2.2", "HTTP/1.1 200\nX: y", Err(LineEnd);
    nul_in_a_reason, "RFC 9112 §4", "HTTP/1.1 200 \0", Err(StartLine);
    an_escape_in_a_reason, "RFC 9112 §4", "HTTP/1.1 200 \x1b[2J", Err(StartLine);
    a_response_of_another_protocol, "RFC 9112 §2.3", "RTSP/1.1 200 OK", Err(Version);
    a_response_of_ice, "RFC 9112 §2.3", "ICE/1.1 200 OK", Err(Version);
    a_response_with_a_letter_missing, "RFC 9112 §2.3", "HTP/1.1 200 OK", Err(Version);
    a_response_with_a_letter_too_many, "RFC 9112 §2.3", "HTTPER/1.1 200 OK", Err(Version);
    a_response_in_lower_case, "RFC 9112 §2.3", "http/1.1 200 OK", Err(Version);
    a_response_of_http_0_9, "RFC 9112 §2.3", "HTTP/0.9 200 OK", Err(Version);
    a_response_with_a_zero_before_the_major, "RFC 9112 §2.3", "HTTP/01.1 200 OK", Err(Version);
    a_response_with_a_zero_before_the_minor, "RFC 9112 §2.3", "HTTP/1.01 200 OK", Err(Version);
    a_response_of_version_5_6, "RFC 9112 §2.3", "HTTP/5.6 200 OK", Err(Version);
    a_response_of_version_2_0, "RFC 9112 §2.3", "HTTP/2.0 200 OK", Err(Version);
    a_request_where_a_response_is_expected, "RFC 9112 §2.1", "GET / HTTP/1.1", Err(Version);
}
