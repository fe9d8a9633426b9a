//! The data path, in the order in which a call meets it.
//!
//! ```text
//! accept ─▶ connection ─▶ call ─▶ target ─▶ exchange ─▶ attempts ─▶ attempt ─▶ (upstream::pool)
//!              │            │                  │          │
//!           detect        guard            admission    judge, hedged
//!           tunnel        authorize        credentials  body, headers, interim
//!                         error            deliver
//! ```

pub mod accept;
mod admission;
mod attempt;
mod attempts;
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
mod next_hop;
mod opaque;
pub mod origin;
pub mod progress;
pub mod redirected;
pub mod room;
pub mod route;
pub mod spent;
pub mod target;
pub mod tunnel;
pub mod unknown;
mod upgrade;
