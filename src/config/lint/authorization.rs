//! Lints of allow lists and tokens.

use super::{Lints, is_loopback_host};
use crate::{
    authorization::AllowList,
    config::{Config, Endpoints, Mtls, Node, TlsMode},
};

impl Lints<'_> {
    pub(super) fn authorization(&mut self, config: &Config) {
        self.allow(config);
        if let Some(jwt) = &config.inbound.jwt
            && is_plain(jwt.jwks.expose())
        {
            let place = self.root.get("inbound").and_then(|inbound| inbound.get("jwt")?.get("jwks")?.origin);
            let help = "anyone on the network path can replace the keys: use https://, or a file";
            self.warn(place, "the keys that verify tokens come over plain HTTP", help);
        }
        for (index, upstream) in config.upstreams.iter().enumerate() {
            let Some(oauth2) = &upstream.oauth2 else { continue };
            let node = self.root.get("upstream").and_then(|list| list.item(index)?.get("oauth2"));
            let place = |key: &str| node.and_then(|node| node.get(key).or(Some(node))?.origin);
            if is_plain(oauth2.token_url.expose()) {
                let help = "anyone on the network path can read the secret: use https://";
                self.warn(place("token_url"), "the client's secret goes over plain HTTP", help);
            }
            let near = matches!(&upstream.endpoints, Endpoints::Fixed(list) if list.iter().all(|e| is_loopback_host(&e.host)));
            if upstream.tls.mode == TlsMode::Off && !near {
                let help = "anyone on the network path can read and use it: set `tls`";
                self.warn(place(""), "the upstream's token goes over plain HTTP", help);
            }
        }
    }

    fn allow(&mut self, config: &Config) {
        let inbound = &config.inbound;
        let nodes = self.root.get("inbound").and_then(|node| node.get("allow")).and_then(Node::as_array);
        let nodes = nodes.unwrap_or_default();
        let place = |at: usize| nodes.get(at).and_then(|node| node.origin);
        let off = |mtls: Mtls| mtls == Mtls::Off;
        if !inbound.allow.is_empty()
            && off(inbound.mtls)
            && inbound.ports.iter().all(|port| port.mtls.is_none_or(off))
        {
            let help = "without mutual TLS no client has an identity: set [identity] and `mtls`";
            self.warn(place(0), "this allow list matches no client", help);
        }
        let rules = AllowList::new(&inbound.allow);
        for (at, entry) in rules.entries().iter().enumerate() {
            if let Some(wider) = rules.entries()[..at].iter().position(|earlier| earlier.covers(entry)) {
                let message = format!("entry {} allows only what entry {} already allows", at + 1, wider + 1);
                self.warn(place(at), message, "remove it, or make the earlier one narrower");
            }
        }
    }
}

/// An `http://` URL of another machine.
fn is_plain(url: &str) -> bool {
    let uri: Option<http::Uri> = url.strip_prefix("http://").and_then(|_| url.parse().ok());
    uri.is_some_and(|uri| !uri.host().is_some_and(is_loopback_host))
}
