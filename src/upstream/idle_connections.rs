//! The idle HTTP/1.1 connections of one worker to one endpoint: a stack with the most recently used on top, so that
//! surplus connections age at the bottom and are closed.

use std::{
    cell::{Cell, RefCell},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    http1::{Http1Connection, ReuseVerdict},
    idle_timeout::LearnedIdleTimeout,
    pool::{ConnectionSettings, matches_settings, uses_current_tls},
    stream::IdleState,
};
use crate::{config::PoolIdleTimeout, identity::tls::ClientTls};

/// The most idle connections that are kept.
const MAX_IDLE: usize = 512;
/// How long an idle connection is kept if neither a header nor experience says: Node closes after 5 s.
const IDLE_UNKNOWN: Duration = Duration::from_secs(4);
/// How long the connections of an endpoint settle before reuse after it has sent unsolicited bytes.
const SETTLE_PERIOD: Duration = Duration::from_secs(600);
/// After this many bodiless responses with nothing behind them, connections are reused at once.
const COMPLIANT_AFTER: u8 = 8;

/// See the [module](self).
#[derive(Debug, Default)]
pub struct IdleConnections {
    stack: RefCell<Vec<Http1Connection>>,
    /// The idle timeout learned from connections that the endpoint closed.
    learned: Cell<LearnedIdleTimeout>,
    /// Until when connections settle before reuse, because the endpoint has sent unsolicited bytes.
    settle_until: Cell<Option<Instant>>,
    /// How many responses to HEAD, and how many 204 or 304, were followed by nothing while their connections settled.
    compliant: [Cell<u8>; 2],
}

impl IdleConnections {
    /// Takes connections off the stack until one is usable. It is checked just now: if its request is written in the
    /// same poll of the task, no unread bytes precede the response.
    pub fn pop(&self, settings: &ConnectionSettings, now: Instant) -> Option<Http1Connection> {
        let mut stack = self.stack.borrow_mut();
        // A connection with another TLS server name stays for requests to that name.
        let reusable = |connection: &Http1Connection| {
            connection.reusable_from <= now && matches_settings(connection.peer_verification(), settings)
        };
        while let Some(at) = stack.iter().rposition(reusable) {
            let mut connection = stack.remove(at);
            let age = now.saturating_duration_since(connection.idle_since);
            if age >= self.limit(&connection, settings.pool_idle, now) || connection.is_retired(now) {
                continue;
            }
            match connection.check_idle() {
                IdleState::Quiet => {
                    self.learn(|learned| learned.record_survivor(age));
                    if connection.reusable_from > connection.idle_since {
                        self.record_compliant(&connection);
                    }
                    return Some(connection);
                }
                IdleState::Closed => self.learn(|learned| learned.record_close(age, now)),
                IdleState::Unsolicited => self.record_unsolicited(&connection, now),
            }
        }
        None
    }

    /// Returns a connection whose response was read to its end, if it can be reused.
    pub fn put_back(&self, mut connection: Http1Connection, now: Instant) {
        let noisy = self.settle_until.get().is_some_and(|until| now < until);
        let unknown = |kind| self.compliant[kind as usize].get() < COMPLIANT_AFTER;
        let settles = noisy || connection.no_body_reason().is_some_and(unknown);
        match connection.finish_exchange(settles, now) {
            ReuseVerdict::Reusable => {
                let mut stack = self.stack.borrow_mut();
                if stack.len() < MAX_IDLE {
                    stack.push(connection);
                }
            }
            ReuseVerdict::Close => {}
            ReuseVerdict::Unsolicited => self.record_unsolicited(&connection, now),
        }
    }

    /// Closes the connection that has been idle for longest; `false` if there is none.
    pub fn close_oldest(&self) -> bool {
        let mut stack = self.stack.borrow_mut();
        if stack.is_empty() {
            return false;
        }
        drop(stack.remove(0));
        true
    }

    /// Closes connections that have been idle for too long or were opened with other TLS settings.
    pub fn sweep(&self, setting: PoolIdleTimeout, tls: Option<&Arc<ClientTls>>, now: Instant) {
        self.stack.borrow_mut().retain_mut(|connection| {
            if !uses_current_tls(connection.peer_verification(), tls) {
                return false;
            }
            let age = now.saturating_duration_since(connection.idle_since);
            match connection.check_idle_readiness() {
                IdleState::Quiet => age < self.limit(connection, setting, now) && !connection.is_retired(now),
                IdleState::Closed => {
                    self.learn(|learned| learned.record_close(age, now));
                    false
                }
                IdleState::Unsolicited => {
                    self.record_unsolicited(connection, now);
                    false
                }
            }
        });
    }

    /// Records that the endpoint accepts no connections: what it closed just now was not closed for idling.
    pub fn record_connect_failure(&self) {
        self.learn(LearnedIdleTimeout::record_restart);
        self.reset_compliant();
    }

    pub fn len(&self) -> usize {
        self.stack.borrow().len()
    }

    fn limit(&self, connection: &Http1Connection, setting: PoolIdleTimeout, now: Instant) -> Duration {
        match setting {
            PoolIdleTimeout::Fixed(limit) => *limit,
            PoolIdleTimeout::Auto => {
                let announced = connection.announced_idle_timeout.unwrap_or(IDLE_UNKNOWN);
                self.learned.get().limit(now).map_or(announced, |learned| learned.min(announced))
            }
        }
    }

    fn learn(&self, update: impl FnOnce(&mut LearnedIdleTimeout)) {
        let mut learned = self.learned.get();
        update(&mut learned);
        self.learned.set(learned);
    }

    /// Records that nothing followed a bodiless response while its connection settled.
    fn record_compliant(&self, connection: &Http1Connection) {
        if let Some(kind) = connection.no_body_reason() {
            let count = &self.compliant[kind as usize];
            count.set(count.get().saturating_add(1));
        }
    }

    fn reset_compliant(&self) {
        self.compliant.iter().for_each(|count| count.set(0));
    }

    /// Records unsolicited bytes from the endpoint. From now on its connections settle before reuse, so that further
    /// such bytes are detected.
    fn record_unsolicited(&self, connection: &Http1Connection, now: Instant) {
        self.reset_compliant();
        let known = self.settle_until.replace(now.checked_add(SETTLE_PERIOD));
        if known.is_none_or(|until| now >= until) {
            let endpoint = connection.peer().map(tracing::field::display);
            tracing::warn!(
                endpoint,
                "the endpoint sends unsolicited bytes: a body with a response to HEAD, a 204 or 304, more than its \
                 Content-Length, or data on an idle connection; the bytes are discarded and their connections closed"
            );
        }
    }
}
