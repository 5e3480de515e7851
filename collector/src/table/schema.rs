//! The tables with their columns. `docs/storage.md` describes the same columns, and a test compares both.

use serde_json::{Value, json};

/// The content of a column, without the partition columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    Long,
    /// Microseconds since 1970, UTC.
    Time,
    Bool,
    /// 16 bytes of a hash.
    Hash,
    Longs,
    Texts,
    /// Texts by name.
    TextMap,
    /// Numbers by name.
    LongMap,
}

impl Kind {
    /// Returns the type in the schema of a Delta table.
    pub(super) fn delta(self) -> Value {
        let list = |of| json!({"type": "array", "elementType": of, "containsNull": false});
        let map =
            |of| json!({"type": "map", "keyType": "string", "valueType": of, "valueContainsNull": false});
        match self {
            Self::Text => json!("string"),
            Self::Long => json!("long"),
            Self::Time => json!("timestamp"),
            Self::Bool => json!("boolean"),
            Self::Hash => json!("binary"),
            Self::Longs => list("long"),
            Self::Texts => list("string"),
            Self::TextMap => map("string"),
            Self::LongMap => map("long"),
        }
    }

    /// Returns the field in the schema of a Parquet file.
    pub(super) fn parquet(self, name: &str, is_optional: bool) -> String {
        let repetition = if is_optional { "optional" } else { "required" };
        let list =
            |of| format!("required group {name} (LIST) {{ repeated group list {{ required {of}; }} }}");
        let map = |of| {
            format!(
                "required group {name} (MAP) {{ repeated group key_value {{ required binary key (STRING); required {of}; }} }}"
            )
        };
        match self {
            Self::Text => format!("{repetition} binary {name} (STRING);"),
            Self::Long => format!("{repetition} int64 {name};"),
            Self::Time => format!("{repetition} int64 {name} (TIMESTAMP(MICROS,true));"),
            Self::Bool => format!("{repetition} boolean {name};"),
            Self::Hash => format!("{repetition} binary {name};"),
            Self::Longs => list("int64 element"),
            Self::Texts => list("binary element (STRING)"),
            Self::TextMap => map("binary value (STRING)"),
            Self::LongMap => map("int64 value"),
        }
    }
}

/// A column of a table.
#[derive(Debug)]
pub(crate) struct Column {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// Rows may lack a value. Lists and maps are empty instead.
    pub(super) is_optional: bool,
    /// The log has the smallest and the largest value of each file, so that readers skip files.
    pub(super) has_range: bool,
    /// True if values mostly ascend from row to row. Files then hold their differences.
    pub(super) is_ascending: bool,
    pub(super) help: &'static str,
}

/// A table with its partition columns `date` and `hour`.
#[derive(Debug)]
pub(super) struct Schema {
    /// Name of the directory of the table.
    pub(super) name: &'static str,
    pub(super) columns: &'static [Column],
    /// Columns by which the rows of a file are sorted: texts by their bytes, and numbers.
    pub(super) order: &'static [&'static str],
    /// Columns that a merge adds up in rows which are equal but for these.
    pub(super) sums: &'static [&'static str],
}

/// Partition columns of all tables, with their types in Delta.
pub(super) const PARTITIONS: [(&str, &str, &str); 2] =
    [("date", "date", "Day of the start of the profile, UTC"), ("hour", "integer", "Hour of that day, UTC")];

impl Schema {
    /// Returns the schema of the Delta table, as its metadata holds it.
    pub(super) fn delta(&self) -> String {
        let comment = |help| json!({"comment": help});
        let partitions = PARTITIONS.map(
            |(name, kind, help)| json!({"name": name, "type": kind, "nullable": true, "metadata": comment(help)}),
        );
        let columns = self.columns.iter().map(|column| {
            json!({
                "name": column.name,
                "type": column.kind.delta(),
                "nullable": true,
                "metadata": comment(column.help),
            })
        });
        let fields: Vec<Value> = partitions.into_iter().chain(columns).collect();
        json!({"type": "struct", "fields": fields}).to_string()
    }

    /// Returns the schema of the Parquet files, in the language of Parquet.
    pub(super) fn parquet(&self) -> String {
        let fields: Vec<_> =
            self.columns.iter().map(|column| column.kind.parquet(column.name, column.is_optional)).collect();
        format!("message gannet {{ {} }}", fields.join(" "))
    }
}

const fn column(name: &'static str, kind: Kind, help: &'static str) -> Column {
    Column { name, kind, is_optional: false, has_range: false, is_ascending: false, help }
}

impl Column {
    const fn optional(self) -> Self {
        Self { is_optional: true, ..self }
    }

    const fn range(self) -> Self {
        Self { has_range: true, ..self }
    }

    const fn ascending(self) -> Self {
        Self { is_ascending: true, ..self }
    }
}

const SERVICE: Column =
    column("service_name", Kind::Text, "The profiled service; empty without the label").range();

/// One row for each sample of each profile.
pub(super) const SAMPLES: Schema = Schema {
    name: "samples",
    order: &["service_name", "type", "time", "profile_id", "stack_id"],
    sums: &[],
    columns: &[
        column("time", Kind::Time, "Start of the profile").range(),
        SERVICE,
        column("namespace", Kind::Text, "Label of the profile").optional(),
        column("pod", Kind::Text, "Label of the profile").optional(),
        column("container", Kind::Text, "Label of the profile").optional(),
        column("node", Kind::Text, "Label of the profile").optional(),
        column("profile_id", Kind::Text, "The profile, as `gannetctl profiles get` takes it"),
        column("type", Kind::Text, "Type and unit of `value`, like `cpu/nanoseconds`"),
        column("stack_id", Kind::Long, "The stack, in the table `stacks`").range().ascending(),
        column("labels_id", Kind::Long, "The labels of the sample, in the table `labels`; NULL: none")
            .optional(),
        column("value", Kind::Long, "The measured value"),
        column("count", Kind::Long, "Samples or events of the value; NULL: the profile does not count them")
            .optional(),
    ],
};

/// The guess of a sum that a deletion added up again: the samples have it only in their labels.
pub(super) const UNKNOWN_GUESS: i64 = -1;

/// Samples whose stacks rest on a guess have sums of their own, because flame graphs mark their frames.
const GUESSED_FROM: Column = column(
    "guessed_from",
    Kind::Long,
    "Index of the first location of the stack that the unwinder guessed, leaf first; 0: none; -1: unknown, since a deletion",
);

/// One row for each minute, service, type and stack.
pub(super) const MINUTES: Schema = Schema {
    name: "samples_by_minute",
    order: &["service_name", "type", "time", "stack_id", "guessed_from"],
    sums: &["value", "count"],
    columns: &[
        column("time", Kind::Time, "Start of the minute").range(),
        SERVICE,
        column("type", Kind::Text, "Type and unit of `value`, like `cpu/nanoseconds`"),
        column("stack_id", Kind::Long, "The stack, in the table `stacks`").range().ascending(),
        column("value", Kind::Long, "Sum of the measured values"),
        column("count", Kind::Long, "Sum of the samples or events; NULL: the profiles do not count them")
            .optional(),
        GUESSED_FROM,
    ],
};

/// One row for each hour, pod, service, type and stack.
pub(super) const HOURS: Schema = Schema {
    name: "samples_by_hour",
    order: &["service_name", "namespace", "pod", "type", "stack_id", "guessed_from"],
    sums: &["value", "count"],
    columns: &[
        SERVICE,
        column("namespace", Kind::Text, "Label of the profiles").optional(),
        column("pod", Kind::Text, "Label of the profiles").optional(),
        column("type", Kind::Text, "Type and unit of `value`, like `cpu/nanoseconds`"),
        column("stack_id", Kind::Long, "The stack, in the table `stacks`").range().ascending(),
        column("value", Kind::Long, "Sum of the measured values"),
        column("count", Kind::Long, "Sum of the samples or events; NULL: the profiles do not count them")
            .optional(),
        GUESSED_FROM,
    ],
};

/// One row for each profile.
pub(super) const PROFILES: Schema = Schema {
    name: "profiles",
    order: &["service_name", "time", "profile_id"],
    sums: &[],
    columns: &[
        column("time", Kind::Time, "Start of the profile").range(),
        SERVICE,
        column("profile_id", Kind::Text, "The profile, as `gannetctl profiles get` takes it"),
        column("labels", Kind::TextMap, "All labels of the profile"),
        column("duration_ms", Kind::Long, "Length of the profile in milliseconds"),
        column("rule_id", Kind::Text, "The rule that asked for the profile"),
        column("revision", Kind::Long, "Revision of the rules by then"),
        column("reason", Kind::Text, "Why the agent captured it"),
        column("types", Kind::Texts, "Types of the values of a sample, in the order of the pprof"),
        column("period_type", Kind::Text, "Type and unit of the period").optional(),
        column("period", Kind::Long, "Events between two samples"),
        column("time_nanos", Kind::Long, "Start by the clock of the node, in nanoseconds since 1970"),
        column("duration_nanos", Kind::Long, "Length by the pprof, in nanoseconds"),
        column("comments", Kind::Texts, "Comments of the pprof"),
    ],
};

/// One row for each stack of a service and hour.
pub(super) const STACKS: Schema = Schema {
    name: "stacks",
    order: &["service_name", "stack_id"],
    sums: &[],
    columns: &[
        column("stack_id", Kind::Long, "Number of the stack, of this table alone").range().ascending(),
        SERVICE,
        column(
            "stack_hash",
            Kind::Hash,
            "Hash of the frames: equal stacks of all hours and services have the same",
        ),
        column("frames", Kind::Longs, "The frames, in the table `frames`: leaf first"),
    ],
};

/// One row for each frame of a service and hour.
pub(super) const FRAMES: Schema = Schema {
    name: "frames",
    order: &["service_name", "frame_id"],
    sums: &[],
    columns: &[
        column("frame_id", Kind::Long, "Number of the frame, of this table alone").range().ascending(),
        SERVICE,
        column("frame_hash", Kind::Hash, "Hash of all columns that follow"),
        column("function", Kind::Text, "Demangled name; NULL: the address has no name").optional(),
        column("system_name", Kind::Text, "Name in the symbol table").optional(),
        column("file", Kind::Text, "Source file; empty: unknown").optional(),
        column("line", Kind::Long, "Line in the source file; 0: unknown"),
        column("column", Kind::Long, "Column in the source file; 0: unknown"),
        column("start_line", Kind::Long, "First line of the function; 0: unknown"),
        column(
            "inlined",
            Kind::Bool,
            "The function is inlined into that of the next frame, at the same address",
        ),
        column("address", Kind::Long, "Address in the process"),
        column("mapping_file", Kind::Text, "The mapped file, like `/usr/bin/shop`; NULL: no mapping")
            .optional(),
        column("build_id", Kind::Text, "Build id of the file in hex; empty: unknown").optional(),
        column("mapping_start", Kind::Long, "First address of the mapping"),
        column("mapping_limit", Kind::Long, "First address behind the mapping"),
        column("mapping_offset", Kind::Long, "Offset of the mapping in the file"),
        column("folded", Kind::Bool, "The address stands for several"),
    ],
};

/// One row for each set of sample labels of a service and hour.
pub(super) const LABELS: Schema = Schema {
    name: "labels",
    order: &["service_name", "labels_id"],
    sums: &[],
    columns: &[
        column("labels_id", Kind::Long, "Number of the label set, of this table alone").range().ascending(),
        SERVICE,
        column("labels_hash", Kind::Hash, "Hash of the labels"),
        column("texts", Kind::TextMap, "Labels with a text, like `thread`"),
        column("numbers", Kind::LongMap, "Labels with a number, like `tid`"),
        column("units", Kind::TextMap, "Units of those numbers that have one"),
    ],
};

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that the page describes each table with the columns, types and texts of this module.
    #[test]
    fn the_page_describes_every_column() {
        let page = include_str!("../../../docs/storage.md");
        for schema in [&SAMPLES, &MINUTES, &HOURS, &PROFILES, &STACKS, &FRAMES, &LABELS] {
            let title = format!("### {}\n", schema.name);
            let start = page.find(&title).unwrap_or_else(|| panic!("no section {title}"));
            let section = page[start..].split("\n### ").next().unwrap();
            for column in schema.columns {
                let kind = match column.kind {
                    Kind::Text => "string",
                    Kind::Long => "long",
                    Kind::Time => "timestamp",
                    Kind::Bool => "boolean",
                    Kind::Hash => "binary",
                    Kind::Longs => "array of long",
                    Kind::Texts => "array of string",
                    Kind::TextMap => "map of string to string",
                    Kind::LongMap => "map of string to long",
                };
                let row = format!("| `{}` | {kind} | {} |", column.name, column.help);
                assert!(section.contains(&row), "{}: the page lacks {row}", schema.name);
            }
        }
    }
}
