//! The data that the feed sends to the screen.

use std::time::Duration;

use gannet_proto::{ledger::Ledger, profiles::Profile};

use crate::model::ProcessKey;

/// A process, without its samples.
#[derive(Clone, Debug)]
pub(super) struct ProcessInfo {
    /// Pid and start time.
    pub(super) key: ProcessKey,
    /// Command name of the thread group leader.
    pub(super) comm: String,
    /// Systemd unit, container, or path of the executable.
    pub(super) owner: String,
    /// Rule that samples the process.
    pub(super) rule: String,
    /// State: `sampled`, `ended`, ...; and why its interpreted functions have no names, if so.
    pub(super) state: String,
    /// Its interpreter, and whether the names of its functions are read or why not; empty without one.
    pub(super) interpreter: String,
}

/// One window of all processes.
#[derive(Clone, Debug, Default)]
pub(super) struct Snapshot {
    /// Length of the window.
    pub(super) duration: Duration,
    /// Symbolized samples. Each has the label `pid`, and its last value is nanoseconds.
    pub(super) profiles: Vec<Profile>,
    /// Processes with samples.
    pub(super) processes: Vec<ProcessInfo>,
    /// Account since the start.
    pub(super) ledger: Ledger,
    /// Windows that were not shown, because the screen was late.
    pub(super) skipped: u64,
    /// Why rates are lowered; none if they are not.
    pub(super) governed: Option<String>,
}
