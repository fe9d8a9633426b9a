//! Outrigger: a sidecar proxy that keeps a failing dependency from taking your service down.
//!
//! # The modules
//!
//! The lowest first: a module imports only from lines above its own; `http2` also from `http1` (`tests/it/floors.rs` holds
//! the order).
//!
//! | module | contents |
//! | --- | --- |
//! | [`platform`] | what differs between Linux and other systems |
//! | [`units`], [`unix_time`], [`delivery_id`], [`rng`], [`redact`] | durations and sizes as the configuration writes them · the time of day in milliseconds · IDs of deliveries · random numbers · secrets out of texts |
//! | [`descriptors`], [`watch`] | file descriptors and local ports · watched files |
//! | [`cause`], [`header_names`], [`url_path`] | the stable words for failures · names of non-standard header fields · normal form of a path |
//! | [`net`] | the TCP stream, the timer of a connection, ALPN |
//! | [`field_set`], [`trace_context`] | which header fields a message has · W3C, B3 and Jaeger trace headers |
//! | [`dns`], [`durations`] | names to addresses · histograms of request durations |
//! | [`http1`], [`http2`] | the wire: heads, framing, bodies, buffers · bodies and the observer of frames |
//! | [`resilience`] | the decisions: retry, budget, breaker, outlier detection, limits, hedging. State machines without clock, randomness or I/O |
//! | [`authorization`] | `[[inbound.allow]]`: SPIFFE IDs, paths and claims against one request |
//! | [`queue`] | durable deliveries: the store, on disk |
//! | [`cache`] | stored responses, and requests that wait for one fetch |
//! | [`config`] | text to a checked configuration that knows which line set what |
//! | [`fetch`], [`redirect`] | HTTP requests of the proxy itself · kernel rules that redirect a pod's traffic |
//! | [`identity`] | certificates, trust, TLS, tokens |
//! | [`upstream`] | endpoints, balancing, health checks, pools, connections to endpoints |
//! | [`discovery`] | where endpoints come from: DNS, a file, Kubernetes |
//! | [`model`] | the running configuration: snapshot, each worker's view of it, router, header edits |
//! | [`telemetry`] | the record of a request; spans, metrics, access log, `/requests` |
//! | [`proxy`] | the data path, in the order in which a request passes it |
//! | [`runtime`] | threads, reload, start, drain and stop |
//! | [`admin`], [`kubernetes`] | the admin server · the sidecar's injection into pods, by command and webhook |
//! | [`cli`] | the command line, one file a command |
//!
//! # The life of a request
//!
//! A worker gets a connection ([`proxy::accept`]), detects its protocol ([`proxy::detect`]) and passes each request to
//! [`proxy::request_handler`], which rejects ambiguous requests. [`proxy::target`] finds upstream and route.
//! [`proxy::exchange`] admits the request (rate limit, requests in flight) and sends attempts until one succeeds or no
//! further one is allowed. Each attempt takes a breaker permit, picks an endpoint, takes a connection, sends the request
//! and reads the response head. Its outcome is classified once ([`resilience::classify`]) and reported to every policy.
//! Then the body streams. A failure before the response head becomes an error response, made only in [`proxy::error`]; a
//! later one aborts the body.
//!
//! Everything slow runs on the control thread ([`runtime`]); workers see the configuration as a snapshot that is replaced
//! as a whole. `ARCHITECTURE.md` describes the mechanisms and their reasons.

// The library serves this package's binary and tests: its documentation is read with private items.
#![allow(rustdoc::private_intra_doc_links)]

pub mod admin;
pub mod authorization;
pub mod cache;
pub mod cause;
pub mod cli;
pub mod config;
pub mod delivery_id;
pub mod descriptors;
pub mod discovery;
pub mod dns;
pub mod durations;
pub mod fetch;
pub mod field_set;
pub mod header_names;
pub mod http1;
pub mod http2;
pub mod identity;
pub mod kubernetes;
pub mod model;
pub mod net;
pub mod platform;
pub mod proxy;
pub mod queue;
pub mod redact;
pub mod redirect;
pub mod resilience;
pub mod rng;
pub mod runtime;
pub mod telemetry;
pub mod trace_context;
pub mod units;
pub mod unix_time;
pub mod upstream;
pub mod url_path;
pub mod watch;
