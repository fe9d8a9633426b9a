//! Stands in for `nf_tables` where the kernel has none: [`super::apply`] returns before it gets here.

use std::io;

use super::Plan;

pub(super) fn apply(_: &Plan) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(super) fn clear() -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
