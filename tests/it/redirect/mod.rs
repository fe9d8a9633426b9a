//! `outrigger redirect` and redirected connections, in network namespaces that represent pods.

mod injected;
mod pods;
mod rolling;
mod rules;
