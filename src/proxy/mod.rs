//! The data path, in the order in which a call meets it.
//!
//! ```text
//! accept ─▶ connection ─▶ call ─▶ target ─▶ exchange ─▶ attempt ─▶ (upstream::pool)
//!              │            │                  │
//!           detect        guard              body, headers, interim
//!           tunnel        error
//! ```

pub mod accept;
mod admission;
mod attempt;
pub mod body;
pub mod call;
mod clock;
mod connect;
pub mod connection;
mod deliver;
pub mod detect;
pub mod error;
pub mod exchange;
mod head;
pub mod headers;
mod hedged;
mod interim;
pub mod io;
pub mod progress;
pub mod route;
pub mod spent;
pub mod target;
pub mod tunnel;
pub mod unknown;
mod upgrade;
