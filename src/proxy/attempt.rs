//! One try: a connection, the request, the response's head.

use std::{net::SocketAddr, rc::Rc, sync::Arc};

use http::{HeaderMap, Method, Request, Response, Uri, Version, header::HOST, uri::Authority};
use hyper::{body::Incoming, ext::Protocol as ExtendedConnect};
use tokio::time::Instant;

use super::{
    body::{Held, RequestBody},
    connect::connect_failed,
    error::{Cause, ProxyError},
    headers,
    present::Present,
};
use crate::{
    identity::handshake::refused_after,
    resilience::classify::{ConnectFailure, Ending, Health, Reset},
    upstream::{
        Lease,
        connect::ConnectError,
        guards::Guards,
        local::LocalEndpoint,
        pool::{ConnectionSettings, Pool, SendError},
    },
};

/// What a try sends, beside the body.
#[derive(Debug)]
pub struct Outgoing {
    pub method: Method,
    pub uri: Uri,
    /// `HTTP_11` or `HTTP_2`.
    pub version: Version,
    pub headers: HeaderMap,
    /// Keeps the caller's spelling of header names for a service that insists.
    pub extensions: http::Extensions,
    /// Another upstream may have to be asked after all tries.
    pub keep: bool,
}

/// A response's head, with what is held until its body has ended.
#[derive(Debug)]
pub struct Answer {
    pub response: Response<Incoming>,
    /// What its head has.
    pub present: Present,
    pub lease: Lease,
    pub held: Held,
}

/// A try without a response.
#[derive(Debug)]
pub struct Failed {
    pub ending: Ending,
    pub error: ProxyError,
    /// Its connection was lost with others on it, and one of those has been counted already.
    pub counted: bool,
}

impl Failed {
    pub fn new(ending: Ending, error: ProxyError) -> Self {
        Self { ending, error, counted: false }
    }
}

impl Outgoing {
    /// The host that the caller asked for.
    pub fn host(&self) -> Option<&str> {
        let of_uri = self.uri.authority().map(Authority::as_str);
        of_uri.or_else(|| self.headers.get(HOST)?.to_str().ok())
    }

    /// The head for a try after which none can follow: nothing of it is left. Only for a connection that there is, as
    /// nobody who cannot be reached is ever the last to be tried.
    pub fn take(&mut self) -> Request<()> {
        let (headers, extensions) = (std::mem::take(&mut self.headers), std::mem::take(&mut self.extensions));
        self.request(headers, extensions)
    }

    /// The head for a try that another one may follow.
    pub fn copy(&self) -> Request<()> {
        self.request(self.headers.clone(), self.extensions.clone())
    }

    fn request(&self, mut headers: HeaderMap, extensions: http::Extensions) -> Request<()> {
        if self.version == Version::HTTP_2 {
            headers::keep_unindexed(&mut headers);
        }
        let mut request = Request::new(());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.version_mut() = self.version;
        *request.headers_mut() = headers;
        *request.extensions_mut() = extensions;
        request.extensions_mut().remove::<ExtendedConnect>();
        request
    }
}

/// Sends what `make` makes to an endpoint: once there is a connection, and told whether it has been used before.
pub async fn send(
    name: &str,
    endpoint: &Rc<LocalEndpoint>,
    settings: &ConnectionSettings,
    guards: &Arc<Guards>,
    version: Version,
    began: Instant,
    make: impl FnOnce(bool) -> Request<RequestBody>,
) -> Result<Answer, Failed> {
    let in_flight = endpoint.ask(began.into_std());
    let lease = match version {
        Version::HTTP_2 => Pool::h2(endpoint, settings, guards).await,
        _ => Pool::h1(endpoint, settings, guards).await,
    };
    let mut lease = lease.map_err(|error| {
        let failure = match error {
            // Our own limit says nothing about the upstream.
            ConnectError::Limit { .. } => {
                return Failed::new(Ending::LocalRefusal, connect_failed(name, &error));
            }
            ConnectError::Timeout { .. } => ConnectFailure::Timeout,
            ConnectError::Refused { .. } | ConnectError::Handshake { .. } | ConnectError::Tls { .. } => {
                ConnectFailure::Refused
            }
        };
        Failed::new(Ending::Connect(failure), connect_failed(name, &error))
    })?;
    let stale = lease.reused();
    let request = make(stale);
    let sent = request.body().sent();
    match lease.send(request).await {
        Ok(response) => {
            in_flight.answered();
            let present = Present::of(response.headers());
            Ok(Answer { response, present, lease, held: Held { in_flight, sent, place: None, grpc: None } })
        }
        Err(failed) => Err(classify(name, endpoint.address(), &failed, stale, &lease)),
    }
}

/// What a broken connection means.
fn classify(name: &str, address: SocketAddr, failed: &SendError, stale: bool, lease: &Lease) -> Failed {
    let error = &failed.error;
    if let Some(failure) = refused_after(error) {
        let detail = format!("{name}: {address}: {failure}");
        return Failed::new(
            Ending::Connect(ConnectFailure::Refused),
            ProxyError::new(Cause::TlsFailure, detail),
        );
    }
    let h2 = h2_error(error);
    let refused = h2.is_some_and(|h2| {
        let left_gracefully = h2.is_go_away() && h2.is_remote() && h2.reason() == Some(h2::Reason::NO_ERROR);
        h2.reason() == Some(h2::Reason::REFUSED_STREAM) || left_gracefully
    });
    if refused {
        let detail = format!("{name}: {address} refused the stream before it was processed");
        return Failed::new(Ending::RefusedStream, ProxyError::new(Cause::Reset, detail));
    }
    let response_begun = error.is_parse() || lease.heard_anything();
    let request_sent = response_begun || failed.unsent.is_none();
    let reset = Reset { reused: stale && !response_begun, request_sent, response_begun };
    let what = match (error.is_parse(), h2.and_then(h2::Error::reason)) {
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
    let error = ProxyError::new(Cause::Reset, format!("{name}: {address} {what}{hint}"));
    Failed { counted: is_counted(&failed.error, lease), ..Failed::new(Ending::Reset(reset), error) }
}

/// What HTTP/2 says of an error.
pub fn h2_error(error: &hyper::Error) -> Option<&h2::Error> {
    std::error::Error::source(error).and_then(|source| source.downcast_ref::<h2::Error>())
}

/// Whether an error is the loss of a connection that another call on it has told of. Ask once a try.
pub fn is_counted(error: &hyper::Error, lease: &Lease) -> bool {
    let one_stream_only = h2_error(error).is_some_and(h2::Error::is_reset);
    !one_stream_only && lease.loss().is_some_and(|loss| loss.weigh(Health::Failure) == Health::Neutral)
}
