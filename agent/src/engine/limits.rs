//! What the agent may do now: its budgets, and the switch that turns everything off.
//!
//! Reads once a second how much the agent uses, lets the governor judge it, and answers with the verdict. The worker
//! carries it out.

use std::time::{Duration, Instant};

use crate::{
    governor::{
        BpfTime, Budgets, Governor, GovernorVerdict, ResourceUse, children_cpu_time, children_resident_bytes,
        resident_bytes,
    },
    kernel::Kernel,
};

pub(super) struct Limits {
    governor: Governor,
    verdict: GovernorVerdict,
    bpf_time: BpfTime,
    /// CPU time of this process and its children at the last check, and when that was.
    cpu_time: (Instant, Duration),
    /// Why everything is switched off; `None` if it is on.
    off: Option<String>,
}

/// The effect of a use of the switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Switched {
    Off(String),
    On,
    /// It was so already.
    Unchanged,
}

impl Limits {
    pub(super) fn new(budgets: Budgets) -> Self {
        let governor = Governor::new(budgets);
        Self {
            verdict: governor.verdict(),
            governor,
            bpf_time: BpfTime::default(),
            cpu_time: (Instant::now(), cpu_time()),
            off: None,
        }
    }

    /// Checks what the agent uses. Returns the verdict if it has changed. While everything is off there is nothing to check.
    pub(super) fn check(&mut self, kernel: &Kernel) -> Option<GovernorVerdict> {
        if !self.is_limited() {
            return None;
        }
        let (now, time) = (Instant::now(), cpu_time());
        let (since, before) = std::mem::replace(&mut self.cpu_time, (now, time));
        let own = time.saturating_sub(before).as_secs_f64() / (now - since).as_secs_f64().max(1e-3);
        let memory = resident_bytes("self") + children_resident_bytes();
        let used = ResourceUse { cpu: own + self.bpf_time.measure(kernel), memory_bytes: memory };
        self.judge(used)
    }

    fn is_limited(&self) -> bool {
        self.governor.has_budget() && self.off.is_none()
    }

    fn judge(&mut self, used: ResourceUse) -> Option<GovernorVerdict> {
        if !self.governor.check(used) {
            return None;
        }
        self.verdict = self.governor.verdict();
        if let Some(reason) = &self.verdict.reason {
            tracing::warn!("the agent keeps within its budget: {reason}");
        } else {
            tracing::info!("the agent is within its budget again, it lowers nothing any more");
        }
        Some(self.verdict.clone())
    }

    /// Switches everything off for a reason, or on again.
    pub(super) fn switch(&mut self, reason: Option<String>) -> Switched {
        let was_off = self.off.is_some();
        self.off.clone_from(&reason);
        match (was_off, reason) {
            (false, Some(reason)) => Switched::Off(reason),
            (true, None) => Switched::On,
            _ => Switched::Unchanged,
        }
    }

    /// Returns why no capture may start; `None` if captures may.
    pub(super) fn refusal(&self) -> Option<&str> {
        self.off.as_deref().or(self.verdict.refuse.as_deref())
    }

    /// Returns what is lowered, refused or switched off, and why; human-readable.
    pub(super) fn reason(&self) -> Option<&str> {
        self.off.as_deref().or(self.verdict.reason.as_deref())
    }

    /// Returns the factor by which periods are longer than the rules ask for.
    pub(super) fn rate_divisor(&self) -> u32 {
        self.verdict.rate_divisor
    }
}

/// Returns the CPU time of all threads of this process, and of its children.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default() + children_cpu_time()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks this use a number of times. Returns the verdicts that it brings about.
    fn checks(limits: &mut Limits, cpu: f64, times: u32) -> Vec<GovernorVerdict> {
        (0..times).filter_map(|_| limits.judge(ResourceUse { cpu, memory_bytes: 0 })).collect()
    }

    #[test]
    fn a_verdict_is_returned_once_and_holds_until_the_next() {
        let mut limits = Limits::new(Budgets { cpu: Some(0.05), memory_bytes: None });
        assert_eq!((limits.rate_divisor(), limits.reason(), limits.refusal()), (1, None, None));
        let verdicts = checks(&mut limits, 0.2, 12);
        let divisors: Vec<u32> = verdicts.iter().map(|verdict| verdict.rate_divisor).collect();
        assert_eq!(divisors, [2, 4, 8, 8]);
        assert_eq!(limits.rate_divisor(), 8);
        assert_eq!(limits.refusal(), verdicts[3].refuse.as_deref());
        assert!(limits.refusal().is_some() && limits.reason().is_some());
        assert_eq!(checks(&mut limits, 0.04, 100), []);
    }

    #[test]
    fn the_switch_takes_precedence_over_the_budget() {
        let mut limits = Limits::new(Budgets { cpu: Some(0.05), memory_bytes: None });
        checks(&mut limits, 0.2, 3);
        assert_eq!(limits.switch(Some("by hand".into())), Switched::Off("by hand".into()));
        assert!(!limits.is_limited());
        assert_eq!((limits.refusal(), limits.reason()), (Some("by hand"), Some("by hand")));
        assert_eq!(limits.switch(Some("by file".into())), Switched::Unchanged);
        assert_eq!(limits.refusal(), Some("by file"));
        assert_eq!(limits.switch(None), Switched::On);
        assert_eq!(limits.switch(None), Switched::Unchanged);
        assert_eq!(limits.refusal(), None);
        assert!(limits.is_limited() && limits.reason().unwrap().contains("budget"));
    }
}
