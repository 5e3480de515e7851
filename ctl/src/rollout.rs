//! Rollouts: follows a revision of the rules to the nodes, and moves staged rules on or back.

use std::{collections::BTreeMap, time::Duration};

use gannet_proto::control::{
    AbortRolloutRequest, NodeRollout, ResumeRolloutRequest, Rollout, Staged, WatchRolloutRequest,
    node_rollout::State,
};
use serde_json::{Value, json};

use crate::{
    args::{self, Format},
    client::Collector,
    error::Error,
    render::{
        Console, clean, error_line, millis, node_rollout_json, rollout_state, show_span, show_time,
        span_millis, table,
    },
};

fn rollout_json(rollout: &Rollout) -> Value {
    json!({
        "revision": rollout.revision, "created_at_ms": millis(rollout.created_at), "settled": rollout.settled,
        "nodes": rollout.nodes.iter().map(node_rollout_json).collect::<Vec<_>>(),
        "staged": rollout.staged.iter().map(|(scope, staged)| json!({
            "scope": scope, "percent": staged.percent, "paused": staged.paused,
            "since_ms": millis(staged.since), "soak_ms": span_millis(staged.soak),
        })).collect::<Vec<_>>(),
    })
}

pub(crate) async fn run(
    command: args::Rollout,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    match command {
        args::Rollout::Watch { revision, follow, timeout } => {
            watch(collector, revision, follow, timeout.map(Duration::from), format, console).await
        }
        args::Rollout::Resume { scope, percent } => {
            let percent = percent.unwrap_or(100);
            let request = ResumeRolloutRequest { scope: scope.scope.clone(), percent };
            let answer = collector.triggers().resume_rollout(request).await;
            let revision = answer.map_err(|status| collector.fault(&status))?.into_inner().revision;
            console.show(
                format,
                || json!({ "scope": scope.scope, "revision": revision, "percent": percent }),
                || {
                    format!(
                        "scope `{}` goes to {percent} % of the nodes as revision {revision}\n",
                        scope.scope
                    )
                },
            )
        }
        args::Rollout::Abort { scope } => {
            let request = AbortRolloutRequest { scope: scope.scope.clone() };
            let answer = collector.triggers().abort_rollout(request).await;
            let revision = answer.map_err(|status| collector.fault(&status))?.into_inner().revision;
            console.show(
                format,
                || json!({ "scope": scope.scope, "revision": revision }),
                || format!("scope `{}` is restored as revision {revision}\n", scope.scope),
            )
        }
    }
}

/// Follows a revision until every node has answered, or with `follow` until Ctrl-C. Fails if a node rejected it.
/// Revision 0 means the newest.
pub(crate) async fn watch(
    collector: &Collector,
    revision: u64,
    follow: bool,
    timeout: Option<Duration>,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let watching = follow_rollout(collector, revision, follow, format, console);
    let last = match timeout {
        None => watching.await?,
        Some(timeout) => tokio::time::timeout(timeout, watching).await.map_err(|_| {
            Error::Failed(format!(
                "some nodes did not answer within {}; `gannetctl nodes` shows which are connected",
                gannet_base::format_duration(timeout)
            ))
        })??,
    };
    let rejected: Vec<_> = last
        .nodes
        .iter()
        .filter(|node| node.state() == State::Rejected)
        .map(|node| clean(&node.node))
        .collect();
    if rejected.is_empty() {
        Ok(())
    } else {
        Err(Error::Failed(format!("revision {} was rejected by {}", last.revision, rejected.join(", "))))
    }
}

async fn follow_rollout(
    collector: &Collector,
    revision: u64,
    follow: bool,
    format: Format,
    console: &mut Console<'_>,
) -> Result<Rollout, Error> {
    let request = WatchRolloutRequest { revision, until_settled: !follow };
    let answer = collector.triggers().watch_rollout(request).await;
    let mut answer = answer.map_err(|status| collector.fault(&status))?.into_inner();
    let (mut last, mut reported, mut height) = (Rollout::default(), Reported::default(), 0);
    loop {
        let next = tokio::select! {
            next = answer.message() => next.map_err(|status| collector.fault(&status))?,
            // The last state before Ctrl-C decides the exit code.
            _ = tokio::signal::ctrl_c() => None,
        };
        let Some(rollout) = next else { break };
        match format {
            Format::Table if console.terminal => height = redraw(&rollout, height, console)?,
            Format::Table => print_changes(&rollout, &mut reported, console)?,
            // One object in a line for each change.
            Format::Json => writeln!(console.out, "{}", rollout_json(&rollout))?,
            Format::Yaml => {
                writeln!(console.out, "---")?;
                console.show(Format::Yaml, || rollout_json(&rollout), String::new)?;
            }
        }
        console.out.flush()?;
        last = rollout;
    }
    Ok(last)
}

/// Draws the table over the previous one, which is `height` lines high. Returns the new height.
fn redraw(rollout: &Rollout, height: usize, console: &mut Console<'_>) -> Result<usize, Error> {
    let text = rollout_table(rollout);
    if height > 0 {
        // Moves up to the first line of the table and clears from there.
        write!(console.out, "\x1b[{height}A\x1b[J")?;
    }
    console.out.write_all(text.as_bytes())?;
    Ok(text.lines().count())
}

fn rollout_table(rollout: &Rollout) -> String {
    if rollout.nodes.is_empty() {
        return format!("revision {}: no node has connected yet\n", rollout.revision);
    }
    let answered = rollout.nodes.iter().filter(|node| node.state() != State::Pending).count();
    let rows: Vec<_> = rollout
        .nodes
        .iter()
        .map(|node| {
            let errors: Vec<_> = reasons(node).collect();
            [
                node.node.clone(),
                rollout_state(node.state()).to_owned(),
                show_span(node.took),
                show_time(node.since),
                errors.join("; "),
            ]
        })
        .collect();
    format!(
        "revision {}: {answered} of {} nodes have answered\n{}{}",
        rollout.revision,
        rollout.nodes.len(),
        table(["NODE", "STATE", ">TOOK", "SINCE", "WHY"], &rows),
        stages(rollout)
    )
}

/// Returns the reasons of a node's state: its note and its errors.
fn reasons(node: &NodeRollout) -> impl Iterator<Item = String> {
    let note = (!node.note.is_empty()).then(|| node.note.clone());
    note.into_iter().chain(node.errors.iter().map(error_line))
}

/// Formats one line for each scope that is staged, with its next step.
fn stages(rollout: &Rollout) -> String {
    rollout.staged.iter().fold(String::new(), |text, (scope, staged)| {
        let Staged { percent, soak, paused, .. } = staged;
        let next = match (paused.as_str(), soak) {
            ("", None) => "waits for `gannetctl rollout resume`".to_owned(),
            ("", Some(_)) => format!("goes to all nodes after {} without a rejection", show_span(*soak)),
            (why, _) => format!("paused: {why}; run `gannetctl rollout resume` or `gannetctl rollout abort`"),
        };
        text + &clean(&format!("scope {scope} is on {percent} % of the nodes: {next}")) + "\n"
    })
}

/// Lines that were already printed, so that each change appears once.
#[derive(Default)]
struct Reported {
    /// Revision and state by node.
    nodes: BTreeMap<String, (u64, State)>,
    stages: String,
}

/// Prints one line for each node whose state has changed.
fn print_changes(rollout: &Rollout, reported: &mut Reported, console: &mut Console<'_>) -> Result<(), Error> {
    if rollout.nodes.is_empty() && reported.nodes.is_empty() {
        write!(console.out, "{}", rollout_table(rollout))?;
    }
    for node in &rollout.nodes {
        let now = (rollout.revision, node.state());
        if reported.nodes.insert(node.node.clone(), now) == Some(now) {
            continue;
        }
        let errors = reasons(node).fold(String::new(), |text, reason| text + "; " + &reason);
        let took = node.took.map_or_else(String::new, |took| format!(" after {}", show_span(Some(took))));
        writeln!(
            console.out,
            "{}",
            clean(&format!(
                "revision {} {} {}{took}{errors}",
                rollout.revision,
                node.node,
                rollout_state(node.state())
            ))
        )?;
    }
    let now = stages(rollout);
    if now != reported.stages {
        write!(console.out, "{now}")?;
        reported.stages = now;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use gannet_proto::control::RuleError;

    use super::*;

    fn node(name: &str, state: State) -> NodeRollout {
        NodeRollout { node: name.to_owned(), state: state.into(), ..NodeRollout::default() }
    }

    fn rollout() -> Rollout {
        let mut rejected = node("n2", State::Rejected);
        rejected.errors.push(RuleError {
            rule_id: "a".into(),
            field: "capture.hz".into(),
            reason: "is 500, and the cap (max_hz) is 200".into(),
        });
        let applied = NodeRollout {
            took: Some(prost_types::Duration { seconds: 0, nanos: 12_000_000 }),
            since: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
            ..node("n1", State::Applied)
        };
        Rollout {
            revision: 7,
            nodes: vec![applied, rejected, node("n3", State::Pending)],
            ..Rollout::default()
        }
    }

    #[test]
    fn the_table_names_each_node_with_its_state_and_errors() {
        insta::assert_snapshot!(rollout_table(&rollout()), @r"
        revision 7: 2 of 3 nodes have answered
        NODE  STATE        TOOK  SINCE                 WHY
        n1    APPLIED   12.00ms  2023-11-14T22:13:20Z
        n2    REJECTED        -  -                     rule `a`: capture.hz: is 500, and the cap (max_hz) is 200
        n3    PENDING         -  -
        ");
    }

    #[test]
    fn a_pipe_gets_one_line_for_each_change_without_escape_codes() {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut console = Console { out: &mut out, err: &mut err, terminal: false };
        let mut reported = Reported::default();
        let mut rollout = rollout();
        print_changes(&rollout, &mut reported, &mut console).unwrap();
        print_changes(&rollout, &mut reported, &mut console).unwrap();
        rollout.nodes[2] = node("n3", State::Offline);
        print_changes(&rollout, &mut reported, &mut console).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "revision 7 n1 APPLIED after 12.00ms\n\
             revision 7 n2 REJECTED; rule `a`: capture.hz: is 500, and the cap (max_hz) is 200\n\
             revision 7 n3 PENDING\n\
             revision 7 n3 OFFLINE\n"
        );
    }

    #[test]
    fn a_terminal_gets_a_table_that_is_redrawn_in_place() {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut console = Console { out: &mut out, err: &mut err, terminal: true };
        let height = redraw(&rollout(), 0, &mut console).unwrap();
        redraw(&rollout(), height, &mut console).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(height, 5);
        assert_eq!(text.matches("\x1b[5A\x1b[J").count(), 1);
    }
}
