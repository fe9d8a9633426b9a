//! Outrigger: a sidecar that carries a service's calls, both ways, with retries, breakers, timeouts, and telemetry.

pub mod admin;
pub mod cli;
pub mod config;
pub mod discovery;
pub mod proxy;
pub mod resilience;
pub mod rng;
pub mod runtime;
pub mod telemetry;
pub mod units;
pub mod upstream;
