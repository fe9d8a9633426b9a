//! What a user sees: the real binary, real sockets, real peers, network namespaces. Only on Linux.

#![cfg(target_os = "linux")]
#![allow(
    clippy::disallowed_methods,
    reason = "here a thread may wait; what is forbidden is forbidden to workers"
)]

#[path = "../support/mod.rs"]
mod support;

mod access_log;
mod admin;
mod authorize;
mod basics;
mod bodies;
mod cache;
mod commands;
mod config_changes;
mod connections;
mod curl;
mod deliveries;
mod drain;
mod early_responses;
mod edges;
mod endpoints;
mod exchange;
mod floods;
mod floors;
mod grpc;
mod h2spec;
mod health;
mod house;
mod http2;
mod identity;
mod idle;
mod keys;
mod kubernetes;
mod kubernetes_discovery;
mod lifecycle;
mod live_connections;
mod load;
mod metrics;
mod opaque;
mod queue;
mod redirect;
mod reload;
mod resilience;
mod secrets;
mod servers;
mod service;
mod shifting;
mod silence;
mod smuggling;
mod telemetry;
mod unsolicited;
mod websocket;
mod wire;
