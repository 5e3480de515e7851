//! Selections of profiles, and the choice of the profiles in one that a merge can join.

use std::collections::BTreeSet;

use ulid::Ulid;

use super::{
    Query, QueryError, QueryOptions, SpanFilter,
    sources::{Sources, TableSum},
};
use crate::{selector::Selector, store::StoredProfile, time};

/// Range of a selection without `from`, in milliseconds before `until`.
const DEFAULT_RANGE_MS: u64 = 3_600_000;

/// The profiles of a request, and the samples in them. A query reads them by [`Query::select`] or [`Query::merged`], which apply
/// both parts.
#[derive(Debug, Clone)]
pub(crate) struct Selection {
    pub(super) of: Profiles,
    pub(super) spans: SpanFilter,
}

/// The profiles of a selection.
#[derive(Debug, Clone)]
pub(super) enum Profiles {
    /// Profiles of matching series that start in `from_ms..until_ms`.
    Range { selector: Selector, from_ms: u64, until_ms: u64 },
    /// A single profile by its id.
    One(Ulid),
}

impl Selection {
    /// Builds a selection of all samples from the parameters of a request. Missing times have their defaults: the last hour. An
    /// empty `profile_id` means a range.
    pub(crate) fn new(
        query: &str,
        from_ms: Option<u64>,
        until_ms: Option<u64>,
        profile_id: &str,
    ) -> Result<Self, QueryError> {
        if !profile_id.is_empty() {
            return Ok(Self::one(parse_profile_id(profile_id)?));
        }
        let until_ms = until_ms.unwrap_or_else(time::now_ms);
        let from_ms = from_ms.unwrap_or(until_ms.saturating_sub(DEFAULT_RANGE_MS));
        if from_ms >= until_ms {
            return Err(QueryError::Invalid(format!(
                "the range is empty: `from` ({from_ms}) must be before `until` ({until_ms})"
            )));
        }
        let of = Profiles::Range { selector: Selector::parse(query)?, from_ms, until_ms };
        Ok(Self { of, spans: SpanFilter::All })
    }

    /// Selects a single profile.
    pub(crate) fn one(id: Ulid) -> Self {
        Self { of: Profiles::One(id), spans: SpanFilter::All }
    }

    /// Selects only the samples of these spans or traces.
    pub(crate) fn in_spans(self, spans: SpanFilter) -> Self {
        Self { spans, ..self }
    }

    /// Reports whether the selection has all samples of its profiles.
    pub(super) fn has_all_samples(&self) -> bool {
        self.spans == SpanFilter::All
    }

    /// Returns the range in milliseconds, or `None` for a single profile.
    pub(crate) fn range(&self) -> Option<(u64, u64)> {
        match &self.of {
            Profiles::Range { from_ms, until_ms, .. } => Some((*from_ms, *until_ms)),
            Profiles::One(_) => None,
        }
    }

    /// Returns a human-readable form for error messages.
    pub(super) fn describe(&self) -> String {
        match &self.of {
            Profiles::One(id) => format!("profile {id}"),
            Profiles::Range { selector, from_ms, until_ms } => {
                let at = |ms: u64| {
                    jiff::Timestamp::from_millisecond(ms as i64)
                        .map_or_else(|_| ms.to_string(), |t| t.to_string())
                };
                format!("{selector} between {} and {}", at(*from_ms), at(*until_ms))
            }
        }
    }
}

/// Parses the id of a profile.
pub(crate) fn parse_profile_id(text: &str) -> Result<Ulid, QueryError> {
    Ulid::from_string(text).map_err(|_| {
        QueryError::Invalid(format!(
            "profile_id `{text}` is not a ULID: 26 letters and digits, as a list of profiles shows"
        ))
    })
}

/// Profiles of a selection that have the same sample types, so that a merge can join them.
pub(super) struct Mergeable {
    pub(super) sources: Sources,
    types: Vec<String>,
    /// Position of the requested sample type in `types`.
    type_index: usize,
}

impl Mergeable {
    /// Returns all sample types of the profiles.
    pub(super) fn types(&self) -> &[String] {
        &self.types
    }

    /// Returns the requested sample type.
    pub(super) fn sample_type(&self) -> &str {
        self.types.get(self.type_index).map_or("", String::as_str)
    }
}

/// Profiles of a query, by their sample types.
#[derive(Default)]
pub(crate) struct Found {
    pub(super) kinds: Vec<FoundKind>,
    profiles: usize,
    bytes: u64,
    /// Bytes that ClickHouse has read to find the profiles of the tables.
    pub(super) table_bytes: u64,
}

/// Profiles that have the same sample types.
pub(super) struct FoundKind {
    pub(super) types: Vec<String>,
    /// Start of the oldest one.
    first_ms: u64,
    pub(super) sources: Sources,
}

impl Found {
    /// Adds a profile.
    pub(super) fn add(&mut self, entry: &StoredProfile) {
        let kind = self.kind(entry.row.types.iter().map(|t| &t.name));
        kind.first_ms = kind.first_ms.min(entry.key.start_ms);
        kind.sources.profiles.push(entry.location());
        self.profiles += 1;
        self.bytes += entry.row.bytes;
    }

    /// Adds profiles of the tables.
    pub(super) fn add_sum(&mut self, sum: TableSum) {
        let kind = self.kind(sum.types().iter());
        kind.first_ms = kind.first_ms.min(sum.first_ms());
        kind.sources.tables = Some(sum);
    }

    /// Adds sample types of profiles, of which the oldest one starts at `first_ms`, without sources.
    pub(super) fn add_kind(&mut self, types: &[String], first_ms: u64) {
        let kind = self.kind(types.iter());
        kind.first_ms = kind.first_ms.min(first_ms);
    }

    /// Returns the entry of the profiles with these types.
    fn kind<'t>(&mut self, types: impl Iterator<Item = &'t String> + Clone) -> &mut FoundKind {
        let known = self.kinds.iter().position(|kind| kind.types.iter().eq(types.clone()));
        let index = known.unwrap_or_else(|| {
            let types = types.cloned().collect();
            self.kinds.push(FoundKind { types, first_ms: u64::MAX, sources: Sources::default() });
            self.kinds.len() - 1
        });
        &mut self.kinds[index]
    }

    pub(super) fn fits(&self, options: &QueryOptions) -> bool {
        within_limits(options, self.profiles, self.bytes)
    }

    /// Returns an error above the limits of one query. `of` describes the selection.
    pub(super) fn check(
        &self,
        options: &QueryOptions,
        of: impl FnOnce() -> String,
    ) -> Result<(), QueryError> {
        if self.fits(options) { Ok(()) } else { Err(above_limits(options, &of())) }
    }
}

/// Reports whether one query may read this number of profiles and bytes.
pub(super) fn within_limits(options: &QueryOptions, profiles: usize, bytes: u64) -> bool {
    profiles <= options.max_profiles && bytes <= options.max_bytes
}

/// Returns the error for a selection above the limits of one query. `of` describes it.
pub(super) fn above_limits(options: &QueryOptions, of: &str) -> QueryError {
    QueryError::TooLarge(format!(
        "{of} has more than {} profiles or {} MiB, the limits of one query: choose a shorter range or fewer series",
        options.max_profiles,
        options.max_bytes >> 20,
    ))
}

impl Query {
    /// Returns the profiles of these series that start in the range and that `keep` takes. Blocking.
    pub(crate) fn find_profiles(
        &self,
        series: &[u64],
        from_ms: u64,
        until_ms: u64,
        mut keep: impl FnMut(&StoredProfile) -> bool,
    ) -> Result<Found, QueryError> {
        let mut found = Found::default();
        self.scan_series(series, from_ms, until_ms, |entry| {
            if keep(&entry) {
                found.add(&entry);
            }
            found.fits(&self.options)
        })?;
        found.check(&self.options, || "the selection".to_owned())?;
        Ok(found)
    }

    /// Returns the profiles of the selection, with all their samples. Blocking.
    pub(super) fn find(&self, selection: &Selection) -> Result<Found, QueryError> {
        let mut found = Found::default();
        self.scan_index(&selection.of, |entry| {
            found.add(&entry);
            found.fits(&self.options)
        })?;
        found.check(&self.options, || selection.describe())?;
        Ok(found)
    }
}

impl Found {
    /// Returns the mergeable profiles that have the sample type: one part for each set of sample types, the set with the oldest
    /// profile first. None without profiles. An empty `sample_type` means the last type of a profile. `of` has the selection for an
    /// error.
    pub(super) fn mergeable(self, of: &Selection, sample_type: &str) -> Result<Vec<Mergeable>, QueryError> {
        let kinds = self.kinds;
        if kinds.is_empty() {
            return Ok(Vec::new());
        }
        let position = |kind: &[String]| {
            if sample_type.is_empty() {
                kind.len().checked_sub(1)
            } else {
                kind.iter().position(|t| t == sample_type)
            }
        };
        let known: BTreeSet<String> = kinds.iter().flat_map(|kind| kind.types.iter().cloned()).collect();
        let mut fitting: Vec<(usize, FoundKind)> =
            kinds.into_iter().filter_map(|kind| Some((position(&kind.types)?, kind))).collect();
        if fitting.is_empty() {
            return Err(QueryError::NotFound(format!(
                "no profile of {} has the sample type `{sample_type}`; known types: {}",
                of.describe(),
                known.into_iter().collect::<Vec<_>>().join(", ")
            )));
        }
        fitting.sort_by_key(|(_, kind)| kind.first_ms);
        let mergeable = fitting.into_iter().map(|(type_index, FoundKind { types, first_ms: _, sources })| {
            Mergeable { sources, types, type_index }
        });
        Ok(mergeable.collect())
    }
}
