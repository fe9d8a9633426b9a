//! Installs, removes and prints the rules.

use std::{io, net::SocketAddr};

use clap::ValueEnum;

use super::{
    Plan, host,
    iptables::{self, Family},
    nf_tables, text, verify,
};
use crate::platform;

/// The mechanism that installs the rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// nftables; iptables if the kernel has no nf_tables and the program is installed
    #[default]
    Auto,
    /// nf_tables by netlink; needs no program
    Nftables,
    /// The programs iptables-restore and ip6tables-restore
    Iptables,
}

/// Why redirection failed.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    #[error(
        "this is the network of the host, not of a pod. `apply` would {would}. Run it in the network namespace of the pod or container (an init container; `ip netns exec NAME`; no `hostNetwork`), or, to redirect all traffic of this machine to a proxy that runs here, pass --host. `outrigger redirect print` shows the rules. Nothing was changed"
    )]
    HostNetwork { would: String },
    #[error(
        "cannot tell whether this is the network of the host, as /proc/sys/net/core is not readable ({error}). `apply` would {would}. Mount /proc, or pass --host to install the rules anyway. Nothing was changed"
    )]
    UnknownNetwork { error: io::Error, would: String },
    #[error(
        "no permission to change the kernel's rules: run as root with the capability NET_ADMIN (in a pod: the init container, with `capabilities.add: [NET_ADMIN]` and `runAsUser: 0`)"
    )]
    NotAllowed,
    #[error(
        "the kernel rejected the rules: {0}. It needs nf_tables with nat in the family `inet` (Linux 5.2 or later); use --backend iptables in an image that has iptables, or `outrigger.dev/mode: env`, which needs no rules"
    )]
    Kernel(io::Error),
    #[error("{0}. Is iptables in this image, and may it change rules (NET_ADMIN)?")]
    Iptables(io::Error),
    #[error(
        "the rules are installed, but a connection to {probe} did not reach port {port}: {source}. Does another program's rule take precedence (`nft list ruleset`)?"
    )]
    NotIntercepted { probe: SocketAddr, port: u16, source: io::Error },
    #[error(
        "redirection needs Linux: this system has neither nf_tables nor iptables. Nothing was changed. Without redirection, set `http_proxy` for the service (`outrigger run -- CMD` does), or give an upstream a port of its own (`listen`)"
    )]
    NeedsLinux,
}

/// The network namespaces in which rules may be installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Any but the host's.
    Namespace,
    /// Also the host's.
    Host,
}

/// Installs the rules, replacing earlier ones, and verifies them with a connection. Returns the backend used.
///
/// # Errors
/// See [`RedirectError`]. If the kernel rejects the rules, nothing has changed.
pub fn apply(plan: &Plan, backend: Backend, scope: Scope) -> Result<Backend, RedirectError> {
    check_system(platform::CAN_REDIRECT)?;
    check_scope(plan, scope, host::is_host_network())?;
    let used = choose(backend, || nftables(plan), || iptables::apply(plan))?;
    for probe in verify::probe_addresses() {
        verify::check_arrival(probe, plan.outbound_port).map_err(|source| RedirectError::NotIntercepted {
            probe,
            port: plan.outbound_port,
            source,
        })?;
    }
    Ok(used)
}

fn check_system(can_redirect: bool) -> Result<(), RedirectError> {
    if can_redirect { Ok(()) } else { Err(RedirectError::NeedsLinux) }
}

/// Rejects the host's network by default: there the rules would cut off remote logins.
fn check_scope(plan: &Plan, scope: Scope, is_host_network: io::Result<bool>) -> Result<(), RedirectError> {
    match is_host_network {
        _ if scope == Scope::Host => Ok(()),
        Ok(false) => Ok(()),
        Ok(true) => Err(RedirectError::HostNetwork { would: plan.to_string() }),
        Err(error) => Err(RedirectError::UnknownNetwork { error, would: plan.to_string() }),
    }
}

/// Removes the rules; succeeds if there are none.
///
/// # Errors
/// See [`RedirectError`].
pub fn clear(backend: Backend) -> Result<Backend, RedirectError> {
    check_system(platform::CAN_REDIRECT)?;
    let used = choose(backend, nftables_clear, iptables::clear)?;
    if backend == Backend::Auto && used == Backend::Nftables && iptables::is_installed() {
        // An earlier version or another image may have used iptables.
        iptables::clear().map_err(RedirectError::Iptables)?;
    }
    Ok(used)
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
    let use_iptables = || iptables().map(|()| Backend::Iptables).map_err(RedirectError::Iptables);
    match backend {
        Backend::Nftables => nftables().map(|()| Backend::Nftables),
        Backend::Iptables => use_iptables(),
        Backend::Auto => match nftables() {
            Ok(()) => Ok(Backend::Nftables),
            Err(RedirectError::Kernel(_)) if iptables::is_installed() => use_iptables(),
            Err(error) => Err(error),
        },
    }
}

fn nftables(plan: &Plan) -> Result<(), RedirectError> {
    nf_tables::apply(plan).map_err(kernel_error)
}

fn nftables_clear() -> Result<(), RedirectError> {
    nf_tables::clear().map_err(kernel_error)
}

fn kernel_error(error: io::Error) -> RedirectError {
    match error.kind() {
        io::ErrorKind::PermissionDenied => RedirectError::NotAllowed,
        _ => RedirectError::Kernel(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redirect::PortRange;

    #[test]
    fn a_host_is_redirected_only_with_host_scope() {
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

    #[test]
    fn other_systems_get_an_error_that_names_the_alternatives() {
        assert!(check_system(true).is_ok());
        let error = check_system(false).unwrap_err().to_string();
        for part in ["needs Linux", "http_proxy", "listen", "Nothing was changed"] {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
    }

    /// A kernel without nf_tables, or without its NAT.
    fn without_nf_tables() -> Result<(), RedirectError> {
        Err(RedirectError::Kernel(io::ErrorKind::Unsupported.into()))
    }

    #[test]
    fn auto_falls_back_to_iptables_without_nf_tables() {
        let chosen = |backend, nftables: fn() -> Result<(), RedirectError>| {
            choose(backend, nftables, || Ok(())).map_err(|error| error.to_string())
        };
        assert_eq!(chosen(Backend::Auto, || Ok(())), Ok(Backend::Nftables));
        match iptables::is_installed() {
            true => assert_eq!(chosen(Backend::Auto, without_nf_tables), Ok(Backend::Iptables)),
            false => {
                assert!(
                    chosen(Backend::Auto, without_nf_tables)
                        .is_err_and(|text| text.contains("--backend iptables"))
                )
            }
        }
        assert!(chosen(Backend::Nftables, without_nf_tables).is_err());
        // Missing permission is reported; no other backend is tried.
        assert!(
            chosen(Backend::Auto, || Err(RedirectError::NotAllowed))
                .is_err_and(|text| text.contains("NET_ADMIN"))
        );
    }
}
