//! The captures of a selection: runs of profiles that the condition of a rule, or a person, started.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{Query, QueryError, select::Selection};
use crate::store::StoredProfile;

/// Captures of one answer, at most.
const MAX_CAPTURES: usize = 500;
/// Runs that a query keeps while it reads the index.
const MAX_RUNS: usize = 10_000;
/// Values that one capture names, of its services and of its nodes.
const MAX_NAMES: usize = 5;
/// Time between two profiles of one capture, at most. A window without samples makes no profile.
const MAX_GAP_MS: u64 = 15_000;
/// Reason of profiles that a rule without conditions made. They are no capture.
const CONTINUOUS: &str = "always";
/// Reason of samples from before the trigger. It does not say what the trigger was.
const LEAD_UP: &str = "pre-trigger";

/// One capture. Captures of a rule that overlap in time, on several nodes for instance, are one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CaptureRun {
    pub(crate) rule_id: String,
    pub(crate) start_ms: u64,
    pub(crate) end_ms: u64,
    /// Reason of the first profile after the trigger, such as `pressure; cpu some 34 %`.
    pub(crate) reason: String,
    /// Start of the profile with this reason.
    pub(super) reason_ms: u64,
    pub(crate) profiles: u64,
    pub(crate) services: BTreeSet<String>,
    pub(crate) nodes: BTreeSet<String>,
}

impl CaptureRun {
    fn join(&mut self, other: Self) {
        let Self { rule_id: _, start_ms, end_ms, reason, reason_ms, profiles, services, nodes } = other;
        let is_lead_up = |reason: &str| reason.starts_with(LEAD_UP);
        let rank = |reason: &str, start_ms: u64| (is_lead_up(reason), start_ms);
        if rank(&reason, reason_ms) < rank(&self.reason, self.reason_ms) {
            (self.reason, self.reason_ms) = (reason, reason_ms);
        }
        self.start_ms = self.start_ms.min(start_ms);
        self.end_ms = self.end_ms.max(end_ms);
        self.profiles += profiles;
        for (all, more) in [(&mut self.services, services), (&mut self.nodes, nodes)] {
            all.extend(more);
            while all.len() > MAX_NAMES {
                all.pop_last();
            }
        }
    }
}

/// The captures of a rule by their starts. No two of them touch.
type Runs = BTreeMap<u64, CaptureRun>;

/// Adds a run and joins it with those that it touches. Returns by how much the number of runs grew.
fn add(runs: &mut Runs, mut run: CaptureRun) -> isize {
    let mut grew = 1;
    // Only the last run that starts before the new one ends can touch it, then the one before that, and so on.
    while let Some((&start, last)) = runs.range(..=run.end_ms.saturating_add(MAX_GAP_MS)).next_back()
        && last.end_ms.saturating_add(MAX_GAP_MS) >= run.start_ms
    {
        if let Some(touching) = runs.remove(&start) {
            run.join(touching);
            grew -= 1;
        }
    }
    runs.insert(run.start_ms, run);
    grew
}

impl Query {
    /// Returns the captures of the selection in the order of their starts, the newest ones if there are too many, and the
    /// number of captures that are left out.
    pub(crate) async fn captures(
        self: &Arc<Self>,
        selection: Selection,
    ) -> Result<(Vec<CaptureRun>, usize), QueryError> {
        let _timer = self.metrics.query_timer("captures");
        self.blocking(move |q| {
            let mut rules: HashMap<String, Runs> = HashMap::new();
            let (mut count, mut left_out) = (0_isize, 0);
            q.scan(&selection, |entry| {
                if entry.row.rule_id.is_empty() || entry.row.reason.starts_with(CONTINUOUS) {
                    return true;
                }
                if count >= MAX_RUNS as isize {
                    left_out += 1;
                    return true;
                }
                let run = q.run_of(entry);
                count += add(rules.entry(run.rule_id.clone()).or_default(), run);
                true
            })?;
            let mut all: Vec<CaptureRun> = rules.into_values().flat_map(BTreeMap::into_values).collect();
            all.sort_by(|a, b| (a.start_ms, &a.rule_id).cmp(&(b.start_ms, &b.rule_id)));
            let surplus = all.len().saturating_sub(MAX_CAPTURES);
            all.drain(..surplus);
            Ok((all, surplus + left_out))
        })
        .await
    }

    fn run_of(&self, StoredProfile { series, key, row }: StoredProfile) -> CaptureRun {
        let labels = self.store.labels_of(series).unwrap_or_default();
        let value = |name: &str| labels.get(name).cloned().into_iter().collect();
        CaptureRun {
            rule_id: row.rule_id,
            start_ms: key.start_ms,
            end_ms: key.start_ms.saturating_add(row.duration_ms),
            reason: row.reason,
            reason_ms: key.start_ms,
            profiles: 1,
            services: value(gannet_proto::labels::SERVICE_NAME),
            nodes: value(gannet_proto::labels::NODE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start_s: u64, end_s: u64, node: &str) -> CaptureRun {
        CaptureRun {
            rule_id: "r".into(),
            start_ms: start_s * 1000,
            end_ms: end_s * 1000,
            reason: if start_s == 100 { LEAD_UP.to_owned() } else { format!("at {start_s}") },
            reason_ms: start_s * 1000,
            profiles: 1,
            services: BTreeSet::new(),
            nodes: [node.to_owned()].into(),
        }
    }

    #[test]
    fn touching_runs_become_one_in_any_order() {
        let parts = [run(100, 110, "a"), run(110, 120, "b"), run(134, 140, "a"), run(300, 310, "c")];
        for order in [[0, 1, 2, 3], [3, 2, 0, 1], [2, 0, 3, 1], [1, 3, 2, 0]] {
            let (mut runs, mut count) = (Runs::new(), 0);
            for part in order {
                count += add(&mut runs, parts[part].clone());
            }
            let found: Vec<_> = runs
                .values()
                .map(|run| (run.start_ms / 1000, run.end_ms / 1000, run.profiles, run.nodes.len()))
                .collect();
            assert_eq!(found, [(100, 140, 3, 2), (300, 310, 1, 1)], "{order:?}");
            assert_eq!(count, 2, "{order:?}");
            assert_eq!(runs[&100_000].reason, "at 110", "{order:?}");
        }
    }

    #[test]
    fn a_run_names_a_bounded_number_of_nodes() {
        let mut runs = Runs::new();
        for node in 0..100 {
            add(&mut runs, run(10, 20, &format!("n{node:03}")));
        }
        let run = &runs[&10_000];
        assert_eq!((run.profiles, run.nodes.len()), (100, MAX_NAMES));
    }
}
