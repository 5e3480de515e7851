//! One image of one process, as the process table stores it.

use std::{sync::Arc, time::Instant};

use super::start_labels::{ReadStartLabels, StartLabels};
use crate::{
    cgroup::CgroupNames,
    model::{ExitStatus, Image, ImageKey, Service, Subject},
    runtimes::{Interpreter, RuntimeFile},
};

/// One image of one process.
#[derive(Clone, Debug)]
pub struct Process {
    /// The process and its image.
    pub key: ImageKey,
    /// Thread group id of the parent, as last reported; 0 while unknown.
    pub parent: u32,
    /// Command name of the thread group leader.
    pub comm: String,
    /// Path of the executable as the process sees it; empty for a kernel thread and while unknown.
    pub exe: String,
    /// Inode number of its control group, in the hierarchy that the kernel side reads.
    pub cgroup_id: u64,
    /// Path of its control group.
    pub cgroup: String,
    /// The names in that path.
    pub names: CgroupNames,
    /// User id; `None` while unknown.
    pub uid: Option<u32>,
    /// Whether it is a kernel thread, which maps nothing.
    pub kernel_thread: bool,
    /// Its executable mappings.
    pub image: Arc<Image>,
    /// Its interpreter, once its frames are taken.
    pub(crate) interpreter: Option<Arc<Interpreter>>,
    /// Its interpreter's file, once a rule that compares it has had it found.
    pub(super) runtime: Option<Arc<RuntimeFile>>,
    /// The service that it gives, as far as the agent has read it.
    pub(crate) service: Arc<Service>,
    /// The rules that sample it, one bit for each slot, as last reported.
    pub rules: u64,
    /// How much of it is known, and whether it is alive.
    pub state: ProcessState,
    /// How it was started, if the user wants to see that; read at its first sample.
    pub(super) start_labels: Option<ReadStartLabels>,
    /// Samples so far.
    pub samples: u64,
    /// Its executable mappings that are not in `image`, because it has more than the agent reads.
    pub(crate) cut_mappings: u64,
    /// When its mappings were last read from `/proc`, by the boot clock; `None` if the kernel reported them.
    pub(super) read_at_ns: Option<u64>,
    /// The time of the last event of this image: a reading before that time was of this image.
    pub(super) seen_ns: u64,
    /// The mappings that the kernel had reported before they were read from `/proc`.
    pub(super) reported: Option<Arc<Image>>,
    /// The command name that the kernel reported.
    pub(super) reported_comm: String,
    /// When its mappings were last read again because of an unknown address.
    pub(super) scanned: Option<Instant>,
    /// The process mapped anonymous memory over a part of a file. The kernel's event does not say which mappings remain, so the
    /// agent reads them from `/proc`.
    pub(super) in_doubt: bool,
    /// Whether the process or a file of it did not answer when it was read: it is read again when that answers.
    pub(super) unanswered: bool,
    /// Whether it has executable memory that is no ELF file: its perf map is held.
    pub(super) makes_code: bool,
    /// The window in which it was last sampled or changed.
    pub(super) window: u64,
}

impl Process {
    /// Builds an entry of which only the kernel's event is known.
    pub(crate) fn unread(subject: &Subject, window: u64) -> Self {
        Self {
            key: ImageKey::of(subject),
            parent: 0,
            comm: subject.comm.clone(),
            exe: String::new(),
            cgroup_id: subject.cgroup_id,
            cgroup: String::new(),
            names: CgroupNames::default(),
            uid: None,
            kernel_thread: false,
            image: Arc::default(),
            cut_mappings: 0,
            interpreter: None,
            runtime: None,
            service: Arc::default(),
            rules: subject.rules,
            state: ProcessState::Unread,
            start_labels: None,
            samples: 0,
            read_at_ns: None,
            seen_ns: subject.ktime_ns,
            reported: None,
            reported_comm: subject.comm.clone(),
            // Mappings that were read at exec lack the libraries: the first sample in one may read them again at once.
            scanned: None,
            in_doubt: false,
            unanswered: false,
            makes_code: false,
            window,
        }
    }

    /// Returns the labels that show how it was started, if they were read.
    pub(crate) fn start_labels(&self) -> Option<&Arc<StartLabels>> {
        self.start_labels.as_ref()?.labels.as_ref()
    }

    /// Returns the file of its interpreter, if that is known.
    pub(crate) fn runtime(&self) -> Option<&Arc<RuntimeFile>> {
        self.runtime.as_ref().or_else(|| self.interpreter.as_ref().map(|interpreter| &interpreter.file))
    }

    /// Reports whether the process runs this image.
    pub(crate) fn is_alive(&self) -> bool {
        self.state == ProcessState::Alive
    }

    /// Returns the source of its mappings, human-readable.
    pub(crate) fn mappings_from(&self) -> &'static str {
        match (self.state, self.read_at_ns) {
            (ProcessState::Unread | ProcessState::Missed, _) => "nowhere",
            (_, None) => "the kernel",
            (_, Some(_)) => "/proc",
        }
    }
}

/// How much of a process is known, and whether it is alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessState {
    /// It runs this image.
    Alive,
    /// The kernel reported it, and the agent reads it at its first sample.
    Unread,
    /// It replaced this image, which is kept for its last samples.
    Replaced,
    /// It exited and is kept for its last samples.
    Ended(ExitStatus),
    /// It had exited, or had another image, before the agent could read it: only the kernel's report is known.
    Missed,
}
