//! The readers of interpreters on any memory, for the fuzzer.

pub use super::python::fuzz::{python, python_lines};
