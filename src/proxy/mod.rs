//! The data path, in the order in which a call meets it.
//!
//! ```text
//! accept ─▶ connection ─▶ call ─▶ target ─▶ exchange ─▶ attempt ─▶ (upstream::pool)
//!              │            │                  │
//!           detect        guard              body, headers, interim
//!           tunnel        error
//! ```

pub mod accept;
mod attempt;
pub mod body;
pub mod call;
mod clock;
mod connect;
pub mod connection;
pub mod detect;
pub mod error;
pub mod exchange;
pub mod headers;
mod interim;
pub mod io;
pub mod progress;
pub mod route;
pub mod target;
pub mod tunnel;
pub mod unknown;
mod upgrade;
