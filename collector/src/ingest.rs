//! Profiles come in: every batch is checked, made durable, and answered by its id.
//!
//! What waits is bounded three times: batches of one stream by the in-flight window (the stream is not read further),
//! bytes of all streams by a memory budget, and batches before the writer by its queue. What does not fit the last two
//! is put off with a delay, which the agent's spool bridges.

use std::{collections::HashMap, pin::Pin, sync::Arc, time::Duration};

use gannet_proto::{
    ingest::{
        Batch, PushRequest, PushResponse,
        ingest_service_server::IngestService,
        push_request,
        push_response::{self, Accepted, Limits, Refused, Throttled},
    },
    labels,
    ledger::Ledger,
    pprof,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};
use ulid::Ulid;

use crate::{
    Config,
    auth::Who,
    config::MAX_IN_FLIGHT,
    forward::Forwarder,
    metrics::Metrics,
    store::{self, NewBatch, ObjectMeta, Outcome, Store, TypeTotal},
    time,
};

/// How many times its compressed size a profile may have at most.
pub(crate) const MAX_INFLATION: usize = 16;
/// Frames of one stack, inlined ones included: graphs are trees of this depth, which gRPC writes by recursion.
const MAX_DEPTH: usize = 1024;
/// Profiles that are checked at one time: checking is all computation.
const CHECKS_AT_ONCE: usize = 4;
/// How long a stream may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// The memory budget is counted in these, because a semaphore's permits are 32 bits.
const MEMORY_UNIT: u64 = 1024;
/// A node's name is a DNS name.
pub(crate) const MAX_NODE_NAME: usize = 253;

/// The service.
#[derive(Clone)]
pub(crate) struct Ingest(Arc<Inner>);

struct Inner {
    store: Arc<Store>,
    writer: mpsc::Sender<NewBatch>,
    forwarder: Forwarder,
    metrics: Metrics,
    memory: Arc<Semaphore>,
    checks: Semaphore,
    stop: CancellationToken,
    max_batch_bytes: u64,
    retention_age: Duration,
    max_clock_ahead: Duration,
}

/// Why a batch will never be taken.
struct Refusal {
    code: &'static str,
    reason: String,
}

impl Refusal {
    fn new(code: &'static str, reason: impl Into<String>) -> Self {
        Self { code, reason: reason.into() }
    }
}

impl Ingest {
    pub(crate) fn new(
        store: Arc<Store>,
        writer: mpsc::Sender<NewBatch>,
        config: &Config,
        forwarder: Forwarder,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Self {
        Self(Arc::new(Inner {
            store,
            writer,
            forwarder,
            metrics,
            memory: Arc::new(Semaphore::new((config.ingest_queue_bytes / MEMORY_UNIT) as usize)),
            checks: Semaphore::new(CHECKS_AT_ONCE),
            stop,
            max_batch_bytes: config.max_batch_bytes,
            retention_age: config.retention_age,
            max_clock_ahead: config.max_clock_ahead,
        }))
    }
}

#[tonic::async_trait]
impl IngestService for Ingest {
    type PushStream = Pin<Box<dyn Stream<Item = Result<PushResponse, Status>> + Send>>;

    async fn push(
        &self,
        request: Request<Streaming<PushRequest>>,
    ) -> Result<Response<Self::PushStream>, Status> {
        let ingest = Arc::clone(&self.0);
        let who = request.extensions().get::<Who>().cloned().unwrap_or_default();
        // One place for each unanswered batch and the limits: answers never wait for a free place while the client reads.
        let (answers, receiver) = mpsc::channel(MAX_IN_FLIGHT as usize + 1);
        tokio::spawn(async move {
            ingest.metrics.ingest_streams.inc();
            if let Err(status) = ingest.serve(&who, request.into_inner(), &answers).await {
                let _ = answers.send(Err(status)).await;
            }
            ingest.metrics.ingest_streams.dec();
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

type Answers = mpsc::Sender<Result<PushResponse, Status>>;

fn answer(message: push_response::Message) -> PushResponse {
    PushResponse { message: Some(message) }
}

impl Inner {
    /// Reads one stream to its end, and waits until every batch of it is answered.
    async fn serve(
        self: &Arc<Self>,
        who: &Who,
        mut stream: Streaming<PushRequest>,
        answers: &Answers,
    ) -> Result<(), Status> {
        let hello = tokio::time::timeout(HELLO_TIMEOUT, stream.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello within 10 s of opening the stream"))??;
        let Some(PushRequest { message: Some(push_request::Message::Hello(hello)) }) = hello else {
            return Err(Status::invalid_argument("the first message must be hello"));
        };
        if hello.node.is_empty() || hello.node.len() > MAX_NODE_NAME {
            return Err(Status::invalid_argument(format!(
                "hello.node: a node's name has 1 to {MAX_NODE_NAME} bytes, this one has {}",
                hello.node.len()
            )));
        }
        who.may_be_node(&hello.node)?;
        let only_node = who.is_bound_to_nodes().then(|| Arc::<str>::from(hello.node.as_str()));
        tracing::debug!(node = %hello.node, version = %hello.version, "an agent pushes profiles");
        let limits = Limits { max_batch_bytes: self.max_batch_bytes, max_in_flight: MAX_IN_FLIGHT };
        let _ = answers.send(Ok(answer(push_response::Message::Limits(limits)))).await;

        let in_flight = Arc::new(Semaphore::new(MAX_IN_FLIGHT as usize));
        let tasks = TaskTracker::new();
        let end = loop {
            let message = tokio::select! {
                biased;
                () = self.stop.cancelled() => {
                    break Err(Status::unavailable("the collector is shutting down: connect again"));
                }
                () = answers.closed() => break Ok(()),
                message = stream.message() => message,
            };
            let batch = match message {
                Ok(Some(PushRequest { message: Some(push_request::Message::Batch(batch)) })) => batch,
                Ok(Some(_)) => {
                    break Err(Status::invalid_argument("after hello, every message must be a batch"));
                }
                Ok(None) => break Ok(()),
                Err(status) => break Err(status),
            };
            let Ok(place) = Arc::clone(&in_flight).acquire_owned().await else { break Ok(()) };
            let (ingest, answers, only_node) = (Arc::clone(self), answers.clone(), only_node.clone());
            tasks.spawn(async move {
                let message = ingest.take(batch, only_node.as_deref()).await;
                // Before the place is free again, so that answers not read stop the stream.
                let _ = answers.send(Ok(answer(message))).await;
                drop(place);
            });
        };
        tasks.close();
        tasks.wait().await;
        end
    }

    /// From a batch to its answer. `only_node`: it must be of this node.
    async fn take(self: &Arc<Self>, batch: Batch, only_node: Option<&str>) -> push_response::Message {
        let batch_id = batch.batch_id.clone();
        let refused = |refusal: Refusal| {
            self.metrics.refused(refusal.code);
            tracing::warn!(
                batch = %batch_id.escape_debug(), code = refusal.code, reason = %refusal.reason, "a batch is refused"
            );
            push_response::Message::Refused(Refused {
                batch_id: batch_id.clone(),
                code: refusal.code.to_owned(),
                reason: refusal.reason,
            })
        };
        self.metrics.received_bytes.inc_by(batch.pprof.len() as u64);
        let of_node = batch.labels.get(labels::NODE).map_or("", String::as_str);
        if let Some(node) = only_node.filter(|node| *node != of_node) {
            let reason =
                format!("the profile is of node `{of_node}`, and its sender may speak for `{node}` only");
            return refused(Refusal::new("wrong_node", reason));
        }
        let id = match Ulid::from_string(&batch.batch_id) {
            // Other spellings of one id would be other ids to the agent that waits for its answer.
            Ok(id) if id.to_string() == batch.batch_id => id,
            _ => {
                let reason = "batch_id is not a ULID: 26 digits and upper-case letters";
                return refused(Refusal::new("bad_id", reason));
            }
        };
        if batch.pprof.len() as u64 > self.max_batch_bytes {
            return refused(Refusal::new(
                "too_large",
                format!("the profile has {} bytes, the limit is {}", batch.pprof.len(), self.max_batch_bytes),
            ));
        }
        let copied = self.forwarder.copy(&batch);
        let outcome = match self.hand_in(id, batch).await {
            Ok(outcome) => outcome,
            Err(refusal) => return refused(refusal),
        };
        match outcome {
            Outcome::Stored => {
                if let Some(copied) = copied {
                    self.forwarder.offer(copied);
                }
                push_response::Message::Accepted(Accepted { batch_id, duplicate: false })
            }
            Outcome::Duplicate => push_response::Message::Accepted(Accepted { batch_id, duplicate: true }),
            Outcome::Throttled { retry_after, reason, .. } => push_response::Message::Throttled(Throttled {
                batch_id,
                retry_after: Some(time::span(retry_after)),
                reason,
            }),
        }
    }

    async fn hand_in(self: &Arc<Self>, id: Ulid, batch: Batch) -> Result<Outcome, Refusal> {
        let busy = |reason: &str| {
            self.metrics.throttled("busy");
            Ok(Outcome::Throttled {
                cause: "busy",
                retry_after: Duration::from_secs(1),
                reason: reason.to_owned(),
            })
        };
        // The object holds the profile once more.
        let units = (batch.pprof.len() as u64 * 2).div_ceil(MEMORY_UNIT).max(1) as u32;
        let Ok(memory) = Arc::clone(&self.memory).try_acquire_many_owned(units) else {
            return busy("the collector holds as many unwritten profiles as it may");
        };
        let (reply, outcome) = oneshot::channel();
        let Ok(turn) = self.checks.acquire().await else { return busy("the collector is shutting down") };
        let ingest = Arc::clone(self);
        let checked = tokio::task::spawn_blocking(move || {
            // What is stored already is good, however old it is by now.
            if let Ok(known) = ingest.store.index().known([id])
                && known == [true]
            {
                return Ok(None);
            }
            ingest.check(batch, memory, reply).map(Some)
        });
        let new = match checked.await {
            Ok(Ok(Some(new))) => new,
            Ok(Ok(None)) => {
                self.metrics.batches_duplicate.inc();
                return Ok(Outcome::Duplicate);
            }
            Ok(Err(refusal)) => return Err(refusal),
            Err(_) => return busy("the collector is shutting down"),
        };
        drop(turn);
        if self.writer.try_send(new).is_err() {
            return busy("the collector's queue of unwritten profiles is full");
        }
        match outcome.await {
            Ok(outcome) => Ok(outcome),
            Err(_) => busy("the collector is shutting down"),
        }
    }

    /// Everything that a batch can be wrong in.
    fn check(
        &self,
        mut batch: Batch,
        memory: OwnedSemaphorePermit,
        reply: oneshot::Sender<Outcome>,
    ) -> Result<NewBatch, Refusal> {
        labels::check(&batch.labels).map_err(|e| Refusal::new("bad_labels", e.to_string()))?;
        self.check_time(&batch)?;
        let pprof = std::mem::take(&mut batch.pprof);
        let types =
            if pprof.is_empty() { ledger_alone(&batch)? } else { self.check_profile(&pprof, batch.samples)? };
        let ledger = match batch.ledger.clone() {
            None => None,
            Some(sent) => match Ledger::try_from(sent) {
                Ok(ledger) => Some(ledger),
                // The profile is good, so it is kept; a newer agent may know reasons that this collector does not.
                Err(error) => {
                    self.metrics.ledgers_unbalanced.inc();
                    tracing::warn!(batch = %batch.batch_id, %error, "the ledger of a batch cannot be read");
                    None
                }
            },
        };
        let meta = ObjectMeta { batch: Some(batch), types };
        let object = store::pack(&meta, &pprof).ok_or_else(|| {
            Refusal::new(
                "bad_labels",
                "labels and reason together are larger than 64 KiB: shorten their values",
            )
        })?;
        let described = store::describe(&meta, object.len() as u64);
        let (labels, key, row) = described.ok_or_else(|| Refusal::new("bad_time", "start is not a time"))?;
        Ok(NewBatch { key, object, row, labels, ledger, _memory: memory, reply })
    }

    fn check_time(&self, batch: &Batch) -> Result<(), Refusal> {
        let start = batch.start.as_ref().and_then(time::to_ms);
        let start = start.ok_or_else(|| Refusal::new("bad_time", "start is missing or lies before 1970"))?;
        if batch.duration.as_ref().is_some_and(|d| time::span_to_ms(d).is_none()) {
            return Err(Refusal::new("bad_time", "duration is negative"));
        }
        let now = time::now_ms();
        if start > now.saturating_add(self.max_clock_ahead.as_millis() as u64) {
            return Err(Refusal::new(
                "in_the_future",
                format!(
                    "the window starts {} after the collector's time, more than {}: set the node's clock",
                    words((start - now) / 1000),
                    words(self.max_clock_ahead.as_secs())
                ),
            ));
        }
        if start < now.saturating_sub(self.retention_age.as_millis() as u64) {
            return Err(Refusal::new(
                "too_old",
                format!(
                    "the window started {} ago, and profiles are kept for {}",
                    words((now - start) / 1000),
                    words(self.retention_age.as_secs())
                ),
            ));
        }
        Ok(())
    }

    fn check_profile(&self, pprof: &[u8], samples: u64) -> Result<Vec<TypeTotal>, Refusal> {
        if !pprof.starts_with(&[0x1f, 0x8b]) {
            return Err(Refusal::new("not_gzip", "pprof does not begin as gzip does"));
        }
        let max_inflated = self.max_batch_bytes as usize * MAX_INFLATION;
        let profile = pprof::decode(pprof, max_inflated).map_err(|e| {
            let code = match e {
                pprof::PprofError::Gzip(_) | pprof::PprofError::Truncated => "not_gzip",
                pprof::PprofError::TooLarge { .. } => "too_large",
                _ => "not_pprof",
            };
            Refusal::new(code, e.to_string())
        })?;
        let summary = pprof::check(&profile).map_err(|e| Refusal::new("not_pprof", e.to_string()))?;
        let depth = deepest(&profile);
        if depth > MAX_DEPTH {
            let reason = format!("a stack of the profile has {depth} frames, the limit is {MAX_DEPTH}");
            return Err(Refusal::new("too_large", reason));
        }
        let total = summary.totals.first().copied().unwrap_or(0);
        if u64::try_from(total) != Ok(samples) {
            return Err(Refusal::new(
                "count_mismatch",
                format!("samples says {samples}, and the first values of the profile add up to {total}"),
            ));
        }
        let types = summary.sample_types.into_iter().zip(summary.totals);
        Ok(types.map(|(name, total)| TypeTotal { name, total }).collect())
    }
}

/// Frames of the deepest stack, inlined ones included.
fn deepest(profile: &pprof::Profile) -> usize {
    let lines: HashMap<u64, usize> = profile.location.iter().map(|l| (l.id, l.line.len().max(1))).collect();
    let depth = |stack: &[u64]| stack.iter().map(|id| lines.get(id).copied().unwrap_or(1)).sum();
    profile.sample.iter().map(|s| depth(&s.location_id)).max().unwrap_or(0)
}

/// A batch without a profile must at least bring a ledger, and no samples.
fn ledger_alone(batch: &Batch) -> Result<Vec<TypeTotal>, Refusal> {
    if batch.samples != 0 {
        return Err(Refusal::new(
            "count_mismatch",
            format!("samples says {}, and there is no profile", batch.samples),
        ));
    }
    if batch.ledger.is_none() {
        return Err(Refusal::new("not_pprof", "the batch has neither a profile nor a ledger"));
    }
    Ok(Vec::new())
}

fn words(seconds: u64) -> String {
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}
