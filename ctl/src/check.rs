//! Whether collector and nodes are in order.

use gannet_proto::control::{ListNodesRequest, Node, node_rollout::State, rule_status};
use serde_json::json;

use crate::{
    Console, Error,
    args::Format,
    client::Collector,
    output::{ago, clean},
    rules::{count, sentence},
};

pub(crate) async fn run(
    only: Option<&str>,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let answer = collector.fleet().list_nodes(ListNodesRequest {}).await;
    let mut nodes = answer.map_err(|status| collector.fault(&status))?.into_inner().nodes;
    nodes.retain(|node| only.is_none_or(|only| only == node.name));
    let mut wrong: Vec<(String, String)> = Vec::new();
    match only {
        Some(only) if nodes.is_empty() => wrong.push((
            only.to_owned(),
            "the collector does not know it: does `gannet-agent run` with this --node dial this collector?"
                .into(),
        )),
        None if nodes.is_empty() => wrong.push((
            String::new(),
            "no node has ever connected: start gannet-agent run --collector URL on one".into(),
        )),
        _ => {}
    }
    for node in &nodes {
        wrong.extend(troubles(node).into_iter().map(|trouble| (node.name.clone(), trouble)));
    }
    console.show(
        format,
        || {
            let wrong: Vec<_> =
                wrong.iter().map(|(node, trouble)| json!({ "node": node, "trouble": trouble })).collect();
            json!({ "nodes": nodes.len(), "in_order": wrong.is_empty(), "troubles": wrong })
        },
        || {
            if wrong.is_empty() {
                return format!("collector and {} are in order\n", count(nodes.len(), "node"));
            }
            wrong.iter().fold(String::new(), |text, (node, trouble)| {
                let line = if node.is_empty() { trouble.clone() } else { format!("{node}: {trouble}") };
                text + &clean(&line) + "\n"
            })
        },
    )?;
    if wrong.is_empty() { Ok(()) } else { Err(Error::No) }
}

/// What is wrong with a node, in words.
fn troubles(node: &Node) -> Vec<String> {
    let mut troubles = Vec::new();
    if !node.connected {
        troubles.push(format!(
            "not connected, last seen {}: is gannet-agent running there, and what does its log say?",
            ago(node.last_seen)
        ));
        return troubles;
    }
    let hello = node.hello.clone().unwrap_or_default();
    if hello.version != gannet_proto::VERSION {
        troubles.push(format!(
            "its agent is version {}, and this gannetctl is {}: update the older one",
            hello.version,
            gannet_proto::VERSION
        ));
    }
    let status = node.status.clone().unwrap_or_default();
    troubles.extend(status.degraded.iter().map(|part| format!("degraded: {part}")));
    if let Some(rollout) = &node.rollout {
        let what = match rollout.state() {
            State::Rejected => Some("has rejected the newest rules and keeps its former ones"),
            State::Partial => Some("has rules that cannot work there"),
            _ => None,
        };
        if let Some(what) = what {
            let why: Vec<_> = rollout.errors.iter().map(sentence).collect();
            troubles.push(format!("{what}: {}", why.join("; ")));
        }
    }
    for rule in &status.rules {
        if rule.state() == rule_status::State::Unsupported {
            troubles.push(format!("rule `{}` cannot work there: {}", rule.rule_id, rule.reason));
        }
    }
    if let Some(ledger) = &status.ledger {
        let lost: u64 = ledger.lost.values().sum();
        // One in a hundred changes no picture.
        if lost.saturating_mul(100) > ledger.taken {
            let reasons: Vec<_> = ledger.lost.iter().map(|(reason, n)| format!("{reason} {n}")).collect();
            troubles.push(format!("{lost} of {} samples are lost: {}", ledger.taken, reasons.join(", ")));
        }
    }
    troubles
}

#[cfg(test)]
mod tests {
    use gannet_proto::control::{Ledger, NodeHello, NodeStatus};

    use super::*;

    #[test]
    fn a_node_in_order_has_no_troubles_and_one_that_is_not_has_each_of_them() {
        let hello = NodeHello { version: gannet_proto::VERSION.into(), ..NodeHello::default() };
        let good = Node {
            name: "n1".into(),
            connected: true,
            hello: Some(hello.clone()),
            status: Some(NodeStatus {
                ledger: Some(Ledger { taken: 1000, delivered: 1000, ..Ledger::default() }),
                ..NodeStatus::default()
            }),
            ..Node::default()
        };
        assert_eq!(troubles(&good), Vec::<String>::new());
        let mut bad = good.clone();
        bad.hello = Some(NodeHello { version: "0.0.1".into(), ..hello });
        bad.status = Some(NodeStatus {
            degraded: vec!["control: x".into()],
            ledger: Some(Ledger {
                taken: 1000,
                lost: [("ring_full".to_owned(), 100)].into(),
                ..Ledger::default()
            }),
            ..NodeStatus::default()
        });
        let found = troubles(&bad);
        for words in ["version 0.0.1", "degraded: control", "100 of 1000 samples are lost: ring_full 100"] {
            assert!(found.iter().any(|trouble| trouble.contains(words)), "{found:?}");
        }
        assert_eq!(found.len(), 3);
        assert!(troubles(&Node::default())[0].contains("not connected"));
    }
}
