//! The store: immutable objects, an index beside them, and one task that changes both.
//!
//! The writer puts the batches of half a second into one object, a segment. Objects of the older layout, one for each
//! batch, stay readable until retention removes them.
//!
//! The order of the steps makes every crash harmless:
//! - storing: write and sync the segment, commit the index, acknowledge its batches;
//! - removing: delete the object, then its index rows.
//!
//! A crash in between leaves an object without a row, or a row without an object. The next start finds and repairs
//! both. Until then a query skips a row without an object.
//!
//! Other modules see four things of the store: [`Store`] for reading, [`BatchQueue`] for handing in a [`NewBatch`],
//! [`StoreWriter`] for the task that changes the store, and [`StoreOptions`]. Objects, index and state stay inside.

mod archive;
mod bucket;
mod carry_out;
mod change;
mod copies;
mod delete;
mod deletions;
mod describe;
mod export;
mod follow;
pub(crate) mod fuzz;
mod hidden;
mod import;
mod index;
mod meta;
mod object;
mod repair;
mod replay;
mod retention;
mod row;
mod segment;
mod settle;
mod state;
mod tombstone;
mod verify;
mod writer;

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clap::Args;
use gannet_base::{ByteSize, TimeSpan};
use gannet_proto::labels::Labels;
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use ulid::Ulid;

pub use self::{
    archive::ArchiveError,
    bucket::Bucket,
    delete::Deleted,
    export::Exported,
    import::{ImportError, Imported},
    repair::Repair,
    verify::{ObjectFault, Verified},
};
pub(crate) use self::{
    carry_out::DeletionQueue,
    delete::{Chosen, delete},
    deletions::DeletionCounts,
    export::export,
    import::import,
    meta::TypeTotal,
    object::ObjectKey,
    repair::{ASIDE, lock_unused, repair},
    replay::{SegmentContent, SegmentInfo, SegmentProfile, TableObjects},
    row::{ProfileLocation, StoredProfile},
    state::Series,
    tombstone::Tombstone,
    verify::{open_tables, verify},
    writer::{BatchOutcome, BatchQueue, NewBatch, PackError, StoreWriter},
};
use self::{
    deletions::Deletions,
    index::{Index, IndexError},
    object::Objects,
    segment::SegmentPosition,
    state::StoreState,
};
use crate::{metrics::Metrics, selector::Selector};

/// Limits and retention of the stored profiles.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Store")]
#[serde(default)]
pub struct StoreOptions {
    /// Remove profiles that are older, and refuse them
    #[arg(long, value_name = "AGE", env = "GANNET_COLLECTOR_RETENTION_AGE", default_value = "7d")]
    pub retention_age: TimeSpan,
    /// Remove the oldest profiles while all together are larger
    #[arg(long, value_name = "BYTES", env = "GANNET_COLLECTOR_RETENTION_BYTES", default_value = "10GiB")]
    pub retention_bytes: ByteSize,
    /// Store nothing while the disk has less free space than this, which keeps a full disk away from the index
    #[arg(long, value_name = "BYTES", env = "GANNET_COLLECTOR_MIN_FREE_BYTES", default_value = "64MiB")]
    pub min_free_bytes: ByteSize,
    /// Store at most this many series at one time
    #[arg(long, value_name = "N", env = "GANNET_COLLECTOR_MAX_SERIES", default_value_t = 200_000)]
    pub max_series: usize,
    /// Write waiting profiles this often, and acknowledge them; each write to a bucket is one request
    #[arg(long, value_name = "TIME", env = "GANNET_COLLECTOR_FLUSH_INTERVAL", default_value = "500ms")]
    pub flush_interval: TimeSpan,
    /// Time between two retention passes. A profile that exceeds `retention_bytes` starts one at once.
    #[arg(skip = Duration::from_secs(60))]
    #[serde(skip)]
    pub retention_interval: Duration,
    /// Look for new profiles of other collectors in the bucket this often; each look is one request to list names, or a few
    #[arg(long, value_name = "TIME", env = "GANNET_COLLECTOR_BUCKET_INTERVAL", default_value = "3s")]
    pub bucket_interval: TimeSpan,
    /// Time between two comparisons of complete hours of a bucket, which find what other collectors removed.
    #[arg(skip = Duration::from_secs(120))]
    #[serde(skip)]
    pub bucket_hours_interval: Duration,
    /// Time for which a segment of a bucket stays beside its successor without deleted profiles, until other collectors read that one.
    #[arg(skip = Duration::from_secs(60))]
    #[serde(skip)]
    pub deletion_grace: Duration,
    /// Age from which on a collector carries out a deletion that another collector of the bucket took.
    #[arg(skip = Duration::from_secs(15 * 60))]
    #[serde(skip)]
    pub deletion_takeover: Duration,
    /// Memory for the index while the disk is too full for its file. The newest profiles have room there.
    #[arg(skip = 64_u64 << 20)]
    #[serde(skip)]
    pub memory_index_bytes: u64,
    /// Bytes of waiting batches that start a flush early.
    #[arg(skip = 32_u64 << 20)]
    #[serde(skip)]
    pub flush_bytes: u64,
}

impl Default for StoreOptions {
    fn default() -> Self {
        gannet_base::defaults()
    }
}

/// Why the store cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another collector has locked the directory.
    #[error("another collector uses {0}: stop it, or give this one its own --data")]
    Locked(PathBuf),
    /// A file or directory cannot be used.
    #[error("cannot {doing} {path}: {source}")]
    Io {
        /// The failed operation, as a verb.
        doing: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// An object cannot be read or written.
    #[error("cannot read or write an object: {0}")]
    Object(#[source] object_store::Error),
    /// The first access to a bucket failed.
    #[error(
        "cannot read --data {bucket}: {reason}; the collector takes credentials, region and endpoint from the environment \
         (AWS_…, GOOGLE_…, AZURE_…)"
    )]
    Bucket {
        /// The bucket as `--data` names it.
        bucket: String,
        /// The error of the object store, and its first cause.
        reason: String,
    },
    /// The index cannot be used.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// A deletion cannot be read. Without it, its profiles would come back.
    #[error("cannot read the deletion {path}: {reason}")]
    Deletion {
        /// Path of the object.
        path: String,
        /// The fault and the cure.
        reason: String,
    },
    /// The content of an object is damaged, or its file is gone without retention.
    #[error("the object of profile {0} is damaged or missing; restore its file from a backup")]
    Damaged(Ulid),
    /// The runtime has stopped a blocking task.
    #[error("the store is shutting down")]
    Ended,
}

impl StoreError {
    pub(crate) fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { doing, path: path.to_owned(), source }
    }

    /// Names the bucket in an error of its requests.
    fn of_bucket(self, bucket: Option<&Bucket>) -> Self {
        match (bucket, self) {
            (Some(bucket), Self::Object(error)) => {
                Self::Bucket { bucket: bucket.to_string(), reason: with_cause(&error) }
            }
            (_, error) => error,
        }
    }
}

/// Stored profiles. Readers share it; only the [`StoreWriter`] changes it.
pub(crate) struct Store {
    objects: Objects,
    index: Index,
    state: RwLock<StoreState>,
    metrics: Metrics,
    /// Retention may have removed objects that start up to this time.
    expired_ms: AtomicU64,
    /// Retention may have removed segments written up to this time.
    expired_segment_ms: AtomicU64,
    /// A segment whose write or index commit failed, so that it may be there without its rows. While there is one, the
    /// writer stores nothing else.
    uncertain: Mutex<Option<Ulid>>,
    /// Deletions that are not carried out yet.
    deletions: Deletions,
    /// Directory of everything but the objects.
    data: PathBuf,
    runtime: Handle,
    options: StoreOptions,
    /// Space of the table beside the objects, which counts in `retention_bytes`.
    table_bytes: AtomicU64,
    /// Locked while this collector runs.
    _lock: File,
}

impl Store {
    /// Opens the store in a directory, repairs what a crash left, and returns it with its only writer. With a bucket, the
    /// profiles lie there and the directory holds only the index. Blocking; must run inside a runtime.
    pub(crate) fn open(
        data: &Path,
        bucket: Option<&Bucket>,
        options: &StoreOptions,
        metrics: Metrics,
    ) -> Result<(Arc<Self>, StoreWriter), StoreError> {
        fs::create_dir_all(data).map_err(|e| StoreError::io("create the directory --data", data, e))?;
        let lock = lock(data)?;
        let objects = match bucket {
            Some(bucket) => Objects::in_bucket(bucket)?,
            None => Objects::open(&data.join("objects"))?,
        };
        let (index, is_new) = Index::open(&data.join("index.redb"))?;
        let state = RwLock::new(StoreState::load(&index, objects.directory_bytes())?);
        let store = Arc::new(Self {
            objects,
            index,
            state,
            metrics,
            expired_ms: AtomicU64::new(0),
            expired_segment_ms: AtomicU64::new(0),
            uncertain: Mutex::new(None),
            deletions: Deletions::default(),
            data: data.to_owned(),
            runtime: Handle::current(),
            options: options.clone(),
            table_bytes: AtomicU64::new(0),
            _lock: lock,
        });
        store.load_origins()?;
        store.settle(is_new).map_err(|error| error.of_bucket(bucket))?;
        store.hide_all()?;
        store.update_size_metrics();
        Ok((Arc::clone(&store), StoreWriter::new(store)))
    }

    /// Time for which the store keeps profiles.
    pub(crate) fn retention_age(&self) -> Duration {
        self.options.retention_age.0
    }

    /// Returns the series that match and may have profiles in the range, in the order of their labels.
    pub(crate) fn series(&self, selector: &Selector, from_ms: u64, until_ms: u64) -> Vec<Series> {
        self.state.read().select(selector, from_ms, until_ms)
    }

    /// Returns the labels of a series, or `None` once retention has removed it.
    pub(crate) fn labels_of(&self, series: u64) -> Option<Arc<Labels>> {
        self.state.read().labels_of(series)
    }

    /// Reports whether a batch with this id is stored, or was until a deletion. Blocking.
    pub(crate) fn contains(&self, id: Ulid) -> Result<bool, StoreError> {
        Ok(self.index.knows(&[id])? == [true])
    }

    /// Returns the index entry of one profile. A batch that carried only a ledger is no profile. Blocking.
    pub(crate) fn entry(&self, id: Ulid) -> Result<Option<StoredProfile>, StoreError> {
        Ok(self.index.by_id(id)?.filter(StoredProfile::has_profile))
    }

    /// Calls `each` for every matching profile that starts in the range, series by series and each in the order of time,
    /// until `each` returns false. Blocking.
    pub(crate) fn scan(
        &self,
        selector: &Selector,
        from_ms: u64,
        until_ms: u64,
        each: impl FnMut(StoredProfile) -> bool,
    ) -> Result<(), StoreError> {
        let series: Vec<u64> = self.series(selector, from_ms, until_ms).into_iter().map(|s| s.id).collect();
        self.scan_series(&series, from_ms, until_ms, each)
    }

    /// Calls `each` for every profile of these series that starts in the range, as [`Store::scan`] does. Blocking.
    pub(crate) fn scan_series(
        &self,
        series: &[u64],
        from_ms: u64,
        until_ms: u64,
        each: impl FnMut(StoredProfile) -> bool,
    ) -> Result<(), StoreError> {
        Ok(self.index.scan(series, from_ms, until_ms, each)?)
    }

    /// Returns times at or before the start of the oldest profile and at or after that of the newest one. `None` without a
    /// profile.
    pub(crate) fn times(&self) -> Option<(u64, u64)> {
        self.state.read().times()
    }

    /// Returns up to `limit` matching profiles that start in the range, newest first. `before` skips to the profiles that
    /// are older than this one. Blocking.
    pub(crate) fn newest(
        &self,
        selector: &Selector,
        from_ms: u64,
        until_ms: u64,
        before: Option<ObjectKey>,
        limit: usize,
    ) -> Result<Vec<StoredProfile>, StoreError> {
        let series = self.series(selector, from_ms, until_ms).into_iter().map(|s| s.id).collect();
        Ok(self.index.newest(&series, from_ms, until_ms, before, limit)?)
    }

    /// Returns a profile's bytes as the agent sent them, or `None` once retention has removed it.
    pub(crate) async fn profile(&self, at: ProfileLocation) -> Result<Option<Bytes>, StoreError> {
        self.read_from(at, false).await
    }

    /// Reads a profile. `is_second`: after a deletion moved it.
    async fn read_from(&self, at: ProfileLocation, is_second: bool) -> Result<Option<Bytes>, StoreError> {
        match at.position {
            Some(position) => self.read_from_segment(at.key, position, is_second).await,
            None => self.read_object(at.key).await,
        }
    }

    /// Returns several profiles of one segment, each as [`Store::profile`] does. Reads them together, so neighbours should
    /// come in the order of their locations.
    pub(crate) async fn profiles(&self, at: &[ProfileLocation]) -> Vec<Result<Option<Bytes>, StoreError>> {
        let positions: Option<Vec<SegmentPosition>> = at.iter().map(|at| at.position).collect();
        if let Some(positions) = positions
            && let Some(first) = positions.first()
            && positions.iter().all(|position| position.segment == first.segment)
        {
            let ranges: Vec<_> = positions.iter().map(SegmentPosition::range).collect();
            let found = self.objects.segment_ranges(first.segment, &ranges).await;
            if let Ok(Some(parts)) = found
                && parts.len() == at.len()
            {
                let checked = parts.into_iter().zip(at).zip(positions);
                return checked.map(|((part, at), position)| self.check(at.key, position, part)).collect();
            }
        }
        // One by one, so that each has its own error.
        let mut profiles = Vec::with_capacity(at.len());
        for at in at {
            profiles.push(self.profile(*at).await);
        }
        profiles
    }

    async fn read_from_segment(
        &self,
        key: ObjectKey,
        position: SegmentPosition,
        is_second: bool,
    ) -> Result<Option<Bytes>, StoreError> {
        let segment = position.segment;
        let error = match self.objects.segment_ranges(segment, &[position.range()]).await {
            Ok(Some(parts)) => {
                return self.check(key, position, parts.into_iter().next().unwrap_or_default());
            }
            Ok(None) => {
                // A deletion may have removed the profile, or moved it.
                match self.index.by_id(key.id)? {
                    None => return Ok(None),
                    Some(entry) if entry.has_moved_from(segment) && !is_second => {
                        return Box::pin(self.read_from(entry.location(), true)).await;
                    }
                    Some(_) => {}
                }
                let is_expired = segment.timestamp_ms() <= self.expired_segment_ms.load(Ordering::Acquire);
                return self.missing(key, is_expired);
            }
            Err(error) => error,
        };
        let is_cut = match self.objects.segment_bytes(segment).await {
            Ok(Some(bytes)) => bytes < position.range().end,
            _ => false,
        };
        self.unreadable(key, error, is_cut)
    }

    /// Checks a profile that was read from a segment.
    fn check(
        &self,
        key: ObjectKey,
        position: SegmentPosition,
        profile: Bytes,
    ) -> Result<Option<Bytes>, StoreError> {
        if profile.len() as u64 == position.bytes && crc32fast::hash(&profile) == position.crc {
            return Ok(Some(profile));
        }
        self.metrics.objects_corrupt.inc();
        Err(StoreError::Damaged(key.id))
    }

    /// Reads a profile of the older layout, which has an object of its own.
    async fn read_object(&self, key: ObjectKey) -> Result<Option<Bytes>, StoreError> {
        let object = match self.objects.get(key).await {
            Ok(Some(object)) => object,
            Ok(None) => {
                // A deletion may have removed the profile.
                if self.index.by_id(key.id)?.is_none() {
                    return Ok(None);
                }
                return self.missing(key, key.start_ms <= self.expired_ms.load(Ordering::Acquire));
            }
            Err(error) => return self.unreadable(key, error, false),
        };
        match object::unpack(&object) {
            Some((_, offset)) if offset <= object.len() => Ok(Some(object.slice(offset..))),
            _ => {
                self.metrics.objects_corrupt.inc();
                Err(StoreError::Damaged(key.id))
            }
        }
    }

    /// Returns the answer for a profile whose object is missing.
    fn missing(&self, key: ObjectKey, is_expired: bool) -> Result<Option<Bytes>, StoreError> {
        // In a bucket, the retention of another collector may have removed it.
        if self.objects.is_shared() || is_expired {
            self.metrics.objects_gone.inc();
            return Ok(None);
        }
        self.metrics.objects_corrupt.inc();
        Err(StoreError::Damaged(key.id))
    }

    /// Returns the answer for a profile whose object cannot be read.
    fn unreadable(
        &self,
        key: ObjectKey,
        error: StoreError,
        is_cut: bool,
    ) -> Result<Option<Bytes>, StoreError> {
        // A failing disk or a foreign file in the object's place. The network of a bucket can fail as a whole instead.
        if self.objects.is_shared() && !is_cut {
            return Err(error);
        }
        self.metrics.objects_corrupt.inc();
        tracing::debug!(profile = %key.id, %error, "cannot read an object");
        Err(StoreError::Damaged(key.id))
    }

    /// Returns an error while the index cannot be read. Blocking.
    pub(crate) fn health(&self) -> Result<(), StoreError> {
        Ok(self.index.contains([]).map(drop)?)
    }

    fn update_size_metrics(&self) {
        let state = self.state.read();
        self.metrics.store_bytes.set(state.disk_bytes() as i64);
        self.metrics.store_profiles.set(state.profiles() as i64);
        self.metrics.store_series.set(state.series_count() as i64);
        self.metrics.index_left_out.set(state.left_out() as i64);
        self.metrics.store_segments.set(state.segment_count() as i64);
        self.metrics.deletions_pending.set(self.deletions.all().len() as i64);
    }
}

/// Runs an operation of the index or of the store on a blocking thread.
async fn blocking<T: Send + 'static, E: Send + 'static>(
    f: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, StoreError>
where
    StoreError: From<E>,
{
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

/// Formats an error with its innermost cause.
fn with_cause(error: &object_store::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    format!("{error} ({cause})")
}
