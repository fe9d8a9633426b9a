//! An HTTP/1.1 connection to an endpoint, and the exchange it carries.
//!
//! All of it moves in the task of the call that uses it: nobody else is woken, and between calls nothing waits. Only a
//! request that is still being sent when its answer has begun gets a task, see [`Http1::send`].

mod line;
#[cfg(test)]
mod tests;

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    net::SocketAddr,
    num::NonZeroU64,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, StatusCode, Uri};
use http_body::Frame;
use tokio::{
    task::spawn_local,
    time::{Instant, timeout},
};

pub use self::line::Bodiless;
use self::line::Line;
use super::{
    RequestBody,
    connect::{ConnectError, Connected, Proof, connect},
    guards::{ConnectionSlot, Guards},
    local::LocalEndpoint,
    pool::{ConnectionSettings, retire_at},
    stream::{Idle, UpstreamIo},
};

use crate::{
    config::HeaderCase,
    header_names::X_OUTRIGGER_ATTEMPT,
    http1::{
        Error,
        head::{ResponseHead, Spelling, decimal, write_field},
        target::RawTarget,
    },
    net::{alpn::Speaks, io::SharedTcp},
    resilience::deadline::REQUEST_TIMEOUT,
};

/// An upload that goes on behind its answer, and of which the endpoint takes nothing.
const UPLOAD_STALL: Duration = Duration::from_secs(300);

/// How long a connection rests before it is reused where bytes may be on their way that no request asked for: the body
/// that some services send with a response to HEAD, or with a 204 or 304, comes right behind its head.
const SETTLE: Duration = Duration::from_millis(10);

/// Whether a connection can carry another exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    Reusable,
    Ends,
    /// It ends because more came than the response.
    Unsolicited,
}

/// An HTTP/1.1 connection. Dropped while it lies idle it says goodbye, as far as that needs no waiting.
#[derive(Debug)]
pub struct Http1 {
    // Shared with the task that sends what an early answer leaves to be sent. Handed from room to room: so it is small.
    opened: Rc<Opened>,
    pub idle_since: Instant,
    /// It rests until then, see [`SETTLE`].
    pub reusable_from: Instant,
    /// What `Keep-Alive: timeout=` said.
    pub told: Option<Duration>,
}

#[derive(Debug)]
struct Opened {
    line: RefCell<Line>,
    tcp: SharedTcp,
    keep_spelling: bool,
    retire_at: Option<Instant>,
    /// See [`ConnectionSettings`].
    lifts_user_timeout: bool,
    /// Who answered, where it is TLS.
    proof: Option<Box<Proof>>,
    // Last: its room is free when all else is.
    slot: ConnectionSlot,
}

/// A request's head, which stays with the caller of [`Http1::send`].
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    pub method: &'a Method,
    pub target: &'a Uri,
    /// Path and query as the client sent them, where `target` has another form of them.
    pub raw_target: Option<&'a RawTarget>,
    pub fields: &'a HeaderMap,
    pub spelling: Option<&'a Spelling>,
    pub told: Told,
}

/// What the next hop is told of a try, beside the fields, where it goes by HTTP/1.1.
#[derive(Clone, Copy, Debug, Default)]
pub struct Told {
    /// Which try of its call it is.
    pub attempt: Option<u32>,
    pub millis_left: Option<NonZeroU64>,
}

impl Told {
    /// Writes the fields that say so.
    pub fn write(self, out: &mut Vec<u8>) {
        let mut write = |name: &HeaderName, number: u64| {
            write_field(out, name.as_str().as_bytes(), decimal(&mut [0; 20], number));
        };
        if let Some(attempt) = self.attempt {
            write(&X_OUTRIGGER_ATTEMPT, attempt.into());
        }
        if let Some(millis) = self.millis_left {
            write(&REQUEST_TIMEOUT, millis.get());
        }
    }
}

impl Http1 {
    pub async fn open(
        endpoint: &LocalEndpoint,
        settings: &ConnectionSettings,
        guards: &Arc<Guards>,
    ) -> Result<Self, ConnectError> {
        let address = endpoint.shared.address;
        settings.queued.set(true);
        let slot = ConnectionSlot::take(guards).await;
        settings.queued.set(false);
        let slot = slot?;
        let connected = connect(address, settings.tcp, settings.tls.as_ref(), Speaks::Http1).await?;
        let slot = slot.opened(connected.protection());
        let Connected { io, tcp, proof } = connected;
        let now = Instant::now();
        let opened = Opened {
            line: RefCell::new(Line::new(io)),
            tcp,
            keep_spelling: settings.header_case == HeaderCase::Preserve,
            retire_at: retire_at(settings, proof.as_deref(), now),
            lifts_user_timeout: settings.lifts_user_timeout,
            proof,
            slot,
        };
        Ok(Self { opened: Rc::new(opened), idle_since: now, reusable_from: now, told: None })
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
        // The pool has looked at it in this very turn. Where the first write has to wait, it is looked at again.
        let (mut looked_at, mut broken) = (true, false);
        let answer = poll_fn(|cx| {
            let line = &mut *line.borrow_mut();
            if !looked_at && line.is_untouched() && line.look() != Idle::Quiet {
                return Poll::Ready(Err(Error::Closed));
            }
            looked_at = false;
            if !broken {
                match line.poll_request(cx) {
                    // The endpoint has closed the connection. It may have answered before (413 in the middle of an
                    // upload, or an alert that says what is wrong with our certificate): that lies in the kernel's
                    // buffer, and behind it is the end.
                    Poll::Ready(Err(Error::Io(error))) if is_end(&error) && !line.is_untouched() => {
                        broken = true
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    _ => {}
                }
            }
            if line.is_untouched() {
                return Poll::Pending;
            }
            line.poll_answer(cx, head.method, self.opened.keep_spelling, &mut interim)
        })
        .await?;
        let mut line = line.borrow_mut();
        if !broken && !line.is_sent() {
            spawn_local(upload(Rc::clone(&self.opened)));
        } else if answer.status == StatusCode::REQUEST_TIMEOUT
            && line.reused
            && !line.persists
            && head.method.is_idempotent()
        {
            // The service gave up waiting for a request just before this one arrived (RFC 9110 §15.5.9).
            line.heard = false;
            return Err(Error::Closed);
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
            line.give_up();
            return None;
        }
        if self.opened.lifts_user_timeout {
            self.opened.tcp.set_user_timeout(None);
        }
        let unread = std::mem::take(&mut line.intake).into_unread();
        line.io.take().map(|io| (io, unread))
    }

    /// A response was read to its end. `settles`: more may come than its endpoint was asked for.
    pub fn rest(&mut self, settles: bool, now: Instant) -> Rest {
        self.idle_since = now;
        let mut line = self.opened.line.borrow_mut();
        self.reusable_from = if settles { now + SETTLE } else { now };
        let persisted = line.persists;
        if line.listen() == Idle::Unsolicited && persisted {
            return Rest::Unsolicited;
        }
        let reusable = line.is_usable() && !self.opened.slot.is_claimed() && !self.is_retired(now);
        line.reused = true;
        if reusable { Rest::Reusable } else { Rest::Ends }
    }

    /// Why its last response had no body, whatever its fields said.
    pub fn bodiless(&self) -> Option<Bodiless> {
        self.opened.line.borrow().bodiless
    }

    /// Takes note of what has come while it lay idle, as far as the worker has been told: tickets, or its end.
    pub fn listen(&mut self) -> Idle {
        self.opened.line.borrow_mut().listen()
    }

    /// Looks whether anything has come while it lay idle. To be called just before a request is sent, in the same turn of
    /// the task: what comes later cannot be told from its response.
    pub fn look(&mut self) -> Idle {
        self.opened.line.borrow_mut().look()
    }

    /// Whether it was closed, as far as has been noted.
    pub fn is_closed(&self) -> bool {
        !self.opened.line.borrow().persists
    }

    /// The endpoint's address, for messages.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.opened.tcp.peer_addr().ok()
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

/// Whether an error of writing says that the endpoint has closed the connection, so that reading comes to an end as well.
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::BrokenPipe | K::ConnectionReset | K::ConnectionAborted | K::NotConnected)
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
