//! The signals that steer the process.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Signals as they come. Made before anything else starts, so that none is missed.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Needs a tokio runtime.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// The next wish to end: its name. May be cancelled.
    pub async fn stop(&mut self) -> &'static str {
        tokio::select! {
            Some(()) = self.terminate.recv() => "SIGTERM",
            Some(()) = self.interrupt.recv() => "SIGINT",
            else => std::future::pending().await,
        }
    }

    /// The next SIGHUP or wish to end. May be cancelled.
    pub async fn next(&mut self) -> Wish {
        tokio::select! {
            Some(()) = self.terminate.recv() => Wish::Stop("SIGTERM"),
            Some(()) = self.interrupt.recv() => Wish::Stop("SIGINT"),
            Some(()) = self.hangup.recv() => Wish::Reload,
            else => std::future::pending().await,
        }
    }
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// By the signal of this name.
    Stop(&'static str),
    Reload,
}
