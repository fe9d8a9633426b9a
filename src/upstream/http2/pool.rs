//! The HTTP/2 connections of one worker to one endpoint: a few with many streams each. Another is opened if the
//! endpoint's stream limit is reached on all, or if uploads have exhausted their windows.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use tokio::{
    task::spawn_local,
    time::{Instant, timeout_at},
};

use super::{Http2Connection, Http2Stream, waiters::Waiters};
use crate::{
    identity::tls::ClientTls,
    upstream::{
        connect::{ConnectError, TlsTarget},
        local::LocalEndpoint,
        policy_state::{ConnectionSlot, PolicyState},
        pool::{ConnectionSettings, Lease, matches_settings, uses_current_tls},
    },
};

const IDLE_TIMEOUT: Duration = Duration::from_secs(50);

/// The HTTP/2 connections to one endpoint.
#[derive(Debug, Default)]
pub struct Http2Pool {
    connections: RefCell<Vec<Rc<Http2Connection>>>,
    /// At most one for each TLS name.
    dials: RefCell<Vec<Rc<Dial>>>,
    /// Notified when a stream, a connection, or the end of a dial may serve a waiting request.
    changed: Rc<Waiters>,
}

/// One dial that several requests to the same TLS name wait for.
#[derive(Debug)]
struct Dial {
    tls: Option<TlsTarget>,
    outcome: RefCell<Option<Result<Rc<Http2Connection>, ConnectError>>>,
    /// It has a connection slot, and is connecting.
    connects: Cell<bool>,
}

/// What the pool has for a request.
enum Choice {
    Available(Rc<Http2Connection>),
    /// A connection has no stream yet, and another one would have none either.
    Opening(Rc<Http2Connection>),
    /// All connections are fully used.
    Full,
}

impl Http2Pool {
    /// A stream: of a connection with a free one, else of a new connection that all waiting requests share, else of
    /// the first to get a free one. `upload`: the request has a body.
    pub async fn stream(
        endpoint: &Rc<LocalEndpoint>,
        settings: &ConnectionSettings,
        policy_state: &Arc<PolicyState>,
        upload: bool,
    ) -> Result<Lease, ConnectError> {
        let pool = &endpoint.pool.h2;
        if let Choice::Available(connection) = pool.choose(settings, upload) {
            return Ok(lease(connection, true));
        }
        Box::pin(pool.wait(endpoint, settings, policy_state, upload)).await
    }

    async fn wait(
        &self,
        endpoint: &Rc<LocalEndpoint>,
        settings: &ConnectionSettings,
        policy_state: &Arc<PolicyState>,
        mut upload: bool,
    ) -> Result<Lease, ConnectError> {
        let until = Instant::now() + settings.stream_wait;
        let mut dialled = false;
        let mut opening: Option<Rc<Http2Connection>> = None;
        let waiter = self.changed.register();
        loop {
            // Before checking, so that no notification is lost.
            let changed = self.changed.notified();
            // Closed before its first use: the attempt to send on it reports why.
            if let Some(connection) = opening.take_if(|connection| connection.state.closed.get()) {
                return Ok(lease(connection, false));
            }
            let choice = self.choose(settings, upload);
            if dialled && !matches!(choice, Choice::Available(_)) {
                waiter.notify_next();
            }
            let dial = match choice {
                Choice::Available(connection) => return Ok(lease(connection, !dialled)),
                Choice::Opening(connection) => {
                    // If anything was received, the endpoint allows no streams for now.
                    settings.queued.set(connection.state.wire.last_received().is_some());
                    if timeout_at(until, changed).await.is_ok() {
                        (opening, dialled) = (Some(connection), true);
                        continue;
                    }
                    // An endpoint that has sent nothing gets the request all the same: its silence then counts as
                    // that of an attempt.
                    let silent = connection.state.wire.last_received().is_none();
                    return if silent { Ok(lease(connection, false)) } else { Err(self.no_stream(settings)) };
                }
                Choice::Full => self.dial(endpoint, settings, policy_state),
            };
            settings.queued.set(true);
            changed.await;
            settings.queued.set(false);
            dialled = true;
            let outcome = dial.outcome.borrow().clone();
            match outcome {
                Some(Ok(connection)) => opening = Some(connection),
                None => {}
                Some(Err(ConnectError::ConnectionLimit { .. })) if self.has_any(settings) => {
                    // The existing connections have to suffice. Each dial has waited for a slot.
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
        for connection in connections
            .iter()
            .filter(|connection| matches_settings(connection.verification.as_deref(), settings))
        {
            if connection.has_free_stream() && !(upload && connection.is_window_exhausted(now)) {
                return Choice::Available(Rc::clone(connection));
            }
            if connection.awaits_stream_limit() {
                opening = Some(Rc::clone(connection));
            }
        }
        opening.map_or(Choice::Full, Choice::Opening)
    }

    fn has_any(&self, settings: &ConnectionSettings) -> bool {
        let connections = self.connections.borrow();
        connections.iter().any(|connection| matches_settings(connection.verification.as_deref(), settings))
    }

    fn no_stream(&self, settings: &ConnectionSettings) -> ConnectError {
        let connections = self.connections.borrow();
        let limit =
            connections.iter().map(|connection| connection.state.limit.get()).max().unwrap_or_default();
        ConnectError::StreamLimit { limit, connections: connections.len(), waited: settings.stream_wait }
    }

    /// The dial in progress to the same TLS name, else a new one. In a task of its own: a cancelled request must not
    /// cancel the dial for the others.
    fn dial(
        &self,
        endpoint: &Rc<LocalEndpoint>,
        settings: &ConnectionSettings,
        policy_state: &Arc<PolicyState>,
    ) -> Rc<Dial> {
        let mut dials = self.dials.borrow_mut();
        if let Some(dial) = dials.iter().find(|dial| dial.tls == settings.tls) {
            return Rc::clone(dial);
        }
        let dial = Rc::new(Dial {
            tls: settings.tls.clone(),
            outcome: RefCell::default(),
            connects: Cell::default(),
        });
        dials.push(Rc::clone(&dial));
        drop(dials);
        let (settings, policy_state) = (settings.clone(), Arc::clone(policy_state));
        let guard = DialGuard { endpoint: Rc::clone(endpoint), dial: Rc::clone(&dial) };
        spawn_local(async move {
            let pool = &guard.endpoint.pool.h2;
            let outcome = match ConnectionSlot::acquire(&policy_state).await {
                Ok(slot) => {
                    guard.dial.connects.set(true);
                    Http2Connection::open(&guard.endpoint, &settings, slot, &pool.changed).await
                }
                Err(error) => Err(error),
            };
            if let Ok(connection) = &outcome {
                pool.connections.borrow_mut().push(Rc::clone(connection));
            }
            guard.dial.outcome.replace(Some(outcome));
        });
        dial
    }

    /// Drops expired or closed connections: they get no new streams, and end with the streams that they carry.
    fn retire(&self, now: Instant) {
        self.connections.borrow_mut().retain(|connection| {
            let idle_for = now.saturating_duration_since(connection.state.idle_since.get());
            connection.is_usable(now) && !(connection.is_idle() && idle_for >= IDLE_TIMEOUT)
        });
    }

    /// Closes connections that have been idle for too long or were opened with other TLS settings.
    pub fn sweep(&self, tls: Option<&Arc<ClientTls>>) {
        self.connections
            .borrow_mut()
            .retain(|connection| uses_current_tls(connection.verification.as_deref(), tls));
        self.retire(Instant::now());
    }

    /// Closes an idle connection, if there is one; its slot is released when its task has ended.
    pub fn close_one_idle(&self) {
        let mut connections = self.connections.borrow_mut();
        if let Some(index) = connections.iter().position(|connection| connection.is_idle()) {
            drop(connections.remove(index));
        }
    }

    /// Whether a connection is being opened and has its slot.
    pub fn is_connecting(&self) -> bool {
        self.dials.borrow().iter().any(|dial| dial.connects.get())
    }

    /// How many connections are idle.
    pub fn idle_count(&self) -> usize {
        self.connections.borrow().iter().filter(|connection| connection.is_idle()).count()
    }
}

/// Notifies the waiting requests of the end of a dial, however it ends.
struct DialGuard {
    endpoint: Rc<LocalEndpoint>,
    dial: Rc<Dial>,
}

impl Drop for DialGuard {
    fn drop(&mut self) {
        let pool = &self.endpoint.pool.h2;
        let address = self.endpoint.shared.address;
        self.dial.outcome.borrow_mut().get_or_insert_with(|| {
            Err(ConnectError::Handshake { address, reason: "the dial was cancelled".to_owned() })
        });
        pool.dials.borrow_mut().retain(|dial| !Rc::ptr_eq(dial, &self.dial));
        pool.changed.notify_all();
    }
}

fn lease(connection: Rc<Http2Connection>, reused: bool) -> Lease {
    Lease::H2 { stream: Box::new(Http2Stream::new(connection)), reused }
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
        config::{HeaderCase, MinTls, PoolIdleTimeout, UpstreamTls},
        upstream::{DiscoveredEndpoint, Endpoint, body::RequestBody, http2::PingSettings},
    };

    fn settings(tls: Option<TlsTarget>) -> ConnectionSettings {
        ConnectionSettings {
            tcp: crate::upstream::connect::TcpTimeouts::default(),
            clear_user_timeout_on_upgrade: true,
            pool_idle: PoolIdleTimeout::Auto,
            header_case: HeaderCase::default(),
            max_age: None,
            tls,
            ping: PingSettings { interval: None, timeout: Wait::from_secs(2) },
            stream_wait: Wait::from_secs(1),
            queued: Cell::default(),
        }
    }

    /// The error of a dial, and a connection that was closed at once, belong to one server name.
    #[tokio::test]
    async fn a_dial_is_shared_by_requests_for_the_same_tls_name_only() {
        let discovered =
            DiscoveredEndpoint { address: "127.0.0.1:1".parse().unwrap(), host: None, weight: 1 };
        let now = std::time::Instant::now();
        let endpoint = Rc::new(LocalEndpoint::new(Arc::new(Endpoint::new(discovered)), None, now));
        let (pool, policy_state) = (&endpoint.pool.h2, PolicyState::new(now));
        let client = Arc::new(ClientTls::new(UpstreamTls::default(), MinTls::default(), Arc::default()));
        let dial = |name: &'static str| {
            let name = Arc::new(name.try_into().unwrap());
            let target = TlsTarget { client: Arc::clone(&client), name };
            pool.dial(&endpoint, &settings(Some(target)), &policy_state)
        };
        let set = LocalSet::new();
        let _entered = set.enter();
        let (first, other, again) = (dial("a.example"), dial("b.example"), dial("a.example"));
        assert!(Rc::ptr_eq(&first, &again));
        assert!(!Rc::ptr_eq(&first, &other));
        assert_eq!(pool.dials.borrow().len(), 2);
        set.await;
        assert!(pool.dials.borrow().is_empty());
        assert!(matches!(&*first.outcome.borrow(), Some(Err(_))));
    }

    /// The request has not been sent: it may be sent again, whatever its method.
    #[tokio::test]
    async fn a_request_on_a_closed_connection_is_unsent() {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let discovered =
            DiscoveredEndpoint { address: listener.local_addr().unwrap(), host: None, weight: 1 };
        let now = std::time::Instant::now();
        let endpoint = Rc::new(LocalEndpoint::new(Arc::new(Endpoint::new(discovered)), None, now));
        let (policy_state, settings) = (PolicyState::new(now), settings(None));
        let run = async {
            let accepted = tokio::task::spawn_local(async move {
                let (stream, _) = listener.accept().await.unwrap();
                h2::server::handshake(stream).await.unwrap()
            });
            let lease = Http2Pool::stream(&endpoint, &settings, &policy_state, false).await;
            let Ok(Lease::H2 { mut stream, .. }) = lease else { panic!("a stream") };
            drop(accepted.await.unwrap());
            while !stream.connection.state.closed.get() {
                tokio::task::yield_now().await;
            }
            let request = http::Request::post("http://up/").body(()).unwrap();
            stream.send(request, RequestBody::empty()).await
        };
        let sent = LocalSet::new().run_until(tokio::time::timeout(Wait::from_secs(20), run)).await;
        assert!(sent.expect("in time").is_err_and(|error| error.is_unsent));
    }

    /// However a dial ends, even by a panic: the requests that wait for it are notified.
    #[tokio::test]
    async fn a_cancelled_dial_leaves_no_request_waiting() {
        let discovered =
            DiscoveredEndpoint { address: "127.0.0.1:1".parse().unwrap(), host: None, weight: 1 };
        let now = std::time::Instant::now();
        let endpoint = Rc::new(LocalEndpoint::new(Arc::new(Endpoint::new(discovered)), None, now));
        let pool = &endpoint.pool.h2;
        let settings = settings(None);
        let policy_state = PolicyState::new(now);
        let set = LocalSet::new();
        let mut waiting = pin!(Http2Pool::stream(&endpoint, &settings, &policy_state, false));
        let polled = {
            let _tasks = set.enter();
            poll_fn(|cx| Poll::Ready(waiting.as_mut().poll(cx))).await
        };
        assert!(polled.is_pending() && !pool.dials.borrow().is_empty(), "a task dials");
        // Dropping the task set drops the unfinished future, as a panic would.
        drop(set);
        let waited = tokio::time::timeout(Wait::from_secs(5), waiting).await;
        assert!(matches!(waited, Ok(Err(ConnectError::Handshake { .. }))), "{waited:?}");
        assert!(endpoint.pool.h2.dials.borrow().is_empty(), "the next request dials anew");
    }
}
