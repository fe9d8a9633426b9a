//! Real servers behind the proxy: nginx, HAProxy, Redis, and a server-first protocol.

use std::{
    io::{Read, Write},
    net::SocketAddr,
    process::Command,
};

use crate::support::{Daemon, Proxy, RawClient, RawServer, Upstream, free_port, has_tool, text, tool};

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn upstream(address: SocketAddr) -> String {
    format!(
        "[inbound]\nforward_to = \"{address}\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{address}\"]\n"
    )
}

/// Many requests on one connection through both listeners.
#[track_caller]
fn asks(proxy: &Proxy, path: &str, body: &str) {
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        for _ in 0..50 {
            let response = client.ask(format!("GET {path} HTTP/1.1\r\nHost: up\r\n\r\n"));
            assert_eq!((response.status(), response.text().trim_end()), (200, body));
        }
    }
}

#[test]
fn nginx_as_upstream() {
    if !has_tool(&["nginx"]) {
        return;
    }
    let port = free_port();
    let config = format!(
        "daemon off; pid @DIR@/pid; error_log stderr; worker_processes 1; events {{}}\n\
         http {{ access_log off; client_body_temp_path @DIR@/a; proxy_temp_path @DIR@/b; fastcgi_temp_path @DIR@/c;\n\
         uwsgi_temp_path @DIR@/d; scgi_temp_path @DIR@/e; keepalive_requests 7;\n\
         server {{ listen 127.0.0.1:{port}; location / {{ return 200 \"hello\"; }} \
         location /file {{ root @DIR@; }} }} }}\n"
    );
    let file = "line\n".repeat(100_000);
    let nginx =
        Daemon::start("nginx", &["-c", "@DIR@/conf", "-p", "@DIR@"], &[("conf", &config), ("file", &file)])
            .listening(local(port));
    let proxy = Proxy::start(upstream(local(port)));
    // keepalive_requests makes nginx close after every seventh request: none may fail.
    asks(&proxy, "/", "hello");
    let response = RawClient::connect(proxy.outbound())
        .ask("GET /file HTTP/1.1\r\nHost: up\r\nRange: bytes=10-14\r\n\r\n");
    assert_eq!((response.status(), response.text().as_str()), (206, "line\n"));
    let whole = RawClient::connect(proxy.inbound()).ask("GET /file HTTP/1.1\r\nHost: up\r\n\r\n");
    assert_eq!(whole.body.len(), file.len());
    drop(nginx);
}

#[test]
fn haproxy_as_upstream() {
    if !has_tool(&["haproxy"]) {
        return;
    }
    let (port, service) = (free_port(), Upstream::http1(|_| async { text("hello") }));
    let config = format!(
        "defaults\n mode http\n timeout connect 5s\n timeout client 10s\n timeout server 10s\n\
         frontend f\n bind 127.0.0.1:{port}\n default_backend b\nbackend b\n server s {}\n",
        service.address()
    );
    let _haproxy =
        Daemon::start("haproxy", &["-db", "-f", "@DIR@/conf"], &[("conf", &config)]).listening(local(port));
    let proxy = Proxy::start(upstream(local(port)));
    asks(&proxy, "/", "hello");
}

#[test]
fn redis_works_through_a_tcp_listener() {
    if !has_tool(&["redis-server", "redis-cli"]) {
        return;
    }
    let port = free_port();
    let text = port.to_string();
    let arguments = ["--port", &text, "--bind", "127.0.0.1", "--save", "", "--dir", "@DIR@"];
    let _redis = Daemon::start("redis-server", &arguments, &[]).listening(local(port));
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"redis\"\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\nendpoints = [\"127.0.0.1:{port}\"]\n"
    ));
    let way = proxy.upstream("redis").port().to_string();
    let cli = |arguments: &[&str]| {
        let mut command = Command::new(tool("redis-cli").expect("checked before"));
        let output =
            command.args(["-h", "127.0.0.1", "-p", &way]).args(arguments).output().expect("redis-cli runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let value = "v".repeat(100_000);
    assert_eq!(cli(&["SET", "key", &value]), "OK");
    assert_eq!(cli(&["GET", "key"]), value);
    assert_eq!(cli(&["-r", "100", "INCR", "n"]).lines().last(), Some("100"));
}

/// SMTP and MySQL begin with a greeting: it must arrive without a byte from the client.
#[test]
fn server_first_protocols_work_on_a_tcp_listener() {
    let server = RawServer::start(|mut stream| {
        let _ = stream.write_all(b"220 mail ESMTP\r\n");
        let mut chunk = [0; 100];
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            let _ = stream.write_all(&chunk[..count].to_ascii_uppercase());
        }
        // The client's half-close was forwarded; so must be what the server sends after it.
        let _ = stream.write_all(b"221 bye\r\n");
    });
    let port = server.address().port();
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{0}\"\n[[inbound.port]]\nport = {port}\nprotocol = \"tcp\"\n\
         [[upstream]]\nname = \"mail\"\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:0\"\nendpoints = [\"{0}\"]\n",
        server.address()
    ));
    for address in [proxy.upstream("mail"), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        assert_eq!(client.read_until(b"\r\n"), b"220 mail ESMTP\r\n");
        client.send("helo\r\n");
        assert_eq!(client.read_until(b"\r\n"), b"HELO\r\n");
        client.finish();
        assert_eq!(client.read_to_close(), (b"221 bye\r\n".to_vec(), true), "by {address}");
    }
}

/// Protocol detection forwards bytes that are not HTTP unchanged, without configuration.
#[test]
fn protocol_detection_forwards_other_protocols_inbound() {
    let server = RawServer::start(|mut stream| {
        let mut chunk = [0; 100];
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            let _ = stream.write_all(&chunk[..count]);
        }
    });
    let proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", server.address()));
    let mut client = RawClient::connect(proxy.inbound());
    client.send(b"*1\r\n$4\r\nPING\r\n");
    assert_eq!(client.read_until(b"PING\r\n"), b"*1\r\n$4\r\nPING\r\n");
}
