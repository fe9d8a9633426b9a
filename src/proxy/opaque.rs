//! Whether bytes that are not HTTP may pass to a service unread. Pure: what is known goes in, the verdict comes out.
//!
//! Everything that counts per request (who calls, header rules, limits, logs) is passed by where bytes are carried
//! unread. So they are only where nothing of that is in force, or where it was said that they are bytes.

use std::fmt;

use super::detect::Spoken;
use crate::config::Protocol;

/// What holds for a connection that may turn out not to be HTTP.
#[derive(Clone, Copy, Debug)]
pub struct ByteRules {
    /// As the port or the upstream declares.
    pub protocol: Protocol,
    /// The client is a sidecar and said by ALPN that this is a byte stream.
    pub agreed: bool,
    /// The client has proved by a certificate who it is.
    pub peer_identity: bool,
    /// A request policy that is in force, by its key.
    pub request_policy: Option<&'static str>,
    /// TLS of the service's own that goes out, by CONNECT or redirected: it passes unread (product contract, 4.2).
    pub own_tls: bool,
}

/// What becomes of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They pass, whatever they are.
    Pass,
    /// They pass as long as no HTTP server could read them as a request.
    Watched,
    Refused(Why),
}

/// Why bytes are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The port is declared to speak HTTP.
    Declared,
    PeerIdentity,
    RequestPolicy(&'static str),
    /// A byte stream was agreed on, and a request came.
    Request,
    /// The server behind it speaks HTTP.
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
                write!(f, "bytes that are not HTTP came to where `{key}` is in force, which looks at requests")
            }
            Self::Request => f.write_str("a request came on what was opened as a byte stream"),
            Self::HttpServer => f.write_str("bytes that are not HTTP came for a server that speaks HTTP"),
        }
    }
}

impl ByteRules {
    /// What becomes of a connection that begins like this.
    pub const fn decide(&self, spoken: Spoken) -> Verdict {
        match (self.protocol, spoken) {
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
        match spoken {
            // A service that ends TLS itself could be one of HTTP.
            Spoken::Tls => Verdict::Refused(Why::PeerIdentity),
            _ if self.agreed => Verdict::Watched,
            _ => Verdict::Refused(Why::PeerIdentity),
        }
    }

    /// What becomes of a connection on which the server has spoken first, and not HTTP. That is proof enough that
    /// nothing in it is a request, whoever the client is.
    pub const fn decide_server_first(&self) -> Verdict {
        match (self.protocol, self.request_policy) {
            (Protocol::Tcp, _) => Verdict::Pass,
            (Protocol::Http1 | Protocol::H2, _) => Verdict::Refused(Why::Declared),
            (Protocol::Auto, Some(key)) => Verdict::Refused(Why::RequestPolicy(key)),
            (Protocol::Auto, None) => Verdict::Watched,
        }
    }

    /// What becomes of a connection that begins like this: by nothing of the client's where its server spoke first.
    pub const fn decide_spoken(&self, spoken: Spoken) -> Verdict {
        match spoken {
            Spoken::Nothing => self.decide_server_first(),
            _ => self.decide(spoken),
        }
    }

    /// Whether the server may be the one to speak first.
    pub const fn may_be_server_first(&self) -> bool {
        matches!(self.decide_server_first(), Verdict::Pass | Verdict::Watched)
    }

    /// Whether bytes may pass that the client sends first.
    pub const fn takes_bytes(&self) -> bool {
        matches!(self.decide(Spoken::Other), Verdict::Pass | Verdict::Watched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: ByteRules = ByteRules {
        protocol: Protocol::Auto,
        agreed: false,
        peer_identity: false,
        request_policy: None,
        own_tls: false,
    };
    const ALL: [Spoken; 5] = [Spoken::Http1, Spoken::H2, Spoken::Tls, Spoken::Other, Spoken::Nothing];

    /// Issue 14, fault 1: under `auto` bytes pass only where neither a peer identity nor a request policy is in force.
    #[test]
    fn bytes_pass_only_where_nothing_is_passed_by() {
        assert_eq!(OPEN.decide(Spoken::Other), Verdict::Watched);
        assert_eq!(OPEN.decide(Spoken::Tls), Verdict::Watched);
        let known = ByteRules { peer_identity: true, ..OPEN };
        let limited = ByteRules { request_policy: Some("rate_limit"), ..OPEN };
        for spoken in [Spoken::Other, Spoken::Tls] {
            assert_eq!(known.decide(spoken), Verdict::Refused(Why::PeerIdentity));
            assert_eq!(limited.decide(spoken), Verdict::Refused(Why::RequestPolicy("rate_limit")));
        }
    }

    #[test]
    fn two_sidecars_agree_on_a_byte_stream() {
        let agreed = ByteRules { peer_identity: true, agreed: true, ..OPEN };
        assert_eq!(agreed.decide(Spoken::Other), Verdict::Watched, "still no request may hide in it");
        assert_eq!(agreed.decide(Spoken::Tls), Verdict::Refused(Why::PeerIdentity));
        assert_eq!(agreed.decide(Spoken::Http1), Verdict::Refused(Why::Request));
        let limited = ByteRules { request_policy: Some("allow"), ..agreed };
        assert_eq!(limited.decide(Spoken::Other), Verdict::Refused(Why::RequestPolicy("allow")));
    }

    #[test]
    fn what_is_declared_is_not_decided_by_the_bytes() {
        for spoken in ALL {
            for peer_identity in [false, true] {
                let rules = ByteRules { peer_identity, request_policy: Some("jwt"), agreed: true, ..OPEN };
                assert_eq!(ByteRules { protocol: Protocol::Tcp, ..rules }.decide(spoken), Verdict::Pass);
                for protocol in [Protocol::Http1, Protocol::H2] {
                    let declared = ByteRules { protocol, ..rules };
                    assert_eq!(declared.decide(spoken), Verdict::Refused(Why::Declared));
                    assert!(!declared.takes_bytes());
                }
            }
        }
    }

    #[test]
    fn a_server_that_speaks_first_shows_what_it_is() {
        let known = ByteRules { peer_identity: true, ..OPEN };
        assert_eq!(known.decide_server_first(), Verdict::Watched);
        let limited = ByteRules { request_policy: Some("allow"), agreed: true, ..known };
        assert_eq!(limited.decide_server_first(), Verdict::Refused(Why::RequestPolicy("allow")));
        assert!(!ByteRules { protocol: Protocol::H2, ..OPEN }.may_be_server_first());
    }

    #[test]
    fn tls_of_the_service_goes_out() {
        let out = ByteRules { own_tls: true, request_policy: Some("rate_limit"), ..OPEN };
        assert_eq!(out.decide(Spoken::Tls), Verdict::Watched);
        assert_eq!(out.decide(Spoken::Other), Verdict::Refused(Why::RequestPolicy("rate_limit")));
    }
}
