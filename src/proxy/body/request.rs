//! A request's body: as it comes, as it is kept to be sent again, and as one try sends it.

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

use super::{
    super::{connection, headers, interim::Gate, progress::Progress},
    BodyError,
};
use crate::present::Present;

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
