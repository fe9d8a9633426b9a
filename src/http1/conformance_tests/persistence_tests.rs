//! Whether a connection persists after a message (RFC 9112 §9.3).

use super::*;

/// Checks a request and a response with these fields.
fn persists(section: &str, version: &str, fields: &str, expected: bool) {
    let sent = format!("GET / {version}\r\n{fields}\r\n");
    let message = request(section, sent.as_bytes(), Ok(())).unwrap();
    assert_eq!(message.persists, expected, "{section}: {sent:?}");
    let sent = format!("{version} 200 OK\r\n{fields}\r\n");
    let message = response(section, sent.as_bytes(), Ok(())).unwrap();
    assert_eq!(message.persists, expected, "{section}: {sent:?}");
}

cases! { persists:
    http_1_1_persists, "RFC 9112 §9.3", "HTTP/1.1", "", true;
    http_1_1_with_close, "RFC 9112 §9.6", "HTTP/1.1", "Connection: close\r\n", false;
    http_1_1_with_close_in_capitals, "RFC 9110 §7.6.1", "HTTP/1.1", "CONNECTION: CLOSE\r\n", false;
    http_1_1_with_close_and_a_tab, "RFC 9110 §5.5", "HTTP/1.1", "Connection: close\t\r\n", false;
    http_1_1_with_keep_alive, "RFC 9112 §9.3", "HTTP/1.1", "Connection: keep-alive\r\n", true;
    http_1_0_does_not_persist, "RFC 9112 §9.3", "HTTP/1.0", "", false;
    http_1_0_with_keep_alive, "RFC 9112 §9.3", "HTTP/1.0", "Connection: Keep-Alive\r\n", true;
    http_1_0_with_close, "RFC 9112 §9.3", "HTTP/1.0", "Connection: close\r\n", false;
    http_1_0_with_keep_alive_and_close, "RFC 9112 §9.3", "HTTP/1.0", "Connection: keep-alive, close\r\n", false;
    close_wins_over_keep_alive, "RFC 9112 §9.3", "HTTP/1.1", "Connection: close\r\nConnection: keep-alive\r\n", false;
    close_wins_in_the_second_field, "RFC 9112 §9.3", "HTTP/1.1", "Connection: keep-alive\r\nConnection: close\r\n",
        false;
    close_first_in_a_list, "RFC 9110 §7.6.1", "HTTP/1.1", "Connection: close, token, upgrade, token, keep-alive\r\n",
        false;
    close_last_in_a_list, "RFC 9110 §7.6.1", "HTTP/1.1", "Connection: upgrade , close\r\n", false;
    close_among_empty_members, "RFC 9110 §5.6.1", "HTTP/1.1", "Connection: , ,close,,\r\n", false;
    close_in_the_third_field, "RFC 9110 §5.3", "HTTP/1.1", "Connection: te\r\nConnection: x\r\nConnection: close\r\n",
        false;
    keep_alive_in_a_list, "RFC 9110 §7.6.1", "HTTP/1.0", "Connection: te, keep-alive\r\n", true;
    an_option_that_begins_like_close, "RFC 9110 §7.6.1", "HTTP/1.1", "Connection: closed\r\n", true;
    an_option_that_ends_like_close, "RFC 9110 §7.6.1", "HTTP/1.1", "Connection: xclose\r\n", true;
    an_option_in_quotes, "RFC 9110 §7.6.1", "HTTP/1.1", "Connection: \"close\"\r\n", true;
    an_empty_option, "RFC 9110 §7.6.1", "HTTP/1.1", "Connection:\r\n", true;
    the_keep_alive_field_is_no_option, "RFC 9112 §C.2.2", "HTTP/1.0", "Keep-Alive: timeout=5\r\n", false;
    proxy_connection_is_no_option, "RFC 9112 §C.2.2", "HTTP/1.1", "Proxy-Connection: close\r\n", true;
    proxy_connection_keeps_nothing_alive, "RFC 9112 §C.2.2", "HTTP/1.0", "Proxy-Connection: keep-alive\r\n", false;
}

#[test]
fn a_carriage_return_is_not_a_hyphen() {
    let sent = "GET / HTTP/1.0\r\nConnection: keep\ralive\r\n\r\n";
    request("RFC 9112 §2.2", sent.as_bytes(), Err(HeadError::Field));
}

/// RFC 9112 §5.1: whitespace before a colon is removed from a response, so its option counts.
#[test]
fn an_option_counts_with_a_space_before_its_colon() {
    let sent = "HTTP/1.1 200 OK\r\nConnection : close\r\n\r\n";
    assert!(!response("RFC 9112 §5.1", sent.as_bytes(), Ok(())).unwrap().persists);
}
