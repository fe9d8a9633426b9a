//! A service that responds to an upload before it has read it, and closes: its response must reach the client.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    thread,
};

use rustls::{ServerConnection, StreamOwned};

use crate::support::{Proxy, RawClient, RawServer, pki::Pki, tls::server_config};

const UPLOADS: usize = 60;
const LARGE: usize = 1 << 20;
/// How much of an upload the TLS server reads after its response, in bytes.
const READ_ON: u64 = 200_000;

/// Responds with 413 as soon as it has the head, and closes with most of the request unread, which resets the
/// connection.
fn refuse(stream: &mut (impl Read + Write)) {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => return,
        }
    }
    let refusal = "HTTP/1.1 413 Content Too Large\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlarge";
    let _ = stream.write_all(refusal.as_bytes());
}

fn refusing() -> RawServer {
    RawServer::start(|mut stream: TcpStream| refuse(&mut stream))
}

/// The same over TLS. It reads a little more of the request: otherwise the kernel may reset the connection before the
/// response has arrived.
fn refusing_by_tls(pki: &Pki) -> RawServer {
    let config = Arc::new(server_config(&pki.issue("up", |_| {}), None, &["http/1.1"]));
    RawServer::start(move |stream: TcpStream| {
        let connection = ServerConnection::new(Arc::clone(&config)).expect("a connection");
        let mut stream = StreamOwned::new(connection, stream);
        refuse(&mut stream);
        let _ = stream.take(READ_ON).read_to_end(&mut Vec::new());
    })
}

/// How many uploads got the service's own response.
fn answered(to: SocketAddr, chunked: bool) -> usize {
    let got_answer = |number: usize| {
        let mut client = RawClient::connect(to);
        let framing = if chunked {
            "Transfer-Encoding: chunked".to_owned()
        } else {
            format!("Content-Length: {LARGE}")
        };
        client.send(format!("POST / HTTP/1.1\r\nHost: up\r\n{framing}\r\n\r\n"));
        let piece = vec![b'x'; 16 * 1024];
        for _ in 0..LARGE / piece.len() {
            let sent = match chunked {
                true => client.send([b"4000\r\n", &piece[..], b"\r\n"].concat()),
                false => client.send(&piece),
            };
            if !sent {
                break;
            }
            if number.is_multiple_of(2) {
                thread::yield_now();
            }
        }
        if chunked {
            client.send("0\r\n\r\n");
        }
        client.response().is_ok_and(|response| response.is_some_and(|response| response.status() == 413))
    };
    (0..UPLOADS).filter(|number| got_answer(*number)).count()
}

#[test]
fn an_upload_rejected_early_gets_the_response() {
    let service = refusing();
    let address = service.address();
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{address}\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{address}\"]\n"
    ));
    for chunked in [false, true] {
        let direct = answered(address, chunked);
        for way in [proxy.outbound(), proxy.inbound()] {
            let through = answered(way, chunked);
            assert!(through >= direct, "chunked: {chunked}: {through} of {UPLOADS}, direct {direct}");
        }
    }
}

/// A response received over TLS before the connection was reset can still be read.
#[test]
fn an_upload_that_is_refused_early_over_tls_gets_the_refusal() {
    let pki = Pki::new();
    let (ca, service) = (pki.write_ca(), refusing_by_tls(&pki));
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\ntls = \"simple\"\nserver_name = \"localhost\"\nca = {ca:?}\n",
        service.address()
    ));
    for chunked in [false, true] {
        assert_eq!(answered(proxy.outbound(), chunked), UPLOADS, "chunked: {chunked}");
    }
}
