//! Verifies by a connection that the rules work.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::Duration,
};

use super::PROBE_PORT;

const TIMEOUT: Duration = Duration::from_secs(2);

/// The probe addresses, for the address families of this network namespace.
pub(super) fn probe_addresses() -> Vec<SocketAddr> {
    let families = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
    let available = families.into_iter().filter(|ip| TcpListener::bind((*ip, 0)).is_ok());
    available.map(|ip| SocketAddr::new(ip, PROBE_PORT)).collect()
}

/// Connects to a port on which nothing listens and checks that the connection arrives at the outbound port. If the
/// proxy is already running, accepting the connection is sufficient.
pub(super) fn check_arrival(probe: SocketAddr, outbound_port: u16) -> io::Result<()> {
    let listener = match TcpListener::bind((probe.ip(), outbound_port)) {
        Ok(listener) => Some(listener),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
        Err(error) => return Err(error),
    };
    let stream = TcpStream::connect_timeout(&probe, TIMEOUT)?;
    let Some(listener) = listener else { return Ok(()) };
    let (sender, receiver) = mpsc::channel();
    // `accept` has no timeout; the thread ends with the process.
    thread::spawn(move || sender.send(listener.accept()));
    let (_, peer) =
        receiver.recv_timeout(TIMEOUT).map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if stream.local_addr()? == peer {
        return Ok(());
    }
    Err(io::Error::other(format!("a connection from {peer} arrived instead")))
}
