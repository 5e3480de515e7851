//! The perf maps of processes that make code at run time, held open, so that names can be read after the process has ended and
//! after the file was removed.
//!
//! A process maps memory for code before it writes the first line about it. So a thread opens the map some times after the
//! process was noted. It also opens the directory of the map: a map that came later can be opened by it, even if the process
//! has ended meanwhile. The thread starts with the first process that makes code.

use std::{
    fs::{self, File, Metadata},
    io::{self, BufRead as _, BufReader, Read as _},
    num::NonZeroUsize,
    os::unix::fs::MetadataExt as _,
    sync::{
        Arc, LazyLock, OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use lru::LruCache;
use parking_lot::Mutex;
use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::{check_identity, files::open_in_root};
use crate::{
    access::{self, ENGINE_DEADLINE, Target},
    model::{ProcessKey, reopen},
};

/// Processes whose maps are held, with two descriptors each.
const MAX_HELD: NonZeroUsize = NonZeroUsize::new(256).unwrap();
/// Processes that may wait for their first look.
const MAX_QUEUED: usize = 1024;
/// Pauses between attempts to open a map, of which the first one is made at once.
const PAUSES: [Duration; 3] =
    [Duration::from_millis(50), Duration::from_millis(450), Duration::from_millis(1500)];
/// How long the map of an ended process is held after it was last used.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// The directory in which compilers write perf maps, in the root directory of the process.
const DIRECTORY: &str = "tmp";
/// Bytes that are read of a list of mappings.
const MAX_MAPS_BYTES: u64 = 4 << 20;

static NODE: LazyLock<PerfMapFiles> = LazyLock::new(PerfMapFiles::default);

/// Returns the perf maps of this node's processes.
pub(crate) fn perf_map_files() -> &'static PerfMapFiles {
    &NODE
}

/// Perf maps by process.
#[derive(Default)]
pub(crate) struct PerfMapFiles {
    held: Arc<Held>,
    inbox: OnceLock<Option<SyncSender<ProcessKey>>>,
    /// Processes that were not noted, because too many waited.
    dropped: AtomicU64,
}

struct Held(Mutex<LruCache<ProcessKey, Entry>>);

impl Default for Held {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(MAX_HELD)))
    }
}

#[derive(Clone)]
struct Entry {
    found: Arc<Found>,
    used: Instant,
}

/// The files of a process that were found while it lived.
struct Found {
    name: String,
    owners: [u32; 5],
    /// Path descriptors, because closing other ones may wait for their file system.
    directory: Option<File>,
    map: Option<File>,
}

impl PerfMapFiles {
    /// Notes that a process makes code. Never waits.
    pub(super) fn note(&self, key: ProcessKey) {
        let inbox = self.inbox.get_or_init(|| {
            let (sender, inbox) = mpsc::sync_channel(MAX_QUEUED);
            let held = Arc::clone(&self.held);
            let work = move || work(&held, &inbox);
            let started = thread::Builder::new().name("gannet-perf-maps".into()).spawn(work);
            if let Err(error) = &started {
                tracing::warn!(%error, "cannot start the thread that holds perf maps; code of ended processes has no names");
            }
            started.is_ok().then_some(sender)
        });
        if inbox.as_ref().is_none_or(|inbox| inbox.try_send(key).is_err()) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the number of processes whose map was not held, because too many others waited.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Opens the perf map of a process for reading. Call it on a worker: the file system of the map may not answer.
    pub(crate) fn open(&self, key: ProcessKey) -> io::Result<File> {
        let held = self.held.0.lock().get_mut(&key).map(|entry| {
            entry.used = Instant::now();
            Arc::clone(&entry.found)
        });
        let found = match (Found::of_live(key), held) {
            (Ok(now), _) if now.map.is_some() => {
                let now = Arc::new(now);
                self.held.put(key, Arc::clone(&now));
                now
            }
            (_, Some(held)) => held,
            (now, None) => Arc::new(now?),
        };
        match &found.map {
            Some(map) => reopen(map),
            None => reopen(&found.late_map(key)?),
        }
    }
}

impl Held {
    /// Holds the files of this attempt. If it found no map and an earlier attempt did, the process has removed the file since;
    /// then the earlier files stay.
    fn put(&self, key: ProcessKey, found: Arc<Found>) {
        let mut held = self.0.lock();
        if found.map.is_some() || held.peek(&key).is_none_or(|entry| entry.found.map.is_none()) {
            held.put(key, Entry { found, used: Instant::now() });
        }
    }

    /// Closes the maps of ended processes that nothing has used for a while.
    fn close_idle(&self) {
        let idle: Vec<ProcessKey> = {
            let held = self.0.lock();
            held.iter()
                .filter(|(_, entry)| entry.used.elapsed() >= IDLE_TIMEOUT)
                .map(|(key, _)| *key)
                .collect()
        };
        for key in idle {
            let process = Target::Process(key.tgid);
            let is_alive = access::node()
                .run(process, "its state", ENGINE_DEADLINE, move || check_identity(key).is_ok());
            let mut held = self.0.lock();
            let _closed = match is_alive {
                Ok(false) => held.pop(&key),
                _ => held.peek_mut(&key).and_then(|entry| {
                    entry.used = Instant::now();
                    None
                }),
            };
        }
    }
}

impl Found {
    /// Opens what there is, of a process that lives.
    fn of_live(key: ProcessKey) -> io::Result<Self> {
        let status = fs::read_to_string(format!("/proc/{}/status", key.tgid))?;
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap_or_default()
                .split_ascii_whitespace()
        };
        // The file name holds the PID in the process's own namespace: the last one of the line.
        let own = field("NStgid:").next_back().and_then(|own| own.parse::<u32>().ok());
        let own = own.ok_or(io::ErrorKind::InvalidData)?;
        // Root may write a map for any process.
        let mut owners = [0; 5];
        for (owner, id) in owners[1..].iter_mut().zip(field("Uid:")) {
            *owner = id.parse().map_err(|_| io::ErrorKind::InvalidData)?;
        }
        let name = format!("perf-{own}.map");
        let root = rustix::fs::open(format!("/proc/{}/root", key.tgid), PATH_ONLY, Mode::empty())?;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = PATH_ONLY | OFlags::DIRECTORY;
        let directory =
            rustix::fs::openat2(&root, DIRECTORY, flags, Mode::empty(), resolve).ok().map(File::from);
        let map = open_in_root(key.tgid, &format!("/{DIRECTORY}/{name}"))
            .ok()
            .filter(|map| map.metadata().is_ok_and(|metadata| is_of(&metadata, &owners)));
        // Another process may have taken the PID before the files were opened.
        check_identity(key).map_err(io::Error::other)?;
        Ok(Self { name, owners, directory, map })
    }

    /// Opens a map that came after the last attempt.
    fn late_map(&self, key: ProcessKey) -> io::Result<File> {
        let directory = self.directory.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let map = File::from(rustix::fs::openat2(directory, &self.name, PATH_ONLY, Mode::empty(), resolve)?);
        let metadata = map.metadata()?;
        // Not the map of a process that had this PID before.
        let written = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        let age = crate::model::boot_time_ns().saturating_sub(key.start_boottime_ns);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let started = now.map_or(0, |now| now.as_nanos() as i128) - i128::from(age);
        let is_older = written + 1_000_000_000 < started;
        if is_of(&metadata, &self.owners) && !is_older { Ok(map) } else { Err(Errno::ACCESS.into()) }
    }
}

/// Reports whether a map is a regular file of the process's user or of root: others could name the functions of the process.
fn is_of(metadata: &Metadata, owners: &[u32]) -> bool {
    metadata.is_file() && owners.contains(&metadata.uid())
}

/// The file in which a process lists the functions of the code that it makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CodeList {
    PerfMap,
    JitDump,
}

impl CodeList {
    /// Finds the list of a process that lives. The calls may wait for the process and its file system without end.
    pub(crate) fn of_live(key: ProcessKey) -> Option<Self> {
        if Found::of_live(key).is_ok_and(|found| found.map.is_some()) {
            return Some(Self::PerfMap);
        }
        let maps = File::open(format!("/proc/{}/maps", key.tgid)).ok()?;
        let mut lines = BufReader::new(maps.take(MAX_MAPS_BYTES)).lines().map_while(Result::ok);
        // The process maps it for the profiler to see, as code.
        lines.any(|line| is_jitdump(&line)).then_some(Self::JitDump)
    }

    /// Returns its name, for people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::PerfMap => "perf map",
            Self::JitDump => "jitdump",
        }
    }
}

/// Reports whether a line of `/proc/PID/maps` is of a jitdump: `jit-PID.dump`.
fn is_jitdump(line: &str) -> bool {
    let is_code = line.split_ascii_whitespace().nth(1).is_some_and(|rights| rights.contains('x'));
    let name = line.rsplit('/').next().and_then(|name| name.strip_prefix("jit-")?.strip_suffix(".dump"));
    is_code && name.is_some_and(|pid| !pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A path descriptor holds the file and has no effects on a device or pipe.
const PATH_ONLY: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// Opens the maps of noted processes, until no further process can be noted.
fn work(held: &Held, inbox: &Receiver<ProcessKey>) {
    // By time; the number of attempts that were made.
    let mut due: Vec<(Instant, ProcessKey, usize)> = Vec::new();
    let mut closed = Instant::now();
    loop {
        let first = due.iter().map(|(at, ..)| *at).min();
        let wait = first.map_or(IDLE_TIMEOUT, |at| at.saturating_duration_since(Instant::now()));
        match inbox.recv_timeout(wait) {
            Ok(key) if due.len() < MAX_QUEUED => due.push((Instant::now(), key, 0)),
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let now = Instant::now();
        let (ready, later): (Vec<_>, Vec<_>) = due.drain(..).partition(|(at, ..)| *at <= now);
        due = later;
        for (at, key, attempt) in ready {
            let is_done = attempt_of(held, key);
            if let Some(pause) = PAUSES.get(attempt).filter(|_| !is_done) {
                due.push((at + *pause, key, attempt + 1));
            }
        }
        if closed.elapsed() >= IDLE_TIMEOUT {
            closed = Instant::now();
            held.close_idle();
        }
    }
}

/// Opens the map of a process. Returns whether no further attempt is needed.
fn attempt_of(held: &Held, key: ProcessKey) -> bool {
    let open = move || Found::of_live(key);
    match access::node().run(Target::Process(key.tgid), "its perf map", ENGINE_DEADLINE, open) {
        Ok(Ok(found)) => {
            let is_open = found.map.is_some();
            held.put(key, Arc::new(found));
            is_open
        }
        Ok(Err(_)) => true,
        Err(_) => false,
    }
}
