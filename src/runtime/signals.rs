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

    /// The next wish to end. May be cancelled.
    pub async fn stop(&mut self) -> Stop {
        tokio::select! {
            Some(()) = self.terminate.recv() => Stop::Terminate,
            Some(()) = self.interrupt.recv() => Stop::Interrupt,
            else => std::future::pending().await,
        }
    }

    /// The next SIGHUP or wish to end. May be cancelled.
    pub async fn next(&mut self) -> Wish {
        tokio::select! {
            Some(()) = self.terminate.recv() => Wish::Stop(Stop::Terminate),
            Some(()) = self.interrupt.recv() => Wish::Stop(Stop::Interrupt),
            Some(()) = self.hangup.recv() => Wish::Reload,
            else => std::future::pending().await,
        }
    }
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    Stop(Stop),
    Reload,
}

/// Which signal asks for the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// SIGTERM: whoever runs us ends the service too, in its own time.
    Terminate,
    /// SIGINT: a person at a terminal, who waits.
    Interrupt,
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Terminate => "SIGTERM",
            Self::Interrupt => "SIGINT",
        })
    }
}
