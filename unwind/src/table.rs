//! One file's unwind table: building it row by row, looking into it, handing it to the kernel.
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use gannet_elf::Arch;

use crate::format::{
    DIRECTORY_LINE_BITS, FIRST_LINE_STEP, FIRST_ROW_STEP, GRANULE_BYTES, GRANULE_SHIFT, Line, MAX_LINES,
    MAX_RUN_BYTES, PAGE_BYTES, PAGE_SHIFT, RULE_NONE, Rule, WORDS_PER_LINE, cfa, directory_parts,
    directory_word, loc, row, row_pc_low, row_rule,
};
use crate::limits::{Exceeded, Limits, Quantity, at_most};

/// The unwind table of one file, laid out as the kernel reads it ([`crate::format`]) but with rule numbers of its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    arch: Arch,
    base: u64,
    granules: u32,
    directory_lines: u32,
    rows: u32,
    lines: Vec<Line>,
    rules: Vec<Rule>,
}

impl Table {
    /// The instruction set.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// ELF virtual address of the first granule.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Granules, which is directory words in use.
    pub fn granules(&self) -> u32 {
        self.granules
    }

    /// How many of [`Table::lines`], from the first, hold the directory.
    pub fn directory_lines(&self) -> u32 {
        self.directory_lines
    }

    /// Rows, without those that fill up lines.
    pub fn rows(&self) -> u32 {
        self.rows
    }

    /// Directory and rows, with this table's own rule numbers.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// The rules by this table's own numbers; the first is [`Rule::NONE`].
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Bytes that the table takes in the kernel.
    pub fn kernel_bytes(&self) -> usize {
        size_of_val(self.lines.as_slice())
    }

    /// Whether the file has no function with a rule.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// The lines with the node's rule numbers, `numbers[own] = node's`, ready to be stored in the kernel.
    ///
    /// A number that `numbers` does not have becomes [`RULE_NONE`].
    pub fn kernel_lines<'a>(&'a self, numbers: &'a [u16]) -> impl ExactSizeIterator<Item = Line> + 'a {
        let directory_lines = self.directory_lines as usize;
        self.lines.iter().enumerate().map(move |(index, line)| {
            if index < directory_lines {
                return *line;
            }
            Line(line.0.map(|word| {
                let number = numbers.get(usize::from(row_rule(word))).copied().unwrap_or(RULE_NONE);
                row(row_pc_low(word), number)
            }))
        })
    }

    /// The rule that holds at an ELF virtual address, by the very steps of the kernel side. `None` outside the
    /// table; [`Rule::NONE`] inside it but outside all functions.
    pub fn lookup(&self, vaddr: u64) -> Option<Rule> {
        self.lookup_counted(vaddr).0
    }

    /// [`Table::lookup`], with the number of lines of rows that it read.
    pub fn lookup_counted(&self, vaddr: u64) -> (Option<Rule>, u32) {
        let mut read = 0;
        let rule = self.search(vaddr, &mut read);
        (rule, read)
    }

    fn search(&self, vaddr: u64, read: &mut u32) -> Option<Rule> {
        let granule = vaddr.checked_sub(self.base)? >> GRANULE_SHIFT;
        if granule >= u64::from(self.granules) {
            return None;
        }
        let granule = granule as usize;
        let word = self.lines.get(granule / WORDS_PER_LINE)?.0[granule % WORDS_PER_LINE];
        let (first, more) = directory_parts(word);
        let key = row(vaddr as u16, u16::MAX);
        let mut at = 0;
        let mut step = FIRST_LINE_STEP;
        while step > 0 {
            if at + step <= more {
                *read += 1;
                if self.lines.get((first + at + step) as usize)?.0[0] <= key {
                    at += step;
                }
            }
            step /= 2;
        }
        *read += 1;
        let line = self.lines.get((first + at) as usize)?;
        let mut index = 0;
        let mut step = FIRST_ROW_STEP;
        while step > 0 {
            if line.0[index + step] <= key {
                index += step;
            }
            step /= 2;
        }
        let found = line.0[index];
        let distance = u64::from((vaddr as u16).wrapping_sub(row_pc_low(found)));
        Some(self.rules.get(usize::from(row_rule(found)))?.after(distance))
    }

    /// Puts a table together from its parts, if they hold together: every directory word names lines that are there
    /// and are in order, every row names a rule that is there, fillers repeat.
    pub(crate) fn from_parts(
        arch: Arch,
        base: u64,
        granules: u32,
        lines: Vec<Line>,
        rules: Vec<Rule>,
    ) -> Option<Self> {
        let directory_lines = granules.div_ceil(WORDS_PER_LINE as u32);
        let directory = lines.get(..directory_lines as usize)?;
        let row_lines = &lines[directory_lines as usize..];
        let well_formed = base.is_multiple_of(PAGE_BYTES)
            && base.checked_add(u64::from(granules) << GRANULE_SHIFT).is_some()
            && lines.len() <= MAX_LINES
            && rules.first() == Some(&Rule::NONE)
            && row_lines.iter().all(|line| {
                line.0.windows(2).all(|w| row_pc_low(w[0]) < row_pc_low(w[1]) || w[0] == w[1])
                    && line.0.iter().all(|word| usize::from(row_rule(*word)) < rules.len())
            })
            && directory.iter().flat_map(|line| line.0).enumerate().all(|(granule, word)| {
                let (first, more) = directory_parts(word);
                if granule >= granules as usize {
                    return word == 0;
                }
                let start = (granule as u64 * GRANULE_BYTES) as u16;
                let (first, last) = (first as usize, (first + more) as usize);
                first >= directory_lines as usize
                    && last < lines.len()
                    && row_pc_low(lines[first].0[0]) <= start
                    && lines[first..=last].windows(2).all(|w| row_pc_low(w[0].0[0]) < row_pc_low(w[1].0[0]))
            });
        let rows = row_lines.iter().map(rows_in_line).sum();
        well_formed.then_some(Self { arch, base, granules, directory_lines, rows, lines, rules })
    }
}

fn rows_in_line(line: &Line) -> u32 {
    1 + line.0.windows(2).filter(|w| w[0] != w[1]).count() as u32
}

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

/// Takes rows in ascending order of address and lays them out.
#[derive(Debug)]
pub struct Builder<'a> {
    limits: &'a Limits,
    arch: Arch,
    base: u64,
    end: u64,
    lines: Vec<Line>,
    directory_lines: usize,
    /// The line that is being filled and how many of its words are.
    open: Line,
    filled: usize,
    /// Page that is being filled, counted from `base`, and the index of its first line.
    page: u64,
    page_first_line: usize,
    /// The rule that holds behind the last row that was laid out.
    current: Rule,
    /// Rows that are not laid out yet, because they may be, or become, a run; only the last can still be replaced.
    recent: Vec<(u64, Rule)>,
    runs: bool,
    last_pc: Option<u64>,
    rows: u64,
    rules: Vec<Rule>,
    numbers: HashMap<Rule, u16, BuildHasherDefault<RuleHasher>>,
    last_rule: (Rule, u16),
    /// Lines of pages throughout which one rule holds: one serves all of them.
    uniform: HashMap<u16, usize>,
}

/// Rows were not handed over in ascending order.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BuilderError {
    /// A limit.
    #[error(transparent)]
    Exceeded(#[from] Exceeded),
    /// A row below the one before it, or outside the range that the builder was made for.
    #[error("row at {vaddr:#x} is out of order or outside the table: sort rows by address")]
    OutOfOrder {
        /// The address of the row.
        vaddr: u64,
    },
}

impl<'a> Builder<'a> {
    /// For rows from `start` up to `end` (exclusive), behind which there is no rule.
    pub fn new(arch: Arch, start: u64, end: u64, limits: &'a Limits) -> Result<Self, BuilderError> {
        let base = start & !(PAGE_BYTES - 1);
        let span = end.checked_sub(base).ok_or(BuilderError::OutOfOrder { vaddr: end })?;
        at_most(Quantity::SpanBytes, limits.span_bytes, span)?;
        let granules = span.div_ceil(GRANULE_BYTES);
        at_most(Quantity::SpanBytes, u64::from(u32::MAX), granules)?;
        let directory_lines = granules.div_ceil(WORDS_PER_LINE as u64);
        at_most(Quantity::Lines, MAX_LINES as u64, directory_lines)?;
        let directory_lines = directory_lines as usize;
        Ok(Self {
            limits,
            arch,
            base,
            end,
            lines: vec![Line::default(); directory_lines],
            directory_lines,
            open: Line::default(),
            filled: 0,
            page: 0,
            page_first_line: directory_lines,
            current: Rule::NONE,
            recent: Vec::with_capacity(MAX_RUN_BYTES as usize + 1),
            runs: false,
            last_pc: None,
            rows: 0,
            rules: vec![Rule::NONE],
            numbers: HashMap::from_iter([(Rule::NONE, RULE_NONE)]),
            last_rule: (Rule::NONE, RULE_NONE),
            uniform: HashMap::new(),
        })
    }

    /// Whether runs of pushes and pops become one row each.
    #[must_use]
    pub fn runs(mut self, on: bool) -> Self {
        self.runs = on && self.arch == Arch::X86_64;
        self
    }

    /// From `vaddr` on, `rule` holds. A second row for the same address replaces the first.
    pub fn push(&mut self, vaddr: u64, rule: Rule) -> Result<(), BuilderError> {
        if vaddr < self.base || vaddr > self.end || self.last_pc.is_some_and(|last| vaddr < last) {
            return Err(BuilderError::OutOfOrder { vaddr });
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

    fn lay_out_recent(&mut self) -> Result<(), BuilderError> {
        let (Some((vaddr, first)), Some((_, last))) = (self.recent.first(), self.recent.last()) else {
            return Ok(());
        };
        let (vaddr, last) = (*vaddr, *last);
        let rule = if self.recent.len() > 1 { run(&self.recent) } else { *first };
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

    fn number(&mut self, rule: Rule) -> Result<u16, BuilderError> {
        if self.last_rule.0 == rule {
            return Ok(self.last_rule.1);
        }
        let number = if let Some(number) = self.numbers.get(&rule) {
            *number
        } else {
            let limit = self.limits.rules.min(1 << 16);
            at_most(Quantity::Rules, limit, self.rules.len() as u64 + 1)?;
            let number = self.rules.len() as u16;
            self.rules.push(rule);
            self.numbers.insert(rule, number);
            number
        };
        self.last_rule = (rule, number);
        Ok(number)
    }

    fn append(&mut self, word: u32) -> Result<(), BuilderError> {
        if self.filled == WORDS_PER_LINE {
            self.close_line()?;
        }
        self.rows += 1;
        at_most(Quantity::Rows, self.limits.rows, self.rows)?;
        self.open.0[self.filled] = word;
        self.filled += 1;
        Ok(())
    }

    fn close_line(&mut self) -> Result<(), BuilderError> {
        let last = self.open.0[self.filled - 1];
        self.open.0[self.filled..].fill(last);
        at_most(Quantity::Lines, MAX_LINES as u64, self.lines.len() as u64 + 1)?;
        self.lines.push(self.open);
        self.filled = 0;
        Ok(())
    }

    fn close_page(&mut self) -> Result<(), BuilderError> {
        let first = self.page_first_line;
        let row_count = (self.lines.len() - first) * WORDS_PER_LINE + self.filled;
        if row_count <= 1 {
            // One rule throughout: the carried one, or the one that begins with the page (and is no run of steps).
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

    /// The directory words of the page that has just been closed.
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

    /// The table, with no rule behind the last row's range.
    pub fn finish(mut self) -> Result<Table, BuilderError> {
        // Behind the last granule there is nothing to say; within it, the gap needs its row.
        if (self.end - self.base).is_multiple_of(GRANULE_BYTES) {
            self.recent.pop_if(|(pc, _)| *pc == self.end);
        } else {
            self.push(self.end, Rule::NONE)?;
        }
        self.lay_out_recent()?;
        let granules = (self.end - self.base).div_ceil(GRANULE_BYTES);
        let pages = (self.end - self.base).div_ceil(PAGE_BYTES);
        while self.page < pages {
            self.close_page()?;
        }
        self.lines.shrink_to_fit();
        Ok(Table {
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

/// Steps of a run are this close: `push` and `pop` have one byte or two. What compilers schedule between them would
/// make so many different runs that their rules cost more than the rows.
const MAX_STEP_BYTES: u64 = 2;
/// The first may come behind a landing pad (`endbr64`).
const MAX_FIRST_STEP_BYTES: u64 = 6;

/// Whether a row goes on with what the rows before it have begun: one push, or one pop, more.
fn extends_run(rows: &[(u64, Rule)], vaddr: u64, rule: Rule) -> bool {
    let (Some((start, first)), Some((before, last))) = (rows.first(), rows.last()) else { return false };
    let size = |rule: &Rule| i64::from(rule.cfa_offset);
    let step = size(&rule) - size(last);
    let near = if rows.len() == 1 { MAX_FIRST_STEP_BYTES } else { MAX_STEP_BYTES };
    let plain = |rule: &Rule| {
        let saved = (loc::CFA, rule.fp_offset);
        let fp_known =
            (rule.fp_kind, rule.fp_offset) == (loc::SAME, 0) || (rule.fp_kind, rule.fp_offset) == saved;
        fp_known
            && *rule
                == Rule {
                    fp_kind: rule.fp_kind,
                    fp_offset: rule.fp_offset,
                    ..Rule::x86_64_sp(rule.cfa_offset)
                }
    };
    if vaddr - before > near
        || vaddr - start > MAX_RUN_BYTES
        || vaddr >> PAGE_SHIFT != start >> PAGE_SHIFT
        || step.abs() != 8
        || (rows.len() > 1 && (size(&rows[1].1) - size(first)) != step)
        || !plain(first)
        || !plain(&rule)
    {
        return false;
    }
    // The frame pointer's slot must be there exactly while the frame is large enough to hold it.
    let all = || rows.iter().map(|(_, rule)| rule).chain([&rule]);
    let Some(slot) = all().find(|rule| rule.fp_kind == loc::CFA).map(|rule| rule.fp_offset) else {
        return true;
    };
    all().all(|rule| {
        let holds = size(rule) >= -i64::from(slot);
        if holds { (rule.fp_kind, rule.fp_offset) == (loc::CFA, slot) } else { rule.fp_kind == loc::SAME }
    })
}

/// The rule of a run of two rows or more.
fn run(rows: &[(u64, Rule)]) -> Rule {
    let (start, first) = rows[0];
    let (fp_kind, fp_offset) = rows
        .iter()
        .find(|(_, rule)| rule.fp_kind == loc::CFA)
        .map_or((loc::SAME, 0), |(_, rule)| (rule.fp_kind, rule.fp_offset));
    Rule {
        cfa_kind: if rows[1].1.cfa_offset > first.cfa_offset { cfa::PUSHES } else { cfa::POPS },
        fp_kind,
        fp_offset,
        ra_offset: rows[1..].iter().fold(0, |steps, (vaddr, _)| steps | 1 << (vaddr - start)),
        ..first
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The plain meaning of a list of rows.
    fn oracle(rows: &[(u64, Rule)], end: u64, vaddr: u64) -> Rule {
        if vaddr >= end {
            return Rule::NONE;
        }
        let after = rows.partition_point(|(pc, _)| *pc <= vaddr);
        after.checked_sub(1).map_or(Rule::NONE, |last| rows[last].1)
    }

    #[track_caller]
    fn check(rows: &[(u64, Rule)], end: u64) -> Table {
        check_one(rows, end, true);
        check_one(rows, end, false)
    }

    #[track_caller]
    fn check_one(rows: &[(u64, Rule)], end: u64, runs: bool) -> Table {
        let limits = Limits::default();
        let mut builder = Builder::new(Arch::X86_64, rows[0].0, end, &limits).unwrap().runs(runs);
        for (pc, rule) in rows {
            builder.push(*pc, *rule).unwrap();
        }
        let table = builder.finish().unwrap();
        let edges = rows.iter().map(|(pc, _)| *pc).chain([end, table.base()]);
        let pages = (table.base()..end + PAGE_BYTES).step_by(2048);
        for vaddr in edges.chain(pages).flat_map(|pc| [pc.wrapping_sub(1), pc, pc + 1]) {
            let found = table.lookup(vaddr).unwrap_or(Rule::NONE);
            assert_eq!(found, oracle(rows, end, vaddr), "at {vaddr:#x}");
        }
        let again = Table::from_parts(
            table.arch,
            table.base,
            table.granules,
            table.lines.clone(),
            table.rules.clone(),
        );
        assert_eq!(again.map(|t| t.rows), Some(table.rows), "a table that was built is a well-formed one");
        table
    }

    fn rule(n: i32) -> Rule {
        Rule::x86_64_sp(n * 8)
    }

    #[test]
    fn r48_a_row_at_the_last_address_of_a_page_is_found_and_nothing_beyond() {
        check(
            &[(0x1_0000, rule(1)), (0x1_fffe, rule(2)), (0x1_ffff, rule(3)), (0x2_0000, Rule::NONE)],
            0x2_0001,
        );
        check(&[(0x1_ffff, rule(3))], 0x2_0000);
        check(&[(0x1_ffff, rule(3))], 0x2_0001);
        check(&[(0x1_f800, rule(3))], 0x2_0800);
    }

    #[test]
    fn r50_a_row_at_every_address_is_kept() {
        let rows: Vec<_> = (0x1_0007..0x3_1234).map(|pc| (pc, rule(1 + (pc % 7) as i32))).collect();
        let table = check(&rows, 0x3_1234);
        assert!(rows.iter().all(|(pc, _)| table.lookup_counted(*pc).1 <= 9));
    }

    #[test]
    fn pages_of_one_rule_share_a_line() {
        let table = check(&[(0x1000, rule(1)), (0x2000, Rule::NONE), (0x4000_0000, rule(2))], 0x4000_1000);
        assert_eq!(table.lines().len() as u32, table.directory_lines() + 3);
        assert_eq!(table.rows(), 5);
    }

    #[test]
    fn kernel_lines_carry_the_nodes_numbers_and_leave_the_directory() {
        let table = check(&[(0x1000, rule(1)), (0x1800, rule(2)), (0x1900, rule(1))], 0x2000);
        let lines: Vec<Line> = table.kernel_lines(&[0, 700, 65_535]).collect();
        assert_eq!(lines[0], table.lines()[0]);
        let row_line = lines[1].0;
        assert_eq!(&row_line[..4], &[row(0, 0), row(0x1000, 700), row(0x1800, 65_535), row(0x1900, 700)]);
        assert_eq!(row_line[15], row(0x1900, 700), "what is left over repeats the last row");
    }

    #[test]
    fn rows_out_of_order_or_outside_are_refused() {
        let limits = Limits::default();
        let mut builder = Builder::new(Arch::X86_64, 0x1000, 0x2000, &limits).unwrap();
        builder.push(0x1800, rule(1)).unwrap();
        assert_eq!(builder.push(0x17ff, rule(2)), Err(BuilderError::OutOfOrder { vaddr: 0x17ff }));
        assert_eq!(builder.push(0x2001, rule(2)), Err(BuilderError::OutOfOrder { vaddr: 0x2001 }));
        assert!(matches!(
            Builder::new(Arch::X86_64, 0, u64::MAX, &limits),
            Err(BuilderError::Exceeded(Exceeded::TooLarge { what: Quantity::SpanBytes, .. }))
        ));
    }

    #[test]
    fn r50_limits_are_errors_and_not_cuts() {
        let limits = Limits { rows: 3, rules: 3, ..Limits::default() };
        let mut builder = Builder::new(Arch::X86_64, 0x1000, 0x2000, &limits).unwrap();
        builder.push(0x1000, rule(1)).unwrap();
        builder.push(0x1001, rule(2)).unwrap();
        builder.push(0x1002, rule(1)).unwrap();
        let full = builder.finish().unwrap_err();
        assert!(matches!(
            full,
            BuilderError::Exceeded(Exceeded::TooLarge { what: Quantity::Rows, limit: 3, .. })
        ));
        let mut builder = Builder::new(Arch::X86_64, 0x1000, 0x2000, &limits).unwrap();
        for n in 0..3_u8 {
            builder.push(0x1000 + u64::from(n), rule(i32::from(n) + 1)).unwrap();
        }
        let full = builder.push(0x1003, rule(1)).unwrap_err();
        assert!(matches!(full, BuilderError::Exceeded(Exceeded::TooLarge { what: Quantity::Rules, .. })));
    }

    /// rbp in its slot, in a frame of this size.
    fn saved(size: i32, slot: i32) -> Rule {
        Rule { fp_kind: loc::CFA, fp_offset: -slot, ..Rule::x86_64_sp(size) }
    }

    /// A function as gcc makes them: six pushes, locals, six pops, return.
    fn usual(start: u64) -> Vec<(u64, Rule)> {
        let plain = Rule::x86_64_sp;
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
            (111, Rule::NONE),
        ];
        rows.map(|(at, rule)| (start + at, rule)).to_vec()
    }

    #[test]
    fn r52_pushes_and_pops_take_one_row_each_and_mean_the_same() {
        let rows = usual(0x1000);
        assert_eq!(check_one(&rows, 0x1080, false).rows(), 17);
        assert_eq!(check_one(&rows, 0x1080, true).rows(), 5, "carried, pushes, locals, pops, none");
        let many: Vec<_> = (0..900).flat_map(|n| usual(0x1000 + n * 113)).collect();
        let table = check_one(&many, 0x1000 + 900 * 113, true);
        assert!(table.rules().len() < 30, "the same runs everywhere: {} rules", table.rules().len());
    }

    #[test]
    fn r48_what_is_not_quite_a_run_is_none() {
        let plain = Rule::x86_64_sp;
        let flagged = Rule { flags: 1, ..plain(16) };
        let lost = Rule { fp_kind: loc::UNDEFINED, ..plain(16) };
        for second in [plain(24), plain(12), saved(16, 24), saved(16, 8), flagged, lost] {
            let rows = [(0x1000, plain(8)), (0x1001, second), (0x1010, Rule::NONE)];
            assert_eq!(check_one(&rows, 0x1020, true).rows(), 4, "{second:?}");
        }
        let far = [(0x1000, plain(8)), (0x1002, plain(16)), (0x1005, plain(24)), (0x1010, Rule::NONE)];
        assert_eq!(check_one(&far, 0x1020, true).rows(), 4);
        let turns = [(0x1000, plain(8)), (0x1002, plain(16)), (0x1003, plain(8)), (0x1010, Rule::NONE)];
        assert_eq!(check_one(&turns, 0x1020, true).rows(), 4);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn r48_runs_mean_what_their_rows_mean(
            start in 0xff00u64..0x1_0010,
            steps in prop::collection::vec((0u64..4, -1i32..2, 0i32..8), 1..200),
        ) {
            let (mut pc, mut size) = (start, 24);
            let mut rows: Vec<(u64, Rule)> = Vec::new();
            for (step, by, slot) in steps {
                pc += step;
                size = (size + by * 8).max(8);
                rows.push((pc, if slot == 0 { saved(size, 24) } else { Rule::x86_64_sp(size) }));
            }
            check(&rows, pc + 20);
        }

        #[test]
        fn r48_lookup_is_the_plain_meaning_of_the_rows(
            start in 0u64..0x3_0000,
            steps in prop::collection::vec((prop_oneof![Just(0u64), 1u64..4, 1u64..600, 1u64..200_000], 0i32..5), 1..400),
            tail in 1u64..70_000,
        ) {
            let mut pc = start;
            let mut rows: Vec<(u64, Rule)> = Vec::new();
            for (step, n) in steps {
                pc += step;
                let rule = if n == 0 { Rule::NONE } else { rule(n) };
                rows.push((pc, rule));
            }
            check(&rows, pc + tail);
        }
    }
}
