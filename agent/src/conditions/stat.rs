//! CPU use and throttling of a control group, of both versions.

use std::{fs, io, path::Path, time::Duration};

/// Totals of a control group since it was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct GroupCpuStat {
    /// CPU time of all processes in the group.
    cpu: Duration,
    /// Enforcement periods in which the group ran.
    periods: u64,
    /// Those of them in which the kernel throttled the group.
    throttled: u64,
}

impl GroupCpuStat {
    /// Reads `cpu.stat` in the group's directory. On version 1 the CPU time comes from `cpuacct.usage` in the directory
    /// `cpuacct`.
    pub(super) fn read(cpu: &Path, cpuacct: Option<&Path>) -> io::Result<Self> {
        let mut stat = parse(&fs::read_to_string(cpu.join("cpu.stat"))?);
        if let Some(cpuacct) = cpuacct {
            let text = fs::read_to_string(cpuacct.join("cpuacct.usage"))?;
            stat.cpu = Duration::from_nanos(text.trim().parse().unwrap_or(0));
        }
        Ok(stat)
    }

    /// Thousandths of a CPU used since a former reading, which is `time` old.
    pub(super) fn millicores_since(&self, former: &Self, time: Duration) -> f64 {
        self.cpu.saturating_sub(former.cpu).as_secs_f64() * 1000.0 / time.as_secs_f64().max(1e-3)
    }

    /// Percentage of periods with throttling since a former reading; none if there were no periods.
    pub(super) fn throttled_percent_since(&self, former: &Self) -> Option<f64> {
        let periods = self.periods.saturating_sub(former.periods);
        (periods > 0).then(|| self.throttled.saturating_sub(former.throttled) as f64 * 100.0 / periods as f64)
    }
}

fn parse(text: &str) -> GroupCpuStat {
    let mut stat = GroupCpuStat::default();
    for line in text.lines() {
        let Some((name, number)) = line.split_once(' ') else { continue };
        let number: u64 = number.trim().parse().unwrap_or(0);
        match name {
            "usage_usec" => stat.cpu = Duration::from_micros(number),
            "nr_periods" => stat.periods = number,
            "nr_throttled" => stat.throttled = number,
            _ => {}
        }
    }
    stat
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_of_cpu_stat_are_parsed() {
        let v2 = parse("usage_usec 2500000\nuser_usec 1\nnr_periods 10\nnr_throttled 4\nthrottled_usec 9\n");
        let cpu = Duration::from_millis(2500);
        assert_eq!(v2, GroupCpuStat { cpu, periods: 10, throttled: 4 });
        let v1 = parse("nr_periods 20\nnr_throttled 9\nthrottled_time 5\n");
        assert_eq!(v1, GroupCpuStat { cpu: Duration::ZERO, periods: 20, throttled: 9 });
        assert_eq!(v1.throttled_percent_since(&v2), Some(50.0));
        assert_eq!(v1.throttled_percent_since(&v1), None);
        assert!((v2.millicores_since(&GroupCpuStat::default(), Duration::from_secs(5)) - 500.0).abs() < 1e-9);
    }
}
