//! Processes of interpreters: where each keeps its frames, and the names of its functions.
//!
//! A thread of its own attaches to a process once its mappings are in the kernel, and has the texts of each sampled function
//! read. Reading memory may wait for a disk, and a process can make it wait without end. So workers make these reads, with a
//! deadline. They are no others' workers: processes that hold all of them up cost the names of functions, and nothing else.
//!
//! The thread keeps within a share of one core. Beyond it, requests wait. A runtime whose module fails for a process, or takes
//! too much CPU time for it, is switched off for that process.

use std::{
    collections::{BTreeMap, HashMap},
    io, mem,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    access::{Access, Target},
    kernel::Kernel,
    model::{FunctionCopy, ImageKey, Sample, StackWord},
    process::{CodeList, Process, ProcessTable, check_identity},
    runtimes::{
        Attachment, CodeNeeds, CutLimit, GeneratedCode, Guard, Interpreter, ListFunction, Memory,
        ProcessMemory, RuntimeFile, WhyNot, count_without_process, read_cpu_time,
    },
};

/// Requests that wait at one time; more functions stay without a name.
const MAX_REQUESTS: usize = 8192;
/// Copies of texts that wait at one time, of 1 KiB each.
const MAX_COPIES: usize = 8192;
/// How long a process that has not started its interpreter is left alone at first; each time longer, up to the last.
const FIRST_RETRY: Duration = Duration::from_millis(20);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// The same for a process that may list its code and does not. .NET may begin to while it runs.
const LAST_SEARCH: Duration = Duration::from_secs(60);
/// The number of attempts after which a process stays as it is.
const MAX_ATTEMPTS: u32 = 20;
/// The number of attempts that samples wait for: some 150 ms, in which a virtual machine starts.
const AWAITED_ATTEMPTS: u32 = 4;
/// Processes that may hold up a read before the agent reads no further one.
const MAX_READERS: usize = 8;
/// How long the thread waits for the texts of a few functions. A page comes back from a slow disk in less time.
const READ_DEADLINE: Duration = Duration::from_millis(500);
/// CPU time that reading from all processes may take at once. Beyond, it may take one part in [`BUDGET_PARTS`] of a core.
const READ_BURST: Duration = Duration::from_millis(500);
const BUDGET_PARTS: u32 = 10;
/// How long the thread sleeps at most before it checks the budget again.
const MAX_PAUSE: Duration = Duration::from_millis(100);
/// Combinations of runtime, version and status in the statistics. A target can claim any version; more are `other`.
const MAX_KINDS: usize = 64;

pub(super) struct Interpreters {
    requests: mpsc::SyncSender<Request>,
    answers: mpsc::Receiver<Answer>,
    /// Requests that waited for the budget. The thread ends when this owner is gone.
    delayed: Arc<AtomicU64>,
    /// Functions that have no name because too many requests waited.
    unread: u64,
    /// Processes for which a module was switched off.
    switched_off: u64,
    /// Processes whose module was switched off while the engine read copies.
    failed: Vec<(ImageKey, WhyNot)>,
    processes: HashMap<ImageKey, State>,
    /// Copies of texts from processes whose interpreter is not known yet, and their number.
    copies: HashMap<ImageKey, Vec<FunctionCopy>>,
    waiting_copies: usize,
    /// Images whose code cannot be read any more, since the last [`Interpreters::collect`].
    given_up: Vec<ImageKey>,
}

enum State {
    /// The thread attaches to it.
    Requested(u32),
    /// It was too early.
    Waiting { attempts: u32, until: Instant, file: Arc<RuntimeFile>, bias: u64, reason: WhyNot },
    /// Its frames are taken, or it lists the names of its code.
    Attached(Arc<RuntimeFile>, Option<CodeList>),
    /// Its frames cannot be taken.
    Refused(Arc<RuntimeFile>, WhyNot),
}

enum Request {
    Attach { key: ImageKey, file: Arc<RuntimeFile>, bias: u64 },
    Name { key: ImageKey, interpreter: Arc<Interpreter>, functions: Vec<Arc<ListFunction>> },
    Code { key: ImageKey, interpreter: Arc<Interpreter>, needs: CodeNeeds },
}

/// The outcome of a request, for which the engine is woken.
enum Answer {
    Attached(Attached),
    /// Code was read. Samples wait for it, and find it themselves.
    Code,
    /// The module is switched off for this process.
    SwitchedOff(ImageKey, WhyNot),
}

struct Attached {
    key: ImageKey,
    file: Arc<RuntimeFile>,
    bias: u64,
    found: Result<Attachment, WhyNot>,
    /// The list with the names of its code, if [`Attachment::Listed`] was found and there is one.
    list: Option<CodeList>,
}

/// Counts of the interpreters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct InterpreterStats {
    /// Live processes by runtime, version (major and minor number) and status: `ok`, or the kind of the reason.
    pub(crate) processes: BTreeMap<(&'static str, String, &'static str), u64>,
    /// Processes for which a module was switched off, since the start.
    pub(crate) switched_off: u64,
    /// Requests that waited for the CPU budget.
    pub(crate) delayed: u64,
    /// Functions that have no name because too many requests waited.
    pub(crate) unread: u64,
    /// Frames of generated code that have no name because the code may have changed since the sample.
    pub(crate) unproven: u64,
}

/// The CPU time that reading from processes may take.
pub(super) struct ReadBudget {
    left_ns: i64,
    refilled: Instant,
    /// CPU time of all reads at the last check.
    spent: Duration,
}

impl ReadBudget {
    pub(super) fn new(now: Instant, spent: Duration) -> Self {
        Self { left_ns: nanoseconds(READ_BURST), refilled: now, spent }
    }

    /// Returns how long the next read must wait, with the CPU time of all reads so far. `None`: it may begin.
    pub(super) fn pause(&mut self, now: Instant, spent: Duration) -> Option<Duration> {
        let more = nanoseconds(now.saturating_duration_since(self.refilled) / BUDGET_PARTS);
        self.left_ns = self.left_ns.saturating_add(more).min(nanoseconds(READ_BURST));
        self.left_ns = self.left_ns.saturating_sub(nanoseconds(spent.saturating_sub(self.spent)));
        (self.refilled, self.spent) = (now, spent);
        let lack = u64::try_from(self.left_ns.saturating_neg()).ok()?;
        Some(Duration::from_nanos(lack + 1).saturating_mul(BUDGET_PARTS).min(MAX_PAUSE))
    }
}

fn nanoseconds(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

impl Interpreters {
    /// Starts the thread, which calls `wake` after each process.
    pub(super) fn start(wake: impl Fn() + Send + 'static) -> io::Result<Self> {
        let (requests, inbox) = mpsc::sync_channel(MAX_REQUESTS);
        // Behind a full channel the thread waits for the engine.
        let (sender, answers) = mpsc::sync_channel(MAX_REQUESTS);
        let delayed = Arc::new(AtomicU64::new(0));
        let owner = Arc::downgrade(&delayed);
        let read = move || {
            let readers = Access::new(MAX_READERS);
            let mut budget = ReadBudget::new(Instant::now(), read_cpu_time());
            while let Ok(request) = inbox.recv() {
                let mut has_waited = false;
                while let Some(pause) = budget.pause(Instant::now(), read_cpu_time()) {
                    let Some(delayed) = owner.upgrade() else { return };
                    delayed.fetch_add(u64::from(!has_waited), Ordering::Relaxed);
                    has_waited = true;
                    drop(delayed);
                    thread::sleep(pause);
                }
                if let Some(answer) = read(&readers, request)
                    && sender.send(answer).is_ok()
                {
                    wake();
                }
            }
        };
        thread::Builder::new().name("gannet-runtimes".into()).spawn(read)?;
        Ok(Self {
            requests,
            answers,
            delayed,
            unread: 0,
            switched_off: 0,
            failed: Vec::new(),
            processes: HashMap::new(),
            copies: HashMap::new(),
            waiting_copies: 0,
            given_up: Vec::new(),
        })
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

    /// Takes what the thread has found, and gives it to the kernel. Returns the images whose mappings have to be written again.
    pub(super) fn collect(&mut self, kernel: &mut Kernel, processes: &mut ProcessTable) -> Vec<ImageKey> {
        for (key, reason) in mem::take(&mut self.failed) {
            self.switch_off(key, reason, kernel, processes);
        }
        let mut changed = mem::take(&mut self.given_up);
        while let Ok(answer) = self.answers.try_recv() {
            let Attached { key, file, bias, found, list } = match answer {
                Answer::Attached(attached) => attached,
                Answer::SwitchedOff(key, reason) => {
                    self.switch_off(key, reason, kernel, processes);
                    changed.push(key);
                    continue;
                }
                Answer::Code => continue,
            };
            let Some(State::Requested(attempts)) = self.processes.get(&key) else { continue };
            let attempts = *attempts;
            if !file.runtime.has_frames() {
                // Its file alone says what the process runs, even if it has ended meanwhile.
                self.set_interpreter(&key, &file, bias, processes);
            }
            if !processes.get(&key).is_some_and(Process::is_alive) {
                self.processes.remove(&key);
                continue;
            }
            let state = match found {
                Ok(Attachment::Code(reader)) => {
                    let interpreter =
                        Interpreter::new(Arc::clone(&file), bias).with_code(GeneratedCode::new(reader));
                    processes.set_interpreter(&key, Arc::new(interpreter));
                    State::Attached(file, None)
                }
                Ok(Attachment::Plain) => {
                    self.set_interpreter(&key, &file, bias, processes);
                    State::Attached(file, None)
                }
                Ok(Attachment::Labels(layout)) => {
                    self.set_interpreter(&key, &file, bias, processes);
                    kernel.set_label_source(key, &layout);
                    State::Attached(file, None)
                }
                Ok(Attachment::List(layout)) => {
                    self.set_interpreter(&key, &file, bias, processes);
                    kernel.set_list_frames(key, &layout);
                    State::Attached(file, None)
                }
                Ok(Attachment::Listed(reason)) => {
                    self.set_interpreter(&key, &file, bias, processes);
                    match list {
                        Some(_) => State::Attached(file, list),
                        // It may begin later to list its code.
                        None if reason.may_pass() => {
                            let until = Instant::now() + pause_behind(attempts, LAST_SEARCH);
                            State::Waiting { attempts, until, file, bias, reason }
                        }
                        None => State::Refused(file, reason),
                    }
                }
                // Threads begin and end while their states are read.
                Err(reason) if reason.may_pass() && attempts < MAX_ATTEMPTS => {
                    let until = Instant::now() + pause_behind(attempts, LAST_RETRY);
                    State::Waiting { attempts, until, file, bias, reason }
                }
                Err(reason) => {
                    self.switched_off += u64::from(reason.is_switched_off());
                    let (name, version) = (file.runtime.name(), &file.detected.version_text);
                    tracing::debug!(key = %key.process, "{name} {version}: no names of functions: {reason}");
                    changed.push(key);
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
                    Some((*key, Arc::clone(file), *bias, attempts.saturating_add(1)))
                }
                _ => None,
            })
            .collect();
        for (key, file, bias, attempts) in due {
            self.request(key, file, bias, attempts);
        }
        changed
    }

    /// Reports whether samples should wait for the thread to attach to their process.
    pub(super) fn is_pending(&self, key: &ImageKey) -> bool {
        match self.processes.get(key) {
            Some(State::Requested(attempts) | State::Waiting { attempts, .. }) => {
                *attempts <= AWAITED_ATTEMPTS
            }
            _ => false,
        }
    }

    /// Reports whether the frames of an image cannot be taken.
    pub(super) fn is_refused(&self, key: &ImageKey) -> bool {
        matches!(self.processes.get(key), Some(State::Refused(..)))
    }

    /// Has code of a process read. Returns whether the samples that need it have to wait.
    pub(super) fn read_code(
        &mut self,
        key: ImageKey,
        interpreter: &Arc<Interpreter>,
        needs: CodeNeeds,
    ) -> bool {
        let Some(code) = &interpreter.code else { return false };
        if code.begin() {
            let request = Request::Code { key, interpreter: Arc::clone(interpreter), needs };
            if self.requests.try_send(request).is_err() {
                code.end(false);
                return false;
            }
        }
        if code.is_over()
            && let Some(State::Attached(file, _)) = self.processes.get(&key)
        {
            let file = Arc::clone(file);
            self.processes.insert(key, State::Refused(file, WhyNot::Unanswered));
            self.given_up.push(key);
        }
        !code.is_over()
    }

    /// Takes no more frames of a process for which the module of its runtime has failed.
    fn switch_off(&mut self, key: ImageKey, reason: WhyNot, kernel: &mut Kernel, processes: &ProcessTable) {
        if self.refuse(key, reason, processes) {
            kernel.remove_list_frames(key.process.tgid);
            kernel.remove_label_source(key.process.tgid);
        }
    }

    /// Refuses a process from now on. Returns whether it is alive and was not refused before.
    fn refuse(&mut self, key: ImageKey, reason: WhyNot, processes: &ProcessTable) -> bool {
        let file = match self.processes.get(&key) {
            Some(State::Attached(file, _) | State::Waiting { file, .. }) => Arc::clone(file),
            Some(State::Refused(..)) => return false,
            // Its first copies came before the agent knew its interpreter.
            Some(State::Requested(_)) | None => {
                let process = processes.get(&key);
                let Some(interpreter) = process.and_then(|process| process.interpreter.as_ref()) else {
                    return false;
                };
                Arc::clone(&interpreter.file)
            }
        };
        let (name, version) = file.names();
        tracing::warn!(
            key = %key.process,
            "{name} {version}: the names of this process's functions are not read any more: {reason}"
        );
        self.switched_off += 1;
        self.processes.insert(key, State::Refused(file, reason));
        processes.get(&key).is_some_and(Process::is_alive)
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
        self.failed.extend(interpreter.guard.off().map(|reason| (*key, reason)));
        processes.set_interpreter(key, Arc::clone(&interpreter)).then_some(interpreter)
    }

    /// Takes copies of the texts of a function, of a process whose samples may come later.
    pub(super) fn add_copy(&mut self, key: ImageKey, copy: FunctionCopy, processes: &ProcessTable) {
        if let Some(interpreter) = processes.get(&key).and_then(|process| process.interpreter.as_ref()) {
            interpreter.read_copy(&copy);
            self.failed.extend(interpreter.guard.off().map(|reason| (key, reason)));
        } else if self.waiting_copies < MAX_COPIES {
            self.waiting_copies += 1;
            self.copies.entry(key).or_default().push(copy);
        } else if count_without_process(CutLimit::Copies) {
            tracing::warn!(
                key = %key.process,
                "more than {MAX_COPIES} texts of functions wait until the agent knows the interpreters of their processes: \
                 functions of this process and others that end at once may have no name; start fewer at one time"
            );
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
        let known = processes.get(&key).and_then(|process| process.interpreter.as_ref());
        if sample.list_layout == 0 && known.is_some_and(|interpreter| interpreter.code.is_some()) {
            // The functions of generated code have their numbers from unwinding.
            return;
        }
        // Frames that were taken by the layout of another interpreter are no use.
        let found = found.filter(|(file, _)| file.detected.layout == sample.list_layout);
        let interpreter = found.and_then(|(file, bias)| self.set_interpreter(&key, file, bias, processes));
        let Some(interpreter) = interpreter else {
            sample.user.retain(|word| StackWord::is_address(*word));
            return;
        };
        let functions = interpreter.enter(&mut sample.user);
        log_cuts(key, &interpreter);
        let is_off = interpreter.guard.off().is_some();
        if !functions.is_empty() && !is_off && processes.get(&key).is_some_and(Process::is_alive) {
            let count = functions.len() as u64;
            // If too many wait, these have no name.
            if self.requests.try_send(Request::Name { key, interpreter, functions }).is_err() {
                self.unread += count;
            }
        }
    }

    /// Forgets images that the process table does not know any more.
    pub(super) fn next_window(&mut self, processes: &ProcessTable) {
        self.processes.retain(|key, _| processes.get(key).is_some());
        self.copies.retain(|key, _| processes.get(key).is_some());
        self.waiting_copies = self.copies.values().map(Vec::len).sum();
    }

    /// Returns the counts so far, with `unproven` of the samples that waited.
    pub(super) fn stats(&self, processes: &ProcessTable, unproven: u64) -> InterpreterStats {
        let is_alive = |key: &ImageKey| processes.get(key).is_some_and(Process::is_alive);
        let known = self.processes.iter().filter(|(key, _)| is_alive(key));
        InterpreterStats {
            processes: count_kinds(known.filter_map(|(_, state)| state.kind())),
            switched_off: self.switched_off,
            delayed: self.delayed.load(Ordering::Relaxed),
            unread: self.unread,
            unproven,
        }
    }

    /// Returns the interpreter of an image, whether its frames are taken or why not, and how much the agent left out of them;
    /// human-readable. Empty without an interpreter. `interpreter` is that of the process table.
    pub(super) fn status(&self, key: &ImageKey, interpreter: Option<&Interpreter>) -> String {
        let cuts = interpreter.map_or_else(String::new, |interpreter| interpreter.cuts.text());
        let of = |file: &RuntimeFile, status: &str| {
            let status = if cuts.is_empty() { status.into() } else { format!("{status}; {cuts}") };
            format!("{} {}: {status}", file.runtime.name(), file.detected.version_text)
        };
        match self.processes.get(key) {
            Some(State::Attached(file, None)) => match file.runtime.lack(&file.detected) {
                None => of(file, "ok"),
                Some(lack) => of(file, &format!("ok, but functions {}: {}", lack.what, lack.cure)),
            },
            Some(State::Attached(file, Some(list))) => {
                of(file, &format!("ok, names from its {}", list.name()))
            }
            Some(State::Refused(file, reason) | State::Waiting { file, reason, .. }) => {
                of(file, &reason.to_string())
            }
            Some(State::Requested(_)) | None => String::new(),
        }
    }
}

impl State {
    /// Returns the interpreter, and the kind of its status.
    fn kind(&self) -> Option<(&RuntimeFile, &'static str)> {
        match self {
            Self::Attached(file, _) => Some((file, "ok")),
            Self::Refused(file, reason) | Self::Waiting { file, reason, .. } => Some((file, reason.kind())),
            Self::Requested(_) => None,
        }
    }
}

/// Returns the pause before the next attempt to attach.
fn pause_behind(attempts: u32, longest: Duration) -> Duration {
    FIRST_RETRY.saturating_mul(1 << attempts.min(16)).min(longest)
}

/// Counts processes by runtime, version and status.
fn count_kinds<'a>(
    processes: impl Iterator<Item = (&'a RuntimeFile, &'static str)>,
) -> BTreeMap<(&'static str, String, &'static str), u64> {
    let mut counts = BTreeMap::new();
    for (file, status) in processes {
        let (major, minor) = file.detected.version;
        let mut kind = (file.runtime.name(), format!("{major}.{minor}"), status);
        if counts.len() >= MAX_KINDS && !counts.contains_key(&kind) {
            kind.1 = "other".into();
        }
        *counts.entry(kind).or_default() += 1;
    }
    counts
}

/// Makes the reads of one request. Returns the answer that the engine waits for.
fn read(readers: &Access, request: Request) -> Option<Answer> {
    match request {
        Request::Attach { key, file, bias } => {
            let theirs = Arc::clone(&file);
            let attach = move || {
                let memory = ProcessMemory { tgid: key.process.tgid };
                let found = Guard::default().read(|| theirs.runtime.attach(&theirs, bias, &memory));
                let list = match &found {
                    Ok(Attachment::Listed(reason)) if reason.may_pass() => CodeList::of_live(key.process),
                    _ => None,
                };
                // The PID may belong to another process by now.
                if check_identity(key.process).is_ok() {
                    (found, list)
                } else {
                    (Err(WhyNot::Unreadable), None)
                }
            };
            let (found, list) = on_reader(readers, key, attach).unwrap_or((Err(WhyNot::Unanswered), None));
            Some(Answer::Attached(Attached { key, file, bias, found, list }))
        }
        Request::Code { key, interpreter, needs } => {
            let theirs = Arc::clone(&interpreter);
            let read_code = move || {
                let memory = ProcessMemory { tgid: key.process.tgid };
                let read = theirs.guard.read(|| {
                    let code = theirs.code.as_ref().ok_or(WhyNot::NotStarted)?;
                    code.read(&needs, &theirs, &memory)
                });
                // The PID may belong to another process by now.
                read.and_then(|()| check_identity(key.process).map_err(|_| WhyNot::Unreadable))
            };
            let read = on_reader(readers, key, read_code).unwrap_or(Err(WhyNot::Unanswered));
            if let Some(code) = &interpreter.code {
                code.end(read.is_err());
            }
            log_cuts(key, &interpreter);
            match read {
                Err(reason) if reason.is_switched_off() => Some(Answer::SwitchedOff(key, reason)),
                _ => Some(Answer::Code),
            }
        }
        Request::Name { key, interpreter, functions } => {
            // Without an answer in time the names may still come; samples until then have none.
            let theirs = Arc::clone(&interpreter);
            let _ = on_reader(readers, key, move || read_texts(key, &theirs, &functions));
            log_cuts(key, &interpreter);
            interpreter.guard.off().map(|reason| Answer::SwitchedOff(key, reason))
        }
    }
}

/// Logs once for a process that functions or code of it are left out.
fn log_cuts(key: ImageKey, interpreter: &Interpreter) {
    if let Some(cuts) = interpreter.cuts.text_to_log() {
        let (name, version) = interpreter.file.names();
        tracing::warn!(
            key = %key.process,
            "{name} {version}: the process is beyond the agent's limits: {cuts}; restart it, so that the functions that it runs now \
             get the names; /debug/processes shows the counts, docs/languages.md the limits"
        );
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
        .map(|function| {
            let read = || file.runtime.read_function(file, *bias, function.object, function.sum, memory);
            interpreter.guard.read(read)
        })
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
        runtimes::{Detected, Runtime},
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

        #[expect(clippy::panic, reason = "a module that fails")]
        fn attach(&self, _: &RuntimeFile, bias: u64, _: &dyn Memory) -> Result<Attachment, WhyNot> {
            match bias {
                0 => {
                    RELEASE.wait();
                }
                2 => panic!("a fault of the module"),
                _ => {}
            }
            Err(WhyNot::Version)
        }
    }

    #[test]
    fn processes_that_do_not_answer_hold_up_no_other() {
        let detected =
            Detected { version: (1, 0), version_text: "1.0".into(), addresses: Vec::new(), layout: 0 };
        let file = Arc::new(RuntimeFile { runtime: &Half, detected });
        let mut interpreters = Interpreters::start(|| ()).unwrap();
        let key = |tgid| ImageKey { process: ProcessKey { tgid, start_boottime_ns: 1 }, exec_id: 1 };
        let answer = |interpreters: &Interpreters| match interpreters
            .answers
            .recv_timeout(Duration::from_secs(20))
            .unwrap()
        {
            Answer::Attached(attached) => (attached.key.process.tgid, attached.found.unwrap_err()),
            Answer::SwitchedOff(key, reason) => (key.process.tgid, reason),
            Answer::Code => unreachable!(),
        };
        // No process has these numbers. The first one holds up its reader, and the second one's is checked.
        let (hung, gone) = (u32::MAX - 1, u32::MAX);
        interpreters.found(key(hung), Arc::clone(&file), 0);
        interpreters.found(key(gone), Arc::clone(&file), 1);
        assert_eq!(answer(&interpreters), (hung, WhyNot::Unanswered));
        assert_eq!(answer(&interpreters), (gone, WhyNot::Unreadable));
        RELEASE.set(()).unwrap();
    }

    /// An interpreter that claims a version.
    fn claiming(version: (u8, u8)) -> RuntimeFile {
        let version_text = format!("{}.{}.0", version.0, version.1);
        RuntimeFile {
            runtime: &Half,
            detected: Detected { version, version_text, addresses: Vec::new(), layout: 0 },
        }
    }

    #[test]
    fn a_module_that_fails_ends_no_reader() {
        let key = |tgid| ImageKey { process: ProcessKey { tgid, start_boottime_ns: 1 }, exec_id: 1 };
        let readers = Access::new(1);
        for _ in 0..3 {
            let request = Request::Attach { key: key(7), file: Arc::new(claiming((1, 0))), bias: 2 };
            let Some(Answer::Attached(attached)) = read(&readers, request) else { unreachable!() };
            // No process has this start: that alone would be another reason.
            assert_eq!(attached.found.unwrap_err(), WhyNot::Unreadable);
        }
        assert_eq!(readers.stats().hung, 0);
        let call = Guard::default().call(|| Half.attach(&claiming((1, 0)), 2, &ProcessMemory { tgid: 7 }));
        assert_eq!(call.unwrap_err(), WhyNot::Failed);
    }

    #[test]
    fn reading_keeps_within_a_share_of_a_core() {
        let begin = Instant::now();
        let mut budget = ReadBudget::new(begin, Duration::ZERO);
        let (mut now, mut spent) = (begin, Duration::ZERO);
        // A minute of reads of a millisecond each, with nothing else to do.
        while now < begin + Duration::from_secs(60) {
            match budget.pause(now, spent) {
                None => {
                    (now, spent) = (now + Duration::from_millis(1), spent + Duration::from_millis(1));
                }
                Some(pause) => {
                    assert!(pause > Duration::ZERO && pause <= MAX_PAUSE);
                    now += pause;
                }
            }
        }
        let allowed = READ_BURST + Duration::from_secs(60) / BUDGET_PARTS;
        assert!(spent <= allowed + Duration::from_millis(2), "{spent:?} of {allowed:?}");
        assert!(spent >= allowed.mul_f64(0.9), "{spent:?} of {allowed:?}");
    }

    #[test]
    fn versions_that_targets_claim_have_few_counts() {
        let files: Vec<RuntimeFile> = (0..=255).map(|minor| claiming((9, minor))).collect();
        let known = claiming((1, 0));
        let all = || files.iter().map(|file| (file, "unsupported"));
        let counts = count_kinds([(&known, "ok"), (&known, "ok")].into_iter().chain(all()));
        assert!(counts.len() <= MAX_KINDS + 1, "{}", counts.len());
        assert_eq!(counts[&("half", "1.0".to_owned(), "ok")], 2);
        assert_eq!(counts.values().sum::<u64>(), 258);
        assert!(counts.contains_key(&("half", "other".to_owned(), "unsupported")));
    }
}
