//! That a profile holds together, so that whoever reads it afterwards need not ask again.

use std::collections::{HashMap, HashSet};

use super::PprofError;
use crate::profiles::{Profile, ValueType};

/// What a checked profile holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// `cpu/nanoseconds`, ...: in the order of the values.
    pub sample_types: Vec<String>,
    /// The sum over all samples, for each sample type.
    pub totals: Vec<i64>,
    /// How many samples (stacks) there are.
    pub samples: usize,
}

/// From the ids of a table's entries to their places in it. Writers number from 1 upwards, so the place is guessed
/// first and searched only where the guess is wrong.
pub(super) struct Ids {
    what: &'static str,
    len: usize,
    odd: HashMap<u64, usize>,
}

impl Ids {
    pub(super) fn new(what: &'static str, ids: impl Iterator<Item = u64>) -> Result<Self, PprofError> {
        let (mut len, mut sequential, mut odd) = (0, true, HashMap::new());
        for (place, id) in ids.enumerate() {
            len = place + 1;
            if sequential && id != place as u64 + 1 {
                sequential = false;
                odd = (0..place).map(|before| (before as u64 + 1, before)).collect();
            }
            if !sequential && (id == 0 || odd.insert(id, place).is_some()) {
                return Err(PprofError::Id { what, id });
            }
        }
        Ok(Self { what, len, odd })
    }

    pub(super) fn place(&self, id: u64, of: &'static str) -> Result<usize, PprofError> {
        let place = if self.odd.is_empty() {
            usize::try_from(id).ok().and_then(|id| id.checked_sub(1)).filter(|place| *place < self.len)
        } else {
            self.odd.get(&id).copied()
        };
        place.ok_or(PprofError::Dangling { what: of, to: self.what, index: id.into() })
    }
}

/// A string of the table; `of` says who asks.
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

/// Checks every reference, id and count of a profile. What passes can be merged and drawn without further errors.
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
            mappings.place(location.mapping_id, "a location")?;
        }
        for line in &location.line {
            functions.place(line.function_id, "a location")?;
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
            locations.place(*id, "a sample")?;
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

/// Which value is of this sample type: `cpu/nanoseconds`, or `cpu` alone. Empty: the last, which is the one that pprof
/// tools show.
pub fn sample_type_index(profile: &Profile, wanted: &str) -> Option<usize> {
    if wanted.is_empty() {
        return profile.sample_type.len().checked_sub(1);
    }
    profile.sample_type.iter().position(|kind| {
        type_name(profile, kind)
            .is_ok_and(|name| name == wanted || name.split_once('/').is_some_and(|(kind, _)| kind == wanted))
    })
}
