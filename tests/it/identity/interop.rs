//! Mutual TLS with other implementations, as client and as server.

use std::{net::SocketAddr, process::Command};

use serde_json::json;

use super::{GET, send_get, server_sidecar};
use crate::support::{
    Daemon, Proxy, RawClient, Upstream, free_port, has_tool,
    pki::{Pki, id},
    text,
    tls::TlsClient,
    tool,
};

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn service() -> Upstream {
    Upstream::http1(|_| async { text("hello") })
}

/// A sidecar that connects to `address` by mutual TLS as `payments`.
fn client_sidecar_of(pki: &Pki, address: SocketAddr) -> Proxy {
    super::client_sidecar(pki, address, "")
}

/// Another proxy between two sidecars: certificates for both sides, a sidecar as its upstream, and two ports for it.
struct Between {
    pki: Pki,
    service: Upstream,
    server: Proxy,
    /// Where it accepts mutual TLS, as `payments`.
    port: u16,
    /// Where it accepts plaintext and connects to the sidecar by mutual TLS as `checkout`.
    front: u16,
}

impl Between {
    fn new() -> Self {
        let (pki, service) = (Pki::new(), service());
        let server = server_sidecar(&pki, service.address(), "");
        pki.write_leaf("checkout", |_| {});
        Self { pki, service, server, port: free_port(), front: free_port() }
    }
}

/// A client of its front port reaches our service.
#[track_caller]
fn is_accepted(front: SocketAddr, server: &Proxy) {
    let response = RawClient::connect(front).ask("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    assert_eq!((response.status(), response.text().as_str()), (200, "hello"), "{}", server.stderr());
}

#[test]
fn curl_and_openssl_as_clients() {
    if !has_tool(&["curl", "openssl"]) {
        return;
    }
    let (pki, service) = (Pki::new(), service());
    let server = server_sidecar(&pki, service.address(), "");
    pki.write_leaf("checkout", |_| {});
    let (ca, cert, key) = (pki.path("ca.crt"), pki.path("checkout.crt"), pki.path("checkout.key"));
    let port = server.inbound().port();
    for version in ["--http1.1", "--http2"] {
        let output = Command::new(tool("curl").expect("checked before"))
            .args(["-s", "-S", version, "-w", " %{http_version}", "--cacert"])
            .arg(&ca)
            .arg("--cert")
            .arg(&cert)
            .arg("--key")
            .arg(&key)
            .arg(format!("https://localhost:{port}/"))
            .args(["--connect-to", &format!("localhost:{port}:127.0.0.1:{port}")])
            .output()
            .expect("curl runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        // Both offer HTTP/1.1, which every service speaks.
        assert_eq!(said, "hello 1.1", "{}", String::from_utf8_lossy(&output.stderr));
    }
    let s_client = |more: &[&str]| {
        let output = Command::new(tool("openssl").expect("checked before"))
            .args(["s_client", "-brief", "-connect", &server.inbound().to_string(), "-CAfile"])
            .arg(&ca)
            .arg("-cert")
            .arg(&cert)
            .arg("-key")
            .arg(&key)
            .args(more)
            .stdin(std::process::Stdio::null())
            .output()
            .expect("openssl runs");
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    };
    let said = s_client(&[]);
    assert!(said.contains("TLSv1.3") && said.contains("Verification: OK"), "{said}");
    let said = s_client(&["-tls1_2"]);
    assert!(!said.contains("Verification: OK"), "1.2 is not spoken unless allowed: {said}");
}

#[test]
fn tls_1_2_where_it_is_allowed() {
    if !has_tool(&["openssl"]) {
        return;
    }
    let (pki, service) = (Pki::new(), service());
    let identity = pki.identity("payments");
    let address = service.address();
    let server =
        Proxy::start(format!("{identity}min_tls = \"1.2\"\n[inbound]\nforward_to = \"{address}\"\n"));
    let port = server.inbound();
    let output = Command::new(tool("openssl").expect("checked before"))
        .args(["s_client", "-brief", "-tls1_2", "-connect", &port.to_string(), "-CAfile"])
        .arg(pki.path("ca.crt"))
        .arg("-cert")
        .arg(pki.path("payments.crt"))
        .arg("-key")
        .arg(pki.path("payments.key"))
        .stdin(std::process::Stdio::null())
        .output()
        .expect("openssl runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("TLSv1.2") && said.contains("Verification: OK"), "{said}");
}

#[test]
fn nginx_as_server_and_as_client() {
    if !has_tool(&["nginx"]) {
        return;
    }
    let Between { pki, service: _service, server, port, front } = Between::new();
    let dir = pki.path("");
    let dir = dir.display();
    let config = format!(
        "daemon off; pid @DIR@/pid; error_log stderr; worker_processes 1; events {{}}\n\
         http {{ access_log off; client_body_temp_path @DIR@/a; proxy_temp_path @DIR@/b; fastcgi_temp_path @DIR@/c;\n\
         uwsgi_temp_path @DIR@/d; scgi_temp_path @DIR@/e;\n\
         server {{ listen 127.0.0.1:{port} ssl; ssl_protocols TLSv1.3; ssl_certificate {dir}payments.crt; ssl_certificate_key {dir}payments.key;\n\
         ssl_client_certificate {dir}ca.crt; ssl_verify_client on; location / {{ return 200 \"$ssl_client_verify $ssl_protocol\"; }} }}\n\
         server {{ listen 127.0.0.1:{front}; location / {{ proxy_pass https://{}; proxy_ssl_protocols TLSv1.3;\n\
         proxy_ssl_certificate {dir}checkout.crt; proxy_ssl_certificate_key {dir}checkout.key;\n\
         proxy_ssl_trusted_certificate {dir}ca.crt; proxy_ssl_verify on; proxy_ssl_name payments; }} }} }}\n",
        server.inbound()
    );
    let _nginx = Daemon::start("nginx", &["-c", "@DIR@/conf", "-p", "@DIR@"], &[("conf", &config)])
        .listening(local(port));
    let caller = client_sidecar_of(&pki, local(port));
    let mut client = RawClient::connect(caller.outbound());
    for _ in 0..20 {
        let response = client.ask("GET / HTTP/1.1\r\nHost: payments\r\n\r\n");
        assert_eq!((response.status(), response.text().as_str()), (200, "SUCCESS TLSv1.3"));
    }
    is_accepted(local(front), &server);
}

#[test]
fn haproxy_as_server_and_as_client() {
    if !has_tool(&["haproxy"]) {
        return;
    }
    let (pki, service) = (Pki::new(), service());
    let server = server_sidecar(&pki, service.address(), "");
    pki.write_leaf("checkout", |_| {});
    for name in ["payments", "checkout"] {
        let both = ["crt", "key"]
            .map(|kind| std::fs::read_to_string(pki.path(&format!("{name}.{kind}"))).expect("a file"));
        pki.write(&format!("{name}.pem"), &both.concat());
    }
    let (port, front) = (free_port(), free_port());
    let dir = pki.path("");
    let dir = dir.display();
    let config = format!(
        "defaults\n mode http\n timeout connect 5s\n timeout client 10s\n timeout server 10s\n\
         frontend tls\n bind 127.0.0.1:{port} ssl crt {dir}payments.pem ca-file {dir}ca.crt verify required alpn h2,http/1.1\n\
         default_backend plain\nbackend plain\n server s {}\n\
         frontend front\n bind 127.0.0.1:{front}\n default_backend mtls\n\
         backend mtls\n server s {} ssl crt {dir}checkout.pem ca-file {dir}ca.crt verify required verifyhost payments alpn h2,http/1.1\n",
        service.address(),
        server.inbound()
    );
    let _haproxy =
        Daemon::start("haproxy", &["-db", "-f", "@DIR@/conf"], &[("conf", &config)]).listening(local(port));
    let client = client_sidecar_of(&pki, local(port));
    for _ in 0..5 {
        assert_eq!(send_get(&client), (200, "hello".to_owned()));
    }
    is_accepted(local(front), &server);
}

/// OpenSSL's own server, which requires a client certificate and serves a page with the negotiated parameters.
#[test]
fn openssl_as_server() {
    if !has_tool(&["openssl"]) {
        return;
    }
    let pki = Pki::new();
    let port = free_port();
    let client = client_sidecar_of(&pki, local(port));
    let accept = format!("127.0.0.1:{port}");
    let file = |name: &str| pki.path(name).display().to_string();
    pki.write_leaf("payments", |_| {});
    let (cert, key, ca) = (file("payments.crt"), file("payments.key"), file("ca.crt"));
    let args = [
        "s_server",
        "-accept",
        &accept,
        "-cert",
        &cert,
        "-key",
        &key,
        "-CAfile",
        &ca,
        "-Verify",
        "2",
        "-verify_return_error",
        "-tls1_3",
        "-www",
        "-quiet",
    ];
    let _server = Daemon::start("openssl", &args, &[]).listening(local(port));
    for _ in 0..3 {
        let (status, page) = send_get(&client);
        assert_eq!(status, 200, "{page}");
        assert!(page.contains("TLSv1.3") && page.contains("Client certificate"), "{page}");
    }
}

/// Envoy with its SPIFFE validator, as server and as client.
#[test]
fn envoy_as_server_and_as_client() {
    if !has_tool(&["envoy"]) {
        return;
    }
    let Between { pki, service, server, port, front } = Between::new();
    let file = |name: &str| json!({"filename": pki.path(name)});
    let common = |name: &str, peer: &str| {
        json!({
            "tls_certificates": [{
                "certificate_chain": file(&format!("{name}.crt")), "private_key": file(&format!("{name}.key")),
            }],
            "tls_params": {
                // As a client Envoy would offer TLS 1.2 at most.
                "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3",
            },
            "alpn_protocols": ["http/1.1"],
            "validation_context": {
                "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": id(peer)}}],
                "custom_validator_config": {"name": "envoy.tls.cert_validator.spiffe", "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig",
                    "trust_domains": [{"name": "shop.example", "trust_bundle": file("ca.crt")}],
                }},
            },
        })
    };
    let socket = |kind: &str, common: serde_json::Value, more: serde_json::Value| {
        let kind = format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{kind}TlsContext");
        let mut config = json!({"@type": kind, "common_tls_context": common});
        config.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        json!({"name": "envoy.transport_sockets.tls", "typed_config": config})
    };
    let address =
        |at: SocketAddr| json!({"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}});
    let listener = |port: u16, cluster: &str, tls: Option<serde_json::Value>| {
        let manager = json!({
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": cluster,
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
                {"match": {"prefix": "/"}, "route": {"cluster": cluster}}]}]},
            "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
        });
        let mut chain = json!({"filters": [
            {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]});
        if let Some(tls) = tls {
            chain["transport_socket"] = tls;
        }
        json!({"address": address(local(port)), "filter_chains": [chain]})
    };
    let cluster = |name: &str, at: SocketAddr, tls: Option<serde_json::Value>| {
        let endpoint = json!({"endpoint": {"address": address(at)}});
        let mut cluster = json!({"name": name, "load_assignment": {
            "cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]}});
        if let Some(tls) = tls {
            cluster["transport_socket"] = tls;
        }
        cluster
    };
    let downstream =
        socket("Downstream", common("payments", "checkout"), json!({"require_client_certificate": true}));
    let upstream = socket("Upstream", common("checkout", "payments"), json!({"sni": "payments"}));
    let config = json!({"static_resources": {
        "listeners": [listener(port, "plain", Some(downstream)), listener(front, "mtls", None)],
        "clusters": [cluster("plain", service.address(), None), cluster("mtls", server.inbound(), Some(upstream))],
    }});
    let arguments = ["-c", "@DIR@/conf.json", "--concurrency", "1", "-l", "warn", "--use-dynamic-base-id"];
    let _envoy =
        Daemon::start("envoy", &arguments, &[("conf.json", &config.to_string())]).listening(local(port));
    let client = client_sidecar_of(&pki, local(port));
    for _ in 0..5 {
        assert_eq!(send_get(&client), (200, "hello".to_owned()));
    }
    is_accepted(local(front), &server);
    // Both sides reject another identity.
    let stranger = super::client_sidecar(&pki, local(port), "");
    pki.write_leaf("checkout", |p| p.subject_alt_names = vec![crate::support::pki::uri(&id("stranger"))]);
    let refused = "outrigger_certificate_loads_total{outcome=\"accepted\"}";
    crate::support::eventually("the stranger's certificate", || super::metric(&stranger, refused) > 1.0);
    let (status, body) = send_get(&stranger);
    assert_eq!(status, 502, "{body}");
    assert!(body.contains("our certificate"), "{body}");
}

/// Certificates made by `outrigger certs`.
#[test]
fn certificates_from_outrigger_certs_work() {
    let directory = tempfile::tempdir().expect("a directory");
    let made = Command::new(crate::support::binary())
        .args(["certs", "--trust-domain", "shop.example", "checkout", "payments", "--out"])
        .arg(directory.path())
        .output()
        .expect("it runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let identity = |name: &str| {
        let path = |file: String| directory.path().join(file);
        format!(
            "[identity]\ncert = {:?}\nkey = {:?}\nca = {{ \"shop.example\" = {:?} }}\n",
            path(format!("{name}.crt")),
            path(format!("{name}.key")),
            path("ca.crt".to_owned())
        )
    };
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(directory.path().join("checkout.key")).expect("a key").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let service = service();
    let server =
        Proxy::start(format!("{}[inbound]\nforward_to = \"{}\"\n", identity("payments"), service.address()));
    let client = Proxy::start(format!(
        "{}[[upstream]]\nname = \"payments\"\nendpoints = [\"{}\"]\nidentity = [\"spiffe://shop.example/ns/default/sa/payments\"]\n",
        identity("checkout"),
        server.inbound()
    ));
    assert_eq!(send_get(&client), (200, "hello".to_owned()));
    // Another trust domain, though the root is in the same file.
    let pki = Pki::new();
    let stranger =
        pki.issue("x", |p| p.subject_alt_names = vec![crate::support::pki::uri("spiffe://else.example/x")]);
    let said = TlsClient::new(Some(&stranger), &[]).send_and_read(server.inbound(), GET);
    assert!(!said.as_ref().is_ok_and(|text| text.contains("hello")), "{said:?}");
    crate::support::eventually("the reason", || {
        server.stderr().contains("whose trust domain is not trusted")
    });
}
