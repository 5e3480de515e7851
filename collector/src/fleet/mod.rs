//! Who is connected, what each node was sent, and what it answered.
//!
//! Every agent has one task, which alone talks to it: it waits for new rules, offers the node its part of them, and
//! takes its answers. What is offered and not yet sent is replaced by what is newer, so a slow node costs one rule set
//! and delays nobody.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use gannet_proto::{
    control::{
        AgentMessage, Answer as NodeAnswer, AuditEntry, CancelQuestion, CaptureProgress, CaptureRequest,
        ExplainRequest, ExplainResponse, ListNodesRequest, ListNodesResponse, Node, NodeHello, NodeRollout,
        NodeStatus, Question, ResumeRolloutRequest, Rollout, Rule, RuleError, RuleSet, ServerMessage, Staged,
        agent_message, agent_service_server::AgentService, answer, capture_progress,
        fleet_service_server::FleetService, node_rollout::State, question, rule_status, server_message,
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
    Config,
    auth::Who,
    durable,
    ingest::MAX_NODE_NAME,
    metrics::Metrics,
    rules::{ForNode, Published, Rules, SELF},
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
/// Questions to one node that are not answered yet.
const MAX_QUESTIONS: usize = 32;
/// Parts of one answer that wait for whoever asked. A capture comes in parts of 256 KiB at most.
const MAX_PARTS: usize = 128;
/// How long a node may take to answer what it can answer at once.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Of a capture, beyond its duration: stacks are walked and named after the last sample.
const CAPTURE_GRACE: Duration = Duration::from_secs(60);
const MAX_CAPTURE: Duration = Duration::from_secs(600);
/// How often staged rollouts are looked at.
pub(crate) const STAGING_INTERVAL: Duration = Duration::from_millis(500);
/// What an agent that answers questions has among its features.
const QUESTIONS: &str = "questions";
const CAPTURE: &str = "capture";

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

#[derive(Clone)]
struct Connection {
    id: Ulid,
    replaced: CancellationToken,
    asks: mpsc::Sender<Ask>,
}

/// What a session is to ask its node.
struct Ask {
    id: String,
    /// Not given: whoever asked is gone.
    question: Option<question::Question>,
    /// Given with a question. Nobody else holds it, so that who waits learns when the session ends.
    reply: Option<mpsc::Sender<answer::Answer>>,
}

/// Why a node was not asked, or did not answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error("there is no node `{0}`; `gannetctl nodes` shows those that there are")]
    Unknown(String),
    #[error("node `{0}` is not connected to this collector")]
    Offline(String),
    #[error("node `{node}` runs version {version}, which cannot do this: update its agent")]
    TooOld { node: String, version: String },
    #[error("node `{0}` has {MAX_QUESTIONS} questions to answer already: try again")]
    Busy(String),
    #[error("node `{0}` did not answer in time")]
    Silent(String),
    #[error("node `{node}`: {reason}")]
    Refused { node: String, reason: String },
}

impl From<AskError> for Status {
    fn from(error: AskError) -> Self {
        let text = error.to_string();
        match error {
            AskError::Unknown(_) => Status::not_found(text),
            AskError::Offline(_) => Status::unavailable(text),
            AskError::TooOld { .. } | AskError::Refused { .. } => Status::failed_precondition(text),
            AskError::Busy(_) => Status::resource_exhausted(text),
            AskError::Silent(_) => Status::deadline_exceeded(text),
        }
    }
}

/// An answer on its way. Dropping it tells the node that nobody waits.
pub(crate) struct Asked {
    node: String,
    id: String,
    asks: mpsc::Sender<Ask>,
    parts: mpsc::Receiver<answer::Answer>,
}

impl Asked {
    /// The next part.
    async fn part(&mut self, patience: Duration) -> Result<answer::Answer, AskError> {
        match tokio::time::timeout(patience, self.parts.recv()).await {
            Ok(Some(answer::Answer::Refused(reason))) => {
                Err(AskError::Refused { node: self.node.clone(), reason })
            }
            Ok(Some(part)) => Ok(part),
            // The session has ended, and with it its end of this channel.
            Ok(None) => Err(AskError::Offline(self.node.clone())),
            Err(_) => Err(AskError::Silent(self.node.clone())),
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let ask = Ask { id: std::mem::take(&mut self.id), question: None, reply: None };
        // A session that has that much to do finds out when it passes on the next part.
        let _ = self.asks.try_send(ask);
    }
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
    note: String,
}

/// A rule set that was sent, or is about to be, and is not answered.
struct Outstanding {
    revision: u64,
    nonce: String,
    digest: String,
    is_empty: bool,
    offered: Instant,
    held: Vec<String>,
    tried: Vec<String>,
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
        // The rules themselves are the scope's to tell.
        let without_rules = |staged: Staged| Staged { former: Vec::new(), ..staged };
        let staged = self.rules.staged().into_iter();
        let staged = staged.map(|(scope, (_, staged))| (scope, without_rules(staged))).collect();
        Rollout { revision, created_at: Some(time::timestamp(made_ms)), nodes, settled, staged }
    }

    /// Puts a question to a node. `feature`: what its agent must be able to do.
    pub(crate) fn ask(
        &self,
        node: &str,
        feature: &str,
        question: question::Question,
    ) -> Result<Asked, AskError> {
        let asks = {
            let nodes = self.lock();
            let known = nodes.get(node).ok_or_else(|| AskError::Unknown(node.to_owned()))?;
            let connection = known.connection.as_ref().ok_or_else(|| AskError::Offline(node.to_owned()))?;
            if !known.hello.features.iter().any(|have| have == feature) {
                return Err(AskError::TooOld { node: node.to_owned(), version: known.hello.version.clone() });
            }
            connection.asks.clone()
        };
        self.metrics.questions.inc();
        let (reply, parts) = mpsc::channel(MAX_PARTS);
        let id = Ulid::new().to_string();
        let ask = Ask { id: id.clone(), question: Some(question), reply: Some(reply) };
        match asks.try_send(ask) {
            Ok(()) => Ok(Asked { node: node.to_owned(), id, asks, parts }),
            Err(mpsc::error::TrySendError::Full(_)) => Err(AskError::Busy(node.to_owned())),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(AskError::Offline(node.to_owned())),
        }
    }

    /// Puts a question that has one answer.
    pub(crate) async fn ask_once(
        &self,
        node: &str,
        question: question::Question,
    ) -> Result<answer::Answer, AskError> {
        self.ask(node, QUESTIONS, question)?.part(ANSWER_TIMEOUT).await
    }

    /// The labels of a node that is connected.
    pub(crate) fn labels(&self, node: &str) -> BTreeMap<String, String> {
        self.lock().get(node).map(|known| known.hello.labels.clone()).unwrap_or_default()
    }

    /// Staged sets that have stood their time without a rejection go to all nodes. Blocking.
    pub(crate) fn complete_staged(&self) {
        for (scope, (revision, staged)) in self.rules.staged() {
            let Some(soak) = staged.soak.and_then(|soak| Duration::try_from(soak).ok()) else { continue };
            let since_ms = staged.since.as_ref().and_then(time::to_ms).unwrap_or(u64::MAX);
            let is_over = |at_ms: u64| u128::from(time::now_ms()) >= u128::from(at_ms) + soak.as_millis();
            if !staged.paused.is_empty() || !is_over(since_ms) {
                continue;
            }
            let all_have_it =
                {
                    let nodes = self.lock();
                    let mut tried = nodes
                        .iter()
                        .filter(|(name, known)| {
                            known.connection.is_some() && rules::canary_rank(name) < staged.percent
                        })
                        .peekable();
                    // Nobody to try it on proves nothing.
                    tried.peek().is_some()
                        && tried.all(|(_, known)| {
                            known.answers.iter().find(|a| a.revision >= revision).is_some_and(|answer| {
                                answer.state != State::Rejected && is_over(answer.since_ms)
                            })
                        })
                };
            if all_have_it {
                let request = ResumeRolloutRequest { scope: scope.clone(), percent: 0 };
                if let Err(error) = self.rules.resume(&request, SELF) {
                    tracing::warn!(scope, "the staged rules could not be brought to all nodes: {error}");
                }
            }
        }
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
    fn register(&self, hello: &NodeHello, asks: mpsc::Sender<Ask>) -> Result<Connection, Status> {
        let name = &hello.node;
        if name.is_empty() || name.len() > MAX_NODE_NAME || name.chars().any(char::is_control) {
            return Err(Status::invalid_argument(format!(
                "hello.node: a node's name has 1 to {MAX_NODE_NAME} bytes and no control characters"
            )));
        }
        let connection = Connection { id: Ulid::new(), replaced: CancellationToken::new(), asks };
        let mine = connection.clone();
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
                note: answer.note.clone(),
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
    /// Sent behind that.
    questions: VecDeque<Question>,
    /// Who waits for which answer.
    asked: HashMap<String, mpsc::Sender<answer::Answer>>,
}

impl Session<'_> {
    /// Offers the node its part of what is published, unless it has it.
    fn offer(&mut self, published: Option<&Published>) {
        // Nothing was ever set here, or it cannot be read: the node keeps what it has.
        let Some(published) = published.filter(|p| p.revision > 0) else { return };
        let revision = published.revision;
        let ForNode { rules: mine, held, tried } = published.for_node(&self.node.node, &self.node.labels);
        let (digest, is_empty) = (rules::digest(&mine), mine.is_empty());
        match &mut self.outstanding {
            None if self.active == digest || (is_empty && self.active.is_empty()) => {
                self.fleet.update(&self.node.node, self.connection, |known| {
                    let (state, errors) = known.standing(&digest, is_empty);
                    let (state, note) = kept_back(state, &held);
                    let (since_ms, took) = (time::now_ms(), Duration::ZERO);
                    known.record(Answer { revision, digest, state, errors, since_ms, took, note });
                });
            }
            // On its way already: its answer is this revision's, too.
            Some(outstanding) if outstanding.digest == digest => {
                outstanding.revision = revision;
                (outstanding.held, outstanding.tried) = (held, tried);
            }
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
                let offered = Instant::now();
                self.outstanding =
                    Some(Outstanding { revision, nonce, digest, is_empty, offered, held, tried });
                self.fleet.update(&self.node.node, self.connection, |known| known.forget(revision));
            }
        }
        self.fleet.touch();
    }

    fn hear(&mut self, message: AgentMessage) -> Result<(), Status> {
        self.fleet.update(&self.node.node, self.connection, |known| known.last_seen_ms = time::now_ms());
        match message.message {
            Some(agent_message::Message::Status(status)) => {
                self.fleet.update(&self.node.node, self.connection, |known| {
                    for rule in expired(known.status.as_ref(), &status) {
                        self.fleet.rules.audit().answer(AuditEntry {
                            at: Some(time::timestamp(time::now_ms())),
                            revision: status.active_revision,
                            action: "expired".into(),
                            node: self.node.node.clone(),
                            removed: vec![rule],
                            note: "by the node's own clock".into(),
                            ..AuditEntry::default()
                        });
                    }
                    known.status = Some(status);
                });
                Ok(())
            }
            Some(agent_message::Message::Answer(NodeAnswer { id, answer: Some(answer) })) => {
                self.pass_on(&id, answer);
                Ok(())
            }
            // Of a kind that a newer version knows.
            Some(agent_message::Message::Answer(NodeAnswer { answer: None, .. })) => Ok(()),
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

    /// Takes a question, or the word that nobody waits for its answer any more.
    fn ask(&mut self, Ask { id, question, reply }: Ask) {
        let (Some(question), Some(reply)) = (question, reply) else {
            self.questions.retain(|waiting| waiting.id != id);
            if self.asked.remove(&id).is_some() {
                self.cancel(id);
            }
            return;
        };
        if self.asked.len() >= MAX_QUESTIONS {
            // It is new, so there is room in its channel.
            let _ = reply.try_send(answer::Answer::Refused(format!(
                "it has {MAX_QUESTIONS} questions to answer already: try again"
            )));
            return;
        }
        self.asked.insert(id.clone(), reply);
        self.questions.push_back(Question { id, question: Some(question) });
    }

    fn cancel(&mut self, id: String) {
        let question = Some(question::Question::Cancel(CancelQuestion {}));
        self.questions.push_back(Question { id, question });
    }

    /// A part of an answer, to whoever asked. Somebody who does not take it holds up nobody.
    fn pass_on(&mut self, id: &str, answer: answer::Answer) {
        let Some(reply) = self.asked.get(id) else { return };
        let is_last = !matches!(
            &answer,
            answer::Answer::Capture(CaptureProgress { message: Some(message) })
                if !matches!(message, capture_progress::Message::Done(_))
        );
        let passed = reply.try_send(answer).is_ok();
        if is_last || !passed {
            self.asked.remove(id);
        }
        if !is_last && !passed {
            self.cancel(id.to_owned());
        }
    }

    /// What is to be sent next.
    fn next_message(&mut self) -> Option<ServerMessage> {
        if let Some(rules) = self.unsent.take() {
            self.fleet.metrics.rule_pushes.inc();
            return Some(rules);
        }
        let question = self.questions.pop_front()?;
        Some(ServerMessage { message: Some(server_message::Message::Question(question)) })
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
        let Outstanding { revision, digest, offered, held, tried, .. } = outstanding;
        let took = offered.elapsed();
        if state == State::Rejected && !tried.is_empty() {
            self.pause(revision, &tried, &errors);
        }
        let (state, note) = kept_back(state, &held);
        match errors.first() {
            Some(first) => tracing::warn!(
                node = %self.node.node, revision, state = state.as_str_name(), errors = errors.len(),
                rule = %first.rule_id, field = %first.field, reason = %first.reason, "rules are not all in force"
            ),
            None => {
                tracing::info!(node = %self.node.node, revision, state = state.as_str_name(), ?took, "rules answered");
            }
        }
        self.fleet.rules.audit().answer(AuditEntry {
            at: Some(time::timestamp(time::now_ms())),
            revision,
            action: "answer".into(),
            node: self.node.node.clone(),
            state: state.into(),
            errors: errors.clone(),
            note: note.clone(),
            ..AuditEntry::default()
        });
        let answer = Answer { revision, digest, state, errors, since_ms: time::now_ms(), took, note };
        self.fleet.update(&self.node.node, self.connection, |known| known.record(answer));
        self.fleet.touch();
    }

    /// The node has rejected what is tried on it: the staged sets go no further by themselves.
    fn pause(&self, revision: u64, tried: &[String], errors: &[RuleError]) {
        let published = self.fleet.rules.subscribe().borrow().clone();
        let Some(published) = published else { return };
        let ids: Vec<&str> = errors.iter().map(|error| error.rule_id.as_str()).collect();
        let scopes: Vec<String> =
            published.staged_with(&ids).into_iter().filter(|scope| tried.contains(scope)).collect();
        let words = errors.first().map_or_else(
            || "without a reason".to_owned(),
            |RuleError { rule_id, field, reason }| format!("rule `{rule_id}`: {field}: {reason}"),
        );
        let why = format!("node {} has rejected it: {words}", self.node.node);
        let rules = Arc::clone(&self.fleet.rules);
        let fleet_changes = self.fleet.changes.clone();
        tokio::task::spawn_blocking(move || {
            for scope in scopes {
                match rules.pause(&scope, revision, &why) {
                    Ok(()) => fleet_changes.send_modify(|n| *n += 1),
                    Err(error) => tracing::error!(scope, "the staged rollout could not be paused: {error}"),
                }
            }
        });
    }
}

/// A node that keeps the former rules of a staged scope has them in force, and not what the revision is about.
fn kept_back(state: State, held: &[String]) -> (State, String) {
    match held {
        [] => (state, String::new()),
        held => {
            let note = format!("keeps the former rules of {}: the new ones are staged", held.join(", "));
            (if state == State::Applied { State::Skipped } else { state }, note)
        }
    }
}

/// Rules that have expired between two heartbeats.
fn expired(before: Option<&NodeStatus>, now: &NodeStatus) -> Vec<String> {
    let is_expired =
        |status: &gannet_proto::control::RuleStatus| status.state() == rule_status::State::Expired;
    let was =
        |id: &str| before.is_some_and(|b| b.rules.iter().any(|rule| rule.rule_id == id && is_expired(rule)));
    now.rules.iter().filter(|r| is_expired(r) && !was(&r.rule_id)).map(|r| r.rule_id.clone()).collect()
}

type Out = mpsc::Sender<Result<ServerMessage, Status>>;

/// Talks to one agent until either end has enough.
async fn converse(
    fleet: &Fleet,
    who: &Who,
    mut stream: Streaming<AgentMessage>,
    out: &Out,
) -> Result<(), Status> {
    let hello = tokio::time::timeout(HELLO_TIMEOUT, stream.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no hello within 10 s of opening the stream"))??;
    let Some(AgentMessage { message: Some(agent_message::Message::Hello(hello)) }) = hello else {
        return Err(Status::invalid_argument("the first message must be hello"));
    };
    who.may_be_node(&hello.node)?;
    let (asks, asked) = mpsc::channel(MAX_QUESTIONS);
    let connection = fleet.register(&hello, asks)?;
    let end = listen(fleet, &hello, &connection, &mut stream, asked, out).await;
    fleet.unregister(&hello.node, &connection);
    end
}

async fn listen(
    fleet: &Fleet,
    hello: &NodeHello,
    connection: &Connection,
    stream: &mut Streaming<AgentMessage>,
    mut asks: mpsc::Receiver<Ask>,
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
        questions: VecDeque::new(),
        asked: HashMap::new(),
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
            permit = out.reserve(), if session.unsent.is_some() || !session.questions.is_empty() => {
                let Ok(permit) = permit else { return Ok(()) };
                if let Some(message) = session.next_message() {
                    permit.send(Ok(message));
                }
            }
            // The fleet's entry holds the other end as long as this connection speaks for the node.
            Some(ask) = asks.recv() => session.ask(ask),
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
        let who = request.extensions().get::<Who>().cloned().unwrap_or_default();
        let (out, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            if let Err(status) = converse(&fleet, &who, request.into_inner(), &out).await {
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

    async fn explain(&self, request: Request<ExplainRequest>) -> Result<Response<ExplainResponse>, Status> {
        let request = request.into_inner();
        let node = request.node.clone();
        match self.0.ask_once(&node, question::Question::Explain(request)).await? {
            answer::Answer::Explain(answer) => Ok(Response::new(answer)),
            _ => Err(Status::internal(format!("node `{node}` answered something else"))),
        }
    }

    type CaptureStream = Pin<Box<dyn Stream<Item = Result<CaptureProgress, Status>> + Send>>;

    async fn capture(
        &self,
        request: Request<CaptureRequest>,
    ) -> Result<Response<Self::CaptureStream>, Status> {
        let request = check_capture(request.into_inner())?;
        let node = request.node.clone();
        let duration = request.duration.and_then(|d| Duration::try_from(d).ok()).unwrap_or(MAX_CAPTURE);
        let mut asked = self.0.ask(&node, CAPTURE, question::Question::Capture(request))?;
        let (sender, receiver) = mpsc::channel(4);
        let stop = self.0.stop.clone();
        tokio::spawn(async move {
            let forward = async {
                loop {
                    let part = match asked.part(duration + CAPTURE_GRACE).await {
                        Ok(answer::Answer::Capture(part)) => Ok(part),
                        Ok(_) => Err(Status::internal(format!("node `{node}` answered something else"))),
                        Err(error) => Err(error.into()),
                    };
                    let is_last = !matches!(&part, Ok(CaptureProgress { message: Some(message) })
                        if !matches!(message, capture_progress::Message::Done(_)));
                    if sender.send(part).await.is_err() || is_last {
                        return;
                    }
                }
            };
            tokio::select! {
                () = forward => {}
                () = sender.closed() => {}
                () = stop.cancelled() => {
                    let _ = sender.try_send(Err(Status::unavailable("the collector is shutting down")));
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// What a capture must say; the node checks what it may.
fn check_capture(mut request: CaptureRequest) -> Result<CaptureRequest, Status> {
    let duration = request.duration.get_or_insert_with(|| time::span(Duration::from_secs(30)));
    if !Duration::try_from(*duration).is_ok_and(|d| (Duration::from_secs(1)..=MAX_CAPTURE).contains(&d)) {
        return Err(Status::invalid_argument("duration: give 1 s to 10 min"));
    }
    if request.hz == 0 {
        request.hz = rules::TRIGGERED_HZ;
    }
    // As the rule that it is: one validator for all.
    let rule = Rule {
        id: "capture".into(),
        r#match: request.r#match.clone(),
        capture: Some(gannet_proto::control::Capture {
            hz: request.hz,
            kind: request.kind.clone(),
            ..Default::default()
        }),
        lifetime: Some(gannet_proto::control::Lifetime { ttl: request.duration, not_before: None }),
        ..Rule::default()
    };
    if !request.pod.is_empty() && request.pod.split('/').filter(|part| !part.is_empty()).count() != 2 {
        return Err(Status::invalid_argument(format!("pod: `{}` is not namespace/name", request.pod)));
    }
    let faults = rules::validate(&[rule], &rules::Caps::default());
    // A pod is enough to go by.
    match faults.iter().find(|fault| fault.field != "match" || request.pod.is_empty()) {
        None => Ok(request),
        Some(RuleError { field, reason, .. }) => {
            Err(Status::invalid_argument(format!("{}: {reason}", field.trim_start_matches("capture."))))
        }
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
