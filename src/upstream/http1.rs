//! An HTTP/1.1 connection to an endpoint, and the exchange it carries.
//!
//! All of it moves in the task of the call that uses it: nobody else is woken, and between calls nothing waits. Only a
//! request that is still being sent when its answer has begun gets a task, see [`Http1::send`].

#[cfg(test)]
mod tests;

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, Method, StatusCode, Uri,
    header::{CONTENT_LENGTH, TRAILER, TRANSFER_ENCODING},
};
use http_body::{Body, Frame};
use tokio::{
    io::AsyncWrite,
    task::{coop::unconstrained, spawn_local},
    time::{Instant, timeout},
};

use super::{
    connect::{ConnectError, Connected, Proof, connect},
    guards::{ConnectionSlot, Guards},
    local::LocalEndpoint,
    pool::{ConnectionSettings, retire_at},
    stream::UpstreamIo,
};
use crate::{
    config::HeaderCase,
    http1::{
        Error,
        framing::{Decoder, Framing, announced, content_length},
        head::{ResponseHead, Spelling, parse_response, persists, write_fields, write_request_line},
        intake::{Intake, Part},
        outlet::Outlet,
    },
    identity::handshake::Speaks,
    proxy::{body::RequestBody, io::SharedTcp},
};

/// An upload that goes on behind its answer, and of which the endpoint takes nothing.
const UPLOAD_STALL: Duration = Duration::from_secs(300);

/// An HTTP/1.1 connection. Dropped while it lies idle it says goodbye, as far as that needs no waiting.
#[derive(Debug)]
pub struct Http1 {
    // Shared with the task that sends what an early answer leaves to be sent. Handed from room to room: so it is small.
    opened: Rc<Opened>,
    pub idle_since: Instant,
    /// What `Keep-Alive: timeout=` said.
    pub told: Option<Duration>,
}

#[derive(Debug)]
struct Opened {
    line: RefCell<Line>,
    tcp: SharedTcp,
    keep_spelling: bool,
    retire_at: Option<Instant>,
    /// Who answered, where it is TLS.
    proof: Option<Box<Proof>>,
    // Last: its room is free when all else is.
    slot: ConnectionSlot,
}

/// Both directions.
#[derive(Debug)]
struct Line {
    /// None: what it was upgraded to has it.
    io: Option<UpstreamIo>,
    outlet: Outlet,
    /// What is still to be sent.
    request: Option<Sending>,
    intake: Intake,
    /// Of the answer's body.
    decoder: Decoder,
    /// A byte of the answer has come.
    heard: bool,
    /// A byte of the request may have gone.
    sent: bool,
    /// What was written may not be with the system yet.
    unflushed: bool,
    /// Both sides would use it again, so far.
    persists: bool,
    /// The task that sends what an early answer left to be sent.
    uploader: Option<Waker>,
}

/// A body on its way out.
#[derive(Debug)]
struct Sending {
    body: RequestBody,
    framing: Framing,
    /// The trailers that may follow are those that this head has announced.
    trailers: Option<HeaderMap>,
}

/// A request's head, which stays with the caller of [`Http1::send`].
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    pub method: &'a Method,
    pub target: &'a Uri,
    pub fields: &'a HeaderMap,
    pub spelling: Option<&'a Spelling>,
}

impl Http1 {
    pub async fn open(
        endpoint: &LocalEndpoint,
        settings: &ConnectionSettings,
        guards: &Arc<Guards>,
    ) -> Result<Self, ConnectError> {
        let address = endpoint.shared.address;
        let slot = ConnectionSlot::take(guards).await?;
        let connected =
            connect(address, settings.connect_timeout, settings.tls.as_ref(), Speaks::Http1).await?;
        let slot = slot.opened(connected.protection());
        let Connected { io, tcp, proof } = connected;
        let now = Instant::now();
        let opened = Opened {
            line: RefCell::new(Line::new(io)),
            tcp,
            keep_spelling: settings.header_case == HeaderCase::Preserve,
            retire_at: retire_at(settings, proof.as_deref(), now),
            proof,
            slot,
        };
        Ok(Self { opened: Rc::new(opened), idle_since: now, told: None })
    }

    /// Sends a request and waits for the head of its answer. `interim` is told of those that come before it (1xx).
    ///
    /// What an early answer leaves to be sent goes on in a task of its own, whether or not anybody reads the answer:
    /// a server may wait for the one before it goes on with the other.
    pub async fn send(
        &mut self,
        head: Head<'_>,
        body: RequestBody,
        mut interim: impl FnMut(StatusCode, HeaderMap),
    ) -> Result<ResponseHead, Error> {
        let line = &self.opened.line;
        line.borrow_mut().begin(head, body)?;
        let answer = poll_fn(|cx| {
            let line = &mut *line.borrow_mut();
            // What was said before sending failed, is still to be read.
            let sending = line.poll_request(cx);
            match line.poll_answer(cx, head.method, self.opened.keep_spelling, &mut interim) {
                Poll::Pending => match sending {
                    Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                    _ => Poll::Pending,
                },
                answered => answered,
            }
        })
        .await?;
        if !line.borrow().is_sent() {
            spawn_local(upload(Rc::clone(&self.opened)));
        }
        Ok(answer)
    }

    /// Polls the next part of the answer's body.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        self.opened.line.borrow_mut().poll_frame(cx)
    }

    /// Whether the answer's body is over, as far as can be told without reading on.
    pub fn is_end_stream(&self) -> bool {
        self.opened.line.borrow().decoder.is_over()
    }

    /// How long the rest of the answer's body is, where that was told.
    pub fn length(&self) -> Option<u64> {
        self.opened.line.borrow().decoder.length()
    }

    /// What it was upgraded from, and what has come on it already.
    pub fn take_stream(&mut self) -> Option<(UpstreamIo, Bytes)> {
        let mut line = self.opened.line.borrow_mut();
        line.persists = false;
        if !line.is_sent() {
            // What is left of the request would be taken for the new protocol.
            return None;
        }
        let unread = std::mem::take(&mut line.intake).into_unread();
        line.io.take().map(|io| (io, unread))
    }

    /// A call is over and was read to its end. Says whether the connection may be used again.
    pub fn rest(&mut self, now: Instant) -> bool {
        self.idle_since = now;
        let mut line = self.opened.line.borrow_mut();
        line.listen();
        line.is_usable() && !self.opened.slot.is_claimed() && !self.is_retired(now)
    }

    /// Takes note of what has come while it lay idle: tickets, or its end.
    pub fn listen(&mut self) {
        self.opened.line.borrow_mut().listen();
    }

    /// Whether it was closed, as far as has been noted.
    pub fn is_closed(&self) -> bool {
        !self.opened.line.borrow().persists
    }

    /// Whether it can carry another request: not closed, and nothing unasked-for has come. By TLS something may come that
    /// is nothing: that has to be read.
    pub fn is_quiet(&mut self) -> bool {
        if self.proof().is_some() {
            self.listen();
            return !self.is_closed();
        }
        self.opened.tcp.is_quiet()
    }

    pub fn is_retired(&self, now: Instant) -> bool {
        self.opened.retire_at.is_some_and(|at| now >= at)
    }

    pub fn proof(&self) -> Option<&Proof> {
        self.opened.proof.as_deref()
    }

    /// Whether a byte of an answer came.
    pub fn heard_anything(&self) -> bool {
        self.opened.line.borrow().heard
    }

    /// Whether a byte of the request may have reached the endpoint.
    pub fn sent_anything(&self) -> bool {
        self.opened.line.borrow().sent
    }
}

/// Sends what an early answer has left to be sent, for as long as it is taken.
async fn upload(opened: Rc<Opened>) {
    loop {
        let before = opened.line.borrow().outlet.written_so_far();
        let sent = poll_fn(|cx| {
            let mut line = opened.line.borrow_mut();
            line.uploader = Some(cx.waker().clone());
            line.poll_request(cx).map(drop)
        });
        if timeout(UPLOAD_STALL, sent).await.is_ok() {
            return;
        }
        let mut line = opened.line.borrow_mut();
        if line.outlet.written_so_far() == before {
            return line.give_up();
        }
    }
}

impl Drop for Http1 {
    fn drop(&mut self) {
        let mut line = self.opened.line.borrow_mut();
        if !line.decoder.is_over() {
            // Nobody waits for the answer any more: neither is the request sent to its end.
            line.give_up();
        }
    }
}

impl Line {
    fn new(io: UpstreamIo) -> Self {
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
            uploader: None,
        }
    }

    fn begin(&mut self, head: Head<'_>, body: RequestBody) -> Result<(), Error> {
        (self.heard, self.sent) = (false, false);
        let empty = body.is_end_stream();
        let framing = match content_length(head.fields)? {
            Some(length) => Framing::Length(length),
            // One that has turned out to be empty may have been announced.
            None if empty && !head.fields.contains_key(TRANSFER_ENCODING) => Framing::EMPTY,
            None => Framing::Chunked,
        };
        let out = self.outlet.head();
        out.reserve(64 + 40 * head.fields.len());
        write_request_line(out, head.method, head.target);
        write_fields(out, head.fields, head.spelling);
        out.extend_from_slice(b"\r\n");
        let trailers = || head.fields.contains_key(TRAILER).then(|| head.fields.clone());
        if !empty {
            self.request = Some(Sending { body, framing, trailers: trailers() });
        } else if framing == Framing::Chunked {
            self.outlet.end(framing);
        } else if framing != Framing::EMPTY {
            return Err(Error::WrongLength);
        }
        Ok(())
    }

    /// Whether all of the request was written.
    fn is_sent(&self) -> bool {
        self.request.is_none() && self.outlet.is_empty() && !self.unflushed
    }

    /// Nothing more comes of it, either way.
    fn give_up(&mut self) {
        (self.io, self.request, self.persists) = (None, None, false);
        self.outlet = Outlet::default();
        if let Some(task) = self.uploader.take() {
            task.wake();
        }
    }

    fn is_usable(&self) -> bool {
        self.persists && self.is_sent() && self.intake.is_empty() && self.decoder.is_over()
    }

    /// Sends what there is to be sent.
    fn poll_request(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
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
    fn poll_answer(
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
            let framing = Framing::of_response(method, head.status, head.version, &head.fields)
                .inspect_err(|_| self.persists = false)?;
            self.decoder = Decoder::new(framing);
            // Where its end is told twice, others may have taken it for another one (RFC 9112 §6.3).
            let unclear = framing == Framing::Chunked && head.fields.contains_key(CONTENT_LENGTH);
            self.persists &=
                persists(head.version, &head.fields) && framing != Framing::UntilClose && !unclear;
            return Poll::Ready(Ok(head));
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
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

    /// Takes note of what comes without being asked for: its end, or what makes it useless. Tickets are neither.
    fn listen(&mut self) {
        if let Some(io) = &mut self.io {
            // Not to wait for the task's next turn, which says nothing of what has come.
            let more = unconstrained(poll_fn(|cx| self.intake.poll_more(io, cx, 0)));
            self.persists &= pin!(more).poll(&mut Context::from_waker(Waker::noop())).is_pending();
        }
    }
}

impl Sending {
    /// Puts the next part of the body into the outlet. Says whether it was the last one.
    fn put(
        &mut self,
        frame: Option<Result<Frame<Bytes>, crate::proxy::body::BodyError>>,
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
