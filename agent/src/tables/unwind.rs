//! Unwinds raw samples: registers and a copy of the stack, by the same tables as the kernel side.

use std::{cell::RefCell, sync::Arc};

use gannet_elf::Arch;
use gannet_unwind::{
    format::dwarf_register,
    table::UnwindTable,
    unwind::{TableSource, ThreadSnapshot, UnwindEnd, UnwindFrame, unwind_stack},
};

use super::{
    UnwindTables,
    files::{FileTables, MappingTable},
};
use crate::model::{Image, MappedFile, MappingKind, RawLists, RawUserStack, Sample, StackEnd};

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
    /// At least one frame was found by frame pointer where no table had a rule.
    pub(crate) guessed: bool,
}

impl UnwoundSample {
    /// Puts the stack into its sample, which is no longer raw.
    pub(crate) fn complete(self, sample: &mut Sample) {
        sample.user = self.frames;
        sample.end = self.end;
        sample.marks.guessed = self.guessed;
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
}

impl TableSource for ImageTables<'_> {
    fn find(&self, address: u64) -> Option<(&UnwindTable, u64)> {
        let mapping = self.image.find(address)?;
        match (self.files.of_mapping(mapping), &mapping.kind) {
            (MappingTable::Built { table: Some(table), bias, .. }, _) => Some((table, bias?)),
            (MappingTable::Built { table: None, .. } | MappingTable::NotBuilt, MappingKind::File(file)) => {
                self.missing.borrow_mut().get_or_insert_with(|| Arc::clone(file));
                None
            }
            _ => None,
        }
    }

    fn is_code(&self, address: u64) -> bool {
        self.image.find(address).is_some()
    }
}

impl UnwindTables {
    /// Unwinds a raw sample. A sample that is not raw keeps its frames.
    pub(crate) fn unwind(&self, image: &Image, sample: &Sample) -> UnwoundSample {
        let Some(raw) = &sample.raw else {
            return UnwoundSample {
                frames: sample.user.clone(),
                end: sample.end,
                unknown: None,
                missing: None,
                guessed: sample.marks.guessed,
            };
        };
        let RawUserStack { pc, registers, stack, lists } = raw;
        let arch = if cfg!(target_arch = "aarch64") { Arch::Aarch64 } else { Arch::X86_64 };
        let stack_pointer = usize::from(dwarf_register::stack_pointer(arch));
        let stack_start = registers.get(stack_pointer).copied().unwrap_or(0);
        let snapshot = ThreadSnapshot { arch, pc: *pc, registers, stack_start, stack };
        let source = ImageTables { files: &self.files, image, missing: RefCell::new(None) };
        let unwound = unwind_stack(&snapshot, &source, MAX_FRAMES);
        let guessed = unwound.frames.iter().any(|frame| frame.guessed);
        // Lists that were taken by the layout of another interpreter are no use.
        let layout = self.runtime_of(image).map(|(file, _)| file.detected.layout);
        let lists = lists.as_ref().filter(|_| layout == Some(sample.list_layout));
        let (frames, is_cut) = with_lists(&unwound.frames, lists.cloned().unwrap_or_default());
        let (end, unknown) = match unwound.end {
            _ if is_cut => (StackEnd::Truncated, None),
            UnwindEnd::Complete => (StackEnd::Complete, None),
            // Or the copy ends before the stack does, or the stack continues elsewhere, below a signal handler.
            UnwindEnd::Truncated | UnwindEnd::StackMissing { .. } => (StackEnd::Truncated, None),
            UnwindEnd::NoTable { address } if image.find(address).is_none() => {
                (StackEnd::Broken, Some(address))
            }
            UnwindEnd::NoTable { .. }
            | UnwindEnd::NoRule { .. }
            | UnwindEnd::Unsupported(_)
            | UnwindEnd::RegisterLost
            | UnwindEnd::NoProgress => (StackEnd::Broken, None),
        };
        let missing = source.missing.into_inner();
        UnwoundSample { frames, end, unknown, missing, guessed }
    }
}

/// Puts list frames in front of the native frames that stand for them. Returns the words of the stack, and whether frames
/// beyond the limit were left out.
fn with_lists(frames: &[UnwindFrame], mut lists: RawLists) -> (Vec<u64>, bool) {
    let (mut words, mut depth) = (Vec::with_capacity(frames.len()), 0);
    for (index, frame) in frames.iter().enumerate() {
        let run = frame.list.and_then(|(low, high)| lists.take_run(low, high)).unwrap_or_default();
        let listed = run.words.len() / 2;
        if depth + listed + 1 > MAX_FRAMES {
            words.extend(run.words.into_iter().take(2 * (MAX_FRAMES - depth)));
            return (words, true);
        }
        words.extend(run.words);
        // The kernel side reports frames in this form too: callers are looked up one byte back.
        words.push(if frame.exact && index > 0 { frame.pc.wrapping_add(1) } else { frame.pc });
        depth += listed + 1;
    }
    (words, false)
}
