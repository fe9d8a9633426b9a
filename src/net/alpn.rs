//! What is spoken on a connection, and what protects it.

/// The application protocol of a connection, negotiated by ALPN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApplicationProtocol {
    Http1,
    H2,
    /// Not HTTP: no ALPN is offered.
    Opaque,
    /// A byte stream for a service behind another sidecar, announced by ALPN. A server that is not a sidecar (and so
    /// gets no client certificate from us) is offered no ALPN.
    ByteStream,
}

/// Whether a connection is TLS, and who presented a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionTls {
    None,
    /// Only the server presented a certificate.
    Server,
    Mutual,
}

impl ConnectionTls {
    pub const ALL: [Self; 3] = [Self::None, Self::Server, Self::Mutual];

    pub const fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Server => "server",
            Self::Mutual => "mutual",
        }
    }
}
