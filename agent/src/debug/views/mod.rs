//! The views of the debug page, as data and as human-readable text.

mod maps;
mod pods;
mod processes;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    time::{Duration, SystemTime},
};

use gannet_base::{format_duration, metrics::ProcessUsage};
use gannet_proto::control::rule_status;
use serde::Serialize;

use crate::{engine::EngineError, node::Node};

pub(super) use maps::{MapsView, maps};
pub(super) use pods::{PodsView, pods};
pub(super) use processes::{processes, processes_text};

/// Content of `/statusz`.
#[derive(Serialize)]
pub(super) struct StatusView {
    node: String,
    version: &'static str,
    kernel: String,
    up_seconds: u64,
    collector: String,
    connected: bool,
    rss_bytes: u64,
    cpu_seconds: f64,
    spool_bytes: u64,
    spool_batches: u64,
    degraded: Vec<String>,
}

pub(super) fn status(node: &Node) -> StatusView {
    let usage = ProcessUsage::read();
    StatusView {
        node: node.config.node.clone(),
        version: gannet_proto::VERSION,
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        up_seconds: node.started.elapsed().unwrap_or_default().as_secs(),
        collector: node.config.dial.as_ref().map_or_else(String::new, |dial| dial.url.clone()),
        connected: node.connected.load(std::sync::atomic::Ordering::Relaxed),
        rss_bytes: usage.resident_bytes,
        cpu_seconds: usage.cpu.as_secs_f64(),
        spool_bytes: node.spool.bytes(),
        spool_batches: node.spool.batches(),
        degraded: node.degraded(),
    }
}

impl StatusView {
    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "gannet-agent {} on {} (Linux {}), up {}\n",
            self.version,
            self.node,
            self.kernel,
            format_duration(Duration::from_secs(self.up_seconds))
        );
        let collector = match (self.collector.as_str(), self.connected) {
            ("", _) => "none".to_owned(),
            (url, true) => format!("{url}, connected"),
            (url, false) => format!("{url}, not connected"),
        };
        let _ = writeln!(text, "collector: {collector}");
        let _ = writeln!(
            text,
            "memory {:.1} MiB, CPU time {:.2} s",
            self.rss_bytes as f64 / f64::from(1 << 20),
            self.cpu_seconds
        );
        let _ = writeln!(text, "spool: {} batches, {} bytes", self.spool_batches, self.spool_bytes);
        for reason in &self.degraded {
            let _ = writeln!(text, "degraded: {reason}");
        }
        text
    }
}

/// A rule in `/debug/rules`.
#[derive(Serialize)]
pub(super) struct RuleView {
    id: String,
    state: String,
    reason: String,
    processes: u64,
    samples: u64,
    last_sample_ms: Option<i64>,
    expires_at_ms: Option<i64>,
}

pub(super) async fn rules(node: &Node) -> Result<Vec<RuleView>, EngineError> {
    let statuses = node.engine.view().await?.rules;
    let ms = |seconds: i64, nanos: i32| seconds * 1000 + i64::from(nanos) / 1_000_000;
    Ok(statuses
        .into_iter()
        .map(|status| RuleView {
            state: rule_status::State::try_from(status.state)
                .map_or("unknown", |state| state.as_str_name())
                .to_lowercase(),
            id: status.rule_id,
            reason: status.reason,
            processes: status.processes,
            samples: status.samples,
            last_sample_ms: status.last_sample.map(|at| ms(at.seconds, at.nanos)),
            expires_at_ms: status.expires_at.map(|at| ms(at.seconds, at.nanos)),
        })
        .collect())
}

pub(super) fn rules_text(rules: &[RuleView]) -> String {
    if rules.is_empty() {
        return "no rules: give --rules FILE, or apply some with gannetctl rules apply\n".into();
    }
    let mut text = format!("{:32} {:12} {:>9} {:>9}  why\n", "RULE", "STATE", "PROCESSES", "SAMPLES");
    for rule in rules {
        let _ = writeln!(
            text,
            "{:32} {:12} {:>9} {:>9}  {}",
            rule.id, rule.state, rule.processes, rule.samples, rule.reason
        );
    }
    text
}

/// Content of `/debug/ledger`.
#[derive(Serialize)]
pub(super) struct LedgerView {
    ticks: u64,
    taken: u64,
    delivered: u64,
    pending: u64,
    unaccounted: i64,
    lost: BTreeMap<String, u64>,
}

pub(super) fn ledger(node: &Node) -> LedgerView {
    let ledger = node.ledger.snapshot();
    LedgerView {
        ticks: ledger.ticks,
        taken: ledger.taken,
        delivered: ledger.delivered,
        pending: ledger.pending,
        unaccounted: ledger.unaccounted(),
        lost: ledger.lost.into_iter().map(|(reason, count)| (reason.to_string(), count)).collect(),
    }
}

impl LedgerView {
    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "clock ticks {}\ntaken {} = delivered {} + pending {} + lost {} + unaccounted {}\n",
            self.ticks,
            self.taken,
            self.delivered,
            self.pending,
            self.lost.values().sum::<u64>(),
            self.unaccounted
        );
        for (reason, count) in &self.lost {
            let _ = writeln!(text, "  lost {reason} {count}");
        }
        text
    }
}

pub(super) async fn events(node: &Node) -> Result<Vec<String>, EngineError> {
    let time = |at: SystemTime| humantime::format_rfc3339_millis(at).to_string();
    let events = node.engine.view().await?.events;
    Ok(events.iter().map(|(at, text)| format!("{} {text}", time(*at))).collect())
}
