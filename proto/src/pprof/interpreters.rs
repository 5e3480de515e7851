//! Frames that an interpreter keeps of the programs that it runs, and the interpreter's own native frames between them.

use std::collections::{HashMap, HashSet};

use crate::profiles::{Function, Location, Profile, Sample};

/// Mappings of interpreted functions, each with the native function that runs them. Java has none: its functions call each other,
/// and the frames of its virtual machine between them are work for them.
const INTERPRETERS: [(&str, Option<&str>); 5] = [
    ("[cpython]", Some("_PyEval_EvalFrameDefault")),
    ("[jvm]", None),
    ("[php]", Some("execute_ex")),
    // Its loop has no name in stripped files.
    ("[ruby]", Some("ruby_run_node")),
    ("[v8]", None),
];

/// Reports whether a mapping stands for the functions of interpreted programs.
pub fn is_interpreted(mapping: &str) -> bool {
    INTERPRETERS.iter().any(|(name, _)| *name == mapping)
}

/// Returns the name that views show for an interpreted function: `handle (app.py:12)`, with the line where it begins. So
/// samples in all its lines are one frame, and a profile of a changed program still compares.
pub fn interpreted_name(name: &str, file: &str, first_line: i64) -> String {
    let file = file.rsplit('/').next().unwrap_or(file);
    if file.is_empty() { name.to_owned() } else { format!("{name} ({file}:{first_line})") }
}

/// The locations of one profile that belong to interpreters.
#[derive(Debug, Default)]
pub struct InterpreterFrames {
    /// Locations of interpreted functions.
    interpreted: HashSet<u64>,
    /// Locations in the files of interpreters.
    own: HashSet<u64>,
}

impl InterpreterFrames {
    /// Finds the locations of interpreters. The file of an interpreter is the one that holds the function that runs programs.
    pub fn new(profile: &Profile) -> Self {
        let text = |index: i64| {
            usize::try_from(index).ok().and_then(|at| profile.string_table.get(at)).map_or("", String::as_str)
        };
        let files: HashMap<u64, &str> =
            profile.mapping.iter().map(|mapping| (mapping.id, text(mapping.filename))).collect();
        let file_of = |location: &Location| files.get(&location.mapping_id).copied().unwrap_or_default();
        let interpreted: HashSet<u64> = profile
            .location
            .iter()
            .filter(|location| is_interpreted(file_of(location)))
            .map(|location| location.id)
            .collect();
        if interpreted.is_empty() {
            return Self::default();
        }
        let runs = |function: &&Function| {
            INTERPRETERS.iter().any(|(_, name)| name.is_some_and(|name| name == text(function.name)))
        };
        let loops: HashSet<u64> = profile.function.iter().filter(runs).map(|function| function.id).collect();
        let own_files: HashSet<&str> = profile
            .location
            .iter()
            .filter(|location| location.line.iter().any(|line| loops.contains(&line.function_id)))
            .map(file_of)
            .filter(|file| !file.is_empty() && !is_interpreted(file))
            .collect();
        let own = profile
            .location
            .iter()
            .filter(|location| own_files.contains(file_of(location)))
            .map(|location| location.id)
            .collect();
        Self { interpreted, own }
    }

    /// Returns the locations of a sample with their indexes, leaf first, without the interpreter's own frames. A stack without
    /// any interpreted function stays as it is.
    pub fn visible<'s>(
        &self,
        sample: &'s Sample,
    ) -> impl DoubleEndedIterator<Item = (usize, u64)> + use<'s, '_> {
        let hides = sample.location_id.iter().any(|id| self.interpreted.contains(id));
        let all = sample.location_id.iter().copied().enumerate();
        all.filter(move |(_, id)| !(hides && self.own.contains(id)))
    }
}
