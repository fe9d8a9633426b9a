//! The signals that control the process, and those that are forwarded to the service.
//!
//! Under `run -- CMD`, signals to this process are meant for CMD: an image with `STOPSIGNAL SIGQUIT` stops nginx by it.
//! So signals that would otherwise end or stop this process are forwarded. On a terminal the kernel sends SIGQUIT,
//! SIGWINCH and SIGTSTP to the whole foreground process group; the service is a member of it and has received them
//! already. Where the service has a group of its own although there is a terminal (standard input is redirected),
//! SIGWINCH is a change of the window size, not a request to stop.

use std::io;

use rustix::process::Signal as Number;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Listens for signals. Created before anything else starts, so that none is missed.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    quit: Signal,
    user: [Signal; 2],
    /// Signals that matter only where the service leads a process group of its own.
    group: Option<GroupSignals>,
    /// SIGWINCH may come from a terminal.
    has_terminal: bool,
    service: ServiceProcess,
}

/// The service that signals are forwarded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceProcess {
    /// No service: signals are for this process.
    None,
    /// A service in this process's group, on a terminal.
    SharedGroup,
    /// A service that leads a group of its own.
    OwnGroup,
}

#[derive(Debug)]
struct GroupSignals {
    window: Signal,
    stop: Signal,
    resume: Signal,
}

impl GroupSignals {
    fn new() -> io::Result<Self> {
        let listen = |number: Number| signal(SignalKind::from_raw(number.as_raw()));
        Ok(Self {
            window: listen(Number::WINCH)?,
            stop: listen(Number::TSTP)?,
            resume: listen(Number::CONT)?,
        })
    }

    async fn next(&mut self, has_terminal: bool) -> SignalAction {
        tokio::select! {
            Some(()) = self.window.recv() => match has_terminal {
                true => SignalAction::Forward(Number::WINCH),
                false => SignalAction::DrainThenForward(Number::WINCH),
            },
            Some(()) = self.stop.recv() => SignalAction::Suspend,
            Some(()) = self.resume.recv() => SignalAction::Forward(Number::CONT),
            else => std::future::pending().await,
        }
    }
}

impl Signals {
    /// Needs a tokio runtime.
    pub fn new(service: ServiceProcess) -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
            user: [signal(SignalKind::user_defined1())?, signal(SignalKind::user_defined2())?],
            group: (service == ServiceProcess::OwnGroup).then(GroupSignals::new).transpose()?,
            has_terminal: std::fs::File::open("/dev/tty").is_ok(),
            service,
        })
    }

    /// Waits for the next stop signal. Cancel safe.
    pub async fn next_stop(&mut self) -> StopSignal {
        let quits = self.service == ServiceProcess::None;
        tokio::select! {
            Some(()) = self.terminate.recv() => StopSignal::Terminate,
            Some(()) = self.interrupt.recv() => StopSignal::Interrupt,
            Some(()) = self.quit.recv(), if quits => StopSignal::Quit,
            else => std::future::pending().await,
        }
    }

    /// Waits for the next signal. Cancel safe.
    pub async fn next(&mut self) -> SignalAction {
        let [user1, user2] = &mut self.user;
        let group = async {
            match &mut self.group {
                Some(group) => group.next(self.has_terminal).await,
                None => std::future::pending().await,
            }
        };
        let (quit, user) = match self.service {
            ServiceProcess::None => {
                (SignalAction::Stop(StopSignal::Quit), SignalAction::Ignore as fn(Number) -> SignalAction)
            }
            ServiceProcess::SharedGroup => {
                (SignalAction::Ignore(Number::QUIT), SignalAction::Forward as fn(Number) -> SignalAction)
            }
            ServiceProcess::OwnGroup => (
                SignalAction::DrainThenForward(Number::QUIT),
                SignalAction::Forward as fn(Number) -> SignalAction,
            ),
        };
        tokio::select! {
            Some(()) = self.terminate.recv() => SignalAction::Stop(StopSignal::Terminate),
            Some(()) = self.interrupt.recv() => SignalAction::Stop(StopSignal::Interrupt),
            Some(()) = self.hangup.recv() => SignalAction::Reload,
            Some(()) = self.quit.recv() => quit,
            Some(()) = user1.recv() => user(Number::USR1),
            Some(()) = user2.recv() => user(Number::USR2),
            action = group => action,
            else => std::future::pending().await,
        }
    }
}

/// What to do on a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignalAction {
    Stop(StopSignal),
    Reload,
    /// Forward it to the service at once.
    Forward(Number),
    /// Drain inbound, then forward it: it may be the stop signal of the service's image (nginx: SIGQUIT, httpd:
    /// SIGWINCH).
    DrainThenForward(Number),
    /// SIGTSTP: suspend the service and this process until SIGCONT.
    Suspend,
    /// Ignore it.
    Ignore(Number),
}

/// A signal that asks for a graceful shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGTERM: from a supervisor, which also stops the service, in its own time.
    Terminate,
    /// SIGINT: from a person at a terminal, who waits for the end.
    Interrupt,
    /// SIGQUIT, where there is no service: like SIGTERM.
    Quit,
}

impl std::fmt::Display for StopSignal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Terminate => "SIGTERM",
            Self::Interrupt => "SIGINT",
            Self::Quit => "SIGQUIT",
        })
    }
}

/// The name of a signal that can be forwarded.
pub fn signal_name(signal: Number) -> &'static str {
    match signal {
        Number::QUIT => "SIGQUIT",
        Number::USR1 => "SIGUSR1",
        Number::USR2 => "SIGUSR2",
        Number::WINCH => "SIGWINCH",
        Number::TSTP => "SIGTSTP",
        Number::CONT => "SIGCONT",
        _ => "a signal",
    }
}
