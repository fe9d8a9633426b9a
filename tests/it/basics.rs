//! The first steps: it starts, says where, carries a call each way, and ends.

use crate::support::{Proxy, RawClient, Upstream, text};

#[test]
fn carries_a_call_out_and_in() {
    let upstream =
        Upstream::http1(|request| async move { text(format!("{} {}", request.method(), request.uri())) });
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{0}\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{0}\"]\n",
        upstream.address()
    ));
    for listener in [proxy.outbound(), proxy.inbound()] {
        let answer = RawClient::connect(listener).ask("GET /a?b=c HTTP/1.1\r\nHost: up\r\n\r\n");
        assert_eq!((answer.status(), answer.text().as_str()), (200, "GET /a?b=c"));
    }
}
