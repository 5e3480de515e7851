//! Removal of profiles that are too old, and of the oldest ones while the store is too large.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::{StreamExt as _, stream};

use super::{Store, StoreError, blocking, index::IndexChange, object::HOUR_MS, writer::CONCURRENT_WRITES};
use crate::time;

/// Profiles of one retention step. The writer accepts batches between two steps.
const RETENTION_CHUNK: usize = 256;

impl Store {
    /// Reports whether the store is larger than `retention_bytes`.
    pub(super) fn is_over_budget(&self) -> bool {
        self.state.read().disk_bytes() > self.options.retention_bytes.0
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

    /// Removes up to [`RETENTION_CHUNK`] profiles, and reports whether there may be more to remove. An object that cannot be
    /// deleted keeps its row and does not hold up the others.
    async fn expire(self: &Arc<Self>) -> Result<bool, StoreError> {
        let store = Arc::clone(self);
        let oldest = blocking(move || store.index.oldest(RETENTION_CHUNK)).await?;
        let cutoff = time::now_ms().saturating_sub(self.options.retention_age.0.as_millis() as u64);
        let mut excess = self.state.read().disk_bytes().saturating_sub(self.options.retention_bytes.0);
        let expired: Vec<_> = oldest
            .into_iter()
            .take_while(|object| {
                let expires = excess > 0 || object.key.start_ms < cutoff;
                excess = excess.saturating_sub(object.disk_bytes);
                expires
            })
            .collect();
        // Once no readable object is left, only unreadable ones can take the excess.
        let unreadable_until = match expired.last() {
            Some(last) => last.key.hour(),
            None if excess > 0 => u64::MAX,
            None => cutoff / HOUR_MS,
        };
        self.remove_unreadable(unreadable_until).await;
        let has_left_out = self.remove_left_out(cutoff / HOUR_MS).await?;
        if let Some(last) = expired.last() {
            self.expired_ms.fetch_max(last.key.start_ms, Ordering::AcqRel);
        }
        let deletes: Vec<_> = expired.iter().map(|object| self.objects.delete(object.key)).collect();
        let results = stream::iter(deletes).buffered(CONCURRENT_WRITES).collect::<Vec<_>>().await;
        let is_full_step = expired.len() == RETENTION_CHUNK;
        let mut failure = None;
        let expired: Vec<_> = expired
            .into_iter()
            .zip(results)
            .filter_map(|(object, result)| match result {
                Ok(()) => Some(object),
                Err(error) => {
                    failure = Some(error);
                    None
                }
            })
            .collect();
        if let Some(error) = failure {
            self.metrics.store_errors.inc();
            tracing::warn!(%error, "cannot delete an old object; trying again");
        }
        if expired.is_empty() {
            return Ok(has_left_out);
        }
        let hours: BTreeSet<u64> = expired.iter().map(|object| object.key.hour()).collect();
        let emptied = self.state.read().emptied_by(&expired);
        let change = IndexChange::removing(&expired, &emptied);
        let store = Arc::clone(self);
        blocking(move || store.index.commit(&change)).await?;
        self.state.write().remove(&expired, &emptied);
        self.metrics.retention_removed.inc_by(expired.len() as u64);
        tracing::debug!(profiles = expired.len(), "retention removed profiles");
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
        let ids = self.objects.of_hour(hour).await?;
        let store = Arc::clone(self);
        let (known, mut ids) =
            blocking(move || Ok((store.index.contains(ids.iter().copied())?, ids))).await?;
        let mut known = known.into_iter();
        ids.retain(|_| known.next() == Some(false));
        let all = ids.len();
        ids.truncate(RETENTION_CHUNK);
        self.expired_ms.fetch_max((hour + 1) * HOUR_MS - 1, Ordering::AcqRel);
        let deletes: Vec<_> = ids.iter().map(|id| self.objects.delete_in_hour(hour, *id)).collect();
        let results = stream::iter(deletes).buffered(CONCURRENT_WRITES).collect::<Vec<_>>().await;
        let removed = results.iter().filter(|result| result.is_ok()).count();
        self.metrics.retention_removed.inc_by(removed as u64);
        let left = all - removed;
        self.state.write().leave_out(hour, left as u64);
        if left == 0 && !self.state.read().has_hour(hour) {
            self.objects.remove_empty_hour(hour);
        }
        self.update_size_metrics();
        if let Some(error) = results.into_iter().find_map(Result::err) {
            self.metrics.store_errors.inc();
            tracing::warn!(%error, "cannot delete an old object that is not in the index; trying again");
            return Ok(false);
        }
        Ok(true)
    }

    /// Removes the unreadable objects of hours before this one.
    async fn remove_unreadable(&self, hour: u64) {
        let unreadable = self.state.read().unreadable_before(hour);
        for object in unreadable {
            match self.objects.delete_in_hour(object.hour, object.id).await {
                Ok(()) => self.state.write().remove_unreadable(object),
                Err(error) => {
                    self.metrics.store_errors.inc();
                    tracing::warn!(profile = %object.id, %error, "cannot delete an unreadable object; trying again");
                }
            }
        }
    }
}
