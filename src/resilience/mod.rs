//! The decisions: small state machines, told the time and the event, answering what to do.
//!
//! Nothing in here opens a socket, awaits, reads a clock or draws a random number: time and randomness come in
//! as arguments. So each policy can be tested over hours in microseconds, and is the very code that runs.
//! The settings of a policy live beside it. What each does and why is told in `docs/resilience.md`.
//!
//! Many policies are shared by all workers. Those have two layers: a plain machine (`&mut self`), and around it
//! atomics for calls that go well and a short lock for failures and transitions (`&self`). The lock is never held
//! across anything that waits.

pub mod adaptive;
pub mod backoff;
pub mod breaker;
pub mod budget;
pub mod classify;
pub mod conduct;
pub mod deadline;
pub mod fallback;
pub mod fault;
mod growing;
mod grpc;
pub mod hedge;
pub mod limit;
pub mod observe;
pub mod outlier;
pub mod rate;
pub mod retry;
pub mod window;

#[cfg(test)]
mod storm_tests;
