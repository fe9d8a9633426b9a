//! Single configuration keys, each by its effect on a request.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use crate::support::{Proxy, RawClient, RawServer};

/// Responds to one request on each connection with its own head, unchanged.
fn echo_head(mut stream: TcpStream) {
    let mut seen = vec![0; 4096];
    let Ok(count) = stream.read(&mut seen) else { return };
    let head = String::from_utf8_lossy(&seen[..count]).into_owned();
    let response = format!(
        "HTTP/1.1 200 OK\r\nX-MiXed-Answer: 1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{head}",
        head.len()
    );
    let _ = stream.write_all(response.as_bytes());
}

fn raw_answer(proxy: &Proxy, request: &str) -> String {
    let mut stream = TcpStream::connect(proxy.outbound()).expect("connects");
    stream.write_all(request.as_bytes()).expect("writes");
    let mut response = Vec::new();
    let _ = stream.read_to_end(&mut response);
    String::from_utf8_lossy(&response).into_owned()
}

const REQUEST: &str = "GET /old/a?b=1 HTTP/1.1\r\nHost: up\r\nX-MiXed-Ask: 1\r\nConnection: close\r\n\r\n";

fn proxy(server: &RawServer, head: &str, more: &str) -> Proxy {
    let address = server.address();
    Proxy::start(format!("{head}[[upstream]]\nname = \"up\"\nendpoints = [\"{address}\"]\n{more}\n"))
}

#[test]
fn header_case_is_preserved_where_configured() {
    let server = RawServer::start(echo_head);
    let kept = raw_answer(&proxy(&server, "", "header_case = \"preserve\""), REQUEST);
    assert!(kept.contains("X-MiXed-Answer: 1") && kept.contains("X-MiXed-Ask: 1"), "{kept}");
    let lower = raw_answer(&proxy(&server, "", ""), REQUEST);
    assert!(lower.contains("x-mixed-answer: 1") && lower.contains("x-mixed-ask: 1"), "{lower}");
}

#[test]
fn a_path_rewrite_keeps_the_query() {
    let server = RawServer::start(echo_head);
    let route = "[[upstream.route]]\nmatch = { path = \"/old*\" }\npath_rewrite = \"/new\"";
    let seen = raw_answer(&proxy(&server, "", route), REQUEST);
    assert!(seen.contains("GET /new/a?b=1 HTTP/1.1"), "{seen}");
}

#[test]
fn several_workers_serve_requests() {
    let server = RawServer::start(echo_head);
    let proxy = proxy(&server, "[runtime]\nworkers = 3\n", "");
    for _ in 0..30 {
        let response = RawClient::connect(proxy.outbound()).ask("GET / HTTP/1.1\r\nHost: up\r\n\r\n");
        assert_eq!(response.status(), 200);
    }
}

#[test]
fn max_duration_cuts_a_long_exchange() {
    let server = RawServer::start(|mut stream| {
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf");
        // Until the proxy closes.
        let _ = stream.read(&mut [0; 1]);
    });
    let response = raw_answer(&proxy(&server, "", "max_duration = \"300ms\""), REQUEST);
    assert!(response.ends_with("half"), "{response}");
}
