//! The client of the admin API, for the command line.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http::{
    Method, Request, StatusCode,
    header::{AUTHORIZATION, HOST},
};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::timeout,
};

use super::token::{self, AdminToken, AdminTokenError};
use crate::config::AdminListen;

/// The limit for one request.
const TIMEOUT: Duration = Duration::from_secs(15);
/// The largest response, in bytes.
const MAX_RESPONSE: usize = 16 << 20;

/// A client for one sidecar's admin server.
#[derive(Clone, Debug)]
pub struct AdminClient {
    address: AdminListen,
    token_file: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum AdminClientError {
    #[error("cannot connect to {address} ({source}): is a sidecar running, and is this its [admin] listen?")]
    Unreachable { address: String, source: io::Error },
    #[error("{address} did not respond within {}s", TIMEOUT.as_secs())]
    Timeout { address: String },
    #[error("the server at {address} is not a sidecar's admin server: {reason}")]
    NotAdminServer { address: String, reason: String },
    #[error(
        "no connection accepted at {service}, the configured address of the service (--app, [inbound] forward_to)"
    )]
    NoService { service: String },
    #[error("rejected by {address}: {reason}")]
    Rejected { address: String, reason: String },
    #[error("{source}; set --token-file (the sidecar's log and ready file show the path)")]
    NoToken { source: AdminTokenError },
}

impl AdminClient {
    pub fn new(address: AdminListen, token_file: Option<PathBuf>) -> Self {
        Self { address, token_file }
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Sends a GET; needs no token.
    pub async fn get(&self, path: &str) -> Result<Bytes, AdminClientError> {
        self.exchange(Method::GET, path, String::new(), None).await
    }

    /// Sends a request that changes something. Over TCP it carries the token; a Unix socket needs none.
    pub async fn change(&self, method: Method, path: &str, body: String) -> Result<Bytes, AdminClientError> {
        let token = match &self.address {
            AdminListen::Unix(_) => None,
            AdminListen::Tcp(address) => self.token(address.0.port).await?,
        };
        self.exchange(method, path, body, token).await
    }

    /// Sends a GET that needs the token.
    pub async fn get_protected(&self, path: &str) -> Result<Bytes, AdminClientError> {
        self.change(Method::GET, path, String::new()).await
    }

    /// The token from `--token-file`, else from the file that the sidecar created; `None` if it has created none.
    async fn token(&self, port: u16) -> Result<Option<AdminToken>, AdminClientError> {
        let token = match &self.token_file {
            Some(path) => AdminToken::read(path),
            None => {
                let status = self.get("/status").await?;
                let status: serde_json::Value =
                    serde_json::from_slice(&status).map_err(|error| self.not_admin_server(&error))?;
                let Some(path) = status["listeners"]["admin_token_file"].as_str() else { return Ok(None) };
                token::read_announced(Path::new(path), port)
            }
        };
        token.map(Some).map_err(|source| AdminClientError::NoToken { source })
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: String,
        token: Option<AdminToken>,
    ) -> Result<Bytes, AdminClientError> {
        let address = self.address();
        let exchange = async {
            let unreachable = |source| AdminClientError::Unreachable { address: address.clone(), source };
            let host = match &self.address {
                AdminListen::Tcp(listen) => listen.to_string(),
                AdminListen::Unix(_) => "localhost".to_owned(),
            };
            let mut request = Request::builder().method(method).uri(path).header(HOST, host);
            if let Some(token) = token {
                request = request.header(AUTHORIZATION, token.authorization());
            }
            let request =
                request.body(Full::new(Bytes::from(body))).map_err(|error| self.not_admin_server(&error))?;
            match &self.address {
                AdminListen::Tcp(listen) => {
                    let stream = TcpStream::connect((listen.0.host.as_str(), listen.0.port)).await;
                    self.send(stream.map_err(unreachable)?, request).await
                }
                AdminListen::Unix(path) => {
                    self.send(UnixStream::connect(path).await.map_err(unreachable)?, request).await
                }
            }
        };
        timeout(TIMEOUT, exchange)
            .await
            .unwrap_or(Err(AdminClientError::Timeout { address: address.clone() }))
    }

    async fn send<S>(&self, stream: S, request: Request<Full<Bytes>>) -> Result<Bytes, AdminClientError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.not_admin_server(&error))?;
        let exchange = async {
            let response =
                sender.send_request(request).await.map_err(|error| self.not_admin_server(&error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_RESPONSE).collect().await;
            let body = body.map_err(|error| self.not_admin_server(&error))?.to_bytes();
            if status.is_success() { Ok(body) } else { Err(self.rejected(status, &body)) }
        };
        let mut connection = std::pin::pin!(connection);
        let mut exchange = std::pin::pin!(exchange);
        tokio::select! {
            biased;
            response = &mut exchange => response,
            // The response may have arrived before the connection ended.
            _ = &mut connection => exchange.await,
        }
    }

    fn not_admin_server(&self, reason: &dyn std::fmt::Display) -> AdminClientError {
        AdminClientError::NotAdminServer { address: self.address(), reason: reason.to_string() }
    }

    fn rejected(&self, status: StatusCode, body: &[u8]) -> AdminClientError {
        let problem: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
        let reason = match problem["detail"].as_str() {
            Some(detail) => detail.to_owned(),
            None => status.to_string(),
        };
        AdminClientError::Rejected { address: self.address(), reason }
    }
}
