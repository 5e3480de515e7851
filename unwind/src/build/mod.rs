//! From a file to its unwind table: finds all descriptions of stacks in the file, in order of trust, and lays out their rows.
//!
//! 1. A table supplied for this file ([`crate::overrides`]).
//! 2. `.eh_frame`, all of it; its index `.eh_frame_hdr` only shows where it is if section headers are gone.
//! 3. Go's function table.
//! 4. `.debug_frame`, in the file or in its debug file.
//! 5. Code of known form: linkage tables, the entry point, and signal trampolines by their instructions.
//! 6. Other x86_64 code, by its instructions ([`crate::instructions`]), if there is not too much of it.
//!
//! Each source fills only what those before it left open.

mod frame_sections;
mod known_code;
mod list_frames;
mod pieces;
mod undescribed_code;

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::File;
use std::sync::atomic::AtomicBool;

use gannet_elf::{Arch, BuildId, ContentId, Data, DebugLink, Elf, ElfError, Segments};
use gimli::{BaseAddresses, DebugFrame, EhFrame};

use self::pieces::{Piece, Source};
use crate::cfi::{Entries, Oddities, Slice};
use crate::format::{UnwindRule, cfa, dwarf_register, flags};
use crate::go::GoFunctions;
use crate::instructions;
use crate::limits::{Budget, LimitExceeded, TableLimits};
use crate::overrides::Overrides;
use crate::{
    table::UnwindTable,
    table_builder::{TableBuilder, TableBuilderError},
};

#[cfg(test)]
pub(crate) use self::undescribed_code::function_symbols;

/// How to build the table of one file.
#[derive(Clone, Copy, Debug)]
pub struct BuildOptions<'a> {
    /// The name of the file in errors.
    pub name: &'a str,
    /// Limits of the work.
    pub limits: &'a TableLimits,
    /// Another thread sets it to stop the work.
    pub cancel: Option<&'a AtomicBool>,
    /// Finds debug files, for files that have their frame information there.
    pub debug_files: Option<&'a dyn DebugFiles>,
    /// Tables that take precedence over the file.
    pub overrides: Option<&'a Overrides>,
    /// Whether runs of pushes and pops become one row each ([`crate::format`]), which takes half the memory.
    pub runs: bool,
    /// Names of functions of which a frame stands for a run of list frames ([`crate::format::flags::LIST`]).
    pub list_functions: &'a [&'a str],
    /// A file that has one of these functions has one more such function: the one that its longest table of addresses leads into.
    pub list_tables: &'a [&'a str],
}

impl<'a> BuildOptions<'a> {
    /// Returns options with these limits, without debug files, overrides and runs.
    pub fn new(name: &'a str, limits: &'a TableLimits) -> Self {
        Self {
            name,
            limits,
            cancel: None,
            debug_files: None,
            overrides: None,
            runs: false,
            list_functions: &[],
            list_tables: &[],
        }
    }
}

/// Finds debug files. The caller checks each result: a file found by build id must have that build id, and a file found by name
/// the checksum of the link.
pub trait DebugFiles: std::fmt::Debug {
    /// Opens the debug file of a program, e.g. `/usr/lib/debug/.build-id/ab/cdef.debug`.
    fn open(&self, build_id: Option<&BuildId>, link: Option<&DebugLink>) -> Option<File>;
}

/// The reason why a file has no table.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{file}: {fault}")]
pub struct BuildError {
    /// Name of the file: [`BuildOptions::name`].
    pub file: String,
    /// Reason why there is no table.
    pub fault: BuildFault,
}

/// The fault of a file.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BuildFault {
    /// It is not an ELF file that can be read.
    #[error(transparent)]
    Elf(ElfError),
    /// The work was over a limit, out of time, or cancelled.
    #[error(transparent)]
    LimitExceeded(#[from] LimitExceeded),
    /// The file changed while it was read.
    #[error("cannot be read, or changed while it was read: try again")]
    Unreadable,
    /// Rows came out of order: a fault of this program.
    #[error("internal error: {0}; please report it with the file")]
    Internal(TableBuilderError),
}

impl From<ElfError> for BuildFault {
    fn from(error: ElfError) -> Self {
        match error {
            ElfError::TooLarge(too_large) => Self::LimitExceeded(too_large.into()),
            other => Self::Elf(other),
        }
    }
}

impl From<TableBuilderError> for BuildFault {
    fn from(error: TableBuilderError) -> Self {
        match error {
            TableBuilderError::LimitExceeded(exceeded) => Self::LimitExceeded(exceeded),
            TableBuilderError::OutOfOrder { .. } => Self::Internal(error),
        }
    }
}

/// A table, with the properties of its file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BuiltTable {
    /// The table; empty if the file describes no stack.
    pub table: UnwindTable,
    /// The name of the file's content.
    pub content: ContentId,
    /// The build id, if there is one.
    pub build_id: Option<BuildId>,
    /// The file's segments.
    pub segments: Segments,
    /// Counts of the sources.
    pub report: BuildReport,
}

/// Counts of the sources in one file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BuildReport {
    /// Whether the table was supplied, so that nothing was read.
    pub overridden: bool,
    /// Bytes of `.eh_frame`.
    pub eh_frame_bytes: u64,
    /// Functions that `.eh_frame` describes.
    pub eh_frame_functions: u64,
    /// Functions that Go's table describes.
    pub go_functions: u64,
    /// Functions that `.debug_frame` describes.
    pub debug_frame_functions: u64,
    /// Ranges of linkage tables.
    pub linkage_ranges: u64,
    /// Signal trampolines, found by their instructions.
    pub signal_trampolines: u64,
    /// Functions with rules from their instructions.
    pub code_functions: u64,
    /// Entries that were broken, dropped or cut.
    pub oddities: Oddities,
    /// The reason why Go's table was not used.
    pub go_fault: Option<&'static str>,
    /// Rows of code that this format has no rule for.
    pub unsupported_rows: u64,
    /// Bytes of code beyond the limit that were not searched for signal trampolines.
    pub unscanned_bytes: u64,
}

/// Builds the table of an open file.
pub fn build_file(file: &File, options: &BuildOptions<'_>) -> Result<BuiltTable, BuildError> {
    build(file.into(), options)
}

/// Builds the table of a file, or of a vDSO, that is in memory.
pub fn build_bytes(bytes: &[u8], options: &BuildOptions<'_>) -> Result<BuiltTable, BuildError> {
    build(bytes.into(), options)
}

/// Returns the name of a file's content, and its segments, without building its table.
pub fn identify(file: &File, name: &str, limits: &TableLimits) -> Result<(ContentId, Segments), BuildError> {
    let identified = Elf::parse(file, &limits.elf()).map_err(BuildFault::from).and_then(|elf| {
        let content = ContentId::of(&elf).ok_or(BuildFault::Unreadable)?;
        Ok((content, elf.segments().clone()))
    });
    identified.map_err(|fault| BuildError { file: name.to_owned(), fault })
}

fn build(data: Data<'_>, options: &BuildOptions<'_>) -> Result<BuiltTable, BuildError> {
    let mut budget = Budget::new(options.limits, options.cancel);
    try_build(data, options, &mut budget).map_err(|fault| BuildError { file: options.name.to_owned(), fault })
}

fn try_build(
    data: Data<'_>,
    options: &BuildOptions<'_>,
    budget: &mut Budget<'_>,
) -> Result<BuiltTable, BuildFault> {
    budget.check()?;
    let elf = Elf::parse(data, &options.limits.elf())?;
    let content = ContentId::of(&elf).ok_or(BuildFault::Unreadable)?;
    let mut report = BuildReport::default();
    let supplied = options.overrides.and_then(|overrides| overrides.get(&content, elf.arch()));
    let table = if let Some(table) = supplied {
        report.overridden = true;
        table.clone()
    } else {
        table_of(&elf, options, budget, &mut report)?
    };
    Ok(BuiltTable {
        table,
        content,
        build_id: elf.build_id().cloned(),
        segments: elf.segments().clone(),
        report,
    })
}

fn table_of(
    elf: &Elf<'_>,
    options: &BuildOptions<'_>,
    budget: &mut Budget<'_>,
    report: &mut BuildReport,
) -> Result<UnwindTable, BuildFault> {
    let (eh_frame_at, eh_frame_bytes) = frame_sections::eh_frame(elf)?.unwrap_or((0, Cow::Borrowed(&[])));
    report.eh_frame_bytes = eh_frame_bytes.len() as u64;
    let section = frame_sections::open_eh_frame(&eh_frame_bytes, elf.arch());
    let bases = frame_sections::bases(elf).set_eh_frame(eh_frame_at);
    let eh_frame =
        Entries::collect(section, &eh_frame_bytes, true, bases, elf.arch(), elf.segments(), budget)?;
    report.eh_frame_functions = eh_frame.functions.len() as u64;
    report.oddities = eh_frame.oddities;
    let mut pieces: Vec<Piece> = pieces::of_entries(&eh_frame.functions, Source::EhFrame).collect();

    let go = go_functions(elf, budget, report)?;
    let go_ranges = go.iter().flat_map(|go| &go.functions).map(|function| (function.start, function.end));
    pieces = pieces::fill(pieces, pieces::of_ranges(go_ranges, Source::Go));

    let debug_frame_bytes = frame_sections::debug_frame(elf, options, &pieces)?;
    let section = frame_sections::open_debug_frame(&debug_frame_bytes, elf.arch());
    let none = BaseAddresses::default();
    let debug_frame =
        Entries::collect(section, &debug_frame_bytes, false, none, elf.arch(), elf.segments(), budget)?;
    report.debug_frame_functions = debug_frame.functions.len() as u64;
    report.oddities.malformed += debug_frame.oddities.malformed;
    pieces = pieces::fill(pieces, pieces::of_entries(&debug_frame.functions, Source::DebugFrame));

    let linkage = known_code::linkage(elf);
    report.linkage_ranges = linkage.len() as u64;
    pieces = pieces::fill(pieces, linkage.into_iter());
    pieces = pieces::fill(pieces, known_code::entry_point(elf).into_iter());
    let trampolines = known_code::trampolines(elf, &pieces, budget, report)?;
    report.signal_trampolines = trampolines.len() as u64;
    pieces = pieces::fill(pieces, trampolines.into_iter());

    let code = undescribed_code::functions(elf, &pieces, budget)?;
    report.code_functions = code.len() as u64;
    let code_ranges = code.iter().map(|function| (function.start, function.end));
    pieces = pieces::fill(pieces, pieces::of_ranges(code_ranges, Source::Code));

    let lists = list_frames::parts(elf, options, &pieces, budget)?;
    let sources = Sources { eh_frame, go, debug_frame, code, lists };
    // The dynamic linker is the only known file that finds a frame by rbx while it makes calls.
    match sources.lay_out(elf.arch(), &pieces, false, options, budget, report)? {
        (_, true) => Ok(sources.lay_out(elf.arch(), &pieces, true, options, budget, report)?.0),
        (table, false) => Ok(table),
    }
}

fn go_functions<'d>(
    elf: &Elf<'d>,
    budget: &mut Budget<'_>,
    report: &mut BuildReport,
) -> Result<Option<GoFunctions<'d>>, BuildFault> {
    let Some(table) = elf.go_table(u64::MAX)? else { return Ok(None) };
    budget.check()?;
    let collected = match table {
        Ok(table) => GoFunctions::collect(table, elf.arch(), elf.segments(), budget)?,
        Err(fault) => Err(fault),
    };
    match collected {
        Ok(go) => {
            report.go_functions = go.functions.len() as u64;
            report.oddities.dropped += go.dropped;
            Ok(Some(go))
        }
        Err(fault) => {
            report.go_fault = Some(fault.0);
            Ok(None)
        }
    }
}

/// The sources that know the rows of pieces.
struct Sources<'d> {
    eh_frame: Entries<'d, EhFrame<Slice<'d>>>,
    go: Option<GoFunctions<'d>>,
    debug_frame: Entries<'d, DebugFrame<Slice<'d>>>,
    code: Vec<instructions::Function>,
    /// Indices of pieces of which a frame stands for list frames.
    lists: HashSet<usize>,
}

impl Sources<'_> {
    /// Lays out the rows of all pieces. Returns the table, and whether a rule of it finds a frame by rbx.
    fn lay_out(
        &self,
        arch: Arch,
        pieces: &[Piece],
        with_rbx: bool,
        options: &BuildOptions<'_>,
        budget: &mut Budget<'_>,
        report: &mut BuildReport,
    ) -> Result<(UnwindTable, bool), BuildFault> {
        let (start, end) = match (pieces.first(), pieces.last()) {
            (Some(first), Some(last)) => (first.start, last.end),
            _ => (0, 0),
        };
        let mut builder =
            TableBuilder::new(arch, start, end, options.limits)?.runs(options.runs && !with_rbx);
        let mut unsupported = 0;
        let mut by_rbx = false;
        for (index, piece) in pieces.iter().enumerate() {
            let list = if self.lists.contains(&index) { flags::LIST } else { 0 };
            let mut row = |pc: u64, mut rule: UnwindRule| -> Result<(), BuildFault> {
                if pc >= piece.end {
                    return Ok(());
                }
                if !matches!(rule.cfa_kind, cfa::NONE | cfa::UNSUPPORTED) {
                    rule.flags |= list;
                }
                unsupported += u64::from(rule.cfa_kind == cfa::UNSUPPORTED);
                by_rbx |= rule.cfa_kind == cfa::REGISTER + dwarf_register::X86_64_RBX as u8;
                // Rows before the piece begins replace one another: the last one holds at its start.
                Ok(builder.push(pc.max(piece.start), rule)?)
            };
            self.rows(piece, with_rbx, budget, &mut row)?;
            if pieces.get(index + 1).is_some_and(|next| next.start > piece.end) {
                builder.push(piece.end, UnwindRule::NONE)?;
            }
        }
        report.unsupported_rows = unsupported;
        Ok((builder.finish()?, by_rbx && arch == Arch::X86_64))
    }

    /// Calls `row` with the rows of one piece, ascending; some may be outside of it.
    fn rows(
        &self,
        piece: &Piece,
        with_rbx: bool,
        budget: &mut Budget<'_>,
        row: &mut dyn FnMut(u64, UnwindRule) -> Result<(), BuildFault>,
    ) -> Result<(), BuildFault> {
        match piece.source {
            Source::EhFrame(index) => {
                self.eh_frame.rows(&self.eh_frame.functions[index as usize], with_rbx, budget, row)
            }
            Source::DebugFrame(index) => {
                self.debug_frame.rows(&self.debug_frame.functions[index as usize], with_rbx, budget, row)
            }
            Source::Go(index) => match &self.go {
                Some(go) => go.rows(&go.functions[index as usize], budget, row),
                None => Ok(()),
            },
            Source::Fixed(rule) => row(piece.start, rule),
            Source::Code(index) => {
                self.code[index as usize].rows.iter().try_for_each(|(pc, rule)| row(*pc, *rule))
            }
        }
    }
}
