//! The store: immutable objects, an index beside them, and the one task that changes either.
//!
//! Order of things, so that no crash can break it:
//! - taking: the object is written and synced, then the index committed, then the batch acknowledged;
//! - removing: the object is deleted, then its row.
//!
//! A crash in between leaves an object without a row or a row without an object; both are found and settled at the
//! next start. Until then a query that meets a row without an object passes over it.

mod index;
mod object;

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use gannet_proto::{labels::Labels, ledger::Ledger};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use ulid::Ulid;

pub use self::{index::IndexError, object::Bucket};
use self::{
    index::{Change, Index},
    object::{HOUR_MS, Objects},
};
pub(crate) use self::{
    index::{Entry, Row},
    object::{ObjectKey, ObjectMeta, TypeTotal, pack},
};
use crate::{Config, metrics::Metrics, query::Selector, time};

/// Batches that are made durable together.
const MAX_GROUP: usize = 256;
/// Objects written at one time: enough for a journal to sync many at once.
const WRITES_AT_ONCE: usize = 16;
/// Profiles that retention removes before it looks for new batches again.
const RETENTION_CHUNK: usize = 256;
/// Rows that are repaired in one commit.
const REPAIR_CHUNK: usize = 4096;
/// Hours before the last that are compared with a shared bucket each time, in turn.
const OLD_HOURS: usize = 4;
/// Batches that wait for the writer; more are put off.
const QUEUE: usize = 1024;

/// What is wrong with the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another collector runs here.
    #[error("another collector uses {0}: stop it, or give this one its own --data")]
    Locked(PathBuf),
    /// The disk failed.
    #[error("cannot {doing} {path}: {source}")]
    Io {
        /// A verb.
        doing: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The object store failed.
    #[error("an object could not be read or written: {0}")]
    Object(#[source] object_store::Error),
    /// It failed before anything else was done with it.
    #[error(
        "--data {bucket} cannot be read: {reason}; credentials, region and endpoint are taken from the environment (AWS_…, \
         GOOGLE_…, AZURE_…)"
    )]
    Bucket {
        /// Which, as `--data` named it.
        bucket: String,
        /// Why not: what the object store says, and its first cause.
        reason: String,
    },
    /// The index failed.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// A file that should be an object is not.
    #[error("the object of profile {0} is damaged; its profile is lost")]
    Damaged(Ulid),
    /// A blocking task was cut off.
    #[error("the store is shutting down")]
    Ended,
}

impl StoreError {
    pub(crate) fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { doing, path: path.to_owned(), source }
    }
}

/// A checked batch on its way into the store.
pub(crate) struct NewBatch {
    pub(crate) key: ObjectKey,
    pub(crate) object: Bytes,
    pub(crate) row: Row,
    pub(crate) labels: Labels,
    pub(crate) ledger: Option<Ledger>,
    /// Its share of the memory for waiting batches, given back with it.
    pub(crate) _memory: OwnedSemaphorePermit,
    pub(crate) reply: oneshot::Sender<Outcome>,
}

/// What became of a batch.
#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    /// It survives a power cut.
    Stored,
    /// It was there already.
    Duplicate,
    /// It was not taken, for now.
    Throttled { cause: &'static str, retry_after: Duration, reason: String },
}

/// A series and what is known of it.
#[derive(Clone)]
pub(crate) struct Series {
    pub(crate) id: u64,
    pub(crate) labels: Arc<Labels>,
    profiles: u64,
    /// Not later than the first and not earlier than the last profile.
    first_ms: u64,
    last_ms: u64,
}

/// Everything about the store that fits in memory.
#[derive(Default)]
struct State {
    series: HashMap<u64, Series>,
    by_labels: HashMap<Arc<Labels>, u64>,
    next_series: u64,
    profiles: u64,
    bytes: u64,
}

impl State {
    fn load(index: &Index) -> Result<Self, IndexError> {
        let mut state = Self::default();
        for (id, labels) in index.series()? {
            state.add_series(id, labels);
        }
        index.between(0, u64::MAX, |series, key, bytes| state.add(series, key.start_ms, bytes))?;
        Ok(state)
    }

    /// The number of the series of these labels: a new one is noted, unless there are `most` already.
    fn series_of<'a>(
        &self,
        labels: &'a Labels,
        new: &mut HashMap<&'a Labels, u64>,
        most: usize,
    ) -> Option<u64> {
        if let Some(known) = self.by_labels.get(labels).or_else(|| new.get(labels)) {
            return Some(*known);
        }
        if self.series.len() + new.len() >= most {
            return None;
        }
        let id = self.next_series + new.len() as u64;
        new.insert(labels, id);
        Some(id)
    }

    /// What was written to the index is in force.
    fn apply(&mut self, change: Change) {
        for (id, labels) in change.add_series {
            self.add_series(id, labels);
        }
        for entry in &change.add {
            self.add(entry.series, entry.key.start_ms, entry.row.object_bytes);
        }
    }

    fn add_series(&mut self, id: u64, labels: Labels) {
        let labels = Arc::new(labels);
        self.by_labels.insert(Arc::clone(&labels), id);
        self.series.insert(id, Series { id, labels, profiles: 0, first_ms: u64::MAX, last_ms: 0 });
        self.next_series = self.next_series.max(id + 1);
    }

    fn add(&mut self, series: u64, start_ms: u64, bytes: u64) {
        self.profiles += 1;
        self.bytes += bytes;
        if let Some(series) = self.series.get_mut(&series) {
            series.profiles += 1;
            series.first_ms = series.first_ms.min(start_ms);
            series.last_ms = series.last_ms.max(start_ms);
        }
    }

    /// The series that have no profile left after these removals.
    fn emptied(&self, removed: &[(u64, ObjectKey, u64)]) -> Vec<u64> {
        let mut counts: HashMap<u64, u64> = HashMap::new();
        for (series, ..) in removed {
            *counts.entry(*series).or_default() += 1;
        }
        counts.retain(|id, n| self.series.get(id).is_some_and(|s| s.profiles <= *n));
        counts.into_keys().collect()
    }

    fn remove(&mut self, removed: &[(u64, ObjectKey, u64)], emptied: &[u64]) {
        for (series, _, bytes) in removed {
            self.profiles = self.profiles.saturating_sub(1);
            self.bytes = self.bytes.saturating_sub(*bytes);
            if let Some(series) = self.series.get_mut(series) {
                series.profiles = series.profiles.saturating_sub(1);
            }
        }
        for id in emptied {
            if let Some(series) = self.series.remove(id) {
                self.by_labels.remove(&series.labels);
            }
        }
    }
}

pub(crate) struct Store {
    objects: Objects,
    index: Index,
    state: RwLock<State>,
    metrics: Metrics,
    /// Where all is but the objects.
    data: PathBuf,
    runtime: Handle,
    bucket_interval: Duration,
    retention_age: Duration,
    retention_bytes: u64,
    retention_interval: Duration,
    min_free_bytes: u64,
    max_series: usize,
    /// Locked while this runs.
    _lock: File,
}

impl Store {
    /// Blocking, on a runtime. Opens the store below a directory, settles what a crash left, and hands out its one writer.
    pub(crate) fn open(config: &Config, metrics: Metrics) -> Result<(Arc<Self>, Writer), StoreError> {
        let data = &config.data;
        fs::create_dir_all(data).map_err(|e| StoreError::io("create the directory --data", data, e))?;
        let lock = lock(data)?;
        let objects = match &config.bucket {
            Some(bucket) => Objects::in_bucket(bucket)?,
            None => Objects::open(&data.join("objects"))?,
        };
        let (index, is_new) = Index::open(&data.join("index.redb"))?;
        let state = RwLock::new(State::load(&index)?);
        let store = Arc::new(Self {
            objects,
            index,
            state,
            data: data.clone(),
            runtime: Handle::current(),
            bucket_interval: config.bucket_interval,
            metrics,
            retention_age: config.retention_age,
            retention_bytes: config.retention_bytes,
            retention_interval: config.retention_interval,
            min_free_bytes: config.min_free_bytes,
            max_series: config.max_series,
            _lock: lock,
        });
        store.settle(is_new).map_err(|error| match (&config.bucket, error) {
            (Some(bucket), StoreError::Object(error)) => {
                StoreError::Bucket { bucket: bucket.to_string(), reason: with_cause(&error) }
            }
            (_, error) => error,
        })?;
        store.show_size();
        let (sender, queue) = mpsc::channel(QUEUE);
        Ok((Arc::clone(&store), Writer { store, sender, queue }))
    }

    /// Blocking.
    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    /// The series that match and may have profiles in the range.
    pub(crate) fn series(&self, selector: &Selector, from_ms: u64, until_ms: u64) -> Vec<Series> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let mut found: Vec<_> = state
            .series
            .values()
            .filter(|s| s.first_ms < until_ms && s.last_ms >= from_ms && selector.matches(&s.labels))
            .cloned()
            .collect();
        found.sort_unstable_by(|a, b| a.labels.cmp(&b.labels));
        found
    }

    pub(crate) fn labels_of(&self, series: u64) -> Option<Arc<Labels>> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.series.get(&series).map(|s| Arc::clone(&s.labels))
    }

    /// The profile as the agent sent it. `None`: retention was faster.
    pub(crate) async fn profile(&self, key: ObjectKey) -> Result<Option<Bytes>, StoreError> {
        let Some(object) = self.objects.get(key).await? else {
            self.metrics.objects_gone.inc();
            return Ok(None);
        };
        match object::unpack(&object) {
            Some((_, at)) if at <= object.len() => Ok(Some(object.slice(at..))),
            _ => {
                self.metrics.objects_corrupt.inc();
                Err(StoreError::Damaged(key.id))
            }
        }
    }

    fn show_size(&self) {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        self.metrics.store_bytes.set(state.bytes as i64);
        self.metrics.store_profiles.set(state.profiles as i64);
        self.metrics.store_series.set(state.series.len() as i64);
    }
}

/// Runs what reads or writes the index off the asynchronous threads.
async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, IndexError> + Send + 'static,
) -> Result<T, StoreError> {
    Ok(tokio::task::spawn_blocking(f).await.map_err(|_| StoreError::Ended)??)
}

fn lock(data: &Path) -> Result<File, StoreError> {
    let path = data.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| StoreError::io("open", &path, e))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StoreError::Locked(data.to_owned())),
        Err(e) => Err(StoreError::io("lock", &path, e.into())),
    }
}

/// What a comparison found.
#[derive(Default)]
struct Settled {
    added: u64,
    removed: u64,
    damaged: u64,
}

/// What the index says of one profile.
type Indexed = (u64, ObjectKey, u64);

/// Makes index and objects agree. Blocking; only for who writes the store.
impl Store {
    /// All of them: what the last end left, and what has become of a bucket since.
    fn settle(&self, is_new: bool) -> Result<(), StoreError> {
        let began = std::time::Instant::now();
        let mut settled = Settled::default();
        for hour in self.hours()? {
            self.settle_hour(hour, &mut settled)?;
        }
        let unused: Vec<u64> = {
            let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
            state.series.values().filter(|s| s.profiles == 0).map(|s| s.id).collect()
        };
        if !unused.is_empty() {
            self.index.commit(&Change { remove_series: unused.clone(), ..Change::default() })?;
            self.state.write().unwrap_or_else(PoisonError::into_inner).remove(&[], &unused);
        }
        let Settled { added, removed, damaged } = settled;
        if is_new && added > 0 {
            self.metrics.index_rebuilds.inc();
            tracing::warn!(profiles = added, damaged, took = ?began.elapsed(), "the index was built anew from the objects");
        } else if added + removed > 0 {
            tracing::info!(added, removed, "settled what the last end left between objects and index");
        }
        Ok(())
    }

    /// The hours that have objects or rows.
    fn hours(&self) -> Result<BTreeSet<u64>, StoreError> {
        let mut hours = self.runtime.block_on(self.objects.hours())?;
        hours.extend(self.index.hours()?);
        Ok(hours)
    }

    fn settle_hour(&self, hour: u64, settled: &mut Settled) -> Result<(), StoreError> {
        let mut rows: HashMap<Ulid, Indexed> = HashMap::new();
        self.index.between(hour * HOUR_MS, (hour + 1) * HOUR_MS, |series, key, bytes| {
            rows.insert(key.id, (series, key, bytes));
        })?;
        let mut missing = self.runtime.block_on(self.objects.of_hour(hour))?;
        missing.retain(|id| rows.remove(id).is_none());
        for ids in missing.chunks(REPAIR_CHUNK) {
            let heads = self.runtime.block_on(self.objects.heads(hour, ids))?;
            let mut found = Vec::with_capacity(heads.len());
            for (id, head) in ids.iter().zip(heads) {
                // One that lies in another's place is none.
                let entry = head.and_then(|head| describe(&head.meta, head.bytes));
                if let Some(entry) = entry.filter(|(_, key, _)| key.id == *id && key.hour() == hour) {
                    found.push(entry);
                } else {
                    settled.damaged += 1;
                    self.metrics.objects_corrupt.inc();
                    tracing::warn!(profile = %id, hour, "not a readable object: left out");
                }
            }
            self.take_in(&found, settled)?;
        }
        let gone: Vec<Indexed> = rows.into_values().collect();
        self.forget(&gone, settled)
    }

    /// Objects that are there without rows.
    fn take_in(&self, found: &[(Labels, ObjectKey, Row)], settled: &mut Settled) -> Result<(), StoreError> {
        if found.is_empty() {
            return Ok(());
        }
        let mut change = Change::default();
        {
            let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
            let mut new = HashMap::new();
            for (labels, key, row) in found {
                // They were within the limit where they came in.
                if let Some(series) = state.series_of(labels, &mut new, usize::MAX) {
                    change.add.push(Entry { series, key: *key, row: row.clone() });
                }
            }
            change.add_series = new.into_iter().map(|(labels, id)| (id, labels.clone())).collect();
        }
        self.index.commit(&change)?;
        settled.added += change.add.len() as u64;
        self.metrics.index_repairs.inc_by(change.add.len() as u64);
        self.state.write().unwrap_or_else(PoisonError::into_inner).apply(change);
        Ok(())
    }

    /// Rows that are there without objects.
    fn forget(&self, gone: &[Indexed], settled: &mut Settled) -> Result<(), StoreError> {
        if gone.is_empty() {
            return Ok(());
        }
        let emptied = self.state.read().unwrap_or_else(PoisonError::into_inner).emptied(gone);
        self.index.commit(&removal(gone, &emptied))?;
        self.state.write().unwrap_or_else(PoisonError::into_inner).remove(gone, &emptied);
        settled.removed += gone.len() as u64;
        self.metrics.index_repairs.inc_by(gone.len() as u64);
        Ok(())
    }

    /// What others have written to the same bucket, or removed from it: in the last hours, and in some of those before.
    fn follow(&self, turn: usize) -> Result<(), StoreError> {
        let mut settled = Settled::default();
        let hours: Vec<u64> = self.hours()?.into_iter().rev().collect();
        let (last, old) = hours.split_at(hours.len().min(2));
        let old = old.iter().cycle().skip(turn * OLD_HOURS % old.len().max(1)).take(OLD_HOURS.min(old.len()));
        for hour in last.iter().chain(old) {
            self.settle_hour(*hour, &mut settled)?;
        }
        let Settled { added, removed, .. } = settled;
        if added + removed > 0 {
            tracing::debug!(added, removed, "what others did in the bucket");
            self.show_size();
        }
        Ok(())
    }
}

fn with_cause(error: &object_store::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    format!("{error} ({cause})")
}

fn removal(rows: &[Indexed], emptied: &[u64]) -> Change {
    Change {
        remove: rows.iter().map(|(series, key, _)| (*series, *key)).collect(),
        remove_series: emptied.to_vec(),
        ..Change::default()
    }
}

/// What the index holds of an object with this metadata: one function for taking and for rebuilding.
pub(crate) fn describe(meta: &ObjectMeta, object_bytes: u64) -> Option<(Labels, ObjectKey, Row)> {
    let batch = meta.batch.as_ref()?;
    let key = ObjectKey {
        start_ms: batch.start.as_ref().and_then(time::to_ms)?,
        id: Ulid::from_string(&batch.batch_id).ok()?,
    };
    let header = object::packed_header_len(meta);
    let row = Row {
        duration_ms: batch.duration.as_ref().and_then(time::span_to_ms).unwrap_or(0),
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

/// The one who changes the store.
pub(crate) struct Writer {
    store: Arc<Store>,
    sender: mpsc::Sender<NewBatch>,
    queue: mpsc::Receiver<NewBatch>,
}

impl Writer {
    /// Where batches are handed in; full means: not now.
    pub(crate) fn sender(&self) -> mpsc::Sender<NewBatch> {
        self.sender.clone()
    }

    /// Takes batches and removes what is old, until told to stop; then takes what is queued and ends.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let Self { store, sender, mut queue } = self;
        drop(sender);
        let mut stopping = false;
        let mut next_retention = Instant::now();
        let mut next_look = Instant::now() + store.bucket_interval;
        let mut turn = 0;
        loop {
            let mut group = Vec::new();
            tokio::select! {
                biased;
                n = queue.recv_many(&mut group, MAX_GROUP) => if n == 0 { break },
                () = tokio::time::sleep_until(next_retention) => {}
                () = tokio::time::sleep_until(next_look), if store.objects.is_shared() => {}
                () = stop.cancelled(), if !stopping => {
                    queue.close();
                    stopping = true;
                }
            }
            if !group.is_empty() {
                store.take(group).await;
            }
            if store.objects.is_shared() && Instant::now() >= next_look {
                let of = Arc::clone(&store);
                let looked = tokio::task::spawn_blocking(move || of.follow(turn)).await;
                if let Err(error) = looked.map_err(|_| StoreError::Ended).flatten() {
                    store.metrics.store_errors.inc();
                    tracing::warn!(%error, "the bucket could not be listed; trying again");
                }
                turn = turn.wrapping_add(1);
                next_look = Instant::now() + store.bucket_interval;
            }
            if Instant::now() >= next_retention || store.is_over_budget() {
                let more = match store.expire().await {
                    Ok(more) => more,
                    Err(error) => {
                        store.metrics.store_errors.inc();
                        tracing::warn!(%error, "old profiles could not be removed; trying again");
                        false
                    }
                };
                next_retention =
                    Instant::now() + if more { Duration::ZERO } else { store.retention_interval };
            }
        }
    }
}

impl Store {
    fn is_over_budget(&self) -> bool {
        self.state.read().unwrap_or_else(PoisonError::into_inner).bytes > self.retention_bytes
    }

    /// Makes a group of batches durable and answers each of them.
    async fn take(self: &Arc<Self>, group: Vec<NewBatch>) {
        let began = std::time::Instant::now();
        self.metrics.commit_batches.observe(group.len() as f64);
        let ids: Vec<Ulid> = group.iter().map(|b| b.key.id).collect();
        let store = Arc::clone(self);
        let known = match blocking(move || store.index.known(ids)).await {
            Ok(known) => known,
            Err(error) => return self.put_off(group, "store", &error.to_string()),
        };
        // A second batch of the same id in one group is answered as the first is.
        let mut fresh: Vec<NewBatch> = Vec::new();
        let mut places: HashMap<Ulid, usize> = HashMap::new();
        let mut doubles: Vec<(usize, NewBatch)> = Vec::new();
        for (batch, known) in group.into_iter().zip(known) {
            if known {
                self.answer(batch, Outcome::Duplicate);
            } else if let Some(&place) = places.get(&batch.key.id) {
                doubles.push((place, batch));
            } else {
                places.insert(batch.key.id, fresh.len());
                fresh.push(batch);
            }
        }
        let outcomes = self.take_fresh(&fresh).await;
        for (place, batch) in doubles {
            let outcome = match &outcomes[place] {
                Outcome::Stored => Outcome::Duplicate,
                other => other.clone(),
            };
            self.answer(batch, outcome);
        }
        for (batch, outcome) in fresh.into_iter().zip(outcomes) {
            self.answer(batch, outcome);
        }
        self.metrics.commit_seconds.observe(began.elapsed().as_secs_f64());
        self.show_size();
    }

    fn answer(&self, batch: NewBatch, outcome: Outcome) {
        match &outcome {
            Outcome::Stored => self.metrics.batches_accepted.inc(),
            Outcome::Duplicate => self.metrics.batches_duplicate.inc(),
            Outcome::Throttled { cause, .. } => {
                self.metrics.throttled(cause);
                0
            }
        };
        // The stream may be gone: the agent sends the batch again and learns that it is a duplicate.
        let _ = batch.reply.send(outcome);
    }

    fn put_off(&self, group: Vec<NewBatch>, cause: &'static str, reason: &str) {
        for batch in group {
            self.answer(batch, throttled(cause, reason));
        }
    }

    /// Stores batches that are not there yet; the outcomes are in their order.
    async fn take_fresh(self: &Arc<Self>, batches: &[NewBatch]) -> Vec<Outcome> {
        if batches.is_empty() {
            return Vec::new();
        }
        // Of a bucket's objects only rows come to this disk.
        let needed: u64 =
            if self.objects.is_shared() { 0 } else { batches.iter().map(|b| b.object.len() as u64).sum() };
        match self.free_bytes() {
            Ok(free) if free < self.min_free_bytes.saturating_add(needed) => {
                let reason = format!(
                    "the collector's disk has {} MiB left, of which it keeps {} MiB: free some, or lower --retention-bytes",
                    free >> 20,
                    self.min_free_bytes >> 20
                );
                return vec![throttled("disk_full", &reason); batches.len()];
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "the room left on the disk is not known"),
        }
        let puts: Vec<_> = batches.iter().map(|b| self.objects.put(b.key, b.object.clone())).collect();
        let written = stream::iter(puts).buffered(WRITES_AT_ONCE).collect::<Vec<_>>().await;
        let mut outcomes: Vec<Outcome> = written
            .into_iter()
            .map(|result| match result {
                Ok(()) => Outcome::Stored,
                Err(error) => self.write_failed(&error),
            })
            .collect();

        let mut change = Change::default();
        let mut new_series: HashMap<&Labels, u64> = HashMap::new();
        {
            let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
            for (batch, outcome) in batches.iter().zip(&mut outcomes) {
                if !matches!(outcome, Outcome::Stored) {
                    continue;
                }
                let Some(series) = state.series_of(&batch.labels, &mut new_series, self.max_series) else {
                    *outcome = throttled(
                        "series",
                        &format!(
                            "the collector holds {} series, its limit: raise --max-series, or see which label changes \
                             with every profile",
                            self.max_series
                        ),
                    );
                    continue;
                };
                change.add.push(Entry { series, key: batch.key, row: batch.row.clone() });
            }
            change.add_series = new_series.into_iter().map(|(labels, id)| (id, labels.clone())).collect();
        }
        if change.add.is_empty() {
            return outcomes;
        }
        let store = Arc::clone(self);
        let committed = blocking(move || Ok((store.index.commit(&change)?, change))).await;
        let (first_of_window, change) = match committed {
            Ok(done) => done,
            Err(error) => {
                // The objects stay: the same batches come again and find their rows missing, or the next start does.
                self.metrics.store_errors.inc();
                tracing::warn!(%error, "the index could not be written; batches are put off");
                let reason = throttled("store", &error.to_string());
                for outcome in outcomes.iter_mut().filter(|o| matches!(o, Outcome::Stored)) {
                    *outcome = reason.clone();
                }
                return outcomes;
            }
        };
        self.state.write().unwrap_or_else(PoisonError::into_inner).apply(change);
        let stored = batches.iter().zip(&outcomes).filter(|(_, o)| matches!(o, Outcome::Stored));
        for ((batch, _), first) in stored.zip(first_of_window) {
            if let Some(ledger) = batch.ledger.as_ref().filter(|_| first) {
                self.count_ledger(ledger);
            }
        }
        outcomes
    }

    /// How much room is left on the disk of the index.
    fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.data)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn count_ledger(&self, ledger: &Ledger) {
        if let Err(error) = ledger.check() {
            self.metrics.ledgers_unbalanced.inc();
            tracing::warn!(%error, "a window's ledger does not add up");
        }
        self.metrics.samples_taken.inc_by(ledger.taken);
        self.metrics.samples_delivered.inc_by(ledger.delivered);
        for (reason, samples) in &ledger.lost {
            self.metrics.lost(reason.as_str(), *samples);
        }
    }

    fn write_failed(&self, error: &object_store::Error) -> Outcome {
        self.metrics.store_errors.inc();
        let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(e) = source {
            if let Some(e) = e.downcast_ref::<io::Error>()
                && matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            {
                tracing::warn!("the disk is full; batches are put off");
                return throttled(
                    "disk_full",
                    "the collector's disk is full: free some room, or lower --retention-bytes",
                );
            }
            source = e.source();
        }
        tracing::warn!(%error, "an object could not be written; its batch is put off");
        throttled("store", &format!("the collector could not write: {error}"))
    }

    /// Removes some of what is too old or too much; says whether there is more.
    async fn expire(self: &Arc<Self>) -> Result<bool, StoreError> {
        let store = Arc::clone(self);
        let oldest = blocking(move || store.index.oldest(RETENTION_CHUNK)).await?;
        let cutoff = time::now_ms().saturating_sub(self.retention_age.as_millis() as u64);
        let mut over = self
            .state
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .bytes
            .saturating_sub(self.retention_bytes);
        let victims: Vec<_> = oldest
            .into_iter()
            .take_while(|(_, key, bytes)| {
                let goes = over > 0 || key.start_ms < cutoff;
                over = over.saturating_sub(*bytes);
                goes
            })
            .collect();
        if victims.is_empty() {
            return Ok(false);
        }
        let deletes: Vec<_> = victims.iter().map(|(_, key, _)| self.objects.delete(*key)).collect();
        let results = stream::iter(deletes).buffer_unordered(WRITES_AT_ONCE).collect::<Vec<_>>().await;
        results.into_iter().collect::<Result<(), _>>()?;
        let emptied = self.state.read().unwrap_or_else(PoisonError::into_inner).emptied(&victims);
        let change = removal(&victims, &emptied);
        let store = Arc::clone(self);
        blocking(move || store.index.commit(&change)).await?;
        self.state.write().unwrap_or_else(PoisonError::into_inner).remove(&victims, &emptied);
        self.metrics.retention_removed.inc_by(victims.len() as u64);
        tracing::debug!(profiles = victims.len(), "removed by retention");
        self.show_size();
        Ok(victims.len() == RETENTION_CHUNK)
    }
}

fn throttled(cause: &'static str, reason: &str) -> Outcome {
    let seconds = if cause == "series" { 60 } else { 5 };
    Outcome::Throttled { cause, retry_after: Duration::from_secs(seconds), reason: reason.to_owned() }
}
