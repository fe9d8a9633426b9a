//! One call, from its request to the response the caller gets. The steps every call takes, top to bottom.

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
    accept::Side,
    authorize,
    body::{CallerBody, ResponseBody},
    connect,
    connection::Connection,
    error::{Cause, Context, ProxyError, respond},
    exchange, guard,
    headers::{self, X_OUTRIGGER_RETRY, X_REQUEST_ID},
    origin::Origin,
    progress::Progress,
    target,
};
use crate::{
    present::{Field, Present},
    resilience::classify::Advice,
    runtime::{LocalCluster, View},
    telemetry::{
        metrics::Way,
        propagation::{self, Trace},
        record::{End, Record, Refusal},
        spans::Asked,
    },
};

/// Answers a call. Whatever goes wrong becomes an answer that says so; a bug of ours too.
///
/// What the call needs is taken out of `request`: a future that was given it would have room for it twice.
pub async fn answer(
    connection: &Rc<Connection>,
    request: &mut Request<CallerBody>,
    present: Present,
    progress: &Rc<Progress>,
) -> Response<ResponseBody> {
    let view = connection.worker.view();
    let http1 = request.version() != Version::HTTP_2;
    let request_id = RequestId::of(connection, request, present);
    let grpc = open(connection, &view, request, (present, &request_id), progress);
    let _unanswered = Unanswered(progress);

    let result = catch_panic(pin!(handle(connection, &view, request, present, progress))).await;
    let response = result
        .and_then(|handled| handled)
        .unwrap_or_else(|error| error_response(connection, &view, &error, (&request_id, grpc), progress));
    conclude(connection, response, http1, progress)
}

/// Answers what could not be read as a request. It is logged and counted as any other request that is refused.
pub fn refuse(
    connection: &Connection,
    request: &mut Request<CallerBody>,
    present: Present,
    error: &ProxyError,
    progress: &Progress,
) -> Response<ResponseBody> {
    let view = connection.worker.view();
    let request_id = RequestId::of(connection, request, present);
    let grpc = open(connection, &view, request, (present, &request_id), progress);
    let response = error_response(connection, &view, error, (&request_id, grpc), progress);
    conclude(connection, response, true, progress)
}

/// What the client is told of an error, noted in the record of the request.
fn error_response(
    connection: &Connection,
    view: &View,
    error: &ProxyError,
    (request_id, grpc): (&RequestId, bool),
    progress: &Progress,
) -> Response<ResponseBody> {
    let request_id = request_id.text();
    let noted = progress.note(|record| {
        let next_hop = match connection.side {
            Side::Inbound => None,
            Side::Outbound | Side::Upstream(_) => record.endpoint().map(|address| address.to_string()),
        };
        let context = Context {
            deployment: &view.names.deployment,
            request_id: &request_id,
            trace_id: Some(&record.context.trace.to_string()),
            upstream: record.upstream(),
            tries: record.tries.made(),
            next_hop,
            grpc,
        };
        let response = respond(error, &context);
        record.refused = Some(Refusal { cause: error.cause, detail: error.detail.clone() });
        if error.cause == Cause::Malformed && record.served.is_none() {
            count_malformed(connection, view);
        }
        (response, record.version != Version::HTTP_2)
    });
    let (mut response, http1) =
        noted.unwrap_or_else(|| (without_record(&view.names.deployment, &request_id, grpc), true));
    if http1 && error.cause == Cause::Malformed {
        // What was not understood may have more behind it that would not be, either.
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if connection.side == Side::Inbound
        && error.cause.is_elsewhere()
        && let Some(word) = Advice::Elsewhere.word()
    {
        response.headers_mut().insert(X_OUTRIGGER_RETRY, HeaderValue::from_static(word));
    }
    response
}

/// Counts a request that was refused as malformed before it had an upstream.
fn count_malformed(connection: &Connection, view: &View) {
    let word = Cause::Malformed.word();
    let counts = |cluster: &LocalCluster| cluster.upstream.shared.guards.counts.rejected.add(word);
    match &connection.side {
        Side::Inbound => counts(&view.inbound),
        Side::Upstream(name) => {
            view.by_name(name).into_iter().for_each(|index| counts(&view.clusters[index]));
        }
        Side::Outbound => connection.worker.shared.unknown.count_rejected(word),
    }
}

/// Notes how a request is answered, and whether that is all.
fn conclude(
    connection: &Connection,
    mut response: Response<ResponseBody>,
    http1: bool,
    progress: &Progress,
) -> Response<ResponseBody> {
    if connection.is_leaving() && http1 && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        // Before the connection is closed the caller is told, so that it sends nothing that would be lost.
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let status = response.status();
    progress.note(|record| {
        record.status = Some(status);
        // An answer of the service has just noted the time.
        let now = if record.refused.is_some() { Instant::now() } else { progress.last_moved() };
        record.answered = Some(now);
    });
    match response.body() {
        ResponseBody::Streaming(_) => {}
        body => {
            let bytes = body.size_hint().exact().unwrap_or(0);
            progress.note(|record| record.bytes_out = bytes);
            progress.done(End::Complete, Instant::now());
        }
    }
    response
}

/// What a client gets where the record of its request, from which an error response is made, is gone: a bug, which must not
/// look like a success.
fn without_record(deployment: &str, request_id: &str, grpc: bool) -> Response<ResponseBody> {
    let lost = ProxyError::new(Cause::Internal, "the record of this request is gone: a bug in the proxy");
    respond(&lost, &Context { deployment, request_id, grpc, ..Context::default() })
}

/// Notes that a call was given up by its caller, where it ends before there is an answer.
struct Unanswered<'a>(&'a Progress);

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if self.0.note(|record| record.status.is_none()) == Some(true) {
            self.0.done(End::CallerGone, Instant::now());
        }
    }
}

/// Begins to note what the call does. Says whether it is gRPC.
fn open(
    connection: &Connection,
    view: &View,
    request: &Request<CallerBody>,
    (present, request_id): (Present, &RequestId),
    progress: &Progress,
) -> bool {
    let (way, started) = (target::way(connection, request), progress.started());
    connection.worker.shared.metrics.ways.note(way, started.into_std());
    let grpc = headers::is_grpc(request.headers());
    let worker = &connection.worker;
    let (traces, inbound) = (&worker.shared.traces, way == Way::Inbound);
    let mut said = match present.has_any(Present::TRACE) {
        true => propagation::read(request.headers()),
        false => propagation::Said::default(),
    };
    if !traces.is_on() {
        // No trace is begun, but all sidecars on the way of a call name it alike.
        said.request = request_id.trace();
    }
    let telemetry = &view.snapshot.config.telemetry;
    let context = worker.with_rng(|rng| traces.context(&said, inbound, telemetry, rng, started.into_std()));
    let (method, version) = (request.method().clone(), request.version());
    let mut record = Record::new(way, connection.address, method, version, context, started);
    record.grpc = grpc;
    record.tls = connection.tls;
    record.identity.clone_from(&connection.peer_identity);
    if traces.is_on() {
        record.asked = Some(Asked::of(request));
        if inbound {
            worker.in_flight.enter(&context);
        }
    }
    progress.open(worker, record);
    grpc
}

async fn handle(
    connection: &Rc<Connection>,
    view: &View,
    request: &mut Request<CallerBody>,
    present: Present,
    progress: &Rc<Progress>,
) -> Result<Response<ResponseBody>, ProxyError> {
    guard::check(request, present)?;
    if connection.refused_plaintext() || target::lacks_identity(connection) {
        connection.refuse_further_requests();
        return Err(ProxyError::new(
            Cause::NotAllowed,
            "plaintext, or no client certificate: calls to this service must come by mutual TLS (`inbound.mtls` is \"strict\"); call it through a sidecar, or let both in by \"permissive\"",
        ));
    }
    guard::check_loop(request.headers(), present, &view.names.via(&connection.side).pseudonym)?;
    if connection.side == Side::Inbound {
        authorize::call(connection, view, request, progress.started()).await?;
    }
    if request.method() == Method::CONNECT {
        return match (&connection.side, &connection.tunnel_to) {
            (Side::Outbound, None) if connection.redirected_to.is_some() => Err(ProxyError::malformed(
                "CONNECT on a redirected connection: the service uses a proxy of its own; leave that proxy's port alone (`outrigger redirect apply --skip-outbound-ports PORT`)",
            )
            .with_status(StatusCode::METHOD_NOT_ALLOWED)),
            (Side::Outbound, None) => Box::pin(connect::open_tunnel(connection, view, request)).await,
            _ => Err(ProxyError::malformed("CONNECT is for the outbound port")
                .with_status(StatusCode::METHOD_NOT_ALLOWED)),
        };
    }
    let target = target::find(connection, view, request)?;
    progress.note(|record| {
        record.served = Some(Arc::clone(&target.local.whom));
        record.matched = Some(Arc::clone(&target.matched.whom));
        record.route = target.route;
    });
    let origin = Origin::of(connection, view, progress);
    let response = exchange::run(&origin, &target, request, present).await;
    if let Err(error) = &response
        && error.cause == Cause::Malformed
    {
        target.local.upstream.shared.guards.counts.rejected.add(error.cause.word());
    }
    response
}

/// The id of a request.
enum RequestId {
    Callers(HeaderValue),
    Ours(Trace),
}

impl RequestId {
    /// That of the request, which is given one where it has none.
    fn of(connection: &Connection, request: &mut Request<CallerBody>, present: Present) -> Self {
        if present.has(Field::RequestId)
            && let Some(id) = request.headers().get(X_REQUEST_ID)
        {
            return Self::Callers(id.clone());
        }
        let (id, mut text) = (connection.worker.with_rng(Trace::random), [0; 32]);
        id.encode(&mut text);
        let value = HeaderValue::from_bytes(&text).unwrap_or(HeaderValue::from_static("0"));
        request.headers_mut().insert(X_REQUEST_ID, value);
        Self::Ours(id)
    }

    /// The trace that it would be, if it were one.
    fn trace(&self) -> Option<Trace> {
        match self {
            Self::Callers(id) => Trace::parse(id.as_bytes()),
            Self::Ours(id) => Some(*id),
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Callers(id) => id.to_str().unwrap_or_default().to_owned(),
            Self::Ours(id) => id.to_string(),
        }
    }
}

/// A panic in one call hurts no other: the caller gets a 500, the log the message.
async fn catch_panic<F: Future>(mut call: Pin<&mut F>) -> Result<F::Output, ProxyError> {
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| call.as_mut().poll(cx))) {
        Ok(Poll::Ready(result)) => Poll::Ready(Ok(result)),
        Ok(Poll::Pending) => Poll::Pending,
        Err(panic) => {
            tracing::error!(message = message(&*panic), "a call panicked");
            Poll::Ready(Err(ProxyError::new(Cause::Internal, "a bug in the proxy; its log has more")))
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

    /// It is moved to where it lies, and its room is asked for: its size is paid for by every call.
    #[test]
    fn a_call_is_small() {
        fn size<'a, F: Future>(
            _: impl Fn(&'a Rc<Connection>, &'a mut Request<CallerBody>, Present, &'a Rc<Progress>) -> F,
        ) -> usize {
            size_of::<F>()
        }
        let size = size(answer);
        assert!(size <= MOST_BYTES, "{size} bytes");
    }

    const MOST_BYTES: usize = 2700;

    #[test]
    fn a_lost_record_is_an_error_of_ours() {
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
