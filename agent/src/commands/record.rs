//! `gannet-agent record`: one profile, without a collector.

use std::{
    fs,
    io::{self, Write as _},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    process::{Child, Command, ExitStatus},
    time::{Duration, Instant, SystemTime},
};

use clap::{ArgGroup, Args};
use gannet_base::{ByteSize, TimeSpan};
use gannet_proto::{
    control::{Match, RuleError, capture},
    ledger::{Ledger, LossReason},
    pprof::{Merger, PprofError},
    profiles::Profile,
    rules::Caps,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use crate::{
    commands::check::{self, Refusal},
    engine::{Engine, EngineError, EngineOptions, Window},
    governor::Budgets,
    kernel::{KernelOptions, default_ring_bytes},
    output::{Destination, Details, OutputError},
    pipeline::finish,
    profile::SeriesProfile,
    rules::{Deny, RuleSource, SourceRules, ad_hoc},
    symbols::{DebugCost, Symbolizer, SymbolizerConfig, SymbolizerError},
    tables::TableSources,
};

/// How long a window is: what bounds the memory of a long recording.
const WINDOW: Duration = Duration::from_secs(10);
/// Windows that wait for their symbols.
const QUEUE: usize = 64;

/// Samples programs for a while and writes one profile.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  gannet-agent record --all --duration 10s -o all.svg
  gannet-agent record --comm 'python3*' -o python.pb.gz
  gannet-agent record -o build.html -- make -j8")]
#[command(group(ArgGroup::new("what").required(true).args(["all", "pid", "comm", "cgroup", "command"])))]
pub struct RecordArgs {
    /// Every process and every kernel thread
    #[arg(long)]
    pub all: bool,
    /// These processes and their children, by number
    #[arg(long, value_name = "N", num_args = 1.., value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: Vec<u32>,
    /// Processes with these command names: exact, or a prefix with * at its end
    #[arg(long, value_name = "PATTERN", num_args = 1..)]
    pub comm: Vec<String>,
    /// Processes in these control groups: a path below the hierarchy's root, exact, or a prefix with * at its end
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub cgroup: Vec<String>,
    /// Samples a second and CPU, 1 to 1000
    #[arg(long, default_value_t = 99, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub hz: u32,
    /// How long; a COMMAND is followed to its end unless this is given [default: 30s]
    #[arg(long, value_name = "TIME")]
    pub duration: Option<TimeSpan>,
    /// Blocked time instead of CPU time
    #[arg(long)]
    pub off_cpu: bool,
    /// The file to write; its ending chooses the format: .pb.gz (pprof), .folded, .svg or .html (flame graph)
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<Destination>,
    /// Print what became of the samples as one JSON object
    #[arg(long)]
    pub json: bool,
    /// Bytes of the ring between kernel and agent; rounded up to a power of two [default: 1 MiB for each CPU, 2 to 16 MiB]
    #[arg(long, value_name = "BYTES")]
    pub ring_bytes: Option<ByteSize>,
    /// A program to start and to profile from its first instruction, with its children
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Why no profile was written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// This machine cannot.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The kernel side cannot work.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// What was asked for is no rule.
    #[error("{}", list(.0))]
    Rule(Vec<RuleError>),
    /// The command cannot be run.
    #[error("cannot run `{command}`: {source}")]
    Command {
        /// What was asked for.
        command: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Nothing was sampled.
    #[error("no samples were taken in {0:.1?}: nothing that was asked for used a CPU")]
    Nothing(Duration),
    /// No symbolizer.
    #[error("frames cannot be named: {0}")]
    Symbols(#[from] SymbolizerError),
    /// The parts do not fit together.
    #[error("the windows do not make one profile: {0}")]
    Merge(#[from] PprofError),
    /// The file cannot be written.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// Signals, threads.
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

/// Errors name the field of a rule; here people gave flags.
fn flag_of(field: &str) -> &str {
    match field.split(['[', '.']).nth(1) {
        Some("comm") => "--comm",
        Some("cgroup") => "--cgroup",
        Some("pids") => "--pid",
        Some("hz") => "--hz",
        _ => field,
    }
}

/// Records and writes. The profile's ledger is printed to standard output, everything else to standard error.
pub async fn record(args: RecordArgs) -> Result<(), RecordError> {
    // Before anything that takes its time, so that whoever changes their mind is heard.
    let signals = Signals::listen().map_err(RecordError::Start)?;
    check::preflight()?;
    let destination =
        args.output.clone().unwrap_or_else(|| Destination::default_for(&subject(&args), SystemTime::now()));
    let debug_cost = if args.all { DebugCost::EVERYTHING } else { DebugCost::WANTED };
    let symbolizer = Symbolizer::start(SymbolizerConfig { debug_cost, ..SymbolizerConfig::default() })
        .map_err(RecordError::Start)?;
    let (windows, finished) = mpsc::channel(QUEUE);
    let naming = tokio::spawn(name_all(symbolizer, finished));
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
            budgets: Budgets::default(),
            tables: Some(TableSources::with_debug_files()),
        },
        // The queue holds minutes; if it is full nevertheless, the engine waits rather than losing a window: nobody
        // else depends on it here.
        move |window: Window| {
            let _ = windows.blocking_send(window);
        },
    )?;
    for degraded in engine.degraded() {
        tracing::warn!("degraded: {degraded}");
    }
    let mut held = if args.command.is_empty() { None } else { Some(Held::start(&args.command)?) };
    let matches = Match {
        comm: if args.all { vec!["*".into()] } else { args.comm.clone() },
        pids: held.as_ref().map_or_else(|| args.pid.clone(), |held| vec![held.child.id()]),
        cgroup: args.cgroup.clone(),
        ..Match::default()
    };
    let kind = if args.off_cpu { capture::Kind::OffCpu } else { capture::Kind::OnCpu };
    let rules = vec![ad_hoc("record", matches, args.hz, &[kind])];
    // What waits for the word is this very program; the command begins with its image.
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
    let status = until_end(held.as_mut(), duration, signals).await;
    let took = begun.elapsed();
    let ticks_due = engine.kernel_view().await?.ticks_due;
    // Joining the engine's thread takes as long as its last window's place in the queue.
    let _ = tokio::task::spawn_blocking(move || engine.stop()).await;
    let named = naming.await.map_err(|error| RecordError::Start(io::Error::other(error)))??;
    if let Some(status) = status.filter(|status| !status.success()) {
        tracing::warn!("the command ended with {status}");
    }
    let Some(mut profile) = named.profile else { return Err(RecordError::Nothing(took)) };
    // Merging adds the lengths of what it merges; these ran side by side.
    profile.duration_nanos = i64::try_from(took.as_nanos()).unwrap_or(i64::MAX);
    let details = Details { title: format!("gannet: {}", subject(&args)), ledger: named.ledger.clone() };
    destination.write(&profile, &details)?;
    print_ledger(&args, &destination, &named.ledger, ticks_due, start, took).map_err(RecordError::Start)
}

/// How long this process has run; zero where it cannot be told.
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

struct Named {
    profile: Option<Profile>,
    ledger: Ledger,
}

/// The series of a window as few profiles: here they all go into one, and each sample says its process.
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

/// Names and merges windows as they come.
async fn name_all(symbolizer: Symbolizer, mut windows: mpsc::Receiver<Window>) -> Result<Named, RecordError> {
    let mut merger = Merger::new();
    let mut ledger = Ledger::default();
    while let Some(window) = windows.recv().await {
        ledger.merge(&window.ledger);
        let profiles = join(window.profiles);
        let samples: Vec<u64> = profiles.iter().map(|profile| profile.samples).collect();
        let named = finish(&symbolizer, profiles, &window.ledger).await?;
        for (named, samples) in named.into_iter().zip(samples) {
            if let Err(error) = merger.add(&named) {
                tracing::warn!("a part of the profile is left out: {error}");
                ledger.delivered -= samples;
                ledger.lose(LossReason::Refused, samples);
            }
        }
    }
    Ok(Named { profile: merger.finish(), ledger })
}

/// Waits for the time, the command's end, or an interrupt.
async fn until_end(
    held: Option<&mut Held>,
    duration: Option<Duration>,
    mut signals: Signals,
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
    tokio::select! {
        status = ended => status,
        () = time => None,
        _ = signals.interrupt.recv() => None,
        _ = signals.terminate.recv() => None,
    }
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
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
    ticks_due: u64,
    start: Duration,
    took: Duration,
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if args.json {
        let lost: serde_json::Map<_, _> =
            ledger.lost.iter().map(|(reason, count)| (reason.to_string(), (*count).into())).collect();
        return writeln!(
            out,
            "{}",
            serde_json::json!({
                "taken": ledger.taken,
                "delivered": ledger.delivered,
                "lost": lost,
                "ticks": ledger.ticks,
                // By the kernel's own count of the clocks' running time.
                "ticks_due": ticks_due,
                // From the start of this program until its first tick could be taken.
                "start_seconds": start.as_secs_f64(),
                "seconds": took.as_secs_f64(),
                "output": destination.path(),
            })
        );
    }
    writeln!(
        out,
        "samples: {} taken, {} delivered, {} lost",
        ledger.taken,
        ledger.delivered,
        ledger.lost_total()
    )?;
    for (reason, count) in ledger.lost.iter().filter(|(_, count)| **count > 0) {
        writeln!(out, "  lost {reason}: {count}")?;
    }
    writeln!(out, "written: {}", destination.path().display())
}

/// A command that waits for the word before it starts, so that it is armed before its first instruction.
struct Held {
    child: Child,
    gate: Option<OwnedFd>,
}

/// The hidden verb that waits on descriptor N and then becomes the command.
pub const HELD_VERB: &str = "held-command";

impl Held {
    fn start(command: &[String]) -> Result<Self, RecordError> {
        let failed = |source| RecordError::Command { command: command.join(" "), source };
        let (reader, gate) = io::pipe().map_err(failed)?;
        // The child inherits the reading end under its own number.
        let passed = rustix::io::dup(&reader).map_err(|e| failed(e.into()))?;
        let child = Command::new("/proc/self/exe")
            .arg(HELD_VERB)
            .arg(passed.as_raw_fd().to_string())
            .arg("--")
            .args(command)
            .spawn()
            .map_err(failed)?;
        drop(passed);
        Ok(Self { child, gate: Some(gate.into()) })
    }

    fn release(&mut self) {
        if let Some(gate) = self.gate.take() {
            let _ = rustix::io::write(gate.as_fd(), b"!");
        }
    }
}

/// Becomes the command as soon as there is a byte to read. Only returns if it cannot.
pub fn become_command(descriptor: i32, command: &[String]) -> io::Error {
    use std::os::unix::process::CommandExt as _;
    // SAFETY: the number was given by the parent, which passes an open pipe under it.
    let gate = unsafe { std::os::fd::BorrowedFd::borrow_raw(descriptor) };
    match rustix::io::read(gate, &mut [0_u8; 1]) {
        // The recorder is gone: there is nobody to run it for.
        Ok(0) => return io::Error::new(io::ErrorKind::BrokenPipe, "the recorder has ended"),
        Ok(_) => {}
        Err(error) => return error.into(),
    }
    // SAFETY: nothing else uses the descriptor; the command shall not inherit it.
    drop(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(descriptor) });
    let Some((program, arguments)) = command.split_first() else {
        return io::Error::new(io::ErrorKind::InvalidInput, "no command");
    };
    Command::new(program).args(arguments).exec()
}
