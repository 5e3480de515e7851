//! Names of functions in untrusted ELF files, for the agent and the collector.
//!
//! [`tables::find`] reads symbol tables, in this process and within bounds. [`dwarf::resolve`] reads debug information, which also
//! has inlined functions and lines, in a child process. [`demangle`](demangle::demangle) makes the names of compilers readable.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod alternate;
pub mod demangle;
pub mod dwarf;
#[doc(hidden)]
pub mod fuzz;
pub mod go;
mod start_lines;
mod symbol_search;
pub mod tables;

pub use symbol_search::{MAX_UNSIZED_BYTES, TooMuchWork};
