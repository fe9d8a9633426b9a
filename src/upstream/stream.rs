//! The byte stream of a connection to an endpoint: plain TCP or TLS.

use std::{
    future::poll_fn,
    io::{self, Read},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::client::TlsStream;

use crate::net::io::SharedTcp;

/// The transport under HTTP or a byte stream.
#[derive(Debug)]
pub enum UpstreamIo {
    Plain(SharedTcp),
    Tls(Box<TlsStream<SharedTcp>>),
}

/// The state of an idle connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdleState {
    /// Open, and nothing has been received.
    Quiet,
    /// The endpoint has closed it.
    Closed,
    /// Bytes were received although no request is in flight. A request sent on it now could take them for its
    /// response.
    Unsolicited,
}

impl IdleState {
    /// How many of the first bytes classify what was received: up to the status code.
    const PREFIX_LENGTH: usize = "HTTP/1.1 408".len();

    /// Classifies by the bytes received on an idle connection: all, or at least the first [`Self::PREFIX_LENGTH`] of
    /// them.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        match bytes.get(..Self::PREFIX_LENGTH) {
            _ if bytes.is_empty() => Self::Quiet,
            // Some servers send a 408 before they close an idle connection (RFC 9110 §15.5.9).
            Some(start) if start.starts_with(b"HTTP/1.") && start.ends_with(b" 408") => Self::Closed,
            _ => Self::Unsolicited,
        }
    }
}

impl UpstreamIo {
    /// The underlying TCP stream.
    pub fn tcp(&self) -> &SharedTcp {
        match self {
            Self::Plain(tcp) => tcp,
            Self::Tls(tls) => tls.get_ref().0,
        }
    }

    /// Checks an idle connection, with one system call if nothing was received. On TLS this processes records that
    /// carry no application data, such as session tickets.
    pub fn check_idle(&mut self) -> IdleState {
        let mut start = [0; IdleState::PREFIX_LENGTH];
        match self {
            Self::Plain(tcp) => match tcp.peek_now(&mut start) {
                Ok(0) => IdleState::Closed,
                Ok(count) => IdleState::of_bytes(&start[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => IdleState::Quiet,
                Err(_) => IdleState::Closed,
            },
            Self::Tls(tls) => check_idle_tls(tls),
        }
    }

    /// Waits until the peer has sent application data or closed. Session tickets and the like do not count.
    pub async fn readable(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(tcp) => tcp.readable().await,
            Self::Tls(tls) => poll_fn(|cx| Pin::new(&mut **tls).poll_fill_buf(cx).map_ok(|_| ())).await,
        }
    }
}

fn check_idle_tls(tls: &mut TlsStream<SharedTcp>) -> IdleState {
    let (tcp, session) = tls.get_mut();
    loop {
        match session.read_tls(&mut tcp.reader_now()) {
            Ok(0) => return IdleState::Closed,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return IdleState::Quiet,
            Err(_) => return IdleState::Closed,
            Ok(_) => {}
        }
        match session.process_new_packets() {
            Ok(state) if state.plaintext_bytes_to_read() > 0 => {
                let mut start = [0; IdleState::PREFIX_LENGTH];
                let count = session.reader().read(&mut start).unwrap_or(0);
                return IdleState::of_bytes(&start[..count]);
            }
            Ok(state) if state.peer_has_closed() => return IdleState::Closed,
            Ok(_) => {}
            Err(_) => return IdleState::Closed,
        }
    }
}

impl AsyncRead for UpstreamIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(&mut **tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for UpstreamIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Self::Tls(tls) => Pin::new(&mut **tls).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write_vectored(cx, bufs),
            Self::Tls(tls) => Pin::new(&mut **tls).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(tcp) => tcp.is_write_vectored(),
            Self::Tls(tls) => tls.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tls(tls) => Pin::new(&mut **tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(&mut **tls).poll_shutdown(cx),
        }
    }
}
