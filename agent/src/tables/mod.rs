//! Which unwind tables are in the kernel, and which process uses which.
//!
//! A file's table is made once, whoever maps it, and only when a stack has come to it: programs map ten libraries and
//! use three. It is known by the file's contents, is put into the kernel when the first process needs it there, stays
//! while there is room, and goes when another one needs the room more. A process is entered when its first samples have
//! been walked here, by the same tables: they come raw, so that nothing is lost and a process of milliseconds costs no
//! map at all. Where its stacks come to a file whose table is not made yet, they come raw again.

mod arena;
mod keep;
mod parser;
mod raw;

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap, HashSet},
    io,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use gannet_elf::{ContentId, Segments};
use gannet_unwind::{
    build::BuiltTable,
    format::MAX_RULES,
    intern::{RuleInterner, RuleNumbersFull},
    table::UnwindTable,
};

pub use parser::TableSources;
pub use raw::{Walked, unwalked};

use self::{
    arena::Arena,
    parser::{Made, Parser},
};
use crate::{
    kernel::{
        Block, EmptyRange, KernelError, KernelImage, KernelMapping, KernelTable, MAX_TABLES, UnwindMaps,
        blocks,
    },
    model::{FileId, Image, ImageKey, MappedFile, Mapping, MappingKind},
};

/// Memory of tables that are kept here for raw samples; the kernel has its own copy.
const KEPT_BYTES: usize = 6 << 20;
/// A table that was used so lately is kept however many there are: a sample that needs two of them needs both at once.
const KEPT_FOR: Duration = Duration::from_secs(5);
/// Keys that the mapping trie may hold: a little less than the kernel allows, so that it never has to refuse.
const MAX_KEYS: usize = 262_144 - 1024;

/// The number and generation of a table that is still to be made: the kernel side finds none there, and sends the stack
/// raw.
const UNMADE: (u32, u32) = (u32::MAX, 0);
const _: () = assert!(UNMADE.0 >= MAX_TABLES);

/// The tables of this node.
pub struct Tables {
    parser: Parser,
    vdso: Option<Vdso>,
    files: HashMap<FileId, Known>,
    residents: HashMap<ContentId, Resident>,
    interner: RuleInterner,
    arena: Arena,
    free_numbers: Vec<u32>,
    generations: Vec<u32>,
    entered: HashMap<u32, Entered>,
    keys: usize,
    now: u64,
    /// When tables that are not needed any more were let go last.
    swept: Instant,
    /// Counts the changes of what the kernel side knows of images.
    epoch: u64,
    stats: Stats,
}

/// What is known of a file.
enum Known {
    /// Asked for.
    Waiting,
    /// Its table, as long as it is kept, and what outlives it.
    Made { content: ContentId, segments: Segments, table: Option<Arc<UnwindTable>>, used: Cell<Instant> },
    /// It has none, or it cannot be read: its frames are found by frame pointer.
    Without,
}

/// What there is to walk by in a mapping.
enum Found<'a> {
    /// Its table, and what to subtract from an address in it.
    UnwindTable(&'a UnwindTable, u64),
    /// The file's table is not here, and can be made.
    NotYet(&'a Arc<MappedFile>),
    /// There is none.
    None,
}

/// The kernel's own shared object, the same in all processes.
struct Vdso {
    content: ContentId,
    segments: Segments,
    table: Arc<UnwindTable>,
}

/// A table in the kernel.
struct Resident {
    table: u32,
    lines: Range<u32>,
    numbers: Vec<u16>,
    used: u64,
}

/// A process whose mappings are in the kernel.
struct Entered {
    key: ImageKey,
    mappings: Vec<KernelMapping>,
}

/// What each key of the trie says of the mappings of one process.
fn keys_of(mappings: &[KernelMapping]) -> Result<BTreeMap<Block, KernelMapping>, TablesError> {
    let mut keys = BTreeMap::new();
    for mapping in mappings {
        keys.extend(blocks(mapping.begin, mapping.end)?.into_iter().map(|block| (block, *mapping)));
    }
    Ok(keys)
}

/// What the room has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Tables made.
    pub made: u64,
    /// Files that could not be made into a table.
    pub failed: u64,
    /// Tables in the kernel.
    pub resident: u64,
    /// Bytes of them.
    pub resident_bytes: u64,
    /// Bytes that there are.
    pub budget_bytes: u64,
    /// Tables taken out for others.
    pub evicted: u64,
    /// Rules in use.
    pub rules: u64,
    /// Processes entered.
    pub processes: u64,
    /// Keys in the mapping trie.
    pub keys: u64,
    /// Processes that could not be entered.
    pub refused: u64,
}

/// Why a process was not entered. Its samples go on to come raw.
#[derive(Debug, thiserror::Error)]
pub enum TablesError {
    /// A table does not fit.
    #[error("the table of {file} has {lines} lines of 64 bytes and does not fit; raise --table-bytes")]
    NoRoom {
        /// Whose.
        file: String,
        /// How large it is.
        lines: usize,
    },
    /// No rule numbers are left.
    #[error(transparent)]
    Rules(#[from] RuleNumbersFull),
    /// The mapping trie is full.
    #[error("the mapping trie is full: {0} keys")]
    Keys(usize),
    /// A mapping that is none.
    #[error("a mapping cannot be entered: {0}")]
    Range(#[from] EmptyRange),
    /// A map refused.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl Tables {
    /// Nothing known yet. `ring` is called when a table has been made: [`Tables::collect`] takes it.
    pub fn new(
        kernel: &impl UnwindMaps,
        sources: TableSources,
        ring: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        Ok(Self {
            parser: Parser::start(sources, ring)?,
            vdso: parser::vdso().map(|BuiltTable { content, segments, table, .. }| Vdso {
                content,
                segments,
                table: Arc::new(table),
            }),
            files: HashMap::new(),
            residents: HashMap::new(),
            interner: RuleInterner::new(MAX_RULES),
            arena: Arena::new(kernel.table_lines()),
            free_numbers: (0..MAX_TABLES).rev().collect(),
            generations: vec![0; MAX_TABLES as usize],
            entered: HashMap::new(),
            keys: 0,
            now: 0,
            swept: Instant::now(),
            epoch: 0,
            stats: Stats::default(),
        })
    }

    /// Takes what the parser has finished. True: something was.
    pub fn collect(&mut self) -> bool {
        let mut any = false;
        for (file, outcome) in self.parser.finished() {
            any = true;
            let known = match outcome {
                Ok(Made { table, content, segments }) if !table.is_empty() => {
                    self.stats.made += 1;
                    Known::Made { content, segments, table: Some(table), used: Cell::new(Instant::now()) }
                }
                Ok(_) => Known::Without,
                Err(error) => {
                    self.stats.failed += 1;
                    tracing::warn!("no unwind table, frames are found by frame pointer: {error}");
                    Known::Without
                }
            };
            self.files.insert(file, known);
        }
        if any || self.swept.elapsed() > KEPT_FOR {
            self.swept = Instant::now();
            self.keep_within_bounds();
        }
        any
    }

    /// Asks for the table of a file; `samples` wait for it. What most samples wait for is made first.
    pub fn want(&mut self, file: &Arc<MappedFile>, samples: usize) {
        let waits = matches!(self.files.get(&file.id), Some(Known::Waiting));
        if waits {
            self.parser.urge(file.id, samples);
        } else if self.parser.request(file, samples) {
            self.files.insert(file.id, Known::Waiting);
        }
    }

    /// Whether all tables of an image are here; asks for those that are not. For stacks that never come raw.
    pub fn ready(&mut self, image: &Image) -> bool {
        let missing: Vec<_> = image
            .mappings
            .iter()
            .filter_map(|mapping| match &mapping.kind {
                MappingKind::File(file) if has_tables(file) && !self.is_settled(file) => Some(file),
                _ => None,
            })
            .collect();
        for file in &missing {
            self.want(file, 1);
        }
        missing.is_empty()
    }

    /// Whether the kernel side can have the file's table now, or never.
    fn is_settled(&self, file: &MappedFile) -> bool {
        match self.files.get(&file.id) {
            Some(Known::Without) => true,
            Some(Known::Made { table, content, .. }) => {
                table.is_some() || self.residents.contains_key(content)
            }
            Some(Known::Waiting) | None => false,
        }
    }

    /// What there is to walk by in a mapping.
    fn find<'a>(&'a self, mapping: &'a Mapping) -> Found<'a> {
        let page = page_bytes();
        match &mapping.kind {
            MappingKind::Anon => Found::None,
            MappingKind::Vdso => {
                let table = self.vdso.as_ref().and_then(|vdso| {
                    Some(Found::UnwindTable(&vdso.table, vdso.segments.bias(mapping.start, 0, page)?))
                });
                table.unwrap_or(Found::None)
            }
            MappingKind::File(file) if !has_tables(file) => Found::None,
            MappingKind::File(file) => match self.files.get(&file.id) {
                Some(Known::Without) => Found::None,
                Some(Known::Made { segments, table: Some(table), used, .. }) => {
                    used.set(Instant::now());
                    segments
                        .bias(mapping.start, mapping.offset, page)
                        .map_or(Found::None, |bias| Found::UnwindTable(table, bias))
                }
                Some(Known::Made { table: None, .. } | Known::Waiting) | None => Found::NotYet(file),
            },
        }
    }

    /// Whether the kernel side walks this image, with these mappings, by itself.
    pub fn is_entered(&self, key: &ImageKey) -> bool {
        self.entered.get(&key.process.tgid).is_some_and(|entered| entered.key == *key)
    }

    /// Puts a process's mappings into the kernel, or brings them up to date there, with the tables that are made.
    pub fn enter(
        &mut self,
        kernel: &mut impl UnwindMaps,
        key: ImageKey,
        image: &Image,
    ) -> Result<(), TablesError> {
        self.now += 1;
        let result = self.try_enter(kernel, key, image);
        if result.is_err() {
            self.stats.refused += 1;
            self.leave(kernel, key.process.tgid);
        }
        result
    }

    fn try_enter(
        &mut self,
        kernel: &mut impl UnwindMaps,
        key: ImageKey,
        image: &Image,
    ) -> Result<(), TablesError> {
        let tgid = key.process.tgid;
        let protected: HashSet<ContentId> =
            image.mappings.iter().filter_map(|mapping| self.content_of(mapping)).collect();
        let mut mappings = Vec::with_capacity(image.mappings.len());
        for mapping in &image.mappings {
            mappings.push(self.kernel_mapping(kernel, mapping, &protected)?);
        }
        let new_keys = keys_of(&mappings)?;
        let old = self.entered.remove(&tgid);
        let changed_image = old.as_ref().is_none_or(|old| old.key != key);
        if !changed_image && old.as_ref().is_some_and(|old| old.mappings == mappings) {
            self.entered.extend(old.map(|old| (tgid, old)));
            return Ok(());
        }
        let old_keys =
            old.as_ref().map_or_else(BTreeMap::new, |old| keys_of(&old.mappings).unwrap_or_default());
        let total = self.keys - old_keys.len() + new_keys.len();
        if total > MAX_KEYS {
            self.entered.extend(old.map(|old| (tgid, old)));
            return Err(TablesError::Keys(self.keys));
        }
        if old.is_some() && changed_image {
            // What the former image mapped means nothing now: its samples come raw until all is written.
            kernel.remove_image(tgid);
        }
        // New keys go over equal old ones in place, then what is left of the old goes: no look-up misses meanwhile.
        self.entered.insert(tgid, Entered { key, mappings });
        self.keys = total;
        let set = new_keys
            .iter()
            .filter(|(block, mapping)| old_keys.get(block) != Some(mapping))
            .try_for_each(|(block, mapping)| kernel.set_mapping(tgid, *block, mapping));
        for block in old_keys.keys().filter(|block| !new_keys.contains_key(block)) {
            kernel.remove_mapping(tgid, *block);
        }
        set?;
        self.epoch += 1;
        let entry = KernelImage { exec_id: key.exec_id, epoch: self.epoch };
        kernel.set_image(key.process, entry)?;
        Ok(())
    }

    /// Takes everything of a process out of the kernel.
    pub fn leave(&mut self, kernel: &mut impl UnwindMaps, tgid: u32) {
        let Some(entered) = self.entered.remove(&tgid) else { return };
        kernel.remove_image(tgid);
        for mapping in &entered.mappings {
            for block in blocks(mapping.begin, mapping.end).unwrap_or_default() {
                kernel.remove_mapping(tgid, block);
                self.keys = self.keys.saturating_sub(1);
            }
        }
    }

    /// What the room has done.
    pub fn stats(&self) -> Stats {
        Stats {
            resident: self.residents.len() as u64,
            resident_bytes: u64::from(self.arena.used()) * 64,
            budget_bytes: u64::from(self.arena.size()) * 64,
            rules: self.interner.used() as u64,
            processes: self.entered.len() as u64,
            keys: self.keys as u64,
            ..self.stats
        }
    }

    fn content_of(&self, mapping: &Mapping) -> Option<ContentId> {
        match &mapping.kind {
            MappingKind::Anon => None,
            MappingKind::Vdso => Some(self.vdso.as_ref()?.content),
            MappingKind::File(file) => match self.files.get(&file.id)? {
                Known::Made { content, .. } => Some(*content),
                _ => None,
            },
        }
    }

    fn kernel_mapping(
        &mut self,
        kernel: &mut impl UnwindMaps,
        mapping: &Mapping,
        protected: &HashSet<ContentId>,
    ) -> Result<KernelMapping, TablesError> {
        let (begin, end) = (mapping.start, mapping.end);
        let by_frame_pointer = KernelMapping { begin, end, bias: 0, table: None };
        let page = page_bytes();
        let (content, table, bias, name) = match &mapping.kind {
            MappingKind::Anon => return Ok(by_frame_pointer),
            MappingKind::Vdso => {
                let Some(vdso) = &self.vdso else { return Ok(by_frame_pointer) };
                let bias = vdso.segments.bias(begin, 0, page);
                (vdso.content, Some(Arc::clone(&vdso.table)), bias, "[vdso]")
            }
            MappingKind::File(file) if !has_tables(file) => return Ok(by_frame_pointer),
            MappingKind::File(file) => match self.files.get(&file.id) {
                Some(Known::Without) => return Ok(by_frame_pointer),
                Some(Known::Made { content, segments, table, used }) => {
                    used.set(Instant::now());
                    let bias = segments.bias(begin, mapping.offset, page);
                    (*content, table.clone(), bias, file.path.as_str())
                }
                Some(Known::Waiting) | None => {
                    return Ok(KernelMapping { table: Some(UNMADE), ..by_frame_pointer });
                }
            },
        };
        let Some(bias) = bias else { return Ok(by_frame_pointer) };
        let table = match table {
            Some(table) => self.make_resident(kernel, content, &table, name, protected)?,
            // It is not kept here any more; the kernel may still have it.
            None => self.resident(content).unwrap_or(UNMADE),
        };
        Ok(KernelMapping { begin, end, bias, table: Some(table) })
    }

    /// The number and generation of a table that is in the kernel.
    fn resident(&mut self, content: ContentId) -> Option<(u32, u32)> {
        let resident = self.residents.get_mut(&content)?;
        resident.used = self.now;
        Some((resident.table, self.generations[resident.table as usize]))
    }

    /// The number and generation of a table in the kernel, put there now if it is not.
    fn make_resident(
        &mut self,
        kernel: &mut impl UnwindMaps,
        content: ContentId,
        table: &UnwindTable,
        name: &str,
        protected: &HashSet<ContentId>,
    ) -> Result<(u32, u32), TablesError> {
        if let Some(resident) = self.resident(content) {
            return Ok(resident);
        }
        let needed = table.lines().len();
        let no_room = || TablesError::NoRoom { file: name.to_owned(), lines: needed };
        let lines = u32::try_from(needed).map_err(|_| no_room())?;
        let range = loop {
            if let Some(range) = self.arena.take(lines) {
                break range;
            }
            if lines > self.arena.size() || !self.evict(kernel, protected) {
                return Err(no_room());
            }
        };
        let number = loop {
            if let Some(number) = self.free_numbers.pop() {
                break number;
            }
            if !self.evict(kernel, protected) {
                self.arena.give_back(&range);
                return Err(no_room());
            }
        };
        let interned = loop {
            match self.interner.acquire(table.rules()) {
                Ok(interned) => break interned,
                Err(full) if !self.evict(kernel, protected) => {
                    self.arena.give_back(&range);
                    self.free_numbers.push(number);
                    return Err(full.into());
                }
                Err(_) => {}
            }
        };
        let generation = self.generations[number as usize];
        let place = KernelTable {
            base: table.base(),
            first_line: range.start,
            granules: table.granules(),
            generation,
        };
        let written = kernel
            .write_rules(&interned.new)
            .and_then(|()| kernel.write_lines(range.start, &mut table.kernel_lines(&interned.numbers)))
            .and_then(|()| kernel.set_table(number, Some(place), generation));
        if let Err(error) = written {
            self.arena.give_back(&range);
            self.free_numbers.push(number);
            self.interner.release(&interned.numbers);
            return Err(error.into());
        }
        self.residents.insert(
            content,
            Resident { table: number, lines: range, numbers: interned.numbers, used: self.now },
        );
        Ok((number, generation))
    }

    /// Takes the table that was needed the longest time ago out of the kernel. False: there is none.
    fn evict(&mut self, kernel: &mut impl UnwindMaps, protected: &HashSet<ContentId>) -> bool {
        let oldest = self
            .residents
            .iter()
            .filter(|(content, _)| !protected.contains(content))
            .min_by_key(|(_, resident)| resident.used)
            .map(|(content, _)| *content);
        let Some(resident) = oldest.and_then(|content| self.residents.remove(&content)) else { return false };
        let generation = &mut self.generations[resident.table as usize];
        *generation = generation.wrapping_add(1);
        // Hidden first; whoever still walks by it is waited for; only then is its place anybody's.
        if let Err(error) = kernel.set_table(resident.table, None, *generation) {
            tracing::error!("{error}");
        }
        kernel.wait_for_walks();
        self.interner.release(&resident.numbers);
        self.arena.give_back(&resident.lines);
        self.free_numbers.push(resident.table);
        self.stats.evicted += 1;
        // Processes that used it are entered anew when their samples come raw.
        let gone = resident.table;
        let without: Vec<u32> = self
            .entered
            .iter()
            .filter(|(_, entered)| {
                entered.mappings.iter().any(|mapping| mapping.table.is_some_and(|(table, _)| table == gone))
            })
            .map(|(tgid, _)| *tgid)
            .collect();
        for tgid in without {
            self.leave(kernel, tgid);
        }
        true
    }

    /// Lets go of tables that raw samples have not needed for the longest time, and of files that are closed.
    fn keep_within_bounds(&mut self) {
        let mut kept: Vec<(Instant, FileId, usize)> = self
            .files
            .iter()
            .filter_map(|(id, known)| match known {
                Known::Made { table: Some(table), used, .. } => Some((used.get(), *id, table.kernel_bytes())),
                _ => None,
            })
            .collect();
        kept.sort_unstable_by_key(|(used, ..)| std::cmp::Reverse(*used));
        let mut bytes = 0;
        for (_, id, size) in kept {
            bytes += size;
            if bytes > KEPT_BYTES
                && let Some(Known::Made { table, used, .. }) = self.files.get_mut(&id)
                && used.get().elapsed() > KEPT_FOR
            {
                *table = None;
            }
        }
    }
}

/// Whether a file can have a table at all.
fn has_tables(file: &MappedFile) -> bool {
    file.file.is_some() && file.is_elf()
}

fn page_bytes() -> u64 {
    rustix::param::page_size() as u64
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use gannet_elf::{Arch, Segment};
    use gannet_unwind::{
        format::{CacheLine, UnwindRule},
        limits::TableLimits,
        table_builder::TableBuilder,
    };

    use super::*;
    use crate::model::ProcessKey;

    /// Maps that count and remember what is written to them.
    #[derive(Default)]
    struct Fake {
        lines: u32,
        /// What the trie holds, and how many keys it takes.
        keys: HashMap<(u32, Block), KernelMapping>,
        most: usize,
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
        fn new(lines: u32) -> Self {
            Self {
                lines,
                most: usize::MAX,
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

        fn set_table(&mut self, table: u32, place: Option<KernelTable>, _: u32) -> Result<(), KernelError> {
            self.log.push(if place.is_some() { Call::Show(table) } else { Call::Hide(table) });
            self.tables.insert(table, place);
            Ok(())
        }

        fn set_mapping(
            &mut self,
            tgid: u32,
            block: Block,
            mapping: &KernelMapping,
        ) -> Result<(), KernelError> {
            if self.keys.len() >= self.most && !self.keys.contains_key(&(tgid, block)) {
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

        fn wait_for_walks(&self) {
            self.waits.set(self.waits.get() + 1);
        }
    }

    fn key(tgid: u32) -> ImageKey {
        ImageKey { process: ProcessKey { tgid, start_boottime_ns: u64::from(tgid) * 100 }, exec_id: 1 }
    }

    /// A file with a table of so many rows, as if the parser had made it.
    fn file(tables: &mut Tables, number: u8, rows: u64) -> Arc<MappedFile> {
        let limits = TableLimits::default();
        let mut builder = TableBuilder::new(Arch::X86_64, 0, rows * 16 + 16, &limits).unwrap();
        for row in 0..rows {
            builder
                .push(row * 16, UnwindRule::x86_64_sp(8 + 8 * (row % 2) as i32 + 16 * i32::from(number)))
                .unwrap();
        }
        let table = Arc::new(builder.finish().unwrap());
        let whole = Segment {
            vaddr: 0,
            file_offset: 0,
            file_bytes: 1 << 20,
            memory_bytes: 1 << 20,
            executable: true,
        };
        let own = std::fs::File::open("/proc/self/exe").unwrap();
        let file = Arc::new(MappedFile::opened(&format!("/lib/{number}.so"), 1, number.into(), own));
        tables.files.insert(
            file.id,
            Known::Made {
                content: ContentId::from_bytes([number; 16]),
                segments: Segments::new(vec![whole]),
                table: Some(table),
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

    fn tables(kernel: &Fake) -> Tables {
        Tables::new(kernel, TableSources::default(), || {}).unwrap()
    }

    #[test]
    fn r11_an_unchanged_scan_makes_no_call() {
        let mut kernel = Fake::new(4096);
        let mut tables = tables(&kernel);
        let libc = file(&mut tables, 1, 100);
        let one = || image(vec![at(0x10_0000, 3, &libc), at(0x20_0000, 5, &libc)]);
        tables.enter(&mut kernel, key(7), &one()).unwrap();
        assert!(!kernel.took().is_empty());
        tables.enter(&mut kernel, key(7), &one()).unwrap();
        assert_eq!(kernel.took(), []);
    }

    #[test]
    fn r9_another_file_in_the_same_place_takes_the_place_of_the_old_one() {
        let mut kernel = Fake::new(4096);
        let mut tables = tables(&kernel);
        let (old, new) = (file(&mut tables, 1, 100), file(&mut tables, 2, 100));
        let kept = at(0x40_0000, 2, &old);
        // Seven pages from an even one on are three blocks.
        tables.enter(&mut kernel, key(7), &image(vec![at(0x10_0000, 7, &old), kept.clone()])).unwrap();
        let table_of = |kernel: &Fake, address: u64| {
            let (_, mapping) = kernel.keys.iter().find(|((_, block), _)| block.address == address).unwrap();
            mapping.table.unwrap()
        };
        let (before, others) = (table_of(&kernel, 0x10_0000), table_of(&kernel, 0x40_0000));
        assert_eq!(before, others);
        kernel.took();
        // The scan makes the process's mappings from scratch: path and range are the same, the inode is another.
        assert_ne!(old.inode, new.inode);
        tables.enter(&mut kernel, key(7), &image(vec![at(0x10_0000, 7, &new), kept])).unwrap();
        let log = kernel.took();
        assert_eq!(log.iter().filter(|call| matches!(call, Call::Set(7, _))).count(), 3, "{log:?}");
        for mapping in kernel.keys.values().filter(|mapping| mapping.begin == 0x10_0000) {
            assert_ne!(mapping.table, Some(before), "nothing is left of the old file there");
        }
        assert_eq!(table_of(&kernel, 0x40_0000), others, "the other mapping is as it was");
    }

    #[test]
    fn r14_only_files_that_stacks_come_to_are_made_and_the_others_send_stacks_raw() {
        let mut kernel = Fake::new(4096);
        let mut tables = tables(&kernel);
        let (program, library) = (file(&mut tables, 1, 100), file(&mut tables, 2, 100));
        let made = tables.files.remove(&library.id).unwrap();
        let both = image(vec![at(0x10_0000, 1, &program), at(0x20_0000, 1, &library)]);
        tables.enter(&mut kernel, key(7), &both).unwrap();
        let table_of = |kernel: &Fake, address| kernel.keys[&(7, Block { address, bits: 12 })].table;
        assert_eq!(table_of(&kernel, 0x20_0000), Some(UNMADE));
        assert!(table_of(&kernel, 0x10_0000).is_some_and(|(number, _)| number < MAX_TABLES));
        tables.files.insert(library.id, made);
        kernel.took();
        tables.enter(&mut kernel, key(7), &both).unwrap();
        let block = Block { address: 0x20_0000, bits: 12 };
        assert_eq!(kernel.took().iter().filter(|call| **call == Call::Set(7, block)).count(), 1);
        assert!(table_of(&kernel, 0x20_0000).is_some_and(|(number, _)| number < MAX_TABLES));
        // The copy here may go: the kernel's serves.
        if let Some(Known::Made { table, .. }) = tables.files.get_mut(&library.id) {
            *table = None;
        }
        tables.enter(&mut kernel, key(8), &both).unwrap();
        assert_eq!(kernel.keys[&(8, block)].table, table_of(&kernel, 0x20_0000));
        assert!(tables.ready(&both));
    }

    #[test]
    fn r49_tables_that_were_just_used_are_kept_together_however_large() {
        let kernel = Fake::new(64);
        let mut tables = tables(&kernel);
        // Rows of 4 bytes: each is larger than what is kept in the long run.
        let large: Vec<_> = (1..=2).map(|number| file(&mut tables, number, 1_600_000)).collect();
        tables.keep_within_bounds();
        let is_kept = |tables: &Tables, file: &MappedFile| matches!(tables.files.get(&file.id), Some(Known::Made { table: Some(table), .. }) if table.kernel_bytes() > KEPT_BYTES);
        assert!(large.iter().all(|file| is_kept(&tables, file)));
        if let Some(Known::Made { used, .. }) = tables.files.get(&large[0].id) {
            used.set(Instant::now().checked_sub(KEPT_FOR * 2).unwrap());
        }
        tables.keep_within_bounds();
        assert!(!is_kept(&tables, &large[0]) && is_kept(&tables, &large[1]));
    }

    #[test]
    fn r10_each_property_of_a_mapping_makes_it_another_one() {
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
            tables.enter(&mut kernel, key(7), &image(vec![first.clone()])).unwrap();
            let before = kernel.keys.clone();
            kernel.took();
            tables.enter(&mut kernel, key(7), &image(vec![mapping.clone()])).unwrap();
            let sets = kernel.took().iter().filter(|call| matches!(call, Call::Set(..))).count();
            assert_eq!(sets, 1, "{mapping:?}");
            assert_ne!(kernel.keys, before);
            assert_eq!(kernel.keys.len(), 1);
        }
    }

    #[test]
    fn r12_a_key_of_both_sets_is_never_absent_and_new_ones_come_before_old_ones_go() {
        let mut kernel = Fake::new(4096);
        let mut tables = tables(&kernel);
        let (libc, other) = (file(&mut tables, 1, 100), file(&mut tables, 2, 100));
        tables.enter(&mut kernel, key(7), &image(vec![at(0x10_0000, 7, &libc)])).unwrap();
        kernel.took();
        // Shorter, of another file, and one more.
        let after = image(vec![at(0x10_0000, 4, &other), at(0x40_0000, 1, &libc)]);
        tables.enter(&mut kernel, key(7), &after).unwrap();
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
        assert!(!log.contains(&Call::Leave(7)), "the image is walked all the time");
    }

    #[test]
    fn r13_a_second_process_of_a_known_file_gets_its_mappings() {
        let mut kernel = Fake::new(4096);
        let mut tables = tables(&kernel);
        let libc = file(&mut tables, 1, 100);
        tables.enter(&mut kernel, key(7), &image(vec![at(0x10_0000, 1, &libc)])).unwrap();
        kernel.took();
        tables.enter(&mut kernel, key(8), &image(vec![at(0x50_0000, 1, &libc)])).unwrap();
        let block = Block { address: 0x50_0000, bits: 12 };
        assert_eq!(kernel.took(), [Call::Set(8, block), Call::Enter(8)], "no table is written again");
        assert_eq!(tables.stats().resident, 1);
    }

    #[test]
    fn r6_a_process_that_does_not_fit_leaves_nothing_behind() {
        let mut kernel = Fake::new(4096);
        kernel.most = 8;
        let mut tables = tables(&kernel);
        let libc = file(&mut tables, 1, 100);
        tables.enter(&mut kernel, key(7), &image(vec![at(0x10_0000, 7, &libc)])).unwrap();
        let before = kernel.keys.clone();
        // 255 pages from an odd one on are eight blocks.
        let error = tables.enter(&mut kernel, key(8), &image(vec![at(0x10_1000, 255, &libc)])).unwrap_err();
        assert!(error.to_string().contains("exec_mappings"), "{error}");
        assert_eq!(kernel.keys, before);
        assert!(!kernel.images.contains_key(&8));
        assert_eq!((tables.stats().refused, tables.stats().keys), (1, before.len() as u64));
    }

    #[test]
    fn r8_whoever_leaves_takes_everything_along() {
        let mut kernel = Fake::new(4096);
        let mut tables = tables(&kernel);
        let libc = file(&mut tables, 1, 100);
        for tgid in [7, 8] {
            tables.enter(&mut kernel, key(tgid), &image(vec![at(0x10_0000, 9, &libc)])).unwrap();
        }
        for tgid in [7, 8] {
            tables.leave(&mut kernel, tgid);
        }
        assert!(kernel.keys.is_empty() && kernel.images.is_empty());
        assert_eq!((tables.stats().keys, tables.stats().processes), (0, 0));
    }

    #[test]
    fn r7_one_process_may_have_thousands_of_mappings() {
        let mut kernel = Fake::new(4096);
        let mut tables = tables(&kernel);
        let libc = file(&mut tables, 1, 100);
        let many = (0..2000).map(|n| at(0x10_0000 + n * 0x4000, 3, &libc)).collect();
        tables.enter(&mut kernel, key(7), &image(many)).unwrap();
        assert_eq!(kernel.keys.len() as u64, tables.stats().keys);
        assert!(kernel.keys.len() >= 4000);
    }

    #[test]
    fn r49_tables_beyond_the_budget_take_the_place_of_those_that_were_not_needed_longest() {
        // Four tables of 26 lines fit.
        let mut kernel = Fake::new(110);
        let mut tables = tables(&kernel);
        let files: Vec<_> = (1..=60).map(|number| file(&mut tables, number, 400)).collect();
        for (tgid, file) in (1..).zip(&files) {
            tables.now += 1;
            tables.enter(&mut kernel, key(tgid), &image(vec![at(0x10_0000, 1, file)])).unwrap();
            let stats = tables.stats();
            assert!(stats.resident_bytes <= stats.budget_bytes && stats.resident <= 4, "{stats:?}");
            // Whoever is entered has a table that is there, of this generation.
            for tgid in kernel.images.keys() {
                let (_, mapping) = kernel.keys.iter().find(|((of, _), _)| of == tgid).unwrap();
                let (table, generation) = mapping.table.unwrap();
                let place = kernel.tables[&table].unwrap();
                assert_eq!(place.generation, generation);
            }
        }
        let stats = tables.stats();
        assert_eq!((stats.resident, stats.evicted, stats.refused), (4, 56, 0));
        assert_eq!(kernel.waits.get(), 56, "no place is given away while somebody may look at it");
        assert_eq!(kernel.images.len(), 4, "who lost a table comes raw until it is entered again");
        // One that is larger than all there is: an error that names the file.
        let large = file(&mut tables, 200, 4000);
        let error = tables.enter(&mut kernel, key(99), &image(vec![at(0x10_0000, 1, &large)])).unwrap_err();
        assert!(
            error.to_string().contains("/lib/200.so") && error.to_string().contains("--table-bytes"),
            "{error}"
        );
    }
}
