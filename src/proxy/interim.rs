//! Interim (1xx) responses: passed on as they come (RFC 9110 §15.2), and `100 Continue` lets the body go.

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
use crate::present::Present;

/// A server that doesn't know the expectation says nothing: then the body goes anyway (RFC 9110 §10.1.1).
const CONTINUE_PATIENCE: Duration = Duration::from_secs(1);

/// Holds a body back until the upstream has said `100 Continue`, or for a second.
#[derive(Debug)]
pub struct Gate(RefCell<State>);

#[derive(Debug)]
struct State {
    open: bool,
    patience: Pin<Box<Sleep>>,
    waker: Option<Waker>,
}

impl Gate {
    pub fn new() -> Rc<Self> {
        Rc::new(Self(RefCell::new(State {
            open: false,
            patience: Box::pin(sleep(CONTINUE_PATIENCE)),
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
        if state.open || state.patience.as_mut().poll(cx).is_ready() {
            state.open = true;
            return Poll::Ready(());
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Interim responses on their way to a caller, to be written before the final one.
#[derive(Debug, Default)]
pub struct Interim(RefCell<VecDeque<Bytes>>);

/// Held for a caller that does not take them; more are let go.
const MAX_INTERIM: usize = 16;

impl Interim {
    /// For whoever polls the call, which is where they come from.
    fn push(&self, response: Bytes) {
        let mut queue = self.0.borrow_mut();
        if queue.len() < MAX_INTERIM {
            queue.push_back(response);
        }
    }

    /// The next one to be written.
    pub fn pop(&self) -> Option<Bytes> {
        self.0.borrow_mut().pop_front()
    }
}

/// Passes an interim response on, or lets the body go.
pub fn pass_on(to: &Interim, gate: Option<&Gate>, status: StatusCode, mut headers: HeaderMap) {
    if status == StatusCode::CONTINUE {
        // It is said to the caller when the body is asked for.
        gate.into_iter().for_each(Gate::open);
        return;
    }
    let present = Present::of(&headers);
    // One that names what is not hop-by-hop is let go: nobody waits for it.
    if headers::remove_hop_by_hop(&mut headers, present).is_ok() {
        headers.remove(CONTENT_LENGTH);
        to.push(encoded(status, &headers));
    }
}

fn encoded(status: StatusCode, headers: &HeaderMap) -> Bytes {
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
