//! The functions that an ELF file names: `.symtab`, `.dynsym`, Go's own table, and the one that some distributions keep
//! compressed in `.gnu_debugdata` when they strip the rest.

use std::{
    fs::File,
    io::{self, BufReader, Write},
};

use object::{
    LittleEndian,
    elf::{STB_GLOBAL, STB_WEAK, STT_FUNC, STT_GNU_IFUNC, STT_NOTYPE, Sym64},
    pod,
};

use super::{
    elf::{self, ElfError, Section, Sections},
    go,
    table::{SymbolTable, TableBuilder, TooManySymbols},
};

const LE: LittleEndian = LittleEndian;
/// The largest libraries that are shipped with symbols have about a million functions.
pub(crate) const MAX_TABLE_BYTES: usize = 96 << 20;
const MAX_STRING_BYTES: u64 = 128 << 20;
const MAX_MINI_DEBUG_BYTES: u64 = 32 << 20;
const SYMBOL_BYTES: usize = size_of::<Sym64<LittleEndian>>();
const CHUNK_SYMBOLS: usize = 4096;

/// Reads every function of the file, and those that only its debug file still names.
pub(crate) fn read(file: &File, debug_file: Option<&File>) -> Result<SymbolTable, ElfError> {
    let sections = Sections::read(file)?;
    let mut builder = TableBuilder::new(MAX_TABLE_BYTES);
    add_tables(file, &sections, &mut builder)?;
    if sections.find(".symtab").is_some() {
        return Ok(builder.finish());
    }
    go::add(file, &sections, &mut builder)?;
    if let Some(debug_file) = debug_file {
        add_tables(debug_file, &Sections::read(debug_file)?, &mut builder)?;
    } else if let Some(section) = sections.find(".gnu_debugdata") {
        let unpacked = unpack(file, section)?;
        add_tables(&unpacked, &Sections::read(&unpacked)?, &mut builder)?;
    }
    Ok(builder.finish())
}

fn add_tables(file: &File, sections: &Sections, builder: &mut TableBuilder) -> Result<(), ElfError> {
    for (name, dynamic) in [(".symtab", false), (".dynsym", true)] {
        let Some(symbols) = sections.find(name) else { continue };
        let Some(strings) = sections.by_index(symbols.link) else { continue };
        let strings = elf::read_section(file, strings, MAX_STRING_BYTES, "string table")?;
        add(file, symbols, &strings, dynamic, builder)?;
    }
    Ok(())
}

fn add(
    file: &File,
    section: Section,
    strings: &[u8],
    dynamic: bool,
    builder: &mut TableBuilder,
) -> Result<(), ElfError> {
    let count = section.size as usize / SYMBOL_BYTES;
    for first in (0..count).step_by(CHUNK_SYMBOLS) {
        let here = CHUNK_SYMBOLS.min(count - first);
        let offset = section.offset.saturating_add((first * SYMBOL_BYTES) as u64);
        let bytes = elf::read(file, offset, here * SYMBOL_BYTES, "symbol table")?;
        let (symbols, _) = pod::slice_from_bytes::<Sym64<LittleEndian>>(&bytes, here)
            .map_err(|()| ElfError::Damaged("symbol table"))?;
        for symbol in symbols {
            let Some(name) = elf::c_string(strings, symbol.st_name.get(LE) as usize) else { continue };
            let (kind, size, value) = (symbol.st_type(), symbol.st_size.get(LE), symbol.st_value.get(LE));
            let is_code = kind == STT_FUNC || kind == STT_GNU_IFUNC || (kind == STT_NOTYPE && is_label(name));
            // What is undefined here is a function of another file. In `.dynsym` the neighbours of a symbol without
            // size are missing, so that it would take in code that is not its own.
            if !is_code || name.is_empty() || symbol.st_shndx.get(LE).0 == 0 || (dynamic && size == 0) {
                continue;
            }
            builder
                .push(value, size, name, rank(symbol, name))
                .map_err(|TooManySymbols| ElfError::TooLarge("symbol table"))?;
        }
    }
    Ok(())
}

/// Whether an untyped symbol names code as hand-written assembly does, and is no mark of the assembler's.
fn is_label(name: &[u8]) -> bool {
    !name.starts_with(b"$") && !name.starts_with(b".L") && !name.starts_with(b"__") && name != b"_DYNAMIC"
}

/// Which of several names at one address is shown: the one that programmers use.
fn rank(symbol: &Sym64<LittleEndian>, name: &[u8]) -> u32 {
    let binding = match symbol.st_bind() {
        STB_GLOBAL => 2,
        STB_WEAK => 1,
        _ => 0,
    };
    let sized = u32::from(symbol.st_size.get(LE) != 0);
    let underscores = name.iter().take_while(|byte| **byte == b'_').take(15).count() as u32;
    sized * 256 + (15 - underscores) * 16 + binding
}

/// Unpacks the compressed symbol table into memory that has a descriptor, so that it is read like any file.
fn unpack(file: &File, section: Section) -> Result<File, ElfError> {
    const WHAT: &str = "compressed symbol table";
    if section.size > MAX_MINI_DEBUG_BYTES {
        return Err(ElfError::TooLarge(WHAT));
    }
    let packed = elf::read_section(file, section, MAX_MINI_DEBUG_BYTES, WHAT)?;
    let memory = rustix::fs::memfd_create("gannet-symbols", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|_| ElfError::TooLarge(WHAT))?;
    let mut bounded = Bounded { file: File::from(memory), left: MAX_MINI_DEBUG_BYTES };
    lzma_rs::xz_decompress(&mut BufReader::new(packed.as_slice()), &mut bounded)
        .map_err(|_| if bounded.left == 0 { ElfError::TooLarge(WHAT) } else { ElfError::Damaged(WHAT) })?;
    Ok(bounded.file)
}

/// Takes no more bytes than it has room for.
struct Bounded {
    file: File,
    left: u64,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.left {
            self.left = 0;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.left -= bytes.len() as u64;
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
