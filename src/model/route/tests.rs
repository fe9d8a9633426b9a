use proptest::prelude::*;

use super::*;
use crate::{
    config::{Endpoints, Policy, RouteMatch, Upstream, VersionMatch},
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
            version: None,
        },
        ..Route::new(RouteMatch::default(), Policy::default())
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

fn versioned(version: VersionMatch) -> Route {
    Route::new(RouteMatch { version: Some(version), ..RouteMatch::default() }, Policy::default())
}

fn version(is: &str) -> VersionMatch {
    VersionMatch { header: None, media_type: None, path: None, is: is.to_owned() }
}

#[test]
fn a_version_is_named_by_header_media_type_or_path() {
    let header = VersionMatch { header: Some("Accept-Version".to_owned()), ..version("1") };
    let media_type = VersionMatch { media_type: Some("version".to_owned()), ..version("2") };
    let path = VersionMatch { path: Some("/v".to_owned()), ..version("3") };
    let routes = Routes::new(&[
        route(&[], None, &[]),
        versioned(header),
        versioned(media_type),
        versioned(path),
        route(&[], Some("/v3/admin*"), &[]),
    ]);
    let find = |path: &str, fields: &[(&'static str, &'static str)]| {
        let fields =
            fields.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)));
        routes.find(&Method::GET, path, &fields.collect())
    };
    assert_eq!(find("/", &[]), Some(0));
    assert_eq!(find("/", &[("accept-version", "1")]), Some(1));
    assert_eq!(find("/", &[("accept-version", "1.0")]), Some(0), "compared exactly");
    assert_eq!(find("/", &[("accept", "text/html, application/json; version=2")]), Some(2));
    for (path, expected) in [
        ("/v3", 3),
        ("/v3/", 3),
        ("/v3/orders?x=/v1", 3),
        ("/%763/orders", 3),
        ("/x/../v3", 3),
        ("/v3/admin/x", 4),
        ("/v30", 0),
        ("/v3x/orders", 0),
        ("/V3", 0),
        ("/", 0),
    ] {
        assert_eq!(find(path, &[]), Some(expected), "{path}");
    }
}

#[test]
fn the_version_in_the_path_can_be_rewritten() {
    let path = VersionMatch { path: Some("/v".to_owned()), ..version("3") };
    let routes = Routes::new(&[Route { path_rewrite: Some("/".to_owned()), ..versioned(path) }]);
    let rewritten = routes.rewrite(0, &"/v3/orders?a=b".parse().unwrap());
    assert_eq!(rewritten.map(|path| path.to_string()), Some("/orders?a=b".to_owned()));
}
