//! Parses the kubelet's list of pods one pod after the other while it arrives, so that an answer of many megabytes takes
//! no more memory than the kept fields.

use std::{collections::BTreeMap, fmt, io, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::PodList;
use crate::pods::model::{ANNOTATIONS, MAX_LABELS, Pod, ReportedPod};

/// Parses a `PodList`.
pub(super) fn read_pods(input: impl io::Read) -> Result<PodList, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_reader(input);
    let pods = List.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(pods)
}

struct List;

impl<'de> DeserializeSeed<'de> for List {
    type Value = PodList;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<PodList, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for List {
    type Value = PodList;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of pods")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<PodList, A::Error> {
        let mut pods = None;
        while let Some(key) = map.next_key::<String>()? {
            if key == "items" {
                // The kubelet writes an empty list as null.
                pods =
                    Some(map.next_value::<Option<Items>>()?.map_or_else(PodList::default, |items| items.0));
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        pods.ok_or_else(|| A::Error::custom("this is no list of pods: it has no `items`"))
    }
}

struct Items(PodList);

impl<'de> Deserialize<'de> for Items {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Seq;
        impl<'de> Visitor<'de> for Seq {
            type Value = Items;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a sequence of pods")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Items, A::Error> {
                let mut pods = PodList::default();
                while let Some(pod) = seq.next_element::<JsonPod>()? {
                    pods.push(Pod::from(ReportedPod::from(pod)));
                }
                Ok(Items(pods))
            }
        }
        deserializer.deserialize_seq(Seq)
    }
}

/// The fields of a pod's JSON to keep. Missing fields are empty; Go writes `null` for some of them.
#[derive(Deserialize)]
struct JsonPod {
    #[serde(default, deserialize_with = "or_empty")]
    metadata: Metadata,
    #[serde(default, deserialize_with = "or_empty")]
    status: Status,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    name: String,
    namespace: String,
    uid: String,
    #[serde(deserialize_with = "some_entries::<_, AllKeys>")]
    labels: KeptEntries,
    #[serde(deserialize_with = "some_entries::<_, OurAnnotations>")]
    annotations: KeptEntries,
    #[serde(deserialize_with = "or_empty")]
    owner_references: Vec<Owner>,
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Owner {
    kind: String,
    name: String,
    #[serde(deserialize_with = "or_empty")]
    controller: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    #[serde(rename = "containerStatuses", deserialize_with = "or_empty")]
    main: Vec<ContainerStatus>,
    #[serde(rename = "initContainerStatuses", deserialize_with = "or_empty")]
    init: Vec<ContainerStatus>,
    #[serde(rename = "ephemeralContainerStatuses", deserialize_with = "or_empty")]
    ephemeral: Vec<ContainerStatus>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ContainerStatus {
    name: String,
    #[serde(rename = "containerID", deserialize_with = "or_empty")]
    container_id: String,
    #[serde(deserialize_with = "or_empty")]
    state: ContainerState,
    #[serde(deserialize_with = "or_empty")]
    last_state: ContainerState,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ContainerState {
    #[serde(deserialize_with = "or_empty")]
    terminated: Terminated,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Terminated {
    #[serde(rename = "containerID", deserialize_with = "or_empty")]
    container_id: String,
}

impl From<JsonPod> for ReportedPod {
    fn from(pod: JsonPod) -> Self {
        let Metadata { name, namespace, uid, labels, annotations, owner_references } = pod.metadata;
        let Status { main, init, ephemeral } = pod.status;
        let controller = owner_references.into_iter().find(|owner| owner.controller);
        let containers = main
            .into_iter()
            .chain(init)
            .chain(ephemeral)
            .flat_map(|status| {
                let ContainerStatus { name, container_id, state, last_state } = status;
                // A restarted container has a former instance, and samples of it may still be on their way.
                [container_id, state.terminated.container_id, last_state.terminated.container_id]
                    .map(|id| (name.clone(), id))
            })
            .collect();
        Self {
            uid,
            namespace,
            name,
            labels: labels.entries,
            labels_left_out: labels.left_out,
            annotations: annotations.entries,
            controller: controller.map(|owner| (owner.kind, owner.name)),
            containers,
        }
    }
}

/// Reads `null` as the default.
fn or_empty<'de, D: Deserializer<'de>, T: Default + DeserializeOwned>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// The selected entries of a map, and how many others are beyond the bound.
#[derive(Default)]
struct KeptEntries {
    entries: BTreeMap<String, String>,
    left_out: u64,
}

/// Selects the entries of a map to keep.
trait Keys {
    fn keeps(key: &str) -> bool;
}

struct AllKeys;

impl Keys for AllKeys {
    fn keeps(_: &str) -> bool {
        true
    }
}

struct OurAnnotations;

impl Keys for OurAnnotations {
    fn keeps(key: &str) -> bool {
        ANNOTATIONS.contains(&key)
    }
}

/// Reads the selected entries of a map of strings. The values of other annotations may have a quarter of a megabyte.
fn some_entries<'de, D: Deserializer<'de>, K: Keys>(deserializer: D) -> Result<KeptEntries, D::Error> {
    struct Entries<K>(PhantomData<K>);
    impl<'de, K: Keys> Visitor<'de> for Entries<K> {
        type Value = KeptEntries;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of strings")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(KeptEntries::default())
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut kept = KeptEntries::default();
            while let Some(key) = map.next_key::<String>()? {
                if K::keeps(&key) && kept.entries.len() < MAX_LABELS {
                    kept.entries.insert(key, map.next_value()?);
                } else {
                    kept.left_out += u64::from(K::keeps(&key));
                    map.next_value::<IgnoredAny>()?;
                }
            }
            Ok(kept)
        }
    }
    deserializer.deserialize_any(Entries::<K>(PhantomData))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::pods::feed::MAX_PODS;

    fn pods(text: &str) -> Vec<Pod> {
        read_pods(text.as_bytes()).unwrap().pods
    }

    #[test]
    fn a_real_answer_of_a_kubelet_is_parsed() {
        let pods = pods(include_str!("../../../tests/data/kubelet-pods-1.20.2.json"));
        let show = |pod: &Pod| {
            let workload =
                pod.workload.as_ref().map_or_else(String::new, |w| format!("{}/{}", w.kind, w.name));
            let mut names: Vec<_> = pod.containers.iter().map(|c| c.name.as_str()).collect();
            names.dedup();
            format!("{}/{} {} [{}]", pod.namespace, pod.name, workload, names.join(" "))
        };
        insta::assert_snapshot!(pods.iter().map(show).collect::<Vec<_>>().join("\n"), @r"
        default/checkout-6794f7b79-z5mvl deployment/checkout [app sidecar warm]
        default/once-76q28 job/once [c]
        default/checkout-6794f7b79-7w6dg deployment/checkout [app sidecar warm]
        default/static-web-test-node  [c]
        default/guaranteed  [c]
        ");
        assert!(pods.iter().flat_map(|pod| &pod.containers).all(|container| container.id.len() == 64));
    }

    #[test]
    fn all_container_lists_and_former_instances_are_read() {
        let pods = pods(
            r#"{"items":[{"metadata":{"name":"p","namespace":"n","uid":"u","ownerReferences":[
                 {"kind":"Other","name":"o"},{"kind":"StatefulSet","name":"db","controller":true}]},
               "status":{
                 "containerStatuses":[{"name":"app","containerID":"containerd://a2",
                   "lastState":{"terminated":{"containerID":"containerd://a1"}}}],
                 "initContainerStatuses":[{"name":"init","containerID":"cri-o://i1",
                   "state":{"terminated":{"containerID":"cri-o://i1"}},"lastState":{}}],
                 "ephemeralContainerStatuses":[{"name":"debug","containerID":"docker://d1"},
                   {"name":"waits","state":{"waiting":{"reason":"x"}}}]}}],"kind":"PodList"}"#,
        );
        let found: Vec<_> = pods[0].containers.iter().map(|c| format!("{} {}", c.name, c.id)).collect();
        assert_eq!(found, ["app a1", "app a2", "debug d1", "init i1"]);
        assert_eq!(pods[0].workload.as_ref().unwrap().name, "db");
    }

    #[test]
    fn only_the_known_annotations_are_kept() {
        let text = format!(
            r#"{{"items":[{{"metadata":{{"annotations":{{"kubectl.kubernetes.io/last-applied-configuration":"{}",
               "gannet.dev/profile":"false","gannet.dev/service-name":"pay","odd":7}}}}}}]}}"#,
            "x".repeat(1 << 18)
        );
        let pods = pods(&text);
        assert!(pods[0].denied);
        assert_eq!(pods[0].service_name, "pay");
    }

    #[rstest]
    #[case::no_pods(r#"{"kind":"PodList","items":null}"#, 0)]
    #[case::nulls(
        r#"{"items":[{"metadata":{"labels":null,"annotations":null,"ownerReferences":null},"status":null},{}]}"#,
        2
    )]
    fn nulls_and_missing_fields_are_empty(#[case] text: &str, #[case] count: usize) {
        assert_eq!(pods(text).len(), count);
    }

    #[rstest]
    #[case::nothing("", "EOF")]
    #[case::page("<html>", "expected value")]
    #[case::other(r#"{"kind":"Status","message":"no"}"#, "no `items`")]
    #[case::cut(r#"{"items":[{"metadata":{"name":"a"#, "EOF")]
    #[case::kinds(r#"{"items":[{"metadata":{"name":7}}]}"#, "invalid type")]
    #[case::more(r#"{"items":[]} {}"#, "trailing")]
    fn text_that_is_no_list_is_an_error(#[case] text: &str, #[case] words: &str) {
        let error = read_pods(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn nesting_and_numbers_are_bounded() {
        assert!(read_pods(format!("{{\"a\":{}", "[".repeat(1 << 20)).as_bytes()).is_err());
    }

    #[test]
    fn pods_and_labels_beyond_the_bounds_are_counted() {
        let many = format!(r#"{{"items":[{}{{}}]}}"#, "{},".repeat(MAX_PODS + 1));
        let list = read_pods(many.as_bytes()).unwrap();
        assert_eq!((list.pods.len(), list.left_out), (MAX_PODS, 2));
        let entries = |count: usize| {
            let pairs: Vec<_> = (0..count).map(|number| format!(r#""key-{number}":"v""#)).collect();
            pairs.join(",")
        };
        for (count, left_out) in [(MAX_LABELS, 0), (MAX_LABELS + 3, 3)] {
            let text = format!(
                r#"{{"items":[{{"metadata":{{"labels":{{{0}}},"annotations":{{{0}}}}}}}]}}"#,
                entries(count)
            );
            let pod = pods(&text).remove(0);
            assert_eq!((pod.labels.len(), pod.left_out.labels), (MAX_LABELS, left_out));
        }
    }
}
