//! Bytes that a service sends without a request. None may reach a client as the response to another request.
//!
//! Over TCP, a byte that the service sent just before it read a request cannot be distinguished from a byte of the
//! response. So the hostile server is compared with HAProxy in the same run; with a conforming server no error is
//! allowed.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::support::{Daemon, Proxy, RawServer, free_port, has_tool};

const CLIENTS: u64 = 8;
const REQUESTS: u64 = 500;

/// The result of a run.
#[derive(Debug, Default)]
struct Tally {
    right: AtomicUsize,
    /// The ID in the response is not that of the request.
    crossed: AtomicUsize,
    /// 5xx, or the connection closed.
    failed: AtomicUsize,
}

impl Tally {
    fn count(counter: &AtomicUsize) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn crossed(&self) -> usize {
        self.crossed.load(Ordering::Relaxed)
    }
}

/// A small pseudo-random generator, so that runs are reproducible as far as threads allow.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn spin(time: Duration) {
    let begin = Instant::now();
    while begin.elapsed() < time {
        thread::yield_now();
    }
}

fn response(id: &str, with_body: bool) -> String {
    let body = if with_body { id } else { "" };
    format!("HTTP/1.1 200 OK\r\nX-Id: {id}\r\nContent-Length: {}\r\n\r\n{body}", id.len())
}

/// What the server does besides responding, by the path of the request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Misbehaviour {
    /// Conforms to HTTP.
    Good,
    /// Sends a body on HEAD, which looks like another response.
    BodyOnHead,
    /// Sends a second response after the first.
    Surplus,
    /// Sends a response while the connection is idle.
    WhileIdle,
}

fn serve(mut stream: TcpStream, seed: u64) {
    let _ = stream.set_nodelay(true);
    let mut state = seed | 1;
    let (mut buffer, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        let Some(end) = buffer.windows(4).position(|four| four == b"\r\n\r\n") else {
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(count) => buffer.extend_from_slice(&chunk[..count]),
            }
            continue;
        };
        let head: Vec<u8> = buffer.drain(..end + 4).collect();
        let head = String::from_utf8_lossy(&head);
        let mut words = head.split(' ');
        let is_head = words.next() == Some("HEAD");
        let id = words.next().unwrap_or_default().trim_start_matches('/').to_owned();
        if stream.write_all(response(&id, !is_head).as_bytes()).is_err() {
            return;
        }
        let wait = match id.split('-').next() {
            Some("head" | "surplus") => random(&mut state) % 300,
            Some("unasked") => random(&mut state) % 3000,
            _ => continue,
        };
        if wait > 500 {
            thread::sleep(Duration::from_micros(wait));
        } else {
            spin(Duration::from_micros(wait));
        }
        let _ = stream.write_all(response(&format!("stray-of-{id}"), true).as_bytes());
    }
}

fn server() -> RawServer {
    let seeds = AtomicU64::new(0x9e37_79b9);
    RawServer::start(move |stream| serve(stream, seeds.fetch_add(0x1234_5677, Ordering::Relaxed)))
}

/// Sends one request and returns the ID in its response; None if there is none.
fn ask(stream: &mut TcpStream, method: &str, id: &str) -> Option<String> {
    stream.write_all(format!("{method} /{id} HTTP/1.1\r\nHost: up\r\n\r\n").as_bytes()).ok()?;
    let (mut got, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        let text = String::from_utf8_lossy(&got).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let field = |name: &str| {
                head.lines().find_map(|line| {
                    let (key, value) = line.split_once(": ")?;
                    key.eq_ignore_ascii_case(name).then(|| value.to_owned())
                })
            };
            let length: usize = field("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
            if method == "HEAD" || body.len() >= length {
                return field("x-id");
            }
        }
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return None,
            Ok(count) => got.extend_from_slice(&chunk[..count]),
        }
    }
}

/// Clients that keep their connections; each request has its own ID, and the server misbehaves on one in seven.
fn run(proxy: SocketAddr, misbehaviour: Misbehaviour) -> Tally {
    let tally = Arc::new(Tally::default());
    let client = |client: u64| {
        let tally = Arc::clone(&tally);
        thread::spawn(move || {
            let connect = || {
                let stream = TcpStream::connect(proxy).expect("connect");
                stream.set_nodelay(true).expect("nodelay");
                stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
                stream
            };
            let mut stream = connect();
            for number in 0..REQUESTS {
                let (method, kind) = match (misbehaviour, number % 7) {
                    (Misbehaviour::BodyOnHead, 0) => ("HEAD", "head"),
                    (Misbehaviour::Surplus, 0) => ("GET", "surplus"),
                    (Misbehaviour::WhileIdle, 0) => ("GET", "unasked"),
                    (Misbehaviour::Good, 0) => ("HEAD", "good"),
                    _ => ("GET", "plain"),
                };
                let id = format!("{kind}-{client}-{number}");
                match ask(&mut stream, method, &id) {
                    Some(got) if got == id => Tally::count(&tally.right),
                    Some(_) => Tally::count(&tally.crossed),
                    None => {
                        Tally::count(&tally.failed);
                        stream = connect();
                    }
                }
            }
        })
    };
    let clients: Vec<_> = (0..CLIENTS).map(client).collect();
    for client in clients {
        client.join().expect("no panic");
    }
    Arc::into_inner(tally).expect("all clients have ended")
}

fn outrigger(upstream: &RawServer, workers: usize) -> Proxy {
    Proxy::start(format!(
        "[runtime]\nworkers = {workers}\n[defaults]\nbreaker = false\noutlier = false\n\
         [[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\n",
        upstream.address()
    ))
}

fn haproxy(upstream: &RawServer) -> (Daemon, SocketAddr) {
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let config = format!(
        "global\n nbthread 1\ndefaults\n mode http\n timeout client 10s\n timeout server 10s\n timeout connect 1s\n\
         retries 3\n option redispatch\nlisten up\n bind {address}\n server s {}\n",
        upstream.address()
    );
    let files: &[(&str, &str)] = &[("conf", &config)];
    (Daemon::start("haproxy", &["-db", "-f", "@DIR@/conf"], files).listening(address), address)
}

#[test]
fn responses_of_a_conforming_server_are_never_mixed_up() {
    let server = server();
    for workers in [1, 2] {
        let proxy = outrigger(&server, workers);
        let tally = run(proxy.outbound(), Misbehaviour::Good);
        assert_eq!(tally.crossed(), 0, "{tally:?}");
        assert_eq!(tally.failed.into_inner(), 0);
    }
}

/// The first stray bytes may be taken for a response if they arrive while a request is in flight; then the endpoint is
/// known for them.
#[test]
fn stray_responses_are_fewer_than_through_haproxy() {
    let server = server();
    let peer = has_tool(&["haproxy"]).then(|| haproxy(&server));
    for misbehaviour in [Misbehaviour::BodyOnHead, Misbehaviour::Surplus, Misbehaviour::WhileIdle] {
        let proxy = outrigger(&server, 1);
        let result = run(proxy.outbound(), misbehaviour);
        let peer_result = peer.as_ref().map(|(_, address)| run(*address, misbehaviour));
        eprintln!("{misbehaviour:?}: Outrigger {result:?}, HAProxy {peer_result:?}");
        let (requests, crossed) = (result.right.load(Ordering::Relaxed), result.crossed());
        assert!(requests > 3000, "{misbehaviour:?}: {result:?}");
        // All clients can get the first stray bytes at the same time.
        assert!(crossed <= 2 * CLIENTS as usize, "{misbehaviour:?}: {result:?}");
        if let Some(peer_result) = peer_result {
            assert!(
                crossed <= peer_result.crossed(),
                "{misbehaviour:?}: {result:?}, HAProxy {peer_result:?}"
            );
        }
    }
}
