//! The mark of frames that an unwinder found by a guess: by frame pointer, where no unwind table had a rule.

use crate::profiles::{Profile, Sample};

/// The label with the mark: a number, the index in `location_id` of the first guessed frame. The frames from there to the root
/// rest on that guess, and may be wrong. Tools keep the labels of samples when they read, merge, split and write profiles. They
/// would merge marked locations, functions or mappings with others of the same content, and would show a frame that is only a
/// mark as a function.
pub const GUESSED_FROM: &str = "guessed_from";

/// Returns how many locations of a sample, leaf first, the unwinder found without a guess. A label with a number that cannot be
/// right marks nothing.
pub fn sure_frames(profile: &Profile, sample: &Sample) -> usize {
    let is_mark = |key: i64| {
        usize::try_from(key)
            .ok()
            .and_then(|at| profile.string_table.get(at))
            .is_some_and(|text| text == GUESSED_FROM)
    };
    let all = sample.location_id.len();
    let label = sample.label.iter().find(|label| label.str == 0 && is_mark(label.key));
    label
        .and_then(|label| usize::try_from(label.num).ok())
        .filter(|index| (1..all).contains(index))
        .unwrap_or(all)
}
