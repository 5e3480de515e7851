//! Conversions between the YAML form of rules and their protobuf types.

use super::{
    form::{
        CaptureForm, CaptureKind, ConditionForm, CpuUsageForm, ExecForm, LifetimeForm, MatchForm, Moment,
        NodesForm, PressureForm, PressureKind, Resource, RuleForm, ScheduleForm, Scope, StacksForm,
        ThrottledForm, Time,
    },
    time::signed,
};
use crate::control::{self, condition};

impl Time {
    fn from_wire(wire: Option<prost_types::Duration>) -> Option<Self> {
        wire.map(|wire| Self(signed(wire)))
    }

    fn to_wire(self) -> prost_types::Duration {
        prost_types::Duration { seconds: self.0.as_secs(), nanos: self.0.subsec_nanos() }
    }
}

/// Returns `None` for an empty part, so that `capture: {}` and no `capture` are the same rule.
fn unless_default<T: Default + PartialEq>(value: T) -> Option<T> {
    (value != T::default()).then_some(value)
}

impl From<RuleForm> for control::Rule {
    fn from(form: RuleForm) -> Self {
        let RuleForm { id, description, matches, nodes, when, capture, lifetime, labels, priority } = form;
        let MatchForm {
            comm,
            exe,
            cgroup,
            namespaces,
            pod_labels,
            containers,
            workloads,
            pids,
            uid,
            runtime,
            runtime_version,
            service,
        } = matches;
        let NodesForm { selector, names, percent } = nodes;
        let CaptureForm { kind, hz, duration, cooldown, lead_up, max_concurrent, stacks, only_in_span } =
            capture;
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
                runtime,
                runtime_version,
                service,
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
                only_in_span,
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
        let control::Match {
            comm,
            exe,
            cgroup,
            namespaces,
            pod_labels,
            containers,
            workloads,
            pids,
            uid,
            runtime,
            runtime_version,
            service,
        } = r#match.unwrap_or_default();
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
            only_in_span,
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
                runtime,
                runtime_version,
                service,
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
                only_in_span,
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
