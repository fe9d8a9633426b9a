//! The data path, in the order in which a request passes it.
//!
//! ```text
//! accept ─▶ connection ─▶ request_handler ─▶ target ─▶ exchange ─▶ attempts ─▶ attempt ─▶ (upstream::pool)
//!              │            │                             │          │
//!           detect        request_check               admission    judge, hedged
//!           tunnel        authorize                   credentials  body, headers, interim
//!                         error                       deliver
//! ```

pub mod accept;
pub mod address_check;
mod admission;
mod attempt;
mod attempts;
mod authorize;
pub mod body;
pub mod cached;
mod clock;
mod connect_method;
pub mod connection;
mod credentials;
mod deliver;
mod deprecated;
pub mod detect;
pub mod dial;
mod endpoints;
pub mod error;
pub mod exchange;
pub mod exhausted_traces;
mod finish;
pub mod future_pool;
mod grpc;
mod head;
pub mod headers;
mod hedged;
pub mod interception;
mod interim;
mod judge;
mod mirror;
mod next_hop;
mod opaque;
pub mod origin;
pub mod progress;
pub mod queue;
pub mod redirection;
pub mod request_check;
pub mod request_handler;
pub mod target;
pub mod tunnel;
mod upgrade;
pub mod worker;
