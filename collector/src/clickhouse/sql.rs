//! The statements for ClickHouse. Each table is read in the version that the collector names, so that the segments in it are known.

use std::fmt::Write as _;

use ulid::Ulid;

use super::{literal::literal, location::TableLocation};
use crate::table::TableVersions;

/// Comments of profiles in one answer, as in a merge.
const MAX_COMMENTS: usize = 1024;
/// Labels of profiles that are columns of the samples.
const SAMPLE_COLUMNS: [&str; 5] = ["service_name", "namespace", "pod", "container", "node"];

fn literals<'t>(texts: impl IntoIterator<Item = &'t str>) -> String {
    texts.into_iter().map(literal).collect::<Vec<_>>().join(", ")
}

/// A condition on a label of the profiles. A missing label counts as an empty one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Condition {
    pub(crate) label: String,
    pub(crate) values: Vec<String>,
    /// The label has none of the values, instead of one of them.
    pub(crate) is_negated: bool,
}

impl Condition {
    fn sql(&self, column: &str) -> String {
        let Self { label: _, values, is_negated } = self;
        match (values.as_slice(), is_negated) {
            ([], false) => "false".to_owned(),
            ([], true) => "true".to_owned(),
            ([value], false) => format!("{column} = {}", literal(value)),
            ([value], true) => format!("{column} != {}", literal(value)),
            (values, _) => {
                let not = if *is_negated { "NOT " } else { "" };
                format!("{column} {not}IN ({})", literals(values.iter().map(String::as_str)))
            }
        }
    }

    fn of_profiles(&self) -> String {
        match self.label.as_str() {
            // The log has its range by file.
            "service_name" => self.sql("service_name"),
            label => self.sql(&format!("ifNull(labels[{}], '')", literal(label))),
        }
    }

    /// Returns the condition on the columns of the samples, if they have the label.
    fn of_samples(&self) -> Option<String> {
        let column = SAMPLE_COLUMNS.iter().find(|column| **column == self.label)?;
        Some(match *column {
            "service_name" => self.sql("service_name"),
            column => self.sql(&format!("ifNull({column}, '')")),
        })
    }
}

/// Profiles in the tables.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct TableSelection {
    pub(crate) versions: TableVersions,
    /// Start of the profiles, in milliseconds.
    pub(crate) from_ms: u64,
    pub(crate) until_ms: u64,
    /// All of them hold.
    pub(crate) conditions: Vec<Condition>,
    /// Profiles of segments that a compaction under way has added to one of the tables. The collector reads them itself.
    pub(crate) excluded: Vec<Ulid>,
}

/// Profiles of a selection that have the same sample types.
#[derive(Clone, Copy)]
pub(super) struct Kind<'a> {
    pub(super) types: &'a [String],
    /// Values of [`super::PROFILE_NAME`] that the profiles have; `None`: any.
    pub(super) names: Option<&'a [String]>,
    /// The types of its samples belong to no other profile of the selection.
    pub(super) is_alone: bool,
}

/// Reports whether the first of two values counts the samples of the second. The table then has one row for both.
fn counts_first(types: &[String]) -> bool {
    let unit = |name: &String| name.split_once('/').map(|(_, unit)| unit.to_owned());
    matches!(types, [first, second] if unit(first).as_deref() == Some("count") && unit(second).as_deref() != Some("count"))
}

/// Writes the statements of one selection.
pub(super) struct Statements<'a> {
    pub(super) location: &'a TableLocation,
    pub(super) of: &'a TableSelection,
}

impl Statements<'_> {
    /// Returns a subquery that reads columns of a table in a version.
    fn read(&self, table: &str, version: u64, columns: &str, conditions: &[String], group: &str) -> String {
        let function = self.location.function(table);
        let conditions = conditions.join(" AND ");
        let group = if group.is_empty() { String::new() } else { format!(" GROUP BY {group}") };
        format!(
            "(SELECT {columns} FROM {function} WHERE {conditions}{group} SETTINGS delta_lake_snapshot_version = {version}, \
             allow_experimental_delta_kernel_rs = 1)"
        )
    }

    /// Returns the conditions on the partitions.
    fn partitions(&self) -> Vec<String> {
        let date = |ms: u64| {
            let at = jiff::Timestamp::from_millisecond(i64::try_from(ms).unwrap_or(i64::MAX));
            literal(&at.unwrap_or(jiff::Timestamp::MAX).strftime("%Y-%m-%d").to_string())
        };
        let TableSelection { from_ms, until_ms, .. } = self.of;
        vec![format!("date >= {} AND date <= {}", date(*from_ms), date(until_ms.saturating_sub(1)))]
    }

    fn times(&self) -> Vec<String> {
        let micros = |ms: u64| i64::try_from(ms.saturating_mul(1000)).unwrap_or(i64::MAX);
        let (from, until) = (micros(self.of.from_ms), micros(self.of.until_ms));
        let time =
            format!("time >= fromUnixTimestamp64Micro({from}) AND time < fromUnixTimestamp64Micro({until})");
        self.partitions().into_iter().chain([time]).collect()
    }

    fn service(&self) -> Option<String> {
        let conditions = self.of.conditions.iter().filter(|condition| condition.label == "service_name");
        let all: Vec<String> = conditions.map(Condition::of_profiles).collect();
        (!all.is_empty()).then(|| all.join(" AND "))
    }

    fn excluded(&self) -> Option<String> {
        let ids: Vec<String> = self.of.excluded.iter().map(Ulid::to_string).collect();
        (!ids.is_empty()).then(|| format!("profile_id NOT IN ({})", literals(ids.iter().map(String::as_str))))
    }

    fn of_profiles(&self) -> Vec<String> {
        let labels = self.of.conditions.iter().map(Condition::of_profiles);
        self.times().into_iter().chain(labels).chain(self.excluded()).collect()
    }

    /// Returns the statement for the kinds of profiles: sample types, name, profiles, first start, and the properties of their merge.
    pub(super) fn kinds(&self) -> String {
        let name = literal(super::PROFILE_NAME);
        let columns = format!(
            "arrayMap(type -> ifNull(type, ''), types) AS kind, ifNull(labels[{name}], '') AS name, toInt64(count()), \
             toInt64(ifNull(min(toUnixTimestamp64Milli(time)), 0)), groupUniqArray(2)(ifNull(period_type, '')), \
             toInt64(ifNull(max(period), 0)), toInt64(countIf(ifNull(time_nanos, 0) != 0)), \
             toInt64(ifNull(minIf(time_nanos, time_nanos != 0), 0)), \
             toInt64(ifNull(maxIf(time_nanos + duration_nanos, time_nanos != 0), 0)), toInt64(ifNull(max(duration_nanos), 0)), \
             arrayMap(comment -> ifNull(comment, ''), groupUniqArrayArray({MAX_COMMENTS})(comments))"
        );
        let read =
            self.read("profiles", self.of.versions.profiles, &columns, &self.of_profiles(), "kind, name");
        format!("SELECT * FROM {read} FORMAT RowBinary")
    }

    /// Returns the statement for the sums of a kind by stack and label set: whether the stack is missing, its frames, the id of a label
    /// set with these labels (0: none), and the sum of each type.
    pub(super) fn sums(&self, kind: Kind<'_>, limit: usize) -> String {
        let Kind { types, names, is_alone } = kind;
        let (rows, values) = if counts_first(types) {
            (&types[1..], vec!["sum(ifNull(count, 0))".to_owned(), "sum(ifNull(value, 0))".to_owned()])
        } else {
            let sum = |of: &String| format!("sumIf(ifNull(value, 0), type = {})", literal(of));
            (types, types.iter().map(sum).collect())
        };
        let mut conditions = self.times();
        conditions.push(
            Condition { label: "type".to_owned(), values: rows.to_vec(), is_negated: false }.sql("type"),
        );
        conditions.extend(self.of.conditions.iter().filter_map(Condition::of_samples));
        let has_columns = self.of.conditions.iter().all(|condition| condition.of_samples().is_some());
        if has_columns && is_alone {
            conditions.extend(self.excluded());
        } else {
            let mut of_profiles = self.of_profiles();
            let types = literals(types.iter().map(String::as_str));
            of_profiles.push(format!("arrayMap(type -> ifNull(type, ''), types) = [{types}]"));
            if let Some(names) = names {
                let label = super::PROFILE_NAME.to_owned();
                of_profiles
                    .push(Condition { label, values: names.to_vec(), is_negated: false }.of_profiles());
            }
            let ids = self.read("profiles", self.of.versions.profiles, "profile_id", &of_profiles, "");
            conditions.push(format!("profile_id IN {ids}"));
        }
        let (mut inner, mut outer) = (String::new(), String::new());
        for (number, value) in values.iter().enumerate() {
            let _ = write!(inner, ", toInt64({value}) AS v{number}");
            let _ = write!(outer, ", toInt64(sum(s.v{number}))");
        }
        let TableVersions { samples, stacks, labels, .. } = self.of.versions;
        let columns = format!("stack_id, labels_id{inner}");
        let sums = self.read("samples", samples, &columns, &conditions, "stack_id, labels_id");
        let within: Vec<String> = self.partitions().into_iter().chain(self.service()).collect();
        let stacks = self.read("stacks", stacks, "stack_id, stack_hash, frames", &within, "");
        let labels = self.read("labels", labels, "labels_id, labels_hash", &within, "");
        format!(
            "SELECT isNull(k.stack_hash), any(arrayMap(frame -> toInt64(ifNull(frame, 0)), k.frames)), \
             toInt64(ifNull(any(s.labels_id), 0)){outer} FROM {stacks} AS k RIGHT JOIN {sums} AS s ON k.stack_id = s.stack_id \
             LEFT JOIN {labels} AS l ON l.labels_id = s.labels_id GROUP BY k.stack_hash, l.labels_hash LIMIT {limit} \
             SETTINGS join_use_nulls = 1 FORMAT RowBinary"
        )
    }

    /// Returns the statement for frames by id.
    pub(super) fn frames(&self, ids: &[i64]) -> String {
        let columns = "toInt64(ifNull(frame_id, 0)), isNull(function), ifNull(function, '') AS f, ifNull(system_name, ''), ifNull(file, ''), \
                       ifNull(line, 0), ifNull(column, 0), ifNull(start_line, 0), ifNull(inlined, false) AS i, ifNull(address, 0), \
                       isNull(mapping_file), ifNull(mapping_file, '') AS m, ifNull(build_id, ''), ifNull(mapping_start, 0), \
                       ifNull(mapping_limit, 0), ifNull(mapping_offset, 0), ifNull(folded, false) AS fo";
        self.by_id("frames", self.of.versions.frames, "frame_id", columns, ids)
    }

    /// Returns the statement for label sets by id.
    pub(super) fn labels(&self, ids: &[i64]) -> String {
        let texts = |map: &str, to: &str| {
            format!(
                "arrayMap(key -> toString(key), mapKeys({map})), arrayMap(value -> {to}, mapValues({map}))"
            )
        };
        let columns = format!(
            "toInt64(ifNull(labels_id, 0)), {}, {}, {}",
            texts("texts", "ifNull(toString(value), '')"),
            texts("numbers", "toInt64(ifNull(value, 0))"),
            texts("units", "ifNull(toString(value), '')")
        );
        self.by_id("labels", self.of.versions.labels, "labels_id", &columns, ids)
    }

    fn by_id(&self, table: &str, version: u64, id: &str, columns: &str, ids: &[i64]) -> String {
        let ids: Vec<String> = ids.iter().map(i64::to_string).collect();
        let mut conditions = self.partitions();
        conditions.extend(self.service());
        conditions.push(format!("{id} IN ({})", ids.join(", ")));
        let read = self.read(table, version, columns, &conditions, "");
        format!("SELECT * FROM {read} FORMAT RowBinary")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case(&["samples/count", "cpu/nanoseconds"], true)]
    #[case(&["contentions/count", "objects/count"], false)]
    #[case(&["cpu/nanoseconds"], false)]
    #[case(&["a/count", "b/bytes", "c/bytes"], false)]
    fn only_the_first_of_two_types_counts(#[case] types: &[&str], #[case] counts: bool) {
        let types: Vec<String> = types.iter().map(|of| (*of).to_owned()).collect();
        assert_eq!(counts_first(&types), counts);
    }

    #[test]
    fn a_condition_without_values_holds_for_none() {
        let mut condition = Condition { label: "pod".to_owned(), values: Vec::new(), is_negated: false };
        assert_eq!(condition.of_profiles(), "false");
        condition.is_negated = true;
        assert_eq!(condition.of_samples().unwrap(), "true");
    }
}
