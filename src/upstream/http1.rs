//! An HTTP/1.1 connection to an endpoint.
//!
//! hyper has two halves of one: who asks, and who moves the bytes. The second is polled by whoever uses the connection,
//! in the same task: a call that goes well needs no other task to be woken and wakes none. Only what has to move while
//! nobody looks gets a task of its own, see [`Http1::set_free`].

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1},
};
use hyper_util::rt::TokioIo;
use tokio::{task::spawn_local, time::Instant};

use super::{
    connect::{ConnectError, Connected, Proof, connect},
    guards::{ConnectionSlot, Guards},
    heard::{Ear, Heard},
    local::LocalEndpoint,
    pool::{ConnectionSettings, MAX_HEADER_BYTES, retire_at},
};
use crate::{
    config::HeaderCase,
    identity::handshake::Speaks,
    proxy::{body::RequestBody, io::SharedTcp},
};

/// An HTTP/1.1 connection. Dropped while it lies idle it says goodbye, as far as that needs no waiting.
#[derive(Debug)]
pub struct Http1 {
    // Before `bytes`, which then knows that no more requests come.
    sender: http1::SendRequest<RequestBody>,
    bytes: Bytes,
    tcp: SharedTcp,
    /// Whether a byte of an answer has come.
    ear: Ear,
    pub idle_since: Instant,
    /// What `Keep-Alive: timeout=` said.
    pub told: Option<Duration>,
    retire_at: Option<Instant>,
    /// Who answered, where it is TLS.
    pub proof: Option<Box<Proof>>,
    /// Held here, too: an upgrade ends hyper's part, but not the connection.
    slot: Rc<ConnectionSlot>,
}

/// The half that moves bytes.
#[derive(Default)]
struct Bytes {
    /// None: it has ended, or a task of its own polls it.
    mover: Option<Pin<Box<dyn Future<Output = hyper::Result<()>>>>>,
    /// A call is on it.
    in_use: bool,
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
        let slot = Rc::new(slot.opened(connected.protection()));
        let Connected { io, tcp, proof } = connected;
        let ear = Ear::default();
        let (sender, connection) = http1::Builder::new()
            .max_header_size(MAX_HEADER_BYTES)
            .preserve_header_case(settings.header_case == HeaderCase::Preserve)
            .handshake(TokioIo::new(Heard::new(io, ear.clone())))
            .await
            .map_err(|error| ConnectError::Handshake { address, reason: error.to_string() })?;
        let bytes = Bytes { mover: Some(Box::pin(connection.with_upgrades())), in_use: false };
        let now = Instant::now();
        let retire_at = retire_at(settings, proof.as_deref(), now);
        Ok(Self { sender, bytes, tcp, ear, idle_since: now, told: None, retire_at, proof, slot })
    }

    /// Sends a request and waits for the head of its answer.
    pub async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        self.ear.listen();
        self.bytes.in_use = true;
        let sent = request.body().sent();
        let mut answer = pin!(self.sender.try_send_request(request));
        let answer = poll_fn(|cx| {
            self.bytes.move_on(cx);
            self.bytes.poll_what_came(cx, |cx| answer.as_mut().poll(cx))
        })
        .await?;
        if !sent.is_whole() || answer.status() == http::StatusCode::SWITCHING_PROTOCOLS {
            self.set_free();
        }
        Ok(answer)
    }

    /// Polls what comes by this connection: a part of an answer's body.
    pub fn poll_part<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut part: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        if let Poll::Ready(part) = self.bytes.poll_what_came(cx, &mut part) {
            return Poll::Ready(part);
        }
        if self.bytes.mover.is_none() {
            return Poll::Pending;
        }
        self.bytes.move_on(cx);
        self.bytes.poll_what_came(cx, part)
    }

    /// Has a task move the bytes from here on. For a request that goes on after its answer has begun, whether or not
    /// anybody reads that; and for an upgrade, which comes about after the answer.
    fn set_free(&mut self) {
        let Some(mover) = self.bytes.mover.take() else { return };
        let held = Rc::clone(&self.slot);
        spawn_local(async move {
            let _held = held;
            // Its error reaches the call by the sender.
            let _ = mover.await;
        });
    }

    /// Ready for another request, or not to be used again.
    pub async fn ready(&mut self) -> bool {
        if self.sender.is_ready() {
            return true;
        }
        let ready = poll_fn(|cx| {
            self.bytes.move_on(cx);
            self.bytes.poll_what_came(cx, |cx| self.sender.poll_ready(cx))
        });
        ready.await.is_ok()
    }

    /// A call is over and was read to its end: what is left to do is done, and nobody is woken any more. Says whether
    /// the connection may be used again.
    pub fn rest(&mut self, now: Instant) -> bool {
        self.bytes.in_use = false;
        self.idle_since = now;
        // Somebody may wait for the room that it takes.
        self.listen();
        !self.slot.is_claimed() && !self.is_closed() && !self.is_retired(now)
    }

    /// Takes note of what has come while it lay idle: tickets, or its end.
    pub fn listen(&mut self) {
        self.bytes.move_on(&mut Context::from_waker(Waker::noop()));
    }

    /// Whether it was closed, as far as has been noted.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Whether it can carry another request: not closed, and nothing unasked-for has come.
    pub fn is_quiet(&self) -> bool {
        if self.proof.is_some() { self.tcp.is_quiet_tls() } else { self.tcp.is_quiet() }
    }

    pub fn is_retired(&self, now: Instant) -> bool {
        self.retire_at.is_some_and(|at| now >= at)
    }

    /// Whether a byte of an answer came.
    pub fn heard_anything(&self) -> bool {
        self.ear.heard()
    }
}

impl Bytes {
    /// Moves what can be moved.
    fn move_on(&mut self, cx: &mut Context<'_>) {
        if let Some(mover) = &mut self.mover
            && mover.as_mut().poll(cx).is_ready()
        {
            // Its error reaches the call by the sender.
            self.mover = None;
        }
    }

    /// Polls what only the mover can bring. It has just been polled for the caller of this and will wake it: what it
    /// brings wakes nobody once more.
    fn poll_what_came<T>(
        &self,
        cx: &mut Context<'_>,
        mut what: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        match self.mover {
            Some(_) => what(&mut Context::from_waker(Waker::noop())),
            None => what(cx),
        }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // With a call on it, there is no good end; and its body must not be read by nobody.
        if !self.in_use {
            self.move_on(&mut Context::from_waker(Waker::noop()));
        }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bytes").field("in_use", &self.in_use).finish_non_exhaustive()
    }
}
