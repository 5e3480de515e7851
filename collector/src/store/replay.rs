//! Segments as the table reads them: with all profiles that the index finds in them.

use std::{collections::HashMap, ops::Range, path::PathBuf, sync::Arc};

use bytes::Bytes;
use gannet_proto::labels::Labels;
use object_store::ObjectStore;
use ulid::Ulid;

use super::{Store, StoreError, copies, segment};
use crate::time;

/// A known segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentInfo {
    pub(crate) id: Ulid,
    /// Space that the segment takes.
    pub(crate) disk_bytes: u64,
}

/// A profile of a segment, with the description that its agent sent.
pub(crate) struct SegmentProfile {
    pub(crate) id: Ulid,
    /// Other segments that hold the batch too. Most batches have none.
    pub(crate) copies: Vec<Ulid>,
    pub(crate) start_ms: u64,
    pub(crate) duration_ms: u64,
    pub(crate) labels: Labels,
    pub(crate) rule_id: String,
    pub(crate) revision: u64,
    pub(crate) reason: String,
    /// As the agent sent it, compressed.
    pub(crate) pprof: Bytes,
}

impl TableObjects {
    /// Returns the space that an object of this size takes, in bytes.
    pub(crate) fn allocated(&self, object_bytes: u64) -> u64 {
        object_bytes.next_multiple_of(self.block_bytes)
    }
}

/// The outcome of reading a segment.
pub(crate) enum SegmentContent {
    Profiles {
        profiles: Vec<SegmentProfile>,
        /// Profiles that do not have their checksums, or are cut off.
        damaged: u64,
    },
    /// Retention has removed the segment.
    Gone,
    /// The index part of the segment is damaged, or a newer collector wrote it.
    Unreadable(String),
}

/// The objects of the table, beside those of the store.
#[derive(Clone)]
pub(crate) struct TableObjects {
    /// Writes are durable once they succeed.
    pub(crate) objects: Arc<dyn ObjectStore>,
    /// Their directory. `None` for a bucket, which other collectors may change too.
    pub(crate) root: Option<PathBuf>,
    /// Unit in which the disk allocates space, in bytes. 1 for a bucket.
    pub(crate) block_bytes: u64,
}

/// Blocking, except for [`Store::set_table_bytes`].
impl Store {
    /// Returns the known segments of some hours, in the order of time.
    pub(crate) fn segments_of(&self, hours: Range<u64>) -> Result<Vec<SegmentInfo>, StoreError> {
        let segments = self.index.segments(hours)?.into_iter();
        Ok(segments.map(|segment| SegmentInfo { id: segment.id, disk_bytes: segment.disk_bytes }).collect())
    }

    /// Returns the known segments that a collector wrote at this time or later, in milliseconds, and that `is_wanted` takes.
    pub(crate) fn segments_since(&self, from_ms: u64, is_wanted: impl FnMut(Ulid) -> bool) -> Vec<Ulid> {
        self.state.read().segments_from(Ulid::from_parts(from_ms, 0), is_wanted)
    }

    /// Returns those of these segments that the index does not know.
    pub(crate) fn unknown_segments(&self, segments: impl IntoIterator<Item = Ulid>) -> Vec<Ulid> {
        let state = self.state.read();
        segments.into_iter().filter(|id| !state.knows_segment(*id)).collect()
    }

    /// Reports whether there is an object of this segment.
    pub(crate) fn has_segment(&self, id: Ulid) -> Result<bool, StoreError> {
        Ok(self.runtime.block_on(self.objects.segment_bytes(id))?.is_some())
    }

    /// Returns ids and series of the batches of a segment that start in the range.
    pub(crate) fn batches_of_segment(
        &self,
        id: Ulid,
        from_ms: u64,
        until_ms: u64,
    ) -> Result<Vec<(Ulid, u64)>, StoreError> {
        let rows = self.index.of_segment(id)?.into_iter();
        let in_range = rows.filter(|row| (from_ms..until_ms).contains(&row.key.start_ms));
        Ok(in_range.map(|row| (row.key.id, row.series)).collect())
    }

    /// Reports whether profiles have objects of their own, in the older layout.
    pub(crate) fn has_profiles_outside_segments(&self) -> bool {
        self.state.read().outside_segments() > 0
    }

    /// Returns the hours that have segments or profiles, in order.
    pub(crate) fn stored_hours(&self) -> Result<Vec<u64>, StoreError> {
        let mut hours = self.index.hours()?;
        hours.sort_unstable();
        hours.dedup();
        Ok(hours)
    }

    /// Returns the start of the oldest profile in milliseconds since 1970, or `None` for an empty store.
    pub(crate) fn oldest_start_ms(&self) -> Result<Option<u64>, StoreError> {
        Ok(self.index.oldest(u64::MAX, 1)?.first().map(|object| object.key.start_ms))
    }

    /// Reads a segment, and returns its profiles that the index finds in it. The index has each batch once, also if two
    /// segments hold it.
    pub(crate) fn read_segment(&self, id: Ulid) -> Result<SegmentContent, StoreError> {
        let mut rows: HashMap<Ulid, u64> =
            self.index.of_segment(id)?.into_iter().map(|row| (row.key.id, row.key.start_ms)).collect();
        let Some(object) = self.runtime.block_on(self.objects.segment(id))? else {
            return Ok(SegmentContent::Gone);
        };
        let entries = match segment::read_index(id, &object) {
            Ok(entries) => entries,
            Err(error) => return Ok(SegmentContent::Unreadable(error.to_string())),
        };
        let mut copies = self.index.read(|txn| copies::find(txn, rows.keys().copied()))?;
        let (mut profiles, mut damaged) = (Vec::with_capacity(entries.len()), 0);
        for (meta, position) in entries {
            let Some(batch) = meta.batch else { continue };
            let Some((id, start_ms)) = Ulid::from_string(&batch.batch_id)
                .ok()
                .and_then(|id| rows.remove(&id).map(|start_ms| (id, start_ms)))
            else {
                continue;
            };
            if position.bytes == 0 {
                continue;
            }
            let range = position.range();
            let pprof = usize::try_from(range.start)
                .ok()
                .zip(usize::try_from(range.end).ok())
                .filter(|(_, end)| *end <= object.len())
                .map(|(start, end)| object.slice(start..end))
                .filter(|pprof| crc32fast::hash(pprof) == position.crc);
            let Some(pprof) = pprof else {
                damaged += 1;
                self.metrics.objects_corrupt.inc();
                continue;
            };
            profiles.push(SegmentProfile {
                id,
                copies: copies.remove(&id).unwrap_or_default(),
                start_ms,
                duration_ms: batch.duration.as_ref().and_then(time::duration_to_ms).unwrap_or(0),
                labels: batch.labels,
                rule_id: batch.rule_id,
                revision: batch.revision,
                reason: batch.reason,
                pprof,
            });
        }
        Ok(SegmentContent::Profiles { profiles, damaged })
    }

    /// Opens the objects of the table, in the same directory or bucket.
    pub(crate) fn table_objects(&self) -> Result<TableObjects, StoreError> {
        self.objects.table()
    }

    /// Returns the directory of the table and the unit of its disk's space, if an earlier run left one.
    pub(crate) fn table_directory(&self) -> Option<(PathBuf, u64)> {
        let root = self.objects.table_root().filter(|root| root.is_dir())?;
        Some((root, self.objects.block_bytes()))
    }

    /// Sets the space of the table, which counts in `retention_bytes`.
    pub(crate) fn set_table_bytes(&self, bytes: u64) {
        self.table_bytes.store(bytes, std::sync::atomic::Ordering::Relaxed);
    }

    /// Reports whether the disk has room for these bytes beside the free space that stays.
    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        self.objects.is_shared()
            || self
                .free_bytes()
                .map_or(true, |free| free >= self.options.min_free_bytes.0.saturating_add(bytes))
    }
}
