//! The YAML and JSON form of a rule as serde types. [`super::convert`] converts them to and from the protobuf types.

use std::collections::BTreeMap;

use jiff::SignedDuration;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::time::{parse_duration, show_duration};
use crate::selector::LabelSelector;

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RuleForm {
    pub(super) id: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) description: String,
    #[serde(rename = "match", default, skip_serializing_if = "is_default")]
    pub(super) matches: MatchForm,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(super) nodes: NodesForm,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) when: Vec<ConditionForm>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(super) capture: CaptureForm,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(super) lifetime: LifetimeForm,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(super) priority: i32,
}

#[derive(Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct MatchForm {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) comm: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) exe: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) cgroup: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) namespaces: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "selector_or_map")]
    pub(super) pod_labels: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) containers: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) workloads: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) pids: Vec<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) uid: Vec<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) runtime: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) runtime_version: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) service: Vec<String>,
}

#[derive(Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct NodesForm {
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "selector_or_map")]
    pub(super) selector: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) names: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub(super) percent: Option<u32>,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ConditionForm {
    Pressure(PressureForm),
    CpuUsage(CpuUsageForm),
    Throttled(ThrottledForm),
    Exec(ExecForm),
    Schedule(ScheduleForm),
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PressureForm {
    pub(super) resource: Option<Resource>,
    pub(super) kind: Option<PressureKind>,
    pub(super) stall_us: u64,
    pub(super) window_us: u64,
    #[serde(default = "container")]
    pub(super) scope: Option<Scope>,
}

#[expect(clippy::unnecessary_wraps, reason = "the default of an optional field")]
fn container() -> Option<Scope> {
    Some(Scope::Container)
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Resource {
    Cpu,
    Memory,
    Io,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum PressureKind {
    Some,
    Full,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Scope {
    Container,
    Pod,
    Node,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CpuUsageForm {
    pub(super) above_millicores: u32,
    #[serde(rename = "for")]
    pub(super) lasting: Option<Time>,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ThrottledForm {
    pub(super) above_percent: u32,
    #[serde(rename = "for")]
    pub(super) lasting: Option<Time>,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ExecForm {}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ScheduleForm {
    pub(super) every: Option<Time>,
    #[serde(rename = "for")]
    pub(super) lasting: Option<Time>,
}

#[derive(Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct CaptureForm {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) kind: Vec<CaptureKind>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub(super) hz: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) duration: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cooldown: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) lead_up: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub(super) max_concurrent: Option<u32>,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) stacks: StacksForm,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) only_in_span: bool,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum CaptureKind {
    OnCpu,
    OffCpu,
    /// The unspecified value of the protobuf type. A rule file cannot have it.
    #[serde(skip_deserializing)]
    Unspecified,
}

#[derive(Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct StacksForm {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) user: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) kernel: Option<bool>,
}

#[derive(Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LifetimeForm {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ttl: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) not_before: Option<Moment>,
}

/// A duration: `30s`, `2m`, `1h30m`.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Time(pub(super) SignedDuration);

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&show_duration(self.0))
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Time;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a duration with its unit, like 30s, 2m or 1h30m")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Time, E> {
                parse_duration(text).map(Time).map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

/// A time: `2026-01-31T12:00:00Z`.
#[derive(PartialEq)]
pub(super) struct Moment(pub(super) jiff::Timestamp);

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Moment {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(|_| {
            D::Error::custom(format!("`{text}` is not a time: write it like 2026-01-31T12:00:00Z"))
        })
    }
}

/// Reads a number other than 0, which means "not given" on the wire.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    match Option::<u32>::deserialize(deserializer)? {
        Some(0) => {
            Err(D::Error::custom("0 is not allowed: give 1 or more, or omit the field for the default"))
        }
        value => Ok(value),
    }
}

/// Reads a label selector: `app in (a,b),tier!=cache`, or the map `{app: a}`.
fn selector_or_map<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    struct Visitor;
    impl<'de> serde::de::Visitor<'de> for Visitor {
        type Value = String;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a map of labels ({app: checkout}) or a selector (\"app in (a,b),tier!=cache\")")
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<String, E> {
            // Equal selectors get the same text, so that equal rules have the same digest.
            Ok(LabelSelector::parse(text).map_err(E::custom)?.to_string())
        }

        fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<String, A::Error> {
            let mut labels = BTreeMap::new();
            while let Some((key, value)) = map.next_entry::<String, String>()? {
                labels.insert(key, value);
            }
            Ok(LabelSelector::from_labels(&labels).map_err(A::Error::custom)?.to_string())
        }
    }
    deserializer.deserialize_any(Visitor)
}
