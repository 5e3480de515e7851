//! Go's own function table (`.gopclntab`, Go 1.16 and later): exact stack depths for every instruction.
//!
//! Go programs have no `.eh_frame` for Go code, and `.debug_frame` is gone once they are stripped; the function table
//! always stays, because the runtime walks stacks with it.
use crate::elf::Segments;
use crate::format::{Rule, cfa, dwarf_register, loc};
use crate::limits::{Budget, Exceeded, Quantity, at_most};
use crate::table::Arch;

/// A broken function table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Broken(pub(crate) &'static str);

/// One Go function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Function {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Offset of its record in the table.
    record: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Version {
    Go116,
    Go118,
    Go120,
}

/// The table of one file.
#[derive(Debug)]
pub(crate) struct FunctionTable<'d> {
    bytes: &'d [u8],
    arch: Arch,
    version: Version,
    quantum: u64,
    names_at: usize,
    pcs_at: usize,
    functions_at: usize,
    pub(crate) functions: Vec<Function>,
    /// Functions outside all executable segments or out of order.
    pub(crate) dropped: u64,
}

/// `_func.flag`: the outermost function of a stack.
const FLAG_TOP_FRAME: u8 = 1;
/// `_func.flag`: the function sets the stack pointer, so its depth means nothing.
const FLAG_WRITES_SP: u8 = 2;
/// Longest name that is compared with the few that matter.
const MAX_NAME_BYTES: usize = 64;
/// Steps of one function's stack depth; far above what a compiler makes, and it ends a table that never ends.
const MAX_STEPS: usize = 1 << 20;

impl<'d> FunctionTable<'d> {
    /// Reads the header and the list of functions. `text_start` is the address of the first function for tables whose
    /// header does not say it (it is filled in when a position-independent program starts).
    pub(crate) fn parse(
        bytes: &'d [u8],
        arch: Arch,
        segments: &Segments,
        text_start: Option<u64>,
        budget: &mut Budget<'_>,
    ) -> Result<Result<Self, Broken>, Exceeded> {
        let header = Header::parse(bytes, text_start);
        let (header, version) = match header {
            Ok(header) => header,
            Err(broken) => return Ok(Err(broken)),
        };
        at_most(Quantity::Functions, budget.limits.functions, header.function_count)?;
        let mut table = Self {
            bytes,
            arch,
            version,
            quantum: header.quantum,
            names_at: header.names_at,
            pcs_at: header.pcs_at,
            functions_at: header.functions_at,
            functions: Vec::new(),
            dropped: 0,
        };
        let mut last = 0;
        for index in 0..header.function_count as usize {
            budget.step()?;
            let entry = |index: usize| table.function_entry(index, header.text_start);
            let (Some((start, record)), Some((end, _))) = (entry(index), entry(index + 1)) else {
                return Ok(Err(Broken("the list of functions is cut off")));
            };
            match segments.executable_end(start) {
                Some(limit) if start < end && start >= last => {
                    last = end.min(limit);
                    table.functions.push(Function { start, end: last, record });
                }
                _ => table.dropped += 1,
            }
        }
        Ok(Ok(table))
    }

    /// Start address and record offset of the function at `index`; for the one behind the last only the address.
    fn function_entry(&self, index: usize, text_start: u64) -> Option<(u64, u32)> {
        if self.version == Version::Go116 {
            let at = self.functions_at + index * 16;
            Some((read_u64(self.bytes, at)?, read_u64(self.bytes, at + 8).unwrap_or(0) as u32))
        } else {
            let at = self.functions_at + index * 8;
            let start = text_start.checked_add(u64::from(read_u32(self.bytes, at)?))?;
            Some((start, read_u32(self.bytes, at + 4).unwrap_or(0)))
        }
    }

    /// Calls `row` with each address from which another rule holds in a function, ascending, and the rule.
    pub(crate) fn rows<E: From<Exceeded>>(
        &self,
        function: &Function,
        budget: &mut Budget<'_>,
        mut row: impl FnMut(u64, Rule) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(record) = self.record(function) else {
            return row(function.start, Rule::FRAME_POINTER);
        };
        if record.flags & (FLAG_TOP_FRAME | FLAG_WRITES_SP) != 0 {
            let name = self.name(&record);
            // The signal trampoline is called top frame because Go ends its traces there; its caller is known.
            if record.flags & FLAG_TOP_FRAME != 0 && !name.ends_with(b"igtramp") {
                return row(function.start, Rule::OUTERMOST);
            }
            if record.flags & FLAG_WRITES_SP != 0 {
                return row(function.start, Rule::FRAME_POINTER);
            }
        }
        if function.end - function.start <= 32 && self.name(&record).starts_with(b"runtime.sigreturn") {
            return row(function.start, signal_rule(self.arch));
        }
        let Some(mut at) = self.pcs_at.checked_add(record.pcsp as usize) else {
            return row(function.start, Rule::FRAME_POINTER);
        };
        if record.pcsp == 0 {
            return row(function.start, Rule::FRAME_POINTER);
        }
        let mut depth: i32 = -1;
        let mut pc = function.start;
        for step in 0..MAX_STEPS {
            budget.step()?;
            let Some(change) = read_varint(self.bytes, &mut at) else { break };
            if change == 0 && step > 0 {
                break;
            }
            depth = depth.wrapping_add((change >> 1) as i32 ^ -((change & 1) as i32));
            let Some(length) = read_varint(self.bytes, &mut at) else { break };
            row(pc, self.rule(depth))?;
            pc = pc.saturating_add(u64::from(length).saturating_mul(self.quantum));
            if pc >= function.end {
                return Ok(());
            }
        }
        // The table says nothing about the rest.
        row(pc, Rule::FRAME_POINTER)
    }

    /// The rule at a stack depth: bytes between the stack pointer and the return address (x86_64) or the caller's
    /// stack pointer (aarch64).
    ///
    /// The frame pointer is saved on top of every frame that has any depth. In the few instructions before that is
    /// done it is not there yet; Go's own frames do not need it, so only a C caller of the innermost frame would.
    fn rule(&self, depth: i32) -> Rule {
        let Ok(depth) = u32::try_from(depth) else { return Rule::FRAME_POINTER };
        let Ok(depth) = i32::try_from(depth).map(|depth| depth.min(i32::MAX - 16)) else {
            return Rule::FRAME_POINTER;
        };
        match self.arch {
            Arch::X86_64 if depth == 0 => Rule::X86_64_ENTRY,
            Arch::X86_64 => Rule { fp_kind: loc::CFA, fp_offset: -16, ..Rule::x86_64_sp(depth + 8) },
            Arch::Aarch64 if depth == 0 => Rule {
                cfa_kind: cfa::SP,
                ra_kind: loc::REGISTER + dwarf_register::AARCH64_LR as u8,
                ..Rule::NONE
            },
            Arch::Aarch64 => Rule {
                cfa_kind: cfa::SP,
                cfa_offset: depth,
                fp_kind: loc::SP,
                fp_offset: -8,
                ra_kind: loc::SP,
                ra_offset: 0,
                flags: 0,
            },
        }
    }

    fn record(&self, function: &Function) -> Option<Record> {
        let at = self.functions_at.checked_add(function.record as usize)?;
        // Go 1.16 and 1.17 begin the record with a whole address.
        let after_entry = at.checked_add(if self.version == Version::Go116 { 8 } else { 4 })?;
        let flags_at = after_entry + if self.version == Version::Go120 { 37 } else { 33 };
        Some(Record {
            name: read_u32(self.bytes, after_entry)?,
            pcsp: read_u32(self.bytes, after_entry + 12)?,
            flags: *self.bytes.get(flags_at)?,
        })
    }

    fn name(&self, record: &Record) -> &'d [u8] {
        let bytes = self.names_at.checked_add(record.name as usize).and_then(|at| self.bytes.get(at..));
        let bytes = bytes.map_or(&[][..], |bytes| &bytes[..bytes.len().min(MAX_NAME_BYTES)]);
        bytes.split(|byte| *byte == 0).next().unwrap_or_default()
    }
}

struct Record {
    name: u32,
    pcsp: u32,
    flags: u8,
}

struct Header {
    quantum: u64,
    function_count: u64,
    text_start: u64,
    names_at: usize,
    pcs_at: usize,
    functions_at: usize,
}

impl Header {
    fn parse(bytes: &[u8], text_start: Option<u64>) -> Result<(Self, Version), Broken> {
        let magic = read_u32(bytes, 0).ok_or(Broken("the function table is empty"))?;
        let version = match magic {
            0xffff_fffa => Version::Go116,
            0xffff_fff0 => Version::Go118,
            0xffff_fff1 => Version::Go120,
            _ => return Err(Broken("the function table has an unknown form (Go 1.16 and later are known)")),
        };
        let cut = Broken("the header of the function table is cut off");
        let quantum = u64::from(*bytes.get(6).ok_or(cut)?);
        if bytes.get(7) != Some(&8) || quantum == 0 {
            return Err(Broken("the function table is not for 64 bits"));
        }
        let word = |index: usize| read_u64(bytes, 8 + index * 8).ok_or(cut);
        // Go 1.18 put the start of the text between the counts and the offsets.
        let shift = usize::from(version >= Version::Go118);
        let offset =
            |index: usize| word(index).map(|offset| usize::try_from(offset).unwrap_or(usize::MAX / 2));
        let in_header = if shift == 1 { word(2)? } else { 0 };
        let header = Self {
            quantum,
            function_count: word(0)?,
            text_start: if in_header == 0 { text_start.unwrap_or(0) } else { in_header },
            names_at: offset(2 + shift)?,
            pcs_at: offset(5 + shift)?,
            functions_at: offset(6 + shift)?,
        };
        if header.functions_at > bytes.len() || header.pcs_at > bytes.len() {
            return Err(Broken("parts of the function table are outside it"));
        }
        // Each entry takes at least 8 bytes, so that a count alone cannot ask for more than the file has.
        if header.function_count > bytes.len() as u64 / 8 {
            return Err(Broken("the function table is shorter than its list of functions"));
        }
        Ok((header, version))
    }
}

/// The offset in the header of the address of the first function, for those that must ask the relocations.
pub(crate) const TEXT_START_AT: u64 = 24;

pub(crate) fn signal_rule(arch: Arch) -> Rule {
    match arch {
        Arch::X86_64 => Rule::X86_64_SIGNAL,
        Arch::Aarch64 => Rule::AARCH64_SIGNAL,
    }
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn read_varint(bytes: &[u8], at: &mut usize) -> Option<u32> {
    let mut value = 0_u32;
    for shift in (0..35).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u32::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
