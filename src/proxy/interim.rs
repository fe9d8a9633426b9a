//! Interim (1xx) responses: forwarded as they arrive (RFC 9110 §15.2); `100 Continue` releases the request's body.

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header::CONTENT_LENGTH};
use tokio::time::{Sleep, sleep};

use super::headers;
use crate::field_set::FieldSet;

/// How long the body is held back: a server that ignores the expectation sends no 100 (RFC 9110 §10.1.1).
const CONTINUE_TIMEOUT: Duration = Duration::from_secs(1);

/// Holds a body back until the upstream has sent `100 Continue`, or for a second.
#[derive(Debug)]
pub struct ContinueGate(RefCell<State>);

#[derive(Debug)]
struct State {
    open: bool,
    timeout: Pin<Box<Sleep>>,
    waker: Option<Waker>,
}

impl ContinueGate {
    pub fn new() -> Rc<Self> {
        Rc::new(Self(RefCell::new(State {
            open: false,
            timeout: Box::pin(sleep(CONTINUE_TIMEOUT)),
            waker: None,
        })))
    }

    pub fn open(&self) {
        let mut state = self.0.borrow_mut();
        state.open = true;
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }

    pub fn poll_open(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.0.borrow_mut();
        if state.open || state.timeout.as_mut().poll(cx).is_ready() {
            state.open = true;
            return Poll::Ready(());
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// A queue of interim responses for a client, to be written before the final response.
#[derive(Debug, Default)]
pub struct InterimQueue(RefCell<VecDeque<Bytes>>);

/// The most interim responses that are queued; more are dropped.
const MAX_INTERIM: usize = 16;

impl InterimQueue {
    /// Queues a response. The task that polls the request writes it, so it needs no notification.
    fn push(&self, response: Bytes) {
        let mut queue = self.0.borrow_mut();
        if queue.len() < MAX_INTERIM {
            queue.push_back(response);
        }
    }

    /// The next response to be written.
    pub fn pop(&self) -> Option<Bytes> {
        self.0.borrow_mut().pop_front()
    }
}

/// Forwards an interim response; `100 Continue` releases the body instead.
pub fn forward_interim(
    to: &InterimQueue,
    gate: Option<&ContinueGate>,
    status: StatusCode,
    mut headers: HeaderMap,
) {
    if status == StatusCode::CONTINUE {
        // The client gets its own 100 when the body is first polled.
        gate.into_iter().for_each(ContinueGate::open);
        return;
    }
    let present = FieldSet::of(&headers);
    // A malformed one is dropped: interim responses are optional.
    if headers::remove_hop_by_hop(&mut headers, present).is_ok() {
        headers.remove(CONTENT_LENGTH);
        to.push(encode(status, &headers));
    }
}

fn encode(status: StatusCode, headers: &HeaderMap) -> Bytes {
    let mut text = Vec::with_capacity(128);
    let reason = status.canonical_reason().unwrap_or("Interim");
    text.extend_from_slice(format!("HTTP/1.1 {} {reason}\r\n", status.as_str()).as_bytes());
    for (name, value) in headers {
        text.extend_from_slice(name.as_str().as_bytes());
        text.extend_from_slice(b": ");
        text.extend_from_slice(value.as_bytes());
        text.extend_from_slice(b"\r\n");
    }
    text.extend_from_slice(b"\r\n");
    text.into()
}
