//! Measures the size of the Delta tables for one busy core and day, before and after merges.
//!
//! ```sh
//! cargo run --release -p gannet-collector --example table_size -- --pods 4 --threads 1
//! ```
//!
//! Each pod keeps one core busy for an hour: a profile of 990 samples every 10 seconds, over 5,000 stacks of one service. How often
//! a stack comes falls with its rank, as in a real program.

#![allow(clippy::print_stdout, reason = "a program for people: its result goes to its output")]

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use clap::Parser;
use gannet_base::{ByteSize, TimeSpan};
use gannet_collector::{Collector, Config, Running};
use gannet_proto::{
    ingest::{
        Batch, PushRequest, ingest_service_client::IngestServiceClient, push_request, push_response::Message,
    },
    pprof::{Builder, Header, Label, LabelValue, Line, LocationId, Mapping, encode},
};
use prost_types::Timestamp;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use ulid::Ulid;

#[derive(Parser)]
#[command(about = "Measures the size of the Delta tables for a busy core and day")]
struct Arguments {
    /// Pods of the service, each with one busy core
    #[arg(long, default_value_t = 4)]
    pods: u64,
    /// Threads of each pod, whose names are labels of the samples
    #[arg(long, default_value_t = 1)]
    threads: u64,
    /// Samples of a profile
    #[arg(long, default_value_t = 990)]
    samples: u64,
    /// Stacks of the service
    #[arg(long, default_value_t = 5000)]
    stacks: u64,
    /// How fast the share of a stack falls with its rank
    #[arg(long, default_value_t = 1.2)]
    exponent: f64,
    /// Profiles of each pod: 360 for an hour
    #[arg(long, default_value_t = 360)]
    profiles: u64,
    /// Keep the tables in this directory
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// Tables with all samples.
const TABLES: [&str; 5] = ["samples", "profiles", "stacks", "frames", "labels"];
/// Tables with the sums of them.
const SUMS: [&str; 4] = ["samples_by_minute", "samples_by_hour", "stacks", "frames"];
/// Profiles of each pod between two updates of the table.
const PROFILES_PER_UPDATE: u64 = 3;

/// A xorshift generator: equal runs see equal profiles.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Returns a number from 0 to 1.
    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Returns the levels of a stack, root first. Callers are common to many stacks.
fn frames(stack: u64) -> Vec<u64> {
    let mut random = Random(stack.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    random.next();
    let depth = 14 + random.next() % 24;
    (0..depth).map(|level| level * 64 + random.next() % (1 + (level * level / 8).min(60))).collect()
}

fn profile(random: &mut Random, shares: &[f64], arguments: &Arguments, start_ns: i64) -> (Vec<u8>, usize) {
    let types = [("samples", "count"), ("cpu", "nanoseconds")];
    let mut builder = Builder::new(Header {
        sample_types: &types,
        period_type: types[1],
        period: 10_101_010,
        time_nanos: start_ns,
        duration_nanos: 10_000_000_000,
    });
    let mapping = builder.mapping(Mapping {
        start: 0x1000,
        limit: 0x9000_0000,
        offset: 0,
        file: "/usr/bin/checkout",
        build_id: "4f1d",
    });
    let mut counts: BTreeMap<(u64, u64), i64> = BTreeMap::new();
    for _ in 0..arguments.samples {
        let share = random.share();
        let stack = shares.partition_point(|sum| *sum < share) as u64;
        *counts.entry((stack.min(arguments.stacks - 1), random.next() % arguments.threads)).or_default() += 1;
    }
    for ((stack, thread), count) in &counts {
        let mut locations: Vec<LocationId> = frames(*stack)
            .into_iter()
            .map(|function| {
                let name = format!("checkout::module_{}::function_{function}", function % 37);
                let file = format!("src/module_{}.rs", function % 37);
                let line = Line {
                    name: &name,
                    system_name: &name,
                    file: &file,
                    line: function as i64 % 900,
                    column: 0,
                    start_line: 1,
                };
                builder.location(Some(mapping), 0x1000 + function * 64, &[line])
            })
            .collect();
        locations.reverse();
        let thread = format!("worker-{thread}");
        let labels = [Label { key: "thread", value: LabelValue::Str(&thread) }];
        builder.sample(&locations, &[*count, count * 10_101_010], &labels);
    }
    (encode(&builder.finish()), counts.len())
}

async fn metric(running: &Running, name: &str) -> anyhow::Result<f64> {
    let mut stream = TcpStream::connect(running.http_addr).await?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(line.with_context(|| format!("no metric {name}"))?.parse()?)
}

/// Waits until a metric reaches a value.
async fn reach(running: &Running, name: &str, at_least: f64) -> anyhow::Result<()> {
    let began = Instant::now();
    while metric(running, name).await? < at_least {
        if began.elapsed() > Duration::from_secs(300) {
            bail!("{name} does not reach {at_least}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn push(running: &Running, batches: Vec<Batch>) -> anyhow::Result<()> {
    let (requests, receiver) = mpsc::channel(batches.len() + 1);
    let hello = push_request::Hello {
        node: "node".into(),
        version: "measure".into(),
        at: Some(SystemTime::now().into()),
    };
    requests.send(PushRequest { message: Some(push_request::Message::Hello(hello)) }).await?;
    let mut client = IngestServiceClient::new(
        Channel::from_shared(format!("http://{}", running.grpc_addr))?.connect().await?,
    );
    let mut answers = client.push(ReceiverStream::new(receiver)).await?.into_inner();
    let mut left = batches.len();
    for batch in batches {
        requests.send(PushRequest { message: Some(push_request::Message::Batch(batch)) }).await?;
    }
    while left > 0 {
        match answers.message().await?.context("the stream ended")?.message {
            Some(Message::Accepted(_)) => left -= 1,
            Some(Message::Limits(_)) => {}
            other => bail!("unexpected answer: {other:?}"),
        }
    }
    Ok(())
}

fn config(data: &Path, merges: bool) -> Config {
    let mut config = Config::new(data);
    config.store.min_free_bytes = ByteSize(0);
    config.store.flush_interval = TimeSpan(Duration::from_millis(20));
    config.table.table = true;
    config.table.table_rollups = true;
    config.table.table_interval = TimeSpan(Duration::from_millis(100));
    config.table.retention_interval = Duration::from_millis(200);
    config.table.delete_delay = Duration::ZERO;
    if !merges {
        config.table.merge_files = usize::MAX;
        config.table.close_delay = Duration::from_secs(1 << 30);
    }
    config
}

/// Returns files and bytes of the data files below a directory.
fn size(dir: &Path) -> anyhow::Result<(u64, u64)> {
    let (mut files, mut bytes) = (0, 0);
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("_delta_log") {
            let below = size(&path)?;
            (files, bytes) = (files + below.0, bytes + below.1);
        } else if path.extension().is_some_and(|end| end == "parquet") {
            (files, bytes) = (files + 1, bytes + fs::metadata(&path)?.len());
        }
    }
    Ok((files, bytes))
}

fn print(title: &str, data: &Path, arguments: &Arguments) -> anyhow::Result<()> {
    let core_days = (arguments.pods * arguments.profiles) as f64 / 8640.0;
    let megabytes = |bytes: u64| bytes as f64 / 1e6 / core_days;
    let mut sizes = BTreeMap::new();
    for table in TABLES.into_iter().chain(SUMS) {
        let (files, bytes) = size(&data.join("table").join(table))?;
        if sizes.insert(table, bytes).is_none() {
            println!("{title}: {table}: {files} files, {:.2} MB a core and day", megabytes(bytes));
        }
    }
    for (what, tables) in [("all samples", &TABLES[..]), ("only sums", &SUMS)] {
        println!(
            "{title}: {what}: {:.2} MB a core and day",
            megabytes(tables.iter().map(|table| sizes[table]).sum())
        );
    }
    Ok(())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let (temporary, keep) = (tempfile::tempdir()?, arguments.keep.clone());
    let data = keep.as_deref().unwrap_or(temporary.path());
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let weights: Vec<f64> =
        (1..=arguments.stacks).map(|rank| (rank as f64).powf(-arguments.exponent)).collect();
    let all: f64 = weights.iter().sum();
    let shares: Vec<f64> = weights
        .iter()
        .scan(0.0, |sum, weight| {
            *sum += weight / all;
            Some(*sum)
        })
        .collect();
    // The hour before this one, so that it is complete.
    let hour_s = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() / 3600 * 3600 - 3600;
    let running = Collector::start(config(data, false)).await?;
    let (mut rows, mut sent, mut sizes) = (0, 0_u64, HashMap::new());
    for first in (0..arguments.profiles).step_by(PROFILES_PER_UPDATE as usize) {
        let mut batches = Vec::new();
        for n in first..(first + PROFILES_PER_UPDATE).min(arguments.profiles) {
            for pod in 0..arguments.pods {
                // Windows of one agent begin nearly every 10 s, and those of several agents at different times.
                let start_ms = (hour_s + n * 10) * 1000 + pod * 977 % 9000 + random.next() % 7;
                let (pprof, samples) = profile(&mut random, &shares, &arguments, start_ms as i64 * 1_000_000);
                rows += samples;
                sent += 1;
                *sizes.entry(pod).or_insert(0) += pprof.len();
                let pod = format!("checkout-7d9f8b6c5-{pod:05}");
                let labels = [
                    ("service_name", "checkout"),
                    ("namespace", "shop"),
                    ("pod", &pod),
                    ("container", "main"),
                    ("node", "node-1"),
                ];
                batches.push(Batch {
                    batch_id: Ulid::from_parts(
                        start_ms,
                        u128::from(random.next()) << 16 | u128::from(random.next() & 0xffff),
                    )
                    .to_string(),
                    sequence: sent,
                    labels: labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
                    pprof,
                    samples: arguments.samples,
                    start: Some(Timestamp {
                        seconds: (start_ms / 1000) as i64,
                        nanos: (start_ms % 1000 * 1_000_000) as i32,
                    }),
                    duration: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
                    rule_id: "always".into(),
                    revision: 7,
                    reason: "always".into(),
                    ..Batch::default()
                });
            }
        }
        push(&running, batches).await?;
        reach(&running, "gannet_collector_table_profiles_total", sent as f64).await?;
    }
    running.shutdown().await;
    let pushed: usize = sizes.values().sum();
    println!(
        "{sent} profiles, {} rows a profile, {} bytes a profile as gzip",
        rows as u64 / sent,
        pushed as u64 / sent
    );
    print("before merges", data, &arguments)?;
    let began = Instant::now();
    let running = Collector::start(config(data, true)).await?;
    reach(&running, "gannet_collector_table_updates_total", 2.0).await?;
    let updates = metric(&running, "gannet_collector_table_updates_total").await?;
    // The removed files are deleted by then.
    reach(&running, "gannet_collector_table_updates_total", updates + 6.0).await?;
    println!(
        "{} merges, in at most {:.1} s",
        metric(&running, "gannet_collector_table_merges_total").await?,
        began.elapsed().as_secs_f64()
    );
    running.shutdown().await;
    print("after merges", data, &arguments)?;
    Ok(())
}
