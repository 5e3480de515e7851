//! The unwind tables in the kernel: their numbers, their lines and their rules.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use gannet_elf::ContentId;
use gannet_unwind::{
    format::MAX_RULES,
    intern::{RuleInterner, RuleNumbersFull},
    table::UnwindTable,
};

use super::arena::Arena;
use crate::kernel::{KernelError, KernelTable, MAX_TABLES, UnwindMaps};

/// The tables in the kernel, by content.
pub(super) struct ResidentTables {
    tables: HashMap<ContentId, ResidentTable>,
    interner: RuleInterner,
    arena: Arena,
    free_numbers: Vec<u32>,
    /// By table number. Counted up with each eviction, so that the kernel side recognizes a stale number.
    generations: Vec<u32>,
    /// Counts the processes loaded, as the clock of evictions.
    now: u64,
}

/// A table in the kernel.
struct ResidentTable {
    number: u32,
    lines: Range<u32>,
    /// The node's rule numbers.
    rules: Vec<u16>,
    used: u64,
}

/// The reason why a table did not go into the kernel. Evicting others can help, except against `Kernel`.
pub(super) enum InsertError {
    NoLines,
    NoNumber,
    Rules(RuleNumbersFull),
    Kernel(KernelError),
}

impl ResidentTables {
    /// Starts with an array of `lines` cache lines, all free.
    pub(super) fn new(lines: u32) -> Self {
        Self {
            tables: HashMap::new(),
            interner: RuleInterner::new(MAX_RULES),
            arena: Arena::new(lines),
            free_numbers: (0..MAX_TABLES).rev().collect(),
            generations: vec![0; MAX_TABLES as usize],
            now: 0,
        }
    }

    /// Advances the clock of evictions.
    pub(super) fn advance(&mut self) {
        self.now += 1;
    }

    pub(super) fn contains(&self, content: &ContentId) -> bool {
        self.tables.contains_key(content)
    }

    /// Returns number and generation of a table, and marks it as used.
    pub(super) fn get(&mut self, content: &ContentId) -> Option<(u32, u32)> {
        let resident = self.tables.get_mut(content)?;
        resident.used = self.now;
        Some((resident.number, self.generations[resident.number as usize]))
    }

    /// Puts a table into the kernel; returns its number and generation. After an error nothing has changed.
    pub(super) fn insert(
        &mut self,
        kernel: &mut impl UnwindMaps,
        content: ContentId,
        table: &UnwindTable,
    ) -> Result<(u32, u32), InsertError> {
        let lines = u32::try_from(table.lines().len()).ok().and_then(|lines| self.arena.take(lines));
        let lines = lines.ok_or(InsertError::NoLines)?;
        let Some(number) = self.free_numbers.pop() else {
            self.arena.give_back(&lines);
            return Err(InsertError::NoNumber);
        };
        let interned = match self.interner.acquire(table.rules()) {
            Ok(interned) => interned,
            Err(full) => {
                self.arena.give_back(&lines);
                self.free_numbers.push(number);
                return Err(InsertError::Rules(full));
            }
        };
        let generation = self.generations[number as usize];
        let location = KernelTable {
            base: table.base(),
            first_line: lines.start,
            granules: table.granules(),
            generation,
        };
        let written = kernel
            .write_rules(&interned.new)
            .and_then(|()| kernel.write_lines(lines.start, &mut table.kernel_lines(&interned.numbers)))
            .and_then(|()| kernel.set_table(number, Some(location), generation));
        if let Err(error) = written {
            self.arena.give_back(&lines);
            self.free_numbers.push(number);
            self.interner.release(&interned.numbers);
            return Err(InsertError::Kernel(error));
        }
        let resident = ResidentTable { number, lines, rules: interned.numbers, used: self.now };
        self.tables.insert(content, resident);
        Ok((number, generation))
    }

    /// Removes the table whose last use is longest ago from the kernel, and returns its number. None if all are protected.
    pub(super) fn evict(
        &mut self,
        kernel: &mut impl UnwindMaps,
        protected: &HashSet<ContentId>,
    ) -> Option<u32> {
        let oldest = self
            .tables
            .iter()
            .filter(|(content, _)| !protected.contains(content))
            .min_by_key(|(_, resident)| resident.used)
            .map(|(content, _)| *content);
        oldest.and_then(|content| self.remove(kernel, &content))
    }

    /// Removes a table from the kernel, and returns its number. None if it is not there.
    pub(super) fn remove(&mut self, kernel: &mut impl UnwindMaps, content: &ContentId) -> Option<u32> {
        let resident = self.tables.remove(content)?;
        let generation = &mut self.generations[resident.number as usize];
        *generation = generation.wrapping_add(1);
        // The order matters: hide the table, wait for programs that may still read it, then reuse its lines and rules.
        if let Err(error) = kernel.set_table(resident.number, None, *generation) {
            tracing::error!("cannot hide unwind table {}: {error}", resident.number);
        }
        kernel.wait_for_unwinds();
        self.interner.release(&resident.rules);
        self.arena.give_back(&resident.lines);
        self.free_numbers.push(resident.number);
        Some(resident.number)
    }

    /// Returns the number of tables in the kernel.
    pub(super) fn tables(&self) -> usize {
        self.tables.len()
    }

    /// Returns the number of rules in use.
    pub(super) fn rules(&self) -> usize {
        self.interner.used()
    }

    /// Returns the cache lines in use.
    pub(super) fn used_lines(&self) -> u32 {
        self.arena.used()
    }

    /// Returns the cache lines that the kernel has for tables.
    pub(super) fn all_lines(&self) -> u32 {
        self.arena.size()
    }
}
