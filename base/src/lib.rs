//! Everything that the agent, the collector and gannetctl share as programs: text forms of sizes and durations,
//! configuration layers, renamed options, logging, shell completions, man pages, metrics and the reference pages.
//!
//! The crate knows nothing about profiles, rules or the kernel; `gannet-proto` and the programs build on it.
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "a test that cannot go on shall say so at once"
    )
)]

mod byte_size;
mod config;
pub mod logging;
pub mod metrics;
pub mod reference;
mod renamed;
mod shell;
mod text;
mod time_span;

pub use byte_size::{ByteSize, ByteSizeError};
pub use config::{ConfigError, defaults, effective, to_yaml};
pub use renamed::Renamed;
pub use shell::{CompletionArgs, ManArgs};
pub use text::{cut, head, hex, with_causes};
pub use time_span::{TimeSpan, TimeSpanError, format_duration};

#[doc(hidden)]
pub use serde;
