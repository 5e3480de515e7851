//! The part of the store that fits in memory: its series and its totals.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    sync::Arc,
};

use gannet_proto::labels::Labels;
use ulid::Ulid;

use super::{
    change::{AddedProfile, IndexChange},
    index::{Index, IndexError, TimeEntry},
    object::{ObjectName, segment_hour},
    row::{IndexedObject, series_bytes},
};
use crate::selector::Selector;

/// A series, and the time range of its profiles.
#[derive(Clone)]
pub(crate) struct Series {
    pub(crate) id: u64,
    pub(crate) labels: Arc<Labels>,
    profiles: u64,
    /// At or before the first profile.
    first_ms: u64,
    /// At or after the last profile.
    last_ms: u64,
}

/// An object that cannot be read, so that it has no row.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct UnreadableObject {
    /// Hour of its directory.
    pub(super) hour: u64,
    pub(super) name: ObjectName,
}

/// A segment that has rows.
#[derive(Clone, Copy)]
struct SegmentState {
    /// Space of the object on the disk.
    disk_bytes: u64,
    rows: u64,
}

/// Series and totals of all stored profiles. It always agrees with the committed index.
#[derive(Default)]
pub(super) struct StoreState {
    series: HashMap<u64, Series>,
    by_labels: HashMap<Arc<Labels>, u64>,
    next_series: u64,
    profiles: u64,
    /// Space of objects, rows and labels on the disk, without directories.
    bytes: u64,
    /// Segments by id, and so in the order of time.
    segments: BTreeMap<Ulid, SegmentState>,
    /// Segments that deletions made, with those that they replace.
    origins: HashMap<Ulid, Vec<Ulid>>,
    /// Number of profiles in objects of their own.
    outside_segments: u64,
    /// Number of objects by hour. Each hour has a directory.
    hours: HashMap<u64, u64>,
    /// Space of one directory. 0 for a bucket, whose limit does not concern the local index either.
    directory_bytes: u64,
    /// With the space that each takes.
    unreadable: BTreeMap<UnreadableObject, u64>,
    /// Number of objects by hour that an index in memory has no room for.
    left_out: BTreeMap<u64, u64>,
}

impl StoreState {
    /// Builds the state from a complete scan of the index. `directory_bytes`: space of one directory on the disk, or 0 for
    /// a bucket.
    pub(super) fn load(index: &Index, directory_bytes: u64) -> Result<Self, IndexError> {
        let mut state = Self { directory_bytes, ..Self::default() };
        for (id, labels) in index.series()? {
            state.add_series(id, labels);
        }
        for segment in index.segments(0..u64::MAX)? {
            state.add_segment(segment.id, segment.disk_bytes, segment.rows);
        }
        index.between(0, u64::MAX, |entry| state.add(&entry))?;
        Ok(state)
    }

    /// Number of stored profiles.
    pub(super) fn profiles(&self) -> u64 {
        self.profiles
    }

    /// Space on the disk of everything that retention can remove, in bytes: objects, their directories and their part of
    /// the index.
    pub(super) fn disk_bytes(&self) -> u64 {
        self.bytes + self.hours.len() as u64 * self.directory_bytes
    }

    /// Notes an object that has no row, because it cannot be read.
    pub(super) fn add_unreadable(&mut self, object: UnreadableObject, disk_bytes: u64) {
        self.remove_unreadable(object);
        self.bytes += disk_bytes;
        self.unreadable.insert(object, disk_bytes);
    }

    /// Number of objects without a row, because an index in memory has no room for more.
    pub(super) fn left_out(&self) -> u64 {
        self.left_out.values().sum()
    }

    /// Sets how many objects of an hour are left out.
    pub(super) fn leave_out(&mut self, hour: u64, objects: u64) {
        if objects == 0 {
            self.left_out.remove(&hour);
        } else {
            self.left_out.insert(hour, objects);
        }
    }

    /// Returns the oldest hour before this one of which objects are left out.
    pub(super) fn left_out_before(&self, hour: u64) -> Option<u64> {
        self.left_out.keys().next().copied().filter(|oldest| *oldest < hour)
    }

    /// Reports whether an hour has objects.
    pub(super) fn has_hour(&self, hour: u64) -> bool {
        self.hours.contains_key(&hour)
    }

    /// Returns the unreadable objects of hours before this one.
    pub(super) fn unreadable_before(&self, hour: u64) -> Vec<UnreadableObject> {
        self.unreadable.keys().take_while(|object| object.hour < hour).copied().collect()
    }

    /// Forgets an unreadable object that is removed.
    pub(super) fn remove_unreadable(&mut self, object: UnreadableObject) {
        let disk_bytes = self.unreadable.remove(&object).unwrap_or(0);
        self.bytes = self.bytes.saturating_sub(disk_bytes);
    }

    /// Number of series.
    pub(super) fn series_count(&self) -> usize {
        self.series.len()
    }

    /// Returns the series that match and may have profiles in the range, in the order of their labels.
    pub(super) fn select(&self, selector: &Selector, from_ms: u64, until_ms: u64) -> Vec<Series> {
        let mut found: Vec<_> = self
            .series
            .values()
            .filter(|s| s.first_ms < until_ms && s.last_ms >= from_ms && selector.matches(&s.labels))
            .cloned()
            .collect();
        found.sort_unstable_by(|a, b| a.labels.cmp(&b.labels));
        found
    }

    /// Returns times at or before the start of the oldest profile and at or after that of the newest one.
    pub(super) fn times(&self) -> Option<(u64, u64)> {
        let used = self.series.values().filter(|series| series.profiles > 0);
        used.map(|series| (series.first_ms, series.last_ms)).reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)))
    }

    /// Returns the labels of a series.
    pub(super) fn labels_of(&self, series: u64) -> Option<Arc<Labels>> {
        self.series.get(&series).map(|s| Arc::clone(&s.labels))
    }

    /// Returns the series without a profile.
    pub(super) fn unused_series(&self) -> Vec<u64> {
        self.series.values().filter(|s| s.profiles == 0).map(|s| s.id).collect()
    }

    /// Returns the number of the series with these labels. A new series gets the next number and is added to `new`.
    /// Returns `None` for a new series above `max_series`.
    pub(super) fn series_of<'a>(
        &self,
        labels: &'a Labels,
        new: &mut HashMap<&'a Labels, u64>,
        max_series: usize,
    ) -> Option<u64> {
        if let Some(known) = self.by_labels.get(labels).or_else(|| new.get(labels)) {
            return Some(*known);
        }
        if self.series.len() + new.len() >= max_series {
            return None;
        }
        let id = self.next_series + new.len() as u64;
        new.insert(labels, id);
        Some(id)
    }

    /// Adds the series and entries of a committed change.
    pub(super) fn apply_added(&mut self, change: IndexChange) {
        for (id, labels) in change.add_series {
            self.add_series(id, labels);
        }
        for (id, disk_bytes) in change.add_segments {
            self.add_segment(id, disk_bytes, 0);
        }
        for AddedProfile { profile, disk_bytes } in &change.add {
            let segment = profile.row.segment();
            if let Some(segment) = segment.and_then(|id| self.segments.get_mut(&id)) {
                segment.rows += 1;
            }
            self.add(&TimeEntry {
                series: profile.series,
                key: profile.key,
                disk_bytes: *disk_bytes,
                is_in_segment: segment.is_some(),
            });
        }
    }

    fn add_segment(&mut self, id: Ulid, disk_bytes: u64, rows: u64) {
        if self.segments.contains_key(&id) {
            return;
        }
        self.bytes += disk_bytes;
        *self.hours.entry(segment_hour(id)).or_default() += 1;
        self.segments.insert(id, SegmentState { disk_bytes, rows });
    }

    /// Reports whether a segment is known, be it readable or not.
    pub(super) fn knows_segment(&self, id: Ulid) -> bool {
        let unreadable = UnreadableObject { hour: segment_hour(id), name: ObjectName::Segment(id) };
        self.segments.contains_key(&id) || self.unreadable.contains_key(&unreadable)
    }

    /// Number of profiles in objects of their own, in the older layout.
    pub(super) fn outside_segments(&self) -> u64 {
        self.outside_segments
    }

    /// Number of segments.
    pub(super) fn segment_count(&self) -> usize {
        self.segments.len()
    }

    /// Returns the segments from this id on that `is_wanted` takes, in the order of time.
    pub(super) fn segments_from(&self, from: Ulid, mut is_wanted: impl FnMut(Ulid) -> bool) -> Vec<Ulid> {
        self.segments.range(from..).map(|(id, _)| *id).filter(|id| is_wanted(*id)).collect()
    }

    /// Returns the oldest segment with a row. Others wait until a deletion removes them.
    pub(super) fn oldest_segment(&self) -> Option<Ulid> {
        self.segments.iter().find(|(_, segment)| segment.rows > 0).map(|(id, _)| *id)
    }

    /// Returns the time of the newest segment in milliseconds, or 0.
    pub(super) fn newest_segment_ms(&self) -> u64 {
        self.segments.last_key_value().map_or(0, |(id, _)| id.timestamp_ms())
    }

    /// Number of objects that cannot be read.
    pub(super) fn unreadable_count(&self) -> usize {
        self.unreadable.len()
    }

    /// Returns the segments that a deletion replaced by this one.
    pub(super) fn origins_of(&self, segment: Ulid) -> Vec<Ulid> {
        self.origins.get(&segment).cloned().unwrap_or_default()
    }

    /// Sets the segments that deletions made, with those that they replace.
    pub(super) fn set_origins(&mut self, origins: HashMap<Ulid, Vec<Ulid>>) {
        self.origins = origins;
    }

    /// Moves one row of each of these segments to a segment that a deletion made, with the space that it takes.
    pub(super) fn move_rows(&mut self, from: &[Ulid], to: (Ulid, u64), origins: Vec<Ulid>) {
        let (to, disk_bytes) = to;
        self.add_segment(to, disk_bytes, 0);
        if let Some(segment) = self.segments.get_mut(&to) {
            segment.rows += from.len() as u64;
        }
        for from in from {
            if let Some(segment) = self.segments.get_mut(from) {
                segment.rows = segment.rows.saturating_sub(1);
            }
        }
        self.origins.insert(to, origins);
    }

    /// Returns the segments without a row, once these rows are removed.
    pub(super) fn segments_emptied_by(&self, removed: &[IndexedObject]) -> Vec<Ulid> {
        let segments = removed.iter().filter_map(|object| object.segment);
        emptied(segments, |id| self.segments.get(id).map(|segment| segment.rows))
    }

    fn add_series(&mut self, id: u64, labels: Labels) {
        self.bytes += self.series_bytes(&labels);
        let labels = Arc::new(labels);
        self.by_labels.insert(Arc::clone(&labels), id);
        self.series.insert(id, Series { id, labels, profiles: 0, first_ms: u64::MAX, last_ms: 0 });
        self.next_series = self.next_series.max(id + 1);
    }

    fn series_bytes(&self, labels: &Labels) -> u64 {
        if self.directory_bytes == 0 { 0 } else { series_bytes(labels) }
    }

    fn add(&mut self, entry: &TimeEntry) {
        self.profiles += 1;
        self.bytes += entry.disk_bytes;
        if !entry.is_in_segment {
            self.outside_segments += 1;
            *self.hours.entry(entry.key.hour()).or_default() += 1;
        }
        if let Some(series) = self.series.get_mut(&entry.series) {
            series.profiles += 1;
            series.first_ms = series.first_ms.min(entry.key.start_ms);
            series.last_ms = series.last_ms.max(entry.key.start_ms);
        }
    }

    /// Returns the series that would have no profile left after these removals.
    pub(super) fn emptied_by(&self, removed: &[IndexedObject]) -> Vec<u64> {
        let series = removed.iter().map(|object| object.series);
        emptied(series, |id| self.series.get(id).map(|series| series.profiles))
    }

    /// Removes objects and series after the index has committed their removal.
    pub(super) fn remove(&mut self, removed: &[IndexedObject], emptied: &[u64], segments: &[Ulid]) {
        for object in removed {
            self.profiles = self.profiles.saturating_sub(1);
            self.bytes = self.bytes.saturating_sub(object.disk_bytes);
            if let Some(id) = object.segment {
                if let Some(segment) = self.segments.get_mut(&id) {
                    segment.rows = segment.rows.saturating_sub(1);
                }
            } else {
                self.outside_segments = self.outside_segments.saturating_sub(1);
                self.remove_from_hour(object.key.hour());
            }
            if let Some(series) = self.series.get_mut(&object.series) {
                series.profiles = series.profiles.saturating_sub(1);
            }
        }
        for id in emptied {
            if let Some(series) = self.series.remove(id) {
                self.bytes = self.bytes.saturating_sub(self.series_bytes(&series.labels));
                self.by_labels.remove(&series.labels);
            }
        }
        for id in segments {
            self.origins.remove(id);
            if let Some(segment) = self.segments.remove(id) {
                self.bytes = self.bytes.saturating_sub(segment.disk_bytes);
                self.remove_from_hour(segment_hour(*id));
            }
        }
    }

    fn remove_from_hour(&mut self, hour: u64) {
        if let Some(objects) = self.hours.get_mut(&hour) {
            *objects -= 1;
            if *objects == 0 {
                self.hours.remove(&hour);
            }
        }
    }
}

/// Returns the ids that `removed` yields as often as each has rows, or more often.
fn emptied<T: Copy + Eq + Hash>(
    removed: impl Iterator<Item = T>,
    rows: impl Fn(&T) -> Option<u64>,
) -> Vec<T> {
    let mut counts: HashMap<T, u64> = HashMap::new();
    for id in removed {
        *counts.entry(id).or_default() += 1;
    }
    counts.retain(|id, n| rows(id).is_some_and(|rows| rows <= *n));
    counts.into_keys().collect()
}
