//! Measures the time from a rule change to the first sample: a real collector, a real agent, a busy program.
//! `scripts/bench rules` calls it; it needs root.

#![expect(clippy::print_stdout, clippy::expect_used, reason = "a measurement that prints its result")]

use std::{
    fs,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use gannet_e2e::{Agent, Collector, Sample, http_get, rule};
use gannet_proto::rules::to_yaml;

/// Changes rules through the collector and through a file, and prints the time until the node has a sample of each.
#[derive(Parser)]
struct Args {
    /// Number of changes of each kind
    #[arg(long, default_value_t = 100)]
    rounds: u32,
    /// Fail if the median is above this
    #[arg(long, value_name = "SECONDS")]
    median: Option<f64>,
    /// Fail if the 99th percentile is above this
    #[arg(long, value_name = "SECONDS")]
    p99: Option<f64>,
}

const SAMPLE_TIMEOUT: Duration = Duration::from_secs(30);
/// A node has 48 rule slots, and each round takes two. The node reuses the slot of a removed rule at the first window after
/// twelve seconds.
const PAUSE: Duration = Duration::from_millis(600);

fn main() -> ExitCode {
    let args = Args::parse();
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(run(&args)),
        Err(error) => {
            eprintln!("rule-latency: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> ExitCode {
    let collector = Collector::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("rules.yaml");
    fs::write(&file, "rules: []\n").expect("the rule file is written");
    let agent =
        Agent::start("bench", &collector.url(), &[&format!("--rules={}", file.display()), "--window=1s"]);
    agent.connected(&collector).await;
    let _sample = Sample::start(100);
    let (mut pushed, mut written) = (Vec::new(), Vec::new());
    for round in 0..args.rounds {
        let id = format!("pushed-{round}");
        let begin = Instant::now();
        collector.set_rules(vec![rule(&id, "webshop", 99)]).await.expect("the rules are accepted");
        pushed.push(sampled(&agent, &id, begin).await);

        let id = format!("written-{round}");
        let aside = directory.path().join("aside");
        fs::write(&aside, to_yaml(&[rule(&id, "webshop", 99)])).expect("the rule file is written");
        let begin = Instant::now();
        fs::rename(&aside, &file).expect("the rule file is replaced");
        written.push(sampled(&agent, &id, begin).await);
        tokio::time::sleep(PAUSE).await;
    }
    let mut good = true;
    for (what, mut times) in [("SetTriggers", pushed), ("a rule file", written)] {
        times.sort_unstable();
        let at = |share: f64| times[((times.len() - 1) as f64 * share).ceil() as usize].as_secs_f64();
        let (median, p99) = (at(0.5), at(0.99));
        println!(
            "from {what} to the first sample, {} times: median {:.0} ms, p99 {:.0} ms, longest {:.0} ms",
            times.len(),
            median * 1e3,
            p99 * 1e3,
            at(1.0) * 1e3
        );
        good &= args.median.is_none_or(|max| median <= max) && args.p99.is_none_or(|max| p99 <= max);
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Polls the node until it has a sample of the rule, and returns the time since `begin`.
async fn sampled(agent: &Agent, id: &str, begin: Instant) -> Duration {
    loop {
        if let Some((200, body)) = http_get(&agent.debug(), "/debug/rules?format=json").await {
            let rules: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
            let samples = rules
                .as_array()
                .into_iter()
                .flatten()
                .find(|rule| rule["id"] == id)
                .and_then(|rule| rule["samples"].as_u64());
            if samples.is_some_and(|samples| samples > 0) {
                return begin.elapsed();
            }
        }
        assert!(begin.elapsed() < SAMPLE_TIMEOUT, "no sample of rule {id} within {SAMPLE_TIMEOUT:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
