//! `/debug/pods`: the pods of this node and their source.

use std::{collections::BTreeMap, fmt::Write as _};

use serde::Serialize;

use crate::{node::Node, pods::PodFeedKind};

/// Content of `/debug/pods`.
#[derive(Serialize)]
pub(in crate::debug) struct PodsView {
    source: Option<&'static str>,
    /// Rules with pod fields are in force before a container's first sample; otherwise within one poll.
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
    /// Containers in no pod's control group that were seen while too many others waited to be read.
    postponed: u64,
    /// Control groups that rules by pod do not reach, because there are too many or they are too deep.
    groups_left_out: u64,
    /// Control groups that the agent does not follow; it sees new ones below them late.
    groups_unwatched: u64,
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
    /// Names and ids.
    containers: Vec<(String, String)>,
    /// Labels and containers that the agent does not keep, because there are too many.
    labels_left_out: u64,
    containers_left_out: u64,
}

pub(in crate::debug) fn pods(node: &Node) -> PodsView {
    let status = node.pods.status();
    let counts = node.pods.counts();
    let groups = node.engine.groups().map(|groups| groups.stats()).unwrap_or_default();
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
            labels_left_out: pod.left_out.labels,
            containers_left_out: pod.left_out.containers,
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
        postponed: counts.postponed,
        groups_left_out: groups.beyond_count + groups.beyond_levels,
        groups_unwatched: groups.unwatched,
        pods,
    }
}

impl PodsView {
    pub(in crate::debug) fn text(&self) -> String {
        let mut text = match (self.source, self.awaited) {
            (Some(source), _) => format!("pods come from {source}\n"),
            (None, true) => "no pod source has answered yet\n".into(),
            (None, false) => "no pod source: --pod-source none, or no sign of Kubernetes\n".into(),
        };
        if self.source.is_some() {
            text += if self.streams {
                "rules with pod fields are in force before a container's first sample\n"
            } else {
                "rules with pod fields are in force within one poll of a container's start (10 s, 1 s if it is sampled)\n"
            };
        }
        for (kind, why) in &self.passed_over {
            let _ = writeln!(text, "{kind} is not used: {why}");
        }
        if let Some(seconds) = self.last_update_seconds {
            let _ = writeln!(text, "{} updates, the last one {seconds} s ago", self.updates);
        }
        match &self.last_error {
            Some(error) => {
                let _ = writeln!(text, "{} errors; the last one: {error}", self.errors);
            }
            None => {
                let _ = writeln!(text, "{} errors", self.errors);
            }
        }
        let _ = writeln!(
            text,
            "{} pods, {} containers; {} containers requested, {} in no list (sandboxes are in none), {} pods refused",
            self.pods.len(),
            self.containers,
            self.asked_for,
            self.in_no_list,
            self.refused
        );
        for (count, meaning) in [
            (
                self.groups_left_out,
                "control groups, and those below them, are not read: rules by pod do not reach them",
            ),
            (
                self.groups_unwatched,
                "control groups are not followed: new ones below them are seen up to 10 s late",
            ),
            (self.postponed, "times the container of a process was seen while too many waited to be read"),
        ] {
            if count > 0 {
                let _ = writeln!(text, "{count} {meaning}");
            }
        }
        text.push('\n');
        for pod in &self.pods {
            let _ = write!(text, "{}/{} {}", pod.namespace, pod.name, pod.workload);
            if pod.denied {
                text += " (never profiled: gannet.dev/profile is \"false\")";
            }
            for (count, parts) in [(pod.labels_left_out, "labels"), (pod.containers_left_out, "containers")] {
                if count > 0 {
                    let _ = write!(text, " ({count} {parts} are not kept, because it has too many)");
                }
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
