//! The bytes of a connection to an endpoint: how far a request on its way out has got, and its answer on its way in.

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

use super::Head;
use crate::{
    http1::{
        Error,
        decoder::Decoder,
        framing::{Framing, announced, content_length, has_no_body},
        head::{ResponseHead, parse_response, persists, write_fields, write_request_line},
        intake::{Intake, Part},
        outlet::Outlet,
    },
    present::Field,
    upstream::{
        BodyError, RequestBody,
        stream::{Idle, UpstreamIo},
    },
};

/// Both directions.
#[derive(Debug)]
pub(super) struct Line {
    /// None: what it was upgraded to has it.
    pub(super) io: Option<UpstreamIo>,
    pub(super) outlet: Outlet,
    /// What is still to be sent.
    request: Option<Sending>,
    pub(super) intake: Intake,
    /// Of the answer's body.
    pub(super) decoder: Decoder,
    /// A byte of the answer has come.
    pub(super) heard: bool,
    /// A byte of the request may have gone.
    pub(super) sent: bool,
    /// What was written may not be with the system yet.
    unflushed: bool,
    /// Both sides would use it again, so far.
    pub(super) persists: bool,
    /// It has carried an exchange before.
    pub(super) reused: bool,
    /// Why the response has no body, whatever its fields say.
    pub(super) bodiless: Option<Bodiless>,
    /// The task that sends what an early answer left to be sent.
    pub(super) uploader: Option<Waker>,
}

/// Why a response has no body by rule (RFC 9110 §6.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bodiless {
    Head,
    Status,
}

impl Bodiless {
    fn of(method: &Method, status: StatusCode) -> Option<Self> {
        match *method == Method::HEAD {
            true => Some(Self::Head),
            false => has_no_body(status).then_some(Self::Status),
        }
    }
}

/// A body on its way out.
#[derive(Debug)]
struct Sending {
    body: RequestBody,
    framing: Framing,
    /// The trailers that may follow are those that this head has announced.
    trailers: Option<HeaderMap>,
}

impl Line {
    pub(super) fn new(io: UpstreamIo) -> Self {
        Self {
            io: Some(io),
            outlet: Outlet::default(),
            request: None,
            intake: Intake::default(),
            decoder: Decoder::new(Framing::EMPTY),
            heard: false,
            sent: false,
            unflushed: false,
            persists: true,
            reused: false,
            bodiless: None,
            uploader: None,
        }
    }

    pub(super) fn begin(&mut self, head: Head<'_>, body: RequestBody) -> Result<(), Error> {
        (self.heard, self.sent) = (false, false);
        let empty = body.is_end_stream();
        let framing = match content_length(head.fields).map_err(Error::Unsendable)? {
            Some(length) => Framing::Length(length),
            // One that has turned out to be empty may have been announced.
            None if empty && !head.fields.contains_key(TRANSFER_ENCODING) => Framing::EMPTY,
            None => Framing::Chunked,
        };
        if empty && matches!(framing, Framing::Length(1..)) {
            return Err(Error::WrongLength);
        }
        let out = self.outlet.head();
        out.reserve(64 + 40 * head.fields.len());
        write_request_line(out, head.method, head.target, head.raw_target);
        write_fields(out, head.fields, head.spelling);
        head.told.write(out);
        out.extend_from_slice(b"\r\n");
        let trailers = || head.fields.contains_key(TRAILER).then(|| head.fields.clone());
        if !empty {
            self.request = Some(Sending { body, framing, trailers: trailers() });
        } else if framing == Framing::Chunked {
            self.outlet.end(framing);
        }
        Ok(())
    }

    /// Whether all of the request was written.
    pub(super) fn is_sent(&self) -> bool {
        self.request.is_none() && self.outlet.is_empty() && !self.unflushed
    }

    /// Nothing more comes of it, either way.
    pub(super) fn give_up(&mut self) {
        (self.io, self.request, self.persists) = (None, None, false);
        self.outlet = Outlet::default();
        if let Some(task) = self.uploader.take() {
            task.wake();
        }
    }

    pub(super) fn is_usable(&self) -> bool {
        self.persists && self.is_sent() && self.intake.is_empty() && self.decoder.is_over()
    }

    /// Sends what there is to be sent.
    pub(super) fn poll_request(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let polled = self.poll_send(cx);
        if let Poll::Ready(Err(_)) = polled {
            (self.request, self.persists) = (None, false);
            self.outlet = Outlet::default();
        }
        polled
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let Some(io) = &mut self.io else { return Poll::Ready(Ok(())) };
        loop {
            // What the body has goes out together with what goes before it.
            while self.outlet.has_room()
                && let Some(sending) = &mut self.request
            {
                let Poll::Ready(frame) = Pin::new(&mut sending.body).poll_frame(cx) else { break };
                if sending.put(frame, &mut self.outlet)? {
                    self.request = None;
                }
            }
            if self.outlet.is_empty() {
                ready!(Pin::new(&mut *io).poll_flush(cx))?;
                self.unflushed = false;
                return if self.request.is_none() { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
            let left = self.outlet.left();
            let written = self.outlet.poll_write(io, cx);
            if self.outlet.left() < left {
                (self.sent, self.unflushed) = (true, true);
            }
            ready!(written)?;
        }
    }

    /// Reads the head of the answer, and those that come before it.
    pub(super) fn poll_answer(
        &mut self,
        cx: &mut Context<'_>,
        method: &Method,
        keep_spelling: bool,
        interim: &mut impl FnMut(StatusCode, HeaderMap),
    ) -> Poll<Result<ResponseHead, Error>> {
        let Some(io) = &mut self.io else { return Poll::Ready(Err(Error::Closed)) };
        loop {
            let head = self.intake.poll_head(io, cx, |came| {
                self.heard = true;
                parse_response(came, keep_spelling)
            });
            let head = ready!(head).inspect_err(|_| self.persists = false)?;
            if head.status.is_informational() && head.status != StatusCode::SWITCHING_PROTOCOLS {
                interim(head.status, head.fields);
                continue;
            }
            let framing = Framing::of_response(method, head.status, head.version, &head.fields, head.present)
                .inspect_err(|_| self.persists = false)?;
            self.decoder = Decoder::new(framing);
            self.bodiless = Bodiless::of(method, head.status);
            // Where its end is told twice, others may have taken it for another one (RFC 9112 §6.3).
            let unclear = framing == Framing::Chunked && head.present.has(Field::ContentLength);
            self.persists &= persists(head.version, head.connection, &head.fields, head.present)
                && framing != Framing::UntilClose
                && !unclear;
            return Poll::Ready(Ok(head));
        }
    }

    pub(super) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let Some(io) = &mut self.io else { return Poll::Ready(None) };
        let part = ready!(self.intake.poll_body(io, cx, &mut self.decoder));
        if part.is_err() {
            self.persists = false;
        }
        Poll::Ready(part.transpose().map(|part| {
            part.map(|part| match part {
                Part::Data(data) => Frame::data(data),
                Part::Trailers(trailers) => Frame::trailers(trailers),
            })
        }))
    }

    /// Takes note of what has come although nothing was asked for, as far as the worker has been told of it: costs no
    /// system call where it has not.
    pub(super) fn listen(&mut self) -> Idle {
        let mut idle = Idle::of_bytes(self.intake.unread());
        if idle == Idle::Quiet {
            let Some(io) = &mut self.io else { return Idle::Closed };
            // Not to wait for the task's next turn, which says nothing of what has come.
            let more = unconstrained(poll_fn(|cx| self.intake.poll_more(io, cx, 0)));
            idle = match pin!(more).poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Pending => Idle::Quiet,
                Poll::Ready(Ok(1..)) => Idle::of_bytes(self.intake.unread()),
                Poll::Ready(_) => Idle::Closed,
            };
        }
        self.persists &= idle == Idle::Quiet;
        idle
    }

    /// The same, but the kernel is asked.
    pub(super) fn look(&mut self) -> Idle {
        let idle = self.io.as_mut().map_or(Idle::Closed, UpstreamIo::look);
        self.persists &= idle == Idle::Quiet;
        idle
    }

    /// Whether a connection that carried an exchange before has not taken a byte of the present request. Nothing that
    /// comes on it can be a response to that.
    pub(super) const fn is_untouched(&self) -> bool {
        self.reused && !self.sent
    }
}

impl Sending {
    /// Puts the next part of the body into the outlet. Says whether it was the last one.
    fn put(
        &mut self,
        frame: Option<Result<Frame<Bytes>, BodyError>>,
        outlet: &mut Outlet,
    ) -> Result<bool, Error> {
        let Some(frame) = frame else {
            if matches!(self.framing, Framing::Length(1..)) {
                return Err(Error::WrongLength);
            }
            outlet.end(self.framing);
            return Ok(true);
        };
        let frame = frame.map_err(|_| Error::BrokenOff)?;
        let last = self.body.is_end_stream();
        match frame.into_data() {
            Ok(data) => {
                if let Framing::Length(left) = &mut self.framing {
                    *left = left.checked_sub(data.len() as u64).ok_or(Error::WrongLength)?;
                    if last && *left > 0 {
                        return Err(Error::WrongLength);
                    }
                }
                outlet.data(self.framing, data, last);
                Ok(last)
            }
            Err(frame) => {
                let trailers = frame.into_trailers().unwrap_or_default();
                let head = self.trailers.take().unwrap_or_default();
                outlet.trailers(self.framing, &announced(&head, trailers));
                Ok(true)
            }
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // With a call on it, there is no good end.
        if self.is_usable()
            && let Some(io) = &mut self.io
        {
            let _ = Pin::new(io).poll_shutdown(&mut Context::from_waker(Waker::noop()));
        }
    }
}
