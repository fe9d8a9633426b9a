//! The signals that steer the process, and those that are handed on to the service.
//!
//! Who starts `run -- CMD` means CMD by what it sends: an image with `STOPSIGNAL SIGQUIT` ends nginx by it. So what would else end
//! or stop this process goes to the service. On a terminal the kernel sends SIGQUIT, SIGWINCH and SIGTSTP to the whole
//! foreground group, of which the service is a member there: it has them already. Where it is not a member, although there
//! is a terminal (standard input comes from elsewhere), SIGWINCH is a window's new size, and no wish to end.

use std::io;

use rustix::process::Signal as Number;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Signals as they come. Made before anything else starts, so that none is missed.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    quit: Signal,
    user: [Signal; 2],
    /// Of a service that leads a process group of its own.
    group: Option<GroupSignals>,
    /// SIGWINCH may come from a terminal.
    has_terminal: bool,
    service: Service,
}

/// What signals are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// There is none: this process.
    None,
    /// A service in this process's group, on a terminal.
    InOurGroup,
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

    async fn next(&mut self, has_terminal: bool) -> Wish {
        tokio::select! {
            Some(()) = self.window.recv() => match has_terminal {
                true => Wish::Forward(Number::WINCH),
                false => Wish::DrainThenForward(Number::WINCH),
            },
            Some(()) = self.stop.recv() => Wish::Suspend,
            Some(()) = self.resume.recv() => Wish::Forward(Number::CONT),
            else => std::future::pending().await,
        }
    }
}

impl Signals {
    /// Needs a tokio runtime.
    pub fn new(service: Service) -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
            user: [signal(SignalKind::user_defined1())?, signal(SignalKind::user_defined2())?],
            group: (service == Service::OwnGroup).then(GroupSignals::new).transpose()?,
            has_terminal: std::fs::File::open("/dev/tty").is_ok(),
            service,
        })
    }

    /// The next wish to end. May be cancelled.
    pub async fn stop(&mut self) -> Stop {
        let quits = self.service == Service::None;
        tokio::select! {
            Some(()) = self.terminate.recv() => Stop::Terminate,
            Some(()) = self.interrupt.recv() => Stop::Interrupt,
            Some(()) = self.quit.recv(), if quits => Stop::Quit,
            else => std::future::pending().await,
        }
    }

    /// The next signal. May be cancelled.
    pub async fn next(&mut self) -> Wish {
        let [user1, user2] = &mut self.user;
        let group = async {
            match &mut self.group {
                Some(group) => group.next(self.has_terminal).await,
                None => std::future::pending().await,
            }
        };
        let (quit, user) = match self.service {
            Service::None => (Wish::Stop(Stop::Quit), Wish::Ignore as fn(Number) -> Wish),
            Service::InOurGroup => (Wish::Ignore(Number::QUIT), Wish::Forward as fn(Number) -> Wish),
            Service::OwnGroup => (Wish::DrainThenForward(Number::QUIT), Wish::Forward as fn(Number) -> Wish),
        };
        tokio::select! {
            Some(()) = self.terminate.recv() => Wish::Stop(Stop::Terminate),
            Some(()) = self.interrupt.recv() => Wish::Stop(Stop::Interrupt),
            Some(()) = self.hangup.recv() => Wish::Reload,
            Some(()) = self.quit.recv() => quit,
            Some(()) = user1.recv() => user(Number::USR1),
            Some(()) = user2.recv() => user(Number::USR2),
            wish = group => wish,
            else => std::future::pending().await,
        }
    }
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    Stop(Stop),
    Reload,
    /// The service gets it at once.
    Forward(Number),
    /// The service gets it when inbound has drained: it may be by this one that its image is stopped (nginx by SIGQUIT, httpd by
    /// SIGWINCH).
    DrainThenForward(Number),
    /// SIGTSTP: the service is stopped, and this process with it, until SIGCONT.
    Suspend,
    /// Nothing: this process has no use for it, and does not end by it.
    Ignore(Number),
}

/// Which signal asks for the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// SIGTERM: whoever runs us ends the service too, in its own time.
    Terminate,
    /// SIGINT: a person at a terminal, who waits.
    Interrupt,
    /// SIGQUIT, where there is no service: as SIGTERM.
    Quit,
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Terminate => "SIGTERM",
            Self::Interrupt => "SIGINT",
            Self::Quit => "SIGQUIT",
        })
    }
}

/// The name of a signal that is handed on.
pub fn name(signal: Number) -> &'static str {
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
