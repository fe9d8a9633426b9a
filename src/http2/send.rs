//! Sends the body of a message.

use std::{
    error::Error,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http_body::Body;

/// Copies a body to a stream, no faster than flow control allows.
#[derive(Debug)]
pub struct BodySender<B> {
    stream: SendStream<Bytes>,
    body: B,
    /// Data that waits for flow control, and whether it is the last.
    pending: Option<(Bytes, bool)>,
}

/// Why a body was not sent completely.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error(transparent)]
    Stream(#[from] h2::Error),
    /// The body failed, and the stream was reset here.
    #[error("the body ended early")]
    Body,
    #[error("the stream is closed for sending")]
    Closed,
}

impl<B> BodySender<B> {
    pub fn new(body: B, stream: SendStream<Bytes>) -> Self {
        Self { stream, body, pending: None }
    }
}

impl<B> Future for BodySender<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Error + 'static,
{
    type Output = Result<(), SendError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        loop {
            // Polled in each iteration, because this registers the waker for RST_STREAM.
            if let Poll::Ready(reason) = this.stream.poll_reset(cx)? {
                return Poll::Ready(Err(SendError::Stream(reason.into())));
            }
            if this.pending.is_some() {
                while this.stream.capacity() == 0 {
                    if ready!(this.stream.poll_capacity(cx)).transpose()?.is_none() {
                        return Poll::Ready(Err(SendError::Closed));
                    }
                }
                if let Some((data, last)) = this.pending.take() {
                    this.stream.send_data(data, last)?;
                    if last {
                        return Poll::Ready(Ok(()));
                    }
                }
            }
            // Wait for a frame before reserving window of the connection, which other streams may need.
            let frame = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => {
                    this.stream.send_reset(reason_of(&error));
                    return Poll::Ready(Err(SendError::Body));
                }
                None => {
                    this.stream.send_data(Bytes::new(), true)?;
                    return Poll::Ready(Ok(()));
                }
            };
            match frame.into_data() {
                Ok(data) if data.is_empty() && !this.body.is_end_stream() => {}
                Ok(data) => {
                    let last = this.body.is_end_stream();
                    // `h2` reserves capacity for the rest of the data once it has it.
                    this.stream.reserve_capacity(data.len().min(1));
                    if data.is_empty() {
                        this.stream.send_data(data, last)?;
                        return Poll::Ready(Ok(()));
                    }
                    this.pending = Some((data, last));
                }
                Err(frame) => {
                    if let Ok(trailers) = frame.into_trailers() {
                        this.stream.reserve_capacity(0);
                        this.stream.send_trailers(trailers)?;
                        return Poll::Ready(Ok(()));
                    }
                }
            }
        }
    }
}

/// The code to reset a stream with if its body failed: that of the failure, if it came by HTTP/2.
fn reason_of(error: &(dyn Error + 'static)) -> Reason {
    let mut error = Some(error);
    while let Some(this) = error {
        if let Some(reason) = this.downcast_ref::<h2::Error>().and_then(h2::Error::reason) {
            return if reason == Reason::NO_ERROR { Reason::CANCEL } else { reason };
        }
        error = this.source();
    }
    Reason::INTERNAL_ERROR
}
