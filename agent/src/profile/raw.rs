//! Profiles before symbolization.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::{
    model::{Image, ProcessKey, SampleKind, StackEnd, StackMarks, TaskLabels},
    process::StartLabels,
    runtimes::Interpreter,
};

/// One profile before symbolization: the samples of one window, rule, kind and series.
#[derive(Debug)]
pub struct RawProfile {
    /// The measure of its samples.
    pub kind: SampleKind,
    /// Nanoseconds between two ticks; for off-CPU samples 1.
    pub period_ns: u64,
    /// When the window began, by the wall clock.
    pub start: SystemTime,
    /// The length of the window.
    pub duration: Duration,
    /// The processes of the series.
    pub processes: Vec<RawProcess>,
    /// Comment lines: rule, revision, reason, ledger, versions.
    pub comments: Vec<String>,
}

/// The stacks of one image of one process.
#[derive(Debug)]
pub struct RawProcess {
    /// The sampled process.
    pub key: ProcessKey,
    /// The command name of the thread group leader.
    pub comm: String,
    /// 64 hex digits; empty for a process outside of containers.
    pub container_id: String,
    /// Empty while unknown.
    pub pod_uid: String,
    /// The mappings at the time of the samples.
    pub image: Arc<Image>,
    /// The interpreter whose functions list frames name.
    pub interpreter: Option<Arc<Interpreter>>,
    /// How it was started, if the user wants to see that.
    pub start_labels: Option<Arc<StartLabels>>,
    /// Its distinct stacks.
    pub stacks: Vec<RawStack>,
}

/// One stack, and the number of its samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawStack {
    /// Id of the thread.
    pub tid: u32,
    /// The thread's name.
    pub thread: String,
    /// Kernel addresses, leaf first.
    pub kernel: Vec<u64>,
    /// User addresses, leaf first. The first is the program counter, the others are return addresses. List frames have two words
    /// each.
    pub user: Vec<u64>,
    /// How unwinding the user stack ended.
    pub end: StackEnd,
    /// Marks of both stacks.
    pub marks: StackMarks,
    /// Of an off-CPU stack: the low bits of the state in which the thread slept.
    pub state: u8,
    /// Labels that the program gave the task.
    pub labels: Option<Arc<TaskLabels>>,
    /// Number of samples.
    pub count: u64,
    /// Sum of their values: for on-CPU `count * period_ns`, for off-CPU nanoseconds blocked.
    pub value_ns: u64,
}
