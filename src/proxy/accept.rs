//! Listeners: binding addresses and accepting connections.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    time::Duration,
};

use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

use super::connection;
use crate::{
    config::ListenAddr,
    descriptors::{self, DescriptorPurpose},
    model::Side,
    proxy::worker::Worker,
    telemetry::metrics::PendingGuard,
};

/// The length of the kernel's queue of connections that the process has not accepted.
pub const BACKLOG: u16 = 4096;
/// The pause after an error such as a lack of file descriptors: trying again at once would only use CPU.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long a closing listener waits for connections whose TCP handshake is in progress.
const LAST_HANDSHAKES: Duration = Duration::from_millis(20);
/// How many errors a closing listener tolerates.
const MAX_ERRORS: u32 = 20;

/// A listener that could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} ({what}): {source}")]
pub struct ListenError {
    what: String,
    address: ListenAddr,
    source: io::Error,
}

/// A bound address. `localhost` is two sockets.
#[derive(Debug)]
pub struct Listener {
    pub side: Side,
    sockets: Vec<std::net::TcpListener>,
}

impl Listener {
    pub fn bind(side: Side, listen: &ListenAddr) -> Result<Self, ListenError> {
        let sockets = bind(listen).map_err(|source| {
            let what = match &side {
                Side::Inbound => "[inbound] listen".to_owned(),
                Side::Outbound => "[outbound] listen".to_owned(),
                Side::Upstream(name) => format!("[[upstream]] {name}, listen"),
            };
            ListenError { what, address: listen.clone(), source }
        })?;
        Ok(Self { side, sockets })
    }

    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sockets.iter().filter_map(|socket| socket.local_addr().ok()).collect()
    }

    /// Registers the sockets with the runtime of the calling thread.
    pub fn into_tokio(self) -> io::Result<Vec<(Side, TcpListener)>> {
        let side = self.side;
        self.sockets.into_iter().map(|socket| Ok((side.clone(), TcpListener::from_std(socket)?))).collect()
    }
}

/// Binds an address; `localhost` in both address families, to the same port, if the machine has both.
pub fn bind(listen: &ListenAddr) -> io::Result<Vec<std::net::TcpListener>> {
    let port = listen.0.port;
    if let Some(address) = listen.0.socket_addr() {
        return Ok(vec![bind_one(address)?]);
    }
    let v4 = bind_one((Ipv4Addr::LOCALHOST, port).into());
    let port =
        v4.as_ref().ok().and_then(|socket| socket.local_addr().ok()).map_or(port, |bound| bound.port());
    let v6 = bind_one((Ipv6Addr::LOCALHOST, port).into());
    match (v4, v6) {
        (Ok(v4), Ok(v6)) => Ok(vec![v4, v6]),
        // If another process has the port in one family, clients would reach it by some resolutions of `localhost`.
        (Ok(_), Err(error)) if error.kind() == io::ErrorKind::AddrInUse && listen.0.port != 0 => Err(error),
        (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(vec![one]),
        (Err(error), Err(_)) => Err(error),
    }
}

/// Binds one address. Where the kernel has no IPv6, `[::]` becomes `0.0.0.0`.
fn bind_one(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let bound = bind_exactly(address);
    match &bound {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && lacks_ipv6(error) => {
            let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
            tracing::warn!("this machine has no IPv6 ({error}): listening on {v4} in place of {address}");
            bind_exactly(v4)
        }
        _ => bound,
    }
}

fn lacks_ipv6(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL))
}

fn bind_exactly(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        // `[::]` means both address families, whatever the system's default.
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(i32::from(BACKLOG))?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Accepts until dropped. An error of one connection, or a lack of resources, does not end the loop; an error of the
/// listener itself does, and is returned.
pub async fn accept_loop(
    listener: &TcpListener,
    side: &Side,
    deliver: &mut impl FnMut(TcpStream, SocketAddr, &Side),
) -> io::Error {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => match below_reserve(stream).await {
                Ok(stream) => deliver(stream, peer, side),
                Err(error) => tracing::warn!(%error, %peer, "a connection was closed before it was served"),
            },
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) if is_of_listener(&error) => return error,
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Returns the connection; if its descriptor belongs to the reserve, once a lower one is free. Until then nothing more
/// is accepted, and clients wait in the kernel's backlog.
async fn below_reserve(stream: TcpStream) -> io::Result<TcpStream> {
    if DescriptorPurpose::Accept.allows(&stream) {
        return Ok(stream);
    }
    tracing::warn!(
        cause = "local_resource",
        limit = descriptors::limit(),
        "connections are not accepted: no file descriptor is left (raise the hard `nofile` limit)"
    );
    let stream = stream.into_std()?;
    loop {
        tokio::time::sleep(ACCEPT_PAUSE).await;
        if let Ok(lower) = stream.try_clone()
            && DescriptorPurpose::Accept.allows(&lower)
        {
            return TcpStream::from_std(lower);
        }
    }
}

/// Accepts all connections in the kernel's queue and closes the listener.
///
/// Calls `accept` on the socket itself: tokio's listener does so only after an event, which it may not have polled.
///
/// # Errors
///
/// If the socket cannot be used without the runtime.
pub async fn accept_rest(
    listener: TcpListener,
    side: &Side,
    deliver: &mut impl FnMut(TcpStream, SocketAddr, &Side),
) -> io::Result<()> {
    let socket = listener.into_std()?;
    let mut waited_for_handshakes = false;
    let mut errors = 0;
    loop {
        match socket.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(true)?;
                deliver(TcpStream::from_std(stream)?, peer, side);
            }
            Err(error) if is_of_one_connection(&error) || error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if std::mem::replace(&mut waited_for_handshakes, true) {
                    return Ok(());
                }
                tokio::time::sleep(LAST_HANDSHAKES).await;
            }
            Err(error) if is_of_listener(&error) || errors >= MAX_ERRORS => return Err(error),
            Err(error) => {
                errors += 1;
                tracing::warn!(%error, "cannot accept the last connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Whether the listener itself is broken, so that waiting does not help.
fn is_of_listener(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::INVAL | Errno::BADF | Errno::NOTSOCK))
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Serves a connection in its own task, which contains a panic.
pub fn serve(worker: &Rc<Worker>, stream: TcpStream, peer: SocketAddr, side: Side, coming: PendingGuard) {
    let worker = Rc::clone(worker);
    tokio::task::spawn_local(connection::run(worker, stream, peer, side, coming));
}
