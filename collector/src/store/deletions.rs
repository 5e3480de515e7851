//! The deletions that are not carried out yet, and their effect on the index: deleted profiles lose their rows at once, so no query
//! finds them. The module `carry_out` then removes them from the objects.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;
use ulid::Ulid;

use super::{
    Chosen, Store, StoreError,
    change::IndexChange,
    hidden,
    object::{HOUR_MS, ObjectName, segment_hour},
    row::{IndexedObject, StoredProfile},
    tombstone::Tombstone,
};
use crate::time;

/// Rows that one commit hides. The writer stores batches between two commits.
const HIDE_CHUNK: usize = 1024;
/// Deleted batches that one step forgets.
const FORGET_CHUNK: usize = 4096;

/// Totals of the profiles that a deletion takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DeletionCounts {
    pub(crate) profiles: u64,
    pub(crate) samples: u64,
    /// Compressed size of the profiles.
    pub(crate) bytes: u64,
    pub(crate) series: u64,
    /// Objects that cannot be read. The deletion does not know their profiles.
    pub(crate) unreadable: u64,
}

/// A known deletion.
struct Known {
    tombstone: Arc<Tombstone>,
    /// Its profiles have no rows any more.
    is_hidden: bool,
}

/// The known deletions. The writer changes them.
#[derive(Default)]
pub(super) struct Deletions {
    known: RwLock<BTreeMap<Ulid, Known>>,
    /// Deletions that this process took, and so carries out.
    own: Mutex<HashSet<Ulid>>,
    /// Deletions of a bucket for which this process has marked that the tables are clean.
    marked: Mutex<HashSet<Ulid>>,
    /// Number of changes of the deleted batches since the start.
    changes: AtomicU64,
    /// The number by which the tables had lost the rows of all deleted batches.
    cleaned: AtomicU64,
    has_table_thread: AtomicBool,
    /// Time of the newest deletion, and of the newest segment of this collector, in milliseconds.
    newest_ms: AtomicU64,
    newest_segment_ms: AtomicU64,
    /// Wakes the task that carries deletions out.
    pub(super) wake: Notify,
}

impl Deletions {
    /// Returns all known deletions, the oldest first.
    pub(super) fn all(&self) -> Vec<Arc<Tombstone>> {
        self.known.read().values().map(|known| Arc::clone(&known.tombstone)).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.known.read().is_empty()
    }

    pub(super) fn knows(&self, id: Ulid) -> bool {
        self.known.read().contains_key(&id)
    }

    /// Adds a deletion whose profiles still have rows.
    pub(super) fn add(&self, tombstone: Tombstone) {
        self.newest_ms.fetch_max(tombstone.id.timestamp_ms(), Ordering::AcqRel);
        let known = Known { tombstone: Arc::new(tombstone), is_hidden: false };
        self.known.write().entry(known.tombstone.id).or_insert(known);
        self.note_change();
    }

    /// Removes a deletion that is carried out.
    pub(super) fn remove(&self, id: Ulid) {
        self.known.write().remove(&id);
        self.own.lock().remove(&id);
        self.marked.lock().remove(&id);
    }

    /// Notes that this process carries a deletion out.
    pub(super) fn own(&self, id: Ulid) {
        self.own.lock().insert(id);
    }

    /// Returns the deletion with this id if this process carries it out.
    pub(super) fn is_own(&self, id: Ulid) -> bool {
        self.own.lock().contains(&id)
    }

    /// Returns the oldest deletion whose profiles still have rows.
    pub(super) fn next_to_hide(&self) -> Option<Arc<Tombstone>> {
        let known = self.known.read();
        let next = known.values().find(|known| !known.is_hidden)?;
        Some(Arc::clone(&next.tombstone))
    }

    fn set_hidden(&self, id: Ulid) {
        if let Some(known) = self.known.write().get_mut(&id) {
            known.is_hidden = true;
        }
    }

    pub(super) fn note_change(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.wake.notify_one();
    }

    /// Returns an id for a deletion: later than each segment of this collector.
    pub(super) fn new_id(&self, newest_stored_ms: u64) -> Ulid {
        let newest = self.newest_ms.load(Ordering::Acquire);
        let at_ms =
            [time::now_ms(), newest, newest_stored_ms, self.newest_segment_ms.load(Ordering::Acquire)];
        Ulid::from_parts(at_ms.into_iter().max().unwrap_or(0), Ulid::new().random())
    }

    /// Returns an id for a new segment: later than each known deletion, also if a clock was set back.
    pub(super) fn new_segment_id(&self) -> Ulid {
        let (id, newest) = (Ulid::new(), self.newest_ms.load(Ordering::Acquire));
        let id = if id.timestamp_ms() > newest { id } else { Ulid::from_parts(newest + 1, id.random()) };
        self.newest_segment_ms.fetch_max(id.timestamp_ms(), Ordering::AcqRel);
        id
    }

    /// Reports whether a thread removes deleted rows from the tables, and whether it has removed all.
    pub(super) fn tables(&self) -> (bool, bool) {
        let is_clean = self.cleaned.load(Ordering::Acquire) == self.changes.load(Ordering::Acquire);
        (self.has_table_thread.load(Ordering::Acquire), is_clean)
    }
}

/// The effect of deletions on the index. All of these are blocking.
impl Store {
    /// Calls `each` for every row that a deletion of these profiles takes.
    fn scan_doomed(
        &self,
        of: &Chosen,
        mut each: impl FnMut(StoredProfile) -> bool,
    ) -> Result<(), StoreError> {
        let series = self.series(&of.selector, of.from_ms, of.until_ms);
        let series: Vec<u64> = series.into_iter().map(|series| series.id).collect();
        Ok(self.index.scan_rows(&series, of.from_ms, of.until_ms, &mut each)?)
    }

    /// Returns the totals of the profiles that a deletion would take now.
    pub(crate) fn count(&self, of: &Chosen) -> Result<DeletionCounts, StoreError> {
        let (mut counts, mut series) = (DeletionCounts::default(), HashSet::new());
        self.scan_doomed(of, |entry| {
            if entry.has_profile() {
                counts.profiles += 1;
                counts.samples += entry.row.samples;
                counts.bytes += entry.row.bytes;
                series.insert(entry.series);
            }
            true
        })?;
        counts.series = series.len() as u64;
        counts.unreadable = self.state.read().unreadable_count() as u64;
        Ok(counts)
    }

    /// Removes the rows of some profiles of a deletion. Reports whether all are removed.
    pub(super) fn hide(&self, tombstone: &Tombstone) -> Result<bool, StoreError> {
        let mut rows: Vec<StoredProfile> = Vec::new();
        self.scan_doomed(&tombstone.chosen(), |entry| {
            if tombstone.is_after(entry.row.segment()) {
                rows.push(entry);
            }
            rows.len() < HIDE_CHUNK
        })?;
        if rows.is_empty() {
            self.deletions.set_hidden(tombstone.id);
            self.update_size_metrics();
            return Ok(true);
        }
        let profiles = rows.iter().filter(|entry| entry.has_profile()).count();
        let hide = rows.iter().map(|entry| (entry.key.id, entry.key.start_ms)).collect();
        let doomed: BTreeSet<(u64, ObjectName)> = rows.iter().map(object_of).collect();
        let objects: Vec<IndexedObject> = rows.into_iter().map(|entry| self.indexed(entry)).collect();
        let emptied = self.state.read().emptied_by(&objects);
        let change = IndexChange {
            hide,
            doom: doomed.into_iter().collect(),
            ..IndexChange::removing(&objects, &emptied, &[])
        };
        self.index.commit(&change)?;
        self.state.write().remove(&objects, &emptied, &[]);
        self.metrics.profiles_deleted.inc_by(profiles as u64);
        self.deletions.note_change();
        Ok(false)
    }

    fn indexed(&self, entry: StoredProfile) -> IndexedObject {
        let (series, key, segment) = (entry.series, entry.key, entry.row.segment());
        let disk_bytes = self.added(series, key, entry.row).disk_bytes;
        IndexedObject { series, key, disk_bytes, segment }
    }

    /// Hides all profiles of all known deletions, at the start.
    pub(super) fn hide_all(&self) -> Result<(), StoreError> {
        while let Some(tombstone) = self.deletions.next_to_hide() {
            self.hide(&tombstone)?;
        }
        // Those that an earlier run hid.
        self.deletions.note_change();
        Ok(())
    }

    /// Reads deletions in the directory of an hour that this collector does not know.
    pub(super) fn load_deletions(&self, ids: &[Ulid]) -> Result<(), StoreError> {
        for id in ids.iter().filter(|id| !self.deletions.knows(**id)) {
            if let Some(tombstone) = self.runtime.block_on(Tombstone::read(&self.objects, *id))? {
                self.deletions.add(tombstone);
            }
        }
        self.update_size_metrics();
        Ok(())
    }

    /// Forgets deleted batches that are older than the retention: no agent can send them again.
    pub(super) fn forget_hidden(&self, cutoff_ms: u64) -> Result<(), StoreError> {
        let old = self.index.read(|txn| hidden::between(txn, 0..cutoff_ms, FORGET_CHUNK))?;
        if !old.is_empty() {
            self.index.forget(&old)?;
        }
        Ok(())
    }
}

/// Returns the object of a row.
fn object_of(entry: &StoredProfile) -> (u64, ObjectName) {
    match entry.row.segment() {
        Some(segment) => (segment_hour(segment), ObjectName::Segment(segment)),
        None => (entry.key.hour(), ObjectName::Profile(entry.key.id)),
    }
}

/// For the services and the tables. Blocking but for the first ones.
impl Store {
    /// Returns the hours of the directories with objects that hold deleted profiles.
    pub(super) fn doomed_hours(&self) -> Result<Vec<u64>, StoreError> {
        Ok(self.index.read(hidden::doomed_hours)?)
    }

    /// Tells the other collectors of a bucket of which deletions the tables have no profile any more. The caller writes the tables.
    pub(crate) fn mark_clean_tables(&self) -> Result<(), StoreError> {
        if !self.objects.is_shared() || self.deletions.is_empty() || self.unclean_tables().is_some() {
            return Ok(());
        }
        for of in self.deletions.all() {
            let is_due = of.age() >= self.deletion_margin();
            if is_due && !self.deletions.marked.lock().contains(&of.id) {
                self.runtime.block_on(self.objects.mark_clean_tables(of.id))?;
                self.deletions.marked.lock().insert(of.id);
            }
        }
        Ok(())
    }

    /// Time for which a deletion of a bucket stays in any case, because listings can be late. A directory has none.
    pub(super) fn deletion_margin(&self) -> Duration {
        if self.objects.is_shared() { 2 * self.options.deletion_grace } else { Duration::ZERO }
    }

    /// Returns the deletions that are not carried out yet, the oldest first.
    pub(crate) fn pending_deletions(&self) -> Vec<Arc<Tombstone>> {
        self.deletions.all()
    }

    /// Returns a label of the selector that no stored series has, with the labels that there are.
    pub(crate) fn unknown_label(&self, names: &[&str]) -> Option<(String, Vec<String>)> {
        let mut labels: BTreeSet<String> = BTreeSet::new();
        for series in self.series(&crate::selector::Selector::default(), 0, u64::MAX) {
            for name in series.labels.keys() {
                if !labels.contains(name) {
                    labels.insert(name.clone());
                }
            }
        }
        let unknown = names.iter().find(|name| !labels.contains(**name))?;
        Some(((*unknown).to_owned(), labels.into_iter().collect()))
    }

    /// Notes that a thread removes deleted rows from the tables.
    pub(crate) fn has_table_thread(&self) {
        self.deletions.has_table_thread.store(true, Ordering::Release);
    }

    /// Returns a number that changes with the deleted batches, or `None` while the tables have no row of one.
    pub(crate) fn unclean_tables(&self) -> Option<u64> {
        let changes = self.deletions.changes.load(Ordering::Acquire);
        let is_clean = self.deletions.is_empty() || self.deletions.cleaned.load(Ordering::Acquire) == changes;
        (!is_clean).then_some(changes)
    }

    /// Notes that the tables lost all rows of the batches that were deleted by this number.
    pub(crate) fn set_tables_clean(&self, changes: u64) {
        self.deletions.cleaned.store(changes, Ordering::Release);
        self.deletions.wake.notify_one();
    }

    /// Returns the hours of all deleted batches of the deletions that are not carried out yet.
    pub(crate) fn deleted_hours(&self) -> Result<BTreeSet<u64>, StoreError> {
        let mut hours = BTreeSet::new();
        for tombstone in self.deletions.all() {
            let range = tombstone.from_ms..tombstone.until_ms;
            hours.extend(self.index.read(|txn| hidden::hours(txn, range))?);
        }
        Ok(hours)
    }

    /// Returns the number of deleted batches that start in an hour, up to `limit`.
    pub(crate) fn count_deleted(&self, hour: u64, limit: usize) -> Result<usize, StoreError> {
        let range = hour * HOUR_MS..(hour + 1) * HOUR_MS;
        Ok(self.index.read(|txn| hidden::count(txn, range, limit))?)
    }

    /// Reports for each of these batches whether it is deleted.
    pub(crate) fn are_deleted(&self, ids: &[Ulid]) -> Result<Vec<bool>, StoreError> {
        Ok(self.index.read(|txn| hidden::are_hidden(txn, ids.iter().copied()))?)
    }

    /// Returns up to `limit` deleted batches that start in a range, of which the tables may still have rows.
    pub(crate) fn deleted_between(&self, range: Range<u64>, limit: usize) -> Result<Vec<Ulid>, StoreError> {
        if self.unclean_tables().is_none() {
            return Ok(Vec::new());
        }
        let found = self.index.read(|txn| hidden::between(txn, range, limit))?;
        Ok(found.into_iter().map(|(id, _)| id).collect())
    }

    /// Returns a segment with those that deletions replaced by it. A table that has one of them has its batches.
    pub(crate) fn segment_names(&self, id: Ulid) -> Vec<Ulid> {
        let mut names = vec![id];
        names.extend(self.state.read().origins_of(id));
        names
    }

    /// Reads the segments that deletions made.
    pub(super) fn load_origins(&self) -> Result<(), StoreError> {
        let mut origins: HashMap<Ulid, Vec<Ulid>> = HashMap::new();
        for (segment, origin) in self.index.read(hidden::origins)? {
            origins.entry(segment).or_default().push(origin);
        }
        self.state.write().set_origins(origins);
        Ok(())
    }
}
