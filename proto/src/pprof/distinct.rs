//! The distinct frames, stacks and label sets of many profiles, each under a number: the form in which tables hold them.

use super::{
    PprofError, Summary,
    builder::{Label, LabelValue, Line, Mapping},
    check,
    check::Ids,
    graph::{FunctionKey, LabelKey, MappingKey, Strings, Table},
};
use crate::profiles::{Location, Profile};

/// Memory of an entry beside its own content, by an upper estimate: hash, number, and free slots of the hash table.
const ENTRY_BYTES: usize = 48;

#[derive(PartialEq, Eq, Hash)]
struct FrameKey {
    mapping: Option<u32>,
    address: u64,
    function: Option<u32>,
    line: i64,
    column: i64,
    inlined: bool,
    folded: bool,
}

/// One function of a location. A location with inlined functions is several frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The mapping of the location, if it has one.
    pub mapping: Option<Mapping<'a>>,
    /// Address of the location.
    pub address: u64,
    /// The function; `None` for a location without symbols.
    pub line: Option<Line<'a>>,
    /// The next frame of the stack belongs to the same location: it is the function into which this one is inlined.
    pub inlined: bool,
    /// The location stands for several addresses.
    pub folded: bool,
}

/// One sample of an added profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DistinctSample<'a> {
    /// Number of the stack.
    pub stack: u32,
    /// Number of the label set; `None` for a sample without labels.
    pub labels: Option<u32>,
    /// One value for each sample type of the profile.
    pub values: &'a [i64],
}

/// Numbers the distinct content of many profiles. Its memory grows with the distinct content, not with the profiles.
#[derive(Default)]
pub struct Distinct {
    strings: Strings,
    mappings: Table<MappingKey>,
    functions: Table<FunctionKey>,
    frames: Table<FrameKey>,
    stacks: Table<Box<[u32]>>,
    labels: Table<Box<[LabelKey]>>,
    /// Length of all strings, stacks and label sets.
    content_bytes: usize,
}

impl Distinct {
    /// Adds a profile, and calls `each` for every sample in order. A profile that fails the check changes nothing.
    pub fn add(
        &mut self,
        profile: &Profile,
        mut each: impl FnMut(DistinctSample<'_>),
    ) -> Result<Summary, PprofError> {
        let summary = check(profile)?;
        let strings: Vec<u32> = profile.string_table.iter().map(|text| self.string(text)).collect();
        let text = |index: i64| strings[index as usize];
        let mapping_ids = Ids::new("mapping", profile.mapping.iter().map(|mapping| mapping.id))?;
        let mappings: Vec<u32> = profile
            .mapping
            .iter()
            .map(|mapping| {
                self.mappings.number(MappingKey {
                    file: text(mapping.filename),
                    build_id: text(mapping.build_id),
                    start: mapping.memory_start,
                    limit: mapping.memory_limit,
                    offset: mapping.file_offset,
                })
            })
            .collect();
        let function_ids = Ids::new("function", profile.function.iter().map(|function| function.id))?;
        let functions: Vec<u32> = profile
            .function
            .iter()
            .map(|function| self.functions.number(FunctionKey::of(function, text)))
            .collect();
        let mut locations = Vec::with_capacity(profile.location.len());
        for location in &profile.location {
            let mapping = match location.mapping_id {
                0 => None,
                id => Some(mappings[mapping_ids.index(id, "a location")?]),
            };
            locations.push(
                self.frames_of(location, mapping, |id| Ok(functions[function_ids.index(id, "a location")?]))?,
            );
        }
        let location_ids = Ids::new("location", profile.location.iter().map(|location| location.id))?;
        for sample in &profile.sample {
            let mut stack = Vec::with_capacity(sample.location_id.len());
            for id in &sample.location_id {
                stack.extend_from_slice(&locations[location_ids.index(*id, "a sample")?]);
            }
            let labels = LabelKey::all_of(sample, text);
            let stack = numbered(&mut self.stacks, &mut self.content_bytes, stack.into_boxed_slice());
            let labels = (!labels.is_empty())
                .then(|| numbered(&mut self.labels, &mut self.content_bytes, labels.into_boxed_slice()));
            each(DistinctSample { stack, labels, values: &sample.value });
        }
        Ok(summary)
    }

    /// Returns the numbers of the frames of a location, innermost first.
    fn frames_of(
        &mut self,
        location: &Location,
        mapping: Option<u32>,
        function: impl Fn(u64) -> Result<u32, PprofError>,
    ) -> Result<Vec<u32>, PprofError> {
        let (address, folded) = (location.address, location.is_folded);
        let Some(last) = location.line.len().checked_sub(1) else {
            let key =
                FrameKey { mapping, address, function: None, line: 0, column: 0, inlined: false, folded };
            return Ok(vec![self.frames.number(key)]);
        };
        let lines = location.line.iter().enumerate().map(|(index, line)| {
            let function = Some(function(line.function_id)?);
            let (inlined, line, column) = (index < last, line.line, line.column);
            Ok(self.frames.number(FrameKey { mapping, address, function, line, column, inlined, folded }))
        });
        lines.collect()
    }

    fn string(&mut self, text: &str) -> u32 {
        let known = self.strings.len();
        let number = self.strings.number(text);
        if number as usize == known {
            self.content_bytes += text.len();
        }
        number
    }

    /// Returns the memory of the content in bytes, by an upper estimate.
    pub fn bytes(&self) -> usize {
        let Self { strings, mappings, functions, frames, stacks, labels, content_bytes } = self;
        let entry = |len: usize, size: usize| len * (ENTRY_BYTES + size);
        content_bytes
            + entry(strings.len(), size_of::<Box<str>>())
            + entry(mappings.len(), size_of::<MappingKey>())
            + entry(functions.len(), size_of::<FunctionKey>())
            + entry(frames.len(), size_of::<FrameKey>())
            + entry(stacks.len() + labels.len(), size_of::<Box<[u32]>>())
    }

    /// Returns all frames, by number.
    pub fn frames(&self) -> Vec<Frame<'_>> {
        let strings = self.strings.in_order();
        let text = |number: u32| strings[number as usize];
        let (mappings, functions) = (self.mappings.in_order(), self.functions.in_order());
        let mapping = |number: u32| {
            let MappingKey { file, build_id, start, limit, offset } = *mappings[number as usize];
            Mapping { start, limit, offset, file: text(file), build_id: text(build_id) }
        };
        let frame = |key: &FrameKey| {
            let FrameKey { mapping: of, address, function, line, column, inlined, folded } = *key;
            let line = function.map(|number| {
                let FunctionKey { name, system_name, file, start_line } = *functions[number as usize];
                let (name, system_name, file) = (text(name), text(system_name), text(file));
                Line { name, system_name, file, line, column, start_line }
            });
            Frame { mapping: of.map(mapping), address, line, inlined, folded }
        };
        self.frames.in_order().into_iter().map(frame).collect()
    }

    /// Returns the frame numbers of all stacks, by number: leaf first.
    pub fn stacks(&self) -> Vec<&[u32]> {
        self.stacks.in_order().into_iter().map(|stack| &**stack).collect()
    }

    /// Returns all label sets, by number: sorted by key.
    pub fn label_sets(&self) -> Vec<Vec<Label<'_>>> {
        let strings = self.strings.in_order();
        let text = |number: u32| strings[number as usize];
        let label = |LabelKey { key, text: of, number, unit }: &LabelKey| Label {
            key: text(*key),
            value: match of {
                Some(number) => LabelValue::Str(text(*number)),
                None => LabelValue::Num(*number, text(*unit)),
            },
        };
        let set = |set: &[LabelKey]| {
            let mut labels: Vec<_> = set.iter().map(label).collect();
            labels.sort_unstable_by_key(|label| label.key);
            labels
        };
        self.labels.in_order().into_iter().map(|labels| set(labels)).collect()
    }
}

/// Returns the number of a list, and counts its bytes if it is new.
fn numbered<T: std::hash::Hash + Eq>(table: &mut Table<Box<[T]>>, bytes: &mut usize, list: Box<[T]>) -> u32 {
    let (known, size) = (table.len(), size_of_val(&*list));
    let number = table.number(list);
    if number as usize == known {
        *bytes += size;
    }
    number
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Builder, Header},
        *,
    };

    const HEADER: Header<'_> = Header {
        sample_types: &[("samples", "count"), ("cpu", "nanoseconds")],
        period_type: ("cpu", "nanoseconds"),
        period: 10,
        time_nanos: 7,
        duration_nanos: 8,
    };

    fn profile(wobble: u64) -> Profile {
        let mut builder = Builder::new(HEADER);
        let mapping =
            builder.mapping(Mapping { start: 16, limit: 64, offset: 4, file: "/bin/x", build_id: "ab" });
        let line = |name, line| Line { name, system_name: "s", file: "x.c", line, column: 2, start_line: 1 };
        let inlined = builder.location(Some(mapping), 17, &[line("in", 5), line("out", 6)]);
        let plain = builder.location(Some(mapping), 17 + wobble, &[line("out", 6)]);
        let unnamed = builder.location(None, u64::MAX, &[]);
        let labels = [
            Label { key: "tid", value: LabelValue::Num(3, "") },
            Label { key: "size", value: LabelValue::Num(9, "bytes") },
            Label { key: "thread", value: LabelValue::Str("worker") },
        ];
        builder.sample(&[inlined, plain], &[1, 10], &labels);
        builder.sample(&[plain, unnamed], &[2, 20], &[]);
        builder.sample(&[], &[3, 30], &labels[..1]);
        builder.finish()
    }

    /// Builds a profile from numbers of distinct content.
    fn rebuilt(distinct: &Distinct, samples: &[(u32, Option<u32>, Vec<i64>)]) -> Profile {
        let (frames, stacks, sets) = (distinct.frames(), distinct.stacks(), distinct.label_sets());
        let mut builder = Builder::new(HEADER);
        for (stack, labels, values) in samples {
            let (mut ids, mut lines) = (Vec::new(), Vec::new());
            for frame in stacks[*stack as usize] {
                let Frame { mapping, address, line, inlined, folded } = frames[*frame as usize];
                assert!(!folded);
                lines.extend(line);
                if !inlined {
                    let mapping = mapping.map(|mapping| builder.mapping(mapping));
                    ids.push(builder.location(mapping, address, &lines));
                    lines.clear();
                }
            }
            let labels = labels.map(|set| &sets[set as usize][..]).unwrap_or_default();
            builder.sample(&ids, values, labels);
        }
        builder.finish()
    }

    #[test]
    fn distinct_content_gives_back_each_profile() {
        let mut distinct = Distinct::default();
        let profiles = [profile(1), profile(2), profile(1)];
        let mut frames = Vec::new();
        for profile in &profiles {
            let mut samples = Vec::new();
            let summary = distinct
                .add(profile, |sample| samples.push((sample.stack, sample.labels, sample.values.to_vec())))
                .unwrap();
            assert_eq!((summary.samples, samples.len()), (3, 3));
            assert_eq!(&rebuilt(&distinct, &samples), profile);
            frames.push((distinct.frames().len(), distinct.bytes()));
        }
        assert_eq!(frames[1], frames[2], "the third profile has nothing new");
        assert_eq!((frames[0].0, frames[1].0), (4, 5));
    }
}
