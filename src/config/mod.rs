//! The configuration: reads, merges, resolves and checks the user's files.
//!
//! ```text
//! files ──parse──▶ trees with origins ──merge──▶ one tree ──resolve──▶ [`Config`] ──validate, lint──▶ [`LoadedConfig`]
//! ```
//!
//! Inheritance (`[defaults]` → `[[upstream]]` → `[[upstream.route]]`) is the same key-by-key merge as that of
//! several files. It works on the tree, so every effective value keeps the file and line that set it.

mod address;
mod agent;
mod confirm;
mod diagnostic;
mod document;
mod effective;
mod environment;
mod hints;
mod lint;
mod load;
mod merge;
mod node;
mod parse;
mod policy;
mod provenance;
mod queues;
mod read;
mod resolve;
mod restart;
mod route;
mod schema;
mod security;
mod source;
mod user_timeout;
mod validate;
mod watch;

pub use address::{AdminListen, HostMatch, HostPattern, HostPort, ListenAddr, Network};
pub use agent::{AgentAddress, InvalidAgentAddress};
pub use confirm::{Revision, confirmation_reasons};
pub use diagnostic::{Diagnostics, MAX_PROBLEMS, Problem, Severity, did_you_mean};
pub use document::{EXAMPLE, json_schema};
pub use effective::tree as effective_tree;
pub use load::{ExaminedConfig, LoadedConfig, config_files, examine, load, load_sources, process_env};
pub use node::{Node, NodeEntry, Table, Value};
pub use parse::Env;
pub use policy::{AttemptTimeout, Policy};
pub use provenance::{Scope, Setting};
pub use restart::keys_needing_restart;
pub use route::*;
pub use schema::*;
pub use security::*;
pub use source::{FilePosition, MAX_FILE_BYTES, Origin, Source, Sources};
pub use user_timeout::UserTimeout;
pub use watch::{Watcher, watch};
