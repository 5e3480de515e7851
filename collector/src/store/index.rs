//! The index: what lies where, in one redb file. It holds nothing that the objects do not hold.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock},
};

use prost::Message;
use redb::{Database, ReadTransaction, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use ulid::Ulid;

use super::object::{HOUR_MS, ObjectKey, TypeTotal};

/// series, start in ms, id -> [`Row`]
const PROFILES: TableDefinition<'_, (u64, u64, u128), &[u8]> = TableDefinition::new("profiles");
/// id -> series, start in ms
const IDS: TableDefinition<'_, u128, (u64, u64)> = TableDefinition::new("ids");
/// start in ms, id -> series, bytes of the object
const TIMES: TableDefinition<'_, (u64, u128), (u64, u64)> = TableDefinition::new("times");
/// series -> [`SeriesLabels`]
const SERIES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("series");
/// window id -> the id of the batch that brought its ledger
const WINDOWS: TableDefinition<'_, u128, u128> = TableDefinition::new("windows");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Counts the layouts of the tables above; another one is not read but rebuilt.
const LAYOUT: u64 = 1;
/// Pages of the index that redb may keep in memory.
const CACHE_BYTES: usize = 32 << 20;

/// What is wrong with the index.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The file cannot be read as an index; it can be rebuilt.
    #[error("the index {path} is corrupt ({what}); it will be rebuilt from the objects at the next start")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// As redb says it.
        what: String,
    },
    /// It was closed after a failure and could not be opened again yet.
    #[error("the index is closed after a failed write and will be opened again as soon as the disk allows")]
    Closed,
    /// The disk failed.
    #[error("the index could not be read or written: {0}; see that its disk has room and is healthy")]
    Io(#[source] io::Error),
}

/// One stored batch.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Row {
    #[prost(uint64, tag = "1")]
    pub(crate) duration_ms: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) samples: u64,
    /// Of the profile. 0: the batch only carried a ledger.
    #[prost(uint64, tag = "3")]
    pub(crate) bytes: u64,
    #[prost(message, repeated, tag = "4")]
    pub(crate) types: Vec<TypeTotal>,
    #[prost(string, tag = "5")]
    pub(crate) rule_id: String,
    #[prost(uint64, tag = "6")]
    pub(crate) revision: u64,
    #[prost(string, tag = "7")]
    pub(crate) reason: String,
    /// A ULID, big endian; empty: none.
    #[prost(bytes = "vec", tag = "8")]
    pub(crate) window: Vec<u8>,
    /// Of the object, metadata included.
    #[prost(uint64, tag = "9")]
    pub(crate) object_bytes: u64,
}

/// A row and where it lies.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) series: u64,
    pub(crate) key: ObjectKey,
    pub(crate) row: Row,
}

#[derive(Clone, PartialEq, Message)]
struct SeriesLabels {
    #[prost(btree_map = "string, string", tag = "1")]
    labels: std::collections::BTreeMap<String, String>,
}

/// What one commit changes.
#[derive(Default)]
pub(crate) struct Change {
    pub(crate) add: Vec<Entry>,
    pub(crate) add_series: Vec<(u64, gannet_proto::labels::Labels)>,
    pub(crate) remove: Vec<(u64, ObjectKey)>,
    pub(crate) remove_series: Vec<u64>,
}

pub(crate) struct Index {
    path: PathBuf,
    /// Empty after a failed write until it could be opened again. Readers hold the lock only while they read.
    db: RwLock<Option<Database>>,
}

impl Index {
    /// Opens or makes the index; the flag says that it is new. One that is corrupt is moved aside first.
    pub(crate) fn open(path: &Path) -> Result<(Self, bool), IndexError> {
        let opened = |db, new| (Self { path: path.to_owned(), db: RwLock::new(Some(db)) }, new);
        let existed = path.exists();
        match open_database(path) {
            Ok((db, new)) => Ok(opened(db, new || !existed)),
            Err(IndexError::Corrupt { what, .. }) => {
                let aside = path.with_extension("redb.corrupt");
                tracing::warn!(
                    path = %path.display(), aside = %aside.display(), what,
                    "the index is corrupt: moved aside, rebuilding it from the objects"
                );
                fs::rename(path, &aside).map_err(IndexError::Io)?;
                let (db, _) = open_database(path)?;
                Ok(opened(db, true))
            }
            Err(error) => Err(error),
        }
    }

    fn read<T>(&self, f: impl FnOnce(&ReadTransaction) -> Result<T, redb::Error>) -> Result<T, IndexError> {
        let guard = self.db.read().unwrap_or_else(PoisonError::into_inner);
        let db = guard.as_ref().ok_or(IndexError::Closed)?;
        let run = || f(&db.begin_read()?);
        run().map_err(|e| self.error(e))
    }

    /// Applies a change durably, or not at all. After a failure the file is opened anew, as redb asks for.
    /// Returns for each added entry whether it is the first of its window.
    pub(crate) fn commit(&self, change: &Change) -> Result<Vec<bool>, IndexError> {
        {
            let guard = self.db.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(db) = guard.as_ref() {
                match apply(db, change) {
                    Ok(done) => return Ok(done),
                    Err(error) => {
                        drop(guard);
                        self.reopen();
                        return Err(self.error(error));
                    }
                }
            }
        }
        self.reopen();
        let guard = self.db.read().unwrap_or_else(PoisonError::into_inner);
        apply(guard.as_ref().ok_or(IndexError::Closed)?, change).map_err(|e| self.error(e))
    }

    fn reopen(&self) {
        let mut guard = self.db.write().unwrap_or_else(PoisonError::into_inner);
        *guard = None;
        match open_database(&self.path) {
            Ok((db, _)) => *guard = Some(db),
            Err(error) => tracing::warn!(%error, "the index cannot be opened again yet"),
        }
    }

    fn error(&self, error: redb::Error) -> IndexError {
        classify(&self.path, error)
    }

    /// Which of these ids are stored already.
    pub(crate) fn known(&self, ids: impl IntoIterator<Item = Ulid>) -> Result<Vec<bool>, IndexError> {
        self.read(|txn| {
            let table = txn.open_table(IDS)?;
            ids.into_iter().map(|id| Ok(table.get(id.0)?.is_some())).collect()
        })
    }

    pub(crate) fn by_id(&self, id: Ulid) -> Result<Option<Entry>, IndexError> {
        self.read(|txn| {
            let Some((series, start_ms)) = txn.open_table(IDS)?.get(id.0)?.map(|v| v.value()) else {
                return Ok(None);
            };
            let table = txn.open_table(PROFILES)?;
            let row = table.get((series, start_ms, id.0))?;
            Ok(row.and_then(|row| entry((series, start_ms, id.0), row.value())))
        })
    }

    /// Calls `each` for every profile of these series that starts in the range, series by series, each in order of
    /// time, until it says no.
    pub(crate) fn scan(
        &self,
        series: &[u64],
        from_ms: u64,
        until_ms: u64,
        mut each: impl FnMut(Entry) -> bool,
    ) -> Result<(), IndexError> {
        self.read(|txn| {
            let table = txn.open_table(PROFILES)?;
            for &series in series {
                for found in table.range((series, from_ms, 0)..(series, until_ms, 0))? {
                    let (key, row) = found?;
                    if let Some(entry) = entry(key.value(), row.value())
                        && entry.row.bytes > 0
                        && !each(entry)
                    {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }

    /// Everything that starts in a range, newest first, until `each` says no. It is given the series, the key, and a
    /// way to get at the whole entry: calling the index again from inside could wait for itself. `before`: only what
    /// is older than this one.
    pub(crate) fn scan_newest(
        &self,
        from_ms: u64,
        until_ms: u64,
        before: Option<ObjectKey>,
        mut each: impl FnMut(u64, ObjectKey, &dyn Fn() -> Option<Entry>) -> bool,
    ) -> Result<(), IndexError> {
        let end = before.map_or((until_ms, 0), |b| (b.start_ms, b.id.0).min((until_ms, 0)));
        self.read(|txn| {
            if (from_ms, 0) >= end {
                return Ok(());
            }
            let profiles = txn.open_table(PROFILES)?;
            for found in txn.open_table(TIMES)?.range((from_ms, 0)..end)?.rev() {
                let (key, value) = found?;
                let (start_ms, id) = key.value();
                let series = value.value().0;
                let get = || {
                    let row = profiles.get((series, start_ms, id)).ok()??;
                    entry((series, start_ms, id), row.value())
                };
                if !each(series, ObjectKey { start_ms, id: Ulid(id) }, &get) {
                    break;
                }
            }
            Ok(())
        })
    }

    /// The oldest entries: series, key, bytes of the object.
    pub(crate) fn oldest(&self, limit: usize) -> Result<Vec<(u64, ObjectKey, u64)>, IndexError> {
        self.read(|txn| {
            txn.open_table(TIMES)?
                .iter()?
                .take(limit)
                .map(|found| {
                    let (key, value) = found?;
                    let ((start_ms, id), (series, bytes)) = (key.value(), value.value());
                    Ok((series, ObjectKey { start_ms, id: Ulid(id) }, bytes))
                })
                .collect()
        })
    }

    /// The entries of a span of time, in its order: series, key, bytes of the object.
    pub(crate) fn between(
        &self,
        from_ms: u64,
        until_ms: u64,
        mut each: impl FnMut(u64, ObjectKey, u64),
    ) -> Result<(), IndexError> {
        self.read(|txn| {
            for found in txn.open_table(TIMES)?.range((from_ms, 0)..(until_ms, 0))? {
                let (key, value) = found?;
                let ((start_ms, id), (series, bytes)) = (key.value(), value.value());
                each(series, ObjectKey { start_ms, id: Ulid(id) }, bytes);
            }
            Ok(())
        })
    }

    /// The hours that have entries.
    pub(crate) fn hours(&self) -> Result<Vec<u64>, IndexError> {
        self.read(|txn| {
            let times = txn.open_table(TIMES)?;
            let mut hours = Vec::new();
            let mut from_ms = 0;
            while let Some(found) = times.range((from_ms, 0)..)?.next() {
                let (start_ms, _) = found?.0.value();
                hours.push(start_ms / HOUR_MS);
                from_ms = (start_ms / HOUR_MS + 1) * HOUR_MS;
            }
            Ok(hours)
        })
    }

    /// Every series.
    pub(crate) fn series(&self) -> Result<Vec<(u64, gannet_proto::labels::Labels)>, IndexError> {
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

fn entry((series, start_ms, id): (u64, u64, u128), row: &[u8]) -> Option<Entry> {
    let row = Row::decode(row).ok()?;
    Some(Entry { series, key: ObjectKey { start_ms, id: Ulid(id) }, row })
}

fn window_of(row: &Row) -> Option<u128> {
    row.window.as_slice().try_into().ok().map(u128::from_be_bytes)
}

fn apply(db: &Database, change: &Change) -> Result<Vec<bool>, redb::Error> {
    let txn = db.begin_write()?;
    let mut first_of_window = Vec::with_capacity(change.add.len());
    {
        let mut profiles = txn.open_table(PROFILES)?;
        let mut ids = txn.open_table(IDS)?;
        let mut times = txn.open_table(TIMES)?;
        let mut series = txn.open_table(SERIES)?;
        let mut windows = txn.open_table(WINDOWS)?;
        for (id, labels) in &change.add_series {
            series.insert(id, SeriesLabels { labels: labels.clone() }.encode_to_vec().as_slice())?;
        }
        for Entry { series, key, row } in &change.add {
            let ObjectKey { start_ms, id } = *key;
            profiles.insert((*series, start_ms, id.0), row.encode_to_vec().as_slice())?;
            ids.insert(id.0, (*series, start_ms))?;
            times.insert((start_ms, id.0), (*series, row.object_bytes))?;
            let first = match window_of(row) {
                Some(window) if windows.get(window)?.is_none() => {
                    windows.insert(window, id.0)?;
                    true
                }
                _ => false,
            };
            first_of_window.push(first);
        }
        for &(series, ObjectKey { start_ms, id }) in &change.remove {
            let removed = profiles.remove((series, start_ms, id.0))?;
            let window = removed.and_then(|row| window_of(&Row::decode(row.value()).ok()?));
            if let Some(window) = window
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
    }
    txn.commit()?;
    Ok(first_of_window)
}

fn open_database(path: &Path) -> Result<(Database, bool), IndexError> {
    let open = || -> Result<(Database, bool), redb::Error> {
        let db = Database::builder().set_cache_size(CACHE_BYTES).create(path)?;
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
            layout
        };
        match layout {
            Some(LAYOUT) => txn.abort()?,
            None => txn.commit()?,
            Some(other) => {
                txn.abort()?;
                return Err(redb::Error::Corrupted(format!("layout {other}, this version writes {LAYOUT}")));
            }
        }
        Ok((db, layout.is_none()))
    };
    open().map_err(|e| classify(path, e))
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
