//! The one task that changes the store: it makes groups of batches durable and runs retention.

use std::{collections::HashMap, io, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use gannet_proto::{ingest::Batch, labels::Labels, ledger::Ledger};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use ulid::Ulid;

use super::{
    Store, StoreError, blocking,
    index::{AddedProfile, IndexChange, ProfileRow, StoredProfile},
    object::{ObjectKey, ObjectMeta, TypeTotal, pack, packed_header_len},
};
use crate::time;

/// Batches of one commit.
const MAX_GROUP: usize = 256;
/// Concurrent writes of objects. A file system's journal syncs several of them at once.
pub(super) const CONCURRENT_WRITES: usize = 16;
/// Batches that wait for the writer.
const QUEUED_BATCHES: usize = 1024;

/// A checked batch in the form of its object and its index row.
pub(crate) struct NewBatch {
    key: ObjectKey,
    object: Bytes,
    row: ProfileRow,
    labels: Labels,
    ledger: Option<Ledger>,
}

/// Why a checked batch cannot become an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PackError {
    /// The metadata does not fit into the header of an object.
    MetadataTooLarge,
    /// The window has no valid start.
    InvalidStart,
}

impl NewBatch {
    /// Packs a batch. `batch` comes without its profile, `pprof` is the profile, `types` are its sample types with their
    /// totals.
    pub(crate) fn pack(
        batch: Batch,
        pprof: &[u8],
        types: Vec<TypeTotal>,
        ledger: Option<Ledger>,
    ) -> Result<Self, PackError> {
        let meta = ObjectMeta { batch: Some(batch), types };
        let object = pack(&meta, pprof).ok_or(PackError::MetadataTooLarge)?;
        let described = describe(&meta, object.len() as u64);
        let (labels, key, row) = described.ok_or(PackError::InvalidStart)?;
        Ok(Self { key, object, row, labels, ledger })
    }

    /// Returns the number of samples as counted in the profile; 0 if the batch carried only a ledger.
    fn counted(&self) -> u64 {
        self.row.types.first().and_then(|first| u64::try_from(first.total).ok()).unwrap_or(0)
    }
}

/// Returns the index entry of an object with this metadata. Storing and rebuilding both use it, so they agree.
pub(super) fn describe(meta: &ObjectMeta, object_bytes: u64) -> Option<(Labels, ObjectKey, ProfileRow)> {
    let batch = meta.batch.as_ref()?;
    let key = ObjectKey {
        start_ms: batch.start.as_ref().and_then(time::to_ms)?,
        id: Ulid::from_string(&batch.batch_id).ok()?,
    };
    let header = packed_header_len(meta);
    let row = ProfileRow {
        duration_ms: batch.duration.as_ref().and_then(time::duration_to_ms).unwrap_or(0),
        samples: batch.samples,
        bytes: object_bytes.saturating_sub(header),
        types: meta.types.clone(),
        rule_id: batch.rule_id.clone(),
        revision: batch.revision,
        reason: batch.reason.clone(),
        window: Ulid::from_string(&batch.window_id).map(|w| w.0.to_be_bytes().to_vec()).unwrap_or_default(),
        object_bytes,
    };
    Some((batch.labels.clone(), key, row))
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
}

impl StoreWriter {
    pub(super) fn new(store: Arc<Store>) -> Self {
        let (sender, queue) = mpsc::channel(QUEUED_BATCHES);
        Self { store, sender, queue }
    }

    /// Returns the queue of this writer.
    pub(crate) fn queue(&self) -> BatchQueue {
        BatchQueue(self.sender.clone())
    }

    /// Stores batches, runs retention and follows a shared bucket until `stop`. Then it stores the queued batches and
    /// returns.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let Self { store, sender, mut queue } = self;
        drop(sender);
        let mut stopping = false;
        let mut next_retention = Instant::now();
        let mut next_bucket_check = Instant::now() + store.options.bucket_interval;
        let mut turn = 0;
        loop {
            let mut group = Vec::new();
            tokio::select! {
                biased;
                n = queue.recv_many(&mut group, MAX_GROUP) => if n == 0 { break },
                () = tokio::time::sleep_until(next_retention) => {}
                () = tokio::time::sleep_until(next_bucket_check), if store.objects.is_shared() => {}
                () = stop.cancelled(), if !stopping => {
                    queue.close();
                    stopping = true;
                }
            }
            if !group.is_empty() {
                store.store_group(group).await;
            }
            if store.objects.is_shared() && Instant::now() >= next_bucket_check {
                let followed = Arc::clone(&store);
                let result = tokio::task::spawn_blocking(move || followed.follow_bucket(turn)).await;
                if let Err(error) = result.map_err(|_| StoreError::Ended).flatten() {
                    store.metrics.store_errors.inc();
                    tracing::warn!(%error, "cannot list the bucket; trying again");
                }
                turn = turn.wrapping_add(1);
                next_bucket_check = Instant::now() + store.options.bucket_interval;
            }
            if Instant::now() >= next_retention || store.is_over_budget() {
                let wait = store.retain().await;
                next_retention = Instant::now() + wait;
            }
        }
    }
}

impl Store {
    /// Stores a group of batches durably and answers each of them.
    async fn store_group(self: &Arc<Self>, group: Vec<QueuedBatch>) {
        let began = std::time::Instant::now();
        self.metrics.commit_batches.observe(group.len() as f64);
        let ids: Vec<Ulid> = group.iter().map(|queued| queued.batch.key.id).collect();
        let store = Arc::clone(self);
        let known = match blocking(move || store.index.contains(ids)).await {
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
            let moved = tokio::task::spawn_blocking(move || store.move_index_to_disk()).await;
            if let Err(error) = moved.map_err(|_| StoreError::Ended).flatten() {
                let reason = format!(
                    "the collector's disk was full at its start, and the index still has no room: {error}"
                );
                return vec![throttled("disk_full", &reason); batches.len()];
            }
        }
        let puts: Vec<_> = batches.iter().map(|b| self.objects.put(b.key, b.object.clone())).collect();
        let written = stream::iter(puts).buffered(CONCURRENT_WRITES).collect::<Vec<_>>().await;
        let mut outcomes: Vec<BatchOutcome> = written
            .into_iter()
            .zip(&batches)
            .map(|(result, batch)| match result {
                // Counted in the profile, not in what the agent says of it.
                Ok(()) => BatchOutcome::Stored { samples: batch.counted() },
                Err(error) => self.write_failed(&error),
            })
            .collect();
        let change = self.plan(&batches, &mut outcomes);
        if change.add.is_empty() {
            return outcomes;
        }
        let store = Arc::clone(self);
        let committed = blocking(move || Ok((store.index.commit(&change)?, change))).await;
        let (first_of_window, change) = match committed {
            Ok(done) => done,
            Err(error) => {
                // The objects stay. The agents send the same batches again, or the next start finds the objects.
                self.metrics.store_errors.inc();
                tracing::warn!(%error, "cannot write the index; batches are throttled");
                let reason = throttled("store", &error.to_string());
                for outcome in outcomes.iter_mut().filter(|o| matches!(o, BatchOutcome::Stored { .. })) {
                    *outcome = reason.clone();
                }
                return outcomes;
            }
        };
        self.state.write().apply_added(change);
        let stored = batches.iter().zip(&outcomes).filter(|(_, o)| matches!(o, BatchOutcome::Stored { .. }));
        for ((batch, _), first) in stored.zip(first_of_window) {
            if let Some(ledger) = batch.ledger.as_ref().filter(|_| first) {
                self.count_ledger(ledger);
            }
        }
        outcomes
    }

    /// Returns the outcome of all batches if the disk has too little free space for them.
    fn check_disk(&self, batches: &[&NewBatch]) -> Option<BatchOutcome> {
        // Objects of a bucket take no space on this disk; only their rows do.
        let needed: u64 =
            if self.objects.is_shared() { 0 } else { batches.iter().map(|b| b.object.len() as u64).sum() };
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

    /// Returns the index change for all stored batches. Batches of a series above the limit become throttled.
    fn plan(&self, batches: &[&NewBatch], outcomes: &mut [BatchOutcome]) -> IndexChange {
        let mut change = IndexChange::default();
        let mut new_series: HashMap<&Labels, u64> = HashMap::new();
        let max_series = self.options.max_series;
        let state = self.state.read();
        for (batch, outcome) in batches.iter().zip(outcomes) {
            if !matches!(outcome, BatchOutcome::Stored { .. }) {
                continue;
            }
            let Some(series) = state.series_of(&batch.labels, &mut new_series, max_series) else {
                *outcome = throttled(
                    "series",
                    &format!(
                        "the collector holds {max_series} series, its limit: raise --max-series, or see which label changes \
                         with every profile"
                    ),
                );
                continue;
            };
            change.add.push(self.added(series, batch.key, batch.row.clone()));
        }
        change.add_series = new_series.into_iter().map(|(labels, id)| (id, labels.clone())).collect();
        change
    }

    /// Returns a new entry with the space that it takes. The space of a bucket holds only the object.
    pub(super) fn added(&self, series: u64, key: ObjectKey, row: ProfileRow) -> AddedProfile {
        let index_bytes = if self.objects.is_shared() { 0 } else { row.index_bytes() };
        let disk_bytes = self.objects.allocated(row.object_bytes) + index_bytes;
        AddedProfile { profile: StoredProfile { series, key, row }, disk_bytes }
    }

    /// Returns the free space on the disk of the index.
    fn free_bytes(&self) -> io::Result<u64> {
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
        tracing::warn!(%error, "cannot write an object; its batch is throttled");
        throttled("store", &format!("the collector could not write: {error}"))
    }
}

fn throttled(cause: &'static str, reason: &str) -> BatchOutcome {
    let seconds = if cause == "series" { 60 } else { 5 };
    BatchOutcome::Throttled { cause, retry_after: Duration::from_secs(seconds), reason: reason.to_owned() }
}
