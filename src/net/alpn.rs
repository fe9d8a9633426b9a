//! What is spoken on a connection, and what protects it.

/// What ALPN is offered, which is what will be spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    Http1,
    H2,
    /// No HTTP: nothing is offered.
    Bytes,
    /// A byte stream for a service behind another sidecar, which is told so by ALPN. A server that is no sidecar (and
    /// so gets no certificate of ours) is offered nothing.
    ByteStream,
}

/// What protects a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls {
    None,
    /// The server alone proved who it is.
    Server,
    Mutual,
}

impl Tls {
    pub const ALL: [Self; 3] = [Self::None, Self::Server, Self::Mutual];

    pub const fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Server => "server",
            Self::Mutual => "mutual",
        }
    }
}
