use std::path::Path;

use rcgen::ExtendedKeyUsagePurpose;
use rustls_pki_types::{CertificateDer, UnixTime, pem::PemObject};

use super::*;
use crate::{
    config::{Endpoints, Identity, Mtls, Policy, TrustBundles, Upstream},
    identity::{
        test_pki::{Pki, id},
        tls::AlpnOffer,
        trust::{Role, VerifyError},
    },
};

/// A configuration whose `[identity]` are the files of `name`.
fn config(pki: &Pki, name: &str) -> Config {
    let identity = Identity {
        cert: Some(pki.path(&format!("{name}.crt"))),
        key: Some(pki.path(&format!("{name}.key"))),
        ca: Some(TrustBundles::All(pki.path("ca.crt"))),
        ..Identity::default()
    };
    Config { identity: Some(identity), ..Config::default() }
}

fn started(pki: &Pki) -> IdentityStore {
    pki.identity("checkout");
    let store = IdentityStore::default();
    store.configure(&config(pki, "checkout")).unwrap();
    store
}

/// What an agent would deliver.
fn delivered(pki: &Pki, name: &str) -> EncodedIdentity {
    pki.identity(name);
    let text =
        |file: String| crate::identity::material::EncodedFile::read(&pki.path(&file), 1 << 20).unwrap();
    EncodedIdentity {
        cert: text(format!("{name}.crt")),
        key: text(format!("{name}.key")),
        ca: vec![(Some("shop.example".parse().unwrap()), text("ca.crt".to_owned()))],
        crl: Vec::new(),
    }
}

fn upstream(ca: Option<&Path>) -> UpstreamTls {
    UpstreamTls { mode: TlsMode::Mutual, ca: ca.map(Path::to_owned), ..UpstreamTls::default() }
}

#[test]
fn invalid_files_change_only_the_report() {
    let pki = Pki::new();
    let store = started(&pki);
    let (taken, generation) = (store.material().clone().unwrap(), *store.changes().borrow());
    assert_eq!(store.report().id.as_deref(), Some(&*id("checkout")));
    // The key of another certificate.
    pki.write("checkout.key", &pki.issue("checkout", |_| {}).1);
    for _ in 0..2 {
        assert!(matches!(store.reload(), Err(MaterialError::Mismatch { .. })));
    }
    let report = store.report();
    assert!(report.rejection.unwrap().contains("checkout.key"));
    assert_eq!((report.accepted, report.rejections), (1, 1), "counted once, however often it is read");
    assert!(Arc::ptr_eq(&taken, &store.material().clone().unwrap()));
    assert_eq!(*store.changes().borrow(), generation);
    assert!(store.not_ready(SystemTime::now()).is_none());
    let late = taken.identity.not_after;
    assert!(store.not_ready(late).unwrap().contains("has expired"));
    pki.write_leaf("checkout", |_| {});
    store.reload().unwrap();
    assert_eq!((store.report().rejection, store.report().accepted), (None, 2));
    assert_eq!(*store.changes().borrow(), generation + 1);
}

/// Public CAs issue for servers only.
#[test]
fn a_certificate_for_one_role_is_accepted_if_only_that_role_is_used() {
    use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
    let pki = Pki::new();
    pki.identity("checkout");
    let payments = Upstream {
        tls: upstream(None),
        ..Upstream::new("payments", Endpoints::Fixed(Vec::new()), Policy::default())
    };
    for (usage, inbound, outbound, remedy) in [
        (ServerAuth, Mtls::Strict, false, None),
        (ServerAuth, Mtls::Strict, true, Some("clientAuth")),
        (ServerAuth, Mtls::Off, false, None),
        (ClientAuth, Mtls::Off, true, None),
        (ClientAuth, Mtls::Permissive, true, Some("serverAuth")),
    ] {
        let case = format!("{usage:?}, {inbound:?}, {outbound}");
        pki.write_leaf("checkout", |params| params.extended_key_usages = vec![usage]);
        let mut config = config(&pki, "checkout");
        config.inbound.mtls = inbound;
        config.upstreams.extend(outbound.then(|| payments.clone()));
        let store = IdentityStore::default();
        let outcome = store.configure(&config).map_err(|error| error.to_string());
        match remedy {
            None => assert_eq!(outcome, Ok(()), "{case}"),
            Some(remedy) => assert!(outcome.is_err_and(|error| error.contains(remedy)), "{case}"),
        }
        let limitation = files::limitation(&config, SystemTime::now());
        assert_eq!(limitation.is_some(), remedy.is_none(), "{case}: {limitation:?}");
    }
    // Uses that are added later are checked then.
    pki.write_leaf("checkout", |params| params.extended_key_usages = vec![ServerAuth]);
    let (store, mut config) = (IdentityStore::default(), config(&pki, "checkout"));
    store.configure(&config).unwrap();
    config.upstreams.push(payments);
    assert!(matches!(store.configure(&config), Err(MaterialError::Purpose { role: Role::Client, .. })));
    pki.write_leaf("checkout", |params| params.extended_key_usages = vec![]);
    store.reload().unwrap();
    pki.write_leaf("checkout", |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]
    });
    store.configure(&Config { upstreams: Vec::new(), ..config }).unwrap_err();
}

#[test]
fn unchanged_files_are_applied_once() {
    let pki = Pki::new();
    let store = started(&pki);
    store.reload().unwrap();
    store.configure(&config(&pki, "checkout")).unwrap();
    assert_eq!((store.report().accepted, *store.changes().borrow()), (1, 1));
    // Other settings apply them again.
    let mut config = config(&pki, "checkout");
    config.identity.as_mut().unwrap().min_tls = MinTls::V12;
    store.configure(&config).unwrap();
    assert_eq!(store.report().accepted, 2);
    store.configure(&Config::default()).unwrap();
    assert!(store.material().is_none() && store.server().is_none());
    assert!(store.not_ready(SystemTime::now()).is_none(), "ready without [identity]");
}

#[test]
fn tickets_are_kept_while_the_roots_stay() {
    let pki = Pki::new();
    let store = started(&pki);
    let tickets =
        || format!("{:p}", store.server().as_ref().unwrap().config(true, AlpnOffer::NoAlpn).ticketer);
    let first = tickets();
    pki.write_leaf("checkout", |_| {});
    store.reload().unwrap();
    assert_eq!(tickets(), first, "only a new leaf: sessions stay valid");
    pki.write("ca.crt", &format!("{}{}", pki.ca_pem(), Pki::new().ca_pem()));
    store.reload().unwrap();
    assert_ne!(tickets(), first);
}

#[test]
fn an_upstreams_client_tls_is_reused_for_equal_settings() {
    let pki = Pki::new();
    let store = started(&pki);
    let client = store.client("payments", &upstream(None), MinTls::V13).unwrap();
    assert!(Arc::ptr_eq(&client, &store.client("payments", &upstream(None), MinTls::V13).unwrap()));
    assert!(!Arc::ptr_eq(&client, &store.client("payments", &upstream(None), MinTls::V12).unwrap()));
    assert!(!Arc::ptr_eq(&client, &store.client("orders", &upstream(None), MinTls::V13).unwrap()));
    assert!(store.client("plain", &UpstreamTls::default(), MinTls::V13).is_none());
    let generation = client.generation();
    pki.write_leaf("checkout", |_| {});
    store.reload().unwrap();
    assert!(client.generation() > generation, "it presents the new certificate");
    // Without an identity there is no certificate to present.
    store.configure(&Config::default()).unwrap();
    store.reload().unwrap();
    let other = store.client("late", &upstream(None), MinTls::V13).unwrap();
    assert!(other.current().as_ref().as_ref().is_err_and(|why| why.contains("no valid certificate yet")));
}

#[test]
fn roots_of_an_upstream_are_reloaded_and_dropped() {
    let (pki, partner) = (Pki::new(), Pki::new());
    let store = started(&pki);
    let path = partner.path("ca.crt");
    let client = store.client("partner", &upstream(Some(&path)), MinTls::V13).unwrap();
    let why = |client: &ClientTls| client.current().as_ref().as_ref().err().cloned();
    assert!(why(&client).unwrap().contains("cannot read"), "missing so far");
    assert!(store.paths().contains(&path));
    partner.write_ca();
    store.reload().unwrap();
    assert_eq!(why(&client), None);
    partner.write("ca.crt", "no certificate");
    store.reload().unwrap();
    assert_eq!(why(&client), None, "the last valid roots stay in use");
    assert!(store.report().rejection.unwrap().contains("contains no certificate"));
    partner.write_ca();
    store.reload().unwrap();
    assert_eq!(store.report().rejection, None);
    drop(client);
    store.reload().unwrap();
    assert!(!store.paths().contains(&path));
}

/// One file of revocation lists may also contain a partner's.
#[test]
fn revocation_lists_apply_to_upstreams_with_their_own_roots() {
    let (pki, mut partner) = (Pki::new(), Pki::new());
    partner.renew_ca("the partner's CA");
    pki.identity("checkout");
    let list = |pki: &Pki, serials: &[u64]| std::fs::read_to_string(pki.revoke(serials)).unwrap();
    let (own_list, partner_list) = (list(&pki, &[]), list(&partner, &[7]));
    pki.write("crl.pem", &own_list);
    let mut config = config(&pki, "checkout");
    config.identity.as_mut().unwrap().crl = Some(pki.path("crl.pem"));
    let store = IdentityStore::default();
    store.configure(&config).unwrap();
    let client = store.client("partner", &upstream(Some(&partner.write_ca())), MinTls::V13).unwrap();
    let leaf = partner.issue("payments", |p| p.serial_number = Some(7_u64.into())).0;
    let chain = [CertificateDer::from_pem_slice(leaf.as_bytes()).unwrap()];
    let verdict = || client.current().as_ref().as_ref().unwrap().reverify(&chain).map(drop);
    assert!(verdict().is_ok());
    pki.write("crl.pem", &format!("{own_list}{partner_list}"));
    store.reload().unwrap();
    assert!(matches!(verdict(), Err(VerifyError::Revoked)), "{:?}", verdict());
}

#[test]
fn an_agent_delivers_becomes_unavailable_and_returns() {
    let (pki, store) = (Pki::new(), IdentityStore::default());
    let identity = Identity { spiffe: Some("unix:///agent.sock".to_owned()), ..Identity::default() };
    let mut config = Config { identity: Some(identity), ..Config::default() };
    store.configure(&config).unwrap();
    assert_eq!(store.agent_socket().as_deref(), Some("unix:///agent.sock"));
    assert!(store.not_ready(SystemTime::now()).unwrap().contains("no valid certificate yet"));
    store.agent_unavailable("agent unavailable".to_owned());
    assert_eq!(store.report().rejection.as_deref(), Some("agent unavailable"));
    store.deliver(delivered(&pki, "checkout"));
    assert_eq!((store.report().rejection, store.report().id), (None, Some(id("checkout"))));
    store.agent_unavailable("agent unavailable".to_owned());
    store.reload().unwrap();
    assert_eq!(
        store.report().rejection.as_deref(),
        Some("agent unavailable"),
        "though its last delivery stays in use"
    );
    assert!(store.not_ready(SystemTime::now()).is_none());
    // A file of revocation lists adds to the agent's delivery.
    let (certificate, _) = pki.issue("stranger", |p| p.serial_number = Some(9_u64.into()));
    config.identity.as_mut().unwrap().crl = Some(pki.revoke(&[9]));
    store.configure(&config).unwrap();
    store.deliver(delivered(&pki, "checkout"));
    let stranger = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
    let trust = Arc::clone(&store.material().as_ref().unwrap().trust);
    assert!(matches!(trust.verify(&stranger, &[], UnixTime::now(), Role::Client), Err(VerifyError::Revoked)));
}
