//! Writing a profile from scratch.

use super::graph::{FunctionKey, Graph, Head, LabelKey, LineKey, LocationKey, MappingKey, SampleKey};
use crate::profiles::Profile;

/// What a profile says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header<'a> {
    /// `(type, unit)` of each value: `[("samples", "count"), ("cpu", "nanoseconds")]`.
    pub sample_types: &'a [(&'a str, &'a str)],
    /// What is counted to decide when to sample.
    pub period_type: (&'a str, &'a str),
    /// How much of it lies between two samples.
    pub period: i64,
    /// The start, in nanoseconds since 1970.
    pub time_nanos: i64,
    /// The true length.
    pub duration_nanos: i64,
}

/// A mapped file. `file` is as the process sees it, or `[vdso]`, `[kernel.kallsyms]`, `[anon]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapping<'a> {
    /// The first address.
    pub start: u64,
    /// Behind the last address.
    pub limit: u64,
    /// Of `start`, in the file.
    pub offset: u64,
    /// The file's name.
    pub file: &'a str,
    /// Lower-case hex.
    pub build_id: &'a str,
}

/// One function at a location; several where functions are inlined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Line<'a> {
    /// Demangled.
    pub name: &'a str,
    /// As in the symbol table.
    pub system_name: &'a str,
    /// The source file; empty if unknown.
    pub file: &'a str,
    /// 0 if unknown.
    pub line: i64,
    /// 0 if unknown.
    pub column: i64,
    /// Where the function begins; 0 if unknown.
    pub start_line: i64,
}

/// What a sample is marked with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label<'a> {
    /// Its name.
    pub key: &'a str,
    /// Its value.
    pub value: LabelValue<'a>,
}

/// Text, or a number with its unit (which may be empty).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LabelValue<'a> {
    /// Text.
    Str(&'a str),
    /// A number and its unit.
    Num(i64, &'a str),
}

/// A mapping of the builder that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MappingId(u32);

/// A location of the builder that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LocationId(u32);

/// Collects a profile. Equal mappings, functions, locations, and samples are kept once; the order in which things are
/// added does not show in the result, except for that of the comments.
pub struct Builder {
    graph: Graph,
    head: Head,
    main: Option<u32>,
}

impl Builder {
    /// An empty profile.
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

    /// Adds a mapping, or finds it.
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

    /// Puts this mapping first, where readers look for the main program.
    pub fn main_mapping(&mut self, mapping: MappingId) {
        self.main = Some(mapping.0);
    }

    /// Adds a location, or finds it. `lines` has the innermost function first; it is empty where there are no symbols.
    pub fn location(&mut self, mapping: Option<MappingId>, address: u64, lines: &[Line<'_>]) -> LocationId {
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
            folded: false,
        }))
    }

    /// Adds a sample: its stack, leaf first, and one value for each sample type. Samples with the same stack and
    /// labels are added up. Of labels with the same key the first counts.
    pub fn sample(&mut self, stack: &[LocationId], values: &[i64], labels: &[Label<'_>]) {
        let strings = &mut self.graph.strings;
        let mut keys: Vec<LabelKey> = Vec::with_capacity(labels.len());
        for Label { key, value } in labels {
            let key = strings.number(key);
            if keys.iter().any(|have| have.key == key) {
                continue;
            }
            keys.push(match value {
                // The format knows no difference between the empty text and the number 0.
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

    /// Adds a line of comment.
    pub fn comment(&mut self, line: &str) {
        self.head.comments.push(line.to_owned());
    }

    /// The profile.
    pub fn finish(self) -> Profile {
        self.graph.finish(&self.head, self.main)
    }
}
