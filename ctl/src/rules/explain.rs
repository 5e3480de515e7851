//! `rules explain`: one rule on one node, from its definition to each process.

use std::fmt::Write as _;

use gannet_proto::{
    control::{
        ExplainRequest, ExplainResponse, ExplainedProcess, ListNodesRequest, Node, Rule, RuleError,
        RuleScope, node_rollout,
    },
    rules,
};
use serde_json::{Value, json};

use super::scopes;
use crate::{
    args::Format,
    client::Collector,
    error::Error,
    render::{
        Console, ago, clean, error_json, error_line, process_json, rollout_state, rule_state,
        rule_status_json, show_time, table,
    },
};

/// Prints everything that the collector and the node know about one rule on that node.
pub(crate) async fn explain(
    request: ExplainRequest,
    scope: Option<&str>,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let (id, node) = (request.rule_id.clone(), request.node.clone());
    let (id, node) = (id.as_str(), node.as_str());
    let (scopes, newest) = scopes(scope, collector).await?;
    let found: Vec<(&RuleScope, &Rule)> = scopes
        .iter()
        .flat_map(|scope| scope.rules.iter().filter(|rule| rule.id == id).map(move |rule| (scope, rule)))
        .collect();
    let nodes = collector.fleet().list_nodes(ListNodesRequest {}).await;
    let nodes = nodes.map_err(|status| collector.fault(&status))?.into_inner().nodes;
    let known: Vec<_> = nodes.iter().map(|node| node.name.clone()).collect();
    let Some(on) = nodes.into_iter().find(|have| have.name == node) else {
        let known = if known.is_empty() {
            "no node has connected yet".to_owned()
        } else {
            format!("it knows {}", known.join(", "))
        };
        return Err(Error::Failed(format!("the collector does not know a node `{node}`; {known}")));
    };
    if found.is_empty()
        && on.status.as_ref().is_none_or(|status| status.rules.iter().all(|rule| rule.rule_id != id))
    {
        return Err(Error::Failed(format!(
            "no scope has a rule `{id}`, and node `{node}` does not run one with that id"
        )));
    }
    // Only the node itself knows its processes. The collector knows everything else.
    let answer = match (on.connected, on.status.as_ref()) {
        (true, Some(_)) => Some(collector.fleet().explain(request).await),
        _ => None,
    };
    let (mut processes, mut processes_json) = (String::new(), Value::Null);
    match answer {
        None => {}
        Some(Ok(answer)) => {
            let answer = answer.into_inner();
            (processes, processes_json) = (explained(&answer), explained_json(&answer));
        }
        Some(Err(status)) => {
            let reason = gannet_proto::connect::explain("", &status);
            processes = format!("  processes  unknown: {reason}\n");
            processes_json = json!({ "unanswered": reason });
        }
    }
    for (scope, rule) in &found {
        let (facts, mut value) = facts(scope, rule, &on, newest);
        value["processes"] = processes_json.clone();
        console.show(format, || value, || facts + &processes)?;
    }
    if found.is_empty() {
        console.show(
            format,
            || json!({ "rule_id": id, "node": node, "defined": false }),
            || format!("rule {id} was removed, but node {node} still runs it: the newer rules have not arrived there or the node rejected them\n"),
        )?;
    }
    Ok(())
}

/// Formats why the rule does or does not profile each process.
fn explained(answer: &ExplainResponse) -> String {
    let ExplainResponse { processes, processes_seen, processes_matched, unsupported, .. } = answer;
    let mut text = format!("  processes  {processes_matched} of {processes_seen} match\n");
    for error in unsupported {
        text = text + "  no effect  " + &clean(&error_line(error)) + "\n";
    }
    let rows: Vec<_> = processes
        .iter()
        .map(|ExplainedProcess { process, matches, armed, reasons }| {
            let process = process.clone().unwrap_or_default();
            let state = match (matches, armed) {
                (true, true) => "profiled",
                (true, false) => "matches",
                (false, true) => "still sampled",
                (false, false) => "no",
            };
            [
                process.pid.to_string(),
                process.comm.clone(),
                state.to_owned(),
                match process.pod.as_str() {
                    "" => process.cgroup.clone(),
                    pod => format!("{pod} {}", process.container),
                },
                format!("{} {}", process.runtime, process.runtime_version).trim().to_owned(),
                if *matches { process.exe.clone() } else { reasons.join("; ") },
            ]
        })
        .collect();
    if !rows.is_empty() {
        text += &table([">PID", "COMMAND", "MATCHES", "WHERE", "RUNTIME", "EXECUTABLE, OR WHY NOT"], &rows);
    }
    text
}

fn explained_json(answer: &ExplainResponse) -> Value {
    let ExplainResponse { processes, processes_seen, processes_matched, unsupported, rule: _, status: _ } =
        answer;
    let list: Vec<_> = processes
        .iter()
        .map(|ExplainedProcess { process, matches, armed, reasons }| {
            let mut value = process_json(&process.clone().unwrap_or_default());
            value["matches"] = json!(matches);
            value["armed"] = json!(armed);
            value["reasons"] = json!(reasons);
            value
        })
        .collect();
    json!({
        "seen": processes_seen, "matched": processes_matched, "list": list,
        "unsupported": unsupported.iter().map(error_json).collect::<Vec<_>>(),
    })
}

/// Formats what the collector knows about a rule on a node, as text and as JSON.
fn facts(scope: &RuleScope, rule: &Rule, node: &Node, newest: u64) -> (String, Value) {
    let hello = node.hello.clone().unwrap_or_default();
    let selected = rules::is_for_node(rule, &node.name, &hello.labels);
    let rollout = node.rollout.clone().unwrap_or_default();
    let errors: Vec<&RuleError> =
        rollout.errors.iter().filter(|error| error.rule_id == rule.id || error.rule_id.is_empty()).collect();
    let status = node.status.clone().unwrap_or_default();
    let running = status.rules.iter().find(|status| status.rule_id == rule.id);
    let state = rollout_state(rollout.state());

    let mut text = format!("rule {} of scope {} on node {}\n", rule.id, scope.scope, node.name);
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<10} {value}");
    };
    line(
        "node",
        if node.connected {
            format!(
                "connected since {}, version {}, kernel {}",
                show_time(node.since),
                hello.version,
                hello.kernel
            )
        } else {
            format!(
                "offline since {}: it keeps its last rules until it connects again",
                show_time(node.since)
            )
        },
    );
    line(
        "selected",
        if selected {
            "yes: the rule's `nodes` selects this node".to_owned()
        } else {
            "no: the rule's `nodes` does not select this node (by selector, names or percent)".to_owned()
        },
    );
    line(
        "rollout",
        match rollout.state() {
            node_rollout::State::Rejected => {
                format!(
                    "{state} since {}: the node keeps revision {}",
                    show_time(rollout.since),
                    status.active_revision
                )
            }
            _ => format!(
                "{state} since {}; revision {newest}, active on the node: {}",
                show_time(rollout.since),
                status.active_revision
            ),
        },
    );
    for error in &errors {
        line("because", error_line(error));
    }
    match running {
        Some(running) => {
            let mut state = rule_state(running.state()).to_owned();
            if !running.reason.is_empty() {
                let _ = write!(state, ": {}", running.reason);
            }
            line("state", state);
            line("sampled", format!("{} processes", running.processes));
            line("samples", format!("{}, the last {}", running.samples, ago(running.last_sample)));
            if running.expires_at.is_some() {
                line("expires", show_time(running.expires_at));
            }
        }
        None => line("state", "the node does not run it".to_owned()),
    }
    for missing in &status.degraded {
        line("degraded", missing.clone());
    }
    let value = json!({
        "rule_id": rule.id, "scope": scope.scope, "node": node.name, "defined": true, "connected": node.connected,
        "selected": selected, "rollout": state, "revision": newest, "active_revision": status.active_revision,
        "errors": errors.iter().map(|error| error_json(error)).collect::<Vec<_>>(),
        "status": running.map(rule_status_json), "degraded": status.degraded,
    });
    (text, value)
}
