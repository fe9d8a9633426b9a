//! The resources of a delivery: its state, its response, and cancelling it. Only for the client that it was accepted from.

use http::{
    HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER},
};
use serde_json::json;

use super::{ASK_AGAIN, ClaimGuard, Queues, identity, queues, store_error};
use crate::{
    cause::Cause,
    model::queue_route::DeliveryPath,
    proxy::{
        body::{ClientBody, ResponseBody},
        error::ProxyError,
        origin::Origin,
    },
    queue::{
        DeliveryId,
        store::{DeliveryState, Outcome, StoreError, Summary},
    },
    telemetry::timestamp::Timestamp,
};

/// Fields of a stored response, at most.
const MAX_FIELDS: usize = 128;
const TRUNCATED: HeaderName = HeaderName::from_static("x-outrigger-truncated");

/// Serves `/.well-known/outrigger/deliveries/…`.
pub async fn serve(
    origin: &Origin<'_>,
    request: &Request<ClientBody>,
) -> Result<Response<ResponseBody>, ProxyError> {
    let DeliveryPath { id, response } = DeliveryPath::parse(request.uri().path()).ok_or_else(unknown)?;
    let queues = queues(origin)?;
    let client = identity(origin, request.extensions().get());
    let summary = match queues.store.find(id).await {
        Ok(summary) if summary.identity == client => summary,
        Err(StoreError::NotFound) => return Err(deleted(queues, id, client).await),
        Ok(_) => return Err(unknown()),
        Err(error) => return Err(store_error(&error)),
    };
    match *request.method() {
        Method::GET | Method::HEAD if response => read_response(queues, &summary).await,
        Method::GET | Method::HEAD => Ok(state(queues, &summary)),
        Method::DELETE if !response => cancel(queues, &summary).await,
        _ => {
            let allowed = if response { "GET, HEAD" } else { "GET, HEAD, DELETE" };
            let mut response = Response::new(ResponseBody::Empty);
            *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
            response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
            Ok(response)
        }
    }
}

/// 410 where this client got the ID from here, 404 otherwise.
async fn deleted(queues: &Queues, id: DeliveryId, identity: String) -> ProxyError {
    match queues.store.has_issued(id, identity).await {
        Ok(true) => ProxyError::new(
            Cause::DeliveryUnknown,
            "the delivery has ended, and what was kept of it is deleted",
        )
        .with_status(StatusCode::GONE),
        Ok(false) => unknown(),
        Err(error) => store_error(&error),
    }
}

fn unknown() -> ProxyError {
    ProxyError::new(Cause::DeliveryUnknown, "there is no such delivery")
}

fn state(queues: &Queues, summary: &Summary) -> Response<ResponseBody> {
    let next = summary.next.map(|next| Timestamp::from(std::time::SystemTime::from(next)).to_string());
    let body = json!({
        "id": summary.id.to_string(),
        "state": queues.state_word(summary),
        "reason": summary.reason.map(|reason| reason.word()),
        "attempts": summary.attempts,
        "next": next.filter(|_| summary.state.is_pending()),
    });
    let mut response = Response::new(ResponseBody::whole(body.to_string()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if summary.state.is_pending() {
        headers.insert(RETRY_AFTER, ASK_AGAIN.as_secs().into());
    }
    response
}

async fn read_response(queues: &Queues, summary: &Summary) -> Result<Response<ResponseBody>, ProxyError> {
    let word = queues.state_word(summary);
    let none = |detail: String| ProxyError::new(Cause::DeliveryState, detail);
    if summary.state.is_pending() {
        let detail = format!("the delivery is {word}: there is no response yet");
        return Err(none(detail).retry_after(ASK_AGAIN));
    }
    let outcome = queues.store.outcome(summary.id).await.map_err(|error| store_error(&error))?;
    let response = match summary.state {
        DeliveryState::Done | DeliveryState::Dead => outcome.and_then(stored_response),
        _ => None,
    };
    response.ok_or_else(|| none(format!("the delivery is {word}, without a response of the service")))
}

/// The service's response as it was; `None` where there is none.
pub fn stored_response(outcome: Outcome) -> Option<Response<ResponseBody>> {
    let status = StatusCode::from_u16(outcome.status?).ok()?;
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut parsed = httparse::Response::new(&mut fields);
    let is_whole = parsed.parse(&outcome.head).is_ok_and(|status| status.is_complete());
    let mut response = Response::new(ResponseBody::whole(outcome.body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    for field in parsed.headers.iter().filter(|_| is_whole) {
        if let (Ok(name), Ok(value)) =
            (HeaderName::try_from(field.name), HeaderValue::from_bytes(field.value))
            && name != CONTENT_LENGTH
        {
            headers.append(name, value);
        }
    }
    if outcome.truncated {
        headers.insert(TRUNCATED, HeaderValue::from_static("?1"));
    }
    Some(response)
}

async fn cancel(queues: &Queues, summary: &Summary) -> Result<Response<ResponseBody>, ProxyError> {
    let id = summary.id;
    let Some(claim) = ClaimGuard::change(queues, id, &summary.queue) else {
        let detail = "the delivery is under way, and cannot be cancelled now";
        return Err(ProxyError::new(Cause::DeliveryState, detail).retry_after(ASK_AGAIN));
    };
    let cancelled = queues.store.cancel(id, summary.identity.clone()).await;
    drop(claim);
    cancelled.map_err(|error| store_error(&error))?;
    queues.notify_end(id);
    let summary = queues.store.find(id).await.map_err(|error| store_error(&error))?;
    Ok(state(queues, &summary))
}
