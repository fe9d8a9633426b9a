//! One attempt: a connection, the request, the head of the response.

use std::{net::SocketAddr, rc::Rc, sync::Arc};

use http::{HeaderMap, Method, Request, Response, Uri, Version, header::HOST, uri::Authority};
use tokio::time::Instant;

use super::{
    body::{RequestBody, RequestResources},
    endpoints::connect_error,
    error::ProxyError,
    headers,
    interim::{self, ContinueGate, InterimQueue},
};
use crate::{
    cause::Cause,
    field_set::FieldSet,
    identity::handshake::{FailureKind, own_certificate_expired, rejected_after_handshake},
    resilience::classify::{ConnectFailure, Health, OutcomeKind, Reset},
    upstream::{
        Lease,
        connect::{ConnectError, PeerVerification},
        http1::{AttemptFields, OutgoingHead},
        http2::pool::Http2Pool,
        local::LocalEndpoint,
        policy_state::PolicyState,
        pool::{ConnectionSettings, Pool, ResponseError},
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
    /// The client's spelling of header names for a service that depends on it, and a target that `uri` cannot hold.
    pub extensions: http::Extensions,
    /// A fallback may send it to another upstream after all attempts.
    pub keep: bool,
    pub attempt_fields: AttemptFields,
}

/// A response's head, with what is held until its body, which the lease reads, has ended.
#[derive(Debug)]
pub struct UpstreamResponse {
    pub head: Response<()>,
    /// Which fields the head has.
    pub present: FieldSet,
    pub lease: Lease,
    pub held: RequestResources,
}

/// An attempt without a response.
#[derive(Debug)]
pub struct AttemptError {
    pub ending: OutcomeKind,
    pub error: ProxyError,
    /// Its connection was lost with other requests on it, and one of those has been counted already.
    pub counted: bool,
    /// Only its stream was reset; its connection, by HTTP/2, is intact.
    pub stream_only: bool,
}

impl AttemptError {
    pub fn new(ending: OutcomeKind, error: ProxyError) -> Self {
        Self { ending, error, counted: false, stream_only: false }
    }
}

impl Outgoing {
    /// The host that the client asked for.
    pub fn host(&self) -> Option<&str> {
        let of_uri = self.uri.authority().map(Authority::as_str);
        of_uri.or_else(|| self.headers.get(HOST)?.to_str().ok())
    }

    /// As HTTP/1.1 sends it.
    fn borrow(&self) -> OutgoingHead<'_> {
        let (spelling, raw_target) = (self.extensions.get(), self.extensions.get());
        let (method, target, fields) = (&self.method, &self.uri, &self.headers);
        OutgoingHead { method, target, raw_target, fields, spelling, attempt_fields: self.attempt_fields }
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
    pub policy_state: &'a Arc<PolicyState>,
    /// Takes interim responses for the client.
    pub interim: Option<&'a InterimQueue>,
    /// Holds the body back until the endpoint has said `100 Continue`.
    pub gate: Option<Rc<ContinueGate>>,
    /// The request has a body.
    pub uploads: bool,
    /// No attempt can follow this one, so the head need not be kept. Applied only after a connection is obtained, because
    /// another attempt may always follow a failed connect.
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
    let AttemptContext { name, endpoint, settings, policy_state, interim, gate, uploads, is_last, began } =
        context;
    let in_flight = endpoint.start_request(began.into_std());
    let lease = match outgoing.version {
        Version::HTTP_2 => Http2Pool::stream(endpoint, settings, policy_state, uploads).await,
        _ => Pool::h1(endpoint, settings, policy_state, began).await,
    };
    let mut lease = lease.map_err(|error| {
        if let ConnectError::LocalResource { .. } = error {
            policy_state.counters.rejected.increment(Cause::LocalResource.word());
        }
        AttemptError::new(connect_ending(&error), connect_error(name, &error))
    })?;
    let stale = lease.is_reused();
    let body = body(stale);
    let sent = body.upload_status();
    let body = body.into_upload();
    let answered = match &mut lease {
        Lease::H1 { connection, .. } => {
            let interim = |status, fields| {
                if let Some(to) = interim {
                    interim::forward_interim(to, gate.as_deref(), status, fields);
                }
            };
            let answered = connection.send(outgoing.borrow(), body, interim).await;
            let answered = answered.map(|head| (head.present, head.into_response()));
            answered.map_err(|error| (error.into(), !lease.has_sent_bytes()))
        }
        Lease::H2 { stream, .. } => {
            // Boxed: otherwise the future of each HTTP/1 request would be as large.
            let answered = Box::pin(stream.send(outgoing.request(is_last), body)).await;
            answered
                .map(|response| (FieldSet::of(response.headers()), response))
                .map_err(|failed| (ResponseError::from(failed.error), failed.is_unsent))
        }
    };
    match answered {
        Ok((present, response)) => {
            in_flight.response_started();
            Ok(UpstreamResponse {
                head: response,
                present,
                lease,
                held: RequestResources { in_flight, upload: sent, permit: None, grpc: None },
            })
        }
        Err((error, unsent)) => {
            let broken = BrokenAttempt { name, address: endpoint.address(), lease: &lease, unsent, stale };
            Err(broken.classify(&error))
        }
    }
}

/// What it means for the endpoint that no connection could be used.
pub fn connect_ending(error: &ConnectError) -> OutcomeKind {
    let failure = match error {
        // That there was no turn for it says nothing about the upstream's health.
        ConnectError::ConnectionLimit { .. } | ConnectError::StreamLimit { .. } => {
            return OutcomeKind::LocalRefusal;
        }
        // Nor does what is wrong with our own certificate.
        ConnectError::Tls { failure, .. } if failure.kind == FailureKind::NotReady => {
            return OutcomeKind::LocalRefusal;
        }
        ConnectError::Refused { .. } => ConnectFailure::Refused,
        ConnectError::Timeout { .. } => ConnectFailure::Timeout,
        ConnectError::LocalResource { .. } => ConnectFailure::LocalResource,
        ConnectError::Handshake { .. } => ConnectFailure::Handshake,
        ConnectError::Tls { failure, .. } if failure.kind.is_about_identity() => ConnectFailure::PeerIdentity,
        ConnectError::Tls { .. } => ConnectFailure::Tls,
    };
    OutcomeKind::Connect(failure)
}

/// A request that broke on its connection.
struct BrokenAttempt<'a> {
    /// The upstream's name.
    name: &'a str,
    address: SocketAddr,
    lease: &'a Lease,
    /// No byte of the request was sent.
    unsent: bool,
    /// The connection had been idle: the endpoint may have closed it before it saw the request.
    stale: bool,
}

impl BrokenAttempt<'_> {
    /// What the error means.
    fn classify(&self, error: &ResponseError) -> AttemptError {
        let Self { name, address, lease, unsent, stale } = *self;
        // With TLS 1.3 the endpoint looks at our certificate when we believe the handshake to be done.
        let refuses_this_alone = lease.has_received_bytes() || error.h2().is_some_and(h2::Error::is_reset);
        if !refuses_this_alone
            && let Some(at) =
                lease.peer_verification().and_then(PeerVerification::client_certificate_expired_at)
        {
            let detail = format!("{name}: {address}: {}", own_certificate_expired(at));
            return AttemptError::new(OutcomeKind::LocalRefusal, ProxyError::new(Cause::TlsFailure, detail));
        }
        if let Some(failure) = rejected_after_handshake(error) {
            let detail = format!("{name}: {address}: {failure}");
            return AttemptError::new(
                OutcomeKind::Connect(ConnectFailure::Tls),
                ProxyError::new(Cause::TlsFailure, detail),
            );
        }
        if error.is_request_fault() {
            let error = ProxyError::malformed(format!("the request cannot be sent to {name}: {error}"));
            return AttemptError::new(OutcomeKind::ClientError, error);
        }
        let h2 = error.h2();
        let refused = h2.is_some_and(|h2| {
            // `h2` gives the endpoint's GOAWAY as the error of streams above its last id only, whatever its code.
            h2.reason() == Some(h2::Reason::REFUSED_STREAM) || (h2.is_go_away() && h2.is_remote())
        });
        if refused {
            let detail = format!("{name}: {address} refused the stream before it was processed");
            return AttemptError::new(OutcomeKind::RefusedStream, ProxyError::new(Cause::Reset, detail));
        }
        let response_begun = error.is_malformed() || lease.has_received_bytes();
        let request_sent = response_begun || !unsent;
        let reset =
            Reset { reused: stale && !response_begun, request_sent, response_started: response_begun };
        let what = match (error.is_malformed(), h2.and_then(h2::Error::reason)) {
            (true, _) => format!("sent a response that is not valid HTTP ({error})"),
            (_, Some(reason)) => format!("reset the stream ({reason})"),
            _ => "closed the connection before it responded".to_owned(),
        };
        let hint = match lease {
            Lease::H2 { reused: false, .. } if !h2.is_some_and(h2::Error::is_reset) => {
                "; HTTP/2 was used because the client used it: if this server speaks HTTP/1.1 only, set `protocol = \"http1\"` in its `[[upstream]]` (for the service, in `[[inbound.port]]`)"
            }
            _ => "",
        };
        let proxy_error = ProxyError::new(Cause::Reset, format!("{name}: {address} {what}{hint}"));
        AttemptError {
            counted: is_counted(error, lease),
            stream_only: h2.is_some_and(h2::Error::is_reset),
            ..AttemptError::new(OutcomeKind::Reset(reset), proxy_error)
        }
    }
}

/// Whether an error is the loss of a connection that another request on it has reported. Ask once for each attempt.
pub fn is_counted(error: &ResponseError, lease: &Lease) -> bool {
    let one_stream_only = error.h2().is_some_and(h2::Error::is_reset);
    !one_stream_only && lease.loss().is_some_and(|loss| loss.count_once(Health::Failure) == Health::Neutral)
}
