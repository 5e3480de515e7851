//! The control stream: the collector sends rules and requests; the node sends answers and heartbeats.

mod last_good;
mod matching;
mod requests;

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use gannet_base::metrics::ProcessUsage;
use gannet_proto::{
    connect::{self, Dial, DialError},
    control::{
        AgentMessage, NodeHello, NodeStatus, RuleError, RuleFaults, RuleSet, RulesApplied, RulesRejected,
        agent_message::Message, agent_service_client::AgentServiceClient, server_message,
    },
    rules::digest,
};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

pub(crate) use last_good::LastGoodRules;

use self::{last_good::SavedRules, requests::PendingRequests};
use crate::{
    export::{Backoff, explain, files_changed},
    node::Node,
    rules::{RuleSource, SourceRules},
};

/// Requests that this agent answers, which it reports to the collector beside the engine's abilities.
const REQUEST_FEATURES: [&str; 2] = ["questions", "capture"];
/// Interval between reports of the node's status.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);
/// Messages that may wait for the transport.
const MAX_QUEUED_MESSAGES: usize = 16;
/// After a stream that lasted longer than this, the next attempt follows soon.
const STABLE_STREAM: Duration = Duration::from_secs(30);

/// The node's end of the control stream.
pub(crate) struct Control {
    node: Arc<Node>,
    dial: Dial,
    store: LastGoodRules,
    /// Revision and digest of the collector's rules in force.
    active: Mutex<(u64, String)>,
}

impl Control {
    /// Checks address and certificates without connecting. `active` is the result of [`restore`].
    pub(crate) fn new(
        node: Arc<Node>,
        dial: &Dial,
        store: LastGoodRules,
        active: (u64, String),
    ) -> Result<Self, DialError> {
        // A wrong address or certificate shows at the start.
        connect::connect(dial)?;
        Ok(Self { node, dial: dial.clone(), store, active: Mutex::new(active) })
    }

    /// Keeps the stream connected until cancelled.
    pub(crate) async fn run(self, cancel: CancellationToken) {
        let mut backoff = Backoff::new();
        loop {
            let begun = Instant::now();
            let files = self.dial.stamps();
            let ended = tokio::select! {
                ended = self.stream() => ended,
                () = cancel.cancelled() => return,
            };
            self.node.connected.store(false, Relaxed);
            if begun.elapsed() > STABLE_STREAM {
                backoff.reset();
            }
            let delay = backoff.next();
            let why = match ended {
                Ok(()) => "the collector ended the stream".to_owned(),
                Err(status) => explain(&self.dial, &status).await,
            };
            tracing::warn!(
                "no control stream to the collector, next attempt in {delay:.1?}: {why}; the rules stay in force"
            );
            self.node.set_degraded("control", Some(format!("no stream to the collector: {why}")));
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = files_changed(&self.dial, &files) => backoff.reset(),
                () = cancel.cancelled() => return,
            }
        }
    }

    /// Runs one stream from hello to its end.
    async fn stream(&self) -> Result<(), Status> {
        // Each stream reads the certificates again, since they may have been renewed.
        let connection =
            connect::connect(&self.dial).map_err(|error| Status::unavailable(error.to_string()))?;
        let (messages, outgoing) = mpsc::channel(MAX_QUEUED_MESSAGES);
        let send = async |message| {
            messages
                .send(AgentMessage { message: Some(message) })
                .await
                .map_err(|_| Status::unavailable("the stream has ended"))
        };
        send(Message::Hello(self.hello())).await?;
        let mut client = AgentServiceClient::new(connection);
        let mut incoming = client.connect(ReceiverStream::new(outgoing)).await?.into_inner();
        self.node.connected.store(true, Relaxed);
        self.node.set_degraded("control", None);
        tracing::info!("connected to {}", self.dial.url);
        // Dropping it cancels the pending requests of this stream.
        let mut requests = PendingRequests::new(Arc::clone(&self.node), messages.clone());
        let mut heartbeat = tokio::time::interval(HEARTBEAT_INTERVAL);
        loop {
            tokio::select! {
                message = incoming.message() => match message? {
                    None => return Ok(()),
                    Some(message) => match message.message {
                        Some(server_message::Message::Rules(set)) => {
                            send(self.apply(set).await).await?;
                            heartbeat.reset_immediately();
                        }
                        Some(server_message::Message::Question(question)) => requests.receive(question),
                        // A message that only a newer collector knows.
                        None => {}
                    },
                },
                _ = heartbeat.tick() => send(Message::Status(self.status().await)).await?,
            }
        }
    }

    /// Puts a rule set into force and returns the answer.
    async fn apply(&self, set: RuleSet) -> Message {
        let RuleSet { revision, nonce, rules, digest: claimed } = set.clone();
        let rejected = |errors| Message::Rejected(RulesRejected { revision, nonce: nonce.clone(), errors });
        let found = digest(&rules);
        if found != claimed {
            return rejected(vec![RuleError {
                rule_id: String::new(),
                field: "digest".into(),
                reason: format!(
                    "the rules have the digest {found}, but the collector sent {claimed}; do agent and collector have the same version?"
                ),
            }]);
        }
        let applied_at = SystemTime::now();
        match self
            .node
            .engine
            .replace(
                RuleSource::Remote,
                SourceRules { revision, applied_at: Some(applied_at), rules, from_exec: false },
            )
            .await
        {
            Err(errors) => {
                for error in &errors {
                    tracing::warn!(
                        revision,
                        rule = error.rule_id,
                        field = error.field,
                        "rejected: {}",
                        error.reason
                    );
                }
                rejected(errors)
            }
            Ok(partial) => {
                tracing::info!(revision, rules = set.rules.len(), "rules applied");
                for error in &partial {
                    tracing::warn!(
                        revision,
                        rule = error.rule_id,
                        field = error.field,
                        "has no effect on this node now: {}",
                        error.reason
                    );
                }
                *self.active.lock() = (revision, claimed.clone());
                self.node.rules_loaded.store(true, Relaxed);
                let saved = SavedRules { set, applied_at };
                // If saving fails, the rules are in force all the same. After a restart the former set would hold until the
                // collector answers.
                let result = self.store.save(&saved).await;
                self.node.set_degraded("state", result.err().map(|error| error.to_string()));
                Message::Applied(RulesApplied { revision, nonce, digest: claimed, partial })
            }
        }
    }

    fn hello(&self) -> NodeHello {
        let (active_revision, active_digest) = self.active();
        NodeHello {
            node: self.node.config.node.clone(),
            labels: self.node.config.labels.clone(),
            version: gannet_proto::VERSION.to_owned(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            features: self.features(),
            active_revision,
            active_digest,
            cpus: crate::model::online_cpus().map_or(0, |cpus| cpus.len() as u32),
            started_at: Some(self.node.started.into()),
        }
    }

    /// Returns what was attached on this kernel, and the requests that the agent answers.
    fn features(&self) -> Vec<String> {
        self.node.engine.features().iter().copied().chain(REQUEST_FEATURES).map(str::to_owned).collect()
    }

    async fn status(&self) -> NodeStatus {
        let (active_revision, active_digest) = self.active();
        let usage = ProcessUsage::read();
        let engine = self.node.engine.view().await.ok();
        let faults = engine.as_ref().map(|view| RuleFaults { errors: view.rule_faults.clone() });
        let (rules, sampled) = engine.map(|view| (view.rules, view.sampled_processes)).unwrap_or_default();
        NodeStatus {
            at: Some(SystemTime::now().into()),
            active_revision,
            active_digest,
            rules,
            ledger: Some((&self.node.ledger.snapshot()).into()),
            rss_bytes: usage.resident_bytes,
            cpu: usage.cpu.try_into().ok(),
            degraded: self.node.degraded(),
            spool_bytes: self.node.spool.bytes(),
            processes_armed: sampled as u64,
            faults,
        }
    }

    fn active(&self) -> (u64, String) {
        self.active.lock().clone()
    }
}

/// Puts the last good rules of a former run into force, if there are any. Returns their revision and digest.
pub(crate) async fn restore(node: &Node, store: &LastGoodRules) -> (u64, String) {
    let saved = match store.load().await {
        Ok(Some(saved)) => saved,
        Ok(None) => return (0, digest(&[])),
        Err(error) => {
            tracing::warn!("{error}");
            node.set_degraded("state", Some(error.to_string()));
            return (0, digest(&[]));
        }
    };
    let RuleSet { revision, rules, digest: found, .. } = saved.set;
    let count = rules.len();
    match node
        .engine
        .replace(
            RuleSource::Remote,
            SourceRules { revision, applied_at: Some(saved.applied_at), rules, from_exec: false },
        )
        .await
    {
        Ok(_) => {
            tracing::info!(revision, rules = count, "the last good rules are in force");
            (revision, found)
        }
        Err(errors) => {
            let reasons: Vec<_> =
                errors.iter().map(|e| format!("{} {}: {}", e.rule_id, e.field, e.reason)).collect();
            tracing::warn!("cannot use the last good rules any more: {}", reasons.join("; "));
            (0, digest(&[]))
        }
    }
}
