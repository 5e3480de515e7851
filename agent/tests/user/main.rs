//! Tests of the agent that load no BPF program. Some need root: they mount a small file system, drop privileges, or open
//! mapped files of other processes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails at once"
)]

mod check;
mod lifecycle_model;
mod metadata;
mod output;
mod pods;
mod spool;
mod storm_memory;
mod stream;
mod symbols;
