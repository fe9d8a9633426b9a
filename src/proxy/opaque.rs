//! Whether bytes that are not HTTP may pass unread (an opaque byte stream). A pure decision.
//!
//! A byte stream bypasses everything that applies per request: identity headers, header rules, limits, logs. So it may
//! pass only where none of that is in force, or where the configuration or the peer declares that it is one.

use std::fmt;

use super::detect::Spoken;
use crate::config::Protocol;

/// The rules for a connection that may turn out not to be HTTP.
#[derive(Clone, Copy, Debug)]
pub struct ByteRules {
    /// The declared protocol of the port or the upstream.
    pub protocol: Protocol,
    /// The client is a sidecar and negotiated a byte stream by ALPN.
    pub is_negotiated: bool,
    /// The client has a verified certificate.
    pub peer_identity: bool,
    /// The key of a request policy that is in force.
    pub request_policy: Option<&'static str>,
    /// Outbound, where TLS that the service itself speaks passes unread (product contract, 4.2).
    pub own_tls: bool,
}

/// The decision about a byte stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passes unchecked.
    Pass,
    /// It passes as long as no HTTP server could read it as a request.
    Watched,
    Refused(Why),
}

/// Why a byte stream is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The port is declared to speak HTTP.
    Declared,
    PeerIdentity,
    RequestPolicy(&'static str),
    /// A byte stream was negotiated, and an HTTP request arrived.
    Request,
    /// The server speaks HTTP.
    HttpServer,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Declared => f.write_str("bytes that are not HTTP came to a port that is declared to speak HTTP"),
            Self::PeerIdentity => f.write_str(
                "bytes that are not HTTP came from an authenticated peer, on a port that is not declared `tcp`",
            ),
            Self::RequestPolicy(key) => {
                write!(f, "bytes that are not HTTP came where `{key}` is in force, which applies to requests")
            }
            Self::Request => f.write_str("an HTTP request came on a connection that was negotiated as a byte stream"),
            Self::HttpServer => f.write_str("bytes that are not HTTP came, and the server speaks HTTP"),
        }
    }
}

impl ByteRules {
    /// Decides by the protocol of the client's first bytes.
    pub const fn decide(&self, detected: Spoken) -> Verdict {
        match (self.protocol, detected) {
            (Protocol::Tcp, _) => return Verdict::Pass,
            (_, Spoken::Tls) if self.own_tls => return Verdict::Watched,
            (Protocol::Http1 | Protocol::H2, _) => return Verdict::Refused(Why::Declared),
            (Protocol::Auto, Spoken::Http1 | Spoken::H2) => return Verdict::Refused(Why::Request),
            (Protocol::Auto, _) => {}
        }
        match self.request_policy {
            Some(key) => return Verdict::Refused(Why::RequestPolicy(key)),
            None if !self.peer_identity => return Verdict::Watched,
            None => {}
        }
        match detected {
            // A service that terminates TLS itself may speak HTTP inside.
            Spoken::Tls => Verdict::Refused(Why::PeerIdentity),
            _ if self.is_negotiated => Verdict::Watched,
            _ => Verdict::Refused(Why::PeerIdentity),
        }
    }

    /// Decides about a connection on which the server has sent first, and not HTTP. That proves that it carries no HTTP
    /// requests, whatever the client is.
    pub const fn decide_server_first(&self) -> Verdict {
        match (self.protocol, self.request_policy) {
            (Protocol::Tcp, _) => Verdict::Pass,
            (Protocol::Http1 | Protocol::H2, _) => Verdict::Refused(Why::Declared),
            (Protocol::Auto, Some(key)) => Verdict::Refused(Why::RequestPolicy(key)),
            (Protocol::Auto, None) => Verdict::Watched,
        }
    }

    /// Decides by the first bytes; `Nothing` means that the server sent first.
    pub const fn decide_spoken(&self, detected: Spoken) -> Verdict {
        match detected {
            Spoken::Nothing => self.decide_server_first(),
            _ => self.decide(detected),
        }
    }

    /// Whether the server may send first.
    pub const fn may_be_server_first(&self) -> bool {
        matches!(self.decide_server_first(), Verdict::Pass | Verdict::Watched)
    }

    /// Whether a byte stream may pass in which the client sends first.
    pub const fn takes_bytes(&self) -> bool {
        matches!(self.decide(Spoken::Other), Verdict::Pass | Verdict::Watched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: ByteRules = ByteRules {
        protocol: Protocol::Auto,
        is_negotiated: false,
        peer_identity: false,
        request_policy: None,
        own_tls: false,
    };
    const ALL: [Spoken; 5] = [Spoken::Http1, Spoken::H2, Spoken::Tls, Spoken::Other, Spoken::Nothing];

    /// Issue 14, fault 1: under `auto` bytes pass only where neither a peer identity nor a request policy is in force.
    #[test]
    fn bytes_pass_only_where_they_bypass_no_policy() {
        assert_eq!(OPEN.decide(Spoken::Other), Verdict::Watched);
        assert_eq!(OPEN.decide(Spoken::Tls), Verdict::Watched);
        let known = ByteRules { peer_identity: true, ..OPEN };
        let limited = ByteRules { request_policy: Some("rate_limit"), ..OPEN };
        for detected in [Spoken::Other, Spoken::Tls] {
            assert_eq!(known.decide(detected), Verdict::Refused(Why::PeerIdentity));
            assert_eq!(limited.decide(detected), Verdict::Refused(Why::RequestPolicy("rate_limit")));
        }
    }

    #[test]
    fn two_sidecars_negotiate_a_byte_stream() {
        let negotiated = ByteRules { peer_identity: true, is_negotiated: true, ..OPEN };
        assert_eq!(
            negotiated.decide(Spoken::Other),
            Verdict::Watched,
            "a request hidden in it is still cut off"
        );
        assert_eq!(negotiated.decide(Spoken::Tls), Verdict::Refused(Why::PeerIdentity));
        assert_eq!(negotiated.decide(Spoken::Http1), Verdict::Refused(Why::Request));
        let limited = ByteRules { request_policy: Some("allow"), ..negotiated };
        assert_eq!(limited.decide(Spoken::Other), Verdict::Refused(Why::RequestPolicy("allow")));
    }

    #[test]
    fn a_declared_protocol_overrides_detection() {
        for detected in ALL {
            for peer_identity in [false, true] {
                let rules =
                    ByteRules { peer_identity, request_policy: Some("jwt"), is_negotiated: true, ..OPEN };
                assert_eq!(ByteRules { protocol: Protocol::Tcp, ..rules }.decide(detected), Verdict::Pass);
                for protocol in [Protocol::Http1, Protocol::H2] {
                    let declared = ByteRules { protocol, ..rules };
                    assert_eq!(declared.decide(detected), Verdict::Refused(Why::Declared));
                    assert!(!declared.takes_bytes());
                }
            }
        }
    }

    #[test]
    fn a_server_that_sends_first_is_not_http() {
        let known = ByteRules { peer_identity: true, ..OPEN };
        assert_eq!(known.decide_server_first(), Verdict::Watched);
        let limited = ByteRules { request_policy: Some("allow"), is_negotiated: true, ..known };
        assert_eq!(limited.decide_server_first(), Verdict::Refused(Why::RequestPolicy("allow")));
        assert!(!ByteRules { protocol: Protocol::H2, ..OPEN }.may_be_server_first());
    }

    #[test]
    fn outbound_tls_of_the_service_passes() {
        let out = ByteRules { own_tls: true, request_policy: Some("rate_limit"), ..OPEN };
        assert_eq!(out.decide(Spoken::Tls), Verdict::Watched);
        assert_eq!(out.decide(Spoken::Other), Verdict::Refused(Why::RequestPolicy("rate_limit")));
    }
}
