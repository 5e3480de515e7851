//! From addresses to a finished profile, on one thread with one bounded queue.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    io::{self, Write},
    num::NonZeroUsize,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, UNIX_EPOCH},
};

use gannet_elf::{BuildIds, ContentId, Elf, ElfLimits};
use gannet_proto::{
    pprof::{Builder, Header, Label, LabelValue, Line, LocationId, Mapping, MappingId},
    profiles::Profile,
};
use lru::LruCache;
use quick_cache::{Weighter, unsync};
use tokio::sync::{mpsc, oneshot};

use super::{
    debug_file, demangle,
    dwarf::{self, DebugFrame, Unusable},
    kallsyms::Kallsyms,
    perf_map::PerfMap,
    symbol_finder,
};
use crate::{
    model::{FileId, Image, MappedFile, MappingKind, ProcessKey, SampleKind, StackEnd},
    profile::{RawProcess, RawProfile, RawStack},
};

/// What the mapping of kernel frames is called.
pub const KERNEL_MAPPING: &str = "[kernel.kallsyms]";
/// What the mapping of the vDSO is called.
pub const VDSO_MAPPING: &str = "[vdso]";
/// What the mappings of code without a file are called.
pub const ANONYMOUS_MAPPING: &str = "[anon]";
/// The frame at the root of a stack that has more frames than are kept.
pub const TRUNCATED_FRAME: &str = "[truncated]";
/// The frame at the root of a stack whose walk could not go on.
pub const BROKEN_FRAME: &str = "[broken stack]";
/// The frame in place of the stack of a 32-bit program.
pub const NOT_WALKED_FRAME: &str = "[32-bit program]";

/// Kernel addresses have the highest bit set on every machine that Gannet runs on, and user addresses do not.
const FIRST_KERNEL_ADDRESS: u64 = 1 << 63;
const MAX_FILE_STATES: NonZeroUsize = NonZeroUsize::new(8192).unwrap();
const MAX_PERF_MAPS: NonZeroUsize = NonZeroUsize::new(64).unwrap();
/// Perf maps larger than this, all together, are let go after each profile.
const MAX_KEPT_PERF_MAP_BYTES: usize = 8 << 20;
const MAX_NOTE_BYTES: u64 = 64 << 10;
const MAX_VDSO_BYTES: u64 = 1 << 20;

/// Bounds of the symbolizer.
#[derive(Clone, Debug)]
pub struct SymbolizerConfig {
    /// Windows whose profiles wait.
    pub queue: usize,
    /// Memory for the names of addresses that were looked up.
    pub cache_bytes: u64,
    /// The program that reads debug information, which gives inlined functions and lines: the agent itself, by
    /// [`DEBUG_INFO_VERB`](super::DEBUG_INFO_VERB). None reads none.
    pub debug_reader: Option<PathBuf>,
    /// Where distributions put debug information that they ship apart.
    pub debug_dirs: Vec<PathBuf>,
    /// What debug information may cost. What costs more is named by symbol tables.
    pub debug_cost: DebugCost,
}

/// What debug information may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugCost {
    /// Files that have more of it, unpacked, are named by their symbol table.
    pub file_bytes: u64,
    /// Time that may be spent at once on all files together; a hundredth of all time in the long run.
    pub time: Duration,
}

impl DebugCost {
    /// For programs that somebody asked for.
    pub const WANTED: Self = Self { file_bytes: 2 << 30, time: Duration::from_secs(8) };
    /// For whatever runs on the machine.
    pub const EVERYTHING: Self = Self { file_bytes: 4 << 20, time: Duration::from_millis(60) };
}

impl Default for SymbolizerConfig {
    fn default() -> Self {
        Self {
            queue: 8,
            cache_bytes: 6 << 20,
            debug_reader: Some(PathBuf::from("/proc/self/exe")),
            debug_dirs: vec![PathBuf::from("/usr/lib/debug")],
            debug_cost: DebugCost::WANTED,
        }
    }
}

/// Why a profile was not symbolized.
#[derive(Debug, thiserror::Error)]
pub enum SymbolizerError {
    /// The queue is full; the profiles are given back, so that their samples can be counted.
    #[error("the symbolizer is behind: {0} windows wait for it already")]
    Full(usize, Vec<RawProfile>),
    /// The thread has ended.
    #[error("the symbolizer has stopped")]
    Stopped,
}

/// What the symbolizer has done.
#[derive(Debug, Default)]
pub struct SymbolizerStats {
    /// Profiles finished.
    pub profiles: AtomicU64,
    /// Different addresses, by profile, that got a name.
    pub named: AtomicU64,
    /// Different addresses, by profile, that got none.
    pub unnamed: AtomicU64,
    /// Files whose symbol table could not be used.
    pub unusable_tables: AtomicU64,
    /// Files whose debug information is there and could not be used.
    pub unusable_debug_info: AtomicU64,
    /// Memory of names, kernel symbols and perf maps that are kept.
    pub cached_bytes: AtomicU64,
}

/// A handle to the symbolizer's thread, which ends when the last handle is dropped.
#[derive(Clone, Debug)]
pub struct Symbolizer {
    jobs: mpsc::Sender<Job>,
    stats: Arc<SymbolizerStats>,
}

type Job = (Vec<RawProfile>, oneshot::Sender<Vec<Profile>>);

impl Symbolizer {
    /// Starts the thread.
    pub fn start(config: SymbolizerConfig) -> io::Result<Self> {
        let (jobs, mut inbox) = mpsc::channel::<Job>(config.queue.max(1));
        let stats = Arc::new(SymbolizerStats::default());
        let mut names = Names::new(config, Arc::clone(&stats));
        thread::Builder::new().name("gannet-symbols".to_owned()).spawn(move || {
            while let Some((raw, answer)) = inbox.blocking_recv() {
                // Who asked may have gone; the profile goes with them.
                let _ = answer.send(names.profiles(&raw));
            }
        })?;
        Ok(Self { jobs, stats })
    }

    /// Symbolizes profiles, waiting for a place in the queue. Each file is asked once for all of them.
    pub async fn symbolize_all(&self, raw: Vec<RawProfile>) -> Result<Vec<Profile>, SymbolizerError> {
        let (answer, answered) = oneshot::channel();
        self.jobs.send((raw, answer)).await.map_err(|_| SymbolizerError::Stopped)?;
        answered.await.map_err(|_| SymbolizerError::Stopped)
    }

    /// Symbolizes a profile, waiting for a place in the queue.
    pub async fn symbolize(&self, raw: RawProfile) -> Result<Profile, SymbolizerError> {
        self.symbolize_all(vec![raw]).await?.pop().ok_or(SymbolizerError::Stopped)
    }

    /// Symbolizes profiles if there is a place in the queue now.
    pub fn try_symbolize(
        &self,
        raw: Vec<RawProfile>,
    ) -> Result<oneshot::Receiver<Vec<Profile>>, SymbolizerError> {
        let (answer, answered) = oneshot::channel();
        match self.jobs.try_send((raw, answer)) {
            Ok(()) => Ok(answered),
            Err(mpsc::error::TrySendError::Full((raw, _))) => {
                Err(SymbolizerError::Full(self.jobs.max_capacity(), raw))
            }
            Err(mpsc::error::TrySendError::Closed(_)) => Err(SymbolizerError::Stopped),
        }
    }

    /// What has been done so far.
    pub fn stats(&self) -> &SymbolizerStats {
        &self.stats
    }
}

/// One function of one address; the first of an address is the innermost.
#[derive(Clone, Debug)]
struct Function {
    name: Arc<str>,
    /// As the compiler calls it.
    raw: Arc<str>,
    file: Arc<str>,
    line: u32,
    column: u32,
}

type Functions = Arc<[Function]>;

/// Functions by file and address as the file counts.
type Known = HashMap<(FileId, u64), Functions>;

/// What names are kept under: containers bring files of their own with the same contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Contents {
    Same(ContentId),
    /// What it holds cannot be told.
    OfFile(FileId),
}

/// Functions by address at run time.
type Found = HashMap<u64, Functions>;

/// Where an address is.
enum Place<'a> {
    Kernel,
    /// In an ELF file, at this address as the file counts.
    File(&'a Arc<MappedFile>, u64),
    /// In code that was made at run time.
    Jitted,
    Nowhere,
}

#[derive(Clone)]
struct ByBytes;

impl Weighter<(Contents, u64), Functions> for ByBytes {
    fn weight(&self, _: &(Contents, u64), functions: &Functions) -> u64 {
        let text = |function: &Function| function.name.len() + function.raw.len() + function.file.len();
        // 96 bytes for the entry in the cache. Names that addresses share are counted for each.
        96 + functions.iter().map(|function| (size_of::<Function>() + text(function)) as u64).sum::<u64>()
    }
}

/// What is known of one file.
#[derive(Debug, Default)]
struct FileState {
    contents: Option<Contents>,
    /// Its symbol table could not be read, and is not tried again.
    unusable_table: bool,
    debug: Option<Debug>,
}

/// Where the debug information of a file is, and what is known of it.
#[derive(Clone, Debug)]
struct Debug {
    /// The file that is installed for it; none if it has its own. It is not itself held here, so that it can be closed.
    apart: Option<Arc<MappedFile>>,
    /// Its bytes when it is unpacked.
    state: Result<u64, Unusable>,
    spent: Spending,
}

/// What debug information gave.
#[derive(Debug)]
enum DebugInfo {
    Read(Vec<DebugFrame>),
    /// It has cost too much lately; what is found without it is not final.
    Later,
    Absent,
}

impl DebugInfo {
    fn frame(&self, index: usize) -> Option<&DebugFrame> {
        match self {
            Self::Read(frames) => frames.get(index).filter(|frame| !frame.is_empty()),
            Self::Later | Self::Absent => None,
        }
    }
}

/// Time spent on something, forgotten at one hundredth of the speed at which time goes by: so that it can take much at
/// once, as in the first minute, and little in the long run.
#[derive(Clone, Copy, Debug)]
struct Spending {
    spent: Duration,
    at: Instant,
}

impl Spending {
    /// For one file.
    const MOST: Duration = Duration::from_secs(2);
    const FORGOTTEN: u32 = 100;

    fn new(now: Instant) -> Self {
        Self { spent: Duration::ZERO, at: now }
    }

    fn left(&self, now: Instant) -> Duration {
        self.spent.saturating_sub(now.saturating_duration_since(self.at) / Self::FORGOTTEN)
    }

    fn is_too_much(&self, now: Instant) -> bool {
        self.is_over(Self::MOST, now)
    }

    fn is_over(&self, most: Duration, now: Instant) -> bool {
        self.left(now) > most
    }

    fn add(&mut self, spent: Duration, now: Instant) {
        *self = Self { spent: self.left(now) + spent, at: now };
    }
}

struct Names {
    config: SymbolizerConfig,
    stats: Arc<SymbolizerStats>,
    cache: unsync::Cache<(Contents, u64), Functions, ByBytes>,
    files: LruCache<FileId, FileState>,
    perf_maps: LruCache<ProcessKey, PerfMap>,
    kallsyms: Kallsyms,
    kernel_build_id: String,
    vdso: Option<Arc<MappedFile>>,
    nothing: Functions,
    /// Much memory was taken and freed since it was last given back.
    wasteful: bool,
    /// On files whose debug information the reader did not survive, all together: whoever makes one can make many.
    harm: Spending,
    /// On debug information, all files together.
    spent: Spending,
}

impl Names {
    fn new(config: SymbolizerConfig, stats: Arc<SymbolizerStats>) -> Self {
        Self {
            cache: unsync::Cache::with_weighter(
                (config.cache_bytes / 256) as usize,
                config.cache_bytes,
                ByBytes,
            ),
            files: LruCache::new(MAX_FILE_STATES),
            perf_maps: LruCache::new(MAX_PERF_MAPS),
            kallsyms: Kallsyms::default(),
            kernel_build_id: kernel_build_id(),
            vdso: vdso().map_err(|error| tracing::debug!(%error, "the vDSO cannot be read")).ok(),
            nothing: Arc::new([]),
            wasteful: false,
            harm: Spending::new(Instant::now()),
            spent: Spending::new(Instant::now()),
            config,
            stats,
        }
    }

    fn profiles(&mut self, raws: &[RawProfile]) -> Vec<Profile> {
        let addresses: Vec<Vec<BTreeSet<u64>>> = raws
            .iter()
            .map(|raw| {
                raw.processes.iter().map(|process| process.stacks.iter().flat_map(frames).collect()).collect()
            })
            .collect();
        let known = self.resolve_files(raws, &addresses);
        let named =
            raws.iter().zip(addresses).map(|(raw, addresses)| self.profile(raw, addresses, &known)).collect();
        self.trim();
        named
    }

    fn profile(&mut self, raw: &RawProfile, addresses: Vec<BTreeSet<u64>>, known: &Known) -> Profile {
        let (sample_types, period_type) = match raw.kind {
            SampleKind::OnCpu => ([("samples", "count"), ("cpu", "nanoseconds")], ("cpu", "nanoseconds")),
            SampleKind::OffCpu => {
                ([("events", "count"), ("offcpu", "nanoseconds")], ("offcpu", "nanoseconds"))
            }
        };
        let mut builder = Builder::new(Header {
            sample_types: &sample_types,
            period_type,
            period: raw.period_ns as i64,
            time_nanos: raw.start.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i64),
            duration_nanos: raw.duration.as_nanos() as i64,
        });
        for (index, (process, addresses)) in raw.processes.iter().zip(addresses).enumerate() {
            self.add_process(&mut builder, process, addresses, known, index == 0);
        }
        for comment in &raw.comments {
            builder.comment(comment);
        }
        self.stats.profiles.fetch_add(1, Ordering::Relaxed);
        builder.finish()
    }

    fn add_process(
        &mut self,
        builder: &mut Builder,
        process: &RawProcess,
        addresses: BTreeSet<u64>,
        known: &Known,
        is_first: bool,
    ) {
        // The main binary is mapped below everything that it loads.
        let is_file = |mapping: &&crate::model::Mapping| matches!(mapping.kind, MappingKind::File(_));
        if let Some(main) = process.image.mappings.iter().find(is_file) {
            let id = self.add_mapping(builder, main);
            if is_first {
                builder.main_mapping(id);
            }
        }
        let vdso = self.vdso.clone();
        let places: Vec<(u64, Place<'_>)> = addresses
            .into_iter()
            .map(|address| (address, place(&process.image, vdso.as_ref(), address)))
            .collect();
        let (kernel, jitted) = self.resolve_others(process.key, &places);
        let mut locations = HashMap::with_capacity(places.len());
        for (address, place) in &places {
            let functions = match place {
                Place::Kernel => kernel.get(address),
                Place::File(file, elf_address) => known.get(&(file.id, *elf_address)),
                Place::Jitted => jitted.get(address),
                Place::Nowhere => None,
            };
            let functions = functions.map_or(&*self.nothing, |functions| functions);
            locations.insert(*address, self.add_location(builder, &process.image, *address, functions));
        }
        for stack in &process.stacks {
            let mut ids: Vec<LocationId> =
                frames(stack).filter_map(|address| locations.get(&address).copied()).collect();
            let mark = match stack.end {
                StackEnd::Truncated => Some(TRUNCATED_FRAME),
                StackEnd::Broken => Some(BROKEN_FRAME),
                StackEnd::NotUnwound => Some(NOT_WALKED_FRAME),
                StackEnd::Complete | StackEnd::None => None,
            };
            if let Some(name) = mark {
                ids.push(builder.location(None, 0, &[Line { name, system_name: name, ..Line::default() }]));
            }
            let text = |key, value| Label { key, value: LabelValue::Str(value) };
            let number = |key, value: u32| Label { key, value: LabelValue::Num(i64::from(value), "") };
            let mut labels = vec![number("pid", process.key.tgid), number("tid", stack.tid)];
            labels.extend(
                [
                    text("thread", stack.thread.as_str()),
                    text("comm", &process.comm),
                    text("container_id", &process.container_id),
                    text("pod_uid", &process.pod_uid),
                    text("state", sleep_state(stack.state)),
                ]
                .into_iter()
                .filter(|label| !matches!(label.value, LabelValue::Str(""))),
            );
            builder.sample(&ids, &[stack.count as i64, stack.value_ns as i64], &labels);
        }
    }

    fn add_location(
        &self,
        builder: &mut Builder,
        image: &Image,
        address: u64,
        functions: &[Function],
    ) -> LocationId {
        let mapping = if address >= FIRST_KERNEL_ADDRESS {
            Some(builder.mapping(Mapping {
                start: FIRST_KERNEL_ADDRESS,
                limit: u64::MAX,
                offset: 0,
                file: KERNEL_MAPPING,
                build_id: &self.kernel_build_id,
            }))
        } else {
            image.find(address).map(|mapping| self.add_mapping(builder, mapping))
        };
        let lines: Vec<Line<'_>> = functions
            .iter()
            .map(|function| Line {
                name: &function.name,
                system_name: &function.raw,
                file: &function.file,
                line: i64::from(function.line),
                column: i64::from(function.column),
                start_line: 0,
            })
            .collect();
        let counter = if lines.is_empty() { &self.stats.unnamed } else { &self.stats.named };
        counter.fetch_add(1, Ordering::Relaxed);
        builder.location(mapping, address, &lines)
    }

    fn add_mapping(&self, builder: &mut Builder, mapping: &crate::model::Mapping) -> MappingId {
        let (file, build_id) = match &mapping.kind {
            MappingKind::File(file) => (file.path.as_str(), file.build_id.as_str()),
            MappingKind::Vdso => (VDSO_MAPPING, self.vdso.as_ref().map_or("", |vdso| vdso.build_id.as_str())),
            MappingKind::Anon => (ANONYMOUS_MAPPING, ""),
        };
        builder.mapping(Mapping {
            start: mapping.start,
            limit: mapping.end,
            offset: mapping.offset,
            file,
            build_id,
        })
    }

    /// The functions in files, for all processes together: each file is asked once.
    fn resolve_files(&mut self, raws: &[RawProfile], addresses: &[Vec<BTreeSet<u64>>]) -> Known {
        let mut by_file: BTreeMap<FileId, (Arc<MappedFile>, BTreeSet<u64>)> = BTreeMap::new();
        let processes = raws.iter().flat_map(|raw| &raw.processes);
        for (process, addresses) in processes.zip(addresses.iter().flatten()) {
            for &address in addresses {
                if let Place::File(file, elf_address) = place(&process.image, self.vdso.as_ref(), address) {
                    let wanted =
                        by_file.entry(file.id).or_insert_with(|| (Arc::clone(file), BTreeSet::new()));
                    wanted.1.insert(elf_address);
                }
            }
        }
        let mut known = Known::new();
        for (file, addresses) in by_file.into_values() {
            self.resolve_file(&file, &addresses, &mut known);
        }
        known
    }

    fn resolve_file(&mut self, file: &Arc<MappedFile>, addresses: &BTreeSet<u64>, known: &mut Known) {
        let Some(open) = &file.file else { return };
        let contents = self.contents(file, open);
        let mut missing = Vec::new();
        for &address in addresses {
            match self.cache.get(&(contents, address)) {
                Some(functions) => {
                    known.insert((file.id, address), Arc::clone(functions));
                }
                None => missing.push(address),
            }
        }
        if missing.is_empty() {
            return;
        }
        let debug = self.debug_frames(file, open, &missing);
        let has_no_frame = |(index, _): &(usize, &u64)| debug.frame(*index).is_none();
        let rest: Vec<u64> =
            missing.iter().enumerate().filter(has_no_frame).map(|(_, address)| *address).collect();
        let mut symbols = self.symbols(file, open, &rest).into_iter();
        let mut texts = Texts::default();
        for (index, address) in missing.into_iter().enumerate() {
            let functions: Functions = match debug.frame(index) {
                Some(frame) => frame
                    .iter()
                    .map(|line| {
                        let (name, raw) = texts.name(&line.name);
                        Function {
                            name,
                            raw,
                            file: texts.text(&line.file),
                            line: line.line,
                            column: line.column,
                        }
                    })
                    .collect(),
                None => match symbols.next().flatten() {
                    Some(raw) => {
                        let (name, raw) = texts.name(&String::from_utf8_lossy(&raw));
                        [Function { name, raw, file: texts.text(""), line: 0, column: 0 }].into()
                    }
                    None => Arc::clone(&self.nothing),
                },
            };
            // That there is no name is worth knowing too: otherwise it is looked for again in every window.
            if !matches!(debug, DebugInfo::Later) {
                self.cache.insert((contents, address), Arc::clone(&functions));
            }
            known.insert((file.id, address), functions);
        }
    }

    /// What the file's names are kept under; looked at once for each file.
    fn contents(&mut self, file: &MappedFile, open: &File) -> Contents {
        let state = self.files.get_or_insert_mut(file.id, FileState::default);
        *state.contents.get_or_insert_with(|| {
            let elf = Elf::parse(open, &ElfLimits::default()).ok();
            elf.and_then(|elf| ContentId::of(&elf)).map_or(Contents::OfFile(file.id), Contents::Same)
        })
    }

    /// What the file's debug information has on each address, if it has any and may be read now.
    fn debug_frames(&mut self, file: &Arc<MappedFile>, open: &File, addresses: &[u64]) -> DebugInfo {
        let config = &self.config;
        let state = self.files.get_or_insert_mut(file.id, FileState::default);
        let is_new = state.debug.is_none();
        let begin = Instant::now();
        let spent = Spending::new(begin);
        let debug = state.debug.get_or_insert_with(|| {
            let own = Debug { apart: None, state: dwarf::examine(open), spent };
            if own.state != Err(Unusable::None) {
                return own;
            }
            let Some(apart) = debug_file::find(file, open, &config.debug_dirs) else { return own };
            let state = apart.file.as_ref().map_or(Err(Unusable::None), dwarf::examine);
            Debug { apart: Some(Arc::new(apart)), state, spent }
        });
        let Some(reader) = &config.debug_reader else { return DebugInfo::Absent };
        if is_new && debug.state == Err(Unusable::Refused) {
            tracing::info!(
                path = file.path,
                "the debug information of this file is too large or refers to other files"
            );
            self.stats.unusable_debug_info.fetch_add(1, Ordering::Relaxed);
        }
        if debug.state.is_ok_and(|bytes| bytes > config.debug_cost.file_bytes) || debug.state.is_err() {
            return DebugInfo::Absent;
        }
        if debug.spent.is_too_much(begin)
            || self.harm.is_too_much(begin)
            || self.spent.is_over(config.debug_cost.time, begin)
        {
            return DebugInfo::Later;
        }
        let source = debug.apart.as_ref().and_then(|apart| apart.file.as_ref()).unwrap_or(open);
        let result = dwarf::resolve(reader, source, addresses);
        debug.spent.add(begin.elapsed(), Instant::now());
        self.spent.add(begin.elapsed(), Instant::now());
        match result {
            Ok(frames) => {
                self.wasteful = true;
                DebugInfo::Read(frames)
            }
            Err(error) => {
                tracing::warn!(
                    path = file.path,
                    %error,
                    "the debug information of this file cannot be used; its functions are named by its symbol table"
                );
                self.harm.add(begin.elapsed(), Instant::now());
                debug.state = Err(Unusable::Harmful);
                self.stats.unusable_debug_info.fetch_add(1, Ordering::Relaxed);
                DebugInfo::Absent
            }
        }
    }

    /// What the file's symbol table has at each address.
    fn symbols(&mut self, file: &MappedFile, open: &File, addresses: &[u64]) -> Vec<Option<Vec<u8>>> {
        let state = self.files.get_or_insert_mut(file.id, FileState::default);
        if addresses.is_empty() || state.unusable_table {
            return Vec::new();
        }
        let apart = state.debug.as_ref().and_then(|debug| debug.apart.as_ref()?.file.as_ref());
        symbol_finder::find(open, apart, addresses).unwrap_or_else(|error| {
            tracing::info!(path = file.path, %error, "the functions of this file have no names");
            state.unusable_table = true;
            self.stats.unusable_tables.fetch_add(1, Ordering::Relaxed);
            Vec::new()
        })
    }

    /// The functions of the kernel, and those made at run time.
    fn resolve_others(&mut self, key: ProcessKey, places: &[(u64, Place<'_>)]) -> (Found, Found) {
        let of = |wanted: fn(&Place<'_>) -> bool| {
            places.iter().filter(move |(_, place)| wanted(place)).map(|(address, _)| *address)
        };
        let (mut kernel, mut jitted) = (Found::new(), Found::new());
        let mut texts = Texts::default();
        let mut one = |name: &str, file: &str| -> Functions {
            let name = texts.text(name);
            [Function { raw: Arc::clone(&name), name, file: texts.text(file), line: 0, column: 0 }].into()
        };
        for address in of(|place| matches!(place, Place::Kernel)) {
            self.wasteful |= self.kallsyms.refresh();
            if let Some(symbol) = self.kallsyms.find(address) {
                let file =
                    if symbol.module.is_empty() { String::new() } else { format!("[{}]", symbol.module) };
                kernel.insert(address, one(symbol.name, &file));
            }
        }
        if of(|place| matches!(place, Place::Jitted)).next().is_some()
            && let Some(map) = PerfMap::read(key, self.perf_maps.pop(&key))
        {
            for address in of(|place| matches!(place, Place::Jitted)) {
                if let Some(name) = map.find(address) {
                    jitted.insert(address, one(&name, ""));
                }
            }
            self.perf_maps.put(key, map);
        }
        (kernel, jitted)
    }

    fn trim(&mut self) {
        let maps: usize = self.perf_maps.iter().map(|(_, map)| map.bytes()).sum();
        if maps > MAX_KEPT_PERF_MAP_BYTES {
            self.perf_maps.clear();
            self.wasteful = true;
        }
        if std::mem::take(&mut self.wasteful) {
            give_memory_back();
        }
        let cached = self.cache.weight() + (self.kallsyms.bytes() + maps) as u64;
        self.stats.cached_bytes.store(cached, Ordering::Relaxed);
    }
}

/// Texts that many addresses share, each kept once.
#[derive(Default)]
struct Texts {
    names: HashMap<String, (Arc<str>, Arc<str>)>,
    texts: HashMap<String, Arc<str>>,
}

impl Texts {
    /// The readable name and the compiler's.
    fn name(&mut self, raw: &str) -> (Arc<str>, Arc<str>) {
        if let Some((name, raw)) = self.names.get(raw) {
            return (Arc::clone(name), Arc::clone(raw));
        }
        let readable = demangle::demangle(raw);
        let known: Arc<str> = demangle::cut(raw).into();
        let name = if *readable == *known { Arc::clone(&known) } else { readable.into() };
        self.names.insert(raw.to_owned(), (Arc::clone(&name), Arc::clone(&known)));
        (name, known)
    }

    fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        let known: Arc<str> = demangle::cut(text).into();
        self.texts.insert(text.to_owned(), Arc::clone(&known));
        known
    }
}

fn place<'a>(image: &'a Image, vdso: Option<&'a Arc<MappedFile>>, address: u64) -> Place<'a> {
    if address >= FIRST_KERNEL_ADDRESS {
        return Place::Kernel;
    }
    let Some(mapping) = image.find(address) else { return Place::Nowhere };
    let file = match &mapping.kind {
        MappingKind::File(file) => Some(file),
        MappingKind::Vdso => vdso,
        MappingKind::Anon => return Place::Jitted,
    };
    let Some(file) = file else { return Place::Nowhere };
    match file.address_of(address - mapping.start + mapping.offset) {
        Some(elf_address) => Place::File(file, elf_address),
        // Some compilers at run time map their code twice, through a file that is none.
        None if !file.is_elf() => Place::Jitted,
        None => Place::Nowhere,
    }
}

/// The addresses to look up, leaf first: of callers the byte before the return address, which belongs to the call. A
/// return address itself is the next function's where the call is the last thing that a function does.
/// How a thread slept: the low bits of the kernel's task state. Of a thread that did not sleep nothing.
fn sleep_state(state: u8) -> &'static str {
    match state {
        0 => "",
        state if state & 1 != 0 => "interruptible",
        state if state & 2 != 0 => "uninterruptible",
        state if state & 0x0c != 0 => "stopped",
        _ => "other",
    }
}

fn frames(stack: &RawStack) -> impl Iterator<Item = u64> {
    let of = |addresses: &'_ [u64]| {
        addresses
            .iter()
            .enumerate()
            .map(|(depth, address)| if depth == 0 { *address } else { address.saturating_sub(1) })
            .collect::<Vec<_>>()
    };
    of(&stack.kernel).into_iter().chain(of(&stack.user))
}

fn kernel_build_id() -> String {
    let notes = File::open("/sys/kernel/notes").and_then(|file| {
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, MAX_NOTE_BYTES), &mut bytes)?;
        Ok(bytes)
    });
    notes.map(|notes| BuildIds::of_notes(&notes).text()).unwrap_or_default()
}

/// The vDSO is the same in every process, so this one's serves for all; in memory that has a descriptor it is a file
/// like any other.
fn vdso() -> io::Result<Arc<MappedFile>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let range = maps.lines().find(|line| line.ends_with(VDSO_MAPPING)).and_then(|line| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    });
    let (start, end) = range.ok_or(io::ErrorKind::NotFound)?;
    let mut image = vec![0; end.saturating_sub(start).min(MAX_VDSO_BYTES) as usize];
    File::open("/proc/self/mem")?.read_exact_at(&mut image, start)?;
    let mut file = File::from(rustix::fs::memfd_create("gannet-vdso", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all(&image)?;
    Ok(Arc::new(MappedFile::opened(VDSO_MAPPING, 0, 0, file)))
}

/// The C library keeps what is freed for later use; after something large it would keep it for nothing.
fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no pointers and may be called at any time from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn much_at_once_is_paid_for_in_the_long_run() {
        let begin = Instant::now();
        let mut spending = Spending::new(begin);
        spending.add(Duration::from_secs(2), begin);
        assert!(!spending.is_too_much(begin));
        spending.add(Duration::from_secs(1), begin);
        assert!(spending.is_too_much(begin + Duration::from_secs(99)));
        assert!(!spending.is_too_much(begin + Duration::from_secs(100)));
        // What was not spent is not saved up.
        let later = begin + Duration::from_secs(1 << 20);
        spending.add(Duration::from_secs(3), later);
        assert!(spending.is_too_much(later));
    }
}
