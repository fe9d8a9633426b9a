//! Identity of this service and its peers: certificates, trust, TLS, tokens. SPIFFE IDs, verified peers and the decision
//! who may send which request are below, in [`crate::authorization`].
//!
//! | file | what is in it |
//! | --- | --- |
//! | [`material`], [`files`] | certificate, key and roots: read and checked before use |
//! | [`trust`] | verification of a certificate chain against roots and revocation lists |
//! | [`workload`] | certificates from an agent: the SPIFFE Workload API |
//! | [`store`] | the certificates in use, and why newer ones were rejected |
//! | [`verify`], [`tls`] | rustls: its two verifiers, its settings |
//! | [`issue`] | a throw-away CA for development |
//! | [`handshake`], [`counts`] | TLS handshakes, their errors and counters |
//! | [`access_policy`] | `[[inbound.allow]]` and `[inbound.jwt]`, compiled from the configuration |
//! | [`jwt`] | tokens of end users, and the keys that verify them |
//! | [`oauth2`] | tokens that this service presents to its upstreams |
//! | [`xfcc`] | `x-forwarded-client-cert`: the peer identity for the service |

pub mod access_policy;
pub mod counts;
pub mod files;
pub mod handshake;
pub mod issue;
pub mod jwt;
pub mod material;
pub mod oauth2;
pub mod store;
#[cfg(test)]
#[path = "../../tests/support/pki.rs"]
#[allow(dead_code, reason = "not every test uses every prop")]
mod test_pki;
mod time;
pub mod tls;
pub mod trust;
pub mod verify;
pub mod workload;
pub mod xfcc;

pub use crate::authorization::{IdentityPattern, InvalidId, Peer, PeerError, SpiffeId, TrustDomain};
pub use time::Date;
