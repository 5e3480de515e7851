//! Faults of users and networks, with the real programs: each gives a clear error or a counted effect, never a crash or a
//! silent loss.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails at once"
)]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
    sync::Arc,
    time::Duration,
};

use gannet_agent::{
    export::{Bounds, ExportConfig, Exporter, Spool},
    ledger::NodeLedger,
};
use gannet_e2e::{Agent, Collector, Sample, eventually, eventually_within, http_get, rule, run};
use gannet_proto::{
    connect::Dial,
    ingest::{
        Batch, PushRequest,
        ingest_service_client::IngestServiceClient,
        push_request::{Hello, Message as Request},
        push_response::Message as Response,
    },
    pprof::{self, Builder, Header, Line, Profile},
};
use ulid::Ulid;

/// Asserts that the program failed, printed all of these words, and did not panic.
#[track_caller]
fn refused(output: &Output, words: &[&str]) {
    let printed =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success(), "{printed}");
    assert!(!printed.contains("panicked"), "{printed}");
    for word in words {
        assert!(printed.contains(word), "`{word}` is not in: {printed}");
    }
}

const RULES: [(&str, &str, &[&str]); 5] = [
    ("an unknown field", "rules:\n- id: a\n  match: {comm: [sh], colour: red}\n", &["match.colour", ":3:"]),
    ("a name of 16 bytes", "rules:\n- id: a\n  match: {comm: [a-name-of-16-byte]}\n", &["match.comm", "15"]),
    (
        "no ticks",
        "rules:\n- id: a\n  match: {comm: [sh]}\n  capture: {hz: 0}\n",
        &["capture.hz", "1 or more"],
    ),
    (
        "too many ticks",
        "rules:\n- id: a\n  match: {comm: [sh]}\n  capture: {hz: 5000}\n",
        &["capture.hz", "1000"],
    ),
    ("no YAML", "rules: [}\n", &[":1:"]),
];

#[tokio::test]
async fn agent_and_gannetctl_refuse_wrong_rules_with_the_field() {
    let collector = Collector::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("rules.yaml");
    let file = file.to_str().expect("UTF-8");
    let state = format!("--state-dir={}", directory.path().join("state").display());
    for (what, text, words) in RULES {
        fs::write(file, text).expect("the file is written");
        eprintln!("{what}");
        let at = format!("--endpoint={}", collector.url());
        refused(&run("gannetctl", &[&at, "rules", "apply", "-f", file]), words);
        refused(&run("gannet-agent", &["run", "--pod-source=none", "--rules", file, &state]), words);
    }
    refused(&run("gannetctl", &["--endpoint=http://127.0.0.1:1", "nodes"]), &["127.0.0.1:1"]);
}

/// Checks that each program answers an old flag with one line that names the new one, and exits with 2.
#[test]
fn an_old_flag_is_answered_with_the_new_one() {
    for (program, arguments, words) in [
        ("gannet-agent", &["run", "--collector", "http://127.0.0.1:1"][..], ["--collector", "--endpoint"]),
        ("gannet-agent", &["run", "--kubelet=none"], ["--kubelet", "--pod-source"]),
        ("gannet-collector", &["--listen", "127.0.0.1:0"], ["--listen", "--grpc-listen"]),
        ("gannetctl", &["nodes", "--collector=http://127.0.0.1:1"], ["--collector", "--endpoint"]),
    ] {
        let output = run(program, arguments);
        refused(&output, &words);
        assert_eq!(output.status.code(), Some(2), "{program}");
        assert_eq!(String::from_utf8_lossy(&output.stderr).trim_end().lines().count(), 1, "{output:?}");
    }
}

/// Checks that the daemons name an unknown key of their configuration file and its line, and exit with 2.
#[test]
fn an_unknown_key_of_a_config_file_is_named_with_its_line() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("config.yaml");
    fs::write(&file, "insecure: true\ncolour: red\n").expect("the file is written");
    let file = file.to_str().expect("UTF-8");
    for (program, arguments) in
        [("gannet-agent", &["run", "--config", file][..]), ("gannet-collector", &["--config", file])]
    {
        let output = run(program, arguments);
        refused(&output, &["colour", "line 2"]);
        assert_eq!(output.status.code(), Some(2), "{program}: {output:?}");
    }
}

#[test]
fn a_port_in_use_is_reported_with_its_address() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    let directory = tempfile::tempdir().expect("a directory");
    let data = format!("--data={}", directory.path().display());
    let output =
        run("gannet-collector", &[&data, "--grpc-listen=127.0.0.1:0", &format!("--http-listen={address}")]);
    refused(&output, &[&address, "in use"]);
    let state = format!("--state-dir={}", directory.path().display());
    let output =
        run("gannet-agent", &["run", "--pod-source=none", &state, &format!("--http-listen={address}")]);
    refused(&output, &[&address, "in use"]);
}

#[tokio::test]
async fn bad_batches_are_refused_by_code_and_the_stream_goes_on() {
    let collector = Collector::start().await;
    let (sender, outgoing) = tokio::sync::mpsc::channel(8);
    let hello = Hello { node: "n".to_owned(), version: "test".to_owned(), at: None };
    let send = async |message| {
        sender.send(PushRequest { message: Some(message) }).await.expect("the stream accepts it");
    };
    send(Request::Hello(hello)).await;
    let mut client = IngestServiceClient::new(collector.channel());
    let stream = tokio_stream::wrappers::ReceiverStream::new(outgoing);
    let mut answers = client.push(stream).await.expect("a stream").into_inner();
    let mut answer = async || {
        let next = tokio::time::timeout(Duration::from_secs(30), answers.message());
        next.await
            .expect("an answer in time")
            .expect("no error")
            .expect("an answer")
            .message
            .expect("something")
    };
    let Response::Limits(limits) = answer().await else { panic!("the limits come first") };
    let batch = |pprof: Vec<u8>| {
        Request::Batch(Batch {
            batch_id: Ulid::new().to_string(),
            labels: [("service_name".to_owned(), "x".to_owned())].into(),
            pprof,
            samples: 1,
            start: Some(std::time::SystemTime::now().into()),
            ..Batch::default()
        })
    };
    // The first bytes of a gzip file, and no more.
    let cut = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0xcb];
    let large = vec![0; usize::try_from(limits.max_batch_bytes).expect("fits") + 1];
    for (pprof, codes) in [(cut, ["not_gzip", "not_pprof"]), (large, ["too_large", "too_large"])] {
        send(batch(pprof)).await;
        let Response::Refused(refusal) = answer().await else { panic!("it is refused") };
        assert!(codes.contains(&refusal.code.as_str()) && !refusal.reason.is_empty(), "{refusal:?}");
    }
    assert!(collector.nodes().await.is_ok(), "the collector goes on");
}

/// Returns a profile of 2,000 functions with names of 1,500 letters, each in one sample.
fn large_profile() -> Profile {
    let mut builder = Builder::new(Header {
        sample_types: &[("samples", "count"), ("cpu", "nanoseconds")],
        period_type: ("cpu", "nanoseconds"),
        period: 10,
        time_nanos: 1,
        duration_nanos: 2,
    });
    for number in 0..2000_u64 {
        // Digits of a sequence that does not repeat compress badly.
        let digits = |at: u64| {
            format!("{:016x}", (number * 94 + at).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17) ^ at)
        };
        let name: String = (0..94).map(digits).collect();
        let line = Line { name: &name, system_name: &name, file: "", line: 0, column: 0, start_line: 0 };
        let location = builder.location(None, 0x1000 + number, &[line]);
        builder.sample(&[location], &[1, 10], &[]);
    }
    builder.finish()
}

#[tokio::test]
async fn a_profile_above_the_limit_reaches_the_collector_in_parts() {
    let mut collector = Collector::prepare().with(&["--max-batch-bytes=64KiB"]);
    collector.up().await;
    let directory = tempfile::tempdir().expect("a directory");
    let ledger = NodeLedger::new();
    let exporter = exporter(directory.path(), &collector, &ledger);
    ledger.take(2000);
    exporter.submit(vec![Batch {
        labels: [("service_name".to_owned(), "large".to_owned())].into(),
        pprof: pprof::encode(&large_profile()),
        samples: 2000,
        start: Some(std::time::SystemTime::now().into()),
        ..Batch::default()
    }]);
    assert!(exporter.shutdown(Duration::from_secs(60)).await);
    let account = ledger.snapshot();
    assert_eq!((account.delivered, account.lost_total()), (2000, 0), "{account:?}");
    let profiles = collector.profiles("{service_name=\"large\"}").await;
    assert!(profiles.len() > 20, "{}", profiles.len());
    assert_eq!(profiles.iter().map(|profile| profile.samples).sum::<u64>(), 2000);
    let graph = collector.flame_graph("{service_name=\"large\"}").await;
    assert_eq!((graph.total, graph.unreadable_profiles), (20_000, 0));
}

/// Starts an exporter on a spool of its own.
fn exporter(spool: &Path, collector: &Collector, ledger: &NodeLedger) -> Exporter {
    let bounds = Bounds { bytes: 64 << 20, age: Duration::from_secs(3600) };
    let spool = Spool::open(spool, bounds, ledger.clone(), Arc::default()).expect("a spool");
    let config = ExportConfig {
        node: "n1".to_owned(),
        version: "test".to_owned(),
        collector: Some(Dial { url: collector.url(), ..Dial::default() }),
    };
    Exporter::start(config, spool, ledger.clone(), Arc::default()).expect("an exporter")
}

/// Checks the window that both sides of a stream share: a collector that is killed has lost it, and it costs no profile.
#[tokio::test]
async fn pieces_of_a_killed_collector_arrive_once() {
    let mut collector = Collector::prepare().with(&["--piece-streams=1"]);
    collector.up().await;
    let directory = tempfile::tempdir().expect("a directory");
    let ledger = NodeLedger::new();
    let exporter = exporter(directory.path(), &collector, &ledger);
    let profile = pprof::halves(large_profile()).expect("two halves")[0].clone();
    let profile = pprof::split(profile, 100, usize::MAX).swap_remove(0);
    let packed = pprof::encode_as(&profile, pprof::Encoding::Zstd);
    let samples = pprof::samples(&profile);
    let submit = |count: u64| {
        ledger.take(count * samples);
        let labels = std::collections::BTreeMap::from([("service_name".to_owned(), "pieces".to_owned())]);
        let start = Some(std::time::SystemTime::now().into());
        let batch =
            || Batch { labels: labels.clone(), pprof: packed.clone(), samples, start, ..Batch::default() };
        exporter.submit((0..count).map(|_| batch()).collect());
    };
    submit(10);
    eventually("ten profiles are stored", async || {
        (collector.profiles("{service_name=\"pieces\"}").await.len() == 10).then_some(())
    })
    .await;
    let received = received_bytes(&collector).await;
    let once = packed.len() as f64;
    assert!((0.5 * once..2.0 * once).contains(&received), "{received} bytes for ten times {once}");
    submit(20);
    collector.program().kill();
    collector.up().await;
    submit(5);
    assert!(exporter.shutdown(Duration::from_secs(60)).await);
    let account = ledger.snapshot();
    assert_eq!((account.delivered, account.lost_total()), (35 * samples, 0), "{account:?}");
    let graph = collector.flame_graph("{service_name=\"pieces\"}").await;
    assert_eq!((graph.profiles, graph.unreadable_profiles, graph.total), (35, 0, 35 * samples * 10));
}

async fn received_bytes(collector: &Collector) -> f64 {
    let (_, text) = http_get(&collector.pages(), "/metrics").await.expect("metrics");
    let value = |line: &str| line.strip_prefix("gannet_collector_ingest_received_bytes_total ")?.parse().ok();
    text.lines().find_map(value).expect("the bytes received")
}

async fn metric(agent: &Agent, name: &str) -> Option<f64> {
    let (_, text) = http_get(&agent.probes(), "/metrics").await?;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

#[tokio::test]
async fn an_outage_and_a_damaged_spool_are_counted_and_survived() {
    let mut collector = Collector::prepare();
    let directory = tempfile::tempdir().expect("a directory");
    let rules = directory.path().join("rules.yaml");
    fs::write(
        &rules,
        "rules:\n- id: shop\n  match: {comm: [webshop]}\n  capture: {hz: 99}\n  lifetime: {ttl: 1h}\n",
    )
    .expect("the file is written");
    let flag = format!("--rules={}", rules.display());
    let mut agent = Agent::start("lonely", &collector.url(), &["--window=1s", &flag]);
    let _sample = Sample::start(60);
    eventually("it is ready without a collector", async || {
        http_get(&agent.probes(), "/readyz").await.filter(|(status, _)| *status == 200)
    })
    .await;
    eventually("profiles wait", async || {
        metric(&agent, "gannet_agent_spool_batches").await.filter(|n| *n >= 2.0)
    })
    .await;
    agent.program().kill();

    // The largest spool file is cut in its last batch: the newest may be empty.
    let spool = agent.state().join("spool");
    let cut = fs::read_dir(&spool)
        .expect("the spool")
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "spool"))
        .max_by_key(|path| path.metadata().map_or(0, |metadata| metadata.len()))
        .expect("a file");
    let complete = fs::read(&cut).expect("its bytes");
    fs::write(&cut, &complete[..complete.len() - 5]).expect("it is cut");
    agent.up();
    eventually("the damage is counted", async || {
        metric(&agent, "gannet_agent_spool_corrupt_files_total").await.filter(|n| *n >= 1.0)
    })
    .await;
    eventually("its samples are counted as lost", async || {
        metric(&agent, "gannet_agent_samples_lost_total{reason=\"spool_corrupt\"}").await.filter(|n| *n > 0.0)
    })
    .await;
    collector.up().await;
    eventually_within(Duration::from_secs(90), "the intact batches arrive", async || {
        collector.profiles(r#"{service_name="webshop"}"#).await.pop()
    })
    .await;
}

/// A small file system, unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    #[track_caller]
    fn mount(size: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let option = format!("size={size}");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &option, "none"])
            .arg(directory.path())
            .status()
            .expect("mount runs");
        assert!(status.success(), "a tmpfs is mounted");
        Self(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_loses_only_samples_and_counts_them() {
    let collector = Collector::start().await;
    let disk = SmallDisk::mount("2m");
    let mut agent = Agent::start_in(disk.path().join("state"), "full", &collector.url(), &["--window=1s"]);
    agent.connected(&collector).await;
    fs::write(disk.path().join("everything"), vec![1; 4 << 20]).expect_err("the disk is full now");
    let _sample = Sample::start(60);
    collector.set_rules(vec![rule("shop", "webshop", 99)]).await.expect("the rule is accepted");
    eventually("losses are counted", async || {
        metric(&agent, "gannet_agent_samples_lost_total{reason=\"spool_full\"}").await.filter(|n| *n > 0.0)
    })
    .await;
    assert!(agent.program().is_running());
    fs::remove_file(disk.path().join("everything")).expect("the file is removed");
    eventually("profiles arrive again", async || {
        collector.profiles(r#"{service_name="webshop"}"#).await.pop()
    })
    .await;
}
