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
            return Ok(false);
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
        Ok(is_full_step || self.is_over_budget())
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
