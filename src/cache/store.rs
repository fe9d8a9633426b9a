//! The store: responses by key, bounded in bytes.
//!
//! A key is text of several lines, of which the second is the URL; see `src/proxy/cached/key.rs`. Behind a key are the
//! variants that `Vary` distinguishes. Invalidation does not search: each URL belongs to a slot with a number that is
//! raised; a variant is valid while its slot has the number that it was stored with. So an unsafe request invalidates
//! the variants of all identities, and responses that were on their way meanwhile are not stored.

use std::{
    borrow::Borrow,
    collections::hash_map::RandomState,
    hash::BuildHasher,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use moka::{notification::RemovalCause, ops::compute::Op, sync::Cache};
use serde::{Deserialize, Serialize};

use super::flight::Flights;
use crate::resilience::cache::{freshness::Timing, vary::Selection};

/// The variants that are kept of one key. The oldest goes first.
const MAX_VARIANTS: usize = 32;
/// The slots of URLs. Two URLs in one slot invalidate each other.
const SLOTS: usize = 1 << 14;
/// What a key and a variant take beside their texts.
const OVERHEAD: usize = 512;
/// For how long a key is not waited for after a response that cannot be shared.
pub const ALONE_FOR: Duration = Duration::from_secs(120);
/// The most entries that are listed.
const MAX_LISTED: usize = 10_000;

/// A key, as bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key(Arc<[u8]>);

impl Borrow<[u8]> for Key {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

/// A stored response.
#[derive(Debug)]
pub struct Entry {
    pub status: StatusCode,
    pub headers: HeaderMap,
    /// Shared with every client that gets it.
    pub body: Bytes,
    pub timing: Timing,
    pub selection: Selection,
    pub stored_at: SystemTime,
}

impl Entry {
    fn size(&self) -> usize {
        let headers = self.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 64);
        self.body.len() + headers.sum::<usize>() + self.selection.size() + OVERHEAD
    }
}

#[derive(Clone, Debug)]
struct Variant {
    entry: Arc<Entry>,
    epoch: u64,
}

/// What is known of a key.
#[derive(Clone, Debug, Default)]
struct Resource {
    /// The newest first.
    variants: Vec<Variant>,
    /// Until when requests do not wait for each other.
    alone_until: Option<Instant>,
}

/// What the store has for a request.
#[derive(Debug, Default)]
pub struct Found {
    pub entry: Option<Arc<Entry>>,
    /// What the newest variant of the key was selected by, where the request has other values.
    pub other: Option<Arc<Entry>>,
    /// A recent response to it could not be shared: do not wait for another request.
    pub alone: bool,
}

/// The state of a URL when a fetch began. A response is stored only if nothing was invalidated since.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    slot: usize,
    epoch: u64,
    purges: u64,
}

/// A stored response as it is listed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Listed {
    pub upstream: String,
    pub url: String,
    pub status: u16,
    pub bytes: u64,
    pub age_seconds: u64,
    /// Negative: stale.
    pub ttl_seconds: i64,
    /// The fields that select it (`Vary`).
    pub vary: Vec<String>,
    /// Stored for one peer identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
}

/// Stored responses.
#[derive(Debug)]
pub struct Store {
    cache: ArcSwap<Cache<Key, Arc<Resource>>>,
    max_bytes: AtomicU64,
    evictions: Arc<AtomicU64>,
    epochs: Box<[AtomicU64]>,
    purges: AtomicU64,
    /// Written while `resize` copies: what changes the old cache meanwhile would be lost, and what is purged kept.
    resizing: RwLock<()>,
    hasher: RandomState,
    /// Bytes of responses that are on their way into the store.
    filling: AtomicU64,
    pub flights: Flights,
}

impl Store {
    pub fn new(max_bytes: u64) -> Self {
        let evictions = Arc::default();
        Self {
            cache: ArcSwap::from_pointee(build(max_bytes, &evictions)),
            max_bytes: AtomicU64::new(max_bytes),
            evictions,
            epochs: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            purges: AtomicU64::new(0),
            resizing: RwLock::default(),
            hasher: RandomState::new(),
            filling: AtomicU64::new(0),
            flights: Flights::default(),
        }
    }

    /// Sets the bound; what fits stays.
    pub fn resize(&self, max_bytes: u64) {
        if self.max_bytes.swap(max_bytes, Ordering::Relaxed) == max_bytes {
            return;
        }
        let _resizing = self.resizing.write().unwrap_or_else(PoisonError::into_inner);
        let old = self.cache.load_full();
        let new = build(max_bytes, &self.evictions);
        for (key, resource) in old.iter() {
            new.insert((*key).clone(), resource);
            new.run_pending_tasks();
        }
        self.cache.store(Arc::new(new));
    }

    pub fn max_bytes(&self) -> u64 {
        self.max_bytes.load(Ordering::Relaxed)
    }

    /// The bytes that stored responses take.
    pub fn bytes(&self) -> u64 {
        let cache = self.cache.load();
        cache.run_pending_tasks();
        cache.weighted_size()
    }

    /// The number of keys.
    pub fn keys(&self) -> u64 {
        self.cache.load().entry_count()
    }

    pub fn evictions(&self) -> u64 {
        self.evictions.load(Ordering::Relaxed)
    }

    fn slot(&self, url: &[u8]) -> usize {
        // Scheme and case of the host do not distinguish what one resource is.
        let rest = url.windows(3).position(|three| three == b"://").map_or(url, |at| &url[at + 3..]);
        let end = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
        let (host, path) = rest.split_at(end);
        let hash = self.hasher.hash_one((host.to_ascii_lowercase(), path));
        usize::try_from(hash % SLOTS as u64).unwrap_or_default()
    }

    fn epoch(&self, slot: usize) -> u64 {
        self.epochs.get(slot).map_or(0, |epoch| epoch.load(Ordering::Acquire))
    }

    /// To be taken before a fetch is sent.
    pub fn ticket(&self, key: &[u8]) -> Ticket {
        let slot = self.slot(url_of(key));
        Ticket { slot, epoch: self.epoch(slot), purges: self.purges.load(Ordering::Acquire) }
    }

    /// What is stored for a request.
    pub fn find(&self, key: &[u8], request: &HeaderMap) -> Found {
        let Some(resource) = self.cache.load().get(key) else { return Found::default() };
        let epoch = self.epoch(self.slot(url_of(key)));
        let mut valid = resource.variants.iter().filter(|variant| variant.epoch == epoch).map(|it| &it.entry);
        let entry = valid.clone().find(|entry| entry.selection.matches(request)).cloned();
        let other = if entry.is_none() { valid.next().cloned() } else { None };
        let alone = resource.alone_until.is_some_and(|until| Instant::now() < until);
        Found { entry, other, alone }
    }

    /// Stores a response in place of the variant with the same selection; false where its URL was invalidated meanwhile.
    pub fn insert(&self, key: &[u8], entry: &Arc<Entry>, ticket: Ticket, alone: bool) -> bool {
        if self.epoch(ticket.slot) != ticket.epoch || self.purges.load(Ordering::Acquire) != ticket.purges {
            return false;
        }
        let until = alone.then(|| Instant::now() + ALONE_FOR);
        self.change(key, |resource| {
            resource
                .variants
                .retain(|old| old.epoch == ticket.epoch && old.entry.selection != entry.selection);
            resource.variants.insert(0, Variant { entry: Arc::clone(entry), epoch: ticket.epoch });
            resource.variants.truncate(MAX_VARIANTS);
            resource.alone_until = until;
        });
        // A purge that began meanwhile may have passed this key already.
        if self.purges.load(Ordering::Acquire) != ticket.purges {
            self.cache.load().invalidate(key);
            return false;
        }
        true
    }

    /// Forgets what is stored for a request, which got a response that may not be stored. `alone`: nor shared.
    pub fn forget(&self, key: &[u8], request: &HeaderMap, alone: bool) {
        let known = self.cache.load().contains_key(key);
        if !known && !alone {
            return;
        }
        let until = alone.then(|| Instant::now() + ALONE_FOR);
        self.change(key, |resource| {
            resource.variants.retain(|variant| !variant.entry.selection.matches(request));
            resource.alone_until = until;
        });
    }

    fn change(&self, key: &[u8], change: impl FnOnce(&mut Resource)) {
        let _unless_resizing = self.resizing.read().unwrap_or_else(PoisonError::into_inner);
        let cache = self.cache.load();
        cache.entry(Key(key.into())).and_compute_with(|old| {
            let mut resource = old.map(|old| Resource::clone(&old.into_value())).unwrap_or_default();
            change(&mut resource);
            if resource.variants.is_empty() && resource.alone_until.is_none() {
                Op::Remove
            } else {
                Op::Put(Arc::new(resource))
            }
        });
        // At once, or the bound would be exceeded by what has been written since.
        cache.run_pending_tasks();
    }

    /// Invalidates all that is stored for a URL, for every upstream and identity.
    pub fn invalidate(&self, url: &[u8]) {
        if let Some(epoch) = self.epochs.get(self.slot(url)) {
            epoch.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Removes what a pattern names: a URL, or one that ends in `*`. Returns how many responses.
    pub fn purge(&self, pattern: &str) -> u64 {
        let (prefix, is_exact) = match pattern.strip_suffix('*') {
            Some(prefix) => (comparable(prefix.as_bytes()), false),
            None => (comparable(pattern.as_bytes()), true),
        };
        self.remove(|url| {
            let url = comparable(url);
            if is_exact { url == prefix } else { url.starts_with(&prefix) }
        })
    }

    /// Removes everything. Returns how many responses.
    pub fn purge_all(&self) -> u64 {
        self.remove(|_| true)
    }

    fn remove(&self, names: impl Fn(&[u8]) -> bool) -> u64 {
        // First, so that a response on its way is not stored after this.
        self.purges.fetch_add(1, Ordering::AcqRel);
        let _unless_resizing = self.resizing.read().unwrap_or_else(PoisonError::into_inner);
        let cache = self.cache.load();
        let mut removed = 0;
        for (key, resource) in cache.iter() {
            if names(url_of(&key.0)) {
                removed += resource.variants.len() as u64;
                cache.invalidate(key.as_ref());
            }
        }
        cache.run_pending_tasks();
        removed
    }

    /// What is stored, sorted by URL; at most 10,000 responses.
    pub fn list(&self, now: SystemTime) -> Vec<Listed> {
        let mut all = Vec::new();
        for (key, resource) in self.cache.load().iter() {
            let epoch = self.epoch(self.slot(url_of(&key.0)));
            let mut lines = key.0.split(|byte| *byte == b'\n').map(String::from_utf8_lossy);
            let (upstream, url) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
            let identity = lines.next().filter(|identity| !identity.is_empty());
            let upstream = upstream.split_once(' ').map_or(&*upstream, |(_, name)| name);
            for variant in resource.variants.iter().filter(|variant| variant.epoch == epoch) {
                let entry = &variant.entry;
                all.push(Listed {
                    upstream: upstream.to_owned(),
                    url: url.clone().into_owned(),
                    status: entry.status.as_u16(),
                    bytes: entry.body.len() as u64,
                    age_seconds: entry.timing.age(now).as_secs(),
                    ttl_seconds: entry.timing.ttl(now),
                    vary: entry.selection.names().map(ToString::to_string).collect(),
                    identity: identity.as_ref().map(ToString::to_string),
                });
            }
            if all.len() >= MAX_LISTED {
                break;
            }
        }
        all.truncate(MAX_LISTED);
        all.sort_by(|a, b| a.url.cmp(&b.url));
        all
    }

    /// Reserves memory for a response on its way; false: there is none left, so it is not stored.
    pub fn reserve(&self, bytes: u64) -> bool {
        let before = self.filling.fetch_add(bytes, Ordering::Relaxed);
        let fits = before.saturating_add(bytes) <= self.max_bytes();
        if !fits {
            self.release(bytes);
        }
        fits
    }

    pub fn release(&self, bytes: u64) {
        self.filling.fetch_sub(bytes, Ordering::Relaxed);
    }
}

fn build(max_bytes: u64, evictions: &Arc<AtomicU64>) -> Cache<Key, Arc<Resource>> {
    let evictions = Arc::clone(evictions);
    Cache::builder()
        .max_capacity(max_bytes)
        .weigher(|key: &Key, resource: &Arc<Resource>| {
            let variants: usize = resource.variants.iter().map(|variant| variant.entry.size()).sum();
            u32::try_from(key.0.len() + OVERHEAD + variants).unwrap_or(u32::MAX)
        })
        .eviction_listener(move |_, _, cause| {
            if cause == RemovalCause::Size {
                evictions.fetch_add(1, Ordering::Relaxed);
            }
        })
        .build()
}

/// The URL in a key: its second line.
fn url_of(key: &[u8]) -> &[u8] {
    key.split(|byte| *byte == b'\n').nth(1).unwrap_or_default()
}

/// A URL without its scheme, the host in lower case.
fn comparable(url: &[u8]) -> Vec<u8> {
    let rest = url.windows(3).position(|three| three == b"://").map_or(url, |at| &url[at + 3..]);
    let end = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
    let (host, path) = rest.split_at(end);
    [&host.to_ascii_lowercase(), path].concat()
}

#[cfg(test)]
mod tests;
