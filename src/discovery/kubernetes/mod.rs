//! The endpoints of a Kubernetes service: its EndpointSlices, listed and watched.
//!
//! Only services that the configuration names are queried, and of their slices only addresses are stored. A watch is
//! resumed where it ended; if the server no longer has the events since (410), the list is read again. Without the
//! server the last good set stays in use, and requests to it are retried with back-off and jitter: see
//! [`super::task`].

mod api;
mod slices;

use std::{env, time::Duration};

use tokio::time::{Instant, sleep_until};

use super::source::UnresolvedEndpoint;
use crate::{fetch::Fetcher, upstream::DiscoveryError};
use api::{EndpointSliceApi, KubernetesApiError, Watch};
use slices::{ApiStatus, EndpointSlice, EventKind, Metadata, ServiceSlices, WatchEvent};

/// The zone this proxy runs in, for the zone hints of endpoints.
const ZONE_ENV: &str = "OUTRIGGER_ZONE";
/// The status code of an expired resource version.
const EXPIRED: u16 = 410;
/// The shortest time between the starts of two watches.
const MIN_WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// The endpoints of one service.
#[derive(Debug)]
pub struct KubernetesSource {
    api: EndpointSliceApi,
    slices: ServiceSlices,
    /// The resource version of the slices; none: they must be listed.
    version: Option<String>,
    watch: Option<Watch>,
    /// When to resume a watch that has ended.
    resume_at: Option<Instant>,
}

impl KubernetesSource {
    pub fn new(fetcher: Fetcher, namespace: String, service: String, port: String) -> Self {
        let zone = env::var(ZONE_ENV).ok().filter(|zone| !zone.is_empty());
        Self {
            api: EndpointSliceApi::new(fetcher, namespace, service),
            slices: ServiceSlices::new(port, zone),
            version: None,
            watch: None,
            resume_at: None,
        }
    }

    /// The current endpoints. Lists them, or resumes the watch, if necessary.
    pub async fn read(&mut self) -> Result<Vec<UnresolvedEndpoint>, DiscoveryError> {
        self.resume_at = None;
        // A version that was just listed is too old at most once.
        for _ in 0..2 {
            match self.catch_up().await {
                Ok(()) => {
                    return self.slices.targets().map_err(|error| self.api.failed(error.to_string()));
                }
                Err(KubernetesApiError::VersionExpired) => self.version = None,
                Err(KubernetesApiError::Failed(reason)) => return Err(self.api.failed(reason)),
            }
        }
        Err(self.api.failed("the resource version that was just listed is too old to be watched".to_owned()))
    }

    async fn catch_up(&mut self) -> Result<(), KubernetesApiError> {
        if self.watch.is_some() {
            return Ok(());
        }
        let version = match &self.version {
            Some(version) => version.clone(),
            None => {
                let list = self.api.list().await?;
                self.slices.replace(&list.items);
                self.version.insert(list.metadata.resource_version).clone()
            }
        };
        self.watch = Some(self.api.watch(&version).await?);
        Ok(())
    }

    /// Waits until something has changed, or the watch has ended and is to be resumed. Cancel-safe.
    pub async fn changed(&mut self) {
        loop {
            let Some(watch) = &mut self.watch else {
                return match self.resume_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                };
            };
            let started = watch.started;
            let next = match watch.next().await {
                Ok(Some(event)) => self.apply_event(event),
                Ok(None) => Err("the server has ended it".to_owned()),
                Err(reason) => Err(reason),
            };
            match next {
                Ok(false) => {}
                Ok(true) => return,
                Err(reason) => {
                    tracing::debug!(reason, "restarting the watch of endpoints");
                    // A server that ends each watch at once is not queried without a pause.
                    self.resume_at = Some(started + MIN_WATCH_INTERVAL);
                    self.watch = None;
                }
            }
        }
    }

    /// Applies an event. Returns whether the endpoints have changed, or why the watch cannot continue.
    fn apply_event(&mut self, event: WatchEvent) -> Result<bool, String> {
        let unreadable = |error: serde_json::Error| format!("an event cannot be read: {error}");
        let (changed, metadata) = match event.kind {
            EventKind::Added | EventKind::Modified => {
                let slice: EndpointSlice = serde_json::from_value(event.object).map_err(unreadable)?;
                (self.slices.update(&slice), slice.metadata)
            }
            EventKind::Deleted => {
                let slice: EndpointSlice = serde_json::from_value(event.object).map_err(unreadable)?;
                (self.slices.remove(&slice.metadata.name), slice.metadata)
            }
            EventKind::Bookmark => {
                let mut object = event.object;
                let metadata: Metadata =
                    serde_json::from_value(object["metadata"].take()).map_err(unreadable)?;
                (false, metadata)
            }
            EventKind::Error => {
                let failure: ApiStatus = serde_json::from_value(event.object).unwrap_or_default();
                if failure.code == EXPIRED {
                    self.version = None;
                }
                return Err(failure.message);
            }
            EventKind::Unknown => return Ok(false),
        };
        if !metadata.resource_version.is_empty() {
            self.version = Some(metadata.resource_version);
        }
        Ok(changed)
    }
}
