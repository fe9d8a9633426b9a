//! No response for another request: whatever fields requests have, each gets the response that the service would have
//! made of it.

use std::cell::Cell;

use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use super::*;

/// How the service behaves at a path, and what it builds its responses from.
const MODES: &[(&str, &str, &[&str])] = &[
    // Path, `Cache-Control`, fields: those that `Vary` names.
    ("/plain", "max-age=600", &[]),
    ("/language", "max-age=600", &["accept-language"]),
    ("/two", "max-age=600", &["accept-language", "x-tenant"]),
    ("/cookie", "max-age=600", &["cookie"]),
    ("/public", "public, max-age=600", &["x-tenant"]),
    ("/stale", "max-age=0", &["x-tenant"]),
    ("/shared", "s-maxage=600", &["accept-language"]),
    ("/private", "private, max-age=600", &[]),
];

/// Fields that a service uses without naming them in `Vary`, and the proxy must not share by: links and hosts are built
/// from them, or they are credentials.
const SILENT: &[&str] = &[
    "x-forwarded-host",
    "x-forwarded-scheme",
    "x-forwarded-prefix",
    "x-original-url",
    "x-rewrite-url",
    "x-host",
];

const CREDENTIALS: &[&str] = &["authorization", "cookie"];

/// Fields that no response depends on.
const NOISE: &[&str] = &["x-noise", "accept", "user-agent", "referer", "if-none-match", "x-request-id"];

const VALUES: &[&str] = &["a", "b"];

/// The response that a request gets: the path's mode, and the value of each field that it is built from.
fn expected(mode: usize, field: impl Fn(&str) -> Option<String>) -> String {
    let (path, control, vary) = MODES[mode];
    // A response that says so itself is the same for all credentials.
    let credentials = if control.contains("public") { &[][..] } else { CREDENTIALS };
    // `s-maxage` allows to share responses to requests with Authorization, and says nothing of cookies.
    let credentials = if control.contains("s-maxage") { &CREDENTIALS[1..] } else { credentials };
    let mut names: Vec<&str> = vary.iter().chain(SILENT).chain(credentials).copied().collect();
    names.sort_unstable();
    names.dedup();
    names.iter().fold(path.to_owned(), |text, name| match field(name) {
        Some(value) => format!("{text} {name}={value}"),
        None => text,
    })
}

#[derive(Clone, Debug)]
struct Asked {
    mode: usize,
    fields: Vec<(&'static str, &'static str)>,
}

fn asked() -> impl Strategy<Value = Asked> {
    let names: Vec<&'static str> = [&["accept-language", "x-tenant"], CREDENTIALS, SILENT, NOISE].concat();
    let field = (prop::sample::select(names), prop::sample::select(VALUES));
    let fields = prop::collection::vec(field, 0..3).prop_map(|mut fields| {
        fields.sort_unstable();
        fields.dedup_by_key(|(name, _)| *name);
        fields
    });
    (0..MODES.len(), fields).prop_map(|(mode, fields)| Asked { mode, fields })
}

fn check(keys: &str) {
    let service = Service::start(|_, request| async move {
        let path = request.uri().path().to_owned();
        let mode = MODES.iter().position(|(prefix, ..)| path.ends_with(prefix)).unwrap();
        let (_, control, vary) = MODES[mode];
        let field = |name: &str| {
            let value = request.headers().get(name)?;
            Some(value.to_str().unwrap().to_owned())
        };
        let vary = vary.join(", ");
        let mut fields = vec![("cache-control", control), ("etag", "\"never\"")];
        if !vary.is_empty() {
            fields.push(("vary", &vary));
        }
        response(200, &fields, expected(mode, field))
    });
    let proxy = proxy(service.address, keys);
    let sequences = Cell::new(0);
    let strategy = prop::collection::vec(asked(), 1..60);
    let config = Config { cases: 60, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(config).run(&strategy, |requests| {
        // Each sequence has paths of its own, so that it can be repeated.
        sequences.set(sequences.get() + 1);
        let mut client = RawClient::connect(proxy.outbound());
        for asked in requests {
            let fields: String =
                asked.fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
            let path = format!("/{}{}", sequences.get(), MODES[asked.mode].0);
            let request = format!("GET {path} HTTP/1.1\r\nHost: up\r\n{fields}\r\n");
            let own = expected(asked.mode, |name| {
                let found = asked.fields.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            });
            let response = client.ask(&request);
            prop_assert_eq!((response.status(), response.text()), (200, own), "{}", request);
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    assert!(count(&proxy, "hit") > 100.0, "it answers from the store: {} hits", count(&proxy, "hit"));
}

#[test]
fn no_field_makes_a_response_another_requests() {
    check("");
}

#[test]
fn no_field_makes_a_response_another_requests_with_a_key_for_each_credential() {
    check("authorization = \"key\"");
}
