//! The functions that an ELF file names: in `.symtab`, `.dynsym`, Go's own table, and the table that some distributions
//! keep compressed in `.gnu_debugdata` when they strip the rest.
//!
//! Only the names of the addresses that are wanted are read. Some libraries have a hundred megabytes of names, and a
//! profile wants a few hundred of them.

use std::{
    fs::File,
    io::{self, BufReader, Write},
    os::unix::fs::FileExt,
};

use object::{
    LittleEndian,
    elf::{STB_GLOBAL, STB_WEAK, STT_FUNC, STT_GNU_IFUNC, STT_NOTYPE, Sym64},
    pod,
};

use super::{
    demangle::MAX_NAME_BYTES,
    elf::{self, ElfError, Section, Sections},
    go,
    table::MAX_UNSIZED_BYTES,
};

const LE: LittleEndian = LittleEndian;
/// Ten million functions.
const MAX_TABLE_BYTES: u64 = 256 << 20;
const MAX_MINI_DEBUG_BYTES: u64 = 32 << 20;
const SYMBOL_BYTES: usize = size_of::<Sym64<LittleEndian>>();
const CHUNK_SYMBOLS: usize = 4096;
/// How often a symbol may be weighed against an address, and what reading its name counts as: a table can be made in
/// which every symbol holds every address.
const MAX_WORK: u64 = 64 << 20;
const NAME_WORK: u64 = 64;

/// The name of the function at each of the addresses, which are sorted: from the file, and from its debug file where it
/// has been stripped.
pub(crate) fn find(
    file: &File,
    debug_file: Option<&File>,
    addresses: &[u64],
) -> Result<Vec<Option<Vec<u8>>>, ElfError> {
    let sections = Sections::read(file)?;
    let mut finder = Finder::new(addresses);
    offer_tables(file, &sections, &mut finder)?;
    if sections.find(".symtab").is_none() {
        go::offer(file, &sections, &mut finder)?;
        if let Some(debug_file) = debug_file {
            offer_tables(debug_file, &Sections::read(debug_file)?, &mut finder)?;
        } else if let Some(section) = sections.find(".gnu_debugdata") {
            let unpacked = unpack(file, section)?;
            offer_tables(&unpacked, &Sections::read(&unpacked)?, &mut finder)?;
        }
    }
    Ok(finder.finish())
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
    ) -> Result<(), ElfError> {
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

    fn spend(&mut self, work: u64) -> Result<(), ElfError> {
        self.work = self.work.checked_sub(work).ok_or(ElfError::TooLarge("symbol table"))?;
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

fn offer_tables(file: &File, sections: &Sections, finder: &mut Finder<'_>) -> Result<(), ElfError> {
    for (name, dynamic) in [(".symtab", false), (".dynsym", true)] {
        let Some(symbols) = sections.find(name) else { continue };
        let Some(strings) = sections.by_index(symbols.link) else { continue };
        offer_table(file, symbols, strings, dynamic, finder)?;
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

fn offer_table(
    file: &File,
    section: Section,
    strings: Section,
    dynamic: bool,
    finder: &mut Finder<'_>,
) -> Result<(), ElfError> {
    if section.size > MAX_TABLE_BYTES {
        return Err(ElfError::TooLarge("symbol table"));
    }
    let count = section.size as usize / SYMBOL_BYTES;
    for first in (0..count).step_by(CHUNK_SYMBOLS) {
        let here = CHUNK_SYMBOLS.min(count - first);
        let offset = section.offset.saturating_add((first * SYMBOL_BYTES) as u64);
        let bytes = elf::read(file, offset, here * SYMBOL_BYTES, "symbol table")?;
        let (symbols, _) = pod::slice_from_bytes::<Sym64<LittleEndian>>(&bytes, here)
            .map_err(|()| ElfError::Damaged("symbol table"))?;
        for symbol in symbols {
            let (kind, size) = (symbol.st_type(), symbol.st_size.get(LE));
            let is_function = kind == STT_FUNC || kind == STT_GNU_IFUNC;
            // What is undefined here is a function of another file. In `.dynsym` the neighbours of a symbol without
            // size are missing, so that it would take in code that is not its own.
            if !(is_function || kind == STT_NOTYPE)
                || symbol.st_shndx.get(LE).0 == 0
                || (dynamic && size == 0)
            {
                continue;
            }
            let binding = match symbol.st_bind() {
                STB_GLOBAL => 2,
                STB_WEAK => 1,
                _ => 0,
            };
            finder.offer(symbol.st_value.get(LE), size, binding, || {
                let name = name_at(file, strings, symbol.st_name.get(LE)).map(without_version);
                name.filter(|name| is_function || is_label(name))
            })?;
        }
    }
    Ok(())
}

/// The string at an offset of a string table, cut to the longest that is shown.
fn name_at(file: &File, strings: Section, offset: u32) -> Option<Vec<u8>> {
    let left = strings.size.checked_sub(u64::from(offset))?;
    let mut name = vec![0; left.min(MAX_NAME_BYTES as u64 + 1) as usize];
    let read = file.read_at(&mut name, strings.offset.checked_add(u64::from(offset))?).ok()?;
    name.truncate(name[..read].iter().position(|byte| *byte == 0).unwrap_or(read));
    (!name.is_empty()).then_some(name)
}

/// Whether an untyped symbol names code as hand-written assembly does, and is no mark of the assembler's.
fn is_label(name: &[u8]) -> bool {
    !name.starts_with(b"$") && !name.starts_with(b".L") && !name.starts_with(b"__") && name != b"_DYNAMIC"
}

/// Unpacks the compressed symbol table into memory that has a descriptor, so that it is read like any file.
fn unpack(file: &File, section: Section) -> Result<File, ElfError> {
    const WHAT: &str = "compressed symbol table";
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
        assert_eq!(result, Err(ElfError::TooLarge("symbol table")));
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
