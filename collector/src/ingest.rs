//! The push service: checks every batch, hands it to the store's writer, and answers it by its id.
//!
//! Three bounds limit the waiting batches: the in-flight window of a stream (a full window stops the reading), the memory
//! budget of all streams, and the writer's queue. The collector throttles a batch that exceeds one of the last two. The
//! agent keeps a throttled batch in its spool and sends it again after the delay.

use std::{collections::HashMap, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use clap::Args;
use gannet_base::{ByteSize, format_duration};
use gannet_proto::{
    ingest::{
        Batch, PushRequest, PushResponse,
        ingest_service_server::IngestService,
        push_request,
        push_response::{self, Accepted, Limits, Refused, Throttled},
    },
    labels,
    ledger::Ledger,
    pprof::{self, Encoding, MAX_STACK_FRAMES, PIECES, PieceDecoder},
};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};
use ulid::Ulid;

use crate::{
    auth::Caller,
    forward::Forwarder,
    limits::{MAX_INFLATION, MAX_NODE_NAME},
    metrics::Metrics,
    recording::{Recorded, Recorder},
    store::{BatchOutcome, BatchQueue, NewBatch, PackError, Store, TypeTotal},
    time,
};

/// Unanswered batches that an agent may have on one stream.
const MAX_IN_FLIGHT: u32 = 32;
/// Concurrent checks of profiles. A check is pure computation.
const CONCURRENT_CHECKS: usize = 4;
/// Time until the first message of a stream.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of one permit of the memory budget, because a semaphore counts 32-bit permits.
const MEMORY_UNIT: u64 = 1024;

/// Memory of a waiting batch beside its profile and its metadata.
const WAITING_BATCH_BYTES: u64 = 2048;

/// Limits of the accepted batches.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Limits")]
#[serde(default)]
pub struct IngestOptions {
    // The default is Pyroscope's limit, so that every stored profile can be forwarded.
    /// Refuse compressed profiles that are larger
    #[arg(long, value_name = "BYTES", env = "GANNET_COLLECTOR_MAX_BATCH_BYTES", default_value = "4MiB")]
    pub max_batch_bytes: ByteSize,
    // Not by default: it costs processor time. docs/operations.md says when it pays.
    /// Number of agents at a time that may send each profile compressed with those before it, in half the bytes. Each takes
    /// up to 3 MiB of memory, and its profiles more processor time
    #[arg(
        long, value_name = "AGENTS", env = "GANNET_COLLECTOR_PIECE_STREAMS", default_value_t = 0,
        value_parser = clap::value_parser!(u32).range(..=65_536)
    )]
    pub piece_streams: u32,
    /// Time by which a window may start in the future, because the clocks of nodes differ.
    #[arg(skip = Duration::from_secs(600))]
    #[serde(skip)]
    pub max_clock_ahead: Duration,
    /// Memory for profiles that wait to be written, over all streams, in bytes.
    #[arg(skip = 128_u64 << 20)]
    #[serde(skip)]
    pub queue_bytes: u64,
}

impl Default for IngestOptions {
    fn default() -> Self {
        gannet_base::defaults()
    }
}

/// The push service.
#[derive(Clone)]
pub(crate) struct Ingest(Arc<IngestState>);

/// The parts of the collector that receive each profile after the store has it.
pub(crate) struct Onward {
    pub(crate) forwarder: Forwarder,
    /// None without recording rules.
    pub(crate) recorder: Option<Arc<Recorder>>,
}

struct IngestState {
    store: Arc<Store>,
    queue: BatchQueue,
    forwarder: Forwarder,
    recorder: Option<Arc<Recorder>>,
    metrics: Metrics,
    memory: Arc<Semaphore>,
    /// Permits of `memory` in all. A batch that needs more than all takes all.
    memory_units: u64,
    checks: Semaphore,
    /// Streams that may still begin to send pieces. Each keeps a window in memory.
    piece_streams: Arc<Semaphore>,
    stop: CancellationToken,
    max_batch_bytes: u64,
    max_clock_ahead: Duration,
}

/// A batch with its profile as the store keeps it.
struct Received {
    batch: Batch,
    /// The profile without compression, if the batch came as a piece: it need not be inflated again.
    raw: Option<Vec<u8>>,
    /// Bytes of the profile on the wire.
    wire_bytes: u64,
}

/// A profile without compression, with its share of the memory budget.
struct RawProfile {
    bytes: Vec<u8>,
    _memory: OwnedSemaphorePermit,
}

/// Why a profile that a client of another protocol pushed is not stored. Each holds the reason.
pub(crate) enum NotStored {
    /// It is wrong.
    Refused(String),
    /// Another attempt may succeed.
    Throttled(String),
}

/// Why the collector refuses a batch for good.
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
    /// `queue` leads to the writer of `store`.
    pub(crate) fn new(
        store: Arc<Store>,
        queue: BatchQueue,
        options: &IngestOptions,
        onward: Onward,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Self {
        let Onward { forwarder, recorder } = onward;
        let memory_units = (options.queue_bytes / MEMORY_UNIT).max(1);
        Self(Arc::new(IngestState {
            store,
            queue,
            forwarder,
            recorder,
            metrics,
            memory: Arc::new(Semaphore::new(memory_units as usize)),
            memory_units,
            checks: Semaphore::new(CONCURRENT_CHECKS),
            piece_streams: Arc::new(Semaphore::new(options.piece_streams as usize)),
            stop,
            max_batch_bytes: options.max_batch_bytes.0,
            max_clock_ahead: options.max_clock_ahead,
        }))
    }

    /// Bytes of the largest compressed profile.
    pub(crate) fn max_batch_bytes(&self) -> u64 {
        self.0.max_batch_bytes
    }

    /// Stores one batch that came outside of a stream, as those of streams. A batch that is stored already is no error.
    pub(crate) async fn store_one(&self, batch: Batch) -> Result<(), NotStored> {
        let wire_bytes = batch.pprof.len() as u64;
        match self.0.process(Received { batch, raw: None, wire_bytes }, None, 0).await {
            push_response::Message::Refused(refused) => Err(NotStored::Refused(refused.reason)),
            push_response::Message::Throttled(throttled) => Err(NotStored::Throttled(throttled.reason)),
            push_response::Message::Accepted(_) | push_response::Message::Limits(_) => Ok(()),
        }
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
        let caller = request.extensions().get::<Caller>().cloned().unwrap_or_default();
        // One slot for each unanswered batch and one for the limits. So no answer waits while the client reads.
        let (answers, receiver) = mpsc::channel(MAX_IN_FLIGHT as usize + 1);
        tokio::spawn(async move {
            ingest.metrics.ingest_streams.inc();
            if let Err(status) = ingest.serve(&caller, request.into_inner(), &answers).await {
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

impl IngestState {
    /// Reads one stream to its end, and returns after it has answered every batch.
    async fn serve(
        self: &Arc<Self>,
        caller: &Caller,
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
                "hello.node: a node name has 1 to {MAX_NODE_NAME} bytes, this one has {}",
                hello.node.len()
            )));
        }
        caller.may_be_node(&hello.node)?;
        let at_ms = hello.at.as_ref().and_then(time::to_ms);
        let clock_ahead_ms = at_ms.map_or(0, |at_ms| at_ms as i64 - time::now_ms() as i64);
        let only_node = caller.is_bound_to_nodes().then(|| Arc::<str>::from(hello.node.as_str()));
        tracing::debug!(node = %hello.node, version = %hello.version, "an agent pushes profiles");
        let piece_stream = Arc::clone(&self.piece_streams).try_acquire_owned().ok();
        let mut pieces = piece_stream.as_ref().and_then(|_| PieceDecoder::new());
        let mut encodings = vec![Encoding::Zstd.name().to_owned()];
        encodings.extend(pieces.as_ref().map(|_| PIECES.to_owned()));
        let limits =
            Limits { max_batch_bytes: self.max_batch_bytes, max_in_flight: MAX_IN_FLIGHT, encodings };
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
            let Ok(slot) = Arc::clone(&in_flight).acquire_owned().await else { break Ok(()) };
            // Here and not in the task, because the order of pieces counts. It takes a millisecond at most.
            let received = match receive(batch, pieces.as_mut()) {
                Ok(received) => received,
                Err(status) => {
                    tracing::warn!(node = %hello.node, error = status.message(), "ended a stream of pieces");
                    break Err(status);
                }
            };
            let (ingest, answers, only_node) = (Arc::clone(self), answers.clone(), only_node.clone());
            tasks.spawn(async move {
                let message = ingest.process(received, only_node.as_deref(), clock_ahead_ms).await;
                // Before the slot is free again, so that unread answers stop the stream.
                let _ = answers.send(Ok(answer(message))).await;
                drop(slot);
            });
        };
        tasks.close();
        tasks.wait().await;
        end
    }

    /// Returns the answer to a batch. `only_node`: the node that the batch must come from. `clock_ahead_ms`: the node's clock
    /// minus the collector's.
    async fn process(
        self: &Arc<Self>,
        received: Received,
        only_node: Option<&str>,
        clock_ahead_ms: i64,
    ) -> push_response::Message {
        let Received { mut batch, raw, wire_bytes } = received;
        let batch_id = batch.batch_id.clone();
        let refused = |refusal: Refusal| {
            self.metrics.refused(refusal.code);
            tracing::warn!(
                batch = %batch_id.escape_debug(), code = refusal.code, reason = %refusal.reason, "refused a batch"
            );
            push_response::Message::Refused(Refused {
                batch_id: batch_id.clone(),
                code: refusal.code.to_owned(),
                reason: refusal.reason,
            })
        };
        self.metrics.received_bytes.inc_by(wire_bytes);
        let of_node = batch.labels.get(labels::NODE).map_or("", String::as_str);
        if let Some(node) = only_node.filter(|node| *node != of_node) {
            let reason = format!(
                "the profile comes from node `{of_node}`, and its sender may speak for `{node}` only"
            );
            return refused(Refusal::new("wrong_node", reason));
        }
        let id = match Ulid::from_string(&batch.batch_id) {
            // The agent waits for an answer with the id as it wrote it.
            Ok(id) if id.to_string() == batch.batch_id => id,
            _ => {
                let reason = "batch_id is not a ULID: 26 digits and upper-case letters";
                return refused(Refusal::new("bad_id", reason));
            }
        };
        let raw = match raw {
            Some(bytes) => match self.compress(bytes).await {
                Ok((raw, pprof)) => {
                    batch.pprof = pprof;
                    Some(raw)
                }
                Err(reason) => {
                    self.metrics.throttled("busy");
                    return throttled(batch_id, Duration::from_secs(1), reason);
                }
            },
            None => None,
        };
        if batch.pprof.len() as u64 > self.max_batch_bytes {
            return refused(Refusal::new(
                "too_large",
                format!("the profile has {} bytes, the limit is {}", batch.pprof.len(), self.max_batch_bytes),
            ));
        }
        self.correct_start(&mut batch, clock_ahead_ms);
        let copied = self.forwarder.copy(&batch);
        let outcome = match self.submit(id, batch, raw).await {
            Ok(outcome) => outcome,
            Err(refusal) => return refused(refusal),
        };
        match outcome {
            BatchOutcome::Stored { samples } => {
                if let Some(copied) = copied {
                    self.forwarder.offer(&copied);
                }
                push_response::Message::Accepted(Accepted {
                    batch_id,
                    duplicate: false,
                    samples: Some(samples),
                })
            }
            BatchOutcome::Duplicate => {
                push_response::Message::Accepted(Accepted { batch_id, duplicate: true, samples: None })
            }
            BatchOutcome::Throttled { retry_after, reason, .. } => throttled(batch_id, retry_after, reason),
        }
    }

    /// Compresses the profile of a piece for the store, as its agent has it in the spool. An error is the reason to send the
    /// batch again.
    async fn compress(&self, bytes: Vec<u8>) -> Result<(RawProfile, Vec<u8>), &'static str> {
        let units = (bytes.len() as u64).div_ceil(MEMORY_UNIT).min(self.memory_units) as u32;
        let memory = Arc::clone(&self.memory)
            .try_acquire_many_owned(units)
            .map_err(|_| "the collector's memory for unwritten profiles is full")?;
        let compressed = async {
            let _turn = self.checks.acquire().await.ok()?;
            let compress = move || {
                let pprof = pprof::to_zstd(&bytes);
                (RawProfile { bytes, _memory: memory }, pprof)
            };
            tokio::task::spawn_blocking(compress).await.ok()
        };
        compressed.await.ok_or("the collector is shutting down")
    }

    /// Checks a batch, hands it to the writer and waits for the outcome.
    async fn submit(
        self: &Arc<Self>,
        id: Ulid,
        batch: Batch,
        raw: Option<RawProfile>,
    ) -> Result<BatchOutcome, Refusal> {
        let busy = |reason: &str| {
            self.metrics.throttled("busy");
            Ok(BatchOutcome::Throttled {
                cause: "busy",
                retry_after: Duration::from_secs(1),
                reason: reason.to_owned(),
            })
        };
        let units = waiting_bytes(&batch).div_ceil(MEMORY_UNIT).min(self.memory_units) as u32;
        let Ok(memory) = Arc::clone(&self.memory).try_acquire_many_owned(units) else {
            return busy("the collector's memory for unwritten profiles is full");
        };
        let Ok(turn) = self.checks.acquire().await else { return busy("the collector is shutting down") };
        let ingest = Arc::clone(self);
        let checked = tokio::task::spawn_blocking(move || {
            // A stored batch has passed the checks before, however old it is by now.
            if matches!(ingest.store.contains(id), Ok(true)) {
                return Ok(None);
            }
            ingest.check(batch, raw.as_ref().map(|raw| &*raw.bytes)).map(Some)
        });
        let (new, recorded) = match checked.await {
            Ok(Ok(Some(new))) => new,
            Ok(Ok(None)) => {
                self.metrics.batches_duplicate.inc();
                return Ok(BatchOutcome::Duplicate);
            }
            Ok(Err(refusal)) => return Err(refusal),
            Err(_) => return busy("the collector is shutting down"),
        };
        drop(turn);
        let Some(outcome) = self.queue.submit(new, memory) else {
            return busy("the collector's queue of unwritten profiles is full");
        };
        match outcome.await {
            Ok(outcome) => {
                if let (Some(recorder), BatchOutcome::Stored { .. }) = (&self.recorder, &outcome) {
                    recorder.count(recorded);
                }
                Ok(outcome)
            }
            Err(_) => busy("the collector is shutting down"),
        }
    }

    /// Checks labels, times and profile of a batch. Returns the batch packed for the store, and the values for the recorded metrics.
    /// `raw`: the profile without compression, if the caller has it.
    fn check(&self, mut batch: Batch, raw: Option<&[u8]>) -> Result<(NewBatch, Recorded), Refusal> {
        labels::check(&batch.labels).map_err(|e| Refusal::new("bad_labels", e.to_string()))?;
        self.check_time(&batch)?;
        let pprof = Bytes::from(std::mem::take(&mut batch.pprof));
        let (types, recorded) = if pprof.is_empty() {
            (check_ledger_only(&batch)?, Recorded::default())
        } else {
            self.check_profile(&pprof, raw, &batch)?
        };
        let ledger = match batch.ledger.clone() {
            None => None,
            Some(sent) => match Ledger::try_from(sent) {
                Ok(ledger) => Some(ledger),
                // The profile is valid, so the collector stores it. A newer agent may use reasons that are unknown here.
                Err(error) => {
                    self.metrics.ledgers_unbalanced.inc();
                    tracing::warn!(batch = %batch.batch_id, %error, "cannot read the ledger of a batch");
                    None
                }
            },
        };
        let packed = NewBatch::pack(batch, pprof, types, ledger).map_err(|error| match error {
            PackError::MetadataTooLarge => Refusal::new(
                "bad_labels",
                "labels and reason together are larger than 64 KiB: shorten their values",
            ),
            PackError::InvalidStart => Refusal::new("bad_time", "start is not a time"),
        });
        Ok((packed?, recorded))
    }

    /// Corrects the start of a batch that the check of its time would refuse because a clock is wrong. The reason of the
    /// batch says so.
    ///
    /// If the node's clock still differs as much, the difference corrects the start. A start in the future that it does not
    /// explain becomes the time of arrival. An old batch that it does not explain is old.
    fn correct_start(&self, batch: &mut Batch, clock_ahead_ms: i64) {
        let Some(start) = batch.start.as_ref().and_then(time::to_ms) else { return };
        let now = time::now_ms();
        let latest = now.saturating_add(self.max_clock_ahead.as_millis() as u64);
        let oldest = now.saturating_sub(self.store.retention_age().as_millis() as u64);
        if (oldest..=latest).contains(&start) {
            return;
        }
        let shifted = start.checked_add_signed(-clock_ahead_ms).filter(|at| (oldest..=latest).contains(at));
        let duration = batch.duration.as_ref().and_then(time::duration_to_ms).unwrap_or(0);
        let corrected = match shifted {
            Some(shifted) => shifted,
            None if start > latest => now.saturating_sub(duration).max(oldest),
            None => return,
        };
        let side = if start > corrected { "ahead" } else { "behind" };
        let by = format_duration(Duration::from_secs((start.abs_diff(corrected) + 500) / 1000));
        self.metrics.batches_retimed.inc();
        tracing::debug!(batch = %batch.batch_id.escape_debug(), by, side, "corrected the start of a batch");
        batch.start = Some(time::timestamp(corrected));
        let mark = format!("the node's clock was {by} {side}: the start is corrected");
        batch.reason = if batch.reason.is_empty() { mark } else { format!("{}; {mark}", batch.reason) };
    }

    fn check_time(&self, batch: &Batch) -> Result<(), Refusal> {
        let start = batch.start.as_ref().and_then(time::to_ms);
        let start = start.ok_or_else(|| Refusal::new("bad_time", "start is missing or is before 1970"))?;
        if batch.duration.as_ref().is_some_and(|d| time::duration_to_ms(d).is_none()) {
            return Err(Refusal::new("bad_time", "duration is negative"));
        }
        let now = time::now_ms();
        if start > now.saturating_add(self.max_clock_ahead.as_millis() as u64) {
            return Err(Refusal::new(
                "in_the_future",
                format!(
                    "the window starts {} after the collector's time, more than {}: set the node's clock",
                    format_duration(Duration::from_secs((start - now) / 1000)),
                    format_duration(self.max_clock_ahead)
                ),
            ));
        }
        let retention_age = self.store.retention_age();
        if start < now.saturating_sub(retention_age.as_millis() as u64) {
            return Err(Refusal::new(
                "too_old",
                format!(
                    "the window started {} ago, and the collector keeps profiles for {}",
                    format_duration(Duration::from_secs((now - start) / 1000)),
                    format_duration(retention_age)
                ),
            ));
        }
        Ok(())
    }

    /// Checks the profile of a batch. Returns its sample types with their totals, and the values for the recorded metrics.
    fn check_profile(
        &self,
        pprof: &[u8],
        raw: Option<&[u8]>,
        batch: &Batch,
    ) -> Result<(Vec<TypeTotal>, Recorded), Refusal> {
        let samples = batch.samples;
        if Encoding::of(pprof).is_none() {
            return Err(Refusal::new("not_gzip", "pprof starts with no header of gzip or zstd"));
        }
        let max_inflated = self.max_batch_bytes as usize * MAX_INFLATION;
        let decoded = match raw {
            // What starts like gzip in a piece is no profile: no reader of the store would inflate it twice.
            Some(raw) => pprof::decode_raw(raw, max_inflated),
            None => pprof::decode(pprof, max_inflated),
        };
        let profile = decoded.map_err(|e| {
            let code = match e {
                pprof::PprofError::Gzip(_) | pprof::PprofError::Truncated => "not_gzip",
                pprof::PprofError::TooLarge { .. } => "too_large",
                _ => "not_pprof",
            };
            Refusal::new(code, e.to_string())
        })?;
        let summary = pprof::check(&profile).map_err(|e| Refusal::new("not_pprof", e.to_string()))?;
        let depth = max_depth(&profile);
        if depth > MAX_STACK_FRAMES {
            let reason =
                format!("a stack of the profile has {depth} frames, the limit is {MAX_STACK_FRAMES}");
            return Err(Refusal::new("too_large", reason));
        }
        let total = summary.totals.first().copied().unwrap_or(0);
        if u64::try_from(total) != Ok(samples) {
            return Err(Refusal::new(
                "count_mismatch",
                format!("samples is {samples}, and the first values of the profile add up to {total}"),
            ));
        }
        let types = summary.sample_types.into_iter().zip(summary.totals);
        let recorded = self.recorder.as_ref().map(|recorder| recorder.values(&batch.labels, &profile));
        let types = types.map(|(name, total)| TypeTotal { name, total }).collect();
        Ok((types, recorded.unwrap_or_default()))
    }
}

/// Inflates a piece. An error ends the stream: the pieces after it cannot be read, and its agent sends all of them again.
fn receive(mut batch: Batch, pieces: Option<&mut PieceDecoder>) -> Result<Received, Status> {
    let wire_bytes = batch.pprof.len() as u64;
    let Some(piece) = batch.piece.take() else { return Ok(Received { batch, raw: None, wire_bytes }) };
    let Some(pieces) = pieces else {
        return Err(Status::data_loss(format!("piece: the limits of this stream do not have {PIECES}")));
    };
    let raw = pieces.decode(piece.number, piece.bytes, &batch.pprof).map_err(|error| {
        // A ULID has 26 letters; the status travels in a header, which has a limit.
        let id: String = batch.batch_id.chars().take(26).collect();
        Status::data_loss(format!("batch {}: {error}", id.escape_debug()))
    })?;
    batch.pprof.clear();
    Ok(Received { batch, raw: Some(raw), wire_bytes })
}

fn throttled(batch_id: String, retry_after: Duration, reason: impl Into<String>) -> push_response::Message {
    let retry_after = Some(time::duration(retry_after));
    push_response::Message::Throttled(Throttled { batch_id, retry_after, reason: reason.into() })
}

/// Returns the number of frames of the deepest stack, with inlined ones.
fn max_depth(profile: &pprof::Profile) -> usize {
    let lines: HashMap<u64, usize> = profile.location.iter().map(|l| (l.id, l.line.len().max(1))).collect();
    let depth = |stack: &[u64]| stack.iter().map(|id| lines.get(id).copied().unwrap_or(1)).sum();
    profile.sample.iter().map(|s| depth(&s.location_id)).max().unwrap_or(0)
}

/// Returns the memory that a batch takes until it is durable, in bytes: its profile once, and its metadata also in the
/// segment's entry and in the index row.
fn waiting_bytes(batch: &Batch) -> u64 {
    let pprof = batch.pprof.len();
    let metadata = batch.encoded_len().saturating_sub(pprof);
    (pprof + 4 * metadata) as u64 + WAITING_BATCH_BYTES
}

/// Checks a batch without a profile, which must carry a ledger and no samples.
fn check_ledger_only(batch: &Batch) -> Result<Vec<TypeTotal>, Refusal> {
    if batch.samples != 0 {
        return Err(Refusal::new(
            "count_mismatch",
            format!("samples is {}, and there is no profile", batch.samples),
        ));
    }
    if batch.ledger.is_none() {
        return Err(Refusal::new("not_pprof", "the batch has neither a profile nor a ledger"));
    }
    Ok(Vec::new())
}
