//! ELF files to unwind tables.
//!
//! What a kernel program needs in order to walk a stack without frame pointers, made from what compilers leave in
//! ELF files. Nothing here talks to the kernel or looks at a process: bytes come in, tables go out, and every step
//! is bounded in time and memory because the bytes come from whoever runs a program on the node.
//!
//! [`mod@format`] is the contract with the kernel side.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout))]

pub mod build;
pub mod cache;
mod cfi;
pub mod format;
mod go;
mod instructions;
pub mod intern;
pub mod limits;
pub mod overrides;
mod runs;
pub mod table;
pub mod table_builder;
pub mod unwind;
