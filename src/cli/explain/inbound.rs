//! `explain --inbound`: authorization of the request.

use super::{explanation::Explanation, request::ExplainedRequest};
use crate::{
    authorization::{
        AllowList, AuthorizationRequest, EndUserToken, PathPattern, RequestedOperation, check_unambiguous,
    },
    config::LoadedConfig,
    url_path::normalise,
};

/// Adds the allow entry that matches the given peer, or without a peer the identities that each entry allows.
pub(super) fn authorization(verdict: &mut Explanation, loaded: &LoadedConfig, target: &ExplainedRequest) {
    let inbound = &loaded.config.inbound;
    let rules = AllowList::new(&inbound.allow);
    let path = target.path.path();
    let excepts = inbound.jwt.as_ref().is_some_and(|jwt| !jwt.except.is_empty());
    if (rules.uses_paths() || excepts)
        && let Err(ambiguous) = check_unambiguous(path)
    {
        verdict.fact("refused", format!("malformed, 400: {ambiguous}"), None);
        return;
    }
    let place = |entry: usize| loaded.allow_origin(entry).and_then(|origin| loaded.sources.position(origin));
    let what = RequestedOperation::Http { method: &target.method, path };
    if rules.is_empty() {
        verdict.fact("allow", "no entry: every client that passes mtls".to_owned(), None);
    } else if target.peer.is_some() {
        match rules.decide(&AuthorizationRequest {
            peer: target.peer.as_ref(),
            operation: what,
            token: EndUserToken::Unverified,
        }) {
            Ok(Some(at)) => {
                let claims = claims(&inbound.allow[at].claims);
                verdict.fact("allow", format!("entry {}{claims}", at + 1), place(at));
            }
            Ok(None) => {}
            Err(refusal) => verdict.fact("refused", format!("not_allowed, 403: {refusal}"), None),
        }
    } else {
        let mut refused = true;
        for (at, (entry, allow)) in rules.entries().iter().zip(&inbound.allow).enumerate() {
            if entry.allows_operation(what) {
                refused = false;
                let identities = allow.identity.join(", ");
                let claims = claims(&allow.claims);
                verdict.fact("allow", format!("entry {}: {identities}{claims}", at + 1), place(at));
            }
        }
        if refused {
            verdict.fact("refused", "not_allowed, 403: no entry has this method and path".to_owned(), None);
        } else {
            verdict.note("use --peer ID to see the result for one client".to_owned());
        }
    }
    if let Some(jwt) = &inbound.jwt {
        let normal = normalise(path);
        let free = jwt.except.iter().any(|pattern| PathPattern::new(pattern).matches(&normal));
        let required = if free {
            "none: `except` lists this path".to_owned()
        } else {
            format!("issued by {}, for {}", jwt.issuer, jwt.audiences.join(" or "))
        };
        verdict.fact("token", required, None);
    }
}

fn claims(claims: &std::collections::BTreeMap<String, String>) -> String {
    let all: Vec<String> = claims.iter().map(|(name, value)| format!("{name} = {value:?}")).collect();
    if all.is_empty() { String::new() } else { format!(", with a token that has {}", all.join(" and ")) }
}
