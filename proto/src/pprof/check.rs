//! Checks profiles once, so that the code that reads them afterwards can rely on valid references.

use std::collections::{HashMap, HashSet};

use super::PprofError;
use crate::profiles::{Profile, Sample, ValueType};

/// Content of a checked profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Sample types such as `cpu/nanoseconds`, in the order of the values.
    pub sample_types: Vec<String>,
    /// Sum over all samples, for each sample type.
    pub totals: Vec<i64>,
    /// Number of samples.
    pub samples: usize,
}

/// Maps the ids of a table's entries to their indexes. Most writers number from 1 upwards; only other ids need the hash
/// map.
pub(super) struct Ids {
    what: &'static str,
    len: usize,
    other: HashMap<u64, usize>,
}

impl Ids {
    pub(super) fn new(what: &'static str, ids: impl Iterator<Item = u64>) -> Result<Self, PprofError> {
        let (mut len, mut sequential, mut other) = (0, true, HashMap::new());
        for (index, id) in ids.enumerate() {
            len = index + 1;
            if sequential && id != index as u64 + 1 {
                sequential = false;
                other = (0..index).map(|before| (before as u64 + 1, before)).collect();
            }
            if !sequential && (id == 0 || other.insert(id, index).is_some()) {
                return Err(PprofError::Id { what, id });
            }
        }
        Ok(Self { what, len, other })
    }

    /// Returns the index of an entry; `of` names the referring part for the error.
    pub(super) fn index(&self, id: u64, of: &'static str) -> Result<usize, PprofError> {
        let index = if self.other.is_empty() {
            usize::try_from(id).ok().and_then(|id| id.checked_sub(1)).filter(|index| *index < self.len)
        } else {
            self.other.get(&id).copied()
        };
        index.ok_or(PprofError::Dangling { what: of, to: self.what, index: id.into() })
    }
}

/// Returns a string of the table; `of` names the referring part for the error.
pub(super) fn string<'p>(profile: &'p Profile, index: i64, of: &'static str) -> Result<&'p str, PprofError> {
    usize::try_from(index)
        .ok()
        .and_then(|index| profile.string_table.get(index))
        .map(String::as_str)
        .ok_or(PprofError::Dangling { what: of, to: "string", index: index.into() })
}

pub(super) fn type_name(profile: &Profile, value_type: &ValueType) -> Result<String, PprofError> {
    let kind = string(profile, value_type.r#type, "a sample type")?;
    Ok(format!("{kind}/{}", string(profile, value_type.unit, "a sample type")?))
}

/// Checks every reference, id and count of a profile. Merging and drawing a checked profile has no further errors.
pub fn check(profile: &Profile) -> Result<Summary, PprofError> {
    if profile.string_table.first().is_none_or(|first| !first.is_empty()) {
        return Err(PprofError::FirstString);
    }
    if profile.sample_type.is_empty() {
        return Err(PprofError::NoSampleTypes);
    }
    let text = |index, of| string(profile, index, of);
    let sample_types =
        profile.sample_type.iter().map(|kind| type_name(profile, kind)).collect::<Result<Vec<_>, _>>()?;
    if let Some(period_type) = &profile.period_type {
        type_name(profile, period_type)?;
    }
    for index in profile.comment.iter().chain([
        &profile.drop_frames,
        &profile.keep_frames,
        &profile.default_sample_type,
        &profile.doc_url,
    ]) {
        text(*index, "the profile")?;
    }

    let mappings = Ids::new("mapping", profile.mapping.iter().map(|mapping| mapping.id))?;
    for mapping in &profile.mapping {
        text(mapping.filename, "a mapping")?;
        text(mapping.build_id, "a mapping")?;
    }
    let functions = Ids::new("function", profile.function.iter().map(|function| function.id))?;
    for function in &profile.function {
        text(function.name, "a function")?;
        text(function.system_name, "a function")?;
        text(function.filename, "a function")?;
    }
    let locations = Ids::new("location", profile.location.iter().map(|location| location.id))?;
    for location in &profile.location {
        if location.mapping_id != 0 {
            mappings.index(location.mapping_id, "a location")?;
        }
        for line in &location.line {
            functions.index(line.function_id, "a location")?;
        }
    }

    let mut totals = vec![0_i64; sample_types.len()];
    let mut keys = HashSet::new();
    for (number, sample) in profile.sample.iter().enumerate() {
        if sample.value.len() != totals.len() {
            return Err(PprofError::Values {
                sample: number,
                found: sample.value.len(),
                expected: totals.len(),
            });
        }
        for (total, value) in totals.iter_mut().zip(&sample.value) {
            if *value < 0 {
                return Err(PprofError::Negative { sample: number });
            }
            *total = total.saturating_add(*value);
        }
        for id in &sample.location_id {
            locations.index(*id, "a sample")?;
        }
        keys.clear();
        for label in &sample.label {
            let key = text(label.key, "a label")?;
            text(label.str, "a label")?;
            text(label.num_unit, "a label")?;
            if !keys.insert(key) {
                return Err(PprofError::DuplicateLabel { sample: number, key: key.to_owned() });
            }
        }
    }
    Ok(Summary { sample_types, totals, samples: profile.sample.len() })
}

/// Counts the samples of a profile of Gannet: the sum of their first values.
pub fn samples(profile: &Profile) -> u64 {
    let count = |sample: &Sample| sample.value.first().and_then(|n| u64::try_from(*n).ok()).unwrap_or(0);
    profile.sample.iter().map(count).fold(0, u64::saturating_add)
}

/// Returns the index of a sample type, given as `cpu/nanoseconds` or `cpu`. An empty name means the last one, which pprof
/// tools show by default.
pub fn sample_type_index(profile: &Profile, wanted: &str) -> Option<usize> {
    if wanted.is_empty() {
        return profile.sample_type.len().checked_sub(1);
    }
    profile.sample_type.iter().position(|kind| {
        type_name(profile, kind)
            .is_ok_and(|name| name == wanted || name.split_once('/').is_some_and(|(kind, _)| kind == wanted))
    })
}
