//! Unwinds registers and a copy of a stack, step by step as the kernel side does ([`crate::format`]). The agent completes raw
//! samples with it, and tests compare the kernel side with it.
use std::ops::Range;

use gannet_elf::Arch;

use crate::format::{Unsupported, UnwindRule, cfa, dwarf_register, flags, loc};
use crate::table::UnwindTable;

/// A thread at one moment.
#[derive(Clone, Copy, Debug)]
pub struct ThreadSnapshot<'a> {
    /// The instruction set.
    pub arch: Arch,
    /// The program counter.
    pub pc: u64,
    /// All registers, by DWARF number (x86_64: 0 to 15; aarch64: 0 to 31).
    pub registers: &'a [u64],
    /// Address of the first byte of the copied stack; usually the stack pointer.
    pub stack_start: u64,
    /// The copied stack.
    pub stack: &'a [u8],
    /// Parts of the memory from `stack_start` on that could not be read. The copy has any bytes there, or ends before.
    pub unread: &'a [Range<u64>],
}

/// The code of a process, and its tables.
pub trait TableSource {
    /// Returns the table for an address of the process, and the number to subtract from the address before the look-up.
    fn find(&self, address: u64) -> Option<(&UnwindTable, u64)>;

    /// Returns whether there is code at an address without a table, as just-in-time compilers make it. Such code is unwound by
    /// frame pointer.
    fn is_code(&self, address: u64) -> bool {
        let _ = address;
        false
    }

    /// Returns the rule for a frame of code without a table, if it is known. It is asked once for each such frame, leaf first.
    fn generated(&self, frame: &GeneratedFrame<'_>) -> Option<UnwindRule> {
        let _ = frame;
        None
    }
}

/// A frame of code without a table.
#[derive(Clone, Copy, Debug)]
pub struct GeneratedFrame<'a> {
    /// The program counter, or of a caller the return address.
    pub pc: u64,
    /// Whether `pc` is the address of the instruction itself.
    pub exact: bool,
    /// The stack pointer.
    pub sp: u64,
    /// The frame pointer, if it is known.
    pub fp: Option<u64>,
    /// All registers by DWARF number: of the first frame only.
    pub registers: Option<&'a [u64]>,
    snapshot: &'a ThreadSnapshot<'a>,
}

impl GeneratedFrame<'_> {
    /// Reads a word of the copied stack.
    pub fn read(&self, address: u64) -> Option<u64> {
        self.snapshot.read(address)
    }
}

impl ThreadSnapshot<'_> {
    fn read(&self, address: u64) -> Option<u64> {
        if self.is_unread(address) {
            return None;
        }
        let at = address.checked_sub(self.stack_start).and_then(|at| usize::try_from(at).ok())?;
        self.stack.get(at..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
    }

    /// Returns whether a part of the word at this address could not be read.
    fn is_unread(&self, address: u64) -> bool {
        let end = address.saturating_add(8);
        self.unread.iter().any(|part| address < part.end && part.start < end)
    }
}

/// A frame of an unwound stack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UnwindFrame {
    /// The program counter of the first frame; of a caller the return address.
    pub pc: u64,
    /// Whether `pc` is the address of the instruction itself. Otherwise the call is the instruction before it.
    pub exact: bool,
    /// Whether the frame was found by convention and not by a rule.
    pub guessed: bool,
    /// Of a function that stands for list frames ([`flags::LIST`]): its stack pointer and its frame's address.
    pub list: Option<(u64, u64)>,
}

/// The frames of a stack, and how it ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnwoundStack {
    /// Innermost first; never empty.
    pub frames: Vec<UnwindFrame>,
    /// The reason why it ends.
    pub end: UnwindEnd,
}

/// The reason why unwinding ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnwindEnd {
    /// At the outermost frame.
    Complete,
    /// At the limit of frames, with more to come.
    Truncated,
    /// At an address without a table.
    NoTable {
        /// Address at which unwinding stopped.
        address: u64,
    },
    /// At an address outside all functions, where the frame pointer did not help either.
    NoRule {
        /// Address at which unwinding stopped.
        address: u64,
    },
    /// At a function that the format has no rule for, where the frame pointer did not help either.
    Unsupported(Unsupported),
    /// At a rule that needs a register whose value is not known there.
    RegisterLost,
    /// At memory outside the copied stack.
    StackMissing {
        /// Address at which unwinding stopped.
        address: u64,
    },
    /// At memory of the stack that could not be read when the copy was made.
    Unreadable {
        /// Address at which unwinding stopped.
        address: u64,
    },
    /// At a frame that is not above the one before.
    NoProgress,
}

/// The bits of an address on aarch64, without the signature of pointer authentication.
const AARCH64_ADDRESS: u64 = (1 << 48) - 1;

/// Unwinds a stack to its outermost frame, or up to `max_frames`.
pub fn unwind_stack(
    snapshot: &ThreadSnapshot<'_>,
    tables: &dyn TableSource,
    max_frames: usize,
) -> UnwoundStack {
    let (sp, fp) =
        (dwarf_register::stack_pointer(snapshot.arch), dwarf_register::frame_pointer(snapshot.arch));
    let register = |number: u16| snapshot.registers.get(usize::from(number)).copied();
    let mut unwinder = Unwinder {
        snapshot,
        first: true,
        exact: true,
        pc: snapshot.pc,
        sp: register(sp).unwrap_or(0),
        fp: register(fp),
        rbx: register(dwarf_register::X86_64_RBX),
        list: None,
    };
    let mut frames = vec![UnwindFrame { pc: unwinder.pc, exact: true, guessed: false, list: None }];
    let end = loop {
        let step = unwinder.step(tables);
        if let Some(frame) = frames.last_mut() {
            frame.list = unwinder.list.take();
        }
        match step {
            Ok(guessed) => {
                if frames.len() >= max_frames {
                    break UnwindEnd::Truncated;
                }
                frames.push(UnwindFrame { pc: unwinder.pc, exact: unwinder.exact, guessed, list: None });
            }
            Err(end) => break end,
        }
    };
    UnwoundStack { frames, end }
}

struct Unwinder<'a> {
    snapshot: &'a ThreadSnapshot<'a>,
    first: bool,
    exact: bool,
    pc: u64,
    sp: u64,
    /// `None` after a frame that did not preserve it.
    fp: Option<u64>,
    /// The same; on aarch64 it is `None` from the second frame on.
    rbx: Option<u64>,
    /// Of the frame that the last step left; see [`UnwindFrame::list`].
    list: Option<(u64, u64)>,
}

impl Unwinder<'_> {
    /// Goes to the caller; returns whether by a guess.
    fn step(&mut self, tables: &dyn TableSource) -> Result<bool, UnwindEnd> {
        let address = if self.exact { self.pc } else { self.pc.wrapping_sub(1) };
        let rule = if let Some((table, bias)) = tables.find(address) {
            table.lookup(address.wrapping_sub(bias)).unwrap_or(UnwindRule::NONE)
        } else if let Some(rule) = tables.generated(&self.generated_frame()) {
            rule
        } else {
            let end = UnwindEnd::NoTable { address };
            return if tables.is_code(address) { self.by_frame_pointer(end) } else { Err(end) };
        };
        match rule.cfa_kind {
            cfa::NONE => return self.by_frame_pointer(UnwindEnd::NoRule { address }),
            cfa::UNSUPPORTED => {
                let why = rule.unsupported_reason().unwrap_or(Unsupported::Malformed);
                return self.by_frame_pointer(UnwindEnd::Unsupported(why));
            }
            _ if rule.is_outermost() => return Err(UnwindEnd::Complete),
            _ => {}
        }
        let cfa = self.frame_address(&rule)?;
        if rule.flags & flags::LIST != 0 {
            self.list = Some((self.sp, cfa));
        }
        let ra = self.located(rule.ra_kind, rule.ra_offset, cfa)?;
        let fp = match rule.fp_kind {
            loc::SAME => self.fp,
            loc::UNDEFINED => None,
            kind => Some(self.located(kind, rule.fp_offset, cfa)?),
        };
        let signal = rule.flags & flags::SIGNAL != 0;
        // Stacks grow down, so callers are above; a signal handler may be on another stack, and a first function
        // that has not touched its stack (aarch64) may be level with its caller.
        if cfa <= self.sp && !signal && !(cfa == self.sp && self.first) {
            return Err(UnwindEnd::NoProgress);
        }
        self.rbx = match rule.rbx() {
            0 => None,
            flags::RBX_SAME => self.rbx,
            slot => self.read(cfa.wrapping_sub(8 * u64::from(slot))).ok(),
        };
        self.sp = cfa;
        self.fp = fp;
        self.enter_caller(ra, signal)?;
        Ok(rule.flags & flags::GUESSED != 0)
    }

    fn generated_frame(&self) -> GeneratedFrame<'_> {
        GeneratedFrame {
            pc: self.pc,
            exact: self.exact,
            sp: self.sp,
            fp: self.fp,
            registers: self.first.then_some(self.snapshot.registers),
            snapshot: self.snapshot,
        }
    }

    fn enter_caller(&mut self, ra: u64, signal: bool) -> Result<(), UnwindEnd> {
        self.pc = match self.snapshot.arch {
            Arch::X86_64 => ra,
            Arch::Aarch64 => ra & AARCH64_ADDRESS,
        };
        self.exact = signal;
        self.first = false;
        if self.pc == 0 { Err(UnwindEnd::Complete) } else { Ok(()) }
    }

    fn by_frame_pointer(&mut self, otherwise: UnwindEnd) -> Result<bool, UnwindEnd> {
        let fp = self.fp.filter(|fp| *fp >= self.sp && fp.is_multiple_of(8)).ok_or(otherwise)?;
        let (saved, ra) = (self.read(fp)?, self.read(fp.wrapping_add(8))?);
        self.sp = fp.wrapping_add(16);
        self.fp = Some(saved);
        self.rbx = None;
        self.enter_caller(ra, false)?;
        Ok(true)
    }

    fn frame_address(&self, rule: &UnwindRule) -> Result<u64, UnwindEnd> {
        let plus = |base: u64| base.wrapping_add_signed(i64::from(rule.cfa_offset));
        let deref = |base: u64| {
            let at = base.wrapping_add_signed(i64::from(rule.cfa_offset >> 8));
            Ok(self.read(at)?.wrapping_add(u64::from(rule.cfa_offset as u8)))
        };
        match rule.cfa_kind {
            cfa::SP => Ok(plus(self.sp)),
            cfa::FP => Ok(plus(self.fp.ok_or(UnwindEnd::RegisterLost)?)),
            cfa::SP_DEREF => deref(self.sp),
            cfa::FP_DEREF => deref(self.fp.ok_or(UnwindEnd::RegisterLost)?),
            cfa::PLT => {
                let pushed = i64::from(rule.cfa_offset) <= (self.pc & 15) as i64;
                Ok(self.sp.wrapping_add(if pushed { 16 } else { 8 }))
            }
            kind => Ok(plus(self.register(kind)?)),
        }
    }

    fn located(&self, kind: u8, offset: i32, cfa: u64) -> Result<u64, UnwindEnd> {
        let base = match kind {
            loc::CFA => cfa,
            loc::SP => self.sp,
            loc::FP => self.fp.ok_or(UnwindEnd::RegisterLost)?,
            kind => return self.register(kind),
        };
        self.read(base.wrapping_add_signed(i64::from(offset)))
    }

    /// Returns a register. All of them are known in the first frame only; rbx may be known in others.
    fn register(&self, kind: u8) -> Result<u64, UnwindEnd> {
        let number = u16::from(kind & (cfa::REGISTER - 1));
        let value = match number {
            _ if kind < cfa::REGISTER => None,
            _ if self.first => self.snapshot.registers.get(usize::from(number)).copied(),
            dwarf_register::X86_64_RBX => self.rbx,
            _ => None,
        };
        value.ok_or(UnwindEnd::RegisterLost)
    }

    fn read(&self, address: u64) -> Result<u64, UnwindEnd> {
        self.snapshot.read(address).ok_or_else(|| {
            if self.snapshot.is_unread(address) {
                UnwindEnd::Unreadable { address }
            } else {
                UnwindEnd::StackMissing { address }
            }
        })
    }
}

const _: () = assert!(cfa::REGISTER == loc::REGISTER && cfa::REGISTER.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::deref_offset;
    use crate::limits::TableLimits;
    use crate::table_builder::TableBuilder;

    struct One(UnwindTable);

    impl TableSource for One {
        fn find(&self, address: u64) -> Option<(&UnwindTable, u64)> {
            (0x10_0000..0x20_0000).contains(&address).then_some((&self.0, 0x10_0000))
        }
    }

    fn table(arch: Arch, rows: &[(u64, UnwindRule)]) -> One {
        let limits = TableLimits::default();
        let mut builder = TableBuilder::new(arch, 0x1000, 0x9000, &limits).unwrap();
        for (pc, rule) in rows {
            builder.push(*pc, *rule).unwrap();
        }
        One(builder.finish().unwrap())
    }

    const STOP: UnwindRule = UnwindRule::OUTERMOST;
    const STACK: u64 = 0x7000_0000;

    #[track_caller]
    fn check(
        arch: Arch,
        rows: &[(u64, UnwindRule)],
        pc: u64,
        fp: u64,
        stack: &[u64],
        expected: &[u64],
        end: UnwindEnd,
    ) {
        let mut registers = [0; 32];
        let (sp_number, fp_number) = match arch {
            Arch::X86_64 => (7, 6),
            Arch::Aarch64 => (31, 29),
        };
        registers[sp_number] = STACK;
        registers[fp_number] = fp;
        registers[30] = 0x10_2004;
        registers[3] = STACK + 16;
        let stack: Vec<u8> = stack.iter().flat_map(|word| word.to_le_bytes()).collect();
        let snapshot = ThreadSnapshot {
            arch,
            pc,
            registers: &registers,
            stack_start: STACK,
            stack: &stack,
            unread: &[],
        };
        let unwound = unwind_stack(&snapshot, &table(arch, rows), 8);
        let pcs: Vec<u64> = unwound.frames.iter().map(|frame| frame.pc).collect();
        assert_eq!((pcs.as_slice(), unwound.end), (expected, end));
    }

    /// Checks that a caller is looked up at its call, and that its outermost frame ends the stack (R48).
    #[test]
    fn callers_are_looked_up_one_byte_back() {
        // The caller's call is the last instruction of its function; the next function has another rule.
        let rows = [(0x1000, UnwindRule::x86_64_sp(8)), (0x2000, STOP), (0x2008, UnwindRule::x86_64_sp(64))];
        check(Arch::X86_64, &rows, 0x10_1000, 0, &[0x10_2008], &[0x10_1000, 0x10_2008], UnwindEnd::Complete);
    }

    /// Checks that an interrupted frame is looked up at the interrupted instruction (R48).
    #[test]
    fn below_a_signal_frame_the_address_is_exact() {
        let rows = [(0x1000, UnwindRule::X86_64_SIGNAL), (0x1010, UnwindRule::NONE), (0x2000, STOP)];
        let mut stack = [0; 24];
        stack[120 / 8] = 7;
        stack[160 / 8] = STACK - 0x1000;
        // The first address of its function: one back would be the gap before it.
        stack[168 / 8] = 0x10_2000;
        check(Arch::X86_64, &rows, 0x10_1000, 0, &stack, &[0x10_1000, 0x10_2000], UnwindEnd::Complete);
    }

    /// Checks the rule of functions that align their stack (R48).
    #[test]
    fn a_realigned_frame_is_found_through_its_frame_pointer() {
        let realigned = UnwindRule {
            cfa_kind: cfa::FP_DEREF,
            cfa_offset: deref_offset(-8, 0).unwrap(),
            fp_kind: loc::FP,
            fp_offset: 0,
            ..UnwindRule::X86_64_ENTRY
        };
        let rows = [(0x1000, realigned), (0x2000, STOP)];
        let stack = [0, STACK + 48, 0, 0, 0, 0x10_2001];
        check(
            Arch::X86_64,
            &rows,
            0x10_1000,
            STACK + 16,
            &stack,
            &[0x10_1000, 0x10_2001],
            UnwindEnd::Complete,
        );
    }

    /// Checks that a register rule ends the stack in a caller (R48).
    #[test]
    fn registers_of_callers_are_not_known() {
        let by_rbx = UnwindRule { cfa_kind: cfa::REGISTER + 3, cfa_offset: 8, ..UnwindRule::X86_64_ENTRY };
        let rows = [(0x1000, by_rbx)];
        let stack = [0, 0, 0x10_1001, 0x10_1001];
        check(Arch::X86_64, &rows, 0x10_1000, 0, &stack, &[0x10_1000, 0x10_1001], UnwindEnd::RegisterLost);
    }

    /// Checks that rbx is known in callers as long as each frame locates it (R48).
    #[test]
    fn rbx_is_known_as_long_as_each_frame_locates_it() {
        let with_rbx = |slot: u8, rule: UnwindRule| UnwindRule { flags: slot << flags::RBX_SHIFT, ..rule };
        let by_rbx = UnwindRule { cfa_kind: cfa::REGISTER + 3, cfa_offset: 16, ..UnwindRule::X86_64_ENTRY };
        let rows = |first: UnwindRule| {
            [
                (0x1000, first),
                (0x2000, with_rbx(flags::RBX_SAME, UnwindRule::x86_64_sp(8))),
                (0x3000, by_rbx),
                (0x4000, STOP),
            ]
        };
        // Saved in the second of its frame's words, passed on by the next frame; where it points the third one's is.
        let stack = [0, STACK + 56, 0, 0x10_2001, 0x10_3001, 0, 0, 0, 0x10_4001];
        let complete = [0x10_1000, 0x10_2001, 0x10_3001, 0x10_4001];
        let saved = rows(with_rbx(3, UnwindRule::x86_64_sp(32)));
        check(Arch::X86_64, &saved, 0x10_1000, 0, &stack, &complete, UnwindEnd::Complete);
        for first in [UnwindRule::x86_64_sp(32), with_rbx(7, UnwindRule::x86_64_sp(32))] {
            // No rule locates it, or it is below the copied stack.
            check(Arch::X86_64, &rows(first), 0x10_1000, 0, &stack, &complete[..3], UnwindEnd::RegisterLost);
        }
    }

    /// Checks that a frame pointer is used only without a rule, and only if it is plausible (R48).
    #[test]
    fn frame_pointers_serve_only_where_there_is_no_rule() {
        let lost = UnwindRule { fp_kind: loc::UNDEFINED, ..UnwindRule::X86_64_ENTRY };
        let rows = [(0x1000, UnwindRule::NONE), (0x2000, STOP), (0x3000, lost), (0x4000, UnwindRule::NONE)];
        let stack = [0x10_4004, 0, STACK + 100, 0x10_2001];
        let fp = STACK + 16;
        check(Arch::X86_64, &rows, 0x10_1000, fp, &stack, &[0x10_1000, 0x10_2001], UnwindEnd::Complete);
        // Below the stack pointer, or not aligned, it is no frame pointer.
        let none = UnwindEnd::NoRule { address: 0x10_1000 };
        check(Arch::X86_64, &rows, 0x10_1000, STACK - 8, &stack, &[0x10_1000], none);
        check(Arch::X86_64, &rows, 0x10_1000, fp + 4, &stack, &[0x10_1000], none);
        // After a frame that did not preserve it, no frame uses it.
        let none = UnwindEnd::NoRule { address: 0x10_4003 };
        check(Arch::X86_64, &rows, 0x10_3000, fp, &stack, &[0x10_3000, 0x10_4004], none);
    }

    #[test]
    fn each_end_has_its_reason() {
        let rows = [
            (0x1000, UnwindRule::x86_64_sp(8)),
            (0x3000, UnwindRule::x86_64_sp(0)),
            (0x4000, UnwindRule::x86_64_sp(8)),
        ];
        let missing = UnwindEnd::StackMissing { address: STACK + 8 };
        check(Arch::X86_64, &rows, 0x10_1000, 0, &[0x10_1001], &[0x10_1000, 0x10_1001], missing);
        let no_table = UnwindEnd::NoTable { address: 4 };
        check(Arch::X86_64, &rows, 0x10_1000, 0, &[5], &[0x10_1000, 5], no_table);
        let stack = [0x10_3001, 0x10_3001];
        check(Arch::X86_64, &rows, 0x10_1000, 0, &stack, &[0x10_1000, 0x10_3001], UnwindEnd::NoProgress);
        let deep = [0x10_1001; 20];
        check(Arch::X86_64, &rows, 0x10_1001, 0, &deep, &[0x10_1001; 8], UnwindEnd::Truncated);
        check(Arch::X86_64, &rows, 0x10_1001, 0, &[0x10_1001, 0], &[0x10_1001; 2], UnwindEnd::Complete);
    }

    /// Checks that the zeros in place of memory that could not be read are no return address, which would end the stack.
    #[test]
    fn a_part_that_could_not_be_read_is_no_end_of_the_stack() {
        let rows = [(0x1000, UnwindRule::x86_64_sp(16)), (0x3000, UnwindRule::NONE)];
        let mut registers = [0; 32];
        (registers[7], registers[6]) = (STACK, STACK + 32);
        let words = [1, 0x10_1001, 0, 0, 0, 0x10_1001];
        let stack: Vec<u8> = words.iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
        // By a rule and by frame pointer; in the copy, at its edge, and behind its end.
        let cases = [
            (0x10_1000, STACK + 16..STACK + 32, STACK + 24, 2),
            (0x10_1000, STACK + 31..STACK + 40, STACK + 24, 2),
            (0x10_1000, STACK + 48..STACK + 64, STACK + 56, 4),
            (0x10_3000, STACK + 32..STACK + 40, STACK + 32, 1),
            (0x10_3000, STACK + 40..STACK + 48, STACK + 40, 1),
        ];
        for (pc, unread, address, frames) in cases {
            let mut stack = stack.clone();
            if unread.end > STACK + 40 {
                stack[24..32].copy_from_slice(&0x10_1001_u64.to_le_bytes());
            }
            let snapshot = ThreadSnapshot {
                arch: Arch::X86_64,
                pc,
                registers: &registers,
                stack_start: STACK,
                stack: &stack,
                unread: std::slice::from_ref(&unread),
            };
            let unwound = unwind_stack(&snapshot, &table(Arch::X86_64, &rows), 8);
            let end = UnwindEnd::Unreadable { address };
            assert_eq!((unwound.end, unwound.frames.len()), (end, frames), "{unread:x?}");
        }
    }

    #[test]
    fn aarch64_link_registers_and_signatures_are_understood() {
        let lr = loc::REGISTER + 30;
        let leaf = UnwindRule { cfa_kind: cfa::SP, ra_kind: lr, ..UnwindRule::NONE };
        let framed = UnwindRule { cfa_kind: cfa::FP, cfa_offset: 32, ..UnwindRule::FRAME_POINTER };
        let framed = UnwindRule { fp_offset: -32, ra_offset: -24, flags: flags::RA_SIGNED, ..framed };
        let rows = [(0x1000, leaf), (0x2000, framed), (0x3000, STOP)];
        let stack = [STACK + 64, 0x00b4_0000_0010_3008, 0, 0];
        let expected = [0x10_1000, 0x10_2004, 0x10_3008];
        check(Arch::Aarch64, &rows, 0x10_1000, STACK, &stack, &expected, UnwindEnd::Complete);
    }
}
