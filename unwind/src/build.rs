//! From a file to its table: finds what the file says about stacks, in order of trust, and lays it out.
//!
//! 1. A table supplied for this file ([`crate::overrides`]).
//! 2. `.eh_frame`, all of it; its index `.eh_frame_hdr` only shows where it is if section headers are gone.
//! 3. Go's function table.
//! 4. `.debug_frame`, in the file or in its debug file.
//! 5. What is known without being said: linkage tables, the entry point, and signal trampolines by their instructions.
//! 6. x86_64 code that is still open, by its instructions ([`crate::code`]), if it is not too much.
//!
//! Each fills only what those before it left open.
use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;

use gimli::{BaseAddresses, DebugFrame, EhFrame, LittleEndian};
use object::elf::{STT_FUNC, Sym64};
use object::pod::slice_from_bytes;
use object::read::ReadRef;

use crate::cfi::{self, Entries, Oddities, Slice};
use crate::code;
use crate::content::ContentId;
use crate::elf::{BuildId, DebugLink, Elf, ElfError, FileReader, Segments};
use crate::format::{Rule, cfa, dwarf_register, loc};
use crate::go;
use crate::limits::{Budget, Exceeded, Limits};
use crate::overrides::Overrides;
use crate::table::{Arch, Builder, BuilderError, Table};

/// How to go about one file.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// What to call the file in errors.
    pub name: &'a str,
    /// What it may cost.
    pub limits: &'a Limits,
    /// Set from another thread to stop early.
    pub cancel: Option<&'a AtomicBool>,
    /// Where debug files are, for files that keep their frame information there.
    pub debug_files: Option<&'a dyn DebugFiles>,
    /// Tables that take precedence.
    pub overrides: Option<&'a Overrides>,
    /// Whether runs of pushes and pops become one row each ([`crate::format`]), which takes half the memory. The kernel
    /// side must know them.
    pub runs: bool,
}

impl<'a> Options<'a> {
    /// Within these limits, without debug files, overrides and runs.
    pub fn new(name: &'a str, limits: &'a Limits) -> Self {
        Self { name, limits, cancel: None, debug_files: None, overrides: None, runs: false }
    }
}

/// Finds debug files. What it returns is checked before it is believed: a file found by build id must have that build
/// id, a file found by name the checksum that the link gives.
pub trait DebugFiles: std::fmt::Debug {
    /// Opens the debug file of a program, e.g. `/usr/lib/debug/.build-id/ab/cdef.debug`.
    fn open(&self, build_id: Option<&BuildId>, link: Option<&DebugLink>) -> Option<File>;
}

/// A file could not be made into a table.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{file}: {fault}")]
pub struct BuildError {
    /// [`Options::name`]
    pub file: String,
    /// What went wrong.
    pub fault: Fault,
}

/// What went wrong with a file.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// It is not an ELF file that can be unwound.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// It is over a limit, out of time, or cancelled.
    #[error(transparent)]
    Exceeded(#[from] Exceeded),
    /// It changed while it was read.
    #[error("cannot be read, or changed while it was: try again")]
    Unreadable,
    /// Rows came out of order, which is a fault of this program.
    #[error("internal error: {0}; please report it with the file")]
    Internal(BuilderError),
}

impl From<BuilderError> for Fault {
    fn from(error: BuilderError) -> Self {
        match error {
            BuilderError::Exceeded(exceeded) => Self::Exceeded(exceeded),
            BuilderError::OutOfOrder { .. } => Self::Internal(error),
        }
    }
}

/// A table and where it is from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Built {
    /// The table; empty if the file says nothing about stacks.
    pub table: Table,
    /// The name of the contents.
    pub content: ContentId,
    /// The build id, if there is one.
    pub build_id: Option<BuildId>,
    /// Where the file goes in memory.
    pub segments: Segments,
    /// What was found.
    pub report: Report,
}

/// Counts of what was found in one file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// The table was supplied, nothing was read.
    pub overridden: bool,
    /// Bytes of `.eh_frame`.
    pub eh_frame_bytes: u64,
    /// Functions by `.eh_frame`.
    pub eh_frame_functions: u64,
    /// Functions by Go's table.
    pub go_functions: u64,
    /// Functions by `.debug_frame`.
    pub debug_frame_functions: u64,
    /// Ranges of linkage tables.
    pub linkage_ranges: u64,
    /// Signal trampolines known by their instructions.
    pub signal_trampolines: u64,
    /// Functions by their instructions.
    pub code_functions: u64,
    /// Entries that were broken, dropped or cut.
    pub oddities: Oddities,
    /// Why Go's table could not be used.
    pub go_fault: Option<&'static str>,
    /// Rows that say that this format has no rule for the place.
    pub unsupported_rows: u64,
    /// Bytes of code that were not searched for signal trampolines, because the limit was reached.
    pub unscanned_bytes: u64,
}

/// Makes the table of a file.
pub fn build_file(file: &File, options: &Options<'_>) -> Result<Built, BuildError> {
    let reader = FileReader::new(file, options.limits);
    build(&reader, options)
}

/// The name of a file's contents and where the file goes in memory, without making its table.
pub fn identify(file: &File, name: &str, limits: &Limits) -> Result<(ContentId, Segments), BuildError> {
    let reader = FileReader::new(file, limits);
    let identified = Elf::parse(&reader, limits).map_err(Fault::from).and_then(|elf| {
        let content = ContentId::of(&elf).ok_or(Fault::Unreadable)?;
        Ok((content, elf.segments().clone()))
    });
    identified.map_err(|fault| BuildError { file: name.to_owned(), fault: flatten(fault) })
}

/// Makes the table of a file, or of a vDSO, that is in memory.
pub fn build_bytes(bytes: &[u8], options: &Options<'_>) -> Result<Built, BuildError> {
    build(bytes, options)
}

fn build<'d, R: ReadRef<'d>>(data: R, options: &Options<'_>) -> Result<Built, BuildError> {
    let mut budget = Budget::new(options.limits, options.cancel);
    try_build(data, options, &mut budget)
        .map_err(|fault| BuildError { file: options.name.to_owned(), fault: flatten(fault) })
}

/// One shape for a limit, wherever it was hit.
fn flatten(fault: Fault) -> Fault {
    match fault {
        Fault::Elf(ElfError::Exceeded(exceeded)) => Fault::Exceeded(exceeded),
        other => other,
    }
}

fn try_build<'d, R: ReadRef<'d>>(
    data: R,
    options: &Options<'_>,
    budget: &mut Budget<'_>,
) -> Result<Built, Fault> {
    budget.check()?;
    let elf = Elf::parse(data, options.limits)?;
    let content = ContentId::of(&elf).ok_or(Fault::Unreadable)?;
    let mut report = Report::default();
    let table = if let Some(table) = options.overrides.and_then(|overrides| overrides.get(&content)) {
        report.overridden = true;
        table.clone()
    } else {
        table_of(&elf, options, budget, &mut report)?
    };
    Ok(Built { table, content, build_id: elf.build_id().cloned(), segments: elf.segments().clone(), report })
}

/// A range of addresses and who knows its rows.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: u64,
    end: u64,
    source: Source,
}

#[derive(Clone, Copy, Debug)]
enum Source {
    EhFrame(u32),
    Go(u32),
    DebugFrame(u32),
    Fixed(Rule),
    Code(u32),
}

fn table_of<'d, R: ReadRef<'d>>(
    elf: &Elf<'d, R>,
    options: &Options<'_>,
    budget: &mut Budget<'_>,
    report: &mut Report,
) -> Result<Table, Fault> {
    let arch = elf.arch();
    let segments = elf.segments();
    let mut pieces = Vec::new();

    let (eh_frame_at, eh_frame_bytes) = eh_frame(elf)?.unwrap_or((0, Cow::Borrowed(&[])));
    report.eh_frame_bytes = eh_frame_bytes.len() as u64;
    let mut section = EhFrame::from(Slice::new(&eh_frame_bytes, LittleEndian));
    section.set_address_size(8);
    section.set_vendor(vendor(arch));
    let bases = bases(elf).set_eh_frame(eh_frame_at);
    let eh_frame = Entries::collect(section, &eh_frame_bytes, true, bases, arch, segments, budget)?;
    report.eh_frame_functions = eh_frame.functions.len() as u64;
    report.oddities = eh_frame.oddities;
    pieces.extend(cfi_pieces(&eh_frame.functions, Source::EhFrame));

    let go_bytes = match elf.section(b".gopclntab").or_else(|| elf.section(b".data.rel.ro.gopclntab")) {
        Some(section) => {
            let vaddr = section.vaddr;
            Some((vaddr, elf.section_data(section)?))
        }
        None => None,
    };
    let mut go = None;
    if let Some((vaddr, bytes)) = &go_bytes {
        let text_start = relocated(elf, vaddr.saturating_add(go::TEXT_START_AT), budget)?
            .or_else(|| elf.section(b".text").map(|text| text.vaddr));
        match go::FunctionTable::parse(bytes, arch, segments, text_start, budget)? {
            Ok(table) => {
                report.go_functions = table.functions.len() as u64;
                report.oddities.dropped += table.dropped;
                let ranges = table.functions.iter().enumerate().map(|(index, function)| Piece {
                    start: function.start,
                    end: function.end,
                    source: Source::Go(index as u32),
                });
                pieces = fill(pieces, ranges);
                go = Some(table);
            }
            Err(go::Broken(why)) => report.go_fault = Some(why),
        }
    }

    let debug_frame_bytes = debug_frame(elf, options, || mostly_open(elf, &pieces))?;
    let mut section = DebugFrame::from(Slice::new(&debug_frame_bytes, LittleEndian));
    section.set_address_size(8);
    section.set_vendor(vendor(arch));
    let none = BaseAddresses::default();
    let debug_frame = Entries::collect(section, &debug_frame_bytes, false, none, arch, segments, budget)?;
    report.debug_frame_functions = debug_frame.functions.len() as u64;
    report.oddities.malformed += debug_frame.oddities.malformed;
    pieces = fill(pieces, cfi_pieces(&debug_frame.functions, Source::DebugFrame));

    let linkage = linkage(elf);
    report.linkage_ranges = linkage.len() as u64;
    pieces = fill(pieces, linkage.into_iter());
    pieces = fill(pieces, entry_point(elf).into_iter());
    let trampolines = trampolines(elf, &pieces, budget, report)?;
    report.signal_trampolines = trampolines.len() as u64;
    pieces = fill(pieces, trampolines.into_iter());
    let code = code_functions(elf, &pieces, budget)?;
    report.code_functions = code.len() as u64;
    let ranges = code.iter().enumerate().map(|(index, function)| Piece {
        start: function.start,
        end: function.end,
        source: Source::Code(index as u32),
    });
    pieces = fill(pieces, ranges);

    let (start, end) = match (pieces.first(), pieces.last()) {
        (Some(first), Some(last)) => (first.start, last.end),
        _ => (0, 0),
    };
    let mut lay_out = |with_rbx: bool| -> Result<(Table, bool), Fault> {
        let mut builder = Builder::new(arch, start, end, options.limits)?.runs(options.runs && !with_rbx);
        let mut unsupported = 0;
        let mut by_rbx = false;
        for (index, piece) in pieces.iter().enumerate() {
            let mut row = |pc: u64, rule: Rule| -> Result<(), Fault> {
                if pc >= piece.end {
                    return Ok(());
                }
                unsupported += u64::from(rule.cfa_kind == cfa::UNSUPPORTED);
                by_rbx |= rule.cfa_kind == cfa::REGISTER + dwarf_register::X86_64_RBX as u8;
                // Rows before the piece begins replace one another: the last one is what holds at its start.
                Ok(builder.push(pc.max(piece.start), rule)?)
            };
            match piece.source {
                Source::EhFrame(index) => {
                    eh_frame.rows(&eh_frame.functions[index as usize], with_rbx, budget, &mut row)?;
                }
                Source::DebugFrame(index) => {
                    debug_frame.rows(&debug_frame.functions[index as usize], with_rbx, budget, &mut row)?;
                }
                Source::Go(index) => {
                    if let Some(go) = &go {
                        go.rows(&go.functions[index as usize], budget, &mut row)?;
                    }
                }
                Source::Fixed(rule) => row(piece.start, rule)?,
                Source::Code(index) => {
                    for (pc, rule) in &code[index as usize].rows {
                        row(*pc, *rule)?;
                    }
                }
            }
            if pieces.get(index + 1).is_some_and(|next| next.start > piece.end) {
                builder.push(piece.end, Rule::NONE)?;
            }
        }
        report.unsupported_rows = unsupported;
        Ok((builder.finish()?, by_rbx && arch == Arch::X86_64))
    };
    // The dynamic linker alone was seen to keep a frame by rbx while it calls on.
    match lay_out(false)? {
        (_, true) => Ok(lay_out(true)?.0),
        (table, false) => Ok(table),
    }
}

fn vendor(arch: Arch) -> gimli::Vendor {
    match arch {
        Arch::X86_64 => gimli::Vendor::Default,
        Arch::Aarch64 => gimli::Vendor::AArch64,
    }
}

fn cfi_pieces(functions: &[cfi::Function], source: fn(u32) -> Source) -> impl Iterator<Item = Piece> {
    functions.iter().enumerate().map(move |(index, function)| Piece {
        start: function.start,
        end: function.end,
        source: source(index as u32),
    })
}

/// Adds to `have` what `more` knows of the places between. Both are sorted and free of overlaps.
fn fill(have: Vec<Piece>, more: impl Iterator<Item = Piece>) -> Vec<Piece> {
    let mut more = more.peekable();
    if more.peek().is_none() {
        return have;
    }
    let mut all = Vec::with_capacity(have.len() + more.size_hint().0);
    let mut have = have.into_iter().peekable();
    let mut covered = 0;
    for piece in more {
        let mut start = piece.start.max(covered);
        while start < piece.end {
            match have.peek() {
                Some(next) if next.start <= start => {
                    covered = next.end;
                    start = start.max(covered);
                    all.extend(have.next());
                }
                Some(next) => {
                    let end = next.start.min(piece.end);
                    all.push(Piece { start, end, ..piece });
                    start = end;
                }
                None => {
                    all.push(Piece { start, ..piece });
                    start = piece.end;
                }
            }
        }
    }
    all.extend(have);
    all
}

fn bases<'d, R: ReadRef<'d>>(elf: &Elf<'d, R>) -> BaseAddresses {
    let at = |name: &[u8]| elf.section(name).map(|section| section.vaddr);
    let mut bases = BaseAddresses::default();
    if let Some(text) = at(b".text") {
        bases = bases.set_text(text);
    }
    if let Some(got) = at(b".got") {
        bases = bases.set_got(got);
    }
    if let Some((header, _)) = elf.eh_frame_hdr() {
        bases = bases.set_eh_frame_hdr(header);
    }
    bases
}

/// Bytes and their address.
type Placed<'d> = (u64, Cow<'d, [u8]>);

/// Address and bytes of `.eh_frame`: by its section, or else by the pointer in `.eh_frame_hdr` and up to the end of
/// the segment (its terminator ends it).
fn eh_frame<'d, R: ReadRef<'d>>(elf: &Elf<'d, R>) -> Result<Option<Placed<'d>>, Fault> {
    if let Some(section) = elf.section(b".eh_frame") {
        return Ok(Some((section.vaddr, elf.section_data(section)?)));
    }
    let Some((header_at, size)) = elf.eh_frame_hdr() else { return Ok(None) };
    let pointed = elf.bytes_at(header_at, size.min(64)).and_then(|bytes| {
        let header = gimli::EhFrameHdr::new(bytes, LittleEndian);
        let bases = BaseAddresses::default().set_eh_frame_hdr(header_at);
        header.parse(&bases, 8).ok().map(|header| header.eh_frame_ptr().pointer())
    });
    Ok(pointed.and_then(|at| {
        let bytes = elf.bytes_at(at, u64::MAX)?;
        Some((at, Cow::Borrowed(&bytes[..terminated(bytes)])))
    }))
}

/// Bytes up to the terminator, or all.
fn terminated(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(length) = bytes.get(at..).and_then(<[u8]>::first_chunk) {
        match u32::from_le_bytes(*length) {
            0 => return at,
            // Entries of more than 4 GiB do not exist in sections without a header.
            u32::MAX => return bytes.len(),
            length => at = at + 4 + length as usize,
        }
    }
    bytes.len()
}

/// Whether most code is without rules. A few functions always have some: those that the C library brings.
fn mostly_open<'d, R: ReadRef<'d>>(elf: &Elf<'d, R>, pieces: &[Piece]) -> bool {
    let code: u64 = elf.code().iter().map(|(start, end)| end - start).fold(0, u64::saturating_add);
    let covered: u64 = pieces.iter().map(|piece| piece.end - piece.start).fold(0, u64::saturating_add);
    covered < code / 2
}

/// The bytes of `.debug_frame`: of the file itself, or of its debug file if the file says little else.
fn debug_frame<'d, R: ReadRef<'d>>(
    elf: &Elf<'d, R>,
    options: &Options<'_>,
    mostly_open: impl FnOnce() -> bool,
) -> Result<Cow<'d, [u8]>, Fault> {
    let own = debug_frame_section(elf)?;
    let Some(files) = options.debug_files else { return Ok(own) };
    if !own.is_empty() || !mostly_open() {
        return Ok(own);
    }
    let link = elf.debug_link();
    if link.is_none() && elf.build_id().is_none() {
        return Ok(own);
    }
    let Some(file) = files.open(elf.build_id(), link.as_ref()) else { return Ok(own) };
    let reader = FileReader::new(&file, options.limits);
    let Ok(debug) = Elf::parse(&reader, options.limits) else { return Ok(own) };
    let same_build = elf.build_id().is_some() && debug.build_id() == elf.build_id();
    let linked = || link.is_some_and(|link| checksum(&file, options.limits) == Some(link.crc));
    if debug.arch() != elf.arch() || !(same_build || linked()) {
        return Ok(own);
    }
    Ok(Cow::Owned(debug_frame_section(&debug)?.into_owned()))
}

fn debug_frame_section<'d, R: ReadRef<'d>>(elf: &Elf<'d, R>) -> Result<Cow<'d, [u8]>, Fault> {
    match elf.section(b".debug_frame").or_else(|| elf.section(b".zdebug_frame")) {
        Some(section) => Ok(elf.section_data(section)?),
        None => Ok(Cow::Borrowed(&[])),
    }
}

/// CRC-32 of a debug file, if it is not larger than 16 sections may be.
fn checksum(file: &File, limits: &Limits) -> Option<u32> {
    let most = limits.section_bytes.saturating_mul(16);
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    let mut at = 0;
    loop {
        match file.read_at(&mut buffer, at) {
            Ok(0) => return Some(hasher.finalize()),
            Ok(read) => {
                hasher.update(&buffer[..read]);
                at += read as u64;
                if at > most {
                    return None;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

/// What a relative relocation would put at an address: the value that a position-independent program has there
/// before its base is added.
fn relocated<'d, R: ReadRef<'d>>(
    elf: &Elf<'d, R>,
    vaddr: u64,
    budget: &mut Budget<'_>,
) -> Result<Option<u64>, Fault> {
    let Some(section) = elf.section(b".rela.dyn") else { return Ok(None) };
    let bytes = elf.section_data(section)?;
    budget.check()?;
    let wanted = vaddr.to_le_bytes();
    let entry = bytes.chunks_exact(24).find(|entry| entry[..8] == wanted);
    Ok(entry.and_then(|entry| entry.last_chunk().copied().map(u64::from_le_bytes)))
}

/// Ranges of linkage tables, for linkers (lld) that do not describe them.
fn linkage<'d, R: ReadRef<'d>>(elf: &Elf<'d, R>) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for name in [&b".plt"[..], b".plt.sec", b".plt.got", b".iplt", b".plt.bnd"] {
        let Some(section) = elf.section(name) else { continue };
        let (start, bytes) = (section.vaddr, section.bytes);
        let Some(end) = start.checked_add(bytes) else { continue };
        if bytes == 0 || elf.segments().executable_end(start).is_none_or(|limit| end > limit) {
            continue;
        }
        let mut fixed = |start: u64, end: u64, rule: Rule| {
            if start < end {
                pieces.push(Piece { start, end, source: Source::Fixed(rule) });
            }
        };
        match elf.arch() {
            Arch::X86_64 => {
                let code = elf.bytes_at(start, 32).unwrap_or_default();
                // `push GOT[1]`: the first entry of a lazy table, where two words are on the stack.
                let first = if code.starts_with(&[0xff, 0x35]) { 16 } else { 0 };
                if first > 0 {
                    fixed(start, end.min(start + 6), Rule::x86_64_sp(16));
                    fixed(start + 6, end.min(start + 16), Rule::x86_64_sp(24));
                }
                let entry = code.get(first..).unwrap_or_default();
                let rule = if entry.starts_with(&[0xf3, 0x0f, 0x1e, 0xfa, 0x68]) {
                    // endbr64; push index; jmp
                    Rule::x86_64_plt(9)
                } else if entry.starts_with(&[0xff, 0x25]) && entry.get(6) == Some(&0x68) {
                    // jmp *slot; push index; jmp
                    Rule::x86_64_plt(11)
                } else {
                    Rule::X86_64_ENTRY
                };
                fixed(end.min(start + first as u64), end, rule);
            }
            Arch::Aarch64 => {
                let lr = loc::REGISTER + dwarf_register::AARCH64_LR as u8;
                let entry = Rule { cfa_kind: cfa::SP, ra_kind: lr, ..Rule::NONE };
                let code = elf.bytes_at(start, 8).unwrap_or_default();
                // stp x16, x30, [sp, #-16]!, behind a landing pad or not
                let push = [0xf0, 0x7b, 0xbf, 0xa9];
                let pushed_at = if code.starts_with(&push) {
                    Some(4)
                } else if code.get(4..) == Some(&push[..]) {
                    Some(8)
                } else {
                    None
                };
                if let Some(pushed_at) = pushed_at {
                    fixed(start, end.min(start + pushed_at), entry);
                    fixed(end.min(start + pushed_at), end.min(start + 32), Rule { cfa_offset: 16, ..entry });
                    fixed(end.min(start + 32), end, entry);
                } else {
                    fixed(start, end, entry);
                }
            }
        }
    }
    pieces.sort_unstable_by_key(|piece| piece.start);
    pieces.dedup_by(|later, earlier| later.start < earlier.end);
    pieces
}

/// The first few bytes of a program that nothing describes, as in the dynamic linker: whatever they call, they have no
/// caller themselves.
fn entry_point<'d, R: ReadRef<'d>>(elf: &Elf<'d, R>) -> Option<Piece> {
    let start = elf.entry();
    let end = elf.segments().executable_end(start)?.min(start.saturating_add(ENTRY_BYTES));
    (start > 0 && start < end).then_some(Piece { start, end, source: Source::Fixed(Rule::OUTERMOST) })
}

/// Longer than any known `_start`.
const ENTRY_BYTES: u64 = 64;
/// Gaps shorter than this are padding between functions.
const MIN_GAP_BYTES: u64 = 64;

/// Signal trampolines in code that nothing describes, as in musl: `mov $15, %rax; syscall` and its kin.
fn trampolines<'d, R: ReadRef<'d>>(
    elf: &Elf<'d, R>,
    pieces: &[Piece],
    budget: &mut Budget<'_>,
    report: &mut Report,
) -> Result<Vec<Piece>, Fault> {
    let patterns: &[&[u8]] = match elf.arch() {
        Arch::X86_64 => &[&[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05], &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05]],
        // mov x8, #139; svc #0
        Arch::Aarch64 => &[&[0x68, 0x11, 0x80, 0xd2, 0x01, 0, 0, 0xd4]],
    };
    let rule = go::signal_rule(elf.arch());
    let mut found = Vec::new();
    let mut left = budget.limits.scanned_bytes;
    for (start, end) in gaps(elf.code(), pieces) {
        budget.check()?;
        let bytes = elf.bytes_at(start, (end - start).min(left)).unwrap_or_default();
        left -= bytes.len() as u64;
        if left == 0 {
            report.unscanned_bytes += end - start - bytes.len() as u64;
        }
        let first_bytes: Vec<u8> = patterns.iter().map(|pattern| pattern[0]).collect();
        let mut at = 0;
        while let Some(next) = bytes[at..].iter().position(|byte| first_bytes.contains(byte)) {
            at += next;
            if let Some(pattern) = patterns.iter().find(|pattern| bytes[at..].starts_with(pattern)) {
                // The handler returns to the first byte, and callers are looked up one byte earlier, which is a nop
                // or padding put there for that.
                let padded = at > 0 && matches!(bytes[at - 1], 0x90 | 0xcc | 0 | 0xd5);
                let first = start + at as u64 - u64::from(padded);
                let end = start + (at + pattern.len()) as u64;
                if found.last().is_none_or(|last: &Piece| last.end <= first) {
                    found.push(Piece { start: first, end, source: Source::Fixed(rule) });
                }
                at += pattern.len();
            } else {
                at += 1;
            }
        }
    }
    Ok(found)
}

/// What instructions tell of code that nothing describes.
fn code_functions<'d, R: ReadRef<'d>>(
    elf: &Elf<'d, R>,
    pieces: &[Piece],
    budget: &mut Budget<'_>,
) -> Result<Vec<code::Function>, Fault> {
    let gaps = gaps(elf.code(), pieces);
    let bytes = gaps.iter().fold(0, |sum: u64, (start, end)| sum.saturating_add(end - start));
    if elf.arch() != Arch::X86_64 || bytes == 0 || bytes > budget.limits.analyzed_bytes {
        return Ok(Vec::new());
    }
    let named = if bytes < NAMED_GAP_BYTES { HashSet::new() } else { function_symbols(elf, &gaps) };
    let gaps: Vec<_> = gaps
        .into_iter()
        .filter_map(|(start, end)| Some(code::Gap { start, bytes: elf.bytes_at(start, end - start)? }))
        .collect();
    Ok(code::functions(&gaps, named, budget)?)
}

/// With less code than this that nothing describes, which the start files of a C compiler leave, symbols are not worth
/// reading.
const NAMED_GAP_BYTES: u64 = 2048;
/// Symbol tables larger than this are not read.
const SYMBOL_BYTES: u64 = 16 << 20;

/// Where functions begin within these ranges, as far as the symbol tables say so: they only help.
pub(crate) fn function_symbols<'d, R: ReadRef<'d>>(elf: &Elf<'d, R>, ranges: &[(u64, u64)]) -> HashSet<u64> {
    let inside = |address: &u64| {
        let before = ranges.partition_point(|(start, _)| start <= address);
        before.checked_sub(1).is_some_and(|n| *address < ranges[n].1)
    };
    let tables = [&b".symtab"[..], b".dynsym"].into_iter().filter_map(|name| elf.section(name));
    let small = tables.filter(|section| section.bytes <= SYMBOL_BYTES);
    let mut starts = HashSet::new();
    for bytes in small.filter_map(|section| elf.section_data(section).ok()) {
        let whole = bytes.len() / size_of::<Sym64<object::LittleEndian>>();
        let symbols = slice_from_bytes::<Sym64<_>>(&bytes, whole).map_or(&[][..], |(symbols, _)| symbols);
        let functions = symbols.iter().filter(|symbol| symbol.st_type() == STT_FUNC);
        let values = functions.map(|symbol| symbol.st_value.get(object::LittleEndian));
        starts.extend(values.filter(inside));
    }
    starts
}

/// Ranges of code that no piece covers, ascending.
fn gaps(code: Vec<(u64, u64)>, pieces: &[Piece]) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut pieces = pieces.iter().peekable();
    let mut at = 0;
    for (start, end) in code {
        at = at.max(start);
        while at < end {
            let covered = pieces.peek().map_or((end, end), |piece| (piece.start, piece.end));
            if covered.0 > at && covered.0.min(end) - at >= MIN_GAP_BYTES {
                found.push((at, covered.0.min(end)));
            }
            if covered.0 >= end {
                at = end;
            } else {
                at = at.max(covered.1);
                pieces.next();
            }
        }
    }
    found
}
