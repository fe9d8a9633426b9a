//! The body of a request, as whoever sends it on reads it.

use std::{
    cell::RefCell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use super::link::Link;
use crate::http1::Error;

/// `None`: nothing of it comes any more. Whoever drops it before has no use for the rest.
#[derive(Debug, Default)]
pub struct Body(Option<Rc<RefCell<Link>>>);

impl Body {
    pub(super) fn of(link: &Rc<RefCell<Link>>) -> Self {
        Self(Some(Rc::clone(link)))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let Some(link) = &self.0 else { return Poll::Ready(None) };
        let mut link = link.borrow_mut();
        let frame = ready!(link.poll_body(cx));
        let over = link.is_body_over();
        drop(link);
        if over {
            // What comes from here on is not of this request.
            self.0 = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let length = self.0.as_ref().map_or(Some(0), |link| link.borrow().length());
        length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if let Some(link) = self.0.take() {
            link.borrow_mut().let_body_go();
        }
    }
}
