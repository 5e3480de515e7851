//! Heat maps: values of a selection over time, in rows by a label or by the height of the values. Reads only
//! the index, unless the selection names spans.

use std::{cmp::Reverse, collections::HashMap, sync::Arc};

use super::{Query, QueryError, Selected, select::Selection, unit_of};

/// Maximum number of columns of one heat map.
const MAX_COLUMNS: u64 = 500;
/// Maximum number of rows for values of a label. The row [`OTHERS`] has the sum of the rest.
const MAX_LABEL_ROWS: usize = 40;
/// Maximum number of cells, or values of profiles, that a query holds while it reads the index, up to 16 bytes each.
const MAX_NUMBERS: usize = 2_000_000;
/// Number of rows of a heat map by value.
const VALUE_ROWS: usize = 20;
/// Name of the row for all further values of a label.
const OTHERS: &str = "[other]";

/// A heat map. All rows have the same number of cells: one for each step of the range.
pub(crate) struct Heatmap {
    pub(crate) unit: String,
    pub(crate) step_ms: u64,
    pub(crate) rows: Vec<HeatmapRow>,
}

/// One row of a heat map.
pub(crate) struct HeatmapRow {
    /// The value of the label. Empty for series without the label, and in a heat map by value.
    pub(crate) name: String,
    /// The range of values of this row, in units for each second of a profile. Only in a heat map by value.
    pub(crate) bounds: Option<(f64, f64)>,
    /// The cells: sums of the sample type in a map by label, numbers of profiles in a map by value.
    pub(crate) cells: Vec<u64>,
}

impl HeatmapRow {
    fn total(&self) -> u128 {
        self.cells.iter().map(|cell| u128::from(*cell)).sum()
    }

    fn add(&mut self, other: &Self) {
        for (cell, more) in self.cells.iter_mut().zip(&other.cells) {
            *cell = cell.saturating_add(*more);
        }
    }
}

/// Value of one profile for each second, and its column.
struct Height {
    column: usize,
    value: f64,
}

impl Query {
    /// Returns the heat map of one sample type. Rows are the values of the label `by`, the largest sum first, or without a
    /// label the heights of the profiles' values, the lowest first.
    pub(crate) async fn heatmap(
        self: &Arc<Self>,
        selection: Selection,
        sample_type: String,
        step_ms: u64,
        by: String,
    ) -> Result<Heatmap, QueryError> {
        let _timer = self.metrics.query_timer("heatmap");
        let Some((from_ms, until_ms)) = selection.range() else {
            return Err(QueryError::Invalid("a heat map needs a range, not one profile".into()));
        };
        if sample_type.is_empty() {
            return Err(QueryError::Invalid("type: give a sample type, as /api/v1/series lists them".into()));
        }
        if step_ms == 0 {
            return Err(QueryError::Invalid("step_ms: give the width of a column, above 0".into()));
        }
        let columns = (until_ms - from_ms).div_ceil(step_ms);
        if columns > MAX_COLUMNS {
            return Err(QueryError::Invalid(format!(
                "step_ms {step_ms} divides this range into {columns} columns, the limit is {MAX_COLUMNS}: choose a longer step"
            )));
        }
        let range = Columns { from_ms, step_ms, count: columns as usize };
        let selected = self.select(selection).await?;
        self.blocking(move |q| {
            let unit = unit_of(&sample_type);
            let rows = if by.is_empty() {
                q.rows_by_value(&selected, &sample_type, &range)?
            } else {
                q.rows_by_label(&selected, &sample_type, &range, &by)?
            };
            Ok(Heatmap { unit, step_ms, rows })
        })
        .await
    }

    fn rows_by_label(
        &self,
        selected: &Selected,
        sample_type: &str,
        range: &Columns,
        by: &str,
    ) -> Result<Vec<HeatmapRow>, QueryError> {
        // The row of each series, as an index into `rows`.
        let mut row_of: HashMap<u64, usize> = HashMap::new();
        let mut index_of: HashMap<String, usize> = HashMap::new();
        let mut rows: Vec<HeatmapRow> = Vec::new();
        self.scan(selected, |entry| {
            let Some(found) = entry.row.types.iter().find(|t| t.name == sample_type) else { return true };
            let index = *row_of.entry(entry.series).or_insert_with(|| {
                let labels = self.store.labels_of(entry.series);
                let name = labels.and_then(|labels| labels.get(by).cloned()).unwrap_or_default();
                *index_of.entry(name).or_insert_with_key(|name| {
                    rows.push(HeatmapRow { name: name.clone(), bounds: None, cells: vec![0; range.count] });
                    rows.len() - 1
                })
            });
            let cell = &mut rows[index].cells[range.of(entry.key.start_ms)];
            *cell = cell.saturating_add(u64::try_from(found.total).unwrap_or(0));
            rows.len() * range.count <= MAX_NUMBERS
        })?;
        if rows.len() * range.count > MAX_NUMBERS {
            return Err(QueryError::TooLarge(format!(
                "the label `{by}` has too many values here: choose a shorter range, a longer step, or another label"
            )));
        }
        rows.sort_by_cached_key(|row| (Reverse(row.total()), row.name.clone()));
        if rows.len() > MAX_LABEL_ROWS {
            let rest = rows.split_off(MAX_LABEL_ROWS - 1);
            let mut others =
                HeatmapRow { name: OTHERS.to_owned(), bounds: None, cells: vec![0; range.count] };
            for row in &rest {
                others.add(row);
            }
            rows.push(others);
        }
        Ok(rows)
    }

    fn rows_by_value(
        &self,
        selected: &Selected,
        sample_type: &str,
        range: &Columns,
    ) -> Result<Vec<HeatmapRow>, QueryError> {
        let mut heights: Vec<Height> = Vec::new();
        self.scan(selected, |entry| {
            let Some(found) = entry.row.types.iter().find(|t| t.name == sample_type) else { return true };
            // Windows have different lengths, so only rates are comparable.
            let seconds = entry.row.duration_ms.max(1) as f64 / 1000.0;
            let value = found.total.max(0) as f64 / seconds;
            heights.push(Height { column: range.of(entry.key.start_ms), value });
            heights.len() <= MAX_NUMBERS
        })?;
        if heights.len() > MAX_NUMBERS {
            return Err(QueryError::TooLarge(format!(
                "the heat map has more than {MAX_NUMBERS} profiles: choose a shorter range or fewer series"
            )));
        }
        let highest = heights.iter().map(|height| height.value).fold(0.0, f64::max);
        let lowest = heights.iter().map(|height| height.value).fold(f64::INFINITY, f64::min);
        if heights.is_empty() || highest <= 0.0 {
            return Ok(Vec::new());
        }
        // If all values are high, the lowest row starts at the smallest one, so that small changes spread over all rows.
        let low = if lowest > highest / 2.0 { lowest } else { 0.0 };
        let size = ((highest - low) / VALUE_ROWS as f64).max(highest * 1e-6);
        let mut rows: Vec<HeatmapRow> = (0..VALUE_ROWS)
            .map(|row| HeatmapRow {
                name: String::new(),
                bounds: Some((low + row as f64 * size, low + (row + 1) as f64 * size)),
                cells: vec![0; range.count],
            })
            .collect();
        for Height { column, value } in heights {
            let row = (((value - low) / size) as usize).min(VALUE_ROWS - 1);
            rows[row].cells[column] += 1;
        }
        Ok(rows)
    }
}

/// The columns of a range.
struct Columns {
    from_ms: u64,
    step_ms: u64,
    count: usize,
}

impl Columns {
    /// Returns the column of a time in the range.
    fn of(&self, at_ms: u64) -> usize {
        let column = at_ms.saturating_sub(self.from_ms) / self.step_ms;
        usize::try_from(column).unwrap_or(usize::MAX).min(self.count.saturating_sub(1))
    }
}
