//! Functions, files and lines at addresses of a Go program, from the tables that the Go runtime itself uses for stack traces and
//! profiles. They have inlined functions and the first lines of functions, in stripped programs too. Go 1.20 and later write them.
//!
//! After the record of a function come the offsets of its other tables, and offsets from `go:func.*`, where the linker puts the data
//! of functions. One of these offsets leads to the tree of the calls that the compiler inlined into the function. Only the module
//! data holds the address of `go:func.*`, in a word whose index has changed several times. So the reader tries several words, and
//! takes the one that leads to trees of many functions.

use std::cell::Cell;

use crate::{
    data::read_u32,
    error::ElfError,
    file::Elf,
    go::{GoFault, GoFunction, GoTable},
    go_search::{module_word, modules},
};

/// Bytes of a function's record before the offsets of its tables.
const RECORD_BYTES: usize = 44;
/// Offsets in a function's record.
const FILES_AT: usize = 20;
const LINES_AT: usize = 24;
const TABLES_AT: usize = 28;
const UNIT_AT: usize = 32;
const START_LINE_AT: usize = 36;
const DATA_COUNT_AT: usize = 43;
/// `PCDATA_InlTreeIndex`: the table of the innermost inlined call at each instruction.
const INLINED_TABLE: u32 = 2;
/// `FUNCDATA_InlTree`: the tree of inlined calls.
const INLINED_TREE: u8 = 3;
/// Bytes of an inlined call: kind, 3 bytes of padding, name, call site, first line.
const CALL_BYTES: u64 = 16;
/// The words of module data that may hold the address of `go:func.*`: it was word 40 in Go 1.20, and 43 in Go 1.27.
const FUNCTION_DATA_WORDS: std::ops::Range<u64> = 38..50;
/// Number of trees that a candidate must lead to, if the program has that many.
const PROBED_TREES: usize = 32;
/// Number of functions that the reader searches for trees.
const PROBED_FUNCTIONS: usize = 1 << 16;
/// Maximum number of nested inlined calls at one address.
const MAX_DEPTH: usize = 128;
/// Maximum number of steps through tables of values, for all addresses of one file. The longest functions take a hundred thousand.
const MAX_STEPS: u64 = 32 << 20;

/// A function at an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GoLine {
    /// Name of the function with its package.
    pub name: Vec<u8>,
    /// Path of its source file; empty if unknown.
    pub file: Vec<u8>,
    /// Line that the address belongs to; 0 if unknown.
    pub line: u32,
    /// Line at which the function begins; 0 if unknown.
    pub start_line: u32,
}

/// The functions and lines of a Go program.
#[derive(Debug)]
pub struct GoLines<'e, 'd> {
    elf: &'e Elf<'d>,
    table: GoTable<'d>,
    /// Address of `go:func.*`. Without it the reader skips functions with inlined calls.
    function_data: Option<u64>,
    steps: Cell<u64>,
}

impl<'e, 'd> GoLines<'e, 'd> {
    /// Reads the table of functions. Returns `None` if the file has none of Go 1.20 or later. A table of more than `max_bytes` bytes is
    /// an error.
    pub fn of(elf: &'e Elf<'d>, max_bytes: u64) -> Result<Option<Result<Self, GoFault>>, ElfError> {
        let table = match elf.go_table(max_bytes)? {
            None => return Ok(None),
            Some(Err(fault)) => return Ok(Some(Err(fault))),
            Some(Ok(table)) if !table.has_start_lines() => return Ok(None),
            Some(Ok(table)) => table,
        };
        let mut lines = Self { elf, table, function_data: None, steps: Cell::new(MAX_STEPS) };
        lines.function_data = lines.find_function_data()?;
        Ok(Some(Ok(lines)))
    }

    /// Returns the functions at an address, innermost first, with at most `max_bytes` bytes of each text. Returns `None` if no Go function
    /// is there, if the table is damaged there, or if the search took too long.
    pub fn at(&self, address: u64, max_bytes: usize) -> Option<Vec<GoLine>> {
        let function = self.table.function_at(address)?;
        self.elf.segments().executable_end(function.start)?;
        let record = self.table.record_at(&function)?;
        // Without the tree, a function would get the lines of the calls inlined into it.
        let tree = match self.tree_offset(record) {
            Some(offset) => Some(self.function_data?.checked_add(offset.into())?),
            None => None,
        };
        let inlined = tree.and_then(|_| self.offset_of_table(record, INLINED_TABLE));
        let mut lines = Vec::new();
        let mut address = address;
        while lines.len() < MAX_DEPTH {
            let (file, line) = self.file_and_line(&function, record, address, max_bytes)?;
            let index = match inlined {
                Some(offset) => self.value(offset, &function, address)?,
                None => -1,
            };
            let Ok(index) = u64::try_from(index) else {
                let name = self.table.name(&self.table.record(&function)?, max_bytes).to_vec();
                let start_line = first_line(self.table.word(record + START_LINE_AT)?);
                lines.push(GoLine { name, file, line, start_line });
                // A function without a name is damaged.
                return lines.iter().all(|line| !line.name.is_empty()).then_some(lines);
            };
            let call = self.call(tree?.checked_add(index.checked_mul(CALL_BYTES)?)?, &function)?;
            let name = self.table.name_at(call.name, max_bytes).to_vec();
            lines.push(GoLine { name, file, line, start_line: call.start_line });
            address = function.start.checked_add(call.site.into())?;
        }
        None
    }

    fn file_and_line(
        &self,
        function: &GoFunction,
        record: usize,
        address: u64,
        max_bytes: usize,
    ) -> Option<(Vec<u8>, u32)> {
        let line = self.value(self.table.word(record + LINES_AT)?, function, address)?;
        let file = self.value(self.table.word(record + FILES_AT)?, function, address)?;
        let file = match u32::try_from(file) {
            Ok(file) => self.table.file(self.table.word(record + UNIT_AT)?, file, max_bytes).to_vec(),
            Err(_) => Vec::new(),
        };
        Some((file, u32::try_from(line).unwrap_or(0)))
    }

    /// Returns the value of a table at an address; -1 where it has none.
    fn value(&self, offset: u32, function: &GoFunction, address: u64) -> Option<i32> {
        let mut end = function.start;
        for (bytes, value) in self.table.values(offset) {
            self.steps.set(self.steps.get().checked_sub(1)?);
            end = end.saturating_add(bytes);
            if address < end {
                return Some(value);
            }
        }
        Some(-1)
    }

    /// Returns the offset of a function's table of values; none if it has no such table.
    fn offset_of_table(&self, record: usize, table: u32) -> Option<u32> {
        let count = self.table.word(record + TABLES_AT)?;
        let at = record.checked_add(RECORD_BYTES + table as usize * 4)?;
        (table < count).then(|| self.table.word(at))?.filter(|offset| *offset != 0)
    }

    /// Returns the offset of a function's tree of inlined calls from `go:func.*`.
    fn tree_offset(&self, record: usize) -> Option<u32> {
        let tables = self.table.word(record + TABLES_AT)? as usize;
        let count = self.table.byte(record + DATA_COUNT_AT)?;
        let index = tables.checked_add(INLINED_TREE.into())?.checked_mul(4)?;
        let at = record.checked_add(RECORD_BYTES)?.checked_add(index)?;
        (INLINED_TREE < count).then(|| self.table.word(at))?.filter(|offset| *offset != u32::MAX)
    }

    /// Reads an inlined call of a function. Returns `None` if the bytes cannot be one.
    fn call(&self, address: u64, function: &GoFunction) -> Option<InlinedCall> {
        let bytes = self.elf.bytes_at(address, CALL_BYTES)?;
        let (&[_, padding @ ..], _) = bytes.split_first_chunk::<4>()?;
        let (name, site) = (read_u32(&bytes, 4)?, read_u32(&bytes, 8)?);
        let is_call =
            padding == [0; 3] && u64::from(site) < function.end - function.start && self.table.is_name(name);
        is_call.then_some(InlinedCall { name, site, start_line: first_line(read_u32(&bytes, 12)?) })
    }

    /// Finds `go:func.*` by the words of the module data that lead to trees of inlined calls.
    fn find_function_data(&self) -> Result<Option<u64>, ElfError> {
        let segments = self.elf.segments();
        let functions =
            self.table.functions(segments).take(PROBED_FUNCTIONS).filter_map(|found| found.ok()?);
        let trees = functions.filter_map(|function| {
            let offset = self.tree_offset(self.table.record_at(&function)?)?;
            Some((function, offset))
        });
        let trees: Vec<_> = trees.take(PROBED_TREES).collect();
        if trees.is_empty() {
            return Ok(None);
        }
        for module in modules(self.elf, self.table.address(), &self.table)? {
            for word in FUNCTION_DATA_WORDS {
                let Some(base) = module_word(self.elf, module, word)? else { continue };
                let leads_to_call = |(function, offset): &(GoFunction, u32)| {
                    base.checked_add((*offset).into()).and_then(|at| self.call(at, function)).is_some()
                };
                if trees.iter().all(leads_to_call) {
                    return Ok(Some(base));
                }
            }
        }
        Ok(None)
    }
}

/// A call that the compiler inlined.
struct InlinedCall {
    /// Offset of the name of the called function.
    name: u32,
    /// Offset in the function of an instruction that has the position of the call.
    site: u32,
    start_line: u32,
}

/// Returns a line of the table, which stores unknown ones as negative numbers.
fn first_line(line: u32) -> u32 {
    i32::try_from(line).map_or(0, i32::unsigned_abs)
}
