//! macOS and the BSDs: what they lack is reported as unsupported or left out.

use std::{
    fs::File,
    io::{self, Read},
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use socket2::SockRef;

/// Whether kernel rules can redirect connections to the proxy.
pub const CAN_REDIRECT: bool = false;

/// Whether an event reports that the writer of a file has closed it.
pub const REPORTS_CLOSED_FILES: bool = false;

/// This program, for [`end_with_parent`], which does not work.
pub const OWN_PROGRAM: Option<&str> = None;

/// Does nothing: a connection whose peer has vanished ends by the timeout of its request.
pub fn set_user_timeout(_: &SockRef<'_>, _: Option<Duration>) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// `None`: nothing redirects connections.
pub fn original_destination(_: &SockRef<'_>, _: SocketAddr) -> Option<SocketAddr> {
    None
}

/// Fails: there is no [`splice`] to use it for.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Fails.
pub fn splice(_: impl AsFd, _: impl AsFd, _: usize) -> io::Result<usize> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Fails: the service keeps running if its sidecar is killed.
pub fn end_with_parent() -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Writes zeros, so that the file has disk blocks for so many bytes.
pub fn allocate(mut file: &File, length: u64) -> io::Result<()> {
    io::copy(&mut io::repeat(0).take(length), &mut file).map(drop)
}
