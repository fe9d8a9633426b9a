//! A service that responds to an upload before it has read it, and closes: its response must reach the client.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
};

use crate::support::{Proxy, RawClient, RawServer};

const UPLOADS: usize = 60;
const LARGE: usize = 1 << 20;

/// Responds with 413 as soon as it has the head, and closes with most of the request unread, which resets the
/// connection.
fn refusing() -> RawServer {
    RawServer::start(|mut stream: TcpStream| {
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read(&mut byte) {
                Ok(1) => head.push(byte[0]),
                _ => return,
            }
        }
        let refusal = "HTTP/1.1 413 Content Too Large\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlarge";
        let _ = stream.write_all(refusal.as_bytes());
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
