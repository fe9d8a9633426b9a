//! Request lines and request targets (RFC 9112 §2.2, §2.3, §3).

use super::{HeadError::*, *};

/// Checks a request line, with empty lines before it.
fn line(section: &str, line: impl AsRef<[u8]>, expected: Result<&str, HeadError>) {
    let input = [line.as_ref(), b"\r\nHost: a\r\n\r\n"].concat();
    let parsed = request(section, &input, expected.map(drop));
    assert_eq!(parsed.map(|message| message.start_line).as_deref(), expected.ok(), "{section}");
}

// The four forms of a target, and methods.
cases! { line:
    origin_form, "RFC 9112 §3.2.1", "GET /where?q=now HTTP/1.1", Ok("GET /where?q=now HTTP/1.1");
    absolute_form, "RFC 9112 §3.2.2", "GET http://www.example.org/pub/WWW/TheProject.html HTTP/1.1",
        Ok("GET http://www.example.org/pub/WWW/TheProject.html HTTP/1.1");
    absolute_form_with_a_query_after_the_host, "RFC 9112 §3.2.2", "GET http://hypnotoad.org:1234?hail=all HTTP/1.1",
        Ok("GET http://hypnotoad.org:1234/?hail=all HTTP/1.1");
    absolute_form_that_ends_with_the_port, "RFC 9112 §3.2.2", "GET http://hypnotoad.org:1234 HTTP/1.1",
        Ok("GET http://hypnotoad.org:1234/ HTTP/1.1");
    authority_form, "RFC 9112 §3.2.3", "CONNECT www.example.com:80 HTTP/1.1",
        Ok("CONNECT www.example.com:80 HTTP/1.1");
    authority_form_with_an_underscore, "RFC 9112 §3.2.3", "CONNECT home_0.netscape.com:443 HTTP/1.0",
        Ok("CONNECT home_0.netscape.com:443 HTTP/1.0");
    asterisk_form, "RFC 9112 §3.2.4", "OPTIONS * HTTP/1.1", Ok("OPTIONS * HTTP/1.1");
    a_second_question_mark_is_part_of_the_query, "RFC 9112 §3.2.1", "GET /test.cgi?foo=bar?baz HTTP/1.1",
        Ok("GET /test.cgi?foo=bar?baz HTTP/1.1");
    a_path_of_slashes_is_no_authority, "RFC 9112 §3.2.1", "GET ///////bar.com/ HTTP/1.1",
        Ok("GET ///////bar.com/ HTTP/1.1");
    a_path_may_look_like_userinfo, "RFC 9112 §3.2.1", "GET //@ HTTP/1.1", Ok("GET //@ HTTP/1.1");
    a_path_may_look_like_a_port, "RFC 9112 §3.2.1", "GET /foo/:@c:29 HTTP/1.1", Ok("GET /foo/:@c:29 HTTP/1.1");
    percent_encoding_is_kept, "RFC 9110 §7.7", "GET /a%2fc/%20?%00 HTTP/1.1", Ok("GET /a%2fc/%20?%00 HTTP/1.1");
    dot_segments_are_kept, "RFC 9110 §7.7", "GET /a/../b/./c HTTP/1.1", Ok("GET /a/../b/./c HTTP/1.1");
    methods_are_case_sensitive, "RFC 9110 §9.1", "get / HTTP/1.1", Ok("get / HTTP/1.1");
    a_method_may_have_a_hyphen, "RFC 9112 §3.1", "M-SEARCH / HTTP/1.1", Ok("M-SEARCH / HTTP/1.1");
    a_method_is_any_token, "RFC 9110 §5.6.2", "!#$%&'*+-.^_`|~09azAZ / HTTP/1.1",
        Ok("!#$%&'*+-.^_`|~09azAZ / HTTP/1.1");
    a_method_that_begins_like_a_version, "RFC 9112 §3.1", "HEAD /url HTTP/1.1", Ok("HEAD /url HTTP/1.1");
    http_1_0, "RFC 9112 §2.3", "GET / HTTP/1.0", Ok("GET / HTTP/1.0");
}

// Methods that are no token.
cases! { line:
    an_empty_method, "RFC 9112 §3.1", " / HTTP/1.1", Err(StartLine);
    a_method_with_parentheses, "RFC 9110 §5.6.2", "P()ST / HTTP/1.1", Err(StartLine);
    a_method_with_delimiters, "RFC 9110 §5.6.2", "G=\":<>(e),[T];?\" /get HTTP/1.1", Err(StartLine);
    a_method_that_is_nul, "RFC 9112 §3.1", "\0 / HTTP/1.1", Err(StartLine);
    a_method_above_ascii, "RFC 9112 §3.1", b"G\xcbT / HTTP/1.1", Err(StartLine);
    a_byte_order_mark_before_the_method, "RFC 9112 §3.1", "\u{feff}GET / HTTP/1.1", Err(StartLine);
    a_response_where_a_request_is_expected, "RFC 9112 §2.1", "HTTP/1.1 200 OK", Err(StartLine);
}

// The spaces between the parts. A recipient may split at any whitespace (§3), which two recipients do differently.
cases! { line:
    a_space_before_the_method, "RFC 9112 §3", " GET / HTTP/1.1", Err(SpaceInTarget);
    two_spaces_after_the_method, "RFC 9112 §3", "GET  / HTTP/1.1", Err(SpaceInTarget);
    two_spaces_before_the_version, "RFC 9112 §3", "GET /  HTTP/1.1", Err(SpaceInTarget);
    a_space_after_the_version, "RFC 9112 §3", "GET / HTTP/1.1 ", Err(StartLine);
    tabs_between_the_parts, "RFC 9112 §3", "GET\t/\tHTTP/1.1", Err(StartLine);
    carriage_returns_between_the_parts, "RFC 9112 §3", "GET\r/\rHTTP/1.1", Err(StartLine);
    a_tab_before_the_version, "RFC 9112 §3", "GET /\tHTTP/1.1", Err(TargetByte(b'\t'));
    a_line_feed_before_the_version, "RFC 9112 §3", "GET /\nHTTP/1.1", Err(StartLine);
    a_line_feed_after_the_method, "RFC 9112 §3", "GET\n/ HTTP/1.1", Err(StartLine);
    a_vertical_tab_in_the_target, "RFC 9112 §3.2", "GET /a\x0bb HTTP/1.1", Err(TargetByte(0x0b));
    an_escape_in_the_target, "RFC 9112 §3.2", "GET /a\x1b[2J HTTP/1.1", Err(TargetByte(0x1b));
    an_empty_target, "RFC 9112 §3.2", "GET  HTTP/1.1", Err(StartLine);
    a_line_without_a_version, "RFC 9112 §3", "GET /", Err(StartLine);
    a_method_alone, "RFC 9112 §3", "GET", Err(StartLine);
    a_fragment_in_a_target, "RFC 9112 §3.2", "GET /forums/1/topics/2375?page=1#posts-17408 HTTP/1.1", Err(Fragment);
    a_fragment_after_an_authority, "RFC 9112 §3.2", "GET http://a#b HTTP/1.1", Err(Fragment);
}

// Versions. A higher minor version may be read as 1.1 (§2.3), which no client needs.
cases! { line:
    a_version_in_lower_case, "RFC 9112 §2.3", "GET / http/1.1", Err(Version);
    version_0_9, "RFC 9112 §2.3", "GET / HTTP/0.9", Err(Version);
    version_1_2, "RFC 9112 §2.3", "GET / HTTP/1.2", Err(Version);
    version_1_32, "RFC 9112 §2.3", "GET /test HTTP/1.32", Err(Version);
    version_1_10, "RFC 9112 §2.3", "GET / HTTP/1.10", Err(StartLine);
    version_11_1, "RFC 9112 §2.3", "GET / HTTP/11.1", Err(Version);
    version_01_1, "RFC 9112 §2.3", "GET / HTTP/01.1", Err(Version);
    version_5_6, "RFC 9112 §2.3", "GET / HTTP/5.6", Err(Version);
    a_version_that_overflows, "RFC 9112 §2.3", "GET / HTTP/4294967295.255", Err(Version);
    a_version_without_a_minor, "RFC 9112 §2.3", "GET / HTTP/1", Err(Version);
    a_version_with_carriage_returns, "RFC 9112 §2.3", "GET / HTTP/\r\r1.1", Err(Version);
    a_version_of_ice, "RFC 9112 §2.3", "GET /music/sweet/music ICE/1.0", Err(Version);
    a_version_of_rtsp, "RFC 9112 §2.3", "OPTIONS /music/sweet/music RTSP/1.0", Err(Version);
    a_version_with_a_letter_before_it, "RFC 9112 §2.3", "GET / IHTTP/1.0", Err(Version);
}

// What may precede a request line.
cases! { line:
    an_empty_line_before_a_request, "RFC 9112 §2.2", "\r\nGET / HTTP/1.1", Ok("GET / HTTP/1.1");
    several_empty_lines_before_a_request, "RFC 9112 §2.2", "\r\n\r\n\r\nGET / HTTP/1.1", Ok("GET / HTTP/1.1");
    a_bare_lf_before_a_request, "RFC 9112 §2.2", "\nGET / HTTP/1.1", Err(LineEnd);
    a_bare_lf_after_an_empty_line, "RFC 9112 §2.2", "\r\n\nGET / HTTP/1.1", Err(LineEnd);
    a_bare_cr_before_a_request, "RFC 9112 §2.2", "\rGET / HTTP/1.1", Err(StartLine);
    a_line_of_whitespace_before_a_request, "RFC 9112 §2.2", " \r\nGET / HTTP/1.1", Err(StartLine);
}

/// RFC 9112 §3: about the length of a line that every recipient should support.
#[test]
fn a_request_line_of_8000_octets_is_accepted() {
    let sent = format!("GET /{} HTTP/1.1", "a".repeat(7986));
    assert_eq!(sent.len(), 8000);
    line("RFC 9112 §3", &sent, Ok(&sent));
}

/// RFC 9112 §3.2: no whitespace and no control byte in a target, in any form of it.
#[test]
fn no_control_byte_is_accepted_in_a_target() {
    for byte in (0..=b' ').chain([0x7f]) {
        for form in ["/a?b", "http://a/b?c", "a:80", "*"] {
            for at in 0..=form.len() {
                let (start, end) = form.as_bytes().split_at(at);
                let sent = [b"GET ", start, &[byte], end, b" HTTP/1.1\r\nHost: a\r\n\r\n"].concat();
                let parsed = parse_request(&sent, false);
                assert!(parsed.is_err(), "{}: {parsed:?}", sent.escape_ascii());
            }
        }
    }
}
