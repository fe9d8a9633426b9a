//! Certificates from a SPIFFE Workload API: rotation, and an agent that goes down and comes back.

use super::{admin, metric, send_get};
use crate::support::{
    Daemon, Proxy, Upstream, eventually, peer_script,
    pki::{Pki, id, uri},
    python_with, text,
    tls::TlsClient,
};

const ACCEPTED: &str = "outrigger_certificate_loads_total{outcome=\"accepted\"}";

/// Each workload has its own agent: a directory whose files it serves.
struct Agent {
    pki: Pki,
    daemon: Option<Daemon>,
}

impl Agent {
    fn start(&mut self) {
        let python = python_with("grpc").expect("checked before");
        let script = peer_script("workload_api.py").display().to_string();
        let (socket, directory) = (self.socket(), self.pki.path("").display().to_string());
        let _ = std::fs::remove_file(&socket);
        let daemon = Daemon::start(
            &python.display().to_string(),
            &[&script, &socket, &directory, "shop.example"],
            &[],
        );
        daemon.wait_for_output("ready");
        self.daemon = Some(daemon);
    }

    fn socket(&self) -> String {
        self.pki.path("agent.sock").display().to_string()
    }

    fn section(&self) -> String {
        format!("[identity]\nspiffe = \"unix://{}\"\n", self.socket())
    }

    /// Serves a certificate of this CA from now on.
    fn publish(&self, ca: &Pki, name: &str) {
        let (certificate, key) = ca.issue(name, |p| p.is_ca = rcgen::IsCa::ExplicitNoCa);
        self.pki.write("svid.key", &key);
        self.pki.write("svid.crt", &certificate);
        self.pki.write("ca.crt", &ca.ca_pem());
        self.pki.write("id", &id(name));
    }
}

fn agent() -> Agent {
    Agent { pki: Pki::new(), daemon: None }
}

#[test]
fn certificates_survive_rotation_and_restart_of_the_agent() {
    if python_with("grpc").is_none() {
        return;
    }
    let ca = Pki::new();
    let service = Upstream::http1(|_| async { text("hello") });
    let (mut server_agent, mut client_agent) = (agent(), agent());
    server_agent.publish(&ca, "payments");
    client_agent.publish(&ca, "checkout");
    server_agent.start();
    let address = service.address();
    let server = Proxy::start(format!("{}[inbound]\nforward_to = \"{address}\"\n", server_agent.section()));
    eventually("an identity", || admin(&server, "/ready").0 == 200);
    // The sidecar starts before its agent.
    let (inbound, payments) = (server.inbound(), id("payments"));
    let client = Proxy::start(format!(
        "{}[[upstream]]\nname = \"payments\"\nendpoints = [\"{inbound}\"]\nidentity = [\"{payments}\"]\n",
        client_agent.section()
    ));
    let (status, why) = admin(&client, "/ready");
    assert_eq!(status, 503);
    assert!(why.contains("there is no valid certificate yet"), "{why}");
    let (status, body) = send_get(&client);
    assert_eq!(status, 502);
    assert!(body.contains("no valid certificate yet"), "{body}");
    eventually("the status", || admin(&client, "/status").1.contains("agent.sock"));
    client_agent.start();
    eventually("an identity", || admin(&client, "/ready").0 == 200);
    assert_eq!(send_get(&client), (200, "hello".to_owned()));

    for _ in 0..5 {
        let before = metric(&client, ACCEPTED);
        client_agent.publish(&ca, "checkout");
        eventually("a rotation", || metric(&client, ACCEPTED) > before);
        assert_eq!(send_get(&client).0, 200);
    }
    // The last certificate stays in use while the agent is down.
    client_agent.daemon = None;
    eventually("the status", || metric(&client, "outrigger_certificate_refused") == 1.0);
    assert_eq!(admin(&client, "/ready").0, 200);
    assert_eq!(send_get(&client).0, 200);
    let before = metric(&client, ACCEPTED);
    client_agent.publish(&ca, "checkout");
    client_agent.start();
    eventually("the agent's return", || metric(&client, ACCEPTED) > before);
    eventually("the status", || metric(&client, "outrigger_certificate_refused") == 0.0);
    assert_eq!(send_get(&client).0, 200);
}

/// `identity.spiffe` changes while the sidecar runs.
#[test]
fn a_reload_switches_to_another_agent() {
    if python_with("grpc").is_none() {
        return;
    }
    let (ca, service) = (Pki::new(), Upstream::http1(|_| async { text("hello") }));
    let (mut one, mut other) = (agent(), agent());
    one.publish(&ca, "payments");
    other.publish(&ca, "orders");
    one.start();
    other.start();
    let file =
        |agent: &Agent| format!("{}[inbound]\nforward_to = \"{}\"\n", agent.section(), service.address());
    let server = Proxy::start(file(&one));
    let is_identity = |name: &str| admin(&server, "/status").1.contains(&id(name));
    eventually("an identity", || is_identity("payments"));
    server.reconfigure(&file(&other));
    eventually("the other agent's", || is_identity("orders") && !is_identity("payments"));
    let mut client =
        TlsClient::new(Some(&ca.issue("checkout", |_| {})), &["http/1.1"]).connect(server.inbound());
    while client.conn.is_handshaking() {
        client.conn.complete_io(&mut client.sock).expect("a handshake");
    }
    let shown = client.conn.peer_certificates().expect("a certificate")[0].to_vec();
    assert!(shown.windows(9).any(|part| part == b"sa/orders"), "its certificate is shown");
}

/// A federated trust domain is trusted, any other is not.
#[test]
fn federated_trust_domains_are_verified_by_their_own_roots() {
    if python_with("grpc").is_none() {
        return;
    }
    let (ca, foreign) = (Pki::new(), Pki::new());
    let service = Upstream::http1(|_| async { text("hello") });
    let mut agent = agent();
    agent.publish(&ca, "payments");
    agent.pki.write("else.example.federated", &foreign.ca_pem());
    agent.start();
    let address = service.address();
    let server = Proxy::start(format!("{}[inbound]\nforward_to = \"{address}\"\n", agent.section()));
    eventually("an identity", || admin(&server, "/ready").0 == 200);
    let ask = |pki: &Pki, id: &str| {
        let certificate = pki.issue("x", |p| p.subject_alt_names = vec![uri(id)]);
        let said = TlsClient::new(Some(&certificate), &[]).send_and_read(server.inbound(), super::GET);
        said.is_ok_and(|said| said.contains("hello"))
    };
    assert!(ask(&ca, "spiffe://shop.example/a"));
    assert!(ask(&foreign, "spiffe://else.example/a"));
    // Each bundle is valid for its own trust domain only.
    assert!(!ask(&foreign, "spiffe://shop.example/a"));
    assert!(!ask(&ca, "spiffe://else.example/a"));
    assert!(!ask(&ca, "spiffe://third.example/a"));
}

#[test]
fn certificates_revoked_by_the_agent_are_rejected() {
    if python_with("grpc").is_none() {
        return;
    }
    let ca = Pki::new();
    let service = Upstream::http1(|_| async { text("hello") });
    let mut agent = agent();
    agent.publish(&ca, "payments");
    agent.start();
    let address = service.address();
    let server = Proxy::start(format!("{}[inbound]\nforward_to = \"{address}\"\n", agent.section()));
    eventually("an identity", || admin(&server, "/ready").0 == 200);
    let client = |serial: u64| {
        let certificate = ca.issue("checkout", |p| p.serial_number = Some(serial.into()));
        TlsClient::new(Some(&certificate), &[])
    };
    let (good, revoked) = (client(1001), client(1002));
    let is_served = |client: &TlsClient| {
        client.send_and_read(server.inbound(), super::GET).is_ok_and(|said| said.contains("hello"))
    };
    assert!(is_served(&good) && is_served(&revoked));
    let before = metric(&server, ACCEPTED);
    let list = std::fs::read_to_string(ca.revoke(&[1002])).expect("a list");
    agent.pki.write("crl.pem", &list);
    eventually("the list", || metric(&server, ACCEPTED) > before);
    assert!(is_served(&good));
    assert!(!is_served(&revoked));
    eventually("the reason", || server.stderr().contains("its certificate has been revoked"));
}
