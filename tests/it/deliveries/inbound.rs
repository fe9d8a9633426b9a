//! Requests to the service that are queued in front of it.

use super::*;
use crate::support::{
    eventually,
    issuer::{ISSUER, Issuer, good_claims},
    pki::Pki,
    tls::TlsClient,
    tokens::Signer,
};

fn inbound_config(store: &Path, service: SocketAddr, more: &str) -> String {
    format!(
        "[store]\npath = \"{}\"\nreserve = \"64KiB\"\n{QUEUE}\n[inbound]\nforward_to = \"{service}\"\n{more}\n\
         [[inbound.route]]\nmatch = {{ path = \"/orders*\", methods = [\"POST\"] }}\nqueue = {{ name = \"orders\" }}\n",
        store.display()
    )
}

#[test]
fn an_inbound_request_is_delivered_to_the_service() {
    let (service, store) = (Service::start(), tempfile::tempdir().unwrap());
    let proxy = Proxy::start(inbound_config(store.path(), service.address(), ""));
    let accepted = ask_at(proxy.inbound(), "POST /orders", ASYNC, "in");
    assert_eq!(accepted.status(), 202, "{}", accepted.text());
    eventually("the delivery", || service.bodies() == ["in"]);
    let one = &service.received()[0];
    assert_eq!((one.field("x-forwarded-for"), one.field("x-forwarded-host")), ("127.0.0.1", "payments"));
    assert_eq!((one.field("x-outrigger-attempt"), one.field("x-forwarded-client-cert")), ("1", ""));
    assert_eq!(ask_at(proxy.inbound(), "POST /orders", "", "now").status(), 200);
    let location = accepted.field("location").unwrap();
    let line = format!("GET {location}");
    eventually("done", || json(&ask_at(proxy.inbound(), &line, "", ""))["state"] == "done");
}

#[test]
fn only_the_identity_that_was_accepted_reads_and_cancels() {
    let (store, address, pki) = (tempfile::tempdir().unwrap(), later_address(), Pki::new());
    pki.identity("server");
    let allow = "mtls = \"strict\"\n[[inbound.allow]]\nidentity = [\"spiffe://shop.example/ns/shop/sa/*\"]\nmethods = [\"POST\"]\npaths = [\"/orders*\"]\n";
    let text = format!("{}{}", pki.section("server"), inbound_config(store.path(), address, allow));
    let proxy = Proxy::start(text);
    let send = |client: &TlsClient, line: &str, fields: &str, body: &str| {
        send(client, &proxy, &format!("{line} HTTP/1.1"), fields, body)
    };
    let client = |name: &str| TlsClient::new(Some(&pki.issue(name, |_| ())), &[]);
    let (alice, bob) = (client("alice"), client("bob"));
    let accepted = send(&alice, "POST /orders", ASYNC, "secret");
    assert!(accepted.starts_with("HTTP/1.1 202"), "{accepted}");
    let location = location(&accepted);
    let get = format!("GET {location}");
    assert!(send(&alice, &get, "", "").starts_with("HTTP/1.1 200"));
    for line in [get.clone(), format!("{get}/response"), format!("DELETE {location}")] {
        let refused = send(&bob, &line, "", "");
        assert!(refused.starts_with("HTTP/1.1 404"), "{line}: {refused}");
    }
    let service = Service::start_at(address, Duration::ZERO);
    eventually("the delivery", || service.bodies() == ["secret"]);
    let certificate = service.received()[0].field("x-forwarded-client-cert").to_owned();
    assert!(certificate.contains("alice"), "{certificate}");
}

fn send(client: &TlsClient, proxy: &Proxy, start: &str, fields: &str, body: &str) -> String {
    let length = body.len();
    let request = format!(
        "{start}\r\nHost: payments\r\nConnection: close\r\n{fields}content-length: {length}\r\n\r\n{body}"
    );
    client.send_and_read(proxy.inbound(), &request).unwrap_or_default()
}

fn location(accepted: &str) -> &str {
    let found = accepted.lines().find_map(|line| line.strip_prefix("location: "));
    found.unwrap_or_else(|| panic!("no location: {accepted}")).trim()
}

/// What was accepted from a client is not delivered once `[[inbound.allow]]` no longer has it. And the path of deliveries
/// opens nothing of the service.
#[test]
fn a_client_that_is_no_longer_allowed_is_not_delivered_from() {
    let (store, address, pki) = (tempfile::tempdir().unwrap(), later_address(), Pki::new());
    pki.identity("server");
    let route = "[[inbound.route]]\nmatch = { path = \"/.well-known/outrigger/deliveries/*\", methods = [\"GET\"] }\nqueue = { name = \"orders\" }\n";
    let text = |who: &str, more: &str| {
        let allow = format!(
            "mtls = \"strict\"\n[[inbound.allow]]\nidentity = [\"spiffe://shop.example/ns/shop/sa/{who}\"]\nmethods = [\"POST\"]\n"
        );
        format!("{}{}{more}", pki.section("server"), inbound_config(store.path(), address, &allow))
    };
    let proxy = Proxy::start(text("*", ""));
    let client = |name: &str| TlsClient::new(Some(&pki.issue(name, |_| ())), &[]);
    let (alice, bob) = (client("alice"), client("bob"));
    let orders = [&alice, &bob].map(|client| send(client, &proxy, "POST /orders HTTP/1.1", ASYNC, "one"));
    proxy.reconfigure(&text("bob", ""));
    eventually("the change", || {
        send(&alice, &proxy, "POST /orders HTTP/1.1", ASYNC, "two").starts_with("HTTP/1.1 403")
    });
    let service = Service::start_at(address, Duration::ZERO);
    let get = |accepted: &str| format!("GET {} HTTP/1.1", location(accepted));
    eventually("the end", || {
        let state = send(&alice, &proxy, &get(&orders[0]), "", "");
        state.contains("\"dead\"") && state.contains("\"poison\"")
    });
    eventually("the delivery", || send(&bob, &proxy, &get(&orders[1]), "", "").contains("\"done\""));
    assert_eq!(service.received().len(), 1);
    proxy.reconfigure(&text("bob", route));
    eventually("the service's own route", || {
        send(&bob, &proxy, &get(&orders[1]), "", "").starts_with("HTTP/1.1 403")
    });
    assert_eq!(service.received().len(), 1);
}

/// With `[inbound.jwt]` a delivery belongs to the user whose token it came with, not to all users behind one peer.
#[test]
fn users_behind_one_peer_share_no_keys_and_no_results() {
    let (issuer, service, store) = (Issuer::start(), Service::start(), tempfile::tempdir().unwrap());
    let signer = Signer::ec("ec");
    issuer.publish(&[&signer]);
    let jwt = format!(
        "[inbound.jwt]\nissuer = \"{ISSUER}\"\naudiences = [\"checkout\"]\njwks = \"{}\"",
        issuer.keys_url()
    );
    let proxy = Proxy::start(inbound_config(store.path(), service.address(), &jwt));
    let [ann, bob] = ["ann", "bob"].map(|user| {
        let mut claims = good_claims();
        claims["sub"] = user.into();
        format!("Authorization: Bearer {}\r\n", signer.token(&claims))
    });
    let send = |token: &str| {
        let fields = format!("Idempotency-Key: k1\r\n{ASYNC}{token}");
        let accepted = ask_at(proxy.inbound(), "POST /orders", &fields, "same");
        assert_eq!(accepted.status(), 202, "{}", accepted.text());
        accepted.field("location").unwrap().to_owned()
    };
    let (first, second) = (send(&ann), send(&bob));
    assert_ne!(first, second);
    assert_eq!(send(&ann), first);
    let get = |token: &str| ask_at(proxy.inbound(), &format!("GET {first}"), token, "").status();
    assert_eq!((get(&ann), get(&bob)), (200, 404));
    eventually("both deliveries", || service.bodies() == ["same", "same"]);
}
