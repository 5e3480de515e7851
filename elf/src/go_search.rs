//! Finds Go's function table in a file, and the start of the code that it counts from.
//!
//! Most programs have the table in a section of its own. With cgo and position-independent code, the linker of C joins it to
//! other relocated data, and only its header tells where it begins. Since Go 1.26 the header does not hold the start of the
//! code either. It is in the module data then, which the Go runtime uses itself. The start of `.text` is no substitute:
//! the C library's start code comes before the Go functions there, and each name would be shifted by it.

use std::borrow::Cow;

use crate::{
    data::read_u64,
    error::ElfError,
    file::Elf,
    go::{GoFault, GoTable, HEADER_BYTES, TEXT_START_AT},
};

/// Sections of the table alone.
const TABLE_SECTIONS: [&[u8]; 2] = [b".gopclntab", b".data.rel.ro.gopclntab"];
/// Sections that a linker joins the table to.
const JOINED_SECTIONS: [&[u8]; 2] = [b".data.rel.ro", b".rodata"];
/// Sections that can hold the module data: that of its own, which Go has since 1.26, first.
const MODULE_SECTIONS: [&[u8]; 4] = [b".go.module", b".data", b".noptrdata", b".data.rel.ro"];
/// The words of the module data that are read here. Their places have been the same since Go 1.16.
const TABLE_WORD: u64 = 0;
const NAMES_WORD: u64 = 1;
const FIRST_FUNCTION_WORD: u64 = 20;
const TEXT_WORD: u64 = 22;
const WORD_BYTES: u64 = 8;
/// Headers that are tried in one file.
const MAX_HEADERS: usize = 64;

impl<'d> Elf<'d> {
    /// Reads Go's function table if the file has one and it has at most `max_bytes` bytes.
    pub fn go_table(&self, max_bytes: u64) -> Result<Option<Result<GoTable<'d>, GoFault>>, ElfError> {
        find(self, max_bytes)
    }
}

fn find<'d>(elf: &Elf<'d>, max_bytes: u64) -> Result<Option<Result<GoTable<'d>, GoFault>>, ElfError> {
    if let Some(section) = TABLE_SECTIONS.iter().find_map(|name| elf.stored_section(name)) {
        let bytes = elf.section_data_within(section, max_bytes)?;
        let table = GoTable::parse(bytes).and_then(|table| with_text_start(elf, section.vaddr, table));
        return Ok(Some(table));
    }
    if elf.build_ids().go.is_none() && elf.section(b".go.buildinfo").is_none() {
        return Ok(None);
    }
    let mut fault = None;
    for section in JOINED_SECTIONS.iter().filter_map(|name| elf.stored_section(name)) {
        let bytes = elf.section_data_within(section, max_bytes)?;
        for at in headers(&bytes).take(MAX_HEADERS) {
            let address = section.vaddr.saturating_add(at as u64);
            match GoTable::parse(from(&bytes, at)).and_then(|table| with_text_start(elf, address, table)) {
                Ok(table) => return Ok(Some(Ok(table))),
                Err(found) => fault = Some(found),
            }
        }
    }
    Ok(fault.map(Err))
}

/// Returns the places that look like the header of a table.
fn headers(bytes: &[u8]) -> impl Iterator<Item = usize> {
    bytes.windows(HEADER_BYTES).step_by(WORD_BYTES as usize).enumerate().filter_map(|(index, header)| {
        let is_header = matches!(header, [0xf0 | 0xf1 | 0xfa, 0xff, 0xff, 0xff, 0, 0, 1 | 4, 8, ..]);
        is_header.then_some(index * WORD_BYTES as usize)
    })
}

fn from<'d>(bytes: &Cow<'d, [u8]>, at: usize) -> Cow<'d, [u8]> {
    match bytes {
        Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[at..]),
        Cow::Owned(bytes) => Cow::Owned(bytes[at..].to_vec()),
    }
}

fn with_text_start<'d>(elf: &Elf<'d>, address: u64, mut table: GoTable<'d>) -> Result<GoTable<'d>, GoFault> {
    table.set_address(address);
    if table.needs_text_start() {
        let unreadable = |_: ElfError| GoFault("the relocations of the file cannot be read");
        let in_header = elf.relocated(address.saturating_add(TEXT_START_AT)).map_err(unreadable)?;
        let text_start = match in_header {
            Some(text_start) => Some(text_start),
            None => text_start_of_module(elf, address, &table).map_err(unreadable)?,
        };
        table.set_text_start(text_start.ok_or(GoFault("the start of the Go code is not known"))?);
    }
    Ok(table)
}

/// Finds the module data that points to this table, and returns the start of the code in it.
fn text_start_of_module(
    elf: &Elf<'_>,
    table_address: u64,
    table: &GoTable<'_>,
) -> Result<Option<u64>, ElfError> {
    let first_offset = table.first_function();
    for module in modules(elf, table_address, table)? {
        let Some(text_start) = module_word(elf, module, TEXT_WORD)? else { continue };
        // The first function must lie at the address in the table, which other data would hardly match.
        let first = module_word(elf, module, FIRST_FUNCTION_WORD)?;
        if first.is_some() && first == first_offset.and_then(|offset| text_start.checked_add(offset)) {
            return Ok(Some(text_start));
        }
    }
    Ok(None)
}

/// Returns the addresses of module data for the table at an address: words there point to the table and to its names.
pub(crate) fn modules(elf: &Elf<'_>, table_address: u64, table: &GoTable<'_>) -> Result<Vec<u64>, ElfError> {
    let names = table_address.saturating_add(table.names_at());
    let mut found = Vec::new();
    for section in MODULE_SECTIONS.iter().filter_map(|name| elf.stored_section(name)) {
        let bytes = elf.section_data(section)?;
        let stored = |at: usize, word: u64| read_u64(&bytes, at + (word * WORD_BYTES) as usize);
        let at = (0..bytes.len()).step_by(WORD_BYTES as usize).find(|at| {
            stored(*at, TABLE_WORD) == Some(table_address) && stored(*at, NAMES_WORD) == Some(names)
        });
        match at {
            Some(at) => found.push(section.vaddr.saturating_add(at as u64)),
            // Some linkers leave relocated words empty.
            None if elf.relocated(section.vaddr)? == Some(table_address) => found.push(section.vaddr),
            None => {}
        }
    }
    Ok(found)
}

/// Returns a word of module data, or the value of its relocation if the file stores 0.
pub(crate) fn module_word(elf: &Elf<'_>, module: u64, word: u64) -> Result<Option<u64>, ElfError> {
    let address = module.saturating_add(word * WORD_BYTES);
    let stored = elf.bytes_at(address, WORD_BYTES).and_then(|bytes| read_u64(&bytes, 0));
    match stored.filter(|stored| *stored != 0) {
        Some(stored) => Ok(Some(stored)),
        None => elf.relocated(address),
    }
}
