//! Spans of a real SDK on samples. Needs root, a kernel with BTF, and what `spans` needs. `GANNET_TEST_SDK` names a Python that has the
//! package `ddtrace`, which publishes spans.

use std::process::Command;

use crate::{
    common::required,
    spans::{Traced, check},
};

/// A program that works in spans of the SDK and records them.
const PROGRAM: &str = include_str!("../data/spans.py");

#[test]
fn samples_have_the_span_of_a_real_sdk() {
    let mut command = Command::new(required("GANNET_TEST_SDK", "scripts/ddtrace"));
    command.args(["-c", PROGRAM]).envs([
        ("DD_TRACE_OTEL_CTX_ENABLED", "true"),
        ("DD_SERVICE", "span-shop"),
        ("DD_VERSION", "1.2"),
        ("DD_INSTRUMENTATION_TELEMETRY_ENABLED", "false"),
        ("DD_REMOTE_CONFIGURATION_ENABLED", "false"),
    ]);
    check("ddtrace", &Traced::start(&mut command), false);
}
