//! A file that lists endpoints, maintained by another program: a JSON array of `"HOST:PORT"` or
//! `{"address": "HOST:PORT", "weight": N}`.
//!
//! Changes are noticed within moments if the system reports them, else within [`EndpointFile::POLL`]. While a program is
//! writing the file, the previous content stays in use.

use std::{
    path::{Path, PathBuf},
    slice,
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;
use tokio::{io::AsyncReadExt, sync::Notify};

use super::source::UnresolvedEndpoint;
use crate::{config::HostPort, upstream::DiscoveryError, watch::FileObserver};

pub(super) struct EndpointFile {
    path: PathBuf,
    changed: Arc<Notify>,
    observer: Option<FileObserver>,
    /// The targets of the last successful read.
    last: Option<Vec<UnresolvedEndpoint>>,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "an entry must be \"HOST:PORT\" or {\"address\": \"HOST:PORT\", \"weight\": N}"
)]
enum EndpointEntry {
    Address(HostPort),
    Weighted(WeightedEntry),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WeightedEntry {
    address: HostPort,
    #[serde(default = "one")]
    weight: std::num::NonZeroU16,
}

fn one() -> std::num::NonZeroU16 {
    std::num::NonZeroU16::MIN
}

impl EndpointFile {
    /// How often the file is read if changes are not reported.
    pub const POLL: Duration = Duration::from_secs(5);
    /// A larger file is rejected.
    pub const MAX_SIZE: u64 = 4 << 20;

    pub fn new(path: PathBuf) -> Self {
        Self { path, changed: Arc::default(), observer: None, last: None }
    }

    pub async fn read(&mut self) -> Result<Vec<UnresolvedEndpoint>, DiscoveryError> {
        if let (true, Some(last)) = (self.is_being_written(), &self.last) {
            return Ok(last.clone());
        }
        let path = self.path.clone();
        let file_error = |reason: String| DiscoveryError::File { path: path.clone(), reason };
        let mut content = Vec::new();
        let file = tokio::fs::File::open(&self.path).await.map_err(|error| file_error(error.to_string()))?;
        // One byte more than allowed distinguishes a file of exactly that size from a larger one.
        let reading = file.take(Self::MAX_SIZE + 1).read_to_end(&mut content).await;
        reading.map_err(|error| file_error(error.to_string()))?;
        if content.len() as u64 > Self::MAX_SIZE {
            return Err(file_error(format!("larger than {} bytes", Self::MAX_SIZE)));
        }
        let targets = parse(&content).map_err(file_error)?;
        self.last = Some(targets.clone());
        Ok(targets)
    }

    /// Waits for an event in the file's directory.
    pub async fn changed(&mut self) {
        self.changed.notified().await;
    }

    fn is_being_written(&mut self) -> bool {
        let (path, changed) = (&self.path, &self.changed);
        let observer = self.observer.get_or_insert_with(|| {
            let changed = Arc::clone(changed);
            FileObserver::new(slice::from_ref(path), move || changed.notify_one())
        });
        // The directory may be created later, and symbolic links may have changed.
        observer.refresh();
        observer.file_being_written().is_some()
    }
}

/// Checks a file of endpoints.
pub(super) fn check(path: &Path) -> Result<(), String> {
    let content = std::fs::read(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
        _ => error.to_string(),
    })?;
    parse(&content).map(drop)
}

fn parse(content: &[u8]) -> Result<Vec<UnresolvedEndpoint>, String> {
    if content.trim_ascii().is_empty() {
        return Err("the file is empty; a list without endpoints is `[]`".to_owned());
    }
    let entries: Vec<serde_json::Value> =
        serde_json::from_slice(content).map_err(|error| format!("not a JSON list: {error}"))?;
    let target = |(index, value): (usize, serde_json::Value)| {
        let shown = value.to_string();
        let entry =
            EndpointEntry::deserialize(value).map_err(|error| format!("entry {index}, {shown}: {error}"))?;
        Ok(match entry {
            EndpointEntry::Address(address) => UnresolvedEndpoint::new(address, 1),
            EndpointEntry::Weighted(WeightedEntry { address, weight }) => {
                UnresolvedEndpoint::new(address, weight.get().into())
            }
        })
    };
    entries.into_iter().enumerate().map(target).collect()
}
