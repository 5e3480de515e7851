//! The counters of the BPF programs.

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

/// Returns each counter with the name of its field, and counts that are no sums of the past last.
pub(crate) fn counters_by_name(counters: &Counters) -> (Vec<(String, u64)>, u64) {
    let Counters {
        ticks,
        idle_ticks,
        ticks_late,
        ticks_uncalled,
        ticks_throttled,
        taken,
        open,
        sent,
        lost_ring_full,
        lost_off_cpu_full,
        lost_off_cpu_rate,
        lost_chain,
        raw,
        procs_full,
        cgroup_too_deep,
        functions_unsent,
        labels_unsent,
        labels_cut,
        off_cpu_raw_full,
        exec: _,
        fork: _,
        exit: _,
        running: _,
    } = *counters;
    let single = [
        ("ticks", ticks),
        ("idle_ticks", idle_ticks),
        ("ticks_late", ticks_late),
        ("ticks_uncalled", ticks_uncalled),
        ("ticks_throttled", ticks_throttled),
        ("taken", taken),
        ("sent", sent),
        ("lost_ring_full", lost_ring_full),
        ("lost_off_cpu_full", lost_off_cpu_full),
        ("lost_off_cpu_rate", lost_off_cpu_rate),
        ("lost_chain", lost_chain),
        ("raw", raw),
        ("procs_full", procs_full),
        ("cgroup_too_deep", cgroup_too_deep),
        ("functions_unsent", functions_unsent),
        ("labels_unsent", labels_unsent),
        ("labels_cut", labels_cut),
        ("off_cpu_raw_full", off_cpu_raw_full),
    ];
    let mut all: Vec<_> = single.map(|(name, count)| (name.to_owned(), count)).into();
    for (kind, counts) in lifecycle_counts(counters) {
        let LifecycleCounts { seen, filtered, sent, lost_rate, lost_ring_full, skipped } = *counts;
        for (name, count) in [
            ("seen", seen),
            ("filtered", filtered),
            ("sent", sent),
            ("lost_rate", lost_rate),
            ("lost_ring_full", lost_ring_full),
            ("skipped", skipped),
        ] {
            all.push((format!("{kind}_{name}"), count));
        }
    }
    (all, open)
}

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
        [counters.exec.skipped, counters.fork.skipped, counters.exit.skipped, counters.running.skipped] =
            self.skipped();
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
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that a counter that is added to the BPF programs gets a metric.
    #[test]
    fn each_counter_of_the_programs_has_a_name() {
        let fields: [u64; FIELDS] = std::array::from_fn(|index| 1000 + index as u64);
        let (mut counters, open) = counters_by_name(&from_fields(&fields));
        let mut values: Vec<u64> = counters.iter().map(|(_, count)| *count).chain([open]).collect();
        values.sort_unstable();
        assert_eq!(values, fields);
        counters.sort_unstable();
        counters.dedup_by(|one, other| one.0 == other.0);
        assert_eq!(counters.len(), FIELDS - 1, "each has a name of its own");
    }
}
