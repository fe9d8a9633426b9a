//! `outrigger redirect` and what goes by it, in network namespaces that stand for pods.

mod injected;
mod pods;
mod rolling;
mod rules;
