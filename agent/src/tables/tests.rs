//! Tests of the unwind tables against kernel maps that remember every call.

use std::{cell::Cell, collections::HashMap, time::Instant};

use gannet_elf::{Arch, ContentId, Segment, Segments};
use gannet_unwind::{
    format::{CacheLine, UnwindRule},
    limits::TableLimits,
    table_builder::TableBuilder,
};

use super::*;
use crate::{
    kernel::{Block, KernelImage, KernelTable},
    model::ProcessKey,
};

/// Kernel maps in memory, which record every call.
#[derive(Default)]
pub(super) struct Fake {
    lines: u32,
    /// The keys of the trie, and the limit of their number.
    keys: HashMap<(u32, Block), KernelMapping>,
    max_keys: usize,
    images: HashMap<u32, KernelImage>,
    tables: HashMap<u32, Option<KernelTable>>,
    written: Vec<CacheLine>,
    log: Vec<Call>,
    waits: Cell<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Set(u32, Block),
    Remove(u32, Block),
    Enter(u32),
    Leave(u32),
    Show(u32),
    Hide(u32),
    Write,
}

impl Fake {
    pub(super) fn new(lines: u32) -> Self {
        Self {
            lines,
            max_keys: usize::MAX,
            written: vec![CacheLine::default(); lines as usize],
            ..Self::default()
        }
    }

    fn took(&mut self) -> Vec<Call> {
        std::mem::take(&mut self.log)
    }
}

impl UnwindMaps for Fake {
    fn table_lines(&self) -> u32 {
        self.lines
    }

    fn write_rules(&mut self, _: &[(u16, UnwindRule)]) -> Result<(), KernelError> {
        Ok(())
    }

    fn write_lines(
        &mut self,
        first: u32,
        lines: &mut dyn ExactSizeIterator<Item = CacheLine>,
    ) -> Result<(), KernelError> {
        self.log.push(Call::Write);
        for (index, line) in lines.enumerate() {
            self.written[first as usize + index] = line;
        }
        Ok(())
    }

    fn set_table(&mut self, table: u32, location: Option<KernelTable>, _: u32) -> Result<(), KernelError> {
        self.log.push(if location.is_some() { Call::Show(table) } else { Call::Hide(table) });
        self.tables.insert(table, location);
        Ok(())
    }

    fn set_mapping(&mut self, tgid: u32, block: Block, mapping: &KernelMapping) -> Result<(), KernelError> {
        if self.keys.len() >= self.max_keys && !self.keys.contains_key(&(tgid, block)) {
            let source = libbpf_rs::Error::from_raw_os_error(libc::ENOSPC);
            return Err(KernelError::Map { map: "exec_mappings", source });
        }
        self.log.push(Call::Set(tgid, block));
        self.keys.insert((tgid, block), *mapping);
        Ok(())
    }

    fn remove_mapping(&mut self, tgid: u32, block: Block) {
        self.log.push(Call::Remove(tgid, block));
        self.keys.remove(&(tgid, block));
    }

    fn set_image(&mut self, key: ProcessKey, image: KernelImage) -> Result<(), KernelError> {
        self.log.push(Call::Enter(key.tgid));
        self.images.insert(key.tgid, image);
        Ok(())
    }

    fn remove_image(&mut self, tgid: u32) {
        self.log.push(Call::Leave(tgid));
        self.images.remove(&tgid);
    }

    fn wait_for_unwinds(&self) {
        self.waits.set(self.waits.get() + 1);
    }
}

fn key(tgid: u32) -> ImageKey {
    ImageKey { process: ProcessKey { tgid, start_boottime_ns: u64::from(tgid) * 100 }, exec_id: 1 }
}

/// Adds a file with a table of this number of rows, as if the parser had built it.
fn file(tables: &mut UnwindTables, number: u8, rows: u64) -> Arc<MappedFile> {
    let limits = TableLimits::default();
    let mut builder = TableBuilder::new(Arch::X86_64, 0, rows * 16 + 16, &limits).unwrap();
    for row in 0..rows {
        builder
            .push(row * 16, UnwindRule::x86_64_sp(8 + 8 * (row % 2) as i32 + 16 * i32::from(number)))
            .unwrap();
    }
    let table = Arc::new(builder.finish().unwrap());
    let whole =
        Segment { vaddr: 0, file_offset: 0, file_bytes: 1 << 20, memory_bytes: 1 << 20, executable: true };
    let own = std::fs::File::open("/proc/self/exe").unwrap();
    let file = Arc::new(MappedFile::opened(&format!("/lib/{number}.so"), 1, number.into(), own));
    tables.files.set(
        file.id,
        FileState::Built {
            content: ContentId::from_bytes([number; 16]),
            segments: Segments::new(vec![whole]),
            table: Some(table),
            runtime: None,
            used: Cell::new(Instant::now()),
        },
    );
    file
}

fn at(start: u64, pages: u64, file: &Arc<MappedFile>) -> Mapping {
    Mapping { start, end: start + pages * 4096, offset: 0, kind: MappingKind::File(Arc::clone(file)) }
}

fn image(mappings: Vec<Mapping>) -> Image {
    Image { mappings }
}

fn tables(kernel: &Fake) -> UnwindTables {
    UnwindTables::new(kernel, TableSources::default(), || {}).unwrap()
}

/// Checks that an unchanged image costs no call to the kernel (R11).
#[test]
fn an_unchanged_image_makes_no_call() {
    let mut kernel = Fake::new(4096);
    let mut tables = tables(&kernel);
    let libc = file(&mut tables, 1, 100);
    let one = || image(vec![at(0x10_0000, 3, &libc), at(0x20_0000, 5, &libc)]);
    tables.load(&mut kernel, key(7), &one()).unwrap();
    assert!(!kernel.took().is_empty());
    tables.load(&mut kernel, key(7), &one()).unwrap();
    assert_eq!(kernel.took(), []);
}

/// Checks that no key of the old file is left where another file is mapped (R9).
#[test]
fn another_file_at_the_same_address_replaces_the_old_one() {
    let mut kernel = Fake::new(4096);
    let mut tables = tables(&kernel);
    let (old, new) = (file(&mut tables, 1, 100), file(&mut tables, 2, 100));
    let other = at(0x40_0000, 2, &old);
    // Seven pages from an even one on are three blocks.
    tables.load(&mut kernel, key(7), &image(vec![at(0x10_0000, 7, &old), other.clone()])).unwrap();
    let table_of = |kernel: &Fake, address: u64| {
        let (_, mapping) = kernel.keys.iter().find(|((_, block), _)| block.address == address).unwrap();
        mapping.table.unwrap()
    };
    let (before, others) = (table_of(&kernel, 0x10_0000), table_of(&kernel, 0x40_0000));
    assert_eq!(before, others);
    kernel.took();
    // The scan makes the process's mappings from scratch: path and range are the same, the inode is another.
    assert_ne!(old.inode, new.inode);
    tables.load(&mut kernel, key(7), &image(vec![at(0x10_0000, 7, &new), other])).unwrap();
    let log = kernel.took();
    assert_eq!(log.iter().filter(|call| matches!(call, Call::Set(7, _))).count(), 3, "{log:?}");
    for mapping in kernel.keys.values().filter(|mapping| mapping.begin == 0x10_0000) {
        assert_ne!(mapping.table, Some(before), "nothing is left of the old file there");
    }
    assert_eq!(table_of(&kernel, 0x40_0000), others, "the other mapping is as it was");
}

/// Checks that only files that stacks reach need a table, and the kernel side sends stacks of the others raw (R14).
#[test]
fn a_table_that_is_not_built_makes_stacks_come_raw() {
    let mut kernel = Fake::new(4096);
    let mut tables = tables(&kernel);
    let (program, library) = (file(&mut tables, 1, 100), file(&mut tables, 2, 100));
    let built = tables.files.take(library.id);
    let both = image(vec![at(0x10_0000, 1, &program), at(0x20_0000, 1, &library)]);
    tables.load(&mut kernel, key(7), &both).unwrap();
    let table_of = |kernel: &Fake, address| kernel.keys[&(7, Block { address, bits: 12 })].table;
    assert_eq!(table_of(&kernel, 0x20_0000), Some(NOT_BUILT));
    assert!(table_of(&kernel, 0x10_0000).is_some_and(|(number, _)| number < MAX_TABLES));
    tables.files.set(library.id, built);
    kernel.took();
    tables.load(&mut kernel, key(7), &both).unwrap();
    let block = Block { address: 0x20_0000, bits: 12 };
    assert_eq!(kernel.took().iter().filter(|call| **call == Call::Set(7, block)).count(), 1);
    assert!(table_of(&kernel, 0x20_0000).is_some_and(|(number, _)| number < MAX_TABLES));
    // The copy here may go: the kernel's serves.
    tables.files.drop_table(library.id);
    tables.load(&mut kernel, key(8), &both).unwrap();
    assert_eq!(kernel.keys[&(8, block)].table, table_of(&kernel, 0x20_0000));
    assert!(tables.request_all(&both));
}

/// Checks that a change of file, offset or kind changes the key of a mapping (R10).
#[test]
fn each_property_of_a_mapping_is_compared() {
    let mut kernel = Fake::new(4096);
    let mut tables = tables(&kernel);
    let (libc, other) = (file(&mut tables, 1, 100), file(&mut tables, 2, 100));
    let first = at(0x10_0000, 1, &libc);
    let changed = [
        at(0x10_0000, 1, &other),
        Mapping { offset: 4096, ..first.clone() },
        Mapping { kind: MappingKind::Anon, ..first.clone() },
    ];
    for mapping in changed {
        tables.load(&mut kernel, key(7), &image(vec![first.clone()])).unwrap();
        let before = kernel.keys.clone();
        kernel.took();
        tables.load(&mut kernel, key(7), &image(vec![mapping.clone()])).unwrap();
        let sets = kernel.took().iter().filter(|call| matches!(call, Call::Set(..))).count();
        assert_eq!(sets, 1, "{mapping:?}");
        assert_ne!(kernel.keys, before);
        assert_eq!(kernel.keys.len(), 1);
    }
}

/// Checks that a look-up of a key that both images have never misses (R12).
#[test]
fn new_keys_come_before_old_keys_go() {
    let mut kernel = Fake::new(4096);
    let mut tables = tables(&kernel);
    let (libc, other) = (file(&mut tables, 1, 100), file(&mut tables, 2, 100));
    tables.load(&mut kernel, key(7), &image(vec![at(0x10_0000, 7, &libc)])).unwrap();
    kernel.took();
    // Shorter, of another file, and one more.
    let after = image(vec![at(0x10_0000, 4, &other), at(0x40_0000, 1, &libc)]);
    tables.load(&mut kernel, key(7), &after).unwrap();
    let log = kernel.took();
    let last_set = log.iter().rposition(|call| matches!(call, Call::Set(..))).unwrap();
    let first_removal = log.iter().position(|call| matches!(call, Call::Remove(..))).unwrap();
    assert!(last_set < first_removal, "{log:?}");
    for call in &log {
        if let Call::Remove(_, block) = call {
            assert!(!log.contains(&Call::Set(7, *block)), "{block:?} was removed and set");
        }
    }
    assert_eq!(log.last(), Some(&Call::Enter(7)));
    assert!(!log.contains(&Call::Leave(7)), "the kernel side unwinds the image all the time");
}

/// Checks that a table that is in the kernel is not written again (R13).
#[test]
fn a_second_process_of_a_file_gets_its_mappings() {
    let mut kernel = Fake::new(4096);
    let mut tables = tables(&kernel);
    let libc = file(&mut tables, 1, 100);
    tables.load(&mut kernel, key(7), &image(vec![at(0x10_0000, 1, &libc)])).unwrap();
    kernel.took();
    tables.load(&mut kernel, key(8), &image(vec![at(0x50_0000, 1, &libc)])).unwrap();
    let block = Block { address: 0x50_0000, bits: 12 };
    assert_eq!(kernel.took(), [Call::Set(8, block), Call::Enter(8)], "no table is written again");
    assert_eq!(tables.stats().resident, 1);
}

/// Checks that a full trie leaves no key of the refused process (R6).
#[test]
fn a_process_that_does_not_fit_leaves_nothing_behind() {
    let mut kernel = Fake::new(4096);
    kernel.max_keys = 8;
    let mut tables = tables(&kernel);
    let libc = file(&mut tables, 1, 100);
    tables.load(&mut kernel, key(7), &image(vec![at(0x10_0000, 7, &libc)])).unwrap();
    let before = kernel.keys.clone();
    // 255 pages from an odd one on are eight blocks.
    let error = tables.load(&mut kernel, key(8), &image(vec![at(0x10_1000, 255, &libc)])).unwrap_err();
    assert!(error.to_string().contains("exec_mappings"), "{error}");
    assert_eq!(kernel.keys, before);
    assert!(!kernel.images.contains_key(&8));
    assert_eq!((tables.stats().refused.entries, tables.stats().keys), (1, before.len() as u64));
    // The next try is a second later, whatever its samples ask for meanwhile.
    kernel.took();
    for _ in 0..1000 {
        tables.load(&mut kernel, key(8), &image(vec![at(0x10_1000, 255, &libc)])).unwrap_err();
    }
    assert_eq!((kernel.took(), tables.stats().refused.total()), (vec![], 1));
}

/// Checks that no key and no image of a process stays after it (R8).
#[test]
fn an_unloaded_process_leaves_nothing_behind() {
    let mut kernel = Fake::new(4096);
    let mut tables = tables(&kernel);
    let libc = file(&mut tables, 1, 100);
    for tgid in [7, 8] {
        tables.load(&mut kernel, key(tgid), &image(vec![at(0x10_0000, 9, &libc)])).unwrap();
    }
    for tgid in [7, 8] {
        tables.unload(&mut kernel, tgid);
    }
    assert!(kernel.keys.is_empty() && kernel.images.is_empty());
    assert_eq!((tables.stats().keys, tables.stats().processes), (0, 0));
}

/// Checks that the number of mappings has no limit but the trie (R7).
#[test]
fn one_process_may_have_thousands_of_mappings() {
    let mut kernel = Fake::new(4096);
    let mut tables = tables(&kernel);
    let libc = file(&mut tables, 1, 100);
    let many = (0..2000).map(|n| at(0x10_0000 + n * 0x4000, 3, &libc)).collect();
    tables.load(&mut kernel, key(7), &image(many)).unwrap();
    assert_eq!(kernel.keys.len() as u64, tables.stats().keys);
    assert!(kernel.keys.len() >= 4000);
}

/// Checks that tables beyond the budget replace those whose last use is longest ago, and no line is reused while a program may read it (R49).
#[test]
fn the_least_recently_used_table_is_evicted_first() {
    // Four tables of 26 lines fit.
    let mut kernel = Fake::new(110);
    let mut tables = tables(&kernel);
    let files: Vec<_> = (1..=60).map(|number| file(&mut tables, number, 400)).collect();
    for (tgid, file) in (1..).zip(&files) {
        tables.load(&mut kernel, key(tgid), &image(vec![at(0x10_0000, 1, file)])).unwrap();
        let stats = tables.stats();
        assert!(stats.resident_bytes <= stats.budget_bytes && stats.resident <= 4, "{stats:?}");
        // Each loaded process has a table that is in the kernel, of this generation.
        for tgid in kernel.images.keys() {
            let (_, mapping) = kernel.keys.iter().find(|((of, _), _)| of == tgid).unwrap();
            let (table, generation) = mapping.table.unwrap();
            let location = kernel.tables[&table].unwrap();
            assert_eq!(location.generation, generation);
        }
    }
    let stats = tables.stats();
    assert_eq!((stats.resident, stats.evicted, stats.refused.total()), (4, 56, 0));
    assert_eq!(kernel.waits.get(), 56, "no line is reused while a program may read it");
    assert_eq!(kernel.images.len(), 4, "a process that lost a table comes raw until it is loaded again");
    // One that is larger than all there is: an error that names the file.
    let large = file(&mut tables, 200, 4000);
    let error = tables.load(&mut kernel, key(99), &image(vec![at(0x10_0000, 1, &large)])).unwrap_err();
    assert!(error.to_string().contains("/lib/200.so at 0x100000-0x101000"), "{error}");
}
