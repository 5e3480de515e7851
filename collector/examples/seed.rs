//! Fills a collector with fifty minutes of profiles of a small shop, as two agents would send them. It shows the page
//! without a kernel, and the tests of the page use it.
//!
//! ```sh
//! cargo run -p gannet-collector --example seed -- --endpoint http://127.0.0.1:4100 [--stay]
//! ```
//!
//! Halfway through, the shop gets a new version: pricing a basket becomes cheaper, ranking a search more expensive. One pod
//! of checkout still has the old version. Ten minutes before the end, pressure starts a capture of that pod. Pricing and paying
//! are spans of one trace.
//! With `--stay` both agents stay connected, receive rules and answer them, until Ctrl-C.

#![allow(clippy::print_stdout, reason = "a program for people and scripts: what it did goes to its output")]

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use clap::Parser;
use gannet_proto::connect::{self, Connection, Dial};
use gannet_proto::control::agent_service_client::AgentServiceClient;
use gannet_proto::control::trigger_service_client::TriggerServiceClient;
use gannet_proto::control::{
    AgentMessage, Ledger, NodeHello, NodeStatus, RuleError, RuleStatus, RulesApplied, SetTriggersRequest,
    agent_message::Message as FromAgent, rule_status, server_message::Message as FromServer,
};
use gannet_proto::ingest::ingest_service_client::IngestServiceClient;
use gannet_proto::ingest::{Batch, PushRequest, push_request, push_response};
use gannet_proto::labels;
use gannet_proto::pprof::{self, Builder, Header, Label, LabelValue, Line, LocationId, Mapping, MappingId};
use gannet_proto::rules;
use tokio_stream::wrappers::ReceiverStream;
use ulid::Ulid;

const HZ: u64 = 99;
const PERIOD_NS: u64 = 1_000_000_000 / HZ;
const WINDOW: Duration = Duration::from_secs(10);
/// Time between the starts of two windows of one service.
const STEP: Duration = Duration::from_secs(30);
const NODES: [&str; 2] = ["node-a", "node-b"];
/// The trace of an order, and the spans in it that these functions work in.
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPANS: [(&str, &str); 2] =
    [("shop::checkout::price_basket", "00f067aa0ba902b7"), ("shop::checkout::pay", "53995c3f42cd8ad8")];

const RULES: &str = r#"
rules:
  - id: shop
    description: both services of the shop, continuously
    match: {comm: ["checkout", "search*"]}
    capture: {hz: 99}
    lifetime: {ttl: 2h}
  - id: shop-blocked
    description: where checkout waits
    match: {comm: ["checkout"]}
    capture: {kind: [off_cpu], hz: 49}
    lifetime: {ttl: 2h}
  - id: shop-pressure
    description: checkout while it waits for the CPU
    match: {comm: ["checkout"]}
    when:
      - pressure: {resource: cpu, kind: some, stall_us: 150000, window_us: 1000000, scope: container}
    capture: {hz: 99, duration: 60s, lead_up: 20s}
    lifetime: {ttl: 2h}
"#;

#[derive(Parser)]
#[command(about = "Fills a collector with fifty minutes of profiles of a small shop")]
struct Arguments {
    /// URL of the collector's gRPC services
    #[arg(long, env = "GANNET_ENDPOINT", default_value = "http://127.0.0.1:4100")]
    endpoint: String,
    /// Minutes of profiles, up to now
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(2..=600))]
    minutes: u64,
    /// Keep both agents connected, and set rules that they answer
    #[arg(long)]
    stay: bool,
}

/// Builds profiles from frames in text form: `k:` a kernel frame, `i:` inlined into its caller, `g:` found by a guess, `lib:name` in
/// another file, else in the service's own.
struct Shop {
    builder: Builder,
    program: MappingId,
    libc: MappingId,
    ssl: MappingId,
    kernel: MappingId,
}

impl Shop {
    fn new(program: &str, off_cpu: bool, start: SystemTime) -> anyhow::Result<Self> {
        let sample_types: &[(&str, &str)] = if off_cpu {
            &[("events", "count"), ("offcpu", "nanoseconds")]
        } else {
            &[("samples", "count"), ("cpu", "nanoseconds")]
        };
        let mut builder = Builder::new(Header {
            sample_types,
            period_type: sample_types[1],
            period: if off_cpu { 1 } else { PERIOD_NS as i64 },
            time_nanos: i64::try_from(start.duration_since(UNIX_EPOCH)?.as_nanos())?,
            duration_nanos: WINDOW.as_nanos() as i64,
        });
        let mut file = |start: u64, file: &str, build_id: &str| {
            builder.mapping(Mapping { start, limit: start + 0x40_0000, offset: 0, file, build_id })
        };
        let main = file(0x40_0000, program, "5d1f9b6c0a7e4f2233445566778899aabbccddee");
        let libc = file(
            0x7f10_0000_0000,
            "/usr/lib/x86_64-linux-gnu/libc.so.6",
            "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567",
        );
        let ssl = file(
            0x7f20_0000_0000,
            "/usr/lib/x86_64-linux-gnu/libcrypto.so.3",
            "99887766554433221100ffeeddccbbaa00112233",
        );
        let kernel = file(0xffff_ffff_8100_0000, "[kernel.kallsyms]", "");
        builder.main_mapping(main);
        builder.comment("rule shop, revision 1");
        Ok(Self { builder, program: main, libc, ssl, kernel })
    }

    /// Returns the stack of `frames`, root first. An `i:` frame becomes a line of its caller's location.
    fn stack(&mut self, frames: &[&str]) -> Vec<LocationId> {
        let mut stack = Vec::new();
        let mut at = 0;
        while at < frames.len() {
            let inlined = frames[at + 1..].iter().take_while(|frame| frame.starts_with("i:")).count();
            let (mapping, base) = match frames[at].split_once(':').map(|(file, _)| file) {
                Some("k") => (self.kernel, 0xffff_ffff_8100_0000),
                Some("libc") => (self.libc, 0x7f10_0000_0000),
                Some("ssl") => (self.ssl, 0x7f20_0000_0000),
                _ => (self.program, 0x40_0000),
            };
            let names: Vec<&str> = frames[at..=at + inlined].iter().rev().map(|frame| bare(frame)).collect();
            // Each function has an address of its own within its mapping.
            let address = base
                + names
                    .iter()
                    .flat_map(|name| name.bytes())
                    .fold(7_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)) % 0x3f_0000);
            let lines: Vec<Line<'_>> = names
                .iter()
                .map(|name| Line { name, system_name: name, line: 1, ..Line::default() })
                .collect();
            let lines = if names == ["?"] { &[][..] } else { &lines[..] };
            let mapping = (names != ["[truncated]"]).then_some(mapping);
            stack.push(self.builder.location(mapping, address, lines));
            at += inlined + 1;
        }
        stack.reverse();
        stack
    }

    fn sample(&mut self, frames: &[&str], values: [u64; 2], thread: &str) {
        let stack = self.stack(frames);
        let mut labels = vec![
            Label { key: "pid", value: LabelValue::Num(4711, "") },
            Label { key: "thread", value: LabelValue::Str(thread) },
        ];
        if let Some(index) = frames.iter().rev().position(|frame| frame.starts_with("g:")) {
            labels.push(Label { key: pprof::GUESSED_FROM, value: LabelValue::Num(index as i64, "") });
            labels.push(Label { key: "unwinding", value: LabelValue::Str("guessed") });
        }
        if let Some((_, span)) = SPANS.iter().find(|(function, _)| frames.contains(function)) {
            labels.push(Label { key: "trace_id", value: LabelValue::Str(TRACE) });
            labels.push(Label { key: "span_id", value: LabelValue::Str(span) });
        }
        self.builder.sample(&stack, &values.map(|value| value as i64), &labels);
    }
}

fn bare(frame: &str) -> &str {
    ["k:", "i:", "g:", "libc:", "ssl:"].iter().find_map(|prefix| frame.strip_prefix(prefix)).unwrap_or(frame)
}

const SERVE: [&str; 5] =
    ["_start", "libc:__libc_start_main_impl", "main", "shop::server::serve", "shop::server::handle"];

fn under<'a>(outer: &[&'a str], inner: &[&'a str]) -> Vec<&'a str> {
    [outer, inner].concat()
}

const SYSCALL: [&str; 2] = ["k:entry_SYSCALL_64_after_hwframe", "k:do_syscall_64"];

/// Returns stacks with their samples. `after` selects the new version.
fn checkout(after: bool, wobble: u64) -> Vec<(Vec<&'static str>, u64)> {
    let order = under(&SERVE, &["shop::checkout::place_order"]);
    let price = under(&order, &["shop::checkout::price_basket"]);
    let parse = under(&order, &["serde_json::de::from_slice"]);
    // A recursive parser of nested input makes such a deep stack.
    let deep: Vec<&str> = under(&parse, &["serde_json::de::Deserializer<R>::parse_value"; 52]);
    let alloc = under(&price, &["alloc::vec::Vec<T>::push", "libc:malloc", "libc:_int_malloc"]);
    let pay = under(&order, &["shop::checkout::pay", "ssl:SSL_write", "ssl:aes_gcm_enc_update"]);
    let send = under(
        &SERVE,
        &[
            "libc:__libc_write",
            SYSCALL[0],
            SYSCALL[1],
            "k:ksys_write",
            "k:vfs_write",
            "k:sock_write_iter",
            "k:tcp_sendmsg",
            "k:tcp_write_xmit",
        ],
    );
    vec![
        (price.clone(), 30),
        (under(&price, &["i:shop::checkout::apply_discount"]), if after { 40 } else { 170 } + wobble),
        (
            under(&price, &["i:shop::checkout::apply_discount", "shop::checkout::rule_matches"]),
            if after { 15 } else { 90 },
        ),
        (alloc.clone(), 24),
        (under(&alloc, &["libc:sysmalloc", SYSCALL[0], SYSCALL[1], "k:__x64_sys_brk", "k:do_brk_flags"]), 6),
        (parse, 40 + wobble),
        (deep, 33),
        (pay, 70),
        (under(&order, &["shop::template::render", "g:shop::template::call", "shop::template::escape"]), 40),
        (under(&send, &["k:__tcp_transmit_skb"]), 22),
        (send, 35 + wobble),
        (vec!["[truncated]", "shop::report::render"], 12),
        (vec!["[truncated]", "?"], 5),
        (vec!["k:ret_from_fork_asm", "k:kthread", "k:worker_thread"], 3),
    ]
}

fn search(after: bool, wobble: u64) -> Vec<(Vec<&'static str>, u64)> {
    let query = under(&SERVE, &["shop::search::query"]);
    let rank = under(&query, &["shop::search::rank"]);
    vec![
        (under(&rank, &["shop::search::score"]), if after { 310 } else { 130 } + wobble),
        (under(&rank, &["shop::search::score", "libc:__expf_fma"]), if after { 90 } else { 40 }),
        (rank, 25),
        (under(&query, &["shop::search::Index::lookup"]), 90 + wobble),
        (under(&query, &["shop::search::Index::lookup", "libc:__memcmp_avx2_movbe"]), 75),
        (
            under(
                &query,
                &[
                    "shop::search::Index::lookup",
                    SYSCALL[0],
                    SYSCALL[1],
                    "k:__x64_sys_pread64",
                    "k:ext4_file_read_iter",
                ],
            ),
            18,
        ),
    ]
}

fn blocked(wobble: u64) -> Vec<(Vec<&'static str>, u64)> {
    let order = under(&SERVE, &["shop::checkout::place_order"]);
    vec![
        (
            under(
                &order,
                &[
                    "shop::db::query",
                    "libc:recv",
                    SYSCALL[0],
                    SYSCALL[1],
                    "k:tcp_recvmsg",
                    "k:schedule_timeout",
                    "k:schedule",
                ],
            ),
            300 + wobble,
        ),
        (
            under(
                &order,
                &[
                    "shop::stock::lock",
                    "libc:__futex_abstimed_wait",
                    SYSCALL[0],
                    SYSCALL[1],
                    "k:futex_wait",
                    "k:schedule",
                ],
            ),
            120,
        ),
    ]
}

struct Window {
    service: &'static str,
    node: &'static str,
    off_cpu: bool,
    start: SystemTime,
    after: bool,
    wobble: u64,
    /// The captured pod, its rule and the reason of the capture. Without one the window is of a continuous rule.
    captured: Option<&'static str>,
}

const OLD_POD: &str = "checkout-7b54c8d6f9-m7w2c";
/// Reasons of the windows of the capture: the time before the trigger, then the trigger.
const CAPTURE: [&str; 8] = {
    let pressure = "pressure; cpu some: 187 ms of stall in 1 s";
    ["pre-trigger", "pre-trigger", pressure, pressure, pressure, pressure, pressure, pressure]
};

fn batch(window: &Window, sequence: u64) -> anyhow::Result<Batch> {
    let Window { service, node, off_cpu, start, after, wobble, captured } = *window;
    let mut shop = Shop::new(&format!("/usr/bin/{service}"), off_cpu, start)?;
    let stacks = match (service, off_cpu) {
        (_, true) => blocked(wobble),
        ("search", _) => search(after, wobble),
        _ => checkout(after, wobble),
    };
    for (frames, count) in &stacks {
        let value = count * if off_cpu { 4_200_000 } else { PERIOD_NS };
        shop.sample(frames, [*count, value], "worker");
    }
    let samples: u64 = stacks.iter().map(|(_, count)| count).sum();
    let series = [
        (labels::SERVICE_NAME, service),
        (labels::NODE, node),
        (labels::NAMESPACE, "shop"),
        (
            labels::POD,
            match (service, captured) {
                ("search", _) => "search-7c9d6bb5f4-2xk8p",
                (_, Some(_)) => OLD_POD,
                _ => "checkout-5d8f9c7b66-x2k4q",
            },
        ),
        (labels::CONTAINER, "app"),
    ];
    Ok(Batch {
        batch_id: Ulid::from_datetime(start).to_string(),
        sequence,
        labels: series.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        pprof: pprof::encode(&shop.builder.finish()),
        samples,
        start: Some(start.into()),
        duration: Some(WINDOW.try_into()?),
        rule_id: match captured {
            Some(_) => "shop-pressure",
            None if off_cpu => "shop-blocked",
            None => "shop",
        }
        .to_owned(),
        revision: 1,
        reason: captured.unwrap_or(if off_cpu { "always; threshold 1 ms" } else { "always" }).to_owned(),
        window_id: Ulid::from_datetime(start).to_string(),
        ledger: Some(Ledger { ticks: 2 * HZ * 10, taken: samples, delivered: samples, ..Ledger::default() }),
        piece: None,
    })
}

/// Returns all windows that have ended by now, oldest first.
fn windows(minutes: u64) -> Vec<Window> {
    let now = SystemTime::now();
    let steps = minutes * 60 / STEP.as_secs();
    let capture = now - Duration::from_secs(600);
    let captured = CAPTURE.iter().zip(0..).map(|(reason, step)| Window {
        service: "checkout",
        node: NODES[0],
        off_cpu: false,
        start: capture + WINDOW * step,
        after: false,
        wobble: u64::from(step),
        captured: Some(*reason),
    });
    let mut all: Vec<Window> = (0..steps)
        .flat_map(|step| {
            let start = now - STEP * u32::try_from(steps - step).unwrap_or(u32::MAX);
            let window = move |service, node, off_cpu| Window {
                service,
                node,
                off_cpu,
                start,
                after: step >= steps / 2,
                wobble: (step * 7) % 13,
                captured: None,
            };
            [
                window("checkout", NODES[0], false),
                window("search", NODES[1], false),
                window("checkout", NODES[0], true),
            ]
        })
        .collect();
    if minutes > 10 {
        all.extend(captured);
        all.sort_by_key(|window| window.start);
    }
    all
}

async fn push(connection: Connection, minutes: u64) -> anyhow::Result<usize> {
    let batches = windows(minutes)
        .iter()
        .zip(1..)
        .map(|(window, sequence)| batch(window, sequence))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let count = batches.len();
    let hello = push_request::Hello {
        node: NODES[0].to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        at: None,
    };
    let messages = std::iter::once(push_request::Message::Hello(hello))
        .chain(batches.into_iter().map(push_request::Message::Batch))
        .map(|message| PushRequest { message: Some(message) });
    // The stream stays open after its last message until all answers have arrived.
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let mut answers =
        IngestServiceClient::new(connection).push(ReceiverStream::new(receiver)).await?.into_inner();
    let sending = tokio::spawn(async move {
        for message in messages {
            if sender.send(message).await.is_err() {
                break;
            }
        }
        sender
    });
    let mut done = 0;
    while done < count {
        match answers.message().await?.and_then(|answer| answer.message) {
            Some(push_response::Message::Accepted(_)) => done += 1,
            Some(push_response::Message::Limits(_)) => {}
            Some(push_response::Message::Refused(refused)) => bail!("{}: {}", refused.code, refused.reason),
            Some(push_response::Message::Throttled(throttled)) => bail!("put off: {}", throttled.reason),
            None => bail!("the collector ended the stream after {done} of {count} profiles"),
        }
    }
    drop(sending.await?);
    Ok(done)
}

/// Acts as one agent: sends hello and heartbeats, and answers rules.
async fn agent(connection: Connection, node: &'static str, lossy: bool) -> anyhow::Result<()> {
    let (sender, receiver) = tokio::sync::mpsc::channel(8);
    let say = |message| AgentMessage { message: Some(message) };
    sender
        .send(say(FromAgent::Hello(NodeHello {
            node: node.to_owned(),
            labels: BTreeMap::from([("pool".to_owned(), "web".to_owned())]),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: if lossy { "5.10.0-33-amd64" } else { "6.12.9-amd64" }.to_owned(),
            arch: "x86_64".to_owned(),
            features: ["off_cpu", "bpf_loop"].map(str::to_owned).to_vec(),
            cpus: 8,
            started_at: Some((SystemTime::now() - Duration::from_secs(3000)).into()),
            ..NodeHello::default()
        })))
        .await?;
    let mut commands =
        AgentServiceClient::new(connection).connect(ReceiverStream::new(receiver)).await?.into_inner();
    while let Some(message) = commands.message().await? {
        let Some(FromServer::Rules(set)) = message.message else { continue };
        let digest = rules::digest(&set.rules);
        // The older kernel of the two does not support everything.
        let partial: Vec<RuleError> = set
            .rules
            .iter()
            .filter(|rule| lossy && rule.id == "shop-blocked")
            .map(|rule| RuleError {
                rule_id: rule.id.clone(),
                field: "capture.kind".to_owned(),
                reason:
                    "off_cpu needs the sched_switch tracepoint, which this kernel does not let BPF attach to"
                        .to_owned(),
            })
            .collect();
        let statuses = set.rules.iter().map(|rule| {
            let unsupported = partial.iter().find(|error| error.rule_id == rule.id);
            RuleStatus {
                rule_id: rule.id.clone(),
                state: if unsupported.is_some() {
                    rule_status::State::Unsupported
                } else {
                    rule_status::State::Capturing
                }
                .into(),
                reason: unsupported.map(|error| error.reason.clone()).unwrap_or_default(),
                processes: if unsupported.is_some() { 0 } else { 3 },
                samples: if unsupported.is_some() { 0 } else { 41_230 },
                last_sample: unsupported.is_none().then(|| SystemTime::now().into()),
                expires_at: Some((SystemTime::now() + Duration::from_secs(7200)).into()),
            }
        });
        let lost = if lossy {
            BTreeMap::from([("ring_full".to_owned(), 900), ("stack_fault".to_owned(), 330)])
        } else {
            BTreeMap::new()
        };
        let lost_total: u64 = lost.values().sum();
        let status = NodeStatus {
            at: Some(SystemTime::now().into()),
            active_revision: set.revision,
            active_digest: digest.clone(),
            rules: statuses.collect(),
            faults: None,
            ledger: Some(Ledger {
                ticks: 2_400_000,
                taken: 61_000 + lost_total,
                delivered: 60_400,
                pending: 600,
                lost,
                unaccounted: 0,
            }),
            rss_bytes: 47 << 20,
            cpu: Some(Duration::from_millis(31_400).try_into()?),
            degraded: if lossy {
                vec!["no BTF of modules: frames of modules have no names".to_owned()]
            } else {
                Vec::new()
            },
            spool_bytes: 184_320,
            processes_armed: 6,
        };
        sender
            .send(say(FromAgent::Applied(RulesApplied {
                revision: set.revision,
                nonce: set.nonce,
                digest,
                partial,
            })))
            .await?;
        sender.send(say(FromAgent::Status(status))).await?;
    }
    bail!("the collector let {node} go")
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments { endpoint, minutes, stay } = Arguments::parse();
    let connection = connect::connect(&Dial { url: endpoint.clone(), ..Dial::default() })?;
    if stay {
        let rules = rules::parse(RULES, "the example's rules").map_err(|errors| {
            anyhow::anyhow!(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
        })?;
        let request = SetTriggersRequest { scope: "shop".to_owned(), rules, ..SetTriggersRequest::default() };
        TriggerServiceClient::new(connection.clone())
            .set_triggers(request)
            .await
            .map_err(|status| anyhow::anyhow!(connect::explain(&endpoint, &status)))?;
    }
    let agents = NODES
        .into_iter()
        .zip([false, true])
        .filter(|_| stay)
        .map(|(node, lossy)| tokio::spawn(agent(connection.clone(), node, lossy)))
        .collect::<Vec<_>>();
    let pushed = push(connection, minutes).await.with_context(|| format!("pushing to {endpoint}"))?;
    println!("pushed {pushed} profiles");
    if stay {
        println!("two nodes stay connected until Ctrl-C");
        tokio::select! {
            (ended, ..) = futures::future::select_all(agents) => ended??,
            stop = tokio::signal::ctrl_c() => stop?,
        }
    }
    Ok(())
}
