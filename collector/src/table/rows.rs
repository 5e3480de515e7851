//! Rows of several files in memory, to sort them and write them as one file.

use std::{cmp::Ordering, ops::Range, sync::Arc};

use bytes::Bytes;
use indexmap::IndexSet;
use parquet::{
    column::reader::{ColumnReader, ColumnReaderImpl},
    data_type::{ByteArray, DataType},
    errors::ParquetError,
    file::{
        metadata::{ColumnChunkMetaData, ParquetMetaData, RowGroupMetaData},
        reader::FileReader as _,
        serialized_reader::SerializedFileReader,
    },
    schema::{parser::parse_message_type, types::SchemaDescriptor},
};

use super::{
    file::{FileWriter, Leaf, ParquetFile, Rows, Values},
    ids::GROUP_ROWS,
    schema::{Column, Kind, Schema},
};

/// Number of rows that one call decodes.
const BATCH_ROWS: usize = 8192;

/// The distinct texts of a column.
pub(super) type Texts = IndexSet<Vec<u8>, foldhash::fast::RandomState>;

/// The values of one leaf.
pub(super) enum Packed {
    /// Indexes into the distinct texts.
    Texts(Texts, Vec<u32>),
    Longs(Vec<i64>),
    Bools(Vec<bool>),
}

/// The values of one leaf in all rows.
pub(super) struct PackedLeaf {
    pub(super) values: Packed,
    /// Index of the first value of each row, and the end of the last row. `None`: each row has one value.
    starts: Option<Vec<u32>>,
    is_list: bool,
    rows: usize,
}

/// The rows of some files.
pub(super) struct LoadedRows {
    schema: &'static Schema,
    leaves: Vec<PackedLeaf>,
    /// Index of the first leaf of each column.
    firsts: Vec<usize>,
    rows: usize,
}

/// An open data file.
pub(super) struct DataReader {
    reader: SerializedFileReader<Bytes>,
}

impl DataReader {
    /// Opens a file of a table. Reads only its metadata.
    pub(super) fn open(schema: &Schema, bytes: Bytes) -> Result<Self, ParquetError> {
        let reader = SerializedFileReader::new(bytes)?;
        check_columns(schema, reader.metadata())?;
        Ok(Self { reader })
    }

    /// Number of row groups.
    pub(super) fn groups(&self) -> usize {
        self.reader.num_row_groups()
    }

    /// Returns an upper bound of the memory of the rows, in bytes.
    pub(super) fn memory(&self) -> u64 {
        let metadata: &ParquetMetaData = self.reader.metadata();
        let columns = metadata.row_groups().iter().flat_map(RowGroupMetaData::columns);
        columns.map(leaf_memory).sum()
    }
}

/// Returns the memory that the values of a leaf take at most, in bytes.
pub(super) fn leaf_memory(column: &ColumnChunkMetaData) -> u64 {
    // A value is at most 8 bytes here, and its row has 4 more in a column with gaps.
    12 * column.num_values() as u64 + column.uncompressed_size() as u64
}

/// Checks that a file has the columns of its table.
pub(super) fn check_columns(schema: &Schema, metadata: &ParquetMetaData) -> Result<(), ParquetError> {
    let wanted = SchemaDescriptor::new(Arc::new(parse_message_type(&schema.parquet())?));
    let found = metadata.file_metadata().schema_descr();
    let is_same = found.num_columns() == wanted.num_columns()
        && found.columns().iter().zip(wanted.columns()).all(|(a, b)| {
            a.path() == b.path()
                && a.physical_type() == b.physical_type()
                && (a.max_def_level(), a.max_rep_level()) == (b.max_def_level(), b.max_rep_level())
        });
    if is_same { Ok(()) } else { Err(damaged("it has other columns")) }
}

pub(super) fn damaged(reason: &str) -> ParquetError {
    ParquetError::General(reason.to_owned())
}

impl LoadedRows {
    pub(super) fn new(schema: &'static Schema) -> Self {
        let (mut leaves, mut firsts) = (Vec::new(), Vec::new());
        for column in schema.columns {
            firsts.push(leaves.len());
            leaves.extend(PackedLeaf::of(column));
        }
        Self { schema, leaves, firsts, rows: 0 }
    }

    /// Adds the rows of a file. After an error the rows are incomplete, and the caller drops them.
    pub(super) fn add(&mut self, file: &DataReader) -> Result<(), ParquetError> {
        for index in 0..file.groups() {
            self.add_group(file, index)?;
        }
        Ok(())
    }

    /// Adds the rows of one row group, as [`LoadedRows::add`] does.
    pub(super) fn add_group(&mut self, file: &DataReader, index: usize) -> Result<(), ParquetError> {
        let group = file.reader.get_row_group(index)?;
        let rows = usize::try_from(group.metadata().num_rows()).map_err(|_| damaged("it has no rows"))?;
        self.rows += rows;
        for (number, leaf) in self.leaves.iter_mut().enumerate() {
            leaf.read(group.get_column_reader(number)?)?;
            if !leaf.is_complete(self.rows) {
                return Err(damaged("its columns have different lengths"));
            }
        }
        Ok(())
    }

    /// Number of rows.
    pub(super) fn len(&self) -> usize {
        self.rows
    }

    fn leaf(&self, column: &str) -> Option<&PackedLeaf> {
        let at = self.schema.columns.iter().position(|of| of.name == column)?;
        self.leaves.get(self.firsts[at])
    }

    /// Returns the distinct texts of a column without lists.
    pub(super) fn texts(&self, column: &str) -> Vec<Vec<u8>> {
        match self.leaf(column).map(|leaf| &leaf.values) {
            Some(Packed::Texts(texts, _)) => texts.iter().cloned().collect(),
            _ => Vec::new(),
        }
    }

    /// Returns the index of a row's text in [`LoadedRows::texts`], or `None` for a gap.
    pub(super) fn text_number(&self, column: &str, row: u32) -> Option<u32> {
        let leaf = self.leaf(column)?;
        let Packed::Texts(_, numbers) = &leaf.values else { return None };
        numbers[leaf.span(row as usize)].first().copied()
    }

    /// Returns the number of a row in a column without lists, or `None` for a gap.
    pub(super) fn long(&self, column: &str, row: u32) -> Option<i64> {
        let leaf = self.leaf(column)?;
        let Packed::Longs(values) = &leaf.values else { return None };
        values[leaf.span(row as usize)].first().copied()
    }

    /// Returns these rows, in this order.
    pub(super) fn take(self, rows: &[u32]) -> Rows {
        let Self { schema, leaves, .. } = self;
        let leaves = leaves.into_iter().map(|leaf| Source::from(leaf).take(rows)).collect();
        Rows::from_leaves(schema, leaves, rows.len())
    }

    /// Sorts the rows, and writes them as one file.
    pub(super) fn write(mut self) -> Result<ParquetFile, ParquetError> {
        let order = self.sorted();
        let order = if self.schema.sums.is_empty() { order } else { self.add_up(&order)? };
        let Self { schema, leaves, .. } = self;
        let sources: Vec<Source> = leaves.into_iter().map(Source::from).collect();
        let mut file = FileWriter::merged(schema)?;
        for rows in order.chunks(GROUP_ROWS) {
            let leaves = sources.iter().map(|source| source.take(rows)).collect();
            file.write(Rows::from_leaves(schema, leaves, rows.len()))?;
        }
        file.finish()
    }

    /// Adds up sorted rows that are equal but for the sums of the table. Returns those that remain.
    fn add_up(&mut self, order: &[u32]) -> Result<Vec<u32>, ParquetError> {
        let (mut sums, mut others) = (Vec::new(), Vec::new());
        for (column, first) in self.schema.columns.iter().zip(&self.firsts) {
            if self.schema.sums.contains(&column.name) { sums.push(*first) } else { others.push(*first) }
        }
        let mut kept: Vec<u32> = Vec::new();
        for row in order {
            let is_same = |last: &u32| others.iter().all(|leaf| self.leaves[*leaf].is_equal(*last, *row));
            match kept.last().copied().filter(is_same) {
                // A sum with a gap cannot take the other one. Both rows stay.
                Some(last) if sums.iter().all(|leaf| self.leaves[*leaf].has_both(last, *row)) => {
                    for leaf in &sums {
                        self.leaves[*leaf].add_to(last, *row)?;
                    }
                }
                _ => kept.push(*row),
            }
        }
        Ok(kept)
    }

    /// Returns the numbers of all rows in the order of the table.
    fn sorted(&self) -> Vec<u32> {
        enum Key<'a> {
            Longs(&'a [i64]),
            /// Ranks of the texts in the order of all texts.
            Texts(Vec<u32>),
        }
        let keys: Vec<Key<'_>> = (self.schema.order.iter())
            .filter_map(|name| {
                let at = self.schema.columns.iter().position(|column| column.name == *name)?;
                let leaf = &self.leaves[self.firsts[at]];
                Some(match &leaf.values {
                    Packed::Longs(values) => Key::Longs(values),
                    Packed::Texts(texts, values) => {
                        let ranks = ranks(texts);
                        // A gap comes first.
                        let rank = |row| {
                            values[leaf.span(row)].first().map_or(0, |index| ranks[*index as usize] + 1)
                        };
                        Key::Texts((0..self.rows).map(rank).collect())
                    }
                    Packed::Bools(_) => return None,
                })
            })
            .collect();
        let mut order: Vec<u32> = (0..self.rows as u32).collect();
        // The files are sorted, which makes this sort fast.
        order.sort_by(|&a, &b| {
            let (a, b) = (a as usize, b as usize);
            let compare = |key: &Key<'_>| match key {
                Key::Longs(values) => values[a].cmp(&values[b]),
                Key::Texts(ranks) => ranks[a].cmp(&ranks[b]),
            };
            keys.iter().map(compare).find(|order| order.is_ne()).unwrap_or(Ordering::Equal)
        });
        order
    }
}

/// Returns the rank of each text in the order of all texts.
fn ranks(texts: &Texts) -> Vec<u32> {
    let mut sorted: Vec<(&[u8], usize)> =
        texts.iter().enumerate().map(|(at, text)| (&text[..], at)).collect();
    sorted.sort_unstable();
    let mut ranks = vec![0; sorted.len()];
    for (rank, (_, at)) in (0..).zip(sorted) {
        ranks[at] = rank;
    }
    ranks
}

impl PackedLeaf {
    /// Returns the empty leaves of a column: two of a map, else one.
    pub(super) fn of(column: &Column) -> Vec<Self> {
        let Column { kind, is_optional, .. } = column;
        let texts = || Packed::Texts(Texts::default(), Vec::new());
        let is_list = matches!(kind, Kind::Longs | Kind::Texts | Kind::TextMap | Kind::LongMap);
        let starts = || (is_list || *is_optional).then(|| vec![0]);
        let first = match kind {
            Kind::Text | Kind::Hash | Kind::Texts | Kind::TextMap | Kind::LongMap => texts(),
            Kind::Long | Kind::Time | Kind::Longs => Packed::Longs(Vec::new()),
            Kind::Bool => Packed::Bools(Vec::new()),
        };
        let second = match kind {
            Kind::TextMap => Some(texts()),
            Kind::LongMap => Some(Packed::Longs(Vec::new())),
            _ => None,
        };
        let leaf = |values| Self { values, starts: starts(), is_list, rows: 0 };
        std::iter::once(first).chain(second).map(leaf).collect()
    }

    /// Returns the indexes of the values of a row: one, or none for a gap, or those of a list.
    pub(super) fn span(&self, row: usize) -> Range<usize> {
        self.starts.as_ref().map_or(row..row + 1, |starts| starts[row] as usize..starts[row + 1] as usize)
    }

    /// Reports whether two rows have the same values. Only of columns without lists.
    fn is_equal(&self, a: u32, b: u32) -> bool {
        let (a, b) = (self.span(a as usize), self.span(b as usize));
        match &self.values {
            // Each text has one number.
            Packed::Texts(_, values) => values[a] == values[b],
            Packed::Longs(values) => values[a] == values[b],
            Packed::Bools(values) => values[a] == values[b],
        }
    }

    /// Reports whether both rows have a value, or neither.
    fn has_both(&self, a: u32, b: u32) -> bool {
        self.span(a as usize).len() == self.span(b as usize).len()
    }

    /// Adds the number of a row to that of another.
    fn add_to(&mut self, to: u32, from: u32) -> Result<(), ParquetError> {
        let (to, from) = (self.span(to as usize), self.span(from as usize));
        let Packed::Longs(values) = &mut self.values else { return Err(damaged("a sum is no number")) };
        if !to.is_empty() && !from.is_empty() {
            values[to.start] = values[to.start].saturating_add(values[from.start]);
        }
        Ok(())
    }

    /// Reports whether it has the values of this number of rows.
    pub(super) fn is_complete(&self, rows: usize) -> bool {
        let values = match &self.values {
            Packed::Texts(_, values) => values.len(),
            Packed::Longs(values) => values.len(),
            Packed::Bools(values) => values.len(),
        };
        let (ends, last) = self
            .starts
            .as_ref()
            .map_or((rows, rows), |starts| (starts.len() - 1, starts[starts.len() - 1] as usize));
        self.rows == rows && ends == rows && last == values
    }

    /// Adds the values of a row group.
    pub(super) fn read(&mut self, column: ColumnReader) -> Result<(), ParquetError> {
        let Self { values, starts, is_list, rows } = self;
        let shape = Shape { starts, is_list: *is_list, rows };
        match (values, column) {
            (Packed::Texts(texts, indexes), ColumnReader::ByteArrayColumnReader(column)) => {
                let mut last: Option<(ByteArray, u32)> = None;
                shape.read(column, |value: &ByteArray| {
                    let index = match &last {
                        Some((known, index)) if known.data() == value.data() => *index,
                        _ => {
                            let known = texts.get_index_of(value.data());
                            let index = known.unwrap_or_else(|| texts.insert_full(value.data().to_vec()).0);
                            last = Some((value.clone(), index as u32));
                            index as u32
                        }
                    };
                    indexes.push(index);
                })
            }
            (Packed::Longs(values), ColumnReader::Int64ColumnReader(column)) => {
                shape.read(column, |value| values.push(*value))
            }
            (Packed::Bools(values), ColumnReader::BoolColumnReader(column)) => {
                shape.read(column, |value| values.push(*value))
            }
            _ => Err(damaged("a column has another type")),
        }
    }
}

/// The number of values in each row of a leaf.
struct Shape<'a> {
    starts: &'a mut Option<Vec<u32>>,
    is_list: bool,
    rows: &'a mut usize,
}

impl Shape<'_> {
    fn read<T: DataType>(
        self,
        mut column: ColumnReaderImpl<T>,
        mut push: impl FnMut(&T::T),
    ) -> Result<(), ParquetError> {
        let Self { starts, is_list, rows } = self;
        let (mut defined, mut repeated, mut values) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            defined.clear();
            repeated.clear();
            values.clear();
            let (read, ..) =
                column.read_records(BATCH_ROWS, Some(&mut defined), Some(&mut repeated), &mut values)?;
            if read == 0 {
                return Ok(());
            }
            values.iter().for_each(&mut push);
            *rows += read;
            let Some(starts) = starts else { continue };
            for (at, level) in defined.iter().enumerate() {
                let end = starts.last().copied().unwrap_or(0);
                if is_list && repeated.get(at).is_some_and(|repeated| *repeated > 0) {
                    if let Some(last) = starts.last_mut() {
                        *last = end.checked_add(1).ok_or_else(|| damaged("it has too many values"))?;
                    }
                } else {
                    let one = u32::from(*level > 0);
                    starts.push(end.checked_add(one).ok_or_else(|| damaged("it has too many values"))?);
                }
            }
        }
    }
}

/// A leaf whose values are ready for the writer.
struct Source {
    values: SourceValues,
    starts: Option<Vec<u32>>,
    is_list: bool,
}

enum SourceValues {
    Texts(Vec<ByteArray>, Vec<u32>),
    Longs(Vec<i64>),
    Bools(Vec<bool>),
}

impl From<PackedLeaf> for Source {
    fn from(leaf: PackedLeaf) -> Self {
        let PackedLeaf { values, starts, is_list, rows: _ } = leaf;
        let values = match values {
            Packed::Texts(texts, indexes) => {
                SourceValues::Texts(texts.into_iter().map(ByteArray::from).collect(), indexes)
            }
            Packed::Longs(values) => SourceValues::Longs(values),
            Packed::Bools(values) => SourceValues::Bools(values),
        };
        Self { values, starts, is_list }
    }
}

impl Source {
    /// Returns these rows as the leaf of a row group.
    fn take(&self, rows: &[u32]) -> Leaf {
        let span = |row: u32| {
            let row = row as usize;
            self.starts.as_ref().map_or(row..row + 1, |starts| starts[row] as usize..starts[row + 1] as usize)
        };
        let values = rows.iter().flat_map(|row| span(*row));
        let mut leaf = Leaf::new(match &self.values {
            SourceValues::Texts(texts, indexes) => {
                Values::Bytes(values.map(|at| texts[indexes[at] as usize].clone()).collect())
            }
            SourceValues::Longs(all) => Values::Longs(values.map(|at| all[at]).collect()),
            SourceValues::Bools(all) => Values::Bools(values.map(|at| all[at]).collect()),
        });
        if self.starts.is_some() {
            for row in rows {
                let n = span(*row).len();
                if self.is_list {
                    leaf.elements(n);
                } else {
                    leaf.defined.push(n as i16);
                }
            }
        }
        leaf
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            file::Cell,
            schema::{HOURS, LABELS, SAMPLES},
        },
        *,
    };

    fn text(text: &str) -> ByteArray {
        ByteArray::from(text)
    }

    /// Encodes rows of the table of samples: service, pod, time, and stack.
    fn samples(rows: &[(&str, Option<&str>, i64, i64)]) -> Bytes {
        let mut out = Rows::new(&SAMPLES);
        for (service, pod, time, stack) in rows {
            let pod = pod.map(text);
            out.push([
                Cell::Long(*time),
                Cell::Text(&text(service)),
                Cell::Null,
                pod.as_ref().map_or(Cell::Null, Cell::Text),
                Cell::Null,
                Cell::Null,
                Cell::Text(&text("profile")),
                Cell::Text(&text("cpu/nanoseconds")),
                Cell::Long(*stack),
                Cell::Null,
                Cell::Long(stack * 10),
                Cell::Long(1),
            ]);
        }
        let mut file = FileWriter::new(&SAMPLES).unwrap();
        file.write(out).unwrap();
        file.finish().unwrap().bytes.into()
    }

    fn merged(schema: &'static Schema, files: &[Bytes]) -> (Vec<String>, ParquetFile) {
        let mut rows = LoadedRows::new(schema);
        for file in files {
            rows.add(&DataReader::open(schema, file.clone()).unwrap()).unwrap();
        }
        let file = rows.write().unwrap();
        let reader = SerializedFileReader::new(Bytes::from(file.bytes.clone())).unwrap();
        (reader.get_row_iter(None).unwrap().map(|row| row.unwrap().to_string()).collect(), file)
    }

    #[test]
    fn merged_rows_are_sorted_and_keep_their_gaps() {
        let a = samples(&[("b", Some("p1"), 20, 7), ("b", None, 30, 1)]);
        let b = samples(&[("a", None, 99, 3), ("b", Some("p2"), 20, 5)]);
        let (rows, file) = merged(&SAMPLES, &[a, b]);
        assert_eq!(file.rows, 4);
        let wanted = [("a", "null", 3), ("b", "\"p2\"", 5), ("b", "\"p1\"", 7), ("b", "null", 1)];
        for (row, (service, pod, stack)) in rows.iter().zip(wanted) {
            let wanted = format!("service_name: \"{service}\", namespace: null, pod: {pod}, ");
            assert!(row.contains(&wanted), "{row}");
            assert!(row.contains(&format!("stack_id: {stack}, labels_id: null, value: {stack}0,")), "{row}");
        }
        assert!(
            file.stats.contains("\"stack_id\":7") && file.stats.contains("\"numRecords\":4"),
            "{}",
            file.stats
        );
    }

    #[test]
    fn a_merge_adds_up_sums_of_equal_rows() {
        type Sum<'a> = (&'a str, Option<&'a str>, i64, i64, Option<i64>, i64);
        let encode = |rows: &[Sum<'_>]| {
            let mut out = Rows::new(&HOURS);
            for (service, pod, stack, value, count, guess) in rows {
                let pod = pod.map(text);
                out.push([
                    Cell::Text(&text(service)),
                    Cell::Null,
                    pod.as_ref().map_or(Cell::Null, Cell::Text),
                    Cell::Text(&text("cpu/nanoseconds")),
                    Cell::Long(*stack),
                    Cell::Long(*value),
                    count.map_or(Cell::Null, Cell::Long),
                    Cell::Long(*guess),
                ]);
            }
            let mut file = FileWriter::new(&HOURS).unwrap();
            file.write(out).unwrap();
            Bytes::from(file.finish().unwrap().bytes)
        };
        let files = [
            encode(&[
                ("s", None, 1, 10, Some(1), 0),
                ("s", Some("p1"), 1, 20, Some(2), 0),
                ("s", Some("p2"), 1, i64::MAX, None, 0),
            ]),
            encode(&[
                ("s", Some("p1"), 2, 5, Some(1), 0),
                ("s", Some("p1"), 1, 7, Some(3), 0),
                ("s", Some("p1"), 1, 3, Some(1), 2),
                ("s", None, 1, 1, Some(4), 0),
            ]),
            encode(&[("s", Some("p2"), 1, 1, None, 0), ("s", None, 1, 100, None, 0)]),
        ];
        let (rows, file) = merged(&HOURS, &files);
        let wanted = [
            "pod: null, type: \"cpu/nanoseconds\", stack_id: 1, value: 11, count: 5, guessed_from: 0}",
            "pod: null, type: \"cpu/nanoseconds\", stack_id: 1, value: 100, count: null, guessed_from: 0}",
            "pod: \"p1\", type: \"cpu/nanoseconds\", stack_id: 1, value: 27, count: 5, guessed_from: 0}",
            "pod: \"p1\", type: \"cpu/nanoseconds\", stack_id: 1, value: 3, count: 1, guessed_from: 2}",
            "pod: \"p1\", type: \"cpu/nanoseconds\", stack_id: 2, value: 5, count: 1, guessed_from: 0}",
            "pod: \"p2\", type: \"cpu/nanoseconds\", stack_id: 1, value: 9223372036854775807, count: null, guessed_from: 0}",
        ];
        assert_eq!(rows.len(), wanted.len(), "{rows:?}");
        for (row, wanted) in rows.iter().zip(wanted) {
            assert!(row.ends_with(wanted), "{row}, not {wanted}");
        }
        assert_eq!(file.rows, 6);
    }

    #[test]
    fn merged_rows_keep_their_lists_and_maps() {
        let encode = |id: i64, texts: &[(&str, &str)], numbers: &[(&str, i64)]| {
            let texts: Vec<_> = texts.iter().map(|(key, value)| (text(key), text(value))).collect();
            let numbers: Vec<_> = numbers.iter().map(|(key, value)| (text(key), *value)).collect();
            let mut rows = Rows::new(&LABELS);
            rows.push([
                Cell::Long(id),
                Cell::Text(&text("s")),
                Cell::Text(&text("hash")),
                Cell::TextMap(&texts),
                Cell::LongMap(&numbers),
                Cell::TextMap(&[]),
            ]);
            let mut file = FileWriter::new(&LABELS).unwrap();
            file.write(rows).unwrap();
            Bytes::from(file.finish().unwrap().bytes)
        };
        let files = [
            encode(2, &[("thread", "main"), ("kind", "x")], &[]),
            encode(3, &[], &[("tid", 7)]),
            encode(1, &[("thread", "io")], &[("tid", 8), ("cpu", 9)]),
        ];
        let (rows, _) = merged(&LABELS, &files);
        let wanted = [
            "texts: {\"thread\" -> \"io\"}, numbers: {\"tid\" -> 8, \"cpu\" -> 9}",
            "texts: {\"thread\" -> \"main\", \"kind\" -> \"x\"}, numbers: {}",
            "texts: {}, numbers: {\"tid\" -> 7}",
        ];
        for (row, wanted) in rows.iter().zip(wanted) {
            assert!(row.contains(wanted), "{row} lacks {wanted}");
        }
        assert_eq!(rows.len(), 3);
    }

    #[test]
    fn a_file_with_other_columns_is_refused() {
        let file = samples(&[("a", None, 1, 1)]);
        assert!(DataReader::open(&LABELS, file.clone()).is_err());
        assert!(DataReader::open(&SAMPLES, file.slice(..file.len() - 9)).is_err());
    }
}
