//! The CPU use of the agent's BPF programs. The kernel counts it while a descriptor for that is open.

use std::{
    os::fd::{FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use libbpf_rs::libbpf_sys;

use crate::kernel::Kernel;

/// While the kernel counts, it reads the clock twice for each run of each program. So it counts during one of this many
/// measurements, and the result serves for the others.
const SAMPLING_INTERVAL: u32 = 4;

/// Measures the share of one core that BPF programs use.
#[derive(Debug, Default)]
pub(crate) struct BpfTime {
    measurements: u32,
    /// Open while the kernel counts, with the time and the counter at its start.
    counting: Option<(OwnedFd, Instant, u64)>,
    share: f64,
}

impl BpfTime {
    /// Returns the share of one core in the last counted interval. Called once for each check of the budgets.
    pub(crate) fn measure(&mut self, kernel: &Kernel) -> f64 {
        if let Some((_counting, since, before)) = self.counting.take() {
            let used = Duration::from_nanos(kernel.programs_run_ns().saturating_sub(before));
            self.share = used.as_secs_f64() / since.elapsed().as_secs_f64().max(1e-3);
        } else if self.measurements.is_multiple_of(SAMPLING_INTERVAL) {
            self.counting = start_counting().map(|fd| (fd, Instant::now(), kernel.programs_run_ns()));
        }
        self.measurements = self.measurements.wrapping_add(1);
        self.share
    }
}

/// Opens a descriptor. The kernel counts as long as it is open. None: the kernel cannot (before 5.8).
fn start_counting() -> Option<OwnedFd> {
    // SAFETY: the call takes a number and returns a new descriptor or a negative error.
    let fd = unsafe { libbpf_sys::bpf_enable_stats(libbpf_sys::BPF_STATS_RUN_TIME) };
    // SAFETY: the descriptor is new, so nothing else owns it.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}
