//! The engine: one thread that owns the kernel side, the process table, the rules in force and the open window.
//!
//! Other threads talk to it through an [`Engine`] handle. It shows its state as plain [views](EngineView) and hands finished
//! windows to a [`WindowSink`].
//!
//! The [`worker`] conducts. Beside it each module owns one piece of state and answers with values:
//!
//! | owner | state |
//! |---|---|
//! | [`reader`] | what events change; it applies them, and has the next eight as parts |
//! | [`unwinding`], [`backlog`] | images that the BPF programs unwind; raw samples that wait for unwind tables |
//! | [`interpreters`] | interpreters whose frames are taken, and the thread that reads their memory |
//! | [`runtime_files`] | processes whose language runtime a rule compares, and the thread that finds it |
//! | [`contexts`] | the services of processes and the places of their spans, and the thread that reads them |
//! | [`sampled`] | the marks in the kernel, and why they are there |
//! | [`off_cpu`] | off-CPU time already reported for threads that are still blocked |
//! | [`discovered`] | processes that already ran when a rule came, and are not read yet |
//! | [`intake`] | the open window and the flight recorder |
//! | [`containers`] | containers reported to the pod resolver |
//! | [`captures`] | watched conditions, running captures, grants at `execve` |
//! | [`account`] | the ledger, from the kernel's counters |
//! | [`loss_log`] | which losses were logged, and when |
//! | [`limits`] | budgets, the governor's verdict, the switch |
//! | [`repair`] | lost events that a comparison with `/proc` has repaired |
//! | [`effects`] | the steps that the worker has still to take |
//!
//! # Order
//!
//! The order of the ring buffer is the order of truth. The engine reads it in one place, [`reader::Reader::catch_up`]: at the
//! head of each turn of the worker's loop, before each command, and before each [effect](effects). A step that needs another
//! step does not call it, but queues it as an effect and returns. The following holds:
//!
//! 1. **An event takes effect exactly behind the samples before it.** An exec retires the former image after all earlier
//!    samples of it are added; so does an exit. A file that takes the place of another one in an image splits the image's
//!    samples where it belongs by its time.
//! 2. **A catch-up leaves nothing half applied.** It hands on all changed mappings. If it has read a process from `/proc`, it
//!    reads the ring buffer again: an exec that the kernel reported meanwhile shows that the reading was of another image.
//! 3. **New rules are in force when their command is answered.** The kernel switches to them and reports each running process
//!    that they want. The catch-up reads these reports, and only then do processes lose their marks that no report confirmed.
//!    The answer comes last.
//! 4. **The window is closed behind a catch-up**, and before that gets the time so far of threads that are still off the CPU.
//!    The ring buffer is read before the map of these threads, so that no thread is in both.
//! 5. **A capture has windows of its own.** The window is closed before it begins. When it ends, the samples of its slot are
//!    added before the slot is retired; when the last of them are unwound the window is closed, and then the capture is
//!    reported as over.
//! 6. **A process that has ended leaves nothing in the kernel**, neither its mark nor its mappings.

mod account;
mod backlog;
mod captures;
mod containers;
mod contexts;
mod discovered;
mod effects;
mod event_log;
mod intake;
mod interpreters;
mod limits;
mod loss_log;
mod off_cpu;
mod read_pause;
mod reader;
mod repair;
mod runtime_files;
mod sampled;
mod unwinding;
mod view;
mod wake_up;
mod worker;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{self, TrySendError},
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime},
};

use gannet_proto::{
    control::{Rule, RuleError},
    ledger::Ledger,
    rules::Caps,
};
use gannet_unwind::overrides::Overrides;
use tokio::sync::oneshot;
use ulid::Ulid;

pub use self::{
    captures::{ManualCapture, RunningCapture},
    intake::StackEnds,
    view::{EngineView, KernelView, ProcessView, Unwinding},
};
pub(crate) use self::{
    interpreters::InterpreterStats,
    view::{RuleView, UnknownProcess},
};
use self::{view::ViewSources, wake_up::WakeUp, worker::Worker};
use crate::{
    cgroup::CgroupTree,
    governor::Budgets,
    kernel::{Kernel, KernelError, KernelOptions},
    process::StartLabelOptions,
    profile::SeriesProfile,
    rules::{CaptureError, Deny, PodResolver, PodSelection, RuleId, RuleSource, SourceRules},
    tables::TableSources,
};

/// Commands that may wait for the engine's thread, which carries all of them out whenever it wakes.
const MAX_COMMANDS: usize = 1024;

/// The settings of an engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// The node's name in every profile.
    pub node: String,
    /// Sizes of the kernel side.
    pub kernel: KernelOptions,
    /// How long a window stays open.
    pub window: Duration,
    /// The most that rules may ask for on this node.
    pub caps: Caps,
    /// Processes that are never sampled, whatever rules ask for.
    pub deny: Deny,
    /// How much the agent may use.
    pub budgets: Budgets,
    /// Labels of samples that show how a process was started.
    pub start_labels: Option<StartLabelOptions>,
    /// Sources of unwind tables. With `None` stacks are unwound by frame pointers only.
    pub tables: Option<TableSources>,
}

/// A finished window.
#[derive(Debug)]
pub struct Window {
    /// Unique on this node, in the order of windows.
    pub id: Ulid,
    /// When it was opened, by the wall clock.
    pub start: SystemTime,
    /// How long it was open, by the monotonic clock.
    pub duration: Duration,
    /// The samples of this window. What it took and neither delivered nor lost is unaccounted.
    pub ledger: Ledger,
    /// One profile for each series, rule, kind and rate.
    pub profiles: Vec<SeriesProfile>,
}

/// Takes finished windows. The engine calls it on its own thread, so it must not block.
pub trait WindowSink: Send {
    /// Takes a window.
    fn window(&mut self, window: Window);
}

impl<F: FnMut(Window) + Send> WindowSink for F {
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
    /// A thread or a file descriptor cannot be created.
    #[error("cannot start the engine's thread: {0}")]
    Start(#[source] io::Error),
    /// The engine's thread has ended.
    #[error("the engine has ended")]
    Ended,
    /// Too many commands wait for the engine's thread.
    #[error("the engine has {MAX_COMMANDS} commands to carry out; try again in some seconds")]
    Busy,
}

/// The rules that cannot work on this node, or what is wrong with the set.
type ReplaceAnswer = Result<Vec<RuleError>, Vec<RuleError>>;
type CaptureAnswer = Result<RunningCapture, CaptureError>;

enum Command {
    Replace(RuleSource, SourceRules, oneshot::Sender<ReplaceAnswer>),
    /// Fills a view and sends it.
    Show(Box<dyn FnOnce(ViewSources<'_>) + Send>),
    Kernel(oneshot::Sender<KernelView>),
    Flush(oneshot::Sender<()>),
    Supply(Arc<Overrides>, oneshot::Sender<()>),
    Pods(Box<dyn PodResolver>),
    Select(PodSelection),
    Switch(Option<String>, oneshot::Sender<()>),
    Capture(Box<ManualCapture>, oneshot::Sender<CaptureAnswer>),
    Test(TestCommand),
    Stop,
}

/// A command for tests only.
enum TestCommand {
    Hold(mpsc::Receiver<()>, oneshot::Sender<()>),
    Sampling(bool, oneshot::Sender<()>),
    UnwindEntries(oneshot::Sender<(usize, usize)>),
}

impl TestCommand {
    fn execute(self, kernel: &mut Kernel) {
        match self {
            Self::Hold(release, answer) => {
                let _ = answer.send(());
                let _ = release.recv();
            }
            Self::Sampling(on, answer) => {
                kernel.set_sampling(on);
                let _ = answer.send(());
            }
            Self::UnwindEntries(answer) => drop(answer.send(kernel.unwind_entries())),
        }
    }
}

#[derive(Clone)]
struct Commands {
    sender: mpsc::SyncSender<Command>,
    wake_up: WakeUp,
    /// Commands that found the channel full.
    refused: Arc<AtomicU64>,
}

impl Commands {
    /// Sends a command that must not be lost; waits while the channel is full.
    fn send(&self, command: Command) {
        // A thread that has ended drops the command, and with it the sender of its answer.
        let _ = self.sender.send(command);
        self.wake_up.wake();
    }

    /// Sends a command and waits for its answer. Fails at once if the channel is full: the client can ask again.
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, EngineError> {
        let (answer, answered) = oneshot::channel();
        if let Err(TrySendError::Full(_)) = self.sender.try_send(command(answer)) {
            self.refused.fetch_add(1, Relaxed);
            return Err(EngineError::Busy);
        }
        self.wake_up.wake();
        answered.await.map_err(|_| EngineError::Ended)
    }

    async fn show<T: Send + 'static>(
        &self,
        fill: impl FnOnce(ViewSources<'_>) -> T + Send + 'static,
    ) -> Result<T, EngineError> {
        self.ask(|answer| Command::Show(Box::new(move |sources| drop(answer.send(fill(sources)))))).await
    }
}

/// Tells the engine which containers the rules over pods select, in answer to a [`PodResolver`].
#[derive(Clone)]
pub struct ContainerSelector(Commands);

impl ContainerSelector {
    /// Selects these from now on. Rules that the selection does not contain keep their containers; the denied containers are
    /// replaced.
    pub fn select(&self, selection: PodSelection) {
        self.0.send(Command::Select(selection));
    }
}

/// A handle to a running engine. Dropping it stops the engine, with its last window delivered.
pub struct Engine {
    commands: Commands,
    thread: Option<JoinHandle<()>>,
    environment: Environment,
}

/// Findings of the engine about this host.
struct Environment {
    /// Parts that work less well on this kernel; human-readable.
    degraded: Vec<String>,
    /// Optional abilities that this kernel has.
    features: Vec<&'static str>,
    /// The control groups; `None` if they cannot be read.
    groups: Option<Arc<CgroupTree>>,
}

impl Engine {
    /// Loads and attaches the kernel side on a thread of its own. It samples nothing before rules come.
    pub fn start(options: EngineOptions, sink: impl WindowSink + 'static) -> Result<Self, EngineError> {
        let wake_up = WakeUp::new().map_err(EngineError::Start)?;
        let (sender, commands) = mpsc::sync_channel(MAX_COMMANDS);
        let (started, answer) = mpsc::sync_channel(1);
        let worker_wake_up = wake_up.clone();
        let thread = thread::Builder::new()
            .name("gannet-engine".into())
            .spawn(move || match Worker::new(options, Box::new(sink), worker_wake_up) {
                Ok(mut worker) => {
                    let _ = started.send(Ok(worker.environment()));
                    worker.run(&commands);
                }
                Err(error) => drop(started.send(Err(error))),
            })
            .map_err(EngineError::Start)?;
        let environment = answer.recv().map_err(|_| EngineError::Ended)??;
        let commands = Commands { sender, wake_up, refused: Arc::default() };
        Ok(Self { commands, thread: Some(thread), environment })
    }

    /// Returns what works less well on this kernel; human-readable.
    pub fn degraded(&self) -> &[String] {
        &self.environment.degraded
    }

    /// Returns the optional abilities whose programs this kernel loaded and attached.
    pub fn features(&self) -> &[&'static str] {
        &self.environment.features
    }

    /// Returns the control groups of this host; `None` if they cannot be read.
    pub fn groups(&self) -> Option<&Arc<CgroupTree>> {
        self.environment.groups.as_ref()
    }

    /// Checks a set of rules and replaces the source's former set by it, as a whole or not at all. When this returns the set
    /// is in force. Returns the rules that cannot work on this node, or what is wrong with the set.
    pub async fn replace(
        &self,
        source: RuleSource,
        set: SourceRules,
    ) -> Result<Vec<RuleError>, Vec<RuleError>> {
        let answered = self.commands.ask(|answer| Command::Replace(source, set, answer)).await;
        answered.unwrap_or_else(|error| {
            Err(vec![RuleError { reason: error.to_string(), ..RuleError::default() }])
        })
    }

    /// Reads the engine's state, all at one moment.
    pub async fn view(&self) -> Result<EngineView, EngineError> {
        self.commands.show(|sources| sources.engine()).await
    }

    /// Reads the processes of the process table, or those of one thread group id.
    pub async fn processes(&self, pid: Option<u32>) -> Result<Vec<ProcessView>, EngineError> {
        self.commands.show(move |sources| sources.processes(pid)).await
    }

    /// Reads a rule in force by its id; `None` if no source has one of this id.
    pub(crate) async fn rule(&self, id: RuleId) -> Result<Option<RuleView>, EngineError> {
        self.commands.show(move |sources| sources.rule(&id)).await
    }

    /// Explains for each rule in force why it does, or does not, want this process; human-readable.
    pub(crate) async fn explain(
        &self,
        process: UnknownProcess,
    ) -> Result<Vec<(RuleId, String)>, EngineError> {
        self.commands.show(move |sources| sources.explain(&process)).await
    }

    /// Checks rules as [`Self::replace`] would, and changes nothing. Returns what is wrong with them.
    pub(crate) async fn check(
        &self,
        source: RuleSource,
        rules: Vec<Rule>,
    ) -> Result<Vec<RuleError>, EngineError> {
        self.commands.show(move |sources| sources.check(source, &rules)).await
    }

    /// Reads the kernel-side values that are slow to read.
    pub async fn kernel_view(&self) -> Result<KernelView, EngineError> {
        self.commands.ask(Command::Kernel).await
    }

    /// Replaces the unwind tables that the operator supplies. Samples that the agent reads from now on are unwound by them.
    pub(crate) async fn supply_tables(&self, tables: Arc<Overrides>) -> Result<(), EngineError> {
        self.commands.ask(|answer| Command::Supply(tables, answer)).await
    }

    /// Returns the number of commands that the engine refused because too many waited.
    pub(crate) fn refused_commands(&self) -> u64 {
        self.commands.refused.load(Relaxed)
    }

    /// Makes rules over pods work. The resolver answers through [`Engine::containers`].
    pub fn resolve_pods(&self, resolver: impl PodResolver + 'static) {
        self.commands.send(Command::Pods(Box::new(resolver)));
    }

    /// Returns a handle for the answers of a [`PodResolver`].
    pub fn containers(&self) -> ContainerSelector {
        ContainerSelector(self.commands.clone())
    }

    /// Detaches everything from the kernel for a reason, or with `None` attaches it again. When this returns it is done.
    pub async fn switch_off(&self, reason: Option<String>) -> Result<(), EngineError> {
        self.commands.ask(|answer| Command::Switch(reason, answer)).await
    }

    /// Starts a capture that no rule asks for. The node's caps and denied processes hold for it too.
    pub async fn capture_now(&self, manual: ManualCapture) -> Result<RunningCapture, CaptureError> {
        let answered = self.commands.ask(|answer| Command::Capture(Box::new(manual), answer)).await;
        answered.unwrap_or_else(|error| Err(CaptureError::Kernel(error.to_string())))
    }

    /// Closes the open window now. When this returns the sink has it.
    pub async fn flush(&self) -> Result<(), EngineError> {
        self.commands.ask(Command::Flush).await
    }

    /// Stops sampling, reads the rest of the ring buffer, and delivers the last window.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic there has printed its message.
            let _ = thread.join();
        }
    }

    /// For tests: keeps the engine from reading its ring buffer until the sender of `release` is dropped. Returns once the
    /// engine waits.
    #[doc(hidden)]
    pub async fn hold(&self, release: mpsc::Receiver<()>) -> Result<(), EngineError> {
        self.commands.ask(|answer| Command::Test(TestCommand::Hold(release, answer))).await
    }

    /// For tests: switches the sampler; the clocks go on.
    #[doc(hidden)]
    pub async fn set_sampling(&self, on: bool) -> Result<(), EngineError> {
        self.commands.ask(|answer| Command::Test(TestCommand::Sampling(on, answer))).await
    }

    /// For tests: counts the keys of the mapping trie and the entries of the images.
    #[doc(hidden)]
    pub async fn unwind_entries(&self) -> Result<(usize, usize), EngineError> {
        self.commands.ask(|answer| Command::Test(TestCommand::UnwindEntries(answer))).await
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.end();
    }
}
