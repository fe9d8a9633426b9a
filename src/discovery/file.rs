//! A file that lists endpoints, kept by something else: a JSON array of `"HOST:PORT"` or
//! `{"address": "HOST:PORT", "weight": N}`.
//!
//! Noticed within moments where the system reports changes, else within [`File::POLL`]. The directory is watched and
//! not the file: editors and ConfigMaps replace the file (or a link on the way to it) instead of writing to it.

use std::{path::PathBuf, sync::Arc, time::Duration};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use serde::Deserialize;
use tokio::{io::AsyncReadExt, sync::Notify};

use super::{DiscoveryError, source::Target};
use crate::config::HostPort;

pub(super) struct File {
    path: PathBuf,
    changed: Arc<Notify>,
    watcher: Option<RecommendedWatcher>,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "an entry must be \"HOST:PORT\" or {\"address\": \"HOST:PORT\", \"weight\": N}"
)]
enum Entry {
    Address(HostPort),
    Weighted(Weighted),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Weighted {
    address: HostPort,
    #[serde(default = "one")]
    weight: std::num::NonZeroU16,
}

fn one() -> std::num::NonZeroU16 {
    std::num::NonZeroU16::MIN
}

impl File {
    /// How often the file is read where nobody reports changes.
    pub const POLL: Duration = Duration::from_secs(5);
    /// A larger file is refused.
    pub const MAX_SIZE: u64 = 4 << 20;

    pub fn new(path: PathBuf) -> Self {
        Self { path, changed: Arc::default(), watcher: None }
    }

    pub async fn read(&mut self) -> Result<Vec<Target>, DiscoveryError> {
        self.watch();
        let failed = |reason: String| DiscoveryError::File { path: self.path.clone(), reason };
        let mut content = Vec::new();
        let file = tokio::fs::File::open(&self.path).await.map_err(|error| failed(error.to_string()))?;
        // One byte more than allowed tells a file of just that size from a larger one.
        let reading = file.take(Self::MAX_SIZE + 1).read_to_end(&mut content).await;
        reading.map_err(|error| failed(error.to_string()))?;
        if content.len() as u64 > Self::MAX_SIZE {
            return Err(failed(format!("larger than {} bytes", Self::MAX_SIZE)));
        }
        parse(&content).map_err(failed)
    }

    /// Waits until something happens in the file's directory.
    pub async fn changed(&mut self) {
        self.changed.notified().await;
    }

    /// Begins to watch the directory. Tried before every reading, since the directory may come later than we do.
    fn watch(&mut self) {
        let Some(directory) = self.path.parent().filter(|_| self.watcher.is_none()) else { return };
        let changed = self.changed.clone();
        let tell = move |event: notify::Result<Event>| {
            // Our own reading is an event too.
            if !event.is_ok_and(|event| is_reading(event.kind)) {
                changed.notify_one();
            }
        };
        let watcher = notify::recommended_watcher(tell).and_then(|mut watcher| {
            watcher.watch(directory, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match watcher {
            Ok(watcher) => self.watcher = Some(watcher),
            Err(error) => tracing::debug!(path = %directory.display(), %error, "not watched, only polled"),
        }
    }
}

fn is_reading(kind: EventKind) -> bool {
    kind.is_access() && kind != EventKind::Access(AccessKind::Close(AccessMode::Write))
}

fn parse(content: &[u8]) -> Result<Vec<Target>, String> {
    let entries: Vec<serde_json::Value> =
        serde_json::from_slice(content).map_err(|error| format!("not a JSON list: {error}"))?;
    let target = |(index, value): (usize, serde_json::Value)| {
        let shown = value.to_string();
        let entry = Entry::deserialize(value).map_err(|error| format!("entry {index}, {shown}: {error}"))?;
        Ok(match entry {
            Entry::Address(address) => Target::new(address, 1),
            Entry::Weighted(Weighted { address, weight }) => Target::new(address, weight.get().into()),
        })
    };
    entries.into_iter().enumerate().map(target).collect()
}
