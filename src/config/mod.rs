//! The configuration: what a user writes, read, merged, checked and resolved.
//!
//! ```text
//! files ──parse──▶ tree with origins ──merge──▶ one tree ──inherit──▶ typed [`Config`] ──▶ snapshot
//! ```
//!
//! Inheritance (`[defaults]` → `[[upstream]]` → `[[upstream.route]]`) is the same key-by-key merge as that of
//! several files, done on the tree, so every effective value still knows the file and line that set it.

mod policy;
mod schema;

pub use policy::{AttemptTimeout, Policy};
pub use schema::*;
