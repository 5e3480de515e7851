//! DWARF call frame information (`.eh_frame`, `.debug_frame`) to unwind rows.
//!
//! gimli reads the entries. This module evaluates their instructions for the four registers that unwinding needs: the
//! table has room for no more, and all registers would cost many times as much.

mod evaluate;
mod expression;
mod registers;
mod rule;

use foldhash::{HashMap, HashMapExt};
use gannet_elf::{Arch, Segments};
use gimli::{
    BaseAddresses, CallFrameInstruction, CommonInformationEntry, EndianSlice, LittleEndian, UnwindOffset,
    UnwindSection,
};

use self::{
    evaluate::EntryContext,
    registers::{RegisterState, Registers},
    rule::{Restored, rbx_of, rule},
};
use crate::format::{Unsupported, UnwindRule, dwarf_register, flags};
use crate::limits::{Budget, LimitExceeded, TableQuantity, at_most};

pub(crate) type Slice<'d> = EndianSlice<'d, LittleEndian>;

/// A range of addresses and the entry that describes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Function {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) offset: u32,
}

/// Faults of entries; none of them stops the work.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Oddities {
    /// Entries that cannot be read.
    pub malformed: u64,
    /// Entries of no length, at address 0 (functions that the linker dropped), or outside all executable segments.
    pub dropped: u64,
    /// Entries that reach into the next one or repeat it, and were cut.
    pub overlapping: u64,
}

/// All entries of one section.
pub(crate) struct Entries<'d, S> {
    section: S,
    bases: BaseAddresses,
    arch: Arch,
    cies: HashMap<usize, Cie<'d>>,
    pub(crate) functions: Vec<Function>,
    pub(crate) oddities: Oddities,
}

struct Cie<'d> {
    entry: CommonInformationEntry<Slice<'d>>,
    /// `None` if its instructions make no sense.
    initial: Option<RegisterState>,
    registers: Registers,
}

impl<'d, S> Entries<'d, S>
where
    S: UnwindSection<Slice<'d>>,
    S::Offset: UnwindOffset<usize>,
{
    /// Reads all entries of a section (`bytes` is what `section` was made from) and sorts their ranges.
    ///
    /// Every entry is read, also behind one that is broken and behind a terminator in the middle.
    pub(crate) fn collect(
        section: S,
        bytes: &'d [u8],
        is_eh_frame: bool,
        bases: BaseAddresses,
        arch: Arch,
        segments: &Segments,
        budget: &mut Budget<'_>,
    ) -> Result<Self, LimitExceeded> {
        let mut entries = Self {
            section,
            bases,
            arch,
            cies: HashMap::new(),
            functions: Vec::new(),
            oddities: Oddities::default(),
        };
        let cie_id = if is_eh_frame { 0 } else { u64::from(u32::MAX) };
        let mut functions = 0;
        for (offset, id) in (EntryLengths { bytes, at: 0, is_eh_frame }) {
            budget.step()?;
            if id == cie_id || (!is_eh_frame && id == u64::MAX) {
                entries.add_cie(offset, budget)?;
            } else {
                functions += 1;
            }
        }
        // A vector that grows takes up to three times the memory for a moment.
        entries.functions.reserve_exact(
            usize::try_from(budget.limits.functions).map_or(functions, |limit| functions.min(limit)),
        );
        let mut last = 0;
        let mut sorted = true;
        let mut entry_lengths = EntryLengths { bytes, at: 0, is_eh_frame };
        for (offset, id) in entry_lengths.by_ref() {
            budget.step()?;
            if id == cie_id || (!is_eh_frame && id == u64::MAX) {
                continue;
            }
            let Some((start, end)) = entries.range(offset) else {
                entries.oddities.malformed += 1;
                continue;
            };
            let segment_end = segments.executable_end(start);
            match segment_end {
                Some(limit) if start != 0 && end > start => {
                    if end > limit {
                        entries.oddities.malformed += 1;
                    }
                    sorted &= start >= last;
                    last = start;
                    let count = entries.functions.len() as u64 + 1;
                    at_most(TableQuantity::Functions, budget.limits.functions, count)?;
                    entries.functions.push(Function { start, end: end.min(limit), offset: offset as u32 });
                }
                _ => entries.oddities.dropped += 1,
            }
        }
        if entry_lengths.at < bytes.len() {
            entries.oddities.malformed += 1;
        }
        if !sorted {
            budget.check()?;
            // Of several with one start the longest comes first, and of those the first in the section.
            entries.functions.sort_unstable_by_key(|f| (f.start, std::cmp::Reverse(f.end), f.offset));
        }
        entries.oddities.overlapping = cut_overlaps(&mut entries.functions);
        Ok(entries)
    }

    fn add_cie(&mut self, offset: usize, budget: &mut Budget<'_>) -> Result<(), LimitExceeded> {
        let Ok(entry) = self.section.cie_from_offset(&self.bases, S::Offset::from(offset)) else {
            self.oddities.malformed += 1;
            return Ok(());
        };
        let registers = Registers {
            sp: dwarf_register::stack_pointer(self.arch),
            fp: dwarf_register::frame_pointer(self.arch),
            ra: entry.return_address_register().0,
            rbx: (self.arch == Arch::X86_64).then_some(dwarf_register::X86_64_RBX),
        };
        let mut state = RegisterState::START;
        let context = EntryContext { section: &self.section, cie: &entry, registers, initial: state };
        let mut remembered = Vec::new();
        let mut instructions = entry.instructions(&self.section, &self.bases);
        let initial = loop {
            budget.step()?;
            match instructions.next() {
                Ok(None) => break Some(state),
                Err(_) => break None,
                Ok(Some(instruction)) => {
                    if context.apply(&mut state, &mut remembered, &instruction).is_err() {
                        break None;
                    }
                }
            }
        };
        self.cies.insert(offset, Cie { entry, initial, registers });
        Ok(())
    }

    fn fde(&self, offset: usize) -> Option<gimli::FrameDescriptionEntry<Slice<'d>>> {
        self.section
            .fde_from_offset(&self.bases, S::Offset::from(offset), |_, _, cie: S::Offset| {
                // Only an entry that the lengths led to counts, so that work stays linear in the section's size.
                let cie: usize = UnwindOffset::into(cie);
                self.cies.get(&cie).map(|cie| cie.entry.clone()).ok_or(gimli::Error::NotCiePointer(0))
            })
            .ok()
    }

    fn range(&self, offset: usize) -> Option<(u64, u64)> {
        let fde = self.fde(offset)?;
        Some((fde.initial_address(), fde.initial_address().checked_add(fde.len())?))
    }

    /// Calls `row` with each address from which another rule holds in a function, ascending, and the rule. Rules tell where
    /// rbx is only with `with_rbx`: that makes more different rules.
    pub(crate) fn rows<E: From<LimitExceeded>>(
        &self,
        function: &Function,
        with_rbx: bool,
        budget: &mut Budget<'_>,
        mut row: impl FnMut(u64, UnwindRule) -> Result<(), E>,
    ) -> Result<(), E> {
        let unsupported = UnwindRule::unsupported(Unsupported::Malformed);
        let Some(fde) = self.fde(function.offset as usize) else {
            return row(function.start, unsupported);
        };
        let Some(cie) = self.cies.get(&fde.cie().offset()) else {
            return row(function.start, unsupported);
        };
        let Some(initial) = cie.initial else {
            return row(function.start, unsupported);
        };
        let signal = fde.is_signal_trampoline();
        let factor = fde.cie().code_alignment_factor();
        let context =
            EntryContext { section: &self.section, cie: fde.cie(), registers: cie.registers, initial };
        let mut state = initial;
        let mut remembered = Vec::new();
        let mut pc = function.start;
        let mut changed = true;
        let mut restored = Restored::default();
        let mut rule_of = |state: &RegisterState| {
            let mut rule = rule(state, cie.registers, self.arch, signal);
            if with_rbx {
                rule.flags |= rbx_of(state) << flags::RBX_SHIFT;
            }
            restored.apply(rule)
        };
        let mut instructions = fde.instructions(&self.section, &self.bases);
        loop {
            budget.step()?;
            let next = match instructions.next() {
                Ok(None) => break,
                Err(_) => return row(pc, unsupported),
                Ok(Some(CallFrameInstruction::AdvanceLoc { delta })) => {
                    pc.saturating_add(factor.saturating_mul(u64::from(delta)))
                }
                Ok(Some(CallFrameInstruction::SetLoc { address })) if address >= pc => address,
                Ok(Some(CallFrameInstruction::Nop)) => continue,
                Ok(Some(instruction)) => {
                    changed = true;
                    if context.apply(&mut state, &mut remembered, &instruction).is_err() {
                        return row(pc, unsupported);
                    }
                    continue;
                }
            };
            if next > pc && changed {
                row(pc, rule_of(&state))?;
                changed = false;
            }
            pc = next;
            if pc >= function.end {
                return Ok(());
            }
        }
        if changed {
            row(pc, rule_of(&state))?;
        }
        Ok(())
    }
}

/// The entries of a section by their lengths alone: offset and CIE pointer of each.
struct EntryLengths<'d> {
    bytes: &'d [u8],
    at: usize,
    is_eh_frame: bool,
}

impl Iterator for EntryLengths<'_> {
    type Item = (usize, u64);

    fn next(&mut self) -> Option<Self::Item> {
        let word = |at: usize| Some(u32::from_le_bytes(*self.bytes.get(at..)?.first_chunk()?));
        let long = |at: usize| Some(u64::from_le_bytes(*self.bytes.get(at..)?.first_chunk()?));
        // A terminator, or padding of the linker.
        while word(self.at)? == 0 {
            self.at += 4;
        }
        let offset = self.at;
        let (body, length) = match word(offset)? {
            u32::MAX => (offset + 12, long(offset + 4)?),
            length => (offset + 4, u64::from(length)),
        };
        let is_long = body - offset == 12;
        let id = if is_long && !self.is_eh_frame { long(body)? } else { u64::from(word(body)?) };
        let end = usize::try_from(length).ok().and_then(|length| body.checked_add(length))?;
        if end > self.bytes.len() {
            return None;
        }
        self.at = end;
        Some((offset, id))
    }
}

/// Cuts each range where the next begins; of several with one start only the first stays.
pub(crate) fn cut_overlaps(functions: &mut Vec<Function>) -> u64 {
    let mut cut = 0;
    functions.dedup_by(|later, earlier| {
        let same = later.start == earlier.start;
        if !same && earlier.end > later.start {
            earlier.end = later.start;
            cut += 1;
        }
        cut += u64::from(same);
        same
    });
    cut
}
