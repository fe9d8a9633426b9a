use proptest::prelude::*;
use serde_json::json;

use super::*;

fn peer(name: &str) -> Peer {
    match name.strip_prefix("dns:") {
        Some(name) => Peer::with_names(None, &[name]),
        None => Peer::with_names(Some(name.parse().unwrap()), &[]),
    }
}

fn rules(text: &str) -> AllowList {
    #[derive(serde::Deserialize)]
    struct File {
        allow: Vec<AllowSettings>,
    }
    AllowList::new(&toml::from_str::<File>(text).unwrap().allow)
}

const SHOP: &str = "spiffe://shop.example/ns/shop/sa/cart";
const EVIL: &str = "spiffe://evil.example/ns/shop/sa/cart";

fn orders() -> AllowList {
    rules(
        r#"
        [[allow]]
        identity = ["spiffe://shop.example/ns/shop/sa/*"]
        methods = ["GET", "HEAD"]
        paths = ["/v1/orders/*", "/v1/orders"]
        [[allow]]
        identity = ["spiffe://shop.example/ns/admin/sa/root"]
        [[allow]]
        identity = ["spiffe://shop.example/ns/shop/sa/cart", "dns:cron.example"]
        methods = ["POST"]
        claims = { scope = "orders:write" }
        "#,
    )
}

fn ask(rules: &AllowList, client: Option<&str>, method: &str, path: &str) -> Result<Option<usize>, String> {
    let (peer, method) = (client.map(peer), method.parse().unwrap());
    let operation = RequestedOperation::Http { method: &method, path };
    rules
        .decide(&AuthorizationRequest { peer: peer.as_ref(), operation, token: EndUserToken::None })
        .map_err(|refusal| refusal.to_string())
}

#[test]
fn an_entry_allows_requests_that_match_all_its_conditions() {
    let rules = orders();
    for path in ["/v1/orders", "/v1/orders/7", "/v1/orders/", "/v1/%6frders/7"] {
        assert_eq!(ask(&rules, Some(SHOP), "GET", path), Ok(Some(0)), "{path}");
    }
    let root = Some("spiffe://shop.example/ns/admin/sa/root");
    assert_eq!(ask(&rules, root, "DELETE", "/anything"), Ok(Some(1)));
    assert_eq!(
        ask(&AllowList::default(), None, "GET", "/"),
        Ok(None),
        "without entries everything is allowed"
    );
}

#[test]
fn a_denial_names_the_client_and_the_nearest_entry() {
    let rules = orders();
    for (client, method, path, expected) in [
        (None, "GET", "/v1/orders", "no allow entry names a client without a certificate".to_owned()),
        (Some(EVIL), "GET", "/v1/orders", format!("no allow entry names {EVIL}")),
        (
            Some(SHOP),
            "DELETE",
            "/v1/orders",
            format!(
                "no allow entry permits DELETE /v1/orders for {SHOP}; nearest: entry 1 has the identity but not the method"
            ),
        ),
        (
            Some(SHOP),
            "GET",
            "/v1/users",
            format!(
                "no allow entry permits GET /v1/users for {SHOP}; nearest: entry 1 has the identity and the method but \
                 not the path"
            ),
        ),
        (
            Some("dns:cron.example"),
            "POST",
            "/",
            "no allow entry permits POST / for dns:cron.example; nearest: entry 3 has all but the claim \
             scope = \"orders:write\", which the token must contain"
                .to_owned(),
        ),
        (Some(SHOP), "GET", "/v1/ordersX", String::new()),
        (Some(SHOP), "get", "/v1/orders", String::new()),
        (Some(SHOP), "GET", "*", String::new()),
        (Some("dns:shop.example"), "GET", "/v1/orders", "no allow entry names dns:shop.example".to_owned()),
    ] {
        let refusal = ask(&rules, client, method, path).unwrap_err();
        assert!(expected.is_empty() || refusal == expected, "{refusal}");
    }
}

#[test]
fn claims_are_required_once_the_token_is_verified() {
    let rules = orders();
    let peer = peer(SHOP);
    let operation = RequestedOperation::Http { method: &Method::POST, path: "/v1/orders" };
    let claims = |scope: &str| ClaimSet(serde_json::Map::from_iter([("scope".to_owned(), json!(scope))]));
    let (more, less) = (claims("orders:read orders:write"), claims("orders:read"));
    let decide = |token| rules.decide(&AuthorizationRequest { peer: Some(&peer), operation, token });
    assert_eq!(decide(EndUserToken::Unverified), Ok(Some(2)), "the claim may be present");
    assert!(decide(EndUserToken::None).unwrap_err().lacks_claim_only());
    assert_eq!(decide(EndUserToken::Valid(&more)), Ok(Some(2)));
    assert!(decide(EndUserToken::Valid(&less)).unwrap_err().lacks_claim_only());
}

#[test]
fn entries_with_method_path_or_claim_do_not_match_byte_streams() {
    let rules = rules(
        r#"
        [[allow]]
        identity = ["spiffe://shop.example/a"]
        methods = ["GET"]
        [[allow]]
        identity = ["spiffe://shop.example/b"]
        paths = ["/*"]
        [[allow]]
        identity = ["spiffe://shop.example/c"]
        claims = { scope = "x" }
        [[allow]]
        identity = ["spiffe://shop.example/d"]
        "#,
    );
    for (name, token, allowed) in [
        ("a", EndUserToken::None, false),
        ("b", EndUserToken::None, false),
        ("c", EndUserToken::Unverified, false),
        ("d", EndUserToken::None, true),
    ] {
        let peer = peer(&format!("spiffe://shop.example/{name}"));
        let request =
            AuthorizationRequest { peer: Some(&peer), operation: RequestedOperation::ByteStream, token };
        assert_eq!(rules.decide(&request).is_ok(), allowed, "{name}");
    }
}

#[test]
fn an_entry_covers_narrower_ones() {
    let rules = rules(
        r#"
        [[allow]]
        identity = ["spiffe://shop.example/ns/*"]
        methods = ["GET", "POST"]
        paths = ["/v1/*"]
        [[allow]]
        identity = ["spiffe://shop.example/ns/a", "spiffe://shop.example/ns/b/*"]
        methods = ["GET"]
        paths = ["/v1/orders", "/v1/x/*"]
        claims = { scope = "x" }
        [[allow]]
        identity = ["spiffe://shop.example/ns/a"]
        methods = ["GET"]
        [[allow]]
        identity = ["spiffe://shop.example/*"]
        methods = ["GET"]
        paths = ["/v1/*"]
        "#,
    );
    let [wide, narrow, any_path, more] = rules.entries() else { unreachable!("four entries") };
    assert!(wide.covers(narrow) && wide.covers(wide));
    assert!(!wide.covers(any_path) && !wide.covers(more) && !narrow.covers(wide));
}

#[test]
fn ambiguous_paths_are_rejected() {
    for path in [
        "/a/../b",
        "/a/..",
        "/..",
        "/./a",
        "/a/.",
        "/a/%2e%2e/b",
        "/a/%2E./b",
        "/a/.%2e",
        "/%2e",
        "//a",
        "/a//b",
        "/a//",
        "/a%2fb",
        "/a%2Fb",
        "/a%5cb",
        "/a%5Cb",
        "/a\\b",
        "/a;b",
        "/a;x=1/b",
        "/a%3bb",
        "/a/..;/b",
        "/%",
        "/a%2",
        "/a%zz",
        "/%252e%252e/",
        "/a%252fb",
        "/a%00",
        "/a%0d%0aX",
        "/a%7f",
        "/%c0%ae%c0%ae/",
        "/%c0%af",
        "/%ff",
    ] {
        assert!(check_unambiguous(path).is_err(), "{path}");
    }
    for path in [
        "/",
        "/a",
        "/a/",
        "/a.b/..c/...",
        "/.well-known/x",
        "/a%20b",
        "/%C3%A4",
        "/100%25",
        "/a:b@c",
        "/a,b=c!d'e",
        "/%41",
        "/pkg.Service/Method",
        "*",
        "",
    ] {
        assert_eq!(check_unambiguous(path), Ok(()), "{path}");
    }
}

/// How lenient servers interpret a path; each variant exists in the wild.
fn readings(path: &str) -> Vec<String> {
    let decode = |text: &str| {
        let (mut out, bytes) = (Vec::new(), text.as_bytes());
        let mut at = 0;
        while at < bytes.len() {
            let digit = |at: usize| bytes.get(at).and_then(|byte| char::from(*byte).to_digit(16));
            match (bytes[at], digit(at + 1), digit(at + 2)) {
                (b'%', Some(high), Some(low)) => {
                    out.push(u8::try_from(high << 4 | low).unwrap());
                    at += 3;
                }
                (byte, ..) => {
                    out.push(byte);
                    at += 1;
                }
            }
        }
        String::from_utf8_lossy(&out).into_owned()
    };
    let without_parameters = |text: &str| {
        text.split('/').map(|part| part.split(';').next().unwrap_or_default()).collect::<Vec<_>>().join("/")
    };
    let without_dots = |text: &str| {
        let mut parts: Vec<&str> = Vec::new();
        for part in text.split('/').skip(1) {
            match part {
                "." => {}
                ".." => drop(parts.pop()),
                part => parts.push(part),
            }
        }
        format!("/{}", parts.join("/"))
    };
    let merged = |text: &str| {
        let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty()).collect();
        format!("/{}{}", parts.join("/"), if text.ends_with('/') && !parts.is_empty() { "/" } else { "" })
    };
    let once = decode(path);
    let twice = decode(&once);
    let slashes_replaced = once.replace('\\', "/");
    [&once, &twice, &slashes_replaced, &without_parameters(&once), &without_parameters(path)]
        .into_iter()
        .flat_map(|text| [text.clone(), without_dots(text), merged(text), without_dots(&merged(text))])
        .collect()
}

fn paths() -> impl Strategy<Value = String> {
    let parts = [
        "/", "/", "a", "admin", ".", "..", "%2e", "%2E", "%2f", "%5c", "\\", ";", "%3b", "%25", "2e", "2f",
        "%61", "%", "x", "%00",
    ];
    proptest::collection::vec(proptest::sample::select(parts.to_vec()), 0..10)
        .prop_map(|parts| format!("/public/{}", parts.concat()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// A path that passes is under the rule's prefix for every reader, so no spelling escapes the allowed prefix.
    #[test]
    fn every_reader_agrees_on_paths_that_pass(path in paths()) {
        if check_unambiguous(&path).is_ok() {
            let matches = PathPattern::new("/public/*").matches(&normalise(&path));
            for reading in readings(&path) {
                prop_assert_eq!(reading.starts_with("/public/") || reading == "/public", matches, "{} as {}", path, reading);
            }
        }
    }

    /// A request is allowed exactly if one entry alone allows it.
    #[test]
    fn an_allow_list_is_the_union_of_its_entries(
        client in proptest::sample::select(vec![Some(SHOP), Some(EVIL), None, Some("dns:cron.example")]),
        method in proptest::sample::select(vec!["GET", "POST", "DELETE"]),
        path in proptest::sample::select(vec!["/v1/orders", "/v1/orders/1", "/", "/v1"]),
    ) {
        let all = orders();
        let by_one_entry = all.entries().iter().position(|entry| {
            let (peer, method) = (client.map(peer), method.parse().unwrap());
            let operation = RequestedOperation::Http { method: &method, path };
            entry.first_mismatch(&AuthorizationRequest { peer: peer.as_ref(), operation, token: EndUserToken::None }, path).is_none()
        });
        prop_assert_eq!(ask(&all, client, method, path).ok(), by_one_entry.map(Some));
    }
}
