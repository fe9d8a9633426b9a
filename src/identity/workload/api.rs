//! The part of the SPIFFE Workload API that is used here, after its published `workload.proto`: one streaming RPC,
//! which delivers certificates, roots and revocation lists, again whenever they change.

use std::{collections::HashMap, path::PathBuf};

use bytes::Bytes;
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::UnixStream;
use tonic::{
    Request, Streaming,
    client::Grpc,
    metadata::MetadataValue,
    transport::{Channel, Endpoint, Uri},
};
use tonic_prost::ProstCodec;

use crate::config::AgentAddress;

/// Required in every request, against server-side request forgery (SPIFFE Workload Endpoint §3).
const SECURITY_HEADER: &str = "workload.spiffe.io";
const METHOD: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
/// The largest response, in bytes: revocation lists may be long.
const MAX_ANSWER: usize = 32 << 20;

#[derive(Clone, Copy, PartialEq, Message)]
struct X509SvidRequest {}

#[derive(Clone, PartialEq, Message)]
pub struct X509SvidResponse {
    /// The first one is the default.
    #[prost(message, repeated, tag = "1")]
    pub svids: Vec<X509Svid>,
    /// Revocation lists, DER.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub crl: Vec<Bytes>,
    /// Roots of federated trust domains, by the domain's SPIFFE ID.
    #[prost(map = "string, bytes", tag = "3")]
    pub federated_bundles: HashMap<String, Bytes>,
}

/// Lists of certificates are concatenated DER.
#[derive(Clone, PartialEq, Message)]
pub struct X509Svid {
    #[prost(string, tag = "1")]
    pub spiffe_id: String,
    /// The certificate, then its intermediates.
    #[prost(bytes = "bytes", tag = "2")]
    pub x509_svid: Bytes,
    /// PKCS #8.
    #[prost(bytes = "bytes", tag = "3")]
    pub x509_svid_key: Bytes,
    /// The roots of its trust domain.
    #[prost(bytes = "bytes", tag = "4")]
    pub bundle: Bytes,
}

/// Why a request to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("{}", root_cause(.0))]
    Connect(#[from] tonic::transport::Error),
    #[error("{}", if .0.message().is_empty() { .0.code().description() } else { .0.message() })]
    Status(#[from] tonic::Status),
}

/// The innermost source of an error: tonic's outermost text is only "transport error".
fn root_cause(error: &tonic::transport::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

/// Opens the stream. The first message has the current certificates.
///
/// # Errors
///
/// If the agent is unreachable or rejects the request.
pub async fn subscribe(socket: &AgentAddress) -> Result<Streaming<X509SvidResponse>, ApiError> {
    let channel = match socket.clone() {
        AgentAddress::Tcp(address) => Endpoint::try_from(format!("http://{address}"))?.connect().await?,
        AgentAddress::Unix(path) => connect_unix(path).await?,
    };
    let mut grpc = Grpc::new(channel).max_decoding_message_size(MAX_ANSWER);
    grpc.ready().await?;
    let mut request = Request::new(X509SvidRequest {});
    request.metadata_mut().insert(SECURITY_HEADER, MetadataValue::from_static("true"));
    let codec = ProstCodec::<X509SvidRequest, X509SvidResponse>::default();
    let response = grpc.server_streaming(request, PathAndQuery::from_static(METHOD), codec).await?;
    Ok(response.into_inner())
}

async fn connect_unix(path: PathBuf) -> Result<Channel, tonic::transport::Error> {
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(connector).await
}
