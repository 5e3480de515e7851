//! The virtual tables of SQLite, whose rows come from the files of the tables.

use std::{cell::RefCell, ffi::c_int, fmt::Write as _, marker::PhantomData, sync::Arc};

use rusqlite::{
    Connection, Result,
    types::{ToSqlOutput, ValueRef},
    vtab::{
        Context, Filters, IndexInfo, VTab, VTabConnection, VTabCursor, eponymous_only_module, sqlite3_vtab,
        sqlite3_vtab_cursor,
    },
};

use super::{
    SqlError,
    plan::{self, Bound, Constant, DATE, HOUR, Op, PARTITION_COLUMNS, Test},
    scan::{Block, Scan},
};
use crate::table::{ColumnValues, Datum, Footer, Kind, TableSnapshot};

/// Plan number of a scan that finds rows by the key of the table. Others read all rows that the conditions admit.
const BY_KEY: c_int = 1;
/// Cost of finding rows by a key, in rows of a scan.
const KEY_COST: f64 = 4.0;

/// Adds the virtual tables to a connection.
pub(super) fn register(connection: &Connection, scan: &Arc<Scan>) -> Result<()> {
    for (number, table) in scan.tables.iter().enumerate() {
        let module = eponymous_only_module::<Table<'_>>();
        connection.create_module(table.name(), module, Some((Arc::clone(scan), number)))?;
    }
    Ok(())
}

/// Returns the column whose value names one row of the table.
fn key_of(table: &TableSnapshot) -> Option<usize> {
    let name = match table.name() {
        "stacks" => "stack_id",
        "frames" => "frame_id",
        "labels" => "labels_id",
        "profiles" => "profile_id",
        _ => return None,
    };
    let at = table.columns().iter().position(|column| column.name == name)?;
    Some(at + PARTITION_COLUMNS)
}

/// Returns the part of all rows that a condition leaves, as the planner should expect.
fn selectivity(table: &TableSnapshot, column: usize, op: Op) -> f64 {
    if op != Op::Eq {
        return 0.3;
    }
    match column {
        DATE => 0.1,
        HOUR => 0.05,
        _ => match table.columns()[column - PARTITION_COLUMNS].name {
            "service_name" => 0.05,
            "type" => 0.4,
            _ => 0.01,
        },
    }
}

/// Reports whether a condition on a column spares the reading of files or row groups.
fn spares_reading(table: &TableSnapshot, column: usize) -> bool {
    column < PARTITION_COLUMNS
        || matches!(table.columns()[column - PARTITION_COLUMNS].name, "time" | "service_name" | "type")
}

/// A virtual table.
#[repr(C)]
pub(super) struct Table<'vtab> {
    base: sqlite3_vtab,
    scan: Arc<Scan>,
    number: usize,
    lifetime: PhantomData<&'vtab ()>,
}

impl Table<'_> {
    fn snapshot(&self) -> &TableSnapshot {
        &self.scan.tables[self.number]
    }
}

// SAFETY: the struct is `repr(C)` and starts with `sqlite3_vtab`, which SQLite alone changes.
unsafe impl<'vtab> VTab<'vtab> for Table<'vtab> {
    type Aux = (Arc<Scan>, usize);
    type Cursor = Cursor;

    fn connect(_: &mut VTabConnection, aux: Option<&Self::Aux>, _: &[&[u8]]) -> Result<(String, Self)> {
        let Some((scan, number)) = aux else {
            return Err(rusqlite::Error::ModuleError("the table has no scan".to_owned()));
        };
        let mut sql = "CREATE TABLE t(date TEXT, hour INTEGER".to_owned();
        for column in scan.tables[*number].columns() {
            let kind = match column.kind {
                Kind::Long | Kind::Bool => "INTEGER",
                Kind::Hash => "BLOB",
                Kind::Text | Kind::Time | Kind::Longs | Kind::Texts | Kind::TextMap | Kind::LongMap => "TEXT",
            };
            let _ = write!(sql, ", \"{}\" {kind}", column.name);
        }
        sql.push(')');
        let table = Self {
            base: sqlite3_vtab::default(),
            scan: Arc::clone(scan),
            number: *number,
            lifetime: PhantomData,
        };
        Ok((sql, table))
    }

    fn best_index(&self, info: &mut IndexInfo) -> Result<()> {
        let table = self.snapshot();
        let mut tests: Vec<(usize, usize, Op)> = Vec::new();
        for (at, constraint) in info.constraints().enumerate() {
            let (Ok(column), true) = (usize::try_from(constraint.column()), constraint.is_usable()) else {
                continue;
            };
            let (Some(op), Some(kind)) = (Op::of(&constraint.operator()), plan::comparable(table, column))
            else {
                continue;
            };
            // Files are sorted by bytes. Another collation compares otherwise.
            if kind == Kind::Long || info.collation(at)? == "BINARY" {
                tests.push((at, column, op));
            }
        }
        let key = key_of(table);
        let by_key = tests.iter().position(|(_, column, op)| Some(*column) == key && *op == Op::Eq);
        if let Some(at) = by_key {
            tests.swap(0, at);
        }
        for (number, (at, ..)) in (1..).zip(&tests) {
            info.constraint_usage(*at).set_argv_index(number);
        }
        info.set_idx_str(&plan::encode(tests.iter().map(|(_, column, op)| (*column, *op))));
        if by_key.is_some() {
            info.set_idx_num(BY_KEY);
            // Without the flag for at most one row: of a key in another type, SQLite must check all rows.
            info.set_estimated_rows(1);
            info.set_estimated_cost(KEY_COST);
            return Ok(());
        }
        let all = table.rows.max(1) as f64;
        let (mut read, mut rows) = (all, all);
        for (_, column, op) in &tests {
            rows *= selectivity(table, *column, *op);
            if spares_reading(table, *column) {
                read *= selectivity(table, *column, *op);
            }
        }
        info.set_idx_num(0);
        info.set_estimated_rows(rows.max(1.0) as i64);
        info.set_estimated_cost(read.max(100.0));
        Ok(())
    }

    fn open(&'vtab mut self) -> Result<Cursor> {
        Ok(Cursor::new(Arc::clone(&self.scan), self.number))
    }
}

/// A condition on the rows of one row group, in the numbers of that group.
enum RowTest {
    Text(usize, u32),
    Long(usize, Op, i64),
}

/// A scan of a virtual table.
#[repr(C)]
pub(super) struct Cursor {
    base: sqlite3_vtab_cursor,
    scan: Arc<Scan>,
    table: usize,
    tests: Vec<Test>,
    next_file: usize,
    footer: Option<(usize, Arc<Footer>)>,
    next_group: usize,
    block: Option<Arc<Block>>,
    row_tests: Vec<RowTest>,
    row: usize,
    /// Rows that were found by a key, in reverse order. `None`: the scan reads row groups.
    found: Option<Vec<(Arc<Block>, u32)>>,
    /// The last conditions with a key, and their rows. Consecutive samples often have the same profile or stack.
    last_found: (Vec<Test>, Vec<(Arc<Block>, u32)>),
    rowid: i64,
    /// Consecutive rows often have the same time.
    last_time: RefCell<(i64, String)>,
}

impl Cursor {
    fn new(scan: Arc<Scan>, table: usize) -> Self {
        Self {
            base: sqlite3_vtab_cursor::default(),
            scan,
            table,
            tests: Vec::new(),
            next_file: 0,
            footer: None,
            next_group: 0,
            block: None,
            row_tests: Vec::new(),
            row: 0,
            found: None,
            last_found: (Vec::new(), Vec::new()),
            rowid: 0,
            last_time: RefCell::new((0, plan::time_text(0))),
        }
    }

    fn snapshot(&self) -> &TableSnapshot {
        &self.scan.tables[self.table]
    }

    /// Starts a scan.
    fn start(&mut self, by_key: bool, plan: &str, values: &Filters<'_>) -> Result<(), SqlError> {
        (self.next_file, self.footer, self.next_group, self.row) = (0, None, 0, 0);
        self.tests.clear();
        self.row_tests.clear();
        self.found = None;
        // The block stays: the next key is often in the same one.
        let last = self.block.take();
        let mut key = None;
        for (number, ((column, op), value)) in plan::decode(plan).into_iter().zip(values.iter()).enumerate() {
            match plan::bind(self.snapshot(), column, op, value).map_err(SqlError::Invalid)? {
                Bound::Test(test) if by_key && number == 0 => key = Some(test),
                Bound::Test(test) => self.tests.push(test),
                Bound::Never => {
                    self.block = last;
                    self.found = Some(Vec::new());
                    return Ok(());
                }
                Bound::Unknown => {}
            }
        }
        match key {
            Some(key) => self.find(&key, last),
            None => self.advance(),
        }
    }

    /// Finds the rows with a key.
    fn find(&mut self, key: &Test, last: Option<Arc<Block>>) -> Result<(), SqlError> {
        let Some(column) = key.file_column() else { return Ok(()) };
        self.tests.push(key.clone());
        if self.last_found.0 == self.tests {
            self.block = last;
            self.found = Some(self.last_found.1.clone());
            return Ok(());
        }
        let mut found = Vec::new();
        // Numbers are unique in their table.
        if let (Constant::Long(number), Some(block)) = (&key.constant, last) {
            let rows = self.scan.rows_with_long(&block, column, *number)?;
            let deleted = self.scan.deleted(&block)?;
            let rows = rows.into_iter().filter(|row| deleted.binary_search(row).is_err());
            found.extend(rows.map(|row| (Arc::clone(&block), row)));
            self.block = Some(block);
        }
        if found.is_empty() {
            while let Some(block) = self.next_block()? {
                let rows = match &key.constant {
                    Constant::Long(number) => self.scan.rows_with_long(&block, column, *number)?,
                    Constant::Text(text) => self.scan.rows_with_text(&block, column, text)?,
                };
                let deleted = self.scan.deleted(&block)?;
                let rows: Vec<u32> =
                    rows.into_iter().filter(|row| deleted.binary_search(row).is_err()).collect();
                if !rows.is_empty() {
                    found.extend(rows.into_iter().map(|row| (Arc::clone(&block), row)));
                    self.block = Some(block);
                    if matches!(key.constant, Constant::Long(_)) {
                        break;
                    }
                }
            }
        }
        found.reverse();
        self.last_found = (self.tests.clone(), found.clone());
        self.found = Some(found);
        Ok(())
    }

    /// Returns the next row group that can have rows which meet the conditions.
    fn next_block(&mut self) -> Result<Option<Arc<Block>>, SqlError> {
        loop {
            let (file, footer) = match &self.footer {
                Some((file, footer)) => (*file, Arc::clone(footer)),
                None => match self.next_file()? {
                    Some(opened) => opened,
                    None => return Ok(None),
                },
            };
            while self.next_group < footer.groups() {
                let group = self.next_group;
                self.next_group += 1;
                if self.admits_group(&footer, group) {
                    return self.scan.block(self.table, file, &footer, group).map(Some);
                }
            }
            self.footer = None;
        }
    }

    /// Opens the next file that can have rows which meet the conditions.
    fn next_file(&mut self) -> Result<Option<(usize, Arc<Footer>)>, SqlError> {
        while self.next_file < self.snapshot().files.len() {
            let file = self.next_file;
            self.next_file += 1;
            if self.admits_file(file) {
                let footer = self.scan.footer(self.table, file)?;
                self.footer = Some((file, Arc::clone(&footer)));
                self.next_group = 0;
                return Ok(Some((file, footer)));
            }
        }
        Ok(None)
    }

    fn admits_file(&self, file: usize) -> bool {
        let table = self.snapshot();
        let of = &table.files[file];
        self.tests.iter().all(|test| match test.file_column() {
            None => test.admits_partition(&of.date, of.hour),
            Some(column) => table
                .file_bounds(file, column)
                .is_none_or(|bounds| test.admits(&table.columns()[column], bounds)),
        })
    }

    fn admits_group(&self, footer: &Footer, group: usize) -> bool {
        let table = self.snapshot();
        self.tests.iter().all(|test| {
            test.file_column().is_none_or(|column| {
                let bounds = table.group_bounds(footer, group, column);
                bounds.is_none_or(|bounds| test.admits(&table.columns()[column], &bounds))
            })
        })
    }

    /// Reads those columns of a row group that conditions need. Reports false if no row meets them.
    fn open_block(&mut self, block: &Block) -> Result<bool, SqlError> {
        self.row_tests.clear();
        for test in &self.tests {
            let Some(column) = test.file_column() else { continue };
            match (&test.constant, test.op, self.snapshot().columns()[column].kind) {
                (Constant::Text(text), Op::Eq, Kind::Text) => {
                    match self.scan.column(block, column)?.number_of(text) {
                        Some(number) => self.row_tests.push(RowTest::Text(column, number)),
                        None => return Ok(false),
                    }
                }
                (Constant::Long(number), op, Kind::Long) => {
                    self.scan.column(block, column)?;
                    self.row_tests.push(RowTest::Long(column, op, *number));
                }
                _ => {}
            }
        }
        Ok(true)
    }

    /// Moves to the next row that meets the conditions, from the present one on.
    fn advance(&mut self) -> Result<(), SqlError> {
        loop {
            if let Some(block) = &self.block {
                while self.row < block.rows {
                    if self.is_wanted(block, self.row)? {
                        return Ok(());
                    }
                    self.row += 1;
                }
            }
            self.block = None;
            let Some(block) = self.next_block()? else { return Ok(()) };
            if self.open_block(&block)? {
                (self.block, self.row) = (Some(block), 0);
            }
        }
    }

    fn is_wanted(&self, block: &Block, row: usize) -> Result<bool, SqlError> {
        if self.scan.deleted(block)?.binary_search(&(row as u32)).is_ok() {
            return Ok(false);
        }
        for test in &self.row_tests {
            let is_met = match test {
                RowTest::Text(column, number) => {
                    self.scan.column(block, *column)?.text_number(row) == Some(*number)
                }
                RowTest::Long(column, op, number) => match self.scan.column(block, *column)?.get(row) {
                    Datum::Long(value) => op.accepts(value.cmp(number)),
                    _ => false,
                },
            };
            if !is_met {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns the present row.
    fn present(&self) -> Option<(&Block, usize)> {
        match &self.found {
            Some(found) => found.last().map(|(block, row)| (&**block, *row as usize)),
            None => self.block.as_ref().map(|block| (&**block, self.row)),
        }
    }

    fn set_value(&self, context: &mut Context, column: usize) -> Result<()> {
        let Some((block, row)) = self.present() else { return Ok(()) };
        let file = &self.snapshot().files[block.file];
        let column = match column {
            DATE => return context.set_result(&file.date),
            HOUR => return context.set_result(&file.hour),
            _ => column - PARTITION_COLUMNS,
        };
        let values = self.scan.column(block, column).map_err(|error| self.scan.fail(error))?;
        let text = |bytes| ToSqlOutput::Borrowed(ValueRef::Text(bytes));
        match (self.snapshot().columns()[column].kind, values.get(row)) {
            (Kind::Longs | Kind::Texts, _) => context.set_result(&list_json(values, row)),
            (Kind::TextMap | Kind::LongMap, _) => context.set_result(&map_json(values, row)),
            (_, Datum::Null) => Ok(()),
            (Kind::Hash, Datum::Bytes(bytes)) => {
                context.set_result(&ToSqlOutput::Borrowed(ValueRef::Blob(bytes)))
            }
            (_, Datum::Bytes(bytes)) => context.set_result(&text(bytes)),
            (Kind::Time, Datum::Long(micros)) => {
                let mut last = self.last_time.borrow_mut();
                if last.0 != micros {
                    *last = (micros, plan::time_text(micros));
                }
                context.set_result(&last.1)
            }
            (_, Datum::Long(value)) => context.set_result(&value),
            (_, Datum::Bool(value)) => context.set_result(&value),
        }
    }
}

/// Adds a value of a list or map as JSON.
fn push_json(out: &mut String, datum: Datum<'_>) {
    let _ = match datum {
        Datum::Null => write!(out, "null"),
        Datum::Long(value) => write!(out, "{value}"),
        Datum::Bool(value) => write!(out, "{value}"),
        Datum::Bytes(bytes) => {
            write!(out, "{}", serde_json::Value::from(String::from_utf8_lossy(bytes).into_owned()))
        }
    };
}

fn list_json(values: &ColumnValues, row: usize) -> String {
    let mut out = "[".to_owned();
    for (value, _) in values.list(row) {
        if out.len() > 1 {
            out.push(',');
        }
        push_json(&mut out, value);
    }
    out.push(']');
    out
}

fn map_json(values: &ColumnValues, row: usize) -> String {
    let mut out = "{".to_owned();
    for (key, value) in values.list(row) {
        if out.len() > 1 {
            out.push(',');
        }
        push_json(&mut out, key);
        out.push(':');
        push_json(&mut out, value);
    }
    out.push('}');
    out
}

// SAFETY: the struct is `repr(C)` and starts with `sqlite3_vtab_cursor`, which SQLite alone changes.
unsafe impl VTabCursor for Cursor {
    fn filter(&mut self, plan: c_int, tests: Option<&str>, values: &Filters<'_>) -> Result<()> {
        self.rowid = 0;
        self.start(plan == BY_KEY, tests.unwrap_or_default(), values).map_err(|error| self.scan.fail(error))
    }

    fn next(&mut self) -> Result<()> {
        self.rowid += 1;
        if let Some(found) = &mut self.found {
            found.pop();
            return Ok(());
        }
        self.row += 1;
        self.advance().map_err(|error| self.scan.fail(error))
    }

    fn eof(&self) -> bool {
        self.present().is_none()
    }

    fn column(&self, context: &mut Context, column: c_int) -> Result<()> {
        self.set_value(context, column as usize)
    }

    fn rowid(&self) -> Result<i64> {
        Ok(self.rowid)
    }
}
