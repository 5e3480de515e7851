//! The whole path on the real kernel, as root: rules down, profiles up, programs killed meanwhile.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails at once"
)]

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use gannet_e2e::{
    Agent, Collector, Sample, Ticks, binary, eventually, eventually_within, http_get, monotonic, rule, run,
};
use gannet_proto::{
    control::{Rule, SetTriggersRequest, node_rollout::State},
    ingest::Batch,
    query::FlameNode,
};
use prost::Message as _;
use tonic::{Code, Status};

const SAMPLE: &str = r#"{service_name="webshop"}"#;

fn has(nodes: &[FlameNode], name: &str) -> bool {
    nodes.iter().any(|node| node.name == name)
}

/// Returns the state of a revision on a node, and the fields of its errors.
async fn state(collector: &Collector, node: &str, revision: u64) -> Option<(State, Vec<String>)> {
    let rollout = collector.rollout(revision).await.nodes.into_iter().find(|entry| entry.node == node)?;
    Some((rollout.state(), rollout.errors.into_iter().map(|error| error.field).collect()))
}

#[tokio::test]
async fn a_pushed_rule_is_in_force_and_its_profiles_are_stored() {
    let collector = Collector::start().await;
    let agent = Agent::start("alpha", &collector.url(), &["--window=1s"]);
    agent.connected(&collector).await;
    let _sample = Sample::start(100);

    let begin = Instant::now();
    let answer = collector.set_rules(vec![rule("shop", "webshop", 99)]).await.expect("the rule is accepted");
    assert!(answer.changed);
    eventually("the node applied it", async || {
        state(&collector, agent.node(), answer.revision).await.filter(|(state, _)| *state == State::Applied)
    })
    .await;
    let applied = begin.elapsed();
    eprintln!("from SetTriggers to APPLIED: {applied:?}");
    // Generous: other work may keep the machine busy. On an idle one it is some tens of milliseconds.
    assert!(applied < Duration::from_secs(2), "{applied:?}");

    eventually("a profile of the sample program", async || collector.profiles(SAMPLE).await.pop()).await;
    let graph = eventually("its functions", async || {
        let graph = collector.flame_graph(SAMPLE).await;
        ["worker_loop", "price_cart", "sha256_block"]
            .iter()
            .all(|name| has(&graph.nodes, name))
            .then_some(graph)
    })
    .await;
    assert!(graph.total > 0);
}

#[tokio::test]
async fn a_rule_above_the_nodes_limit_is_rejected_with_its_field() {
    let collector = Collector::start().await;
    let agent = Agent::start("beta", &collector.url(), &["--max-hz=100"]);
    agent.connected(&collector).await;

    let good = collector.set_rules(vec![rule("shop", "webshop", 99)]).await.expect("the rule is accepted");
    eventually("the node applied it", async || {
        state(&collector, "beta", good.revision).await.filter(|(state, _)| *state == State::Applied)
    })
    .await;
    let bad = collector.set_rules(vec![rule("shop", "webshop", 500)]).await.expect("the format allows it");
    let fields = eventually("the node rejected it", async || {
        state(&collector, "beta", bad.revision).await.filter(|(state, _)| *state == State::Rejected)
    })
    .await
    .1;
    assert_eq!(fields, ["capture.hz"]);
    let status = collector.node("beta").await.expect("the node").status.expect("its status");
    assert_eq!(status.active_revision, good.revision, "the last good set is in force");
}

fn named(status: &Status, field: &str) -> bool {
    status.message().contains(field) || String::from_utf8_lossy(status.details()).contains(field)
}

#[tokio::test]
async fn the_collector_refuses_bad_rules_with_the_field() {
    let collector = Collector::start().await;
    let with = |change: fn(&mut Rule)| {
        let mut rule = rule("bad", "webshop", 99);
        change(&mut rule);
        SetTriggersRequest { rules: vec![rule], ..Default::default() }
    };
    let cases = [
        (
            "comm",
            with(|rule| rule.r#match.as_mut().expect("a match").comm = vec!["a-name-of-16-byte".to_owned()]),
        ),
        ("hz", with(|rule| rule.capture.as_mut().expect("a capture").hz = 5000)),
        ("id", with(|rule| rule.id = "Not A Label".to_owned())),
        ("allow_empty", SetTriggersRequest::default()),
    ];
    for (field, request) in cases {
        let status = collector.set_triggers(request).await.expect_err(field);
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status}");
        assert!(named(&status, field), "{field}: {status}");
    }
    collector.set_rules(vec![rule("good", "webshop", 99)]).await.expect("the rule is accepted");
    let stale = SetTriggersRequest {
        rules: vec![rule("other", "webshop", 99)],
        etag: "stale".to_owned(),
        ..Default::default()
    };
    assert_eq!(collector.set_triggers(stale).await.expect_err("a stale etag").code(), Code::Aborted);
}

/// Checks that the store has each sample that the node's ledger counts as delivered exactly once, though the collector is killed
/// five times.
#[tokio::test]
async fn a_killed_collector_has_stored_acknowledged_profiles_once() {
    let mut collector = Collector::start().await;
    let mut agent = Agent::start("gamma", &collector.url(), &["--window=1s"]);
    agent.connected(&collector).await;
    let sample = Sample::start(100);
    collector.set_rules(vec![rule("shop", "webshop", 99)]).await.expect("the rule is accepted");
    eventually("a profile", async || collector.profiles(SAMPLE).await.pop()).await;

    for round in 0..5 {
        tokio::time::sleep(Duration::from_millis(700 + 300 * round)).await;
        collector.program().kill();
        tokio::time::sleep(Duration::from_millis(500)).await;
        collector.up().await;
    }
    sample.finish();

    // The sample program has exited, so soon no sample is pending.
    let ledger = eventually_within(Duration::from_secs(120), "all is delivered", async || {
        let ledger = collector.node("gamma").await.filter(|node| node.connected)?.status?.ledger?;
        (ledger.pending == 0 && ledger.taken > 0).then_some(ledger)
    })
    .await;
    let stored = collector.profiles("").await;
    let ids: HashSet<&str> = stored.iter().map(|profile| profile.id.as_str()).collect();
    assert_eq!(ids.len(), stored.len(), "no profile is there twice");
    let samples: u64 = stored.iter().map(|profile| profile.samples).sum();
    assert_eq!(samples, ledger.delivered, "{ledger:?}");
    // The kernel's count against what the collector has counted in the stored profiles.
    assert_eq!(ledger.taken, samples + ledger.lost.values().sum::<u64>(), "{ledger:?}");
    assert_eq!(ledger.unaccounted, 0, "{ledger:?}");
    assert!(agent.program().is_running());
}

/// Checks that each batch that was ever in the spool arrives once, though agent and collector are killed in turns.
#[tokio::test]
async fn every_spooled_batch_is_stored_once_while_both_are_killed() {
    let mut collector = Collector::start().await;
    let mut agent = Agent::start("delta", &collector.url(), &["--window=1s"]);
    agent.connected(&collector).await;
    let samples = [Sample::start(60), Sample::start(60)];
    collector.set_rules(vec![rule("shop", "webshop", 199)]).await.expect("the rule is accepted");
    eventually("a profile", async || collector.profiles(SAMPLE).await.pop()).await;

    let watched = SpoolWatch::start(agent.state().join("spool"));
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..8 {
        // A kill may come at any moment of a window; the seed is fixed so that a failure can be repeated.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        tokio::time::sleep(Duration::from_millis(1000 + (state >> 33) % 1500)).await;
        match round % 3 {
            0 => {
                agent.program().kill();
                agent.up();
                ready(&agent).await;
            }
            1 => {
                collector.program().kill();
                tokio::time::sleep(Duration::from_millis(1200)).await;
                collector.up().await;
            }
            // Both lose all that is not on disk.
            _ => {
                collector.program().kill();
                tokio::time::sleep(Duration::from_millis(1200)).await;
                agent.program().kill();
                collector.up().await;
                agent.up();
                ready(&agent).await;
            }
        }
    }
    for sample in samples {
        sample.finish();
    }

    eventually_within(Duration::from_secs(120), "the spool is empty", async || {
        let node = collector.node("delta").await.filter(|node| node.connected)?;
        (node.status?.ledger?.pending == 0 && spool_files(&watched.directory).is_empty()).then_some(())
    })
    .await;
    let seen = watched.finish();
    let stored = collector.profiles("").await;
    let ids: HashSet<&str> = stored.iter().map(|profile| profile.id.as_str()).collect();
    assert_eq!(ids.len(), stored.len(), "no profile is there twice");
    eprintln!("{} batches seen in the spool, {} in the store", seen.len(), stored.len());
    assert!(seen.len() >= 8, "the spool was used: {seen:?}");
    for (id, samples) in seen.iter().filter(|(_, samples)| **samples > 0) {
        assert!(
            ids.contains(id.as_str()),
            "batch {id} of {samples} samples was in the spool and is not in the store"
        );
    }
    for profile in &stored {
        if let Some(samples) = seen.get(&profile.id) {
            assert_eq!(profile.samples, *samples, "batch {}", profile.id);
        }
    }
}

async fn ready(agent: &Agent) {
    eventually("the agent is ready", async || {
        http_get(&agent.probes(), "/readyz").await.filter(|(status, _)| *status == 200)
    })
    .await;
}

fn spool_files(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let is_batch = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "spool");
    entries.flatten().map(|entry| entry.path()).filter(is_batch).collect()
}

/// Reads each spool file as it appears, and counts the samples of every batch by its id.
struct SpoolWatch {
    directory: PathBuf,
    over: Arc<AtomicBool>,
    thread: JoinHandle<HashMap<String, u64>>,
}

impl SpoolWatch {
    fn start(directory: PathBuf) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (watched, stop) = (directory.clone(), Arc::clone(&over));
        let thread = std::thread::spawn(move || {
            let (mut seen, mut read) = (HashMap::new(), HashSet::new());
            while !stop.load(Relaxed) {
                for path in spool_files(&watched) {
                    if !read.contains(&path)
                        && let Ok(bytes) = fs::read(&path)
                    {
                        batches(&bytes, &mut seen);
                        read.insert(path);
                    }
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            seen
        });
        Self { directory, over, thread }
    }

    fn finish(self) -> HashMap<String, u64> {
        self.over.store(true, Relaxed);
        self.thread.join().expect("the watching thread ends")
    }
}

/// Reads a spool file: eight bytes of magic; then for each batch its length, its checksum and its bytes.
fn batches(file: &[u8], seen: &mut HashMap<String, u64>) {
    let mut rest = file.strip_prefix(b"GANNETS1").expect("a spool file");
    while let Some((header, after)) = rest.split_first_chunk::<8>() {
        let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let (body, after) = after.split_at(length);
        let batch = Batch::decode(body).expect("a batch");
        seen.insert(batch.batch_id, batch.samples);
        rest = after;
    }
}

#[test]
fn a_recording_accounts_for_every_sample_and_every_tick() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("all.pb.gz");
    let _sample = Sample::start(150);
    let beside = Ticks::start(99);
    let started = monotonic();
    let output = run(
        "gannet-agent",
        &["record", "--all", "--hz=99", "--duration=5s", "--json", "-o", file.to_str().expect("UTF-8")],
    );
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let lost: u64 =
        report["lost"].as_object().expect("lost").values().map(|n| n.as_u64().expect("a number")).sum();
    let number = |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("no {name} in {report}"));
    assert_eq!(number("taken"), number("delivered") + lost, "{report}");
    let cpus = std::thread::available_parallelism().expect("CPUs").get() as u64;
    assert!(number("ticks_due") >= cpus * 99 * 5, "five seconds at least: {report}");
    // The test's own clock runs beside the agent's, on the same CPUs at the same time. While the host runs other guests, both
    // drop the same share of the ticks that were due, but for the ends of each pause.
    let seconds = |name: &str| Duration::from_secs_f64(report[name].as_f64().expect("a time"));
    let from = started + seconds("start_seconds");
    let beside = beside.finish(from, from + seconds("seconds"));
    let share = number("ticks") as f64 / number("ticks_due") as f64;
    let share_beside = beside.ticks as f64 / beside.due;
    let dropped = 1.0 - share.min(share_beside);
    assert!((share - share_beside).abs() < 0.015 + dropped / 4.0, "{beside:?} beside {report}");
    let checked = std::process::Command::new(binary("pprof-check"))
        .arg(&file)
        // It is in each stack of the sample program's workers, even if other programs leave it little time.
        .args(["--has", "worker_loop"])
        .status()
        .expect("pprof-check starts");
    assert!(checked.success());
}
