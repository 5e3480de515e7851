//! Unwind rules from instructions, for x86_64 code that nothing describes: musl, and programs that link it statically, are
//! built without unwind information.
//!
//! A sweep reads the code from front to back and tracks the distance from the stack pointer to the frame address: 8 bytes, the
//! return address, at a function's entry. It follows `push`, `pop`, `add`, `sub`, `lea` and the frame-pointer idioms, and each
//! branch passes the distance to its target. Further sweeps know the distances at targets of backward jumps. A function counts
//! only if the distance is 8 again at each of its `ret`s.
//!
//! Code that has popped its own return address runs on a stack that was made for it (the child's part of `clone`): it has no
//! caller.

mod effect;

use std::borrow::Cow;

use foldhash::{HashMap, HashSet, HashSetExt};
use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

pub(crate) use self::effect::{Effect, Flow};
use crate::{
    format::{UnwindRule, cfa, loc},
    limits::{Budget, LimitExceeded},
};

/// Compilers and assemblers align functions to this, as a rule.
const ALIGNMENT: u64 = 16;
/// Each sweep reaches code that the sweep before it learned of.
const MAX_SWEEPS: usize = 24;
/// Data between functions can look like another function in each sweep. After this many, guesses are final.
const GUESSING_SWEEPS: usize = 12;
/// Bytes of the return address.
const ENTRY_DISTANCE: i32 = 8;

/// One function and its rows, by address, ascending.
#[derive(Debug, PartialEq)]
pub(crate) struct Function {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) rows: Vec<(u64, UnwindRule)>,
}

/// The functions in some gaps, by address, ascending.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) functions: Vec<Function>,
    /// Ranges of instructions without a rule.
    pub(crate) unknown: Vec<(u64, u64)>,
}

/// A range of code that nothing describes.
#[derive(Clone, Debug)]
pub(crate) struct Gap<'d> {
    pub(crate) start: u64,
    pub(crate) bytes: Cow<'d, [u8]>,
}

/// The distances before an instruction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct State {
    /// From the stack pointer up to the frame address.
    pub(crate) sp: Option<i32>,
    /// The same from rbp, while it is a frame pointer.
    pub(crate) fp: Option<i32>,
    /// Offset of the caller's rbp from the frame address.
    pub(crate) saved: Option<i32>,
}

impl State {
    /// At the first instruction of a function.
    pub(crate) const ENTRY: Self = Self { sp: Some(ENTRY_DISTANCE), fp: None, saved: None };

    /// Returns the rule that holds here.
    pub(crate) fn rule(&self) -> UnwindRule {
        let (cfa_kind, cfa_offset) = match (self.sp, self.fp) {
            (Some(sp), _) if sp < ENTRY_DISTANCE => return UnwindRule::OUTERMOST,
            (Some(sp), _) => (cfa::SP, sp),
            (None, Some(fp)) => (cfa::FP, fp),
            (None, None) => return UnwindRule::NONE,
        };
        let (fp_kind, fp_offset) = self.saved.map_or((loc::SAME, 0), |at| (loc::CFA, at));
        UnwindRule { cfa_kind, fp_kind, cfa_offset, fp_offset, ..UnwindRule::X86_64_ENTRY }
    }

    /// Changes to the state after an instruction with this effect.
    pub(crate) fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Move(bytes) => self.sp = self.sp.map(|sp| sp.saturating_add(bytes)),
            Effect::PushFp => {
                self.apply(Effect::Move(8));
                if self.saved.is_none() && self.fp.is_none() {
                    self.saved = self.sp.map(|sp| -sp);
                }
            }
            Effect::PopFp => {
                self.apply(Effect::Move(-8));
                self.apply(Effect::RestoreFp);
            }
            Effect::StoreFp(at) => {
                if self.saved.is_none() && self.fp.is_none() {
                    self.saved = self.sp.map(|sp| at.saturating_sub(sp));
                }
            }
            Effect::RestoreFp => (self.fp, self.saved) = (None, None),
            Effect::FpIsSp => self.fp = self.sp,
            Effect::SpIsFp(plus) => self.sp = self.fp.map(|fp| fp.saturating_sub(plus)),
            Effect::Leave => {
                self.sp = self.fp;
                self.apply(Effect::PopFp);
            }
            Effect::SpLost => self.sp = None,
            Effect::FpLost => self.fp = None,
        }
    }
}

/// The properties of one instruction.
#[derive(Clone, Copy, Debug)]
struct Step {
    ip: u64,
    effect: Effect,
    flow: Flow,
    padding: bool,
    /// It reads or writes memory this number of bytes above the stack pointer.
    above: Option<i32>,
    /// A symbol says that a function begins here.
    named: bool,
    /// It is the target of a call, or of data between functions that looks like a call.
    called: bool,
    /// It is the target of a branch.
    branched_to: bool,
}

/// Finds the functions in these gaps. `named` holds addresses at which functions begin, by symbols or callers.
pub(crate) fn functions(
    gaps: &[Gap<'_>],
    named: HashSet<u64>,
    budget: &mut Budget<'_>,
) -> Result<Found, LimitExceeded> {
    let (mut called, mut branched_to) = (HashSet::new(), HashSet::new());
    let mut code = Vec::with_capacity(gaps.len());
    let mut info = InstructionInfoFactory::new();
    for gap in gaps {
        budget.check()?;
        let mut steps = Vec::new();
        for instruction in decode(gap) {
            let flow = Flow::of(&instruction);
            match flow {
                Flow::Call if instruction.op0_kind() == OpKind::NearBranch64 => {
                    let target = instruction.near_branch64();
                    called.extend(Some(target).filter(|target| *target != instruction.next_ip()));
                }
                Flow::Branch(target) | Flow::Jump(target) => _ = branched_to.insert(target),
                _ => {}
            }
            steps.push(Step {
                ip: instruction.ip(),
                effect: Effect::of(&instruction, &mut info),
                flow,
                padding: matches!(instruction.mnemonic(), Mnemonic::Nop | Mnemonic::Int3),
                above: (instruction.memory_base() == Register::RSP)
                    .then_some(instruction.memory_displacement64() as i32),
                named: named.contains(&instruction.ip()),
                called: false,
                branched_to: false,
            });
        }
        code.push((gap.start, gap.start.saturating_add(gap.bytes.len() as u64), steps));
    }
    for step in code.iter_mut().flat_map(|(_, _, steps)| steps) {
        (step.called, step.branched_to) = (called.contains(&step.ip), branched_to.contains(&step.ip));
    }
    let mut sweep = Sweep { named, ..Sweep::default() };
    for round in 0..MAX_SWEEPS {
        let (known, inside) = (sweep.known.len(), sweep.inside.len());
        sweep.found.clear();
        for (start, end, steps) in &code {
            budget.check()?;
            sweep.read_gap(*start, *end, steps);
        }
        if sweep.inside.len() != inside && round < GUESSING_SWEEPS {
            // Distances may come from code that was taken for another function: start over.
            sweep.known.clear();
        } else if sweep.known.len() == known {
            break;
        }
    }
    // These turned out to be parts of other functions, too late to start over.
    sweep.found.retain(|function| !sweep.inside.contains(&function.start));
    let unknown = unknown(&code, &sweep.found);
    Ok(Found { functions: sweep.found, unknown })
}

/// Returns the ranges of instructions without a rule, padding left out.
fn unknown(code: &[(u64, u64, Vec<Step>)], found: &[Function]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let has_rule = |ip: u64| {
        let function = found.partition_point(|function| function.start <= ip).checked_sub(1);
        function.map(|n| &found[n]).filter(|function| ip < function.end).is_some_and(|function| {
            let row = function.rows.partition_point(|(row, _)| *row <= ip).checked_sub(1);
            row.is_some_and(|n| function.rows[n].1 != UnwindRule::NONE)
        })
    };
    for (_, end, steps) in code {
        let ends = steps.iter().skip(1).map(|step| step.ip).chain([*end]);
        for (step, next) in steps.iter().zip(ends).filter(|(step, _)| !step.padding && !has_rule(step.ip)) {
            match ranges.last_mut().filter(|last| last.1 == step.ip) {
                Some(last) => last.1 = next,
                None => ranges.push((step.ip, next)),
            }
        }
    }
    ranges
}

fn decode(gap: &Gap<'_>) -> impl Iterator<Item = Instruction> {
    let mut decoder = Decoder::with_ip(64, &gap.bytes, gap.start, DecoderOptions::NONE);
    std::iter::from_fn(move || decoder.can_decode().then(|| decoder.decode()))
}

#[derive(Debug, Default)]
struct Sweep {
    named: HashSet<u64>,
    /// States at the targets of branches.
    known: HashMap<u64, State>,
    /// Addresses that looked like the beginning of a function, and are not.
    inside: HashSet<u64>,
    found: Vec<Function>,
}

/// The function that the sweep is in.
struct Open {
    start: u64,
    /// No call and no symbol refers to it.
    guessed: bool,
    rows: Vec<(u64, UnwindRule)>,
    /// The distance was not 8 at a `ret`.
    wrong: bool,
    /// The state at a jump through a table. Code behind the jump that no branch refers to is a target of the table.
    table: Option<State>,
    /// The state with the largest frame: that of the body, and so of the targets of a jump table.
    body: State,
}

impl Open {
    fn at(start: u64, guessed: bool) -> Self {
        Self { start, guessed, rows: Vec::new(), wrong: false, table: None, body: State::ENTRY }
    }
}

impl Sweep {
    fn read_gap(&mut self, start: u64, end: u64, steps: &[Step]) {
        let mut open = Open::at(start, !self.named.contains(&start));
        let mut state = Some(State::ENTRY);
        // Of the last instruction that is no padding: whether it was a call, and whether control ends there.
        let (mut after_padding, mut after_call, mut ended) = (true, false, true);
        for step in steps {
            let Step { ip, flow, padding, .. } = *step;
            let aligned = ip % ALIGNMENT == 0;
            let called = step.called && (state.is_none() || after_padding || after_call);
            // Control does not come from the instruction before: this is a function, or a target of the last jump table.
            let unreached = state.is_none() && ended && (aligned || after_padding) && open.table.is_none();
            let after_no_return = after_call && after_padding && aligned;
            let begins = step.named
                || called
                || (unreached || after_no_return)
                    && !padding
                    && !step.branched_to
                    && !self.inside.contains(&ip);
            if begins {
                let guessed = !called && !step.named;
                self.close(std::mem::replace(&mut open, Open::at(ip, guessed)), ip);
                state = Some(State::ENTRY);
            } else if step.branched_to {
                state = self.known.get(&ip).copied().or(state);
            } else if state.is_none() && !padding {
                state = if self.inside.contains(&ip) { Some(open.body) } else { open.table };
            }
            let rule = state.map_or(UnwindRule::NONE, |state| state.rule());
            if !(padding && state.is_none()) && open.rows.last().is_none_or(|(_, last)| *last != rule) {
                open.rows.push((ip, rule));
            }
            if !padding {
                (after_call, ended) = (flow == Flow::Call, flow.ends());
            }
            after_padding = padding;
            let Some(now) = &mut state else { continue };
            let here = *now;
            if here.sp > open.body.sp {
                open.body = here;
            }
            // It accesses the stack above its own return address.
            if open.guessed && step.above.zip(here.sp).is_some_and(|(above, sp)| above >= sp) {
                self.inside.insert(open.start);
            }
            now.apply(step.effect);
            match flow {
                Flow::Branch(target) | Flow::Jump(target) if !self.named.contains(&target) => {
                    let known = self.known.entry(target).or_insert(here);
                    if known.sp != here.sp && open.guessed {
                        self.inside.insert(open.start);
                    }
                }
                // With an empty frame it is a call that does not return.
                Flow::Indirect => open.table = Some(here).filter(|here| here.sp != Some(ENTRY_DISTANCE)),
                Flow::Return => open.wrong |= here.sp != Some(ENTRY_DISTANCE),
                Flow::Invalid => open.wrong = true,
                _ => {}
            }
            if flow.ends() {
                state = None;
            }
        }
        // Control runs over the end of the gap: this was no code.
        open.wrong |= state.is_some() && !after_call;
        self.close(open, end);
    }

    fn close(&mut self, open: Open, end: u64) {
        let Open { start, rows, wrong, .. } = open;
        if !wrong && start < end && rows.iter().any(|(_, rule)| *rule != UnwindRule::NONE) {
            self.found.push(Function { start, end, rows });
        }
    }
}

#[cfg(test)]
mod tests {
    use gannet_elf::Elf;

    use super::*;
    use crate::{
        build::{BuildOptions, build_bytes},
        limits::TableLimits,
    };

    const AT: u64 = 0x1000;

    fn all(gaps: &[Gap<'_>], named: HashSet<u64>) -> Vec<Function> {
        let limits = TableLimits::default();
        functions(gaps, named, &mut Budget::new(&limits, None)).unwrap().functions
    }

    fn rows(code: &[u8]) -> Vec<(u64, u8, i32)> {
        let found = all(&[Gap { start: AT, bytes: code.into() }], HashSet::new());
        let rows = found.iter().flat_map(|function| &function.rows);
        rows.map(|(at, rule)| (at - AT, rule.ra_kind, rule.cfa_offset)).collect()
    }

    #[test]
    fn pushes_and_pops_are_followed_into_both_arms_of_a_branch() {
        // push rbx; sub rsp, 16; test edi, edi; je +6; add rsp, 16; pop rbx; ret; add rsp, 16; pop rbx; ret
        let code = [
            0x53, 0x48, 0x83, 0xec, 0x10, 0x85, 0xff, 0x74, 0x06, 0x48, 0x83, 0xc4, 0x10, 0x5b, 0xc3, 0x48,
            0x83, 0xc4, 0x10, 0x5b, 0xc3,
        ];
        let caller = loc::CFA;
        let expected = [(0, 8), (1, 16), (5, 32), (13, 16), (14, 8), (15, 32), (19, 16), (20, 8)];
        assert_eq!(rows(&code), expected.map(|(at, distance)| (at, caller, distance)));
    }

    #[test]
    fn a_function_with_another_distance_at_its_end_is_dropped() {
        // push rbx; ret
        assert_eq!(rows(&[0x53, 0xc3]), []);
        // and rsp, -16; ret: the distance is unknown then
        assert_eq!(rows(&[0x48, 0x83, 0xe4, 0xf0, 0xc3]), []);
    }

    #[test]
    fn code_that_popped_its_return_address_has_no_caller() {
        // xor ebp, ebp; pop rdi; call *r9; mov edi, eax; hlt: musl's clone, in the child
        let found = rows(&[0x31, 0xed, 0x5f, 0x41, 0xff, 0xd1, 0x89, 0xc7, 0xf4]);
        assert_eq!(found, [(0, loc::CFA, 8), (3, loc::UNDEFINED, 0)]);
    }

    #[test]
    fn any_bytes_are_read_to_the_end() {
        let mut bytes = Vec::new();
        let mut random = 1_u64;
        for _ in 0..1 << 16 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            bytes.push((random >> 56) as u8);
        }
        all(&[Gap { start: AT, bytes: (&bytes).into() }], HashSet::new());
        all(&[Gap { start: u64::MAX - 100, bytes: bytes[..100].into() }], HashSet::new());
    }

    /// Checks the rules from instructions against those of the C library's own frame information.
    #[test]
    fn instructions_agree_with_the_c_library_about_its_frames() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let path = maps
            .lines()
            .filter_map(|line| line.split_whitespace().last())
            .find(|path| path.contains("libc.so"));
        let Some(path) = path.filter(|_| cfg!(target_arch = "x86_64")) else { return };
        let bytes = std::fs::read(path).unwrap();
        let limits = TableLimits::default();
        let described = build_bytes(&bytes, &BuildOptions::new("libc", &limits)).unwrap().table;
        let elf = Elf::parse(&bytes, &limits.elf()).unwrap();
        let gaps: Vec<_> = elf
            .code()
            .into_iter()
            .map(|(start, end)| Gap { start, bytes: elf.bytes_at(start, end - start).unwrap() })
            .collect();
        let starts = crate::build::function_symbols(&elf, &elf.code());
        let found = all(&gaps, starts);
        let (mut same, mut other, mut unknown) = (0_u64, 0_u64, 0_u64);
        for instruction in gaps.iter().flat_map(|gap| decode(gap)) {
            let at = instruction.ip();
            let Some(known) = described.lookup(at).filter(|rule| *rule != UnwindRule::NONE) else { continue };
            let function =
                found.partition_point(|function| function.start <= at).checked_sub(1).map(|n| &found[n]);
            let rule = function.filter(|function| at < function.end).and_then(|function| {
                function.rows[..function.rows.partition_point(|(row, _)| *row <= at)].last()
            });
            match rule.map(|(_, rule)| *rule).filter(|rule| *rule != UnwindRule::NONE) {
                None => unknown += 1,
                Some(rule) if (rule.cfa_kind, rule.cfa_offset) == (known.cfa_kind, known.cfa_offset) => {
                    same += 1;
                }
                // One finds the frame by rbp, the other by rsp: both may be right.
                Some(rule) if rule.cfa_kind != known.cfa_kind => {}
                Some(_) => other += 1,
            }
        }
        println!("{same} instructions agree, {other} differ, {unknown} are unknown");
        assert!(same > 100_000, "{same} agree");
        assert!(other * 200 <= same, "{other} differ beside {same}");
        assert!(unknown * 10 <= same, "{unknown} unknown beside {same}");
    }
}
