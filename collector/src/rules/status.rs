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

/// Returns the errors of the first few nodes that do not run a rule as it asks. A node rejects its rules as a whole, so
/// the errors of other rules in a rejected set are errors of this one too.
pub(super) fn refusals(id: &str, nodes: &[NodeRollout]) -> Vec<String> {
    let refusals = nodes.iter().flat_map(|node| {
        let is_rejected = node.state() == State::Rejected;
        let (mine, others): (Vec<_>, Vec<_>) =
            node.errors.iter().partition(|error| error.rule_id == id || error.rule_id.is_empty());
        let mine = mine.into_iter().map(|error| format!("{}: {}: {}", node.node, error.field, error.reason));
        let others = others
            .into_iter()
            .filter(move |_| is_rejected)
            .map(|error| format!("{}: rule {}: {}: {}", node.node, error.rule_id, error.field, error.reason));
        mine.chain(others)
    });
    refusals.take(SHOWN_REFUSALS).collect()
}

/// Returns the condition of this type in a status.
pub(super) fn condition<'a>(status: &'a Value, kind: &str) -> &'a Value {
    let of_kind = status["conditions"].as_array().into_iter().flatten().find(|one| one["type"] == kind);
    of_kind.unwrap_or(&Value::Null)
}

/// Returns the status to write, or `None` if the resource shows it already. `why_not`: the fault of an invalid rule.
/// `refusals`: the errors of this collector's nodes.
pub(super) fn status(
    object: &DynamicObject,
    collector: &str,
    revision: u64,
    why_not: Option<&str>,
    counts: &StateCounts,
    refusals: &[String],
) -> Option<Value> {
    let present = &object.data["status"];
    let now_ms = time::now_ms();
    let mut mine: Value =
        STATES.iter().map(|state| ((*state).to_owned(), json!(counts.0.get(state).unwrap_or(&0)))).collect();
    let before = &present["collectors"][collector];
    if !refusals.is_empty() {
        mine["why"] = json!(refusals.join("; "));
    } else if !before["why"].is_null() {
        mine["why"] = Value::Null;
    }
    let is_same = STATES.iter().chain(&["why"]).all(|field| before[*field] == mine[*field]);
    let written_ms = before["at"].as_u64().unwrap_or(0);
    let is_fresh = written_ms + COUNTS_REFRESH_MS > now_ms;
    mine["at"] = json!(if is_same && is_fresh { written_ms } else { now_ms });
    let mut collectors = serde_json::Map::new();
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    let mut why: Vec<String> = Vec::new();
    let others =
        present["collectors"].as_object().into_iter().flatten().filter(|(name, _)| *name != collector);
    for (name, theirs) in others.chain([(&collector.to_owned(), &mine)]) {
        let is_old = theirs["at"].as_u64().unwrap_or(0) + COUNTS_TTL_MS < now_ms;
        // Null in a merge patch removes the entry.
        collectors.insert(name.clone(), if is_old { Value::Null } else { theirs.clone() });
        for state in STATES.iter().filter(|_| !is_old) {
            *sums.entry(*state).or_default() += theirs[*state].as_u64().unwrap_or(0);
        }
        why.extend(theirs["why"].as_str().filter(|why| !is_old && !why.is_empty()).map(str::to_owned));
    }
    let generation = object.metadata.generation.unwrap_or(0);
    let mut status = json!({
        "observedGeneration": generation,
        "revision": revision,
        "collectors": collectors,
        "conditions": [
            accepted_condition(present, generation, why_not),
            applied_condition(present, generation, why_not, &sums, &why.join("; ")),
        ],
    });
    for state in STATES {
        status[state] = json!(sums.get(state).unwrap_or(&0));
    }
    (status != *present).then_some(status)
}

/// Returns the condition that reports whether the rule is valid.
fn accepted_condition(status: &Value, generation: i64, why_not: Option<&str>) -> Value {
    let (value, reason) = if why_not.is_none() { ("True", "Valid") } else { ("False", "Invalid") };
    let message = why_not.unwrap_or("the rule is in force where its nodes have applied it");
    new_condition(status, generation, "Accepted", [value, reason, message])
}

/// Returns the condition that reports whether the nodes run the rule.
fn applied_condition(
    status: &Value,
    generation: i64,
    why_not: Option<&str>,
    sums: &BTreeMap<&str, u64>,
    why: &str,
) -> Value {
    let [applied, partial, rejected, pending, offline] =
        ["applied", "partial", "rejected", "pending", "offline"]
            .map(|state| sums.get(state).copied().unwrap_or(0));
    let counts = format!(
        "in force on {applied} nodes, without effect on {partial}, rejected by {rejected}, no answer yet from {pending}, \
         {offline} not connected"
    );
    let (value, reason, message) = if why_not.is_some() {
        ("False", "Invalid", "this form of the rule is not in force: see the condition Accepted".to_owned())
    } else if rejected > 0 {
        ("False", "Rejected", format!("{counts}: {why}"))
    } else if partial > 0 {
        ("False", "WithoutEffect", format!("{counts}: {why}"))
    } else if pending > 0 {
        ("Unknown", "Pending", counts)
    } else if applied > 0 {
        ("True", "InForce", counts)
    } else {
        ("False", "NoNode", format!("no connected node is meant: {counts}"))
    };
    new_condition(status, generation, "Applied", [value, reason, &message])
}

/// Returns a condition. Its time is that of the last change of its value.
fn new_condition(status: &Value, generation: i64, kind: &str, [value, reason, message]: [&str; 3]) -> Value {
    let before = condition(status, kind);
    let since = match before["lastTransitionTime"].as_str() {
        Some(since) if before["status"] == value => since.to_owned(),
        _ => jiff::Timestamp::now().round(jiff::Unit::Second).unwrap_or_default().to_string(),
    };
    json!({
        "type": kind, "status": value, "reason": reason, "message": message,
        "lastTransitionTime": since, "observedGeneration": generation,
    })
}

#[cfg(test)]
mod tests {
    use gannet_proto::control::RuleError;

    use super::*;

    /// Collector, its counts, its refusals, and the condition to expect.
    type Step<'a> = (&'a str, &'a [(&'static str, u64)], &'a [String], [&'a str; 2]);

    #[test]
    fn the_status_sums_all_collectors_and_is_written_once() {
        let mut object: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "gannet.dev/v1alpha1", "kind": "TriggerRule",
            "metadata": { "name": "a", "generation": 3 }, "spec": { "match": { "comm": ["x"] } },
        }))
        .unwrap();
        let counts = |applied| StateCounts([("applied", applied), ("skipped", 1)].into());
        let first = status(&object, "one", 7, None, &counts(3), &[]).unwrap();
        assert_eq!((first["applied"].as_u64(), first["revision"].as_u64()), (Some(3), Some(7)));
        assert_eq!(first["conditions"][0]["status"], "True");
        object.data["status"] = first;
        assert_eq!(status(&object, "one", 7, None, &counts(3), &[]), None);
        let second = status(&object, "two", 7, None, &counts(2), &[]).unwrap();
        assert_eq!((second["applied"].as_u64(), second["skipped"].as_u64()), (Some(5), Some(2)));
        object.data["status"] = second;
        object.data["status"]["collectors"]["one"]["at"] = json!(1);
        let third = status(&object, "two", 7, Some("no"), &counts(2), &[]).unwrap();
        assert_eq!((third["applied"].as_u64(), third["collectors"]["one"].is_null()), (Some(2), true));
        assert_eq!(third["conditions"][0]["message"], "no");
    }
    #[test]
    fn applied_says_what_the_nodes_of_all_collectors_answered() {
        let mut object: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "gannet.dev/v1alpha1", "kind": "TriggerRule",
            "metadata": { "name": "a", "generation": 4 }, "spec": { "match": { "comm": ["x"] } },
        }))
        .unwrap();
        let steps: [Step<'_>; 7] = [
            ("one", &[("pending", 2)], &[], ["Unknown", "Pending"]),
            ("one", &[("applied", 1), ("offline", 1)], &[], ["True", "InForce"]),
            ("two", &[("pending", 1)], &[], ["Unknown", "Pending"]),
            ("two", &[("rejected", 1), ("pending", 1)], &["n3: hz: too high".into()], ["False", "Rejected"]),
            // What another collector's node refuses stays in the message.
            ("one", &[("partial", 1)], &["n1: when: no".into()], ["False", "Rejected"]),
            ("two", &[("applied", 1)], &[], ["False", "WithoutEffect"]),
            ("one", &[("skipped", 1)], &[], ["True", "InForce"]),
        ];
        for (collector, counts, why, [value, reason]) in steps {
            let counts = StateCounts(counts.iter().copied().collect());
            object.data["status"] = status(&object, collector, 7, None, &counts, why).unwrap();
            let applied = condition(&object.data["status"], "Applied");
            assert_eq!(
                (&applied["status"], &applied["reason"]),
                (&json!(value), &json!(reason)),
                "{applied}"
            );
            assert_eq!(applied["observedGeneration"], 4);
            let message = applied["message"].as_str().unwrap();
            assert!(why.iter().all(|why| message.contains(why)), "{message}");
        }
        let none = status(&object, "two", 7, None, &StateCounts([("skipped", 1)].into()), &[]).unwrap();
        assert_eq!(condition(&none, "Applied")["reason"], "NoNode");
        let invalid = status(&object, "two", 7, Some("no"), &StateCounts::default(), &[]).unwrap();
        assert_eq!(condition(&invalid, "Applied")["status"], "False");
    }

    #[test]
    fn a_rejected_set_names_the_rule_that_is_at_fault() {
        let error =
            |rule: &str| RuleError { rule_id: rule.into(), field: "capture.hz".into(), reason: "no".into() };
        let node = |state: State, errors| NodeRollout {
            node: "n1".into(),
            state: state.into(),
            errors,
            ..NodeRollout::default()
        };
        let rejected = [node(State::Rejected, vec![error("bad"), error("mine")])];
        assert_eq!(refusals("mine", &rejected), ["n1: capture.hz: no", "n1: rule bad: capture.hz: no"]);
        assert_eq!(refusals("mine", &[node(State::Partial, vec![error("bad")])]), Vec::<String>::new());
    }
}
