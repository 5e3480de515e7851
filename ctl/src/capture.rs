//! `profile`: captures processes of one node now and saves the profile.

use std::{path::Path, time::Duration};

use gannet_proto::{
    control::{
        CaptureDone, CaptureProgress, CaptureRequest, CaptureStarted, Ledger, ListNodesRequest, Match,
        capture, capture_progress::Message,
    },
    labels::NODE,
    ledger::LossReason,
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    args::{Form, Format, Manual},
    client::{self, Collector},
    error::Error,
    profiles::{Target, save},
    render::Console,
};

/// Captures on one node and writes the profile to `file`, or to `profile.pb.gz`.
pub(crate) async fn run(
    args: &Manual,
    file: Option<&Path>,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    // Before the capture, which would be in vain.
    let mut target = Target::new(file.unwrap_or(Path::new("profile.pb.gz")), Form::default(), "")?;
    let request = request(args, node(args, collector).await?)?;
    let mut answer = collector
        .fleet()
        .capture(request.clone())
        .await
        .map_err(|status| collector.fault(&status))?
        .into_inner();
    // The bar draws on standard error, and only if that is a terminal.
    let bar = ProgressBar::new(args.lasting.0.as_secs().max(1)).with_style(style());
    let mut profile = Vec::new();
    let mut done = None;
    loop {
        let message = tokio::select! {
            message = answer.message() => message.map_err(|status| collector.fault(&status))?,
            () = tokio::time::sleep(Duration::from_secs(1)) => {
                bar.inc(1);
                continue;
            }
            _ = tokio::signal::ctrl_c() => {
                bar.finish_and_clear();
                return Err(Error::Failed("interrupted before the capture ended; nothing was written".to_owned()));
            }
        };
        match message {
            None => break,
            Some(CaptureProgress { message: Some(Message::Started(CaptureStarted { processes, .. })) }) => {
                bar.set_message(format!("{processes} processes on {}", request.node));
            }
            Some(CaptureProgress { message: Some(Message::Chunk(chunk)) }) => {
                client::append(&mut profile, &chunk.data)?;
            }
            Some(CaptureProgress { message: Some(Message::Done(end)) }) => done = Some(end),
            Some(CaptureProgress { message: None }) => {}
        }
    }
    bar.finish_and_clear();
    let Some(CaptureDone { samples, ledger, mut labels }) = done else {
        return Err(Error::Failed(format!(
            "node `{}` ended its answer before the profile was complete; try again",
            request.node
        )));
    };
    if samples == 0 || profile.is_empty() {
        return Err(Error::Failed(format!(
            "no samples in {}: no matching process used a CPU; `--off-cpu` shows where processes wait",
            args.lasting
        )));
    }
    labels.entry(NODE.to_owned()).or_insert_with(|| request.node.clone());
    target.set_labels(labels);
    save(&profile, &target, None, format, console)?;
    if format == Format::Table && file != Some(Path::new("-")) {
        writeln!(console.out, "{samples} samples of node {}", request.node)?;
        // An agent of an earlier version sends none.
        if let Some(ledger) = ledger {
            print_ledger(&ledger, console)?;
        }
    }
    Ok(())
}

/// Prints the account of the windows that the capture ran in, with the cure of each loss.
fn print_ledger(ledger: &Ledger, console: &mut Console<'_>) -> Result<(), Error> {
    let Ledger { taken, delivered, lost, unaccounted, .. } = ledger;
    let total: u64 = lost.values().sum();
    let of = "of the node, in the windows of the capture";
    writeln!(
        console.out,
        "{of}: {taken} taken, {delivered} delivered, {total} lost, {unaccounted} unaccounted"
    )?;
    for (reason, n) in lost {
        let cure = reason.parse::<LossReason>().map_or("see the agent's log", LossReason::cure);
        writeln!(console.out, "  lost {reason}: {n}; {cure}")?;
    }
    Ok(())
}

/// Returns the node of `--node`, or the only connected one.
async fn node(args: &Manual, collector: &Collector) -> Result<String, Error> {
    if let Some(node) = &args.node {
        return Ok(node.clone());
    }
    let nodes = collector.fleet().list_nodes(ListNodesRequest {}).await;
    let nodes = nodes.map_err(|status| collector.fault(&status))?.into_inner().nodes;
    let mut names: Vec<String> = nodes.into_iter().filter(|n| n.connected).map(|n| n.name).collect();
    match names.len() {
        0 => Err(Error::Failed("no node is connected; `gannetctl nodes` shows the known ones".into())),
        1 => Ok(names.remove(0)),
        _ => Err(Error::Usage(format!(
            "several nodes are connected; choose one: --node {}",
            names.join(" | ")
        ))),
    }
}

fn request(args: &Manual, node: String) -> Result<CaptureRequest, Error> {
    let Manual {
        node: _,
        pid,
        comm,
        exe,
        cgroup,
        pod,
        pod_labels,
        namespace,
        container,
        runtime,
        runtime_version,
        service,
        lasting,
        hz,
        off_cpu,
    } = args;
    let wanted = Match {
        comm: comm.clone(),
        exe: exe.clone(),
        cgroup: cgroup.clone(),
        namespaces: namespace.clone(),
        pod_labels: pod_labels.clone(),
        containers: container.clone(),
        pids: pid.clone(),
        runtime: runtime.clone(),
        runtime_version: runtime_version.clone(),
        service: service.clone(),
        ..Match::default()
    };
    if wanted == Match::default() && pod.is_none() {
        return Err(Error::Usage(
            "choose the processes: --pid, --comm, --exe, --cgroup, --pod, --pod-labels, --namespace, --container, \
             --runtime or --service"
                .to_owned(),
        ));
    }
    let kind = if *off_cpu { capture::Kind::OffCpu } else { capture::Kind::OnCpu };
    Ok(CaptureRequest {
        node,
        r#match: Some(wanted),
        hz: *hz,
        kind: vec![kind.into()],
        duration: lasting.0.try_into().ok(),
        pod: pod.clone().unwrap_or_default(),
    })
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{wide_bar} {pos}/{len} s {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}
