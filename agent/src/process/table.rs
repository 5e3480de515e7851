//! The process table: who is alive, who has just died, and what their images hold. Nobody else keeps such state.

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    sync::Arc,
    time::{Duration, Instant},
};

use lru::LruCache;

use super::{
    CgroupNames, Image, Mapping, MappingKind, ProcessKey,
    cgroup::path_in,
    proc::{self, MapsLine, ProcError},
};
use crate::{
    kernel::{CgroupHierarchy, ExitStatus, Subject},
    symbols::{FileMapping, FileTable, FileTableStats},
};

/// How long after a reading of a process's mappings they are not read again, however many addresses are unknown.
const RESCAN_PAUSE: Duration = Duration::from_millis(50);
/// Paths of control groups that are remembered, so that a process that is gone can still be placed.
const CGROUPS: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// One image of one process: what a sample belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageKey {
    /// The process.
    pub process: ProcessKey,
    /// Which of its images: the kernel's count of its `execve` calls.
    pub exec_id: u32,
}

impl ImageKey {
    /// Whom an event is about.
    pub fn of(subject: &Subject) -> Self {
        Self { process: subject.key, exec_id: subject.exec_id }
    }
}

/// What is known of one image of one process.
#[derive(Clone, Debug)]
pub struct Process {
    /// Who.
    pub key: ImageKey,
    /// Command name of the thread group leader.
    pub comm: String,
    /// Path of the executable as the process sees it; empty for a kernel thread and while unknown.
    pub exe: String,
    /// Path of its control group.
    pub cgroup: String,
    /// Inode number of its control group, in the hierarchy that the kernel side reads.
    pub cgroup_id: u64,
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
    /// How far it was read.
    pub state: State,
    /// Samples seen.
    pub samples: u64,
    scanned: Option<Instant>,
    /// The window in which it was last sampled or changed.
    window: u64,
}

impl Process {
    /// It runs, with this image.
    pub fn is_alive(&self) -> bool {
        self.state == State::Alive
    }
}

/// How far a process is known, and whether it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It runs.
    Alive,
    /// It replaced its image; this one is kept for its last samples.
    Replaced,
    /// It ended; kept for its last samples.
    Ended(ExitStatus),
    /// It was gone before it could be read: only what the kernel reported is known.
    Missed,
}

/// All processes that are sampled, or were a moment ago.
pub struct Processes {
    alive: HashMap<u32, Process>,
    /// Replaced and ended ones, until a whole window has passed without a sample of theirs.
    past: HashMap<ImageKey, Process>,
    files: FileTable,
    cgroups: LruCache<u64, String>,
    hierarchy: CgroupHierarchy,
    most: usize,
    window: u64,
    stats: Stats,
}

/// What the table has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Processes read.
    pub loaded: u64,
    /// Processes that were gone before they could be read.
    pub missed: u64,
    /// Readings of mappings, beyond the first.
    pub rescans: u64,
    /// Entries thrown out before their time, because the table was full.
    pub pruned: u64,
    /// Entries whose exit was not reported, found by looking.
    pub reconciled: u64,
}

impl Processes {
    /// A table of at most `most` processes and `files` open files.
    pub fn new(hierarchy: CgroupHierarchy, most: usize, files: NonZeroUsize) -> Self {
        Self {
            alive: HashMap::new(),
            past: HashMap::new(),
            files: FileTable::new(files),
            cgroups: LruCache::new(CGROUPS),
            hierarchy,
            most,
            window: 0,
            stats: Stats::default(),
        }
    }

    /// A process has a new image. What it was before is kept for the samples that were taken of it.
    pub fn exec(&mut self, subject: &Subject, path: &str) -> &mut Process {
        self.retire(subject.key.tgid, State::Replaced);
        let mut process = self.load(subject);
        process.comm.clone_from(&subject.comm);
        if process.exe.is_empty() {
            path.clone_into(&mut process.exe);
        }
        self.enter(process)
    }

    /// A process has a child: the same image until it calls `execve`.
    pub fn fork(&mut self, subject: &Subject, parent: u32) -> &mut Process {
        self.retire(subject.key.tgid, State::Replaced);
        let process = match self.alive.get(&parent) {
            Some(parent) => Process {
                key: ImageKey::of(subject),
                rules: subject.rules,
                cgroup_id: subject.cgroup_id,
                state: State::Alive,
                samples: 0,
                window: self.window,
                ..parent.clone()
            },
            None => self.load(subject),
        };
        self.enter(process)
    }

    /// A process that already ran.
    pub fn found(&mut self, subject: &Subject) -> &mut Process {
        // One that was put into another control group is read again: its names may be others.
        let known = self.alive.get(&subject.key.tgid).is_some_and(|process| {
            process.key == ImageKey::of(subject) && process.cgroup_id == subject.cgroup_id
        });
        if !known {
            self.retire(subject.key.tgid, State::Replaced);
            let process = self.load(subject);
            self.enter(process);
        }
        let process = self.alive.get_mut(&subject.key.tgid);
        // PROOF: it was known, or has just been entered.
        #[expect(clippy::expect_used, reason = "proven above")]
        let process = process.expect("entered");
        process.rules = subject.rules;
        process
    }

    /// The agent has decided that these rules want it too.
    pub fn wanted(&mut self, key: &ImageKey, rules: u64) {
        if let Some(process) = self.alive.get_mut(&key.process.tgid).filter(|process| process.key == *key) {
            process.rules |= rules;
        }
    }

    /// A process ended.
    pub fn exit(&mut self, subject: &Subject, status: ExitStatus) {
        if self.alive.get(&subject.key.tgid).is_some_and(|process| process.key.process == subject.key) {
            self.retire(subject.key.tgid, State::Ended(status));
        }
    }

    /// The process of a sample, read now if it was not heard of. Its mappings are read again if they do not hold one of
    /// the sample's user addresses: that is how a library that was opened late is found.
    pub fn sampled(&mut self, subject: &Subject, addresses: &[u64]) -> &mut Process {
        let key = ImageKey::of(subject);
        if let Some(past) = self.past.get(&key).map(|process| process.key) {
            let window = self.window;
            // PROOF: it is there.
            #[expect(clippy::expect_used, reason = "proven above")]
            let process = self.past.get_mut(&past).expect("present");
            process.window = window;
            process.samples += 1;
            return process;
        }
        if self.alive.get(&key.process.tgid).is_none_or(|process| process.key != key) {
            self.retire(key.process.tgid, State::Replaced);
            let process = self.load(subject);
            self.enter(process);
        }
        // PROOF: it was there, or has just been entered.
        #[expect(clippy::expect_used, reason = "proven above")]
        let process = self.alive.get_mut(&key.process.tgid).expect("entered");
        process.window = self.window;
        process.samples += 1;
        process.rules |= subject.rules;
        rescan(&mut self.files, &mut self.stats, process, addresses);
        process
    }

    /// A stack of this image holds an address that no mapping of it does: reads the mappings again, unless that was done
    /// a moment ago.
    pub fn sampled_again(&mut self, key: &ImageKey, address: u64) -> Option<&Process> {
        let process = self.alive.get_mut(&key.process.tgid).filter(|process| process.key == *key)?;
        rescan(&mut self.files, &mut self.stats, process, &[address]);
        Some(process)
    }

    /// The image of a key, alive or past.
    pub fn get(&self, key: &ImageKey) -> Option<&Process> {
        self.past.get(key).or_else(|| self.alive.get(&key.process.tgid).filter(|process| process.key == *key))
    }

    /// Everybody who is alive.
    pub fn alive(&self) -> impl Iterator<Item = &Process> {
        self.alive.values()
    }

    /// Everybody who is kept for their last samples.
    pub fn past(&self) -> impl Iterator<Item = &Process> {
        self.past.values()
    }

    /// What the table has done.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// What the files do.
    pub fn file_stats(&self) -> FileTableStats {
        self.files.stats()
    }

    /// A window is over: drops whoever was not sampled for a whole one since they ended.
    pub fn next_window(&mut self) {
        self.window += 1;
        let window = self.window;
        self.past.retain(|_, process| process.window + 1 >= window);
    }

    /// Looks whether everybody who is held to be alive still is: repairs what lost exit events left behind.
    pub fn reconcile(&mut self) {
        let gone: Vec<u32> = self
            .alive
            .values()
            .filter(|process| {
                matches!(
                    proc::check(process.key.process),
                    Err(ProcError::Gone(_) | ProcError::Recycled { .. })
                )
            })
            .map(|process| process.key.process.tgid)
            .collect();
        self.stats.reconciled += gone.len() as u64;
        for tgid in gone {
            self.retire(tgid, State::Ended(ExitStatus(0)));
        }
    }

    fn retire(&mut self, tgid: u32, state: State) {
        let Some(mut process) = self.alive.remove(&tgid) else { return };
        if process.state != State::Missed {
            process.state = state;
        }
        process.window = self.window;
        // Somebody who was never sampled has nothing to wait for but samples that are still in the ring: those are of
        // the window that runs.
        self.past.insert(process.key, process);
    }

    fn enter(&mut self, process: Process) -> &mut Process {
        if self.alive.len() + self.past.len() >= self.most {
            self.prune();
        }
        let tgid = process.key.process.tgid;
        self.alive.entry(tgid).insert_entry(process).into_mut()
    }

    /// Makes room: the dead first, then whoever is not sampled.
    fn prune(&mut self) {
        let before = self.alive.len() + self.past.len();
        let window = self.window;
        self.past.retain(|_, process| process.window == window && process.samples > 0);
        if self.alive.len() + self.past.len() >= self.most {
            self.alive.retain(|_, process| process.window == window && process.samples > 0);
        }
        if self.alive.len() + self.past.len() >= self.most {
            self.past.clear();
            self.alive.clear();
        }
        let pruned = before - self.alive.len() - self.past.len();
        self.stats.pruned += pruned as u64;
        tracing::warn!(pruned, most = self.most, "the process table was full; raise --processes");
    }

    /// Reads a process. One that is gone or was recycled meanwhile is known only by what the kernel reported.
    fn load(&mut self, subject: &Subject) -> Process {
        let mut process = Process {
            key: ImageKey::of(subject),
            comm: subject.comm.clone(),
            exe: String::new(),
            cgroup: self.cgroups.get(&subject.cgroup_id).cloned().unwrap_or_default(),
            names: CgroupNames::default(),
            cgroup_id: subject.cgroup_id,
            uid: None,
            kernel_thread: false,
            image: Arc::default(),
            rules: subject.rules,
            state: State::Missed,
            samples: 0,
            // What was read at exec lacks the libraries: the first sample that misses them may look again at once.
            scanned: None,
            window: self.window,
        };
        match self.read(subject, &mut process) {
            Ok(()) => {
                process.state = State::Alive;
                self.stats.loaded += 1;
                self.cgroups.put(subject.cgroup_id, process.cgroup.clone());
            }
            Err(error) => {
                tracing::debug!(key = %subject.key, "not read: {error}");
                self.stats.missed += 1;
            }
        }
        process.names = CgroupNames::of(&process.cgroup);
        process
    }

    fn read(&mut self, subject: &Subject, process: &mut Process) -> Result<(), ProcError> {
        let tgid = subject.key.tgid;
        let stat = proc::check(subject.key)?;
        process.kernel_thread = stat.kernel_thread;
        let controller = match self.hierarchy {
            CgroupHierarchy::V2 => "",
            CgroupHierarchy::V1Cpu => "cpu",
            CgroupHierarchy::V1Memory => "memory",
        };
        let cgroup = path_in(&proc::read(tgid, "cgroup")?, controller).unwrap_or_default();
        proc::read(tgid, "comm")?.trim_end_matches('\n').clone_into(&mut process.comm);
        process.uid = std::os::unix::fs::MetadataExt::uid(
            &std::fs::metadata(format!("/proc/{tgid}")).map_err(|_| ProcError::Gone(tgid))?,
        )
        .into();
        if !stat.kernel_thread {
            let exe = proc::link(tgid, "exe")?;
            exe.strip_suffix(" (deleted)").unwrap_or(&exe).clone_into(&mut process.exe);
            process.image = Arc::new(read_image(&mut self.files, subject.key)?);
        }
        // What was read is only true if it was one process all the time.
        proc::check(subject.key)?;
        process.cgroup = cgroup;
        Ok(())
    }
}

/// Reads the mappings again if they do not hold one of these addresses.
fn rescan(files: &mut FileTable, stats: &mut Stats, process: &mut Process, addresses: &[u64]) {
    let rested = process.scanned.is_none_or(|at| at.elapsed() >= RESCAN_PAUSE);
    let known = |address: &u64| process.image.find(*address).is_some();
    if process.kernel_thread || !process.is_alive() || !rested || addresses.iter().all(known) {
        return;
    }
    process.scanned = Some(Instant::now());
    if let Ok(image) = read_image(files, process.key.process) {
        stats.rescans += 1;
        process.image = Arc::new(merged(&process.image, image));
    }
}

/// Reads the executable mappings of a process and opens their files.
fn read_image(files: &mut FileTable, key: ProcessKey) -> Result<Image, ProcError> {
    let text = proc::read(key.tgid, "maps")?;
    let mappings = proc::parse_maps(&text).iter().map(|line| mapping(files, key.tgid, line)).collect();
    proc::check(key)?;
    Ok(Image { mappings })
}

fn mapping(files: &mut FileTable, tgid: u32, line: &MapsLine) -> Mapping {
    let kind = if line.path == "[vdso]" {
        MappingKind::Vdso
    } else if line.inode == 0 {
        MappingKind::Anon
    } else {
        MappingKind::File(files.open(&FileMapping {
            tgid,
            start: line.start,
            end: line.end,
            path: &line.path,
            dev: line.dev,
            inode: line.inode,
        }))
    };
    Mapping { start: line.start, end: line.end, offset: line.offset, kind }
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
