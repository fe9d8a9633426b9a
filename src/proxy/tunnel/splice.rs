//! `splice`: the kernel moves bytes from one TCP stream to another without copying them to the process.

use std::{
    io,
    os::fd::OwnedFd,
    task::{Context, Poll, ready},
};

use crate::{
    descriptors::DescriptorPurpose,
    net::io::SharedTcp,
    platform::{pipe, splice},
};

/// The default capacity of a pipe.
const PIPE_CAPACITY: usize = 64 * 1024;

/// The pipe between the two streams.
#[derive(Debug)]
pub struct Pipe {
    write_end: OwnedFd,
    read_end: OwnedFd,
    holds: usize,
}

impl Pipe {
    /// Fails where no descriptor is left, and where the system has no `splice`.
    pub fn new() -> io::Result<Self> {
        let (read_end, write_end) = pipe()?;
        if !DescriptorPurpose::Dial.allows(&write_end) {
            return Err(rustix::io::Errno::MFILE.into());
        }
        Ok(Self { write_end, read_end, holds: 0 })
    }

    /// Moves some bytes; returns how many were read. 0: the sender has closed, and everything is written.
    pub fn poll_splice(
        &mut self,
        cx: &mut Context<'_>,
        from: &SharedTcp,
        to: &SharedTcp,
    ) -> Poll<io::Result<u64>> {
        while self.holds > 0 {
            let count = ready!(to.poll_writing(cx, |tcp| splice(&self.read_end, tcp, self.holds)))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.holds -= count;
        }
        let count = ready!(from.poll_reading(cx, |tcp| splice(tcp, &self.write_end, PIPE_CAPACITY)))?;
        self.holds = count;
        Poll::Ready(Ok(count as u64))
    }
}
