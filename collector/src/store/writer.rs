//! The one task that changes the store: it writes the waiting batches as segments and runs retention.

use std::{collections::HashMap, io, sync::Arc, time::Duration};

use bytes::Bytes;
use gannet_proto::{ingest::Batch, labels::Labels, ledger::Ledger};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use ulid::Ulid;

use super::{
    Store, StoreError, blocking,
    carry_out::{Deleter, DeletionQueue, DeletionRequest},
    change::{AddedProfile, IndexChange},
    describe::describe,
    follow::{Follower, Listed},
    meta::{ObjectMeta, TypeTotal},
    object::{ObjectKey, fits},
    row::{ProfileRow, StoredProfile},
    segment::{self, PackedBatch},
};

/// Batches that wait for the writer.
const QUEUED_BATCHES: usize = 16 * 1024;
/// Batches of one segment, at most.
const MAX_GROUP: usize = QUEUED_BATCHES;
/// Part of the time between two flushes for which the first batch after a pause waits for others.
const GATHER_PART: u32 = 10;

/// A checked batch in the form of its segment entry and its index row.
pub(crate) struct NewBatch {
    key: ObjectKey,
    packed: PackedBatch,
    row: ProfileRow,
    labels: Labels,
    ledger: Option<Ledger>,
}

/// Why a checked batch cannot be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PackError {
    /// Labels and reason together exceed 64 KiB.
    MetadataTooLarge,
    /// The window has no valid start.
    InvalidStart,
}

impl NewBatch {
    /// Packs a batch. `batch` comes without its profile, `pprof` is the profile, `types` are its sample types with their
    /// totals.
    pub(crate) fn pack(
        batch: Batch,
        pprof: Bytes,
        types: Vec<TypeTotal>,
        ledger: Option<Ledger>,
    ) -> Result<Self, PackError> {
        let meta = ObjectMeta { batch: Some(batch), types };
        if !fits(&meta) {
            return Err(PackError::MetadataTooLarge);
        }
        let described = describe(&meta, pprof.len() as u64, 0);
        let (labels, key, row) = described.ok_or(PackError::InvalidStart)?;
        Ok(Self { key, packed: PackedBatch::new(meta, pprof), row, labels, ledger })
    }

    /// Returns the number of samples as counted in the profile; 0 if the batch carried only a ledger.
    fn counted(&self) -> u64 {
        self.row.types.first().and_then(|first| u64::try_from(first.total).ok()).unwrap_or(0)
    }
}

/// The writer's answer to a batch.
#[derive(Debug, Clone)]
pub(crate) enum BatchOutcome {
    /// The batch survives a power cut.
    Stored {
        /// The samples in the stored profile.
        samples: u64,
    },
    /// The batch was stored before.
    Duplicate,
    /// The batch is not stored for now.
    Throttled {
        /// Label of the metric.
        cause: &'static str,
        retry_after: Duration,
        /// Human-readable reason for the agent's log.
        reason: String,
    },
}

/// A batch that waits for the writer.
struct QueuedBatch {
    batch: NewBatch,
    /// Share of the memory for waiting batches. Dropping it gives the share back.
    _memory: OwnedSemaphorePermit,
    reply: oneshot::Sender<BatchOutcome>,
}

/// The queue in front of the writer.
#[derive(Clone)]
pub(crate) struct BatchQueue(mpsc::Sender<QueuedBatch>);

impl BatchQueue {
    /// Queues a batch and returns the receiver of its outcome, or `None` if the queue is full. The store drops `memory`
    /// when it is done with the batch.
    pub(crate) fn submit(
        &self,
        batch: NewBatch,
        memory: OwnedSemaphorePermit,
    ) -> Option<oneshot::Receiver<BatchOutcome>> {
        let (reply, outcome) = oneshot::channel();
        self.0.try_send(QueuedBatch { batch, _memory: memory, reply }).ok()?;
        Some(outcome)
    }
}

/// The task that changes the store. There is one for each store.
pub(crate) struct StoreWriter {
    store: Arc<Store>,
    sender: mpsc::Sender<QueuedBatch>,
    queue: mpsc::Receiver<QueuedBatch>,
    deletions: DeletionQueue,
    requests: mpsc::Receiver<DeletionRequest>,
}

impl StoreWriter {
    pub(super) fn new(store: Arc<Store>) -> Self {
        let (sender, queue) = mpsc::channel(QUEUED_BATCHES);
        let (deletions, requests) = DeletionQueue::new();
        Self { store, sender, queue, deletions, requests }
    }

    /// Returns the queue of deletions.
    pub(crate) fn deletions(&self) -> DeletionQueue {
        self.deletions.clone()
    }

    /// Returns the queue of this writer.
    pub(crate) fn queue(&self) -> BatchQueue {
        BatchQueue(self.sender.clone())
    }

    /// Stores batches, runs retention and follows a shared bucket until `stop`. Then it stores the queued batches and
    /// returns.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let Self { store, sender, mut queue, deletions, mut requests } = self;
        drop((sender, deletions));
        let mut deleter = Deleter::new(Arc::clone(&store));
        let mut is_queue_first = false;
        let mut stopping = false;
        let mut next_retention = Instant::now();
        let mut follower = store.objects.is_shared().then(|| Follower::new(Arc::clone(&store)));
        let interval = store.options.flush_interval.0;
        let mut last_flush = Instant::now();
        loop {
            let (mut waiting, mut listed, mut step) = (Vec::new(), None, None);
            // Waiting batches are stored between two steps of a deletion.
            if std::mem::take(&mut is_queue_first) {
                waiting.extend(queue.try_recv());
            }
            tokio::select! {
                biased;
                () = std::future::ready(()), if !waiting.is_empty() => {}
                // First, because the queue may never be empty.
                found = listed_by(&mut follower) => listed = Some(found),
                Some(request) = requests.recv() => deleter.begin(request).await,
                next = deleter.next(), if !stopping => step = Some(next),
                received = queue.recv() => match received {
                    Some(batch) => waiting.push(batch),
                    None => break,
                },
                () = tokio::time::sleep_until(next_retention) => {}
                () = stop.cancelled(), if !stopping => {
                    queue.close();
                    stopping = true;
                }
            }
            if !waiting.is_empty() {
                let flush_at = (last_flush + interval).max(Instant::now() + interval / GATHER_PART);
                gather(&mut waiting, &mut queue, flush_at, store.options.flush_bytes, &stop).await;
                last_flush = Instant::now();
                store.store_group(waiting).await;
            }
            if let (Some(listed), Some(follower)) = (listed, &mut follower) {
                follower.apply(listed).await;
            }
            if let Some(step) = step {
                deleter.apply(step).await;
                is_queue_first = true;
            }
            if Instant::now() >= next_retention || store.is_over_budget() {
                let wait = store.retain().await;
                next_retention = Instant::now() + wait;
            }
        }
        deleter.end().await;
        if let Some(follower) = follower {
            follower.end().await;
        }
    }
}

/// Waits for the next listing of a shared bucket, for ever without one. Dropping the future loses nothing.
async fn listed_by(follower: &mut Option<Follower>) -> Result<Listed, StoreError> {
    match follower {
        Some(follower) => follower.listed().await,
        None => std::future::pending().await,
    }
}

/// Receives batches until `flush_at`, until `bytes` wait, or until `stop`.
async fn gather(
    waiting: &mut Vec<QueuedBatch>,
    queue: &mut mpsc::Receiver<QueuedBatch>,
    flush_at: Instant,
    bytes: u64,
    stop: &CancellationToken,
) {
    let mut gathered: u64 = waiting.iter().map(|queued| queued.batch.packed.bytes()).sum();
    let deadline = tokio::time::sleep_until(flush_at);
    tokio::pin!(deadline);
    while gathered < bytes && waiting.len() < MAX_GROUP {
        let received = tokio::select! {
            biased;
            received = queue.recv() => received,
            () = &mut deadline => return,
            () = stop.cancelled() => queue.try_recv().ok(),
        };
        let Some(queued) = received else { return };
        gathered += queued.batch.packed.bytes();
        waiting.push(queued);
    }
}

impl Store {
    /// Stores a group of batches durably and answers each of them.
    async fn store_group(self: &Arc<Self>, group: Vec<QueuedBatch>) {
        let began = std::time::Instant::now();
        self.metrics.commit_batches.observe(group.len() as f64);
        if let Err(error) = self.settle_uncertain().await {
            self.metrics.store_errors.inc();
            let reason = format!("the collector could not write or read its store: {error}");
            return self.throttle(group, "store", &reason);
        }
        let ids: Vec<Ulid> = group.iter().map(|queued| queued.batch.key.id).collect();
        let store = Arc::clone(self);
        let known = match blocking(move || store.index.knows(&ids)).await {
            Ok(known) => known,
            Err(error) => return self.throttle(group, "store", &error.to_string()),
        };
        // The second batch of an id in one group gets the answer of the first.
        let mut fresh: Vec<QueuedBatch> = Vec::new();
        let mut positions: HashMap<Ulid, usize> = HashMap::new();
        let mut repeated: Vec<(usize, QueuedBatch)> = Vec::new();
        for (queued, known) in group.into_iter().zip(known) {
            let id = queued.batch.key.id;
            if known {
                self.answer(queued, BatchOutcome::Duplicate);
            } else if let Some(&first) = positions.get(&id) {
                repeated.push((first, queued));
            } else {
                positions.insert(id, fresh.len());
                fresh.push(queued);
            }
        }
        let outcomes = self.store_fresh(&fresh).await;
        for (first, queued) in repeated {
            let outcome = match &outcomes[first] {
                BatchOutcome::Stored { .. } => BatchOutcome::Duplicate,
                other => other.clone(),
            };
            self.answer(queued, outcome);
        }
        for (queued, outcome) in fresh.into_iter().zip(outcomes) {
            self.answer(queued, outcome);
        }
        self.metrics.commit_seconds.observe(began.elapsed().as_secs_f64());
        self.update_size_metrics();
    }

    fn answer(&self, queued: QueuedBatch, outcome: BatchOutcome) {
        match &outcome {
            BatchOutcome::Stored { .. } => self.metrics.batches_accepted.inc(),
            BatchOutcome::Duplicate => self.metrics.batches_duplicate.inc(),
            BatchOutcome::Throttled { cause, .. } => {
                self.metrics.throttled(cause);
                0
            }
        };
        // The stream may have ended. Then the agent sends the batch again and learns that it is a duplicate.
        let _ = queued.reply.send(outcome);
    }

    fn throttle(&self, group: Vec<QueuedBatch>, cause: &'static str, reason: &str) {
        for queued in group {
            self.answer(queued, throttled(cause, reason));
        }
    }

    /// Stores batches that are not in the store. Returns their outcomes in the same order.
    async fn store_fresh(self: &Arc<Self>, queued: &[QueuedBatch]) -> Vec<BatchOutcome> {
        if queued.is_empty() {
            return Vec::new();
        }
        let batches: Vec<&NewBatch> = queued.iter().map(|queued| &queued.batch).collect();
        if let Some(full) = self.check_disk(&batches) {
            return vec![full; batches.len()];
        }
        if self.index.is_in_memory() {
            let store = Arc::clone(self);
            if let Err(error) = blocking(move || store.move_index_to_disk()).await {
                let reason = format!(
                    "the collector's disk was full at its start, and the index still has no room: {error}"
                );
                return vec![throttled("disk_full", &reason); batches.len()];
            }
        }
        let mut outcomes: Vec<BatchOutcome> = batches
            .iter()
            // Counted in the profile, not in what the agent says of it.
            .map(|batch| BatchOutcome::Stored { samples: batch.counted() })
            .collect();
        let (mut change, mut planned) = self.plan(&batches, &mut outcomes);
        if planned.is_empty() {
            return outcomes;
        }
        // A query reads neighbours together.
        planned.sort_unstable_by(|(a, _), (b, _)| {
            (&batches[*a].labels, batches[*a].key).cmp(&(&batches[*b].labels, batches[*b].key))
        });
        let id = self.deletions.new_segment_id();
        let contents: Vec<&PackedBatch> = planned.iter().map(|(at, _)| &batches[*at].packed).collect();
        let (parts, positions) = segment::build(id, &contents);
        let bytes: u64 = parts.iter().map(|part| part.len() as u64).sum();
        change.add_segments.push((id, self.objects.allocated(bytes)));
        for ((at, series), position) in planned.iter().zip(positions) {
            let NewBatch { key, row, .. } = batches[*at];
            change.add.push(self.added(*series, *key, row.clone().at(position)));
        }
        // Whatever happens from here on, the segment may be there.
        *self.uncertain.lock() = Some(id);
        let replace = |mut outcomes: Vec<BatchOutcome>, failed: &BatchOutcome| {
            for (at, _) in &planned {
                outcomes[*at] = failed.clone();
            }
            outcomes
        };
        if let Err(error) = self.objects.put_segment(id, parts).await {
            return replace(outcomes, &self.write_failed(&error));
        }
        self.metrics.segments_written.inc();
        self.metrics.segment_bytes.inc_by(bytes);
        let store = Arc::clone(self);
        let committed = blocking(move || store.index.commit(&change).map(|first| (first, change))).await;
        let (first_of_window, change) = match committed {
            Ok(done) => done,
            Err(error) => {
                self.metrics.store_errors.inc();
                tracing::warn!(%error, "cannot write the index; batches are throttled");
                return replace(outcomes, &throttled("store", &error.to_string()));
            }
        };
        *self.uncertain.lock() = None;
        self.state.write().apply_added(change);
        for ((at, _), first) in planned.iter().zip(first_of_window) {
            if let Some(ledger) = batches[*at].ledger.as_ref().filter(|_| first) {
                self.count_ledger(ledger);
            }
        }
        outcomes
    }

    /// Adds the rows of the segment whose write or commit failed, if it is there. So a batch that an agent sends again is
    /// not stored twice, and at most one segment has no rows.
    async fn settle_uncertain(self: &Arc<Self>) -> Result<(), StoreError> {
        let Some(id) = *self.uncertain.lock() else { return Ok(()) };
        let store = Arc::clone(self);
        blocking(move || store.adopt_segment(id)).await?;
        *self.uncertain.lock() = None;
        Ok(())
    }

    /// Returns the outcome of all batches if the disk has too little free space for them.
    fn check_disk(&self, batches: &[&NewBatch]) -> Option<BatchOutcome> {
        // Segments of a bucket take no space on this disk; only their rows do.
        let needed: u64 =
            if self.objects.is_shared() { 0 } else { batches.iter().map(|b| b.packed.bytes()).sum() };
        let min_free = self.options.min_free_bytes.0;
        match self.free_bytes() {
            Ok(free) if free < min_free.saturating_add(needed) => {
                let reason = format!(
                    "the collector's disk has {} MiB left, of which it keeps {} MiB: free some, or lower --retention-bytes",
                    free >> 20,
                    min_free >> 20
                );
                Some(throttled("disk_full", &reason))
            }
            Ok(_) => None,
            Err(error) => {
                tracing::debug!(%error, "cannot read the free space of the disk");
                None
            }
        }
    }

    /// Returns the batches to store with the numbers of their series, and an index change with the new series. Batches of a
    /// series above the limit become throttled.
    fn plan(&self, batches: &[&NewBatch], outcomes: &mut [BatchOutcome]) -> (IndexChange, Vec<(usize, u64)>) {
        let mut planned = Vec::with_capacity(batches.len());
        let mut new_series: HashMap<&Labels, u64> = HashMap::new();
        let max_series = self.options.max_series;
        let state = self.state.read();
        for (at, (batch, outcome)) in batches.iter().zip(outcomes).enumerate() {
            match state.series_of(&batch.labels, &mut new_series, max_series) {
                Some(series) => planned.push((at, series)),
                None => {
                    *outcome = throttled(
                        "series",
                        &format!(
                            "the collector holds {max_series} series, its limit: raise --max-series, or see which label \
                             changes with every profile"
                        ),
                    );
                }
            }
        }
        let add_series = new_series.into_iter().map(|(labels, id)| (id, labels.clone())).collect();
        (IndexChange { add_series, ..IndexChange::default() }, planned)
    }

    /// Returns a new entry with the space that it takes. The space of a bucket holds only the object.
    pub(super) fn added(&self, series: u64, key: ObjectKey, row: ProfileRow) -> AddedProfile {
        let index_bytes = if self.objects.is_shared() { 0 } else { row.index_bytes() };
        let disk_bytes = self.objects.allocated(row.object_bytes) + index_bytes;
        AddedProfile { profile: StoredProfile { series, key, row }, disk_bytes }
    }

    /// Returns the free space on the disk of the index.
    pub(super) fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.data)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn count_ledger(&self, ledger: &Ledger) {
        if let Err(error) = ledger.check() {
            self.metrics.ledgers_unbalanced.inc();
            tracing::warn!(%error, "a window's ledger does not balance");
        }
        self.metrics.samples_taken.inc_by(ledger.taken);
        self.metrics.samples_delivered.inc_by(ledger.delivered);
        self.metrics.samples_unaccounted.inc_by(ledger.unaccounted());
        for (reason, samples) in &ledger.lost {
            self.metrics.lost(reason.as_str(), *samples);
        }
    }

    fn write_failed(&self, error: &object_store::Error) -> BatchOutcome {
        self.metrics.store_errors.inc();
        let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(e) = source {
            if let Some(e) = e.downcast_ref::<io::Error>()
                && matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            {
                tracing::warn!("the disk is full; batches are throttled");
                return throttled(
                    "disk_full",
                    "the collector's disk is full: free some space, or lower --retention-bytes",
                );
            }
            source = e.source();
        }
        tracing::warn!(%error, "cannot write a segment; its batches are throttled");
        throttled("store", &format!("the collector could not write: {error}"))
    }
}

fn throttled(cause: &'static str, reason: &str) -> BatchOutcome {
    let seconds = if cause == "series" { 60 } else { 5 };
    BatchOutcome::Throttled { cause, retry_after: Duration::from_secs(seconds), reason: reason.to_owned() }
}
