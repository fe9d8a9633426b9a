//! The API of the admin server: routes, access control, responses.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{
        ACCEPT, ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, VARY,
        WWW_AUTHENTICATE,
    },
    request::Parts,
};
use http_body::Body;
use http_body_util::{BodyExt, Full};

use super::{
    breaker, cache, deliveries, host_check, probes::Probes, reload, split, status::Status, token::AdminToken,
};
use crate::{
    admin::exposition::{self, ExpositionFormat},
    redact::redact_userinfo,
    runtime::{failure::CriticalFailure, lifecycle::Control},
    telemetry::{log::LogFilter, requests::RequestReport},
};

/// A response of the admin server.
pub type ApiResponse = Response<Full<Bytes>>;

/// The API as one listener serves it.
#[derive(Clone, Debug)]
pub struct Api {
    pub control: Arc<Control>,
    pub access: Access,
}

/// What clients of a listener may do.
#[derive(Clone, Debug)]
pub enum Access {
    /// Everything: a Unix socket, protected by its file permissions.
    All,
    /// Changes need the token. Without one (its file could not be written) nothing can be changed.
    Token(Option<AdminToken>),
    /// `/live`, `/ready`, `/metrics` and the probes of the pod's other containers, without authentication.
    Probe(Arc<Probes>),
}

type Immediate = fn(&Arc<Control>, &Parts, &[u8]) -> ApiResponse;
/// Waits for other threads.
type Deferred = for<'a> fn(&'a Control, &'a Parts, &'a [u8]) -> ResponseFuture<'a>;
type ResponseFuture<'a> = Pin<Box<dyn Future<Output = ApiResponse> + Send + 'a>>;

#[derive(Clone, Copy)]
enum Handler {
    Immediate(Immediate),
    Deferred(Deferred),
    /// Waits until the files have been loaded.
    Reload,
}

struct Route {
    method: Method,
    /// The segment `NAME` matches any non-empty segment.
    path: &'static str,
    probe: bool,
    /// Whether it needs the token, as all changes do.
    protected: bool,
    handler: Handler,
}

impl Route {
    fn is_at(&self, path: &str) -> bool {
        let mut parts = path.split('/');
        let matches = |(pattern, part): (&str, Option<&str>)| match part {
            Some(part) => pattern == part || (pattern == "NAME" && !part.is_empty()),
            None => false,
        };
        self.path.split('/').map(|pattern| (pattern, parts.next())).all(matches) && parts.next().is_none()
    }
}

const fn read(path: &'static str, probe: bool, handler: Immediate) -> Route {
    Route { method: Method::GET, path, probe, protected: false, handler: Handler::Immediate(handler) }
}

/// Needs the token, as all changes do.
const fn change(method: Method, path: &'static str, handler: Immediate) -> Route {
    Route { method, path, probe: false, protected: true, handler: Handler::Immediate(handler) }
}

const fn deferred(method: Method, path: &'static str, handler: Deferred) -> Route {
    Route { method, path, probe: false, protected: true, handler: Handler::Deferred(handler) }
}

const ROUTES: &[Route] = &[
    read("/", false, |_, _, _| page()),
    read("/live", true, |control, _, _| live(control)),
    read("/ready", true, |control, parts, _| ready(control, &parts.headers)),
    read("/metrics", true, |control, parts, _| metrics(control, &parts.headers)),
    read("/status", false, |control, _, _| json(StatusCode::OK, &Status::of(control))),
    read("/requests", false, |control, _, _| requests(control)),
    read("/config", false, |control, parts, _| config(control, &parts.headers)),
    change(Method::POST, "/upstreams/NAME/breaker", |control, parts, body| {
        breaker::force(control, breaker::upstream_from_path(parts.uri.path()).unwrap_or_default(), body)
    }),
    change(Method::POST, "/upstreams/NAME/routes/NAME/split", |control, parts, body| {
        split::set(control, parts.uri.path(), body)
    }),
    // URLs may hold private data.
    change(Method::GET, cache::LIST_PATH, |control, _, _| cache::list(control)),
    change(Method::POST, cache::PURGE_PATH, |control, _, body| cache::purge(control, body)),
    deferred(Method::GET, "/deliveries", |control, parts, _| Box::pin(deliveries::list(control, parts))),
    deferred(Method::GET, "/deliveries/NAME", |control, parts, _| Box::pin(deliveries::show(control, parts))),
    deferred(Method::POST, "/deliveries/replay", |control, _, body| {
        Box::pin(deliveries::replay(control, body))
    }),
    deferred(Method::POST, "/deliveries/drop", |control, _, body| {
        Box::pin(deliveries::drop_all(control, body))
    }),
    deferred(Method::POST, "/queues/NAME/pause", |control, parts, _| {
        Box::pin(deliveries::pause(control, parts, true))
    }),
    deferred(Method::POST, "/queues/NAME/resume", |control, parts, _| {
        Box::pin(deliveries::pause(control, parts, false))
    }),
    change(Method::POST, "/drain", |control, _, _| drain(control)),
    change(Method::PUT, "/log", |control, _, body| set_log(control, body)),
    Route {
        method: Method::POST,
        path: reload::PATH,
        probe: false,
        protected: true,
        handler: Handler::Reload,
    },
];

/// A worker whose thread has not run for this long counts as hung. The kubelet acts only after several failed probes.
const HUNG_AFTER: Duration = Duration::from_secs(30);

/// Whether all essential parts run. One that died ends the process, which can take a while if the service must end
/// first.
fn live(control: &Control) -> ApiResponse {
    if let Some(CriticalFailure { name, reason: why }) = control.failures.failure() {
        return text(StatusCode::SERVICE_UNAVAILABLE, &format!("{name} has failed: {why}\n"));
    }
    let mut workers = control.shared.metrics.workers.iter().enumerate();
    let hung = workers.find(|(_, load)| load.stalled_for() > HUNG_AFTER);
    match hung {
        None => text(StatusCode::OK, "live\n"),
        Some((index, load)) => {
            let reason = format!("worker-{index} has not run for {} s\n", load.stalled_for().as_secs());
            text(StatusCode::SERVICE_UNAVAILABLE, &reason)
        }
    }
}

impl Api {
    /// Added to the response timeout: a probe has its own timeout.
    pub fn extra_timeout(&self) -> Duration {
        match &self.access {
            Access::Probe(probes) => probes.longest_timeout(),
            Access::All | Access::Token(_) => Duration::ZERO,
        }
    }

    /// Handles a request. The caller must limit the size of its body.
    pub async fn respond<B>(&self, request: Request<B>) -> ApiResponse
    where
        B: Body<Data: Send, Error: std::fmt::Display> + Send,
    {
        let (parts, body) = request.into_parts();
        if let (Access::Probe(probes), Some(name)) = (&self.access, parts.uri.path().strip_prefix("/probe/"))
            && parts.method == Method::GET
            && let Some((status, reason)) = probes.run(name).await
        {
            return text(status, &reason);
        }
        let handler = match self.admit(&parts) {
            Ok(handler) => handler,
            Err(refusal) => return *refusal,
        };
        match body.collect().await {
            Ok(body) => match handler {
                Handler::Immediate(handler) => handler(&self.control, &parts, &body.to_bytes()),
                Handler::Deferred(handler) => handler(&self.control, &parts, &body.to_bytes()).await,
                Handler::Reload => reload::reload(&self.control, &body.to_bytes()).await,
            },
            Err(error) => {
                problem(StatusCode::PAYLOAD_TOO_LARGE, "The body could not be read", &error.to_string())
            }
        }
    }

    /// The handler of this request, or the response that rejects it.
    fn admit(&self, parts: &Parts) -> Result<Handler, Box<ApiResponse>> {
        let probe_only = matches!(self.access, Access::Probe(_));
        if matches!(self.access, Access::Token(_)) && !host_check::host_is_local(&parts.uri, &parts.headers) {
            return Err(Box::new(problem(
                StatusCode::FORBIDDEN,
                "Not a name of this machine",
                "the admin server accepts only localhost and literal addresses in Host, so that no web page can reach it by DNS rebinding",
            )));
        }
        let path = parts.uri.path();
        let served: Vec<&Route> = ROUTES.iter().filter(|route| route.probe || !probe_only).collect();
        let matching: Vec<&&Route> = served.iter().filter(|route| route.is_at(path)).collect();
        if matching.is_empty() {
            let paths: Vec<&str> = served.iter().map(|route| route.path).collect();
            let detail = format!("available paths: {}", paths.join(", "));
            return Err(Box::new(problem(StatusCode::NOT_FOUND, "No such path", &detail)));
        }
        let method = if parts.method == Method::HEAD { &Method::GET } else { &parts.method };
        let Some(route) = matching.iter().find(|route| route.method == *method) else {
            let allowed = matching.iter().map(|route| match route.method {
                Method::GET => "GET, HEAD",
                Method::POST => "POST",
                _ => "PUT",
            });
            let allowed = allowed.collect::<Vec<_>>().join(", ");
            let mut response = problem(
                StatusCode::METHOD_NOT_ALLOWED,
                "Method not allowed",
                &format!("{path} accepts {allowed}"),
            );
            if let Ok(allowed) = HeaderValue::from_str(&allowed) {
                response.headers_mut().insert(ALLOW, allowed);
            }
            return Err(Box::new(response));
        };
        if route.protected {
            self.check_token(&parts.headers)?;
        }
        Ok(route.handler)
    }

    fn check_token(&self, headers: &HeaderMap) -> Result<(), Box<ApiResponse>> {
        let deny = |detail: &str| {
            let mut response = problem(StatusCode::UNAUTHORIZED, "This needs the admin token", detail);
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            Err(Box::new(response))
        };
        match &self.access {
            Access::All => Ok(()),
            Access::Token(Some(token)) => {
                if token.matches_authorization(headers.get(AUTHORIZATION).map(HeaderValue::as_bytes)) {
                    Ok(())
                } else {
                    deny(
                        "send `Authorization: Bearer TOKEN`; the token's file is in the log and in the ready file",
                    )
                }
            }
            Access::Token(None) => deny(
                "no token file could be written at startup (see the log): set [admin] token_file, or listen on a Unix socket",
            ),
            Access::Probe(_) => deny("not on this port"),
        }
    }
}

fn ready(control: &Control, headers: &HeaderMap) -> ApiResponse {
    let reason = control.not_ready();
    let status = if reason.is_none() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    if accepts(headers, "json") {
        json(status, &serde_json::json!({ "ready": reason.is_none(), "reason": reason }))
    } else {
        text(status, &format!("{}\n", reason.unwrap_or("ready")))
    }
}

fn metrics(control: &Arc<Control>, headers: &HeaderMap) -> ApiResponse {
    let format = ExpositionFormat::negotiate(headers);
    match exposition::render(control, format) {
        Ok(body) => {
            let mut response = with_type(format.content_type(), StatusCode::OK, body.into());
            response.headers_mut().insert(VARY, HeaderValue::from_static("Accept"));
            response
        }
        Err(error) => {
            problem(StatusCode::INTERNAL_SERVER_ERROR, "The metrics could not be written", &error.to_string())
        }
    }
}

fn requests(control: &Control) -> ApiResponse {
    let records = control.shared.request_telemetry.requests.read();
    let requests: Vec<RequestReport> =
        records.iter().map(|record| RequestReport::from_record(record)).collect();
    json(StatusCode::OK, &serde_json::json!({ "requests": requests }))
}

fn config(control: &Control, headers: &HeaderMap) -> ApiResponse {
    let config = &control.shared.snapshot.load().config;
    let tree = crate::config::effective_tree(config);
    if !accepts(headers, "toml") {
        return json(StatusCode::OK, &tree);
    }
    match toml::to_string(&tree) {
        Ok(written) => with_type("application/toml", StatusCode::OK, written.into()),
        Err(error) => problem(
            StatusCode::INTERNAL_SERVER_ERROR,
            "The configuration could not be written as TOML",
            &error.to_string(),
        ),
    }
}

fn drain(control: &Control) -> ApiResponse {
    let state = if control.request_drain() {
        tracing::info!("drain requested through the admin server");
        "draining inbound; the process stays until SIGTERM"
    } else {
        "already draining"
    };
    json(StatusCode::ACCEPTED, &serde_json::json!({ "drain": state }))
}

fn set_log(control: &Control, body: &[u8]) -> ApiResponse {
    let filter = match std::str::from_utf8(body).map_err(|e| e.to_string()).and_then(str::parse::<LogFilter>)
    {
        Ok(filter) => filter,
        Err(reason) => return problem(StatusCode::BAD_REQUEST, "Not a log filter", &reason),
    };
    match control.log.set(&filter) {
        Ok(()) => {
            tracing::info!(%filter, "log filter changed");
            json(StatusCode::OK, &serde_json::json!({ "log": filter.as_str() }))
        }
        Err(error) => problem(
            StatusCode::INTERNAL_SERVER_ERROR,
            "The log filter could not be changed",
            &error.to_string(),
        ),
    }
}

fn page() -> ApiResponse {
    let mut response =
        with_type("text/html; charset=utf-8", StatusCode::OK, include_str!("page.html").into());
    // Script and style are inline, and the page connects only to this server.
    response.headers_mut().insert(
        CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'",
        ),
    );
    response
}

fn accepts(headers: &HeaderMap, kind: &str) -> bool {
    headers.get(ACCEPT).is_some_and(|field| field.to_str().is_ok_and(|field| field.contains(kind)))
}

fn text(status: StatusCode, body: &str) -> ApiResponse {
    with_type("text/plain; charset=utf-8", status, body.to_owned().into())
}

pub fn json(status: StatusCode, body: &impl serde::Serialize) -> ApiResponse {
    match serde_json::to_string_pretty(body) {
        Ok(body) => {
            let mut body = redact_userinfo(&body).into_owned();
            body.push('\n');
            with_type("application/json", status, body.into())
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
    }
}

/// RFC 9457.
pub fn problem(status: StatusCode, title: &str, detail: &str) -> ApiResponse {
    let body = serde_json::json!({
        "type": "about:blank", "title": title, "status": status.as_u16(), "detail": detail,
    });
    let mut response = json(status, &body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    response
}

fn with_type(kind: &'static str, status: StatusCode, body: Bytes) -> ApiResponse {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
