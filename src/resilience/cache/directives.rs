//! `Cache-Control` (RFC 9111 §5.2): names are case-insensitive, arguments may be quoted, and what cannot be understood
//! is read in the way that reuses less.

use std::time::Duration;

use http::{
    HeaderMap, HeaderValue,
    header::{CACHE_CONTROL, PRAGMA},
};

/// The largest age that is counted: RFC 9111 §1.2.2.
const MAX_SECONDS: u64 = 1 << 31;

/// The directives of a response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResponseDirectives {
    pub no_store: bool,
    /// Also with field names: those would have to be left out, so the response is validated as a whole.
    pub no_cache: bool,
    /// Also with field names.
    pub private: bool,
    pub public: bool,
    pub must_revalidate: bool,
    pub proxy_revalidate: bool,
    pub must_understand: bool,
    pub max_age: Option<Duration>,
    pub s_maxage: Option<Duration>,
    pub stale_if_error: Option<Duration>,
    pub stale_while_revalidate: Option<Duration>,
}

impl ResponseDirectives {
    pub fn of(headers: &HeaderMap) -> Self {
        let mut found = Self::default();
        for_each(headers, |name, argument| match name {
            "no-store" => found.no_store = true,
            "no-cache" => found.no_cache = true,
            "private" => found.private = true,
            "public" => found.public = true,
            "must-revalidate" => found.must_revalidate = true,
            "proxy-revalidate" => found.proxy_revalidate = true,
            "must-understand" => found.must_understand = true,
            "max-age" => shorten(&mut found.max_age, argument),
            "s-maxage" => shorten(&mut found.s_maxage, argument),
            "stale-if-error" => shorten(&mut found.stale_if_error, argument),
            "stale-while-revalidate" => shorten(&mut found.stale_while_revalidate, argument),
            _ => {}
        });
        found
    }

    /// Whether the response may never be sent stale: RFC 9111 §4.2.4, and §5.2.2.10 for `s-maxage`.
    pub const fn forbids_stale(&self) -> bool {
        self.no_cache || self.must_revalidate || self.proxy_revalidate || self.s_maxage.is_some()
    }
}

/// The directives of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestDirectives {
    pub no_store: bool,
    pub no_cache: bool,
    pub only_if_cached: bool,
    pub max_age: Option<Duration>,
    pub min_fresh: Option<Duration>,
    /// Without an argument: any staleness.
    pub max_stale: Option<Duration>,
    pub stale_if_error: Option<Duration>,
}

impl RequestDirectives {
    pub fn of(headers: &HeaderMap) -> Self {
        let mut found = Self::default();
        if !headers.contains_key(CACHE_CONTROL) {
            // RFC 9111 §5.4, for clients older than HTTP/1.1.
            found.no_cache = headers.get_all(PRAGMA).iter().any(|value| {
                value.to_str().is_ok_and(|value| {
                    value.split(',').any(|item| item.trim().eq_ignore_ascii_case("no-cache"))
                })
            });
            return found;
        }
        for_each(headers, |name, argument| match name {
            "no-store" => found.no_store = true,
            "no-cache" => found.no_cache = true,
            "only-if-cached" => found.only_if_cached = true,
            "max-age" => shorten(&mut found.max_age, argument),
            "min-fresh" => {
                let wanted = argument.and_then(seconds).unwrap_or(Duration::from_secs(MAX_SECONDS));
                found.min_fresh = found.min_fresh.max(Some(wanted));
            }
            "max-stale" if argument.is_none() => {
                found.max_stale.get_or_insert(Duration::from_secs(MAX_SECONDS));
            }
            "max-stale" => shorten(&mut found.max_stale, argument),
            "stale-if-error" => shorten(&mut found.stale_if_error, argument),
            _ => {}
        });
        found
    }
}

/// Keeps the shorter of two durations. An argument that is not a number counts as 0 (RFC 9111 §4.2.1).
fn shorten(kept: &mut Option<Duration>, argument: Option<&str>) {
    let new = argument.and_then(seconds).unwrap_or_default();
    *kept = Some(kept.map_or(new, |old| old.min(new)));
}

/// `delta-seconds`: digits only; what does not fit is the largest value.
fn seconds(text: &str) -> Option<Duration> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some(Duration::from_secs(text.parse::<u64>().unwrap_or(MAX_SECONDS).min(MAX_SECONDS)))
}

/// Calls `read` for each directive: its name in lower case, and its argument without quotes.
fn for_each(headers: &HeaderMap, mut read: impl FnMut(&str, Option<&str>)) {
    for value in headers.get_all(CACHE_CONTROL) {
        for item in list_items(value) {
            let (name, argument) = match item.split_once('=') {
                Some((name, argument)) => (name, Some(argument)),
                None => (item, None),
            };
            // A space around `=` is invalid: the directive counts, its number does not.
            let argument = argument.map(|argument| match name.ends_with([' ', '\t']) {
                true => "",
                false => unquoted(argument),
            });
            read(&name.trim().to_ascii_lowercase(), argument);
        }
    }
}

fn unquoted(text: &str) -> &str {
    text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text)
}

/// The items of a list field, trimmed; commas inside of quotes do not separate. A field that is not text has none but one
/// that forbids: `no-store`.
fn list_items(value: &HeaderValue) -> impl Iterator<Item = &str> {
    let text = value.to_str().unwrap_or("no-store");
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest.take()?;
        let (mut quoted, mut escaped) = (false, false);
        let end = text.bytes().position(|byte| {
            match byte {
                _ if escaped => escaped = false,
                b'\\' if quoted => escaped = true,
                b'"' => quoted = !quoted,
                b',' if !quoted => return true,
                _ => {}
            }
            false
        });
        match end {
            Some(at) => {
                rest = Some(&text[at + 1..]);
                Some(text[..at].trim())
            }
            None => Some(text.trim()),
        }
    })
    .filter(|item| !item.is_empty())
}
