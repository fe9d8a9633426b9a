//! The head of a response as it is written, and how its body is sent.

use http::{HeaderMap, HeaderValue, StatusCode, Uri};

use super::*;
use crate::http1::head::ConnectionOptions;

fn request_info(method: Method, version: Version, fields: HeaderMap) -> RequestInfo {
    let present = FieldSet::of(&fields);
    let (target, connection) = (Uri::from_static("/"), ConnectionOptions::default());
    let (raw_target, spelling) = (None, None);
    RequestInfo::of(&RequestHead {
        method,
        target,
        raw_target,
        version,
        fields,
        present,
        connection,
        spelling,
    })
}

/// A head as written, and how its body is sent.
fn written(
    status: u16,
    length: Option<&'static str>,
    body: ResponseBody,
    request_info: &RequestInfo,
) -> (String, ResponsePlan) {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    if let Some(length) = length {
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static(length));
    }
    let mut out = Vec::new();
    let plan = write_head(&mut out, &mut response, request_info, true);
    (String::from_utf8(out).unwrap(), plan)
}

#[test]
fn content_length_is_sent_where_it_is_known_and_allowed() {
    let (get, head) = (Method::GET, Method::HEAD);
    let body = || ResponseBody::whole("four");
    for (method, status, declared, body, length, bodiless) in [
        (&get, 200, None, body(), Some("4"), false),
        (&get, 200, Some("4"), body(), Some("4"), false),
        (&get, 200, Some("7"), ResponseBody::Empty, Some("0"), false),
        (&get, 200, None, ResponseBody::Empty, Some("0"), false),
        (&get, 204, Some("0"), ResponseBody::Empty, None, true),
        (&get, 304, Some("9"), ResponseBody::Empty, Some("9"), true),
        (&head, 200, Some("9"), ResponseBody::Empty, Some("9"), true),
        (&head, 200, Some("5 GET /x"), ResponseBody::Empty, None, true),
        (&head, 200, Some("5, 5"), ResponseBody::Empty, None, true),
        (&get, 304, Some("+5"), ResponseBody::Empty, None, true),
        (&head, 200, None, body(), Some("4"), true),
        (&Method::CONNECT, 200, None, ResponseBody::Empty, None, true),
        (&get, 101, None, ResponseBody::Empty, None, true),
    ] {
        let request_info = request_info(method.clone(), Version::HTTP_11, HeaderMap::new());
        let (text, plan) = written(status, declared, body, &request_info);
        let found: Vec<_> = text.split("content-length: ").skip(1).map(|rest| &rest[..1]).collect();
        assert_eq!(
            (found, plan.bodiless),
            (length.into_iter().collect(), bodiless),
            "{method} {status}: {text}"
        );
        assert!(!text.contains("transfer-encoding"), "{text}");
    }
}
