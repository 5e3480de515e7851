//! The cost of a sample inside the kernel: runs a program (of `benches/deep.c`), samples it alone, and prints one line of JSON.
//! Needs root, and sets kernel.bpf_stats_enabled meanwhile.
//!
//! `unwind-cost PROGRAM [ARGUMENT...] [--against PROGRAM [ARGUMENT...]]`, in the environment `HZ` (997) and `SECONDS` (3).
//! With `--against` the two programs run in turns of a quarter of a second, so that noise of the machine meets both alike, and the
//! line says how much more a sample of the second one costs than one of the first: the median of all pairs of turns.
#![allow(clippy::print_stdout, reason = "the output of the program")]

use std::{
    env, fs,
    process::{Child, Command},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use gannet_agent::{
    engine::{Engine, EngineOptions, Window},
    kernel::KernelOptions,
    rules::{Deny, RuleSource, SourceRules, ad_hoc},
    tables::TableSources,
};
use gannet_proto::{
    control::{Match, capture},
    rules::Caps,
};
use rustix::process::{Pid, Signal, kill_process};

const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Time of a turn, and of the start of programs that take turns.
const TURN: Duration = Duration::from_millis(250);
const START: Duration = Duration::from_secs(4);

/// Programs that end with this one.
struct Children(Vec<Child>);

impl Children {
    fn start(command: &[String], copies: usize) -> anyhow::Result<Self> {
        let mut all = Self(Vec::new());
        let Some((program, arguments)) = command.split_first() else { return Ok(all) };
        for _ in 0..copies {
            all.0.push(Command::new(program).args(arguments).spawn().context(program.clone())?);
        }
        Ok(all)
    }

    fn pids(&self) -> impl Iterator<Item = u32> {
        self.0.iter().map(Child::id)
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        for child in &self.0 {
            kill_process(Pid::from_child(child), signal)?;
        }
        Ok(())
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[derive(Default)]
struct Seen {
    samples: AtomicU64,
    frames: AtomicU64,
}

/// Run time, runs, and samples.
type Measure = (u64, u64, u64);

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut arguments = env::args().skip(1);
    let first: Vec<String> = arguments.by_ref().take_while(|argument| argument != "--against").collect();
    let second: Vec<String> = arguments.collect();
    if first.is_empty() {
        bail!("unwind-cost PROGRAM [ARGUMENT...] [--against PROGRAM [ARGUMENT...]]");
    }
    let number = |name: &str, default| env::var(name).map_or(Ok(default), |text| text.parse::<u32>());
    let (hz, seconds) = (number("HZ", 997)?, number("SECONDS", 3)?);
    let before = fs::read_to_string(STATS).context(STATS)?;
    fs::write(STATS, "1").context(STATS)?;
    let result = measure([&first, &second], hz, Duration::from_secs(seconds.into())).await;
    fs::write(STATS, before).context(STATS)?;
    println!("{}", result?);
    Ok(())
}

/// Runs the first command, or both in turns if the second one is not empty.
async fn measure(commands: [&[String]; 2], hz: u32, time: Duration) -> anyhow::Result<serde_json::Value> {
    let seen = Arc::new(Seen::default());
    let counted = Arc::clone(&seen);
    let options = EngineOptions {
        start_labels: None,
        node: "here".into(),
        kernel: KernelOptions::default(),
        window: Duration::from_secs(600),
        caps: Caps { ttl_above_hz: u32::MAX, ..Caps::default() },
        deny: Deny::default(),
        budgets: gannet_agent::governor::Budgets::default(),
        tables: Some(TableSources::with_debug_files()),
    };
    let engine = Engine::start(options, move |window: Window| {
        for stack in window.profiles.iter().flat_map(|p| &p.raw.processes).flat_map(|p| &p.stacks) {
            counted.samples.fetch_add(stack.count, Ordering::Relaxed);
            counted.frames.fetch_add(stack.count * stack.user.len() as u64, Ordering::Relaxed);
        }
    })?;
    // One process for each CPU, so that nearly every tick finds one of them.
    let cpus = gannet_agent::model::online_cpus()?.len();
    let groups = [Children::start(commands[0], cpus)?, Children::start(commands[1], cpus)?];
    // The cost of a tick that finds no matching process.
    sample(&engine, Match { comm: vec!["no-such-program".into()], ..Match::default() }, hz).await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let unmatched = snapshot(&engine).await?;
    let unmatched_ns = unmatched.0 as f64 / unmatched.1.max(1) as f64;
    sample(&engine, Match { pids: groups.iter().flat_map(Children::pids).collect(), ..Match::default() }, hz)
        .await?;
    if !commands[1].is_empty() {
        let (taken, more) = turns(&engine, &groups, unmatched_ns, time).await?;
        engine.stop();
        return Ok(serde_json::json!({ "what": "turns", "hz": hz, "samples": taken, "ns_more": more }));
    }
    // Raw samples come first.
    tokio::time::sleep(Duration::from_secs(1)).await;
    engine.flush().await?;
    let begin = snapshot(&engine).await?;
    let (samples, frames) = (seen.samples.load(Ordering::Relaxed), seen.frames.load(Ordering::Relaxed));
    tokio::time::sleep(time).await;
    let end = snapshot(&engine).await?;
    engine.flush().await?;
    let programs = engine.kernel_view().await?.programs;
    drop(groups);
    engine.stop();
    let samples = (seen.samples.load(Ordering::Relaxed) - samples).max(1);
    let frames = seen.frames.load(Ordering::Relaxed) - frames;
    let (runs, taken) = (end.1 - begin.1, end.2 - begin.2);
    let per_sample = ns_per_sample(begin, end, unmatched_ns);
    let per_stack = frames as f64 / samples as f64;
    Ok(serde_json::json!({
        "what": "unwind",
        "hz": hz,
        "samples": taken,
        "runs": runs,
        "frames_per_sample": per_stack,
        "ns_per_sample": per_sample,
        "ns_per_frame": per_sample / per_stack,
        "ns_per_unmatched_tick": unmatched_ns,
        "verified_instructions": programs
            .iter()
            .map(|program| (program.name.to_owned(), program.verified_instructions.into()))
            .collect::<serde_json::Map<_, _>>(),
    }))
}

/// Lets two groups of programs run in turns. Returns how many samples it took, and the median of what a sample of the second group
/// costs more, in nanoseconds.
async fn turns(
    engine: &Engine,
    groups: &[Children; 2],
    unmatched_ns: f64,
    time: Duration,
) -> anyhow::Result<(u64, f64)> {
    // The agent inspects both first.
    tokio::time::sleep(START).await;
    for group in groups {
        group.signal(Signal::STOP)?;
    }
    let (mut taken, mut more) = (0, Vec::new());
    for _ in 0..(time.as_millis() / TURN.as_millis() / 2).max(1) {
        let mut costs = [0.0; 2];
        for (group, cost) in groups.iter().zip(&mut costs) {
            group.signal(Signal::CONT)?;
            let begin = snapshot(engine).await?;
            tokio::time::sleep(TURN).await;
            let end = snapshot(engine).await?;
            group.signal(Signal::STOP)?;
            *cost = ns_per_sample(begin, end, unmatched_ns);
            taken += end.2 - begin.2;
        }
        more.push(costs[1] - costs[0]);
    }
    more.sort_by(f64::total_cmp);
    Ok((taken, more[more.len() / 2]))
}

/// Returns the run time of a sample, without that of ticks that took none.
fn ns_per_sample(begin: Measure, end: Measure, unmatched_ns: f64) -> f64 {
    let (run_ns, runs, taken) = (end.0 - begin.0, end.1 - begin.1, end.2 - begin.2);
    (run_ns as f64 - unmatched_ns * (runs - taken.min(runs)) as f64) / taken.max(1) as f64
}

async fn sample(engine: &Engine, matches: Match, hz: u32) -> anyhow::Result<()> {
    let set = SourceRules {
        rules: vec![ad_hoc("cost", matches, hz, &[capture::Kind::OnCpu])],
        ..SourceRules::default()
    };
    match engine.replace(RuleSource::Local, set).await {
        Ok(_) => Ok(()),
        Err(errors) => bail!("{errors:?}"),
    }
}

async fn snapshot(engine: &Engine) -> anyhow::Result<Measure> {
    let cost = engine.kernel_view().await?.sampler_cost;
    let counters = engine.view().await?.counters.context("the kernel's counters cannot be read")?;
    let (run_ns, runs) = cost.context("the kernel counted no run of the sampler")?;
    Ok((run_ns, runs, counters.taken))
}
