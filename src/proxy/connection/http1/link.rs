//! The bytes of a caller's connection: how far what comes and what goes out has got, and what may take how long.
//!
//! Shared by the task that serves the connection and whoever reads the body of its request, which may be another task.

use std::{
    cell::RefCell,
    fmt, io, mem,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use http::StatusCode;
use http_body::Frame;
use tokio::{
    io::{AsyncWrite, empty},
    time::Instant,
};

use super::{
    super::{CALLER_IDLE, HEADER_TIMEOUT, WRITE_STALL},
    body::Body,
};
use crate::{
    http1::{
        Error,
        decoder::Decoder,
        framing::Framing,
        head::{HeadError, RequestHead, parse_request},
        intake::{Intake, Part},
        outlet::Outlet,
        target::RefusedLine,
    },
    net::io::{Io, Prefixed},
    proxy::{error::ProxyError, interim::Interim, progress::Progress},
};

/// How long, and how much, is read on after the last answer: who hangs up on bytes that still come takes the answer with
/// them (RFC 9112 §9.6).
const LINGER: Duration = Duration::from_secs(2);
const MOST_LINGERING: usize = 1024 * 1024;
/// Of a body that nobody wants, so much is read for the sake of the connection, where it has come already.
const MOST_UNWANTED: usize = 64 * 1024;
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// See the first lines of this file.
pub struct Link {
    stream: Box<dyn Io>,
    intake: Intake,
    pub outlet: Outlet,
    coming: Coming,
    at: At,
    /// Since when the caller has taken nothing of what is to be written.
    blocked: Option<Instant>,
    /// Whoever reads the body.
    reader: Option<Waker>,
    /// It waits for bytes, and is the one whom they wake.
    reader_waits: bool,
    /// The task that serves the connection.
    task: Option<Waker>,
    /// Whether it waits for the end of the body.
    awaits_body: bool,
    /// No further request is read.
    leaving: bool,
}

/// What still comes of the request.
#[derive(Debug)]
enum Coming {
    Nothing,
    Body {
        decoder: Decoder,
        /// `100 Continue` is due when it is asked for.
        expects_continue: bool,
    },
    /// A body that nobody reads any more.
    Unwanted(Decoder),
    /// It broke off, or can't be told from what follows.
    Broken,
}

/// What a connection is at.
#[derive(Clone, Copy, Debug)]
enum At {
    /// Waits for a request since.
    Idle(Instant),
    /// The head of one began to come.
    Head(Instant),
    Call,
    /// All is said since.
    Closing(Instant),
}

impl Link {
    /// `begun`: what was read of it already.
    pub fn new(stream: Box<dyn Io>, begun: Bytes) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            stream,
            intake: Intake::new(begun),
            outlet: Outlet::default(),
            coming: Coming::Nothing,
            at: At::Idle(Instant::now()),
            blocked: None,
            reader: None,
            reader_waits: false,
            task: None,
            awaits_body: false,
            leaving: false,
        }))
    }

    /// When it is cut unless something moves, and why.
    pub fn due(&self, exchange: Option<&Progress>) -> (Option<Instant>, &'static str) {
        if let At::Closing(since) = self.at {
            return (Some(since + LINGER), "the caller does not hang up");
        }
        if let Some(since) = self.blocked {
            return (Some(since + WRITE_STALL), "the caller takes nothing of what is written to it");
        }
        match (self.at, exchange) {
            (At::Head(begun), _) => (Some(begun + HEADER_TIMEOUT), "the request's head took too long"),
            (At::Call, Some(exchange)) => {
                let why = "the exchange stood still for idle_timeout, or took max_duration";
                let over = exchange.is_done().then(|| exchange.last_moved() + CALLER_IDLE);
                (exchange.cut_at().or(over), why)
            }
            (At::Idle(since) | At::Closing(since), _) => (Some(since + CALLER_IDLE), "idle"),
            (At::Call, None) => (None, ""),
        }
    }

    /// From here on no further request is read.
    pub fn leave(&mut self) {
        self.leaving = true;
    }

    // -----------------------------------------------------------------------------------------------------------
    // What comes

    /// Reads the head of the next request. `None`: there is none, and will be none.
    pub fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        keeps_spelling: impl Fn() -> bool,
    ) -> Poll<Result<Option<RequestHead>, Error>> {
        if self.leaving {
            return Poll::Ready(Ok(None));
        }
        let parse = |came: &[u8]| parse_request(came, keeps_spelling());
        let polled = self.intake.poll_head(&mut self.stream, cx, parse);
        match polled {
            Poll::Ready(Err(Error::Closed)) => Poll::Ready(Ok(None)),
            Poll::Ready(head) => Poll::Ready(head.map(Some)),
            Poll::Pending => {
                if let (At::Idle(_), true) = (self.at, self.intake.has_begun()) {
                    self.at = At::Head(Instant::now());
                }
                Poll::Pending
            }
        }
    }

    /// A request was read, with this body behind it.
    pub fn begin(this: &Rc<RefCell<Self>>, framing: Framing, expects_continue: bool) -> Body {
        let mut link = this.borrow_mut();
        link.at = At::Call;
        if framing == Framing::EMPTY {
            return Body::default();
        }
        link.coming = Coming::Body { decoder: Decoder::new(framing), expects_continue };
        Body::of(this)
    }

    pub fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let (decoder, expects_continue) = match &mut self.coming {
            Coming::Body { decoder, expects_continue } => (decoder, expects_continue),
            Coming::Broken => return Poll::Ready(Some(Err(Error::CutOff))),
            Coming::Nothing | Coming::Unwanted(_) => return Poll::Ready(None),
        };
        if mem::take(expects_continue) {
            self.outlet.head().extend_from_slice(CONTINUE);
            self.task.iter().for_each(Waker::wake_by_ref);
        }
        let polled = self.intake.poll_body(&mut self.stream, cx, decoder);
        self.reader_waits = polled.is_pending();
        if self.reader_waits && !self.reader.as_ref().is_some_and(|reader| reader.will_wake(cx.waker())) {
            self.reader = Some(cx.waker().clone());
        }
        let frame = match ready!(polled) {
            Ok(Some(Part::Data(data))) => {
                let over = decoder.is_over();
                if over {
                    self.body_over(Coming::Nothing);
                }
                Frame::data(data)
            }
            Ok(Some(Part::Trailers(trailers))) => {
                self.body_over(Coming::Nothing);
                Frame::trailers(trailers)
            }
            Ok(None) => {
                self.body_over(Coming::Nothing);
                return Poll::Ready(None);
            }
            Err(error) => {
                self.body_over(Coming::Broken);
                return Poll::Ready(Some(Err(error)));
            }
        };
        Poll::Ready(Some(Ok(frame)))
    }

    /// Whether there will be no part of the body any more, nor an error.
    pub fn is_body_over(&self) -> bool {
        matches!(self.coming, Coming::Nothing | Coming::Unwanted(_))
    }

    /// How much of the body still comes, where that was told.
    pub fn length(&self) -> Option<u64> {
        match &self.coming {
            Coming::Body { decoder, .. } => decoder.length(),
            _ => None,
        }
    }

    /// The answer is there, and the caller was never asked for the body that it holds back: it may send another request in
    /// its place, so nobody may read on (RFC 9110 §10.1.1).
    pub fn give_up_unasked(&mut self) {
        if let Coming::Body { expects_continue: true, .. } = self.coming {
            self.body_over(Coming::Broken);
        }
    }

    fn body_over(&mut self, coming: Coming) {
        // Where it broke off the caller may have left, which is for the task to see.
        let wakes = mem::take(&mut self.awaits_body) || matches!(coming, Coming::Broken);
        self.coming = coming;
        self.reader_waits = false;
        if wakes && let Some(task) = &self.task {
            task.wake_by_ref();
        }
    }

    /// Nobody reads the body any more.
    pub fn let_body_go(&mut self) {
        self.coming = match mem::replace(&mut self.coming, Coming::Nothing) {
            Coming::Body { decoder, .. } => Coming::Unwanted(decoder),
            other => other,
        };
        self.reader_waits = false;
        // From here on it is for the task to hear of the caller.
        self.task.iter().for_each(Waker::wake_by_ref);
    }

    /// It is served no more: whoever still reads the body gets no more of it.
    pub fn end(&mut self) {
        if let Coming::Body { .. } = self.coming {
            self.coming = Coming::Broken;
        }
        self.stream = Box::new(empty());
        if let (true, Some(reader)) = (mem::take(&mut self.reader_waits), self.reader.take()) {
            reader.wake();
        }
    }

    /// Ready once the caller has left, as far as can be told without reading more than is wanted.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.woken_here(cx);
        if let Coming::Nothing = self.coming {
            // An empty line behind the body is no further request.
            self.intake.skip_empty_lines();
        }
        if self.reader_waits || !self.intake.is_empty() {
            return Poll::Pending;
        }
        match ready!(self.intake.poll_more(&mut self.stream, cx, 0)) {
            Ok(0) => Poll::Ready(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => Poll::Ready(error),
            // It belongs to the body, or to the next request.
            Ok(_) => Poll::Pending,
        }
    }

    /// Whether the request has come to its end; reads on where little is left of it, and nobody wants it.
    pub fn is_request_over(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        self.woken_here(cx);
        let mut unwanted = 0;
        loop {
            match &mut self.coming {
                Coming::Nothing => return Poll::Ready(true),
                Coming::Broken => return Poll::Ready(false),
                Coming::Body { .. } => {
                    self.awaits_body = true;
                    return Poll::Pending;
                }
                Coming::Unwanted(decoder) => {
                    match self.intake.poll_body(&mut self.stream, cx, decoder) {
                        Poll::Ready(Ok(Some(Part::Data(data)))) if !decoder.is_over() => {
                            unwanted += data.len();
                        }
                        Poll::Ready(Ok(_)) => self.coming = Coming::Nothing,
                        Poll::Ready(Err(_)) => self.coming = Coming::Broken,
                        Poll::Pending => return Poll::Ready(false),
                    }
                    if unwanted > MOST_UNWANTED {
                        return Poll::Ready(false);
                    }
                }
            }
        }
    }

    fn woken_here(&mut self, cx: &Context<'_>) {
        if !self.task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            self.task = Some(cx.waker().clone());
        }
    }

    // -----------------------------------------------------------------------------------------------------------
    // What goes out

    /// The answer begins, behind interim ones that came together with it; no further one does.
    pub fn answer(&mut self, interim: &Interim) -> &mut Vec<u8> {
        if let Coming::Body { expects_continue, .. } = &mut self.coming {
            *expects_continue = false;
        }
        let head = self.outlet.head();
        while let Some(next) = interim.pop() {
            head.extend_from_slice(&next);
        }
        head
    }

    /// Writes interim responses, one by one.
    pub fn poll_interim(&mut self, cx: &mut Context<'_>, interim: &Interim) -> io::Result<()> {
        loop {
            let Poll::Ready(written) = self.poll_flush(cx) else { return Ok(()) };
            written?;
            let Some(next) = interim.pop() else { return Ok(()) };
            self.outlet.head().extend_from_slice(&next);
        }
    }

    /// Hands all that there is to the system.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.outlet.is_empty() && self.blocked.is_none() {
            return Poll::Ready(Ok(()));
        }
        let before = self.outlet.left();
        let flushed = match self.outlet.poll_write(&mut self.stream, cx) {
            Poll::Ready(Ok(())) => Pin::new(&mut self.stream).poll_flush(cx),
            other => other,
        };
        if flushed.is_ready() {
            self.blocked = None;
        } else if self.blocked.is_none() || self.outlet.left() < before {
            self.blocked = Some(Instant::now());
        }
        flushed
    }

    /// What a client is told of a request that could not be read. `path`: of the request, where its head was read.
    pub fn explain(&self, error: &Error, path: &str) -> ProxyError {
        let line = matches!(error, Error::Head(_)).then(|| self.refused_line());
        let target = match line {
            Some(line) => line.target.map_or_else(String::new, |target| format!(" (target `{target}`)")),
            None => format!(" (target `{path}`)"),
        };
        let refusal = ProxyError::malformed(format!("the request cannot be read: {error}{target}"));
        match error {
            Error::Head(HeadError::TooManyFields | HeadError::TooLarge) => {
                refusal.with_status(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE)
            }
            _ => refusal,
        }
    }

    /// The first line of a request that is refused.
    pub fn refused_line(&self) -> RefusedLine {
        RefusedLine::of(self.intake.unread())
    }

    /// Whether more has come than was asked for.
    pub fn has_more(&mut self) -> bool {
        if self.intake.is_empty() {
            // What the system has of it; the end, or trouble, is not more.
            let mut cx = Context::from_waker(Waker::noop());
            let _ = self.intake.poll_more(&mut self.stream, &mut cx, 0);
        }
        !self.intake.is_empty()
    }

    /// An exchange is over, both ways: what comes next is another request.
    pub fn rest(&mut self, since: Instant) {
        self.at = At::Idle(since);
    }

    /// The stream, for another protocol: this does not see it again.
    pub fn hand_over(&mut self) -> Box<dyn Io> {
        let stream = mem::replace(&mut self.stream, Box::new(empty()));
        let unread = mem::take(&mut self.intake).into_unread();
        if unread.is_empty() { stream } else { Box::new(Prefixed::new(unread, stream)) }
    }

    /// Says goodbye.
    pub fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !matches!(self.at, At::Closing(_)) {
            self.at = At::Closing(Instant::now());
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    /// Reads and lets go what still comes, so that the last answer arrives; not for ever.
    pub fn poll_linger(&mut self, cx: &mut Context<'_>, read: &mut usize) -> Poll<()> {
        while *read < MOST_LINGERING {
            drop(mem::take(&mut self.intake).into_unread());
            match ready!(self.intake.poll_more(&mut self.stream, cx, u64::MAX)) {
                Ok(count @ 1..) => *read += count,
                Ok(0) | Err(_) => break,
            }
        }
        Poll::Ready(())
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { coming, at, blocked, .. } = self;
        f.debug_struct("Link").field("coming", coming).field("at", at).field("blocked", blocked).finish()
    }
}
