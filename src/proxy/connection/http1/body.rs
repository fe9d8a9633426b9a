//! The body of a client's request, for the code that forwards it.

use std::{
    cell::RefCell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use super::server_connection::ServerConnection;
use crate::http1::Error;

/// `None`: it has ended. Dropped earlier, the rest of the body is discarded.
#[derive(Debug, Default)]
pub struct Body(Option<Rc<RefCell<ServerConnection>>>);

impl Body {
    pub(super) fn of(connection: &Rc<RefCell<ServerConnection>>) -> Self {
        Self(Some(Rc::clone(connection)))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let Some(connection) = &self.0 else { return Poll::Ready(None) };
        let mut connection = connection.borrow_mut();
        let frame = ready!(connection.poll_body(cx));
        let finished = connection.is_body_finished();
        drop(connection);
        if finished {
            // The following bytes belong to another request.
            self.0 = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let length = self.0.as_ref().map_or(Some(0), |connection| connection.borrow().body_length());
        length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            connection.borrow_mut().discard_body();
        }
    }
}
