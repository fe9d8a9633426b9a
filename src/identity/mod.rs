//! Who this service is and who speaks to it: certificates, whom they prove, and TLS.
//!
//! | file | what is in it |
//! | --- | --- |
//! | [`spiffe`] | SPIFFE IDs, trust domains, patterns that name peers |
//! | [`peer`] | what is known of a verified other side |

pub mod peer;
pub mod spiffe;

pub use peer::{Peer, PeerError};
pub use spiffe::{InvalidId, Pattern, SpiffeId, TrustDomain};
