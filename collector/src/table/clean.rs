//! Removes the rows of deleted profiles from the tables.
//!
//! The tables of profiles and samples name the profile of each row, so their files are written again without the rows of deleted
//! ones. The sums do not, so those of the hour are added up again from its samples. Each table changes in one commit for an hour,
//! which keeps the names of the segments: a file without rows holds them, if no other file can. A crash between two commits leaves
//! an hour for the next attempt. Stacks, frames and label sets stay until retention removes the hour: they name no profile, and other
//! profiles can share them.

use std::collections::{BTreeMap, HashSet};

use parquet::data_type::ByteArray;
use ulid::Ulid;

use super::{
    TableError,
    action::{Action, Add},
    file::{Cell, FileWriter, ParquetFile, Rows},
    ids::GROUP_ROWS,
    log::{Committed, DataFile, Log},
    merge::add_segments,
    partition::Partition,
    rows::{DataReader, LoadedRows},
    schema::{HOURS, MINUTES, SAMPLES, Schema, UNKNOWN_GUESS},
    tables::{Rollups, Tables},
};
use crate::store::Store;

/// Microseconds of a minute.
const MINUTE_US: i64 = 60_000_000;
/// Rows of samples whose sums are one file.
const SUM_ROWS: usize = 1 << 20;
/// Number of attempts to commit, while other writers commit first.
const MAX_CONFLICTS: usize = 100;
/// Deleted batches of an hour that are counted to see whether there are new ones.
const MAX_COUNTED: usize = 1 << 24;

/// The hours of which this process has removed all deleted rows, with the number of deleted batches by then.
#[derive(Default)]
pub(super) struct Cleaning {
    done: BTreeMap<u64, usize>,
}

impl Cleaning {
    /// Removes the rows of deleted profiles, and tells the store when no table has any. Does nothing without a deletion.
    pub(super) fn run(&mut self, store: &Store, tables: &mut Tables) -> Result<(), TableError> {
        let Some(changes) = store.unclean_tables() else {
            self.done.clear();
            return Ok(store.mark_clean_tables()?);
        };
        let runtime = tables.runtime.clone();
        for hour in store.deleted_hours()? {
            let deleted = store.count_deleted(hour, MAX_COUNTED)?;
            if self.done.get(&hour) == Some(&deleted) {
                continue;
            }
            let partition = Partition(hour);
            if !runtime.block_on(clean_hour(store, tables, partition))? {
                tracing::debug!(hour, "the sums of an hour with deleted profiles wait for the samples");
                return Ok(());
            }
            self.done.insert(hour, deleted);
        }
        store.set_tables_clean(changes);
        Ok(())
    }
}

/// Removes the deleted rows of an hour. Returns false if the sums of its samples are not complete yet.
async fn clean_hour(store: &Store, tables: &mut Tables, hour: Partition) -> Result<bool, TableError> {
    // Samples first: without its profile, a sample has no labels.
    filter(store, &mut tables.samples, hour).await?;
    filter(store, &mut tables.profiles, hour).await?;
    match &mut tables.rollups {
        Some(Rollups { minutes, hours }) => {
            for log in [minutes, hours] {
                if !has_same_segments(&tables.samples, log) {
                    return Ok(false);
                }
                add_up(&tables.samples, log, hour).await?;
            }
        }
        // Those of an earlier run are out of date anyway.
        None => {
            for schema in [&MINUTES, &HOURS] {
                let mut log = tables.open(schema);
                log.read().await?;
                let sources = log.files_of(hour);
                if !sources.is_empty() {
                    swap(&mut log, &sources, Vec::new()).await?;
                }
            }
        }
    }
    Ok(true)
}

/// Reports whether two tables have the rows of the same segments.
fn has_same_segments(a: &Log, b: &Log) -> bool {
    let of = |log: &Log| log.taken_from(Ulid(0)).collect::<HashSet<Ulid>>();
    of(a) == of(b)
}

/// Opens a file of a table and checks it.
async fn open(log: &Log, file: &DataFile) -> Result<DataReader, TableError> {
    let fault = |reason: String| TableError::File { file: log.key(&file.add.path).to_string(), reason };
    let bytes = log.read_file(&file.add.path).await?.ok_or_else(|| fault("it is missing".to_owned()))?;
    if !file.add.has_content(&bytes) {
        return Err(fault("its size or its checksum is not that of the log".to_owned()));
    }
    DataReader::open(log.schema, bytes).map_err(|error| fault(error.to_string()))
}

/// Writes the files of an hour again without the rows of deleted profiles, in one commit.
async fn filter(store: &Store, log: &mut Log, hour: Partition) -> Result<(), TableError> {
    let (mut sources, mut adds) = (Vec::new(), Vec::new());
    for file in log.files_of(hour) {
        let reader = open(log, &file).await?;
        let Some(kept) = without_deleted(store, log.schema, &reader)? else { continue };
        if kept.rows > 0 || !file.segments.is_empty() {
            let mut add = log.put_file(hour, kept, true).await?;
            add_segments(&mut add, std::slice::from_ref(&file));
            adds.push(add);
        }
        sources.push(file);
    }
    if sources.is_empty() { Ok(()) } else { swap(log, &sources, adds).await }
}

/// Returns the rows of a file without those of deleted profiles, or `None` if there is none of a deleted one.
fn without_deleted(
    store: &Store,
    schema: &'static Schema,
    reader: &DataReader,
) -> Result<Option<ParquetFile>, TableError> {
    let mut file = FileWriter::merged(schema).map_err(TableError::Parquet)?;
    let mut is_changed = false;
    for group in 0..reader.groups() {
        let mut rows = LoadedRows::new(schema);
        rows.add_group(reader, group).map_err(TableError::Parquet)?;
        let ids = rows.texts("profile_id");
        let parsed: Vec<Ulid> = ids.iter().map(|id| parse_id(id)).collect();
        let deleted = store.are_deleted(&parsed)?;
        let kept: Vec<u32> = (0..rows.len() as u32)
            .filter(|row| {
                let number = rows.text_number("profile_id", *row);
                !number.is_some_and(|number| deleted[number as usize])
            })
            .collect();
        is_changed |= kept.len() < rows.len();
        file.write(rows.take(&kept)).map_err(TableError::Parquet)?;
    }
    if !is_changed {
        return Ok(None);
    }
    file.finish().map(Some).map_err(TableError::Parquet)
}

/// Returns the id in a text, or one that no profile has.
fn parse_id(text: &[u8]) -> Ulid {
    std::str::from_utf8(text).ok().and_then(|text| Ulid::from_string(text).ok()).unwrap_or(Ulid(0))
}

/// Replaces the sums of an hour by those of its samples, in one commit.
async fn add_up(samples: &Log, log: &mut Log, hour: Partition) -> Result<(), TableError> {
    let sources = log.files_of(hour);
    let mut adds = Vec::new();
    for file in samples.files_of(hour) {
        let reader = open(samples, &file).await?;
        let mut group = 0;
        while group < reader.groups() {
            let mut waiting = FileWriter::new(log.schema).map_err(TableError::Parquet)?;
            let mut count = 0;
            while group < reader.groups() && count < SUM_ROWS {
                let mut rows = LoadedRows::new(&SAMPLES);
                rows.add_group(&reader, group).map_err(TableError::Parquet)?;
                count += rows.len();
                group += 1;
                for part in project(&rows, log.schema) {
                    waiting.write(part).map_err(TableError::Parquet)?;
                }
            }
            let waiting = waiting.finish().map_err(TableError::Parquet)?;
            let mut sums = LoadedRows::new(log.schema);
            let added = DataReader::open(log.schema, waiting.bytes.into()).and_then(|file| sums.add(&file));
            added.map_err(TableError::Parquet)?;
            let sums = sums.write().map_err(TableError::Parquet)?;
            if sums.rows > 0 {
                adds.push(log.put_file(hour, sums, true).await?);
            }
        }
    }
    let has_names = sources.iter().any(|file| !file.segments.is_empty());
    if adds.is_empty() && has_names {
        let empty = FileWriter::merged(log.schema).and_then(FileWriter::finish);
        adds.push(log.put_file(hour, empty.map_err(TableError::Parquet)?, true).await?);
    }
    if let Some(last) = adds.last_mut() {
        add_segments(last, &sources);
    }
    if sources.is_empty() && adds.is_empty() { Ok(()) } else { swap(log, &sources, adds).await }
}

/// Returns the columns of samples that a table of sums has, as its rows.
fn project(samples: &LoadedRows, schema: &'static Schema) -> Vec<Rows> {
    let is_by_minute = schema.name == MINUTES.name;
    let numbers: Vec<u32> = (0..samples.len() as u32).collect();
    let texts =
        |name| -> Vec<ByteArray> { samples.texts(name).iter().cloned().map(ByteArray::from).collect() };
    let (services, kinds) = (texts("service_name"), texts("type"));
    let (namespaces, pods) = (texts("namespace"), texts("pod"));
    let text = |of: &'_ [ByteArray], name, row| -> Option<usize> {
        samples.text_number(name, row).map(|number| number as usize).filter(|number| *number < of.len())
    };
    let long = |name, row| samples.long(name, row).map_or(Cell::Null, Cell::Long);
    let chunks = numbers.chunks(GROUP_ROWS).map(|chunk| {
        let mut rows = Rows::new(schema);
        for row in chunk.iter().copied() {
            fn cell(of: &[ByteArray], at: Option<usize>) -> Cell<'_> {
                at.map_or(Cell::Null, |at| Cell::Text(&of[at]))
            }
            let service = cell(&services, text(&services, "service_name", row));
            let kind = cell(&kinds, text(&kinds, "type", row));
            let [stack, value, count] = ["stack_id", "value", "count"].map(|name| long(name, row));
            // The guess is in the labels of the sample, which are in another table.
            let guessed =
                Cell::Long(if samples.long("labels_id", row).is_some() { UNKNOWN_GUESS } else { 0 });
            if is_by_minute {
                let time = samples.long("time", row).unwrap_or(0);
                let time = Cell::Long(time.div_euclid(MINUTE_US) * MINUTE_US);
                rows.push([time, service, kind, stack, value, count, guessed]);
            } else {
                let namespace = cell(&namespaces, text(&namespaces, "namespace", row));
                let pod = cell(&pods, text(&pods, "pod", row));
                rows.push([service, namespace, pod, kind, stack, value, count, guessed]);
            }
        }
        rows
    });
    chunks.collect()
}

/// Commits files in place of others. If another writer has removed one of the others, fails, and the next attempt begins again.
async fn swap(log: &mut Log, sources: &[DataFile], adds: Vec<Add>) -> Result<(), TableError> {
    for _ in 0..MAX_CONFLICTS {
        if !sources.iter().all(|file| log.files.contains_key(&file.add.path)) {
            break;
        }
        let removes =
            sources.iter().map(|file| Action { remove: Some(file.add.removal(true)), ..Action::default() });
        let new = adds.iter().map(|add| Action { add: Some(add.clone()), ..Action::default() });
        if log.commit("DELETE", removes.chain(new).collect()).await? == Committed::Done {
            return Ok(());
        }
    }
    for add in &adds {
        log.drop_file(add).await;
    }
    Err(TableError::Contended)
}

impl Log {
    /// Returns the files of an hour.
    fn files_of(&self, hour: Partition) -> Vec<DataFile> {
        self.files.values().filter(|file| file.partition == hour).cloned().collect()
    }
}
