use std::time::Duration;

use gannet_collector::{Collector, Running};
use gannet_proto::{
    control::{
        AgentMessage, Answer, GetRolloutRequest, ListNodesRequest, NodeHello, NodeRollout, NodeStatus,
        Question, Rollout, RuleError, RuleFaults, RuleSet, RulesApplied, RulesRejected, ServerMessage,
        SetTriggersRequest, WatchRolloutRequest, agent_message, agent_service_client::AgentServiceClient,
        answer, fleet_service_client::FleetServiceClient, node_rollout::State, server_message,
    },
    rules,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::{
    support::{TEST_TIMEOUT, at, channel, config_with, eventually, labels, metric, now_ms, start},
    triggers::{Triggers, one, parse, triggers},
};

/// The agent's end of a control stream.
pub struct Agent {
    out: mpsc::Sender<AgentMessage>,
    incoming: Streaming<ServerMessage>,
}

impl Agent {
    pub async fn connect(running: &Running, node: &str, digest: &str) -> Self {
        let hello = NodeHello {
            node: node.into(),
            labels: labels(&[("pool", "gpu")]),
            version: "1".into(),
            kernel: "6.1".into(),
            active_digest: digest.into(),
            ..Default::default()
        };
        Self::with(running, hello).await
    }

    pub async fn with(running: &Running, hello: NodeHello) -> Self {
        let (out, receiver) = mpsc::channel(64);
        let node = hello.node.clone();
        let mut client = AgentServiceClient::new(channel(running.grpc_addr).await);
        out.send(AgentMessage { message: Some(agent_message::Message::Hello(hello)) }).await.unwrap();
        let incoming = client.connect(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        let agent = Self { out, incoming };
        eventually("the node is known", || async {
            nodes(running).await.iter().any(|n| n.name == node && n.connected)
        })
        .await;
        agent
    }

    pub async fn send(&self, message: agent_message::Message) {
        self.out.send(AgentMessage { message: Some(message) }).await.unwrap();
    }

    pub async fn rules(&mut self) -> RuleSet {
        let message =
            tokio::time::timeout(TEST_TIMEOUT, self.incoming.message()).await.expect("no rules in time");
        match message.unwrap().unwrap().message {
            Some(server_message::Message::Rules(rules)) => rules,
            other => panic!("no rules: {other:?}"),
        }
    }

    pub async fn question(&mut self) -> Question {
        let message =
            tokio::time::timeout(TEST_TIMEOUT, self.incoming.message()).await.expect("no question in time");
        match message.unwrap().unwrap().message {
            Some(server_message::Message::Question(question)) => question,
            other => panic!("no question: {other:?}"),
        }
    }

    pub async fn answer(&self, id: &str, answer: answer::Answer) {
        let answer = Answer { id: id.to_owned(), answer: Some(answer) };
        self.send(agent_message::Message::Answer(answer)).await;
    }

    pub async fn receives_nothing(&mut self) {
        let heard = tokio::time::timeout(Duration::from_millis(400), self.incoming.message()).await;
        assert!(heard.is_err(), "{heard:?}");
    }

    /// Waits for the end of the stream, and returns its status.
    async fn end(&mut self) -> tonic::Status {
        loop {
            match tokio::time::timeout(TEST_TIMEOUT, self.incoming.message()).await.expect("it does not end")
            {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended without a status"),
                Err(status) => return status,
            }
        }
    }

    pub async fn apply(&self, set: &RuleSet, partial: Vec<RuleError>) {
        let RuleSet { revision, nonce, digest, .. } = set.clone();
        self.send(agent_message::Message::Applied(RulesApplied { revision, nonce, digest, partial })).await;
    }

    pub async fn reject(&self, set: &RuleSet, field: &str) {
        let error = RuleError { rule_id: "a".into(), field: field.into(), reason: "too much".into() };
        self.reject_with(set, vec![error]).await;
    }

    pub async fn reject_with(&self, set: &RuleSet, errors: Vec<RuleError>) {
        let RuleSet { revision, nonce, .. } = set.clone();
        self.send(agent_message::Message::Rejected(RulesRejected { revision, nonce, errors })).await;
    }
}

async fn nodes(running: &Running) -> Vec<gannet_proto::control::Node> {
    let mut client = FleetServiceClient::new(channel(running.grpc_addr).await);
    client.list_nodes(ListNodesRequest {}).await.unwrap().into_inner().nodes
}

pub async fn rollout(client: &Triggers, revision: u64) -> Rollout {
    client.clone().get_rollout(GetRolloutRequest { revision }).await.unwrap().into_inner()
}

pub async fn state(client: &Triggers, revision: u64, node: &str) -> NodeRollout {
    rollout(client, revision)
        .await
        .nodes
        .into_iter()
        .find(|n| n.node == node)
        .expect("the node is in the rollout")
}

pub async fn becomes(client: &Triggers, revision: u64, node: &str, wanted: State) -> NodeRollout {
    eventually(&format!("{node} becomes {wanted:?} at {revision}"), || async {
        state(client, revision, node).await.state() == wanted
    })
    .await;
    state(client, revision, node).await
}

#[tokio::test]
async fn rules_reach_each_node_and_each_answer_shows() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let mut good = Agent::connect(&running, "good", "").await;
    let mut bad = Agent::connect(&running, "bad", "").await;
    let mut half = Agent::connect(&running, "half", "").await;
    let mut silent = Agent::connect(&running, "silent", "").await;
    let cpu_only = NodeHello { node: "cpu".into(), labels: labels(&[("pool", "cpu")]), ..Default::default() };
    let mut skipped = Agent::with(&running, cpu_only).await;
    good.receives_nothing().await;

    let rules = parse(
        "rules: [{id: b, match: {comm: [x]}, nodes: {selector: pool=gpu}}, {id: a, match: {comm: [shop]}, nodes: {selector: pool=gpu}}]",
    );
    let request = SetTriggersRequest { rules: rules.clone(), ..Default::default() };
    let answer = client.set_triggers(request).await.unwrap().into_inner();
    assert_eq!(answer.nodes, ["bad", "good", "half", "silent"]);
    let set = good.rules().await;
    assert_eq!(set.revision, answer.revision);
    assert_eq!(set.rules.iter().map(|r| r.id.as_str()).collect::<Vec<_>>(), ["a", "b"], "sorted by id");
    assert_eq!(set.digest, rules::digest(&rules));
    for node in ["good", "bad", "half", "silent"] {
        assert_eq!(state(&client, 0, node).await.state(), State::Pending);
    }
    assert!(!rollout(&client, 0).await.settled);
    good.apply(&set, vec![]).await;
    let theirs = bad.rules().await;
    bad.reject(&theirs, "capture.hz").await;
    let theirs = half.rules().await;
    let no_psi = RuleError { rule_id: "b".into(), field: "when[0]".into(), reason: "no PSI".into() };
    half.apply(&theirs, vec![no_psi.clone()]).await;
    silent.rules().await;
    let applied = becomes(&client, 1, "good", State::Applied).await;
    assert!(applied.since.is_some() && applied.took.is_some_and(|t| t.seconds < 30), "{applied:?}");
    let rejected = becomes(&client, 1, "bad", State::Rejected).await;
    assert_eq!(rejected.errors[0].field, "capture.hz");
    assert_eq!(becomes(&client, 1, "half", State::Partial).await.errors, [no_psi]);
    assert_eq!(state(&client, 1, "silent").await.state(), State::Pending);
    becomes(&client, 1, "cpu", State::Skipped).await;
    skipped.receives_nothing().await;
    drop(silent);
    let offline = becomes(&client, 1, "silent", State::Offline).await;
    assert!(offline.since.is_some());
    assert!(rollout(&client, 1).await.settled);
    let listed = nodes(&running).await;
    assert_eq!(listed.len(), 5);
    assert_eq!(listed.iter().filter(|n| n.connected).count(), 4);
    let good_node = listed.iter().find(|n| n.name == "good").unwrap();
    assert_eq!(good_node.hello.as_ref().unwrap().kernel, "6.1");
    assert_eq!(good_node.rollout.as_ref().unwrap().state(), State::Applied);
    running.shutdown().await;
}

#[tokio::test]
async fn an_answer_with_an_old_nonce_is_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let mut agent = Agent::connect(&running, "n1", "").await;
    client.set_triggers(one("a")).await.unwrap();
    let old = agent.rules().await;
    client.set_triggers(one("b")).await.unwrap();
    let new = agent.rules().await;
    assert_ne!(old.nonce, new.nonce);
    agent.apply(&old, vec![]).await;
    eventually("it is counted", || async {
        metric(running.http_addr, "gannet_collector_fleet_late_answers_total").await >= 1.0
    })
    .await;
    assert_eq!(state(&client, 2, "n1").await.state(), State::Pending);
    agent.apply(&new, vec![]).await;
    becomes(&client, 2, "n1", State::Applied).await;
    // A set is complete, so the answer to the new one settles the one before.
    becomes(&client, 1, "n1", State::Applied).await;
    // An answer with another digest counts as a rejection.
    client.set_triggers(one("c")).await.unwrap();
    let mut set = agent.rules().await;
    set.digest = "0".repeat(64);
    agent.apply(&set, vec![]).await;
    let rejected = becomes(&client, 3, "n1", State::Rejected).await;
    assert!(rejected.errors[0].reason.contains("digest"), "{rejected:?}");
    running.shutdown().await;
}

#[tokio::test]
async fn a_node_with_the_newest_rules_gets_none_and_is_applied() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    client.set_triggers(one("a")).await.unwrap();
    let digest = rules::digest(&one("a").rules);
    let mut agent = Agent::connect(&running, "n1", &digest).await;
    becomes(&client, 1, "n1", State::Applied).await;
    agent.receives_nothing().await;
    // A new revision that changes nothing for this node.
    let elsewhere = parse("rules: [{id: z, match: {comm: [x]}, nodes: {names: [n2]}}]");
    let other = SetTriggersRequest { scope: "other".into(), rules: elsewhere, ..Default::default() };
    client.set_triggers(other).await.unwrap();
    becomes(&client, 2, "n1", State::Applied).await;
    agent.receives_nothing().await;
    assert_eq!(metric(running.http_addr, "gannet_collector_fleet_rule_pushes_total").await as u64, 0);
    // A node that lost its rules gets them again.
    drop(agent);
    becomes(&client, 2, "n1", State::Offline).await;
    let mut agent = Agent::connect(&running, "n1", "").await;
    let set = agent.rules().await;
    assert_eq!((set.revision, set.digest), (2, digest));
    assert_eq!(state(&client, 2, "n1").await.state(), State::Pending);
    running.shutdown().await;
}

#[tokio::test]
async fn a_partial_node_stays_partial_after_a_reconnect() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    client.set_triggers(one("a")).await.unwrap();
    let mut agent = Agent::connect(&running, "n1", "").await;
    let set = agent.rules().await;
    agent.apply(&set, vec![RuleError { reason: "no cgroup2".into(), ..Default::default() }]).await;
    becomes(&client, 1, "n1", State::Partial).await;
    drop(agent);
    becomes(&client, 1, "n1", State::Offline).await;
    let mut agent = Agent::connect(&running, "n1", &set.digest).await;
    let partial = becomes(&client, 1, "n1", State::Partial).await;
    assert_eq!(partial.errors[0].reason, "no cgroup2");
    agent.receives_nothing().await;
    running.shutdown().await;
}

/// Checks rules that get their slots later: the state of the node follows what it reports.
#[tokio::test]
async fn a_node_that_reports_no_faults_any_more_is_applied() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    client.set_triggers(one("a")).await.unwrap();
    let mut agent = Agent::connect(&running, "n1", "").await;
    let set = agent.rules().await;
    let waits =
        RuleError { rule_id: "a".into(), reason: "waits for a free slot".into(), ..Default::default() };
    agent.apply(&set, vec![waits.clone()]).await;
    becomes(&client, 1, "n1", State::Partial).await;
    let report = |errors: Option<Vec<RuleError>>, digest: &str| {
        agent_message::Message::Status(NodeStatus {
            active_revision: 1,
            active_digest: digest.into(),
            faults: errors.map(|errors| RuleFaults { errors }),
            ..NodeStatus::default()
        })
    };
    // An older agent reports no faults, and a report on other rules says nothing about these.
    agent.send(report(None, &set.digest)).await;
    agent.send(report(Some(Vec::new()), "another")).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(state(&client, 1, "n1").await.state(), State::Partial);
    agent.send(report(Some(Vec::new()), &set.digest)).await;
    assert!(becomes(&client, 1, "n1", State::Applied).await.errors.is_empty());
    agent.send(report(Some(vec![waits.clone()]), &set.digest)).await;
    assert_eq!(becomes(&client, 1, "n1", State::Partial).await.errors, [waits]);
    running.shutdown().await;
}

#[tokio::test]
async fn an_emptied_scope_removes_the_rules_from_the_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    client.set_triggers(one("a")).await.unwrap();
    let mut agent = Agent::connect(&running, "n1", "").await;
    let set = agent.rules().await;
    agent.apply(&set, vec![]).await;
    becomes(&client, 1, "n1", State::Applied).await;
    client.set_triggers(SetTriggersRequest { allow_empty: true, ..Default::default() }).await.unwrap();
    let set = agent.rules().await;
    assert!(set.rules.is_empty() && set.revision == 2);
    agent.apply(&set, vec![]).await;
    becomes(&client, 2, "n1", State::Skipped).await;
    running.shutdown().await;
}

#[tokio::test]
async fn a_collector_without_rules_leaves_nodes_theirs() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut agent = Agent::connect(&running, "n1", "rules-of-a-former-life").await;
    agent.receives_nothing().await;
    assert!(rollout(&triggers(&running).await, 0).await.settled);
    running.shutdown().await;
}

/// Returns the degraded parts of the only node that match.
async fn degraded(running: &Running, part: &str) -> Vec<String> {
    let node = nodes(running).await.remove(0);
    node.status.unwrap_or_default().degraded.into_iter().filter(|line| line.starts_with(part)).collect()
}

/// Checks a collector that starts on an empty directory under nodes with rules at revision 3.
#[tokio::test]
async fn rules_that_the_collector_lost_show_until_new_ones_apply() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let hello = NodeHello {
        node: "n1".into(),
        active_revision: 3,
        active_digest: "rules-of-a-former-life".into(),
        ..NodeHello::default()
    };
    let mut agent = Agent::with(&running, hello).await;
    let shown = degraded(&running, "rules:").await;
    assert!(
        shown.len() == 1 && shown[0].contains("revision 3") && shown[0].contains("newest is 0"),
        "{shown:?}"
    );
    // A heartbeat does not hide it.
    let status = |revision, digest: &str| {
        agent_message::Message::Status(NodeStatus {
            at: Some(at(now_ms())),
            active_revision: revision,
            active_digest: digest.into(),
            ..NodeStatus::default()
        })
    };
    agent.send(status(3, "rules-of-a-former-life")).await;
    eventually("the heartbeat arrives", async || {
        nodes(&running).await[0].status.as_ref().is_some_and(|s| s.at.is_some())
    })
    .await;
    assert_eq!(degraded(&running, "rules:").await, shown);

    let mut client = triggers(&running).await;
    client.set_triggers(one("a")).await.unwrap();
    let rules = agent.rules().await;
    assert_eq!(rules.revision, 1, "lower than the node's");
    agent.apply(&rules, vec![]).await;
    becomes(&client, 1, "n1", State::Applied).await;
    agent.send(status(1, &rules.digest)).await;
    eventually("it is mended", async || degraded(&running, "rules:").await.is_empty()).await;
    running.shutdown().await;
}

#[tokio::test]
async fn a_node_with_a_wrong_clock_shows_the_difference() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let agent = Agent::connect(&running, "n1", "").await;
    for (ahead_ms, words) in [(660_000_i64, "11m"), (-7_200_000, "2h behind"), (1000, "")] {
        let at = Some(at(now_ms().saturating_add_signed(ahead_ms)));
        agent.send(agent_message::Message::Status(NodeStatus { at, ..NodeStatus::default() })).await;
        eventually(&format!("the clock shows {words:?}"), async || {
            let shown = degraded(&running, "clock:").await;
            if words.is_empty() { shown.is_empty() } else { shown.len() == 1 && shown[0].contains(words) }
        })
        .await;
    }
    running.shutdown().await;
}

#[tokio::test]
async fn the_newer_connection_of_a_node_wins_and_conflicts_count() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    client.set_triggers(one("a")).await.unwrap();
    let mut first = Agent::connect(&running, "n1", "").await;
    first.rules().await;
    let mut second = Agent::connect(&running, "n1", "").await;
    let status = first.end().await;
    assert_eq!(status.code(), Code::Aborted);
    assert!(status.message().contains("name"), "{status}");
    let set = second.rules().await;
    second.apply(&set, vec![]).await;
    becomes(&client, 1, "n1", State::Applied).await;
    assert_eq!(metric(running.http_addr, "gannet_collector_fleet_nodes_connected").await as u64, 1);
    let mut agents = Vec::new();
    for _ in 0..3 {
        let mut agent = Agent::connect(&running, "n1", "").await;
        agent.rules().await;
        agents.push(agent);
    }
    assert_eq!(metric(running.http_addr, "gannet_collector_fleet_node_name_conflicts_total").await as u64, 1);
    running.shutdown().await;
}

#[tokio::test]
async fn a_node_that_does_not_read_delays_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let mut slow = Agent::connect(&running, "slow", "").await;
    let mut quick = Agent::connect(&running, "quick", "").await;
    // Large enough that unread rule sets soon fill the window of the stream.
    let text = "x".repeat(900);
    for i in 0..60 {
        let mut request = one("seed");
        request.rules = (0..100)
            .map(|k| {
                let mut rule = one(&format!("r{i}-{k}")).rules.remove(0);
                rule.description.clone_from(&text);
                rule
            })
            .collect();
        let revision = client.set_triggers(request).await.unwrap().into_inner().revision;
        loop {
            let set = quick.rules().await;
            quick.apply(&set, vec![]).await;
            if set.revision == revision {
                break;
            }
        }
        becomes(&client, revision, "quick", State::Applied).await;
        assert_eq!(state(&client, revision, "slow").await.state(), State::Pending);
    }
    let mut heard = 0;
    loop {
        heard += 1;
        if slow.rules().await.revision == 60 {
            break;
        }
    }
    assert!(heard < 40, "old sets were kept for a slow node: {heard}");
    running.shutdown().await;
}

#[tokio::test]
async fn a_watch_shows_changes_and_ends_when_all_is_settled() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut client = triggers(&running).await;
    let mut agent = Agent::connect(&running, "n1", "").await;
    let revision = client.set_triggers(one("a")).await.unwrap().into_inner().revision;
    let request = WatchRolloutRequest { revision, until_settled: true };
    let mut watch = client.watch_rollout(request).await.unwrap().into_inner();
    let first = watch.message().await.unwrap().unwrap();
    assert_eq!(first.nodes[0].state(), State::Pending);
    let set = agent.rules().await;
    let began = std::time::Instant::now();
    agent.apply(&set, vec![]).await;
    let mut last = first;
    while let Some(next) = tokio::time::timeout(TEST_TIMEOUT, watch.message()).await.expect("no end").unwrap()
    {
        assert_ne!(next, last, "only changes are reported");
        last = next;
    }
    assert!(last.settled);
    assert_eq!(last.nodes[0].state(), State::Applied);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    for (revision, code) in [(99, Code::NotFound)] {
        let status =
            client.watch_rollout(WatchRolloutRequest { revision, until_settled: false }).await.unwrap_err();
        assert_eq!(status.code(), code);
    }
    running.shutdown().await;
}

#[tokio::test]
async fn known_nodes_survive_a_restart_and_heartbeats_show() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let agent = Agent::connect(&running, "n1", "").await;
    let status =
        NodeStatus { rss_bytes: 42, degraded: vec!["no exit tracepoint".into()], ..Default::default() };
    agent.send(agent_message::Message::Status(status.clone())).await;
    eventually("the heartbeat shows", || async { nodes(&running).await[0].status.as_ref() == Some(&status) })
        .await;
    running.shutdown().await;
    let running = start(dir.path()).await;
    triggers(&running).await.set_triggers(one("a")).await.unwrap();
    let listed = nodes(&running).await;
    assert_eq!((listed.len(), listed[0].name.as_str(), listed[0].connected), (1, "n1", false));
    assert_eq!(state(&triggers(&running).await, 1, "n1").await.state(), State::Offline);
    running.shutdown().await;
    // A damaged file only makes the collector forget the nodes.
    std::fs::write(dir.path().join("nodes.pb"), b"\xff\xff").unwrap();
    let running = start(dir.path()).await;
    assert!(nodes(&running).await.is_empty());
    running.shutdown().await;
}

#[tokio::test]
async fn a_stream_without_a_valid_hello_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let running =
        Collector::start(config_with(dir.path(), |config| config.fleet.max_nodes = 1)).await.unwrap();
    let first = |message: agent_message::Message| {
        let addr = running.grpc_addr;
        async move {
            let mut client = AgentServiceClient::new(channel(addr).await);
            let (out, receiver) = mpsc::channel(4);
            out.send(AgentMessage { message: Some(message) }).await.unwrap();
            let mut stream = client.connect(ReceiverStream::new(receiver)).await.unwrap().into_inner();
            stream.message().await.unwrap_err()
        }
    };
    let status = first(agent_message::Message::Status(NodeStatus::default())).await;
    assert!(status.code() == Code::InvalidArgument && status.message().contains("hello"), "{status}");
    let status = first(agent_message::Message::Hello(NodeHello::default())).await;
    assert!(status.code() == Code::InvalidArgument && status.message().contains("hello.node"), "{status}");
    let _agent = Agent::connect(&running, "n1", "").await;
    let status =
        first(agent_message::Message::Hello(NodeHello { node: "n2".into(), ..Default::default() })).await;
    assert!(status.code() == Code::ResourceExhausted && status.message().contains("--max-nodes"), "{status}");
    running.shutdown().await;
}
