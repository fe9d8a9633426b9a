//! Resources of this process that a connection needs: file descriptors, local ports, buffers of the kernel.
//!
//! The soft `nofile` limit is raised to the hard one at start. The highest descriptor numbers below it are reserved, in
//! two steps: dialling stops first, so that a client that is accepted still gets a response; accepting stops next, so
//! that the admin server still responds. The kernel always gives out the lowest free number, so the number of a new
//! descriptor tells how many are in use, and nothing has to be counted.

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

/// The soft limit as this process found it.
static INHERITED: OnceLock<Rlimit> = OnceLock::new();
/// The soft limit now; none is the highest number.
static LIMIT: AtomicU64 = AtomicU64::new(u64::MAX);

/// The share of all descriptors in each of the two reserves, and its bounds.
const RESERVED_SHARE: u64 = 16;
const LEAST_RESERVED: u64 = 4;
const MOST_RESERVED: u64 = 32;

/// What a new descriptor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A connection that this process opens.
    Dial,
    /// A connection of a client.
    Accept,
}

impl Purpose {
    /// The first number that it must leave to others, where the soft limit is `limit`.
    fn end(self, limit: u64) -> u64 {
        let reserve = (limit / RESERVED_SHARE).clamp(LEAST_RESERVED, MOST_RESERVED);
        let reserves = match self {
            Self::Dial => 2,
            Self::Accept => 1,
        };
        limit.saturating_sub(reserve * reserves)
    }

    /// Whether `descriptor`, just opened for this, lies below the reserve.
    pub fn allows(self, descriptor: &impl AsRawFd) -> bool {
        let limit = LIMIT.load(Ordering::Relaxed);
        limit == u64::MAX
            || u64::try_from(descriptor.as_raw_fd()).is_ok_and(|number| number < self.end(limit))
    }
}

/// Raises the soft limit to the hard one. Returns both soft limits, before and after, where that changed something.
pub fn raise_limit() -> Option<(u64, u64)> {
    let found = *INHERITED.get_or_init(|| getrlimit(Resource::Nofile));
    let wanted = Rlimit { current: found.maximum, maximum: found.maximum };
    let raised = found.current != found.maximum && setrlimit(Resource::Nofile, wanted).is_ok();
    refresh_limit();
    raised.then(|| (found.current.unwrap_or(u64::MAX), limit()))
}

/// Reads the limit again: another process may change it.
pub fn refresh_limit() {
    LIMIT.store(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// The soft limit that holds now.
pub fn limit() -> u64 {
    LIMIT.load(Ordering::Relaxed)
}

/// Runs `spawn`, whose child process gets the soft limit that this process found. A service may take its limit for
/// the size of a table, or use `select`, which takes no number above 1023.
///
/// # Errors
/// Those of `spawn`.
pub fn with_inherited_limit<T>(mut spawn: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let now = getrlimit(Resource::Nofile);
    let Some(found) = INHERITED.get().filter(|found| found.current != now.current) else { return spawn() };
    let lowered = setrlimit(Resource::Nofile, Rlimit { current: found.current, ..now }).is_ok();
    let spawned = spawn();
    if lowered {
        let _ = setrlimit(Resource::Nofile, now);
    }
    match spawned {
        // More are open already than the limit that was found allows.
        Err(error) if lowered && is_local_resource(&error) => spawn(),
        spawned => spawned,
    }
}

/// Whether an error of `socket`, `connect`, `accept` or `open` is for want of something of this machine's own, and so
/// says nothing about a peer.
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

/// What is missing, and what to do about it; `None` where the error is another.
pub fn missing(error: &io::Error) -> Option<&'static str> {
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

/// Opens a TCP connection, unless its descriptor would be one of the reserve.
///
/// # Errors
/// Those of `socket` and `connect`; `EMFILE` where only reserved descriptors are left.
pub async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if !Purpose::Dial.allows(&socket) {
        return Err(Errno::MFILE.into());
    }
    socket.connect(address).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dialling_stops_before_accepting_and_both_before_the_limit() {
        for (limit, dial, accept) in
            [(64, 56, 60), (1024, 960, 992), (1 << 20, (1 << 20) - 64, (1 << 20) - 32)]
        {
            assert_eq!((Purpose::Dial.end(limit), Purpose::Accept.end(limit)), (dial, accept), "{limit}");
        }
        assert_eq!(Purpose::Dial.end(3), 0);
    }

    #[test]
    fn what_this_machine_lacks_is_told_from_what_a_peer_does() {
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
            assert!(is_local_resource(&error) && missing(&error).is_some(), "{error}");
        }
        for errno in [Errno::CONNREFUSED, Errno::HOSTUNREACH, Errno::TIMEDOUT, Errno::CONNRESET] {
            let error = io::Error::from(errno);
            assert!(!is_local_resource(&error) && missing(&error).is_none(), "{error}");
        }
        assert!(!is_local_resource(&io::Error::other("no number")));
    }
}
