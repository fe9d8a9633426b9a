//! A response's body on its way to the client, and the resources that its request holds until it has ended.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;

use super::UploadStatus;
use crate::{
    cache::fill::FillReader,
    cause::GrpcCode,
    http1::{
        self,
        framing::{FramingError, is_trailer_section_too_large},
    },
    proxy::{grpc::GrpcReporter, progress::Progress},
    telemetry::record::RequestEnd,
    upstream::{BodyError, Lease, local::InFlight, policy_state::RequestPermit, pool::ResponseError},
};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// A response's body on its way to the client.
#[derive(Debug)]
pub enum ResponseBody {
    Empty,
    Whole(Option<Bytes>),
    Streaming(Box<StreamingBody>),
    /// A body that the cache reads, and maybe other clients.
    Shared(Box<SharedBody>),
}

/// One client's view of a body that is read by the cache.
#[derive(Debug)]
pub struct SharedBody {
    reader: FillReader,
    /// Bytes that are left, where the head announces them.
    left: Option<u64>,
    progress: Rc<Progress>,
    ended: bool,
}

/// An upstream's body. Holds the upstream connection until the body has ended.
#[derive(Debug)]
pub struct StreamingBody {
    /// The upstream connection.
    lease: Option<Lease>,
    progress: Rc<Progress>,
    resources: RequestResources,
}

/// The resources that a request holds until its response has ended.
#[derive(Debug)]
pub struct RequestResources {
    /// Counts the request at its endpoint.
    pub in_flight: InFlight,
    /// Whether the attempt has sent its whole request.
    pub upload: UploadStatus,
    /// The permit for a request in flight.
    pub permit: Option<RequestPermit>,
    /// Reports the gRPC status in the trailers.
    pub grpc: Option<Box<GrpcReporter>>,
}

impl ResponseBody {
    pub fn whole(bytes: impl Into<Bytes>) -> Self {
        Self::Whole(Some(bytes.into()))
    }

    /// A body that is streamed. A connection whose response has already ended returns to its pool at once.
    pub fn streaming(lease: Lease, held: RequestResources, progress: Rc<Progress>) -> Self {
        if lease.is_end_stream() {
            lease.release(held.upload.is_complete(), progress.last_moved());
            return Self::Empty;
        }
        Self::Streaming(Box::new(StreamingBody { lease: Some(lease), progress, resources: held }))
    }
}

impl ResponseBody {
    /// A body that others may read too.
    pub fn shared(reader: FillReader, length: Option<u64>, progress: Rc<Progress>) -> Self {
        Self::Shared(Box::new(SharedBody { reader, left: length, progress, ended: false }))
    }
}

impl SharedBody {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let part = ready!(self.reader.poll_part(cx));
        let now = self.progress.moved();
        match part {
            Some(Ok(data)) => {
                let length = data.len() as u64;
                self.left = self.left.map(|left| left.saturating_sub(length));
                // The request that fetches counts what it reads from the upstream.
                self.progress.with_record(|record| {
                    if record.attempts.count() == 0 {
                        record.bytes_out += length;
                    }
                });
                if self.reader.is_at_end() {
                    self.end(RequestEnd::Complete, now);
                }
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Some(Err(_)) => {
                self.end(RequestEnd::Broken, now);
                Poll::Ready(Some(Err(BodyError::Broken)))
            }
            None => {
                self.end(RequestEnd::Complete, now);
                Poll::Ready(None)
            }
        }
    }

    fn end(&mut self, end: RequestEnd, now: Instant) {
        self.ended = true;
        self.progress.done(end, now);
    }
}

impl Drop for SharedBody {
    fn drop(&mut self) {
        if !self.ended && !self.progress.is_done() {
            let now = Instant::now();
            self.progress.done(self.progress.end_when_dropped(now), now);
        }
    }
}

impl StreamingBody {
    /// Reports the outcome of a gRPC request at its end. A request that its client cancels is not reported.
    fn report_grpc_end(&mut self, frame: &Option<Result<Frame<Bytes>, ResponseError>>) {
        let Some(grpc) = self.resources.grpc.take() else { return };
        match frame {
            Some(Ok(frame)) => match frame.trailers_ref() {
                Some(trailers) => grpc.report_trailers(trailers),
                None => self.resources.grpc = Some(grpc),
            },
            Some(Err(error)) => grpc.report_reset(error, self.lease.as_ref()),
            None => grpc.report_trailers(&HeaderMap::new()),
        }
    }

    /// Trailers that are too large to be forwarded are an error of this response; they are never truncated.
    fn check_trailers(&self, frame: Frame<Bytes>) -> Result<Frame<Bytes>, ResponseError> {
        if !frame.trailers_ref().is_some_and(is_trailer_section_too_large) {
            return Ok(frame);
        }
        let error = http1::Error::from(FramingError::TooManyTrailers);
        if self.progress.with_record(|record| record.grpc) == Some(true) {
            // As in gRPC libraries: RESOURCE_EXHAUSTED.
            let status = HeaderValue::from(u16::from(GrpcCode::ResourceExhausted as u8));
            let message = HeaderValue::from_static("the trailers of the response are larger than 64 KiB");
            return Ok(Frame::trailers(
                [(GRPC_STATUS, status), (GRPC_MESSAGE, message)].into_iter().collect(),
            ));
        }
        Err(error.into())
    }

    fn finished(&mut self, now: Instant) {
        self.progress.done(RequestEnd::Complete, now);
        if let Some(grpc) = self.resources.grpc.take() {
            grpc.report_trailers(&HeaderMap::new());
        }
        if let Some(lease) = self.lease.take() {
            // After a response that precedes the end of its request the connection cannot be reused.
            lease.release(self.resources.upload.is_complete(), now);
        }
    }
}

impl Drop for StreamingBody {
    fn drop(&mut self) {
        if !self.progress.is_done() {
            let now = Instant::now();
            self.progress.done(self.progress.end_when_dropped(now), now);
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
            Self::Shared(shared) => return shared.poll_frame(cx),
        };
        let Some(lease) = &mut this.lease else { return Poll::Ready(None) };
        let frame = match ready!(lease.poll_frame(cx)) {
            Some(Ok(frame)) => Some(this.check_trailers(frame)),
            frame => frame,
        };
        let Some(lease) = &this.lease else { return Poll::Ready(None) };
        let at_end = lease.is_end_stream();
        let now = this.progress.moved();
        if let Some(Ok(frame)) = &frame {
            if let Some(trailers) = frame.trailers_ref() {
                this.progress.with_record(|record| record.read_trailers(trailers));
            } else if let Some(data) = frame.data_ref() {
                this.progress.with_record(|record| record.bytes_out += data.len() as u64);
            }
        }
        if this.resources.grpc.is_some() {
            this.report_grpc_end(&frame);
        }
        match &frame {
            // The body is not polled after trailers.
            Some(Ok(frame)) if frame.is_trailers() || at_end => this.finished(now),
            Some(Ok(_)) => {}
            Some(Err(_)) => {
                this.lease = None;
                this.progress.done(RequestEnd::Broken, now);
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
            Self::Shared(shared) => shared.ended,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Streaming(streaming) => {
                let length = streaming.lease.as_ref().map_or(Some(0), Lease::remaining_length);
                length.map_or_else(SizeHint::default, SizeHint::with_exact)
            }
            Self::Shared(shared) => shared.left.map_or_else(SizeHint::default, SizeHint::with_exact),
        }
    }
}
