//! Streams that change their protocol, for as long as the configuration lets them.

use http::{Method, Request};
use tokio::sync::oneshot;

use super::{Connection, ConnectionError};
use crate::{model::Side, net::io::Io, proxy::authorize};

impl Connection {
    /// The stream of a call, for when its answer changes the protocol.
    pub fn upgrade<B>(&self, request: &Request<B>) -> Upgrade {
        let (handover, stream) = oneshot::channel();
        self.handover.replace(Some(handover));
        let asked = (self.side == Side::Inbound)
            .then(|| Box::new((request.method().clone(), request.uri().path().to_owned())));
        Upgrade { stream, asked }
    }
}

/// A stream that changes its protocol.
#[derive(Debug)]
pub struct Upgrade {
    stream: oneshot::Receiver<Box<dyn Io>>,
    /// Method and path of an inbound request, by which it was allowed.
    asked: Option<Box<(Method, String)>>,
}

impl Upgrade {
    /// The stream, from where the new protocol begins. `None`: it did not come about.
    pub async fn stream(&mut self) -> Option<Box<dyn Io>> {
        (&mut self.stream).await.ok()
    }

    /// Waits until the configuration would not let the request in any more that has led to this.
    pub async fn revoked(&self, connection: &Connection) {
        let Some(asked) = &self.asked else { return std::future::pending().await };
        let mut applied = connection.worker.shared.phase.subscribe();
        loop {
            let allowed = authorize::upgraded(connection, &connection.worker.view(), (&asked.0, &asked.1));
            let why = connection.refusal_by_now().or(allowed.err().map(ConnectionError::from));
            if let Some(why) = why {
                return tracing::info!(peer = ?connection.peer, "an upgraded connection is cut: {why}");
            }
            if applied.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}
