//! Selections of profiles, and the choice of the profiles in one that a merge can join.

use std::collections::BTreeSet;

use ulid::Ulid;

use super::{Query, QueryError};
use crate::{selector::Selector, store::ProfileLocation, time};

/// Range of a selection without `from`, in milliseconds before `until`.
const DEFAULT_RANGE_MS: u64 = 3_600_000;

/// The profiles of a request.
#[derive(Debug, Clone)]
pub(crate) enum Selection {
    /// Profiles of matching series that start in `from_ms..until_ms`.
    Range { selector: Selector, from_ms: u64, until_ms: u64 },
    /// A single profile by its id.
    One(Ulid),
}

impl Selection {
    /// Builds a selection from the parameters of a request. Missing times have their defaults: the last hour. An empty
    /// `profile_id` means a range.
    pub(crate) fn new(
        query: &str,
        from_ms: Option<u64>,
        until_ms: Option<u64>,
        profile_id: &str,
    ) -> Result<Self, QueryError> {
        if !profile_id.is_empty() {
            return Ok(Self::One(parse_profile_id(profile_id)?));
        }
        let until_ms = until_ms.unwrap_or_else(time::now_ms);
        let from_ms = from_ms.unwrap_or(until_ms.saturating_sub(DEFAULT_RANGE_MS));
        if from_ms >= until_ms {
            return Err(QueryError::Invalid(format!(
                "the range is empty: `from` ({from_ms}) must be before `until` ({until_ms})"
            )));
        }
        Ok(Self::Range { selector: Selector::parse(query)?, from_ms, until_ms })
    }

    /// Returns a human-readable form for error messages.
    pub(super) fn describe(&self) -> String {
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
    /// In the order of the store, so that one read can return neighbours.
    pub(super) profiles: Vec<ProfileLocation>,
    types: Vec<String>,
    /// Position of the requested sample type in `types`.
    type_index: usize,
}

impl Mergeable {
    /// Returns the requested sample type.
    pub(super) fn sample_type(&self) -> &str {
        self.types.get(self.type_index).map_or("", String::as_str)
    }
}

impl Query {
    /// Returns the mergeable profiles of the selection that have the sample type, or `None` for an empty selection. An
    /// empty `sample_type` means the last type of a profile. If several sets of types fit, the set with the oldest
    /// profile wins. Blocking.
    pub(super) fn mergeable(
        &self,
        selection: &Selection,
        sample_type: &str,
    ) -> Result<Option<Mergeable>, QueryError> {
        let mut kinds: Vec<(Vec<String>, u64)> = Vec::new();
        let mut found: Vec<(ProfileLocation, usize)> = Vec::new();
        let mut bytes = 0_u64;
        let (max_profiles, max_bytes) = (self.options.max_profiles, self.options.max_bytes);
        self.scan(selection, |entry| {
            let start_ms = entry.key.start_ms;
            let is_same = |kind: &Vec<String>| kind.iter().eq(entry.row.types.iter().map(|t| &t.name));
            let kind = kinds.iter().position(|(kind, _)| is_same(kind)).unwrap_or_else(|| {
                kinds.push((entry.row.types.iter().map(|t| t.name.clone()).collect(), start_ms));
                kinds.len() - 1
            });
            kinds[kind].1 = kinds[kind].1.min(start_ms);
            bytes += entry.row.bytes;
            found.push((entry.location(), kind));
            found.len() <= max_profiles && bytes <= max_bytes
        })?;
        if found.is_empty() {
            return Ok(None);
        }
        if found.len() > max_profiles || bytes > max_bytes {
            return Err(QueryError::TooLarge(format!(
                "{} has more than {max_profiles} profiles or {} MiB, the limits of one query: choose a shorter range or \
                 fewer series",
                selection.describe(),
                max_bytes >> 20,
            )));
        }
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
            .filter_map(|(i, (kind, first_ms))| position(kind).map(|index| (*first_ms, i, index)))
            .min();
        let Some((_, kind, type_index)) = chosen else {
            let known: BTreeSet<&str> =
                kinds.iter().flat_map(|(k, _)| k.iter().map(String::as_str)).collect();
            return Err(QueryError::NotFound(format!(
                "no profile of {} has the sample type `{sample_type}`; known types: {}",
                selection.describe(),
                known.into_iter().collect::<Vec<_>>().join(", ")
            )));
        };
        let mut profiles: Vec<ProfileLocation> =
            found.into_iter().filter(|(_, k)| *k == kind).map(|(location, _)| location).collect();
        profiles.sort_unstable();
        Ok(Some(Mergeable { profiles, types: kinds.swap_remove(kind).0, type_index }))
    }
}
