//! The example configurations name every key, and the programs accept them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails at once"
)]

use std::{collections::BTreeSet, fs, path::Path};

use gannet_e2e::run;

/// Returns the options in force, as the program prints them.
#[track_caller]
fn printed(program: &str, args: &[&str]) -> String {
    let output = run(program, &[args, &["--print-config"]].concat());
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Returns the key that a line sets, without the `#` of an optional one.
fn key(line: &str) -> Option<&str> {
    let (key, _) = line.strip_prefix('#').unwrap_or(line).split_once(':')?;
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    (!key.is_empty() && key.chars().all(is_name)).then_some(key)
}

fn keys(text: &str) -> BTreeSet<&str> {
    text.lines().filter_map(key).collect()
}

/// Returns the example with all its optional keys; the last line of a key counts.
fn complete(example: &str) -> String {
    let lines: Vec<&str> = example.lines().filter(|line| key(line).is_some()).collect();
    let is_last = |at: usize| !lines[at + 1..].iter().any(|later| key(later) == key(lines[at]));
    let kept: Vec<&str> = (0..lines.len())
        .filter(|&at| is_last(at))
        .map(|at| lines[at].strip_prefix('#').unwrap_or(lines[at]))
        .collect();
    kept.join("\n")
}

#[track_caller]
fn check(program: &str, verb: &[&str], example: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(example);
    let text = fs::read_to_string(&path).expect("the example");
    let with = |file: &Path| printed(program, &[verb, &["--config", file.to_str().expect("UTF-8")]].concat());
    let defaults = printed(program, verb);
    assert_eq!(keys(&text), keys(&defaults), "examples/{example} has every key");
    assert_eq!(with(&path), defaults, "examples/{example} has the defaults");

    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join(example);
    fs::write(&file, complete(&text)).expect("the file is written");
    let all = with(&file);
    let unset: Vec<&str> =
        all.lines().filter(|line| line.ends_with(": null") || line.ends_with(": []")).collect();
    assert!(unset.is_empty(), "examples/{example} shows a value for each key, but not for {unset:?}");
}

/// Checks that `examples/agent.yaml` has every key with its default, and that the agent accepts the optional keys too.
#[test]
fn the_example_of_the_agent_has_every_key() {
    check("gannet-agent", &["run"], "agent.yaml");
}

/// Checks that `examples/collector.yaml` has every key with its default, and that the collector accepts the optional keys too.
#[test]
fn the_example_of_the_collector_has_every_key() {
    check("gannet-collector", &[], "collector.yaml");
}
