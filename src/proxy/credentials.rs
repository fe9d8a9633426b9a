//! The token that requests to an upstream carry in place of the client's credentials: `oauth2`.

use http::{HeaderMap, HeaderValue, StatusCode, header::AUTHORIZATION};
use tokio::time::Instant;

use super::{clock::WaitLimit, error::ProxyError, exchange::RequestState};
use crate::{cause::Cause, model::WorkerCluster};

/// The client's Authorization fields, kept for a fallback upstream: no upstream may get the token of another.
#[derive(Debug)]
pub struct ClientAuthorization(Vec<HeaderValue>);

/// Puts the upstream's token into the request, if the upstream has one; waits for it no longer than `until`.
pub(super) async fn attach(
    local: &WorkerCluster,
    state: &mut RequestState,
    until: WaitLimit,
) -> Result<(), ProxyError> {
    let headers = &mut state.outgoing.headers;
    if let Some(ClientAuthorization(client_values)) = state.set_aside.take() {
        headers.remove(AUTHORIZATION);
        for value in client_values {
            headers.append(AUTHORIZATION, value);
        }
    }
    let Some(token) = &local.cluster.token else { return Ok(()) };
    let field = match token.current_field(Instant::now()) {
        Some(field) => field,
        None => {
            let name = &local.cluster.settings.name;
            let waited = Box::pin(until.wait(token.wait_for_field())).await;
            waited.map_err(|expired| expired.unsent(name, "a token"))?.map_err(|error| {
                local.upstream.shared.policy_state.counters.rejected.increment(Cause::AuthUnavailable.word());
                let failure = ProxyError::new(Cause::AuthUnavailable, format!("{name}: {error}"));
                failure.retry_after(error.retry_after)
            })?
        }
    };
    state.set_aside = Some(replace(&mut state.outgoing.headers, field));
    Ok(())
}

fn replace(headers: &mut HeaderMap, field: HeaderValue) -> ClientAuthorization {
    let client_values = headers.get_all(AUTHORIZATION).iter().cloned().collect();
    headers.insert(AUTHORIZATION, field);
    ClientAuthorization(client_values)
}

/// Reports to the token's source that the upstream has rejected the token.
pub(super) fn note_unauthorized(local: &WorkerCluster, status: StatusCode) {
    if status == StatusCode::UNAUTHORIZED
        && let Some(token) = &local.cluster.token
    {
        token.report_unauthorized();
    }
}
