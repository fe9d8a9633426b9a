//! The API server, as a pod meets it: HTTPS with the service account's token and CA.

use std::{
    env,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Request, StatusCode, header::AUTHORIZATION};
use tokio::time::{Instant, timeout_at};

use super::slices::{Event, Failure, List};
use crate::{
    fetch::{Fetcher, Limits, Streaming},
    upstream::DiscoveryError,
};

/// Where a pod's service account is; another place for tests and for `kubectl proxy`.
const ACCOUNT_ENV: &str = "OUTRIGGER_SERVICE_ACCOUNT";
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Another API server than the cluster's own.
const API_ENV: &str = "OUTRIGGER_KUBERNETES_API";
/// A list: a thousand endpoints are half a megabyte.
const LIST: Limits = Limits { patience: Duration::from_secs(20), answer: 32 << 20 };
/// The longest line of a watch: an object is at most a megabyte and a half.
const LONGEST_EVENT: usize = 4 << 20;
/// After this long the server ends a watch and it is resumed.
const WATCH_SECONDS: u64 = 290;
/// So long after that, a watch that has not ended is dead.
const OVERDUE: Duration = Duration::from_secs(WATCH_SECONDS + 20);

/// Asks for the slices of one service.
#[derive(Debug)]
pub struct Api {
    fetcher: Fetcher,
    namespace: String,
    service: String,
}

/// What a list or a watch came to.
#[derive(Debug)]
pub enum Refused {
    /// The server has forgotten what came after the version that was named (410).
    TooOld,
    Failed(String),
}

impl Api {
    pub fn new(fetcher: Fetcher, namespace: String, service: String) -> Self {
        Self { fetcher, namespace, service }
    }

    pub fn failed(&self, reason: String) -> DiscoveryError {
        let service = format!("{}/{}", self.namespace, self.service);
        DiscoveryError::Kubernetes { service, reason }
    }

    pub async fn list(&self) -> Result<List, Refused> {
        let answer = self.fetcher()?.fetch(self.request("")?, LIST).await;
        let answer = answer.map_err(|error| Refused::Failed(error.to_string()))?;
        if answer.status() != StatusCode::OK {
            return Err(refusal(answer.status(), answer.body()));
        }
        serde_json::from_slice(answer.body())
            .map_err(|error| Refused::Failed(format!("its list cannot be read: {error}")))
    }

    /// Follows what happens after a version.
    pub async fn watch(&self, version: &str) -> Result<Watch, Refused> {
        let query = format!(
            "&watch=1&allowWatchBookmarks=true&resourceVersion={version}&timeoutSeconds={WATCH_SECONDS}"
        );
        let answer = self.fetcher()?.stream(self.request(&query)?, LIST.patience).await;
        let answer = answer.map_err(|error| Refused::Failed(error.to_string()))?;
        let status = answer.status();
        if status != StatusCode::OK {
            return Err(refusal(status, &[]));
        }
        Ok(Watch { stream: answer.into_body(), line: BytesMut::new(), began: Instant::now() })
    }

    fn request(&self, query: &str) -> Result<Request<Bytes>, Refused> {
        let (namespace, service) = (&self.namespace, &self.service);
        let url = format!(
            "{}/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices?labelSelector=kubernetes.io%2Fservice-name%3D{service}{query}",
            server()?
        );
        // Read each time: the kubelet renews it.
        let path = account().join("token");
        let token = std::fs::read_to_string(&path).map_err(|error| {
            Refused::Failed(format!("{}: {error}; is the service account's token mounted?", path.display()))
        })?;
        let bearer = HeaderValue::try_from(format!("Bearer {}", token.trim()))
            .map_err(|_| Refused::Failed(format!("{}: no token in it", path.display())))?;
        let mut request =
            Request::get(url).body(Bytes::new()).map_err(|error| Refused::Failed(error.to_string()))?;
        request.headers_mut().insert(AUTHORIZATION, bearer);
        Ok(request)
    }

    /// Trusts the cluster's CA as it is now.
    fn fetcher(&self) -> Result<Fetcher, Refused> {
        let path: PathBuf = account().join("ca.crt");
        self.fetcher.trusting(&path).map_err(|error| Refused::Failed(error.to_string()))
    }
}

fn account() -> PathBuf {
    env::var_os(ACCOUNT_ENV).map_or_else(|| Path::new(ACCOUNT).to_owned(), PathBuf::from)
}

fn server() -> Result<String, Refused> {
    if let Ok(url) = env::var(API_ENV) {
        return Ok(url.trim_end_matches('/').to_owned());
    }
    let (Ok(host), Ok(port)) = (env::var("KUBERNETES_SERVICE_HOST"), env::var("KUBERNETES_SERVICE_PORT"))
    else {
        return Err(Refused::Failed(format!(
            "this is no pod of a cluster: KUBERNETES_SERVICE_HOST is not set (elsewhere, name an API server in {API_ENV})"
        )));
    };
    Ok(if host.contains(':') { format!("https://[{host}]:{port}") } else { format!("https://{host}:{port}") })
}

fn refusal(status: StatusCode, body: &[u8]) -> Refused {
    let said: Failure = serde_json::from_slice(body).unwrap_or_default();
    let help = match status {
        StatusCode::GONE => return Refused::TooOld,
        StatusCode::UNAUTHORIZED => "; is the service account's token this cluster's?",
        StatusCode::FORBIDDEN => "; may the service account list and watch endpointslices there?",
        _ => "",
    };
    let separator = if said.message.is_empty() { "" } else { ": " };
    Refused::Failed(format!("the API server answered {}{separator}{}{help}", status.as_u16(), said.message))
}

/// A watch that is open. What was read of a line survives when waiting is given up.
#[derive(Debug)]
pub struct Watch {
    stream: Streaming,
    line: BytesMut,
    pub began: Instant,
}

impl Watch {
    /// The next event; none when the server has ended the watch, which it does now and then.
    pub async fn next(&mut self) -> Result<Option<Event>, String> {
        loop {
            if let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let line = self.line.split_to(end + 1);
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|error| format!("an event cannot be read: {error}"));
            }
            if self.line.len() > LONGEST_EVENT {
                return Err(format!("an event is longer than {LONGEST_EVENT} bytes"));
            }
            let chunk = timeout_at(self.began + OVERDUE, self.stream.chunk()).await;
            match chunk
                .map_err(|_| "the watch did not end when it should".to_owned())?
                .map_err(|e| e.to_string())?
            {
                Some(bytes) => self.line.extend_from_slice(&bytes),
                None => return Ok(None),
            }
        }
    }
}
