//! Symbol tables, read in chunks: some libraries have a hundred megabytes of symbols and names.

use std::borrow::Cow;

use object::{
    LittleEndian,
    elf::{STB_GLOBAL, STB_WEAK, STT_FUNC, STT_GNU_IFUNC, STT_NOTYPE, Sym64},
    pod,
};

use crate::{
    data::Data,
    error::{ElfError, malformed},
    file_header::LE,
    sections::Section,
};

const SYMBOL_BYTES: usize = size_of::<Sym64<LittleEndian>>();
const CHUNK_SYMBOLS: usize = 4096;

/// The symbols of one table. Iterating reads them; names are read one by one, on request.
#[derive(Debug)]
pub struct Symbols<'d> {
    data: Data<'d>,
    table: Section,
    strings: Section,
}

/// How far a symbol is visible, the least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Binding {
    /// Within its object file, or unknown.
    Local,
    /// Everywhere; another definition replaces it.
    Weak,
    /// Visible in every file.
    Global,
}

/// An entry of a symbol table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// ELF virtual address.
    pub address: u64,
    /// Bytes; 0 if the size is unknown.
    pub size: u64,
    /// How far the symbol is visible.
    pub binding: Binding,
    /// Whether the symbol is a function. An indirect function counts: its address is that of its resolver.
    pub is_function: bool,
    /// Whether the symbol has no type, as labels of hand-written assembly.
    pub is_untyped: bool,
    /// Whether the symbol is of this file, and not only used by it.
    pub is_defined: bool,
    name: u32,
}

impl<'d> Symbols<'d> {
    pub(crate) fn new(data: Data<'d>, table: &Section, strings: &Section) -> Self {
        Self { data, table: table.clone(), strings: strings.clone() }
    }

    /// Returns the bytes of the table, without those of names.
    pub fn bytes(&self) -> u64 {
        self.table.bytes
    }

    /// Reads the symbols, 96 KiB at a time. An item is an error where the table reaches out of the file; it is the last.
    pub fn iter(&self) -> impl Iterator<Item = Result<Symbol, ElfError>> + '_ {
        let count = usize::try_from(self.table.bytes).unwrap_or(usize::MAX) / SYMBOL_BYTES;
        let mut failed = false;
        (0..count)
            .step_by(CHUNK_SYMBOLS)
            .map_while(move |first| {
                let chunk = (!failed).then(|| self.chunk(first, CHUNK_SYMBOLS.min(count - first)))?;
                failed = chunk.is_err();
                Some(chunk)
            })
            .flat_map(|chunk| {
                let (bytes, error) = match chunk {
                    Ok(bytes) => (bytes, None),
                    Err(error) => (Cow::Borrowed(&[][..]), Some(Err(error))),
                };
                let count = bytes.len() / SYMBOL_BYTES;
                (0..count)
                    .filter_map(move |index| symbol(&bytes[index * SYMBOL_BYTES..]).map(Ok))
                    .chain(error)
            })
    }

    fn chunk(&self, first: usize, count: usize) -> Result<Cow<'d, [u8]>, ElfError> {
        let offset = self.table.offset.saturating_add((first * SYMBOL_BYTES) as u64);
        let bytes = self.data.read(offset, (count * SYMBOL_BYTES) as u64);
        bytes.ok_or_else(|| malformed("the symbol table is outside the file"))
    }

    /// Reads the name of a symbol, up to `max_bytes` bytes of it; none if it has no name.
    pub fn name(&self, symbol: &Symbol, max_bytes: usize) -> Option<Vec<u8>> {
        let left = self.strings.bytes.checked_sub(u64::from(symbol.name))?;
        let mut name = vec![0; left.min(max_bytes as u64) as usize];
        let offset = self.strings.offset.checked_add(u64::from(symbol.name))?;
        let read = self.data.read_into(offset, &mut name)?;
        name.truncate(name[..read].iter().position(|byte| *byte == 0).unwrap_or(read));
        (!name.is_empty()).then_some(name)
    }
}

fn symbol(bytes: &[u8]) -> Option<Symbol> {
    let (symbol, _) = pod::from_bytes::<Sym64<LittleEndian>>(bytes).ok()?;
    let kind = symbol.st_type();
    Some(Symbol {
        address: symbol.st_value.get(LE),
        size: symbol.st_size.get(LE),
        binding: match symbol.st_bind() {
            STB_GLOBAL => Binding::Global,
            STB_WEAK => Binding::Weak,
            _ => Binding::Local,
        },
        is_function: kind == STT_FUNC || kind == STT_GNU_IFUNC,
        is_untyped: kind == STT_NOTYPE,
        is_defined: symbol.st_shndx.get(LE).0 != 0,
        name: symbol.st_name.get(LE),
    })
}
