//! Measures how many batches collectors acknowledge, one collector after the other: CPU time, latency, and objects.
//!
//! ```sh
//! cargo run --release -p gannet-collector --example ingest -- --collector former=OLD/gannet-collector \
//!     --collector new=target/release/gannet-collector
//! ```
//!
//! Every connection keeps `--in-flight` batches unanswered, each with a profile of `--bytes` bytes, compressed with gzip.
//! The profiles vary, and each connection has its own series. Each `--encoding` is measured with the same profiles.

#![allow(clippy::print_stdout, reason = "a program for people: its result goes to its output")]

#[path = "fleet/made.rs"]
mod made;

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};
use gannet_proto::{
    ingest::{
        Batch, PushRequest, batch::Piece, ingest_service_client::IngestServiceClient, push_request,
        push_response::Message,
    },
    pprof::{
        Encoding, PIECES, PieceDecoder, PieceEncoder, Profile, decode, decode_raw, encode, encode_as,
        inflate, to_zstd,
    },
};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{codec::CompressionEncoding, transport::Channel};
use ulid::Ulid;

use made::{Random, profile};

#[derive(Parser)]
#[command(about = "Measures how many batches collectors acknowledge")]
struct Arguments {
    /// A collector to measure; repeat it to compare several in one run
    #[arg(long, value_name = "NAME=PROGRAM", required = true)]
    collector: Vec<String>,
    /// Connections, each of another node
    #[arg(long, default_value_t = 50)]
    connections: u64,
    /// Unanswered batches of each connection
    #[arg(long, default_value_t = 16)]
    in_flight: usize,
    /// Time to measure each collector for, after two seconds to warm up
    #[arg(long, default_value_t = 15)]
    seconds: u64,
    /// Size of a compressed profile, at least
    #[arg(long, default_value_t = 13_000)]
    bytes: usize,
    /// Compression of the profiles on the wire; repeat it to compare several in one run
    #[arg(long, value_enum, default_value = "gzip")]
    encoding: Vec<Wire>,
    /// End after this many batches of each connection; 0: after the time
    #[arg(long, default_value_t = 0)]
    batches: u64,
    /// Profiles to send in place of made ones: files of pprof, in the order of their names, such as consecutive ones of an agent.
    /// A name is `NUMBER_SERIES.pb.gz`
    #[arg(long, value_name = "DIR")]
    profiles: Option<PathBuf>,
    /// Directory for the data of the collectors, on the disk to measure
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Keep the data of the collectors
    #[arg(long)]
    keep: bool,
}

/// The compression of profiles on the wire.
#[derive(Clone, Copy, ValueEnum)]
enum Wire {
    Gzip,
    Zstd,
    /// Profiles in gzip, and each gRPC message in zstd
    GzipInZstd,
    /// Profiles in zstd, and each gRPC message in zstd
    ZstdInZstd,
    /// Each profile compressed with those before it on the connection
    Pieces,
}

impl Wire {
    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::GzipInZstd => "gzip in zstd",
            Self::ZstdInZstd => "zstd in zstd",
            Self::Pieces => PIECES,
        }
    }

    fn encode(self, profile: &Profile) -> Vec<u8> {
        match self {
            Self::Gzip | Self::GzipInZstd => encode(profile),
            Self::Zstd | Self::ZstdInZstd => encode_as(profile, Encoding::Zstd),
            // Each connection makes the pieces.
            Self::Pieces => profile.encode_to_vec(),
        }
    }

    fn compresses_messages(self) -> bool {
        matches!(self, Self::GzipInZstd | Self::ZstdInZstd)
    }
}

/// Returns the profiles in the files of a directory, each with the number of its samples.
fn read_profiles(dir: &Path) -> anyhow::Result<Vec<(Profile, u64)>> {
    let mut paths = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<Vec<_>>>()?;
    paths.sort();
    let read = |path: PathBuf| {
        let profile = decode(&fs::read(&path)?, 64 << 20).with_context(|| path.display().to_string())?;
        let samples = gannet_proto::pprof::samples(&profile);
        Ok((profile, samples))
    };
    paths.into_iter().map(read).collect()
}

/// Replaces the profile of a batch by a piece.
fn as_piece(mut batch: Batch, encoder: &mut PieceEncoder) -> anyhow::Result<Batch> {
    let bytes = batch.pprof.len() as u64;
    let (number, pprof) = encoder.encode(&batch.pprof).context("a profile does not fit into a piece")?;
    batch.piece = Some(Piece { number, bytes });
    Ok(Batch { pprof, ..batch })
}

fn batch(connection: u64, n: u64, profiles: &[(Vec<u8>, u64)]) -> Batch {
    let (pprof, samples) = &profiles[(connection * 31 + n) as usize % profiles.len()];
    let labels: BTreeMap<String, String> = [
        ("service_name", format!("service-{}", n % 30)),
        ("node", format!("node-{connection}")),
        ("namespace", "shop".to_owned()),
        ("pod", format!("service-{}-5d8f7c-{connection}", n % 30)),
        ("container", "main".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    Batch {
        batch_id: Ulid::new().to_string(),
        sequence: n,
        labels,
        pprof: pprof.clone(),
        samples: *samples,
        start: Some(SystemTime::now().into()),
        duration: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
        rule_id: "always".into(),
        revision: 7,
        reason: "always".into(),
        ..Batch::default()
    }
}

/// What all connections have seen.
#[derive(Default)]
struct Seen {
    is_measuring: AtomicBool,
    accepted: AtomicU64,
    throttled: AtomicU64,
}

/// Pushes on one connection. Returns the latencies of the acknowledged batches.
async fn push(
    channel: Channel,
    connection: u64,
    arguments: Arc<Arguments>,
    profiles: Arc<Vec<(Vec<u8>, u64)>>,
    wire: Wire,
    seen: Arc<Seen>,
) -> anyhow::Result<Vec<Duration>> {
    let (requests, receiver) = mpsc::channel(arguments.in_flight + 1);
    let hello = push_request::Hello {
        node: format!("node-{connection}"),
        version: "measure".into(),
        at: Some(SystemTime::now().into()),
    };
    requests.send(PushRequest { message: Some(push_request::Message::Hello(hello)) }).await?;
    let mut client = IngestServiceClient::new(channel);
    if wire.compresses_messages() {
        client = client.send_compressed(CompressionEncoding::Zstd);
    }
    let mut answers = client.push(ReceiverStream::new(receiver)).await?.into_inner();
    answers.message().await?.context("the stream ended before the limits")?;
    let mut encoder = PieceEncoder::new().context("no memory")?;
    let (mut sent, mut latencies) = (HashMap::new(), Vec::new());
    let mut n = 0;
    loop {
        while sent.len() < arguments.in_flight && (arguments.batches == 0 || n < arguments.batches) {
            let mut batch = batch(connection, n, &profiles);
            if matches!(wire, Wire::Pieces) {
                batch = as_piece(batch, &mut encoder)?;
            }
            n += 1;
            sent.insert(batch.batch_id.clone(), Instant::now());
            requests.send(PushRequest { message: Some(push_request::Message::Batch(batch)) }).await?;
        }
        if sent.is_empty() {
            return Ok(latencies);
        }
        let Some(answer) = answers.message().await? else { return Ok(latencies) };
        match answer.message {
            Some(Message::Accepted(accepted)) => {
                let began = sent.remove(&accepted.batch_id).context("an answer to an unknown batch")?;
                if seen.is_measuring.load(Ordering::Relaxed) {
                    latencies.push(began.elapsed());
                    seen.accepted.fetch_add(1, Ordering::Relaxed);
                } else if !latencies.is_empty() {
                    return Ok(latencies);
                }
            }
            Some(Message::Throttled(throttled)) => {
                seen.throttled.fetch_add(1, Ordering::Relaxed);
                sent.remove(&throttled.batch_id);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            other => bail!("unexpected answer: {other:?}"),
        }
    }
}

/// Prints the mean size of the encoded profiles, and the time that one thread takes for one of them.
fn print_cost(encoding: Encoding, profiles: &[(Profile, u64)]) {
    let n = profiles.len() as f64;
    let began = Instant::now();
    let encoded: Vec<_> = profiles.iter().map(|(profile, _)| encode_as(profile, encoding)).collect();
    let to_encode = began.elapsed().as_secs_f64() / n * 1e6;
    let began = Instant::now();
    let decoded = encoded.iter().filter(|bytes| decode(bytes, 64 << 20).is_ok()).count();
    let to_decode = began.elapsed().as_secs_f64() / n * 1e6;
    let bytes = encoded.iter().map(Vec::len).sum::<usize>() as f64 / n;
    let raw = profiles.iter().map(|(profile, _)| profile.encoded_len()).sum::<usize>() as f64 / n;
    assert_eq!(decoded, profiles.len());
    println!(
        "{}: {bytes:.0} bytes a profile of {raw:.0}; {to_encode:.0} us to encode and {to_decode:.0} us to decode it",
        encoding.name()
    );
}

/// As [`print_cost`], for pieces: the agent inflates what the spool has, and the collector compresses for the store.
fn print_cost_of_pieces(profiles: &[(Profile, u64)]) -> anyhow::Result<()> {
    let n = profiles.len() as f64;
    let spooled: Vec<_> = profiles.iter().map(|(profile, _)| encode_as(profile, Encoding::Zstd)).collect();
    let mut encoder = PieceEncoder::new().context("no memory")?;
    let mut decoder = PieceDecoder::new().context("no memory")?;
    let began = Instant::now();
    let mut pieces = Vec::new();
    for bytes in &spooled {
        let raw = inflate(bytes, 64 << 20)?;
        let (number, piece) = encoder.encode(&raw).context("a profile does not fit into a piece")?;
        pieces.push((number, raw.len() as u64, piece));
    }
    let to_encode = began.elapsed().as_secs_f64() / n * 1e6;
    let (mut to_decode, mut to_store) = (0.0, 0.0);
    for (number, size, piece) in &pieces {
        let began = Instant::now();
        let raw = decoder.decode(*number, *size, piece)?;
        decode_raw(&raw, 64 << 20)?;
        to_decode += began.elapsed().as_secs_f64() / n * 1e6;
        let began = Instant::now();
        std::hint::black_box(to_zstd(&raw));
        to_store += began.elapsed().as_secs_f64() / n * 1e6;
    }
    let bytes = pieces.iter().map(|(_, _, piece)| piece.len()).sum::<usize>() as f64 / n;
    println!(
        "{PIECES}: {bytes:.0} bytes a profile; {to_encode:.0} us to encode what the spool has, {to_decode:.0} us to decode it, and \
         {to_store:.0} us to compress it for the store"
    );
    Ok(())
}

/// Returns the mean size of a message with a batch, in bytes.
fn message_bytes(profiles: &[(Vec<u8>, u64)], wire: Wire) -> f64 {
    let mut encoder = PieceEncoder::new();
    let bytes = (0..profiles.len() as u64).map(|n| {
        let mut batch = batch(1, n, profiles);
        if matches!(wire, Wire::Pieces) {
            batch = encoder.as_mut().and_then(|encoder| as_piece(batch, encoder).ok()).unwrap_or_default();
        }
        let message = push_request::Message::Batch(batch);
        let raw = PushRequest { message: Some(message) }.encode_to_vec();
        if wire.compresses_messages() {
            zstd::bulk::compress(&raw, 0).map_or(0, |z| z.len())
        } else {
            raw.len()
        }
    });
    bytes.sum::<usize>() as f64 / profiles.len() as f64
}

fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Returns the CPU time of a process in seconds, and its memory in MiB.
fn usage(child: &Child) -> anyhow::Result<(f64, u64)> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id()))?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    let status = fs::read_to_string(format!("/proc/{}/status", child.id()))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0");
    let peak: u64 = peak.split_ascii_whitespace().next().unwrap_or("0").parse()?;
    Ok((ticks as f64 / 100.0, peak >> 10))
}

/// Returns the number of files below a directory, and their bytes.
fn files(dir: &Path) -> (u64, u64) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.fold((0, 0), |(n, bytes), entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => {
            let (more, size) = files(&entry.path());
            (n + more, bytes + size)
        }
        Ok(meta) => (n + 1, bytes + meta.len()),
        Err(_) => (n, bytes),
    })
}

async fn measure(
    name: &str,
    program: &str,
    arguments: &Arc<Arguments>,
    profiles: &Arc<Vec<(Vec<u8>, u64)>>,
    wire: Wire,
) -> anyhow::Result<()> {
    let data =
        arguments.dir.join(format!("ingest-{name}-{}-{}", wire.name().replace(' ', "-"), std::process::id()));
    let (grpc, http) = (free_port()?, free_port()?);
    let piece_streams = if matches!(wire, Wire::Pieces) { arguments.connections } else { 0 }.to_string();
    let mut child = Command::new(program)
        .arg("--data")
        .arg(&data)
        .args(["--grpc-listen", &grpc.to_string(), "--http-listen", &http.to_string()])
        // An earlier collector does not know the second.
        .envs([
            ("GANNET_COLLECTOR_LOG", "warn".to_owned()),
            ("GANNET_COLLECTOR_PIECE_STREAMS", piece_streams),
        ])
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let endpoint = Channel::from_shared(format!("http://{grpc}"))?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while endpoint.connect().await.is_err() {
        anyhow::ensure!(Instant::now() < deadline, "{name} does not answer");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let seen = Arc::new(Seen::default());
    seen.is_measuring.store(arguments.batches > 0, Ordering::Relaxed);
    let mut pushers = Vec::new();
    for connection in 0..arguments.connections {
        let channel = endpoint.connect().await?;
        let (arguments, profiles) = (Arc::clone(arguments), Arc::clone(profiles));
        pushers.push(tokio::spawn(push(channel, connection, arguments, profiles, wire, Arc::clone(&seen))));
    }
    if arguments.batches == 0 {
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    let (cpu, _) = usage(&child)?;
    let (objects, stored) = files(&data.join("objects"));
    let began = Instant::now();
    let mut latencies = Vec::new();
    if arguments.batches == 0 {
        seen.is_measuring.store(true, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(arguments.seconds)).await;
        seen.is_measuring.store(false, Ordering::Relaxed);
    } else {
        for pusher in pushers.drain(..) {
            latencies.extend(pusher.await??);
        }
    }
    let took = began.elapsed().as_secs_f64();
    let accepted = seen.accepted.load(Ordering::Relaxed);
    let (cpu, peak) = usage(&child).map(|(now, peak)| (now - cpu, peak))?;
    let (now, now_stored) = files(&data.join("objects"));
    for pusher in pushers {
        latencies.extend(pusher.await??);
    }
    child.kill()?;
    child.wait()?;
    if !arguments.keep {
        fs::remove_dir_all(&data)?;
    }
    latencies.sort_unstable();
    let at = |share: f64| {
        latencies.get((latencies.len() as f64 * share) as usize).map_or(0.0, Duration::as_secs_f64)
    };
    println!(
        "{name:<10} {:<12} {:>9.0} {:>10.0} {:>12.0} {:>9.3} {:>9.3} {:>9.3} {:>12.1} {:>12.1} {peak:>9} {:>9}",
        wire.name(),
        message_bytes(profiles, wire),
        accepted as f64 / took,
        accepted as f64 / cpu,
        at(0.5),
        at(0.99),
        at(0.9999),
        (now - objects) as f64 / took,
        (now_stored - stored) as f64 / took / 1e6,
        seen.throttled.load(Ordering::Relaxed),
    );
    Ok(())
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let arguments = Arc::new(Arguments::parse());
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let profiles: Vec<_> = match &arguments.profiles {
        Some(dir) => read_profiles(dir)?,
        None => (0..200).map(|_| profile(&mut random, arguments.bytes)).collect(),
    };
    println!("{} connections, {} batches in flight on each", arguments.connections, arguments.in_flight);
    for encoding in [Encoding::Gzip, Encoding::Zstd] {
        print_cost(encoding, &profiles);
    }
    print_cost_of_pieces(&profiles)?;
    println!(
        "{:<10} {:<12} {:>9} {:>10} {:>12} {:>9} {:>9} {:>9} {:>12} {:>12} {:>9} {:>9}",
        "collector",
        "encoding",
        "B/message",
        "batches/s",
        "/CPU second",
        "p50 s",
        "p99 s",
        "p99.99 s",
        "objects/s",
        "MB/s",
        "peak MiB",
        "throttled"
    );
    for collector in &arguments.collector {
        let (name, program) = collector.split_once('=').context("--collector takes NAME=PROGRAM")?;
        for wire in &arguments.encoding {
            let encoded =
                profiles.iter().map(|(profile, samples)| (wire.encode(profile), *samples)).collect();
            measure(name, program, &arguments, &Arc::new(encoded), *wire).await?;
        }
    }
    Ok(())
}
