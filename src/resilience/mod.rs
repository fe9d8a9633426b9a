//! The decisions: small state machines, told the time and the event, answering what to do.
//!
//! Nothing in here opens a socket, awaits, reads a clock or draws a random number: time and randomness come in
//! as arguments. So each policy can be tested over hours in microseconds, and is the very code that runs.
//! The settings of a policy live beside it.

pub mod backoff;
pub mod breaker;
pub mod budget;
pub mod classify;
pub mod deadline;
pub mod fallback;
pub mod fault;
mod growing;
pub mod hedge;
pub mod limit;
pub mod outlier;
pub mod rate;
pub mod retry;
mod window;
