//! Profiles by time and value: the number of profiles of each step that have about the same value. Reads only the index.

use std::{collections::BTreeMap, sync::Arc};

use gannet_proto::foreign::{
    pyroscope_querier::{self as api, ExemplarType, HeatmapQueryType},
    pyroscope_types as types,
};
use tonic::Status;

use super::{
    metadata::{check_names, pairs},
    scope::{Range, Scope, parse_selector},
    series::{Grid, GroupLabels, MAX_ALL_POINTS},
};
use crate::{
    profile_type::ProfileType,
    query::{Query, QueryError},
};

/// Number of buckets of the values, the same as in Pyroscope. All have the same width.
const BUCKETS: usize = 20;
/// Maximum number of slots of all series. Each has one count for each bucket.
const MAX_SLOTS: usize = MAX_ALL_POINTS / BUCKETS;

/// Numbers of profiles by bucket, by the end of their step in milliseconds.
type Slots = BTreeMap<u64, [i32; BUCKETS]>;
/// The buckets, and the slots of each group.
type Counted = (Buckets, BTreeMap<GroupLabels, Slots>);

/// The range of all values, in equal parts.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Buckets {
    min: i64,
    max: i64,
}

impl Buckets {
    fn width(self) -> f64 {
        (self.max as f64 - self.min as f64) / BUCKETS as f64
    }

    /// Returns the bucket of a value: the last one also holds the largest value.
    fn of(self, value: i64) -> usize {
        let above = value as f64 - self.min as f64;
        // A width of 0 leads to NaN or infinity, and the conversion saturates.
        ((above / self.width()) as usize).min(BUCKETS - 1)
    }

    /// Returns the smallest value of each bucket.
    fn bounds(self) -> Vec<f64> {
        (0..BUCKETS).map(|bucket| self.width().mul_add(bucket as f64, self.min as f64)).collect()
    }
}

pub(super) async fn select_heatmap(
    query: Arc<Query>,
    request: api::SelectHeatmapRequest,
) -> Result<api::SelectHeatmapResponse, Status> {
    if request.query_type() == HeatmapQueryType::Span {
        return Err(Status::unimplemented("query_type: this server counts profiles, not spans"));
    }
    if request.exemplar_type() == ExemplarType::Span {
        return Err(Status::unimplemented("exemplar_type: this server has no exemplars of spans"));
    }
    let wanted = ProfileType::parse(&request.profile_type_id)?;
    let range = Range::required(request.start, request.end)?;
    let selector = parse_selector("label_selector", &request.label_selector)?;
    check_names("group_by", &request.group_by)?;
    let grid = Grid::new(range, request.step)?;
    let group_by = request.group_by;
    let counted = query.timed("pyroscope_select_heatmap", move |query| {
        count(query, &Scope::new(query, selector, Some(wanted), grid.profiles()), grid, &group_by)
    });
    let Some((buckets, groups)) = counted.await? else { return Ok(api::SelectHeatmapResponse::default()) };
    let mut groups: Vec<_> = groups.into_iter().collect();
    let profiles = |slots: &Slots| slots.values().flatten().map(|n| i64::from(*n)).sum::<i64>();
    groups.sort_by_cached_key(|(labels, slots)| (std::cmp::Reverse(profiles(slots)), labels.clone()));
    let limit = request.limit.and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
    groups.truncate(limit.unwrap_or(usize::MAX));
    let series = groups.into_iter().map(|(labels, slots)| types::HeatmapSeries {
        labels: pairs(labels),
        slots: slots
            .into_iter()
            .map(|(at, counts)| types::HeatmapSlot {
                timestamp: at as i64,
                y_min: buckets.bounds(),
                counts: counts.to_vec(),
                exemplars: Vec::new(),
            })
            .collect(),
    });
    Ok(api::SelectHeatmapResponse { series: series.collect() })
}

/// Counts the profiles of each group by step and bucket. `None`: there are no profiles. Blocking.
///
/// The first pass over the index finds the range of all values, which defines the buckets. So no pass stores values.
fn count(
    query: &Query,
    scope: &Scope,
    grid: Grid,
    group_by: &[String],
) -> Result<Option<Counted>, QueryError> {
    let mut buckets: Option<Buckets> = None;
    scope.each(query, |_, entry, _, value| {
        if grid.point(entry.key.start_ms).is_some() {
            let known = buckets.get_or_insert(Buckets { min: value, max: value });
            *known = Buckets { min: known.min.min(value), max: known.max.max(value) };
        }
        true
    })?;
    let Some(buckets) = buckets else { return Ok(None) };
    let mut groups: BTreeMap<GroupLabels, Slots> = BTreeMap::new();
    let (mut slots, mut too_many) = (0, false);
    // Profiles come series by series.
    let mut current: Option<(u64, GroupLabels)> = None;
    scope.each(query, |view, entry, _, value| {
        let Some(at) = grid.point(entry.key.start_ms) else { return true };
        if current.as_ref().is_none_or(|(series, _)| *series != entry.series) {
            // Without `group_by` there is one group, without labels.
            let labels = if group_by.is_empty() { Vec::new() } else { view.project(group_by) };
            current = Some((entry.series, labels));
        }
        let Some((_, labels)) = &current else { return true };
        let group = groups.entry(labels.clone()).or_default();
        let before = group.len();
        let counts = group.entry(at).or_default();
        // A profile stored between the two passes may lie outside of the range.
        let count = &mut counts[buckets.of(value)];
        *count = count.saturating_add(1);
        slots += group.len() - before;
        too_many = slots > MAX_SLOTS;
        !too_many
    })?;
    if too_many {
        return Err(QueryError::TooLarge(format!(
            "the answer has more than {MAX_SLOTS} slots: choose a longer step, or group by fewer labels"
        )));
    }
    Ok(Some((buckets, groups)))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(0, 0)]
    #[case(99, 0)]
    #[case(100, 1)]
    #[case(1999, 19)]
    #[case(2000, 19)]
    #[case(i64::MAX, 19)]
    #[case(i64::MIN, 0)]
    fn a_value_is_in_the_bucket_of_its_range(#[case] value: i64, #[case] bucket: usize) {
        assert_eq!(Buckets { min: 0, max: 2000 }.of(value), bucket);
    }

    #[test]
    fn extreme_and_equal_values_have_buckets() {
        let one = Buckets { min: 7, max: 7 };
        assert_eq!((one.of(7), one.bounds()[0], one.bounds()[19]), (0, 7.0, 7.0));
        let all = Buckets { min: i64::MIN, max: i64::MAX };
        assert_eq!((all.of(i64::MIN), all.of(0), all.of(i64::MAX)), (0, 10, 19));
        assert!(all.bounds().is_sorted());
    }
}
