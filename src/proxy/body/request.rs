//! A request's body: as received, as buffered for another attempt, and as one attempt sends it.

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

use super::{buffered::BufferedBody, copied::CopiedBody, replay_buffer::ReplayBuffer};
use crate::{
    field_set::FieldSet,
    http1::{self, framing::FramingError},
    http2,
    proxy::{connection, headers, interim::ContinueGate, progress::Progress},
    resilience::retry::Replayability,
    upstream::{self, BodyError},
};

/// A request's body as received from its client.
#[derive(Debug)]
pub enum ClientBody {
    Http1(connection::Body),
    Http2(http2::body::StreamBody),
    /// Read before, all of it or its beginning.
    Buffered(Box<BufferedBody>),
    /// A copy is kept of what is read.
    Copied(Box<CopiedBody>),
}

impl Default for ClientBody {
    fn default() -> Self {
        Self::Http1(connection::Body::default())
    }
}

impl Body for ClientBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Http1(body) => Pin::new(body).poll_frame(cx).map_err(BodyError::from),
            Self::Http2(body) => Pin::new(body).poll_frame(cx).map_err(BodyError::from),
            Self::Buffered(body) => body.poll_frame(cx),
            Self::Copied(body) => body.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_end_stream(),
            Self::Http2(body) => body.is_end_stream(),
            Self::Buffered(body) => body.is_end_stream(),
            Self::Copied(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(body) => body.size_hint(),
            Self::Http2(body) => body.size_hint(),
            Self::Buffered(body) => body.size_hint(),
            Self::Copied(body) => body.size_hint(),
        }
    }
}

/// A request's body as one attempt sends it.
#[derive(Debug)]
pub struct RequestBody(Option<AttemptBody>);

#[derive(Debug)]
struct AttemptBody {
    source: Rc<RefCell<Source>>,
    number: u32,
    /// How many bytes this attempt has sent.
    sent: u64,
    trailers_sent: bool,
    gate: Option<Rc<ContinueGate>>,
    whole: Rc<Cell<bool>>,
}

/// Whether one attempt has sent its whole request. Other attempts of the same request do not matter to its connection.
#[derive(Clone, Debug)]
pub struct UploadStatus(Option<Rc<Cell<bool>>>);

impl UploadStatus {
    pub fn is_complete(&self) -> bool {
        self.0.as_ref().is_none_or(|whole| whole.get())
    }
}

/// The client's body, with a copy of its beginning where the policy allows another attempt.
#[derive(Debug)]
struct Source {
    body: ClientBody,
    progress: Rc<Progress>,
    /// The attempt that may read. An earlier one that still runs must not take bytes away from it.
    current: u32,
    buffer: ReplayBuffer,
    trailers: Option<HeaderMap>,
    /// The most bytes that may be buffered.
    limit: u64,
    touched: bool,
    overflowed: bool,
    ended: bool,
    failure: Option<SourceFailure>,
    /// Header fields that carry claims of the client's token: trailers must not set them either.
    claims: Option<ClaimFields>,
}

/// Why a request's body breaks off, where the client is the cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceFailure {
    ClientGone,
    /// The client sent a malformed body.
    Malformed(FramingError),
}

/// See `claim_headers` in [`crate::identity::access_policy`].
pub type ClaimFields = Arc<[(HeaderName, String)]>;

/// The client's body, of which each attempt gets its own view.
#[derive(Debug)]
pub struct Replay(Option<Rc<RefCell<Source>>>);

impl Replay {
    /// `limit`: the most bytes that are buffered for another attempt; 0 buffers none.
    pub fn new(source: ClientBody, limit: u64, claims: Option<ClaimFields>, progress: &Rc<Progress>) -> Self {
        if source.is_end_stream() {
            // The request was complete with its head.
            progress.request_sent(progress.started());
            return Self(None);
        }
        Self(Some(Rc::new(RefCell::new(Source {
            body: source,
            progress: Rc::clone(progress),
            current: 0,
            buffer: ReplayBuffer::default(),
            trailers: None,
            limit,
            touched: false,
            overflowed: false,
            ended: false,
            failure: None,
            claims,
        }))))
    }

    /// The body for the next attempt. The views of earlier attempts return an error from now on.
    pub fn next_attempt(&self, gate: Option<Rc<ContinueGate>>) -> RequestBody {
        RequestBody(self.0.as_ref().map(|kept| {
            let mut inner = kept.borrow_mut();
            inner.current += 1;
            let source = Rc::clone(kept);
            let (number, whole) = (inner.current, Rc::default());
            AttemptBody { source, number, sent: 0, trailers_sent: false, gate, whole }
        }))
    }

    /// Buffers no further bytes: no other attempt can follow.
    pub fn stop_buffering(&self) {
        if let Some(source) = &self.0 {
            source.borrow_mut().limit = 0;
        }
    }

    /// Invalidates the views of earlier attempts. False, with nothing changed, where one of them has read more than is
    /// buffered: an attempt with an early response goes on reading.
    pub fn take_over(&self) -> bool {
        let Some(kept) = &self.0 else { return true };
        let mut kept = kept.borrow_mut();
        kept.current += u32::from(!kept.overflowed);
        !kept.overflowed
    }

    pub fn replayability(&self) -> Replayability {
        match self.0.as_ref().map(|kept| kept.borrow()) {
            None => Replayability::Unread,
            Some(kept) if !kept.touched => Replayability::Unread,
            Some(kept) if kept.overflowed => Replayability::NotKept,
            Some(_) => Replayability::Buffered,
        }
    }

    /// Why the body broke off, where the client was the cause.
    pub fn failure(&self) -> Option<SourceFailure> {
        self.0.as_ref().and_then(|source| source.borrow().failure)
    }

    /// Whether there is no body at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }
}

impl Source {
    fn poll_client(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.touched = true;
        let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => without_spoofed(frame, self.claims.as_deref()),
            Some(Err(error)) => {
                // The first error is the cause.
                self.failure.get_or_insert(match &error {
                    BodyError::Client(http1::Error::Framing(error)) => SourceFailure::Malformed(*error),
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
            self.progress.with_record(|record| record.bytes_in += data.len() as u64);
            if self.overflowed || self.buffer.length().saturating_add(data.len() as u64) > self.limit {
                self.overflowed = true;
                self.progress.mark_unrepeatable();
                self.buffer = ReplayBuffer::default();
            } else {
                self.buffer.push(data);
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

/// Whether this side reset an HTTP/2 stream because of what the client sent on it.
fn is_malformed(error: &h2::Error) -> bool {
    !error.is_remote() && error.reason() == Some(h2::Reason::PROTOCOL_ERROR) && !error.is_go_away()
}

/// Removes from trailers the fields that a client may not set: some services read trailers like header fields.
fn without_spoofed(frame: Frame<Bytes>, claims: Option<&[(HeaderName, String)]>) -> Frame<Bytes> {
    match frame.into_trailers() {
        Ok(mut trailers) => {
            let present = FieldSet::of(&trailers);
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

    /// Whether all of it was sent, for after the body was given to its connection.
    pub fn upload_status(&self) -> UploadStatus {
        UploadStatus(self.0.as_ref().map(|this| Rc::clone(&this.whole)))
    }
}

impl AttemptBody {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(gate) = &self.gate {
            ready!(gate.poll_open(cx));
        }
        let mut source = self.source.borrow_mut();
        if source.current != self.number {
            return Poll::Ready(Some(Err(BodyError::Superseded)));
        }
        if let Some(data) = source.buffer.part_at(self.sent) {
            self.sent += data.len() as u64;
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if source.ended {
            let trailers = source.trailers.clone().filter(|_| !mem::replace(&mut self.trailers_sent, true));
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let frame = ready!(source.poll_client(cx));
        if let Some(Ok(frame)) = &frame {
            self.sent += frame.data_ref().map_or(0, |data| data.len() as u64);
            self.trailers_sent |= frame.is_trailers();
        }
        Poll::Ready(frame)
    }

    /// Whether everything was sent.
    fn is_at_end(&self) -> bool {
        let source = self.source.borrow();
        source.ended
            && source.current == self.number
            && self.sent >= source.buffer.length()
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
        self.0.as_ref().is_none_or(AttemptBody::is_at_end)
    }

    fn size_hint(&self) -> SizeHint {
        let Some(this) = &self.0 else { return SizeHint::with_exact(0) };
        let source = this.source.borrow();
        if source.touched {
            // The rest of the source, and the rest of the buffer that this attempt has not sent.
            let buffered = source.buffer.length().saturating_sub(this.sent);
            return match source.body.size_hint().exact() {
                Some(rest) => SizeHint::with_exact(rest + buffered),
                None => SizeHint::default(),
            };
        }
        source.body.size_hint()
    }
}
