//! The run time of the BPF programs, by the kernel's own statistics.

use std::os::fd::{AsFd as _, AsRawFd as _};

use libbpf_rs::{ProgramMut, libbpf_sys};

use super::{Kernel, UnwindDriver};

/// One loaded program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramCost {
    /// Its name in the object.
    pub name: &'static str,
    /// Instructions that the verifier processed; it refuses a million. 0 before kernel 5.16, which does not report it.
    pub verified_instructions: u32,
    /// Nanoseconds that it has run while `kernel.bpf_stats_enabled` was set.
    pub run_ns: u64,
    /// How often it has run while `kernel.bpf_stats_enabled` was set.
    pub runs: u64,
    /// How often the kernel skipped it because it was still running on that CPU. 0 before kernel 5.12, which does not report
    /// it.
    pub skipped: u64,
}

impl Kernel {
    /// Returns the programs that this agent has loaded, the sampler first.
    pub fn programs(&self) -> Vec<ProgramCost> {
        let progs = &self.skeleton.progs;
        let sampler: &[(&'static str, &ProgramMut<'_>)] = match self.options.unwind_driver {
            UnwindDriver::Loop => &[("on_tick", &progs.on_tick)],
            UnwindDriver::TailCalls => {
                &[("on_tick_chain", &progs.on_tick_chain), ("unwind_tick_chain", &progs.unwind_tick_chain)]
            }
        };
        let switch: &[(&'static str, &ProgramMut<'_>)] = match self.options.unwind_driver {
            _ if !self.options.off_cpu => &[],
            UnwindDriver::Loop => &[("on_switch", &progs.on_switch)],
            UnwindDriver::TailCalls => &[
                ("on_switch_chain", &progs.on_switch_chain),
                ("unwind_switch_chain", &progs.unwind_switch_chain),
            ],
        };
        let others: [(&'static str, &ProgramMut<'_>); 6] = [
            ("on_exec", &progs.on_exec),
            ("on_fork", &progs.on_fork),
            ("on_exit", &progs.on_exit),
            ("on_attach", &progs.on_attach),
            ("on_rename", &progs.on_rename),
            ("each_task", &progs.each_task),
        ];
        let redundant: &[(&'static str, &ProgramMut<'_>)] = &[
            ("on_exec_again", &progs.on_exec_again),
            ("on_fork_again", &progs.on_fork_again),
            ("on_exit_again", &progs.on_exit_again),
        ];
        sampler
            .iter()
            .chain(switch)
            .chain(&others)
            .chain(redundant.iter().filter(|_| self.options.redundant_handlers))
            .filter_map(|(name, program)| cost_of(name, program))
            .collect()
    }

    /// Returns the nanoseconds that all programs have run while the kernel counted.
    pub(crate) fn programs_run_ns(&self) -> u64 {
        self.programs().iter().map(|cost| cost.run_ns).sum()
    }

    /// Returns upper bounds of the exec, fork, exit and other events for which the kernel skipped all handlers. An event is lost
    /// only if it skipped both redundant handlers, so the smaller of the two skip counters is a bound.
    pub(super) fn skipped(&self) -> [u64; 4] {
        let progs = &self.skeleton.progs;
        let pairs = [
            (&progs.on_exec, &progs.on_exec_again),
            (&progs.on_fork, &progs.on_fork_again),
            (&progs.on_exit, &progs.on_exit_again),
        ];
        let skips = recursion_misses;
        let [exec, fork, exit] = pairs.map(|(first, second)| match skips(first) {
            skipped if skipped > 0 && self.options.redundant_handlers => skipped.min(skips(second)),
            skipped => skipped,
        });
        // A scan repairs a change of group or name that no handler saw.
        [exec, fork, exit, skips(&progs.on_attach) + skips(&progs.on_rename)]
    }

    /// Returns an upper bound of the off-CPU samples that the kernel lost because it skipped the handler of a switch. It counts
    /// switches of all threads.
    pub(crate) fn skipped_samples(&self) -> u64 {
        let progs = &self.skeleton.progs;
        recursion_misses(&progs.on_switch) + recursion_misses(&progs.on_switch_chain)
    }

    /// Returns the nanoseconds that the sampler has run and how often; `None` unless `kernel.bpf_stats_enabled` is set.
    pub fn sampler_cost(&self) -> Option<(u64, u64)> {
        // The kernel counts the time of a chain of tail calls for the program that began it.
        self.programs().first().filter(|cost| cost.runs > 0).map(|cost| (cost.run_ns, cost.runs))
    }
}

/// Returns how often the kernel skipped a program because it was still active on the CPU; 0 before Linux 5.12.
fn recursion_misses(program: &ProgramMut<'_>) -> u64 {
    info_of(program).map_or(0, |info| info.recursion_misses)
}

fn cost_of(name: &'static str, program: &ProgramMut<'_>) -> Option<ProgramCost> {
    info_of(program).map(|info| ProgramCost {
        name,
        verified_instructions: info.verified_insns,
        run_ns: info.run_time_ns,
        runs: info.run_cnt,
        skipped: info.recursion_misses,
    })
}

fn info_of(program: &ProgramMut<'_>) -> Option<libbpf_sys::bpf_prog_info> {
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut length = size_of_val(&info) as u32;
    // SAFETY: the structure is valid for writing and `length` is its size; its pointers are null, with counts of 0.
    let failed = unsafe {
        libbpf_sys::bpf_prog_get_info_by_fd(program.as_fd().as_raw_fd(), &raw mut info, &raw mut length)
    };
    (failed == 0).then_some(info)
}
