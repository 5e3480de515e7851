//! Processes of interpreters: where each keeps its frames, and the names of its functions.
//!
//! A thread of its own attaches to a process once its mappings are in the kernel, and has the texts of each sampled function
//! read. Reading memory may wait for a disk, and a process can make it wait without end. So workers make these reads, with a
//! deadline. They are no others' workers: processes that hold all of them up cost the names of functions, and nothing else.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use crate::{
    access::{Access, Target},
    kernel::Kernel,
    model::{FunctionCopy, ImageKey, ListLayout, Sample, StackWord},
    process::{Process, ProcessTable, check_identity},
    runtimes::{Interpreter, ListFunction, Memory, ProcessMemory, RuntimeFile, WhyNot},
};

/// Requests that wait at one time; more functions stay without a name.
const MAX_REQUESTS: usize = 8192;
/// Copies of texts that wait at one time, of 1 KiB each.
const MAX_COPIES: usize = 8192;
/// How long a process that has not started its interpreter is left alone at first; each time longer, up to the last.
const FIRST_RETRY: Duration = Duration::from_millis(20);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// The number of attempts after which a process stays as it is.
const MAX_ATTEMPTS: u32 = 20;
/// Processes that may hold up a read before the agent reads no further one.
const MAX_READERS: usize = 8;
/// How long the thread waits for the texts of a few functions. A page comes back from a slow disk in less time.
const READ_DEADLINE: Duration = Duration::from_millis(500);

pub(super) struct Interpreters {
    requests: mpsc::SyncSender<Request>,
    answers: mpsc::Receiver<Attached>,
    processes: HashMap<ImageKey, State>,
    /// Copies of texts from processes whose interpreter is not known yet, and their number.
    copies: HashMap<ImageKey, Vec<FunctionCopy>>,
    waiting_copies: usize,
}

enum State {
    /// The thread attaches to it.
    Requested(u32),
    /// It was too early.
    Waiting { attempts: u32, until: Instant, file: Arc<RuntimeFile>, bias: u64, reason: WhyNot },
    /// Its frames are taken.
    Attached(Arc<RuntimeFile>),
    /// Its frames cannot be taken.
    Refused(Arc<RuntimeFile>, WhyNot),
}

enum Request {
    Attach { key: ImageKey, file: Arc<RuntimeFile>, bias: u64 },
    Name { key: ImageKey, interpreter: Arc<Interpreter>, functions: Vec<Arc<ListFunction>> },
}

struct Attached {
    key: ImageKey,
    file: Arc<RuntimeFile>,
    bias: u64,
    layout: Result<ListLayout, WhyNot>,
}

impl Interpreters {
    /// Starts the thread, which calls `wake` after each process.
    pub(super) fn start(wake: impl Fn() + Send + 'static) -> io::Result<Self> {
        let (requests, inbox) = mpsc::sync_channel(MAX_REQUESTS);
        // Behind a full channel the thread waits for the engine.
        let (sender, answers) = mpsc::sync_channel(MAX_REQUESTS);
        let read = move || {
            let readers = Access::new(MAX_READERS);
            while let Ok(request) = inbox.recv() {
                if let Some(attached) = read(&readers, request)
                    && sender.send(attached).is_ok()
                {
                    wake();
                }
            }
        };
        thread::Builder::new().name("gannet-runtimes".into()).spawn(read)?;
        Ok(Self { requests, answers, processes: HashMap::new(), copies: HashMap::new(), waiting_copies: 0 })
    }

    /// The mappings of an image are in the kernel, and one of them is of an interpreter.
    pub(super) fn found(&mut self, key: ImageKey, file: Arc<RuntimeFile>, bias: u64) {
        if !self.processes.contains_key(&key) {
            self.request(key, file, bias, 1);
        }
    }

    fn request(&mut self, key: ImageKey, file: Arc<RuntimeFile>, bias: u64, attempts: u32) {
        if self.requests.try_send(Request::Attach { key, file, bias }).is_ok() {
            self.processes.insert(key, State::Requested(attempts));
        } else {
            // The next samples try again.
            self.processes.remove(&key);
        }
    }

    /// Takes what the thread has found, and gives it to the kernel.
    pub(super) fn collect(&mut self, kernel: &mut Kernel, processes: &mut ProcessTable) {
        while let Ok(Attached { key, file, bias, layout }) = self.answers.try_recv() {
            let Some(State::Requested(attempts)) = self.processes.get(&key) else { continue };
            let attempts = *attempts;
            if !processes.get(&key).is_some_and(Process::is_alive) {
                self.processes.remove(&key);
                continue;
            }
            let state = match layout {
                Ok(layout) => {
                    self.set_interpreter(&key, &file, bias, processes);
                    if let Err(error) = kernel.set_list_frames(key, &layout) {
                        tracing::debug!(key = %key.process, "cannot take the frames of an interpreter: {error}");
                    }
                    State::Attached(file)
                }
                // Threads begin and end while their states are read.
                Err(reason) if reason.may_pass() && attempts < MAX_ATTEMPTS => {
                    let pause = FIRST_RETRY.saturating_mul(1 << attempts.min(16)).min(LAST_RETRY);
                    State::Waiting { attempts, until: Instant::now() + pause, file, bias, reason }
                }
                Err(reason) => {
                    let (name, version) = (file.runtime.name(), &file.detected.version_text);
                    tracing::debug!(key = %key.process, "{name} {version}: no names of functions: {reason}");
                    State::Refused(file, reason)
                }
            };
            self.processes.insert(key, state);
        }
        let now = Instant::now();
        let due: Vec<_> = self
            .processes
            .iter()
            .filter_map(|(key, state)| match state {
                State::Waiting { attempts, until, file, bias, .. } if *until <= now => {
                    Some((*key, Arc::clone(file), *bias, attempts + 1))
                }
                _ => None,
            })
            .collect();
        for (key, file, bias, attempts) in due {
            self.request(key, file, bias, attempts);
        }
    }

    /// Returns the interpreter of an image; sets it to that of this file, if it has none.
    fn set_interpreter(
        &mut self,
        key: &ImageKey,
        file: &Arc<RuntimeFile>,
        bias: u64,
        processes: &mut ProcessTable,
    ) -> Option<Arc<Interpreter>> {
        if let Some(interpreter) = &processes.get(key)?.interpreter {
            return Some(Arc::clone(interpreter));
        }
        let interpreter = Arc::new(Interpreter::new(Arc::clone(file), bias));
        for copy in self.copies.remove(key).unwrap_or_default() {
            interpreter.read_copy(&copy);
            self.waiting_copies -= 1;
        }
        processes.set_interpreter(key, Arc::clone(&interpreter)).then_some(interpreter)
    }

    /// Takes copies of the texts of a function, of a process whose samples may come later.
    pub(super) fn add_copy(&mut self, key: ImageKey, copy: FunctionCopy, processes: &ProcessTable) {
        if let Some(interpreter) = processes.get(&key).and_then(|process| process.interpreter.as_ref()) {
            interpreter.read_copy(&copy);
        } else if self.waiting_copies < MAX_COPIES {
            self.waiting_copies += 1;
            self.copies.entry(key).or_default().push(copy);
        }
    }

    /// Enters the functions of a sample's list frames, and has those read that are new. `found` is the interpreter of its image,
    /// and the bias of that.
    pub(super) fn enter(
        &mut self,
        sample: &mut Sample,
        processes: &mut ProcessTable,
        found: Option<(&Arc<RuntimeFile>, u64)>,
    ) {
        let key = ImageKey::of(&sample.subject);
        // Frames that were taken by the layout of another interpreter are no use.
        let found = found.filter(|(file, _)| file.detected.layout == sample.list_layout);
        let interpreter = found.and_then(|(file, bias)| self.set_interpreter(&key, file, bias, processes));
        let Some(interpreter) = interpreter else {
            sample.user.retain(|word| StackWord::is_address(*word));
            return;
        };
        let functions = interpreter.enter(&mut sample.user);
        if !functions.is_empty() && processes.get(&key).is_some_and(Process::is_alive) {
            // If too many wait, these have no name.
            let _ = self.requests.try_send(Request::Name { key, interpreter, functions });
        }
    }

    /// Forgets images that the process table does not know any more.
    pub(super) fn next_window(&mut self, processes: &ProcessTable) {
        self.processes.retain(|key, _| processes.get(key).is_some());
        self.copies.retain(|key, _| processes.get(key).is_some());
        self.waiting_copies = self.copies.values().map(Vec::len).sum();
    }

    /// Returns the interpreter of an image, and whether its frames are taken or why not; human-readable. Empty without an
    /// interpreter.
    pub(super) fn status(&self, key: &ImageKey) -> String {
        let of = |file: &RuntimeFile, status: &str| {
            format!("{} {}: {status}", file.runtime.name(), file.detected.version_text)
        };
        match self.processes.get(key) {
            Some(State::Attached(file)) => of(file, "ok"),
            Some(State::Refused(file, reason) | State::Waiting { file, reason, .. }) => {
                of(file, &reason.to_string())
            }
            Some(State::Requested(_)) | None => String::new(),
        }
    }
}

/// Makes the reads of one request. Returns the answer to an attach.
fn read(readers: &Access, request: Request) -> Option<Attached> {
    match request {
        Request::Attach { key, file, bias } => {
            let theirs = Arc::clone(&file);
            let attach = move || {
                let memory = ProcessMemory { tgid: key.process.tgid };
                let layout = theirs.runtime.attach(&theirs, bias, &memory);
                // The PID may belong to another process by now.
                if check_identity(key.process).is_ok() { layout } else { Err(WhyNot::Unreadable) }
            };
            let layout = on_reader(readers, key, attach).unwrap_or(Err(WhyNot::Unanswered));
            Some(Attached { key, file, bias, layout })
        }
        Request::Name { key, interpreter, functions } => {
            // Without an answer in time the names may still come; samples until then have none.
            let _ = on_reader(readers, key, move || read_texts(key, &interpreter, &functions));
            None
        }
    }
}

fn on_reader<T: Send + 'static>(
    readers: &Access,
    key: ImageKey,
    call: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let target = Target::Process(key.process.tgid);
    readers.run(target, "reading the memory of its interpreter", READ_DEADLINE, call).ok()
}

fn read_texts(key: ImageKey, interpreter: &Interpreter, functions: &[Arc<ListFunction>]) {
    let memory: &dyn Memory = &ProcessMemory { tgid: key.process.tgid };
    let Interpreter { file, bias, .. } = interpreter;
    let texts: Vec<_> = functions
        .iter()
        .map(|function| file.runtime.read_function(file, *bias, function.object, function.sum, memory))
        .collect();
    // The PID may belong to another process by now.
    let is_same = check_identity(key.process).is_ok();
    for (function, text) in functions.iter().zip(texts) {
        interpreter.set_text(function, if is_same { text } else { Err(WhyNot::Unreadable) });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use gannet_elf::Elf;

    use super::*;
    use crate::{
        model::ProcessKey,
        runtimes::{Detected, FunctionText, Runtime},
    };

    /// A runtime whose processes with bias 0 never answer.
    #[derive(Debug)]
    struct Half;

    static RELEASE: OnceLock<()> = OnceLock::new();

    impl Runtime for Half {
        fn name(&self) -> &'static str {
            "half"
        }

        fn mapping(&self) -> &'static str {
            "[half]"
        }

        fn detect(&self, _: &Elf<'_>, _: &str) -> Option<Detected> {
            None
        }

        fn attach(&self, _: &RuntimeFile, bias: u64, _: &dyn Memory) -> Result<ListLayout, WhyNot> {
            if bias == 0 {
                RELEASE.wait();
            }
            Err(WhyNot::Version)
        }

        fn read_function(
            &self,
            _: &RuntimeFile,
            _: u64,
            _: u64,
            _: u32,
            _: &dyn Memory,
        ) -> Result<FunctionText, WhyNot> {
            Err(WhyNot::Unreadable)
        }

        fn line(&self, _: &RuntimeFile, _: &FunctionText, _: u32) -> u32 {
            0
        }
    }

    #[test]
    fn processes_that_do_not_answer_hold_up_no_other() {
        let detected =
            Detected { version: (1, 0), version_text: "1.0".into(), addresses: Vec::new(), layout: 0 };
        let file = Arc::new(RuntimeFile { runtime: &Half, detected });
        let mut interpreters = Interpreters::start(|| ()).unwrap();
        let key = |tgid| ImageKey { process: ProcessKey { tgid, start_boottime_ns: 1 }, exec_id: 1 };
        let answer = |interpreters: &Interpreters| {
            let attached = interpreters.answers.recv_timeout(Duration::from_secs(20)).unwrap();
            (attached.key.process.tgid, attached.layout)
        };
        // No process has these numbers. The first one holds up its reader, and the second one's is checked.
        let (hung, gone) = (u32::MAX - 1, u32::MAX);
        interpreters.found(key(hung), Arc::clone(&file), 0);
        interpreters.found(key(gone), Arc::clone(&file), 1);
        assert_eq!(answer(&interpreters), (hung, Err(WhyNot::Unanswered)));
        assert_eq!(answer(&interpreters), (gone, Err(WhyNot::Unreadable)));
        RELEASE.set(()).unwrap();
    }
}
