//! Results of the tests that compare samples with what a program knows of itself. `docs/languages.tsv` keeps them.

use std::{env, fs::OpenOptions, io::Write as _};

use gannet_proto::profiles::Profile;

/// Names the file to which the tests append their results; without it they append none.
const PROVEN: &str = "GANNET_TEST_PROVEN";

/// Appends `RUNTIME VERSION CASE EQUAL COMPARED`, with tabs between them: of `compared` samples, `equal` ones show in this case what
/// the program knows of itself. Call it behind all assertions, because a test that fails proves nothing.
#[track_caller]
pub(crate) fn note(runtime: &str, version: &str, case: &str, equal: u64, compared: u64) {
    let Some(path) = env::var_os(PROVEN) else { return };
    let mut file = OpenOptions::new().create(true).append(true).open(&path).unwrap();
    // One write, because other tests may append at the same time.
    file.write_all(format!("{runtime}\t{version}\t{case}\t{equal}\t{compared}\n").as_bytes()).unwrap();
}

/// Returns the version of the runtime, as the samples of a profile have it.
#[track_caller]
pub(crate) fn version_of(profile: &Profile) -> &str {
    let text = |index: i64| profile.string_table[index as usize].as_str();
    let mut labels = profile.sample.iter().flat_map(|sample| &sample.label);
    labels.find(|label| text(label.key) == "runtime_version").map(|label| text(label.str)).unwrap()
}
