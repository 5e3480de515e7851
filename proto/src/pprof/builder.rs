//! The builder of new profiles.

use super::graph::{FunctionKey, Graph, Head, LabelKey, LineKey, LocationKey, MappingKey, SampleKey};
use crate::profiles::Profile;

/// Properties of a whole profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header<'a> {
    /// Type and unit of each value: `[("samples", "count"), ("cpu", "nanoseconds")]`.
    pub sample_types: &'a [(&'a str, &'a str)],
    /// Type and unit of the events between two samples.
    pub period_type: (&'a str, &'a str),
    /// Number of events between two samples.
    pub period: i64,
    /// Start in nanoseconds since 1970.
    pub time_nanos: i64,
    /// Length of the measured time.
    pub duration_nanos: i64,
}

/// A mapped file, or another range of addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapping<'a> {
    /// First address of the mapping.
    pub start: u64,
    /// First address behind the mapping.
    pub limit: u64,
    /// Offset of `start` in the file.
    pub offset: u64,
    /// Path as the process sees it, or `[vdso]`, `[kernel.kallsyms]`, `[anon]`.
    pub file: &'a str,
    /// Build id in lower-case hex; empty if unknown.
    pub build_id: &'a str,
}

/// A function at a location. A location has several if functions are inlined there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Line<'a> {
    /// Demangled name of the function.
    pub name: &'a str,
    /// Name in the symbol table.
    pub system_name: &'a str,
    /// Source file; empty if unknown.
    pub file: &'a str,
    /// Line in the source file; 0 if unknown.
    pub line: i64,
    /// Column in the source file; 0 if unknown.
    pub column: i64,
    /// First line of the function; 0 if unknown.
    pub start_line: i64,
}

/// A label of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label<'a> {
    /// Key of the label.
    pub key: &'a str,
    /// Value of the label.
    pub value: LabelValue<'a>,
}

/// A text, or a number with its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LabelValue<'a> {
    /// A text without a unit.
    Str(&'a str),
    /// A number and its unit, which may be empty.
    Num(i64, &'a str),
}

/// Handle of a mapping, valid for the builder that returned it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MappingId(u32);

/// Handle of a location, valid for the builder that returned it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LocationId(u32);

/// Builds a profile. It stores equal mappings, functions, locations and samples once. The result does not depend on the
/// order of additions, except for comments.
pub struct Builder {
    graph: Graph,
    head: Head,
    main: Option<u32>,
}

impl Builder {
    /// Starts an empty profile.
    pub fn new(header: Header<'_>) -> Self {
        let Header { sample_types, period_type, period, time_nanos, duration_nanos } = header;
        let owned = |(kind, unit): &(&str, &str)| ((*kind).to_owned(), (*unit).to_owned());
        let head = Head {
            sample_types: sample_types.iter().map(owned).collect(),
            period_type: owned(&period_type),
            period,
            time_nanos,
            duration_nanos,
            ..Head::default()
        };
        Self { graph: Graph::default(), head, main: None }
    }

    /// Adds a mapping, or returns the handle of an equal one.
    pub fn mapping(&mut self, mapping: Mapping<'_>) -> MappingId {
        let Mapping { start, limit, offset, file, build_id } = mapping;
        let key = MappingKey {
            file: self.graph.strings.number(file),
            build_id: self.graph.strings.number(build_id),
            start,
            limit,
            offset,
        };
        MappingId(self.graph.mappings.number(key))
    }

    /// Marks the mapping of the main program, which pprof readers expect first.
    pub fn main_mapping(&mut self, mapping: MappingId) {
        self.main = Some(mapping.0);
    }

    /// Adds a location, or returns the handle of an equal one. `lines` has the innermost function first and is empty
    /// without symbols.
    pub fn location(&mut self, mapping: Option<MappingId>, address: u64, lines: &[Line<'_>]) -> LocationId {
        self.add_location(mapping, address, lines, false)
    }

    /// Adds a location that stands for several addresses, like [`Builder::location`].
    pub fn folded_location(
        &mut self,
        mapping: Option<MappingId>,
        address: u64,
        lines: &[Line<'_>],
    ) -> LocationId {
        self.add_location(mapping, address, lines, true)
    }

    fn add_location(
        &mut self,
        mapping: Option<MappingId>,
        address: u64,
        lines: &[Line<'_>],
        folded: bool,
    ) -> LocationId {
        let Graph { strings, functions, locations, .. } = &mut self.graph;
        let lines = lines
            .iter()
            .map(|Line { name, system_name, file, line, column, start_line }| {
                let function = FunctionKey {
                    name: strings.number(name),
                    system_name: strings.number(system_name),
                    file: strings.number(file),
                    start_line: *start_line,
                };
                LineKey { function: functions.number(function), line: *line, column: *column }
            })
            .collect();
        LocationId(locations.number(LocationKey {
            mapping: mapping.map(|mapping| mapping.0),
            address,
            lines,
            folded,
        }))
    }

    /// Adds a sample: its stack, leaf first, and one value for each sample type. Adds up samples with equal stacks and
    /// labels. Ignores a label whose key an earlier label has.
    pub fn sample(&mut self, stack: &[LocationId], values: &[i64], labels: &[Label<'_>]) {
        let strings = &mut self.graph.strings;
        let mut keys: Vec<LabelKey> = Vec::with_capacity(labels.len());
        for Label { key, value } in labels {
            let key = strings.number(key);
            if keys.iter().any(|have| have.key == key) {
                continue;
            }
            keys.push(match value {
                // The format does not distinguish the empty text from the number 0.
                LabelValue::Str(text) => LabelKey {
                    key,
                    text: (!text.is_empty()).then(|| strings.number(text)),
                    number: 0,
                    unit: strings.number(""),
                },
                LabelValue::Num(number, unit) => {
                    LabelKey { key, text: None, number: *number, unit: strings.number(unit) }
                }
            });
        }
        keys.sort_unstable_by_key(|label| label.key);
        let key = SampleKey { stack: stack.iter().map(|location| location.0).collect(), labels: keys.into() };
        self.graph.sample(key, self.head.sample_types.len(), values.iter().copied());
    }

    /// Adds a comment line.
    pub fn comment(&mut self, line: &str) {
        self.head.comments.push(line.to_owned());
    }

    /// Returns the profile.
    pub fn finish(self) -> Profile {
        self.graph.finish(&self.head, self.main)
    }
}
