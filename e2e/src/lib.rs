//! What the tests of the whole path share: the real programs, started and ended as people do it, and ways to look at
//! them from outside.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on shall say so at once"
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
