//! A request's body as a connection to an endpoint sends it.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::pool::ResponseError;
use crate::http1;

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error(transparent)]
    Peer(#[from] h2::Error),
    #[error(transparent)]
    Response(#[from] ResponseError),
    #[error(transparent)]
    Client(#[from] http1::Error),
    /// A newer attempt reads the request's body.
    #[error("a newer attempt has taken over the request's body")]
    Superseded,
    /// A response that several clients read broke off.
    #[error("the response broke off")]
    Broken,
}

/// What is left of a request's body; `None`: there is none, or no more of it.
#[derive(Default)]
pub struct RequestBody(Option<Pin<Box<dyn Body<Data = Bytes, Error = BodyError>>>>);

impl RequestBody {
    /// A request without a body costs no allocation.
    pub const fn empty() -> Self {
        Self(None)
    }

    pub fn new(body: impl Body<Data = Bytes, Error = BodyError> + 'static) -> Self {
        Self(Some(Box::pin(body)))
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.0 {
            Some(body) => body.as_mut().poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or(SizeHint::with_exact(0), |body| body.size_hint())
    }
}

impl fmt::Debug for RequestBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestBody").field("size", &self.size_hint()).finish_non_exhaustive()
    }
}
