//! Opening a connection to an endpoint.

use std::{io, net::SocketAddr, rc::Rc, time::Duration};

use tokio::net::TcpStream;

use crate::proxy::io::SharedTcp;

/// Why there is no connection.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{address} refused the connection ({source})")]
    Refused { address: SocketAddr, source: Rc<io::Error> },
    #[error("{address} did not accept a connection within {limit:?}")]
    Timeout { address: SocketAddr, limit: Duration },
    #[error("{limit} connections to this upstream are open already (`limits.max_connections`)")]
    Limit { limit: u32 },
    #[error("HTTP/2 handshake with {address} failed ({reason})")]
    Handshake { address: SocketAddr, reason: String },
}

/// Opens a TCP connection within `limit`.
pub async fn connect(address: SocketAddr, limit: Option<Duration>) -> Result<SharedTcp, ConnectError> {
    let connecting = TcpStream::connect(address);
    let connected = match limit {
        Some(limit) => tokio::time::timeout(limit, connecting)
            .await
            .map_err(|_| ConnectError::Timeout { address, limit })?,
        None => connecting.await,
    };
    connected.map(SharedTcp::new).map_err(|source| ConnectError::Refused { address, source: Rc::new(source) })
}
