//! Reads the functions at addresses of stored files, on bounded workers, and caches them.

use std::{
    fs::File,
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use gannet_symbols::{
    demangle,
    dwarf::{self, DebugLine},
    go, tables,
};
use tokio::sync::{Mutex, Semaphore};

use super::{attempts::Attempts, check::Checked, layout::Layout};
use crate::metrics::Metrics;

/// Maximum number of child processes that read files at the same time, each with up to [`MEMORY_BYTES`] of memory.
const READERS: usize = 2;
/// Memory of a child process that reads debug information, beside the file.
const MEMORY_BYTES: u64 = 384 << 20;
/// Maximum number of addresses of one child process.
const CALL_ADDRESSES: usize = 4096;
/// Time limit for the addresses of one file. The next query reads the rest.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of an entry of the cache, without its functions.
const ENTRY_BYTES: u64 = 96;

/// A function at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NamedLine {
    /// The readable name, as a programmer writes it.
    pub(super) name: Arc<str>,
    /// The name in the object file, mangled by the compiler.
    pub(super) system_name: Arc<str>,
    /// Source file; empty if unknown.
    pub(super) file: Arc<str>,
    /// Line in that file; 0 if unknown.
    pub(super) line: u32,
    pub(super) column: u32,
    /// Line at which the function begins; 0 if unknown.
    pub(super) start_line: u32,
}

/// The functions at one address, the innermost inlined one first. Empty if the file has no name for it.
pub(super) type Frame = Arc<[NamedLine]>;

/// A file that is ready to be read.
#[derive(Debug)]
pub(super) struct DebugFile {
    /// Distinguishes the entries of the cache from those of earlier files of the same build id, and from those before a retry.
    version: AtomicU64,
    path: PathBuf,
    pub(super) layout: Layout,
    /// True if the file has debug information.
    has_debug_info: bool,
    /// Attempts to read the debug information.
    debug_info: Attempts,
    /// Attempts to search the symbol tables.
    tables: Attempts,
    /// Directories for the shared part of the debug information, if the file refers to one.
    directories: Vec<PathBuf>,
    /// The lock that a reader of this file holds, so that no two readers read the same addresses.
    reading: Mutex<()>,
}

impl DebugFile {
    /// Returns the time of the next attempt to read a source of names that failed.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        [self.debug_info.retry_at(), self.tables.retry_at()].into_iter().flatten().min()
    }

    fn is_retry_due(&self) -> bool {
        self.retry_at().is_some_and(|at| at <= Instant::now())
    }
}

#[derive(Clone)]
struct ByBytes;

impl quick_cache::Weighter<(u64, u64), Frame> for ByBytes {
    fn weight(&self, _: &(u64, u64), frame: &Frame) -> u64 {
        let bytes = |line: &NamedLine| {
            (size_of::<NamedLine>() + line.name.len() + line.system_name.len() + line.file.len()) as u64
        };
        ENTRY_BYTES + frame.iter().map(bytes).sum::<u64>()
    }
}

/// The reader of all files. It owns the permits for child processes and the cache of functions.
pub(super) struct Reader {
    /// The program that reads debug information: the collector itself.
    program: PathBuf,
    /// Functions by version of the file and ELF virtual address.
    cache: quick_cache::sync::Cache<(u64, u64), Frame, ByBytes>,
    permits: Semaphore,
    versions: AtomicU64,
    /// Pause after the first failed attempt.
    retry_pause: Duration,
    metrics: Metrics,
}

impl Reader {
    pub(super) fn new(program: PathBuf, cache_bytes: u64, retry_pause: Duration, metrics: Metrics) -> Self {
        let cache =
            quick_cache::sync::Cache::with_weighter((cache_bytes / 256) as usize, cache_bytes, ByBytes);
        let (permits, versions) = (Semaphore::new(READERS), AtomicU64::new(0));
        Self { program, cache, permits, versions, retry_pause, metrics }
    }

    /// Prepares a file for reading. `directories` hold the files that its debug information may refer to.
    pub(super) fn prepare(&self, path: PathBuf, checked: Checked, directories: Vec<PathBuf>) -> DebugFile {
        let Checked { layout, has_debug_info, alternate, .. } = checked;
        DebugFile {
            version: AtomicU64::new(self.next_version()),
            path,
            layout,
            has_debug_info,
            debug_info: Attempts::default(),
            tables: Attempts::default(),
            directories: if alternate.is_some() { directories } else { Vec::new() },
            reading: Mutex::new(()),
        }
    }

    fn next_version(&self) -> u64 {
        self.versions.fetch_add(1, Ordering::Relaxed)
    }

    /// Returns the cached functions at an ELF virtual address, or `None` if the cache lacks it.
    pub(super) fn known(&self, file: &DebugFile, address: u64) -> Option<Frame> {
        self.cache.get(&(file.version.load(Ordering::Relaxed), address))
    }

    /// Reports whether a read of these addresses would add nothing to the cache.
    pub(super) fn has_all(&self, file: &DebugFile, mut addresses: impl Iterator<Item = u64>) -> bool {
        !file.is_retry_due() && addresses.all(|address| self.known(file, address).is_some())
    }

    /// Reads the functions at these sorted ELF virtual addresses into the cache. If the caller stops waiting, the work goes on up to its
    /// own limits. Returns false if the file is gone.
    pub(super) async fn read(self: &Arc<Self>, file: Arc<DebugFile>, addresses: Vec<u64>) -> bool {
        let _reading = file.reading.lock().await;
        if file.is_retry_due() {
            let now = Instant::now();
            for attempts in [&file.debug_info, &file.tables] {
                attempts.begin_retry(now);
            }
            // The cache lacks what the failed attempts could not read.
            file.version.store(self.next_version(), Ordering::Relaxed);
        }
        let missing: Vec<u64> =
            addresses.into_iter().filter(|address| self.known(&file, *address).is_none()).collect();
        let Ok(_permit) = self.permits.acquire().await else { return true };
        let (reader, theirs) = (Arc::clone(self), Arc::clone(&file));
        let done = tokio::task::spawn_blocking(move || reader.read_now(&theirs, &missing)).await;
        match done {
            Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => return false,
            Ok(Err(error)) => {
                self.metrics.debuginfo_failed.inc();
                tracing::warn!(path = %file.path.display(), %error, "cannot open a file with debug information");
            }
            Ok(Ok(())) | Err(_) => {}
        }
        true
    }

    fn read_now(&self, file: &DebugFile, addresses: &[u64]) -> io::Result<()> {
        let begin = Instant::now();
        let open = File::open(&file.path)?;
        for addresses in addresses.chunks(CALL_ADDRESSES) {
            if begin.elapsed() > READ_TIMEOUT {
                tracing::warn!(path = %file.path.display(), "reading a debug file took too long; the next query goes on");
                return Ok(());
            }
            self.read_some(file, &open, addresses);
        }
        Ok(())
    }

    /// Searches the symbol tables for these addresses.
    fn names(&self, file: &DebugFile, open: &File, addresses: &[u64]) -> Vec<Option<Vec<u8>>> {
        if addresses.is_empty() || !file.tables.may_try() {
            return Vec::new();
        }
        match tables::find(open, None, addresses) {
            Ok(found) => {
                file.tables.succeeded();
                found.names
            }
            Err(error) => {
                file.tables.failed(self.retry_pause);
                self.metrics.debuginfo_failed.inc();
                tracing::warn!(path = %file.path.display(), %error, "cannot use the symbol table of a file now");
                Vec::new()
            }
        }
    }

    fn read_some(&self, file: &DebugFile, open: &File, addresses: &[u64]) {
        let version = file.version.load(Ordering::Relaxed);
        let mut lines = vec![Vec::new(); addresses.len()];
        if let Some(found) = go::lines(open, addresses) {
            // Go's own tables are much faster to read than debug information.
            lines = found;
        } else if file.has_debug_info && file.debug_info.may_try() {
            let found =
                dwarf::resolve(&self.program, open, addresses, MEMORY_BYTES, &file.directories, &|_| ());
            match found {
                Ok(found) => {
                    file.debug_info.succeeded();
                    lines = found;
                }
                Err(error) => {
                    file.debug_info.failed(self.retry_pause);
                    self.metrics.debuginfo_failed.inc();
                    tracing::warn!(
                        path = %file.path.display(), %error,
                        "cannot use the debug information of a file now; its symbol table names its functions"
                    );
                }
            }
        }
        let rest = |(address, lines): (&u64, &Vec<DebugLine>)| lines.is_empty().then_some(*address);
        let rest: Vec<u64> = addresses.iter().zip(&lines).filter_map(rest).collect();
        let mut names = self.names(file, open, &rest).into_iter();
        for (address, lines) in addresses.iter().zip(lines) {
            let frame: Frame = if lines.is_empty() {
                names.next().flatten().map(|name| symbol(&name)).into_iter().collect()
            } else {
                lines.iter().map(line).collect()
            };
            // The cache also gets addresses without a name: otherwise each query would search for them again.
            self.cache.insert((version, *address), frame);
        }
    }
}

fn line(line: &DebugLine) -> NamedLine {
    let DebugLine { name, file, line, column, start_line } = line;
    let name = named(name);
    NamedLine {
        file: demangle::cut(file).into(),
        line: *line,
        column: *column,
        start_line: *start_line,
        ..name
    }
}

fn symbol(name: &[u8]) -> NamedLine {
    named(&String::from_utf8_lossy(name))
}

fn named(raw: &str) -> NamedLine {
    let (name, system_name) = (demangle::demangle(raw), demangle::cut(raw));
    NamedLine {
        name: name.into(),
        system_name: system_name.into(),
        file: "".into(),
        line: 0,
        column: 0,
        start_line: 0,
    }
}
