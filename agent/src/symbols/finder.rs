//! Finds the functions at addresses: decides which source names an address, and caches what the sources answer.
//!
//! [`NameFinder::locate`] is the one decision. An address of the kernel is named by `/proc/kallsyms`. An address in an ELF
//! file is named by Go's own tables, else by debug information, else by a symbol table. Code without such a file was made at run time, and its perf
//! map names it. A language runtime that names its own frames becomes a further [`Location`].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    io,
    num::NonZeroUsize,
    os::unix::fs::MetadataExt as _,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use gannet_elf::{ContentId, Elf, ElfLimits};
use gannet_symbols::{dwarf::DebugLine, go, tables};
use lru::LruCache;
use quick_cache::unsync;

use super::{
    debug_info::{DebugFrames, DebugInfoReader, FileDebugInfo},
    formats::{
        jitdump::JitDump,
        kallsyms::{KernelSymbols, Refreshed},
        perf_map::{Listed, PerfMap},
    },
    names::{ByBytes, ContentKey, Function, Functions, SharedTexts},
    options::{Skipped, SymbolizerConfig, SymbolizerStats},
    vdso::vdso_file,
};
use crate::{
    access::{self, Target},
    model::{FileId, Image, MappedFile, MappingKind, ProcessKey},
    process::perf_map_files,
};

/// Kernel addresses have the highest bit set on every machine that Gannet runs on, and user addresses do not.
pub(super) const FIRST_KERNEL_ADDRESS: u64 = 1 << 63;
/// Addresses of the kernel whose functions are remembered, of some 150 bytes each.
const MAX_KERNEL_FUNCTIONS: usize = 8192;
/// Addresses of a file that are tried again. The names of others are not cached.
const MAX_PROVISIONAL: usize = 1024;
const MAX_FILE_STATES: NonZeroUsize = NonZeroUsize::new(8192).unwrap();
const MAX_PERF_MAPS: NonZeroUsize = NonZeroUsize::new(64).unwrap();
/// Perf maps that are larger than this, all together, are dropped after each profile.
const MAX_CACHED_PERF_MAP_BYTES: usize = 8 << 20;

/// The kind of code at an address, which decides about the source of its name.
pub(super) enum Location<'a> {
    Kernel,
    /// In an ELF file, at this ELF virtual address.
    File(&'a Arc<MappedFile>, u64),
    /// In code that was made at run time.
    Jitted,
    Unmapped,
}

/// Functions by file and ELF virtual address.
pub(super) type FileFunctions = HashMap<(FileId, u64), Functions>;
/// Functions by address at run time.
pub(super) type ProcessFunctions = HashMap<u64, Functions>;

/// The cached state of one file.
#[derive(Debug, Default)]
struct FileState {
    content: Option<ContentKey>,
    /// The symbol table could not be read, and is not read again.
    unusable_table: bool,
    /// It has no table of Go functions with lines.
    without_go_lines: bool,
    /// Go's function table could not be used, and that is logged.
    go_fault_logged: bool,
    debug_info: Option<FileDebugInfo>,
    /// Addresses whose cached names come from a symbol table, because there was no time for debug information.
    provisional: HashSet<u64>,
}

/// The sources of names, and a cache of their answers. Owner: the symbolizer's thread.
pub(super) struct NameFinder {
    stats: Arc<SymbolizerStats>,
    cache: unsync::Cache<(ContentKey, u64), Functions, ByBytes>,
    files: LruCache<FileId, FileState>,
    debug_info: DebugInfoReader,
    perf_maps: LruCache<ProcessKey, PerfMap>,
    jitdumps: LruCache<ProcessKey, JitDump>,
    /// Bytes of perf maps and jitdumps that may be read.
    map_bytes: ByteBudget,
    kallsyms: KernelSymbols,
    /// Functions of the kernel that were asked for since its symbols changed.
    kernel_functions: ProcessFunctions,
    /// The kernel's symbols are those of now. False again after each set of profiles.
    kernel_is_fresh: bool,
    vdso: Option<Arc<MappedFile>>,
    no_functions: Functions,
    /// Much memory was allocated and freed since the last call of [`return_memory`].
    wasteful: bool,
}

impl NameFinder {
    pub(super) fn new(config: SymbolizerConfig, stats: Arc<SymbolizerStats>) -> Self {
        let SymbolizerConfig {
            queue: _,
            cache_bytes,
            debug_reader,
            debug_dirs,
            debug_cost,
            kernel_symbols,
            offers,
        } = config;
        Self {
            cache: unsync::Cache::with_weighter((cache_bytes / 256) as usize, cache_bytes, ByBytes),
            files: LruCache::new(MAX_FILE_STATES),
            debug_info: DebugInfoReader::new(
                debug_reader,
                debug_dirs,
                debug_cost,
                offers,
                Arc::clone(&stats),
            ),
            perf_maps: LruCache::new(MAX_PERF_MAPS),
            jitdumps: LruCache::new(MAX_PERF_MAPS),
            map_bytes: ByteBudget::new(debug_cost.map_bytes),
            kallsyms: KernelSymbols::new(kernel_symbols),
            kernel_functions: ProcessFunctions::new(),
            kernel_is_fresh: false,
            vdso: vdso_file().map_err(|error| tracing::debug!(%error, "cannot read the vDSO")).ok(),
            no_functions: Arc::new([]),
            wasteful: false,
            stats,
        }
    }

    /// Returns the build id of the vDSO, or an empty text.
    pub(super) fn vdso_build_id(&self) -> &str {
        self.vdso.as_ref().map_or("", |vdso| vdso.build_id.as_str())
    }

    /// Decides which source names an address.
    pub(super) fn locate<'a>(&'a self, image: &'a Image, address: u64) -> Location<'a> {
        if address >= FIRST_KERNEL_ADDRESS {
            return Location::Kernel;
        }
        let Some(mapping) = image.find(address) else { return Location::Unmapped };
        let file = match &mapping.kind {
            MappingKind::File(file) => file,
            MappingKind::Vdso => match &self.vdso {
                Some(vdso) => vdso,
                None => return Location::Unmapped,
            },
            MappingKind::Anon => return Location::Jitted,
        };
        match file.address_of(address - mapping.start + mapping.offset) {
            Some(elf_address) => Location::File(file, elf_address),
            // Some just-in-time compilers map their code twice, through a file that is no ELF file.
            None if !file.is_elf() => Location::Jitted,
            None => Location::Unmapped,
        }
    }

    /// Finds the functions in files, for addresses of any number of processes: each file is read once. The files that most
    /// processes use come first, so that they get the time for debug information.
    pub(super) fn find_in_files<'a>(
        &mut self,
        addresses: impl Iterator<Item = (&'a Image, u64)>,
    ) -> FileFunctions {
        let mut by_file: BTreeMap<FileId, (Arc<MappedFile>, BTreeSet<u64>, usize)> = BTreeMap::new();
        for (image, address) in addresses {
            if let Location::File(file, elf_address) = self.locate(image, address) {
                let wanted = by_file.entry(file.id).or_insert_with(|| (Arc::clone(file), BTreeSet::new(), 0));
                wanted.1.insert(elf_address);
                wanted.2 += 1;
            }
        }
        let mut found = FileFunctions::new();
        let mut files: Vec<_> = by_file.into_values().collect();
        files.sort_by_key(|(.., uses)| std::cmp::Reverse(*uses));
        for (file, addresses, _) in files {
            self.find_in_file(&file, &addresses, &mut found);
        }
        found
    }

    fn find_in_file(&mut self, file: &Arc<MappedFile>, addresses: &BTreeSet<u64>, found: &mut FileFunctions) {
        if file.file.is_none() {
            return;
        }
        let Some(content) = self.content(file) else { return };
        let state = self.files.get_or_insert_mut(file.id, FileState::default);
        let now = Instant::now();
        let is_time = state.debug_info.as_ref().is_some_and(|info| self.debug_info.has_time(info, now));
        let mut missing = Vec::new();
        for &address in addresses {
            match self.cache.get(&(content, address)) {
                Some(functions) if !(is_time && state.provisional.contains(&address)) => {
                    found.insert((file.id, address), Arc::clone(functions));
                }
                _ => missing.push(address),
            }
        }
        if !missing.is_empty() {
            missing = self.find_in_go_file(file, content, missing, found);
        }
        if missing.is_empty() {
            return;
        }
        let state = self.files.get_or_insert_mut(file.id, FileState::default);
        let debug_frames = self.debug_info.frames(&mut state.debug_info, file, &missing);
        self.wasteful |= matches!(debug_frames, DebugFrames::Read(_));
        let has_no_frame = |(index, _): &(usize, &u64)| debug_frames.frame(*index).is_none();
        let rest: Vec<u64> =
            missing.iter().enumerate().filter(has_no_frame).map(|(_, address)| *address).collect();
        let Some(symbols) = self.symbols(file, &rest) else { return };
        let mut symbols = symbols.into_iter();
        let mut texts = SharedTexts::default();
        for (index, address) in missing.into_iter().enumerate() {
            let functions: Functions = match debug_frames.frame(index) {
                Some(frame) => frame.iter().map(|line| function_of_line(&mut texts, line)).collect(),
                None => match symbols.next().flatten() {
                    Some(raw) => texts.symbol(&raw),
                    None => Arc::clone(&self.no_functions),
                },
            };
            // An address without a name is cached too: otherwise each window would search for it again.
            if self.note(file.id, address, &debug_frames) {
                self.cache.insert((content, address), Arc::clone(&functions));
            }
            found.insert((file.id, address), functions);
        }
    }

    /// Names Go functions by the program's own tables: that takes a small part of the time that debug information takes, works
    /// for stripped programs, and gives the lines that Go's own profiles have. Returns the other addresses.
    fn find_in_go_file(
        &mut self,
        file: &Arc<MappedFile>,
        content: ContentKey,
        addresses: Vec<u64>,
        found: &mut FileFunctions,
    ) -> Vec<u64> {
        let state = self.files.get_or_insert_mut(file.id, FileState::default);
        if state.without_go_lines {
            return addresses;
        }
        let wanted = addresses.clone();
        let Ok(frames) = access::read_file(file, move |open| go::lines(open, &wanted)) else {
            return addresses;
        };
        let Ok(Some(frames)) = frames else {
            state.without_go_lines = true;
            return addresses;
        };
        self.wasteful = true;
        let mut texts = SharedTexts::default();
        let mut rest = Vec::new();
        for (address, frame) in addresses.into_iter().zip(frames) {
            if frame.is_empty() {
                rest.push(address);
                continue;
            }
            let functions: Functions = frame.iter().map(|line| function_of_line(&mut texts, line)).collect();
            state.provisional.remove(&address);
            self.cache.insert((content, address), Arc::clone(&functions));
            found.insert((file.id, address), functions);
        }
        rest
    }

    /// Remembers whether debug information has yet to be read at an address. Returns whether its name may be cached.
    fn note(&mut self, file: FileId, address: u64, debug_frames: &DebugFrames) -> bool {
        let provisional = &mut self.files.get_or_insert_mut(file, FileState::default).provisional;
        if !matches!(debug_frames, DebugFrames::Later) {
            provisional.remove(&address);
            return true;
        }
        if provisional.len() < MAX_PROVISIONAL && provisional.insert(address) {
            self.stats.skip(Skipped::NoTime, 1);
        }
        provisional.contains(&address)
    }

    /// Returns the identity of the file's content, which is read once for each file; none if the file does not answer.
    fn content(&mut self, file: &Arc<MappedFile>) -> Option<ContentKey> {
        let state = self.files.get_or_insert_mut(file.id, FileState::default);
        if let Some(content) = state.content {
            return Some(content);
        }
        let content = access::read_file(file, |open| {
            let elf = Elf::parse(open, &ElfLimits::default()).ok();
            elf.and_then(|elf| ContentId::of(&elf))
        });
        let content = content.ok()?.ok().flatten().map_or(ContentKey::File(file.id), ContentKey::Content);
        state.content = Some(content);
        Some(content)
    }

    /// Searches the file's symbol tables. Returns none if the file does not answer.
    fn symbols(&mut self, file: &Arc<MappedFile>, addresses: &[u64]) -> Option<Vec<Option<Vec<u8>>>> {
        let state = self.files.get_or_insert_mut(file.id, FileState::default);
        if addresses.is_empty() || state.unusable_table {
            return Some(Vec::new());
        }
        let separate = state.debug_info.as_ref().and_then(FileDebugInfo::separate_file);
        let addresses = addresses.to_vec();
        let found = access::read_file(file, move |open| {
            let separate = separate.as_ref().and_then(|file| file.file.as_ref());
            tables::find(open, separate, &addresses)
        });
        let Ok(found) = found.ok()? else { return Some(Vec::new()) };
        match found {
            Ok(found) => {
                if let Some(fault) = found.go_fault
                    && !std::mem::replace(&mut state.go_fault_logged, true)
                {
                    tracing::info!(path = file.path, %fault, "the Go functions of this file have no names");
                    self.stats.unusable_tables.fetch_add(1, Ordering::Relaxed);
                }
                Some(found.names)
            }
            Err(error) => {
                tracing::info!(path = file.path, %error, "the functions of this file have no names");
                state.unusable_table = true;
                self.stats.unusable_tables.fetch_add(1, Ordering::Relaxed);
                Some(Vec::new())
            }
        }
    }

    /// Finds the functions of the kernel.
    pub(super) fn find_in_kernel(&mut self, addresses: impl Iterator<Item = u64>) -> ProcessFunctions {
        let mut texts = SharedTexts::default();
        let mut found = ProcessFunctions::new();
        let mut unknown = Vec::new();
        for address in addresses {
            self.refresh_kernel();
            match self.kernel_functions.get(&address) {
                Some(known) => drop(found.insert(address, Arc::clone(known))),
                None => unknown.push(address),
            }
        }
        for (address, symbol) in unknown.iter().zip(self.kallsyms.find_all(&unknown)) {
            let Some(symbol) = symbol else { continue };
            let file = if symbol.module.is_empty() { String::new() } else { format!("[{}]", symbol.module) };
            let functions = texts.plain(&symbol.name, &file);
            self.kernel_functions.insert(*address, Arc::clone(&functions));
            found.insert(*address, functions);
        }
        found
    }

    /// Learns once for each set of profiles how the kernel's symbols have changed.
    fn refresh_kernel(&mut self) {
        if std::mem::replace(&mut self.kernel_is_fresh, true) {
            return;
        }
        let refreshed = self.kallsyms.refresh();
        self.wasteful |= refreshed == Refreshed::Read;
        if refreshed != Refreshed::Unchanged || self.kernel_functions.len() > MAX_KERNEL_FUNCTIONS {
            self.kernel_functions.clear();
        }
    }

    /// Finds the functions that a process made at run time.
    pub(super) fn find_jitted(
        &mut self,
        key: ProcessKey,
        image: &Image,
        addresses: &[u64],
    ) -> ProcessFunctions {
        let mut found = ProcessFunctions::new();
        if addresses.is_empty() {
            return found;
        }
        self.find_in_perf_map(key, addresses, &mut found);
        let rest: Vec<u64> =
            addresses.iter().copied().filter(|address| !found.contains_key(address)).collect();
        if let Some(file) = jitdump_of(image).filter(|_| !rest.is_empty()) {
            self.find_in_jitdump(key, file, rest, &mut found);
        }
        found
    }

    fn find_in_jitdump(
        &mut self,
        key: ProcessKey,
        file: &Arc<MappedFile>,
        addresses: Vec<u64>,
        found: &mut ProcessFunctions,
    ) {
        let mut texts = SharedTexts::default();
        let mut dump = self.jitdumps.pop(&key).unwrap_or_default();
        let (max_bytes, identity, wanted) =
            (self.map_bytes.for_one(), (file.dev, file.inode), addresses.clone());
        let read = access::read_file(file, move |open| {
            let read = dump.update(open, identity, &wanted, max_bytes);
            (dump, read)
        });
        let Ok(Ok((dump, read))) = read else { return };
        self.map_bytes.spend(read);
        if dump.is_behind() {
            self.stats.skip(Skipped::LargeMap, addresses.len());
        }
        for address in addresses {
            if let Some(function) = dump.find(address) {
                let name = texts.text(&function.name);
                let line = function.line;
                let functions = [Function {
                    raw: Arc::clone(&name),
                    name,
                    file: texts.text(&function.file),
                    line,
                    column: 0,
                    start_line: 0,
                }];
                found.insert(address, functions.into());
            }
        }
        self.jitdumps.put(key, dump);
    }

    fn find_in_perf_map(&mut self, key: ProcessKey, addresses: &[u64], found: &mut ProcessFunctions) {
        let mut texts = SharedTexts::default();
        let mut map = self.perf_maps.pop(&key).unwrap_or_default();
        let wanted = addresses.to_vec();
        let max_bytes = self.map_bytes.for_one();
        // The map lies in the root directory of the process, which may be on any file system.
        let read = access::node().compute(Target::Process(key.tgid), "its perf map", move || {
            let file = perf_map_files().open(key)?;
            let metadata = file.metadata()?;
            let read = map.update(&file, (metadata.dev(), metadata.ino()), &wanted, max_bytes);
            io::Result::Ok((map, read))
        });
        let Ok(Ok((map, read))) = read else { return };
        self.map_bytes.spend(read);
        for &address in addresses {
            match map.find(address) {
                Listed::Name(name) => {
                    found.insert(address, texts.plain(&name, ""));
                }
                Listed::Nowhere => {}
                Listed::NotYet => self.stats.skip(Skipped::LargeMap, 1),
            }
        }
        self.perf_maps.put(key, map);
    }

    /// Frees memory beyond the limits, and counts the rest. Call it after each set of profiles.
    pub(super) fn trim(&mut self) {
        self.kernel_is_fresh = false;
        let jitdumps: usize = self.jitdumps.iter().map(|(_, dump)| dump.bytes()).sum();
        let perf_maps = self.perf_maps.iter().map(|(_, map)| map.bytes()).sum::<usize>() + jitdumps;
        if perf_maps > MAX_CACHED_PERF_MAP_BYTES {
            self.perf_maps.clear();
            self.jitdumps.clear();
            self.wasteful = true;
        }
        if std::mem::take(&mut self.wasteful) {
            return_memory();
        }
        let cached = self.cache.weight() + (self.kallsyms.bytes() + perf_maps) as u64;
        self.stats.cached_bytes.store(cached, Ordering::Relaxed);
    }
}

/// Returns the file that a just-in-time compiler maps to say that it writes a jitdump: `jit-PID.dump`, in any directory.
fn jitdump_of(image: &Image) -> Option<&Arc<MappedFile>> {
    image.mappings.iter().find_map(|mapping| match &mapping.kind {
        MappingKind::File(file) if !file.is_elf() => {
            let name = file.path.rsplit('/').next()?;
            name.strip_prefix("jit-")?.strip_suffix(".dump").map(|_| file)
        }
        _ => None,
    })
}

/// Bytes that may be read: many at once, and few in the long run.
struct ByteBudget {
    max: u64,
    left: u64,
    at: Instant,
}

impl ByteBudget {
    /// Bytes that become free each second: reading and parsing them takes half a hundredth of a core.
    const PER_SECOND: u64 = 2 << 20;

    fn new(max: u64) -> Self {
        Self { max, left: max, at: Instant::now() }
    }

    /// Returns how many bytes one process may read now: it leaves as many to the others.
    fn for_one(&mut self) -> u64 {
        let earned = self.at.elapsed().as_millis() * u128::from(Self::PER_SECOND) / 1000;
        self.at = Instant::now();
        self.left = self.left.saturating_add(u64::try_from(earned).unwrap_or(u64::MAX)).min(self.max);
        self.left / 2
    }

    fn spend(&mut self, bytes: u64) {
        self.left = self.left.saturating_sub(bytes);
    }
}

fn function_of_line(texts: &mut SharedTexts, line: &DebugLine) -> Function {
    let DebugLine { name, file, line, column, start_line } = line;
    let (name, raw) = texts.name(name);
    Function { name, raw, file: texts.text(file), line: *line, column: *column, start_line: *start_line }
}

/// Returns freed memory to the system: the C library would hold it for later use.
fn return_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no pointers and may be called at any time from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
