//! The sizes and switches of the kernel side.

use crate::{
    cgroup::CgroupHierarchy,
    model::{self, KernelSymbolLog},
};

/// The sizes and switches of the kernel side. They hold from loading on.
#[derive(Clone, Copy, Debug)]
pub struct KernelOptions {
    /// Bytes of the event ring buffer; rounded up to a power of two.
    pub ring_bytes: u32,
    /// Processes that can be sampled or known at one time.
    pub processes: u32,
    /// Bytes of unwind tables that can be in the kernel at one time.
    pub table_bytes: u32,
    /// The hierarchy whose control group ids the programs read.
    pub hierarchy: CgroupHierarchy,
    /// How the programs iterate over the frames of a user stack.
    pub unwind_driver: UnwindDriver,
    /// Whether rules may ask for blocked time. If not, its programs are not loaded and its map takes no memory.
    pub off_cpu: bool,
    /// Exec and fork reports per second for processes that no rule matches yet.
    pub report_rate: u64,
    /// Whether exec, fork and exit are reported. If not, the agent finds new and exited processes by scans only.
    pub lifecycle: bool,
    /// Whether the handlers of exec, fork and exit are attached twice. The default follows [`handlers_are_preemptible`].
    pub redundant_handlers: bool,
    /// The log of changes of the kernel's symbols, which the kernel side writes.
    pub symbols: &'static KernelSymbolLog,
    /// For tests: tracepoints, programs and `mappings` that are not attached, as if this kernel lacked or refused them.
    #[doc(hidden)]
    pub without: &'static [&'static str],
}

impl Default for KernelOptions {
    fn default() -> Self {
        Self {
            ring_bytes: default_ring_bytes(),
            processes: 16384,
            table_bytes: 16 << 20,
            hierarchy: CgroupHierarchy::detect(),
            unwind_driver: UnwindDriver::Loop,
            off_cpu: true,
            report_rate: 5_000,
            lifecycle: true,
            redundant_handlers: handlers_are_preemptible(),
            symbols: KernelSymbolLog::of_this_kernel(),
            without: &[],
        }
    }
}

/// Returns the default size of the event ring buffer in bytes: 1 MiB for each online CPU, from 2 to 16 MiB. The reader maps
/// it twice, and both mappings count as memory of the agent.
pub(crate) fn default_ring_bytes() -> u32 {
    let cpus = model::online_cpus().map_or(2, |cpus| cpus.len() as u32);
    cpus.saturating_mul(1 << 20).clamp(2 << 20, 16 << 20).next_power_of_two()
}

/// Reports whether this kernel can preempt a program that is attached to a tracepoint. It then skips the program for the next
/// event on that CPU. True from 7.0 on: "tracing: Guard __DECLARE_TRACE() use of __DO_TRACE_CALL() with SRCU-fast".
pub fn handlers_are_preemptible() -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    release.split('.').next().and_then(|major| major.parse().ok()).is_none_or(|major: u32| major >= 7)
}

/// How the programs iterate over the frames of a user stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnwindDriver {
    /// By `bpf_loop`, from kernel 5.17 on: 512 frames.
    Loop,
    /// By a chain of tail calls: 232 frames.
    TailCalls,
}
