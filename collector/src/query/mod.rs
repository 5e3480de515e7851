//! Queries: the read side of the store, for the gRPC service and the HTTP API alike.

mod captures;
mod graph;
mod grpc;
mod heatmap;
mod merge;
mod read;
mod select;
mod selected;
mod sources;
mod spans;
mod sums;
mod tables;
mod timeline;

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use gannet_proto::{
    labels::Labels,
    pprof::{self, Encoding},
    query as api,
};
use ulid::Ulid;

pub(crate) use self::graph::Shape;
pub(crate) use self::{
    captures::CaptureRun,
    grpc::QueryGrpc,
    heatmap::Heatmap,
    merge::{MergeProgress, Merged},
    select::{Selection, parse_profile_id},
    spans::SpanFilter,
    tables::TableRange,
};
use self::{
    merge::{Merges, encode_selected},
    select::Profiles,
    selected::Selected,
};
use crate::{
    clickhouse::{ClickHouse, ClickHouseError},
    debuginfo::{DebugInfo, Named},
    limits::MAX_INFLATION,
    metrics::Metrics,
    selector::{Selector, SelectorError},
    store::{ObjectKey, Series, Store, StoreError, StoredProfile},
    table::SumsReader,
    time,
};

/// Profiles of a list without `limit`, and the highest `limit`.
const DEFAULT_LIST: u32 = 100;
const MAX_LIST: u32 = 10_000;

/// Limits of queries.
#[derive(Clone, Debug, PartialEq)]
pub struct QueryOptions {
    /// Profiles that one query may merge.
    pub max_profiles: usize,
    /// Bytes of stored profiles that one query may read.
    pub max_bytes: u64,
    /// Profiles of a selection above which a query reads sums of the tables instead, where it can.
    pub min_summed_profiles: usize,
    /// Memory for merged profiles, so that a graph, a table and a download of one selection need one merge, in bytes.
    pub cache_bytes: u64,
}

impl Default for QueryOptions {
    fn default() -> Self {
        Self { max_profiles: 100_000, max_bytes: 2 << 30, min_summed_profiles: 500, cache_bytes: 128 << 20 }
    }
}

/// Why a query has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueryError {
    /// The request is wrong.
    #[error("{0}")]
    Invalid(String),
    /// No profile matches.
    #[error("{0}")]
    NotFound(String),
    /// The answer would exceed a limit.
    #[error("{0}")]
    TooLarge(String),
    /// Too many queries run.
    #[error("{0}")]
    Busy(String),
    /// The store returned an error.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// ClickHouse has no answer.
    #[error("{0}")]
    Engine(String),
}

impl From<ClickHouseError> for QueryError {
    fn from(error: ClickHouseError) -> Self {
        let text = error.to_string();
        match error {
            ClickHouseError::Limit(_) => Self::TooLarge(text),
            ClickHouseError::Busy { .. } => Self::Busy(text),
            _ => Self::Engine(text),
        }
    }
}

impl From<SelectorError> for QueryError {
    fn from(error: SelectorError) -> Self {
        Self::Invalid(error.to_string())
    }
}

/// A profile for download.
pub(crate) struct Download {
    /// The profile as gzip-compressed pprof.
    pub(crate) bytes: Bytes,
    /// The search for names in debug information ran out of time, so the next answer may have more.
    pub(crate) lacks_names: bool,
}

/// Answers queries from the store.
pub(crate) struct Query {
    store: Arc<Store>,
    debug_info: Arc<DebugInfo>,
    metrics: Metrics,
    merges: Merges,
    /// Merges the profiles of the tables, if there is one.
    clickhouse: Option<Arc<ClickHouse>>,
    /// Reads the tables of sums, if the collector writes them.
    sums: Option<SumsReader>,
    options: QueryOptions,
    /// Largest decompressed profile, in bytes.
    max_inflated: usize,
}

impl Query {
    /// `max_batch_bytes`: size of the largest compressed profile in the store.
    pub(crate) fn new(
        store: Arc<Store>,
        debug_info: Arc<DebugInfo>,
        options: &QueryOptions,
        max_batch_bytes: u64,
        metrics: Metrics,
    ) -> Self {
        Self {
            store,
            debug_info,
            metrics,
            merges: Merges::new(options.cache_bytes),
            clickhouse: None,
            sums: None,
            options: options.clone(),
            max_inflated: max_batch_bytes as usize * MAX_INFLATION,
        }
    }

    /// Lets ClickHouse merge the profiles of the tables.
    pub(crate) fn with_tables(self, clickhouse: Option<Arc<ClickHouse>>) -> Self {
        Self { clickhouse, ..self }
    }

    /// Lets flame graphs and tables of functions read the tables of sums.
    pub(crate) fn with_sums(self, sums: Option<SumsReader>) -> Self {
        Self { sums, ..self }
    }

    /// Runs an operation that reads the index on a blocking thread.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        f: impl FnOnce(&Self) -> Result<T, QueryError> + Send + 'static,
    ) -> Result<T, QueryError> {
        let query = Arc::clone(self);
        tokio::task::spawn_blocking(move || f(&query)).await.map_err(|_| StoreError::Ended)?
    }

    /// Runs an operation that reads the index on a blocking thread, and observes its time under `kind`.
    pub(crate) async fn timed<T: Send + 'static>(
        self: &Arc<Self>,
        kind: &'static str,
        f: impl FnOnce(&Self) -> Result<T, QueryError> + Send + 'static,
    ) -> Result<T, QueryError> {
        let _timer = self.metrics.query_timer(kind);
        self.blocking(f).await
    }

    /// Returns the series that match and may have profiles in the range, in the order of their labels.
    pub(crate) fn series_in(&self, selector: &Selector, from_ms: u64, until_ms: u64) -> Vec<Series> {
        self.store.series(selector, from_ms, until_ms)
    }

    /// Calls `each` for every profile of these series that starts in the range, series by series and each in the order of
    /// time, until `each` returns false. Blocking.
    pub(crate) fn scan_series(
        &self,
        series: &[u64],
        from_ms: u64,
        until_ms: u64,
        each: impl FnMut(StoredProfile) -> bool,
    ) -> Result<(), QueryError> {
        Ok(self.store.scan_series(series, from_ms, until_ms, each)?)
    }

    /// Returns the times between which all stored profiles start, or `None` without a profile.
    pub(crate) fn times(&self) -> Option<(u64, u64)> {
        self.store.times()
    }

    /// Returns the names of all labels of the selected series.
    pub(crate) async fn label_names(
        self: &Arc<Self>,
        selection: Selection,
    ) -> Result<Vec<String>, QueryError> {
        let _timer = self.metrics.query_timer("label_names");
        let names: BTreeSet<String> =
            self.all_labels(selection).await?.iter().flat_map(|labels| labels.keys().cloned()).collect();
        Ok(names.into_iter().collect())
    }

    /// Returns the values of one label over the selected series.
    pub(crate) async fn label_values(
        self: &Arc<Self>,
        selection: Selection,
        name: &str,
    ) -> Result<Vec<String>, QueryError> {
        let _timer = self.metrics.query_timer("label_values");
        if name.is_empty() {
            return Err(QueryError::Invalid("name: give the label whose values you want".into()));
        }
        let values: BTreeSet<String> =
            self.all_labels(selection).await?.iter().filter_map(|labels| labels.get(name).cloned()).collect();
        Ok(values.into_iter().collect())
    }

    async fn all_labels(self: &Arc<Self>, selection: Selection) -> Result<Vec<Arc<Labels>>, QueryError> {
        if selection.has_all_samples()
            && let Profiles::Range { selector, from_ms, until_ms } = &selection.of
        {
            let series = self.store.series(selector, *from_ms, *until_ms);
            return Ok(series.into_iter().map(|s| s.labels).collect());
        }
        let selected = self.select(selection).await?;
        self.blocking(move |q| {
            let mut series = BTreeSet::new();
            q.scan(&selected, |entry| {
                series.insert(entry.series);
                true
            })?;
            Ok(series.into_iter().filter_map(|id| q.store.labels_of(id)).collect())
        })
        .await
    }

    fn entry(&self, id: Ulid) -> Result<StoredProfile, QueryError> {
        self.store.entry(id)?.ok_or_else(|| {
            QueryError::NotFound(format!(
                "there is no profile {id}: it never arrived, or retention removed it"
            ))
        })
    }

    /// Calls `each` for every one of these profiles, with the sums of all its samples, until `each` returns false. Blocking.
    fn scan_index(
        &self,
        profiles: &Profiles,
        mut each: impl FnMut(StoredProfile) -> bool,
    ) -> Result<(), QueryError> {
        match profiles {
            Profiles::One(id) => {
                each(self.entry(*id)?);
            }
            Profiles::Range { selector, from_ms, until_ms } => {
                self.store.scan(selector, *from_ms, *until_ms, each)?;
            }
        }
        Ok(())
    }

    /// Returns the series that have profiles in the selection.
    pub(crate) async fn series(
        self: &Arc<Self>,
        selection: Selection,
    ) -> Result<Vec<api::SeriesInfo>, QueryError> {
        let _timer = self.metrics.query_timer("series");
        let selected = self.select(selection).await?;
        self.blocking(move |q| q.sum_series(&selected)).await
    }

    fn sum_series(&self, selected: &Selected) -> Result<Vec<api::SeriesInfo>, QueryError> {
        struct Sum {
            profiles: u64,
            samples: u64,
            first_ms: u64,
            last_ms: u64,
            types: BTreeSet<String>,
        }
        let mut sums: HashMap<u64, Sum> = HashMap::new();
        self.scan(selected, |entry| {
            let start_ms = entry.key.start_ms;
            let sum = sums.entry(entry.series).or_insert_with(|| Sum {
                profiles: 0,
                samples: 0,
                first_ms: start_ms,
                last_ms: start_ms,
                types: BTreeSet::new(),
            });
            sum.profiles += 1;
            sum.samples += entry.row.samples;
            sum.first_ms = sum.first_ms.min(start_ms);
            sum.last_ms = sum.last_ms.max(start_ms);
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
                    labels: self.store.labels_of(id)?.as_ref().clone(),
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
    }

    /// Returns one page of the selection's profiles, newest first, and the token of the next page. The token is empty on
    /// the last page. `limit` 0 means the default. With spans, a page may hold less than `limit`, even none, before the last one.
    pub(crate) async fn list(
        self: &Arc<Self>,
        selection: Selection,
        limit: u32,
        page_token: String,
    ) -> Result<(Vec<api::ProfileInfo>, String), QueryError> {
        let _timer = self.metrics.query_timer("list_profiles");
        if limit > MAX_LIST {
            return Err(QueryError::Invalid(format!(
                "limit {limit} is above {MAX_LIST}: use page_token for more"
            )));
        }
        let limit = if limit == 0 { DEFAULT_LIST } else { limit } as usize;
        let before = match page_token.as_str() {
            "" => None,
            token => Some(parse_page_token(token)?),
        };
        let Selection { of, spans } = selection;
        let (page, last) = match of {
            Profiles::One(id) => {
                let entry = self.blocking(move |q| q.entry(id)).await?;
                (self.in_spans(vec![entry], &spans).await?, None)
            }
            Profiles::Range { selector, from_ms, until_ms } => {
                self.newest(selector, (from_ms, until_ms), &spans, before, limit).await?
            }
        };
        let token = last.map_or_else(String::new, |last| format!("{}-{}", last.start_ms, last.id));
        Ok((page.into_iter().filter_map(|entry| self.info(entry)).collect(), token))
    }

    fn info(&self, entry: StoredProfile) -> Option<api::ProfileInfo> {
        let StoredProfile { series, key, row } = entry;
        Some(api::ProfileInfo {
            id: key.id.to_string(),
            labels: self.store.labels_of(series)?.as_ref().clone(),
            start: Some(time::timestamp(key.start_ms)),
            duration: Some(time::duration_from_ms(row.duration_ms)),
            sample_types: row.types.into_iter().map(|t| t.name).collect(),
            samples: row.samples,
            bytes: row.bytes,
            rule_id: row.rule_id,
            revision: row.revision,
            reason: row.reason,
        })
    }

    /// Returns the selected samples of one profile as gzip-compressed pprof. If these are all samples, the agent compressed them with
    /// gzip, and debug information adds no names, the bytes are those of the agent.
    pub(crate) async fn profile(
        self: &Arc<Self>,
        id: Ulid,
        spans: SpanFilter,
    ) -> Result<Download, QueryError> {
        let _timer = self.metrics.query_timer("get_profile");
        let entry = self.blocking(move |q| q.entry(id)).await?;
        let bytes = self
            .store
            .profile(entry.location())
            .await?
            .ok_or_else(|| QueryError::NotFound(format!("retention has just removed profile {id}")))?;
        if spans != SpanFilter::All {
            return self.samples_of(id, bytes, spans).await;
        }
        let (named, lacks_names) = self.named_bytes(&bytes).await?;
        if let Some(bytes) = named {
            return Ok(Download { bytes, lacks_names });
        }
        if Encoding::of(&bytes) != Some(Encoding::Zstd) {
            return Ok(Download { bytes, lacks_names });
        }
        self.blocking(move |query| match pprof::to_gzip(&bytes, query.max_inflated) {
            Ok(gzip) => Ok(Download { bytes: gzip.into_owned().into(), lacks_names }),
            Err(error) => Err(QueryError::TooLarge(format!("cannot convert profile {id} to gzip: {error}"))),
        })
        .await
    }
}

impl Query {
    /// Returns the samples of an encoded profile that are in these spans, with names from debug information.
    async fn samples_of(
        self: &Arc<Self>,
        id: Ulid,
        bytes: Bytes,
        spans: SpanFilter,
    ) -> Result<Download, QueryError> {
        let selected = self.blocking(move |query| {
            let unreadable = |e| QueryError::TooLarge(format!("cannot read profile {id}: {e}"));
            let profile = pprof::decode(&bytes, query.max_inflated).map_err(unreadable)?;
            pprof::check(&profile).map_err(unreadable)?;
            Ok(Arc::new(spans.of(Cow::Owned(profile)).into_owned()))
        });
        let selected = selected.await?;
        let Named { profile: named, is_complete, .. } = self.debug_info.name(&selected).await;
        self.blocking(move |_| {
            let profile = named.unwrap_or_else(|| Arc::unwrap_or_clone(selected));
            let bytes = encode_selected(profile, &Selection::one(id).describe())?;
            Ok(Download { bytes, lacks_names: !is_complete })
        })
        .await
    }

    /// Returns an encoded profile with names from debug information, and whether names are missing because the search ran out of time.
    /// Returns `None` without such names, and for an unreadable profile.
    async fn named_bytes(self: &Arc<Self>, bytes: &Bytes) -> Result<(Option<Bytes>, bool), QueryError> {
        if self.debug_info.is_idle() {
            return Ok((None, false));
        }
        let of = bytes.clone();
        let decoded = self.blocking(move |query| {
            let profile = pprof::decode(&of, query.max_inflated).ok();
            Ok(profile.filter(|profile| pprof::check(profile).is_ok()))
        });
        let Some(profile) = decoded.await? else { return Ok((None, false)) };
        let Named { profile, is_complete, .. } = self.debug_info.name(&Arc::new(profile)).await;
        let Some(named) = profile else { return Ok((None, !is_complete)) };
        self.blocking(move |_| Ok((Some(pprof::encode(&named).into()), !is_complete))).await
    }
}

fn parse_page_token(token: &str) -> Result<ObjectKey, QueryError> {
    let parsed = token
        .split_once('-')
        .and_then(|(ms, id)| Some(ObjectKey { start_ms: ms.parse().ok()?, id: Ulid::from_string(id).ok()? }));
    parsed.ok_or_else(|| {
        QueryError::Invalid(format!("page_token `{token}` does not come from a list of profiles"))
    })
}

/// Returns the unit of a sample type like `cpu/nanoseconds`.
fn unit_of(sample_type: &str) -> String {
    sample_type.split_once('/').map_or("", |(_, unit)| unit).to_owned()
}
