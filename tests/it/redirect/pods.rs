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
    Daemon, Launch, Proxy, RawClient, RawServer, Upstream, UpstreamResponse, binary_for_any_user, eventually,
    has_tool,
    netns::{Lan, PROXY_USER, Pod},
    pki::{Pki, id},
    text,
    tls::{TlsClient, TlsServer},
};

pub fn at(port: u16) -> SocketAddr {
    format!("[::]:{port}").parse().expect("an address")
}

/// A service that responds with its client and the entry point of the request.
pub fn service(pod: &Pod, port: u16, word: &'static str) -> Upstream {
    pod.run(|| {
        Upstream::at(at(port), false, move |_, request| async move {
            let field = |name| request.headers().get(name).map_or("-", |value| value.to_str().unwrap_or("?"));
            let (by, via) = (field("x-forwarded-client-cert"), field("via"));
            text(format!("{word} host={} by={by} via={via}", field("host"))) as UpstreamResponse
        })
    })
}

/// Certificates that every user may read.
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
    let response = pod.run(|| RawClient::connect(address).ask(&request));
    (response.status(), response.text())
}

fn admin(pod: &Pod, path: &str) -> (u16, String) {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let response =
        pod.run(|| RawClient::connect("127.0.0.1:4191".parse().expect("an address")).ask(&request));
    (response.status(), response.text())
}

#[track_caller]
fn counted(pod: &Pod, metric: &str) {
    eventually(metric, || admin(pod, "/metrics").1.lines().any(|line| line.starts_with(metric)));
}

/// What arrives on a connection on which the client sends nothing.
fn listen(pod: &Pod, address: SocketAddr) -> String {
    pod.run(|| {
        let mut said = [0; 64];
        let count = RawClient::connect(address).stream.read(&mut said).unwrap_or(0);
        String::from_utf8_lossy(&said[..count]).into_owned()
    })
}

#[test]
fn requests_pass_both_sidecars_with_mutual_tls_and_other_clients_are_rejected() {
    let Some(lan) = Lan::new() else { return };
    let (client, server, stranger, pki) = (lan.pod(), lan.pod(), lan.pod(), pki());
    let _service = service(&server, 8080, "payments");
    let strict = format!("{}[inbound]\nmtls = \"strict\"\n", pki.identity("payments"));
    let mut there = sidecar(&server, &strict);
    let upstream = |name: &str, address: SocketAddr| {
        format!(
            "[[upstream]]\nname = \"{name}\"\nendpoints = [\"{address}\"]\ntls = \"mutual\"\nidentity = [\"{}\"]\n",
            id("payments")
        )
    };
    let [v4, v6] = server.addresses(8080);
    let config = pki.identity("checkout") + &upstream("payments", v4) + &upstream("payments6", v6);
    let _here = sidecar(&client, &config);
    for (name, address) in [("payments", v4), ("payments6", v6)] {
        let (status, body) = ask(&client, address, name);
        assert_eq!(status, 200, "{body}");
        assert!(
            body.starts_with(&format!("payments host={name} ")) && body.contains(&id("checkout")),
            "{body}"
        );
        // A name that no upstream has, as of one pod of a headless service: reached by its address.
        let (status, body) = ask(&client, address, "payments-0.payments:8080");
        assert_eq!(status, 200, "{body}");
        assert!(body.contains("host=payments-0.payments:8080 ") && body.contains(&id("checkout")), "{body}");
        // Without a sidecar there is no certificate.
        let (status, body) = ask(&stranger, address, "payments");
        assert_eq!(status, 403, "{body}");
    }
    counted(&client, "outrigger_calls_total{way=\"redirect\"} 4");
    counted(&client, "outrigger_detected_total{direction=\"outbound\",port=\"8080\",protocol=\"http1\"} 4");
    counted(&server, "outrigger_connections{direction=\"inbound\",tls=\"mutual\",state=\"open\"}");

    // With the sidecar killed, nothing bypasses it.
    there.signal("KILL");
    there.wait();
    for address in [v4, v6] {
        let refused = stranger.run(|| TcpStream::connect(address).map_err(|error| error.kind()));
        assert_eq!(refused.err(), Some(std::io::ErrorKind::ConnectionRefused));
        let (status, body) = ask(&client, address, "payments-0.payments:8080");
        assert_eq!(status, 502, "{body}");
        assert!(body.contains("connect_refused"), "{body}");
    }
}

#[test]
fn unknown_destinations_go_to_their_original_address() {
    let Some(lan) = Lan::new() else { return };
    let (client, other) = (lan.pod(), lan.pod());
    let _service = service(&other, 8080, "other");
    let config = |unknown: &str| {
        format!("[outbound]\nunknown = \"{unknown}\"\ndeny_networks = [\"10.77.0.0/24\", \"fd77::/64\"]\n")
    };
    let proxy = sidecar(&client, &config("forward"));
    for address in other.addresses(8080) {
        let (status, body) = ask(&client, address, "any.example");
        assert_eq!(status, 200, "{body}");
        assert!(body.starts_with("other host=any.example ") && body.contains("outrigger"), "{body}");
    }
    proxy.reconfigure(&config("deny"));
    eventually("the refusal", || ask(&client, other.addresses(8080)[0], "any.example").0 == 403);
    let (_, body) = ask(&client, other.addresses(8080)[1], "any.example");
    assert!(body.contains("unknown_upstream") && body.contains("fd77::"), "{body}");
    assert_eq!(listen(&client, other.addresses(8080)[0]), "");
}

/// Server-first protocols (mail, databases), in plaintext and between sidecars.
#[test]
fn server_first_protocols_work_through_redirection() {
    let Some(lan) = Lan::new() else { return };
    let (client, server, pki) = (lan.pod(), lan.pod(), pki());
    let banner = |mut stream: TcpStream| {
        use std::io::Write;
        let _ = stream.write_all(b"220 mail.example\r\n");
        let mut rest = [0; 64];
        while stream.read(&mut rest).is_ok_and(|count| count > 0) {}
    };
    let _mail = server.run(|| RawServer::start_at(at(2525), banner));
    let strict = format!("{}[inbound]\nmtls = \"permissive\"\n", pki.identity("payments"));
    let there = sidecar(&server, &strict);
    let [v4, v6] = server.addresses(2525);
    let upstream = format!(
        "[[upstream]]\nname = \"mail\"\nendpoints = [\"{v6}\"]\ntls = \"mutual\"\nidentity = [\"{}\"]\n",
        id("payments")
    );
    let here = sidecar(&client, &(pki.identity("checkout") + &upstream));
    for address in [v4, v6] {
        assert_eq!(listen(&client, address), "220 mail.example\r\n", "{}{}", here.stderr(), there.stderr());
    }
    counted(
        &client,
        "outrigger_detected_total{direction=\"outbound\",port=\"2525\",protocol=\"server_first\"} 2",
    );
    counted(
        &server,
        "outrigger_detected_total{direction=\"inbound\",port=\"2525\",protocol=\"server_first\"} 2",
    );
    counted(&server, "outrigger_tls_handshakes_total{direction=\"inbound\",outcome=\"full\"} 1");
    eventually("a hint", || here.stderr().contains("the server of port 2525 sends first"));
}

/// HTTP on a declared port passes as bytes; otherwise each sidecar would add its header fields.
#[test]
fn declared_ports_skip_protocol_detection() {
    let Some(lan) = Lan::new() else { return };
    let (client, server) = (lan.pod(), lan.pod());
    let _services = [service(&server, 8080, "declared"), service(&server, 8081, "detected")];
    let _there = sidecar(&server, "[[inbound.port]]\nport = 8080\nprotocol = \"tcp\"\n");
    let [v4, v6] = server.addresses(8080);
    let raw = format!("[[upstream]]\nname = \"raw\"\nendpoints = [\"{v4}\", \"{v6}\"]\nprotocol = \"tcp\"\n");
    let _here = sidecar(&client, &raw);
    for family in 0..2 {
        let named = |port| ask(&client, server.addresses(port)[family], "any.example").1;
        assert!(named(8080).ends_with("via=-"), "{}", named(8080));
        assert!(named(8081).contains("via=1.1 outrigger"), "{}", named(8081));
    }
}

/// A real database and its real client, and one that connects and is silent, as connection pools are.
#[test]
fn redis_works_between_sidecars() {
    let Some(lan) = Lan::new() else { return };
    if !has_tool(&["redis-server", "redis-cli"]) {
        return;
    }
    let (client, server, pki) = (lan.pod(), lan.pod(), pki());
    let mut start = server.as_user(0);
    start.extend(
        ["redis-server", "--bind", "*", "-::*", "--protected-mode", "no", "--save", ""].map(str::to_owned),
    );
    let words: Vec<&str> = start.iter().map(String::as_str).collect();
    let redis = Daemon::start(words[0], &words[1..], &[]);
    redis.wait_for_output("Ready to accept connections");
    let strict = format!("{}[inbound]\nmtls = \"strict\"\n", pki.identity("payments"));
    let _there = sidecar(&server, &strict);
    let addresses = server.addresses(6379);
    let endpoints = addresses.map(|address| format!("\"{address}\"")).join(", ");
    let upstream = format!(
        "[[upstream]]\nname = \"redis\"\nendpoints = [{endpoints}]\ntls = \"mutual\"\nidentity = [\"{}\"]\n",
        id("payments")
    );
    let _here = sidecar(&client, &(pki.identity("checkout") + &upstream));
    for address in addresses {
        let mut silent = client.run(|| RawClient::connect(address));
        counted(&server, "outrigger_connections{direction=\"inbound\",tls=\"mutual\",state=\"open\"} 1");
        let ip = address.ip().to_string();
        let set = client.command(0, &["redis-cli", "-h", &ip, "set", "outrigger", "afloat"]);
        assert_eq!(String::from_utf8_lossy(&set.stdout).trim(), "OK");
        // An inline command; it begins as HTTP does.
        silent.send("GET outrigger\r\n");
        assert_eq!(String::from_utf8_lossy(&silent.read_until(b"afloat\r\n")), "$6\r\nafloat\r\n");
    }
    counted(&client, "outrigger_detected_total{direction=\"outbound\",port=\"6379\",protocol=\"bytes\"} 4");
}

/// A client that connects ahead of its first request is not taken for one of a server-first protocol.
#[test]
fn a_late_http_request_is_still_detected() {
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
        let response = caller.run(|| {
            let mut client = RawClient::connect(address);
            eventually("the proxy asks the server", || seen.connections() > 2 * already);
            client.ask("GET / HTTP/1.1\r\nHost: late\r\n\r\n")
        });
        assert_eq!(response.text(), "true ");
    }
    counted(&caller, "outrigger_detected_total{direction=\"outbound\",port=\"8080\",protocol=\"http1\"} 2");
}

#[test]
fn the_services_own_tls_is_forwarded_by_sni() {
    let Some(lan) = Lan::new() else { return };
    let (client, other, pki) = (lan.pod(), lan.pod(), pki());
    let certificate = pki.issue("secure", |_| {});
    let _server = other.run(|| TlsServer::start_at(at(8443), &certificate, None, &[]));
    let [v4, v6] = other.addresses(8443);
    // The client speaks TLS to the server itself: the sidecar does not add its own.
    let named = format!("[[upstream]]\nname = \"localhost\"\nendpoints = [\"{v4}\"]\ntls = \"simple\"\n");
    let _proxy = sidecar(&client, &named);
    let unreachable: SocketAddr = "10.77.0.200:8443".parse().expect("an address");
    for address in [v6, unreachable] {
        let said = client.run(|| TlsClient::new(None, &[]).send_and_read(address, "GET / HTTP/1.1\r\n\r\n"));
        assert!(said.as_ref().is_ok_and(|said| said.ends_with("hello")), "{address}: {said:?}");
    }
    counted(&client, "outrigger_detected_total{direction=\"outbound\",port=\"8443\",protocol=\"tls\"} 2");
}

#[test]
fn every_port_of_the_service_is_reached_with_its_own_policy() {
    let Some(lan) = Lan::new() else { return };
    let (server, stranger, pki) = (lan.pod(), lan.pod(), pki());
    let services = [service(&server, 8080, "calls"), service(&server, 9090, "metrics")];
    let config = format!(
        "{}[inbound]\nmtls = \"strict\"\nforward_to = \"127.0.0.1:8080\"\n[inbound.limits]\nmax_requests = 7\n[inbound.breaker]\nconsecutive_failures = 10\n[[inbound.port]]\nport = 9090\nmtls = \"off\"\n",
        pki.identity("payments")
    );
    let proxy = sidecar(&server, &config);
    for family in 0..2 {
        assert_eq!(ask(&stranger, server.addresses(8080)[family], "a").0, 403);
        let (status, body) = ask(&stranger, server.addresses(9090)[family], "a");
        assert_eq!((status, body.starts_with("metrics host=a")), (200, true), "{body}");
        // Nothing listens: a response that says so.
        let (status, body) = ask(&stranger, server.addresses(4192)[family], "a");
        assert_eq!(status, 404, "the probes' port is not redirected: {body}");
    }
    proxy.reconfigure(&config.replace("strict", "permissive"));
    // A less secure change is held back until it is confirmed.
    proxy.signal("HUP");
    eventually("plaintext", || ask(&stranger, server.addresses(8080)[0], "a").0 == 200);
    let (status, body) = ask(&stranger, server.addresses(8081)[0], "a");
    assert_eq!((status, body.contains("connect_refused")), (502, true), "{body}");
    // A request to the proxy's own port is not redirected: it goes to the service.
    let (status, body) = ask(&stranger, server.addresses(4143)[0], "a");
    assert_eq!((status, body.starts_with("calls ")), (200, true), "{body}");

    // Each original destination has its own limits, and is shown.
    let status: Value = serde_json::from_str(&admin(&server, "/status").1).expect("JSON");
    let called = status["inbound_addresses"]["addresses"].as_array().expect("addresses");
    let limit = |address: SocketAddr| {
        called.iter().find(|one| one["name"] == address.to_string()).map(|one| &one["limits"]["max_requests"])
    };
    for port in [8080, 9090] {
        for address in server.addresses(port) {
            assert_eq!(limit(address), Some(&7.into()), "{address} in {status:#}");
        }
    }
    let shown = server.command(0, &[binary_for_any_user().to_str().expect("a path"), "status"]);
    let row = format!("(the service at {})", server.addresses(8080)[1]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains(&row), "{shown:?}");

    // And a breaker, which can be set by hand.
    for address in server.addresses(8080) {
        let (binary, name) = (binary_for_any_user(), address.to_string());
        let words = [binary.to_str().expect("a path"), "set", "breaker", &name, "open"];
        let set = server.command(PROXY_USER, &words);
        assert!(set.status.success(), "{}", String::from_utf8_lossy(&set.stderr));
        let (status, body) = ask(&stranger, address, "a");
        assert_eq!((status, body.contains("breaker_open")), (503, true), "{body}");
    }
    assert_eq!(ask(&stranger, server.addresses(9090)[0], "a").0, 200);
    drop(services);
}

/// Other rules lead connections here too: a published port of the node. Those were not redirected by ours.
#[test]
fn connections_redirected_by_other_rules_are_not_treated_as_redirected() {
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
    // To the outbound port: to the host of the request, with `deny_networks` in force.
    let (status, body) = ask(&stranger, address(81), "named");
    assert_eq!((status, body.starts_with("calls host=named")), (200, true), "{body}");
    let (status, body) = ask(&stranger, address(81), "169.254.169.254");
    assert_eq!((status, body.contains("denied_network")), (502, true), "{body}");
    let status: Value = serde_json::from_str(&admin(&pod, "/status").1).expect("JSON");
    assert_eq!(status["ways"]["redirect"]["count"], 0, "{status}");
    assert_eq!(status["inbound_addresses"]["known"], 0, "{status}");
}

#[test]
fn without_redirection_rules_the_sidecar_is_not_ready() {
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
