//! The one thread that owns the kernel side, the process table, the rules in force and the window that runs.
//!
//! It reads the ring in the kernel's order, so each event takes effect exactly behind the samples that came before it.
//! Everybody else talks to it through an [`Engine`] handle; a finished window goes to a [`Sink`].

mod captures;
mod discovered;
mod repair;
mod view;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    num::NonZeroUsize,
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use gannet_proto::{
    control::{Rule, RuleError},
    ledger::{Ledger, LossReason},
    rules::Caps,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use tokio::sync::oneshot;
use ulid::Ulid;

pub(crate) use self::view::{RuleView, UnknownProcess};
use self::{
    captures::{Captures, Intake},
    discovered::{Found, Pace},
    repair::{Losses, Repairs},
};
pub use self::{
    captures::{Manual, RunningCapture},
    view::{EngineView, KernelView, ProcessView, Unwinding},
};
use crate::{
    cgroup::CgroupTree,
    conditions::{NodeConditions, Sensors},
    governor::{BpfTime, Budgets, Governor, ResourceUse},
    kernel::{Counters, Event, Kernel, KernelError, KernelOptions, SamplingMark, Want},
    model::{Image, ImageKey, Origin, Sample, SampleKind, StackEnd, Subject, boot_time_ns},
    process::{ImageChanges, ProcError, Process, ProcessState, ProcessTable, check_identity},
    profile::SeriesProfile,
    rules::{CaptureError, Deny, PodResolver, PodSelection, RuleBook, RuleId, RuleSource, SourceRules},
    tables::{self, TableSources, UnwindTables},
};

/// How often the ring is read when the kernel side does not ask for it. A sample waits so long at most; each reading
/// costs a few microseconds.
const READ_PAUSE: Duration = Duration::from_millis(50);
/// How soon it is read again after a file that was not open yet: the program that was started with it is about to map its
/// libraries, and may be gone in a moment.
const EAGER_PAUSE: Duration = Duration::from_millis(5);
/// How soon more of the processes that were found are read.
const FOUND_PAUSE: Duration = Duration::from_millis(20);
/// How often what was told is read before a window ends, while that brings new processes.
const MOST_READINGS: u32 = 4;
/// How often in a row: a program that opens files all the time does not keep the reader awake.
const MOST_EAGER: u32 = 20;
/// How often CPUs, expiries and the like are looked at.
const HOUSEKEEPING_PAUSE: Duration = Duration::from_secs(1);
/// How often the table is compared with what runs, in case an exit was lost: at once if one is known to be, often if a
/// tracepoint is missing.
const RECONCILE_PAUSE: Duration = Duration::from_secs(30);
const DEGRADED_RECONCILE_PAUSE: Duration = Duration::from_secs(2);
/// Different stacks in one window; a window that has more is ended early.
const STACKS_PER_WINDOW: usize = 200_000;
/// Raw samples that may wait for tables, some 25 KiB each; more are walked with what there is.
const MOST_WAITING: usize = 2048;
/// How long a raw sample waits for tables. The largest programs take a second, on a crowded machine several; what waits
/// behind them must not come out broken for that.
const LONGEST_WAIT: Duration = Duration::from_secs(15);
/// The same at the end, when somebody waits for it.
const LAST_WAIT: Duration = Duration::from_secs(8);
/// Lifecycle events that are kept for the debug page.
const EVENT_TAIL: usize = 256;

/// What an engine is started with.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// The node's name in every profile.
    pub node: String,
    /// Sizes of the kernel side.
    pub kernel: KernelOptions,
    /// How long a window is.
    pub window: Duration,
    /// What rules may ask for here.
    pub caps: Caps,
    /// What is never sampled, whatever rules ask for.
    pub deny: Deny,
    /// What the agent may use.
    pub budgets: Budgets,
    /// Walk user stacks by unwind tables, which come from here; else by frame pointers only.
    pub tables: Option<TableSources>,
}

/// A finished window.
#[derive(Debug)]
pub struct Window {
    /// Names it on this node.
    pub id: Ulid,
    /// When it began, by the wall clock.
    pub start: SystemTime,
    /// How long it was, by the boot clock.
    pub duration: Duration,
    /// taken == delivered + lost, as far as this window's profiles.
    pub ledger: Ledger,
    /// By series and rule.
    pub profiles: Vec<SeriesProfile>,
}

/// Takes finished windows. Called on the engine's thread: it must not wait.
pub trait Sink: Send {
    /// A window is over.
    fn window(&mut self, window: Window);
}

impl<F: FnMut(Window) + Send> Sink for F {
    fn window(&mut self, window: Window) {
        self(window);
    }
}

/// Why an engine does not start or does not answer.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The kernel side cannot work.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// No thread, no descriptor.
    #[error("the engine's thread cannot be started: {0}")]
    Start(#[source] io::Error),
    /// It has ended.
    #[error("the engine has ended")]
    Ended,
}

enum Command {
    Replace(RuleSource, SourceRules, oneshot::Sender<Result<Vec<RuleError>, Vec<RuleError>>>),
    View(oneshot::Sender<EngineView>),
    Processes(Option<u32>, oneshot::Sender<Vec<ProcessView>>),
    Rule(String, oneshot::Sender<Option<RuleView>>),
    Explain(Box<UnknownProcess>, oneshot::Sender<Vec<(RuleId, String)>>),
    Check(RuleSource, Vec<Rule>, oneshot::Sender<Vec<RuleError>>),
    Kernel(oneshot::Sender<KernelView>),
    Test(TestCommand),
    Flush(oneshot::Sender<()>),
    Pods(Box<dyn PodResolver>),
    Select(PodSelection),
    Switch(Option<String>, oneshot::Sender<()>),
    Capture(Box<Manual>, oneshot::Sender<Result<RunningCapture, CaptureError>>),
    Stop,
}

/// What only tests ask for.
enum TestCommand {
    Hold(mpsc::Receiver<()>, oneshot::Sender<()>),
    Sampling(bool, oneshot::Sender<()>),
    UnwindEntries(oneshot::Sender<(usize, usize)>),
}

/// Says which containers the rules over pods mean. See [`crate::rules::PodResolver`].
#[derive(Clone)]
pub struct Containers {
    commands: mpsc::Sender<Command>,
    bell: Arc<OwnedFd>,
}

impl Containers {
    /// From now on it is these. What is not named keeps what it had; what is denied is replaced.
    pub fn select(&self, selection: PodSelection) {
        // A thread that has ended has nothing to select for.
        let _ = self.commands.send(Command::Select(selection));
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }
}

/// A handle to a running engine. Dropping it stops the engine, with its last window delivered.
pub struct Engine {
    commands: mpsc::Sender<Command>,
    bell: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    degraded: Vec<String>,
    groups: Option<Arc<CgroupTree>>,
}

impl Engine {
    /// Loads and attaches the kernel side on a thread of its own. Nothing is sampled before rules come.
    pub fn start(options: EngineOptions, sink: impl Sink + 'static) -> Result<Self, EngineError> {
        let bell = Arc::new(
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|e| EngineError::Start(e.into()))?,
        );
        let (commands, inbox) = mpsc::channel();
        let (started, answer) = mpsc::channel();
        let ears = Arc::clone(&bell);
        let thread = thread::Builder::new()
            .name("gannet-engine".into())
            .spawn(move || match Worker::new(options, Box::new(sink), &ears) {
                Ok(mut worker) => {
                    let _ = started.send(Ok((worker.kernel.degraded().to_vec(), worker.groups.clone())));
                    worker.run(&inbox, &ears);
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                }
            })
            .map_err(EngineError::Start)?;
        let (degraded, groups) = answer.recv().map_err(|_| EngineError::Ended)??;
        Ok(Self { commands, bell, thread: Some(thread), degraded, groups })
    }

    /// What works less well on this kernel, in words.
    pub fn degraded(&self) -> &[String] {
        &self.degraded
    }

    /// The control groups of this host, where they can be read.
    pub fn groups(&self) -> Option<&Arc<CgroupTree>> {
        self.groups.as_ref()
    }

    /// Checks a set of rules and puts it into force in place of the source's former one, whole or not at all. By the
    /// time of the answer it is in force. Gives what cannot work on this node; refused with what is wrong.
    pub async fn replace(
        &self,
        source: RuleSource,
        set: SourceRules,
    ) -> Result<Vec<RuleError>, Vec<RuleError>> {
        let (answer, answered) = oneshot::channel();
        self.send(Command::Replace(source, set, answer));
        answered.await.unwrap_or_else(|_| {
            Err(vec![RuleError { reason: EngineError::Ended.to_string(), ..RuleError::default() }])
        })
    }

    /// Reads the engine's state, all at one moment.
    pub async fn view(&self) -> Result<EngineView, EngineError> {
        self.ask(Command::View).await
    }

    /// Reads the processes of the process table, or those of one thread group id.
    pub async fn processes(&self, pid: Option<u32>) -> Result<Vec<ProcessView>, EngineError> {
        self.ask(|answer| Command::Processes(pid, answer)).await
    }

    /// Reads a rule in force by its id; `None` if no source has one of this id.
    pub(crate) async fn rule(&self, id: String) -> Result<Option<RuleView>, EngineError> {
        self.ask(|answer| Command::Rule(id, answer)).await
    }

    /// Explains for each rule in force why it does, or does not, want this process; human-readable.
    pub(crate) async fn explain(
        &self,
        process: UnknownProcess,
    ) -> Result<Vec<(RuleId, String)>, EngineError> {
        self.ask(|answer| Command::Explain(Box::new(process), answer)).await
    }

    /// Checks rules as [`Self::replace`] would, and changes nothing. Returns what is wrong with them.
    pub(crate) async fn check(
        &self,
        source: RuleSource,
        rules: Vec<Rule>,
    ) -> Result<Vec<RuleError>, EngineError> {
        self.ask(|answer| Command::Check(source, rules, answer)).await
    }

    /// Reads the kernel-side values that are slow to read.
    pub async fn kernel_view(&self) -> Result<KernelView, EngineError> {
        self.ask(Command::Kernel).await
    }

    /// For tests: keeps the engine from reading its ring buffer until the sender of `release` is dropped. Returns once
    /// the engine waits.
    #[doc(hidden)]
    pub async fn hold(&self, release: mpsc::Receiver<()>) -> Result<(), EngineError> {
        self.ask(|answer| Command::Test(TestCommand::Hold(release, answer))).await
    }

    /// For tests: switches the sampler; the clocks go on.
    #[doc(hidden)]
    pub async fn set_sampling(&self, on: bool) -> Result<(), EngineError> {
        self.ask(|answer| Command::Test(TestCommand::Sampling(on, answer))).await
    }

    /// For tests: counts the keys of the mapping trie and the entries of the images.
    #[doc(hidden)]
    pub async fn unwind_entries(&self) -> Result<(usize, usize), EngineError> {
        self.ask(|answer| Command::Test(TestCommand::UnwindEntries(answer))).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, EngineError> {
        let (answer, answered) = oneshot::channel();
        self.send(command(answer));
        answered.await.map_err(|_| EngineError::Ended)
    }

    /// Somebody who knows pods: rules over pods work from now on. The answers go through [`Engine::containers`].
    pub fn know_pods(&self, source: impl PodResolver + 'static) {
        self.send(Command::Pods(Box::new(source)));
    }

    /// Where to say which containers the rules over pods mean.
    pub fn containers(&self) -> Containers {
        Containers { commands: self.commands.clone(), bell: Arc::clone(&self.bell) }
    }

    /// Switches everything off, with the reason, or on again: while it is off no program of the agent is called by the
    /// kernel. By the time of the answer it is done.
    pub async fn switch_off(&self, reason: Option<String>) -> Result<(), EngineError> {
        let (answer, answered) = oneshot::channel();
        self.send(Command::Switch(reason, answer));
        answered.await.map_err(|_| EngineError::Ended)
    }

    /// Starts a capture now, for what no rule names. The node's caps and what it denies hold for it too.
    pub async fn capture_now(&self, manual: Manual) -> Result<RunningCapture, CaptureError> {
        let (answer, answered) = oneshot::channel();
        self.send(Command::Capture(Box::new(manual), answer));
        answered.await.unwrap_or_else(|_| Err(CaptureError::Kernel(EngineError::Ended.to_string())))
    }

    /// Ends the running window now and hands it to the sink.
    pub async fn flush(&self) -> Result<(), EngineError> {
        let (answer, answered) = oneshot::channel();
        self.send(Command::Flush(answer));
        answered.await.map_err(|_| EngineError::Ended)
    }

    /// Stops sampling, reads what is left, hands over the last window.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; there is nothing to add.
            let _ = thread.join();
        }
    }

    fn send(&self, command: Command) {
        // A thread that has ended answers by dropping what it would have answered through.
        let _ = self.commands.send(command);
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.end();
    }
}

/// A raw sample whose tables are being made.
struct Waiting {
    since: Instant,
    sample: Sample,
    /// Other files have taken the place of some of its image's since: it is of this state.
    former: Option<Arc<Image>>,
}

struct Worker {
    node: String,
    window_length: Duration,
    kernel: Kernel,
    processes: ProcessTable,
    groups: Option<Arc<CgroupTree>>,
    rules: RuleBook,
    tables: Option<UnwindTables>,
    /// Raw samples whose tables are being made, by image.
    waiting: HashMap<ImageKey, VecDeque<Waiting>>,
    waiting_samples: usize,
    /// Images whose mappings have changed, and are to be brought up to date in the kernel.
    renewed: HashSet<ImageKey>,
    intake: Intake,
    captures: Captures,
    sink: Box<dyn Sink>,
    events: VecDeque<(SystemTime, String)>,
    window_start: (SystemTime, Instant),
    counted: Counters,
    repairs: Repairs,
    /// Times that the ring is read again soon.
    eager: u32,
    /// Since the start, without the running window.
    total: Ledger,
    next_change: Option<SystemTime>,
    /// The newest window that is with the sink.
    last_window: Option<Ulid>,
    governor: Governor,
    bpf_time: BpfTime,
    /// When the CPU time of this process was read last, and what it was.
    cpu_time: (Instant, Duration),
    /// Why everything is switched off, if it is.
    off: Option<String>,
    /// What was told of threads that are still off the CPU: by thread and when they went, nanoseconds.
    blocked: HashMap<(u32, u64), u64>,
    /// Processes that already ran, and are yet to be read.
    found: Found,
    found_pace: Pace,
    /// Images of which a thread blocked before its tables were in the kernel.
    to_enter: HashSet<ImageKey>,
    /// What is in the kernel's map `marks`, by thread group id.
    armed: HashMap<u32, SamplingMark>,
    pods: Option<Box<dyn PodResolver>>,
    /// The containers that were told of in this window.
    seen: HashSet<String>,
}

impl Worker {
    fn new(options: EngineOptions, sink: Box<dyn Sink>, bell: &Arc<OwnedFd>) -> Result<Self, EngineError> {
        let EngineOptions { node, kernel, window, caps, deny, budgets, tables } = options;
        let files = raise_file_limit();
        let (hierarchy, lifecycle) = (kernel.hierarchy, kernel.lifecycle);
        let processes = ProcessTable::new(kernel.hierarchy, kernel.processes as usize * 2, files);
        let groups = processes.groups().map(Arc::clone);
        let mut kernel = Kernel::start(kernel)?;
        let tables = if let Some(sources) = tables {
            let bell = Arc::clone(bell);
            let ring = move || {
                // A bell that is full rings already.
                let _ = rustix::io::write(&bell, &1_u64.to_ne_bytes());
            };
            Some(UnwindTables::new(&kernel, sources, ring).map_err(EngineError::Start)?)
        } else {
            None
        };
        let ears = Arc::clone(bell);
        let sensors = Sensors::start(move || {
            let _ = rustix::io::write(&ears, &1_u64.to_ne_bytes());
        })
        .map_err(EngineError::Start)?;
        let captures = Captures::new(hierarchy, Some(sensors));
        kernel.set_tables(tables.is_some());
        kernel.set_lifecycle(lifecycle);
        kernel.set_sampling(true);
        let mut rules = RuleBook::new(caps);
        rules.set_deny(deny);
        rules.set_condition_support(NodeConditions::probe());
        Ok(Self {
            tables,
            waiting: HashMap::new(),
            waiting_samples: 0,
            renewed: HashSet::new(),
            node,
            window_length: window,
            processes,
            groups,
            rules,
            intake: Intake::new(),
            captures,
            sink,
            events: VecDeque::new(),
            window_start: (SystemTime::now(), Instant::now()),
            counted: kernel.counters()?,
            repairs: Repairs::new(Instant::now()),
            eager: 0,
            kernel,
            total: Ledger::default(),
            next_change: None,
            last_window: None,
            governor: Governor::new(budgets),
            bpf_time: BpfTime::default(),
            cpu_time: (Instant::now(), cpu_time()),
            off: None,
            blocked: HashMap::new(),
            found: Found::default(),
            found_pace: Pace::new(Instant::now()),
            to_enter: HashSet::new(),
            armed: HashMap::new(),
            pods: None,
            seen: HashSet::new(),
        })
    }

    fn run(&mut self, inbox: &mpsc::Receiver<Command>, bell: &OwnedFd) {
        let mut housekeeping = Instant::now();
        let mut reconcile = Instant::now();
        loop {
            self.wait(bell);
            self.read();
            self.read_found();
            self.resolve(false);
            while let Ok(command) = inbox.try_recv() {
                match command {
                    Command::Replace(source, set, answer) => {
                        let _ = answer.send(self.replace(source, set));
                    }
                    Command::View(answer) => drop(answer.send(self.view())),
                    Command::Processes(pid, answer) => drop(answer.send(self.process_views(pid))),
                    Command::Rule(id, answer) => drop(answer.send(self.rule_view(&id))),
                    Command::Explain(process, answer) => drop(answer.send(self.explain(&process))),
                    Command::Check(source, rules, answer) => {
                        drop(answer.send(self.rules.check(source, &rules)));
                    }
                    Command::Kernel(answer) => drop(answer.send(self.kernel_view())),
                    Command::Test(command) => self.test(command),
                    Command::Flush(answer) => {
                        self.flush();
                        let _ = answer.send(());
                    }
                    Command::Pods(source) => {
                        self.rules.enable_pods();
                        self.pods = Some(source);
                        self.enforce_or_say();
                        self.tell_pods();
                    }
                    Command::Select(selection) => self.select(selection),
                    Command::Switch(reason, answer) => {
                        self.switch(reason);
                        let _ = answer.send(());
                    }
                    Command::Capture(manual, answer) => {
                        let _ = answer.send(self.start_manual(*manual));
                    }
                    Command::Stop => {
                        self.kernel.set_sampling(false);
                        self.read();
                        self.finish_waiting(bell);
                        self.flush();
                        return;
                    }
                }
            }
            self.follow_captures();
            if self.window_start.1.elapsed() >= self.window_length
                || self.intake.samples.stacks() >= STACKS_PER_WINDOW
            {
                self.flush();
            }
            if housekeeping.elapsed() >= HOUSEKEEPING_PAUSE {
                housekeeping = Instant::now();
                self.housekeeping();
            }
            let pause =
                if self.kernel.degraded().is_empty() { RECONCILE_PAUSE } else { DEGRADED_RECONCILE_PAUSE };
            if reconcile.elapsed() >= pause {
                reconcile = Instant::now();
                self.reconcile();
            }
        }
    }

    /// Waits for the tables that samples wait for, within reason.
    fn finish_waiting(&mut self, bell: &OwnedFd) {
        let until = Instant::now() + LAST_WAIT;
        self.resolve(false);
        while self.waiting_samples > 0 && Instant::now() < until {
            self.wait(bell);
            self.resolve(false);
        }
        self.resolve(true);
    }

    fn wait(&self, bell: &OwnedFd) {
        let pause = match () {
            () if self.eager > 0 => EAGER_PAUSE,
            () if self.found.len() > 0 => FOUND_PAUSE,
            () => READ_PAUSE,
        };
        let pause = pause.min(self.window_length.saturating_sub(self.window_start.1.elapsed()));
        let timeout = rustix::event::Timespec::try_from(pause.max(Duration::from_millis(1))).ok();
        let mut ready: Vec<PollFd<'_>> = std::iter::once(bell.as_fd())
            .chain(self.kernel.wake_fds())
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        // Interrupted by a signal is as good as a time-out.
        let _ = poll(&mut ready, timeout.as_ref());
        let _ = rustix::io::read(bell.as_fd(), &mut [0_u8; 8]);
    }

    fn read(&mut self) {
        let events = match self.kernel.read() {
            Ok(events) => events,
            Err(error) => {
                tracing::error!("{error}");
                return;
            }
        };
        let now = SystemTime::now();
        let opened = self.processes.file_stats().opened;
        for event in events {
            match event {
                Event::Mapping(told) => self.processes.mapping_event(told),
                Event::Sample(sample) => self.sampled(sample, now),
                Event::Exec { subject, path, by_thread, origin, file } => {
                    self.found.take(subject.key.tgid);
                    let how = if by_thread { " by a thread" } else { "" };
                    self.note(now, || format!("exec {} {} {path}{how}", subject.key, subject.comm));
                    let process = self.processes.exec(&subject, origin, &path, file).ok().cloned();
                    if let Some(process) = &process {
                        self.at_exec(process, &subject, None, &path);
                    }
                    self.decide(process.as_ref(), subject.candidates, now);
                }
                Event::Fork { subject, origin } => {
                    self.found.take(subject.key.tgid);
                    self.note(now, || {
                        format!("fork {} {} from {}", subject.key, subject.comm, origin.parent)
                    });
                    let parent = origin.parent;
                    let process = self.processes.fork(&subject, origin).ok().cloned();
                    if let Some(process) = &process {
                        self.at_exec(process, &subject, Some(parent), "");
                    }
                    self.decide(process.as_ref(), subject.candidates, now);
                }
                Event::Running { subject, origin } => {
                    self.note(now, || format!("found {} {}", subject.key, subject.comm));
                    self.found_running(subject, origin, now);
                }
                Event::Exit { subject, status, .. } => {
                    let (code, signal) = (status.code(), status.signal());
                    self.note(now, || {
                        format!("exit {} {} code {code} signal {signal}", subject.key, subject.comm)
                    });
                    self.found.take(subject.key.tgid);
                    self.let_go(subject.key.tgid);
                    self.processes.exit(&subject, status);
                }
            }
        }
        self.eager = if self.processes.file_stats().opened > opened {
            MOST_EAGER
        } else {
            self.eager.saturating_sub(1)
        };
    }

    /// A process ran already when a rule came that wants it.
    fn found_running(&mut self, subject: Subject, origin: Origin, now: SystemTime) {
        let known = self.processes.get(&ImageKey::of(&subject)).map(|process| process.state);
        // Who is known costs nothing, and may be armed: the rules decide anew at once.
        let is_read = known.is_some_and(|state| state != ProcessState::Unread);
        let begun = Instant::now();
        if !is_read && !self.found_pace.allows(begun) {
            self.found.push(subject, origin);
            return;
        }
        self.found.take(subject.key.tgid);
        self.look_at_found(&subject, origin, now);
        if !is_read {
            self.found_pace.spend(begun, Instant::now());
        }
    }

    fn look_at_found(&mut self, subject: &Subject, origin: Origin, now: SystemTime) {
        let process = self.processes.running(subject, origin).ok().cloned();
        self.decide(process.as_ref(), subject.candidates, now);
    }

    /// Reads some of the processes that were found and wait.
    fn read_found(&mut self) {
        let now = SystemTime::now();
        let mut begun = Instant::now();
        while self.found.len() > 0 && self.found_pace.allows(begun) {
            let Some((subject, origin)) = self.found.pop() else { return };
            self.look_at_found(&subject, origin, now);
            let end = Instant::now();
            self.found_pace.spend(begun, end);
            begun = end;
        }
    }

    fn sampled(&mut self, mut sample: Sample, now: SystemTime) {
        self.captures.strip(&mut sample);
        if sample.kind == SampleKind::OffCpu {
            self.came_back(&mut sample);
        }
        if sample.subject.rules == 0 {
            return;
        }
        // Nobody waits who has samples.
        if self.found.len() > 0
            && let Some((subject, origin)) = self.found.take(sample.subject.key.tgid)
            && subject.key == sample.subject.key
        {
            self.look_at_found(&subject, origin, now);
        }
        self.rules.count_sample(sample.subject.rules, now);
        // What was walked by tables came by no address that is not known. A raw stack may wait for its tables: what is not
        // known where it begins is looked for now, while it is there (nobody tells of mremap).
        let walked = self.tables.is_some() && sample.kind == SampleKind::OnCpu;
        let unknown = match &sample.raw {
            Some(raw) => std::slice::from_ref(&raw.pc),
            None if walked => &[],
            None => sample.user.as_slice(),
        };
        if let Ok(process) = self.processes.sampled(&sample.subject, unknown) {
            see(self.pods.as_deref_mut(), &mut self.seen, process);
        }
        self.keep_changes();
        if sample.raw.is_none() {
            self.intake.add(sample);
            return;
        }
        self.waiting.entry(ImageKey::of(&sample.subject)).or_default().push_back(Waiting {
            since: Instant::now(),
            sample,
            former: None,
        });
        self.waiting_samples += 1;
    }

    /// A process is not there any more: nothing of it stays in the kernel.
    fn let_go(&mut self, tgid: u32) {
        self.leave_at_exec(tgid);
        if self.armed.remove(&tgid).is_some() {
            self.kernel.unmark(tgid);
        }
        if let Some(tables) = &mut self.tables {
            tables.unload(&mut self.kernel, tgid);
        }
    }

    /// Compares the table with what runs, in both directions, by process key: what lost events and missing tracepoints
    /// leave behind. The walk over all processes tells of those that rules want and that were not heard of.
    fn reconcile(&mut self) {
        // What has been told must not look like a loss.
        self.read();
        for key in self.processes.reconcile() {
            self.let_go(key.process.tgid);
            self.kernel.forget(key.process);
        }
        let gone = |key| matches!(check_identity(key), Err(ProcError::Gone(_) | ProcError::Recycled { .. }));
        let stale: Vec<u32> =
            self.armed.values().filter(|arm| gone(arm.key)).map(|arm| arm.key.tgid).collect();
        for tgid in stale {
            self.let_go(tgid);
        }
        if let Err(error) = self.kernel.scan_processes() {
            tracing::warn!("{error}");
        }
        self.read();
    }

    /// A thread that was off the CPU has come back. What was told of it before is not told again.
    fn came_back(&mut self, sample: &mut Sample) {
        let key = (sample.tid, sample.subject.ktime_ns);
        sample.value_ns = sample.value_ns.saturating_sub(self.blocked.remove(&key).unwrap_or(0));
        // A rule may have got its place while the thread slept, or lost it.
        sample.subject.rules = self.rules.slots().held_since(sample.subject.rules, sample.subject.ktime_ns);
        let image = ImageKey::of(&sample.subject);
        let entered = self.tables.as_ref().is_none_or(|tables| tables.is_loaded(&image));
        if !entered || sample.end == StackEnd::Broken {
            self.to_enter.insert(image);
        }
    }

    /// Adds what threads that are still off the CPU have been so far.
    fn add_blocked(&mut self) {
        if !self.rules.slots().wants_off_cpu(SystemTime::now()) {
            self.blocked.clear();
            return;
        }
        // Who has come back is in the ring, not in the map.
        self.read();
        let now = boot_time_ns();
        let mut still = HashMap::new();
        for mut sample in self.kernel.blocked_now(now) {
            let key = (sample.tid, sample.subject.ktime_ns);
            let told = self.blocked.get(&key).copied().unwrap_or(0);
            still.insert(key, sample.value_ns);
            sample.value_ns = sample.value_ns.saturating_sub(told);
            sample.subject.rules =
                self.rules.slots().held_since(sample.subject.rules, sample.subject.ktime_ns);
            if sample.subject.rules != 0 && sample.value_ns > 0 {
                let _ = self.processes.sampled(&sample.subject, &sample.user);
                self.keep_changes();
                self.intake.add(sample);
            }
        }
        self.blocked = still;
    }

    /// Keeps the agent within its budgets.
    fn govern(&mut self) {
        if !self.governor.has_budget() || self.off.is_some() {
            return;
        }
        let (now, time) = (Instant::now(), cpu_time());
        let (since, before) = std::mem::replace(&mut self.cpu_time, (now, time));
        let own = time.saturating_sub(before).as_secs_f64() / (now - since).as_secs_f64().max(1e-3);
        let used =
            ResourceUse { cpu: own + self.bpf_time.measure(&self.kernel), memory_bytes: resident_bytes() };
        if !self.governor.check(used) {
            return;
        }
        let verdict = self.governor.verdict();
        if let Some(reason) = &verdict.reason {
            tracing::warn!("the agent keeps within its budget: {reason}");
        } else {
            tracing::info!("the agent is within its budget again: nothing is lowered any more");
        }
        self.captures.governed.clone_from(&verdict.refuse);
        // Refusing captures is for less of everything: what is only for captures goes too.
        let recorder = if verdict.refuse.is_some() { 0 } else { captures::RECORDER_BYTES };
        self.intake.recorder.set_max_bytes(recorder);
        self.rules.set_governed(verdict.reason);
        if self.rules.set_rate_divisor(verdict.rate_divisor) {
            self.enforce_or_say();
        }
    }

    /// Switches everything off or on again.
    fn switch(&mut self, reason: Option<String>) {
        let was_off = self.off.is_some();
        self.off.clone_from(&reason);
        match (was_off, reason) {
            (false, Some(reason)) => {
                tracing::warn!("everything is detached from the kernel: {reason}");
                self.captures.governed = Some(reason);
                if let Err(error) = self.kernel.detach() {
                    tracing::error!("not everything could be detached: {error}");
                }
                self.read();
                self.flush();
                self.blocked.clear();
            }
            (true, None) => {
                tracing::info!("everything is attached to the kernel again");
                self.captures.governed = self.governor.verdict().refuse;
                self.armed.clear();
                self.kernel.attach_again();
                self.enforce_or_say();
                self.reconcile();
            }
            _ => {}
        }
    }

    /// Samples that were taken before another file took the place of an image's are named after what it was.
    fn keep_changes(&mut self) {
        let ImageChanges { changed, replaced } = self.processes.take_changes();
        self.renewed.extend(changed);
        for (key, image) in replaced {
            for waiting in self.waiting.get_mut(&key).into_iter().flatten() {
                waiting.former.get_or_insert_with(|| Arc::clone(&image));
            }
            self.intake.samples.split_off_former(key, image);
        }
    }

    /// Walks the raw samples whose tables are there, and puts images that are sampled again and again into the kernel.
    /// `give_up`: walks all, with the tables that there are.
    fn resolve(&mut self, give_up: bool) {
        self.keep_changes();
        let Some(tables) = &mut self.tables else { return };
        tables.collect();
        // Who is walked in the kernel is to be walked by what is mapped now.
        let renewed: Vec<_> = self.renewed.drain().filter(|key| tables.is_loaded(key)).collect();
        for key in renewed {
            let Some(process) = self.processes.get(&key).filter(|process| process.is_alive()) else {
                continue;
            };
            // Stacks of threads that block never come raw.
            if self.rules.slots().wants_off_cpu_of(process.rules) && !tables.request_all(&process.image) {
                self.renewed.insert(key);
            } else if let Err(error) = tables.load(&mut self.kernel, key, &process.image) {
                tracing::debug!(key = %key.process, "walked in user space: {error}");
            }
        }
        let crowded = self.waiting_samples > MOST_WAITING;
        let mut left = HashMap::new();
        for (key, mut samples) in std::mem::take(&mut self.waiting) {
            let Some(process) = self.processes.get(&key) else {
                for waiting in samples.drain(..) {
                    self.intake.add(tables::leaf_only(waiting.sample));
                    self.waiting_samples -= 1;
                }
                continue;
            };
            let overdue = samples.front().is_some_and(|waiting| waiting.since.elapsed() > LONGEST_WAIT);
            let mut image = Arc::clone(&process.image);
            while let Some(Waiting { since, mut sample, former }) = samples.pop_front() {
                let mut walked = tables.unwind(former.as_ref().unwrap_or(&image), &sample);
                if let (Some(unknown), None, None) = (walked.unknown, &walked.missing, &former) {
                    // A library that was opened since the mappings were read: they are read again, once for a sample.
                    self.processes.sampled_again(&key, unknown);
                    let ImageChanges { changed, replaced } = self.processes.take_changes();
                    self.renewed.extend(changed);
                    for (key, image) in replaced {
                        self.intake.samples.split_off_former(key, image);
                    }
                    let process = self.processes.get(&key);
                    if let Some(process) = process.filter(|process| !Arc::ptr_eq(&process.image, &image)) {
                        image = Arc::clone(&process.image);
                        walked = tables.unwind(&image, &sample);
                    }
                }
                if let Some(file) = &walked.missing
                    && !(overdue || crowded || give_up)
                {
                    tables.request(file, samples.len() + 1);
                    samples.push_front(Waiting { since, sample, former });
                    break;
                }
                walked.complete(&mut sample);
                match former {
                    Some(former) => self.intake.add_former(&former, sample),
                    None => self.intake.add(sample),
                }
                self.waiting_samples -= 1;
            }
            if !samples.is_empty() {
                left.insert(key, samples);
                continue;
            }
            if let Some(process) = self.processes.get(&key)
                && process.is_alive()
                && let Err(error) = tables.load(&mut self.kernel, key, &process.image)
            {
                tracing::debug!(key = %key.process, "walked in user space: {error}");
            }
        }
        self.waiting = left;
        self.enter_blocked();
    }

    /// Puts the images of threads that block into the kernel, so that their next stacks are walked by tables.
    fn enter_blocked(&mut self) {
        let Some(tables) = &mut self.tables else { return };
        for key in std::mem::take(&mut self.to_enter) {
            let Some(process) = self.processes.get(&key).filter(|process| process.is_alive()) else {
                continue;
            };
            if process.kernel_thread {
                continue;
            }
            if !tables.request_all(&process.image) {
                self.to_enter.insert(key);
            } else if let Err(error) = tables.load(&mut self.kernel, key, &process.image) {
                tracing::debug!(key = %key.process, "walked by frame pointers: {error}");
            }
        }
    }

    /// Arms or disarms a process by the rules that the kernel side cannot decide; `candidates` are those of which all
    /// holds that it can see.
    fn decide(&mut self, process: Option<&Process>, candidates: u64, now: SystemTime) {
        // One for which there is no room is not armed either.
        let Some(process) = process else { return };
        let want = if candidates == 0 {
            Want::default()
        } else {
            self.rules.slots().decide(process, candidates, now)
        };
        self.processes.wanted(&process.key, want.rules);
        if self.rules.slots().wants_off_cpu_of(process.rules | want.rules) {
            self.to_enter.insert(process.key);
        }
        self.set_arm(process.key, want);
    }

    fn select(&mut self, selection: PodSelection) {
        let mut changed = self.rules.deny_containers(selection.denied);
        for (rule, containers) in selection.rules {
            changed |= self.rules.select_containers(&rule, containers);
        }
        if changed {
            self.enforce_or_say();
        }
    }

    fn tell_pods(&mut self) {
        if let Some(pods) = &mut self.pods {
            pods.set_queries(self.rules.slots().pod_queries());
        }
    }

    fn enforce_or_say(&mut self) {
        if let Err(error) = self.enforce(SystemTime::now()) {
            tracing::error!("the kernel did not take a change of the rules: {error}");
        }
    }

    fn replace(&mut self, source: RuleSource, set: SourceRules) -> Result<Vec<RuleError>, Vec<RuleError>> {
        let errors = self.rules.check(source, &set.rules);
        if !errors.is_empty() {
            return Err(errors);
        }
        let now = SystemTime::now();
        let former = self.rules.source(source).cloned().unwrap_or_default();
        let partial = self.rules.replace(source, set, now);
        if let Err(error) = self.enforce(now) {
            self.rules.replace(source, former, now);
            let restored = self.enforce(now);
            let reason = match restored {
                Ok(()) => format!("the kernel did not take the rules, the former ones are in force: {error}"),
                Err(again) => {
                    format!("the kernel did not take the rules: {error}; nor the former ones: {again}")
                }
            };
            return Err(vec![RuleError { rule_id: String::new(), field: "rules".into(), reason }]);
        }
        self.tell_pods();
        self.settle_captures();
        Ok(partial)
    }

    /// Brings the kernel side to what the rules say now.
    fn enforce(&mut self, now: SystemTime) -> Result<(), KernelError> {
        self.next_change = self.rules.slots().next_change(now);
        let former = std::mem::take(&mut self.armed);
        // Found by the former rules; the walk finds by the new ones.
        self.found.clear();
        if let Err(error) = self.kernel.set_rules(&self.rules.kernel_rules(now)) {
            self.armed = former;
            return Err(error);
        }
        // The walk has reported everybody who is wanted, and everybody for whom the agent must decide.
        self.read();
        for (tgid, arm) in former {
            if self.armed.contains_key(&tgid) {
                continue;
            }
            let key = ImageKey { process: arm.key, exec_id: arm.exec_id };
            // So that it is taken out if there is nothing left in it.
            self.armed.insert(tgid, arm);
            self.set_arm(key, Want::default());
        }
        self.rules_changed(now);
        Ok(())
    }

    fn housekeeping(&mut self) {
        if let Err(error) = self.kernel.follow_cpus() {
            tracing::warn!("{error}");
        }
        self.processes.tidy();
        if let Ok(counters) = self.kernel.counters()
            && let losses = Losses::new(&counters, self.kernel.mappings_lost())
            && let Some(lost) = self.repairs.due(losses, Instant::now())
        {
            if lost > 0 {
                tracing::warn!(
                    lost,
                    "more processes come and go than are read: what was not told of them is looked for in /proc, which \
                     comes too late for short ones; raise --ring-bytes, or let rules name fewer"
                );
            }
            self.reconcile();
        }
        self.govern();
        self.watch();
        self.intake.recorder.drop_old(boot_time_ns());
        let now = SystemTime::now();
        if self.next_change.is_some_and(|at| at <= now)
            && let Err(error) = self.enforce(now)
        {
            tracing::error!("a rule's time has come, but the kernel did not take the change: {error}");
        }
    }

    /// The places of rules whose samples wait for tables.
    fn waited_for(&self) -> u64 {
        self.waiting.values().flatten().fold(0, |rules, waiting| rules | waiting.sample.subject.rules)
    }

    fn flush(&mut self) {
        // What was read from /proc a moment ago may have been another image's by then: that has been told meanwhile.
        for _ in 0..MOST_READINGS {
            let before = self.processes.stats();
            self.read();
            let after = self.processes.stats();
            if (after.loaded, after.rescans) == (before.loaded, before.rescans) {
                break;
            }
        }
        self.add_blocked();
        let (start, began) = self.window_start;
        self.window_start = (SystemTime::now(), Instant::now());
        let duration = self.window_start.1 - began;
        let deliveries = self.intake.samples.deliveries();
        let processes = &self.processes;
        let rules = &self.rules;
        let flushed = self.intake.samples.flush(
            start,
            duration,
            &self.node,
            |key| processes.get(key),
            |slot| rules.tag(slot),
        );
        let waiting = &self.waiting;
        self.processes.next_window(|key| waiting.contains_key(key));
        let free = self.rules.free_retired_slots(Instant::now(), self.waited_for());
        if free != 0 {
            self.intake.recorder.clear_slots(free);
        }
        self.seen.clear();
        let mut ledger = Ledger { delivered: flushed.delivered, ..Ledger::default() };
        ledger.lose(LossReason::Expired, flushed.expired);
        match self.kernel.counters() {
            Ok(counters) => {
                ledger.ticks = counters.ticks - self.counted.ticks;
                ledger.lose(LossReason::RingFull, counters.lost_ring_full - self.counted.lost_ring_full);
                ledger.lose(LossReason::MapFull, counters.lost_off_cpu_full - self.counted.lost_off_cpu_full);
                ledger
                    .lose(LossReason::RateLimit, counters.lost_off_cpu_rate - self.counted.lost_off_cpu_rate);
                self.counted = counters;
            }
            Err(error) => tracing::error!("{error}"),
        }
        ledger.taken = deliveries + ledger.lost_total() - flushed.expired;
        self.total.merge(&ledger);
        if ledger.taken > 0 {
            let id = Ulid::new();
            self.last_window = Some(id);
            self.sink.window(Window { id, start, duration, ledger, profiles: flushed.profiles });
        }
    }

    /// Samples of the running window, those that wait for tables included; once for each rule that asked.
    fn in_hand(&self) -> u64 {
        let recorded = self.intake.recorded;
        let waiting = self
            .waiting
            .values()
            .flatten()
            .map(|waiting| u64::from((waiting.sample.subject.rules & !recorded).count_ones()));
        self.intake.samples.deliveries() + waiting.sum::<u64>()
    }

    /// Since the start; pending is what is in the ring or in the running window.
    fn ledger(&self) -> Ledger {
        let mut ledger = self.total.clone();
        if let Ok(counters) = self.kernel.counters() {
            ledger.ticks += counters.ticks - self.counted.ticks;
            let lost_ring = counters.lost_ring_full - self.counted.lost_ring_full;
            let lost_map = counters.lost_off_cpu_full - self.counted.lost_off_cpu_full;
            ledger.lose(LossReason::RingFull, lost_ring);
            ledger.lose(LossReason::MapFull, lost_map);
            let lost_rate = counters.lost_off_cpu_rate - self.counted.lost_off_cpu_rate;
            ledger.lose(LossReason::RateLimit, lost_rate);
            ledger.taken += self.in_hand() + lost_ring + lost_map + lost_rate;
        }
        ledger.pending += self.in_hand();
        ledger
    }

    fn test(&mut self, command: TestCommand) {
        match command {
            TestCommand::Hold(release, answer) => {
                let _ = answer.send(());
                let _ = release.recv();
            }
            TestCommand::Sampling(on, answer) => {
                self.kernel.set_sampling(on);
                let _ = answer.send(());
            }
            TestCommand::UnwindEntries(answer) => drop(answer.send(self.kernel.unwind_entries())),
        }
    }

    fn note(&mut self, now: SystemTime, text: impl FnOnce() -> String) {
        if self.events.len() == EVENT_TAIL {
            self.events.pop_front();
        }
        self.events.push_back((now, text()));
    }
}

/// CPU time of all threads of this process.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// Resident memory of this process.
fn resident_bytes() -> u64 {
    std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split_ascii_whitespace().nth(1)?.parse::<u64>().ok())
        .unwrap_or(0)
        * rustix::param::page_size() as u64
}

/// Tells who knows pods of a process's container, once in a window.
fn see(pods: Option<&mut (dyn PodResolver + 'static)>, seen: &mut HashSet<String>, process: &Process) {
    let id = &process.names.container_id;
    if let Some(pods) = pods
        && !id.is_empty()
        && !seen.contains(id)
    {
        seen.insert(id.clone());
        pods.container_seen(&process.names);
    }
}

/// Raises the number of open files as far as allowed; gives how many of them mapped files may take.
fn raise_file_limit() -> NonZeroUsize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!("the number of open files stays at {:?}: {error}", limit.current);
    }
    let most = getrlimit(Resource::Nofile).current.unwrap_or(65_536).min(65_536);
    NonZeroUsize::new(usize::try_from(most / 4).unwrap_or(256)).unwrap_or(NonZeroUsize::MIN)
}
