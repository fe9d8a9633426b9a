//! The resilience decisions: small state machines that get the time and an event, and return what to do.
//!
//! Nothing here opens a socket, awaits, reads a clock or draws a random number: time and randomness are
//! arguments. Tests therefore run the production code over hours of virtual time in microseconds.
//! The settings of a policy live beside it. `docs/resilience.md` describes what each policy does and why.
//!
//! All workers share many of the policies. Those have two layers: a plain state machine (`&mut self`), and around
//! it atomics for successful requests and a short lock for failures and transitions (`&self`). The lock is never
//! held across an await.

pub mod adaptive;
pub mod backoff;
pub mod breaker;
pub mod budget;
pub mod cache;
pub mod classify;
pub mod deadline;
pub mod deprecation;
pub mod fallback;
pub mod fault;
mod growing_duration;
mod grpc;
pub mod hedge;
pub mod http2_abuse;
pub mod limit;
pub mod mirror;
pub mod observe;
pub mod outlier;
pub mod queue;
pub mod rate;
pub mod retry;
pub mod split;
pub mod window;

#[cfg(test)]
mod storm_tests;
