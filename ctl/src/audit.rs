//! What happened to the rules.

use gannet_proto::control::{AuditEntry, ListAuditRequest, node_rollout::State};
use serde_json::{Value, json};

use crate::{
    Console, Error,
    args::Format,
    client::Collector,
    output::{millis, show_time, table},
    rollout::state_name,
    rules::{error_json, sentence},
};

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
        || json!({ "entries": entries.iter().map(value).collect::<Vec<_>>() }),
        || {
            if entries.is_empty() {
                return "nothing has happened to the rules\n".to_owned();
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
    details.extend(entry.errors.iter().map(sentence));
    [
        show_time(entry.at),
        entry.revision.to_string(),
        match entry.state() {
            State::Unspecified => entry.action.clone(),
            state => state_name(state).to_owned(),
        },
        if entry.node.is_empty() { entry.who.clone() } else { format!("node {}", entry.node) },
        entry.scope.clone(),
        details.join("; "),
    ]
}

fn value(entry: &AuditEntry) -> Value {
    json!({
        "at_ms": millis(entry.at), "revision": entry.revision, "action": entry.action, "who": entry.who,
        "scope": entry.scope, "added": entry.added, "removed": entry.removed, "changed": entry.changed,
        "node": entry.node,
        "state": match entry.state() {
            State::Unspecified => Value::Null,
            state => state_name(state).into(),
        },
        "errors": entry.errors.iter().map(error_json).collect::<Vec<_>>(), "note": entry.note,
    })
}
