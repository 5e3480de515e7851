//! `check`: finds problems of the collector and the nodes, each with its remedy.

use gannet_proto::control::{ListNodesRequest, Node, node_rollout::State, rule_status};
use serde_json::json;

use crate::{
    args::Format,
    client::Collector,
    error::Error,
    render::{Console, ago, clean, count, error_line},
};

/// Checks all nodes, or the one named `only`. Fails with [`Error::CheckFailed`] after it has printed the problems.
pub(crate) async fn run(
    only: Option<&str>,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let answer = collector.fleet().list_nodes(ListNodesRequest {}).await;
    let mut nodes = answer.map_err(|status| collector.fault(&status))?.into_inner().nodes;
    nodes.retain(|node| only.is_none_or(|only| only == node.name));
    let mut problems: Vec<(String, String)> = Vec::new();
    match only {
        Some(only) if nodes.is_empty() => problems.push((
            only.to_owned(),
            "the collector does not know this node; does `gannet-agent run` with this --node dial this collector?"
                .into(),
        )),
        None if nodes.is_empty() => problems.push((
            String::new(),
            "no node has connected yet; start `gannet-agent run --endpoint URL` on one".into(),
        )),
        _ => {}
    }
    for node in &nodes {
        problems.extend(problems_of(node).into_iter().map(|problem| (node.name.clone(), problem)));
    }
    console.show(
        format,
        || {
            let list: Vec<_> =
                problems.iter().map(|(node, problem)| json!({ "node": node, "trouble": problem })).collect();
            json!({ "nodes": nodes.len(), "in_order": problems.is_empty(), "troubles": list })
        },
        || {
            if problems.is_empty() {
                return format!("no problems: the collector and {}\n", count(nodes.len(), "node"));
            }
            problems.iter().fold(String::new(), |text, (node, problem)| {
                let line = if node.is_empty() { problem.clone() } else { format!("{node}: {problem}") };
                text + &clean(&line) + "\n"
            })
        },
    )?;
    if problems.is_empty() { Ok(()) } else { Err(Error::CheckFailed) }
}

/// Returns one line for each problem of a node. Of an offline node nothing else is known.
fn problems_of(node: &Node) -> Vec<String> {
    let mut problems = Vec::new();
    if !node.connected {
        problems.push(format!(
            "offline, last seen {}; does gannet-agent run there, and what does its log say?",
            ago(node.last_seen)
        ));
        return problems;
    }
    let hello = node.hello.clone().unwrap_or_default();
    if hello.version != gannet_proto::VERSION {
        problems.push(format!(
            "the agent has version {} and this gannetctl {}; update the older one",
            hello.version,
            gannet_proto::VERSION
        ));
    }
    let status = node.status.clone().unwrap_or_default();
    problems.extend(status.degraded.iter().map(|part| format!("degraded: {part}")));
    if let Some(rollout) = &node.rollout {
        let what = match rollout.state() {
            State::Rejected => Some("rejected the newest rules and keeps the previous ones"),
            State::Partial => Some("cannot run every rule"),
            _ => None,
        };
        if let Some(what) = what {
            let why: Vec<_> = rollout.errors.iter().map(error_line).collect();
            problems.push(format!("{what}: {}", why.join("; ")));
        }
    }
    for rule in &status.rules {
        if rule.state() == rule_status::State::Unsupported {
            problems.push(format!("cannot run rule `{}`: {}", rule.rule_id, rule.reason));
        }
    }
    if let Some(ledger) = &status.ledger {
        let lost: u64 = ledger.lost.values().sum();
        if ledger.unaccounted != 0 {
            problems.push(format!(
                "{} samples are unaccounted for, which is a fault of Gannet: report it with the agent's log",
                ledger.unaccounted
            ));
        }
        // Losses up to 1 % do not distort a profile.
        if lost.saturating_mul(100) > ledger.taken {
            let reasons: Vec<_> = ledger.lost.iter().map(|(reason, n)| format!("{reason} {n}")).collect();
            problems.push(format!("lost {lost} of {} samples: {}", ledger.taken, reasons.join(", ")));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use gannet_proto::control::{Ledger, NodeHello, NodeStatus};

    use super::*;

    #[test]
    fn each_problem_of_a_node_has_its_line() {
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
        assert_eq!(problems_of(&good), Vec::<String>::new());
        let mut bad = good.clone();
        bad.hello = Some(NodeHello { version: "0.0.1".into(), ..hello });
        bad.status = Some(NodeStatus {
            degraded: vec!["control: x".into()],
            ledger: Some(Ledger {
                taken: 1000,
                lost: [("ring_full".to_owned(), 100)].into(),
                unaccounted: 900,
                ..Ledger::default()
            }),
            ..NodeStatus::default()
        });
        let found = problems_of(&bad);
        for words in [
            "900 samples are unaccounted",
            "version 0.0.1",
            "degraded: control",
            "lost 100 of 1000 samples: ring_full 100",
        ] {
            assert!(found.iter().any(|problem| problem.contains(words)), "{found:?}");
        }
        assert_eq!(found.len(), 4);
        assert!(problems_of(&Node::default())[0].contains("offline"));
    }
}
