//! The list of nodes.

use gannet_proto::control::{ListNodesRequest, Node};
use serde_json::{Value, json};

use crate::{
    args::Format,
    client::Collector,
    error::Error,
    render::{Console, ago, bytes, millis, node_rollout_json, rollout_state, rule_status_json, span, table},
};

/// Lists all nodes that ever connected.
pub(crate) async fn list(
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let answer = collector.fleet().list_nodes(ListNodesRequest {}).await;
    let nodes = answer.map_err(|status| collector.fault(&status))?.into_inner().nodes;
    console.show(
        format,
        || json!({ "nodes": nodes.iter().map(node_json).collect::<Vec<_>>() }),
        || {
            if nodes.is_empty() {
                return "no node has connected yet; start `gannet-agent run --endpoint URL` on one\n"
                    .to_owned();
            }
            let rows: Vec<_> = nodes.iter().map(row).collect();
            let headings = [
                "NODE",
                "STATE",
                "SEEN",
                "VERSION",
                "KERNEL",
                "ARCH",
                ">REVISION",
                "ROLLOUT",
                ">RULES",
                ">SAMPLED",
                ">TAKEN",
                ">LOST",
                ">RSS",
                "DEGRADED",
            ];
            table(headings, &rows)
        },
    )
}

fn row(node: &Node) -> [String; 14] {
    let hello = node.hello.clone().unwrap_or_default();
    let status = node.status.clone().unwrap_or_default();
    let ledger = status.ledger.clone().unwrap_or_default();
    let lost: u64 = ledger.lost.values().sum();
    [
        node.name.clone(),
        if node.connected { "connected" } else { "offline" }.to_owned(),
        ago(node.last_seen),
        hello.version,
        hello.kernel,
        hello.arch,
        status.active_revision.to_string(),
        node.rollout.as_ref().map_or("-", |rollout| rollout_state(rollout.state())).to_owned(),
        status.rules.len().to_string(),
        status.processes_armed.to_string(),
        ledger.taken.to_string(),
        lost.to_string(),
        bytes(status.rss_bytes),
        status.degraded.join("; "),
    ]
}

fn node_json(node: &Node) -> Value {
    let hello = node.hello.clone().unwrap_or_default();
    let status = node.status.clone().unwrap_or_default();
    let ledger = status.ledger.unwrap_or_default();
    json!({
        "name": node.name, "connected": node.connected, "since_ms": millis(node.since),
        "last_seen_ms": millis(node.last_seen), "version": hello.version, "kernel": hello.kernel, "arch": hello.arch,
        "cpus": hello.cpus, "labels": hello.labels, "features": hello.features,
        "active_revision": status.active_revision, "degraded": status.degraded, "rss_bytes": status.rss_bytes,
        "cpu_seconds": span(status.cpu).map(|cpu| cpu.as_secs_f64()), "spool_bytes": status.spool_bytes,
        "processes_armed": status.processes_armed,
        "ledger": {
            "ticks": ledger.ticks, "taken": ledger.taken, "delivered": ledger.delivered, "pending": ledger.pending,
            "lost": ledger.lost, "unaccounted": ledger.unaccounted,
        },
        "rules": status.rules.iter().map(rule_status_json).collect::<Vec<_>>(),
        "rollout": node.rollout.as_ref().map(node_rollout_json),
    })
}
