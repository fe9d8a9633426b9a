//! The task of an HTTP/2 connection to an endpoint: moves its frames, applies the endpoint's settings, and sends
//! PINGs.

use std::{
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{Ping, PingPong, client::Connection};
use tokio::time::Instant;

use super::{super::stream::UpstreamIo, ConnectionState, MAX_STREAMS, PingSettings};
use crate::{
    http2::{ERRORS_TO_RETIRE, header_filter::HeaderFilter, wire_state::ObservedIo},
    net::watchdog::Watchdog,
};

/// PINGs in a row without a message in between. gRPC servers close connections that send more (gRPC A8), …
const PINGS_IN_SILENCE: u32 = 2;
/// … unless they are this far apart.
const QUIET_INTERVAL: Duration = Duration::from_secs(310);

/// A retired connection is closed when a PING has not been answered for this many times the PING timeout.
const CLOSES_AFTER: u32 = 10;

/// Completes when the connection has ended.
pub(super) struct Driver {
    h2: Connection<ObservedIo<HeaderFilter<UpstreamIo>>, Bytes>,
    state: Rc<ConnectionState>,
    ping: Option<PingPong>,
    settings: PingSettings,
    pings: Pings,
    errors: u32,
    watchdog: Watchdog,
}

/// The PINGs sent so far.
#[derive(Debug, Default)]
struct Pings {
    /// In a row, without a message in between.
    in_silence: u32,
    /// How many messages had been received when the last one was sent.
    messages: u64,
    last: Option<Instant>,
}

impl Pings {
    /// Whether one more is within what servers tolerate.
    fn may_send(&self, messages: u64, now: Instant) -> bool {
        self.in_silence < PINGS_IN_SILENCE
            || messages != self.messages
            || self.last.is_none_or(|last| now.saturating_duration_since(last) >= QUIET_INTERVAL)
    }

    fn sent(&mut self, messages: u64, now: Instant) {
        self.in_silence = if messages == self.messages { self.in_silence + 1 } else { 1 };
        self.messages = messages;
        self.last = Some(now);
    }
}

impl Driver {
    pub(super) fn new(
        h2: Connection<ObservedIo<HeaderFilter<UpstreamIo>>, Bytes>,
        state: Rc<ConnectionState>,
        ping: Option<PingPong>,
        settings: PingSettings,
    ) -> Self {
        Self { h2, state, ping, settings, pings: Pings::default(), errors: 0, watchdog: Watchdog::default() }
    }

    /// Applies what the endpoint has sent about itself.
    fn apply_peer_settings(&mut self) {
        let state = &self.state;
        if state.wire.last_received().is_none() {
            return;
        }
        let limit = u32::try_from(self.h2.max_concurrent_send_streams()).unwrap_or(u32::MAX).min(MAX_STREAMS);
        if state.limit.replace(limit) < limit {
            state.changed.notify_all();
        }
        self.errors =
            self.errors.saturating_add(state.wire.take_faults()).saturating_add(state.wire.take_refusals());
        if self.errors >= ERRORS_TO_RETIRE {
            self.retire();
        }
    }

    fn retire(&self) {
        self.state.retired.set(true);
        self.state.changed.notify_all();
    }

    /// Sends a PING if one is wanted. Returns when the next action about PINGs is due, and whether the connection
    /// must be polled.
    fn poll_ping(&mut self, cx: &mut Context<'_>) -> (Option<Instant>, bool) {
        let state = Rc::clone(&self.state);
        let Some(ping) = &mut self.ping else { return (None, false) };
        if let Some(sent) = state.ping_sent.get() {
            if ping.poll_pong(cx).is_pending() {
                let times = if state.retired.get() { CLOSES_AFTER } else { 1 };
                return (Some(sent + self.settings.timeout * times), false);
            }
            state.ping_sent.set(None);
            // A PING requested meanwhile has its answer as well.
            state.ping_wanted.set(false);
            state.changed.notify_all();
        }
        let now = Instant::now();
        if state.ping_wanted.take() && self.pings.may_send(state.wire.messages_received(), now) {
            return (None, self.send_ping(now));
        }
        let heard = state.wire.last_received().unwrap_or(now);
        let due = (state.streams.get() > 0).then_some(self.settings.interval).flatten().map(|interval| {
            let quiet = self.pings.last.map(|last| last + QUIET_INTERVAL);
            let due = heard + interval;
            if self.pings.may_send(state.wire.messages_received(), due) {
                due
            } else {
                quiet.map_or(due, |quiet| quiet.max(due))
            }
        });
        (due, false)
    }

    /// Returns whether the connection must be polled to send it.
    fn send_ping(&mut self, now: Instant) -> bool {
        let sent = self.ping.as_mut().is_some_and(|ping| ping.send_ping(Ping::opaque()).is_ok());
        if sent {
            self.pings.sent(self.state.wire.messages_received(), now);
            self.state.ping_sent.set(Some(now));
        }
        sent
    }
}

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        loop {
            if let Poll::Ready(ended) = Pin::new(&mut this.h2).poll(cx) {
                if let Err(error) = ended {
                    tracing::debug!(%error, "HTTP/2 connection to an endpoint ended");
                }
                return Poll::Ready(());
            }
            this.state.store_waker(cx.waker());
            this.apply_peer_settings();
            let (due, sent) = this.poll_ping(cx);
            if sent {
                continue;
            }
            ready!(this.watchdog.poll_due(cx, due));
            let now = Instant::now();
            match this.state.ping_sent.get() {
                None if this.send_ping(now) => {}
                None => return Poll::Ready(()),
                Some(_) if !this.state.retired.get() => {
                    tracing::debug!(
                        "HTTP/2 endpoint has not answered a PING in time: no more requests on this connection"
                    );
                    this.retire();
                }
                Some(_) => {
                    tracing::debug!("HTTP/2 endpoint does not answer PING: connection closed");
                    return Poll::Ready(());
                }
            }
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.state.closed.set(true);
        self.state.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// grpc-go counts a PING as a strike if it arrives within 5 min of the one before it without a message of its own
    /// in between, and closes the connection at the third.
    #[test]
    fn pings_in_silence_stay_within_what_grpc_servers_tolerate() {
        let start = Instant::now();
        let (mut pings, mut strikes, mut last) = (Pings::default(), 0, None::<Instant>);
        for second in 0..24 * 3600 {
            let now = start + Duration::from_secs(second);
            if pings.may_send(0, now) {
                if last.is_some_and(|last| now - last < Duration::from_secs(300)) {
                    strikes += 1;
                }
                (last, _) = (Some(now), pings.sent(0, now));
            }
        }
        assert!(strikes <= 2, "{strikes} strikes");
        let now = start + Duration::from_secs(24 * 3600 + 1);
        assert!(pings.may_send(1, now), "a message in between lets more through");
    }
}
