//! Handles one request, from its head to the response that the client gets. The steps of every request, top to bottom.

use std::{
    any::Any,
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::Poll,
};

use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header::CONNECTION};
use http_body::Body;
use tokio::time::Instant;

use super::{
    authorize,
    body::{ClientBody, ResponseBody},
    cached::{self, CachedRoute, respond::Note},
    connect_method,
    connection::Connection,
    deprecated,
    error::{ErrorContext, ProxyError, respond},
    exchange, headers, mirror,
    origin::Origin,
    progress::Progress,
    queue, request_check, target,
};
use crate::{
    cause::Cause,
    field_set::{Field, FieldSet},
    header_names::{X_OUTRIGGER_RETRY, X_REQUEST_ID},
    model::{
        Side, View, WorkerCluster,
        queue_route::{DeliveryPath, QueueRoute},
    },
    resilience::classify::RetryAdvice,
    telemetry::{
        metrics::EntryPoint,
        record::{LocalResponse, RequestEnd, RequestRecord, RequestStart},
        spans::SpanRequest,
    },
    trace_context::{self, TraceId},
};

/// Handles a request and returns its response. Every error, and every panic, becomes an error response.
///
/// `request` is borrowed and its parts are taken out of it: an `async fn` stores an argument that it owns twice.
pub async fn handle(
    connection: &Rc<Connection>,
    request: &mut Request<ClientBody>,
    present: FieldSet,
    progress: &Rc<Progress>,
) -> Response<ResponseBody> {
    let view = connection.worker.view();
    let http1 = request.version() != Version::HTTP_2;
    let request_id = RequestId::of(connection, request, present);
    let grpc =
        open_record(connection, &view, ReceivedHead { request, present, request_id: &request_id }, progress);
    let _client_gone = ClientGoneGuard(progress);

    let result = catch_panic(pin!(check_and_forward(connection, &view, request, present, progress))).await;
    let response = result
        .and_then(|response| response)
        .unwrap_or_else(|error| error_response(connection, &error, &request_id, grpc, progress));
    record_response(connection, response, http1, progress)
}

/// Makes the response to bytes that could not be parsed as a request. Logged and counted like any rejected request.
pub fn refuse(
    connection: &Connection,
    request: &mut Request<ClientBody>,
    present: FieldSet,
    error: &ProxyError,
    progress: &Progress,
) -> Response<ResponseBody> {
    let view = connection.worker.view();
    let request_id = RequestId::of(connection, request, present);
    let grpc =
        open_record(connection, &view, ReceivedHead { request, present, request_id: &request_id }, progress);
    let response = error_response(connection, error, &request_id, grpc, progress);
    record_response(connection, response, true, progress)
}

/// Turns an error into a response and writes it to the request's record.
fn error_response(
    connection: &Connection,
    error: &ProxyError,
    request_id: &RequestId,
    grpc: bool,
    progress: &Progress,
) -> Response<ResponseBody> {
    let view = connection.worker.view();
    let request_id = request_id.text();
    let made = progress.with_record(|record| {
        let next_hop = match connection.side {
            Side::Inbound => None,
            Side::Outbound | Side::Upstream(_) => record.endpoint().map(|address| address.to_string()),
        };
        let context = ErrorContext {
            deployment: &view.proxy_names.deployment,
            request_id: &request_id,
            trace_id: Some(&record.context.trace.to_string()),
            upstream: record.upstream_name(),
            attempts: record.attempts.count(),
            next_hop,
            grpc,
        };
        let mut response = respond(error, &context);
        if let Some(cache) = record.cache {
            Note::of_error(cache).append(response.headers_mut(), context.deployment);
        }
        record.local_response = Some(LocalResponse { cause: error.cause, detail: error.detail.clone() });
        if error.cause == Cause::Malformed && record.served_by.is_none() {
            count_malformed(connection, &view);
        }
        (response, record.version != Version::HTTP_2)
    });
    let (mut response, http1) =
        made.unwrap_or_else(|| (without_record(&view.proxy_names.deployment, &request_id, grpc), true));
    if http1 && error.cause == Cause::Malformed {
        // Bytes after a request that cannot be parsed cannot be framed either.
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if connection.side == Side::Inbound
        && error.cause.is_retryable_elsewhere()
        && let Some(word) = RetryAdvice::Elsewhere.word()
    {
        response.headers_mut().insert(X_OUTRIGGER_RETRY, HeaderValue::from_static(word));
    }
    response
}

/// Counts a request that was refused as malformed before it had an upstream.
fn count_malformed(connection: &Connection, view: &View) {
    let word = Cause::Malformed.word();
    let counts =
        |cluster: &WorkerCluster| cluster.upstream.shared.policy_state.counters.rejected.increment(word);
    match &connection.side {
        Side::Inbound => counts(&view.inbound),
        Side::Upstream(name) => {
            view.by_name(name).into_iter().for_each(|index| counts(&view.clusters[index]));
        }
        Side::Outbound => connection.worker.shared.unknown_hosts.count_rejected(word),
    }
}

/// Records the response of a request; where its body is complete already, the end of the request as well.
fn record_response(
    connection: &Connection,
    mut response: Response<ResponseBody>,
    http1: bool,
    progress: &Progress,
) -> Response<ResponseBody> {
    if connection.is_close_requested() && http1 && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        // Announce the close first, so that the client sends no request that would be lost.
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let status = response.status();
    progress.with_record(|record| {
        record.status = Some(status);
        // A response from upstream has just recorded the time.
        let now = if record.local_response.is_some() { Instant::now() } else { progress.last_moved() };
        record.response_head_at = Some(now);
    });
    match response.body() {
        ResponseBody::Streaming(_) | ResponseBody::Shared(_) => {}
        body => {
            let bytes = body.size_hint().exact().unwrap_or(0);
            progress.with_record(|record| record.bytes_out = bytes);
            progress.done(RequestEnd::Complete, Instant::now());
        }
    }
    response
}

/// The error response where the request's record is gone: a bug, which must not look like a success.
fn without_record(deployment: &str, request_id: &str, grpc: bool) -> Response<ResponseBody> {
    let lost = ProxyError::new(Cause::Internal, "the record of this request is gone: a bug in the proxy");
    respond(&lost, &ErrorContext { deployment, request_id, grpc, ..ErrorContext::default() })
}

/// Records that the client cancelled the request, if it is dropped before there is a response.
struct ClientGoneGuard<'a>(&'a Progress);

impl Drop for ClientGoneGuard<'_> {
    fn drop(&mut self) {
        if self.0.with_record(|record| record.status.is_none()) == Some(true) {
            self.0.done(RequestEnd::ClientGone, Instant::now());
        }
    }
}

/// A request of which nothing has been checked yet.
struct ReceivedHead<'a> {
    request: &'a Request<ClientBody>,
    present: FieldSet,
    request_id: &'a RequestId,
}

/// Opens the request's telemetry record. Returns whether the request is gRPC.
fn open_record(
    connection: &Connection,
    view: &View,
    ReceivedHead { request, present, request_id }: ReceivedHead<'_>,
    progress: &Progress,
) -> bool {
    let (entry_point, started) = (target::entry_point(connection, request), progress.started());
    connection.worker.shared.metrics.entry_points.record(entry_point, started.into_std());
    let grpc = headers::is_grpc(request.headers());
    let worker = &connection.worker;
    let (traces, inbound) = (&worker.shared.traces, entry_point == EntryPoint::Inbound);
    let mut incoming = match present.has_any(FieldSet::TRACE) {
        true => trace_context::read(request.headers()),
        false => trace_context::IncomingContext::default(),
    };
    if !traces.is_enabled() {
        // Tracing is off: no spans, but every sidecar on the path uses the same trace ID.
        incoming.request_id = request_id.trace();
    }
    let telemetry = &view.snapshot.config.telemetry;
    let context =
        worker.with_rng(|rng| traces.context(&incoming, inbound, telemetry, rng, started.into_std()));
    let mut record = RequestRecord::new(RequestStart {
        entry_point,
        peer: connection.address,
        method: request.method().clone(),
        version: request.version(),
        context,
        started_at: started,
    });
    record.grpc = grpc;
    record.tls = connection.tls;
    record.identity.clone_from(&connection.peer_identity);
    if traces.is_enabled() {
        record.span_request = Some(SpanRequest::from_request(request));
        if inbound {
            worker.inbound_in_flight.add(&context);
        }
    }
    progress.open_record(worker, record);
    grpc
}

async fn check_and_forward(
    connection: &Rc<Connection>,
    view: &Rc<View>,
    request: &mut Request<ClientBody>,
    present: FieldSet,
    progress: &Rc<Progress>,
) -> Result<Response<ResponseBody>, ProxyError> {
    request_check::check(request, present)?;
    if connection.refused_plaintext() || target::lacks_identity(connection) {
        connection.close_after_response();
        return Err(ProxyError::new(
            Cause::NotAllowed,
            "this service requires mutual TLS (`inbound.mtls` is \"strict\"), and the connection is plaintext or has no client certificate: send requests through a sidecar, or set `inbound.mtls` to \"permissive\"",
        ));
    }
    request_check::check_loop(request.headers(), present, &view.proxy_names.via(&connection.side).pseudonym)?;
    let is_own_delivery = is_own_delivery(connection, view, request);
    if connection.side == Side::Inbound && !is_own_delivery {
        authorize::check_request(connection, view, request, progress.started()).await?;
    }
    if request.method() == Method::CONNECT {
        return match (&connection.side, &connection.tunnel_destination) {
            (Side::Outbound, None) if connection.original_destination.is_some() => Err(ProxyError::malformed(
                "CONNECT on a redirected connection: the service uses a proxy of its own; leave that proxy's port alone (`outrigger redirect apply --skip-outbound-ports PORT`)",
            )
            .with_status(StatusCode::METHOD_NOT_ALLOWED)),
            (Side::Outbound, None) => Box::pin(connect_method::open_tunnel(connection, view, request)).await,
            _ => Err(ProxyError::malformed("CONNECT is accepted on the outbound port only")
                .with_status(StatusCode::METHOD_NOT_ALLOWED)),
        };
    }
    let target = target::find(connection, view, request)?;
    progress.with_record(|record| {
        record.served_by = Some(Arc::clone(&target.serving.destination));
        record.matched = Some(Arc::clone(&target.route_owner.destination));
        record.route = target.route;
    });
    if is_own_delivery && !matches!(target.queue_route(), Some(QueueRoute::Deliveries)) {
        // A route of the configuration has this path.
        authorize::check_request(connection, view, request, progress.started()).await?;
    }
    deprecated::admit(&target, progress)?;
    let origin = Origin::of(connection, view, progress);
    if target.queue_route().is_some() {
        // Boxed, as every path that few requests take.
        return Box::pin(queue::serve(&origin, &target, request, present)).await;
    }
    let copy = mirror::begin(&origin, &target, request, present);
    let response = match CachedRoute::of(&origin, &target) {
        // Boxed, so that routes without a cache do not hold its memory.
        Some(route) => Box::pin(cached::run(route, request, present)).await,
        None => exchange::run(&origin, &target, request, present).await,
    };
    if let Some(copy) = copy {
        copy.send(&origin, view, &target);
    }
    if let Err(error) = &response
        && error.cause == Cause::Malformed
    {
        target.serving.upstream.shared.policy_state.counters.rejected.increment(error.cause.word());
    }
    response
}

/// Whether an authenticated peer asks for the state of a delivery, which only the one that it was accepted from gets:
/// `inbound.allow` need not name it.
fn is_own_delivery(connection: &Connection, view: &View, request: &Request<ClientBody>) -> bool {
    let inbound = &view.snapshot.inbound;
    connection.side == Side::Inbound
        && !inbound.queue_routes.is_empty()
        && connection.peer_identity.is_some()
        && view.snapshot.gate.as_ref().is_some_and(|gate| gate.jwt.is_none())
        && DeliveryPath::parse(request.uri().path()).is_some()
}

/// The ID of a request.
enum RequestId {
    FromClient(HeaderValue),
    Generated(TraceId),
}

impl RequestId {
    /// The ID that the request carries; a request without one gets a new one.
    fn of(connection: &Connection, request: &mut Request<ClientBody>, present: FieldSet) -> Self {
        if present.has(Field::RequestId)
            && let Some(id) = request.headers().get(X_REQUEST_ID)
        {
            return Self::FromClient(id.clone());
        }
        let (id, mut text) = (connection.worker.with_rng(TraceId::random), [0; 32]);
        id.encode(&mut text);
        let value = HeaderValue::from_bytes(&text).unwrap_or(HeaderValue::from_static("0"));
        request.headers_mut().insert(X_REQUEST_ID, value);
        Self::Generated(id)
    }

    /// The ID as a trace ID, if it has that form.
    fn trace(&self) -> Option<TraceId> {
        match self {
            Self::FromClient(id) => TraceId::parse(id.as_bytes()),
            Self::Generated(id) => Some(*id),
        }
    }

    fn text(&self) -> String {
        match self {
            Self::FromClient(id) => id.to_str().unwrap_or_default().to_owned(),
            Self::Generated(id) => id.to_string(),
        }
    }
}

/// Keeps a panic within its request: the client gets a 500, the log the message.
async fn catch_panic<F: Future>(mut request: Pin<&mut F>) -> Result<F::Output, ProxyError> {
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| request.as_mut().poll(cx))) {
        Ok(Poll::Ready(result)) => Poll::Ready(Ok(result)),
        Ok(Poll::Pending) => Poll::Pending,
        Err(panic) => {
            tracing::error!(message = message(&*panic), "panic while handling a request");
            Poll::Ready(Err(ProxyError::new(Cause::Internal, "a bug in the proxy: see its log")))
        }
    })
    .await
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    /// Every request allocates the future and moves it, so its size is a cost of every request.
    #[test]
    fn the_future_of_a_request_is_small() {
        fn size<'a, F: Future>(
            _: impl Fn(&'a Rc<Connection>, &'a mut Request<ClientBody>, FieldSet, &'a Rc<Progress>) -> F,
        ) -> usize {
            size_of::<F>()
        }
        let size = size(handle);
        assert!(size <= MAX_BYTES, "{size} bytes");
    }

    const MAX_BYTES: usize = 2700;

    #[test]
    fn a_lost_record_is_an_internal_error() {
        let response = without_record("outrigger/checkout", "1", false);
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert!(response.body().size_hint().exact() > Some(0));
        assert_eq!(without_record("outrigger/checkout", "1", true).headers()["grpc-status"], "13");
    }

    #[tokio::test]
    async fn a_panic_becomes_an_error() {
        let result: Result<(), _> = catch_panic(pin!(async { unreachable!("a bug") })).await;
        assert_eq!(result.map_err(|error| error.cause), Err(Cause::Internal));
        assert_eq!(catch_panic(pin!(async { 7 })).await.ok(), Some(7));
    }
}
