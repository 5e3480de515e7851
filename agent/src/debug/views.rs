//! What the debug page shows, as data and as text.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::Arc,
    time::{Duration, SystemTime},
};

use gannet_base::metrics::ProcessUsage;
use gannet_proto::control::rule_status;
use serde::Serialize;

use crate::{
    engine::{EngineError, KernelView, ProcessView, UnknownProcess, Unwinding},
    model::ProcessKey,
    node::Node,
    pods::PodFeedKind,
    process::{Metadata, MetadataOptions, ProcessMetadataCache, ProcessState},
    rules::RuleId,
};

/// `/statusz`
#[derive(Serialize)]
pub(super) struct Status {
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

pub(super) fn status(node: &Node) -> Status {
    let usage = ProcessUsage::read();
    Status {
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

impl Status {
    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "gannet-agent {} on {} (Linux {}), up {}\n",
            self.version,
            self.node,
            self.kernel,
            humantime::format_duration(Duration::from_secs(self.up_seconds))
        );
        let collector = match (self.collector.as_str(), self.connected) {
            ("", _) => "none".to_owned(),
            (url, true) => format!("{url}, connected"),
            (url, false) => format!("{url}, not connected"),
        };
        let _ = writeln!(text, "collector: {collector}");
        let _ = writeln!(
            text,
            "uses {:.1} MiB of memory and has used {:.2} s of CPU",
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
        return "no rules: give --rules FILE, or push some with gannetctl rules apply\n".into();
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

/// A process in `/debug/processes`.
#[derive(Serialize)]
pub(super) struct ProcessRow {
    key: String,
    exec_id: u32,
    comm: String,
    exe: String,
    unit: String,
    container_id: String,
    cgroup: String,
    state: String,
    rules: Vec<String>,
    samples: u64,
    mappings: usize,
    /// How its stacks are walked now.
    stacks: &'static str,
    /// Where its mappings are known from: the kernel told, or `/proc` was read.
    mappings_from: &'static str,
    parent: u32,
    uid: Option<u32>,
    /// What is not done yet for it.
    pending: String,
    /// Why it is, or is not, profiled.
    why: String,
}

pub(super) async fn processes(node: &Node, pid: Option<u32>) -> Result<Vec<ProcessRow>, EngineError> {
    let mut rows: Vec<ProcessRow> = node.engine.processes(pid).await?.into_iter().map(row).collect();
    rows.sort_by(|a, b| b.samples.cmp(&a.samples).then_with(|| a.key.cmp(&b.key)));
    match pid {
        Some(pid) if rows.is_empty() => Ok(unsampled(node, pid).await?.into_iter().collect()),
        _ => Ok(rows),
    }
}

fn row(process: ProcessView) -> ProcessRow {
    ProcessRow {
        key: process.key.process.to_string(),
        exec_id: process.key.exec_id,
        comm: process.comm,
        exe: process.exe,
        unit: process.names.unit,
        container_id: process.names.container_id,
        cgroup: process.cgroup,
        state: match process.state {
            ProcessState::Alive => "alive".into(),
            ProcessState::Unread => "alive, not read yet".into(),
            ProcessState::Replaced => "replaced by a new image, kept for its last samples".into(),
            ProcessState::Ended(status) => format!(
                "ended (code {}, signal {}), kept for its last samples",
                status.code(),
                status.signal()
            ),
            ProcessState::Missed => "gone before the agent could read it".into(),
        },
        samples: process.samples,
        mappings: process.mappings,
        stacks: match process.unwinding {
            Unwinding::FramePointers => "by frame pointers",
            Unwinding::KernelOnly => "kernel only",
            Unwinding::Kernel => "by tables, in the kernel",
            Unwinding::UserSpace => "by tables, from raw samples",
        },
        mappings_from: process.mappings_from,
        parent: process.parent,
        uid: process.uid,
        pending: match (process.state, process.waiting_samples) {
            (ProcessState::Unread, 0) => "is read at its first sample".into(),
            (ProcessState::Replaced | ProcessState::Ended(_), 0) => {
                "goes when a window has passed without samples".into()
            }
            (_, 0) => String::new(),
            (_, samples) => format!("{samples} samples wait for unwind tables"),
        },
        why: match process.rules.as_slice() {
            [] => format!("no rule wants it now: {}", why_not(&process.explanation)),
            rules => format!("profiled: wanted by {}", rules.join(", ")),
        },
        rules: process.rules,
    }
}

/// Describes a running process that no rule wants: the engine's table does not hold it, so `/proc` is read here. Returns
/// `None` if no such process runs.
async fn unsampled(node: &Node, pid: u32) -> Result<Option<ProcessRow>, EngineError> {
    let Some(known) = read_once(pid) else { return Ok(None) };
    let names = known.names();
    let traits = UnknownProcess {
        comm: known.comm.clone(),
        exe: known.exe.clone(),
        cgroup: known.cgroup.clone(),
        uid: Some(known.uid),
        tgid: pid,
    };
    let why = format!("not profiled: {}", why_not(&node.engine.explain(traits).await?));
    Ok(Some(ProcessRow {
        key: known.key.to_string(),
        exec_id: 0,
        comm: known.comm.clone(),
        exe: known.exe.clone(),
        unit: names.unit,
        container_id: names.container_id,
        cgroup: known.cgroup.clone(),
        state: "alive".into(),
        rules: Vec::new(),
        samples: 0,
        mappings: 0,
        stacks: "not at all",
        mappings_from: "nowhere",
        parent: 0,
        uid: Some(known.uid),
        pending: String::new(),
        why,
    }))
}

fn read_once(pid: u32) -> Option<Arc<Metadata>> {
    let options = MetadataOptions { entries: 1, cmdline: false, cwd: false, ..MetadataOptions::default() };
    ProcessMetadataCache::new(options).get_or_load(ProcessKey::of_running(pid).ok()?).ok()
}

/// Writes down for each rule in force why it does not want a process.
fn why_not(explanation: &[(RuleId, String)]) -> String {
    if explanation.is_empty() {
        return "no rule is in force".into();
    }
    explanation.iter().map(|(rule, why)| format!("{rule} {why}")).collect::<Vec<_>>().join("; ")
}

pub(super) fn processes_text(processes: &[ProcessRow]) -> String {
    if processes.is_empty() {
        return "no process is sampled; with ?pid=N this tells why one is not\n".into();
    }
    let mut text = format!(
        "{:24} {:>5} {:16} {:>8} {:28} {:10} {:50} {:46} why\n",
        "KEY", "EXEC", "COMMAND", "SAMPLES", "STACKS", "MAPPINGS", "STATE", "PENDING"
    );
    for process in processes {
        let _ = writeln!(
            text,
            "{:24} {:>5} {:16} {:>8} {:28} {:10} {:50} {:46} {}",
            process.key,
            process.exec_id,
            process.comm,
            process.samples,
            process.stacks,
            process.mappings_from,
            process.state,
            if process.pending.is_empty() { "-" } else { &process.pending },
            process.why
        );
    }
    text
}

/// `/debug/maps`
#[derive(Serialize)]
pub(super) struct Maps {
    fill: Vec<MapView>,
    tables: Option<TablesView>,
    sampler_ns: Option<u64>,
}

#[derive(Serialize)]
struct MapView {
    name: &'static str,
    entries: u64,
    capacity: u64,
}

#[derive(Serialize)]
struct TablesView {
    resident: u64,
    resident_bytes: u64,
    budget_bytes: u64,
    rules: u64,
    processes: u64,
    keys: u64,
    made: u64,
    failed: u64,
    evicted: u64,
    refused: u64,
}

pub(super) async fn maps(node: &Node) -> Result<Maps, EngineError> {
    let KernelView { maps, unwind_tables, sampler_cost, .. } = node.engine.kernel_view().await?;
    Ok(Maps {
        fill: maps.into_iter().map(|(name, entries, capacity)| MapView { name, entries, capacity }).collect(),
        tables: unwind_tables.map(|stats| TablesView {
            resident: stats.resident,
            resident_bytes: stats.resident_bytes,
            budget_bytes: stats.budget_bytes,
            rules: stats.rules,
            processes: stats.processes,
            keys: stats.keys,
            made: stats.made,
            failed: stats.failed,
            evicted: stats.evicted,
            refused: stats.refused,
        }),
        sampler_ns: sampler_cost.map(|(time, count)| time / count.max(1)),
    })
}

impl Maps {
    pub(super) fn text(&self) -> String {
        let mut text = format!("{:16} {:>10} {:>10}\n", "MAP", "ENTRIES", "CAPACITY");
        for map in &self.fill {
            let _ = writeln!(text, "{:16} {:>10} {:>10}", map.name, map.entries, map.capacity);
        }
        if let Some(tables) = &self.tables {
            let _ = writeln!(
                text,
                "\nunwind tables: {} in the kernel, {} of {} bytes, {} rules\nprocesses walked in the kernel: {}, {} keys of \
                 the mapping trie\nmade {}, failed {}, evicted {}, processes refused {}",
                tables.resident,
                tables.resident_bytes,
                tables.budget_bytes,
                tables.rules,
                tables.processes,
                tables.keys,
                tables.made,
                tables.failed,
                tables.evicted,
                tables.refused
            );
        }
        match self.sampler_ns {
            Some(ns) => {
                let _ = writeln!(text, "\nthe sampler takes {ns} ns on average");
            }
            None => text += "\nthe sampler's cost is counted with sysctl kernel.bpf_stats_enabled=1\n",
        }
        text
    }
}

/// `/debug/ledger`
#[derive(Serialize)]
pub(super) struct LedgerView {
    ticks: u64,
    taken: u64,
    delivered: u64,
    pending: u64,
    lost: BTreeMap<String, u64>,
}

pub(super) fn ledger(node: &Node) -> LedgerView {
    let ledger = node.ledger.snapshot();
    LedgerView {
        ticks: ledger.ticks,
        taken: ledger.taken,
        delivered: ledger.delivered,
        pending: ledger.pending,
        lost: ledger.lost.into_iter().map(|(reason, count)| (reason.to_string(), count)).collect(),
    }
}

impl LedgerView {
    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "clock ticks {}\ntaken {} = delivered {} + pending {} + lost {}\n",
            self.ticks,
            self.taken,
            self.delivered,
            self.pending,
            self.lost.values().sum::<u64>()
        );
        for (reason, count) in &self.lost {
            let _ = writeln!(text, "  lost {reason} {count}");
        }
        text
    }
}

/// `/debug/pods`
#[derive(Serialize)]
pub(super) struct PodsView {
    source: Option<&'static str>,
    /// Rules over pods are in force before a container's first sample; else within one poll.
    streams: bool,
    passed_over: BTreeMap<&'static str, String>,
    awaited: bool,
    updates: u64,
    last_update_seconds: Option<u64>,
    errors: u64,
    last_error: Option<String>,
    containers: usize,
    asked_for: usize,
    in_no_list: usize,
    refused: u64,
    pods: Vec<PodView>,
}

#[derive(Serialize)]
struct PodView {
    namespace: String,
    name: String,
    uid: String,
    workload: String,
    service_name: String,
    denied: bool,
    gone_seconds: Option<u64>,
    labels: BTreeMap<String, String>,
    /// Name and id.
    containers: Vec<(String, String)>,
}

pub(super) fn pods(node: &Node) -> PodsView {
    let status = node.pods.status();
    let counts = node.pods.counts();
    let mut pods: Vec<PodView> = node
        .pods
        .all()
        .into_iter()
        .map(|(pod, gone)| PodView {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            workload: pod
                .workload
                .as_ref()
                .map_or_else(String::new, |workload| format!("{}/{}", workload.kind, workload.name)),
            service_name: pod.service_name(None).unwrap_or_default().to_owned(),
            denied: pod.denied,
            gone_seconds: gone.map(|gone| gone.as_secs()),
            labels: pod.labels.clone(),
            containers: pod.containers.iter().map(|c| (c.name.clone(), c.id.clone())).collect(),
        })
        .collect();
    pods.sort_by(|a, b| (&a.namespace, &a.name, &a.uid).cmp(&(&b.namespace, &b.name, &b.uid)));
    PodsView {
        source: status.kind.map(PodFeedKind::as_str),
        streams: status.kind.is_some_and(PodFeedKind::streams),
        passed_over: status.passed_over.into_iter().map(|(kind, why)| (kind.as_str(), why)).collect(),
        awaited: status.awaited,
        updates: status.updates,
        last_update_seconds: status.last_update.map(|at| at.elapsed().unwrap_or_default().as_secs()),
        errors: status.errors,
        last_error: status.last_error,
        containers: counts.containers,
        asked_for: counts.requested,
        in_no_list: counts.unlisted,
        refused: counts.refused,
        pods,
    }
}

impl PodsView {
    pub(super) fn text(&self) -> String {
        let mut text = match (self.source, self.awaited) {
            (Some(source), _) => format!("pods come from {source}\n"),
            (None, true) => "pods come from nowhere yet\n".into(),
            (None, false) => "pods come from nowhere: --pod-source none, or no sign of Kubernetes\n".into(),
        };
        if self.source.is_some() {
            text += if self.streams {
                "rules over pods are in force before a container's first sample\n"
            } else {
                "rules over pods are in force within one poll of a container's start (10 s, 1 s if it is sampled)\n"
            };
        }
        for (kind, why) in &self.passed_over {
            let _ = writeln!(text, "not {kind}: {why}");
        }
        if let Some(seconds) = self.last_update_seconds {
            let _ = writeln!(text, "{} updates, the last one {seconds} s ago", self.updates);
        }
        match &self.last_error {
            Some(error) => {
                let _ = writeln!(text, "{} errors; now: {error}", self.errors);
            }
            None => {
                let _ = writeln!(text, "{} errors", self.errors);
            }
        }
        let _ = writeln!(
            text,
            "{} pods, {} containers; {} containers asked for, {} in no list (sandboxes are in none), {} pods refused\n",
            self.pods.len(),
            self.containers,
            self.asked_for,
            self.in_no_list,
            self.refused
        );
        for pod in &self.pods {
            let _ = write!(text, "{}/{} {}", pod.namespace, pod.name, pod.workload);
            if pod.denied {
                text += " (never profiled: gannet.dev/profile is \"false\")";
            }
            if let Some(seconds) = pod.gone_seconds {
                let _ = write!(text, " (gone {seconds} s ago)");
            }
            let _ = writeln!(text, "\n  uid {}", pod.uid);
            for (name, id) in &pod.containers {
                let _ = writeln!(text, "  {name} {id}");
            }
        }
        text
    }
}

pub(super) async fn events(node: &Node) -> Result<Vec<String>, EngineError> {
    let time = |at: SystemTime| humantime::format_rfc3339_millis(at).to_string();
    let events = node.engine.view().await?.events;
    Ok(events.iter().map(|(at, text)| format!("{} {text}", time(*at))).collect())
}
