//! Lays out the unwind rows of one file as an unwind table.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use gannet_elf::Arch;

use crate::format::{
    CacheLine, DIRECTORY_LINE_BITS, GRANULE_BYTES, GRANULE_SHIFT, MAX_LINES, MAX_RUN_BYTES, PAGE_BYTES,
    PAGE_SHIFT, RULE_NONE, UnwindRule, WORDS_PER_LINE, directory_word, row, row_pc_low,
};
use crate::limits::{LimitExceeded, TableLimits, TableQuantity, at_most};
use crate::runs::{extends_run, rule_of_run};
use crate::table::UnwindTable;

/// Hashes the few bytes of a rule; file contents cannot make it slow, because a file's rules are few and bounded.
#[derive(Default)]
pub(crate) struct RuleHasher(u64);

impl Hasher for RuleHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u8(&mut self, n: u8) {
        self.write_u64(u64::from(n));
    }

    fn write_i32(&mut self, n: i32) {
        self.write_u64(u64::from(n as u32));
    }

    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0.rotate_left(5) ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// Lays out the unwind rows of one table, which come in ascending order of address.
#[derive(Debug)]
pub struct TableBuilder<'a> {
    limits: &'a TableLimits,
    arch: Arch,
    base: u64,
    end: u64,
    lines: Vec<CacheLine>,
    directory_lines: usize,
    /// The cache line that is being filled, and the number of its words that are.
    open: CacheLine,
    filled: usize,
    /// The page that is being filled, counted from `base`, and the index of its first line.
    page: u64,
    page_first_line: usize,
    /// The rule that holds behind the last row that is laid out.
    current: UnwindRule,
    /// Rows that are not laid out yet, because they may be, or become, a run; only the last can still be replaced.
    recent: Vec<(u64, UnwindRule)>,
    runs: bool,
    last_pc: Option<u64>,
    rows: u64,
    rules: Vec<UnwindRule>,
    numbers: HashMap<UnwindRule, u16, BuildHasherDefault<RuleHasher>>,
    last_rule: (UnwindRule, u16),
    /// Lines of pages throughout which one rule holds: pages with the same rule share a line.
    uniform: HashMap<u16, usize>,
}

/// The reason why rows make no table.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TableBuilderError {
    /// The table is larger than a limit.
    #[error(transparent)]
    LimitExceeded(#[from] LimitExceeded),
    /// A row is below the one before it, or outside the range of the builder.
    #[error("row at {vaddr:#x} is out of order or outside the table: sort rows by address")]
    OutOfOrder {
        /// Address of the row.
        vaddr: u64,
    },
}

impl<'a> TableBuilder<'a> {
    /// Builds a table for rows from `start` up to `end` (exclusive), behind which there is no rule.
    pub fn new(arch: Arch, start: u64, end: u64, limits: &'a TableLimits) -> Result<Self, TableBuilderError> {
        let base = start & !(PAGE_BYTES - 1);
        let span = end.checked_sub(base).ok_or(TableBuilderError::OutOfOrder { vaddr: end })?;
        at_most(TableQuantity::SpanBytes, limits.span_bytes, span)?;
        let granules = span.div_ceil(GRANULE_BYTES);
        at_most(TableQuantity::SpanBytes, u64::from(u32::MAX), granules)?;
        // The last granule ends behind `end`, and a table read from the cache must end before the address space does.
        base.checked_add(granules << GRANULE_SHIFT).ok_or(TableBuilderError::OutOfOrder { vaddr: end })?;
        let directory_lines = granules.div_ceil(WORDS_PER_LINE as u64);
        at_most(TableQuantity::Lines, MAX_LINES as u64, directory_lines)?;
        let directory_lines = directory_lines as usize;
        Ok(Self {
            limits,
            arch,
            base,
            end,
            lines: vec![CacheLine::default(); directory_lines],
            directory_lines,
            open: CacheLine::default(),
            filled: 0,
            page: 0,
            page_first_line: directory_lines,
            current: UnwindRule::NONE,
            recent: Vec::with_capacity(MAX_RUN_BYTES as usize + 1),
            runs: false,
            last_pc: None,
            rows: 0,
            rules: vec![UnwindRule::NONE],
            numbers: HashMap::from_iter([(UnwindRule::NONE, RULE_NONE)]),
            last_rule: (UnwindRule::NONE, RULE_NONE),
            uniform: HashMap::new(),
        })
    }

    /// Sets whether runs of pushes and pops become one row each.
    #[must_use]
    pub fn runs(mut self, on: bool) -> Self {
        self.runs = on && self.arch == Arch::X86_64;
        self
    }

    /// Adds a row: from `vaddr` on, `rule` holds. A second row for the same address replaces the first.
    pub fn push(&mut self, vaddr: u64, rule: UnwindRule) -> Result<(), TableBuilderError> {
        if vaddr < self.base || vaddr > self.end || self.last_pc.is_some_and(|last| vaddr < last) {
            return Err(TableBuilderError::OutOfOrder { vaddr });
        }
        self.last_pc = Some(vaddr);
        self.recent.pop_if(|(pc, _)| *pc == vaddr);
        if self.recent.last().map_or(self.current, |(_, last)| *last) == rule {
            return Ok(());
        }
        if !(self.runs && extends_run(&self.recent, vaddr, rule)) {
            self.lay_out_recent()?;
        }
        self.recent.push((vaddr, rule));
        Ok(())
    }

    fn lay_out_recent(&mut self) -> Result<(), TableBuilderError> {
        let (Some((vaddr, first)), Some((_, last))) = (self.recent.first(), self.recent.last()) else {
            return Ok(());
        };
        let (vaddr, last) = (*vaddr, *last);
        let rule = if self.recent.len() > 1 { rule_of_run(&self.recent) } else { *first };
        self.recent.clear();
        let page = (vaddr - self.base) >> PAGE_SHIFT;
        while self.page < page {
            self.close_page()?;
        }
        let pc_low = vaddr as u16;
        if self.opens_page() && pc_low != 0 {
            let carried = self.number(self.current)?;
            self.append(row(0, carried))?;
        }
        let number = self.number(rule)?;
        self.append(row(pc_low, number))?;
        self.current = last;
        Ok(())
    }

    fn opens_page(&self) -> bool {
        self.filled == 0 && self.lines.len() == self.page_first_line
    }

    fn number(&mut self, rule: UnwindRule) -> Result<u16, TableBuilderError> {
        if self.last_rule.0 == rule {
            return Ok(self.last_rule.1);
        }
        let number = if let Some(number) = self.numbers.get(&rule) {
            *number
        } else {
            let limit = self.limits.rules.min(1 << 16);
            at_most(TableQuantity::Rules, limit, self.rules.len() as u64 + 1)?;
            let number = self.rules.len() as u16;
            self.rules.push(rule);
            self.numbers.insert(rule, number);
            number
        };
        self.last_rule = (rule, number);
        Ok(number)
    }

    fn append(&mut self, word: u32) -> Result<(), TableBuilderError> {
        if self.filled == WORDS_PER_LINE {
            self.close_line()?;
        }
        self.rows += 1;
        at_most(TableQuantity::Rows, self.limits.rows, self.rows)?;
        self.open.0[self.filled] = word;
        self.filled += 1;
        Ok(())
    }

    fn close_line(&mut self) -> Result<(), TableBuilderError> {
        let last = self.open.0[self.filled - 1];
        self.open.0[self.filled..].fill(last);
        at_most(TableQuantity::Lines, MAX_LINES as u64, self.lines.len() as u64 + 1)?;
        self.lines.push(self.open);
        self.filled = 0;
        Ok(())
    }

    fn close_page(&mut self) -> Result<(), TableBuilderError> {
        let first = self.page_first_line;
        let row_count = (self.lines.len() - first) * WORDS_PER_LINE + self.filled;
        if row_count <= 1 {
            // One rule throughout: the carried one, or the one that begins with the page and is no run.
            let number = self.number(self.current)?;
            let word = row(0, number);
            if self.filled == 1 && self.open.0[0] != word {
                // A run that begins with the page.
                self.close_line()?;
                self.write_directory(first, 1);
            } else if let Some(line) = self.uniform.get(&number) {
                self.rows -= self.filled as u64;
                self.filled = 0;
                self.write_directory(*line, 1);
            } else {
                if self.filled == 0 {
                    self.append(word)?;
                }
                self.uniform.insert(number, first);
                self.close_line()?;
                self.write_directory(first, 1);
            }
        } else {
            if self.filled > 0 {
                self.close_line()?;
            }
            self.write_directory(first, self.lines.len() - first);
        }
        self.page += 1;
        self.page_first_line = self.lines.len();
        Ok(())
    }

    /// Writes the directory words of the page that was closed last.
    fn write_directory(&mut self, first: usize, count: usize) {
        let granules_per_page = PAGE_BYTES / GRANULE_BYTES;
        let granules = (self.end - self.base).div_ceil(GRANULE_BYTES);
        let mut at = 0;
        for in_page in 0..granules_per_page {
            let granule = self.page * granules_per_page + in_page;
            if granule >= granules {
                break;
            }
            let start = in_page << GRANULE_SHIFT;
            let last = start + GRANULE_BYTES - 1;
            let head = |line: usize| u64::from(row_pc_low(self.lines[first + line].0[0]));
            while at + 1 < count && head(at + 1) <= start {
                at += 1;
            }
            let mut more = 0;
            while at + more + 1 < count && head(at + more + 1) <= last {
                more += 1;
            }
            let word = directory_word((first + at) as u32, more as u32);
            let granule = granule as usize;
            self.lines[granule / WORDS_PER_LINE].0[granule % WORDS_PER_LINE] = word;
        }
    }

    /// Returns the table, with no rule behind the range of the last row.
    pub fn finish(mut self) -> Result<UnwindTable, TableBuilderError> {
        // Behind the last granule no row is needed; within it, the gap needs one.
        if (self.end - self.base).is_multiple_of(GRANULE_BYTES) {
            self.recent.pop_if(|(pc, _)| *pc == self.end);
        } else {
            self.push(self.end, UnwindRule::NONE)?;
        }
        self.lay_out_recent()?;
        let granules = (self.end - self.base).div_ceil(GRANULE_BYTES);
        let pages = (self.end - self.base).div_ceil(PAGE_BYTES);
        while self.page < pages {
            self.close_page()?;
        }
        self.lines.shrink_to_fit();
        Ok(UnwindTable {
            arch: self.arch,
            base: self.base,
            granules: granules as u32,
            directory_lines: self.directory_lines as u32,
            rows: self.rows as u32,
            lines: self.lines,
            rules: self.rules,
        })
    }
}

const _: () = assert!(MAX_LINES == 1 << DIRECTORY_LINE_BITS);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::loc;

    /// The plain meaning of a list of rows.
    fn oracle(rows: &[(u64, UnwindRule)], end: u64, vaddr: u64) -> UnwindRule {
        if vaddr >= end {
            return UnwindRule::NONE;
        }
        let after = rows.partition_point(|(pc, _)| *pc <= vaddr);
        after.checked_sub(1).map_or(UnwindRule::NONE, |last| rows[last].1)
    }

    #[test]
    fn no_table_reaches_over_the_end_of_the_address_space() {
        let limits = TableLimits::default();
        let new = |end| TableBuilder::new(Arch::X86_64, 0_u64.wrapping_sub(0x2000), end, &limits);
        assert!(new(u64::MAX - GRANULE_BYTES).is_ok());
        for end in [u64::MAX - GRANULE_BYTES + 2, u64::MAX] {
            assert_eq!(new(end).err(), Some(TableBuilderError::OutOfOrder { vaddr: end }));
        }
    }

    #[track_caller]
    fn check(rows: &[(u64, UnwindRule)], end: u64) -> UnwindTable {
        check_one(rows, end, true);
        check_one(rows, end, false)
    }

    #[track_caller]
    fn check_one(rows: &[(u64, UnwindRule)], end: u64, runs: bool) -> UnwindTable {
        let limits = TableLimits::default();
        let mut builder = TableBuilder::new(Arch::X86_64, rows[0].0, end, &limits).unwrap().runs(runs);
        for (pc, rule) in rows {
            builder.push(*pc, *rule).unwrap();
        }
        let table = builder.finish().unwrap();
        let edges = rows.iter().map(|(pc, _)| *pc).chain([end, table.base()]);
        let pages = (table.base()..end + PAGE_BYTES).step_by(2048);
        for vaddr in edges.chain(pages).flat_map(|pc| [pc.wrapping_sub(1), pc, pc + 1]) {
            let found = table.lookup(vaddr).unwrap_or(UnwindRule::NONE);
            assert_eq!(found, oracle(rows, end, vaddr), "at {vaddr:#x}");
        }
        let again = UnwindTable::from_parts(
            table.arch,
            table.base,
            table.granules,
            table.lines.clone(),
            table.rules.clone(),
        );
        assert_eq!(again.map(|t| t.rows), Some(table.rows), "a built table is well-formed");
        table
    }

    fn rule(n: i32) -> UnwindRule {
        UnwindRule::x86_64_sp(n * 8)
    }

    #[test]
    fn a_row_at_the_last_address_of_a_page_is_found() {
        check(
            &[(0x1_0000, rule(1)), (0x1_fffe, rule(2)), (0x1_ffff, rule(3)), (0x2_0000, UnwindRule::NONE)],
            0x2_0001,
        );
        check(&[(0x1_ffff, rule(3))], 0x2_0000);
        check(&[(0x1_ffff, rule(3))], 0x2_0001);
        check(&[(0x1_f800, rule(3))], 0x2_0800);
    }

    #[test]
    fn a_row_at_every_address_fits() {
        let rows: Vec<_> = (0x1_0007..0x3_1234).map(|pc| (pc, rule(1 + (pc % 7) as i32))).collect();
        let table = check(&rows, 0x3_1234);
        assert!(rows.iter().all(|(pc, _)| table.lookup_counted(*pc).1 <= 9));
    }

    #[test]
    fn pages_of_one_rule_share_a_line() {
        let table =
            check(&[(0x1000, rule(1)), (0x2000, UnwindRule::NONE), (0x4000_0000, rule(2))], 0x4000_1000);
        assert_eq!(table.lines().len() as u32, table.directory_lines() + 3);
        assert_eq!(table.rows(), 5);
    }

    #[test]
    fn kernel_lines_carry_the_nodes_numbers_and_leave_the_directory() {
        let table = check(&[(0x1000, rule(1)), (0x1800, rule(2)), (0x1900, rule(1))], 0x2000);
        let lines: Vec<CacheLine> = table.kernel_lines(&[0, 700, 65_535]).collect();
        assert_eq!(lines[0], table.lines()[0]);
        let row_line = lines[1].0;
        assert_eq!(&row_line[..4], &[row(0, 0), row(0x1000, 700), row(0x1800, 65_535), row(0x1900, 700)]);
        assert_eq!(row_line[15], row(0x1900, 700), "unused words repeat the last row");
    }

    #[test]
    fn rows_out_of_order_or_outside_are_refused() {
        let limits = TableLimits::default();
        let mut builder = TableBuilder::new(Arch::X86_64, 0x1000, 0x2000, &limits).unwrap();
        builder.push(0x1800, rule(1)).unwrap();
        assert_eq!(builder.push(0x17ff, rule(2)), Err(TableBuilderError::OutOfOrder { vaddr: 0x17ff }));
        assert_eq!(builder.push(0x2001, rule(2)), Err(TableBuilderError::OutOfOrder { vaddr: 0x2001 }));
        assert!(matches!(
            TableBuilder::new(Arch::X86_64, 0, u64::MAX, &limits),
            Err(TableBuilderError::LimitExceeded(LimitExceeded::TooLarge {
                what: TableQuantity::SpanBytes,
                ..
            }))
        ));
    }

    #[test]
    fn a_limit_is_an_error_and_never_a_cut() {
        let limits = TableLimits { rows: 3, rules: 3, ..TableLimits::default() };
        let mut builder = TableBuilder::new(Arch::X86_64, 0x1000, 0x2000, &limits).unwrap();
        builder.push(0x1000, rule(1)).unwrap();
        builder.push(0x1001, rule(2)).unwrap();
        builder.push(0x1002, rule(1)).unwrap();
        let full = builder.finish().unwrap_err();
        assert!(matches!(
            full,
            TableBuilderError::LimitExceeded(LimitExceeded::TooLarge {
                what: TableQuantity::Rows,
                limit: 3,
                ..
            })
        ));
        let mut builder = TableBuilder::new(Arch::X86_64, 0x1000, 0x2000, &limits).unwrap();
        for n in 0..3_u8 {
            builder.push(0x1000 + u64::from(n), rule(i32::from(n) + 1)).unwrap();
        }
        let full = builder.push(0x1003, rule(1)).unwrap_err();
        assert!(matches!(
            full,
            TableBuilderError::LimitExceeded(LimitExceeded::TooLarge { what: TableQuantity::Rules, .. })
        ));
    }

    /// rbp in its slot, in a frame of this size.
    fn saved(size: i32, slot: i32) -> UnwindRule {
        UnwindRule { fp_kind: loc::CFA, fp_offset: -slot, ..UnwindRule::x86_64_sp(size) }
    }

    /// A function as gcc makes them: six pushes, locals, six pops, return.
    fn usual(start: u64) -> Vec<(u64, UnwindRule)> {
        let plain = UnwindRule::x86_64_sp;
        let rows = [
            (0, plain(8)),
            (2, plain(16)),
            (4, plain(24)),
            (6, plain(32)),
            (8, plain(40)),
            (9, saved(48, 48)),
            (10, saved(56, 48)),
            (14, saved(96, 48)),
            (100, saved(56, 48)),
            (101, saved(48, 48)),
            (102, plain(40)),
            (104, plain(32)),
            (106, plain(24)),
            (108, plain(16)),
            (110, plain(8)),
            (111, UnwindRule::NONE),
        ];
        rows.map(|(at, rule)| (start + at, rule)).to_vec()
    }

    #[test]
    fn pushes_and_pops_take_one_row_each() {
        let rows = usual(0x1000);
        assert_eq!(check_one(&rows, 0x1080, false).rows(), 17);
        assert_eq!(check_one(&rows, 0x1080, true).rows(), 5, "carried, pushes, locals, pops, none");
        let many: Vec<_> = (0..900).flat_map(|n| usual(0x1000 + n * 113)).collect();
        let table = check_one(&many, 0x1000 + 900 * 113, true);
        assert!(table.rules().len() < 30, "the same runs everywhere: {} rules", table.rules().len());
    }

    #[test]
    fn rows_that_are_nearly_a_run_stay_apart() {
        let plain = UnwindRule::x86_64_sp;
        let flagged = UnwindRule { flags: 1, ..plain(16) };
        let lost = UnwindRule { fp_kind: loc::UNDEFINED, ..plain(16) };
        for second in [plain(24), plain(12), saved(16, 24), saved(16, 8), flagged, lost] {
            let rows = [(0x1000, plain(8)), (0x1001, second), (0x1010, UnwindRule::NONE)];
            assert_eq!(check_one(&rows, 0x1020, true).rows(), 4, "{second:?}");
        }
        let far = [(0x1000, plain(8)), (0x1002, plain(16)), (0x1005, plain(24)), (0x1010, UnwindRule::NONE)];
        assert_eq!(check_one(&far, 0x1020, true).rows(), 4);
        let turns = [(0x1000, plain(8)), (0x1002, plain(16)), (0x1003, plain(8)), (0x1010, UnwindRule::NONE)];
        assert_eq!(check_one(&turns, 0x1020, true).rows(), 4);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn runs_mean_the_same_as_their_rows(
            start in 0xff00u64..0x1_0010,
            steps in prop::collection::vec((0u64..4, -1i32..2, 0i32..8), 1..200),
        ) {
            let (mut pc, mut size) = (start, 24);
            let mut rows: Vec<(u64, UnwindRule)> = Vec::new();
            for (step, by, slot) in steps {
                pc += step;
                size = (size + by * 8).max(8);
                rows.push((pc, if slot == 0 { saved(size, 24) } else { UnwindRule::x86_64_sp(size) }));
            }
            check(&rows, pc + 20);
        }

        #[test]
        fn a_look_up_finds_the_plain_meaning_of_the_rows(
            start in 0u64..0x3_0000,
            steps in prop::collection::vec((prop_oneof![Just(0u64), 1u64..4, 1u64..600, 1u64..200_000], 0i32..5), 1..400),
            tail in 1u64..70_000,
        ) {
            let mut pc = start;
            let mut rows: Vec<(u64, UnwindRule)> = Vec::new();
            for (step, n) in steps {
                pc += step;
                let rule = if n == 0 { UnwindRule::NONE } else { rule(n) };
                rows.push((pc, rule));
            }
            check(&rows, pc + tail);
        }
    }
}
