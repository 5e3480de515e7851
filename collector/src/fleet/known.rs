//! One node as the fleet knows it, and the file that carries the known nodes over a restart.

use std::{
    collections::{BTreeMap, VecDeque},
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

use gannet_base::format_duration;
use gannet_proto::{
    control::{ListNodesResponse, Node, NodeHello, NodeRollout, NodeStatus, RuleError, node_rollout::State},
    rules,
};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use ulid::Ulid;

use super::request::SessionCommand;
use crate::{durable, time};

/// Rule answers that the fleet remembers of one node.
const MAX_ANSWERS: usize = 32;
/// Difference of two clocks above which profiles of one moment no longer line up: the length of a window.
const MAX_CLOCK_DIFFERENCE: Duration = Duration::from_secs(10);

/// A node that is connected, or was connected lately.
pub(super) struct KnownNode {
    pub(super) hello: NodeHello,
    /// The connection that speaks for the node now.
    pub(super) connection: Option<NodeConnection>,
    /// Time of the last connect or disconnect.
    pub(super) since_ms: u64,
    pub(super) last_seen_ms: u64,
    pub(super) status: Option<NodeStatus>,
    /// Time of the newest status by the node's clock, minus its arrival, in milliseconds.
    pub(super) clock_ahead_ms: i64,
    /// By revision, the newest last.
    answers: VecDeque<RuleAnswer>,
    /// Times at which a new connection replaced an open one.
    takeovers: VecDeque<Instant>,
}

/// A handle of the session that speaks for a node.
#[derive(Clone)]
pub(super) struct NodeConnection {
    pub(super) id: Ulid,
    /// Cancelled when another connection of the same node name arrives.
    pub(super) replaced: CancellationToken,
    pub(super) commands: mpsc::Sender<SessionCommand>,
}

impl NodeConnection {
    pub(super) fn new(commands: mpsc::Sender<SessionCommand>) -> Self {
        Self { id: Ulid::new(), replaced: CancellationToken::new(), commands }
    }
}

/// A node's answer to one revision of the rules.
#[derive(Clone)]
pub(super) struct RuleAnswer {
    pub(super) revision: u64,
    /// Digest of the rules that the node answered to.
    pub(super) digest: String,
    pub(super) state: State,
    pub(super) errors: Vec<RuleError>,
    pub(super) since_ms: u64,
    /// Time from the offer to the answer.
    pub(super) took: Duration,
    pub(super) note: String,
}

impl KnownNode {
    pub(super) fn new(hello: NodeHello, now_ms: u64) -> Self {
        Self {
            hello,
            connection: None,
            since_ms: now_ms,
            last_seen_ms: now_ms,
            status: None,
            clock_ahead_ms: 0,
            answers: VecDeque::new(),
            takeovers: VecDeque::new(),
        }
    }

    /// Makes this the node's connection. Ends an open one, and returns whether there was one.
    pub(super) fn connect(&mut self, hello: NodeHello, connection: NodeConnection, now_ms: u64) -> bool {
        self.hello = hello;
        self.since_ms = now_ms;
        self.last_seen_ms = now_ms;
        match self.connection.replace(connection) {
            Some(old) => {
                old.replaced.cancel();
                true
            }
            None => false,
        }
    }

    /// Counts a takeover, and reports whether there were `count` within `window`. Reporting true starts a new count.
    pub(super) fn is_contested(&mut self, count: usize, window: Duration) -> bool {
        self.takeovers.retain(|at| at.elapsed() < window);
        self.takeovers.push_back(Instant::now());
        let is_contested = self.takeovers.len() >= count;
        if is_contested {
            self.takeovers.clear();
        }
        is_contested
    }

    /// Returns the problems of a connected node that the collector sees, in the form of [`NodeStatus::degraded`]. `newest`:
    /// the newest revision of the rules, or `None` while the collector cannot read them.
    pub(super) fn problems(&self, newest: Option<u64>) -> Vec<String> {
        let mut problems = Vec::new();
        if self.connection.is_none() {
            return problems;
        }
        let (revision, digest) = match &self.status {
            Some(status) => (status.active_revision, &status.active_digest),
            None => (self.hello.active_revision, &self.hello.active_digest),
        };
        let has_rules = !digest.is_empty() && *digest != rules::digest(&[]);
        if let Some(newest) = newest.filter(|newest| has_rules && (*newest == 0 || *newest < revision)) {
            problems.push(format!(
                "rules: it runs revision {revision}, which this collector does not know (its newest is {newest}), so the \
                 collector's rules were lost or replaced; apply the rules again"
            ));
        }
        let ahead = Duration::from_millis(self.clock_ahead_ms.unsigned_abs());
        if ahead > MAX_CLOCK_DIFFERENCE {
            let side = if self.clock_ahead_ms > 0 { "ahead of" } else { "behind" };
            let by = format_duration(Duration::from_secs((ahead.as_millis() as u64 + 500) / 1000));
            problems.push(format!(
                "clock: it is {by} {side} the collector's; synchronize both (`chronyc tracking` shows the state)"
            ));
        }
        problems
    }

    /// Returns the node's state for a revision. The answer to a newer revision counts for this one too, because a rule
    /// set is complete and a slow node skips revisions.
    pub(super) fn rollout(&self, name: &str, revision: u64, made_ms: u64) -> NodeRollout {
        let rollout = |state: State, since_ms| NodeRollout {
            node: name.to_owned(),
            state: state.into(),
            since: Some(time::timestamp(since_ms)),
            ..NodeRollout::default()
        };
        if self.connection.is_none() {
            return rollout(State::Offline, self.since_ms);
        }
        match self.answer_to(revision) {
            Some(answer) => NodeRollout {
                errors: answer.errors.clone(),
                took: Some(time::duration(answer.took)),
                note: answer.note.clone(),
                ..rollout(answer.state, answer.since_ms)
            },
            None => rollout(State::Pending, self.since_ms.max(made_ms)),
        }
    }

    /// Returns the answer to this revision or to the next answered one.
    pub(super) fn answer_to(&self, revision: u64) -> Option<&RuleAnswer> {
        self.answers.iter().find(|a| a.revision >= revision)
    }

    /// Remembers an answer. An equal answer does not change the time since which it holds.
    pub(super) fn record(&mut self, answer: RuleAnswer) {
        if self
            .answers
            .iter()
            .any(|a| a.revision == answer.revision && a.digest == answer.digest && a.state == answer.state)
        {
            return;
        }
        self.forget_answers(answer.revision);
        self.answers.push_back(answer);
        while self.answers.len() > MAX_ANSWERS {
            self.answers.pop_front();
        }
    }

    /// Takes the faults that the node reports now in place of those in its answer to these rules. Returns the answer if
    /// its state has changed.
    pub(super) fn revise(&mut self, digest: &str, faults: &[RuleError], now_ms: u64) -> Option<&RuleAnswer> {
        if !self.has_changed_faults(digest, faults) {
            return None;
        }
        let answer = self.answers.back_mut()?;
        let state = match faults {
            // It keeps the former rules of a staged scope, see the note.
            [] if !answer.note.is_empty() => State::Skipped,
            [] => State::Applied,
            _ => State::Partial,
        };
        answer.errors = faults.to_vec();
        let changed = answer.state != state;
        if changed {
            answer.state = state;
            answer.since_ms = now_ms;
        }
        changed.then_some(answer)
    }

    /// Reports whether these faults differ from those in the node's answer to these rules.
    pub(super) fn has_changed_faults(&self, digest: &str, faults: &[RuleError]) -> bool {
        self.answers.back().is_some_and(|answer| {
            // A rejected set is not in force, and a skipped one is none of this node's.
            answer.digest == digest
                && matches!(answer.state, State::Applied | State::Partial)
                && answer.errors != faults
        })
    }

    /// Forgets the answers to this revision and newer ones.
    pub(super) fn forget_answers(&mut self, revision: u64) {
        self.answers.retain(|a| a.revision < revision);
    }

    /// Returns state and errors of rules that the node has already.
    pub(super) fn standing(&self, digest: &str, is_empty: bool) -> (State, Vec<RuleError>) {
        let last = self.answers.iter().rev().find(|a| a.digest == digest && a.state != State::Rejected);
        match last {
            _ if is_empty => (State::Skipped, Vec::new()),
            Some(last) => (last.state, last.errors.clone()),
            None => (State::Applied, Vec::new()),
        }
    }
}

/// Returns the content of the file of known nodes.
pub(super) fn to_saved(nodes: &BTreeMap<String, KnownNode>) -> ListNodesResponse {
    let saved = |(name, known): (&String, &KnownNode)| Node {
        name: name.clone(),
        last_seen: Some(time::timestamp(known.last_seen_ms)),
        hello: Some(known.hello.clone()),
        ..Node::default()
    };
    ListNodesResponse { nodes: nodes.iter().map(saved).collect() }
}

/// Writes the file. A failure is only logged, because the file is a convenience after a restart. Blocking.
pub(super) fn save(file: &Path, nodes: &ListNodesResponse) {
    if let Err(error) = durable::replace(file, &nodes.encode_to_vec()) {
        tracing::warn!(path = %file.display(), %error, "cannot write the list of known nodes");
    }
}

/// Reads the file. An unreadable file counts as empty.
pub(super) fn load(file: &Path) -> BTreeMap<String, KnownNode> {
    let content = match fs::read(file) {
        Ok(content) => content,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return BTreeMap::new(),
        Err(error) => {
            tracing::warn!(path = %file.display(), %error, "cannot read the list of known nodes");
            return BTreeMap::new();
        }
    };
    match ListNodesResponse::decode(content.as_slice()) {
        Ok(saved) => saved
            .nodes
            .into_iter()
            .map(|node| {
                let seen_ms = node.last_seen.as_ref().and_then(time::to_ms).unwrap_or(0);
                (node.name, KnownNode::new(node.hello.unwrap_or_default(), seen_ms))
            })
            .collect(),
        Err(error) => {
            tracing::warn!(path = %file.display(), %error, "cannot read the list of known nodes");
            BTreeMap::new()
        }
    }
}
