//! HTTP/1.1 byte for byte: what is forwarded unchanged, what is rejected and how it is reported, and what ends a
//! connection.

use std::{
    fmt::Write as _,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::mpsc,
    time::Duration,
};

use serde_json::Value;

use crate::support::{
    Daemon, Proxy, RawClient, RawServer, Upstream, WAIT_LIMIT, eventually, free_port, has_tool,
    refusing_address,
    strict::{self, Message, Progress},
    text,
};

pub fn config(server: SocketAddr) -> String {
    format!(
        "[inbound]\nforward_to = \"{server}\"\n\
         [[upstream]]\nname = \"up\"\nendpoints = [\"{server}\"]\nlisten = \"127.0.0.1:0\"\n"
    )
}

fn both(proxy: &Proxy) -> [SocketAddr; 2] {
    [proxy.outbound(), proxy.inbound()]
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// A server that responds to each request with the result of `respond`.
fn server(respond: impl Fn(&Message) -> Vec<u8> + Send + Sync + 'static) -> RawServer {
    RawServer::start(move |mut stream| {
        let (mut got, mut chunk) = (Vec::new(), [0; 16 * 1024]);
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            got.extend_from_slice(&chunk[..count]);
            while let Progress::Complete(message, used) = strict::request(&got) {
                got.drain(..used);
                if stream.write_all(&respond(&message)).is_err() {
                    return;
                }
            }
        }
    })
}

/// A server that responds with the values of a field, as it received them.
fn echo(field: &'static str) -> RawServer {
    server(move |request| {
        let values = request.all(field).collect::<Vec<_>>().join("|");
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{values}", values.len()).into_bytes()
    })
}

fn read(proxy: &Proxy, path: &str) -> String {
    let mut client = RawClient::connect(proxy.admin());
    let response = client.ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"));
    assert_eq!(response.status(), 200, "{response:?}");
    response.text()
}

/// `outrigger_rejected_total` for malformed requests.
pub fn malformed(proxy: &Proxy, upstream: &str) -> u64 {
    let name = format!("outrigger_rejected_total{{upstream=\"{upstream}\",reason=\"malformed\"}} ");
    read(proxy, "/metrics")
        .lines()
        .find_map(|line| line.strip_prefix(&name)?.parse().ok())
        .unwrap_or_default()
}

/// Counted for any upstream.
fn malformed_anywhere(proxy: &Proxy) -> u64 {
    let page = read(proxy, "/metrics");
    let lines = page.lines().filter(|line| {
        line.starts_with("outrigger_rejected_total{") && line.contains("reason=\"malformed\"")
    });
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

pub fn last_request(proxy: &Proxy) -> Value {
    let all: Value = serde_json::from_str(&read(proxy, "/requests")).expect("JSON");
    let list = all.as_array().or_else(|| all["requests"].as_array()).expect("a list");
    list.first().cloned().unwrap_or_default()
}

// ---------------------------------------------------------------------------------------------------------------
// Rejected messages

/// Bytes after a CONNECT are meant for the other end of the tunnel: they are not a request to the proxy.
#[test]
fn nothing_after_a_rejected_connect_is_served() {
    let (saw, seen) = mpsc::channel();
    let server = server(move |request| {
        let _ = saw.send(request.target().to_owned());
        OK.into()
    });
    let proxy = Proxy::start(
        config(server.address())
            + &format!(
                "[[upstream]]\nname = \"down\"\nendpoints = [\"{}\"]\nretry = false\n",
                refusing_address()
            ),
    );
    for (address, to) in [
        (proxy.outbound(), "up"),
        (proxy.outbound(), "down:80"),
        (proxy.outbound(), "169.254.169.254:80"),
        (proxy.outbound(), "[::1%25lo]:80"),
        (proxy.inbound(), "up:80"),
        (proxy.upstream("up"), "up:80"),
    ] {
        let mut client = RawClient::connect(address);
        client.send(format!(
            "CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: up\r\n\r\n"
        ));
        let response = client.response().expect("well-formed").expect("a response");
        assert!(response.status() >= 400, "{to}: {response:?}");
        assert_eq!(response.field("connection"), Some("close"), "{to}: {response:?}");
        let (rest, closed) = client.read_to_close();
        assert!(closed && rest.is_empty(), "{to}: {:?}", String::from_utf8_lossy(&rest));
    }
    assert_eq!(
        RawClient::connect(proxy.outbound()).ask("GET /well HTTP/1.1\r\nHost: up\r\n\r\n").status(),
        200
    );
    assert_eq!(seen.try_iter().collect::<Vec<_>>(), ["/well"]);
}

/// Bytes that do not parse as a request get a response, are counted, and are logged like any other rejection.
#[test]
fn requests_rejected_by_the_parser_are_logged_and_counted() {
    let proxy = Proxy::start(config(refusing_address()));
    let many = "a: b\r\n".repeat(101);
    let long = "a".repeat(70_000);
    let mut count = 0;
    for (request, status, words, target) in [
        ("GET /a\u{7f}?token=hush HTTP/1.1\r\nHost: up\r\n\r\n".to_owned(), 400, "0x7f", "/a\\x7f"),
        ("GET /a b HTTP/1.1\r\nHost: up\r\n\r\n".to_owned(), 400, "a space", "/a b"),
        ("GET /a#frag HTTP/1.1\r\nHost: up\r\n\r\n".to_owned(), 400, "a fragment", "/a#frag"),
        ("GET /v HTTP/1.7\r\nHost: up\r\n\r\n".to_owned(), 400, "version", "/v"),
        ("GET /f HTTP/1.1\r\nHost: up\r\na b: c\r\n\r\n".to_owned(), 400, "field", "/f"),
        ("GET /n HTTP/1.1\nHost: up\r\n\r\n".to_owned(), 400, "LF without CR", "/n"),
        ("GET /n HTTP/1.1\r\nHost: up\na: b\r\n\r\n".to_owned(), 400, "LF without CR", "/n"),
        ("GET /n HTTP/1.1\r\nHost: up\n\r\n".to_owned(), 400, "LF without CR", "/n"),
        ("GET /n HTTP/1.1\r\nHost: up\r\n\n".to_owned(), 400, "LF without CR", "/n"),
        (format!("GET /m HTTP/1.1\r\n{many}\r\n"), 431, "100 header fields", "/m"),
        (format!("GET /l HTTP/1.1\r\na: {long}\r\n\r\n"), 431, "65536 bytes", "/l"),
        (
            "POST /c HTTP/1.1\r\nHost: up\r\nContent-Length: +1\r\n\r\n".to_owned(),
            400,
            "Content-Length",
            "/c",
        ),
        (
            "POST /t HTTP/1.1\r\nHost: up\r\nTransfer-Encoding: x\r\n\r\n".to_owned(),
            400,
            "Transfer-Encoding",
            "/t",
        ),
    ] {
        count += 1;
        for (upstream, address) in
            [("inbound", proxy.inbound()), ("up", proxy.upstream("up")), ("other", proxy.outbound())]
        {
            let mut client = RawClient::connect(address);
            let response = client.ask(&request);
            let problem: Value = serde_json::from_slice(&response.body).unwrap_or_default();
            assert_eq!((response.status(), &problem["cause"]), (status, &"malformed".into()), "{response:?}");
            assert_eq!(response.field("content-type"), Some("application/problem+json"));
            assert!(response.field("proxy-status").is_some_and(|said| said.contains("http_request_error")));
            let detail = problem["detail"].as_str().unwrap_or_default();
            assert!(detail.contains(words) && detail.contains(target), "{words}, {target}: {detail}");
            client.finish();
            assert!(client.read_to_close().1, "it lives on after {words}");
            assert_eq!(malformed(&proxy, upstream), count, "{upstream}: {words}");
            eventually("it is among the last requests", || {
                let last = last_request(&proxy);
                last["reason"] == "malformed"
                    && last["status"] == status
                    && last["why"].as_str().is_some_and(|why| why.contains(words) && why.contains(target))
            });
        }
    }
    eventually("all are in the access log", || proxy.stdout().lines().count() == 3 * count as usize);
    assert!(!proxy.stdout().contains("hush"), "a query may hold secrets");
}

/// Rejections at a later stage are counted in the same way.
#[test]
fn every_malformed_request_is_counted_once() {
    let server = server(|_| OK.into());
    let proxy = Proxy::start(config(server.address()));
    for (at, (request, upstream)) in [
        ("GET / HTTP/1.1\r\nHost: up\r\nHost: up\r\n\r\n", "other"),
        ("GET http://ftp:x/ HTTP/1.1\r\nHost: up\r\n\r\n", "other"),
        ("GET / HTTP/1.1\r\nHost: up\r\nConnection: host\r\n\r\n", "up"),
        ("GET / HTTP/1.1\r\nHost: up\r\nConnection: close, host\r\n\r\n", "up"),
        ("GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: a\r\nConnection: host\r\n\r\n", "other"),
        ("POST / HTTP/1.1\r\nHost: up\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", "up"),
    ]
    .into_iter()
    .enumerate()
    {
        let (before, all) = (malformed(&proxy, upstream), malformed_anywhere(&proxy));
        let response = RawClient::connect(proxy.outbound()).ask(request);
        assert_eq!(response.status(), 400, "{at}: {response:?}");
        assert_eq!(malformed(&proxy, upstream), before + 1, "{request:?}");
        assert_eq!(malformed_anywhere(&proxy), all + 1, "{request:?}");
    }
    for (address, upstream) in [(proxy.inbound(), "inbound"), (proxy.upstream("up"), "up")] {
        let (before, all) = (malformed(&proxy, upstream), malformed_anywhere(&proxy));
        let response =
            RawClient::connect(address).ask("GET / HTTP/1.1\r\nHost: up\r\nConnection: host\r\n\r\n");
        assert_eq!(response.status(), 400, "{response:?}");
        assert_eq!((malformed(&proxy, upstream), malformed_anywhere(&proxy)), (before + 1, all + 1));
    }
}

/// The head of a response is held to the same line ends: parsers that disagree about line ends disagree about fields.
#[test]
fn a_response_head_with_a_bare_lf_is_rejected() {
    let heads = [
        "HTTP/1.1 200 OK\nContent-Length: 2\r\n\r\n",
        "HTTP/1.1 200 OK\r\nA: b\nContent-Length: 2\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\n\r\n",
    ];
    let server = server(move |request| {
        let at: usize = request.target().trim_start_matches('/').parse().expect("a number");
        format!("{}ok", heads[at]).into_bytes()
    });
    let proxy =
        Proxy::start(format!("[defaults]\nretry = false\nbreaker = false\n{}", config(server.address())));
    for (at, head) in heads.iter().enumerate() {
        for address in both(&proxy) {
            let response = RawClient::connect(address).ask(format!("GET /{at} HTTP/1.1\r\nHost: up\r\n\r\n"));
            assert_eq!(response.status(), 502, "{:?}: {response:?}", head);
            assert!(response.text().contains("LF without CR"), "{}", response.text());
        }
    }
}

/// An error in the request body is a client error wherever it occurs, and counts against no upstream.
#[test]
fn a_malformed_request_body_is_a_400() {
    let http1 = Upstream::http1(|request| async {
        use http_body_util::BodyExt;
        let _ = request.into_body().collect().await;
        text("ok")
    });
    let http2 = Upstream::h2c(|request| async {
        use http_body_util::BodyExt;
        let _ = request.into_body().collect().await;
        text("ok")
    });
    let proxy = Proxy::start(
        config(http1.address())
            + &format!(
                "[[upstream]]\nname = \"two\"\nprotocol = \"h2\"\nendpoints = [\"{}\"]\n",
                http2.address()
            ),
    );
    let long = format!("{:x}\r\n{}\r\n", 40_000, "x".repeat(40_000)).repeat(4);
    let extensions = format!("1;{}\r\nx\r\n", "a".repeat(1000)).repeat(17);
    for (body, words) in [
        ("0x5\r\nhello\r\n0\r\n\r\n".to_owned(), "chunk size"),
        ("5\r\nhello!\r\n0\r\n\r\n".to_owned(), "does not end"),
        (format!("{long}zz\r\n"), "chunk size"),
        (format!("{long}0\r\na: b\n\r\n"), "LF without CR"),
        ("5\nhello\r\n0\r\n\r\n".to_owned(), "chunk size"),
        ("5\r\nhello\n0\r\n\r\n".to_owned(), "does not end"),
        (format!("{long}0\r\nno colon\r\n\r\n"), "trailers are malformed"),
        (format!("0\r\na: {}\r\n\r\n", "x".repeat(70_000)), "65536 bytes"),
        (extensions, "16384 bytes"),
    ] {
        for (host, address) in [("up", proxy.outbound()), ("two", proxy.outbound()), ("up", proxy.inbound())]
        {
            let upstream = if address == proxy.inbound() { "inbound" } else { host };
            let before = malformed(&proxy, upstream);
            let mut client = RawClient::connect(address);
            client.send(format!("PUT / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n"));
            client.send(&body);
            let response = client.response().expect("well-formed").expect("a response");
            let problem: Value = serde_json::from_slice(&response.body).unwrap_or_default();
            assert_eq!(
                (response.status(), &problem["cause"]),
                (400, &"malformed".into()),
                "{words}: {response:?}"
            );
            let detail = problem["detail"].as_str().unwrap_or_default();
            assert!(detail.contains(words), "{words}: {detail}");
            client.finish();
            let (rest, closed) = client.read_to_close();
            assert!(closed && rest.is_empty(), "{words}: {rest:?}");
            assert_eq!(malformed(&proxy, upstream), before + 1, "{upstream}, {words}");
            eventually("it is among the last requests", || last_request(&proxy)["reason"] == "malformed");
            let last = last_request(&proxy);
            assert_eq!((&last["status"], &last["attempts_made"]), (&400.into(), &1.into()), "{last}");
            assert_eq!(last["attempts"][0]["outcome"], "client_error", "{last}");
        }
    }
    let metrics = read(&proxy, "/metrics");
    for upstream in ["up", "two", "inbound"] {
        let moved = format!("outrigger_breaker_transitions_total{{upstream=\"{upstream}\",to=\"open\"}} 0");
        assert!(metrics.contains(&moved), "{upstream} was blamed");
    }
    for host in ["up", "two"] {
        let response =
            RawClient::connect(proxy.outbound()).ask(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert_eq!(response.status(), 200);
    }
}

/// `Content-Length` is meaningful in a HEAD response, too, and clients read it.
#[test]
fn an_invalid_content_length_of_a_head_response_is_rejected() {
    let server = server(|request| {
        let length = request.target().trim_start_matches('/').replace("%20", " ").replace("%2C", ",");
        format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").into_bytes()
    });
    let proxy =
        Proxy::start(format!("[defaults]\nretry = false\nbreaker = false\n{}", config(server.address())));
    for address in both(&proxy) {
        for (said, expected) in
            [("5", Some("5")), ("5%20GET%20/x", None), ("+5", None), ("5%2C6", None), ("0x5", None)]
        {
            let mut client = RawClient::connect(address);
            client.send(format!("HEAD /{said} HTTP/1.1\r\nHost: up\r\nConnection: close\r\n\r\n"));
            let head = String::from_utf8_lossy(&client.read_to_close().0).to_ascii_lowercase();
            match expected {
                Some(length) => assert!(head.contains(&format!("content-length: {length}\r\n")), "{head}"),
                None => assert!(head.starts_with("http/1.1 502 "), "{said}: {head}"),
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Forwarded messages

pub const UNUSUAL: [&[u8]; 7] = [
    b"/s?q={\"a\":1}",
    b"/a\"b<c>d`e|f^g\\h[i]{j}",
    b"/caf\xe9/\xff\xfe",
    "/café?ü".as_bytes(),
    b"/?<script>\"'`",
    b"/x?\x80",
    b"/%zz?%",
];

fn get(target: &[u8]) -> Vec<u8> {
    [b"GET ", target, b" HTTP/1.1\r\nHost: up\r\n\r\n"].concat()
}

/// A server that responds with 200 to each request, and the start lines that it receives.
pub fn start_line_server() -> (RawServer, mpsc::Receiver<Vec<u8>>) {
    let (saw, seen) = mpsc::channel();
    let server = RawServer::start(move |mut stream| {
        let (mut got, mut chunk) = (Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            got.extend_from_slice(&chunk[..count]);
            if got.ends_with(b"\r\n\r\n") {
                let line = got.split(|byte| *byte == b'\r').next().unwrap_or_default().to_vec();
                let _ = saw.send(line);
                got.clear();
                if stream.write_all(OK.as_bytes()).is_err() {
                    return;
                }
            }
        }
    });
    (server, seen)
}

/// Characters that RFC 3986 forbids and every server accepts are forwarded byte for byte.
#[test]
fn unusual_targets_are_forwarded_byte_for_byte() {
    let (server, seen) = start_line_server();
    let proxy = Proxy::start(config(server.address()));
    for target in UNUSUAL {
        let line = [b"GET ", target, b" HTTP/1.1"].concat();
        for address in both(&proxy) {
            assert_eq!(RawClient::connect(address).ask(get(target)).status(), 200);
            assert_eq!(seen.recv_timeout(WAIT_LIMIT).expect("a request"), line, "{}", target.escape_ascii());
        }
        let absolute = get(&[b"http://up", target].concat());
        assert_eq!(RawClient::connect(proxy.outbound()).ask(absolute).status(), 200);
        assert_eq!(seen.recv_timeout(WAIT_LIMIT).expect("a request"), line, "{}", target.escape_ascii());
    }
}

#[test]
fn unusual_targets_reach_nginx_as_without_a_proxy() {
    if !has_tool(&["nginx"]) {
        return;
    }
    let port = free_port();
    let nginx = format!(
        "daemon off; pid @DIR@/pid; error_log stderr; worker_processes 1; events {{}}\n\
         http {{ access_log off; client_body_temp_path @DIR@/a; proxy_temp_path @DIR@/b;\n\
         fastcgi_temp_path @DIR@/c; uwsgi_temp_path @DIR@/d; scgi_temp_path @DIR@/e;\n\
         server {{ listen 127.0.0.1:{port}; location / {{ return 200 $request_uri; }} }} }}\n"
    );
    let direct = SocketAddr::from(([127, 0, 0, 1], port));
    let _nginx =
        Daemon::start("nginx", &["-c", "@DIR@/conf", "-p", "@DIR@"], &[("conf", &nginx)]).listening(direct);
    let proxy = Proxy::start(config(direct));
    for target in UNUSUAL {
        let without = RawClient::connect(direct).ask(get(target));
        for address in both(&proxy) {
            let with = RawClient::connect(address).ask(get(target));
            assert_eq!(
                (with.status(), &with.body),
                (without.status(), &without.body),
                "{}",
                target.escape_ascii()
            );
        }
    }
}

/// Over HTTP/2 such a target is percent-encoded, which is equivalent.
#[test]
fn unusual_targets_are_percent_encoded_towards_http2() {
    let upstream = Upstream::h2c(|request| async move { text(request.uri().to_string()) });
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nprotocol = \"h2\"\nendpoints = [\"{}\"]\n",
        upstream.address()
    ));
    let response = RawClient::connect(proxy.outbound()).ask(get(b"/a<b>?\"\xe9"));
    assert_eq!(
        (response.status(), response.text().as_str()),
        (200, "http://up/a%3Cb%3E?%22%E9"),
        "{response:?}"
    );
}

#[test]
fn targets_and_hosts_are_parsed_as_the_rfcs_require() {
    let server = server(|request| {
        let expected = format!("{} {}", request.start, request.field("host").unwrap_or("-"));
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{expected}", expected.len()).into_bytes()
    });
    let proxy = Proxy::start(config(server.address()));
    for (request, expected) in [
        ("OPTIONS http://up HTTP/1.1\r\nHost: up\r\n\r\n", "OPTIONS * HTTP/1.1 up"),
        ("OPTIONS http://up/ HTTP/1.1\r\nHost: up\r\n\r\n", "OPTIONS / HTTP/1.1 up"),
        ("OPTIONS * HTTP/1.1\r\nHost: up\r\n\r\n", "OPTIONS * HTTP/1.1 up"),
        ("GET http://up HTTP/1.1\r\nHost: up\r\n\r\n", "GET / HTTP/1.1 up"),
        ("GET / HTTP/1.1\r\nHost: up:\r\n\r\n", "GET / HTTP/1.1 up:"),
        ("GET http://up:/a HTTP/1.1\r\nHost: up\r\n\r\n", "GET /a HTTP/1.1 up:"),
    ] {
        let response = RawClient::connect(proxy.outbound()).ask(request);
        assert_eq!((response.status(), response.text().as_str()), (200, expected), "{request:?}");
    }
    for request in [
        "GET /a#frag HTTP/1.1\r\nHost: up\r\n\r\n",
        "GET http://up/a#frag HTTP/1.1\r\nHost: up\r\n\r\n",
        "GET http://[::1%25lo]/ HTTP/1.1\r\nHost: up\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: [::1%lo]\r\n\r\n",
    ] {
        let response = RawClient::connect(proxy.outbound()).ask(request);
        assert_eq!(response.status(), 400, "{request:?}: {response:?}");
    }
}

/// Trailers reach a client in whichever way it says that it accepts them.
#[test]
fn trailers_reach_clients_that_accept_them() {
    let server = server(|_| {
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n";
        format!("{head}3\r\nabc\r\n0\r\nx-sum: 7\r\n\r\n").into_bytes()
    });
    let proxy = Proxy::start(config(server.address()));
    for (te, takes) in [
        ("TE: trailers\r\n", true),
        ("TE: Trailers\r\n", true),
        ("TE: trailers, deflate\r\n", true),
        ("TE: deflate;q=0.5 , TRAILERS\r\n", true),
        ("TE: deflate\r\nTE: trailers\r\n", true),
        ("TE: deflate\r\n", false),
        ("TE: xtrailers\r\n", false),
        ("", false),
    ] {
        for address in both(&proxy) {
            let response = RawClient::connect(address)
                .ask(format!("GET / HTTP/1.1\r\nHost: up\r\nConnection: TE\r\n{te}\r\n"));
            assert_eq!(
                (response.status(), response.trailers.len()),
                (200, usize::from(takes)),
                "{te:?}: {response:?}"
            );
        }
    }
}

/// `TE` is for the next hop only, and `Connection` must list it (RFC 9110 §10.1.4).
#[test]
fn te_is_forwarded_with_its_connection_option() {
    let (connection, te) = (echo("connection"), echo("te"));
    let config = format!(
        "[[upstream]]\nname = \"connection\"\nendpoints = [\"{}\"]\n[[upstream]]\nname = \"te\"\nendpoints = [\"{}\"]\n",
        connection.address(),
        te.address()
    );
    let proxy = Proxy::start(config);
    for (fields, said) in [
        ("TE: trailers, deflate\r\n", ["te", "trailers"]),
        ("TE: deflate\r\nTE: Trailers\r\n", ["te", "trailers"]),
        ("TE: deflate\r\n", ["", ""]),
        ("", ["", ""]),
        ("TE: trailers\r\nConnection: Upgrade, TE\r\nUpgrade: chatter\r\n", ["upgrade, te", "trailers"]),
    ] {
        for (host, said) in ["connection", "te"].into_iter().zip(said) {
            let response = RawClient::connect(proxy.outbound())
                .ask(format!("GET / HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n"));
            assert_eq!((response.status(), response.text().as_str()), (200, said), "{fields:?}");
        }
    }
}

/// Trailers of this many bytes after a body.
fn with_trailers(bytes: usize) -> crate::support::UpstreamResponse {
    use http_body_util::BodyExt;
    let fields = (0..bytes / 1000).map(|at| {
        let name = http::HeaderName::try_from(format!("x-{at}")).expect("a name");
        (name, http::HeaderValue::try_from("a".repeat(1000 - 40)).expect("a value"))
    });
    let mut trailers: http::HeaderMap = fields.collect();
    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
    let body = http_body_util::Full::new(bytes::Bytes::from_static(b"abc"))
        .with_trailers(async { Some(Ok(trailers)) });
    http::Response::new(body.boxed_unsync())
}

/// What follows the head of an HTTP/2 response: the data, then the trailers or the stream error.
type Rest = (Vec<u8>, Result<Option<http::HeaderMap>, ()>);

/// Too large trailers are an error of their stream, reported as such; the connection is kept.
#[test]
fn trailers_above_64_kib_are_an_error() {
    use http_body_util::{BodyExt, Empty};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    let upstream = Upstream::h2c(|request| async move {
        with_trailers(request.uri().path().trim_start_matches('/').parse().unwrap_or(0))
    });
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{0}\"\n[[inbound.port]]\nport = {1}\nprotocol = \"h2\"\n\
         [[upstream]]\nname = \"up\"\nprotocol = \"h2\"\nendpoints = [\"{0}\"]\nbreaker = false\noutlier = false\n",
        upstream.address(),
        upstream.address().port()
    ));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    for address in both(&proxy) {
        let rest: Vec<Rest> = runtime.block_on(async {
            let stream = tokio::net::TcpStream::connect(address).await.expect("connect");
            let builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
                .max_header_list_size(1 << 20)
                .clone();
            let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.expect("HTTP/2");
            tokio::spawn(connection);
            let mut all = Vec::new();
            for (size, content_type) in [
                (60_000, "text/plain"),
                (80_000, "text/plain"),
                (300_000, "text/plain"),
                (80_000, "application/grpc"),
            ] {
                let request = http::Request::post(format!("http://up/{size}"))
                    .header("content-type", content_type)
                    .header("te", "trailers")
                    .body(Empty::<bytes::Bytes>::new())
                    .expect("a request");
                // The stream may be reset before its head is sent.
                let Ok(response) = sender.send_request(request).await else {
                    all.push((Vec::new(), Err(())));
                    continue;
                };
                let mut body = response.into_body();
                let (mut data, mut end) = (Vec::new(), Ok(None));
                while let Some(frame) = body.frame().await {
                    match frame.map(hyper::body::Frame::into_data) {
                        Ok(Ok(part)) => data.extend_from_slice(&part),
                        Ok(Err(frame)) => end = Ok(frame.into_trailers().ok()),
                        Err(_) => {
                            end = Err(());
                            break;
                        }
                    }
                }
                all.push((data, end));
            }
            all
        });
        let [fits, large, larger, grpc] = &rest[..] else { panic!("{} responses", rest.len()) };
        assert_eq!(fits.1.as_ref().map(|trailers| trailers.as_ref().map_or(0, http::HeaderMap::len)), Ok(61));
        assert_eq!((&large.1, &larger.1), (&Err(()), &Err(())));
        let trailers = grpc.1.as_ref().expect("a proper end").as_ref().expect("trailers");
        assert_eq!(
            (&grpc.0[..], &trailers["grpc-status"]),
            (&b"abc"[..], &http::HeaderValue::from_static("8"))
        );
        // Over HTTP/1.1 the body has no end.
        let mut client = RawClient::connect(address);
        client.send("GET /80000 HTTP/1.1\r\nHost: up\r\nTE: trailers\r\n\r\n");
        let (got, closed) = client.read_to_close();
        let got = String::from_utf8_lossy(&got);
        assert!(closed && got.contains("abc") && !got.contains("\r\n0\r\n"), "{got}");
    }
}

/// HTTP/1.0 has no expectations: the body is forwarded at once.
#[test]
fn an_expectation_of_http_1_0_is_ignored() {
    let expect = echo("expect");
    let proxy = Proxy::start(config(expect.address()));
    for address in both(&proxy) {
        for expect in ["100-continue", "wonders"] {
            let began = std::time::Instant::now();
            let mut client = RawClient::connect(address);
            client.send(format!(
                "PUT / HTTP/1.0\r\nHost: up\r\nExpect: {expect}\r\nContent-Length: 4\r\n\r\nbody"
            ));
            let response = String::from_utf8_lossy(&client.read_to_close().0).into_owned();
            // An HTTP/1.0 client would take an interim response for the final one.
            let is_ok = response.starts_with("HTTP/1.0 200 ") || response.starts_with("HTTP/1.1 200 ");
            assert!(is_ok && response.ends_with("\r\n\r\n"), "{response}");
            // The proxy waits one second for a server that does not send 100 before it forwards the body.
            assert!(began.elapsed() < Duration::from_secs(1), "held for {:?}", began.elapsed());
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Connection ends

/// A truncated response must not destroy a complete one before it: no reset, though bytes are unread.
#[test]
fn a_complete_response_arrives_when_the_next_one_is_truncated() {
    let server = RawServer::start(|mut stream: TcpStream| {
        let (mut got, mut chunk) = (Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            got.extend_from_slice(&chunk[..count]);
            while let Progress::Complete(message, used) = strict::request(&got) {
                got.drain(..used);
                let breaks = message.target() == "/breaks";
                let response = if breaks { "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf" } else { OK };
                let _ = stream.write_all(response.as_bytes());
                if breaks {
                    let _ = stream.shutdown(Shutdown::Both);
                    return;
                }
            }
        }
    });
    let proxy = Proxy::start(config(server.address()));
    for address in both(&proxy) {
        let mut client = RawClient::connect(address);
        let mut requests =
            String::from("GET /whole HTTP/1.1\r\nHost: up\r\n\r\nGET /breaks HTTP/1.1\r\nHost: up\r\n\r\n");
        // More than one read, so that some of it is still in the kernel when the connection ends.
        let padding = "x".repeat(30_000);
        for _ in 0..8 {
            let _ = write!(requests, "GET /never HTTP/1.1\r\nHost: up\r\nx: {padding}\r\n\r\n");
        }
        assert!(client.send(requests));
        let (mut got, mut chunk) = (Vec::new(), [0; 4096]);
        let end = loop {
            match client.stream.read(&mut chunk) {
                Ok(0) => break None,
                Ok(count) => got.extend_from_slice(&chunk[..count]),
                Err(error) => break Some(error.kind()),
            }
        };
        let got = String::from_utf8_lossy(&got);
        assert!(got.starts_with("HTTP/1.1 200 OK\r\n") && got.contains("\r\n\r\nok"), "{got}");
        assert!(got.ends_with("half"), "{got}");
        assert_eq!(end, None::<io::ErrorKind>, "a proper end");
    }
}
