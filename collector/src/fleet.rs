//! Who is connected, what each node was sent, and what it answered.
//!
//! Every agent has one task, which alone talks to it: it waits for new rules, offers the node its part of them, and
//! takes its answers. What is offered and not yet sent is replaced by what is newer, so a slow node costs one rule set
//! and delays nobody.

use std::{
    collections::{BTreeMap, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use gannet_proto::{
    control::{
        AgentMessage, ListNodesRequest, ListNodesResponse, Node, NodeHello, NodeRollout, NodeStatus, Rollout,
        Rule, RuleError, RuleSet, ServerMessage, agent_message, agent_service_server::AgentService,
        fleet_service_server::FleetService, node_rollout::State, server_message,
    },
    rules,
};
use prost::Message as _;
use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use ulid::Ulid;

use crate::{
    Config, durable,
    ingest::MAX_NODE_NAME,
    metrics::Metrics,
    rules::{Published, Rules},
    time,
};

/// How long an agent may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Answers that are remembered of one node.
const MAX_ANSWERS: usize = 32;
/// Errors that are remembered of one answer.
const MAX_ERRORS: usize = 256;
/// A node that was not seen for so long is forgotten.
const NODE_EXPIRY: Duration = Duration::from_secs(24 * 3600);
/// How often known nodes are written down and forgotten.
pub(crate) const UPKEEP_INTERVAL: Duration = Duration::from_secs(30);
/// So many take-overs of a name within [`CONFLICT_WINDOW`] are two agents, not one that reconnects.
const CONFLICT_COUNT: usize = 3;
const CONFLICT_WINDOW: Duration = Duration::from_secs(60);

/// Everything that is known of the nodes.
pub(crate) struct Fleet {
    nodes: Mutex<BTreeMap<String, Known>>,
    rules: Arc<Rules>,
    /// Counts changes that a rollout may show.
    changes: watch::Sender<u64>,
    file: PathBuf,
    metrics: Metrics,
    max_nodes: usize,
    stop: CancellationToken,
}

struct Known {
    hello: NodeHello,
    /// The connection that speaks for the node now.
    connection: Option<Connection>,
    /// When it connected or was lost.
    since_ms: u64,
    last_seen_ms: u64,
    status: Option<NodeStatus>,
    /// By revision, the newest last.
    answers: VecDeque<Answer>,
    taken_over: VecDeque<Instant>,
}

struct Connection {
    id: Ulid,
    replaced: CancellationToken,
}

/// How a node stands to a revision.
#[derive(Clone)]
struct Answer {
    revision: u64,
    /// Of the rules that it answered to.
    digest: String,
    state: State,
    errors: Vec<RuleError>,
    since_ms: u64,
    took: Duration,
}

/// A rule set that was sent, or is about to be, and is not answered.
struct Outstanding {
    revision: u64,
    nonce: String,
    digest: String,
    is_empty: bool,
    offered: Instant,
}

impl Fleet {
    pub(crate) fn open(
        config: &Config,
        rules: Arc<Rules>,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let file = config.data.join("nodes.pb");
        let nodes = load(&file);
        metrics.nodes_known.set(nodes.len() as i64);
        Arc::new(Self {
            nodes: Mutex::new(nodes),
            rules,
            changes: watch::Sender::new(0),
            file,
            metrics,
            max_nodes: config.max_nodes,
            stop,
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something that a rollout shows has changed.
    pub(crate) fn touch(&self) {
        self.changes.send_modify(|n| *n += 1);
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The connected nodes that any of these rules is for, by name.
    pub(crate) fn nodes_for(&self, rules: &[Rule]) -> Vec<String> {
        let nodes = self.lock();
        let connected = nodes.iter().filter(|(_, known)| known.connection.is_some());
        connected
            .filter(|(name, known)| rules.iter().any(|r| rules::is_for_node(r, name, &known.hello.labels)))
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// All nodes, by name.
    pub(crate) fn nodes(&self) -> Vec<Node> {
        let newest = self.rules.revision(0).ok().flatten();
        let nodes = self.lock();
        nodes
            .iter()
            .map(|(name, known)| Node {
                name: name.clone(),
                connected: known.connection.is_some(),
                since: Some(time::timestamp(known.since_ms)),
                last_seen: Some(time::timestamp(known.last_seen_ms)),
                hello: Some(known.hello.clone()),
                status: known.status.clone(),
                rollout: newest.map(|(revision, made_ms)| known.rollout(name, revision, made_ms)),
            })
            .collect()
    }

    /// How every node stands to this revision.
    pub(crate) fn rollout(&self, revision: u64, made_ms: u64) -> Rollout {
        let nodes: Vec<NodeRollout> =
            self.lock().iter().map(|(name, known)| known.rollout(name, revision, made_ms)).collect();
        let settled = nodes.iter().all(|n| n.state() != State::Pending);
        Rollout { revision, created_at: Some(time::timestamp(made_ms)), nodes, settled }
    }

    /// Writes down who is known, and forgets who was not seen for long. Blocking.
    pub(crate) fn upkeep(&self) {
        let cutoff = time::now_ms().saturating_sub(NODE_EXPIRY.as_millis() as u64);
        let saved = {
            let mut nodes = self.lock();
            nodes.retain(|_, known| known.connection.is_some() || known.last_seen_ms >= cutoff);
            self.metrics.nodes_known.set(nodes.len() as i64);
            ListNodesResponse {
                nodes: nodes
                    .iter()
                    .map(|(name, known)| Node {
                        name: name.clone(),
                        last_seen: Some(time::timestamp(known.last_seen_ms)),
                        hello: Some(known.hello.clone()),
                        ..Node::default()
                    })
                    .collect(),
            }
        };
        // Only a convenience after a restart: nothing depends on it.
        if let Err(error) = durable::replace(&self.file, &saved.encode_to_vec()) {
            tracing::warn!(path = %self.file.display(), %error, "known nodes could not be written down");
        }
    }

    /// Makes this connection the node's, and ends the one before.
    fn register(&self, hello: &NodeHello) -> Result<Connection, Status> {
        let name = &hello.node;
        if name.is_empty() || name.len() > MAX_NODE_NAME || name.chars().any(char::is_control) {
            return Err(Status::invalid_argument(format!(
                "hello.node: a node's name has 1 to {MAX_NODE_NAME} bytes and no control characters"
            )));
        }
        let connection = Connection { id: Ulid::new(), replaced: CancellationToken::new() };
        let mine = Connection { id: connection.id, replaced: connection.replaced.clone() };
        let now_ms = time::now_ms();
        let mut nodes = self.lock();
        if !nodes.contains_key(name) && nodes.len() >= self.max_nodes {
            return Err(Status::resource_exhausted(format!(
                "this collector knows {} nodes, its limit: raise --max-nodes",
                nodes.len()
            )));
        }
        let known = nodes.entry(name.clone()).or_insert_with(|| Known::new(hello.clone(), now_ms));
        let others = (known.hello.version != hello.version).then(|| known.hello.version.clone());
        known.hello = hello.clone();
        known.since_ms = now_ms;
        known.last_seen_ms = now_ms;
        if let Some(old) = known.connection.replace(connection) {
            old.replaced.cancel();
            known.taken_over.retain(|at| at.elapsed() < CONFLICT_WINDOW);
            known.taken_over.push_back(Instant::now());
            if known.taken_over.len() >= CONFLICT_COUNT {
                known.taken_over.clear();
                self.metrics.name_conflicts.inc();
                tracing::warn!(
                    node = %name,
                    "{CONFLICT_COUNT} connections of this name replaced one another within a minute: give each agent its \
                     own --node"
                );
            }
        } else {
            self.metrics.nodes_connected.inc();
        }
        self.metrics.nodes_known.set(nodes.len() as i64);
        drop(nodes);
        tracing::info!(node = %name, version = %hello.version, former_version = others, "node connected");
        self.touch();
        Ok(mine)
    }

    /// Does something to the node's entry if this connection still speaks for it.
    fn update(&self, name: &str, connection: &Connection, f: impl FnOnce(&mut Known)) {
        if let Some(known) = self.lock().get_mut(name)
            && known.connection.as_ref().is_some_and(|c| c.id == connection.id)
        {
            f(known);
        }
    }

    fn unregister(&self, name: &str, connection: &Connection) {
        self.update(name, connection, |known| {
            known.connection = None;
            known.since_ms = time::now_ms();
            self.metrics.nodes_connected.dec();
            tracing::info!(node = %name, "node disconnected");
        });
        self.touch();
    }
}

impl Known {
    fn new(hello: NodeHello, now_ms: u64) -> Self {
        Self {
            hello,
            connection: None,
            since_ms: now_ms,
            last_seen_ms: now_ms,
            status: None,
            answers: VecDeque::new(),
            taken_over: VecDeque::new(),
        }
    }

    /// A node that answered to a newer revision without this one skipped over it: sets are whole, so the newer answer
    /// is this one's too.
    fn rollout(&self, name: &str, revision: u64, made_ms: u64) -> NodeRollout {
        let rollout = |state: State, since_ms| NodeRollout {
            node: name.to_owned(),
            state: state.into(),
            since: Some(time::timestamp(since_ms)),
            ..NodeRollout::default()
        };
        if self.connection.is_none() {
            return rollout(State::Offline, self.since_ms);
        }
        match self.answers.iter().find(|a| a.revision >= revision) {
            Some(answer) => NodeRollout {
                errors: answer.errors.clone(),
                took: Some(time::span(answer.took)),
                ..rollout(answer.state, answer.since_ms)
            },
            None => rollout(State::Pending, self.since_ms.max(made_ms)),
        }
    }

    fn record(&mut self, answer: Answer) {
        // Saying the same again does not move the moment at which it became so.
        if self
            .answers
            .iter()
            .any(|a| a.revision == answer.revision && a.digest == answer.digest && a.state == answer.state)
        {
            return;
        }
        self.forget(answer.revision);
        self.answers.push_back(answer);
        while self.answers.len() > MAX_ANSWERS {
            self.answers.pop_front();
        }
    }

    /// The node's answers to this revision and newer ones do not hold any more.
    fn forget(&mut self, revision: u64) {
        self.answers.retain(|a| a.revision < revision);
    }

    /// How the node stands to rules that it has already.
    fn standing(&self, digest: &str, is_empty: bool) -> (State, Vec<RuleError>) {
        let last = self.answers.iter().rev().find(|a| a.digest == digest && a.state != State::Rejected);
        match last {
            _ if is_empty => (State::Skipped, Vec::new()),
            Some(last) => (last.state, last.errors.clone()),
            None => (State::Applied, Vec::new()),
        }
    }
}

/// One agent's conversation.
struct Session<'a> {
    fleet: &'a Fleet,
    node: &'a NodeHello,
    connection: &'a Connection,
    /// Of the rules that are in force on the node.
    active: String,
    outstanding: Option<Outstanding>,
    /// To be sent as soon as the node takes it.
    unsent: Option<ServerMessage>,
}

impl Session<'_> {
    /// Offers the node its part of what is published, unless it has it.
    fn offer(&mut self, published: Option<&Published>) {
        // Nothing was ever set here, or it cannot be read: the node keeps what it has.
        let Some(published) = published.filter(|p| p.revision > 0) else { return };
        let revision = published.revision;
        let mine: Vec<Rule> = published
            .rules
            .iter()
            .filter(|rule| rules::is_for_node(rule, &self.node.node, &self.node.labels))
            .cloned()
            .collect();
        let (digest, is_empty) = (rules::digest(&mine), mine.is_empty());
        match &mut self.outstanding {
            None if self.active == digest || (is_empty && self.active.is_empty()) => {
                self.fleet.update(&self.node.node, self.connection, |known| {
                    let (state, errors) = known.standing(&digest, is_empty);
                    let since_ms = time::now_ms();
                    known.record(Answer { revision, digest, state, errors, since_ms, took: Duration::ZERO });
                });
            }
            // On its way already: its answer is this revision's, too.
            Some(outstanding) if outstanding.digest == digest => outstanding.revision = revision,
            _ => {
                let nonce = Ulid::new().to_string();
                self.unsent = Some(ServerMessage {
                    message: Some(server_message::Message::Rules(RuleSet {
                        revision,
                        nonce: nonce.clone(),
                        rules: mine,
                        digest: digest.clone(),
                    })),
                });
                self.outstanding =
                    Some(Outstanding { revision, nonce, digest, is_empty, offered: Instant::now() });
                self.fleet.update(&self.node.node, self.connection, |known| known.forget(revision));
            }
        }
        self.fleet.touch();
    }

    fn hear(&mut self, message: AgentMessage) -> Result<(), Status> {
        self.fleet.update(&self.node.node, self.connection, |known| known.last_seen_ms = time::now_ms());
        match message.message {
            Some(agent_message::Message::Status(status)) => {
                self.fleet.update(&self.node.node, self.connection, |known| known.status = Some(status));
                Ok(())
            }
            Some(agent_message::Message::Applied(applied)) => {
                let Some(outstanding) = self.answered(&applied.nonce) else { return Ok(()) };
                if applied.digest != outstanding.digest {
                    let reason = format!(
                        "the node says that it applied rules with digest `{}`, and was sent `{}`",
                        applied.digest.escape_debug(),
                        outstanding.digest
                    );
                    let error = RuleError { reason, ..RuleError::default() };
                    self.record(outstanding, State::Rejected, vec![error]);
                    return Ok(());
                }
                self.active.clone_from(&outstanding.digest);
                let state = match () {
                    () if outstanding.is_empty => State::Skipped,
                    () if applied.partial.is_empty() => State::Applied,
                    () => State::Partial,
                };
                self.record(outstanding, state, applied.partial);
                Ok(())
            }
            Some(agent_message::Message::Rejected(rejected)) => {
                let Some(outstanding) = self.answered(&rejected.nonce) else { return Ok(()) };
                self.record(outstanding, State::Rejected, rejected.errors);
                Ok(())
            }
            Some(agent_message::Message::Hello(_)) => {
                Err(Status::invalid_argument("hello is the first message, and only the first"))
            }
            None => Err(Status::invalid_argument("a message without content")),
        }
    }

    /// What this nonce answers; `None`: something older than what was sent last.
    fn answered(&mut self, nonce: &str) -> Option<Outstanding> {
        let outstanding = self.outstanding.take_if(|o| o.nonce == nonce);
        if outstanding.is_none() {
            self.fleet.metrics.late_answers.inc();
            tracing::debug!(node = %self.node.node, "an answer to rules that were replaced by newer ones");
        }
        outstanding
    }

    fn record(&self, outstanding: Outstanding, state: State, mut errors: Vec<RuleError>) {
        errors.truncate(MAX_ERRORS);
        let Outstanding { revision, digest, offered, .. } = outstanding;
        let took = offered.elapsed();
        match errors.first() {
            Some(first) => tracing::warn!(
                node = %self.node.node, revision, state = state.as_str_name(), errors = errors.len(),
                rule = %first.rule_id, field = %first.field, reason = %first.reason, "rules are not all in force"
            ),
            None => {
                tracing::info!(node = %self.node.node, revision, state = state.as_str_name(), ?took, "rules answered");
            }
        }
        let answer = Answer { revision, digest, state, errors, since_ms: time::now_ms(), took };
        self.fleet.update(&self.node.node, self.connection, |known| known.record(answer));
        self.fleet.touch();
    }
}

type Out = mpsc::Sender<Result<ServerMessage, Status>>;

/// Talks to one agent until either end has enough.
async fn converse(fleet: &Fleet, mut stream: Streaming<AgentMessage>, out: &Out) -> Result<(), Status> {
    let hello = tokio::time::timeout(HELLO_TIMEOUT, stream.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no hello within 10 s of opening the stream"))??;
    let Some(AgentMessage { message: Some(agent_message::Message::Hello(hello)) }) = hello else {
        return Err(Status::invalid_argument("the first message must be hello"));
    };
    let connection = fleet.register(&hello)?;
    let end = listen(fleet, &hello, &connection, &mut stream, out).await;
    fleet.unregister(&hello.node, &connection);
    end
}

async fn listen(
    fleet: &Fleet,
    hello: &NodeHello,
    connection: &Connection,
    stream: &mut Streaming<AgentMessage>,
    out: &Out,
) -> Result<(), Status> {
    let mut published = fleet.rules.subscribe();
    let mut session = Session {
        fleet,
        node: hello,
        connection,
        active: hello.active_digest.clone(),
        outstanding: None,
        unsent: None,
    };
    published.mark_changed();
    loop {
        tokio::select! {
            biased;
            () = fleet.stop.cancelled() => {
                return Err(Status::unavailable("the collector is shutting down: connect again"));
            }
            () = connection.replaced.cancelled() => {
                return Err(Status::aborted("another agent has connected with this node's name"));
            }
            changed = published.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let newest = published.borrow_and_update().clone();
                session.offer(newest.as_deref());
            }
            permit = out.reserve(), if session.unsent.is_some() => {
                let Ok(permit) = permit else { return Ok(()) };
                if let Some(message) = session.unsent.take() {
                    fleet.metrics.rule_pushes.inc();
                    permit.send(Ok(message));
                }
            }
            message = stream.message() => match message? {
                Some(message) => session.hear(message)?,
                None => return Ok(()),
            },
        }
    }
}

/// The services of this room.
#[derive(Clone)]
pub(crate) struct FleetGrpc(pub(crate) Arc<Fleet>);

#[tonic::async_trait]
impl AgentService for FleetGrpc {
    type ConnectStream = Pin<Box<dyn Stream<Item = Result<ServerMessage, Status>> + Send>>;

    async fn connect(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let fleet = Arc::clone(&self.0);
        let (out, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            if let Err(status) = converse(&fleet, request.into_inner(), &out).await {
                // An agent that does not read is not worth waiting for.
                let _ = tokio::time::timeout(Duration::from_secs(1), out.send(Err(status))).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

#[tonic::async_trait]
impl FleetService for FleetGrpc {
    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Result<Response<ListNodesResponse>, Status> {
        Ok(Response::new(ListNodesResponse { nodes: self.0.nodes() }))
    }
}

/// Who was known before the restart. A file that cannot be read costs only that.
fn load(file: &Path) -> BTreeMap<String, Known> {
    let content = match fs::read(file) {
        Ok(content) => content,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return BTreeMap::new(),
        Err(error) => {
            tracing::warn!(path = %file.display(), %error, "known nodes could not be read");
            return BTreeMap::new();
        }
    };
    match ListNodesResponse::decode(content.as_slice()) {
        Ok(saved) => saved
            .nodes
            .into_iter()
            .map(|node| {
                let seen_ms = node.last_seen.as_ref().and_then(time::to_ms).unwrap_or(0);
                (node.name, Known::new(node.hello.unwrap_or_default(), seen_ms))
            })
            .collect(),
        Err(error) => {
            tracing::warn!(path = %file.display(), %error, "known nodes could not be read");
            BTreeMap::new()
        }
    }
}
