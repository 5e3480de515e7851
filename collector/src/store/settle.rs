//! Makes index and objects agree: completely at the start, and hour by hour while other collectors use the same bucket.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use gannet_proto::labels::Labels;
use ulid::Ulid;

use super::{
    Store, StoreError,
    change::IndexChange,
    copies,
    describe::{describe, describe_object},
    object::{HOUR_MS, Head, HourObjects, ObjectKey, ObjectName, segment_hour},
    row::{IndexedObject, ProfileRow},
    segment::SegmentHead,
    state::{StoreState, UnreadableObject},
};

/// Rows of one repairing commit.
const REPAIR_CHUNK: usize = 4096;
/// The same for an index in memory, whose space is counted behind each.
const MEMORY_CHUNK: usize = 256;
/// Segments of one repairing commit.
const REPAIR_SEGMENTS: usize = 16;

/// Repairs of one comparison.
#[derive(Default)]
pub(super) struct Repairs {
    /// Profiles that had no row.
    pub(super) added: u64,
    /// Rows that had no profile.
    pub(super) removed: u64,
    /// Objects that could not be read.
    damaged: u64,
    /// Segments that the index did not know.
    pub(super) segments: Vec<Ulid>,
}

/// A segment that a deletion made in place of others.
pub(super) struct Successor {
    pub(super) id: Ulid,
    pub(super) bytes: u64,
    /// The segments that it replaces. They may be there still.
    pub(super) origins: Vec<Ulid>,
    /// Rows of all of its batches.
    pub(super) found: Vec<(Labels, ObjectKey, ProfileRow)>,
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
            self.state.write().remove(&[], &unused, &[]);
        }
        let Repairs { added, removed, damaged, segments: _ } = repairs;
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
                objects = left_out,
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
        let objects = self.runtime.block_on(self.objects.of_hour(hour))?;
        self.compare_hour(hour, objects, repairs)
    }

    fn compare_hour(&self, hour: u64, objects: HourObjects, repairs: &mut Repairs) -> Result<(), StoreError> {
        self.load_deletions(&objects.deletions)?;
        self.forget_unreadable(hour);
        let mut left_out = self.settle_profiles(hour, objects.profiles, repairs)?;
        left_out += self.settle_segments(hour, objects.segments, repairs)?;
        self.state.write().leave_out(hour, left_out);
        Ok(())
    }

    /// Compares the objects of the older layout, each of which holds one profile. Returns how many of them an index in
    /// memory has no room for.
    fn settle_profiles(
        &self,
        hour: u64,
        mut missing: Vec<Ulid>,
        repairs: &mut Repairs,
    ) -> Result<u64, StoreError> {
        let mut rows: HashMap<Ulid, IndexedObject> = HashMap::new();
        // Without such a row, reading the entries of the hour would find none.
        if self.state.read().outside_segments() > 0 {
            self.index.between(hour * HOUR_MS, (hour + 1) * HOUR_MS, |entry| {
                rows.extend(entry.outside_segments().map(|object| (object.key.id, object)));
            })?;
        }
        missing.retain(|id| rows.remove(id).is_none());
        let chunk = if self.index.is_in_memory() { MEMORY_CHUNK } else { REPAIR_CHUNK };
        let left_out = self.add_missing(missing, chunk, |ids| self.add_profiles(hour, ids, repairs))?;
        let gone: Vec<IndexedObject> = rows.into_values().collect();
        self.remove_rows(&gone, &[], repairs)?;
        Ok(left_out)
    }

    /// Compares the segments of an hour. Returns how many of them an index in memory has no room for.
    fn settle_segments(
        &self,
        hour: u64,
        mut missing: Vec<Ulid>,
        repairs: &mut Repairs,
    ) -> Result<u64, StoreError> {
        let mut known: HashSet<Ulid> =
            self.index.segments(hour..hour + 1)?.into_iter().map(|segment| segment.id).collect();
        missing.retain(|id| !known.remove(id));
        // Removed segments come first: a deletion moves their remaining profiles into new segments.
        for id in known {
            // The list of a bucket may be older than the segment.
            if self.runtime.block_on(self.objects.segment_bytes(id))?.is_none() {
                let rows = self.index.of_segment(id)?;
                let ids = rows.iter().map(|row| row.key.id);
                let copies = self.index.read(|txn| copies::find(txn, ids))?;
                self.remove_rows(&rows, &[id], repairs)?;
                // Other segments that hold its batches, too.
                let others: BTreeSet<Ulid> = copies.into_values().flatten().collect();
                for other in others.into_iter().filter(|other| *other != id) {
                    self.add_segments(segment_hour(other), &[other], repairs)?;
                }
            }
        }
        // A segment has up to some thousand rows.
        let chunk = if self.index.is_in_memory() { 1 } else { REPAIR_SEGMENTS };
        let left_out = self.add_missing(missing, chunk, |ids| self.add_segments(hour, ids, repairs))?;
        Ok(left_out)
    }

    /// Calls `add` for objects without rows, the newest first, up to `chunk` at a time, until an index in memory is full.
    /// Returns how many of them it has no room for.
    fn add_missing(
        &self,
        mut missing: Vec<Ulid>,
        chunk: usize,
        mut add: impl FnMut(&[Ulid]) -> Result<(), StoreError>,
    ) -> Result<u64, StoreError> {
        // The ids begin with the time.
        missing.sort_unstable_by(|a, b| b.cmp(a));
        let mut left_out = missing.len();
        for ids in missing.chunks(chunk) {
            if self.index.is_memory_full(self.options.memory_index_bytes) {
                break;
            }
            left_out -= ids.len();
            add(ids)?;
        }
        Ok(left_out as u64)
    }

    /// Adds the rows of objects of the older layout in the directory of an hour. A missing object is no error.
    fn add_profiles(&self, hour: u64, ids: &[Ulid], repairs: &mut Repairs) -> Result<(), StoreError> {
        let heads = self.runtime.block_on(self.objects.heads(hour, ids))?;
        let mut found = Vec::with_capacity(heads.len());
        for (id, head) in ids.iter().zip(heads) {
            let (described, bytes) = match head {
                Head::Gone => continue,
                Head::Unreadable { bytes, reason } => (Err(reason), bytes),
                Head::Readable { content: meta, bytes } => {
                    let described = describe_object(&meta, bytes)
                        .filter(|(_, key, _)| key.id == *id && key.hour() == hour)
                        .ok_or_else(|| "it is another object under this name".to_owned());
                    (described, bytes)
                }
            };
            match described {
                Ok(described) => found.push(described),
                Err(reason) => self.leave_unreadable(hour, ObjectName::Profile(*id), bytes, &reason, repairs),
            }
        }
        self.add_rows(&[], &found, repairs)
    }

    /// Adds the rows of segments in the directory of an hour. A missing segment is no error.
    fn add_segments(&self, hour: u64, ids: &[Ulid], repairs: &mut Repairs) -> Result<(), StoreError> {
        let heads = self.runtime.block_on(self.objects.segment_heads(hour, ids))?;
        let (mut found, mut segments, mut successors) = (Vec::new(), Vec::new(), Vec::new());
        for (id, head) in ids.iter().zip(heads) {
            let (entries, bytes) = match head {
                Head::Gone => continue,
                Head::Unreadable { bytes, reason } => (Err(reason), bytes),
                Head::Readable { content, bytes } if segment_hour(*id) == hour => (Ok(content), bytes),
                Head::Readable { bytes, .. } => (Err("it is in the directory of another hour".into()), bytes),
            };
            match entries {
                Ok(SegmentHead { entries, origins }) => {
                    if !origins.is_empty() {
                        let found = entries.into_iter().filter_map(|(meta, position)| {
                            let (labels, key, row) = describe(&meta, position.bytes, 0)?;
                            Some((labels, key, row.at(position)))
                        });
                        let found = found.collect();
                        successors.push(Successor { id: *id, bytes, origins, found });
                        continue;
                    }
                    segments.push((*id, self.objects.allocated(bytes)));
                    let described = entries.into_iter().filter_map(|(meta, position)| {
                        let (labels, key, row) = describe(&meta, position.bytes, 0)?;
                        Some((labels, key, row.at(position)))
                    });
                    found.extend(described);
                }
                Err(reason) => self.leave_unreadable(hour, ObjectName::Segment(*id), bytes, &reason, repairs),
            }
        }
        self.add_rows(&segments, &found, repairs)?;
        for successor in successors {
            repairs.segments.push(successor.id);
            self.move_rows(successor, repairs)?;
        }
        repairs.segments.extend(segments.iter().map(|(id, _)| *id));
        Ok(())
    }

    /// Adds a segment to the index if it exists, after a write whose outcome is unknown.
    pub(super) fn adopt_segment(&self, id: Ulid) -> Result<(), StoreError> {
        let mut repairs = Repairs::default();
        self.add_segments(segment_hour(id), &[id], &mut repairs)?;
        if repairs.added > 0 {
            tracing::info!(segment = %id, profiles = repairs.added, "found a segment whose write seemed to have failed");
        }
        Ok(())
    }

    /// Notes an object that cannot be read, so that it has no rows.
    fn leave_unreadable(&self, hour: u64, name: ObjectName, bytes: u64, reason: &str, repairs: &mut Repairs) {
        tracing::warn!(object = %name, hour, reason, "cannot read an object; left it out of the index");
        repairs.damaged += 1;
        self.metrics.objects_corrupt.inc();
        self.state.write().add_unreadable(UnreadableObject { hour, name }, self.objects.allocated(bytes));
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

    /// Adds rows for profiles that have none, with the segments that hold them. A profile that the index knows from
    /// another object stays there, and a deleted one gets no row.
    pub(super) fn add_rows(
        &self,
        segments: &[(Ulid, u64)],
        found: &[(Labels, ObjectKey, ProfileRow)],
        repairs: &mut Repairs,
    ) -> Result<(), StoreError> {
        if found.is_empty() && segments.is_empty() {
            return Ok(());
        }
        let known = self.index.contains(found.iter().map(|(_, key, _)| key.id))?;
        let mut ids = HashSet::new();
        let mut change = IndexChange { add_segments: segments.to_vec(), ..IndexChange::default() };
        let deletions = self.deletions.all();
        {
            let state = self.state.read();
            let mut new = HashMap::new();
            for ((labels, key, row), known) in found.iter().zip(known) {
                let segment = row.segment();
                if deletions.iter().any(|of| of.is_after(segment) && of.matches(labels, key.start_ms)) {
                    let profile = || (key.hour(), ObjectName::Profile(key.id));
                    change
                        .doom
                        .push(segment.map_or_else(profile, |id| (segment_hour(id), ObjectName::Segment(id))));
                    if !known {
                        change.hide.push((key.id, key.start_ms));
                    }
                    continue;
                }
                if known || !ids.insert(key.id) {
                    change.copies.extend(row.segment().map(|segment| (key.id, segment)));
                    continue;
                }
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
        let has_hidden = !change.doom.is_empty();
        self.state.write().apply_added(change);
        if has_hidden {
            self.deletions.note_change();
        }
        Ok(())
    }

    /// Moves the rows of replaced segments to their successor, and adds those that are missing.
    pub(super) fn move_rows(&self, successor: Successor, repairs: &mut Repairs) -> Result<(), StoreError> {
        let Successor { id, bytes, origins, found } = successor;
        let mut old: HashMap<Ulid, (u64, Ulid)> = HashMap::new();
        for origin in &origins {
            let rows = self.index.of_segment(*origin)?.into_iter();
            old.extend(rows.map(|row| (row.key.id, (row.series, *origin))));
        }
        let moved_before: HashSet<Ulid> =
            self.index.of_segment(id)?.into_iter().map(|row| row.key.id).collect();
        let allocated = self.objects.allocated(bytes);
        let mut change = IndexChange {
            add_segments: vec![(id, allocated)],
            origins: origins.iter().map(|origin| (id, *origin)).collect(),
            ..IndexChange::default()
        };
        let mut others = Vec::new();
        for (labels, key, row) in found.into_iter().filter(|(_, key, _)| !moved_before.contains(&key.id)) {
            match old.get(&key.id) {
                Some((series, origin)) => {
                    change.moved.push((key.id, *origin));
                    change.add.push(self.added(*series, key, row));
                }
                // In another segment, without a row, or deleted since.
                None => others.push((labels, key, row)),
            }
        }
        self.index.commit(&change)?;
        let from: Vec<Ulid> = change.moved.iter().map(|(_, origin)| *origin).collect();
        self.state.write().move_rows(&from, (id, allocated), origins);
        self.add_rows(&[], &others, repairs)
    }

    /// Removes rows and segments whose objects are gone.
    pub(super) fn remove_rows(
        &self,
        gone: &[IndexedObject],
        segments: &[Ulid],
        repairs: &mut Repairs,
    ) -> Result<(), StoreError> {
        if gone.is_empty() && segments.is_empty() {
            return Ok(());
        }
        let emptied = self.state.read().emptied_by(gone);
        self.index.commit(&IndexChange::removing(gone, &emptied, segments))?;
        self.state.write().remove(gone, &emptied, segments);
        repairs.removed += gone.len() as u64;
        self.metrics.index_repairs.inc_by(gone.len() as u64);
        Ok(())
    }

    /// Compares the objects of an hour in a shared bucket. The list may be some seconds old.
    pub(super) fn follow_hour(&self, hour: u64, objects: HourObjects) -> Result<Repairs, StoreError> {
        let mut repairs = Repairs::default();
        self.compare_hour(hour, objects, &mut repairs)?;
        Ok(repairs)
    }

    /// Adds the segments of a shared bucket that the index does not know. A missing segment is no error.
    pub(super) fn add_new_segments(&self, ids: Vec<Ulid>) -> Result<Repairs, StoreError> {
        let mut by_hour: BTreeMap<u64, Vec<Ulid>> = BTreeMap::new();
        {
            let state = self.state.read();
            for id in ids.into_iter().filter(|id| !state.knows_segment(*id)) {
                by_hour.entry(segment_hour(id)).or_default().push(id);
            }
        }
        let mut repairs = Repairs::default();
        let chunk = if self.index.is_in_memory() { 1 } else { REPAIR_SEGMENTS };
        for (hour, missing) in by_hour {
            // The comparison of the hour counts those for which a full memory has no room.
            self.add_missing(missing, chunk, |ids| self.add_segments(hour, ids, &mut repairs))?;
        }
        Ok(repairs)
    }
}
