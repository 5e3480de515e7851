//! What Gannet needs of the machine that it runs on: looked at before anything else is done, and told with its cure.
//!
//! What can be tried is tried; a version number or a setting only explains why trying failed.

mod look;

use std::{fmt, path::PathBuf};

use serde::Serialize;

/// How a precondition stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should be.
    Ok,
    /// Gannet runs, with less to show or at a cost.
    Warning,
    /// Gannet cannot run.
    Fail,
}

/// One precondition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What is looked at; names do not change from version to version.
    pub name: &'static str,
    /// How it stands.
    pub state: State,
    /// What was seen.
    pub seen: String,
    /// What to do about it; empty where all is well.
    pub cure: String,
}

/// Every precondition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether Gannet can run on this machine.
    pub can_run: bool,
    /// Each precondition.
    pub checks: Vec<Check>,
}

/// The first reason why Gannet cannot run, in one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot run here: {seen}; {cure}")]
pub struct Refusal {
    /// The check that failed.
    pub name: &'static str,
    /// What was seen.
    pub seen: String,
    /// What to do about it.
    pub cure: String,
}

/// What to look at beyond the machine itself.
#[derive(Clone, Debug, Default)]
pub struct CheckOptions {
    /// The directory that `run` keeps its state in; none leaves it out.
    pub state_dir: Option<PathBuf>,
}

/// Looks at every precondition.
pub fn check(options: &CheckOptions) -> Report {
    let mut checks: Vec<Check> = look::FATAL.iter().chain(look::OTHERS).map(|look| look()).collect();
    checks.extend(options.state_dir.as_deref().map(look::state_dir));
    Report { can_run: checks.iter().all(|check| check.state != State::Fail), checks }
}

/// Looks only at what would keep Gannet from running, and stops at the first that does.
pub fn preflight() -> Result<(), Refusal> {
    for look in look::FATAL {
        let Check { name, state, seen, cure } = look();
        if state == State::Fail {
            return Err(Refusal { name, seen, cure });
        }
    }
    Ok(())
}

impl Check {
    fn ok(name: &'static str, seen: impl Into<String>) -> Self {
        Self { name, state: State::Ok, seen: seen.into(), cure: String::new() }
    }

    fn warning(name: &'static str, seen: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { name, state: State::Warning, seen: seen.into(), cure: cure.into() }
    }

    fn fail(name: &'static str, seen: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { name, state: State::Fail, seen: seen.into(), cure: cure.into() }
    }
}

impl Report {
    /// As one JSON object: `{"can_run": bool, "checks": [{"name", "state": "ok"|"warning"|"fail", "seen", "cure"}]}`.
    pub fn to_json(&self) -> String {
        // Text and booleans alone always have a JSON form.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// What the program ends with: 0 if Gannet can run, else 1.
    pub fn exit_code(&self) -> u8 {
        u8::from(!self.can_run)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or_default();
        for Check { name, state, seen, cure } in &self.checks {
            let state = match state {
                State::Ok => "ok",
                State::Warning => "warning",
                State::Fail => "FAIL",
            };
            writeln!(f, "{state:8} {name:width$}  {seen}")?;
            if !cure.is_empty() {
                writeln!(f, "{:8} {:width$}  -> {cure}", "", "")?;
            }
        }
        let failed = self.checks.iter().filter(|check| check.state == State::Fail).count();
        match failed {
            0 => writeln!(f, "\nGannet can run on this machine."),
            1 => writeln!(f, "\nGannet cannot run on this machine: 1 check failed."),
            failed => writeln!(f, "\nGannet cannot run on this machine: {failed} checks failed."),
        }
    }
}
