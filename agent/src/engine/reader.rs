//! From the kernel's events to samples in the window: all state that events change.
//!
//! The worker calls [`Reader::catch_up`] between any two steps. See the [engine](super) for the order that this keeps.

use std::{
    borrow::Cow,
    num::NonZeroUsize,
    time::{Duration, Instant, SystemTime},
};

use gannet_proto::ledger::LossReason;

use super::{
    backlog::Resolved,
    captures::{CaptureAction, Captures, Matched},
    containers::ContainerReports,
    contexts::Contexts,
    discovered::Discovered,
    event_log::EventLog,
    intake::Intake,
    interpreters::Interpreters,
    off_cpu::OffCpu,
    runtime_files::{FoundRuntime, RuntimeFiles},
    sampled::{MarkChange, Sampled},
    unwinding::Unwinding,
    wake_up::WakeUp,
};
use crate::{
    cgroup::CgroupHierarchy,
    kernel::{Event, Kernel, Want},
    model::{ImageKey, Origin, ProcessKey, Sample, SampleKind, StackWord, Subject, boot_time, boot_time_ns},
    process::{
        ImageChanges, ProcError, Process, ProcessState, ProcessTable, StartLabelOptions, all_on_worker,
        check_identity,
    },
    rules::RuleBook,
    tables::UnwindTables,
};

/// How often one catch-up reads the ring buffer at most.
const MAX_READINGS: u32 = 4;

pub(super) struct Reader {
    pub(super) processes: ProcessTable,
    pub(super) discovered: Discovered,
    pub(super) runtime_files: RuntimeFiles,
    pub(super) contexts: Contexts,
    pub(super) sampled: Sampled,
    pub(super) unwinding: Unwinding,
    pub(super) off_cpu: OffCpu,
    pub(super) intake: Intake,
    pub(super) containers: ContainerReports,
    pub(super) events: EventLog,
}

/// The parts of the engine that the reader decides by and writes to, for the time of a call.
pub(super) struct Deciders<'a> {
    pub(super) kernel: &'a mut Kernel,
    pub(super) rules: &'a mut RuleBook,
    pub(super) captures: &'a mut Captures,
    /// Captures are not refused now.
    pub(super) may_begin: bool,
}

impl Reader {
    /// Makes room for this number of processes. Opens the first window, which is `window` long.
    pub(super) fn new(
        hierarchy: CgroupHierarchy,
        processes: usize,
        start_labels: Option<StartLabelOptions>,
        tables: Option<UnwindTables>,
        interpreters: Option<Interpreters>,
        wake_up: &WakeUp,
        window: Duration,
    ) -> Self {
        Self {
            processes: ProcessTable::new(hierarchy, processes, raise_file_limit(), start_labels),
            discovered: Discovered::new(Instant::now()),
            runtime_files: RuntimeFiles::new(wake_up.clone()),
            contexts: Contexts::new(wake_up.clone()),
            sampled: Sampled::default(),
            unwinding: Unwinding::new(tables, interpreters),
            off_cpu: OffCpu::default(),
            intake: Intake::new(window),
            containers: ContainerReports::default(),
            events: EventLog::default(),
        }
    }

    /// Applies everything that the kernel has reported by now, in its order. A process that was read from `/proc` may have
    /// had another image by then: that shows in what the kernel reported meanwhile, so the ring buffer is read again.
    pub(super) fn catch_up(&mut self, with: &mut Deciders<'_>) {
        for _ in 0..MAX_READINGS {
            let before = self.processes.stats();
            let events = match with.kernel.read() {
                Ok(events) => events,
                Err(error) => {
                    tracing::error!("{error}");
                    return;
                }
            };
            let now = SystemTime::now();
            for event in events {
                self.apply(event, with, now);
            }
            self.hand_on_changes();
            self.decide_by_runtime(with, now);
            self.decide_by_service(with, now);
            let after = self.processes.stats();
            if (after.loaded, after.rescans) == (before.loaded, before.rescans) {
                return;
            }
        }
    }

    fn apply(&mut self, event: Event, with: &mut Deciders<'_>, now: SystemTime) {
        match event {
            Event::Mapping(mapping) => self.processes.mapping_event(mapping),
            Event::Sample(sample) => self.add_sample(sample, with, now),
            Event::Exec { subject, path, by_thread, origin, file } => {
                let how = if by_thread { " by a thread" } else { "" };
                self.events.add(now, format!("exec {} {} {path}{how}", subject.key, subject.comm));
                self.discovered.take(subject.key.tgid);
                if let Some(process) = self.processes.exec(&subject, origin, &path, file).ok().cloned() {
                    self.sampled.replace_image(subject.key.tgid);
                    self.decide_new(&process, &subject, None, &path, with, now);
                }
            }
            Event::Fork { subject, origin } => {
                self.events.add(now, format!("fork {} {} from {}", subject.key, subject.comm, origin.parent));
                self.discovered.take(subject.key.tgid);
                let parent = Some(origin.parent);
                if let Some(process) = self.processes.fork(&subject, origin).ok().cloned() {
                    self.decide_new(&process, &subject, parent, "", with, now);
                }
            }
            Event::Function { subject, copy } => {
                self.unwinding.add_copy(ImageKey::of(&subject), copy, &self.processes);
            }
            // The ring buffer has joined them to their samples.
            Event::Labels { .. } => {}
            Event::Running { subject, origin } => {
                self.events.add(now, format!("running {} {}", subject.key, subject.comm));
                self.discover(subject, origin, with, now);
            }
            Event::Exit { subject, status, .. } => {
                let (key, comm, code, signal) = (subject.key, &subject.comm, status.code(), status.signal());
                self.events.add(now, format!("exit {key} {comm} code {code} signal {signal}"));
                self.discovered.take(key.tgid);
                self.remove_from_kernel(key.tgid, with);
                self.processes.exit(&subject, status);
            }
        }
    }

    /// Decides about a process that has just called `execve` or was forked.
    fn decide_new(
        &mut self,
        process: &Process,
        subject: &Subject,
        parent: Option<u32>,
        path: &str,
        with: &mut Deciders<'_>,
        now: SystemTime,
    ) {
        let (key, cgroup_id) = (process.key, process.cgroup_id);
        let Subject { rules, candidates, .. } = *subject;
        let matched = Matched { key, cgroup_id, rules, candidates, parent, path };
        for action in with.captures.matched(&matched, with.may_begin, boot_time()) {
            if let CaptureAction::Refuse { key, slot } = action {
                self.refuse(key, slot, with.kernel, with.rules);
            }
        }
        self.decide(process, subject.candidates, with, now);
    }

    /// A process already ran when a rule came that wants it.
    fn discover(&mut self, subject: Subject, origin: Origin, with: &mut Deciders<'_>, now: SystemTime) {
        let known = self.processes.get(&ImageKey::of(&subject)).map(|process| process.state);
        // A process that is known costs nothing, and may be marked: the rules decide again at once.
        let is_read = known.is_some_and(|state| state != ProcessState::Unread);
        let begun = Instant::now();
        if !is_read && !self.discovered.has_time(begun) {
            self.discovered.push(subject, origin);
            return;
        }
        self.discovered.take(subject.key.tgid);
        self.read_running(&subject, origin, with, now);
        if !is_read {
            self.discovered.spent(begun, Instant::now());
        }
    }

    fn read_running(&mut self, subject: &Subject, origin: Origin, with: &mut Deciders<'_>, now: SystemTime) {
        if let Some(process) = self.processes.running(subject, origin).ok().cloned() {
            self.decide(&process, subject.candidates, with, now);
        }
    }

    /// Reads some of the processes that already ran and wait.
    pub(super) fn read_discovered(&mut self, with: &mut Deciders<'_>) {
        let now = SystemTime::now();
        let mut begun = Instant::now();
        while let Some((subject, origin)) = self.discovered.next(begun) {
            self.read_running(&subject, origin, with, now);
            let end = Instant::now();
            self.discovered.spent(begun, end);
            begun = end;
        }
    }

    fn add_sample(&mut self, mut sample: Sample, with: &mut Deciders<'_>, now: SystemTime) {
        self.intake.lose_rules(LossReason::CaptureOver, &mut sample, |sample| with.captures.strip(sample));
        if sample.kind == SampleKind::OffCpu {
            self.off_cpu.returned(&mut sample);
            // A rule may have got its slot while the thread was blocked, or lost it.
            let slots = with.rules.slots();
            self.intake.lose_rules(LossReason::NoRule, &mut sample, |Sample { subject, .. }| {
                subject.rules = slots.held_since(subject.rules, subject.ktime_ns);
            });
            self.unwinding.add_off_cpu(&sample);
        }
        if self.intake.lose_unreadable(&sample) || sample.subject.rules == 0 {
            return;
        }
        // A process with samples does not wait to be read.
        if !self.discovered.is_empty()
            && let Some((subject, origin)) = self.discovered.take(sample.subject.key.tgid)
            && subject.key == sample.subject.key
        {
            self.read_running(&subject, origin, with, now);
        }
        with.rules.count_sample(sample.subject.rules, now);
        // A stack that the kernel unwound by tables has known addresses only. A raw stack may wait for its tables: where it
        // begins is looked up now, while it is mapped, since the kernel does not report mremap.
        let by_tables = self.unwinding.tables().is_some() && sample.kind == SampleKind::OnCpu;
        let addresses = match &sample.raw {
            Some(raw) => std::slice::from_ref(&raw.pc),
            None if by_tables => &[],
            None => &addresses_of(&sample.user),
        };
        if let Ok(process) = self.processes.sampled(&sample.subject, addresses) {
            self.containers.report(process);
            self.contexts.sampled(process);
        }
        self.hand_on_changes();
        if sample.raw.is_none() {
            self.unwinding.enter_functions(&mut sample, &mut self.processes);
            self.intake.add(sample);
        } else {
            self.unwinding.push(sample);
        }
    }

    /// Adds the off-CPU time so far of threads that are still blocked.
    pub(super) fn add_off_cpu(&mut self, kernel: &Kernel, rules: &RuleBook) {
        if !rules.slots().wants_off_cpu(SystemTime::now()) {
            self.off_cpu.clear();
            return;
        }
        for mut sample in self.off_cpu.still_blocked(kernel.blocked_now(boot_time_ns())) {
            sample.subject.rules = rules.slots().held_since(sample.subject.rules, sample.subject.ktime_ns);
            if sample.subject.rules != 0 {
                // Without room in the table the sample has no process, which the window says.
                let addresses = match &sample.raw {
                    Some(raw) => Cow::Owned(vec![raw.pc]),
                    None => addresses_of(&sample.user),
                };
                let _ = self.processes.sampled(&sample.subject, &addresses);
                self.hand_on_changes();
                if sample.raw.is_some() {
                    self.intake.take_own(&sample);
                    self.unwinding.push(sample);
                } else {
                    self.unwinding.enter_functions(&mut sample, &mut self.processes);
                    self.intake.add_own(sample);
                }
            }
        }
    }

    /// Hands on which mappings have changed. Samples from before a replaced file keep the image as it was.
    fn hand_on_changes(&mut self) {
        let ImageChanges { changed, replaced } = self.processes.take_changes();
        self.runtime_files.changed(&changed, &self.processes);
        self.unwinding.add_changed(changed);
        for (key, former) in replaced {
            self.unwinding.replace_image(&key, &former);
            self.intake.replace_image(key, former);
        }
    }

    /// Adds the raw samples to the window whose tables are made; with `force` all.
    pub(super) fn resolve(&mut self, kernel: &mut Kernel, rules: &RuleBook, force: bool) {
        self.hand_on_changes();
        for resolved in self.unwinding.resolve(kernel, &mut self.processes, rules, force) {
            match resolved {
                Resolved::Sample { sample, former: None } => self.intake.add(sample),
                Resolved::Sample { sample, former: Some(former) } => self.intake.add_former(&former, sample),
                Resolved::Changes(changes) => {
                    for (key, former) in changes.replaced {
                        self.intake.replace_image(key, former);
                    }
                }
                Resolved::Done(_) => {}
            }
        }
    }

    /// Decides about a process by the rules that the BPF programs cannot decide. `candidates` are the rules of which all
    /// other properties match.
    fn decide(&mut self, process: &Process, candidates: u64, with: &mut Deciders<'_>, now: SystemTime) {
        let candidates = with.captures.open(process.key, candidates);
        let with_runtime = self.find_runtime(process, candidates, with.rules);
        let process = with_runtime.as_ref().unwrap_or(process);
        let slots = with.rules.slots();
        let compares_service = candidates != 0 && slots.comparing_service(candidates) != 0;
        let is_followed = slots.in_span() & (process.rules | candidates) != 0;
        self.contexts.watch(process, if compares_service { candidates } else { 0 }, is_followed);
        let matching = |candidates| match candidates {
            0 => Want::default(),
            _ => with.rules.slots().decide(process, candidates, now),
        };
        let mut want = matching(candidates);
        let refused = with.captures.matched_by_agent(process.key, want.rules, with.may_begin, boot_time());
        if refused != 0 {
            want = matching(candidates & !refused);
        }
        self.processes.wanted(&process.key, want.rules);
        if with.rules.slots().wants_off_cpu_of(process.rules | want.rules) {
            self.unwinding.add_blocked(process.key);
        }
        self.mark(process.key, want, with.kernel, with.rules);
    }

    /// Returns the process with its language runtime, if a rule compares that and it was not known before.
    fn find_runtime(&mut self, process: &Process, candidates: u64, rules: &RuleBook) -> Option<Process> {
        let is_compared = candidates != 0 && rules.slots().comparing_runtime(candidates) != 0;
        if !is_compared || process.runtime().is_some() || process.kernel_thread {
            self.runtime_files.forget(process.key.process.tgid);
            return None;
        }
        let runtime = self.runtime_files.find(process, candidates)?;
        self.processes.set_runtime(&process.key, runtime);
        self.processes.get(&process.key).cloned()
    }

    /// Decides again about the processes whose language runtime was found meanwhile.
    fn decide_by_runtime(&mut self, with: &mut Deciders<'_>, now: SystemTime) {
        for FoundRuntime { key, runtime, candidates } in self.runtime_files.take_found() {
            self.processes.set_runtime(&key, runtime);
            let process = self.processes.get(&key).filter(|process| process.is_alive()).cloned();
            if let Some(process) = process {
                self.decide(&process, candidates, with, now);
            }
        }
    }

    /// Applies the services that the reading thread has found, and decides again about each process whose service a rule compares.
    fn decide_by_service(&mut self, with: &mut Deciders<'_>, now: SystemTime) {
        for (key, candidates) in self.contexts.collect(with.kernel, &mut self.processes) {
            if let Some(process) = self.processes.get(&key).filter(|process| process.is_alive()).cloned() {
                self.decide(&process, candidates, with, now);
            }
        }
    }

    /// Marks an image for what the agent has decided.
    fn mark(&mut self, key: ImageKey, want: Want, kernel: &mut Kernel, rules: &RuleBook) {
        let matched = self.processes.get(&key).map_or(0, |process| process.rules);
        let change = self.sampled.mark(key, want, matched, |rest| rules.slots().shortest_period_ns(rest));
        write_mark(kernel, change);
    }

    /// Takes a rule off an image that the BPF programs matched.
    pub(super) fn refuse(&mut self, key: ImageKey, slot: u32, kernel: &mut Kernel, rules: &RuleBook) {
        let matched = self.processes.get(&key).map_or(0, |process| process.rules);
        let change = self.sampled.refuse(key, slot, matched, |rest| rules.slots().shortest_period_ns(rest));
        write_mark(kernel, change);
    }

    /// Takes the marks off the processes that no rule wants since the rules changed. Decides again about those whose capture
    /// began at their `execve`: the kernel does not report them.
    pub(super) fn settle_marks(&mut self, with: &mut Deciders<'_>) {
        let now = SystemTime::now();
        for key in with.captures.undecided() {
            let process = self.processes.get(&key).filter(|process| process.is_alive()).cloned();
            if let Some(process) = process {
                self.decide(&process, 0, with, now);
            }
        }
        for key in self.sampled.undecided() {
            self.mark(key, Want::default(), with.kernel, with.rules);
        }
    }

    /// A process has ended: takes everything of it out of the kernel.
    fn remove_from_kernel(&mut self, tgid: u32, with: &mut Deciders<'_>) {
        with.captures.left(tgid, boot_time());
        write_mark(with.kernel, self.sampled.remove(tgid));
        self.runtime_files.forget(tgid);
        self.unwinding.remove(with.kernel, tgid);
    }

    /// Reads the processes again that did not answer before, if something has answered.
    pub(super) fn read_unanswered(&mut self, kernel: &mut Kernel) {
        let report_again = self.processes.read_unanswered();
        self.hand_on_changes();
        if report_again && let Err(error) = kernel.scan_processes() {
            tracing::warn!("{error}");
        }
    }

    /// Repairs what lost events and missing tracepoints leave behind, in both directions, by process key: removes the
    /// processes that have ended from the table and from the kernel, and has the kernel report those that rules want.
    pub(super) fn reconcile(&mut self, with: &mut Deciders<'_>) {
        for key in self.processes.reconcile() {
            self.remove_from_kernel(key.process.tgid, with);
            with.kernel.forget(key.process);
        }
        let has_ended =
            |key| matches!(check_identity(key), Err(ProcError::Gone(_) | ProcError::Recycled { .. }));
        let marked: Vec<ProcessKey> = self.sampled.processes().collect();
        let ended = all_on_worker(move || {
            marked.into_iter().filter(|key| has_ended(*key)).map(|key| key.tgid).collect::<Vec<_>>()
        })
        .unwrap_or_default();
        for tgid in ended {
            self.remove_from_kernel(tgid, with);
        }
        if let Err(error) = with.kernel.scan_processes() {
            tracing::warn!("{error}");
        }
    }
}

/// Returns the addresses of a stack, without the words of list frames.
fn addresses_of(stack: &[u64]) -> Cow<'_, [u64]> {
    if stack.iter().all(|word| StackWord::is_address(*word)) {
        return Cow::Borrowed(stack);
    }
    stack.iter().copied().filter(|word| StackWord::is_address(*word)).collect()
}

fn write_mark(kernel: &mut Kernel, change: Option<MarkChange>) {
    match change {
        Some(MarkChange::Write(mark)) => kernel.mark(&mark),
        Some(MarkChange::Remove(tgid)) => kernel.unmark(tgid),
        None => {}
    }
}

/// Raises the number of open files as far as the system allows. Returns how many of them mapped files may take.
fn raise_file_limit() -> NonZeroUsize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!("cannot raise the number of open files above {:?}: {error}", limit.current);
    }
    let max = getrlimit(Resource::Nofile).current.unwrap_or(65_536).min(65_536);
    NonZeroUsize::new(usize::try_from(max / 4).unwrap_or(256)).unwrap_or(NonZeroUsize::MIN)
}
