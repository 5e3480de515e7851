//! A profile's content without numbers: everything is known by what it is, so equal things exist once, and what is
//! written depends only on the content. The builder and the merger both fill one of these.

use std::{
    collections::{BTreeSet, HashMap},
    hash::Hash,
};

use crate::profiles::{self, Profile, ValueType};

/// Things by content, numbered in the order in which they came.
pub(super) struct Table<T> {
    by_content: HashMap<T, u32>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { by_content: HashMap::new() }
    }
}

impl<T: Hash + Eq> Table<T> {
    /// Numbers are 32 bits wide to halve the stacks; four thousand million different things do not fit in memory.
    pub(super) fn number(&mut self, content: T) -> u32 {
        let next = self.by_content.len() as u32;
        *self.by_content.entry(content).or_insert(next)
    }

    fn in_order(&self) -> Vec<&T> {
        let mut all: Vec<_> = self.by_content.iter().collect();
        all.sort_unstable_by_key(|(_, number)| **number);
        all.into_iter().map(|(content, _)| content).collect()
    }
}

/// Strings, stored once.
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
    /// Of a text label.
    pub(super) text: Option<u32>,
    pub(super) number: i64,
    pub(super) unit: u32,
}

#[derive(PartialEq, Eq, Hash)]
pub(super) struct SampleKey {
    pub(super) stack: Box<[u32]>,
    /// Sorted by key number, each key once.
    pub(super) labels: Box<[LabelKey]>,
}

/// What a mapping's readers are told about its symbols.
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
    /// Claimed by the profiles that were merged; added to what the locations show.
    pub(super) claimed: HashMap<u32, Flags>,
    pub(super) functions: Table<FunctionKey>,
    pub(super) locations: Table<LocationKey>,
    samples: Table<SampleKey>,
    /// `width` for each sample.
    values: Vec<i64>,
}

/// What a profile says about itself, apart from its samples.
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
    /// Adds up what has the same stack and labels. `width` values are taken, missing ones are 0.
    pub(super) fn sample(&mut self, key: SampleKey, width: usize, values: impl Iterator<Item = i64>) {
        let row = self.samples.number(key) as usize * width;
        if self.values.len() < row + width {
            self.values.resize(row + width, 0);
        }
        for (sum, value) in self.values[row..row + width].iter_mut().zip(values) {
            *sum = sum.saturating_add(value);
        }
    }

    /// Writes everything in an order that depends on the content alone. Locations and functions that no sample uses
    /// are left out; mappings stay, since the first names the main program.
    pub(super) fn finish(self, head: &Head, main: Option<u32>) -> Profile {
        let width = head.sample_types.len();
        let strings = {
            let mut all: Vec<_> = self.strings.table.iter().collect();
            all.sort_unstable_by_key(|(_, number)| **number);
            all.into_iter().map(|(text, _)| &**text).collect::<Vec<&str>>()
        };
        // Comparing ranks instead of texts: each text is compared with its neighbours once, here.
        let string_rank = ranks(strings.len(), |a, b| strings[a].cmp(strings[b])).0;
        let rank_of = |number: u32| string_rank[number as usize];

        let mappings = self.mappings.in_order();
        let (mapping_rank, mapping_order) = ranks(mappings.len(), |a, b| {
            let key = |i: usize| {
                let MappingKey { file, build_id, start, limit, offset } = mappings[i];
                (main != Some(i as u32), rank_of(*file), *start, *limit, *offset, rank_of(*build_id))
            };
            key(a).cmp(&key(b))
        });
        let functions = self.functions.in_order();
        let (function_rank, function_order) = ranks(functions.len(), |a, b| {
            let key = |i: usize| {
                let FunctionKey { name, system_name, file, start_line } = functions[i];
                (rank_of(*name), rank_of(*system_name), rank_of(*file), *start_line)
            };
            key(a).cmp(&key(b))
        });
        let locations = self.locations.in_order();
        let (location_rank, location_order) = ranks(locations.len(), |a, b| {
            let (a, b) = (locations[a], locations[b]);
            let place = |l: &LocationKey| (l.mapping.map(|m| mapping_rank[m as usize]), l.address, l.folded);
            let line = |l: &LineKey| (function_rank[l.function as usize], l.line, l.column);
            place(a).cmp(&place(b)).then_with(|| a.lines.iter().map(line).cmp(b.lines.iter().map(line)))
        });
        let label = |l: &LabelKey| (rank_of(l.key), l.text.map(rank_of), l.number, rank_of(l.unit));
        // Label sets are sorted by key number, which is the order of arrival: by text from here on.
        let samples: Vec<(&SampleKey, Vec<&LabelKey>)> = self
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

        let mut used = vec![false; locations.len()];
        for (sample, _) in &samples {
            for location in &sample.stack {
                used[*location as usize] = true;
            }
        }
        let mut used_functions = vec![false; functions.len()];
        let mut flags: Vec<Flags> = (0..mappings.len() as u32)
            .map(|mapping| self.claimed.get(&mapping).copied().unwrap_or_default())
            .collect();
        for (location, _) in locations.iter().zip(&used).filter(|(_, used)| **used) {
            for line in &location.lines {
                used_functions[line.function as usize] = true;
            }
            if let Some(flags) = location.mapping.and_then(|mapping| flags.get_mut(mapping as usize)) {
                flags.functions |= !location.lines.is_empty();
                flags.filenames |= location
                    .lines
                    .iter()
                    .any(|line| !strings[functions[line.function as usize].file as usize].is_empty());
                flags.line_numbers |= location.lines.iter().any(|line| line.line > 0);
                flags.inline_frames |= location.lines.len() > 1;
            }
        }

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

        let mut mapping_ids = vec![0; mappings.len()];
        for (position, number) in mapping_order.into_iter().enumerate() {
            let id = position as u64 + 1;
            mapping_ids[number] = id;
            let MappingKey { file, build_id, start, limit, offset } = mappings[number];
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
        let mut function_ids = vec![0; functions.len()];
        for number in function_order.into_iter().filter(|number| used_functions[*number]) {
            let id = profile.function.len() as u64 + 1;
            function_ids[number] = id;
            let FunctionKey { name, system_name, file, start_line } = functions[number];
            profile.function.push(profiles::Function {
                id,
                name: text(&mut out, *name),
                system_name: text(&mut out, *system_name),
                filename: text(&mut out, *file),
                start_line: *start_line,
            });
        }
        let mut location_ids = vec![0; locations.len()];
        for number in location_order.into_iter().filter(|number| used[*number]) {
            let id = profile.location.len() as u64 + 1;
            location_ids[number] = id;
            let LocationKey { mapping, address, lines, folded } = locations[number];
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
        for number in sample_order {
            let (sample, labels) = &samples[number];
            profile.sample.push(profiles::Sample {
                location_id: sample.stack.iter().map(|location| location_ids[*location as usize]).collect(),
                value: self.values[number * width..(number + 1) * width].to_vec(),
                label: labels
                    .iter()
                    .map(|label| profiles::Label {
                        key: text(&mut out, label.key),
                        str: label.text.map_or(0, |number| text(&mut out, number)),
                        num: label.number,
                        num_unit: text(&mut out, label.unit),
                    })
                    .collect(),
            });
        }
        profile.string_table = out.strings;
        profile
    }
}

/// For each number its rank, and the numbers by rank.
fn ranks(len: usize, mut compare: impl FnMut(usize, usize) -> std::cmp::Ordering) -> (Vec<u32>, Vec<usize>) {
    let mut order: Vec<usize> = (0..len).collect();
    order.sort_unstable_by(|a, b| compare(*a, *b));
    let mut rank = vec![0; len];
    for (position, number) in order.iter().enumerate() {
        rank[*number] = position as u32;
    }
    (rank, order)
}

/// The string table being written, in the order of first use.
struct Out {
    strings: Vec<String>,
    numbers: HashMap<String, i64>,
}

impl Out {
    fn new() -> Self {
        Self { strings: vec![String::new()], numbers: HashMap::from([(String::new(), 0)]) }
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

/// The lines of comment of all merged profiles, each once. A store may hold thousands of profiles with a ledger of
/// their own each, so only the first in order are kept, and that some are missing is said.
#[derive(Default)]
pub(super) struct Comments {
    lines: BTreeSet<String>,
    cut: bool,
}

impl Comments {
    const MAX: usize = 1024;

    pub(super) fn add(&mut self, line: &str) {
        if !line.is_empty() && !self.lines.contains(line) {
            self.lines.insert(line.to_owned());
            if self.lines.len() > Self::MAX {
                self.lines.pop_last();
                self.cut = true;
            }
        }
    }

    pub(super) fn finish(self) -> Vec<String> {
        let mut lines: Vec<_> = self.lines.into_iter().collect();
        if self.cut {
            lines.push(format!(
                "[more than {} comments in the merged profiles: the rest is left out]",
                Self::MAX
            ));
        }
        lines
    }
}

impl Graph {
    /// The mapping with the highest count; among equals the first by name and place.
    pub(super) fn most_common_mapping(&self, counts: &HashMap<u32, u64>) -> Option<u32> {
        let most = counts.values().max()?;
        let texts: HashMap<u32, &str> =
            self.strings.table.iter().map(|(text, number)| (*number, &**text)).collect();
        self.mappings
            .by_content
            .iter()
            .filter(|(_, number)| counts.get(number) == Some(most))
            .min_by_key(|(key, _)| {
                let MappingKey { file, build_id, start, limit, offset } = key;
                (texts.get(file), *start, *limit, *offset, texts.get(build_id))
            })
            .map(|(_, number)| *number)
    }
}
