//! The agent of Gannet: observes all processes of a node, samples those that a rule matches, and delivers their profiles.
//!
//! Samples flow one way: `kernel` reads events, `process` and `cgroup` identify their processes, `profile` sums samples by
//! window, `symbols` symbolizes frames, `export` delivers. Rules flow the other way: `control` and rule files feed `rules`,
//! and `engine` writes them into the kernel.
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "a test that cannot go on shall say so at once"
    )
)]

pub(crate) mod access;
pub mod cgroup;
pub mod commands;
pub mod conditions;
pub mod config;
pub(crate) mod context;
pub(crate) mod control;
pub(crate) mod debug;
pub mod engine;
pub mod export;
pub mod governor;
pub mod kernel;
pub mod ledger;
pub mod model;
pub(crate) mod node;
pub mod output;
pub mod pipeline;
pub mod pods;
pub mod process;
pub mod profile;
pub mod rules;
pub mod runtimes;
pub mod symbols;
pub mod tables;

pub use debug::METRICS;
