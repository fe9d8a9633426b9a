//! Kernel rules that lead a pod's TCP connections through the proxy, and leave alone what must be.
//!
//! ```text
//! plan: what is led where ──▶ rules, in order ──▶ nftables (netlink: no program needed) ─┐
//!                                              └▶ iptables-restore, where the kernel has  ├──▶ verify: a connection
//!                                                 no nf_tables                           ─┘    that must arrive
//! ```
//!
//! The image holds one static binary and nothing else, so the rules are written to the kernel by netlink, without `nft`:
//! one transaction for IPv4 and IPv6 that replaces our own table and touches nobody else's.

pub mod apply;
mod host;
mod iptables;
#[cfg(target_os = "linux")]
mod netlink;
#[cfg(target_os = "linux")]
mod nf_tables;
mod plan;
mod text;
mod verify;

pub use apply::{Backend, RedirectError, Scope, apply, clear, print};
pub use plan::{Plan, PortRange};

/// Connections to this port of the loopback addresses are led to the outbound port, whoever opens them. Nothing listens
/// there: who gets through has seen the rules work.
pub const PROBE_PORT: u16 = 4144;

/// Our table, chains beside those of everybody else.
const NAME: &str = "outrigger";
