//! The unwind tables of this node: which of them are in the kernel, and which process uses which.
//!
//! The agent builds the table of a file once, however many processes map it, and only when a stack has reached it: programs
//! map ten libraries and use three. The content of the file identifies the table. A table goes into the kernel when the first
//! process needs it there. It stays while there is room, and makes room for a table that is needed more.
//!
//! The mappings of a process go into the kernel when the agent has unwound its first samples, by the same tables. These
//! samples come raw, so that nothing is lost and a process of milliseconds costs no map at all. Where its stacks reach a
//! file whose table is not built yet, they come raw again.

mod arena;
mod disk_cache;
mod files;
#[cfg(test)]
mod live;
mod loaded;
mod parser;
mod refusals;
mod resident;
mod scratch;
mod supplied;
#[cfg(test)]
mod tests;
mod unwind;

use std::{collections::HashSet, io, sync::Arc, time::Instant};

use gannet_elf::ContentId;
use gannet_unwind::{intern::RuleNumbersFull, overrides::Overrides};

use self::{
    files::{FileState, FileTables, MappingTable},
    loaded::LoadedImages,
    refusals::Refusals,
    resident::{InsertError, ResidentTables},
};
use crate::{
    kernel::{EmptyRange, KernelError, KernelMapping, MAX_TABLES, SENT_RAW, UnwindMaps},
    model::{Image, ImageKey, MappedFile, Mapping, MappingKind},
    runtimes::{RuntimeFile, may_be_listed},
};

pub(crate) use self::parser::build_table;
pub use self::{parser::TableSources, refusals::RefusalCounts};
pub(crate) use self::{
    supplied::{SuppliedStamp, SuppliedTables},
    unwind::{UnwoundSample, leaf_only},
};

/// Number and generation of a table that is not built yet: the kernel side finds no such table, and sends the stack raw.
const NOT_BUILT: (u32, u32) = (u32::MAX, 0);
const _: () = assert!(NOT_BUILT.0 >= MAX_TABLES);

/// The unwind tables of this node. Owner: the engine's thread.
pub(crate) struct UnwindTables {
    files: FileTables,
    residents: ResidentTables,
    loaded: LoadedImages,
    refusals: Refusals,
    stats: TableStats,
}

/// Counts of the unwind tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableStats {
    /// Tables built, or read from the disk cache.
    pub made: u64,
    /// Files of which no table could be built.
    pub failed: u64,
    /// Supplied tables, which take precedence over those of files.
    pub supplied: u64,
    /// Tables in the kernel.
    pub resident: u64,
    /// Bytes of the tables in the kernel.
    pub resident_bytes: u64,
    /// Bytes that the kernel has for tables.
    pub budget_bytes: u64,
    /// Tables removed from the kernel to make room for others.
    pub evicted: u64,
    /// Rule numbers in use.
    pub rules: u64,
    /// Processes whose mappings are in the kernel.
    pub processes: u64,
    /// Keys in the mapping trie.
    pub keys: u64,
    /// Failed tries to load the mappings of a process.
    pub refused: RefusalCounts,
}

/// The reason why the mappings of a process are not in the kernel. Its samples continue to come raw.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// A table does not fit.
    #[error(
        "the table of {file} at {begin:#x}-{end:#x} has {lines} lines of 64 bytes, of {all} for all tables"
    )]
    NoRoom {
        /// The file of the table.
        file: String,
        /// The mapping of the file.
        begin: u64,
        /// End of the mapping, exclusive.
        end: u64,
        /// Size of the table.
        lines: usize,
        /// Size of the array of all tables.
        all: u32,
    },
    /// No rule numbers are left.
    #[error("the table at {begin:#x}-{end:#x} does not fit: {source}")]
    Rules {
        /// The mapping of the table's file.
        begin: u64,
        /// End of the mapping, exclusive.
        end: u64,
        /// What does not fit.
        #[source]
        source: RuleNumbersFull,
    },
    /// The mapping trie is full.
    #[error(
        "its mappings at {begin:#x}-{end:#x} need {new} keys, and the mapping trie has {used} of {capacity}"
    )]
    Keys {
        /// The first mapping.
        begin: u64,
        /// End of the last mapping, exclusive.
        end: u64,
        /// Keys of this process.
        new: usize,
        /// Keys of all other processes.
        used: usize,
        /// Keys that the trie may have.
        capacity: usize,
    },
    /// A mapping is empty or reversed.
    #[error("a mapping cannot be loaded: {0}")]
    Range(#[from] EmptyRange),
    /// The kernel refused to write a mapping.
    #[error("cannot write the mapping {begin:#x}-{end:#x}: {source}")]
    Write {
        /// Start of the mapping, inclusive.
        begin: u64,
        /// End of the mapping, exclusive.
        end: u64,
        /// The error of the kernel.
        #[source]
        source: KernelError,
    },
    /// The kernel refused another write to a map.
    #[error(transparent)]
    Kernel(KernelError),
    /// It did not fit before; the agent tries again later.
    #[error("it did not fit before")]
    Held,
}

impl UnwindTables {
    /// Starts without any table. The thread that builds tables calls `wake` after each; [`UnwindTables::collect`] takes
    /// the table.
    pub(crate) fn new(
        kernel: &impl UnwindMaps,
        sources: TableSources,
        wake: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        Ok(Self {
            files: FileTables::start(sources, wake)?,
            residents: ResidentTables::new(kernel.table_lines()),
            loaded: LoadedImages::default(),
            refusals: Refusals::default(),
            stats: TableStats::default(),
        })
    }

    /// Takes the tables that were built since the last call. Returns whether there were any.
    pub(crate) fn collect(&mut self) -> bool {
        self.files.collect(&mut self.stats)
    }

    /// Requests the table of a file, for which `samples` samples wait. Of several files, the one that most samples wait for
    /// comes first.
    pub(crate) fn request(&mut self, file: &Arc<MappedFile>, samples: usize) {
        self.files.request(file, samples);
    }

    /// Returns whether all tables of an image are built, and requests those that are not. Stacks of blocked threads never
    /// come raw, so they need all tables beforehand.
    pub(crate) fn request_all(&mut self, image: &Image) -> bool {
        let missing: Vec<_> = image
            .mappings
            .iter()
            .filter_map(|mapping| match &mapping.kind {
                MappingKind::File(file) if self.is_open(file) => Some(file),
                _ => None,
            })
            .collect();
        for file in &missing {
            self.request(file, 1);
        }
        missing.is_empty()
    }

    /// Requests the tables of an image's files that may be a runtime whose functions the process lists itself: its stacks may lie in
    /// the code that it makes alone, and reach no file. Returns whether all are read.
    pub(crate) fn request_listed(&mut self, image: &Image) -> bool {
        let is_unread = |file: &&Arc<MappedFile>| {
            may_be_listed(&file.path) && matches!(self.files.state(file), None | Some(FileState::Requested))
        };
        let unread = image.mappings.iter().find_map(|mapping| match &mapping.kind {
            MappingKind::File(file) => Some(file).filter(is_unread),
            _ => None,
        });
        if let Some(file) = unread {
            self.request(file, 1);
        }
        unread.is_none()
    }

    /// Returns whether the kernel side cannot have the file's table yet.
    fn is_open(&self, file: &MappedFile) -> bool {
        match self.files.state(file) {
            Some(FileState::None | FileState::Built { table: Some(_), .. }) => false,
            Some(FileState::Built { content, table: None, .. }) => !self.residents.contains(content),
            Some(FileState::Requested) | None => true,
        }
    }

    /// Returns whether the kernel side unwinds this image by itself, with these mappings.
    pub(crate) fn is_loaded(&self, key: &ImageKey) -> bool {
        self.loaded.contains(key)
    }

    /// Writes the mappings of a process to the kernel, or updates them there, with the tables that are built. Logs a refusal;
    /// after one, the process has to wait.
    #[cfg(test)]
    pub(crate) fn load(
        &mut self,
        kernel: &mut impl UnwindMaps,
        key: ImageKey,
        image: &Image,
    ) -> Result<(), LoadError> {
        self.load_with(kernel, key, image, false)
    }

    /// The same. With `sends_code` stacks that reach code without a file are sent raw.
    pub(crate) fn load_with(
        &mut self,
        kernel: &mut impl UnwindMaps,
        key: ImageKey,
        image: &Image,
        sends_code: bool,
    ) -> Result<(), LoadError> {
        let now = Instant::now();
        if self.refusals.is_held(&key, now) {
            return Err(LoadError::Held);
        }
        self.residents.advance();
        let mappings = self.kernel_mappings(kernel, image).map(|mappings| {
            if !sends_code {
                return mappings;
            }
            mappings
                .into_iter()
                .zip(&image.mappings)
                .flat_map(|(written, mapping)| self.with_raw(written, mapping))
                .collect()
        });
        let result = mappings.and_then(|mappings| self.loaded.load(kernel, key, mappings));
        match &result {
            Ok(()) => self.refusals.forget(key.process.tgid),
            Err(error) => {
                self.loaded.unload(kernel, key.process.tgid);
                if let Some(line) = self.refusals.add(key, error, now) {
                    tracing::warn!("{line}");
                }
            }
        }
        result
    }

    /// Returns the parts of a mapping, of which those that hold code that a runtime makes are sent raw.
    fn with_raw(&self, written: KernelMapping, mapping: &Mapping) -> Vec<KernelMapping> {
        let raw = |begin, end| KernelMapping { begin, end, bias: 0, table: Some(SENT_RAW) };
        if matches!(mapping.kind, MappingKind::Anon) {
            return vec![raw(written.begin, written.end)];
        }
        let Some((code, _)) = self.files.made_code(mapping) else { return vec![written] };
        let (begin, end) = (written.begin, written.end);
        let before = KernelMapping { end: code.start, ..written };
        let behind = KernelMapping { begin: code.end, ..written };
        let mut parts = vec![raw(code.start, code.end)];
        parts.extend((begin < code.start).then_some(before));
        parts.extend((code.end < end).then_some(behind));
        parts.sort_unstable_by_key(|part| part.begin);
        parts
    }

    /// Removes the mappings of a process from the kernel.
    pub(crate) fn unload(&mut self, kernel: &mut impl UnwindMaps, tgid: u32) {
        self.refusals.forget(tgid);
        self.loaded.unload(kernel, tgid);
    }

    /// Replaces the supplied tables. Tables of files that they concern leave the kernel. All processes are unwound by raw samples
    /// until their next ones have shown which tables they need.
    pub(crate) fn supply(&mut self, kernel: &mut impl UnwindMaps, tables: Arc<Overrides>) {
        let changed = self.files.supply(tables);
        if changed.is_empty() {
            return;
        }
        for tgid in self.loaded.all() {
            self.unload(kernel, tgid);
        }
        for content in changed {
            self.residents.remove(kernel, &content);
        }
    }

    /// Returns the interpreter of an image, if its file's table is built, and the number to subtract from its addresses.
    pub(crate) fn runtime_of(&self, image: &Image) -> Option<(&Arc<RuntimeFile>, u64)> {
        self.files.runtime_of(image)
    }

    /// Reports whether an image has a file whose runtime makes code. Before its table is built, the name of the file says so.
    pub(crate) fn has_code_file(&self, image: &Image) -> bool {
        unwind::code_file(image).is_some_and(|file| match self.files.state(file) {
            Some(FileState::Built { runtime, .. }) => runtime.is_some(),
            Some(FileState::Requested) | None => true,
            Some(FileState::None) => false,
        })
    }

    /// Returns the counts so far.
    pub(crate) fn stats(&self) -> TableStats {
        TableStats {
            supplied: self.files.supplied() as u64,
            resident: self.residents.tables() as u64,
            resident_bytes: u64::from(self.residents.used_lines()) * 64,
            budget_bytes: u64::from(self.residents.all_lines()) * 64,
            rules: self.residents.rules() as u64,
            processes: self.loaded.processes() as u64,
            keys: self.loaded.keys() as u64,
            refused: self.refusals.counts(),
            ..self.stats
        }
    }

    fn kernel_mappings(
        &mut self,
        kernel: &mut impl UnwindMaps,
        image: &Image,
    ) -> Result<Vec<KernelMapping>, LoadError> {
        // One process needs all of its tables at once.
        let protected: HashSet<ContentId> = image
            .mappings
            .iter()
            .filter_map(|mapping| match self.files.of_mapping(mapping) {
                MappingTable::Built { content, .. } => Some(content),
                MappingTable::NotBuilt | MappingTable::None => None,
            })
            .collect();
        image.mappings.iter().map(|mapping| self.kernel_mapping(kernel, mapping, &protected)).collect()
    }

    fn kernel_mapping(
        &mut self,
        kernel: &mut impl UnwindMaps,
        mapping: &Mapping,
        protected: &HashSet<ContentId>,
    ) -> Result<KernelMapping, LoadError> {
        let by_frame_pointer = KernelMapping { begin: mapping.start, end: mapping.end, bias: 0, table: None };
        match self.files.of_mapping(mapping) {
            MappingTable::None | MappingTable::Built { bias: None, .. } => Ok(by_frame_pointer),
            MappingTable::NotBuilt => Ok(KernelMapping { table: Some(NOT_BUILT), ..by_frame_pointer }),
            MappingTable::Built { content, table, bias: Some(bias) } => {
                let table = match (self.residents.get(&content), table.cloned()) {
                    (Some(resident), _) => resident,
                    (None, Some(table)) => {
                        let name = match &mapping.kind {
                            MappingKind::File(file) => file.path.as_str(),
                            MappingKind::Vdso => "[vdso]",
                            MappingKind::Anon => "",
                        };
                        self.make_resident(kernel, content, &table, (name, mapping), protected)?
                    }
                    // The agent's copy is gone: the table has to be built again.
                    (None, None) => NOT_BUILT,
                };
                Ok(KernelMapping { bias, table: Some(table), ..by_frame_pointer })
            }
        }
    }

    /// Puts a table into the kernel; evicts others until it fits.
    fn make_resident(
        &mut self,
        kernel: &mut impl UnwindMaps,
        content: ContentId,
        table: &gannet_unwind::table::UnwindTable,
        (name, mapping): (&str, &Mapping),
        protected: &HashSet<ContentId>,
    ) -> Result<(u32, u32), LoadError> {
        loop {
            let refusal = match self.residents.insert(kernel, content, table) {
                Ok(resident) => return Ok(resident),
                Err(InsertError::Kernel(error)) => return Err(error.into()),
                Err(refusal) => refusal,
            };
            let can_fit = table.lines().len() <= self.residents.all_lines() as usize;
            if can_fit && let Some(evicted) = self.residents.evict(kernel, protected) {
                self.stats.evicted += 1;
                // These processes are loaded again when their samples come raw.
                for tgid in self.loaded.users_of(evicted) {
                    self.loaded.unload(kernel, tgid);
                }
                continue;
            }
            let (begin, end) = (mapping.start, mapping.end);
            return Err(match refusal {
                InsertError::Rules(source) => LoadError::Rules { begin, end, source },
                _ => LoadError::NoRoom {
                    file: name.to_owned(),
                    begin,
                    end,
                    lines: table.lines().len(),
                    all: self.residents.all_lines(),
                },
            });
        }
    }
}
