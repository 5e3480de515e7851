//! Which control groups a rule over pods means.

use std::collections::BTreeSet;

use gannet_proto::{control::Match, selector::LabelSelector};

use super::{Lookup, Pod, Pods};
use crate::process::CgroupNames;

/// What a rule asks of pods. All that is given must hold; lists are alternatives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodRule {
    namespaces: Vec<String>,
    labels: LabelSelector,
    containers: Vec<String>,
    /// Kind and name.
    workloads: Vec<(String, String)>,
}

impl PodRule {
    /// What a rule asks of pods; none if it asks nothing.
    pub fn of(matches: &Match) -> Option<Self> {
        let rule = Self {
            namespaces: matches.namespaces.clone(),
            // What does not parse was refused before.
            labels: LabelSelector::parse(&matches.pod_labels).ok()?,
            containers: matches.containers.clone(),
            workloads: matches
                .workloads
                .iter()
                .filter_map(|text| text.split_once('/'))
                .map(|(kind, name)| (kind.to_lowercase(), name.to_owned()))
                .collect(),
        };
        let Self { namespaces, labels, containers, workloads } = &rule;
        let asks_nothing =
            namespaces.is_empty() && labels.is_empty() && containers.is_empty() && workloads.is_empty();
        (!asks_nothing).then_some(rule)
    }

    /// Whether a container is meant. `container`: its name, if it is known; a rule that names containers does not mean
    /// one whose name is not known yet. A pod that denies is never meant.
    pub fn matches(&self, pod: &Pod, container: Option<&str>) -> bool {
        let Self { namespaces, labels, containers, workloads } = self;
        let is_of = |(kind, name): &(String, String)| {
            pod.workload.as_ref().is_some_and(|workload| workload.kind == *kind && workload.name == *name)
        };
        !pod.denied
            && (namespaces.is_empty() || namespaces.contains(&pod.namespace))
            && labels.matches(&pod.labels)
            && (containers.is_empty()
                || container.is_some_and(|name| containers.iter().any(|wanted| wanted == name)))
            && (workloads.is_empty() || workloads.iter().any(is_of))
    }
}

/// One control group of the node, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its id: what the kernel side sees.
    pub cgroup_id: u64,
    /// What its path tells.
    pub names: CgroupNames,
}

/// The control groups of each rule, in the rules' order, and those of pods that deny. Pure: the same pods, rules and
/// control groups give the same sets.
pub fn resolve(pods: &Pods, rules: &[PodRule], members: &[Member]) -> (Vec<BTreeSet<u64>>, BTreeSet<u64>) {
    let mut sets = vec![BTreeSet::new(); rules.len()];
    let mut denied = BTreeSet::new();
    for Member { cgroup_id, names } in members {
        let Some((pod, container)) = pods.of(names) else { continue };
        if pod.denied {
            denied.insert(*cgroup_id);
        }
        for (rule, set) in rules.iter().zip(&mut sets) {
            if rule.matches(&pod, container.as_deref()) {
                set.insert(*cgroup_id);
            }
        }
    }
    (sets, denied)
}

impl Pods {
    /// The pod and the container of a control group; the pod's uid is enough, so that a rule over pods is in force before
    /// its source has told of a container that has just been made.
    pub fn of(&self, names: &CgroupNames) -> Option<(std::sync::Arc<Pod>, Option<std::sync::Arc<str>>)> {
        match self.look_up(&names.container_id, &names.pod_uid) {
            Lookup::Known { pod, container } => Some((pod, container)),
            Lookup::Unknown | Lookup::InVain => self.by_uid(&names.pod_uid).map(|pod| (pod, None)),
        }
    }
}
