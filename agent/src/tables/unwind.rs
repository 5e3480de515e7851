//! Unwinds raw samples: registers and a copy of the stack, by the same tables as the kernel side.

use std::{
    cell::{Cell, RefCell},
    sync::Arc,
};

use gannet_elf::Arch;
use gannet_unwind::{
    format::{UnwindRule, dwarf_register},
    table::UnwindTable,
    unwind::{GeneratedFrame, TableSource, ThreadSnapshot, UnwindEnd, UnwindFrame, unwind_stack},
};

use super::{
    UnwindTables,
    files::{FileState, FileTables, MappingTable},
};
use crate::{
    model::{Image, MappedFile, Mapping, MappingKind, RawLists, RawUserStack, Sample, StackEnd},
    runtimes::{self, CodeNeeds, CodeWalk, Interpreter, WalkedCode},
};

/// The limit of the kernel side.
const MAX_FRAMES: usize = 512;

/// The user stack of a sample, unwound.
#[derive(Clone, Debug)]
pub(crate) struct UnwoundSample {
    /// Leaf first. Of a frame that a signal interrupted: the address behind the interrupted byte.
    pub(crate) frames: Vec<u64>,
    /// How unwinding ended.
    pub(crate) end: StackEnd,
    /// The address at which unwinding ended because no mapping of the image holds it.
    pub(crate) unknown: Option<u64>,
    /// The first file whose table is not built yet. Unwinding went on by frame pointer there, and should be repeated once the
    /// table is built.
    pub(crate) missing: Option<Arc<MappedFile>>,
    /// The index in `frames` of the first one that was found by frame pointer alone.
    pub(crate) guessed_from: Option<u16>,
    /// Code that the process makes at run time, and that has to be read first.
    pub(crate) needs: CodeNeeds,
    /// The stack reaches such code, and the agent does not know yet where its runtime keeps it.
    pub(crate) is_unattached: bool,
    /// Frames of such code that have no name because it may have changed since the sample.
    pub(crate) unproven: u32,
}

impl UnwoundSample {
    /// Puts the stack into its sample, which is no longer raw.
    pub(crate) fn complete(self, sample: &mut Sample) {
        sample.user = self.frames;
        sample.end = self.end;
        sample.marks.guessed_from = self.guessed_from;
        sample.raw = None;
    }
}

/// Returns a raw sample with its leaf as the only frame: nothing is known of its process.
pub(crate) fn leaf_only(mut sample: Sample) -> Sample {
    if let Some(raw) = sample.raw.take() {
        sample.user = vec![raw.pc];
        sample.end = StackEnd::Broken;
    }
    sample
}

/// The tables by which the stacks of one image are unwound.
struct ImageTables<'a> {
    files: &'a FileTables,
    image: &'a Image,
    /// The first file whose table was needed and is not built.
    missing: RefCell<Option<Arc<MappedFile>>>,
    /// The way through code that the process makes at run time.
    walk: Option<CodeWalk<'a>>,
    /// The number to subtract from addresses in the runtime's file.
    bias: u64,
    is_unattached: Cell<bool>,
}

impl ImageTables<'_> {
    /// The stack has reached code without a file, and nothing says how to go on: looks for the runtime that makes it.
    fn look_for_runtime(&self, address: u64) {
        let is_made = |mapping: &Mapping| match &mapping.kind {
            MappingKind::Anon => true,
            _ => self.files.made_code(mapping).is_some_and(|(code, _)| code.contains(&address)),
        };
        if !self.image.find(address).is_some_and(is_made) {
            return;
        }
        let Some(file) = code_file(self.image) else { return };
        match self.files.state(file) {
            None | Some(FileState::Requested) => {
                self.missing.borrow_mut().get_or_insert_with(|| Arc::clone(file));
            }
            Some(FileState::Built { runtime: Some(_), .. }) => self.is_unattached.set(true),
            Some(FileState::Built { .. } | FileState::None) => {}
        }
    }
}

/// Returns the file of a runtime that makes code, if the image has one.
pub(super) fn code_file(image: &Image) -> Option<&Arc<MappedFile>> {
    image.mappings.iter().find_map(|mapping| match &mapping.kind {
        MappingKind::File(file) => runtimes::makes_code(&file.path).then_some(file),
        _ => None,
    })
}

impl TableSource for ImageTables<'_> {
    fn find(&self, address: u64) -> Option<(&UnwindTable, u64)> {
        let mapping = self.image.find(address)?;
        if self.files.made_code(mapping).is_some_and(|(code, _)| code.contains(&address)) {
            return None;
        }
        match (self.files.of_mapping(mapping), &mapping.kind) {
            (MappingTable::Built { table: Some(table), bias, .. }, _) => Some((table, bias?)),
            (MappingTable::Built { table: None, .. } | MappingTable::NotBuilt, MappingKind::File(file)) => {
                self.missing.borrow_mut().get_or_insert_with(|| Arc::clone(file));
                None
            }
            _ => None,
        }
    }

    fn generated(&self, frame: &GeneratedFrame<'_>) -> Option<UnwindRule> {
        let Some(walk) = &self.walk else {
            self.look_for_runtime(frame.pc);
            return None;
        };
        // A runtime may map its code a second time. It describes the first one.
        let made = self.image.find(frame.pc).and_then(|mapping| self.files.made_code(mapping));
        let pc = match made.filter(|(code, _)| code.contains(&frame.pc)) {
            Some((_, bias)) => frame.pc.wrapping_sub(bias).wrapping_add(self.bias),
            None => frame.pc,
        };
        walk.rule(frame, pc)
    }

    fn is_code(&self, address: u64) -> bool {
        self.image.find(address).is_some()
    }
}

impl UnwindTables {
    /// Unwinds a raw sample, through code that `interpreter` makes if there is one. A sample that is not raw keeps its frames.
    pub(crate) fn unwind(
        &self,
        image: &Image,
        interpreter: Option<&Interpreter>,
        sample: &Sample,
    ) -> UnwoundSample {
        let Some(raw) = &sample.raw else {
            return UnwoundSample {
                frames: sample.user.clone(),
                end: sample.end,
                unknown: None,
                missing: None,
                guessed_from: sample.marks.guessed_from,
                needs: CodeNeeds::default(),
                is_unattached: false,
                unproven: 0,
            };
        };
        let RawUserStack { pc, registers, stack, unread, lists, live_until_ns } = &**raw;
        let arch = if cfg!(target_arch = "aarch64") { Arch::Aarch64 } else { Arch::X86_64 };
        let stack_pointer = usize::from(dwarf_register::stack_pointer(arch));
        let stack_start = registers.get(stack_pointer).copied().unwrap_or(0);
        let snapshot = ThreadSnapshot { arch, pc: *pc, registers, stack_start, stack, unread };
        let code = interpreter.and_then(|interpreter| interpreter.code.as_ref());
        let source = ImageTables {
            files: &self.files,
            image,
            missing: RefCell::new(None),
            walk: code.map(|code| CodeWalk::new(code, *live_until_ns)),
            bias: interpreter.map_or(0, |interpreter| interpreter.bias),
            is_unattached: Cell::new(false),
        };
        let unwound = unwind_stack(&snapshot, &source, MAX_FRAMES);
        let missing = source.missing.into_inner();
        let is_unattached = source.is_unattached.get();
        let WalkedCode { words: functions, mut needs, unproven, .. } =
            source.walk.map(CodeWalk::finish).unwrap_or_default();
        if let Some(code) = code.filter(|_| !needs.addresses.is_empty() && unwound.end != UnwindEnd::Complete)
        {
            // Callers of unknown code are unknown too: the stack names those that it may have.
            needs.add(code.candidates(stack));
        }
        // Lists that were taken by the layout of another interpreter are no use.
        let layout = self.runtime_of(image).map(|(file, _)| file.detected.layout);
        let lists = lists.as_ref().filter(|_| layout == Some(sample.list_layout));
        let StackWords { words: frames, guessed_from, is_cut } =
            with_functions(&unwound.frames, functions, lists.cloned().unwrap_or_default());
        let (end, unknown) = match unwound.end {
            _ if is_cut => (StackEnd::Truncated, None),
            UnwindEnd::Complete => (StackEnd::Complete, None),
            // Or the copy ends before the stack does, or the stack continues elsewhere, below a signal handler.
            UnwindEnd::Truncated | UnwindEnd::StackMissing { .. } => (StackEnd::Truncated, None),
            UnwindEnd::Unreadable { .. } => (StackEnd::Unreadable, None),
            UnwindEnd::NoTable { address } if image.find(address).is_none() => {
                (StackEnd::Broken, Some(address))
            }
            UnwindEnd::NoTable { .. }
            | UnwindEnd::NoRule { .. }
            | UnwindEnd::Unsupported(_)
            | UnwindEnd::RegisterLost
            | UnwindEnd::NoProgress => (StackEnd::Broken, None),
        };
        UnwoundSample { frames, end, unknown, missing, guessed_from, needs, is_unattached, unproven }
    }
}

/// A stack in the form of samples.
struct StackWords {
    /// Leaf first; see [`crate::model::StackWord`].
    words: Vec<u64>,
    /// The index of the first frame that was found by a guess.
    guessed_from: Option<u16>,
    /// Whether frames beyond the limit were left out.
    is_cut: bool,
}

/// Puts list frames in front of the native frames that stand for them, and functions in the place of frames of generated code:
/// `functions` has the words of each such frame, by its program counter and leaf first.
fn with_functions(
    frames: &[UnwindFrame],
    functions: Vec<(u64, Vec<u64>)>,
    mut lists: RawLists,
) -> StackWords {
    let mut functions = functions.into_iter().peekable();
    let (mut words, mut depth, mut guessed_from) = (Vec::with_capacity(frames.len()), 0, None);
    for (index, frame) in frames.iter().enumerate() {
        if frame.guessed && guessed_from.is_none() {
            guessed_from = u16::try_from(words.len()).ok();
        }
        let own = functions.next_if(|(pc, _)| *pc == frame.pc).map(|(_, words)| words).unwrap_or_default();
        let is_native = own.is_empty();
        let named = if is_native {
            frame.list.and_then(|(low, high)| lists.take_run(low, high)).unwrap_or_default().words
        } else {
            own
        };
        let count = named.len() / 2;
        if depth + count + usize::from(is_native) > MAX_FRAMES {
            words.extend(named.into_iter().take(2 * (MAX_FRAMES - depth)));
            guessed_from = guessed_from.filter(|from| usize::from(*from) < words.len());
            return StackWords { words, guessed_from, is_cut: true };
        }
        words.extend(named);
        depth += count;
        if is_native {
            // The kernel side reports frames in this form too: callers are looked up one byte back.
            words.push(if frame.exact && index > 0 { frame.pc.wrapping_add(1) } else { frame.pc });
            depth += 1;
        }
    }
    StackWords { words, guessed_from, is_cut: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ListRun, StackWord};

    /// Frames at these program counters; those from `guessed` on were found by a guess. The second one stands for list frames.
    fn frames(pcs: &[u64], guessed: usize) -> Vec<UnwindFrame> {
        let frame = |(index, pc): (usize, &u64)| UnwindFrame {
            pc: *pc,
            exact: index == 0,
            guessed: index >= guessed,
            list: (index == 1).then_some((100, 200)),
        };
        pcs.iter().enumerate().map(frame).collect()
    }

    #[test]
    fn the_first_guess_is_marked_among_list_frames_and_functions() {
        let function = StackWord::Function(7).encode();
        let position = StackWord::Position { sum: 1, position: 2 }.encode();
        let named = vec![function, position];
        let lists = RawLists {
            newest_native: 150,
            runs: vec![ListRun { words: [&named[..], &named].concat(), native: 150 }],
        };
        let words = [10, function, position, function, position, 20, function, position, 40];
        // The list frames in front of a guessed frame rest on the guess, and so does the function in its place.
        for (guessed, expected) in [(0, Some(0)), (1, Some(1)), (2, Some(6)), (3, Some(8)), (4, None)] {
            let stack =
                with_functions(&frames(&[10, 20, 30, 40], guessed), vec![(30, named.clone())], lists.clone());
            assert_eq!((&stack.words[..], stack.is_cut), (&words[..], false));
            assert_eq!(stack.guessed_from, expected, "{guessed}");
        }
    }

    #[test]
    fn a_guess_beyond_the_last_frame_marks_none() {
        let many = |count: usize| vec![StackWord::Function(7).encode(); 2 * count];
        for (count, words, expected) in [
            (MAX_FRAMES - 1, 2 * MAX_FRAMES - 1, Some(2 * MAX_FRAMES as u16 - 2)),
            (MAX_FRAMES, 2 * MAX_FRAMES, None),
            (MAX_FRAMES + 1, 2 * MAX_FRAMES, None),
        ] {
            let stack = with_functions(&frames(&[10, 20], 1), vec![(10, many(count))], RawLists::default());
            assert_eq!((stack.words.len(), stack.guessed_from), (words, expected), "{count}");
            assert_eq!(stack.is_cut, count >= MAX_FRAMES);
        }
        // What was guessed in front of the cut stays marked.
        let stack =
            with_functions(&frames(&[10, 20], 0), vec![(10, many(MAX_FRAMES + 1))], RawLists::default());
        assert_eq!((stack.guessed_from, stack.is_cut), (Some(0), true));
    }
}
