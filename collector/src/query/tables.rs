//! Selections of which ClickHouse merges the part in the tables, and the collector the rest.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use gannet_proto::profiles::Profile;
use ulid::Ulid;

use super::{
    Query, QueryError,
    select::{Found, Profiles, Selection},
    sources::TableSum,
};
use crate::{
    clickhouse::{Condition, TableKind, TableSelection},
    selector::{Matcher, Selector},
    store::StoredProfile,
    time,
};

/// Time by which a segment may be older than a profile in it. A node's clock may be wrong.
const MAX_SKEW: Duration = Duration::from_secs(24 * 3600);

/// Deleted profiles that a statement for ClickHouse leaves out, at most, until the tables have lost them.
const MAX_DELETED: usize = 10_000;

/// A range of series, as the index and as the tables know it.
pub(crate) struct TableRange {
    pub(crate) series: Vec<u64>,
    /// `None`: the tables cannot select these series.
    pub(crate) conditions: Option<Vec<Condition>>,
    pub(crate) from_ms: u64,
    pub(crate) until_ms: u64,
}

impl Query {
    /// Returns the profiles of a selection, from the index or from the tables.
    pub(super) async fn found(self: &Arc<Self>, selection: &Selection) -> Result<Found, QueryError> {
        match (&self.clickhouse, &selection.of) {
            // ClickHouse has no advantage for a single profile.
            (None, _) | (_, Profiles::One(_)) => {
                let of = selection.clone();
                self.blocking(move |query| query.find(&of)).await
            }
            (Some(_), Profiles::Range { selector, from_ms, until_ms }) => {
                let series =
                    self.store.series(selector, *from_ms, *until_ms).into_iter().map(|s| s.id).collect();
                let conditions = Some(self.conditions(selector));
                let range = TableRange { series, conditions, from_ms: *from_ms, until_ms: *until_ms };
                self.found_in(range, |_| true, |_| true).await
            }
        }
    }

    /// Reports whether ClickHouse merges profiles.
    pub(crate) fn has_tables(&self) -> bool {
        self.clickhouse.is_some()
    }

    /// Returns the conditions of a selector for the tables. The collector applies regular expressions itself, to the values of its
    /// series, because ClickHouse reads them in another dialect.
    pub(crate) fn conditions(&self, selector: &Selector) -> Vec<Condition> {
        let condition = |matcher: &Matcher| {
            let values = match matcher.plain() {
                Some(value) => vec![value.to_owned()],
                None => self.values_where(matcher.name(), |value| matcher.fits(value)),
            };
            Condition { label: matcher.name().to_owned(), values, is_negated: matcher.is_negated() }
        };
        selector.matchers().iter().map(condition).collect()
    }

    /// Returns the values of a label that fit, with the empty value of series without the label.
    pub(crate) fn values_where(&self, label: &str, fits: impl Fn(&str) -> bool) -> Vec<String> {
        let series = self.store.series(&Selector::default(), 0, u64::MAX);
        let values: BTreeSet<&str> =
            series.iter().map(|series| series.labels.get(label).map_or("", String::as_str)).collect();
        values.into_iter().filter(|value| fits(value)).map(str::to_owned).collect()
    }

    /// Returns profiles that start in the range. ClickHouse merges those of the tables; the index has those that the tables lack.
    /// `keep` and `keep_kind` decide about the ones and the others.
    pub(crate) async fn found_in(
        self: &Arc<Self>,
        range: TableRange,
        mut keep: impl FnMut(&StoredProfile) -> bool + Send + 'static,
        keep_kind: impl Fn(&TableKind) -> bool,
    ) -> Result<Found, QueryError> {
        let TableRange { series, conditions, from_ms, until_ms } = range;
        let (Some(clickhouse), Some(conditions)) = (self.clickhouse.clone(), conditions) else {
            return self.blocking(move |query| query.find_profiles(&series, from_ms, until_ms, keep)).await;
        };
        // The tables keep an hour until its last profile is removed.
        let cutoff_ms = time::now_ms().saturating_sub(self.store.retention_age().as_millis() as u64);
        let oldest_ms = self.store.times().map_or(cutoff_ms, |(first, _)| first.max(cutoff_ms));
        let from_ms = from_ms.max(oldest_ms);
        if from_ms >= until_ms {
            return Ok(Found::default());
        }
        let (coverage, versions) = clickhouse.coverage().await?;
        let Some(versions) = versions else {
            drop(coverage);
            return self.blocking(move |query| query.find_profiles(&series, from_ms, until_ms, keep)).await;
        };
        let outside = self.blocking(move |query| {
            let since_ms = from_ms.saturating_sub(MAX_SKEW.as_millis() as u64);
            // A deletion replaces segments, and the tables know them by their former ids.
            let names = |id| query.store.segment_names(id);
            let all = query.store.segments_since(since_ms, |_| true).into_iter();
            let pending: Vec<_> = all.filter(|id| !names(*id).iter().any(|id| coverage.has(*id))).collect();
            let has_some = |id: &Ulid| names(*id).iter().any(|id| coverage.has_some(*id));
            let halves: HashSet<_> = pending.iter().copied().filter(has_some).collect();
            drop(coverage);
            let ids: HashSet<u64> = series.iter().copied().collect();
            let of = || "the part of the selection that the tables lack".to_owned();
            let check = |found: &Found| found.check(&query.options, of);
            let mut found = Found::default();
            let mut excluded = query.store.deleted_between(from_ms..until_ms, MAX_DELETED + 1)?;
            if excluded.len() > MAX_DELETED {
                return Err(QueryError::Busy(format!(
                    "the tables still have more than {MAX_DELETED} deleted profiles of this range; ask again in a minute, or for a \
                     shorter range"
                )));
            }
            for segment in pending {
                for (id, series) in query.store.batches_of_segment(segment, from_ms, until_ms)? {
                    if halves.contains(&segment) {
                        excluded.push(id);
                    }
                    if ids.contains(&series)
                        && let Some(entry) = query.store.entry(id)?
                        && keep(&entry)
                    {
                        found.add(&entry);
                    }
                }
                check(&found)?;
            }
            if query.store.has_profiles_outside_segments() {
                query.scan_series(&series, from_ms, until_ms, |entry| {
                    if entry.is_outside_segments() && keep(&entry) {
                        found.add(&entry);
                    }
                    found.fits(&query.options)
                })?;
                check(&found)?;
            }
            Ok((found, excluded))
        });
        let (mut found, excluded) = outside.await?;
        let of = Arc::new(TableSelection { versions, from_ms, until_ms, conditions, excluded });
        let (kinds, read_bytes) = clickhouse.kinds(&of).await?;
        found.table_bytes = read_bytes;
        let all: Arc<[TableKind]> = kinds.into();
        let mut sums: Vec<TableSum> = Vec::new();
        for kind in all.iter().filter(|kind| keep_kind(kind)) {
            match sums.iter_mut().find(|sum| sum.types() == kind.types) {
                Some(sum) => sum.kinds.push(kind.clone()),
                None => sums.push(TableSum {
                    of: Arc::clone(&of),
                    kinds: vec![kind.clone()],
                    all: Arc::clone(&all),
                }),
            }
        }
        for sum in sums {
            found.add_sum(sum);
        }
        Ok(found)
    }

    /// Lets ClickHouse merge profiles of the tables. Also returns the bytes that it read.
    pub(super) async fn sums(&self, of: &TableSum) -> Result<(Vec<Profile>, u64), QueryError> {
        let Some(clickhouse) = &self.clickhouse else { return Ok((Vec::new(), 0)) };
        let (merged, read) = clickhouse.merge(&of.of, &of.kinds, &of.all).await?;
        self.metrics.clickhouse_profiles.inc_by(of.profiles());
        Ok((merged, read))
    }
}
