//! What the kernel knows of the programs that it runs for the agent.

use std::os::fd::{AsFd as _, AsRawFd as _};

use libbpf_rs::{ProgramMut, libbpf_sys};

use super::{Kernel, Walk};

/// One loaded program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramCost {
    /// Its name in the object.
    pub name: &'static str,
    /// Instructions that the verifier looked at; it refuses at a million. 0 where the kernel does not tell (before 5.16).
    pub verified_instructions: u32,
    /// Nanoseconds that it has run, and how often, since kernel.bpf_stats_enabled is set; else 0.
    pub run_ns: u64,
    /// See `run_ns`.
    pub runs: u64,
    /// How often the kernel did not call it, because it was still at work on that CPU. 0 where the kernel does not tell
    /// (before 5.12).
    pub refused: u64,
}

impl Kernel {
    /// The programs that this agent has loaded.
    pub fn programs(&self) -> Vec<ProgramCost> {
        let progs = &self.skeleton.progs;
        let sampler: &[(&'static str, &ProgramMut<'_>)] = match self.walk_kind {
            Walk::Loop => &[("on_tick", &progs.on_tick)],
            Walk::Chain => &[("on_tick_chain", &progs.on_tick_chain), ("walk_chain", &progs.walk_chain)],
        };
        let switch: &[(&'static str, &ProgramMut<'_>)] = match self.walk_kind {
            _ if !self.options.off_cpu => &[],
            Walk::Loop => &[("on_switch", &progs.on_switch)],
            Walk::Chain => &[
                ("on_switch_chain", &progs.on_switch_chain),
                ("walk_switch_chain", &progs.walk_switch_chain),
            ],
        };
        let others: [(&'static str, &ProgramMut<'_>); 5] = [
            ("on_exec", &progs.on_exec),
            ("on_fork", &progs.on_fork),
            ("on_exit", &progs.on_exit),
            ("on_attach", &progs.on_attach),
            ("each_task", &progs.each_task),
        ];
        let twins: &[(&'static str, &ProgramMut<'_>)] = &[
            ("on_exec_again", &progs.on_exec_again),
            ("on_fork_again", &progs.on_fork_again),
            ("on_exit_again", &progs.on_exit_again),
        ];
        sampler
            .iter()
            .chain(switch)
            .chain(&others)
            .chain(twins.iter().filter(|_| self.options.twins))
            .filter_map(|(name, program)| cost_of(name, program))
            .collect()
    }

    /// Nanoseconds that the programs have run while the kernel counted.
    pub(crate) fn programs_run_ns(&self) -> u64 {
        self.programs().iter().map(|cost| cost.run_ns).sum()
    }

    /// Events of exec, fork and exit for which the kernel called nobody, at most: the handler was still at work on that
    /// CPU, and so was its twin where it has one.
    pub(super) fn refused(&self) -> [u64; 3] {
        let progs = &self.skeleton.progs;
        let pairs = [
            (&progs.on_exec, &progs.on_exec_again),
            (&progs.on_fork, &progs.on_fork_again),
            (&progs.on_exit, &progs.on_exit_again),
        ];
        let refused = |program| info_of(program).map_or(0, |info| info.recursion_misses);
        pairs.map(|(first, twin)| match refused(first) {
            missed if missed > 0 && self.options.twins => missed.min(refused(twin)),
            missed => missed,
        })
    }

    /// Nanoseconds that the sampler has run and how often, if the kernel keeps count (kernel.bpf_stats_enabled).
    pub fn sampler_cost(&self) -> Option<(u64, u64)> {
        // What a chain of tail calls does counts for the program that began it.
        self.programs().first().filter(|cost| cost.runs > 0).map(|cost| (cost.run_ns, cost.runs))
    }
}

fn cost_of(name: &'static str, program: &ProgramMut<'_>) -> Option<ProgramCost> {
    info_of(program).map(|info| ProgramCost {
        name,
        verified_instructions: info.verified_insns,
        run_ns: info.run_time_ns,
        runs: info.run_cnt,
        refused: info.recursion_misses,
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
