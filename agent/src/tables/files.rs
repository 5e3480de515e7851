//! The unwind tables that the agent itself holds, by file.

use std::{
    cell::Cell,
    collections::{HashMap, HashSet},
    io, mem,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use gannet_elf::{ContentId, Segments};
use gannet_unwind::{build::BuiltTable, overrides::Overrides, table::UnwindTable};

use super::{
    TableStats,
    parser::{self, Outcome, ParseError, ParsedFile, Parser, TableSources},
};
use crate::{
    access,
    model::{FileId, Image, MappedFile, Mapping, MappingKind},
    runtimes::RuntimeFile,
};

/// Memory of tables that the agent holds to unwind raw samples; the kernel has its own copy.
const MAX_HELD_BYTES: usize = 6 << 20;
/// The agent holds a table for this long after its last use, whatever the memory: a sample that needs two tables needs both
/// at once.
const MIN_HELD_TIME: Duration = Duration::from_secs(5);

/// The tables by file, and the thread that builds them.
pub(super) struct FileTables {
    parser: Parser,
    vdso: Option<VdsoTable>,
    files: HashMap<FileId, FileState>,
    /// Files whose file system did not answer. They count as files without a table until something has answered late.
    unanswered: Vec<FileId>,
    /// The number of late answers that are dealt with.
    answered: u64,
    /// The supplied tables in force, and their number: outcomes with a smaller one are out of date.
    supplied: Arc<Overrides>,
    supply: u64,
    /// The time when tables beyond [`MAX_HELD_BYTES`] were dropped last.
    trimmed: Instant,
}

/// The table of one file.
pub(super) enum FileState {
    /// The thread will build it.
    Requested,
    /// It is built. `table` is none after its memory was given back; the rest stays.
    Built {
        content: ContentId,
        segments: Segments,
        table: Option<Arc<UnwindTable>>,
        /// The interpreter that the file is.
        runtime: Option<Arc<RuntimeFile>>,
        used: Cell<Instant>,
    },
    /// The file has none, or cannot be read: its frames are found by frame pointer.
    None,
}

/// The table of the kernel's own shared object, the same in all processes.
struct VdsoTable {
    content: ContentId,
    segments: Segments,
    table: Arc<UnwindTable>,
}

/// The table by which a mapping is unwound.
pub(super) enum MappingTable<'a> {
    Built {
        content: ContentId,
        /// None after the agent gave its memory back.
        table: Option<&'a Arc<UnwindTable>>,
        /// The number to subtract from an address in the mapping. None if no executable segment is mapped there.
        bias: Option<u64>,
    },
    /// The file's table can be built.
    NotBuilt,
    /// There is none.
    None,
}

impl FileTables {
    pub(super) fn start(sources: TableSources, wake: impl Fn() + Send + 'static) -> io::Result<Self> {
        let supplied = Arc::clone(&sources.supplied);
        Ok(Self {
            parser: Parser::start(sources, wake)?,
            supplied,
            supply: 0,
            vdso: parser::vdso().map(|BuiltTable { content, segments, table, .. }| VdsoTable {
                content,
                segments,
                table: Arc::new(table),
            }),
            files: HashMap::new(),
            unanswered: Vec::new(),
            answered: 0,
            trimmed: Instant::now(),
        })
    }

    /// Takes the tables that the thread has built. Returns whether there were any.
    pub(super) fn collect(&mut self, stats: &mut TableStats) -> bool {
        let mut any = false;
        if !self.unanswered.is_empty() {
            let answered = access::node().stats().answered;
            if mem::replace(&mut self.answered, answered) != answered {
                for file in self.unanswered.drain(..) {
                    self.files.remove(&file);
                }
            }
        }
        for Outcome { file, parsed, supply } in self.parser.finished() {
            any = true;
            if supply < self.supply {
                // The next sample requests it again.
                self.files.remove(&file);
                continue;
            }
            let state = match parsed {
                Ok(ParsedFile { table, content, segments, runtime }) if !table.is_empty() => {
                    stats.made += 1;
                    FileState::Built {
                        content,
                        segments,
                        table: Some(table),
                        runtime,
                        used: Cell::new(Instant::now()),
                    }
                }
                Ok(_) => FileState::None,
                Err(ParseError::Unanswered(_)) => {
                    self.unanswered.push(file);
                    FileState::None
                }
                Err(error) => {
                    stats.failed += 1;
                    tracing::warn!(
                        "cannot build an unwind table, frames are found by frame pointer: {error}"
                    );
                    FileState::None
                }
            };
            self.files.insert(file, state);
        }
        if any || self.trimmed.elapsed() > MIN_HELD_TIME {
            self.trimmed = Instant::now();
            self.trim();
        }
        any
    }

    /// Replaces the supplied tables. Forgets the files whose table may be another one now, and returns their contents. Without
    /// a change it returns nothing.
    pub(super) fn supply(&mut self, tables: Arc<Overrides>) -> HashSet<ContentId> {
        let changed = self.supplied.differences(&tables);
        if changed.is_empty() {
            return changed;
        }
        self.supplied = Arc::clone(&tables);
        self.supply = self.parser.supply(tables);
        self.files.retain(|_, state| match state {
            FileState::Built { content, .. } => !changed.contains(content),
            FileState::Requested => true,
            // Its content is not known any more, and a table may be supplied for it.
            FileState::None => false,
        });
        changed
    }

    /// Returns the number of supplied tables.
    pub(super) fn supplied(&self) -> usize {
        self.supplied.len()
    }

    /// Requests the table of a file, for which `samples` samples wait.
    pub(super) fn request(&mut self, file: &Arc<MappedFile>, samples: usize) {
        if matches!(self.files.get(&file.id), Some(FileState::Requested)) {
            self.parser.raise(file.id, samples);
        } else if self.parser.request(file, samples) {
            self.files.insert(file.id, FileState::Requested);
        }
    }

    /// Returns the table of a mapping, and marks it as used.
    pub(super) fn of_mapping(&self, mapping: &Mapping) -> MappingTable<'_> {
        let page = rustix::param::page_size() as u64;
        match &mapping.kind {
            MappingKind::Anon => MappingTable::None,
            MappingKind::Vdso => match &self.vdso {
                Some(VdsoTable { content, segments, table }) => MappingTable::Built {
                    content: *content,
                    table: Some(table),
                    bias: segments.bias(mapping.start, 0, page),
                },
                None => MappingTable::None,
            },
            MappingKind::File(file) => match self.state(file) {
                Some(FileState::Built { content, segments, table, used, runtime: _ }) => {
                    used.set(Instant::now());
                    MappingTable::Built {
                        content: *content,
                        table: table.as_ref(),
                        bias: segments.bias(mapping.start, mapping.offset, page),
                    }
                }
                Some(FileState::None) => MappingTable::None,
                Some(FileState::Requested) | None => MappingTable::NotBuilt,
            },
        }
    }

    /// Returns the addresses of a mapping that a runtime's own file has, and whose frames are those of code that it makes, and the
    /// number to subtract from them.
    pub(super) fn made_code(&self, mapping: &Mapping) -> Option<(Range<u64>, u64)> {
        let MappingKind::File(file) = &mapping.kind else { return None };
        let Some(FileState::Built { segments, runtime: Some(runtime), .. }) = self.files.get(&file.id) else {
            return None;
        };
        let code = runtime.runtime.code(&runtime.detected);
        let bias = segments.bias(mapping.start, mapping.offset, rustix::param::page_size() as u64)?;
        let start = code.start.wrapping_add(bias).max(mapping.start);
        let end = code.end.wrapping_add(bias).min(mapping.end);
        (code.start < code.end && start < end).then_some((start..end, bias))
    }

    /// Returns the interpreter of an image, and the number to subtract from its addresses.
    pub(super) fn runtime_of(&self, image: &Image) -> Option<(&Arc<RuntimeFile>, u64)> {
        let page = rustix::param::page_size() as u64;
        let found = image.mappings.iter().filter_map(|mapping| {
            let MappingKind::File(file) = &mapping.kind else { return None };
            let Some(FileState::Built { segments, runtime: Some(runtime), .. }) = self.files.get(&file.id)
            else {
                return None;
            };
            Some((runtime, segments.bias(mapping.start, mapping.offset, page)?))
        });
        let mut without_frames = None;
        for (file, bias) in found {
            if file.runtime.has_frames() {
                return Some((file, bias));
            }
            without_frames = without_frames.or(Some((file, bias)));
        }
        without_frames
    }

    /// Returns the state of a file: `None` if nothing is known of it yet.
    pub(super) fn state(&self, file: &MappedFile) -> Option<&FileState> {
        if file.file.is_none() || !file.is_elf() {
            return Some(&FileState::None);
        }
        self.files.get(&file.id)
    }

    /// Drops tables beyond the memory limit: those whose last use is longest ago.
    pub(super) fn trim(&mut self) {
        let mut held: Vec<(Instant, FileId, usize)> = self
            .files
            .iter()
            .filter_map(|(id, state)| match state {
                FileState::Built { table: Some(table), used, .. } => {
                    Some((used.get(), *id, table.kernel_bytes()))
                }
                _ => None,
            })
            .collect();
        held.sort_unstable_by_key(|(used, ..)| std::cmp::Reverse(*used));
        let mut bytes = 0;
        for (_, id, size) in held {
            bytes += size;
            if bytes > MAX_HELD_BYTES
                && let Some(FileState::Built { table, used, .. }) = self.files.get_mut(&id)
                && used.get().elapsed() > MIN_HELD_TIME
            {
                *table = None;
            }
        }
    }

    /// Replaces the state of a file, as if the thread had built its table.
    #[cfg(test)]
    pub(super) fn set(&mut self, file: FileId, state: FileState) {
        self.files.insert(file, state);
    }

    #[cfg(test)]
    pub(super) fn take(&mut self, file: FileId) -> FileState {
        self.files.remove(&file).unwrap()
    }

    #[cfg(test)]
    pub(super) fn drop_table(&mut self, file: FileId) {
        if let Some(FileState::Built { table, .. }) = self.files.get_mut(&file) {
            *table = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use gannet_elf::{Arch, Segment};
    use gannet_unwind::{format::UnwindRule, limits::TableLimits, table_builder::TableBuilder};

    use super::*;

    fn large_table() -> Arc<UnwindTable> {
        let limits = TableLimits::default();
        let rows = 1_600_000;
        let mut builder = TableBuilder::new(Arch::X86_64, 0, rows * 16 + 16, &limits).unwrap();
        for row in 0..rows {
            builder.push(row * 16, UnwindRule::x86_64_sp(8 + 8 * (row % 2) as i32)).unwrap();
        }
        Arc::new(builder.finish().unwrap())
    }

    /// Checks that one sample can use several tables, even if each alone is over the memory limit (R49).
    #[test]
    fn tables_in_use_are_held_together_however_large() {
        let mut files = FileTables::start(TableSources::default(), || {}).unwrap();
        let (table, own) = (large_table(), || std::fs::File::open("/proc/self/exe").unwrap());
        assert!(table.kernel_bytes() > MAX_HELD_BYTES);
        let mapped: Vec<_> =
            (1..=2).map(|n| MappedFile::opened(&format!("/lib/{n}.so"), 1, n, own())).collect();
        for file in &mapped {
            let segment =
                Segment { vaddr: 0, file_offset: 0, file_bytes: 1, memory_bytes: 1, executable: true };
            let built = FileState::Built {
                content: ContentId::from_bytes([file.inode as u8; 16]),
                segments: Segments::new(vec![segment]),
                table: Some(Arc::clone(&table)),
                runtime: None,
                used: Cell::new(Instant::now()),
            };
            files.set(file.id, built);
        }
        let is_held = |files: &FileTables, file: &MappedFile| {
            matches!(files.files.get(&file.id), Some(FileState::Built { table: Some(_), .. }))
        };
        files.trim();
        assert!(mapped.iter().all(|file| is_held(&files, file)));
        if let Some(FileState::Built { used, .. }) = files.files.get(&mapped[0].id) {
            used.set(Instant::now().checked_sub(MIN_HELD_TIME * 2).unwrap());
        }
        files.trim();
        assert!(!is_held(&files, &mapped[0]) && is_held(&files, &mapped[1]));
    }
}
