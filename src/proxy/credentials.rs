//! The token that calls to an upstream carry in place of the caller's own credentials: `oauth2`.

use http::{HeaderMap, HeaderValue, StatusCode, header::AUTHORIZATION};
use tokio::time::Instant;

use super::{
    clock::WaitLimit,
    error::{Cause, ProxyError},
    exchange::RequestState,
};
use crate::runtime::LocalCluster;

/// What the caller sent, kept for an upstream that is asked in place of the first one: no upstream gets the token of
/// another.
#[derive(Debug)]
pub struct SetAside(Vec<HeaderValue>);

/// Puts the upstream's token into the call, if it has one; waits for it, no longer than `until`.
pub(super) async fn attach(
    local: &LocalCluster,
    state: &mut RequestState,
    until: WaitLimit,
) -> Result<(), ProxyError> {
    let headers = &mut state.outgoing.headers;
    if let Some(SetAside(callers)) = state.set_aside.take() {
        headers.remove(AUTHORIZATION);
        for value in callers {
            headers.append(AUTHORIZATION, value);
        }
    }
    let Some(token) = &local.cluster.token else { return Ok(()) };
    let field = match token.ready(Instant::now()) {
        Some(field) => field,
        None => {
            let name = &local.cluster.settings.name;
            let waited = Box::pin(until.wait(token.field())).await;
            waited.map_err(|time_limit| time_limit.unsent(name, "a token"))?.map_err(|error| {
                local.upstream.shared.guards.counts.rejected.add(Cause::AuthUnavailable.word());
                let told = ProxyError::new(Cause::AuthUnavailable, format!("{name}: {error}"));
                told.retry_after(error.retry_after)
            })?
        }
    };
    state.set_aside = Some(replace(&mut state.outgoing.headers, field));
    Ok(())
}

fn replace(headers: &mut HeaderMap, field: HeaderValue) -> SetAside {
    let callers = headers.get_all(AUTHORIZATION).iter().cloned().collect();
    headers.insert(AUTHORIZATION, field);
    SetAside(callers)
}

/// Tells the keeper of the token that the upstream does not take it.
pub(super) fn note(local: &LocalCluster, status: StatusCode) {
    if status == StatusCode::UNAUTHORIZED
        && let Some(token) = &local.cluster.token
    {
        token.refused();
    }
}
