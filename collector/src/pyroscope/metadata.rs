//! Calls about labels and profile types, which read no profile.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use gannet_proto::foreign::{pyroscope_querier as api, pyroscope_types as types};
use tonic::Status;

use super::scope::{Range, Scope, View, is_typed, parse_matchers};
use crate::{
    profile_type::ProfileType,
    query::{Query, QueryError},
    selector::Selector,
};

/// Labels of the result of one call.
const MAX_LABEL_NAMES: usize = 64;

pub(super) async fn profile_types(
    query: Arc<Query>,
    request: api::ProfileTypesRequest,
) -> Result<api::ProfileTypesResponse, Status> {
    let range = Range::or_last_hour(request.start, request.end)?;
    let kinds = query
        .timed("pyroscope_profile_types", move |q| {
            let mut kinds: BTreeMap<String, ProfileType> = BTreeMap::new();
            Scope::new(q, Selector::default(), None, range).each(q, |_, _, kind, _| {
                if !kinds.contains_key(&kind.id) {
                    kinds.insert(kind.id.clone(), kind.clone());
                }
                true
            })?;
            Ok(kinds)
        })
        .await?;
    let profile_types = kinds.into_values().map(|kind| {
        let ProfileType { id, name, sample_type, sample_unit, period_type, period_unit } = kind;
        types::ProfileType { id, name, sample_type, sample_unit, period_type, period_unit }
    });
    Ok(api::ProfileTypesResponse { profile_types: profile_types.collect() })
}

pub(super) async fn label_names(
    query: Arc<Query>,
    request: api::LabelNamesRequest,
) -> Result<api::LabelNamesResponse, Status> {
    let range = Range::required(request.start, request.end)?;
    let selector = parse_matchers(&request.matchers)?;
    let names = query
        .timed("pyroscope_label_names", move |q| {
            let mut names = BTreeSet::new();
            let scope = Scope::new(q, selector, None, range);
            for (id, labels) in &scope.series {
                // The index is asked only about a series that would change the answer.
                let new: Vec<&str> =
                    View::of_series(labels).names().filter(|name| !names.contains(*name)).collect();
                if !new.is_empty() && (scope.takes_all_types() || scope.has_selected_type(q, *id)?) {
                    names.extend(new.into_iter().map(str::to_owned));
                }
            }
            Ok(names)
        })
        .await?;
    Ok(api::LabelNamesResponse { names: names.into_iter().collect() })
}

pub(super) async fn label_values(
    query: Arc<Query>,
    request: api::LabelValuesRequest,
) -> Result<api::LabelValuesResponse, Status> {
    let api::LabelValuesRequest { name, matchers, start, end } = request;
    if name.is_empty() {
        return Err(Status::invalid_argument("name: give the label whose values you want"));
    }
    let range = Range::required(start, end)?;
    let selector = parse_matchers(&matchers)?;
    let values = query
        .timed("pyroscope_label_values", move |q| values_of(q, &Scope::new(q, selector, None, range), &name))
        .await?;
    Ok(api::LabelValuesResponse { names: values.into_iter().collect() })
}

/// Returns the values of a label over a scope. Blocking.
fn values_of(query: &Query, scope: &Scope, name: &str) -> Result<BTreeSet<String>, QueryError> {
    let mut values: BTreeSet<String> = BTreeSet::new();
    if is_typed(name) {
        scope.each(query, |view, _, _, _| {
            if let Some(value) = view.get(name)
                && !values.contains(value)
            {
                values.insert(value.to_owned());
            }
            true
        })?;
        return Ok(values);
    }
    for (id, labels) in &scope.series {
        if let Some(value) = View::of_series(labels).get(name)
            && !values.contains(value)
            && (scope.takes_all_types() || scope.has_selected_type(query, *id)?)
        {
            values.insert(value.to_owned());
        }
    }
    Ok(values)
}

pub(super) async fn series(
    query: Arc<Query>,
    request: api::SeriesRequest,
) -> Result<api::SeriesResponse, Status> {
    let api::SeriesRequest { matchers, label_names, start, end } = request;
    let range = Range::required(start, end)?;
    let selector = parse_matchers(&matchers)?;
    check_names("label_names", &label_names)?;
    let sets = query
        .timed("pyroscope_series", move |q| {
            let scope = Scope::new(q, selector, None, range);
            let mut sets: BTreeSet<Vec<(String, String)>> = BTreeSet::new();
            if !label_names.is_empty() && !label_names.iter().any(|name| is_typed(name)) {
                for (id, labels) in &scope.series {
                    let set = View::of_series(labels).project(&label_names);
                    if !sets.contains(&set) && (scope.takes_all_types() || scope.has_selected_type(q, *id)?) {
                        sets.insert(set);
                    }
                }
                return Ok(sets);
            }
            // A series has few types and many profiles.
            let mut last: Option<(u64, BTreeSet<String>)> = None;
            scope.each(q, |view, entry, kind, _| {
                let seen = match &mut last {
                    Some((series, seen)) if *series == entry.series => seen,
                    last => &mut last.insert((entry.series, BTreeSet::new())).1,
                };
                if !seen.contains(&kind.id) {
                    seen.insert(kind.id.clone());
                    sets.insert(view.project(&label_names));
                }
                true
            })?;
            Ok(sets)
        })
        .await?;
    let labels_set = sets.into_iter().map(|set| types::Labels { labels: pairs(set) }).collect();
    Ok(api::SeriesResponse { labels_set })
}

pub(super) async fn profile_stats(
    query: Arc<Query>,
    _: api::GetProfileStatsRequest,
) -> Result<api::GetProfileStatsResponse, Status> {
    Ok(match query.times() {
        None => api::GetProfileStatsResponse::default(),
        Some((oldest, newest)) => api::GetProfileStatsResponse {
            data_ingested: true,
            oldest_profile_time: oldest as i64,
            newest_profile_time: newest as i64,
        },
    })
}

/// Checks a list of label names.
pub(super) fn check_names(field: &str, names: &[String]) -> Result<(), Status> {
    if names.len() > MAX_LABEL_NAMES {
        return Err(Status::invalid_argument(format!(
            "{field}: {} labels, and at most {MAX_LABEL_NAMES} are allowed",
            names.len()
        )));
    }
    Ok(())
}

pub(super) fn pairs(labels: Vec<(String, String)>) -> Vec<types::LabelPair> {
    labels.into_iter().map(|(name, value)| types::LabelPair { name, value }).collect()
}
