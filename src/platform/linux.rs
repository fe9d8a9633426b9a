//! Linux.

use std::{
    fs::File,
    io::{self, Read},
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
    pipe::{PipeFlags, SpliceFlags, pipe_with},
    process::{Signal, set_parent_process_death_signal},
};
use socket2::SockRef;

/// Whether kernel rules can redirect connections to the proxy.
pub const CAN_REDIRECT: bool = true;

/// Whether an event reports that the writer of a file has closed it.
pub const REPORTS_CLOSED_FILES: bool = true;

/// This program, even where its file has been replaced since it started, if [`end_with_parent`] works. Needs `/proc`.
pub const OWN_PROGRAM: Option<&str> = Some("/proc/self/exe");

const SPLICE: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

/// Bounds how long sent bytes may stay unacknowledged (RFC 5482). `None`: the kernel's default.
pub fn set_user_timeout(socket: &SockRef<'_>, limit: Option<Duration>) -> io::Result<()> {
    socket.set_tcp_user_timeout(limit)
}

/// The destination of a connection before a kernel rule redirected it.
pub fn original_destination(socket: &SockRef<'_>, local: SocketAddr) -> Option<SocketAddr> {
    let original = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    original.ok()?.as_socket()
}

/// A non-blocking pipe for [`splice`]: the end to read from, the end to write to.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?)
}

/// Moves up to `limit` bytes within the kernel; one of the two is a pipe. Returns how many; 0: the end.
pub fn splice(from: impl AsFd, to: impl AsFd, limit: usize) -> io::Result<usize> {
    Ok(rustix::pipe::splice(from, None, to, None, limit, SPLICE)?)
}

/// Has the kernel kill this process when its parent is killed. The kernel drops this setting when a setuid program is
/// executed.
pub fn end_with_parent() -> io::Result<()> {
    Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
}

/// Gives a file disk blocks for so many bytes.
pub fn allocate(mut file: &File, length: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, length) {
        // A file system without it: write zeros.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            io::copy(&mut io::repeat(0).take(length), &mut file).map(drop)
        }
        other => Ok(other?),
    }
}
