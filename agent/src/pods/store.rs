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
    feed::{MAX_PODS, PodChange},
    model::Pod,
};

/// How long a pod or container stays after the feed has stopped listing it. Samples of it are still on their way.
const RETENTION: Duration = Duration::from_secs(300);
/// Seconds before the agent requests an unlisted container again. A random time, so that many do not come at once.
const UNLISTED_SECONDS: std::ops::Range<u64> = 30..60;
/// A list may lack a container that was created less than this before its request: the kubelet checks its runtime once a
/// second.
const SETTLED: Duration = Duration::from_secs(3);
/// A requested container counts as unlisted after this time, whatever the feed has reported.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
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
    /// From the uid in the control groups of a static pod to the uid of its mirror pod.
    mirror_uids: HashMap<String, String>,
    /// Until when a container counts as unlisted.
    unlisted: LruCache<String, Instant>,
    /// Containers requested since the last complete list, with the time of the first request.
    requested: LruCache<String, Instant>,
    /// Pods that the store refused because it was full.
    refused: u64,
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
            refused: 0,
        }
    }
}

impl PodStore {
    /// Applies a change that the feed reported. `asked_at`: when the agent sent the request. Containers requested well before
    /// that and still unknown become unlisted.
    pub(super) fn apply(&mut self, change: PodChange, asked_at: Instant, now: Instant) {
        match change {
            PodChange::All(pods) => self.set_all(pods, asked_at, now),
            PodChange::Set(pod) => self.set(pod, now),
            PodChange::Gone(uid) => {
                if let Some(known) = self.pods.get_mut(&uid) {
                    known.gone.get_or_insert(now);
                }
            }
        }
        self.forget(now);
    }

    fn set_all(&mut self, pods: Vec<Pod>, asked_at: Instant, now: Instant) {
        let listed: HashSet<String> = pods.iter().map(|pod| pod.uid.clone()).collect();
        for pod in pods {
            self.set(pod, now);
        }
        for (uid, known) in &mut self.pods {
            if !listed.contains(uid) {
                known.gone.get_or_insert(now);
            }
        }
        let missing: Vec<String> = self
            .requested
            .iter()
            .filter(|(_, first)| asked_at.saturating_duration_since(**first) >= SETTLED)
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
            self.mirror_uids.insert(pod.config_hash.clone(), pod.uid.clone());
        }
        self.pods.insert(pod.uid.clone(), KnownPod { pod: Arc::new(pod), gone: None });
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

    /// Notes the request of a container. Returns whether the agent must poll the feed for it.
    pub(super) fn request(&mut self, id: &str, pod_uid: &str, now: Instant) -> bool {
        if self.look_up(id, pod_uid, now) != PodLookup::Unknown {
            return false;
        }
        match self.requested.peek(id) {
            None => {
                self.requested.put(id.to_owned(), now);
            }
            // A feed that reports changes never reports what it does not know.
            Some(first) if now.saturating_duration_since(*first) >= REQUEST_TIMEOUT => {
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
        let uid = self.mirror_uids.get(uid).map_or(uid, String::as_str);
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
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::model::PodContainer, *};

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
        store.apply(PodChange::All(vec![pod("1", &[("app", "a")])]), now, now);
        store.apply(PodChange::All(vec![]), now, now);
        assert_eq!(names(&mut store, "a", "1", later(now, 299)), "pod-1 app");
        assert!(store.listed().is_empty());
        store.apply(PodChange::All(vec![]), later(now, 300), later(now, 300));
        assert_eq!(names(&mut store, "a", "1", later(now, 300)), "Unknown");
        assert_eq!(store.counts().containers, 0);
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
        store.apply(PodChange::All(vec![pod("1", &[("app", "a")])]), now, now);
        store.apply(
            PodChange::All(vec![Pod { name: "pod-1".into(), ..pod("2", &[("app", "b")]) }]),
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
        store.apply(PodChange::All(vec![]), now.checked_sub(Duration::from_secs(1)).unwrap(), now);
        store.apply(PodChange::All(vec![]), later(now, 2), later(now, 2));
        assert!(store.request("sandbox", "", later(now, 2)));
        store.apply(PodChange::All(vec![]), later(now, 3), now);
        assert!(!store.request("sandbox", "", later(now, 29)));
        assert_eq!(names(&mut store, "sandbox", "", later(now, 29)), "Unlisted");
        assert!(store.request("sandbox", "", later(now, 60)));
        // A container that appears later is known at once.
        store.apply(PodChange::All(vec![pod("1", &[("app", "sandbox")])]), later(now, 61), later(now, 61));
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
        store.apply(PodChange::All(vec![pod("1", &[]), fixed]), now, now);
        // The first step is a request: the next list may contain it.
        assert_eq!(names(&mut store, "x", "1", now), "Unknown");
        assert!(
            store.request("x", "1", now) && store.request("y", "hash", now) && store.request("z", "2", now)
        );
        store.apply(PodChange::All(vec![pod("1", &[]), pod("mirror", &[])]), later(now, 3), now);
        assert_eq!(names(&mut store, "x", "1", now), "pod-1 -");
        assert_eq!(names(&mut store, "y", "hash", now), "pod-mirror -");
        assert_eq!(names(&mut store, "z", "2", now), "Unlisted");
    }

    #[test]
    fn memory_is_bounded() {
        let (mut store, now) = (PodStore::default(), Instant::now());
        for n in 0..2 * MAX_UNLISTED.get() {
            store.request(&n.to_string(), "", now);
        }
        assert_eq!(unknown(&store).0, MAX_UNLISTED.get());
        store.apply(PodChange::All(vec![]), later(now, 3), now);
        assert_eq!(unknown(&store), (0, MAX_UNLISTED.get()));
        let many = (0..=MAX_PODS).map(|n| pod(&n.to_string(), &[])).collect();
        store.apply(PodChange::All(many), now, now);
        assert_eq!((store.listed().len(), store.refused), (MAX_PODS, 1));
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
