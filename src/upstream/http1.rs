//! An HTTP/1.1 connection to an endpoint, and the exchange it carries.
//!
//! All of it moves in the task of the call that uses it: nobody else is woken, and between calls nothing waits. Only a
//! request that is still being sent when its answer has begun gets a task, see [`Http1::send`].

#[cfg(test)]
mod tests;

use std::{
    cell::RefCell,
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Uri};
use http_body::{Body, Frame};
use tokio::{io::AsyncWrite, task::spawn_local, time::Instant};

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
    /// Both sides would use it again, so far.
    persists: bool,
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
            let opened = Rc::clone(&self.opened);
            // If it fails, whoever reads the answer sees it, too.
            spawn_local(poll_fn(move |cx| opened.line.borrow_mut().poll_request(cx).map(drop)));
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

    /// Whether it can carry another request: not closed, and nothing unasked-for has come.
    pub fn is_quiet(&self) -> bool {
        if self.proof().is_some() { self.opened.tcp.is_quiet_tls() } else { self.opened.tcp.is_quiet() }
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
            persists: true,
        }
    }

    fn begin(&mut self, head: Head<'_>, body: RequestBody) -> Result<(), Error> {
        (self.heard, self.sent) = (false, false);
        let empty = body.is_end_stream();
        let framing = match content_length(head.fields)? {
            Some(length) => Framing::Length(length),
            None if empty => Framing::EMPTY,
            None => Framing::Chunked,
        };
        let out = self.outlet.head();
        out.reserve(64 + 40 * head.fields.len());
        write_request_line(out, head.method, head.target);
        write_fields(out, head.fields, head.spelling);
        out.extend_from_slice(b"\r\n");
        let trailers = || head.fields.contains_key(http::header::TRAILER).then(|| head.fields.clone());
        if !empty {
            self.request = Some(Sending { body, framing, trailers: trailers() });
        } else if framing != Framing::EMPTY {
            return Err(Error::WrongLength);
        }
        Ok(())
    }

    /// Whether all of the request was written.
    fn is_sent(&self) -> bool {
        self.request.is_none() && self.outlet.is_empty()
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
                return if self.request.is_none() { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
            ready!(self.outlet.poll_write(io, cx))?;
            self.sent = true;
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
            self.persists &= persists(head.version, &head.fields) && framing != Framing::UntilClose;
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
            let mut cx = Context::from_waker(Waker::noop());
            self.persists &= self.intake.poll_more(io, &mut cx, 0).is_pending();
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
