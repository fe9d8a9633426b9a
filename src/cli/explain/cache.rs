//! Whether a request would be answered from the cache. What is stored is not known here: `outrigger cache ls` lists it.

use http::header::{AUTHORIZATION, COOKIE};

use super::request::ExplainedRequest;
use crate::{
    config::Policy,
    resilience::cache::{
        AuthorizationRule, CacheSettings,
        directives::RequestDirectives,
        storable::{check_request, is_safe},
    },
};

/// What the cache of a route does with a request; `None` without a cache.
pub fn describe(policy: &Policy, target: &ExplainedRequest) -> Option<String> {
    let settings = policy.cache.as_ref()?;
    if let Err(bypass) = check_request(&target.method, &target.headers, false, target.is_grpc()) {
        let invalidates =
            if is_safe(&target.method) { "" } else { "; a success removes what is stored for the URL" };
        return Some(format!("forwarded: {}{invalidates}", bypass.reason()));
    }
    let directives = RequestDirectives::of(&target.headers);
    let mut text = if directives.only_if_cached {
        "answered from what is stored, else 504 (only-if-cached)".to_owned()
    } else if directives.no_cache {
        "forwarded: the request says no-cache; the response replaces what is stored".to_owned()
    } else {
        "answered from what is stored while that is fresh, else forwarded".to_owned()
    };
    if directives.no_store {
        text.push_str(" and not stored (no-store)");
    }
    if !directives.no_cache && !settings.stale_if_error.is_zero() {
        text.push_str(&format!("; stale for {} if that fails", settings.stale_if_error));
    }
    for limit in credentials(settings, target) {
        text.push_str("; ");
        text.push_str(limit);
    }
    Some(text)
}

/// What the credentials of a request require of the response.
fn credentials(settings: &CacheSettings, target: &ExplainedRequest) -> impl Iterator<Item = &'static str> {
    let has = |name| target.headers.contains_key(name);
    let authorization = has(&AUTHORIZATION).then_some(match settings.authorization {
        AuthorizationRule::Refuse => {
            "with Authorization only responses that say public, s-maxage or must-revalidate"
        }
        AuthorizationRule::Key => "only responses to the same Authorization",
    });
    let cookie = has(&COOKIE).then_some("with Cookie only responses that say public or vary by Cookie");
    authorization.into_iter().chain(cookie)
}
