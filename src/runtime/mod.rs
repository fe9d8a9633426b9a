//! Threads, and what they share.

pub mod cgroup;
pub mod child;
pub mod ready_file;
pub mod signals;
