//! Owns the node's pods, by container and by uid; deleted pods for a while; and containers without a pod.
//!
//! Callers pass the time, so that nothing here waits and tests need no clock.

use std::{
    collections::{HashMap, HashSet},
    num::NonZeroUsize,
    sync::Arc,
    time::{Duration, Instant},
};

use lru::LruCache;

use super::{
    PodCounts,
    feed::{MAX_PODS, PodChange, PodList},
    model::{LeftOut, MAX_CONTAINERS, MAX_LABELS, Pod},
};
use crate::cgroup::PathContainer;

/// How long a pod or container stays after the feed has stopped listing it. Samples of it are still on their way.
const RETENTION: Duration = Duration::from_secs(300);
/// Seconds before the agent requests an unlisted container again. A random time, so that many do not come at once.
const UNLISTED_SECONDS: std::ops::Range<u64> = 30..60;
/// A list may lack a container that was created less than this before its request: the kubelet checks its runtime once a
/// second.
const SETTLED: Duration = Duration::from_secs(3);
/// A requested container counts as unlisted after this time, whatever the feed has reported.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// The same for a container of a known pod. The kubelet lists it for certain, but a slow one many seconds late.
const REQUEST_TIMEOUT_IN_POD: Duration = Duration::from_secs(30);
/// How long the feed must list no pod at all before the store believes it. A kubelet that has just started lists none.
const EMPTY_BELIEVED: Duration = Duration::from_secs(60);
/// Unlisted containers to remember: every sandbox of a node, and some more.
const MAX_UNLISTED: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// The answer to [`super::Pods::look_up`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodLookup {
    /// The container has a pod.
    Known {
        /// The pod of the container.
        pod: Arc<Pod>,
        /// The container's name in the pod. None: the pod is known by its uid only.
        container: Option<Arc<str>>,
    },
    /// The feed has not reported the container yet.
    Unknown,
    /// No feed lists it: a sandbox, or a container that Kubernetes did not start.
    Unlisted,
}

/// The pods of the node.
#[derive(Debug)]
pub(super) struct PodStore {
    pods: HashMap<String, KnownPod>,
    containers: HashMap<String, KnownContainer>,
    /// From the uid in the control groups of a static pod, without dashes, to the uid of its mirror pod.
    mirror_uids: HashMap<String, String>,
    /// Until when a container counts as unlisted.
    unlisted: LruCache<String, Instant>,
    /// Containers requested and not known yet.
    requested: LruCache<String, Requested>,
    /// For containers that Kubernetes did not start: the container of a pod in which they were started, or none.
    started_in: LruCache<String, Option<PathContainer>>,
    /// Since when the feed lists no pod, although it listed some before.
    empty_since: Option<Instant>,
    /// Pods that the store refused because it was full.
    refused: u64,
    /// The last list was longer than the store's bound; logged.
    is_full: bool,
    /// Labels and containers that the agent did not keep of pods.
    left_out: LeftOut,
}

#[derive(Clone, Debug)]
struct Requested {
    /// When it was requested first.
    first: Instant,
    /// The uid in its control group.
    pod_uid: String,
}

#[derive(Debug)]
struct KnownPod {
    pod: Arc<Pod>,
    /// Since when the feed no longer lists it.
    gone: Option<Instant>,
}

#[derive(Debug)]
struct KnownContainer {
    uid: String,
    name: Arc<str>,
    gone: Option<Instant>,
}

impl Default for PodStore {
    fn default() -> Self {
        Self {
            pods: HashMap::new(),
            containers: HashMap::new(),
            mirror_uids: HashMap::new(),
            unlisted: LruCache::new(MAX_UNLISTED),
            requested: LruCache::new(MAX_UNLISTED),
            started_in: LruCache::new(MAX_UNLISTED),
            empty_since: None,
            refused: 0,
            is_full: false,
            left_out: LeftOut::default(),
        }
    }
}

impl PodStore {
    /// Applies a change that the feed reported. `asked_at`: when the agent sent the request. Containers requested well before
    /// that and still unknown become unlisted.
    pub(super) fn apply(&mut self, change: PodChange, asked_at: Instant, now: Instant) {
        match change {
            PodChange::All(list) => self.set_all(list, asked_at, now),
            PodChange::Set(pod) => self.set(pod, now),
            PodChange::Gone(uid) => {
                if let Some(known) = self.pods.get_mut(&uid) {
                    known.gone.get_or_insert(now);
                }
            }
        }
        self.forget(now);
    }

    fn set_all(&mut self, list: PodList, asked_at: Instant, now: Instant) {
        let PodList { pods, left_out } = list;
        if pods.is_empty() && self.pods.values().any(|known| known.gone.is_none()) {
            let since = *self.empty_since.get_or_insert(now);
            if now.saturating_duration_since(since) < EMPTY_BELIEVED {
                return;
            }
        }
        self.empty_since = None;
        let listed: HashSet<String> = pods.iter().map(|pod| pod.uid.clone()).collect();
        let refused = self.refused;
        self.refused += left_out;
        for pod in pods {
            self.set(pod, now);
        }
        let refused = self.refused - refused;
        if refused > 0 && !self.is_full {
            tracing::warn!(
                refused,
                "the pod source lists more than the {MAX_PODS} pods that the agent stores: processes of the others have no pod \
                 labels, and rules by pod do not match them; check that --node names this node, whose pods alone it should list"
            );
        }
        self.is_full = refused > 0;
        for (uid, known) in &mut self.pods {
            if !listed.contains(uid) {
                known.gone.get_or_insert(now);
            }
        }
        let missing: Vec<String> = self
            .requested
            .iter()
            .filter(|(_, request)| {
                let settled =
                    if self.pod(&request.pod_uid).is_some() { REQUEST_TIMEOUT_IN_POD } else { SETTLED };
                asked_at.saturating_duration_since(request.first) >= settled
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in missing {
            self.requested.pop(&id);
            if !self.containers.contains_key(&id) {
                self.mark_unlisted(id, now);
            }
        }
    }

    fn mark_unlisted(&mut self, id: String, now: Instant) {
        self.unlisted.put(id, now + Duration::from_secs(rand::random_range(UNLISTED_SECONDS)));
    }

    fn set(&mut self, pod: Pod, now: Instant) {
        if pod.uid.is_empty() || (self.pods.len() >= MAX_PODS && !self.pods.contains_key(&pod.uid)) {
            self.refused += 1;
            return;
        }
        let former = self.pods.get(&pod.uid).map(|known| Arc::clone(&known.pod));
        self.count_left_out(&pod, former.as_deref());
        for container in former.iter().flat_map(|pod| &pod.containers) {
            if let Some(container) = self.containers.get_mut(&container.id) {
                container.gone.get_or_insert(now);
            }
        }
        for container in &pod.containers {
            self.unlisted.pop(&container.id);
            self.requested.pop(&container.id);
            self.containers.insert(
                container.id.clone(),
                KnownContainer { uid: pod.uid.clone(), name: container.name.as_str().into(), gone: None },
            );
        }
        if !pod.config_hash.is_empty() {
            self.mirror_uids.insert(without_dashes(&pod.config_hash), pod.uid.clone());
        }
        self.pods.insert(pod.uid.clone(), KnownPod { pod: Arc::new(pod), gone: None });
    }

    /// Counts the parts of a pod that are left out, once for each pod: it is listed again and again.
    fn count_left_out(&mut self, pod: &Pod, former: Option<&Pod>) {
        let LeftOut { labels, containers } = pod.left_out;
        let before = former.map(|former| former.left_out).unwrap_or_default();
        if labels > before.labels || containers > before.containers {
            let is_first = self.left_out == LeftOut::default();
            self.left_out.labels += labels.saturating_sub(before.labels);
            self.left_out.containers += containers.saturating_sub(before.containers);
            if is_first {
                tracing::warn!(
                    namespace = pod.namespace,
                    pod = pod.name,
                    labels,
                    containers,
                    "the pod has more than the {MAX_LABELS} labels or {MAX_CONTAINERS} containers that the agent keeps: rules \
                     and profiles do not see the others; remove some; /debug/pods shows further pods"
                );
            }
        }
    }

    /// Drops pods and containers that have been gone for longer than [`RETENTION`].
    fn forget(&mut self, now: Instant) {
        let over =
            |gone: &Option<Instant>| gone.is_some_and(|at| now.saturating_duration_since(at) >= RETENTION);
        self.pods.retain(|_, known| !over(&known.gone));
        let pods = &self.pods;
        self.containers.retain(|_, container| !over(&container.gone) && pods.contains_key(&container.uid));
        self.mirror_uids.retain(|_, uid| pods.contains_key(uid));
    }

    /// Looks up a container. The pod's uid in the control group is enough for a container that is not listed yet: Kubernetes
    /// never reuses uids.
    pub(super) fn look_up(&mut self, id: &str, pod_uid: &str, now: Instant) -> PodLookup {
        if let Some(container) = self.containers.get(id)
            && let Some(known) = self.pods.get(&container.uid)
        {
            return PodLookup::Known {
                pod: Arc::clone(&known.pod),
                container: Some(Arc::clone(&container.name)),
            };
        }
        if self.unlisted.peek(id).is_none_or(|until| *until <= now) {
            return PodLookup::Unknown;
        }
        match self.pod(pod_uid) {
            Some(pod) => PodLookup::Known { pod, container: None },
            None => PodLookup::Unlisted,
        }
    }

    /// Looks up nested containers, the outermost first. The kubelet's own containers are not nested in one another, so at most
    /// one of them is known. The outermost counts, because a container can name control groups below its own as it likes.
    pub(super) fn look_up_nested(&mut self, containers: &[(&str, &str)], now: Instant) -> PodLookup {
        let starter = containers.last().and_then(|(id, _)| self.started_in.get(*id)).cloned().flatten();
        let starter = starter.as_ref().map(|outer| (outer.id.as_str(), outer.pod_uid.as_str()));
        let found: Vec<PodLookup> =
            containers.iter().copied().chain(starter).map(|(id, uid)| self.look_up(id, uid, now)).collect();
        let named = |found: &&PodLookup| matches!(found, PodLookup::Known { container: Some(_), .. });
        let known = |found: &&PodLookup| matches!(found, PodLookup::Known { .. });
        if let Some(best) = found.iter().find(named) {
            return best.clone();
        }
        if found.contains(&PodLookup::Unknown) {
            return PodLookup::Unknown;
        }
        found.iter().find(known).cloned().unwrap_or(PodLookup::Unlisted)
    }

    /// Returns the pod of nested containers by the uids in their path.
    pub(super) fn pod_of_nested(&mut self, containers: &[(&str, &str)]) -> Option<Arc<Pod>> {
        let starter = containers.last().and_then(|(id, _)| self.started_in.get(*id)).cloned().flatten();
        let starter = starter.as_ref().map(|outer| outer.pod_uid.as_str());
        containers.iter().map(|(_, uid)| *uid).chain(starter).find_map(|uid| self.pod(uid))
    }

    /// Reports whether it is unknown who started these containers: no pod is in their path, and no feed lists them.
    pub(super) fn needs_starter(&mut self, containers: &[(&str, &str)], now: Instant) -> bool {
        containers.iter().all(|(_, uid)| uid.is_empty())
            && containers.last().is_some_and(|(id, _)| !self.started_in.contains(*id))
            && !matches!(self.look_up_nested(containers, now), PodLookup::Known { .. })
    }

    /// Notes in which container of a pod a container was started.
    pub(super) fn set_starter(&mut self, id: String, starter: Option<PathContainer>) {
        self.started_in.put(id, starter);
    }

    /// Notes the request of nested containers, as [`PodStore::request`] does for one.
    pub(super) fn request_nested(&mut self, containers: &[(&str, &str)], now: Instant) -> bool {
        if self.look_up_nested(containers, now) != PodLookup::Unknown {
            return false;
        }
        containers.iter().fold(false, |wanted, (id, uid)| self.request(id, uid, now) || wanted)
    }

    /// Notes the request of a container. Returns whether the agent must poll the feed for it.
    pub(super) fn request(&mut self, id: &str, pod_uid: &str, now: Instant) -> bool {
        if self.look_up(id, pod_uid, now) != PodLookup::Unknown {
            return false;
        }
        let limit = if self.pod(pod_uid).is_some() { REQUEST_TIMEOUT_IN_POD } else { REQUEST_TIMEOUT };
        match self.requested.peek(id) {
            None => {
                self.requested.put(id.to_owned(), Requested { first: now, pod_uid: pod_uid.to_owned() });
            }
            // A feed that reports changes never reports what it does not know.
            Some(request) if now.saturating_duration_since(request.first) >= limit => {
                self.requested.pop(id);
                self.mark_unlisted(id.to_owned(), now);
                return false;
            }
            Some(_) => {}
        }
        true
    }

    /// Returns the pod whose control groups have this uid.
    pub(super) fn pod(&self, uid: &str) -> Option<Arc<Pod>> {
        let uid = self.mirror_uids.get(&without_dashes(uid)).map_or(uid, String::as_str);
        Some(Arc::clone(&self.pods.get(uid)?.pod))
    }

    /// Returns all pods with the time since their deletion.
    pub(super) fn all(&self, now: Instant) -> impl Iterator<Item = (&Arc<Pod>, Option<Duration>)> {
        self.pods
            .values()
            .map(move |known| (&known.pod, known.gone.map(|at| now.saturating_duration_since(at))))
    }

    /// Returns the pods that the feed lists now.
    pub(super) fn listed(&self) -> Vec<Arc<Pod>> {
        self.pods.values().filter(|known| known.gone.is_none()).map(|known| Arc::clone(&known.pod)).collect()
    }

    pub(super) fn counts(&self) -> PodCounts {
        PodCounts {
            containers: self.containers.len(),
            requested: self.requested.len(),
            unlisted: self.unlisted.len(),
            refused: self.refused,
            left_out: self.left_out,
            cut_labels: 0,
            postponed: 0,
        }
    }
}

/// The hash of a static pod is a UUID, which some runtimes write without its dashes.
fn without_dashes(uid: &str) -> String {
    uid.replace('-', "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::model::{PodContainer, ReportedPod},
        *,
    };

    fn pod(uid: &str, containers: &[(&str, &str)]) -> Pod {
        Pod {
            uid: uid.into(),
            name: format!("pod-{uid}"),
            containers: containers
                .iter()
                .map(|(name, id)| PodContainer { name: (*name).into(), id: (*id).into() })
                .collect(),
            ..Pod::default()
        }
    }

    #[track_caller]
    fn names(store: &mut PodStore, id: &str, uid: &str, now: Instant) -> String {
        match store.look_up(id, uid, now) {
            PodLookup::Known { pod, container } => {
                format!("{} {}", pod.name, container.as_deref().unwrap_or("-"))
            }
            other => format!("{other:?}"),
        }
    }

    /// Returns the numbers of requested and of unlisted containers.
    fn unknown(store: &PodStore) -> (usize, usize) {
        (store.counts().requested, store.counts().unlisted)
    }

    fn later(now: Instant, seconds: u64) -> Instant {
        now + Duration::from_secs(seconds)
    }

    #[test]
    fn a_deleted_pod_stays_for_its_last_samples() {
        let (mut store, now) = (PodStore::default(), Instant::now());
        let other = || PodChange::All(vec![pod("2", &[])].into());
        store.apply(PodChange::All(vec![pod("1", &[("app", "a")]), pod("2", &[])].into()), now, now);
        store.apply(other(), now, now);
        assert_eq!(names(&mut store, "a", "1", later(now, 299)), "pod-1 app");
        assert_eq!(store.listed().len(), 1);
        store.apply(other(), later(now, 300), later(now, 300));
        assert_eq!(names(&mut store, "a", "1", later(now, 300)), "Unknown");
        assert_eq!(store.counts().containers, 0);
    }

    #[test]
    fn an_empty_list_counts_only_if_it_stays() {
        let (mut store, now) = (PodStore::default(), Instant::now());
        store.apply(PodChange::All(vec![pod("1", &[("app", "a")])].into()), now, now);
        assert!(store.request("new", "", now));
        let empty = |store: &mut PodStore, at| {
            store.apply(PodChange::All(vec![].into()), later(now, at), later(now, at));
            store.listed().len()
        };
        assert_eq!((empty(&mut store, 10), empty(&mut store, 69)), (1, 1));
        // It proves nothing about a requested container either.
        assert_eq!(unknown(&store), (1, 0));
        // Another list in between starts the time again.
        store.apply(PodChange::All(vec![pod("1", &[("app", "a")])].into()), later(now, 69), later(now, 69));
        assert_eq!((empty(&mut store, 70), empty(&mut store, 129)), (1, 1));
        assert_eq!(empty(&mut store, 130), 0);
        assert_eq!(names(&mut store, "a", "1", later(now, 131)), "pod-1 app");
    }

    #[test]
    fn a_restarted_container_is_known_by_both_ids() {
        let (mut store, now) = (PodStore::default(), Instant::now());
        store.apply(PodChange::Set(pod("1", &[("app", "a")])), now, now);
        store.apply(PodChange::Set(pod("1", &[("app", "b")])), now, now);
        for id in ["a", "b"] {
            assert_eq!(names(&mut store, id, "1", now), "pod-1 app");
        }
        store.apply(PodChange::Set(pod("1", &[("app", "b")])), later(now, 301), later(now, 301));
        assert_eq!(names(&mut store, "a", "", later(now, 301)), "Unknown");
        assert_eq!(names(&mut store, "b", "1", later(now, 301)), "pod-1 app");
    }

    #[test]
    fn a_pod_of_the_same_name_is_another_pod() {
        let (mut store, now) = (PodStore::default(), Instant::now());
        store.apply(PodChange::All(vec![pod("1", &[("app", "a")])].into()), now, now);
        store.apply(
            PodChange::All(vec![Pod { name: "pod-1".into(), ..pod("2", &[("app", "b")]) }].into()),
            now,
            now,
        );
        let uid = |store: &mut PodStore, id| match store.look_up(id, "", now) {
            PodLookup::Known { pod, .. } => pod.uid.clone(),
            other => format!("{other:?}"),
        };
        assert_eq!((uid(&mut store, "a"), uid(&mut store, "b")), ("1".into(), "2".into()));
    }

    #[test]
    fn an_unlisted_container_is_requested_once_and_rests() {
        let (mut store, now) = (PodStore::default(), Instant::now());
        assert!(store.request("sandbox", "", now));
        // A list requested before, or soon after, proves nothing.
        store.apply(PodChange::All(vec![].into()), now.checked_sub(Duration::from_secs(1)).unwrap(), now);
        store.apply(PodChange::All(vec![].into()), later(now, 2), later(now, 2));
        assert!(store.request("sandbox", "", later(now, 2)));
        store.apply(PodChange::All(vec![].into()), later(now, 3), now);
        assert!(!store.request("sandbox", "", later(now, 29)));
        assert_eq!(names(&mut store, "sandbox", "", later(now, 29)), "Unlisted");
        assert!(store.request("sandbox", "", later(now, 60)));
        // A container that appears later is known at once.
        store.apply(
            PodChange::All(vec![pod("1", &[("app", "sandbox")])].into()),
            later(now, 61),
            later(now, 61),
        );
        assert_eq!(names(&mut store, "sandbox", "", later(now, 61)), "pod-1 app");
    }

    #[test]
    fn the_wait_for_a_feed_without_lists_has_an_end() {
        let (mut store, now) = (PodStore::default(), Instant::now());
        assert!(store.request("sandbox", "", now));
        assert!(store.request("sandbox", "", later(now, 9)));
        assert!(!store.request("sandbox", "", later(now, 10)));
        assert_eq!(unknown(&store), (0, 1));
    }

    #[test]
    fn the_uid_in_the_path_identifies_an_unlisted_containers_pod() {
        let (mut store, now) = (PodStore::default(), Instant::now());
        let fixed = Pod { config_hash: "hash".into(), ..pod("mirror", &[]) };
        store.apply(PodChange::All(vec![pod("1", &[]), fixed].into()), now, now);
        // The first step is a request: the next list may contain it.
        assert_eq!(names(&mut store, "x", "1", now), "Unknown");
        assert!(
            store.request("x", "1", now) && store.request("y", "hash", now) && store.request("z", "2", now)
        );
        let list = || PodChange::All(vec![pod("1", &[]), pod("mirror", &[])].into());
        store.apply(list(), later(now, 3), now);
        assert_eq!(names(&mut store, "z", "2", now), "Unlisted");
        // The kubelet lists the containers of its pods for certain, only later.
        store.apply(list(), later(now, 29), now);
        assert_eq!(names(&mut store, "x", "1", now), "Unknown");
        store.apply(list(), later(now, 30), now);
        assert_eq!(names(&mut store, "x", "1", now), "pod-1 -");
        assert_eq!(names(&mut store, "y", "hash", now), "pod-mirror -");
    }

    #[test]
    fn a_static_pod_is_known_by_its_hash_in_any_form() {
        let (plain, dashed) = ("0123456789abcdef0123456789abcdef", "01234567-89ab-cdef-0123-456789abcdef");
        for hash in [plain, dashed] {
            let (mut store, now) = (PodStore::default(), Instant::now());
            let fixed = Pod { config_hash: hash.into(), ..pod("mirror", &[("app", "a")]) };
            store.apply(PodChange::All(vec![fixed].into()), now, now);
            for uid in [plain, dashed, "mirror"] {
                assert_eq!(
                    store.pod(uid).map(|pod| pod.name.clone()).as_deref(),
                    Some("pod-mirror"),
                    "{uid}"
                );
            }
            assert_eq!(names(&mut store, "a", plain, now), "pod-mirror app");
            assert!(store.pod("0123456789abcdef0123456789abcdee").is_none());
        }
    }

    #[test]
    fn a_remade_static_pod_is_not_the_old_one() {
        let (mut store, now) = (PodStore::default(), Instant::now());
        let fixed = |uid: &str, hash: &str, id| Pod { config_hash: hash.into(), ..pod(uid, &[("app", id)]) };
        store.apply(PodChange::All(vec![fixed("m1", "h1", "a")].into()), now, now);
        // Made again from the same file, then from a changed one.
        store.apply(PodChange::All(vec![fixed("m2", "h1", "b")].into()), now, now);
        assert_eq!(names(&mut store, "b", "h1", now), "pod-m2 app");
        assert_eq!(names(&mut store, "a", "h1", now), "pod-m1 app", "samples of the old one may still come");
        assert_eq!(store.pod("h1").map(|pod| pod.uid.clone()).as_deref(), Some("m2"));
        store.apply(PodChange::All(vec![fixed("m3", "h3", "c")].into()), now, now);
        assert_eq!(names(&mut store, "c", "h3", now), "pod-m3 app");
        assert_eq!(names(&mut store, "b", "h1", now), "pod-m2 app");
        store.apply(PodChange::All(vec![fixed("m3", "h3", "c")].into()), later(now, 300), later(now, 300));
        assert!(store.pod("h1").is_none());
    }

    #[track_caller]
    fn nested(store: &mut PodStore, path: &[(&str, &str)], now: Instant) -> String {
        match store.look_up_nested(path, now) {
            PodLookup::Known { pod, container } => {
                format!("{} {}", pod.name, container.as_deref().unwrap_or("-"))
            }
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn a_nested_container_is_of_the_known_one_around_it() {
        let (mut store, now) = (PodStore::default(), Instant::now());
        let path = [("outer", "1"), ("inner", "1")];
        // Before the kubelet lists the pod's container, both are requested; then nothing waits for the inner one.
        assert!(store.request_nested(&path, now));
        store.apply(
            PodChange::All(vec![pod("1", &[("app", "outer")]), pod("2", &[("bank", "b")])].into()),
            now,
            now,
        );
        assert_eq!(nested(&mut store, &path, now), "pod-1 app");
        assert!(!store.request_nested(&path, now));
        // The same two levels deeper.
        let deeper = [("outer", "1"), ("inner", "1"), ("x", "9"), ("y", "9")];
        assert_eq!(nested(&mut store, &deeper, now), "pod-1 app");
        // A container may give control groups below its own the name of another pod.
        assert_eq!(nested(&mut store, &[("outer", "1"), ("b", "2")], now), "pod-1 app");
        // A kubelet in a container (kind) knows only the inner one.
        assert_eq!(nested(&mut store, &[("kind", ""), ("b", "2")], now), "pod-2 bank");
    }

    #[test]
    fn a_container_outside_of_pods_is_of_its_starter() {
        let (mut store, now) = (PodStore::default(), Instant::now());
        store.apply(PodChange::All(vec![pod("1", &[("app", "outer")])].into()), now, now);
        let path = [("inner", "")];
        assert!(store.needs_starter(&path, now) && !store.needs_starter(&[("outer", "1")], now));
        store.set_starter("inner".into(), Some(PathContainer { id: "outer".into(), pod_uid: "1".into() }));
        assert_eq!(nested(&mut store, &path, now), "pod-1 app");
        assert!(!store.needs_starter(&path, now) && !store.request_nested(&path, now));
        // Of a container of the node's own Docker no parent is in a pod. That is found once.
        store.set_starter("own".into(), None);
        assert!(!store.needs_starter(&[("own", "")], now));
        assert_eq!(nested(&mut store, &[("own", "")], now), "Unknown");
    }

    #[test]
    fn memory_is_bounded() {
        let (mut store, now) = (PodStore::default(), Instant::now());
        for n in 0..2 * MAX_UNLISTED.get() {
            store.request(&n.to_string(), "", now);
        }
        assert_eq!(unknown(&store).0, MAX_UNLISTED.get());
        store.apply(PodChange::All(vec![].into()), later(now, 3), now);
        assert_eq!(unknown(&store), (0, MAX_UNLISTED.get()));
        let many: Vec<Pod> = (0..=MAX_PODS).map(|n| pod(&n.to_string(), &[])).collect();
        store.apply(PodChange::All(many.into()), now, now);
        assert_eq!((store.listed().len(), store.refused), (MAX_PODS, 1));
    }

    #[test]
    fn parts_of_a_pod_beyond_the_bounds_are_counted_once() {
        let reported = |labels: usize, containers: usize| {
            Pod::from(ReportedPod {
                uid: "u".into(),
                labels: (0..labels).map(|n| (n.to_string(), String::new())).collect(),
                containers: (0..containers).map(|n| ("app".into(), format!("containerd://{n}"))).collect(),
                ..ReportedPod::default()
            })
        };
        let (mut store, now) = (PodStore::default(), Instant::now());
        let mut counted = |labels, containers| {
            store.apply(PodChange::Set(reported(labels, containers)), now, now);
            (store.left_out.labels, store.left_out.containers)
        };
        assert_eq!(counted(MAX_LABELS, MAX_CONTAINERS), (0, 0));
        assert_eq!(counted(MAX_LABELS + 2, MAX_CONTAINERS + 3), (2, 3));
        assert_eq!(counted(MAX_LABELS + 2, MAX_CONTAINERS + 3), (2, 3));
        assert_eq!(counted(MAX_LABELS + 3, MAX_CONTAINERS), (3, 3));
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// The feed lists these pods.
        List(Vec<u8>),
        /// The pod restarts its container.
        Restart(u8),
        Delete(u8),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            prop::collection::vec(0..6_u8, 0..6).prop_map(Step::List),
            (0..6_u8).prop_map(Step::Restart),
            (0..6_u8).prop_map(Step::Delete),
            (0..400_u64).prop_map(Step::Wait),
        ]
    }

    proptest! {
        /// Checks over any order of lists, restarts and deletions: a container has its own pod or none, never another pod.
        #[test]
        fn no_container_ever_gets_the_name_of_another(steps in prop::collection::vec(step(), 0..200)) {
            let (mut store, mut now) = (PodStore::default(), Instant::now());
            let mut restarts = [0_u32; 6];
            let mut owners = HashMap::new();
            let mut made = |number: u8, restarts: &[u32; 6]| {
                let (uid, id) = (format!("u{number}"), format!("c{number}.{}", restarts[usize::from(number)]));
                owners.insert(id.clone(), uid.clone());
                // All have the same name, like the successive pods of a StatefulSet.
                Pod { name: "same".into(), ..pod(&uid, &[("app", &id)]) }
            };
            for step in steps {
                match step {
                    Step::List(numbers) => {
                        let pods = numbers.iter().map(|number| made(*number, &restarts)).collect();
                        store.apply(PodChange::All(pods), now, now);
                    }
                    Step::Restart(number) => {
                        restarts[usize::from(number)] += 1;
                        store.apply(PodChange::Set(made(number, &restarts)), now, now);
                    }
                    Step::Delete(number) => store.apply(PodChange::Gone(format!("u{number}")), now, now),
                    Step::Wait(seconds) => now = later(now, seconds),
                }
            }
            for (id, uid) in owners {
                if let PodLookup::Known { pod, .. } = store.look_up(&id, "", now) {
                    prop_assert_eq!(&pod.uid, &uid, "{}", id);
                }
            }
        }
    }
}
