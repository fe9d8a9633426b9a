//! Start, reload, drain, and `run -- CMD`.

use std::{
    io::{Read, Write},
    process::Command,
    sync::mpsc,
};

use crate::support::{
    Launch, Proxy, RawClient, RawServer, Upstream, binary, eventually,
    h2::{self, H2Client},
    text,
};

const GET: &str = "GET / HTTP/1.1\r\nHost: up\r\n\r\n";

fn shell(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

/// Runs until the service ends; the exit code.
#[track_caller]
fn code_of(script: &str) -> Option<i32> {
    Launch::new("").service(shell(script)).spawn().wait().code()
}

fn upstream(name: &str, server: &Upstream) -> String {
    format!("[[upstream]]\nname = \"{name}\"\nendpoints = [\"{}\"]\n", server.address())
}

#[test]
fn run_exits_with_the_services_exit_code() {
    assert_eq!(code_of("exit 0"), Some(0));
    assert_eq!(code_of("exit 7"), Some(7));
    assert_eq!(code_of("kill -KILL $$"), Some(128 + 9));
    assert_eq!(Launch::new("").service(["/no/such/program"]).spawn().wait().code(), Some(127));
}

#[test]
fn the_service_gets_the_proxy_environment_variables() {
    let script = "echo \"$http_proxy|$HTTP_PROXY|$https_proxy|$HTTPS_PROXY|$NODE_USE_ENV_PROXY|$no_proxy|$NO_PROXY\"; sleep 60";
    let proxy = Launch::new("").env("no_proxy", "db.internal").service(shell(script)).start();
    eventually("the service's words", || proxy.stdout().contains('\n'));
    let said = proxy.stdout();
    let words: Vec<&str> = said.trim().split('|').collect();
    let url = format!("http://127.0.0.1:{}", proxy.outbound().port());
    for word in &words[..4] {
        assert_eq!(word.trim_end_matches('/').replace("localhost", "127.0.0.1"), url, "{said}");
    }
    assert_eq!(words[4], "1");
    for word in &words[5..] {
        for part in ["db.internal", "localhost", "127.0.0."] {
            assert!(word.contains(part), "{part} is not in no_proxy: {said}");
        }
    }
}

#[test]
fn a_service_that_handles_sigterm_exits_by_itself() {
    let script = "trap 'echo terminated; exit 3' TERM; echo up; while :; do sleep 0.05; done";
    let mut proxy = Launch::new("").service(shell(script)).start();
    eventually("the service to be up", || proxy.stdout().contains("up"));
    proxy.signal("TERM");
    assert_eq!(proxy.wait().code(), Some(3));
    assert!(proxy.stdout().contains("terminated"));
}

#[test]
fn a_service_that_ignores_sigterm_is_killed() {
    let script = "trap '' TERM; echo up; while :; do sleep 0.05; done";
    let mut proxy = Launch::new("[runtime]\ndrain_timeout = \"1s\"\n").service(shell(script)).start();
    eventually("the service to be up", || proxy.stdout().contains("up"));
    proxy.signal("TERM");
    assert_eq!(proxy.wait().code(), Some(128 + 9));
}

#[test]
fn a_second_sigterm_stops_at_once() {
    let (arrived, arrival) = mpsc::channel();
    let server = RawServer::start(move |mut stream| {
        let _ = stream.read(&mut [0; 1000]);
        let _ = arrived.send(());
        let _ = stream.read(&mut [0; 1000]); // never answers
    });
    let mut proxy = Proxy::start(format!(
        "[runtime]\ndrain_timeout = \"10m\"\n[inbound]\nforward_to = \"{}\"\n",
        server.address()
    ));
    let mut client = RawClient::connect(proxy.inbound());
    client.send(GET);
    arrival.recv().expect("the request reaches the service");
    proxy.signal("TERM");
    eventually("the first to be noticed", || ready(&proxy) != 200);
    assert!(proxy.is_running(), "a request is in flight");
    proxy.signal("TERM");
    proxy.wait();
}

/// The status of `/ready`; 0 if nothing listens.
fn ready(proxy: &Proxy) -> u16 {
    let Ok(stream) = std::net::TcpStream::connect(proxy.admin()) else { return 0 };
    let mut client = RawClient { stream, buffer: Vec::new() };
    client.send("GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    client.response().ok().flatten().map_or(0, |response| response.status())
}

/// SIGTERM: `/ready` fails, requests in flight finish, then the process exits with 0.
#[test]
fn requests_in_flight_finish_during_the_drain() {
    let (arrived, arrival) = mpsc::channel();
    let (go, may_answer) = mpsc::channel::<()>();
    let may_answer = std::sync::Mutex::new(may_answer);
    let server = RawServer::start(move |mut stream| {
        let _ = stream.read(&mut [0; 1000]);
        let _ = arrived.send(());
        let _ = may_answer.lock().expect("no panic").recv();
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate");
    });
    let mut proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", server.address()));
    assert_eq!(ready(&proxy), 200);
    let mut client = RawClient::connect(proxy.inbound());
    client.send(GET);
    arrival.recv().expect("the request reaches the service");
    proxy.signal("TERM");
    eventually("/ready to fail", || ready(&proxy) != 200);
    eventually("the listener to close", || std::net::TcpStream::connect(proxy.inbound()).is_err());
    go.send(()).expect("the server waits");
    let response = client.response().expect("well-formed").expect("a response");
    assert_eq!(response.text(), "late");
    assert_eq!(response.field("connection"), Some("close"), "{response:?}");
    assert_eq!(proxy.wait().code(), Some(0));
}

/// The same over HTTP/2: the client gets GOAWAY; streams in flight finish, and so does one that crosses it.
#[test]
fn http2_streams_in_flight_finish_during_the_drain() {
    let (arrived, arrival) = mpsc::channel();
    let may_answer = std::sync::Arc::new(tokio::sync::Notify::new());
    let go = may_answer.clone();
    let server = Upstream::h2c(move |request| {
        let (arrived, may_answer) = (arrived.clone(), may_answer.clone());
        async move {
            if request.uri().path() == "/slow" {
                let _ = arrived.send(());
                may_answer.notified().await;
            }
            text("done")
        }
    });
    let mut proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", server.address()));
    let mut client = H2Client::connect(proxy.inbound());
    client.must_get(1, "/");
    client.headers(3, &h2::get("/slow"), true);
    arrival.recv().expect("the request reaches the service");
    proxy.signal("TERM");
    let goaway = |client: &mut H2Client| loop {
        let frame = client.next().expect("a frame");
        if frame.kind == h2::GOAWAY {
            let number =
                |at: usize| u32::from_be_bytes(frame.payload[at..at + 4].try_into().expect("four bytes"));
            return (number(0) & 0x7fff_ffff, number(4));
        }
    };
    let (last, code) = goaway(&mut client);
    assert_eq!(code, 0, "it is no error");
    assert!(last >= 5, "what crosses the GOAWAY is still taken: {last}");
    // Sent before the client could know: it is served.
    client.headers(5, &h2::get("/"), true);
    assert_eq!(client.end_of(5), h2::End::Response(Some(200)));
    eventually("the listener to close", || std::net::TcpStream::connect(proxy.inbound()).is_err());
    assert!(proxy.is_running(), "a stream is in flight");
    go.notify_one();
    assert_eq!(client.end_of(3), h2::End::Response(Some(200)));
    assert_eq!(proxy.wait().code(), Some(0));
}

/// As the first process of a container: the exit code is passed on, and orphans do not stay zombies.
#[test]
fn runs_as_pid_1() {
    let wrapper = ["unshare", "--pid", "--fork", "--mount-proc"];
    let may = Command::new(wrapper[0]).args(&wrapper[1..]).arg("true").output();
    if !may.is_ok_and(|output| output.status.success()) {
        crate::support::skip("no right to make a PID namespace");
        return;
    }
    // An orphan exits while the service runs; its parent is then the proxy.
    let script =
        "(sh -c 'sleep 0.2' &) ; sleep 1; grep -l '^State:.Z' /proc/[0-9]*/status; cat /proc/1/comm; exit 5";
    let mut proxy = Launch::new("").wrapped(wrapper).service(shell(script)).spawn();
    assert_eq!(proxy.wait().code(), Some(5), "{}", proxy.stderr());
    let name = binary().file_name().expect("a name").to_string_lossy().into_owned();
    assert_eq!(proxy.stdout().trim(), name, "zombies, or not PID 1");
}

#[test]
fn usage_and_configuration_errors_are_reported() {
    let usage = Command::new(binary()).args(["run", "--no-such-flag"]).output().expect("it runs");
    assert_eq!(usage.status.code(), Some(2));
    let mut proxy = Launch::new("[inbound]\nlisten_on = \"127.0.0.1:0\"\n").spawn();
    assert_eq!(proxy.wait().code(), Some(1));
    let said = proxy.stderr();
    assert!(said.contains("listen_on") && said.contains("outrigger.toml"), "{said}");
}

/// A valid change takes effect while a connection stays open; an invalid one is reported and changes nothing.
#[test]
fn a_reload_keeps_connections() {
    let (one, two) = (Upstream::http1(|_| async { text("one") }), Upstream::http1(|_| async { text("two") }));
    let proxy = Proxy::start(upstream("up", &one));
    let mut client = RawClient::connect(proxy.outbound());
    assert_eq!(client.ask(GET).text(), "one");
    proxy.reconfigure(&upstream("up", &two));
    proxy.signal("HUP");
    eventually("the change to take effect", || client.ask(GET).text() == "two");
    let before = proxy.stderr().len();
    proxy.reconfigure("[nonsense]\n");
    proxy.signal("HUP");
    eventually("the error to be reported", || proxy.stderr()[before..].contains("nonsense"));
    assert_eq!(client.ask(GET).text(), "two");
    proxy.reconfigure(&upstream("up", &one));
    proxy.signal("HUP");
    eventually("the next change to take effect", || client.ask(GET).text() == "one");
}

/// The file is watched: a change needs neither signal nor restart.
#[test]
fn a_changed_configuration_file_is_reloaded() {
    let (one, two) = (Upstream::http1(|_| async { text("one") }), Upstream::http1(|_| async { text("two") }));
    let proxy = Proxy::start(upstream("up", &one));
    let mut client = RawClient::connect(proxy.outbound());
    assert_eq!(client.ask(GET).text(), "one");
    proxy.reconfigure(&upstream("up", &two));
    eventually("the change to take effect", || client.ask(GET).text() == "two");
}

#[test]
fn the_admin_port_requires_the_token_for_changes() {
    let proxy = Proxy::start("");
    let ask = |request: &str| RawClient::connect(proxy.admin()).ask(request);
    for path in ["/live", "/ready", "/status", "/metrics", "/config"] {
        let response = ask(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
        assert_eq!(response.status(), 200, "{path}: {response:?}");
    }
    let rebound = ask("GET /status HTTP/1.1\r\nHost: evil.example\r\n\r\n");
    assert!(rebound.status() >= 400, "a page of evil.example may read the status: {rebound:?}");
    let bare = ask("POST /drain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n");
    assert!(matches!(bare.status(), 401 | 403), "{bare:?}");
    let file = proxy.ready()["admin_token_file"].as_str().expect("a token file").to_owned();
    let token = std::fs::read_to_string(file).expect("readable");
    let response = ask(&format!(
        "POST /drain HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nContent-Length: 0\r\n\r\n",
        token.trim()
    ));
    assert!((200..300).contains(&response.status()), "{response:?}");
    eventually("/ready to fail", || ready(&proxy) == 503);
}

/// Ctrl-C: idle connections of the service do not delay the exit by `drain_timeout`; SIGTERM waits for the service.
#[test]
fn ctrl_c_does_not_wait_for_keep_alive_connections() {
    let server = Upstream::http1(|_| async { text("up") });
    let config = format!("[runtime]\ndrain_timeout = \"10m\"\n{}", upstream("up", &server));
    let mut proxy = Proxy::start(config.clone());
    let mut client = RawClient::connect(proxy.outbound());
    assert_eq!(client.ask(GET).text(), "up");
    proxy.signal("INT");
    assert_eq!(proxy.wait().code(), Some(0));

    let mut proxy = Proxy::start(config);
    let mut client = RawClient::connect(proxy.outbound());
    assert_eq!(client.ask(GET).text(), "up");
    proxy.signal("TERM");
    eventually("inbound to be drained", || proxy.stderr().contains("inbound is drained"));
    assert_eq!(client.ask(GET).text(), "up", "the service may still send requests");
    drop(client);
    assert_eq!(proxy.wait().code(), Some(0));
}
