//! The whole path on the real kernel, as root: rules down, profiles up, programs killed on the way.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on shall say so at once"
)]

use std::{
    collections::HashSet,
    fs,
    time::{Duration, Instant},
};

use gannet_e2e::{Agent, Collector, Sample, binary, eventually, eventually_within, rule, run};
use gannet_proto::{
    control::{Rule, SetTriggersRequest, node_rollout::State},
    query::FlameNode,
};
use tonic::{Code, Status};

const SAMPLE: &str = r#"{service_name="webshop"}"#;

fn has(node: &FlameNode, name: &str) -> bool {
    node.name == name || node.children.iter().any(|child| has(child, name))
}

/// What became of a revision on a node, and the fields that it complained of.
async fn state(collector: &Collector, node: &str, revision: u64) -> Option<(State, Vec<String>)> {
    let rollout = collector.rollout(revision).await.nodes.into_iter().find(|entry| entry.node == node)?;
    Some((rollout.state(), rollout.errors.into_iter().map(|error| error.field).collect()))
}

#[tokio::test]
async fn a_pushed_rule_is_live_at_once_and_its_profiles_reach_the_store() {
    let collector = Collector::start().await;
    let agent = Agent::start("alpha", &collector.url(), &["--window=1s"]);
    agent.connected(&collector).await;
    let _sample = Sample::start(100);

    let begin = Instant::now();
    let answer = collector.set_rules(vec![rule("shop", "webshop", 99)]).await.expect("a good rule is taken");
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
    let root = eventually("its functions", async || {
        let graph = collector.flame_graph(SAMPLE).await;
        graph
            .root
            .filter(|root| ["worker_loop", "price_cart", "sha256_block"].iter().all(|name| has(root, name)))
    })
    .await;
    assert!(root.total > 0);
}

#[tokio::test]
async fn a_rule_above_the_nodes_cap_is_rejected_with_its_field_and_the_former_rules_stay() {
    let collector = Collector::start().await;
    let agent = Agent::start("beta", &collector.url(), &["--hz-max=100"]);
    agent.connected(&collector).await;

    let good = collector.set_rules(vec![rule("shop", "webshop", 99)]).await.expect("a good rule is taken");
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
async fn bad_rules_are_refused_by_the_collector_with_the_field() {
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
    collector.set_rules(vec![rule("good", "webshop", 99)]).await.expect("a good rule is taken");
    let stale = SetTriggersRequest {
        rules: vec![rule("other", "webshop", 99)],
        etag: "stale".to_owned(),
        ..Default::default()
    };
    assert_eq!(collector.set_triggers(stale).await.expect_err("a stale etag").code(), Code::Aborted);
}

/// Every sample that the node's ledger calls delivered is in the store, once, though the collector dies again and again.
#[tokio::test]
async fn what_a_killed_collector_acknowledged_is_in_its_store_once() {
    let mut collector = Collector::start().await;
    let mut agent = Agent::start("gamma", &collector.url(), &["--window=1s"]);
    agent.connected(&collector).await;
    let sample = Sample::start(100);
    collector.set_rules(vec![rule("shop", "webshop", 99)]).await.expect("a good rule is taken");
    eventually("a profile", async || collector.profiles(SAMPLE).await.pop()).await;

    for round in 0..5 {
        tokio::time::sleep(Duration::from_millis(700 + 300 * round)).await;
        collector.program().kill();
        tokio::time::sleep(Duration::from_millis(500)).await;
        collector.up().await;
    }
    sample.finish();

    // The sample program is gone, so in a while nothing is on its way any more.
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
    assert_eq!(ledger.taken, ledger.delivered + ledger.lost.values().sum::<u64>(), "{ledger:?}");
    assert!(agent.program().is_running());
}

/// The agent is killed while nobody takes its profiles: what is in its spool arrives from the next one.
#[tokio::test]
async fn the_spool_of_a_killed_agent_arrives() {
    let mut collector = Collector::start().await;
    let mut agent = Agent::start("delta", &collector.url(), &["--window=1s"]);
    agent.connected(&collector).await;
    let _sample = Sample::start(100);
    collector.set_rules(vec![rule("shop", "webshop", 99)]).await.expect("a good rule is taken");
    eventually("a profile", async || collector.profiles(SAMPLE).await.pop()).await;

    collector.program().kill();
    let before: u64 = spooled(&agent);
    eventually("some profiles wait in the spool", async || (spooled(&agent) > before + 20_000).then_some(()))
        .await;
    agent.program().kill();
    let waiting = spooled(&agent);
    eprintln!("{waiting} bytes in the spool of the killed agent");
    collector.up().await;
    let stored = collector.profiles(SAMPLE).await.len();
    agent.up();
    agent.connected(&collector).await;
    eventually("the spool arrives", async || {
        (collector.profiles(SAMPLE).await.len() >= stored + 2).then_some(())
    })
    .await;
}

fn spooled(agent: &Agent) -> u64 {
    fn size(path: &std::path::Path) -> u64 {
        let Ok(entries) = fs::read_dir(path) else { return 0 };
        entries
            .flatten()
            .map(|entry| match entry.metadata() {
                Ok(data) if data.is_dir() => size(&entry.path()),
                Ok(data) => data.len(),
                Err(_) => 0,
            })
            .sum()
    }
    size(&agent.state())
}

#[test]
fn a_recording_of_everything_accounts_for_every_sample_and_agrees_with_the_clock() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("all.pb.gz");
    let _sample = Sample::start(150);
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
    // The kernel counts the time that its clocks ran, beside our program: one tick each 1/99 s, idle or not.
    let off = number("ticks") as f64 / number("ticks_due") as f64 - 1.0;
    assert!(off.abs() < 0.03, "{} ticks, {} due: {report}", number("ticks"), number("ticks_due"));
    let cpus = std::thread::available_parallelism().expect("CPUs").get() as u64;
    assert!(number("ticks_due") >= cpus * 99 * 5, "five seconds at least: {report}");
    let checked = std::process::Command::new(binary("pprof-check"))
        .arg(&file)
        .args(["--has", "price_cart"])
        .status()
        .expect("pprof-check starts");
    assert!(checked.success());
}

#[test]
fn a_port_in_use_is_said_in_one_line() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    let directory = tempfile::tempdir().expect("a directory");
    let data = format!("--data={}", directory.path().display());
    let output = run("gannet-collector", &[&data, "--listen=127.0.0.1:0", &format!("--http={address}")]);
    assert!(!output.status.success());
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(words.contains(&address) && words.contains("in use"), "{words}");
    assert!(!words.contains("panicked"), "{words}");
}
