//! The process table: who is alive, who has just died, and what their images hold. Nobody else keeps such state.
//!
//! What the kernel tells comes in the order of kernel time, and what belongs to an image is told before the image's
//! samples are: its executable, its mappings, its control group. `/proc` is read only for who was not heard of. Such a
//! reading may come late, when the process has another image by then; what is told afterwards shows that, and the reading
//! is thrown away rather than believed.

use std::{
    collections::{HashMap, HashSet},
    num::NonZeroUsize,
    sync::Arc,
    time::{Duration, Instant},
};

use lru::LruCache;

use super::{
    FileMapping, FileTable, FileTableStats, MetadataOptions, ProcessMetadataCache,
    metadata::MetadataError,
    proc::{self, ProcError, ProcFs, RealProc},
};
use crate::{
    cgroup::{CgroupHierarchy, CgroupNames, CgroupTree, parse_path},
    model::{
        ExitStatus, FileNumbers, Image, ImageKey, Mapped, Mapping, MappingKind, NewMapping, Origin,
        ProcessKey, Subject,
    },
};

/// How long after a reading of a process's mappings they are not read again, however many addresses are unknown.
const RESCAN_PAUSE: Duration = Duration::from_millis(50);
/// Paths of control groups that are remembered, so that a process that is gone can still be placed.
const CGROUPS: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
/// Images whose exec has not been told yet. Most belong to processes that no rule names: these go after a second.
const MOST_COMING: usize = 4096;
const COMING_NS: u64 = 1_000_000_000;
/// Executable mappings of one process; real ones have some hundreds.
const MOST_MAPPINGS: usize = 16_384;
/// The part of a full table that is cleared at one time, so that not every entry costs a look at all others.
const PRUNED_PART: usize = 16;
/// Without the sideband: how long before the exec event the new image may have been in place.
const EXEC_NS: u64 = 10_000_000;

/// What is known of one image of one process.
#[derive(Clone, Debug)]
pub struct Process {
    /// Who.
    pub key: ImageKey,
    /// Thread group id of the parent, as last told; 0 while unknown.
    pub parent: u32,
    /// Command name of the thread group leader.
    pub comm: String,
    /// Path of the executable as the process sees it; empty for a kernel thread and while unknown.
    pub exe: String,
    /// Inode number of its control group, in the hierarchy that the kernel side reads.
    pub cgroup_id: u64,
    /// Path of its control group.
    pub cgroup: String,
    /// What that path tells.
    pub names: CgroupNames,
    /// User id; none while unknown.
    pub uid: Option<u32>,
    /// It has no memory of its own.
    pub kernel_thread: bool,
    /// What is mapped.
    pub image: Arc<Image>,
    /// The rules that want it, one bit for each slot, as last heard.
    pub rules: u64,
    /// How far it is known, and whether it lives.
    pub state: State,
    /// Samples seen.
    pub samples: u64,
    /// When what is mapped was last read from `/proc`, by the boot clock; none if the kernel told it.
    read_at_ns: Option<u64>,
    /// The time of the last event of this image: what was read before it was this image's.
    seen_ns: u64,
    /// What the kernel had told before it was read again.
    told: Option<Arc<Image>>,
    /// The name that came with the event.
    told_comm: String,
    scanned: Option<Instant>,
    /// The window in which it was last sampled or changed.
    window: u64,
}

impl Process {
    /// It runs, with this image.
    pub fn is_alive(&self) -> bool {
        self.state == State::Alive
    }

    /// Where its mappings are known from.
    pub fn mappings_from(&self) -> &'static str {
        match (self.state, self.read_at_ns) {
            (State::Unread | State::Missed, _) => "nowhere",
            (_, None) => "the kernel",
            (_, Some(_)) => "/proc",
        }
    }
}

/// How far a process is known, and whether it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It runs.
    Alive,
    /// It was told of, and is read when it is sampled.
    Unread,
    /// It replaced its image; this one is kept for its last samples.
    Replaced,
    /// It ended; kept for its last samples.
    Ended(ExitStatus),
    /// It was gone, or had another image, before it could be read: only what the kernel reported is known.
    Missed,
}

/// The table is full of processes that are sampled: this one is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the process table is full: {most} processes are sampled at one time; raise --processes")]
pub struct Saturated {
    /// How many there is room for.
    pub most: usize,
}

/// All processes that are sampled, or were a moment ago.
pub struct Processes {
    alive: HashMap<u32, Process>,
    /// Replaced and ended ones, until a whole window has passed without a sample of theirs. In a storm there are tens of
    /// thousands of them: a table of that many places doubles when some turn out to be too few, so a place is small.
    past: HashMap<ImageKey, Box<Process>>,
    /// Images between the moment at which `execve` cleared the former one and the event that tells of it.
    coming: HashMap<u32, Coming>,
    files: FileTable,
    cgroups: LruCache<u64, String>,
    cgroup_tree: Option<Arc<CgroupTree>>,
    metadata: ProcessMetadataCache,
    proc: Arc<dyn ProcFs>,
    hierarchy: CgroupHierarchy,
    most: usize,
    window: u64,
    is_saturated: bool,
    stats: Stats,
    changes: Changes,
}

/// What has become of images since it was asked for last.
#[derive(Debug, Default)]
pub struct Changes {
    /// Images that map more, or something else.
    pub changed: HashSet<ImageKey>,
    /// Images as they were before another file took the place of one of theirs: samples that were taken till then are to
    /// be named after these.
    pub replaced: Vec<(ImageKey, Arc<Image>)>,
}

impl Changes {
    fn note(&mut self, key: ImageKey, before: &Arc<Image>, after: &Image) {
        self.changed.insert(key);
        if is_replaced(before, after) {
            self.replaced.push((key, Arc::clone(before)));
        }
    }
}

/// Whether some address means another place in a file, or another file, than before.
fn is_replaced(old: &Image, new: &Image) -> bool {
    let place = |mapping: &Mapping| match &mapping.kind {
        MappingKind::File(file) => Some((file.id, mapping.start.wrapping_sub(mapping.offset))),
        MappingKind::Vdso | MappingKind::Anon => None,
    };
    old.mappings.iter().filter(|mapping| place(mapping).is_some()).any(|mapping| {
        let first = new.mappings.partition_point(|other| other.end <= mapping.start);
        new.mappings[first..]
            .iter()
            .take_while(|other| other.start < mapping.end)
            .any(|other| place(other) != place(mapping))
    })
}

struct Coming {
    since_ns: u64,
    mappings: Vec<NewMapping>,
    /// A sample of it has come before the event that tells of it.
    sampled: Option<ImageKey>,
}

/// What the table has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Images whose mappings the kernel told.
    pub told: u64,
    /// Processes read from `/proc`.
    pub loaded: u64,
    /// Processes that were gone, or had another image, before they could be read.
    pub missed: u64,
    /// Readings of mappings, beyond the first.
    pub rescans: u64,
    /// Entries thrown out before their time, because the table was full.
    pub pruned: u64,
    /// Processes that found no place.
    pub saturated: u64,
    /// Entries whose exit was not reported, found by looking.
    pub reconciled: u64,
}

fn open_tree(hierarchy: CgroupHierarchy) -> Option<Arc<CgroupTree>> {
    CgroupTree::of(hierarchy)
        .inspect_err(|error| {
            tracing::warn!("processes are placed by /proc alone, short ones not at all: {error}");
        })
        .ok()
        .map(Arc::new)
}

impl Processes {
    /// A table of at most `most` processes and `files` open files.
    pub fn new(hierarchy: CgroupHierarchy, most: usize, files: NonZeroUsize) -> Self {
        Self {
            cgroup_tree: open_tree(hierarchy),
            ..Self::reading(hierarchy, most, files, Arc::new(RealProc::default()))
        }
    }

    /// A table that reads what stands for `/proc`.
    pub fn reading(
        hierarchy: CgroupHierarchy,
        most: usize,
        files: NonZeroUsize,
        proc: Arc<dyn ProcFs>,
    ) -> Self {
        let options = MetadataOptions {
            entries: most,
            // Neither is part of a profile.
            cmdline: false,
            cwd: false,
            hierarchy,
            ..MetadataOptions::default()
        };
        Self {
            alive: HashMap::new(),
            past: HashMap::new(),
            coming: HashMap::new(),
            files: FileTable::new(files),
            cgroups: LruCache::new(CGROUPS),
            cgroup_tree: None,
            metadata: ProcessMetadataCache::reading(options, Arc::clone(&proc)),
            proc,
            hierarchy,
            most,
            window: 0,
            is_saturated: false,
            stats: Stats::default(),
            changes: Changes::default(),
        }
    }

    /// The control groups of this host, where they can be read.
    pub fn groups(&self) -> Option<&Arc<CgroupTree>> {
        self.cgroup_tree.as_ref()
    }

    /// What the kernel's sideband told: everything up to the next event's time, before that event.
    pub fn told(&mut self, told: Mapped) {
        match told {
            Mapped::Cleared { tgid, ktime_ns } => {
                if self.coming.len() >= MOST_COMING {
                    self.coming.retain(|_, coming| coming.since_ns + COMING_NS > ktime_ns);
                }
                // What is in the table must be told apart from its next image, however many others there are.
                if self.coming.len() < MOST_COMING || self.alive.contains_key(&tgid) {
                    self.coming
                        .insert(tgid, Coming { since_ns: ktime_ns, mappings: Vec::new(), sampled: None });
                }
                self.disbelieve(tgid, ktime_ns);
            }
            Mapped::Made { tgid, ktime_ns, mapping } => {
                let mut is_coming = false;
                if let Some(coming) = self.coming.get_mut(&tgid) {
                    // One that was sampled already is in the table, and its exec may not be told.
                    let known = self.alive.get(&tgid).map(|process| process.key);
                    is_coming = coming.sampled.is_none() || coming.sampled != known;
                    if coming.mappings.len() < MOST_MAPPINGS {
                        coming.mappings.push(mapping.clone());
                    }
                }
                if is_coming {
                    return;
                }
                if let Some(process) = self.alive.get_mut(&tgid)
                    && process.is_alive()
                    && process.read_at_ns.is_none_or(|read| read < ktime_ns)
                    && process.image.mappings.len() < MOST_MAPPINGS
                {
                    let mapping = open(&mut self.files, process.key.process, process.parent, &mapping);
                    let before = Arc::clone(&process.image);
                    Arc::make_mut(&mut process.image).map(mapping);
                    self.changes.note(process.key, &before, &process.image);
                }
            }
        }
    }

    /// What has become of images since this was asked for last.
    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// A process has a new image. What it was before is kept for the samples that were taken of it.
    pub fn exec(
        &mut self,
        subject: &Subject,
        origin: Origin,
        path: &str,
        file: FileNumbers,
    ) -> Result<&mut Process, Saturated> {
        let key = ImageKey::of(subject);
        let tgid = subject.key.tgid;
        let coming = self.coming.remove(&tgid).filter(|coming| !coming.mappings.is_empty());
        // A tick may have come between the new image and the event that tells of it.
        let sampled = self.alive.remove(&tgid);
        let mut process = match sampled {
            Some(sampled) if sampled.key == key => sampled,
            other => {
                if let Some(other) = other {
                    self.alive.insert(tgid, other);
                    let since =
                        coming.as_ref().map_or(subject.ktime_ns.saturating_sub(EXEC_NS), |c| c.since_ns);
                    self.disbelieve(tgid, since);
                    self.retire(tgid, State::Replaced);
                }
                self.blank(subject)
            }
        };
        self.metadata.invalidate(subject.key);
        process.comm.clone_from(&subject.comm);
        process.parent = origin.parent;
        process.uid = Some(origin.uid);
        process.rules = subject.rules;
        if let Some(coming) = coming {
            self.adopt(&mut process, &coming.mappings, Some(file));
        } else if process.state == State::Unread {
            self.load(&mut process);
        }
        if process.exe.is_empty() {
            path.clone_into(&mut process.exe);
        }
        self.enter(process)
    }

    /// A process has a child: the same image until it calls `execve`. If the parent is not known nothing is read before
    /// the child is sampled: most call `execve` before that.
    pub fn fork(&mut self, subject: &Subject, origin: Origin) -> Result<&mut Process, Saturated> {
        self.coming.remove(&subject.key.tgid);
        self.retire_unheard(subject.key.tgid);
        let process = match self.alive.get(&origin.parent) {
            // A child starts with its parent's count of `execve` calls: with another one the parent has had an image that
            // was not heard of.
            Some(parent) if parent.is_alive() && parent.key.exec_id == subject.exec_id => Process {
                key: ImageKey::of(subject),
                parent: origin.parent,
                cgroup_id: subject.cgroup_id,
                rules: subject.rules,
                samples: 0,
                window: self.window,
                seen_ns: subject.ktime_ns,
                told_comm: subject.comm.clone(),
                ..parent.clone()
            },
            _ => Process { parent: origin.parent, uid: Some(origin.uid), ..self.blank(subject) },
        };
        self.enter(process)
    }

    /// A process that already ran.
    pub fn found(&mut self, subject: &Subject, origin: Origin) -> Result<&mut Process, Saturated> {
        let tgid = subject.key.tgid;
        let mut process = match self.alive.remove(&tgid) {
            Some(process) if process.key == ImageKey::of(subject) => process,
            other => {
                self.alive.extend(other.map(|other| (tgid, other)));
                self.retire_unheard(tgid);
                self.blank(subject)
            }
        };
        process.parent = origin.parent;
        process.uid = Some(origin.uid);
        process.rules = subject.rules;
        process.seen_ns = process.seen_ns.max(subject.ktime_ns);
        if process.cgroup_id != subject.cgroup_id {
            // It was put into another one.
            process.cgroup_id = subject.cgroup_id;
            self.place(&mut process);
        }
        if process.state == State::Unread {
            self.load_unless_replaced(&mut process, subject.ktime_ns);
        }
        self.enter(process)
    }

    /// The agent has decided that these rules want it too.
    pub fn wanted(&mut self, key: &ImageKey, rules: u64) {
        if let Some(process) = self.alive.get_mut(&key.process.tgid).filter(|process| process.key == *key) {
            process.rules |= rules;
        }
    }

    /// A process ended.
    pub fn exit(&mut self, subject: &Subject, status: ExitStatus) {
        let Some(process) = self.alive.get(&subject.key.tgid) else { return };
        if process.key.process == subject.key {
            if process.key != ImageKey::of(subject) {
                // It had another image at its end than was heard of.
                self.disbelieve(subject.key.tgid, process.seen_ns);
            }
            self.coming.remove(&subject.key.tgid);
            self.retire(subject.key.tgid, State::Ended(status));
        }
    }

    /// The process of a sample, read now if it was not heard of. Its mappings are read again if they do not hold one of
    /// the sample's user addresses.
    pub fn sampled(&mut self, subject: &Subject, addresses: &[u64]) -> Result<&mut Process, Saturated> {
        let key = ImageKey::of(subject);
        let tgid = subject.key.tgid;
        let window = self.window;
        let is_past = self.past.contains_key(&key);
        if !is_past {
            self.meet(subject)?;
        }
        let process =
            if is_past { self.past.get_mut(&key).map(Box::as_mut) } else { self.alive.get_mut(&tgid) };
        let process = process.ok_or(Saturated { most: self.most })?;
        process.window = window;
        process.samples += 1;
        process.rules |= subject.rules;
        process.seen_ns = process.seen_ns.max(subject.ktime_ns);
        if !is_past {
            rescan(&mut self.files, &mut self.stats, &mut self.changes, &*self.proc, process, addresses);
        }
        Ok(process)
    }

    /// Makes sure that the process of a sample is in the table, among those that live.
    fn meet(&mut self, subject: &Subject) -> Result<(), Saturated> {
        let key = ImageKey::of(subject);
        let tgid = subject.key.tgid;
        let mut process = match self.alive.remove(&tgid) {
            Some(process) if process.key == key && process.state != State::Unread => {
                self.alive.insert(tgid, process);
                return Ok(());
            }
            Some(process) if process.key == key => process,
            other => {
                self.alive.extend(other.map(|other| (tgid, other)));
                self.retire_unheard(tgid);
                self.blank(subject)
            }
        };
        match self.coming.remove(&tgid) {
            // In the middle of `execve`: what is mapped so far belongs to this image; the event will tell the rest.
            Some(mut coming) if coming.since_ns <= subject.ktime_ns => {
                coming.sampled = Some(key);
                self.adopt(&mut process, &coming.mappings, None);
                if coming.mappings.is_empty() {
                    process.state = State::Unread;
                }
                self.coming.insert(tgid, coming);
            }
            Some(coming) => {
                self.coming.insert(tgid, coming);
                self.miss(&mut process, "it has another image by now");
            }
            None => self.load(&mut process),
        }
        self.enter(process).map(drop)
    }

    /// A stack of this image holds an address that no mapping of it does: reads the mappings again, unless that was done
    /// a moment ago.
    pub fn sampled_again(&mut self, key: &ImageKey, address: u64) -> Option<&Process> {
        let process = self.alive.get_mut(&key.process.tgid).filter(|process| process.key == *key)?;
        rescan(&mut self.files, &mut self.stats, &mut self.changes, &*self.proc, process, &[address]);
        Some(process)
    }

    /// The image of a key, alive or past.
    pub fn get(&self, key: &ImageKey) -> Option<&Process> {
        let alive = || self.alive.get(&key.process.tgid).filter(|process| process.key == *key);
        self.past.get(key).map(Box::as_ref).or_else(alive)
    }

    /// Everybody who is alive.
    pub fn alive(&self) -> impl Iterator<Item = &Process> {
        self.alive.values()
    }

    /// Everybody who is kept for their last samples.
    pub fn past(&self) -> impl Iterator<Item = &Process> {
        self.past.values().map(Box::as_ref)
    }

    /// What `/proc` tells of a process that is in the table.
    pub fn metadata(&mut self) -> &mut ProcessMetadataCache {
        &mut self.metadata
    }

    /// What the table has done.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// What the files do.
    pub fn file_stats(&self) -> FileTableStats {
        self.files.stats()
    }

    /// A window is over: drops whoever was not sampled for a whole one since they ended, unless samples of theirs are
    /// still `in_hand`.
    pub fn next_window(&mut self, in_hand: impl Fn(&ImageKey) -> bool) {
        self.window += 1;
        let window = self.window;
        self.past.retain(|key, process| process.window + 1 >= window || in_hand(key));
        self.metadata.next_window();
    }

    /// Looks whether everybody who is held to be alive still is: repairs what lost exit events left behind. Gives who is
    /// not.
    pub fn reconcile(&mut self) -> Vec<ImageKey> {
        let gone: Vec<ImageKey> = self
            .alive
            .values()
            .filter(|process| !is_running(&*self.proc, process.key.process))
            .map(|process| process.key)
            .collect();
        self.stats.reconciled += gone.len() as u64;
        for key in &gone {
            // It may have had another image at its end.
            if let Some(seen_ns) = self.alive.get(&key.process.tgid).map(|process| process.seen_ns) {
                self.disbelieve(key.process.tgid, seen_ns);
            }
            self.retire(key.process.tgid, State::Ended(ExitStatus(0)));
        }
        gone
    }

    /// Lets go of what nobody came for: images of processes that are not watched, files that have been idle.
    pub fn tidy(&mut self) {
        let now = self.proc.now_ns();
        self.coming.retain(|_, coming| coming.since_ns + COMING_NS > now);
        self.files.close_idle();
    }

    fn retire(&mut self, tgid: u32, state: State) {
        let Some(mut process) = self.alive.remove(&tgid) else { return };
        // Somebody who was never sampled has nothing to wait for but samples that are still in the ring: those are of
        // the window that runs.
        process.window = self.window;
        if !matches!(process.state, State::Missed | State::Unread) {
            process.state = state;
        }
        if state != State::Replaced {
            self.metadata.remove(process.key.process);
        }
        self.past.insert(process.key, Box::new(process));
    }

    /// Somebody else is there, or another image, and nobody told since when: what was read later than the image was seen
    /// last may have been the other's.
    fn retire_unheard(&mut self, tgid: u32) {
        if let Some(seen_ns) = self.alive.get(&tgid).map(|process| process.seen_ns) {
            self.disbelieve(tgid, seen_ns);
            self.retire(tgid, State::Replaced);
        }
    }

    /// The image was replaced at this time: what was read from `/proc` later than that was the next one's.
    fn disbelieve(&mut self, tgid: u32, since_ns: u64) {
        let Some(process) = self.alive.get(&tgid) else { return };
        if process.read_at_ns.is_none_or(|read| read <= since_ns) {
            return;
        }
        let (key, wrong) = (process.key, Arc::clone(&process.image));
        self.metadata.invalidate(key.process);
        // Children that were forked meanwhile were taken to have the same.
        for process in self.alive.values_mut().chain(self.past.values_mut().map(Box::as_mut)) {
            if process.key != key && !Arc::ptr_eq(&process.image, &wrong) {
                continue;
            }
            process.read_at_ns = None;
            if let Some(told) = process.told.take() {
                process.image = told;
                continue;
            }
            process.image = Arc::default();
            process.exe.clear();
            process.comm.clone_from(&process.told_comm);
            process.state = State::Missed;
            self.stats.missed += 1;
        }
    }

    fn enter(&mut self, process: Process) -> Result<&mut Process, Saturated> {
        if self.alive.len() + self.past.len() < self.most || self.prune() {
            self.is_saturated = false;
            let tgid = process.key.process.tgid;
            return Ok(self.alive.entry(tgid).insert_entry(process).into_mut());
        }
        self.stats.saturated += 1;
        let saturated = Saturated { most: self.most };
        if !self.is_saturated {
            self.is_saturated = true;
            tracing::warn!("{saturated}; said once until there is room again");
        }
        Err(saturated)
    }

    /// Makes room: the dead first, those who have waited for the longest time before the others, then who is not
    /// sampled now. False: there is nobody of either kind.
    fn prune(&mut self) -> bool {
        let most = (self.most / PRUNED_PART).max(1);
        let mut dead: Vec<(u64, bool, ImageKey)> =
            self.past.iter().map(|(key, process)| (process.window, process.samples > 0, *key)).collect();
        dead.sort_unstable();
        dead.truncate(most);
        for (.., key) in &dead {
            self.past.remove(key);
        }
        let mut pruned = dead.len();
        if pruned == 0 {
            let window = self.window;
            let idle: Vec<u32> = self
                .alive
                .values()
                .filter(|process| process.window + 1 < window || process.samples == 0)
                .map(|process| process.key.process.tgid)
                .take(most)
                .collect();
            pruned = idle.len();
            for tgid in idle {
                self.alive.remove(&tgid);
            }
        }
        self.stats.pruned += pruned as u64;
        pruned > 0
    }

    /// A process of which only the event is known.
    fn blank(&self, subject: &Subject) -> Process {
        Process {
            key: ImageKey::of(subject),
            parent: 0,
            comm: subject.comm.clone(),
            exe: String::new(),
            cgroup_id: subject.cgroup_id,
            cgroup: self.cgroups.peek(&subject.cgroup_id).cloned().unwrap_or_default(),
            names: CgroupNames::default(),
            uid: None,
            kernel_thread: false,
            image: Arc::default(),
            rules: subject.rules,
            state: State::Unread,
            samples: 0,
            read_at_ns: None,
            seen_ns: subject.ktime_ns,
            told: None,
            told_comm: subject.comm.clone(),
            // What was read at exec lacks the libraries: the first sample that misses them may look again at once.
            scanned: None,
            window: self.window,
        }
    }

    /// What the kernel told is what it has.
    fn adopt(&mut self, process: &mut Process, mappings: &[NewMapping], file: Option<FileNumbers>) {
        let mut image = Image::default();
        for mapping in mappings {
            image.map(open(&mut self.files, process.key.process, process.parent, mapping));
        }
        // The executable is mapped before its interpreter.
        let executable = file
            .and_then(|file| {
                mappings.iter().find(|mapping| (mapping.dev, mapping.inode) == (file.dev, file.inode))
            })
            .or_else(|| mappings.iter().find(|mapping| mapping.inode != 0));
        process.exe = executable.map_or_else(String::new, |mapping| mapping.path.clone());
        process.image = Arc::new(image);
        process.read_at_ns = None;
        process.told = None;
        process.state = State::Alive;
        self.place(process);
        self.stats.told += 1;
    }

    /// Finds the control group's path: by what was seen before, by the group itself, by the process.
    fn place(&mut self, process: &mut Process) {
        let id = process.cgroup_id;
        if let Some(known) = self.cgroups.get(&id) {
            process.cgroup.clone_from(known);
        } else if let Some(path) = self
            .cgroup_tree
            .as_ref()
            .and_then(|tree| Some(tree.path(id)?.to_string()))
            .or_else(|| cgroup_of(&*self.proc, process.key.process, self.hierarchy))
        {
            self.cgroups.put(id, path.clone());
            process.cgroup = path;
        }
        process.names = CgroupNames::of(&process.cgroup);
    }

    /// Reads a process, unless the kernel has told of another image of it since.
    fn load_unless_replaced(&mut self, process: &mut Process, ktime_ns: u64) {
        if self.coming.get(&process.key.process.tgid).is_some_and(|coming| coming.since_ns > ktime_ns) {
            self.miss(process, "it has another image by now");
        } else {
            self.load(process);
        }
    }

    /// Reads a process from `/proc`. One that is gone or was recycled meanwhile is known only by what the kernel
    /// reported.
    fn load(&mut self, process: &mut Process) {
        match self.read(process) {
            Ok(()) => {
                process.state = State::Alive;
                self.stats.loaded += 1;
                self.cgroups.put(process.cgroup_id, process.cgroup.clone());
                process.names = CgroupNames::of(&process.cgroup);
            }
            Err(error) => self.miss(process, &error.to_string()),
        }
    }

    fn miss(&mut self, process: &mut Process, why: &str) {
        tracing::debug!(key = %process.key.process, "not read: {why}");
        process.state = State::Missed;
        self.stats.missed += 1;
        self.place(process);
    }

    fn read(&mut self, process: &mut Process) -> Result<(), MetadataError> {
        let key = process.key.process;
        // What is kept may be of its former image.
        self.metadata.invalidate(key);
        let known = self.metadata.get_or_load(key)?;
        let image = if known.kernel_thread {
            Image::default()
        } else {
            read_image(&mut self.files, &*self.proc, key, process.parent)?
        };
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

/// Whether somebody of this key runs; a process that nobody has waited for yet does not.
fn is_running(proc: &dyn ProcFs, key: ProcessKey) -> bool {
    match proc::check_in(proc, key) {
        Ok(stat) => !stat.is_over,
        Err(ProcError::Gone(_) | ProcError::Recycled { .. }) => false,
        // What cannot be read now may live.
        Err(ProcError::Read { .. }) => true,
    }
}

fn cgroup_of(proc: &dyn ProcFs, key: ProcessKey, hierarchy: CgroupHierarchy) -> Option<String> {
    let text = proc::text(proc, key, "cgroup").ok()?;
    proc::check_in(proc, key).ok()?;
    parse_path(&text, hierarchy.controller())
}

/// Reads the mappings again if they do not hold one of these addresses.
fn rescan(
    files: &mut FileTable,
    stats: &mut Stats,
    changes: &mut Changes,
    proc: &dyn ProcFs,
    process: &mut Process,
    addresses: &[u64],
) {
    let rested = process.scanned.is_none_or(|at| at.elapsed() >= RESCAN_PAUSE);
    let known = |address: &u64| process.image.find(*address).is_some();
    if process.kernel_thread || !process.is_alive() || !rested || addresses.iter().all(known) {
        return;
    }
    process.scanned = Some(Instant::now());
    if let Ok(image) = read_image(files, proc, process.key.process, process.parent) {
        stats.rescans += 1;
        if process.read_at_ns.is_none() {
            process.told = Some(Arc::clone(&process.image));
        }
        process.read_at_ns = Some(proc.now_ns());
        let before = std::mem::take(&mut process.image);
        process.image = Arc::new(merged(&before, image));
        changes.note(process.key, &before, &process.image);
    }
}

/// Reads the executable mappings of a process and opens their files.
fn read_image(
    files: &mut FileTable,
    proc: &dyn ProcFs,
    key: ProcessKey,
    parent: u32,
) -> Result<Image, ProcError> {
    let text = proc::text(proc, key, "maps")?;
    let lines = proc::parse_maps(&text);
    let mappings = lines.iter().take(MOST_MAPPINGS).map(|line| open(files, key, parent, line)).collect();
    proc::check_in(proc, key)?;
    Ok(Image { mappings })
}

fn open(files: &mut FileTable, key: ProcessKey, parent: u32, new: &NewMapping) -> Mapping {
    let kind = if new.path == "[vdso]" {
        MappingKind::Vdso
    } else if new.inode == 0 {
        MappingKind::Anon
    } else {
        MappingKind::File(files.open(&FileMapping {
            tgid: key.tgid,
            parent,
            start: new.start,
            end: new.end,
            path: &new.path,
            dev: new.dev,
            inode: new.inode,
        }))
    };
    Mapping { start: new.start, end: new.end, offset: new.offset, kind }
}

/// The new reading, and of the old one what samples may still point into: what is no longer mapped, and overlaps with
/// nothing new.
fn merged(old: &Image, new: Image) -> Image {
    let mut mappings = new.mappings;
    let gone: Vec<Mapping> = old
        .mappings
        .iter()
        .filter(|mapping| {
            let after = mappings.partition_point(|other| other.start < mapping.end);
            mappings[..after].last().is_none_or(|other| other.end <= mapping.start)
        })
        .cloned()
        .collect();
    mappings.extend(gone);
    mappings.sort_unstable_by_key(|mapping| mapping.start);
    Image { mappings }
}
