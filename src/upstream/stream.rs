//! A connection to an endpoint: plain, or TLS.

use std::{
    future::poll_fn,
    io::{self, Read},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::client::TlsStream;

use crate::net::io::SharedTcp;

/// What HTTP, or bytes, run over.
#[derive(Debug)]
pub enum UpstreamIo {
    Plain(SharedTcp),
    Tls(Box<TlsStream<SharedTcp>>),
}

/// What an idle connection shows when it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// Open, and nothing has come.
    Quiet,
    /// The endpoint has closed it.
    Closed,
    /// Bytes have come although no request is in flight. Whoever sent a request on it now could get them as its response.
    Unsolicited,
}

impl Idle {
    /// The first of the bytes that tell what has come: up to the status code.
    const ENOUGH: usize = "HTTP/1.1 408".len();

    /// Of a connection on which these bytes have come, all or the first [`Self::ENOUGH`] of them.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        match bytes.get(..Self::ENOUGH) {
            _ if bytes.is_empty() => Self::Quiet,
            // Some servers announce so that they close an idle connection (RFC 9110 §15.5.9).
            Some(start) if start.starts_with(b"HTTP/1.") && start.ends_with(b" 408") => Self::Closed,
            _ => Self::Unsolicited,
        }
    }
}

impl UpstreamIo {
    /// The TCP stream that it runs over.
    pub fn tcp(&self) -> &SharedTcp {
        match self {
            Self::Plain(tcp) => tcp,
            Self::Tls(tls) => tls.get_ref().0,
        }
    }

    /// Looks at an idle connection, with one system call where nothing has come. Of TLS it reads what is for TLS itself,
    /// as tickets are.
    pub fn look(&mut self) -> Idle {
        let mut start = [0; Idle::ENOUGH];
        match self {
            Self::Plain(tcp) => match tcp.peek_now(&mut start) {
                Ok(0) => Idle::Closed,
                Ok(count) => Idle::of_bytes(&start[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Idle::Quiet,
                Err(_) => Idle::Closed,
            },
            Self::Tls(tls) => look_at_tls(tls),
        }
    }

    /// Waits until the other side has said something, or left. Tickets and the like are not said.
    pub async fn readable(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(tcp) => tcp.readable().await,
            Self::Tls(tls) => poll_fn(|cx| Pin::new(&mut **tls).poll_fill_buf(cx).map_ok(|_| ())).await,
        }
    }
}

fn look_at_tls(tls: &mut TlsStream<SharedTcp>) -> Idle {
    let (tcp, session) = tls.get_mut();
    loop {
        match session.read_tls(&mut tcp.reader_now()) {
            Ok(0) => return Idle::Closed,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Idle::Quiet,
            Err(_) => return Idle::Closed,
            Ok(_) => {}
        }
        match session.process_new_packets() {
            Ok(state) if state.plaintext_bytes_to_read() > 0 => {
                let mut start = [0; Idle::ENOUGH];
                let count = session.reader().read(&mut start).unwrap_or(0);
                return Idle::of_bytes(&start[..count]);
            }
            Ok(state) if state.peer_has_closed() => return Idle::Closed,
            Ok(_) => {}
            Err(_) => return Idle::Closed,
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
