//! Whether bytes that are not HTTP may pass unread (an opaque byte stream). A pure decision.
//!
//! A byte stream bypasses everything that applies per request: identity headers, header rules, limits, logs. So it may
//! pass only where none of that is in force, or where the configuration or the peer declares that it is one.

use std::fmt;

use super::detect::DetectedProtocol;
use crate::config::Protocol;

/// The rules for a connection that may turn out not to be HTTP.
#[derive(Clone, Copy, Debug)]
pub struct ByteStreamRules {
    /// The declared protocol of the port or the upstream.
    pub protocol: Protocol,
    /// The client is a sidecar and negotiated a byte stream by ALPN.
    pub is_negotiated: bool,
    /// The client has a verified certificate.
    pub has_peer_identity: bool,
    /// The key of a request policy that is in force.
    pub request_policy: Option<&'static str>,
    /// Outbound, where TLS that the service itself speaks passes unread (product contract, 4.2).
    pub allows_own_tls: bool,
}

/// The decision about a byte stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteStreamVerdict {
    /// It passes unchecked.
    Pass,
    /// It passes as long as no HTTP server could read it as a request.
    Watched,
    Refused(ByteStreamRefusal),
}

/// Why a byte stream is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteStreamRefusal {
    /// The port is declared to speak HTTP.
    Declared,
    PeerIdentity,
    RequestPolicy(&'static str),
    /// A byte stream was negotiated, and an HTTP request arrived.
    Request,
    /// The server speaks HTTP.
    HttpServer,
}

impl fmt::Display for ByteStreamRefusal {
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

impl ByteStreamRules {
    /// Decides by the protocol of the client's first bytes.
    pub const fn decide_client_first(&self, detected: DetectedProtocol) -> ByteStreamVerdict {
        match (self.protocol, detected) {
            (Protocol::Tcp, _) => return ByteStreamVerdict::Pass,
            (_, DetectedProtocol::Tls) if self.allows_own_tls => return ByteStreamVerdict::Watched,
            (Protocol::Http1 | Protocol::H2, _) => {
                return ByteStreamVerdict::Refused(ByteStreamRefusal::Declared);
            }
            (Protocol::Auto, DetectedProtocol::Http1 | DetectedProtocol::H2) => {
                return ByteStreamVerdict::Refused(ByteStreamRefusal::Request);
            }
            (Protocol::Auto, _) => {}
        }
        match self.request_policy {
            Some(key) => return ByteStreamVerdict::Refused(ByteStreamRefusal::RequestPolicy(key)),
            None if !self.has_peer_identity => return ByteStreamVerdict::Watched,
            None => {}
        }
        match detected {
            // A service that terminates TLS itself may speak HTTP inside.
            DetectedProtocol::Tls => ByteStreamVerdict::Refused(ByteStreamRefusal::PeerIdentity),
            _ if self.is_negotiated => ByteStreamVerdict::Watched,
            _ => ByteStreamVerdict::Refused(ByteStreamRefusal::PeerIdentity),
        }
    }

    /// Decides about a connection on which the server has sent first, and not HTTP. That proves that it carries no HTTP
    /// requests, whatever the client is.
    pub const fn decide_server_first(&self) -> ByteStreamVerdict {
        match (self.protocol, self.request_policy) {
            (Protocol::Tcp, _) => ByteStreamVerdict::Pass,
            (Protocol::Http1 | Protocol::H2, _) => ByteStreamVerdict::Refused(ByteStreamRefusal::Declared),
            (Protocol::Auto, Some(key)) => ByteStreamVerdict::Refused(ByteStreamRefusal::RequestPolicy(key)),
            (Protocol::Auto, None) => ByteStreamVerdict::Watched,
        }
    }

    /// Decides by the first bytes; `Nothing` means that the server sent first.
    pub const fn decide(&self, detected: DetectedProtocol) -> ByteStreamVerdict {
        match detected {
            DetectedProtocol::Nothing => self.decide_server_first(),
            _ => self.decide_client_first(detected),
        }
    }

    /// Whether the server may send first.
    pub const fn allows_server_first(&self) -> bool {
        matches!(self.decide_server_first(), ByteStreamVerdict::Pass | ByteStreamVerdict::Watched)
    }

    /// Whether a byte stream may pass in which the client sends first.
    pub const fn allows_client_first(&self) -> bool {
        matches!(
            self.decide_client_first(DetectedProtocol::Other),
            ByteStreamVerdict::Pass | ByteStreamVerdict::Watched
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: ByteStreamRules = ByteStreamRules {
        protocol: Protocol::Auto,
        is_negotiated: false,
        has_peer_identity: false,
        request_policy: None,
        allows_own_tls: false,
    };
    const ALL: [DetectedProtocol; 5] = [
        DetectedProtocol::Http1,
        DetectedProtocol::H2,
        DetectedProtocol::Tls,
        DetectedProtocol::Other,
        DetectedProtocol::Nothing,
    ];

    /// Issue 14, fault 1: under `auto` bytes pass only where neither a peer identity nor a request policy is in force.
    #[test]
    fn bytes_pass_only_where_they_bypass_no_policy() {
        assert_eq!(OPEN.decide_client_first(DetectedProtocol::Other), ByteStreamVerdict::Watched);
        assert_eq!(OPEN.decide_client_first(DetectedProtocol::Tls), ByteStreamVerdict::Watched);
        let known = ByteStreamRules { has_peer_identity: true, ..OPEN };
        let limited = ByteStreamRules { request_policy: Some("rate_limit"), ..OPEN };
        for detected in [DetectedProtocol::Other, DetectedProtocol::Tls] {
            assert_eq!(
                known.decide_client_first(detected),
                ByteStreamVerdict::Refused(ByteStreamRefusal::PeerIdentity)
            );
            assert_eq!(
                limited.decide_client_first(detected),
                ByteStreamVerdict::Refused(ByteStreamRefusal::RequestPolicy("rate_limit"))
            );
        }
    }

    #[test]
    fn two_sidecars_negotiate_a_byte_stream() {
        let negotiated = ByteStreamRules { has_peer_identity: true, is_negotiated: true, ..OPEN };
        assert_eq!(
            negotiated.decide_client_first(DetectedProtocol::Other),
            ByteStreamVerdict::Watched,
            "a request hidden in it is still cut off"
        );
        assert_eq!(
            negotiated.decide_client_first(DetectedProtocol::Tls),
            ByteStreamVerdict::Refused(ByteStreamRefusal::PeerIdentity)
        );
        assert_eq!(
            negotiated.decide_client_first(DetectedProtocol::Http1),
            ByteStreamVerdict::Refused(ByteStreamRefusal::Request)
        );
        let limited = ByteStreamRules { request_policy: Some("allow"), ..negotiated };
        assert_eq!(
            limited.decide_client_first(DetectedProtocol::Other),
            ByteStreamVerdict::Refused(ByteStreamRefusal::RequestPolicy("allow"))
        );
    }

    #[test]
    fn a_declared_protocol_overrides_detection() {
        for detected in ALL {
            for peer_identity in [false, true] {
                let rules = ByteStreamRules {
                    has_peer_identity: peer_identity,
                    request_policy: Some("jwt"),
                    is_negotiated: true,
                    ..OPEN
                };
                assert_eq!(
                    ByteStreamRules { protocol: Protocol::Tcp, ..rules }.decide_client_first(detected),
                    ByteStreamVerdict::Pass
                );
                for protocol in [Protocol::Http1, Protocol::H2] {
                    let declared = ByteStreamRules { protocol, ..rules };
                    assert_eq!(
                        declared.decide_client_first(detected),
                        ByteStreamVerdict::Refused(ByteStreamRefusal::Declared)
                    );
                    assert!(!declared.allows_client_first());
                }
            }
        }
    }

    #[test]
    fn a_server_that_sends_first_is_not_http() {
        let known = ByteStreamRules { has_peer_identity: true, ..OPEN };
        assert_eq!(known.decide_server_first(), ByteStreamVerdict::Watched);
        let limited = ByteStreamRules { request_policy: Some("allow"), is_negotiated: true, ..known };
        assert_eq!(
            limited.decide_server_first(),
            ByteStreamVerdict::Refused(ByteStreamRefusal::RequestPolicy("allow"))
        );
        assert!(!ByteStreamRules { protocol: Protocol::H2, ..OPEN }.allows_server_first());
    }

    #[test]
    fn outbound_tls_of_the_service_passes() {
        let out = ByteStreamRules { allows_own_tls: true, request_policy: Some("rate_limit"), ..OPEN };
        assert_eq!(out.decide_client_first(DetectedProtocol::Tls), ByteStreamVerdict::Watched);
        assert_eq!(
            out.decide_client_first(DetectedProtocol::Other),
            ByteStreamVerdict::Refused(ByteStreamRefusal::RequestPolicy("rate_limit"))
        );
    }
}
