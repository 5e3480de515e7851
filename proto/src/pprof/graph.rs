//! The content of a profile, identified by value instead of by id. Equal parts exist once, and the written profile
//! depends only on the content. The builder and the merger both fill a [`Graph`].

use std::{collections::BTreeSet, hash::Hash};

// Profiles are tables of equal parts: most of the time of building one is hashing. This hash is seeded at random like the one
// of std, so that names chosen by a target do not collide, and is made for such short keys.
use foldhash::{HashMap, HashMapExt};

use crate::profiles::{self, Profile, ValueType};

/// Numbers distinct values in the order in which they were added.
pub(super) struct Table<T> {
    by_content: HashMap<T, u32>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { by_content: HashMap::new() }
    }
}

impl<T: Hash + Eq> Table<T> {
    /// Returns the number of a value. It has 32 bits to halve the size of stacks; more values do not fit into memory.
    pub(super) fn number(&mut self, content: T) -> u32 {
        let next = self.by_content.len() as u32;
        *self.by_content.entry(content).or_insert(next)
    }

    pub(super) fn len(&self) -> usize {
        self.by_content.len()
    }

    /// Returns all values, by number.
    pub(super) fn in_order(&self) -> Vec<&T> {
        let mut all: Vec<_> = self.by_content.iter().collect();
        all.sort_unstable_by_key(|(_, number)| **number);
        all.into_iter().map(|(content, _)| content).collect()
    }
}

/// Numbers distinct strings, and allocates only for new ones.
#[derive(Default)]
pub(super) struct Strings {
    table: HashMap<Box<str>, u32>,
}

impl Strings {
    pub(super) fn number(&mut self, text: &str) -> u32 {
        if let Some(number) = self.table.get(text) {
            return *number;
        }
        let next = self.table.len() as u32;
        self.table.insert(text.into(), next);
        next
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// Returns all strings, by number.
    pub(super) fn in_order(&self) -> Vec<&str> {
        let mut all: Vec<_> = self.table.iter().collect();
        all.sort_unstable_by_key(|(_, number)| **number);
        all.into_iter().map(|(text, _)| &**text).collect()
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct MappingKey {
    pub(super) file: u32,
    pub(super) build_id: u32,
    pub(super) start: u64,
    pub(super) limit: u64,
    pub(super) offset: u64,
}

#[derive(PartialEq, Eq, Hash)]
pub(super) struct FunctionKey {
    pub(super) name: u32,
    pub(super) system_name: u32,
    pub(super) file: u32,
    pub(super) start_line: i64,
}

impl FunctionKey {
    /// Returns the key of a function of a checked profile. `text` numbers its strings by their index.
    pub(super) fn of(function: &profiles::Function, text: impl Fn(i64) -> u32) -> Self {
        Self {
            name: text(function.name),
            system_name: text(function.system_name),
            file: text(function.filename),
            start_line: function.start_line,
        }
    }
}

#[derive(PartialEq, Eq, Hash)]
pub(super) struct LineKey {
    pub(super) function: u32,
    pub(super) line: i64,
    pub(super) column: i64,
}

#[derive(PartialEq, Eq, Hash)]
pub(super) struct LocationKey {
    pub(super) mapping: Option<u32>,
    pub(super) address: u64,
    pub(super) lines: Box<[LineKey]>,
    pub(super) folded: bool,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct LabelKey {
    pub(super) key: u32,
    /// Number of the text; `None` for a numeric label.
    pub(super) text: Option<u32>,
    pub(super) number: i64,
    pub(super) unit: u32,
}

impl LabelKey {
    /// Returns the labels of a sample of a checked profile, sorted by key. `text` numbers its strings by their index.
    pub(super) fn all_of(sample: &profiles::Sample, text: impl Fn(i64) -> u32) -> Vec<Self> {
        let labels = sample.label.iter().map(|label| Self {
            key: text(label.key),
            text: (label.str != 0).then(|| text(label.str)),
            number: label.num,
            unit: text(label.num_unit),
        });
        let mut labels: Vec<Self> = labels.collect();
        labels.sort_unstable_by_key(|label| label.key);
        labels
    }
}

#[derive(PartialEq, Eq, Hash)]
pub(super) struct SampleKey {
    pub(super) stack: Box<[u32]>,
    /// Sorted by key number, each key once.
    pub(super) labels: Box<[LabelKey]>,
}

/// Statements of a profile about the symbols of a mapping.
#[derive(Clone, Copy, Default)]
pub(super) struct Flags {
    pub(super) functions: bool,
    pub(super) filenames: bool,
    pub(super) line_numbers: bool,
    pub(super) inline_frames: bool,
}

#[derive(Default)]
pub(super) struct Graph {
    pub(super) strings: Strings,
    pub(super) mappings: Table<MappingKey>,
    /// Statements of the merged profiles, in addition to those that follow from the locations.
    pub(super) claimed: HashMap<u32, Flags>,
    pub(super) functions: Table<FunctionKey>,
    pub(super) locations: Table<LocationKey>,
    samples: Table<SampleKey>,
    /// Values of all samples, one for each sample type.
    values: Vec<i64>,
}

/// Properties of a profile, without its samples.
#[derive(Clone, Default)]
pub(super) struct Head {
    pub(super) sample_types: Vec<(String, String)>,
    pub(super) default_sample_type: String,
    pub(super) period_type: (String, String),
    pub(super) period: i64,
    pub(super) time_nanos: i64,
    pub(super) duration_nanos: i64,
    pub(super) comments: Vec<String>,
    pub(super) doc_url: String,
}

impl Graph {
    /// Adds `width` values to the sample with this stack and labels. Missing values are 0.
    pub(super) fn sample(&mut self, key: SampleKey, width: usize, values: impl Iterator<Item = i64>) {
        let row = self.samples.number(key) as usize * width;
        if self.values.len() < row + width {
            self.values.resize(row + width, 0);
        }
        for (sum, value) in self.values[row..row + width].iter_mut().zip(values) {
            *sum = sum.saturating_add(value);
        }
    }

    /// Writes the profile in an order that depends only on the content. Leaves out locations and functions without
    /// samples. Mappings stay, because the first one names the main program.
    pub(super) fn finish(self, head: &Head, main: Option<u32>) -> Profile {
        let width = head.sample_types.len();
        let sorted = Sorted::new(&self, main);
        let Used { locations: used_locations, functions: used_functions, flags } = Used::new(&self, &sorted);
        let Sorted { strings, mappings, functions, locations, samples } = sorted;

        let mut out = Out::new();
        let mut profile = Profile {
            sample_type: head.sample_types.iter().map(|kind| out.value_type(kind)).collect(),
            period_type: (!head.period_type.0.is_empty()).then(|| out.value_type(&head.period_type)),
            period: head.period,
            time_nanos: head.time_nanos,
            duration_nanos: head.duration_nanos,
            default_sample_type: out.string(&head.default_sample_type),
            doc_url: out.string(&head.doc_url),
            comment: head.comments.iter().map(|comment| out.string(comment)).collect(),
            ..Profile::default()
        };
        let text = |out: &mut Out, number: u32| out.string(strings[number as usize]);

        let mut mapping_ids = vec![0; mappings.list.len()];
        for (position, number) in mappings.order.into_iter().enumerate() {
            let id = position as u64 + 1;
            mapping_ids[number] = id;
            let MappingKey { file, build_id, start, limit, offset } = mappings.list[number];
            let Flags { functions, filenames, line_numbers, inline_frames } = flags[number];
            profile.mapping.push(profiles::Mapping {
                id,
                memory_start: *start,
                memory_limit: *limit,
                file_offset: *offset,
                filename: text(&mut out, *file),
                build_id: text(&mut out, *build_id),
                has_functions: functions,
                has_filenames: filenames,
                has_line_numbers: line_numbers,
                has_inline_frames: inline_frames,
            });
        }
        let mut function_ids = vec![0; functions.list.len()];
        for number in functions.order.into_iter().filter(|number| used_functions[*number]) {
            let id = profile.function.len() as u64 + 1;
            function_ids[number] = id;
            let FunctionKey { name, system_name, file, start_line } = functions.list[number];
            profile.function.push(profiles::Function {
                id,
                name: text(&mut out, *name),
                system_name: text(&mut out, *system_name),
                filename: text(&mut out, *file),
                start_line: *start_line,
            });
        }
        let mut location_ids = vec![0; locations.list.len()];
        for number in locations.order.into_iter().filter(|number| used_locations[*number]) {
            let id = profile.location.len() as u64 + 1;
            location_ids[number] = id;
            let LocationKey { mapping, address, lines, folded } = locations.list[number];
            let line = |line: &LineKey| profiles::Line {
                function_id: function_ids[line.function as usize],
                line: line.line,
                column: line.column,
            };
            profile.location.push(profiles::Location {
                id,
                mapping_id: mapping.map_or(0, |mapping| mapping_ids[mapping as usize]),
                address: *address,
                line: lines.iter().map(line).collect(),
                is_folded: *folded,
            });
        }
        for number in samples.order {
            let (sample, labels) = &samples.list[number];
            let label = |label: &&LabelKey| profiles::Label {
                key: text(&mut out, label.key),
                str: label.text.map_or(0, |number| text(&mut out, number)),
                num: label.number,
                num_unit: text(&mut out, label.unit),
            };
            profile.sample.push(profiles::Sample {
                location_id: sample.stack.iter().map(|location| location_ids[*location as usize]).collect(),
                value: self.values[number * width..(number + 1) * width].to_vec(),
                label: labels.iter().map(label).collect(),
            });
        }
        profile.string_table = out.strings;
        profile
    }
}

/// Values by number, with the order in which they are written.
struct InOrder<T> {
    list: Vec<T>,
    order: Vec<usize>,
}

/// All parts of a graph, each with an order that depends only on the content.
struct Sorted<'g> {
    strings: Vec<&'g str>,
    mappings: InOrder<&'g MappingKey>,
    functions: InOrder<&'g FunctionKey>,
    locations: InOrder<&'g LocationKey>,
    /// Samples with their labels sorted by text.
    samples: InOrder<(&'g SampleKey, Vec<&'g LabelKey>)>,
}

impl<'g> Sorted<'g> {
    fn new(graph: &'g Graph, main: Option<u32>) -> Self {
        let strings = graph.strings.in_order();
        // All further comparisons use ranks instead of texts, so texts are compared only here.
        let string_rank = ranks(strings.len(), |a, b| strings[a].cmp(strings[b])).0;
        let rank_of = |number: u32| string_rank[number as usize];

        let mappings = graph.mappings.in_order();
        let (mapping_rank, mapping_order) = ranks(mappings.len(), |a, b| {
            let key = |i: usize| {
                let MappingKey { file, build_id, start, limit, offset } = mappings[i];
                (main != Some(i as u32), rank_of(*file), *start, *limit, *offset, rank_of(*build_id))
            };
            key(a).cmp(&key(b))
        });
        let functions = graph.functions.in_order();
        let (function_rank, function_order) = ranks(functions.len(), |a, b| {
            let key = |i: usize| {
                let FunctionKey { name, system_name, file, start_line } = functions[i];
                (rank_of(*name), rank_of(*system_name), rank_of(*file), *start_line)
            };
            key(a).cmp(&key(b))
        });
        let locations = graph.locations.in_order();
        let (location_rank, location_order) = ranks(locations.len(), |a, b| {
            let (a, b) = (locations[a], locations[b]);
            let address =
                |l: &LocationKey| (l.mapping.map(|m| mapping_rank[m as usize]), l.address, l.folded);
            let line = |l: &LineKey| (function_rank[l.function as usize], l.line, l.column);
            address(a).cmp(&address(b)).then_with(|| a.lines.iter().map(line).cmp(b.lines.iter().map(line)))
        });
        let label = |l: &LabelKey| (rank_of(l.key), l.text.map(rank_of), l.number, rank_of(l.unit));
        // A sample key has its labels in the order of key numbers, which is the order of arrival.
        let samples: Vec<(&SampleKey, Vec<&LabelKey>)> = graph
            .samples
            .in_order()
            .into_iter()
            .map(|sample| {
                let mut labels: Vec<_> = sample.labels.iter().collect();
                labels.sort_unstable_by_key(|l| label(l));
                (sample, labels)
            })
            .collect();
        let (_, sample_order) = ranks(samples.len(), |a, b| {
            let stack = |i: usize| samples[i].0.stack.iter().map(|l| location_rank[*l as usize]);
            let labels = |i: usize| samples[i].1.iter().map(|l| label(l));
            stack(a).cmp(stack(b)).then_with(|| labels(a).cmp(labels(b)))
        });
        Self {
            strings,
            mappings: InOrder { list: mappings, order: mapping_order },
            functions: InOrder { list: functions, order: function_order },
            locations: InOrder { list: locations, order: location_order },
            samples: InOrder { list: samples, order: sample_order },
        }
    }
}

/// The parts of a graph that its samples use, by number.
struct Used {
    locations: Vec<bool>,
    functions: Vec<bool>,
    /// Symbol flags of each mapping, from the used locations and from merged profiles.
    flags: Vec<Flags>,
}

impl Used {
    fn new(graph: &Graph, sorted: &Sorted<'_>) -> Self {
        let Sorted { strings, mappings, functions, locations, samples } = sorted;
        let mut used_locations = vec![false; locations.list.len()];
        for (sample, _) in &samples.list {
            for location in &sample.stack {
                used_locations[*location as usize] = true;
            }
        }
        let mut used_functions = vec![false; functions.list.len()];
        let mut flags: Vec<Flags> = (0..mappings.list.len() as u32)
            .map(|mapping| graph.claimed.get(&mapping).copied().unwrap_or_default())
            // Each frame has all the names that the agent found in the file that ran. `go tool pprof` would name those of other
            // mappings again, from the file that stands at the path by then.
            .map(|flags| Flags { functions: true, ..flags })
            .collect();
        for (location, _) in locations.list.iter().zip(&used_locations).filter(|(_, used)| **used) {
            for line in &location.lines {
                used_functions[line.function as usize] = true;
            }
            if let Some(flags) = location.mapping.and_then(|mapping| flags.get_mut(mapping as usize)) {
                let has_file = |line: &LineKey| {
                    !strings[functions.list[line.function as usize].file as usize].is_empty()
                };
                flags.filenames |= location.lines.iter().any(has_file);
                flags.line_numbers |= location.lines.iter().any(|line| line.line > 0);
                flags.inline_frames |= location.lines.len() > 1;
            }
        }
        Self { locations: used_locations, functions: used_functions, flags }
    }
}

/// Sorts numbers. Returns the rank of each number, and the numbers by rank.
fn ranks(len: usize, mut compare: impl FnMut(usize, usize) -> std::cmp::Ordering) -> (Vec<u32>, Vec<usize>) {
    let mut order: Vec<usize> = (0..len).collect();
    order.sort_unstable_by(|a, b| compare(*a, *b));
    let mut rank = vec![0; len];
    for (position, number) in order.iter().enumerate() {
        rank[*number] = position as u32;
    }
    (rank, order)
}

/// The string table of the written profile, in the order of first use.
struct Out {
    strings: Vec<String>,
    numbers: HashMap<String, i64>,
}

impl Out {
    fn new() -> Self {
        Self { strings: vec![String::new()], numbers: HashMap::from_iter([(String::new(), 0)]) }
    }

    fn string(&mut self, text: &str) -> i64 {
        if let Some(number) = self.numbers.get(text) {
            return *number;
        }
        let number = self.strings.len() as i64;
        self.strings.push(text.to_owned());
        self.numbers.insert(text.to_owned(), number);
        number
    }

    fn value_type(&mut self, (kind, unit): &(String, String)) -> ValueType {
        ValueType { r#type: self.string(kind), unit: self.string(unit) }
    }
}

/// The distinct comment lines of all merged profiles. A store may have thousands of profiles, each with its own ledger in
/// a comment. So only the first lines in order stay, and a last line reports that others are missing.
#[derive(Default)]
pub(super) struct Comments {
    lines: BTreeSet<String>,
    cut: bool,
}

impl Comments {
    const MAX_LINES: usize = 1024;

    pub(super) fn add(&mut self, line: &str) {
        if !line.is_empty() && !self.lines.contains(line) {
            self.lines.insert(line.to_owned());
            if self.lines.len() > Self::MAX_LINES {
                self.lines.pop_last();
                self.cut = true;
            }
        }
    }

    pub(super) fn finish(self) -> Vec<String> {
        let mut lines: Vec<_> = self.lines.into_iter().collect();
        if self.cut {
            lines.push(format!(
                "[more than {} comments in the merged profiles: the others are left out]",
                Self::MAX_LINES
            ));
        }
        lines
    }
}

impl Graph {
    /// Returns the mapping with the highest count; among equals the first by name and address.
    pub(super) fn most_common_mapping(&self, counts: &HashMap<u32, u64>) -> Option<u32> {
        let max = counts.values().max()?;
        let texts: HashMap<u32, &str> =
            self.strings.table.iter().map(|(text, number)| (*number, &**text)).collect();
        self.mappings
            .by_content
            .iter()
            .filter(|(_, number)| counts.get(number) == Some(max))
            .min_by_key(|(key, _)| {
                let MappingKey { file, build_id, start, limit, offset } = key;
                (texts.get(file), *start, *limit, *offset, texts.get(build_id))
            })
            .map(|(_, number)| *number)
    }
}
