//! Tests of the agent that load no BPF program. Some need root: they mount a small file system, drop privileges, or open
//! mapped files of other processes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails at once"
)]

use std::{env, process::Command};

mod check;
mod lifecycle_model;
mod metadata;
mod output;
mod parts;
mod pods;
mod spool;
mod storm_memory;
mod stream;
mod symbols;

/// Runs a test again in a process of its own, because it measures the memory of its process. Returns true in that process; the
/// caller returns at once on false.
#[track_caller]
fn is_own_process(test: &str) -> bool {
    const CHILD: &str = "GANNET_TEST_CHILD";
    if env::var_os(CHILD).is_some() {
        return true;
    }
    let mut command = Command::new(env::current_exe().unwrap());
    let output = command.args(["--exact", "--nocapture", test]).env(CHILD, "1").output().unwrap();
    let (text, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{text}{log}");
    false
}
