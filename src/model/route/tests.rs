use proptest::prelude::*;

use super::*;
use crate::{
    config::{Endpoints, HeaderEdits, Policy, RouteMatch, Upstream},
    redact::Secret,
};

fn upstream(name: &str, hosts: &[&str]) -> Upstream {
    Upstream {
        hosts: hosts.iter().map(|host| host.parse().unwrap()).collect(),
        ..Upstream::new(name, Endpoints::Fixed(Vec::new()), Policy::default())
    }
}

fn route(methods: &[&str], path: Option<&str>, headers: &[(&str, &str)]) -> Route {
    Route {
        matches: RouteMatch {
            methods: methods.iter().map(ToString::to_string).collect(),
            path: path.map(str::to_owned),
            headers: headers
                .iter()
                .map(|(name, value)| (name.to_string(), Secret::redact_url(*value)))
                .collect(),
        },
        to: None,
        path_rewrite: None,
        request_headers: HeaderEdits::default(),
        response_headers: HeaderEdits::default(),
        queue: None,
        policy: Policy::default(),
    }
}

fn rewriting(path: &str, to: &str) -> Routes {
    Routes::new(&[Route { path_rewrite: Some(to.to_owned()), ..route(&[], Some(path), &[]) }])
}

fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    pairs
        .iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
        .collect()
}

#[test]
fn the_nearest_host_wins() {
    let router = Router::new(&Config {
        upstreams: vec![
            upstream("any", &["*"]),
            upstream("example", &["*.example", "*.b.example:81"]),
            upstream("b", &["*.b.example"]),
            upstream("exact", &["x.b.example", "[::1]:80"]),
            upstream("port", &["x.b.example:8080"]),
        ],
        ..Config::default()
    });
    for (host, port, expected) in [
        ("x.b.example", Some(80), 3),
        ("x.b.example", None, 3),
        ("x.b.example", Some(8080), 4),
        ("X.B.Example.", Some(8080), 4),
        ("y.b.example", Some(80), 2),
        ("y.b.example", Some(81), 1),
        ("z.y.b.example", None, 2),
        ("c.example", None, 1),
        ("example", None, 0),
        (".example", None, 0),
        ("[::1]", Some(80), 3),
        ("::1", Some(80), 3),
        ("::1", Some(81), 0),
        ("", None, 0),
    ] {
        assert_eq!(router.upstream(host, port), Some(expected), "{host} {port:?}");
    }
    let none = Router::new(&Config::default());
    assert_eq!(none.upstream("a", None), None);
}

#[test]
fn the_most_specific_route_wins() {
    let routes = Routes::new(&[
        route(&[], None, &[]),
        route(&["POST"], None, &[]),
        route(&[], Some("/v1/*"), &[]),
        route(&[], Some("/v1/charge*"), &[]),
        route(&["POST"], Some("/v1/charge*"), &[]),
        route(&[], Some("/v1/charge*"), &[("x-tenant", "gold")]),
        route(&[], Some("/v1/charge"), &[]),
        route(&[], Some("/v1/charge"), &[]),
        route(&["GET"], Some("/only-get"), &[]),
    ]);
    let gold = headers(&[("x-tenant", "silver"), ("x-tenant", "gold")]);
    let none = HeaderMap::new();
    for (method, path, headers, expected) in [
        (Method::GET, "/", &none, 0),
        (Method::POST, "/", &none, 1),
        (Method::GET, "/v1/x", &none, 2),
        (Method::GET, "/v1/charge/7", &none, 3),
        (Method::POST, "/v1/charges", &none, 4),
        (Method::POST, "/v1/charge/7", &gold, 5),
        (Method::GET, "/v1/charge", &gold, 6),
        (Method::GET, "/v1/charge?x=1", &none, 6),
        (Method::GET, "/v2/%2e%2e//v1/charge", &none, 6),
        (Method::GET, "/only-get", &none, 8),
        (Method::POST, "/only-get", &none, 1),
        (Method::OPTIONS, "*", &none, 0),
    ] {
        assert_eq!(routes.find(&method, path, headers), Some(expected), "{method} {path}");
    }
    assert_eq!(Routes::default().find(&Method::GET, "/", &none), None);
}

#[test]
fn the_matched_prefix_is_replaced() {
    for (path, to, from, expected) in [
        ("/v1/charge*", "/charge", "/v1/charge/5?a=b", "/charge/5?a=b"),
        ("/v1/charge*", "/charge", "/v1/charges", "/charges"),
        ("/v1*", "/", "/v1/x", "/x"),
        ("/v1*", "/", "/v1", "/"),
        ("/v1/*", "/v2/", "/v1/x/y", "/v2/x/y"),
        ("/old", "/new/place", "/old?q", "/new/place?q"),
        ("/v1/*", "/", "/a/../v1/%78", "/x"),
    ] {
        let got = rewriting(path, to).rewrite(0, &from.parse().unwrap()).unwrap();
        assert_eq!(got.as_str(), expected, "{path} → {to} of {from}");
    }
    assert_eq!(
        Routes::new(&[route(&[], Some("/a"), &[])]).rewrite(0, &PathAndQuery::from_static("/a")),
        None
    );
}

#[test]
fn a_prefix_with_dots_is_not_normalised_away() {
    let routes = Routes::new(&[route(&[], Some("/a/.*"), &[]), route(&[], Some("/%7euser/*"), &[])]);
    assert_eq!(routes.find(&Method::GET, "/a/.git", &HeaderMap::new()), Some(0));
    assert_eq!(routes.find(&Method::GET, "/a/b", &HeaderMap::new()), None);
    assert_eq!(routes.find(&Method::GET, "/~user/x", &HeaderMap::new()), Some(1));
}

/// The same result as the table's, computed the slow and plain way.
fn find_by_scan(routes: &[Route], method: &Method, path: &str, headers: &HeaderMap) -> Option<usize> {
    let matches = |route: &Route| {
        let path_holds = match route.matches.path.as_deref() {
            None => true,
            Some(pattern) => match pattern.strip_suffix('*') {
                Some(prefix) => path.starts_with(prefix),
                None => path == pattern,
            },
        };
        let methods = &route.matches.methods;
        path_holds
            && (methods.is_empty() || methods.iter().any(|m| m == method.as_str()))
            && route.matches.headers.iter().all(|(name, value)| {
                headers.get(name).is_some_and(|other| other.as_bytes() == value.expose().as_bytes())
            })
    };
    let weight = |route: &Route| {
        let path = match route.matches.path.as_deref() {
            None => (0, 0),
            Some(pattern) if pattern.ends_with('*') => (1, pattern.len()),
            Some(_) => (2, 0),
        };
        (path, route.matches.headers.len(), !route.matches.methods.is_empty())
    };
    let matching = routes.iter().enumerate().filter(|(_, route)| matches(route));
    matching.max_by_key(|(index, route)| (weight(route), Reverse(*index))).map(|(index, _)| index)
}

fn any_route() -> impl Strategy<Value = Route> {
    let methods = prop_oneof![Just(&[][..]), Just(&["GET"][..]), Just(&["GET", "POST"][..])];
    let path = proptest::option::of(prop_oneof![
        Just("/*"),
        Just("/a*"),
        Just("/a/*"),
        Just("/a/b*"),
        Just("/a"),
        Just("/a/b"),
    ]);
    let headers = prop_oneof![
        Just(&[][..]),
        Just(&[("x", "1")][..]),
        Just(&[("y", "1")][..]),
        Just(&[("x", "1"), ("y", "1")][..])
    ];
    (methods, path, headers).prop_map(|(methods, path, headers)| route(methods, path, headers))
}

proptest! {
    #[test]
    fn the_table_agrees_with_a_scan(
        routes in proptest::collection::vec(any_route(), 0..12),
        post in any::<bool>(),
        path in prop_oneof![Just("/"), Just("/a"), Just("/a/"), Just("/a/b"), Just("/a/bc"), Just("/c")],
        x in any::<bool>(),
        y in any::<bool>(),
    ) {
        let method = if post { Method::POST } else { Method::GET };
        let mut given = HeaderMap::new();
        if x { given.insert("x", HeaderValue::from_static("1")); }
        if y { given.insert("y", HeaderValue::from_static("1")); }
        let found = Routes::new(&routes).find(&method, path, &given);
        prop_assert_eq!(found, find_by_scan(&routes, &method, path, &given));

        // The order in the file matters only among equally specific routes.
        let mut reversed = routes.clone();
        reversed.reverse();
        let other = Routes::new(&reversed).find(&method, path, &given);
        let paths = |found: Option<usize>, of: &[Route]| found.map(|at| {
            let matches = &of[at].matches;
            (matches.path.clone(), matches.headers.len(), matches.methods.is_empty())
        });
        prop_assert_eq!(paths(found, &routes), paths(other, &reversed));
    }
}
