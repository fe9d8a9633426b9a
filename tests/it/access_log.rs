//! The access log and `GET /requests`: what is reported about requests, and that no request waits for the reader.

use std::{
    fs,
    io::Read,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use http::StatusCode;
use serde_json::Value;

use crate::support::{Launch, Proxy, RawClient, Upstream, binary, eventually, text};

const GET: &str = "GET /secret/path?token=hush HTTP/1.1\r\nHost: up\r\n\r\n";
/// Sorted in the order in which they were written.
const FIELDS: [&str; 15] = [
    "time",
    "direction",
    "method",
    "status",
    "trace_id",
    "peer",
    "upstream",
    "endpoint",
    "route",
    "attempts",
    "reason",
    "why",
    "bytes_in",
    "bytes_out",
    "duration_ms",
];

/// Responds with 503 while `failing` is set.
fn controllable() -> (Upstream, Arc<AtomicBool>) {
    let ill = Arc::new(AtomicBool::new(false));
    let fails = Arc::clone(&ill);
    let server = Upstream::http1(move |request| {
        let fails = fails.load(Ordering::Relaxed);
        let slow = request.uri().path() == "/slow";
        async move {
            if slow {
                tokio::time::sleep(Duration::from_millis(1100)).await;
            }
            let mut response = text("hello");
            if fails {
                *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            }
            response
        }
    });
    (server, ill)
}

fn config(endpoints: &[&Upstream], telemetry: &str) -> String {
    let endpoints: Vec<String> = endpoints.iter().map(|server| format!("\"{}\"", server.address())).collect();
    format!(
        "[telemetry]\n{telemetry}\n[[upstream]]\nname = \"up\"\nendpoints = [{}]\nbalance = \"round-robin\"\n\
         outlier = false\n[[upstream.route]]\nmatch = {{ methods = [\"GET\"], path = \"/secret*\" }}\n",
        endpoints.join(", ")
    )
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

fn written(path: &Path) -> Vec<Value> {
    lines(&fs::read_to_string(path).unwrap_or_default())
}

fn read(proxy: &Proxy, path: &str) -> String {
    let mut client = RawClient::connect(proxy.admin());
    let response = client.ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"));
    assert_eq!(response.status(), 200, "{response:?}");
    response.text()
}

fn count(proxy: &Proxy, outcome: &str) -> u64 {
    let metrics = read(proxy, "/metrics");
    let name = format!("outrigger_access_log_lines_total{{outcome=\"{outcome}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or_default()
}

#[test]
fn failed_requests_are_logged_in_plain_words() {
    let (well, _) = controllable();
    let (other, ill) = controllable();
    let mut proxy = Proxy::start(config(&[&well, &other], ""));
    let mut client = RawClient::connect(proxy.outbound());
    for _ in 0..4 {
        assert_eq!(client.ask(GET).status(), 200);
    }
    ill.store(true, Ordering::Relaxed);
    // Requests to the failing endpoint succeed by a retry.
    for _ in 0..2 {
        assert_eq!(client.ask(GET).status(), 200);
    }
    eventually("a line", || !lines(&proxy.stdout()).is_empty());
    proxy.signal("TERM");
    proxy.wait();
    let stdout = proxy.stdout();
    let lines = lines(&stdout);
    assert!((1..=2).contains(&lines.len()), "only retried requests are logged\n{stdout}");
    let line = &lines[0];
    let fields: Vec<&String> = line.as_object().expect("an object").keys().collect();
    assert_eq!(fields, FIELDS);
    let (ill, well) = (other.address(), well.address());
    let why = line["why"].as_str().unwrap_or_default();
    assert!(why.starts_with(&format!("{ill} answered 503, second attempt at {well} answered 200")), "{why}");
    assert!(why.contains("; breaker 1/"), "{why}");
    for (field, value) in [
        ("direction", "outbound"),
        ("method", "GET"),
        ("peer", "127.0.0.1"),
        ("upstream", "up"),
        ("endpoint", &well.to_string()),
        ("route", "GET /secret*"),
        ("reason", "503"),
    ] {
        assert_eq!(line[field], value, "{field} of {line}");
    }
    assert_eq!(
        (&line["status"], &line["attempts"], &line["bytes_out"]),
        (&200.into(), &2.into(), &5.into()),
        "{line}"
    );
    assert_eq!(line["trace_id"].as_str().map(str::len), Some(32), "{line}");
    assert!(line["duration_ms"].as_f64() > Some(0.0), "{line}");
    assert!(!stdout.contains("hush") && !stdout.contains("/secret/path"), "paths and queries are not logged");
}

#[test]
fn every_field_is_documented() {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/telemetry.md");
    let docs = fs::read_to_string(docs).expect("docs/telemetry.md");
    let section =
        docs.split("## Access log").nth(1).and_then(|rest| rest.split("\n## ").next()).expect("a section");
    for field in FIELDS {
        assert!(
            section.lines().any(|row| row.starts_with("| `") && row.contains(&format!("`{field}`"))),
            "{field}"
        );
    }
    let (server, _) = controllable();
    let proxy = Proxy::start(config(&[&server], "access_log = \"all\""));
    RawClient::connect(proxy.outbound()).ask(GET);
    eventually("a line", || !proxy.stdout().is_empty());
    for key in lines(&proxy.stdout())[0].as_object().expect("an object").keys() {
        assert!(FIELDS.contains(&key.as_str()), "{key} is not documented");
    }
}

#[test]
fn all_logs_every_request_and_a_reload_changes_it() {
    let (server, _) = controllable();
    let proxy = Proxy::start(config(&[&server], "access_log = \"all\""));
    let field = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00\r\n";
    let request = format!("POST / HTTP/1.1\r\nHost: up\r\n{field}Content-Length: 3\r\n\r\nabc");
    assert_eq!(RawClient::connect(proxy.outbound()).ask(request).status(), 200);
    RawClient::connect(proxy.outbound()).ask("GET http://up:x/ HTTP/1.1\r\nHost: up:x\r\n\r\n");
    eventually("two lines", || lines(&proxy.stdout()).len() == 2);
    let both = lines(&proxy.stdout());
    let plain = &both[0];
    assert_eq!(
        (&plain["reason"], &plain["why"], &plain["route"]),
        (&Value::Null, &Value::Null, &Value::Null)
    );
    assert_eq!(plain["trace_id"], "0af7651916cd43dd8448eb211c80319c");
    assert_eq!((&plain["bytes_in"], &plain["attempts"]), (&3.into(), &1.into()), "{plain}");
    let refused = &both[1];
    assert_eq!((&refused["reason"], &refused["upstream"]), (&"malformed".into(), &Value::Null), "{refused}");
    assert!(refused["why"].as_str().is_some_and(|why| why.contains("not a host")), "{refused}");

    proxy.reconfigure(&config(&[&server], "access_log = \"off\""));
    let mode = || {
        serde_json::from_str::<Value>(&read(&proxy, "/status")).expect("JSON")["access_log"]["mode"].clone()
    };
    eventually("the reload", || mode() == "off");
    for _ in 0..10 {
        RawClient::connect(proxy.outbound()).ask(GET);
    }
    let file = proxy.directory().join("access.log");
    let next = format!("access_log = \"all\"\naccess_log_file = \"{}\"", file.display());
    proxy.reconfigure(&config(&[&server], &next));
    eventually("the reload", || mode() == "all");
    RawClient::connect(proxy.outbound()).ask(GET);
    eventually("a line in the file", || written(&file).len() == 1);
    assert_eq!(lines(&proxy.stdout()).len(), 2, "{}", proxy.stdout());

    // A file that cannot be opened is rejected, with the place of the key.
    proxy.reconfigure(&config(&[&server], "access_log_file = \"/no/such/directory/access.log\""));
    let why = "cannot open the access log /no/such/directory/access.log";
    eventually("the refusal", || read(&proxy, "/status").contains(why));
    RawClient::connect(proxy.outbound()).ask(GET);
    eventually("another line in the file", || written(&file).len() == 2);
}

#[test]
fn a_rotated_log_file_is_reopened() {
    let (server, _) = controllable();
    let directory = tempfile::tempdir().expect("a directory");
    let [file, first, second] =
        ["access.log", "access.log.1", "access.log.2"].map(|name| directory.path().join(name));
    let telemetry = format!("access_log = \"all\"\naccess_log_file = \"{}\"", file.display());
    let proxy = Proxy::start(config(&[&server], &telemetry));
    let mut client = RawClient::connect(proxy.outbound());
    client.ask(GET);
    eventually("a line", || written(&file).len() == 1);
    // By name: checked once a second.
    fs::rename(&file, &first).expect("renamed");
    let mut sent = 1;
    eventually("a new file", || {
        client.ask(GET);
        sent += 1;
        file.exists()
    });
    // A pending line must not be taken for one of the next file.
    eventually("every line", || written(&first).len() + written(&file).len() == sent);
    // By signal.
    fs::rename(&file, &second).expect("renamed");
    proxy.signal("HUP");
    eventually("a new file", || file.exists());
    let before = written(&second).len();
    client.ask(GET);
    eventually("its first line", || written(&file).len() == 1);
    assert_eq!(written(&second).len(), before);
    assert_eq!(proxy.stdout(), "");
}

#[test]
fn an_unwritable_log_file_is_reported_at_start() {
    let directory = tempfile::tempdir().expect("a directory");
    let config = directory.path().join("outrigger.toml");
    let text = "[telemetry]\naccess_log_file = \"/no/such/directory/a.log\"\n[inbound]\nlisten = \"127.0.0.1:0\"\n\
                [outbound]\nlisten = \"127.0.0.1:0\"\n[admin]\nlisten = \"127.0.0.1:0\"\n";
    fs::write(&config, text).expect("written");
    let output = Command::new(binary()).arg("run").arg("-c").arg(&config).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("cannot open the access log /no/such/directory/a.log ([telemetry] access_log_file)"),
        "{said}"
    );
}

#[test]
fn under_run_stdout_belongs_to_the_service() {
    let (server, _) = controllable();
    let proxy = Launch::new(config(&[&server], "access_log = \"all\""))
        .service(["sh", "-c", "echo the service; exec sleep 60"])
        .start();
    RawClient::connect(proxy.outbound()).ask(GET);
    eventually("a line", || proxy.stderr().contains("{\"time\":"));
    eventually("the service's line", || proxy.stdout() == "the service\n");
}

/// A stalled reader: a pipe that is not read.
#[test]
fn no_request_waits_for_a_stalled_log_reader() {
    const REQUESTS: usize = 6000;
    let (server, _) = controllable();
    let directory = tempfile::tempdir().expect("a directory");
    let pipe = directory.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().is_ok_and(|status| status.success()));
    // Open for both, so that opening does not block.
    let mut reader = fs::File::options().read(true).write(true).open(&pipe).expect("the pipe opens");
    let script = format!("exec \"$@\" >'{}'", pipe.display());
    let mut proxy =
        Launch::new(config(&[&server], "access_log = \"all\"")).wrapped(["sh", "-c", &script, "sh"]).start();
    let mut client = RawClient::connect(proxy.outbound());
    let before = proxy.resident_kib();
    for _ in 0..REQUESTS {
        assert_eq!(client.ask(GET).status(), 200);
    }
    let dropped = count(&proxy, "dropped");
    assert!(dropped > 0, "6,000 lines are more than a pipe and the queue hold");
    let grown = proxy.resident_kib() - before;
    assert!(grown < 30 * 1024, "{grown} KiB more");

    // Buffered lines arrive once the pipe is read; nothing is lost without being counted.
    let mut chunk = vec![0; 1 << 20];
    let mut got = Vec::new();
    while got.iter().filter(|byte| **byte == b'\n').count() + (dropped as usize) < REQUESTS {
        let read = reader.read(&mut chunk).expect("lines");
        got.extend_from_slice(&chunk[..read]);
    }
    let got = lines(&String::from_utf8(got).expect("text"));
    assert_eq!(got.len() as u64 + dropped, REQUESTS as u64);
    eventually("the count", || count(&proxy, "written") == got.len() as u64);

    // The exit of the process does not wait long for the reader either.
    for _ in 0..1000 {
        client.ask(GET);
    }
    let begin = Instant::now();
    drop(client);
    proxy.signal("TERM");
    proxy.wait();
    assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
}

#[test]
fn requests_page_shows_every_decision_of_recent_requests() {
    let (well, _) = controllable();
    let (other, ill) = controllable();
    ill.store(true, Ordering::Relaxed);
    let both = config(&[&well, &other], "");
    let more = format!(
        "{both}[[upstream]]\nname = \"dead\"\nendpoints = [\"127.0.0.1:1\"]\nbreaker = {{ consecutive_failures = 2 }}\n",
    );
    let proxy = Proxy::start(more);
    let mut client = RawClient::connect(proxy.outbound());
    for _ in 0..2 {
        assert_eq!(client.ask(GET).status(), 200);
    }
    assert_eq!(client.ask(GET.replace("Host: up", "Host: dead")).status(), 502);
    ill.store(false, Ordering::Relaxed);
    assert_eq!(client.ask("GET /slow HTTP/1.1\r\nHost: up\r\n\r\n").status(), 200);
    let page: Value = serde_json::from_str(&read(&proxy, "/requests")).expect("JSON");
    let requests = page["requests"].as_array().expect("requests");
    let of = |kind: &str| requests.iter().filter(|call| call["kind"] == kind).collect::<Vec<_>>();

    let retried = of("retried");
    let retried = retried.last().expect("a retried request");
    let attempts = retried["attempts"].as_array().expect("attempts");
    assert_eq!((&retried["attempts_made"], attempts.len()), (&2.into(), 2), "{retried}");
    assert_eq!(attempts[0]["endpoint"], other.address().to_string(), "{retried}");
    assert_eq!(
        (&attempts[0]["outcome"], &attempts[1]["outcome"]),
        (&"503".into(), &"2xx".into()),
        "{retried}"
    );
    assert_eq!((&attempts[0]["what"], &attempts[1]["what"]), (&"first".into(), &"retry".into()), "{retried}");
    assert!(attempts[1]["began_ms"].as_f64() >= attempts[0]["ended_ms"].as_f64(), "{retried}");

    let failed = of("failed");
    let [dead] = failed.as_slice() else { panic!("{page}") };
    assert_eq!((&dead["upstream"], &dead["status"]), (&"dead".into(), &502.into()), "{dead}");
    assert_eq!(dead["reason"], "connect_refused", "{dead}");
    let attempts = dead["attempts"].as_array().expect("attempts");
    assert!(
        attempts.iter().any(|one| one["breaker"] == "open"),
        "the attempt that opened the breaker is listed: {dead}"
    );
    assert_eq!(dead["stopped"], "breaker_open", "{dead}");
    let why = dead["why"].as_str().unwrap_or_default();
    assert!(why.contains("refused") && why.ends_with("no further attempt: the breaker opened"), "{why}");

    let slow = of("slow");
    let [slow] = slow.as_slice() else { panic!("{page}") };
    assert!(slow["why"].as_str().is_some_and(|why| why.contains("the response began after")), "{slow}");

    let mut status = Command::new(binary());
    let output =
        status.arg("status").arg("--admin").arg(proxy.admin().to_string()).output().expect("it runs");
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(shown.contains("LAST PROBLEMS") && shown.contains("outbound GET"), "{shown}");
    assert!(read(&proxy, "/").contains("/requests"));
}
