//! What is known of the node's pods: by container, by uid; who has gone and is kept a while; who is asked for in vain.
//!
//! Time is handed in, so that nothing here waits and tests need no clock.

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    sync::Arc,
    time::{Duration, Instant},
};

use lru::LruCache;

use super::{
    feed::{Change, MOST_PODS},
    model::Pod,
};

/// How long a pod, or a container, is kept after its source has ceased to list it: samples of it are still on their way.
const GRACE: Duration = Duration::from_secs(300);
/// How long a container that no source knows is not asked for again: between these, so that many do not come at once.
const IN_VAIN: std::ops::Range<u64> = 30..60;
/// A container that was made less than this before a list was asked for may be missing from it: the kubelet looks at its
/// runtime once a second.
const SETTLED: Duration = Duration::from_secs(3);
/// After how long a container that was asked for is held to be in no list, whatever lists have come.
const PATIENCE: Duration = Duration::from_secs(10);
/// Containers that nobody knows and that are remembered as such: every sandbox of a node, and some.
const MOST_IN_VAIN: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// What is known of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Its pod.
    Known {
        /// The pod.
        pod: Arc<Pod>,
        /// The container's name in it. None: only the pod is known, by its uid.
        container: Option<Arc<str>>,
    },
    /// Its source has not told of it yet.
    Unknown,
    /// No source tells of it: a sandbox, or a container that Kubernetes has not started.
    InVain,
}

/// The pods of the node.
#[derive(Debug)]
pub(super) struct Store {
    pods: HashMap<String, KnownPod>,
    containers: HashMap<String, KnownContainer>,
    /// The uids of static pods as their control groups have them, to the uid by which they are known.
    hashes: HashMap<String, String>,
    in_vain: LruCache<String, Instant>,
    /// Containers that were asked for since the last complete list, and when first.
    asked: LruCache<String, Instant>,
    /// Pods that a source told of and that found no place.
    pub(super) refused: u64,
}

#[derive(Debug)]
struct KnownPod {
    pod: Arc<Pod>,
    /// Since when it is no longer listed.
    gone: Option<Instant>,
}

#[derive(Debug)]
struct KnownContainer {
    uid: String,
    name: Arc<str>,
    gone: Option<Instant>,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            pods: HashMap::new(),
            containers: HashMap::new(),
            hashes: HashMap::new(),
            in_vain: LruCache::new(MOST_IN_VAIN),
            asked: LruCache::new(MOST_IN_VAIN),
            refused: 0,
        }
    }
}

impl Store {
    /// Takes in what a source told. `asked_at`: when the source was asked; whoever was missed before and is still not
    /// known is in vain.
    pub(super) fn apply(&mut self, change: Change, asked_at: Instant, now: Instant) {
        match change {
            Change::All(pods) => {
                let listed: std::collections::HashSet<String> =
                    pods.iter().map(|pod| pod.uid.clone()).collect();
                for pod in pods {
                    self.set(pod, now);
                }
                for (uid, known) in &mut self.pods {
                    if !listed.contains(uid) && known.gone.is_none() {
                        known.gone = Some(now);
                    }
                }
                let missed: Vec<String> = self
                    .asked
                    .iter()
                    .filter(|(_, first)| asked_at.saturating_duration_since(**first) >= SETTLED)
                    .map(|(id, _)| id.clone())
                    .collect();
                for id in missed {
                    self.asked.pop(&id);
                    if !self.containers.contains_key(&id) {
                        self.give_up(id, now);
                    }
                }
            }
            Change::Set(pod) => self.set(pod, now),
            Change::Gone(uid) => {
                if let Some(known) = self.pods.get_mut(&uid) {
                    known.gone.get_or_insert(now);
                }
            }
        }
        self.forget(now);
    }

    fn give_up(&mut self, id: String, now: Instant) {
        self.in_vain.put(id, now + Duration::from_secs(rand::random_range(IN_VAIN)));
    }

    fn set(&mut self, pod: Pod, now: Instant) {
        if pod.uid.is_empty() || (self.pods.len() >= MOST_PODS && !self.pods.contains_key(&pod.uid)) {
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
            self.in_vain.pop(&container.id);
            self.asked.pop(&container.id);
            self.containers.insert(
                container.id.clone(),
                KnownContainer { uid: pod.uid.clone(), name: container.name.as_str().into(), gone: None },
            );
        }
        if !pod.config_hash.is_empty() {
            self.hashes.insert(pod.config_hash.clone(), pod.uid.clone());
        }
        self.pods.insert(pod.uid.clone(), KnownPod { pod: Arc::new(pod), gone: None });
    }

    /// Drops whoever has been gone for long.
    fn forget(&mut self, now: Instant) {
        let over = |gone: &Option<Instant>| gone.is_some_and(|at| now.saturating_duration_since(at) >= GRACE);
        self.pods.retain(|_, known| !over(&known.gone));
        let pods = &self.pods;
        self.containers.retain(|_, container| !over(&container.gone) && pods.contains_key(&container.uid));
        self.hashes.retain(|_, uid| pods.contains_key(uid));
    }

    /// Whose container this is. The pod's uid, as the control group has it, helps where the container is not listed yet:
    /// uids are never given twice.
    pub(super) fn look_up(&mut self, id: &str, pod_uid: &str, now: Instant) -> Lookup {
        if let Some(container) = self.containers.get(id)
            && let Some(known) = self.pods.get(&container.uid)
        {
            return Lookup::Known {
                pod: Arc::clone(&known.pod),
                container: Some(Arc::clone(&container.name)),
            };
        }
        if self.in_vain.peek(id).is_none_or(|until| *until <= now) {
            return Lookup::Unknown;
        }
        match self.pod(pod_uid) {
            Some(pod) => Lookup::Known { pod, container: None },
            None => Lookup::InVain,
        }
    }

    /// Remembers that somebody wants to know of a container. Whether its source is to be asked for it.
    pub(super) fn ask(&mut self, id: &str, pod_uid: &str, now: Instant) -> bool {
        if self.look_up(id, pod_uid, now) != Lookup::Unknown {
            return false;
        }
        match self.asked.peek(id) {
            None => {
                self.asked.put(id.to_owned(), now);
            }
            // A source that tells of changes never says what it does not know.
            Some(first) if now.saturating_duration_since(*first) >= PATIENCE => {
                self.asked.pop(id);
                self.give_up(id.to_owned(), now);
                return false;
            }
            Some(_) => {}
        }
        true
    }

    /// The pod whose control groups have this uid.
    pub(super) fn pod(&self, uid: &str) -> Option<Arc<Pod>> {
        let uid = self.hashes.get(uid).map_or(uid, String::as_str);
        Some(Arc::clone(&self.pods.get(uid)?.pod))
    }

    /// All pods, and for how long each has been gone.
    pub(super) fn all(&self, now: Instant) -> impl Iterator<Item = (&Arc<Pod>, Option<Duration>)> {
        self.pods
            .values()
            .map(move |known| (&known.pod, known.gone.map(|at| now.saturating_duration_since(at))))
    }

    /// The pods that are listed now.
    pub(super) fn live(&self) -> Vec<Arc<Pod>> {
        self.pods.values().filter(|known| known.gone.is_none()).map(|known| Arc::clone(&known.pod)).collect()
    }

    /// Containers that are known, those that are gone included.
    pub(super) fn containers(&self) -> usize {
        self.containers.len()
    }

    /// Containers that were asked for and are not known yet, and those that nobody knows.
    pub(super) fn unknown(&self) -> (usize, usize) {
        (self.asked.len(), self.in_vain.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::model::Container, *};

    fn pod(uid: &str, containers: &[(&str, &str)]) -> Pod {
        Pod {
            uid: uid.into(),
            name: format!("pod-{uid}"),
            containers: containers
                .iter()
                .map(|(name, id)| Container { name: (*name).into(), id: (*id).into() })
                .collect(),
            ..Pod::default()
        }
    }

    #[track_caller]
    fn names(store: &mut Store, id: &str, uid: &str, now: Instant) -> String {
        match store.look_up(id, uid, now) {
            Lookup::Known { pod, container } => {
                format!("{} {}", pod.name, container.as_deref().unwrap_or("-"))
            }
            other => format!("{other:?}"),
        }
    }

    fn later(now: Instant, seconds: u64) -> Instant {
        now + Duration::from_secs(seconds)
    }

    #[test]
    fn a_deleted_pod_is_kept_for_its_last_samples() {
        let (mut store, now) = (Store::default(), Instant::now());
        store.apply(Change::All(vec![pod("1", &[("app", "a")])]), now, now);
        store.apply(Change::All(vec![]), now, now);
        assert_eq!(names(&mut store, "a", "1", later(now, 299)), "pod-1 app");
        assert!(store.live().is_empty());
        store.apply(Change::All(vec![]), later(now, 300), later(now, 300));
        assert_eq!(names(&mut store, "a", "1", later(now, 300)), "Unknown");
        assert_eq!(store.containers(), 0);
    }

    #[test]
    fn a_restarted_container_is_known_by_both_ids() {
        let (mut store, now) = (Store::default(), Instant::now());
        store.apply(Change::Set(pod("1", &[("app", "a")])), now, now);
        store.apply(Change::Set(pod("1", &[("app", "b")])), now, now);
        for id in ["a", "b"] {
            assert_eq!(names(&mut store, id, "1", now), "pod-1 app");
        }
        store.apply(Change::Set(pod("1", &[("app", "b")])), later(now, 301), later(now, 301));
        assert_eq!(names(&mut store, "a", "", later(now, 301)), "Unknown");
        assert_eq!(names(&mut store, "b", "1", later(now, 301)), "pod-1 app");
    }

    #[test]
    fn a_pod_of_the_same_name_is_another_pod() {
        let (mut store, now) = (Store::default(), Instant::now());
        store.apply(Change::All(vec![pod("1", &[("app", "a")])]), now, now);
        store.apply(Change::All(vec![Pod { name: "pod-1".into(), ..pod("2", &[("app", "b")]) }]), now, now);
        let uid = |store: &mut Store, id| match store.look_up(id, "", now) {
            Lookup::Known { pod, .. } => pod.uid.clone(),
            other => format!("{other:?}"),
        };
        assert_eq!((uid(&mut store, "a"), uid(&mut store, "b")), ("1".into(), "2".into()));
    }

    #[test]
    fn what_nobody_knows_is_asked_for_once_and_rests() {
        let (mut store, now) = (Store::default(), Instant::now());
        assert!(store.ask("sandbox", "", now));
        // A list that was asked for soon after, or before, says nothing about it.
        store.apply(Change::All(vec![]), now.checked_sub(Duration::from_secs(1)).unwrap(), now);
        store.apply(Change::All(vec![]), later(now, 2), later(now, 2));
        assert!(store.ask("sandbox", "", later(now, 2)));
        store.apply(Change::All(vec![]), later(now, 3), now);
        assert!(!store.ask("sandbox", "", later(now, 29)));
        assert_eq!(names(&mut store, "sandbox", "", later(now, 29)), "InVain");
        assert!(store.ask("sandbox", "", later(now, 60)));
        // What appears after all is known at once.
        store.apply(Change::All(vec![pod("1", &[("app", "sandbox")])]), later(now, 61), later(now, 61));
        assert_eq!(names(&mut store, "sandbox", "", later(now, 61)), "pod-1 app");
    }

    #[test]
    fn a_source_that_only_tells_changes_is_not_waited_for_for_ever() {
        let (mut store, now) = (Store::default(), Instant::now());
        assert!(store.ask("sandbox", "", now));
        assert!(store.ask("sandbox", "", later(now, 9)));
        assert!(!store.ask("sandbox", "", later(now, 10)));
        assert_eq!(store.unknown(), (0, 1));
    }

    #[test]
    fn the_uid_in_the_path_names_the_pod_where_the_container_is_in_no_list() {
        let (mut store, now) = (Store::default(), Instant::now());
        let fixed = Pod { config_hash: "hash".into(), ..pod("mirror", &[]) };
        store.apply(Change::All(vec![pod("1", &[]), fixed]), now, now);
        // First it is asked for: perhaps the list comes to hold it.
        assert_eq!(names(&mut store, "x", "1", now), "Unknown");
        assert!(store.ask("x", "1", now) && store.ask("y", "hash", now) && store.ask("z", "2", now));
        store.apply(Change::All(vec![pod("1", &[]), pod("mirror", &[])]), later(now, 3), now);
        assert_eq!(names(&mut store, "x", "1", now), "pod-1 -");
        assert_eq!(names(&mut store, "y", "hash", now), "pod-mirror -");
        assert_eq!(names(&mut store, "z", "2", now), "InVain");
    }

    #[test]
    fn memory_is_bounded() {
        let (mut store, now) = (Store::default(), Instant::now());
        for n in 0..2 * MOST_IN_VAIN.get() {
            store.ask(&n.to_string(), "", now);
        }
        assert_eq!(store.unknown().0, MOST_IN_VAIN.get());
        store.apply(Change::All(vec![]), later(now, 3), now);
        assert_eq!(store.unknown(), (0, MOST_IN_VAIN.get()));
        let many = (0..=MOST_PODS).map(|n| pod(&n.to_string(), &[])).collect();
        store.apply(Change::All(many), now, now);
        assert_eq!((store.live().len(), store.refused), (MOST_PODS, 1));
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// The source lists these pods, each with so many restarts behind it.
        List(Vec<u8>),
        /// One pod has restarted its container.
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
        /// Over any order of lists, restarts and deletions: a container is its own pod's or nobody's, never another's.
        #[test]
        fn no_container_ever_has_anothers_name(steps in prop::collection::vec(step(), 0..200)) {
            let (mut store, mut now) = (Store::default(), Instant::now());
            let mut restarts = [0_u32; 6];
            let mut owners = HashMap::new();
            let mut made = |number: u8, restarts: &[u32; 6]| {
                let (uid, id) = (format!("u{number}"), format!("c{number}.{}", restarts[usize::from(number)]));
                owners.insert(id.clone(), uid.clone());
                // All have the same name, as the pods of a StatefulSet have after they were made again.
                Pod { name: "same".into(), ..pod(&uid, &[("app", &id)]) }
            };
            for step in steps {
                match step {
                    Step::List(numbers) => {
                        let pods = numbers.iter().map(|number| made(*number, &restarts)).collect();
                        store.apply(Change::All(pods), now, now);
                    }
                    Step::Restart(number) => {
                        restarts[usize::from(number)] += 1;
                        store.apply(Change::Set(made(number, &restarts)), now, now);
                    }
                    Step::Delete(number) => store.apply(Change::Gone(format!("u{number}")), now, now),
                    Step::Wait(seconds) => now = later(now, seconds),
                }
            }
            for (id, uid) in owners {
                if let Lookup::Known { pod, .. } = store.look_up(&id, "", now) {
                    prop_assert_eq!(&pod.uid, &uid, "{}", id);
                }
            }
        }
    }
}
