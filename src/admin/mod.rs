//! The admin server: what a sidecar says about itself, and the few things that can be changed while it runs.
//!
//! It lives on the control thread, where nothing can delay a call. Everything about it is bounded: connections, time,
//! the size of a body.

mod api;
pub mod breaker;
pub mod client;
pub mod exposition;
mod guard;
mod listen;
mod probes;
pub mod reload;
pub mod status;
#[cfg(test)]
mod tests;
pub mod token;
pub mod tokens;
pub mod upstreams;

use std::{convert::Infallible, future::Future, io, path::PathBuf, sync::Arc, time::Duration};

use http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tower::{ServiceBuilder, service_fn};
use tower_http::{catch_panic::CatchPanicLayer, limit::RequestBodyLimitLayer, timeout::TimeoutLayer};

use crate::{
    config,
    runtime::lifecycle::{AdminAddresses, Control},
};
use api::{Access, Api};
use probes::Probes;
use token::{Token, TokenError, TokenFile};

/// Connections at a time per listener; more wait to be accepted.
const CONNECTIONS: usize = 64;
/// To send a request's header, and to let a connection lie idle.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// To answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// After this long a connection is closed, whatever it does: a reader that stalls holds no place for ever.
const CONNECTION_AGE: Duration = Duration::from_secs(300);
/// A filter is a line; nothing longer is read.
const BODY: usize = 16 << 10;
/// After accept failed, e.g. for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A running admin server; it ends, and its files go, when this is dropped.
#[derive(Debug)]
pub struct Admin {
    /// `host:port`, or `unix:PATH`.
    pub address: String,
    /// Where `/live`, `/ready` and `/metrics` are served too.
    pub probe: Option<String>,
    token_file: Option<PathBuf>,
    _made_token: Option<TokenFile>,
    _socket: Option<listen::SocketFile>,
    _tasks: JoinSet<()>,
}

#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("cannot listen on {address} ({what}): {source}")]
    Listen { what: &'static str, address: String, source: io::Error },
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error("OUTRIGGER_PROBES cannot be used: {0}")]
    Probes(String),
}

impl Admin {
    /// Binds and serves. Call it inside the control runtime.
    pub fn start(settings: &config::Admin, control: Arc<Control>) -> Result<Self, AdminError> {
        let mut admin = Self {
            address: settings.listen.to_string(),
            probe: None,
            token_file: None,
            _made_token: None,
            _socket: None,
            _tasks: JoinSet::new(),
        };
        let tasks = &mut admin._tasks;
        let wrong = |what, address: &dyn std::fmt::Display| {
            let address = address.to_string();
            move |source| AdminError::Listen { what, address, source }
        };
        match &settings.listen {
            config::AdminListen::Unix(path) => {
                let (listener, file) =
                    listen::unix(path).map_err(wrong("[admin] listen", &settings.listen))?;
                admin._socket = Some(file);
                let api = Api { control: Arc::clone(&control), access: Access::All };
                tasks.spawn(serve(api, listener));
            }
            config::AdminListen::Tcp(address) => {
                let listeners = listen::tcp(address).map_err(wrong("[admin] listen", address))?;
                let bound: Vec<_> = listeners.iter().filter_map(|l| l.local_addr().ok()).collect();
                control.shared.own.add(&bound);
                let first = bound.first();
                admin.address = first.map(ToString::to_string).unwrap_or_default();
                let (token, made) = token(settings.token_file.as_ref(), first.map_or(0, |a| a.port()))?;
                admin.token_file =
                    settings.token_file.clone().or_else(|| made.as_ref().map(|file| file.path.clone()));
                admin._made_token = made;
                let api = Api { control: Arc::clone(&control), access: Access::Token(token) };
                serve_tcp(tasks, listeners, &api);
            }
        }
        if let Some(address) = &settings.probe_listen {
            let listeners = listen::tcp(address).map_err(wrong("[admin] probe_listen", address))?;
            let bound: Vec<_> = listeners.iter().filter_map(|l| l.local_addr().ok()).collect();
            control.shared.own.add(&bound);
            admin.probe = bound.first().map(ToString::to_string);
            let access = Access::Probe(Probes::from_env(config::process_env)?);
            serve_tcp(tasks, listeners, &Api { control: Arc::clone(&control), access });
        }
        // Set once: there is one admin server to a control.
        let _ = control.admin.set(AdminAddresses {
            admin: admin.address.clone(),
            probe: admin.probe.clone(),
            token_file: admin.token_file.clone(),
        });
        Ok(admin)
    }

    /// The file that holds the token which changes need.
    pub fn token_path(&self) -> Option<&std::path::Path> {
        self.token_file.as_deref()
    }
}

/// The configured token, or one made now. None where none can be left: then nothing can be changed.
fn token(configured: Option<&PathBuf>, port: u16) -> Result<(Option<Token>, Option<TokenFile>), TokenError> {
    if let Some(path) = configured {
        return Ok((Some(Token::read(path)?), None));
    }
    match TokenFile::make(port) {
        Ok(file) => {
            tracing::info!(path = %file.path.display(), "changes need the token in this file, which this user alone can read");
            Ok((Some(file.token()), Some(file)))
        }
        Err(error) => {
            // A read-only file system is no reason not to run.
            tracing::warn!(%error, "there is no admin token, so nothing can be changed by the admin server; set [admin] token_file or listen on a Unix socket");
            Ok((None, None))
        }
    }
}

fn serve_tcp(tasks: &mut JoinSet<()>, listeners: Vec<tokio::net::TcpListener>, api: &Api) {
    for listener in listeners {
        tasks.spawn(serve(api.clone(), listener));
    }
}

/// Accepts for ever. Ends, with its connections, when it is dropped.
async fn serve(api: Api, listener: impl listen::Accept) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.next().await {
            Ok(stream) => {
                let connection = connection(stream, api.clone());
                connections.spawn(async move {
                    if timeout(CONNECTION_AGE, connection).await.is_err() {
                        tracing::debug!("an admin connection was closed for its age");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the admin server could not accept");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn connection<S>(stream: S, api: Api) -> impl Future<Output = ()> + Send
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = ServiceBuilder::new()
        .layer(CatchPanicLayer::new())
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, ANSWER_TIMEOUT + api.patience()))
        .layer(RequestBodyLimitLayer::new(BODY))
        .service(service_fn(move |request: Request<tower_http::body::Limited<Incoming>>| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.answer(request).await) }
        }));
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(BODY)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    async move {
        if let Err(error) = served.await {
            tracing::debug!(%error, "an admin connection ended badly");
        }
    }
}
