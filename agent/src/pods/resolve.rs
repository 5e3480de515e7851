//! Resolves rules over pods to control groups, again whenever pods, rules or control groups change.

use std::{collections::BTreeSet, fs, sync::Arc, time::Duration};

use gannet_proto::{control::Match, selector::LabelSelector};
use tokio::{
    sync::{Notify, watch},
    task::spawn_blocking,
};
use tokio_util::sync::CancellationToken;

use super::{Pod, PodLookup, Pods};
use crate::{
    cgroup::{Cgroup, CgroupNames, CgroupTree},
    rules::{PodQuery, PodSelection},
};

/// How often control groups are read where the kernel does not report new ones.
const POLL_PAUSE: Duration = Duration::from_secs(10);
/// A pod creates several groups at once. A scan of all groups takes a few milliseconds.
const DEBOUNCE: Duration = Duration::from_millis(20);

/// A rule's conditions on pods. All given fields must match; the values of one field are alternatives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PodMatcher {
    namespaces: Vec<String>,
    labels: LabelSelector,
    containers: Vec<String>,
    /// Kind and name.
    workloads: Vec<(String, String)>,
}

impl PodMatcher {
    /// Returns the conditions on pods in a rule's match; none if there are no such conditions.
    pub(crate) fn of(matches: &Match) -> Option<Self> {
        let matcher = Self {
            namespaces: matches.namespaces.clone(),
            // Validation has refused selectors that do not parse.
            labels: LabelSelector::parse(&matches.pod_labels).ok()?,
            containers: matches.containers.clone(),
            workloads: matches
                .workloads
                .iter()
                .filter_map(|text| text.split_once('/'))
                .map(|(kind, name)| (kind.to_lowercase(), name.to_owned()))
                .collect(),
        };
        let Self { namespaces, labels, containers, workloads } = &matcher;
        let is_empty =
            namespaces.is_empty() && labels.is_empty() && containers.is_empty() && workloads.is_empty();
        (!is_empty).then_some(matcher)
    }

    /// Reports whether a container matches. `container`: its name, if known. A rule that lists containers does not match a
    /// container whose name is not known yet. A pod that denies profiling never matches.
    pub(crate) fn matches(&self, pod: &Pod, container: Option<&str>) -> bool {
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

/// The control groups that matchers select.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Resolved {
    /// Ids of control groups, for each matcher in their order.
    selected: Vec<BTreeSet<u64>>,
    /// Ids of the control groups of pods that deny profiling.
    denied: BTreeSet<u64>,
    /// Containers that no feed has reported yet, with the paths of their control groups.
    unknown: Vec<(CgroupNames, Arc<str>)>,
}

/// Selects control groups. The same pods, matchers and groups give the same result.
///
/// Only the topmost group of a container is selected, and the group of a whole pod where a matcher selects whole pods. The
/// BPF programs include all groups below it, future ones too. So a rule over pods is in force before a pod's first container
/// starts, if the feed has reported the pod by then.
fn resolve(pods: &Pods, matchers: &[PodMatcher], groups: &[Cgroup]) -> Resolved {
    let mut resolved = Resolved { selected: vec![BTreeSet::new(); matchers.len()], ..Resolved::default() };
    for Cgroup { path, id } in groups {
        let parent = CgroupNames::of(path.rsplit_once('/').unwrap_or_default().0);
        let names = CgroupNames::of(path);
        let (pod, container) = if names.containers().len() > parent.containers().len() {
            match pods.look_up_path(&names.containers()) {
                PodLookup::Unknown => resolved.unknown.push((names.clone(), Arc::clone(path))),
                // Its processes may have been started in a pod's container.
                PodLookup::Unlisted if names.pod_uid.is_empty() => {
                    resolved.unknown.push((names.clone(), Arc::clone(path)));
                }
                PodLookup::Unlisted | PodLookup::Known { .. } => {}
            }
            match pods.pod_of(&names) {
                Some(known) => known,
                None => continue,
            }
        } else if names.pod_uid != parent.pod_uid {
            match pods.by_uid(&names.pod_uid) {
                Some(pod) => (pod, None),
                None => continue,
            }
        } else {
            continue;
        };
        if pod.denied {
            resolved.denied.insert(*id);
        }
        for (matcher, selected) in matchers.iter().zip(&mut resolved.selected) {
            if matcher.matches(&pod, container.as_deref()) {
                selected.insert(*id);
            }
        }
    }
    resolved
}

/// Resolves the rules over pods again after each change, until cancelled. Calls `select` with each new result.
pub(crate) async fn keep_resolving(
    pods: Pods,
    groups: Arc<CgroupTree>,
    mut queries: watch::Receiver<Vec<PodQuery>>,
    select: impl Fn(PodSelection) + Send,
    cancel: CancellationToken,
) {
    let created = Arc::new(Notify::new());
    let wake_up = Arc::clone(&created);
    if let Err(error) = groups.watch(move || wake_up.notify_one()) {
        tracing::warn!(
            "cannot watch for new control groups, checking every {} s: {error}",
            POLL_PAUSE.as_secs()
        );
    }
    let mut changes = pods.changes();
    let mut former = PodSelection::default();
    loop {
        let wanted = queries.borrow_and_update().clone();
        let (known, tree) = (pods.clone(), Arc::clone(&groups));
        // Without rules over pods and without pods that deny profiling, there is nothing to scan for.
        let selection = if wanted.is_empty() && !known.any_denied() {
            PodSelection::default()
        } else {
            match spawn_blocking(move || resolve_queries(&known, &tree, &wanted)).await {
                Ok(selection) => selection,
                Err(error) => {
                    tracing::error!("cannot resolve rules over pods, keeping the former result: {error}");
                    former.clone()
                }
            }
        };
        if selection != former {
            select(selection.clone());
            former = selection;
        }
        tokio::select! {
            changed = queries.changed() => if changed.is_err() { return },
            _ = changes.changed() => {}
            () = created.notified() => {}
            () = tokio::time::sleep(POLL_PAUSE) => {}
            () = cancel.cancelled() => return,
        }
        tokio::time::sleep(DEBOUNCE).await;
    }
}

/// Returns the first process of a control group; 0 if there is none.
fn first_process(groups: &CgroupTree, path: &str) -> u32 {
    let text = fs::read_to_string(groups.root().join(path.trim_start_matches('/')).join("cgroup.procs"));
    text.ok().and_then(|text| text.lines().next()?.parse().ok()).unwrap_or_default()
}

fn resolve_queries(pods: &Pods, groups: &CgroupTree, queries: &[PodQuery]) -> PodSelection {
    // A query without conditions on pods selects no containers. This code must not open it to all.
    let (ids, matchers): (Vec<&String>, Vec<PodMatcher>) =
        queries.iter().filter_map(|query| Some((&query.rule_id, PodMatcher::of(&query.matches)?))).unzip();
    let resolved = resolve(pods, &matchers, &groups.scan());
    for (names, path) in &resolved.unknown {
        pods.container_seen(names, first_process(groups, path));
    }
    let rules = ids.into_iter().cloned().zip(resolved.selected).collect();
    PodSelection { rules, denied: resolved.denied }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use rstest::rstest;

    use super::*;
    use crate::pods::{MAX_UNPLACED, PodChange, PodContainer, PodLabelOptions, Workload};

    fn id(letter: char) -> String {
        letter.to_string().repeat(64)
    }

    fn uid(digit: char) -> String {
        format!("{digit}0000000-0000-4000-8000-00000000000{digit}")
    }

    /// Pod 1: shop/checkout with app and log. Pod 2: shop/cache, whose container is not listed yet. Pod 3 denies profiling.
    /// Container e has no pod.
    fn world() -> (Pods, Vec<Cgroup>) {
        let pod = |digit, app: &str, containers: &[(&str, char)]| Pod {
            uid: uid(digit),
            namespace: "shop".into(),
            name: app.into(),
            labels: [("app".to_owned(), app.to_owned())].into(),
            workload: Some(Workload { kind: "deployment".into(), name: app.into() }),
            containers: containers
                .iter()
                .map(|(name, letter)| PodContainer { name: (*name).into(), id: id(*letter) })
                .collect(),
            ..Pod::default()
        };
        let pods = Pods::new(PodLabelOptions::default());
        let list = vec![
            pod('1', "checkout", &[("app", 'a'), ("log", 'b')]),
            pod('2', "cache", &[]),
            Pod { denied: true, ..pod('3', "checkout", &[("app", 'd')]) },
        ];
        pods.apply(PodChange::All(list.into()), Instant::now());
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

    fn matcher(yaml: &str) -> PodMatcher {
        let text = format!("rules: [{{id: r, match: {yaml}, capture: {{hz: 19}}, lifetime: {{ttl: 5m}}}}]");
        let rules = gannet_proto::rules::parse(&text, "test").unwrap();
        PodMatcher::of(rules[0].r#match.as_ref().unwrap()).unwrap()
    }

    #[rstest]
    #[case::namespace("{namespaces: [shop]}", &[10, 11, 13, 20, 21])]
    #[case::other_namespace("{namespaces: [bank]}", &[])]
    #[case::labels("{pod_labels: {app: checkout}}", &[10, 11, 13])]
    #[case::selector("{pod_labels: \"app in (cache,x),tier!=web\"}", &[20, 21])]
    // The container's name must be known, and the name of the cache's container is not.
    #[case::container("{containers: [app]}", &[11])]
    #[case::workload("{workloads: [deployment/cache]}", &[20, 21])]
    #[case::other_kind("{workloads: [statefulset/cache]}", &[])]
    #[case::all_must_hold("{namespaces: [shop], containers: [log], workloads: [deployment/checkout]}", &[13])]
    fn a_rule_selects_these_control_groups(#[case] matches: &str, #[case] ids: &[u64]) {
        let (pods, groups) = world();
        let resolved = resolve(&pods, &[matcher(matches)], &groups);
        assert_eq!(resolved.selected[0].iter().copied().collect::<Vec<_>>(), ids);
        assert_eq!(resolved.denied.iter().copied().collect::<Vec<_>>(), [30, 31]);
        let unknown: Vec<_> = resolved.unknown.iter().map(|(names, _)| names.container_id.clone()).collect();
        assert_eq!(unknown, [id('c'), id('e')]);
    }

    #[test]
    fn containers_of_docker_in_a_pod_are_selected_with_it() {
        let (pods, mut groups) = world();
        let path = |path: String, id| Cgroup { path: path.into(), id };
        // Below the pod's container, whose group covers it; and outside of the pod.
        groups.push(path(format!("/kubepods/pod{}/{}/docker/{}", uid('1'), id('a'), id('f')), 60));
        groups.push(path(format!("/docker/{}", id('9')), 61));
        let starter = crate::cgroup::PathContainer { id: id('a'), pod_uid: uid('1') };
        pods.set_starters(vec![(id('9'), Some(starter))]);
        let matchers = [matcher("{containers: [app]}"), matcher("{containers: [log]}")];
        let resolved = resolve(&pods, &matchers, &groups);
        let selected = |index: usize| resolved.selected[index].iter().copied().collect::<Vec<_>>();
        assert_eq!((selected(0), selected(1)), (vec![11, 60, 61], vec![13]));
        assert!(resolved.unknown.iter().all(|(names, _)| ![id('f'), id('9')].contains(&names.container_id)));
    }

    #[test]
    fn containers_that_wait_for_their_parents_are_counted() {
        let (pods, _) = world();
        pods.set_active(true);
        let seen = |number: usize| {
            pods.container_seen(&CgroupNames::of(&format!("/docker/{number:064x}")), 1);
        };
        // A container that waits is seen again and again.
        for number in (0..MAX_UNPLACED).chain(0..MAX_UNPLACED) {
            seen(number);
        }
        assert_eq!(pods.counts().postponed, 0);
        (MAX_UNPLACED..MAX_UNPLACED + 3).for_each(seen);
        assert_eq!(pods.counts().postponed, 3);
    }

    #[test]
    fn a_match_without_pod_fields_has_no_matcher() {
        assert_eq!(PodMatcher::of(&Match { comm: vec!["x".into()], ..Match::default() }), None);
    }
}
