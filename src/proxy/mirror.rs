//! Copies of requests for `mirror`: made while the request is sent, sent when its response is there.
//!
//! The client's request never waits for a copy, and nothing of a copy's outcome reaches it.

use std::{cell::RefCell, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version,
    header::{
        AUTHORIZATION, CONTENT_LENGTH, COOKIE, EXPECT, PROXY_AUTHORIZATION, TRAILER, TRANSFER_ENCODING,
    },
};
use http_body_util::BodyExt;
use tokio::{
    task::spawn_local,
    time::{Instant, timeout},
};

use super::{
    body::{BodyCopy, BufferedBody, ClientBody, CopiedBody, ResponseBody},
    exchange,
    origin::Origin,
    progress::Progress,
    target::RouteTarget,
    worker::Worker,
};
use crate::{
    field_set::{Field, FieldSet},
    model::{RouteMirror, Side, View, WorkerCluster},
    resilience::mirror::{Copies, CopyOutcome},
};

const X_OUTRIGGER_MIRROR: HeaderName = HeaderName::from_static("x-outrigger-mirror");
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Not copied unless `credentials` says so.
const CREDENTIALS: [HeaderName; 4] = [AUTHORIZATION, COOKIE, PROXY_AUTHORIZATION, X_API_KEY];

/// How much of a copy's response is read so that its connection can be used again.
const MAX_RESPONSE: usize = 1024 * 1024;

/// A copy of a request that is being sent.
pub struct RequestCopy {
    head: CopiedHead,
    body: Rc<RefCell<BodyCopy>>,
    mirror: Box<RouteMirror>,
    place: Place,
}

struct CopiedHead {
    method: Method,
    uri: Uri,
    version: Version,
    headers: HeaderMap,
}

/// One of the copies under way; dropping it frees the slot.
struct Place(Arc<Copies>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Begins to copy a request, if its route says so. Its body is copied while it is read.
pub fn begin(
    origin: &Origin<'_>,
    target: &RouteTarget,
    request: &mut Request<ClientBody>,
    present: FieldSet,
) -> Option<Box<RequestCopy>> {
    let cluster = &target.route_owner.cluster;
    let mirror = cluster.mirrors.get(target.route?)?.as_ref()?;
    if present.has(Field::Upgrade) || !mirror.copies_method(request.method()) {
        return None;
    }
    // Divided among upstreams, it may be served by the one that gets the copies.
    let is_served_there =
        origin.view.clusters.get(mirror.upstream).is_none_or(|other| Rc::ptr_eq(other, &target.serving));
    if is_served_there || !origin.worker.with_rng(|rng| rng.chance(*mirror.settings.ratio)) {
        return None;
    }
    if !mirror.copies.begin(mirror.settings.max_in_flight) {
        mirror.copies.count(CopyOutcome::Dropped);
        return None;
    }
    let place = Place(Arc::clone(&mirror.copies));
    let (policy, _) = cluster.policy(target.route);
    let limit = policy.retry.as_ref().map_or(0, |retry| *retry.body_limit);
    let head = CopiedHead {
        method: request.method().clone(),
        uri: request.uri().clone(),
        version: request.version(),
        headers: request.headers().clone(),
    };
    let (body, copy) = CopiedBody::split(std::mem::take(request.body_mut()), limit);
    *request.body_mut() = body;
    // Boxed: few requests have one.
    Some(Box::new(RequestCopy { head, body: copy, mirror: mirror.clone(), place }))
}

impl RequestCopy {
    /// Sends the copy, if its body is complete. Returns at once.
    pub fn send(self: Box<Self>, origin: &Origin<'_>, view: &Rc<View>, target: &RouteTarget) {
        let Self { head, body, mirror, place } = *self;
        let body = match body.replace(BodyCopy::TooLarge) {
            BodyCopy::Whole(body) => body,
            BodyCopy::Reading { .. } => return mirror.copies.count(CopyOutcome::Incomplete),
            BodyCopy::TooLarge => return mirror.copies.count(CopyOutcome::TooLarge),
        };
        let Some(serving) = view.clusters.get(mirror.upstream).map(Rc::clone) else { return };
        let durations = || Arc::clone(&target.route_owner.destination.durations);
        let route_owner = WorkerCluster::new(&mirror.route_owner, Some(&target.route_owner), durations);
        let target = RouteTarget {
            serving,
            route_owner,
            route: target.route,
            route_owner_index: target.route_owner_index,
            pinned_endpoint: None,
            chosen_by_client: target.chosen_by_client,
        };
        let sender = Sender {
            worker: Rc::clone(origin.worker),
            view: Rc::clone(view),
            side: origin.side.clone(),
            peer: origin.peer.clone(),
            is_tls: origin.is_tls,
        };
        let request = head.into_request(body, mirror.settings.credentials);
        spawn_local(async move {
            let limit = mirror.settings.timeout.0;
            let outcome = timeout(limit, sender.send(&target, request, limit)).await;
            mirror.copies.count(outcome.unwrap_or(CopyOutcome::Failed));
            drop(place);
        });
    }
}

impl CopiedHead {
    fn into_request(self, body: Bytes, credentials: bool) -> Request<ClientBody> {
        let Self { method, uri, version, mut headers } = self;
        if !credentials {
            CREDENTIALS.iter().for_each(|name| drop(headers.remove(name)));
        }
        // The body is there as a whole, without trailers.
        for name in [EXPECT, TRAILER, TRANSFER_ENCODING] {
            headers.remove(name);
        }
        if body.is_empty() {
            headers.remove(CONTENT_LENGTH);
        } else {
            headers.insert(CONTENT_LENGTH, body.len().into());
        }
        headers.insert(X_OUTRIGGER_MIRROR, HeaderValue::from_static("1"));
        let mut request = Request::new(BufferedBody::whole(body));
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        *request.version_mut() = version;
        *request.headers_mut() = headers;
        request
    }
}

/// What a copy needs of the request that it was made of.
struct Sender {
    worker: Rc<Worker>,
    view: Rc<View>,
    side: Side,
    peer: HeaderValue,
    is_tls: bool,
}

impl Sender {
    async fn send(
        &self,
        target: &RouteTarget,
        mut request: Request<ClientBody>,
        limit: Duration,
    ) -> CopyOutcome {
        let now = Instant::now();
        // Without a record: copies are in no access log and no trace.
        let progress = Rc::new(Progress::new(now));
        let origin = Origin {
            worker: &self.worker,
            view: &self.view,
            progress: &progress,
            side: &self.side,
            peer: &self.peer,
            identity: None,
            is_tls: self.is_tls,
            deadline: Some(now + limit),
            client: None,
            stale: None,
            earlier_attempts: 0,
        };
        let present = FieldSet::of(request.headers());
        match origin.watch(exchange::run(&origin, target, &mut request, present)).await {
            Some(Ok(response)) => {
                origin.watch(read(response.into_body())).await;
                CopyOutcome::Answered
            }
            Some(Err(_)) | None => CopyOutcome::Failed,
        }
    }
}

/// Reads a response to its end, unless it is large.
async fn read(mut body: ResponseBody) {
    let mut left = MAX_RESPONSE;
    while let Some(Ok(frame)) = body.frame().await {
        match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}
