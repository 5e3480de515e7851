//! Builds tables, on a thread of its own: first the table that most samples wait for.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Weak, mpsc},
    thread,
};

use gannet_elf::{BuildId, ContentId, DebugLink, Segments};
use gannet_unwind::{
    build::{BuildError, BuildOptions, BuiltTable, DebugFiles, build_bytes, build_file, identify},
    cache::{self, CachedTable},
    format::flags,
    limits::TableLimits,
    overrides::Overrides,
    table::UnwindTable,
};
use parking_lot::{Condvar, Mutex};

use super::{disk_cache::DiskCache, scratch::Scratch, supplied::SuppliedTables};
use crate::{
    access::{self, OwnFiles, Unanswered, on_own_files},
    model::{FileId, MappedFile},
    runtimes::{self, RuntimeFile},
    symbols::{find_debug_file, vdso_image},
};

/// Files that wait at one time. Samples request more files again later.
const MAX_QUEUED: usize = 4096;
/// Tables that wait to be written to disk. More are built again after a restart.
const MAX_UNWRITTEN: usize = 256;
/// Built tables that the engine has not taken yet. The thread waits for it.
const MAX_OUTCOMES: usize = 64;

/// The sources of tables, beside the files themselves.
#[derive(Clone, Debug, Default)]
pub struct TableSources {
    /// Directory of the disk cache, which survives restarts.
    pub cache_dir: Option<PathBuf>,
    /// Tables that the operator supplies for files whose own information is broken.
    pub supplied: Arc<Overrides>,
    /// Directories of separate debug files, as distributions ship them. They serve files that have no `.eh_frame`.
    pub debug_dirs: Vec<PathBuf>,
}

impl TableSources {
    /// Returns the files themselves, their installed debug files and the tables of a directory, if there is one. Logs the files
    /// that it cannot use.
    pub(crate) fn supplied_from(directory: Option<&Path>) -> Self {
        let supplied = directory.map(SuppliedTables::read).unwrap_or_default();
        supplied.log();
        Self { supplied: supplied.tables, ..Self::with_debug_files() }
    }

    /// Returns the files themselves and their installed debug files.
    pub fn with_debug_files() -> Self {
        Self { debug_dirs: vec![PathBuf::from("/usr/lib/debug")], ..Self::default() }
    }
}

/// A file with its table, built or from the disk cache.
#[derive(Debug)]
pub(super) struct ParsedFile {
    pub(super) content: ContentId,
    pub(super) segments: Segments,
    pub(super) table: Arc<UnwindTable>,
    /// The interpreter that the file is.
    pub(super) runtime: Option<Arc<RuntimeFile>>,
}

/// The result of one request.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) file: FileId,
    pub(super) parsed: Result<ParsedFile, ParseError>,
    /// The number of the supplied tables that were in force: see [`Parser::supply`].
    pub(super) supply: u64,
}

/// The reason why there is no table of a file.
#[derive(Debug, thiserror::Error)]
pub(super) enum ParseError {
    /// The file cannot be opened any more.
    #[error("cannot open {0}: {1}")]
    Open(String, #[source] io::Error),
    /// The file is damaged, or not supported.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The file can be read when its file system answers again.
    #[error(transparent)]
    Unanswered(#[from] Unanswered),
}

/// A handle to the thread, which ends when the handle is dropped.
#[derive(Debug)]
pub(super) struct Parser {
    shared: Arc<Shared>,
    outcomes: mpsc::Receiver<Outcome>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// With the number of samples that wait for each.
    files: HashMap<FileId, (usize, Arc<MappedFile>)>,
    supplied: Supply,
    closed: bool,
}

/// Supplied tables, counted by their changes.
#[derive(Clone, Debug, Default)]
struct Supply {
    number: u64,
    tables: Arc<Overrides>,
}

impl Parser {
    /// Starts the thread, which calls `wake` after each outcome.
    pub(super) fn start(sources: TableSources, wake: impl Fn() + Send + 'static) -> io::Result<Self> {
        let TableSources { cache_dir, supplied, debug_dirs } = sources;
        let shared = Arc::new(Shared::default());
        shared.queue.lock().supplied.tables = Arc::clone(&supplied);
        let (sender, outcomes) = mpsc::sync_channel(MAX_OUTCOMES);
        let inbox = Arc::clone(&shared);
        thread::Builder::new().name("gannet-tables".into()).spawn(move || {
            let mut builder = FileBuilder::new(cache_dir.as_deref(), debug_dirs);
            builder.supplied.tables = supplied;
            loop {
                let file = match next(&inbox, !builder.unwritten.is_empty()) {
                    Work::Build(file, supply) => {
                        builder.supply(supply);
                        file
                    }
                    Work::Idle => {
                        builder.write_one();
                        continue;
                    }
                    Work::UnwindEnd => return,
                };
                let supply = builder.supplied.number;
                if sender.send(Outcome { file: file.id, parsed: builder.build(&file), supply }).is_err() {
                    return;
                }
                wake();
            }
        })?;
        Ok(Self { shared, outcomes })
    }

    /// Requests a file's table, for which `samples` samples wait. Returns false if the queue is full.
    pub(super) fn request(&self, file: &Arc<MappedFile>, samples: usize) -> bool {
        let mut queue = self.shared.queue.lock();
        if queue.files.len() >= MAX_QUEUED && !queue.files.contains_key(&file.id) {
            return false;
        }
        queue.files.insert(file.id, (samples, Arc::clone(file)));
        self.shared.changed.notify_one();
        true
    }

    /// Raises the number of samples that wait for a requested table.
    pub(super) fn raise(&self, file: FileId, samples: usize) {
        if let Some((waiting, _)) = self.shared.queue.lock().files.get_mut(&file) {
            *waiting = samples.max(*waiting);
        }
    }

    /// Replaces the supplied tables; returns their number, which the outcomes of later requests have.
    pub(super) fn supply(&self, tables: Arc<Overrides>) -> u64 {
        let supplied = &mut self.shared.queue.lock().supplied;
        *supplied = Supply { number: supplied.number + 1, tables };
        supplied.number
    }

    /// Returns the outcomes since the last call.
    pub(super) fn finished(&self) -> impl Iterator<Item = Outcome> {
        self.outcomes.try_iter()
    }
}

impl Drop for Parser {
    fn drop(&mut self) {
        self.shared.queue.lock().closed = true;
        self.shared.changed.notify_one();
    }
}

/// The next step of the thread.
enum Work {
    Build(Arc<MappedFile>, Supply),
    /// Nothing is requested: there is time to write a table to disk.
    Idle,
    UnwindEnd,
}

/// Waits for a request and takes the file that most samples wait for. Does not wait if `has_idle_work`.
fn next(shared: &Shared, has_idle_work: bool) -> Work {
    let mut queue = shared.queue.lock();
    loop {
        if queue.closed {
            return Work::UnwindEnd;
        }
        let most = queue.files.iter().max_by_key(|(_, (samples, _))| *samples).map(|(id, _)| *id);
        if let Some((_, file)) = most.and_then(|id| queue.files.remove(&id)) {
            return Work::Build(file, queue.supplied.clone());
        }
        if has_idle_work {
            return Work::Idle;
        }
        shared.changed.wait(&mut queue);
    }
}

/// The name of these files in the log.
const TABLES: &str = "unwind tables";

/// Tables that memory has no room for.
enum Cache {
    /// They survive a restart. Workers use it: its disk may stop answering.
    Disk(Arc<Mutex<DiskCache>>),
    /// For the same reason workers use this one.
    Scratch(Arc<Mutex<Scratch>>),
}

impl Cache {
    /// Reads a table. If the disk does not answer, the table is built again.
    fn read(&self, content: &ContentId) -> Option<CachedTable> {
        let content = *content;
        match self {
            Self::Disk(cache) => {
                let cache = Arc::clone(cache);
                on_own_files(OwnFiles::State, Path::new(TABLES), move || cache.lock().read(&content)).ok()?
            }
            Self::Scratch(scratch) => {
                let scratch = Arc::clone(scratch);
                let read = move || scratch.lock().read(&content);
                on_own_files(OwnFiles::Temporary, Path::new(TABLES), read).ok()?
            }
        }
    }

    fn write(&mut self, Unwritten { table, content, segments, build_id }: &Unwritten) {
        let bytes = cache::encode(content, table, segments, build_id.as_ref());
        let content = *content;
        // A table that the disk does not take is built again.
        let _ = match self {
            Self::Disk(cache) => {
                let cache = Arc::clone(cache);
                let write = move || cache.lock().write(&content, &bytes);
                on_own_files(OwnFiles::State, Path::new(TABLES), write)
            }
            Self::Scratch(scratch) => {
                let scratch = Arc::clone(scratch);
                let write = move || scratch.lock().write(&content, &bytes);
                on_own_files(OwnFiles::Temporary, Path::new(TABLES), write)
            }
        };
    }
}

/// A table to write once nothing is requested: writing takes longer than building.
struct Unwritten {
    table: Arc<UnwindTable>,
    content: ContentId,
    segments: Segments,
    build_id: Option<BuildId>,
}

/// The state of the thread.
struct FileBuilder {
    limits: Arc<TableLimits>,
    supplied: Supply,
    debug_dirs: Arc<Vec<PathBuf>>,
    cache: Cache,
    /// Tables in use: a library that many containers bring is one table.
    in_use: HashMap<ContentId, Weak<UnwindTable>>,
    unwritten: VecDeque<Unwritten>,
}

impl FileBuilder {
    fn new(cache_dir: Option<&Path>, debug_dirs: Vec<PathBuf>) -> Self {
        let open = |directory: &Path| {
            let path = directory.to_owned();
            on_own_files(OwnFiles::State, directory, move || DiskCache::open(&path)).and_then(|opened| opened)
        };
        let cache = cache_dir.and_then(|directory| match open(directory) {
            Ok(cache) => Some(cache),
            Err(error) => {
                let directory = directory.display();
                tracing::warn!("cannot open {directory}, unwind tables do not survive a restart: {error}");
                None
            }
        });
        Self {
            limits: Arc::default(),
            supplied: Supply::default(),
            debug_dirs: Arc::new(debug_dirs),
            cache: match cache {
                Some(cache) => Cache::Disk(Arc::new(Mutex::new(cache))),
                None => Cache::Scratch(Arc::default()),
            },
            in_use: HashMap::new(),
            unwritten: VecDeque::new(),
        }
    }

    /// Uses these supplied tables from now on.
    fn supply(&mut self, supplied: Supply) {
        if supplied.number != self.supplied.number {
            // Tables that other files share may be among those that change.
            self.in_use.clear();
            self.supplied = supplied;
        }
    }

    fn build(&mut self, file: &Arc<MappedFile>) -> Result<ParsedFile, ParseError> {
        let limits = Arc::clone(&self.limits);
        let (content, segments) = on_worker(file, move |file, open| identify(open, &file.path, &limits))?;
        if let Some(table) = self.in_use.get(&content).and_then(Weak::upgrade) {
            return Ok(ParsedFile { content, segments, runtime: runtime_of(&table, file), table });
        }
        let overridden = self.supplied.tables.contains(&content);
        let cached = if overridden { None } else { self.cache.read(&content) };
        let parsed = if let Some(cached) = cached {
            let runtime = runtime_of(&cached.table, file);
            ParsedFile { content, segments: cached.segments, table: Arc::new(cached.table), runtime }
        } else {
            let (limits, overrides) = (Arc::clone(&self.limits), Arc::clone(&self.supplied.tables));
            let directories = Arc::clone(&self.debug_dirs);
            let built = on_worker(file, move |file, open| {
                build_table(file, open, &directories, &overrides, &limits)
            })?;
            let BuiltTable { table, content, build_id, segments, report: _ } = built;
            let table = Arc::new(table);
            if !overridden && DiskCache::is_worthwhile(&table) && self.unwritten.len() < MAX_UNWRITTEN {
                let (table, segments) = (Arc::clone(&table), segments.clone());
                self.unwritten.push_back(Unwritten { table, content, segments, build_id });
            }
            ParsedFile { content, segments, runtime: runtime_of(&table, file), table }
        };
        if self.in_use.len() >= MAX_QUEUED {
            self.in_use.retain(|_, table| table.strong_count() > 0);
        }
        self.in_use.insert(parsed.content, Arc::downgrade(&parsed.table));
        Ok(parsed)
    }

    fn write_one(&mut self) {
        if let Some(unwritten) = self.unwritten.pop_front() {
            self.cache.write(&unwritten);
        }
    }
}

/// Builds the table of an open file. A supplied table takes precedence.
pub(crate) fn build_table(
    file: &MappedFile,
    open: &File,
    debug_dirs: &[PathBuf],
    supplied: &Overrides,
    limits: &TableLimits,
) -> Result<BuiltTable, BuildError> {
    let options = BuildOptions {
        debug_files: Some(&InstalledDebugFile { file, open, directories: debug_dirs }),
        overrides: Some(supplied),
        runs: true,
        list_functions: runtimes::LIST_FUNCTIONS,
        list_tables: runtimes::LIST_TABLES,
        ..BuildOptions::new(&file.path, limits)
    };
    build_file(open, &options)
}

/// Opens a file and makes a call with it, all on a worker: its file system may stop answering.
fn on_worker<T: Send + 'static>(
    file: &Arc<MappedFile>,
    call: impl FnOnce(&MappedFile, &File) -> Result<T, BuildError> + Send + 'static,
) -> Result<T, ParseError> {
    let theirs = Arc::clone(file);
    let called = access::read_file(file, move |open| call(&theirs, open))?;
    Ok(called.map_err(|error| ParseError::Open(file.path.clone(), error))??)
}

/// Finds the interpreter in a file. Files without its loop are not read again.
fn runtime_of(table: &UnwindTable, file: &Arc<MappedFile>) -> Option<Arc<RuntimeFile>> {
    let has_loop = table.rules().iter().any(|rule| rule.flags & flags::LIST != 0);
    if !has_loop && !runtimes::may_be_runtime(&file.path) {
        return None;
    }
    let path = file.path.clone();
    let detected = access::read_file(file, move |open| runtimes::detect_in(open, &path));
    detected.ok()?.ok()?.map(Arc::new)
}

/// Finds the installed debug file of one program.
#[derive(Debug)]
struct InstalledDebugFile<'a> {
    file: &'a MappedFile,
    open: &'a File,
    directories: &'a [PathBuf],
}

impl DebugFiles for InstalledDebugFile<'_> {
    fn open(&self, _: Option<&BuildId>, _: Option<&DebugLink>) -> Option<File> {
        find_debug_file(self.file, self.open, self.directories)?.file
    }
}

/// Builds the table of the kernel's own shared object, which is the same in all 64-bit processes.
pub(super) fn vdso() -> Option<BuiltTable> {
    let bytes = vdso_image().ok()?;
    let limits = TableLimits::default();
    build_bytes(&bytes, &BuildOptions { runs: true, ..BuildOptions::new("[vdso]", &limits) }).ok()
}
