//! Telemetry: log, access log, metrics, traces, and the record of each request that they are made of.

pub mod access_log;
pub mod export;
pub mod log;
pub mod metrics;
pub mod process;
pub mod record;
pub mod reporter;
pub mod requests;
pub mod spans;
pub mod timestamp;
pub mod traces;
pub mod verdict;
