//! From rules to what decides.
//!
//! The same semantics three times: as tries and sets of the kernel side ([`kernel_rules`]), as patterns for one process
//! ([`Compiled::matches`]), and as words for people. Property tests hold the first two against each other.

use std::collections::BTreeSet;

use gannet_proto::{
    control::{Match, Rule, capture},
    rules::{Pattern, effective_hz, effective_kinds},
};

use crate::kernel::{Exact, KernelRules, MAX_CGROUP_PATH, NamePattern, Want};

/// Bits that are no rules but what must never be sampled: by command, control group, user, container.
pub(super) const DENY_SLOTS: usize = 4;

/// What a match is decided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits<'a> {
    /// Command name.
    pub comm: &'a str,
    /// Path of the executable as the process sees it.
    pub exe: &'a str,
    /// Path of the control group below the hierarchy's root.
    pub cgroup: &'a str,
    /// Effective user id; none while unknown.
    pub uid: Option<u32>,
    /// Thread group id.
    pub tgid: u32,
}

/// A rule's match in the form that decides.
#[derive(Clone, Debug, Default)]
pub(super) struct Compiled {
    comm: Vec<Pattern>,
    exe: Vec<Pattern>,
    cgroup: Vec<Pattern>,
    pids: Vec<u32>,
    uid: Vec<u32>,
    /// It names containers by what is known of their pods.
    pub(super) pods: bool,
    /// What it names by number is meant from its next `execve` on.
    from_exec: bool,
}

/// What one slot asks of the kernel side.
pub(super) struct Asked<'a> {
    pub(super) slot: usize,
    pub(super) compiled: &'a Compiled,
    /// Nanoseconds between two ticks; 0 for none.
    pub(super) period_ns: u64,
    pub(super) off_cpu: bool,
    pub(super) user_stacks: bool,
    pub(super) kernel_stacks: bool,
    /// Only for whom it matches at `execve`, not for who runs already.
    pub(super) at_exec: bool,
    /// Only in these containers, by the id of their control group; none: everywhere.
    pub(super) containers: Option<&'a BTreeSet<u64>>,
    /// It may be for processes that the kernel side does not know yet.
    pub(super) everybody: bool,
}

/// What is never sampled on this node, whatever rules ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deny {
    /// Command names.
    pub comm: Vec<Pattern>,
    /// Paths of control groups.
    pub cgroup: Vec<Pattern>,
    /// Effective user ids.
    pub uid: Vec<u32>,
    /// Containers, by the id of their control group.
    pub containers: BTreeSet<u64>,
}

impl Compiled {
    pub(super) fn of(rule: &Rule) -> Self {
        let Match { comm, exe, cgroup, namespaces, pod_labels, containers, workloads, pids, uid } =
            rule.r#match.clone().unwrap_or_default();
        // A pattern that does not parse was refused before; it can only be left out.
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
            from_exec: false,
        }
    }

    /// See [`super::Set::from_exec`].
    pub(super) fn holding(self, from_exec: bool) -> Self {
        Self { from_exec, ..self }
    }

    /// It asks for what the kernel side cannot see, or cannot compare.
    fn by_agent(&self) -> bool {
        !self.exe.is_empty() || self.cgroup.iter().any(|path| path.text().len() > MAX_CGROUP_PATH)
    }

    /// Whether all that it asks for holds, but for containers, which only their ids tell.
    pub(super) fn matches(&self, traits: &Traits<'_>) -> bool {
        let any = |patterns: &[Pattern], text: &str| {
            patterns.is_empty() || patterns.iter().any(|pattern| pattern.matches(text.as_bytes()))
        };
        any(&self.comm, traits.comm)
            && any(&self.exe, traits.exe)
            && any(&self.cgroup, traits.cgroup)
            && (self.pids.is_empty() || self.pids.contains(&traits.tgid))
            && (self.uid.is_empty() || traits.uid.is_some_and(|uid| self.uid.contains(&uid)))
    }

    /// The first property that does not hold, in words.
    pub(super) fn mismatch(&self, traits: &Traits<'_>) -> Option<String> {
        let none = |patterns: &[Pattern], text: &str| {
            !patterns.is_empty() && !patterns.iter().any(|pattern| pattern.matches(text.as_bytes()))
        };
        if none(&self.comm, traits.comm) {
            return Some(format!("its command name is `{}`", traits.comm));
        }
        if none(&self.exe, traits.exe) {
            return Some(format!("its executable is `{}`", traits.exe));
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
        None
    }

    /// It names processes by number and by nothing else: it holds for what they execute, and for their children.
    fn is_sticky(&self) -> bool {
        !self.pids.is_empty()
            && self.comm.is_empty()
            && self.exe.is_empty()
            && self.cgroup.is_empty()
            && self.uid.is_empty()
            && !self.pods
    }

    /// It is for every process.
    fn is_for_all(&self) -> bool {
        let every = |patterns: &[Pattern]| {
            patterns.iter().any(|pattern| pattern.is_prefix() && pattern.text().is_empty())
        };
        every(&self.comm)
            && self.exe.is_empty()
            && self.cgroup.is_empty()
            && self.pids.is_empty()
            && self.uid.is_empty()
            && !self.pods
    }
}

/// Nanoseconds between two ticks that a rule's captures ask for; 0 for none.
pub(super) fn period_ns(rule: &Rule) -> u64 {
    if effective_kinds(rule).contains(&capture::Kind::OnCpu) {
        1_000_000_000 / u64::from(effective_hz(rule).max(1))
    } else {
        0
    }
}

/// Whether a rule's captures ask for blocked time.
pub(super) fn off_cpu(rule: &Rule) -> bool {
    effective_kinds(rule).contains(&capture::Kind::OffCpu)
}

/// All slots in force, as the kernel side needs them.
pub(super) fn kernel_rules<'a>(asked: impl Iterator<Item = Asked<'a>>, deny: &Deny) -> KernelRules {
    let mut rules = KernelRules { user_stacks: false, kernel_stacks: false, ..KernelRules::default() };
    let mut comms: Vec<(&Pattern, u64)> = Vec::new();
    let mut cgroups: Vec<(&Pattern, u64)> = Vec::new();
    let mut exact: Vec<(Exact, u64)> = Vec::new();
    let nobody_denied = *deny == Deny::default();
    for Asked {
        slot,
        compiled,
        period_ns,
        off_cpu,
        user_stacks,
        kernel_stacks,
        at_exec,
        containers,
        everybody,
    } in asked
    {
        let bit = 1_u64 << slot;
        rules.periods_ns[slot] = period_ns;
        rules.off_cpu |= u64::from(off_cpu) << slot;
        rules.user_stacks |= user_stacks;
        rules.kernel_stacks |= kernel_stacks;
        // Who is not in the kernel's table cannot be told apart from who is denied.
        if everybody && nobody_denied && containers.is_none() && compiled.is_for_all() {
            add(&mut rules.all, Want { rules: bit, period_ns });
            continue;
        }
        let masks = &mut rules.masks;
        masks.rules |= bit;
        masks.any_comm |= if compiled.comm.is_empty() { bit } else { 0 };
        masks.any_uid |= if compiled.uid.is_empty() { bit } else { 0 };
        masks.any_pid |= if compiled.pids.is_empty() { bit } else { 0 };
        masks.any_container |= if containers.is_none() { bit } else { 0 };
        masks.by_agent |= if compiled.by_agent() { bit } else { 0 };
        masks.sticky |= if compiled.is_sticky() && !at_exec { bit } else { 0 };
        masks.at_exec |= if at_exec || (compiled.from_exec && compiled.is_sticky()) { bit } else { 0 };
        comms.extend(compiled.comm.iter().map(|pattern| (pattern, bit)));
        if compiled.cgroup.iter().any(|path| path.text().len() > MAX_CGROUP_PATH) {
            // The agent compares all of them.
            masks.any_cgroup |= bit;
        } else {
            masks.any_cgroup |= if compiled.cgroup.is_empty() { bit } else { 0 };
            cgroups.extend(compiled.cgroup.iter().map(|pattern| (pattern, bit)));
        }
        exact.extend(compiled.pids.iter().map(|pid| (Exact::Pid(*pid), bit)));
        exact.extend(compiled.uid.iter().map(|uid| (Exact::Uid(*uid), bit)));
        exact.extend(containers.into_iter().flatten().map(|id| (Exact::Container(*id), bit)));
    }
    // A process is denied by any one of these, so that each is a rule of its own that asks for one property.
    let [by_comm, by_cgroup, by_uid, by_container] =
        [0, 1, 2, 3].map(|place| 1_u64 << (crate::kernel::MAX_RULES - DENY_SLOTS + place));
    comms.extend(deny.comm.iter().map(|pattern| (pattern, by_comm)));
    cgroups.extend(deny.cgroup.iter().map(|pattern| (pattern, by_cgroup)));
    exact.extend(deny.uid.iter().map(|uid| (Exact::Uid(*uid), by_uid)));
    exact.extend(deny.containers.iter().map(|id| (Exact::Container(*id), by_container)));
    let given = [
        (by_comm, deny.comm.is_empty()),
        (by_cgroup, deny.cgroup.is_empty()),
        (by_uid, deny.uid.is_empty()),
        (by_container, deny.containers.is_empty()),
    ];
    let masks = &mut rules.masks;
    for (bit, _) in given.into_iter().filter(|(_, empty)| !empty) {
        masks.rules |= bit;
        masks.deny |= bit;
        masks.any_pid |= bit;
        masks.any_comm |= if bit == by_comm { 0 } else { bit };
        masks.any_cgroup |= if bit == by_cgroup { 0 } else { bit };
        masks.any_uid |= if bit == by_uid { 0 } else { bit };
        masks.any_container |= if bit == by_container { 0 } else { bit };
    }
    rules.comms = names(&comms);
    rules.cgroups = names(&cgroups);
    for (what, bits) in exact {
        match rules.exact.iter_mut().find(|(known, _)| *known == what) {
            Some((_, sum)) => *sum |= bits,
            None => rules.exact.push((what, bits)),
        }
    }
    rules
}

/// A look-up in a trie finds only the longest key, so each key carries the rules of all shorter ones that match it too.
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

/// Adds what another rule asks for: both rules, and the faster clock.
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

    /// What the trie of the kernel finds: the value of the longest key that the name begins with, NUL included.
    fn trie(keys: &[(NamePattern, u64)], name: &str) -> u64 {
        let name = format!("{name}\0");
        let text = |key: &NamePattern| if key.prefix { key.text.clone() } else { format!("{}\0", key.text) };
        keys.iter()
            .filter(|(key, _)| name.starts_with(&text(key)))
            .max_by_key(|(key, _)| text(key).len())
            .map_or(0, |(_, bits)| *bits)
    }

    proptest! {
        #[test]
        fn r17_a_trie_of_names_finds_what_each_pattern_would(
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
    }
}
