//! Removal of profiles that are too old, and of the oldest ones while the store is too large.

use std::{
    collections::{BTreeSet, HashSet},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::{StreamExt as _, stream};
use ulid::Ulid;

use super::{
    Store, StoreError, blocking,
    change::IndexChange,
    object::{HOUR_MS, HourObjects, ObjectName, segment_hour},
    row::IndexedObject,
};
use crate::time;

/// Profiles of one retention step. The writer accepts batches between two steps.
const RETENTION_CHUNK: usize = 256;
/// Concurrent deletions of objects.
const CONCURRENT_DELETES: usize = 16;

/// Returns the hour of the directory that holds the object of a profile.
fn hour_of(object: &IndexedObject) -> u64 {
    object.segment.map_or_else(|| object.key.hour(), segment_hour)
}

impl Store {
    /// Reports whether the store and its table are larger than `retention_bytes`.
    pub(super) fn is_over_budget(&self) -> bool {
        self.excess_bytes() > 0
    }

    /// Returns the bytes above `retention_bytes`. The table counts too; it follows what the store removes.
    fn excess_bytes(&self) -> u64 {
        let used = self.state.read().disk_bytes() + self.table_bytes.load(Ordering::Relaxed);
        used.saturating_sub(self.options.retention_bytes.0)
    }

    /// Runs one retention step and returns the time until the next one. A failure is logged and counted.
    pub(super) async fn retain(self: &Arc<Self>) -> Duration {
        let has_more = match self.expire().await {
            Ok(has_more) => has_more,
            Err(error) => {
                self.metrics.store_errors.inc();
                tracing::warn!(%error, "cannot remove old profiles; trying again");
                false
            }
        };
        if has_more { Duration::ZERO } else { self.options.retention_interval }
    }

    /// Removes up to [`RETENTION_CHUNK`] profiles that are too old, or the oldest ones of a store that is too large. Reports
    /// whether there may be more to remove. An object that cannot be deleted keeps its rows and does not hold up the
    /// others.
    async fn expire(self: &Arc<Self>) -> Result<bool, StoreError> {
        let cutoff = time::now_ms().saturating_sub(self.options.retention_age.0.as_millis() as u64);
        let store = Arc::clone(self);
        let oldest = move || {
            store.forget_hidden(cutoff)?;
            store.index.oldest(cutoff, RETENTION_CHUNK).map_err(StoreError::from)
        };
        let mut expired = blocking::<_, StoreError>(oldest).await?;
        let is_full_step = expired.len() == RETENTION_CHUNK;
        let mut unreadable_until = cutoff / HOUR_MS;
        if expired.is_empty() && self.is_over_budget() {
            expired = self.excess().await?;
            // Once no readable object is left, only unreadable ones can take the excess.
            unreadable_until = expired.first().map_or(u64::MAX, hour_of);
        }
        self.remove_unreadable(unreadable_until).await;
        let has_left_out = self.remove_left_out(cutoff / HOUR_MS).await?;
        let (expired, segments) = self.delete_objects(expired).await;
        if expired.is_empty() {
            return Ok(has_left_out);
        }
        let hours: BTreeSet<u64> = expired.iter().map(hour_of).collect();
        let emptied = self.state.read().emptied_by(&expired);
        let change = IndexChange::removing(&expired, &emptied, &segments);
        let store = Arc::clone(self);
        blocking(move || store.index.commit(&change)).await?;
        self.state.write().remove(&expired, &emptied, &segments);
        self.metrics.retention_removed.inc_by(expired.len() as u64);
        tracing::debug!(profiles = expired.len(), segments = segments.len(), "retention removed profiles");
        for hour in hours {
            if !self.state.read().has_hour(hour) {
                self.objects.remove_empty_hour(hour);
            }
        }
        self.update_size_metrics();
        Ok(is_full_step || has_left_out || self.is_over_budget())
    }

    /// Removes objects without a row, which an index in memory has no room for, of one hour before `until`. Reports whether
    /// there may be more.
    async fn remove_left_out(self: &Arc<Self>, until: u64) -> Result<bool, StoreError> {
        let Some(hour) = self.state.read().left_out_before(until) else { return Ok(false) };
        let HourObjects { profiles, segments, deletions: _ } = self.objects.of_hour(hour).await?;
        let store = Arc::clone(self);
        let mut names = blocking(move || -> Result<Vec<_>, StoreError> {
            let known = store.index.contains(profiles.iter().copied())?;
            let profiles = profiles.into_iter().zip(known).filter(|(_, known)| !known);
            let known = store.index.segments(hour..hour + 1)?;
            let is_unknown = |id: &Ulid| known.binary_search_by_key(id, |segment| segment.id).is_err();
            let segments = segments.into_iter().filter(is_unknown).map(ObjectName::Segment);
            Ok(profiles.map(|(id, _)| ObjectName::Profile(id)).chain(segments).collect())
        })
        .await?;
        let all = names.len();
        names.truncate(RETENTION_CHUNK);
        let until_ms = (hour + 1) * HOUR_MS - 1;
        self.expired_ms.fetch_max(until_ms, Ordering::AcqRel);
        self.expired_segment_ms.fetch_max(until_ms, Ordering::AcqRel);
        let names: Vec<_> = names.into_iter().map(|name| (hour, name)).collect();
        let failed = self.delete(&names).await.len();
        let removed = names.len() - failed;
        self.metrics.retention_removed.inc_by(removed as u64);
        let left = all - removed;
        self.state.write().leave_out(hour, left as u64);
        if left == 0 && !self.state.read().has_hour(hour) {
            self.objects.remove_empty_hour(hour);
        }
        self.update_size_metrics();
        Ok(failed == 0)
    }

    /// Returns the profiles that a store which is too large loses next: the oldest objects of the older layout, then the
    /// oldest segment.
    async fn excess(self: &Arc<Self>) -> Result<Vec<IndexedObject>, StoreError> {
        let store = Arc::clone(self);
        let outside = self.state.read().outside_segments();
        if outside == 0 {
            let oldest = self.state.read().oldest_segment();
            return blocking(move || oldest.map_or(Ok(Vec::new()), |id| store.index.of_segment(id))).await;
        }
        let mut excess = self.excess_bytes();
        // The search ends with the last of them, and not at the end of the index.
        let limit = RETENTION_CHUNK.min(outside as usize);
        let oldest = blocking(move || store.index.oldest_outside_segments(limit)).await?;
        let expired = oldest.into_iter().take_while(|object| {
            let expires = excess > 0;
            excess = excess.saturating_sub(object.disk_bytes);
            expires
        });
        Ok(expired.collect())
    }

    /// Deletes the objects of these profiles, and the segments that hold no other profile. Returns the profiles and segments
    /// without those that cannot be deleted.
    async fn delete_objects(&self, expired: Vec<IndexedObject>) -> (Vec<IndexedObject>, Vec<Ulid>) {
        let segments = self.state.read().segments_emptied_by(&expired);
        for object in &expired {
            self.expired_ms.fetch_max(object.key.start_ms, Ordering::AcqRel);
        }
        for segment in &segments {
            self.expired_segment_ms.fetch_max(segment.timestamp_ms(), Ordering::AcqRel);
        }
        let outside = expired.iter().filter(|object| object.segment.is_none());
        let names = outside
            .map(|object| (object.key.hour(), ObjectName::Profile(object.key.id)))
            .chain(segments.iter().map(|id| (segment_hour(*id), ObjectName::Segment(*id))));
        let failed = self.delete(&names.collect::<Vec<_>>()).await;
        let is_deleted = |object: &IndexedObject| {
            let name = object.segment.map_or(ObjectName::Profile(object.key.id), ObjectName::Segment);
            !failed.contains(&(hour_of(object), name))
        };
        let expired = expired.into_iter().filter(is_deleted).collect();
        let segments = segments
            .into_iter()
            .filter(|id| !failed.contains(&(segment_hour(*id), ObjectName::Segment(*id))))
            .collect();
        (expired, segments)
    }

    /// Removes the unreadable objects of hours before this one.
    async fn remove_unreadable(&self, hour: u64) {
        let unreadable = self.state.read().unreadable_before(hour);
        let names: Vec<_> = unreadable.iter().map(|object| (object.hour, object.name)).collect();
        let failed = self.delete(&names).await;
        for object in unreadable.into_iter().filter(|object| !failed.contains(&(object.hour, object.name))) {
            self.state.write().remove_unreadable(object);
        }
    }

    /// Deletes objects, each from the directory of its hour. Returns those that cannot be deleted, and logs the first error.
    async fn delete(&self, objects: &[(u64, ObjectName)]) -> HashSet<(u64, ObjectName)> {
        let deletes: Vec<_> = objects
            .iter()
            .map(|&(hour, name)| async move { (hour, name, self.objects.delete_in_hour(hour, name).await) })
            .collect();
        let results = stream::iter(deletes).buffered(CONCURRENT_DELETES).collect::<Vec<_>>().await;
        let mut failed = HashSet::new();
        for (hour, name, result) in results {
            if let Err(error) = result {
                if failed.is_empty() {
                    self.metrics.store_errors.inc();
                    tracing::warn!(object = %name, %error, "cannot delete an old object; trying again");
                }
                failed.insert((hour, name));
            }
        }
        failed
    }
}
