//! Selections of series and sample types, in the terms of Pyroscope's clients.
//!
//! For Pyroscope, each sample type of a profile is a series of its own, and its type is a label. Gannet stores a profile
//! with all its sample types under one series. A [`Scope`] selects stored series by their labels, and sample types by the labels
//! that Pyroscope would have added.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use gannet_proto::labels::{self, Labels};
use tonic::Status;

use crate::{
    clickhouse::Condition,
    profile_type::{PROFILE_NAME, ProfileType},
    query::{Query, QueryError, TableRange},
    selector::Selector,
    store::StoredProfile,
    time,
};

/// Label with a copy of the service's name.
const PRIVATE_SERVICE: &str = "__service_name__";
/// Labels that depend on the sample type.
const TYPED: [&str; 6] =
    ["__name__", "__period_type__", "__period_unit__", "__profile_type__", "__type__", "__unit__"];
/// Matchers of one request. Clients send one or none.
const MAX_MATCHERS: usize = 16;
/// Range of a request without times, in milliseconds.
const DEFAULT_RANGE_MS: u64 = 3_600_000;

/// The labels of a series, with those that Pyroscope would have added.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    labels: &'a Labels,
    /// `None`: the labels of all sample types.
    kind: Option<&'a ProfileType>,
}

impl<'a> View<'a> {
    pub(super) fn of_series(labels: &'a Labels) -> Self {
        Self { labels, kind: None }
    }

    pub(super) fn get(&self, name: &str) -> Option<&'a str> {
        if name == labels::SERVICE_NAME || name == PRIVATE_SERVICE {
            return Some(labels::service_name(self.labels));
        }
        let typed = self.kind.and_then(|kind| match name {
            "__name__" => Some(&kind.name),
            "__profile_type__" => Some(&kind.id),
            "__type__" => Some(&kind.sample_type),
            "__unit__" => Some(&kind.sample_unit),
            "__period_type__" => Some(&kind.period_type),
            "__period_unit__" => Some(&kind.period_unit),
            _ => None,
        });
        typed.or_else(|| self.labels.get(name)).map(String::as_str)
    }

    /// Returns the names of all labels, with those of sample types.
    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        let added = TYPED.into_iter().chain([PRIVATE_SERVICE, labels::SERVICE_NAME]);
        let own = self.labels.keys().map(String::as_str).filter(|name| *name != labels::SERVICE_NAME);
        added.chain(own)
    }

    /// Returns these labels, sorted by name, without those that the series lacks. An empty list means all.
    pub(super) fn project(&self, names: &[String]) -> Vec<(String, String)> {
        let mut projected: Vec<(String, String)> = if names.is_empty() {
            self.names().filter_map(|name| Some((name.to_owned(), self.get(name)?.to_owned()))).collect()
        } else {
            names.iter().filter_map(|name| Some((name.clone(), self.get(name)?.to_owned()))).collect()
        };
        projected.sort_unstable();
        projected.dedup();
        projected
    }
}

/// Reports whether a label depends on the sample type.
pub(super) fn is_typed(name: &str) -> bool {
    TYPED.contains(&name)
}

/// Parses a selector as Pyroscope does: with an optional name of profiles before the conditions, `process_cpu{pod="a"}`.
pub(super) fn parse_selector(field: &str, text: &str) -> Result<Selector, Status> {
    let end = text.find('{').unwrap_or(text.len());
    let (name, conditions) = text.split_at(end);
    let name = name.trim();
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
    if !name.chars().all(is_name) || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(Status::invalid_argument(format!(
            "{field}: expected conditions on labels, as in {{service_name=\"checkout\"}}"
        )));
    }
    let selector = Selector::parse(conditions).map_err(|error| {
        let position = error.position + text[..end].chars().count();
        Status::invalid_argument(format!("{field}, character {position}: {}", error.what))
    })?;
    Ok(if name.is_empty() { selector } else { selector.and(Selector::equal("__name__", name)) })
}

/// Parses the matchers of a request, all of which must hold.
pub(super) fn parse_matchers(matchers: &[String]) -> Result<Selector, Status> {
    if matchers.len() > MAX_MATCHERS {
        return Err(Status::invalid_argument(format!(
            "matchers: {} selectors, and at most {MAX_MATCHERS} are allowed",
            matchers.len()
        )));
    }
    let parsed = matchers.iter().map(|text| parse_selector("matchers", text));
    parsed.reduce(|all, next| Ok(all?.and(next?))).unwrap_or_else(|| Ok(Selector::default()))
}

/// A range of time, in milliseconds since 1970, with both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start_ms: u64,
    pub(super) end_ms: u64,
}

impl Range {
    /// Checks a range that must be given.
    pub(super) fn required(start: i64, end: i64) -> Result<Self, Status> {
        if start == 0 || end == 0 {
            return Err(Status::invalid_argument(
                "missing time range in the query: give start and end in milliseconds since 1970",
            ));
        }
        Self::checked(start, end)
    }

    /// Checks a range. Without times it is the last hour, as older versions of Grafana expect from a test of the data
    /// source.
    pub(super) fn or_last_hour(start: i64, end: i64) -> Result<Self, Status> {
        if start == 0 && end == 0 {
            let end_ms = time::now_ms();
            return Ok(Self { start_ms: end_ms.saturating_sub(DEFAULT_RANGE_MS), end_ms });
        }
        Self::checked(start, end)
    }

    fn checked(start: i64, end: i64) -> Result<Self, Status> {
        match (u64::try_from(start), u64::try_from(end)) {
            (Ok(start_ms), Ok(end_ms)) if start_ms <= end_ms => Ok(Self { start_ms, end_ms }),
            (Ok(_), Ok(_)) => {
                Err(Status::invalid_argument(format!("start ({start}) is after end ({end}): swap them")))
            }
            _ => Err(Status::invalid_argument("start and end are milliseconds since 1970, not negative")),
        }
    }

    /// Returns the time after the last one.
    pub(super) fn until_ms(self) -> u64 {
        self.end_ms.saturating_add(1)
    }
}

/// The sample types of profiles that have the same ones, with the answer which of them a scope takes.
struct Kind {
    types: Vec<String>,
    kinds: Arc<[ProfileType]>,
    takes: Vec<bool>,
}

/// Selected series, and the conditions on their sample types.
pub(super) struct Scope {
    pub(super) series: Vec<(u64, Arc<Labels>)>,
    typed: Selector,
    wanted: Option<ProfileType>,
    pub(super) range: Range,
    /// The same series, if ClickHouse can select them.
    conditions: Option<Vec<Condition>>,
}

impl Scope {
    /// Selects series. `wanted`: the only profile type that counts.
    pub(super) fn new(query: &Query, selector: Selector, wanted: Option<ProfileType>, range: Range) -> Self {
        let (typed, of_series) = selector.split(is_typed);
        let (service, stored) =
            of_series.split(|name| name == labels::SERVICE_NAME || name == PRIVATE_SERVICE);
        let series = query.series_in(&stored, range.start_ms, range.until_ms());
        let conditions = if query.has_tables() { conditions(query, &stored, &service) } else { None };
        let named = series.into_iter().filter(|series| {
            let view = View::of_series(&series.labels);
            service.matches_by(|name| view.get(name).unwrap_or(""))
        });
        Self {
            series: named.map(|series| (series.id, series.labels)).collect(),
            typed,
            wanted,
            range,
            conditions,
        }
    }

    /// Reports whether every sample type of the series counts, so that their labels alone decide.
    pub(super) fn takes_all_types(&self) -> bool {
        self.wanted.is_none() && self.typed.is_empty()
    }

    fn ids(&self) -> Vec<u64> {
        self.series.iter().map(|(id, _)| *id).collect()
    }

    /// Calls `each` for every selected sample type of every profile, with its labels and the sum of its values, series by
    /// series and each in the order of time. Stops if `each` returns false. Blocking.
    pub(super) fn each(
        &self,
        query: &Query,
        mut each: impl FnMut(View<'_>, &StoredProfile, &ProfileType, i64) -> bool,
    ) -> Result<(), QueryError> {
        let mut filter = Filter::new(self);
        query.scan_series(&self.ids(), self.range.start_ms, self.range.until_ms(), |entry| {
            let Some((labels, kind)) = filter.kind(&entry) else { return true };
            let rows = kind.kinds.iter().zip(&kind.takes).zip(&entry.row.types);
            for ((kind, takes), t) in rows {
                if *takes && !each(View { labels, kind: Some(kind) }, &entry, kind, t.total) {
                    return false;
                }
            }
            true
        })
    }

    /// Reports whether a series has a selected sample type. Blocking.
    pub(super) fn has_selected_type(&self, query: &Query, series: u64) -> Result<bool, QueryError> {
        let (mut filter, mut found) = (Filter::new(self), false);
        query.scan_series(&[series], self.range.start_ms, self.range.until_ms(), |entry| {
            found = filter.takes(&entry);
            !found
        })?;
        Ok(found)
    }

    /// Returns the selected series with their range.
    pub(super) fn table_range(&self) -> TableRange {
        TableRange {
            series: self.ids(),
            conditions: self.conditions.clone(),
            from_ms: self.range.start_ms,
            until_ms: self.range.until_ms(),
        }
    }

    /// Returns a filter of the profiles.
    pub(super) fn filter(self: &Arc<Self>) -> Filter<Arc<Self>> {
        Filter::new(Arc::clone(self))
    }

    /// Reports whether the scope takes a sample type of profiles that have this name and these types.
    pub(super) fn takes_kind(&self, name: &str, types: &[String]) -> bool {
        let types: Vec<&str> = types.iter().map(String::as_str).collect();
        let name = (!name.is_empty()).then_some(name);
        ProfileType::of_profile(name, &types).iter().any(|kind| self.takes(&Labels::new(), kind))
    }

    /// Reports whether the conditions on sample types hold.
    fn takes(&self, labels: &Labels, kind: &ProfileType) -> bool {
        let view = View { labels, kind: Some(kind) };
        self.wanted.as_ref().is_none_or(|wanted| wanted.id == kind.id)
            && self.typed.matches_by(|name| view.get(name).unwrap_or(""))
    }
}

/// Returns the conditions on series for ClickHouse. Returns `None` if the service of a series may come from other labels than
/// `service_name`.
fn conditions(query: &Query, stored: &Selector, service: &Selector) -> Option<Vec<Condition>> {
    let mut conditions = query.conditions(stored);
    if !service.is_empty() {
        let label = labels::SERVICE_NAME;
        let mut values = query.values_where(label, |_| true);
        if values.iter().any(String::is_empty) {
            return None;
        }
        values.retain(|value| service.matches_by(|_| value));
        conditions.push(Condition { label: label.to_owned(), values, is_negated: false });
    }
    Some(conditions)
}

/// Value of [`PROFILE_NAME`], and sample types.
type NameAndTypes = (Option<String>, Vec<String>);

/// Decides which profiles and sample types a scope takes, and remembers that for the series of the last profile.
pub(super) struct Filter<S> {
    scope: S,
    by_id: HashMap<u64, Arc<Labels>>,
    /// Profile types of the profiles seen so far.
    known: BTreeMap<NameAndTypes, Arc<[ProfileType]>>,
    series: Option<u64>,
    kinds: Vec<Kind>,
}

impl<S: std::ops::Deref<Target = Scope>> Filter<S> {
    fn new(scope: S) -> Self {
        let by_id = scope.series.iter().map(|(id, labels)| (*id, Arc::clone(labels))).collect();
        Self { scope, by_id, known: BTreeMap::new(), series: None, kinds: Vec::new() }
    }

    /// Reports whether the scope takes a sample type of the profile.
    pub(super) fn takes(&mut self, entry: &StoredProfile) -> bool {
        self.kind(entry).is_some_and(|(_, kind)| kind.takes.contains(&true))
    }

    fn kind(&mut self, entry: &StoredProfile) -> Option<(&Labels, &Kind)> {
        let Self { scope, by_id, known, series, kinds } = self;
        let labels = by_id.get(&entry.series)?;
        if *series != Some(entry.series) {
            *series = Some(entry.series);
            kinds.clear();
        }
        let same = |kind: &Kind| kind.types.iter().eq(entry.row.types.iter().map(|t| &t.name));
        let index = kinds.iter().position(same).unwrap_or_else(|| {
            let types: Vec<String> = entry.row.types.iter().map(|t| t.name.clone()).collect();
            let name = labels.get(PROFILE_NAME);
            let of_profile = known.entry((name.cloned(), types.clone())).or_insert_with(|| {
                let types: Vec<&str> = types.iter().map(String::as_str).collect();
                ProfileType::of_profile(name.map(String::as_str), &types).into()
            });
            let takes = of_profile.iter().map(|kind| scope.takes(labels, kind));
            kinds.push(Kind { takes: takes.collect(), kinds: Arc::clone(of_profile), types });
            kinds.len() - 1
        });
        Some((labels, &kinds[index]))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("", true)]
    #[case("{}", true)]
    #[case("process_cpu", true)]
    #[case("process_cpu{comm=\"x\"}", true)]
    #[case("memory{}", false)]
    #[case("{service_name=\"x\",__unit__=\"nanoseconds\"}", true)]
    #[case("{__service_name__=\"y\"}", false)]
    fn a_selector_sees_added_labels(#[case] text: &str, #[case] matches: bool) {
        let labels = Labels::from([("comm".to_owned(), "x".to_owned())]);
        let kinds = ProfileType::of_profile(None, &["cpu/nanoseconds"]);
        let view = View { labels: &labels, kind: kinds.first() };
        let selector = parse_selector("query", text).unwrap();
        assert_eq!(selector.matches_by(|name| view.get(name).unwrap_or("")), matches);
    }

    proptest! {
        #[test]
        fn any_selector_is_read_without_a_panic(text in "\\PC{0,40}|[{}a=~!\"`'\\\\,\n :é]{0,20}") {
            let _ = parse_selector("query", &text);
        }
    }
}
