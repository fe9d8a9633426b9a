//! End-user tokens, checked before the service sees them (RFC 7519, RFC 8725, RFC 6750).
//!
//! | file | what is in it |
//! | --- | --- |
//! | [`token`] | verification of a token |
//! | [`keys`] | an issuer's public keys |
//! | [`cache`] | the cache of valid tokens |
//! | [`issuer`], [`refresh`] | refreshing the keys, and its schedule |

pub mod cache;
pub mod issuer;
pub mod keys;
pub mod refresh;
#[cfg(test)]
#[path = "../../../tests/support/tokens.rs"]
pub mod test_keys;
pub mod token;

pub use cache::TokenCache;
pub use issuer::Issuer;
pub use keys::KeySet;
pub use token::{Claims, TokenError, TokenRequirements};
