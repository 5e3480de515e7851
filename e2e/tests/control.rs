//! Rules on a real node and the states that it reports, with the real programs on the real kernel.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails at once"
)]

use std::{
    process::{Child, Command},
    time::Duration,
};

use gannet_e2e::{Agent, Collector, Sample, eventually, rule, run};
use gannet_proto::control::{
    ListAuditRequest, Match, NodeRollout, Rule, SetTriggersRequest, node_rollout::State, rule_status,
    trigger_service_client::TriggerServiceClient,
};
use serde_json::Value;

async fn becomes(collector: &Collector, node: &str, revision: u64, wanted: State) -> NodeRollout {
    eventually(&format!("{node} becomes {wanted:?} at {revision}"), async || {
        let nodes = collector.rollout(revision).await.nodes;
        nodes.into_iter().find(|entry| entry.node == node && entry.state() == wanted)
    })
    .await
}

fn ctl(collector: &Collector, args: &[&str]) -> (bool, Value) {
    let url = collector.url();
    let mut all = vec!["--endpoint", url.as_str(), "-o", "json"];
    all.extend(args);
    let output = run("gannetctl", &all);
    let text = String::from_utf8(output.stdout).unwrap();
    let value = serde_json::from_str(&text)
        .unwrap_or_else(|error| panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr)));
    (output.status.success(), value)
}

#[tokio::test]
async fn a_rejected_set_keeps_the_former_and_a_partial_one_names_gaps() {
    let collector = Collector::start().await;
    let agent = Agent::start("alpha", &collector.url(), &["--max-hz=100", "--window=1s"]);
    agent.connected(&collector).await;
    let _sample = Sample::start(50);
    let good = collector.set_rules(vec![rule("shop", "webshop", 99)]).await.unwrap();
    becomes(&collector, "alpha", good.revision, State::Applied).await;
    eventually("the first profile", async || collector.profiles(r#"{rule_id="shop"}"#).await.pop()).await;

    let bad = collector.set_rules(vec![rule("shop", "webshop", 500)]).await.unwrap();
    let rejected = becomes(&collector, "alpha", bad.revision, State::Rejected).await;
    assert_eq!(rejected.errors[0].field, "capture.hz", "{rejected:?}");
    let before = collector.profiles(r#"{rule_id="shop"}"#).await.len();
    eventually("the former rule goes on sampling", async || {
        let profiles = collector.profiles(r#"{rule_id="shop"}"#).await;
        assert!(profiles.iter().all(|profile| profile.revision == good.revision), "{profiles:?}");
        (profiles.len() > before + 1).then_some(())
    })
    .await;

    // A rule over pods cannot work on a node that knows no pods; the other one does.
    let mut pods = rule("pods", "webshop", 19);
    pods.r#match.as_mut().unwrap().namespaces = vec!["shop".into()];
    let half = collector.set_rules(vec![rule("shop", "webshop", 99), pods]).await.unwrap();
    let partial = becomes(&collector, "alpha", half.revision, State::Partial).await;
    assert_eq!((partial.errors.len(), partial.errors[0].rule_id.as_str()), (1, "pods"), "{partial:?}");

    // Each answer is in the audit.
    let mut client = TriggerServiceClient::new(collector.channel());
    let entries = eventually("the audit has the answers", async || {
        let request = ListAuditRequest { node: "alpha".into(), ..ListAuditRequest::default() };
        let entries = client.list_audit(request).await.unwrap().into_inner().entries;
        (entries.len() >= 3).then_some(entries)
    })
    .await;
    let states: Vec<State> = entries.iter().rev().map(gannet_proto::control::AuditEntry::state).collect();
    assert_eq!(states, [State::Applied, State::Rejected, State::Partial]);
}

#[tokio::test]
async fn rules_outlive_both_programs_and_are_pushed_once() {
    let mut collector = Collector::start().await;
    let mut agent = Agent::start("beta", &collector.url(), &["--window=1s"]);
    agent.connected(&collector).await;
    let _sample = Sample::start(50);
    let mut brief = rule("brief", "webshop", 49);
    brief.lifetime.as_mut().unwrap().ttl = Some(Duration::from_secs(5).try_into().unwrap());
    let set = collector.set_rules(vec![rule("shop", "webshop", 99), brief]).await.unwrap();
    becomes(&collector, "beta", set.revision, State::Applied).await;

    // The collector is gone. The node's own clock ends the lifetime, also over a restart of the agent.
    collector.program().kill();
    agent.program().terminate();
    agent.up();
    let rules = async |agent: &Agent| {
        let (_, body) = gannet_e2e::http_get(&agent.debug(), "/debug/rules?format=json").await?;
        let rules: Value = serde_json::from_str(&body).ok()?;
        let state = |id: &str| {
            let rule = rules.as_array()?.iter().find(|rule| rule["id"] == id)?;
            Some((rule["state"].as_str()?.to_owned(), rule["samples"].as_u64()?))
        };
        Some((state("shop")?, state("brief")?))
    };
    eventually("the last good rules sample", async || rules(&agent).await.filter(|(shop, _)| shop.1 > 0))
        .await;
    eventually("the brief rule has expired", async || {
        rules(&agent).await.filter(|(_, brief)| brief.0.contains("expired"))
    })
    .await;

    // The collector is back: the node reports the expiry, and receives no rule set that is in force.
    collector.up().await;
    agent.connected(&collector).await;
    let status = eventually("the expiry is reported", async || {
        let status = collector.node("beta").await?.status?;
        status
            .rules
            .iter()
            .any(|s| s.rule_id == "brief" && s.state() == rule_status::State::Expired)
            .then_some(status)
    })
    .await;
    assert_eq!(status.active_revision, set.revision);
    let rollout = becomes(&collector, "beta", set.revision, State::Applied).await;
    assert!(rollout.errors.is_empty());
    let log = agent.program().log();
    assert_eq!(log.matches("rules applied").count(), 1, "pushed once:\n{log}");

    // The agent keeps its rules when the collector has lost its store.
    collector.program().kill();
    std::fs::remove_dir_all(collector.data()).unwrap();
    collector.up().await;
    agent.connected(&collector).await;
    let before = eventually("the node's page", async || rules(&agent).await).await.0.1;
    eventually("the rule goes on sampling", async || rules(&agent).await.filter(|(shop, _)| shop.1 > before))
        .await;
    assert_eq!(agent.program().log().matches("rules applied").count(), 1);
}

/// A process that ends with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn profiles_are_found_by_their_language_runtime() {
    let collector = Collector::start().await;
    let agent = Agent::start("delta", &collector.url(), &["--window=1s"]);
    agent.connected(&collector).await;
    let script = ["-c", "while True: pass"];
    let python = Ended(Command::new("/usr/bin/python3").args(script).spawn().unwrap());
    let pid = python.0.id();
    let mut rule = rule("scripts", "unused", 99);
    rule.r#match = Some(Match { runtime: vec!["python".to_owned()], pids: vec![pid], ..Match::default() });
    let request = SetTriggersRequest {
        rules: vec![rule.clone()],
        validate_only: true,
        ..SetTriggersRequest::default()
    };
    let preview = collector.set_triggers(request).await.unwrap().previews.remove(0);
    let example = &preview.rules[0].examples[0];
    assert_eq!((example.pid, example.runtime.as_str()), (pid, "python"));
    let version = example.runtime_version.clone();
    collector.set_rules(vec![rule]).await.unwrap();
    let query = format!("{{runtime=\"python\",runtime_version=\"{version}\"}}");
    eventually("a profile of the runtime", async || collector.profiles(&query).await.pop()).await;
    let other = collector.profiles("{rule_id=\"scripts\",runtime=\"java\"}").await;
    assert!(other.is_empty(), "{other:?}");

    let file = tempfile::tempdir().unwrap();
    let path = file.path().join("python.pb.gz").display().to_string();
    let url = collector.url();
    let minor = version.rsplit_once('.').unwrap().0.to_owned();
    let wanted = ["profile", "--runtime=python", "--runtime-version", &minor, "--for=2s", "-o", &path];
    let output = run("gannetctl", &[&["--endpoint", &url], &wanted[..]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let profile = gannet_proto::pprof::decode(&std::fs::read(&path).unwrap(), 16 << 20).unwrap();
    let has = |pid: u32| {
        profile
            .sample
            .iter()
            .flat_map(|sample| &sample.label)
            .any(|label| label.num == i64::from(pid) && profile.string_table[label.key as usize] == "pid")
    };
    assert!(has(pid) && !has(std::process::id()), "{} samples", profile.sample.len());
    let (good, value) =
        ctl(&collector, &["rules", "explain", "scripts", "--node=delta", &format!("--pid={pid}")]);
    assert!(good, "{value}");
    assert_eq!(value["processes"]["list"][0]["runtime_version"], version);
}

#[tokio::test]
async fn a_node_previews_rules_and_explains_matches() {
    let collector = Collector::start().await;
    let agent = Agent::start("gamma", &collector.url(), &["--max-hz=200"]);
    agent.connected(&collector).await;
    let mut sample = Sample::start(100);
    let pid = u64::from(sample.program().pid());

    let ask = async |rules: Vec<Rule>| {
        let request = SetTriggersRequest { rules, validate_only: true, ..SetTriggersRequest::default() };
        collector.set_triggers(request).await.unwrap().previews.remove(0)
    };
    let preview = eventually("the sample program is busy", async || {
        let preview = ask(vec![rule("shop", "webshop", 99)]).await;
        (preview.samples_per_second > 10.0).then_some(preview)
    })
    .await;
    assert_eq!((preview.node.as_str(), preview.unanswered.as_str()), ("gamma", ""));
    let shop = &preview.rules[0];
    assert!(shop.examples.iter().any(|example| u64::from(example.pid) == pid), "{shop:?}");
    assert!(shop.samples_per_second <= 99.0 * 64.0 && !shop.conditional, "{shop:?}");
    let refused = ask(vec![rule("shop", "webshop", 500)]).await;
    assert!(refused.would_reject && refused.errors[0].field == "capture.hz", "{refused:?}");
    assert!(collector.node("gamma").await.unwrap().status.is_none_or(|status| status.rules.is_empty()));

    // A capture on request, with no rule in force.
    let file = tempfile::tempdir().unwrap();
    let file = file.path().join("shop.pb.gz");
    let (url, path) = (collector.url(), file.display().to_string());
    let output =
        run("gannetctl", &["--endpoint", &url, "profile", "--comm=webshop", "--for=2s", "-o", &path]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let profile = gannet_proto::pprof::decode(&std::fs::read(&file).unwrap(), 16 << 20).unwrap();
    assert!(profile.sample.len() > 1 && profile.function.len() > 3, "{} samples", profile.sample.len());

    let mut picky = rule("picky", "webshop", 49);
    picky.r#match.as_mut().unwrap().uid = vec![4_294_967_294];
    let set = collector.set_rules(vec![rule("shop", "webshop", 49), picky]).await.unwrap();
    becomes(&collector, "gamma", set.revision, State::Applied).await;
    let pid_flag = format!("--pid={pid}");
    let why = |id: &str| {
        let (good, value) = ctl(&collector, &["rules", "explain", id, "--node=gamma", &pid_flag]);
        assert!(good, "{value}");
        value["processes"]["list"][0].clone()
    };
    // The command reads the first heartbeat before it asks the node.
    eventually("a heartbeat", async || collector.node("gamma").await?.status).await;
    eventually("the process is sampled", async || (why("shop")["armed"] == true).then_some(())).await;
    assert_eq!(why("shop")["matches"], true);
    let picky = why("picky");
    assert_eq!((picky["matches"].as_bool(), picky["armed"].as_bool()), (Some(false), Some(false)));
    assert_eq!(picky["reasons"][0], format!("match.uid: is {}", rustix::process::geteuid().as_raw()));
}
