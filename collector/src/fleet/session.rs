//! The session of one agent: everything that the collector says to it over the control stream, and hears from it.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use gannet_proto::{
    control::{
        AgentMessage, Answer, AuditEntry, CancelQuestion, NodeHello, NodeStatus, Question, RuleError,
        RuleFaults, RuleSet, RuleStatus, RulesApplied, ServerMessage, agent_message, answer,
        node_rollout::State, question, rule_status, server_message,
    },
    rules,
};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};
use ulid::Ulid;

use super::{
    Fleet,
    known::{NodeConnection, RuleAnswer},
    request::{MAX_REQUESTS, SessionCommand, is_last_part},
};
use crate::{
    auth::Caller,
    rules::{NodeRules, Published, bounded_errors},
    time,
};

/// Time until the first message of a stream.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Errors that the fleet remembers of one answer. The last one reports how many others there are.
const MAX_ERRORS: usize = 256;

/// The sending end of a control stream.
pub(super) type Outbound = mpsc::Sender<Result<ServerMessage, Status>>;

/// Serves one control stream until it ends.
pub(super) async fn serve(
    fleet: &Fleet,
    caller: &Caller,
    mut stream: Streaming<AgentMessage>,
    out: &Outbound,
) -> Result<(), Status> {
    let hello = tokio::time::timeout(HELLO_TIMEOUT, stream.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no hello within 10 s of opening the stream"))??;
    let Some(AgentMessage { message: Some(agent_message::Message::Hello(hello)) }) = hello else {
        return Err(Status::invalid_argument("the first message must be hello"));
    };
    caller.may_be_node(&hello.node)?;
    let (sender, commands) = mpsc::channel(MAX_REQUESTS);
    let connection = fleet.register(&hello, sender)?;
    let end = Session::new(fleet, &hello, &connection).run(&mut stream, commands, out).await;
    fleet.unregister(&hello.node, &connection);
    end
}

/// A rule set that the node was sent, or will be sent next, and has not answered.
struct UnansweredRules {
    revision: u64,
    nonce: String,
    digest: String,
    is_empty: bool,
    offered: Instant,
    /// Scopes whose staged rules this node does not get.
    held: Vec<String>,
    /// Scopes whose staged rules this node runs.
    tried: Vec<String>,
}

/// State of one control stream.
struct Session<'a> {
    fleet: &'a Fleet,
    node: &'a NodeHello,
    connection: &'a NodeConnection,
    /// Digest of the rules in force on the node.
    active: String,
    unanswered: Option<UnansweredRules>,
    /// Rules to send as soon as the stream has room.
    unsent_rules: Option<ServerMessage>,
    requests: Requests,
}

/// The requests of callers on their way to a node, and the answers on their way back.
#[derive(Default)]
struct Requests {
    /// To send, after the rules: for each pending request at most itself or its cancellation.
    unsent: VecDeque<Question>,
    /// Channels to the callers of pending requests, by request id: at most [`MAX_REQUESTS`]. A cancelled one is pending
    /// until its cancellation is sent, so that a node which reads nothing has no more of them.
    pending: HashMap<String, mpsc::Sender<answer::Answer>>,
}

impl Requests {
    /// Handles a command of a caller.
    fn handle(&mut self, command: SessionCommand) {
        match command {
            SessionCommand::Cancel { id } => self.cancel(&id),
            SessionCommand::Send { reply, .. } if self.pending.len() >= MAX_REQUESTS => {
                // The channel is new and empty, so this cannot fail.
                let _ = reply.try_send(answer::Answer::Refused(format!(
                    "it has {MAX_REQUESTS} pending requests: try again"
                )));
            }
            SessionCommand::Send { id, question, reply } => {
                self.pending.insert(id.clone(), reply);
                self.unsent.push_back(Question { id, question: Some(*question) });
            }
        }
    }

    fn cancel(&mut self, id: &str) {
        if !self.pending.contains_key(id) {
            return;
        }
        match self.unsent.iter().find(|unsent| unsent.id == id) {
            Some(unsent) if is_cancel(unsent) => {}
            // The node has never received it.
            Some(_) => self.forget(id),
            None => {
                let question = Some(question::Question::Cancel(CancelQuestion {}));
                self.unsent.push_back(Question { id: id.to_owned(), question });
            }
        }
    }

    fn forget(&mut self, id: &str) {
        self.pending.remove(id);
        self.unsent.retain(|unsent| unsent.id != id);
    }

    /// Passes a part of a response to its caller. A caller that does not read loses the request and delays no one.
    fn pass_on(&mut self, id: &str, answer: answer::Answer) {
        let Some(reply) = self.pending.get(id) else { return };
        let is_last = is_last_part(&answer);
        let is_passed = reply.try_send(answer).is_ok();
        if is_last {
            self.forget(id);
        } else if !is_passed {
            self.cancel(id);
        }
    }

    /// Returns the next question to send.
    fn next(&mut self) -> Option<Question> {
        let next = self.unsent.pop_front()?;
        if is_cancel(&next) {
            self.pending.remove(&next.id);
        }
        Some(next)
    }
}

fn is_cancel(question: &Question) -> bool {
    matches!(question.question, Some(question::Question::Cancel(_)))
}

impl<'a> Session<'a> {
    fn new(fleet: &'a Fleet, node: &'a NodeHello, connection: &'a NodeConnection) -> Self {
        Self {
            fleet,
            node,
            connection,
            active: node.active_digest.clone(),
            unanswered: None,
            unsent_rules: None,
            requests: Requests::default(),
        }
    }

    async fn run(
        mut self,
        stream: &mut Streaming<AgentMessage>,
        mut commands: mpsc::Receiver<SessionCommand>,
        out: &Outbound,
    ) -> Result<(), Status> {
        let mut published = self.fleet.rules.subscribe();
        published.mark_changed();
        loop {
            tokio::select! {
                biased;
                () = self.fleet.stop.cancelled() => {
                    return Err(Status::unavailable("the collector is shutting down: connect again"));
                }
                () = self.connection.replaced.cancelled() => {
                    return Err(Status::aborted("another agent has connected with this node's name"));
                }
                changed = published.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let newest = published.borrow_and_update().clone();
                    self.offer(newest.as_deref());
                }
                permit = out.reserve(), if self.has_unsent() => {
                    let Ok(permit) = permit else { return Ok(()) };
                    if let Some(message) = self.next_message() {
                        permit.send(Ok(message));
                    }
                }
                // The fleet's entry holds the other end while this connection speaks for the node.
                Some(command) = commands.recv() => self.requests.handle(command),
                message = stream.message() => match message? {
                    Some(message) => self.receive(message)?,
                    None => return Ok(()),
                },
            }
        }
    }

    /// Offers the node its part of the published rules, unless it has them.
    fn offer(&mut self, published: Option<&Published>) {
        // Without rules so far, or with unreadable ones, the node keeps the rules that it has.
        let Some(published) = published.filter(|p| p.revision > 0) else {
            if published.is_some() && !self.active.is_empty() && self.active != rules::digest(&[]) {
                tracing::warn!(
                    node = %self.node.node, revision = self.node.active_revision,
                    "the node runs rules that this collector does not know, because it has none: apply the rules again"
                );
            }
            return;
        };
        let revision = published.revision;
        let NodeRules { rules: mine, held, tried } = published.for_node(&self.node.node, &self.node.labels);
        let (digest, is_empty) = (rules::digest(&mine), mine.is_empty());
        match &mut self.unanswered {
            None if self.active == digest || (is_empty && self.active.is_empty()) => {
                self.fleet.update(&self.node.node, self.connection, |known| {
                    let (state, errors) = known.standing(&digest, is_empty);
                    let (state, note) = mark_held(state, &held);
                    let (since_ms, took) = (time::now_ms(), Duration::ZERO);
                    known.record(RuleAnswer { revision, digest, state, errors, since_ms, took, note });
                });
            }
            // The same rules are on their way. Their answer will count for this revision too.
            Some(unanswered) if unanswered.digest == digest => {
                unanswered.revision = revision;
                (unanswered.held, unanswered.tried) = (held, tried);
            }
            _ => {
                let nonce = Ulid::new().to_string();
                self.unsent_rules = Some(ServerMessage {
                    message: Some(server_message::Message::Rules(RuleSet {
                        revision,
                        nonce: nonce.clone(),
                        rules: mine,
                        digest: digest.clone(),
                    })),
                });
                let offered = Instant::now();
                self.unanswered =
                    Some(UnansweredRules { revision, nonce, digest, is_empty, offered, held, tried });
                self.fleet.update(&self.node.node, self.connection, |known| known.forget_answers(revision));
            }
        }
        self.fleet.notify_changed();
    }

    /// Handles a message of the agent.
    fn receive(&mut self, message: AgentMessage) -> Result<(), Status> {
        self.fleet.update(&self.node.node, self.connection, |known| known.last_seen_ms = time::now_ms());
        match message.message {
            Some(agent_message::Message::Status(status)) => self.receive_status(status),
            Some(agent_message::Message::Answer(Answer { id, answer: Some(answer) })) => {
                self.requests.pass_on(&id, answer);
            }
            // A kind of answer that only a newer version knows.
            Some(agent_message::Message::Answer(Answer { answer: None, .. })) => {}
            Some(agent_message::Message::Applied(applied)) => self.receive_applied(&applied),
            Some(agent_message::Message::Rejected(rejected)) => {
                if let Some(answered) = self.take_unanswered(&rejected.nonce) {
                    self.record(answered, State::Rejected, &rejected.errors);
                }
            }
            Some(agent_message::Message::Hello(_)) => {
                return Err(Status::invalid_argument("hello is the first message, and only the first"));
            }
            None => return Err(Status::invalid_argument("a message without content")),
        }
        Ok(())
    }

    fn receive_status(&self, status: NodeStatus) {
        let now_ms = time::now_ms();
        let mut revised = None;
        self.fleet.update(&self.node.node, self.connection, |known| {
            for rule in newly_expired(known.status.as_ref(), &status) {
                self.fleet.rules.audit().record_answer(AuditEntry {
                    at: Some(time::timestamp(now_ms)),
                    revision: status.active_revision,
                    action: "expired".into(),
                    node: self.node.node.clone(),
                    removed: vec![rule],
                    note: "by the node's own clock".into(),
                    ..AuditEntry::default()
                });
            }
            if let Some(RuleFaults { errors }) = &status.faults {
                let (errors, left_out) = bounded_errors(errors, MAX_ERRORS);
                if known.has_changed_faults(&status.active_digest, &errors) {
                    self.count_left_out(left_out);
                }
                revised = known.revise(&status.active_digest, &errors, now_ms).cloned();
            }
            let at_ms = status.at.as_ref().and_then(time::to_ms).unwrap_or(now_ms);
            known.clock_ahead_ms = at_ms as i64 - now_ms as i64;
            known.status = Some(status);
        });
        if let Some(answer) = revised {
            self.report(&answer);
            self.fleet.notify_changed();
        }
    }

    fn receive_applied(&mut self, applied: &RulesApplied) {
        let Some(answered) = self.take_unanswered(&applied.nonce) else { return };
        if applied.digest != answered.digest {
            let reason = format!(
                "the node reports rules with digest `{}`, and the collector sent `{}`",
                applied.digest.escape_debug(),
                answered.digest
            );
            let error = RuleError { reason, ..RuleError::default() };
            return self.record(answered, State::Rejected, &[error]);
        }
        self.active.clone_from(&answered.digest);
        let state = match () {
            () if answered.is_empty => State::Skipped,
            () if applied.partial.is_empty() => State::Applied,
            () => State::Partial,
        };
        self.record(answered, state, &applied.partial);
    }

    fn has_unsent(&self) -> bool {
        self.unsent_rules.is_some() || !self.requests.unsent.is_empty()
    }

    /// Returns the next message to send: rules before requests.
    fn next_message(&mut self) -> Option<ServerMessage> {
        if let Some(rules) = self.unsent_rules.take() {
            self.fleet.metrics.rule_pushes.inc();
            return Some(rules);
        }
        let question = self.requests.next()?;
        Some(ServerMessage { message: Some(server_message::Message::Question(question)) })
    }

    /// Returns the rule set that this nonce answers, or `None` for an answer to an older rule set.
    fn take_unanswered(&mut self, nonce: &str) -> Option<UnansweredRules> {
        let answered = self.unanswered.take_if(|unanswered| unanswered.nonce == nonce);
        if answered.is_none() {
            self.fleet.metrics.late_answers.inc();
            tracing::debug!(node = %self.node.node, "ignored an answer to rules that newer ones have replaced");
        }
        answered
    }

    /// Records the node's answer in the fleet, the log and the audit.
    fn record(&self, answered: UnansweredRules, state: State, errors: &[RuleError]) {
        let UnansweredRules { revision, digest, offered, held, tried, .. } = answered;
        let took = offered.elapsed();
        if state == State::Rejected && !tried.is_empty() {
            self.pause_rollouts(revision, &tried, errors);
        }
        let (errors, left_out) = bounded_errors(errors, MAX_ERRORS);
        self.count_left_out(left_out);
        let (state, note) = mark_held(state, &held);
        let answer = RuleAnswer { revision, digest, state, errors, since_ms: time::now_ms(), took, note };
        self.report(&answer);
        self.fleet.update(&self.node.node, self.connection, |known| known.record(answer));
        self.fleet.notify_changed();
    }

    /// Counts errors that the fleet does not remember.
    fn count_left_out(&self, left_out: u64) {
        if left_out > 0 && self.fleet.metrics.rule_errors_left_out.inc_by(left_out) == 0 {
            tracing::warn!(
                node = %self.node.node, left_out,
                "a node reports more than {MAX_ERRORS} errors of its rules: the collector shows the first of them and counts \
                 the others; correct those first"
            );
        }
    }

    /// Writes an answer to the log and the audit.
    fn report(&self, answer: &RuleAnswer) {
        let RuleAnswer { revision, digest: _, state, errors, since_ms, took, note } = answer;
        match errors.first() {
            Some(first) => tracing::warn!(
                node = %self.node.node, revision, state = state.as_str_name(), errors = errors.len(),
                rule = %first.rule_id, field = %first.field, reason = %first.reason,
                "the node did not apply all rules"
            ),
            None => {
                tracing::info!(node = %self.node.node, revision, state = state.as_str_name(), ?took, "the node answered");
            }
        }
        self.fleet.rules.audit().record_answer(AuditEntry {
            at: Some(time::timestamp(*since_ms)),
            revision: *revision,
            action: "answer".into(),
            node: self.node.node.clone(),
            state: (*state).into(),
            errors: errors.clone(),
            note: note.clone(),
            ..AuditEntry::default()
        });
    }

    /// Pauses the staged rollouts that the node has rejected, so that they do not complete by themselves.
    fn pause_rollouts(&self, revision: u64, tried: &[String], errors: &[RuleError]) {
        let published = self.fleet.rules.subscribe().borrow().clone();
        let Some(published) = published else { return };
        let ids: Vec<&str> = errors.iter().map(|error| error.rule_id.as_str()).collect();
        let scopes: Vec<String> =
            published.staged_with(&ids).into_iter().filter(|scope| tried.contains(scope)).collect();
        let reason = errors.first().map_or_else(
            || "without a reason".to_owned(),
            |RuleError { rule_id, field, reason }| format!("rule `{rule_id}`: {field}: {reason}"),
        );
        let why = format!("node {} has rejected it: {reason}", self.node.node);
        let rules = Arc::clone(&self.fleet.rules);
        let changes = self.fleet.changes.clone();
        tokio::task::spawn_blocking(move || {
            for scope in scopes {
                match rules.pause(&scope, revision, &why) {
                    Ok(()) => changes.send_modify(|n| *n += 1),
                    Err(error) => tracing::error!(scope, "cannot pause the staged rollout: {error}"),
                }
            }
        });
    }
}

/// Returns state and note of a node that keeps the former rules of staged scopes. It skips the revision and is not
/// counted as applied.
fn mark_held(state: State, held: &[String]) -> (State, String) {
    match held {
        [] => (state, String::new()),
        held => {
            let note = format!("keeps the former rules of {}: the new ones are staged", held.join(", "));
            (if state == State::Applied { State::Skipped } else { state }, note)
        }
    }
}

/// Returns the ids of the rules that expired between two heartbeats.
fn newly_expired(before: Option<&NodeStatus>, now: &NodeStatus) -> Vec<String> {
    let is_expired = |status: &RuleStatus| status.state() == rule_status::State::Expired;
    let was_expired =
        |id: &str| before.is_some_and(|b| b.rules.iter().any(|rule| rule.rule_id == id && is_expired(rule)));
    now.rules
        .iter()
        .filter(|r| is_expired(r) && !was_expired(&r.rule_id))
        .map(|r| r.rule_id.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use gannet_proto::control::{CaptureProgress, CaptureRequest, CaptureStarted, capture_progress};

    use super::*;

    const DONE: answer::Answer = answer::Answer::Capture(CaptureProgress { message: None });

    fn send(requests: &mut Requests, id: &str) -> mpsc::Receiver<answer::Answer> {
        let (reply, parts) = mpsc::channel(1);
        let question = Box::new(question::Question::Capture(CaptureRequest::default()));
        requests.handle(SessionCommand::Send { id: id.to_owned(), question, reply });
        parts
    }

    fn cancel(requests: &mut Requests, id: &str) {
        requests.handle(SessionCommand::Cancel { id: id.to_owned() });
    }

    fn unsent(requests: &Requests) -> Vec<(&str, bool)> {
        requests.unsent.iter().map(|unsent| (unsent.id.as_str(), is_cancel(unsent))).collect()
    }

    /// Checks callers that come and go while the node reads nothing.
    #[test]
    fn requests_that_come_and_go_leave_nothing_behind() {
        let mut requests = Requests::default();
        for number in 0..1000 {
            let id = number.to_string();
            let _parts = send(&mut requests, &id);
            cancel(&mut requests, &id);
        }
        assert_eq!((unsent(&requests), requests.pending.len()), (vec![], 0));
    }

    #[test]
    fn a_request_that_the_node_has_is_cancelled_there() {
        let mut requests = Requests::default();
        let _first = send(&mut requests, "first");
        assert_eq!(requests.next().map(|sent| sent.id).as_deref(), Some("first"));
        let _second = send(&mut requests, "second");
        for id in ["first", "first", "never sent"] {
            cancel(&mut requests, id);
        }
        assert_eq!(unsent(&requests), [("second", false), ("first", true)]);
        assert!(requests.next().is_some() && requests.next().is_some_and(|sent| is_cancel(&sent)));
        cancel(&mut requests, "first");
        assert_eq!((unsent(&requests), requests.pending.len()), (vec![], 1));
    }

    /// Checks a node that takes requests and then reads nothing more, while callers go: with a command, and without.
    #[test]
    fn cancellations_for_a_node_that_does_not_read_are_bounded() {
        let mut requests = Requests::default();
        for number in 0..10 * MAX_REQUESTS {
            let id = number.to_string();
            let parts = send(&mut requests, &id);
            // The node takes the request, before older cancellations.
            requests.unsent.retain(is_cancel);
            if number % 2 == 0 {
                cancel(&mut requests, &id);
            } else {
                drop(parts);
                for _ in 0..3 {
                    let started = Some(capture_progress::Message::Started(CaptureStarted::default()));
                    requests.pass_on(&id, answer::Answer::Capture(CaptureProgress { message: started }));
                }
            }
        }
        assert_eq!((requests.unsent.len(), requests.pending.len()), (MAX_REQUESTS, MAX_REQUESTS));
        // It reads again.
        while requests.next().is_some() {}
        assert_eq!(requests.pending.len(), 0);
    }

    #[test]
    fn a_node_has_a_limited_number_of_requests() {
        let mut requests = Requests::default();
        let waiting: Vec<_> = (0..MAX_REQUESTS).map(|n| send(&mut requests, &n.to_string())).collect();
        let mut refused = send(&mut requests, "one more");
        assert!(matches!(refused.try_recv(), Ok(answer::Answer::Refused(why)) if why.contains("pending")));
        // An answer to a request that the node has not been sent ends it too.
        requests.pass_on("0", DONE);
        let mut taken = send(&mut requests, "after an answer");
        assert!(taken.try_recv().is_err());
        assert_eq!((requests.unsent.len(), waiting.len()), (MAX_REQUESTS, MAX_REQUESTS));
    }
}
