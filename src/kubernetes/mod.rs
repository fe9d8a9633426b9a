//! Kubernetes: injection of the sidecar into pods, by a command or a webhook, and redirection of a pod's traffic.
//!
//! ```text
//! manifest: YAML ─┐                                      ┌─▶ the edited YAML text
//!                 ├─▶ inject: a pod in, JSON Patch out ──┤
//! webhook: HTTPS ─┘                                      └─▶ an admission response
//! ```
//!
//! [`inject`] decides and does no I/O, so both callers inject the same.

pub mod inject;
pub mod manifest;
pub mod patch;
pub mod webhook;
pub mod yaml;
