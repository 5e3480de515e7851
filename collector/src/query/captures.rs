//! The captures of a selection: runs of profiles that a condition of a rule or a person started.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{Query, QueryError, select::Selection};
use crate::store::StoredProfile;

/// Maximum number of captures in one answer.
const MAX_CAPTURES: usize = 500;
/// Maximum number of captures that a query holds while it reads the index.
const MAX_RUNS: usize = 10_000;
/// Maximum number of services, and of nodes, that one capture lists.
const MAX_NAMES: usize = 5;
/// Maximum time between two profiles of one capture. A window without samples has no profile.
const MAX_GAP_MS: u64 = 15_000;
/// Reason of profiles by a rule without conditions. They are not captures.
const CONTINUOUS: &str = "always";
/// Reason of samples from the pre-trigger window. It does not name the trigger.
const LEAD_UP: &str = "pre-trigger";

/// One capture. Captures of a rule that overlap in time, for instance on several nodes, count as one.
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

/// The captures of a rule by their start. No two of them overlap or follow each other within [`MAX_GAP_MS`].
type Runs = BTreeMap<u64, CaptureRun>;

/// Adds a run and joins it with those that it touches. Returns the number of those.
fn add(runs: &mut Runs, mut run: CaptureRun) -> usize {
    let mut joined = 0;
    // Only the last run that starts before the new one ends can touch it, then the one before that, and so on.
    while let Some((&start, last)) = runs.range(..=run.end_ms.saturating_add(MAX_GAP_MS)).next_back()
        && last.end_ms.saturating_add(MAX_GAP_MS) >= run.start_ms
    {
        if let Some(touching) = runs.remove(&start) {
            run.join(touching);
            joined += 1;
        }
    }
    runs.insert(run.start_ms, run);
    joined
}

/// The captures that a query has found so far, of which it keeps the newest.
#[derive(Default)]
struct Captures {
    rules: HashMap<String, Runs>,
    count: usize,
    /// Captures that are no longer kept.
    left_out: usize,
    /// Start of the oldest capture when older ones were left out. Profiles from before it belong to those.
    oldest_ms: u64,
}

impl Captures {
    fn add(&mut self, run: CaptureRun) {
        if run.end_ms.saturating_add(MAX_GAP_MS) < self.oldest_ms {
            return;
        }
        let joined = add(self.rules.entry(run.rule_id.clone()).or_default(), run);
        self.count = self.count + 1 - joined;
        if self.count > MAX_RUNS {
            // Half of them, so that this sorts rarely. The index is read series by series, so newer ones can still follow.
            let kept = self.take_newest(MAX_RUNS / 2);
            self.oldest_ms = kept.first().map_or(0, |run| run.start_ms);
            self.count = kept.len();
            for run in kept {
                self.rules.entry(run.rule_id.clone()).or_default().insert(run.start_ms, run);
            }
        }
    }

    /// Removes all captures and returns the newest ones in the order of their starts.
    fn take_newest(&mut self, limit: usize) -> Vec<CaptureRun> {
        let mut all: Vec<CaptureRun> =
            std::mem::take(&mut self.rules).into_values().flat_map(BTreeMap::into_values).collect();
        all.sort_by(|a, b| (a.start_ms, &a.rule_id).cmp(&(b.start_ms, &b.rule_id)));
        let surplus = all.len().saturating_sub(limit);
        self.left_out += surplus;
        all.split_off(surplus)
    }
}

impl Query {
    /// Returns the newest captures of the selection in the order of their starts, and the number of older ones. In a
    /// selection of more than [`MAX_RUNS`] captures, that number may be too small.
    pub(crate) async fn captures(
        self: &Arc<Self>,
        selection: Selection,
    ) -> Result<(Vec<CaptureRun>, usize), QueryError> {
        let _timer = self.metrics.query_timer("captures");
        let selected = self.select(selection).await?;
        self.blocking(move |q| {
            let mut found = Captures::default();
            q.scan(&selected, |entry| {
                if !entry.row.rule_id.is_empty() && !entry.row.reason.starts_with(CONTINUOUS) {
                    found.add(q.run_of(entry));
                }
                true
            })?;
            let newest = found.take_newest(MAX_CAPTURES);
            Ok((newest, found.left_out))
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
            let (mut runs, mut joined) = (Runs::new(), 0);
            for part in order {
                joined += add(&mut runs, parts[part].clone());
            }
            let found: Vec<_> = runs
                .values()
                .map(|run| (run.start_ms / 1000, run.end_ms / 1000, run.profiles, run.nodes.len()))
                .collect();
            assert_eq!(found, [(100, 140, 3, 2), (300, 310, 1, 1)], "{order:?}");
            assert_eq!(joined, 2, "{order:?}");
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

    /// Adds 7,000 captures of each of three nodes, one node after the other, and returns what is kept of them. The newest
    /// ones are those of the node `newest`.
    fn three_nodes(newest: usize) -> (Vec<u64>, usize, usize) {
        let (mut found, mut most) = (Captures::default(), 0);
        for (index, node) in ["a", "b", "c"].into_iter().enumerate() {
            let from_s = if index == newest { 1_000_000 } else { 1_000 + index as u64 * 30 };
            for at in 0..7_000 {
                found.add(run(from_s + at * 100, from_s + at * 100 + 10, node));
                most = most.max(found.count);
            }
        }
        let starts = found.take_newest(MAX_CAPTURES).iter().map(|run| run.start_ms / 1000).collect();
        (starts, found.left_out, most)
    }

    #[test]
    fn the_newest_captures_are_kept_in_any_order_of_nodes() {
        let expected: Vec<u64> = (6_500..7_000).map(|at| 1_000_000 + at * 100).collect();
        for newest in 0..3 {
            let (starts, left_out, most) = three_nodes(newest);
            assert_eq!(starts, expected, "{newest}");
            assert!(most <= MAX_RUNS, "{newest}: {most}");
            assert!(
                (MAX_RUNS - MAX_CAPTURES..=21_000 - MAX_CAPTURES).contains(&left_out),
                "{newest}: {left_out}"
            );
        }
    }

    /// Checks that profiles of captures that are left out already do not count as further captures.
    #[test]
    fn the_number_left_out_is_one_of_captures() {
        let mut found = Captures::default();
        for at in 0..600 {
            // Three profiles that touch.
            for part in 0..3 {
                found.add(run(1_000 + at * 100 + part * 10, 1_010 + at * 100 + part * 10, "a"));
            }
        }
        assert_eq!(found.count, 600);
        assert_eq!((found.take_newest(MAX_CAPTURES).len(), found.left_out), (500, 100));
        let mut found = Captures::default();
        for _ in 0..5 {
            for at in 0..12_000 {
                found.add(run(1_000 + at * 100, 1_010 + at * 100, "a"));
            }
        }
        assert_eq!((found.take_newest(MAX_CAPTURES).len(), found.left_out), (500, 11_500));
    }
}
