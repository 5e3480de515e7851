//! Reading the store: one engine behind the gRPC service and the HTTP API.

mod grpc;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use gannet_proto::{
    pprof::{self, FlameTree, Merger, Side},
    profiles::Profile,
    query as api,
};
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use ulid::Ulid;

pub(crate) use self::grpc::QueryGrpc;
pub use crate::selector::{Selector, SelectorError};
use crate::{
    Config,
    ingest::MAX_INFLATION,
    metrics::Metrics,
    store::{Entry, IndexError, ObjectKey, Store, StoreError},
    time,
};

/// What a range is if nobody says.
const DEFAULT_RANGE_MS: u64 = 3_600_000;
/// Profiles in one answer of a list.
const MAX_LIST: u32 = 10_000;
/// Points in one timeline: more than a screen is wide.
const MAX_POINTS: u64 = 5_000;
/// Merges at one time; each uses several threads.
const MERGES_AT_ONCE: usize = 2;
/// Threads of one merge.
const MERGE_THREADS: usize = 4;
/// How long a query waits for others.
const PATIENCE: Duration = Duration::from_secs(30);
/// Nodes of a flame graph if nobody says, and at most.
const FLAME_NODES: u32 = 20_000;
const MAX_FLAME_NODES: u32 = 200_000;
/// Rows of a table if nobody says, and at most.
const TOP_ROWS: u32 = 100;
const MAX_TOP_ROWS: u32 = 10_000;
/// Distinct stacks of one merged profile: what bounds the memory of a merge.
const MAX_MERGED_SAMPLES: usize = 1_000_000;
/// Profiles after which a merge looks how large it is by now.
const SIZE_CHECK_EVERY: u64 = 512;

/// Why a query has no answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// The question is wrong.
    #[error("{0}")]
    Bad(String),
    /// Nothing is there.
    #[error("{0}")]
    NotFound(String),
    /// The answer would be larger than the collector is willing to make.
    #[error("{0}")]
    TooMuch(String),
    /// Not now.
    #[error("{0}")]
    Busy(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<SelectorError> for QueryError {
    fn from(error: SelectorError) -> Self {
        Self::Bad(error.to_string())
    }
}

impl From<IndexError> for QueryError {
    fn from(error: IndexError) -> Self {
        Self::Store(error.into())
    }
}

/// Which profiles.
#[derive(Debug, Clone)]
pub(crate) enum Selection {
    Range { selector: Selector, from_ms: u64, until_ms: u64 },
    One(Ulid),
}

impl Selection {
    /// The one way to make one: what is not given has its default.
    pub(crate) fn new(
        query: &str,
        from_ms: Option<u64>,
        until_ms: Option<u64>,
        profile_id: &str,
    ) -> Result<Self, QueryError> {
        if !profile_id.is_empty() {
            return Ok(Self::One(profile_id_from(profile_id)?));
        }
        let until_ms = until_ms.unwrap_or_else(time::now_ms);
        let from_ms = from_ms.unwrap_or(until_ms.saturating_sub(DEFAULT_RANGE_MS));
        if from_ms >= until_ms {
            return Err(QueryError::Bad(format!(
                "the range is empty: `from` ({from_ms}) must lie before `until` ({until_ms})"
            )));
        }
        Ok(Self::Range { selector: Selector::parse(query)?, from_ms, until_ms })
    }

    fn words(&self) -> String {
        match self {
            Self::One(id) => format!("profile {id}"),
            Self::Range { selector, from_ms, until_ms } => {
                let at = |ms: u64| {
                    jiff::Timestamp::from_millisecond(ms as i64)
                        .map_or_else(|_| ms.to_string(), |t| t.to_string())
                };
                format!("{selector} between {} and {}", at(*from_ms), at(*until_ms))
            }
        }
    }
}

pub(crate) fn profile_id_from(text: &str) -> Result<Ulid, QueryError> {
    Ulid::from_string(text).map_err(|_| {
        QueryError::Bad(format!(
            "profile_id `{text}` is not a ULID: 26 letters and digits, as a list of profiles shows"
        ))
    })
}

/// The profiles of a selection that can be merged with one another.
struct Selected {
    keys: Vec<ObjectKey>,
    types: Vec<String>,
    type_index: usize,
}

impl Selected {
    fn sample_type(&self) -> &str {
        self.types.get(self.type_index).map_or("", String::as_str)
    }
}

/// Profiles as one.
pub(crate) struct Merged {
    pub(crate) profile: Profile,
    /// How many.
    pub(crate) profiles: u64,
    weight: u64,
}

#[derive(Clone)]
struct ByWeight;

impl quick_cache::Weighter<[u8; 32], Arc<Merged>> for ByWeight {
    fn weight(&self, _key: &[u8; 32], merged: &Arc<Merged>) -> u64 {
        merged.weight
    }
}

/// How far a merge is.
#[derive(Default)]
pub(crate) struct Progress {
    pub(crate) done: AtomicU64,
    pub(crate) total: AtomicU64,
}

/// Answers questions about the store.
pub(crate) struct Query {
    store: Arc<Store>,
    metrics: Metrics,
    merges: Semaphore,
    merged: quick_cache::sync::Cache<[u8; 32], Arc<Merged>, ByWeight>,
    max_profiles: usize,
    max_bytes: u64,
    max_inflated: usize,
}

impl Query {
    pub(crate) fn new(store: Arc<Store>, config: &Config, metrics: Metrics) -> Self {
        Self {
            store,
            metrics,
            merges: Semaphore::new(MERGES_AT_ONCE),
            merged: quick_cache::sync::Cache::with_weighter(1024, config.query_cache_bytes, ByWeight),
            max_profiles: config.query_max_profiles,
            max_bytes: config.query_max_bytes,
            max_inflated: config.max_batch_bytes as usize * MAX_INFLATION,
        }
    }

    /// Runs what reads the index off the asynchronous threads.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        f: impl FnOnce(&Self) -> Result<T, QueryError> + Send + 'static,
    ) -> Result<T, QueryError> {
        let query = Arc::clone(self);
        tokio::task::spawn_blocking(move || f(&query)).await.map_err(|_| StoreError::Ended)?
    }

    /// The labels that the selected series have.
    pub(crate) fn label_names(&self, selection: &Selection) -> Result<Vec<String>, QueryError> {
        let _timer = self.metrics.query_timer("label_names");
        let names: BTreeSet<String> =
            self.all_labels(selection)?.iter().flat_map(|labels| labels.keys().cloned()).collect();
        Ok(names.into_iter().collect())
    }

    /// The values of one label.
    pub(crate) fn label_values(&self, selection: &Selection, name: &str) -> Result<Vec<String>, QueryError> {
        let _timer = self.metrics.query_timer("label_values");
        if name.is_empty() {
            return Err(QueryError::Bad("name: which label's values?".into()));
        }
        let values: BTreeSet<String> =
            self.all_labels(selection)?.iter().filter_map(|labels| labels.get(name).cloned()).collect();
        Ok(values.into_iter().collect())
    }

    fn all_labels(
        &self,
        selection: &Selection,
    ) -> Result<Vec<Arc<gannet_proto::labels::Labels>>, QueryError> {
        Ok(match selection {
            Selection::Range { selector, from_ms, until_ms } => {
                self.store.series(selector, *from_ms, *until_ms).into_iter().map(|s| s.labels).collect()
            }
            Selection::One(id) => self.store.labels_of(self.entry(*id)?.series).into_iter().collect(),
        })
    }

    /// One entry by id; one that only carries a ledger is no profile.
    fn entry(&self, id: Ulid) -> Result<Entry, QueryError> {
        match self.store.index().by_id(id)? {
            Some(entry) if entry.row.bytes > 0 => Ok(entry),
            _ => Err(QueryError::NotFound(format!(
                "there is no profile {id}: it never came, or retention removed it"
            ))),
        }
    }

    /// Calls `each` for every profile of the selection.
    fn scan(&self, selection: &Selection, mut each: impl FnMut(Entry) -> bool) -> Result<(), QueryError> {
        match selection {
            Selection::One(id) => {
                each(self.entry(*id)?);
            }
            Selection::Range { selector, from_ms, until_ms } => {
                let series: Vec<u64> =
                    self.store.series(selector, *from_ms, *until_ms).into_iter().map(|s| s.id).collect();
                self.store.index().scan(&series, *from_ms, *until_ms, each)?;
            }
        }
        Ok(())
    }

    /// The series of the selection that have profiles in it.
    pub(crate) async fn series(
        self: &Arc<Self>,
        selection: Selection,
    ) -> Result<Vec<api::SeriesInfo>, QueryError> {
        let _timer = self.metrics.query_timer("series");
        self.blocking(move |q| {
            struct Sum {
                profiles: u64,
                samples: u64,
                first_ms: u64,
                last_ms: u64,
                types: BTreeSet<String>,
            }
            let mut sums: HashMap<u64, Sum> = HashMap::new();
            q.scan(&selection, |entry| {
                let at = entry.key.start_ms;
                let sum = sums.entry(entry.series).or_insert_with(|| Sum {
                    profiles: 0,
                    samples: 0,
                    first_ms: at,
                    last_ms: at,
                    types: BTreeSet::new(),
                });
                sum.profiles += 1;
                sum.samples += entry.row.samples;
                sum.first_ms = sum.first_ms.min(at);
                sum.last_ms = sum.last_ms.max(at);
                for t in entry.row.types {
                    if !sum.types.contains(&t.name) {
                        sum.types.insert(t.name);
                    }
                }
                true
            })?;
            let mut series: Vec<_> = sums
                .into_iter()
                .filter_map(|(id, sum)| {
                    Some(api::SeriesInfo {
                        labels: q.store.labels_of(id)?.as_ref().clone(),
                        profiles: sum.profiles,
                        samples: sum.samples,
                        first: Some(time::timestamp(sum.first_ms)),
                        last: Some(time::timestamp(sum.last_ms)),
                        sample_types: sum.types.into_iter().collect(),
                    })
                })
                .collect();
            series.sort_by(|a, b| a.labels.cmp(&b.labels));
            Ok(series)
        })
        .await
    }

    /// Profiles, newest first, and the token of the next page, empty at the end.
    pub(crate) async fn list(
        self: &Arc<Self>,
        selection: Selection,
        limit: u32,
        page_token: String,
    ) -> Result<(Vec<api::ProfileInfo>, String), QueryError> {
        let _timer = self.metrics.query_timer("list_profiles");
        if limit > MAX_LIST {
            return Err(QueryError::Bad(format!(
                "limit {limit} is above {MAX_LIST}: use page_token for more"
            )));
        }
        let limit = if limit == 0 { 100 } else { limit as usize };
        let before = match page_token.as_str() {
            "" => None,
            token => {
                let parsed = token.split_once('-').and_then(|(ms, id)| {
                    Some(ObjectKey { start_ms: ms.parse().ok()?, id: Ulid::from_string(id).ok()? })
                });
                Some(parsed.ok_or_else(|| {
                    QueryError::Bad(format!("page_token `{token}` is not one that a list of profiles gave"))
                })?)
            }
        };
        self.blocking(move |q| {
            let (selector, from_ms, until_ms) = match selection {
                Selection::One(id) => return Ok((q.info(q.entry(id)?).into_iter().collect(), String::new())),
                Selection::Range { selector, from_ms, until_ms } => (selector, from_ms, until_ms),
            };
            let series: HashSet<u64> =
                q.store.series(&selector, from_ms, until_ms).iter().map(|s| s.id).collect();
            // One more than asked for tells whether there is a next page.
            let mut keys = Vec::new();
            q.store.index().scan_newest(from_ms, until_ms, before, |id, _, get| {
                if series.contains(&id) {
                    keys.extend(get().filter(|entry| entry.row.bytes > 0));
                }
                keys.len() <= limit
            })?;
            let more = keys.len() > limit;
            keys.truncate(limit);
            let token = match keys.last() {
                Some(last) if more => format!("{}-{}", last.key.start_ms, last.key.id),
                _ => String::new(),
            };
            Ok((keys.into_iter().filter_map(|e| q.info(e)).collect(), token))
        })
        .await
    }

    fn info(&self, entry: Entry) -> Option<api::ProfileInfo> {
        let Entry { series, key, row } = entry;
        Some(api::ProfileInfo {
            id: key.id.to_string(),
            labels: self.store.labels_of(series)?.as_ref().clone(),
            start: Some(time::timestamp(key.start_ms)),
            duration: Some(time::span_ms(row.duration_ms)),
            sample_types: row.types.into_iter().map(|t| t.name).collect(),
            samples: row.samples,
            bytes: row.bytes,
            rule_id: row.rule_id,
            revision: row.revision,
            reason: row.reason,
        })
    }

    /// One profile, as it was sent.
    pub(crate) async fn profile(self: &Arc<Self>, id: Ulid) -> Result<Bytes, QueryError> {
        let _timer = self.metrics.query_timer("get_profile");
        let entry = self.blocking(move |q| q.entry(id)).await?;
        self.store
            .profile(entry.key)
            .await?
            .ok_or_else(|| QueryError::NotFound(format!("profile {id} has just been removed by retention")))
    }

    /// The profiles of the selection that have the asked type, and can be merged.
    fn select(&self, selection: &Selection, sample_type: &str) -> Result<Option<Selected>, QueryError> {
        let mut kinds: Vec<(Vec<String>, u64)> = Vec::new();
        let mut found: Vec<(ObjectKey, usize)> = Vec::new();
        let mut bytes = 0_u64;
        self.scan(selection, |entry| {
            let at = entry.key.start_ms;
            let same = |kind: &Vec<String>| kind.iter().eq(entry.row.types.iter().map(|t| &t.name));
            let kind = kinds.iter().position(|(kind, _)| same(kind)).unwrap_or_else(|| {
                kinds.push((entry.row.types.iter().map(|t| t.name.clone()).collect(), at));
                kinds.len() - 1
            });
            kinds[kind].1 = kinds[kind].1.min(at);
            bytes += entry.row.bytes;
            found.push((entry.key, kind));
            found.len() <= self.max_profiles && bytes <= self.max_bytes
        })?;
        if found.is_empty() {
            return Ok(None);
        }
        if found.len() > self.max_profiles || bytes > self.max_bytes {
            return Err(QueryError::TooMuch(format!(
                "{} are more than {} profiles or {} MiB, the limits of one query: choose a shorter range or fewer series",
                selection.words(),
                self.max_profiles,
                self.max_bytes >> 20,
            )));
        }
        // Of the kinds that have the type, the one whose first profile is the oldest.
        let position = |kind: &[String]| {
            if sample_type.is_empty() {
                kind.len().checked_sub(1)
            } else {
                kind.iter().position(|t| t == sample_type)
            }
        };
        let chosen = kinds
            .iter()
            .enumerate()
            .filter_map(|(i, (kind, first))| position(kind).map(|at| (*first, i, at)))
            .min();
        let Some((_, kind, type_index)) = chosen else {
            let there: BTreeSet<&str> =
                kinds.iter().flat_map(|(k, _)| k.iter().map(String::as_str)).collect();
            return Err(QueryError::NotFound(format!(
                "no profile of {} has the sample type `{sample_type}`; there are: {}",
                selection.words(),
                there.into_iter().collect::<Vec<_>>().join(", ")
            )));
        };
        let mut keys: Vec<ObjectKey> =
            found.into_iter().filter(|(_, k)| *k == kind).map(|(key, _)| key).collect();
        keys.sort_unstable();
        Ok(Some(Selected { keys, types: kinds.swap_remove(kind).0, type_index }))
    }

    /// Merges a selection. `None`: nothing is in it. The index is the asked type's.
    async fn merged(
        self: &Arc<Self>,
        selection: &Selection,
        sample_type: &str,
        progress: &Arc<Progress>,
    ) -> Result<Option<(Arc<Merged>, String)>, QueryError> {
        let (asked, of) = (sample_type.to_owned(), selection.clone());
        let Some(selected) = self.blocking(move |q| q.select(&of, &asked)).await? else { return Ok(None) };
        progress.total.store(selected.keys.len() as u64, Ordering::Relaxed);
        let mut hash = Sha256::new();
        for key in &selected.keys {
            hash.update(key.id.0.to_be_bytes());
        }
        let hash: [u8; 32] = hash.finalize().into();
        let chosen = selected.sample_type().to_owned();
        if let Some(merged) = self.merged.get(&hash) {
            progress.done.store(selected.keys.len() as u64, Ordering::Relaxed);
            return Ok(Some((merged, chosen)));
        }
        let slot = tokio::time::timeout(PATIENCE, self.merges.acquire()).await;
        let _slot = slot.ok().and_then(Result::ok).ok_or_else(|| {
            QueryError::Busy(format!("{MERGES_AT_ONCE} other merges are running: try again in a moment"))
        })?;
        // Dropping the question ends the work.
        let cancelled = CancellationToken::new();
        let _guard = cancelled.clone().drop_guard();
        let (runtime, progress) = (tokio::runtime::Handle::current(), Arc::clone(progress));
        let merged =
            self.blocking(move |q| q.merge_profiles(&runtime, &selected.keys, &cancelled, &progress)).await?;
        Ok(match merged {
            Some(merged) => {
                let merged = Arc::new(merged);
                self.merged.insert(hash, Arc::clone(&merged));
                Some((merged, chosen))
            }
            None => None,
        })
    }

    /// Reads and merges on several threads; each holds one profile and its part of the result at a time.
    fn merge_profiles(
        &self,
        runtime: &tokio::runtime::Handle,
        keys: &[ObjectKey],
        cancelled: &CancellationToken,
        progress: &Progress,
    ) -> Result<Option<Merged>, QueryError> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MERGE_THREADS);
        let part = keys.len().div_ceil(threads).max(1);
        let merge_part = |keys: &[ObjectKey]| -> Result<(Option<Profile>, u64), QueryError> {
            let (mut merger, mut profiles) = (Merger::new(), 0);
            for key in keys {
                if cancelled.is_cancelled() {
                    return Err(StoreError::Ended.into());
                }
                let added = self.merge_one(runtime, *key, &mut merger)?;
                profiles += u64::from(added);
                let done = progress.done.fetch_add(1, Ordering::Relaxed) + 1;
                if done.is_multiple_of(SIZE_CHECK_EVERY) {
                    let so_far = merger.finish();
                    check_size(so_far.as_ref())?;
                    merger = Merger::new();
                    if let Some(so_far) = so_far {
                        merger.add(&so_far).map_err(|e| QueryError::Bad(e.to_string()))?;
                    }
                }
            }
            let merged = merger.finish();
            check_size(merged.as_ref())?;
            Ok((merged, profiles))
        };
        let parts: Vec<_> = std::thread::scope(|scope| {
            let handles: Vec<_> =
                keys.chunks(part).map(|keys| scope.spawn(move || merge_part(keys))).collect();
            handles.into_iter().map(|h| h.join().unwrap_or(Err(StoreError::Ended.into()))).collect()
        });
        let (mut merger, mut profiles) = (Merger::new(), 0);
        for part in parts {
            let (profile, n) = part?;
            profiles += n;
            if let Some(profile) = profile {
                merger.add(&profile).map_err(|e| QueryError::Bad(e.to_string()))?;
            }
        }
        self.metrics.merged_profiles.inc_by(profiles);
        Ok(merger.finish().map(|profile| {
            let weight = profile.encoded_len() as u64 * 3;
            Merged { profile, profiles, weight }
        }))
    }

    /// Adds one profile; one that is gone or damaged is passed over, counted and logged.
    fn merge_one(
        &self,
        runtime: &tokio::runtime::Handle,
        key: ObjectKey,
        merger: &mut Merger,
    ) -> Result<bool, QueryError> {
        let bytes = match runtime.block_on(self.store.profile(key)) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(false),
            Err(error @ StoreError::Damaged(_)) => {
                tracing::warn!(%error, "left out of a merge");
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        };
        let added = pprof::decode(&bytes, self.max_inflated).and_then(|profile| merger.add(&profile));
        if let Err(error) = added {
            self.metrics.objects_corrupt.inc();
            tracing::warn!(profile = %key.id, %error, "left out of a merge");
            return Ok(false);
        }
        Ok(true)
    }

    /// All profiles of the selection as one.
    pub(crate) async fn merge(
        self: &Arc<Self>,
        selection: &Selection,
        sample_type: &str,
        progress: &Arc<Progress>,
    ) -> Result<Bytes, QueryError> {
        let _timer = self.metrics.query_timer("merge");
        let (merged, _) = self
            .merged(selection, sample_type, progress)
            .await?
            .ok_or_else(|| QueryError::NotFound(format!("there is no profile for {}", selection.words())))?;
        self.blocking(move |_| Ok(pprof::encode(&merged.profile).into())).await
    }

    /// Main and base, as asked; the type is the main side's.
    async fn both(
        self: &Arc<Self>,
        selection: &Selection,
        base: Option<&Selection>,
        sample_type: &str,
    ) -> Result<Both, QueryError> {
        let progress = Arc::default();
        let main = self.merged(selection, sample_type, &progress).await?;
        let wanted = main.as_ref().map_or_else(|| sample_type.to_owned(), |(_, chosen)| chosen.clone());
        let base = match base {
            Some(base) => self.merged(base, &wanted, &progress).await?,
            None => None,
        };
        let chosen = main.as_ref().or(base.as_ref()).map_or(wanted, |(_, chosen)| chosen.clone());
        Ok(Both { main: main.map(|(m, _)| m), base: base.map(|(m, _)| m), sample_type: chosen })
    }

    /// A flame graph of the selection, with a base to compare against if there is one.
    pub(crate) async fn flamegraph(
        self: &Arc<Self>,
        selection: &Selection,
        base: Option<&Selection>,
        sample_type: &str,
        max_nodes: u32,
    ) -> Result<api::FlameGraphResponse, QueryError> {
        let _timer = self.metrics.query_timer("flamegraph");
        if max_nodes > MAX_FLAME_NODES {
            return Err(QueryError::Bad(format!("max_nodes {max_nodes} is above {MAX_FLAME_NODES}")));
        }
        let max_nodes = if max_nodes == 0 { FLAME_NODES } else { max_nodes } as usize;
        let both = self.both(selection, base, sample_type).await?;
        self.blocking(move |_| {
            let tree = both.tree()?;
            let root = tree.prune(max_nodes);
            Ok(api::FlameGraphResponse {
                unit: both.unit(),
                total: root.total,
                base_total: root.base_total,
                profiles: both.main.as_ref().map_or(0, |m| m.profiles),
                base_profiles: both.base.as_ref().map_or(0, |m| m.profiles),
                root: Some(root),
                sample_type: both.sample_type,
                nodes: Vec::new(),
            })
        })
        .await
    }

    /// A table of functions.
    pub(crate) async fn top(
        self: &Arc<Self>,
        selection: &Selection,
        base: Option<&Selection>,
        sample_type: &str,
        limit: u32,
    ) -> Result<api::TopResponse, QueryError> {
        let _timer = self.metrics.query_timer("top");
        if limit > MAX_TOP_ROWS {
            return Err(QueryError::Bad(format!("limit {limit} is above {MAX_TOP_ROWS}")));
        }
        let limit = if limit == 0 { TOP_ROWS } else { limit } as usize;
        let both = self.both(selection, base, sample_type).await?;
        self.blocking(move |_| {
            let tree = both.tree()?;
            let rows = tree.top(limit);
            let (total, base_total) = (tree.total(Side::Main), tree.total(Side::Base));
            Ok(api::TopResponse { unit: both.unit(), total, base_total, rows, sample_type: both.sample_type })
        })
        .await
    }

    /// Values over time, from the index alone.
    pub(crate) async fn timeline(
        self: &Arc<Self>,
        selection: Selection,
        sample_type: String,
        step_ms: Option<u64>,
    ) -> Result<api::TimelineResponse, QueryError> {
        let _timer = self.metrics.query_timer("timeline");
        let Selection::Range { from_ms, until_ms, .. } = selection else {
            return Err(QueryError::Bad("a timeline needs a range, not one profile".into()));
        };
        let step = match step_ms {
            Some(0) => return Err(QueryError::Bad("step must be above 0".into())),
            Some(step) => step,
            None => ((until_ms - from_ms) / 100).max(10_000),
        };
        let points = (until_ms - from_ms).div_ceil(step);
        if points > MAX_POINTS {
            return Err(QueryError::Bad(format!(
                "step {step} ms makes {points} points of this range, above {MAX_POINTS}: choose a longer step"
            )));
        }
        self.blocking(move |q| {
            let mut first: Option<(ObjectKey, String)> = None;
            let mut sums: BTreeMap<String, Vec<(u64, u64)>> = BTreeMap::new();
            q.scan(&selection, |entry| {
                let at = ((entry.key.start_ms - from_ms) / step) as usize;
                if let Some(last) = entry.row.types.last()
                    && first.as_ref().is_none_or(|(key, _)| entry.key < *key)
                {
                    first = Some((entry.key, last.name.clone()));
                }
                for t in entry.row.types {
                    if sample_type.is_empty() || t.name == sample_type {
                        let line = sums.entry(t.name).or_insert_with(|| vec![(0, 0); points as usize]);
                        line[at].0 = line[at].0.saturating_add(u64::try_from(t.total).unwrap_or(0));
                        line[at].1 += 1;
                    }
                }
                true
            })?;
            let sample_type = match (sample_type.is_empty(), first) {
                (true, Some((_, last))) => last,
                _ => sample_type,
            };
            let line = sums.remove(&sample_type).unwrap_or_else(|| vec![(0, 0); points as usize]);
            Ok(api::TimelineResponse {
                unit: unit(&sample_type),
                step: Some(time::span_ms(step)),
                points: line
                    .into_iter()
                    .enumerate()
                    .map(|(i, (value, profiles))| api::timeline_response::Point {
                        at: Some(time::timestamp(from_ms + i as u64 * step)),
                        value,
                        profiles,
                    })
                    .collect(),
                sample_type,
            })
        })
        .await
    }
}

fn check_size(merged: Option<&Profile>) -> Result<(), QueryError> {
    match merged {
        Some(merged) if merged.sample.len() > MAX_MERGED_SAMPLES => Err(QueryError::TooMuch(format!(
            "the merged profile has more than {MAX_MERGED_SAMPLES} distinct stacks: choose a shorter range or fewer series"
        ))),
        _ => Ok(()),
    }
}

/// The two sides of a comparison.
struct Both {
    main: Option<Arc<Merged>>,
    base: Option<Arc<Merged>>,
    sample_type: String,
}

impl Both {
    fn tree(&self) -> Result<FlameTree, QueryError> {
        let mut tree = FlameTree::new();
        for (merged, side) in [(&self.main, Side::Main), (&self.base, Side::Base)] {
            if let Some(merged) = merged
                && let Some(index) = pprof::sample_type_index(&merged.profile, &self.sample_type)
            {
                tree.add(&merged.profile, index, side).map_err(|e| QueryError::Bad(e.to_string()))?;
            }
        }
        Ok(tree)
    }

    fn unit(&self) -> String {
        unit(&self.sample_type)
    }
}

fn unit(sample_type: &str) -> String {
    sample_type.split_once('/').map_or("", |(_, unit)| unit).to_owned()
}
