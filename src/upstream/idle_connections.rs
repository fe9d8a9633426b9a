//! The idle HTTP/1.1 connections of one worker to one endpoint: a stack, the freshest on top, so that the surplus grows old
//! and is closed.

use std::{
    cell::{Cell, RefCell},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    http1::{Http1, Rest},
    idle::Learned,
    pool::{ConnectionSettings, fits, is_of},
    stream::Idle,
};
use crate::{config::PoolIdle, identity::tls::ClientTls};

/// Idle connections kept.
const MAX_IDLE: usize = 512;
/// How long an idle connection is kept where nothing better is known: Node closes after 5 s.
const IDLE_UNKNOWN: Duration = Duration::from_secs(4);
/// For how long an endpoint is remembered to have sent bytes that no request asked for.
const NOISY_FOR: Duration = Duration::from_secs(600);
/// After so many responses without a body, behind which nothing came, connections are reused at once.
const KEEPS_TO_HTTP_AFTER: u8 = 8;

/// See the [module](self).
#[derive(Debug, Default)]
pub struct IdleConnections {
    stack: RefCell<Vec<Http1>>,
    /// What the endpoint's closes have taught about its idle time.
    learned: Cell<Learned>,
    /// Until when its connections rest before they are reused, since it has sent bytes that no request asked for.
    noisy_until: Cell<Option<Instant>>,
    /// How many responses to HEAD, and with a 204 or 304, nothing came behind, while their connections rested.
    proper: [Cell<u8>; 2],
}

impl IdleConnections {
    /// Takes connections off the stack until one can be used. It was looked at just now: what its request is written to in
    /// the same turn of the task had nothing unread.
    pub fn pop(&self, settings: &ConnectionSettings, now: Instant) -> Option<Http1> {
        let mut stack = self.stack.borrow_mut();
        // A connection to another TLS name stays for requests to that name.
        let reusable =
            |connection: &Http1| connection.reusable_from <= now && fits(connection.proof(), settings);
        while let Some(at) = stack.iter().rposition(reusable) {
            let mut connection = stack.remove(at);
            let age = now.saturating_duration_since(connection.idle_since);
            if age >= self.limit(&connection, settings.pool_idle, now) || connection.is_retired(now) {
                continue;
            }
            match connection.look() {
                Idle::Quiet => {
                    self.learn(|learned| learned.outlived(age));
                    if connection.reusable_from > connection.idle_since {
                        self.note_proper(&connection);
                    }
                    return Some(connection);
                }
                Idle::Closed => self.learn(|learned| learned.closed(age, now)),
                Idle::Unsolicited => self.note_unsolicited(&connection, now),
            }
        }
        None
    }

    /// Keeps a connection whose response was read to its end, if it can be used again.
    pub fn put_back(&self, mut connection: Http1, now: Instant) {
        let noisy = self.noisy_until.get().is_some_and(|until| now < until);
        let unknown = |kind| self.proper[kind as usize].get() < KEEPS_TO_HTTP_AFTER;
        let settles = noisy || connection.bodiless().is_some_and(unknown);
        match connection.rest(settles, now) {
            Rest::Reusable => {
                let mut stack = self.stack.borrow_mut();
                if stack.len() < MAX_IDLE {
                    stack.push(connection);
                }
            }
            Rest::Ends => {}
            Rest::Unsolicited => self.note_unsolicited(&connection, now),
        }
    }

    /// Closes the connection that has been idle for longest. False: there is none.
    pub fn close_oldest(&self) -> bool {
        let mut stack = self.stack.borrow_mut();
        if stack.is_empty() {
            return false;
        }
        drop(stack.remove(0));
        true
    }

    /// Closes what has been idle for too long, and what was made by other TLS settings.
    pub fn sweep(&self, setting: PoolIdle, tls: Option<&Arc<ClientTls>>, now: Instant) {
        self.stack.borrow_mut().retain_mut(|connection| {
            if !is_of(connection.proof(), tls) {
                return false;
            }
            let age = now.saturating_duration_since(connection.idle_since);
            match connection.listen() {
                Idle::Quiet => age < self.limit(connection, setting, now) && !connection.is_retired(now),
                Idle::Closed => {
                    self.learn(|learned| learned.closed(age, now));
                    false
                }
                Idle::Unsolicited => {
                    self.note_unsolicited(connection, now);
                    false
                }
            }
        });
    }

    /// The endpoint takes no connections: what it closed just now was not closed for idling.
    pub fn connect_failed(&self) {
        self.learn(Learned::restarted);
        self.forget_proper();
    }

    pub fn len(&self) -> usize {
        self.stack.borrow().len()
    }

    fn limit(&self, connection: &Http1, setting: PoolIdle, now: Instant) -> Duration {
        match setting {
            PoolIdle::Fixed(limit) => *limit,
            PoolIdle::Auto => {
                let told = connection.told.unwrap_or(IDLE_UNKNOWN);
                self.learned.get().limit(now).map_or(told, |learned| learned.min(told))
            }
        }
    }

    fn learn(&self, what: impl FnOnce(&mut Learned)) {
        let mut learned = self.learned.get();
        what(&mut learned);
        self.learned.set(learned);
    }

    /// Nothing came behind a response without a body, in the time for which its connection rested.
    fn note_proper(&self, connection: &Http1) {
        if let Some(kind) = connection.bodiless() {
            let count = &self.proper[kind as usize];
            count.set(count.get().saturating_add(1));
        }
    }

    fn forget_proper(&self) {
        self.proper.iter().for_each(|count| count.set(0));
    }

    /// The endpoint has sent what no request asked for. Its connections rest from now on before they are reused, so that
    /// what else it sends is seen.
    fn note_unsolicited(&self, connection: &Http1, now: Instant) {
        self.forget_proper();
        let known = self.noisy_until.replace(now.checked_add(NOISY_FOR));
        if known.is_none_or(|until| now >= until) {
            let endpoint = connection.peer().map(tracing::field::display);
            tracing::warn!(
                endpoint,
                "the endpoint sends bytes that no request asked for: a body with a response to HEAD, a 204 or 304, more than \
                 its Content-Length, or on an idle connection; they are discarded with their connections"
            );
        }
    }
}
