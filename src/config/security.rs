//! Settings of identity, authorization and tokens.

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
    /// The trusted roots, PEM: one bundle, or one per trust domain.
    pub ca: Option<TrustBundles>,
    /// The lowest TLS version.
    pub min_tls: MinTls,
    /// Revoked certificates, PEM.
    pub crl: Option<PathBuf>,
    /// The SPIFFE Workload API in place of files, e.g. `unix:///run/spire/sockets/agent.sock`.
    pub spiffe: Option<String>,
}

/// One bundle for all trust domains, or one for each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a path, or a table of trust domains and paths")]
pub enum TrustBundles {
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
    /// Only TLS with a trusted client certificate.
    Strict,
    /// TLS and plaintext; plaintext has no peer identity.
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
    /// The URL or file path of the issuer's public keys.
    pub jwks: Secret,
    /// The trusted roots for an `https://` URL, PEM; default: the system's roots.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// Paths that need no token. A `*` at the end matches anything.
    #[serde(default)]
    pub except: Vec<String>,
    /// Header fields in which the service gets claims; fields of these names from clients are removed.
    #[serde(default)]
    pub claim_headers: BTreeMap<String, String>,
}

/// TLS to an upstream, and the identities that its endpoints may have.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize)]
pub struct UpstreamTls {
    #[serde(rename = "tls")]
    pub mode: TlsMode,
    /// SNI, and the name that must match under `simple`; default: the requested host.
    pub server_name: Option<String>,
    /// Default: system roots for `simple`, `[identity].ca` for `mutual`.
    pub ca: Option<PathBuf>,
    /// SPIFFE IDs of which the endpoint must have one.
    pub identity: Vec<String>,
    /// The lowest TLS version; default: that of `[identity]`, else 1.3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_tls: Option<MinTls>,
}

/// `upstream.tls`, ordered by how much it verifies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TlsMode {
    #[default]
    Off,
    /// Only the server is verified.
    Simple,
    /// Server and client are verified.
    Mutual,
}

impl TlsMode {
    /// The value in the configuration.
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
    /// The client's ID at the token endpoint.
    pub client_id: String,
    /// The file with the client's secret; read again for each token.
    pub client_secret_file: PathBuf,
    /// The requested scopes.
    #[serde(default)]
    pub scopes: Vec<String>,
    /// The trusted roots for an `https://` URL, PEM; default: the system's roots.
    #[serde(default)]
    pub ca: Option<PathBuf>,
}
