//! Kubernetes: the sidecar put into pods, by a command or a webhook, and what makes a pod's traffic pass through it.
//!
//! ```text
//! manifest: YAML ─┐                                      ┌─▶ the text with the changes made in it
//!                 ├─▶ inject: a pod in, JSON Patch out ──┤
//! webhook: HTTPS ─┘                                      └─▶ an admission response
//! ```
//!
//! [`inject`] decides and does no I/O; the two that call it cannot differ in what a pod gets.

pub mod inject;
pub mod manifest;
pub mod patch;
pub mod webhook;
pub mod yaml;
