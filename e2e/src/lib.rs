//! Shared by the tests of the whole path: starts and ends the real programs as users do, and inspects them from outside.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails at once"
)]

mod fleet;
mod http;
mod program;
mod ticks;
mod wait;
mod world;

pub use fleet::{Counts, Fleet, push_round};
pub use http::http_get;
pub use program::{Program, binary, run};
pub use ticks::{Ticked, Ticks, monotonic};
pub use wait::{eventually, eventually_within};
pub use world::{Agent, Collector, Sample, rule, selection};
