use std::time::Duration;

use rcgen::{BasicConstraints, ExtendedKeyUsagePurpose, IsCa};
use rustls_pki_types::pem::PemObject;

use super::*;
use crate::identity::{
    material::{self, EncodedContent, EncodedFile},
    test_pki::{Params, Pki, dns, id, uri},
};

fn text(name: &str, pem: &str) -> EncodedFile {
    EncodedFile { path: name.into(), content: EncodedContent::Pem(pem.as_bytes().to_vec()) }
}

/// Roots, each for a trust domain or for all, and the serial numbers that their CAs have revoked.
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
    material::build_trust(&ca, &crl, SystemTime::now()).unwrap()
}

fn issue(pki: &Pki, change: impl FnOnce(&mut Params)) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pki.issue("payments", change).0.as_bytes()).unwrap()
}

fn verify(trust: &Trust, leaf: &CertificateDer<'_>, role: Role) -> Result<Peer, String> {
    trust.verify(leaf, &[], UnixTime::now(), role).map_err(|refusal| refusal.to_string())
}

#[track_caller]
fn assert_rejected(words: &str, trust: &Trust, leaf: &CertificateDer<'_>) {
    let message = verify(trust, leaf, Role::Client).expect_err("it should be rejected");
    assert!(message.contains(words), "{message}");
}

#[test]
fn a_chain_to_a_root_is_accepted() {
    let (own_pki, partner_pki) = (Pki::new(), Pki::new());
    let all = trust(&[(None, &own_pki)], &[]);
    let peer = verify(&all, &issue(&own_pki, |_| {}), Role::Server).unwrap();
    assert_eq!(peer.to_string(), id("payments"));
    assert_rejected("not issued by a trusted CA (roots: all)", &all, &issue(&partner_pki, |_| {}));
    assert_rejected(
        "cannot be used",
        &all,
        &issue(&own_pki, |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
    );
    assert_rejected(
        "cannot be used",
        &all,
        &issue(&own_pki, |p| p.subject_alt_names.push(uri("spiffe://a/b"))),
    );
    let server_only = issue(&own_pki, |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    assert_rejected("may not be used by a client", &all, &server_only);
    assert!(verify(&all, &server_only, Role::Server).is_ok());
}

#[test]
fn certificates_are_accepted_within_their_validity() {
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
    assert!(matches!(in_2030(40), Err(VerifyError::Expired(_))));
    assert_rejected("not valid before 2030-01-01", &all, &leaf);
}

#[test]
fn roots_issue_ids_of_their_own_trust_domain_only() {
    let (shop, partner) = (Pki::new(), Pki::new());
    let both = trust(&[(Some("shop.example"), &shop), (Some("partner.example"), &partner)], &[]);
    let foreign = |pki: &Pki| issue(pki, |p| p.subject_alt_names = vec![uri("spiffe://partner.example/a")]);
    assert!(verify(&both, &issue(&shop, |_| {}), Role::Client).is_ok());
    assert!(verify(&both, &foreign(&partner), Role::Client).is_ok());
    assert_rejected("not issued by a trusted CA", &both, &foreign(&shop));
    let third = issue(&shop, |p| p.subject_alt_names = vec![uri("spiffe://third.example/a")]);
    assert_rejected("(trusted: shop.example, partner.example)", &both, &third);
    // A DNS name belongs to no trust domain: any of the roots may issue it.
    let named = issue(&partner, |p| p.subject_alt_names = vec![dns("partner.example")]);
    assert!(verify(&both, &named, Role::Client).is_ok());
}

#[test]
fn a_revocation_list_covers_one_issuer() {
    let (own_pki, mut partner_pki) = (Pki::new(), Pki::new());
    // Lists are distinguished by the issuer's name.
    partner_pki.renew_ca("partner CA");
    let numbered = |pki: &Pki, serial: u64| issue(pki, |p| p.serial_number = Some(serial.into()));
    let both = trust(&[(None, &own_pki), (None, &partner_pki)], &[(&own_pki, &[7]), (&partner_pki, &[8])]);
    assert_rejected("revoked", &both, &numbered(&own_pki, 7));
    assert_rejected("revoked", &both, &numbered(&partner_pki, 8));
    assert!(verify(&both, &numbered(&own_pki, 8), Role::Client).is_ok());
    assert!(verify(&both, &numbered(&partner_pki, 7), Role::Client).is_ok());
    // Upstreams with their own roots: revocation lists from `[identity]` apply too.
    let partner = trust(&[(None, &partner_pki)], &[]);
    assert!(verify(&partner, &numbered(&partner_pki, 8), Role::Client).is_ok());
    assert_rejected("revoked", &partner.with_revocations_of(&both), &numbered(&partner_pki, 8));
    assert_rejected(
        "not issued by a trusted CA",
        &partner.with_revocations_of(&both),
        &numbered(&own_pki, 8),
    );
}

#[test]
fn the_server_identity_must_be_expected() {
    let pki = Pki::new();
    let all = trust(&[(None, &pki)], &[]);
    let expected = |leaf: &CertificateDer<'_>, patterns: &[&str]| {
        let peer = verify(&all, leaf, Role::Server).unwrap();
        let patterns: Vec<IdentityPattern> =
            patterns.iter().map(|pattern| pattern.parse().unwrap()).collect();
        check_identity(&peer, leaf, &patterns).map_err(|refusal| refusal.to_string())
    };
    let payments = issue(&pki, |_| {});
    assert!(expected(&payments, &[&id("orders"), &id("payments")]).is_ok());
    assert!(expected(&payments, &["spiffe://shop.example/ns/shop/*"]).is_ok());
    let message = expected(&payments, &[&id("orders"), "dns:payments"]).unwrap_err();
    assert_eq!(message, format!("it is {}; expected {} or dns:payments", id("payments"), id("orders")));
    let named = issue(&pki, |p| p.subject_alt_names = vec![dns("payments.example")]);
    assert!(expected(&named, &["dns:payments.example"]).is_ok());
    assert!(expected(&named, &["dns:example"]).is_err());

    let peer = verify(&all, &named, Role::Server).unwrap();
    let name = |name: &'static str| check_name(&peer, &named, &ServerName::try_from(name).unwrap());
    assert!(name("payments.example").is_ok());
    let message = name("orders.example").unwrap_err().to_string();
    assert_eq!(message, "its certificate names payments.example; expected orders.example");
}

/// An error that passes through rustls is the same afterwards.
#[test]
fn verify_errors_round_trip_through_rustls() {
    let pki = Pki::new();
    let all = trust(&[(None, &pki)], &[]);
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_893_456_000);
    for refusal in [
        VerifyError::Expired(at),
        VerifyError::NotYetValid(at),
        VerifyError::UnknownIssuer("all".to_owned()),
        VerifyError::Revoked,
        VerifyError::Purpose("client"),
        VerifyError::UnexpectedIdentity { is: "a".to_owned(), expected: "b".to_owned() },
        VerifyError::Peer(PeerError::Ca),
    ] {
        let text_before = refusal.to_string();
        let unwrapped = from_rustls_error(&refusal.into(), &all, Role::Client).unwrap();
        assert_eq!(unwrapped.to_string(), text_before);
    }
    assert!(from_rustls_error(&rustls::Error::DecryptError, &all, Role::Client).is_none());
}
