//! Certificates from a SPIFFE Workload API: one that rotates, goes away and comes back.

use super::{admin, call, metric};
use crate::support::{
    Daemon, Proxy, Upstream, eventually, peer_script,
    pki::{Pki, id, uri},
    python_with, text,
    tls::TlsCaller,
};

const ACCEPTED: &str = "outrigger_certificate_loads_total{outcome=\"accepted\"}";

/// Each workload has an agent of its own: a directory, whose files it tells.
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

    /// What is told from now on: a certificate of this CA.
    fn tell(&self, ca: &Pki, name: &str) {
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
fn it_rotates_goes_away_and_comes_back() {
    if python_with("grpc").is_none() {
        return;
    }
    let ca = Pki::new();
    let service = Upstream::http1(|_| async { text("hello") });
    let (mut theirs, mut ours) = (agent(), agent());
    theirs.tell(&ca, "payments");
    ours.tell(&ca, "checkout");
    theirs.start();
    let address = service.address();
    let callee = Proxy::start(format!("{}[inbound]\nforward_to = \"{address}\"\n", theirs.section()));
    eventually("an identity", || admin(&callee, "/ready").0 == 200);
    // Ours starts before its agent does.
    let (inbound, payments) = (callee.inbound(), id("payments"));
    let caller = Proxy::start(format!(
        "{}[[upstream]]\nname = \"payments\"\nendpoints = [\"{inbound}\"]\nidentity = [\"{payments}\"]\n",
        ours.section()
    ));
    let (status, why) = admin(&caller, "/ready");
    assert_eq!(status, 503);
    assert!(why.contains("there is no valid certificate yet"), "{why}");
    let (status, body) = call(&caller);
    assert_eq!(status, 502);
    assert!(body.contains("no valid certificate yet"), "{body}");
    eventually("the status", || admin(&caller, "/status").1.contains("agent.sock"));
    ours.start();
    eventually("an identity", || admin(&caller, "/ready").0 == 200);
    assert_eq!(call(&caller), (200, "hello".to_owned()));

    for _ in 0..5 {
        let before = metric(&caller, ACCEPTED);
        ours.tell(&ca, "checkout");
        eventually("a rotation", || metric(&caller, ACCEPTED) > before);
        assert_eq!(call(&caller).0, 200);
    }
    // What it told last holds while it is away.
    ours.daemon = None;
    eventually("the status", || metric(&caller, "outrigger_certificate_refused") == 1.0);
    assert_eq!(admin(&caller, "/ready").0, 200);
    assert_eq!(call(&caller).0, 200);
    let before = metric(&caller, ACCEPTED);
    ours.tell(&ca, "checkout");
    ours.start();
    eventually("the agent's return", || metric(&caller, ACCEPTED) > before);
    eventually("the status", || metric(&caller, "outrigger_certificate_refused") == 0.0);
    assert_eq!(call(&caller).0, 200);
}

/// `identity.spiffe`, changed while the sidecar runs.
#[test]
fn a_reload_leads_to_another_agent() {
    if python_with("grpc").is_none() {
        return;
    }
    let (ca, service) = (Pki::new(), Upstream::http1(|_| async { text("hello") }));
    let (mut one, mut other) = (agent(), agent());
    one.tell(&ca, "payments");
    other.tell(&ca, "orders");
    one.start();
    other.start();
    let file =
        |agent: &Agent| format!("{}[inbound]\nforward_to = \"{}\"\n", agent.section(), service.address());
    let callee = Proxy::start(file(&one));
    let is_told = |name: &str| admin(&callee, "/status").1.contains(&id(name));
    eventually("an identity", || is_told("payments"));
    callee.reconfigure(&file(&other));
    eventually("the other agent's", || is_told("orders") && !is_told("payments"));
    let mut client =
        TlsCaller::new(Some(&ca.issue("checkout", |_| {})), &["http/1.1"]).connect(callee.inbound());
    while client.conn.is_handshaking() {
        client.conn.complete_io(&mut client.sock).expect("a handshake");
    }
    let shown = client.conn.peer_certificates().expect("a certificate")[0].to_vec();
    assert!(shown.windows(9).any(|part| part == b"sa/orders"), "its certificate is shown");
}

/// A trust domain that ours is federated with; no other.
#[test]
fn federated_trust_domains_are_known_by_their_own_roots() {
    if python_with("grpc").is_none() {
        return;
    }
    let (ca, foreign) = (Pki::new(), Pki::new());
    let service = Upstream::http1(|_| async { text("hello") });
    let mut agent = agent();
    agent.tell(&ca, "payments");
    agent.pki.write("else.example.federated", &foreign.ca_pem());
    agent.start();
    let address = service.address();
    let callee = Proxy::start(format!("{}[inbound]\nforward_to = \"{address}\"\n", agent.section()));
    eventually("an identity", || admin(&callee, "/ready").0 == 200);
    let ask = |pki: &Pki, id: &str| {
        let certificate = pki.issue("x", |p| p.subject_alt_names = vec![uri(id)]);
        let said = TlsCaller::new(Some(&certificate), &[]).say(callee.inbound(), super::GET);
        said.is_ok_and(|said| said.contains("hello"))
    };
    assert!(ask(&ca, "spiffe://shop.example/a"));
    assert!(ask(&foreign, "spiffe://else.example/a"));
    // Each vouches for its own only.
    assert!(!ask(&foreign, "spiffe://shop.example/a"));
    assert!(!ask(&ca, "spiffe://else.example/a"));
    assert!(!ask(&ca, "spiffe://third.example/a"));
}

#[test]
fn what_the_agent_tells_to_be_revoked_is_refused() {
    if python_with("grpc").is_none() {
        return;
    }
    let ca = Pki::new();
    let service = Upstream::http1(|_| async { text("hello") });
    let mut agent = agent();
    agent.tell(&ca, "payments");
    agent.start();
    let address = service.address();
    let callee = Proxy::start(format!("{}[inbound]\nforward_to = \"{address}\"\n", agent.section()));
    eventually("an identity", || admin(&callee, "/ready").0 == 200);
    let caller = |serial: u64| {
        let certificate = ca.issue("checkout", |p| p.serial_number = Some(serial.into()));
        TlsCaller::new(Some(&certificate), &[])
    };
    let (good, revoked) = (caller(1001), caller(1002));
    let is_served = |caller: &TlsCaller| {
        caller.say(callee.inbound(), super::GET).is_ok_and(|said| said.contains("hello"))
    };
    assert!(is_served(&good) && is_served(&revoked));
    let before = metric(&callee, ACCEPTED);
    let list = std::fs::read_to_string(ca.revoke(&[1002])).expect("a list");
    agent.pki.write("crl.pem", &list);
    eventually("the list", || metric(&callee, ACCEPTED) > before);
    assert!(is_served(&good));
    assert!(!is_served(&revoked));
    eventually("the reason", || callee.stderr().contains("its certificate has been revoked"));
}
