//! Messages one after the other: where each ends, and what the end of the connection means (RFC 9112 §6.3, §8, §9.3).

use super::*;

fn assert_messages(section: &str, seen: (Vec<Message>, End), expected: &[(&str, &str)], end: End) {
    let bodies =
        |message: &Message| (message.start_line.clone(), String::from_utf8_lossy(&message.body).into_owned());
    let found: Vec<_> = seen.0.iter().map(bodies).collect();
    let expected: Vec<_> = expected.iter().map(|(line, body)| (line.to_string(), body.to_string())).collect();
    assert_eq!((found, seen.1), (expected, end), "{section}");
}

/// Checks the requests of a connection: their start lines and bodies.
fn requests(section: &str, sent: &str, expected: &[(&str, &str)], end: End) {
    assert_messages(section, read_alike(section, sent.as_bytes(), read_requests), expected, end);
}

/// Checks the responses to requests with a method.
fn responses(section: &str, method: Method, sent: &str, expected: &[(&str, &str)], end: End) {
    let seen = read_alike(section, sent.as_bytes(), |pieces| read_responses(&method, pieces));
    assert_messages(section, seen, expected, end);
}

cases! { requests:
    two_requests_at_once, "RFC 9112 §9.3.2", "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
        &[("GET /1 HTTP/1.1", ""), ("GET /2 HTTP/1.1", "")], End::Closed;
    a_line_end_between_requests, "RFC 9112 §2.2",
        "POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\nq=42\r\nGET / HTTP/1.1\r\n\r\n",
        &[("POST / HTTP/1.1", "q=42"), ("GET / HTTP/1.1", "")], End::Closed;
    line_ends_after_the_last_request, "RFC 9112 §2.2",
        "POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\nq=42\r\n\r\n", &[("POST / HTTP/1.1", "q=42")], End::Closed;
    nothing_but_line_ends, "RFC 9112 §2.2", "\r\n\r\n\r\n", &[], End::Closed;
    a_body_of_length_0_before_other_requests, "RFC 9112 §6.3 rule 6",
        concat!(
            "POST /0 HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
            "POST /1 HTTP/1.1\r\nContent-Length: 34\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nid: 2\r\n\r\n",
            "\r\n",
        ),
        &[("POST /0 HTTP/1.1", ""), ("POST /1 HTTP/1.1", "GET / HTTP/1.1\r\nHost: a\r\nid: 2\r\n\r\n")], End::Closed;
    a_body_on_get, "RFC 9110 §9.3.1",
        "GET /a HTTP/1.0\r\nconTENT-Length: 5\r\n\r\nHELLOGET /b HTTP/1.0\r\n\r\n",
        &[("GET /a HTTP/1.0", "HELLO"), ("GET /b HTTP/1.0", "")], End::Closed;
    a_chunked_body_on_delete, "RFC 9110 §9.3.5",
        "DELETE / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nZ\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        &[("DELETE / HTTP/1.1", "Z"), ("GET / HTTP/1.1", "")], End::Closed;
    chunked_wins_over_a_length, "RFC 9112 §6.3 rule 3",
        "POST / HTTP/1.1\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /g HTTP/1.1\r\n\r\n",
        &[("POST / HTTP/1.1", ""), ("GET /g HTTP/1.1", "")], End::Closed;
    a_length_wins_over_an_upgrade, "RFC 9110 §7.8",
        "PUT / HTTP/1.1\r\nConnection: upgrade\r\nContent-Length: 4\r\nUpgrade: ws\r\n\r\nabcdGET / HTTP/1.1\r\n\r\n",
        &[("PUT / HTTP/1.1", "abcd"), ("GET / HTTP/1.1", "")], End::Closed;
    http_1_0_has_no_body_by_close, "RFC 9112 §6.3 rule 7", "POST / HTTP/1.0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        &[("POST / HTTP/1.0", ""), ("GET / HTTP/1.1", "")], End::Closed;
    a_body_cut_short, "RFC 9112 §8", "PUT / HTTP/1.1\r\nContent-Length: 123\r\n\r\nPOST / HTTP/1.1\r\n\r\n",
        &[("PUT / HTTP/1.1", "")], End::Truncated;
    a_head_cut_short, "RFC 9112 §8", "GET / HTTP/1.1\r\nHost: a\r\n", &[], End::Truncated;
    a_second_head_cut_short, "RFC 9112 §8", "GET / HTTP/1.1\r\n\r\nGET", &[("GET / HTTP/1.1", "")], End::Truncated;
    an_invalid_request_after_a_valid_one, "RFC 9112 §2.2", "GET / HTTP/1.1\r\n\r\nInvalid\r\n\r\n",
        &[("GET / HTTP/1.1", "")], End::Head(HeadError::StartLine);
    the_preface_of_http_2_as_a_request, "RFC 9113 §3.4", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[],
        End::Head(HeadError::Version);
}

cases! { responses:
    status_100_before_404, "RFC 9110 §15.2", Method::GET,
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 14\r\n\r\n404: Not Found",
        &[("HTTP/1.1 100 Continue", ""), ("HTTP/1.1 404 Not Found", "404: Not Found")], End::Closed;
    several_interim_responses, "RFC 9110 §15.2", Method::GET,
        concat!(
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n",
            "HTTP/1.1 103 Early Hints\r\nLink: b\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
        ),
        &[
            ("HTTP/1.1 100 Continue", ""),
            ("HTTP/1.1 103 Early Hints", ""),
            ("HTTP/1.1 103 Early Hints", ""),
            ("HTTP/1.1 204 No Content", ""),
        ], End::Closed;
    status_204_before_another_response, "RFC 9112 §6.3 rule 1", Method::GET,
        "HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        &[("HTTP/1.1 204 No Content", ""), ("HTTP/1.1 200 OK", "ok")], End::Closed;
    status_304_with_a_length_before_another_response, "RFC 9112 §6.3 rule 1", Method::GET,
        "HTTP/1.1 304 Not Modified\r\nContent-Length: 10\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        &[("HTTP/1.1 304 Not Modified", ""), ("HTTP/1.1 200 OK", "hello")], End::Closed;
    status_304_with_chunked_before_another_response, "RFC 9112 §6.3 rule 1", Method::GET,
        concat!(
            "HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        ),
        &[("HTTP/1.1 304 Not Modified", ""), ("HTTP/1.1 200 OK", "hello")], End::Closed;
    responses_to_head, "RFC 9112 §6.3 rule 1", Method::HEAD,
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        &[("HTTP/1.1 200 OK", ""), ("HTTP/1.1 200 OK", "")], End::Closed;
    three_responses_at_once, "RFC 9112 §9.3.2", Method::GET,
        concat!(
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nAAA",
            "HTTP/1.1 201 Created\r\nContent-Length: 4\r\n\r\nBBBB",
            "HTTP/1.1 202 Accepted\r\nContent-Length: 5\r\n\r\nCCCC\n",
        ),
        &[("HTTP/1.1 200 OK", "AAA"), ("HTTP/1.1 201 Created", "BBBB"), ("HTTP/1.1 202 Accepted", "CCCC\n")],
        End::Closed;
    a_body_by_close, "RFC 9112 §6.3 rule 8", Method::GET, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello world",
        &[("HTTP/1.1 200 OK", "hello world")], End::Closed;
    a_body_by_close_may_look_like_a_response, "RFC 9112 §6.3 rule 8", Method::GET,
        "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\nHTTP/1.0 200 OK\r\n\r\n",
        &[("HTTP/1.0 200 OK", "HTTP/1.0 200 OK\r\n\r\n")], End::Closed;
    an_empty_body_by_close, "RFC 9112 §6.3 rule 8", Method::GET, "HTTP/1.1 404 Not Found\r\n\r\n",
        &[("HTTP/1.1 404 Not Found", "")], End::Closed;
    chunks_with_spaces_after_their_sizes, "RFC 9112 §7.1", Method::GET,
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5  \r\nhello\r\n1\r\n\n\r\n0  \r\n\r\n",
        &[("HTTP/1.1 200 OK", "hello\n")], End::Closed;
    a_response_with_a_body_cut_short, "RFC 9112 §8", Method::GET,
        "HTTP/1.1 200 OK\r\nContent-Length: 123\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", &[("HTTP/1.1 200 OK", "")],
        End::Truncated;
    a_chunked_response_cut_short, "RFC 9112 §8", Method::GET,
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nfoo\r\n", &[("HTTP/1.1 200 OK", "")],
        End::Truncated;
    a_response_head_cut_short, "RFC 9112 §8", Method::GET, "HTTP/1.1 200 OK\r\nA: b", &[], End::Truncated;
    more_than_the_length_is_not_its_body, "RFC 9112 §6.3", Method::GET,
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n2ad731e3-4dcd-4f70-b871", &[("HTTP/1.1 200 OK", "2ad73")],
        End::Head(HeadError::Version);
}
