//! Walks a raw sample: registers and a copy of the stack, by the tables that the kernel side uses.

use std::cell::Cell;

use gannet_unwind::{
    format::{Rule, cfa, dwarf_register, flags, loc},
    table::Arch,
};

use super::Tables;
use crate::{
    kernel::{RawUserStack, Sample},
    process::Image,
    profile::StackEnd,
};

/// As many as the kernel side keeps.
const MAX_FRAMES: usize = 512;

/// What a walk found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walked {
    /// Leaf first.
    pub frames: Vec<u64>,
    /// How it ended.
    pub end: StackEnd,
    /// It ended at an address that no mapping of the image holds.
    pub unknown: Option<u64>,
}

/// A raw sample of a process of which nothing is known: where it was is all that can be told.
pub fn unwalked(mut sample: Sample) -> Sample {
    if let Some(raw) = sample.raw.take() {
        sample.user = vec![raw.pc];
        sample.end = StackEnd::Broken;
    }
    sample
}

impl Tables {
    /// Walks a raw sample; one that is none comes back as it is.
    pub fn walk(&self, image: &Image, sample: &Sample) -> Walked {
        let Some(raw) = &sample.raw else {
            return Walked { frames: sample.user.clone(), end: sample.end, unknown: None };
        };
        let arch = if cfg!(target_arch = "aarch64") { Arch::Aarch64 } else { Arch::X86_64 };
        let mut walk = Walk::of(raw, arch);
        let mut frames = Vec::new();
        let (end, unknown) = loop {
            if frames.len() == MAX_FRAMES {
                break (StackEnd::Truncated, None);
            }
            frames.push(walk.pc);
            let address = if walk.exact { walk.pc } else { walk.pc.wrapping_sub(1) };
            let Some(mapping) = image.find(address) else { break (StackEnd::Broken, Some(address)) };
            let rule = match self.table_of(mapping) {
                Some((table, bias)) => table.lookup(address.wrapping_sub(bias)).unwrap_or(Rule::NONE),
                None => Rule::NONE,
            };
            match walk.step(&rule) {
                Step::Caller => {}
                Step::Outermost => break (StackEnd::Complete, None),
                Step::Stuck => break (StackEnd::Broken, None),
                Step::Beyond => break (StackEnd::Truncated, None),
            }
        };
        Walked { frames, end, unknown }
    }
}

enum Step {
    Caller,
    Outermost,
    Stuck,
    /// The copy of the stack ends before the stack does.
    Beyond,
}

struct Walk<'a> {
    pc: u64,
    sp: u64,
    fp: Option<u64>,
    exact: bool,
    first: bool,
    raw: &'a RawUserStack,
    stack_start: u64,
    /// The last byte that was asked for.
    wanted: Cell<u64>,
}

impl<'a> Walk<'a> {
    fn of(raw: &'a RawUserStack, arch: Arch) -> Self {
        let (sp, fp) = match arch {
            Arch::X86_64 => (dwarf_register::X86_64_SP, dwarf_register::X86_64_FP),
            Arch::Aarch64 => (dwarf_register::AARCH64_SP, dwarf_register::AARCH64_FP),
        };
        let register = |number: u16| raw.registers.get(usize::from(number)).copied();
        let sp = register(sp).unwrap_or(0);
        Self {
            pc: raw.pc,
            sp,
            fp: register(fp),
            exact: true,
            first: true,
            raw,
            stack_start: sp,
            wanted: Cell::new(0),
        }
    }

    fn read(&self, address: u64) -> Option<u64> {
        self.wanted.set(address.saturating_add(7));
        let at = usize::try_from(address.checked_sub(self.stack_start)?).ok()?;
        let bytes = self.raw.stack.get(at..)?.first_chunk()?;
        Some(u64::from_ne_bytes(*bytes))
    }

    /// Only the first frame's registers are all known.
    fn register(&self, kind: u8) -> Option<u64> {
        if !self.first {
            return None;
        }
        self.raw.registers.get(usize::from(kind & 31)).copied()
    }

    fn step(&mut self, rule: &Rule) -> Step {
        match rule.cfa_kind {
            cfa::NONE | cfa::UNSUPPORTED => self.by_frame_pointer(),
            _ if rule.is_outermost() => Step::Outermost,
            _ => self.by_rule(rule).unwrap_or_else(|| self.stuck()),
        }
    }

    fn stuck(&self) -> Step {
        if self.wanted.get() >= self.stack_start.saturating_add(self.raw.stack.len() as u64) {
            Step::Beyond
        } else {
            Step::Stuck
        }
    }

    fn by_rule(&mut self, rule: &Rule) -> Option<Step> {
        let offset = |base: u64, offset: i32| base.wrapping_add_signed(offset.into());
        let deref = |base: u64| {
            let at = self.read(offset(base, rule.cfa_offset >> 8))?;
            Some(at.wrapping_add((rule.cfa_offset & 0xff) as u64))
        };
        let cfa = match rule.cfa_kind {
            cfa::SP => offset(self.sp, rule.cfa_offset),
            cfa::FP => offset(self.fp?, rule.cfa_offset),
            cfa::SP_DEREF => deref(self.sp)?,
            cfa::FP_DEREF => deref(self.fp?)?,
            cfa::PLT => self.sp + if (self.pc & 15) >= rule.cfa_offset as u64 { 16 } else { 8 },
            kind => offset(self.register(kind)?, rule.cfa_offset),
        };
        let at = |kind: u8, by: i32| match kind {
            loc::CFA => self.read(offset(cfa, by)),
            loc::SP => self.read(offset(self.sp, by)),
            loc::FP => self.read(offset(self.fp?, by)),
            kind => self.register(kind),
        };
        let ra = at(rule.ra_kind, rule.ra_offset)?;
        let fp = match rule.fp_kind {
            loc::SAME => self.fp,
            loc::UNDEFINED => None,
            kind => Some(at(kind, rule.fp_offset)?),
        };
        let signal = rule.flags & flags::SIGNAL != 0;
        if cfa <= self.sp && !signal && !(cfa == self.sp && self.first) {
            return None;
        }
        (self.sp, self.fp, self.pc) = (cfa, fp, ra);
        (self.exact, self.first) = (signal, false);
        Some(if ra == 0 { Step::Outermost } else { Step::Caller })
    }

    fn by_frame_pointer(&mut self) -> Step {
        let Some(fp) = self.fp.filter(|fp| *fp >= self.sp && fp.is_multiple_of(8)) else {
            return Step::Stuck;
        };
        let (Some(saved), Some(ra)) = (self.read(fp), self.read(fp.wrapping_add(8))) else {
            return Step::Stuck;
        };
        (self.sp, self.fp, self.pc) = (fp.wrapping_add(16), Some(saved), ra);
        (self.exact, self.first) = (false, false);
        if ra == 0 { Step::Outermost } else { Step::Caller }
    }
}
