//! A request's body: as it comes, as it is kept to be sent again, and as one try sends it.

#[cfg(test)]
mod tests;

use std::{
    cell::{Cell, RefCell},
    mem,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;

use super::kept::Kept;
use crate::{
    http1::{self, framing::FramingError},
    http2,
    present::Present,
    proxy::{connection, headers, interim::Gate, progress::Progress},
    upstream::{self, BodyError},
};

/// A request's body as it comes from its caller.
#[derive(Debug)]
pub enum CallerBody {
    Http1(connection::Body),
    Http2(http2::body::Body),
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
    source: Rc<RefCell<Source>>,
    number: u32,
    /// How many of the kept bytes this try has sent.
    sent: u64,
    trailers_sent: bool,
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
struct Source {
    body: CallerBody,
    progress: Rc<Progress>,
    /// The try that may read. An earlier one that still runs must not take bytes away from it.
    current: u32,
    kept: Kept,
    trailers: Option<HeaderMap>,
    /// Of what may be kept, in bytes.
    limit: u64,
    touched: bool,
    overflowed: bool,
    ended: bool,
    failure: Option<SourceFailure>,
    /// Fields by which the service learns claims of the caller's token: a trailer must not say them either.
    claims: Option<ClaimFields>,
}

/// Why a request's body breaks off, where its client is the cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceFailure {
    ClientGone,
    /// What the client sent is no body.
    Malformed(FramingError),
}

/// See [`crate::identity::gate::Users::claim_headers`].
pub type ClaimFields = Arc<[(HeaderName, String)]>;

/// The caller's body, from which each try gets its own view.
#[derive(Debug)]
pub struct Replay(Option<Rc<RefCell<Source>>>);

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
        Self(Some(Rc::new(RefCell::new(Source {
            body: source,
            progress: Rc::clone(progress),
            current: 0,
            kept: Kept::default(),
            trailers: None,
            limit,
            touched: false,
            overflowed: false,
            ended: false,
            failure: None,
            claims,
        }))))
    }

    /// The body for the next try. The views of earlier tries end with an error from now on.
    pub fn next_try(&self, gate: Option<Rc<Gate>>) -> RequestBody {
        RequestBody(self.0.as_ref().map(|kept| {
            let mut inner = kept.borrow_mut();
            inner.current += 1;
            let source = Rc::clone(kept);
            let (number, whole) = (inner.current, Rc::default());
            Try { source, number, sent: 0, trailers_sent: false, gate, whole }
        }))
    }

    /// From here on nothing is kept that is not kept already: no other try can follow.
    pub fn keep_nothing(&self) {
        if let Some(source) = &self.0 {
            source.borrow_mut().limit = 0;
        }
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

    /// Why the body broke off, where its client was the cause.
    pub fn failure(&self) -> Option<SourceFailure> {
        self.0.as_ref().and_then(|source| source.borrow().failure)
    }

    /// Whether there is no body at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }
}

impl Source {
    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.touched = true;
        let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => without_spoofed(frame, self.claims.as_deref()),
            Some(Err(error)) => {
                // What comes first is the cause.
                self.failure.get_or_insert(match &error {
                    BodyError::Caller(http1::Error::Framing(error)) => SourceFailure::Malformed(*error),
                    BodyError::Peer(error) if is_malformed(error) => {
                        SourceFailure::Malformed(FramingError::Http2)
                    }
                    _ => SourceFailure::ClientGone,
                });
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
            self.progress.note(|record| record.bytes_in += data.len() as u64);
            if self.overflowed || self.kept.length().saturating_add(data.len() as u64) > self.limit {
                self.overflowed = true;
                self.progress.unrepeatable();
                self.kept = Kept::default();
            } else {
                self.kept.push(data);
            }
        } else if let Some(trailers) = frame.trailers_ref()
            && !self.overflowed
        {
            self.trailers = Some(trailers.clone());
        }
        if self.body.is_end_stream() {
            self.ended = true;
            self.progress.request_sent(now);
        }
        Poll::Ready(Some(Ok(frame)))
    }
}

/// Whether a stream of HTTP/2 was ended on this side for what the client sent on it.
fn is_malformed(error: &h2::Error) -> bool {
    !error.is_remote() && error.reason() == Some(h2::Reason::PROTOCOL_ERROR) && !error.is_go_away()
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

    /// What the connection to the endpoint sends.
    pub fn into_upload(self) -> upstream::RequestBody {
        if self.0.is_none() { upstream::RequestBody::empty() } else { upstream::RequestBody::new(self) }
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
        let mut source = self.source.borrow_mut();
        if source.current != self.number {
            return Poll::Ready(Some(Err(BodyError::TakenOver)));
        }
        if let Some(data) = source.kept.part_at(self.sent) {
            self.sent += data.len() as u64;
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if source.ended {
            let trailers = source.trailers.clone().filter(|_| !mem::replace(&mut self.trailers_sent, true));
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let frame = ready!(source.poll_source(cx));
        if let Some(Ok(frame)) = &frame {
            self.sent += frame.data_ref().map_or(0, |data| data.len() as u64);
            self.trailers_sent |= frame.is_trailers();
        }
        Poll::Ready(frame)
    }

    /// Whether there is nothing more to send.
    fn is_at_end(&self) -> bool {
        let source = self.source.borrow();
        source.ended
            && source.current == self.number
            && self.sent >= source.kept.length()
            && (self.trailers_sent || source.trailers.is_none())
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
        let source = this.source.borrow();
        if source.touched {
            // What is left of the source, and what of the copy this try still has to send.
            let again = source.kept.length().saturating_sub(this.sent);
            return match source.body.size_hint().exact() {
                Some(rest) => SizeHint::with_exact(rest + again),
                None => SizeHint::default(),
            };
        }
        source.body.size_hint()
    }
}
