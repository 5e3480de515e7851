//! `/debug/processes`: the processes of the engine's table, and why a process is sampled or not.

use std::{fmt::Write as _, sync::Arc};

use serde::Serialize;

use crate::{
    context::{self, ProcessFacts},
    engine::{EngineError, ProcessView, UnknownProcess, Unwinding},
    model::ProcessKey,
    node::Node,
    process::{Metadata, MetadataOptions, ProcessMetadataCache, ProcessState, on_worker},
    rules::RuleId,
    runtimes::{RuntimeFinder, RuntimeSearch},
};

/// A process in `/debug/processes`.
#[derive(Serialize)]
pub(in crate::debug) struct ProcessRow {
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
    /// Executable mappings that the agent does not read, because the process has too many: code in them has no names.
    cut_mappings: u64,
    /// How the agent unwinds its stacks now.
    stacks: &'static str,
    /// Its interpreter, and whether the names of its functions are read or why not.
    interpreter: String,
    /// The service that it gives, and the sources.
    service: String,
    /// Source of its mappings: kernel events or `/proc`.
    mappings_from: &'static str,
    parent: u32,
    uid: Option<u32>,
    /// Next step for the process, if any.
    pending: String,
    /// Reason why it is profiled or not.
    why: String,
}

pub(in crate::debug) async fn processes(
    node: &Node,
    pid: Option<u32>,
) -> Result<Vec<ProcessRow>, EngineError> {
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
            ProcessState::Missed => "exited before the agent could read it".into(),
        },
        samples: process.samples,
        mappings: process.mappings,
        cut_mappings: process.cut_mappings,
        stacks: match process.unwinding {
            Unwinding::FramePointers => "by frame pointers",
            Unwinding::KernelOnly => "kernel only",
            Unwinding::Kernel => "by tables, in the kernel",
            Unwinding::UserSpace => "by tables, from raw samples",
        },
        interpreter: process.interpreter,
        service: process.service,
        mappings_from: process.mappings_from,
        parent: process.parent,
        uid: process.uid,
        pending: match (process.state, process.waiting_samples) {
            (ProcessState::Unread, 0) => "the agent reads it at its first sample".into(),
            (ProcessState::Replaced | ProcessState::Ended(_), 0) => {
                "leaves the table after a window without samples".into()
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
    let read = tokio::task::spawn_blocking(move || read_once(pid)).await;
    let Some(ReadOnce { known, runtime, is_cut, facts }) = read.ok().flatten() else { return Ok(None) };
    let names = known.names();
    let traits = UnknownProcess {
        comm: known.comm.clone(),
        exe: known.exe.clone(),
        cgroup: known.cgroup.clone(),
        uid: Some(known.uid),
        tgid: pid,
        runtime,
        service: facts.service.name().unwrap_or_default().to_owned(),
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
        cut_mappings: 0,
        stacks: "not at all",
        interpreter: if is_cut {
            format!("no interpreter was found: {}", RuntimeSearch::cut_text())
        } else {
            String::new()
        },
        service: facts.all_text(),
        mappings_from: "nowhere",
        parent: 0,
        uid: Some(known.uid),
        pending: String::new(),
        why,
    }))
}

/// A process that was read for one request.
struct ReadOnce {
    known: Arc<Metadata>,
    /// Name and version of its language runtime.
    runtime: (String, String),
    /// Whether the search for that was cut.
    is_cut: bool,
    facts: ProcessFacts,
}

fn read_once(pid: u32) -> Option<ReadOnce> {
    let options = MetadataOptions { entries: 1, cmdline: false, cwd: false, ..MetadataOptions::default() };
    let any = ProcessKey { tgid: pid, start_boottime_ns: 0 };
    let key = on_worker(any, move || ProcessKey::of_running(pid)).ok()?.ok()?;
    let known = ProcessMetadataCache::new(options).get_or_load(key).ok()?;
    let search = on_worker(key, move || RuntimeFinder::default().find(pid)).ok().and_then(Result::ok);
    let is_cut = search.as_ref().is_some_and(|search| search.is_cut);
    let found = search.and_then(|search| search.found);
    let runtime = found.map_or_else(Default::default, |(file, _)| {
        let (name, version) = file.names();
        (name.to_owned(), version.to_owned())
    });
    let facts = on_worker(key, move || context::read(key)).ok().and_then(Result::ok).unwrap_or_default();
    Some(ReadOnce { known, runtime, is_cut, facts })
}

/// Returns for each rule in force the reason why it does not match a process.
fn why_not(explanation: &[(RuleId, String)]) -> String {
    if explanation.is_empty() {
        return "no rule is in force".into();
    }
    explanation.iter().map(|(rule, why)| format!("{rule} {why}")).collect::<Vec<_>>().join("; ")
}

pub(in crate::debug) fn processes_text(processes: &[ProcessRow]) -> String {
    if processes.is_empty() {
        return "no process is sampled; add ?pid=N to see why a process is not\n".into();
    }
    let mut text = format!(
        "{:24} {:>5} {:16} {:>8} {:28} {:10} {:50} {:46} why\n",
        "KEY", "EXEC", "COMMAND", "SAMPLES", "STACKS", "MAPPINGS", "STATE", "PENDING"
    );
    for process in processes {
        let cut = match process.cut_mappings {
            0 => String::new(),
            cut => format!("{cut} mappings are not read, because it has too many: code in them has no names"),
        };
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
            [process.why.as_str(), process.interpreter.as_str(), process.service.as_str(), cut.as_str()]
                .into_iter()
                .filter(|text| !text.is_empty())
                .collect::<Vec<_>>()
                .join("; ")
        );
    }
    text
}
