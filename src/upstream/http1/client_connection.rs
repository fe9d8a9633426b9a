//! The protocol state of an HTTP/1.1 connection to an endpoint. States and wakers: see the [parent module](super).

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::{Context, Poll, Waker, ready},
};

use bytes::Bytes;
use http::{
    HeaderMap, Method, StatusCode,
    header::{TRAILER, TRANSFER_ENCODING},
};
use http_body::{Body, Frame};
use tokio::{io::AsyncWrite, task::coop::unconstrained};

use super::OutgoingHead;
use crate::{
    field_set::Field,
    http1::{
        Error,
        decoder::Decoder,
        framing::{Framing, content_length, has_no_body, retain_announced_trailers},
        head::{ResponseHead, is_persistent, parse_response, write_fields, write_request_line},
        read_buffer::{BodyPart, ReadBuffer},
        write_buffer::WriteBuffer,
    },
    upstream::{
        BodyError, RequestBody,
        stream::{IdleState, UpstreamIo},
    },
};

/// Both directions of a connection.
#[derive(Debug)]
pub(super) struct ClientConnection {
    /// None: the connection was aborted, or handed out after an upgrade.
    pub(super) io: Option<UpstreamIo>,
    pub(super) write_buffer: WriteBuffer,
    /// The body that is still to be sent.
    request: Option<OutgoingBody>,
    pub(super) read_buffer: ReadBuffer,
    pub(super) response: ResponseStage,
    /// A byte of the response was received.
    pub(super) has_received_bytes: bool,
    /// A byte of the request may have been sent.
    pub(super) has_sent_bytes: bool,
    /// Written bytes may still be buffered by TLS.
    unflushed: bool,
    /// Both sides keep the connection alive so far (RFC 9112 §9.3).
    pub(super) is_persistent: bool,
    /// It has carried a request before.
    pub(super) is_reused: bool,
    /// Why the response has no body regardless of its header fields.
    pub(super) no_body_reason: Option<NoBodyReason>,
    /// The waker of the upload task, so that `abort` can end it.
    pub(super) upload_waker: Option<Waker>,
}

/// Why a response has no body by rule (RFC 9110 §6.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoBodyReason {
    Head,
    Status,
}

impl NoBodyReason {
    fn of(method: &Method, status: StatusCode) -> Option<Self> {
        match *method == Method::HEAD {
            true => Some(Self::Head),
            false => has_no_body(status).then_some(Self::Status),
        }
    }
}

/// How far the response has been read. How far the request has been written is [`ClientConnection::is_sent`].
#[derive(Debug)]
pub(super) enum ResponseStage {
    /// No request awaits a response.
    Ended,
    /// A request was started; its final response head was not read yet.
    HeadAwaited,
    /// The response body is read. It has ended when the decoder is complete.
    Body(Decoder),
}

impl ResponseStage {
    /// Whether nothing more of a response is to be read.
    pub(super) const fn has_ended(&self) -> bool {
        match self {
            Self::Ended => true,
            Self::HeadAwaited => false,
            Self::Body(decoder) => decoder.is_complete(),
        }
    }

    /// The remaining length of the response body, if known.
    pub(super) const fn remaining_length(&self) -> Option<u64> {
        match self {
            Self::Ended => Some(0),
            Self::HeadAwaited => None,
            Self::Body(decoder) => decoder.remaining_length(),
        }
    }
}

/// The states of the diagram in the [parent module](super).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Idle,
    Sending,
    Waiting,
    Uploading,
    UploadOnly,
    Reading,
    /// Aborted, or handed out after an upgrade.
    Gone,
}

/// A request body that is being sent.
#[derive(Debug)]
struct OutgoingBody {
    body: RequestBody,
    framing: Framing,
    /// The request head, if it announces trailers: only announced ones are sent.
    trailers: Option<HeaderMap>,
}

impl ClientConnection {
    pub(super) fn new(io: UpstreamIo) -> Self {
        Self {
            io: Some(io),
            write_buffer: WriteBuffer::default(),
            request: None,
            read_buffer: ReadBuffer::default(),
            response: ResponseStage::Ended,
            has_received_bytes: false,
            has_sent_bytes: false,
            unflushed: false,
            is_persistent: true,
            is_reused: false,
            no_body_reason: None,
            upload_waker: None,
        }
    }

    pub(super) fn start_request(&mut self, head: OutgoingHead<'_>, body: RequestBody) -> Result<(), Error> {
        debug_assert_eq!(self.state(), State::Idle, "a request was started in the middle of another one");
        (self.has_received_bytes, self.has_sent_bytes) = (false, false);
        let empty = body.is_end_stream();
        let framing = match content_length(head.fields).map_err(Error::Unsendable)? {
            Some(length) => Framing::Length(length),
            // A body that turned out to be empty may have been announced as chunked.
            None if empty && !head.fields.contains_key(TRANSFER_ENCODING) => Framing::EMPTY,
            None => Framing::Chunked,
        };
        if empty && matches!(framing, Framing::Length(1..)) {
            return Err(Error::LengthMismatch);
        }
        let out = self.write_buffer.head_buffer();
        out.reserve(64 + 40 * head.fields.len());
        write_request_line(out, head.method, head.target, head.raw_target);
        write_fields(out, head.fields, head.spelling);
        head.attempt_fields.write(out);
        out.extend_from_slice(b"\r\n");
        let trailers = || head.fields.contains_key(TRAILER).then(|| head.fields.clone());
        if !empty {
            self.request = Some(OutgoingBody { body, framing, trailers: trailers() });
        } else if framing == Framing::Chunked {
            self.write_buffer.push_end(framing);
        }
        self.response = ResponseStage::HeadAwaited;
        Ok(())
    }

    /// The state that the two directions are in together.
    pub(super) fn state(&self) -> State {
        if self.io.is_none() {
            return State::Gone;
        }
        match (self.is_sent(), &self.response) {
            (false, ResponseStage::HeadAwaited) => State::Sending,
            (true, ResponseStage::HeadAwaited) => State::Waiting,
            (sent, response) => match (sent, response.has_ended()) {
                (false, false) => State::Uploading,
                (false, true) => State::UploadOnly,
                (true, false) => State::Reading,
                (true, true) => State::Idle,
            },
        }
    }

    /// Whether the whole request was written and flushed.
    pub(super) fn is_sent(&self) -> bool {
        self.request.is_none() && self.write_buffer.is_empty() && !self.unflushed
    }

    /// Aborts both directions and wakes the upload task so that it ends.
    pub(super) fn abort(&mut self) {
        (self.io, self.request, self.is_persistent) = (None, None, false);
        self.write_buffer = WriteBuffer::default();
        // Its waker in the socket is gone: wake the task, so that it finds no `io` and ends.
        if let Some(task) = self.upload_waker.take() {
            task.wake();
        }
    }

    pub(super) fn is_usable(&self) -> bool {
        self.is_persistent && self.is_sent() && self.read_buffer.is_empty() && self.response.has_ended()
    }

    /// Writes as much of the request as possible. Ready when all of it is written and flushed.
    pub(super) fn poll_request(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let polled = self.poll_send(cx);
        if let Poll::Ready(Err(_)) = polled {
            (self.request, self.is_persistent) = (None, false);
            self.write_buffer = WriteBuffer::default();
        }
        polled
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let Some(io) = &mut self.io else { return Poll::Ready(Ok(())) };
        loop {
            // Batch the body with the head, or with earlier data, in one write.
            while self.write_buffer.accepts_more()
                && let Some(outgoing) = &mut self.request
            {
                let Poll::Ready(frame) = Pin::new(&mut outgoing.body).poll_frame(cx) else { break };
                if outgoing.put(frame, &mut self.write_buffer)? {
                    self.request = None;
                }
            }
            if self.write_buffer.is_empty() {
                ready!(Pin::new(&mut *io).poll_flush(cx))?;
                self.unflushed = false;
                return if self.request.is_none() { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
            let left = self.write_buffer.remaining();
            let written = self.write_buffer.poll_write(io, cx);
            if self.write_buffer.remaining() < left {
                (self.has_sent_bytes, self.unflushed) = (true, true);
            }
            ready!(written)?;
        }
    }

    /// Reads the response head, and the interim responses before it.
    pub(super) fn poll_response_head(
        &mut self,
        cx: &mut Context<'_>,
        method: &Method,
        keep_spelling: bool,
        interim: &mut impl FnMut(StatusCode, HeaderMap),
    ) -> Poll<Result<ResponseHead, Error>> {
        let Some(io) = &mut self.io else { return Poll::Ready(Err(Error::Closed)) };
        loop {
            let head = self.read_buffer.poll_head(io, cx, |input| {
                self.has_received_bytes = true;
                parse_response(input, keep_spelling)
            });
            let head = ready!(head).inspect_err(|_| self.is_persistent = false)?;
            if head.status.is_informational() && head.status != StatusCode::SWITCHING_PROTOCOLS {
                interim(head.status, head.fields);
                continue;
            }
            let framing = Framing::of_response(method, head.status, head.version, &head.fields, head.present)
                .inspect_err(|_| self.is_persistent = false)?;
            self.response = ResponseStage::Body(Decoder::new(framing));
            self.no_body_reason = NoBodyReason::of(method, head.status);
            // A message with two lengths may have been framed differently by another recipient (RFC 9112 §6.3).
            let ambiguous = framing == Framing::Chunked && head.present.has(Field::ContentLength);
            self.is_persistent &= is_persistent(head.version, head.connection, &head.fields, head.present)
                && framing != Framing::UntilClose
                && !ambiguous
                // What follows is another protocol, whether or not its stream is taken.
                && head.status != StatusCode::SWITCHING_PROTOCOLS;
            return Poll::Ready(Ok(head));
        }
    }

    pub(super) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let (Some(io), ResponseStage::Body(decoder)) = (&mut self.io, &mut self.response) else {
            return Poll::Ready(None);
        };
        let part = ready!(self.read_buffer.poll_body(io, cx, decoder));
        if part.is_err() {
            self.is_persistent = false;
        }
        Poll::Ready(part.transpose().map(|part| {
            part.map(|part| match part {
                BodyPart::Data(data) => Frame::data(data),
                BodyPart::Trailers(trailers) => Frame::trailers(trailers),
            })
        }))
    }

    /// Records bytes received without a request, as far as the runtime knows of them: without new readiness this
    /// costs no system call.
    pub(super) fn check_idle_readiness(&mut self) -> IdleState {
        let mut idle = IdleState::of_bytes(self.read_buffer.unread());
        if idle == IdleState::Quiet {
            let Some(io) = &mut self.io else { return IdleState::Closed };
            // Unconstrained: with its cooperative budget used up, a task would see "pending" whatever was received.
            // The no-op waker is fine, because nothing waits on an idle connection.
            let more = unconstrained(poll_fn(|cx| self.read_buffer.poll_more(io, cx, 0)));
            idle = match pin!(more).poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Pending => IdleState::Quiet,
                Poll::Ready(Ok(1..)) => IdleState::of_bytes(self.read_buffer.unread()),
                Poll::Ready(_) => IdleState::Closed,
            };
        }
        self.is_persistent &= idle == IdleState::Quiet;
        idle
    }

    /// The same, but asks the kernel.
    pub(super) fn check_idle(&mut self) -> IdleState {
        let idle = self.io.as_mut().map_or(IdleState::Closed, UpstreamIo::check_idle);
        self.is_persistent &= idle == IdleState::Quiet;
        idle
    }

    /// Whether a reused connection has not sent a byte of the present request. Nothing received on it can be its
    /// response.
    pub(super) const fn is_reused_and_unsent(&self) -> bool {
        self.is_reused && !self.has_sent_bytes
    }
}

impl OutgoingBody {
    /// Writes the next frame of the body into the buffer. Returns whether it was the last.
    fn put(
        &mut self,
        frame: Option<Result<Frame<Bytes>, BodyError>>,
        outlet: &mut WriteBuffer,
    ) -> Result<bool, Error> {
        let Some(frame) = frame else {
            if matches!(self.framing, Framing::Length(1..)) {
                return Err(Error::LengthMismatch);
            }
            outlet.push_end(self.framing);
            return Ok(true);
        };
        let frame = frame.map_err(|_| Error::BodyEndedEarly)?;
        let last = self.body.is_end_stream();
        match frame.into_data() {
            Ok(data) => {
                if let Framing::Length(left) = &mut self.framing {
                    *left = left.checked_sub(data.len() as u64).ok_or(Error::LengthMismatch)?;
                    if last && *left > 0 {
                        return Err(Error::LengthMismatch);
                    }
                }
                outlet.push_data(self.framing, data, last);
                Ok(last)
            }
            Err(frame) => {
                let trailers = frame.into_trailers().unwrap_or_default();
                let head = self.trailers.take().unwrap_or_default();
                outlet.push_trailers(self.framing, &retain_announced_trailers(&head, trailers));
                Ok(true)
            }
        }
    }
}

impl Drop for ClientConnection {
    fn drop(&mut self) {
        // With a request in progress, a graceful close would be wrong.
        if self.is_usable()
            && let Some(io) = &mut self.io
        {
            let _ = Pin::new(io).poll_shutdown(&mut Context::from_waker(Waker::noop()));
        }
    }
}
