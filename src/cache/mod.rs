//! Stored responses, in memory, shared by all workers: the store, requests that wait for one fetch, and bodies that are
//! read while they arrive. What may be stored and reused is decided in `src/resilience/cache.rs`.

pub mod fill;
pub mod flight;
pub mod reservation;
pub mod store;

pub use store::{Entry, Listed, Store};
