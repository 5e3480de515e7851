//! `gannet-agent top`: samples and feeds the live table.

mod model;
mod screen;
mod snapshot;
mod view;

use std::{
    io::{self, Write as _},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use clap::Args;
use gannet_base::TimeSpan;
use gannet_proto::{
    control::{Match, RuleError},
    rules::Caps,
};
use tokio::sync::mpsc;

pub use screen::ScreenError;
use snapshot::{ProcessInfo, Snapshot};

use crate::{
    commands::{
        check::{self, Refusal},
        local::LocalArgs,
    },
    engine::{Engine, EngineError, EngineOptions, EngineView, ProcessView, Window},
    kernel::KernelOptions,
    pipeline::finish,
    process::ProcessState,
    rules::{Deny, RuleSource, SourceRules, ad_hoc},
    symbols::{DebugCost, Symbolizer, SymbolizerConfig, SymbolizerError},
};

/// Arguments of `top`.
#[derive(Args, Clone, Debug)]
pub struct TopArgs {
    /// Sampling rate in samples per second and CPU, 1 to 1000
    #[arg(long, default_value_t = 49, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) hz: u32,
    /// Show only processes with these command names: exact, or a prefix with * at its end
    #[arg(long, value_name = "PATTERN", num_args = 1..)]
    pub(crate) comm: Vec<String>,
    /// Time between updates of the table
    #[arg(long, value_name = "TIME", default_value = "2s")]
    pub(crate) interval: TimeSpan,
    /// Print the table once as text and exit
    #[arg(long)]
    pub(crate) once: bool,
    /// Number of processes that --once prints
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) rows: usize,
    /// Settings of the engine.
    #[command(flatten)]
    pub(crate) local: LocalArgs,
}

/// Reasons why `top` shows no table.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// A required check failed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The engine cannot start, or has ended.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The terminal cannot be used.
    #[error(transparent)]
    Screen(#[from] ScreenError),
    /// The arguments make no valid rule.
    #[error("{}", .0.iter().map(|error| format!("--comm: {}", error.reason)).collect::<Vec<_>>().join("; "))]
    Rule(Vec<RuleError>),
    /// The symbolizer has failed.
    #[error("cannot symbolize frames: {0}")]
    Symbols(#[from] SymbolizerError),
    /// A thread cannot start, or the output fails.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Samples and shows the table until the user leaves.
pub async fn top(args: TopArgs) -> Result<(), TopError> {
    if !args.once {
        screen::require_terminal()?;
    }
    check::preflight(args.local.unsafe_kernel())?;
    let debug_cost = if args.comm.is_empty() { DebugCost::EVERYTHING } else { DebugCost::WANTED };
    let symbolizer = Symbolizer::start(SymbolizerConfig { debug_cost, ..SymbolizerConfig::default() })?;
    let (windows, mut finished) = mpsc::channel::<Window>(4);
    let skipped = Arc::new(AtomicU64::new(0));
    let skipping = Arc::clone(&skipped);
    let engine = Engine::start(
        EngineOptions {
            start_labels: None,
            node: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            kernel: KernelOptions { off_cpu: false, ..KernelOptions::default() },
            window: args.interval.0.max(Duration::from_millis(200)),
            caps: Caps { ttl_above_hz: u32::MAX, ..Caps::default() },
            deny: Deny::default(),
            budgets: args.local.budgets(),
            tables: Some(args.local.tables()),
        },
        // A screen that is late skips this window.
        move |window: Window| {
            if windows.try_send(window).is_err() {
                skipping.fetch_add(1, Relaxed);
            }
        },
    )?;
    let comm = if args.comm.is_empty() { vec!["*".to_owned()] } else { args.comm.clone() };
    let rules = vec![ad_hoc("top", Match { comm, ..Match::default() }, args.hz, &[])];
    engine
        .replace(RuleSource::Local, SourceRules { rules, ..SourceRules::default() })
        .await
        .map_err(TopError::Rule)?;
    let (snapshots, feed) = mpsc::channel(4);
    let mut screen = (!args.once).then(|| tokio::task::spawn_blocking(move || screen::run(feed)));
    loop {
        let window = tokio::select! {
            window = finished.recv() => window.ok_or(EngineError::Ended)?,
            left = async { match &mut screen { Some(screen) => screen.await, None => std::future::pending().await } } => {
                return Ok(left.map_err(io::Error::other)??);
            }
        };
        let snapshot = snapshot(&engine, &symbolizer, window, skipped.load(Relaxed)).await?;
        if args.once {
            write!(io::stdout(), "{}", screen::once(&snapshot, args.rows))?;
            return Ok(());
        }
        // A slow screen misses a snapshot. A screen that has ended ends the loop above.
        if snapshots.try_send(snapshot).is_err() {
            skipped.fetch_add(1, Relaxed);
        }
    }
}

async fn snapshot(
    engine: &Engine,
    symbolizer: &Symbolizer,
    window: Window,
    skipped: u64,
) -> Result<Snapshot, TopError> {
    let profiles = finish(symbolizer, window.profiles, &window.ledger).await?;
    let processes = engine.processes(None).await?;
    let EngineView { ledger, governed, .. } = engine.view().await?;
    let processes = infos(&processes);
    Ok(Snapshot { duration: window.duration, profiles, processes, ledger, skipped, governed })
}

fn infos(processes: &[ProcessView]) -> Vec<ProcessInfo> {
    processes
        .iter()
        .filter(|process| process.samples > 0)
        .map(|process| ProcessInfo {
            key: process.key.process,
            comm: process.comm.clone(),
            owner: owner(process),
            rule: process.rules.first().cloned().unwrap_or_default(),
            state: state(process),
            interpreter: process.interpreter.clone(),
        })
        .collect()
}

/// Returns the state of a process and the number of its samples that wait for unwind tables.
fn state(process: &ProcessView) -> String {
    let state = match process.state {
        ProcessState::Alive if process.rules.is_empty() => "no rule",
        ProcessState::Alive => "sampled",
        ProcessState::Unread => "not read yet",
        ProcessState::Replaced => "replaced",
        ProcessState::Ended(_) => "ended",
        ProcessState::Missed => "unread",
    };
    let state = match process.waiting_samples {
        0 => state.to_owned(),
        samples => format!("{state}, {samples} wait"),
    };
    with_interpreter(state, &process.interpreter)
}

/// Adds why the interpreted functions of a process have no names. One whose names are read needs no words.
fn with_interpreter(state: String, interpreter: &str) -> String {
    if interpreter.is_empty() || interpreter.ends_with(": ok") {
        return state;
    }
    format!("{state}; {interpreter}")
}

/// Returns the unit of a process, or its container, or its executable.
fn owner(process: &ProcessView) -> String {
    let names = &process.names;
    match () {
        () if !names.unit.is_empty() => names.unit.clone(),
        () if !names.container_id.is_empty() => names.container_id.chars().take(12).collect(),
        () => process.exe.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_says_why_functions_have_no_names() {
        let of = |interpreter: &str| with_interpreter("sampled".into(), interpreter);
        assert_eq!(of(""), "sampled");
        assert_eq!(of("python 3.11.2: ok"), "sampled");
        assert_eq!(
            of("python 3.15.0: this version is not supported"),
            "sampled; python 3.15.0: this version is not supported"
        );
    }
}
