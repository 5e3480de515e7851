//! The present version of the tables, for queries of this process: files, row groups and columns, read as they are needed.
//!
//! A version keeps its files for `TableOptions::delete_delay` after it was replaced. A query that takes longer may miss one.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use bytes::{Buf as _, Bytes};
use object_store::{ObjectStoreExt as _, path::Path as Key};
use parquet::{
    column::reader::get_column_reader,
    errors::ParquetError,
    file::{
        metadata::{ColumnChunkMetaData, ParquetMetaData, ParquetMetaDataReader},
        reader::{ChunkReader, Length},
        serialized_reader::SerializedPageReader,
        statistics::Statistics,
    },
};
use serde_json::Value;

use super::{
    TableError,
    log::{DataFile, Log},
    partition::Partition,
    rows::{Packed, PackedLeaf, check_columns, damaged, leaf_memory},
    schema::{Column, FRAMES, HOURS, Kind, LABELS, MINUTES, PROFILES, SAMPLES, STACKS, Schema},
};
use crate::store::TableObjects;

/// Bytes at the end of a file that are read for its footer. A larger footer needs a second reading.
const FOOTER_BYTES: u64 = 32 << 10;

/// The smallest and the largest value of a column.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Bounds {
    Longs(i64, i64),
    Texts(Vec<u8>, Vec<u8>),
}

/// A data file of a table.
pub(crate) struct SnapshotFile {
    /// Day of the rows in UTC, like `2026-01-31`.
    pub(crate) date: String,
    /// Hour of that day.
    pub(crate) hour: i64,
    partition: Partition,
    key: Key,
    size: u64,
    stats: Option<String>,
    bounds: OnceLock<Vec<Option<Bounds>>>,
}

/// The files of one version of a table.
pub(crate) struct TableSnapshot {
    schema: &'static Schema,
    objects: TableObjects,
    /// In the order of time.
    pub(crate) files: Vec<SnapshotFile>,
    /// Rows of all files, as far as the log states them.
    pub(crate) rows: u64,
    /// Index of the first leaf of each column.
    firsts: Vec<usize>,
}

/// Reads the logs of all tables. A table that no collector has written yet has no files; a table of sums is left out then.
pub(crate) async fn snapshot(objects: &TableObjects) -> Result<Vec<TableSnapshot>, TableError> {
    let mut tables = Vec::new();
    // Stacks, frames and label sets are committed before the samples that refer to them, so the samples go first here.
    for schema in [&SAMPLES, &MINUTES, &HOURS, &PROFILES, &LABELS, &STACKS, &FRAMES] {
        let mut log = Log::new(schema, objects.clone(), "");
        log.read().await?;
        let is_optional = !schema.sums.is_empty();
        if is_optional && log.next_version() == 0 {
            continue;
        }
        tables.push(TableSnapshot::new(schema, objects.clone(), &log, |_| true));
    }
    Ok(tables)
}

impl SnapshotFile {
    /// Returns the hour of its rows, counted from 1970.
    pub(crate) fn hour_since_1970(&self) -> Option<u64> {
        let date: jiff::civil::Date = self.date.parse().ok()?;
        let at = date.at(self.hour as i8, 0, 0, 0).to_zoned(jiff::tz::TimeZone::UTC).ok()?;
        u64::try_from(at.timestamp().as_second() / 3600).ok()
    }
}

impl TableSnapshot {
    /// Takes the files of the partitions that `keep` accepts.
    pub(super) fn new(
        schema: &'static Schema,
        objects: TableObjects,
        log: &Log,
        keep: impl Fn(Partition) -> bool,
    ) -> Self {
        let mut files: Vec<&DataFile> = log.files.values().filter(|file| keep(file.partition)).collect();
        files.sort_by_key(|file| file.partition);
        let rows = files.iter().filter_map(|file| file.add.rows()).sum();
        let files = files.into_iter().map(|file| {
            let (date, hour) = file.partition.date_and_hour();
            SnapshotFile {
                date,
                hour: hour as i64,
                partition: file.partition,
                key: log.key(&file.add.path),
                size: file.add.size,
                stats: file.add.stats.clone(),
                bounds: OnceLock::new(),
            }
        });
        let files = files.collect();
        let firsts = schema.columns.iter().scan(0, |next, column| {
            let first = *next;
            *next += PackedLeaf::of(column).len();
            Some(first)
        });
        Self { schema, objects, files, rows, firsts: firsts.collect() }
    }

    /// Returns the indexes of the files of an hour, counted from 1970.
    pub(super) fn files_of(&self, hour: u64) -> Range<usize> {
        let first = |hour: u64| self.files.partition_point(|file| file.partition.0 < hour);
        first(hour)..first(hour + 1)
    }

    /// Returns the name of the table.
    pub(crate) fn name(&self) -> &'static str {
        self.schema.name
    }

    /// Reports whether its rows are sums of samples.
    pub(crate) fn has_sums(&self) -> bool {
        !self.schema.sums.is_empty()
    }

    /// Returns the columns without those of the partition.
    pub(crate) fn columns(&self) -> &'static [Column] {
        self.schema.columns
    }

    /// Returns the bounds of a column in a file, as far as the log states them.
    pub(crate) fn file_bounds(&self, file: usize, column: usize) -> Option<&Bounds> {
        let file = &self.files[file];
        file.bounds.get_or_init(|| parse_stats(self.schema, file.stats.as_deref()))[column].as_ref()
    }

    /// Reads the footer of a file. Also returns the number of read bytes.
    pub(crate) async fn footer(&self, file: usize) -> Result<(Footer, u64), TableError> {
        let SnapshotFile { key, size, .. } = &self.files[file];
        // An empty range is none for an object store.
        let (mut wanted, mut read) = (FOOTER_BYTES.min(*size).max(1), 0);
        loop {
            let tail = self.range(key, size.saturating_sub(wanted), wanted).await?;
            read += wanted;
            let mut reader = ParquetMetaDataReader::new();
            match reader.try_parse_sized(&tail, *size) {
                Ok(()) => {
                    let metadata = reader.finish().map_err(|error| broken(key, &error))?;
                    check_columns(self.schema, &metadata).map_err(|error| broken(key, &error))?;
                    return Ok((Footer(metadata), read));
                }
                Err(ParquetError::NeedMoreData(needed))
                    if needed as u64 > wanted && needed as u64 <= *size =>
                {
                    wanted = needed as u64;
                }
                Err(error) => return Err(broken(key, &error)),
            }
        }
    }

    /// Returns the memory that a column of a row group takes at most, in bytes.
    pub(crate) fn column_memory(&self, footer: &Footer, group: usize, column: usize) -> u64 {
        self.leaves(footer, group, column).iter().map(leaf_memory).sum()
    }

    fn leaves<'f>(&self, footer: &'f Footer, group: usize, column: usize) -> &'f [ColumnChunkMetaData] {
        let all = footer.0.row_group(group).columns();
        let end = self.firsts.get(column + 1).copied().unwrap_or(all.len());
        &all[self.firsts[column]..end]
    }

    /// Returns the bounds of a column in a row group, as far as the file states them.
    pub(crate) fn group_bounds(&self, footer: &Footer, group: usize, column: usize) -> Option<Bounds> {
        let [leaf] = self.leaves(footer, group, column) else { return None };
        match leaf.statistics()? {
            Statistics::Int64(of) => Some(Bounds::Longs(*of.min_opt()?, *of.max_opt()?)),
            Statistics::ByteArray(of) => {
                Some(Bounds::Texts(of.min_opt()?.data().to_vec(), of.max_opt()?.data().to_vec()))
            }
            _ => None,
        }
    }

    /// Reads a column of a row group. Also returns the number of read bytes.
    pub(crate) async fn column(
        &self,
        file: usize,
        footer: &Footer,
        group: usize,
        column: usize,
    ) -> Result<(ColumnValues, u64), TableError> {
        let key = &self.files[file].key;
        let rows = footer.rows(group);
        let mut leaves = PackedLeaf::of(&self.schema.columns[column]);
        let mut read = 0;
        for (leaf, of) in leaves.iter_mut().zip(self.leaves(footer, group, column)) {
            let (start, length) = of.byte_range();
            let bytes = self.range(key, start, length).await?;
            read += length;
            let decoded = (|| {
                let pages = SerializedPageReader::new(Arc::new(Part { start, bytes }), of, rows, None)?;
                leaf.read(get_column_reader(of.column_descr_ptr(), Box::new(pages)))?;
                if leaf.is_complete(rows) { Ok(()) } else { Err(damaged("a column has another length")) }
            })();
            decoded.map_err(|error| broken(key, &error))?;
        }
        Ok((ColumnValues { leaves }, read))
    }

    async fn range(&self, key: &Key, start: u64, length: u64) -> Result<Bytes, TableError> {
        let end = start.saturating_add(length);
        match self.objects.objects.get_range(key, start..end).await {
            Ok(bytes) => Ok(bytes),
            Err(object_store::Error::NotFound { .. }) => Err(TableError::Gone(key.to_string())),
            Err(error) => match self.objects.objects.head(key).await {
                Ok(found) if found.size < end => {
                    Err(broken(key, &damaged("it is shorter than the log of the table states")))
                }
                _ => Err(TableError::Object(error)),
            },
        }
    }
}

fn broken(key: &Key, error: &ParquetError) -> TableError {
    TableError::File { file: format!("table/{key}"), reason: error.to_string() }
}

/// Reads the statistics of a file in the log.
fn parse_stats(schema: &Schema, stats: Option<&str>) -> Vec<Option<Bounds>> {
    let stats: Value = stats.and_then(|stats| serde_json::from_str(stats).ok()).unwrap_or_default();
    let bounds = schema.columns.iter().map(|column| {
        let (min, max) = (&stats["minValues"][column.name], &stats["maxValues"][column.name]);
        match column.kind {
            Kind::Long => Some(Bounds::Longs(min.as_i64()?, max.as_i64()?)),
            Kind::Time => {
                let micros = |value: &Value| {
                    value.as_str()?.parse().ok().map(|at: jiff::Timestamp| at.as_microsecond())
                };
                Some(Bounds::Longs(micros(min)?, micros(max)?))
            }
            Kind::Text => Some(Bounds::Texts(min.as_str()?.into(), max.as_str()?.into())),
            _ => None,
        }
    });
    bounds.collect()
}

/// The description of the row groups of a file.
pub(crate) struct Footer(ParquetMetaData);

impl Footer {
    /// Returns the number of row groups.
    pub(crate) fn groups(&self) -> usize {
        self.0.num_row_groups()
    }

    /// Returns the number of rows of a group.
    pub(crate) fn rows(&self, group: usize) -> usize {
        usize::try_from(self.0.row_group(group).num_rows()).unwrap_or(0)
    }

    /// Returns its memory in bytes.
    pub(crate) fn memory(&self) -> u64 {
        self.0.memory_size() as u64
    }
}

/// A part of a file, which its reader addresses by offsets in the file.
struct Part {
    start: u64,
    bytes: Bytes,
}

impl Part {
    fn at(&self, start: u64) -> Result<Bytes, ParquetError> {
        let offset = start.checked_sub(self.start).and_then(|offset| usize::try_from(offset).ok());
        let offset = offset.filter(|offset| *offset <= self.bytes.len());
        Ok(self.bytes.slice(offset.ok_or_else(|| damaged("an offset lies outside of its column"))?..))
    }
}

impl Length for Part {
    fn len(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

impl ChunkReader for Part {
    type T = bytes::buf::Reader<Bytes>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(self.at(start)?.reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let bytes = self.at(start)?;
        if bytes.len() < length {
            return Err(damaged("a page ends outside of its column"));
        }
        Ok(bytes.slice(..length))
    }
}

/// The values of a column of a row group.
pub(crate) struct ColumnValues {
    leaves: Vec<PackedLeaf>,
}

/// One value of a column, or of a list or map.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Datum<'a> {
    Null,
    Long(i64),
    Bool(bool),
    /// A text in UTF-8, or the bytes of a hash.
    Bytes(&'a [u8]),
}

impl ColumnValues {
    /// Returns the value of a row in a column without lists.
    pub(crate) fn get(&self, row: usize) -> Datum<'_> {
        let leaf = &self.leaves[0];
        let at = leaf.span(row);
        if at.is_empty() { Datum::Null } else { datum(leaf, at.start) }
    }

    /// Returns the values of a list, each with [`Datum::Null`], or the keys and values of a map.
    pub(crate) fn list(&self, row: usize) -> impl Iterator<Item = (Datum<'_>, Datum<'_>)> {
        let (first, second) = (&self.leaves[0], self.leaves.get(1));
        let ends = second.map(|second| second.span(row));
        first.span(row).enumerate().map(move |(number, at)| {
            let value = second.zip(ends.as_ref()).map_or(Datum::Null, |(second, span)| {
                let at = span.start + number;
                if at < span.end { datum(second, at) } else { Datum::Null }
            });
            (datum(first, at), value)
        })
    }

    /// Returns the number that [`ColumnValues::text_number`] has for the rows with this text. `None`: no row has it.
    pub(crate) fn number_of(&self, text: &[u8]) -> Option<u32> {
        match &self.leaves[0].values {
            Packed::Texts(texts, _) => texts.get_index_of(text).map(|at| at as u32),
            _ => None,
        }
    }

    /// Returns a number that all rows with the same text share. `None`: NULL, or no text.
    pub(crate) fn text_number(&self, row: usize) -> Option<u32> {
        match &self.leaves[0].values {
            Packed::Texts(_, numbers) => numbers[self.leaves[0].span(row)].first().copied(),
            _ => None,
        }
    }
}

fn datum(leaf: &PackedLeaf, at: usize) -> Datum<'_> {
    match &leaf.values {
        Packed::Texts(texts, numbers) => {
            texts.get_index(numbers[at] as usize).map_or(Datum::Null, |text| Datum::Bytes(text))
        }
        Packed::Longs(values) => Datum::Long(values[at]),
        Packed::Bools(values) => Datum::Bool(values[at]),
    }
}
