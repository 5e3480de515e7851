//! Which unwind tables are in the kernel, and which process uses which.
//!
//! A file's table is made once, whoever maps it, and is known by the file's contents; it is put into the kernel when the
//! first process needs it there, stays while there is room, and goes when another one needs the room more. A process is
//! entered once it has been sampled a few times: until then its samples come raw and are walked here, by the same
//! tables, so that nothing is lost and a process of milliseconds costs no map at all.

mod arena;
mod parser;
mod raw;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io,
    ops::Range,
    sync::Arc,
};

use gannet_unwind::{
    build::Built,
    content::ContentId,
    elf::Segments,
    format::MAX_RULES,
    intern::{Full, Interner},
    table::Table,
};

pub use raw::{Walked, unwalked};

use self::{arena::Arena, parser::Parser};
use crate::{
    kernel::{Block, Kernel, KernelError, KernelMapping, KernelTable, MAX_TABLES, blocks},
    process::{Image, ImageKey, Mapping, MappingKind, Process},
    symbols::{FileId, MappedFile},
};

/// Memory of tables that are kept here for raw samples; the kernel has its own copy.
const KEPT_BYTES: usize = 16 << 20;
/// Keys that the mapping trie may hold: a little less than the kernel allows, so that it never has to refuse.
const MAX_KEYS: usize = 262_144 - 1024;

/// The tables of this node.
pub struct Tables {
    parser: Parser,
    vdso: Option<Vdso>,
    files: HashMap<FileId, Known>,
    residents: HashMap<ContentId, Resident>,
    interner: Interner,
    arena: Arena,
    free_numbers: Vec<u32>,
    generations: Vec<u32>,
    entered: HashMap<u32, Entered>,
    keys: usize,
    now: u64,
    stats: Stats,
}

/// What is known of a file.
enum Known {
    /// Asked for.
    Waiting,
    /// Its table, as long as it is kept, and what outlives it.
    Made { content: ContentId, segments: Segments, table: Option<Arc<Table>>, used: u64 },
    /// It has none, or it cannot be read: its frames are found by frame pointer.
    Without,
}

/// The kernel's own shared object, the same in all processes.
struct Vdso {
    content: ContentId,
    segments: Segments,
    table: Arc<Table>,
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
    Rules(#[from] Full),
    /// The mapping trie is full.
    #[error("the mapping trie is full: {0} keys")]
    Keys(usize),
    /// A map refused.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl Tables {
    /// Nothing known yet. `ring` is called when a table has been made: [`Tables::collect`] takes it.
    pub fn new(kernel: &Kernel, ring: impl Fn() + Send + 'static) -> io::Result<Self> {
        Ok(Self {
            parser: Parser::start(ring)?,
            vdso: parser::vdso().map(|Built { content, segments, table, .. }| Vdso {
                content,
                segments,
                table: Arc::new(table),
            }),
            files: HashMap::new(),
            residents: HashMap::new(),
            interner: Interner::new(MAX_RULES),
            arena: Arena::new(kernel.table_lines()),
            free_numbers: (0..MAX_TABLES).rev().collect(),
            generations: vec![0; MAX_TABLES as usize],
            entered: HashMap::new(),
            keys: 0,
            now: 0,
            stats: Stats::default(),
        })
    }

    /// Takes what the parser has finished. True: something was.
    pub fn collect(&mut self) -> bool {
        let mut any = false;
        for (file, outcome) in self.parser.finished() {
            any = true;
            let known = match outcome {
                Ok(Built { table, content, segments, .. }) if !table.is_empty() => {
                    self.stats.made += 1;
                    Known::Made { content, segments, table: Some(Arc::new(table)), used: self.now }
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
        if any {
            self.keep_within_bounds();
        }
        any
    }

    /// Asks for the tables of an image. True: all are here, and [`Tables::table_at`] and [`Tables::enter`] can be used.
    pub fn ready(&mut self, image: &Image) -> bool {
        self.now += 1;
        let mut ready = true;
        for mapping in &image.mappings {
            let MappingKind::File(file) = &mapping.kind else { continue };
            if !has_tables(file) {
                continue;
            }
            match self.files.get_mut(&file.id) {
                Some(Known::Without) => {}
                Some(Known::Made { table: Some(_), used, .. }) => *used = self.now,
                Some(Known::Waiting) => ready = false,
                Some(Known::Made { table: None, .. }) | None => {
                    ready = false;
                    if self.parser.request(file) {
                        self.files.insert(file.id, Known::Waiting);
                    }
                }
            }
        }
        ready
    }

    /// The table of a mapping, and what to subtract from an address in it.
    pub fn table_of(&self, mapping: &Mapping) -> Option<(Arc<Table>, u64)> {
        match &mapping.kind {
            MappingKind::Anon => None,
            MappingKind::Vdso => {
                let vdso = self.vdso.as_ref()?;
                let bias = vdso.segments.bias(mapping.start, 0, page_bytes())?;
                Some((Arc::clone(&vdso.table), bias))
            }
            MappingKind::File(file) => match self.files.get(&file.id)? {
                Known::Made { segments, table: Some(table), .. } => {
                    Some((Arc::clone(table), segments.bias(mapping.start, mapping.offset, page_bytes())?))
                }
                _ => None,
            },
        }
    }

    /// Whether the kernel side walks this image, with these mappings, by itself.
    pub fn is_entered(&self, key: &ImageKey) -> bool {
        self.entered.get(&key.process.tgid).is_some_and(|entered| entered.key == *key)
    }

    /// Puts a process's mappings into the kernel, or brings them up to date there. All its tables must be ready.
    pub fn enter(&mut self, kernel: &mut Kernel, process: &Process) -> Result<(), TablesError> {
        let result = self.try_enter(kernel, process);
        if result.is_err() {
            self.stats.refused += 1;
            self.leave(kernel, process.key.process.tgid);
        }
        result
    }

    fn try_enter(&mut self, kernel: &mut Kernel, process: &Process) -> Result<(), TablesError> {
        let tgid = process.key.process.tgid;
        let protected: HashSet<ContentId> =
            process.image.mappings.iter().filter_map(|mapping| self.content_of(mapping)).collect();
        let mut mappings = Vec::with_capacity(process.image.mappings.len());
        for mapping in &process.image.mappings {
            mappings.push(self.kernel_mapping(kernel, mapping, &protected)?);
        }
        let old = self.entered.remove(&tgid);
        let keys_of = |mappings: &[KernelMapping]| -> BTreeSet<(u64, u32)> {
            mappings
                .iter()
                .filter_map(|mapping| blocks(mapping.begin, mapping.end).ok())
                .flatten()
                .map(|block| (block.address, block.bits))
                .collect()
        };
        let old_keys = old.as_ref().map(|old| keys_of(&old.mappings)).unwrap_or_default();
        let new_keys = keys_of(&mappings);
        let total = self.keys - old_keys.len() + new_keys.len();
        if total > MAX_KEYS {
            self.entered.extend(old.map(|old| (tgid, old)));
            return Err(TablesError::Keys(self.keys));
        }
        let changed_image = old.as_ref().is_none_or(|old| old.key != process.key);
        let unchanged: HashSet<KernelMapping> = match old {
            Some(old) if !changed_image => old.mappings.into_iter().collect(),
            Some(_) => {
                // What the former image mapped means nothing now: its samples come raw until all is written.
                kernel.remove_image(tgid);
                HashSet::new()
            }
            None => HashSet::new(),
        };
        // New keys go over equal old ones in place, then what is left of the old goes: no look-up misses meanwhile.
        self.entered.insert(tgid, Entered { key: process.key, mappings: mappings.clone() });
        self.keys = total;
        for mapping in mappings.iter().filter(|mapping| !unchanged.contains(mapping)) {
            for block in blocks(mapping.begin, mapping.end).unwrap_or_default() {
                kernel.set_mapping(tgid, block, mapping)?;
            }
        }
        for (address, bits) in old_keys.difference(&new_keys) {
            kernel.remove_mapping(tgid, Block { address: *address, bits: *bits });
        }
        kernel.set_image(process.key.process, process.key.exec_id)?;
        Ok(())
    }

    /// Takes everything of a process out of the kernel.
    pub fn leave(&mut self, kernel: &mut Kernel, tgid: u32) {
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
        kernel: &mut Kernel,
        mapping: &Mapping,
        protected: &HashSet<ContentId>,
    ) -> Result<KernelMapping, TablesError> {
        let (begin, end) = (mapping.start, mapping.end);
        let Some((content, (table, bias))) = self.content_of(mapping).zip(self.table_of(mapping)) else {
            return Ok(KernelMapping { begin, end, bias: 0, table: None });
        };
        let name = match &mapping.kind {
            MappingKind::File(file) => file.path.as_str(),
            _ => "[vdso]",
        };
        let place = self.make_resident(kernel, content, &table, name, protected)?;
        Ok(KernelMapping { begin, end, bias, table: Some(place) })
    }

    /// The number and generation of a table in the kernel, put there now if it is not.
    fn make_resident(
        &mut self,
        kernel: &mut Kernel,
        content: ContentId,
        table: &Table,
        name: &str,
        protected: &HashSet<ContentId>,
    ) -> Result<(u32, u32), TablesError> {
        if let Some(resident) = self.residents.get_mut(&content) {
            resident.used = self.now;
            return Ok((resident.table, self.generations[resident.table as usize]));
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
        kernel.write_rules(&interned.new);
        kernel.write_lines(range.start, table.kernel_lines(&interned.numbers));
        let generation = self.generations[number as usize];
        let place = KernelTable {
            base: table.base(),
            first_line: range.start,
            granules: table.granules(),
            generation,
        };
        kernel.set_table(number, Some(place), generation)?;
        self.residents.insert(
            content,
            Resident { table: number, lines: range, numbers: interned.numbers, used: self.now },
        );
        Ok((number, generation))
    }

    /// Takes the table that was needed the longest time ago out of the kernel. False: there is none.
    fn evict(&mut self, kernel: &mut Kernel, protected: &HashSet<ContentId>) -> bool {
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
        wait_for_walks();
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
        let mut kept: Vec<(u64, FileId, usize)> = self
            .files
            .iter()
            .filter_map(|(id, known)| match known {
                Known::Made { table: Some(table), used, .. } => Some((*used, *id, table.kernel_bytes())),
                _ => None,
            })
            .collect();
        kept.sort_unstable_by_key(|(used, ..)| std::cmp::Reverse(*used));
        let mut bytes = 0;
        for (_, id, size) in kept {
            bytes += size;
            if bytes > KEPT_BYTES
                && let Some(Known::Made { table, used, .. }) = self.files.get_mut(&id)
                && *used < self.now
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

/// Returns when no BPF program is still at what it was at when this was called: each runs within one RCU read side.
fn wait_for_walks() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: takes no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        // Refused on machines with isolated CPUs. A walk takes microseconds.
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
