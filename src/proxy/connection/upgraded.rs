//! Streams that change their protocol (Upgrade, CONNECT), for as long as the configuration allows them.

use http::{Method, Request};
use tokio::sync::oneshot;

use super::{Connection, ConnectionError};
use crate::{model::Side, net::io::Io, proxy::authorize};

impl Connection {
    /// The stream of a request whose response may change the protocol.
    pub fn upgrade<B>(&self, request: &Request<B>) -> Upgrade {
        let (handover, stream) = oneshot::channel();
        self.handover.replace(Some(handover));
        let allowed_request = (self.side == Side::Inbound)
            .then(|| Box::new((request.method().clone(), request.uri().path().to_owned())));
        Upgrade { stream, allowed_request }
    }
}

/// A stream that is to change its protocol.
#[derive(Debug)]
pub struct Upgrade {
    stream: oneshot::Receiver<Box<dyn Io>>,
    /// Method and path of the inbound request, to check it against the allow list again.
    allowed_request: Option<Box<(Method, String)>>,
}

impl Upgrade {
    /// The stream, from the first byte of the new protocol. `None`: the upgrade did not take place.
    pub async fn stream(&mut self) -> Option<Box<dyn Io>> {
        (&mut self.stream).await.ok()
    }

    /// Waits until the configuration would no longer allow the request that was upgraded.
    pub async fn wait_until_disallowed(&self, connection: &Connection) {
        let Some(allowed_request) = &self.allowed_request else { return std::future::pending().await };
        let mut applied = connection.worker.shared.phase.subscribe();
        loop {
            let allowed = authorize::check_upgrade(
                connection,
                &connection.worker.view(),
                &allowed_request.0,
                &allowed_request.1,
            );
            let reason = connection.refusal_by_current_config().or(allowed.err().map(ConnectionError::from));
            if let Some(reason) = reason {
                return tracing::info!(peer = ?connection.peer, "upgraded connection cut: {reason}");
            }
            if applied.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}
