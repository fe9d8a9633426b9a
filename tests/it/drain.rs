//! The drain as seen by clients without a sidecar: they keep connections, and only responses tell them that the
//! service ends.

use std::{
    io::Write,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    kubernetes::{outrigger, values},
    support::{
        Launch, Proxy, RawClient, Upstream, eventually,
        h2::{self, H2Client},
        strict::Message,
        text,
    },
};

const GET: &str = "GET / HTTP/1.1\r\nHost: up\r\n\r\n";

fn is_ready(proxy: &Proxy) -> bool {
    let mut client = RawClient::connect(proxy.admin());
    client.ask("GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").status() == 200
}

/// A sidecar whose drain lasts as long as the test.
///
/// It is ready when this returns: a `/ready` that fails later fails because of the drain.
fn draining(server: &Upstream) -> Proxy {
    let proxy = Proxy::start(format!(
        "[runtime]\ndrain_delay = \"2m\"\n[inbound]\nforward_to = \"{}\"\n",
        server.address()
    ));
    eventually("/ready", || is_ready(&proxy));
    proxy
}

fn says_close(response: &Message) -> bool {
    assert_eq!(response.status(), 200, "{response:?}");
    response.field("connection") == Some("close")
}

#[test]
fn responses_say_close_during_the_drain_and_connections_are_still_accepted() {
    let server = Upstream::http1(|_| async { text("ok") });
    let proxy = draining(&server);
    let mut kept: Vec<RawClient> = (0..3).map(|_| RawClient::connect(proxy.inbound())).collect();
    for client in &mut kept {
        assert!(!says_close(&client.ask(GET)));
    }
    proxy.signal("TERM");
    eventually("/ready to fail", || !is_ready(&proxy));
    for client in &mut kept {
        assert!(says_close(&client.ask(GET)), "a connection that was kept");
        assert!(client.read_to_close().0.is_empty(), "it is closed behind the response");
    }
    for _ in 0..3 {
        assert!(
            says_close(&RawClient::connect(proxy.inbound()).ask(GET)),
            "a connection accepted during the drain"
        );
    }
    // The service's outbound requests are not affected.
    let named = format!("GET http://{}/ HTTP/1.1\r\nHost: a\r\n\r\n", server.address());
    assert!(!says_close(&RawClient::connect(proxy.outbound()).ask(named)));
}

#[test]
fn an_idle_connection_serves_a_request_during_drain_delay() {
    let server = Upstream::http1(|_| async { text("ok") });
    let proxy = draining(&server);
    let mut idle = RawClient::connect(proxy.inbound());
    idle.ask(GET);
    proxy.signal("TERM");
    eventually("/ready to fail", || !is_ready(&proxy));
    // Longer than a connection is kept once the listener has closed.
    let still_there = Instant::now();
    eventually("a while", || still_there.elapsed() > Duration::from_millis(1500));
    assert!(says_close(&idle.ask(GET)));
}

#[test]
fn http2_gets_goaway_at_once_or_after_the_first_request_of_a_new_connection() {
    let server = Upstream::h2c(|_| async { text("ok") });
    let proxy = draining(&server);
    let mut kept = H2Client::connect(proxy.inbound());
    kept.must_get(1, "/");
    proxy.signal("TERM");
    assert_eq!(kept.goaway(), Ok(0), "no error");
    kept.must_get(3, "/");

    // A client that waits for SETTINGS still sends its request, since no GOAWAY has arrived.
    let mut late = H2Client::connect(proxy.inbound());
    loop {
        let frame = late.next().expect("a frame");
        assert_ne!(frame.kind, h2::GOAWAY, "before the first request");
        if frame.kind == h2::SETTINGS && frame.flags & h2::ACK != 0 {
            break;
        }
    }
    late.headers(1, &h2::get("/"), true);
    assert_eq!(late.goaway(), Ok(0), "no error");
}

/// A pod: a service and its sidecar.
struct Replica {
    service: Upstream,
    sidecar: Proxy,
}

/// What the kubelet knows of a pod that `inject` made.
struct Pod {
    drain_delay: Duration,
    pre_stop: Duration,
}

impl Pod {
    fn injected() -> Self {
        let pod = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  annotations:\n    outrigger.dev/drain-delay: 1s\nspec:\n  containers:\n  - name: app\n    image: a:1\n";
        let output = outrigger(&["inject"], pod);
        let pod: Value = values(&String::from_utf8_lossy(&output.stdout)).remove(0);
        let sleep = &pod["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"];
        Self {
            drain_delay: Duration::from_secs(1),
            pre_stop: Duration::from_secs(sleep.as_u64().expect("seconds")),
        }
    }
}

impl Replica {
    fn start(pod: &Pod) -> Self {
        let service = Upstream::http1(|_| async { text("ok") });
        let config = format!(
            "[runtime]\ndrain_delay = \"{}ms\"\ndrain_timeout = \"20s\"\n[inbound]\nforward_to = \"{}\"\n",
            pod.drain_delay.as_millis(),
            service.address()
        );
        Self { service, sidecar: Launch::new(config).start() }
    }

    /// Ends a pod as the kubelet does: all hooks at once, the service after its own hook, then the sidecar.
    fn end(mut self, pod: &Pod) {
        let admin = self.sidecar.admin().to_string();
        let began = Instant::now();
        let drain = outrigger(&["drain", "--admin", &admin], "");
        assert!(drain.status.success(), "{}", String::from_utf8_lossy(&drain.stderr));
        thread::sleep(pod.pre_stop.saturating_sub(began.elapsed()));
        drop(self.service);
        self.sidecar.signal("TERM");
        assert_eq!(self.sidecar.wait().code(), Some(0), "{}", self.sidecar.stderr());
    }
}

/// Clients keep a connection as long as they may and retry nothing: each POST is sent once. New connections go to the
/// pods that the client knows, and it learns of changes late. At least 5,000 requests; `OUTRIGGER_ROUNDS` for more.
#[test]
fn rollouts_lose_no_request_of_clients_that_keep_connections() {
    const REPLICAS: usize = 3;
    const CLIENTS: usize = 12;
    const LATE: Duration = Duration::from_millis(500);
    const PAUSE: Duration = Duration::from_millis(15);
    const REQUESTS: usize = 5_000;
    let least = std::env::var("OUTRIGGER_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(3);
    let pod = Pod::injected();
    assert!(pod.pre_stop > pod.drain_delay);
    let mut replicas: Vec<Replica> = (0..REPLICAS).map(|_| Replica::start(&pod)).collect();
    let addresses =
        |replicas: &[Replica]| replicas.iter().map(|one| one.sidecar.inbound()).collect::<Vec<_>>();
    let known = Arc::new(Mutex::new(addresses(&replicas)));
    let (done, sent) = (AtomicBool::new(false), AtomicUsize::new(0));
    let failures = Mutex::new(Vec::new());
    let (began, mut rollouts) = (Instant::now(), 0);
    thread::scope(|scope| {
        for number in 0..CLIENTS {
            let (known, done, sent, failures) = (&known, &done, &sent, &failures);
            scope.spawn(move || {
                let mut connection: Option<RawClient> = None;
                while !done.load(Ordering::Relaxed) {
                    let pick = || {
                        let known = known.lock().expect("no panic");
                        known[(number + sent.load(Ordering::Relaxed)) % known.len()]
                    };
                    let mut client = connection.take().unwrap_or_else(|| RawClient::connect(pick()));
                    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi");
                    sent.fetch_add(1, Ordering::Relaxed);
                    match client.response() {
                        Ok(Some(response)) if response.status() == 200 => {
                            if response.field("connection") != Some("close") {
                                connection = Some(client);
                            }
                        }
                        other => failures.lock().expect("no panic").push(format!("{other:?}")),
                    }
                    thread::sleep(PAUSE);
                }
            });
        }
        // A slow machine needs more rounds for as many requests.
        while rollouts < least || (sent.load(Ordering::Relaxed) < REQUESTS && rollouts < 4 * least) {
            rollouts += 1;
            let old = std::mem::replace(&mut replicas, (0..REPLICAS).map(|_| Replica::start(&pod)).collect());
            thread::scope(|ending| {
                for replica in old {
                    ending.spawn(|| replica.end(&pod));
                }
                thread::sleep(LATE);
                *known.lock().expect("no panic") = addresses(&replicas);
            });
        }
        done.store(true, Ordering::Relaxed);
    });
    let (failures, sent) = (failures.into_inner().expect("no panic"), sent.into_inner());
    let rate = sent as f64 / began.elapsed().as_secs_f64();
    let _ = writeln!(
        std::io::stderr(),
        "{sent} requests over {rollouts} rollouts, {rate:.0} a second, {} failed",
        failures.len()
    );
    assert!(sent >= REQUESTS, "only {sent} requests");
    assert!(failures.is_empty(), "{} of {sent} failed: {:?}", failures.len(), failures.first());
}
