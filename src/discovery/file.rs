//! A file that lists endpoints, kept by something else: a JSON array of `"HOST:PORT"` or
//! `{"address": "HOST:PORT", "weight": N}`.
//!
//! Noticed within moments where the system reports changes, else within [`File::POLL`]. While somebody writes to the file,
//! what it held before stays in use.

use std::{
    path::{Path, PathBuf},
    slice,
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;
use tokio::{io::AsyncReadExt, sync::Notify};

use super::source::Target;
use crate::{config::HostPort, upstream::DiscoveryError, watch::Observer};

pub(super) struct File {
    path: PathBuf,
    changed: Arc<Notify>,
    observer: Option<Observer>,
    /// What was read last.
    last: Option<Vec<Target>>,
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
        Self { path, changed: Arc::default(), observer: None, last: None }
    }

    pub async fn read(&mut self) -> Result<Vec<Target>, DiscoveryError> {
        if let (true, Some(last)) = (self.is_being_written(), &self.last) {
            return Ok(last.clone());
        }
        let path = self.path.clone();
        let failed = |reason: String| DiscoveryError::File { path: path.clone(), reason };
        let mut content = Vec::new();
        let file = tokio::fs::File::open(&self.path).await.map_err(|error| failed(error.to_string()))?;
        // One byte more than allowed tells a file of just that size from a larger one.
        let reading = file.take(Self::MAX_SIZE + 1).read_to_end(&mut content).await;
        reading.map_err(|error| failed(error.to_string()))?;
        if content.len() as u64 > Self::MAX_SIZE {
            return Err(failed(format!("larger than {} bytes", Self::MAX_SIZE)));
        }
        let targets = parse(&content).map_err(failed)?;
        self.last = Some(targets.clone());
        Ok(targets)
    }

    /// Waits until something happens in the file's directory.
    pub async fn changed(&mut self) {
        self.changed.notified().await;
    }

    fn is_being_written(&mut self) -> bool {
        let (path, changed) = (&self.path, &self.changed);
        let observer = self.observer.get_or_insert_with(|| {
            let changed = Arc::clone(changed);
            Observer::new(slice::from_ref(path), move || changed.notify_one())
        });
        // The directory may come later than we do, and links may lead elsewhere now.
        observer.refresh();
        observer.being_written().is_some()
    }
}

/// What is wrong with a file of endpoints.
pub(super) fn check(path: &Path) -> Result<(), String> {
    let content = std::fs::read(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
        _ => error.to_string(),
    })?;
    parse(&content).map(drop)
}

fn parse(content: &[u8]) -> Result<Vec<Target>, String> {
    if content.trim_ascii().is_empty() {
        return Err("the file is empty; a list without endpoints is `[]`".to_owned());
    }
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
