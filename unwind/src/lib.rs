//! ELF files to unwind tables.
//!
//! An unwind table lets a kernel program unwind stacks that have no frame pointers. [`build`] makes it from the frame
//! information that compilers leave in ELF files. Nothing here uses the kernel or a process. Every step has limits of time and
//! memory, because any user of the node may have written the file.
//!
//! [`mod@format`] is the contract with the kernel side. [`unwind`] unwinds in user space, by the same tables.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout))]

pub mod build;
pub mod cache;
mod cfi;
pub mod format;
pub mod generated;
mod go;
mod instructions;
pub mod intern;
pub mod limits;
pub mod overrides;
mod rule_text;
mod runs;
pub mod table;
pub mod table_builder;
pub mod unwind;
