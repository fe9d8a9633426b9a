//! Outrigger: a sidecar that carries a service's calls, both ways, with retries, breakers, timeouts, and telemetry.
//!
//! # The house
//!
//! ```text
//! cli ─▶ runtime ─▶ proxy ─────▶ upstream ◀── discovery
//!           │         │             │
//!         admin    telemetry     resilience ◀── config
//! ```
//!
//! | room | what is in it |
//! | --- | --- |
//! | [`cli`] | the command line, one file a command |
//! | [`runtime`] | threads and what they share; reload; start, drain and stop |
//! | [`proxy`] | the data path, in the order in which a call meets it |
//! | [`upstream`] | endpoints, which one is taken, their connections, what guards them |
//! | [`discovery`] | where endpoints come from: a list, DNS, a file |
//! | [`identity`] | certificates, whom they prove, TLS |
//! | [`resilience`] | the decisions: small state machines without clock, dice or I/O |
//! | [`kubernetes`] | the sidecar put into pods, by a command or a webhook |
//! | [`http1`] | HTTP/1.1 on the wire: heads, bodies, the bytes on their way |
//! | [`http2`] | HTTP/2 on the wire: bodies, tunnels, and what its frames tell of a connection |
//! | [`present`] | which fields a head has that the proxy acts on |
//! | [`fetch`] | calls that the proxy makes for itself |
//! | [`descriptors`] | what a connection needs of this process: descriptors, ports |
//! | [`config`] | from text to a checked configuration that knows who set what |
//! | [`kubernetes`] | how a pod's traffic comes to pass through the proxy |
//! | [`admin`], [`telemetry`] | what a sidecar says about itself, and the few things that can be changed |
//!
//! # The life of a request
//!
//! A worker accepts a connection ([`proxy::accept`]), finds out what it speaks ([`proxy::detect`]) and hands each request to
//! [`proxy::call`], which refuses what could be read in two ways. [`proxy::target`] finds upstream and route,
//! [`proxy::exchange`] asks the upstream's guards for leave and makes tries until one is good enough or no further one may
//! follow: the breaker's leave, an endpoint, a connection, the request, the answer's head. What came of a try is classified
//! once ([`resilience::classify`]) and told to all policies. Then the body streams. Whatever goes wrong on the way becomes
//! an answer that says what and why, in [`proxy::error`] alone.
//!
//! Everything slow lives on the control thread ([`runtime`]); workers see the configuration as a snapshot that is swapped
//! whole. `ARCHITECTURE.md` has the mechanisms and the reasons.

pub mod admin;
pub mod authorization;
pub mod cause;
pub mod cli;
pub mod config;
pub mod descriptors;
pub mod discovery;
pub mod dns;
pub mod durations;
pub mod fetch;
pub mod header_names;
pub mod http1;
pub mod http2;
pub mod identity;
pub mod kubernetes;
pub mod model;
pub mod net;
pub mod present;
pub mod proxy;
pub mod redact;
pub mod redirect;
pub mod resilience;
pub mod rng;
pub mod runtime;
pub mod telemetry;
pub mod trace_context;
pub mod units;
pub mod upstream;
pub mod url_path;
pub mod watch;
