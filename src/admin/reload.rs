//! `POST /reload`: reloads the configuration files and returns the outcome.

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::api::{ApiResponse, json, problem};
use crate::{
    runtime::{lifecycle::Control, reload::ReloadOutcome},
    watch::WatchReason,
};

pub const PATH: &str = "/reload";
/// The limit for a reload. It takes milliseconds unless the process is shutting down.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The body of the request; an empty one is the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReloadRequest {
    /// Apply the files even if they protect the service less than the running configuration, or are empty.
    pub accept_less_security: bool,
}

/// The body of a 200.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadResponse {
    /// Sections and upstreams that changed.
    pub changed: Vec<String>,
}

pub async fn reload(control: &Arc<Control>, body: &[u8]) -> ApiResponse {
    let request = match body {
        [] => ReloadRequest::default(),
        body => match serde_json::from_slice(body) {
            Ok(request) => request,
            Err(error) => {
                let detail = format!("send {{\"accept_less_security\": true}} or an empty body ({error})");
                return problem(StatusCode::BAD_REQUEST, "Not a reload request", &detail);
            }
        },
    };
    let reason = if request.accept_less_security { WatchReason::Confirmed } else { WatchReason::Requested };
    let busy = |detail: &str| problem(StatusCode::SERVICE_UNAVAILABLE, "Not reloaded", detail);
    let Some(outcome) = control.reload_requests.request(reason) else {
        return busy("too many requests to reload are waiting");
    };
    match timeout(TIMEOUT, outcome).await {
        Ok(Ok(ReloadOutcome::Applied(changed))) => json(StatusCode::OK, &ReloadResponse { changed }),
        Ok(Ok(ReloadOutcome::Held(reason))) => {
            problem(StatusCode::CONFLICT, "The configuration is held back", &reason)
        }
        Ok(Ok(ReloadOutcome::Rejected(reason))) => {
            problem(StatusCode::UNPROCESSABLE_ENTITY, "The configuration cannot be used", &reason)
        }
        Ok(Err(_)) | Err(_) => busy("the process is shutting down, or too busy to read its files"),
    }
}
