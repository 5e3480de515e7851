//! The readers of interpreters on any memory, for the fuzzer.

pub use super::{
    go::fuzz::go_program,
    hotspot::fuzz::{java_code, java_counters, java_lines, java_structs},
    php::fuzz::php,
    python::fuzz::{python, python_lines},
    ruby::fuzz::ruby,
    v8::fuzz::{v8_code, v8_layout, v8_lines},
};
