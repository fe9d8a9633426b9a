//! The admin server: state of a running sidecar, and the few changes that are possible at run time.
//!
//! It runs on the control thread, so it cannot delay requests. Connections, their age and body sizes are limited.

mod api;
pub mod breaker;
pub mod cache;
pub mod client;
pub mod deliveries;
pub mod exposition;
mod host_check;
mod listen;
pub mod mirror;
mod probes;
pub mod queues;
pub mod reload;
pub mod split;
pub mod status;
#[cfg(test)]
mod tests;
pub mod token;
pub mod token_status;
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
use token::{AdminToken, AdminTokenError, AdminTokenFile};

/// Concurrent connections per listener; further ones wait to be accepted.
const MAX_CONNECTIONS: usize = 64;
/// The limit for receiving a request head, and for an idle connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// The limit for a response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection is closed after this time, so that a stalled client does not occupy a slot for ever.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(300);
/// The largest request body and head, in bytes.
const MAX_BODY: usize = 16 << 10;
/// The pause after accept failed, e.g. without free file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A running admin server. Dropping it stops the server and removes its files.
#[derive(Debug)]
pub struct Admin {
    /// `host:port`, or `unix:PATH`.
    pub address: String,
    /// The address of the probe listener (`/live`, `/ready`, `/metrics`).
    pub probe: Option<String>,
    token_file: Option<PathBuf>,
    _created_token: Option<AdminTokenFile>,
    _socket: Option<listen::SocketFile>,
    _tasks: JoinSet<()>,
}

#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("cannot listen on {address} ({what}): {source}")]
    Listen { what: &'static str, address: String, source: io::Error },
    #[error(transparent)]
    Token(#[from] AdminTokenError),
    #[error("invalid OUTRIGGER_PROBES: {0}")]
    Probes(String),
}

impl Admin {
    /// Binds and serves. Must run inside the control runtime.
    pub fn start(settings: &config::Admin, control: Arc<Control>) -> Result<Self, AdminError> {
        let mut admin = Self {
            address: settings.listen.to_string(),
            probe: None,
            token_file: None,
            _created_token: None,
            _socket: None,
            _tasks: JoinSet::new(),
        };
        let tasks = &mut admin._tasks;
        let listen_error = |what, address: &dyn std::fmt::Display| {
            let address = address.to_string();
            move |source| AdminError::Listen { what, address, source }
        };
        match &settings.listen {
            config::AdminListen::Unix(path) => {
                let (listener, file) =
                    listen::unix(path).map_err(listen_error("[admin] listen", &settings.listen))?;
                admin._socket = Some(file);
                let api = Api { control: Arc::clone(&control), access: Access::All };
                tasks.spawn(serve(api, listener));
            }
            config::AdminListen::Tcp(address) => {
                let listeners = listen::tcp(address).map_err(listen_error("[admin] listen", address))?;
                let bound: Vec<_> = listeners.iter().filter_map(|l| l.local_addr().ok()).collect();
                control.shared.own_addresses.add(&bound);
                let first = bound.first();
                admin.address = first.map(ToString::to_string).unwrap_or_default();
                let (token, created) = token(settings.token_file.as_ref(), first.map_or(0, |a| a.port()))?;
                admin.token_file =
                    settings.token_file.clone().or_else(|| created.as_ref().map(|file| file.path.clone()));
                admin._created_token = created;
                let api = Api { control: Arc::clone(&control), access: Access::Token(token) };
                serve_tcp(tasks, listeners, &api);
            }
        }
        if let Some(address) = &settings.probe_listen {
            let listeners = listen::tcp(address).map_err(listen_error("[admin] probe_listen", address))?;
            let bound: Vec<_> = listeners.iter().filter_map(|l| l.local_addr().ok()).collect();
            control.shared.own_addresses.add(&bound);
            admin.probe = bound.first().map(ToString::to_string);
            let access = Access::Probe(Probes::from_env(config::process_env)?);
            serve_tcp(tasks, listeners, &Api { control: Arc::clone(&control), access });
        }
        // Set once: a control has one admin server.
        let _ = control.admin.set(AdminAddresses {
            admin: admin.address.clone(),
            probe: admin.probe.clone(),
            token_file: admin.token_file.clone(),
        });
        Ok(admin)
    }

    /// The file with the admin token.
    pub fn token_path(&self) -> Option<&std::path::Path> {
        self.token_file.as_deref()
    }
}

/// The configured token, or a new one. `None` if its file cannot be written: then nothing can be changed.
fn token(
    configured: Option<&PathBuf>,
    port: u16,
) -> Result<(Option<AdminToken>, Option<AdminTokenFile>), AdminTokenError> {
    if let Some(path) = configured {
        return Ok((Some(AdminToken::read(path)?), None));
    }
    match AdminTokenFile::create(port) {
        Ok(file) => {
            tracing::info!(path = %file.path.display(), "changes need the token in this file, which only this user can read");
            Ok((Some(file.token()), Some(file)))
        }
        Err(error) => {
            // A read-only file system must not prevent the start.
            tracing::warn!(%error, "cannot create an admin token, so the admin server rejects all changes; set [admin] token_file or listen on a Unix socket");
            Ok((None, None))
        }
    }
}

fn serve_tcp(tasks: &mut JoinSet<()>, listeners: Vec<tokio::net::TcpListener>, api: &Api) {
    for listener in listeners {
        tasks.spawn(serve(api.clone(), listener));
    }
}

/// Accepts connections until it is dropped, which closes them.
async fn serve(api: Api, listener: impl listen::Accept) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.next().await {
            Ok(stream) => {
                let connection = connection(stream, api.clone());
                connections.spawn(async move {
                    if timeout(MAX_CONNECTION_AGE, connection).await.is_err() {
                        tracing::debug!("admin connection closed: maximum age reached");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the admin server cannot accept a connection");
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
        .layer(TimeoutLayer::with_status_code(
            StatusCode::GATEWAY_TIMEOUT,
            RESPONSE_TIMEOUT + api.extra_timeout(),
        ))
        .layer(RequestBodyLimitLayer::new(MAX_BODY))
        .service(service_fn(move |request: Request<tower_http::body::Limited<Incoming>>| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.respond(request).await) }
        }));
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_BODY)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    async move {
        if let Err(error) = served.await {
            tracing::debug!(%error, "admin connection failed");
        }
    }
}
