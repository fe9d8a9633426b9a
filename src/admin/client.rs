//! The other side: asks a running sidecar.

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

use super::token::{self, Token, TokenError};
use crate::config::AdminListen;

/// For the whole exchange.
const PATIENCE: Duration = Duration::from_secs(15);
/// No answer of an admin server is longer.
const ANSWER: usize = 16 << 20;

/// Where a sidecar's admin server is, and the token where one is at hand.
#[derive(Clone, Debug)]
pub struct Client {
    address: AdminListen,
    token_file: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("nothing answers at {address} ({source}): is a sidecar running, and is this its [admin] listen?")]
    Unreachable { address: String, source: io::Error },
    #[error("{address} did not answer within {}s", PATIENCE.as_secs())]
    Slow { address: String },
    #[error("what answers at {address} is no sidecar's admin server: {reason}")]
    Strange { address: String, reason: String },
    #[error(
        "nothing accepts connections at {service}, where the service is said to listen (--app, [inbound] forward_to)"
    )]
    NoService { service: String },
    #[error("refused by {address}: {reason}")]
    Refused { address: String, reason: String },
    #[error("{source}; name the file by --token-file (the sidecar's log and its ready file say where it is)")]
    NoToken { source: TokenError },
}

impl Client {
    pub fn new(address: AdminListen, token_file: Option<PathBuf>) -> Self {
        Self { address, token_file }
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Reads; needs no token.
    pub async fn get(&self, path: &str) -> Result<Bytes, ClientError> {
        self.exchange(Method::GET, path, String::new(), None).await
    }

    /// Changes something. Over a Unix socket the file's permissions decide, else the token does.
    pub async fn change(&self, method: Method, path: &str, body: String) -> Result<Bytes, ClientError> {
        let token = match &self.address {
            AdminListen::Unix(_) => None,
            AdminListen::Tcp(address) => self.token(address.0.port).await?,
        };
        self.exchange(method, path, body, token).await
    }

    /// The token in the file that was named, else in the one that the sidecar has left; none where it has left none.
    async fn token(&self, port: u16) -> Result<Option<Token>, ClientError> {
        let found = match &self.token_file {
            Some(path) => Token::read(path),
            None => {
                let status = self.get("/status").await?;
                let status: serde_json::Value =
                    serde_json::from_slice(&status).map_err(|error| self.strange(&error))?;
                let Some(path) = status["listeners"]["admin_token_file"].as_str() else { return Ok(None) };
                token::told(Path::new(path), port)
            }
        };
        found.map(Some).map_err(|source| ClientError::NoToken { source })
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: String,
        token: Option<Token>,
    ) -> Result<Bytes, ClientError> {
        let address = self.address();
        let exchange = async {
            let unreachable = |source| ClientError::Unreachable { address: address.clone(), source };
            let host = match &self.address {
                AdminListen::Tcp(listen) => listen.to_string(),
                AdminListen::Unix(_) => "localhost".to_owned(),
            };
            let mut request = Request::builder().method(method).uri(path).header(HOST, host);
            if let Some(token) = token {
                request = request.header(AUTHORIZATION, token.authorization());
            }
            let request = request.body(Full::new(Bytes::from(body))).map_err(|error| self.strange(&error))?;
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
        timeout(PATIENCE, exchange).await.unwrap_or(Err(ClientError::Slow { address: address.clone() }))
    }

    async fn send<S>(&self, stream: S, request: Request<Full<Bytes>>) -> Result<Bytes, ClientError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.strange(&error))?;
        let exchange = async {
            let answer = sender.send_request(request).await.map_err(|error| self.strange(&error))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER).collect().await;
            let body = body.map_err(|error| self.strange(&error))?.to_bytes();
            if status.is_success() { Ok(body) } else { Err(self.refused(status, &body)) }
        };
        let mut connection = std::pin::pin!(connection);
        let mut exchange = std::pin::pin!(exchange);
        tokio::select! {
            biased;
            answer = &mut exchange => answer,
            // What came before the connection ended is still to be had.
            _ = &mut connection => exchange.await,
        }
    }

    fn strange(&self, reason: &dyn std::fmt::Display) -> ClientError {
        ClientError::Strange { address: self.address(), reason: reason.to_string() }
    }

    fn refused(&self, status: StatusCode, body: &[u8]) -> ClientError {
        let problem: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
        let reason = match problem["detail"].as_str() {
            Some(detail) => detail.to_owned(),
            None => status.to_string(),
        };
        ClientError::Refused { address: self.address(), reason }
    }
}
