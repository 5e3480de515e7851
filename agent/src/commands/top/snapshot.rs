//! What the feed sends to the screen.

use std::time::Duration;

use gannet_proto::{ledger::Ledger, profiles::Profile};

use crate::model::ProcessKey;

/// What the feed knows of a process beside its samples.
#[derive(Clone, Debug)]
pub(super) struct ProcessInfo {
    /// Who.
    pub(super) key: ProcessKey,
    /// Command name of the thread group leader.
    pub(super) comm: String,
    /// The systemd unit, container, or path of the executable: where it belongs.
    pub(super) place: String,
    /// The rule that samples it.
    pub(super) rule: String,
    /// `armed`, `exited`, ...
    pub(super) state: String,
}

/// One window of everything.
#[derive(Clone, Debug, Default)]
pub(super) struct Snapshot {
    /// How long the window was.
    pub(super) duration: Duration,
    /// Its samples, with names; each sample has the label `pid`, and its last value is nanoseconds.
    pub(super) profiles: Vec<Profile>,
    /// Every process that is watched, sampled or not.
    pub(super) processes: Vec<ProcessInfo>,
    /// Since the start.
    pub(super) ledger: Ledger,
}
