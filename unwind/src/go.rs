//! Unwind rows of Go code, from Go's own function table.
//!
//! Go programs have no `.eh_frame` for Go code, and `.debug_frame` is gone once they are stripped; the function table
//! always stays, because the Go runtime unwinds stacks with it.
use gannet_elf::{Arch, GoFault, GoFunction, GoTable, Segments};

use crate::format::{UnwindRule, cfa, dwarf_register, loc};
use crate::limits::{Budget, LimitExceeded, TableQuantity, at_most};

/// The Go functions of one file.
#[derive(Debug)]
pub(crate) struct GoFunctions<'d> {
    table: GoTable<'d>,
    arch: Arch,
    pub(crate) functions: Vec<GoFunction>,
    /// Functions outside all executable segments or out of order.
    pub(crate) dropped: u64,
}

/// Longest name that is compared with the few that matter.
const MAX_NAME_BYTES: usize = 64;
/// Steps of one function's stack depth; far above what a compiler makes, and it ends a table that never ends.
const MAX_STEPS: usize = 1 << 20;
/// Bytes of a function that does nothing but return from a signal handler.
const MAX_SIGRETURN_BYTES: u64 = 32;

impl<'d> GoFunctions<'d> {
    /// Reads the list of functions.
    pub(crate) fn collect(
        table: GoTable<'d>,
        arch: Arch,
        segments: &Segments,
        budget: &mut Budget<'_>,
    ) -> Result<Result<Self, GoFault>, LimitExceeded> {
        at_most(TableQuantity::Functions, budget.limits.functions, table.function_count())?;
        let (mut functions, mut dropped) = (Vec::new(), 0);
        for function in table.functions(segments) {
            budget.step()?;
            match function {
                Ok(Some(function)) => functions.push(function),
                Ok(None) => dropped += 1,
                Err(fault) => return Ok(Err(fault)),
            }
        }
        Ok(Ok(Self { table, arch, functions, dropped }))
    }

    /// Calls `row` with each address from which another rule holds in a function, ascending, and the rule.
    pub(crate) fn rows<E: From<LimitExceeded>>(
        &self,
        function: &GoFunction,
        budget: &mut Budget<'_>,
        mut row: impl FnMut(u64, UnwindRule) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(record) = self.table.record(function) else {
            return row(function.start, UnwindRule::FRAME_POINTER);
        };
        let name = || self.table.name(&record, MAX_NAME_BYTES);
        // Go ends its traces at the signal trampoline too, but the trampoline's caller is known.
        if record.is_top_frame() && !name().ends_with(b"igtramp") {
            return row(function.start, UnwindRule::OUTERMOST);
        }
        if record.writes_stack_pointer() {
            return row(function.start, UnwindRule::FRAME_POINTER);
        }
        if function.end - function.start <= MAX_SIGRETURN_BYTES && name().starts_with(b"runtime.sigreturn") {
            return row(function.start, signal_rule(self.arch));
        }
        if !record.has_stack_depths() {
            return row(function.start, UnwindRule::FRAME_POINTER);
        }
        let mut pc = function.start;
        for (bytes, depth) in self.table.stack_depths(&record).take(MAX_STEPS) {
            budget.step()?;
            row(pc, self.rule(depth))?;
            pc = pc.saturating_add(bytes);
            if pc >= function.end {
                return Ok(());
            }
        }
        // The table says nothing about the rest.
        row(pc, UnwindRule::FRAME_POINTER)
    }

    /// Returns the rule at a stack depth.
    ///
    /// The frame pointer is saved on top of every frame that has any depth. In the few instructions before that is done it
    /// is not there yet; Go's own frames do not need it, so only a C caller of the innermost frame would.
    fn rule(&self, depth: i32) -> UnwindRule {
        if depth < 0 {
            return UnwindRule::FRAME_POINTER;
        }
        let depth = depth.min(i32::MAX - 16);
        match self.arch {
            Arch::X86_64 if depth == 0 => UnwindRule::X86_64_ENTRY,
            Arch::X86_64 => {
                UnwindRule { fp_kind: loc::CFA, fp_offset: -16, ..UnwindRule::x86_64_sp(depth + 8) }
            }
            Arch::Aarch64 if depth == 0 => UnwindRule {
                cfa_kind: cfa::SP,
                ra_kind: loc::REGISTER + dwarf_register::AARCH64_LR as u8,
                ..UnwindRule::NONE
            },
            Arch::Aarch64 => UnwindRule {
                cfa_kind: cfa::SP,
                cfa_offset: depth,
                fp_kind: loc::SP,
                fp_offset: -8,
                ra_kind: loc::SP,
                ra_offset: 0,
                flags: 0,
            },
        }
    }
}

pub(crate) fn signal_rule(arch: Arch) -> UnwindRule {
    match arch {
        Arch::X86_64 => UnwindRule::X86_64_SIGNAL,
        Arch::Aarch64 => UnwindRule::AARCH64_SIGNAL,
    }
}
