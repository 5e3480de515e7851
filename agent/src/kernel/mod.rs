//! The agent's hold on the kernel: the BPF programs, their maps, the clocks, and the ring that everything is reported
//! through. Mechanism only: what is to be sampled is decided elsewhere.
//!
//! [`Kernel::open`], [`Opened::load`] and [`Loaded::attach`] are a chain, so that nothing can be used before its time.
//! Dropping a [`Kernel`] stops the clocks, then detaches the programs, then frees the maps.

mod clock;
mod cost;
mod event;
mod mappings;
mod unwinding;

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    io::{self, Read as _},
    mem::{MaybeUninit, size_of},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd},
    rc::Rc,
    sync::{
        Mutex, PoisonError,
        atomic::{Ordering, fence},
    },
};

use gannet_bpf::{GannetSkel, GannetSkelBuilder, OpenGannetSkel, types};
use libbpf_rs::{
    Iter, Link, MapCore, MapFlags, OpenObject, PrintLevel, ProgramMut, RingBuffer, RingBufferBuilder,
    skel::{OpenSkel as _, SkelBuilder as _},
};

pub use cost::ProgramCost;
pub use event::{DecodeError, Event};
pub use unwinding::{
    Block, EmptyRange, KernelImage, KernelMapping, KernelTable, MAX_TABLES, UnwindMaps, blocks, mapping_key,
};

use crate::{
    cgroup::CgroupHierarchy,
    model::{self, ProcessKey, Sample},
};

/// Rules that can be in force at one time: one bit each in a sample.
pub const MAX_RULES: usize = 64;

/// Stacks of threads that block, a second and CPU: at some microseconds each it stays below a tenth of a CPU.
const OFF_CPU_RATE: u64 = 10_000;

/// How much of the verifier's log goes into an error.
const LOG_LINES: usize = 12;

/// The kernel's `BPF_LOG_STATS`: the verifier's log is one of numbers.
const VERIFIER_STATISTICS: u32 = 4;

/// What libbpf complained about since a kernel side was opened last; its callback takes no context.
static COMPLAINTS: Mutex<String> = Mutex::new(String::new());

/// Bytes of a value of `table_lines`.
const LINE_BYTES: u32 = 64;
const _: () = assert!(size_of::<types::table_line>() == LINE_BYTES as usize);

/// What the kernel side is sized by.
#[derive(Clone, Copy, Debug)]
pub struct KernelOptions {
    /// Bytes of the ring; rounded up to a power of two.
    pub ring_bytes: u32,
    /// Processes that can be sampled or known at one time.
    pub processes: u32,
    /// Bytes of unwind tables that can be in the kernel at one time.
    pub table_bytes: u32,
    /// Where the cgroup id of a process is read.
    pub hierarchy: CgroupHierarchy,
    /// How a walk over a user stack is driven.
    pub walk: Walk,
    /// Whether rules may want blocked time. Without, its programs are not loaded and its map takes no room.
    pub off_cpu: bool,
    /// Exec and fork reports a second that are sent for processes that nobody wants yet.
    pub report_rate: u64,
    /// Exec, fork and exit are heard of; else who starts, changes and ends is found by looking only.
    pub lifecycle: bool,
    /// Whether what follows exec, fork and exit is attached twice; by default where the kernel can preempt it
    /// ([`handlers_are_preemptible`]).
    pub twins: bool,
    /// For tests: what is not attached, as if this kernel did not have it, or always refused it.
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
            walk: Walk::Loop,
            off_cpu: true,
            report_rate: 5_000,
            lifecycle: true,
            twins: handlers_are_preemptible(),
            without: &[],
        }
    }
}

/// Bytes of the ring, if nobody says: what the reader maps of it counts as its memory twice.
pub fn default_ring_bytes() -> u32 {
    let cpus = model::online_cpus().map_or(2, |cpus| cpus.len() as u32);
    cpus.saturating_mul(1 << 20).clamp(2 << 20, 16 << 20).next_power_of_two()
}

/// Whether this kernel can preempt a program that is attached to a tracepoint, and so refuse it the next event on its CPU:
/// from 7.0 on, "tracing: Guard __DECLARE_TRACE() use of __DO_TRACE_CALL() with SRCU-fast".
pub fn handlers_are_preemptible() -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    release.split('.').next().and_then(|major| major.parse().ok()).is_none_or(|major: u32| major >= 7)
}

/// How a walk over a user stack is driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    /// By bpf_loop, which kernels from 5.17 on have: 512 frames.
    Loop,
    /// By a chain of tail calls: 232 frames.
    Chain,
}

/// What can go wrong with the kernel side, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The object could not be opened.
    #[error("the BPF object cannot be opened: {0}; this build is broken, install another")]
    Open(#[source] libbpf_rs::Error),
    /// The kernel refused programs or maps.
    #[error(
        "the kernel refused the BPF programs: {source:#}; `gannet-agent check` tells what is missing\n{log}"
    )]
    Load {
        /// The end of what libbpf and the verifier wrote.
        log: String,
        /// What it said.
        #[source]
        source: libbpf_rs::Error,
    },
    /// A program could not be attached.
    #[error("cannot attach {what}: {source:#}; `gannet-agent check` tells what is missing")]
    Attach {
        /// Which.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: libbpf_rs::Error,
    },
    /// The clock of a CPU could not be opened.
    #[error("cannot open the clock of CPU {cpu}: {source}; `gannet-agent check` tells what is missing")]
    PerfEvent {
        /// Which.
        cpu: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file of the kernel could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which.
        path: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A map could not be written or read.
    #[error("BPF map {map}: {source:#}")]
    Map {
        /// Its name.
        map: &'static str,
        /// What the kernel said.
        #[source]
        source: libbpf_rs::Error,
    },
    /// The walk over all processes failed.
    #[error("the walk over the running processes failed: {0}")]
    Walk(#[source] io::Error),
    /// The ring could not be read.
    #[error("the event ring cannot be read: {0:#}")]
    Ring(#[source] libbpf_rs::Error),
}

/// Programs and maps, sized, not yet in the kernel.
pub struct Opened {
    skeleton: OpenGannetSkel<'static>,
    options: KernelOptions,
}

/// Programs and maps in the kernel, not yet called by it.
pub struct Loaded {
    skeleton: GannetSkel<'static>,
    options: KernelOptions,
}

/// The kernel side at work.
pub struct Kernel {
    // The order of the fields is the order of their end.
    clocks: clock::Clocks,
    mappings: Option<mappings::Mappings>,
    listens: bool,
    links: Vec<Link>,
    switches: Option<Link>,
    walk: Option<Link>,
    ring: RingBuffer<'static>,
    queue: Rc<RefCell<Queue>>,
    shared: unwinding::SharedTables,
    skeleton: GannetSkel<'static>,
    degraded: Vec<String>,
    walk_kind: Walk,
    options: KernelOptions,
    /// Nothing of it is attached, and nothing shall be.
    detached: bool,
}

#[derive(Default)]
struct Queue {
    events: Vec<Event>,
    undecodable: u64,
    /// Of the ring, that one reading may still take.
    left_bytes: usize,
}

/// What `ring_buffer__consume` is told, and answers, when a reading is to end.
const ENOUGH: i32 = -libc::ECANCELED;

impl Queue {
    /// Takes one record of the ring. [`ENOUGH`]: it is the last one of this reading.
    fn take(&mut self, bytes: &[u8]) -> i32 {
        match Event::decode(bytes) {
            Ok(event) => self.events.push(event),
            Err(error) => {
                self.undecodable += 1;
                tracing::debug!("undecodable event: {error}");
            }
        }
        self.left_bytes = self.left_bytes.saturating_sub(bytes.len());
        if self.left_bytes == 0 { ENOUGH } else { 0 }
    }
}

/// What a process is to be sampled for: rules by slot, and the time between two ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Want {
    /// One bit for each slot.
    pub rules: u64,
    /// The shortest that they ask for.
    pub period_ns: u64,
}

/// What the agent decided for one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arm {
    /// Whom.
    pub key: ProcessKey,
    /// For which of its images; without meaning if sticky.
    pub exec_id: u32,
    /// Over exec, and for its children.
    pub sticky: bool,
    /// For what.
    pub want: Want,
    /// Rules that are over for it, though the kernel side matched them.
    pub refused: u64,
    /// The time between two ticks that is left without them.
    pub period_ns: u64,
}

/// The rules in the form that the kernel side needs. What is matched gives sets of rules, one bit for each slot; a rule
/// matches if it is in the sets of all properties.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelRules {
    /// What every process is sampled for, known or not.
    pub all: Want,
    /// Command names, each with all rules that it matches, those of shorter matching prefixes included.
    pub comms: Vec<(NamePattern, u64)>,
    /// Paths of control groups, likewise.
    pub cgroups: Vec<(NamePattern, u64)>,
    /// What is compared as a number.
    pub exact: Vec<(Exact, u64)>,
    /// Which rules ask for what.
    pub masks: Masks,
    /// Time between two ticks by slot; 0 for a slot that is free or wants no ticks.
    pub periods_ns: [u64; MAX_RULES],
    /// The slots that want blocked time.
    pub off_cpu: u64,
    /// Whether any rule wants user or kernel stacks.
    pub user_stacks: bool,
    /// See `user_stacks`.
    pub kernel_stacks: bool,
}

/// Which rules ask for what, one bit for each slot. See `struct side` of gannet.h.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Masks {
    /// All that can match.
    pub rules: u64,
    /// Those that ask for no command name.
    pub any_comm: u64,
    /// For no control group path.
    pub any_cgroup: u64,
    /// For no container.
    pub any_container: u64,
    /// For no user.
    pub any_uid: u64,
    /// For no pid.
    pub any_pid: u64,
    /// Those that the agent must decide: who matches the rest is reported.
    pub by_agent: u64,
    /// Those that hold over exec, and go on to children.
    pub sticky: u64,
    /// Those that are for who matches at `execve`, not for who runs already.
    pub at_exec: u64,
    /// Who matches one of these is never sampled.
    pub deny: u64,
}

/// What is compared as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Exact {
    /// A container: the id of its control group. Covers the groups within.
    Container(u64),
    /// A process.
    Pid(u32),
    /// An effective user id.
    Uid(u32),
}

impl Default for KernelRules {
    fn default() -> Self {
        Self {
            all: Want::default(),
            comms: Vec::new(),
            cgroups: Vec::new(),
            exact: Vec::new(),
            masks: Masks::default(),
            periods_ns: [0; MAX_RULES],
            off_cpu: 0,
            user_stacks: true,
            kernel_stacks: true,
        }
    }
}

impl KernelRules {
    /// One rule, in slot 0: sample this command.
    pub fn for_comm(comm: NamePattern, period_ns: u64) -> Self {
        let mut rules = Self { comms: vec![(comm, 1)], ..Self::default() };
        rules.masks =
            Masks { rules: 1, any_cgroup: 1, any_container: 1, any_uid: 1, any_pid: 1, ..Masks::default() };
        rules.periods_ns[0] = period_ns;
        rules
    }
}

/// A name or path, or the beginning of one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamePattern {
    /// Of a command at most [`MAX_COMM`] bytes, of a control group at most [`MAX_CGROUP_PATH`].
    pub text: String,
    /// Longer names count too.
    pub prefix: bool,
}

/// Bytes of a command name that the kernel keeps.
pub const MAX_COMM: usize = 15;
/// Bytes of a control group's path that the kernel side can compare.
pub const MAX_CGROUP_PATH: usize = 251;
const _: () = assert!(size_of::<types::comm_key>() == 8 + MAX_COMM + 1);
const _: () = assert!(size_of::<types::cgroup_key>() == 8 + MAX_CGROUP_PATH + 1);

/// Counts of the kernel side since it was loaded. See gannet.h.
pub type Counters = types::counters;
/// Of one kind of lifecycle event: seen = filtered + sent + lost by rate + lost to a full ring; refused ones were not seen.
pub type LifecycleCounts = types::lifecycle_counts;

/// The counts of each kind of lifecycle event, with its name.
pub fn lifecycle_counts(counters: &Counters) -> [(&'static str, &LifecycleCounts); 4] {
    [("exec", &counters.exec), ("fork", &counters.fork), ("exit", &counters.exit), ("found", &counters.found)]
}

/// Lifecycle events that were not reported though somebody wanted them.
pub fn lifecycle_lost(counters: &Counters) -> u64 {
    lifecycle_counts(counters).iter().map(|(_, counts)| counts.lost_rate + counts.lost_ring_full).sum()
}

/// Lifecycle events for which the kernel called no handler, at most: ends of threads count too.
pub fn lifecycle_refused(counters: &Counters) -> u64 {
    lifecycle_counts(counters).iter().map(|(_, counts)| counts.refused).sum()
}

impl Kernel {
    /// All steps in one, with the walk that this kernel can do.
    pub fn start(options: KernelOptions) -> Result<Self, KernelError> {
        let attempt = |walk| Self::open(KernelOptions { walk, ..options })?.load()?.attach();
        match attempt(options.walk) {
            Err(error @ KernelError::Load { .. }) if options.walk == Walk::Loop => {
                tracing::debug!("no walk by bpf_loop: {error}");
                attempt(Walk::Chain)
            }
            other => other,
        }
    }

    /// Opens and sizes programs and maps.
    pub fn open(options: KernelOptions) -> Result<Opened, KernelError> {
        listen_to_libbpf(PrintLevel::Warn);
        COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner).clear();
        // The skeleton borrows its object. It is a few bytes, once for each time that the kernel side is loaded.
        let storage: &'static mut MaybeUninit<OpenObject> = Box::leak(Box::new(MaybeUninit::uninit()));
        let mut skeleton = GannetSkelBuilder::default().open(storage).map_err(KernelError::Open)?;
        let ring_bytes = options.ring_bytes.max(1 << 17).next_power_of_two();
        let options = KernelOptions { ring_bytes, ..options };
        skeleton.maps.events.set_max_entries(ring_bytes).map_err(KernelError::Open)?;
        let lines = (options.table_bytes / LINE_BYTES).max(1);
        skeleton.maps.table_lines.set_max_entries(lines).map_err(KernelError::Open)?;
        skeleton.maps.images.set_max_entries(options.processes).map_err(KernelError::Open)?;
        let progs = &mut skeleton.progs;
        progs.on_tick.set_autoload(options.walk == Walk::Loop);
        progs.on_tick_chain.set_autoload(options.walk == Walk::Chain);
        progs.walk_chain.set_autoload(options.walk == Walk::Chain);
        progs.on_switch.set_autoload(options.off_cpu && options.walk == Walk::Loop);
        progs.on_switch_chain.set_autoload(options.off_cpu && options.walk == Walk::Chain);
        progs.walk_switch_chain.set_autoload(options.off_cpu && options.walk == Walk::Chain);
        if !options.off_cpu {
            skeleton.maps.off_cpu.set_max_entries(1).map_err(KernelError::Open)?;
        }
        skeleton.maps.procs.set_max_entries(options.processes).map_err(KernelError::Open)?;
        skeleton.maps.arms.set_max_entries(options.processes).map_err(KernelError::Open)?;
        progs.on_exec_again.set_autoload(options.twins);
        progs.on_fork_again.set_autoload(options.twins);
        progs.on_exit_again.set_autoload(options.twins);
        if let Some(constants) = skeleton.maps.rodata_data.as_deref_mut() {
            constants.twins = options.twins.into();
            constants.cgroup_hierarchy = match options.hierarchy {
                CgroupHierarchy::V2 => 0,
                CgroupHierarchy::V1Cpu => 1,
                CgroupHierarchy::V1Memory => 2,
            };
        }
        Ok(Opened { skeleton, options })
    }

    /// Reads what the ring holds now, in the kernel's order, and between its events what was mapped before them. Waits
    /// for nothing.
    pub fn read(&mut self) -> Result<Vec<Event>, KernelError> {
        let begun_ns = model::boot_time_ns();
        // No more than it can have held: where this process gets too little of a CPU, what is written meanwhile would
        // never come to an end.
        self.queue.borrow_mut().left_bytes = self.options.ring_bytes as usize;
        let result = self.ring.consume_raw();
        if result < 0 && result != ENOUGH {
            return Err(KernelError::Ring(libbpf_rs::Error::from_raw_os_error(-result)));
        }
        let events = std::mem::take(&mut self.queue.borrow_mut().events);
        let Some(mappings) = &mut self.mappings else { return Ok(events) };
        // Read behind the ring: whatever was mapped before one of its samples is there.
        mappings.read();
        let mut merged = Vec::with_capacity(events.len());
        for event in events {
            merged.extend(mappings.until(event.ktime_ns()).map(Event::Mapped));
            merged.push(event);
        }
        merged.extend(mappings.until(begun_ns).map(Event::Mapped));
        Ok(merged)
    }

    /// Executable mappings that were made and not told, because a buffer was full.
    pub fn mappings_lost(&self) -> u64 {
        self.mappings.as_ref().map_or(0, mappings::Mappings::lost)
    }

    /// Records that were no event; must stay 0.
    pub fn undecodable(&self) -> u64 {
        self.queue.borrow().undecodable
    }

    /// Become readable when the kernel side asks to be read before the reader's own time.
    pub fn wake_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let fd: RawFd = self.ring.epoll_fd();
        // SAFETY: the ring owns the descriptor and lives as long as the borrow.
        let ring = unsafe { BorrowedFd::borrow_raw(fd) };
        std::iter::once(ring).chain(self.mappings.iter().flat_map(mappings::Mappings::wake_fds))
    }

    /// What works less well on this kernel, in words.
    pub fn degraded(&self) -> &[String] {
        &self.degraded
    }

    /// Puts rules into force: whatever is executed from now on is decided by them, and so is whatever already runs,
    /// by the time this returns. The clocks are those that the rules need. On an error the former rules stay.
    pub fn set_rules(&mut self, rules: &KernelRules) -> Result<(), KernelError> {
        let generation = self.settings().generation;
        let next = generation.wrapping_add(1);
        self.fill_side(next & 1, rules)?;
        let periods: BTreeSet<u64> = rules.periods_ns.iter().copied().filter(|period| *period > 0).collect();
        let on_cpu = rules
            .periods_ns
            .iter()
            .enumerate()
            .filter(|(_, period)| **period > 0)
            .fold(0, |bits, (slot, _)| bits | 1_u64 << slot);
        let periods = if self.detached { BTreeSet::new() } else { periods };
        self.listen(!self.detached && (!periods.is_empty() || rules.off_cpu != 0));
        self.clocks.set(sampler(&self.skeleton, self.walk_kind), periods)?;
        // The scheduler's switches are many: they are looked at only if somebody wants them.
        if rules.off_cpu == 0 || self.detached {
            self.switches = None;
        } else if self.switches.is_none() {
            let what = "the blocked-time handler to sched_switch";
            let program = match self.walk_kind {
                Walk::Loop => &self.skeleton.progs.on_switch,
                Walk::Chain => &self.skeleton.progs.on_switch_chain,
            };
            let attached = program.attach_raw_tracepoint("sched_switch");
            self.switches = Some(attached.map_err(|source| KernelError::Attach { what, source })?);
        }
        let Masks {
            rules: matching,
            any_comm,
            any_cgroup,
            any_container,
            any_uid,
            any_pid,
            by_agent,
            sticky,
            at_exec,
            deny,
        } = rules.masks;
        self.change_settings(|settings| {
            settings.rates = rates(&rules.periods_ns);
            settings.all = types::want { rules: rules.all.rules, period_ns: rules.all.period_ns };
            settings.user_stacks = rules.user_stacks.into();
            settings.kernel_stacks = rules.kernel_stacks.into();
            settings.on_cpu_rules = on_cpu;
            settings.off_cpu_rules = rules.off_cpu;
            settings.live_rules = matching | rules.all.rules;
            settings.sides[(next & 1) as usize] = types::side {
                rules: matching,
                any_comm,
                any_cgroup,
                any_container,
                any_uid,
                any_pid,
                by_agent,
                sticky,
                at_exec,
                deny,
            };
        });
        // The side is whole before it comes into force.
        fence(Ordering::SeqCst);
        self.change_settings(|settings| settings.generation = next);
        self.walk_processes()
    }

    /// Makes the maps hold exactly these rules on one side.
    fn fill_side(&mut self, side: u32, rules: &KernelRules) -> Result<(), KernelError> {
        let maps = &self.skeleton.maps;
        let comms = rules.comms.iter().map(|(name, bits)| (comm_key(side, name).to_vec(), *bits));
        fill(&maps.comm_rules, "comm_rules", 4, side, comms)?;
        let cgroups = rules.cgroups.iter().map(|(path, bits)| (cgroup_key(side, path).to_vec(), *bits));
        fill(&maps.cgroup_rules, "cgroup_rules", 4, side, cgroups)?;
        let exact = rules.exact.iter().map(|(exact, bits)| (exact_key(side, *exact).to_vec(), *bits));
        fill(&maps.exact_rules, "exact_rules", 0, side, exact)
    }

    /// The rules that the kernel's trie gives for a command name, as its programs would find them.
    pub fn look_up_comm(&self, comm: &str) -> Result<u64, KernelError> {
        // A name as the kernel holds it: 16 bytes, all of them compared.
        let mut key = comm_key(self.side(), &NamePattern { text: comm.to_owned(), prefix: false });
        key[..4].copy_from_slice(&(8 * (size_of::<types::comm_key>() as u32 - 4)).to_ne_bytes());
        look_up(&self.skeleton.maps.comm_rules, "comm_rules", &key)
    }

    /// Likewise, for the path of a control group.
    pub fn look_up_cgroup(&self, path: &str) -> Result<u64, KernelError> {
        let mut key = cgroup_key(self.side(), &NamePattern { text: path.to_owned(), prefix: false });
        key[..4].copy_from_slice(&(8 * (size_of::<types::cgroup_key>() as u32 - 4)).to_ne_bytes());
        look_up(&self.skeleton.maps.cgroup_rules, "cgroup_rules", &key)
    }

    fn side(&self) -> u32 {
        self.settings().generation & 1
    }

    /// Hears of executable mappings, or does not while nobody is sampled.
    fn listen(&mut self, on: bool) {
        if !on {
            self.mappings = None;
        } else if self.listens && self.mappings.is_none() {
            match mappings::Mappings::start() {
                Ok(mappings) => self.mappings = Some(mappings),
                Err(error) => {
                    self.listens = false;
                    let words =
                        format!("mappings are not heard of as they are made, /proc is read instead: {error}");
                    tracing::warn!("{words}");
                    self.degraded.push(words);
                }
            }
        }
        let heard = self.mappings.is_some();
        self.change_settings(|settings| settings.mappings_heard = heard.into());
    }

    /// Decides anew for every process that runs, and has the ones that are wanted reported as [`Event::Found`].
    pub fn walk_processes(&mut self) -> Result<(), KernelError> {
        let Some(walk) = &self.walk else { return Ok(()) };
        let mut walk = Iter::new(walk).map_err(|error| KernelError::Walk(io::Error::other(error)))?;
        let mut nothing = [0; 64];
        while walk.read(&mut nothing).map_err(KernelError::Walk)? > 0 {}
        Ok(())
    }

    /// Samples a process for what the agent decided.
    pub fn arm(&mut self, arm: &Arm) -> Result<(), KernelError> {
        let value = types::arm {
            start_boottime: arm.key.start_boottime_ns,
            want: types::want { rules: arm.want.rules, period_ns: arm.want.period_ns },
            exec_id: arm.exec_id,
            sticky: arm.sticky.into(),
            refused: arm.refused,
            period_ns: arm.period_ns,
        };
        self.skeleton
            .maps
            .arms
            .update(&arm.key.tgid.to_ne_bytes(), bytes_of(&value), MapFlags::ANY)
            .map_err(|source| KernelError::Map { map: "arms", source })?;
        self.change_settings(|settings| settings.arms = 1);
        Ok(())
    }

    /// Takes the decision back.
    pub fn disarm(&mut self, tgid: u32) {
        // Not there is as good.
        let _ = self.skeleton.maps.arms.delete(&tgid.to_ne_bytes());
    }

    /// Takes a process out of the kernel side's table: its end was not told there.
    pub fn forget(&mut self, key: ProcessKey) {
        let tgid = key.tgid.to_ne_bytes();
        let procs = &self.skeleton.maps.procs;
        let known = procs.lookup(&tgid, MapFlags::ANY).ok().flatten();
        let start = known.as_deref().and_then(|value| value.first_chunk().copied()).map(u64::from_ne_bytes);
        if start == Some(key.start_boottime_ns) {
            let _ = procs.delete(&tgid);
        }
    }

    /// Nothing is armed by decision of the agent any more.
    pub fn disarm_all(&mut self) {
        self.change_settings(|settings| settings.arms = 0);
        let keys: Vec<_> = self.skeleton.maps.arms.keys().collect();
        for key in keys {
            let _ = self.skeleton.maps.arms.delete(&key);
        }
    }

    /// Detaches everything: no program of the agent is called any more. What it knows stays.
    pub fn detach(&mut self) -> Result<(), KernelError> {
        self.set_sampling(false);
        self.set_lifecycle(false);
        self.detached = true;
        self.links.clear();
        self.walk = None;
        self.switches = None;
        self.listen(false);
        self.clocks.set(sampler(&self.skeleton, self.walk_kind), BTreeSet::new())
    }

    /// Attaches everything again. What was known of processes is forgotten, since nobody looked meanwhile; the rules must
    /// be set again, which finds who runs.
    pub fn attach_again(&mut self) {
        for map in [&self.skeleton.maps.procs, &self.skeleton.maps.arms, &self.skeleton.maps.off_cpu] {
            let keys: Vec<_> = map.keys().collect();
            for key in keys {
                let _ = map.delete(&key);
            }
        }
        let (links, walk, degraded) = attach_handlers(&self.skeleton, &self.options);
        for reason in degraded.iter().filter(|reason| !self.degraded.contains(reason)) {
            tracing::warn!("{reason}");
        }
        self.links = links;
        self.walk = walk;
        self.detached = false;
        self.set_lifecycle(self.options.lifecycle);
        self.set_sampling(true);
    }

    /// Threads that are off the CPU now, as the samples that they would be; `value_ns` is how long they have been.
    pub fn blocked_now(&self, now_ns: u64) -> Vec<Sample> {
        let map = &self.skeleton.maps.off_cpu;
        let entries = map.keys().filter_map(|key| map.lookup(&key, MapFlags::ANY).ok().flatten());
        entries
            .filter_map(|bytes| match Event::decode(&bytes) {
                Ok(Event::Sample(sample)) => Some(sample),
                _ => None,
            })
            .map(|sample| Sample { value_ns: now_ns.saturating_sub(sample.subject.ktime_ns), ..sample })
            .collect()
    }

    /// Switches the reports of exec, fork and exit.
    pub fn set_lifecycle(&mut self, on: bool) {
        self.change_settings(|settings| settings.lifecycle = on.into());
    }

    /// Switches the sampler; the clocks go on.
    pub fn set_sampling(&mut self, on: bool) {
        self.change_settings(|settings| settings.sampling = on.into());
    }

    /// Starts clocks on CPUs that came, stops them on those that went.
    pub fn follow_cpus(&mut self) -> Result<(), KernelError> {
        if let Some(mappings) = &mut self.mappings {
            mappings.follow_cpus()?;
        }
        self.clocks.follow_cpus(sampler(&self.skeleton, self.walk_kind))
    }

    /// How many ticks there should have been, by the kernel's own count of time.
    pub fn ticks_due(&mut self) -> u64 {
        self.clocks.ticks_due()
    }

    /// The kernel side's counts.
    pub fn counters(&self) -> Result<Counters, KernelError> {
        const FIELDS: usize = size_of::<Counters>() / 8;
        let per_cpu = self
            .skeleton
            .maps
            .counters
            .lookup_percpu(&0_u32.to_ne_bytes(), MapFlags::ANY)
            .map_err(|source| KernelError::Map { map: "counters", source })?
            .unwrap_or_default();
        let mut sums = [0_u64; FIELDS];
        for cpu in per_cpu {
            for (sum, field) in sums.iter_mut().zip(cpu.as_chunks().0) {
                *sum += u64::from_ne_bytes(*field);
            }
        }
        // SAFETY: the structure is nothing but FIELDS numbers of 64 bits.
        let mut counters = unsafe { std::mem::transmute::<[u64; FIELDS], Counters>(sums) };
        [counters.exec.refused, counters.fork.refused, counters.exit.refused] = self.refused();
        Ok(counters)
    }

    /// Name, entries and capacity of the maps that can fill up.
    pub fn map_fill(&self) -> Vec<(&'static str, u64, u64)> {
        let maps = &self.skeleton.maps;
        let count = |map: &libbpf_rs::MapMut<'_>| map.keys().count() as u64;
        vec![
            ("procs", count(&maps.procs), maps.procs.max_entries().into()),
            ("arms", count(&maps.arms), maps.arms.max_entries().into()),
            ("off_cpu", count(&maps.off_cpu), maps.off_cpu.max_entries().into()),
            ("comm_rules", count(&maps.comm_rules), maps.comm_rules.max_entries().into()),
            ("cgroup_rules", count(&maps.cgroup_rules), maps.cgroup_rules.max_entries().into()),
            ("exact_rules", count(&maps.exact_rules), maps.exact_rules.max_entries().into()),
        ]
    }

    fn settings(&self) -> types::settings {
        // SAFETY: points to the mapped settings, which only this thread writes.
        self.skeleton.maps.bss_data.as_deref().map_or_else(types::settings::default, |data| unsafe {
            (&raw const data.settings).read_volatile()
        })
    }

    fn change_settings(&mut self, change: impl FnOnce(&mut types::settings)) {
        let mut settings = self.settings();
        change(&mut settings);
        if let Some(data) = self.skeleton.maps.bss_data.as_deref_mut() {
            // SAFETY: points to the mapped settings, which only this thread writes; BPF programs read single fields,
            // and each field is valid by itself.
            unsafe { (&raw mut data.settings).write_volatile(settings) };
        }
    }
}

/// Keeps what libbpf says from this level on for the error that may follow.
fn listen_to_libbpf(from: PrintLevel) {
    libbpf_rs::set_print(Some((from, |_, text| {
        tracing::debug!(target: "libbpf", "{}", text.trim_end());
        COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
    })));
}

impl Opened {
    /// Has the kernel verify the programs and make the maps.
    pub fn load(self) -> Result<Loaded, KernelError> {
        let skeleton = self.skeleton.load().map_err(|source| {
            let log = COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner);
            let lines: Vec<_> = log.lines().collect();
            KernelError::Load { source, log: lines[lines.len().saturating_sub(LOG_LINES)..].join("\n") }
        })?;
        Ok(Loaded { skeleton, options: self.options })
    }

    /// For tests: [`Self::load`], and how many instructions the verifier looked at for each program that was loaded, by
    /// name. Kernels before 5.16 tell it nowhere but in their verifier's log ([`ProgramCost::verified_instructions`] is 0
    /// there).
    #[doc(hidden)]
    pub fn load_counted(mut self) -> Result<(Loaded, BTreeMap<String, u32>), KernelError> {
        for mut program in self.skeleton.open_object_mut().progs_mut() {
            program.set_log_level(VERIFIER_STATISTICS);
        }
        listen_to_libbpf(PrintLevel::Debug);
        let loaded = self.load();
        listen_to_libbpf(PrintLevel::Warn);
        let loaded = loaded?;
        let log = COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner);
        let mut program = "";
        let mut verified = BTreeMap::new();
        for line in log.lines() {
            if let Some((_, named)) =
                line.split_once("prog '").filter(|_| line.contains("BEGIN PROG LOAD LOG"))
            {
                program = named.split('\'').next().unwrap_or_default();
            } else if let Some(told) = line.strip_prefix("processed ") {
                let number = told.split(' ').next().and_then(|number| number.parse().ok());
                verified.extend(number.map(|number| (program.to_owned(), number)));
            }
        }
        Ok((loaded, verified))
    }
}

impl Loaded {
    /// Attaches the process handlers and opens the ring. Nothing is reported before it is switched on.
    pub fn attach(self) -> Result<Kernel, KernelError> {
        let Self { skeleton, options } = self;
        let ring_bytes = options.ring_bytes;
        if options.walk == Walk::Chain {
            let next = skeleton.progs.walk_chain.as_fd().as_raw_fd();
            skeleton
                .maps
                .chain
                .update(&0_u32.to_ne_bytes(), &next.to_ne_bytes(), MapFlags::ANY)
                .map_err(|source| KernelError::Map { map: "chain", source })?;
        }
        if options.walk == Walk::Chain && options.off_cpu {
            let next = skeleton.progs.walk_switch_chain.as_fd().as_raw_fd();
            skeleton
                .maps
                .switch_chain
                .update(&0_u32.to_ne_bytes(), &next.to_ne_bytes(), MapFlags::ANY)
                .map_err(|source| KernelError::Map { map: "switch_chain", source })?;
        }
        let (links, walk, degraded) = attach_handlers(&skeleton, &options);
        let queue = Rc::new(RefCell::new(Queue::default()));
        let writer = Rc::clone(&queue);
        let mut builder = RingBufferBuilder::new();
        builder
            .add(&skeleton.maps.events, move |bytes| writer.borrow_mut().take(bytes))
            .map_err(KernelError::Ring)?;
        let ring = builder.build().map_err(KernelError::Ring)?;
        let shared = unwinding::SharedTables {
            lines: unwinding::Shared::of(&skeleton.maps.table_lines, "table_lines")?,
            rules: unwinding::Shared::of(&skeleton.maps.unwind_rules, "unwind_rules")?,
        };
        let mut kernel = Kernel {
            shared,
            walk_kind: options.walk,
            clocks: clock::Clocks::default(),
            mappings: None,
            listens: !options.without.contains(&"mappings"),
            links,
            options,
            detached: false,
            switches: None,
            walk,
            ring,
            queue,
            skeleton,
            degraded,
        };
        kernel.change_settings(|settings| {
            // An eighth of the ring is for lifecycle events; the reader is called at a quarter.
            settings.ring_sample_limit = u64::from(ring_bytes / 8 * 7);
            settings.ring_wake = u64::from(ring_bytes / 4);
            settings.report_rate = options.report_rate;
            // Shorter than this is a handover, not a wait.
            settings.off_cpu_min_ns = 1_000;
            settings.off_cpu_rate = OFF_CPU_RATE;
            settings.user_stacks = 1;
            settings.kernel_stacks = 1;
        });
        Ok(kernel)
    }
}

/// Attaches what follows processes. What cannot be attached is said.
fn attach_handlers(
    skeleton: &GannetSkel<'static>,
    options: &KernelOptions,
) -> (Vec<Link>, Option<Link>, Vec<String>) {
    let mut degraded = Vec::new();
    let mut links = Vec::new();
    let progs = &skeleton.progs;
    // The kernel calls them in this order, unless it refuses the first.
    let handlers: [(&ProgramMut<'_>, &'static str, bool); 7] = [
        (&progs.on_exec, "sched_process_exec", !options.without.contains(&"on_exec")),
        (&progs.on_fork, "sched_process_fork", !options.without.contains(&"on_fork")),
        (&progs.on_exit, "sched_process_exit", !options.without.contains(&"on_exit")),
        (&progs.on_attach, "cgroup_attach_task", true),
        (&progs.on_exec_again, "sched_process_exec", options.twins),
        (&progs.on_fork_again, "sched_process_fork", options.twins),
        (&progs.on_exit_again, "sched_process_exit", options.twins),
    ];
    if !options.lifecycle {
        degraded.push(
            "lifecycle events are switched off (--lifecycle): processes are looked for every two seconds, and short ones \
             are missed"
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
            Ok(link) => links.push(link),
            // Of twins, said once.
            Err(error) => {
                let words = format!("no {tracepoint} tracepoint: {error}");
                if !degraded.contains(&words) {
                    degraded.push(words);
                }
            }
        }
    }
    let walk = match progs.each_task.attach() {
        Ok(link) => Some(link),
        Err(error) => {
            degraded.push(format!("no walk over running processes: {error}"));
            None
        }
    };
    (links, walk, degraded)
}

/// The program that the clocks call.
fn sampler<'a>(skeleton: &'a GannetSkel<'static>, walk: Walk) -> &'a ProgramMut<'static> {
    match walk {
        Walk::Loop => &skeleton.progs.on_tick,
        Walk::Chain => &skeleton.progs.on_tick_chain,
    }
}

/// The rates in use, fastest first, each with the rules that ask for it.
fn rates(periods_ns: &[u64; MAX_RULES]) -> [types::want; MAX_RULES] {
    let mut by_period: BTreeMap<u64, u64> = BTreeMap::new();
    for (slot, period) in periods_ns.iter().enumerate().filter(|(_, period)| **period > 0) {
        *by_period.entry(*period).or_default() |= 1 << slot;
    }
    let mut rates = [types::want::default(); MAX_RULES];
    for (rate, (period_ns, rules)) in rates.iter_mut().zip(by_period) {
        *rate = types::want { rules, period_ns };
    }
    rates
}

/// Makes one side of a map hold exactly these entries. `at` is where the side stands in a key.
fn fill(
    map: &libbpf_rs::MapMut<'_>,
    name: &'static str,
    at: usize,
    side: u32,
    entries: impl Iterator<Item = (Vec<u8>, u64)>,
) -> Result<(), KernelError> {
    let failed = |source| KernelError::Map { map: name, source };
    let old: Vec<_> = map.keys().filter(|key| key.get(at..at + 4) == Some(&side.to_ne_bytes())).collect();
    for key in old {
        map.delete(&key).map_err(failed)?;
    }
    for (key, rules) in entries {
        map.update(&key, &rules.to_ne_bytes(), MapFlags::ANY).map_err(failed)?;
    }
    Ok(())
}

fn look_up(map: &libbpf_rs::MapMut<'_>, name: &'static str, key: &[u8]) -> Result<u64, KernelError> {
    let value = map.lookup(key, MapFlags::ANY).map_err(|source| KernelError::Map { map: name, source })?;
    Ok(value.and_then(|bytes| Some(u64::from_ne_bytes(*bytes.first_chunk()?))).unwrap_or(0))
}

/// The key of a name in the trie: length in bits, side, text. An exact name includes the NUL behind it.
fn trie_key<const KEY: usize>(side: u32, pattern: &NamePattern) -> [u8; KEY] {
    let mut key = [0; KEY];
    let text = &pattern.text.as_bytes()[..pattern.text.len().min(KEY - 9)];
    let bytes = 4 + text.len() + usize::from(!pattern.prefix);
    key[..4].copy_from_slice(&((bytes * 8) as u32).to_ne_bytes());
    key[4..8].copy_from_slice(&side.to_ne_bytes());
    key[8..8 + text.len()].copy_from_slice(text);
    key
}

fn comm_key(side: u32, pattern: &NamePattern) -> [u8; size_of::<types::comm_key>()] {
    trie_key(side, pattern)
}

fn cgroup_key(side: u32, pattern: &NamePattern) -> [u8; size_of::<types::cgroup_key>()] {
    trie_key(side, pattern)
}

fn exact_key(side: u32, exact: Exact) -> [u8; size_of::<types::exact_key>()] {
    // As `enum exact_kind` of gannet.h.
    let (kind, number) = match exact {
        Exact::Container(id) => (1_u32, id),
        Exact::Pid(pid) => (2, pid.into()),
        Exact::Uid(uid) => (3, uid.into()),
    };
    let mut key = [0; size_of::<types::exact_key>()];
    key[..4].copy_from_slice(&side.to_ne_bytes());
    key[4..8].copy_from_slice(&kind.to_ne_bytes());
    key[8..].copy_from_slice(&number.to_ne_bytes());
    key
}

/// The structures that the agent writes into maps.
trait MapValue: Copy {}
impl MapValue for types::arm {}
// No padding: every byte belongs to a field.
// The agent reads the start time from the head of what BPF programs wrote.
const _: () = assert!(std::mem::offset_of!(types::proc, start_boottime) == 0);
const _: () = assert!(size_of::<types::arm>() == 8 + 16 + 4 + 4 + 8 + 8);

fn bytes_of<T: MapValue>(value: &T) -> &[u8] {
    // SAFETY: `MapValue` types are integers without padding, as asserted above.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_ends_when_it_has_taken_a_whole_ring() {
        let mut queue = Queue { left_bytes: 100, ..Queue::default() };
        assert_eq!(
            (queue.take(&[0xff; 60]), queue.take(&[0xff; 60]), queue.take(&[0xff; 60])),
            (0, ENOUGH, ENOUGH)
        );
        assert_eq!(queue.undecodable, 3);
    }

    #[test]
    fn an_exact_name_is_a_longer_key_than_its_prefix() {
        let name = |text: &str, prefix| comm_key(1, &NamePattern { text: text.into(), prefix });
        let (exact, prefix) = (name("node", false), name("node", true));
        assert_eq!(exact[..4], 72_u32.to_ne_bytes());
        assert_eq!(prefix[..4], 64_u32.to_ne_bytes());
        assert_eq!(exact[4..], prefix[4..]);
        assert_eq!(&exact[8..13], b"node\0");
        assert_eq!(name(&"a".repeat(15), false)[..4], 160_u32.to_ne_bytes());
    }
}
