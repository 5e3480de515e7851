//! A pod, as far as profiles need it, and what its names mean.

use std::collections::BTreeMap;

/// Set to `"false"` on a pod that is never to be profiled.
pub(super) const PROFILE_ANNOTATION: &str = "gannet.dev/profile";
/// The name that a pod's profiles are filed under.
pub(super) const SERVICE_NAME_ANNOTATION: &str = "gannet.dev/service-name";
/// The uid that the control groups of a static pod have; what the API server shows is a mirror with a uid of its own.
pub(super) const CONFIG_HASH_ANNOTATION: &str = "kubernetes.io/config.hash";
/// The only annotations that are kept; others may hold anything.
pub(super) const ANNOTATIONS: [&str; 3] =
    [PROFILE_ANNOTATION, SERVICE_NAME_ANNOTATION, CONFIG_HASH_ANNOTATION];

const APP_NAME_LABEL: &str = "app.kubernetes.io/name";
const TEMPLATE_HASH_LABEL: &str = "pod-template-hash";
const ROLLOUT_HASH_LABEL: &str = "rollouts-pod-template-hash";

/// More labels of one pod are not kept: some fifty times what pods have.
pub(super) const MOST_LABELS: usize = 512;
/// More containers of one pod are not kept, former ones included.
pub(super) const MOST_CONTAINERS: usize = 512;

/// One pod of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// As the source shows it.
    pub uid: String,
    /// What a static pod's control groups are named with instead of the uid; empty for others.
    pub config_hash: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// All its labels.
    pub labels: BTreeMap<String, String>,
    /// What runs it; none for a pod that somebody made by hand, and for a static one.
    pub workload: Option<Workload>,
    /// The name that an annotation asks for; empty where there is none.
    pub service_name: String,
    /// An annotation says that it is never to be profiled.
    pub denied: bool,
    /// Init, side-car, ephemeral ones and the former instances of restarted ones too.
    pub containers: Vec<Container>,
}

/// A container of a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Container {
    /// Its name in the pod.
    pub name: String,
    /// As the runtime knows it: 64 hex digits.
    pub id: String,
}

/// What runs a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Workload {
    /// In lower case: `deployment`.
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// A pod as its source tells it, before anything is concluded from it.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) uid: String,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
    /// Those of [`ANNOTATIONS`].
    pub(super) annotations: BTreeMap<String, String>,
    /// Kind and name of the owner that controls it.
    pub(super) controller: Option<(String, String)>,
    /// Name and runtime id (`containerd://…`).
    pub(super) containers: Vec<(String, String)>,
}

impl From<Told> for Pod {
    fn from(told: Told) -> Self {
        let Told { uid, namespace, name, labels, mut annotations, controller, containers } = told;
        let mut containers: Vec<Container> = containers
            .into_iter()
            .filter_map(|(name, id)| Some(Container { name, id: container_id(&id)?.to_owned() }))
            .collect();
        containers.sort_unstable();
        containers.dedup();
        containers.truncate(MOST_CONTAINERS);
        Self {
            workload: controller.and_then(|(kind, name)| Workload::of(&kind, &name, &labels)),
            denied: annotations.get(PROFILE_ANNOTATION).is_some_and(|value| is_no(value)),
            service_name: annotations.remove(SERVICE_NAME_ANNOTATION).unwrap_or_default(),
            config_hash: annotations.remove(CONFIG_HASH_ANNOTATION).unwrap_or_default(),
            uid,
            namespace,
            name,
            labels,
            containers,
        }
    }
}

/// Whoever writes `False` does not want to be profiled either.
fn is_no(value: &str) -> bool {
    value.trim().eq_ignore_ascii_case("false")
}

/// The id within `containerd://ID`; containers that do not run yet have none.
fn container_id(text: &str) -> Option<&str> {
    let id = text.rsplit_once("://").map_or(text, |(_, id)| id);
    (!id.is_empty() && id.len() <= 128).then_some(id)
}

impl Pod {
    /// What the profiles of a container are filed under, by precedence: the annotation, the usual label, the workload,
    /// the container. None: only the executable is left.
    pub fn service_name<'a>(&'a self, container: Option<&'a str>) -> Option<&'a str> {
        [
            Some(self.service_name.as_str()),
            self.labels.get(APP_NAME_LABEL).map(String::as_str),
            self.workload.as_ref().map(|workload| workload.name.as_str()),
            container,
        ]
        .into_iter()
        .flatten()
        .find(|name| !name.is_empty())
    }

    /// Whether control groups of pods are named with this for it.
    pub fn has_uid(&self, uid: &str) -> bool {
        !uid.is_empty() && (uid == self.uid || uid == self.config_hash)
    }
}

impl Workload {
    /// From the owner that controls a pod, to what people call the workload.
    fn of(kind: &str, name: &str, labels: &BTreeMap<String, String>) -> Option<Self> {
        let without = |label| {
            let hash = labels.get(label)?;
            name.strip_suffix(hash.as_str())?.strip_suffix('-').filter(|name| !name.is_empty())
        };
        let (kind, name) = match kind {
            // A static pod's mirror belongs to its node.
            "" | "Node" => return None,
            "ReplicaSet" => match (without(TEMPLATE_HASH_LABEL), without(ROLLOUT_HASH_LABEL)) {
                (Some(deployment), _) => ("Deployment", deployment),
                (None, Some(rollout)) => ("Rollout", rollout),
                (None, None) => (kind, name),
            },
            "Job" => match scheduled(name) {
                Some(cron_job) => ("CronJob", cron_job),
                None => (kind, name),
            },
            _ => (kind, name),
        };
        (!name.is_empty()).then(|| Self { kind: kind.to_lowercase(), name: name.to_owned() })
    }
}

/// The CronJob's name, if a Job is named as a CronJob names its Jobs: `-` and the time that it was due, in minutes (in
/// seconds before Kubernetes 1.21). A pod does not tell who owns its Job. Only times between 2019 and 2046 count, so that
/// a date that somebody put there (`-20260131`) is none.
fn scheduled(job: &str) -> Option<&str> {
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
    fn the_workload_is_what_people_call_it(
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
    fn the_service_name_goes_by_precedence() {
        let mut pod = Pod {
            service_name: "asked-for".into(),
            labels: labels("app.kubernetes.io/name=labelled"),
            workload: Some(Workload { kind: "deployment".into(), name: "workload".into() }),
            ..Pod::default()
        };
        assert_eq!(pod.service_name(Some("app")), Some("asked-for"));
        pod.service_name.clear();
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
        assert_eq!(Pod::from(Told { annotations, ..Told::default() }).denied, denied);
    }

    #[test]
    fn container_ids_lose_the_runtimes_name() {
        let told = Told {
            containers: vec![
                ("app".into(), "containerd://abc".into()),
                ("app".into(), "containerd://abc".into()),
                ("old".into(), "docker://def".into()),
                ("not-yet".into(), String::new()),
            ],
            ..Told::default()
        };
        let ids: Vec<_> = Pod::from(told).containers.into_iter().map(|c| (c.name, c.id)).collect();
        assert_eq!(ids, [("app".into(), "abc".into()), ("old".into(), "def".into())]);
    }
}
