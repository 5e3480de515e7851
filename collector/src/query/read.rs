//! What queries read: the numbers that an answer states.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use gannet_proto::query as api;

/// Numbers of the profiles in a merge, by the place that their values come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Origin {
    /// Read one by one, from segments.
    pub(super) segments: u64,
    /// Added up by ClickHouse, from the tables.
    pub(super) tables: u64,
    /// Added up by the collector, from the tables of sums.
    pub(super) sums: u64,
}

impl Origin {
    /// Returns the number of all profiles.
    pub(super) fn profiles(&self) -> u64 {
        let Self { segments, tables, sums } = self;
        segments + tables + sums
    }
}

/// Counts of the merges of one query, for an answer and while they run.
pub(super) struct ReadCounts {
    began: Instant,
    segment_profiles: AtomicU64,
    segment_bytes: AtomicU64,
    table_profiles: AtomicU64,
    table_bytes: AtomicU64,
    sum_profiles: AtomicU64,
    sum_bytes: AtomicU64,
    cached_profiles: AtomicU64,
}

impl Default for ReadCounts {
    /// Starts the time of the query.
    fn default() -> Self {
        Self {
            began: Instant::now(),
            segment_profiles: AtomicU64::default(),
            segment_bytes: AtomicU64::default(),
            table_profiles: AtomicU64::default(),
            table_bytes: AtomicU64::default(),
            sum_profiles: AtomicU64::default(),
            sum_bytes: AtomicU64::default(),
            cached_profiles: AtomicU64::default(),
        }
    }
}

impl ReadCounts {
    /// Adds bytes read from segments.
    pub(super) fn add_segments(&self, bytes: u64) {
        self.segment_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds bytes that ClickHouse read.
    pub(super) fn add_tables(&self, bytes: u64) {
        self.table_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds bytes read from the tables of sums, and of their stacks and frames.
    pub(super) fn add_sums(&self, bytes: u64) {
        self.sum_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds the profiles of a merge.
    pub(super) fn add_merged(&self, origin: &Origin) {
        let Origin { segments, tables, sums } = origin;
        self.segment_profiles.fetch_add(*segments, Ordering::Relaxed);
        self.table_profiles.fetch_add(*tables, Ordering::Relaxed);
        self.sum_profiles.fetch_add(*sums, Ordering::Relaxed);
    }

    /// Adds the profiles of an earlier merge, which this query did not read.
    pub(super) fn add_cached(&self, origin: &Origin) {
        self.add_merged(origin);
        self.cached_profiles.fetch_add(origin.profiles(), Ordering::Relaxed);
    }

    /// Returns the counts by now.
    pub(super) fn report(&self) -> api::ReadReport {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        api::ReadReport {
            segment_profiles: load(&self.segment_profiles),
            segment_bytes: load(&self.segment_bytes),
            table_profiles: load(&self.table_profiles),
            table_bytes: load(&self.table_bytes),
            sum_profiles: load(&self.sum_profiles),
            sum_bytes: load(&self.sum_bytes),
            cached_profiles: load(&self.cached_profiles),
            took: prost_types::Duration::try_from(self.began.elapsed()).ok(),
        }
    }
}
