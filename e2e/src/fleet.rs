//! A fleet of simulated nodes: each one a real control stream on a connection of its own, which applies whatever it is
//! sent and comes back as an agent does when its collector goes away.

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

/// What the nodes have seen, all together.
#[derive(Default)]
pub struct Counts {
    /// Streams that stand.
    pub connected: AtomicU64,
    /// Rule sets that came.
    pub pushed: AtomicU64,
}

/// Running nodes. Dropped: they all go away.
pub struct Fleet {
    /// What they have seen.
    pub counts: Arc<Counts>,
    size: u64,
    _tasks: JoinSet<()>,
}

impl Fleet {
    /// Starts so many nodes that dial `url`, and waits until all are connected.
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

    /// Waits until every node is connected.
    pub async fn connected(&self) {
        eventually_within(Duration::from_secs(180), "all nodes are connected", async || {
            (self.counts.connected.load(Relaxed) == self.size).then_some(())
        })
        .await;
    }

    /// Rule sets that came until now.
    pub fn pushed(&self) -> u64 {
        self.counts.pushed.load(Relaxed)
    }
}

/// One node, for ever.
async fn node(name: String, url: String, heartbeat: Duration, counts: Arc<Counts>) {
    let mut active = (0, String::new());
    let mut wait = 1.0_f64;
    loop {
        // Nothing is left of a stream that ended: the next one is a new connection.
        let begin = Instant::now();
        let mut stood = false;
        let _ended = stream(&name, &url, heartbeat, &mut active, &counts, &mut stood).await;
        if stood {
            counts.connected.fetch_sub(1, Relaxed);
        }
        if begin.elapsed() > Duration::from_secs(30) {
            wait = 1.0;
        }
        // As the agent waits: anywhere between a second and three times the last wait.
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
    stood: &mut bool,
) -> Result<(), Status> {
    let endpoint = Channel::from_shared(url.to_owned()).map_err(|e| Status::internal(e.to_string()))?;
    let channel = endpoint.connect().await.map_err(|e| Status::unavailable(e.to_string()))?;
    let (out, receiver) = mpsc::channel(8);
    let say = async |message| {
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
    say(Message::Hello(hello)).await?;
    let mut incoming =
        AgentServiceClient::new(channel).connect(ReceiverStream::new(receiver)).await?.into_inner();
    counts.connected.fetch_add(1, Relaxed);
    *stood = true;
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
                    say(Message::Applied(RulesApplied { revision, nonce, digest, partial: Vec::new() })).await?;
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
                say(Message::Status(status)).await?;
            }
        }
    }
}

/// Sets as many rules anew, and waits until every node has answered. Gives how long that took from the call on.
pub async fn push_round(collector: &Collector, round: u32, rules: u32, nodes: u64) -> Duration {
    let set =
        (0..rules).map(|number| rule(&format!("rule-{number}"), &format!("round{round}"), 99)).collect();
    let begin = Instant::now();
    let revision = collector.set_rules(set).await.expect("the rules are taken").revision;
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
