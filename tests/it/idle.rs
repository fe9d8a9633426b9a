//! Idle HTTP/1 connections hold no buffers. Only their memory use differs.

use std::{
    io::{Read, Write},
    thread,
};

use http_body_util::BodyExt;

use crate::{
    identity::server_sidecar,
    support::{
        Proxy, RawClient, Upstream, eventually,
        pki::{Pki, id, uri},
        strict::{self, Message, Progress},
        text,
        tls::TlsClient,
    },
};

const GET: &str = "GET / HTTP/1.1\r\nHost: up\r\n\r\n";
const CROWD: usize = 300;

trait Socket: Read + Write {}
impl<S: Read + Write> Socket for S {}

struct Client {
    stream: Box<dyn Socket>,
    buffer: Vec<u8>,
}

impl Client {
    fn new(stream: impl Socket + 'static) -> Self {
        Self { stream: Box::new(stream), buffer: Vec::new() }
    }

    #[track_caller]
    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).expect("it takes it");
        self.stream.flush().expect("it takes it");
    }

    #[track_caller]
    fn response(&mut self) -> Message {
        let mut chunk = [0; 4096];
        loop {
            match strict::response(&self.buffer, false) {
                Progress::Complete(message, used) => {
                    self.buffer.drain(..used);
                    return message;
                }
                Progress::Wrong(why) => panic!("{why} in {:?}", String::from_utf8_lossy(&self.buffer)),
                Progress::Partial => {
                    let count = self.stream.read(&mut chunk).expect("a response");
                    assert_ne!(count, 0, "hung up after {:?}", String::from_utf8_lossy(&self.buffer));
                    self.buffer.extend_from_slice(&chunk[..count]);
                }
            }
        }
    }

    #[track_caller]
    fn ask(&mut self, request: impl AsRef<[u8]>) -> String {
        self.send(request);
        self.response().text()
    }

    /// Whether the other side closes without sending anything more.
    fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        let _ = self.stream.read_to_end(&mut rest);
        rest.is_empty() && self.buffer.is_empty()
    }
}

/// Answers with the request's path and body.
fn echo() -> Upstream {
    Upstream::http1(|request| async {
        let path = request.uri().path().to_owned();
        let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        text([path.as_bytes(), &body].concat())
    })
}

fn proxy(upstream: &Upstream) -> Proxy {
    Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nhosts = [\"*\"]\nendpoints = [\"{}\"]\n",
        upstream.address()
    ))
}

fn crowd(connect: impl Fn() -> Client) -> Vec<Client> {
    let met = |_| {
        let mut client = connect();
        assert_eq!(client.ask(GET), "/");
        client
    };
    (0..CROWD).map(met).collect()
}

/// All forms in which a request can arrive, on connections that have been idle.
fn is_served(mut clients: Vec<Client>) {
    for client in &mut clients {
        assert_eq!(client.ask(GET), "/");
    }
    let mut last = clients.split_off(CROWD - 20).into_iter();
    let mut next = || last.next().expect("there are more");
    for _ in 0..3 {
        let mut client = next();
        assert_eq!(client.ask("POST /a HTTP/1.1\r\nHost: up\r\nContent-Length: 4\r\n\r\nbody"), "/abody");
        // Two pipelined requests and half of a third.
        client.send("GET /1 HTTP/1.1\r\nHost: up\r\n\r\nGET /2 HTTP/1.1\r\nHost: up\r\n\r\nGET /3 HT");
        assert_eq!([client.response().text(), client.response().text()], ["/1", "/2"]);
        assert_eq!(client.ask("TP/1.1\r\nHost: up\r\n\r\n"), "/3");
        // A head that does not fit into one read.
        let long = format!("GET /long HTTP/1.1\r\nHost: up\r\nX-Long: {}\r\n\r\n", "x".repeat(20_000));
        assert_eq!(client.ask(long), "/long");
        // Byte by byte, with empty lines before it.
        for byte in
            "\r\n\r\nPUT /b HTTP/1.1\r\nHost: up\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
                .chars()
        {
            client.send(byte.to_string());
        }
        assert_eq!(client.response().text(), "/babc");
        assert_eq!(client.ask(GET), "/");
        assert!(
            client.ask("GET / HTTP/1.1\r\nHost: up\r\nConnection: close\r\n\r\n") == "/"
                && client.is_closed()
        );
    }
    // Bytes that are not HTTP.
    let mut client = next();
    client.send("\0\0\0\0\r\n\r\n");
    assert_eq!(client.response().status(), 400);
    assert!(client.is_closed());
}

#[test]
fn requests_on_idle_connections_are_served() {
    let upstream = echo();
    let proxy = proxy(&upstream);
    is_served(crowd(|| Client::new(RawClient::connect(proxy.outbound()).stream)));
}

#[test]
fn requests_on_idle_mutual_tls_connections_are_served() {
    let (pki, service) = (Pki::new(), echo());
    let server = server_sidecar(&pki, service.address(), "");
    let certificate = pki.issue("checkout", |params| params.subject_alt_names = vec![uri(&id("checkout"))]);
    for alpn in [&["http/1.1"][..], &[]] {
        let client = TlsClient::new(Some(&certificate), alpn);
        is_served(crowd(|| Client::new(client.connect(server.inbound()))));
    }
}

/// A connection is not idle while its client has not read the response, even though all of it has been written to the
/// socket.
#[test]
fn a_connection_with_an_unread_response_is_not_idle() {
    const LARGE: usize = 6 << 20;
    let service = Upstream::http1(|request| async move {
        text(if request.uri().path() == "/large" { vec![b'x'; LARGE] } else { b"/".to_vec() })
    });
    let pki = Pki::new();
    let server = server_sidecar(&pki, service.address(), "");
    let certificate = pki.issue("checkout", |params| params.subject_alt_names = vec![uri(&id("checkout"))]);
    let client = TlsClient::new(Some(&certificate), &["http/1.1"]);
    let mut clients = crowd(|| Client::new(client.connect(server.inbound())));
    let mut slow = clients.pop().expect("a crowd");
    for _ in 0..3 {
        slow.send("GET /large HTTP/1.1\r\nHost: up\r\n\r\n");
        let (mut got, mut whole, mut chunk) = (0, None, [0; 8 * 1024]);
        while whole.is_none_or(|whole| got < whole) {
            let count = slow.stream.read(&mut chunk).expect("more");
            assert_ne!(count, 0, "hung up after {got} bytes");
            got += count;
            let head = || chunk.windows(4).position(|four| four == b"\r\n\r\n").expect("a head");
            whole = whole.or_else(|| Some(head() + 4 + LARGE));
            thread::yield_now();
        }
        assert_eq!(slow.ask(GET), "/");
    }
}

/// After a response that precedes the end of its request, the rest of the body must not be parsed as a request.
#[test]
fn the_rest_of_a_request_body_is_not_parsed_as_a_request() {
    let upstream = Upstream::http1(|_| async { text("early") });
    let proxy = proxy(&upstream);
    let _crowd = crowd_of(&proxy, "early");
    let mut client = Client::new(RawClient::connect(proxy.outbound()).stream);
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: up\r\n\r\n";
    client.send(format!("POST / HTTP/1.1\r\nHost: up\r\nContent-Length: {}\r\n\r\n", smuggled.len()));
    assert_eq!(client.response().text(), "early");
    let _ = client.stream.write_all(smuggled.as_bytes());
    assert!(client.is_closed(), "a body was answered");
}

fn crowd_of(proxy: &Proxy, response: &str) -> Vec<RawClient> {
    let met = |_| {
        let mut client = RawClient::connect(proxy.outbound());
        assert_eq!(client.ask(GET).text(), response);
        client
    };
    (0..CROWD).map(met).collect()
}

#[test]
fn a_partial_request_on_an_idle_connection_times_out() {
    let upstream = echo();
    let proxy = proxy(&upstream);
    let mut crowd = crowd_of(&proxy, "/");
    let mut slow = crowd.pop().expect("a crowd");
    slow.send("GET / HTTP/1.1\r\nHo");
    let (got, closed) = slow.read_to_close();
    assert!(closed && got.is_empty(), "{:?}", String::from_utf8_lossy(&got));
    assert_eq!(crowd.pop().expect("a crowd").ask(GET).status(), 200, "another waits as before");
}

#[test]
fn idle_connections_close_with_their_client_and_with_the_process() {
    let upstream = echo();
    let mut proxy = proxy(&upstream);
    let open = |proxy: &Proxy| {
        let page =
            RawClient::connect(proxy.admin()).ask("GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").text();
        let line = page.lines().find(|line| line.starts_with("outrigger_worker_connections{"));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<usize>().ok())
            .unwrap_or_else(|| panic!("{page}"))
    };
    let mut crowd = crowd_of(&proxy, "/");
    assert_eq!(open(&proxy), CROWD);
    crowd.truncate(CROWD / 2);
    eventually("the others' ends to be seen", || open(&proxy) == CROWD / 2);
    proxy.signal("TERM");
    for mut client in crowd {
        assert_eq!(client.read_to_close(), (Vec::new(), true));
    }
    assert_eq!(proxy.wait().code(), Some(0));
}

/// Most memory of a connection is allocated while it is used and released when it is idle.
#[test]
fn idle_connections_hold_little_memory() {
    const COUNT: u64 = 1500;
    let upstream = echo();
    let proxy = proxy(&upstream);
    let ask = |_| {
        let mut client = RawClient::connect(proxy.outbound());
        assert_eq!(client.ask(GET).status(), 200);
        client
    };
    // Memory that is allocated once.
    let _warm: Vec<_> = (0..CROWD).map(ask).collect();
    let before = proxy.resident_kib();
    let idle: Vec<_> = (0..COUNT as usize).map(ask).collect();
    let bytes = (proxy.resident_kib() - before) * 1024 / COUNT;
    assert!(bytes < 6 * 1024, "{bytes} bytes for each of {} idle connections", idle.len());
}
