//! One profile before its frames have names.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::model::{Image, ProcessKey, SampleKind, StackEnd};

/// What one profile holds, before its frames have names: one window, one rule, one kind, one series.
#[derive(Debug)]
pub struct RawProfile {
    /// What its samples measure.
    pub kind: SampleKind,
    /// Nanoseconds between two ticks; for off-CPU samples 1.
    pub period_ns: u64,
    /// When the window began, by the wall clock.
    pub start: SystemTime,
    /// How long it was.
    pub duration: Duration,
    /// The processes of the series.
    pub processes: Vec<RawProcess>,
    /// Comment lines: rule, revision, reason, ledger, versions.
    pub comments: Vec<String>,
}

/// The stacks of one process in one exec generation.
#[derive(Debug)]
pub struct RawProcess {
    /// Who.
    pub key: ProcessKey,
    /// The command name of the thread group leader.
    pub comm: String,
    /// 64 hex digits; empty for a process that is in no container.
    pub container_id: String,
    /// Empty while unknown.
    pub pod_uid: String,
    /// What was mapped when the samples were taken.
    pub image: Arc<Image>,
    /// Each different stack once.
    pub stacks: Vec<RawStack>,
}

/// One stack, with how often it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawStack {
    /// The thread.
    pub tid: u32,
    /// The thread's name.
    pub thread: String,
    /// Kernel addresses, leaf first.
    pub kernel: Vec<u64>,
    /// User addresses, leaf first. The first is where the thread was, the others are return addresses.
    pub user: Vec<u64>,
    /// How the walk over the user stack ended.
    pub end: StackEnd,
    /// Of an off-CPU stack: the low bits of the state that the thread slept in.
    pub state: u8,
    /// Samples.
    pub count: u64,
    /// Sum of their values: for on-CPU `count * period_ns`, for off-CPU nanoseconds blocked.
    pub value_ns: u64,
}
