//! A request's body that was read before: to be queued, or from the store.

use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};

use super::ClientBody;
use crate::upstream::BodyError;

/// What was read, and then the rest.
#[derive(Debug)]
pub struct BufferedBody {
    read: Bytes,
    /// `None`: that was all.
    rest: Option<ClientBody>,
}

/// A body as far as it was read.
#[derive(Debug)]
pub enum ReadBody {
    Whole(Bytes),
    /// It is larger than the limit: what was read, and the rest.
    TooLarge(ClientBody),
    /// There is no memory for it: what was read, and the rest.
    NoMemory(ClientBody),
}

impl BufferedBody {
    pub fn whole(bytes: Bytes) -> ClientBody {
        ClientBody::Buffered(Box::new(Self { read: bytes, rest: None }))
    }

    /// Reads a body up to `limit`. Trailers are dropped: what is stored has none. `grow` is called for each part, with its
    /// length and that of all parts; false: there is no memory for it.
    pub async fn read(
        mut body: ClientBody,
        limit: u64,
        mut grow: impl AsyncFnMut(usize, usize) -> bool,
    ) -> Result<ReadBody, BodyError> {
        let mut read = BytesMut::new();
        let rest = |read: BytesMut, body| {
            ClientBody::Buffered(Box::new(Self { read: read.freeze(), rest: Some(body) }))
        };
        while let Some(frame) = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await
        {
            let Ok(data) = frame?.into_data() else { continue };
            read.extend_from_slice(&data);
            if read.len() as u64 > limit {
                return Ok(ReadBody::TooLarge(rest(read, body)));
            }
            if !grow(data.len(), read.len()).await {
                return Ok(ReadBody::NoMemory(rest(read, body)));
            }
        }
        Ok(ReadBody::Whole(read.freeze()))
    }

    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if !self.read.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.read)))));
        }
        match &mut self.rest {
            Some(rest) => std::pin::Pin::new(rest).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.read.is_empty() && self.rest.as_ref().is_none_or(ClientBody::is_end_stream)
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        let read = self.read.len() as u64;
        let rest = self.rest.as_ref().map_or(Some(0), |rest| rest.size_hint().exact());
        rest.map_or_else(SizeHint::default, |rest| SizeHint::with_exact(read + rest))
    }
}
