//! Measures the store for a fleet: the collector next to the one that wrote an object for each series and window, in one run and in
//! turns. `scripts/bench fleet` builds both and calls it.
//!
//! It has four parts. A fleet of nodes pushes real profiles at its own pace. Some connections push made profiles as fast as the
//! collector takes them. The store is filled, the collector starts again, and answers queries. Many series are listed.

#![allow(clippy::print_stdout, reason = "a program for people: its result goes to its output")]

mod agent;
mod made;
mod process;
mod profiles;
mod queries;
mod report;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clap::Parser;
use gannet_proto::pprof::{Encoding, Profile};
use tokio::task::JoinSet;

use agent::{Counts, Pod, Stream, WINDOW, agent, push};
use made::{Random, profile};
use process::{Program, Running, drop_from_memory, files};
use profiles::{Encoded, encoded, smallest, variations};
use queries::{Queries, Range, percentile};
use report::{Goal, Report};

#[derive(Parser)]
#[command(about = "Measures the store for a fleet next to its former layout")]
struct Arguments {
    /// A collector with its options; the first is the former one, and each later one is compared with the goals
    #[arg(long, value_name = "NAME=PROGRAM OPTION...", required = true)]
    collector: Vec<String>,
    /// Directory with recorded profiles to multiply
    #[arg(long, value_name = "DIR")]
    profiles: PathBuf,
    /// Directory for the data of the collectors, on the disk to measure
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// File for the figures, as lines of JSON
    #[arg(long, default_value = "fleet.jsonl")]
    json: PathBuf,
    /// Turns of the measurements of ingest
    #[arg(long, default_value_t = 2)]
    rounds: u32,
    /// Time of each of them, after some seconds to warm up
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Nodes of the fleet that pushes at its own pace
    #[arg(long, default_value_t = 150)]
    nodes: u64,
    /// Pods of the wide flame graph
    #[arg(long, default_value_t = 1000)]
    pods: u64,
    /// Hours of the flame graph of one service with 20 pods
    #[arg(long, default_value_t = 2)]
    hours: u64,
    /// Series to list
    #[arg(long, default_value_t = 200_000)]
    series: u64,
}

/// Series of a node of the fleet.
const SERIES: u64 = 30;
/// Services of the pods of the wide flame graph.
const SERVICES: u64 = 30;
/// Pods of the service of the long flame graph.
const SERVICE_PODS: u64 = 20;
/// Windows of the wide flame graph: six minutes.
const WINDOWS: u64 = 36;
/// Series that also the former collector lists.
const FORMER_SERIES: u64 = 20_000;
const CONNECTIONS: u64 = 50;
const IN_FLIGHT: usize = 16;
/// Samples of a busy core and day, at 99 Hz.
const CORE_DAY_SAMPLES: f64 = 99.0 * 86_400.0;
/// The fleet of the extrapolation.
const FLEET_BATCHES: f64 = 10_000.0 * 30.0 / 10.0;

/// What pushes to a collector.
#[derive(Clone, Copy, PartialEq)]
enum Load {
    /// A fleet at its own pace.
    Fleet,
    /// Connections that push as fast as they can.
    Full(Wire),
}

#[derive(Clone, Copy, PartialEq)]
enum Wire {
    Gzip,
    Zstd,
    Pieces,
}

impl Wire {
    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Pieces => "zstd-pieces",
        }
    }
}

struct Bench {
    arguments: Arguments,
    programs: Vec<Program>,
    /// Variations of the recorded profiles.
    recorded: Arc<Vec<Encoded>>,
    /// Made profiles of 13 kB in gzip, each with the number of its samples.
    made: Vec<(Profile, u64)>,
    report: Report,
}

impl Bench {
    fn data(&self, program: usize) -> anyhow::Result<PathBuf> {
        let data = self.arguments.dir.join(format!("fleet-data-{}", self.programs[program].name));
        if data.exists() {
            fs::remove_dir_all(&data)?;
        }
        Ok(data)
    }

    /// Measures the acknowledgements of one collector under one load.
    async fn ingest(&mut self, program: usize, load: Load) -> anyhow::Result<()> {
        let data = self.data(program)?;
        let running = Running::start(&self.programs[program], &data, None).await?;
        let counts = Arc::new(Counts::default());
        let mut agents = JoinSet::new();
        match load {
            Load::Fleet => {
                for node in 0..self.arguments.nodes {
                    let stream = Stream::open(
                        running.connect().await?,
                        node,
                        SERIES as usize,
                        false,
                        Arc::clone(&counts),
                    )
                    .await?;
                    let pods =
                        (0..SERIES).map(|service| Pod { namespace: "shop", service, number: node }).collect();
                    // Agents begin at different times.
                    let phase = WINDOW.mul_f64((node * 7919 % 10_000) as f64 / 1e4);
                    agents.spawn(agent(stream, pods, Arc::clone(&self.recorded), phase));
                }
            }
            Load::Full(wire) => {
                let encoding = match wire {
                    Wire::Gzip => Some(Encoding::Gzip),
                    Wire::Zstd => Some(Encoding::Zstd),
                    Wire::Pieces => None,
                };
                let profiles = Arc::new(encoded(&self.made, encoding));
                for node in 0..CONNECTIONS {
                    let as_pieces = wire == Wire::Pieces;
                    let stream = Stream::open(
                        running.connect().await?,
                        node,
                        IN_FLIGHT,
                        as_pieces,
                        Arc::clone(&counts),
                    )
                    .await?;
                    let profiles = Arc::clone(&profiles);
                    let batches = (0_u64..).map(move |n| {
                        let pod = Pod { namespace: "shop", service: n % SERIES, number: node };
                        pod.batch(
                            SystemTime::now() - WINDOW,
                            &profiles[(node * 31 + n) as usize % profiles.len()],
                        )
                    });
                    agents.spawn(push(stream, IN_FLIGHT, batches));
                }
            }
        }
        // Every node of the fleet pushes once before.
        tokio::time::sleep(if load == Load::Fleet { WINDOW } else { Duration::from_secs(2) }).await;
        let (before, objects) = (running.usage()?, files(&data.join("objects")).0);
        let began = Instant::now();
        counts.is_measuring.store(true, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(self.arguments.seconds)).await;
        counts.is_measuring.store(false, Ordering::Relaxed);
        let took = began.elapsed().as_secs_f64();
        let (after, objects) = (running.usage()?, files(&data.join("objects")).0 - objects);
        if let Some(ended) = agents.try_join_next() {
            ended??;
            anyhow::bail!("an agent has ended");
        }
        agents.shutdown().await;
        running.stop()?;
        fs::remove_dir_all(&data)?;
        let mut latencies = std::mem::take(&mut *counts.latencies.lock());
        latencies.sort_unstable();
        let rates = Rates {
            batches: latencies.len() as f64,
            cpu_seconds: after.cpu_seconds - before.cpu_seconds,
            objects: objects as f64 / took,
            p50: percentile(&latencies, 0.5),
            p99: percentile(&latencies, 0.99),
            peak_mib: after.peak_mib,
            throttled: counts.throttled.load(Ordering::Relaxed),
            took,
        };
        self.report_ingest(program, load, &rates);
        Ok(())
    }

    fn report_ingest(&mut self, program: usize, load: Load, rates: &Rates) {
        let Rates { batches, cpu_seconds, objects, p50, p99, peak_mib, throttled, took } = *rates;
        let of = match load {
            Load::Fleet => format!("{} nodes with {SERIES} series", self.arguments.nodes),
            Load::Full(wire) => format!("800 in flight, {} of 13 kB", wire.name()),
        };
        let most = match load {
            Load::Fleet => Goal::None,
            Load::Full(Wire::Gzip) => Goal::AtLeast(3000.0),
            Load::Full(Wire::Zstd) => Goal::AtLeast(4000.0),
            Load::Full(Wire::Pieces) => Goal::AtLeast(50_000.0),
        };
        let report = &mut self.report;
        let mut add =
            |what: &str, unit, value, goal| report.add(program, &format!("{of}: {what}"), unit, value, goal);
        add("acknowledged batches", "1/s", batches / took, Goal::None);
        add("acknowledged batches by CPU time", "1/s of CPU", batches / cpu_seconds, most);
        add("acknowledgement, median", "s", p50, Goal::AtMost(0.6));
        add("acknowledgement, 99th percentile", "s", p99, Goal::AtMost(1.0));
        add("objects written", "1/s", objects, Goal::AtMost(2.0));
        add("peak memory", "MiB", peak_mib, Goal::AtMost(1024.0));
        if throttled > 0 {
            add("put off", "batches", throttled as f64, Goal::None);
        }
        if load == Load::Fleet {
            let cores = FLEET_BATCHES * cpu_seconds / batches;
            add("cores for 10,000 nodes, extrapolated", "cores", cores, Goal::None);
            // The former one writes an object for each batch, and each collector of two cores at most two objects otherwise.
            let of_fleet = if program == 0 {
                objects * FLEET_BATCHES * took / batches
            } else {
                objects * (cores / 2.0).ceil()
            };
            add("objects written for 10,000 nodes, extrapolated", "1/s", of_fleet, Goal::None);
        }
    }

    /// Pushes batches over some connections until all are acknowledged.
    async fn fill(
        running: &Running,
        batch: impl Fn(u64) -> gannet_proto::ingest::Batch + Clone + Send + 'static,
        number: std::ops::Range<u64>,
    ) -> anyhow::Result<()> {
        let counts = Arc::new(Counts::default());
        let mut agents = JoinSet::new();
        for node in 0..CONNECTIONS {
            let stream =
                Stream::open(running.connect().await?, node, IN_FLIGHT, false, Arc::clone(&counts)).await?;
            let (batch, number) = (batch.clone(), number.clone());
            let batches = number.skip(node as usize).step_by(CONNECTIONS as usize).map(batch);
            agents.spawn(push(stream, IN_FLIGHT, batches));
        }
        while let Some(ended) = agents.join_next().await {
            ended??;
        }
        Ok(())
    }

    /// Fills the store of a collector, starts it again, and measures sizes and queries.
    async fn queries(&mut self, program: usize) -> anyhow::Result<()> {
        let Arguments { pods, hours, .. } = self.arguments;
        let data = self.data(program)?;
        // An hour that is over, so that merges of tables end.
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let end = UNIX_EPOCH + Duration::from_secs((now_s - 660) / 3600 * 3600);
        let wide =
            Range { query: "{namespace=\"wide\"}".into(), from: end - WINDOW * WINDOWS as u32, until: end };
        let long = Range {
            query: "{service_name=\"long-0\"}".into(),
            from: end - Duration::from_secs(hours * 3600),
            until: end,
        };
        let (of_wide, of_long) = (pods * WINDOWS, SERVICE_PODS * hours * 360);
        let all = of_wide + of_long;
        let (profiles, ranges) = (Arc::clone(&self.recorded), (wide.clone(), long.clone()));
        // The profiles of one service lie between those of others, as in a fleet.
        let batch = move |n: u64| {
            let (before, through) = (n * of_long / all, (n + 1) * of_long / all);
            let (pod, start) = if through > before {
                let pod = Pod { namespace: "long", service: 0, number: before % SERVICE_PODS };
                (pod, ranges.1.from + WINDOW * (before / SERVICE_PODS) as u32)
            } else {
                let at = n - before;
                let pod = Pod { namespace: "wide", service: at % pods % SERVICES, number: at % pods };
                (pod, ranges.0.from + WINDOW * (at / pods) as u32)
            };
            pod.batch(
                start + Duration::from_millis(pod.number * 977 % 9000),
                &profiles[n as usize * 7919 % profiles.len()],
            )
        };
        // Segments of some 50 profiles, as of 1,000 pods at their own pace.
        let running = Running::start(&self.programs[program], &data, Some("20ms")).await?;
        Self::fill(&running, batch, 0..all).await?;
        if data.join("table").exists() {
            running.settle_tables(&data).await?;
        }
        running.stop()?;
        let samples = self.recorded[0].samples as f64 * all as f64;
        let core_day = |dir: &str| files(&data.join(dir)).1 as f64 / samples * CORE_DAY_SAMPLES / 1e6;
        let objects = files(&data.join("objects")).0;
        self.report.add(program, "objects of these profiles", "objects", objects as f64, Goal::None);
        self.report.add(
            program,
            "profiles of a busy core and day, as objects",
            "MB",
            core_day("objects"),
            Goal::None,
        );
        if data.join("table").exists() {
            let sums = core_day("table/samples_by_minute") + core_day("table/samples_by_hour");
            let others = core_day("table") - sums;
            let mut add = |what: &str, value, goal| {
                self.report.add(
                    program,
                    &format!("profiles of a busy core and day, {what}"),
                    "MB",
                    value,
                    goal,
                );
            };
            add("in tables without sums", others, Goal::AtMost(4.5));
            add("tables of sums", sums, Goal::None);
        }
        let graphs = [
            Graph {
                what: format!("flame graph, {pods} pods, 6 minutes ({of_wide} profiles)"),
                range: wide,
                profiles: of_wide,
                goals: (1.0, 0.2),
            },
            Graph {
                what: format!("flame graph, 20 pods, {hours} hours ({of_long} profiles)"),
                range: long,
                profiles: of_long,
                goals: (2.0, 2.0),
            },
        ];
        for _ in 0..3 {
            self.graphs(program, &data, &graphs).await?;
        }
        fs::remove_dir_all(&data)?;
        Ok(())
    }

    /// Starts a collector on its store, of which no file is in memory, and measures that and flame graphs.
    async fn graphs(&mut self, program: usize, data: &Path, graphs: &[Graph]) -> anyhow::Result<()> {
        drop_from_memory(data)?;
        let running = Running::start(&self.programs[program], data, None).await?;
        let mut queries = Queries::new(running.connect().await?);
        let mut add = |what: &str, unit, value, goal| self.report.add(program, what, unit, value, goal);
        let started = running.started.as_secs_f64();
        add("start with these profiles", "s", started, Goal::AtMost(5.0));
        for Graph { what, range, profiles, goals } in graphs {
            let before = running.usage()?.cpu_seconds;
            let (merged, first) = queries.flame_graph(range).await?;
            let cpu_seconds = running.usage()?.cpu_seconds - before;
            anyhow::ensure!(merged == *profiles, "{what}: {merged} profiles, not {profiles}");
            add(&format!("{what}, first"), "s", first, Goal::AtMost(goals.0));
            // On a busy machine the time says little.
            add(&format!("{what}, first, CPU time"), "s", cpu_seconds, Goal::None);
            let mut again: f64 = 0.0;
            for _ in 0..5 {
                again = again.max(queries.flame_graph(range).await?.1);
            }
            add(&format!("{what}, again"), "s", again, Goal::AtMost(goals.1));
        }
        add("peak memory of these queries", "MiB", running.usage()?.peak_mib, Goal::AtMost(1024.0));
        running.stop()
    }

    /// Measures the names and values of labels of many series.
    async fn series(&mut self, program: usize) -> anyhow::Result<()> {
        let data = self.data(program)?;
        let running = Running::start(&self.programs[program], &data, None).await?;
        let start = SystemTime::now() - Duration::from_secs(60);
        let profile = smallest();
        let batch =
            move |n: u64| Pod { namespace: "many", service: n % 200, number: n }.batch(start, &profile);
        let range = Range {
            query: String::new(),
            from: start - Duration::from_secs(3600),
            until: start + Duration::from_secs(60),
        };
        let mut from = 0;
        for number in [FORMER_SERIES.min(self.arguments.series), self.arguments.series] {
            // The former collector takes minutes for more.
            if number == from || (program == 0 && number > FORMER_SERIES) {
                continue;
            }
            Self::fill(&running, batch.clone(), from..number).await?;
            from = number;
            let (values, time) = Queries::new(running.connect().await?).labels(&range).await?;
            anyhow::ensure!(values as u64 == number, "{values} values, not {number}");
            self.report.add(
                program,
                &format!("names of labels, and values of one, {number} series"),
                "s",
                time,
                Goal::AtMost(0.1),
            );
        }
        running.stop()?;
        fs::remove_dir_all(&data)?;
        Ok(())
    }

    async fn run(&mut self) -> anyhow::Result<()> {
        let compared = self.programs.len().min(2);
        for _ in 0..self.arguments.rounds {
            for program in 0..compared {
                self.ingest(program, Load::Fleet).await?;
            }
            for program in 0..compared {
                self.ingest(program, Load::Full(Wire::Gzip)).await?;
            }
            for wire in [Wire::Zstd, Wire::Pieces] {
                // The former collector takes gzip only.
                for program in 1..compared {
                    self.ingest(program, Load::Full(wire)).await?;
                }
            }
        }
        for program in 0..self.programs.len() {
            self.queries(program).await?;
        }
        for program in 0..compared {
            self.series(program).await?;
        }
        Ok(())
    }
}

/// A flame graph whose time is measured.
struct Graph {
    what: String,
    range: Range,
    /// Profiles of the range.
    profiles: u64,
    /// Seconds at the first time and later.
    goals: (f64, f64),
}

/// Measured use of a collector.
struct Rates {
    batches: f64,
    cpu_seconds: f64,
    /// Objects written in a second.
    objects: f64,
    p50: f64,
    p99: f64,
    peak_mib: f64,
    throttled: u64,
    took: f64,
}

fn total(profiles: &[Encoded]) -> usize {
    profiles.iter().map(|profile| profile.pprof.len()).sum()
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    // The HTTP client wants one, although no connection here has TLS.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let programs =
        arguments.collector.iter().map(|text| Program::parse(text)).collect::<anyhow::Result<Vec<_>>>()?;
    let recorded = variations(&arguments.profiles, 2000, &mut Random(0x2545_f491_4f6c_dd1d))?;
    println!(
        "{} variations of the recorded profiles: {} bytes and {} samples each",
        recorded.len(),
        total(&recorded) / recorded.len(),
        recorded[0].samples
    );
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let made = (0..200).map(|_| profile(&mut random, 13_000)).collect();
    let report = Report::new(programs.iter().map(|program| program.name.clone()).collect());
    let json = arguments.json.clone();
    let mut bench = Bench { arguments, programs, recorded: Arc::new(recorded), made, report };
    let result = bench.run().await;
    // The figures so far, also after a failure.
    bench.report.finish(Path::new(&json))?;
    result
}
