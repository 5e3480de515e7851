//! The functions that an ELF file names: in `.symtab`, `.dynsym`, Go's own table, and the table that some distributions
//! keep compressed in `.gnu_debugdata` when they strip the rest.
//!
//! Only the names of the addresses that are wanted are read. Some libraries have a hundred megabytes of names, and a
//! profile wants a few hundred of them.

use std::{
    fs::File,
    io::{self, BufReader, Write},
};

use gannet_elf::{Elf, ElfError, ElfLimits, GoFault, Section, Symbols};

use super::{demangle::MAX_NAME_BYTES, go, table::MAX_UNSIZED_BYTES};

/// Ten million functions.
const MAX_TABLE_BYTES: u64 = 256 << 20;
const MAX_MINI_DEBUG_BYTES: u64 = 32 << 20;
/// How often a symbol may be weighed against an address, and what reading its name counts as: a table can be made in
/// which every symbol holds every address.
const MAX_WORK: u64 = 64 << 20;
const NAME_WORK: u64 = 64;

/// Why the functions of a file have no names.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SymbolError {
    /// The file, or a part of it, cannot be read.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// Go's function table is damaged, or of a version that is not known.
    #[error(transparent)]
    Go(#[from] GoFault),
    /// The table of symbols is larger than any real one.
    #[error("a symbol table of {0} bytes is over the limit of {MAX_TABLE_BYTES}")]
    TableTooLarge(u64),
    /// The symbols overlap so much that finding one would take too long.
    #[error("the symbol table takes too long to search")]
    TooMuchWork,
    /// The compressed symbol table cannot be unpacked.
    #[error("the compressed symbol table cannot be unpacked: {0}")]
    Packed(io::Error),
}

/// Finds the name of the function at each of the addresses, which are sorted: in the file, and in its debug file where the
/// file has been stripped.
pub(crate) fn find(
    file: &File,
    debug_file: Option<&File>,
    addresses: &[u64],
) -> Result<Vec<Option<Vec<u8>>>, SymbolError> {
    let elf = open(file)?;
    let mut finder = Finder::new(addresses);
    offer_tables(&elf, &mut finder)?;
    if elf.stored_section(b".symtab").is_none() {
        go::offer(&elf, &mut finder)?;
        if let Some(debug_file) = debug_file {
            offer_tables(&open(debug_file)?, &mut finder)?;
        } else if let Some(section) = elf.stored_section(b".gnu_debugdata") {
            let unpacked = unpack(&elf, section)?;
            offer_tables(&open(&unpacked)?, &mut finder)?;
        }
    }
    Ok(finder.finish())
}

fn open(file: &File) -> Result<Elf<'_>, ElfError> {
    let elf = Elf::parse(file, &ElfLimits::default())?;
    match elf.section_fault() {
        Some(fault) => Err(fault.clone()),
        None => Ok(elf),
    }
}

/// For each wanted address the best symbol so far.
pub(super) struct Finder<'a> {
    wanted: &'a [u64],
    holding: Vec<Option<Candidate>>,
    /// The last symbol at or before each address and behind the address before it. One of unknown size reaches to the
    /// next symbol, so that the next one must be known whatever its size.
    before: Vec<Option<Candidate>>,
    work: u64,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    start: u64,
    /// Of two at one address the one that programmers use; one with a size always ranks higher.
    rank: u32,
    name: Option<Vec<u8>>,
}

const SIZED: u32 = 1 << 16;

impl<'a> Finder<'a> {
    pub(super) fn new(wanted: &'a [u64]) -> Self {
        Self { wanted, holding: vec![None; wanted.len()], before: vec![None; wanted.len()], work: MAX_WORK }
    }

    /// Offers a symbol; `size` 0 is an unknown size. The name is asked for only if it may be wanted, and is no
    /// function's if there is none.
    pub(super) fn offer(
        &mut self,
        start: u64,
        size: u64,
        binding: u32,
        mut name: impl FnMut() -> Option<Vec<u8>>,
    ) -> Result<(), SymbolError> {
        let first = self.wanted.partition_point(|address| *address < start);
        let held = self.wanted[first..].iter().take_while(|address| **address - start < size).count();
        self.spend(1 + held as u64)?;
        let is_nearer = |known: &Option<Candidate>| known.as_ref().is_none_or(|known| known.start <= start);
        if first == self.wanted.len() || !(held > 0 || is_nearer(&self.before[first])) {
            return Ok(());
        }
        if size > 0 && held == 0 {
            // It ends what is before it, and nobody asks for its name.
            let end = Candidate { start, rank: SIZED, name: None };
            self.before[first] = self.before[first].take().max(Some(end));
            return Ok(());
        }
        self.spend(NAME_WORK)?;
        let Some(name) = name() else { return Ok(()) };
        let underscores = name.iter().take_while(|byte| **byte == b'_').take(15).count() as u32;
        let rank = (15 - underscores) * 16 + binding + if size > 0 { SIZED } else { 0 };
        let candidate = Some(Candidate { start, rank, name: Some(name) });
        for known in &mut self.holding[first..first + held] {
            if *known < candidate {
                known.clone_from(&candidate);
            }
        }
        self.before[first] = self.before[first].take().max(candidate);
        Ok(())
    }

    pub(super) fn spend(&mut self, work: u64) -> Result<(), SymbolError> {
        self.work = self.work.checked_sub(work).ok_or(SymbolError::TooMuchWork)?;
        Ok(())
    }

    pub(super) fn finish(self) -> Vec<Option<Vec<u8>>> {
        let mut nearest: Option<Candidate> = None;
        let Self { wanted, holding, before, .. } = self;
        wanted
            .iter()
            .zip(holding.into_iter().zip(before))
            .map(|(address, (holding, before))| {
                nearest = nearest.take().max(before);
                let open = nearest.as_ref().filter(|nearest| {
                    nearest.rank < SIZED
                        && address - nearest.start < MAX_UNSIZED_BYTES
                        && holding.as_ref().is_none_or(|holding| holding.start < nearest.start)
                });
                open.cloned().or(holding)?.name
            })
            .collect()
    }
}

fn offer_tables(elf: &Elf<'_>, finder: &mut Finder<'_>) -> Result<(), SymbolError> {
    for (name, dynamic) in [(&b".symtab"[..], false), (b".dynsym", true)] {
        if let Some(symbols) = elf.symbols(name) {
            offer_table(&symbols, dynamic, finder)?;
        }
    }
    Ok(())
}

/// Linkers write the version of a library's symbol behind its name: `name@VERSION`, `name@@VERSION`.
fn without_version(mut name: Vec<u8>) -> Vec<u8> {
    if let Some(at) = name.iter().position(|byte| *byte == b'@').filter(|at| *at > 0) {
        name.truncate(at);
    }
    name
}

fn offer_table(symbols: &Symbols<'_>, dynamic: bool, finder: &mut Finder<'_>) -> Result<(), SymbolError> {
    if symbols.bytes() > MAX_TABLE_BYTES {
        return Err(SymbolError::TableTooLarge(symbols.bytes()));
    }
    for symbol in symbols.iter() {
        let symbol = symbol?;
        // A symbol that is undefined here is a function of another file. In `.dynsym` the neighbours of a symbol without
        // size are missing, so that it would take in code that is not its own.
        if !(symbol.is_function || symbol.is_untyped) || !symbol.is_defined || (dynamic && symbol.size == 0) {
            continue;
        }
        finder.offer(symbol.address, symbol.size, symbol.binding as u32, || {
            let name = symbols.name(&symbol, MAX_NAME_BYTES + 1).map(without_version);
            name.filter(|name| symbol.is_function || is_label(name))
        })?;
    }
    Ok(())
}

/// Whether an untyped symbol names code as hand-written assembly does, and is no mark of the assembler's.
fn is_label(name: &[u8]) -> bool {
    !name.starts_with(b"$") && !name.starts_with(b".L") && !name.starts_with(b"__") && name != b"_DYNAMIC"
}

/// Unpacks the compressed symbol table into memory that has a descriptor, so that it is read like any file.
fn unpack(elf: &Elf<'_>, section: &Section) -> Result<File, SymbolError> {
    let packed = elf.section_data_within(section, MAX_MINI_DEBUG_BYTES)?;
    let memory = rustix::fs::memfd_create("gannet-symbols", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|error| SymbolError::Packed(error.into()))?;
    let mut bounded = Bounded { file: File::from(memory), left: MAX_MINI_DEBUG_BYTES };
    lzma_rs::xz_decompress(&mut BufReader::new(&*packed), &mut bounded).map_err(|error| {
        SymbolError::Packed(if bounded.left == 0 {
            io::ErrorKind::FileTooLarge.into()
        } else {
            io::Error::other(format!("{error:?}"))
        })
    })?;
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn find_in(symbols: &[(u64, u64, &str)], wanted: &[u64]) -> Vec<Option<String>> {
        let mut finder = Finder::new(wanted);
        for (start, size, name) in symbols {
            finder.offer(*start, *size, 0, || Some(name.as_bytes().to_vec())).unwrap();
        }
        finder.finish().into_iter().map(|name| name.map(|name| String::from_utf8(name).unwrap())).collect()
    }

    const SYMBOLS: [(u64, u64, &str); 5] = [
        (0x100, 0x40, "outer"),
        (0x110, 0x8, "inner"),
        (0x200, 0, "open"),
        (0x300, 1, "one"),
        (0x500, 0x10, "far"),
    ];

    #[test]
    fn an_address_belongs_to_the_symbol_that_holds_it_in_whatever_order_they_come() {
        let expected = [
            (0, None),
            (0xff, None),
            (0x100, Some("outer")),
            (0x117, Some("inner")),
            (0x118, Some("outer")),
            (0x140, None),
            (0x200, Some("open")),
            (0x2ff, Some("open")),
            (0x300, Some("one")),
            (0x301, None),
            (0x50f, Some("far")),
            (u64::MAX, None),
        ];
        let wanted: Vec<u64> = expected.iter().map(|(address, _)| *address).collect();
        let names: Vec<Option<String>> = expected.iter().map(|(_, name)| name.map(str::to_owned)).collect();
        let mut turned = SYMBOLS;
        turned.reverse();
        assert_eq!(find_in(&SYMBOLS, &wanted), names);
        assert_eq!(find_in(&turned, &wanted), names);
        // Alone an address is found as it is among others.
        for (address, name) in wanted.iter().zip(&names) {
            assert_eq!(find_in(&SYMBOLS, &[*address]), std::slice::from_ref(name), "{address:#x}");
        }
    }

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

    #[test]
    fn a_symbol_without_size_does_not_reach_for_ever() {
        let last = 0x1000 + MAX_UNSIZED_BYTES - 1;
        assert_eq!(find_in(&[(0x1000, 0, "last")], &[last, last + 1]), [Some("last".to_owned()), None]);
    }

    #[test]
    fn of_aliases_the_one_that_programmers_use_is_shown() {
        let aliases =
            [(0x10, 4, "__libc_malloc"), (0x10, 4, "malloc"), (0x10, 4, "_malloc"), (0x10, 0, "label")];
        for turn in 0..aliases.len() {
            let mut symbols = aliases;
            symbols.rotate_left(turn);
            assert_eq!(find_in(&symbols, &[0x11]), [Some("malloc".to_owned())]);
        }
    }

    #[test]
    fn a_table_that_is_made_to_cost_is_given_up() {
        let wanted: Vec<u64> = (0..4096).collect();
        let mut finder = Finder::new(&wanted);
        let result =
            (0..1 << 20).try_for_each(|_| finder.offer(0, 1 << 20, 0, || Some(b"everything".to_vec())));
        assert!(matches!(result, Err(SymbolError::TooMuchWork)), "{result:?}");
    }

    proptest! {
        #[test]
        fn it_finds_what_a_plain_search_finds(
            symbols in proptest::collection::vec((0u64..200, 0u64..20), 0..40),
            wanted in proptest::collection::btree_set(0u64..230, 0..40),
        ) {
            let named: Vec<(u64, u64, String)> =
                symbols.iter().enumerate().map(|(index, (start, size))| (*start, *size, format!("f{index:02}"))).collect();
            let offered: Vec<(u64, u64, &str)> =
                named.iter().map(|(start, size, name)| (*start, *size, name.as_str())).collect();
            let wanted: Vec<u64> = wanted.into_iter().collect();
            let found = find_in(&offered, &wanted);
            for (address, found) in wanted.iter().zip(found) {
                // The nearest start decides; there, those with a size that holds the address come first.
                let holding = named.iter().filter(|(start, size, _)| start <= address && address - start < *size);
                let holding = holding.max_by_key(|(start, _, name)| (*start, name.clone()));
                let nearest = named.iter().filter(|(start, _, _)| start <= address);
                let nearest = nearest.max_by_key(|(start, size, name)| (*start, *size > 0, name.clone()));
                let expected = match (holding, nearest) {
                    (holding, Some((start, 0, name))) if holding.is_none_or(|holding| holding.0 < *start) => Some(name),
                    (Some((_, _, name)), _) => Some(name),
                    (None, _) => None,
                };
                prop_assert_eq!(found.as_ref(), expected, "{:#x}", address);
            }
        }
    }
}
