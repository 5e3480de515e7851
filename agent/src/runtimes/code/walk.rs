//! Unwinding a stack through code that was read.

use std::cell::RefCell;

use gannet_unwind::{
    format::{UnwindRule, cfa},
    generated::{SENDER_FRAME, rule_at},
    unwind::GeneratedFrame,
};

use super::{
    super::{Captured, FrameWords, NamedFrame},
    Before, Block, CodeNeeds, GeneratedCode, Known, KnownFunction, KnownScope, MAX_AGE_NS, NO_POSITION,
    UnloadHistory, scope_at,
};
use crate::model::StackWord;

/// DWARF numbers of registers.
const RBX: usize = 3;
const R13: usize = 13;

/// The address of a frame, and the words of the functions that it stands for.
pub(crate) type WordsOfFrame = (u64, Vec<u64>);

/// Unwinds one stack through the code of a process.
#[derive(Debug)]
pub(crate) struct CodeWalk<'a> {
    code: &'a GeneratedCode,
    /// When the stack was taken.
    time_ns: u64,
    found: RefCell<WalkedCode>,
}

/// The code that a stack goes through.
#[derive(Debug, Default)]
pub(crate) struct WalkedCode {
    /// The functions that its frames stand for, in order.
    pub(crate) words: Vec<WordsOfFrame>,
    /// Code and functions that have to be read first.
    pub(crate) needs: CodeNeeds,
    /// Frames without a name because their class, or another one at its place, may have been unloaded since the sample.
    pub(crate) unproven: u32,
    /// A frame was left by a rule that is not proven. The callers may be frames that had ended before the sample, of code that
    /// was unloaded and is still in memory.
    is_lost: bool,
}

impl<'a> CodeWalk<'a> {
    pub(crate) fn new(code: &'a GeneratedCode, time_ns: u64) -> Self {
        Self { code, time_ns, found: RefCell::default() }
    }

    /// Returns the rule of a frame, and notes its functions. `pc` is the address that the reader knows, if the same code is mapped
    /// at several.
    pub(crate) fn rule(&self, frame: &GeneratedFrame<'_>, pc: u64) -> Option<UnwindRule> {
        let mapped_pc = frame.pc;
        let mut frame = *frame;
        frame.pc = pc;
        let frame = &frame;
        let known = self.code.known.lock();
        let mut found = self.found.borrow_mut();
        let WalkedCode { words, needs, unproven, is_lost } = &mut *found;
        let address = if frame.exact { frame.pc } else { frame.pc.wrapping_sub(1) };
        let Some(block) = known.block(address).filter(|block| block.head.code.contains(&address)) else {
            let read_ns = known.empty.get(&frame.pc).copied();
            let is_known = read_ns.is_some_and(|at| known.is_read(at, self.time_ns));
            let may_hold =
                known.ranges.is_empty() || known.ranges.iter().any(|range| range.contains(&frame.pc));
            if !is_known && may_hold {
                needs.addresses.insert(frame.pc);
            }
            *is_lost |= may_hold && !read_ns.is_some_and(|at| known.is_unmoved(self.time_ns, at));
            return None;
        };
        let is_read = known.is_read(block.read_ns, self.time_ns);
        if !is_read {
            needs.addresses.insert(frame.pc);
            if known.is_over() && block.read_ns + MAX_AGE_NS < self.time_ns {
                return None;
            }
        }
        let rule = rule_at(&block.content.rows, address).filter(|rule| *rule != UnwindRule::NONE);
        let before = *unproven;
        let stack = match &block.content.captured {
            // The frame is left already.
            Some(captured) if rule != Some(SENDER_FRAME) && !captured.is_entry(frame) => Vec::new(),
            Some(captured) => known.captured(captured, frame, self.time_ns, needs, unproven),
            None if block.content.frames != FrameWords::None => {
                let is_made = rule.is_some_and(|rule| rule.cfa_kind == cfa::FP);
                let named = is_made.then(|| self.code.reader.named(frame)).flatten();
                named
                    .map(|named| known.named(block, frame, named, self.time_ns, needs, unproven))
                    .unwrap_or_default()
            }
            None => known.functions(block, frame, self.time_ns, needs, unproven),
        };
        *is_lost |= !(is_read || known.is_over()) || !known.is_block_proven(block, self.time_ns);
        if *is_lost {
            // Another block may have been here, with a frame of another size.
            *unproven = before + 1;
            words.push((mapped_pc, Vec::new()));
            return rule.map(guessed).or_else(|| known.guess(frame));
        }
        let stack = if stack.is_empty() {
            block.name.map(|name| (name, NO_POSITION)).into_iter().collect()
        } else {
            stack
        };
        words.push((
            mapped_pc,
            stack.into_iter().flat_map(|(number, position)| frame_words(number, position)).collect(),
        ));
        rule.or_else(|| known.guess(frame))
    }

    /// Returns the functions of the frames, and what is missing.
    pub(crate) fn finish(self) -> WalkedCode {
        self.found.into_inner()
    }
}

/// Marks the callers that a rule leads to as guessed.
fn guessed(rule: UnwindRule) -> UnwindRule {
    UnwindRule { flags: rule.flags | UnwindRule::FRAME_POINTER.flags, ..rule }
}

/// Returns the words of a frame.
fn frame_words(number: u64, position: u32) -> [u64; 2] {
    [StackWord::Function(number), StackWord::Position { sum: 0, position }].map(StackWord::encode)
}

impl Known {
    /// Reports whether the agent may use for a sample what it read in a request that began at `read_ns`: behind the sample, and the
    /// request is over.
    fn is_read(&self, read_ns: u64, time_ns: u64) -> bool {
        (time_ns..=self.checked_ns).contains(&read_ns)
    }

    /// Reports whether no class was unloaded between a sample and the end of the request that began at `begin_ns`. Of a process that
    /// has ended, nothing is read behind a sample: then it must not have unloaded one before either.
    fn is_unmoved(&self, time_ns: u64, begin_ns: u64) -> bool {
        if self.is_over() { self.unloads.is_steady() } else { self.unloads.covers(time_ns, begin_ns) }
    }

    /// Reports whether code of a block that was confirmed behind a sample was the same at the sample. `first_ns` is when it was read
    /// first. Code that was known before a sample, and is of the same compilation behind it, was alive all the time.
    fn is_proven(&self, first_ns: [u64; 2], time_ns: u64) -> bool {
        let [begin_ns, since_ns] = first_ns;
        self.is_unmoved(time_ns, begin_ns) || (!self.is_over() && since_ns <= time_ns)
    }

    fn is_block_proven(&self, block: &Block, time_ns: u64) -> bool {
        self.is_proven(block.first_ns, time_ns) || self.before(block, time_ns).is_some()
    }

    fn is_scope_proven(&self, block: &Block, scope: &KnownScope, address: u64, time_ns: u64) -> bool {
        let is_same = |before: &Before| {
            scope_at(&before.scopes, address).is_some_and(|old| old.functions == scope.functions)
        };
        self.is_proven(scope.first_ns, time_ns) || self.before(block, time_ns).is_some_and(is_same)
    }

    /// Returns what was in the place of a block before a sample, if the machine has moved objects only once between the two readings.
    /// What is the same in both has been it all the time.
    fn before<'b>(&self, block: &'b Block, time_ns: u64) -> Option<&'b Before> {
        let is_around = |before: &&Before| self.is_around(before.read_ns, time_ns, block.read_ns);
        block.before.as_ref().filter(is_around)
    }

    fn is_around(&self, before_ns: u64, time_ns: u64, behind_ns: u64) -> bool {
        let is_one = || self.unloads.is_one_between(before_ns, behind_ns);
        !self.is_over()
            && (before_ns..=behind_ns).contains(&time_ns)
            && self.is_read(behind_ns, time_ns)
            && is_one()
    }

    /// Reports whether a function was read behind a sample, and nothing was unloaded in between.
    fn is_unmoved_behind(&self, function: &KnownFunction, time_ns: u64) -> bool {
        let is_unmoved = |begin_ns: &u64| *begin_ns >= time_ns && self.is_unmoved(time_ns, *begin_ns);
        if self.is_over() { self.unloads.is_steady() } else { function.read_ns.iter().any(is_unmoved) }
    }

    /// Reports whether a function that names itself was the same before the sample and behind it, and none was replaced in between.
    /// Then it has stayed, or has come back to its place in between.
    fn has_stayed(&self, function: &KnownFunction, time_ns: u64) -> bool {
        let is_behind = |begin_ns: &u64| {
            self.is_read(*begin_ns, time_ns) && self.replaced.covers(function.since_ns, *begin_ns)
        };
        !self.is_over() && function.since_ns <= time_ns && function.read_ns.iter().any(is_behind)
    }

    /// Reports whether a function that names itself was read behind a sample, and no class was unloaded and no replaced function
    /// freed in between.
    fn is_unreplaced_behind(&self, function: &KnownFunction, time_ns: u64) -> bool {
        let is_unreplaced = |begin_ns: &u64| {
            let covers = |history: &UnloadHistory| history.covers(time_ns, *begin_ns);
            *begin_ns >= time_ns && covers(&self.unloads) && covers(&self.freed)
        };
        if self.is_over() {
            self.unloads.is_steady() && self.freed.is_steady()
        } else {
            function.read_ns.iter().any(is_unreplaced)
        }
    }

    /// Returns the functions of a compiled block.
    fn functions(
        &self,
        block: &Block,
        frame: &GeneratedFrame<'_>,
        time_ns: u64,
        needs: &mut CodeNeeds,
        unproven: &mut u32,
    ) -> Vec<(u64, u32)> {
        if block.name.is_some() {
            return Vec::new();
        }
        let (moved, at) = &block.content.moved;
        let pc = if moved.contains(&frame.pc) {
            let original = frame.read(frame.sp.wrapping_add_signed(i64::from(*at)));
            original.filter(|pc| block.head.code.contains(pc)).unwrap_or(frame.pc)
        } else {
            frame.pc
        };
        let Some(scope) = block.scope(pc) else {
            needs.addresses.insert(pc);
            return Vec::new();
        };
        if !self.is_scope_proven(block, scope, pc, time_ns) {
            *unproven += 1;
            return Vec::new();
        }
        scope.functions.clone()
    }

    fn named(
        &self,
        block: &Block,
        frame: &GeneratedFrame<'_>,
        named: NamedFrame,
        time_ns: u64,
        needs: &mut CodeNeeds,
        unproven: &mut u32,
    ) -> Vec<(u64, u32)> {
        let NamedFrame { object, hint, mut position } = named;
        if block.content.frames == FrameWords::WithoutPosition {
            let Some(scope) = block.scope(frame.pc) else {
                needs.addresses.insert(frame.pc);
                return Vec::new();
            };
            let first =
                scope.functions.first().filter(|_| self.is_scope_proven(block, scope, frame.pc, time_ns));
            position = first.map_or(NO_POSITION, |(_, position)| *position);
        }
        let known = self.functions.get(&object);
        let is_read = |known: &&KnownFunction| known.read_ns.iter().any(|at| self.is_read(*at, time_ns));
        let Some(function) = known.filter(|known| is_read(known) || self.is_over()) else {
            needs.functions.insert(object, hint);
            return Vec::new();
        };
        // Here an object may go and come back. So it proves something only for one move that it was the same before the sample.
        let reads = &function.read_ns;
        let is_around = |before: &u64| reads.iter().any(|behind| self.is_around(*before, time_ns, *behind));
        if !self.is_unmoved_behind(function, time_ns) && !reads.iter().any(is_around) {
            *unproven += 1;
            return Vec::new();
        }
        vec![(function.number, position)]
    }

    fn captured(
        &self,
        captured: &Captured,
        frame: &GeneratedFrame<'_>,
        time_ns: u64,
        needs: &mut CodeNeeds,
        unproven: &mut u32,
    ) -> Vec<(u64, u32)> {
        let register = |number: usize| frame.registers.and_then(|registers| registers.get(number)).copied();
        let word = |distance: i64| frame.read(frame.fp?.wrapping_add_signed(distance));
        let is_entry = captured.is_entry(frame);
        let object = if is_entry { register(RBX) } else { word(captured.function) };
        let Some(object) = object else { return Vec::new() };
        let known = self.functions.get(&object);
        let is_read = |known: &&KnownFunction| known.read_ns.iter().any(|at| self.is_read(*at, time_ns));
        let Some(function) = known.filter(|known| is_read(known) || self.is_over()) else {
            needs.functions.insert(object, 0);
            return Vec::new();
        };
        if !self.has_stayed(function, time_ns) && !self.is_unreplaced_behind(function, time_ns) {
            *unproven += 1;
            return Vec::new();
        }
        let within = |at: Option<u64>| at.filter(|at| function.instructions.contains(at));
        let at = if is_entry {
            Some(function.instructions.start)
        } else {
            within(register(R13).filter(|_| frame.exact)).or_else(|| within(word(captured.position)))
        };
        // A native function has no instructions.
        let position = match at {
            Some(at) => (at - function.instructions.start) as u32,
            None => NO_POSITION,
        };
        vec![(function.number, position)]
    }

    /// Guesses the rule of the innermost frame in code that nothing describes: its return address is on top of the stack if that
    /// is an address of code. Else the caller goes on by frame pointer.
    fn guess(&self, frame: &GeneratedFrame<'_>) -> Option<UnwindRule> {
        let is_code = |at: u64| self.ranges.iter().any(|range| range.contains(&at));
        let top = frame.read(frame.sp).is_some_and(is_code);
        (frame.exact && top).then_some(guessed(UnwindRule::X86_64_ENTRY))
    }
}
