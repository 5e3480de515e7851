//! Why a process does, or does not, match: field by field, in words. The patterns are those that decide.

use std::sync::Arc;

use gannet_proto::{
    control::{Match, MatchedProcess},
    rules::Pattern,
};

use crate::{
    node::Node,
    pods::{Pod, resolve::PodRule},
    process::Seen,
};

/// Texts of a list that are named; a rule may have 64 in each.
const SHOWN: usize = 4;
const SHOWN_LABELS: usize = 8;

/// What a match asks for, ready to be compared.
pub(super) struct Wanted {
    comm: Vec<Pattern>,
    exe: Vec<Pattern>,
    cgroup: Vec<Pattern>,
    pids: Vec<u32>,
    uid: Vec<u32>,
    /// Fields over pods that are given, each as a rule of its own.
    pods: Vec<(&'static str, PodRule)>,
}

impl Wanted {
    pub(super) fn of(wanted: &Match) -> Self {
        let Match { comm, exe, cgroup, namespaces, pod_labels, containers, workloads, pids, uid } = wanted;
        // A pattern that does not parse was refused before; it can only be left out.
        let patterns = |texts: &[String]| texts.iter().filter_map(|text| Pattern::parse(text).ok()).collect();
        let nothing = Match::default();
        let pods = [
            ("match.namespaces", Match { namespaces: namespaces.clone(), ..nothing.clone() }),
            ("match.pod_labels", Match { pod_labels: pod_labels.clone(), ..nothing.clone() }),
            ("match.containers", Match { containers: containers.clone(), ..nothing.clone() }),
            ("match.workloads", Match { workloads: workloads.clone(), ..nothing }),
        ];
        Self {
            comm: patterns(comm),
            exe: patterns(exe),
            cgroup: patterns(cgroup),
            pids: pids.clone(),
            uid: uid.clone(),
            pods: pods.into_iter().filter_map(|(field, only)| Some((field, PodRule::of(&only)?))).collect(),
        }
    }

    /// One line for each field that does not hold; none: it matches.
    pub(super) fn mismatches(&self, seen: &Seen, place: &Place) -> Vec<String> {
        let mut found = Vec::new();
        for (field, patterns, text) in [
            ("match.comm", &self.comm, &seen.comm),
            ("match.exe", &self.exe, &seen.exe),
            ("match.cgroup", &self.cgroup, &seen.cgroup),
        ] {
            if !patterns.is_empty() && !patterns.iter().any(|pattern| pattern.matches(text.as_bytes())) {
                let wanted: Vec<String> = patterns.iter().take(SHOWN).map(show).collect();
                let more = if patterns.len() > SHOWN { ", ..." } else { "" };
                found.push(format!("{field}: is `{text}`, not {}{more}", wanted.join(" or ")));
            }
        }
        if !self.pids.is_empty() && !self.pids.contains(&seen.pid) {
            found.push(format!("match.pids: is {}", seen.pid));
        }
        if !self.uid.is_empty() && !seen.uid.is_some_and(|uid| self.uid.contains(&uid)) {
            let is = seen.uid.map_or_else(|| "unknown".to_owned(), |uid| uid.to_string());
            found.push(format!("match.uid: is {is}"));
        }
        for (field, rule) in &self.pods {
            match place {
                Place::Unknowable => found.push(format!("{field}: this node has no pod metadata")),
                Place::Nowhere => found.push(format!("{field}: is in no pod that the node knows")),
                Place::In(pod, container) => {
                    if !pod.denied && !rule.matches(pod, container.as_deref()) {
                        found.push(format!("{field}: is in {}", place.words()));
                    }
                }
            }
        }
        if let Place::In(pod, _) = place
            && pod.denied
        {
            found.push("its pod is annotated never to be profiled".to_owned());
        }
        found
    }
}

/// Where a process runs.
pub(super) enum Place {
    /// The node knows no pods at all.
    Unknowable,
    /// In none.
    Nowhere,
    /// In this one, in the container of this name.
    In(Arc<Pod>, Option<Arc<str>>),
}

impl Place {
    pub(super) fn of(node: &Node, seen: &Seen) -> Self {
        match node.pods.of(&seen.names) {
            Some((pod, container)) => Self::In(pod, container),
            None if node.config.pods.is_none() => Self::Unknowable,
            None => Self::Nowhere,
        }
    }

    /// `namespace/name`, empty outside of pods, and the container.
    pub(super) fn names(&self) -> (String, String) {
        match self {
            Self::In(pod, container) => (
                format!("{}/{}", pod.namespace, pod.name),
                container.as_deref().unwrap_or_default().to_owned(),
            ),
            Self::Unknowable | Self::Nowhere => Default::default(),
        }
    }

    fn words(&self) -> String {
        let Self::In(pod, container) = self else { return String::new() };
        let mut words = format!("pod {}/{}", pod.namespace, pod.name);
        if let Some(container) = container {
            words = words + ", container " + container;
        }
        if let Some(workload) = &pod.workload {
            words = words + ", workload " + &workload.kind + "/" + &workload.name;
        }
        let labels: Vec<String> =
            pod.labels.iter().take(SHOWN_LABELS).map(|(name, value)| format!("{name}={value}")).collect();
        if labels.is_empty() { words } else { words + ", labels " + &labels.join(",") }
    }
}

fn show(pattern: &Pattern) -> String {
    format!("`{}{}`", pattern.text(), if pattern.is_prefix() { "*" } else { "" })
}

/// As it is told.
pub(super) fn matched(seen: &Seen, place: &Place, cpus: f64) -> MatchedProcess {
    let (pod, container) = place.names();
    MatchedProcess {
        pid: seen.pid,
        comm: seen.comm.clone(),
        exe: seen.exe.clone(),
        cgroup: seen.cgroup.clone(),
        pod,
        container,
        cpus,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_that_does_not_hold_is_named_and_all_that_hold_are_a_match() {
        let seen = Seen {
            pid: 7,
            comm: "nginx".into(),
            exe: "/usr/sbin/nginx".into(),
            cgroup: "/system.slice/nginx.service".into(),
            uid: Some(33),
            ..Seen::default()
        };
        let wanted = Match {
            comm: vec!["ngin*".into()],
            exe: vec!["/usr/sbin/nginx".into()],
            cgroup: vec!["/system.slice/*".into()],
            uid: vec![0, 33],
            pids: vec![7],
            ..Match::default()
        };
        assert_eq!(Wanted::of(&wanted).mismatches(&seen, &Place::Unknowable), Vec::<String>::new());
        let other = Match {
            comm: vec!["python3*".into(), "node".into()],
            uid: vec![0],
            namespaces: vec!["shop".into()],
            ..wanted
        };
        let found = Wanted::of(&other).mismatches(&seen, &Place::Unknowable);
        assert_eq!(
            found,
            [
                "match.comm: is `nginx`, not `python3*` or `node`",
                "match.uid: is 33",
                "match.namespaces: this node has no pod metadata"
            ]
        );
    }

    #[test]
    fn a_field_over_pods_is_held_against_the_pod_and_a_pod_that_denies_matches_nothing() {
        let pod = Pod {
            namespace: "shop".into(),
            name: "checkout-1".into(),
            labels: [("app".to_owned(), "checkout".to_owned())].into(),
            ..Pod::default()
        };
        let place = Place::In(Arc::new(pod.clone()), Some("app".into()));
        let wanted = |pod_labels: &str, containers: &[&str]| {
            Wanted::of(&Match {
                namespaces: vec!["shop".into()],
                pod_labels: pod_labels.into(),
                containers: containers.iter().map(|&name| name.to_owned()).collect(),
                ..Match::default()
            })
        };
        let seen = Seen::default();
        assert_eq!(wanted("app=checkout", &["app"]).mismatches(&seen, &place), Vec::<String>::new());
        let found = wanted("app=cart", &["side"]).mismatches(&seen, &place);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(
            found[0]
                .contains("match.pod_labels: is in pod shop/checkout-1, container app, labels app=checkout")
        );
        assert_eq!(wanted("", &[]).mismatches(&seen, &Place::Nowhere).len(), 1);
        let denied = Place::In(Arc::new(Pod { denied: true, ..pod }), None);
        assert_eq!(wanted("", &[]).mismatches(&seen, &denied), ["its pod is annotated never to be profiled"]);
    }
}
