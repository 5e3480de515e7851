//! Splits a profile into smaller ones, for receivers with a size limit.

use std::collections::{HashMap, HashSet};

use prost::Message as _;

use crate::profiles::Profile;

/// Splits a profile into parts with at most `max_samples` samples and `max_bytes` encoded, uncompressed bytes. Each sample
/// is in exactly one part, and a part has only the tables that its samples need. A sample above the limit is a part of its
/// own.
pub fn split(profile: Profile, max_samples: usize, max_bytes: usize) -> Vec<Profile> {
    let mut parts = Vec::new();
    let mut open = vec![profile];
    while let Some(part) = open.pop() {
        let count = part.sample.len();
        if count < 2 || (count <= max_samples && part.encoded_len() <= max_bytes) {
            parts.push(part);
        } else if let Some([first, second]) = halves(part) {
            // The stack returns the first half next.
            open.extend([second, first]);
        }
    }
    parts
}

/// Splits a profile into two with half of the samples each, or returns `None` for less than two samples. Each half has
/// only the tables that its samples need.
pub fn halves(mut profile: Profile) -> Option<[Profile; 2]> {
    let half = profile.sample.len() / 2;
    if half == 0 {
        return None;
    }
    let mut rest = profile.clone();
    rest.sample.drain(..half);
    profile.sample.truncate(half);
    Some([needed(profile), needed(rest)])
}

/// Removes everything that no sample of a checked profile needs.
pub fn needed(mut profile: Profile) -> Profile {
    let locations: HashSet<u64> =
        profile.sample.iter().flat_map(|sample| sample.location_id.iter().copied()).collect();
    profile.location.retain(|location| locations.contains(&location.id));
    let functions: HashSet<u64> =
        profile.location.iter().flat_map(|location| &location.line).map(|line| line.function_id).collect();
    profile.function.retain(|function| functions.contains(&function.id));
    // The first mapping is the main program, so it stays even without samples.
    let mappings: HashSet<u64> = profile.location.iter().map(|location| location.mapping_id).collect();
    let mut is_first = true;
    profile.mapping.retain(|mapping| std::mem::take(&mut is_first) || mappings.contains(&mapping.id));

    let strings = std::mem::take(&mut profile.string_table);
    let mut kept = vec![String::new()];
    let mut indexes: HashMap<i64, i64> = HashMap::from([(0, 0)]);
    let mut renumber = |index: &mut i64| {
        *index = *indexes.entry(*index).or_insert_with(|| {
            // The profile is checked, so the empty text is never used.
            let text = usize::try_from(*index).ok().and_then(|at| strings.get(at));
            kept.push(text.cloned().unwrap_or_default());
            kept.len() as i64 - 1
        });
    };
    for kind in profile.sample_type.iter_mut().chain(profile.period_type.as_mut()) {
        renumber(&mut kind.r#type);
        renumber(&mut kind.unit);
    }
    for label in profile.sample.iter_mut().flat_map(|sample| &mut sample.label) {
        renumber(&mut label.key);
        renumber(&mut label.str);
        renumber(&mut label.num_unit);
    }
    for mapping in &mut profile.mapping {
        renumber(&mut mapping.filename);
        renumber(&mut mapping.build_id);
    }
    for function in &mut profile.function {
        renumber(&mut function.name);
        renumber(&mut function.system_name);
        renumber(&mut function.filename);
    }
    profile.comment.iter_mut().for_each(&mut renumber);
    for index in [&mut profile.drop_frames, &mut profile.keep_frames, &mut profile.default_sample_type] {
        renumber(index);
    }
    profile.string_table = kept;
    profile
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pprof::{Builder, Header, Label, LabelValue, Line, Mapping, Merger, check};

    fn profile(samples: usize, width: usize) -> Profile {
        let mut builder = Builder::new(Header {
            sample_types: &[("samples", "count"), ("cpu", "nanoseconds")],
            period_type: ("cpu", "nanoseconds"),
            period: 10,
            time_nanos: 1,
            duration_nanos: 2,
        });
        let mapping = builder.mapping(Mapping {
            start: 0x1000,
            limit: 0x9000_0000,
            offset: 0,
            file: "/bin/a",
            build_id: "ab",
        });
        for number in 0..samples {
            let name = format!("f{number}{}", "x".repeat(width));
            let line =
                Line { name: &name, system_name: &name, file: "a.c", line: 1, column: 0, start_line: 1 };
            let location = builder.location(Some(mapping), 0x1000 + number as u64, &[line]);
            let label = Label { key: "thread", value: LabelValue::Str(&name) };
            builder.sample(&[location], &[1, 10], &[label]);
        }
        builder.finish()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_parts_are_valid_and_merge_to_the_whole(
            samples in 1_usize..200, width in 0_usize..60, max in 1_usize..80, bytes in 500_usize..20_000,
        ) {
            let whole = profile(samples, width);
            let parts = split(whole.clone(), max, bytes);
            let mut merger = Merger::new();
            for part in &parts {
                let summary = check(part).unwrap();
                prop_assert_eq!(summary.sample_types.len(), 2);
                prop_assert!(part.sample.len() <= max);
                prop_assert!(part.encoded_len() <= bytes || part.sample.len() == 1);
                prop_assert!(part.function.len() <= part.sample.len() || parts.len() == 1);
                merger.add(part).unwrap();
            }
            let mut all = Merger::new();
            all.add(&whole).unwrap();
            let (mut together, mut whole) = (merger.finish().unwrap(), all.finish().unwrap());
            // The lengths differ, because parts merge as if they followed each other.
            together.duration_nanos = 0;
            whole.duration_nanos = 0;
            prop_assert_eq!(together, whole);
        }
    }
}
