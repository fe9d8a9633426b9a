//! `GET /cache`: what is stored. `POST /cache/purge`: removes it.

use std::{sync::Arc, time::SystemTime};

use http::StatusCode;
use serde::{Deserialize, Serialize};

use super::api::{ApiResponse, json, problem};
use crate::{
    cache::{Listed, Store},
    runtime::lifecycle::Control,
};

/// The path of the purge.
pub const PURGE_PATH: &str = "/cache/purge";
/// The path of the list.
pub const LIST_PATH: &str = "/cache";

/// What is to be purged: a URL, which may end in `*`, or everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PurgeRequest {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub all: bool,
}

/// How many responses were removed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Purged {
    pub purged: u64,
}

/// The store in `GET /status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheStatus {
    pub keys: u64,
    pub bytes: u64,
    pub max_bytes: u64,
    pub evictions: u64,
    /// Requests that wait for the fetch of another one.
    pub waiting: u64,
}

impl CacheStatus {
    pub fn of(store: &Store) -> Self {
        Self {
            bytes: store.bytes(),
            keys: store.keys(),
            max_bytes: store.max_bytes(),
            evictions: store.evictions(),
            waiting: store.flights.waiting() as u64,
        }
    }
}

/// What `GET /cache` has.
#[derive(Debug, Serialize, Deserialize)]
pub struct CacheList {
    pub responses: Vec<Listed>,
}

pub fn list(control: &Arc<Control>) -> ApiResponse {
    let snapshot = control.shared.snapshot.load();
    let responses = snapshot.cache.as_ref().map_or_else(Vec::new, |store| store.list(SystemTime::now()));
    json(StatusCode::OK, &CacheList { responses })
}

pub fn purge(control: &Arc<Control>, body: &[u8]) -> ApiResponse {
    let detail = "send {\"url\": \"http://HOST/PATH\"}, with `*` at its end for a prefix, or {\"all\": true}";
    let refuse =
        |reason: &str| problem(StatusCode::BAD_REQUEST, "Not a purge", &format!("{reason}; {detail}"));
    let request: PurgeRequest = match serde_json::from_slice(body) {
        Ok(request) => request,
        Err(error) => return refuse(&error.to_string()),
    };
    let snapshot = control.shared.snapshot.load();
    let purged = match (&request.url, request.all, &snapshot.cache) {
        (Some(_), true, _) | (None, false, _) => {
            return refuse("neither or both of `url` and `all` are given");
        }
        (Some(url), ..) if url.is_empty() => return refuse("`url` is empty"),
        (.., None) => 0,
        (Some(url), false, Some(store)) => store.purge(url),
        (None, true, Some(store)) => store.purge_all(),
    };
    tracing::info!(url = request.url.as_deref().unwrap_or("*"), purged, "stored responses purged");
    json(StatusCode::OK, &Purged { purged })
}
