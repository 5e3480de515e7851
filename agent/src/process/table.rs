//! The process table: the sampled processes that are alive or have just exited, and their images. It is the only owner of such
//! state.
//!
//! The kernel's events come in the order of kernel time. The executable, the mappings and the control group of an image are
//! reported before its samples. `/proc` is read only for processes without such events. A reading may be late: the process may
//! have another image by then. Later events show that, and the table drops the reading.

use std::{collections::HashMap, mem, num::NonZeroUsize, sync::Arc};

use lru::LruCache;

use super::{
    FileTableStats, ImageChanges, MetadataOptions, MetadataStats, Process, ProcessMetadataCache,
    ProcessState, StartLabelOptions,
    images::{ImageReader, MAX_MAPPINGS, MapsLines, on_worker, read_lines},
    metadata::MetadataError,
    perf_map_files,
    proc::{self, ProcError, ProcFs, RealProc},
    start_labels::ReadStartLabels,
};
use crate::{
    access::{self, ENGINE_DEADLINE, Target},
    cgroup::{CgroupHierarchy, CgroupNames, CgroupTree, parse_path},
    model::{
        ExitStatus, FileNumbers, ImageKey, MappingEvent, NewMapping, Origin, ProcessKey, Service, Subject,
    },
    runtimes::{Interpreter, RuntimeFile},
};

/// Paths of control groups that are remembered, for processes that exit before they can be read.
const MAX_CGROUPS: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
/// Pending images, whose exec event has not come. Most belong to processes that no rule matches. The table counts those beyond,
/// which it reads from `/proc` if a rule matches them.
const MAX_PENDING: usize = 4096;
/// After this time a pending image is dropped.
const PENDING_TIMEOUT_NS: u64 = 1_000_000_000;
/// The part of a full table that is pruned at one time, so that not every new entry costs a scan of all others.
const PRUNED_PART: usize = 16;
/// Without mapping events: the new image may have been in place for this time before the exec event.
const EXEC_NS: u64 = 10_000_000;

/// The table is full of sampled processes and cannot take another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the process table is full: {max} processes are sampled at one time; raise --processes")]
pub struct ProcessTableFull {
    /// The capacity of the table.
    pub max: usize,
}

/// All processes that are sampled, or were until just now.
pub struct ProcessTable {
    alive: HashMap<u32, Process>,
    /// Replaced images and exited processes, until a whole window has passed without a sample of them. In a storm there are
    /// tens of thousands of them: the map doubles when it grows, so its slots are kept small.
    past: HashMap<ImageKey, Box<Process>>,
    /// Images whose `execve` has begun and whose exec event has not come.
    pending: HashMap<u32, PendingImage>,
    images: ImageReader,
    cgroups: LruCache<u64, String>,
    cgroup_tree: Option<Arc<CgroupTree>>,
    metadata: ProcessMetadataCache,
    proc: Arc<dyn ProcFs>,
    hierarchy: CgroupHierarchy,
    start_labels: Option<Arc<StartLabelOptions>>,
    max: usize,
    window: u64,
    is_full: bool,
    /// Images are not kept because too many are pending; logged.
    is_pending_full: bool,
    /// The number of late answers that are dealt with.
    answered: u64,
    stats: ProcessStats,
}

/// An image between the start of `execve`, which clears the former image, and the exec event.
struct PendingImage {
    since_ns: u64,
    mappings: Vec<NewMapping>,
    /// Mappings beyond those.
    cut: u64,
    /// The image, if one of its samples came before the exec event.
    sampled: Option<ImageKey>,
}

/// Counts of the process table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessStats {
    /// Images whose mappings the kernel reported.
    pub reported: u64,
    /// Processes that were read from `/proc`.
    pub loaded: u64,
    /// Processes that had exited, or had another image, before they could be read.
    pub missed: u64,
    /// Readings of mappings beyond the first of a process.
    pub rescans: u64,
    /// Executable mappings beyond those that are read of one process.
    pub cut_mappings: u64,
    /// Images whose mappings the kernel reported and the table did not keep, because too many waited for their exec events.
    pub pending_full: u64,
    /// Entries that were dropped early because the table was full.
    pub pruned: u64,
    /// Processes that the full table could not take.
    pub saturated: u64,
    /// Entries whose exit was not reported, found by a scan.
    pub reconciled: u64,
    /// Sampled processes whose command line, directory or environment could not be read, though the user wants them as labels.
    pub unlabelled: u64,
}

impl ProcessTable {
    /// Builds a table of at most `max` processes and `files` open files.
    pub(crate) fn new(
        hierarchy: CgroupHierarchy,
        max: usize,
        files: NonZeroUsize,
        start_labels: Option<StartLabelOptions>,
    ) -> Self {
        let tree = CgroupTree::of(hierarchy).inspect_err(|error| {
            tracing::warn!(
                "cannot find the control groups of exited processes, reading /proc alone: {error}"
            );
        });
        let table = Self::reading(hierarchy, max, files, Arc::new(RealProc::default()));
        Self { cgroup_tree: tree.ok().map(Arc::new), start_labels: start_labels.map(Arc::new), ..table }
    }

    /// Builds a table that reads processes from `proc`, and knows no tree of control groups.
    pub fn reading(
        hierarchy: CgroupHierarchy,
        max: usize,
        files: NonZeroUsize,
        proc: Arc<dyn ProcFs>,
    ) -> Self {
        let options = MetadataOptions {
            entries: max,
            // Profiles contain neither.
            cmdline: false,
            cwd: false,
            hierarchy,
            ..MetadataOptions::default()
        };
        Self {
            alive: HashMap::new(),
            past: HashMap::new(),
            pending: HashMap::new(),
            images: ImageReader::new(files, Arc::clone(&proc)),
            cgroups: LruCache::new(MAX_CGROUPS),
            cgroup_tree: None,
            metadata: ProcessMetadataCache::reading(options, Arc::clone(&proc)),
            proc,
            hierarchy,
            start_labels: None,
            max,
            window: 0,
            is_full: false,
            is_pending_full: false,
            answered: 0,
            stats: ProcessStats::default(),
        }
    }

    /// Returns the tree of control groups of this host, if it could be opened.
    pub(crate) fn groups(&self) -> Option<&Arc<CgroupTree>> {
        self.cgroup_tree.as_ref()
    }

    /// Takes a mapping event. The caller passes all of them up to the time of the next other event before that event.
    pub fn mapping_event(&mut self, event: MappingEvent) {
        match event {
            MappingEvent::Cleared { tgid, ktime_ns } => {
                if self.pending.len() >= MAX_PENDING {
                    self.pending.retain(|_, pending| pending.since_ns + PENDING_TIMEOUT_NS > ktime_ns);
                }
                // However many others are pending: an image in the table must not get the mappings of the next one.
                if self.pending.len() < MAX_PENDING || self.alive.contains_key(&tgid) {
                    let pending =
                        PendingImage { since_ns: ktime_ns, mappings: Vec::new(), cut: 0, sampled: None };
                    self.pending.insert(tgid, pending);
                } else {
                    self.count_pending_full(tgid);
                }
                self.drop_readings(tgid, ktime_ns);
            }
            MappingEvent::Mapped { tgid, ktime_ns, mapping } => {
                let mut is_pending = false;
                if let Some(pending) = self.pending.get_mut(&tgid) {
                    // An image that was sampled already is in the table, and its exec event may never come.
                    let known = self.alive.get(&tgid).map(|process| process.key);
                    is_pending = pending.sampled.is_none() || pending.sampled != known;
                    if pending.mappings.len() < MAX_MAPPINGS {
                        pending.mappings.push(mapping.clone());
                    } else {
                        pending.cut += 1;
                    }
                }
                if !is_pending
                    && let Some(process) = self.alive.get_mut(&tgid)
                    && process.is_alive()
                    && process.read_at_ns.is_none_or(|read| read < ktime_ns)
                {
                    self.images.add(process, &mapping);
                }
            }
        }
    }

    /// Counts an image that is not kept until its exec event. Its mappings come from `/proc` then, if the process lives that long.
    fn count_pending_full(&mut self, tgid: u32) {
        self.stats.pending_full += 1;
        if !mem::replace(&mut self.is_pending_full, true) {
            tracing::warn!(
                tgid,
                "more than {MAX_PENDING} processes call execve at one time: the agent reads the mappings of this one and \
                 others from /proc, and those that end at once have no names; start fewer processes at one time"
            );
        }
    }

    /// Returns the changes of images since the last call.
    pub(crate) fn take_changes(&mut self) -> ImageChanges {
        self.images.take_changes()
    }

    /// Takes an exec event. The former image is kept for its last samples.
    pub fn exec(
        &mut self,
        subject: &Subject,
        origin: Origin,
        path: &str,
        file: FileNumbers,
    ) -> Result<&mut Process, ProcessTableFull> {
        let key = ImageKey::of(subject);
        let tgid = subject.key.tgid;
        let pending = self.pending.remove(&tgid).filter(|pending| !pending.mappings.is_empty());
        let mut process = match self.alive.remove(&tgid) {
            // A sample of the new image came before its exec event.
            Some(sampled) if sampled.key == key => sampled,
            other => {
                if let Some(other) = other {
                    self.alive.insert(tgid, other);
                    let since = pending
                        .as_ref()
                        .map_or(subject.ktime_ns.saturating_sub(EXEC_NS), |pending| pending.since_ns);
                    self.drop_readings(tgid, since);
                    self.retire(tgid, ProcessState::Replaced);
                }
                self.unread(subject)
            }
        };
        self.metadata.invalidate(subject.key);
        process.comm.clone_from(&subject.comm);
        process.parent = origin.parent;
        process.uid = Some(origin.uid);
        process.rules = subject.rules;
        if let Some(pending) = pending {
            self.adopt(&mut process, &pending, Some(file));
        } else if process.state == ProcessState::Unread {
            self.load(&mut process);
        }
        if process.exe.is_empty() {
            path.clone_into(&mut process.exe);
        }
        self.enter(process)
    }

    /// Takes a fork event. The child has its parent's image until it calls `execve`. If the parent is unknown, the child is
    /// read at its first sample only: most children call `execve` before that.
    pub fn fork(&mut self, subject: &Subject, origin: Origin) -> Result<&mut Process, ProcessTableFull> {
        self.pending.remove(&subject.key.tgid);
        self.retire_unobserved(subject.key.tgid);
        let process = match self.alive.get(&origin.parent) {
            // A child starts with its parent's count of `execve` calls. With another count, the parent has had an image whose
            // exec event was lost.
            Some(parent) if parent.is_alive() && parent.key.exec_id == subject.exec_id => Process {
                key: ImageKey::of(subject),
                parent: origin.parent,
                cgroup_id: subject.cgroup_id,
                rules: subject.rules,
                samples: 0,
                window: self.window,
                seen_ns: subject.ktime_ns,
                // A thread with a name of its own may have forked it.
                comm: subject.comm.clone(),
                reported_comm: subject.comm.clone(),
                ..parent.clone()
            },
            _ => Process { parent: origin.parent, uid: Some(origin.uid), ..self.unread(subject) },
        };
        self.enter(process)
    }

    /// Takes the event of a process that was already running, and reads it.
    pub fn running(&mut self, subject: &Subject, origin: Origin) -> Result<&mut Process, ProcessTableFull> {
        let tgid = subject.key.tgid;
        let mut process = match self.alive.remove(&tgid) {
            Some(process) if process.key == ImageKey::of(subject) => process,
            other => {
                self.alive.extend(other.map(|other| (tgid, other)));
                self.retire_unobserved(tgid);
                self.unread(subject)
            }
        };
        process.parent = origin.parent;
        process.uid = Some(origin.uid);
        process.rules = subject.rules;
        process.seen_ns = process.seen_ns.max(subject.ktime_ns);
        // It may have renamed itself.
        process.comm.clone_from(&subject.comm);
        process.reported_comm.clone_from(&subject.comm);
        if process.cgroup_id != subject.cgroup_id {
            // It was moved to another control group.
            process.cgroup_id = subject.cgroup_id;
            self.find_cgroup(&mut process);
        }
        if process.state == ProcessState::Unread {
            self.load_unless_replaced(&mut process, subject.ktime_ns);
        }
        self.enter(process)
    }

    /// New rules are in force: forgets which of the former ones sampled a process, except those of `all` processes. The kernel
    /// reports each process again that a rule wants.
    pub(crate) fn begin_round(&mut self, all: u64) {
        for process in self.alive.values_mut() {
            process.rules &= all;
        }
    }

    /// Adds rules by which the agent itself decided to sample an image.
    pub(crate) fn wanted(&mut self, key: &ImageKey, rules: u64) {
        if let Some(process) = self.alive.get_mut(&key.process.tgid).filter(|process| process.key == *key) {
            process.rules |= rules;
        }
    }

    /// Takes an exit event.
    pub fn exit(&mut self, subject: &Subject, status: ExitStatus) {
        let Some(process) = self.alive.get(&subject.key.tgid) else { return };
        if process.key.process == subject.key {
            if process.key != ImageKey::of(subject) {
                // Its last image differs from the known one: an exec event was lost.
                self.drop_readings(subject.key.tgid, process.seen_ns);
            }
            self.pending.remove(&subject.key.tgid);
            self.retire(subject.key.tgid, ProcessState::Ended(status));
        }
    }

    /// Returns the process of a sample. Reads it if no event reported it, and reads its mappings again if they hold not all of
    /// the sample's user addresses.
    pub fn sampled(
        &mut self,
        subject: &Subject,
        addresses: &[u64],
    ) -> Result<&mut Process, ProcessTableFull> {
        let key = ImageKey::of(subject);
        let tgid = subject.key.tgid;
        let window = self.window;
        let is_past = self.past.contains_key(&key);
        if !is_past {
            self.ensure_alive(subject)?;
        }
        let process =
            if is_past { self.past.get_mut(&key).map(Box::as_mut) } else { self.alive.get_mut(&tgid) };
        let process = process.ok_or(ProcessTableFull { max: self.max })?;
        process.window = window;
        process.samples += 1;
        if process.samples == 1 && process.makes_code {
            // A forked process has its parent's memory and a map of its own.
            perf_map_files().note(process.key.process);
        }
        process.rules |= subject.rules;
        process.seen_ns = process.seen_ns.max(subject.ktime_ns);
        if !is_past {
            self.images.rescan(process, addresses);
        }
        if process.start_labels.is_none()
            && let Some(options) = &self.start_labels
        {
            let (options, proc, key) = (Arc::clone(options), Arc::clone(&self.proc), process.key.process);
            let read = if is_past {
                Err(ProcError::Gone(key.tgid))
            } else {
                on_worker(key, move || options.read(&*proc, key)).and_then(|read| read)
            };
            if let Err(error) = &read {
                tracing::debug!(%key, "no labels from its start: {error}");
                self.stats.unlabelled += 1;
            }
            let labels = read.ok().map(Arc::new);
            process.start_labels = Some(ReadStartLabels { at_ns: self.proc.now_ns(), labels });
        }
        Ok(process)
    }

    /// Makes sure that the image of a sample is in the table as the current one of its process.
    fn ensure_alive(&mut self, subject: &Subject) -> Result<(), ProcessTableFull> {
        let key = ImageKey::of(subject);
        let tgid = subject.key.tgid;
        let mut process = match self.alive.remove(&tgid) {
            Some(process) if process.key == key && process.state != ProcessState::Unread => {
                self.alive.insert(tgid, process);
                return Ok(());
            }
            Some(process) if process.key == key => process,
            other => {
                self.alive.extend(other.map(|other| (tgid, other)));
                self.retire_unobserved(tgid);
                self.unread(subject)
            }
        };
        // A process that had this id before left the image behind if its last events were lost. The clock of start times also
        // counts while the machine is suspended; there the process is read, as if nothing was pending.
        let pending = self.pending.remove(&tgid);
        match pending.filter(|pending| pending.since_ns >= key.process.start_boottime_ns) {
            // In the middle of `execve`: the mappings so far belong to this image. The exec event will bring the rest.
            Some(mut pending) if pending.since_ns <= subject.ktime_ns => {
                pending.sampled = Some(key);
                self.adopt(&mut process, &pending, None);
                if pending.mappings.is_empty() {
                    process.state = ProcessState::Unread;
                }
                self.pending.insert(tgid, pending);
            }
            Some(pending) => {
                self.pending.insert(tgid, pending);
                self.miss(&mut process, "it has another image by now");
            }
            None => self.load(&mut process),
        }
        self.enter(process).map(drop)
    }

    /// Reads the mappings of an image again because a stack of it holds an unknown address, unless that was done just now.
    pub(crate) fn sampled_again(&mut self, key: &ImageKey, address: u64) -> Option<&Process> {
        let process = self.alive.get_mut(&key.process.tgid).filter(|process| process.key == *key)?;
        self.images.rescan(process, &[address]);
        Some(process)
    }

    /// Returns an image, current or past.
    pub fn get(&self, key: &ImageKey) -> Option<&Process> {
        let alive = || self.alive.get(&key.process.tgid).filter(|process| process.key == *key);
        self.past.get(key).map(Box::as_ref).or_else(alive)
    }

    /// Returns the processes that are alive.
    pub fn alive(&self) -> impl Iterator<Item = &Process> {
        self.alive.values()
    }

    /// Returns the replaced images and exited processes that are kept for their last samples.
    pub fn past(&self) -> impl Iterator<Item = &Process> {
        self.past.values().map(Box::as_ref)
    }

    /// Returns the counts of the table.
    pub fn stats(&self) -> ProcessStats {
        ProcessStats { rescans: self.images.rescans, cut_mappings: self.images.cut, ..self.stats }
    }

    /// Returns the counts of the metadata.
    pub(crate) fn metadata_stats(&self) -> MetadataStats {
        self.metadata.stats()
    }

    /// Returns the counts of the open files.
    pub(crate) fn file_stats(&self) -> FileTableStats {
        self.images.file_stats()
    }

    /// Ends a window: drops past images that were not sampled for a whole window. Those that `in_hand` reports are kept,
    /// because samples of them are still in the engine.
    pub fn next_window(&mut self, in_hand: impl Fn(&ImageKey) -> bool) {
        self.window += 1;
        let window = self.window;
        self.past.retain(|key, process| process.window + 1 >= window || in_hand(key));
        self.metadata.next_window();
    }

    /// Checks whether the processes in the table are still alive, and retires the others: this repairs lost exit events.
    /// Returns the retired ones.
    pub fn reconcile(&mut self) -> Vec<ImageKey> {
        let alive: Vec<ImageKey> = self.alive.values().map(|process| process.key).collect();
        let proc = Arc::clone(&self.proc);
        let exited = all_on_worker(move || {
            alive.into_iter().filter(|key| !is_running(&*proc, key.process)).collect::<Vec<_>>()
        })
        .unwrap_or_default();
        self.stats.reconciled += exited.len() as u64;
        for key in &exited {
            // It may have had another image at its end.
            if let Some(seen_ns) = self.alive.get(&key.process.tgid).map(|process| process.seen_ns) {
                self.drop_readings(key.process.tgid, seen_ns);
            }
            self.retire(key.process.tgid, ProcessState::Ended(ExitStatus(0)));
        }
        exited
    }

    /// Reads the processes again that did not answer, after something has answered late. Returns whether the kernel has to
    /// report processes again, because the rules need to know more of them.
    pub(crate) fn read_unanswered(&mut self) -> bool {
        let answered = access::node().stats().answered;
        if mem::replace(&mut self.answered, answered) == answered {
            return false;
        }
        let mut report_again = false;
        for process in self.alive.values_mut().filter(|process| process.unanswered) {
            process.unanswered = false;
            match process.state {
                ProcessState::Missed => {
                    process.state = ProcessState::Unread;
                    report_again = true;
                }
                _ => self.images.read_again(process),
            }
        }
        report_again
    }

    /// Sets the interpreter of an image. Returns false if the image is not known.
    pub(crate) fn set_interpreter(&mut self, key: &ImageKey, interpreter: Arc<Interpreter>) -> bool {
        let alive = self.alive.get_mut(&key.process.tgid).filter(|process| process.key == *key);
        let process = alive.or_else(|| self.past.get_mut(key).map(|process| &mut **process));
        process.map(|process| process.interpreter = Some(interpreter)).is_some()
    }

    /// Sets the interpreter's file of a current image.
    pub(crate) fn set_runtime(&mut self, key: &ImageKey, file: Arc<RuntimeFile>) {
        if let Some(process) = self.alive.get_mut(&key.process.tgid).filter(|process| process.key == *key) {
            process.runtime = Some(file);
        }
    }

    /// Sets the service that an image gives.
    pub(crate) fn set_service(&mut self, key: &ImageKey, service: &Arc<Service>) {
        let alive = self.alive.get_mut(&key.process.tgid).filter(|process| process.key == *key);
        if let Some(process) = alive.or_else(|| self.past.get_mut(key).map(|process| &mut **process)) {
            process.service = Arc::clone(service);
        }
    }

    /// Drops old pending images, of processes that no rule matches, and closes idle files.
    pub(crate) fn tidy(&mut self) {
        let now = self.proc.now_ns();
        self.pending.retain(|_, pending| pending.since_ns + PENDING_TIMEOUT_NS > now);
        self.is_pending_full &= self.pending.len() >= MAX_PENDING;
        self.images.close_idle_files();
    }

    fn retire(&mut self, tgid: u32, state: ProcessState) {
        let Some(mut process) = self.alive.remove(&tgid) else { return };
        // Samples of it that are still in the ring buffer belong to the current window.
        process.window = self.window;
        if !matches!(process.state, ProcessState::Missed | ProcessState::Unread) {
            process.state = state;
        }
        if state != ProcessState::Replaced {
            self.metadata.remove(process.key.process);
        }
        self.past.insert(process.key, Box::new(process));
    }

    /// Retires an image after its successor was seen, though no event reported the change. A reading that is younger than its
    /// last event may have been of the successor.
    fn retire_unobserved(&mut self, tgid: u32) {
        if let Some(seen_ns) = self.alive.get(&tgid).map(|process| process.seen_ns) {
            self.drop_readings(tgid, seen_ns);
            self.retire(tgid, ProcessState::Replaced);
        }
    }

    /// Drops what was read from `/proc` after this time: the image was replaced then, and the reading was of the next one.
    fn drop_readings(&mut self, tgid: u32, since_ns: u64) {
        let Some(process) = self.alive.get_mut(&tgid) else { return };
        if let Some(read) = process.start_labels.as_mut().filter(|read| read.at_ns > since_ns) {
            read.labels = None;
        }
        if process.read_at_ns.is_none_or(|read| read <= since_ns) {
            return;
        }
        let (key, wrong) = (process.key, Arc::clone(&process.image));
        self.metadata.invalidate(key.process);
        // Children that were forked meanwhile got the same image.
        for process in self.alive.values_mut().chain(self.past.values_mut().map(Box::as_mut)) {
            if process.key != key && !Arc::ptr_eq(&process.image, &wrong) {
                continue;
            }
            process.read_at_ns = None;
            process.cut_mappings = 0;
            if let Some(reported) = process.reported.take() {
                process.image = reported;
                continue;
            }
            process.image = Arc::default();
            process.exe.clear();
            process.comm.clone_from(&process.reported_comm);
            process.state = ProcessState::Missed;
            self.stats.missed += 1;
        }
    }

    fn enter(&mut self, process: Process) -> Result<&mut Process, ProcessTableFull> {
        if self.alive.len() + self.past.len() < self.max || self.prune() {
            self.is_full = false;
            let tgid = process.key.process.tgid;
            return Ok(self.alive.entry(tgid).insert_entry(process).into_mut());
        }
        self.stats.saturated += 1;
        let full = ProcessTableFull { max: self.max };
        if !self.is_full {
            self.is_full = true;
            tracing::warn!("{full}; logged once until there is room again");
        }
        Err(full)
    }

    /// Makes room. Past images go first, the oldest before the others; else processes that are not sampled now. Returns false
    /// if there is nothing of either kind.
    fn prune(&mut self) -> bool {
        let part = (self.max / PRUNED_PART).max(1);
        let mut past: Vec<(u64, bool, ImageKey)> =
            self.past.iter().map(|(key, process)| (process.window, process.samples > 0, *key)).collect();
        past.sort_unstable();
        past.truncate(part);
        for (.., key) in &past {
            self.past.remove(key);
        }
        let mut pruned = past.len();
        if pruned == 0 {
            let window = self.window;
            let idle: Vec<u32> = self
                .alive
                .values()
                .filter(|process| process.window + 1 < window || process.samples == 0)
                .map(|process| process.key.process.tgid)
                .take(part)
                .collect();
            pruned = idle.len();
            for tgid in idle {
                self.alive.remove(&tgid);
            }
        }
        self.stats.pruned += pruned as u64;
        pruned > 0
    }

    /// Builds an entry of which only the event and the path of its control group are known.
    fn unread(&self, subject: &Subject) -> Process {
        Process {
            cgroup: self.cgroups.peek(&subject.cgroup_id).cloned().unwrap_or_default(),
            ..Process::unread(subject, self.window)
        }
    }

    /// Adds the mappings that the kernel reported to an image.
    fn adopt(&mut self, process: &mut Process, pending: &PendingImage, file: Option<FileNumbers>) {
        let mappings = &pending.mappings;
        // The executable is mapped before its interpreter.
        let executable = file
            .and_then(|file| {
                mappings.iter().find(|mapping| (mapping.dev, mapping.inode) == (file.dev, file.inode))
            })
            .or_else(|| mappings.iter().find(|mapping| mapping.inode != 0));
        process.exe = executable.map_or_else(String::new, |mapping| mapping.path.clone());
        process.image = Arc::new(self.images.build(process, mappings, pending.cut));
        process.read_at_ns = None;
        process.reported = None;
        process.state = ProcessState::Alive;
        self.find_cgroup(process);
        self.stats.reported += 1;
    }

    /// Finds the path of the process's control group: among the known ones, else by its id, else in `/proc`.
    fn find_cgroup(&mut self, process: &mut Process) {
        let id = process.cgroup_id;
        if let Some(known) = self.cgroups.get(&id) {
            process.cgroup.clone_from(known);
        } else if let Some(path) =
            self.cgroup_tree.as_ref().and_then(|tree| Some(tree.path(id)?.to_string())).or_else(|| {
                let (proc, key, hierarchy) = (Arc::clone(&self.proc), process.key.process, self.hierarchy);
                on_worker(key, move || cgroup_of(&*proc, key, hierarchy)).ok().flatten()
            })
        {
            self.cgroups.put(id, path.clone());
            process.cgroup = path;
        }
        process.names = CgroupNames::of(&process.cgroup);
    }

    /// Reads a process, unless the kernel has reported a later image of it.
    fn load_unless_replaced(&mut self, process: &mut Process, ktime_ns: u64) {
        if self.pending.get(&process.key.process.tgid).is_some_and(|pending| pending.since_ns > ktime_ns) {
            self.miss(process, "it has another image by now");
        } else {
            self.load(process);
        }
    }

    /// Reads a process from `/proc`. Of one that has exited meanwhile, only the kernel's report is known.
    fn load(&mut self, process: &mut Process) {
        match self.read(process) {
            Ok(()) => {
                process.state = ProcessState::Alive;
                self.stats.loaded += 1;
                self.cgroups.put(process.cgroup_id, process.cgroup.clone());
                process.names = CgroupNames::of(&process.cgroup);
            }
            Err(error) => self.miss(process, &error.to_string()),
        }
    }

    fn miss(&mut self, process: &mut Process, why: &str) {
        tracing::debug!(key = %process.key.process, "cannot read a process: {why}");
        process.state = ProcessState::Missed;
        self.stats.missed += 1;
        self.find_cgroup(process);
    }

    fn read(&mut self, process: &mut Process) -> Result<(), MetadataError> {
        let key = process.key.process;
        // The cache may hold its former image.
        self.metadata.invalidate(key);
        let (loader, proc) = (self.metadata.loader(), Arc::clone(&self.proc));
        let reading = on_worker(key, move || {
            let metadata = loader.load(key)?;
            let lines = if metadata.kernel_thread { MapsLines::default() } else { read_lines(&*proc, key)? };
            Ok((metadata, lines))
        });
        process.unanswered = reading.is_err();
        let (loaded, lines) = match reading? {
            Ok((metadata, lines)) => (Ok(metadata), lines),
            Err(error) => (Err(error), MapsLines::default()),
        };
        let known = self.metadata.insert(key, loaded)?;
        let image = self.images.image_of(process, &lines);
        process.read_at_ns = Some(self.proc.now_ns());
        process.kernel_thread = known.kernel_thread;
        process.comm.clone_from(&known.comm);
        process.exe.clone_from(&known.exe);
        process.cgroup.clone_from(&known.cgroup);
        process.uid = Some(known.uid);
        process.image = Arc::new(image);
        Ok(())
    }
}

/// Makes a call about many processes on a worker. Their start times are in memory, so none of them can hang.
pub(crate) fn all_on_worker<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    access::node().run(Target::Process(0), "the start times of all processes", ENGINE_DEADLINE, call).ok()
}

/// Reports whether the process of this key runs; a zombie does not.
fn is_running(proc: &dyn ProcFs, key: ProcessKey) -> bool {
    match proc::check_in(proc, key) {
        Ok(stat) => !stat.is_over,
        Err(ProcError::Gone(_) | ProcError::Recycled { .. }) => false,
        // A process that cannot be read now may be alive.
        Err(ProcError::Read { .. } | ProcError::Unanswered(_)) => true,
    }
}

fn cgroup_of(proc: &dyn ProcFs, key: ProcessKey, hierarchy: CgroupHierarchy) -> Option<String> {
    let text = proc::text(proc, key, "cgroup").ok()?;
    proc::check_in(proc, key).ok()?;
    parse_path(&text, hierarchy.controller())
}
