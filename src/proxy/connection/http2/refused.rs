//! Requests by HTTP/2 that are malformed: counted and logged as on HTTP/1.1, whatever part found the fault. What RFC 9113 §8.1.1 calls a
//! malformed message ends its stream; a target that is wrong by RFC 9110 is answered.

use std::{future::ready, rc::Rc};

use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{Method, Request, StatusCode, Uri, Version, header::CONTENT_LENGTH};
use tokio::{task::spawn_local, time::Instant};

use super::{Session, stream::Stream};
use crate::{
    http1::{
        head::HeadError,
        target::{Target, shown},
    },
    http2::{arrivals::RefusedRequest, fields},
    present::Present,
    proxy::{body::CallerBody, call, error::ProxyError, progress::Progress},
};

/// What `h2` has handed over and is refused here.
pub(super) struct Malformed {
    request: Request<RecvStream>,
    error: ProxyError,
    /// The client gets a response, and no error of its stream.
    answered: bool,
}

impl Session {
    /// Checks what `h2` does not look at. `path`: as it came, where `h2` has had a stand-in for it.
    pub(super) fn checked(
        &self,
        mut request: Request<RecvStream>,
        path: Option<Rc<[u8]>>,
    ) -> Result<Request<RecvStream>, Box<Malformed>> {
        if let Some(path) = path
            && let Err(why) = put_path(&mut request, &path)
        {
            let error = explain(why, Some(&shown(&path)));
            return Err(Box::new(Malformed { request, error, answered: true }));
        }
        let why = if !fields::are_valid(request.headers()) {
            "a field value begins or ends with a blank"
        } else if *request.method() == Method::CONNECT && has_length(&request) {
            "a CONNECT request has a Content-Length"
        } else {
            return Ok(request);
        };
        let target = request.uri().path_and_query().map(|path| shown(path.as_str().as_bytes()));
        let error = explain(why, target.as_deref());
        Err(Box::new(Malformed { request, error, answered: false }))
    }

    /// Refuses a request that `h2` has handed over.
    pub(super) fn refuse(self: &Rc<Self>, refused: Malformed, mut respond: SendResponse<Bytes>) {
        let Malformed { request, error, answered } = refused;
        let progress = Rc::new(Progress::new(Instant::now()));
        let mut request = request.map(|_| CallerBody::default());
        let present = Present::of(request.headers());
        let response = call::refuse(&self.connection, &mut request, present, &error, &progress);
        if !answered {
            return respond.send_reset(Reason::PROTOCOL_ERROR);
        }
        let stream = Stream::new(self, respond, progress);
        spawn_local(stream.carry(ready(response)));
    }

    /// Counts and logs the requests that `h2` has refused.
    pub(super) fn report_refused(&self) {
        for RefusedRequest { note, too_large } in self.wire.arrivals.take_refused() {
            let note = note.unwrap_or_default();
            let target = note.line.target.as_deref();
            let error = match note.fault {
                Some(fault) => explain(fault, target),
                None if too_large => explain("its head is too large", target)
                    .with_status(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
                None => explain("it is malformed (RFC 9113 §8.1.1)", target),
            };
            let mut request = Request::new(CallerBody::default());
            // A token that no method has, in logs.
            let unknown = || Method::from_bytes(b"-").unwrap_or_default();
            *request.method_mut() = note.line.method.unwrap_or_else(unknown);
            *request.version_mut() = Version::HTTP_2;
            let progress = Progress::new(Instant::now());
            // `h2` has already reset the stream.
            drop(call::refuse(&self.connection, &mut request, Present::default(), &error, &progress));
        }
    }
}

fn explain(why: impl std::fmt::Display, target: Option<&str>) -> ProxyError {
    let target = target.map_or_else(String::new, |target| format!(" (target `{target}`)"));
    ProxyError::malformed(format!("the request cannot be read: {why}{target}"))
}

/// There is no body to CONNECT (RFC 9113 §8.5).
fn has_length(request: &Request<RecvStream>) -> bool {
    request.headers().get(CONTENT_LENGTH).is_some_and(|length| length != "0")
}

/// Gives a request the path that it came with, as HTTP/1.1 has it.
fn put_path(request: &mut Request<RecvStream>, path: &[u8]) -> Result<(), HeadError> {
    let target = Target::parse(request.method(), Bytes::copy_from_slice(path), path)?;
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query = target.uri.into_parts().path_and_query;
    *request.uri_mut() = Uri::from_parts(parts).map_err(|_| HeadError::Target)?;
    if let Some(raw) = target.raw {
        request.extensions_mut().insert(raw);
    }
    Ok(())
}
