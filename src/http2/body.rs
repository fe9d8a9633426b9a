//! The body of a received message.

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

use super::{fields, wire_state::WireState};

/// The body of a message, read from an HTTP/2 stream.
#[derive(Debug)]
pub struct StreamBody {
    stream: RecvStream,
    /// The remaining length, if the head announces one.
    remaining: Option<u64>,
    data_ended: bool,
    message: BodyOf,
}

/// The message that the body belongs to.
#[derive(Clone, Debug)]
enum BodyOf {
    /// The flag is set if its data or trailers are malformed, which is an error of its stream.
    Request(Rc<Cell<bool>>),
    /// Its connection knows whether `h2` may have dropped trailers.
    Response(Rc<WireState>),
}

impl StreamBody {
    /// `malformed` is set if the request turns out to be malformed.
    pub fn of_request(stream: RecvStream, head: &HeaderMap, malformed: Rc<Cell<bool>>) -> Self {
        Self::new(stream, head, BodyOf::Request(malformed))
    }

    pub fn of_response(stream: RecvStream, head: &HeaderMap, wire: &Rc<WireState>) -> Self {
        Self::new(stream, head, BodyOf::Response(Rc::clone(wire)))
    }

    fn new(stream: RecvStream, head: &HeaderMap, message: BodyOf) -> Self {
        // `h2` has compared repeated values, and compares the length with the data.
        let announced = head.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let remaining = if stream.is_end_stream() { Some(0) } else { announced };
        Self { stream, remaining, data_ended: false, message }
    }

    /// What RST_STREAM means for the body.
    fn on_stream_error(&self, error: h2::Error) -> Option<Result<Frame<Bytes>, h2::Error>> {
        if let BodyOf::Request(malformed) = &self.message {
            // `h2` has reset the stream because of what the client sent on it.
            malformed.set(
                error.is_library() && error.is_reset() && error.reason() == Some(Reason::PROTOCOL_ERROR),
            );
            return Some(Err(error));
        }
        // RFC 9113 §8.1: with NO_ERROR a server that has responded completely asks for the rest of the request not to
        // be sent. Some servers use another code.
        let is_complete = match self.remaining {
            Some(remaining) => remaining == 0,
            None => error.reason() == Some(Reason::NO_ERROR),
        };
        (!is_complete).then_some(Err(error))
    }
}

impl http_body::Body for StreamBody {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if !self.data_ended {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(bytes)) => {
                    // Cannot fail: this many bytes were just received.
                    let _ = self.stream.flow_control().release_capacity(bytes.len());
                    self.remaining =
                        self.remaining.map(|remaining| remaining.saturating_sub(bytes.len() as u64));
                    return Poll::Ready(Some(Ok(Frame::data(bytes))));
                }
                Some(Err(error)) => return Poll::Ready(self.on_stream_error(error)),
                None => self.data_ended = true,
            }
        }
        match ready!(self.stream.poll_trailers(cx)) {
            Ok(None) => Poll::Ready(None),
            Ok(Some(trailers)) => {
                let is_valid = match &self.message {
                    BodyOf::Request(malformed) => {
                        malformed.set(!fields::are_valid(&trailers));
                        !malformed.get()
                    }
                    BodyOf::Response(wire) => !wire.may_lack_fields(self.stream.stream_id().into()),
                };
                let trailers =
                    if is_valid { Ok(Frame::trailers(trailers)) } else { Err(Reason::PROTOCOL_ERROR.into()) };
                Poll::Ready(Some(trailers))
            }
            Err(error) => Poll::Ready(self.on_stream_error(error)),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.remaining.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
