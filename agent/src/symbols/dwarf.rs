//! Names, inlined functions and lines from DWARF, by blazesym, on a thread that can be given up.
//!
//! Debug information is a program for the reader: what it costs cannot be told beforehand, and a hostile file can make
//! it cost anything. So the work has a thread of its own; the caller waits for a bounded time, and a thread that does
//! not answer, or dies, is replaced, and the file that it worked on is not tried again. All that blazesym keeps in
//! memory goes with its thread.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    os::fd::AsRawFd,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError, SyncSender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use blazesym::symbolize::{
    self, CodeInfo, Input, Symbolized,
    source::{Elf, Source},
};

use super::{
    elf::{self, Section, Sections},
    fault,
    file::{FileId, MappedFile},
};

/// How long one batch of addresses of one file may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The walk over inlined functions recurses as deep as the file says. Only what is touched becomes memory.
const STACK_BYTES: usize = 256 << 20;
/// After this many threads were given up, debug information is left alone: a thread that does not end keeps its memory.
const MAX_GIVEN_UP: u32 = 3;
/// More debug information than this in one file is not read. Chromium has more; what else has lives without lines.
const MAX_DEBUG_BYTES: u64 = 1 << 30;
/// Compressed sections are inflated into memory.
const MAX_INFLATED_BYTES: u64 = 128 << 20;
const SHF_COMPRESSED: u64 = object::elf::SHF_COMPRESSED.0;

/// One function at an address, as the debug information has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DebugLine {
    pub(crate) name: String,
    pub(crate) file: String,
    pub(crate) line: u32,
    pub(crate) column: u32,
}

/// Functions at one address, innermost first; empty where the debug information says nothing.
pub(crate) type DebugFrame = Vec<DebugLine>;

/// Why the debug information of a file is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unusable {
    /// There is none.
    None,
    /// It is larger than is read, or refers to other files.
    Refused,
    /// Reading it took too long or ended the thread.
    Harmful,
}

#[derive(Debug)]
struct Request {
    file: Arc<MappedFile>,
    addresses: Vec<u64>,
    answer: SyncSender<Vec<DebugFrame>>,
}

#[derive(Debug)]
struct Worker {
    requests: SyncSender<Request>,
    id: rustix::thread::Pid,
    thread: JoinHandle<()>,
}

/// The reader of debug information.
#[derive(Debug, Default)]
pub(crate) struct Dwarf {
    worker: Option<Worker>,
    given_up: u32,
    /// The files that the present worker has read, with the bytes of their debug information.
    held: HashMap<FileId, u64>,
}

impl Dwarf {
    /// How many bytes of debug information a file has, if they can be used.
    pub(crate) fn examine(file: &File) -> Result<u64, Unusable> {
        let sections = Sections::read(file).map_err(|_| Unusable::None)?;
        if sections.find(".debug_info").is_none() {
            return Err(Unusable::None);
        }
        // A link to another file is a path that the file's maker chose, and it would be followed from here.
        if [".gnu_debuglink", ".gnu_debugaltlink", ".debug_sup"]
            .iter()
            .any(|name| sections.find(name).is_some())
        {
            return Err(Unusable::Refused);
        }
        let (mut bytes, mut inflated) = (0u64, 0u64);
        for (_, section) in sections.iter().filter(|(name, _)| name.starts_with(b".debug_")) {
            let size = if section.flags & SHF_COMPRESSED == 0 {
                section.size
            } else {
                let size = inflated_size(file, section)?;
                inflated = inflated.saturating_add(size);
                size
            };
            bytes = bytes.saturating_add(size);
        }
        if bytes > MAX_DEBUG_BYTES || inflated > MAX_INFLATED_BYTES {
            Err(Unusable::Refused)
        } else {
            Ok(bytes)
        }
    }

    /// What the debug information says of each address (virtual, as the ELF file counts).
    pub(crate) fn resolve(
        &mut self,
        file: &Arc<MappedFile>,
        debug_bytes: u64,
        addresses: &[u64],
    ) -> Result<Vec<DebugFrame>, Unusable> {
        if self.given_up >= MAX_GIVEN_UP {
            return Err(Unusable::Harmful);
        }
        if self.worker.is_none() {
            self.worker = spawn();
            self.held.clear();
        }
        let Some(worker) = &self.worker else { return Err(Unusable::Refused) };
        let id = worker.id;
        self.held.insert(file.id, debug_bytes);
        let (answer, answered) = mpsc::sync_channel(1);
        let request = Request { file: Arc::clone(file), addresses: addresses.to_vec(), answer };
        let reply = match worker.requests.send(request) {
            Ok(()) => answered.recv_timeout(PATIENCE),
            Err(_) => Err(RecvTimeoutError::Disconnected),
        };
        reply.map_err(|error| {
            tracing::warn!(
                path = file.path,
                "the debug information of this file cannot be used ({}); its functions are named by its symbol table",
                match error {
                    RecvTimeoutError::Timeout => "reading it takes too long",
                    RecvTimeoutError::Disconnected => "it is damaged",
                }
            );
            if error == RecvTimeoutError::Timeout {
                // It cannot be ended; from now on it gets only what nobody else wants.
                idle_only(id);
                self.given_up += 1;
            }
            self.worker = None;
            Unusable::Harmful
        })
    }

    /// Lets go of everything that was read, if it is more than `most_bytes`.
    pub(crate) fn trim(&mut self, most_bytes: u64) -> bool {
        if self.held.values().sum::<u64>() <= most_bytes {
            return false;
        }
        let Some(Worker { requests, thread, .. }) = self.worker.take() else { return false };
        // It waits for requests, so that it ends at once; what it holds is free only when it has.
        drop(requests);
        // A thread that panicked would have been missed at its last request.
        let _ = thread.join();
        true
    }

    pub(crate) fn given_up(&self) -> u32 {
        self.given_up
    }
}

/// How large a compressed section is when inflated. The header's word for it is not taken: the reader would take as much
/// memory as it claims, and more where there is more.
fn inflated_size(file: &File, section: Section) -> Result<u64, Unusable> {
    let packed = elf::read_section(file, section, MAX_INFLATED_BYTES, "debug section")
        .map_err(|_| Unusable::Refused)?;
    // Type, reserved, size when inflated, alignment.
    let (Some(kind), Some(size), Some(content)) = (packed.get(..4), packed.get(8..16), packed.get(24..))
    else {
        return Err(Unusable::Refused);
    };
    let claimed = u64::from_le_bytes(size.try_into().map_err(|_| Unusable::Refused)?);
    if kind != object::elf::ELFCOMPRESS_ZLIB.0.to_le_bytes() || claimed > MAX_INFLATED_BYTES {
        return Err(Unusable::Refused);
    }
    let mut content = flate2::bufread::ZlibDecoder::new(content).take(claimed + 1);
    match io::copy(&mut content, &mut io::sink()) {
        Ok(real) if real == claimed => Ok(real),
        _ => Err(Unusable::Refused),
    }
}

fn idle_only(thread: rustix::thread::Pid) {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameters live through the call, which changes only how the kernel schedules that thread.
    if unsafe {
        libc::sched_setscheduler(thread.as_raw_nonzero().get(), libc::SCHED_IDLE, &raw const parameters)
    } != 0
    {
        tracing::warn!(
            "a thread that reads debug information does not end, and its priority cannot be lowered"
        );
    }
}

fn spawn() -> Option<Worker> {
    let (requests, inbox) = mpsc::sync_channel::<Request>(1);
    let (started, id) = mpsc::sync_channel(1);
    let spawned =
        thread::Builder::new().name("gannet-dwarf".to_owned()).stack_size(STACK_BYTES).spawn(move || {
            if let Err(error) = fault::guard_this_thread() {
                tracing::warn!(%error, "debug information is not read: bus errors cannot be caught");
                return;
            }
            if started.send(rustix::thread::gettid()).is_err() {
                return;
            }
            let symbolizer = symbolize::Symbolizer::builder()
                .enable_demangling(false)
                .set_debug_dirs(Some(std::iter::empty::<&str>()))
                .build();
            // blazesym files what it has read under the path, which here is the number of a descriptor. The number must not
            // go to another file while it does, so each file is held for as long as the symbolizer.
            let mut held: Vec<Arc<MappedFile>> = Vec::new();
            while let Ok(Request { file, addresses, answer }) = inbox.recv() {
                let before = fault::faults();
                let frames = resolve(&symbolizer, &file, &addresses);
                if !held.iter().any(|held| held.id == file.id) {
                    held.push(file);
                }
                if fault::faults() != before {
                    // The file was cut while it was read: what came of it is worth nothing.
                    return;
                }
                // Nobody waits for it any more: this thread has been given up.
                if answer.send(frames).is_err() {
                    return;
                }
            }
        });
    let thread = spawned.map_err(|error| tracing::warn!(%error, "no thread for debug information")).ok()?;
    Some(Worker { requests, id: id.recv().ok()?, thread })
}

fn resolve(symbolizer: &symbolize::Symbolizer, file: &MappedFile, addresses: &[u64]) -> Vec<DebugFrame> {
    let Some(open) = &file.file else { return vec![Vec::new(); addresses.len()] };
    let source = Source::Elf(Elf::new(format!("/proc/self/fd/{}", open.as_raw_fd())));
    match symbolizer.symbolize(&source, Input::VirtOffset(addresses)) {
        Ok(found) => found.iter().map(frame).collect(),
        Err(error) => {
            tracing::debug!(path = file.path, %error, "no use can be made of this file's debug information");
            vec![Vec::new(); addresses.len()]
        }
    }
}

fn frame(found: &Symbolized<'_>) -> DebugFrame {
    let Symbolized::Sym(symbol) = found else { return Vec::new() };
    if symbol.name.is_empty() {
        return Vec::new();
    }
    symbol
        .inlined
        .iter()
        .rev()
        .map(|inlined| line(&inlined.name, inlined.code_info.as_ref()))
        .chain([line(&symbol.name, symbol.code_info.as_deref())])
        .collect()
}

fn line(name: &str, place: Option<&CodeInfo<'_>>) -> DebugLine {
    DebugLine {
        name: name.to_owned(),
        file: place.map(|place| place.to_path().to_string_lossy().into_owned()).unwrap_or_default(),
        line: place.and_then(|place| place.line).unwrap_or_default(),
        column: place.and_then(|place| place.column).map(u32::from).unwrap_or_default(),
    }
}
