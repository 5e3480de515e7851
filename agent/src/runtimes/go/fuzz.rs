//! The readers of Go programs on any bytes, for the fuzzer.

use super::{
    BuildInfo,
    code::{labels_offset, task_offsets},
};

/// Reads bytes as build information and as code.
pub fn go_program(bytes: &[u8]) {
    if let Some(info) = BuildInfo::parse(bytes) {
        assert!(info.version_text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.'));
    }
    if let Some(offsets) = task_offsets(bytes) {
        assert!(offsets.owner < 4096 && offsets.current < 4096, "{offsets:?}");
    }
    assert!(labels_offset(bytes).is_none_or(|offset| offset < 4096));
}
