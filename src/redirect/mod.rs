//! Kernel rules that redirect a pod's TCP connections to the proxy, with exemptions.
//!
//! ```text
//! plan: ports, exemptions ──▶ rules, in order ──▶ nftables (netlink: no program needed) ─┐
//!                                              └▶ iptables-restore, if the kernel has no  ├──▶ verify: a connection
//!                                                 nf_tables                              ─┘    that must arrive
//! ```
//!
//! The image contains one static binary and nothing else, so the rules are written by netlink, without `nft`: one
//! transaction for IPv4 and IPv6 that replaces our table and leaves all others unchanged.

pub mod apply;
mod host;
mod iptables;
#[cfg(target_os = "linux")]
mod netlink;
#[cfg_attr(not(target_os = "linux"), path = "no_nf_tables.rs")]
mod nf_tables;
mod plan;
mod text;
mod verify;

pub use apply::{Backend, RedirectError, Scope, apply, clear, print};
pub use plan::{Plan, PortRange};

/// Connections to this port of the loopback addresses are redirected to the outbound port for every user. Nothing
/// listens on it, so a successful connection proves that the rules work.
pub const PROBE_PORT: u16 = 4144;

/// The name of our table.
const TABLE_NAME: &str = "outrigger";
