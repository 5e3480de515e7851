//! Merges many profiles into one.

use foldhash::HashMap;

use super::{
    PprofError, check,
    check::{Ids, string},
    graph::{
        Comments, Flags, FunctionKey, Graph, Head, LabelKey, LineKey, LocationKey, MappingKey, SampleKey,
    },
};
use crate::profiles::{Profile, ValueType};

/// Merges profiles with the same sample types. Its memory grows with the distinct content of the profiles, not with their
/// number. The result does not depend on their order.
#[derive(Default)]
pub struct Merger {
    graph: Graph,
    head: Option<Head>,
    comments: Comments,
    /// Number of profiles that have this mapping first. The most frequent one is the main program of the result.
    mains: HashMap<u32, u64>,
}

impl Merger {
    /// Starts without profiles.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a profile. A profile that cannot be added changes nothing.
    pub fn add(&mut self, profile: &Profile) -> Result<(), PprofError> {
        check(profile)?;
        let head = head_of(profile)?;
        let width = head.sample_types.len();
        let head = match self.head.take() {
            None => head,
            Some(mut sum) => {
                if sum.sample_types != head.sample_types {
                    let (first, other) = (names(&sum), names(&head));
                    self.head = Some(sum);
                    return Err(PprofError::DifferentTypes { first, other });
                }
                sum.add(&head);
                sum
            }
        };
        self.head = Some(head);
        for comment in &profile.comment {
            self.comments.add(string(profile, *comment, "the profile")?);
        }

        // Maps indexes of the profile to numbers of the graph.
        let strings: Vec<u32> =
            profile.string_table.iter().map(|text| self.graph.strings.number(text)).collect();
        let text = |index: i64| strings[index as usize];
        let mappings = self.add_mappings(profile, text);
        let mapping_ids = Ids::new("mapping", profile.mapping.iter().map(|mapping| mapping.id))?;
        let functions: Vec<u32> = profile
            .function
            .iter()
            .map(|function| self.graph.functions.number(FunctionKey::of(function, text)))
            .collect();
        let function_ids = Ids::new("function", profile.function.iter().map(|function| function.id))?;
        let mut locations = Vec::with_capacity(profile.location.len());
        for location in &profile.location {
            let mapping = match location.mapping_id {
                0 => None,
                id => Some(mappings[mapping_ids.index(id, "a location")?]),
            };
            let lines = location
                .line
                .iter()
                .map(|line| {
                    let function = functions[function_ids.index(line.function_id, "a location")?];
                    Ok(LineKey { function, line: line.line, column: line.column })
                })
                .collect::<Result<_, PprofError>>()?;
            locations.push(self.graph.locations.number(LocationKey {
                mapping,
                address: location.address,
                lines,
                folded: location.is_folded,
            }));
        }
        let location_ids = Ids::new("location", profile.location.iter().map(|location| location.id))?;
        for sample in &profile.sample {
            let stack = sample
                .location_id
                .iter()
                .map(|id| Ok(locations[location_ids.index(*id, "a sample")?]))
                .collect::<Result<_, PprofError>>()?;
            let labels = LabelKey::all_of(sample, text);
            let key = SampleKey { stack, labels: labels.into() };
            self.graph.sample(key, width, sample.value.iter().copied());
        }
        Ok(())
    }

    /// Adds the mappings of a profile. Returns their numbers by index; the first is counted as the main program.
    fn add_mappings(&mut self, profile: &Profile, text: impl Fn(i64) -> u32) -> Vec<u32> {
        let mut mappings = Vec::with_capacity(profile.mapping.len());
        for mapping in &profile.mapping {
            let number = self.graph.mappings.number(MappingKey {
                file: text(mapping.filename),
                build_id: text(mapping.build_id),
                start: mapping.memory_start,
                limit: mapping.memory_limit,
                offset: mapping.file_offset,
            });
            let Flags { functions, filenames, line_numbers, inline_frames } =
                self.graph.claimed.entry(number).or_default();
            *functions |= mapping.has_functions;
            *filenames |= mapping.has_filenames;
            *line_numbers |= mapping.has_line_numbers;
            *inline_frames |= mapping.has_inline_frames;
            mappings.push(number);
        }
        if let Some(main) = mappings.first() {
            *self.mains.entry(*main).or_default() += 1;
        }
        mappings
    }

    /// Returns the merged profile, or `None` if no profile was added.
    pub fn finish(self) -> Option<Profile> {
        let Self { graph, head, comments, mains } = self;
        let mut head = head?;
        head.comments = comments.finish();
        let main = graph.most_common_mapping(&mains);
        Some(graph.finish(&head, main))
    }
}

fn head_of(profile: &Profile) -> Result<Head, PprofError> {
    let text = |index: i64| string(profile, index, "the profile").map(str::to_owned);
    let pair = |kind: &ValueType| Ok::<_, PprofError>((text(kind.r#type)?, text(kind.unit)?));
    Ok(Head {
        sample_types: profile.sample_type.iter().map(pair).collect::<Result<_, _>>()?,
        default_sample_type: text(profile.default_sample_type)?,
        period_type: profile.period_type.as_ref().map(pair).transpose()?.unwrap_or_default(),
        period: profile.period,
        time_nanos: profile.time_nanos,
        duration_nanos: profile.duration_nanos,
        comments: Vec::new(),
        doc_url: text(profile.doc_url)?,
    })
}

fn names(head: &Head) -> String {
    let names: Vec<_> = head.sample_types.iter().map(|(kind, unit)| format!("{kind}/{unit}")).collect();
    names.join(", ")
}

impl Head {
    /// Merges the properties of another profile. The range goes from the earliest start to the latest end, because the sum
    /// of the lengths would turn ten services of one minute into ten minutes. Texts that differ become empty; an empty
    /// text stays empty, so the order does not matter.
    fn add(&mut self, other: &Self) {
        let Self {
            sample_types: _,
            default_sample_type,
            period_type,
            period,
            time_nanos,
            duration_nanos,
            comments: _,
            doc_url,
        } = other;
        self.period = self.period.max(*period);
        (self.time_nanos, self.duration_nanos) = match (self.time_nanos, *time_nanos) {
            // A profile without a start does not change the range.
            (0, 0) => (0, self.duration_nanos.max(*duration_nanos)),
            (0, time) => (time, *duration_nanos),
            (time, 0) => (time, self.duration_nanos),
            (a, b) => {
                let end = a.saturating_add(self.duration_nanos).max(b.saturating_add(*duration_nanos));
                (a.min(b), end.saturating_sub(a.min(b)))
            }
        };
        // Senders of the same sample types may have different reasons to sample.
        if self.period_type != *period_type {
            self.period_type = Default::default();
        }
        if self.period_type == Default::default() {
            self.period = 0;
        }
        if self.default_sample_type != *default_sample_type {
            self.default_sample_type.clear();
        }
        if self.doc_url != *doc_url {
            self.doc_url.clear();
        }
    }
}
