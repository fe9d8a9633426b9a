//! Who this service is and who speaks to it: certificates, whom they prove, and TLS; who may call what; tokens.
//!
//! | file | what is in it |
//! | --- | --- |
//! | [`spiffe`] | SPIFFE IDs, trust domains, patterns that name peers |
//! | [`peer`] | what is known of a verified other side |
//! | [`material`], [`files`] | a certificate, its key, its roots: read, and checked before they are taken |
//! | [`trust`] | whether a chain is believed, and by which roots |
//! | [`workload`] | the same from an agent: the SPIFFE Workload API |
//! | [`store`] | what holds now, and why the newest was refused |
//! | [`verify`], [`tls`] | rustls: its two verifiers, its settings |
//! | [`issue`] | a throw-away CA for development |
//! | [`handshake`], [`counts`] | handshakes, and what went wrong in them |
//! | [`gate`] | what an inbound call must show, compiled from the configuration |
//! | [`authorize`] | the decision: allow entries against one call |
//! | [`jwt`] | tokens of end users, and the keys that sign them |
//! | [`oauth2`] | tokens that this service shows to its upstreams |
//! | [`xfcc`] | how the service learns who calls |

pub mod counts;
pub mod files;
pub mod gate;
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

pub use crate::authorization::{InvalidId, Pattern, Peer, PeerError, SpiffeId, TrustDomain};
pub use time::Date;
