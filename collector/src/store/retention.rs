//! Removal of profiles that are too old, and of the oldest ones while the store is too large.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};

use super::{Store, StoreError, blocking, index::IndexChange, writer::CONCURRENT_WRITES};
use crate::time;

/// Profiles of one retention step. The writer accepts batches between two steps.
const RETENTION_CHUNK: usize = 256;

impl Store {
    /// Reports whether the store is larger than `retention_bytes`.
    pub(super) fn is_over_budget(&self) -> bool {
        self.state.read().bytes() > self.options.retention_bytes.0
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

    /// Removes up to [`RETENTION_CHUNK`] profiles, and reports whether there may be more to remove.
    async fn expire(self: &Arc<Self>) -> Result<bool, StoreError> {
        let store = Arc::clone(self);
        let oldest = blocking(move || store.index.oldest(RETENTION_CHUNK)).await?;
        let cutoff = time::now_ms().saturating_sub(self.options.retention_age.0.as_millis() as u64);
        let mut excess = self.state.read().bytes().saturating_sub(self.options.retention_bytes.0);
        let expired: Vec<_> = oldest
            .into_iter()
            .take_while(|object| {
                let expires = excess > 0 || object.key.start_ms < cutoff;
                excess = excess.saturating_sub(object.bytes);
                expires
            })
            .collect();
        if expired.is_empty() {
            return Ok(false);
        }
        let deletes: Vec<_> = expired.iter().map(|object| self.objects.delete(object.key)).collect();
        let results = stream::iter(deletes).buffer_unordered(CONCURRENT_WRITES).collect::<Vec<_>>().await;
        results.into_iter().collect::<Result<(), _>>()?;
        let emptied = self.state.read().emptied_by(&expired);
        let change = IndexChange::removing(&expired, &emptied);
        let store = Arc::clone(self);
        blocking(move || store.index.commit(&change)).await?;
        self.state.write().remove(&expired, &emptied);
        self.metrics.retention_removed.inc_by(expired.len() as u64);
        tracing::debug!(profiles = expired.len(), "retention removed profiles");
        self.update_size_metrics();
        Ok(expired.len() == RETENTION_CHUNK)
    }
}
