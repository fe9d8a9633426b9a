//! Where a request comes from, as far as its exchange needs to know.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    rc::Rc,
};

use http::HeaderValue;
use tokio::time::Instant;

use super::{
    cached::standby::StaleStandby,
    connection::Connection,
    progress::{Progress, poll_watched},
};
use crate::{model::Side, net::watchdog::Watchdog};
use crate::{model::View, proxy::worker::Worker};

/// What starts an exchange: a client's connection, or anything else that has a worker.
///
/// An exchange is cancelled by dropping its future: permits, connections and what the retry budget holds go back.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    pub worker: &'a Rc<Worker>,
    /// The configuration that the request began with.
    pub view: &'a Rc<View>,
    /// The request's movement, and its record with the trace that it belongs to.
    pub progress: &'a Rc<Progress>,
    pub side: &'a Side,
    /// The address of who sent the request, as `x-forwarded-for` has it.
    pub peer: &'a HeaderValue,
    /// Its verified identity, as `x-forwarded-client-cert` has it.
    pub identity: Option<&'a HeaderValue>,
    /// The request came over TLS.
    pub is_tls: bool,
    /// Until when response headers are of use. Fields of the request can only shorten it.
    pub deadline: Option<Instant>,
    /// The client's connection, for interim responses and upgrades; none where no client waits on one.
    pub client: Option<&'a Rc<Connection>>,
    /// A stored response that may stand in for a failure.
    pub stale: Option<&'a StaleStandby>,
    /// Attempts that other exchanges made for the same delivery: `x-outrigger-attempt` counts them too.
    pub earlier_attempts: u32,
}

impl<'a> Origin<'a> {
    /// A client's request.
    pub fn of(connection: &'a Rc<Connection>, view: &'a Rc<View>, progress: &'a Rc<Progress>) -> Self {
        Self {
            worker: &connection.worker,
            view,
            progress,
            side: &connection.side,
            peer: &connection.peer,
            identity: if connection.side == Side::Inbound { connection.client_cert() } else { None },
            is_tls: connection.tls,
            deadline: None,
            client: Some(connection),
            stale: None,
            earlier_attempts: 0,
        }
    }

    /// Runs an exchange, or reads its response's body, where no connection's task watches over it: polls it when a
    /// deadline is due. `None`: the body stood still for `idle_timeout`, or `max_duration` is over.
    pub async fn watch<F: Future>(&self, exchange: F) -> Option<F::Output> {
        let (mut exchange, mut watchdog) = (pin!(exchange), Watchdog::default());
        let look = || (Some(Rc::clone(self.progress)), self.progress.cut_at());
        poll_fn(|cx| poll_watched(cx, &mut watchdog, |cx| exchange.as_mut().poll(cx), look)).await
    }
}
