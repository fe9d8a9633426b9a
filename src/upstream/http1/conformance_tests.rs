//! What the proxy makes of an endpoint's bytes, and whether the connection carries another request, by RFC 9112 and RFC
//! 9110. The layers below have cases of their own in `http1::conformance_tests`, which also names the corpora.
//!
//! Each response is delivered whole, byte by byte, and split at each position.

use tokio::io::AsyncWriteExt;

use super::{
    tests::{body, connection, head},
    *,
};

/// A response as the client connection reports it, or why there is none.
#[derive(Debug, PartialEq)]
enum Seen {
    /// The interim responses, the status, the body.
    Response(Vec<u16>, u16, String),
    /// Its head or its framing is malformed.
    Malformed,
    /// The connection was closed in its middle.
    Cut,
    /// The connection was closed before its first byte.
    Nothing,
}
use Seen::{Cut, Malformed, Nothing};

fn ok(status: u16, body: &str) -> Seen {
    Seen::Response(vec![], status, body.to_owned())
}

impl From<Error> for Seen {
    fn from(error: Error) -> Self {
        match error {
            error if error.is_malformed() => Malformed,
            Error::UnexpectedEnd => Cut,
            Error::Closed => Nothing,
            other => panic!("{other}"),
        }
    }
}

/// What the endpoint does after its last byte.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Waits,
    Closes,
}
use End::{Closes, Waits};

async fn receive(connection: &mut Http1Connection, method: &Method) -> Seen {
    let (target, fields, mut interim) = (Uri::from_static("/"), HeaderMap::new(), Vec::new());
    let head = OutgoingHead { method, ..head(&target, &fields) };
    let on_interim = |status: StatusCode, _| interim.push(status.as_u16());
    match connection.send(head, RequestBody::empty(), on_interim).await {
        Err(error) => error.into(),
        Ok(response) => match body(connection).await {
            Err(error) => error.into(),
            Ok(body) => {
                Seen::Response(interim, response.status.as_u16(), String::from_utf8_lossy(&body).into_owned())
            }
        },
    }
}

/// Checks what a request with this method receives, and whether its connection is reusable then.
async fn exchange(section: &str, method: &str, (sent, end): (&str, End), expected: Seen, reusable: bool) {
    let method = Method::from_bytes(method.as_bytes()).unwrap();
    let bytes: Vec<&str> = (0..sent.len()).map(|at| &sent[at..=at]).collect();
    let halves = (1..sent.len()).map(|at| vec![&sent[..at], &sent[at..]]);
    for pieces in [vec![sent], bytes].into_iter().chain(halves) {
        let (mut connection, mut peer) = connection().await;
        peer.set_nodelay(true).unwrap();
        let endpoint = async {
            for piece in &pieces {
                peer.write_all(piece.as_bytes()).await.unwrap();
                // So that the client reads in between.
                tokio::task::yield_now().await;
            }
            if end == Closes {
                peer.shutdown().await.unwrap();
            }
        };
        let received = timeout(Duration::from_secs(20), receive(&mut connection, &method));
        let (seen, ()) = tokio::join!(received, endpoint);
        let seen = seen.unwrap_or_else(|_| panic!("{section}: {pieces:?}: no end is seen"));
        assert_eq!(seen, expected, "{section}: {pieces:?}");
        let verdict = connection.finish_exchange(false, Instant::now());
        // The kernel knows of every byte by now, whether or not the runtime does.
        let quiet = connection.check_idle() == IdleState::Quiet;
        assert_eq!(
            verdict == ReuseVerdict::Reusable && quiet,
            reusable,
            "{section}: {pieces:?}: {verdict:?}"
        );
    }
}

/// Makes a test of each row: its name, the section that decides it, the method, what the endpoint sends and then does,
/// what is seen of it, whether the connection is reusable.
macro_rules! exchanges {
    ($($name:ident, $section:literal, $method:literal, ($sent:expr, $end:expr), $expected:expr, $reusable:expr;)+) => {
        $(
            #[tokio::test]
            async fn $name() {
                exchange($section, $method, ($sent, $end), $expected, $reusable).await;
            }
        )+
    };
}

// Responses whose end is known.
exchanges! {
    a_length, "RFC 9112 §6.2", "GET", ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", Waits), ok(200, "hello"),
        true;
    length_0, "RFC 9112 §6.2", "GET", ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", Waits), ok(200, ""), true;
    chunks, "RFC 9112 §7.1", "GET",
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nWiki\r\n5;a=b\r\npedia\r\n0\r\n\r\n", Waits),
        ok(200, "Wikipedia"), true;
    chunks_and_trailers, "RFC 9112 §7.1.2", "GET",
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n000\r\nA: b\r\n\r\n", Waits), ok(200, "x"),
        true;
    an_empty_line_before_the_status_line, "RFC 9112 §2.2", "GET",
        ("\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", Waits), ok(200, "ok"), true;
    no_content, "RFC 9112 §6.3 rule 1", "GET", ("HTTP/1.1 204 No Content\r\n\r\n", Waits), ok(204, ""), true;
    not_modified_with_a_length, "RFC 9112 §6.3 rule 1", "GET",
        ("HTTP/1.1 304 Not Modified\r\nContent-Length: 10\r\n\r\n", Waits), ok(304, ""), true;
    not_modified_with_chunked, "RFC 9112 §6.3 rule 1", "GET",
        ("HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n", Waits), ok(304, ""), true;
    head_with_a_length, "RFC 9112 §6.3 rule 1", "HEAD", ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", Waits),
        ok(200, ""), true;
    head_with_chunked, "RFC 9112 §6.3 rule 1", "HEAD", ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", Waits),
        ok(200, ""), true;
    head_without_a_length, "RFC 9112 §6.3 rule 1", "HEAD", ("HTTP/1.1 200 OK\r\n\r\n", Waits), ok(200, ""), true;
    interim_responses, "RFC 9110 §15.2", "GET",
        (
            concat!(
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n",
                "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            ),
            Waits
        ),
        Seen::Response(vec![100, 103], 200, "ok".to_owned()), true;
    an_interim_response_with_a_length, "RFC 9112 §6.3 rule 1", "GET",
        ("HTTP/1.1 103 Early Hints\r\nContent-Length: 5\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", Waits),
        Seen::Response(vec![103], 204, String::new()), true;
    an_interim_response_of_another_status, "RFC 9110 §15.2", "GET",
        ("HTTP/1.1 199 Odd\r\nConnection: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", Waits),
        Seen::Response(vec![199], 200, String::new()), true;
}

// Responses after which the connection closes.
exchanges! {
    a_body_by_close, "RFC 9112 §6.3 rule 8", "GET", ("HTTP/1.1 200 OK\r\n\r\nhello world", Closes),
        ok(200, "hello world"), false;
    an_empty_body_by_close, "RFC 9112 §6.3 rule 8", "GET", ("HTTP/1.1 404 Not Found\r\n\r\n", Closes), ok(404, ""),
        false;
    a_body_by_close_that_looks_like_a_response, "RFC 9112 §6.3 rule 8", "GET",
        ("HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\nHTTP/1.0 200 OK\r\n\r\n", Closes),
        ok(200, "HTTP/1.0 200 OK\r\n\r\n"), false;
    close, "RFC 9112 §9.6", "GET", ("HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 2\r\n\r\nok", Waits),
        ok(200, "ok"), false;
    close_in_a_list, "RFC 9112 §9.6", "GET",
        ("HTTP/1.1 200 OK\r\nConnection: keep-alive, close\r\nContent-Length: 0\r\n\r\n", Waits), ok(200, ""), false;
    close_with_204, "RFC 9112 §9.6", "GET", ("HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", Waits),
        ok(204, ""), false;
    http_1_0, "RFC 9112 §9.3", "GET", ("HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", Waits), ok(200, "ok"), false;
    http_1_0_with_keep_alive, "RFC 9112 §9.3", "GET",
        ("HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok", Waits), ok(200, "ok"), true;
    http_1_0_with_keep_alive_and_204, "RFC 9112 §9.3", "GET",
        ("HTTP/1.0 204 No Content\r\nConnection: keep-alive\r\n\r\n", Waits), ok(204, ""), true;
    proxy_connection_with_close, "RFC 9112 §C.2.2", "GET",
        ("HTTP/1.1 200 OK\r\nProxy-Connection: close\r\nContent-Length: 11\r\n\r\nhello world", Waits),
        ok(200, "hello world"), true;
    chunked_and_a_length, "RFC 9112 §6.3 rule 3", "GET",
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", Waits),
        ok(200, "ok"), false;
    a_change_of_protocol, "RFC 9110 §15.2.2", "GET",
        ("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", Waits), ok(101, ""), false;
    a_change_of_protocol_with_a_length, "RFC 9110 §15.2.2", "GET",
        ("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nContent-Length: 0\r\n\r\n", Waits), ok(101, ""), false;
    closed_after_the_response, "RFC 9112 §9.5", "GET", ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", Closes),
        ok(200, "ok"), false;
}

// Bytes after the response: its recipient cannot know what they are (RFC 9112 §9.2).
exchanges! {
    more_than_the_length, "RFC 9112 §9.2", "GET", ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n2ad731e3", Waits),
        ok(200, "2ad73"), false;
    a_second_response, "RFC 9112 §9.2", "GET",
        ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", Waits),
        ok(200, ""), false;
    a_line_end_after_the_response, "RFC 9112 §9.2", "GET", ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok\r\n", Waits),
        ok(200, "ok"), false;
    a_body_after_head, "RFC 9112 §9.2", "HEAD", ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody", Waits),
        ok(200, ""), false;
    a_body_after_204, "RFC 9112 §9.2", "GET", ("HTTP/1.1 204 No Content\r\n\r\nbody", Waits), ok(204, ""), false;
    a_body_after_304, "RFC 9112 §9.2", "GET", ("HTTP/1.1 304 Not Modified\r\n\r\nbody", Waits), ok(304, ""), false;
    bytes_after_the_last_chunk, "RFC 9112 §9.2", "GET",
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n0\r\n\r\n", Waits), ok(200, ""), false;
}

// Responses that are cut: incomplete (RFC 9112 §8), so never reported as complete.
exchanges! {
    closed_without_a_response, "RFC 9112 §8", "GET", ("", Closes), Nothing, false;
    a_head_cut_short, "RFC 9112 §8", "GET", ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", Closes), Cut, false;
    a_status_line_cut_short, "RFC 9112 §8", "GET", ("HTTP/1.1 2", Closes), Cut, false;
    a_body_cut_short, "RFC 9112 §8", "GET", ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel", Closes), Cut, false;
    chunks_cut_short, "RFC 9112 §8", "GET",
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nfoo\r\n", Closes), Cut, false;
    a_chunk_cut_short, "RFC 9112 §8", "GET",
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nfoo bar", Closes), Cut, false;
    trailers_cut_short, "RFC 9112 §8", "GET",
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: b\r\n", Closes), Cut, false;
}

// Responses that cannot be read: 502, and the connection closes (§6.3 rule 5).
exchanges! {
    two_lengths, "RFC 9112 §6.3 rule 5", "GET",
        ("HTTP/1.1 200 OK\r\nContent-Length: 8\r\nContent-Length: 9\r\n\r\n", Waits), Malformed, false;
    a_length_with_plus, "RFC 9112 §6.3 rule 5", "GET", ("HTTP/1.1 200 OK\r\nContent-Length: +8\r\n\r\n", Waits),
        Malformed, false;
    a_negative_length_to_head, "RFC 9112 §6.3 rule 5", "HEAD", ("HTTP/1.1 200 OK\r\nContent-Length: -8\r\n\r\n", Waits),
        Malformed, false;
    chunked_on_http_1_0, "RFC 9112 §6.1", "GET",
        ("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Waits), Malformed, false;
    a_fold, "RFC 9112 §5.2", "GET", ("HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 0\r\n\r\n", Waits), Malformed,
        false;
    a_fold_of_a_coding, "RFC 9112 §5.2", "GET",
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n  abc\r\n\r\n0\r\n\r\n", Waits), Malformed, false;
    bare_line_feeds, "RFC 9112 §2.2", "GET", ("HTTP/1.1 200 OK\nContent-Length: 0\n\n", Waits), Malformed, false;
    a_bare_cr_in_a_field, "RFC 9112 §2.2", "GET", ("HTTP/1.1 200 OK\r\nFoo: 1\rBar: 2\r\n\r\n", Waits), Malformed,
        false;
    a_status_of_two_digits, "RFC 9112 §4", "GET", ("HTTP/1.1 20 OK\r\n\r\n", Waits), Malformed, false;
    version_2_0, "RFC 9112 §2.3", "GET", ("HTTP/2.0 200 OK\r\n\r\n", Waits), Malformed, false;
    a_response_of_ftp, "RFC 9112 §2.1", "GET", ("220 ftp.example.org ready\r\n", Waits), Malformed, false;
    an_invalid_chunk, "RFC 9112 §7.1", "GET",
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2 erfr\r\naa\r\n0\r\n\r\n", Waits), Malformed, false;
    an_invalid_trailer, "RFC 9112 §7.1.2", "GET",
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA : b\r\n\r\n", Waits), Malformed, false;
    a_malformed_interim_response, "RFC 9112 §2.2", "GET",
        ("HTTP/1.1 100 Continue\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", Waits), Malformed, false;
}
