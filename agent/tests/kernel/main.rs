//! Tests of the agent on the running kernel. They need root and a kernel with BTF, and share the machine's clock, its
//! tracepoints and its CPUs: one runs at a time, or two of the modules that `.config/nextest.toml` lists. Programs under test are
//! compiled by gcc, g++, rustc and go.
//!
//! `make kernels` runs these modules on other kernels; `KERNEL_TESTS` selects some by name.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails at once")]

mod common;

mod blocked;
mod captures;
mod cases;
mod daemon;
mod embedded;
mod full_maps;
mod golang;
mod hung;
mod hung_disk;
mod images;
mod java;
mod jit;
mod languages;
mod ledger;
mod lifecycle;
mod listed;
mod names;
mod node;
mod pods;
mod record_ends;
mod rules;
mod runtimes;
mod sampling;
mod sdk;
mod spans;
mod stacks;
mod unwind_many;
mod unwind_maps;
mod unwind_programs;
mod unwind_tables;
