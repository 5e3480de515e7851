//! Code of known form that files often do not describe: linkage tables, the entry point, signal trampolines.

use gannet_elf::{Arch, Elf};

use super::{
    BuildFault, BuildReport,
    pieces::{Piece, Source, gaps},
};
use crate::format::{UnwindRule, cfa, dwarf_register, loc};
use crate::go;
use crate::limits::Budget;

/// Longer than any known `_start`.
const ENTRY_BYTES: u64 = 64;

/// Returns the ranges of linkage tables, for linkers (lld) that do not describe them.
pub(super) fn linkage(elf: &Elf<'_>) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for name in [&b".plt"[..], b".plt.sec", b".plt.got", b".iplt", b".plt.bnd"] {
        let Some(section) = elf.section(name) else { continue };
        let (start, bytes) = (section.vaddr, section.bytes);
        let Some(end) = start.checked_add(bytes) else { continue };
        if bytes == 0 || elf.segments().executable_end(start).is_none_or(|limit| end > limit) {
            continue;
        }
        let mut fixed = |start: u64, end: u64, rule: UnwindRule| {
            if start < end {
                pieces.push(Piece { start, end, source: Source::Fixed(rule) });
            }
        };
        match elf.arch() {
            Arch::X86_64 => {
                let code = elf.bytes_at(start, 32).unwrap_or_default();
                // `push GOT[1]`: the first entry of a lazy table, where two words are on the stack.
                let first = if code.starts_with(&[0xff, 0x35]) { 16 } else { 0 };
                if first > 0 {
                    fixed(start, end.min(start + 6), UnwindRule::x86_64_sp(16));
                    fixed(start + 6, end.min(start + 16), UnwindRule::x86_64_sp(24));
                }
                let entry = code.get(first..).unwrap_or_default();
                let rule = if entry.starts_with(&[0xf3, 0x0f, 0x1e, 0xfa, 0x68]) {
                    // endbr64; push index; jmp
                    UnwindRule::x86_64_plt(9)
                } else if entry.starts_with(&[0xff, 0x25]) && entry.get(6) == Some(&0x68) {
                    // jmp *slot; push index; jmp
                    UnwindRule::x86_64_plt(11)
                } else {
                    UnwindRule::X86_64_ENTRY
                };
                fixed(end.min(start + first as u64), end, rule);
            }
            Arch::Aarch64 => {
                let lr = loc::REGISTER + dwarf_register::AARCH64_LR as u8;
                let entry = UnwindRule { cfa_kind: cfa::SP, ra_kind: lr, ..UnwindRule::NONE };
                let code = elf.bytes_at(start, 8).unwrap_or_default();
                // stp x16, x30, [sp, #-16]!, behind a landing pad or not
                let push = [0xf0, 0x7b, 0xbf, 0xa9];
                let pushed_at = if code.starts_with(&push) {
                    Some(4)
                } else if code.get(4..) == Some(&push[..]) {
                    Some(8)
                } else {
                    None
                };
                if let Some(pushed_at) = pushed_at {
                    fixed(start, end.min(start + pushed_at), entry);
                    fixed(
                        end.min(start + pushed_at),
                        end.min(start + 32),
                        UnwindRule { cfa_offset: 16, ..entry },
                    );
                    fixed(end.min(start + 32), end, entry);
                } else {
                    fixed(start, end, entry);
                }
            }
        }
    }
    pieces.sort_unstable_by_key(|piece| piece.start);
    pieces.dedup_by(|later, earlier| later.start < earlier.end);
    pieces
}

/// Returns the first bytes of a program that does not describe them, such as the dynamic linker: they have no caller.
pub(super) fn entry_point(elf: &Elf<'_>) -> Option<Piece> {
    let start = elf.entry();
    let end = elf.segments().executable_end(start)?.min(start.saturating_add(ENTRY_BYTES));
    (start > 0 && start < end).then_some(Piece { start, end, source: Source::Fixed(UnwindRule::OUTERMOST) })
}

/// Returns signal trampolines in code that nothing describes, as in musl: `mov $15, %rax; syscall` and similar code.
pub(super) fn trampolines(
    elf: &Elf<'_>,
    pieces: &[Piece],
    budget: &mut Budget<'_>,
    report: &mut BuildReport,
) -> Result<Vec<Piece>, BuildFault> {
    let patterns: &[&[u8]] = match elf.arch() {
        Arch::X86_64 => &[&[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05], &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05]],
        // mov x8, #139; svc #0
        Arch::Aarch64 => &[&[0x68, 0x11, 0x80, 0xd2, 0x01, 0, 0, 0xd4]],
    };
    let rule = go::signal_rule(elf.arch());
    let mut found = Vec::new();
    let mut left = budget.limits.scanned_bytes;
    for (start, end) in gaps(elf.code(), pieces) {
        budget.check()?;
        let bytes = elf.bytes_at(start, (end - start).min(left)).unwrap_or_default();
        left -= bytes.len() as u64;
        if left == 0 {
            report.unscanned_bytes += end - start - bytes.len() as u64;
        }
        let first_bytes: Vec<u8> = patterns.iter().map(|pattern| pattern[0]).collect();
        let mut at = 0;
        while let Some(next) = bytes[at..].iter().position(|byte| first_bytes.contains(byte)) {
            at += next;
            if let Some(pattern) = patterns.iter().find(|pattern| bytes[at..].starts_with(pattern)) {
                // The handler returns to the first byte, and callers are looked up one byte earlier: a nop or padding
                // stands there for that.
                let padded = at > 0 && matches!(bytes[at - 1], 0x90 | 0xcc | 0 | 0xd5);
                let first = start + at as u64 - u64::from(padded);
                let end = start + (at + pattern.len()) as u64;
                if found.last().is_none_or(|last: &Piece| last.end <= first) {
                    found.push(Piece { start: first, end, source: Source::Fixed(rule) });
                }
                at += pattern.len();
            } else {
                at += 1;
            }
        }
    }
    Ok(found)
}
