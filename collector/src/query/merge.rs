//! Merges of many profiles into one, on several threads, with a cache of the results.

use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use gannet_proto::{
    pprof::{self, Merger},
    profiles::Profile,
    query as api,
};
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, SemaphorePermit},
};
use tokio_util::sync::CancellationToken;

use super::{
    Query, QueryError, SpanFilter,
    read::{Origin, ReadCounts},
    select::{Found, FoundKind, Selection},
    sources::{Sources, TableSum},
};
use crate::{
    debuginfo::{DebugInfo, Named, NamesVersion},
    store::{ProfileLocation, StoreError},
};

/// Concurrent merges. Each uses up to [`MERGE_THREADS`] threads.
const CONCURRENT_MERGES: usize = 2;
const MERGE_THREADS: usize = 4;
/// Time that a query waits for a merge to end.
const MERGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Distinct stacks of one merged profile. It bounds the memory of a merge.
const MAX_MERGED_SAMPLES: usize = 1_000_000;
/// Profiles that one read returns together, at most.
const PROFILES_OF_READ: usize = 64;
/// Profiles between two checks of the size of a merge.
const SIZE_CHECK_INTERVAL: u64 = 512;
/// Merged profiles in the cache, at most.
const CACHED_MERGES: usize = 1024;

/// A merged profile.
#[derive(Clone)]
pub(crate) struct Merged {
    pub(crate) profile: Arc<Profile>,
    /// Numbers of its sources.
    pub(super) origin: Origin,
    /// Number of profiles that it lacks, because their objects are damaged.
    pub(super) unreadable: u64,
    /// Estimated memory, in bytes.
    weight: u64,
    /// The state of the names from debug information; `None` before the first search.
    names: Option<NamesState>,
}

/// The state of the names of a merged profile.
#[derive(Clone, Copy)]
struct NamesState {
    version: NamesVersion,
    /// The search for names did not run out of time.
    is_complete: bool,
    at: Instant,
    /// Time of the next attempt to read a file that failed.
    retry_at: Option<Instant>,
}

impl Merged {
    /// Returns the same profile with only the samples of these spans.
    fn in_spans(&self, spans: &SpanFilter) -> Self {
        let profile = Arc::new(spans.of(Cow::Borrowed(&self.profile)).into_owned());
        Self { weight: weight(&profile), profile, ..*self }
    }

    /// Reports whether debug information can add no further name.
    fn has_names(&self, debug_info: &DebugInfo, version: NamesVersion) -> bool {
        self.names.is_some_and(|names| {
            names.is_complete
                && names.version == version
                && names.retry_at.is_none_or(|at| Instant::now() < at)
                && !debug_info.may_have_news_since(names.at)
        })
    }

    /// Reports whether the search for names ran out of time, so that the next answer may have more.
    pub(super) fn lacks_names(&self) -> bool {
        self.names.is_some_and(|names| !names.is_complete)
    }
}

#[derive(Clone)]
struct ByWeight;

impl quick_cache::Weighter<[u8; 32], Arc<Merged>> for ByWeight {
    fn weight(&self, _key: &[u8; 32], merged: &Arc<Merged>) -> u64 {
        merged.weight
    }
}

/// The name of a merge in the cache.
#[derive(Clone, Copy)]
pub(super) struct CacheKey {
    hash: [u8; 32],
    /// Version of the names that the result is to have.
    version: NamesVersion,
}

/// Results of earlier merges, and the permits of running ones.
pub(super) struct Merges {
    permits: Semaphore,
    /// By the hash of all source ids.
    cache: quick_cache::sync::Cache<[u8; 32], Arc<Merged>, ByWeight>,
}

impl Merges {
    pub(super) fn new(cache_bytes: u64) -> Self {
        Self {
            permits: Semaphore::new(CONCURRENT_MERGES),
            cache: quick_cache::sync::Cache::with_weighter(CACHED_MERGES, cache_bytes, ByWeight),
        }
    }
}

/// Counts of merges under way, for their caller.
#[derive(Default)]
pub(crate) struct MergeProgress {
    /// Profiles read so far.
    pub(crate) done: AtomicU64,
    /// Profiles to read.
    pub(crate) total: AtomicU64,
    /// Profiles that could not be read.
    pub(crate) unreadable: AtomicU64,
    /// The search for names in debug information ran out of time. Known at the end.
    pub(crate) lacks_names: AtomicBool,
    /// Counts of what the merges read.
    pub(super) read: ReadCounts,
}

impl MergeProgress {
    /// Returns what the merges have read by now.
    pub(crate) fn report(&self) -> api::ReadReport {
        self.read.report()
    }
}

/// Fate of one profile of a merge.
enum Source {
    Merged,
    /// Retention has removed it since the selection.
    Removed,
    Unreadable,
}

/// Numbers of profiles that a merge took and lacks.
#[derive(Default)]
struct SourceCounts {
    merged: u64,
    unreadable: u64,
    /// Bytes of the sources as the store has them.
    read_bytes: u64,
}

impl Query {
    /// Merges the selected samples. Returns the result and its sample type, or `None` for a selection without profiles. If several
    /// sets of sample types fit, the set with the oldest profile wins, among those with a selected sample. Dropping the future ends
    /// the work.
    pub(super) async fn merged(
        self: &Arc<Self>,
        selection: &Selection,
        sample_type: &str,
        progress: &Arc<MergeProgress>,
    ) -> Result<Option<(Arc<Merged>, String)>, QueryError> {
        let found = self.found(selection).await?;
        progress.read.add_tables(found.table_bytes);
        let mut first = None;
        for mergeable in found.mergeable(selection, sample_type)? {
            let sample_type = mergeable.sample_type().to_owned();
            let Some(merged) = self.merge_sources(mergeable.sources, progress).await? else { continue };
            if selection.has_all_samples() {
                return Ok(Some((merged, sample_type)));
            }
            let spans = selection.spans.clone();
            let merged = self.blocking(move |_| Ok(Arc::new(merged.in_spans(&spans)))).await?;
            if !merged.profile.sample.is_empty() {
                return Ok(Some((merged, sample_type)));
            }
            first.get_or_insert((merged, sample_type));
        }
        Ok(first)
    }

    /// Merges profiles that have the same sample types, and returns each result with these types.
    pub(crate) async fn merge_found(
        self: &Arc<Self>,
        found: Found,
    ) -> Result<Vec<(Vec<String>, Arc<Merged>)>, QueryError> {
        let mut all = Vec::new();
        for FoundKind { types, sources, .. } in found.kinds {
            if let Some(merged) = self.merge_sources(sources, &Arc::default()).await? {
                all.push((types, merged));
            }
        }
        Ok(all)
    }

    /// Merges profiles that have the same sample types. Returns `None` if retention has removed all of them. Dropping the future ends
    /// the work.
    async fn merge_sources(
        self: &Arc<Self>,
        sources: Sources,
        progress: &Arc<MergeProgress>,
    ) -> Result<Option<Arc<Merged>>, QueryError> {
        let Sources { mut profiles, tables } = sources;
        // In the order of the store, so that one read can return neighbours.
        profiles.sort_unstable();
        let in_tables = tables.as_ref().map_or(0, TableSum::profiles);
        let total = profiles.len() as u64 + in_tables;
        progress.total.store(total, Ordering::Relaxed);
        let mut hash = Sha256::new();
        if let Some(tables) = &tables {
            hash.update(tables.identity());
        }
        for location in &profiles {
            hash.update(location.key.id.0.to_be_bytes());
        }
        let key = self.cache_key(hash);
        if let Some(merged) = self.cached(key, total, progress).await {
            return Ok(Some(merged));
        }
        let _permit = self.merge_permit().await?;
        let cancelled = CancellationToken::new();
        let _guard = cancelled.clone().drop_guard();
        let sums = match &tables {
            Some(tables) => {
                let (sums, read) = self.sums(tables).await?;
                progress.read.add_tables(read);
                sums
            }
            None => Vec::new(),
        };
        progress.done.fetch_add(in_tables, Ordering::Relaxed);
        let (runtime, of) = (Handle::current(), Arc::clone(progress));
        let merged =
            self.blocking(move |q| q.merge_profiles(&runtime, &profiles, sums, &cancelled, &of)).await?;
        let Some(mut merged) = merged else { return Ok(None) };
        merged.origin.tables = in_tables;
        progress.read.add_merged(&merged.origin);
        Ok(Some(self.with_names(Arc::new(merged), key).await))
    }

    /// Returns the name of a merge in the cache. `sources` has the hash of all that it depends on.
    pub(super) fn cache_key(&self, mut sources: Sha256) -> CacheKey {
        let version = self.debug_info.version();
        // Names from removed files must disappear.
        sources.update(version.removed.to_be_bytes());
        CacheKey { hash: sources.finalize().into(), version }
    }

    /// Returns an earlier merge of `total` profiles from the cache, and counts it.
    pub(super) async fn cached(
        &self,
        key: CacheKey,
        total: u64,
        progress: &MergeProgress,
    ) -> Option<Arc<Merged>> {
        let Some(merged) = self.merges.cache.get(&key.hash) else {
            self.metrics.cache_misses.inc();
            return None;
        };
        progress.done.store(total, Ordering::Relaxed);
        progress.read.add_cached(&merged.origin);
        self.metrics.cache_hits.inc();
        Some(self.with_names(merged, key).await)
    }

    /// Waits until the query may read profiles: it takes several threads.
    pub(super) async fn merge_permit(&self) -> Result<SemaphorePermit<'_>, QueryError> {
        let permit = tokio::time::timeout(MERGE_TIMEOUT, self.merges.permits.acquire()).await;
        permit.ok().and_then(Result::ok).ok_or_else(|| {
            QueryError::Busy(format!("{CONCURRENT_MERGES} other merges are running: try again later"))
        })
    }

    /// Adds the names from debug information to a merged profile, and puts it into the cache.
    pub(super) async fn with_names(&self, merged: Arc<Merged>, key: CacheKey) -> Arc<Merged> {
        let CacheKey { hash, version } = key;
        if merged.has_names(&self.debug_info, version) {
            return merged;
        }
        let at = Instant::now();
        let Named { profile, is_complete, retry_at } = self.debug_info.name(&merged.profile).await;
        let profile = profile.map_or_else(|| Arc::clone(&merged.profile), Arc::new);
        let merged = Arc::new(Merged {
            weight: weight(&profile),
            profile,
            origin: merged.origin,
            unreadable: merged.unreadable,
            names: Some(NamesState { version, is_complete, at, retry_at }),
        });
        // The result lacks the damaged profiles. A person may restore their files, so the cache must not hold it.
        if merged.unreadable == 0 {
            self.merges.cache.insert(hash, Arc::clone(&merged));
            self.metrics.cache_bytes.set(self.merges.cache.weight() as i64);
        }
        merged
    }

    /// Reads and merges profiles on several threads, and adds sums. Each thread holds what one read returned, one
    /// decoded profile and its part of the result at a time.
    pub(super) fn merge_profiles(
        &self,
        runtime: &Handle,
        locations: &[ProfileLocation],
        sums: Vec<Profile>,
        cancelled: &CancellationToken,
        progress: &MergeProgress,
    ) -> Result<Option<Merged>, QueryError> {
        let parts = on_threads(locations, |part| self.merge_part(runtime, part, cancelled, progress));
        let (mut merger, mut profiles, mut unreadable, mut read_bytes) = (Merger::new(), 0, 0, 0);
        for sum in sums {
            merger.add(&sum).map_err(|e| QueryError::Invalid(e.to_string()))?;
        }
        for part in parts {
            let (profile, counts) = part?;
            profiles += counts.merged;
            unreadable += counts.unreadable;
            read_bytes += counts.read_bytes;
            if let Some(profile) = profile {
                merger.add(&profile).map_err(|e| QueryError::Invalid(e.to_string()))?;
            }
        }
        self.metrics.merged_profiles.inc_by(profiles);
        self.metrics.query_read_bytes.observe(read_bytes as f64);
        let mut profile = match merger.finish() {
            Some(profile) => profile,
            // An empty result that says what it lacks.
            None if unreadable > 0 => Profile { string_table: vec![String::new()], ..Profile::default() },
            None => return Ok(None),
        };
        if unreadable > 0 {
            // Travels with the downloaded file.
            profile.comment.push(profile.string_table.len() as i64);
            profile.string_table.push(format!(
                "gannet: {unreadable} profiles are missing, because their objects are damaged"
            ));
        }
        Ok(Some(Merged {
            weight: weight(&profile),
            profile: Arc::new(profile),
            origin: Origin { segments: profiles, ..Origin::default() },
            unreadable,
            names: None,
        }))
    }

    /// Reads profiles in the order of the store, neighbours together. Yields an error for those behind a cancellation. Blocking.
    pub(super) fn read_each<'l>(
        &'l self,
        runtime: &'l Handle,
        locations: &'l [ProfileLocation],
        cancelled: &'l CancellationToken,
    ) -> impl Iterator<Item = (&'l ProfileLocation, Result<Option<Bytes>, StoreError>)> {
        let runs =
            locations.chunk_by(ProfileLocation::is_neighbour_of).flat_map(|run| run.chunks(PROFILES_OF_READ));
        let read = runs.flat_map(move |run| {
            let profiles = if cancelled.is_cancelled() {
                run.iter().map(|_| Err(StoreError::Ended)).collect()
            } else {
                runtime.block_on(self.store.profiles(run))
            };
            run.iter().zip(profiles)
        });
        read.map(|(location, profile)| {
            (location, if cancelled.is_cancelled() { Err(StoreError::Ended) } else { profile })
        })
    }

    /// Merges the profiles of one thread. Returns the result and the counts of its sources.
    fn merge_part(
        &self,
        runtime: &Handle,
        locations: &[ProfileLocation],
        cancelled: &CancellationToken,
        progress: &MergeProgress,
    ) -> Result<(Option<Profile>, SourceCounts), QueryError> {
        let (mut merger, mut counts) = (Merger::new(), SourceCounts::default());
        for (location, profile) in self.read_each(runtime, locations, cancelled) {
            let bytes = profile.as_ref().map_or(0, |found| found.as_ref().map_or(0, Bytes::len)) as u64;
            counts.read_bytes += bytes;
            progress.read.add_segments(bytes);
            match self.merge_one(location, profile, &mut merger)? {
                Source::Merged => counts.merged += 1,
                Source::Removed => {}
                Source::Unreadable => {
                    counts.unreadable += 1;
                    progress.unreadable.fetch_add(1, Ordering::Relaxed);
                }
            }
            let done = progress.done.fetch_add(1, Ordering::Relaxed) + 1;
            if done.is_multiple_of(SIZE_CHECK_INTERVAL) {
                let so_far = merger.finish();
                check_size(so_far.as_ref())?;
                merger = Merger::new();
                if let Some(so_far) = so_far {
                    merger.add(&so_far).map_err(|e| QueryError::Invalid(e.to_string()))?;
                }
            }
        }
        let merged = merger.finish();
        check_size(merged.as_ref())?;
        Ok((merged, counts))
    }

    /// Adds one profile. A damaged one is logged and counted.
    fn merge_one(
        &self,
        location: &ProfileLocation,
        profile: Result<Option<Bytes>, StoreError>,
        merger: &mut Merger,
    ) -> Result<Source, QueryError> {
        let bytes = match profile {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(Source::Removed),
            Err(error @ StoreError::Damaged(_)) => {
                tracing::warn!(%error, "left a damaged object out of a merge");
                return Ok(Source::Unreadable);
            }
            Err(error) => return Err(error.into()),
        };
        let added = pprof::decode(&bytes, self.max_inflated).and_then(|profile| merger.add(&profile));
        if let Err(error) = added {
            self.metrics.objects_corrupt.inc();
            tracing::warn!(profile = %location.key.id, %error, "left a damaged profile out of a merge");
            return Ok(Source::Unreadable);
        }
        Ok(Source::Merged)
    }

    /// Merges all profiles of the selection and returns the result in gzipped pprof.
    pub(crate) async fn merge(
        self: &Arc<Self>,
        selection: &Selection,
        sample_type: &str,
        progress: &Arc<MergeProgress>,
    ) -> Result<Bytes, QueryError> {
        let _timer = self.metrics.query_timer("merge");
        let (merged, _) = self
            .merged(selection, sample_type, progress)
            .await?
            .ok_or_else(|| QueryError::NotFound(format!("no profile matches {}", selection.describe())))?;
        progress.lacks_names.store(merged.lacks_names(), Ordering::Relaxed);
        if selection.has_all_samples() {
            return self.blocking(move |_| Ok(pprof::encode(&merged.profile).into())).await;
        }
        let profile = Arc::unwrap_or_clone(merged).profile;
        let of = selection.describe();
        self.blocking(move |_| encode_selected(Arc::unwrap_or_clone(profile), &of)).await
    }
}

/// Splits locations among up to [`MERGE_THREADS`] threads, and returns the result of each in order.
pub(super) fn on_threads<L: Sync, T: Send>(
    locations: &[L],
    work: impl Fn(&[L]) -> Result<T, QueryError> + Sync,
) -> Vec<Result<T, QueryError>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MERGE_THREADS);
    let part = locations.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let work = &work;
        let handles: Vec<_> = locations.chunks(part).map(|part| scope.spawn(move || work(part))).collect();
        handles.into_iter().map(|h| h.join().unwrap_or(Err(StoreError::Ended.into()))).collect()
    })
}

/// Returns a profile with selected samples in gzipped pprof, without the tables that only other samples need. `of` describes its
/// profiles.
pub(super) fn encode_selected(profile: Profile, of: &str) -> Result<Bytes, QueryError> {
    if profile.sample.is_empty() {
        return Err(QueryError::NotFound(format!(
            "no sample of {of} has one of these spans or traces: a sample has a span only if its program publishes spans"
        )));
    }
    Ok(pprof::encode(&pprof::needed(profile)).into())
}

/// Estimates the memory of a profile, in bytes.
fn weight(profile: &Profile) -> u64 {
    profile.encoded_len() as u64 * 3
}

fn check_size(merged: Option<&Profile>) -> Result<(), QueryError> {
    match merged {
        Some(merged) => check_stacks(merged.sample.len()),
        None => Ok(()),
    }
}

/// Returns an error above the limit of distinct stacks.
pub(super) fn check_stacks(stacks: usize) -> Result<(), QueryError> {
    if stacks <= MAX_MERGED_SAMPLES {
        return Ok(());
    }
    Err(QueryError::TooLarge(format!(
        "the merged profile has more than {MAX_MERGED_SAMPLES} distinct stacks: choose a shorter range or fewer series"
    )))
}
