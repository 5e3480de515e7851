//! What the agent's BPF programs use: the kernel counts it while somebody asks it to.

use std::{
    os::fd::{FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use libbpf_rs::libbpf_sys;

use crate::kernel::Kernel;

/// The counting costs two readings of the clock for each run of each program, so it is switched on for one look of so
/// many, and holds for the others.
const ONE_OF: u32 = 4;

/// Measures the share of one core that BPF programs use.
#[derive(Debug, Default)]
pub struct BpfTime {
    looks: u32,
    /// Open while the kernel counts: since when, and what had been counted.
    counting: Option<(OwnedFd, Instant, u64)>,
    share: f64,
}

impl BpfTime {
    /// One look: gives the share as last measured.
    pub fn look(&mut self, kernel: &Kernel) -> f64 {
        if let Some((_switch, since, before)) = self.counting.take() {
            let used = Duration::from_nanos(kernel.programs_run_ns().saturating_sub(before));
            self.share = used.as_secs_f64() / since.elapsed().as_secs_f64().max(1e-3);
        } else if self.looks.is_multiple_of(ONE_OF) {
            self.counting = switch_on().map(|switch| (switch, Instant::now(), kernel.programs_run_ns()));
        }
        self.looks = self.looks.wrapping_add(1);
        self.share
    }
}

/// The kernel counts for as long as the descriptor is open. None: it cannot (before 5.8).
fn switch_on() -> Option<OwnedFd> {
    // SAFETY: takes a number, gives a new descriptor or an error.
    let fd = unsafe { libbpf_sys::bpf_enable_stats(libbpf_sys::BPF_STATS_RUN_TIME) };
    // SAFETY: a new descriptor that nobody else has.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}
