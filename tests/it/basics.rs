//! The basics: the proxy starts, says where it listens, forwards a request each way, and exits.

use crate::support::{Proxy, RawClient, Upstream, text};

#[test]
fn forwards_an_outbound_and_an_inbound_request() {
    let upstream =
        Upstream::http1(|request| async move { text(format!("{} {}", request.method(), request.uri())) });
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{0}\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{0}\"]\n",
        upstream.address()
    ));
    for listener in [proxy.outbound(), proxy.inbound()] {
        let response = RawClient::connect(listener).ask("GET /a?b=c HTTP/1.1\r\nHost: up\r\n\r\n");
        assert_eq!((response.status(), response.text().as_str()), (200, "GET /a?b=c"));
    }
}
