use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use proptest::prelude::*;
use tokio::io::duplex;

use super::{
    super::{header_filter::HeaderFilter, wire_state::WireState},
    *,
};

type Fields = Vec<(String, Vec<u8>)>;

fn map(fields: &Fields) -> HeaderMap {
    let pair = |(name, value): &(String, Vec<u8>)| {
        Some((HeaderName::from_lowercase(name.as_bytes()).ok()?, HeaderValue::from_bytes(value).ok()?))
    };
    let mut map = HeaderMap::new();
    for (name, value) in fields.iter().filter_map(pair) {
        map.append(name, value);
    }
    map
}

fn a_request() -> impl Strategy<Value = Fields> {
    let name = prop_oneof!["x-[a-d]", "accept", "cookie", "user-agent", "x-[a-z]{1,60}"];
    let value = prop_oneof![
        "[ -~]{0,12}".prop_map(String::into_bytes),
        "v[0-3]".prop_map(String::into_bytes),
        prop::collection::vec(0x80_u8.., 0..20),
        "[a-z]{500,3000}".prop_map(String::into_bytes),
    ];
    prop::collection::vec((name, value), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a client's encoder does with its table, all fields arrive as they were sent.
    #[test]
    fn well_formed_requests_are_not_changed(
        requests in prop::collection::vec(a_request(), 1..25),
        piece in 20_usize..5000,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let expected: Vec<HeaderMap> = requests.iter().map(map).collect();
        let got = runtime.block_on(async {
            let (client, server) = duplex(piece);
            let (sender, connection) = h2::client::handshake(client).await.unwrap();
            let client_task = async {
                let mut sender = sender;
                for fields in &expected {
                    let mut request = Request::builder().uri("http://a/").body(()).unwrap();
                    *request.headers_mut() = fields.clone();
                    sender = sender.ready().await.unwrap();
                    let (response, _) = sender.send_request(request, true).unwrap();
                    response.await.unwrap();
                }
            };
            let server_task = async {
                let mut server = h2::server::handshake::<_>(HeaderFilter::for_client(server, &WireState::server())).await.unwrap();
                let mut got = Vec::new();
                while let Some(Ok((request, mut respond))) = server.accept().await {
                    got.push(request.headers().clone());
                    let _: h2::SendStream<Bytes> = respond.send_response(Response::new(()), true).unwrap();
                }
                got
            };
            let client_task = async {
                tokio::select! {
                    () = client_task => {}
                    _ = connection => {}
                }
            };
            tokio::join!(client_task, server_task).1
        });
        prop_assert_eq!(got, expected);
    }

    /// No input panics, and a rewritten block is well-formed.
    #[test]
    fn any_bytes_are_checked(
        blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..20),
        responses: bool,
    ) {
        let kind = if responses { BlockKind::Response } else { BlockKind::Request };
        let (mut checker, mut second) = (BlockChecker::default(), BlockChecker::default());
        for block in blocks {
            let Some(checked) = checker.check(&block, kind) else { return Ok(()) };
            let rewritten = checked.replacement.as_deref().unwrap_or(&block);
            let again = second.check(rewritten, kind).expect("HPACK");
            prop_assert_eq!(again.replacement.is_some(), again.fault.is_some(), "nothing is left to be replaced");
            // The field that makes a response malformed is for `h2` to reject.
            prop_assert_eq!(again.fault.is_some(), checked.fault.is_some() && !responses);
            checker.request_line(&block);
            prop_assert_eq!((checker.size, checker.entries.len()), (second.size, second.entries.len()));
        }
    }
}
