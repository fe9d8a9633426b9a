//! Collectors that are killed, hang, reject or are slow while the proxy is fully loaded, on the release build.

use std::{io::Write, net::SocketAddr, process::Command, thread, time::Duration};

use super::{collector::traces, sidecar};
use crate::support::{Proxy, RawServer, Upstream, free_port, has_tool, rotel::Rotel, text, tool};

/// The time for each collector; six of them take a minute.
const DURATION: Duration = Duration::from_secs(10);
const CONNECTIONS: u64 = 16;
/// Export requests in flight, by OpenTelemetry's default.
const BATCH: u64 = 512;

/// The result of one load.
#[derive(Debug)]
struct Run {
    requests: u64,
    p99_ms: f64,
    resident_kib: u64,
    /// Spans: exported, failed, dropped because the queue was full, waiting.
    spans: [u64; 4],
}

/// Ten seconds of requests at full speed, all of them sampled. `meanwhile` runs after a third of it.
fn run(name: &str, service: SocketAddr, otlp: &str, meanwhile: impl FnOnce()) -> Run {
    let sample = if otlp.is_empty() { "" } else { "sample = 1.0\n" };
    let proxy = sidecar(service, &format!("{otlp}{sample}")).start();
    let mut load = Command::new(tool("wrk").expect("checked before"));
    load.args(["-t1", &format!("-c{CONNECTIONS}"), &format!("-d{}s", DURATION.as_secs()), "--latency"]);
    let load = load.arg(format!("http://{}/", proxy.inbound())).stdout(std::process::Stdio::piped()).spawn();
    let load = load.expect("wrk runs");
    thread::sleep(DURATION / 3);
    meanwhile();
    let output = load.wait_with_output().expect("output");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    // Both lines exist only if there is something to report.
    assert!(!said.contains("Non-2xx") && !said.contains("Socket errors"), "{name}:\n{said}");
    let spans = if otlp.is_empty() { [0; 4] } else { spans(&proxy) };
    let run =
        Run { requests: requests(&said), p99_ms: p99(&said), resident_kib: proxy.resident_kib(), spans };
    let [exported, failed, dropped, waiting] = run.spans;
    // Bypasses the harness's capture: the figures are for people.
    let _ = writeln!(
        std::io::stderr(),
        "| {name} | {:.0} | {:.2} | {:.1} | {exported} | {failed} | {dropped} | {waiting} |",
        run.requests as f64 / DURATION.as_secs_f64(),
        run.p99_ms,
        run.resident_kib as f64 / 1024.0,
    );
    run
}

fn spans(proxy: &Proxy) -> [u64; 4] {
    let traces = traces(proxy);
    let spans = &traces["spans"];
    [&spans["exported"], &spans["failed"], &spans["queue_full"], &traces["waiting"]]
        .map(|count| count.as_u64().expect("a count"))
}

fn requests(said: &str) -> u64 {
    let line = said.lines().find(|line| line.contains(" requests in ")).expect("a sum");
    line.split_whitespace().next().and_then(|word| word.parse().ok()).expect("a number")
}

fn p99(said: &str) -> f64 {
    let line = said.lines().find(|line| line.trim_start().starts_with("99%")).expect("a percentile");
    let word = line.split_whitespace().nth(1).expect("a time");
    let end = word.find(|c: char| c.is_ascii_alphabetic()).expect("a unit");
    let per_unit = match &word[end..] {
        "us" => 1e-3,
        "ms" => 1.0,
        "s" => 1e3,
        unit => panic!("{unit}"),
    };
    word[..end].parse::<f64>().expect("a number") * per_unit
}

#[test]
#[ignore = "more than a minute; for the release build"]
fn requests_are_not_slowed_by_a_failing_collector() {
    if !has_tool(&["wrk"]) {
        return;
    }
    let Some(rotel) = Rotel::start_quiet() else { return };
    let service = Upstream::http1(|_| async { text("well") });
    let service = service.address();
    let grpc = |address: SocketAddr| format!("otlp = \"http://{address}\"\nprotocol = \"grpc\"\n");

    run("none", service, "", || {});
    let healthy = run("well", service, &grpc(rotel.grpc), || {});
    let killed = {
        let dying = Rotel::start_quiet().expect("it was there before");
        let address = dying.grpc;
        run("killed after a third", service, &grpc(address), move || dying.kill())
    };
    let closed = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let refusing = run("refuses: a closed port", service, &grpc(closed), || {});
    // Accepts connections and never responds.
    let mute = RawServer::start(|stream| {
        let _stream = stream;
        thread::park_timeout(Duration::from_secs(60));
    });
    let hanging = run("hangs: accepts, and never answers", service, &grpc(mute.address()), || {});
    let slow = Upstream::http1(|request: http::Request<hyper::body::Incoming>| async {
        use http_body_util::BodyExt;
        let _ = request.into_body().collect().await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        text("")
    });
    let http = format!("otlp = \"http://{}\"\nprotocol = \"http\"\n", slow.address());
    let slow = run("slow: answers after 2 s", service, &http, || {});

    let [exported, _, _, _] = healthy.spans;
    assert!(exported > 0, "{healthy:?}");
    for (name, run) in [("killed", &killed), ("refusing", &refusing), ("hanging", &hanging), ("slow", &slow)]
    {
        // Generous, since other work runs on this machine. A defect would cost seconds.
        let most = 3.0 * healthy.p99_ms + 5.0;
        assert!(run.p99_ms <= most, "{name}: {} ms, healthy {} ms", run.p99_ms, healthy.p99_ms);
        assert!(2 * run.requests > healthy.requests, "{name}: {run:?}, healthy {healthy:?}");
        let most = healthy.resident_kib + 16 * 1024;
        assert!(run.resident_kib < most, "{name}: {run:?}, healthy {healthy:?}");
        let [_, failed, dropped, waiting] = run.spans;
        assert!(failed + dropped > 0, "{name}: {run:?}");
        // Every span is accounted for, except those being exported now.
        let known = run.spans.iter().sum::<u64>();
        assert!(
            known <= run.requests + CONNECTIONS && known + BATCH + CONNECTIONS >= run.requests,
            "{name}: {run:?}"
        );
        assert!(waiting <= 2048, "{name}: {run:?}");
    }
}
