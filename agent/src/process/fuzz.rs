//! The readers of `/proc` on any text, for the fuzzer.

use super::proc;
use crate::cgroup::{CgroupNames, parse_path};

/// Reads a text as each of the files of a process.
pub fn proc_file(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for line in proc::parse_maps(&text) {
        assert!(line.mapping.start < line.mapping.end, "{line:?}");
    }
    let _ = proc::parse_stat(&text);
    for controller in ["", "cpu", "perf_event"] {
        let _ = parse_path(&text, controller);
    }
    let names = CgroupNames::of(&text);
    let _ = names.containers();
}
