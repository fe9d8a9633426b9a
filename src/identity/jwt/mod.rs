//! End-user tokens, checked before the service sees them (RFC 7519, RFC 8725, RFC 6750).
//!
//! | file | what is in it |
//! | --- | --- |
//! | [`token`] | whether a token is good |
//! | [`keys`] | what an issuer signs with |
//! | [`cache`] | tokens that were found good |
//! | [`issuer`], [`refresh`] | keeping the keys current; when they are fetched |

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
pub use token::{Claims, Expected, Invalid};
