//! The spans in which threads work (OTEP 4947): each thread has a variable that leads to the record of its span. The BPF programs
//! copy the record at the tick; here is where the variable is.
//!
//! A library finds its own thread-local variables by words that the loader has filled in. The same words say where they are in
//! each thread: at a distance from the thread pointer, or in the block of a module, which the thread's table of modules leads to. A
//! program's own variables are at a distance that its linker knew.

use std::{collections::HashMap, fs, os::linux::fs::MetadataExt as _, sync::Arc};

use gannet_elf::{Elf, Segments, ThreadLocal, ThreadLocalAccess};
use gannet_unwind::limits::TableLimits;
use parking_lot::Mutex;

use super::maps::{MappedCode, Maps};
use crate::{
    model::{MapsFile, ThreadContext, open_mapped},
    runtimes::Memory,
};

/// The thread-local variable: the address of the thread's record, or 0.
const VARIABLE: &str = "otel_thread_ctx_v1";
/// Files whose search is remembered. Beyond, all are searched again.
const MAX_FILES: usize = 4096;
/// Offset of the table of modules from the thread pointer.
const MODULES_AT: i64 = 8;
/// Bytes of an entry of that table, in glibc and in musl.
const ENTRY_BYTES: u64 = 16;
const MUSL_ENTRY_BYTES: u64 = 8;
/// The largest plausible number of a module, and distance from the thread pointer.
const MAX_MODULE: u64 = 1 << 16;
const MAX_DISTANCE: u64 = 1 << 30;

/// Why the spans of a process are not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ThreadFault {
    /// No file has the variable.
    #[error("none of its files has the thread-local variable {VARIABLE}")]
    NoVariable,
    /// The file shows no way to it.
    #[error("its file shows no supported way to the thread-local variable {VARIABLE}")]
    Access,
    /// The loader has not filled in the way, or it makes no sense.
    #[error("the way to the thread-local variable {VARIABLE} holds something else")]
    Implausible,
}

/// The searched files.
type Files = HashMap<MapsFile, Option<Arc<Found>>>;

/// Finds the variable in the files of processes. It searches a file that several of them map once.
#[derive(Debug, Default)]
pub(super) struct ThreadFinder {
    files: Mutex<Files>,
}

/// The variable in a file, and where the file's parts belong.
#[derive(Debug)]
struct Found {
    variable: ThreadLocal,
    segments: Segments,
}

impl ThreadFinder {
    /// Finds the variable of a process. The calls may wait for the process and for its file systems without end.
    pub(super) fn find(
        &self,
        tgid: u32,
        maps: &Maps,
        memory: &dyn Memory,
    ) -> Result<ThreadContext, ThreadFault> {
        let page = rustix::param::page_size() as u64;
        let is_musl = maps.files.iter().any(|file| is_musl(&file.path));
        for file in &maps.files {
            let Some(found) = self.search(tgid, file) else { continue };
            let bias = found.segments.bias(file.start, file.offset, page).ok_or(ThreadFault::Access)?;
            let is_program = found.variable.has_interpreter || is_executable(tgid, file);
            return way(&found.variable, bias, is_program, is_musl, memory);
        }
        Err(ThreadFault::NoVariable)
    }

    fn search(&self, tgid: u32, file: &MappedCode) -> Option<Arc<Found>> {
        if let Some(known) = self.files.lock().get(&file.id) {
            return known.clone();
        }
        let open = open_mapped(tgid, file.start, file.end).ok()?;
        let found = Elf::parse(&open, &TableLimits::default().elf()).ok().and_then(|elf| {
            let variable = elf.thread_local(VARIABLE)?;
            Some(Arc::new(Found { variable, segments: elf.segments().clone() }))
        });
        let mut files = self.files.lock();
        if files.len() >= MAX_FILES {
            files.clear();
        }
        files.insert(file.id.clone(), found.clone());
        found
    }
}

/// Reports whether a file is musl's C library.
fn is_musl(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    // Debian has it beside glibc: /usr/lib/x86_64-linux-musl/libc.so.
    name.starts_with("ld-musl-") || name.starts_with("libc.musl-") || path.ends_with("-musl/libc.so")
}

/// Reports whether a file is the program that the process runs. Some file systems show other device numbers here than in maps.
fn is_executable(tgid: u32, file: &MappedCode) -> bool {
    let program = fs::metadata(format!("/proc/{tgid}/exe"));
    program.is_ok_and(|program| program.st_ino().to_string() == file.id.1)
}

/// Returns the way to a variable.
fn way(
    variable: &ThreadLocal,
    bias: u64,
    is_program: bool,
    is_musl: bool,
    memory: &dyn Memory,
) -> Result<ThreadContext, ThreadFault> {
    let in_module = |module: u64, offset: u64| {
        let entry_bytes = if is_musl { MUSL_ENTRY_BYTES } else { ENTRY_BYTES };
        if !(1..=MAX_MODULE).contains(&module) {
            return Err(ThreadFault::Implausible);
        }
        let step = |number: u64| i32::try_from(number).map_err(|_| ThreadFault::Implausible);
        let steps = Some([step(module * entry_bytes)?, step(offset)?]);
        Ok(ThreadContext { thread_offset: MODULES_AT, steps })
    };
    let at_distance = |distance: u64| {
        // On x86_64 all variables lie below the thread pointer.
        let thread_offset = distance.cast_signed();
        let is_plausible = thread_offset < 0 && thread_offset.unsigned_abs() <= MAX_DISTANCE;
        is_plausible.then_some(ThreadContext { thread_offset, steps: None }).ok_or(ThreadFault::Implausible)
    };
    if is_program {
        let align = variable.block_align;
        let block = variable.block_bytes.checked_next_multiple_of(align).ok_or(ThreadFault::Implausible)?;
        return at_distance(variable.offset.wrapping_sub(block));
    }
    let word = |at: u64| memory.u64(at).map_err(|_| ThreadFault::Implausible);
    match variable.access.ok_or(ThreadFault::Access)? {
        ThreadLocalAccess::Distance(at) => at_distance(word(bias.wrapping_add(at))?),
        ThreadLocalAccess::Descriptor(at) => {
            // The argument stands behind the function.
            let argument = word(bias.wrapping_add(at).wrapping_add(8))?;
            at_distance(argument).or_else(|_| in_module(word(argument)?, word(argument.wrapping_add(8))?))
        }
        ThreadLocalAccess::Module(at) => in_module(word(bias.wrapping_add(at))?, variable.offset),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory of these words from an address on.
    struct Words(u64, Vec<u64>);

    impl Memory for Words {
        fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
            let all: Vec<u8> = self.1.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let from = usize::try_from(address.wrapping_sub(self.0)).unwrap_or(usize::MAX);
            let part = from.checked_add(bytes.len()).and_then(|end| all.get(from..end));
            part.map(|part| bytes.copy_from_slice(part)).is_some()
        }
    }

    fn of(access: Option<ThreadLocalAccess>) -> ThreadLocal {
        ThreadLocal { offset: 0x10, block_bytes: 0x39, block_align: 0x20, has_interpreter: false, access }
    }

    fn in_module(module: i32, offset: i32) -> ThreadContext {
        ThreadContext { thread_offset: 8, steps: Some([module, offset]) }
    }

    fn at_distance(thread_offset: i64) -> ThreadContext {
        ThreadContext { thread_offset, steps: None }
    }

    #[test]
    fn each_kind_of_access_leads_to_the_variable() {
        let distance = (-0x30_i64).cast_unsigned();
        let memory = Words(0x7000, vec![distance, 0x7018, 3, 3, 0x48]);
        let of_library = |access, is_musl| way(&of(Some(access)), 0x6000, false, is_musl, &memory);
        assert_eq!(of_library(ThreadLocalAccess::Distance(0x1000), false), Ok(at_distance(-0x30)));
        assert_eq!(of_library(ThreadLocalAccess::Descriptor(0x1000), false), Ok(in_module(0x30, 0x48)));
        assert_eq!(of_library(ThreadLocalAccess::Descriptor(0x1000), true), Ok(in_module(0x18, 0x48)));
        assert_eq!(of_library(ThreadLocalAccess::Module(0x1010), false), Ok(in_module(0x30, 0x10)));
        let resolved = Words(0x7000, vec![0x1234, distance]);
        let descriptor = of(Some(ThreadLocalAccess::Descriptor(0x1000)));
        assert_eq!(way(&descriptor, 0x6000, false, false, &resolved), Ok(at_distance(-0x30)));
        // The linker of a program places its block right below the thread pointer.
        assert_eq!(way(&of(None), 0x6000, true, false, &memory), Ok(at_distance(0x10 - 0x40)));
    }

    #[test]
    fn musl_is_known_by_the_name_of_its_file() {
        for (path, expected) in [
            ("/lib/ld-musl-x86_64.so.1", true),
            ("/usr/lib/x86_64-linux-musl/libc.so", true),
            ("/usr/lib/x86_64-linux-gnu/libc.so.6", false),
            ("/opt/musl/shop", false),
        ] {
            assert_eq!(is_musl(path), expected, "{path}");
        }
    }

    #[test]
    fn words_that_make_no_sense_are_refused() {
        let way_of = |access, words: Vec<u64>| way(&of(access), 0, false, false, &Words(0, words));
        assert_eq!(way_of(None, vec![]), Err(ThreadFault::Access));
        for (access, words) in [
            (ThreadLocalAccess::Distance(0), vec![]),
            (ThreadLocalAccess::Distance(0), vec![7]),
            (ThreadLocalAccess::Distance(0), vec![1 << 63]),
            (ThreadLocalAccess::Module(0), vec![0]),
            (ThreadLocalAccess::Module(0), vec![u64::MAX]),
            (ThreadLocalAccess::Descriptor(0), vec![1, 0x1_0000]),
            (ThreadLocalAccess::Descriptor(0), vec![1, 0x10, 5, 1 << 40]),
        ] {
            assert_eq!(
                way_of(Some(access), words.clone()),
                Err(ThreadFault::Implausible),
                "{access:?} {words:?}"
            );
        }
        let huge = ThreadLocal { block_bytes: u64::MAX, ..of(None) };
        assert_eq!(way(&huge, 0, true, false, &Words(0, vec![])), Err(ThreadFault::Implausible));
    }
}
