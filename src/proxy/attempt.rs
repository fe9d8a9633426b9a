//! One attempt: a connection, the request, the head of the response.

use std::{net::SocketAddr, rc::Rc, sync::Arc};

use http::{HeaderMap, Method, Request, Response, Uri, Version, header::HOST, uri::Authority};
use tokio::time::Instant;

use super::{
    body::{Held, RequestBody},
    connect::connect_failed,
    error::{Cause, ProxyError},
    headers,
    interim::{self, Gate, Interim},
};
use crate::{
    identity::handshake::{FailureKind, own_has_expired, refused_after},
    present::Present,
    resilience::classify::{ConnectFailure, Ending, Health, Reset},
    upstream::{
        Lease,
        connect::{ConnectError, Proof},
        guards::Guards,
        http1::{Head, Told},
        http2::pool::Http2Pool,
        local::LocalEndpoint,
        pool::{AnswerError, ConnectionSettings, Pool},
    },
};

/// What an attempt sends, beside the body.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub method: Method,
    pub uri: Uri,
    /// `HTTP_11` or `HTTP_2`.
    pub version: Version,
    pub headers: HeaderMap,
    /// Has the client's spelling of header names for a service that insists, and a target that `uri` cannot hold.
    pub extensions: http::Extensions,
    /// A fallback may send it to another upstream after all attempts.
    pub keep: bool,
    pub told: Told,
}

/// A response's head, with what is held until its body, which comes by the lease, has ended.
#[derive(Debug)]
pub struct UpstreamResponse {
    pub head: Response<()>,
    /// Which fields the head has.
    pub present: Present,
    pub lease: Lease,
    pub held: Held,
}

/// An attempt without a response.
#[derive(Debug)]
pub struct AttemptError {
    pub ending: Ending,
    pub error: ProxyError,
    /// Its connection was lost with other requests on it, and one of those has been counted already.
    pub counted: bool,
}

impl AttemptError {
    pub fn new(ending: Ending, error: ProxyError) -> Self {
        Self { ending, error, counted: false }
    }
}

impl Outgoing {
    /// The host that the client asked for.
    pub fn host(&self) -> Option<&str> {
        let of_uri = self.uri.authority().map(Authority::as_str);
        of_uri.or_else(|| self.headers.get(HOST)?.to_str().ok())
    }

    /// As HTTP/1.1 sends it.
    fn borrow(&self) -> Head<'_> {
        let (spelling, raw_target) = (self.extensions.get(), self.extensions.get());
        let (method, target, fields) = (&self.method, &self.uri, &self.headers);
        Head { method, target, raw_target, fields, spelling, told: self.told }
    }

    /// As HTTP/2 sends it. `last`: no attempt can follow this one, and nothing is left of it.
    fn request(&mut self, last: bool) -> Request<()> {
        let headers = if last { std::mem::take(&mut self.headers) } else { self.headers.clone() };
        let mut request = Request::new(());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.version_mut() = self.version;
        *request.headers_mut() = headers;
        headers::keep_unindexed(request.headers_mut());
        request
    }
}

/// What an attempt is made with.
pub struct AttemptContext<'a> {
    pub name: &'a str,
    pub endpoint: &'a Rc<LocalEndpoint>,
    pub settings: &'a ConnectionSettings,
    pub guards: &'a Arc<Guards>,
    /// Takes interim responses for the client.
    pub interim: Option<&'a Interim>,
    /// Holds the body back until the endpoint has said `100 Continue`.
    pub gate: Option<Rc<Gate>>,
    /// The request has a body.
    pub uploads: bool,
    /// No attempt can follow this one, so the head need not be kept. Heeded once there is a connection: an endpoint that
    /// cannot be reached is never the last.
    pub is_last: bool,
    pub began: Instant,
}

/// Sends a request to an endpoint. `body` makes its body once there is a connection; its argument: that has been used
/// before.
pub async fn send(
    context: AttemptContext<'_>,
    outgoing: &mut Outgoing,
    body: impl FnOnce(bool) -> RequestBody,
) -> Result<UpstreamResponse, AttemptError> {
    let AttemptContext { name, endpoint, settings, guards, interim, gate, uploads, is_last, began } = context;
    let in_flight = endpoint.ask(began.into_std());
    let lease = match outgoing.version {
        Version::HTTP_2 => Http2Pool::stream(endpoint, settings, guards, uploads).await,
        _ => Pool::h1(endpoint, settings, guards, began).await,
    };
    let mut lease = lease.map_err(|error| {
        if let ConnectError::LocalResource { .. } = error {
            guards.counts.rejected.add(Cause::LocalResource.word());
        }
        AttemptError::new(connect_ending(&error), connect_failed(name, &error))
    })?;
    let stale = lease.reused();
    let body = body(stale);
    let sent = body.sent();
    let answered = match &mut lease {
        Lease::H1 { connection, .. } => {
            let interim = |status, fields| {
                if let Some(to) = interim {
                    interim::pass_on(to, gate.as_deref(), status, fields);
                }
            };
            let answered = connection.send(outgoing.borrow(), body, interim).await;
            let answered = answered.map(|head| (head.present, head.into_response()));
            answered.map_err(|error| (error.into(), !lease.sent_anything()))
        }
        Lease::H2 { stream, .. } => {
            // Boxed: else each request over HTTP/1 would hold room for it.
            let answered = Box::pin(stream.send(outgoing.request(is_last), body)).await;
            answered
                .map(|response| (Present::of(response.headers()), response))
                .map_err(|failed| (AnswerError::from(failed.error), failed.unsent))
        }
    };
    match answered {
        Ok((present, response)) => {
            in_flight.answered();
            Ok(UpstreamResponse {
                head: response,
                present,
                lease,
                held: Held { in_flight, sent, place: None, grpc: None },
            })
        }
        Err((error, unsent)) => Err(classify(name, endpoint.address(), &error, unsent, stale, &lease)),
    }
}

/// What it means for the endpoint that no connection could be used.
pub fn connect_ending(error: &ConnectError) -> Ending {
    let failure = match error {
        // That there was no turn for it says nothing about the upstream's health.
        ConnectError::Limit { .. } | ConnectError::Streams { .. } => return Ending::LocalRefusal,
        // Nor does what is wrong with our own certificate.
        ConnectError::Tls { failure, .. } if failure.kind == FailureKind::NotReady => {
            return Ending::LocalRefusal;
        }
        ConnectError::Refused { .. } => ConnectFailure::Refused,
        ConnectError::Timeout { .. } => ConnectFailure::Timeout,
        ConnectError::LocalResource { .. } => ConnectFailure::LocalResource,
        ConnectError::Handshake { .. } => ConnectFailure::Handshake,
        ConnectError::Tls { failure, .. } if failure.kind.is_about_identity() => ConnectFailure::PeerIdentity,
        ConnectError::Tls { .. } => ConnectFailure::Tls,
    };
    Ending::Connect(failure)
}

/// What a broken connection means.
fn classify(
    name: &str,
    address: SocketAddr,
    error: &AnswerError,
    unsent: bool,
    stale: bool,
    lease: &Lease,
) -> AttemptError {
    // With TLS 1.3 the endpoint looks at our certificate when we believe the handshake to be done.
    let refuses_this_alone = lease.heard_anything() || error.h2().is_some_and(h2::Error::is_reset);
    if !refuses_this_alone && let Some(at) = lease.proof().and_then(Proof::own_expired) {
        let detail = format!("{name}: {address}: {}", own_has_expired(at));
        return AttemptError::new(Ending::LocalRefusal, ProxyError::new(Cause::TlsFailure, detail));
    }
    if let Some(failure) = refused_after(error) {
        let detail = format!("{name}: {address}: {failure}");
        return AttemptError::new(
            Ending::Connect(ConnectFailure::Tls),
            ProxyError::new(Cause::TlsFailure, detail),
        );
    }
    if error.is_of_request() {
        let told = ProxyError::malformed(format!("the request cannot be sent to {name}: {error}"));
        return AttemptError::new(Ending::ClientError, told);
    }
    let h2 = error.h2();
    let refused = h2.is_some_and(|h2| {
        // `h2` gives the endpoint's GOAWAY as the error of streams above its last id only, whatever its code.
        h2.reason() == Some(h2::Reason::REFUSED_STREAM) || (h2.is_go_away() && h2.is_remote())
    });
    if refused {
        let detail = format!("{name}: {address} refused the stream before it was processed");
        return AttemptError::new(Ending::RefusedStream, ProxyError::new(Cause::Reset, detail));
    }
    let response_begun = error.is_malformed() || lease.heard_anything();
    let request_sent = response_begun || !unsent;
    let reset = Reset { reused: stale && !response_begun, request_sent, response_begun };
    let what = match (error.is_malformed(), h2.and_then(h2::Error::reason)) {
        (true, _) => format!("answered with something that is not valid HTTP ({error})"),
        (_, Some(reason)) => format!("reset the stream ({reason})"),
        _ => "closed the connection before it answered".to_owned(),
    };
    let hint = match lease {
        Lease::H2 { reused: false, .. } if !h2.is_some_and(h2::Error::is_reset) => {
            "; it was called by HTTP/2 as its caller came by that: if it speaks HTTP/1.1 only, say so by `protocol = \"http1\"` (of the upstream; for the service itself, of an `[[inbound.port]]`)"
        }
        _ => "",
    };
    let told = ProxyError::new(Cause::Reset, format!("{name}: {address} {what}{hint}"));
    AttemptError { counted: is_counted(error, lease), ..AttemptError::new(Ending::Reset(reset), told) }
}

/// Whether an error is the loss of a connection that another request on it has reported. Ask once for each attempt.
pub fn is_counted(error: &AnswerError, lease: &Lease) -> bool {
    let one_stream_only = error.h2().is_some_and(h2::Error::is_reset);
    !one_stream_only && lease.loss().is_some_and(|loss| loss.weigh(Health::Failure) == Health::Neutral)
}
