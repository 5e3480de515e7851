//! DWARF call frame information (`.eh_frame`, `.debug_frame`) to rows.
//!
//! gimli reads the entries; what their instructions mean for the four registers that a walk needs is worked out
//! here, because that is all the table has room for, and at a fraction of the cost of all registers.
use std::collections::HashMap;

use gannet_elf::{Arch, Segments};
use gimli::{
    BaseAddresses, CallFrameInstruction, CommonInformationEntry, EndianSlice, LittleEndian, Operation,
    Register, UnwindExpression, UnwindOffset, UnwindSection,
};

use crate::format::{Rule, Unsupported, cfa, deref_offset, dwarf_register, flags, loc};
use crate::limits::{Budget, Exceeded, Quantity, at_most};

pub(crate) type Slice<'d> = EndianSlice<'d, LittleEndian>;

/// Depth of `DW_CFA_remember_state`; compilers use one or two.
const MAX_REMEMBERED: usize = 64;
/// Operations of an expression that are looked at; the longest known one has nine.
const MAX_OPERATIONS: usize = 12;

/// A range of addresses and the entry that speaks of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Function {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) offset: u32,
}

/// What was wrong with entries; none of it stops the work.
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
    initial: Option<State>,
    registers: Registers,
}

/// DWARF numbers of what a walk needs, in one file.
#[derive(Clone, Copy)]
struct Registers {
    sp: u16,
    fp: u16,
    ra: u16,
    /// x86_64 only.
    rbx: Option<u16>,
}

impl Registers {
    fn are_followed(&self, register: u16) -> bool {
        [self.sp, self.fp, self.ra].contains(&register) || self.rbx == Some(register)
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Cfa {
    Register(u16, i64),
    Deref { fp: bool, at: i64, plus: i64 },
    Plt(u8),
    Bad(Unsupported),
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Place {
    Unset,
    Same,
    Undefined,
    AtCfa(i64),
    At {
        fp: bool,
        offset: i64,
    },
    In(u16),
    /// The value is the frame address plus this.
    IsCfa(i64),
    Bad,
}

#[derive(Clone, Copy, PartialEq, Debug)]
struct State {
    cfa: Cfa,
    fp: Place,
    ra: Place,
    sp: Place,
    rbx: Place,
    ra_signed: bool,
}

const START: State = State {
    cfa: Cfa::Bad(Unsupported::Malformed),
    fp: Place::Unset,
    ra: Place::Unset,
    sp: Place::Unset,
    rbx: Place::Unset,
    ra_signed: false,
};

/// Instructions that contradict themselves.
struct Nonsense;

impl<'d, S> Entries<'d, S>
where
    S: UnwindSection<Slice<'d>>,
    S::Offset: UnwindOffset<usize>,
{
    /// Reads all entries of a section (`bytes` is what `section` was made from) and sorts their ranges.
    ///
    /// Every entry is looked at, also behind one that is broken and behind a terminator in the middle.
    pub(crate) fn collect(
        section: S,
        bytes: &'d [u8],
        is_eh_frame: bool,
        bases: BaseAddresses,
        arch: Arch,
        segments: &Segments,
        budget: &mut Budget<'_>,
    ) -> Result<Self, Exceeded> {
        let mut entries = Self {
            section,
            bases,
            arch,
            cies: HashMap::new(),
            functions: Vec::new(),
            oddities: Oddities::default(),
        };
        let cie_id = if is_eh_frame { 0 } else { u64::from(u32::MAX) };
        for (offset, id) in (Walk { bytes, at: 0, is_eh_frame }) {
            budget.step()?;
            if id == cie_id || (!is_eh_frame && id == u64::MAX) {
                entries.add_cie(offset, budget)?;
            }
        }
        let mut last = 0;
        let mut sorted = true;
        let mut walk = Walk { bytes, at: 0, is_eh_frame };
        for (offset, id) in walk.by_ref() {
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
                    at_most(Quantity::Functions, budget.limits.functions, count)?;
                    entries.functions.push(Function { start, end: end.min(limit), offset: offset as u32 });
                }
                _ => entries.oddities.dropped += 1,
            }
        }
        if walk.at < bytes.len() {
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

    fn add_cie(&mut self, offset: usize, budget: &mut Budget<'_>) -> Result<(), Exceeded> {
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
        let mut state = START;
        let mut instructions = entry.instructions(&self.section, &self.bases);
        let initial = loop {
            budget.step()?;
            match instructions.next() {
                Ok(None) => break Some(state),
                Err(_) => break None,
                Ok(Some(instruction)) => {
                    let applied = apply(
                        &self.section,
                        &entry,
                        registers,
                        &START,
                        &mut state,
                        &mut Vec::new(),
                        &instruction,
                    );
                    if applied.is_err() {
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
                // Only an entry that the walk came by counts, so that work stays linear in the section's size.
                let cie: usize = UnwindOffset::into(cie);
                self.cies.get(&cie).map(|cie| cie.entry.clone()).ok_or(gimli::Error::NotCiePointer(0))
            })
            .ok()
    }

    fn range(&self, offset: usize) -> Option<(u64, u64)> {
        let fde = self.fde(offset)?;
        Some((fde.initial_address(), fde.initial_address().checked_add(fde.len())?))
    }

    /// Calls `row` with each address from which another rule holds in a function, ascending, and the rule. Rules say where
    /// rbx is only if that is asked for: it makes more of them.
    pub(crate) fn rows<E: From<Exceeded>>(
        &self,
        function: &Function,
        with_rbx: bool,
        budget: &mut Budget<'_>,
        mut row: impl FnMut(u64, Rule) -> Result<(), E>,
    ) -> Result<(), E> {
        let unsupported = Rule::unsupported(Unsupported::Malformed);
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
        let mut state = initial;
        let mut remembered = Vec::new();
        let mut pc = function.start;
        let mut changed = true;
        let mut restored = Restored::default();
        let mut rule_of = |state: &State| {
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
                    let applied = apply(
                        &self.section,
                        fde.cie(),
                        cie.registers,
                        &initial,
                        &mut state,
                        &mut remembered,
                        &instruction,
                    );
                    if applied.is_err() {
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

/// Sees when an epilogue has taken the frame pointer, or rbx, from its slot.
///
/// Compilers do not say so: their entries go on to name the slot when it is below the stack pointer, where a signal
/// handler may write at any time and where a copy of the stack does not reach. A slot that was above the stack pointer
/// and then is below has been popped, and the register holds the caller's value. (One that never was above is in the
/// red zone and stays in use.)
#[derive(Default)]
struct Restored {
    was_above: bool,
    rbx_was_above: bool,
}

impl Restored {
    fn apply(&mut self, mut rule: Rule) -> Rule {
        if rule.fp_kind == loc::CFA {
            let below =
                rule.cfa_kind == cfa::SP && i64::from(rule.cfa_offset) + i64::from(rule.fp_offset) < 0;
            if below && self.was_above {
                rule.fp_kind = loc::SAME;
                rule.fp_offset = 0;
            }
            self.was_above |= !below;
        }
        if let slot @ 2.. = rule.rbx() {
            let below = rule.cfa_kind == cfa::SP && rule.cfa_offset < 8 * i32::from(slot);
            if below && self.rbx_was_above {
                rule.flags ^= (slot ^ flags::RBX_SAME) << flags::RBX_SHIFT;
            }
            self.rbx_was_above |= !below;
        }
        rule
    }
}

/// The entries of a section by their lengths alone: offset and CIE pointer of each.
struct Walk<'d> {
    bytes: &'d [u8],
    at: usize,
    is_eh_frame: bool,
}

impl Iterator for Walk<'_> {
    type Item = (usize, u64);

    fn next(&mut self) -> Option<Self::Item> {
        let word = |at: usize| Some(u32::from_le_bytes(*self.bytes.get(at..)?.first_chunk()?));
        let long = |at: usize| Some(u64::from_le_bytes(*self.bytes.get(at..)?.first_chunk()?));
        // A terminator, or what the linker filled up with.
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

/// Cuts each range where the next begins; of several with one start only the first is kept.
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

fn apply<'d, S: UnwindSection<Slice<'d>>>(
    section: &S,
    cie: &CommonInformationEntry<Slice<'d>>,
    registers: Registers,
    initial: &State,
    state: &mut State,
    remembered: &mut Vec<State>,
    instruction: &CallFrameInstruction<usize>,
) -> Result<(), Nonsense> {
    use CallFrameInstruction as I;
    let factor = cie.data_alignment_factor();
    let scaled = |offset: i64| offset.checked_mul(factor).unwrap_or(i64::MAX);
    let unsigned = |offset: u64| i64::try_from(offset).map_or(i64::MAX, scaled);
    let plain = |offset: u64| i64::try_from(offset).unwrap_or(i64::MAX);
    let mut set = |register: Register, place: Place| {
        if register.0 == registers.fp {
            state.fp = place;
        } else if register.0 == registers.sp {
            state.sp = place;
        } else if register.0 == registers.ra {
            state.ra = place;
        } else if Some(register.0) == registers.rbx {
            state.rbx = place;
        }
    };
    match instruction {
        I::DefCfa { register, offset } => state.cfa = Cfa::Register(register.0, plain(*offset)),
        I::DefCfaSf { register, factored_offset } => {
            state.cfa = Cfa::Register(register.0, scaled(*factored_offset));
        }
        I::DefCfaRegister { register } => match &mut state.cfa {
            Cfa::Register(current, _) => *current = register.0,
            _ => return Err(Nonsense),
        },
        I::DefCfaOffset { offset } => match &mut state.cfa {
            Cfa::Register(_, current) => *current = plain(*offset),
            _ => return Err(Nonsense),
        },
        I::DefCfaOffsetSf { factored_offset } => match &mut state.cfa {
            Cfa::Register(_, current) => *current = scaled(*factored_offset),
            _ => return Err(Nonsense),
        },
        I::DefCfaExpression { expression } => state.cfa = cfa_expression(section, cie, registers, expression),
        I::Undefined { register } => set(*register, Place::Undefined),
        I::SameValue { register } => set(*register, Place::Same),
        I::Offset { register, factored_offset } => set(*register, Place::AtCfa(unsigned(*factored_offset))),
        I::OffsetExtendedSf { register, factored_offset } => {
            set(*register, Place::AtCfa(scaled(*factored_offset)));
        }
        I::ValOffset { register, factored_offset } => {
            set(*register, Place::IsCfa(unsigned(*factored_offset)));
        }
        I::ValOffsetSf { register, factored_offset } => {
            set(*register, Place::IsCfa(scaled(*factored_offset)));
        }
        I::Register { dest_register, src_register } => set(*dest_register, Place::In(src_register.0)),
        I::Expression { register, expression } if registers.are_followed(register.0) => {
            set(*register, place_expression(section, cie, registers, expression));
        }
        I::ValExpression { register, .. } => set(*register, Place::Bad),
        I::Restore { register } => {
            let at_start = [
                (Some(registers.fp), initial.fp),
                (Some(registers.sp), initial.sp),
                (Some(registers.ra), initial.ra),
                (registers.rbx, initial.rbx),
            ];
            if let Some((_, place)) = at_start.into_iter().find(|(number, _)| *number == Some(register.0)) {
                set(*register, place);
            }
        }
        I::RememberState => {
            if remembered.len() == MAX_REMEMBERED {
                return Err(Nonsense);
            }
            remembered.push(*state);
        }
        I::RestoreState => *state = remembered.pop().ok_or(Nonsense)?,
        I::NegateRaState => state.ra_signed = !state.ra_signed,
        // Locations are the caller's business; a CIE has none, and one that has is taken as if it had not.
        _ => {}
    }
    Ok(())
}

/// The first operations of an expression, in a form that can be matched.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Op {
    Base(u16, i64),
    Deref,
    Number(u64),
    PlusNumber(u64),
    Plus,
    And,
    Ge,
    Shl,
    Other,
}

fn operations<'d, S: UnwindSection<Slice<'d>>>(
    section: &S,
    cie: &CommonInformationEntry<Slice<'d>>,
    expression: &UnwindExpression<usize>,
) -> Vec<Op> {
    let Ok(expression) = expression.get(section) else { return vec![Op::Other] };
    let mut operations = expression.operations(cie.encoding());
    let mut found = Vec::new();
    while found.len() < MAX_OPERATIONS {
        found.push(match operations.next() {
            Ok(None) => break,
            Err(_) => Op::Other,
            Ok(Some(operation)) => match operation {
                Operation::RegisterOffset { register, offset, .. } => Op::Base(register.0, offset),
                Operation::Deref { size: 8, space: false, .. } => Op::Deref,
                Operation::UnsignedConstant { value } => Op::Number(value),
                Operation::SignedConstant { value } => Op::Number(value as u64),
                Operation::PlusConstant { value } => Op::PlusNumber(value),
                Operation::Plus => Op::Plus,
                Operation::And => Op::And,
                Operation::Ge => Op::Ge,
                Operation::Shl => Op::Shl,
                _ => Op::Other,
            },
        });
    }
    found
}

fn cfa_expression<'d, S: UnwindSection<Slice<'d>>>(
    section: &S,
    cie: &CommonInformationEntry<Slice<'d>>,
    registers: Registers,
    expression: &UnwindExpression<usize>,
) -> Cfa {
    let bad = Cfa::Bad(Unsupported::Expression);
    let deref = |register: u16, at: i64, plus: u64| {
        let plus = i64::try_from(plus).unwrap_or(i64::MAX);
        match register {
            r if r == registers.sp => Cfa::Deref { fp: false, at, plus },
            r if r == registers.fp => Cfa::Deref { fp: true, at, plus },
            _ => bad,
        }
    };
    match operations(section, cie, expression).as_slice() {
        [Op::Base(register, offset)] => Cfa::Register(*register, *offset),
        [Op::Base(register, at), Op::Deref] => deref(*register, *at, 0),
        [Op::Base(register, at), Op::Deref, Op::PlusNumber(plus)]
        | [Op::Base(register, at), Op::Deref, Op::Number(plus), Op::Plus] => deref(*register, *at, *plus),
        [
            Op::Base(sp, 8),
            Op::Base(pc, 0),
            Op::Number(15),
            Op::And,
            Op::Number(from @ 0..=15),
            Op::Ge,
            Op::Number(3),
            Op::Shl,
            Op::Plus,
        ] if *sp == registers.sp && *pc == registers.ra => Cfa::Plt(*from as u8),
        _ => bad,
    }
}

fn place_expression<'d, S: UnwindSection<Slice<'d>>>(
    section: &S,
    cie: &CommonInformationEntry<Slice<'d>>,
    registers: Registers,
    expression: &UnwindExpression<usize>,
) -> Place {
    match operations(section, cie, expression).as_slice() {
        [Op::Base(register, offset)] if *register == registers.sp => Place::At { fp: false, offset: *offset },
        [Op::Base(register, offset)] if *register == registers.fp => Place::At { fp: true, offset: *offset },
        _ => Place::Bad,
    }
}

/// The rule that a state amounts to.
fn rule(state: &State, registers: Registers, arch: Arch, signal: bool) -> Rule {
    if state.ra == Place::Undefined {
        return Rule::OUTERMOST;
    }
    match try_rule(state, registers, arch) {
        Ok(rule) => {
            let signal = if signal { flags::SIGNAL } else { 0 };
            let signed = if state.ra_signed { flags::RA_SIGNED } else { 0 };
            Rule { flags: signal | signed, ..rule }
        }
        Err(why) => Rule::unsupported(why),
    }
}

/// What a rule can say of where rbx is: see [`flags::RBX_SHIFT`].
fn rbx_of(state: &State) -> u8 {
    match state.rbx {
        Place::Unset | Place::Same => flags::RBX_SAME,
        Place::AtCfa(offset @ -56..=-16) if offset % 8 == 0 => (-offset / 8) as u8,
        _ => 0,
    }
}

fn try_rule(state: &State, registers: Registers, arch: Arch) -> Result<Rule, Unsupported> {
    let narrow = |offset: i64| i32::try_from(offset).map_err(|_| Unsupported::Offset);
    let (cfa_kind, cfa_offset) = match state.cfa {
        Cfa::Register(register, offset) if register == registers.sp => (cfa::SP, narrow(offset)?),
        Cfa::Register(register, offset) if register == registers.fp => (cfa::FP, narrow(offset)?),
        Cfa::Register(register @ 0..32, offset) => (cfa::REGISTER + register as u8, narrow(offset)?),
        Cfa::Register(..) => return Err(Unsupported::Register),
        Cfa::Deref { fp, at, plus } => {
            let kind = if fp { cfa::FP_DEREF } else { cfa::SP_DEREF };
            (kind, deref_offset(at, plus).ok_or(Unsupported::Offset)?)
        }
        Cfa::Plt(from) => (cfa::PLT, i32::from(from)),
        Cfa::Bad(why) => return Err(why),
    };
    // The walk takes the frame address for the caller's stack pointer; an entry may only say the same in other words.
    match state.sp {
        Place::Unset | Place::Same | Place::IsCfa(0) => {}
        Place::At { fp, offset } if state.cfa == (Cfa::Deref { fp, at: offset, plus: 0 }) => {}
        _ => return Err(Unsupported::Register),
    }
    let (fp_kind, fp_offset) = match state.fp {
        Place::Unset | Place::Same => (loc::SAME, 0),
        Place::AtCfa(offset) => (loc::CFA, narrow(offset)?),
        Place::At { fp, offset } => (if fp { loc::FP } else { loc::SP }, narrow(offset)?),
        Place::In(register @ 0..32) => (loc::REGISTER + register as u8, 0),
        Place::Undefined | Place::Bad | Place::IsCfa(_) | Place::In(_) => (loc::UNDEFINED, 0),
    };
    let (ra_kind, ra_offset) = match (state.ra, arch) {
        (Place::AtCfa(offset), _) => (loc::CFA, narrow(offset)?),
        (Place::At { fp, offset }, _) => (if fp { loc::FP } else { loc::SP }, narrow(offset)?),
        (Place::In(register @ 0..32), _) => (loc::REGISTER + register as u8, 0),
        (Place::Unset | Place::Same, Arch::Aarch64) if registers.ra < 32 => {
            (loc::REGISTER + registers.ra as u8, 0)
        }
        _ => return Err(Unsupported::ReturnAddress),
    };
    Ok(Rule { cfa_kind, fp_kind, ra_kind, flags: 0, cfa_offset, fp_offset, ra_offset })
}
