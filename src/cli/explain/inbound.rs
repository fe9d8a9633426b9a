//! Who may make an inbound call, and what it must show.

use super::{target::Target, verdict::Verdict};
use crate::{
    authorization::{Asked, PathPattern, Rules, Token, What, unambiguous},
    config::Loaded,
    url_path::normalise,
};

/// Tells which allow entry lets the call in: for the peer that was named, else for whom each one does.
pub(super) fn authorization(verdict: &mut Verdict, loaded: &Loaded, target: &Target) {
    let inbound = &loaded.config.inbound;
    let rules = Rules::new(&inbound.allow);
    let path = target.path.path();
    let excepts = inbound.jwt.as_ref().is_some_and(|jwt| !jwt.except.is_empty());
    if (rules.look_at_paths() || excepts)
        && let Err(ambiguous) = unambiguous(path)
    {
        verdict.fact("refused", format!("malformed, 400: {ambiguous}"), None);
        return;
    }
    let place = |entry: usize| loaded.allow_origin(entry).and_then(|origin| loaded.sources.place(origin));
    let what = What::Call { method: &target.method, path };
    if rules.is_empty() {
        verdict.fact("allow", "no entry: every caller that gets in".to_owned(), None);
    } else if target.peer.is_some() {
        match rules.decide(&Asked { peer: target.peer.as_ref(), what, token: Token::Unread }) {
            Ok(Some(at)) => {
                let claims = claims(&inbound.allow[at].claims);
                verdict.fact("allow", format!("entry {}{claims}", at + 1), place(at));
            }
            Ok(None) => {}
            Err(refusal) => verdict.fact("refused", format!("not_allowed, 403: {refusal}"), None),
        }
    } else {
        let mut none = true;
        for (at, (entry, allow)) in rules.entries().iter().zip(&inbound.allow).enumerate() {
            if entry.takes(what) {
                none = false;
                let who = allow.identity.join(", ");
                let claims = claims(&allow.claims);
                verdict.fact("allow", format!("entry {}: {who}{claims}", at + 1), place(at));
            }
        }
        if none {
            verdict.fact("refused", "not_allowed, 403: no entry has this method and path".to_owned(), None);
        } else {
            verdict.note("--peer ID tells what a certain caller gets".to_owned());
        }
    }
    if let Some(jwt) = &inbound.jwt {
        let normal = normalise(path);
        let free = jwt.except.iter().any(|pattern| PathPattern::new(pattern).matches(&normal));
        let asked = if free {
            "none: `except` names this path".to_owned()
        } else {
            format!("of {}, for {}", jwt.issuer, jwt.audiences.join(" or "))
        };
        verdict.fact("token", asked, None);
    }
}

fn claims(claims: &std::collections::BTreeMap<String, String>) -> String {
    let all: Vec<String> = claims.iter().map(|(name, value)| format!("{name} = {value:?}")).collect();
    if all.is_empty() { String::new() } else { format!(", with a token that has {}", all.join(" and ")) }
}
