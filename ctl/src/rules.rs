//! Rules: set, read, explain.

use std::{fs, io::Read as _, path::Path};

use gannet_proto::{
    control::{
        DeleteTriggersRequest, ExplainRequest, ExplainResponse, ExplainedProcess, GetTriggersRequest,
        ListAuditRequest, ListNodesRequest, ListScopesRequest, MatchedProcess, Node, NodePreview, Rule,
        RuleError, RulePreview, RuleScope, SetTriggersRequest, Staging, node_rollout, rule_status,
    },
    rules::{self, Caps},
};
use serde_json::{Value, json};

use crate::{
    Console, Error,
    args::{Format, RuleFiles, Rules, ScopeArg},
    audit,
    client::Collector,
    output::{ago, millis, show_time, table},
    rollout,
};

pub(crate) async fn run(
    command: Rules,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    match command {
        Rules::Apply { files, scope, etag, allow_empty, dry_run, canary, soak, wait, timeout } => {
            let rules = read(&files)?;
            if rules.is_empty() && !allow_empty {
                return Err(Error::Usage(format!(
                    "the files hold no rules, and applying them would remove all rules of scope `{}`: say \
                     --allow-empty if that is meant",
                    scope.scope
                )));
            }
            let request = SetTriggersRequest {
                scope: scope.scope.clone(),
                rules,
                etag: etag.unwrap_or_default(),
                request_id: String::new(),
                allow_empty,
                validate_only: dry_run,
                staging: canary
                    .map(|percent| Staging { percent, soak: soak.and_then(|soak| soak.try_into().ok()) }),
            };
            let revision = set(request, collector, format, console).await?;
            if wait {
                rollout::watch(collector, revision, false, timeout, format, console).await
            } else {
                Ok(())
            }
        }
        Rules::List { scope } => list(scope.as_deref(), collector, format, console).await,
        Rules::Show { id, scope } => show(id.as_deref(), &scope, collector, format, console).await,
        Rules::Delete { ids, all, scope, etag } => {
            let etag = etag.unwrap_or_default();
            delete(&ids, all, scope.scope, etag, collector, format, console).await
        }
        Rules::Explain { id, node, scope, pid, limit } => {
            let question = ExplainRequest { node, rule_id: id, pid, limit };
            explain(question, scope.as_deref(), collector, format, console).await
        }
        Rules::Audit { scope, node, limit } => {
            audit::list(ListAuditRequest { scope, node, limit }, collector, format, console).await
        }
        Rules::Validate { files } => check_files(&files, format, console),
    }
}

/// Reads and checks all files; what is wrong in any of them is reported together.
fn read(RuleFiles { files }: &RuleFiles) -> Result<Vec<Rule>, Error> {
    let (mut all, mut wrong) = (Vec::new(), Vec::new());
    for file in files {
        let name = if is_stdin(file) { "standard input".to_owned() } else { file.display().to_string() };
        let fault = |source| Error::File { file: name.clone(), source };
        let text = if is_stdin(file) {
            let mut text = String::new();
            let limit = rules::MAX_FILE_BYTES as u64 + 1;
            std::io::stdin().lock().take(limit).read_to_string(&mut text).map_err(fault)?;
            text
        } else {
            fs::read_to_string(file).map_err(fault)?
        };
        match rules::parse(&text, &name) {
            Ok(rules) => all.extend(rules),
            Err(errors) => wrong.extend(errors.iter().map(ToString::to_string)),
        }
    }
    if wrong.is_empty() {
        wrong.extend(rules::validate(&all, &Caps::fleet()).iter().map(sentence));
    }
    if wrong.is_empty() { Ok(all) } else { Err(Error::Rules(wrong)) }
}

fn is_stdin(file: &Path) -> bool {
    file == Path::new("-")
}

pub(crate) fn sentence(RuleError { rule_id, field, reason }: &RuleError) -> String {
    let place = [
        (!rule_id.is_empty()).then(|| format!("rule `{rule_id}`")),
        (!field.is_empty()).then(|| field.clone()),
    ];
    let place: Vec<_> = place.into_iter().flatten().collect();
    if place.is_empty() { reason.clone() } else { format!("{}: {reason}", place.join(": ")) }
}

pub(crate) fn error_json(RuleError { rule_id, field, reason }: &RuleError) -> Value {
    json!({ "rule_id": rule_id, "field": field, "reason": reason })
}

pub(crate) fn check_files(files: &RuleFiles, format: Format, console: &mut Console<'_>) -> Result<(), Error> {
    let rules = read(files)?;
    console.show(
        format,
        || json!({ "rules": rules.len(), "digest": rules::digest(&rules) }),
        || format!("{} valid\n", count(rules.len(), "rule")),
    )
}

pub(crate) fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

async fn set(
    request: SetTriggersRequest,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<u64, Error> {
    let (scope, dry_run, rules) = (request.scope.clone(), request.validate_only, request.rules.len());
    let answer = collector.triggers().set_triggers(request).await.map_err(|status| {
        let aborted = status.code() == tonic::Code::Aborted;
        match collector.fault(&status) {
            Error::Call { text, violations } if aborted => Error::Call {
                text: format!("{text} (somebody changed scope `{scope}` meanwhile: look at it with `rules show`, and apply again)"),
                violations,
            },
            error => error,
        }
    })?;
    let answer = answer.into_inner();
    console.show(
        format,
        || {
            json!({
                "scope": scope, "revision": answer.revision, "etag": answer.etag, "changed": answer.changed,
                "dry_run": dry_run, "nodes": answer.nodes,
                "previews": answer.previews.iter().map(preview_json).collect::<Vec<_>>(),
            })
        },
        || {
            let done = match (dry_run, answer.changed) {
                (true, true) => "would be changed".to_owned(),
                (true, false) => "would stay as it is".to_owned(),
                (false, true) => format!("is revision {}", answer.revision),
                (false, false) => format!("is unchanged, revision {}", answer.revision),
            };
            let nodes = match answer.nodes.as_slice() {
                [] => "no connected node".to_owned(),
                nodes if nodes.len() <= 5 => {
                    format!("{}: {}", count(nodes.len(), "connected node"), nodes.join(", "))
                }
                nodes => count(nodes.len(), "connected node"),
            };
            let mut text = format!("scope `{scope}` with {} {done}; for {nodes}\n", count(rules, "rule"));
            text.push_str(&previews(&answer.previews));
            text
        },
    )?;
    Ok(answer.revision)
}

/// What each node would do, a line for each rule.
fn previews(previews: &[NodePreview]) -> String {
    use std::fmt::Write as _;

    if previews.is_empty() {
        return String::new();
    }
    let mut rows = Vec::new();
    let mut words = String::new();
    for preview in previews {
        let NodePreview { node, unanswered, errors, would_reject, rules, samples_per_second: _ } = preview;
        if !unanswered.is_empty() {
            let _ = writeln!(words, "{node} does not say: {unanswered}");
        }
        for error in errors {
            let what = if *would_reject { "would reject the set" } else { "would not do it all" };
            let _ = writeln!(words, "{node} {what}: {}", sentence(error));
        }
        rows.extend(rules.iter().map(|rule| {
            let RulePreview { rule_id, processes, pods, cpus, samples_per_second, conditional, examples } =
                rule;
            let examples: Vec<_> = examples.iter().take(3).map(short).collect();
            [
                node.clone(),
                rule_id.clone(),
                processes.to_string(),
                pods.to_string(),
                format!("{cpus:.2}"),
                format!("{samples_per_second:.0}"),
                if *conditional { "while its condition holds" } else { "always" }.to_owned(),
                examples.join(", "),
            ]
        }));
    }
    if !rows.is_empty() {
        let headings = ["NODE", "RULE", ">PROCESSES", ">PODS", ">CPUS", ">SAMPLES/S", "WHEN", "MATCHES NOW"];
        words.push_str(&table(headings, &rows));
        let sum: f64 = previews.iter().map(|preview| preview.samples_per_second).sum();
        let _ = writeln!(words, "{sum:.0} samples per second in all, of what runs now");
    }
    words.lines().map(|line| crate::output::clean(line) + "\n").collect()
}

/// `python3 (4711)`.
fn short(process: &MatchedProcess) -> String {
    format!("{} ({})", process.comm, process.pid)
}

fn process_json(process: &MatchedProcess) -> Value {
    let MatchedProcess { pid, comm, exe, cgroup, pod, container, cpus } = process;
    json!({
        "pid": pid, "comm": comm, "exe": exe, "cgroup": cgroup, "pod": pod, "container": container, "cpus": cpus,
    })
}

fn preview_json(preview: &NodePreview) -> Value {
    let NodePreview { node, unanswered, errors, would_reject, rules, samples_per_second } = preview;
    let rules: Vec<_> = rules
        .iter()
        .map(|rule| {
            let RulePreview { rule_id, processes, pods, cpus, samples_per_second, conditional, examples } =
                rule;
            json!({
                "rule_id": rule_id, "processes": processes, "pods": pods, "cpus": cpus,
                "samples_per_second": samples_per_second, "conditional": conditional,
                "examples": examples.iter().map(process_json).collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({
        "node": node, "unanswered": unanswered, "errors": errors.iter().map(error_json).collect::<Vec<_>>(),
        "would_reject": would_reject, "rules": rules, "samples_per_second": samples_per_second,
    })
}

async fn scopes(only: Option<&str>, collector: &Collector) -> Result<(Vec<RuleScope>, u64), Error> {
    let answer = collector.triggers().list_scopes(ListScopesRequest {}).await;
    let answer = answer.map_err(|status| collector.fault(&status))?.into_inner();
    let scopes: Vec<_> =
        answer.scopes.into_iter().filter(|scope| only.is_none_or(|only| only == scope.scope)).collect();
    match only {
        Some(only) if scopes.is_empty() => {
            Err(Error::Failed(format!("there is no scope `{only}`: `rules list` shows all")))
        }
        _ => Ok((scopes, answer.revision)),
    }
}

async fn list(
    only: Option<&str>,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let (scopes, revision) = scopes(only, collector).await?;
    let value = || {
        let scopes: Vec<_> = scopes
            .iter()
            .map(|scope| {
                json!({
                    "scope": scope.scope, "etag": scope.etag, "revision": scope.revision,
                    "changed_at_ms": millis(scope.changed_at), "changed_by": scope.changed_by,
                    "rules": scope.rules.iter().map(rules::to_json).collect::<Vec<_>>(),
                })
            })
            .collect();
        json!({ "revision": revision, "scopes": scopes })
    };
    console.show(format, value, || {
        let rows: Vec<_> =
            scopes.iter().flat_map(|scope| scope.rules.iter().map(|rule| row(scope, rule))).collect();
        if rows.is_empty() {
            return "no rules\n".to_owned();
        }
        table(["SCOPE", "RULE", "MATCH", "WHEN", ">HZ", "TTL", "REVISION", "CHANGED", "BY"], &rows)
    })
}

fn row(scope: &RuleScope, rule: &Rule) -> [String; 9] {
    let form = rules::to_json(rule);
    let when = match form["when"].as_array() {
        Some(when) => {
            let names: Vec<_> =
                when.iter().filter_map(|when| when.as_object()?.keys().next().cloned()).collect();
            names.join(",")
        }
        None => "always".to_owned(),
    };
    [
        scope.scope.clone(),
        rule.id.clone(),
        shorten(&brief(&form["match"]), 48),
        when,
        rules::effective_hz(rule).to_string(),
        form["lifetime"]["ttl"].as_str().unwrap_or("-").to_owned(),
        scope.revision.to_string(),
        ago(scope.changed_at),
        shorten(&scope.changed_by, 24),
    ]
}

/// `comm=python3*|node pids=7`.
fn brief(matches: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
    let fields: Vec<_> = matches
        .as_object()
        .into_iter()
        .flatten()
        .map(|(field, value)| match value.as_array() {
            Some(list) => format!("{field}={}", list.iter().map(text).collect::<Vec<_>>().join("|")),
            None => format!("{field}={}", text(value)),
        })
        .collect();
    fields.join(" ")
}

fn shorten(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

async fn scope_of(scope: &str, collector: &Collector) -> Result<RuleScope, Error> {
    let answer = collector.triggers().get_triggers(GetTriggersRequest { scope: scope.to_owned() }).await;
    let answer = answer.map_err(|status| collector.fault(&status))?.into_inner();
    answer.scope.ok_or_else(|| Error::Failed(format!("there is no scope `{scope}`: `rules list` shows all")))
}

fn missing(id: &str, scope: &RuleScope) -> Error {
    let have: Vec<_> = scope.rules.iter().map(|rule| rule.id.as_str()).collect();
    let have = if have.is_empty() { "nothing".to_owned() } else { have.join(", ") };
    Error::Failed(format!("there is no rule `{id}` in scope `{}`; it holds {have}", scope.scope))
}

async fn show(
    id: Option<&str>,
    scope: &ScopeArg,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let scope = scope_of(&scope.scope, collector).await?;
    let chosen: Vec<Rule> =
        scope.rules.iter().filter(|rule| id.is_none_or(|id| id == rule.id)).cloned().collect();
    if let (Some(id), []) = (id, chosen.as_slice()) {
        return Err(missing(id, &scope));
    }
    // A table cannot hold a rule: people get the form that they write.
    let yaml = || {
        let RuleScope { scope, etag, revision, changed_at, changed_by, .. } = &scope;
        format!(
            "# scope {scope}, revision {revision}, etag {etag}, changed {} by {changed_by}\n{}",
            show_time(*changed_at),
            rules::to_yaml(&chosen)
        )
    };
    match format {
        Format::Table | Format::Yaml => console.show(Format::Table, || Value::Null, yaml),
        Format::Json => {
            let rules: Vec<_> = chosen.iter().map(rules::to_json).collect();
            console.show(format, || json!({ "rules": rules }), String::new)
        }
    }
}

async fn delete(
    ids: &[String],
    all: bool,
    scope: String,
    etag: String,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    if all {
        let request = DeleteTriggersRequest { scope: scope.clone(), etag, request_id: String::new() };
        let answer = collector.triggers().delete_triggers(request).await;
        let revision = answer.map_err(|status| collector.fault(&status))?.into_inner().revision;
        return console.show(
            format,
            || json!({ "scope": scope, "revision": revision }),
            || format!("scope `{scope}` is deleted: revision {revision}\n"),
        );
    }
    let held = scope_of(&scope, collector).await?;
    if let Some(id) = ids.iter().find(|id| held.rules.iter().all(|rule| rule.id != **id)) {
        return Err(missing(id, &held));
    }
    let request = SetTriggersRequest {
        scope,
        rules: held.rules.into_iter().filter(|rule| !ids.contains(&rule.id)).collect(),
        // What was read is what is changed, or nothing is.
        etag: if etag.is_empty() { held.etag } else { etag },
        allow_empty: true,
        ..SetTriggersRequest::default()
    };
    set(request, collector, format, console).await.map(drop)
}

/// All that the collector knows of one rule on one node.
async fn explain(
    question: ExplainRequest,
    scope: Option<&str>,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let (id, node) = (question.rule_id.clone(), question.node.clone());
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
            "it knows none".to_owned()
        } else {
            format!("it knows {}", known.join(", "))
        };
        return Err(Error::Failed(format!("the collector does not know a node `{node}`; {known}")));
    };
    if found.is_empty()
        && on.status.as_ref().is_none_or(|status| status.rules.iter().all(|rule| rule.rule_id != id))
    {
        return Err(Error::Failed(format!(
            "there is no rule `{id}`, and node `{node}` runs none of that name"
        )));
    }
    // What it says of itself, if it can be asked; all else is known here.
    let asked = match (on.connected, on.status.as_ref()) {
        (true, Some(_)) => Some(collector.fleet().explain(question).await),
        _ => None,
    };
    let (mut seen, mut said) = (String::new(), Value::Null);
    match asked {
        None => {}
        Some(Ok(answer)) => {
            let answer = answer.into_inner();
            (seen, said) = (explained(&answer), explained_json(&answer));
        }
        Some(Err(status)) => {
            let reason = gannet_proto::connect::explain("", &status);
            seen = format!("  processes  not known: {reason}\n");
            said = json!({ "unanswered": reason });
        }
    }
    for (scope, rule) in &found {
        let (facts, mut value) = facts(scope, rule, &on, newest);
        value["processes"] = said.clone();
        console.show(format, || value, || facts + &seen)?;
    }
    if found.is_empty() {
        console.show(
            format,
            || json!({ "rule_id": id, "node": node, "defined": false }),
            || format!("rule {id} is in no scope any more, but node {node} still runs it: its newer rules have not arrived or were rejected\n"),
        )?;
    }
    Ok(())
}

/// Process by process, why it is or is not profiled by the rule.
fn explained(answer: &ExplainResponse) -> String {
    let ExplainResponse { processes, processes_seen, processes_matched, unsupported, .. } = answer;
    let mut text = format!("  processes  {processes_matched} of {processes_seen} match\n");
    for error in unsupported {
        text = text + "  nothing    " + &crate::output::clean(&sentence(error)) + "\n";
    }
    let rows: Vec<_> = processes
        .iter()
        .map(|ExplainedProcess { process, matches, armed, reasons }| {
            let process = process.clone().unwrap_or_default();
            let state = match (matches, armed) {
                (true, true) => "profiled",
                (true, false) => "matches",
                (false, true) => "armed still",
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
                if *matches { process.exe.clone() } else { reasons.join("; ") },
            ]
        })
        .collect();
    if !rows.is_empty() {
        text += &table([">PID", "COMMAND", "MATCHES", "WHERE", "EXECUTABLE, OR WHY NOT"], &rows);
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

fn facts(scope: &RuleScope, rule: &Rule, node: &Node, newest: u64) -> (String, Value) {
    use std::fmt::Write as _;

    let hello = node.hello.clone().unwrap_or_default();
    let meant = rules::is_for_node(rule, &node.name, &hello.labels);
    let rollout = node.rollout.clone().unwrap_or_default();
    let errors: Vec<&RuleError> =
        rollout.errors.iter().filter(|error| error.rule_id == rule.id || error.rule_id.is_empty()).collect();
    let status = node.status.clone().unwrap_or_default();
    let running = status.rules.iter().find(|status| status.rule_id == rule.id);
    let state = rollout::state_name(rollout.state());

    let mut text = format!("rule {} of scope {} on node {}\n", rule.id, scope.scope, node.name);
    let mut line = |name: &str, words: String| {
        let _ = writeln!(text, "  {name:<10} {words}");
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
            format!("not connected since {}: it keeps its last rules until it is back", show_time(node.since))
        },
    );
    line(
        "meant",
        if meant {
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
        line("because", sentence(error));
    }
    match running {
        Some(running) => {
            let mut words = status_name(running.state()).to_owned();
            if !running.reason.is_empty() {
                let _ = write!(words, ": {}", running.reason);
            }
            line("state", words);
            line("armed", format!("{} processes", running.processes));
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
        "selected": meant, "rollout": state, "revision": newest, "active_revision": status.active_revision,
        "errors": errors.iter().map(|error| error_json(error)).collect::<Vec<_>>(),
        "status": running.map(status_json), "degraded": status.degraded,
    });
    (text, value)
}

pub(crate) fn status_name(state: rule_status::State) -> &'static str {
    match state {
        rule_status::State::Unspecified => "UNKNOWN",
        rule_status::State::Waiting => "WAITING",
        rule_status::State::Capturing => "CAPTURING",
        rule_status::State::Expired => "EXPIRED",
        rule_status::State::Unsupported => "UNSUPPORTED",
    }
}

pub(crate) fn status_json(status: &gannet_proto::control::RuleStatus) -> Value {
    json!({
        "rule_id": status.rule_id, "state": status_name(status.state()), "reason": status.reason,
        "processes": status.processes, "samples": status.samples, "last_sample_ms": millis(status.last_sample),
        "expires_at_ms": millis(status.expires_at),
    })
}
