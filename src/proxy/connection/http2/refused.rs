//! Malformed HTTP/2 requests: counted and logged as on HTTP/1.1, whether `h2` or the proxy found the fault. A message
//! that is malformed by RFC 9113 §8.1.1 resets its stream; a target that is invalid by RFC 9110 gets a response.

use std::{future::ready, rc::Rc};

use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{Method, Request, StatusCode, Uri, Version, header::CONTENT_LENGTH};
use tokio::{task::spawn_local, time::Instant};

use super::{Session, stream::Stream};
use crate::{
    field_set::FieldSet,
    http1::{
        head::HeadError,
        target::{RequestTarget, loggable_target},
    },
    http2::{fields, pending_requests::RejectedRequest},
    proxy::{body::ClientBody, error::ProxyError, progress::Progress, request_handler},
};

/// A request that `h2` accepted and the proxy refuses.
pub(super) struct MalformedRequest {
    request: Request<RecvStream>,
    error: ProxyError,
    /// The client gets a response, not a stream reset.
    answered: bool,
}

impl Session {
    /// Checks what `h2` does not check. `path`: the path as received, where `h2` was given a placeholder for it.
    pub(super) fn check(
        &self,
        mut request: Request<RecvStream>,
        path: Option<Rc<[u8]>>,
    ) -> Result<Request<RecvStream>, Box<MalformedRequest>> {
        if let Some(path) = path
            && let Err(why) = restore_path(&mut request, &path)
        {
            let error = explain(why, Some(&loggable_target(&path)));
            return Err(Box::new(MalformedRequest { request, error, answered: true }));
        }
        let why = if !fields::are_valid(request.headers()) {
            "a field value begins or ends with white space (RFC 9113 §8.2.1)"
        } else if *request.method() == Method::CONNECT && has_body_length(&request) {
            "a CONNECT request has a Content-Length"
        } else {
            return Ok(request);
        };
        let target = request.uri().path_and_query().map(|path| loggable_target(path.as_str().as_bytes()));
        let error = explain(why, target.as_deref());
        Err(Box::new(MalformedRequest { request, error, answered: false }))
    }

    /// Refuses a request that `h2` accepted.
    pub(super) fn refuse(self: &Rc<Self>, refused: MalformedRequest, mut respond: SendResponse<Bytes>) {
        let MalformedRequest { request, error, answered } = refused;
        let progress = Rc::new(Progress::new(Instant::now()));
        let mut request = request.map(|_| ClientBody::default());
        let present = FieldSet::of(request.headers());
        let response = request_handler::refuse(&self.connection, &mut request, present, &error, &progress);
        if !answered {
            return respond.send_reset(Reason::PROTOCOL_ERROR);
        }
        let stream = Stream::new(self, respond, progress);
        spawn_local(stream.serve(ready(response)));
    }

    /// Counts and logs the requests that `h2` refused.
    pub(super) fn report_refused(&self) {
        for RejectedRequest { details: note, is_too_large: too_large } in
            self.wire.pending_requests.take_rejected()
        {
            let note = note.unwrap_or_default();
            let target = note.request_line.target.as_deref();
            let error = match note.fault {
                Some(fault) => explain(fault, target),
                None if too_large => explain("the head is too large", target)
                    .with_status(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
                None => explain("malformed message (RFC 9113 §8.1.1)", target),
            };
            let mut request = Request::new(ClientBody::default());
            // Shown in logs; no method has this name.
            let unknown = || Method::from_bytes(b"-").unwrap_or_default();
            *request.method_mut() = note.request_line.method.unwrap_or_else(unknown);
            *request.version_mut() = Version::HTTP_2;
            let progress = Progress::new(Instant::now());
            // `h2` has already reset the stream.
            drop(request_handler::refuse(
                &self.connection,
                &mut request,
                FieldSet::default(),
                &error,
                &progress,
            ));
        }
    }
}

fn explain(why: impl std::fmt::Display, target: Option<&str>) -> ProxyError {
    let target = target.map_or_else(String::new, |target| format!(" (target `{target}`)"));
    ProxyError::malformed(format!("the request cannot be read: {why}{target}"))
}

/// CONNECT has no body (RFC 9113 §8.5).
fn has_body_length(request: &Request<RecvStream>) -> bool {
    request.headers().get(CONTENT_LENGTH).is_some_and(|length| length != "0")
}

/// Replaces the placeholder by the path as received, parsed as on HTTP/1.1.
fn restore_path(request: &mut Request<RecvStream>, path: &[u8]) -> Result<(), HeadError> {
    let target = RequestTarget::parse(request.method(), Bytes::copy_from_slice(path), path)?;
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query = target.uri.into_parts().path_and_query;
    *request.uri_mut() = Uri::from_parts(parts).map_err(|_| HeadError::Target)?;
    if let Some(raw) = target.raw {
        request.extensions_mut().insert(raw);
    }
    Ok(())
}
