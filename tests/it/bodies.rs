//! Bodies are streamed: memory does not grow with their size, and a reader that stops stops the sender.

use std::{
    convert::Infallible,
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    thread,
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::support::{Proxy, RawClient, RawServer, Upstream, text};

const MIB: u64 = 1024 * 1024;

/// MiB each way; CI asks for 2048 with the release build.
fn size() -> u64 {
    std::env::var("OUTRIGGER_BODY_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(256) * MIB
}

/// GET: as many bytes as the path says. POST: reads as many as `Content-Length` says, and responds with `got N`.
fn serve(mut stream: TcpStream, sent: &AtomicU64) {
    let (mut buffer, mut chunk) = (Vec::new(), vec![b'x'; 256 * 1024]);
    let end = loop {
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return,
            Ok(count) => buffer.extend_from_slice(&chunk[..count]),
        }
        if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
    };
    let head = String::from_utf8_lossy(&buffer[..end]).to_ascii_lowercase();
    let number = |before: &str| {
        head.split(before)
            .nth(1)
            .and_then(|rest| rest.split(['\r', ' ']).next().and_then(|digits| digits.parse::<u64>().ok()))
    };
    if head.starts_with("get") {
        let mut left = number("get /").unwrap_or(0);
        let _ = write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {left}\r\n\r\n");
        while left > 0 {
            let part = left.min(256 * 1024);
            if stream.write_all(&chunk[..usize::try_from(part).expect("small")]).is_err() {
                return;
            }
            sent.fetch_add(part, Ordering::Relaxed);
            left -= part;
        }
    } else {
        let (wanted, mut got) = (number("content-length: ").unwrap_or(0), (buffer.len() - end) as u64);
        while got < wanted {
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(count) => got += count as u64,
            }
        }
        let response = format!("got {got}");
        let length = response.len();
        let _ = write!(
            stream,
            "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{response}"
        );
    }
}

fn start() -> (RawServer, Arc<AtomicU64>, Proxy) {
    let sent = Arc::<AtomicU64>::default();
    let counter = sent.clone();
    let server = RawServer::start(move |stream| serve(stream, &counter));
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{0}\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{0}\"]\n",
        server.address()
    ));
    (server, sent, proxy)
}

/// Peak resident memory, KiB.
fn peak_kib(proxy: &Proxy) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", proxy.pid())).expect("/proc");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("VmHWM");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
}

fn download(address: SocketAddr, size: u64) {
    let mut client = RawClient::connect(address);
    client.send(format!("GET /{size} HTTP/1.1\r\nHost: up\r\n\r\n"));
    let head = client.read_until(b"\r\n\r\n");
    let end = head.windows(4).position(|window| window == b"\r\n\r\n").expect("a head") + 4;
    let (mut got, mut chunk) = ((head.len() - end) as u64, vec![0; 256 * 1024]);
    while got < size {
        match client.stream.read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(count) => got += count as u64,
        }
    }
    assert_eq!(got, size, "{}", String::from_utf8_lossy(&head[..end]));
}

fn upload(address: SocketAddr, size: u64) {
    let mut client = RawClient::connect(address);
    client.send(format!("POST / HTTP/1.1\r\nHost: up\r\nContent-Length: {size}\r\n\r\n"));
    let chunk = vec![b'x'; MIB as usize];
    for _ in 0..size / MIB {
        client.stream.write_all(&chunk).expect("the proxy takes the body");
    }
    let response = client.response().expect("well-formed").expect("a response");
    assert_eq!(response.text(), format!("got {size}"));
}

#[test]
fn memory_stays_flat_under_large_bodies() {
    let (_server, _, proxy) = start();
    for address in [proxy.outbound(), proxy.inbound()] {
        download(address, MIB);
        upload(address, MIB);
        let before = peak_kib(&proxy);
        download(address, size());
        upload(address, size());
        let grown = peak_kib(&proxy).saturating_sub(before);
        assert!(grown < 16 * 1024, "{} MiB each way cost {grown} KiB of memory", size() / MIB);
    }
}

#[test]
fn back_pressure_reaches_the_sender() {
    let (_server, sent, proxy) = start();
    let before = peak_kib(&proxy);
    let mut client = RawClient::connect(proxy.outbound());
    client.send(format!("GET /{} HTTP/1.1\r\nHost: up\r\n\r\n", 1024 * MIB));
    client.read_until(b"\r\n\r\n");
    // The sender is blocked once its count stays the same.
    let mut last = 0;
    crate::support::eventually("the sender to be stopped", || {
        thread::sleep(Duration::from_millis(300));
        let now = sent.load(Ordering::Relaxed);
        std::mem::replace(&mut last, now) == now
    });
    assert!(last < 64 * MIB, "{} MiB were sent to a reader that had stopped", last / MIB);
    let grown = peak_kib(&proxy).saturating_sub(before);
    assert!(grown < 16 * 1024, "{grown} KiB");
}

/// As many bytes as requested.
struct Zeros(u64);

impl Body for Zeros {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        const PART: &[u8] = &[0; 64 * 1024];
        let part = self.0.min(PART.len() as u64);
        self.0 -= part;
        let part = Bytes::from_static(&PART[..usize::try_from(part).expect("small")]);
        Poll::Ready((!part.is_empty()).then(|| Ok(Frame::data(part))))
    }
}

/// GET: as many bytes as the path says. POST: how many arrived.
fn http2_server() -> Upstream {
    Upstream::h2c(|request| async move {
        if request.method() == http::Method::GET {
            let size = request.uri().path().trim_start_matches('/').parse().unwrap_or(0);
            return http::Response::new(Zeros(size).boxed_unsync());
        }
        let (mut body, mut got) = (request.into_body(), 0);
        while let Some(Ok(frame)) = body.frame().await {
            got += frame.data_ref().map_or(0, Bytes::len);
        }
        text(format!("got {got}"))
    })
}

/// A request with a body of this size over HTTP/2; the size of the response and its first bytes.
fn by_http2(address: SocketAddr, path: &str, size: u64) -> (u64, String) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(address).await.expect("connect");
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await
                .expect("HTTP/2");
        tokio::spawn(connection);
        let method = if size > 0 { "POST" } else { "GET" };
        let request = http::Request::builder().method(method).uri(format!("http://up{path}"));
        let response =
            sender.send_request(request.body(Zeros(size)).expect("a request")).await.expect("a response");
        assert_eq!(response.status(), 200);
        let (mut body, mut got, mut first) = (response.into_body(), 0, String::new());
        while let Some(frame) = body.frame().await {
            let data = frame.expect("the whole body").into_data().unwrap_or_default();
            if got == 0 {
                first = String::from_utf8_lossy(&data[..data.len().min(40)]).into_owned();
            }
            got += data.len() as u64;
        }
        (got, first)
    })
}

/// The client of this test has no TCP_NODELAY: if a window ends with a partial segment, it waits 40 ms for the
/// acknowledgement. So 16 MiB take either a fraction of a second or eleven.
#[test]
fn an_upload_over_http2_does_not_wait_for_delayed_acknowledgements() {
    const SIZE: u64 = 16 * MIB;
    let server = http2_server();
    let proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", server.address()));
    let began = std::time::Instant::now();
    assert_eq!(by_http2(proxy.inbound(), "/", SIZE).1, format!("got {SIZE}"));
    assert!(began.elapsed() < std::time::Duration::from_secs(6), "{:?}", began.elapsed());
}

#[test]
fn memory_stays_flat_over_http2() {
    let server = http2_server();
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{0}\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{0}\"]\n",
        server.address()
    ));
    for address in [proxy.outbound(), proxy.inbound()] {
        let both = |size: u64| {
            assert_eq!(by_http2(address, &format!("/{size}"), 0).0, size);
            assert_eq!(by_http2(address, "/", size).1, format!("got {size}"));
        };
        both(MIB);
        let before = peak_kib(&proxy);
        both(size());
        let grown = peak_kib(&proxy).saturating_sub(before);
        assert!(grown < 16 * 1024, "{} MiB each way cost {grown} KiB of memory", size() / MIB);
    }
}

/// A connection that is always ready must not monopolise its worker, and must be polled again after it yields.
#[test]
fn thousands_of_chunks_in_one_read_are_all_forwarded() {
    const PARTS: usize = 5000;
    let server = RawServer::start(|mut stream| {
        let mut response = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        for _ in 0..PARTS {
            response.extend_from_slice(b"3\r\nabc\r\n");
        }
        response.extend_from_slice(b"0\r\n\r\n");
        let mut asked = Vec::new();
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            asked.extend_from_slice(&chunk[..count]);
            while let Some(end) = asked.windows(4).position(|window| window == b"\r\n\r\n") {
                asked.drain(..end + 4);
                if stream.write_all(&response).is_err() {
                    return;
                }
            }
        }
    });
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nlisten = \"127.0.0.1:0\"\nendpoints = [\"{}\"]\n",
        server.address()
    ));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut client = RawClient::connect(proxy.upstream("up"));
                for _ in 0..10 {
                    let response = client.ask("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
                    assert_eq!(response.body.len(), 3 * PARTS);
                }
            });
        }
    });
    assert!(server.connections() <= 4, "{} connections for 4 clients", server.connections());
}

/// Each side may send everything before it reads: the proxy must not make them wait for each other.
#[test]
fn an_upload_continues_while_its_response_is_unread() {
    const LENGTH: u64 = 32 * MIB;
    let server = RawServer::start(|mut stream| {
        let (mut chunk, mut head) = (vec![b'y'; 64 * 1024], Vec::new());
        while !head.windows(4).any(|window| window == b"\r\n\r\n") {
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(count) => head.extend_from_slice(&chunk[..count]),
            }
        }
        let end = head.windows(4).position(|window| window == b"\r\n\r\n").map_or(0, |at| at + 4);
        let mut got = (head.len() - end) as u64;
        let mut writing = stream.try_clone().expect("a handle");
        let writer = thread::spawn(move || {
            let _ =
                write!(writing, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {LENGTH}\r\n\r\n");
            let part = vec![b'x'; 64 * 1024];
            for _ in 0..LENGTH / part.len() as u64 {
                if writing.write_all(&part).is_err() {
                    return;
                }
            }
        });
        while got < LENGTH {
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(count) => got += count as u64,
            }
        }
        let _ = writer.join();
    });
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nlisten = \"127.0.0.1:0\"\nendpoints = [\"{}\"]\n",
        server.address()
    ));
    let mut client = RawClient::connect(proxy.upstream("up"));
    assert!(client.send(format!("POST / HTTP/1.1\r\nHost: up\r\nContent-Length: {LENGTH}\r\n\r\n")));
    let part = vec![b'z'; 64 * 1024];
    for sent in 0..LENGTH / part.len() as u64 {
        assert!(client.send(&part), "stuck after {sent} parts");
    }
    let (mut got, mut chunk) = (0_u64, vec![0; 64 * 1024]);
    while got < LENGTH {
        match client.stream.read(&mut chunk) {
            Ok(0) | Err(_) => panic!("the answer broke off after {got} bytes"),
            Ok(count) => got += count as u64,
        }
    }
}

/// No read follows the trailers; the connection is free for the next request all the same.
#[test]
fn a_connection_is_reused_after_a_response_with_trailers() {
    let server = RawServer::start(|mut stream| {
        let mut chunk = [0; 4096];
        while let Ok(1..) = stream.read(&mut chunk) {
            let response = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n\
                          3\r\nabc\r\n0\r\nx-sum: 7\r\n\r\n";
            if stream.write_all(response.as_bytes()).is_err() {
                return;
            }
        }
    });
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nlisten = \"127.0.0.1:0\"\nendpoints = [\"{}\"]\n",
        server.address()
    ));
    let mut client = RawClient::connect(proxy.upstream("up"));
    for _ in 0..5 {
        let response = client.ask("GET / HTTP/1.1\r\nHost: up\r\nTE: trailers\r\n\r\n");
        assert_eq!(response.body, b"abc");
        assert_eq!(response.trailers, [("x-sum".to_owned(), "7".to_owned())]);
    }
    assert_eq!(server.connections(), 1);
}
