//! Explains field by field why a process does not match a rule. It uses the patterns by which the engine decides.

use std::sync::Arc;

use gannet_proto::{
    control::{Match, MatchedProcess},
    rules::{Pattern, is_version},
};

use crate::{
    node::Node,
    pods::{Pod, PodMatcher},
    process::SurveyedProcess,
    rules::started_by,
};

/// Patterns of one field that an explanation shows; a rule may have 64.
const SHOWN_PATTERNS: usize = 4;
const SHOWN_LABELS: usize = 8;

/// The parsed `match` of a rule.
pub(super) struct Matcher {
    comm: Vec<Pattern>,
    exe: Vec<Pattern>,
    cgroup: Vec<Pattern>,
    pids: Vec<u32>,
    uid: Vec<u32>,
    runtime: Vec<String>,
    runtime_version: Vec<String>,
    service: Vec<Pattern>,
    /// Pod fields of the rule, each as a query of its own.
    pods: Vec<(&'static str, PodMatcher)>,
}

impl Matcher {
    pub(super) fn of(wanted: &Match) -> Self {
        let Match {
            comm,
            exe,
            cgroup,
            namespaces,
            pod_labels,
            containers,
            workloads,
            pids,
            uid,
            runtime,
            runtime_version,
            service,
        } = wanted;
        // The node refused patterns that do not parse before, so none is left out here.
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
            runtime: runtime.clone(),
            runtime_version: runtime_version.clone(),
            service: patterns(service),
            pods: pods
                .into_iter()
                .filter_map(|(field, only)| Some((field, PodMatcher::of(&only)?)))
                .collect(),
        }
    }

    /// Reports whether it compares the language runtime of processes, which a survey finds only if asked to.
    pub(super) fn compares_runtime(&self) -> bool {
        !self.runtime.is_empty() || !self.runtime_version.is_empty()
    }

    /// Reports whether it compares the services that processes give, which a survey finds only if asked to.
    pub(super) fn compares_service(&self) -> bool {
        !self.service.is_empty()
    }

    /// Returns one line for each field that does not match; empty if the process matches.
    pub(super) fn mismatches(&self, seen: &SurveyedProcess, pod: &ProcessPod) -> Vec<String> {
        let mut found = Vec::new();
        for (field, patterns, text) in [
            ("match.comm", &self.comm, &seen.comm),
            ("match.exe", &self.exe, &seen.exe),
            ("match.cgroup", &self.cgroup, &seen.cgroup),
            ("match.service", &self.service, &seen.service),
        ] {
            if !patterns.is_empty() && !patterns.iter().any(|pattern| pattern.matches(text.as_bytes())) {
                let wanted: Vec<String> = patterns.iter().take(SHOWN_PATTERNS).map(show).collect();
                let more = if patterns.len() > SHOWN_PATTERNS { ", ..." } else { "" };
                let is_program = field == "match.comm" || field == "match.exe";
                let by = if is_program { started_by(&seen.exe) } else { "" };
                found.push(format!("{field}: is `{text}`, not {}{more}{by}", wanted.join(" or ")));
            }
        }
        if !self.pids.is_empty() && !self.pids.contains(&seen.pid) {
            found.push(format!("match.pids: is {}", seen.pid));
        }
        if !self.uid.is_empty() && !seen.uid.is_some_and(|uid| self.uid.contains(&uid)) {
            let is = seen.uid.map_or_else(|| "unknown".to_owned(), |uid| uid.to_string());
            found.push(format!("match.uid: is {is}"));
        }
        let (runtime, version) = &seen.runtime;
        if !self.runtime.is_empty() && !self.runtime.contains(runtime) {
            let is = if runtime.is_empty() { "no language runtime that the agent knows" } else { runtime };
            found.push(format!("match.runtime: is {is}, not {}", self.runtime.join(" or ")));
        } else if !self.runtime_version.is_empty()
            && !self.runtime_version.iter().any(|wanted| is_version(wanted, version))
        {
            let wanted = self.runtime_version.iter().take(SHOWN_PATTERNS).map(String::as_str);
            let more = if self.runtime_version.len() > SHOWN_PATTERNS { ", ..." } else { "" };
            let wanted = wanted.collect::<Vec<_>>().join(" or ");
            found.push(format!("match.runtime_version: is {version}, not {wanted}{more}"));
        }
        for (field, rule) in &self.pods {
            match pod {
                ProcessPod::NoMetadata => found.push(format!("{field}: this node has no pod metadata")),
                ProcessPod::None => {
                    found.push(format!("{field}: the process is in no pod that the node knows"));
                }
                ProcessPod::In(found_pod, container) => {
                    if !found_pod.denied && !rule.matches(found_pod, container.as_deref()) {
                        found.push(format!("{field}: is in {}", pod.describe()));
                    }
                }
            }
        }
        if let ProcessPod::In(pod, _) = pod
            && pod.denied
        {
            found.push("an annotation of its pod forbids profiling".to_owned());
        }
        found
    }
}

/// The pod and the container in which a process runs.
pub(super) enum ProcessPod {
    /// The node has no pod metadata.
    NoMetadata,
    /// The process is in no pod that the node knows.
    None,
    /// The process is in this pod, in the container of this name.
    In(Arc<Pod>, Option<Arc<str>>),
}

impl ProcessPod {
    pub(super) fn of(node: &Node, seen: &SurveyedProcess) -> Self {
        match node.pods.pod_of(&seen.names) {
            Some((pod, container)) => Self::In(pod, container),
            None if node.config.pods.is_none() => Self::NoMetadata,
            None => Self::None,
        }
    }

    /// Returns `namespace/name` and the container's name; both are empty outside of pods.
    pub(super) fn names(&self) -> (String, String) {
        match self {
            Self::In(pod, container) => (
                format!("{}/{}", pod.namespace, pod.name),
                container.as_deref().unwrap_or_default().to_owned(),
            ),
            Self::NoMetadata | Self::None => Default::default(),
        }
    }

    fn describe(&self) -> String {
        let Self::In(pod, container) = self else { return String::new() };
        let mut text = format!("pod {}/{}", pod.namespace, pod.name);
        if let Some(container) = container {
            text = text + ", container " + container;
        }
        if let Some(workload) = &pod.workload {
            text = text + ", workload " + &workload.kind + "/" + &workload.name;
        }
        let labels: Vec<String> =
            pod.labels.iter().take(SHOWN_LABELS).map(|(name, value)| format!("{name}={value}")).collect();
        if labels.is_empty() { text } else { text + ", labels " + &labels.join(",") }
    }
}

fn show(pattern: &Pattern) -> String {
    format!("`{}{}`", pattern.text(), if pattern.is_prefix() { "*" } else { "" })
}

/// Builds the answer's description of a process.
pub(super) fn matched(seen: &SurveyedProcess, pod: &ProcessPod, cpus: f64) -> MatchedProcess {
    let (pod, container) = pod.names();
    MatchedProcess {
        pid: seen.pid,
        comm: seen.comm.clone(),
        exe: seen.exe.clone(),
        cgroup: seen.cgroup.clone(),
        pod,
        container,
        cpus,
        runtime: seen.runtime.0.clone(),
        runtime_version: seen.runtime.1.clone(),
        service: seen.service.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_that_does_not_match_is_named() {
        let seen = SurveyedProcess {
            pid: 7,
            comm: "nginx".into(),
            exe: "/usr/sbin/nginx".into(),
            cgroup: "/system.slice/nginx.service".into(),
            uid: Some(33),
            ..SurveyedProcess::default()
        };
        let wanted = Match {
            comm: vec!["ngin*".into()],
            exe: vec!["/usr/sbin/nginx".into()],
            cgroup: vec!["/system.slice/*".into()],
            uid: vec![0, 33],
            pids: vec![7],
            ..Match::default()
        };
        assert_eq!(Matcher::of(&wanted).mismatches(&seen, &ProcessPod::NoMetadata), Vec::<String>::new());
        let other = Match {
            comm: vec!["python3*".into(), "node".into()],
            uid: vec![0],
            namespaces: vec!["shop".into()],
            ..wanted
        };
        let found = Matcher::of(&other).mismatches(&seen, &ProcessPod::NoMetadata);
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
    fn runtime_and_version_of_a_process_are_compared() {
        let of = |name: &str, version: &str| SurveyedProcess {
            runtime: (name.into(), version.into()),
            ..SurveyedProcess::default()
        };
        let wanted = Match {
            runtime: vec!["python".into()],
            runtime_version: vec!["3.12".into(), "3.13".into()],
            ..Match::default()
        };
        let matcher = Matcher::of(&wanted);
        assert!(matcher.compares_runtime() && !Matcher::of(&Match::default()).compares_runtime());
        let of_shop = Matcher::of(&Match { service: vec!["shop*".into()], ..Match::default() });
        let gives = |name: &str| SurveyedProcess { service: name.into(), ..SurveyedProcess::default() };
        assert!(of_shop.compares_service() && !matcher.compares_service());
        assert!(of_shop.mismatches(&gives("shop-eu"), &ProcessPod::None).is_empty());
        assert_eq!(of_shop.mismatches(&gives(""), &ProcessPod::None), ["match.service: is ``, not `shop*`"]);
        for (seen, expected) in [
            (of("python", "3.12.1"), None),
            (of("python", "3.11.2"), Some("match.runtime_version: is 3.11.2, not 3.12 or 3.13")),
            (of("java", "21.0"), Some("match.runtime: is java, not python")),
            (of("", ""), Some("match.runtime: is no language runtime that the agent knows, not python")),
        ] {
            let found = matcher.mismatches(&seen, &ProcessPod::None);
            assert_eq!(found, expected.into_iter().collect::<Vec<_>>(), "{seen:?}");
        }
    }

    #[test]
    fn a_program_of_a_dynamic_linker_is_explained() {
        let linker = SurveyedProcess {
            comm: "ld-linux-x86-64".into(),
            exe: "/usr/lib64/ld-linux-x86-64.so.2".into(),
            ..SurveyedProcess::default()
        };
        let wanted = Match { exe: vec!["/opt/prog".into()], cgroup: vec!["/a".into()], ..Match::default() };
        assert_eq!(
            Matcher::of(&wanted).mismatches(&linker, &ProcessPod::None),
            [
                "match.exe: is `/usr/lib64/ld-linux-x86-64.so.2`, not `/opt/prog` (a dynamic linker runs the program: match \
                 by cgroup, pod or pid instead)",
                "match.cgroup: is ``, not `/a`"
            ]
        );
    }

    #[test]
    fn pod_fields_compare_the_pod_and_a_denied_pod_never_matches() {
        let pod = Pod {
            namespace: "shop".into(),
            name: "checkout-1".into(),
            labels: [("app".to_owned(), "checkout".to_owned())].into(),
            ..Pod::default()
        };
        let place = ProcessPod::In(Arc::new(pod.clone()), Some("app".into()));
        let wanted = |pod_labels: &str, containers: &[&str]| {
            Matcher::of(&Match {
                namespaces: vec!["shop".into()],
                pod_labels: pod_labels.into(),
                containers: containers.iter().map(|&name| name.to_owned()).collect(),
                ..Match::default()
            })
        };
        let seen = SurveyedProcess::default();
        assert_eq!(wanted("app=checkout", &["app"]).mismatches(&seen, &place), Vec::<String>::new());
        let found = wanted("app=cart", &["side"]).mismatches(&seen, &place);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(
            found[0]
                .contains("match.pod_labels: is in pod shop/checkout-1, container app, labels app=checkout")
        );
        assert_eq!(wanted("", &[]).mismatches(&seen, &ProcessPod::None).len(), 1);
        let denied = ProcessPod::In(Arc::new(Pod { denied: true, ..pod }), None);
        assert_eq!(
            wanted("", &[]).mismatches(&seen, &denied),
            ["an annotation of its pod forbids profiling"]
        );
    }
}
