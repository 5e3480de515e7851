//! Plain values that the engine shows to the rest of the agent: debug page, status, metrics, control stream, `top`.
//!
//! The engine's thread fills them and hands them over. They hold no reference into the engine, so a reader can neither
//! change its state nor hold it up.

use std::{collections::HashSet, time::SystemTime};

use gannet_proto::{
    control::{Rule, RuleError, RuleStatus},
    ledger::Ledger,
};

use super::{
    account::Account, backlog::Backlog, captures::Captures, intake::StackEnds,
    interpreters::InterpreterStats, limits::Limits, reader::Reader,
};
use crate::{
    cgroup::CgroupNames,
    conditions::SuppressedStarts,
    kernel::{Counters, Kernel, MAX_RULES, MapFill, ProgramCost, RefusedEntries, Ticks},
    model::ImageKey,
    process::{FileTableStats, MetadataStats, Process, ProcessState, ProcessStats},
    profile::{RecorderStats, slots},
    rules::{ProcessTraits, RuleBook, RuleId, RuleSource},
    tables::{TableStats, UnwindTables},
};

/// The engine at one moment. Cheap to fill: it holds no process and reads no map but the counters.
#[derive(Clone, Debug)]
pub struct EngineView {
    /// The state of each rule, with the number of processes that it samples.
    pub rules: Vec<RuleStatus>,
    /// The parts of the collector's rules that have no effect on this node now, with the reasons.
    pub rule_faults: Vec<RuleError>,
    /// Live processes in the process table.
    pub processes: usize,
    /// Of these, the processes that at least one rule wants.
    pub sampled_processes: usize,
    /// Counts of the process table since the engine started.
    pub process_stats: ProcessStats,
    /// Counts of the files that processes map.
    pub(crate) file_stats: FileTableStats,
    /// Counts of the process metadata.
    pub(crate) metadata_stats: MetadataStats,
    /// Processes that already ran when a rule came, and that the engine has not read yet.
    pub discovered_waiting: usize,
    /// Counters of the BPF programs since they were loaded; `None` if they cannot be read.
    pub counters: Option<Counters>,
    /// The ticks of the sampling clocks; `None` if they cannot be read.
    pub ticks: Option<Ticks>,
    /// Records of the ring buffer that were no event; must stay 0.
    pub undecodable_events: u64,
    /// Executable mappings that the kernel did not report because a buffer was full.
    pub mappings_lost: u64,
    /// Entries of processes that the kernel refused, by BPF map.
    pub refused_entries: Vec<RefusedEntries>,
    /// Unwind tables; `None` if the engine unwinds by frame pointers only.
    pub unwind_tables: Option<TableStats>,
    /// The interpreters of processes.
    pub(crate) interpreters: InterpreterStats,
    /// Processes whose service is left out because there are too many.
    pub services_left_out: u64,
    /// Captures that did not start, by reason.
    pub(crate) suppressed_captures: SuppressedStarts,
    /// The flight recorder.
    pub recorder: RecorderStats,
    /// Sensor reports that came faster than the engine took them.
    pub sensor_reports_dropped: u64,
    /// Conditions in scopes that the sensors do not watch, because there are too many.
    pub unwatched_conditions: u64,
    /// Samples of exec conditions whose capture was over when they came.
    pub stray_samples: u64,
    /// Why rates are lowered, captures refused, or everything switched off; human-readable.
    pub governed: Option<String>,
    /// Factor by which periods are longer than the rules ask for.
    pub rate_divisor: u32,
    /// Samples since the engine started, by the end of their stacks.
    pub stack_ends: StackEnds,
    /// Samples since the engine started. Samples of the open window count as pending.
    pub ledger: Ledger,
    /// The newest lifecycle events, oldest first.
    pub events: Vec<(SystemTime, String)>,
}

/// A process of the process table, alive or kept for its last samples.
#[derive(Clone, Debug)]
pub struct ProcessView {
    /// Process and image.
    pub key: ImageKey,
    /// Thread group id of the parent; 0 while unknown.
    pub parent: u32,
    /// Command name of the thread group leader.
    pub comm: String,
    /// Path of the executable as the process sees it; empty for a kernel thread and while unknown.
    pub exe: String,
    /// Path of the control group.
    pub cgroup: String,
    /// Unit, container and pod that this path names.
    pub names: CgroupNames,
    /// Effective user id; `None` while unknown.
    pub uid: Option<u32>,
    /// It has no memory of its own.
    pub kernel_thread: bool,
    /// How much the engine knows of it, and whether it lives.
    pub state: ProcessState,
    /// It ended or replaced its image, and stays in the table for its last samples.
    pub is_past: bool,
    /// The number of executable mappings.
    pub mappings: usize,
    /// Executable mappings beyond those that the agent reads of one process.
    pub cut_mappings: u64,
    /// Source of the mappings: `the kernel`, `/proc` or `nowhere`.
    pub mappings_from: &'static str,
    /// How the agent unwinds its stacks.
    pub unwinding: Unwinding,
    /// Its interpreter, and whether the names of its functions are read or why not; empty without one.
    pub interpreter: String,
    /// The service that it gives, the sources, and the reason for a fact that cannot be read; empty without any.
    pub service: String,
    /// Samples that wait for unwind tables.
    pub waiting_samples: usize,
    /// Samples so far.
    pub samples: u64,
    /// The rules that want it.
    pub rules: Vec<RuleId>,
    /// If no rule wants it: for each rule in force why not.
    pub explanation: Vec<(RuleId, String)>,
}

/// How the agent unwinds the user stacks of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unwinding {
    /// By frame pointers; the engine has no unwind tables.
    FramePointers,
    /// Not at all: a kernel thread has no user stack.
    KernelOnly,
    /// By unwind tables, in the BPF program.
    Kernel,
    /// By unwind tables, from raw samples in user space.
    UserSpace,
}

/// A process that need not be in the process table, by all that rules compare.
#[derive(Clone, Debug)]
pub(crate) struct UnknownProcess {
    /// Command name of the thread group leader.
    pub(crate) comm: String,
    /// Path of the executable as the process sees it.
    pub(crate) exe: String,
    /// Path of the control group.
    pub(crate) cgroup: String,
    /// Effective user id.
    pub(crate) uid: Option<u32>,
    /// Thread group id.
    pub(crate) tgid: u32,
    /// Name and version of its language runtime; empty without one.
    pub(crate) runtime: (String, String),
    /// The name of its service, as it gives it; empty if it gives none.
    pub(crate) service: String,
}

/// A rule in force.
#[derive(Clone, Debug)]
pub(crate) struct RuleView {
    /// The rule as its source gave it.
    pub(crate) rule: Rule,
    /// Its state; `None` if it got no slot.
    pub(crate) status: Option<RuleStatus>,
    /// Thread group ids of the processes that it wants.
    pub(crate) processes: HashSet<u32>,
}

/// Kernel-side values that are slow to read: maps are counted key by key.
#[derive(Clone, Debug)]
pub struct KernelView {
    /// Every map of the BPF programs, by name.
    pub maps: Vec<MapFill>,
    /// The loaded BPF programs.
    pub programs: Vec<ProgramCost>,
    /// Nanoseconds that the sampler has run, and its runs; `None` unless the kernel counts (kernel.bpf_stats_enabled).
    pub sampler_cost: Option<(u64, u64)>,
    /// Unwind tables; `None` if the engine unwinds by frame pointers only.
    pub unwind_tables: Option<TableStats>,
}

/// The parts of the engine that views are filled from. Views only read.
#[derive(Clone, Copy)]
pub(super) struct ViewSources<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) reader: &'a Reader,
    pub(super) rules: &'a RuleBook,
    pub(super) captures: &'a Captures,
    pub(super) account: &'a Account,
    pub(super) limits: &'a Limits,
}

impl ViewSources<'_> {
    pub(super) fn engine(&self) -> EngineView {
        let is_sampled = |process: &&Process| process.rules != 0;
        let intake = &self.reader.intake;
        let waiting = self.backlog().count(u64::MAX);
        let pending = (intake.open_samples(), self.backlog().count(intake.windowed()), waiting);
        EngineView {
            rules: self.rule_statuses(),
            rule_faults: self.rules.faults_of(RuleSource::Remote),
            processes: self.reader.processes.alive().count(),
            sampled_processes: self.reader.processes.alive().filter(is_sampled).count(),
            process_stats: self.reader.processes.stats(),
            file_stats: self.reader.processes.file_stats(),
            metadata_stats: self.reader.processes.metadata_stats(),
            discovered_waiting: self.reader.discovered.len(),
            counters: self.kernel.counters().ok(),
            ticks: self.kernel.ticks().ok(),
            undecodable_events: self.kernel.undecodable(),
            mappings_lost: self.kernel.mappings_lost(),
            refused_entries: self.kernel.refused_entries(),
            unwind_tables: self.reader.unwinding.tables().map(UnwindTables::stats),
            interpreters: self
                .reader
                .unwinding
                .interpreters()
                .map(|interpreters| interpreters.stats(&self.reader.processes, self.backlog().unproven()))
                .unwrap_or_default(),
            services_left_out: self.reader.contexts.left_out(),
            suppressed_captures: self.captures.suppressed(),
            recorder: self.reader.intake.recorder_stats(),
            sensor_reports_dropped: self.captures.dropped_reports(),
            unwatched_conditions: self.captures.unwatched(),
            stray_samples: self.captures.strays(),
            governed: self.limits.reason().map(str::to_owned),
            rate_divisor: self.limits.rate_divisor(),
            stack_ends: intake.stack_ends(),
            ledger: self.account.ledger(self.kernel, intake.flow(), pending),
            events: self.reader.events.to_vec(),
        }
    }

    /// Returns the processes of the table, or those of one thread group id.
    pub(super) fn processes(&self, pid: Option<u32>) -> Vec<ProcessView> {
        let alive = self.reader.processes.alive().map(|process| (process, false));
        let past = self.reader.processes.past().map(|process| (process, true));
        alive
            .chain(past)
            .filter(|(process, _)| pid.is_none_or(|pid| process.key.process.tgid == pid))
            .map(|(process, is_past)| self.process(process, is_past))
            .collect()
    }

    fn process(&self, process: &Process, is_past: bool) -> ProcessView {
        let rules: Vec<RuleId> = slots(process.rules)
            .filter_map(|slot| self.rules.slots().rule_id(slot).map(str::to_owned))
            .collect();
        let explanation = if rules.is_empty() {
            self.rules.explain(&ProcessTraits::of(process), None, SystemTime::now())
        } else {
            Vec::new()
        };
        ProcessView {
            key: process.key,
            parent: process.parent,
            comm: process.comm.clone(),
            exe: process.exe.clone(),
            cgroup: process.cgroup.clone(),
            names: process.names.clone(),
            uid: process.uid,
            kernel_thread: process.kernel_thread,
            state: process.state,
            is_past,
            mappings: process.image.mappings.len(),
            cut_mappings: process.cut_mappings,
            mappings_from: process.mappings_from(),
            unwinding: match self.reader.unwinding.tables() {
                None => Unwinding::FramePointers,
                Some(_) if process.kernel_thread => Unwinding::KernelOnly,
                Some(tables) if tables.is_loaded(&process.key) => Unwinding::Kernel,
                Some(_) => Unwinding::UserSpace,
            },
            interpreter: self.reader.unwinding.interpreters().map_or_else(String::new, |interpreters| {
                interpreters.status(&process.key, process.interpreter.as_deref())
            }),
            service: self.reader.contexts.status(process),
            waiting_samples: self.backlog().waiting(&process.key),
            samples: process.samples,
            rules,
            explanation,
        }
    }

    pub(super) fn rule(&self, rule_id: &str) -> Option<RuleView> {
        let rule = [RuleSource::Remote, RuleSource::Local]
            .into_iter()
            .filter_map(|source| self.rules.source(source))
            .flat_map(|set| &set.rules)
            .find(|rule| rule.id == rule_id)
            .cloned()?;
        let wants = |process: &&Process| {
            slots(process.rules).any(|slot| self.rules.slots().rule_id(slot) == Some(rule_id))
        };
        Some(RuleView {
            rule,
            status: self.rule_statuses().into_iter().find(|status| status.rule_id == rule_id),
            processes: self
                .reader
                .processes
                .alive()
                .filter(wants)
                .map(|process| process.key.process.tgid)
                .collect(),
        })
    }

    pub(super) fn explain(&self, process: &UnknownProcess) -> Vec<(RuleId, String)> {
        let UnknownProcess { comm, exe, cgroup, uid, tgid, runtime: (runtime, runtime_version), service } =
            process;
        let (uid, tgid) = (*uid, *tgid);
        let traits = ProcessTraits { comm, exe, cgroup, uid, tgid, runtime, runtime_version, service };
        self.rules.explain(&traits, None, SystemTime::now())
    }

    pub(super) fn check(&self, source: RuleSource, rules: &[Rule]) -> Vec<RuleError> {
        self.rules.check(source, rules)
    }

    fn backlog(&self) -> &Backlog {
        self.reader.unwinding.backlog()
    }

    fn rule_statuses(&self) -> Vec<RuleStatus> {
        let mut sampled = [0_u64; MAX_RULES];
        for process in self.reader.processes.alive() {
            for slot in slots(process.rules) {
                sampled[slot as usize] += 1;
            }
        }
        self.rules.statuses(SystemTime::now(), |slot| sampled[slot as usize])
    }
}

impl KernelView {
    /// Reads the values. Reading the clocks needs them mutable; it changes nothing that another caller sees.
    pub(super) fn read(kernel: &mut Kernel, tables: Option<&UnwindTables>) -> Self {
        let unwind_tables = tables.map(UnwindTables::stats);
        let stats = unwind_tables.unwrap_or_default();
        // Arrays that the agent fills itself, and maps whose many keys take long to count.
        let known = [
            ("table_lines", stats.resident_bytes / 64),
            ("unwind_rules", stats.rules),
            ("unwind_tables", stats.resident),
            ("exec_mappings", stats.keys),
            ("images", stats.processes),
        ];
        Self {
            maps: kernel.map_fill(&known),
            programs: kernel.programs(),
            sampler_cost: kernel.sampler_cost(),
            unwind_tables,
        }
    }
}
