//! Shows by a connection that the rules work.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::Duration,
};

use super::PROBE_PORT;

const PATIENCE: Duration = Duration::from_secs(2);

/// Where probes go; only the families that this network namespace has.
pub(super) fn targets() -> Vec<SocketAddr> {
    let families = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
    let here = families.into_iter().filter(|ip| TcpListener::bind((*ip, 0)).is_ok());
    here.map(|ip| SocketAddr::new(ip, PROBE_PORT)).collect()
}

/// Opens a connection to where nobody listens and sees it arrive at the outbound port. Where the proxy runs already it
/// has to be the one that answers.
pub(super) fn arrives(probe: SocketAddr, outbound_port: u16) -> io::Result<()> {
    let listener = match TcpListener::bind((probe.ip(), outbound_port)) {
        Ok(listener) => Some(listener),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
        Err(error) => return Err(error),
    };
    let stream = TcpStream::connect_timeout(&probe, PATIENCE)?;
    let Some(listener) = listener else { return Ok(()) };
    let (tell, told) = mpsc::channel();
    // Accepting has no time limit of its own; the process ends soon, and the thread with it.
    thread::spawn(move || tell.send(listener.accept()));
    let (_, peer) = told.recv_timeout(PATIENCE).map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if stream.local_addr()? == peer {
        return Ok(());
    }
    Err(io::Error::other(format!("a connection of {peer} came instead")))
}
