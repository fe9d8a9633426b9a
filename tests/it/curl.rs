//! curl with every HTTP version that it speaks, through every entry point.

use std::process::Command;

use http_body_util::BodyExt;

use crate::support::{Daemon, Proxy, Upstream, UpstreamResponse, has_tool, text, tool};

/// curl's standard output; fails if curl fails.
#[track_caller]
fn curl(arguments: &[&str]) -> String {
    let mut command = Command::new(tool("curl").expect("checked before"));
    command.args(["-sS", "--max-time", "20", "--noproxy", ""]).args(arguments);
    let output = command.output().expect("curl runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "curl {arguments:?}: {}{text}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Answers with what it received: method, path, version and body size.
async fn mirror(request: hyper::Request<hyper::body::Incoming>) -> UpstreamResponse {
    let (head, body) = request.into_parts();
    let size = body.collect().await.map(|body| body.to_bytes().len());
    text(format!("{} {} {:?} {size:?}", head.method, head.uri.path(), head.version))
}

#[test]
fn speaks_every_version_to_every_version() {
    if !has_tool(&["curl"]) {
        return;
    }
    let (http1, h2) = (Upstream::http1(mirror), Upstream::h2c(mirror));
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{0}\"\n\
         [[upstream]]\nname = \"one\"\nprotocol = \"http1\"\nendpoints = [\"{0}\"]\n\
         [[upstream]]\nname = \"two\"\nprotocol = \"h2\"\nendpoints = [\"{1}\"]\n",
        http1.address(),
        h2.address()
    ));
    let upload = proxy.directory().join("upload");
    std::fs::write(&upload, vec![b'x'; 3_000_000]).expect("write");
    let upload = format!("@{}", upload.display());
    let (outbound, listener) =
        (format!("http://{}/path", proxy.outbound()), format!("http://{}", proxy.outbound()));
    for (option, version) in [("--http1.0", "1"), ("--http1.1", "1.1"), ("--http2-prior-knowledge", "2")] {
        for (name, spoken) in [("one", "HTTP/1.1"), ("two", "HTTP/2.0")] {
            let host = format!("Host: {name}");
            let format = "\n%{http_version}";
            let got = curl(&[option, "-w", format, "-H", &host, &outbound]);
            assert_eq!(got, format!("GET /path {spoken} Ok(0)\n{version}"), "{option} to {name}");
            for expect in ["Expect:", "Expect: 100-continue"] {
                let got = curl(&[option, "-H", &host, "-H", expect, "--data-binary", &upload, &outbound]);
                assert_eq!(got, format!("POST /path {spoken} Ok(3000000)"), "{option} to {name}, {expect}");
            }
            // As a forward proxy, which curl does not use over HTTP/2 without TLS.
            if version != "2" {
                let got = curl(&[option, "-x", &listener, &format!("http://{name}/path")]);
                assert_eq!(got, format!("GET /path {spoken} Ok(0)"), "{option} by proxy to {name}");
            }
        }
    }
    let inbound = format!("http://{}/in", proxy.inbound());
    for option in ["--http1.0", "--http1.1"] {
        assert_eq!(curl(&[option, &inbound]), "GET /in HTTP/1.1 Ok(0)");
    }
}

#[test]
fn inbound_forwards_http2_to_an_http2_service() {
    if !has_tool(&["curl"]) {
        return;
    }
    let h2 = Upstream::h2c(mirror);
    let proxy = Proxy::start(format!("[inbound]\nforward_to = \"{}\"\n", h2.address()));
    let inbound = format!("http://{}/in", proxy.inbound());
    let got = curl(&["--http2-prior-knowledge", "-d", "hello", &inbound]);
    assert_eq!(got, "POST /in HTTP/2.0 Ok(5)");
}

/// CONNECT to a TLS server: bytes are forwarded both ways, the certificate is the server's own.
#[test]
fn connect_tunnels_to_a_tls_server() {
    if !has_tool(&["curl", "openssl"]) {
        return;
    }
    let port = crate::support::free_port();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| directory.path().join(name).display().to_string();
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"])
        .args(["-keyout", &at("key"), "-out", &at("crt")])
        .output()
        .expect("openssl runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let accept = format!("127.0.0.1:{port}");
    let arguments =
        ["s_server", "-accept", &accept, "-cert", &at("crt"), "-key", &at("key"), "-www", "-quiet"];
    let _server = Daemon::start("openssl", &arguments, &[]).listening(accept.parse().expect("an address"));
    let proxy = Proxy::start("");
    let listener = format!("http://{}", proxy.outbound());
    let url = format!("https://localhost:{port}/");
    let got = curl(&[
        "-x",
        &listener,
        "--cacert",
        &at("crt"),
        "-w",
        "%{http_connect} %{http_code}",
        "-o",
        "/dev/null",
        &url,
    ]);
    assert_eq!(got, "200 200");
}
