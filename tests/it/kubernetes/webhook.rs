//! `outrigger webhook`: admission reviews of a real API server (1.36, recorded in `tests/it/kubernetes/admission`),
//! replayed over HTTPS.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use outrigger::kubernetes::patch::Operation;
use serde_json::{Value, json};

use super::{outrigger, validate, values};
use crate::support::{
    Daemon, binary, eventually, has_tool,
    pki::Pki,
    signal,
    tls::{TlsClient, TlsSocket},
    tool,
};

/// `timeoutSeconds` of k8s/webhook/admission.yaml. A slow sender may take 10 s.
const API_SERVER_TIMEOUT: Duration = Duration::from_secs(5);

struct Webhook {
    daemon: Daemon,
    address: SocketAddr,
}

impl Webhook {
    fn start(pki: &Pki, more: &[&str]) -> Self {
        let (certificate, key) = (pki.path("webhook.crt"), pki.path("webhook.key"));
        let (certificate, key) = (certificate.display().to_string(), key.display().to_string());
        let mut arguments = vec![
            "webhook",
            "--listen",
            "127.0.0.1:0",
            "--tls-cert",
            &certificate,
            "--tls-key",
            &key,
            "--own-namespace",
            "outrigger-system",
        ];
        arguments.extend(more);
        let daemon = Daemon::start(&binary().display().to_string(), &arguments, &[]);
        let output = daemon.wait_for_output("webhook listening");
        let listen = output.split("listen=").nth(1).expect("it says where");
        let address: String = listen
            .chars()
            .take_while(|letter| !letter.is_whitespace())
            .filter(|letter| *letter != '"')
            .collect();
        Self { daemon, address: address.parse().expect("an address") }
    }

    fn say(&self, head: &str, body: &str) -> (u16, String) {
        let request = format!(
            "{head} HTTP/1.1\r\nhost: outrigger.outrigger-system.svc\r\nconnection: close\r\ncontent-length: {}\r\ncontent-type: application/json\r\n\r\n{body}",
            body.len()
        );
        let response =
            TlsClient::new(None, &["http/1.1"]).send_and_read(self.address, &request).expect("a response");
        let status = response.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        (status, response.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
    }

    fn ask(&self, path: &str, review: &Value) -> Value {
        let (status, body) = self.say(&format!("POST {path}"), &review.to_string());
        assert_eq!(status, 200, "{body}");
        let response: Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!((&response["apiVersion"], &response["kind"]), (&review["apiVersion"], &review["kind"]));
        assert_eq!(response["response"]["uid"], review["request"]["uid"]);
        response["response"].clone()
    }

    /// Sends the beginning of something and then nothing.
    fn begin(&self, length: usize, sent: usize) -> TlsSocket {
        let mut client = TlsClient::new(None, &["http/1.1"]).connect(self.address);
        let head = format!(
            "POST /mutate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        );
        // The connection may be closed before all of it is sent.
        let _ = client.write_all(head.as_bytes()).and_then(|()| client.write_all(&vec![b' '; sent]));
        client
    }

    /// Peak memory.
    fn peak_kib(&self) -> u64 {
        let memory = fs::read_to_string(format!("/proc/{}/status", self.daemon.pid())).expect("it runs");
        let peak = memory.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak.and_then(|peak| peak.parse().ok()).expect("a number")
    }
}

fn pki() -> Pki {
    let pki = Pki::new();
    pki.write_leaf("webhook", |_| {});
    pki
}

fn recordings() -> Vec<(String, Value)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/kubernetes/admission");
    let read = |entry: fs::DirEntry| {
        let text = fs::read_to_string(entry.path()).expect("readable");
        (entry.file_name().to_string_lossy().into_owned(), serde_json::from_str(&text).expect("JSON"))
    };
    fs::read_dir(folder).expect("the recordings").flatten().map(read).collect()
}

fn patched(object: &Value, response: &Value) -> Value {
    assert_eq!(response["patchType"], "JSONPatch");
    let patch = STANDARD.decode(response["patch"].as_str().expect("a patch")).expect("base64");
    let patch: Vec<Operation> = serde_json::from_slice(&patch).expect("a JSON Patch");
    let mut object = object.clone();
    patch.iter().for_each(|operation| operation.apply(&mut object).expect("it fits"));
    object
}

/// Without fields that only a file needs, and the name that only the API server knows.
fn comparable(mut pod: Value) -> Value {
    pod["metadata"]["annotations"]["outrigger.dev/injected"] = Value::Null;
    for one in pod["spec"]["initContainers"].as_array_mut().into_iter().flatten() {
        for variable in one["env"].as_array_mut().into_iter().flatten() {
            if variable["name"] == "OTEL_SERVICE_NAME" {
                variable["value"] = Value::Null;
            }
        }
    }
    pod
}

#[test]
fn recorded_reviews_get_the_patch_that_inject_makes() {
    let (pki, folder) = (pki(), tempfile::tempdir().expect("a folder"));
    let webhook = Webhook::start(&pki, &[]);
    let (mut files, mut names) = (Vec::new(), Vec::new());
    for (name, recording) in recordings() {
        let (path, review) = (recording["path"].as_str().expect("a path"), &recording["review"]);
        let object = &review["request"]["object"];
        let response = webhook.ask(path, review);
        assert_eq!(response["allowed"], true, "{name}: {response}");
        match &*name {
            "opted-out.json" => assert_eq!((response.get("patch"), response.get("warnings")), (None, None)),
            "hostnetwork.json" => {
                assert_eq!(response.get("patch"), None);
                assert!(response["warnings"][0].as_str().expect("a warning").contains("hostNetwork"));
            }
            _ => {
                let pod = patched(object, &response);
                let file = outrigger(&["inject"], &object.to_string());
                let by_file = values(&String::from_utf8_lossy(&file.stdout)).remove(0);
                assert_eq!(comparable(pod.clone()), comparable(by_file), "{name}");
                // A second review of the result yields no further patch.
                let mut again = review.clone();
                again["request"]["object"] = pod.clone();
                assert_eq!(webhook.ask(path, &again).get("patch"), None, "{name}");
                let sidecar = pod["spec"]["initContainers"].as_array().expect("init containers")[1].clone();
                assert_eq!(sidecar["name"], "outrigger", "{name}");
                names.push((name.clone(), sidecar["env"][0]["value"].as_str().unwrap_or("").to_owned()));
                files.push(folder.path().join(&name));
                let mut pod = pod;
                pod.as_object_mut().expect("a pod").shift_remove("status");
                pod["metadata"].as_object_mut().expect("metadata").shift_remove("managedFields");
                fs::write(files.last().expect("one"), pod.to_string()).expect("write");
            }
        }
    }
    assert_eq!(files.len(), 6);
    let of =
        |file: &str| names.iter().find(|(name, _)| name.starts_with(file)).map(|(_, service)| &**service);
    assert_eq!(of("nightly-report"), Some("nightly-report"), "not a name for every minute");
    assert_eq!(of("plain"), Some("plain"));
    validate(&files);
}

#[test]
fn a_broken_config_map_is_refused_when_it_is_applied() {
    let pki = pki();
    let webhook = Webhook::start(&pki, &[]);
    let ask = |operation: &str, text: &str| {
        let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
            "uid": "1", "kind": {"group": "", "version": "v1", "kind": "ConfigMap"}, "name": "outrigger",
            "namespace": "shop", "operation": operation, "object": {"data": {"outrigger.toml": text}}
        }});
        webhook.ask("/validate?timeout=5s", &review)
    };
    let refused = ask("CREATE", "[defaults]\ntimeout = \"15\"\n");
    assert_eq!(refused["allowed"], false);
    let message = refused["status"]["message"].as_str().expect("a message");
    assert!(message.contains("outrigger.toml:2") && message.contains("ConfigMap outrigger"), "{message}");
    assert_eq!(ask("UPDATE", "[inbound]\nforward_to = \"127.0.0.1:${PORT}\"\n")["allowed"], true);
    assert_eq!(ask("DELETE", "= =")["allowed"], true);
    let warned = ask("UPDATE", "[runtime]\ndrain_delay = \"10s\"\n");
    assert!(warned["warnings"][0].as_str().is_some_and(|text| text.contains("drain")), "{warned}");
}

#[test]
fn hostile_input_is_rejected_and_the_next_review_answered() {
    let pki = pki();
    let webhook = Webhook::start(&pki, &[]);
    let deep = "[".repeat(200_000);
    for (head, body, expected) in [
        ("POST /mutate", "", 400),
        ("POST /mutate", "{\"kind\":\"AdmissionReview\"", 400),
        ("POST /mutate", &*deep, 400),
        ("GET /mutate", "", 405),
        ("POST /other", "{}", 404),
        ("GET /healthz", "", 200),
    ] {
        assert_eq!(webhook.say(head, body).0, expected, "{head} with {} bytes", body.len());
    }
    // Small to send, large to parse.
    let many = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
        "uid": "1", "kind": {"group": "", "version": "v1", "kind": "Pod"}, "operation": "CREATE",
        "object": {"spec": {"containers": [{"name": "a", "args": "MANY"}]}}
    }});
    let many = many.to_string().replace("\"MANY\"", &format!("[{}\"\"]", "\"\",".repeat(2 << 20)));
    let (status, body) = webhook.say("POST /mutate", &many);
    assert_eq!((status, body.contains("100000 values")), (400, true), "{body}");
    let peak = webhook.peak_kib();
    assert!(peak < 64 << 10, "it took {peak} KiB; its pod has 128 MiB");
    // Rejected by its head, without waiting for the rest.
    let long = format!(
        "POST /mutate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        (8 << 20) + 1
    );
    let response =
        TlsClient::new(None, &["http/1.1"]).send_and_read(webhook.address, &long).expect("a response");
    assert!(response.starts_with("HTTP/1.1 413 "), "{response}");
    // Bytes that are not TLS, and TLS without a request.
    let mut plain = TcpStream::connect(webhook.address).expect("connect");
    plain.write_all(b"POST /mutate HTTP/1.1\r\n\r\n").expect("write");
    let _silent = TlsClient::new(None, &[]).connect(webhook.address);
    let (_, recording) = recordings().into_iter().find(|(name, _)| name == "plain.json").expect("plain.json");
    assert!(webhook.ask("/mutate", &recording["review"]).get("patch").is_some());
}

/// More senders than there are slots, with short and with long bodies.
#[test]
fn endless_senders_do_not_block_other_reviews() {
    let pki = pki();
    let webhook = Webhook::start(&pki, &[]);
    let (_, recording) = recordings().into_iter().find(|(name, _)| name == "plain.json").expect("plain.json");
    let short = recording["review"].clone();
    let mut long = short.clone();
    long["request"]["object"]["metadata"]["annotations"]["example.com/notes"] = "x".repeat(1 << 20).into();
    let mut slow: Vec<TlsSocket> = (0..25).map(|_| webhook.begin(1_000_000, 999_000)).collect();
    slow.extend((0..70).map(|_| webhook.begin(65_000, 64_000)));
    for review in [&short, &long, &short, &long] {
        let began = Instant::now();
        assert!(webhook.ask("/mutate", review).get("patch").is_some());
        assert!(began.elapsed() < API_SERVER_TIMEOUT, "after {:?}", began.elapsed());
    }
    let mut rejection = String::new();
    let first = &mut slow[0];
    // Closed without close_notify.
    let _ = first.read_to_string(&mut rejection);
    assert!(
        rejection.starts_with("HTTP/1.1 503 ") && rejection.contains("memory is needed for other requests"),
        "{rejection}"
    );
    let peak = webhook.peak_kib();
    assert!(peak < 96 << 10, "it took {peak} KiB; its pod has 128 MiB");
}

/// An API server opens a connection for each concurrent review.
#[test]
fn many_pods_are_created_concurrently() {
    let pki = pki();
    let webhook = Webhook::start(&pki, &[]);
    let (_, recording) = recordings().into_iter().find(|(name, _)| name == "plain.json").expect("plain.json");
    thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| assert!(webhook.ask("/mutate", &recording["review"]).get("patch").is_some()));
        }
    });
}

/// Pod creation waits for the review. Includes handshake, connection and a debug build, on a shared machine.
#[test]
fn a_review_takes_milliseconds() {
    let pki = pki();
    let webhook = Webhook::start(&pki, &[]);
    let (_, recording) = recordings().into_iter().find(|(name, _)| name == "plain.json").expect("plain.json");
    let quickest = (0..20).map(|_| {
        let began = Instant::now();
        assert!(webhook.ask("/mutate", &recording["review"]).get("patch").is_some());
        began.elapsed()
    });
    let quickest = quickest.min().expect("one");
    assert!(quickest < Duration::from_millis(100), "{quickest:?}");
}

#[test]
fn silent_connections_are_closed_for_new_ones() {
    let pki = pki();
    let webhook = Webhook::start(&pki, &[]);
    // Some send nothing at all, some begin a request: more of both than there are slots.
    let _silent: Vec<TcpStream> =
        (0..150).map(|_| TcpStream::connect(webhook.address).expect("connect")).collect();
    let _slow: Vec<TlsSocket> = (0..150).map(|_| webhook.begin(65_000, 1)).collect();
    let (_, recording) = recordings().into_iter().find(|(name, _)| name == "plain.json").expect("plain.json");
    let began = Instant::now();
    assert!(webhook.ask("/mutate", &recording["review"]).get("patch").is_some());
    assert!(began.elapsed() < API_SERVER_TIMEOUT, "after {:?}", began.elapsed());
}

#[test]
fn an_api_server_may_use_http_2() {
    if !has_tool(&["curl"]) {
        return;
    }
    let pki = pki();
    let webhook = Webhook::start(&pki, &[]);
    let (_, recording) = recordings().into_iter().find(|(name, _)| name == "plain.json").expect("plain.json");
    let body = pki.write("review.json", &recording["review"].to_string());
    let output = std::process::Command::new(tool("curl").expect("curl"))
        .args([
            "-sk",
            "--http2",
            "-w",
            "\n%{http_version} %{http_code}",
            "-H",
            "content-type: application/json",
            "--data-binary",
        ])
        .arg(format!("@{}", body.display()))
        .arg(format!("https://{}/mutate", webhook.address))
        .output()
        .expect("curl runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.ends_with("\n2 200") && said.contains("JSONPatch"), "{said}");
}

#[test]
fn valid_new_certificates_and_defaults_are_applied_and_broken_ones_rejected() {
    let pki = pki();
    let defaults = pki.write("defaults.toml", "image = \"r.example/o:1\"\n");
    let webhook = Webhook::start(&pki, &["--defaults", &defaults.display().to_string()]);
    let shown = || {
        let mut stream = TlsClient::new(None, &["http/1.1"]).connect(webhook.address);
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n").expect("write");
        Read::read(&mut stream, &mut [0; 64]).expect("a response");
        stream.conn.peer_certificates().expect("a certificate")[0].to_vec()
    };
    let (_, recording) = recordings().into_iter().find(|(name, _)| name == "plain.json").expect("plain.json");
    let review = &recording["review"];
    let image = || {
        let pod = patched(&review["request"]["object"], &webhook.ask("/mutate", review));
        pod["spec"]["initContainers"][0]["image"].as_str().expect("an image").to_owned()
    };
    let first = shown();
    assert_eq!(image(), "r.example/o:1");
    pki.write("webhook.crt", "-----BEGIN CERTIFICATE-----\n");
    pki.write("defaults.toml", "imgae = \"r.example/o:2\"\n");
    webhook.daemon.wait_for_output("new certificate rejected");
    webhook.daemon.wait_for_output("new defaults rejected");
    assert_eq!((shown() == first, &*image()), (true, "r.example/o:1"));
    pki.write_leaf("webhook", |_| {});
    pki.write("defaults.toml", "image = \"r.example/o:3\"\n");
    eventually("the new certificate is shown", || shown() != first);
    eventually("the new image is used", || image() == "r.example/o:3");
    // The kubelet terminates it; API servers may learn of that later.
    signal(webhook.daemon.pid(), "TERM");
    webhook.daemon.wait_for_output("draining");
    assert_eq!(image(), "r.example/o:3");
}

/// A full disk empties a file, a slow writer leaves half of it for a while: the previous content stays in use, and the
/// log says so.
#[test]
fn emptied_or_half_written_defaults_change_nothing() {
    let pki = pki();
    let good = "image = \"r.example/o:1\"\nmemory = \"77Mi\"\n";
    let path = pki.write("defaults.toml", good);
    let webhook = Webhook::start(&pki, &["--defaults", &path.display().to_string()]);
    let (_, recording) = recordings().into_iter().find(|(name, _)| name == "plain.json").expect("plain.json");
    let review = &recording["review"];
    let given = || {
        let pod = patched(&review["request"]["object"], &webhook.ask("/mutate", review));
        let sidecar = pod["spec"]["initContainers"].as_array().and_then(|all| all.last()).expect("a sidecar");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (text(&sidecar["image"]), text(&sidecar["resources"]["requests"]["memory"]))
    };
    let log_count = |words: &str| webhook.daemon.output().matches(words).count();
    let first = ("r.example/o:1".to_owned(), "77Mi".to_owned());
    assert_eq!(given(), first);
    for (number, emptied) in ["", " \n\n"].into_iter().enumerate() {
        fs::write(&path, emptied).expect("write");
        eventually("a word on the empty file", || log_count("defaults.toml is empty now") == number + 1);
        assert_eq!(given(), first, "{emptied:?}");
    }
    fs::remove_file(&path).expect("remove");
    eventually("a word on the missing file", || log_count("new defaults rejected") == 1);
    assert_eq!(given(), first);
    // Half of the file is a valid file as well.
    let mut slow = fs::File::create(&path).expect("create");
    slow.write_all(b"image = \"r.example/o:2\"\n").expect("write");
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(700) {
        assert_eq!(given(), first, "before its writer has closed it");
    }
    assert_eq!(log_count("new defaults loaded"), 0, "{}", webhook.daemon.output());
    slow.write_all(b"memory = \"88Mi\"\n").expect("write");
    drop(slow);
    let second = ("r.example/o:2".to_owned(), "88Mi".to_owned());
    eventually("the whole file to be used", || {
        let now = given();
        assert!(now == first || now == second, "half a file: {now:?}");
        now == second
    });
}

/// An API server keeps connections. Closing one while a review is in flight loses the review (`EOF`).
#[test]
fn a_webhook_drains_its_connections_before_it_exits() {
    let pki = pki();
    let webhook = Webhook::start(&pki, &[]);
    let request = "GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n";
    let mut kept: Vec<TlsSocket> =
        (0..3).map(|_| TlsClient::new(None, &["http/1.1"]).connect(webhook.address)).collect();
    let ask = |stream: &mut TlsSocket| {
        stream.write_all(request.as_bytes()).expect("it is open");
        let mut response = String::new();
        while !response.contains("\r\n\r\nok\n") {
            let mut part = [0; 1024];
            let count = stream.read(&mut part).expect("a response");
            assert_ne!(count, 0, "it was closed: {response}");
            response += &String::from_utf8_lossy(&part[..count]);
        }
        response.to_ascii_lowercase()
    };
    for stream in &mut kept {
        assert!(!ask(stream).contains("connection: close"));
    }
    signal(webhook.daemon.pid(), "TERM");
    webhook.daemon.wait_for_output("draining");
    for stream in &mut kept {
        assert!(ask(stream).contains("connection: close"));
    }
    assert_eq!(webhook.say("GET /healthz", "").0, 200, "new ones are still accepted");
}

#[test]
fn startup_errors_name_the_file() {
    let pki = pki();
    let run = |certificate: &str, key: &str, defaults: &str| {
        let (certificate, key) = (pki.path(certificate), pki.path(key));
        let mut arguments = vec![
            "webhook",
            "--listen",
            "127.0.0.1:0",
            "--tls-cert",
            certificate.to_str().expect("text"),
            "--tls-key",
            key.to_str().expect("text"),
        ];
        let defaults = pki.path(defaults);
        arguments.extend(["--defaults", defaults.to_str().expect("text")]);
        let output = outrigger(&arguments, "");
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    pki.write("good.toml", "");
    pki.write("bad.toml", "memory = \"much\"\n");
    pki.write_leaf("another", |_| {});
    assert!(run("none.crt", "webhook.key", "good.toml").contains("none.crt"));
    assert!(run("webhook.crt", "another.key", "good.toml").contains("do not match"));
    assert!(run("webhook.crt", "webhook.key", "bad.toml").contains("`much` is not a quantity"));
}
