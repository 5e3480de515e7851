//! The layout of unwind tables: what the kernel side reads, word for word.
//!
//! # One table
//! A table is an array of 64-byte [`CacheLine`]s (each is one value of a BPF array), directory first:
//!
//! ```text
//! line 0 .. d-1      directory: one u32 per granule (2 KiB) of ELF virtual address, 16 to a line
//! line d .. n-1      rows: one u32 each, 16 to a line, ascending within a page (64 KiB)
//! ```
//!
//! * The **base** of a table is the ELF virtual address of its first granule, a multiple of [`PAGE_BYTES`].
//! * A **directory word** locates the rows of one granule: bits 0..24 are the first line (counted from line 0 of the table, so
//!   never below `d`), bits 24..32 the number of further lines that may hold the row.
//! * An **unwind row** is `pc_low << 16 | rule`: from `page + pc_low` on, until the next row, rule number `rule` holds. The
//!   address is in the high half, so that comparing whole words orders rows.
//! * A line never crosses a page, and the first row of every page has `pc_low` 0, with the rule that holds at the start of the
//!   page. So the first line of a directory word always has a row at or before the address, and no search goes back.
//! * Unused rows at the end of a page's last line repeat its last real row. A search may find one of them: its rule is the same
//!   as that of the real row, at every address (0xffff too).
//! * Rule number 0 is [`UnwindRule::NONE`] in every table: "no function here".
//!
//! # Search
//! ```text
//! offset  = address - base                  (refuse if address < base)
//! granule = offset >> GRANULE_SHIFT         (refuse if granule >= granules)
//! word    = line[granule >> 4][granule & 15]
//! first, more = word & 0xffffff, word >> 24
//! key     = (address & 0xffff) << 16 | 0xffff
//! at = 0;  for step in 128, 64, .. 1:  if at + step <= more and line[first + at + step][0] <= key: at += step
//! row = 0; for step in 8, 4, 2, 1:     if line[first + at][row + step] <= key: row += step
//! rule    = line[first + at][row] & 0xffff
//! ```
//! Both loops have a constant number of steps. In shipped code a granule spans some 5 lines, so 2 or 3 of the 8 steps of the first
//! loop read a line; a row for every single address would need all 8.
//!
//! # Rule numbers
//! [`crate::table::UnwindTable`] numbers its own rules from 0. In the kernel all tables share one array of [`UnwindRule`]s, and
//! [`crate::intern::RuleInterner`] turns a table's own numbers into those of the node.
//!
//! # One step of unwinding
//! `sp`, `fp` and `pc` are the registers of the frame; `fp` is rbp or x29. A register marked lost makes every rule
//! that reads it fail.
//!
//! ```text
//! rule = lookup(pc_is_exact ? pc : pc - 1)     exact for the first frame and the one below a signal frame
//! cfa  = by cfa_kind                           see `cfa`
//! ra   = by ra_kind                            UNDEFINED: the stack ends here and is complete
//! fp'  = by fp_kind                            UNDEFINED: lost from here on
//! rbx' = by flags >> RBX_SHIFT & 7             x86_64 only; see there
//! sp'  = cfa;  pc' = ra (signature bits stripped);  pc_is_exact' = flags & SIGNAL
//! ```
//! A register rule (`REGISTER + n`) works only in the first frame, whose registers are all known. rbx is the exception: the
//! dynamic linker aligns its stack by rbx while it looks up a function that is called for the first time, and makes calls.
//! Tables of files with such a rule locate the caller's rbx in every frame ([`flags::RBX_SHIFT`]); frames of other tables lose
//! it.
//!
//! # Runs
//! Half of all rows are single steps of runs of pushes and pops, at the beginning and the end of functions. A table may hold each
//! run as one row. Its rule lists the distances from the row's address at which the stack pointer moves by 8
//! ([`cfa::PUSHES`], [`cfa::POPS`]). A step by such a rule needs the row's `pc_low` as well as its number:
//!
//! ```text
//! distance = (address & 0xffff) - (row >> 16)
//! steps    = popcount(ra_offset & ((2 << min(distance, 15)) - 1))
//! size     = cfa_offset + 8 * steps                (PUSHES; minus for POPS)
//! cfa      = sp + size;  ra = *(u64 *)(cfa - 8)
//! fp'      = fp_kind == CFA and size >= -fp_offset ? *(u64 *)(cfa + fp_offset) : fp
//! ```
//! Tables have runs only by option ([`crate::build::BuildOptions::runs`]), and no run reaches into the next page.
//! [`UnwindRule::after`] is the same in Rust; [`crate::table::UnwindTable::lookup`] applies it.

/// The logarithm of [`PAGE_BYTES`].
pub const PAGE_SHIFT: u32 = 16;
/// Bytes of a page of ELF virtual addresses, for which rows have 16-bit addresses.
pub const PAGE_BYTES: u64 = 1 << PAGE_SHIFT;
/// The logarithm of [`GRANULE_BYTES`]. Smaller granules shorten the search and cost 4 bytes each: at 2 KiB the directory is below
/// 2 % of a usual table.
pub const GRANULE_SHIFT: u32 = 11;
/// Bytes of ELF virtual address per directory word.
pub const GRANULE_BYTES: u64 = 1 << GRANULE_SHIFT;
/// Words in a cache line.
pub const WORDS_PER_LINE: usize = 16;
/// Bytes of a cache line.
pub const LINE_BYTES: usize = 64;
/// Bits of a directory word that hold the first line.
pub const DIRECTORY_LINE_BITS: u32 = 24;
/// Limit of the cache lines of one table.
pub const MAX_LINES: usize = 1 << DIRECTORY_LINE_BITS;
/// Limit of the cache lines beyond the first of one granule: a row for each of its addresses, in lines of which the first is shared
/// with the granule before.
pub const MAX_MORE_LINES: u32 = (GRANULE_BYTES as u32).div_ceil(WORDS_PER_LINE as u32);
/// The first (largest) step of the search over lines; its steps halve down to 1.
pub const FIRST_LINE_STEP: u32 = 128;
/// The first (largest) step of the search within a line.
pub const FIRST_ROW_STEP: usize = WORDS_PER_LINE / 2;
/// Bytes from the first to the last step of a run ([`cfa::PUSHES`]).
pub const MAX_RUN_BYTES: u64 = 15;
/// Rule numbers are 16 bits, and 0 is [`UnwindRule::NONE`].
pub const MAX_RULES: usize = 1 << 16;
/// The number of [`UnwindRule::NONE`] in every table and on every node.
pub const RULE_NONE: u16 = 0;

const _: () = assert!(GRANULE_SHIFT < PAGE_SHIFT);
const _: () = assert!(MAX_MORE_LINES < 1 << (32 - DIRECTORY_LINE_BITS));
const _: () = assert!(FIRST_LINE_STEP.is_power_of_two() && MAX_MORE_LINES < 2 * FIRST_LINE_STEP);
const _: () = assert!(WORDS_PER_LINE == 2 * FIRST_ROW_STEP);
const _: () = assert!(LINE_BYTES == WORDS_PER_LINE * size_of::<u32>());
const _: () = assert!(size_of::<CacheLine>() == LINE_BYTES && align_of::<CacheLine>() == LINE_BYTES);
const _: () = assert!(size_of::<UnwindRule>() == 16 && align_of::<UnwindRule>() == 4);

/// Sixteen directory words or unwind rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C, align(64))]
pub struct CacheLine(pub [u32; WORDS_PER_LINE]);

/// Packs an unwind row.
pub const fn row(pc_low: u16, rule: u16) -> u32 {
    (pc_low as u32) << 16 | rule as u32
}

/// Returns the low 16 bits of the address from which a row holds.
pub const fn row_pc_low(row: u32) -> u16 {
    (row >> 16) as u16
}

/// Returns the rule number of a row.
pub const fn row_rule(row: u32) -> u16 {
    row as u16
}

/// Packs a directory word.
pub const fn directory_word(first_line: u32, more: u32) -> u32 {
    debug_assert!(first_line < MAX_LINES as u32 && more <= MAX_MORE_LINES);
    more << DIRECTORY_LINE_BITS | first_line
}

/// Returns the first line of a directory word, and the number of lines that follow it.
pub const fn directory_parts(word: u32) -> (u32, u32) {
    (word & (MAX_LINES as u32 - 1), word >> DIRECTORY_LINE_BITS)
}

/// Values of [`UnwindRule::cfa_kind`]: how to find the canonical frame address, which is the caller's stack pointer.
pub mod cfa {
    /// There is no function: the address is in a gap, or outside the table. `cfa_offset` is 0.
    pub const NONE: u8 = 0;
    /// The CFA is `sp + cfa_offset`.
    pub const SP: u8 = 1;
    /// The CFA is `fp + cfa_offset`.
    pub const FP: u8 = 2;
    /// `*(u64 *)(sp + (cfa_offset >> 8)) + (cfa_offset & 0xff)`: signal frames, and assembly that stores the old stack
    /// pointer in its frame. See [`super::deref_offset`].
    pub const SP_DEREF: u8 = 3;
    /// `*(u64 *)(fp + (cfa_offset >> 8)) + (cfa_offset & 0xff)`: functions that align their stack.
    pub const FP_DEREF: u8 = 4;
    /// `sp + 8 + ((pc & 15) >= cfa_offset ? 8 : 0)`: the entries of a procedure linkage table, which push once.
    pub const PLT: u8 = 5;
    /// There is a function, and this format has no rule for it. `cfa_offset` holds the [`super::Unsupported`].
    pub const UNSUPPORTED: u8 = 6;
    /// x86_64: `sp + cfa_offset` and 8 more for each push up to the address. `ra_offset` has a bit for the distance of each push. The
    /// return address is at `cfa - 8`. See the module's text on runs.
    pub const PUSHES: u8 = 7;
    /// The same with 8 less for each pop.
    pub const POPS: u8 = 8;
    /// `REGISTER + n`: the register with DWARF number n (0 to 31), plus `cfa_offset`. First frame only, but for rbx.
    pub const REGISTER: u8 = 0x40;
}

/// Values of [`UnwindRule::fp_kind`] and [`UnwindRule::ra_kind`]: where the caller's frame pointer or the return address is.
pub mod loc {
    /// Frame pointer: unchanged. Never used for the return address.
    pub const SAME: u8 = 0;
    /// `*(u64 *)(cfa + offset)`
    pub const CFA: u8 = 1;
    /// `*(u64 *)(sp + offset)`, with the frame's own `sp`
    pub const SP: u8 = 2;
    /// `*(u64 *)(fp + offset)`, with the frame's own `fp`
    pub const FP: u8 = 3;
    /// Frame pointer: lost. Return address: there is none, and the stack is complete.
    pub const UNDEFINED: u8 = 4;
    /// `REGISTER + n`: in the register with DWARF number n (0 to 31). First frame only.
    pub const REGISTER: u8 = 0x40;
}

/// Bits of [`UnwindRule::flags`].
pub mod flags {
    /// A signal handler returns here: the caller's pc is the address of the interrupted instruction.
    pub const SIGNAL: u8 = 1;
    /// The rule is a guess by convention (frame pointer), which nothing in the file supports. Its frames are marked.
    pub const GUESSED: u8 = 2;
    /// The return address is signed (aarch64 pointer authentication): strip the signature.
    pub const RA_SIGNED: u8 = 4;
    /// The frame is one of an interpreter's loop, and stands for a run of frames that the interpreter keeps in a list.
    pub const LIST: u8 = 8;
    /// x86_64: three bits from here on locate the caller's rbx. 0 is unknown, 1 unchanged ([`RBX_SAME`]), and k from 2 to 7 is at
    /// `cfa - 8 * k`.
    pub const RBX_SHIFT: u32 = 4;
    /// The caller's rbx is in rbx.
    pub const RBX_SAME: u8 = 1;
}

/// Packs the offsets of [`cfa::SP_DEREF`] and [`cfa::FP_DEREF`] if they fit: `at` in 24 bits, `plus` in 8.
pub fn deref_offset(at: i64, plus: i64) -> Option<i32> {
    let plus = u8::try_from(plus).ok()?;
    let at = i32::try_from(at).ok().filter(|at| (-(1 << 23)..1 << 23).contains(at))?;
    Some(at << 8 | i32::from(plus))
}

/// DWARF numbers of the registers that rules use.
pub mod dwarf_register {
    use gannet_elf::Arch;

    /// Returns the number of the stack pointer.
    pub const fn stack_pointer(arch: Arch) -> u16 {
        match arch {
            Arch::X86_64 => X86_64_SP,
            Arch::Aarch64 => AARCH64_SP,
        }
    }

    /// Returns the number of the frame pointer.
    pub const fn frame_pointer(arch: Arch) -> u16 {
        match arch {
            Arch::X86_64 => X86_64_FP,
            Arch::Aarch64 => AARCH64_FP,
        }
    }

    /// Register rbx of x86_64.
    pub const X86_64_RBX: u16 = 3;
    /// Frame pointer of x86_64, rbp.
    pub const X86_64_FP: u16 = 6;
    /// Stack pointer of x86_64, rsp.
    pub const X86_64_SP: u16 = 7;
    /// The return address column of x86_64.
    pub const X86_64_RA: u16 = 16;
    /// Frame pointer of aarch64, x29.
    pub const AARCH64_FP: u16 = 29;
    /// x30, the link register
    pub const AARCH64_LR: u16 = 30;
    /// Stack pointer of aarch64, sp.
    pub const AARCH64_SP: u16 = 31;
}

/// The reason why an address in a function has no rule: the `cfa_offset` of [`cfa::UNSUPPORTED`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord, Hash)]
#[repr(i32)]
pub enum Unsupported {
    /// The frame address is a DWARF expression of a shape that no known compiler makes.
    Expression = 1,
    /// The frame address depends on a vector or pseudo register.
    Register = 2,
    /// The return address is a DWARF expression of a shape that no known compiler makes.
    ReturnAddress = 3,
    /// An offset does not fit 32 bits.
    Offset = 4,
    /// The instructions of the function's entry break off or contradict themselves.
    Malformed = 5,
}

impl Unsupported {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; 5] =
        [Self::Expression, Self::Register, Self::ReturnAddress, Self::Offset, Self::Malformed];

    /// Returns lower-case words for metrics and messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Expression => "cfa_expression",
            Self::Register => "cfa_register",
            Self::ReturnAddress => "return_address_expression",
            Self::Offset => "offset_too_large",
            Self::Malformed => "malformed_entry",
        }
    }
}

/// An unwind rule: how to step from a frame to its caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord, Hash, Default)]
#[repr(C)]
pub struct UnwindRule {
    /// Way to compute the CFA, a constant of [`cfa`].
    pub cfa_kind: u8,
    /// One of [`loc`].
    pub fp_kind: u8,
    /// One of [`loc`], never `SAME` in a rule that can be stepped.
    pub ra_kind: u8,
    /// Bits of [`flags`].
    pub flags: u8,
    /// Bytes; meaning by `cfa_kind`.
    pub cfa_offset: i32,
    /// Bytes; meaning by `fp_kind`.
    pub fp_offset: i32,
    /// Bytes; meaning by `ra_kind`.
    pub ra_offset: i32,
}

impl UnwindRule {
    /// There is no function.
    pub const NONE: Self = Self {
        cfa_kind: cfa::NONE,
        fp_kind: loc::SAME,
        ra_kind: loc::SAME,
        flags: 0,
        cfa_offset: 0,
        fp_offset: 0,
        ra_offset: 0,
    };

    /// The outermost function of a thread: it has no caller, and the stack is complete.
    pub const OUTERMOST: Self = Self { cfa_kind: cfa::SP, ra_kind: loc::UNDEFINED, ..Self::NONE };

    /// An x86_64 function at its first instruction: the return address is on top of the stack.
    pub const X86_64_ENTRY: Self = Self::x86_64_sp(8);

    /// The frame-pointer convention, the same offsets on both architectures: saved frame pointer at `fp`, return
    /// address above it.
    pub const FRAME_POINTER: Self = Self {
        cfa_kind: cfa::FP,
        fp_kind: loc::CFA,
        ra_kind: loc::CFA,
        flags: flags::GUESSED,
        cfa_offset: 16,
        fp_offset: -16,
        ra_offset: -8,
    };

    /// The signal return trampoline of x86_64 Linux: `sp` points at the kernel's `ucontext`, which holds rbp at 120,
    /// rsp at 160 and rip at 168.
    pub const X86_64_SIGNAL: Self = Self {
        cfa_kind: cfa::SP_DEREF,
        fp_kind: loc::SP,
        ra_kind: loc::SP,
        flags: flags::SIGNAL,
        cfa_offset: 160 << 8,
        fp_offset: 120,
        ra_offset: 168,
    };

    /// The same on aarch64: `sp` points at the kernel's `rt_sigframe`, which holds x29 at 544, sp at 560 and pc at 568.
    /// (x30 is at 552; a leaf function that was interrupted has its return address nowhere else.)
    pub const AARCH64_SIGNAL: Self = Self {
        cfa_kind: cfa::SP_DEREF,
        fp_kind: loc::SP,
        ra_kind: loc::SP,
        flags: flags::SIGNAL,
        cfa_offset: 560 << 8,
        fp_offset: 544,
        ra_offset: 568,
    };

    /// Returns the x86_64 rule with the frame address at `sp + cfa_offset`, the return address just below it, and rbp unchanged.
    pub const fn x86_64_sp(cfa_offset: i32) -> Self {
        Self {
            cfa_kind: cfa::SP,
            fp_kind: loc::SAME,
            ra_kind: loc::CFA,
            flags: 0,
            cfa_offset,
            fp_offset: 0,
            ra_offset: -8,
        }
    }

    /// Returns the location of the caller's rbx; see [`flags::RBX_SHIFT`].
    pub const fn rbx(&self) -> u8 {
        self.flags >> flags::RBX_SHIFT & 7
    }

    /// Returns the x86_64 rule of an entry of a procedure linkage table, which pushes once its pc is `pushed_from` bytes into the 16
    /// of the entry.
    pub const fn x86_64_plt(pushed_from: u8) -> Self {
        Self { cfa_kind: cfa::PLT, cfa_offset: pushed_from as i32, ..Self::X86_64_ENTRY }
    }

    /// Returns the rule of a function that this format has no rule for.
    pub const fn unsupported(why: Unsupported) -> Self {
        Self { cfa_kind: cfa::UNSUPPORTED, cfa_offset: why as i32, ..Self::NONE }
    }

    /// Returns the plain rule `distance` bytes after the row. Only the rule of a run changes with the distance.
    #[must_use]
    pub fn after(self, distance: u64) -> Self {
        let sign = match self.cfa_kind {
            cfa::PUSHES => 8,
            cfa::POPS => -8,
            _ => return self,
        };
        let done = (2_u32 << distance.min(MAX_RUN_BYTES)) - 1;
        let steps = (self.ra_offset as u32 & done).count_ones() as i32;
        let size = self.cfa_offset.wrapping_add(steps * sign);
        let saved = self.fp_kind == loc::CFA && size >= self.fp_offset.wrapping_neg();
        let (fp_kind, fp_offset) = if saved { (loc::CFA, self.fp_offset) } else { (loc::SAME, 0) };
        Self { fp_kind, fp_offset, ..Self::x86_64_sp(size) }
    }

    /// Returns the reason why there is no rule, if there is none.
    pub fn unsupported_reason(&self) -> Option<Unsupported> {
        (self.cfa_kind == cfa::UNSUPPORTED)
            .then(|| Unsupported::ALL.into_iter().find(|u| *u as i32 == self.cfa_offset))
            .flatten()
    }

    /// Returns whether the stack ends here and is complete: the outermost frame of a thread has no caller.
    pub const fn is_outermost(&self) -> bool {
        self.ra_kind == loc::UNDEFINED
    }

    /// Returns the 16 bytes in the kernel's form.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&[self.cfa_kind, self.fp_kind, self.ra_kind, self.flags]);
        bytes[4..8].copy_from_slice(&self.cfa_offset.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.fp_offset.to_ne_bytes());
        bytes[12..].copy_from_slice(&self.ra_offset.to_ne_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_bytes_are_the_struct_in_memory() {
        let rule = UnwindRule {
            cfa_kind: 1,
            fp_kind: 2,
            ra_kind: 3,
            flags: 4,
            cfa_offset: 0x0102_0304,
            fp_offset: -2,
            ra_offset: -3,
        };
        assert_eq!(std::mem::offset_of!(UnwindRule, cfa_offset), 4);
        assert_eq!(std::mem::offset_of!(UnwindRule, fp_offset), 8);
        assert_eq!(std::mem::offset_of!(UnwindRule, ra_offset), 12);
        #[cfg(target_endian = "little")]
        assert_eq!(rule.to_bytes(), [1, 2, 3, 4, 4, 3, 2, 1, 254, 255, 255, 255, 253, 255, 255, 255]);
        assert_eq!(UnwindRule::NONE.to_bytes(), [0; 16]);
    }

    #[test]
    fn deref_offsets_keep_both_halves() {
        for (at, plus) in [(160, 0), (-8, 0), (-16, 8), (-(1 << 23), 255), ((1 << 23) - 1, 255)] {
            let packed = deref_offset(at, plus).unwrap();
            assert_eq!((i64::from(packed >> 8), i64::from(packed & 0xff)), (at, plus));
        }
        for (at, plus) in [(1 << 23, 0), (0, 256), (0, -1), (i64::MIN, 0)] {
            assert_eq!(deref_offset(at, plus), None);
        }
        assert_eq!(UnwindRule::X86_64_SIGNAL.cfa_offset, deref_offset(160, 0).unwrap());
    }

    #[test]
    fn words_round_trip_at_their_edges() {
        for (pc, rule) in [(0, 0), (0xffff, 0xffff), (0xffff, 0), (0, 0xffff), (0x1234, 0x5678)] {
            assert_eq!((row_pc_low(row(pc, rule)), row_rule(row(pc, rule))), (pc, rule));
        }
        for (first, more) in [(0, 0), (MAX_LINES as u32 - 1, MAX_MORE_LINES), (7, 1)] {
            assert_eq!(directory_parts(directory_word(first, more)), (first, more));
        }
    }
}
