//! Forwarding of stored profiles to what exists: Pyroscope, Parca, and every receiver of OTLP.
//!
//! The store has a profile before the forwarder gets it, so a target that is down delays no agent. A bounded queue holds
//! the waiting profiles of each target. A profile that does not fit, is too old or is refused for good is counted by its
//! reason and stays in the store. A profile above a target's size limit is sent in parts.

mod http;
mod otlp;
mod parca;
mod pyroscope;
mod queue;

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use clap::Args;
use gannet_proto::{
    connect::{self, Connection, Dial, DialError},
    ingest::Batch,
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use self::{otlp::OtlpClient, parca::ParcaClient, pyroscope::PyroscopeClient, queue::Sender};
use crate::{metrics::Metrics, time};

/// Bytes of the profiles that wait for one target.
const QUEUE_BYTES: usize = 64 << 20;
/// Number of the profiles that wait for one target.
const QUEUE_PROFILES: usize = 10_000;

/// Targets of forwarding, and the settings of all connections to them.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Forwarding")]
#[serde(default)]
#[allow(clippy::struct_field_names, reason = "the fields are the names of the options")]
pub struct ForwardOptions {
    /// Forward every profile to pyroscope=URL, parca=URL or otlp=URL too (repeatable). OTLP goes by gRPC, or by HTTP if the URL
    /// has a path or the port 4318
    #[arg(long, value_name = "TARGET=URL", env = "GANNET_COLLECTOR_FORWARD", value_delimiter = ',')]
    pub forward: Vec<ForwardTarget>,
    /// Tenant of the profiles (X-Scope-OrgID), for a Pyroscope with several tenants
    #[arg(long, value_name = "TENANT", env = "GANNET_COLLECTOR_FORWARD_TENANT")]
    pub forward_tenant: Option<String>,
    /// Send the bearer token in this file to the targets; the collector reads it again for each call
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_FORWARD_TOKEN_FILE")]
    pub forward_token_file: Option<PathBuf>,
    /// Trust these authorities (PEM) at the targets instead of the system's
    #[arg(long, value_name = "FILE", env = "GANNET_COLLECTOR_FORWARD_CA")]
    pub forward_ca: Option<PathBuf>,
}

impl Default for ForwardOptions {
    fn default() -> Self {
        gannet_base::defaults()
    }
}

/// The kind and the URL of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardTarget {
    kind: TargetKind,
    url: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TargetKind {
    Pyroscope,
    Parca,
    Otlp,
}

impl ForwardTarget {
    /// Name of the target in metrics and log lines.
    fn name(&self) -> &'static str {
        match self.kind {
            TargetKind::Pyroscope => "pyroscope",
            TargetKind::Parca => "parca",
            TargetKind::Otlp => "otlp",
        }
    }
}

impl fmt::Display for ForwardTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name(), self.url)
    }
}

impl FromStr for ForwardTarget {
    type Err = String;

    /// Parses `pyroscope=http://pyroscope:4040`, `parca=https://parca:7070`, `otlp=http://collector:4317`.
    fn from_str(text: &str) -> Result<Self, String> {
        let invalid = || {
            format!(
                "`{text}` is no target: write pyroscope=URL, parca=URL or otlp=URL, for instance pyroscope=http://pyroscope:4040"
            )
        };
        let (kind, url) = text.split_once('=').ok_or_else(invalid)?;
        let kind = match kind {
            "pyroscope" => TargetKind::Pyroscope,
            "parca" => TargetKind::Parca,
            "otlp" => TargetKind::Otlp,
            _ => return Err(invalid()),
        };
        let uri: ::http::Uri = url.parse().map_err(|_| invalid())?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            return Err(invalid());
        }
        Ok(Self { kind, url: url.trim_end_matches('/').to_owned() })
    }
}

/// Why the collector cannot forward profiles at all.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The address or the certificates of a target are wrong.
    #[error("--forward {target}: {source}")]
    Dial {
        /// The target as `--forward` names it.
        target: String,
        /// Reason why the URL cannot be used.
        #[source]
        source: DialError,
    },
    /// The trusted authorities cannot be used.
    #[error("--forward-ca: {0}")]
    Ca(String),
}

gannet_base::serde_as_text!(ForwardTarget);

/// The result of one attempt to send a part.
enum Delivery {
    Accepted,
    /// The target accepted the request with a warning. It refused this number of profiles.
    Partly {
        rejected: u64,
        why: String,
    },
    /// Another attempt may succeed, after this time if the target named one.
    Retry {
        why: String,
        after: Option<Duration>,
    },
    /// No attempt will succeed. Holds the reason.
    Refused(String),
}

impl Delivery {
    fn retry(why: String) -> Self {
        Self::Retry { why, after: None }
    }
}

/// The client of a target, by its protocol.
enum TargetClient {
    Pyroscope(PyroscopeClient),
    Parca(Box<ParcaClient>),
    Otlp(OtlpClient),
}

impl TargetClient {
    fn new(target: &ForwardTarget, options: &ForwardOptions) -> Result<Self, ForwardError> {
        Ok(match target.kind {
            TargetKind::Pyroscope => Self::Pyroscope(PyroscopeClient::new(target, options)?),
            TargetKind::Parca => Self::Parca(Box::new(ParcaClient::new(target, options)?)),
            TargetKind::Otlp => Self::Otlp(OtlpClient::new(target, options)?),
        })
    }
}

/// Builds the connection to a target that speaks gRPC. It connects with the first call.
fn grpc_connection(target: &ForwardTarget, options: &ForwardOptions) -> Result<Connection, ForwardError> {
    let dial = Dial {
        url: target.url.clone(),
        // The scheme of the target's URL selects plaintext or TLS.
        insecure: true,
        ca: options.forward_ca.clone().filter(|_| target.url.starts_with("https")),
        token_file: options.forward_token_file.clone(),
        ..Dial::default()
    };
    connect::connect(&dial).map_err(|source| ForwardError::Dial { target: target.to_string(), source })
}

/// Name of the header, or gRPC metadata, with the account of the samples of the profile's window. It is one line:
/// `ticks=… taken=… delivered=… unaccounted=… lost.ring_full=…`. No receiver has a field for it.
const LEDGER_HEADER: &str = "x-gannet-ledger";

/// A part of a profile that is small enough for the target.
struct Part<'a> {
    id: &'a str,
    /// Profile in the pprof format, gzipped.
    pprof: &'a Bytes,
    /// Value of [`LEDGER_HEADER`]; empty if the profile has none.
    ledger: &'a str,
}

/// Returns the id of a part. The first part has the profile's own id, so that the target recognizes a profile that is
/// sent again after a restart.
fn part_id(id: &str, number: usize) -> String {
    if number == 0 { id.to_owned() } else { format!("{id}-{number}") }
}

/// A copy of a batch's content for forwarding, made before the batch moves into the store.
#[derive(Clone)]
pub(crate) struct ForwardItem {
    id: String,
    labels: BTreeMap<String, String>,
    pprof: Bytes,
    start_ms: u64,
}

/// An item in a target's queue.
struct QueuedItem {
    item: ForwardItem,
    /// Share of [`QUEUE_BYTES`].
    bytes: OwnedSemaphorePermit,
}

/// The queues of all targets.
pub(crate) struct Forwarder {
    targets: Vec<TargetQueue>,
    metrics: Metrics,
}

struct TargetQueue {
    name: &'static str,
    bytes: Arc<Semaphore>,
    queue: mpsc::Sender<QueuedItem>,
    /// Profiles in the queue or in transmission.
    waiting: Arc<AtomicU64>,
}

impl Forwarder {
    /// Starts a sender for each target. The senders end `timeout` after `stop`, and count the profiles that they did not
    /// send.
    pub(crate) fn start(
        options: &ForwardOptions,
        metrics: &Metrics,
        stop: &CancellationToken,
        timeout: Duration,
    ) -> Result<(Self, Vec<JoinHandle<()>>), ForwardError> {
        let mut all = Self { targets: Vec::new(), metrics: metrics.clone() };
        let mut tasks = Vec::new();
        for target in &options.forward {
            let (name, waiting) = (target.name(), Arc::new(AtomicU64::new(0)));
            let client = TargetClient::new(target, options)?;
            let sender = Sender::new(name, client, metrics.clone(), Arc::clone(&waiting));
            let (queue, items) = mpsc::channel(QUEUE_PROFILES);
            all.targets.push(TargetQueue {
                name,
                bytes: Arc::new(Semaphore::new(QUEUE_BYTES)),
                queue,
                waiting,
            });
            tasks.push(tokio::spawn(sender.run(items, stop.clone(), timeout)));
        }
        Ok((all, tasks))
    }

    /// Copies the content of a batch. Returns `None` without a target, or for a batch without a profile.
    pub(crate) fn copy(&self, batch: &Batch) -> Option<ForwardItem> {
        if self.targets.is_empty() || batch.pprof.is_empty() {
            return None;
        }
        Some(ForwardItem {
            id: batch.batch_id.clone(),
            labels: batch.labels.clone(),
            pprof: Bytes::copy_from_slice(&batch.pprof),
            start_ms: batch.start.as_ref().and_then(time::to_ms)?,
        })
    }

    /// Queues an item for every target, without waiting. A full queue drops and counts it.
    pub(crate) fn offer(&self, item: &ForwardItem) {
        for target in &self.targets {
            let size = u32::try_from(item.pprof.len().max(1)).unwrap_or(u32::MAX);
            let bytes = Arc::clone(&target.bytes).try_acquire_many_owned(size);
            let queued = bytes.ok().map(|bytes| QueuedItem { item: item.clone(), bytes });
            target.waiting.fetch_add(1, Relaxed);
            if queued.is_none_or(|queued| target.queue.try_send(queued).is_err()) {
                target.waiting.fetch_sub(1, Relaxed);
                self.metrics.forward_lost(target.name, "queue_full", 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("pyroscope=http://p:4040/", Some("pyroscope=http://p:4040"))]
    #[case("parca=https://parca:7070", Some("parca=https://parca:7070"))]
    #[case("otlp=http://x:4317", Some("otlp=http://x:4317"))]
    #[case("otlphttp=http://x", None)]
    #[case("pyroscope=", None)]
    #[case("pyroscope=p:4040", None)]
    #[case("http://p:4040", None)]
    fn targets_are_parsed(#[case] text: &str, #[case] want: Option<&str>) {
        let found = text.parse::<ForwardTarget>();
        assert_eq!(found.as_ref().ok().map(ToString::to_string).as_deref(), want, "{found:?}");
    }
}
