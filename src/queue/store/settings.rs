//! `[store]`: where deliveries are kept.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::ByteSize;

/// `[store]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct StoreSettings {
    /// The directory. One process at a time uses it.
    pub path: PathBuf,
    /// Whether an accepted delivery survives a crash. `memory` keeps nothing on disk.
    pub durability: Durability,
    /// The most that is stored, in all queues together.
    pub max_bytes: ByteSize,
    /// Disk space set aside, and used to deliver and delete when the disk is full.
    pub reserve: ByteSize,
    /// The file with the key for AES-256-GCM: 32 bytes, raw, in hex or base64. Unset: heads and bodies are stored in plain.
    pub key_file: Option<PathBuf>,
}

impl Default for StoreSettings {
    fn default() -> Self {
        Self {
            path: PathBuf::from("/var/lib/outrigger"),
            durability: Durability::Disk,
            max_bytes: ByteSize(1 << 30),
            reserve: ByteSize(4 << 20),
            key_file: None,
        }
    }
}

/// `store.durability`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    #[default]
    Disk,
    Memory,
}
