//! CPU use and throttling of a control group, of both versions.

use std::{fs, io, path::Path, time::Duration};

/// What a group has used and suffered since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time.
    pub cpu: Duration,
    /// Enforcement periods in which it ran, and those of them in which it was throttled.
    pub periods: u64,
    /// See `periods`.
    pub throttled: u64,
}

impl Usage {
    /// Reads `cpu.stat` of the group, and of version 1 `cpuacct.usage` beside it.
    pub fn read(cpu: &Path, cpuacct: Option<&Path>) -> io::Result<Self> {
        let mut usage = parse(&fs::read_to_string(cpu.join("cpu.stat"))?);
        if let Some(cpuacct) = cpuacct {
            let text = fs::read_to_string(cpuacct.join("cpuacct.usage"))?;
            usage.cpu = Duration::from_nanos(text.trim().parse().unwrap_or(0));
        }
        Ok(usage)
    }

    /// Thousandths of a CPU used between a former reading and this one.
    pub fn millicores_since(&self, former: &Self, time: Duration) -> f64 {
        self.cpu.saturating_sub(former.cpu).as_secs_f64() * 1000.0 / time.as_secs_f64().max(1e-3)
    }

    /// Percent of the periods in which it was throttled since a former reading; none if there were no periods.
    pub fn throttled_percent_since(&self, former: &Self) -> Option<f64> {
        let periods = self.periods.saturating_sub(former.periods);
        (periods > 0).then(|| self.throttled.saturating_sub(former.throttled) as f64 * 100.0 / periods as f64)
    }
}

fn parse(text: &str) -> Usage {
    let mut usage = Usage::default();
    for line in text.lines() {
        let Some((name, number)) = line.split_once(' ') else { continue };
        let number: u64 = number.trim().parse().unwrap_or(0);
        match name {
            "usage_usec" => usage.cpu = Duration::from_micros(number),
            "nr_periods" => usage.periods = number,
            "nr_throttled" => usage.throttled = number,
            _ => {}
        }
    }
    usage
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_of_cpu_stat() {
        let v2 = parse("usage_usec 2500000\nuser_usec 1\nnr_periods 10\nnr_throttled 4\nthrottled_usec 9\n");
        let cpu = Duration::from_millis(2500);
        assert_eq!(v2, Usage { cpu, periods: 10, throttled: 4 });
        let v1 = parse("nr_periods 20\nnr_throttled 9\nthrottled_time 5\n");
        assert_eq!(v1, Usage { cpu: Duration::ZERO, periods: 20, throttled: 9 });
        assert_eq!(v1.throttled_percent_since(&v2), Some(50.0));
        assert_eq!(v1.throttled_percent_since(&v1), None);
        assert!((v2.millicores_since(&Usage::default(), Duration::from_secs(5)) - 500.0).abs() < 1e-9);
    }
}
