//! A connection that notes whether the peer has said anything.
//!
//! A pooled connection that ends without a word was closed just as a request was sent; one that breaks off in the middle
//! of its answer has failed. hyper reports both in the same way. It lies around what hyper reads, so that what TLS says
//! for itself is no word.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::proxy::io::writes_pass_through;

/// Whether anything has come since it was last asked to listen. `Send`, as an upgraded connection must be.
#[derive(Clone, Debug, Default)]
pub struct Ear(Arc<AtomicBool>);

impl Ear {
    /// From here on it listens.
    pub fn listen(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    pub fn heard(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A stream with an ear at it.
#[derive(Debug)]
pub struct Heard<S> {
    stream: S,
    ear: Ear,
}

impl<S> Heard<S> {
    pub fn new(stream: S, ear: Ear) -> Self {
        Self { stream, ear }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Heard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.ear.0.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

writes_pass_through!(Heard);
