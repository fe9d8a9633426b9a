//! What the proxy tells about itself and the calls it carries.

pub mod exposition;
pub mod log;
pub mod metrics;
pub mod process;
