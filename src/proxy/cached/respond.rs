//! Responses from the store: `Age`, `Cache-Status` (RFC 9211), conditions, ranges, HEAD.

use std::{fmt::Write as _, rc::Rc, sync::Arc, time::SystemTime};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode,
    header::{AGE, CONTENT_LENGTH, CONTENT_RANGE, RANGE, TRANSFER_ENCODING},
};

use super::ClientRequest;
use crate::{
    cache::{Entry, fill::Fill},
    proxy::{body::ResponseBody, origin::Origin},
    resilience::cache::{
        conditional::{allows_range, is_not_modified, not_modified_head},
        range::{self, Part},
    },
    telemetry::record::CacheResult,
};

const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// Why a request was forwarded.
#[derive(Clone, Copy, Debug)]
pub struct Forwarded {
    /// `fwd`, of RFC 9211 §2.2.
    pub reason: &'static str,
    /// The status that came.
    pub status: Option<u16>,
    pub is_stored: bool,
}

impl Forwarded {
    pub const fn new(reason: &'static str) -> Self {
        Self { reason, status: None, is_stored: false }
    }
}

/// One member of `Cache-Status`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Note {
    pub hit: bool,
    pub forwarded: Option<Forwarded>,
    pub ttl: Option<i64>,
    /// It shared the fetch of another request.
    pub is_collapsed: bool,
    pub detail: Option<&'static str>,
}

impl Note {
    /// Of a request that ended in an error of the proxy's own.
    pub fn of_error(result: CacheResult) -> Self {
        let reason = if result == CacheResult::Bypass { "bypass" } else { "miss" };
        Self { forwarded: Some(Forwarded::new(reason)), ..Self::default() }
    }

    /// Appends this cache's member: the last one is nearest to the client.
    pub fn append(&self, headers: &mut HeaderMap, deployment: &str) {
        let mut member = deployment.to_owned();
        if self.hit {
            member.push_str("; hit");
        }
        if let Some(Forwarded { reason, status, is_stored }) = self.forwarded {
            let _ = write!(member, "; fwd={reason}");
            if let Some(status) = status {
                let _ = write!(member, "; fwd-status={status}");
            }
            if is_stored {
                member.push_str("; stored");
            }
        }
        if let Some(ttl) = self.ttl {
            let _ = write!(member, "; ttl={ttl}");
        }
        if self.is_collapsed {
            member.push_str("; collapsed");
        }
        if let Some(detail) = self.detail {
            let _ = write!(member, "; detail={detail}");
        }
        if let Ok(member) = HeaderValue::try_from(member) {
            headers.append(CACHE_STATUS, member);
        }
    }
}

/// The response to a client from what is stored.
pub fn from_entry(
    entry: &Entry,
    client_request: &ClientRequest,
    note: &Note,
    deployment: &str,
) -> Response<ResponseBody> {
    let (mut status, mut body) = (entry.status, entry.body.clone());
    let (mut headers, is_whole) =
        if entry.status == StatusCode::OK && is_not_modified(&client_request.headers, &entry.headers) {
            status = StatusCode::NOT_MODIFIED;
            (not_modified_head(&entry.headers), false)
        } else {
            (entry.headers.clone(), true)
        };
    if is_whole
        && entry.status == StatusCode::OK
        && client_request.method == Method::GET
        && client_request.headers.contains_key(RANGE)
        && allows_range(&client_request.headers, &entry.headers)
    {
        let length = body.len();
        match range::select(client_request.headers.get(RANGE), length) {
            Part::Whole => {}
            Part::Bytes(range) => {
                status = StatusCode::PARTIAL_CONTENT;
                let last = range.end.saturating_sub(1);
                insert(&mut headers, CONTENT_RANGE, format!("bytes {}-{last}/{length}", range.start));
                body = body.slice(range);
            }
            Part::Unsatisfiable => {
                status = StatusCode::RANGE_NOT_SATISFIABLE;
                insert(&mut headers, CONTENT_RANGE, format!("bytes */{length}"));
                body.clear();
            }
        }
    }
    let has_body = is_whole && !matches!(entry.status, StatusCode::NO_CONTENT);
    if has_body {
        headers.insert(CONTENT_LENGTH, body.len().into());
    }
    let body = match client_request.method {
        Method::HEAD => ResponseBody::Empty,
        _ if !has_body || body.is_empty() => ResponseBody::Empty,
        _ => ResponseBody::whole(body),
    };
    finish(headers, status, body, entry, (client_request, note, deployment))
}

/// The response to a client whose body still arrives.
pub fn from_fill(
    entry: &Entry,
    fill: &Arc<Fill>,
    client_request: &ClientRequest,
    note: &Note,
    origin: &Origin<'_>,
) -> Response<ResponseBody> {
    let body =
        ResponseBody::shared(fill.reader(), content_length(&entry.headers), Rc::clone(origin.progress));
    let context = (client_request, note, origin.view.proxy_names.deployment.as_str());
    finish(entry.headers.clone(), entry.status, body, entry, context)
}

fn finish(
    mut headers: HeaderMap,
    status: StatusCode,
    body: ResponseBody,
    entry: &Entry,
    (client_request, note, deployment): (&ClientRequest, &Note, &str),
) -> Response<ResponseBody> {
    headers.remove(TRANSFER_ENCODING);
    headers.insert(AGE, entry.timing.age(SystemTime::now()).as_secs().into());
    note.append(&mut headers, deployment);
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    *response.version_mut() = client_request.version;
    response
}

/// The length that a head announces.
pub fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()).and_then(|length| length.parse().ok())
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: String) {
    if let Ok(value) = HeaderValue::try_from(value) {
        headers.insert(name, value);
    }
}
