//! The responses of the HTTP API: the gRPC messages as JSON.

use std::{collections::BTreeMap, fmt::Write as _};

use gannet_proto::{
    control::{self, node_rollout, rule_status},
    query as api,
};
use prost_types::{Duration, Timestamp};
use serde_json::{Value, json};

use crate::{
    query::{CaptureRun, Heatmap},
    time,
};

fn ms(at: Option<&Timestamp>) -> u64 {
    at.and_then(time::to_ms).unwrap_or(0)
}

fn span_ms(d: Option<&Duration>) -> u64 {
    d.and_then(time::duration_to_ms).unwrap_or(0)
}

pub(super) fn series(series: &[api::SeriesInfo]) -> Value {
    let series: Vec<Value> = series
        .iter()
        .map(|s| {
            json!({
                "labels": s.labels, "profiles": s.profiles, "samples": s.samples,
                "first_ms": ms(s.first.as_ref()), "last_ms": ms(s.last.as_ref()), "sample_types": s.sample_types,
            })
        })
        .collect();
    json!({ "series": series })
}

pub(super) fn profiles(profiles: &[api::ProfileInfo], next_page_token: &str) -> Value {
    let profiles: Vec<Value> = profiles
        .iter()
        .map(|p| {
            json!({
                "id": p.id, "labels": p.labels, "start_ms": ms(p.start.as_ref()),
                "duration_ms": span_ms(p.duration.as_ref()), "sample_types": p.sample_types, "samples": p.samples,
                "bytes": p.bytes, "rule_id": p.rule_id, "revision": p.revision, "reason": p.reason,
            })
        })
        .collect();
    json!({ "profiles": profiles, "next_page_token": next_page_token })
}

/// Returns what a query read. The time has parts of a millisecond.
pub(super) fn read_report(read: Option<&api::ReadReport>) -> Value {
    let Some(read) = read else { return Value::Null };
    let api::ReadReport {
        segment_profiles,
        segment_bytes,
        table_profiles,
        table_bytes,
        sum_profiles,
        sum_bytes,
        cached_profiles,
        took,
    } = read;
    let took =
        took.as_ref().map_or(0.0, |took| took.seconds as f64 * 1e3 + f64::from(took.nanos / 1000) / 1e3);
    json!({
        "segment_profiles": segment_profiles, "segment_bytes": segment_bytes, "table_profiles": table_profiles,
        "table_bytes": table_bytes, "sum_profiles": sum_profiles, "sum_bytes": sum_bytes, "cached_profiles": cached_profiles, "took_ms": took,
    })
}

/// Returns a flame graph. The code is free of recursion, because a stack may have a thousand frames.
pub(super) fn flamegraph(graph: &api::FlameGraphResponse) -> String {
    let api::FlameGraphResponse {
        unit,
        total,
        base_total,
        profiles,
        base_profiles,
        root,
        sample_type,
        nodes: _,
        unreadable_profiles,
        names_incomplete,
        read,
    } = graph;
    let head = json!({
        "unit": unit, "sample_type": sample_type, "total": total, "base_total": base_total, "profiles": profiles,
        "base_profiles": base_profiles, "unreadable_profiles": unreadable_profiles, "names_incomplete": names_incomplete,
        "read": read_report(read.as_ref()),
    });
    let mut out = head.to_string();
    out.pop();
    out.push_str(",\"root\":");
    let mut open = Vec::new();
    let mut next = root.as_ref();
    if next.is_none() {
        out.push_str("null");
    }
    loop {
        if let Some(node) = next {
            begin_flame_node(node, &mut out);
            open.push(node.children.iter());
        }
        let Some(children) = open.last_mut() else { break };
        let is_first = out.ends_with('[');
        next = children.next();
        if next.is_none() {
            out.push_str("]}");
            open.pop();
        } else if !is_first {
            out.push(',');
        }
    }
    out.push('}');
    out
}

/// Writes a node up to its children, without its many zero and empty fields.
fn begin_flame_node(node: &api::FlameNode, out: &mut String) {
    let api::FlameNode {
        name,
        file,
        total,
        self_,
        base_total,
        base_self,
        children: _,
        kernel,
        inlined,
        parent: _,
        guessed,
        base_guessed,
    } = node;
    out.push_str("{\"name\":");
    out.push_str(&Value::from(name.as_str()).to_string());
    if !file.is_empty() {
        out.push_str(",\"file\":");
        out.push_str(&Value::from(file.as_str()).to_string());
    }
    // Writing into a string does not fail.
    for (key, value) in [
        ("total", total),
        ("self", self_),
        ("base_total", base_total),
        ("base_self", base_self),
        ("guessed", guessed),
        ("base_guessed", base_guessed),
    ] {
        if *value > 0 {
            let _ = write!(out, ",\"{key}\":{value}");
        }
    }
    for (key, value) in [("kernel", kernel), ("inlined", inlined)] {
        if *value {
            let _ = write!(out, ",\"{key}\":true");
        }
    }
    out.push_str(",\"children\":[");
}

pub(super) fn top(top: &api::TopResponse) -> Value {
    let rows: Vec<Value> = top
        .rows
        .iter()
        .map(|r| {
            json!({
                "name": r.name, "file": r.file, "self": r.self_, "total": r.total,
                "base_self": r.base_self, "base_total": r.base_total,
            })
        })
        .collect();
    json!({
        "unit": top.unit, "sample_type": top.sample_type, "total": top.total, "base_total": top.base_total,
        "rows": rows, "unreadable_profiles": top.unreadable_profiles, "names_incomplete": top.names_incomplete,
        "read": read_report(top.read.as_ref()),
    })
}

pub(super) fn timeline(timeline: &api::TimelineResponse) -> Value {
    let points: Vec<Value> = timeline
        .points
        .iter()
        .map(|p| json!({ "t_ms": ms(p.at.as_ref()), "value": p.value, "profiles": p.profiles }))
        .collect();
    json!({
        "unit": timeline.unit, "sample_type": timeline.sample_type, "step_ms": span_ms(timeline.step.as_ref()),
        "points": points,
    })
}

/// Returns a heat map: rows of cells, one cell for each step from the start of the range.
pub(super) fn heatmap(map: &Heatmap, sample_type: &str, from_ms: u64) -> Value {
    let rows: Vec<Value> = map
        .rows
        .iter()
        .map(|row| match row.bounds {
            Some((low, high)) => json!({ "low": low, "high": high, "cells": row.cells }),
            None => json!({ "name": row.name, "cells": row.cells }),
        })
        .collect();
    json!({
        "unit": map.unit, "sample_type": sample_type, "from_ms": from_ms, "step_ms": map.step_ms, "rows": rows,
    })
}

/// Returns the events of a range: changes of rules and captures, each in the order of time.
pub(super) fn annotations(
    (changes, older_changes): (&[control::AuditEntry], usize),
    (captures, older_captures): (&[CaptureRun], usize),
) -> Value {
    let changes: Vec<Value> = changes
        .iter()
        .map(|change| {
            json!({
                "at_ms": ms(change.at.as_ref()), "action": change.action, "who": change.who, "scope": change.scope,
                "revision": change.revision, "added": change.added, "removed": change.removed,
                "changed": change.changed, "note": change.note,
            })
        })
        .collect();
    let captures: Vec<Value> = captures
        .iter()
        .map(|run| {
            let CaptureRun { rule_id, start_ms, end_ms, reason, profiles, services, nodes, .. } = run;
            json!({
                "rule_id": rule_id, "start_ms": start_ms, "end_ms": end_ms, "reason": reason,
                "profiles": profiles, "services": services, "nodes": nodes,
            })
        })
        .collect();
    json!({
        "changes": changes, "older_changes": older_changes, "captures": captures,
        "older_captures": older_captures,
    })
}

fn errors(errors: &[control::RuleError]) -> Value {
    errors.iter().map(|e| json!({ "rule_id": e.rule_id, "field": e.field, "reason": e.reason })).collect()
}

fn node_rollout(of: &control::NodeRollout) -> Value {
    json!({
        "node": of.node, "state": state_name(of.state()), "errors": errors(&of.errors),
        "since_ms": ms(of.since.as_ref()), "took_ms": span_ms(of.took.as_ref()),
    })
}

fn state_name(state: node_rollout::State) -> &'static str {
    state.as_str_name()
}

pub(super) fn rollout(of: &control::Rollout) -> Value {
    json!({
        "revision": of.revision, "created_at_ms": ms(of.created_at.as_ref()), "settled": of.settled,
        "nodes": of.nodes.iter().map(node_rollout).collect::<Vec<_>>(),
    })
}

pub(super) fn nodes(nodes: &[control::Node], newest: u64) -> Value {
    let nodes: Vec<Value> = nodes.iter().map(|n| node(n, newest)).collect();
    json!({ "nodes": nodes })
}

fn node(node: &control::Node, newest: u64) -> Value {
    let hello = node.hello.clone().unwrap_or_default();
    let mut out = json!({
        "name": node.name, "connected": node.connected, "since_ms": ms(node.since.as_ref()),
        "last_seen_ms": ms(node.last_seen.as_ref()), "labels": hello.labels, "version": hello.version,
        "kernel": hello.kernel, "arch": hello.arch, "cpus": hello.cpus, "features": hello.features,
        "active_revision": hello.active_revision, "started_at_ms": ms(hello.started_at.as_ref()),
    });
    let mut set = |key: &str, value: Value| out[key] = value;
    if let Some(status) = &node.status {
        set("active_revision", json!(status.active_revision));
        set("degraded", json!(status.degraded));
        set("rss_bytes", json!(status.rss_bytes));
        set("cpu_seconds", json!(span_ms(status.cpu.as_ref()) as f64 / 1000.0));
        set("spool_bytes", json!(status.spool_bytes));
        set("processes_armed", json!(status.processes_armed));
        if let Some(ledger) = &status.ledger {
            let lost: &BTreeMap<String, u64> = &ledger.lost;
            set(
                "ledger",
                json!({
                    "ticks": ledger.ticks, "taken": ledger.taken, "delivered": ledger.delivered,
                    "pending": ledger.pending, "lost": lost, "unaccounted": ledger.unaccounted,
                }),
            );
        }
        let rules: Vec<Value> = status
            .rules
            .iter()
            .map(|r| {
                let state: rule_status::State = r.state();
                json!({
                    "rule_id": r.rule_id, "state": state.as_str_name(), "reason": r.reason,
                    "processes": r.processes, "samples": r.samples,
                    "last_sample_ms": ms(r.last_sample.as_ref()), "expires_at_ms": ms(r.expires_at.as_ref()),
                })
            })
            .collect();
        set("rules", json!(rules));
    }
    if let Some(rollout) = &node.rollout {
        let mut rollout = node_rollout(rollout);
        rollout["revision"] = json!(newest);
        set("rollout", rollout);
    }
    out
}

/// Returns the scopes, with their rules in the form of rule files.
pub(super) fn scopes(scopes: &[control::RuleScope], revision: u64) -> Value {
    let scopes: Vec<Value> = scopes
        .iter()
        .map(|s| {
            json!({
                "scope": s.scope, "etag": s.etag, "revision": s.revision,
                "changed_at_ms": ms(s.changed_at.as_ref()), "changed_by": s.changed_by,
                "rules": s.rules.iter().map(gannet_proto::rules::to_json).collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({ "revision": revision, "scopes": scopes })
}
