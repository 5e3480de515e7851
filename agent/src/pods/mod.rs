//! Whose container that is: the pods of this node, from the kubelet or the API server, by container.
//!
//! One task owns the source and writes what it tells into one store; everybody else asks a [`Pods`] handle. A process
//! is matched by the id of its container, which its control group's path holds; pods are never guessed. What no source
//! has told of yet is asked for, and waited for a moment when a window is turned into profiles; after that it ships
//! with its container id alone.

mod arm;
mod feed;
mod model;
pub mod resolve;
mod store;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use gannet_proto::labels::{self as name, Labels};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

pub use arm::arm;
pub use feed::{
    Change, PATIENCE, PodSource, SourceError, SourceKind, SourceOptions, check_address, follow, sources,
};
pub use model::{Container, Pod, Workload};
pub use store::Lookup;

use crate::profile::SeriesProfile;

/// How long the profiles of a window wait for a container that has just come to be known. Then they are 10 to 15 seconds
/// old, if the window is as long as usual.
pub const LONGEST_JOIN: Duration = Duration::from_secs(5);

/// What the pods of this node are called in profiles.
#[derive(Clone, Debug, Default)]
pub struct LabelOptions {
    /// The cluster's name; empty: no label.
    pub cluster: String,
    /// Labels of pods that become labels of series.
    pub pod_labels: Vec<String>,
}

/// A handle to what is known of the node's pods.
#[derive(Clone, Debug)]
pub struct Pods(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    options: LabelOptions,
    store: Mutex<store::Store>,
    status: Mutex<Status>,
    /// Somebody asks for a container that is not known.
    wanted: Notify,
    /// Counts what the source has told.
    told: watch::Sender<u64>,
    /// There is, or is to be, a source.
    active: AtomicBool,
    end: CancellationToken,
}

/// How it goes with the sources.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Readiness waits for the first answer.
    pub awaited: bool,
    /// The one that is followed.
    pub source: Option<SourceKind>,
    /// Why the others are not: each with its last error.
    pub passed_over: Vec<(SourceKind, String)>,
    /// Complete lists and changes taken in.
    pub updates: u64,
    /// When the source told of something last; a watch that has nothing to tell is not old.
    pub last_update: Option<SystemTime>,
    /// Failures of any source.
    pub errors: u64,
    /// The last one.
    pub last_error: Option<String>,
}

/// What becomes of a container's profile.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Ship,
    Denied,
}

impl Default for Pods {
    fn default() -> Self {
        Self::new(LabelOptions::default())
    }
}

impl Pods {
    /// Knows nothing, until a source is [followed](follow).
    pub fn new(options: LabelOptions) -> Self {
        Self(Arc::new(Shared {
            options,
            store: Mutex::default(),
            status: Mutex::default(),
            wanted: Notify::new(),
            told: watch::Sender::new(0),
            active: AtomicBool::new(false),
            end: CancellationToken::new(),
        }))
    }

    /// Whose container this is. `pod_uid` as its control group has it.
    pub fn look_up(&self, container_id: &str, pod_uid: &str) -> Lookup {
        self.store().look_up(container_id, pod_uid, Instant::now())
    }

    /// A process of this container is of interest: if nothing is known of it, its source is asked.
    pub fn ask(&self, container_id: &str, pod_uid: &str) {
        if !container_id.is_empty()
            && self.0.active.load(Relaxed)
            && self.store().ask(container_id, pod_uid, Instant::now())
        {
            self.0.wanted.notify_one();
        }
    }

    /// Its pod says that it is never to be profiled.
    pub fn is_denied(&self, container_id: &str, pod_uid: &str) -> bool {
        if container_id.is_empty() && pod_uid.is_empty() {
            return false;
        }
        let mut store = self.store();
        match store.look_up(container_id, pod_uid, Instant::now()) {
            Lookup::Known { pod, .. } => pod.denied,
            Lookup::Unknown | Lookup::InVain => store.pod(pod_uid).is_some_and(|pod| pod.denied),
        }
    }

    /// The pod whose control groups have this uid.
    pub fn by_uid(&self, uid: &str) -> Option<Arc<Pod>> {
        self.store().pod(uid)
    }

    /// The pods that are listed now.
    pub fn live(&self) -> Vec<Arc<Pod>> {
        self.store().live()
    }

    /// All pods, those that are kept for their last samples with the time since when.
    pub fn all(&self) -> Vec<(Arc<Pod>, Option<Duration>)> {
        self.store().all(Instant::now()).map(|(pod, gone)| (Arc::clone(pod), gone)).collect()
    }

    /// Whether any pod does not want to be profiled.
    pub(crate) fn any_denied(&self) -> bool {
        self.store().all(Instant::now()).any(|(pod, _)| pod.denied)
    }

    /// How it goes with the sources.
    pub fn status(&self) -> Status {
        lock(&self.0.status).clone()
    }

    /// Containers that are known; that were asked for and are not known yet; that nobody knows; pods without a place.
    pub fn counts(&self) -> (usize, usize, usize, u64) {
        let store = self.store();
        let (asked, in_vain) = store.unknown();
        (store.containers(), asked, in_vain, store.refused)
    }

    /// Whether readiness still waits for the first answer.
    pub fn is_synced(&self) -> bool {
        let status = lock(&self.0.status);
        !status.awaited || status.updates > 0
    }

    /// Tells whenever the pods have changed: who decides by them looks again.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.told.subscribe()
    }

    /// Nobody waits for anything any more.
    pub fn close(&self) {
        self.0.end.cancel();
    }

    /// Gives the profiles of a window their pods' names, waiting a moment for containers that have just started. Gives
    /// the samples that are dropped because their pod does not want to be profiled.
    pub(crate) async fn join(&self, profiles: &mut Vec<SeriesProfile>) -> u64 {
        let mut told = self.0.told.subscribe();
        let until = tokio::time::Instant::now() + LONGEST_JOIN;
        loop {
            let unknown = profiles.iter().filter_map(|profile| profile.container.as_ref()).any(|container| {
                self.ask(&container.id, &container.pod_uid);
                self.look_up(&container.id, &container.pod_uid) == Lookup::Unknown
            });
            if !unknown || !self.0.active.load(Relaxed) {
                break;
            }
            tokio::select! {
                _ = told.changed() => {}
                // A source that tells nothing new does not end the wait; who was asked for in vain does.
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
                () = self.0.end.cancelled() => break,
            }
            if tokio::time::Instant::now() >= until {
                break;
            }
        }
        let mut denied = 0;
        profiles.retain_mut(|profile| match self.name(profile) {
            Verdict::Ship => true,
            Verdict::Denied => {
                denied += profile.samples;
                false
            }
        });
        denied
    }

    /// Gives one profile its names.
    fn name(&self, profile: &mut SeriesProfile) -> Verdict {
        if !self.0.options.cluster.is_empty() {
            profile.labels.insert(name::CLUSTER.to_owned(), self.0.options.cluster.clone());
        }
        let Some(container) = &profile.container else { return Verdict::Ship };
        let (pod, container_name) = match self.look_up(&container.id, &container.pod_uid) {
            Lookup::Known { pod, container } => (pod, container),
            // Its container is in no list, or not yet; the uid alone says whose it is.
            Lookup::Unknown | Lookup::InVain => match self.by_uid(&container.pod_uid) {
                Some(pod) => (pod, None),
                None => return Verdict::Ship,
            },
        };
        if pod.denied {
            return Verdict::Denied;
        }
        profile.labels = labelled(
            &pod,
            container_name.as_deref(),
            &self.0.options.pod_labels,
            std::mem::take(&mut profile.labels),
        );
        for process in &mut profile.raw.processes {
            process.pod_uid.clone_from(&pod.uid);
        }
        Verdict::Ship
    }

    fn store(&self) -> MutexGuard<'_, store::Store> {
        lock(&self.0.store)
    }

    fn set_status(&self, set: impl FnOnce(&mut Status)) {
        set(&mut lock(&self.0.status));
    }
}

/// The series of a pod's container. `labels` holds what the process alone says and what the rule adds.
fn labelled(pod: &Pod, container: Option<&str>, allowed: &[String], mut labels: Labels) -> Labels {
    for key in allowed {
        if let Some(value) = pod.labels.get(key).filter(|value| !value.is_empty()) {
            // The agent's own labels and the rule's go before the pod's.
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
    if let Some(service) = pod.service_name(container) {
        set(name::SERVICE_NAME, service);
    }
    for value in labels.values_mut() {
        if value.len() > name::MAX_VALUE_BYTES {
            let mut end = name::MAX_VALUE_BYTES;
            while !value.is_char_boundary(end) {
                end -= 1;
            }
            value.truncate(end);
        }
    }
    labels
}

/// A pod label's name as a label of series: Prometheus-safe, and none of the agent's own.
pub fn series_label(key: &str) -> String {
    let safe = name::safe_name(key);
    if name::RESERVED.contains(&safe.as_str()) { format!("pod_label_{safe}") } else { safe }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use super::*;
    use crate::{
        model::{ProcessKey, SampleKind},
        profile::{ContainerRef, RawProcess, RawProfile},
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
                .map(|(name, id)| Container { name: (*name).into(), id: (*id).into() })
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
            container: (!container.is_empty())
                .then(|| ContainerRef { id: container.into(), pod_uid: pod_uid.into() }),
        }
    }

    fn told(options: LabelOptions, pods: Vec<Pod>) -> Pods {
        let known = Pods::new(options);
        known.0.active.store(true, Relaxed);
        known.store().apply(Change::All(pods), Instant::now(), Instant::now());
        known
    }

    fn show(profile: &SeriesProfile) -> String {
        profile.labels.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
    }

    #[tokio::test]
    async fn profiles_are_named_after_their_pods() {
        let options = LabelOptions {
            cluster: "east".into(),
            pod_labels: vec!["app.kubernetes.io/version".into(), "pod".into(), "team".into(), "none".into()],
        };
        let pods =
            told(options, vec![pod("u1", &[("app", "c1"), ("log", "c2")]), pod("u2", &[("app", "c3")])]);
        let mut profiles =
            vec![profile("c1", "u1"), profile("c2", "u1"), profile("c3", "u2"), profile("", "")];
        assert_eq!(pods.join(&mut profiles).await, 0);
        // What a rule adds goes before a pod's label, and a pod's label cannot pass for one of the agent's.
        insta::assert_snapshot!(profiles.iter().map(show).collect::<Vec<_>>().join("\n"), @r"
        app_kubernetes_io_version=7 cluster=east container=app namespace=shop node=n pod=checkout-u1 pod_label_pod=liar service_name=checkout team=rule workload=checkout workload_kind=deployment
        app_kubernetes_io_version=7 cluster=east container=log namespace=shop node=n pod=checkout-u1 pod_label_pod=liar service_name=checkout team=rule workload=checkout workload_kind=deployment
        app_kubernetes_io_version=7 cluster=east container=app namespace=shop node=n pod=checkout-u2 pod_label_pod=liar service_name=checkout team=rule workload=checkout workload_kind=deployment
        cluster=east node=n service_name=python3 team=rule
        ");
        assert_eq!(profiles[0].raw.processes[0].pod_uid, "u1");
    }

    #[tokio::test]
    async fn what_is_in_no_list_ships_with_its_container_alone() {
        let pods = told(LabelOptions::default(), vec![pod("u1", &[])]);
        let begun = Instant::now();
        // Nobody lists them: they are waited for, and not for ever.
        let mut profiles = vec![profile("gone", "u9"), profile("late", "u1")];
        assert_eq!(pods.join(&mut profiles).await, 0);
        assert!(begun.elapsed() >= LONGEST_JOIN);
        let late = &profiles[1].labels;
        assert_eq!((late["pod"].as_str(), late.get("container")), ("checkout-u1", None), "its uid is enough");
        assert_eq!(show(&profiles[0]), "node=n service_name=python3 team=rule");
        assert_eq!(profiles[0].raw.processes[0].container_id, "gone");
    }

    #[tokio::test]
    async fn a_container_that_becomes_known_is_waited_for() {
        let pods = told(LabelOptions::default(), vec![]);
        let later = pods.clone();
        tokio::spawn(async move {
            later.0.wanted.notified().await;
            later.store().apply(Change::Set(pod("u1", &[("app", "c1")])), Instant::now(), Instant::now());
            later.0.told.send_modify(|count| *count += 1);
        });
        let mut profiles = vec![profile("c1", "u1")];
        pods.join(&mut profiles).await;
        assert_eq!(profiles[0].labels["pod"], "checkout-u1");
    }

    #[tokio::test]
    async fn nothing_of_a_pod_that_denies_comes_out() {
        let denying = |uid: &str, containers| Pod { denied: true, ..pod(uid, containers) };
        let pods = told(
            LabelOptions::default(),
            vec![denying("u1", &[("app", "c1")]), denying("u2", &[]), pod("u3", &[("app", "c3")])],
        );
        pods.close();
        // The second is of a container that is not listed, of a pod that is.
        let mut profiles = vec![profile("c1", "u1"), profile("c2", "u2"), profile("c3", "u3")];
        assert_eq!(pods.join(&mut profiles).await, 6);
        assert_eq!(profiles.len(), 1);
        assert!(pods.is_denied("c2", "u2") && !pods.is_denied("c3", "u3") && !pods.is_denied("", ""));
    }

    #[tokio::test]
    async fn without_a_source_nobody_waits() {
        let pods = Pods::default();
        let begun = Instant::now();
        let mut profiles = vec![profile("c1", "u1")];
        assert_eq!(pods.join(&mut profiles).await, 0);
        assert!(begun.elapsed() < LONGEST_JOIN);
        assert_eq!(profiles.len(), 1);
    }

    #[test]
    fn labels_of_pods_are_safe_for_stores() {
        assert_eq!(series_label("app.kubernetes.io/version"), "app_kubernetes_io_version");
        assert_eq!(series_label("node"), "pod_label_node");
        let mut pod = pod("u1", &[]);
        pod.labels.insert("long".into(), "ü".repeat(2000));
        let labels = labelled(&pod, None, &["long".into()], Labels::new());
        assert_eq!(gannet_proto::labels::check(&labels), Ok(()));
    }
}
