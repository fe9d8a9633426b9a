//! The endpoints of a Kubernetes service: its EndpointSlices, listed and watched.
//!
//! Only the services that the configuration names are asked for, and of their slices only addresses are kept. A watch is
//! resumed where it ended; where the server has forgotten what came since (410), the list is read anew. Without the server
//! the last good set stays in use, and it is asked again after a while that grows, with jitter: see [`super::task`].

mod api;
mod slices;

use std::{env, time::Duration};

use tokio::time::{Instant, sleep_until};

use super::source::Target;
use crate::{fetch::Fetcher, upstream::DiscoveryError};
use api::{Api, Refused, Watch};
use slices::{Event, Failure, Kind, Metadata, Slice, Slices};

/// The zone this proxy runs in, for the zone hints of endpoints.
const ZONE_ENV: &str = "OUTRIGGER_ZONE";
/// Forgotten.
const GONE: u16 = 410;
/// From one watch to the next, at least.
const PAUSE: Duration = Duration::from_secs(1);

/// One service's endpoints.
#[derive(Debug)]
pub struct Kubernetes {
    api: Api,
    slices: Slices,
    /// Up to where the slices are known; none: they must be listed.
    version: Option<String>,
    watch: Option<Watch>,
    /// When a watch that has ended is to be resumed.
    resume_at: Option<Instant>,
}

impl Kubernetes {
    pub fn new(fetcher: Fetcher, namespace: String, service: String, port: String) -> Self {
        let zone = env::var(ZONE_ENV).ok().filter(|zone| !zone.is_empty());
        Self {
            api: Api::new(fetcher, namespace, service),
            slices: Slices::new(port, zone),
            version: None,
            watch: None,
            resume_at: None,
        }
    }

    /// What is there; lists, or resumes the watch, where that has to be.
    pub async fn read(&mut self) -> Result<Vec<Target>, DiscoveryError> {
        self.resume_at = None;
        // Too old at most once: a version that was just told.
        for _ in 0..2 {
            match self.catch_up().await {
                Ok(()) => {
                    return self.slices.targets().map_err(|error| self.api.failed(error.to_string()));
                }
                Err(Refused::TooOld) => self.version = None,
                Err(Refused::Failed(reason)) => return Err(self.api.failed(reason)),
            }
        }
        Err(self.api.failed("what it has just listed is too old to be watched".to_owned()))
    }

    async fn catch_up(&mut self) -> Result<(), Refused> {
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

    /// Waits until something has changed, or the watch has ended and is to be resumed. Loses nothing when given up.
    pub async fn changed(&mut self) {
        loop {
            let Some(watch) = &mut self.watch else {
                return match self.resume_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                };
            };
            let began = watch.began;
            let next = match watch.next().await {
                Ok(Some(event)) => self.happened(event),
                Ok(None) => Err("it has ended".to_owned()),
                Err(reason) => Err(reason),
            };
            match next {
                Ok(false) => {}
                Ok(true) => return,
                Err(reason) => {
                    tracing::debug!(reason, "the watch of endpoints is begun anew");
                    // A server that ends each watch at once is not asked without a pause.
                    self.resume_at = Some(began + PAUSE);
                    self.watch = None;
                }
            }
        }
    }

    /// Takes an event; whether the endpoints have changed, or why the watch is of no more use.
    fn happened(&mut self, event: Event) -> Result<bool, String> {
        let unreadable = |error: serde_json::Error| format!("an event cannot be read: {error}");
        let (changed, seen) = match event.kind {
            Kind::Added | Kind::Modified => {
                let slice: Slice = serde_json::from_value(event.object).map_err(unreadable)?;
                (self.slices.update(&slice), slice.metadata)
            }
            Kind::Deleted => {
                let slice: Slice = serde_json::from_value(event.object).map_err(unreadable)?;
                (self.slices.remove(&slice.metadata.name), slice.metadata)
            }
            Kind::Bookmark => {
                let mut object = event.object;
                let metadata: Metadata =
                    serde_json::from_value(object["metadata"].take()).map_err(unreadable)?;
                (false, metadata)
            }
            Kind::Error => {
                let failure: Failure = serde_json::from_value(event.object).unwrap_or_default();
                if failure.code == GONE {
                    self.version = None;
                }
                return Err(failure.message);
            }
            Kind::Unknown => return Ok(false),
        };
        if !seen.resource_version.is_empty() {
            self.version = Some(seen.resource_version);
        }
        Ok(changed)
    }
}
