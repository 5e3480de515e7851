//! Logs lost samples. Each line names the reason, the CPUs whose ring buffer was full, and the cure.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use gannet_proto::ledger::{Ledger, LossReason};

/// The shortest time between two lines about one reason.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

#[derive(Default)]
pub(super) struct LossLog {
    /// By reason: the last line, and the samples lost since.
    logged: HashMap<LossReason, (Option<Instant>, u64)>,
}

impl LossLog {
    /// Writes a line about each reason that a window lost samples for, at most one a minute. `cpus` are those whose samples
    /// found the ring buffer full.
    pub(super) fn write(&mut self, window: &Ledger, cpus: &[usize]) {
        for line in self.lines(window, cpus, Instant::now()) {
            tracing::warn!("{line}");
        }
    }

    fn lines(&mut self, window: &Ledger, cpus: &[usize], now: Instant) -> Vec<String> {
        let mut lines = Vec::new();
        for (reason, lost) in &window.lost {
            let (last, since) = self.logged.entry(*reason).or_default();
            *since += lost;
            if last.is_some_and(|last| now.duration_since(last) < LOG_INTERVAL) {
                continue;
            }
            *last = Some(now);
            let samples = std::mem::take(since);
            let place = if *reason == LossReason::RingFull { on_cpus(cpus) } else { String::new() };
            lines.push(format!("{samples} samples are lost: {reason}{place}; {}", reason.cure()));
        }
        lines
    }
}

fn on_cpus(cpus: &[usize]) -> String {
    let numbers: Vec<String> = cpus.iter().take(8).map(usize::to_string).collect();
    let more = if cpus.len() > 8 { ", …" } else { "" };
    if numbers.is_empty() { String::new() } else { format!(" on CPU {}{more}", numbers.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_names_its_cpus_and_its_cure_once_a_minute() {
        let mut log = LossLog::default();
        let mut window = Ledger::default();
        window.lose(LossReason::RingFull, 7);
        let now = Instant::now();
        let line = |samples| format!("{samples} samples are lost: ring_full on CPU 3; raise --ring-bytes");
        assert_eq!(log.lines(&window, &[3], now), [line(7)]);
        assert_eq!(log.lines(&window, &[3], now + LOG_INTERVAL / 2), [""; 0]);
        assert_eq!(log.lines(&window, &[3], now + LOG_INTERVAL), [line(14)]);
        let many = on_cpus(&(0..9).collect::<Vec<_>>());
        assert_eq!(many, " on CPU 0, 1, 2, 3, 4, 5, 6, 7, …");
    }
}
