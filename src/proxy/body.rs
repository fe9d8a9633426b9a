//! The bodies that pass through: streamed, with what is needed to send a request again.

#[cfg(test)]
mod tests;

use std::{
    cell::{Cell, RefCell},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::{connection, grpc::GrpcEnd, headers, interim::Gate, progress::Progress};
use crate::{
    http1,
    present::Present,
    telemetry::record::End,
    upstream::{Lease, guards::Place, local::InFlight, pool::AnswerError},
};

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error(transparent)]
    Peer(#[from] hyper::Error),
    #[error(transparent)]
    Answer(#[from] AnswerError),
    #[error(transparent)]
    Caller(#[from] http1::Error),
    /// A newer try has taken the request's body over.
    #[error("another try has taken this body over")]
    TakenOver,
}

// ---------------------------------------------------------------------------------------------------------------
// Request bodies

/// A request's body as it comes from its caller.
#[derive(Debug)]
pub enum CallerBody {
    Http1(connection::Body),
    Http2(Incoming),
}

impl Default for CallerBody {
    fn default() -> Self {
        Self::Http1(connection::Body::default())
    }
}

impl Body for CallerBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Http1(body) => Pin::new(body).poll_frame(cx).map_err(BodyError::from),
            Self::Http2(body) => Pin::new(body).poll_frame(cx).map_err(BodyError::from),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_end_stream(),
            Self::Http2(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(body) => body.size_hint(),
            Self::Http2(body) => body.size_hint(),
        }
    }
}

/// A request's body as one try sends it.
#[derive(Debug)]
pub struct RequestBody(Option<Try>);

#[derive(Debug)]
struct Try {
    kept: Rc<RefCell<Kept>>,
    number: u32,
    /// How many of the kept frames this try has sent.
    sent: usize,
    gate: Option<Rc<Gate>>,
    whole: Rc<Cell<bool>>,
}

/// Whether one try has sent its request to the end. Another try of the same call says nothing about its connection.
#[derive(Clone, Debug)]
pub struct Sent(Option<Rc<Cell<bool>>>);

impl Sent {
    pub fn is_whole(&self) -> bool {
        self.0.as_ref().is_none_or(|whole| whole.get())
    }
}

/// The caller's body, with a copy of its beginning where the policy may want to send it again.
#[derive(Debug)]
struct Kept {
    source: CallerBody,
    progress: Rc<Progress>,
    /// The try that may read. An earlier one that still runs must not take bytes away from it.
    current: u32,
    frames: Vec<Bytes>,
    trailers: Option<HeaderMap>,
    kept_bytes: u64,
    limit: u64,
    touched: bool,
    overflowed: bool,
    ended: bool,
    caller_gone: bool,
    /// Fields by which the service learns claims of the caller's token: a trailer must not say them either.
    claims: Option<ClaimFields>,
}

/// See [`crate::identity::gate::Users::claim_headers`].
pub type ClaimFields = Arc<[(HeaderName, String)]>;

/// The caller's body, from which each try gets its own view.
#[derive(Debug)]
pub struct Replay(Option<Rc<RefCell<Kept>>>);

/// Whether a request's body can be sent once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replayable {
    /// Nothing of it has been read, or there is none.
    Untouched,
    /// All that was read is kept.
    Kept,
    /// More than the limit was read, and let go.
    Gone,
}

impl Replay {
    /// `limit`: how many bytes are kept to be sent again; 0 keeps none.
    pub fn new(source: CallerBody, limit: u64, claims: Option<ClaimFields>, progress: &Rc<Progress>) -> Self {
        if source.is_end_stream() {
            // With its head.
            progress.request_sent(progress.started());
            return Self(None);
        }
        Self(Some(Rc::new(RefCell::new(Kept {
            source,
            progress: Rc::clone(progress),
            current: 0,
            frames: Vec::new(),
            trailers: None,
            kept_bytes: 0,
            limit,
            touched: false,
            overflowed: false,
            ended: false,
            caller_gone: false,
            claims,
        }))))
    }

    /// The body for the next try. The views of earlier tries end with an error from now on.
    pub fn next_try(&self, gate: Option<Rc<Gate>>) -> RequestBody {
        RequestBody(self.0.as_ref().map(|kept| {
            let mut inner = kept.borrow_mut();
            inner.current += 1;
            Try { kept: Rc::clone(kept), number: inner.current, sent: 0, gate, whole: Rc::default() }
        }))
    }

    /// Ends the views of earlier tries. False, with nothing changed, where one of them has read past what is kept:
    /// a try that was answered early goes on reading.
    pub fn take_over(&self) -> bool {
        let Some(kept) = &self.0 else { return true };
        let mut kept = kept.borrow_mut();
        kept.current += u32::from(!kept.overflowed);
        !kept.overflowed
    }

    pub fn replayable(&self) -> Replayable {
        match self.0.as_ref().map(|kept| kept.borrow()) {
            None => Replayable::Untouched,
            Some(kept) if !kept.touched => Replayable::Untouched,
            Some(kept) if kept.overflowed => Replayable::Gone,
            Some(_) => Replayable::Kept,
        }
    }

    /// Whether the caller left in the middle of its body.
    pub fn caller_gone(&self) -> bool {
        self.0.as_ref().is_some_and(|kept| kept.borrow().caller_gone)
    }

    /// Whether there is no body at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }
}

impl Kept {
    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.touched = true;
        let frame = match ready!(Pin::new(&mut self.source).poll_frame(cx)) {
            Some(Ok(frame)) => without_spoofed(frame, self.claims.as_deref()),
            Some(Err(error)) => {
                self.caller_gone = true;
                return Poll::Ready(Some(Err(error)));
            }
            None => {
                self.ended = true;
                self.progress.request_sent(Instant::now());
                return Poll::Ready(None);
            }
        };
        let now = self.progress.moved();
        if let Some(data) = frame.data_ref() {
            self.kept_bytes = self.kept_bytes.saturating_add(data.len() as u64);
            self.progress.note(|record| record.bytes_in += data.len() as u64);
            if self.kept_bytes > self.limit {
                self.overflowed = true;
                self.progress.unrepeatable();
                self.frames = Vec::new();
            } else {
                self.frames.push(data.clone());
            }
        } else if let Some(trailers) = frame.trailers_ref()
            && !self.overflowed
        {
            self.trailers = Some(trailers.clone());
        }
        if self.source.is_end_stream() {
            self.ended = true;
            self.progress.request_sent(now);
        }
        Poll::Ready(Some(Ok(frame)))
    }
}

/// Some services read trailers as if they were headers: what a caller may not say in the one, it may not in the other.
fn without_spoofed(frame: Frame<Bytes>, claims: Option<&[(HeaderName, String)]>) -> Frame<Bytes> {
    match frame.into_trailers() {
        Ok(mut trailers) => {
            let present = Present::of(&trailers);
            headers::remove_spoofed(&mut trailers, present);
            for (name, _) in claims.into_iter().flatten() {
                headers::remove_spellings(&mut trailers, name);
            }
            Frame::trailers(trailers)
        }
        Err(data) => data,
    }
}

impl RequestBody {
    pub const fn empty() -> Self {
        Self(None)
    }

    /// Tells, once the body is with its connection, whether all of it has been sent.
    pub fn sent(&self) -> Sent {
        Sent(self.0.as_ref().map(|this| Rc::clone(&this.whole)))
    }
}

impl Try {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(gate) = &self.gate {
            ready!(gate.poll_open(cx));
        }
        let mut kept = self.kept.borrow_mut();
        if kept.current != self.number {
            return Poll::Ready(Some(Err(BodyError::TakenOver)));
        }
        if let Some(data) = kept.frames.get(self.sent) {
            self.sent += 1;
            return Poll::Ready(Some(Ok(Frame::data(data.clone()))));
        }
        if kept.ended {
            // Frames first, trailers last; `sent` one past the frames says that the trailers went out.
            let trailers = (self.sent == kept.frames.len()).then(|| kept.trailers.clone()).flatten();
            self.sent += 1;
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let frame = ready!(kept.poll_source(cx));
        if let Some(Ok(frame)) = &frame
            && (frame.is_trailers() || !kept.overflowed)
        {
            self.sent += 1;
        }
        Poll::Ready(frame)
    }

    /// Whether there is nothing more to send.
    fn is_at_end(&self) -> bool {
        let kept = self.kept.borrow();
        kept.ended
            && kept.current == self.number
            && self.sent >= kept.frames.len() + usize::from(kept.trailers.is_some())
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(this) = &mut self.0 else { return Poll::Ready(None) };
        let frame = ready!(this.poll_next(cx));
        if this.is_at_end() {
            this.whole.set(true);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(Try::is_at_end)
    }

    fn size_hint(&self) -> SizeHint {
        let Some(this) = &self.0 else { return SizeHint::with_exact(0) };
        let kept = this.kept.borrow();
        if kept.touched {
            // What is left of the source, and what of the copy this try still has to send.
            let again: u64 = kept.frames.iter().skip(this.sent).map(|data| data.len() as u64).sum();
            return match kept.source.size_hint().exact() {
                Some(rest) => SizeHint::with_exact(rest + again),
                None => SizeHint::default(),
            };
        }
        kept.source.size_hint()
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Response bodies

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
        let frame = ready!(lease.poll_frame(cx));
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
