//! Never another caller's response, never private data; what invalidates and what purges.

use crate::support::pki::Pki;

use super::*;

/// The body of a second request with other fields: `2` means that it reached the service.
fn second(service: &'static [(&'static str, &'static str)], first: &str, then: &str) -> String {
    second_with(service, "", first, then)
}

fn second_with(
    service: &'static [(&'static str, &'static str)],
    cache: &str,
    first: &str,
    then: &str,
) -> String {
    let service = Service::numbered(service);
    let proxy = proxy(service.address, cache);
    assert_eq!(get(&proxy, "/", first).1, "1");
    get(&proxy, "/", then).1
}

const FRESH: &[(&str, &str)] = &[("cache-control", "max-age=60")];
const PUBLIC: &[(&str, &str)] = &[("cache-control", "public, max-age=60")];

#[test]
fn responses_to_credentials_are_shared_only_where_they_say_so() {
    let (a, b) = ("Authorization: Bearer a\r\n", "Authorization: Bearer b\r\n");
    assert_eq!(second(FRESH, a, a), "2");
    assert_eq!(second(FRESH, a, b), "2");
    assert_eq!(second(FRESH, a, ""), "2");
    assert_eq!(second(FRESH, "", a), "2", "nor the other way round");
    assert_eq!(second(PUBLIC, a, b), "1");
    let key = "authorization = \"key\"";
    assert_eq!(second_with(FRESH, key, a, a), "1");
    assert_eq!(second_with(FRESH, key, a, b), "2");
    assert_eq!(second_with(FRESH, key, a, ""), "2");
}

#[test]
fn responses_with_cookies_are_shared_only_where_they_say_so() {
    let (a, b) = ("Cookie: s=a\r\n", "Cookie: s=b\r\n");
    assert_eq!(second(FRESH, a, b), "2");
    assert_eq!(second(FRESH, a, ""), "2");
    assert_eq!(second(FRESH, "", a), "2");
    assert_eq!(second(PUBLIC, a, b), "1");
    assert_eq!(second(&[("cache-control", "max-age=60"), ("vary", "cookie")], a, b), "2");
    assert_eq!(second(&[("cache-control", "max-age=60"), ("vary", "cookie")], a, a), "1");
    assert_eq!(second(&[("cache-control", "max-age=60"), ("set-cookie", "s=1")], "", ""), "2");
    assert_eq!(second(&[("cache-control", "public, max-age=60"), ("set-cookie", "s=1")], "", ""), "1");
}

#[test]
fn what_may_not_be_stored_is_not() {
    for control in ["no-store, max-age=60", "NO-STORE", "private, max-age=60", "private=\"x\", max-age=60"] {
        let fields: &'static [(&'static str, &'static str)] = Vec::leak(vec![("cache-control", control)]);
        assert_eq!(second(fields, "", ""), "2", "{control}");
    }
    assert_eq!(second(&[("cache-control", "max-age=60"), ("vary", "*")], "", ""), "2");
    assert_eq!(second(FRESH, "Cache-Control: no-store\r\n", ""), "2");
    assert_eq!(
        second(&[("cache-control", "max-age=60"), ("vary", "accept")], "Accept: a\r\n", "Accept: b\r\n"),
        "2"
    );
}

#[test]
fn fields_that_no_url_shows_are_part_of_the_key() {
    for name in [
        "X-Forwarded-Host",
        "X-Forwarded-Proto",
        "X-Forwarded-Scheme",
        "Forwarded",
        "X-Host",
        "X-Original-URL",
        "X-Rewrite-URL",
        "X-HTTP-Method-Override",
    ] {
        let (evil, good) = (format!("{name}: evil\r\n"), format!("{name}: good\r\n"));
        assert_eq!(second(FRESH, &evil, ""), "2", "{name}");
        assert_eq!(second(FRESH, &evil, &good), "2", "{name}");
    }
}

#[test]
fn a_get_with_a_body_is_neither_stored_nor_answered_from_the_store() {
    let service = Service::numbered(FRESH);
    let proxy = proxy(service.address, "");
    assert_eq!(get(&proxy, "/", "").1, "1");
    let body = "GET / HTTP/1.1\r\nHost: up\r\nContent-Length: 1\r\n\r\nx";
    let (_, number, cache) = ask(proxy.outbound(), body);
    assert_eq!(number, "2");
    assert!(cache.contains("fwd=bypass"), "{cache}");
    assert_eq!(get(&proxy, "/", "").1, "1");
}

#[test]
fn an_unsafe_request_invalidates_its_url() {
    for method in ["POST", "PUT", "PATCH", "DELETE"] {
        let service = Service::numbered(FRESH);
        let proxy = proxy(service.address, "");
        assert_eq!(get(&proxy, "/a", "").1, "1");
        let request = format!("{method} /a HTTP/1.1\r\nHost: up\r\nContent-Length: 1\r\n\r\nx");
        let (_, number, cache) = ask(proxy.outbound(), &request);
        assert_eq!(number, "2");
        assert!(cache.contains("fwd=method"), "{cache}");
        assert_eq!(get(&proxy, "/a", "").1, "3", "{method}");
    }
}

#[test]
fn an_identity_gets_only_its_own_responses() {
    let pki = Pki::new();
    pki.write_ca();
    for name in ["server", "alice", "bob"] {
        pki.identity(name);
    }
    for (shared, expected) in [("", "2"), ("shared_between_peers = true", "1")] {
        let service = Service::numbered(FRESH);
        let inbound = Proxy::start(format!(
            "{}\n[inbound]\nforward_to = \"{}\"\ncache = {{ {shared} }}\n",
            pki.section("server"),
            service.address
        ));
        let ask_as = |name: &str| {
            let sidecar = Proxy::start(format!(
                "{}\n[[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\ntls = \"mutual\"\nidentity = [\"{}\"]\n",
                pki.section(name),
                inbound.inbound(),
                crate::support::pki::id("server"),
            ));
            get(&sidecar, "/", "").1
        };
        assert_eq!(ask_as("alice"), "1");
        assert_eq!(ask_as("alice"), "1");
        assert_eq!(ask_as("bob"), expected, "{shared}");
    }
}

#[test]
fn stored_responses_are_listed_and_purged() {
    let service = Service::numbered(FRESH);
    let proxy = proxy(service.address, "");
    for path in ["/a/1", "/a/2", "/b"] {
        get(&proxy, path, "");
    }
    let list = ask(proxy.admin(), "GET /cache HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(list.0, 401, "the list needs the token: {}", list.1);
    let outrigger = |arguments: &[&str]| {
        let output = std::process::Command::new(crate::support::binary())
            .args(arguments)
            .args(["--admin", &proxy.admin().to_string()])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let list = outrigger(&["cache", "ls"]);
    assert_eq!(list.lines().filter(|line| line.contains("http://up/")).count(), 3, "{list}");
    assert!(outrigger(&["cache", "ls", "--json"]).contains("\"url\": \"http://up/a/1\""));
    assert_eq!(outrigger(&["cache", "purge", "http://up/a/*"]), "2 responses purged\n");
    assert_eq!((get(&proxy, "/a/1", "").1.as_str(), get(&proxy, "/b", "").1.as_str()), ("4", "3"));
    assert_eq!(outrigger(&["cache", "purge", "http://up/b"]), "1 responses purged\n");
    assert_eq!(outrigger(&["cache", "purge", "--all"]), "1 responses purged\n");
}

/// The route has a queue too: what it does not queue has the cache, and what is delivered later invalidates.
#[test]
fn a_delivery_invalidates_its_url() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::numbered(FRESH);
    let proxy = Proxy::start(format!(
        "[store]\npath = {:?}\nreserve = \"64KiB\"\n[[queue]]\nname = \"orders\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\ncache = {{}}\n\
         [[upstream.route]]\nmatch = {{ path = \"/orders*\" }}\nqueue = {{ name = \"orders\" }}\n",
        store.path(),
        service.address
    ));
    assert_eq!(get(&proxy, "/orders", "").1, "1");
    assert_eq!(get(&proxy, "/orders", "").1, "1", "from the store");
    let request = "POST /orders HTTP/1.1\r\nHost: up\r\nPrefer: respond-async\r\nContent-Length: 1\r\n\r\nx";
    assert_eq!(ask(proxy.outbound(), request).0, 202);
    eventually("it is delivered", || service.requests() == 2);
    eventually("what was stored is not sent any more", || get(&proxy, "/orders", "").1 != "1");
}
