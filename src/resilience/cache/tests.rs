//! Tables by section of RFC 9111, RFC 5861 and RFC 9110, and the comparison with another implementation.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header::ETAG};
use http_cache_semantics::{BeforeRequest, CacheOptions, CachePolicy};
use proptest::prelude::*;

use super::{
    AuthorizationRule, CacheSettings,
    conditional::{allows_range, is_not_modified, make_conditional, update_head},
    directives::{RequestDirectives, ResponseDirectives},
    freshness::{Assessment, Reuse, Timing},
    range::{Part, select},
    storable::{NotStored, check_storable, invalidates, may_be_sent},
    vary::{self, Selection},
};

/// The time of the tests: Tue, 15 Nov 1994 12:45:26 GMT.
fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(784_903_526)
}

fn map(fields: &[(&str, &str)]) -> HeaderMap {
    let field = |(name, value): &(&str, &str)| {
        (HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap())
    };
    let mut map = HeaderMap::new();
    for (name, value) in fields.iter().map(field) {
        map.append(name, value);
    }
    map
}

fn settings() -> CacheSettings {
    CacheSettings { stale_if_error: crate::units::HumanDuration::from_secs(60), ..CacheSettings::default() }
}

fn timing(fields: &[(&str, &str)]) -> Timing {
    Timing::new(StatusCode::OK, &map(fields), start(), start())
}

/// What a request with these fields may do, so many seconds after the response came.
fn assess(response: &[(&str, &str)], request: &[(&str, &str)], after: u64) -> Assessment {
    let now = start() + Duration::from_secs(after);
    timing(response).assess(&RequestDirectives::of(&map(request)), &settings(), now)
}

fn cc(value: &str) -> Vec<(&str, &str)> {
    vec![("cache-control", value)]
}

#[test]
fn rfc9111_5_2_directives_are_read_in_any_case_and_in_the_way_that_reuses_less() {
    for (text, max_age) in [
        ("max-age=60", Some(60)),
        ("MAX-AGE=60", Some(60)),
        ("max-age=\"60\"", Some(60)),
        ("max-age='60'", Some(0)),
        ("max-age=60.5", Some(0)),
        ("max-age=-1", Some(0)),
        ("max-age", Some(0)),
        ("max-age= 60", Some(0)),
        ("max-age=60, max-age=10", Some(10)),
        ("max-age=10, max-age=60", Some(10)),
        ("ext=\"max-age=60\"", None),
        ("ext=\"a, max-age=60\"", None),
        ("max-age=99999999999999999999999", Some(1 << 31)),
    ] {
        let found = ResponseDirectives::of(&map(&cc(text))).max_age;
        assert_eq!(found.map(|age| age.as_secs()), max_age, "{text}");
    }
    for text in ["No-Store", "a,no-store", "no-store , b", "max-age=1;x,no-store"] {
        assert!(ResponseDirectives::of(&map(&cc(text))).no_store, "{text}");
    }
    let fields = ResponseDirectives::of(&map(&cc("no-cache=\"set-cookie\", private=\"x\"")));
    assert!(fields.no_cache && fields.private);
}

#[test]
fn rfc9111_4_2_1_lifetime() {
    let date = ("date", "Tue, 15 Nov 1994 12:45:26 GMT");
    for (fields, seconds) in [
        (cc("s-maxage=5, max-age=60"), 5),
        (vec![("expires", "Tue, 15 Nov 1994 12:46:26 GMT"), date], 60),
        (vec![("expires", "0"), date], 0),
        (vec![("expires", "Tue, 15 Nov 1994 12:46:26 GMT"), ("expires", "0"), date], 0),
        (vec![("expires", "Tue, 15 Nov 1994 12:46:26 GMT"), ("cache-control", "max-age=1"), date], 1),
        // §4.2.2: a tenth of the time since it was modified, at most an hour.
        (vec![("last-modified", "Tue, 15 Nov 1994 12:35:26 GMT"), date], 60),
        (vec![("last-modified", "Tue, 15 Nov 1983 12:45:26 GMT"), date], 3600),
        (vec![], 0),
    ] {
        assert_eq!(timing(&fields).lifetime().as_secs(), seconds, "{fields:?}");
    }
}

#[test]
fn rfc9111_4_2_3_age() {
    let age = |fields: &[(&str, &str)], delay: u64| {
        let received = start() + Duration::from_secs(delay);
        Timing::new(StatusCode::OK, &map(fields), start(), received)
            .age(received + Duration::from_secs(7))
            .as_secs()
    };
    assert_eq!(age(&[], 0), 7);
    assert_eq!(age(&[("age", "30")], 2), 39, "the response delay counts");
    assert_eq!(age(&[("age", "30, 90")], 0), 37);
    assert_eq!(age(&[("age", "-30")], 0), 7);
    assert_eq!(age(&[("date", "Tue, 15 Nov 1994 12:44:26 GMT")], 0), 67, "the apparent age");
    assert_eq!(age(&[("date", "Tue, 15 Nov 1994 12:46:26 GMT")], 0), 7, "a clock that is ahead");
}

#[test]
fn rfc9111_4_2_4_stale_responses_and_rfc5861() {
    use Reuse::{AcceptedStale, Fresh, Validate, WhileRevalidating};
    let none: &[(&str, &str)] = &[];
    let max_stale = &[("cache-control", "max-stale")][..];
    for (response, request, after, reuse, on_error) in [
        ("max-age=10", none, 9, Fresh, true),
        ("max-age=10", none, 10, Validate, true),
        ("max-age=10", none, 69, Validate, true),
        ("max-age=10", none, 70, Validate, false),
        ("max-age=10, stale-if-error=5", none, 14, Validate, true),
        ("max-age=10, stale-if-error=5", none, 15, Validate, false),
        ("max-age=10, stale-if-error=0", none, 10, Validate, false),
        ("max-age=10, must-revalidate", none, 11, Validate, false),
        ("max-age=10, proxy-revalidate", none, 11, Validate, false),
        ("s-maxage=10", none, 11, Validate, false),
        ("s-maxage=10", max_stale, 11, Validate, false),
        ("max-age=10, no-cache", none, 1, Validate, false),
        ("max-age=10, No-Cache", none, 1, Validate, false),
        ("max-age=10", max_stale, 11, AcceptedStale, true),
        ("max-age=10", &[("cache-control", "max-stale=1")][..], 12, Validate, true),
        ("max-age=10, stale-while-revalidate=5", none, 14, WhileRevalidating, true),
        ("max-age=10, stale-while-revalidate=5", none, 15, Validate, true),
        ("max-age=10", &[("cache-control", "no-cache")][..], 1, Validate, false),
        ("max-age=10", &[("pragma", "No-Cache")][..], 1, Validate, false),
        ("max-age=10", &[("cache-control", "max-age=5")][..], 6, Validate, true),
        ("max-age=10", &[("cache-control", "min-fresh=5")][..], 6, Validate, true),
    ] {
        let found = assess(&cc(response), request, after);
        assert_eq!((found.reuse, found.on_error), (reuse, on_error), "{response} {request:?} after {after}");
        assert_eq!(found.ttl < 0, after >= 10, "{response} after {after}");
    }
}

#[test]
fn rfc9111_3_what_may_be_stored() {
    let check = |request: &[(&str, &str)], status: u16, response: &[(&str, &str)], rule| {
        check_storable(&map(request), rule, StatusCode::from_u16(status).unwrap(), &map(response))
    };
    let events = ("content-type", "Text/Event-Stream; charset=utf-8");
    let fresh = ("cache-control", "max-age=60");
    let public = ("cache-control", "public, max-age=60");
    let token = ("authorization", "Bearer a");
    use AuthorizationRule::{Key, Refuse};
    for (request, status, response, rule, expected) in [
        (vec![], 200, vec![], Refuse, Ok(())),
        (vec![], 200, vec![fresh], Refuse, Ok(())),
        (vec![], 206, vec![fresh], Refuse, Err(NotStored::Kind)),
        (vec![], 503, vec![], Refuse, Err(NotStored::Status)),
        (vec![], 200, vec![fresh, events], Refuse, Err(NotStored::EventStream)),
        (vec![], 503, vec![fresh], Refuse, Ok(())),
        (vec![], 302, vec![], Refuse, Err(NotStored::Status)),
        (vec![], 200, vec![("cache-control", "NO-STORE")], Refuse, Err(NotStored::NoStore)),
        (vec![], 200, vec![("cache-control", "private, max-age=60")], Refuse, Err(NotStored::Private)),
        (vec![("cache-control", "no-store")], 200, vec![fresh], Refuse, Err(NotStored::NoStore)),
        (vec![], 200, vec![("cache-control", "must-understand, no-store, max-age=1")], Refuse, Ok(())),
        (vec![token], 200, vec![fresh], Refuse, Err(NotStored::Authorization)),
        (vec![token], 200, vec![public], Refuse, Ok(())),
        (vec![token], 200, vec![("cache-control", "s-maxage=1")], Refuse, Ok(())),
        (vec![token], 200, vec![("cache-control", "must-revalidate, max-age=1")], Refuse, Ok(())),
        (vec![token], 200, vec![fresh], Key, Ok(())),
        (vec![("cookie", "a=b")], 200, vec![fresh], Refuse, Err(NotStored::Cookie)),
        (vec![("cookie", "a=b")], 200, vec![public], Refuse, Ok(())),
        (vec![("cookie", "a=b")], 200, vec![fresh, ("vary", "Cookie")], Refuse, Ok(())),
        (vec![], 200, vec![fresh, ("set-cookie", "a=b")], Refuse, Err(NotStored::SetCookie)),
        (vec![], 200, vec![public, ("set-cookie", "a=b")], Refuse, Ok(())),
        (vec![], 200, vec![fresh, ("vary", "accept, *")], Refuse, Err(NotStored::Vary)),
    ] {
        assert_eq!(check(&request, status, &response, rule), expected, "{request:?} {status} {response:?}");
    }
    let plain = ResponseDirectives::of(&map(&[fresh]));
    assert!(may_be_sent(&plain, false, &map(&[]), Refuse));
    assert!(!may_be_sent(&plain, false, &map(&[token]), Refuse));
    assert!(!may_be_sent(&plain, false, &map(&[("cookie", "a=b")]), Refuse));
    assert!(may_be_sent(&plain, true, &map(&[("cookie", "a=b")]), Refuse));
}

#[test]
fn rfc9111_4_4_unsafe_methods_invalidate() {
    for (method, status, expected) in [
        ("POST", 200, true),
        ("PATCH", 204, true),
        ("DELETE", 302, true),
        ("M-SEARCH", 200, true),
        ("PUT", 500, false),
        ("POST", 404, false),
        ("GET", 200, false),
        ("OPTIONS", 200, false),
    ] {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        assert_eq!(
            invalidates(&method, StatusCode::from_u16(status).unwrap()),
            expected,
            "{method} {status}"
        );
    }
}

#[test]
fn rfc9111_4_1_vary() {
    let stored = map(&[("accept", "a,b"), ("foo", "1")]);
    let names = vary::names(&map(&[("vary", "Foo, ACCEPT"), ("vary", "foo")])).unwrap();
    assert_eq!(names.len(), 2);
    let selection = Selection::new(names, &stored);
    assert!(selection.matches(&map(&[("accept", "a , b"), ("foo", "1"), ("other", "2")])));
    assert!(selection.matches(&map(&[("accept", "a"), ("accept", "b"), ("foo", "1")])));
    assert!(!selection.matches(&map(&[("accept", "b,a"), ("foo", "1")])));
    assert!(!selection.matches(&map(&[("accept", "a,b")])), "an absent field is another value");
    let absent = Selection::new(vary::names(&map(&[("vary", "foo")])).unwrap(), &map(&[]));
    assert!(absent.matches(&map(&[])) && !absent.matches(&map(&[("foo", "")])));
    assert_eq!(vary::names(&map(&[("vary", "*")])), None);
}

#[test]
fn rfc9110_13_conditions() {
    let stored = map(&[("etag", "W/\"a\""), ("last-modified", "Tue, 15 Nov 1994 12:45:26 GMT")]);
    for (fields, expected) in [
        (vec![("if-none-match", "W/\"a\"")], true),
        (vec![("if-none-match", "\"a\"")], true),
        (vec![("if-none-match", "\"x\", \"a\" , \"y\"")], true),
        (vec![("if-none-match", "\"x,y\", \"a\"")], true),
        (vec![("if-none-match", "*")], true),
        (vec![("if-none-match", "\"b\"")], false),
        (vec![("if-modified-since", "Tue, 15 Nov 1994 12:45:26 GMT")], true),
        (vec![("if-modified-since", "Tue, 15 Nov 1994 12:45:25 GMT")], false),
        (vec![("if-none-match", "\"b\""), ("if-modified-since", "Tue, 15 Nov 1994 12:45:26 GMT")], false),
        (vec![], false),
    ] {
        assert_eq!(is_not_modified(&map(&fields), &stored), expected, "{fields:?}");
    }
    let strong = map(&[("etag", "\"a\"")]);
    assert!(allows_range(&map(&[("if-range", "\"a\"")]), &strong));
    assert!(!allows_range(&map(&[("if-range", "\"b\"")]), &strong));
    assert!(!allows_range(&map(&[("if-range", "W/\"a\"")]), &stored), "a weak tag never matches");
    let mut request = map(&[("if-none-match", "\"client\"")]);
    assert!(make_conditional(&mut request, &stored));
    assert_eq!(request["if-none-match"], "W/\"a\"");
    let updated = update_head(
        &map(&[("etag", "\"a\""), ("x", "1"), ("x", "2"), ("content-length", "5"), ("kept", "1")]),
        &map(&[("x", "3"), ("content-length", "0")]),
    );
    assert_eq!(updated.get_all("x").iter().count(), 1);
    assert_eq!(
        (&updated["content-length"], &updated["kept"], &updated[ETAG]),
        (&"5".parse().unwrap(), &"1".parse().unwrap(), &"\"a\"".parse().unwrap())
    );
}

#[test]
fn rfc9110_14_ranges() {
    for (field, part) in [
        ("bytes=0-1", Part::Bytes(0..2)),
        ("bytes=8-", Part::Bytes(8..10)),
        ("bytes=-3", Part::Bytes(7..10)),
        ("bytes=-30", Part::Bytes(0..10)),
        ("bytes=0-99999999999999999999", Part::Bytes(0..10)),
        ("bytes=10-", Part::Unsatisfiable),
        ("bytes=-0", Part::Unsatisfiable),
        ("bytes=5-4", Part::Whole),
        ("bytes=0-1,4-5", Part::Whole),
        ("lines=0-1", Part::Whole),
        ("bytes=+1-2", Part::Whole),
    ] {
        assert_eq!(select(Some(&HeaderValue::try_from(field).unwrap()), 10), part, "{field}");
    }
    assert_eq!(select(None, 10), Part::Whole);
}

fn directive() -> impl Strategy<Value = String> {
    prop_oneof![
        (0u64..100).prop_map(|seconds| format!("max-age={seconds}")),
        (0u64..100).prop_map(|seconds| format!("s-maxage={seconds}")),
        Just("public".to_owned()),
        Just("private".to_owned()),
        Just("no-store".to_owned()),
        Just("no-cache".to_owned()),
        Just("must-revalidate".to_owned()),
    ]
}

proptest! {
    /// What this cache sends without asking, `http-cache-semantics` would send too. It may send more: it reads
    /// directive names in one case only (so the names are in lower case here), of several `max-age` it takes another
    /// one, and it counts `immutable`. Statuses are those that both know: it stores no others, even with `max-age`.
    /// `proxy-revalidate` is left out: it takes such a response as never fresh, against RFC 9111 §5.2.2.8.
    #[test]
    fn nothing_is_reused_that_another_implementation_would_not_reuse(
        directives in prop::collection::vec(directive(), 0..4),
        age in 0u64..30,
        status in prop::sample::select(vec![200u16, 203, 301, 404, 410]),
        token: bool,
        after in 0u64..120,
    ) {
        let text = directives.join(", ");
        let mut repeated: Vec<&str> = directives.iter().filter_map(|one| one.split('=').next()).collect();
        repeated.sort_unstable();
        let before = repeated.len();
        repeated.dedup();
        prop_assume!(repeated.len() == before);
        let age = age.to_string();
        let mut fields = vec![("age", age.as_str()), ("date", "Tue, 15 Nov 1994 12:45:26 GMT")];
        if !text.is_empty() {
            fields.push(("cache-control", &text));
        }
        let request_fields = if token { vec![("authorization", "Bearer a")] } else { vec![] };
        let (request_head, response_head) = (map(&request_fields), map(&fields));
        let status = StatusCode::from_u16(status).unwrap();
        let now = start() + Duration::from_secs(after);
        let stored =
            check_storable(&request_head, AuthorizationRule::Refuse, status, &response_head).is_ok();
        let fresh = stored && Timing::new(status, &response_head, start(), start()).is_fresh(now);

        let mut request = Request::get("http://up/").body(()).unwrap();
        *request.headers_mut() = request_head;
        let mut response = Response::new(());
        *response.status_mut() = status;
        *response.headers_mut() = response_head;
        let policy =
            CachePolicy::new_options(&request, &response, start(), CacheOptions { shared: true, ..CacheOptions::default() });
        let other = policy.is_storable() && matches!(policy.before_request(&request, now), BeforeRequest::Fresh(_));
        prop_assert!(!fresh || other, "{text:?} {status} token {token} after {after}: {fresh} {other}");
    }
}
