//! Who this service is and who speaks to it: certificates, whom they prove, and TLS; who may call what; tokens.
//!
//! | file | what is in it |
//! | --- | --- |
//! | [`spiffe`] | SPIFFE IDs, trust domains, patterns that name peers |
//! | [`peer`] | what is known of a verified other side |
//! | [`gate`] | what an inbound call must show, compiled from the configuration |
//! | [`authorize`] | the decision: allow entries against one call |
//! | [`jwt`] | tokens of end users, and the keys that sign them |
//! | [`oauth2`] | tokens that this service shows to its upstreams |
//! | [`xfcc`] | how the service learns who calls |

pub mod authorize;
pub mod gate;
pub mod jwt;
pub mod oauth2;
pub mod peer;
pub mod spiffe;
pub mod xfcc;

pub use peer::{Peer, PeerError};
pub use spiffe::{InvalidId, Pattern, SpiffeId, TrustDomain};
