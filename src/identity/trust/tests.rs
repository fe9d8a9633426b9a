use std::time::Duration;

use rcgen::{BasicConstraints, ExtendedKeyUsagePurpose, IsCa};
use rustls_pki_types::pem::PemObject;

use super::*;
use crate::identity::{
    material::{self, Content, Text},
    test_pki::{Params, Pki, dns, id, uri},
};

fn text(name: &str, pem: &str) -> Text {
    Text { path: name.into(), content: Content::Pem(pem.as_bytes().to_vec()) }
}

/// Roots, each for a trust domain or for all, and what their CAs have revoked.
fn trust(roots: &[(Option<&str>, &Pki)], revoked: &[(&Pki, &[u64])]) -> Trust {
    let ca: Vec<_> = roots
        .iter()
        .map(|(domain, pki)| {
            (domain.map(|domain| domain.parse().unwrap()), text(domain.unwrap_or("all"), &pki.ca_pem()))
        })
        .collect();
    let crl: Vec<_> = revoked
        .iter()
        .map(|(pki, serials)| text("crl", &std::fs::read_to_string(pki.revoke(serials)).unwrap()))
        .collect();
    material::trust(&ca, &crl, SystemTime::now()).unwrap()
}

fn issue(pki: &Pki, change: impl FnOnce(&mut Params)) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pki.issue("payments", change).0.as_bytes()).unwrap()
}

fn verify(trust: &Trust, leaf: &CertificateDer<'_>, role: Role) -> Result<Peer, String> {
    trust.verify(leaf, &[], UnixTime::now(), role).map_err(|refusal| refusal.to_string())
}

#[track_caller]
fn refused_with(words: &str, trust: &Trust, leaf: &CertificateDer<'_>) {
    let why = verify(trust, leaf, Role::Client).expect_err("it should not be believed");
    assert!(why.contains(words), "{why}");
}

#[test]
fn who_is_believed() {
    let (ours, theirs) = (Pki::new(), Pki::new());
    let all = trust(&[(None, &ours)], &[]);
    let peer = verify(&all, &issue(&ours, |_| {}), Role::Server).unwrap();
    assert_eq!(peer.to_string(), id("payments"));
    refused_with("issued by nobody who is trusted here (looked at: all)", &all, &issue(&theirs, |_| {}));
    refused_with(
        "does not count",
        &all,
        &issue(&ours, |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
    );
    refused_with("does not count", &all, &issue(&ours, |p| p.subject_alt_names.push(uri("spiffe://a/b"))));
    let server_only = issue(&ours, |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    refused_with("may not be used by a client", &all, &server_only);
    assert!(verify(&all, &server_only, Role::Server).is_ok());
}

#[test]
fn for_as_long_as_it_is_valid() {
    let pki = Pki::new();
    let all = trust(&[(None, &pki)], &[]);
    let leaf = issue(&pki, |p| {
        p.not_before = rcgen::date_time_ymd(2030, 1, 1);
        p.not_after = rcgen::date_time_ymd(2030, 2, 1);
    });
    let in_2030 = |days: u64| {
        let now = UnixTime::since_unix_epoch(Duration::from_secs(1_893_456_000 + days * 86_400));
        all.verify(&leaf, &[], now, Role::Client)
    };
    assert!(in_2030(1).is_ok());
    assert!(matches!(in_2030(40), Err(Refusal::Expired(_))));
    refused_with("not valid before 2030-01-01", &all, &leaf);
}

#[test]
fn each_trust_domain_vouches_for_its_own_ids_alone() {
    let (shop, partner) = (Pki::new(), Pki::new());
    let both = trust(&[(Some("shop.example"), &shop), (Some("partner.example"), &partner)], &[]);
    let foreign = |pki: &Pki| issue(pki, |p| p.subject_alt_names = vec![uri("spiffe://partner.example/a")]);
    assert!(verify(&both, &issue(&shop, |_| {}), Role::Client).is_ok());
    assert!(verify(&both, &foreign(&partner), Role::Client).is_ok());
    refused_with("issued by nobody who is trusted", &both, &foreign(&shop));
    let third = issue(&shop, |p| p.subject_alt_names = vec![uri("spiffe://third.example/a")]);
    refused_with("(trusted: shop.example, partner.example)", &both, &third);
    // A name in DNS is of no trust domain: any of the roots may vouch for it.
    let named = issue(&partner, |p| p.subject_alt_names = vec![dns("partner.example")]);
    assert!(verify(&both, &named, Role::Client).is_ok());
}

#[test]
fn a_revocation_list_is_of_one_issuer() {
    let (ours, mut theirs) = (Pki::new(), Pki::new());
    // Lists are told apart by the issuer's name.
    theirs.renew_ca("their CA");
    let numbered = |pki: &Pki, serial: u64| issue(pki, |p| p.serial_number = Some(serial.into()));
    let both = trust(&[(None, &ours), (None, &theirs)], &[(&ours, &[7]), (&theirs, &[8])]);
    refused_with("revoked", &both, &numbered(&ours, 7));
    refused_with("revoked", &both, &numbered(&theirs, 8));
    assert!(verify(&both, &numbered(&ours, 8), Role::Client).is_ok());
    assert!(verify(&both, &numbered(&theirs, 7), Role::Client).is_ok());
    // Upstreams with roots of their own: what is known to be revoked is, whoever's list says so.
    let partner = trust(&[(None, &theirs)], &[]);
    assert!(verify(&partner, &numbered(&theirs, 8), Role::Client).is_ok());
    refused_with("revoked", &partner.revoked_as_in(&both), &numbered(&theirs, 8));
    refused_with("issued by nobody", &partner.revoked_as_in(&both), &numbered(&ours, 8));
}

#[test]
fn who_must_answer() {
    let pki = Pki::new();
    let all = trust(&[(None, &pki)], &[]);
    let expected = |leaf: &CertificateDer<'_>, patterns: &[&str]| {
        let peer = verify(&all, leaf, Role::Server).unwrap();
        let patterns: Vec<Pattern> = patterns.iter().map(|pattern| pattern.parse().unwrap()).collect();
        expect(&peer, leaf, &patterns).map_err(|refusal| refusal.to_string())
    };
    let payments = issue(&pki, |_| {});
    assert!(expected(&payments, &[&id("orders"), &id("payments")]).is_ok());
    assert!(expected(&payments, &["spiffe://shop.example/ns/shop/*"]).is_ok());
    let why = expected(&payments, &[&id("orders"), "dns:payments"]).unwrap_err();
    assert_eq!(why, format!("it is {}; expected {} or dns:payments", id("payments"), id("orders")));
    let named = issue(&pki, |p| p.subject_alt_names = vec![dns("payments.example")]);
    assert!(expected(&named, &["dns:payments.example"]).is_ok());
    assert!(expected(&named, &["dns:example"]).is_err());

    let peer = verify(&all, &named, Role::Server).unwrap();
    let name = |name: &'static str| expect_name(&peer, &named, &ServerName::try_from(name).unwrap());
    assert!(name("payments.example").is_ok());
    let why = name("orders.example").unwrap_err().to_string();
    assert_eq!(why, "its certificate names payments.example; expected orders.example");
}

/// What goes through rustls comes out as it went in.
#[test]
fn refusals_survive_the_way_through_rustls() {
    let pki = Pki::new();
    let all = trust(&[(None, &pki)], &[]);
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_893_456_000);
    for refusal in [
        Refusal::Expired(at),
        Refusal::NotYet(at),
        Refusal::UnknownIssuer("all".to_owned()),
        Refusal::Revoked,
        Refusal::Purpose("client"),
        Refusal::NotExpected { is: "a".to_owned(), expected: "b".to_owned() },
        Refusal::Peer(PeerError::Ca),
    ] {
        let said = refusal.to_string();
        let back = refused(&refusal.into(), &all, Role::Client).unwrap();
        assert_eq!(back.to_string(), said);
    }
    assert!(refused(&rustls::Error::DecryptError, &all, Role::Client).is_none());
}
