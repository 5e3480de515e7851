//! Profiles of segments as rows, before they have the ids of their stacks.

use std::collections::HashMap;

use gannet_proto::{
    labels::{self, Labels},
    pprof::{self, Distinct, PprofError},
    profiles::{Profile, Sample},
};
use parquet::data_type::ByteArray;

use super::partition::Partition;
use crate::{limits::MAX_INFLATION, store::SegmentProfile};

/// Rows that wait to be written, at most. One profile may exceed it.
const MAX_ROWS: usize = 500_000;
/// Memory for the distinct content of waiting rows.
const MAX_CONTENT_BYTES: usize = 64 << 20;

/// Labels of some profiles.
pub(super) struct Series {
    pub(super) service: ByteArray,
    pub(super) namespace: Option<ByteArray>,
    pub(super) pod: Option<ByteArray>,
    pub(super) container: Option<ByteArray>,
    pub(super) node: Option<ByteArray>,
    pub(super) labels: Vec<(ByteArray, ByteArray)>,
}

impl Series {
    fn new(labels: &Labels) -> Self {
        let label = |name| labels.get(name).map(|value| ByteArray::from(value.as_str()));
        Self {
            service: label(labels::SERVICE_NAME).unwrap_or_else(|| ByteArray::from("")),
            namespace: label(labels::NAMESPACE),
            pod: label(labels::POD),
            container: label(labels::CONTAINER),
            node: label(labels::NODE),
            labels: labels
                .iter()
                .map(|(name, value)| (ByteArray::from(name.as_str()), ByteArray::from(value.as_str())))
                .collect(),
        }
    }
}

/// Tables that lack a segment or a profile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wants {
    pub(super) profiles: bool,
    pub(super) samples: bool,
    pub(super) minutes: bool,
    pub(super) hours: bool,
}

impl Wants {
    /// Reports whether a table needs the samples.
    pub(super) fn rows(self) -> bool {
        self.samples || self.minutes || self.hours
    }

    /// Returns the tables that lack both.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            profiles: self.profiles && other.profiles,
            samples: self.samples && other.samples,
            minutes: self.minutes && other.minutes,
            hours: self.hours && other.hours,
        }
    }

    /// Reports whether a table lacks it.
    pub(super) fn any(self) -> bool {
        self.profiles || self.rows()
    }
}

/// A row of the table of profiles.
pub(super) struct ProfileRow {
    pub(super) partition: Partition,
    /// Index of its [`Series`].
    pub(super) series: u32,
    pub(super) start_ms: u64,
    pub(super) id: ByteArray,
    pub(super) wants: Wants,
    pub(super) duration_ms: u64,
    pub(super) rule_id: ByteArray,
    pub(super) revision: u64,
    pub(super) reason: ByteArray,
    pub(super) types: Vec<ByteArray>,
    pub(super) period_type: Option<ByteArray>,
    pub(super) period: i64,
    pub(super) time_nanos: i64,
    pub(super) duration_nanos: i64,
    pub(super) comments: Vec<ByteArray>,
}

/// A row of the table of samples.
#[derive(Clone, Copy)]
pub(super) struct SampleRow {
    /// Index of its [`ProfileRow`].
    pub(super) profile: u32,
    /// Index of its type in [`Gathered::types`].
    pub(super) kind: u32,
    /// Number of its stack, and later its id.
    pub(super) stack: i64,
    /// Number of its label set, and later its id.
    pub(super) labels: Option<i64>,
    pub(super) value: i64,
    pub(super) count: Option<i64>,
    /// Index of the first guessed location of the stack; 0: none. Only for the tables of sums.
    pub(super) guessed_from: i64,
}

/// Rows of one compaction.
#[derive(Default)]
pub(super) struct Gathered {
    pub(super) series: Vec<Series>,
    series_of: HashMap<Labels, u32>,
    pub(super) profiles: Vec<ProfileRow>,
    /// Types of values, like `cpu/nanoseconds`.
    pub(super) types: Vec<ByteArray>,
    /// Stacks and label sets of the waiting rows.
    pub(super) distinct: Distinct,
    /// Rows that no file has yet.
    pub(super) samples: Vec<SampleRow>,
}

impl Gathered {
    /// Reports whether the waiting rows should be written before others come.
    pub(super) fn is_full(&self) -> bool {
        self.samples.len() >= MAX_ROWS || self.distinct.bytes() >= MAX_CONTENT_BYTES
    }

    /// Adds a profile, with its samples if a table lacks them. A profile that cannot be read adds nothing.
    pub(super) fn add(&mut self, from: &SegmentProfile, wants: Wants) -> Result<(), PprofError> {
        let max_inflated = from.pprof.len().saturating_mul(MAX_INFLATION);
        let profile = pprof::decode(&from.pprof, max_inflated)?;
        let index = self.profiles.len() as u32;
        let first = self.samples.len();
        let summary = if wants.rows() {
            let counts = counts_first(&profile);
            let samples = &mut self.samples;
            let has_sums = wants.minutes || wants.hours;
            let mut sources = profile.sample.iter();
            self.distinct.add(&profile, |sample| {
                let source = sources.next().filter(|_| has_sums);
                let guessed_from = source.map_or(0, |source| guessed_from(&profile, source));
                let row = |(kind, value): (usize, &i64)| SampleRow {
                    profile: index,
                    kind: kind as u32,
                    stack: sample.stack.into(),
                    labels: sample.labels.map(i64::from),
                    value: *value,
                    count: if counts { sample.values.first().copied() } else { None },
                    guessed_from,
                };
                samples.extend(sample.values.iter().enumerate().skip(usize::from(counts)).map(row));
            })?
        } else {
            pprof::check(&profile)?
        };
        let types: Vec<u32> = summary.sample_types.iter().map(|name| self.type_of(name)).collect();
        for row in &mut self.samples[first..] {
            row.kind = types[row.kind as usize];
        }
        let series = self.series(&from.labels);
        let text = |index: i64| {
            usize::try_from(index).ok().and_then(|at| profile.string_table.get(at)).map_or("", String::as_str)
        };
        let period_type = profile.period_type.as_ref();
        self.profiles.push(ProfileRow {
            partition: Partition::at(from.start_ms),
            series,
            start_ms: from.start_ms,
            id: ByteArray::from(from.id.to_string().as_str()),
            wants,
            duration_ms: from.duration_ms,
            rule_id: ByteArray::from(from.rule_id.as_str()),
            revision: from.revision,
            reason: ByteArray::from(from.reason.as_str()),
            types: types.iter().map(|index| self.types[*index as usize].clone()).collect(),
            period_type: period_type
                .map(|of| ByteArray::from(format!("{}/{}", text(of.r#type), text(of.unit)).as_str())),
            period: profile.period,
            time_nanos: profile.time_nanos,
            duration_nanos: profile.duration_nanos,
            comments: profile.comment.iter().map(|comment| ByteArray::from(text(*comment))).collect(),
        });
        Ok(())
    }

    fn series(&mut self, labels: &Labels) -> u32 {
        if let Some(known) = self.series_of.get(labels) {
            return *known;
        }
        let index = self.series.len() as u32;
        self.series.push(Series::new(labels));
        self.series_of.insert(labels.clone(), index);
        index
    }

    fn type_of(&mut self, name: &str) -> u32 {
        let known = self.types.iter().position(|of| of.data() == name.as_bytes());
        known.unwrap_or_else(|| {
            self.types.push(ByteArray::from(name));
            self.types.len() - 1
        }) as u32
    }
}

/// Returns the index of the first guessed location of a sample, leaf first; 0 without a guess.
fn guessed_from(profile: &Profile, sample: &Sample) -> i64 {
    let sure = pprof::sure_frames(profile, sample);
    if sure < sample.location_id.len() { sure as i64 } else { 0 }
}

/// Reports whether the first of two values counts the samples of the second, as in all profiles of Gannet.
fn counts_first(profile: &Profile) -> bool {
    let unit = |index: usize| {
        let unit = profile.sample_type.get(index).map_or(0, |of| of.unit);
        usize::try_from(unit).ok().and_then(|at| profile.string_table.get(at)).map(String::as_str)
    };
    profile.sample_type.len() == 2 && unit(0) == Some("count") && unit(1) != Some("count")
}
