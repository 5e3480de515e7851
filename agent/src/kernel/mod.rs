//! The agent's interface to the kernel: the BPF programs, their maps, the clocks, and the ring buffer through which they
//! report. It is mechanism only: other modules decide what to sample. One thread owns it.
//!
//! Dropping a [`Kernel`] stops the clocks, then detaches the programs, then frees the maps.

mod blocked;
mod clock;
mod cost;
mod counters;
mod entries;
mod error;
mod event;
#[doc(hidden)]
pub mod fuzz;
mod hotplug;
mod load;
mod map_fill;
mod mappings;
mod options;
mod ring;
mod rule_maps;
mod symbol_names;
mod unwinding;

use std::{
    collections::BTreeSet,
    io::{self, Read as _},
    os::fd::BorrowedFd,
};

use self::{clock::LastTicks, entries::EntryMap};
use gannet_bpf::{GannetSkel, types};
use libbpf_rs::{Iter, Link, MapCore as _, MapFlags, ProgramMut};

pub use self::{
    clock::Ticks,
    cost::ProgramCost,
    counters::{Counters, LifecycleCounts, lifecycle_lost},
    entries::RefusedEntries,
    error::KernelError,
    event::Event,
    load::{LoadedKernel, OpenedKernel},
    map_fill::MapFill,
    options::{KernelOptions, UnwindDriver, handlers_are_preemptible},
    rule_maps::{Exact, KernelRules, NamePattern, RuleMasks, Want},
    unwinding::{Block, EmptyRange, KernelImage, KernelMapping, KernelTable, UnwindMaps, blocks},
};
pub(crate) use self::{
    counters::{counters_by_name, lifecycle_counts, lifecycle_skipped},
    error::Shortage,
    options::default_ring_bytes,
    ring::Arrived,
    rule_maps::{MAX_CGROUP_PATH, MAX_COMM, MAX_RULES},
    unwinding::{MAX_TABLES, SENT_RAW},
};
use crate::model::{self, ProcessKey};

/// The kernel side at work.
pub struct Kernel {
    // Fields are dropped in this order.
    clocks: clock::Clocks,
    mappings: Option<mappings::Mappings>,
    /// `None` if the kernel refuses device events.
    hotplug: Option<hotplug::Hotplug>,
    /// Whether mappings are followed while rules sample; false after perf refused it.
    follows_mappings: bool,
    links: Vec<Link>,
    /// The handler of context switches, while a rule asks for blocked time.
    switches: Option<Link>,
    /// The map in which that keeps raw stacks; `None` without such a rule.
    raw_stacks: Option<blocked::RawStacks>,
    /// The iterator over all tasks.
    task_iterator: Option<Link>,
    ring: ring::EventRing,
    shared: unwinding::SharedTables,
    entries: entries::Entries,
    skeleton: GannetSkel<'static>,
    degraded: Vec<String>,
    features: Vec<&'static str>,
    options: KernelOptions,
    /// The kill switch: no program is attached, and rules attach none.
    detached: bool,
}

/// The agent's decision to sample one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SamplingMark {
    /// The marked process.
    pub key: ProcessKey,
    /// The image that the decision is for; ignored if sticky.
    pub exec_id: u32,
    /// Whether the decision holds over `execve` and for children.
    pub sticky: bool,
    /// The rules to sample it for.
    pub want: Want,
    /// Rules that no longer hold for it, though the kernel side matched them.
    pub refused: u64,
    /// The time between two ticks of the remaining rules.
    pub period_ns: u64,
}

impl Kernel {
    /// Reads the pending events in the kernel's order, and the mappings made before each of them. Does not block.
    pub fn read(&mut self) -> Result<Vec<Event>, KernelError> {
        let begun_ns = model::boot_time_ns();
        let events = self.ring.read()?;
        let Some(mappings) = &mut self.mappings else { return Ok(events) };
        // After the ring buffer: every mapping made before one of its samples is in the perf buffers by now.
        mappings.read();
        let mut merged = Vec::with_capacity(events.len());
        for event in events {
            merged.extend(mappings.until(event.ktime_ns()).map(Event::Mapping));
            merged.push(event);
        }
        merged.extend(mappings.until(begun_ns).map(Event::Mapping));
        Ok(merged)
    }

    /// Returns the number of executable mappings that were lost because a perf buffer was full.
    pub(crate) fn mappings_lost(&self) -> u64 {
        self.mappings.as_ref().map_or(0, mappings::Mappings::lost)
    }

    /// Returns the number of records that were no event. Anything but 0 means that agent and BPF programs differ.
    pub(crate) fn undecodable(&self) -> u64 {
        self.ring.undecodable()
    }

    /// Returns how far the samples of each CPU were read.
    pub(crate) fn arrived(&self) -> &Arrived {
        self.ring.arrived()
    }

    /// Returns descriptors that are readable when the kernel side asks for a read before the reader's own time.
    pub(crate) fn wake_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let mappings = self.mappings.iter().flat_map(mappings::Mappings::wake_fds);
        std::iter::once(self.ring.wake_fd()).chain(mappings)
    }

    /// Returns what this kernel lacks, human-readable.
    pub fn degraded(&self) -> &[String] {
        &self.degraded
    }

    /// Returns the optional abilities whose programs this kernel loaded and attached.
    pub fn features(&self) -> &[&'static str] {
        &self.features
    }

    /// Starts the clocks and handlers that the rules need, and stops the others.
    fn start_sources(&mut self, rules: &KernelRules) -> Result<(), KernelError> {
        let periods = if self.detached { BTreeSet::new() } else { rules.periods() };
        self.follow_mappings(!self.detached && (!periods.is_empty() || rules.off_cpu != 0));
        self.set_clocks(periods)?;
        // Context switches are frequent: their handler is attached only while a rule asks for blocked time.
        if rules.off_cpu == 0 || self.detached {
            self.switches = None;
            self.keep_raw_stacks(false);
        } else if self.switches.is_none() {
            self.keep_raw_stacks(true);
            self.switches = Some(load::attach_switches(&self.skeleton, &self.options)?);
        }
        Ok(())
    }

    /// Follows executable mappings through perf events, or stops while no process is sampled.
    fn follow_mappings(&mut self, on: bool) {
        if !on {
            self.mappings = None;
        } else if self.follows_mappings && self.mappings.is_none() {
            match mappings::Mappings::start(self.options.symbols) {
                Ok(mappings) => self.mappings = Some(mappings),
                Err(error) => {
                    self.follows_mappings = false;
                    let reason =
                        format!("cannot follow mappings as they are made, reading /proc instead: {error}");
                    tracing::warn!("{reason}");
                    self.degraded.push(reason);
                }
            }
        }
        let followed = self.mappings.is_some();
        self.change_settings(|settings| settings.mappings_reported = followed.into());
    }

    /// Matches every running process against the rules again, and reports matching ones as [`Event::Running`].
    pub fn scan_processes(&mut self) -> Result<(), KernelError> {
        let Some(iterator) = &self.task_iterator else { return Ok(()) };
        let mut scan = Iter::new(iterator).map_err(|error| KernelError::Scan(io::Error::other(error)))?;
        let mut nothing = [0; 64];
        while scan.read(&mut nothing).map_err(KernelError::Scan)? > 0 {}
        Ok(())
    }

    /// Marks a process for sampling, now or when the map has room for it.
    pub fn mark(&mut self, mark: &SamplingMark) {
        let value = types::mark {
            start_boottime: mark.key.start_boottime_ns,
            want: mark.want.into(),
            exec_id: mark.exec_id,
            sticky: mark.sticky.into(),
            refused: mark.refused,
            period_ns: mark.period_ns,
        };
        self.set_entry(EntryMap::Marks, mark.key, bytes_of(&value));
    }

    /// Removes the mark of a process, if it has one.
    pub(crate) fn unmark(&mut self, tgid: u32) {
        self.remove_entry(EntryMap::Marks, tgid);
    }

    /// Removes a process from the kernel side's table after its exit event was lost.
    pub(crate) fn forget(&mut self, key: ProcessKey) {
        let tgid = key.tgid.to_ne_bytes();
        let procs = &self.skeleton.maps.procs;
        let known = procs.lookup(&tgid, MapFlags::ANY).ok().flatten();
        let start = known.as_deref().and_then(|value| value.first_chunk().copied()).map(u64::from_ne_bytes);
        if start == Some(key.start_boottime_ns) {
            let _ = procs.delete(&tgid);
        }
    }

    /// Detaches all programs, so that the kernel calls none of them. The maps stay.
    pub fn detach(&mut self) -> Result<(), KernelError> {
        self.set_sampling(false);
        self.set_lifecycle(false);
        self.detached = true;
        self.links.clear();
        self.task_iterator = None;
        self.switches = None;
        self.keep_raw_stacks(false);
        self.follow_mappings(false);
        self.set_clocks(BTreeSet::new())
    }

    /// Attaches all programs again after [`detach`](Self::detach). Forgets all processes, because their changes were not
    /// followed meanwhile. The caller sets the rules again, which scans the running processes.
    pub(crate) fn attach_again(&mut self) {
        for map in [&self.skeleton.maps.procs, &self.skeleton.maps.marks, &self.skeleton.maps.off_cpu] {
            clear(map);
        }
        self.forget_refused(EntryMap::Marks);
        let load::Handlers { links, task_iterator, degraded, .. } =
            load::attach_handlers(&self.skeleton, &self.options);
        for reason in degraded.iter().filter(|reason| !self.degraded.contains(reason)) {
            tracing::warn!("{reason}");
        }
        self.links = links;
        self.task_iterator = task_iterator;
        self.detached = false;
        self.set_lifecycle(self.options.lifecycle);
        self.set_sampling(true);
    }

    /// Switches the reports of exec, fork and exit.
    pub fn set_lifecycle(&mut self, on: bool) {
        self.change_settings(|settings| settings.lifecycle = on.into());
    }

    /// Switches the sampler; the clocks keep running.
    pub fn set_sampling(&mut self, on: bool) {
        self.change_settings(|settings| settings.sampling = on.into());
    }

    /// Starts clocks on CPUs that came online, stops them on CPUs that went offline.
    pub fn follow_cpus(&mut self) -> Result<(), KernelError> {
        // First those that went off and on since: their perf events are silent.
        let went_offline = self.hotplug.as_mut().map(hotplug::Hotplug::read);
        if let Some(went_offline) = &went_offline {
            self.clocks.close(&LastTicks(&self.skeleton.maps.clocks), went_offline);
        }
        let last_ticks = LastTicks(&self.skeleton.maps.clocks);
        let clocks =
            self.clocks.follow_cpus(sampler(&self.skeleton, self.options.unwind_driver), &last_ticks);
        // Behind the clocks, and whether these failed or not: neither may keep a CPU from the other.
        let mappings = self.mappings.as_mut().map_or(Ok(()), |mappings| {
            if let Some(went_offline) = &went_offline {
                mappings.close(went_offline);
            }
            mappings.follow_cpus()
        });
        clocks.and(mappings)
    }

    fn set_clocks(&mut self, periods_ns: BTreeSet<u64>) -> Result<(), KernelError> {
        let program = sampler(&self.skeleton, self.options.unwind_driver);
        self.clocks.set(program, &LastTicks(&self.skeleton.maps.clocks), periods_ns)
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

/// Returns the program that the clocks call.
fn sampler<'a>(skeleton: &'a GannetSkel<'static>, driver: UnwindDriver) -> &'a ProgramMut<'static> {
    match driver {
        UnwindDriver::Loop => &skeleton.progs.on_tick,
        UnwindDriver::TailCalls => &skeleton.progs.on_tick_chain,
    }
}

/// Deletes all entries of a map.
fn clear(map: &libbpf_rs::MapMut<'_>) {
    let keys: Vec<_> = map.keys().collect();
    for key in keys {
        let _ = map.delete(&key);
    }
}

/// The structures that the agent writes into maps.
trait MapValue: Copy {}
impl MapValue for types::mark {}
// No padding: every byte belongs to a field.
const _: () = assert!(size_of::<types::mark>() == 8 + 16 + 4 + 4 + 8 + 8);
// `Kernel::forget` reads the start time from the head of an entry of `procs`.
const _: () = assert!(std::mem::offset_of!(types::proc, start_boottime) == 0);

fn bytes_of<T: MapValue>(value: &T) -> &[u8] {
    // SAFETY: `MapValue` types are integers without padding, as asserted above.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}
