//! Two pods with sidecars, and one without.

use std::{
    fs,
    io::Read,
    net::{SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt,
    sync::Arc,
};

use serde_json::Value;

use crate::support::{
    Answer, Daemon, Launch, Proxy, RawClient, RawServer, Upstream, binary_for_all, eventually, has_tool,
    netns::{Lan, PROXY_USER, Pod},
    pki::{Pki, id},
    text,
    tls::{TlsCaller, TlsServer},
};

pub fn at(port: u16) -> SocketAddr {
    format!("[::]:{port}").parse().expect("an address")
}

/// A service that says who called it, and by which way in.
pub fn service(pod: &Pod, port: u16, word: &'static str) -> Upstream {
    pod.run(|| {
        Upstream::at(at(port), false, move |_, request| async move {
            let field = |name| request.headers().get(name).map_or("-", |value| value.to_str().unwrap_or("?"));
            let (by, via) = (field("x-forwarded-client-cert"), field("via"));
            text(format!("{word} host={} by={by} via={via}", field("host"))) as Answer
        })
    })
}

/// Every user may read its certificates.
pub fn pki() -> Pki {
    let pki = Pki::new();
    fs::set_permissions(pki.path(""), fs::Permissions::from_mode(0o755)).expect("chmod");
    pki
}

pub fn sidecar(pod: &Pod, config: &str) -> Proxy {
    pod.redirected(&["apply"]);
    Launch::new(config).in_pod(pod).start()
}

pub fn ask(pod: &Pod, address: SocketAddr, host: &str) -> (u16, String) {
    ask_for(pod, address, "/", host)
}

pub fn ask_for(pod: &Pod, address: SocketAddr, path: &str, host: &str) -> (u16, String) {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let answer = pod.run(|| RawClient::connect(address).ask(&request));
    (answer.status(), answer.text())
}

fn admin(pod: &Pod, path: &str) -> (u16, String) {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let answer = pod.run(|| RawClient::connect("127.0.0.1:4191".parse().expect("an address")).ask(&request));
    (answer.status(), answer.text())
}

#[track_caller]
fn counted(pod: &Pod, metric: &str) {
    eventually(metric, || admin(pod, "/metrics").1.lines().any(|line| line.starts_with(metric)));
}

/// What comes to a connection on which nothing is said.
fn listen(pod: &Pod, address: SocketAddr) -> String {
    pod.run(|| {
        let mut said = [0; 64];
        let count = RawClient::connect(address).stream.read(&mut said).unwrap_or(0);
        String::from_utf8_lossy(&said[..count]).into_owned()
    })
}

#[test]
fn calls_pass_by_both_sidecars_with_mutual_tls_and_nobody_else_gets_in() {
    let Some(lan) = Lan::new() else { return };
    let (caller, callee, stranger, pki) = (lan.pod(), lan.pod(), lan.pod(), pki());
    let _service = service(&callee, 8080, "payments");
    let strict = format!("{}[inbound]\nmtls = \"strict\"\n", pki.identity("payments"));
    let mut there = sidecar(&callee, &strict);
    let upstream = |name: &str, address: SocketAddr| {
        format!(
            "[[upstream]]\nname = \"{name}\"\nendpoints = [\"{address}\"]\ntls = \"mutual\"\nidentity = [\"{}\"]\n",
            id("payments")
        )
    };
    let [v4, v6] = callee.addresses(8080);
    let config = pki.identity("checkout") + &upstream("payments", v4) + &upstream("payments6", v6);
    let _here = sidecar(&caller, &config);
    for (name, address) in [("payments", v4), ("payments6", v6)] {
        let (status, body) = ask(&caller, address, name);
        assert_eq!(status, 200, "{body}");
        assert!(
            body.starts_with(&format!("payments host={name} ")) && body.contains(&id("checkout")),
            "{body}"
        );
        // A name that no upstream has, as of one pod of a headless service: found by its address.
        let (status, body) = ask(&caller, address, "payments-0.payments:8080");
        assert_eq!(status, 200, "{body}");
        assert!(body.contains("host=payments-0.payments:8080 ") && body.contains(&id("checkout")), "{body}");
        // Without a sidecar there is no certificate.
        let (status, body) = ask(&stranger, address, "payments");
        assert_eq!(status, 403, "{body}");
    }
    counted(&caller, "outrigger_calls_total{way=\"redirect\"} 4");
    counted(&caller, "outrigger_detected_total{direction=\"outbound\",port=\"8080\",protocol=\"http1\"} 4");
    counted(&callee, "outrigger_connections{direction=\"inbound\",tls=\"mutual\",state=\"open\"}");

    // Killed, it is missed: nothing goes around it.
    there.signal("KILL");
    there.wait();
    for address in [v4, v6] {
        let refused = stranger.run(|| TcpStream::connect(address).map_err(|error| error.kind()));
        assert_eq!(refused.err(), Some(std::io::ErrorKind::ConnectionRefused));
        let (status, body) = ask(&caller, address, "payments-0.payments:8080");
        assert_eq!(status, 502, "{body}");
        assert!(body.contains("connect_refused"), "{body}");
    }
}

#[test]
fn what_no_upstream_names_goes_where_it_was_going() {
    let Some(lan) = Lan::new() else { return };
    let (caller, other) = (lan.pod(), lan.pod());
    let _service = service(&other, 8080, "other");
    let config = |unknown: &str| {
        format!("[outbound]\nunknown = \"{unknown}\"\ndeny_networks = [\"10.77.0.0/24\", \"fd77::/64\"]\n")
    };
    let proxy = sidecar(&caller, &config("forward"));
    for address in other.addresses(8080) {
        let (status, body) = ask(&caller, address, "any.example");
        assert_eq!(status, 200, "{body}");
        assert!(body.starts_with("other host=any.example ") && body.contains("outrigger"), "{body}");
    }
    proxy.reconfigure(&config("deny"));
    eventually("the refusal", || ask(&caller, other.addresses(8080)[0], "any.example").0 == 403);
    let (_, body) = ask(&caller, other.addresses(8080)[1], "any.example");
    assert!(body.contains("unknown_upstream") && body.contains("fd77::"), "{body}");
    assert_eq!(listen(&caller, other.addresses(8080)[0]), "");
}

/// The caller says nothing until the server has: mail, databases. In plaintext, and between sidecars.
#[test]
fn who_waits_for_the_server_to_speak_is_not_kept_waiting() {
    let Some(lan) = Lan::new() else { return };
    let (caller, callee, pki) = (lan.pod(), lan.pod(), pki());
    let banner = |mut stream: TcpStream| {
        use std::io::Write;
        let _ = stream.write_all(b"220 mail.example\r\n");
        let mut rest = [0; 64];
        while stream.read(&mut rest).is_ok_and(|count| count > 0) {}
    };
    let _mail = callee.run(|| RawServer::start_at(at(2525), banner));
    let strict = format!("{}[inbound]\nmtls = \"permissive\"\n", pki.identity("payments"));
    let there = sidecar(&callee, &strict);
    let [v4, v6] = callee.addresses(2525);
    let upstream = format!(
        "[[upstream]]\nname = \"mail\"\nendpoints = [\"{v6}\"]\ntls = \"mutual\"\nidentity = [\"{}\"]\n",
        id("payments")
    );
    let here = sidecar(&caller, &(pki.identity("checkout") + &upstream));
    for address in [v4, v6] {
        assert_eq!(listen(&caller, address), "220 mail.example\r\n", "{}{}", here.stderr(), there.stderr());
    }
    counted(
        &caller,
        "outrigger_detected_total{direction=\"outbound\",port=\"2525\",protocol=\"server_first\"} 2",
    );
    counted(
        &callee,
        "outrigger_detected_total{direction=\"inbound\",port=\"2525\",protocol=\"server_first\"} 2",
    );
    counted(&callee, "outrigger_tls_handshakes_total{direction=\"inbound\",outcome=\"full\"} 1");
    eventually("a hint", || here.stderr().contains("connections to port 2525 wait for their server"));
}

/// Whatever the caller says first: HTTP passes as bytes, to which else each sidecar would put its name.
#[test]
fn what_is_declared_is_not_detected() {
    let Some(lan) = Lan::new() else { return };
    let (caller, callee) = (lan.pod(), lan.pod());
    let _services = [service(&callee, 8080, "declared"), service(&callee, 8081, "detected")];
    let _there = sidecar(&callee, "[[inbound.port]]\nport = 8080\nprotocol = \"tcp\"\n");
    let [v4, v6] = callee.addresses(8080);
    let raw = format!("[[upstream]]\nname = \"raw\"\nendpoints = [\"{v4}\", \"{v6}\"]\nprotocol = \"tcp\"\n");
    let _here = sidecar(&caller, &raw);
    for family in 0..2 {
        let named = |port| ask(&caller, callee.addresses(port)[family], "any.example").1;
        assert!(named(8080).ends_with("via=-"), "{}", named(8080));
        assert!(named(8081).contains("via=1.1 outrigger"), "{}", named(8081));
    }
}

/// A real database and its real client; and one that connects and is silent, as pools are.
#[test]
fn redis_is_carried_between_sidecars() {
    let Some(lan) = Lan::new() else { return };
    if !has_tool(&["redis-server", "redis-cli"]) {
        return;
    }
    let (caller, callee, pki) = (lan.pod(), lan.pod(), pki());
    let mut start = callee.as_user(0);
    start.extend(
        ["redis-server", "--bind", "*", "-::*", "--protected-mode", "no", "--save", ""].map(str::to_owned),
    );
    let words: Vec<&str> = start.iter().map(String::as_str).collect();
    let redis = Daemon::start(words[0], &words[1..], &[]);
    redis.wait_for_output("Ready to accept connections");
    let strict = format!("{}[inbound]\nmtls = \"strict\"\n", pki.identity("payments"));
    let _there = sidecar(&callee, &strict);
    let addresses = callee.addresses(6379);
    let endpoints = addresses.map(|address| format!("\"{address}\"")).join(", ");
    let upstream = format!(
        "[[upstream]]\nname = \"redis\"\nendpoints = [{endpoints}]\ntls = \"mutual\"\nidentity = [\"{}\"]\n",
        id("payments")
    );
    let _here = sidecar(&caller, &(pki.identity("checkout") + &upstream));
    for address in addresses {
        let mut silent = caller.run(|| RawClient::connect(address));
        counted(&callee, "outrigger_connections{direction=\"inbound\",tls=\"mutual\",state=\"open\"} 1");
        let ip = address.ip().to_string();
        let set = caller.command(0, &["redis-cli", "-h", &ip, "set", "outrigger", "afloat"]);
        assert_eq!(String::from_utf8_lossy(&set.stdout).trim(), "OK");
        // As by hand; it begins as HTTP does.
        silent.send("GET outrigger\r\n");
        assert_eq!(String::from_utf8_lossy(&silent.read_until(b"afloat\r\n")), "$6\r\nafloat\r\n");
    }
    counted(&caller, "outrigger_detected_total{direction=\"outbound\",port=\"6379\",protocol=\"bytes\"} 4");
}

/// A caller that connects ahead of its first request is taken for no mail client.
#[test]
fn http_that_comes_late_is_not_missed() {
    let Some(lan) = Lan::new() else { return };
    let (caller, other) = (lan.pod(), lan.pod());
    let service = Arc::new(other.run(|| {
        RawServer::start_at(at(8080), |mut stream| {
            let mut seen = [0; 1024];
            if stream.read(&mut seen).is_ok_and(|count| count > 0) {
                use std::io::Write;
                let via = seen.windows(4).any(|four| four.eq_ignore_ascii_case(b"via:"));
                let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{via:<5}");
            }
        })
    }));
    let _proxy = sidecar(&caller, "");
    for (already, address) in other.addresses(8080).into_iter().enumerate() {
        let seen = Arc::clone(&service);
        let answer = caller.run(|| {
            let mut client = RawClient::connect(address);
            eventually("the proxy asks the server", || seen.connections() > 2 * already);
            client.ask("GET / HTTP/1.1\r\nHost: late\r\n\r\n")
        });
        assert_eq!(answer.text(), "true ");
    }
    counted(&caller, "outrigger_detected_total{direction=\"outbound\",port=\"8080\",protocol=\"http1\"} 2");
}

#[test]
fn tls_of_the_services_own_goes_to_whom_it_names() {
    let Some(lan) = Lan::new() else { return };
    let (caller, other, pki) = (lan.pod(), lan.pod(), pki());
    let certificate = pki.issue("secure", |_| {});
    let _server = other.run(|| TlsServer::start_at(at(8443), &certificate, None, &[]));
    let [v4, v6] = other.addresses(8443);
    // The server's TLS is the caller's business: it is not wrapped once more.
    let named = format!("[[upstream]]\nname = \"localhost\"\nendpoints = [\"{v4}\"]\ntls = \"simple\"\n");
    let _proxy = sidecar(&caller, &named);
    let nobody: SocketAddr = "10.77.0.200:8443".parse().expect("an address");
    for address in [v6, nobody] {
        let said = caller.run(|| TlsCaller::new(None, &[]).say(address, "GET / HTTP/1.1\r\n\r\n"));
        assert!(said.as_ref().is_ok_and(|said| said.ends_with("hello")), "{address}: {said:?}");
    }
    counted(&caller, "outrigger_detected_total{direction=\"outbound\",port=\"8443\",protocol=\"tls\"} 2");
}

#[test]
fn each_port_of_the_service_is_reached_and_may_differ() {
    let Some(lan) = Lan::new() else { return };
    let (callee, stranger, pki) = (lan.pod(), lan.pod(), pki());
    let services = [service(&callee, 8080, "calls"), service(&callee, 9090, "metrics")];
    let config = format!(
        "{}[inbound]\nmtls = \"strict\"\nforward_to = \"127.0.0.1:8080\"\n[inbound.limits]\nmax_requests = 7\n[inbound.breaker]\nconsecutive_failures = 10\n[[inbound.port]]\nport = 9090\nmtls = \"off\"\n",
        pki.identity("payments")
    );
    let proxy = sidecar(&callee, &config);
    for family in 0..2 {
        assert_eq!(ask(&stranger, callee.addresses(8080)[family], "a").0, 403);
        let (status, body) = ask(&stranger, callee.addresses(9090)[family], "a");
        assert_eq!((status, body.starts_with("metrics host=a")), (200, true), "{body}");
        // Nobody there: an answer that says so.
        let (status, body) = ask(&stranger, callee.addresses(4192)[family], "a");
        assert_eq!(status, 404, "the probes' port is not redirected: {body}");
    }
    proxy.reconfigure(&config.replace("strict", "permissive"));
    // Less security is held back until it is confirmed.
    proxy.signal("HUP");
    eventually("plaintext", || ask(&stranger, callee.addresses(8080)[0], "a").0 == 200);
    let (status, body) = ask(&stranger, callee.addresses(8081)[0], "a");
    assert_eq!((status, body.contains("connect_refused")), (502, true), "{body}");
    // Who names the proxy's own port is led nowhere: it is for the service.
    let (status, body) = ask(&stranger, callee.addresses(4143)[0], "a");
    assert_eq!((status, body.starts_with("calls ")), (200, true), "{body}");

    // Each address that was called has limits of its own, and is shown.
    let status: Value = serde_json::from_str(&admin(&callee, "/status").1).expect("JSON");
    let called = status["inbound_addresses"]["addresses"].as_array().expect("addresses");
    let limit = |address: SocketAddr| {
        called.iter().find(|one| one["name"] == address.to_string()).map(|one| &one["limits"]["max_requests"])
    };
    for port in [8080, 9090] {
        for address in callee.addresses(port) {
            assert_eq!(limit(address), Some(&7.into()), "{address} in {status:#}");
        }
    }
    let shown = callee.command(0, &[binary_for_all().to_str().expect("a path"), "status"]);
    let row = format!("(the service at {})", callee.addresses(8080)[1]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains(&row), "{shown:?}");

    // And a breaker, that can be set.
    for address in callee.addresses(8080) {
        let (binary, name) = (binary_for_all(), address.to_string());
        let words = [binary.to_str().expect("a path"), "set", "breaker", &name, "open"];
        let set = callee.command(PROXY_USER, &words);
        assert!(set.status.success(), "{}", String::from_utf8_lossy(&set.stderr));
        let (status, body) = ask(&stranger, address, "a");
        assert_eq!((status, body.contains("breaker_open")), (503, true), "{body}");
    }
    assert_eq!(ask(&stranger, callee.addresses(9090)[0], "a").0, 200);
    drop(services);
}

/// Rules of others lead connections here too: a port of the node that is published. Those were not redirected.
#[test]
fn what_others_led_here_is_not_taken_for_our_own() {
    let Some(lan) = Lan::new() else { return };
    let (pod, stranger) = (lan.pod(), lan.pod());
    let _services = [service(&pod, 8080, "calls"), service(&pod, 80, "wrong")];
    let published = format!(
        "add table ip other {{ chain c {{ type nat hook prerouting priority -110; ip daddr 10.99.0.1 tcp dport 80 dnat to {0}:4143; ip daddr 10.99.0.1 tcp dport 81 dnat to {0}:4140; }} ; }}",
        pod.v4
    );
    let done = pod.command(0, &["nft", &published]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    stranger.command(0, &["ip", "route", "add", "10.99.0.1/32", "via", &pod.v4.to_string()]);
    let config = "[inbound]\nforward_to = \"127.0.0.1:8080\"\n[outbound]\nlisten = \"0.0.0.0:4140\"\n[[upstream]]\nname = \"named\"\nendpoints = [\"127.0.0.1:8080\"]\n";
    let _proxy = sidecar(&pod, config);
    // To the inbound port: for the service at `forward_to`, not for port 80 of an address that is not the pod's.
    let address = |port| SocketAddr::from(([10, 99, 0, 1], port));
    let (status, body) = ask(&stranger, address(80), "a");
    assert_eq!((status, body.starts_with("calls host=a")), (200, true), "{body}");
    // To the outbound port: whom the request names, with `deny_networks` in force.
    let (status, body) = ask(&stranger, address(81), "named");
    assert_eq!((status, body.starts_with("calls host=named")), (200, true), "{body}");
    let (status, body) = ask(&stranger, address(81), "169.254.169.254");
    assert_eq!((status, body.contains("denied_network")), (502, true), "{body}");
    let status: Value = serde_json::from_str(&admin(&pod, "/status").1).expect("JSON");
    assert_eq!(status["ways"]["redirect"]["count"], 0, "{status}");
    assert_eq!(status["inbound_addresses"]["known"], 0, "{status}");
}

#[test]
fn without_rules_it_is_not_ready_and_says_so() {
    let Some(lan) = Lan::new() else { return };
    let pod = lan.pod();
    let _proxy = Launch::new("").in_pod(&pod).start();
    let (status, body) = admin(&pod, "/ready");
    assert_eq!(status, 503);
    assert!(body.contains("outrigger redirect apply"), "{body}");
    pod.redirected(&["apply"]);
    eventually("ready", || admin(&pod, "/ready").0 == 200);
    pod.redirected(&["clear"]);
    eventually("not ready again", || admin(&pod, "/ready").0 == 503);
    let status: Value = serde_json::from_str(&admin(&pod, "/status").1).expect("JSON");
    assert_eq!(status["connections"]["outbound"]["total"], 0, "probes are no connections: {status}");
}
