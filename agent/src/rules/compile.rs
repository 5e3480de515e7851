//! Turns rules into the form that decides about processes.
//!
//! The same semantics exist three times: as tries and sets for the BPF programs ([`kernel_rules`]), as patterns for one
//! process ([`Compiled::matches`]), and as text for people ([`Compiled::mismatch`]). Property tests compare the first two.

use std::collections::BTreeSet;

use gannet_proto::{
    control::{Match, Rule, capture},
    rules::{Pattern, effective_hz, effective_kinds, is_version},
};

use crate::{
    kernel::{Exact, KernelRules, MAX_CGROUP_PATH, MAX_RULES, NamePattern, Want},
    process::{Process, is_dynamic_linker},
};

/// The last slots are no rules. They mark processes that must never be sampled: by command, control group, user, container.
pub(super) const DENY_SLOTS: usize = 4;

/// The properties of a process that a rule is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProcessTraits<'a> {
    /// Command name of the main thread.
    pub(crate) comm: &'a str,
    /// Path of the executable as the process sees it.
    pub(crate) exe: &'a str,
    /// Path of the control group below the hierarchy's root.
    pub(crate) cgroup: &'a str,
    /// Effective user id; none while unknown.
    pub(crate) uid: Option<u32>,
    /// Thread group id.
    pub(crate) tgid: u32,
    /// Name of its language runtime; empty without one, and while unknown.
    pub(crate) runtime: &'a str,
    /// Version of the runtime, as `3.11.2`; empty without a runtime.
    pub(crate) runtime_version: &'a str,
    /// The name of its service, as it gives it; empty if it gives none, and while unknown.
    pub(crate) service: &'a str,
}

impl<'a> ProcessTraits<'a> {
    pub(crate) fn of(process: &'a Process) -> Self {
        let (runtime, runtime_version) = process.runtime().map_or(("", ""), |file| file.names());
        Self {
            comm: &process.comm,
            exe: &process.exe,
            cgroup: &process.cgroup,
            uid: process.uid,
            tgid: process.key.process.tgid,
            runtime,
            runtime_version,
            service: process.service.name().unwrap_or_default(),
        }
    }
}

/// A rule's match with its patterns parsed.
#[derive(Clone, Debug, Default)]
pub(super) struct Compiled {
    comm: Vec<Pattern>,
    exe: Vec<Pattern>,
    cgroup: Vec<Pattern>,
    pids: Vec<u32>,
    uid: Vec<u32>,
    runtime: Vec<String>,
    runtime_version: Vec<String>,
    service: Vec<Pattern>,
    /// The rule selects containers by pod metadata.
    pub(super) pods: bool,
    /// A rule that names pids alone applies from the next `execve` of those processes on.
    from_exec: bool,
}

/// The request of one slot to the BPF programs.
pub(super) struct SlotRequest<'a> {
    pub(super) slot: usize,
    pub(super) compiled: &'a Compiled,
    /// Nanoseconds between two ticks; 0 for none.
    pub(super) period_ns: u64,
    pub(super) off_cpu: bool,
    pub(super) user_stacks: bool,
    pub(super) kernel_stacks: bool,
    /// Only while the thread works in a span.
    pub(super) in_span: bool,
    /// Only for processes that match at `execve`, not for those that already run.
    pub(super) at_exec: bool,
    /// Only in these containers, by the id of their control group; none: everywhere.
    pub(super) containers: Option<&'a BTreeSet<u64>>,
    /// The slot may include processes that the BPF programs have no entry for yet.
    pub(super) unknown_too: bool,
}

/// Processes that are never sampled on this node, whatever rules ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deny {
    /// Patterns of command names.
    pub comm: Vec<Pattern>,
    /// Patterns of control group paths.
    pub cgroup: Vec<Pattern>,
    /// Effective user ids.
    pub uid: Vec<u32>,
    /// Containers, by the id of their control group.
    pub containers: BTreeSet<u64>,
}

impl Compiled {
    pub(super) fn of(rule: &Rule) -> Self {
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
        } = rule.r#match.clone().unwrap_or_default();
        // Validation has refused patterns that do not parse, so leaving them out is safe.
        let patterns = |texts: &[String]| texts.iter().filter_map(|text| Pattern::parse(text).ok()).collect();
        Self {
            comm: patterns(&comm),
            exe: patterns(&exe),
            cgroup: patterns(&cgroup),
            pods: !(namespaces.is_empty()
                && pod_labels.is_empty()
                && containers.is_empty()
                && workloads.is_empty()),
            pids,
            uid,
            runtime,
            runtime_version,
            service: patterns(&service),
            from_exec: false,
        }
    }

    /// Sets [`super::SourceRules::from_exec`] of the rule's set.
    pub(super) fn with_from_exec(self, from_exec: bool) -> Self {
        Self { from_exec, ..self }
    }

    /// Whether the agent must decide, because the BPF programs cannot see or compare a property.
    fn by_agent(&self) -> bool {
        !self.exe.is_empty()
            || self.compares_runtime()
            || self.compares_service()
            || self.cgroup.iter().any(|path| path.text().len() > MAX_CGROUP_PATH)
    }

    /// Whether the rule compares the language runtime, which the agent finds in the files of a process.
    pub(super) fn compares_runtime(&self) -> bool {
        // Validation demands a runtime beside a version.
        !self.runtime.is_empty() || !self.runtime_version.is_empty()
    }

    /// Whether the rule compares the service that a process gives, which the agent reads from it.
    pub(super) fn compares_service(&self) -> bool {
        !self.service.is_empty()
    }

    fn is_runtime(&self, traits: &ProcessTraits<'_>) -> bool {
        self.runtime.is_empty() || self.runtime.iter().any(|name| name == traits.runtime)
    }

    fn is_runtime_version(&self, traits: &ProcessTraits<'_>) -> bool {
        self.runtime_version.is_empty()
            || self.runtime_version.iter().any(|wanted| is_version(wanted, traits.runtime_version))
    }

    /// Whether all properties match, except containers, which only the ids of control groups decide.
    pub(super) fn matches(&self, traits: &ProcessTraits<'_>) -> bool {
        let any = |patterns: &[Pattern], text: &str| {
            patterns.is_empty() || patterns.iter().any(|pattern| pattern.matches(text.as_bytes()))
        };
        any(&self.comm, traits.comm)
            && any(&self.exe, traits.exe)
            && any(&self.cgroup, traits.cgroup)
            && (self.pids.is_empty() || self.pids.contains(&traits.tgid))
            && (self.uid.is_empty() || traits.uid.is_some_and(|uid| self.uid.contains(&uid)))
            && self.is_runtime(traits)
            && self.is_runtime_version(traits)
            && any(&self.service, traits.service)
    }

    /// Returns the first property that does not match, human-readable.
    pub(super) fn mismatch(&self, traits: &ProcessTraits<'_>) -> Option<String> {
        let none = |patterns: &[Pattern], text: &str| {
            !patterns.is_empty() && !patterns.iter().any(|pattern| pattern.matches(text.as_bytes()))
        };
        if none(&self.comm, traits.comm) {
            return Some(format!("its command name is `{}`{}", traits.comm, started_by(traits.exe)));
        }
        if none(&self.exe, traits.exe) {
            return Some(format!("its executable is `{}`{}", traits.exe, started_by(traits.exe)));
        }
        if none(&self.cgroup, traits.cgroup) {
            return Some(format!("its control group is `{}`", traits.cgroup));
        }
        if !self.pids.is_empty() && !self.pids.contains(&traits.tgid) {
            return Some(format!("its pid is {}", traits.tgid));
        }
        if !self.uid.is_empty() && !traits.uid.is_some_and(|uid| self.uid.contains(&uid)) {
            return Some(match traits.uid {
                Some(uid) => format!("its user id is {uid}"),
                None => "its user id is not known".into(),
            });
        }
        if !self.is_runtime(traits) {
            return Some(match traits.runtime {
                "" => "it runs no language runtime that the agent has found".into(),
                name => format!("its language runtime is {name}"),
            });
        }
        if !self.is_runtime_version(traits) {
            return Some(format!("it runs {} {}", traits.runtime, traits.runtime_version));
        }
        if none(&self.service, traits.service) {
            return Some(match traits.service {
                "" => "it gives no service name that the agent has read".into(),
                name => format!("its service is `{name}`"),
            });
        }
        None
    }

    /// The rule names pids and nothing else. It then also covers what those processes execute, and their children.
    fn is_sticky(&self) -> bool {
        !self.pids.is_empty()
            && self.comm.is_empty()
            && self.exe.is_empty()
            && self.cgroup.is_empty()
            && self.uid.is_empty()
            && !self.compares_runtime()
            && !self.compares_service()
            && !self.pods
    }

    /// Whether the rule matches every process.
    fn is_for_all(&self) -> bool {
        let every = |patterns: &[Pattern]| {
            patterns.iter().any(|pattern| pattern.is_prefix() && pattern.text().is_empty())
        };
        every(&self.comm)
            && self.exe.is_empty()
            && self.cgroup.is_empty()
            && self.pids.is_empty()
            && self.uid.is_empty()
            && !self.compares_runtime()
            && !self.compares_service()
            && !self.pods
    }
}

/// Returns what an explanation adds about an executable that runs other programs.
pub(crate) fn started_by(exe: &str) -> &'static str {
    if is_dynamic_linker(exe) {
        " (a dynamic linker runs the program: match by cgroup, pod or pid instead)"
    } else {
        ""
    }
}

/// Nanoseconds between two ticks of a rule's captures; 0 for no ticks.
pub(super) fn period_ns(rule: &Rule) -> u64 {
    if effective_kinds(rule).contains(&capture::Kind::OnCpu) {
        1_000_000_000 / u64::from(effective_hz(rule).max(1))
    } else {
        0
    }
}

/// Whether a rule's captures measure off-CPU time.
pub(super) fn off_cpu(rule: &Rule) -> bool {
    effective_kinds(rule).contains(&capture::Kind::OffCpu)
}

/// Builds what the BPF programs decide by, from all live slots and the deny list.
pub(super) fn kernel_rules<'a>(requests: impl Iterator<Item = SlotRequest<'a>>, deny: &Deny) -> KernelRules {
    let mut builder = Builder {
        rules: KernelRules { user_stacks: false, kernel_stacks: false, ..KernelRules::default() },
        comms: Vec::new(),
        cgroups: Vec::new(),
        exact: Vec::new(),
    };
    let nothing_denied = *deny == Deny::default();
    // A process that has no entry in the kernel's table looks the same as one that is denied.
    let is_for_all = |request: &SlotRequest<'_>| {
        // The agent reads a process before it is sampled in spans, so the programs have to report it.
        let may_be_unknown = nothing_denied && request.unknown_too && !request.in_span;
        may_be_unknown && request.containers.is_none() && request.compiled.is_for_all()
    };
    for request in requests {
        builder.add_slot(&request, is_for_all(&request));
    }
    builder.add_deny(deny);
    builder.finish()
}

/// Collects patterns and ids with the bits of the slots that they belong to.
struct Builder<'a> {
    rules: KernelRules,
    comms: Vec<(&'a Pattern, u64)>,
    cgroups: Vec<(&'a Pattern, u64)>,
    exact: Vec<(Exact, u64)>,
}

impl<'a> Builder<'a> {
    fn add_slot(&mut self, request: &SlotRequest<'a>, is_for_all: bool) {
        let SlotRequest {
            slot,
            compiled,
            period_ns,
            off_cpu,
            user_stacks,
            kernel_stacks,
            in_span,
            at_exec,
            containers,
            unknown_too: _,
        } = *request;
        let bit = 1_u64 << slot;
        self.rules.periods_ns[slot] = period_ns;
        self.rules.off_cpu |= u64::from(off_cpu) << slot;
        self.rules.in_span |= u64::from(in_span) << slot;
        self.rules.user_stacks |= user_stacks;
        self.rules.kernel_stacks |= kernel_stacks;
        if is_for_all {
            add(&mut self.rules.all, Want { rules: bit, period_ns });
            return;
        }
        let masks = &mut self.rules.masks;
        masks.rules |= bit;
        masks.any_comm |= if compiled.comm.is_empty() { bit } else { 0 };
        masks.any_uid |= if compiled.uid.is_empty() { bit } else { 0 };
        masks.any_pid |= if compiled.pids.is_empty() { bit } else { 0 };
        masks.any_container |= if containers.is_none() { bit } else { 0 };
        masks.by_agent |= if compiled.by_agent() { bit } else { 0 };
        masks.sticky |= if compiled.is_sticky() && !at_exec { bit } else { 0 };
        masks.at_exec |= if at_exec || (compiled.from_exec && compiled.is_sticky()) { bit } else { 0 };
        self.comms.extend(compiled.comm.iter().map(|pattern| (pattern, bit)));
        if compiled.cgroup.iter().any(|path| path.text().len() > MAX_CGROUP_PATH) {
            // The agent compares all of them.
            masks.any_cgroup |= bit;
        } else {
            masks.any_cgroup |= if compiled.cgroup.is_empty() { bit } else { 0 };
            self.cgroups.extend(compiled.cgroup.iter().map(|pattern| (pattern, bit)));
        }
        self.exact.extend(compiled.pids.iter().map(|pid| (Exact::Pid(*pid), bit)));
        self.exact.extend(compiled.uid.iter().map(|uid| (Exact::Uid(*uid), bit)));
        self.exact.extend(containers.into_iter().flatten().map(|id| (Exact::Container(*id), bit)));
    }

    /// Any single property denies a process, so each property gets a slot of its own that asks for nothing else.
    fn add_deny(&mut self, deny: &'a Deny) {
        let [by_comm, by_cgroup, by_uid, by_container] =
            [0, 1, 2, 3].map(|offset| 1_u64 << (MAX_RULES - DENY_SLOTS + offset));
        self.comms.extend(deny.comm.iter().map(|pattern| (pattern, by_comm)));
        self.cgroups.extend(deny.cgroup.iter().map(|pattern| (pattern, by_cgroup)));
        self.exact.extend(deny.uid.iter().map(|uid| (Exact::Uid(*uid), by_uid)));
        self.exact.extend(deny.containers.iter().map(|id| (Exact::Container(*id), by_container)));
        let given = [
            (by_comm, deny.comm.is_empty()),
            (by_cgroup, deny.cgroup.is_empty()),
            (by_uid, deny.uid.is_empty()),
            (by_container, deny.containers.is_empty()),
        ];
        let masks = &mut self.rules.masks;
        for (bit, _) in given.into_iter().filter(|(_, empty)| !empty) {
            masks.rules |= bit;
            masks.deny |= bit;
            masks.any_pid |= bit;
            masks.any_comm |= if bit == by_comm { 0 } else { bit };
            masks.any_cgroup |= if bit == by_cgroup { 0 } else { bit };
            masks.any_uid |= if bit == by_uid { 0 } else { bit };
            masks.any_container |= if bit == by_container { 0 } else { bit };
        }
    }

    fn finish(mut self) -> KernelRules {
        self.rules.comms = names(&self.comms);
        self.rules.cgroups = names(&self.cgroups);
        for (property, bits) in self.exact {
            match self.rules.exact.iter_mut().find(|(known, _)| *known == property) {
                Some((_, sum)) => *sum |= bits,
                None => self.rules.exact.push((property, bits)),
            }
        }
        self.rules
    }
}

/// Builds the keys of a trie. A lookup finds only the longest key, so each key also carries the bits of all shorter keys
/// that match it.
fn names(patterns: &[(&Pattern, u64)]) -> Vec<(NamePattern, u64)> {
    let mut names: Vec<(NamePattern, u64)> = Vec::new();
    for (pattern, _) in patterns {
        let key = NamePattern { text: pattern.text().to_owned(), prefix: pattern.is_prefix() };
        if names.iter().any(|(known, _)| *known == key) {
            continue;
        }
        let covers = |other: &Pattern| {
            if other.is_prefix() {
                key.text.starts_with(other.text())
            } else {
                !key.prefix && key.text == other.text()
            }
        };
        let sum = patterns.iter().filter(|(other, _)| covers(other)).fold(0, |sum, (_, bits)| sum | bits);
        names.push((key, sum));
    }
    names
}

/// Adds the request of another rule: the result has both rules and the shorter period.
pub(super) fn add(sum: &mut Want, more: Want) {
    sum.rules |= more.rules;
    if more.period_ns != 0 && (sum.period_ns == 0 || more.period_ns < sum.period_ns) {
        sum.period_ns = more.period_ns;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Does what the kernel's trie does: returns the value of the longest key that the name begins with, NUL included.
    fn trie(keys: &[(NamePattern, u64)], name: &str) -> u64 {
        let name = format!("{name}\0");
        let text = |key: &NamePattern| if key.prefix { key.text.clone() } else { format!("{}\0", key.text) };
        keys.iter()
            .filter(|(key, _)| name.starts_with(&text(key)))
            .max_by_key(|(key, _)| text(key).len())
            .map_or(0, |(_, bits)| *bits)
    }

    proptest! {
        /// Checks that one trie lookup returns the slots of all patterns that match a name (R17).
        #[test]
        fn a_trie_of_names_finds_what_each_pattern_would(
            patterns in prop::collection::vec("[ab/]{0,4}\\*?", 1..12),
            name in "[ab/]{1,6}",
        ) {
            let patterns: Vec<Pattern> =
                patterns.iter().filter_map(|text| Pattern::parse(text).ok()).collect();
            let rules: Vec<(&Pattern, u64)> =
                patterns.iter().enumerate().map(|(slot, pattern)| (pattern, 1 << slot)).collect();
            let oracle = rules
                .iter()
                .filter(|(pattern, _)| pattern.matches(name.as_bytes()))
                .fold(0, |sum, (_, bit)| sum | bit);
            prop_assert_eq!(trie(&names(&rules), &name), oracle);
        }

        /// Checks that the BPF programs, with the agent's help where they ask for it, sample what the rules say.
        #[test]
        fn the_kernel_decides_as_the_rules_say(
            matches in prop::collection::vec((some_match(), prop::option::of(containers())), 1..6),
            deny in some_deny(),
            process in (name(), name(), name(), prop::option::of(0_u32..3), 0_u32..4, containers()),
            (runtime, runtime_version) in prop::sample::select(vec![("", ""), ("a", "1.2"), ("b", "1.2.3")]),
        ) {
            let (comm, exe, cgroup, uid, tgid, inside) = process;
            let traits =
                ProcessTraits { comm: &comm, exe: &exe, cgroup: &cgroup, uid, tgid, runtime, runtime_version, service: "" };
            let compiled: Vec<Compiled> = matches.iter().map(|(given, _)| compile(given)).collect();
            let requests = compiled.iter().zip(&matches).enumerate().map(|(slot, (compiled, (_, containers)))| {
                SlotRequest { containers: containers.as_ref(), ..request(slot, compiled) }
            });
            let rules = kernel_rules(requests, &deny);
            let denied = deny.comm.iter().any(|pattern| pattern.matches(comm.as_bytes()))
                || deny.cgroup.iter().any(|pattern| pattern.matches(cgroup.as_bytes()))
                || uid.is_some_and(|uid| deny.uid.contains(&uid))
                || !deny.containers.is_disjoint(&inside);
            prop_assert_eq!(rules.masks.deny & decide(&rules, &traits, &inside) != 0, denied);
            for (slot, (given, containers)) in matches.iter().enumerate() {
                let says = compiled[slot].matches(&traits);
                prop_assert_eq!(says, is_match(given, &traits), "{:?}", given);
                prop_assert_eq!(compiled[slot].mismatch(&traits).is_none(), says);
                let by_kernel = decide(&rules, &traits, &inside) & 1 << slot != 0;
                let by_agent = rules.masks.by_agent & 1 << slot != 0;
                let sampled = by_kernel && (!by_agent || says);
                let wanted = says && containers.as_ref().is_none_or(|of| !of.is_disjoint(&inside));
                prop_assert_eq!(sampled || rules.all.rules & 1 << slot != 0, wanted, "slot {}: {:?}", slot, given);
            }
        }
    }

    /// Compares a process with a rule as the documents say, without the compiled form.
    fn is_match(given: &Match, traits: &ProcessTraits<'_>) -> bool {
        let one = |texts: &[String], name: &str| {
            texts.is_empty()
                || texts.iter().any(|text| match text.strip_suffix('*') {
                    Some(begin) => name.starts_with(begin),
                    None => name == text,
                })
        };
        one(&given.comm, traits.comm)
            && one(&given.exe, traits.exe)
            && one(&given.cgroup, traits.cgroup)
            && (given.pids.is_empty() || given.pids.contains(&traits.tgid))
            && (given.uid.is_empty() || traits.uid.is_some_and(|uid| given.uid.contains(&uid)))
            && (given.runtime.is_empty() || given.runtime.contains(&traits.runtime.to_owned()))
            && (given.runtime_version.is_empty()
                || given
                    .runtime_version
                    .iter()
                    .any(|wanted| format!("{}.", traits.runtime_version).starts_with(&format!("{wanted}."))))
    }

    /// Does what the BPF programs do: returns the slots whose properties all match, those of the deny list included.
    fn decide(rules: &KernelRules, traits: &ProcessTraits<'_>, inside: &BTreeSet<u64>) -> u64 {
        let exact = |is: &dyn Fn(&Exact) -> bool| {
            rules.exact.iter().filter(|(property, _)| is(property)).fold(0, |sum, (_, bits)| sum | bits)
        };
        let masks = &rules.masks;
        masks.rules
            & (masks.any_comm | trie(&rules.comms, traits.comm))
            & (masks.any_cgroup | trie(&rules.cgroups, traits.cgroup))
            & (masks.any_pid | exact(&|property| *property == Exact::Pid(traits.tgid)))
            & (masks.any_uid | exact(&|property| traits.uid.is_some_and(|uid| *property == Exact::Uid(uid))))
            & (masks.any_container
                | exact(&|property| matches!(property, Exact::Container(id) if inside.contains(id))))
    }

    fn name() -> impl Strategy<Value = String> {
        "[ab]{1,3}"
    }

    fn patterns() -> impl Strategy<Value = Vec<String>> {
        prop_oneof![Just(Vec::new()), prop::collection::vec("[ab]{1,3}|[ab]{0,2}\\*", 1..3)]
    }

    fn numbers() -> impl Strategy<Value = Vec<u32>> {
        prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(0_u32..4, 1..3)]
    }

    fn containers() -> impl Strategy<Value = BTreeSet<u64>> {
        prop::collection::btree_set(0_u64..4, 0..3)
    }

    fn some_match() -> impl Strategy<Value = Match> {
        // Control groups that the kernel's keys cannot hold.
        let long = Just(vec!["a".repeat(MAX_CGROUP_PATH + 1), "b*".into()]);
        let cgroups = prop_oneof![4 => patterns(), 1 => long];
        let some = |texts: &[&str]| vec![Vec::new(), texts.iter().map(|&text| text.to_owned()).collect()];
        let runtimes = prop::sample::select([some(&["a"]), some(&["b", "c"])].concat());
        let versions = prop::sample::select([some(&["1"]), some(&["1.2.3", "2"]), some(&["1.1"])].concat());
        (patterns(), patterns(), cgroups, numbers(), numbers(), runtimes, versions).prop_map(
            |(comm, exe, cgroup, pids, uid, runtime, runtime_version)| Match {
                comm,
                exe,
                cgroup,
                pids,
                uid,
                runtime,
                runtime_version,
                ..Match::default()
            },
        )
    }

    fn some_deny() -> impl Strategy<Value = Deny> {
        let parse = |texts: Vec<String>| texts.iter().map(|text| Pattern::parse(text).unwrap()).collect();
        let given = (patterns(), patterns(), numbers(), containers()).prop_map(
            move |(comm, cgroup, uid, containers)| Deny {
                comm: parse(comm),
                cgroup: parse(cgroup),
                uid,
                containers,
            },
        );
        prop_oneof![Just(Deny::default()), given]
    }

    fn compile(given: &Match) -> Compiled {
        Compiled::of(&Rule { r#match: Some(given.clone()), ..Rule::default() })
    }

    fn request(slot: usize, compiled: &Compiled) -> SlotRequest<'_> {
        SlotRequest {
            slot,
            compiled,
            period_ns: 0,
            off_cpu: false,
            user_stacks: false,
            kernel_stacks: false,
            in_span: false,
            at_exec: false,
            containers: None,
            unknown_too: true,
        }
    }

    /// Builds the kernel's rules for one rule.
    fn alone(given: &Match, change: impl FnOnce(SlotRequest<'_>) -> SlotRequest<'_>) -> KernelRules {
        let compiled = compile(given);
        kernel_rules([change(request(3, &compiled))].into_iter(), &Deny::default())
    }

    fn pids(pids: &[u32]) -> Match {
        Match { pids: pids.to_vec(), ..Match::default() }
    }

    #[test]
    fn a_rule_of_pids_alone_covers_what_they_execute() {
        assert_eq!(alone(&pids(&[7]), |request| request).masks.sticky, 1 << 3);
        let at_exec = alone(&pids(&[7]), |request| SlotRequest { at_exec: true, ..request }).masks;
        assert_eq!((at_exec.sticky, at_exec.at_exec), (0, 1 << 3));
        let text = || vec!["a".to_owned()];
        for other in [
            Match::default(),
            Match { comm: text(), ..pids(&[7]) },
            Match { exe: text(), ..pids(&[7]) },
            Match { cgroup: text(), ..pids(&[7]) },
            Match { uid: vec![1], ..pids(&[7]) },
            Match { runtime: text(), ..pids(&[7]) },
            Match { service: text(), ..pids(&[7]) },
            Match { namespaces: text(), ..pids(&[7]) },
            Match { pod_labels: "a=b".into(), ..pids(&[7]) },
            Match { containers: text(), ..pids(&[7]) },
            Match { workloads: text(), ..pids(&[7]) },
        ] {
            let masks = alone(&other, |request| request).masks;
            assert_eq!((masks.sticky, masks.at_exec), (0, 0), "{other:?}");
        }
    }

    #[test]
    fn rules_of_pids_may_begin_at_the_next_exec() {
        for (given, from_exec, at_exec) in
            [(pids(&[7]), true, 1), (pids(&[7]), false, 0), (Match { uid: vec![1], ..pids(&[7]) }, true, 0)]
        {
            let compiled = compile(&given).with_from_exec(from_exec);
            let rules = kernel_rules([request(0, &compiled)].into_iter(), &Deny::default());
            assert_eq!(rules.masks.at_exec, at_exec, "{given:?}");
        }
    }

    #[test]
    fn a_rule_for_every_process_needs_no_comparison() {
        let all = Match { comm: vec!["*".into()], ..Match::default() };
        let is_for_all = |rules: &KernelRules| (rules.all.rules, rules.masks.rules);
        let rules = alone(&all, |request| SlotRequest { period_ns: 10, ..request });
        assert_eq!((is_for_all(&rules), rules.all.period_ns), ((8, 0), 10));
        assert_eq!(is_for_all(&alone(&all, |request| SlotRequest { unknown_too: false, ..request })), (0, 8));
        let compiled = compile(&all);
        let none = BTreeSet::new();
        let limited = SlotRequest { containers: Some(&none), ..request(3, &compiled) };
        assert_eq!(is_for_all(&kernel_rules([limited].into_iter(), &Deny::default())), (0, 8));
        let deny = Deny { uid: vec![7], ..Deny::default() };
        let rules = kernel_rules([request(3, &compiled)].into_iter(), &deny);
        assert_eq!(is_for_all(&rules), (0, 8 | rules.masks.deny));
        let text = || vec!["*".to_owned()];
        for other in [
            Match::default(),
            Match { comm: vec!["a*".into()], ..Match::default() },
            Match { exe: text(), ..all.clone() },
            Match { cgroup: text(), ..all.clone() },
            Match { uid: vec![1], ..all.clone() },
            Match { runtime: text(), ..all.clone() },
            Match { service: text(), ..all.clone() },
            Match { pids: vec![1], ..all.clone() },
            Match { namespaces: text(), ..all.clone() },
        ] {
            assert_eq!(is_for_all(&alone(&other, |request| request)), (0, 8), "{other:?}");
        }
    }

    #[test]
    fn the_agent_decides_only_what_the_kernel_cannot() {
        let of = |path_bytes: usize, exe: &[&str]| {
            let cgroup = vec!["a".repeat(path_bytes), "b".into()];
            let exe = exe.iter().map(|&path| path.to_owned()).collect();
            let rules = alone(&Match { cgroup, exe, ..Match::default() }, |request| request);
            (rules.masks.by_agent, rules.masks.any_cgroup, rules.cgroups.len())
        };
        assert_eq!(of(1, &[]), (0, 0, 2));
        assert_eq!(of(MAX_CGROUP_PATH, &[]), (0, 0, 2));
        assert_eq!(of(MAX_CGROUP_PATH + 1, &[]), (8, 8, 0));
        assert_eq!(of(1, &["/a"]), (8, 0, 2));
        let python = Match { runtime: vec!["python".into()], ..Match::default() };
        assert_eq!(alone(&python, |request| request).masks.by_agent, 8);
    }

    #[test]
    fn the_last_slots_deny() {
        let text = || vec![Pattern::parse("a").unwrap()];
        for (offset, deny) in [
            Deny { comm: text(), ..Deny::default() },
            Deny { cgroup: text(), ..Deny::default() },
            Deny { uid: vec![1], ..Deny::default() },
            Deny { containers: [1].into(), ..Deny::default() },
        ]
        .iter()
        .enumerate()
        {
            let rules = kernel_rules(std::iter::empty(), deny);
            assert_eq!(rules.masks.deny, 1 << (MAX_RULES - DENY_SLOTS + offset));
        }
    }

    #[test]
    fn the_kernel_takes_what_any_rule_asks_for() {
        let compiled = compile(&pids(&[7]));
        let plain = |slot| request(slot, &compiled);
        let rules = kernel_rules(
            [
                SlotRequest { user_stacks: true, period_ns: 5, ..plain(0) },
                SlotRequest { off_cpu: true, ..plain(1) },
                SlotRequest { kernel_stacks: true, ..plain(2) },
                SlotRequest { off_cpu: true, ..plain(4) },
            ]
            .into_iter(),
            &Deny::default(),
        );
        assert_eq!((rules.user_stacks, rules.kernel_stacks, rules.off_cpu), (true, true, 0b1_0010));
        assert_eq!(rules.periods_ns[..5], [5, 0, 0, 0, 0]);
        assert_eq!(rules.exact, [(Exact::Pid(7), 0b1_0111)], "one entry for all rules of a pid");
        let none = alone(&pids(&[7]), |request| request);
        assert_eq!((none.user_stacks, none.kernel_stacks, none.off_cpu), (false, false, 0));
    }

    #[test]
    fn rules_together_have_the_shortest_period() {
        for (first, second, both) in [(0, 0, 0), (0, 7, 7), (7, 0, 7), (7, 9, 7), (9, 7, 7), (7, 7, 7)] {
            let mut sum = Want { rules: 0b011, period_ns: first };
            add(&mut sum, Want { rules: 0b110, period_ns: second });
            assert_eq!(sum, Want { rules: 0b111, period_ns: both });
        }
    }

    #[test]
    fn kinds_and_rate_of_captures_are_those_of_the_rule() {
        let rule = |kinds: &[capture::Kind], hz| Rule {
            capture: Some(gannet_proto::control::Capture {
                kind: kinds.iter().map(|kind| *kind as i32).collect(),
                hz,
                ..Default::default()
            }),
            ..Rule::default()
        };
        let (on, off) = (capture::Kind::OnCpu, capture::Kind::OffCpu);
        for (rule, period, blocked) in [
            (rule(&[on], 100), 10_000_000, false),
            (rule(&[off], 100), 0, true),
            (rule(&[on, off], 50), 20_000_000, true),
        ] {
            assert_eq!((period_ns(&rule), off_cpu(&rule)), (period, blocked));
        }
    }

    #[test]
    fn the_first_property_that_differs_is_named() {
        let text = || vec!["a".to_owned()];
        let traits = ProcessTraits {
            comm: "c",
            exe: "/e",
            cgroup: "/g",
            uid: Some(5),
            tgid: 9,
            runtime: "python",
            runtime_version: "3.11.2",
            service: "shop-eu",
        };
        let version = |version: &str| vec![version.to_owned()];
        let of = |given: Match, traits: &ProcessTraits<'_>| compile(&given).mismatch(traits);
        for (given, said) in [
            (Match { comm: text(), exe: text(), ..pids(&[1]) }, "its command name is `c`"),
            (Match { exe: text(), cgroup: text(), ..Match::default() }, "its executable is `/e`"),
            (Match { cgroup: text(), ..pids(&[1]) }, "its control group is `/g`"),
            (Match { uid: vec![1], ..pids(&[1]) }, "its pid is 9"),
            (Match { uid: vec![1], ..Match::default() }, "its user id is 5"),
            (Match { runtime: text(), ..Match::default() }, "its language runtime is python"),
            (Match { service: text(), ..Match::default() }, "its service is `shop-eu`"),
            (Match { runtime_version: version("3.1"), ..Match::default() }, "it runs python 3.11.2"),
        ] {
            assert_eq!(of(given, &traits).as_deref(), Some(said));
        }
        let unknown = ProcessTraits { uid: None, ..traits };
        let said = of(Match { uid: vec![1], ..Match::default() }, &unknown);
        assert_eq!(said.as_deref(), Some("its user id is not known"));
        let nameless = ProcessTraits { service: "", ..traits };
        let of_shop = || Match { service: vec!["shop*".into()], ..Match::default() };
        assert_eq!((of(of_shop(), &traits), of(of_shop(), &nameless).is_some()), (None, true));
        let native = ProcessTraits { runtime: "", runtime_version: "", ..traits };
        let said = of(Match { runtime: version("python"), ..Match::default() }, &native);
        assert_eq!(said.as_deref(), Some("it runs no language runtime that the agent has found"));
        let python =
            Match { runtime: version("python"), runtime_version: version("3.11"), ..Match::default() };
        assert_eq!(of(python, &traits), None);
        assert_eq!(of(Match { comm: vec!["c*".into()], uid: vec![5, 6], ..pids(&[9]) }, &traits), None);
    }
}
