//! The unwind table of one file: look-up, and the form that the kernel stores.

use gannet_elf::Arch;

use crate::format::{
    CacheLine, FIRST_LINE_STEP, FIRST_ROW_STEP, GRANULE_BYTES, GRANULE_SHIFT, MAX_LINES, MAX_RUN_BYTES,
    PAGE_BYTES, RULE_NONE, UnwindRule, WORDS_PER_LINE, cfa, directory_parts, row, row_pc_low, row_rule,
};

/// The unwind table of one file, laid out as the kernel reads it ([`crate::format`]) but with rule numbers of its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnwindTable {
    pub(crate) arch: Arch,
    pub(crate) base: u64,
    pub(crate) granules: u32,
    pub(crate) directory_lines: u32,
    pub(crate) rows: u32,
    pub(crate) lines: Vec<CacheLine>,
    pub(crate) rules: Vec<UnwindRule>,
}

impl UnwindTable {
    /// Returns the instruction set.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// Returns the ELF virtual address of the first granule.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Returns the number of granules, which is that of directory words in use.
    pub fn granules(&self) -> u32 {
        self.granules
    }

    /// Returns the number of [`UnwindTable::lines`], from the first, that hold the directory.
    pub fn directory_lines(&self) -> u32 {
        self.directory_lines
    }

    /// Returns the number of unwind rows, without those that fill up cache lines.
    pub fn rows(&self) -> u32 {
        self.rows
    }

    /// Returns directory and rows, with this table's own rule numbers.
    pub fn lines(&self) -> &[CacheLine] {
        &self.lines
    }

    /// Returns the rules by this table's own numbers; the first is [`UnwindRule::NONE`].
    pub fn rules(&self) -> &[UnwindRule] {
        &self.rules
    }

    /// Returns the bytes that the table takes in the kernel.
    pub fn kernel_bytes(&self) -> usize {
        size_of_val(self.lines.as_slice())
    }

    /// Returns whether the file has no function with a rule.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Returns the cache lines as the kernel stores them, with the node's rule numbers: `numbers[own]` is the node's. A number
    /// that `numbers` does not have becomes [`RULE_NONE`].
    pub fn kernel_lines<'a>(&'a self, numbers: &'a [u16]) -> impl ExactSizeIterator<Item = CacheLine> + 'a {
        let directory_lines = self.directory_lines as usize;
        self.lines.iter().enumerate().map(move |(index, line)| {
            if index < directory_lines {
                return *line;
            }
            CacheLine(line.0.map(|word| {
                let number = numbers.get(usize::from(row_rule(word))).copied().unwrap_or(RULE_NONE);
                row(row_pc_low(word), number)
            }))
        })
    }

    /// Returns the rule that holds at an ELF virtual address, by the same steps as the kernel side. `None` outside the table;
    /// [`UnwindRule::NONE`] inside it but outside all functions.
    pub fn lookup(&self, vaddr: u64) -> Option<UnwindRule> {
        self.lookup_counted(vaddr).0
    }

    /// Looks up as [`UnwindTable::lookup`] does, and counts the cache lines of rows that it reads.
    pub fn lookup_counted(&self, vaddr: u64) -> (Option<UnwindRule>, u32) {
        let mut read = 0;
        let rule = self.search(vaddr, &mut read);
        (rule, read)
    }

    fn search(&self, vaddr: u64, read: &mut u32) -> Option<UnwindRule> {
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

    /// Returns the ELF virtual address behind the last granule.
    pub fn end(&self) -> u64 {
        self.base + (u64::from(self.granules) << GRANULE_SHIFT)
    }

    /// Returns the addresses at which the rule changes, ascending, with the rule from there on. Of a run, each step is a row.
    pub fn plain_rows(&self) -> impl Iterator<Item = (u64, UnwindRule)> {
        let mut last = UnwindRule::NONE;
        let rows = (0..self.pages()).flat_map(|page| self.page_rows(page));
        rows.filter(move |(_, rule)| std::mem::replace(&mut last, *rule) != *rule)
    }

    fn pages(&self) -> u64 {
        u64::from(self.granules).div_ceil(PAGE_BYTES / GRANULE_BYTES)
    }

    /// Returns the rows of one page, with each step of a run.
    fn page_rows(&self, page: u64) -> Vec<(u64, UnwindRule)> {
        let per_page = (PAGE_BYTES / GRANULE_BYTES) as usize;
        let first_granule = page as usize * per_page;
        let last_granule = (first_granule + per_page).min(self.granules as usize) - 1;
        let directory = |granule: usize| {
            directory_parts(self.lines[granule / WORDS_PER_LINE].0[granule % WORDS_PER_LINE])
        };
        let first = directory(first_granule).0;
        let (last, more) = directory(last_granule);
        let words = (first..=last + more).flat_map(|line| self.lines[line as usize].0);
        let mut words: Vec<u32> = words.collect();
        // Fillers repeat the last row of their line.
        words.dedup();
        let start = self.base + page * PAGE_BYTES;
        let mut rows = Vec::with_capacity(words.len());
        for (index, word) in words.iter().enumerate() {
            let Some(rule) = self.rules.get(usize::from(row_rule(*word))) else { continue };
            let at = u64::from(row_pc_low(*word));
            let next = words.get(index + 1).map_or(PAGE_BYTES, |next| u64::from(row_pc_low(*next)));
            let steps = if matches!(rule.cfa_kind, cfa::PUSHES | cfa::POPS) { MAX_RUN_BYTES } else { 0 };
            rows.extend(
                (0..=steps).filter(|step| at + step < next).map(|step| (start + at + step, rule.after(step))),
            );
        }
        rows
    }

    /// Builds a table from stored parts, if they agree: every directory word names existing lines in order, every row names
    /// an existing rule, fillers repeat.
    pub(crate) fn from_parts(
        arch: Arch,
        base: u64,
        granules: u32,
        lines: Vec<CacheLine>,
        rules: Vec<UnwindRule>,
    ) -> Option<Self> {
        let directory_lines = granules.div_ceil(WORDS_PER_LINE as u32);
        let directory = lines.get(..directory_lines as usize)?;
        let row_lines = &lines[directory_lines as usize..];
        let well_formed = base.is_multiple_of(PAGE_BYTES)
            && base.checked_add(u64::from(granules) << GRANULE_SHIFT).is_some()
            && lines.len() <= MAX_LINES
            && rules.first() == Some(&UnwindRule::NONE)
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

fn rows_in_line(line: &CacheLine) -> u32 {
    1 + line.0.windows(2).filter(|w| w[0] != w[1]).count() as u32
}
