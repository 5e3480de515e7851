//! Programs of language runtimes, which must be installed. The machines of `make kernels` lack them, and skip this module.

use std::{fs, process::Command};

use crate::jit::{assert_named, record_command};

const SHORT_JS: &str = include_str!("../data/cases/short.js");

#[test]
fn functions_of_node_have_names_after_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("short.js");
    fs::write(&script, SHORT_JS).unwrap();
    let version = Command::new("node").arg("--version").output();
    assert!(
        version.is_ok_and(|output| output.status.success()),
        "this test runs node: apt-get install nodejs"
    );
    // V8 writes a log beside the perf map, into the working directory.
    let command = format!("cd {} && exec node", directory.path().display());
    let run = |flags: &str| {
        let flags = format!("{command} --interpreted-frames-native-stack {flags} short.js");
        record_command(&["sh", "-c", &flags])
    };
    // The perf map has no lines for functions that V8 has inlined into others.
    assert_named(&run("--perf-basic-prof --no-turbo-inlining"), "hotInner");
    assert_named(&run("--perf-basic-prof --turbo-inlining"), "short.js");
    assert_named(&run("--perf-prof --no-turbo-inlining"), "hotInner");
}
