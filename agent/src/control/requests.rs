//! Requests of the collector to this node: preview, explanation, capture. They change no rule. A task answers each, so
//! that none delays the stream; few run at a time, and all end with the stream.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use gannet_proto::{
    control::{
        AgentMessage, Answer, CaptureChunk, CaptureDone, CaptureProgress, CaptureRequest, CaptureStarted,
        ExplainRequest, ExplainResponse, ExplainedProcess, MatchedProcess, NodePreview, PreviewQuestion,
        Question, Rule, RuleError, RulePreview, agent_message, answer, capture, capture_progress, question,
        rule_status,
    },
    pprof,
    rules::{effective_hz, effective_kinds},
};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::matching::{Matcher, ProcessPod, matched};
use crate::{
    cgroup::CgroupHierarchy,
    context,
    engine::{ManualCapture, RuleView},
    model::ProcessKey,
    node::Node,
    process::{SurveyedProcess, add_runtimes, cpu_usage, left_out_of_surveys, on_worker, survey},
    rules::RuleSource,
};

/// Requests that run at one time; more wait.
const MAX_RUNNING: usize = 4;
/// Requests that run or wait; the node refuses more.
const MAX_PENDING: usize = 64;
/// Time for which a preview measures CPU use.
const MEASURE_TIME: Duration = Duration::from_millis(500);
/// Processes that a preview lists for each rule.
const MAX_EXAMPLES: usize = 5;
/// Processes in one explanation, unless the request sets a limit.
const DEFAULT_EXPLAINED: usize = 50;
const MAX_EXPLAINED: usize = 1000;
/// Longest capture that a request may start.
const MAX_CAPTURE: Duration = Duration::from_secs(600);
/// Time for unwinding and symbolizing the last window of a capture.
const LAST_WINDOW_TIMEOUT: Duration = Duration::from_secs(30);
/// Part of a profile in one message; the collector accepts messages of 1 MiB.
const CHUNK_BYTES: usize = 256 << 10;

/// The requests of one stream.
pub(super) struct PendingRequests {
    node: Arc<Node>,
    out: mpsc::Sender<AgentMessage>,
    permits: Arc<Semaphore>,
    running: HashMap<String, CancellationToken>,
}

impl Drop for PendingRequests {
    fn drop(&mut self) {
        for running in self.running.values() {
            running.cancel();
        }
    }
}

impl PendingRequests {
    pub(super) fn new(node: Arc<Node>, out: mpsc::Sender<AgentMessage>) -> Self {
        Self { node, out, permits: Arc::new(Semaphore::new(MAX_RUNNING)), running: HashMap::new() }
    }

    /// Starts to answer a request, or cancels it.
    pub(super) fn receive(&mut self, Question { id, question }: Question) {
        // A task cancels its own token at its end.
        self.running.retain(|_, running| !running.is_cancelled());
        let request = match question {
            Some(question::Question::Cancel(_)) => {
                if let Some(running) = self.running.remove(&id) {
                    running.cancel();
                }
                return;
            }
            request => request,
        };
        let cancel = CancellationToken::new();
        let full = self.running.len() >= MAX_PENDING;
        self.running.insert(id.clone(), cancel.clone());
        let (node, out, permits) = (Arc::clone(&self.node), self.out.clone(), Arc::clone(&self.permits));
        tokio::spawn(async move {
            let answer = async {
                if full {
                    return answer::Answer::Refused(format!(
                        "{MAX_PENDING} requests are pending on this node; try again"
                    ));
                }
                if let Some(question::Question::Capture(request)) = request {
                    return capture(&node, &id, request, &out).await.unwrap_or_else(answer::Answer::Refused);
                }
                let Ok(_permit) = permits.acquire().await else {
                    return answer::Answer::Refused("the agent is shutting down".into());
                };
                answer(&node, request).await
            };
            tokio::select! {
                () = cancel.cancelled() => {}
                answer = answer => {
                    let answer = Answer { id, answer: Some(answer) };
                    let message = AgentMessage { message: Some(agent_message::Message::Answer(answer)) };
                    // A stream that has ended needs no answer.
                    let _ = out.send(message).await;
                }
            }
            cancel.cancel();
        });
    }
}

async fn answer(node: &Node, request: Option<question::Question>) -> answer::Answer {
    let answered = match request {
        Some(question::Question::Preview(request)) => {
            preview(node, request).await.map(answer::Answer::Preview)
        }
        Some(question::Question::Explain(request)) => {
            explain(node, request).await.map(answer::Answer::Explain)
        }
        _ => Err("this agent does not know the request; update the agent".to_owned()),
    };
    answered.unwrap_or_else(answer::Answer::Refused)
}

/// Returns all running processes, with what these rules compare, and the number of CPUs that each uses.
async fn measure(matchers: &[Matcher]) -> Result<(Vec<SurveyedProcess>, HashMap<u32, f64>), String> {
    let hierarchy = CgroupHierarchy::detect();
    let scan = move || survey(hierarchy);
    let failed = |_| "the agent is shutting down".to_owned();
    let begin = Instant::now();
    let before = tokio::task::spawn_blocking(scan).await.map_err(failed)?;
    tokio::time::sleep(MEASURE_TIME).await;
    let after = tokio::task::spawn_blocking(scan).await.map_err(failed)?;
    let cpus = cpu_usage(&before, &after, begin.elapsed());
    Ok((complete(after, matchers).await?, cpus))
}

/// Adds what these rules compare, beside what a survey sees.
async fn complete(
    mut seen: Vec<SurveyedProcess>,
    matchers: &[Matcher],
) -> Result<Vec<SurveyedProcess>, String> {
    if matchers.iter().any(Matcher::compares_runtime) {
        seen = find_runtimes(seen).await?;
    }
    if matchers.iter().any(Matcher::compares_service) {
        let add = move || {
            add_services(&mut seen);
            seen
        };
        seen = tokio::task::spawn_blocking(add).await.map_err(|_| "the agent is shutting down".to_owned())?;
    }
    Ok(seen)
}

/// Reads the services that all these processes give. Blocking: a worker reads each of them.
fn add_services(processes: &mut [SurveyedProcess]) {
    // A kernel thread has no executable.
    for process in processes.iter_mut().filter(|process| !process.exe.is_empty()) {
        let pid = process.pid;
        let any = ProcessKey { tgid: pid, start_boottime_ns: 0 };
        let facts = on_worker(any, move || ProcessKey::of_running(pid).map(context::read));
        if let Ok(Ok(Ok(facts))) = facts {
            facts.service.name().unwrap_or_default().clone_into(&mut process.service);
        }
    }
}

async fn find_runtimes(mut seen: Vec<SurveyedProcess>) -> Result<Vec<SurveyedProcess>, String> {
    let find = move || {
        add_runtimes(&mut seen);
        seen
    };
    tokio::task::spawn_blocking(find).await.map_err(|_| "the agent is shutting down".to_owned())
}

/// Fills in the language runtimes of the processes that the answer lists. To look at all others would take much longer.
async fn add_shown_runtimes(
    mut seen: Vec<SurveyedProcess>,
    shown: impl Iterator<Item = &mut MatchedProcess>,
) -> Result<(), String> {
    let mut shown: Vec<&mut MatchedProcess> = shown.filter(|process| process.runtime.is_empty()).collect();
    let wanted: HashSet<u32> = shown.iter().map(|process| process.pid).collect();
    seen.retain(|process| wanted.contains(&process.pid) && process.runtime.0.is_empty());
    let runtimes: HashMap<u32, (String, String)> =
        find_runtimes(seen).await?.into_iter().map(|process| (process.pid, process.runtime)).collect();
    for process in &mut shown {
        if let Some((runtime, version)) = runtimes.get(&process.pid) {
            process.runtime.clone_from(runtime);
            process.runtime_version.clone_from(version);
        }
    }
    Ok(())
}

/// Returns what these rules would do on this node now.
async fn preview(node: &Node, PreviewQuestion { rules }: PreviewQuestion) -> Result<NodePreview, String> {
    let errors =
        node.engine.check(RuleSource::Remote, rules.clone()).await.map_err(|error| error.to_string())?;
    let matchers: Vec<Matcher> =
        rules.iter().filter_map(|rule| rule.r#match.as_ref()).map(Matcher::of).collect();
    let (seen, cpus) = measure(&matchers).await?;
    let mut previews: Vec<RulePreview> =
        rules.iter().map(|rule| preview_rule(node, rule, &seen, &cpus)).collect();
    add_shown_runtimes(seen, previews.iter_mut().flat_map(|preview| &mut preview.examples)).await?;
    Ok(NodePreview {
        node: node.config.node.clone(),
        would_reject: !errors.is_empty(),
        errors,
        samples_per_second: previews.iter().map(|preview| preview.samples_per_second).sum(),
        rules: previews,
        ..NodePreview::default()
    })
}

fn preview_rule(node: &Node, rule: &Rule, seen: &[SurveyedProcess], cpus: &HashMap<u32, f64>) -> RulePreview {
    let matcher = Matcher::of(&rule.r#match.clone().unwrap_or_default());
    let used = |seen: &SurveyedProcess| cpus.get(&seen.pid).copied().unwrap_or_default();
    let mut matching: Vec<(&SurveyedProcess, ProcessPod)> = seen
        .iter()
        .map(|seen| (seen, ProcessPod::of(node, seen)))
        .filter(|(seen, pod)| matcher.mismatches(seen, pod).is_empty())
        .collect();
    matching.sort_by(|(a, _), (b, _)| used(b).total_cmp(&used(a)).then(a.pid.cmp(&b.pid)));
    let sum: f64 = matching.iter().map(|(seen, _)| used(seen)).sum();
    let hz = if effective_kinds(rule).contains(&capture::Kind::OnCpu) { effective_hz(rule) } else { 0 };
    let pods: HashSet<&str> =
        matching.iter().map(|(seen, _)| seen.names.pod_uid.as_str()).filter(|uid| !uid.is_empty()).collect();
    RulePreview {
        rule_id: rule.id.clone(),
        processes: matching.len() as u64,
        pods: pods.len() as u64,
        cpus: sum,
        samples_per_second: sum * f64::from(hz),
        conditional: !rule.when.is_empty(),
        examples: matching
            .iter()
            .take(MAX_EXAMPLES)
            .map(|(seen, pod)| matched(seen, pod, used(seen)))
            .collect(),
    }
}

/// Explains for each process why a rule in force matches it or not.
async fn explain(node: &Node, request: ExplainRequest) -> Result<ExplainResponse, String> {
    let ExplainRequest { node: _, rule_id, pid, limit } = request;
    let in_force = node.engine.rule(rule_id.clone()).await.map_err(|error| error.to_string())?;
    let Some(RuleView { rule, status, processes: sampled }) = in_force else {
        return Err(format!("the node has no rule `{rule_id}` in force"));
    };
    let matcher = Matcher::of(&rule.r#match.clone().unwrap_or_default());
    let left_out = left_out_of_surveys();
    let (seen, cpus) = measure(std::slice::from_ref(&matcher)).await?;
    if pid != 0 && seen.iter().all(|seen| seen.pid != pid) {
        return Err(match left_out_of_surveys() - left_out {
            0 => format!("there is no process {pid} on the node"),
            _ => format!(
                "there is no process {pid} among the first {} of the node, which has more than the agent reads here; see \
                 /debug/processes?pid={pid} of its agent",
                seen.len()
            ),
        });
    }
    // Matching processes come first, then those with the fewest mismatches; within each group the busiest.
    let mut all: BTreeMap<(usize, u64, u32), ExplainedProcess> = BTreeMap::new();
    let mut matches = 0;
    for seen in &seen {
        let pod = ProcessPod::of(node, seen);
        let reasons = matcher.mismatches(seen, &pod);
        matches += u64::from(reasons.is_empty());
        if pid != 0 && seen.pid != pid {
            continue;
        }
        let used = cpus.get(&seen.pid).copied().unwrap_or_default();
        let idle = u64::MAX - (used * 1e6) as u64;
        let process = ExplainedProcess {
            process: Some(matched(seen, &pod, used)),
            matches: reasons.is_empty(),
            armed: sampled.contains(&seen.pid),
            reasons: reasons.clone(),
        };
        all.insert((reasons.len(), idle, seen.pid), process);
    }
    let processes_seen = seen.len() as u64;
    let limit = if limit == 0 { DEFAULT_EXPLAINED } else { (limit as usize).min(MAX_EXPLAINED) };
    let unsupported = status
        .iter()
        .filter(|status| status.state() == rule_status::State::Unsupported)
        .map(|status| RuleError {
            rule_id: rule_id.clone(),
            field: String::new(),
            reason: status.reason.clone(),
        })
        .collect();
    let mut processes: Vec<ExplainedProcess> = all.into_values().take(limit).collect();
    add_shown_runtimes(seen, processes.iter_mut().filter_map(|process| process.process.as_mut())).await?;
    Ok(ExplainResponse {
        rule: Some(rule),
        status,
        unsupported,
        processes_seen,
        processes_matched: matches,
        processes,
    })
}

fn capture_part(message: capture_progress::Message) -> answer::Answer {
    answer::Answer::Capture(CaptureProgress { message: Some(message) })
}

/// Runs a capture to its end and sends its profile in parts. Returns the last part.
async fn capture(
    node: &Node,
    id: &str,
    request: CaptureRequest,
    out: &mpsc::Sender<AgentMessage>,
) -> Result<answer::Answer, String> {
    let send = async |message| {
        let answer = Answer { id: id.to_owned(), answer: Some(capture_part(message)) };
        let message = AgentMessage { message: Some(agent_message::Message::Answer(answer)) };
        out.send(message).await.map_err(|_| "the stream has ended".to_owned())
    };
    let CaptureRequest { node: _, r#match, hz, kind, duration, pod } = request;
    let duration = duration
        .and_then(|duration| Duration::try_from(duration).ok())
        .filter(|duration| (Duration::from_secs(1)..=MAX_CAPTURE).contains(duration))
        .ok_or_else(|| format!("duration: give 1 s to {} s", MAX_CAPTURE.as_secs()))?;
    let hierarchy = CgroupHierarchy::detect();
    let seen = tokio::task::spawn_blocking(move || survey(hierarchy)).await;
    let mut seen = seen.map_err(|_| "the agent is shutting down".to_owned())?;
    let mut matches = r#match.unwrap_or_default();
    if !pod.is_empty() {
        let groups: BTreeSet<String> = seen
            .iter()
            .filter(|seen| ProcessPod::of(node, seen).names().0 == pod)
            .map(|seen| seen.cgroup.clone())
            .collect();
        if groups.is_empty() {
            return Err(format!("no process of pod {pod} runs on this node, or the node knows no pods"));
        }
        matches.cgroup.extend(groups);
    }
    let matcher = Matcher::of(&matches);
    seen = complete(seen, std::slice::from_ref(&matcher)).await?;
    let processes =
        seen.iter().filter(|seen| matcher.mismatches(seen, &ProcessPod::of(node, seen)).is_empty()).count();
    let manual = ManualCapture {
        matches,
        hz,
        kinds: kind.iter().filter_map(|kind| capture::Kind::try_from(*kind).ok()).collect(),
        duration,
        evidence: "requested through the collector".into(),
    };
    let at = SystemTime::now();
    let running = node.engine.capture_now(manual).await.map_err(|error| error.to_string())?;
    let collecting = node.recent.collect(running.capture);
    send(capture_progress::Message::Started(CaptureStarted {
        at: Some(at.into()),
        duration: duration.try_into().ok(),
        processes: processes as u64,
    }))
    .await?;
    let last = running.over.await.map_err(|_| "the agent is shutting down".to_owned())?;
    let (profiles, labels, ledger) = tokio::time::timeout(LAST_WINDOW_TIMEOUT, collecting.finish(last))
        .await
        .map_err(|_| {
            format!(
                "the last window of the capture was not symbolized within {} s",
                LAST_WINDOW_TIMEOUT.as_secs()
            )
        })?
        .map_err(|error| error.to_string())?;
    let mut samples = 0;
    for (kind, profile) in profiles {
        samples += pprof::samples(&profile);
        for data in pprof::encode(&profile).chunks(CHUNK_BYTES) {
            let chunk = CaptureChunk { kind: kind.into(), data: data.to_vec() };
            send(capture_progress::Message::Chunk(chunk)).await?;
        }
    }
    Ok(capture_part(capture_progress::Message::Done(CaptureDone {
        samples,
        ledger: Some(ledger.into()),
        labels,
    })))
}
