//! A delivery, as the admin API and `outrigger queue` show it.

use std::time::SystemTime;

use base64::{Engine, engine::general_purpose::STANDARD};
use http::HeaderMap;
use serde::{Deserialize, Serialize};

use crate::{
    queue::{
        StoredRequest,
        store::{Outcome, Summary},
    },
    redact::{REDACTED, Secret, is_credential_name},
    resilience::queue::DeadReason,
    telemetry::timestamp::Timestamp,
    unix_time::UnixMillis,
};

/// What is known of a delivery without its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeliveryReport {
    pub id: String,
    pub queue: String,
    pub state: String,
    /// Why it is a dead letter.
    pub reason: Option<String>,
    /// That reached the service.
    pub attempts: u32,
    pub accepted: String,
    /// Seconds since it was accepted.
    pub age_seconds: u64,
    pub next: Option<String>,
    pub ended: Option<String>,
    /// The identity that it was accepted from.
    pub client: String,
    /// The client's `Idempotency-Key`.
    pub key: Option<String>,
    /// Deliveries with the same one go one at a time.
    pub order: Option<String>,
    /// Of the request.
    pub bytes: u64,
    /// Of the last attempt.
    pub status: Option<u16>,
    pub cause: Option<String>,
}

/// A delivery with its request and its last response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeliveryDetail {
    #[serde(flatten)]
    pub delivery: DeliveryReport,
    pub request: RequestContent,
    pub response: Option<ResponseContent>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestContent {
    /// `inbound` or `outbound`.
    pub direction: String,
    pub method: String,
    pub url: String,
    /// Without the values of credentials.
    pub fields: Vec<(String, String)>,
    pub body: BodyContent,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResponseContent {
    pub status: u16,
    pub body: BodyContent,
}

/// A body, whose content is shown only on demand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BodyContent {
    pub bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
}

impl DeliveryReport {
    /// `state`: the stable word, as `delivering` is not in the store.
    pub fn of(delivery: &Summary, state: &str, now: UnixMillis) -> Self {
        Self {
            id: delivery.id.to_string(),
            queue: delivery.queue.clone(),
            state: state.to_owned(),
            reason: delivery.reason.map(|reason| DeadReason::word(reason).to_owned()),
            attempts: delivery.attempts,
            accepted: rfc3339(delivery.accepted),
            age_seconds: now.since(delivery.accepted).as_secs(),
            next: delivery.next.map(rfc3339),
            ended: delivery.ended.map(rfc3339),
            client: delivery.identity.clone(),
            key: delivery.idempotency_key.clone(),
            order: delivery.order_key.clone(),
            bytes: delivery.bytes,
            status: delivery.status,
            cause: delivery.cause.clone(),
        }
    }
}

impl DeliveryDetail {
    pub fn new(
        delivery: DeliveryReport,
        (request, body): (&StoredRequest, &[u8]),
        outcome: Option<&Outcome>,
        shows_bodies: bool,
    ) -> Self {
        let response = outcome.and_then(|outcome| {
            let body = BodyContent::of(&outcome.body, shows_bodies);
            Some(ResponseContent { status: outcome.status?, body })
        });
        let request = RequestContent {
            direction: request.direction.word().to_owned(),
            method: request.method.to_string(),
            url: Secret::redact_url(request.uri.to_string()).to_string(),
            fields: fields(&request.headers),
            body: BodyContent::of(body, shows_bodies),
        };
        Self { delivery, request, response }
    }
}

impl BodyContent {
    fn of(body: &[u8], is_shown: bool) -> Self {
        Self { bytes: body.len() as u64, base64: is_shown.then(|| STANDARD.encode(body)) }
    }

    /// The content, if it was asked for.
    pub fn content(&self) -> Option<Vec<u8>> {
        STANDARD.decode(self.base64.as_ref()?).ok()
    }
}

fn fields(fields: &HeaderMap) -> Vec<(String, String)> {
    let shown = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let field = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
        let hidden = is_credential_name(name.as_str());
        (name.to_string(), if hidden { REDACTED.to_owned() } else { shown(value) })
    };
    fields.iter().map(field).collect()
}

fn rfc3339(time: UnixMillis) -> String {
    Timestamp::from(SystemTime::from(time)).to_string()
}
