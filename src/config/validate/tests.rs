use crate::config::{Source, Sources, load_sources};

/// The problems of a text, as lines.
fn problems(text: &str) -> Vec<String> {
    let sources = Sources(vec![Source { path: "x".into(), text: text.to_owned() }]);
    // Problems of features that are not built are ignored.
    match load_sources(sources, &|_| None) {
        Ok(_) => Vec::new(),
        Err(found) => found.lines().into_iter().filter(|line| !line.contains("not built")).collect(),
    }
}

#[track_caller]
fn rejects(text: &str, message: &str) {
    let found = problems(text);
    assert!(found.iter().any(|line| line.contains(message)), "{message:?} not in {found:#?} for\n{text}");
    assert_eq!(found.len(), 1, "{found:#?} for\n{text}");
}

#[test]
fn rejects_invalid_sections() {
    for (text, message) in [
        ("[runtime]\nworkers = 0", "x:2:11: error: the number of workers is out of range"),
        ("[runtime]\nworkers = 257", "the number of workers is out of range"),
        ("[service]\nname = ''", "this cannot be a service's name"),
        ("[inbound]\nforward_to = '127.0.0.1:0'", "port 0 cannot be connected to"),
        ("[inbound]\nforward_to = '127.0.0.1:4143'", "the proxy would forward to itself"),
        ("[[inbound.port]]\nport = 1\n[[inbound.port]]\nport = 1", "x:4:8: error: port 1 is described twice"),
        ("[[inbound.allow]]\nidentity = []", "no client would be allowed"),
        ("[[inbound.allow]]\nidentity = ['spiffe://a/*/b']", "x:2:13: error: this is not a SPIFFE ID"),
        ("[[inbound.allow]]\nidentity = ['spiffe://a/*']\npaths = ['x']", "a path begins with `/`"),
        ("[[inbound.allow]]\nidentity = ['spiffe://a/b']\nclaims = { a = 'b' }", "no token is verified"),
        ("[inbound.jwt]\nissuer = 'i'\naudiences = []\njwks = '/j'", "there is no audience"),
        ("[inbound.jwt]\nissuer='i'\naudiences=['a']\njwks='http://'", "neither a URL nor an absolute path"),
        ("[inbound.jwt]\nissuer='i'\naudiences=['a']\njwks='/j'\nexcept=['//']", "in their normal form"),
        (
            "[inbound.jwt]\nissuer='i'\naudiences=['a']\njwks='/j'\nclaim_headers={ x_forwarded_for = 'a' }",
            "this header is reserved",
        ),
        (
            "[[upstream]]\nname='a'\noauth2={ token_url='http://i/t', client_id='', client_secret_file='/s' }",
            "the client has no ID",
        ),
        (
            "[[upstream]]\nname='a'\noauth2={token_url='http://i/t',client_id='c',client_secret_file='/s',scopes=['a b']}",
            "this is not a single scope",
        ),
        ("[identity]\ncert = 'a'\nkey = 'b'", "the identity is not complete"),
        ("[identity]\ncert = 'a'\nspiffe = 'unix:/x'", "from files or the Workload API"),
        ("[identity]\nca = 'a'\nspiffe = 'unix:/x'", "from files or the Workload API"),
        ("[identity]\nspiffe = 'unix:x'", "not a Workload API address"),
        ("[inbound]\nmtls = 'strict'", "x:2:8: error: mutual TLS needs a certificate of this service"),
        ("[[inbound.port]]\nport = 1\nmtls = 'strict'", "x:3:8: error: mutual TLS needs a certificate"),
        ("[identity]\ncert = 'a'\nkey = 'b'\nca = { 'A' = 'c' }", "`A` is not a trust domain"),
        ("[[upstream]]\nname='a'\ntls = 'simple'\nidentity = ['spiffe://a*']", "this is not a SPIFFE ID"),
        ("[[upstream]]\nname='a'\ntls = 'simple'\nserver_name = 'a b'", "this is not a host's name"),
        ("[[upstream]]\nname='a'\nidentity = ['spiffe://a/b']", "this key has no effect without TLS"),
        ("[telemetry]\notlp = 'collector:4317'", "this is not a collector's URL"),
        ("[outbound]\nlisten = '127.0.0.1:4191'", "x:2:10: error: port 4191 is listened on twice"),
        (
            "[[upstream]]\nname='a'\nlisten = '[::1]:4143'",
            "x:3:10: error: port 4143 is listened on twice: by inbound.listen",
        ),
    ] {
        let found = problems(text);
        assert!(found.iter().any(|line| line.contains(message)), "{message:?} not in {found:#?}");
    }
}

#[test]
fn policies_are_checked_wherever_they_stand() {
    for (policy, message) in [
        ("connect_timeout = '0s'", "would never connect"),
        ("retry = { max = 21 }", "too many retries"),
        ("retry = { body_limit = '65MiB' }", "the body limit is too large"),
        ("retry = { methods = ['GET', 'a b'] }", "`a b` is not a method"),
        ("retry = { methods = ['get'] }", "`get` is not GET"),
        ("retry = { backoff = { base = '2s' } }", "begins above its maximum"),
        ("retry = { budget = { window = '1ms' } }", "this window is too short"),
        ("breaker = { window = '2h' }", "this window is too short or too long"),
        ("breaker = { trial_requests = 0 }", "it would stay open for ever"),
        ("breaker = { min_requests = 0 }", "at least one request"),
        ("breaker = { open_for = { base = '0s' } }", "`base` is 0"),
        ("outlier = { eject_for = { base = '1h' } }", "`base` is above `max`"),
        ("limits = { max_requests = 0 }", "would refuse every request"),
        ("rate_limit = { rate = 0 }", "would refuse every request"),
        ("rate_limit = { rate = 1, per = 'header:a b' }", "`a b` is not a header name"),
        ("hedge = { after = '0s' }", "would double every request"),
        ("fault = { abort = 99 }", "not a final status code"),
        ("fallback = { status = 600 }", "not a final status code"),
        ("cache = { max_bytes = '1KiB' }", "the cache has no memory"),
        ("cache = { object_limit = '2GiB' }", "too large for one response"),
        ("fallback = { upstream = 'nope' }", "there is no upstream `nope`"),
    ] {
        for table in [
            "[inbound]",
            "[defaults]",
            "[[upstream]]\nname='a'",
            "[[upstream]]\nname='a'\n[[upstream.route]]",
        ] {
            rejects(&format!("{table}\n{policy}"), message);
        }
        // Inherited three times, reported once.
        rejects(&format!("[defaults]\n{policy}\n[[upstream]]\nname='a'\n[[upstream.route]]"), message);
    }
    rejects(
        "[defaults]\nfallback = { status = 200, upstream = 'a' }\n[[upstream]]\nname='a'",
        "a fixed response or another upstream",
    );
}

#[test]
fn upstreams_and_routes_are_checked() {
    for (rest, message) in [
        ("hosts = []", "no request would ever reach this upstream"),
        ("endpoints = []", "there is no endpoint"),
        ("endpoints = ['a:0']", "x:3:14: error: port 0 cannot be connected to"),
        ("health = {}", "needs exactly one of"),
        ("health = { path = '/', tcp = true }", "needs exactly one of"),
        ("health = { tcp = false }", "checks nothing"),
        ("health = { path = 'x' }", "this is not a path"),
        ("health = { tcp = true, interval = '0s' }", "would never succeed"),
        ("health = { tcp = true, healthy_after = 0 }", "this count must be at least 1"),
        ("balance = 'hash:header:a b'", "`a b` is not a header name"),
        ("tls = 'mutual'", "mutual TLS needs a certificate of this service"),
        ("tls = 'simple'\nidentity = ['x']", "this is not a SPIFFE ID"),
        ("route = [{ match = { path = 'x' } }]", "a path begins with `/`"),
        ("route = [{ match = { path = '/a*b' } }]", "a `*` is allowed only at the end"),
        ("route = [{ match = { path = '/a?b' } }]", "the query is not matched"),
        ("route = [{ match = { path = '/a//b*' } }]", "paths are matched in their normal form"),
        ("route = [{ match = { methods = ['post'] } }]", "`post` is not POST"),
        ("route = [{ match = { headers = { 'a b' = '' } } }]", "`a b` is not a header name"),
        ("route = [{ path_rewrite = '/x' }]", "there is no matched path to rewrite"),
        ("route = [{ match = { path = '/a*' }, path_rewrite = 'x' }]", "this is not a path"),
        ("route = [{ request_headers = { set = { x = \"a\\nb\" } } }]", "this is not a header value"),
        ("route = [{ response_headers = { remove = ['TE'] } }]", "`TE` belongs to the connection"),
        ("route = [{ to = 'uu' }]", "there is no upstream `uu`"),
        ("route = [{ to = 'u' }]", "`to = \"u\"` forms a loop"),
        ("route = [{ to = [] }]", "there is no upstream to send requests to"),
        ("route = [{ to = [{ upstream = 'u', weight = 0 }] }]", "all weights are 0"),
        (
            "route = [{ to = [{ upstream = 'u', weight = 1 }, { upstream = 'v', weight = 1 }] }]",
            "there is no upstream `v`",
        ),
        (
            "route = [{ to = [{ upstream = 'u', weight = 1 }, { upstream = 'u', weight = 1 }] }]",
            "`u` is named twice",
        ),
        ("route = [{ to = [{ upstream = 'u' }] }]", "`weight` is missing here"),
        ("route = [{ to = 7 }]", "expected the name of an upstream, or [{ upstream"),
        ("route = [{ sticky = 'peer' }]", "`sticky` has no effect"),
        ("route = [{ to = [{ upstream = 'u', weight = 1 }], sticky = 'ip' }]", "`ip` is not a sticky key"),
        (
            "route = [{ match = { version = { is = '1' } } }]",
            "exactly one of `header`, `media_type` and `path`",
        ),
        (
            "route = [{ match = { version = { header = 'a', media_type = 'v', is = '1' } } }]",
            "exactly one of",
        ),
        ("route = [{ match = { version = { header = 'a b', is = '1' } } }]", "`a b` is not a header name"),
        (
            "route = [{ match = { version = { media_type = 'a b', is = '1' } } }]",
            "this is not the name of a parameter",
        ),
        ("route = [{ match = { path = '/x', version = { path = '/v', is = '1' } } }]", "exclude each other"),
        ("route = [{ match = { version = { path = 'v', is = '1' } } }]", "a path begins with `/`"),
        ("route = [{ match = { version = { path = '/v', is = '' } } }]", "this version is empty"),
        ("route = [{ deprecation = { since = 2026-12-01, sunset = 2026-11-30 } }]", "before the deprecation"),
        ("route = [{ deprecation = { since = 2026-12-01, after = '410' } }]", "needs a date"),
        ("route = [{ deprecation = { since = 2026-12-01, link = 'x' } }]", "this is not a URL"),
        ("route = [{ deprecation = { since = '2026-2-3' } }]", "`2026-2-3` is not a date"),
        ("route = [{ mirror = { upstream = 'v' } }]", "there is no upstream `v`"),
        (
            "route = [{ mirror = { upstream = 'u', methods = ['POST'] } }]",
            "copies of POST would change something twice",
        ),
        ("route = [{ mirror = { upstream = 'u', methods = [] } }]", "no request would be copied"),
        ("route = [{ mirror = { upstream = 'u', max_in_flight = 0 } }]", "every copy would be dropped"),
        ("route = [{ mirror = { upstream = 'u', timeout = '0s' } }]", "every copy would be given up"),
        ("route = [{ mirror = { upstream = 'u', ratio = 2 } }]", "2 is not a ratio"),
        ("route = [{ name = 'a/b' }]", "this cannot be a route's name"),
        ("route = [{ name = 'a' }, { name = 'a' }]", "two routes of `u` are called `a`"),
    ] {
        rejects(&format!("[[upstream]]\nname = 'u'\n{rest}"), message);
    }
    rejects("[[upstream]]\nname = 'a b'\nhosts = ['x']", "`a b` cannot be an upstream's name");
}

#[test]
fn upstreams_do_not_collide() {
    rejects(
        "[[upstream]]\nname='a'\n[[upstream]]\nname='a'\nhosts=['b']",
        "x:4:6: error: two upstreams are called `a`",
    );
    rejects("[[upstream]]\nname='a'\n[[upstream]]\nname='a'", "two upstreams are called `a`");
    rejects(
        "[[upstream]]\nname='a'\n[[upstream]]\nname='b'\nhosts=['b', 'A']",
        "x:5:13: error: host `a` is named twice",
    );
    rejects("[[upstream]]\nname='a'\nhosts=['a', 'a']", "host `a` is named twice");
    assert_eq!(problems("[[upstream]]\nname='a'\n[[upstream]]\nname='b'\nhosts=['b', 'a:81']"), [""; 0]);
}

#[test]
fn circles_are_found_and_diamonds_are_fine() {
    let upstream = |name: &str, to: &[&str]| {
        let routes: Vec<String> = to
            .iter()
            .enumerate()
            .map(|(at, to)| format!("{{ match = {{ path = '/{at}' }}, to = '{to}' }}"))
            .collect();
        format!("[[upstream]]\nname = '{name}'\nroute = [{}]\n", routes.join(", "))
    };
    let circle = [upstream("a", &["b"]), upstream("b", &["c"]), upstream("c", &["a"])].concat();
    rejects(&circle, "forms a loop");
    let diamond =
        [upstream("a", &["b", "c"]), upstream("b", &["d"]), upstream("c", &["d"]), upstream("d", &[])]
            .concat();
    assert_eq!(problems(&diamond), [""; 0]);
}
