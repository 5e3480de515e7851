//! The machine's own counts of what changes the meaning of an address: classes that it unloads, and methods that it replaces.
//!
//! A machine frees the methods of a class that it unloads, after it has counted the class. It also frees methods that an agent in it
//! has replaced by others (`Instrumentation.redefineClasses`), which count as no unloaded class. It does so only while all its
//! threads stand still, at a safepoint, and it counts safepoints.

use super::{
    super::{Memory, Replacements, Unloads},
    perf_data,
    structs::Structs,
};

/// Local symbols, which a stripped library does not have: the count of redefinitions, each of one or more classes, and before version
/// 12 a byte that says whether there was one.
pub(super) const LOCAL_SYMBOLS: [&str; 2] =
    ["_ZN11JvmtiExport19_redefinition_countE", "_ZN11JvmtiExport22_has_redefined_a_classE"];

/// Addresses of the counts.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) unloaded: Option<u64>,
    pub(super) safepoints: Option<u64>,
    pub(super) redefinitions: Option<u64>,
    /// Of the byte that says whether classes were redefined, or else whether they can be. That is set when the first agent starts.
    /// Both stay set.
    pub(super) can_redefine: Option<u64>,
}

impl Counts {
    /// Finds the counts. `local` has the addresses of [`LOCAL_SYMBOLS`].
    pub(super) fn new(structs: &Structs, local: [Option<u64>; 2], memory: &dyn Memory) -> Self {
        let [redefinitions, has_redefined] = local;
        let [unloaded, safepoints] =
            perf_data::addresses([perf_data::UNLOADED, perf_data::SAFEPOINTS], structs, memory);
        let can_redefine = structs.address("JvmtiExport", "_can_hotswap_or_post_breakpoint").ok();
        let can_redefine = has_redefined.or(can_redefine);
        Self { unloaded, safepoints, redefinitions, can_redefine }
    }

    /// Reads the number of unloaded classes.
    pub(super) fn unloads(&self, memory: &dyn Memory) -> Unloads {
        count(self.unloaded, memory)
    }

    /// Reads how often methods may have been replaced, and been freed.
    pub(super) fn replacements(&self, memory: &dyn Memory) -> Replacements {
        // First: what was freed before the other count says that something was replaced is counted here.
        let freed = count(self.safepoints, memory);
        let replaced = match self.redefinitions {
            Some(_) => count(self.redefinitions, memory),
            None if self.can_redefine(memory) => freed,
            None => Unloads::Count(0),
        };
        if replaced == Unloads::Count(0) { Replacements::NONE } else { Replacements { replaced, freed } }
    }

    fn can_redefine(&self, memory: &dyn Memory) -> bool {
        self.can_redefine.is_some_and(|at| memory.array(at) != Ok([0]))
    }
}

fn count(address: Option<u64>, memory: &dyn Memory) -> Unloads {
    address.and_then(|at| memory.u64(at).ok()).map_or(Unloads::Unknown, Unloads::Count)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unloaded classes, safepoints, redefinitions, and whether classes can be redefined, at 0, 8, 16 and 24.
    struct Machine([u64; 4]);

    impl Memory for Machine {
        fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
            let word = self.0[address as usize / 8].to_ne_bytes();
            bytes.copy_from_slice(&word[..bytes.len()]);
            true
        }
    }

    const ALL: Counts =
        Counts { unloaded: Some(0), safepoints: Some(8), redefinitions: Some(16), can_redefine: Some(24) };

    #[track_caller]
    fn check(counts: Counts, machine: [u64; 4], replaced: Unloads, freed: Unloads) {
        assert_eq!(counts.replacements(&Machine(machine)), Replacements { replaced, freed });
        assert_eq!(counts.unloads(&Machine(machine)), Unloads::Count(machine[0]));
    }

    #[test]
    fn machines_that_redefine_nothing_have_replaced_nothing() {
        let none = Unloads::Count(0);
        check(ALL, [7, 30, 0, 1], none, none);
        check(Counts { redefinitions: None, ..ALL }, [7, 30, 5, 0], none, none);
        check(Counts { redefinitions: None, can_redefine: None, ..ALL }, [7, 30, 5, 1], none, none);
    }

    #[test]
    fn a_machine_that_redefines_frees_methods_at_safepoints() {
        let count = Unloads::Count;
        check(ALL, [7, 30, 5, 1], count(5), count(30));
        // Stripped: each safepoint may be a redefinition.
        check(Counts { redefinitions: None, ..ALL }, [7, 30, 5, 1], count(30), count(30));
        // Without counters: what may be freed is not known.
        check(Counts { safepoints: None, ..ALL }, [7, 30, 5, 1], count(5), Unloads::Unknown);
        let neither = Counts { safepoints: None, redefinitions: None, ..ALL };
        check(neither, [7, 30, 5, 1], Unloads::Unknown, Unloads::Unknown);
    }
}
