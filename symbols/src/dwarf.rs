//! Names, inlined functions and lines from DWARF, which blazesym reads in a child process.
//!
//! Debug information is a program for its reader: its cost is unknown beforehand, and a hostile file can use up time, memory
//! or the stack. So a child process reads it, with hard limits and almost no privilege. When the child ends, or the parent kills it,
//! the kernel frees all its resources. Callers do not read a file again on which the child died.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Read, Write},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use blazesym::symbolize::{
    self, CodeInfo, Input, Symbolized,
    source::{Elf, Source},
};
use gannet_elf::{AlternateLink, Elf as ElfFile, ElfLimits};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Resource, Rlimit, Signal, setrlimit},
    thread::{CapabilitySet, CapabilitySets},
};
use serde::{Deserialize, Serialize};

use crate::{demangle, start_lines::start_lines};

/// The verb by which a program calls itself to read debug information.
pub const DEBUG_INFO_VERB: &str = "read-debug-info";

/// Time limit of one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(6);
const CPU_SECONDS: u64 = 5;
const _: () = assert!(CPU_SECONDS < CALL_TIMEOUT.as_secs(), "the child's own limit applies first");
/// Size of the child's stack. The child touches more of it the deeper inlined functions nest.
const MAX_STACK_BYTES: u64 = 64 << 20;
/// Maximum size of debug information and symbol table, in bytes. A compressed section counts [`PACKED`] times its size.
const MAX_DEBUG_BYTES: u64 = 2 << 30;
const MAX_ANSWER_BYTES: u64 = 64 << 20;
/// The part of the child's memory that the sections with first lines may take.
const START_LINES_PART: u64 = 3;
/// Maximum number of addresses of one call. They are one argument, which Linux limits to 128 KiB.
const CALL_ADDRESSES: usize = 4096;
const _: () = assert!(CALL_ADDRESSES * (16 + 1) < 128 << 10, "16 digits and a comma each");

/// One function at an address, from debug information.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebugLine {
    /// Name that the compiler gave.
    pub name: String,
    /// Path of the source file; empty if unknown.
    pub file: String,
    /// Line in that file; 0 if unknown.
    pub line: u32,
    /// Column of that line; 0 if unknown.
    pub column: u32,
    /// Line at which the function begins; 0 if unknown.
    pub start_line: u32,
}

/// Functions at one address, innermost first; empty if the debug information does not describe it.
pub type DebugFrame = Vec<DebugLine>;

/// The reason why the debug information of a file is unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// The file has none.
    None,
    /// The debug information is too large, refers to other files, or has an unknown form.
    Refused,
    /// The file with the shared part of the debug information is not installed.
    NoAlternate,
    /// A read failed, and another one would fail again.
    Harmful,
}

/// The usual ratio of compression of debug sections.
const PACKED: u64 = 4;

/// Debug information that a child may read.
#[derive(Clone, Debug)]
pub struct Examined {
    /// Estimated size of the debug information after decompression, and of the symbol table, which the reader reads too.
    pub bytes: u64,
    /// The file that the debug information refers to. The reader follows this link, so the caller must check its target.
    pub alternate: Option<AlternateLink>,
}

/// Checks whether a child may read the debug information of a file. Returns an error with the reason if not.
pub fn examine(file: &File) -> Result<Examined, Unusable> {
    let elf = ElfFile::parse(file, &ElfLimits::default()).map_err(|_| Unusable::None)?;
    // The reader does not know the old form of compression, which had no section flag.
    if elf.stored_section(b".zdebug_info").is_some() {
        return Err(Unusable::Refused);
    }
    if elf.stored_section(b".debug_info").is_none() {
        return Err(Unusable::None);
    }
    // The reader would follow a link to another file, whose path the maker of this file chose.
    let links = [&b".gnu_debuglink"[..], b".debug_sup"];
    let alternate = elf.alternate_link();
    let is_damaged = alternate.is_none() && elf.stored_section(b".gnu_debugaltlink").is_some();
    let is_unknown = elf.sections().any(|(name, section)| {
        name.starts_with(b".debug_") && section.is_stored() && !elf.has_known_form(section)
    });
    let bytes: u64 = elf
        .sections()
        .filter(|(name, section)| (name.starts_with(b".debug_") || is_symbols(name)) && section.is_stored())
        .fold(0, |sum: u64, (_, section)| {
            sum.saturating_add(section.bytes.saturating_mul(if section.is_compressed() { PACKED } else { 1 }))
        });
    let has_link = links.iter().any(|name| elf.stored_section(name).is_some());
    if bytes > MAX_DEBUG_BYTES || has_link || is_damaged || is_unknown {
        return Err(Unusable::Refused);
    }
    Ok(Examined { bytes, alternate })
}

fn is_symbols(name: &[u8]) -> bool {
    name == b".symtab" || name == b".strtab"
}

/// Returns the time after which [`resolve`] has ended, unless the file system of the file does not answer.
pub fn max_time(addresses: usize) -> Duration {
    let calls = addresses.div_ceil(CALL_ADDRESSES) + 1;
    CALL_TIMEOUT.saturating_mul(u32::try_from(calls).unwrap_or(u32::MAX))
}

/// Reads the functions at each ELF virtual address. The child has `memory_bytes` of memory beside the file itself, and searches
/// `directories` for the file's alternate file. `program` runs as the child: it must call
/// [`read_debug_info`] for the verb [`DEBUG_INFO_VERB`]. Calls `started` with the process id of each child, and holds the result while
/// the child runs. An error means that the child could not start, could not read the debug information, died, or did not answer in
/// time.
pub fn resolve<S>(
    program: &Path,
    file: &File,
    addresses: &[u64],
    memory_bytes: u64,
    directories: &[PathBuf],
    started: &impl Fn(u32) -> S,
) -> io::Result<Vec<DebugFrame>> {
    let mut frames = Vec::with_capacity(addresses.len());
    for addresses in addresses.chunks(CALL_ADDRESSES) {
        let answer = call(program, file, addresses, memory_bytes, directories, started)?;
        if answer.len() != addresses.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the reader answered for other addresses",
            ));
        }
        frames.extend(answer);
    }
    Ok(frames)
}

fn call<S>(
    program: &Path,
    file: &File,
    addresses: &[u64],
    memory_bytes: u64,
    directories: &[PathBuf],
    started: &impl Fn(u32) -> S,
) -> io::Result<Vec<DebugFrame>> {
    let words: Vec<String> = addresses.iter().map(|address| format!("{address:x}")).collect();
    let mut child = Command::new(program)
        .arg(DEBUG_INFO_VERB)
        .arg(memory_bytes.to_string())
        .arg(words.join(","))
        .args(directories)
        .env_clear()
        .stdin(file.try_clone()?)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let counted = started(child.id());
    let mut bytes = Vec::new();
    let read = answer(&mut child, &mut bytes);
    // The child has ended by itself, or must end now.
    let _ = child.kill();
    let status = child.wait()?;
    drop(counted);
    let mut values = serde_json::Deserializer::from_slice(&bytes);
    // The names stand, whatever becomes of the first lines behind them.
    let Ok(names) = Result::<Vec<DebugFrame>, String>::deserialize(&mut values) else {
        read?;
        return Err(io::Error::other(format!("the reader ended with {status}")));
    };
    let mut frames = names.map_err(io::Error::other)?;
    if let Ok(lines) = Vec::<Vec<u32>>::deserialize(&mut values) {
        for (frame, lines) in frames.iter_mut().zip(&lines) {
            add_start_lines(frame, lines);
        }
    }
    Ok(frames)
}

/// Adds the first lines of the functions of a frame, outermost first. If the frame does not have as many functions, only the outermost
/// one is certain.
fn add_start_lines(frame: &mut DebugFrame, lines: &[u32]) {
    let count = if frame.len() == lines.len() { lines.len() } else { 1 };
    for (line, start) in frame.iter_mut().rev().zip(lines).take(count) {
        line.start_line = *start;
    }
}

/// Reads everything that the child writes, if it does so in time.
fn answer(child: &mut Child, bytes: &mut Vec<u8>) -> io::Result<()> {
    let mut pipe = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let begin = Instant::now();
    loop {
        let left = CALL_TIMEOUT.checked_sub(begin.elapsed()).ok_or(io::ErrorKind::TimedOut)?;
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut wanted = [PollFd::new(&pipe, PollFlags::IN)];
        match rustix::event::poll(&mut wanted, Some(&timeout)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let mut chunk = [0; 1 << 13];
        match pipe.read(&mut chunk)? {
            0 => return Ok(()),
            read => bytes.extend_from_slice(&chunk[..read]),
        }
        if bytes.len() as u64 > MAX_ANSWER_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    }
}

/// Runs the child: reads the debug information of the file on standard input, and writes the functions at each of the addresses
/// (hexadecimal, separated by commas) to standard output, as JSON, and behind them their first lines, if it can read those. Takes at most `memory_bytes` of memory for that. The file to which
/// this one refers is searched in `directories`. The process is in the control group of its parent, and counts towards the limit of that.
pub fn read_debug_info(memory_bytes: u64, addresses: &str, directories: Vec<PathBuf>) -> io::Result<()> {
    confine(memory_bytes)?;
    let addresses: Vec<u64> = addresses
        .split(',')
        .map(|address| u64::from_str_radix(address, 16))
        .collect::<Result<_, _>>()
        .map_err(io::Error::other)?;
    // The reader recurses into inlined functions as deeply as the file nests them.
    let worker = std::thread::Builder::new().stack_size(MAX_STACK_BYTES as usize);
    let (frames, addresses) = worker
        .spawn(move || (read(&addresses, directories), addresses))?
        .join()
        .map_err(|_| io::Error::other("damaged"))?;
    let mut output = BufWriter::new(io::stdout().lock());
    serde_json::to_writer(&mut output, &frames)?;
    output.flush()?;
    if frames.is_err() {
        return Ok(());
    }
    // The memory of the names is free again.
    drop(frames);
    let file = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    if let Some(lines) = start_lines(&file, &addresses, memory_bytes / START_LINES_PART) {
        serde_json::to_writer(&mut output, &lines)?;
    }
    output.flush()
}

/// Drops every privilege and resource that reading a file does not need.
fn confine(memory_bytes: u64) -> io::Result<()> {
    let limit = |max| Rlimit { current: Some(max), maximum: Some(max) };
    // If memory runs out, the kernel kills this process first.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    setrlimit(Resource::Data, limit(memory_bytes.saturating_add(MAX_STACK_BYTES)))?;
    setrlimit(Resource::Cpu, limit(CPU_SECONDS))?;
    setrlimit(Resource::Core, limit(0))?;
    // The limit on the size of files stops only writes to files. The child writes into a pipe.
    setrlimit(Resource::Fsize, limit(0))?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    rustix::thread::set_no_new_privs(true)?;
    // The child opens the file again by its descriptor, and only the owner may be able to read it.
    let kept = CapabilitySet::DAC_READ_SEARCH & rustix::thread::capabilities(None)?.permitted;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)?;
    Ok(())
}

fn read(addresses: &[u64], directories: Vec<PathBuf>) -> Result<Vec<DebugFrame>, String> {
    let symbolizer =
        symbolize::Symbolizer::builder().enable_demangling(false).set_debug_dirs(Some(directories)).build();
    let source = Source::Elf(Elf::new("/proc/self/fd/0"));
    let found = symbolizer.symbolize(&source, Input::VirtOffset(addresses));
    found.map(|found| found.iter().map(frame).collect()).map_err(|error| format!("{error:#}"))
}

fn frame(found: &Symbolized<'_>) -> DebugFrame {
    let Symbolized::Sym(symbol) = found else { return Vec::new() };
    // For an address without debug information, the reader takes a symbol of the file. Without a size that may be a label inside of
    // assembly, which [`crate::tables`] leaves out.
    let is_label =
        symbol.inlined.is_empty() && symbol.code_info.is_none() && symbol.size.is_none_or(|size| size == 0);
    if symbol.name.is_empty() || is_label {
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

fn line(name: &str, source: Option<&CodeInfo<'_>>) -> DebugLine {
    DebugLine {
        name: name.to_owned(),
        file: source.map(|source| demangle::cut(&source.to_path().to_string_lossy())).unwrap_or_default(),
        line: source.and_then(|source| source.line).unwrap_or_default(),
        column: source.and_then(|source| source.column).map(u32::from).unwrap_or_default(),
        start_line: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that the outermost function has its line if the reader of names found other inlined functions.
    #[test]
    fn lines_go_to_the_functions_that_they_belong_to() {
        let frame = |count: usize| vec![DebugLine::default(); count];
        for (count, lines, want) in
            [(2, &[7, 3][..], &[3, 7][..]), (2, &[7], &[0, 7]), (1, &[7, 3], &[7]), (2, &[], &[0, 0])]
        {
            let mut frame = frame(count);
            add_start_lines(&mut frame, lines);
            let found: Vec<u32> = frame.iter().map(|line| line.start_line).collect();
            assert_eq!(found, want);
        }
    }
}
