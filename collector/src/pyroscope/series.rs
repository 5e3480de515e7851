//! Values over time, grouped by labels, from the index alone.

use std::{collections::BTreeMap, sync::Arc};

use gannet_proto::foreign::{
    pyroscope_querier::{self as api, ExemplarType},
    pyroscope_types as types,
};
use tonic::Status;

use super::{
    metadata::{check_names, pairs},
    scope::{Range, Scope, parse_selector},
};
use crate::{
    profile_type::ProfileType,
    query::{Query, QueryError},
    selector::Selector,
};

/// Points of one series: more than the columns of a screen, and a day in steps of 15 s.
const MAX_POINTS: u64 = 11_000;
/// Points of all series. It bounds the memory of one answer.
pub(super) const MAX_ALL_POINTS: usize = 1_000_000;

/// Sums by the end of their step, in milliseconds.
pub(super) type Points = BTreeMap<u64, i64>;
/// Labels, sorted by name.
pub(super) type GroupLabels = Vec<(String, String)>;

/// The steps of a range: a point at `t` stands for the profiles that start after `t` minus the step and up to `t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grid {
    range: Range,
    step_ms: u64,
}

impl Grid {
    /// Checks a step in seconds. It must not make too many points.
    pub(super) fn new(range: Range, step: f64) -> Result<Self, Status> {
        if !step.is_finite() || step < 0.001 {
            return Err(Status::invalid_argument(format!("step: {step} s; give 0.001 s or more")));
        }
        // The conversion saturates.
        let step_ms = (step * 1000.0) as u64;
        let points = (range.end_ms - range.start_ms) / step_ms.max(1) + 1;
        if points > MAX_POINTS {
            return Err(Status::invalid_argument(format!(
                "step: {step} s makes {points} points of this range, above {MAX_POINTS}: choose a longer step"
            )));
        }
        Ok(Self { range, step_ms: step_ms.max(1) })
    }

    /// Returns the range of the profiles that the points stand for.
    pub(super) fn profiles(self) -> Range {
        let start_ms = self.range.start_ms.saturating_sub(self.step_ms - 1);
        Range { start_ms, ..self.range }
    }

    /// Returns the point of a profile, or `None` after the last point.
    pub(super) fn point(self, at_ms: u64) -> Option<u64> {
        let behind = at_ms.saturating_sub(self.range.start_ms);
        let point =
            behind.div_ceil(self.step_ms).checked_mul(self.step_ms)?.checked_add(self.range.start_ms)?;
        (point <= self.range.end_ms).then_some(point)
    }
}

pub(super) async fn select_series(
    query: Arc<Query>,
    request: api::SelectSeriesRequest,
) -> Result<api::SelectSeriesResponse, Status> {
    if request.exemplar_type() == ExemplarType::Span {
        return Err(Status::unimplemented("exemplar_type: this server has no exemplars of spans"));
    }
    // The newest server of Pyroscope, too, always adds up, and does not select stacks here.
    let api::SelectSeriesRequest {
        profile_type_id,
        label_selector,
        start,
        end,
        group_by,
        step,
        aggregation: _,
        stack_trace_selector: _,
        limit,
        exemplar_type: _,
    } = request;
    let wanted = ProfileType::parse(&profile_type_id)?;
    let range = Range::required(start, end)?;
    let selector = parse_selector("label_selector", &label_selector)?;
    check_names("group_by", &group_by)?;
    let grid = Grid::new(range, step)?;
    let limit = limit.and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
    let groups =
        query.timed("pyroscope_select_series", move |q| sums(q, selector, wanted, grid, &group_by)).await?;
    let mut groups: Vec<_> = groups.into_iter().collect();
    let total = |points: &Points| points.values().fold(0_i64, |sum, value| sum.saturating_add(*value));
    groups.sort_by_cached_key(|(labels, points)| (std::cmp::Reverse(total(points)), labels.clone()));
    groups.truncate(limit.unwrap_or(usize::MAX));
    let series = groups.into_iter().map(|(labels, points)| types::Series {
        labels: pairs(labels),
        points: points
            .into_iter()
            .map(|(at, value)| types::Point {
                value: value as f64,
                timestamp: at as i64,
                exemplars: Vec::new(),
            })
            .collect(),
    });
    Ok(api::SelectSeriesResponse { series: series.collect() })
}

/// Returns the points of each group. Steps without a profile have no point. Blocking.
pub(super) fn sums(
    query: &Query,
    selector: Selector,
    wanted: ProfileType,
    grid: Grid,
    group_by: &[String],
) -> Result<BTreeMap<GroupLabels, Points>, QueryError> {
    let scope = Scope::new(query, selector, Some(wanted), grid.profiles());
    let mut groups: BTreeMap<GroupLabels, Points> = BTreeMap::new();
    // Profiles come series by series.
    let mut current: Option<(u64, GroupLabels, Points)> = None;
    let (mut count, mut too_many) = (0, false);
    let mut add = |groups: &mut BTreeMap<GroupLabels, Points>, labels: GroupLabels, points: Points| {
        let group = groups.entry(labels).or_default();
        let before = group.len();
        for (at, value) in points {
            let sum = group.entry(at).or_default();
            *sum = sum.saturating_add(value);
        }
        count += group.len() - before;
        count <= MAX_ALL_POINTS
    };
    scope.each(query, |view, entry, _, value| {
        if current.as_ref().is_none_or(|(series, ..)| *series != entry.series) {
            // Without `group_by` there is one group, without labels.
            let labels = if group_by.is_empty() { Vec::new() } else { view.project(group_by) };
            if let Some((_, labels, points)) = current.replace((entry.series, labels, Points::new()))
                && !add(&mut groups, labels, points)
            {
                too_many = true;
                return false;
            }
        }
        if let (Some((_, _, points)), Some(at)) = (&mut current, grid.point(entry.key.start_ms)) {
            let sum = points.entry(at).or_default();
            *sum = sum.saturating_add(value);
        }
        true
    })?;
    if let Some((_, labels, points)) = current {
        too_many |= !add(&mut groups, labels, points);
    }
    if too_many {
        return Err(QueryError::TooLarge(format!(
            "the answer has more than {MAX_ALL_POINTS} points: choose a longer step, or group by fewer labels"
        )));
    }
    groups.retain(|_, points| !points.is_empty());
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// Checks that a point at `t` stands for `(t - step, t]`, and that nothing lies beyond the last point.
    #[rstest]
    #[case(1000, Some(1000))]
    #[case(991, Some(1000))]
    #[case(1001, Some(1010))]
    #[case(1010, Some(1010))]
    #[case(1020, Some(1020))]
    #[case(1021, None)]
    #[case(u64::MAX, None)]
    fn a_point_ends_its_step(#[case] at: u64, #[case] point: Option<u64>) {
        let grid = Grid::new(Range { start_ms: 1000, end_ms: 1025 }, 0.01).unwrap();
        assert_eq!(grid.point(at), point);
        assert_eq!(grid.profiles(), Range { start_ms: 991, end_ms: 1025 });
    }

    #[rstest]
    #[case(0.0, "0.001")]
    #[case(f64::NAN, "0.001")]
    #[case(f64::INFINITY, "0.001")]
    #[case(-1.0, "0.001")]
    #[case(0.001, "longer step")]
    fn a_useless_step_is_refused(#[case] step: f64, #[case] says: &str) {
        let error = Grid::new(Range { start_ms: 1, end_ms: 1 << 40 }, step).unwrap_err();
        assert!(error.message().contains(says), "{error}");
    }

    #[test]
    fn the_longest_step_makes_one_point() {
        let grid = Grid::new(Range { start_ms: 5000, end_ms: 9000 }, f64::MAX).unwrap();
        assert_eq!((grid.point(4000), grid.point(5000), grid.point(5001)), (Some(5000), Some(5000), None));
    }
}
