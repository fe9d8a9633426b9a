//! The queues and their deliveries in the admin API: list, show, replay, drop, pause, resume.
//!
//! | request | does |
//! | --- | --- |
//! | `GET /deliveries?queue=&state=&reason=&older=&after=&limit=` | lists, in the order of acceptance |
//! | `GET /deliveries/ID?body=1` | one with its request and response |
//! | `POST /deliveries/replay` | queues dead letters again |
//! | `POST /deliveries/drop` | gives deliveries up |
//! | `POST /queues/NAME/pause`, `…/resume` | stops and resumes the deliveries of a queue |
//!
//! All of them need the token: deliveries hold what clients sent.

pub mod report;

use std::{str::FromStr, time::Duration};

use http::{StatusCode, request::Parts};
use serde::{Deserialize, Serialize};

use self::report::{DeliveryDetail, DeliveryReport};
use super::api::{ApiResponse, json, problem};
use crate::{
    proxy::queue::{Queues, operate::OperateError},
    queue::{
        DeliveryId,
        store::{DeliveryState, Filter, StoreError},
    },
    resilience::queue::DeadReason,
    runtime::lifecycle::Control,
    units::HumanDuration,
};

/// Deliveries of one response at most.
const PAGE: usize = 500;

/// The body of a 200 to `GET /deliveries`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeliveryList {
    pub deliveries: Vec<DeliveryReport>,
    /// `after` of the request for the next page; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<i64>,
}

/// Which deliveries, in a query or in the body of a request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeliveryFilter {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Accepted longer ago.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub older: Option<HumanDuration>,
}

/// The body of `POST /deliveries/replay`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReplayRequest {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<String>,
    /// All dead letters that pass `filter`, in place of `ids`.
    pub all: bool,
    pub filter: DeliveryFilter,
    /// So many become due in a second, e.g. `10/s`; all at once without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<String>,
}

/// The body of a 200 to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replayed {
    pub replayed: u64,
}

/// The body of `POST /deliveries/drop`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DropRequest {
    pub ids: Vec<String>,
}

/// The body of a 200 to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    pub dropped: Vec<DroppedDelivery>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedDelivery {
    pub id: String,
    /// The state before.
    pub was: String,
    /// Whether it is a dead letter now; else it is deleted.
    pub is_dead_letter: bool,
}

/// The body of a 200 to `POST /queues/NAME/pause` and `…/resume`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueChange {
    pub queue: String,
    pub paused: bool,
}

/// `N/s`: the time between two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate(pub Duration);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_suffix("/s").unwrap_or(text).trim().parse::<f64>();
        match number {
            Ok(number) if number >= 0.001 && number.is_finite() => {
                Ok(Self(Duration::from_secs_f64(1.0 / number)))
            }
            _ => Err(format!("`{text}` is not a rate: write e.g. 10/s")),
        }
    }
}

/// Why a request is refused.
struct Refusal(StatusCode, &'static str, String);

type Outcome<T> = Result<T, Refusal>;

impl From<Refusal> for ApiResponse {
    fn from(Refusal(status, title, detail): Refusal) -> Self {
        problem(status, title, &detail)
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        let detail = error.to_string();
        match error {
            StoreError::NotFound => Self(StatusCode::NOT_FOUND, "No such delivery", detail),
            StoreError::WrongState(_) => Self(StatusCode::CONFLICT, "Not in this state", detail),
            StoreError::Unreadable(_) => Self(StatusCode::UNPROCESSABLE_ENTITY, "Cannot be read", detail),
            _ => Self(StatusCode::SERVICE_UNAVAILABLE, "The store has failed", detail),
        }
    }
}

impl From<OperateError> for Refusal {
    fn from(error: OperateError) -> Self {
        let detail = error.to_string();
        match error {
            OperateError::Store(error) => error.into(),
            OperateError::Delivery { error, .. } => {
                let Self(status, title, _) = error.into();
                Self(status, title, detail)
            }
            OperateError::UnderWay(_) => Self(StatusCode::CONFLICT, "It is under way", detail),
        }
    }
}

fn bad(detail: impl Into<String>) -> Refusal {
    Refusal(StatusCode::BAD_REQUEST, "Not a valid request", detail.into())
}

fn queues(control: &Control) -> Outcome<&Queues> {
    control.shared.queues.as_deref().ok_or_else(|| {
        Refusal(StatusCode::NOT_FOUND, "No store", "this sidecar has no [store], and so no queues".to_owned())
    })
}

fn respond<T: Serialize>(outcome: Outcome<T>) -> ApiResponse {
    outcome.map_or_else(Into::into, |body| json(StatusCode::OK, &body))
}

pub async fn list(control: &Control, parts: &Parts) -> ApiResponse {
    respond(find_all(control, parts).await)
}

pub async fn show(control: &Control, parts: &Parts) -> ApiResponse {
    respond(find(control, parts).await)
}

pub async fn replay(control: &Control, body: &[u8]) -> ApiResponse {
    respond(replay_dead(control, body).await)
}

pub async fn drop_all(control: &Control, body: &[u8]) -> ApiResponse {
    respond(drop_each(control, body).await)
}

/// `is_paused`: what the queue is to be.
pub async fn pause(control: &Control, parts: &Parts, is_paused: bool) -> ApiResponse {
    respond(change(control, parts, is_paused).await)
}

async fn find_all(control: &Control, parts: &Parts) -> Outcome<DeliveryList> {
    let queues = queues(control)?;
    let mut filter = DeliveryFilter::default();
    let (mut after, mut limit) = (0, PAGE);
    for (name, value) in query(parts) {
        let number = || value.parse::<i64>().map_err(|_| bad(format!("`{name}` is a number")));
        match name {
            "queue" => filter.queue = Some(value),
            "state" => filter.state = Some(value),
            "reason" => filter.reason = Some(value),
            "older" => filter.older = Some(value.parse().map_err(bad)?),
            "after" => after = number()?,
            "limit" => limit = usize::try_from(number()?).unwrap_or(0).clamp(1, PAGE),
            _ => return Err(bad(format!("`{name}` is unknown: queue, state, reason, older, after, limit"))),
        }
    }
    let found = queues.store.list(filter.compiled(queues)?, after, limit).await?;
    let next = found.last().map(|last| last.seq).filter(|_| found.len() == limit);
    let now = queues.store.now();
    let report = |delivery| DeliveryReport::of(delivery, queues.state_word(delivery), now);
    Ok(DeliveryList { deliveries: found.iter().map(report).collect(), next })
}

async fn find(control: &Control, parts: &Parts) -> Outcome<DeliveryDetail> {
    let queues = queues(control)?;
    let id = id(parts.uri.path().rsplit('/').next().unwrap_or_default())?;
    let shows_bodies = query(parts).any(|(name, value)| name == "body" && value == "1");
    let delivery = queues.store.find(id).await?;
    let (request, body) = queues.store.content(id).await?;
    let outcome = queues.store.outcome(id).await?;
    let report = DeliveryReport::of(&delivery, queues.state_word(&delivery), queues.store.now());
    Ok(DeliveryDetail::new(report, (&request, &body), outcome.as_ref(), shows_bodies))
}

async fn replay_dead(control: &Control, body: &[u8]) -> Outcome<Replayed> {
    let queues = queues(control)?;
    let request: ReplayRequest = serde_json::from_slice(body).map_err(|error| {
        bad(format!("{error}; send e.g. {{\"ids\": [\"ID\"]}} or {{\"all\": true, \"rate\": \"10/s\"}}"))
    })?;
    if request.all != request.ids.is_empty() {
        return Err(bad("send either `ids`, or `all` with a `filter`"));
    }
    let rate = request.rate.as_deref().map(str::parse::<Rate>).transpose().map_err(bad)?;
    let spacing = rate.map_or(Duration::ZERO, |rate| rate.0);
    let replayed = if request.all {
        queues.replay_all(&request.filter.compiled(queues)?, spacing).await?
    } else {
        queues.replay(&ids(&request.ids)?, spacing).await?
    };
    Ok(Replayed { replayed })
}

async fn drop_each(control: &Control, body: &[u8]) -> Outcome<Dropped> {
    let queues = queues(control)?;
    let request: DropRequest = serde_json::from_slice(body)
        .map_err(|error| bad(format!("{error}; send e.g. {{\"ids\": [\"ID\"]}}")))?;
    let mut done = Dropped::default();
    for id in ids(&request.ids)? {
        let before = queues.drop_delivery(id).await?;
        let (was, is_dead_letter) = (before.word().to_owned(), before.is_pending());
        done.dropped.push(DroppedDelivery { id: id.to_string(), was, is_dead_letter });
    }
    Ok(done)
}

async fn change(control: &Control, parts: &Parts, is_paused: bool) -> Outcome<QueueChange> {
    let queues = queues(control)?;
    let name = parts.uri.path().split('/').nth(2).unwrap_or_default();
    let config = &control.shared.snapshot.load_full().config;
    if !config.queues.iter().any(|queue| queue.name == name) {
        let names: Vec<&str> = config.queues.iter().map(|queue| queue.name.as_str()).collect();
        let detail = format!("there is no queue `{name}`; configured: {}", names.join(", "));
        return Err(Refusal(StatusCode::NOT_FOUND, "No such queue", detail));
    }
    queues.set_paused(name, is_paused).await?;
    Ok(QueueChange { queue: name.to_owned(), paused: is_paused })
}

impl DeliveryFilter {
    fn compiled(&self, queues: &Queues) -> Outcome<Filter> {
        let state = |word: &String| {
            let states = DeliveryState::ALL;
            states.into_iter().find(|state| state.word() == word).ok_or_else(|| {
                bad(format!(
                    "`{word}` is no state: write one of {}",
                    states.map(DeliveryState::word).join(", ")
                ))
            })
        };
        let reason = |word: &String| {
            DeadReason::from_word(word).ok_or_else(|| {
                let words = DeadReason::ALL.map(DeadReason::word).join(", ");
                bad(format!("`{word}` is no reason: write one of {words}"))
            })
        };
        Ok(Filter {
            queue: self.queue.clone(),
            state: self.state.as_ref().map(state).transpose()?,
            reason: self.reason.as_ref().map(reason).transpose()?,
            accepted_before: self.older.map(|age| queues.store.now().before(age.0)),
        })
    }

    /// As the query of a request.
    pub fn to_query(&self, after: i64) -> String {
        let older = self.older.map(|age| age.to_string());
        let fields =
            [("queue", &self.queue), ("state", &self.state), ("reason", &self.reason), ("older", &older)];
        let mut query = format!("after={after}");
        for (name, value) in fields {
            if let Some(value) = value {
                query += &format!("&{name}={value}");
            }
        }
        query
    }
}

/// Names of queues, states and durations need no escapes.
fn query(parts: &Parts) -> impl Iterator<Item = (&str, String)> {
    let fields = parts.uri.query().unwrap_or_default().split('&').filter(|field| !field.is_empty());
    fields.map(|field| {
        let (name, value) = field.split_once('=').unwrap_or((field, ""));
        (name, value.to_owned())
    })
}

fn id(text: &str) -> Outcome<DeliveryId> {
    text.parse().map_err(|error: crate::delivery_id::InvalidDeliveryId| bad(error.to_string()))
}

fn ids(texts: &[String]) -> Outcome<Vec<DeliveryId>> {
    texts.iter().map(|text| id(text)).collect()
}
