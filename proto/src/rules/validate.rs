//! The validator of rules. It reports all mistakes at once, each with the path of the field in the YAML form and with a
//! remedy.

use std::{collections::HashSet, time::Duration};

use jiff::SignedDuration;
use prost::Message as _;

use super::{
    ALWAYS_HZ, Pattern, effective_hz,
    time::{show_duration, signed},
};
use crate::{
    control::{Capture, Condition, Lifetime, Match, NodeSelector, Rule, RuleError, capture, condition},
    labels,
    selector::{LabelSelector, is_dns_label},
};

/// Maximum length of a command name: the kernel stores 16 bytes, of which the last is NUL.
const MAX_COMM_BYTES: usize = 15;

const MAX_PATH_BYTES: usize = 4096;
const MAX_DESCRIPTION_BYTES: usize = 1024;
/// Maximum length of each list in a rule.
const MAX_ENTRIES: usize = 64;
const MAX_CONDITIONS: usize = 16;
const MAX_RULE_LABELS: usize = 8;
const MAX_PRIORITY: i32 = 1000;
const MAX_VERSION_PARTS: usize = 3;

/// Maximum size of a service name, in bytes. The agent cuts longer ones.
const MAX_SERVICE_BYTES: usize = 256;
/// The language runtimes that rules can match.
pub const RUNTIMES: &[&str] =
    &["dotnet", "erlang", "go", "java", "luajit", "node", "perl", "php", "python", "ruby"];
// The labels of a rule must fit beside the labels that the agent sets.
const _: () = assert!(labels::RESERVED.len() + MAX_RULE_LABELS <= labels::MAX_LABELS);

const SECOND: SignedDuration = SignedDuration::from_secs(1);
const HOUR: SignedDuration = SignedDuration::from_hours(1);
const DAY: SignedDuration = SignedDuration::from_hours(24);
const YEAR: SignedDuration = SignedDuration::from_hours(24 * 366);
/// Windows of pressure triggers that the kernel accepts.
const PRESSURE_WINDOW_US: std::ops::RangeInclusive<u64> = 500_000..=10_000_000;

/// Limits of rules. The default is the limit of the format. A node may have lower limits; it refuses a rule above them
/// and never reduces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Maximum rate in samples per second and CPU.
    pub max_hz: u32,
    /// A rule above this rate must have a `ttl`.
    pub ttl_above_hz: u32,
    /// A rule above this rate that captures without a condition must have a `ttl`.
    pub ttl_always_above_hz: u32,
    /// Maximum length of a capture.
    pub max_duration: Duration,
    /// Maximum number of captures of one rule at the same time on one node.
    pub max_concurrent: u32,
    /// Maximum number of rules in a set.
    pub max_rules: usize,
    /// Maximum encoded size of a set in bytes.
    pub max_bytes: usize,
}

impl Default for Caps {
    fn default() -> Self {
        Self {
            max_hz: 1000,
            ttl_above_hz: 99,
            ttl_always_above_hz: u32::MAX,
            max_duration: Duration::from_secs(3600),
            max_concurrent: 64,
            max_rules: 256,
            max_bytes: 1 << 20,
        }
    }
}

impl Caps {
    /// Returns the limits of rules for many nodes. Sampling all nodes all the time above the rate of continuous profiling
    /// is expensive, so such a rule needs a `ttl`. The rule files of one node do not.
    pub fn fleet() -> Self {
        Self { ttl_always_above_hz: ALWAYS_HZ, ..Self::default() }
    }
}

/// Collects the errors of one rule.
struct Faults<'a> {
    rule_id: String,
    errors: &'a mut Vec<RuleError>,
}

impl Faults<'_> {
    fn add(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.errors.push(RuleError {
            rule_id: self.rule_id.clone(),
            field: field.into(),
            reason: reason.into(),
        });
    }

    /// Checks that a given duration is in a range, and returns it if it is.
    fn duration(
        &mut self,
        field: &str,
        given: Option<prost_types::Duration>,
        min: SignedDuration,
        max: SignedDuration,
    ) -> Option<SignedDuration> {
        let duration = signed(given?);
        if (min..=max).contains(&duration) {
            return Some(duration);
        }
        let (min, max, is) = (show_duration(min), show_duration(max), show_duration(duration));
        self.add(field, format!("is {is}: give {min} to {max}"));
        None
    }

    /// Checks that a duration is given and in a range, and returns it if it is.
    fn required(
        &mut self,
        field: &str,
        given: Option<prost_types::Duration>,
        min: SignedDuration,
        max: SignedDuration,
    ) -> Option<SignedDuration> {
        if given.is_none() {
            let (min, max) = (show_duration(min), show_duration(max));
            self.add(field, format!("is missing: give {min} to {max}"));
        }
        self.duration(field, given, min, max)
    }

    fn entries<T>(&mut self, field: &str, list: &[T], max: usize) {
        if list.len() > max {
            self.add(
                field,
                format!(
                    "has {} entries, and at most {max} are allowed: use prefixes or split the rule",
                    list.len()
                ),
            );
        }
    }

    fn each(&mut self, field: &str, list: &[String], check: impl Fn(&str) -> Result<(), String>) {
        self.entries(field, list, MAX_ENTRIES);
        for (number, entry) in list.iter().enumerate() {
            if let Err(reason) = check(entry) {
                self.add(format!("{field}[{number}]"), reason);
            }
        }
    }
}

/// Checks the name of a scope: 1 to 63 characters of `[a-z0-9-]`. The error is a complete sentence.
pub fn check_scope(scope: &str) -> Result<(), String> {
    if is_dns_label(scope) { Ok(()) } else { Err(format!("`{scope}` {DNS_LABEL}")) }
}

const DNS_LABEL: &str =
    "is not a name of 1 to 63 characters a-z, 0-9 and `-` that starts and ends with a letter or digit";

fn dns_label(text: &str) -> Result<(), String> {
    if is_dns_label(text) { Ok(()) } else { Err(format!("`{text}` {DNS_LABEL}")) }
}

/// Returns all mistakes in these rules; the list is empty if they are valid.
pub fn validate(rules: &[Rule], caps: &Caps) -> Vec<RuleError> {
    let mut errors = Vec::new();
    let mut set = Faults { rule_id: String::new(), errors: &mut errors };
    if rules.len() > caps.max_rules {
        set.add(
            "rules",
            format!("has {} rules, and the limit is {}: remove or merge some", rules.len(), caps.max_rules),
        );
        // A list of that length would yield too many errors.
        return errors;
    }
    let bytes: usize = rules.iter().map(Rule::encoded_len).sum();
    if bytes > caps.max_bytes {
        set.add(
            "rules",
            format!("has {bytes} bytes, and the limit is {}: shorten or remove some rules", caps.max_bytes),
        );
        return errors;
    }
    let mut ids = HashSet::new();
    for (number, rule) in rules.iter().enumerate() {
        let rule_id = if rule.id.is_empty() { format!("rules[{number}]") } else { rule.id.clone() };
        let mut faults = Faults { rule_id, errors: &mut errors };
        if !ids.insert(&rule.id) && !rule.id.is_empty() {
            faults.add("id", format!("`{}` is used twice: rename one of the rules", rule.id));
        }
        one(rule, caps, &mut faults);
    }
    errors
}

fn one(rule: &Rule, caps: &Caps, faults: &mut Faults<'_>) {
    let Rule { id, description, r#match, nodes, when, capture, lifetime, labels, priority } = rule;
    if let Err(reason) = dns_label(id) {
        faults.add("id", reason);
    }
    if description.len() > MAX_DESCRIPTION_BYTES {
        let length = description.len();
        faults.add(
            "description",
            format!("has {length} bytes, and at most {MAX_DESCRIPTION_BYTES} are allowed"),
        );
    }
    matches(r#match.as_ref().unwrap_or(&Match::default()), faults);
    if let Some(nodes) = nodes {
        node_selector(nodes, faults);
    }
    faults.entries("when", when, MAX_CONDITIONS);
    for (number, when) in when.iter().enumerate() {
        condition(when, &format!("when[{number}]"), faults);
    }
    let capture = capture.clone().unwrap_or_default();
    captures(&capture, !when.is_empty(), caps, faults);

    let lifetime = lifetime.unwrap_or_default();
    let Lifetime { ttl, not_before } = lifetime;
    faults.duration("lifetime.ttl", ttl, SECOND, YEAR);
    let hz = effective_hz(rule);
    if ttl.is_none() && hz > caps.ttl_above_hz {
        let cap = caps.ttl_above_hz;
        faults.add(
            "lifetime.ttl",
            format!(
                "is missing: a rule above {cap} Hz (this one: {hz}) must have an end, for instance `ttl: 20m`"
            ),
        );
    } else if ttl.is_none() && when.is_empty() && hz > caps.ttl_always_above_hz {
        let cap = caps.ttl_always_above_hz;
        faults.add(
            "lifetime.ttl",
            format!(
                "is missing: a rule without `when` captures all the time, and above {cap} Hz (this one: {hz}) it must have an \
                 end, for instance `ttl: 20m`"
            ),
        );
    }
    if not_before.is_some_and(|at| jiff::Timestamp::new(at.seconds, at.nanos).is_err()) {
        faults.add("lifetime.not_before", "is not a time: give one like 2026-01-31T12:00:00Z");
    }

    if labels.len() > MAX_RULE_LABELS {
        let count = labels.len();
        faults.add("labels", format!("has {count} entries, and at most {MAX_RULE_LABELS} are allowed"));
    }
    for (name, value) in labels {
        let field = format!("labels.{name}");
        if labels::RESERVED.contains(&name.as_str()) {
            faults.add(&field, "is a label that Gannet sets itself: choose another name");
        } else if let Err(error) = labels::check(&labels::Labels::from([(name.clone(), value.clone())])) {
            faults.add(&field, error.to_string());
        }
    }
    if !(-MAX_PRIORITY..=MAX_PRIORITY).contains(priority) {
        faults.add("priority", format!("is {priority}: give -{MAX_PRIORITY} to {MAX_PRIORITY}"));
    }
}

fn matches(wanted: &Match, faults: &mut Faults<'_>) {
    if *wanted == Match::default() {
        faults.add("match", "is empty: choose processes, or give `comm: [\"*\"]` for all processes");
    }
    let Match {
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
    } = wanted;
    faults.each("match.comm", comm, check_comm);
    faults.each("match.exe", exe, check_path);
    faults.each("match.cgroup", cgroup, check_path);
    faults.each("match.namespaces", namespaces, dns_label);
    faults.each("match.containers", containers, dns_label);
    faults.each("match.workloads", workloads, check_workload);
    if let Err(error) = LabelSelector::parse(pod_labels) {
        faults.add("match.pod_labels", error.to_string());
    }
    faults.entries("match.pids", pids, MAX_ENTRIES);
    for (number, pid) in pids.iter().enumerate() {
        if *pid == 0 || i32::try_from(*pid).is_err() {
            faults.add(
                format!("match.pids[{number}]"),
                format!("{pid} is not a process: give 1 to {}", i32::MAX),
            );
        }
    }
    faults.entries("match.uid", uid, MAX_ENTRIES);
    faults.each("match.runtime", runtime, check_runtime);
    faults.each("match.runtime_version", runtime_version, check_version);
    faults.each("match.service", service, check_service);
    if runtime.is_empty() && !runtime_version.is_empty() {
        faults.add("match.runtime_version", "needs match.runtime: give the runtime that has this version");
    }
}

fn check_runtime(text: &str) -> Result<(), String> {
    if RUNTIMES.contains(&text) {
        return Ok(());
    }
    let known = RUNTIMES.join(", ");
    Err(format!("`{}` is not a runtime that Gannet knows: give one of {known}", text.escape_debug()))
}

fn check_service(text: &str) -> Result<(), String> {
    let pattern = Pattern::parse(text).map_err(|error| format!("`{}` {error}", text.escape_debug()))?;
    match pattern.text().len() {
        0 => Err("matches every service: give a name, or the beginning of one and `*`".to_owned()),
        1..=MAX_SERVICE_BYTES => Ok(()),
        length => Err(format!("has {length} bytes, and at most {MAX_SERVICE_BYTES} are allowed")),
    }
}

fn check_version(text: &str) -> Result<(), String> {
    let is_number = |part: &str| part.parse::<u16>().is_ok_and(|number| number.to_string() == part);
    if text.split('.').all(is_number) && text.split('.').count() <= MAX_VERSION_PARTS {
        return Ok(());
    }
    Err(format!(
        "`{}` is not a version: give one to {MAX_VERSION_PARTS} numbers with `.` between them, like \"3.11\" for all \
         releases of 3.11",
        text.escape_debug()
    ))
}

fn check_comm(text: &str) -> Result<(), String> {
    if text.starts_with('/') {
        return Err(format!(
            "`{text}` is a path, and a command name is the last component of a path, cut to {MAX_COMM_BYTES} bytes: \
             use match.exe"
        ));
    }
    let pattern = Pattern::parse(text).map_err(|error| format!("`{}` {error}", text.escape_debug()))?;
    let length = pattern.text().len();
    if length > MAX_COMM_BYTES {
        let head = gannet_base::head(pattern.text(), MAX_COMM_BYTES);
        return Err(format!(
            "`{text}` has {length} bytes, and the kernel stores {MAX_COMM_BYTES} of a command name: write `{head}*`, or \
             use match.exe"
        ));
    }
    Ok(())
}

fn check_path(text: &str) -> Result<(), String> {
    let pattern = Pattern::parse(text).map_err(|error| format!("`{}` {error}", text.escape_debug()))?;
    if !pattern.text().starts_with('/') {
        return Err(format!("`{text}` is not an absolute path: start it with `/`"));
    }
    if pattern.text().len() > MAX_PATH_BYTES {
        let length = pattern.text().len();
        return Err(format!("has {length} bytes, and at most {MAX_PATH_BYTES} are allowed"));
    }
    Ok(())
}

fn check_workload(text: &str) -> Result<(), String> {
    let good_kind = |kind: &str| {
        kind.starts_with(|c: char| c.is_ascii_lowercase())
            && kind.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'.')
    };
    match text.split_once('/') {
        Some((kind, name)) if good_kind(kind) && name.len() <= 253 && name.split('.').all(is_dns_label) => {
            Ok(())
        }
        _ => Err(format!(
            "`{text}` is not a workload: write kind/name in lower case, like deployment/checkout"
        )),
    }
}

fn node_selector(nodes: &NodeSelector, faults: &mut Faults<'_>) {
    let NodeSelector { selector, names, percent } = nodes;
    if let Err(error) = LabelSelector::parse(selector) {
        faults.add("nodes.selector", error.to_string());
    }
    faults.each("nodes.names", names, |name| match name.len() {
        0 => Err("is empty: give a node's name".to_owned()),
        1..=253 => Ok(()),
        length => Err(format!("has {length} bytes, and at most 253 are allowed")),
    });
    if *percent > 100 {
        faults.add("nodes.percent", format!("is {percent}: give 1 to 100"));
    }
}

fn condition(condition: &Condition, field: &str, faults: &mut Faults<'_>) {
    let Some(kind) = &condition.kind else {
        faults.add(field, "has no condition: give pressure, cpu_usage, throttled, exec or schedule");
        return;
    };
    match kind {
        condition::Kind::Pressure(pressure) => check_pressure(pressure, &format!("{field}.pressure"), faults),
        condition::Kind::CpuUsage(condition::CpuUsage { above_millicores, r#for }) => {
            if !(1..=10_000_000).contains(above_millicores) {
                faults.add(
                    format!("{field}.cpu_usage.above_millicores"),
                    format!("is {above_millicores}: give 1 to 10000000 (1000 is one CPU)"),
                );
            }
            faults.required(&format!("{field}.cpu_usage.for"), *r#for, SECOND, HOUR);
        }
        condition::Kind::Throttled(condition::Throttled { above_percent, r#for }) => {
            if !(1..=99).contains(above_percent) {
                faults.add(
                    format!("{field}.throttled.above_percent"),
                    format!("is {above_percent}: give 1 to 99, the percentage of periods in which the container is throttled"),
                );
            }
            faults.required(&format!("{field}.throttled.for"), *r#for, SECOND, HOUR);
        }
        condition::Kind::Exec(condition::Exec {}) => {}
        condition::Kind::Schedule(condition::Schedule { every, r#for }) => {
            let every = faults.required(&format!("{field}.schedule.every"), *every, SECOND * 10, DAY * 7);
            let name = format!("{field}.schedule.for");
            let lasting = faults.required(&name, *r#for, SECOND, HOUR);
            if let (Some(every), Some(lasting)) = (every, lasting)
                && lasting >= every
            {
                let (every, lasting) = (show_duration(every), show_duration(lasting));
                faults.add(
                    &name,
                    format!("is {lasting}, and the next capture starts after {every}: make it shorter"),
                );
            }
        }
    }
}

fn check_pressure(pressure: &condition::Pressure, field: &str, faults: &mut Faults<'_>) {
    use condition::pressure::{Kind, Resource, Scope};

    if pressure.resource() == Resource::Unspecified {
        faults.add(format!("{field}.resource"), "is missing: give cpu, memory or io");
    }
    if pressure.kind() == Kind::Unspecified {
        faults.add(
            format!("{field}.kind"),
            "is missing: give some (at least one task waits) or full (all tasks wait)",
        );
    }
    if pressure.scope() == Scope::Unspecified {
        faults.add(format!("{field}.scope"), "is missing: give container, pod or node");
    }
    if (pressure.resource(), pressure.kind(), pressure.scope()) == (Resource::Cpu, Kind::Full, Scope::Node) {
        faults.add(format!("{field}.kind"), "is never met: some task of a node always runs; give some");
    }
    let condition::Pressure { stall_us, window_us, .. } = *pressure;
    let (min, max) = (PRESSURE_WINDOW_US.start(), PRESSURE_WINDOW_US.end());
    if !PRESSURE_WINDOW_US.contains(&window_us) {
        faults.add(format!("{field}.window_us"), format!("is {window_us}: give {min} to {max}"));
    }
    if stall_us == 0 || stall_us >= window_us {
        faults.add(
            format!("{field}.stall_us"),
            format!("is {stall_us}: give at least 1, and less than the window ({window_us})"),
        );
    }
}

fn captures(capture: &Capture, triggered: bool, caps: &Caps, faults: &mut Faults<'_>) {
    let Capture {
        kind,
        hz,
        duration,
        cooldown,
        lead_up,
        max_concurrent,
        user_stacks,
        kernel_stacks,
        only_in_span: _,
    } = capture;
    let mut seen = HashSet::new();
    for (number, kind) in kind.iter().enumerate() {
        let field = format!("capture.kind[{number}]");
        match capture::Kind::try_from(*kind) {
            Ok(capture::Kind::OnCpu | capture::Kind::OffCpu) if seen.insert(*kind) => {}
            Ok(capture::Kind::OnCpu | capture::Kind::OffCpu) => {
                faults.add(field, "is a duplicate: remove it");
            }
            Ok(capture::Kind::Unspecified) | Err(_) => {
                faults.add(field, "is unknown: give on_cpu or off_cpu");
            }
        }
    }
    if *hz > caps.max_hz {
        faults.add(
            "capture.hz",
            format!("is {hz}, and the limit (max_hz) is {}: give 1 to {}", caps.max_hz, caps.max_hz),
        );
    }
    let longest = SignedDuration::try_from(caps.max_duration).unwrap_or(DAY);
    faults.duration("capture.duration", *duration, SECOND, longest);
    faults.duration("capture.cooldown", *cooldown, SECOND, DAY);
    faults.duration("capture.lead_up", *lead_up, SECOND, SignedDuration::from_mins(5));
    if !triggered {
        let given = [("duration", duration), ("cooldown", cooldown), ("lead_up", lead_up)];
        for (name, _) in given.into_iter().filter(|(_, value)| value.is_some()) {
            faults.add(
                format!("capture.{name}"),
                "has no effect without `when`, because the capture runs all the time: remove it, or limit the rule with \
                 lifetime.ttl",
            );
        }
    }
    if *max_concurrent > caps.max_concurrent {
        let cap = caps.max_concurrent;
        faults.add(
            "capture.max_concurrent",
            format!("is {max_concurrent}, and the limit is {cap}: give 1 to {cap}"),
        );
    }
    if (*user_stacks, *kernel_stacks) == (Some(false), Some(false)) {
        faults.add("capture.stacks", "leaves nothing to record: set user or kernel to true");
    }
}
