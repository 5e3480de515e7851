//! Function names of an ELF file: from `.symtab`, `.dynsym`, Go's own table, and the symbol table that some distributions
//! store compressed in `.gnu_debugdata` when they strip the others.
//!
//! The search reads only the names at the addresses of the caller: some libraries have a hundred megabytes of names, and a profile
//! needs a few hundred names.

use std::{
    fs::File,
    io::{self, Read},
};

use gannet_elf::{Elf, ElfError, ElfLimits, GoFault, Section, Symbols};
use lzma_rust2::XzReader;

use crate::{
    demangle::MAX_NAME_BYTES,
    go::{self, GoError},
    symbol_search::{Offer, SymbolSearch, TooMuchWork},
};

/// Maximum size of a symbol table, in bytes: ten million functions.
const MAX_TABLE_BYTES: u64 = 256 << 20;
const MAX_MINI_DEBUG_BYTES: u64 = 32 << 20;
/// Maximum memory of the decoder: 64 MiB for the dictionary of `xz -9`, and the decoder's own tables. It uses no more than the table needs.
const MAX_UNPACKING_KIB: u32 = 65 << 10;

/// The reason why the functions of a file have no names.
#[derive(Debug, thiserror::Error)]
pub enum SymbolError {
    /// An error of the file system, or a malformed file.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// The symbol table exceeds the limit.
    #[error("the symbol table has {0} bytes, the limit is {MAX_TABLE_BYTES}")]
    TableTooLarge(u64),
    /// The search took too long.
    #[error(transparent)]
    TooMuchWork(#[from] TooMuchWork),
    /// An error of decompression.
    #[error("cannot decompress the symbol table: {0}")]
    Packed(io::Error),
}

/// The names of functions in a file.
#[derive(Debug)]
pub struct FoundSymbols {
    /// The name for each address.
    pub names: Vec<Option<Vec<u8>>>,
    /// The reason why the search did not use Go's function table. It did use the other tables.
    pub go_fault: Option<GoFault>,
}

/// Finds the function at each of these sorted addresses, in the file, and in its debug file if the file is stripped.
pub fn find(file: &File, debug_file: Option<&File>, addresses: &[u64]) -> Result<FoundSymbols, SymbolError> {
    let elf = open(file)?;
    let mut search = SymbolSearch::new(addresses);
    let mut go_fault = None;
    offer_tables(&elf, &mut search)?;
    if elf.stored_section(b".symtab").is_none() {
        match go::offer(&elf, &mut search) {
            Ok(()) => {}
            Err(GoError::Table(fault)) => go_fault = Some(fault),
            Err(GoError::Elf(error)) => return Err(error.into()),
            Err(GoError::TooMuchWork(error)) => return Err(error.into()),
        }
        if let Some(debug_file) = debug_file {
            offer_tables(&open(debug_file)?, &mut search)?;
        } else if let Some(section) = elf.stored_section(b".gnu_debugdata") {
            let unpacked = unpack(&elf, section)?;
            offer_tables(&open(&unpacked)?, &mut search)?;
        }
    }
    Ok(FoundSymbols { names: search.finish(), go_fault })
}

fn open(file: &File) -> Result<Elf<'_>, ElfError> {
    let elf = Elf::parse(file, &ElfLimits::default())?;
    match elf.section_fault() {
        Some(fault) => Err(fault.clone()),
        None => Ok(elf),
    }
}

fn offer_tables(elf: &Elf<'_>, search: &mut SymbolSearch<'_>) -> Result<(), SymbolError> {
    for (name, dynamic) in [(&b".symtab"[..], false), (b".dynsym", true)] {
        if let Some(symbols) = elf.symbols(name) {
            offer_table(&symbols, dynamic, search)?;
        }
    }
    Ok(())
}

/// Removes the version that linkers append to the name of a library's symbol: `name@VERSION`, `name@@VERSION`.
fn without_version(mut name: Vec<u8>) -> Vec<u8> {
    if let Some(at) = name.iter().position(|byte| *byte == b'@').filter(|at| *at > 0) {
        name.truncate(at);
    }
    name
}

fn offer_table(
    symbols: &Symbols<'_>,
    dynamic: bool,
    search: &mut SymbolSearch<'_>,
) -> Result<(), SymbolError> {
    if symbols.bytes() > MAX_TABLE_BYTES {
        return Err(SymbolError::TableTooLarge(symbols.bytes()));
    }
    for symbol in symbols.iter() {
        let symbol = symbol?;
        // An undefined symbol is a function of another file. In `.dynsym` the neighbours of a symbol without size are missing,
        // so the symbol would claim code that is not its own.
        if !(symbol.is_function || symbol.is_untyped) || !symbol.is_defined || (dynamic && symbol.size == 0) {
            continue;
        }
        let offer = Offer {
            start: symbol.address,
            size: symbol.size,
            is_function: symbol.is_function,
            visibility: symbol.binding as u32,
        };
        search.offer(offer, || {
            let name = symbols.name(&symbol, MAX_NAME_BYTES + 1).map(without_version);
            name.filter(|name| symbol.is_function || is_label(name))
        })?;
    }
    Ok(())
}

/// Reports whether an untyped symbol is a label of hand-written assembly, and not an internal mark of the assembler.
fn is_label(name: &[u8]) -> bool {
    !name.starts_with(b"$") && !name.starts_with(b".L") && !name.starts_with(b"__") && name != b"_DYNAMIC"
}

/// Decompresses the symbol table into a memory file, which the search reads like any file.
fn unpack(elf: &Elf<'_>, section: &Section) -> Result<File, SymbolError> {
    let packed = elf.section_data_within(section, MAX_MINI_DEBUG_BYTES)?;
    let memory = rustix::fs::memfd_create("gannet-symbols", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|error| SymbolError::Packed(error.into()))?;
    let mut file = File::from(memory);
    let unpacked = XzReader::new_mem_limit(&*packed, false, MAX_UNPACKING_KIB);
    // One byte more than the limit distinguishes a table over the limit from one of exactly its size.
    let bytes =
        io::copy(&mut unpacked.take(MAX_MINI_DEBUG_BYTES + 1), &mut file).map_err(SymbolError::Packed)?;
    if bytes > MAX_MINI_DEBUG_BYTES {
        return Err(SymbolError::Packed(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_shown_without_its_librarys_version() {
        for (written, name) in [
            ("main", "main"),
            ("start@GLIBC_2.2.5", "start"),
            ("start@@GLIBC_2.34", "start"),
            ("@odd", "@odd"),
        ] {
            assert_eq!(without_version(written.into()), name.as_bytes());
        }
    }
}
