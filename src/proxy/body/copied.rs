//! A request's body of which a copy is kept while it is sent.

use std::{
    cell::RefCell,
    mem::take,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};

use super::ClientBody;
use crate::upstream::BodyError;

/// The body, and what was read of it.
#[derive(Debug)]
pub struct CopiedBody {
    body: ClientBody,
    copy: Rc<RefCell<BodyCopy>>,
}

/// The copy of a body.
#[derive(Debug)]
pub enum BodyCopy {
    /// As far as it was read, up to `limit` bytes.
    Reading {
        read: BytesMut,
        limit: u64,
    },
    Whole(Bytes),
    TooLarge,
}

impl CopiedBody {
    /// Copies a body as it is read, without its trailers.
    pub fn split(body: ClientBody, limit: u64) -> (ClientBody, Rc<RefCell<BodyCopy>>) {
        if body.is_end_stream() {
            return (body, Rc::new(RefCell::new(BodyCopy::Whole(Bytes::new()))));
        }
        let is_too_large = body.size_hint().lower() > limit;
        let copy = if is_too_large {
            BodyCopy::TooLarge
        } else {
            BodyCopy::Reading { read: BytesMut::new(), limit }
        };
        let copy = Rc::new(RefCell::new(copy));
        if is_too_large {
            return (body, copy);
        }
        (ClientBody::Copied(Box::new(Self { body, copy: Rc::clone(&copy) })), copy)
    }

    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let mut copy = self.copy.borrow_mut();
        if let BodyCopy::Reading { read, limit } = &mut *copy {
            let data = match &frame {
                Some(Ok(frame)) => frame.data_ref(),
                _ => None,
            };
            let length = read.len() as u64 + data.map_or(0, |data| data.len() as u64);
            if length > *limit {
                *copy = BodyCopy::TooLarge;
            } else {
                read.extend_from_slice(data.map_or(&[], |data| data));
                let ends = match &frame {
                    None => true,
                    Some(Ok(_)) => self.body.is_end_stream(),
                    Some(Err(_)) => false,
                };
                if ends {
                    *copy = BodyCopy::Whole(take(read).freeze());
                }
            }
        }
        Poll::Ready(frame)
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
