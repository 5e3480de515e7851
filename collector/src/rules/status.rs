//! The status of TriggerRule resources: how many nodes run each rule.
//!
//! Several collectors write one status. Each has its own counts in it, and the top level shows their sums.

use std::collections::BTreeMap;

use gannet_proto::{
    control::{NodeRollout, Rule, node_rollout::State},
    rules,
};
use kube::api::DynamicObject;
use serde_json::{Value, json};

use super::nodes::NodeStates;
use crate::time;

/// Age at which the sums leave out a collector's counts.
const COUNTS_TTL_MS: u64 = 180_000;
/// Age at which a collector writes unchanged counts again.
const COUNTS_REFRESH_MS: u64 = 60_000;
/// Nodes whose errors an Event shows.
const SHOWN_REFUSALS: usize = 3;

/// The states of a node towards a rule. Each is a field of the status.
pub(super) const STATES: [&str; 6] = ["applied", "partial", "rejected", "pending", "skipped", "offline"];

/// Nodes by their state towards a rule.
#[derive(Default)]
pub(super) struct StateCounts(BTreeMap<&'static str, u64>);

impl StateCounts {
    /// Counts the nodes of a rollout by their state towards one rule.
    pub(super) fn of(rule: &Rule, nodes: &[NodeRollout], states: &dyn NodeStates) -> Self {
        let mut counts = Self::default();
        for node in nodes {
            let is_meant = rules::is_for_node(rule, &node.node, &states.labels(&node.node));
            let has_error = node.errors.iter().any(|e| e.rule_id == rule.id || e.rule_id.is_empty());
            let state = match node.state() {
                _ if !is_meant => "skipped",
                State::Rejected => "rejected",
                State::Partial if has_error => "partial",
                State::Applied | State::Partial => "applied",
                State::Skipped => "skipped",
                State::Offline => "offline",
                State::Pending | State::Unspecified => "pending",
            };
            *counts.0.entry(state).or_default() += 1;
        }
        counts
    }
}

/// Returns the errors of the first few nodes that do not run a rule as it asks.
pub(super) fn refusals(id: &str, nodes: &[NodeRollout]) -> Vec<String> {
    let refusals = nodes.iter().flat_map(|node| {
        let of_rule = node.errors.iter().filter(|error| error.rule_id == id || error.rule_id.is_empty());
        of_rule.map(|error| format!("{}: {}: {}", node.node, error.field, error.reason))
    });
    refusals.take(SHOWN_REFUSALS).collect()
}

/// Returns the status to write, or `None` if the resource shows it already. `why_not`: the fault of an invalid rule.
pub(super) fn status(
    object: &DynamicObject,
    collector: &str,
    revision: u64,
    why_not: Option<&str>,
    counts: &StateCounts,
) -> Option<Value> {
    let present = &object.data["status"];
    let now_ms = time::now_ms();
    let mut mine: Value =
        STATES.iter().map(|state| ((*state).to_owned(), json!(counts.0.get(state).unwrap_or(&0)))).collect();
    let before = &present["collectors"][collector];
    let is_same = STATES.iter().all(|state| before[*state] == mine[*state]);
    let written_ms = before["at"].as_u64().unwrap_or(0);
    let is_fresh = written_ms + COUNTS_REFRESH_MS > now_ms;
    mine["at"] = json!(if is_same && is_fresh { written_ms } else { now_ms });
    let mut collectors = serde_json::Map::new();
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    let others =
        present["collectors"].as_object().into_iter().flatten().filter(|(name, _)| *name != collector);
    for (name, theirs) in others.chain([(&collector.to_owned(), &mine)]) {
        let is_old = theirs["at"].as_u64().unwrap_or(0) + COUNTS_TTL_MS < now_ms;
        // Null in a merge patch removes the entry.
        collectors.insert(name.clone(), if is_old { Value::Null } else { theirs.clone() });
        for state in STATES.iter().filter(|_| !is_old) {
            *sums.entry(*state).or_default() += theirs[*state].as_u64().unwrap_or(0);
        }
    }
    let generation = object.metadata.generation.unwrap_or(0);
    let mut status = json!({
        "observedGeneration": generation,
        "revision": revision,
        "collectors": collectors,
        "conditions": [accepted_condition(&present["conditions"][0], generation, why_not)],
    });
    for state in STATES {
        status[state] = json!(sums.get(state).unwrap_or(&0));
    }
    (status != *present).then_some(status)
}

/// Returns the condition that reports whether the rule is valid.
fn accepted_condition(before: &Value, generation: i64, why_not: Option<&str>) -> Value {
    let is_accepted = why_not.is_none();
    let value = if is_accepted { "True" } else { "False" };
    let since = match before["lastTransitionTime"].as_str() {
        Some(since) if before["status"] == value => since.to_owned(),
        _ => jiff::Timestamp::now().round(jiff::Unit::Second).unwrap_or_default().to_string(),
    };
    json!({
        "type": "Accepted", "status": value, "reason": if is_accepted { "Valid" } else { "Invalid" },
        "message": why_not.unwrap_or("the rule is in force where its nodes have applied it"),
        "lastTransitionTime": since, "observedGeneration": generation,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_sums_all_collectors_and_is_written_once() {
        let mut object: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "gannet.dev/v1alpha1", "kind": "TriggerRule",
            "metadata": { "name": "a", "generation": 3 }, "spec": { "match": { "comm": ["x"] } },
        }))
        .unwrap();
        let counts = |applied| StateCounts([("applied", applied), ("skipped", 1)].into());
        let first = status(&object, "one", 7, None, &counts(3)).unwrap();
        assert_eq!((first["applied"].as_u64(), first["revision"].as_u64()), (Some(3), Some(7)));
        assert_eq!(first["conditions"][0]["status"], "True");
        object.data["status"] = first;
        assert_eq!(status(&object, "one", 7, None, &counts(3)), None);
        let second = status(&object, "two", 7, None, &counts(2)).unwrap();
        assert_eq!((second["applied"].as_u64(), second["skipped"].as_u64()), (Some(5), Some(2)));
        object.data["status"] = second;
        object.data["status"]["collectors"]["one"]["at"] = json!(1);
        let third = status(&object, "two", 7, Some("no"), &counts(2)).unwrap();
        assert_eq!((third["applied"].as_u64(), third["collectors"]["one"].is_null()), (Some(2), true));
        assert_eq!(third["conditions"][0]["message"], "no");
    }
}
