//! Tests of the whole collector: its servers on real sockets and a real disk.

// `pub` items are for the sibling modules.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, unreachable_pub)]

mod bucket;
mod damage;
mod debuginfo;
mod delete;
mod deletion;
mod disk;
mod disk_use;
mod export;
mod export_bucket;
mod faults;
mod faulty_s3;
mod fleet;
mod forward;
mod grafana;
mod http;
mod ingest;
mod kill;
mod kill_s3;
mod kubernetes;
mod neighbours;
mod open;
mod otlp;
mod page_data;
mod pieces;
mod process;
mod push;
mod query;
mod recording;
mod requests;
mod segment;
mod spans;
mod sql;
mod staging;
mod store;
mod sums;
mod support;
mod table;
mod tls;
mod triggers;
mod verify;
