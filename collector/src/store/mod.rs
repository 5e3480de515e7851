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
    collections::{HashMap, HashSet},
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
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use ulid::Ulid;

pub use self::index::IndexError;
use self::{
    index::{Change, Index},
    object::{Objects, read_meta},
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
    retention_age: Duration,
    retention_bytes: u64,
    retention_interval: Duration,
    min_free_bytes: u64,
    max_series: usize,
    /// Locked while this runs.
    _lock: File,
}

impl Store {
    /// Opens the store below a directory, settles what a crash left, and hands out its one writer.
    pub(crate) fn open(config: &Config, metrics: Metrics) -> Result<(Arc<Self>, Writer), StoreError> {
        let data = &config.data;
        fs::create_dir_all(data).map_err(|e| StoreError::io("create the directory --data", data, e))?;
        let lock = lock(data)?;
        let objects = Objects::open(&data.join("objects"))?;
        let (index, is_new) = Index::open(&data.join("index.redb"))?;
        let state = settle(&objects, &index, &metrics, is_new)?;
        let store = Arc::new(Self {
            objects,
            index,
            state: RwLock::new(state),
            metrics,
            retention_age: config.retention_age,
            retention_bytes: config.retention_bytes,
            retention_interval: config.retention_interval,
            min_free_bytes: config.min_free_bytes,
            max_series: config.max_series,
            _lock: lock,
        });
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

/// Makes index and objects agree, and counts what is there.
fn settle(objects: &Objects, index: &Index, metrics: &Metrics, is_new: bool) -> Result<State, StoreError> {
    let began = std::time::Instant::now();
    let mut state = State::default();
    for (id, labels) in index.series()? {
        state.add_series(id, labels);
    }
    let mut change = Change::default();
    let (mut added, mut removed, mut damaged) = (0_u64, 0_u64, 0_u64);
    let mut hours = HashSet::new();
    let flush = |change: &mut Change| index.commit(&std::mem::take(change)).map(drop);
    objects.walk(|hour, files| {
        hours.insert(hour);
        let mut rows: HashMap<Ulid, (u64, ObjectKey)> = HashMap::new();
        index.scan_newest(hour * 3_600_000, (hour + 1) * 3_600_000, None, |series, key, _| {
            rows.insert(key.id, (series, key));
            true
        })?;
        for (path, id) in files {
            if rows.remove(&id).is_some() {
                continue;
            }
            let Some((labels, key, row)) = read_entry(objects, &path, id) else {
                damaged += 1;
                metrics.objects_corrupt.inc();
                tracing::warn!(path = %path.display(), "not a readable object: left out");
                continue;
            };
            let series = state.by_labels.get(&labels).copied().unwrap_or_else(|| {
                let id = state.next_series;
                state.add_series(id, labels.clone());
                change.add_series.push((id, labels));
                id
            });
            change.add.push(Entry { series, key, row });
            added += 1;
            if change.add.len() >= REPAIR_CHUNK {
                flush(&mut change)?;
                tracing::info!(added, "reading objects that are not in the index");
            }
        }
        removed += rows.len() as u64;
        change.remove.extend(rows.into_values());
        Ok(())
    })?;
    flush(&mut change)?;
    index.all(|series, key, bytes| {
        if hours.contains(&key.hour()) {
            state.add(series, key.start_ms, bytes);
        } else {
            change.remove.push((series, key));
            removed += 1;
        }
    })?;
    let unused: Vec<u64> = state.series.values().filter(|s| s.profiles == 0).map(|s| s.id).collect();
    state.remove(&[], &unused);
    change.remove_series = unused;
    if !change.remove.is_empty() || !change.remove_series.is_empty() {
        flush(&mut change)?;
    }
    if is_new && added > 0 {
        metrics.index_rebuilds.inc();
        tracing::warn!(profiles = added, damaged, took = ?began.elapsed(), "the index was built anew from the objects");
    } else if added + removed > 0 {
        tracing::info!(added, removed, "settled what the last end left between objects and index");
    }
    metrics.index_repairs.inc_by(added + removed);
    Ok(state)
}

/// What the index holds of an object, read from the object; `None` if it is none, or not in its place.
fn read_entry(objects: &Objects, path: &Path, id: Ulid) -> Option<(Labels, ObjectKey, Row)> {
    let meta = read_meta(path).ok()??;
    let object_bytes = fs::metadata(path).ok()?.len();
    let (labels, key, row) = describe(&meta, object_bytes)?;
    (key.id == id && objects.file(key) == path).then_some((labels, key, row))
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
        loop {
            let mut group = Vec::new();
            tokio::select! {
                biased;
                n = queue.recv_many(&mut group, MAX_GROUP) => if n == 0 { break },
                () = tokio::time::sleep_until(next_retention) => {}
                () = stop.cancelled(), if !stopping => {
                    queue.close();
                    stopping = true;
                }
            }
            if !group.is_empty() {
                store.take(group).await;
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
        let needed: u64 = batches.iter().map(|b| b.object.len() as u64).sum();
        match self.objects.free_bytes() {
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
                let known =
                    state.by_labels.get(&batch.labels).or_else(|| new_series.get(&batch.labels)).copied();
                let series = match known {
                    Some(series) => series,
                    None if state.series.len() + new_series.len() >= self.max_series => {
                        *outcome = throttled(
                            "series",
                            &format!(
                                "the collector holds {} series, its limit: raise --max-series, or see which label \
                                 changes with every profile",
                                self.max_series
                            ),
                        );
                        continue;
                    }
                    None => {
                        let id = state.next_series + new_series.len() as u64;
                        new_series.insert(&batch.labels, id);
                        change.add_series.push((id, batch.labels.clone()));
                        id
                    }
                };
                change.add.push(Entry { series, key: batch.key, row: batch.row.clone() });
            }
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
        {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            for (id, labels) in change.add_series {
                state.add_series(id, labels);
            }
            for entry in &change.add {
                state.add(entry.series, entry.key.start_ms, entry.row.object_bytes);
            }
        }
        let stored = batches.iter().zip(&outcomes).filter(|(_, o)| matches!(o, Outcome::Stored));
        for ((batch, _), first) in stored.zip(first_of_window) {
            if let Some(ledger) = batch.ledger.as_ref().filter(|_| first) {
                self.count_ledger(ledger);
            }
        }
        outcomes
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
        let change = Change {
            remove: victims.iter().map(|(series, key, _)| (*series, *key)).collect(),
            remove_series: emptied.clone(),
            ..Change::default()
        };
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
