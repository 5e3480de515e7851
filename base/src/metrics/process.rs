//! Metrics of the program's own process, under the names that Prometheus clients of all languages use.

use std::{fmt, time::Duration};

use procfs::process::{LimitValue, Process};
use prometheus_client::{collector::Collector, encoding::DescriptorEncoder, registry::Registry};

use super::Snapshot;

crate::metrics! {
    pub PROCESS_METRICS;
    CPU = counter("process_cpu_seconds_total", "CPU time of all threads of this process, user and system");
    RESIDENT = gauge("process_resident_memory_bytes", "Resident memory of this process");
    VIRTUAL = gauge("process_virtual_memory_bytes", "Virtual memory of this process");
    THREADS = gauge("process_threads", "Threads of this process");
    OPEN_FDS = gauge("process_open_fds", "File descriptors that this process has open");
    MAX_FDS = gauge("process_max_fds", "File descriptors that this process may have open");
    START_TIME = gauge("process_start_time_seconds", "Start of this process, in seconds since 1970");
}

/// Resources that this process uses. Zero stands for values that `/proc` does not show.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProcessUsage {
    /// CPU time of all threads, to the nanosecond.
    pub cpu: Duration,
    /// Resident memory of the process.
    pub resident_bytes: u64,
    /// Virtual memory of the process.
    pub virtual_bytes: u64,
    /// Threads of the process.
    pub threads: u64,
    /// Open file descriptors.
    pub open_fds: u64,
    /// Limit of open file descriptors.
    pub max_fds: u64,
    /// Start in seconds since 1970.
    pub start_seconds: f64,
}

impl ProcessUsage {
    /// Reads the values from the clock and from `/proc/self`.
    pub fn read() -> Self {
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let mut usage = Self { cpu: Duration::try_from(cpu).unwrap_or_default(), ..Self::default() };
        let Ok(process) = Process::myself() else { return usage };
        if let Ok(stat) = process.stat() {
            usage.resident_bytes = stat.rss * procfs::page_size();
            usage.virtual_bytes = stat.vsize;
            usage.threads = stat.num_threads.unsigned_abs();
            let since_boot = stat.starttime as f64 / procfs::ticks_per_second().max(1) as f64;
            usage.start_seconds = procfs::boot_time_secs().map_or(0.0, |boot| boot as f64 + since_boot);
        }
        usage.open_fds = process.fd_count().map_or(0, |count| count as u64);
        usage.max_fds = match process.limits().map(|limits| limits.max_open_files.soft_limit) {
            Ok(LimitValue::Value(limit)) => limit,
            Ok(LimitValue::Unlimited) => u64::MAX,
            Err(_) => 0,
        };
        usage
    }
}

/// Registers the metrics of this process; each scrape reads them.
pub fn register_process(registry: &mut Registry) {
    registry.register_collector(Box::new(ProcessCollector));
}

#[derive(Debug)]
struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let ProcessUsage { cpu, resident_bytes, virtual_bytes, threads, open_fds, max_fds, start_seconds } =
            ProcessUsage::read();
        let mut snapshot = Snapshot::default();
        snapshot.add(&CPU, cpu.as_secs_f64());
        snapshot.add(&RESIDENT, resident_bytes);
        snapshot.add(&VIRTUAL, virtual_bytes);
        snapshot.add(&THREADS, threads);
        snapshot.add(&OPEN_FDS, open_fds);
        snapshot.add(&MAX_FDS, max_fds);
        snapshot.add(&START_TIME, start_seconds);
        snapshot.encode(encoder)
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::metrics::{problems, text, undeclared};

    #[test]
    fn the_process_shows_its_own_use() {
        let usage = ProcessUsage::read();
        assert!(usage.cpu > Duration::ZERO && usage.threads > 0 && usage.open_fds > 2, "{usage:?}");
        assert!(usage.resident_bytes > 1 << 20 && usage.virtual_bytes > usage.resident_bytes, "{usage:?}");
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
        assert!((now - 600.0..now + 2.0).contains(&usage.start_seconds), "{usage:?} at {now}");
    }

    #[test]
    fn a_scrape_shows_each_declared_metric_of_the_process() {
        let mut registry = Registry::default();
        register_process(&mut registry);
        let text = text(&registry);
        assert_eq!(undeclared(&text, &[PROCESS_METRICS]), Vec::<String>::new());
        assert_eq!(problems(PROCESS_METRICS), Vec::<String>::new());
        assert_eq!(text.lines().filter(|line| !line.starts_with('#')).count(), PROCESS_METRICS.len());
    }
}
