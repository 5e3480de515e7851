//! Walks a raw sample: registers and a copy of the stack, by the tables that the kernel side uses.

use std::{cell::RefCell, sync::Arc};

use gannet_elf::Arch;
use gannet_unwind::{
    format::dwarf_register,
    table::UnwindTable,
    unwind::{TableSource, ThreadSnapshot, UnwindEnd, unwind_stack},
};

use super::{Found, Tables};
use crate::model::{Image, MappedFile, RawUserStack, Sample, StackEnd};

/// As many as the kernel side keeps.
const MAX_FRAMES: usize = 512;

/// What a walk found.
#[derive(Clone, Debug)]
pub struct Walked {
    /// Leaf first; of a frame that a signal interrupted, the byte behind the place.
    pub frames: Vec<u64>,
    /// How it ended.
    pub end: StackEnd,
    /// It ended at an address that no mapping of the image holds.
    pub unknown: Option<u64>,
    /// It came to a file whose table is still to be made, and went on by frame pointer there: once it is made the walk
    /// should be done again.
    pub missing: Option<Arc<MappedFile>>,
}

/// A raw sample of a process of which nothing is known: where it was is all that can be told.
pub fn unwalked(mut sample: Sample) -> Sample {
    if let Some(raw) = sample.raw.take() {
        sample.user = vec![raw.pc];
        sample.end = StackEnd::Broken;
    }
    sample
}

impl Sample {
    /// The sample as the walk found it, no longer raw.
    pub(crate) fn take_walk(&mut self, walked: Walked) {
        self.user = walked.frames;
        self.end = walked.end;
        self.raw = None;
    }
}

/// The tables of one image.
struct OfImage<'a> {
    tables: &'a Tables,
    image: &'a Image,
    /// The first file whose table was needed and is not there.
    missing: RefCell<Option<Arc<MappedFile>>>,
}

impl TableSource for OfImage<'_> {
    fn find(&self, address: u64) -> Option<(&UnwindTable, u64)> {
        match self.tables.find(self.image.find(address)?) {
            Found::UnwindTable(table, bias) => Some((table, bias)),
            Found::NotYet(file) => {
                self.missing.borrow_mut().get_or_insert_with(|| Arc::clone(file));
                None
            }
            Found::None => None,
        }
    }

    fn is_code(&self, address: u64) -> bool {
        self.image.find(address).is_some()
    }
}

impl Tables {
    /// Walks a raw sample; one that is none comes back as it is.
    pub fn walk(&self, image: &Image, sample: &Sample) -> Walked {
        let Some(raw) = &sample.raw else {
            return Walked { frames: sample.user.clone(), end: sample.end, unknown: None, missing: None };
        };
        let RawUserStack { pc, registers, stack } = raw;
        let arch = if cfg!(target_arch = "aarch64") { Arch::Aarch64 } else { Arch::X86_64 };
        let stack_start =
            registers.get(usize::from(dwarf_register::stack_pointer(arch))).copied().unwrap_or(0);
        let snapshot = ThreadSnapshot { arch, pc: *pc, registers, stack_start, stack };
        let source = OfImage { tables: self, image, missing: RefCell::new(None) };
        let walked = unwind_stack(&snapshot, &source, MAX_FRAMES);
        let frames = walked.frames.iter().enumerate().map(|(depth, frame)| {
            // As the kernel side gives it: callers are looked up one byte back.
            if frame.exact && depth > 0 { frame.pc.wrapping_add(1) } else { frame.pc }
        });
        let (end, unknown) = match walked.end {
            UnwindEnd::Complete => (StackEnd::Complete, None),
            // Or the copy ends before the stack does, or the stack goes on elsewhere, below a signal handler.
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
        Walked { frames: frames.collect(), end, unknown, missing: source.missing.into_inner() }
    }
}
