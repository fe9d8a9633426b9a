//! Fetches a response for the store: for the client that misses it, for those that wait with it, or in the background.

use std::{
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{
    HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{CACHE_CONTROL, IF_RANGE, PRAGMA, RANGE},
};
use http_body::Body as _;
use tokio::{
    sync::OwnedSemaphorePermit,
    task::spawn_local,
    time::{Instant, timeout},
};

use super::{
    CacheKey, CachedRoute, ClientRequest, StaleStandby,
    detached::{Detachable, watch},
    respond::{self, Forwarded, Note},
    storing::{self, Storing},
};
use crate::{
    cache::{
        Entry, Store,
        flight::{FlightState, Leader},
        store::Ticket,
    },
    field_set::FieldSet,
    http1::target::RawTarget,
    model::{Side, View},
    proxy::{
        body::{ClientBody, ResponseBody},
        connection::Connection,
        deliver::FromFallback,
        error::ProxyError,
        exchange,
        origin::Origin,
        progress::Progress,
        target::RouteTarget,
        worker::Worker,
    },
    resilience::cache::{
        CacheSettings,
        conditional::{make_conditional, update_head},
        freshness::{Assessment, Timing},
        storable::{self, NotStored},
        vary::{self, Selection},
    },
    telemetry::record::CacheResult,
};

/// How long a body of unknown length is read in the background.
const LONGEST_REVALIDATION: Duration = Duration::from_secs(60);

/// An [`Origin`] that can outlive its client.
pub struct OwnedOrigin {
    worker: Rc<Worker>,
    view: Rc<View>,
    pub progress: Rc<Progress>,
    side: Side,
    peer: HeaderValue,
    identity: Option<HeaderValue>,
    is_tls: bool,
    deadline: Option<Instant>,
    client: Option<Rc<Connection>>,
}

impl OwnedOrigin {
    pub fn new(origin: &Origin<'_>) -> Self {
        Self {
            worker: Rc::clone(origin.worker),
            view: Rc::clone(origin.view),
            progress: Rc::clone(origin.progress),
            side: origin.side.clone(),
            peer: origin.peer.clone(),
            identity: origin.identity.cloned(),
            is_tls: origin.is_tls,
            deadline: origin.deadline,
            client: origin.client.cloned(),
        }
    }

    fn borrow<'a>(&'a self, stale: Option<&'a StaleStandby>) -> Origin<'a> {
        Origin {
            worker: &self.worker,
            view: &self.view,
            progress: &self.progress,
            side: &self.side,
            peer: &self.peer,
            identity: self.identity.as_ref(),
            is_tls: self.is_tls,
            deadline: self.deadline,
            client: self.client.as_ref(),
            stale,
            earlier_attempts: 0,
        }
    }

    fn record(&self, result: CacheResult) {
        self.progress.with_record(|record| {
            record.cache = Some(result);
        });
    }
}

/// A fetch.
pub struct Fetch {
    pub origin: OwnedOrigin,
    pub target: RouteTarget,
    pub request: Request<ClientBody>,
    pub present: FieldSet,
    pub store: Arc<Store>,
    pub settings: CacheSettings,
    pub key: CacheKey,
    pub client_request: Rc<ClientRequest>,
    /// Other variants are stored.
    pub had_other: bool,
    /// What is stored for this request, and cannot be sent without asking.
    pub stored: Option<(Arc<Entry>, Assessment)>,
    pub lead: Option<Leader>,
    /// Held while it fetches after another fetch has failed.
    pub turn: Option<OwnedSemaphorePermit>,
}

/// Fetches a stale response anew, while its client gets the stale one.
pub fn revalidate_in_background(
    route: &CachedRoute<'_>,
    (entry, assessed): (&Arc<Entry>, Assessment),
    client_request: &Rc<ClientRequest>,
    key: &CacheKey,
    (lead, request): (Leader, &Request<ClientBody>),
) {
    let progress = Rc::new(Progress::new(Instant::now()));
    let origin =
        OwnedOrigin { client: None, progress: Rc::clone(&progress), ..OwnedOrigin::new(route.origin) };
    let mut again = Request::new(ClientBody::default());
    *again.method_mut() = Method::GET;
    *again.uri_mut() = request.uri().clone();
    *again.version_mut() = request.version();
    *again.headers_mut() = client_request.headers.clone();
    // The whole response is fetched, also where the client wants a part of it, or nothing but what is stored.
    for name in [RANGE, IF_RANGE, CACHE_CONTROL, PRAGMA] {
        again.headers_mut().remove(name);
    }
    if let Some(raw) = request.extensions().get::<RawTarget>() {
        again.extensions_mut().insert(raw.clone());
    }
    let present = FieldSet::of(again.headers());
    let fetch = Fetch {
        origin,
        target: route.target.clone(),
        request: again,
        present,
        store: Arc::clone(route.store),
        settings: route.settings.clone(),
        key: key.clone(),
        client_request: Rc::clone(client_request),
        had_other: false,
        stored: Some((Arc::clone(entry), assessed)),
        lead: Some(lead),
        turn: None,
    };
    let limit = *route.settings.object_limit;
    let run = async move {
        if let Ok(response) = fetch.run().await {
            read_for_store(response.into_body(), limit).await;
        }
    };
    spawn_local(watch(Box::pin(run), progress));
}

/// Reads a body that is being stored in place of a client: where its length is unknown, it is stored only while it is read.
async fn read_for_store(mut body: ResponseBody, limit: u64) {
    if !matches!(body, ResponseBody::Shared(_)) {
        return;
    }
    let read = async {
        let mut left = limit;
        while let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            let length = frame.data_ref().map_or(0, |data| data.len() as u64);
            let Some(rest) = left.checked_sub(length) else { return };
            left = rest;
        }
    };
    let _ = timeout(LONGEST_REVALIDATION, read).await;
}

impl Fetch {
    /// Fetches while the client waits. If it leaves, the fetch goes on for those that wait with it.
    pub async fn run_for_client(self) -> Result<Response<ResponseBody>, ProxyError> {
        let (progress, followers) =
            (Rc::clone(&self.origin.progress), self.lead.as_ref().map(Leader::followers));
        Detachable::new(self.run(), progress, followers).await
    }

    async fn run(mut self) -> Result<Response<ResponseBody>, ProxyError> {
        let ticket = self.store.ticket(&self.key.0);
        let validates = match &self.stored {
            Some((entry, _)) if self.client_request.method == Method::GET => {
                make_conditional(self.request.headers_mut(), &entry.headers)
            }
            _ => false,
        };
        let standby = self
            .stored
            .as_ref()
            .filter(|(_, assessed)| assessed.on_error)
            .map(|(entry, _)| StaleStandby::new(Arc::clone(entry), Rc::clone(&self.client_request)));
        let requested_at = SystemTime::now();
        let mut request = std::mem::take(&mut self.request);
        let origin = self.origin.borrow(standby.as_ref());
        // The fields of a condition are none of those that `present` tells.
        let result = exchange::run(&origin, &self.target, &mut request, self.present).await;
        self.turn = None;
        if let Some(cause) = standby.as_ref().and_then(StaleStandby::used) {
            if let Some(lead) = self.lead.take() {
                lead.resolve(FlightState::Failed(cause));
            }
            return result;
        }
        let response = match result {
            Ok(response) => response,
            Err(error) => {
                self.origin.record(CacheResult::Miss);
                if let Some(lead) = self.lead.take() {
                    lead.resolve(FlightState::Failed(error.cause.word()));
                }
                return Err(error);
            }
        };
        if response.extensions().get::<FromFallback>().is_some() {
            return Ok(self.pass_fallback(response));
        }
        let received = Received { ticket, requested_at, at: SystemTime::now() };
        if validates && response.status() == StatusCode::NOT_MODIFIED {
            return Ok(self.freshen(&response, received));
        }
        Ok(self.accept(response, received))
    }

    /// The fallback's response stands for a failure: it is neither stored nor shared.
    fn pass_fallback(mut self, mut response: Response<ResponseBody>) -> Response<ResponseBody> {
        self.origin.record(CacheResult::Miss);
        if let Some(lead) = self.lead.take() {
            lead.resolve(FlightState::Failed("fallback"));
        }
        let note =
            Note { forwarded: Some(Forwarded::new("miss")), detail: Some("fallback"), ..Note::default() };
        note.append(response.headers_mut(), &self.origin.view.proxy_names.deployment);
        response
    }

    /// Whether a response is selected by a field that this proxy writes: what the client sent says nothing about it.
    fn varies_by_own_field(&self, names: &[HeaderName]) -> bool {
        let gate = self.origin.view.snapshot.gate.as_ref().and_then(|gate| gate.jwt.as_ref());
        let claims = gate.into_iter().flat_map(|users| users.claim_headers.iter().map(|(name, _)| name));
        claims.into_iter().any(|claim| names.contains(claim))
            || names.iter().any(|name| OWN_FIELDS.contains(&name.as_str()))
    }

    /// A 304: the stored response is good again.
    fn freshen(mut self, response: &Response<ResponseBody>, received: Received) -> Response<ResponseBody> {
        let Some((old, assessed)) = self.stored.take() else { return Response::new(ResponseBody::Empty) };
        let headers = storing::storable_fields(&update_head(&old.headers, response.headers()));
        let timing = Timing::new(old.status, &headers, received.requested_at, received.at);
        let is_fresh = timing.is_fresh(received.at);
        let entry = Arc::new(Entry {
            status: old.status,
            headers,
            body: old.body.clone(),
            timing,
            selection: old.selection.clone(),
            stored_at: received.at,
        });
        let is_storable = storable::check_storable(
            &self.client_request.headers,
            self.settings.authorization,
            entry.status,
            &entry.headers,
        );
        let is_stored = match is_storable {
            Ok(()) => self.store.insert(&self.key.0, &entry, received.ticket, !is_fresh),
            Err(_) => {
                self.store.forget(&self.key.0, &self.client_request.headers, true);
                false
            }
        };
        if let Some(lead) = self.lead.take() {
            let shared = is_fresh && is_stored;
            lead.resolve(if shared { FlightState::Stored(Arc::clone(&entry)) } else { FlightState::Alone });
        }
        self.origin.record(CacheResult::Revalidated);
        let reason = if assessed.request_forces { "request" } else { "stale" };
        let note = Note {
            forwarded: Some(Forwarded { status: Some(304), is_stored, ..Forwarded::new(reason) }),
            ttl: Some(entry.timing.ttl(received.at)).filter(|left| *left > 0),
            ..Note::default()
        };
        respond::from_entry(&entry, &self.client_request, &note, &self.origin.view.proxy_names.deployment)
    }

    /// Any other response: stored where it may be, and sent to the client meanwhile.
    fn accept(mut self, mut response: Response<ResponseBody>, received: Received) -> Response<ResponseBody> {
        self.origin.record(CacheResult::Miss);
        let status = response.status();
        let headers = response.headers();
        let is_get = self.client_request.method == Method::GET;
        let is_storable = storable::check_storable(
            &self.client_request.headers,
            self.settings.authorization,
            status,
            headers,
        );
        let reason = match &self.stored {
            Some((_, assessed)) if assessed.request_forces => "request",
            Some(_) => "stale",
            None if self.had_other => "vary-miss",
            None => "uri-miss",
        };
        let mut note = Note { forwarded: Some(Forwarded::new(reason)), ..Note::default() };
        if let Some(forwarded) = &mut note.forwarded
            && self.stored.is_some()
        {
            forwarded.status = Some(status.as_u16());
        }
        let length = respond::content_length(headers);
        let too_large = length.is_some_and(|length| length > *self.settings.object_limit);
        let names = vary::names(headers).filter(|names| {
            !self.varies_by_own_field(names)
                && is_get
                && is_storable.is_ok()
                && !too_large
                && !headers.contains_key(http::header::TRAILER)
        });
        let deployment = self.origin.view.proxy_names.deployment.clone();
        let Some(names) = names else {
            note.detail = why(is_storable, too_large).filter(|_| is_get);
            self.pass_on(is_storable, status);
            note.append(response.headers_mut(), &deployment);
            return response;
        };
        let entry_headers = storing::storable_fields(headers);
        let timing = Timing::new(status, &entry_headers, received.requested_at, received.at);
        let entry = Entry {
            status,
            headers: entry_headers,
            body: Default::default(),
            selection: Selection::new(names, &self.client_request.headers),
            stored_at: received.at,
            timing,
        };
        // Negative only where a stale response was sent.
        note.ttl = Some(entry.timing.ttl(received.at)).filter(|left| *left > 0);
        if let Some(forwarded) = &mut note.forwarded {
            forwarded.is_stored = true;
        }
        let storing = Storing {
            store: Arc::clone(&self.store),
            key: std::mem::take(&mut self.key.0),
            request: Rc::clone(&self.client_request),
            ticket: received.ticket,
            is_fresh: entry.timing.is_fresh(received.at),
            entry,
            lead: self.lead.take(),
            limit: *self.settings.object_limit,
            length,
            progress: Rc::clone(&self.origin.progress),
        };
        note.append(response.headers_mut(), &deployment);
        let (head, body) = response.into_parts();
        Response::from_parts(head, storing.begin(body))
    }

    /// A response that is not stored.
    fn pass_on(&mut self, is_storable: Result<(), NotStored>, status: StatusCode) {
        let is_get = self.client_request.method == Method::GET;
        let failed = status.is_server_error();
        if is_get && !failed && status != StatusCode::NOT_MODIFIED && status != StatusCode::PARTIAL_CONTENT {
            // What it says replaces what is stored. If it is the request that forbids to store, others may share.
            let of_request = matches!(is_storable, Err(NotStored::Authorization | NotStored::Cookie))
                || self.client_request.directives.no_store;
            if !of_request {
                self.store.forget(&self.key.0, &self.client_request.headers, true);
            }
        }
        if let Some(lead) = self.lead.take() {
            lead.resolve(FlightState::Alone);
        }
    }
}

/// Fields of requests that this proxy writes or replaces.
const OWN_FIELDS: [&str; 8] = [
    "forwarded",
    "via",
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-outrigger-attempt",
    "x-request-id",
];

/// When a response was requested, and came.
#[derive(Clone, Copy)]
struct Received {
    ticket: Ticket,
    requested_at: SystemTime,
    at: SystemTime,
}

/// Why a response is not stored, for `Cache-Status`.
const fn why(is_storable: Result<(), NotStored>, too_large: bool) -> Option<&'static str> {
    Some(match is_storable {
        Err(NotStored::Kind) => return None,
        Err(NotStored::NoStore) => "no_store",
        Err(NotStored::Private) => "private",
        Err(NotStored::Authorization) => "authorization",
        Err(NotStored::Cookie) => "cookie",
        Err(NotStored::SetCookie) => "set_cookie",
        Err(NotStored::Vary) => "vary",
        Err(NotStored::Status) => "status",
        Err(NotStored::EventStream) => "event_stream",
        Ok(()) if too_large => "too_large",
        Ok(()) => "trailers",
    })
}
