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
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Wake, Waker},
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
struct Bytes {
    /// None: it has ended, or a task of its own polls it.
    mover: Option<Pin<Box<dyn Future<Output = hyper::Result<()>>>>>,
    bell: Arc<Bell>,
    /// Rings the bell: the mover's.
    waker: Waker,
    /// The other half's.
    quiet: Waker,
    /// A call is on it.
    in_use: bool,
}

/// Wakes the call that uses a connection, and nobody between calls.
///
/// What goes from one half to the other wakes the other, which here is the one that runs: that is left out, as it looks
/// there anyway.
#[derive(Default)]
struct Bell(Mutex<Rings>);

#[derive(Default)]
struct Rings {
    whom: Option<Waker>,
    muted: bool,
    /// It was rung while muted.
    missed: bool,
}

impl Bell {
    fn rings(&self) -> MutexGuard<'_, Rings> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut rings = self.rings();
        if rings.muted {
            rings.missed = true;
        } else if let Some(task) = rings.whom.take() {
            drop(rings);
            task.wake();
        }
    }
}

/// Wakes nobody: what comes while the mover is polled is taken right after. But what is polled may have to give way
/// to other tasks, and says so at once; that is a ring that was missed.
struct Quiet(Arc<Bell>);

impl Wake for Quiet {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut rings = self.0.rings();
        rings.missed |= rings.muted;
    }
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
        let bytes = Bytes::new(Box::pin(connection.with_upgrades()));
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
        self.bytes.mute();
        let mut answer = pin!(self.sender.try_send_request(request));
        self.bytes.unmute();
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
        // It may have come with the part before.
        if self.bytes.mover.is_some()
            && let (Poll::Ready(part), _) = self.bytes.take(&mut part)
        {
            return Poll::Ready(part);
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
        if !self.sender.is_ready() {
            // What is left of its request is still to be written, or it closes.
            self.set_free();
            return false;
        }
        !self.slot.is_claimed() && !self.is_closed() && !self.is_retired(now)
    }

    /// Takes note of what has come while it lay idle: tickets, or its end.
    pub fn listen(&mut self) {
        self.bytes.move_alone();
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
    fn new(mover: Pin<Box<dyn Future<Output = hyper::Result<()>>>>) -> Self {
        let bell = Arc::<Bell>::default();
        let waker = Waker::from(Arc::clone(&bell));
        let quiet = Waker::from(Arc::new(Quiet(Arc::clone(&bell))));
        Self { mover: Some(mover), bell, waker, quiet, in_use: false }
    }

    /// Moves what can be moved; for more, the bell wakes the caller of this.
    fn move_on(&mut self, cx: &mut Context<'_>) {
        let mut rings = self.bell.rings();
        if !rings.whom.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            rings.whom = Some(cx.waker().clone());
        }
        drop(rings);
        self.poll_mover();
    }

    /// Moves what can be moved; for more, nobody is woken.
    fn move_alone(&mut self) {
        self.bell.rings().whom = None;
        self.poll_mover();
    }

    fn poll_mover(&mut self) {
        if let Some(mover) = &mut self.mover
            && mover.as_mut().poll(&mut Context::from_waker(&self.waker)).is_ready()
        {
            // Its error reaches the call by the sender.
            self.mover = None;
        }
    }

    /// Polls what the mover brings, which has just moved what it could. Where taking it made room for more, or the time
    /// that a task may take is over, that is told.
    fn poll_what_came<T>(
        &self,
        cx: &mut Context<'_>,
        mut what: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        if self.mover.is_none() {
            return what(cx);
        }
        let (polled, missed) = self.take(&mut what);
        if missed && polled.is_pending() {
            cx.waker().wake_by_ref();
        }
        polled
    }

    /// Polls what the mover brings; says whether the bell rang.
    fn take<T>(&self, what: &mut impl FnMut(&mut Context<'_>) -> Poll<T>) -> (Poll<T>, bool) {
        self.mute();
        let polled = what(&mut Context::from_waker(&self.quiet));
        (polled, self.unmute())
    }

    fn mute(&self) {
        let mut rings = self.bell.rings();
        (rings.muted, rings.missed) = (true, false);
    }

    /// Whether it was rung meanwhile.
    fn unmute(&self) -> bool {
        let mut rings = self.bell.rings();
        rings.muted = false;
        rings.missed
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // With a call on it, there is no good end; and its body must not be read by nobody.
        if !self.in_use {
            self.move_alone();
        }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bytes").field("in_use", &self.in_use).finish_non_exhaustive()
    }
}
