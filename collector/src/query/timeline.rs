//! Timelines: values of a selection over time. Reads only the index, unless the selection names spans.

use std::{collections::BTreeMap, sync::Arc};

use gannet_proto::query as api;

use super::{Query, QueryError, select::Selection, unit_of};
use crate::{store::ObjectKey, time};

/// Points of one timeline: more than the columns of a screen.
const MAX_POINTS: u64 = 5_000;
/// Shortest step that the collector chooses itself, in milliseconds.
const MIN_DEFAULT_STEP_MS: u64 = 10_000;

/// Sum of values and number of profiles in one step.
type Point = (u64, u64);

impl Query {
    /// Returns the values of one sample type over time. An empty `sample_type` means the last type of the first profile.
    /// Without `step_ms` the range has about 100 points.
    pub(crate) async fn timeline(
        self: &Arc<Self>,
        selection: Selection,
        sample_type: String,
        step_ms: Option<u64>,
    ) -> Result<api::TimelineResponse, QueryError> {
        let _timer = self.metrics.query_timer("timeline");
        let Some((from_ms, until_ms)) = selection.range() else {
            return Err(QueryError::Invalid("a timeline needs a range, not one profile".into()));
        };
        let step = match step_ms {
            Some(0) => return Err(QueryError::Invalid("step must be above 0".into())),
            Some(step) => step,
            None => ((until_ms - from_ms) / 100).max(MIN_DEFAULT_STEP_MS),
        };
        let points = (until_ms - from_ms).div_ceil(step);
        if points > MAX_POINTS {
            return Err(QueryError::Invalid(format!(
                "step {step} ms makes {points} points of this range, above {MAX_POINTS}: choose a longer step"
            )));
        }
        let selected = self.select(selection).await?;
        self.blocking(move |q| {
            let empty = || vec![(0, 0); points as usize];
            let mut first: Option<(ObjectKey, String)> = None;
            let mut sums: BTreeMap<String, Vec<Point>> = BTreeMap::new();
            q.scan(&selected, |entry| {
                let index = ((entry.key.start_ms - from_ms) / step) as usize;
                if let Some(last) = entry.row.types.last()
                    && first.as_ref().is_none_or(|(key, _)| entry.key < *key)
                {
                    first = Some((entry.key, last.name.clone()));
                }
                for t in entry.row.types {
                    if sample_type.is_empty() || t.name == sample_type {
                        let point = &mut sums.entry(t.name).or_insert_with(empty)[index];
                        point.0 = point.0.saturating_add(u64::try_from(t.total).unwrap_or(0));
                        point.1 += 1;
                    }
                }
                true
            })?;
            let sample_type = match (sample_type.is_empty(), first) {
                (true, Some((_, last))) => last,
                _ => sample_type,
            };
            let values = sums.remove(&sample_type).unwrap_or_else(empty);
            Ok(api::TimelineResponse {
                unit: unit_of(&sample_type),
                step: Some(time::duration_from_ms(step)),
                points: values
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
