//! The node program of Gannet: watches every process, samples those that a rule names, and hands on what it saw.
//!
//! Data flows one way: `kernel` reads events, `process` keeps who is who, `profile` adds samples up by window,
//! `symbols` names the frames, `export` delivers. The only way back is a rule (`rules`, fed by `control`).
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "a test that cannot go on shall say so at once"
    )
)]

pub mod cgroup;
pub mod commands;
pub mod conditions;
pub mod config;
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
pub mod symbols;
pub mod tables;

pub use debug::METRICS;
