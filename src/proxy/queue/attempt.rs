//! One attempt of a delivery, through the ordinary exchange.

use std::{future::poll_fn, pin::Pin, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Version, header::CONTENT_LENGTH};
use http_body::Body;
use tokio::time::{Instant, timeout_at};

use super::stored::StoredOrigin;
use crate::{
    cause::Cause,
    config::HostPort,
    field_set::FieldSet,
    header_names::X_OUTRIGGER_ATTEMPT,
    identity::xfcc,
    model::{Side, View, WorkerCluster},
    proxy::{
        authorize,
        body::{BufferedBody, ResponseBody},
        cached,
        error::ProxyError,
        origin::Origin,
        progress::Progress,
        target::{self, Client, RouteTarget},
        worker::{Worker, is_local_address},
    },
    queue::{StoredRequest, store::Outcome},
    resilience::{
        backoff::RetryHint,
        classify::{AttemptOutcome, OutcomeKind, RetryAdvice},
        queue::{DueDelivery, policy::DeliveryOutcome},
    },
    telemetry::{
        metrics::EntryPoint,
        record::{LocalResponse, RequestEnd, RequestRecord, RequestStart},
        spans::SpanRequest,
    },
    trace_context::{IncomingContext, SpanLink, TraceContext},
};

const X_OUTRIGGER_DELIVERY: HeaderName = HeaderName::from_static("x-outrigger-delivery");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// An attempt at a service without a `timeout` ends after this time, and so does reading a response: it must not hold its
/// slot for ever.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(300);

/// How an attempt ended, with what is stored of it.
#[derive(Debug)]
pub struct Report {
    pub end: DeliveryOutcome,
    /// A pooled connection was lost before any byte of a response.
    pub is_stale: bool,
    /// The number of the attempt; `None`: nothing was sent.
    pub attempt: Option<u32>,
    /// The stable word of a failure; `status` after a response of the service.
    pub cause: &'static str,
    pub outcome: Outcome,
}

impl Report {
    pub fn failed(end: DeliveryOutcome, cause: &'static str) -> Self {
        let outcome = Outcome { cause: Some(cause.to_owned()), ..Outcome::default() };
        Self { end, is_stale: false, attempt: None, cause, outcome }
    }
}

/// Sends a stored request once. `result_limit`: the most of the response's body that is kept.
pub async fn perform(
    worker: &Rc<Worker>,
    due: &DueDelivery,
    mut stored: StoredRequest,
    body: Bytes,
    result_limit: u64,
) -> Report {
    let view = worker.view();
    let accepted = StoredOrigin::take(&mut stored);
    let mut request = Request::new(BufferedBody::whole(body));
    *request.method_mut() = stored.method;
    *request.uri_mut() = stored.uri;
    *request.headers_mut() = stored.headers;
    let length = request.body().size_hint().exact().unwrap_or_default();
    if length > 0 || matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH) {
        request.headers_mut().insert(CONTENT_LENGTH, length.into());
    }
    let headers = request.headers_mut();
    let id = HeaderValue::try_from(due.id.to_string()).unwrap_or(HeaderValue::from_static("unknown"));
    headers.entry(IDEMPOTENCY_KEY).or_insert_with(|| id.clone());
    headers.insert(X_OUTRIGGER_DELIVERY, id);
    if accepted.side == Side::Inbound {
        headers.insert(X_OUTRIGGER_ATTEMPT, (due.attempts + 1).into());
    }
    let Some(target) = find_target(worker, &view, &accepted, &request) else {
        tracing::warn!(delivery = %due.id, upstream = accepted.upstream, "the upstream of a delivery is not configured any more");
        return Report::failed(DeliveryOutcome::NoUpstream, Cause::UnknownUpstream.word());
    };
    if accepted.side == Side::Inbound {
        let peer = accepted.identity.as_ref().map(xfcc::read_names);
        let (method, path) = (request.method(), request.uri().path());
        if let Err(error) = authorize::check_again(&view, peer.as_ref(), method, path) {
            tracing::warn!(delivery = %due.id, %error, "the client of a delivery is no longer allowed");
            return Report::failed(DeliveryOutcome::NotAllowed, error.cause.word());
        }
    }
    let now = Instant::now();
    let progress = Rc::new(Progress::new(now));
    open_record(worker, (&view, &accepted, &request), &target, &progress);
    progress.with_record(|record| record.delivery = Some(Box::new(due.id)));
    let (policy, _) = target.route_owner.cluster.policy(target.route);
    let origin = Origin {
        worker,
        view: &view,
        progress: &progress,
        side: &accepted.side,
        peer: &accepted.peer,
        identity: accepted.identity.as_ref(),
        is_tls: accepted.is_tls,
        deadline: policy.timeout.is_zero().then(|| now + LONGEST_ATTEMPT),
        client: None,
        stale: None,
        earlier_attempts: due.attempts,
    };
    let present = FieldSet::of(request.headers());
    let result = origin.watch(cached::bypass(&origin, &target, &mut request, present)).await;
    let last = progress.with_record(|record| record.attempts.last().and_then(|one| one.outcome)).flatten();
    match result {
        None => Report::failed(DeliveryOutcome::NoResponse, RequestEnd::Cut.word()),
        Some(Err(error)) => failed(&progress, &error, last),
        Some(Ok(response)) => responded(&origin, response, last, result_limit).await,
    }
}

/// The upstream that accepted the request, with its current configuration; `None`: there is none of this name any more.
fn find_target<B>(
    worker: &Rc<Worker>,
    view: &View,
    accepted: &StoredOrigin,
    request: &Request<B>,
) -> Option<RouteTarget> {
    let target = match &accepted.upstream {
        Some(name) => {
            let client = Client { worker, identity: None, address: &accepted.peer };
            let target = target::routed(client, view, view.by_name(name)?, request);
            RouteTarget { chosen_by_client: true, ..target }
        }
        None => target::to_service(view, service(worker, view, accepted), request),
    };
    let owner = &target.route_owner;
    let once = Arc::new(owner.cluster.for_deliveries());
    let durations = || Arc::clone(&owner.destination.durations);
    let route_owner = WorkerCluster::new(&once, Some(owner), durations);
    Some(RouteTarget { route_owner, ..target })
}

/// The service, at the port to which the request was redirected. Its pod may have another address now.
fn service(worker: &Rc<Worker>, view: &View, accepted: &StoredOrigin) -> Rc<WorkerCluster> {
    let forward_to = &view.snapshot.config.inbound.forward_to;
    match accepted.destination {
        Some(address) if is_local_address(address.ip()) => worker.service_at(address, view),
        Some(address) => {
            let other = HostPort::new(forward_to.host.clone(), address.port()).socket_addr();
            other.map_or_else(|| Rc::clone(&view.inbound), |address| worker.service_at(address, view))
        }
        None => Rc::clone(&view.inbound),
    }
}

fn open_record<B>(
    worker: &Rc<Worker>,
    (view, accepted, request): (&View, &StoredOrigin, &Request<B>),
    target: &RouteTarget,
    progress: &Progress,
) {
    let (traces, started) = (&worker.shared.traces, progress.started());
    let is_inbound = accepted.side == Side::Inbound;
    let telemetry = &view.snapshot.config.telemetry;
    let context = worker.with_rng(|rng| match traces.is_enabled() {
        true => {
            // A trace of its own, with a link to the span that accepted it.
            let formats = accepted.accepted_by.formats;
            let own = IncomingContext { formats, stale_state: true, ..IncomingContext::default() };
            let link = accepted.accepted_by.parent.map(|parent| SpanLink {
                trace: parent.trace,
                span: parent.span,
                sampled: parent.sampled.unwrap_or_default(),
            });
            let context = traces.context(&own, true, telemetry, rng, started.into_std());
            let sampled = context.sampled || link.is_some_and(|link| link.sampled);
            TraceContext { link, sampled, ..context }
        }
        false => traces.context(&accepted.accepted_by, is_inbound, telemetry, rng, started.into_std()),
    });
    let mut record = RequestRecord::new(RequestStart {
        entry_point: if is_inbound { EntryPoint::Inbound } else { EntryPoint::Host },
        peer: accepted.peer_address,
        method: request.method().clone(),
        version: Version::HTTP_11,
        context,
        started_at: started,
    });
    record.tls = accepted.is_tls;
    record.served_by = Some(Arc::clone(&target.serving.destination));
    record.matched = Some(Arc::clone(&target.route_owner.destination));
    record.route = target.route;
    if traces.is_enabled() {
        record.span_request = Some(SpanRequest::from_request(request));
        if is_inbound {
            worker.inbound_in_flight.add(&context);
        }
    }
    progress.open_record(worker, record);
}

/// An attempt without a response of the service.
fn failed(progress: &Progress, error: &ProxyError, last: Option<AttemptOutcome>) -> Report {
    let now = Instant::now();
    progress.with_record(|record| {
        record.status = Some(error.status.unwrap_or(error.cause.status()));
        record.local_response = Some(LocalResponse { cause: error.cause, detail: error.detail.clone() });
        record.response_head_at = Some(now);
    });
    progress.done(RequestEnd::Complete, now);
    let not_sent = DeliveryOutcome::NotSent { retry_after: error.retry_after };
    let end = match last {
        _ if error.cause == Cause::Malformed => DeliveryOutcome::Unreadable,
        None => not_sent,
        Some(outcome) if outcome.is_unprocessed() => not_sent,
        Some(_) => DeliveryOutcome::NoResponse,
    };
    let is_stale =
        last.is_some_and(|last| matches!(last.kind, OutcomeKind::Reset(reset) if reset.is_stale()));
    Report { is_stale, ..Report::failed(end, error.cause.word()) }
}

async fn responded(
    origin: &Origin<'_>,
    response: Response<ResponseBody>,
    last: Option<AttemptOutcome>,
    result_limit: u64,
) -> Report {
    let progress = origin.progress;
    let (head, body) = response.into_parts();
    progress.with_record(|record| {
        record.status = Some(head.status);
        record.response_head_at = Some(progress.last_moved());
    });
    let retry_after = match RetryHint::from_headers(&head.headers, std::time::SystemTime::now()) {
        RetryHint::After(wait) | RetryHint::Exactly(wait) => Some(wait),
        RetryHint::None | RetryHint::Never => None,
    };
    let is_streaming = matches!(body, ResponseBody::Streaming(_));
    let read = origin.watch(read_body(body, result_limit)).await;
    if !is_streaming {
        progress.done(RequestEnd::Complete, Instant::now());
    }
    let (body, truncated) = match read {
        Some(Ok(read)) => read,
        Some(Err(cause)) => return Report::failed(DeliveryOutcome::NoResponse, cause.word()),
        None => return Report::failed(DeliveryOutcome::NoResponse, Cause::Reset.word()),
    };
    let outcome = Outcome {
        status: Some(head.status.as_u16()),
        cause: None,
        head: encode_head(head.status.as_u16(), &head.headers),
        body,
        truncated,
    };
    // The service's sidecar refused it before the service saw it.
    let is_refused = last.is_some_and(|outcome| outcome.advice() == RetryAdvice::Elsewhere);
    let end = match is_refused {
        true => DeliveryOutcome::NotSent { retry_after },
        false => DeliveryOutcome::Response { status: head.status.as_u16(), retry_after },
    };
    let cause = if is_refused { "refused_by_sidecar" } else { "status" };
    Report { end, is_stale: false, attempt: None, cause, outcome }
}

/// Reads all of a body and keeps its beginning. A body may be endless: it is read for [`LONGEST_ATTEMPT`].
async fn read_body<B: Body<Data = Bytes> + Unpin>(mut body: B, limit: u64) -> Result<(Vec<u8>, bool), Cause> {
    let (mut kept, mut truncated) = (Vec::new(), false);
    let over = Instant::now() + LONGEST_ATTEMPT;
    loop {
        let frame = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx));
        let frame = timeout_at(over, frame).await.map_err(|_| Cause::Timeout)?;
        let Some(frame) = frame else { break };
        let Ok(data) = frame.map_err(|_| Cause::Reset)?.into_data() else { continue };
        let space = usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(kept.len());
        truncated |= data.len() > space;
        kept.extend_from_slice(&data[..data.len().min(space)]);
    }
    Ok((kept, truncated))
}

/// As HTTP/1 writes it.
fn encode_head(status: u16, headers: &HeaderMap) -> Vec<u8> {
    let mut bytes = format!("HTTP/1.1 {status} \r\n").into_bytes();
    for (name, value) in headers {
        bytes.extend_from_slice(name.as_str().as_bytes());
        bytes.extend_from_slice(b": ");
        bytes.extend_from_slice(value.as_bytes());
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"\r\n");
    bytes
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        task::{Context, Poll},
    };

    use http_body::Frame;
    use tokio::time::{Sleep, sleep};

    use super::*;

    /// A byte each second, for ever.
    struct Endless(Pin<Box<Sleep>>);

    impl Body for Endless {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            std::task::ready!(self.0.as_mut().poll(cx));
            self.0 = Box::pin(sleep(Duration::from_secs(1)));
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"a")))))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_endless_response_is_not_read_for_ever() {
        let begin = Instant::now();
        let body = Endless(Box::pin(sleep(Duration::ZERO)));
        assert_eq!(read_body(body, 10).await, Err(Cause::Timeout));
        assert_eq!(begin.elapsed().as_secs(), LONGEST_ATTEMPT.as_secs());
    }
}
