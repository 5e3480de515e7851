//! The pods of this node, looked up by container.
//!
//! A pod feed reports pods ([`feed`]): the kubelet or the API server. One task follows the feed and writes its changes into
//! one store; all other code asks a [`Pods`] handle. A process belongs to a pod by the id of its container, which its control
//! group's path contains; the agent never guesses. For a container that no feed has reported yet the agent requests a new
//! answer, and at the end of a window waits for it. After that wait the profile is delivered with the container id alone.

mod feed;
mod labels;
mod model;
mod nesting;
mod resolve;
mod store;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{Notify, watch},
    task::spawn_blocking,
};
use tokio_util::sync::CancellationToken;

#[doc(hidden)]
pub use self::feed::fuzz;
use self::store::PodStore;
pub(crate) use self::{
    feed::check_kubelet_address,
    labels::MAX_LABEL_WAIT,
    resolve::{PodMatcher, keep_resolving},
};
pub use self::{
    feed::{
        KUBELET_TIMEOUT, PodChange, PodFeed, PodFeedError, PodFeedKind, PodFeedOptions, PodList, feeds,
        follow,
    },
    labels::PodLabelOptions,
    model::{LeftOut, Pod, PodContainer, Workload},
    store::PodLookup,
};
use crate::{
    cgroup::{CgroupHierarchy, CgroupNames, PathContainer},
    profile::SeriesProfile,
};

/// Containers without a pod that wait until their parents are read. More are counted, and are read when they are seen again.
const MAX_UNPLACED: usize = 256;

/// A handle to the pods of this node. Clones share their state.
#[derive(Clone, Debug)]
pub struct Pods(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    label_options: PodLabelOptions,
    store: Mutex<PodStore>,
    status: Mutex<PodFeedStatus>,
    /// Notified when a caller requests a container that is not known.
    requested: Notify,
    /// Counts the changes that the feed has reported.
    changes: watch::Sender<u64>,
    /// Containers in no pod's control group, each with one of its processes, until [`Pods::keep_finding_starters`] reads them.
    unplaced: Mutex<HashMap<String, u32>>,
    /// Containers that found no room in `unplaced`.
    postponed: AtomicU64,
    /// Notified when `unplaced` has a new entry.
    unplaced_added: Notify,
    /// There is a feed, or there will be one.
    active: AtomicBool,
    /// Values of labels that were cut because no collector takes longer ones.
    cut_labels: AtomicU64,
    closed: CancellationToken,
}

/// The state of the pod feeds.
#[derive(Clone, Debug, Default)]
pub struct PodFeedStatus {
    /// Readiness waits for the first answer.
    pub awaited: bool,
    /// The feed that the agent follows.
    pub kind: Option<PodFeedKind>,
    /// Feeds that take precedence but do not work, each with its last error.
    pub passed_over: Vec<(PodFeedKind, String)>,
    /// Complete lists and single changes received.
    pub updates: u64,
    /// When the feed reported something last. A watch on which nothing changes is not outdated.
    pub last_update: Option<SystemTime>,
    /// Failures of all feeds.
    pub errors: u64,
    /// The last failure; none after a success.
    pub last_error: Option<String>,
}

/// Sizes of the pod store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PodCounts {
    /// Containers whose pod is known.
    pub(crate) containers: usize,
    /// Containers that were requested and are not known yet.
    pub(crate) requested: usize,
    /// Containers that no feed lists: sandboxes, and containers that Kubernetes did not start.
    pub(crate) unlisted: usize,
    /// Pods that the store refused because it was full.
    pub(crate) refused: u64,
    /// Labels and containers beyond those that the agent keeps of one pod, counted once for each pod.
    pub(crate) left_out: LeftOut,
    /// Values of labels that were cut.
    pub(crate) cut_labels: u64,
    /// Containers in no pod's control group whose parents were not read when the agent saw them, because too many waited.
    pub(crate) postponed: u64,
}

impl Default for Pods {
    fn default() -> Self {
        Self::new(PodLabelOptions::default())
    }
}

impl Pods {
    /// Builds an empty store. [`follow`] fills it.
    pub fn new(options: PodLabelOptions) -> Self {
        Self(Arc::new(Shared {
            label_options: options,
            store: Mutex::default(),
            status: Mutex::default(),
            requested: Notify::new(),
            changes: watch::Sender::new(0),
            unplaced: Mutex::default(),
            postponed: AtomicU64::new(0),
            unplaced_added: Notify::new(),
            active: AtomicBool::new(false),
            cut_labels: AtomicU64::new(0),
            closed: CancellationToken::new(),
        }))
    }

    /// Looks up the pod of a container. `pod_uid` is the uid in the container's control group.
    pub fn look_up(&self, container_id: &str, pod_uid: &str) -> PodLookup {
        self.store().look_up(container_id, pod_uid, Instant::now())
    }

    /// Returns the pod of a control group, and the container's name if it is known. The pod's uid is enough, so that a rule
    /// over pods is in force before the feed has reported a new container.
    pub(crate) fn pod_of(&self, names: &CgroupNames) -> Option<(Arc<Pod>, Option<Arc<str>>)> {
        if names.container_id.is_empty() {
            return self.by_uid(&names.pod_uid).map(|pod| (pod, None));
        }
        self.pod_of_path(&names.containers())
    }

    /// Returns the pod of nested containers, the outermost first, and the name of the one that Kubernetes knows.
    fn pod_of_path(&self, containers: &[(&str, &str)]) -> Option<(Arc<Pod>, Option<Arc<str>>)> {
        let mut store = self.store();
        match store.look_up_nested(containers, Instant::now()) {
            PodLookup::Known { pod, container } => Some((pod, container)),
            PodLookup::Unknown | PodLookup::Unlisted => {
                store.pod_of_nested(containers).map(|pod| (pod, None))
            }
        }
    }

    /// Looks up nested containers, the outermost first.
    fn look_up_path(&self, containers: &[(&str, &str)]) -> PodLookup {
        self.store().look_up_nested(containers, Instant::now())
    }

    /// Requests nested containers, the outermost first, as [`Pods::request`] does for one.
    fn request_path(&self, containers: &[(&str, &str)]) {
        if self.is_active() && self.store().request_nested(containers, Instant::now()) {
            self.0.requested.notify_one();
        }
    }

    /// Takes note of a container that the agent has seen, with one of its processes.
    pub fn container_seen(&self, names: &CgroupNames, pid: u32) {
        let containers = names.containers();
        self.request_path(&containers);
        if self.is_active() && self.store().needs_starter(&containers, Instant::now()) {
            let mut unplaced = self.0.unplaced.lock();
            if unplaced.len() < MAX_UNPLACED || unplaced.contains_key(&names.container_id) {
                unplaced.insert(names.container_id.clone(), pid);
            } else if self.0.postponed.fetch_add(1, Relaxed) == 0 {
                tracing::warn!(
                    pid,
                    container = names.container_id,
                    "more than {MAX_UNPLACED} containers that no pod's control group holds were seen at one time: the agent \
                     finds the pods of this one and others when it sees them again, within some seconds; \
                     gannet_agent_pods_postponed_containers_total counts them"
                );
            }
            self.0.unplaced_added.notify_one();
        }
    }

    /// Finds the pods of containers outside of the pods' control groups.
    async fn keep_finding_starters(&self, hierarchy: CgroupHierarchy) {
        loop {
            self.0.unplaced_added.notified().await;
            let wanted = std::mem::take(&mut *self.0.unplaced.lock());
            let found = spawn_blocking(move || {
                let find = |(id, pid): (String, u32)| {
                    nesting::started_in(pid, &id, hierarchy).map(|starter| (id, starter))
                };
                // A container whose process has ended is found by its next one.
                wanted.into_iter().map(find).filter_map(Result::ok).collect::<Vec<_>>()
            });
            let Ok(found) = found.await else { continue };
            let changed = found.iter().any(|(_, starter)| starter.is_some());
            self.set_starters(found);
            if changed {
                self.0.changes.send_modify(|count| *count += 1);
            }
        }
    }

    fn set_starters(&self, found: Vec<(String, Option<PathContainer>)>) {
        let mut store = self.store();
        for (id, starter) in found {
            store.set_starter(id, starter);
        }
    }

    /// Requests a container: if its pod is not known, the agent polls the feed again.
    pub fn request(&self, container_id: &str, pod_uid: &str) {
        if !container_id.is_empty()
            && self.is_active()
            && self.store().request(container_id, pod_uid, Instant::now())
        {
            self.0.requested.notify_one();
        }
    }

    /// Returns the pod whose control groups have this uid.
    pub(crate) fn by_uid(&self, uid: &str) -> Option<Arc<Pod>> {
        self.store().pod(uid)
    }

    /// Returns the pods that the feed lists now.
    pub fn listed(&self) -> Vec<Arc<Pod>> {
        self.store().listed()
    }

    /// Returns all pods in the store. A deleted pod stays for its last samples; it comes with the time since its deletion.
    pub(crate) fn all(&self) -> Vec<(Arc<Pod>, Option<Duration>)> {
        self.store().all(Instant::now()).map(|(pod, gone)| (Arc::clone(pod), gone)).collect()
    }

    /// Reports whether an annotation of any pod denies profiling.
    fn any_denied(&self) -> bool {
        self.store().all(Instant::now()).any(|(pod, _)| pod.denied)
    }

    /// Returns the state of the feeds.
    pub fn status(&self) -> PodFeedStatus {
        self.0.status.lock().clone()
    }

    pub(crate) fn counts(&self) -> PodCounts {
        PodCounts {
            cut_labels: self.0.cut_labels.load(Relaxed),
            postponed: self.0.postponed.load(Relaxed),
            ..self.store().counts()
        }
    }

    /// Reports whether the first answer has arrived, if there is a feed at all.
    pub fn is_synced(&self) -> bool {
        let status = self.0.status.lock();
        !status.awaited || status.updates > 0
    }

    /// Adds pod labels to the profiles of a window. Waits up to [`MAX_LABEL_WAIT`] for containers that have just started.
    /// Removes profiles of pods that deny profiling, and returns the number of their samples.
    pub(crate) async fn label(&self, profiles: &mut Vec<SeriesProfile>) -> u64 {
        labels::label(self, profiles).await
    }

    /// Ends all waits for pods.
    fn close(&self) {
        self.0.closed.cancel();
    }

    fn is_active(&self) -> bool {
        self.0.active.load(Relaxed)
    }

    /// Returns a receiver that is notified after each change of the pods.
    fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    /// Applies a change that the feed has reported. `asked_at`: when the agent sent the request that it answers.
    fn apply(&self, change: PodChange, asked_at: Instant) {
        self.store().apply(change, asked_at, Instant::now());
        self.set_status(|status| {
            status.updates += 1;
            status.last_update = Some(SystemTime::now());
            status.last_error = None;
        });
        self.0.changes.send_modify(|count| *count += 1);
    }

    /// Sets whether there is a feed. Readiness waits for it if so.
    fn set_active(&self, active: bool) {
        self.0.active.store(active, Relaxed);
        self.set_status(|status| status.awaited = active);
    }

    /// Returns the handle that [`Pods::request`] notifies.
    fn requested(&self) -> &Notify {
        &self.0.requested
    }

    fn store(&self) -> MutexGuard<'_, PodStore> {
        self.0.store.lock()
    }

    fn set_status(&self, set: impl FnOnce(&mut PodFeedStatus)) {
        set(&mut self.0.status.lock());
    }
}
