//! Bytes that the system carries from one TCP stream to another by itself.

use std::{
    io,
    os::fd::OwnedFd,
    task::{Context, Poll, ready},
};

use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};

use crate::{descriptors::Purpose, net::io::SharedTcp};

/// As much as a pipe holds, unless it was told otherwise.
const MOST: usize = 64 * 1024;
const FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

/// What lies between the two.
#[derive(Debug)]
pub struct Pipe {
    entrance: OwnedFd,
    exit: OwnedFd,
    holds: usize,
}

impl Pipe {
    pub fn new() -> io::Result<Self> {
        let (exit, entrance) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        if !Purpose::Dial.allows(&entrance) {
            return Err(rustix::io::Errno::MFILE.into());
        }
        Ok(Self { entrance, exit, holds: 0 })
    }

    /// Carries some bytes, and says how many have come in. 0: nothing comes any more, and all is written.
    pub fn poll_carry(
        &mut self,
        cx: &mut Context<'_>,
        from: &SharedTcp,
        to: &SharedTcp,
    ) -> Poll<io::Result<u64>> {
        while self.holds > 0 {
            let count = ready!(
                to.poll_writing(cx, |tcp| Ok(splice(&self.exit, None, tcp, None, self.holds, FLAGS)?))
            )?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.holds -= count;
        }
        let came =
            ready!(from.poll_reading(cx, |tcp| Ok(splice(tcp, None, &self.entrance, None, MOST, FLAGS)?)))?;
        self.holds = came;
        Poll::Ready(Ok(came as u64))
    }
}
