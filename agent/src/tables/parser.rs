//! Builds tables, on a thread of its own: first the table that most samples wait for.

use std::{
    collections::{HashMap, VecDeque},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Weak, mpsc},
    thread,
};

use gannet_elf::{BuildId, ContentId, DebugLink, Elf, Segments};
use gannet_unwind::{
    build::{BuildError, BuildOptions, BuiltTable, DebugFiles, build_bytes, build_file, identify},
    format::flags,
    limits::TableLimits,
    overrides::Overrides,
    table::UnwindTable,
};
use parking_lot::{Condvar, Mutex};

use super::disk_cache::DiskCache;
use crate::{
    access::{self, Unanswered},
    model::{FileId, MappedFile},
    runtimes::{self, RuntimeFile},
    symbols::{find_debug_file, vdso_image},
};

/// Files that wait at one time. Samples request more files again later.
const MAX_QUEUED: usize = 4096;
/// Tables that wait to be written to disk. More are built again after a restart.
const MAX_UNWRITTEN: usize = 256;

/// The sources of tables, beside the files themselves.
#[derive(Clone, Debug, Default)]
pub struct TableSources {
    /// Directory of the disk cache, which survives restarts.
    pub cache_dir: Option<PathBuf>,
    /// Directory of texts (`*.unwind`) that describe tables for files whose own information is broken.
    pub override_dir: Option<PathBuf>,
    /// Directories of separate debug files, as distributions ship them. They serve files that have no `.eh_frame`.
    pub debug_dirs: Vec<PathBuf>,
}

impl TableSources {
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
pub(super) type Outcome = (FileId, Result<ParsedFile, ParseError>);

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
    closed: bool,
}

impl Parser {
    /// Starts the thread, which calls `wake` after each outcome.
    pub(super) fn start(sources: TableSources, wake: impl Fn() + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (sender, outcomes) = mpsc::channel();
        let inbox = Arc::clone(&shared);
        thread::Builder::new().name("gannet-tables".into()).spawn(move || {
            let mut builder = FileBuilder::new(sources);
            loop {
                let file = match next(&inbox, !builder.unwritten.is_empty()) {
                    Work::Build(file) => file,
                    Work::Idle => {
                        builder.write_one();
                        continue;
                    }
                    Work::UnwindEnd => return,
                };
                if sender.send((file.id, builder.build(&file))).is_err() {
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
    Build(Arc<MappedFile>),
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
            return Work::Build(file);
        }
        if has_idle_work {
            return Work::Idle;
        }
        shared.changed.wait(&mut queue);
    }
}

/// The state of the thread.
struct FileBuilder {
    limits: Arc<TableLimits>,
    overrides: Arc<Overrides>,
    debug_dirs: Arc<Vec<PathBuf>>,
    cache: Option<DiskCache>,
    /// Tables in use: a library that many containers bring is one table.
    in_use: HashMap<ContentId, Weak<UnwindTable>>,
    /// Tables to write to disk once nothing is requested: writing takes longer than building.
    unwritten: VecDeque<(Arc<UnwindTable>, ContentId, Segments, Option<BuildId>)>,
}

impl FileBuilder {
    fn new(sources: TableSources) -> Self {
        let limits = TableLimits::default();
        let cache = sources.cache_dir.as_deref().and_then(|directory| match DiskCache::open(directory) {
            Ok(cache) => Some(cache),
            Err(error) => {
                let directory = directory.display();
                tracing::warn!("cannot open {directory}, unwind tables do not survive a restart: {error}");
                None
            }
        });
        let mut overrides = Overrides::default();
        if let Some(directory) = &sources.override_dir {
            read_overrides(directory, &limits, &mut overrides);
        }
        Self {
            limits: Arc::new(limits),
            overrides: Arc::new(overrides),
            debug_dirs: Arc::new(sources.debug_dirs),
            cache,
            in_use: HashMap::new(),
            unwritten: VecDeque::new(),
        }
    }

    fn build(&mut self, file: &Arc<MappedFile>) -> Result<ParsedFile, ParseError> {
        let limits = Arc::clone(&self.limits);
        let (content, segments) = on_worker(file, move |file, open| identify(open, &file.path, &limits))?;
        if let Some(table) = self.in_use.get(&content).and_then(Weak::upgrade) {
            return Ok(ParsedFile { content, segments, runtime: runtime_of(&table, file), table });
        }
        let overridden = self.overrides.get(&content).is_some();
        let cached = self.cache.as_ref().filter(|_| !overridden).and_then(|cache| cache.read(&content));
        let parsed = if let Some(cached) = cached {
            let runtime = runtime_of(&cached.table, file);
            ParsedFile { content, segments: cached.segments, table: Arc::new(cached.table), runtime }
        } else {
            let (limits, overrides) = (Arc::clone(&self.limits), Arc::clone(&self.overrides));
            let directories = Arc::clone(&self.debug_dirs);
            let built = on_worker(file, move |file, open| {
                let debug_file = InstalledDebugFile { file, open, directories: &directories };
                let options = BuildOptions {
                    debug_files: Some(&debug_file),
                    overrides: Some(&overrides),
                    runs: true,
                    list_functions: runtimes::LIST_FUNCTIONS,
                    ..BuildOptions::new(&file.path, &limits)
                };
                build_file(open, &options)
            })?;
            let BuiltTable { table, content, build_id, segments, report: _ } = built;
            let table = Arc::new(table);
            if self.cache.is_some()
                && !overridden
                && DiskCache::is_worthwhile(&table)
                && self.unwritten.len() < MAX_UNWRITTEN
            {
                self.unwritten.push_back((Arc::clone(&table), content, segments.clone(), build_id));
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
        if let (Some(cache), Some((table, content, segments, build_id))) =
            (&mut self.cache, self.unwritten.pop_front())
        {
            cache.write(&content, &table, &segments, build_id.as_ref());
        }
    }
}

/// Opens a file and makes a call with it, all on a worker: its file system may stop to answer.
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
    if !table.rules().iter().any(|rule| rule.flags & flags::LIST != 0) {
        return None;
    }
    let path = file.path.clone();
    let detected = access::read_file(file, move |open| {
        let elf = Elf::parse(open, &TableLimits::default().elf()).ok()?;
        runtimes::detect(&elf, &path)
    });
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

/// Reads all texts of a directory. Logs a wrong one, and uses the others.
fn read_overrides(directory: &Path, limits: &TableLimits, overrides: &mut Overrides) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_none_or(|ending| ending != "unwind") {
            continue;
        }
        let read = fs::read_to_string(&path).map_err(|error| error.to_string());
        match read.and_then(|text| overrides.insert_text(&text, limits).map_err(|error| error.to_string())) {
            Ok(content) => {
                tracing::info!("using the unwind table in {} for file content {content}", path.display());
            }
            Err(error) => tracing::warn!(
                "cannot use the unwind table in {}, using that of its file: {error}",
                path.display()
            ),
        }
    }
}

/// Builds the table of the kernel's own shared object, which is the same in all 64-bit processes.
pub(super) fn vdso() -> Option<BuiltTable> {
    let bytes = vdso_image().ok()?;
    let limits = TableLimits::default();
    build_bytes(&bytes, &BuildOptions { runs: true, ..BuildOptions::new("[vdso]", &limits) }).ok()
}
