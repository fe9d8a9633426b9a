//! Which connection a request uses, and when it closes.

use std::{fs, net::SocketAddr};

use tokio::{
    io::Interest,
    net::{TcpListener, TcpSocket},
    task::JoinSet,
};

use super::{
    test_server::{End, OK, OK_IN_PIECES, Script, TestServer, tls_config},
    *,
};
use crate::dns::test_dns::TestDns;

const LIMITS: FetchLimits = FetchLimits { timeout: Duration::from_secs(20), max_body: 1024 };
/// Responses without an end: a chunked body of which some has arrived, and one that is shorter than announced.
const ENDLESS: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n|5\r\nevent\r\n";
const STALLED: &str = "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n|some";

fn fetcher() -> Fetcher {
    Fetcher::new(Arc::new(Resolver::from_system().unwrap()))
}

fn get(url: &str) -> Request<Bytes> {
    Request::get(url).body(Bytes::new()).unwrap()
}

fn post(url: &str) -> Request<Bytes> {
    Request::post(url).body(Bytes::from_static(b"spans")).unwrap()
}

async fn fetch_ok(fetcher: &Fetcher, request: Request<Bytes>) {
    let response = fetcher.fetch(request, LIMITS).await.unwrap();
    assert_eq!((response.status().as_u16(), &response.body()[..]), (200, &b"ok"[..]));
}

#[tokio::test]
async fn requests_to_one_server_use_one_connection() {
    let responses = &[OK, OK_IN_PIECES, OK, OK_IN_PIECES];
    let server = TestServer::start(Script { responses, end: End::Wait }).await;
    let (fetcher, url) = (fetcher(), server.url());
    // In a task of its own, as the tasks that fetch keys and tokens: the runtime polls it before the pool's.
    let requests = async move {
        for _ in 0..2 {
            fetch_ok(&fetcher, get(&url)).await;
            // A clone has the same pool.
            fetch_ok(&fetcher.clone(), post(&url)).await;
        }
    };
    tokio::spawn(requests).await.unwrap();
    assert_eq!((server.requests().len(), server.connections()), (4, 1));
}

#[tokio::test]
async fn a_stream_uses_the_connection_of_a_finished_response() {
    let responses =
        &[OK_IN_PIECES, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n|1\r\na\r\n|0\r\n\r\n", OK];
    let server = TestServer::start(Script { responses, end: End::Wait }).await;
    let fetcher = fetcher();
    fetch_ok(&fetcher, get(&server.url())).await;
    let mut stream = fetcher.stream(get(&server.url()), LIMITS.timeout).await.unwrap().into_body();
    assert_eq!(stream.chunk().await.unwrap().as_deref(), Some(&b"a"[..]));
    assert_eq!(stream.chunk().await.unwrap(), None);
    yield_now().await;
    fetch_ok(&fetcher, get(&server.url())).await;
    assert_eq!((server.requests().len(), server.connections()), (3, 1));
}

/// The server closes after its response, or on the next request: the client notices at different moments.
#[tokio::test]
async fn a_connection_that_the_server_closed_fails_no_request() {
    for (end, repeated) in [(End::Close, 0), (End::CloseOnRequest, 1)] {
        for request in [get, post] {
            let server = TestServer::start(Script { responses: &[OK], end }).await;
            let fetcher = fetcher();
            fetch_ok(&fetcher, request(&server.url())).await;
            fetch_ok(&fetcher, request(&server.url())).await;
            assert_eq!((server.requests().len(), server.connections()), (2 + repeated, 2));
        }
    }
}

#[tokio::test]
async fn a_request_on_a_new_connection_is_sent_once() {
    for (responses, message) in [
        (&[][..], "sent no valid response: connection closed before message completed"),
        (&["HTTP/1.1 200 OK\r\n"], "sent no valid response: connection closed before message completed"),
        (&["SSH-2.0-OpenSSH_9.2\r\n\r\n"], "sent no valid response: invalid HTTP version parsed"),
        (&["HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nsome"], "sent no valid response: "),
    ] {
        let end = if responses.is_empty() { End::CloseOnRequest } else { End::Close };
        let server = TestServer::start(Script { responses, end }).await;
        let error = fetcher().fetch(get(&server.url()), LIMITS).await.unwrap_err();
        assert!(error.to_string().contains(&format!("{} {message}", server.address)), "{error}");
        assert_eq!((server.requests().len(), server.connections()), (1, 1), "{error}");
    }
}

async fn fetch_eight_at_once(fetcher: &Fetcher, server: &TestServer) {
    let mut requests = JoinSet::new();
    for _ in 0..8 {
        let (fetcher, url) = (fetcher.clone(), server.url());
        requests.spawn(async move { fetch_ok(&fetcher, get(&url)).await });
    }
    while let Some(done) = requests.join_next().await {
        done.unwrap();
    }
}

/// A server that closes each connection on its second request gets no third one on an old connection.
#[tokio::test]
async fn connections_that_are_stale_in_a_row_are_bounded() {
    let server = TestServer::start(Script { responses: &[OK], end: End::CloseOnRequest }).await;
    let fetcher = fetcher();
    fetch_eight_at_once(&fetcher, &server).await;
    server.wait_for_open(MAX_IDLE).await;
    fetch_ok(&fetcher, get(&server.url())).await;
}

#[tokio::test]
async fn idle_connections_are_bounded_and_time_out() {
    let server = TestServer::start(Script { responses: &[OK_IN_PIECES; 20], end: End::Wait }).await;
    let fetcher = fetcher();
    fetch_eight_at_once(&fetcher, &server).await;
    server.wait_for_open(MAX_IDLE).await;
    let before = server.connections();
    tokio::time::pause();
    tokio::time::advance(IDLE_TIMEOUT + Duration::from_secs(1)).await;
    tokio::time::resume();
    fetch_ok(&fetcher, get(&server.url())).await;
    assert_eq!(server.connections(), before + 1);
    server.wait_for_open(1).await;
}

#[tokio::test]
async fn each_new_connection_resolves_the_name() {
    let dns = TestDns::start().await;
    let resolver = Resolver::with_name_server(dns.address, Duration::from_secs(3)).unwrap();
    let fetcher = Fetcher::new(Arc::new(resolver));
    let script = Script { responses: &[OK, OK], end: End::CloseOnRequest };
    let old = TestServer::start(script).await;
    let port = old.address.port();
    let new = TestServer::at(SocketAddr::from(([127, 0, 0, 2], port)), script).await;
    let request = || get(&format!("http://issuer.test:{port}/"));

    dns.addresses("issuer.test", 60, &["127.0.0.1"]);
    fetch_ok(&fetcher, request()).await;
    let queries = dns.query_count("issuer.test");
    assert!(queries > 0);
    dns.addresses("issuer.test", 60, &["127.0.0.2"]);
    // The connection is reused without another lookup.
    fetch_ok(&fetcher, request()).await;
    assert_eq!((dns.query_count("issuer.test"), old.connections(), new.connections()), (queries, 1, 0));
    // The old server closes it: the next connection goes where the name leads by now.
    fetch_ok(&fetcher, request()).await;
    assert!(dns.query_count("issuer.test") > queries);
    assert_eq!((old.connections(), new.connections()), (1, 1));
}

#[tokio::test]
async fn addresses_are_tried_in_turn() {
    let dns = TestDns::start().await;
    let resolver = Resolver::with_name_server(dns.address, Duration::from_secs(3)).unwrap();
    let fetcher = Fetcher::new(Arc::new(resolver));
    // Bound and not listening: they refuse connections, and no other test's server gets their port.
    let refusing = |address: [u8; 4], port| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((address, port).into()).unwrap();
        socket
    };
    let first = refusing([127, 0, 0, 1], 0);
    let port = first.local_addr().unwrap().port();
    let _second = refusing([127, 0, 0, 2], port);
    let last = SocketAddr::from(([127, 0, 0, 3], port));
    let server = TestServer::at(last, Script { responses: &[OK], end: End::Wait }).await;
    dns.addresses("issuer.test", 60, &["127.0.0.1", "127.0.0.2", "127.0.0.3"]);
    fetch_ok(&fetcher, get(&format!("http://issuer.test:{}/", server.address.port()))).await;
    assert_eq!(server.connections(), 1);
}

/// On Linux, 0.0.0.0 leads to this host: without the check, the server would be reached.
#[tokio::test]
async fn no_name_leads_to_a_denied_address() {
    let dns = TestDns::start().await;
    let resolver = Resolver::with_name_server(dns.address, Duration::from_secs(3)).unwrap();
    let fetcher = Fetcher::new(Arc::new(resolver));
    let script = Script { responses: &[OK, OK], end: End::CloseOnRequest };
    let server = TestServer::start(script).await;
    let port = server.address.port();
    let request = || get(&format!("http://issuer.test:{port}/"));
    let refused = async || fetcher.fetch(request(), LIMITS).await.unwrap_err();

    for (address, network) in [
        ("0.0.0.0", "0.0.0.0/8"),
        ("::ffff:0.0.0.0", "0.0.0.0/8"),
        ("169.254.169.254", "169.254.0.0/16"),
        ("64:ff9b::a9fe:a9fe", "169.254.0.0/16"),
        ("fd00:ec2::254", "fd00:ec2::254/128"),
    ] {
        dns.addresses("issuer.test", 60, &[address]);
        let error = refused().await;
        assert!(matches!(error, FetchError::Denied { .. }), "{address}: {error}");
        let start = format!("issuer.test:{port} resolved to {address}, in {network} ");
        assert!(error.to_string().starts_with(&start), "{error}");
    }
    assert_eq!(server.connections(), 0);

    // Its other addresses are used.
    dns.addresses("issuer.test", 60, &["0.0.0.0", "127.0.0.1"]);
    fetch_ok(&fetcher, request()).await;
    // The answer changes: the open connection is used, and no new one is opened.
    dns.addresses("issuer.test", 60, &["0.0.0.0"]);
    fetch_ok(&fetcher, request()).await;
    let error = refused().await;
    assert!(matches!(error, FetchError::Denied { .. }), "{error}");
    assert_eq!(server.connections(), 1);
    // An address in the URL, and loopback by name, are what the configuration says.
    fetch_ok(&fetcher, get(&format!("http://0.0.0.0:{port}/"))).await;
    fetch_ok(&fetcher, get(&format!("http://localhost:{port}/"))).await;
    assert_eq!(server.connections(), 3);
}

#[tokio::test]
async fn an_unfinished_response_closes_its_connection() {
    let server = TestServer::start(Script { responses: &[ENDLESS], end: End::Wait }).await;
    let fetcher = fetcher();
    let mut stream = fetcher.stream(get(&server.url()), LIMITS.timeout).await.unwrap().into_body();
    assert_eq!(stream.chunk().await.unwrap().as_deref(), Some(&b"event"[..]));
    drop(stream);
    server.wait_for_open(0).await;

    for responses in [&[][..], &[STALLED], &[ENDLESS]] {
        let server = TestServer::start(Script { responses, end: End::Wait }).await;
        let limits = FetchLimits { timeout: Duration::from_millis(300), ..LIMITS };
        let error = fetcher.fetch(get(&server.url()), limits).await.unwrap_err();
        assert_eq!(error.to_string(), format!("{} did not respond within 300ms", server.address));
        server.wait_for_open(0).await;
    }
}

/// The server accepts a request of more than both sockets' buffers and reads none of it.
#[tokio::test]
async fn a_request_that_times_out_while_it_is_sent_resets_its_connection() {
    let directory = tempfile::tempdir().unwrap();
    let ca = directory.path().join("ca.pem");
    let acceptor = tokio_rustls::TlsAcceptor::from(tls_config(&ca));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let fetcher = fetcher().with_roots_from(&ca).unwrap();
    for scheme in ["http", "https"] {
        let (fetcher, url) = (fetcher.clone(), format!("{scheme}://localhost:{port}/"));
        let request = Request::post(url).body(Bytes::from(vec![b'.'; 64 << 20])).unwrap();
        let sending = tokio::spawn(async move {
            let limits = FetchLimits { timeout: Duration::from_secs(1), ..LIMITS };
            fetcher.fetch(request, limits).await
        });
        let (tcp, _) = listener.accept().await.unwrap();
        let tcp = match scheme {
            "https" => acceptor.accept(tcp).await.unwrap().into_inner().0,
            _ => tcp,
        };
        let outcome = sending.await.unwrap();
        assert!(matches!(outcome, Err(FetchError::Timeout { .. })), "{outcome:?}");
        // Without a reset, the client's kernel would offer the unsent rest for minutes.
        let reset = timeout(Duration::from_secs(5), tcp.ready(Interest::ERROR)).await;
        assert!(reset.is_ok(), "{scheme}: the connection is open");
    }
}

#[tokio::test]
async fn connections_are_pooled_as_long_as_the_roots_are_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let (ca, other) = (directory.path().join("ca.pem"), directory.path().join("other.pem"));
    let script = Script { responses: &[OK; 9], end: End::Wait };
    let server = TestServer::with_tls(script, tls_config(&ca)).await;
    let _ = tls_config(&other);
    let (fetcher, url) = (fetcher(), format!("https://localhost:{}/", server.address.port()));
    for _ in 0..3 {
        fetch_ok(&fetcher.with_roots_from(&ca).unwrap(), get(&url)).await;
    }
    assert_eq!((server.requests().len(), server.connections()), (3, 1));
    // A client that trusts other roots does not get this connection.
    for untrusting in [fetcher.clone(), fetcher.with_roots_from(&other).unwrap()] {
        let error = untrusting.fetch(get(&url), LIMITS).await.unwrap_err();
        assert!(matches!(error, FetchError::Tls { .. }), "{error}");
    }
    // Nor is it used once the file has other certificates.
    fs::copy(&other, &ca).unwrap();
    let error = fetcher.with_roots_from(&ca).unwrap().fetch(get(&url), LIMITS).await.unwrap_err();
    assert!(matches!(error, FetchError::Tls { .. }), "{error}");
    server.wait_for_open(0).await;
    assert_eq!(server.requests().len(), 3);
}

#[tokio::test]
async fn clients_of_root_files_are_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let (ca, fetcher) = (directory.path().join("ca.pem"), fetcher());
    let _ = tls_config(&ca);
    for number in 0..MAX_ROOTS_FILES * 2 {
        let copy = directory.path().join(number.to_string());
        fs::copy(&ca, &copy).unwrap();
        fetcher.with_roots_from(&copy).unwrap();
        assert!(fetcher.by_roots.lock().unwrap().len() <= MAX_ROOTS_FILES);
    }
}
