//! Unwind rules for code that a process makes at run time, from its instructions. The caller knows the frame of the code's body
//! from the process; the code says where the frame is made and where it is left.

use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};

use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

use crate::{
    format::{UnwindRule, cfa, loc},
    instructions::{Effect, Flow, Gap, State, functions},
    limits::{Budget, TableLimits},
};

/// DWARF numbers of registers that hold a return address or the caller's stack pointer for a few instructions.
const RAX: u8 = 0;
const R13: u8 = 13;
/// Bytes of the return address.
const RETURN: i32 = 8;
/// A frame that differs from the body's by more than this is a misreading.
const MAX_PUSHED: i32 = 4096;

/// Instructions between a restored rbp and the addition that drops the frame.
const MAX_DROP: usize = 8;

/// Rows of a piece of code: from each address on, until the next, this rule holds.
pub type Rows = Vec<(u64, UnwindRule)>;

/// Returns the rule of `rows` that holds at an address.
pub fn rule_at(rows: &[(u64, UnwindRule)], address: u64) -> Option<UnwindRule> {
    rows.partition_point(|(from, _)| *from <= address).checked_sub(1).map(|at| rows[at].1)
}

/// Code with one frame: a compiled function.
#[derive(Clone, Copy, Debug)]
pub struct FramedCode<'a> {
    /// Bytes of its instructions.
    pub code: &'a [u8],
    /// Address of the first instruction.
    pub start: u64,
    /// Addresses where callers enter it, with nothing but their return address on the stack.
    pub entries: &'a [u64],
    /// From here on the frame is complete, as far as no instruction leaves it.
    pub complete: u64,
    /// Bytes of the frame with the return address; rbp is saved below that. 0: there is no frame.
    pub frame_bytes: i32,
}

impl FramedCode<'_> {
    /// Returns the rule of the body.
    fn body(&self) -> State {
        if self.frame_bytes < 2 * RETURN {
            State::ENTRY
        } else {
            State { sp: Some(self.frame_bytes), fp: None, saved: Some(-2 * RETURN) }
        }
    }

    /// Follows the code from front to back. Behind each `ret` and jump the frame is complete, unless a branch from elsewhere
    /// says how it is.
    pub fn rows(&self) -> Rows {
        let mut rows: Rows = Vec::new();
        let mut known: HashMap<u64, State> = HashMap::new();
        let mut info = InstructionInfoFactory::new();
        let body = self.body();
        let (mut state, mut is_complete) = (State::ENTRY, false);
        for instruction in decode(self.code, self.start) {
            let ip = instruction.ip();
            if !is_complete && ip >= self.complete {
                (state, is_complete) = (body, true);
            }
            if self.entries.contains(&ip) {
                state = State::ENTRY;
            } else if let Some(from_branch) = known.get(&ip) {
                state = *from_branch;
            }
            let is_plausible =
                state.sp.is_some_and(|sp| (RETURN..=self.frame_bytes.max(RETURN) + MAX_PUSHED).contains(&sp));
            if !is_plausible {
                state = body;
            }
            let rule = state.rule();
            if rows.last().is_none_or(|(_, last)| *last != rule) {
                rows.push((ip, rule));
            }
            state.apply(Effect::of(&instruction, &mut info));
            let flow = Flow::of(&instruction);
            if let Flow::Branch(target) | Flow::Jump(target) = flow
                && target > ip
            {
                known.entry(target).or_insert(state);
            }
            if flow.ends() {
                state = body;
            }
        }
        rows
    }
}

/// Returns the rows of a function that keeps a frame pointer. Where the frame is not made yet, or left already, they follow the
/// stack pointer. With `by_call` the first function that it calls makes the frame.
pub fn fp_rows(code: &[u8], start: u64, by_call: bool) -> Rows {
    const MADE: State = State { sp: None, fp: Some(2 * RETURN), saved: Some(-2 * RETURN) };
    let mut rows: Rows = Vec::new();
    let mut known: HashMap<u64, State> = HashMap::new();
    let mut info = InstructionInfoFactory::new();
    let (mut state, mut was_made) = (State::ENTRY, false);
    let all: Vec<Instruction> = decode(code, start).collect();
    for (index, instruction) in all.iter().enumerate() {
        let ip = instruction.ip();
        if let Some(from_branch) = known.get(&ip) {
            state = *from_branch;
        }
        // While rbp points into the frame, nothing else is needed.
        let is_made = state.fp == MADE.fp && state.saved == MADE.saved;
        was_made |= is_made;
        let is_plausible = state.sp.is_some_and(|sp| (RETURN..=MAX_PUSHED).contains(&sp));
        if !is_made && !is_plausible {
            state = if was_made { MADE } else { State::ENTRY };
        }
        let rule = if is_made { MADE } else { state }.rule();
        if rows.last().is_none_or(|(_, last)| *last != rule) {
            rows.push((ip, rule));
        }
        if is_made && restores_fp(instruction) {
            // Before a jump to another function. What the stack pointer has passed says how far it was.
            let dropped = all[index + 1..].iter().take(MAX_DROP).find_map(dropped_bytes);
            state = State { sp: dropped.map(|bytes| bytes.saturating_add(RETURN)), fp: None, saved: None };
        } else {
            state.apply(Effect::of(instruction, &mut info));
        }
        // Builtins of V8 that call C++ pop the return address, and push it again below the arguments.
        if index > 0 && makes_frame(&all[index - 1], instruction) {
            state = MADE;
        }
        let flow = Flow::of(instruction);
        if let Flow::Branch(target) | Flow::Jump(target) = flow
            && target > ip
        {
            known.entry(target).or_insert(state);
        }
        if flow.ends() {
            state = if was_made { MADE } else { State::ENTRY };
        } else if by_call && !was_made && flow == Flow::Call {
            state = MADE;
        }
    }
    rows
}

/// Reports whether an instruction pushes rbp, and the next one copies rsp to rbp.
fn makes_frame(instruction: &Instruction, next: &Instruction) -> bool {
    let is_push = instruction.mnemonic() == Mnemonic::Push && instruction.op0_register() == Register::RBP;
    is_push
        && next.mnemonic() == Mnemonic::Mov
        && (next.op0_register(), next.op1_register()) == (Register::RBP, Register::RSP)
}

/// Reports whether an instruction loads rbp from where it points.
fn restores_fp(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Mov
        && instruction.op0_register() == Register::RBP
        && instruction.op1_kind() == OpKind::Memory
        && instruction.memory_base() == Register::RBP
        && instruction.memory_index() == Register::None
        && instruction.memory_displacement64() == 0
}

/// Returns the bytes that an instruction takes off the stack by addition.
fn dropped_bytes(instruction: &Instruction) -> Option<i32> {
    let is_immediate = matches!(instruction.op1_kind(), OpKind::Immediate8to64 | OpKind::Immediate32to64);
    let is_drop = instruction.mnemonic() == Mnemonic::Add && instruction.op0_register() == Register::RSP;
    (is_drop && is_immediate).then(|| instruction.immediate(1) as i32)
}

/// Returns the rows of several functions in one piece, as far as their instructions say where the frames are. Elsewhere there
/// is no rule.
pub fn unframed_rows(code: &[u8], start: u64, limits: &TableLimits) -> Rows {
    let gap = Gap { start, bytes: addressable(code, start).into() };
    let Ok(found) = functions(&[gap], HashSet::new(), &mut Budget::new(limits, None)) else {
        return Vec::new();
    };
    let mut rows = Vec::new();
    for function in found.functions {
        rows.extend(function.rows);
        rows.push((function.end, UnwindRule::NONE));
    }
    rows
}

/// A frame by rbp, in which the word below the saved rbp is the caller's stack pointer.
pub const SENDER_FRAME: UnwindRule = UnwindRule {
    cfa_kind: cfa::FP_DEREF,
    fp_kind: loc::FP,
    ra_kind: loc::FP,
    flags: 0,
    cfa_offset: -8 << 8,
    fp_offset: 0,
    ra_offset: 8,
};

/// Place of the return address, in code that moves it.
#[derive(Clone, Copy)]
enum Return {
    /// This number of bytes above the stack pointer.
    Stack(i32),
    Rax,
    /// Above the saved rbp, at which rbp points.
    Frame,
}

/// Returns the rows of code that takes its return address off the stack to make room below the caller's frame, and puts it
/// back. `sender` says whether r13 holds the caller's stack pointer from the start. Second: the address behind the push number
/// `pushes` of the new frame, where the frame is complete.
pub fn moved_return_rows(code: &[u8], start: u64, sender: bool, pushes: u32) -> (Rows, Option<u64>) {
    let mut rows: Rows = Vec::new();
    let (mut at, mut has_sender, mut is_fp_saved, mut pushed) = (Return::Stack(0), sender, false, 0);
    for instruction in decode(code, start) {
        let base = UnwindRule::X86_64_ENTRY;
        let mut rule = match at {
            Return::Stack(offset) => {
                UnwindRule { cfa_offset: offset + RETURN, ra_kind: loc::SP, ra_offset: offset, ..base }
            }
            Return::Rax => UnwindRule { cfa_offset: 0, ra_kind: loc::REGISTER + RAX, ra_offset: 0, ..base },
            Return::Frame => UnwindRule { ra_kind: loc::FP, ra_offset: RETURN, ..base },
        };
        if has_sender {
            (rule.cfa_kind, rule.cfa_offset) = (cfa::REGISTER + R13, 0);
        }
        match at {
            Return::Stack(_) if is_fp_saved => (rule.fp_kind, rule.fp_offset) = (loc::SP, 0),
            Return::Frame => (rule.fp_kind, rule.fp_offset) = (loc::FP, 0),
            _ => {}
        }
        if pushed > 0 {
            rule = SENDER_FRAME;
        }
        if rows.last().is_none_or(|(_, last)| *last != rule) {
            rows.push((instruction.ip(), rule));
        }
        let (to, from) = (instruction.op0_register(), instruction.op1_register());
        match (instruction.mnemonic(), at) {
            (Mnemonic::Pop, Return::Stack(0)) if to == Register::RAX && !is_fp_saved => at = Return::Rax,
            (Mnemonic::Push, Return::Rax) if to == Register::RAX => at = Return::Stack(0),
            (Mnemonic::Mov, Return::Rax)
                if from == Register::RAX
                    && instruction.op0_kind() == OpKind::Memory
                    && instruction.memory_base() == Register::RSP
                    && instruction.memory_index() == Register::None
                    && instruction.memory_displacement64() == 0 =>
            {
                at = Return::Stack(0);
            }
            (Mnemonic::Mov, _) if to == Register::R13 && from == Register::RSP => has_sender = true,
            (Mnemonic::Push, Return::Stack(0)) if to == Register::RBP => {
                (at, is_fp_saved) = (Return::Stack(RETURN), true);
            }
            (Mnemonic::Mov, Return::Stack(_)) if to == Register::RBP && from == Register::RSP => {
                at = Return::Frame;
            }
            (Mnemonic::Push, Return::Frame) => {
                pushed += 1;
                if pushed == pushes {
                    return (rows, Some(instruction.next_ip()));
                }
            }
            _ => {}
        }
    }
    (rows, None)
}

/// Returns the rows of code that leaves a frame like [`SENDER_FRAME`]: from the `leave` on, until the jump to the return address.
/// Between them the frame of `SENDER_FRAME` holds.
pub fn left_frame_rows(code: &[u8], start: u64) -> Rows {
    let mut rows: Rows = Vec::new();
    // The register that holds the caller's stack pointer, and the rule behind the `leave`.
    let (mut sender, mut left) = (None, None);
    for instruction in decode(code, start) {
        let (to, from) = (instruction.op0_register(), instruction.op1_register());
        let next = instruction.next_ip();
        match (instruction.mnemonic(), &mut left) {
            (Mnemonic::Mov, None)
                if instruction.memory_base() == Register::RBP
                    && instruction.memory_displacement64().cast_signed() == -8
                    && instruction.op1_kind() == OpKind::Memory =>
            {
                sender = dwarf_number(to);
            }
            (Mnemonic::Leave, None) => {
                if let Some(sender) = sender {
                    let rule = UnwindRule {
                        cfa_kind: cfa::REGISTER + sender,
                        cfa_offset: 0,
                        ra_kind: loc::SP,
                        ra_offset: 0,
                        ..UnwindRule::X86_64_ENTRY
                    };
                    rows.push((next, rule));
                    left = Some(rule);
                }
            }
            (Mnemonic::Pop, Some(rule)) if rule.ra_kind == loc::SP => {
                let Some(register) = dwarf_number(to) else { continue };
                rule.ra_kind = loc::REGISTER + register;
                rows.push((next, *rule));
            }
            (Mnemonic::Mov, Some(rule))
                if to == Register::RSP && dwarf_number(from).is_some_and(|from| Some(from) == sender) =>
            {
                rule.cfa_kind = cfa::SP;
                rows.push((next, *rule));
            }
            _ => {}
        }
        if left.is_some() && Flow::of(&instruction).ends() {
            rows.push((next, SENDER_FRAME));
            (sender, left) = (None, None);
        }
    }
    rows
}

/// Returns the DWARF number of a register.
fn dwarf_number(register: Register) -> Option<u8> {
    use Register::{R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};
    let registers = [RAX, RDX, RCX, RBX, RSI, RDI, RBP, RSP, R8, R9, R10, R11, R12, R13, R14, R15];
    registers.iter().position(|known| *known == register).map(|number| number as u8)
}

fn decode(code: &[u8], start: u64) -> impl Iterator<Item = Instruction> {
    let mut decoder = Decoder::with_ip(64, addressable(code, start), start, DecoderOptions::NONE);
    std::iter::from_fn(move || decoder.can_decode().then(|| decoder.decode()))
}

/// Returns the part of the code that ends within the address space. Behind the last address a decoder goes on at address 0.
fn addressable(code: &[u8], start: u64) -> &[u8] {
    let room = usize::try_from(u64::MAX - start).unwrap_or(usize::MAX);
    &code[..code.len().min(room)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::deref_offset;

    fn sizes(rows: &[(u64, UnwindRule)]) -> Vec<(u64, u8, i32)> {
        rows.iter().map(|(at, rule)| (*at, rule.cfa_kind, rule.cfa_offset)).collect()
    }

    #[test]
    fn a_compiled_function_has_rows_for_its_edges() {
        // mov [rsp-0x14000], eax; push rbp; sub rsp, 0x20; nop; add rsp, 0x20; pop rbp; cmp rsp, [r15+0x338]; ja +2; ret; nop;
        // nop (the target); jmp; nop
        let code = [
            0x89, 0x84, 0x24, 0x00, 0xc0, 0xfe, 0xff, 0x55, 0x48, 0x83, 0xec, 0x20, 0x90, 0x48, 0x83, 0xc4,
            0x20, 0x5d, 0x49, 0x3b, 0xa7, 0x38, 0x03, 0x00, 0x00, 0x77, 0x02, 0xc3, 0x90, 0x90, 0xeb, 0x00,
            0x90,
        ];
        let framed =
            FramedCode { code: &code, start: 0x1000, entries: &[0x1000], complete: 0x100c, frame_bytes: 48 };
        let rows = framed.rows();
        let sp = |at: u64, size| (0x1000 + at, cfa::SP, size);
        let expected =
            [sp(0, 8), sp(8, 16), sp(12, 48), sp(17, 16), sp(18, 8), sp(28, 48), sp(29, 8), sp(32, 48)];
        // Behind the jump its target, the next instruction, still has the popped frame.
        let expected = &expected[..7];
        assert_eq!(sizes(&rows)[..7], *expected);
        let body = rule_at(&rows, 0x100c).unwrap();
        assert_eq!((body.fp_kind, body.fp_offset, body.ra_offset), (loc::CFA, -16, -8));
        assert_eq!(rule_at(&rows, 0x100b).unwrap().cfa_offset, 16, "within an instruction its row holds");
        assert_eq!(rule_at(&rows, 0xfff), None);
    }

    #[test]
    fn a_function_with_a_frame_pointer_has_rows_for_its_edges() {
        // cmp rsp, rax; jb +9; push rbp; mov rbp, rsp; push rsi; sub rsp, 8; jmp +4; nop (target of the jb); ret; nop;
        // nop (target of the jump); mov rsp, rbp; pop rbp; ret 8; nop
        let code = [
            0x48, 0x3b, 0xe0, 0x72, 0x0b, 0x55, 0x48, 0x89, 0xe5, 0x56, 0x48, 0x83, 0xec, 0x08, 0xeb, 0x03,
            0x90, 0xc3, 0x90, 0x90, 0x48, 0x8b, 0xe5, 0x5d, 0xc2, 0x08, 0x00, 0x90,
        ];
        let rows = fp_rows(&code, 0x1000, false);
        let row = |at: u64, kind, offset| (0x1000 + at, kind, offset);
        let expected = [
            row(0, cfa::SP, 8),
            row(6, cfa::SP, 16),
            row(9, cfa::FP, 16),
            row(16, cfa::SP, 8),
            row(18, cfa::FP, 16),
            row(24, cfa::SP, 8),
            row(27, cfa::FP, 16),
        ];
        assert_eq!(sizes(&rows), expected);
        // push rbp; mov rbp, rsp; push 34; sub rsp, 48; mov rbp, [rbp]; mov rax, [rsp+0x18]; add rsp, 64; jmp rcx
        let code = [
            0x55, 0x48, 0x89, 0xe5, 0x6a, 0x22, 0x48, 0x83, 0xec, 0x30, 0x48, 0x8b, 0x6d, 0, 0x48, 0x8b,
            0x44, 0x24, 0x18, 0x48, 0x83, 0xc4, 0x40, 0xff, 0xe1,
        ];
        let rows = fp_rows(&code, 0x1000, false);
        let expected = [
            row(0, cfa::SP, 8),
            row(1, cfa::SP, 16),
            row(4, cfa::FP, 16),
            row(14, cfa::SP, 72),
            row(23, cfa::SP, 8),
        ];
        assert_eq!(sizes(&rows), expected);
        assert_eq!(rule_at(&rows, 0x1010).unwrap().fp_kind, loc::SAME);
        // pop rax; push r10 twice; push rax; push rbp; mov rbp, rsp; push 6; call rdx; leave; pop rcx; add rsp, rbx; push rcx; ret
        let code = [
            0x58, 0x41, 0x52, 0x41, 0x52, 0x50, 0x55, 0x48, 0x89, 0xe5, 0x6a, 6, 0xff, 0xd2, 0xc9, 0x59,
            0x48, 1, 0xdc, 0x51, 0xc3,
        ];
        let rows = fp_rows(&code, 0x1000, false);
        let rule = rule_at(&rows, 0x100d).unwrap();
        assert_eq!((rule.cfa_kind, rule.cfa_offset, rule.fp_kind), (cfa::FP, 16, loc::CFA));
        // mov ebx, 32; call; push rax; leave; ret
        let code = [0xbb, 0x20, 0, 0, 0, 0xe8, 0, 1, 0, 0, 0x50, 0xc9, 0xc3];
        let expected = [row(0, cfa::SP, 8), row(10, cfa::FP, 16), row(12, cfa::SP, 8)];
        assert_eq!(sizes(&fp_rows(&code, 0x1000, true)), expected);
    }

    #[test]
    fn code_that_moves_its_return_address_is_followed() {
        // pop rax; push 0; push rax; push rbp; mov rbp, rsp; push r13; push 0; push rbx
        let code = [0x58, 0x6a, 0x00, 0x50, 0x55, 0x48, 0x8b, 0xec, 0x41, 0x55, 0x6a, 0x00, 0x53, 0x90];
        let (rows, complete) = moved_return_rows(&code, 0x1000, true, 3);
        let at = |offset: u64| {
            let rule = rule_at(&rows, 0x1000 + offset).unwrap();
            (rule.cfa_kind, rule.ra_kind, rule.ra_offset, rule.fp_kind)
        };
        let sender = cfa::REGISTER + R13;
        assert_eq!(at(0), (sender, loc::SP, 0, loc::SAME));
        assert_eq!(at(1), (sender, loc::REGISTER + RAX, 0, loc::SAME));
        assert_eq!(at(4), (sender, loc::SP, 0, loc::SAME));
        assert_eq!(at(5), (sender, loc::SP, 8, loc::SP));
        assert_eq!(at(8), (sender, loc::FP, 8, loc::FP));
        assert_eq!(rule_at(&rows, 0x100a), Some(SENDER_FRAME));
        assert_eq!(complete, Some(0x100d));
        assert_eq!(SENDER_FRAME.cfa_offset, deref_offset(-8, 0).unwrap());
        // pop rax; mov r13, rsp; sub rsp, 16; mov [rsp], rax
        let code = [0x58, 0x49, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x10, 0x48, 0x89, 0x04, 0x24, 0x90];
        let (rows, complete) = moved_return_rows(&code, 0x1000, false, 8);
        let kinds: Vec<_> =
            rows.iter().map(|(at, rule)| (at - 0x1000, rule.cfa_kind, rule.ra_kind)).collect();
        let rax = loc::REGISTER + RAX;
        assert_eq!(
            kinds,
            [(0, cfa::SP, loc::SP), (1, cfa::SP, rax), (4, sender, rax), (12, sender, loc::SP)]
        );
        assert_eq!(complete, None);
    }

    #[test]
    fn any_code_gives_rows_in_order() {
        let mut random = 7_u64;
        for length in 0..300 {
            let bytes = std::iter::repeat_with(|| {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (random >> 56) as u8
            });
            let code: Vec<u8> = bytes.take(length).collect();
            let entries = [0x1000, 0x1010];
            let framed = FramedCode {
                code: &code,
                start: 0x1000,
                entries: &entries,
                complete: 0x1020,
                frame_bytes: 64,
            };
            let last = FramedCode { start: u64::MAX - 100, entries: &[], complete: u64::MAX - 80, ..framed };
            let all = [
                framed.rows(),
                last.rows(),
                unframed_rows(&code, u64::MAX - 100, &TableLimits::default()),
                moved_return_rows(&code, 0x1000, false, 8).0,
                fp_rows(&code, u64::MAX - 100, false),
                moved_return_rows(&code, u64::MAX - 100, true, 8).0,
                left_frame_rows(&code, u64::MAX - 100),
            ];
            for rows in all {
                assert!(rows.windows(2).all(|two| two[0].0 <= two[1].0), "{rows:x?}");
            }
        }
    }
}
