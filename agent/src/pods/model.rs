//! A pod with the fields that profiles and rules need.

use std::collections::BTreeMap;

/// With the value `"false"` it denies profiling of the pod.
const PROFILE_ANNOTATION: &str = "gannet.dev/profile";
/// Sets the service name of the pod's profiles.
const SERVICE_NAME_ANNOTATION: &str = "gannet.dev/service-name";
/// Names and version of the pod's service, as OpenTelemetry has them.
const OTEL_SERVICE_NAME: &str = "resource.opentelemetry.io/service.name";
const OTEL_SERVICE_NAMESPACE: &str = "resource.opentelemetry.io/service.namespace";
const OTEL_SERVICE_VERSION: &str = "resource.opentelemetry.io/service.version";
/// The uid in the control groups of a static pod. The API server shows a mirror pod, which has a uid of its own.
const CONFIG_HASH_ANNOTATION: &str = "kubernetes.io/config.hash";
/// The annotations that the agent evaluates. Others may be large.
pub(super) const ANNOTATIONS: [&str; 6] = [
    PROFILE_ANNOTATION,
    SERVICE_NAME_ANNOTATION,
    OTEL_SERVICE_NAME,
    OTEL_SERVICE_NAMESPACE,
    OTEL_SERVICE_VERSION,
    CONFIG_HASH_ANNOTATION,
];

const APP_INSTANCE_LABEL: &str = "app.kubernetes.io/instance";
const APP_NAME_LABEL: &str = "app.kubernetes.io/name";
const APP_PART_OF_LABEL: &str = "app.kubernetes.io/part-of";
const APP_VERSION_LABEL: &str = "app.kubernetes.io/version";
const TEMPLATE_HASH_LABEL: &str = "pod-template-hash";
const ROLLOUT_HASH_LABEL: &str = "rollouts-pod-template-hash";

/// Labels to keep of one pod, about fifty times what pods have.
pub(super) const MAX_LABELS: usize = 512;
/// Containers to keep of one pod, former instances included.
pub(super) const MAX_CONTAINERS: usize = 512;

/// One pod of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// The uid that the feed reports.
    pub uid: String,
    /// The uid in a static pod's control groups; empty for other pods.
    pub config_hash: String,
    /// The namespace of the pod.
    pub namespace: String,
    /// The name of the pod.
    pub name: String,
    /// All labels of the pod.
    pub labels: BTreeMap<String, String>,
    /// The owner that runs the pod; none for a static pod and for one that a person created.
    pub workload: Option<Workload>,
    /// The service name that an annotation sets; empty without one.
    pub service_name: String,
    /// Name, namespace and version of the service, as annotations of OpenTelemetry set them; empty without them.
    pub otel_service: [String; 3],
    /// An annotation denies profiling.
    pub denied: bool,
    /// Init, side-car and ephemeral containers too, and former instances of restarted containers.
    pub containers: Vec<PodContainer>,
    /// Labels and containers beyond the bounds.
    pub left_out: LeftOut,
}

/// Parts of a pod that the agent does not keep, because there are too many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Labels beyond the first 512 by name.
    pub labels: u64,
    /// Containers beyond 512.
    pub containers: u64,
}

/// A container, or a former instance of one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodContainer {
    /// The name in the pod.
    pub name: String,
    /// The id of the container runtime, 64 hex digits.
    pub id: String,
}

/// The owner that runs a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Workload {
    /// The kind in lower case: `deployment`.
    pub kind: String,
    /// The name of the owner.
    pub name: String,
}

/// A pod as a feed reports it, before the agent derives anything.
#[derive(Debug, Default)]
pub(super) struct ReportedPod {
    pub(super) uid: String,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
    /// Labels that the feed did not keep.
    pub(super) labels_left_out: u64,
    /// Contains at least those of [`ANNOTATIONS`].
    pub(super) annotations: BTreeMap<String, String>,
    /// Kind and name of the controlling owner.
    pub(super) controller: Option<(String, String)>,
    /// Names and runtime ids (`containerd://…`); a container that does not run yet has an empty id.
    pub(super) containers: Vec<(String, String)>,
}

impl From<ReportedPod> for Pod {
    fn from(reported: ReportedPod) -> Self {
        let ReportedPod {
            uid,
            namespace,
            name,
            labels,
            labels_left_out,
            mut annotations,
            controller,
            containers,
        } = reported;
        let beyond = labels.len().saturating_sub(MAX_LABELS) as u64;
        let labels = labels.into_iter().take(MAX_LABELS).collect();
        let mut containers: Vec<PodContainer> = containers
            .into_iter()
            .filter_map(|(name, id)| Some(PodContainer { name, id: container_id(&id)?.to_owned() }))
            .collect();
        containers.sort_unstable();
        containers.dedup();
        let left_out = LeftOut {
            labels: labels_left_out + beyond,
            containers: containers.len().saturating_sub(MAX_CONTAINERS) as u64,
        };
        containers.truncate(MAX_CONTAINERS);
        Self {
            workload: controller.and_then(|(kind, name)| Workload::of(&kind, &name, &labels)),
            denied: annotations.get(PROFILE_ANNOTATION).is_some_and(|value| is_no(value)),
            service_name: annotations.remove(SERVICE_NAME_ANNOTATION).unwrap_or_default(),
            otel_service: [OTEL_SERVICE_NAME, OTEL_SERVICE_NAMESPACE, OTEL_SERVICE_VERSION]
                .map(|name| annotations.remove(name).unwrap_or_default()),
            config_hash: annotations.remove(CONFIG_HASH_ANNOTATION).unwrap_or_default(),
            uid,
            namespace,
            name,
            labels,
            containers,
            left_out,
        }
    }
}

/// `False` denies too.
fn is_no(value: &str) -> bool {
    value.trim().eq_ignore_ascii_case("false")
}

/// Returns the id in `containerd://ID`.
fn container_id(text: &str) -> Option<&str> {
    let id = text.rsplit_once("://").map_or(text, |(_, id)| id);
    (!id.is_empty() && id.len() <= 128).then_some(id)
}

impl Pod {
    /// Returns the service name that the annotation for Gannet sets.
    pub(crate) fn annotated_service_name(&self) -> Option<&str> {
        Some(self.service_name.as_str()).filter(|name| !name.is_empty())
    }

    /// Returns the group of services: from an annotation of OpenTelemetry, or the usual label. Empty without both.
    pub(crate) fn service_namespace(&self) -> &str {
        self.annotation_or_label(&self.otel_service[1], APP_PART_OF_LABEL)
    }

    /// Returns the version of the service: from an annotation of OpenTelemetry, or the usual label. Empty without both.
    pub(crate) fn service_version(&self) -> &str {
        self.annotation_or_label(&self.otel_service[2], APP_VERSION_LABEL)
    }

    fn annotation_or_label<'a>(&'a self, annotation: &'a str, label: &str) -> &'a str {
        if annotation.is_empty() { self.labels.get(label).map_or("", String::as_str) } else { annotation }
    }

    /// Returns the service name of a container's profiles: from the annotation for Gannet, the one of OpenTelemetry, the usual
    /// labels, the workload, or the container, in this order. It is that of OpenTelemetry's conventions for Kubernetes. None: only
    /// the executable is left.
    pub(crate) fn service_name<'a>(&'a self, container: Option<&'a str>) -> Option<&'a str> {
        [
            Some(self.service_name.as_str()),
            Some(self.otel_service[0].as_str()),
            self.labels.get(APP_INSTANCE_LABEL).map(String::as_str),
            self.labels.get(APP_NAME_LABEL).map(String::as_str),
            self.workload.as_ref().map(|workload| workload.name.as_str()),
            container,
        ]
        .into_iter()
        .flatten()
        .find(|name| !name.is_empty())
    }
}

impl Workload {
    /// Derives the workload, as people call it, from the owner that controls a pod.
    fn of(kind: &str, name: &str, labels: &BTreeMap<String, String>) -> Option<Self> {
        let without = |label| {
            let hash = labels.get(label)?;
            name.strip_suffix(hash.as_str())?.strip_suffix('-').filter(|name| !name.is_empty())
        };
        let (kind, name) = match kind {
            // The node owns the mirror of a static pod.
            "" | "Node" => return None,
            "ReplicaSet" => match (without(TEMPLATE_HASH_LABEL), without(ROLLOUT_HASH_LABEL)) {
                (Some(deployment), _) => ("Deployment", deployment),
                (None, Some(rollout)) => ("Rollout", rollout),
                (None, None) => (kind, name),
            },
            "Job" => match cron_job_of(name) {
                Some(cron_job) => ("CronJob", cron_job),
                None => (kind, name),
            },
            _ => (kind, name),
        };
        (!name.is_empty()).then(|| Self { kind: kind.to_lowercase(), name: name.to_owned() })
    }
}

/// Returns the name of the CronJob of a Job. A pod does not contain the owner of its Job, but a CronJob appends `-` and the
/// scheduled time to a Job's name: minutes, or seconds before Kubernetes 1.21. Only times between 2019 and 2046 count, so
/// that a date (`-20260131`) is not taken for one.
fn cron_job_of(job: &str) -> Option<&str> {
    let (name, time) = job.rsplit_once('-')?;
    let number: u64 = time.bytes().all(|byte| byte.is_ascii_digit()).then(|| time.parse().ok())??;
    let minutes = match time.len() {
        8 => number,
        10 => number / 60,
        _ => return None,
    };
    ((26_000_000..40_000_000).contains(&minutes) && !name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn labels(text: &str) -> BTreeMap<String, String> {
        text.split(',')
            .filter_map(|pair| pair.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    #[rstest]
    #[case("ReplicaSet", "checkout-6794f7b79", "pod-template-hash=6794f7b79", "deployment/checkout")]
    #[case("ReplicaSet", "by-hand", "", "replicaset/by-hand")]
    #[case("ReplicaSet", "a-b", "pod-template-hash=c", "replicaset/a-b")]
    #[case("ReplicaSet", "shop-7c9", "rollouts-pod-template-hash=7c9", "rollout/shop")]
    #[case("ReplicaSet", "x", "pod-template-hash=x", "replicaset/x")]
    #[case("Job", "once", "", "job/once")]
    #[case("Job", "backup-29384712", "", "cronjob/backup")]
    #[case("Job", "backup-1611234060", "", "cronjob/backup")]
    #[case("Job", "migrate-20260131", "", "job/migrate-20260131")]
    #[case("Job", "try-2", "", "job/try-2")]
    #[case("StatefulSet", "db", "", "statefulset/db")]
    #[case("DaemonSet", "proxy", "", "daemonset/proxy")]
    #[case("Node", "worker-1", "", "")]
    fn owners_map_to_workloads(
        #[case] kind: &str,
        #[case] name: &str,
        #[case] of: &str,
        #[case] expected: &str,
    ) {
        let found = Workload::of(kind, name, &labels(of))
            .map_or_else(String::new, |workload| format!("{}/{}", workload.kind, workload.name));
        assert_eq!(found, expected);
    }

    #[test]
    fn service_names_follow_the_precedence() {
        let mut pod = Pod {
            service_name: "asked-for".into(),
            otel_service: ["annotated".into(), String::new(), "2".into()],
            labels: labels(
                "app.kubernetes.io/name=labelled,app.kubernetes.io/instance=labelled-eu,app.kubernetes.io/part-of=shop,\
                 app.kubernetes.io/version=1",
            ),
            workload: Some(Workload { kind: "deployment".into(), name: "workload".into() }),
            ..Pod::default()
        };
        assert_eq!(pod.service_name(Some("app")), Some("asked-for"));
        assert_eq!(pod.annotated_service_name(), Some("asked-for"));
        assert_eq!((pod.service_namespace(), pod.service_version()), ("shop", "2"));
        pod.service_name.clear();
        assert_eq!(pod.service_name(Some("app")), Some("annotated"));
        pod.otel_service = Default::default();
        assert_eq!((pod.annotated_service_name(), pod.service_version()), (None, "1"));
        assert_eq!(pod.service_name(Some("app")), Some("labelled-eu"));
        pod.labels.remove("app.kubernetes.io/instance");
        assert_eq!(pod.service_name(Some("app")), Some("labelled"));
        pod.labels.clear();
        assert_eq!(pod.service_name(Some("app")), Some("workload"));
        pod.workload = None;
        assert_eq!(pod.service_name(Some("app")), Some("app"));
        assert_eq!(pod.service_name(None), None);
    }

    #[rstest]
    #[case("false", true)]
    #[case(" False ", true)]
    #[case("true", false)]
    #[case("", false)]
    #[case("no", false)]
    fn only_false_denies(#[case] value: &str, #[case] denied: bool) {
        let annotations = BTreeMap::from([(PROFILE_ANNOTATION.to_owned(), value.to_owned())]);
        assert_eq!(Pod::from(ReportedPod { annotations, ..ReportedPod::default() }).denied, denied);
    }

    #[test]
    fn container_ids_lose_the_runtime_prefix() {
        let reported = ReportedPod {
            containers: vec![
                ("app".into(), "containerd://abc".into()),
                ("app".into(), "containerd://abc".into()),
                ("old".into(), "docker://def".into()),
                ("not-yet".into(), String::new()),
            ],
            ..ReportedPod::default()
        };
        let ids: Vec<_> = Pod::from(reported).containers.into_iter().map(|c| (c.name, c.id)).collect();
        assert_eq!(ids, [("app".into(), "abc".into()), ("old".into(), "def".into())]);
    }
}
