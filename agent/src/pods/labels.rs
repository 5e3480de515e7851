//! Names profiles after their pods.

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use gannet_proto::labels::{self as name, Labels};

use super::{PodLookup, Pods, Workload, model::Pod};
use crate::profile::{ContainerRef, SeriesProfile};

/// How long the profiles of a window wait for a container whose pod is not known either. With windows of the usual length they
/// are 10 to 15 seconds old then.
const UNKNOWN_POD_WAIT: Duration = Duration::from_secs(5);
/// How long they wait for a container of a known pod, which the kubelet lists for certain. Without the wait, one container would
/// have a series with its name and one without.
pub(crate) const MAX_LABEL_WAIT: Duration = Duration::from_secs(12);
/// How often a waiting window requests its unknown containers again.
const REQUEST_PAUSE: Duration = Duration::from_millis(500);

/// Labels that profiles get beside namespace, pod, container, workload and service.
#[derive(Clone, Debug, Default)]
pub struct PodLabelOptions {
    /// The cluster's name; empty: no label.
    pub cluster: String,
    /// Keys of pod labels that become labels of series.
    pub pod_labels: Vec<String>,
}

/// The decision about a profile.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Deliver,
    Denied,
}

/// Labels the profiles of one window, as [`Pods::label`] describes.
pub(super) async fn label(pods: &Pods, profiles: &mut Vec<SeriesProfile>) -> u64 {
    wait_for_containers(pods, profiles).await;
    let mut denied = 0;
    profiles.retain_mut(|profile| match label_one(pods, profile) {
        Verdict::Deliver => {
            let cut = cut_values(&mut profile.labels);
            if cut > 0 && pods.0.cut_labels.fetch_add(cut, Relaxed) == 0 {
                tracing::warn!(
                    "label values above {} bytes are cut and end with `…`, because a collector would refuse their profiles: they are \
                     paths of executables or control groups; logged once, gannet_agent_pods_cut_label_values_total counts on",
                    name::MAX_VALUE_BYTES
                );
            }
            true
        }
        Verdict::Denied => {
            denied += profile.samples;
            false
        }
    });
    denied
}

/// Cuts values to the length that a collector takes. Returns how many it cut.
fn cut_values(labels: &mut Labels) -> u64 {
    labels.values_mut().map(|value| u64::from(gannet_base::cut(value, name::MAX_VALUE_BYTES))).sum()
}

async fn wait_for_containers(pods: &Pods, profiles: &[SeriesProfile]) {
    let mut changes = pods.changes();
    let begun = tokio::time::Instant::now();
    loop {
        let wait = profiles.iter().filter_map(|profile| wait_for(pods, profile.container.as_ref()?)).max();
        let Some(until) = wait.map(|wait| begun + wait) else { return };
        if !pods.is_active() || tokio::time::Instant::now() >= until {
            return;
        }
        tokio::select! {
            _ = changes.changed() => {}
            // A feed without changes does not end the wait; a container that becomes unlisted meanwhile does.
            () = tokio::time::sleep(REQUEST_PAUSE) => {}
            () = pods.0.closed.cancelled() => return,
        }
    }
}

/// Returns how long a window waits for a container; none for one that is known or unlisted. Requests it.
fn wait_for(pods: &Pods, container: &ContainerRef) -> Option<Duration> {
    let path = container.path();
    pods.request_path(&path);
    if pods.look_up_path(&path) != PodLookup::Unknown {
        return None;
    }
    Some(if pods.pod_of_path(&path).is_some() { MAX_LABEL_WAIT } else { UNKNOWN_POD_WAIT })
}

fn label_one(pods: &Pods, profile: &mut SeriesProfile) -> Verdict {
    let options = &pods.0.label_options;
    if !options.cluster.is_empty() {
        profile.labels.insert(name::CLUSTER.to_owned(), options.cluster.clone());
    }
    let Some(container) = &profile.container else { return Verdict::Deliver };
    // If no list contains the container, or none yet, the pod's uid alone identifies the pod.
    let Some((pod, container_name)) = pods.pod_of_path(&container.path()) else { return Verdict::Deliver };
    if pod.denied {
        return Verdict::Denied;
    }
    let labels = std::mem::take(&mut profile.labels);
    profile.labels =
        labels_of(&pod, container_name.as_deref(), &options.pod_labels, profile.names_service, labels);
    for process in &mut profile.raw.processes {
        process.pod_uid.clone_from(&pod.uid);
    }
    Verdict::Deliver
}

/// Returns the series labels of a pod's container. `labels` contains those of the process and of the rule. `allowed` are the
/// keys of pod labels to take. `names_service`: the process gives the name of its service.
fn labels_of(
    pod: &Pod,
    container: Option<&str>,
    allowed: &[String],
    names_service: bool,
    mut labels: Labels,
) -> Labels {
    for key in allowed {
        if let Some(value) = pod.labels.get(key).filter(|value| !value.is_empty()) {
            // Labels of the agent and of the rule take precedence.
            labels.entry(series_label(key)).or_insert_with(|| value.clone());
        }
    }
    let mut set = |name: &str, value: &str| {
        if !value.is_empty() {
            labels.insert(name.to_owned(), value.to_owned());
        }
    };
    set(name::NAMESPACE, &pod.namespace);
    set(name::POD, &pod.name);
    set(name::CONTAINER, container.unwrap_or_default());
    if let Some(Workload { kind, name }) = &pod.workload {
        set(name::WORKLOAD, name);
        set(name::WORKLOAD_KIND, kind);
    }
    // An annotation for Gannet takes precedence over the name that the process gives, and that name over all other sources.
    let service = if names_service { pod.annotated_service_name() } else { pod.service_name(container) };
    set(name::SERVICE_NAME, service.unwrap_or_default());
    for (label, value) in
        [(name::SERVICE_NAMESPACE, pod.service_namespace()), (name::SERVICE_VERSION, pod.service_version())]
    {
        if !value.is_empty() {
            labels.entry(label.to_owned()).or_insert_with(|| value.to_owned());
        }
    }
    labels
}

/// Returns the series label for a pod label's key: valid in Prometheus, and different from the agent's own labels.
fn series_label(key: &str) -> String {
    let safe = name::safe_name(key);
    if name::RESERVED.contains(&safe.as_str()) { format!("pod_label_{safe}") } else { safe }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        sync::Arc,
        time::{Instant, SystemTime},
    };

    use super::*;
    use crate::{
        cgroup::{CgroupNames, PathContainer},
        model::{ProcessKey, SampleKind},
        pods::{PodChange, PodContainer},
        profile::{RawProcess, RawProfile},
    };

    fn pod(uid: &str, containers: &[(&str, &str)]) -> Pod {
        Pod {
            uid: uid.into(),
            namespace: "shop".into(),
            name: format!("checkout-{uid}"),
            labels: BTreeMap::from([
                ("app.kubernetes.io/version".into(), "7".into()),
                ("pod".into(), "liar".into()),
                ("team".into(), "pods".into()),
            ]),
            workload: Some(Workload { kind: "deployment".into(), name: "checkout".into() }),
            containers: containers
                .iter()
                .map(|(name, id)| PodContainer { name: (*name).into(), id: (*id).into() })
                .collect(),
            ..Pod::default()
        }
    }

    fn profile(container: &str, pod_uid: &str) -> SeriesProfile {
        let process = RawProcess {
            key: ProcessKey { tgid: 1, start_boottime_ns: 1 },
            comm: "python3".into(),
            container_id: container.into(),
            pod_uid: pod_uid.into(),
            image: Arc::default(),
            interpreter: None,
            start_labels: None,
            stacks: Vec::new(),
        };
        SeriesProfile {
            labels: Labels::from([
                ("node".into(), "n".into()),
                ("service_name".into(), "python3".into()),
                ("team".into(), "rule".into()),
            ]),
            rule: crate::profile::RuleTag::default(),
            samples: 3,
            raw: RawProfile {
                kind: SampleKind::OnCpu,
                period_ns: 1,
                start: SystemTime::UNIX_EPOCH,
                duration: Duration::from_secs(10),
                processes: vec![process],
                comments: Vec::new(),
            },
            names_service: false,
            container: (!container.is_empty()).then(|| ContainerRef {
                id: container.into(),
                pod_uid: pod_uid.into(),
                outer: Vec::new(),
            }),
        }
    }

    fn synced(options: PodLabelOptions, pods: Vec<Pod>) -> Pods {
        let known = Pods::new(options);
        known.set_active(true);
        known.apply(PodChange::All(pods.into()), Instant::now());
        known
    }

    fn show(profile: &SeriesProfile) -> String {
        profile.labels.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
    }

    #[tokio::test]
    async fn profiles_get_the_labels_of_their_pods() {
        let options = PodLabelOptions {
            cluster: "east".into(),
            pod_labels: vec!["app.kubernetes.io/version".into(), "pod".into(), "team".into(), "none".into()],
        };
        let pods =
            synced(options, vec![pod("u1", &[("app", "c1"), ("log", "c2")]), pod("u2", &[("app", "c3")])]);
        let mut profiles =
            vec![profile("c1", "u1"), profile("c2", "u1"), profile("c3", "u2"), profile("", "")];
        assert_eq!(pods.label(&mut profiles).await, 0);
        // A rule's label takes precedence over a pod's label. A pod's label never replaces one of the agent's.
        insta::assert_snapshot!(profiles.iter().map(show).collect::<Vec<_>>().join("\n"), @r"
        app_kubernetes_io_version=7 cluster=east container=app namespace=shop node=n pod=checkout-u1 pod_label_pod=liar service_name=checkout service_version=7 team=rule workload=checkout workload_kind=deployment
        app_kubernetes_io_version=7 cluster=east container=log namespace=shop node=n pod=checkout-u1 pod_label_pod=liar service_name=checkout service_version=7 team=rule workload=checkout workload_kind=deployment
        app_kubernetes_io_version=7 cluster=east container=app namespace=shop node=n pod=checkout-u2 pod_label_pod=liar service_name=checkout service_version=7 team=rule workload=checkout workload_kind=deployment
        cluster=east node=n service_name=python3 team=rule
        ");
        assert_eq!(profiles[0].raw.processes[0].pod_uid, "u1");
    }

    /// Checks host processes and those of pods: a path can have 4,095 bytes, and a collector refuses longer values.
    #[tokio::test]
    async fn long_values_are_cut_with_a_mark_and_counted() {
        let pods = synced(PodLabelOptions::default(), vec![pod("u1", &[("app", "c1")])]);
        let mut profiles = vec![profile("", ""), profile("c1", "u1"), profile("", "")];
        let long = format!("/x{}", "é".repeat(2000));
        for profile in &mut profiles[..2] {
            profile.labels.extend([("exe".into(), long.clone()), ("cgroup".into(), long.clone())]);
        }
        profiles[2].labels.insert("exe".into(), "x".repeat(name::MAX_VALUE_BYTES));
        assert_eq!(pods.label(&mut profiles).await, 0);
        for profile in &profiles {
            assert_eq!(name::check(&profile.labels), Ok(()));
        }
        for value in ["exe", "cgroup"].map(|label| &profiles[0].labels[label]) {
            assert!(value.ends_with("é…") && value.len() > name::MAX_VALUE_BYTES - 4, "{value}");
        }
        assert!(profiles[2].labels["exe"].ends_with('x'), "it fits");
        assert_eq!(pods.counts().cut_labels, 4);
    }

    #[tokio::test]
    async fn an_unlisted_container_is_delivered_with_its_id_alone() {
        let pods = synced(PodLabelOptions::default(), vec![pod("u1", &[])]);
        // No feed lists them: each wait has an end.
        let took = async |profiles: &mut Vec<SeriesProfile>| {
            let begun = Instant::now();
            assert_eq!(pods.label(profiles).await, 0);
            begun.elapsed()
        };
        let mut profiles = vec![profile("gone", "u9")];
        assert!((UNKNOWN_POD_WAIT..MAX_LABEL_WAIT).contains(&took(&mut profiles).await));
        let mut late = vec![profile("late", "u1")];
        assert!(took(&mut late).await >= MAX_LABEL_WAIT);
        let late = &late[0].labels;
        assert_eq!((late["pod"].as_str(), late.get("container")), ("checkout-u1", None), "the uid is enough");
        assert_eq!(show(&profiles[0]), "node=n service_name=python3 team=rule");
        assert_eq!(profiles[0].raw.processes[0].container_id, "gone");
    }

    #[tokio::test]
    async fn a_window_waits_for_a_container_that_becomes_known() {
        let pods = synced(PodLabelOptions::default(), vec![]);
        let later = pods.clone();
        tokio::spawn(async move {
            later.0.requested.notified().await;
            later.apply(PodChange::Set(pod("u1", &[("app", "c1")])), Instant::now());
        });
        let mut profiles = vec![profile("c1", "u1")];
        pods.label(&mut profiles).await;
        assert_eq!(profiles[0].labels["pod"], "checkout-u1");
    }

    #[tokio::test]
    async fn a_slow_kubelet_leaves_no_series_without_container() {
        let pods = synced(PodLabelOptions::default(), vec![pod("u1", &[])]);
        let later = pods.clone();
        tokio::spawn(async move {
            // The kubelet lists the pod each second, and its container 8 s after the start.
            for second in 1..=8 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let containers: &[(&str, &str)] = if second == 8 { &[("app", "c1")] } else { &[] };
                later.apply(PodChange::All(vec![pod("u1", containers)].into()), Instant::now());
            }
        });
        let mut profiles = vec![profile("c1", "u1")];
        assert_eq!(pods.label(&mut profiles).await, 0);
        assert_eq!(profiles[0].labels.get("container").map(String::as_str), Some("app"));
    }

    #[tokio::test]
    async fn no_window_waits_for_a_container_in_a_known_one() {
        let pods = synced(PodLabelOptions::default(), vec![pod("u1", &[("app", "c1")])]);
        let mut profiles = vec![profile("inner", "u1")];
        if let Some(container) = &mut profiles[0].container {
            container.outer = vec![PathContainer { id: "c1".into(), pod_uid: "u1".into() }];
        }
        let begun = Instant::now();
        assert_eq!(pods.label(&mut profiles).await, 0);
        assert!(begun.elapsed() < MAX_LABEL_WAIT / 2);
        assert_eq!((profiles[0].labels["container"].as_str(), pods.counts().requested), ("app", 0));
        // The sample's own label names the inner one.
        assert_eq!(profiles[0].raw.processes[0].container_id, "inner");
    }

    #[tokio::test]
    async fn profiles_of_a_denying_pod_are_removed() {
        let denying = |uid: &str, containers| Pod { denied: true, ..pod(uid, containers) };
        let pods = synced(
            PodLabelOptions::default(),
            vec![denying("u1", &[("app", "c1")]), denying("u2", &[]), pod("u3", &[("app", "c3")])],
        );
        pods.close();
        // The second has an unlisted container of a listed pod.
        let mut profiles = vec![profile("c1", "u1"), profile("c2", "u2"), profile("c3", "u3")];
        assert_eq!(pods.label(&mut profiles).await, 6);
        assert_eq!(profiles.len(), 1);
        let is_denied = |container: &str, uid: &str| {
            let names =
                CgroupNames { container_id: container.into(), pod_uid: uid.into(), ..CgroupNames::default() };
            pods.pod_of(&names).is_some_and(|(pod, _)| pod.denied)
        };
        assert!(is_denied("c2", "u2") && !is_denied("c3", "u3") && !is_denied("", ""));
    }

    #[tokio::test]
    async fn without_a_feed_nothing_waits() {
        let pods = Pods::default();
        let begun = Instant::now();
        let mut profiles = vec![profile("c1", "u1")];
        assert_eq!(pods.label(&mut profiles).await, 0);
        assert!(begun.elapsed() < MAX_LABEL_WAIT);
        assert_eq!(profiles.len(), 1);
    }

    #[test]
    fn labels_of_pods_are_valid_series_labels() {
        assert_eq!(series_label("app.kubernetes.io/version"), "app_kubernetes_io_version");
        assert_eq!(series_label("node"), "pod_label_node");
        let mut pod = pod("u1", &[]);
        pod.labels.insert("long".into(), "ü".repeat(2000));
        let mut labels = labels_of(&pod, None, &["long".into()], false, Labels::new());
        assert_eq!(cut_values(&mut labels), 1);
        assert_eq!(gannet_proto::labels::check(&labels), Ok(()));
    }
}
