//! What depends on the operating system: one file for Linux, one for others, with the same functions.
//!
//! The proxy is made for Linux. On macOS and the BSDs it builds and runs for work on one's own machine; where they lack
//! something, the functions here say so and their callers do without: bytes are copied instead of spliced, a connection
//! has no original destination.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
pub use linux::*;

#[cfg(not(target_os = "linux"))]
mod other;
#[cfg(not(target_os = "linux"))]
pub use other::*;
