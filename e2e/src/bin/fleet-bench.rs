//! Measures a collector with a fleet of simulated nodes on real connections. `scripts/bench rules` calls it.

#![expect(clippy::print_stdout, reason = "a measurement that prints its result")]

use std::{fs, process::ExitCode, time::Duration};

use clap::Parser;
use gannet_e2e::{Collector, Fleet, eventually_within, push_round};

/// Pushes rules to a simulated fleet and prints how long they take and what the collector needs.
#[derive(Parser)]
struct Args {
    /// Number of simulated nodes
    #[arg(long, default_value_t = 1000)]
    nodes: u64,
    /// Number of rule sets to push, one after the other
    #[arg(long, default_value_t = 20)]
    rounds: u32,
    /// Number of rules in each set
    #[arg(long, default_value_t = 20)]
    rules: u32,
    /// Fail if the 99th percentile of the push times is above this
    #[arg(long, value_name = "SECONDS")]
    within: Option<f64>,
    /// Fail if the collector uses more memory than this
    #[arg(long, value_name = "MIB")]
    memory: Option<f64>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("fleet-bench: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(run(&args))
}

async fn run(args: &Args) -> ExitCode {
    let mut collector = Collector::start().await;
    let fleet = Fleet::start(&collector.url(), args.nodes, Duration::from_secs(10)).await;
    let mut times = Vec::new();
    for round in 0..args.rounds {
        times.push(push_round(&collector, round, args.rules, args.nodes).await);
    }
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share).ceil() as usize].as_secs_f64();
    let (median, p99) = (at(0.5), at(0.99));
    let memory = peak_mib(collector.program().pid());

    // The collector restarts: all nodes reconnect, and receive no rule set that they have.
    let pushed = fleet.pushed();
    collector.program().kill();
    eventually_within(Duration::from_secs(60), "no node is connected", async || {
        (fleet.counts.connected.load(std::sync::atomic::Ordering::Relaxed) == 0).then_some(())
    })
    .await;
    let begin = std::time::Instant::now();
    collector.up().await;
    fleet.connected().await;
    let back = begin.elapsed();
    let again = fleet.pushed() - pushed;
    let after = peak_mib(collector.program().pid());

    println!("{} nodes, {} rounds of {} rules", args.nodes, args.rounds, args.rules);
    println!("from SetTriggers to the last answer: median {median:.3} s, p99 {p99:.3} s");
    println!("peak memory of the collector: {memory:.1} MiB; after its restart {after:.1} MiB");
    println!(
        "after its restart all nodes were connected within {:.1} s, and {again} rule sets were pushed",
        back.as_secs_f64()
    );
    let mut good = again == 0;
    if let Some(within) = args.within {
        good &= p99 <= within;
    }
    if let Some(max) = args.memory {
        good &= memory.max(after) <= max;
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Returns the peak memory of a process by the kernel's account, in MiB.
fn peak_mib(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<f64>().ok());
    kib.unwrap_or(f64::NAN) / 1024.0
}
