//! A fleet of simulated nodes. Each has a real control stream on its own connection, applies each rule set that it receives,
//! and reconnects as an agent does.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use gannet_proto::control::{
    AgentMessage, NodeHello, NodeStatus, RuleStatus, RulesApplied, ServerMessage, WatchRolloutRequest,
    agent_message::Message, agent_service_client::AgentServiceClient, node_rollout::State, rule_status,
    server_message, trigger_service_client::TriggerServiceClient,
};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, transport::Channel};

use crate::{Collector, eventually_within, rule};

/// Counts over all nodes.
#[derive(Default)]
pub struct Counts {
    /// Streams that are connected now.
    pub connected: AtomicU64,
    /// Rule sets that the nodes received.
    pub pushed: AtomicU64,
}

/// Running nodes. Dropping it disconnects all.
pub struct Fleet {
    /// Counts over all nodes.
    pub counts: Arc<Counts>,
    size: u64,
    _tasks: JoinSet<()>,
}

impl Fleet {
    /// Starts `size` nodes that dial `url`, and waits until all are connected.
    pub async fn start(url: &str, size: u64, heartbeat: Duration) -> Self {
        let counts = Arc::new(Counts::default());
        let mut tasks = JoinSet::new();
        for number in 0..size {
            tasks.spawn(node(format!("node-{number:04}"), url.to_owned(), heartbeat, Arc::clone(&counts)));
        }
        let fleet = Self { counts, size, _tasks: tasks };
        fleet.connected().await;
        fleet
    }

    /// Waits at most three minutes until every node is connected.
    pub async fn connected(&self) {
        eventually_within(Duration::from_secs(180), "all nodes are connected", async || {
            (self.counts.connected.load(Relaxed) == self.size).then_some(())
        })
        .await;
    }

    /// Returns the number of rule sets that the nodes received until now.
    pub fn pushed(&self) -> u64 {
        self.counts.pushed.load(Relaxed)
    }
}

/// Runs one node until the task is dropped.
async fn node(name: String, url: String, heartbeat: Duration, counts: Arc<Counts>) {
    let mut active = (0, String::new());
    let mut wait = 1.0_f64;
    loop {
        // Each stream has a new connection.
        let begin = Instant::now();
        let mut connected = false;
        let _ended = stream(&name, &url, heartbeat, &mut active, &counts, &mut connected).await;
        if connected {
            counts.connected.fetch_sub(1, Relaxed);
        }
        if begin.elapsed() > Duration::from_secs(30) {
            wait = 1.0;
        }
        // The agent also waits for a random time between a second and three times the last wait.
        wait = rand::random_range(1.0..=(wait * 3.0).min(60.0));
        tokio::time::sleep(Duration::from_secs_f64(wait)).await;
    }
}

async fn stream(
    name: &str,
    url: &str,
    heartbeat: Duration,
    active: &mut (u64, String),
    counts: &Counts,
    connected: &mut bool,
) -> Result<(), Status> {
    let endpoint = Channel::from_shared(url.to_owned()).map_err(|e| Status::internal(e.to_string()))?;
    let channel = endpoint.connect().await.map_err(|e| Status::unavailable(e.to_string()))?;
    let (out, receiver) = mpsc::channel(8);
    let send = async |message| {
        out.send(AgentMessage { message: Some(message) })
            .await
            .map_err(|_| Status::unavailable("the stream has ended"))
    };
    let hello = NodeHello {
        node: name.to_owned(),
        labels: [("pool".to_owned(), "simulated".to_owned())].into(),
        version: gannet_proto::VERSION.to_owned(),
        kernel: "6.12.0".to_owned(),
        arch: "x86_64".to_owned(),
        features: ["off_cpu", "questions"].map(str::to_owned).to_vec(),
        active_revision: active.0,
        active_digest: active.1.clone(),
        cpus: 64,
        started_at: None,
    };
    send(Message::Hello(hello)).await?;
    let mut incoming =
        AgentServiceClient::new(channel).connect(ReceiverStream::new(receiver)).await?.into_inner();
    counts.connected.fetch_add(1, Relaxed);
    *connected = true;
    let mut rules: Vec<RuleStatus> = Vec::new();
    let first = tokio::time::Instant::now() + heartbeat.mul_f64(rand::random_range(0.0..1.0));
    let mut heartbeat = tokio::time::interval_at(first, heartbeat);
    loop {
        tokio::select! {
            message = incoming.message() => match message? {
                None => return Ok(()),
                Some(ServerMessage { message: Some(server_message::Message::Rules(set)) }) => {
                    counts.pushed.fetch_add(1, Relaxed);
                    *active = (set.revision, set.digest.clone());
                    rules = set
                        .rules
                        .iter()
                        .map(|rule| RuleStatus {
                            rule_id: rule.id.clone(),
                            state: rule_status::State::Capturing.into(),
                            processes: 3,
                            ..RuleStatus::default()
                        })
                        .collect();
                    let (revision, nonce, digest) = (set.revision, set.nonce, set.digest);
                    send(Message::Applied(RulesApplied { revision, nonce, digest, partial: Vec::new() })).await?;
                }
                Some(_) => {}
            },
            _ = heartbeat.tick() => {
                let status = NodeStatus {
                    active_revision: active.0,
                    active_digest: active.1.clone(),
                    rules: rules.clone(),
                    processes_armed: 3,
                    ..NodeStatus::default()
                };
                send(Message::Status(status)).await?;
            }
        }
    }
}

/// Replaces all rules, and waits until every node has answered. Returns the time from the call to the last answer.
pub async fn push_round(collector: &Collector, round: u32, rules: u32, nodes: u64) -> Duration {
    let set =
        (0..rules).map(|number| rule(&format!("rule-{number}"), &format!("round{round}"), 99)).collect();
    let begin = Instant::now();
    let revision = collector.set_rules(set).await.expect("the rules are accepted").revision;
    let mut client = TriggerServiceClient::new(collector.channel()).max_decoding_message_size(64 << 20);
    let request = WatchRolloutRequest { revision, until_settled: true };
    let mut watch = client.watch_rollout(request).await.expect("the rollout").into_inner();
    let mut last = None;
    while let Some(rollout) = watch.message().await.expect("the rollout") {
        last = Some(rollout);
    }
    let took = begin.elapsed();
    let applied =
        last.map(|rollout| rollout.nodes.iter().filter(|node| node.state() == State::Applied).count() as u64);
    assert_eq!(applied, Some(nodes), "every node has applied revision {revision}");
    took
}
