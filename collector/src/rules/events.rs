//! Kubernetes Events about rules. `kubectl describe trule` shows them below the status.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{
    Api, Client, Resource as _, ResourceExt as _,
    api::{DynamicObject, PostParams},
};
use serde_json::Value;

use super::status::condition;

/// Length of an Event's note that the API server accepts, in bytes.
const NOTE_BYTES: usize = 1024;

/// An Event about one rule.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RuleEvent {
    is_warning: bool,
    reason: &'static str,
    note: String,
}

/// Returns the Events for a change of a resource's status. `who` changed the resource last. `refusals` are the errors of
/// this collector's nodes.
pub(super) fn events(
    before: &Value,
    now: &Value,
    collector: &str,
    who: &str,
    refusals: &[String],
) -> Vec<RuleEvent> {
    let mut events = Vec::new();
    let (was, is) = (condition(before, "Accepted"), condition(now, "Accepted"));
    let accepted = is["status"] == "True";
    if (&was["status"], &was["observedGeneration"]) != (&is["status"], &is["observedGeneration"]) {
        let note = if accepted {
            format!("in revision {}, changed by {who}", now["revision"])
        } else {
            format!("changed by {who}: {}", is["message"].as_str().unwrap_or_default())
        };
        let reason = if accepted { "Accepted" } else { "Invalid" };
        events.push(RuleEvent { is_warning: !accepted, reason, note: cut(note) });
    }
    let (before, now) = (&before["collectors"][collector], &now["collectors"][collector]);
    let count = |of: &Value, state: &str| of[state].as_u64().unwrap_or(0);
    let settled = ["applied", "partial", "rejected"];
    // Published when all nodes have answered, and not for each node of a thousand.
    let has_changed = settled.iter().any(|state| count(before, state) != count(now, state));
    if accepted && has_changed && count(now, "pending") == 0 {
        let [applied, partial, rejected] = settled.map(|state| count(now, state));
        if partial + rejected > 0 {
            let refusals = refusals.join("; ");
            let note = format!(
                "in force on {applied} nodes, without effect on {partial}, rejected by {rejected}: {refusals}"
            );
            events.push(RuleEvent { is_warning: true, reason: "NotEverywhere", note: cut(note) });
        } else if applied > 0 {
            let note = format!("in force on {applied} nodes");
            events.push(RuleEvent { is_warning: false, reason: "Applied", note });
        }
    }
    events
}

/// Cuts a note at the limit.
fn cut(mut note: String) -> String {
    note.truncate(gannet_base::head(&note, NOTE_BYTES).len());
    note
}

/// Publishes Events in one namespace.
pub(super) struct RuleEvents {
    api: Api<Event>,
    namespace: String,
    collector: String,
    /// A run of failures is logged once.
    is_refused: AtomicBool,
}

impl RuleEvents {
    pub(super) fn new(client: Client, namespace: &str, collector: &str) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            namespace: namespace.to_owned(),
            collector: collector.to_owned(),
            is_refused: AtomicBool::new(false),
        }
    }

    /// Publishes Events of a resource. A failure is only logged, because rules work without Events.
    pub(super) async fn publish(&self, object: &DynamicObject, events: Vec<RuleEvent>) {
        for RuleEvent { is_warning, reason, note } in events {
            let at = jiff::Timestamp::now();
            let event = Event {
                metadata: ObjectMeta {
                    name: Some(format!("{}.{:x}", object.name_any(), at.as_nanosecond())),
                    namespace: Some(self.namespace.clone()),
                    ..ObjectMeta::default()
                },
                action: Some("Publish".into()),
                event_time: Some(MicroTime(at)),
                note: Some(note),
                reason: Some(reason.into()),
                regarding: Some(ObjectReference {
                    namespace: Some(self.namespace.clone()),
                    ..reference(object)
                }),
                reporting_controller: Some("gannet.dev/collector".into()),
                reporting_instance: Some(self.collector.clone()),
                type_: Some(if is_warning { "Warning" } else { "Normal" }.into()),
                ..Event::default()
            };
            match self.api.create(&PostParams::default(), &event).await {
                Ok(_) => self.is_refused.store(false, Relaxed),
                Err(error) => {
                    if !self.is_refused.swap(true, Relaxed) {
                        tracing::warn!(
                            "cannot publish Kubernetes Events of rules: {error}; may the collector create events \
                             (events.k8s.io)?"
                        );
                    }
                }
            }
        }
    }
}

fn reference(object: &DynamicObject) -> ObjectReference {
    let meta = object.meta();
    let (api_version, kind) = object.types.clone().map(|types| (types.api_version, types.kind)).unzip();
    ObjectReference {
        api_version,
        kind,
        name: meta.name.clone(),
        uid: meta.uid.clone(),
        resource_version: meta.resource_version.clone(),
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(accepted: bool, generation: u64, counts: &Value) -> Value {
        let condition = json!({
            "type": "Accepted", "status": if accepted { "True" } else { "False" }, "observedGeneration": generation, "message": "match.com: no",
        });
        json!({ "revision": 7, "conditions": [condition], "collectors": { "one": counts } })
    }

    #[test]
    fn events_come_once_and_after_all_nodes_have_answered() {
        let steps = [
            (status(true, 1, &json!({ "pending": 2 })), vec!["Accepted: in revision 7, changed by anna"]),
            (status(true, 1, &json!({ "pending": 1, "applied": 1 })), vec![]),
            (status(true, 1, &json!({ "applied": 2 })), vec!["Applied: in force on 2 nodes"]),
            (status(true, 1, &json!({ "applied": 2, "skipped": 1 })), vec![]),
            (
                status(true, 2, &json!({ "applied": 1, "rejected": 1 })),
                vec![
                    "Accepted: in revision 7, changed by anna",
                    "!NotEverywhere: in force on 1 nodes, without effect on 0, rejected by 1: n1: capture.hz: no",
                ],
            ),
            (
                status(false, 3, &json!({ "applied": 1, "rejected": 1 })),
                vec!["!Invalid: changed by anna: match.com: no"],
            ),
        ];
        let mut before = Value::Null;
        for (now, expected) in steps {
            let published: Vec<String> = events(&before, &now, "one", "anna", &["n1: capture.hz: no".into()])
                .into_iter()
                .map(|RuleEvent { is_warning, reason, note }| {
                    format!("{}{reason}: {note}", if is_warning { "!" } else { "" })
                })
                .collect();
            assert_eq!(published, expected, "{now}");
            before = now;
        }
    }
}
