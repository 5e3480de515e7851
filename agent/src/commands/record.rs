//! `gannet-agent record`: samples for a while and writes one profile, without a collector.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    pin::pin,
    process::{Child, Command, ExitStatus},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use clap::{ArgGroup, Args};
use gannet_base::{ByteSize, TimeSpan};
use gannet_proto::{
    control::{Match, RuleError, capture},
    ledger::{Ledger, LossReason},
    pprof::{self, Merger, PprofError},
    profiles::Profile,
    rules::Caps,
};
use rustix::process::{Pid, kill_process};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use crate::{
    access::run_apart,
    commands::{
        check::{self, Refusal},
        local::LocalArgs,
        target_ends::TargetEnds,
    },
    engine::{Engine, EngineError, EngineOptions, EngineView, Window},
    kernel::{KernelOptions, Ticks, default_ring_bytes},
    output::{Destination, Details, OutputError},
    pipeline::finish,
    process::{StartLabelError, StartLabelOptions},
    profile::SeriesProfile,
    rules::{Deny, RuleSource, SourceRules, ad_hoc},
    symbols::{DebugCost, Symbolizer, SymbolizerConfig, SymbolizerError, SymbolizerStats},
};

/// Length of a window. It bounds the memory of a long recording.
const WINDOW: Duration = Duration::from_secs(10);
/// Time that a command has to end after SIGTERM.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// How long writing the profile may take before a signal ends the wait.
const WRITE_TIMEOUT: Duration = Duration::from_secs(3);
/// Windows that may wait for their symbols.
const MAX_QUEUED_WINDOWS: usize = 64;

/// Arguments of `record`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  gannet-agent record --all --duration 10s -o all.svg
  gannet-agent record --comm 'python3*' -o python.pb.gz
  gannet-agent record -o build.html -- make -j8")]
#[command(group(ArgGroup::new("what").required(true).args(["all", "pid", "comm", "cgroup", "command"])))]
pub struct RecordArgs {
    /// Sample all processes and kernel threads
    #[arg(long)]
    pub(crate) all: bool,
    /// Sample the processes with these pids and their children; ends when all of these processes have ended
    #[arg(long, value_name = "N", num_args = 1.., value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) pid: Vec<u32>,
    /// Sample processes with these command names: exact, or a prefix with * at its end
    #[arg(long, value_name = "PATTERN", num_args = 1..)]
    pub(crate) comm: Vec<String>,
    /// Sample processes in these control groups: a path below the root of the hierarchy, exact, or a prefix with * at its
    /// end
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(crate) cgroup: Vec<String>,
    /// Sampling rate in samples per second and CPU, 1 to 1000
    #[arg(long, default_value_t = 99, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) hz: u32,
    /// Time to sample; COMMAND gets SIGTERM at its end [default: 30s, or until COMMAND ends]
    #[arg(long, value_name = "TIME")]
    pub(crate) duration: Option<TimeSpan>,
    /// Record blocked time instead of CPU time
    #[arg(long)]
    pub(crate) off_cpu: bool,
    /// File to write. Its ending chooses the format: .pb.gz (pprof), .folded, .svg or .html (flame graph) [default: a
    /// pprof file named after the time]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<Destination>,
    /// In folded stacks and flame graphs, show the C functions of interpreters between the functions that they run; pprof
    /// files always have them
    #[arg(long)]
    pub(crate) interpreter_frames: bool,
    /// In folded stacks and flame graphs, leave out frames that say what a stack lacks, such as `[truncated]` and
    /// `[unknown]`; their values stay with their callers
    #[arg(long)]
    pub(crate) hide_error_frames: bool,
    /// Label samples with the command line of the process, without secrets, up to 512 bytes
    #[arg(long)]
    pub(crate) label_cmdline: bool,
    /// Label samples with the working directory that the process has at its first sample
    #[arg(long)]
    pub(crate) label_cwd: bool,
    /// Label samples with this environment variable of the process (repeatable, at most 16)
    #[arg(long, value_name = "NAME")]
    pub(crate) label_env: Vec<String>,
    /// Regular expression for secrets in these labels: its groups, or all that it matches, become [redacted] [default:
    /// passwords, tokens and keys, by name and by form]
    #[arg(long, value_name = "REGEX")]
    pub(crate) label_redact: Option<String>,
    /// Print the numbers of samples taken, delivered and lost as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Size of the ring buffer between kernel and agent; rounded up to a power of two [default: 1MiB for each CPU, 2MiB
    /// to 16MiB]
    #[arg(long, value_name = "BYTES")]
    pub(crate) ring_bytes: Option<ByteSize>,
    /// Settings of the engine.
    #[command(flatten)]
    pub(crate) local: LocalArgs,
    /// Program to start; the profile begins with its first instruction and includes its children
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

/// Reasons why `record` writes no profile.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A required check failed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The engine cannot start, or has ended.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Labels cannot be made as the arguments ask.
    #[error(transparent)]
    Labels(#[from] StartLabelError),
    /// The arguments make no valid rule.
    #[error("{}", list(.0))]
    Rule(Vec<RuleError>),
    /// The command cannot start.
    #[error("cannot run `{command}`: {source}")]
    Command {
        /// The command line.
        command: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A process of `--pid` cannot be followed.
    #[error("--pid: {0}")]
    Target(#[source] io::Error),
    /// There are no samples.
    #[error("no samples in {0:.1?}: none of the processes used a CPU")]
    NoSamples(Duration),
    /// The symbolizer has failed.
    #[error("cannot symbolize frames: {0}")]
    Symbols(#[from] SymbolizerError),
    /// The windows do not merge.
    #[error("cannot merge the windows into one profile: {0}")]
    Merge(#[from] PprofError),
    /// The file cannot be written.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// A signal has ended the wait for a file system that does not answer.
    #[error(
        "the profile is not written: the file system of `{}` does not answer, and a signal ended the wait; give -o FILE on another \
         file system",
        .0.display()
    )]
    Unanswered(PathBuf),
    /// A thread or a signal handler cannot start.
    #[error("cannot start: {0}")]
    Start(#[source] io::Error),
}

fn list(errors: &[RuleError]) -> String {
    errors
        .iter()
        .map(|error| format!("{}: {}", flag_of(&error.field), error.reason))
        .collect::<Vec<_>>()
        .join("; ")
}

/// Returns the flag that sets a field of the rule.
fn flag_of(field: &str) -> &str {
    match field.split(['[', '.']).nth(1) {
        Some("comm") => "--comm",
        Some("cgroup") => "--cgroup",
        Some("pids") => "--pid",
        Some("hz") => "--hz",
        _ => field,
    }
}

/// Samples and writes the profile. Prints the ledger to standard output and everything else to standard error.
pub async fn record(args: RecordArgs) -> Result<(), RecordError> {
    // First, so that an interrupt ends the slow steps below too.
    let mut signals = Signals::listen().map_err(RecordError::Start)?;
    check::preflight(args.local.unsafe_kernel())?;
    let start_labels = StartLabelOptions::new(
        args.label_cmdline,
        args.label_cwd,
        &args.label_env,
        args.label_redact.as_deref(),
    )?;
    let targets = TargetEnds::open(&args.pid).map_err(RecordError::Target)?;
    let destination =
        args.output.clone().unwrap_or_else(|| Destination::default_for(&subject(&args), SystemTime::now()));
    let debug_cost = if args.all { DebugCost::EVERYTHING } else { DebugCost::WANTED };
    let symbolizer = Symbolizer::start(SymbolizerConfig { debug_cost, ..SymbolizerConfig::default() })
        .map_err(RecordError::Start)?;
    let (windows, finished) = mpsc::channel(MAX_QUEUED_WINDOWS);
    let names = Arc::clone(symbolizer.stats());
    let symbolizing = tokio::spawn(symbolize_all(symbolizer, finished));
    let engine = Engine::start(
        EngineOptions {
            node: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            kernel: KernelOptions {
                ring_bytes: args
                    .ring_bytes
                    .map_or_else(default_ring_bytes, |size| size.0.min(1 << 30) as u32),
                off_cpu: args.off_cpu,
                ..KernelOptions::default()
            },
            window: WINDOW,
            caps: Caps { ttl_above_hz: u32::MAX, ..Caps::default() },
            deny: Deny::default(),
            budgets: args.local.budgets(),
            start_labels,
            tables: Some(args.local.tables()),
        },
        // The queue holds minutes. If it is full all the same, the engine waits instead of losing a window: nothing else
        // depends on it here.
        move |window: Window| {
            let _ = windows.blocking_send(window);
        },
    )?;
    for degraded in engine.degraded() {
        tracing::warn!("degraded: {degraded}");
    }
    let mut held = if args.command.is_empty() { None } else { Some(HeldCommand::start(&args.command)?) };
    let matches = Match {
        comm: if args.all { vec!["*".into()] } else { args.comm.clone() },
        pids: held.as_ref().map_or_else(|| args.pid.clone(), |held| vec![held.child.id()]),
        cgroup: args.cgroup.clone(),
        ..Match::default()
    };
    let kind = if args.off_cpu { capture::Kind::OffCpu } else { capture::Kind::OnCpu };
    let rules = vec![ad_hoc("record", matches, args.hz, &[kind])];
    // The waiting child runs this program; the command begins with its own image.
    let set = SourceRules { rules, from_exec: held.is_some(), ..SourceRules::default() };
    let partial = engine.replace(RuleSource::Local, set).await.map_err(RecordError::Rule)?;
    if !partial.is_empty() {
        return Err(RecordError::Rule(partial));
    }
    let begun = Instant::now();
    let start = since_start();
    let duration =
        args.duration.map(Duration::from).or(args.command.is_empty().then_some(Duration::from_secs(30)));
    if let Some(held) = &mut held {
        held.release();
    }
    let targets = Some(&targets).filter(|_| !args.pid.is_empty());
    let status = until_end(held.as_mut(), targets, duration, &mut signals).await;
    let took = begun.elapsed();
    let EngineView { ticks, governed, .. } = engine.view().await?;
    let ticks = ticks.unwrap_or_default();
    // Joining the engine's thread takes until its last window is in the queue.
    let _ = tokio::task::spawn_blocking(move || engine.stop()).await;
    let recorded = symbolizing.await.map_err(|error| RecordError::Start(io::Error::other(error)))??;
    // After the naming, which reads files of the command while it runs.
    match (status, held) {
        (Some(status), _) if !status.success() => tracing::warn!("the command ended with {status}"),
        (None, Some(held)) => held.end().await,
        _ => {}
    }
    let Some(mut profile) = recorded.profile else { return Err(RecordError::NoSamples(took)) };
    // The merger adds the durations of the windows, but profiles of one window cover the same time.
    profile.duration_nanos = i64::try_from(took.as_nanos()).unwrap_or(i64::MAX);
    let details = Details {
        title: format!("gannet: {}", subject(&args)),
        ledger: recorded.ledger.clone(),
        interpreter_frames: args.interpreter_frames,
        hide_error_frames: args.hide_error_frames,
    };
    write(&destination, profile, details, &mut signals).await?;
    print_ledger(&args, &destination, &recorded.ledger, &names, (&ticks, governed), (start, took))
        .map_err(RecordError::Start)
}

/// Returns the running time of this process; zero if `/proc` does not show it.
fn since_start() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now = Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0));
    // The 22nd field, in clock ticks; this program's own name has neither spaces nor parentheses.
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let ticks = stat.split_ascii_whitespace().nth(21).and_then(|ticks| ticks.parse::<u64>().ok());
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    let started = ticks.map_or(now, |ticks| Duration::from_millis(ticks.saturating_mul(1000) / per_second));
    now.saturating_sub(started)
}

struct Recorded {
    profile: Option<Profile>,
    ledger: Ledger,
}

/// Joins the series of a window that have one kind and one period. Each sample carries its process.
fn join(series: Vec<SeriesProfile>) -> Vec<SeriesProfile> {
    let mut joined: Vec<SeriesProfile> = Vec::new();
    for one in series {
        let same = |other: &&mut SeriesProfile| {
            (other.raw.kind, other.raw.period_ns) == (one.raw.kind, one.raw.period_ns)
        };
        match joined.iter_mut().find(same) {
            Some(other) => {
                other.samples += one.samples;
                other.raw.processes.extend(one.raw.processes);
            }
            None => joined.push(one),
        }
    }
    joined
}

/// Symbolizes and merges windows as they arrive.
async fn symbolize_all(
    symbolizer: Symbolizer,
    mut windows: mpsc::Receiver<Window>,
) -> Result<Recorded, RecordError> {
    let mut merger = Merger::new();
    let mut ledger = Ledger::default();
    while let Some(window) = windows.recv().await {
        ledger.merge(&window.ledger);
        let profiles = join(window.profiles);
        for profile in finish(&symbolizer, profiles, &window.ledger).await? {
            if let Err(error) = merger.add(&profile) {
                tracing::warn!("cannot merge a part of the profile, it is left out: {error}");
                ledger.lose(LossReason::Refused, pprof::samples(&profile));
            }
        }
    }
    let profile = merger.finish();
    // Counted in the profile that is written, so that a sample that got lost on the way to it is missing.
    ledger.delivered = profile.as_ref().map_or(0, pprof::samples);
    Ok(Recorded { profile, ledger })
}

/// Waits for the end of the time, the command or the targets, or for a signal. Returns the status of a command that has
/// ended.
async fn until_end(
    held: Option<&mut HeldCommand>,
    targets: Option<&TargetEnds>,
    duration: Option<Duration>,
    signals: &mut Signals,
) -> Option<ExitStatus> {
    let ended = async {
        let Some(held) = held else { return std::future::pending().await };
        loop {
            match held.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(_) => return None,
            }
        }
    };
    let time = async {
        match duration {
            Some(duration) => tokio::time::sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    let targets_end = async {
        match targets {
            Some(targets) => targets.wait().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        status = ended => status,
        () = targets_end => None,
        () = time => None,
        () = signals.next() => None,
    }
}

/// Writes the profile. The file system may not answer: a worker that can be left behind waits for it, until a signal.
async fn write(
    destination: &Destination,
    profile: Profile,
    details: Details,
    signals: &mut Signals,
) -> Result<(), RecordError> {
    let theirs = destination.clone();
    let mut writing = pin!(run_apart("gannet-output", move || theirs.write(&profile, &details)));
    let written = if let Ok(written) = tokio::time::timeout(WRITE_TIMEOUT, &mut writing).await {
        written
    } else {
        let path = destination.path().display();
        tracing::warn!(
            "the file system of {path} does not answer: the profile is written when it does; Ctrl-C or SIGTERM ends this program \
             without the profile"
        );
        tokio::select! {
            written = writing => written,
            () = signals.next() => return Err(RecordError::Unanswered(destination.path().to_owned())),
        }
    };
    Ok(written.map_err(RecordError::Start)??)
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for the next signal.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

fn subject(args: &RecordArgs) -> String {
    if args.all {
        return "all".into();
    }
    if let Some(program) = args.command.first() {
        return program.rsplit('/').next().unwrap_or(program).to_owned();
    }
    let pids = args.pid.iter().map(|pid| format!("pid {pid}"));
    args.comm.iter().cloned().chain(args.cgroup.iter().cloned()).chain(pids).collect::<Vec<_>>().join(", ")
}

fn print_ledger(
    args: &RecordArgs,
    destination: &Destination,
    ledger: &Ledger,
    names: &SymbolizerStats,
    (ticks, governed): (&Ticks, Option<String>),
    (start, took): (Duration, Duration),
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if args.json {
        let skipped: serde_json::Map<_, _> =
            names.skipped().map(|(reason, count)| (reason.name().to_owned(), count.into())).collect();
        let lost: serde_json::Map<_, _> =
            ledger.lost.iter().map(|(reason, count)| (reason.to_string(), (*count).into())).collect();
        let missing: serde_json::Map<_, _> =
            ticks.missing().iter().map(|(reason, count)| ((*reason).to_owned(), (*count).into())).collect();
        return writeln!(
            out,
            "{}",
            serde_json::json!({
                "taken": ledger.taken,
                "delivered": ledger.delivered,
                "lost": lost,
                "names_skipped": skipped,
                "unaccounted": ledger.unaccounted(),
                "ticks": ledger.ticks,
                // By the time that the clocks ran. Of these some came, and the others are missing for a reason.
                "ticks_due": ticks.due,
                "ticks_missing": missing,
                "ticks_unexplained": ticks.unexplained(),
                // Why rates were lowered at the end; null if they were not.
                "governed": governed,
                // From the start of this program until it could take its first tick.
                "start_seconds": start.as_secs_f64(),
                "seconds": took.as_secs_f64(),
                "output": destination.path(),
            })
        );
    }
    writeln!(
        out,
        "samples: {} taken, {} delivered, {} lost, {} unaccounted",
        ledger.taken,
        ledger.delivered,
        ledger.lost_total(),
        ledger.unaccounted()
    )?;
    for (reason, count) in ledger.lost.iter().filter(|(_, count)| **count > 0) {
        writeln!(out, "  lost {reason}: {count}; {}", reason.cure())?;
    }
    if ledger.unaccounted() != 0 {
        writeln!(
            out,
            "  unaccounted: samples are missing without a reason; report it with the log of this program"
        )?;
    }
    if let Some(governed) = governed {
        writeln!(out, "{governed}")?;
    }
    if let Some(line) = missing_ticks(ticks) {
        writeln!(out, "{line}")?;
    }
    for (reason, count) in names.skipped().filter(|(_, count)| *count > 0) {
        writeln!(out, "addresses without {}, {}: {count}", reason.lacks(), reason.explanation())?;
    }
    writeln!(out, "written: {}", destination.path().display())
}

/// Returns a line about missing ticks, if more than one in a hundred is missing.
fn missing_ticks(ticks: &Ticks) -> Option<String> {
    let reasons: Vec<_> = ticks.missing().into_iter().filter(|(_, count)| *count > 0).collect();
    let missing: u64 = reasons.iter().map(|(_, count)| count).sum();
    let reasons: Vec<_> = reasons.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    (missing * 100 > ticks.due).then(|| {
        format!("clock ticks: {} due, {} came, missing: {}", ticks.due, ticks.fired, reasons.join(", "))
    })
}

/// A child that waits before it becomes the command, so that the agent samples the command from its first instruction.
struct HeldCommand {
    child: Child,
    gate: Option<UnixStream>,
}

/// The hidden verb that waits at a socket and then becomes the command.
pub const HELD_VERB: &str = "held-command";

impl HeldCommand {
    /// Starts the child and returns when it waits. `spawn` alone returns inside the child's first `execve`: a rule for the
    /// next `execve` would then match that one.
    fn start(command: &[String]) -> Result<Self, RecordError> {
        let failed = |source| RecordError::Command { command: command.join(" "), source };
        let (mut gate, childs) = UnixStream::pair().map_err(failed)?;
        // A duplicate without close-on-exec, which the child inherits.
        let passed = rustix::io::dup(&childs).map_err(|e| failed(e.into()))?;
        let child = Command::new("/proc/self/exe")
            .arg(HELD_VERB)
            .arg(passed.as_raw_fd().to_string())
            .arg("--")
            .args(command)
            .spawn()
            .map_err(failed)?;
        drop((passed, childs));
        gate.read_exact(&mut [0]).map_err(failed)?;
        Ok(Self { child, gate: Some(gate) })
    }

    fn release(&mut self) {
        if let Some(mut gate) = self.gate.take() {
            let _ = gate.write_all(b"!");
        }
    }

    /// Asks the command to end, and says so if it goes on.
    async fn end(mut self) {
        let pid = self.child.id();
        self.terminate();
        let end = Instant::now() + END_TIMEOUT;
        while Instant::now() < end {
            match self.child.try_wait() {
                Ok(None) => tokio::time::sleep(Duration::from_millis(10)).await,
                Ok(Some(_)) => return tracing::info!("ended the command (pid {pid})"),
                Err(error) => return tracing::warn!("cannot wait for the command (pid {pid}): {error}"),
            }
        }
        tracing::warn!("the command (pid {pid}) goes on: it has not ended within {END_TIMEOUT:?} of SIGTERM");
    }

    /// Sends SIGTERM. Not waited for until now, the child still has its pid.
    fn terminate(&mut self) {
        if let (Ok(None), Ok(pid)) = (self.child.try_wait(), i32::try_from(self.child.id()))
            && let Some(pid) = Pid::from_raw(pid)
        {
            let _ = kill_process(pid, rustix::process::Signal::TERM);
        }
    }
}

impl Drop for HeldCommand {
    /// Leaves no command behind after an error; a command that has ended already gets nothing.
    fn drop(&mut self) {
        self.terminate();
    }
}

/// Reports at the socket that it waits, and becomes the command as soon as a byte arrives. Returns only if that fails.
pub fn become_command(descriptor: i32, command: &[String]) -> io::Error {
    use std::os::unix::process::CommandExt as _;
    // SAFETY: the parent passes an open socket under this number, which nothing else owns here.
    let mut gate = UnixStream::from(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(descriptor) });
    match gate.write_all(b".").and_then(|()| gate.read(&mut [0_u8; 1])) {
        // The recorder has exited, so nothing would sample the command.
        Ok(0) => return io::Error::new(io::ErrorKind::BrokenPipe, "the recorder has ended"),
        Ok(_) => {}
        Err(error) => return error,
    }
    // Closed here, so that the command does not inherit it.
    drop(gate);
    let Some((program, arguments)) = command.split_first() else {
        return io::Error::new(io::ErrorKind::InvalidInput, "no command");
    };
    Command::new(program).args(arguments).exec()
}
