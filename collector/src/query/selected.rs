//! The profiles of a selection, for queries that do not merge them: the only place that applies the spans of such a selection.
//!
//! The index has the sums of each profile, but not those of its spans. So a selection of spans reads its profiles, as a merge does.

use std::sync::Arc;

use gannet_proto::pprof;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::{
    Query, QueryError, SpanFilter,
    merge::on_threads,
    select::{Profiles, Selection, above_limits, within_limits},
};
use crate::{
    selector::Selector,
    store::{ObjectKey, ProfileLocation, StoreError, StoredProfile},
};

/// Profiles that one page of a list reads at most, to find those with a span.
const READ_FOR_LIST: usize = 1024;
/// Profiles of a list that are read together. A page often needs no more.
const READ_TOGETHER: usize = 256;

/// The profiles of a selection, with the sums of the selected samples.
pub(super) struct Selected(Source);

enum Source {
    /// All samples of these profiles: the sums are in the index.
    Index(Profiles),
    /// Profiles that have some of the selected samples.
    Read(Vec<StoredProfile>),
}

impl Query {
    /// Returns the profiles of a selection for [`Query::scan`]. Reads them if the selection names spans. Dropping the future ends the
    /// work.
    pub(super) async fn select(self: &Arc<Self>, selection: Selection) -> Result<Selected, QueryError> {
        if selection.has_all_samples() {
            return Ok(Selected(Source::Index(selection.of)));
        }
        let of = selection.clone();
        let found = self.blocking(move |q| {
            let (mut found, mut bytes) = (Vec::new(), 0);
            q.scan_index(&of.of, |entry| {
                bytes += entry.row.bytes;
                found.push(entry);
                within_limits(&q.options, found.len(), bytes)
            })?;
            if within_limits(&q.options, found.len(), bytes) {
                Ok(found)
            } else {
                Err(above_limits(&q.options, &of.describe()))
            }
        });
        let found = found.await?;
        Ok(Selected(Source::Read(self.in_spans(found, &selection.spans).await?)))
    }

    /// Calls `each` for every selected profile until `each` returns false. Blocking.
    pub(super) fn scan(
        &self,
        selected: &Selected,
        mut each: impl FnMut(StoredProfile) -> bool,
    ) -> Result<(), QueryError> {
        match &selected.0 {
            Source::Index(profiles) => self.scan_index(profiles, each)?,
            Source::Read(profiles) => {
                let _ = profiles.iter().all(|entry| each(entry.clone()));
            }
        }
        Ok(())
    }

    /// Returns up to `limit` selected profiles of a range, newest first, and the key of the last one that it read if older ones may
    /// follow. `before` skips to the profiles that are older than this one.
    pub(super) async fn newest(
        self: &Arc<Self>,
        selector: Selector,
        (from_ms, until_ms): (u64, u64),
        spans: &SpanFilter,
        mut before: Option<ObjectKey>,
        limit: usize,
    ) -> Result<(Vec<StoredProfile>, Option<ObjectKey>), QueryError> {
        let selector = Arc::new(selector);
        let (mut newest, mut read) = (Vec::new(), 0);
        loop {
            let (selector, after) = (Arc::clone(&selector), before);
            // One more than the page holds shows whether there is a next page.
            let count = if *spans == SpanFilter::All { limit + 1 } else { READ_TOGETHER };
            let page =
                self.blocking(move |q| Ok(q.store.newest(&selector, from_ms, until_ms, after, count)?));
            let page = page.await?;
            let (len, last) = (page.len(), page.last().map(|entry| entry.key));
            newest.extend(self.in_spans(page, spans).await?);
            if newest.len() > limit {
                newest.truncate(limit);
                let last = newest.last().map(|entry| entry.key);
                return Ok((newest, last));
            }
            read += len;
            if len < count {
                return Ok((newest, None));
            }
            if read >= READ_FOR_LIST {
                return Ok((newest, last));
            }
            before = last;
        }
    }

    /// Returns those of these profiles that have a sample in the spans, with the sums of these samples, in the same order. Dropping the
    /// future ends the work.
    pub(super) async fn in_spans(
        self: &Arc<Self>,
        profiles: Vec<StoredProfile>,
        spans: &SpanFilter,
    ) -> Result<Vec<StoredProfile>, QueryError> {
        if *spans == SpanFilter::All || profiles.is_empty() {
            return Ok(profiles);
        }
        let _permit = self.merge_permit().await?;
        let cancelled = CancellationToken::new();
        let _guard = cancelled.clone().drop_guard();
        let (runtime, spans) = (Handle::current(), spans.clone());
        self.blocking(move |q| q.read_spans(&runtime, profiles, &spans, &cancelled)).await
    }

    fn read_spans(
        &self,
        runtime: &Handle,
        mut profiles: Vec<StoredProfile>,
        spans: &SpanFilter,
        cancelled: &CancellationToken,
    ) -> Result<Vec<StoredProfile>, QueryError> {
        let mut places: Vec<(ProfileLocation, usize)> =
            profiles.iter().enumerate().map(|(index, entry)| (entry.location(), index)).collect();
        places.sort_unstable();
        let sums = on_threads(&places, |part| self.sum_part(runtime, part, spans, cancelled));
        let mut has_samples = vec![false; profiles.len()];
        for part in sums {
            for (index, totals) in part? {
                has_samples[index] = true;
                let row = &mut profiles[index].row;
                row.samples = totals.first().and_then(|n| u64::try_from(*n).ok()).unwrap_or(0);
                for (kind, total) in row.types.iter_mut().zip(totals) {
                    kind.total = total;
                }
            }
        }
        let mut kept = has_samples.into_iter();
        profiles.retain(|_| kept.next().unwrap_or(false));
        Ok(profiles)
    }

    /// Reads the profiles of one thread. Returns the sums of the samples in the spans, by the index of the profile. A damaged profile
    /// is logged and left out.
    fn sum_part(
        &self,
        runtime: &Handle,
        places: &[(ProfileLocation, usize)],
        spans: &SpanFilter,
        cancelled: &CancellationToken,
    ) -> Result<Vec<(usize, Vec<i64>)>, QueryError> {
        let mut sums = Vec::new();
        let (locations, indexes): (Vec<ProfileLocation>, Vec<usize>) = places.iter().copied().unzip();
        for ((location, bytes), index) in self.read_each(runtime, &locations, cancelled).zip(indexes) {
            let bytes = match bytes {
                Ok(Some(bytes)) => bytes,
                Ok(None) => continue,
                Err(error @ StoreError::Damaged(_)) => {
                    tracing::warn!(%error, "left a damaged object out of a search for spans");
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            match pprof::decode(&bytes, self.max_inflated) {
                Ok(profile) => sums.extend(spans.totals(&profile).map(|totals| (index, totals))),
                Err(error) => {
                    self.metrics.objects_corrupt.inc();
                    tracing::warn!(profile = %location.key.id, %error, "left a damaged profile out of a search for spans");
                }
            }
        }
        Ok(sums)
    }
}
