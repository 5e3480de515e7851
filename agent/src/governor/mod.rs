//! Keeps the agent within its own budgets: a share of one core, and bytes of memory.
//!
//! Who is over the budget for some seconds lowers the rates, step by step, and then refuses captures; who is well below it
//! for longer goes back the same way. Every step is said: in the log, as a reason of degradation, in the metrics, and in
//! the comments of the profiles that are taken meanwhile. The decision is pure and runs in virtual time.

mod bpf_time;

pub use bpf_time::BpfTime;

use std::fmt;

/// How often the budgets are looked at, in seconds: what the steps below count.
pub const SECONDS: u32 = 1;
/// So many looks over the budget make a step down.
const OVER: u32 = 3;
/// So many well below it make a step up: longer, so that it does not swing.
const UNDER: u32 = 15;
/// What counts as well below.
const WELL_BELOW: f64 = 0.6;
/// Periods are so many times longer, step by step; at the last step captures are refused too.
const DIVISORS: [u32; 5] = [1, 2, 4, 8, 8];

/// What the agent may use.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Budgets {
    /// Share of one core, for its own threads and its BPF programs together.
    pub cpu: Option<f64>,
    /// Resident memory.
    pub memory_bytes: Option<u64>,
}

/// What the agent uses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Use {
    /// Share of one core since the last look.
    pub cpu: f64,
    /// Resident memory.
    pub memory_bytes: u64,
}

/// The state machine.
#[derive(Debug)]
pub struct Governor {
    budgets: Budgets,
    step: usize,
    over: u32,
    under: u32,
    last: Use,
    /// Which budget the step was made for.
    why: String,
}

/// What holds now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Periods are so many times longer than asked for.
    pub rate_divisor: u32,
    /// Why captures are refused, if they are.
    pub refuse: Option<String>,
    /// What is lowered and why, in words; none: nothing is.
    pub reason: Option<String>,
}

impl Governor {
    /// Nothing lowered.
    pub fn new(budgets: Budgets) -> Self {
        Self { budgets, step: 0, over: 0, under: 0, last: Use::default(), why: String::new() }
    }

    /// Whether there is anything to keep within.
    pub fn has_budget(&self) -> bool {
        self.budgets != Budgets::default()
    }

    /// One look. True: the verdict has changed.
    pub fn look(&mut self, used: Use) -> bool {
        self.last = used;
        let share = |used: f64, budget: Option<f64>| budget.map_or(0.0, |budget| used / budget.max(1e-6));
        let cpu = share(used.cpu, self.budgets.cpu);
        let memory = share(used.memory_bytes as f64, self.budgets.memory_bytes.map(|bytes| bytes as f64));
        let worst = cpu.max(memory);
        self.over = if worst > 1.0 { self.over + 1 } else { 0 };
        self.under = if worst < WELL_BELOW { self.under + 1 } else { 0 };
        if self.over >= OVER && self.step + 1 < DIVISORS.len() {
            self.step += 1;
            self.over = 0;
            self.why = if cpu >= memory {
                let budget = self.budgets.cpu.unwrap_or_default();
                format!("{:.1} % of a core used, {:.1} % are the budget", used.cpu * 100.0, budget * 100.0)
            } else {
                let budget = self.budgets.memory_bytes.unwrap_or_default();
                format!("{} MiB of memory used, {} are the budget", used.memory_bytes >> 20, budget >> 20)
            };
            return true;
        }
        if self.under >= UNDER && self.step > 0 {
            self.step -= 1;
            self.under = 0;
            return true;
        }
        false
    }

    /// What holds now.
    pub fn verdict(&self) -> Verdict {
        let rate_divisor = DIVISORS[self.step];
        if self.step == 0 {
            return Verdict { rate_divisor, refuse: None, reason: None };
        }
        let lowered = format!("rates are lowered to 1/{rate_divisor}: {}", self.why);
        let refuse = (self.step + 1 == DIVISORS.len()).then(|| self.why.clone());
        let reason = if refuse.is_some() { format!("captures are refused and {lowered}") } else { lowered };
        Verdict { rate_divisor, refuse, reason: Some(reason) }
    }

    /// What was used at the last look.
    pub fn last(&self) -> Use {
        self.last
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} % of a core, {} MiB", self.cpu * 100.0, self.memory_bytes >> 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(governor: &mut Governor, cpu: f64, times: u32) -> u32 {
        for _ in 0..times {
            governor.look(Use { cpu, memory_bytes: 0 });
        }
        governor.verdict().rate_divisor
    }

    #[test]
    fn r40_rates_are_lowered_first_then_captures_are_refused_and_all_comes_back() {
        let mut governor = Governor::new(Budgets { cpu: Some(0.05), memory_bytes: None });
        assert_eq!(looks(&mut governor, 0.2, 2), 1, "a moment is no matter");
        assert_eq!(looks(&mut governor, 0.2, 1), 2);
        let verdict = governor.verdict();
        assert_eq!(verdict.refuse, None);
        assert!(verdict.reason.unwrap().contains("20.0 % of a core used, 5.0 % are the budget"));
        assert_eq!(looks(&mut governor, 0.2, 6), 8);
        assert_eq!(governor.verdict().refuse, None);
        looks(&mut governor, 0.2, 3);
        assert!(governor.verdict().refuse.is_some());
        looks(&mut governor, 0.2, 100);
        assert_eq!(governor.verdict().rate_divisor, 8, "there is no further step");
        looks(&mut governor, 0.04, 1000);
        assert!(governor.verdict().refuse.is_some(), "just below the budget is no reason to go back");
        looks(&mut governor, 0.01, UNDER);
        assert_eq!((governor.verdict().refuse, governor.verdict().rate_divisor), (None, 8));
        assert_eq!(looks(&mut governor, 0.01, 3 * UNDER), 1);
        assert_eq!(governor.verdict().reason, None);
    }

    #[test]
    fn r40_memory_counts_too_and_without_budgets_nothing_is_lowered() {
        let mut governor = Governor::new(Budgets { cpu: None, memory_bytes: Some(100 << 20) });
        for _ in 0..3 {
            governor.look(Use { cpu: 9.0, memory_bytes: 200 << 20 });
        }
        assert!(governor.verdict().reason.unwrap().contains("200 MiB of memory used, 100 are the budget"));
        let mut free = Governor::new(Budgets::default());
        for _ in 0..100 {
            assert!(!free.look(Use { cpu: 9.0, memory_bytes: u64::MAX }));
        }
        assert!(!free.has_budget());
    }
}
