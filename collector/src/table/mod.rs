//! The table: the stored profiles in an open format, for engines that read tables.
//!
//! With `--table` a thread reads the segments of the store and adds their content to five Delta tables: Parquet files and a log
//! each, in the directory or bucket of `--data`. Other programs read them, and so do the SQL queries of this one. Without `--table`
//! the collector runs nothing of this module.
//!
//! | module | owns |
//! |---|---|
//! | `worker` | the thread: when to compact, what waits, retention |
//! | `compact` | one compaction, from segments to commits |
//! | `rollup` | the sums of samples by minute and by hour |
//! | `gather`, `ids` | rows in memory, and the ids of stacks, frames and label sets |
//! | `clean` | removed rows of deleted profiles |
//! | `merge`, `rows` | merges of small files, and the rows of written files |
//! | `retention` | removed partitions, files without a reader, the space of the table |
//! | `verify` | nothing; it checks all files, and sets damaged tables aside |
//! | `tables`, `log`, `checkpoint`, `action` | the logs of the tables |
//! | `reader` | nothing: the present version of all tables, for queries |
//! | `sums`, `profile` | nothing: the tables of sums for queries, and sums as a profile |
//! | `coverage` | nothing: the versions of the tables and the segments in them, for another engine |
//! | `file`, `schema`, `partition` | Parquet files, columns, partitions |

mod action;
mod checkpoint;
mod clean;
mod compact;
mod coverage;
mod file;
mod gather;
mod ids;
mod log;
mod merge;
mod partition;
mod profile;
mod reader;
mod retention;
mod rollup;
mod rows;
mod schema;
mod sums;
mod tables;
mod verify;
mod worker;

use std::time::Duration;

use clap::Args;
use gannet_base::TimeSpan;
use serde::{Deserialize, Serialize};

pub(crate) use self::{
    coverage::{CoverageReader, TableVersions},
    profile::{LabelSet, StackSum, TableFrame, fill},
    reader::{Bounds, ColumnValues, Datum, Footer, TableSnapshot, snapshot},
    retention::count_unused,
    schema::{Column, Kind},
    sums::{Grain, SumRow, SumTables, SumsReader},
    verify::{set_aside, verify},
    worker::{TableHandle, start},
};
use crate::store::StoreError;

/// Whether and how often the collector writes the table.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Table")]
#[serde(default)]
pub struct TableOptions {
    /// Also write the stored profiles as Delta tables (Parquet), below `table` in --data, for DuckDB, Spark, Trino and other
    /// engines; --retention-bytes counts them
    #[arg(long, env = "GANNET_COLLECTOR_TABLE")]
    pub table: bool,
    /// Add new profiles to the tables this often; each time writes some files
    #[arg(long, value_name = "TIME", env = "GANNET_COLLECTOR_TABLE_INTERVAL", default_value = "30s")]
    pub table_interval: TimeSpan,
    /// Also write sums of the samples: by minute and service, and by hour and pod. Long ranges then read fewer rows; the
    /// tables take more space
    #[arg(long, env = "GANNET_COLLECTOR_TABLE_ROLLUPS")]
    pub table_rollups: bool,
    /// Time between two retention passes.
    #[arg(skip = Duration::from_secs(60))]
    #[serde(skip)]
    pub retention_interval: Duration,
    /// Time for which removed files stay for readers of an earlier version of a table.
    #[arg(skip = Duration::from_secs(15 * 60))]
    #[serde(skip)]
    pub delete_delay: Duration,
    /// Number of files of an hour that starts a merge while the hour gets new files.
    #[arg(skip = 8_usize)]
    #[serde(skip)]
    pub merge_files: usize,
    /// Time after the end of an hour until the collector merges all its small files.
    #[arg(skip = Duration::from_secs(10 * 60))]
    #[serde(skip)]
    pub close_delay: Duration,
    /// Time for which the logs keep commits before a checkpoint.
    #[arg(skip = Duration::from_secs(24 * 3600))]
    #[serde(skip)]
    pub log_keep: Duration,
}

impl Default for TableOptions {
    fn default() -> Self {
        gannet_base::defaults()
    }
}

/// Why the table cannot be read or written. Each text names the cure.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TableError {
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot read or write a file of the table: {0}")]
    Object(#[source] object_store::Error),
    #[error("cannot write a Parquet file of the table: {0}")]
    Parquet(#[source] parquet::errors::ParquetError),
    #[error(
        "{log} is damaged: {reason}; restore it from a backup, or remove the directory `table`: the collector writes it again \
         from the stored profiles"
    )]
    Damaged { log: String, reason: String },
    #[error(
        "{log} needs reader version {reader} and writer version {writer} of Delta, which this collector does not write; undo the \
         change of the table, or remove the directory `table`: the collector writes it again from the stored profiles"
    )]
    Newer { log: String, reader: u32, writer: u32 },
    #[error(
        "{0} has other columns than this collector writes; remove the directory `table`: the collector writes it again from the \
         stored profiles"
    )]
    Columns(String),
    #[error(
        "{0} is a commit of another program, and the collector cannot know what it did with the samples; remove the directory \
         `table`: the collector writes it again from the stored profiles"
    )]
    Foreign(String),
    #[error(
        "the collector was suspended for so long that the log of the table may lack commits; reading it again"
    )]
    Stale,
    #[error("{0} was removed while the query ran; run the query again")]
    Gone(String),
    #[error(
        "{file} is damaged: {reason}; stop the collector and run `gannet-collector repair`, then the collector writes the table \
         again from the stored profiles"
    )]
    File { file: String, reason: String },
    #[error("other collectors change the table all the time; trying again later")]
    Contended,
    #[error(
        "the bucket overwrites an object that must only be created, so collectors could lose each other's commits; use a bucket \
         with conditional writes (If-None-Match), or start without --table"
    )]
    Unconditional,
    #[error("the disk has too little free space for the table; free some, or lower --retention-bytes")]
    NoRoom,
}
