//! Makes tables of files, on a thread of its own: what most samples wait for first.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
};

use gannet_unwind::{
    build::{BuildError, Built, Options, build_bytes, build_file},
    limits::Limits,
};

use crate::symbols::{FileId, MappedFile};

/// Files that wait at one time; more are asked for again by their samples.
const QUEUE: usize = 4096;

/// What came of a file.
pub(super) type Outcome = (FileId, Result<Built, BuildError>);

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
    files: HashMap<FileId, (u64, Arc<MappedFile>)>,
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Parser {
    /// Starts the thread. `ring` is called whenever there is an outcome.
    pub(super) fn start(ring: impl Fn() + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (sender, outcomes) = mpsc::channel();
        let inbox = Arc::clone(&shared);
        thread::Builder::new().name("gannet-tables".into()).spawn(move || {
            while let Some(file) = next(&inbox) {
                let limits = Limits::default();
                let built = match &file.file {
                    Some(open) => build_file(open, &Options::new(&file.path, &limits)),
                    None => continue,
                };
                if sender.send((file.id, built)).is_err() {
                    return;
                }
                ring();
            }
        })?;
        Ok(Self { shared, outcomes })
    }

    /// Asks for a file's table, or asks more urgently. False: the queue is full.
    pub(super) fn request(&self, file: &Arc<MappedFile>) -> bool {
        let mut queue = self.shared.lock();
        if queue.files.len() >= QUEUE && !queue.files.contains_key(&file.id) {
            return false;
        }
        queue.files.entry(file.id).or_insert_with(|| (0, Arc::clone(file))).0 += 1;
        self.shared.something.notify_one();
        true
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

/// Waits for the file that was asked for most.
fn next(shared: &Shared) -> Option<Arc<MappedFile>> {
    let mut queue = shared.lock();
    loop {
        if queue.closed {
            return None;
        }
        let most = queue.files.iter().max_by_key(|(_, (asked, _))| *asked).map(|(id, _)| *id);
        if let Some((_, file)) = most.and_then(|id| queue.files.remove(&id)) {
            return Some(file);
        }
        queue = shared.something.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
}

/// The table of the kernel's own shared object, which is the same in all 64-bit processes.
pub(super) fn vdso() -> Option<Built> {
    let text = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = text.lines().find(|line| line.ends_with("[vdso]"))?;
    let (start, end) = line.split_ascii_whitespace().next()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let mut bytes = vec![0; usize::try_from(end - start).ok()?];
    let memory = std::fs::File::open("/proc/self/mem").ok()?;
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut bytes, start).ok()?;
    build_bytes(&bytes, &Options::new("[vdso]", &Limits::default())).ok()
}
