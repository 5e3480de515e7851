//! The language runtimes of processes that rules compare by them: which of the files that a process maps is an interpreter.
//!
//! A process waits here while all other properties of such a rule match. A thread reads the symbols of each file that it maps,
//! once for all processes. The thread starts with the first such process: a node without such rules has none.

use std::{
    collections::{HashMap, HashSet},
    io, mem,
    sync::{Arc, mpsc},
    thread,
};

use super::wake_up::WakeUp;
use crate::{
    access::{self, Unanswered},
    model::{FileId, Image, ImageKey, MappedFile, MappingKind},
    process::{Process, ProcessTable},
    runtimes::{self, RuntimeFile},
};

/// Files that wait to be read. The next event of a process asks again for its others.
const MAX_QUEUED: usize = 4096;
/// Files that are remembered; beyond, all are read again.
const MAX_KNOWN: usize = 16_384;

/// The interpreter that a file is, if it is one.
type Found = Option<Arc<RuntimeFile>>;

/// A process whose interpreter was found.
#[derive(Debug)]
pub(super) struct FoundRuntime {
    pub(super) key: ImageKey,
    pub(super) runtime: Arc<RuntimeFile>,
    /// The rules that wait for it: all their other properties match.
    pub(super) candidates: u64,
}

pub(super) struct RuntimeFiles {
    files: HashMap<FileId, FileState>,
    /// By thread group id: images without a known interpreter, with the rules that compare it.
    waiting: HashMap<u32, (ImageKey, u64)>,
    found: Vec<(ImageKey, Arc<RuntimeFile>)>,
    thread: Option<DetectorThread>,
    wake_up: WakeUp,
}

enum FileState {
    /// The thread will read it, for these images.
    Requested(HashSet<ImageKey>),
    Read(Found),
}

struct DetectorThread {
    requests: mpsc::SyncSender<Arc<MappedFile>>,
    answers: mpsc::Receiver<(FileId, Result<Found, Unanswered>)>,
}

impl RuntimeFiles {
    pub(super) fn new(wake_up: WakeUp) -> Self {
        Self { files: HashMap::new(), waiting: HashMap::new(), found: Vec::new(), thread: None, wake_up }
    }

    /// Returns the interpreter of a process, if it is known. If not, the process waits for it, with these rules.
    pub(super) fn find(&mut self, process: &Process, candidates: u64) -> Found {
        let key = process.key;
        let found = self.search(key, &process.image);
        if found.is_some() {
            self.waiting.remove(&key.process.tgid);
        } else {
            self.waiting.insert(key.process.tgid, (key, candidates));
        }
        found
    }

    /// The mappings of these images have changed.
    pub(super) fn changed<'a>(
        &mut self,
        keys: impl IntoIterator<Item = &'a ImageKey>,
        processes: &ProcessTable,
    ) {
        if self.waiting.is_empty() {
            return;
        }
        for key in keys {
            let is_waiting = self.waiting.get(&key.process.tgid).is_some_and(|(of, _)| of == key);
            if is_waiting
                && let Some(process) = processes.get(key)
                && let Some(runtime) = self.search(*key, &process.image)
            {
                self.found.push((*key, runtime));
            }
        }
    }

    /// Takes the waiting processes whose interpreter was found since the last call.
    pub(super) fn take_found(&mut self) -> Vec<FoundRuntime> {
        self.collect();
        let mut taken = Vec::new();
        for (key, runtime) in mem::take(&mut self.found) {
            if let Some((of, candidates)) = self.waiting.get(&key.process.tgid).copied()
                && of == key
            {
                self.waiting.remove(&key.process.tgid);
                taken.push(FoundRuntime { key, runtime, candidates });
            }
        }
        taken
    }

    /// A process has ended, or no rule compares its runtime any more.
    pub(super) fn forget(&mut self, tgid: u32) {
        self.waiting.remove(&tgid);
    }

    /// The rules have changed: the kernel reports again which processes wait.
    pub(super) fn clear_waiting(&mut self) {
        self.waiting.clear();
    }

    /// Searches the files of an image. Requests those that were not read yet.
    fn search(&mut self, key: ImageKey, image: &Image) -> Found {
        for mapping in &image.mappings {
            let MappingKind::File(file) = &mapping.kind else { continue };
            if file.file.is_none() || !file.is_elf() {
                continue;
            }
            match self.files.get_mut(&file.id) {
                Some(FileState::Read(Some(runtime))) => return Some(Arc::clone(runtime)),
                Some(FileState::Read(None)) => {}
                Some(FileState::Requested(images)) => {
                    images.insert(key);
                }
                None => self.request(file, key),
            }
        }
        None
    }

    fn request(&mut self, file: &Arc<MappedFile>, key: ImageKey) {
        if self.thread.is_none() {
            match DetectorThread::start(self.wake_up.clone()) {
                Ok(thread) => self.thread = Some(thread),
                Err(error) => {
                    tracing::error!("cannot start the thread that finds language runtimes: {error}");
                    return;
                }
            }
        }
        if self.files.len() >= MAX_KNOWN {
            self.files.retain(|_, state| matches!(state, FileState::Requested(_)));
        }
        let is_queued =
            self.thread.as_ref().is_some_and(|thread| thread.requests.try_send(Arc::clone(file)).is_ok());
        if is_queued {
            self.files.insert(file.id, FileState::Requested([key].into()));
        }
    }

    fn collect(&mut self) {
        let Some(thread) = &self.thread else { return };
        while let Ok((file, read)) = thread.answers.try_recv() {
            let Some(FileState::Requested(images)) = self.files.remove(&file) else { continue };
            // Of a file that does not answer nothing is known: the next event of a process asks again.
            let Ok(found) = read else { continue };
            if let Some(runtime) = &found {
                self.found.extend(images.into_iter().map(|key| (key, Arc::clone(runtime))));
            }
            self.files.insert(file, FileState::Read(found));
        }
    }
}

impl DetectorThread {
    fn start(wake_up: WakeUp) -> io::Result<Self> {
        let (requests, inbox) = mpsc::sync_channel::<Arc<MappedFile>>(MAX_QUEUED);
        // Behind a full channel the thread waits for the engine.
        let (sender, answers) = mpsc::sync_channel(MAX_QUEUED);
        let work = move || {
            while let Ok(file) = inbox.recv() {
                let read = detect(&file);
                if sender.send((file.id, read)).is_err() {
                    return;
                }
                wake_up.wake();
            }
        };
        thread::Builder::new().name("gannet-detect".into()).spawn(work)?;
        Ok(Self { requests, answers })
    }
}

/// Reads the symbols of a file. One that cannot be opened or understood is no interpreter.
fn detect(file: &Arc<MappedFile>) -> Result<Found, Unanswered> {
    let path = file.path.clone();
    let read = access::read_file(file, move |open| runtimes::detect_in(open, &path))?;
    Ok(read.ok().flatten().map(Arc::new))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        path::PathBuf,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::model::{Mapping, ProcessKey, Subject};

    const PYTHON: &str = "/usr/bin/python3";

    fn image(paths: &[&str]) -> Arc<Image> {
        let mapping = |(number, path): (usize, &&str)| {
            let path = std::fs::canonicalize(path).unwrap_or_else(|_| PathBuf::from(path));
            let file = File::open(&path).unwrap();
            let file = MappedFile::opened(path.to_str().unwrap(), 1, number as u64, file);
            let start = 0x1000 * (number as u64 + 1);
            Mapping { start, end: start + 0x1000, offset: 0, kind: MappingKind::File(Arc::new(file)) }
        };
        Arc::new(Image { mappings: paths.iter().enumerate().map(mapping).collect() })
    }

    fn process(tgid: u32, image: &Arc<Image>) -> Process {
        let subject = Subject {
            key: ProcessKey { tgid, start_boottime_ns: 1 },
            exec_id: 1,
            ktime_ns: 1,
            cgroup_id: 1,
            comm: "p".into(),
            rules: 0,
            candidates: 0b110,
        };
        let mut process = Process::unread(&subject, 0);
        process.image = Arc::clone(image);
        process
    }

    fn found_within(files: &mut RuntimeFiles, time: Duration) -> Vec<FoundRuntime> {
        let end = Instant::now() + time;
        loop {
            let found = files.take_found();
            if !found.is_empty() || Instant::now() > end {
                return found;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The interpreter itself, or the library that has it.
    fn python_files() -> Vec<String> {
        let script = "import sys\nprint('\\n'.join({line.split()[-1] for line in open('/proc/self/maps') if 'python' in \
                      line and 'r-xp' in line}))";
        let output = std::process::Command::new(PYTHON).args(["-c", script]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn processes_wait_until_their_interpreter_is_found() {
        let mut files = RuntimeFiles::new(WakeUp::new().unwrap());
        let paths = python_files();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let (python, native) = (image(&paths), image(&["/proc/self/exe"]));
        assert!(files.find(&process(1, &python), 0b110).is_none());
        assert!(files.find(&process(2, &python), 0b010).is_none());
        assert!(files.find(&process(3, &native), 0b100).is_none());
        let mut found = Vec::new();
        while found.len() < 2 {
            let more = found_within(&mut files, Duration::from_secs(20));
            assert!(!more.is_empty(), "{found:?}");
            found.extend(more);
        }
        found.sort_by_key(|found| found.key.process.tgid);
        let seen: Vec<_> = found
            .iter()
            .map(|found| (found.key.process.tgid, found.candidates, found.runtime.names().0))
            .collect();
        assert_eq!(seen, [(1, 0b110, "python"), (2, 0b010, "python")]);
        assert!(found[0].runtime.names().1.starts_with("3."));
        // The file is known now.
        assert!(files.find(&process(4, &python), 0b110).is_some());
        assert_eq!(files.waiting.len(), 1, "only the native program waits on");
    }

    #[test]
    fn a_process_that_does_not_wait_is_not_reported() {
        let paths = python_files();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let python = image(&paths);
        let leaves: [fn(&mut RuntimeFiles); 2] = [|files| files.forget(1), RuntimeFiles::clear_waiting];
        for leave in leaves {
            let mut files = RuntimeFiles::new(WakeUp::new().unwrap());
            assert!(files.find(&process(1, &python), 1).is_none());
            leave(&mut files);
            let end = Instant::now() + Duration::from_secs(20);
            while files.files.values().any(|state| matches!(state, FileState::Requested(_))) {
                assert!(files.take_found().is_empty());
                assert!(Instant::now() < end, "the files are read");
            }
            assert!(files.take_found().is_empty() && !files.files.is_empty());
        }
    }
}
