//! The API server as a pod reaches it: HTTPS with the token and CA of the service account.

use std::{
    env,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Request, StatusCode, header::AUTHORIZATION};
use tokio::time::{Instant, timeout_at};

use super::slices::{ApiStatus, SliceList, WatchEvent};
use crate::{
    fetch::{FetchLimits, Fetcher, ResponseStream},
    upstream::DiscoveryError,
};

/// The directory of the service account, if it is another than that of a pod: for tests and for `kubectl proxy`.
const ACCOUNT_ENV: &str = "OUTRIGGER_SERVICE_ACCOUNT";
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The URL of another API server than that of the cluster.
const API_ENV: &str = "OUTRIGGER_KUBERNETES_API";
/// Limits for a list: a thousand endpoints are half a megabyte.
const LIST: FetchLimits = FetchLimits { timeout: Duration::from_secs(20), max_body: 32 << 20 };
/// The longest line of a watch: an object has at most a megabyte and a half.
const MAX_EVENT: usize = 4 << 20;
/// After this time the server ends a watch, and it is resumed.
const WATCH_SECONDS: u64 = 290;
/// A watch that has not ended by then is considered broken.
const WATCH_DEADLINE: Duration = Duration::from_secs(WATCH_SECONDS + 20);

/// Queries the slices of one service.
#[derive(Debug)]
pub struct EndpointSliceApi {
    fetcher: Fetcher,
    namespace: String,
    service: String,
}

/// Why a list or a watch failed.
#[derive(Debug)]
pub enum KubernetesApiError {
    /// The server no longer has the events after the given version (410).
    VersionExpired,
    Failed(String),
}

impl EndpointSliceApi {
    pub fn new(fetcher: Fetcher, namespace: String, service: String) -> Self {
        Self { fetcher, namespace, service }
    }

    pub fn failed(&self, reason: String) -> DiscoveryError {
        let service = format!("{}/{}", self.namespace, self.service);
        DiscoveryError::Kubernetes { service, reason }
    }

    pub async fn list(&self) -> Result<SliceList, KubernetesApiError> {
        let response = self.fetcher()?.fetch(self.request("")?, LIST).await;
        let response = response.map_err(|error| KubernetesApiError::Failed(error.to_string()))?;
        if response.status() != StatusCode::OK {
            return Err(api_error(response.status(), response.body()));
        }
        serde_json::from_slice(response.body()).map_err(|error| {
            KubernetesApiError::Failed(format!("the list of the API server cannot be parsed: {error}"))
        })
    }

    /// Watches the events after a version.
    pub async fn watch(&self, version: &str) -> Result<Watch, KubernetesApiError> {
        let query = format!(
            "&watch=1&allowWatchBookmarks=true&resourceVersion={version}&timeoutSeconds={WATCH_SECONDS}"
        );
        let response = self.fetcher()?.stream(self.request(&query)?, LIST.timeout).await;
        let response = response.map_err(|error| KubernetesApiError::Failed(error.to_string()))?;
        let status = response.status();
        if status != StatusCode::OK {
            return Err(api_error(status, &[]));
        }
        Ok(Watch { stream: response.into_body(), line: BytesMut::new(), started: Instant::now() })
    }

    fn request(&self, query: &str) -> Result<Request<Bytes>, KubernetesApiError> {
        let (namespace, service) = (&self.namespace, &self.service);
        let url = format!(
            "{}/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices\
             ?labelSelector=kubernetes.io%2Fservice-name%3D{service}{query}",
            api_server_url()?
        );
        // Read each time, because the kubelet renews it.
        let path = service_account_dir().join("token");
        let token = std::fs::read_to_string(&path).map_err(|error| {
            KubernetesApiError::Failed(format!(
                "{}: {error}; is the service account's token mounted?",
                path.display()
            ))
        })?;
        let bearer = HeaderValue::try_from(format!("Bearer {}", token.trim())).map_err(|_| {
            KubernetesApiError::Failed(format!("{}: the file does not contain a token", path.display()))
        })?;
        let mut request = Request::get(url)
            .body(Bytes::new())
            .map_err(|error| KubernetesApiError::Failed(error.to_string()))?;
        request.headers_mut().insert(AUTHORIZATION, bearer);
        Ok(request)
    }

    /// With the current CA of the cluster.
    fn fetcher(&self) -> Result<Fetcher, KubernetesApiError> {
        let path: PathBuf = service_account_dir().join("ca.crt");
        self.fetcher.with_roots_from(&path).map_err(|error| KubernetesApiError::Failed(error.to_string()))
    }
}

fn service_account_dir() -> PathBuf {
    env::var_os(ACCOUNT_ENV).map_or_else(|| Path::new(ACCOUNT).to_owned(), PathBuf::from)
}

fn api_server_url() -> Result<String, KubernetesApiError> {
    if let Ok(url) = env::var(API_ENV) {
        return Ok(url.trim_end_matches('/').to_owned());
    }
    let (Ok(host), Ok(port)) = (env::var("KUBERNETES_SERVICE_HOST"), env::var("KUBERNETES_SERVICE_PORT"))
    else {
        return Err(KubernetesApiError::Failed(format!(
            "not running in a pod: KUBERNETES_SERVICE_HOST is not set (outside of a cluster, set {API_ENV} \
             to the URL of an API server)"
        )));
    };
    Ok(if host.contains(':') { format!("https://[{host}]:{port}") } else { format!("https://{host}:{port}") })
}

fn api_error(status: StatusCode, body: &[u8]) -> KubernetesApiError {
    let failure: ApiStatus = serde_json::from_slice(body).unwrap_or_default();
    let help = match status {
        StatusCode::GONE => return KubernetesApiError::VersionExpired,
        StatusCode::UNAUTHORIZED => "; is the token of the service account from this cluster?",
        StatusCode::FORBIDDEN => {
            "; allow the service account to list and watch endpointslices in that namespace"
        }
        _ => "",
    };
    let separator = if failure.message.is_empty() { "" } else { ": " };
    KubernetesApiError::Failed(format!(
        "the API server responded with {}{separator}{}{help}",
        status.as_u16(),
        failure.message
    ))
}

/// An open watch. A partly read line is kept if `next` is cancelled.
#[derive(Debug)]
pub struct Watch {
    stream: ResponseStream,
    line: BytesMut,
    pub started: Instant,
}

impl Watch {
    /// The next event; none when the server has ended the watch, which it does regularly.
    pub async fn next(&mut self) -> Result<Option<WatchEvent>, String> {
        loop {
            if let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let line = self.line.split_to(end + 1);
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|error| format!("an event cannot be parsed: {error}"));
            }
            if self.line.len() > MAX_EVENT {
                return Err(format!("an event is longer than {MAX_EVENT} bytes"));
            }
            let chunk = timeout_at(self.started + WATCH_DEADLINE, self.stream.chunk()).await;
            match chunk.map_err(|_| "the watch did not end in time".to_owned())?.map_err(|e| e.to_string())? {
                Some(bytes) => self.line.extend_from_slice(&bytes),
                None => return Ok(None),
            }
        }
    }
}
