//! Metadata of processes from `/proc`: read once, bounded, and checked to be of the right process.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use super::{
    images::on_worker,
    proc::{self, ProcError, ProcFs, RealProc},
};
use crate::{
    cgroup::{CgroupHierarchy, CgroupNames, parse_path},
    model::ProcessKey,
};

/// Bytes that are read of a command line or an environment: the kernel's own bound on one argument.
pub(super) const MAX_TEXT_BYTES: u64 = 128 << 10;
/// Entries that a load checks for room before it is refused: this bounds the cost of a load.
const MAX_PRUNE_CHECKS: usize = 64;
/// Memory of an entry beside its texts.
const ENTRY_BYTES: usize = size_of::<Metadata>() + size_of::<Entry>() + 64;

/// Choices and limits of a [`ProcessMetadataCache`].
#[derive(Clone, Debug)]
pub struct MetadataOptions {
    /// Maximum number of processes.
    pub entries: usize,
    /// Maximum memory, counted by the stored texts.
    pub bytes: usize,
    /// Environment variables to read; all others are neither stored nor shown. If empty, the environment is not read.
    pub environ: BTreeSet<String>,
    /// Whether the command line is read. It may hold secrets: nothing prints it.
    pub cmdline: bool,
    /// Whether the working directory is read.
    pub cwd: bool,
    /// The hierarchy whose control group is stored.
    pub hierarchy: CgroupHierarchy,
    /// An entry that was not used for this time may be dropped when room is needed.
    pub idle: Duration,
}

impl Default for MetadataOptions {
    fn default() -> Self {
        Self {
            entries: 4096,
            bytes: 8 << 20,
            environ: BTreeSet::new(),
            cmdline: true,
            cwd: true,
            hierarchy: CgroupHierarchy::detect(),
            idle: Duration::from_secs(600),
        }
    }
}

/// Metadata of one process. All of it was read while the process had this key.
#[derive(Clone, PartialEq, Eq)]
pub struct Metadata {
    /// The process, with its start time.
    pub key: ProcessKey,
    /// When the metadata was read.
    pub loaded: SystemTime,
    /// Command name of the thread group leader.
    pub comm: String,
    /// Path of the executable as the process sees it, without ` (deleted)`; empty for a kernel thread.
    pub exe: String,
    /// Effective user id.
    pub uid: u32,
    /// Whether it is a kernel thread.
    pub kernel_thread: bool,
    /// Path of its control group below the hierarchy's root.
    pub cgroup: String,
    /// 64 hex digits; empty for a process outside of containers.
    pub container_id: String,
    /// Inode number of its mount namespace; `None` if it could not be read.
    pub mount_namespace: Option<u64>,
    /// Arguments, if [`MetadataOptions::cmdline`] is set. They may hold secrets: `Debug` does not show them.
    pub cmdline: Vec<String>,
    /// Working directory, if [`MetadataOptions::cwd`] is set.
    pub cwd: String,
    /// The variables of [`MetadataOptions::environ`]. They may hold secrets: `Debug` does not show them.
    pub environ: BTreeMap<String, String>,
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A new field does not compile until its author decides here whether it may be shown.
        let Self {
            key,
            loaded,
            comm,
            exe,
            uid,
            kernel_thread,
            cgroup,
            container_id,
            mount_namespace,
            cmdline,
            cwd,
            environ,
        } = self;
        f.debug_struct("Metadata")
            .field("key", &format_args!("{key}"))
            .field("loaded", loaded)
            .field("comm", comm)
            .field("exe", exe)
            .field("uid", uid)
            .field("kernel_thread", kernel_thread)
            .field("cgroup", cgroup)
            .field("container_id", container_id)
            .field("mount_namespace", mount_namespace)
            .field("cmdline", &format_args!("<{} arguments>", cmdline.len()))
            .field("cwd", cwd)
            .field("environ", &format_args!("<{} variables>", environ.len()))
            .finish()
    }
}

impl Metadata {
    /// Returns the names in its control group's path.
    pub fn names(&self) -> CgroupNames {
        CgroupNames::of(&self.cgroup)
    }

    fn bytes(&self) -> usize {
        let texts = [&self.comm, &self.exe, &self.cgroup, &self.container_id, &self.cwd];
        let pairs = self.environ.iter().map(|(name, value)| name.len() + value.len() + 64);
        ENTRY_BYTES
            + texts.iter().map(|text| text.len()).sum::<usize>()
            + self.cmdline.iter().map(|text| text.len() + 24).sum::<usize>()
            + pairs.sum::<usize>()
    }
}

/// Why there is no metadata.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// The process cannot be read, or another one has its PID.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// The cache is full of processes that are alive and in use.
    #[error(
        "no room for the metadata of {key}: {entries} processes, {bytes} bytes; raise MetadataOptions::entries or bytes"
    )]
    Saturated {
        /// The process that was not stored.
        key: ProcessKey,
        /// Number of stored processes.
        entries: usize,
        /// Bytes of their metadata.
        bytes: usize,
    },
}

/// Counts of a [`ProcessMetadataCache`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MetadataStats {
    /// Look-ups that found an entry.
    pub hits: u64,
    /// Processes that were read from `/proc`.
    pub loads: u64,
    /// Processes that could not be read, or whose PID another process had.
    pub failed: u64,
    /// Entries that were dropped for others: exited, or idle.
    pub pruned: u64,
    /// Processes that were not stored because the cache was full.
    pub saturated: u64,
    /// Bytes of all entries.
    pub bytes: usize,
}

/// The metadata of processes, by process key.
///
/// A worker reads a process at its first look-up, and the caller waits 400 ms at most. Each look-up checks the start time in
/// `/proc`, so that no answer is about another process that has the PID by now. Only [`get_unchecked`] does not check: it is for the last samples of exited processes. The
/// caller [`remove`]s an exited process; its entry stays for those samples until [`next_window`] was called twice.
///
/// ```
/// use gannet_agent::{
///     model::ProcessKey,
///     process::{MetadataOptions, ProcessMetadataCache},
/// };
///
/// let mut cache = ProcessMetadataCache::new(MetadataOptions {
///     environ: ["CARGO_PKG_NAME".to_owned()].into(),
///     ..MetadataOptions::default()
/// });
/// // Keys come with the kernel's events; this one is of this very process.
/// let key = ProcessKey::of_running(std::process::id())?;
/// let this = cache.get_or_load(key)?;
/// assert_eq!(this.exe, std::fs::read_link("/proc/self/exe")?.to_str().unwrap());
/// assert_eq!(this.cmdline.len(), std::env::args().count());
///
/// // An earlier process with the same PID is another process.
/// let earlier = ProcessKey { start_boottime_ns: key.start_boottime_ns / 2, ..key };
/// assert!(cache.get_or_load(earlier).is_err());
/// assert!(cache.get(earlier).is_none());
///
/// // Only the listed variables are stored, and nothing prints their values.
/// assert!(cache.environ_var(key, "PATH").is_none());
/// assert!(format!("{this:?}").contains("<0 variables>") || !this.environ.is_empty());
///
/// // After an exec the process is read again.
/// cache.invalidate(key);
/// assert!(cache.get(key).is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A bare PID is no identity, so the cache does not accept one:
///
/// ```compile_fail
/// use gannet_agent::process::{MetadataOptions, ProcessMetadataCache};
///
/// let mut cache = ProcessMetadataCache::new(MetadataOptions::default());
/// let _ = cache.get_or_load(std::process::id());
/// ```
///
/// [`get_unchecked`]: Self::get_unchecked
/// [`remove`]: Self::remove
/// [`next_window`]: Self::next_window
pub struct ProcessMetadataCache {
    options: Arc<MetadataOptions>,
    proc: Arc<dyn ProcFs>,
    entries: HashMap<ProcessKey, Entry>,
    window: u64,
    is_saturated: bool,
    stats: MetadataStats,
}

struct Entry {
    metadata: Arc<Metadata>,
    used: Instant,
    /// The window in which it exited.
    removed: Option<u64>,
}

impl fmt::Debug for ProcessMetadataCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { options: _, proc: _, entries, window: _, is_saturated, stats } = self;
        f.debug_struct("ProcessMetadataCache")
            .field("len", &entries.len())
            .field("is_saturated", is_saturated)
            .field("stats", stats)
            .finish_non_exhaustive()
    }
}

impl ProcessMetadataCache {
    /// Builds an empty cache that reads `/proc`.
    pub fn new(options: MetadataOptions) -> Self {
        Self::reading(options, Arc::new(RealProc::default()))
    }

    /// Builds an empty cache that reads processes from `proc`.
    pub fn reading(options: MetadataOptions, proc: Arc<dyn ProcFs>) -> Self {
        Self {
            options: Arc::new(options),
            proc,
            entries: HashMap::new(),
            window: 0,
            is_saturated: false,
            stats: MetadataStats::default(),
        }
    }

    /// Returns the metadata of a process; reads it at the first look-up.
    pub fn get_or_load(&mut self, key: ProcessKey) -> Result<Arc<Metadata>, MetadataError> {
        if self.entries.contains_key(&key) {
            self.check(key)?;
            if let Some(known) = self.use_entry(key) {
                return Ok(known);
            }
        }
        let loader = self.loader();
        let loaded = on_worker(key, move || loader.load(key)).and_then(|loaded| loaded);
        self.insert(key, loaded)
    }

    /// Returns a reader of processes, for another thread.
    pub(super) fn loader(&self) -> MetadataLoader {
        MetadataLoader { options: Arc::clone(&self.options), proc: Arc::clone(&self.proc) }
    }

    /// Enters what a [`MetadataLoader`] has read of a process without an entry.
    pub(super) fn insert(
        &mut self,
        key: ProcessKey,
        loaded: Result<Metadata, ProcError>,
    ) -> Result<Arc<Metadata>, MetadataError> {
        let metadata = match loaded {
            Ok(metadata) => Arc::new(metadata),
            Err(error) => {
                self.stats.failed += 1;
                return Err(error.into());
            }
        };
        let bytes = metadata.bytes();
        self.make_room(key, bytes)?;
        self.is_saturated = false;
        self.stats.loads += 1;
        self.stats.bytes += bytes;
        let entry = Entry { metadata: Arc::clone(&metadata), used: Instant::now(), removed: None };
        self.entries.insert(key, entry);
        Ok(metadata)
    }

    /// Returns the stored metadata of a process that still has its PID. Reads only its start time.
    pub fn get(&mut self, key: ProcessKey) -> Option<Arc<Metadata>> {
        self.entries.get(&key)?;
        self.check(key).ok()?;
        self.use_entry(key)
    }

    /// Returns the stored metadata of a process, also after it exited: for its last samples.
    pub fn get_unchecked(&self, key: ProcessKey) -> Option<Arc<Metadata>> {
        self.entries.get(&key).map(|entry| Arc::clone(&entry.metadata))
    }

    /// Returns an environment variable of [`MetadataOptions::environ`] of a process that still has its PID.
    pub fn environ_var(&mut self, key: ProcessKey, name: &str) -> Option<String> {
        self.get(key)?.environ.get(name).cloned()
    }

    /// Drops the metadata of a process that has called `execve`.
    pub fn invalidate(&mut self, key: ProcessKey) {
        if let Some(entry) = self.entries.remove(&key) {
            self.stats.bytes -= entry.metadata.bytes();
        }
    }

    /// Marks a process as exited. Its entry stays for [`get_unchecked`](Self::get_unchecked) until a whole window has passed.
    /// A later process with the same PID has another key and keeps its entry.
    pub fn remove(&mut self, key: ProcessKey) {
        let window = self.window;
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.removed.get_or_insert(window);
        }
    }

    /// Ends a window: drops processes that exited before it began.
    pub fn next_window(&mut self) {
        self.window += 1;
        let window = self.window;
        let mut freed = 0;
        self.entries.retain(|_, entry| {
            let stays = entry.removed.is_none_or(|removed| removed + 1 >= window);
            if !stays {
                freed += entry.metadata.bytes();
            }
            stays
        });
        self.stats.bytes -= freed;
    }

    /// Returns the number of entries, exited processes included.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Reports whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the counts of the cache.
    pub fn stats(&self) -> MetadataStats {
        self.stats
    }

    fn use_entry(&mut self, key: ProcessKey) -> Option<Arc<Metadata>> {
        let entry = self.entries.get_mut(&key)?;
        entry.used = Instant::now();
        self.stats.hits += 1;
        Some(Arc::clone(&entry.metadata))
    }

    /// Checks that the process still has its PID; else marks it as exited.
    fn check(&mut self, key: ProcessKey) -> Result<(), ProcError> {
        let result = self.check_on_worker(key);
        if matches!(result, Err(ProcError::Gone(_) | ProcError::Recycled { .. })) {
            self.stats.failed += 1;
            self.remove(key);
        }
        result
    }

    fn check_on_worker(&self, key: ProcessKey) -> Result<(), ProcError> {
        let proc = Arc::clone(&self.proc);
        on_worker(key, move || proc::check_in(&*proc, key).map(drop))?
    }

    /// Makes room for an entry: drops processes marked as exited, then idle ones and those found to have exited.
    fn make_room(&mut self, key: ProcessKey, bytes: usize) -> Result<(), MetadataError> {
        let fits = |cache: &Self| {
            cache.entries.len() < cache.options.entries && cache.stats.bytes + bytes <= cache.options.bytes
        };
        if fits(self) {
            return Ok(());
        }
        let mut candidates: Vec<(Option<u64>, Instant, ProcessKey)> =
            self.entries.iter().map(|(key, entry)| (entry.removed, entry.used, *key)).collect();
        // The first exited process goes first, then the least recently used one.
        candidates.sort_unstable_by_key(|(removed, used, _)| (removed.unwrap_or(u64::MAX), *used));
        for (removed, used, candidate) in candidates.into_iter().take(MAX_PRUNE_CHECKS) {
            if fits(self) {
                break;
            }
            let is_over = removed.is_some()
                || used.elapsed() >= self.options.idle
                || matches!(
                    self.check_on_worker(candidate),
                    Err(ProcError::Gone(_) | ProcError::Recycled { .. })
                );
            if is_over {
                self.invalidate(candidate);
                self.stats.pruned += 1;
            }
        }
        if fits(self) {
            return Ok(());
        }
        self.stats.saturated += 1;
        let (entries, bytes) = (self.entries.len(), self.stats.bytes);
        let error = MetadataError::Saturated { key, entries, bytes };
        if !self.is_saturated {
            self.is_saturated = true;
            tracing::warn!("{error}; logged once until there is room again");
        }
        Err(error)
    }
}

/// Reads the metadata of processes.
pub(super) struct MetadataLoader {
    options: Arc<MetadataOptions>,
    proc: Arc<dyn ProcFs>,
}

impl MetadataLoader {
    /// Reads a process, and checks that it was this one all the time.
    pub(super) fn load(&self, key: ProcessKey) -> Result<Metadata, ProcError> {
        let proc = &*self.proc;
        let options = &self.options;
        let stat = proc::check_in(proc, key)?;
        let user_text = !stat.kernel_thread;
        let without_mark = |path: String| path.strip_suffix(" (deleted)").map_or(path.clone(), str::to_owned);
        let cgroup =
            parse_path(&proc::text(proc, key, "cgroup")?, options.hierarchy.controller()).unwrap_or_default();
        let mut metadata = Metadata {
            key,
            loaded: SystemTime::now(),
            comm: proc::text(proc, key, "comm")?.trim_end_matches('\n').to_owned(),
            exe: if user_text { without_mark(proc::link(proc, key, "exe")?) } else { String::new() },
            uid: proc::owner(proc, key)?,
            kernel_thread: stat.kernel_thread,
            container_id: CgroupNames::of(&cgroup).container_id,
            cgroup,
            mount_namespace: proc::link(proc, key, "ns/mnt").ok().and_then(|text| namespace(&text)),
            cmdline: Vec::new(),
            cwd: String::new(),
            environ: BTreeMap::new(),
        };
        if user_text && options.cmdline {
            let bytes = proc::bytes(proc, key, "cmdline", MAX_TEXT_BYTES)?;
            metadata.cmdline = parts(&bytes).map(|part| String::from_utf8_lossy(part).into_owned()).collect();
        }
        if user_text && options.cwd {
            metadata.cwd = proc::link(proc, key, "cwd")?;
        }
        if user_text && !options.environ.is_empty() {
            let is_allowed = |name: &str| options.environ.contains(name);
            metadata.environ = variables(proc, key, is_allowed)?;
        }
        // The texts are only true if it was one process all the time.
        proc::check_in(proc, key)?;
        Ok(metadata)
    }
}

/// Parses the target of a namespace link such as `mnt:[4026531840]`.
fn namespace(link: &str) -> Option<u64> {
    link.split_once('[')?.1.strip_suffix(']')?.parse().ok()
}

/// Splits bytes at NULs.
fn parts(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    let none = bytes.is_empty();
    bytes.split(|byte| *byte == 0).filter(move |_| !none)
}

/// Reads the variables of a process's environment that have an allowed name. It reads 128 KiB at most.
pub(super) fn variables(
    proc: &dyn ProcFs,
    key: ProcessKey,
    is_allowed: impl Fn(&str) -> bool,
) -> Result<BTreeMap<String, String>, ProcError> {
    let mut bytes = proc::bytes(proc, key, "environ", MAX_TEXT_BYTES)?;
    let variables = parts(&bytes).filter_map(|pair| {
        let at = pair.iter().position(|byte| *byte == b'=')?;
        let name = std::str::from_utf8(&pair[..at]).ok().filter(|name| is_allowed(name))?;
        Some((name.to_owned(), String::from_utf8_lossy(&pair[at + 1..]).into_owned()))
    });
    let variables = variables.collect();
    // Other variables may be secrets: none stays in freed memory.
    bytes.fill(0);
    std::hint::black_box(&bytes);
    Ok(variables)
}

/// Reads the variables of a process's environment that have one of these names. The caller checks that it was this process.
pub(crate) fn read_variables(key: ProcessKey, names: &[&str]) -> Result<BTreeMap<String, String>, ProcError> {
    variables(&RealProc::default(), key, |name| names.contains(&name))
}
