//! Keeps the agent within its own budgets: a share of one core, and bytes of memory.
//!
//! If the agent stays over a budget for some seconds, the governor lowers the sampling rates step by step, and then refuses
//! captures. If the agent stays well below its budgets for longer, the governor goes back the same way. The engine reports
//! each step: in the log, as a reason of degradation, in the metrics, and in the comments of profiles. The decision has no
//! side effects and runs in virtual time.

mod bpf_time;
mod children;

pub(crate) use bpf_time::BpfTime;
pub(crate) use children::{CountedChild, children_cpu_time, children_resident_bytes, resident_bytes};

/// Consecutive checks over a budget before a step down. The engine checks once a second.
const CHECKS_OVER: u32 = 3;
/// Consecutive checks well below all budgets before a step up: more, so that the governor does not oscillate.
const CHECKS_UNDER: u32 = 15;
/// Well below is less than this share of the budget.
const WELL_BELOW: f64 = 0.6;
/// Factor for periods at each step. At the last step the governor also refuses captures.
const DIVISORS: [u32; 5] = [1, 2, 4, 8, 8];

/// Limits for the agent's resources. None: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Budgets {
    /// Share of one core, for the agent's threads, its BPF programs and its children together.
    pub cpu: Option<f64>,
    /// Resident memory of the process and its children.
    pub memory_bytes: Option<u64>,
}

/// The agent's use of resources.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ResourceUse {
    /// Share of one core since the last check.
    pub(crate) cpu: f64,
    /// Resident memory of the process and its children.
    pub(crate) memory_bytes: u64,
}

/// The state machine.
#[derive(Debug)]
pub(crate) struct Governor {
    budgets: Budgets,
    /// Index into [`DIVISORS`].
    step: usize,
    over: u32,
    under: u32,
    /// The exceeded budget that caused the last step down, human-readable.
    cause: String,
}

/// Instructions of the governor to the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GovernorVerdict {
    /// Factor for all periods.
    pub(crate) rate_divisor: u32,
    /// Why captures are refused, if they are.
    pub(crate) refuse: Option<String>,
    /// The lowered limits and the cause, human-readable; none: nothing is lowered.
    pub(crate) reason: Option<String>,
}

impl Governor {
    /// Starts with nothing lowered.
    pub(crate) fn new(budgets: Budgets) -> Self {
        Self { budgets, step: 0, over: 0, under: 0, cause: String::new() }
    }

    pub(crate) fn has_budget(&self) -> bool {
        self.budgets != Budgets::default()
    }

    /// Compares the use with the budgets. Returns true if the verdict has changed.
    pub(crate) fn check(&mut self, used: ResourceUse) -> bool {
        let share = |used: f64, budget: Option<f64>| budget.map_or(0.0, |budget| used / budget.max(1e-6));
        let cpu = share(used.cpu, self.budgets.cpu);
        let memory = share(used.memory_bytes as f64, self.budgets.memory_bytes.map(|bytes| bytes as f64));
        let worst = cpu.max(memory);
        self.over = if worst > 1.0 { self.over + 1 } else { 0 };
        self.under = if worst < WELL_BELOW { self.under + 1 } else { 0 };
        if self.over >= CHECKS_OVER && self.step + 1 < DIVISORS.len() {
            self.step += 1;
            self.over = 0;
            self.cause = if cpu >= memory {
                let budget = self.budgets.cpu.unwrap_or_default();
                format!("{:.1} % of a core used, the budget is {:.1} %", used.cpu * 100.0, budget * 100.0)
            } else {
                let budget = self.budgets.memory_bytes.unwrap_or_default();
                format!("{} MiB of memory used, the budget is {} MiB", used.memory_bytes >> 20, budget >> 20)
            };
            return true;
        }
        if self.under >= CHECKS_UNDER && self.step > 0 {
            self.step -= 1;
            self.under = 0;
            return true;
        }
        false
    }

    pub(crate) fn verdict(&self) -> GovernorVerdict {
        let rate_divisor = DIVISORS[self.step];
        if self.step == 0 {
            return GovernorVerdict { rate_divisor, refuse: None, reason: None };
        }
        let lowered = format!("rates are lowered to 1/{rate_divisor}: {}", self.cause);
        let refuse = (self.step + 1 == DIVISORS.len()).then(|| self.cause.clone());
        let reason = if refuse.is_some() { format!("captures are refused and {lowered}") } else { lowered };
        GovernorVerdict { rate_divisor, refuse, reason: Some(reason) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks this often with the same use of CPU, and returns the divisor.
    fn checks(governor: &mut Governor, cpu: f64, times: u32) -> u32 {
        for _ in 0..times {
            governor.check(ResourceUse { cpu, memory_bytes: 0 });
        }
        governor.verdict().rate_divisor
    }

    /// Checks that the governor lowers rates first, then refuses captures, and takes back both (R40).
    #[test]
    fn rates_fall_first_then_captures_are_refused_and_both_return() {
        let mut governor = Governor::new(Budgets { cpu: Some(0.05), memory_bytes: None });
        assert_eq!(checks(&mut governor, 0.2, 2), 1, "a short excess changes nothing");
        assert_eq!(checks(&mut governor, 0.2, 1), 2);
        let verdict = governor.verdict();
        assert_eq!(verdict.refuse, None);
        assert!(verdict.reason.unwrap().contains("20.0 % of a core used, the budget is 5.0 %"));
        assert_eq!(checks(&mut governor, 0.2, 6), 8);
        assert_eq!(governor.verdict().refuse, None);
        checks(&mut governor, 0.2, 3);
        assert!(governor.verdict().refuse.is_some());
        checks(&mut governor, 0.2, 100);
        assert_eq!(governor.verdict().rate_divisor, 8, "there is no further step");
        checks(&mut governor, 0.04, 1000);
        assert!(governor.verdict().refuse.is_some(), "use just below the budget is no reason to go back");
        checks(&mut governor, 0.01, CHECKS_UNDER);
        assert_eq!((governor.verdict().refuse, governor.verdict().rate_divisor), (None, 8));
        assert_eq!(checks(&mut governor, 0.01, 3 * CHECKS_UNDER), 1);
        assert_eq!(governor.verdict().reason, None);
    }

    /// Checks that memory counts too, and that without budgets nothing is lowered (R40).
    #[test]
    fn memory_counts_and_without_budgets_nothing_is_lowered() {
        let mut governor = Governor::new(Budgets { cpu: None, memory_bytes: Some(100 << 20) });
        for _ in 0..3 {
            governor.check(ResourceUse { cpu: 9.0, memory_bytes: 200 << 20 });
        }
        let reason = governor.verdict().reason.unwrap();
        assert!(reason.contains("200 MiB of memory used, the budget is 100 MiB"));
        let mut unlimited = Governor::new(Budgets::default());
        for _ in 0..100 {
            assert!(!unlimited.check(ResourceUse { cpu: 9.0, memory_bytes: u64::MAX }));
        }
        assert!(!unlimited.has_budget());
    }
}
