//! A message's body as it is received.

use std::{
    cell::Cell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, RecvStream};
use http::{HeaderMap, header::CONTENT_LENGTH};
use http_body::{Frame, SizeHint};

use super::{fields, wire::Wire};

/// The body of a message, from a stream of a connection.
#[derive(Debug)]
pub struct Body {
    stream: RecvStream,
    /// How much of it is still to come, where the head tells.
    left: Option<u64>,
    data_ended: bool,
    message: Message,
}

/// What it is the body of.
#[derive(Clone, Debug)]
enum Message {
    /// Noted: its data or its trailers are malformed, which is an error of its stream.
    Request(Rc<Cell<bool>>),
    /// Its connection tells whether `h2` may have left trailers out.
    Response(Rc<Wire>),
}

impl Body {
    /// `malformed` is set where the request turns out to be.
    pub fn of_request(stream: RecvStream, head: &HeaderMap, malformed: Rc<Cell<bool>>) -> Self {
        Self::new(stream, head, Message::Request(malformed))
    }

    pub fn of_response(stream: RecvStream, head: &HeaderMap, wire: &Rc<Wire>) -> Self {
        Self::new(stream, head, Message::Response(Rc::clone(wire)))
    }

    fn new(stream: RecvStream, head: &HeaderMap, message: Message) -> Self {
        // `h2` has compared several, and compares with what comes.
        let told = head.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let left = if stream.is_end_stream() { Some(0) } else { told };
        Self { stream, left, data_ended: false, message }
    }

    /// What the end of a stream by RST_STREAM means for its body.
    fn broken(&self, error: h2::Error) -> Option<Result<Frame<Bytes>, h2::Error>> {
        if let Message::Request(malformed) = &self.message {
            // The library has reset the stream for what the client sent on it.
            malformed.set(
                error.is_library() && error.is_reset() && error.reason() == Some(Reason::PROTOCOL_ERROR),
            );
            return Some(Err(error));
        }
        // RFC 9113 §8.1: a server that has answered in full asks by NO_ERROR not to be sent the rest of the request. Some ask by
        // another code.
        let is_whole = match self.left {
            Some(left) => left == 0,
            None => error.reason() == Some(Reason::NO_ERROR),
        };
        (!is_whole).then_some(Err(error))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if !self.data_ended {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(bytes)) => {
                    // Cannot fail: so much has just been received.
                    let _ = self.stream.flow_control().release_capacity(bytes.len());
                    self.left = self.left.map(|left| left.saturating_sub(bytes.len() as u64));
                    return Poll::Ready(Some(Ok(Frame::data(bytes))));
                }
                Some(Err(error)) => return Poll::Ready(self.broken(error)),
                None => self.data_ended = true,
            }
        }
        match ready!(self.stream.poll_trailers(cx)) {
            Ok(None) => Poll::Ready(None),
            Ok(Some(trailers)) => {
                let is_valid = match &self.message {
                    Message::Request(malformed) => {
                        malformed.set(!fields::are_valid(&trailers));
                        !malformed.get()
                    }
                    Message::Response(wire) => !wire.may_lack_fields(self.stream.stream_id().into()),
                };
                let trailers =
                    if is_valid { Ok(Frame::trailers(trailers)) } else { Err(Reason::PROTOCOL_ERROR.into()) };
                Poll::Ready(Some(trailers))
            }
            Err(error) => Poll::Ready(self.broken(error)),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
