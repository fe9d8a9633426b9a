//! What a user would see: the real binary, real sockets, real peers.

#![allow(
    clippy::disallowed_methods,
    reason = "here a thread may wait; what is forbidden is forbidden to workers"
)]

#[path = "../support/mod.rs"]
mod support;

mod commands;
mod health;
mod house;
