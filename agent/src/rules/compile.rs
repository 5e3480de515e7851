//! From a rule to what decides.

use gannet_proto::{
    control::{Rule, capture},
    rules::{Pattern, effective_hz, effective_kinds},
};

use crate::{
    kernel::{CommPattern, KernelRules, Want},
    process::Process,
};

/// A rule in the form that decides.
#[derive(Clone, Debug)]
pub(super) struct Compiled {
    /// Nanoseconds between two ticks; 0 if it wants none.
    pub(super) period_ns: u64,
    /// It wants blocked time.
    pub(super) off_cpu: bool,
    /// It names processes by number and by nothing else.
    pub(super) by_pid_only: bool,
    /// The field that cannot work here, and why.
    pub(super) unsupported: Option<(&'static str, &'static str)>,
    comm: Vec<Pattern>,
    exe: Vec<Pattern>,
    cgroup: Vec<Pattern>,
    pids: Vec<u32>,
    uid: Vec<u32>,
}

impl Compiled {
    pub(super) fn of(rule: &Rule) -> Self {
        let matches = rule.r#match.clone().unwrap_or_default();
        // A pattern that does not parse was refused before; it can only be left out.
        let patterns = |texts: &[String]| texts.iter().filter_map(|text| Pattern::parse(text).ok()).collect();
        let pods: [(&'static str, bool); 4] = [
            ("match.namespaces", !matches.namespaces.is_empty()),
            ("match.pod_labels", !matches.pod_labels.is_empty()),
            ("match.containers", !matches.containers.is_empty()),
            ("match.workloads", !matches.workloads.is_empty()),
        ];
        let kinds = effective_kinds(rule);
        let unsupported = if let Some((field, _)) = pods.into_iter().find(|(_, given)| *given) {
            Some((field, "this node has no pod metadata, so the rule matches nothing here"))
        } else if !rule.when.is_empty() {
            Some(("when", "this agent does not watch conditions, so the rule never starts a capture here"))
        } else {
            None
        };
        Self {
            period_ns: if kinds.contains(&capture::Kind::OnCpu) {
                1_000_000_000 / u64::from(effective_hz(rule).max(1))
            } else {
                0
            },
            off_cpu: kinds.contains(&capture::Kind::OffCpu),
            by_pid_only: !matches.pids.is_empty()
                && matches.comm.is_empty()
                && matches.exe.is_empty()
                && matches.cgroup.is_empty()
                && matches.uid.is_empty(),
            unsupported,
            comm: patterns(&matches.comm),
            exe: patterns(&matches.exe),
            cgroup: patterns(&matches.cgroup),
            pids: matches.pids,
            uid: matches.uid,
        }
    }

    /// The command name is all that it needs.
    pub(super) fn in_kernel(&self) -> bool {
        self.exe.is_empty() && self.cgroup.is_empty() && self.pids.is_empty() && self.uid.is_empty()
    }

    /// Whether all that it asks for holds.
    pub(super) fn matches(&self, process: &Process) -> bool {
        let any = |patterns: &[Pattern], text: &str| {
            patterns.is_empty() || patterns.iter().any(|pattern| pattern.matches(text.as_bytes()))
        };
        any(&self.comm, &process.comm)
            && any(&self.exe, &process.exe)
            && any(&self.cgroup, &process.cgroup)
            && (self.pids.is_empty() || self.pids.contains(&process.key.process.tgid))
            && (self.uid.is_empty() || process.uid.is_some_and(|uid| self.uid.contains(&uid)))
    }

    /// It is for every process.
    fn is_for_all(&self) -> bool {
        self.in_kernel() && self.comm.iter().any(|pattern| pattern.is_prefix() && pattern.text().is_empty())
    }
}

/// All rules in force, as the kernel side needs them.
pub(super) fn kernel_rules<'a>(live: impl Iterator<Item = (usize, &'a Rule, &'a Compiled)>) -> KernelRules {
    let mut rules = KernelRules { user_stacks: false, kernel_stacks: false, ..KernelRules::default() };
    let mut names: Vec<(&Pattern, Want)> = Vec::new();
    for (place, rule, compiled) in live {
        let want = Want { rules: 1 << place, period_ns: compiled.period_ns };
        rules.periods_ns[place] = compiled.period_ns;
        rules.off_cpu |= u64::from(compiled.off_cpu) << place;
        let capture = rule.capture.clone().unwrap_or_default();
        rules.user_stacks |= capture.user_stacks.unwrap_or(true);
        rules.kernel_stacks |= capture.kernel_stacks.unwrap_or(true);
        if compiled.is_for_all() {
            add(&mut rules.all, want);
        } else if compiled.in_kernel() {
            names.extend(compiled.comm.iter().map(|pattern| (pattern, want)));
        } else {
            rules.report_all = true;
        }
    }
    // A look-up in the trie finds only the longest key, so each key carries what all shorter ones that match it ask for.
    for (pattern, _) in &names {
        let key = CommPattern { text: pattern.text().to_owned(), prefix: pattern.is_prefix() };
        if rules.comms.iter().any(|(known, _)| *known == key) {
            continue;
        }
        let mut sum = Want::default();
        for (other, want) in &names {
            let covers = if other.is_prefix() {
                key.text.starts_with(other.text())
            } else {
                !key.prefix && key.text == other.text()
            };
            if covers {
                add(&mut sum, *want);
            }
        }
        rules.comms.push((key, sum));
    }
    rules
}

/// Adds what another rule asks for: both rules, and the faster clock.
pub(super) fn add(sum: &mut Want, more: Want) {
    sum.rules |= more.rules;
    if more.period_ns != 0 && (sum.period_ns == 0 || more.period_ns < sum.period_ns) {
        sum.period_ns = more.period_ns;
    }
}
