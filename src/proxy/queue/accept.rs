//! Accepting a request: which ones are queued, reading the body, and the 202 once it is stored.

use std::time::Duration;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{CACHE_CONTROL, CONTENT_TYPE, LOCATION, RETRY_AFTER, UPGRADE},
};
use http_body::Body;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

use super::{
    ASK_AGAIN, INTAKE_KIB, INTAKE_WAIT, Queues, RETRY_WHEN_DRAINING, RETRY_WHEN_FULL, StoringGuard, identity,
    prefer::{PREFER, Prefer},
    queues, resource, store_error,
    stored::{self, Head},
};
use crate::{
    cause::Cause,
    field_set::{Field, FieldSet},
    model::queue_route::{AcceptRoute, DELIVERIES},
    proxy::{
        body::{BufferedBody, ClientBody, ReadBody, ResponseBody},
        cached,
        error::ProxyError,
        headers::is_grpc,
        origin::Origin,
        target::RouteTarget,
        worker::Phase,
    },
    queue::{
        DeliveryId,
        store::{DeliveryState, NewDelivery},
    },
    resilience::{
        classify::RetryAdvice,
        queue::keys::{DeliveryOrder, QueueWhen, RouteQueue},
    },
};

const IDEMPOTENCY_KEY: &str = "idempotency-key";
const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// A request on a route with `queue`.
#[derive(Clone, Copy)]
pub struct Intake<'a> {
    pub origin: &'a Origin<'a>,
    pub target: &'a RouteTarget,
    pub route: &'a AcceptRoute,
    pub present: FieldSet,
}

impl<'a> Intake<'a> {
    /// Queues the request or sends it on.
    pub async fn serve(
        self,
        request: &mut Request<ClientBody>,
    ) -> Result<Response<ResponseBody>, ProxyError> {
        let prefer = Prefer::of(request.headers());
        let when = self.route.route.when;
        if why_not_queued(&self.route.route, request.method(), request.headers()).is_some() {
            return self.forward(request).await;
        }
        if *self.origin.worker.shared.phase.borrow() > Phase::Running {
            return self.while_draining(request).await;
        }
        let queues = match queues(self.origin) {
            Ok(queues) => queues,
            Err(error) if when == QueueWhen::Always => return Err(error),
            Err(_) => return self.forward(request).await,
        };
        let mut share = Share { intake: &queues.intake, permit: None };
        let body = std::mem::take(request.body_mut());
        let body = match self.read(body, &mut share).await? {
            ReadBody::Whole(body) => body,
            ReadBody::NoMemory(_) if when == QueueWhen::Always => return Err(self.no_memory(queues)),
            ReadBody::TooLarge(_) if when == QueueWhen::Always => {
                let limit = self.route.queue.body_limit;
                let detail = format!(
                    "the body is larger than `body_limit` of queue `{}`: {limit}",
                    self.route.queue.name
                );
                return Err(ProxyError::new(Cause::BodyTooLarge, detail));
            }
            ReadBody::TooLarge(body) | ReadBody::NoMemory(body) => {
                drop(share);
                *request.body_mut() = body;
                return self.forward(request).await;
            }
        };
        let head = Head::of(request);
        if when == QueueWhen::Unavailable {
            *request.body_mut() = BufferedBody::whole(body.clone());
            let result = self.forward(request).await;
            if !self.is_unavailable(&head, &result) {
                return result;
            }
            // Its connection is not needed any more.
            drop(result);
        }
        self.accept(head, (body, share), prefer).await
    }

    /// During the drain no delivery begins, and where the store ends with the pod nothing more would be delivered.
    async fn while_draining(
        self,
        request: &mut Request<ClientBody>,
    ) -> Result<Response<ResponseBody>, ProxyError> {
        if self.route.route.when != QueueWhen::Always {
            return self.forward(request).await;
        }
        if let Ok(queues) = queues(self.origin) {
            queues.count_accepted(&self.route.queue.name, Cause::Draining.word());
        }
        let detail = format!("queue `{}` accepts nothing more: the proxy shuts down", self.route.queue.name);
        Err(ProxyError::new(Cause::Draining, detail).retry_after(RETRY_WHEN_DRAINING))
    }

    /// Sends the request on now.
    async fn forward(self, request: &mut Request<ClientBody>) -> Result<Response<ResponseBody>, ProxyError> {
        cached::forward(self.origin, self.target, request, self.present).await
    }

    fn no_memory(self, queues: &Queues) -> ProxyError {
        queues.count_accepted(&self.route.queue.name, Cause::QueueFull.word());
        let detail =
            format!("the proxy reads as many requests for queues as its memory allows: {INTAKE_KIB} KiB");
        ProxyError::new(Cause::QueueFull, detail).retry_after(RETRY_WHEN_FULL)
    }

    /// Reads the body up to `body_limit`. A body that is announced to be larger is not read.
    async fn read(self, body: ClientBody, share: &mut Share<'_>) -> Result<ReadBody, ProxyError> {
        let limit = self.route.queue.body_limit.0;
        if body.size_hint().lower() > limit {
            return Ok(ReadBody::TooLarge(body));
        }
        let (policy, _) = self.target.route_owner.cluster.policy(self.target.route);
        let progress = self.origin.progress;
        let reading = BufferedBody::read(body, limit, async |length, total| {
            progress.moved();
            progress.with_record(|record| record.bytes_in += length as u64);
            share.grow(total).await
        });
        // One timer for the whole body, which is small.
        let read = match policy.idle_timeout.limit() {
            Some(idle) => timeout(idle, reading).await.map_err(|_| {
                let detail = format!("the request's body did not arrive within `idle_timeout`: {idle:?}");
                ProxyError::malformed(detail).with_status(StatusCode::REQUEST_TIMEOUT)
            })?,
            None => reading.await,
        };
        read.map_err(|error| ProxyError::malformed(format!("the request's body: {error}")))
    }

    /// Whether the service surely did not get the request, or may get it twice. What it responded itself is passed on.
    fn is_unavailable(&self, head: &Head, result: &Result<Response<ResponseBody>, ProxyError>) -> bool {
        let attempts = self.origin.progress.with_record(|record| {
            let outcomes = || record.attempts.iter().map(|attempt| attempt.outcome);
            let unprocessed = outcomes().all(|outcome| outcome.is_some_and(|it| it.is_unprocessed()));
            let refused = outcomes().last().flatten().is_some_and(|it| it.advice() == RetryAdvice::Elsewhere);
            (unprocessed, refused)
        });
        let (unprocessed, refused) = attempts.unwrap_or_default();
        match result {
            // The service's own sidecar refused it.
            Ok(_) => refused,
            Err(error) if !error.cause.is_exhaustion() => false,
            Err(_) => unprocessed || head.method.is_idempotent() || self.present.has(Field::IdempotencyKey),
        }
    }

    async fn accept(
        self,
        head: Head,
        (body, share): (Bytes, Share<'_>),
        prefer: Prefer,
    ) -> Result<Response<ResponseBody>, ProxyError> {
        let name = &self.route.queue.name;
        let queues = queues(self.origin)?;
        let stored = self.store(queues, head, body, prefer).await;
        // The wait for the result needs none.
        drop(share);
        let id = match stored {
            Ok(id) => id,
            Err(error) => {
                queues.count_accepted(name, error.cause.word());
                return Err(error);
            }
        };
        let longest = self.route.route.wait.0;
        let wait = prefer.wait.map_or(Duration::ZERO, |wait| wait.min(longest));
        if !wait.is_zero()
            && let Some(mut response) = wait_for_result(queues, id, wait).await
        {
            let asynchronous = if prefer.respond_async { "respond-async, " } else { "" };
            let applied = format!("{asynchronous}wait={}", wait.as_secs());
            if let Ok(applied) = applied.try_into() {
                response.headers_mut().insert(PREFERENCE_APPLIED, applied);
            }
            return Ok(response);
        }
        let state = match queues.store.find(id).await {
            Ok(summary) => queues.state_word(&summary),
            Err(_) => "queued",
        };
        Ok(accepted(id, state, prefer))
    }

    /// Returns once the request is stored.
    async fn store(
        self,
        queues: &Queues,
        head: Head,
        body: Bytes,
        prefer: Prefer,
    ) -> Result<DeliveryId, ProxyError> {
        let AcceptRoute { queue, strip, .. } = self.route;
        let text = |headers: &HeaderMap, name: &str| headers.get(name)?.to_str().ok().map(str::to_owned);
        let order_key = match &queue.order {
            DeliveryOrder::None => None,
            DeliveryOrder::All => Some("all".to_owned()),
            DeliveryOrder::Header(name) => text(&head.headers, name),
        };
        let idempotency_key = text(&head.headers, IDEMPOTENCY_KEY);
        let identity = identity(self.origin, head.user.as_ref());
        let mut request = stored::store(self.origin, self.target, head, strip)?;
        if prefer.respond_async {
            // Honoured here: the delivery waits for the result.
            request.headers.remove(PREFER);
        }
        let new = NewDelivery {
            queue: queue.name.clone(),
            limits: queue.limits(),
            identity,
            idempotency_key,
            order_key,
            request,
            body,
        };
        let mut storing = StoringGuard { queues, queue: &queue.name, is_stored: false };
        let accepted = queues.store.accept(new).await;
        storing.is_stored = true;
        let accepted = accepted.map_err(|error| store_error(&error))?;
        self.origin.progress.with_record(|record| record.delivery = Some(Box::new(accepted.id)));
        queues.count_accepted(&queue.name, if accepted.repeated { "repeated" } else { "accepted" });
        if let Some(due) = accepted.due {
            queues.announce(&queue.name, due);
        }
        Ok(accepted.id)
    }
}

/// The service's response, if there is one in time.
pub(super) async fn wait_for_result(
    queues: &Queues,
    id: DeliveryId,
    wait: Duration,
) -> Option<Response<ResponseBody>> {
    let mut ended = queues.wait_for_end(id);
    let result = async {
        let is_pending = queues.store.find(id).await.is_ok_and(|found| found.state.is_pending());
        if is_pending {
            ended.wait().await;
        }
        // One that was cancelled may have a response of an earlier attempt, which is no result.
        let found = queues.store.find(id).await.ok()?;
        if !matches!(found.state, DeliveryState::Done | DeliveryState::Dead) {
            return None;
        }
        resource::stored_response(queues.store.outcome(id).await.ok().flatten()?)
    };
    timeout(wait, result).await.ok().flatten()
}

/// The memory that a body takes while it is read, and until it is stored.
struct Share<'a> {
    /// Of [`INTAKE_KIB`].
    intake: &'a Semaphore,
    permit: Option<SemaphorePermit<'a>>,
}

impl Share<'_> {
    /// For so many bytes in all. False: there is no memory for them, and was none for some time.
    async fn grow(&mut self, bytes: usize) -> bool {
        let wanted = bytes.div_ceil(1024).clamp(1, INTAKE_KIB as usize);
        let more = wanted.saturating_sub(self.permit.as_ref().map_or(0, SemaphorePermit::num_permits));
        let more = u32::try_from(more).unwrap_or(INTAKE_KIB);
        if more == 0 {
            return true;
        }
        let Ok(Ok(permit)) = timeout(INTAKE_WAIT, self.intake.acquire_many(more)).await else { return false };
        match &mut self.permit {
            Some(held) => held.merge(permit),
            none => *none = Some(permit),
        }
        true
    }
}

/// Why a request on a route with `queue` goes on synchronously; `None`: it may be queued. It must change something, and be
/// one request with one response.
pub fn why_not_queued(route: &RouteQueue, method: &Method, headers: &HeaderMap) -> Option<&'static str> {
    // An upgrade to h2c is ignored: some clients ask for it with each first request.
    let upgrade = headers.get(UPGRADE).filter(|protocol| !protocol.as_bytes().eq_ignore_ascii_case(b"h2c"));
    if method == Method::CONNECT {
        Some("CONNECT")
    } else if method.is_safe() {
        Some("the method changes nothing")
    } else if upgrade.is_some() {
        Some("it asks for an upgrade")
    } else if is_grpc(headers) {
        Some("gRPC")
    } else if route.when == QueueWhen::Asked && !Prefer::of(headers).respond_async {
        Some("it has no `Prefer: respond-async`")
    } else {
        None
    }
}

/// The 202.
fn accepted(id: DeliveryId, state: &str, prefer: Prefer) -> Response<ResponseBody> {
    let body = serde_json::json!({ "id": id.to_string(), "state": state }).to_string();
    let mut response = Response::new(ResponseBody::whole(body));
    *response.status_mut() = StatusCode::ACCEPTED;
    let headers = response.headers_mut();
    if let Ok(location) = HeaderValue::try_from(format!("{DELIVERIES}{id}")) {
        headers.insert(LOCATION, location);
    }
    if prefer.respond_async {
        headers.insert(PREFERENCE_APPLIED, HeaderValue::from_static("respond-async"));
    }
    headers.insert(RETRY_AFTER, ASK_AGAIN.as_secs().into());
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
