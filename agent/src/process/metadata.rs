//! What `/proc` tells of a process, read once, checked, bounded, and never of the wrong process.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use super::proc::{self, ProcError, ProcFs, RealProc};
use crate::{
    cgroup::{CgroupHierarchy, CgroupNames, parse_path},
    model::ProcessKey,
};

/// How much of a command line or an environment is read: the kernel's own bound on one argument.
const TEXT_BYTES: u64 = 128 << 10;
/// How many entries are looked at for room before a load is refused: what a load may cost at most.
const PRUNE_LOOKS: usize = 64;
/// What an entry takes beside its texts.
const ENTRY_BYTES: usize = size_of::<Metadata>() + size_of::<Entry>() + 64;

/// What a [`ProcessMetadataCache`] reads and how much it keeps.
#[derive(Clone, Debug)]
pub struct MetadataOptions {
    /// Processes at one time.
    pub entries: usize,
    /// Memory, as counted by the texts that are kept.
    pub bytes: usize,
    /// Environment variables that may be read; all others are neither kept nor shown. Empty: the environment is not read.
    pub environ: BTreeSet<String>,
    /// Whether the command line is read. It may hold secrets: nothing prints it.
    pub cmdline: bool,
    /// Whether the working directory is read.
    pub cwd: bool,
    /// Which control group counts.
    pub hierarchy: CgroupHierarchy,
    /// An entry that nobody asked for so long may go when room is needed.
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

/// What is known of one process. All of it was read while the process had this key.
#[derive(Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Who. The start time is part of it.
    pub key: ProcessKey,
    /// When it was read.
    pub loaded: SystemTime,
    /// Command name of the thread group leader.
    pub comm: String,
    /// Path of the executable as the process sees it, without ` (deleted)`; empty for a kernel thread.
    pub exe: String,
    /// Effective user.
    pub uid: u32,
    /// It has no memory of its own.
    pub kernel_thread: bool,
    /// Path of its control group below the hierarchy's root.
    pub cgroup: String,
    /// 64 hex digits; empty where it is in no container.
    pub container_id: String,
    /// Inode number of its mount namespace; none where it could not be read.
    pub mount_namespace: Option<u64>,
    /// Arguments; empty unless asked for. May hold secrets: `Debug` does not show it.
    pub cmdline: Vec<String>,
    /// Working directory; empty unless asked for.
    pub cwd: String,
    /// Of the environment what the allow-list names. May hold secrets: `Debug` does not show it.
    pub environ: BTreeMap<String, String>,
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whoever adds a field decides here whether it may be shown.
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
    /// What a control group's path tells.
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
    /// The process cannot be read, or is not the one that was asked for.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// All places are taken by processes that live and are asked for.
    #[error(
        "no room for the metadata of {key}: {entries} processes, {bytes} bytes; raise MetadataOptions::entries or bytes"
    )]
    Saturated {
        /// Who was asked for.
        key: ProcessKey,
        /// Processes that are kept.
        entries: usize,
        /// Their memory.
        bytes: usize,
    },
}

/// What a cache has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MetadataStats {
    /// Asked for and there.
    pub hits: u64,
    /// Read from `/proc`.
    pub loads: u64,
    /// Could not be read, or were another process by now.
    pub failed: u64,
    /// Thrown out for others: dead, or not asked for in a long time.
    pub pruned: u64,
    /// Not kept because there was no room.
    pub saturated: u64,
    /// Memory of what is kept.
    pub bytes: usize,
}

/// The metadata of processes, by process key.
///
/// Nothing is read before it is asked for, and nothing is given out for a process that has meanwhile handed its number
/// to another: each answer is checked against the start time in `/proc`, but for [`get_unchecked`], which is for the
/// last samples of the dead. A process that has ended is [`remove`]d; its entry stays for those samples until
/// [`next_window`] has been called twice.
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
/// // Somebody else who had that number before is not this process.
/// let earlier = ProcessKey { start_boottime_ns: key.start_boottime_ns / 2, ..key };
/// assert!(cache.get_or_load(earlier).is_err());
/// assert!(cache.get(earlier).is_none());
///
/// // Only what the list allows is there, and nothing prints its values.
/// assert!(cache.environ_var(key, "PATH").is_none());
/// assert!(format!("{this:?}").contains("<0 variables>") || !this.environ.is_empty());
///
/// // It replaced its image: what is asked for next is read again.
/// cache.invalidate(key);
/// assert!(cache.get(key).is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A bare process number is no identity, so none is taken:
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
    options: MetadataOptions,
    proc: Arc<dyn ProcFs>,
    entries: HashMap<ProcessKey, Entry>,
    window: u64,
    is_saturated: bool,
    stats: MetadataStats,
}

struct Entry {
    metadata: Arc<Metadata>,
    used: Instant,
    /// It has ended, in this window.
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
    /// Empty. Reads `/proc`.
    pub fn new(options: MetadataOptions) -> Self {
        Self::reading(options, Arc::new(RealProc::default()))
    }

    /// Empty. Reads what stands for `/proc`.
    pub fn reading(options: MetadataOptions, proc: Arc<dyn ProcFs>) -> Self {
        Self {
            options,
            proc,
            entries: HashMap::new(),
            window: 0,
            is_saturated: false,
            stats: MetadataStats::default(),
        }
    }

    /// What is known of a process, read now if it was not asked for before.
    pub fn get_or_load(&mut self, key: ProcessKey) -> Result<Arc<Metadata>, MetadataError> {
        if self.entries.contains_key(&key) {
            self.check(key)?;
            if let Some(known) = self.use_entry(key) {
                return Ok(known);
            }
        }
        let metadata = match self.load(key) {
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

    /// What is known of a process that is still this one; nothing is read but its start time.
    pub fn get(&mut self, key: ProcessKey) -> Option<Arc<Metadata>> {
        self.entries.get(&key)?;
        self.check(key).ok()?;
        self.use_entry(key)
    }

    /// What is known of a process, whoever has its number now: for the last samples of one that has ended.
    pub fn get_unchecked(&self, key: ProcessKey) -> Option<Arc<Metadata>> {
        self.entries.get(&key).map(|entry| Arc::clone(&entry.metadata))
    }

    /// The value of an allow-listed environment variable of a process that is still this one.
    pub fn environ_var(&mut self, key: ProcessKey, name: &str) -> Option<String> {
        self.get(key)?.environ.get(name).cloned()
    }

    /// It replaced its image: what is known is not true any more.
    pub fn invalidate(&mut self, key: ProcessKey) {
        if let Some(entry) = self.entries.remove(&key) {
            self.stats.bytes -= entry.metadata.bytes();
        }
    }

    /// It ended. Kept for [`get_unchecked`](Self::get_unchecked) until a whole window has passed. An entry of another
    /// process that has the number by now has another key, and is not touched.
    pub fn remove(&mut self, key: ProcessKey) {
        let window = self.window;
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.removed.get_or_insert(window);
        }
    }

    /// A window is over: those that were removed before it began go.
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

    /// Processes that are kept, the removed ones that still stay included.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Nobody is kept.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What has been done.
    pub fn stats(&self) -> MetadataStats {
        self.stats
    }

    fn use_entry(&mut self, key: ProcessKey) -> Option<Arc<Metadata>> {
        let entry = self.entries.get_mut(&key)?;
        entry.used = Instant::now();
        self.stats.hits += 1;
        Some(Arc::clone(&entry.metadata))
    }

    /// Whether the process of this key still is: one that is not is taken for ended.
    fn check(&mut self, key: ProcessKey) -> Result<(), ProcError> {
        let result = proc::check_in(&*self.proc, key).map(drop);
        if matches!(result, Err(ProcError::Gone(_) | ProcError::Recycled { .. })) {
            self.stats.failed += 1;
            self.remove(key);
        }
        result
    }

    fn load(&self, key: ProcessKey) -> Result<Metadata, ProcError> {
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
            let bytes = proc::bytes(proc, key, "cmdline", TEXT_BYTES)?;
            metadata.cmdline = parts(&bytes).map(|part| String::from_utf8_lossy(part).into_owned()).collect();
        }
        if user_text && options.cwd {
            metadata.cwd = proc::link(proc, key, "cwd")?;
        }
        if user_text && !options.environ.is_empty() {
            let mut bytes = proc::bytes(proc, key, "environ", TEXT_BYTES)?;
            metadata.environ = allowed(&bytes, &options.environ);
            // What is not allowed shall not stay in freed memory.
            bytes.fill(0);
            std::hint::black_box(&bytes);
        }
        // What was read is only true if it was one process all the time.
        proc::check_in(proc, key)?;
        Ok(metadata)
    }

    /// Throws out the dead and who was not asked for in a long time, then the dead that others may still ask for.
    fn make_room(&mut self, key: ProcessKey, bytes: usize) -> Result<(), MetadataError> {
        let fits = |cache: &Self| {
            cache.entries.len() < cache.options.entries && cache.stats.bytes + bytes <= cache.options.bytes
        };
        if fits(self) {
            return Ok(());
        }
        let mut candidates: Vec<(Option<u64>, Instant, ProcessKey)> =
            self.entries.iter().map(|(key, entry)| (entry.removed, entry.used, *key)).collect();
        // Whoever was removed first goes first, then whoever was not asked for the longest.
        candidates.sort_unstable_by_key(|(removed, used, _)| (removed.unwrap_or(u64::MAX), *used));
        for (removed, used, candidate) in candidates.into_iter().take(PRUNE_LOOKS) {
            if fits(self) {
                break;
            }
            let is_over = removed.is_some()
                || used.elapsed() >= self.options.idle
                || matches!(
                    proc::check_in(&*self.proc, candidate),
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
            tracing::warn!("{error}; said once until there is room again");
        }
        Err(error)
    }
}

/// `mnt:[4026531840]`
fn namespace(link: &str) -> Option<u64> {
    link.split_once('[')?.1.strip_suffix(']')?.parse().ok()
}

/// What NULs separate.
fn parts(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    let none = bytes.is_empty();
    bytes.split(|byte| *byte == 0).filter(move |_| !none)
}

fn allowed(environ: &[u8], names: &BTreeSet<String>) -> BTreeMap<String, String> {
    parts(environ)
        .filter_map(|pair| {
            let at = pair.iter().position(|byte| *byte == b'=')?;
            let name = std::str::from_utf8(&pair[..at]).ok().filter(|name| names.contains(*name))?;
            Some((name.to_owned(), String::from_utf8_lossy(&pair[at + 1..]).into_owned()))
        })
        .collect()
}
