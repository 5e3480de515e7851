//! The fleet: connected nodes, the rules that each node was sent, and the nodes' answers.
//!
//! Every agent has one session task, and only this task talks to it. The task waits for new rules, offers the node its
//! part of them, and receives its answers. A newer offer replaces an unsent one. So a slow node costs the memory of one
//! rule set and delays no other node.

mod grpc;
mod known;
mod request;
mod session;
mod staging;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::Args;
use gannet_proto::{
    control::{Node, NodeHello, NodeRollout, Rollout, Rule, Staged, node_rollout::State},
    rules,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;

pub(crate) use self::{grpc::FleetGrpc, staging::STAGING_INTERVAL};
use self::{
    known::{KnownNode, NodeConnection},
    request::SessionCommand,
};
use crate::{
    limits::MAX_NODE_NAME,
    metrics::Metrics,
    rules::{NodeStates, Rules},
    time,
};

/// Time after which the fleet forgets a disconnected node.
const NODE_EXPIRY: Duration = Duration::from_secs(24 * 3600);
/// Time between two writings of the list of known nodes.
pub(crate) const UPKEEP_INTERVAL: Duration = Duration::from_secs(30);
/// Takeovers of one node name within [`CONFLICT_WINDOW`] that mean two agents, and not one that reconnects.
const CONFLICT_COUNT: usize = 3;
const CONFLICT_WINDOW: Duration = Duration::from_secs(60);

/// Limits of the fleet.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Limits")]
#[serde(default)]
pub struct FleetOptions {
    /// Know at most this many nodes at one time
    #[arg(long, value_name = "N", env = "GANNET_COLLECTOR_MAX_NODES", default_value_t = 10_000)]
    pub max_nodes: usize,
}

impl Default for FleetOptions {
    fn default() -> Self {
        gannet_base::defaults()
    }
}

/// The known nodes, by name. Only the sessions change a node's entry.
pub(crate) struct Fleet {
    nodes: Mutex<BTreeMap<String, KnownNode>>,
    rules: Arc<Rules>,
    /// Counts the changes that a rollout shows.
    changes: watch::Sender<u64>,
    file: PathBuf,
    metrics: Metrics,
    max_nodes: usize,
    stop: CancellationToken,
}

impl Fleet {
    /// Opens the fleet with the nodes that the data directory lists. Blocking, for a moment.
    pub(crate) fn open(
        data: &Path,
        options: &FleetOptions,
        rules: Arc<Rules>,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let file = data.join("nodes.pb");
        let nodes = known::load(&file);
        metrics.nodes_known.set(nodes.len() as i64);
        Arc::new(Self {
            nodes: Mutex::new(nodes),
            rules,
            changes: watch::Sender::new(0),
            file,
            metrics,
            max_nodes: options.max_nodes,
            stop,
        })
    }

    /// Wakes the watchers of rollouts.
    pub(crate) fn notify_changed(&self) {
        self.changes.send_modify(|n| *n += 1);
    }

    /// Returns the names of the connected nodes that at least one of these rules is for.
    pub(crate) fn nodes_for(&self, rules: &[Rule]) -> Vec<String> {
        let nodes = self.nodes.lock();
        let connected = nodes.iter().filter(|(_, known)| known.connection.is_some());
        connected
            .filter(|(name, known)| rules.iter().any(|r| rules::is_for_node(r, name, &known.hello.labels)))
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// Returns all nodes, by name.
    pub(crate) fn nodes(&self) -> Vec<Node> {
        let newest = self.rules.revision(0).ok().flatten();
        let newest_revision = self.rules.scopes().ok().map(|(_, revision)| revision);
        let status = |known: &KnownNode| {
            let problems = known.problems(newest_revision);
            let mut status = known.status.clone();
            if !problems.is_empty() {
                status.get_or_insert_default().degraded.extend(problems);
            }
            status
        };
        let nodes = self.nodes.lock();
        nodes
            .iter()
            .map(|(name, known)| Node {
                name: name.clone(),
                connected: known.connection.is_some(),
                since: Some(time::timestamp(known.since_ms)),
                last_seen: Some(time::timestamp(known.last_seen_ms)),
                hello: Some(known.hello.clone()),
                status: status(known),
                rollout: newest.map(|(revision, made_ms)| known.rollout(name, revision, made_ms)),
            })
            .collect()
    }

    /// Writes the list of known nodes, and forgets nodes that expired. Blocking.
    pub(crate) fn upkeep(&self) {
        let cutoff = time::now_ms().saturating_sub(NODE_EXPIRY.as_millis() as u64);
        let saved = {
            let mut nodes = self.nodes.lock();
            nodes.retain(|_, known| known.connection.is_some() || known.last_seen_ms >= cutoff);
            self.metrics.nodes_known.set(nodes.len() as i64);
            known::to_saved(&nodes)
        };
        known::save(&self.file, &saved);
    }

    /// Makes a new connection the node's, and ends the one before.
    fn register(
        &self,
        hello: &NodeHello,
        commands: mpsc::Sender<SessionCommand>,
    ) -> Result<NodeConnection, Status> {
        let name = &hello.node;
        if name.is_empty() || name.len() > MAX_NODE_NAME || name.chars().any(char::is_control) {
            return Err(Status::invalid_argument(format!(
                "hello.node: a node name has 1 to {MAX_NODE_NAME} bytes and no control characters"
            )));
        }
        let connection = NodeConnection::new(commands);
        let now_ms = time::now_ms();
        let mut nodes = self.nodes.lock();
        if !nodes.contains_key(name) && nodes.len() >= self.max_nodes {
            return Err(Status::resource_exhausted(format!(
                "this collector knows {} nodes, its limit: raise --max-nodes",
                nodes.len()
            )));
        }
        let known = nodes.entry(name.clone()).or_insert_with(|| KnownNode::new(hello.clone(), now_ms));
        let former_version = (known.hello.version != hello.version).then(|| known.hello.version.clone());
        if !known.connect(hello.clone(), connection.clone(), now_ms) {
            self.metrics.nodes_connected.inc();
        } else if known.is_contested(CONFLICT_COUNT, CONFLICT_WINDOW) {
            self.metrics.name_conflicts.inc();
            tracing::warn!(
                node = %name,
                "{CONFLICT_COUNT} connections of this node name replaced one another within a minute: give each agent its \
                 own --node"
            );
        }
        self.metrics.nodes_known.set(nodes.len() as i64);
        drop(nodes);
        tracing::info!(node = %name, version = %hello.version, former_version, "node connected");
        self.notify_changed();
        Ok(connection)
    }

    /// Changes the node's entry, if this connection still speaks for the node.
    fn update(&self, name: &str, connection: &NodeConnection, f: impl FnOnce(&mut KnownNode)) {
        if let Some(known) = self.nodes.lock().get_mut(name)
            && known.connection.as_ref().is_some_and(|c| c.id == connection.id)
        {
            f(known);
        }
    }

    fn unregister(&self, name: &str, connection: &NodeConnection) {
        self.update(name, connection, |known| {
            known.connection = None;
            known.since_ms = time::now_ms();
            self.metrics.nodes_connected.dec();
            tracing::info!(node = %name, "node disconnected");
        });
        self.notify_changed();
    }
}

impl NodeStates for Fleet {
    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn rollout(&self, revision: u64, made_ms: u64) -> Rollout {
        let nodes: Vec<NodeRollout> =
            self.nodes.lock().iter().map(|(name, known)| known.rollout(name, revision, made_ms)).collect();
        let settled = nodes.iter().all(|n| n.state() != State::Pending);
        // A rollout does not repeat the former rules; the scope shows them.
        let without_rules = |staged: Staged| Staged { former: Vec::new(), ..staged };
        let staged = self.rules.staged().into_iter();
        let staged = staged.map(|(scope, (_, staged))| (scope, without_rules(staged))).collect();
        Rollout { revision, created_at: Some(time::timestamp(made_ms)), nodes, settled, staged }
    }

    fn labels(&self, node: &str) -> BTreeMap<String, String> {
        self.nodes.lock().get(node).map(|known| known.hello.labels.clone()).unwrap_or_default()
    }
}
