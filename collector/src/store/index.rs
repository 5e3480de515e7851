//! The index of all objects, in one redb file. The store can rebuild it from the objects.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use gannet_proto::labels::Labels;
use parking_lot::RwLock;
use prost::Message;
use redb::{
    Database, ReadTransaction, ReadableDatabase as _, ReadableTable as _, TableDefinition,
    backends::InMemoryBackend,
};
use ulid::Ulid;

use super::{
    change::{AddedProfile, IndexChange},
    copies, hidden,
    object::{HOUR_MS, ObjectKey, segment_hour},
    row::{IndexedObject, ProfileRow, ROW_BYTES, StoredProfile},
};

/// (series, start in ms, id) -> [`ProfileRow`]
const PROFILES: TableDefinition<'_, (u64, u64, u128), &[u8]> = TableDefinition::new("profiles");
/// id -> (series, start in ms)
const IDS: TableDefinition<'_, u128, (u64, u64)> = TableDefinition::new("ids");
/// (start in ms, id) -> (series, bytes that the profile takes on the disk, with [`IN_SEGMENT`])
const TIMES: TableDefinition<'_, (u64, u128), (u64, u64)> = TableDefinition::new("times");
/// Labels by series: id -> [`SeriesLabels`].
const SERIES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("series");
/// window id -> id of the batch that carried the window's ledger
const WINDOWS: TableDefinition<'_, u128, u128> = TableDefinition::new("windows");
/// segment id -> (bytes that the segment takes on the disk, number of its rows)
const SEGMENTS: TableDefinition<'_, u128, (u64, u64)> = TableDefinition::new("segments");
/// (segment id, id) -> (series, start in ms)
const SEGMENT_ROWS: TableDefinition<'_, (u128, u128), (u64, u64)> = TableDefinition::new("segment_rows");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Version of the tables above. The store rebuilds an index of another version.
const LAYOUT: u64 = 3;
/// The version without segments, to which the store adds their tables.
const LAYOUT_WITHOUT_SEGMENTS: u64 = 2;
/// Bit of the bytes in [`TIMES`]: the profile is in a segment, whose bytes count once, for the whole segment.
const IN_SEGMENT: u64 = 1 << 63;
/// Memory for redb's pages.
const CACHE_BYTES: usize = 32 << 20;

/// Why the index cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The file is damaged. The next start rebuilds it.
    #[error("the index {path} is corrupt ({what}); the next start will rebuild it from the objects")]
    Corrupt {
        /// Path of the file.
        path: PathBuf,
        /// The error of redb.
        what: String,
    },
    /// The file was closed after a failed write, and cannot be opened again yet.
    #[error(
        "the index is closed after a failed write; the collector opens it again as soon as the disk allows"
    )]
    Closed,
    /// The disk returned an error.
    #[error("cannot read or write the index: {0}; check that its disk has space and is healthy")]
    Io(#[source] io::Error),
}

/// An entry of the index by time.
#[derive(Clone, Copy)]
pub(super) struct TimeEntry {
    pub(super) series: u64,
    pub(super) key: ObjectKey,
    pub(super) disk_bytes: u64,
    pub(super) is_in_segment: bool,
}

impl TimeEntry {
    fn new((start_ms, id): (u64, u128), (series, bytes): (u64, u64)) -> Self {
        Self {
            series,
            key: ObjectKey { start_ms, id: Ulid(id) },
            disk_bytes: bytes & !IN_SEGMENT,
            is_in_segment: bytes & IN_SEGMENT != 0,
        }
    }

    fn in_segment(self, segment: Option<Ulid>) -> IndexedObject {
        let Self { series, key, disk_bytes, .. } = self;
        IndexedObject { series, key, disk_bytes, segment }
    }

    /// Returns the entry if its profile has an object of its own.
    pub(super) fn outside_segments(self) -> Option<IndexedObject> {
        (!self.is_in_segment).then(|| self.in_segment(None))
    }
}

/// A segment that the index knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IndexedSegment {
    pub(super) id: Ulid,
    /// Space that the segment takes on the disk.
    pub(super) disk_bytes: u64,
    /// Number of its rows.
    pub(super) rows: u64,
}

#[derive(Clone, PartialEq, Message)]
struct SeriesLabels {
    #[prost(btree_map = "string, string", tag = "1")]
    labels: std::collections::BTreeMap<String, String>,
}

/// The index file. Any thread may read it; only the store's writer commits.
pub(super) struct Index {
    path: PathBuf,
    /// The disk had no room for the file at the start, so the index is in memory and accepts no commit of the writer.
    is_in_memory: AtomicBool,
    /// Memory that an index in memory takes, by an upper estimate.
    memory_bytes: AtomicU64,
    /// `None` after a failed write, until the file can be opened again. Readers hold the lock only while they read.
    db: RwLock<Option<Database>>,
}

impl Index {
    /// Opens or creates the index; the flag reports a new one. Renames a corrupt file first and starts a new one. The
    /// renamed file stays until the next start that finds a good one, because retention does not count it.
    pub(super) fn open(path: &Path) -> Result<(Self, bool), IndexError> {
        let opened = |db, new| {
            let db = RwLock::new(Some(db));
            (Self { path: path.to_owned(), is_in_memory: false.into(), memory_bytes: 0.into(), db }, new)
        };
        let existed = path.exists();
        let aside = path.with_extension("redb.corrupt");
        match open_database(path) {
            Ok((db, new)) => {
                match fs::remove_file(&aside) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        tracing::warn!(path = %aside.display(), %error, "cannot remove a corrupt index");
                    }
                    _ => {}
                }
                Ok(opened(db, new || !existed))
            }
            Err(IndexError::Corrupt { what, .. }) => {
                tracing::warn!(
                    path = %path.display(), aside = %aside.display(), what,
                    "the index is corrupt: renamed it, rebuilding it from the objects"
                );
                fs::rename(path, &aside).map_err(IndexError::Io)?;
                let created = open_database(path).or_else(|error| match error {
                    IndexError::Io(e) if is_full(&e) => {
                        tracing::warn!(aside = %aside.display(), "removed the corrupt index, because the disk is full");
                        fs::remove_file(&aside).map_err(IndexError::Io)?;
                        open_database(path)
                    }
                    error => Err(error),
                });
                match created {
                    Ok((db, _)) => Ok(opened(db, true)),
                    Err(error) => Self::in_memory(path, error),
                }
            }
            Err(error) => Self::in_memory(path, error),
        }
    }

    /// Returns an empty index in memory if `error` is a full disk, so that queries have answers until there is room.
    fn in_memory(path: &Path, error: IndexError) -> Result<(Self, bool), IndexError> {
        let IndexError::Io(source) = error else { return Err(error) };
        if !is_full(&source) {
            return Err(IndexError::Io(source));
        }
        tracing::warn!(
            path = %path.display(),
            "the disk is full: the index is in memory, and batches are throttled until the disk has room; free some, or \
             lower --retention-bytes"
        );
        let create = || prepare(Database::builder().create_with_backend(InMemoryBackend::new())?);
        let (db, _) = create().map_err(|e| classify(path, e))?;
        let db = RwLock::new(Some(db));
        Ok((Self { path: path.to_owned(), is_in_memory: true.into(), memory_bytes: 0.into(), db }, true))
    }

    /// Reports whether the index is in memory because the disk was full.
    pub(super) fn is_in_memory(&self) -> bool {
        self.is_in_memory.load(Ordering::Acquire)
    }

    /// Reports whether an index in memory takes `bytes` or more. One on the disk takes none.
    pub(super) fn is_memory_full(&self, bytes: u64) -> bool {
        self.is_in_memory() && self.memory_bytes.load(Ordering::Relaxed) >= bytes
    }

    /// Moves an index from memory to the disk, if there is room. A file from before counts as newer than the memory.
    /// Afterwards, the caller compares the index with the objects.
    pub(super) fn move_to_disk(&self) -> Result<(), IndexError> {
        let (file, is_new) = open_database(&self.path)?;
        let mut guard = self.db.write();
        if is_new && let Some(memory) = guard.as_ref() {
            copy(memory, &file).map_err(|e| self.error(e))?;
        }
        *guard = Some(file);
        self.is_in_memory.store(false, Ordering::Release);
        tracing::info!("the disk has room again: the index is on the disk");
        Ok(())
    }

    /// Forgets deleted batches.
    pub(super) fn forget(&self, batches: &[(Ulid, u64)]) -> Result<(), IndexError> {
        let guard = self.db.read();
        let db = guard.as_ref().ok_or(IndexError::Closed)?;
        let run = || -> Result<(), redb::Error> {
            let txn = db.begin_write()?;
            hidden::forget(&txn, batches)?;
            Ok(txn.commit()?)
        };
        run().map_err(|error| self.error(error))
    }

    pub(super) fn read<T>(
        &self,
        f: impl FnOnce(&ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, IndexError> {
        let guard = self.db.read();
        let db = guard.as_ref().ok_or(IndexError::Closed)?;
        let run = || f(&db.begin_read()?);
        run().map_err(|e| self.error(e))
    }

    /// Applies a change durably, or not at all. Returns for each added entry whether it is the first of its window.
    /// Opens the file again after a failure, as redb requires.
    pub(super) fn commit(&self, change: &IndexChange) -> Result<Vec<bool>, IndexError> {
        {
            let guard = self.db.read();
            if let Some(db) = guard.as_ref() {
                match apply(db, change) {
                    Ok(done) => {
                        self.count_memory(change);
                        return Ok(done);
                    }
                    Err(error) => {
                        drop(guard);
                        self.reopen();
                        return Err(self.error(error));
                    }
                }
            }
        }
        self.reopen();
        let guard = self.db.read();
        apply(guard.as_ref().ok_or(IndexError::Closed)?, change).map_err(|e| self.error(e))
    }

    fn count_memory(&self, change: &IndexChange) {
        if self.is_in_memory() {
            // Only the writer commits, so nothing changes in between.
            let used = self.memory_bytes.load(Ordering::Relaxed) + change.index_bytes();
            let freed = change.remove.len() as u64 * ROW_BYTES;
            self.memory_bytes.store(used.saturating_sub(freed), Ordering::Relaxed);
        }
    }

    fn reopen(&self) {
        if self.is_in_memory() {
            return;
        }
        let mut guard = self.db.write();
        *guard = None;
        match open_database(&self.path) {
            Ok((db, _)) => *guard = Some(db),
            Err(error) => tracing::warn!(%error, "cannot open the index again yet"),
        }
    }

    fn error(&self, error: redb::Error) -> IndexError {
        classify(&self.path, error)
    }

    /// Reports for each id whether it is stored, or was until a deletion. A batch that an agent sends again does not come back.
    pub(super) fn knows(&self, ids: &[Ulid]) -> Result<Vec<bool>, IndexError> {
        let stored = self.contains(ids.iter().copied())?;
        let hidden = self.read(|txn| hidden::are_hidden(txn, ids.iter().copied()))?;
        Ok(stored.into_iter().zip(hidden).map(|(stored, hidden)| stored || hidden).collect())
    }

    /// Reports for each id whether it is stored.
    pub(super) fn contains(&self, ids: impl IntoIterator<Item = Ulid>) -> Result<Vec<bool>, IndexError> {
        self.read(|txn| {
            let table = txn.open_table(IDS)?;
            ids.into_iter().map(|id| Ok(table.get(id.0)?.is_some())).collect()
        })
    }

    /// Returns the entry of an id.
    pub(super) fn by_id(&self, id: Ulid) -> Result<Option<StoredProfile>, IndexError> {
        self.read(|txn| {
            let Some((series, start_ms)) = txn.open_table(IDS)?.get(id.0)?.map(|v| v.value()) else {
                return Ok(None);
            };
            let table = txn.open_table(PROFILES)?;
            let row = table.get((series, start_ms, id.0))?;
            Ok(row.and_then(|row| entry((series, start_ms, id.0), row.value())))
        })
    }

    /// Calls `each` for every profile of these series that starts in the range, series by series and each in the order of
    /// time, until `each` returns false.
    pub(super) fn scan(
        &self,
        series: &[u64],
        from_ms: u64,
        until_ms: u64,
        mut each: impl FnMut(StoredProfile) -> bool,
    ) -> Result<(), IndexError> {
        self.scan_rows(series, from_ms, until_ms, |entry| !entry.has_profile() || each(entry))
    }

    /// Calls `each` for every batch as [`Index::scan`] does, also for those that carried only a ledger.
    pub(super) fn scan_rows(
        &self,
        series: &[u64],
        from_ms: u64,
        until_ms: u64,
        mut each: impl FnMut(StoredProfile) -> bool,
    ) -> Result<(), IndexError> {
        self.read(|txn| {
            let table = txn.open_table(PROFILES)?;
            for &series in series {
                for found in table.range((series, from_ms, 0)..(series, until_ms, 0))? {
                    let (key, row) = found?;
                    if let Some(entry) = entry(key.value(), row.value())
                        && !each(entry)
                    {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }

    /// Returns up to `limit` profiles of these series that start in the range, newest first. `before` skips to the profiles
    /// that are older than this one.
    pub(super) fn newest(
        &self,
        of: &HashSet<u64>,
        from_ms: u64,
        until_ms: u64,
        before: Option<ObjectKey>,
        limit: usize,
    ) -> Result<Vec<StoredProfile>, IndexError> {
        let end = before.map_or((until_ms, 0), |b| (b.start_ms, b.id.0).min((until_ms, 0)));
        self.read(|txn| {
            let mut newest = Vec::new();
            if (from_ms, 0) >= end {
                return Ok(newest);
            }
            let profiles = txn.open_table(PROFILES)?;
            for found in txn.open_table(TIMES)?.range((from_ms, 0)..end)?.rev() {
                if newest.len() >= limit {
                    break;
                }
                let (key, value) = found?;
                let (start_ms, id) = key.value();
                let series = value.value().0;
                if of.contains(&series)
                    && let Some(row) = profiles.get((series, start_ms, id))?
                {
                    newest.extend(
                        entry((series, start_ms, id), row.value()).filter(StoredProfile::has_profile),
                    );
                }
            }
            Ok(newest)
        })
    }

    /// Returns up to `limit` of the oldest entries that start before `until_ms`.
    pub(super) fn oldest(&self, until_ms: u64, limit: usize) -> Result<Vec<IndexedObject>, IndexError> {
        self.read(|txn| {
            let profiles = txn.open_table(PROFILES)?;
            let times = txn.open_table(TIMES)?;
            let oldest = times.range(..(until_ms, 0))?.take(limit);
            oldest
                .map(|found| {
                    let (key, value) = found?;
                    let entry = TimeEntry::new(key.value(), value.value());
                    if let Some(outside) = entry.outside_segments() {
                        return Ok(outside);
                    }
                    let row = profiles.get((entry.series, entry.key.start_ms, entry.key.id.0))?;
                    let segment = row.and_then(|row| ProfileRow::decode(row.value()).ok()?.segment());
                    Ok(entry.in_segment(segment))
                })
                .collect()
        })
    }

    /// Returns up to `limit` of the oldest entries whose profiles have objects of their own.
    pub(super) fn oldest_outside_segments(&self, limit: usize) -> Result<Vec<IndexedObject>, IndexError> {
        let mut oldest = Vec::new();
        self.read(|txn| {
            for found in txn.open_table(TIMES)?.iter()? {
                let (key, value) = found?;
                oldest.extend(TimeEntry::new(key.value(), value.value()).outside_segments());
                if oldest.len() >= limit {
                    break;
                }
            }
            Ok(())
        })?;
        Ok(oldest)
    }

    /// Returns the entries of a segment.
    pub(super) fn of_segment(&self, segment: Ulid) -> Result<Vec<IndexedObject>, IndexError> {
        self.read(|txn| {
            let times = txn.open_table(TIMES)?;
            let rows = txn.open_table(SEGMENT_ROWS)?;
            let rows = rows.range((segment.0, 0)..=(segment.0, u128::MAX))?;
            rows.map(|found| {
                let (key, value) = found?;
                let ((_, id), (series, start_ms)) = (key.value(), value.value());
                let disk_bytes = times.get((start_ms, id))?.map_or(0, |value| value.value().1 & !IN_SEGMENT);
                let key = ObjectKey { start_ms, id: Ulid(id) };
                Ok(IndexedObject { series, key, disk_bytes, segment: Some(segment) })
            })
            .collect()
        })
    }

    /// Returns the known segments of some hours, in the order of their ids.
    pub(super) fn segments(&self, hours: std::ops::Range<u64>) -> Result<Vec<IndexedSegment>, IndexError> {
        let bound = |hour: u64| {
            // Ids end before the largest hours.
            let ms = hour.saturating_mul(HOUR_MS);
            if ms >= 1 << 48 { u128::MAX } else { Ulid::from_parts(ms, 0).0 }
        };
        self.read(|txn| {
            let table = txn.open_table(SEGMENTS)?;
            let found = table.range(bound(hours.start)..bound(hours.end))?;
            found
                .map(|found| {
                    let (id, value) = found?;
                    let (disk_bytes, rows) = value.value();
                    Ok(IndexedSegment { id: Ulid(id.value()), disk_bytes, rows })
                })
                .collect()
        })
    }

    /// Calls `each` for every entry that starts in the range, in the order of time.
    pub(super) fn between(
        &self,
        from_ms: u64,
        until_ms: u64,
        mut each: impl FnMut(TimeEntry),
    ) -> Result<(), IndexError> {
        self.read(|txn| {
            for found in txn.open_table(TIMES)?.range((from_ms, 0)..(until_ms, 0))? {
                let (key, value) = found?;
                each(TimeEntry::new(key.value(), value.value()));
            }
            Ok(())
        })
    }

    /// Returns the hours that have segments, or entries that start then, counted from 1970.
    pub(super) fn hours(&self) -> Result<Vec<u64>, IndexError> {
        self.read(|txn| {
            let times = txn.open_table(TIMES)?;
            let mut hours = Vec::new();
            let mut from_ms = 0;
            while let Some(found) = times.range((from_ms, 0)..)?.next() {
                let (start_ms, _) = found?.0.value();
                hours.push(start_ms / HOUR_MS);
                from_ms = (start_ms / HOUR_MS + 1) * HOUR_MS;
            }
            let segments = txn.open_table(SEGMENTS)?;
            let mut from = 0;
            while let Some(found) = segments.range(from..)?.next() {
                let hour = segment_hour(Ulid(found?.0.value()));
                hours.push(hour);
                from = Ulid::from_parts((hour + 1) * HOUR_MS, 0).0;
            }
            Ok(hours)
        })
    }

    /// Returns every series with its labels.
    pub(super) fn series(&self) -> Result<Vec<(u64, Labels)>, IndexError> {
        self.read(|txn| {
            txn.open_table(SERIES)?
                .iter()?
                .map(|found| {
                    let (key, value) = found?;
                    let labels = SeriesLabels::decode(value.value())
                        .map_err(|e| redb::Error::Corrupted(format!("series {}: {e}", key.value())))?;
                    Ok((key.value(), labels.labels))
                })
                .collect()
        })
    }
}

fn entry((series, start_ms, id): (u64, u64, u128), row: &[u8]) -> Option<StoredProfile> {
    let row = ProfileRow::decode(row).ok()?;
    Some(StoredProfile { series, key: ObjectKey { start_ms, id: Ulid(id) }, row })
}

fn window_of(row: &ProfileRow) -> Option<u128> {
    row.window.as_slice().try_into().ok().map(u128::from_be_bytes)
}

fn apply(db: &Database, change: &IndexChange) -> Result<Vec<bool>, redb::Error> {
    let txn = db.begin_write()?;
    let mut first_of_window = Vec::with_capacity(change.add.len());
    {
        let mut profiles = txn.open_table(PROFILES)?;
        let mut ids = txn.open_table(IDS)?;
        let mut times = txn.open_table(TIMES)?;
        let mut series = txn.open_table(SERIES)?;
        let mut windows = txn.open_table(WINDOWS)?;
        let mut segments = txn.open_table(SEGMENTS)?;
        let mut segment_rows = txn.open_table(SEGMENT_ROWS)?;
        // By how much the number of rows of a segment changes.
        let mut changes: HashMap<u128, i64> = HashMap::new();
        for (id, disk_bytes) in &change.add_segments {
            if segments.get(id.0)?.is_none() {
                segments.insert(id.0, (*disk_bytes, 0))?;
            }
        }
        for (id, labels) in &change.add_series {
            series.insert(id, SeriesLabels { labels: labels.clone() }.encode_to_vec().as_slice())?;
        }
        for AddedProfile { profile: StoredProfile { series, key, row }, disk_bytes } in &change.add {
            let ObjectKey { start_ms, id } = *key;
            profiles.insert((*series, start_ms, id.0), row.encode_to_vec().as_slice())?;
            ids.insert(id.0, (*series, start_ms))?;
            let mut disk_bytes = *disk_bytes;
            if let Some(segment) = row.segment() {
                segment_rows.insert((segment.0, id.0), (*series, start_ms))?;
                *changes.entry(segment.0).or_default() += 1;
                disk_bytes |= IN_SEGMENT;
            }
            times.insert((start_ms, id.0), (*series, disk_bytes))?;
            let first = match window_of(row) {
                Some(window) if windows.get(window)?.is_none() => {
                    windows.insert(window, id.0)?;
                    true
                }
                _ => false,
            };
            first_of_window.push(first);
        }
        for (id, from) in &change.moved {
            if segment_rows.remove((from.0, id.0))?.is_some() {
                *changes.entry(from.0).or_default() -= 1;
            }
        }
        for &(series, ObjectKey { start_ms, id }) in &change.remove {
            let removed = profiles.remove((series, start_ms, id.0))?;
            let removed = removed.and_then(|row| ProfileRow::decode(row.value()).ok());
            if let Some(segment) = removed.as_ref().and_then(ProfileRow::segment)
                && segment_rows.remove((segment.0, id.0))?.is_some()
            {
                *changes.entry(segment.0).or_default() -= 1;
            }
            if let Some(window) = removed.as_ref().and_then(window_of)
                && windows.get(window)?.is_some_and(|by| by.value() == id.0)
            {
                windows.remove(window)?;
            }
            ids.remove(id.0)?;
            times.remove((start_ms, id.0))?;
        }
        for id in &change.remove_series {
            series.remove(id)?;
        }
        for (segment, by) in changes {
            let known = segments.get(segment)?.map(|value| value.value());
            if let Some((disk_bytes, rows)) = known {
                segments.insert(segment, (disk_bytes, rows.saturating_add_signed(by)))?;
            }
        }
        for id in &change.remove_segments {
            segments.remove(id.0)?;
        }
    }
    copies::apply(&txn, &change.copies, change.remove.iter().map(|(_, key)| key.id))?;
    hidden::apply(&txn, change)?;
    txn.commit()?;
    Ok(first_of_window)
}

fn open_database(path: &Path) -> Result<(Database, bool), IndexError> {
    let is_new = fs::metadata(path).map_or(true, |meta| meta.len() == 0);
    let open = || prepare(Database::builder().set_cache_size(CACHE_BYTES).create(path)?);
    open().map_err(|e| {
        if is_new {
            // Half a file would count as corrupt.
            let _ = fs::remove_file(path);
        }
        classify(path, e)
    })
}

/// Creates the tables of a new database, and checks the version of an old one. The flag reports a new one.
fn prepare(db: Database) -> Result<(Database, bool), redb::Error> {
    let txn = db.begin_write()?;
    let layout = {
        let mut meta = txn.open_table(META)?;
        let layout = meta.get("layout")?.map(|v| v.value());
        meta.insert("layout", LAYOUT)?;
        txn.open_table(PROFILES)?;
        txn.open_table(IDS)?;
        txn.open_table(TIMES)?;
        txn.open_table(SERIES)?;
        txn.open_table(WINDOWS)?;
        txn.open_table(SEGMENTS)?;
        txn.open_table(SEGMENT_ROWS)?;
        layout
    };
    match layout {
        Some(LAYOUT) => txn.abort()?,
        None | Some(LAYOUT_WITHOUT_SEGMENTS) => txn.commit()?,
        Some(other) => {
            txn.abort()?;
            return Err(redb::Error::Corrupted(format!("layout {other}, this version writes {LAYOUT}")));
        }
    }
    Ok((db, layout.is_none()))
}

/// Copies all tables into a new database.
fn copy(from: &Database, to: &Database) -> Result<(), redb::Error> {
    let (read, write) = (from.begin_read()?, to.begin_write()?);
    macro_rules! copy_tables {
        ($($table:ident),+) => {$({
            let mut out = write.open_table($table)?;
            for found in read.open_table($table)?.iter()? {
                let (key, value) = found?;
                out.insert(key.value(), value.value())?;
            }
        })+};
    }
    copy_tables!(PROFILES, IDS, TIMES, SERIES, WINDOWS, SEGMENTS, SEGMENT_ROWS);
    copies::copy(&read, &write)?;
    hidden::copy(&read, &write)?;
    write.commit()?;
    Ok(())
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn classify(path: &Path, error: redb::Error) -> IndexError {
    match error {
        redb::Error::Io(e)
            if matches!(e.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
        {
            IndexError::Corrupt { path: path.to_owned(), what: e.to_string() }
        }
        redb::Error::Io(e) => IndexError::Io(e),
        redb::Error::PreviousIo | redb::Error::DatabaseClosed => IndexError::Closed,
        other => IndexError::Corrupt { path: path.to_owned(), what: other.to_string() },
    }
}
