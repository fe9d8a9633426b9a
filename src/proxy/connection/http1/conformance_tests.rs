//! What the proxy accepts and refuses on a client's connection, and what becomes of the connection, by RFC 9112 and
//! RFC 9110. The layers below have cases of their own in `http1::conformance_tests`, which also names the corpora.
//!
//! Each input is delivered whole, byte by byte, and split at each position. The upstreams `fast` and `slow` answer 503
//! without an endpoint, so a 503 means that a request was accepted; `slow` waits until its body has arrived.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response};
use tokio::io::{AsyncWriteExt, duplex};

use super::{
    super::Connection,
    response_head::{RequestInfo, write_head},
    tests::{CONFIG, Client},
};
use crate::{
    config::{Source, Sources, load_sources},
    http1::head::{parse_request, parse_response},
    model::Side,
    proxy::{body::ResponseBody, worker::Worker},
    runtime::{self, Proxy},
};

/// What becomes of the connection after the last response.
#[derive(Clone, Copy, Debug, PartialEq)]
enum After {
    Open,
    Closed,
}
use After::{Closed, Open};

/// Sends the bytes of a client, in each delivery on a connection of its own. Checks the statuses of the responses, and
/// that the connection serves another request or has closed.
async fn exchange(section: &str, sent: &str, statuses: &[u16], after: After) {
    let source = Source { path: PathBuf::from("test.toml"), text: CONFIG.to_owned() };
    let loaded = load_sources(Sources(vec![source]), &|_| None).unwrap();
    let proxy: Proxy = runtime::start(loaded.config, Arc::default(), 1).unwrap();
    let worker = Worker::new(Arc::clone(&proxy.shared), 0);
    let address: SocketAddr = "192.0.2.1:1000".parse().unwrap();
    let bytes: Vec<&str> = (0..sent.len()).map(|at| &sent[at..=at]).collect();
    let halves = (1..sent.len()).map(|at| vec![&sent[..at], &sent[at..]]);
    for pieces in [vec![sent], bytes].into_iter().chain(halves) {
        let connection = Connection::new(&worker, Side::Outbound, address, None);
        let (near, far) = duplex(1 << 16);
        let client = async {
            let mut client = Client(near, Vec::new());
            for piece in &pieces {
                client.send(piece).await;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            for expected in statuses {
                let is_head = sent.starts_with("HEAD ") && !sent.contains("GET ");
                let response = if is_head { client.head().await } else { client.response().await };
                let status = response.split(' ').nth(1).map(str::to_owned);
                assert_eq!(status, Some(expected.to_string()), "{section}: {pieces:?}: {response}");
            }
            match after {
                Open => {
                    client.send("GET / HTTP/1.1\r\nhost: fast\r\n\r\n").await;
                    let response = client.response().await;
                    assert!(response.starts_with("HTTP/1.1 503 "), "{section}: {pieces:?}: {response}");
                }
                Closed => {
                    client.0.shutdown().await.unwrap();
                    assert!(client.is_closed().await, "{section}: {pieces:?}: {:?}", client.1);
                }
            }
        };
        let (ended, ()) = tokio::join!(
            async {
                let served = connection.serve_http1(Box::new(far), Bytes::new()).await;
                drop(connection);
                served
            },
            client
        );
        assert!(ended.is_ok(), "{section}: {pieces:?}: {ended:?}");
    }
    proxy.stop();
}

/// Makes a test of each row: its name, the section that decides it, what is sent, the statuses, what becomes of the
/// connection.
macro_rules! exchanges {
    ($($name:ident, $section:literal, $sent:expr, $statuses:expr, $after:expr;)+) => {
        $(
            #[tokio::test(start_paused = true)]
            async fn $name() {
                exchange($section, $sent, &$statuses, $after).await;
            }
        )+
    };
}

// The Host field. A request without exactly one valid Host gets 400 (§3.2).
exchanges! {
    a_host, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nHost: fast\r\n\r\n", [503], Open;
    a_host_in_capitals, "RFC 9110 §4.2.3", "GET / HTTP/1.1\r\nHOST: FAST\r\n\r\n", [503], Open;
    a_host_with_the_default_port, "RFC 9110 §4.2.3", "GET / HTTP/1.1\r\nHost: fast:80\r\n\r\n", [503], Open;
    a_host_with_an_empty_port, "RFC 3986 §3.2.3", "GET / HTTP/1.1\r\nHost: fast:\r\n\r\n", [503], Open;
    no_host, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nAccept: */*\r\n\r\n", [400], Closed;
    no_field_at_all, "RFC 9112 §3.2", "GET / HTTP/1.1\r\n\r\n", [400], Closed;
    two_hosts, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nHost: fast\r\nHost: slow\r\n\r\n", [400], Closed;
    two_equal_hosts, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nHost: fast\r\nHost: fast\r\n\r\n", [400], Closed;
    two_hosts_on_http_1_0, "RFC 9112 §3.2", "GET / HTTP/1.0\r\nHost: fast\r\nHost: fast\r\n\r\n", [400], Closed;
    a_list_of_hosts, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nHost: fast, slow\r\n\r\n", [400], Closed;
    two_words_for_a_host, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nHost: fast slow\r\n\r\n", [400], Closed;
    an_empty_host, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nHost:\r\n\r\n", [400], Closed;
    a_host_with_a_scheme, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nHost: http://fast\r\n\r\n", [400], Closed;
    a_host_with_a_path, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nHost: fast/path\r\n\r\n", [400], Closed;
    a_host_with_a_user, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nHost: a@fast\r\n\r\n", [400], Closed;
    a_host_with_two_ports, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nHost: fast:80:80\r\n\r\n", [400], Closed;
    a_host_with_a_word_for_a_port, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nHost: fast:http\r\n\r\n", [400], Closed;
    a_host_with_a_port_too_large, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nHost: fast:65536\r\n\r\n", [400], Closed;
    a_host_that_is_a_port_only, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nHost: :80\r\n\r\n", [400], Closed;
    a_host_with_an_open_bracket, "RFC 9112 §3.2", "GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", [400], Closed;
    http_1_0_without_a_host, "RFC 9112 §3.2.2", "GET / HTTP/1.0\r\n\r\n", [400], Closed;
}

// The forms of a target (§3.2.1 to §3.2.4).
exchanges! {
    absolute_form, "RFC 9112 §3.2.2", "GET http://fast/a?b HTTP/1.1\r\nHost: fast\r\n\r\n", [503], Open;
    absolute_form_wins_over_host, "RFC 9112 §3.2.2", "GET http://fast/ HTTP/1.1\r\nHost: unknown.test\r\n\r\n", [503],
        Open;
    absolute_form_with_an_empty_host, "RFC 9112 §3.2.2", "GET http://fast/ HTTP/1.1\r\nHost:\r\n\r\n", [503], Open;
    absolute_form_in_capitals, "RFC 9110 §4.2.3", "GET HTTP://FAST/ HTTP/1.1\r\nHost: fast\r\n\r\n", [503], Open;
    absolute_form_without_a_host_field, "RFC 9112 §3.2", "GET http://fast/ HTTP/1.1\r\n\r\n", [400], Closed;
    absolute_form_with_an_invalid_host_field, "RFC 9112 §3.2", "GET http://fast/ HTTP/1.1\r\nHost: a b\r\n\r\n", [400],
        Closed;
    absolute_form_of_another_scheme, "RFC 9110 §4.2", "GET ftp://fast/ HTTP/1.1\r\nHost: fast\r\n\r\n", [400], Closed;
    absolute_form_of_https, "RFC 9110 §4.2.2", "GET https://fast/ HTTP/1.1\r\nHost: fast\r\n\r\n", [400], Closed;
    absolute_form_without_an_authority, "RFC 9110 §4.2.1", "GET http:///a HTTP/1.1\r\nHost: fast\r\n\r\n", [400],
        Closed;
    absolute_form_with_a_user, "RFC 9110 §4.2.4", "GET http://a:b@fast/ HTTP/1.1\r\nHost: fast\r\n\r\n", [400], Closed;
    absolute_form_with_a_user_of_odd_bytes, "RFC 9110 §4.2.4",
        "GET http://a%12:b!&*$@fast:80/toto HTTP/1.1\r\nHost: fast\r\n\r\n", [400], Closed;
    absolute_form_with_a_port_too_large, "RFC 3986 §3.2.3", "GET http://fast:99999/ HTTP/1.1\r\nHost: fast\r\n\r\n",
        [400], Closed;
    absolute_form_with_a_word_for_a_port, "RFC 3986 §3.2.3", "GET http://fast:8o/ HTTP/1.1\r\nHost: fast\r\n\r\n",
        [400], Closed;
    authority_form_on_get, "RFC 9112 §3.2.3", "GET fast:80 HTTP/1.1\r\nHost: fast\r\n\r\n", [400], Closed;
    a_name_for_a_target, "RFC 9112 §3.2", "GET fast HTTP/1.1\r\nHost: fast\r\n\r\n", [400], Closed;
    an_exclamation_mark_for_a_target, "RFC 9112 §3.2", "GET ! HTTP/1.1\r\nHost: fast\r\n\r\n", [400], Closed;
    a_relative_path_for_a_target, "RFC 9112 §3.2", "GET a/b HTTP/1.1\r\nHost: fast\r\n\r\n", [400], Closed;
    a_query_for_a_target, "RFC 9112 §3.2", "GET ?a HTTP/1.1\r\nHost: fast\r\n\r\n", [400], Closed;
    asterisk_form_on_options, "RFC 9112 §3.2.4", "OPTIONS * HTTP/1.1\r\nHost: fast\r\n\r\n", [503], Open;
    asterisk_form_on_get, "RFC 9112 §3.2.4", "GET * HTTP/1.1\r\nHost: fast\r\n\r\n", [400], Closed;
    asterisk_form_on_m_search, "RFC 9112 §3.2.4", "M-SEARCH * HTTP/1.1\r\nHost: fast\r\n\r\n", [400], Closed;
    options_for_the_whole_server, "RFC 9112 §3.2.4", "OPTIONS http://fast HTTP/1.1\r\nHost: fast\r\n\r\n", [503], Open;
}

// The framing of bodies: what the proxy refuses beyond `http1::framing`.
exchanges! {
    a_body_with_a_length, "RFC 9112 §6.2", "POST / HTTP/1.1\r\nHost: slow\r\nContent-Length: 4\r\n\r\nq=42", [503],
        Open;
    a_body_with_a_length_with_zeros, "RFC 9110 §8.6",
        "POST / HTTP/1.1\r\nHost: slow\r\nContent-Length: 0004\r\n\r\nq=42", [503], Open;
    a_body_in_chunks, "RFC 9112 §7.1",
        "POST / HTTP/1.1\r\nHost: slow\r\nTransfer-Encoding: chunked\r\n\r\n4;a=b\r\nWiki\r\n0\r\nA: b\r\n\r\n", [503],
        Open;
    a_body_in_chunks_and_a_length, "RFC 9112 §6.3 rule 3",
        "POST / HTTP/1.1\r\nHost: slow\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [503],
        Closed;
    a_body_in_chunks_and_a_length_before_a_request, "RFC 9112 §6.1",
        concat!(
            "POST / HTTP/1.1\r\nHost: slow\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
            "GET /smuggled HTTP/1.1\r\nHost: fast\r\n\r\n",
        ),
        [503], Closed;
    a_list_of_equal_lengths, "RFC 9112 §6.3 rule 5", "POST / HTTP/1.1\r\nHost: slow\r\nContent-Length: 4, 4\r\n\r\n",
        [400], Closed;
    two_equal_lengths, "RFC 9112 §6.3 rule 5",
        "POST / HTTP/1.1\r\nHost: slow\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\n", [400], Closed;
    an_empty_length, "RFC 9110 §8.6", "GET / HTTP/1.1\r\nHost: slow\r\nContent-Length: \r\n\r\n", [400], Closed;
    gzip_and_chunked, "RFC 9112 §6.1", "POST / HTTP/1.1\r\nHost: slow\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        [400], Closed;
    chunked_twice, "RFC 9112 §7.1", "POST / HTTP/1.1\r\nHost: slow\r\nTransfer-Encoding: chunked, chunked\r\n\r\n",
        [400], Closed;
    chunked_in_two_fields, "RFC 9112 §7.1",
        "POST / HTTP/1.1\r\nHost: slow\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", [400],
        Closed;
    chunked_after_a_comma, "RFC 9110 §5.6.1",
        "POST / HTTP/1.1\r\nHost: slow\r\nTransfer-Encoding: ,chunked\r\nContent-Length: 5\r\n\r\n", [400], Closed;
    an_unknown_coding, "RFC 9112 §6.1", "POST / HTTP/1.1\r\nHost: slow\r\nTransfer-Encoding: blegh\r\n\r\n", [400],
        Closed;
    a_coding_on_http_1_0, "RFC 9112 §6.1", "POST / HTTP/1.0\r\nHost: slow\r\nTransfer-Encoding: chunked\r\n\r\n", [400],
        Closed;
    a_body_with_an_invalid_chunk, "RFC 9112 §7.1",
        "POST / HTTP/1.1\r\nHost: slow\r\nTransfer-Encoding: chunked\r\n\r\n0_2e\r\n\r\nGET / HTTP/1.1\r\n\r\n", [503],
        Closed;
}

// Connections: persistence, pipelining, HEAD, upgrades, expectations.
exchanges! {
    http_1_1_with_close, "RFC 9112 §9.6", "GET / HTTP/1.1\r\nHost: fast\r\nConnection: close\r\n\r\n", [503], Closed;
    nothing_is_served_after_close, "RFC 9112 §9.6",
        concat!(
            "GET / HTTP/1.1\r\nHost: slow\r\nConnection: close\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: fast\r\n\r\n",
        ),
        [503], Closed;
    garbage_after_close, "RFC 9112 §9.6",
        "GET / HTTP/1.1\r\nHost: slow\r\nConnection: close\r\n\r\nInvalid\r\n\r\n", [503], Closed;
    garbage_after_a_request, "RFC 9112 §2.2", "GET / HTTP/1.1\r\nHost: slow\r\n\r\nInvalid\r\n\r\n", [503, 400], Closed;
    three_requests_at_once, "RFC 9112 §9.3.2",
        concat!(
            "GET /1 HTTP/1.1\r\nHost: slow\r\n\r\n",
            "POST /2 HTTP/1.1\r\nHost: slow\r\nContent-Length: 4\r\n\r\nq=42\r\n",
            "GET /3 HTTP/1.1\r\nHost: fast\r\n\r\n",
        ),
        [503, 503, 503], Open;
    http_1_0_closes, "RFC 9112 §9.3", "GET / HTTP/1.0\r\nHost: fast\r\n\r\n", [503], Closed;
    a_response_to_head_has_no_body, "RFC 9110 §9.3.2", "HEAD / HTTP/1.1\r\nHost: fast\r\n\r\n", [503], Open;
    an_upgrade_that_is_not_accepted, "RFC 9110 §7.8",
        "GET / HTTP/1.1\r\nHost: fast\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", [503], Open;
    an_upgrade_to_h2c, "RFC 9113 §3.1",
        concat!(
            "GET / HTTP/1.1\r\nHost: fast\r\nConnection: Upgrade, HTTP2-Settings\r\n",
            "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n",
        ),
        [503], Open;
    connection_names_host, "RFC 9110 §7.6.1", "GET / HTTP/1.1\r\nHost: fast\r\nConnection: close, Host\r\n\r\n", [400],
        Closed;
    connection_names_a_field_that_is_absent, "RFC 9110 §7.6.1",
        "GET / HTTP/1.1\r\nHost: fast\r\nConnection: x-absent\r\n\r\n", [503], Open;
    an_expectation_without_a_body, "RFC 9110 §10.1.1",
        "GET / HTTP/1.1\r\nHost: fast\r\nExpect: 100-Continue\r\n\r\n", [503], Open;
    an_expectation_that_is_unknown, "RFC 9110 §10.1.1", "GET / HTTP/1.1\r\nHost: fast\r\nExpect: 200-ok\r\n\r\n", [417],
        Closed;
    a_list_of_expectations, "RFC 9110 §10.1.1", "GET / HTTP/1.1\r\nHost: fast\r\nExpect: 100-continue, x=y\r\n\r\n",
        [417], Closed;
    http_1_0_has_no_expectations, "RFC 9110 §10.1.1", "GET / HTTP/1.0\r\nHost: fast\r\nExpect: x=y\r\n\r\n", [503],
        Closed;
}

/// Checks the head that is written to a client for a request head and an upstream's response head.
fn written(section: &str, request: &str, response: &str, body: &'static str, expected: &str) {
    let (_, request) = parse_request(format!("{request}\r\n").as_bytes(), false).unwrap().unwrap();
    let (_, head) = parse_response(format!("{response}\r\n").as_bytes(), false).unwrap().unwrap();
    let body = if body.is_empty() { ResponseBody::Empty } else { ResponseBody::whole(body) };
    let mut response: Response<ResponseBody> = head.into_response().map(|()| body);
    response.headers_mut().insert(HeaderName::from_static("date"), HeaderValue::from_static("now"));
    let mut out = Vec::new();
    write_head(&mut out, &mut response, &RequestInfo::of(&request), true);
    let out = String::from_utf8(out).unwrap();
    let lines: BTreeSet<&str> = out.split("\r\n").collect();
    let expected: BTreeSet<&str> = expected.split("\r\n").chain(["date: now"]).collect();
    assert!(out.ends_with("\r\n\r\n") && lines == expected, "{section}: {out:?}");
}

/// Makes a test of each row: its name, the section that decides it, both heads, the body, the head that is written.
macro_rules! heads {
    ($($name:ident, $section:literal, $request:expr, $response:expr, $body:expr, $expected:expr;)+) => {
        $(
            #[test]
            fn $name() {
                written($section, $request, $response, $body, $expected);
            }
        )+
    };
}

heads! {
    a_204_has_no_length, "RFC 9110 §8.6", "GET / HTTP/1.1\r\n", "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n", "",
        "HTTP/1.1 204 No Content\r\n";
    a_204_has_no_coding, "RFC 9112 §6.1", "GET / HTTP/1.1\r\n",
        "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n", "", "HTTP/1.1 204 No Content\r\n";
    a_304_keeps_its_length, "RFC 9110 §8.6", "GET / HTTP/1.1\r\n",
        "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n", "",
        "HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n";
    a_response_to_head_keeps_its_length, "RFC 9110 §9.3.2", "HEAD / HTTP/1.1\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n", "", "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n";
    a_response_to_connect_has_no_length, "RFC 9110 §9.3.6", "CONNECT a:80 HTTP/1.1\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n", "", "HTTP/1.1 200 OK\r\n";
    a_response_to_connect_has_no_coding, "RFC 9110 §9.3.6", "CONNECT a:80 HTTP/1.1\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n", "", "HTTP/1.1 200 OK\r\n";
    a_101_has_no_length, "RFC 9110 §8.6", "GET / HTTP/1.1\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nContent-Length: 4\r\n", "",
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n";
    the_length_replaces_the_coding_of_an_upstream, "RFC 9112 §6.1", "GET / HTTP/1.1\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n", "four", "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n";
    one_length_replaces_several, "RFC 9110 §8.6", "GET / HTTP/1.1\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 4\r\n", "four",
        "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n";
    the_true_length_replaces_a_wrong_one, "RFC 9110 §8.6", "GET / HTTP/1.1\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", "four", "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n";
    trailers_are_not_announced_without_chunks, "RFC 9110 §6.6.2", "GET / HTTP/1.1\r\nTE: trailers\r\n",
        "HTTP/1.1 200 OK\r\nTrailer: x\r\n", "four", "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n";
    a_reason_is_kept, "RFC 9112 §4", "GET / HTTP/1.1\r\n", "HTTP/1.1 200 Fine\r\n", "four",
        "HTTP/1.1 200 Fine\r\ncontent-length: 4\r\n";
}
