//! A response's body on its way to the caller, and what its call holds until it has ended.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;

use super::Sent;
use crate::{
    cause::GrpcCode,
    http1::{
        self,
        framing::{FramingError, is_too_large},
    },
    proxy::{grpc::GrpcEnd, progress::Progress},
    telemetry::record::End,
    upstream::{BodyError, Lease, guards::Place, local::InFlight, pool::AnswerError},
};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// A response's body on its way to the caller.
#[derive(Debug)]
pub enum ResponseBody {
    Empty,
    Whole(Option<Bytes>),
    Streaming(Box<Streaming>),
}

/// An upstream's body. Holds the connection until the body has ended.
#[derive(Debug)]
pub struct Streaming {
    /// What it comes by.
    lease: Option<Lease>,
    progress: Rc<Progress>,
    held: Held,
}

/// What a call holds until its response has ended.
#[derive(Debug)]
pub struct Held {
    /// Counts it at its endpoint.
    pub in_flight: InFlight,
    /// Whether its try's request was sent to the end.
    pub sent: Sent,
    /// Its place among the requests in flight.
    pub place: Option<Place>,
    /// Who is to be told of the gRPC status that comes in the trailers.
    pub grpc: Option<Box<GrpcEnd>>,
}

impl ResponseBody {
    pub fn whole(bytes: impl Into<Bytes>) -> Self {
        Self::Whole(Some(bytes.into()))
    }

    /// A body that still comes. A connection that is through with its response goes back to its pool at once.
    pub fn streaming(lease: Lease, held: Held, progress: Rc<Progress>) -> Self {
        if lease.is_end_stream() {
            lease.finished(held.sent.is_whole(), progress.last_moved());
            return Self::Empty;
        }
        Self::Streaming(Box::new(Streaming { lease: Some(lease), progress, held }))
    }
}

impl Streaming {
    /// Tells of a gRPC call whose outcome shows only now. One that its caller leaves is told of by nobody.
    fn grpc_goes_on(&mut self, frame: &Option<Result<Frame<Bytes>, AnswerError>>) {
        let Some(grpc) = self.held.grpc.take() else { return };
        match frame {
            Some(Ok(frame)) => match frame.trailers_ref() {
                Some(trailers) => grpc.ended(trailers),
                None => self.held.grpc = Some(grpc),
            },
            Some(Err(error)) => grpc.broke(error, self.lease.as_ref()),
            None => grpc.ended(&HeaderMap::new()),
        }
    }

    /// Trailers that are too large to be passed on are an error of this response, never cut.
    fn limited(&self, frame: Frame<Bytes>) -> Result<Frame<Bytes>, AnswerError> {
        if !frame.trailers_ref().is_some_and(is_too_large) {
            return Ok(frame);
        }
        let error = http1::Error::from(FramingError::TooManyTrailers);
        if self.progress.note(|record| record.grpc) == Some(true) {
            // As gRPC's own libraries say it: RESOURCE_EXHAUSTED.
            let status = HeaderValue::from(u16::from(GrpcCode::ResourceExhausted as u8));
            let message = HeaderValue::from_static("the trailers of the response are larger than 64 KiB");
            return Ok(Frame::trailers(
                [(GRPC_STATUS, status), (GRPC_MESSAGE, message)].into_iter().collect(),
            ));
        }
        Err(error.into())
    }

    fn finished(&mut self, now: Instant) {
        self.progress.done(End::Complete, now);
        if let Some(grpc) = self.held.grpc.take() {
            grpc.ended(&HeaderMap::new());
        }
        if let Some(lease) = self.lease.take() {
            // An answer that came before its request was read to the end leaves the connection in between.
            lease.finished(self.held.sent.is_whole(), now);
        }
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        if !self.progress.is_done() {
            let now = Instant::now();
            self.progress.done(self.progress.left(now), now);
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = match &mut *self {
            Self::Empty => return Poll::Ready(None),
            Self::Whole(bytes) => return Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Streaming(streaming) => streaming,
        };
        let Some(lease) = &mut this.lease else { return Poll::Ready(None) };
        let frame = match ready!(lease.poll_frame(cx)) {
            Some(Ok(frame)) => Some(this.limited(frame)),
            frame => frame,
        };
        let Some(lease) = &this.lease else { return Poll::Ready(None) };
        let over = lease.is_end_stream();
        let now = this.progress.moved();
        if let Some(Ok(frame)) = &frame {
            if let Some(trailers) = frame.trailers_ref() {
                this.progress.note(|record| record.trailers(trailers));
            } else if let Some(data) = frame.data_ref() {
                this.progress.note(|record| record.bytes_out += data.len() as u64);
            }
        }
        if this.held.grpc.is_some() {
            this.grpc_goes_on(&frame);
        }
        match &frame {
            // Behind trailers nobody asks for more.
            Some(Ok(frame)) if frame.is_trailers() || over => this.finished(now),
            Some(Ok(_)) => {}
            Some(Err(_)) => {
                this.lease = None;
                this.progress.done(End::Broken, now);
            }
            None => this.finished(now),
        }
        Poll::Ready(frame.map(|frame| frame.map_err(BodyError::from)))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Whole(bytes) => bytes.is_none(),
            Self::Streaming(streaming) => streaming.lease.as_ref().is_none_or(Lease::is_end_stream),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Streaming(streaming) => {
                let length = streaming.lease.as_ref().map_or(Some(0), Lease::length);
                length.map_or_else(SizeHint::default, SizeHint::with_exact)
            }
        }
    }
}
