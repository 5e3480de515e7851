//! Parquet files of a table.

use std::sync::Arc;

use parquet::{
    basic::{Compression, Encoding, ZstdLevel},
    data_type::{BoolType, ByteArray, ByteArrayType, Int32Type, Int64Type},
    errors::ParquetError,
    file::{
        properties::{DeltaBinaryPackedEncoderOptions, WriterProperties, WriterPropertiesBuilder},
        writer::SerializedFileWriter,
    },
    schema::{
        parser::parse_message_type,
        types::{ColumnPath, TypePtr},
    },
};
use serde_json::{Map, Value, json};

use super::schema::{Column, Kind, Schema};

/// Compression level of new files, which a merge replaces soon.
const ZSTD_LEVEL: i32 = 3;
/// Compression level of merged files: some percent smaller than with level 3.
const MERGED_ZSTD_LEVEL: i32 = 9;
/// Length of a text in a range of the log, in bytes.
const MAX_RANGE_BYTES: usize = 64;

/// Values of one column of a Parquet file.
pub(super) enum Values {
    Bytes(Vec<ByteArray>),
    Longs(Vec<i64>),
    Ints(Vec<i32>),
    Bools(Vec<bool>),
}

/// One column of a Parquet file. A map is two of them.
pub(super) struct Leaf {
    pub(super) values: Values,
    /// For each row or element, how much of its path is there. Empty for a column without gaps.
    pub(super) defined: Vec<i16>,
    /// For each element: 0 for the first one of a row. Empty for a column without lists.
    pub(super) repeated: Vec<i16>,
}

impl Leaf {
    pub(super) fn new(values: Values) -> Self {
        Self { values, defined: Vec::new(), repeated: Vec::new() }
    }

    fn bytes(&mut self, value: ByteArray) {
        if let Values::Bytes(values) = &mut self.values {
            values.push(value);
        }
    }

    fn long(&mut self, value: i64) {
        if let Values::Longs(values) = &mut self.values {
            values.push(value);
        }
    }

    /// Notes the elements of a list or map.
    pub(super) fn elements(&mut self, n: usize) {
        if n == 0 {
            self.defined.push(0);
            self.repeated.push(0);
        }
        for index in 0..n {
            self.defined.push(1);
            self.repeated.push(i16::from(index > 0));
        }
    }
}

/// One value of a row.
pub(super) enum Cell<'a> {
    Text(&'a ByteArray),
    Long(i64),
    Bool(bool),
    Longs(&'a [i64]),
    Texts(&'a [ByteArray]),
    TextMap(&'a [(ByteArray, ByteArray)]),
    LongMap(&'a [(ByteArray, i64)]),
    Null,
}

/// The rows of one row group, column by column.
pub(super) struct Rows {
    schema: &'static Schema,
    leaves: Vec<Leaf>,
    /// Index of the first leaf of each column.
    firsts: Vec<usize>,
    len: usize,
}

impl Rows {
    pub(super) fn new(schema: &'static Schema) -> Self {
        let (mut leaves, mut firsts) = (Vec::new(), Vec::new());
        for column in schema.columns {
            firsts.push(leaves.len());
            let values = match column.kind {
                Kind::Text | Kind::Hash | Kind::Texts | Kind::TextMap | Kind::LongMap => {
                    Values::Bytes(Vec::new())
                }
                Kind::Long | Kind::Time | Kind::Longs => Values::Longs(Vec::new()),
                Kind::Bool => Values::Bools(Vec::new()),
            };
            leaves.push(Leaf::new(values));
            match column.kind {
                Kind::TextMap => leaves.push(Leaf::new(Values::Bytes(Vec::new()))),
                Kind::LongMap => leaves.push(Leaf::new(Values::Longs(Vec::new()))),
                _ => {}
            }
        }
        Self { schema, leaves, firsts, len: 0 }
    }

    /// Builds rows from their leaves, in the order of the columns.
    pub(super) fn from_leaves(schema: &'static Schema, leaves: Vec<Leaf>, len: usize) -> Self {
        Self { leaves, len, ..Self::new(schema) }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Adds a row with a cell for each column, in order.
    pub(super) fn push<const N: usize>(&mut self, cells: [Cell<'_>; N]) {
        debug_assert_eq!(N, self.schema.columns.len());
        self.len += 1;
        for ((cell, &first), column) in cells.into_iter().zip(&self.firsts).zip(self.schema.columns) {
            let leaf = &mut self.leaves[first];
            if column.is_optional {
                leaf.defined.push(i16::from(!matches!(cell, Cell::Null)));
            }
            match cell {
                Cell::Null => {}
                Cell::Text(text) => leaf.bytes(text.clone()),
                Cell::Long(value) => leaf.long(value),
                Cell::Bool(value) => {
                    if let Values::Bools(values) = &mut leaf.values {
                        values.push(value);
                    }
                }
                Cell::Longs(list) => {
                    leaf.elements(list.len());
                    for value in list {
                        leaf.long(*value);
                    }
                }
                Cell::Texts(list) => {
                    leaf.elements(list.len());
                    for text in list {
                        leaf.bytes(text.clone());
                    }
                }
                Cell::TextMap(map) => {
                    for (at, pick) in [(first, 0), (first + 1, 1)] {
                        let leaf = &mut self.leaves[at];
                        leaf.elements(map.len());
                        for (key, value) in map {
                            leaf.bytes([key, value][pick].clone());
                        }
                    }
                }
                Cell::LongMap(map) => {
                    leaf.elements(map.len());
                    for (key, _) in map {
                        leaf.bytes(key.clone());
                    }
                    let leaf = &mut self.leaves[first + 1];
                    leaf.elements(map.len());
                    for (_, value) in map {
                        leaf.long(*value);
                    }
                }
            }
        }
    }
}

/// Smallest and largest value of a column.
#[derive(Clone, Debug, PartialEq)]
enum Range {
    Longs(i64, i64),
    Texts(ByteArray, ByteArray),
}

/// A Parquet file in memory while it is written.
pub(super) struct FileWriter {
    schema: &'static Schema,
    writer: SerializedFileWriter<Vec<u8>>,
    ranges: Vec<Option<Range>>,
    rows: usize,
}

/// A complete Parquet file.
pub(super) struct ParquetFile {
    pub(super) bytes: Vec<u8>,
    pub(super) rows: u64,
    /// Statistics, as an action of the log holds them.
    pub(super) stats: String,
}

impl FileWriter {
    /// Starts a file of new rows.
    pub(super) fn new(schema: &'static Schema) -> Result<Self, ParquetError> {
        Self::with_level(schema, ZSTD_LEVEL)
    }

    /// Starts a file that replaces others.
    pub(super) fn merged(schema: &'static Schema) -> Result<Self, ParquetError> {
        Self::with_level(schema, MERGED_ZSTD_LEVEL)
    }

    fn with_level(schema: &'static Schema, level: i32) -> Result<Self, ParquetError> {
        let parsed: TypePtr = Arc::new(parse_message_type(&schema.parquet())?);
        let mut properties = properties(level)?;
        // The ids of stacks ascend within a profile, and jump back after it and between commits. A jump widens all values of its
        // block, so a block has only 32 values here.
        let small_blocks = DeltaBinaryPackedEncoderOptions::try_new(128, 4)?;
        for column in schema.columns {
            let path = ColumnPath::from(column.name);
            if column.is_ascending {
                properties = properties
                    .set_column_dictionary_enabled(path.clone(), false)
                    .set_column_encoding(path.clone(), Encoding::DELTA_BINARY_PACKED)
                    .set_column_delta_binary_packed_encoder_options(path, small_blocks);
            } else if column.kind == Kind::Hash {
                // Each value occurs once, so a dictionary saves nothing.
                properties = properties.set_column_dictionary_enabled(path, false);
            }
        }
        let writer = SerializedFileWriter::new(Vec::new(), parsed, Arc::new(properties.build()))?;
        Ok(Self { schema, writer, ranges: schema.columns.iter().map(|_| None).collect(), rows: 0 })
    }

    /// Writes rows as one row group.
    pub(super) fn write(&mut self, rows: Rows) -> Result<(), ParquetError> {
        if rows.len() == 0 {
            return Ok(());
        }
        for ((column, first), range) in self.schema.columns.iter().zip(&rows.firsts).zip(&mut self.ranges) {
            if column.has_range {
                widen(range, &rows.leaves[*first].values);
            }
        }
        self.rows += rows.len();
        write_group(&mut self.writer, rows.leaves)
    }

    pub(super) fn finish(self) -> Result<ParquetFile, ParquetError> {
        let Self { schema, writer, ranges, rows } = self;
        let bytes = writer.into_inner()?;
        Ok(ParquetFile { bytes, rows: rows as u64, stats: stats(schema.columns, &ranges, rows) })
    }
}

/// Writes one row group.
pub(super) fn write_group(
    writer: &mut SerializedFileWriter<Vec<u8>>,
    leaves: Vec<Leaf>,
) -> Result<(), ParquetError> {
    let mut group = writer.next_row_group()?;
    for Leaf { values, defined, repeated } in leaves {
        let Some(mut column) = group.next_column()? else { break };
        let defined = (!defined.is_empty()).then_some(&defined[..]);
        let repeated = (!repeated.is_empty()).then_some(&repeated[..]);
        match values {
            Values::Bytes(values) => {
                column.typed::<ByteArrayType>().write_batch(&values, defined, repeated)?
            }
            Values::Longs(values) => column.typed::<Int64Type>().write_batch(&values, defined, repeated)?,
            Values::Ints(values) => column.typed::<Int32Type>().write_batch(&values, defined, repeated)?,
            Values::Bools(values) => column.typed::<BoolType>().write_batch(&values, defined, repeated)?,
        };
        column.close()?;
    }
    group.close()?;
    Ok(())
}

fn properties(level: i32) -> Result<WriterPropertiesBuilder, ParquetError> {
    let compression = Compression::ZSTD(ZstdLevel::try_new(level)?);
    let by = concat!("gannet-collector ", env!("CARGO_PKG_VERSION"));
    Ok(WriterProperties::builder().set_compression(compression).set_created_by(by.into()))
}

/// Starts a file with a schema other than that of a table.
pub(super) fn untyped_writer(schema: TypePtr) -> Result<SerializedFileWriter<Vec<u8>>, ParquetError> {
    SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties(ZSTD_LEVEL)?.build()))
}

fn widen(range: &mut Option<Range>, values: &Values) {
    let new = match values {
        Values::Longs(values) => {
            values.iter().min().zip(values.iter().max()).map(|(min, max)| Range::Longs(*min, *max))
        }
        Values::Bytes(values) => {
            let by = |a: &&ByteArray, b: &&ByteArray| a.data().cmp(b.data());
            let (min, max) = (values.iter().min_by(by), values.iter().max_by(by));
            min.zip(max).map(|(min, max)| Range::Texts(min.clone(), max.clone()))
        }
        Values::Ints(_) | Values::Bools(_) => None,
    };
    *range = match (range.take(), new) {
        (Some(Range::Longs(a, b)), Some(Range::Longs(c, d))) => Some(Range::Longs(a.min(c), b.max(d))),
        (Some(Range::Texts(a, b)), Some(Range::Texts(c, d))) => {
            let min = if a.data() <= c.data() { a } else { c };
            let max = if b.data() >= d.data() { b } else { d };
            Some(Range::Texts(min, max))
        }
        (None, new) => new,
        (old, _) => old,
    };
}

/// Returns the statistics of a file in JSON, as the protocol of Delta defines them.
fn stats(columns: &[Column], ranges: &[Option<Range>], rows: usize) -> String {
    let (mut min, mut max, mut nulls) = (Map::new(), Map::new(), Map::new());
    for (column, range) in columns.iter().zip(ranges) {
        let Some((low, high)) = range.as_ref().and_then(|range| bounds(column.kind, range)) else { continue };
        min.insert(column.name.into(), low);
        max.insert(column.name.into(), high);
        nulls.insert(column.name.into(), 0.into());
    }
    json!({"numRecords": rows, "minValues": min, "maxValues": max, "nullCount": nulls}).to_string()
}

/// Returns both ends of a range in JSON, or `None` for one that the log cannot hold.
fn bounds(kind: Kind, range: &Range) -> Option<(Value, Value)> {
    match range {
        // Both are whole milliseconds, the precision of the log.
        Range::Longs(min, max) if kind == Kind::Time => Some((timestamp(*min)?, timestamp(*max)?)),
        Range::Longs(min, max) => Some(((*min).into(), (*max).into())),
        Range::Texts(min, max) => {
            let text = |bytes: &ByteArray| {
                let text = bytes.as_utf8().ok().filter(|text| text.len() <= MAX_RANGE_BYTES)?;
                Some(Value::from(text))
            };
            Some((text(min)?, text(max)?))
        }
    }
}

fn timestamp(micros: i64) -> Option<Value> {
    let at = jiff::Timestamp::from_microsecond(micros).ok()?;
    Some(at.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string().into())
}
