//! Rule files: read, validate and apply them, and show what the nodes would do.

use std::{fmt::Write as _, fs, io::Read as _, path::Path};

use gannet_proto::{
    control::{MatchedProcess, NodePreview, Rule, RulePreview, SetTriggersRequest},
    rules::{self, Caps},
};
use serde_json::{Value, json};

use crate::{
    args::{Format, RuleFiles},
    client::Collector,
    error::Error,
    render::{Console, clean, count, error_json, error_line, process_json, table},
};

/// Reads and validates all files. Reports the mistakes of all files together.
pub(super) fn read(RuleFiles { files }: &RuleFiles) -> Result<Vec<Rule>, Error> {
    let (mut all, mut mistakes) = (Vec::new(), Vec::new());
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
            Err(errors) => mistakes.extend(errors.iter().map(ToString::to_string)),
        }
    }
    if mistakes.is_empty() {
        mistakes.extend(rules::validate(&all, &Caps::fleet()).iter().map(error_line));
    }
    if mistakes.is_empty() { Ok(all) } else { Err(Error::Rules(mistakes)) }
}

fn is_stdin(file: &Path) -> bool {
    file == Path::new("-")
}

/// Validates rule files without a collector.
pub(crate) fn validate(files: &RuleFiles, format: Format, console: &mut Console<'_>) -> Result<(), Error> {
    let rules = read(files)?;
    console.show(
        format,
        || json!({ "rules": rules.len(), "digest": rules::digest(&rules) }),
        || format!("{} valid\n", count(rules.len(), "rule")),
    )
}

/// Sends a rule set to the collector and prints the answer. Returns the revision that holds the rules.
pub(super) async fn set(
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
                text: format!("{text} (another change of scope `{scope}` came first; check it with `rules show` and apply again)"),
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
                (true, true) => "would change".to_owned(),
                (true, false) => "would not change".to_owned(),
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

/// Formats what each node would do, one line for each rule.
fn previews(previews: &[NodePreview]) -> String {
    if previews.is_empty() {
        return String::new();
    }
    let mut rows = Vec::new();
    let mut text = String::new();
    for preview in previews {
        let NodePreview { node, unanswered, errors, would_reject, rules, samples_per_second: _ } = preview;
        if !unanswered.is_empty() {
            let _ = writeln!(text, "{node} gave no preview: {unanswered}");
        }
        for error in errors {
            let what = if *would_reject { "would reject the rules" } else { "cannot run every rule" };
            let _ = writeln!(text, "{node} {what}: {}", error_line(error));
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
        text.push_str(&table(headings, &rows));
        let sum: f64 = previews.iter().map(|preview| preview.samples_per_second).sum();
        let _ = writeln!(text, "{sum:.0} samples per second in total, for the processes that run now");
    }
    text.lines().map(|line| clean(line) + "\n").collect()
}

/// Formats a process as `python3 (4711)`.
fn short(process: &MatchedProcess) -> String {
    format!("{} ({})", process.comm, process.pid)
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
