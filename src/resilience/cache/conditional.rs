//! Conditional requests: those that clients send, answered from the store (RFC 9110 §13), and those that validate a
//! stored response (RFC 9111 §4.3).

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{
        CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, DATE, ETAG, IF_MATCH,
        IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, LAST_MODIFIED, TRANSFER_ENCODING,
    },
};

use super::freshness::date;

/// Whether the request has a condition that the store can evaluate.
pub fn has_condition(request: &HeaderMap) -> bool {
    request.contains_key(IF_NONE_MATCH) || request.contains_key(IF_MODIFIED_SINCE)
}

/// Whether the request has a condition that only the service can evaluate.
pub fn has_precondition(request: &HeaderMap) -> bool {
    request.contains_key(IF_MATCH) || request.contains_key(IF_UNMODIFIED_SINCE)
}

/// Whether the client has the stored response already: 304.
pub fn is_not_modified(request: &HeaderMap, stored: &HeaderMap) -> bool {
    if request.contains_key(IF_NONE_MATCH) {
        let Some(tag) = stored.get(ETAG) else { return false };
        return request.get_all(IF_NONE_MATCH).iter().any(|list| list_has(list, tag));
    }
    let Some(since) = date(request, &IF_MODIFIED_SINCE) else { return false };
    let modified = date(stored, &LAST_MODIFIED).or_else(|| date(stored, &DATE));
    modified.is_some_and(|modified| modified <= since)
}

/// Whether `If-Range` allows a part of the stored response: absent, or a strong match (RFC 9110 §13.1.5).
pub fn allows_range(request: &HeaderMap, stored: &HeaderMap) -> bool {
    let Some(condition) = request.get(IF_RANGE) else { return true };
    if condition.as_bytes().starts_with(b"\"") {
        return stored.get(ETAG).is_some_and(|tag| tag.as_bytes() == condition.as_bytes());
    }
    // A date matches exactly; a weak tag never.
    stored.get(LAST_MODIFIED).is_some_and(|modified| modified.as_bytes() == condition.as_bytes())
}

/// Makes a request conditional on the stored response; false where that has no validator.
pub fn make_conditional(request: &mut HeaderMap, stored: &HeaderMap) -> bool {
    for name in [IF_NONE_MATCH, IF_MODIFIED_SINCE] {
        request.remove(name);
    }
    let mut has_validator = false;
    for (from, to) in [(ETAG, IF_NONE_MATCH), (LAST_MODIFIED, IF_MODIFIED_SINCE)] {
        if let Some(validator) = stored.get(from) {
            request.insert(to, validator.clone());
            has_validator = true;
        }
    }
    has_validator
}

/// The stored head after a 304 (RFC 9111 §3.2): new values replace old ones, what describes the body stays.
pub fn update_head(stored: &HeaderMap, not_modified: &HeaderMap) -> HeaderMap {
    let mut updated = stored.clone();
    let kept = |name: &HeaderName| {
        [CONTENT_LENGTH, CONTENT_ENCODING, CONTENT_TYPE, CONTENT_RANGE, TRANSFER_ENCODING].contains(name)
    };
    for name in not_modified.keys().filter(|name| !kept(name)) {
        updated.remove(name);
        for value in not_modified.get_all(name) {
            updated.append(name.clone(), value.clone());
        }
    }
    updated
}

/// The fields of a stored response that its 304 carries (RFC 9110 §15.4.5): all but those that describe the body.
pub fn not_modified_head(stored: &HeaderMap) -> HeaderMap {
    let mut head = stored.clone();
    for name in [CONTENT_LENGTH, CONTENT_ENCODING, CONTENT_TYPE, CONTENT_RANGE, LAST_MODIFIED] {
        if name != LAST_MODIFIED || stored.contains_key(ETAG) {
            head.remove(name);
        }
    }
    head
}

/// Whether a list of entity tags has this one, by weak comparison (RFC 9110 §8.8.3.2), or is `*`.
fn list_has(list: &HeaderValue, tag: &HeaderValue) -> bool {
    let (list, tag) = (list.as_bytes().trim_ascii(), opaque(tag.as_bytes()));
    if list == b"*" {
        return true;
    }
    let mut rest = list;
    while !rest.is_empty() {
        let item = rest.trim_ascii_start();
        let start = item.iter().position(|byte| *byte == b'"').map_or(item.len(), |at| at + 1);
        let end = item[start..].iter().position(|byte| *byte == b'"').map_or(item.len(), |at| start + at + 1);
        let comma = item[end..].iter().position(|byte| *byte == b',').map_or(item.len(), |at| end + at);
        if opaque(item[..comma].trim_ascii()) == tag {
            return true;
        }
        rest = item.get(comma + 1..).unwrap_or_default();
    }
    false
}

/// A tag without its weakness flag.
fn opaque(tag: &[u8]) -> &[u8] {
    tag.strip_prefix(b"W/").unwrap_or(tag)
}
