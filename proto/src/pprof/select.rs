//! Selects parts of a profile: stacks by the functions that they begin with, and a sample type.

use super::{
    PprofError,
    check::{Ids, check},
    flame::FlameTree,
    interpreters::InterpreterFrames,
};
use crate::profiles::Profile;

/// Reports for each sample whether its stack begins with these functions, the outermost first. The functions have the names
/// that they have in a [`FlameTree`], which leaves out the native frames of interpreters.
pub fn stacks_below(profile: &Profile, functions: &[String]) -> Result<Vec<bool>, PprofError> {
    check(profile)?;
    let mut tree = FlameTree::new();
    let frames = tree.location_frames(profile)?;
    let names = tree.names();
    let ids = Ids::new("location", profile.location.iter().map(|location| location.id))?;
    let interpreters = InterpreterFrames::new(profile);
    let begins = |sample| {
        let mut wanted = functions.iter();
        for (_, id) in interpreters.visible(sample).rev() {
            // The innermost frame is first.
            for frame in frames[ids.index(id, "a sample")?].iter().rev() {
                match wanted.next() {
                    None => return Ok(true),
                    Some(name) if names[*frame as usize].name == *name => {}
                    Some(_) => return Ok(false),
                }
            }
        }
        Ok(wanted.next().is_none())
    };
    profile.sample.iter().map(begins).collect()
}

/// Leaves one sample type of a checked profile, and the samples that have a value of it.
pub fn select_type(profile: &mut Profile, type_index: usize) {
    profile.sample_type = profile.sample_type.get(type_index).copied().into_iter().collect();
    profile.default_sample_type = 0;
    profile.sample.retain_mut(|sample| match sample.value.get(type_index) {
        Some(value) if *value != 0 => {
            sample.value = vec![*value];
            true
        }
        _ => false,
    });
}
