//! What spans and logs say of requests that arrive and leave over TLS.

use serde_json::Value;

use super::{get, traces::otlp};
use crate::support::{
    Proxy, RawClient, Upstream, eventually,
    pki::{Pki, id},
    rotel::Rotel,
    text,
};

/// Two sidecars with mutual TLS between them.
fn pair(pki: &Pki, service: &Upstream, telemetry: &str) -> (Proxy, Proxy) {
    let second = Proxy::start(format!(
        "[service]\nname = \"second\"\n{}[inbound]\nforward_to = \"{}\"\nmtls = \"permissive\"\n[telemetry]\n{telemetry}",
        pki.identity("payments"),
        service.address()
    ));
    let first = Proxy::start(format!(
        "[service]\nname = \"first\"\n{}[telemetry]\n{telemetry}\n\
         [[upstream]]\nname = \"payments\"\nhosts = [\"second\"]\nendpoints = [\"{}\"]\nidentity = [\"{}\"]\n",
        pki.identity("checkout"),
        second.inbound(),
        id("payments")
    ));
    (first, second)
}

#[test]
fn spans_have_the_https_scheme_and_the_peer_identity() {
    let Some(rotel) = Rotel::start() else { return };
    let (pki, service) = (Pki::new(), Upstream::http1(|_| async { text("well") }));
    let (first, second) = pair(&pki, &service, &format!("{}sample = 1.0\n", otlp(&rotel)));
    assert_eq!(get(first.outbound(), "/cart", &[]), 200);
    let spans = rotel.wait_for(3);
    let of = |kind: &str| spans.iter().find(|span| span.kind == kind).expect("a span");
    for (kind, key, value) in [
        ("INTERNAL", "server.port", "80"),
        ("CLIENT", "url.full", "https://second/cart"),
        ("CLIENT", "server.port", "443"),
        ("SERVER", "url.scheme", "https"),
        ("SERVER", "server.port", "443"),
        ("SERVER", "client.address", "127.0.0.1"),
        ("SERVER", "outrigger.peer.identity", &id("checkout")),
    ] {
        assert_eq!(of(kind).attribute(key), value, "{key} of {:#?}", of(kind));
    }
    // Without TLS there is no verified peer.
    assert_eq!(get(second.inbound(), "/plain", &[]), 200);
    let spans = rotel.wait_for(4);
    let plain = spans.iter().find(|span| span.attribute("url.path") == "/plain").expect("a span");
    assert_eq!((plain.attribute("url.scheme"), plain.attribute("outrigger.peer.identity")), ("http", ""));
}

#[test]
fn the_access_log_has_the_verified_peer_and_the_service_gets_the_https_scheme() {
    let service = Upstream::http1(|request: http::Request<_>| {
        let proto = request.headers().get("x-forwarded-proto").and_then(|field| field.to_str().ok());
        let proto = proto.unwrap_or_default().to_owned();
        async move { text(proto) }
    });
    let pki = Pki::new();
    let (first, second) = pair(&pki, &service, "access_log = \"all\"\n");
    let say = |port| RawClient::connect(port).ask("GET / HTTP/1.1\r\nHost: second\r\n\r\n").text();
    assert_eq!((say(first.outbound()), say(second.inbound())), ("https".to_owned(), "http".to_owned()));
    let peers = |proxy: &Proxy, count: usize| {
        let mut peers = Vec::new();
        eventually("lines of the access log", || {
            let peer =
                |line: &str| serde_json::from_str::<Value>(line).ok()?["peer"].as_str().map(str::to_owned);
            peers = proxy.stdout().lines().filter_map(peer).collect();
            peers.len() == count
        });
        peers
    };
    assert_eq!(peers(&second, 2), [id("checkout"), "127.0.0.1".to_owned()]);
    assert_eq!(peers(&first, 1), ["127.0.0.1"]);
}
