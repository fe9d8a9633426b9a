//! The CONNECT method: a tunnel that the client asks for.

use std::rc::Rc;

use http::{Request, Response};
use tokio::task::spawn_local;

use super::{
    address_check::check_address,
    body::{ClientBody, ResponseBody},
    connection::Connection,
    dial::{DialError, dial_allowed},
    error::ProxyError,
    target,
};
use crate::model::View;

/// Handles CONNECT. Dials first, so that a failure can still be reported in the response.
pub async fn open_tunnel(
    connection: &Rc<Connection>,
    view: &View,
    request: &mut Request<ClientBody>,
) -> Result<Response<ResponseBody>, ProxyError> {
    let authority =
        request.uri().authority().ok_or_else(|| ProxyError::malformed("CONNECT names no host"))?;
    let to = target::host_port(authority, request.method())?;
    let target = target::by_host(connection, view, &to, request)?;
    // The server must have the identity that the client named, unless the configuration names another one.
    let tls = target.serving.cluster.tls_target(Some(authority.as_str()));
    let allowed = |address| check_address(view, &connection.worker, &target, address);
    let dialled = match dial_allowed(connection, &target.serving, tls, allowed).await {
        Ok(dialled) => Some(dialled),
        // The tunnel may still carry requests.
        Err(DialError::HttpOnly(error)) => {
            tracing::debug!(%error, "the CONNECT tunnel accepts requests only");
            None
        }
        Err(DialError::Failed(error)) => return Err(error),
    };
    let mut upgrade = connection.upgrade(request);
    let inside = connection.inner_for_tunnel(to);
    spawn_local(async move {
        let _open = inside.worker.shared.metrics.outbound.count_open();
        let Some(stream) = upgrade.stream().await else { return };
        let ended = inside.serve_tunnel(stream, dialled, &target.serving).await;
        if let Err(error) = ended {
            tracing::debug!(upstream = target.serving.cluster.settings.name, %error, "tunnel ended");
        }
    });
    Ok(Response::new(ResponseBody::Empty))
}
