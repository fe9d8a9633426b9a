//! The HTTP/2 connections of one worker to one endpoint: a few that carry many streams. Another is opened where the streams
//! that the endpoint takes on one are used up, or where uploads have used up its window.

use std::{cell::RefCell, rc::Rc, sync::Arc, time::Duration};

use tokio::{
    sync::Notify,
    task::spawn_local,
    time::{Instant, timeout_at},
};

use super::{Http2, Stream};
use crate::{
    identity::tls::ClientTls,
    upstream::{
        connect::ConnectError,
        guards::Guards,
        local::LocalEndpoint,
        pool::{ConnectionSettings, Lease, fits, is_of},
    },
};

const IDLE: Duration = Duration::from_secs(50);

/// The HTTP/2 connections to one endpoint.
#[derive(Debug, Default)]
pub struct Http2Pool {
    connections: RefCell<Vec<Rc<Http2>>>,
    dial: RefCell<Option<Rc<Dial>>>,
    /// Notified when a stream, a connection, or the end of a dial may be what they wait for.
    changed: Rc<Notify>,
}

/// One dial that several requests wait for.
#[derive(Debug, Default)]
struct Dial(RefCell<Option<Result<Rc<Http2>, ConnectError>>>);

/// What there is for a request.
enum Choice {
    Room(Rc<Http2>),
    /// A connection has no room yet, and another one would have none either.
    Opening(Rc<Http2>),
    /// All are in full use.
    Full,
}

impl Http2Pool {
    /// A stream: of a connection that has room, else of a new one that all who wait share, else of the first that gets room.
    /// `upload`: the request has a body.
    pub async fn stream(
        endpoint: &Rc<LocalEndpoint>,
        settings: &ConnectionSettings,
        guards: &Arc<Guards>,
        upload: bool,
    ) -> Result<Lease, ConnectError> {
        let pool = &endpoint.pool.h2;
        if let Choice::Room(connection) = pool.choose(settings, upload) {
            return Ok(lease(connection, true));
        }
        Box::pin(pool.wait(endpoint, settings, guards, upload)).await
    }

    async fn wait(
        &self,
        endpoint: &Rc<LocalEndpoint>,
        settings: &ConnectionSettings,
        guards: &Arc<Guards>,
        mut upload: bool,
    ) -> Result<Lease, ConnectError> {
        let until = Instant::now() + settings.stream_wait;
        let mut dialled = false;
        let mut opening: Option<Rc<Http2>> = None;
        loop {
            // Before looking, so that nothing is missed.
            let changed = self.changed.notified();
            // Closed before it was ever of use: what is sent on it says why.
            if let Some(connection) = opening.take_if(|connection| connection.state.closed.get()) {
                return Ok(lease(connection, false));
            }
            let dial = match self.choose(settings, upload) {
                Choice::Room(connection) => return Ok(lease(connection, !dialled)),
                Choice::Opening(connection) => {
                    if timeout_at(until, changed).await.is_ok() {
                        (opening, dialled) = (Some(connection), true);
                        continue;
                    }
                    // An endpoint that has said nothing is asked all the same: its silence is then that of an attempt.
                    let silent = connection.state.wire.heard().is_none();
                    return if silent { Ok(lease(connection, false)) } else { Err(self.no_stream(settings)) };
                }
                Choice::Full => self.dial(endpoint, settings, guards),
            };
            changed.await;
            dialled = true;
            let outcome = dial.0.borrow().clone();
            match outcome {
                Some(Ok(connection)) => opening = Some(connection),
                None => {}
                Some(Err(ConnectError::Limit { .. })) if self.has_any(settings) => {
                    // What there is has to do. Each dial has waited for a slot.
                    upload = false;
                    if Instant::now() >= until {
                        return Err(self.no_stream(settings));
                    }
                }
                Some(Err(error)) => return Err(error),
            }
        }
    }

    fn choose(&self, settings: &ConnectionSettings, upload: bool) -> Choice {
        let now = Instant::now();
        self.retire(now);
        let connections = self.connections.borrow();
        let mut opening = None;
        for connection in connections.iter().filter(|connection| fits(connection.proof.as_deref(), settings))
        {
            if connection.has_room() && !(upload && connection.is_held(now)) {
                return Choice::Room(Rc::clone(connection));
            }
            if connection.is_opening() {
                opening = Some(Rc::clone(connection));
            }
        }
        opening.map_or(Choice::Full, Choice::Opening)
    }

    fn has_any(&self, settings: &ConnectionSettings) -> bool {
        let connections = self.connections.borrow();
        connections.iter().any(|connection| fits(connection.proof.as_deref(), settings))
    }

    fn no_stream(&self, settings: &ConnectionSettings) -> ConnectError {
        let connections = self.connections.borrow();
        let limit =
            connections.iter().map(|connection| connection.state.limit.get()).max().unwrap_or_default();
        ConnectError::Streams { limit, connections: connections.len(), waited: settings.stream_wait }
    }

    /// The dial under way, else a new one. In a task of its own: a request that gives up must not take the others'
    /// connection with it.
    fn dial(
        &self,
        endpoint: &Rc<LocalEndpoint>,
        settings: &ConnectionSettings,
        guards: &Arc<Guards>,
    ) -> Rc<Dial> {
        if let Some(dial) = &*self.dial.borrow() {
            return Rc::clone(dial);
        }
        let dial = Rc::new(Dial::default());
        self.dial.replace(Some(Rc::clone(&dial)));
        let (settings, guards) = (settings.clone(), Arc::clone(guards));
        let ends = DialEnds { endpoint: Rc::clone(endpoint), dial: Rc::clone(&dial) };
        spawn_local(async move {
            let pool = &ends.endpoint.pool.h2;
            let outcome = Http2::open(&ends.endpoint, &settings, &guards, &pool.changed).await;
            if let Ok(connection) = &outcome {
                pool.connections.borrow_mut().push(Rc::clone(connection));
            }
            ends.dial.0.replace(Some(outcome));
        });
        dial
    }

    /// Old or closed connections get no new streams; they end when the streams they carry have.
    fn retire(&self, now: Instant) {
        self.connections.borrow_mut().retain(|connection| {
            let idle_for = now.saturating_duration_since(connection.state.idle_since.get());
            connection.is_usable(now) && !(connection.is_idle() && idle_for >= IDLE)
        });
    }

    /// Closes what has been idle for too long, or was made by other settings.
    pub fn sweep(&self, tls: Option<&Arc<ClientTls>>) {
        self.connections.borrow_mut().retain(|connection| is_of(connection.proof.as_deref(), tls));
        self.retire(Instant::now());
    }

    /// Closes a connection that lies idle, if there is one; its slot is free when its task has ended.
    pub fn close_idle(&self) {
        let mut connections = self.connections.borrow_mut();
        if let Some(index) = connections.iter().position(|connection| connection.is_idle()) {
            drop(connections.remove(index));
        }
    }

    /// How many connections lie idle.
    pub fn idle(&self) -> usize {
        self.connections.borrow().iter().filter(|connection| connection.is_idle()).count()
    }
}

/// Tells those who wait that a dial is over, however it ends.
struct DialEnds {
    endpoint: Rc<LocalEndpoint>,
    dial: Rc<Dial>,
}

impl Drop for DialEnds {
    fn drop(&mut self) {
        let pool = &self.endpoint.pool.h2;
        let address = self.endpoint.shared.address;
        self.dial.0.borrow_mut().get_or_insert_with(|| {
            Err(ConnectError::Handshake { address, reason: "it was not carried to its end".to_owned() })
        });
        pool.dial.replace(None);
        pool.changed.notify_waiters();
    }
}

fn lease(connection: Rc<Http2>, reused: bool) -> Lease {
    Lease::H2 { stream: Box::new(Stream::new(connection)), reused }
}

#[cfg(test)]
mod tests {
    use std::{
        future::{Future, poll_fn},
        pin::pin,
        task::Poll,
        time::Duration as Wait,
    };

    use tokio::task::LocalSet;

    use super::*;
    use crate::{
        config::{HeaderCase, PoolIdle},
        upstream::{Endpoint, Found, http2::PingSettings},
    };

    /// However a dial ends, also by a panic of ours: who waits for it hears of that.
    #[tokio::test]
    async fn a_dial_that_breaks_off_leaves_nobody_waiting() {
        let found = Found { address: "127.0.0.1:1".parse().unwrap(), host: None, weight: 1 };
        let now = std::time::Instant::now();
        let endpoint = Rc::new(LocalEndpoint::new(Arc::new(Endpoint::new(found)), None, now));
        let pool = &endpoint.pool.h2;
        let settings = ConnectionSettings {
            tcp: crate::upstream::connect::TcpLimits::default(),
            lifts_user_timeout: true,
            pool_idle: PoolIdle::Auto,
            header_case: HeaderCase::default(),
            max_age: None,
            tls: None,
            ping: PingSettings { interval: None, timeout: Wait::from_secs(2) },
            stream_wait: Wait::from_secs(1),
        };
        let guards = Guards::new(now);
        let set = LocalSet::new();
        let mut waits = pin!(Http2Pool::stream(&endpoint, &settings, &guards, false));
        let polled = {
            let _tasks = set.enter();
            poll_fn(|cx| Poll::Ready(waits.as_mut().poll(cx))).await
        };
        assert!(polled.is_pending() && pool.dial.borrow().is_some(), "a task dials");
        // Its future is dropped unfinished, as a panic drops it.
        drop(set);
        let waited = tokio::time::timeout(Wait::from_secs(5), waits).await;
        assert!(matches!(waited, Ok(Err(ConnectError::Handshake { .. }))), "{waited:?}");
        assert!(endpoint.pool.h2.dial.borrow().is_none(), "the next request dials anew");
    }
}
