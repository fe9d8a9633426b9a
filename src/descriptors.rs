//! Local resources that a connection needs: file descriptors, local ports, kernel buffers.
//!
//! The soft `nofile` limit is raised to the hard one at start. The highest descriptor numbers below it are reserved, in
//! two steps: connecting stops first, so that an accepted client still gets a response; accepting stops next, so that
//! the admin server still responds. The kernel always allocates the lowest free number, so the number of a new
//! descriptor shows how many are in use, and nothing has to be counted.

use std::{
    io,
    net::SocketAddr,
    os::fd::AsRawFd,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::{
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use tokio::net::{TcpSocket, TcpStream};

/// The limit that this process inherited.
static INHERITED: OnceLock<Rlimit> = OnceLock::new();
/// The current soft limit; unlimited is the highest number.
static LIMIT: AtomicU64 = AtomicU64::new(u64::MAX);

/// The share of all descriptors in each of the two reserves, and its bounds.
const RESERVED_SHARE: u64 = 16;
const MIN_RESERVED: u64 = 4;
const MAX_RESERVED: u64 = 32;

/// `OPEN_MAX` of macOS, where the hard limit is "unlimited", but a soft limit above this is rejected.
const MACOS_LIMIT: u64 = 10_240;

/// The purpose of a new descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DescriptorPurpose {
    /// A connection that this process opens.
    Dial,
    /// A connection of a client.
    Accept,
}

impl DescriptorPurpose {
    /// The first number that it must not use, given the soft limit.
    fn end(self, limit: u64) -> u64 {
        let reserve = (limit / RESERVED_SHARE).clamp(MIN_RESERVED, MAX_RESERVED);
        let reserves = match self {
            Self::Dial => 2,
            Self::Accept => 1,
        };
        limit.saturating_sub(reserve * reserves)
    }

    /// Whether `descriptor`, just opened for this purpose, is below the reserve.
    pub fn allows(self, descriptor: &impl AsRawFd) -> bool {
        let limit = LIMIT.load(Ordering::Relaxed);
        limit == u64::MAX
            || u64::try_from(descriptor.as_raw_fd()).is_ok_and(|number| number < self.end(limit))
    }
}

/// Raises the soft limit to the hard one. Returns the soft limit before and after, if it changed.
pub fn raise_limit() -> Option<(u64, u64)> {
    let inherited = *INHERITED.get_or_init(|| getrlimit(Resource::Nofile));
    let raise = |current| setrlimit(Resource::Nofile, Rlimit { current, ..inherited }).is_ok();
    let is_lower = |limit| inherited.current.is_some_and(|current| current < limit);
    let raised = inherited.current != inherited.maximum
        && (raise(inherited.maximum) || is_lower(MACOS_LIMIT) && raise(Some(MACOS_LIMIT)));
    refresh_limit();
    raised.then(|| (inherited.current.unwrap_or(u64::MAX), limit()))
}

/// Reads the limit again: another process may change it.
pub fn refresh_limit() {
    LIMIT.store(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// The current soft limit.
pub fn limit() -> u64 {
    LIMIT.load(Ordering::Relaxed)
}

/// Runs `spawn`, whose child process gets the soft limit that this process inherited. A service may size a table by its
/// limit, or use `select`, which accepts no number above 1023.
///
/// # Errors
/// Those of `spawn`.
pub fn with_inherited_limit<T>(mut spawn: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let now = getrlimit(Resource::Nofile);
    let Some(inherited) = INHERITED.get().filter(|inherited| inherited.current != now.current) else {
        return spawn();
    };
    let lowered = setrlimit(Resource::Nofile, Rlimit { current: inherited.current, ..now }).is_ok();
    let spawned = spawn();
    if lowered {
        let _ = setrlimit(Resource::Nofile, now);
    }
    match spawned {
        // More descriptors are open already than the inherited limit allows.
        Err(error) if lowered && is_local_resource(&error) => spawn(),
        spawned => spawned,
    }
}

/// Whether an error of `socket`, `connect`, `accept` or `open` means that this machine lacks a resource. Such an error
/// is not the peer's fault.
pub fn is_local_resource(error: &io::Error) -> bool {
    let Some(errno) = Errno::from_io_error(error) else { return false };
    matches!(
        errno,
        Errno::ADDRNOTAVAIL
            | Errno::MFILE
            | Errno::NFILE
            | Errno::NOBUFS
            | Errno::NOMEM
            | Errno::PERM
            | Errno::NETUNREACH
            | Errno::AFNOSUPPORT
    )
}

/// The missing resource and what to do about it; `None` for other errors.
pub fn missing_resource(error: &io::Error) -> Option<&'static str> {
    Some(match Errno::from_io_error(error).filter(|_| is_local_resource(error))? {
        Errno::ADDRNOTAVAIL => {
            "no local port or address left for it (see net.ipv4.ip_local_port_range and connections in TIME_WAIT)"
        }
        Errno::MFILE => "no file descriptor left in this process (raise the hard `nofile` limit)",
        Errno::NFILE => "no file descriptor left on this machine (see fs.file-max)",
        Errno::NOBUFS | Errno::NOMEM => "no memory left in the kernel",
        Errno::PERM => "this machine does not permit it (a firewall rule or security policy)",
        Errno::NETUNREACH => "this machine has no route to it",
        _ => "this machine does not have its address family",
    })
}

/// Opens a TCP connection, unless its descriptor would be a reserved one.
///
/// # Errors
/// Those of `socket` and `connect`; `EMFILE` if only reserved descriptors are left.
pub async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if !DescriptorPurpose::Dial.allows(&socket) {
        return Err(Errno::MFILE.into());
    }
    socket.connect(address).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connecting_stops_before_accepting() {
        for (limit, dial, accept) in
            [(64, 56, 60), (1024, 960, 992), (1 << 20, (1 << 20) - 64, (1 << 20) - 32)]
        {
            assert_eq!(
                (DescriptorPurpose::Dial.end(limit), DescriptorPurpose::Accept.end(limit)),
                (dial, accept),
                "{limit}"
            );
        }
        assert_eq!(DescriptorPurpose::Dial.end(3), 0);
    }

    #[test]
    fn distinguishes_local_resources_from_peer_errors() {
        for errno in [
            Errno::ADDRNOTAVAIL,
            Errno::MFILE,
            Errno::NFILE,
            Errno::NOBUFS,
            Errno::NOMEM,
            Errno::PERM,
            Errno::NETUNREACH,
            Errno::AFNOSUPPORT,
        ] {
            let error = io::Error::from(errno);
            assert!(is_local_resource(&error) && missing_resource(&error).is_some(), "{error}");
        }
        for errno in [Errno::CONNREFUSED, Errno::HOSTUNREACH, Errno::TIMEDOUT, Errno::CONNRESET] {
            let error = io::Error::from(errno);
            assert!(!is_local_resource(&error) && missing_resource(&error).is_none(), "{error}");
        }
        assert!(!is_local_resource(&io::Error::other("no number")));
    }
}
