//! The settings of identity, authorization and tokens.

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::redact::Secret;

/// `[identity]`: this service's certificate: files, or the SPIFFE Workload API.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Identity {
    /// The certificate chain, PEM.
    pub cert: Option<PathBuf>,
    /// Its private key, PEM.
    pub key: Option<PathBuf>,
    /// Who is trusted, PEM: one bundle, or one per trust domain.
    pub ca: Option<Bundles>,
    /// The oldest TLS that is spoken.
    pub min_tls: MinTls,
    /// Revoked certificates, PEM.
    pub crl: Option<PathBuf>,
    /// The SPIFFE Workload API in place of files, e.g. `unix:///run/spire/sockets/agent.sock`.
    pub spiffe: Option<String>,
}

/// One bundle for all, or a table of trust domains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a path, or a table of trust domains and paths")]
pub enum Bundles {
    All(PathBuf),
    ByTrustDomain(BTreeMap<String, PathBuf>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, JsonSchema)]
pub enum MinTls {
    #[serde(rename = "1.2")]
    V12,
    #[default]
    #[serde(rename = "1.3")]
    V13,
}

/// `inbound.mtls`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mtls {
    /// TLS with a trusted client certificate or nothing.
    Strict,
    /// Both; plaintext passes with no peer identity.
    Permissive,
    Off,
}

/// `[inbound.jwt]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Jwt {
    /// The tokens' `iss`.
    pub issuer: String,
    /// The tokens' `aud` must be one of these.
    pub audiences: Vec<String>,
    /// A URL or a file path.
    pub jwks: Secret,
    /// Whom to trust for an `https://` URL, PEM; default: the system's roots.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// Paths that need no token. A `*` at the end stands for anything.
    #[serde(default)]
    pub except: Vec<String>,
    /// Header fields and the claims that the service gets in them; whatever callers sent by these names is removed.
    #[serde(default)]
    pub claim_headers: BTreeMap<String, String>,
}

/// How an upstream is spoken to and who must answer.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize)]
pub struct UpstreamTls {
    #[serde(rename = "tls")]
    pub mode: TlsMode,
    /// SNI, and the name that must match under `simple`; default: the requested host.
    pub server_name: Option<String>,
    /// Default: system roots for `simple`, `[identity].ca` for `mutual`.
    pub ca: Option<PathBuf>,
    /// SPIFFE IDs of which one must answer.
    pub identity: Vec<String>,
    /// The oldest TLS that is spoken; default: that of `[identity]`, else 1.3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_tls: Option<MinTls>,
}

/// `upstream.tls`
/// Ordered by what it proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TlsMode {
    #[default]
    Off,
    /// The server proves who it is.
    Simple,
    /// Both do.
    Mutual,
}

impl TlsMode {
    /// As it is written in the configuration.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Simple => "simple",
            Self::Mutual => "mutual",
        }
    }
}

/// `upstream.oauth2`: client credentials (RFC 6749 §4.4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Oauth2 {
    /// The token endpoint.
    pub token_url: Secret,
    /// The client's name there.
    pub client_id: String,
    /// Holds the client's secret; read anew for each token.
    pub client_secret_file: PathBuf,
    /// The scopes that are asked for.
    #[serde(default)]
    pub scopes: Vec<String>,
    /// Whom to trust for an `https://` URL, PEM; default: the system's roots.
    #[serde(default)]
    pub ca: Option<PathBuf>,
}
