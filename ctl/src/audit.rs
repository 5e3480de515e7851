//! The audit log: who changed the rules, and how each node answered.

use gannet_proto::control::{AuditEntry, ListAuditRequest, node_rollout::State};
use serde_json::{Value, json};

use crate::{
    args::Format,
    client::Collector,
    error::Error,
    render::{Console, error_json, error_line, millis, rollout_state, show_time, table},
};

/// Lists audit entries, newest first.
pub(crate) async fn list(
    request: ListAuditRequest,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let answer = collector.triggers().list_audit(request).await;
    let entries = answer.map_err(|status| collector.fault(&status))?.into_inner().entries;
    console.show(
        format,
        || json!({ "entries": entries.iter().map(entry_json).collect::<Vec<_>>() }),
        || {
            if entries.is_empty() {
                return "the audit log has no entries\n".to_owned();
            }
            let rows: Vec<_> = entries.iter().map(row).collect();
            table(["AT", ">REVISION", "WHAT", "WHO", "SCOPE", "DETAILS"], &rows)
        },
    )
}

fn row(entry: &AuditEntry) -> [String; 6] {
    let mut details = Vec::new();
    for (what, rules) in [("added", &entry.added), ("removed", &entry.removed), ("changed", &entry.changed)] {
        if !rules.is_empty() {
            details.push(format!("{what} {}", rules.join(", ")));
        }
    }
    if !entry.note.is_empty() {
        details.push(entry.note.clone());
    }
    details.extend(entry.errors.iter().map(error_line));
    [
        show_time(entry.at),
        entry.revision.to_string(),
        match entry.state() {
            State::Unspecified => entry.action.clone(),
            state => rollout_state(state).to_owned(),
        },
        if entry.node.is_empty() { entry.who.clone() } else { format!("node {}", entry.node) },
        entry.scope.clone(),
        details.join("; "),
    ]
}

fn entry_json(entry: &AuditEntry) -> Value {
    json!({
        "at_ms": millis(entry.at), "revision": entry.revision, "action": entry.action, "who": entry.who,
        "scope": entry.scope, "added": entry.added, "removed": entry.removed, "changed": entry.changed,
        "node": entry.node,
        "state": match entry.state() {
            State::Unspecified => Value::Null,
            state => rollout_state(state).into(),
        },
        "errors": entry.errors.iter().map(error_json).collect::<Vec<_>>(), "note": entry.note,
    })
}
