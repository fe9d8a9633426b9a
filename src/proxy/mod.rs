//! The data path, in the order in which a request passes it.
//!
//! ```text
//! accept ─▶ connection ─▶ request_handler ─▶ target ─▶ exchange ─▶ tries ─▶ attempt ─▶ (upstream::pool)
//!              │            │                             │          │
//!           detect        guard                       admission    judge, hedged
//!           tunnel        authorize                   credentials  body, headers, interim
//!                         error                       deliver
//! ```

pub mod accept;
mod admission;
mod attempt;
mod authorize;
pub mod body;
pub mod call;
mod clock;
pub mod connect;
pub mod connection;
mod credentials;
mod deliver;
pub mod detect;
pub mod error;
pub mod exchange;
mod grpc;
pub mod guard;
mod head;
pub mod headers;
mod hedged;
mod interim;
pub mod io;
mod judge;
mod opaque;
pub mod progress;
pub mod redirected;
pub mod room;
pub mod route;
pub mod spent;
pub mod target;
mod tries;
pub mod tunnel;
pub mod unknown;
mod upgrade;
