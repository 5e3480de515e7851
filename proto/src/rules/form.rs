//! Rules as people write them: the shape of the YAML (and JSON) form, and its way to and from the wire's types.

use std::collections::BTreeMap;

use jiff::{
    SignedDuration,
    fmt::friendly::{Spacing, SpanPrinter},
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{
    control::{self, condition},
    selector::LabelSelector,
};

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RuleForm {
    id: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    description: String,
    #[serde(rename = "match", default, skip_serializing_if = "is_default")]
    matches: MatchForm,
    #[serde(default, skip_serializing_if = "is_default")]
    nodes: NodesForm,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    when: Vec<ConditionForm>,
    #[serde(default, skip_serializing_if = "is_default")]
    capture: CaptureForm,
    #[serde(default, skip_serializing_if = "is_default")]
    lifetime: LifetimeForm,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "is_default")]
    priority: i32,
}

#[derive(Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MatchForm {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    comm: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    exe: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cgroup: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    namespaces: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "selector_or_map")]
    pod_labels: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    containers: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    workloads: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pids: Vec<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    uid: Vec<u32>,
}

#[derive(Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct NodesForm {
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "selector_or_map")]
    selector: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    names: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    percent: Option<u32>,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ConditionForm {
    Pressure(PressureForm),
    CpuUsage(CpuUsageForm),
    Throttled(ThrottledForm),
    Exec(ExecForm),
    Schedule(ScheduleForm),
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PressureForm {
    resource: Option<Resource>,
    kind: Option<PressureKind>,
    stall_us: u64,
    window_us: u64,
    #[serde(default = "container")]
    scope: Option<Scope>,
}

#[expect(clippy::unnecessary_wraps, reason = "the default of an optional field")]
fn container() -> Option<Scope> {
    Some(Scope::Container)
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Resource {
    Cpu,
    Memory,
    Io,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum PressureKind {
    Some,
    Full,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Scope {
    Container,
    Pod,
    Node,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CpuUsageForm {
    above_millicores: u32,
    #[serde(rename = "for")]
    lasting: Option<Time>,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ThrottledForm {
    above_percent: u32,
    #[serde(rename = "for")]
    lasting: Option<Time>,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExecForm {}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScheduleForm {
    every: Option<Time>,
    #[serde(rename = "for")]
    lasting: Option<Time>,
}

#[derive(Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct CaptureForm {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kind: Vec<CaptureKind>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    hz: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cooldown: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lead_up: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    max_concurrent: Option<u32>,
    #[serde(skip_serializing_if = "is_default")]
    stacks: StacksForm,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum CaptureKind {
    OnCpu,
    OffCpu,
    /// What the wire calls unspecified; nobody can write it.
    #[serde(skip_deserializing)]
    Unspecified,
}

#[derive(Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct StacksForm {
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<bool>,
}

#[derive(Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LifetimeForm {
    #[serde(skip_serializing_if = "Option::is_none")]
    ttl: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_before: Option<Moment>,
}

/// `30s`, `2m`, `1h30m`.
#[derive(Clone, Copy, PartialEq)]
struct Time(SignedDuration);

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
                text.parse().map(Time).map_err(|_| {
                    E::custom(format!("`{text}` is not a duration: write it like 30s, 2m or 1h30m"))
                })
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

/// `2026-01-31T12:00:00Z`.
#[derive(PartialEq)]
struct Moment(jiff::Timestamp);

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

/// As in rules: `1h30m`.
pub(super) fn show_duration(duration: SignedDuration) -> String {
    SpanPrinter::new().spacing(Spacing::None).duration_to_string(&duration)
}

impl Time {
    fn from_wire(wire: Option<prost_types::Duration>) -> Option<Self> {
        wire.map(|wire| Self(signed(wire)))
    }

    fn to_wire(self) -> prost_types::Duration {
        prost_types::Duration { seconds: self.0.as_secs(), nanos: self.0.subsec_nanos() }
    }
}

/// The wire's duration; one that is beyond what is possible becomes the longest possible.
pub(super) fn signed(wire: prost_types::Duration) -> SignedDuration {
    SignedDuration::from_secs(wire.seconds).saturating_add(SignedDuration::from_nanos(wire.nanos.into()))
}

/// On the wire 0 means "not given"; who writes it out means something else.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    match Option::<u32>::deserialize(deserializer)? {
        Some(0) => {
            Err(D::Error::custom("0 is not possible: give 1 or more, or leave the field out for the default"))
        }
        value => Ok(value),
    }
}

/// `app in (a,b),tier!=cache`, or the map `{app: a}`.
fn selector_or_map<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    struct Visitor;
    impl<'de> serde::de::Visitor<'de> for Visitor {
        type Value = String;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a map of labels ({app: checkout}) or a selector (\"app in (a,b),tier!=cache\")")
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<String, E> {
            // A selector that means the same has the same bytes, so that it is the same rule.
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

/// `None` for what says nothing, so that `capture: {}` and no `capture` are the same rule.
fn unless_default<T: Default + PartialEq>(value: T) -> Option<T> {
    (value != T::default()).then_some(value)
}

impl From<RuleForm> for control::Rule {
    fn from(form: RuleForm) -> Self {
        let RuleForm { id, description, matches, nodes, when, capture, lifetime, labels, priority } = form;
        let MatchForm { comm, exe, cgroup, namespaces, pod_labels, containers, workloads, pids, uid } =
            matches;
        let NodesForm { selector, names, percent } = nodes;
        let CaptureForm { kind, hz, duration, cooldown, lead_up, max_concurrent, stacks } = capture;
        let LifetimeForm { ttl, not_before } = lifetime;
        Self {
            id,
            description,
            r#match: unless_default(control::Match {
                comm,
                exe,
                cgroup,
                namespaces,
                pod_labels,
                containers,
                workloads,
                pids,
                uid,
            }),
            nodes: unless_default(control::NodeSelector { selector, names, percent: percent.unwrap_or(0) }),
            when: when.into_iter().map(Into::into).collect(),
            capture: unless_default(control::Capture {
                kind: kind
                    .into_iter()
                    .map(|kind| match kind {
                        CaptureKind::OnCpu => control::capture::Kind::OnCpu.into(),
                        CaptureKind::OffCpu => control::capture::Kind::OffCpu.into(),
                        CaptureKind::Unspecified => control::capture::Kind::Unspecified.into(),
                    })
                    .collect(),
                hz: hz.unwrap_or(0),
                duration: duration.map(Time::to_wire),
                cooldown: cooldown.map(Time::to_wire),
                lead_up: lead_up.map(Time::to_wire),
                max_concurrent: max_concurrent.unwrap_or(0),
                user_stacks: stacks.user,
                kernel_stacks: stacks.kernel,
            }),
            lifetime: unless_default(control::Lifetime {
                ttl: ttl.map(Time::to_wire),
                not_before: not_before.map(|Moment(at)| prost_types::Timestamp {
                    seconds: at.as_second(),
                    nanos: at.subsec_nanosecond(),
                }),
            }),
            labels,
            priority,
        }
    }
}

impl From<ConditionForm> for control::Condition {
    fn from(form: ConditionForm) -> Self {
        let kind = match form {
            ConditionForm::Pressure(PressureForm { resource, kind, stall_us, window_us, scope }) => {
                use condition::pressure as wire;
                condition::Kind::Pressure(condition::Pressure {
                    resource: match resource {
                        None => wire::Resource::Unspecified,
                        Some(Resource::Cpu) => wire::Resource::Cpu,
                        Some(Resource::Memory) => wire::Resource::Memory,
                        Some(Resource::Io) => wire::Resource::Io,
                    }
                    .into(),
                    kind: match kind {
                        None => wire::Kind::Unspecified,
                        Some(PressureKind::Some) => wire::Kind::Some,
                        Some(PressureKind::Full) => wire::Kind::Full,
                    }
                    .into(),
                    stall_us,
                    window_us,
                    scope: match scope {
                        None => wire::Scope::Unspecified,
                        Some(Scope::Container) => wire::Scope::Container,
                        Some(Scope::Pod) => wire::Scope::Pod,
                        Some(Scope::Node) => wire::Scope::Node,
                    }
                    .into(),
                })
            }
            ConditionForm::CpuUsage(CpuUsageForm { above_millicores, lasting }) => {
                condition::Kind::CpuUsage(condition::CpuUsage {
                    above_millicores,
                    r#for: lasting.map(Time::to_wire),
                })
            }
            ConditionForm::Throttled(ThrottledForm { above_percent, lasting }) => {
                condition::Kind::Throttled(condition::Throttled {
                    above_percent,
                    r#for: lasting.map(Time::to_wire),
                })
            }
            ConditionForm::Exec(ExecForm {}) => condition::Kind::Exec(condition::Exec {}),
            ConditionForm::Schedule(ScheduleForm { every, lasting }) => {
                condition::Kind::Schedule(condition::Schedule {
                    every: every.map(Time::to_wire),
                    r#for: lasting.map(Time::to_wire),
                })
            }
        };
        Self { kind: Some(kind) }
    }
}

impl From<&control::Rule> for RuleForm {
    fn from(rule: &control::Rule) -> Self {
        let control::Rule { id, description, r#match, nodes, when, capture, lifetime, labels, priority } =
            rule.clone();
        let control::Match { comm, exe, cgroup, namespaces, pod_labels, containers, workloads, pids, uid } =
            r#match.unwrap_or_default();
        let control::NodeSelector { selector, names, percent } = nodes.unwrap_or_default();
        let control::Capture {
            kind,
            hz,
            duration,
            cooldown,
            lead_up,
            max_concurrent,
            user_stacks,
            kernel_stacks,
        } = capture.unwrap_or_default();
        let control::Lifetime { ttl, not_before } = lifetime.unwrap_or_default();
        let unless_zero = |value: u32| (value != 0).then_some(value);
        Self {
            id,
            description,
            matches: MatchForm {
                comm,
                exe,
                cgroup,
                namespaces,
                pod_labels,
                containers,
                workloads,
                pids,
                uid,
            },
            nodes: NodesForm { selector, names, percent: unless_zero(percent) },
            when: when.into_iter().filter_map(|condition| condition.kind).map(Into::into).collect(),
            capture: CaptureForm {
                kind: kind
                    .into_iter()
                    .map(|kind| match control::capture::Kind::try_from(kind) {
                        Ok(control::capture::Kind::OnCpu) => CaptureKind::OnCpu,
                        Ok(control::capture::Kind::OffCpu) => CaptureKind::OffCpu,
                        Ok(control::capture::Kind::Unspecified) | Err(_) => CaptureKind::Unspecified,
                    })
                    .collect(),
                hz: unless_zero(hz),
                duration: Time::from_wire(duration),
                cooldown: Time::from_wire(cooldown),
                lead_up: Time::from_wire(lead_up),
                max_concurrent: unless_zero(max_concurrent),
                stacks: StacksForm { user: user_stacks, kernel: kernel_stacks },
            },
            lifetime: LifetimeForm {
                ttl: Time::from_wire(ttl),
                not_before: not_before
                    .and_then(|at| jiff::Timestamp::new(at.seconds, at.nanos).ok())
                    .map(Moment),
            },
            labels,
            priority,
        }
    }
}

impl From<condition::Kind> for ConditionForm {
    fn from(kind: condition::Kind) -> Self {
        match kind {
            condition::Kind::Pressure(pressure) => {
                use condition::pressure as wire;
                Self::Pressure(PressureForm {
                    resource: match pressure.resource() {
                        wire::Resource::Unspecified => None,
                        wire::Resource::Cpu => Some(Resource::Cpu),
                        wire::Resource::Memory => Some(Resource::Memory),
                        wire::Resource::Io => Some(Resource::Io),
                    },
                    kind: match pressure.kind() {
                        wire::Kind::Unspecified => None,
                        wire::Kind::Some => Some(PressureKind::Some),
                        wire::Kind::Full => Some(PressureKind::Full),
                    },
                    stall_us: pressure.stall_us,
                    window_us: pressure.window_us,
                    scope: match pressure.scope() {
                        wire::Scope::Unspecified => None,
                        wire::Scope::Container => Some(Scope::Container),
                        wire::Scope::Pod => Some(Scope::Pod),
                        wire::Scope::Node => Some(Scope::Node),
                    },
                })
            }
            condition::Kind::CpuUsage(condition::CpuUsage { above_millicores, r#for }) => {
                Self::CpuUsage(CpuUsageForm { above_millicores, lasting: Time::from_wire(r#for) })
            }
            condition::Kind::Throttled(condition::Throttled { above_percent, r#for }) => {
                Self::Throttled(ThrottledForm { above_percent, lasting: Time::from_wire(r#for) })
            }
            condition::Kind::Exec(condition::Exec {}) => Self::Exec(ExecForm {}),
            condition::Kind::Schedule(condition::Schedule { every, r#for }) => Self::Schedule(ScheduleForm {
                every: Time::from_wire(every),
                lasting: Time::from_wire(r#for),
            }),
        }
    }
}
