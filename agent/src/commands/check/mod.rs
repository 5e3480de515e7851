//! `gannet-agent check`: the requirements of the agent on its machine. The other verbs check them before they start.
//!
//! A check tries the operation itself where it can; version numbers and settings only explain why an attempt failed.

mod file;
mod interpreter;
mod kernel;
mod privileges;
mod service;
mod system;

use std::{fmt, path::PathBuf};

use serde::Serialize;

pub use file::{FileArgs, FileCheckError, FileReport, check_file};

/// Result of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckState {
    /// The requirement is met.
    Ok,
    /// The agent runs, with less to show or at a cost.
    Warning,
    /// The agent cannot run.
    Fail,
}

/// One check and its result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable name of the check.
    pub name: &'static str,
    /// Result of the check.
    pub state: CheckState,
    /// Observation behind the result.
    pub seen: String,
    /// Instruction for the user; empty if the requirement is met.
    pub cure: String,
}

/// Results of all checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether the agent can run on this machine.
    pub can_run: bool,
    /// All checks in the order of the report.
    pub checks: Vec<Check>,
}

/// The first reason why the agent cannot run, in one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot run here: {seen}; {cure}")]
pub struct Refusal {
    /// The check that failed.
    pub name: &'static str,
    /// Observation behind the result.
    pub seen: String,
    /// Instruction for the user.
    pub cure: String,
}

/// Checks beyond the machine itself.
#[derive(Clone, Debug, Default)]
pub struct CheckOptions {
    /// State directory of `run` to check, if any.
    pub state_dir: Option<PathBuf>,
    /// Process whose interpreter and service to check, if any.
    pub pid: Option<u32>,
}

/// Checks without which the agent cannot run, in the order in which a user fixes them.
const REQUIRED: &[fn() -> Check] = &[
    kernel::architecture,
    kernel::kernel,
    kernel::user_memory,
    privileges::capabilities,
    kernel::lockdown,
    kernel::btf,
    kernel::bpf,
    kernel::ring_buffer,
    privileges::perf_clock,
    privileges::host_pid,
];

/// Checks without which the agent still runs.
const OPTIONAL: &[fn() -> Check] = &[
    privileges::file_access,
    system::kernel_symbols,
    kernel::bpf_loop,
    system::cgroup,
    system::psi,
    system::tracefs,
    system::memlock,
    system::open_files,
    kernel::bpf_stats,
];

/// Runs all checks.
pub fn check(options: &CheckOptions) -> Report {
    let mut checks: Vec<Check> = REQUIRED.iter().chain(OPTIONAL).map(|check| check()).collect();
    checks.extend(options.state_dir.as_deref().map(system::state_dir));
    checks.extend(options.pid.map(interpreter::interpreter));
    checks.extend(options.pid.map(service::service));
    Report { can_run: checks.iter().all(|check| check.state != CheckState::Fail), checks }
}

/// The answer to a kernel that may lock up when a profiler reads user memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnsafeKernel {
    /// Sample nothing on such a kernel.
    Refuse,
    /// Sample, and log a warning: the user has said that this kernel has the fix, or takes the risk.
    Allow,
}

impl UnsafeKernel {
    /// Returns the answer of a user who passed `--allow-unsafe-kernel`, or did not.
    pub(crate) fn of(allowed: bool) -> Self {
        if allowed { Self::Allow } else { Self::Refuse }
    }
}

/// Runs the required checks and stops at the first failure.
pub fn preflight(unsafe_kernel: UnsafeKernel) -> Result<(), Refusal> {
    REQUIRED.iter().try_for_each(|check| judge(check(), unsafe_kernel))
}

/// Turns a failed check into a refusal, unless the user allows it.
fn judge(check: Check, unsafe_kernel: UnsafeKernel) -> Result<(), Refusal> {
    let Check { name, state, seen, cure } = check;
    if state != CheckState::Fail {
        return Ok(());
    }
    if name == kernel::USER_MEMORY && unsafe_kernel == UnsafeKernel::Allow {
        tracing::warn!("{seen}; it samples all the same, because of --allow-unsafe-kernel");
        return Ok(());
    }
    Err(Refusal { name, seen, cure })
}

impl Check {
    fn ok(name: &'static str, seen: impl Into<String>) -> Self {
        Self { name, state: CheckState::Ok, seen: seen.into(), cure: String::new() }
    }

    fn warning(name: &'static str, seen: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { name, state: CheckState::Warning, seen: seen.into(), cure: cure.into() }
    }

    fn fail(name: &'static str, seen: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { name, state: CheckState::Fail, seen: seen.into(), cure: cure.into() }
    }
}

impl Report {
    /// Returns one JSON object: `{"can_run": bool, "checks": [{"name", "state": "ok"|"warning"|"fail", "seen", "cure"}]}`.
    pub fn to_json(&self) -> String {
        // Texts and booleans always have a JSON form.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// Returns the exit code of the program: 0 if the agent can run, else 1.
    pub fn exit_code(&self) -> u8 {
        u8::from(!self.can_run)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or_default();
        for Check { name, state, seen, cure } in &self.checks {
            let state = match state {
                CheckState::Ok => "ok",
                CheckState::Warning => "warning",
                CheckState::Fail => "FAIL",
            };
            writeln!(f, "{state:8} {name:width$}  {seen}")?;
            if !cure.is_empty() {
                writeln!(f, "{:8} {:width$}  -> {cure}", "", "")?;
            }
        }
        let failed = self.checks.iter().filter(|check| check.state == CheckState::Fail).count();
        match failed {
            0 => writeln!(f, "\nGannet can run on this machine."),
            1 => writeln!(f, "\nGannet cannot run on this machine: 1 check failed."),
            failed => writeln!(f, "\nGannet cannot run on this machine: {failed} checks failed."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_check_has_its_own_name_and_a_failure_a_cure() {
        let report = check(&CheckOptions::default());
        let mut names: Vec<_> = report.checks.iter().map(|check| check.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), report.checks.len());
        for check in &report.checks {
            assert!(!check.seen.is_empty());
            assert_eq!(check.state == CheckState::Ok, check.cure.is_empty(), "{check:?}");
        }
        assert_eq!(report.can_run, preflight(UnsafeKernel::Refuse).is_ok(), "{report}");
    }

    #[test]
    fn only_an_unsafe_kernel_can_be_allowed() {
        for (release, safe) in [("6.1.35", false), ("6.1.36", true)] {
            let check = || kernel::judge_user_memory(release, "");
            assert_eq!(judge(check(), UnsafeKernel::Refuse).is_ok(), safe, "{release}");
            assert!(judge(check(), UnsafeKernel::Allow).is_ok(), "{release}");
        }
        let refusal = judge(kernel::judge_user_memory("6.2.16", ""), UnsafeKernel::Refuse).unwrap_err();
        assert!(refusal.to_string().contains("--allow-unsafe-kernel"), "{refusal}");
        let other = Check::fail("btf", "no BTF", "mount /sys");
        assert!(judge(other, UnsafeKernel::Allow).is_err());
    }
}
