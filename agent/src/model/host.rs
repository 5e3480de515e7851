//! The CPUs of the host, and how long each was idle.

use std::{fs, io};

/// The file that lists the online CPUs.
pub(crate) const ONLINE_CPUS: &str = "/sys/devices/system/cpu/online";

/// Returns the numbers of the online CPUs, ascending.
pub fn online_cpus() -> io::Result<Vec<u32>> {
    let text = fs::read_to_string(ONLINE_CPUS)?;
    parse_cpu_list(&text).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("`{}` is no list of CPUs", text.trim()))
    })
}

/// Parses a list of CPUs such as `0-3,8,10-11`.
fn parse_cpu_list(text: &str) -> Option<Vec<u32>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        // The kernel's own limit is 8192; a wrong line must not become a long loop.
        if first > last || last > 0xffff {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// Returns the idle time of each CPU since the host booted, in nanoseconds, by CPU number; 0 for a CPU that is offline.
pub(crate) fn idle_ns() -> io::Result<Vec<u64>> {
    let ns_per_tick = 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1);
    Ok(parse_idle(&fs::read_to_string("/proc/stat")?)
        .iter()
        .map(|ticks| ticks.saturating_mul(ns_per_tick))
        .collect())
}

/// Parses the text of `/proc/stat`: the clock ticks that each CPU was idle, or idle and waiting for a disk.
fn parse_idle(text: &str) -> Vec<u64> {
    let mut idle = Vec::new();
    for line in text.lines() {
        let mut fields = line.split_ascii_whitespace();
        let cpu = fields.next().and_then(|name| name.strip_prefix("cpu")?.parse::<u16>().ok());
        let Some(cpu) = cpu.map(usize::from) else { continue };
        if idle.len() <= cpu {
            idle.resize(cpu + 1, 0);
        }
        idle[cpu] =
            fields.skip(3).take(2).filter_map(|field| field.parse::<u64>().ok()).fold(0, u64::saturating_add);
    }
    idle
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_idle_time_of_each_cpu_is_read() {
        let text = "cpu  1 2 3 4 5 6\ncpu0 10 20 30 40 5 60 7\ncpu2 1 1 1 9 1\nintr 5 5 5 5 5\n";
        assert_eq!(parse_idle(text), [45, 0, 10]);
        assert_eq!(parse_idle("cpux 1\ncpu99999999 1 1 1 1 1\ncpu0"), [0]);
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpu_list("0\n"), Some(vec![0]));
        assert_eq!(parse_cpu_list("0-2,5,7-8\n"), Some(vec![0, 1, 2, 5, 7, 8]));
        for wrong in ["", "a", "3-1", "0-", "0,,1", "0-99999999"] {
            assert_eq!(parse_cpu_list(wrong), None, "{wrong}");
        }
    }
}
