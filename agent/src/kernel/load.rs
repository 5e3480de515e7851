//! Loading and attaching the BPF programs: [`Kernel::open`], [`OpenedKernel::load`] and [`LoadedKernel::attach`] are a chain, so
//! that nothing can be used before it is ready.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem::MaybeUninit,
    os::fd::{AsFd as _, AsRawFd as _},
};

use gannet_bpf::{GannetSkel, GannetSkelBuilder, OpenGannetSkel, types};
use libbpf_rs::{
    Link, MapCore as _, MapFlags, MapMut, OpenObject, PrintLevel, ProgramMut,
    skel::{OpenSkel as _, SkelBuilder as _},
};
use parking_lot::Mutex;

use super::{
    Kernel, KernelError, KernelOptions, UnwindDriver,
    clock::Clocks,
    entries::Entries,
    hotplug::Hotplug,
    ring::EventRing,
    symbol_names::SymbolNames,
    unwinding::{Shared, SharedTables},
};
use crate::cgroup::CgroupHierarchy;

/// Stacks of blocked threads per second and CPU: at some microseconds each they take less than a tenth of a CPU.
const OFF_CPU_RATE: u64 = 10_000;
/// Off-CPU time below this is a handover between threads, not a wait.
const OFF_CPU_MIN_NS: u64 = 1_000;
/// The last lines of the verifier's log that go into an error.
const LOG_LINES: usize = 12;
/// The kernel's `BPF_LOG_STATS`: the verifier logs its statistics only.
const VERIFIER_STATISTICS: u32 = 4;
/// Bytes of a value of the map `table_lines`.
const LINE_BYTES: u32 = 64;
const _: () = assert!(size_of::<types::table_line>() == LINE_BYTES as usize);

/// The log of libbpf since the last [`Kernel::open`]. It is global because libbpf's callback takes no context.
static LIBBPF_LOG: Mutex<String> = Mutex::new(String::new());

/// Programs and maps that are sized and not yet in the kernel.
pub struct OpenedKernel {
    skeleton: OpenGannetSkel<'static>,
    options: KernelOptions,
}

/// Programs and maps in the kernel that are not attached yet.
pub struct LoadedKernel {
    skeleton: GannetSkel<'static>,
    options: KernelOptions,
}

/// The attached handlers of processes.
pub(super) struct Handlers {
    pub(super) links: Vec<Link>,
    /// The iterator over all tasks.
    pub(super) task_iterator: Option<Link>,
    /// Handlers that could not be attached, with the reason, human-readable.
    pub(super) degraded: Vec<String>,
    /// Tracepoints with a handler.
    tracepoints: BTreeSet<&'static str>,
}

impl Kernel {
    /// Opens, loads and attaches the kernel side; falls back to tail calls on kernels without `bpf_loop`.
    pub fn start(options: KernelOptions) -> Result<Self, KernelError> {
        let attempt =
            |unwind_driver| Self::open(KernelOptions { unwind_driver, ..options })?.load()?.attach();
        match attempt(options.unwind_driver) {
            Err(error @ KernelError::Load { .. }) if options.unwind_driver == UnwindDriver::Loop => {
                tracing::debug!("cannot unwind by bpf_loop, trying tail calls: {error}");
                attempt(UnwindDriver::TailCalls)
            }
            other => other,
        }
    }

    /// Opens and sizes programs and maps.
    pub fn open(options: KernelOptions) -> Result<OpenedKernel, KernelError> {
        log_libbpf(PrintLevel::Warn);
        LIBBPF_LOG.lock().clear();
        // The skeleton borrows its object. It is a few bytes, once for each time that the kernel side is loaded.
        let storage: &'static mut MaybeUninit<OpenObject> = Box::leak(Box::new(MaybeUninit::uninit()));
        let mut skeleton = GannetSkelBuilder::default().open(storage).map_err(KernelError::Open)?;
        let ring_bytes = options.ring_bytes.max(1 << 17).next_power_of_two();
        let options = KernelOptions { ring_bytes, ..options };
        size_maps(&mut skeleton, &options).map_err(KernelError::Open)?;
        choose_programs(&mut skeleton, &options);
        if let Some(constants) = skeleton.maps.rodata_data.as_deref_mut() {
            constants.redundant_handlers = options.redundant_handlers.into();
            constants.cgroup_hierarchy = match options.hierarchy {
                CgroupHierarchy::V2 => 0,
                CgroupHierarchy::V1Cpu => 1,
                CgroupHierarchy::V1Memory => 2,
            };
        }
        Ok(OpenedKernel { skeleton, options })
    }
}

fn size_maps(skeleton: &mut OpenGannetSkel<'_>, options: &KernelOptions) -> Result<(), libbpf_rs::Error> {
    let maps = &mut skeleton.maps;
    maps.events.set_max_entries(options.ring_bytes)?;
    maps.table_lines.set_max_entries((options.table_bytes / LINE_BYTES).max(1))?;
    for map in [&mut maps.images, &mut maps.procs, &mut maps.marks] {
        map.set_max_entries(options.processes)?;
    }
    // Few processes have an interpreter, tasks with labels, or spans.
    for map in [&mut maps.list_frames, &mut maps.label_sources, &mut maps.thread_contexts] {
        map.set_max_entries((options.processes / 4).max(4096))?;
    }
    if !options.off_cpu {
        maps.off_cpu.set_max_entries(1)?;
    }
    Ok(())
}

fn choose_programs(skeleton: &mut OpenGannetSkel<'_>, options: &KernelOptions) {
    let progs = &mut skeleton.progs;
    let (by_loop, by_chain) =
        (options.unwind_driver == UnwindDriver::Loop, options.unwind_driver == UnwindDriver::TailCalls);
    progs.on_tick.set_autoload(by_loop);
    progs.on_tick_chain.set_autoload(by_chain);
    progs.unwind_tick_chain.set_autoload(by_chain);
    progs.on_switch.set_autoload(options.off_cpu && by_loop);
    progs.on_switch_chain.set_autoload(options.off_cpu && by_chain);
    progs.unwind_switch_chain.set_autoload(options.off_cpu && by_chain);
    for program in [&mut progs.on_exec_again, &mut progs.on_fork_again, &mut progs.on_exit_again] {
        program.set_autoload(options.redundant_handlers);
    }
}

/// Stores the log of libbpf from this level on, for the error that may follow.
fn log_libbpf(from: PrintLevel) {
    libbpf_rs::set_print(Some((from, |_, text| {
        tracing::debug!(target: "libbpf", "{}", text.trim_end());
        LIBBPF_LOG.lock().push_str(&text);
    })));
}

impl OpenedKernel {
    /// Makes the kernel verify the programs and create the maps.
    pub fn load(self) -> Result<LoadedKernel, KernelError> {
        let skeleton = self.skeleton.load().map_err(|source| {
            let log = LIBBPF_LOG.lock();
            let lines: Vec<_> = log.lines().collect();
            KernelError::Load { source, log: lines[lines.len().saturating_sub(LOG_LINES)..].join("\n") }
        })?;
        Ok(LoadedKernel { skeleton, options: self.options })
    }

    /// For tests: loads the programs, and returns by name how many instructions the verifier processed for each. Before 5.16
    /// only the verifier's log has this number ([`ProgramCost::verified_instructions`](super::ProgramCost) is 0 there).
    #[doc(hidden)]
    pub fn load_counted(mut self) -> Result<(LoadedKernel, BTreeMap<String, u32>), KernelError> {
        for mut program in self.skeleton.open_object_mut().progs_mut() {
            program.set_log_level(VERIFIER_STATISTICS);
        }
        log_libbpf(PrintLevel::Debug);
        let loaded = self.load();
        log_libbpf(PrintLevel::Warn);
        let loaded = loaded?;
        let log = LIBBPF_LOG.lock();
        let mut program = "";
        let mut verified = BTreeMap::new();
        for line in log.lines() {
            if let Some((_, name)) =
                line.split_once("prog '").filter(|_| line.contains("BEGIN PROG LOAD LOG"))
            {
                program = name.split('\'').next().unwrap_or_default();
            } else if let Some(count) = line.strip_prefix("processed ") {
                let number = count.split(' ').next().and_then(|number| number.parse().ok());
                verified.extend(number.map(|number| (program.to_owned(), number)));
            }
        }
        Ok((loaded, verified))
    }
}

impl LoadedKernel {
    /// Attaches the handlers of processes and opens the ring buffer. The programs report nothing before lifecycle events and
    /// sampling are switched on.
    pub fn attach(self) -> Result<Kernel, KernelError> {
        let Self { skeleton, options } = self;
        if options.unwind_driver == UnwindDriver::TailCalls {
            set_tail_call(&skeleton.maps.tick_chain, "tick_chain", &skeleton.progs.unwind_tick_chain)?;
            if options.off_cpu {
                let next = &skeleton.progs.unwind_switch_chain;
                set_tail_call(&skeleton.maps.switch_chain, "switch_chain", next)?;
            }
        }
        let Handlers { links, task_iterator, mut degraded, tracepoints } =
            attach_handlers(&skeleton, &options);
        let mut features = Vec::new();
        let life = ["sched_process_exec", "sched_process_fork", "sched_process_exit"];
        features.extend(life.iter().all(|point| tracepoints.contains(point)).then_some("lifecycle"));
        features.extend(task_iterator.is_some().then_some("scan"));
        features.extend((options.unwind_driver == UnwindDriver::Loop).then_some("bpf_loop"));
        if options.off_cpu {
            // Detached at once: it is attached while a rule needs it.
            match attach_switches(&skeleton, &options) {
                Ok(_) => features.push("off_cpu"),
                Err(error) => degraded.push(format!("no blocked time: {error}")),
            }
        }
        let hotplug = Hotplug::start()
            .inspect_err(|error| {
                let effect = "a CPU that goes off and on within a second is not sampled any more";
                degraded.push(format!("the kernel reports no device events ({error}): {effect}"));
            })
            .ok();
        if let Some(names) =
            SymbolNames::open(&skeleton).filter(|_| !options.without.contains(&"name_symbols"))
        {
            options.symbols.set_namer(Box::new(names));
        }
        let shared = SharedTables {
            lines: Shared::of(&skeleton.maps.table_lines, "table_lines")?,
            rules: Shared::of(&skeleton.maps.unwind_rules, "unwind_rules")?,
        };
        let mut kernel = Kernel {
            clocks: Clocks::default(),
            mappings: None,
            hotplug,
            follows_mappings: !options.without.contains(&"mappings"),
            links,
            switches: None,
            raw_stacks: None,
            task_iterator,
            ring: EventRing::open(&skeleton.maps.events, options.ring_bytes)?,
            shared,
            entries: Entries::default(),
            skeleton,
            degraded,
            features,
            options,
            detached: false,
        };
        kernel.change_settings(|settings| {
            // An eighth of the ring buffer is for lifecycle events; the programs wake the reader at a quarter.
            settings.ring_sample_limit = u64::from(options.ring_bytes / 8 * 7);
            settings.ring_wake = u64::from(options.ring_bytes / 4);
            settings.report_rate = options.report_rate;
            settings.off_cpu_min_ns = OFF_CPU_MIN_NS;
            settings.off_cpu_rate = OFF_CPU_RATE;
            settings.user_stacks = 1;
            settings.kernel_stacks = 1;
        });
        Ok(kernel)
    }
}

/// Makes a program the target of the tail calls through a map.
fn set_tail_call(map: &MapMut<'_>, name: &'static str, program: &ProgramMut<'_>) -> Result<(), KernelError> {
    let next = program.as_fd().as_raw_fd();
    map.update(&0_u32.to_ne_bytes(), &next.to_ne_bytes(), MapFlags::ANY)
        .map_err(|source| KernelError::Map { map: name, source })
}

/// Attaches the handlers that follow processes. Failures are returned in `degraded`: the agent runs without that handler.
pub(super) fn attach_handlers(skeleton: &GannetSkel<'static>, options: &KernelOptions) -> Handlers {
    let mut degraded = Vec::new();
    let mut links = Vec::new();
    let mut tracepoints = BTreeSet::new();
    let progs = &skeleton.progs;
    // The kernel calls redundant handlers in this order, unless it skips the first.
    let handlers: [(&ProgramMut<'_>, &'static str, bool); 8] = [
        (&progs.on_exec, "sched_process_exec", !options.without.contains(&"on_exec")),
        (&progs.on_fork, "sched_process_fork", !options.without.contains(&"on_fork")),
        (&progs.on_exit, "sched_process_exit", !options.without.contains(&"on_exit")),
        (&progs.on_attach, "cgroup_attach_task", true),
        (&progs.on_rename, "task_rename", true),
        (&progs.on_exec_again, "sched_process_exec", options.redundant_handlers),
        (&progs.on_fork_again, "sched_process_fork", options.redundant_handlers),
        (&progs.on_exit_again, "sched_process_exit", options.redundant_handlers),
    ];
    if !options.lifecycle {
        degraded.push(
            "lifecycle events are switched off (--lifecycle): the agent scans for processes every two seconds and misses \
             short ones"
                .into(),
        );
    }
    for (program, tracepoint, _) in handlers.into_iter().filter(|(.., wanted)| options.lifecycle && *wanted) {
        let attached = if options.without.contains(&tracepoint) {
            Err("left out".into())
        } else {
            program.attach_raw_tracepoint(tracepoint).map_err(|error| error.to_string())
        };
        match attached {
            Ok(link) => {
                links.push(link);
                tracepoints.insert(tracepoint);
            }
            // Redundant handlers fail alike and are logged once.
            Err(error) => {
                let reason = format!("no {tracepoint} tracepoint: {error}");
                if !degraded.contains(&reason) {
                    degraded.push(reason);
                }
            }
        }
    }
    let task_iterator = match progs.each_task.attach() {
        Ok(link) => Some(link),
        Err(error) => {
            degraded.push(format!("no scan of running processes: {error}"));
            None
        }
    };
    Handlers { links, task_iterator, degraded, tracepoints }
}

/// Attaches the handler of context switches, which reports blocked time.
pub(super) fn attach_switches(
    skeleton: &GannetSkel<'static>,
    options: &KernelOptions,
) -> Result<Link, KernelError> {
    let what = "the blocked-time handler to sched_switch";
    let program = match options.unwind_driver {
        UnwindDriver::Loop => &skeleton.progs.on_switch,
        UnwindDriver::TailCalls => &skeleton.progs.on_switch_chain,
    };
    let attached = if options.without.contains(&"sched_switch") {
        Err(libbpf_rs::Error::from_raw_os_error(libc::ENOENT))
    } else {
        program.attach_raw_tracepoint("sched_switch")
    };
    attached.map_err(|source| KernelError::Attach { what, source })
}
