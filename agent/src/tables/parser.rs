//! Makes tables of files, on a thread of its own: what most samples wait for first.

use std::{
    collections::{HashMap, VecDeque},
    fs::{self, File},
    io,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak, mpsc},
    thread,
};

use gannet_elf::{BuildId, ContentId, DebugLink, Segments};
use gannet_unwind::{
    build::{BuildError, BuildOptions, BuiltTable, DebugFiles, build_bytes, build_file, identify},
    limits::TableLimits,
    overrides::Overrides,
    table::UnwindTable,
};

use super::keep::Shelf;
use crate::{
    model::{FileId, MappedFile},
    symbols::find_debug_file,
};

/// Files that wait at one time; more are asked for again by their samples.
const QUEUE: usize = 4096;
/// Tables that wait for being kept on disk; more are made again after a restart.
const UNKEPT: usize = 256;

/// Where tables may come from, beside the files themselves.
#[derive(Clone, Debug, Default)]
pub struct TableSources {
    /// Where finished tables are kept across restarts; none keeps none.
    pub kept: Option<PathBuf>,
    /// Texts that describe tables for files whose own information is broken: `*.unwind` in this directory.
    pub overrides: Option<PathBuf>,
    /// Where distributions put debug information that they ship apart: it serves files that have no `.eh_frame`.
    pub debug_directories: Vec<PathBuf>,
}

impl TableSources {
    /// The files themselves, and the debug files that are installed for them.
    pub fn with_debug_files() -> Self {
        Self { debug_directories: vec![PathBuf::from("/usr/lib/debug")], ..Self::default() }
    }
}

/// A table that was made, or was there.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) content: ContentId,
    pub(super) segments: Segments,
    pub(super) table: Arc<UnwindTable>,
}

/// What came of a file.
pub(super) type Outcome = (FileId, Result<Made, BuildError>);

/// A handle to the thread, which ends when the handle is dropped.
#[derive(Debug)]
pub(super) struct Parser {
    shared: Arc<Shared>,
    outcomes: mpsc::Receiver<Outcome>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    something: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// With the samples that wait for each.
    files: HashMap<FileId, (usize, Arc<MappedFile>)>,
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Parser {
    /// Starts the thread. `ring` is called whenever there is an outcome.
    pub(super) fn start(sources: TableSources, ring: impl Fn() + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (sender, outcomes) = mpsc::channel();
        let inbox = Arc::clone(&shared);
        thread::Builder::new().name("gannet-tables".into()).spawn(move || {
            let mut maker = Maker::new(sources);
            loop {
                let file = match next(&inbox, !maker.unkept.is_empty()) {
                    Work::Make(file) => file,
                    Work::Idle => {
                        maker.keep_one();
                        continue;
                    }
                    Work::UnwindEnd => return,
                };
                let Some(open) = &file.file else { continue };
                if sender.send((file.id, maker.make(&file, open))).is_err() {
                    return;
                }
                ring();
            }
        })?;
        Ok(Self { shared, outcomes })
    }

    /// Asks for a file's table, for which so many samples wait. False: the queue is full.
    pub(super) fn request(&self, file: &Arc<MappedFile>, samples: usize) -> bool {
        let mut queue = self.shared.lock();
        if queue.files.len() >= QUEUE && !queue.files.contains_key(&file.id) {
            return false;
        }
        queue.files.insert(file.id, (samples, Arc::clone(file)));
        self.shared.something.notify_one();
        true
    }

    /// So many samples wait for a table that was asked for, by now.
    pub(super) fn urge(&self, file: FileId, samples: usize) {
        if let Some((waiting, _)) = self.shared.lock().files.get_mut(&file) {
            *waiting = samples.max(*waiting);
        }
    }

    /// What has been finished since the last call.
    pub(super) fn finished(&self) -> impl Iterator<Item = Outcome> {
        self.outcomes.try_iter()
    }
}

impl Drop for Parser {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.something.notify_one();
    }
}

/// What the thread is to do next.
enum Work {
    Make(Arc<MappedFile>),
    /// Nothing is asked for: what can wait may be done.
    Idle,
    UnwindEnd,
}

/// Waits for the file that most samples wait for; not at all if there is something to do when `idle`.
fn next(shared: &Shared, idle: bool) -> Work {
    let mut queue = shared.lock();
    loop {
        if queue.closed {
            return Work::UnwindEnd;
        }
        let most = queue.files.iter().max_by_key(|(_, (samples, _))| *samples).map(|(id, _)| *id);
        if let Some((_, file)) = most.and_then(|id| queue.files.remove(&id)) {
            return Work::Make(file);
        }
        if idle {
            return Work::Idle;
        }
        queue = shared.something.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
}

/// What the thread has at hand.
struct Maker {
    limits: TableLimits,
    overrides: Overrides,
    debug_directories: Vec<PathBuf>,
    shelf: Option<Shelf>,
    /// Tables that somebody uses: a library that many containers bring is one table.
    shared: HashMap<ContentId, Weak<UnwindTable>>,
    /// Tables that are to be kept on disk as soon as nothing else is to be done: that takes longer than making them.
    unkept: VecDeque<(Arc<UnwindTable>, ContentId, Segments, Option<BuildId>)>,
}

impl Maker {
    fn new(sources: TableSources) -> Self {
        let limits = TableLimits::default();
        let shelf = sources.kept.as_deref().and_then(|directory| match Shelf::open(directory) {
            Ok(shelf) => Some(shelf),
            Err(error) => {
                let directory = directory.display();
                tracing::warn!("unwind tables are not kept across restarts: {directory}: {error}");
                None
            }
        });
        let mut overrides = Overrides::default();
        if let Some(directory) = &sources.overrides {
            read_overrides(directory, &limits, &mut overrides);
        }
        Self {
            limits,
            overrides,
            debug_directories: sources.debug_directories,
            shelf,
            shared: HashMap::new(),
            unkept: VecDeque::new(),
        }
    }

    fn make(&mut self, file: &MappedFile, open: &File) -> Result<Made, BuildError> {
        let (content, segments) = identify(open, &file.path, &self.limits)?;
        if let Some(table) = self.shared.get(&content).and_then(Weak::upgrade) {
            return Ok(Made { content, segments, table });
        }
        let overridden = self.overrides.get(&content).is_some();
        let kept = self.shelf.as_ref().filter(|_| !overridden).and_then(|shelf| shelf.take(&content));
        let made = if let Some(kept) = kept {
            Made { content, segments: kept.segments, table: Arc::new(kept.table) }
        } else {
            let apart = Apart { file, open, directories: &self.debug_directories };
            let options = BuildOptions {
                debug_files: Some(&apart),
                overrides: Some(&self.overrides),
                runs: true,
                ..BuildOptions::new(&file.path, &self.limits)
            };
            let BuiltTable { table, content, build_id, segments, report: _ } = build_file(open, &options)?;
            let table = Arc::new(table);
            if self.shelf.is_some() && !overridden && Shelf::wants(&table) && self.unkept.len() < UNKEPT {
                self.unkept.push_back((Arc::clone(&table), content, segments.clone(), build_id));
            }
            Made { content, segments, table }
        };
        if self.shared.len() >= QUEUE {
            self.shared.retain(|_, table| table.strong_count() > 0);
        }
        self.shared.insert(made.content, Arc::downgrade(&made.table));
        Ok(made)
    }

    fn keep_one(&mut self) {
        if let (Some(shelf), Some((table, content, segments, build_id))) =
            (&mut self.shelf, self.unkept.pop_front())
        {
            shelf.put(&content, &table, &segments, build_id.as_ref());
        }
    }
}

/// Finds the debug file of one program.
#[derive(Debug)]
struct Apart<'a> {
    file: &'a MappedFile,
    open: &'a File,
    directories: &'a [PathBuf],
}

impl DebugFiles for Apart<'_> {
    fn open(&self, _: Option<&BuildId>, _: Option<&DebugLink>) -> Option<File> {
        find_debug_file(self.file, self.open, self.directories)?.file
    }
}

/// Reads all texts of a directory. One that is wrong is said, and the others count.
fn read_overrides(directory: &std::path::Path, limits: &TableLimits, overrides: &mut Overrides) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_none_or(|ending| ending != "unwind") {
            continue;
        }
        let read = fs::read_to_string(&path).map_err(|error| error.to_string());
        match read.and_then(|text| overrides.insert_text(&text, limits).map_err(|error| error.to_string())) {
            Ok(content) => tracing::info!("{}: the table of {content} is taken from here", path.display()),
            Err(error) => tracing::warn!("{}: {error}; the file's own table is used", path.display()),
        }
    }
}

/// The table of the kernel's own shared object, which is the same in all 64-bit processes.
pub(super) fn vdso() -> Option<BuiltTable> {
    let text = fs::read_to_string("/proc/self/maps").ok()?;
    let line = text.lines().find(|line| line.ends_with("[vdso]"))?;
    let (start, end) = line.split_ascii_whitespace().next()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let mut bytes = vec![0; usize::try_from(end - start).ok()?];
    let memory = File::open("/proc/self/mem").ok()?;
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut bytes, start).ok()?;
    let limits = TableLimits::default();
    build_bytes(&bytes, &BuildOptions { runs: true, ..BuildOptions::new("[vdso]", &limits) }).ok()
}
