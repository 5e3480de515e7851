//! Symbol tables, read in chunks: some libraries have a hundred megabytes of symbols and names.

use std::{
    borrow::Cow,
    cell::RefCell,
    collections::{BTreeSet, HashSet},
};

use memchr::memmem;
use object::{
    LittleEndian,
    elf::{STB_GLOBAL, STB_WEAK, STT_FUNC, STT_GNU_IFUNC, STT_NOTYPE, STT_TLS, Sym64},
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
/// Bytes that are read for one name at first: few names are longer, and names that are wanted are far from one another.
const FIRST_NAME_BYTES: usize = 512;
/// Names are searched in pieces of this size.
const CHUNK_NAME_BYTES: u64 = 256 << 10;
/// Names behind this many bytes are not searched.
const MAX_NAME_TABLE_BYTES: u64 = 256 << 20;
/// A linker writes a name once. Only a hostile table has it more often than this.
const MAX_COPIES: usize = 64;

/// The symbols of one table. Iterating reads them; names are read one by one, on request.
#[derive(Debug)]
pub struct Symbols<'d> {
    data: Data<'d>,
    table: Section,
    strings: Section,
    /// The names that were read last, with their offset: those of neighbours follow one another, as a rule.
    names: RefCell<(u64, Vec<u8>)>,
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
    /// True for a thread-local variable. Its address is an offset in the block of such variables.
    pub is_thread_local: bool,
    /// Whether the symbol is of this file, and not only used by it.
    pub is_defined: bool,
    name: u32,
}

impl<'d> Symbols<'d> {
    pub(crate) fn new(data: Data<'d>, table: &Section, strings: &Section) -> Self {
        Self { data, table: table.clone(), strings: strings.clone(), names: RefCell::default() }
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

    /// Returns the addresses of the functions that have one of these names. It searches the names first, so that a table
    /// without them costs one pass over its names, and none over its symbols.
    pub fn functions_named(&self, names: &[&str]) -> BTreeSet<u64> {
        let offsets = self.offsets_of(names, CHUNK_NAME_BYTES);
        if offsets.is_empty() {
            return BTreeSet::new();
        }
        let symbols = self.iter().map_while(Result::ok);
        let named = symbols
            .filter(|symbol| symbol.is_function && symbol.is_defined && offsets.contains(&symbol.name));
        named.map(|symbol| symbol.address).collect()
    }

    /// Returns the addresses of the defined symbols that have these names, in their order. It searches the names first, as
    /// [`Self::functions_named`] does.
    pub fn addresses_of<const N: usize>(&self, names: &[&str; N]) -> [Option<u64>; N] {
        let mut addresses = [None; N];
        let offsets = self.offsets_of(names, CHUNK_NAME_BYTES);
        let longest = names.iter().map(|name| name.len()).max().unwrap_or(0);
        let symbols = self.iter().map_while(Result::ok).take_while(|_| !offsets.is_empty());
        for symbol in symbols.filter(|symbol| symbol.is_defined && offsets.contains(&symbol.name)) {
            let name = self.name(&symbol, longest + 1).unwrap_or_default();
            if let Some(number) = names.iter().position(|wanted| wanted.as_bytes() == name) {
                addresses[number] = Some(symbol.address);
            }
        }
        addresses
    }

    /// Returns where these names stand, alone or as the end of a longer name: linkers store such names once. Reads this number
    /// of bytes at once, which is more than the longest name has.
    fn offsets_of(&self, names: &[&str], chunk_bytes: u64) -> HashSet<u32> {
        let ended: Vec<Vec<u8>> = names.iter().map(|name| [name.as_bytes(), &[0]].concat()).collect();
        let finders: Vec<_> = ended.iter().map(memmem::Finder::new).collect();
        let overlap = ended.iter().map(Vec::len).max().unwrap_or(1) as u64 - 1;
        let mut offsets = HashSet::new();
        let end = self.strings.bytes.min(MAX_NAME_TABLE_BYTES);
        let mut bytes = vec![0; chunk_bytes.min(end) as usize];
        let mut first = 0;
        while first < end {
            let wanted = (end - first).min(bytes.len() as u64) as usize;
            let place = self.strings.offset.saturating_add(first);
            let Some(read) = self.data.read_into(place, &mut bytes[..wanted]) else { break };
            for finder in &finders {
                let found = finder.find_iter(&bytes[..read]).map(|at| (first + at as u64) as u32);
                offsets.extend(found.take(MAX_COPIES));
            }
            if read < wanted || first + read as u64 >= end {
                break;
            }
            first += read as u64 - overlap;
        }
        offsets
    }

    /// Reads the name of a symbol, up to `max_bytes` bytes of it; none if it has no name.
    pub fn name(&self, symbol: &Symbol, max_bytes: usize) -> Option<Vec<u8>> {
        let offset = u64::from(symbol.name);
        let mut names = self.names.borrow_mut();
        for bytes in [FIRST_NAME_BYTES.min(max_bytes), max_bytes] {
            let known = offset.checked_sub(names.0).and_then(|at| names.1.get(usize::try_from(at).ok()?..));
            if known.is_some_and(|known| known.contains(&0) || known.len() >= max_bytes) {
                break;
            }
            self.read_names(&mut names, offset, bytes)?;
        }
        let known = &names.1[(offset - names.0) as usize..];
        let known = &known[..known.len().min(max_bytes)];
        let end = known.iter().position(|byte| *byte == 0).unwrap_or(known.len());
        (end > 0).then(|| known[..end].to_vec())
    }

    /// Reads this number of bytes of names; fewer at the end of the table.
    fn read_names(&self, (first, bytes): &mut (u64, Vec<u8>), offset: u64, count: usize) -> Option<()> {
        let left = self.strings.bytes.checked_sub(offset)?;
        let place = self.strings.offset.checked_add(offset)?;
        bytes.resize(left.min(count as u64) as usize, 0);
        let read = self.data.read_into(place, bytes);
        bytes.truncate(read.unwrap_or(0));
        *first = offset;
        Some(())
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
        is_thread_local: kind == STT_TLS,
        is_defined: symbol.st_shndx.get(LE).0 != 0,
        name: symbol.st_name.get(LE),
    })
}

#[cfg(test)]
mod tests {
    use crate::{Elf, ElfLimits};

    /// Checks names that lie across the end of a piece, and those that a longer name ends with.
    #[test]
    fn names_are_found_wherever_pieces_end() {
        let bytes = std::fs::read("/proc/self/exe").unwrap();
        let elf = Elf::parse(&bytes, &ElfLimits::default()).unwrap();
        let symbols = elf.symbols(b".symtab").unwrap();
        let names = ["main", "malloc", "_start"];
        let whole = symbols.offsets_of(&names, symbols.strings.bytes);
        assert!(whole.len() >= 2, "{whole:?}");
        for chunk_bytes in 8..40 {
            assert_eq!(symbols.offsets_of(&names, chunk_bytes), whole, "{chunk_bytes}");
        }
    }
}
