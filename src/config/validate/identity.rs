//! Validation of TLS: keys that need a certificate, and the names of peers and trust domains.

use rustls_pki_types::ServerName;

use super::Check;
use crate::{
    authorization::{IdentityPattern, TrustDomain},
    config::{Config, Mtls, Node, TlsMode, TrustBundles, Upstream, diagnostic::Problems},
};

/// Inbound TLS, and the names of trust domains.
pub(in super::super) fn identity(config: &Config, root: &Node, problems: &mut Problems) {
    let mut check = Check { node: root, problems };
    if let Some(identity) = &config.identity {
        if let Some(TrustBundles::ByTrustDomain(table)) = &identity.ca {
            check.require(
                !table.is_empty(),
                &["identity", "ca"],
                "no peer would be trusted",
                "name a bundle",
            );
            for name in table.keys() {
                if let Err(reason) = name.parse::<TrustDomain>() {
                    let message = format!("`{name}` is not a trust domain: {reason}");
                    check.error(&["identity", "ca", name], message, "write e.g. \"shop.example\"");
                }
            }
        }
        return;
    }
    let help = "add an [identity] section; `outrigger certs` creates a certificate for development";
    let message = "mutual TLS needs a certificate of this service";
    check.require_present(config.inbound.mtls != Mtls::Strict, &["inbound", "mtls"], message, help);
    for (at, port) in config.inbound.ports.iter().enumerate() {
        let path = ["inbound", "port", &at.to_string(), "mtls"];
        check.require_present(port.mtls != Some(Mtls::Strict), &path, message, help);
    }
}

/// TLS to an upstream.
pub(super) fn upstream(check: &mut Check<'_>, upstream: &Upstream, has_identity: bool) {
    let tls = &upstream.tls;
    let has_certificate = tls.mode != TlsMode::Mutual || has_identity;
    let help = "add an [identity] section, or write \"simple\"";
    check.require_present(has_certificate, &["tls"], "mutual TLS needs a certificate of this service", help);
    for (at, id) in tls.identity.iter().enumerate() {
        if let Err(reason) = id.parse::<IdentityPattern>() {
            let help = "write e.g. \"spiffe://shop.example/ns/shop/sa/payments\", or \"dns:NAME\"";
            check.error(&["identity", &at.to_string()], format!("this is not a SPIFFE ID: {reason}"), help);
        }
    }
    if let Some(name) = &tls.server_name {
        let fits = ServerName::try_from(name.as_str()).is_ok();
        check.require(fits, &["server_name"], "this is not a host's name", "write e.g. \"payments.example\"");
    }
    if tls.mode == TlsMode::Off {
        let help =
            "set `tls`, or remove this key; where [identity] is set, `identity` alone makes it \"mutual\"";
        let message = "this key has no effect without TLS";
        check.require(tls.identity.is_empty(), &["identity"], message, help);
        check.require(tls.ca.is_none(), &["ca"], message, help);
        check.require(tls.server_name.is_none(), &["server_name"], message, help);
        check.require(tls.min_tls.is_none(), &["min_tls"], message, help);
    }
}
