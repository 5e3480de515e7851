//! The counters of the BPF programs, and how full their maps are.

use gannet_bpf::types;
use libbpf_rs::{MapCore as _, MapFlags};

use super::{Kernel, KernelError};

/// Counts of the kernel side since it was loaded. gannet.h describes the fields.
pub type Counters = types::counters;
/// Counts of one kind of lifecycle event: seen = filtered + sent + lost to the rate limit + lost to a full ring buffer. Skipped
/// events are not seen.
pub type LifecycleCounts = types::lifecycle_counts;

/// Returns the counts of each kind of lifecycle event, with its name.
pub(crate) fn lifecycle_counts(counters: &Counters) -> [(&'static str, &LifecycleCounts); 4] {
    [
        ("exec", &counters.exec),
        ("fork", &counters.fork),
        ("exit", &counters.exit),
        ("running", &counters.running),
    ]
}

/// Returns the lifecycle events that a rule asked for and the agent did not receive.
pub fn lifecycle_lost(counters: &Counters) -> u64 {
    lifecycle_counts(counters).iter().map(|(_, counts)| counts.lost_rate + counts.lost_ring_full).sum()
}

/// Returns an upper bound of the lifecycle events for which the kernel skipped all handlers. Ends of single threads count too.
pub(crate) fn lifecycle_skipped(counters: &Counters) -> u64 {
    lifecycle_counts(counters).iter().map(|(_, counts)| counts.skipped).sum()
}

/// The fields of [`Counters`], all of 64 bits.
const FIELDS: usize = size_of::<Counters>() / 8;

fn from_fields(fields: &[u64; FIELDS]) -> Counters {
    // SAFETY: the structure is nothing but FIELDS numbers of 64 bits.
    unsafe { std::mem::transmute::<[u64; FIELDS], Counters>(*fields) }
}

impl Kernel {
    /// Returns the counters, summed over all CPUs.
    pub fn counters(&self) -> Result<Counters, KernelError> {
        let mut sums = [0_u64; FIELDS];
        for cpu in self.counter_fields()? {
            for (sum, field) in sums.iter_mut().zip(cpu) {
                *sum = sum.wrapping_add(field);
            }
        }
        let mut counters = from_fields(&sums);
        [counters.exec.skipped, counters.fork.skipped, counters.exit.skipped] = self.skipped();
        Ok(counters)
    }

    /// Returns the counters of each possible CPU, without the skipped events. They change while they are read: two fields may
    /// be of different moments.
    pub(crate) fn cpu_counters(&self) -> Result<Vec<Counters>, KernelError> {
        Ok(self.counter_fields()?.iter().map(from_fields).collect())
    }

    fn counter_fields(&self) -> Result<Vec<[u64; FIELDS]>, KernelError> {
        let map = &self.skeleton.maps.counters;
        let per_cpu = map
            .lookup_percpu(&0_u32.to_ne_bytes(), MapFlags::ANY)
            .map_err(|source| KernelError::Map { map: "counters", source })?
            .unwrap_or_default();
        let fields = |cpu: &Vec<u8>| {
            let mut fields = [0; FIELDS];
            for (field, bytes) in fields.iter_mut().zip(cpu.as_chunks().0) {
                *field = u64::from_ne_bytes(*bytes);
            }
            fields
        };
        Ok(per_cpu.iter().map(fields).collect())
    }

    /// Returns name, entries and capacity of the maps that can fill up.
    pub(crate) fn map_fill(&self) -> Vec<(&'static str, u64, u64)> {
        let maps = &self.skeleton.maps;
        [
            ("procs", &maps.procs),
            ("marks", &maps.marks),
            ("off_cpu", &maps.off_cpu),
            ("comm_rules", &maps.comm_rules),
            ("cgroup_rules", &maps.cgroup_rules),
            ("exact_rules", &maps.exact_rules),
        ]
        .map(|(name, map)| (name, map.keys().count() as u64, map.max_entries().into()))
        .into()
    }
}
