//! What makes a pod's traffic pass through the proxy.

pub mod redirect;
