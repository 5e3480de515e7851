//! The files that one query reads: row groups by need, with limits of time, bytes and memory.

use std::{
    collections::HashMap,
    future::Future,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use gannet_proto::query as api;
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::mpsc::Sender, time::Instant};

use super::{SqlError, deleted::Deleted};
use crate::table::{ColumnValues, Datum, Footer, TableError, TableSnapshot};

/// Limits of one query.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) deadline: Instant,
    /// The time until the deadline, for error texts.
    pub(super) timeout: Duration,
    pub(super) read_bytes: u64,
    /// Memory of row groups.
    pub(super) memory_bytes: u64,
}

/// Counts of a query under way.
#[derive(Default)]
pub(super) struct Counts {
    pub(super) groups: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) rows: AtomicU64,
}

impl Counts {
    /// Returns the counts as a message.
    pub(super) fn progress(&self) -> api::sql_response::Progress {
        api::sql_response::Progress {
            row_groups_read: self.groups.load(Ordering::Relaxed),
            bytes_read: self.bytes.load(Ordering::Relaxed),
            rows_read: self.rows.load(Ordering::Relaxed),
        }
    }
}

/// The receiver of the answer.
pub(super) type Answer = Sender<Result<api::SqlResponse, SqlError>>;

/// The state of one query. One thread uses it; SQLite wants it to be `Sync`.
pub(super) struct Scan {
    pub(super) tables: Vec<TableSnapshot>,
    pub(super) counts: Arc<Counts>,
    deleted: Deleted,
    limits: Limits,
    runtime: Handle,
    answer: Answer,
    /// Why the query ended. SQLite passes on only texts.
    fault: Mutex<Option<SqlError>>,
    cache: Mutex<Cache>,
}

/// A row group, whose columns are read by need.
pub(super) struct Block {
    pub(super) table: usize,
    pub(super) file: usize,
    pub(super) rows: usize,
    group: usize,
    footer: Arc<Footer>,
    columns: Vec<OnceLock<ColumnValues>>,
    /// Rows by the values of a column with numbers, sorted by both.
    longs: OnceLock<Vec<(i64, u32)>>,
    /// Rows by the text numbers of a column, sorted by both.
    texts: OnceLock<Vec<(u32, u32)>>,
    /// Rows of deleted profiles, in order.
    deleted: OnceLock<Vec<u32>>,
}

/// A cached value with its memory and the time of its last use.
struct Entry<T> {
    value: Arc<T>,
    bytes: u64,
    used: u64,
}

#[derive(Default)]
struct Cache {
    /// By table and file.
    footers: HashMap<(usize, usize), Entry<Footer>>,
    /// By table, file and row group.
    blocks: HashMap<(usize, usize, usize), Entry<Block>>,
    bytes: u64,
    clock: u64,
}

impl Scan {
    pub(super) fn new(
        tables: Vec<TableSnapshot>,
        deleted: Deleted,
        limits: Limits,
        counts: Arc<Counts>,
        answer: Answer,
        runtime: Handle,
    ) -> Arc<Self> {
        Arc::new(Self {
            tables,
            counts,
            deleted,
            limits,
            runtime,
            answer,
            fault: Mutex::default(),
            cache: Mutex::default(),
        })
    }

    /// Notes why the query ends, and returns an error for SQLite.
    pub(super) fn fail(&self, error: SqlError) -> rusqlite::Error {
        let text = error.to_string();
        self.fault.lock().get_or_insert(error);
        rusqlite::Error::ModuleError(text)
    }

    /// Returns why the query ended, if a part of this module ended it.
    pub(super) fn take_fault(&self) -> Option<SqlError> {
        self.fault.lock().take()
    }

    /// Fails if the time is over or the client has gone.
    pub(super) fn check(&self) -> Result<(), SqlError> {
        if self.answer.is_closed() {
            return Err(SqlError::Left);
        }
        if Instant::now() >= self.limits.deadline {
            return Err(self.overdue());
        }
        Ok(())
    }

    /// Reports whether SQLite must stop, and notes why.
    pub(super) fn must_stop(&self) -> bool {
        match self.check() {
            Ok(()) => false,
            Err(error) => {
                self.fault.lock().get_or_insert(error);
                true
            }
        }
    }

    fn overdue(&self) -> SqlError {
        SqlError::Limit(format!(
            "the query takes longer than {}; select less by date, hour, service_name and type, or raise --sql-timeout",
            gannet_base::TimeSpan(self.limits.timeout)
        ))
    }

    /// Waits for a result, at most until the deadline or the departure of the client.
    fn wait<T>(&self, result: impl Future<Output = Result<T, SqlError>>) -> Result<T, SqlError> {
        self.runtime.block_on(async {
            tokio::select! {
                () = self.answer.closed() => Err(SqlError::Left),
                result = tokio::time::timeout_at(self.limits.deadline, result) => {
                    result.unwrap_or_else(|_| Err(self.overdue()))
                }
            }
        })
    }

    /// Sends a message to the client. Waits while the client is slower than the query.
    pub(super) fn send(&self, message: api::sql_response::Message) -> Result<(), SqlError> {
        let message = Ok(api::SqlResponse { message: Some(message) });
        self.wait(async { self.answer.send(message).await.map_err(|_| SqlError::Left) })
    }

    /// Reads a part of a table, and counts its bytes.
    fn read<T>(&self, part: impl Future<Output = Result<(T, u64), TableError>>) -> Result<T, SqlError> {
        self.check()?;
        let (value, bytes) = self.wait(async { part.await.map_err(SqlError::Table) })?;
        let read = self.counts.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if read > self.limits.read_bytes {
            return Err(SqlError::Limit(format!(
                "the query reads more than {}; select less by date, hour, service_name and type, or raise --sql-read-bytes",
                gannet_base::ByteSize(self.limits.read_bytes)
            )));
        }
        Ok(value)
    }

    /// Makes room for some memory. Drops row groups that were not used for the longest time.
    fn reserve(&self, bytes: u64) -> Result<(), SqlError> {
        let limit = self.limits.memory_bytes;
        let mut cache = self.cache.lock();
        if cache.bytes + bytes > limit {
            cache.shrink((limit / 4 * 3).min(limit.saturating_sub(bytes)));
        }
        if cache.bytes + bytes > limit {
            return Err(SqlError::Limit(
                "the query needs more memory for the rows of the tables than half of --sql-memory-bytes; join fewer tables, or raise \
                 it"
                .to_owned(),
            ));
        }
        cache.bytes += bytes;
        Ok(())
    }

    /// Returns the footer of a file.
    pub(super) fn footer(&self, table: usize, file: usize) -> Result<Arc<Footer>, SqlError> {
        if let Some(footer) = self.cache.lock().footer((table, file)) {
            return Ok(footer);
        }
        let footer = Arc::new(self.read(self.tables[table].footer(file))?);
        let bytes = footer.memory();
        self.reserve(bytes)?;
        let mut cache = self.cache.lock();
        let used = cache.tick();
        cache.footers.insert((table, file), Entry { value: Arc::clone(&footer), bytes, used });
        Ok(footer)
    }

    /// Returns a row group, without reading its columns.
    pub(super) fn block(
        &self,
        table: usize,
        file: usize,
        footer: &Arc<Footer>,
        group: usize,
    ) -> Result<Arc<Block>, SqlError> {
        let key = (table, file, group);
        if let Some(block) = self.cache.lock().block(key) {
            return Ok(block);
        }
        self.check()?;
        let columns = self.tables[table].columns().iter().map(|_| OnceLock::new()).collect();
        let rows = footer.rows(group);
        let block = Arc::new(Block {
            table,
            file,
            rows,
            group,
            footer: Arc::clone(footer),
            columns,
            longs: OnceLock::new(),
            texts: OnceLock::new(),
            deleted: OnceLock::new(),
        });
        self.counts.groups.fetch_add(1, Ordering::Relaxed);
        self.counts.rows.fetch_add(rows as u64, Ordering::Relaxed);
        let mut cache = self.cache.lock();
        let used = cache.tick();
        cache.blocks.insert(key, Entry { value: Arc::clone(&block), bytes: 0, used });
        Ok(block)
    }

    /// Returns the rows of a row group whose profiles are deleted, in order.
    pub(super) fn deleted<'b>(&self, block: &'b Block) -> Result<&'b [u32], SqlError> {
        if let Some(rows) = block.deleted.get() {
            return Ok(rows);
        }
        let rows = match self.deleted.column_of(&self.tables[block.table], block.file)? {
            Some(column) => self.deleted.rows(self.column(block, column)?, block.rows)?,
            None => Vec::new(),
        };
        self.grow(block, 4 * rows.len() as u64)?;
        Ok(block.deleted.get_or_init(|| rows))
    }

    /// Returns the values of a column of a row group.
    pub(super) fn column<'b>(&self, block: &'b Block, column: usize) -> Result<&'b ColumnValues, SqlError> {
        let cell = &block.columns[column];
        if let Some(values) = cell.get() {
            return Ok(values);
        }
        let Block { table, file, group, footer, .. } = block;
        let of = &self.tables[*table];
        self.grow(block, of.column_memory(footer, *group, column))?;
        let values = self.read(of.column(*file, footer, *group, column))?;
        Ok(cell.get_or_init(|| values))
    }

    /// Reserves memory for a row group that is in use.
    fn grow(&self, block: &Block, bytes: u64) -> Result<(), SqlError> {
        self.reserve(bytes)?;
        let mut cache = self.cache.lock();
        match cache.blocks.get_mut(&(block.table, block.file, block.group)) {
            Some(entry) => entry.bytes += bytes,
            // It cannot be counted with its block, which the cache has dropped.
            None => cache.bytes -= bytes,
        }
        Ok(())
    }

    /// Returns the rows of a row group that have this number in a column.
    pub(super) fn rows_with_long(
        &self,
        block: &Block,
        column: usize,
        key: i64,
    ) -> Result<Vec<u32>, SqlError> {
        let index = if let Some(index) = block.longs.get() {
            index
        } else {
            let values = self.column(block, column)?;
            self.grow(block, 16 * block.rows as u64)?;
            let number = |row| match values.get(row) {
                Datum::Long(value) => Some((value, row as u32)),
                _ => None,
            };
            let mut index: Vec<(i64, u32)> = (0..block.rows).filter_map(number).collect();
            index.sort_unstable();
            block.longs.get_or_init(|| index)
        };
        Ok(rows_with(index, key))
    }

    /// Returns the rows of a row group that have this text in a column.
    pub(super) fn rows_with_text(
        &self,
        block: &Block,
        column: usize,
        key: &[u8],
    ) -> Result<Vec<u32>, SqlError> {
        let values = self.column(block, column)?;
        let index = if let Some(index) = block.texts.get() {
            index
        } else {
            self.grow(block, 8 * block.rows as u64)?;
            let number = |row| values.text_number(row).map(|number| (number, row as u32));
            let mut index: Vec<(u32, u32)> = (0..block.rows).filter_map(number).collect();
            index.sort_unstable();
            block.texts.get_or_init(|| index)
        };
        Ok(values.number_of(key).map(|number| rows_with(index, number)).unwrap_or_default())
    }
}

/// Returns the second parts of all pairs with this first part.
fn rows_with<K: Ord + Copy>(index: &[(K, u32)], key: K) -> Vec<u32> {
    let from = index.partition_point(|(other, _)| *other < key);
    index[from..].iter().take_while(|(other, _)| *other == key).map(|(_, row)| *row).collect()
}

impl Cache {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn footer(&mut self, key: (usize, usize)) -> Option<Arc<Footer>> {
        let used = self.tick();
        let entry = self.footers.get_mut(&key)?;
        entry.used = used;
        Some(Arc::clone(&entry.value))
    }

    fn block(&mut self, key: (usize, usize, usize)) -> Option<Arc<Block>> {
        let used = self.tick();
        let entry = self.blocks.get_mut(&key)?;
        entry.used = used;
        Some(Arc::clone(&entry.value))
    }

    /// Drops what no cursor uses, the oldest first, until the rest takes at most this memory.
    fn shrink(&mut self, limit: u64) {
        let mut ages: Vec<(u64, u64)> = unused(&self.blocks).chain(unused(&self.footers)).collect();
        ages.sort_unstable();
        let mut last = 0;
        for (used, bytes) in ages {
            if self.bytes <= limit {
                break;
            }
            self.bytes -= bytes;
            last = used;
        }
        // The blocks go last: a dropped block would make its footer unused, which was not counted above.
        self.footers.retain(|_, entry| entry.used > last || Arc::strong_count(&entry.value) > 1);
        self.blocks.retain(|_, entry| entry.used > last || Arc::strong_count(&entry.value) > 1);
    }
}

/// Returns the last use and the memory of all entries that only the cache has.
fn unused<K, T>(entries: &HashMap<K, Entry<T>>) -> impl Iterator<Item = (u64, u64)> {
    entries
        .values()
        .filter(|entry| Arc::strong_count(&entry.value) == 1)
        .map(|entry| (entry.used, entry.bytes))
}
