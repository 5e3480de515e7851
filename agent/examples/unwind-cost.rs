//! The cost of a sample inside the kernel: runs a program (of `benches/deep.c`), samples it alone, and prints one line of JSON.
//! Needs root, and sets kernel.bpf_stats_enabled meanwhile.
//!
//! `unwind-cost PROGRAM [ARGUMENT...]`, in the environment `HZ` (997) and `SECONDS` (3).
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

const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Programs that end with this one.
struct Children(Vec<Child>);

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
    let Some(program) = arguments.next() else { bail!("unwind-cost PROGRAM [ARGUMENT...]") };
    let arguments: Vec<String> = arguments.collect();
    let number = |name: &str, default| env::var(name).map_or(Ok(default), |text| text.parse::<u32>());
    let (hz, seconds) = (number("HZ", 997)?, number("SECONDS", 3)?);
    let before = fs::read_to_string(STATS).context(STATS)?;
    fs::write(STATS, "1").context(STATS)?;
    let result = measure(&program, &arguments, hz, Duration::from_secs(seconds.into())).await;
    fs::write(STATS, before).context(STATS)?;
    println!("{}", result?);
    Ok(())
}

async fn measure(
    program: &str,
    arguments: &[String],
    hz: u32,
    time: Duration,
) -> anyhow::Result<serde_json::Value> {
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
    let mut children = Children(Vec::new());
    for _ in 0..cpus {
        children.0.push(Command::new(program).args(arguments).spawn().context("cannot run the program")?);
    }
    // The cost of a tick that finds no matching process.
    sample(&engine, Match { comm: vec!["no-such-program".into()], ..Match::default() }, hz).await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let unmatched = snapshot(&engine).await?;
    let unmatched_ns = unmatched.0 as f64 / unmatched.1.max(1) as f64;
    sample(&engine, Match { pids: children.0.iter().map(Child::id).collect(), ..Match::default() }, hz)
        .await?;
    // Raw samples come first.
    tokio::time::sleep(Duration::from_secs(1)).await;
    engine.flush().await?;
    let begin = snapshot(&engine).await?;
    let (samples, frames) = (seen.samples.load(Ordering::Relaxed), seen.frames.load(Ordering::Relaxed));
    tokio::time::sleep(time).await;
    let end = snapshot(&engine).await?;
    engine.flush().await?;
    let programs = engine.kernel_view().await?.programs;
    drop(children);
    engine.stop();
    let samples = (seen.samples.load(Ordering::Relaxed) - samples).max(1);
    let frames = seen.frames.load(Ordering::Relaxed) - frames;
    let (run_ns, runs, taken) = (end.0 - begin.0, end.1 - begin.1, (end.2 - begin.2).max(1));
    let per_sample = (run_ns as f64 - unmatched_ns * (runs - taken.min(runs)) as f64) / taken as f64;
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
