//! Puts the rules in, takes them out, prints them.

use std::{io, net::SocketAddr};

use clap::ValueEnum;

use super::{
    Plan, host,
    iptables::{self, Family},
    text, verify,
};

/// Who is told the rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// nftables; iptables where the kernel has no nf_tables and the program is there
    #[default]
    Auto,
    /// The kernel itself, by netlink: no program is needed
    Nftables,
    /// The programs iptables-restore and ip6tables-restore
    Iptables,
}

/// Why the traffic is not led through the proxy.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    #[error(
        "this is the network of the host, not of a pod. `apply` would {would}. Run it in the network namespace of the pod or container (an init container; `ip netns exec NAME`; no `hostNetwork`), or, if this machine's whole traffic is to pass a proxy that runs here, say so by --host. `outrigger redirect print` shows the rules. Nothing was changed"
    )]
    HostNetwork { would: String },
    #[error(
        "cannot tell whether this is the network of the host, as /proc/sys/net/core is not readable ({error}). `apply` would {would}. Mount /proc, or, if that is meant for this network whosever it is, say so by --host. Nothing was changed"
    )]
    UnknownNetwork { error: io::Error, would: String },
    #[error(
        "the kernel lets nobody but an administrator of this network change its rules: run as root with the capability NET_ADMIN (in a pod: the init container, with `capabilities.add: [NET_ADMIN]` and `runAsUser: 0`)"
    )]
    NotAllowed,
    #[error(
        "the kernel took no rules: {0}. It needs nf_tables with nat in the family `inet` (Linux 5.2 or later); use --backend iptables in an image that has iptables, or `outrigger.dev/mode: env`, which needs no rules"
    )]
    Kernel(io::Error),
    #[error("{0}. Is iptables in this image, and may it change rules (NET_ADMIN)?")]
    Iptables(io::Error),
    #[error(
        "the rules are there, but a connection to {probe} did not arrive at port {port}: {source}. Does another program's rule come first (`nft list ruleset`)?"
    )]
    NotIntercepted { probe: SocketAddr, port: u16, source: io::Error },
    #[error("this system has no such rules: redirection is for Linux")]
    #[cfg(not(target_os = "linux"))]
    Unsupported,
}

/// Whose network the rules may be for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// A pod's, container's or other namespace's; the host's is refused.
    Namespace,
    /// The host's too.
    Host,
}

/// Installs the rules, in the place of earlier ones, and sees them work. Says by whom.
///
/// # Errors
/// See [`RedirectError`]. Where the rules were refused, nothing has changed.
pub fn apply(plan: &Plan, backend: Backend, scope: Scope) -> Result<Backend, RedirectError> {
    check_scope(plan, scope, host::is_host_network())?;
    let by = choose(backend, || nftables(plan), || iptables::apply(plan))?;
    for probe in verify::targets() {
        verify::arrives(probe, plan.outbound_port).map_err(|source| RedirectError::NotIntercepted {
            probe,
            port: plan.outbound_port,
            source,
        })?;
    }
    Ok(by)
}

/// On a host, the rules would cut off everybody who is logged in, unless that is meant.
fn check_scope(plan: &Plan, scope: Scope, is_host_network: io::Result<bool>) -> Result<(), RedirectError> {
    match is_host_network {
        _ if scope == Scope::Host => Ok(()),
        Ok(false) => Ok(()),
        Ok(true) => Err(RedirectError::HostNetwork { would: plan.to_string() }),
        Err(error) => Err(RedirectError::UnknownNetwork { error, would: plan.to_string() }),
    }
}

/// Removes the rules; fine where there are none.
///
/// # Errors
/// See [`RedirectError`].
pub fn clear(backend: Backend) -> Result<Backend, RedirectError> {
    let by = choose(backend, nftables_clear, iptables::clear)?;
    if backend == Backend::Auto && by == Backend::Nftables && iptables::is_installed() {
        // An earlier version, or an image of one's own, may have gone that way.
        iptables::clear().map_err(RedirectError::Iptables)?;
    }
    Ok(by)
}

/// The rules as text: for `nft -f -`, or for `iptables-restore --noflush` and `ip6tables-restore --noflush`.
pub fn print(plan: &Plan, backend: Backend) -> String {
    match backend {
        Backend::Auto | Backend::Nftables => text::nft(plan),
        Backend::Iptables => {
            let of = |family| iptables::restore(plan, family, |_| false);
            format!(
                "# iptables-restore --noflush\n{}\n# ip6tables-restore --noflush\n{}",
                of(Family::V4),
                of(Family::V6)
            )
        }
    }
}

fn choose(
    backend: Backend,
    nftables: impl FnOnce() -> Result<(), RedirectError>,
    iptables: impl FnOnce() -> io::Result<()>,
) -> Result<Backend, RedirectError> {
    let by_iptables = || iptables().map(|()| Backend::Iptables).map_err(RedirectError::Iptables);
    match backend {
        Backend::Nftables => nftables().map(|()| Backend::Nftables),
        Backend::Iptables => by_iptables(),
        Backend::Auto => match nftables() {
            Ok(()) => Ok(Backend::Nftables),
            Err(RedirectError::Kernel(_)) if iptables::is_installed() => by_iptables(),
            Err(error) => Err(error),
        },
    }
}

#[cfg(target_os = "linux")]
fn nftables(plan: &Plan) -> Result<(), RedirectError> {
    super::nf_tables::apply(plan).map_err(refused)
}

#[cfg(target_os = "linux")]
fn nftables_clear() -> Result<(), RedirectError> {
    super::nf_tables::clear().map_err(refused)
}

#[cfg(target_os = "linux")]
fn refused(error: io::Error) -> RedirectError {
    match error.kind() {
        io::ErrorKind::PermissionDenied => RedirectError::NotAllowed,
        _ => RedirectError::Kernel(error),
    }
}

#[cfg(not(target_os = "linux"))]
fn nftables(_: &Plan) -> Result<(), RedirectError> {
    Err(RedirectError::Unsupported)
}

#[cfg(not(target_os = "linux"))]
fn nftables_clear() -> Result<(), RedirectError> {
    Err(RedirectError::Unsupported)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redirect::PortRange;

    #[test]
    fn a_host_is_redirected_only_where_that_is_said() {
        let plan = Plan {
            inbound_port: 4143,
            outbound_port: 4140,
            users: vec![4140],
            skip_inbound: vec![PortRange::from(4191)],
            skip_outbound: Vec::new(),
            skip_networks: Vec::new(),
        };
        for is_host in [Ok(true), Err(io::ErrorKind::NotFound.into())] {
            let error = check_scope(&plan, Scope::Namespace, is_host).unwrap_err().to_string();
            for part in ["--host", "4143", "4140", "user 4140", "4191", "Nothing was changed"] {
                assert!(error.contains(part), "`{part}` is not in: {error}");
            }
        }
        assert!(check_scope(&plan, Scope::Namespace, Ok(false)).is_ok());
        for is_host in [Ok(true), Ok(false), Err(io::ErrorKind::NotFound.into())] {
            assert!(check_scope(&plan, Scope::Host, is_host).is_ok());
        }
    }

    /// A kernel without nf_tables, or without its nat.
    fn lacks() -> Result<(), RedirectError> {
        Err(RedirectError::Kernel(io::ErrorKind::Unsupported.into()))
    }

    #[test]
    fn iptables_is_used_where_the_kernel_lacks_nf_tables_and_the_program_is_there() {
        let chosen = |backend, nftables: fn() -> Result<(), RedirectError>| {
            choose(backend, nftables, || Ok(())).map_err(|error| error.to_string())
        };
        assert_eq!(chosen(Backend::Auto, || Ok(())), Ok(Backend::Nftables));
        match iptables::is_installed() {
            true => assert_eq!(chosen(Backend::Auto, lacks), Ok(Backend::Iptables)),
            false => {
                assert!(chosen(Backend::Auto, lacks).is_err_and(|told| told.contains("--backend iptables")))
            }
        }
        assert!(chosen(Backend::Nftables, lacks).is_err());
        // Who may not is told so, and does not try another way.
        assert!(
            chosen(Backend::Auto, || Err(RedirectError::NotAllowed))
                .is_err_and(|told| told.contains("NET_ADMIN"))
        );
    }
}
