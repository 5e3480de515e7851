//! Which control groups a rule over pods means.

use std::{collections::BTreeSet, sync::Arc};

use gannet_proto::{control::Match, selector::LabelSelector};

use super::{Lookup, Pod, Pods};
use crate::cgroup::{Cgroup, CgroupNames};

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

/// The control groups of each rule, in the rules' order, and those of pods that deny; and whether a container among them
/// is not known yet. Pure: the same pods, rules and control groups give the same sets.
///
/// Only the topmost group of a container is named, and that of a whole pod where a rule means whole pods: what lies
/// within a group is meant with it, what will be made in it too. So a rule over pods is in force before a pod's first
/// container is started, if the source has told of the pod by then.
pub fn resolve(pods: &Pods, rules: &[PodRule], groups: &[Cgroup]) -> Resolved {
    let mut resolved = Resolved { rules: vec![BTreeSet::new(); rules.len()], ..Resolved::default() };
    for Cgroup { path, id } in groups {
        let own = CgroupNames::of(path.rsplit('/').next().unwrap_or_default());
        let names = CgroupNames::of(path);
        let (pod, container) = if !own.container_id.is_empty() {
            if pods.look_up(&names.container_id, &names.pod_uid) == Lookup::Unknown {
                resolved.unknown.push(names.clone());
            }
            match pods.of(&names) {
                Some(known) => known,
                None => continue,
            }
        } else if !own.pod_uid.is_empty() {
            match pods.by_uid(&own.pod_uid) {
                Some(pod) => (pod, None),
                None => continue,
            }
        } else {
            continue;
        };
        if pod.denied {
            resolved.denied.insert(*id);
        }
        for (rule, set) in rules.iter().zip(&mut resolved.rules) {
            if rule.matches(&pod, container.as_deref()) {
                set.insert(*id);
            }
        }
    }
    resolved
}

/// What rules over pods mean now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolved {
    /// Ids of control groups, for each rule.
    pub rules: Vec<BTreeSet<u64>>,
    /// Those of pods that are never to be profiled.
    pub denied: BTreeSet<u64>,
    /// Containers that nobody has told of yet.
    pub unknown: Vec<CgroupNames>,
}

impl Pods {
    /// The pod and the container of a control group; the pod's uid is enough, so that a rule over pods is in force before
    /// its source has told of a container that has just been made.
    pub fn of(&self, names: &CgroupNames) -> Option<(Arc<Pod>, Option<Arc<str>>)> {
        match self.look_up(&names.container_id, &names.pod_uid) {
            Lookup::Known { pod, container } => Some((pod, container)),
            Lookup::Unknown | Lookup::InVain => self.by_uid(&names.pod_uid).map(|pod| (pod, None)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use rstest::rstest;

    use super::*;
    use crate::pods::{Change, Container, LabelOptions, Workload};

    fn id(letter: char) -> String {
        letter.to_string().repeat(64)
    }

    fn uid(digit: char) -> String {
        format!("{digit}0000000-0000-4000-8000-00000000000{digit}")
    }

    /// 1: shop/checkout with app and log; 2: shop/cache, whose container is not listed yet; 3: denies; 4: a container
    /// that nobody knows.
    fn world() -> (Pods, Vec<Cgroup>) {
        let pod = |digit, app: &str, containers: &[(&str, char)]| Pod {
            uid: uid(digit),
            namespace: "shop".into(),
            name: app.into(),
            labels: [("app".to_owned(), app.to_owned())].into(),
            workload: Some(Workload { kind: "deployment".into(), name: app.into() }),
            containers: containers
                .iter()
                .map(|(name, letter)| Container { name: (*name).into(), id: id(*letter) })
                .collect(),
            ..Pod::default()
        };
        let pods = Pods::new(LabelOptions::default());
        let list = vec![
            pod('1', "checkout", &[("app", 'a'), ("log", 'b')]),
            pod('2', "cache", &[]),
            Pod { denied: true, ..pod('3', "checkout", &[("app", 'd')]) },
        ];
        pods.store().apply(Change::All(list), Instant::now(), Instant::now());
        let path = |path: String, id| Cgroup { path: path.into(), id };
        let groups = vec![
            path("/".into(), 1),
            path("/kubepods".into(), 2),
            path(format!("/kubepods/pod{}", uid('1')), 10),
            path(format!("/kubepods/pod{}/{}", uid('1'), id('a')), 11),
            path(format!("/kubepods/pod{}/{}/made-inside", uid('1'), id('a')), 12),
            path(format!("/kubepods/pod{}/{}", uid('1'), id('b')), 13),
            path(format!("/kubepods/pod{}", uid('2')), 20),
            path(format!("/kubepods/pod{}/{}", uid('2'), id('c')), 21),
            path(format!("/kubepods/pod{}", uid('3')), 30),
            path(format!("/kubepods/pod{}/{}", uid('3'), id('d')), 31),
            path(format!("/docker/{}", id('e')), 40),
            path("/system.slice/ssh.service".into(), 50),
        ];
        (pods, groups)
    }

    fn rule(yaml: &str) -> PodRule {
        let text = format!("rules: [{{id: r, match: {yaml}, capture: {{hz: 19}}, lifetime: {{ttl: 5m}}}}]");
        let rules = gannet_proto::rules::parse(&text, "test").unwrap();
        PodRule::of(rules[0].r#match.as_ref().unwrap()).unwrap()
    }

    #[rstest]
    #[case::namespace("{namespaces: [shop]}", &[10, 11, 13, 20, 21])]
    #[case::other_namespace("{namespaces: [bank]}", &[])]
    #[case::labels("{pod_labels: {app: checkout}}", &[10, 11, 13])]
    #[case::selector("{pod_labels: \"app in (cache,x),tier!=web\"}", &[20, 21])]
    // The container's name must be known: that of the cache's is not.
    #[case::container("{containers: [app]}", &[11])]
    #[case::workload("{workloads: [deployment/cache]}", &[20, 21])]
    #[case::other_kind("{workloads: [statefulset/cache]}", &[])]
    #[case::all_must_hold("{namespaces: [shop], containers: [log], workloads: [deployment/checkout]}", &[13])]
    fn a_rule_means_these_control_groups(#[case] matches: &str, #[case] ids: &[u64]) {
        let (pods, groups) = world();
        let resolved = resolve(&pods, &[rule(matches)], &groups);
        assert_eq!(resolved.rules[0].iter().copied().collect::<Vec<_>>(), ids);
        assert_eq!(resolved.denied.iter().copied().collect::<Vec<_>>(), [30, 31]);
        let unknown: Vec<_> = resolved.unknown.iter().map(|names| names.container_id.clone()).collect();
        assert_eq!(unknown, [id('c'), id('e')]);
    }

    #[test]
    fn a_rule_that_asks_nothing_of_pods_is_none() {
        assert_eq!(PodRule::of(&Match { comm: vec!["x".into()], ..Match::default() }), None);
    }
}
