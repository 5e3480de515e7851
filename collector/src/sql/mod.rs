//! SQL over the table: a SELECT of a client, run by SQLite over virtual tables.
//!
//! | module | owns |
//! |---|---|
//! | `run` | the connection of one query: what it may do, its rows, its error texts |
//! | `rows` | the virtual tables and their scans |
//! | `scan` | the row groups that a query has read, and its limits |
//! | `deleted` | nothing: it finds the rows of deleted profiles, until the tables have lost them |
//! | `plan` | nothing: it decides what a scan can skip |
//!
//! The module does nothing before the first query: each query reads the logs of the tables itself. One query runs at a time, because
//! SQLite limits the memory of the process, not of a connection.

mod deleted;
mod plan;
mod rows;
mod run;
mod scan;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use clap::Args;
use gannet_base::{ByteSize, TimeSpan};
use gannet_proto::query::{
    SqlRequest, SqlResponse,
    sql_response::{End, Message},
};
use serde::{Deserialize, Serialize};
use tokio::{
    runtime::Handle,
    sync::Semaphore,
    time::{Instant, MissedTickBehavior},
};

use self::{
    deleted::Deleted,
    scan::{Answer, Counts, Limits, Scan},
};
use crate::{
    metrics::Metrics,
    store::{Store, TableObjects},
    table::{self, TableError},
    time,
};

/// Maximum number of rows of an answer if the request has no `max_rows`.
const DEFAULT_ROWS: u32 = 1000;
/// Maximum length of a query, in bytes.
pub(crate) const MAX_SQL_BYTES: usize = 64 << 10;
/// Maximum number of queries that wait for the running one.
const MAX_WAITING: usize = 16;
/// Time between two progress messages.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// Maximum number of characters of a query in the log.
const LOGGED_CHARS: usize = 1000;

/// Limits of SQL queries.
#[expect(clippy::struct_field_names, reason = "the fields are flags and keys of the configuration file")]
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "SQL queries of the table")]
#[serde(default)]
pub struct SqlOptions {
    /// End an SQL query after this time
    #[arg(long, value_name = "TIME", env = "GANNET_COLLECTOR_SQL_TIMEOUT", default_value = "60s")]
    pub sql_timeout: TimeSpan,
    /// Limit the memory of the running SQL query: half for rows of the tables, half for sorting and grouping
    #[arg(long, value_name = "SIZE", env = "GANNET_COLLECTOR_SQL_MEMORY_BYTES", default_value = "256MiB")]
    pub sql_memory_bytes: ByteSize,
    /// End an SQL query that reads more bytes of files
    #[arg(long, value_name = "SIZE", env = "GANNET_COLLECTOR_SQL_READ_BYTES", default_value = "4GiB")]
    pub sql_read_bytes: ByteSize,
    /// Return at most this many rows of one SQL query
    #[arg(long, value_name = "N", env = "GANNET_COLLECTOR_SQL_MAX_ROWS", default_value_t = 100_000)]
    pub sql_max_rows: u32,
}

impl Default for SqlOptions {
    fn default() -> Self {
        gannet_base::defaults()
    }
}

/// The reason why a query has no answer, or only a part of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SqlError {
    /// The collector writes no tables.
    #[error("this collector writes no tables that SQL could read; start it with --table")]
    NoTable,
    /// The query is wrong.
    #[error("sql: {0}")]
    Invalid(String),
    /// The query would exceed a limit.
    #[error("sql: {0}")]
    Limit(String),
    /// Sums with deleted profiles.
    #[error(
        "the table {0} has sums of deleted profiles in the hours from {1} on, which the collector adds up again; run the query again in \
         a minute, or read the table samples"
    )]
    Unclean(&'static str, String),
    /// Too many queries wait.
    #[error("{MAX_WAITING} SQL queries wait already, and the collector runs one at a time; try again later")]
    Busy,
    /// The tables cannot be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The client does not wait for the answer.
    #[error("the client has left")]
    Left,
    /// The thread of the query has failed.
    #[error("the query failed inside of the collector; its log has the reason")]
    Failed,
}

/// Runs SQL queries.
pub(crate) struct Sql {
    /// `None` without `--table`.
    tables: Option<TableObjects>,
    store: Arc<Store>,
    options: SqlOptions,
    permit: Arc<Semaphore>,
    waiting: AtomicUsize,
    metrics: Metrics,
}

/// Counts a query that waits or runs.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Sql {
    /// `tables`: the objects of the tables, if the collector writes some.
    pub(crate) fn new(
        tables: Option<TableObjects>,
        store: Arc<Store>,
        options: &SqlOptions,
        metrics: Metrics,
    ) -> Arc<Self> {
        Arc::new(Self {
            tables,
            store,
            options: options.clone(),
            permit: Arc::new(Semaphore::new(1)),
            waiting: AtomicUsize::new(0),
            metrics,
        })
    }

    /// Runs a query and sends its answer. Ends early when the receiver is dropped. `who`: the caller, for the log.
    pub(crate) async fn run(self: Arc<Self>, request: SqlRequest, who: String, answer: Answer) {
        let (began, counts) = (Instant::now(), Arc::new(Counts::default()));
        let sql: String = request.sql.chars().take(LOGGED_CHARS).collect();
        let result = tokio::select! {
            () = answer.closed() => Err(SqlError::Left),
            result = self.answer(request, &counts, &answer) => result,
        };
        let progress = counts.progress();
        self.metrics.sql_read_bytes.inc_by(progress.bytes_read);
        let error = result.as_ref().err().map(ToString::to_string).unwrap_or_default();
        tracing::info!(
            target: "gannet_collector::audit",
            who, ?sql, error, rows_read = progress.rows_read, bytes_read = progress.bytes_read, took = ?began.elapsed(),
            "an SQL query ended"
        );
        let last = result
            .map(|more| SqlResponse { message: Some(Message::End(End { progress: Some(progress), more })) });
        let _ = answer.send(last).await;
    }

    async fn answer(
        &self,
        request: SqlRequest,
        counts: &Arc<Counts>,
        answer: &Answer,
    ) -> Result<bool, SqlError> {
        let SqlRequest { sql, max_rows, timeout } = request;
        let Some(objects) = &self.tables else { return Err(SqlError::NoTable) };
        let (max_rows, timeout) = self.limits(&sql, max_rows, timeout)?;
        if self.waiting.fetch_add(1, Ordering::Relaxed) > MAX_WAITING {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(SqlError::Busy);
        }
        let _waiting = Waiting(&self.waiting);
        let permit = Arc::clone(&self.permit).acquire_owned().await.map_err(|_| SqlError::Failed)?;
        let _timer = self.metrics.query_timer("sql");
        let half = self.options.sql_memory_bytes.0 / 2;
        let limits = Limits {
            deadline: Instant::now() + timeout,
            timeout,
            read_bytes: self.options.sql_read_bytes.0,
            memory_bytes: half,
        };
        // Before the tables are read, which may lose the deleted rows meanwhile.
        let store = Arc::clone(&self.store);
        let deleted = tokio::task::spawn_blocking(move || Deleted::new(store));
        let deleted = deleted.await.map_err(|_| SqlError::Failed)?.map_err(TableError::from)?;
        let tables = table::snapshot(objects).await?;
        let scan = Scan::new(tables, deleted, limits, Arc::clone(counts), answer.clone(), Handle::current());
        let running = tokio::task::spawn_blocking(move || {
            // The thread can outlive this function for a moment, and the next query waits for it.
            let _permit = permit;
            run::limit_heap(half);
            run::run(&scan, &sql, max_rows)
        });
        tokio::pin!(running);
        let mut tick = tokio::time::interval(PROGRESS_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                result = &mut running => return result.map_err(|_| SqlError::Failed)?,
                _ = tick.tick() => {
                    // A slow client gets fewer of them.
                    let progress = Message::Progress(counts.progress());
                    drop(answer.try_send(Ok(SqlResponse { message: Some(progress) })));
                }
            }
        }
    }

    /// Returns the maximum of rows and the time of a request.
    fn limits(
        &self,
        sql: &str,
        max_rows: u32,
        timeout: Option<prost_types::Duration>,
    ) -> Result<(usize, Duration), SqlError> {
        if sql.trim().is_empty() {
            return Err(SqlError::Invalid("give one SELECT".to_owned()));
        }
        if sql.len() > MAX_SQL_BYTES {
            return Err(SqlError::Invalid("the query is longer than 64 KiB".to_owned()));
        }
        let most = self.options.sql_max_rows;
        if max_rows > most {
            return Err(SqlError::Invalid(format!(
                "max_rows is {max_rows}, and this collector returns at most {most} rows (--sql-max-rows)"
            )));
        }
        let rows = if max_rows == 0 { DEFAULT_ROWS.min(most) } else { max_rows };
        let most = self.options.sql_timeout.0;
        let timeout = match timeout {
            None => most,
            Some(timeout) => {
                let ms = time::duration_to_ms(&timeout)
                    .ok_or_else(|| SqlError::Invalid("timeout must not be negative".to_owned()))?;
                Duration::from_millis(ms).min(most)
            }
        };
        Ok((rows as usize, timeout))
    }
}
