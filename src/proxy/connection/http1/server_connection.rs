//! The server side of an HTTP/1 connection: the state of its input and output, and its timeouts. States and wakers: see
//! the [parent module](super).
//!
//! Shared by the task that serves the connection and the reader of the request's body, which may be another task.

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
    super::{CLIENT_IDLE_TIMEOUT, HEADER_TIMEOUT, WRITE_STALL_TIMEOUT},
    body::Body,
};
use crate::{
    http1::{
        Error,
        decoder::Decoder,
        framing::Framing,
        head::{HeadError, RequestHead, parse_request},
        read_buffer::{BodyPart, ReadBuffer},
        target::RejectedRequestLine,
        write_buffer::WriteBuffer,
    },
    net::io::{Io, Prefixed},
    proxy::{error::ProxyError, interim::InterimQueue, progress::Progress},
};

/// How long, and how many bytes, are read and dropped after the last response: closing with unread bytes resets the
/// connection, which can destroy the response (RFC 9112 §9.6).
const LINGER_TIMEOUT: Duration = Duration::from_secs(2);
const MAX_LINGER_BYTES: usize = 1024 * 1024;
/// The most of an unneeded body that is read, where it has arrived already, so that the connection can be reused.
const MAX_UNNEEDED_BODY: usize = 64 * 1024;
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// An HTTP/1 connection from a client. See the [module](self).
pub struct ServerConnection {
    stream: Box<dyn Io>,
    intake: ReadBuffer,
    pub outlet: WriteBuffer,
    rest_of_request: RequestRest,
    stage: Stage,
    /// Since when the client has read nothing of what is to be written.
    blocked: Option<Instant>,
    /// The task that reads the body.
    reader: Option<Waker>,
    /// The reader waits for bytes, which notify it rather than `task`.
    is_reader_waiting: bool,
    /// The task that serves the connection.
    task: Option<Waker>,
    /// The task waits for the end of the body.
    awaits_body: bool,
    /// No further request is read.
    no_more_requests: bool,
}

/// The rest of the request that is still to be received.
#[derive(Debug)]
enum RequestRest {
    Nothing,
    Body {
        decoder: Decoder,
        /// `100 Continue` has to be sent when the body is first polled.
        expects_continue: bool,
    },
    /// A body that is no longer needed.
    Unneeded(Decoder),
    /// The body broke off, or its end cannot be determined.
    Broken,
}

/// The stage of a connection.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// Waits for a request since then.
    Idle(Instant),
    /// The first bytes of a head arrived then.
    Head(Instant),
    Exchange,
    /// The write side is shut down since then.
    Closing(Instant),
}

impl ServerConnection {
    /// `read_ahead`: the bytes that were read already.
    pub fn new(stream: Box<dyn Io>, read_ahead: Bytes) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            stream,
            intake: ReadBuffer::new(read_ahead),
            outlet: WriteBuffer::default(),
            rest_of_request: RequestRest::Nothing,
            stage: Stage::Idle(Instant::now()),
            blocked: None,
            reader: None,
            is_reader_waiting: false,
            task: None,
            awaits_body: false,
            no_more_requests: false,
        }))
    }

    /// When the connection is cut unless there is progress, and why.
    pub fn next_deadline(&self, exchange: Option<&Progress>) -> (Option<Instant>, &'static str) {
        if let Stage::Closing(since) = self.stage {
            return (Some(since + LINGER_TIMEOUT), "the client does not close the connection");
        }
        if let Some(since) = self.blocked {
            return (Some(since + WRITE_STALL_TIMEOUT), "the client reads nothing of what is written to it");
        }
        match (self.stage, exchange) {
            (Stage::Head(begun), _) => (Some(begun + HEADER_TIMEOUT), "the request's head took too long"),
            (Stage::Exchange, Some(exchange)) => {
                let why = "no byte moved for idle_timeout, or max_duration has elapsed";
                let idle_at = exchange.is_done().then(|| exchange.last_moved() + CLIENT_IDLE_TIMEOUT);
                (exchange.cut_at().or(idle_at), why)
            }
            (Stage::Idle(since) | Stage::Closing(since), _) => (Some(since + CLIENT_IDLE_TIMEOUT), "idle"),
            (Stage::Exchange, None) => (None, ""),
        }
    }

    /// Reads no further request.
    pub fn stop_reading_requests(&mut self) {
        self.no_more_requests = true;
    }

    // -----------------------------------------------------------------------------------------------------------
    // Input

    /// Reads the head of the next request. `None`: there will be none.
    pub fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        keeps_spelling: impl Fn() -> bool,
    ) -> Poll<Result<Option<RequestHead>, Error>> {
        if self.no_more_requests {
            return Poll::Ready(Ok(None));
        }
        let parse = |bytes: &[u8]| parse_request(bytes, keeps_spelling());
        let polled = self.intake.poll_head(&mut self.stream, cx, parse);
        match polled {
            Poll::Ready(Err(Error::Closed)) => Poll::Ready(Ok(None)),
            Poll::Ready(head) => Poll::Ready(head.map(Some)),
            Poll::Pending => {
                if let (Stage::Idle(_), true) = (self.stage, self.intake.has_message_started()) {
                    self.stage = Stage::Head(Instant::now());
                }
                Poll::Pending
            }
        }
    }

    /// Begins a request with a body of this framing.
    pub fn begin_request(this: &Rc<RefCell<Self>>, framing: Framing, expects_continue: bool) -> Body {
        let mut connection = this.borrow_mut();
        connection.stage = Stage::Exchange;
        if framing == Framing::EMPTY {
            return Body::default();
        }
        connection.rest_of_request = RequestRest::Body { decoder: Decoder::new(framing), expects_continue };
        Body::of(this)
    }

    pub fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let (decoder, expects_continue) = match &mut self.rest_of_request {
            RequestRest::Body { decoder, expects_continue } => (decoder, expects_continue),
            RequestRest::Broken => return Poll::Ready(Some(Err(Error::UnexpectedEnd))),
            RequestRest::Nothing | RequestRest::Unneeded(_) => return Poll::Ready(None),
        };
        if mem::take(expects_continue) {
            self.outlet.head_buffer().extend_from_slice(CONTINUE);
            self.task.iter().for_each(Waker::wake_by_ref);
        }
        let polled = self.intake.poll_body(&mut self.stream, cx, decoder);
        self.is_reader_waiting = polled.is_pending();
        if self.is_reader_waiting && !self.reader.as_ref().is_some_and(|reader| reader.will_wake(cx.waker()))
        {
            self.reader = Some(cx.waker().clone());
        }
        let frame = match ready!(polled) {
            Ok(Some(BodyPart::Data(data))) => {
                let at_end = decoder.is_complete();
                if at_end {
                    self.end_body(RequestRest::Nothing);
                }
                Frame::data(data)
            }
            Ok(Some(BodyPart::Trailers(trailers))) => {
                self.end_body(RequestRest::Nothing);
                Frame::trailers(trailers)
            }
            Ok(None) => {
                self.end_body(RequestRest::Nothing);
                return Poll::Ready(None);
            }
            Err(error) => {
                self.end_body(RequestRest::Broken);
                return Poll::Ready(Some(Err(error)));
            }
        };
        Poll::Ready(Some(Ok(frame)))
    }

    /// Whether the body yields no further frame and no error.
    pub fn is_body_finished(&self) -> bool {
        matches!(self.rest_of_request, RequestRest::Nothing | RequestRest::Unneeded(_))
    }

    /// How many bytes of the body are left, if its length is known.
    pub fn body_length(&self) -> Option<u64> {
        match &self.rest_of_request {
            RequestRest::Body { decoder, .. } => decoder.remaining_length(),
            _ => None,
        }
    }

    /// Gives up a body for which `100 Continue` was never sent, now that there is a response: the client may send
    /// another request in its place, so nothing more may be read (RFC 9110 §10.1.1).
    pub fn abandon_unrequested_body(&mut self) {
        if let RequestRest::Body { expects_continue: true, .. } = self.rest_of_request {
            self.end_body(RequestRest::Broken);
        }
    }

    fn end_body(&mut self, rest_of_request: RequestRest) {
        // After a broken body the client may be gone, which the task has to notice.
        let notify_task = mem::take(&mut self.awaits_body) || matches!(rest_of_request, RequestRest::Broken);
        self.rest_of_request = rest_of_request;
        self.is_reader_waiting = false;
        if notify_task && let Some(task) = &self.task {
            task.wake_by_ref();
        }
    }

    /// The body is no longer needed.
    pub fn discard_body(&mut self) {
        self.rest_of_request = match mem::replace(&mut self.rest_of_request, RequestRest::Nothing) {
            RequestRest::Body { decoder, .. } => RequestRest::Unneeded(decoder),
            other => other,
        };
        self.is_reader_waiting = false;
        // From here on the task has to notice that the client closes.
        self.task.iter().for_each(Waker::wake_by_ref);
    }

    /// Closes the stream; a reader of the body gets an error.
    pub fn shut_down(&mut self) {
        if let RequestRest::Body { .. } = self.rest_of_request {
            self.rest_of_request = RequestRest::Broken;
        }
        self.stream = Box::new(empty());
        if let (true, Some(reader)) = (mem::take(&mut self.is_reader_waiting), self.reader.take()) {
            reader.wake();
        }
    }

    /// Ready once the client has closed, as far as can be seen without reading more than is needed.
    pub fn poll_client_closed(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.register_task(cx);
        if let RequestRest::Nothing = self.rest_of_request {
            // An empty line after the body does not begin a request.
            self.intake.skip_empty_lines();
        }
        if self.is_reader_waiting || !self.intake.is_empty() {
            return Poll::Pending;
        }
        match ready!(self.intake.poll_more(&mut self.stream, cx, 0)) {
            Ok(0) => Poll::Ready(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => Poll::Ready(error),
            // The bytes belong to the body, or to the next request.
            Ok(_) => Poll::Pending,
        }
    }

    /// Whether the whole request was received; reads the rest of an unneeded body if it is short.
    pub fn poll_request_finished(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        self.register_task(cx);
        let mut unneeded_read = 0;
        loop {
            match &mut self.rest_of_request {
                RequestRest::Nothing => return Poll::Ready(true),
                RequestRest::Broken => return Poll::Ready(false),
                RequestRest::Body { .. } => {
                    self.awaits_body = true;
                    return Poll::Pending;
                }
                RequestRest::Unneeded(decoder) => {
                    match self.intake.poll_body(&mut self.stream, cx, decoder) {
                        Poll::Ready(Ok(Some(BodyPart::Data(data)))) if !decoder.is_complete() => {
                            unneeded_read += data.len();
                        }
                        Poll::Ready(Ok(_)) => self.rest_of_request = RequestRest::Nothing,
                        Poll::Ready(Err(_)) => self.rest_of_request = RequestRest::Broken,
                        Poll::Pending => return Poll::Ready(false),
                    }
                    if unneeded_read > MAX_UNNEEDED_BODY {
                        return Poll::Ready(false);
                    }
                }
            }
        }
    }

    fn register_task(&mut self, cx: &Context<'_>) {
        if !self.task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            self.task = Some(cx.waker().clone());
        }
    }

    // -----------------------------------------------------------------------------------------------------------
    // Output

    /// Begins the final response, after the interim responses that are queued. No `100 Continue` is sent from now on.
    pub fn begin_response(&mut self, interim: &InterimQueue) -> &mut Vec<u8> {
        if let RequestRest::Body { expects_continue, .. } = &mut self.rest_of_request {
            *expects_continue = false;
        }
        let head = self.outlet.head_buffer();
        while let Some(next) = interim.pop() {
            head.extend_from_slice(&next);
        }
        head
    }

    /// Writes interim responses, one by one.
    pub fn poll_interim(&mut self, cx: &mut Context<'_>, interim: &InterimQueue) -> io::Result<()> {
        loop {
            let Poll::Ready(written) = self.poll_flush(cx) else { return Ok(()) };
            written?;
            let Some(next) = interim.pop() else { return Ok(()) };
            self.outlet.head_buffer().extend_from_slice(&next);
        }
    }

    /// Writes everything that is buffered to the socket.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.outlet.is_empty() && self.blocked.is_none() {
            return Poll::Ready(Ok(()));
        }
        let before = self.outlet.remaining();
        let flushed = match self.outlet.poll_write(&mut self.stream, cx) {
            Poll::Ready(Ok(())) => Pin::new(&mut self.stream).poll_flush(cx),
            other => other,
        };
        if flushed.is_ready() {
            self.blocked = None;
        } else if self.blocked.is_none() || self.outlet.remaining() < before {
            self.blocked = Some(Instant::now());
        }
        flushed
    }

    /// The error for a request that could not be parsed. `path`: the request's path, where its head was parsed.
    pub fn parse_error(&self, error: &Error, path: &str) -> ProxyError {
        let line = matches!(error, Error::Head(_)).then(|| self.refused_start_line());
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

    /// The start line of a request that is refused.
    pub fn refused_start_line(&self) -> RejectedRequestLine {
        RejectedRequestLine::parse(self.intake.unread())
    }

    /// Whether there are unread bytes.
    pub fn has_unread_bytes(&mut self) -> bool {
        if self.intake.is_empty() {
            // Bytes that the kernel has; the end of the stream, or an error, does not count.
            let mut cx = Context::from_waker(Waker::noop());
            let _ = self.intake.poll_more(&mut self.stream, &mut cx, 0);
        }
        !self.intake.is_empty()
    }

    /// The exchange is complete in both directions: the next bytes are another request.
    pub fn become_idle(&mut self, since: Instant) {
        self.stage = Stage::Idle(since);
    }

    /// Takes the stream, and the bytes read ahead, for another protocol.
    pub fn take_stream(&mut self) -> Box<dyn Io> {
        let stream = mem::replace(&mut self.stream, Box::new(empty()));
        let unread = mem::take(&mut self.intake).into_unread();
        if unread.is_empty() { stream } else { Box::new(Prefixed::new(unread, stream)) }
    }

    /// Shuts down the write side.
    pub fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !matches!(self.stage, Stage::Closing(_)) {
            self.stage = Stage::Closing(Instant::now());
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    /// Reads and drops what still arrives, within limits, so that the last response reaches the client.
    pub fn poll_linger(&mut self, cx: &mut Context<'_>, read: &mut usize) -> Poll<()> {
        while *read < MAX_LINGER_BYTES {
            drop(mem::take(&mut self.intake).into_unread());
            match ready!(self.intake.poll_more(&mut self.stream, cx, u64::MAX)) {
                Ok(count @ 1..) => *read += count,
                Ok(0) | Err(_) => break,
            }
        }
        Poll::Ready(())
    }
}

impl fmt::Debug for ServerConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rest_of_request, stage, blocked, .. } = self;
        f.debug_struct("ServerConnection")
            .field("rest_of_request", rest_of_request)
            .field("stage", stage)
            .field("blocked", blocked)
            .finish()
    }
}
