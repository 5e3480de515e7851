//! The control stream: rules come in, answers and heartbeats go out.

mod last_good;
mod look;
mod questions;

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use gannet_proto::{
    connect::{self, Dial, DialError},
    control::{
        AgentMessage, NodeHello, NodeStatus, RuleError, RuleSet, RulesApplied, RulesRejected,
        agent_message::Message, agent_service_client::AgentServiceClient, server_message,
    },
    rules::digest,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

pub use last_good::{LastGood, LastGoodError, Saved};

use self::questions::Questions;
use crate::{
    export::Backoff,
    node::Node,
    rules::{RuleSource, SourceRules},
};

/// What this agent can do, as it tells the collector.
const FEATURES: [&str; 4] = ["off_cpu", "unwind_tables", "questions", "capture"];
/// How often the node says how it is.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Messages that wait for the transport.
const QUEUE: usize = 16;
/// A stream that stood for so long was a good one: the next attempt comes soon.
const GOOD_STREAM: Duration = Duration::from_secs(30);

/// The node's end of the control stream.
pub struct Control {
    node: Arc<Node>,
    dial: Dial,
    store: LastGood,
    /// Revision and digest of what came from the collector and is in force.
    active: Mutex<(u64, String)>,
}

impl Control {
    /// Not dialled yet. `active` is what [`restore`] put into force.
    pub fn new(
        node: Arc<Node>,
        dial: &Dial,
        store: LastGood,
        active: (u64, String),
    ) -> Result<Self, DialError> {
        // What cannot work at all shows at the start.
        connect::connect(dial)?;
        Ok(Self { node, dial: dial.clone(), store, active: Mutex::new(active) })
    }

    /// Keeps the stream up until cancelled.
    pub async fn run(self, cancel: CancellationToken) {
        let mut backoff = Backoff::new();
        loop {
            let begun = Instant::now();
            let ended = tokio::select! {
                ended = self.stream() => ended,
                () = cancel.cancelled() => return,
            };
            self.node.connected.store(false, Relaxed);
            if begun.elapsed() > GOOD_STREAM {
                backoff.reset();
            }
            let delay = backoff.next();
            let why = match ended {
                Ok(()) => "it ended the stream".to_owned(),
                Err(status) => connect::explain(&self.dial.url, &status),
            };
            tracing::warn!("no control stream, the rules stay as they are, next try in {delay:.1?}: {why}");
            self.node.set_degraded("control", Some(format!("no stream to the collector: {why}")));
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = cancel.cancelled() => return,
            }
        }
    }

    /// One stream, from hello to its end.
    async fn stream(&self) -> Result<(), Status> {
        // Certificates are read anew for each: they may have been renewed since the last one.
        let connection =
            connect::connect(&self.dial).map_err(|error| Status::unavailable(error.to_string()))?;
        let (messages, outgoing) = mpsc::channel(QUEUE);
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
        // Whatever is being answered ends with the stream.
        let mut questions = Questions::new(Arc::clone(&self.node), messages.clone());
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        loop {
            tokio::select! {
                message = incoming.message() => match message? {
                    None => return Ok(()),
                    Some(message) => match message.message {
                        Some(server_message::Message::Rules(set)) => {
                            send(self.apply(set).await).await?;
                            heartbeat.reset_immediately();
                        }
                        Some(server_message::Message::Question(question)) => questions.take(question),
                        // Something that a newer collector says.
                        None => {}
                    },
                },
                _ = heartbeat.tick() => send(Message::Status(self.status().await)).await?,
            }
        }
    }

    /// Puts a pushed set into force; the answer to it.
    async fn apply(&self, set: RuleSet) -> Message {
        let RuleSet { revision, nonce, rules, digest: claimed } = set.clone();
        let rejected = |errors| Message::Rejected(RulesRejected { revision, nonce: nonce.clone(), errors });
        let found = digest(&rules);
        if found != claimed {
            return rejected(vec![RuleError {
                rule_id: String::new(),
                field: "digest".into(),
                reason: format!(
                    "the rules have the digest {found}, the collector says {claimed}: not of one version?"
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
                *self.active.lock().unwrap_or_else(PoisonError::into_inner) = (revision, claimed.clone());
                self.node.rules_loaded.store(true, Relaxed);
                let saved = Saved { set, applied_at };
                // In force all the same; after a restart the former set would come back until the collector is there.
                let kept = tokio::task::block_in_place(|| self.store.save(&saved));
                self.node.set_degraded("state", kept.err().map(|error| error.to_string()));
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
            features: FEATURES.map(str::to_owned).to_vec(),
            active_revision,
            active_digest,
            cpus: crate::model::online_cpus().map_or(0, |cpus| cpus.len() as u32),
            started_at: Some(self.node.started.into()),
        }
    }

    async fn status(&self) -> NodeStatus {
        let (active_revision, active_digest) = self.active();
        let (rss_bytes, cpu) = self.node.usage();
        let engine = self.node.engine.view().await.ok();
        let (rules, sampled) = engine.map(|view| (view.rules, view.sampled_processes)).unwrap_or_default();
        NodeStatus {
            at: Some(SystemTime::now().into()),
            active_revision,
            active_digest,
            rules,
            ledger: Some((&self.node.ledger.snapshot()).into()),
            rss_bytes,
            cpu: cpu.try_into().ok(),
            degraded: self.node.degraded(),
            spool_bytes: self.node.spool.bytes(),
            processes_armed: sampled as u64,
        }
    }

    fn active(&self) -> (u64, String) {
        self.active.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Puts the last good set of a former run into force, if there is one. Gives its revision and digest.
pub async fn restore(node: &Node, store: &LastGood) -> (u64, String) {
    let saved = match store.load() {
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
            tracing::warn!("the last good rules cannot be used here any more: {}", reasons.join("; "));
            (0, digest(&[]))
        }
    }
}
