//! Makes index and objects agree: completely at the start, and hour by hour while other collectors use the same bucket.

use std::collections::{BTreeSet, HashMap};

use gannet_proto::labels::Labels;
use ulid::Ulid;

use super::{
    Store, StoreError,
    index::{IndexChange, IndexedObject, ProfileRow},
    object::{HOUR_MS, ObjectHead, ObjectKey},
    state::{StoreState, UnreadableObject},
    writer::describe,
};

/// Rows of one repairing commit.
const REPAIR_CHUNK: usize = 4096;
/// The same for an index in memory, whose space is counted behind each.
const MEMORY_CHUNK: usize = 256;
/// Hours before the newest two that each reading of a shared bucket compares, in turn.
const OLD_HOURS: usize = 4;

/// Repairs of one comparison.
#[derive(Default)]
struct Repairs {
    /// Objects that had no row.
    added: u64,
    /// Rows that had no object.
    removed: u64,
    /// Objects that could not be read.
    damaged: u64,
}

/// All of these are blocking, and only the writer calls them once the store serves readers.
impl Store {
    /// Compares all hours: repairs what a crash left, and reads what other collectors did in a bucket since.
    pub(super) fn settle(&self, is_new: bool) -> Result<(), StoreError> {
        let began = std::time::Instant::now();
        let mut repairs = Repairs::default();
        // An index in memory may have room for the newest only.
        for hour in self.hours()?.into_iter().rev() {
            self.settle_hour(hour, &mut repairs)?;
        }
        self.log_left_out();
        let unused = self.state.read().unused_series();
        if !unused.is_empty() {
            self.index.commit(&IndexChange { remove_series: unused.clone(), ..IndexChange::default() })?;
            self.state.write().remove(&[], &unused);
        }
        let Repairs { added, removed, damaged } = repairs;
        if damaged > 0 {
            tracing::warn!(
                objects = damaged,
                "queries leave unreadable objects out; restore their files from a backup, or let retention remove them"
            );
        }
        if is_new && added > 0 {
            self.metrics.index_rebuilds.inc();
            tracing::warn!(profiles = added, damaged, took = ?began.elapsed(), "rebuilt the index from the objects");
        } else if added + removed > 0 {
            tracing::info!(added, removed, "repaired differences between objects and index");
        }
        Ok(())
    }

    fn log_left_out(&self) {
        let left_out = self.state.read().left_out();
        if left_out > 0 {
            tracing::warn!(
                profiles = left_out,
                "the disk is full, and the memory for the index is used up: queries find only the newest profiles until the \
                 disk has room; free some, or lower --retention-bytes"
            );
        }
    }

    /// Moves the index from memory to the disk and compares it with the objects, some of which may be newer.
    pub(super) fn move_index_to_disk(&self) -> Result<(), StoreError> {
        self.index.move_to_disk()?;
        *self.state.write() = StoreState::load(&self.index, self.objects.directory_bytes())?;
        self.settle(false)
    }

    /// Returns the hours that have objects or rows.
    fn hours(&self) -> Result<BTreeSet<u64>, StoreError> {
        let mut hours = self.runtime.block_on(self.objects.hours())?;
        hours.extend(self.index.hours()?);
        Ok(hours)
    }

    fn settle_hour(&self, hour: u64, repairs: &mut Repairs) -> Result<(), StoreError> {
        let mut rows: HashMap<Ulid, IndexedObject> = HashMap::new();
        self.index.between(hour * HOUR_MS, (hour + 1) * HOUR_MS, |object| {
            rows.insert(object.key.id, object);
        })?;
        let mut missing = self.runtime.block_on(self.objects.of_hour(hour))?;
        missing.retain(|id| rows.remove(id).is_none());
        self.forget_unreadable(hour);
        // The ids begin with the time.
        missing.sort_unstable_by(|a, b| b.cmp(a));
        let mut left_out = missing.len();
        let chunk = if self.index.is_in_memory() { MEMORY_CHUNK } else { REPAIR_CHUNK };
        for ids in missing.chunks(chunk) {
            if self.index.is_memory_full(self.options.memory_index_bytes) {
                break;
            }
            left_out -= ids.len();
            let heads = self.runtime.block_on(self.objects.heads(hour, ids))?;
            let mut found = Vec::with_capacity(heads.len());
            for (id, head) in ids.iter().zip(heads) {
                let (described, bytes) = match head {
                    ObjectHead::Gone => continue,
                    ObjectHead::Unreadable { bytes } => (None, bytes),
                    ObjectHead::Readable { meta, bytes } => (describe(&meta, bytes), bytes),
                };
                // An object under another object's path counts as damaged.
                if let Some(described) = described.filter(|(_, key, _)| key.id == *id && key.hour() == hour) {
                    found.push(described);
                } else {
                    repairs.damaged += 1;
                    self.metrics.objects_corrupt.inc();
                    self.state
                        .write()
                        .add_unreadable(UnreadableObject { hour, id: *id }, self.objects.allocated(bytes));
                    tracing::warn!(profile = %id, hour, "cannot read an object; left it out of the index");
                }
            }
            self.add_rows(&found, repairs)?;
        }
        self.state.write().leave_out(hour, left_out as u64);
        let gone: Vec<IndexedObject> = rows.into_values().collect();
        self.remove_rows(&gone, repairs)
    }

    /// Forgets the unreadable objects of an hour that is compared again.
    fn forget_unreadable(&self, hour: u64) {
        let mut state = self.state.write();
        for object in state.unreadable_before(hour + 1) {
            if object.hour == hour {
                state.remove_unreadable(object);
            }
        }
    }

    /// Adds rows for objects that have none.
    fn add_rows(
        &self,
        found: &[(Labels, ObjectKey, ProfileRow)],
        repairs: &mut Repairs,
    ) -> Result<(), StoreError> {
        if found.is_empty() {
            return Ok(());
        }
        let mut change = IndexChange::default();
        {
            let state = self.state.read();
            let mut new = HashMap::new();
            for (labels, key, row) in found {
                // The collector that accepted these objects has applied the limit on series already.
                if let Some(series) = state.series_of(labels, &mut new, usize::MAX) {
                    change.add.push(self.added(series, *key, row.clone()));
                }
            }
            change.add_series = new.into_iter().map(|(labels, id)| (id, labels.clone())).collect();
        }
        self.index.commit(&change)?;
        repairs.added += change.add.len() as u64;
        self.metrics.index_repairs.inc_by(change.add.len() as u64);
        self.state.write().apply_added(change);
        Ok(())
    }

    /// Removes rows whose objects are gone.
    fn remove_rows(&self, gone: &[IndexedObject], repairs: &mut Repairs) -> Result<(), StoreError> {
        if gone.is_empty() {
            return Ok(());
        }
        let emptied = self.state.read().emptied_by(gone);
        self.index.commit(&IndexChange::removing(gone, &emptied))?;
        self.state.write().remove(gone, &emptied);
        repairs.removed += gone.len() as u64;
        self.metrics.index_repairs.inc_by(gone.len() as u64);
        Ok(())
    }

    /// Reads the changes of other collectors in the same bucket: in the newest two hours, and in some older ones. `turn`
    /// counts the readings and selects the older hours.
    pub(super) fn follow_bucket(&self, turn: usize) -> Result<(), StoreError> {
        let mut repairs = Repairs::default();
        let hours: Vec<u64> = self.hours()?.into_iter().rev().collect();
        let (last, old) = hours.split_at(hours.len().min(2));
        let old = old.iter().cycle().skip(turn * OLD_HOURS % old.len().max(1)).take(OLD_HOURS.min(old.len()));
        for hour in last.iter().chain(old) {
            self.settle_hour(*hour, &mut repairs)?;
        }
        let Repairs { added, removed, .. } = repairs;
        if added + removed > 0 {
            tracing::debug!(added, removed, "followed the changes of other collectors in the bucket");
            self.update_size_metrics();
        }
        Ok(())
    }
}
