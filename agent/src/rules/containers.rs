//! Connects rules over pods with the containers of this node.
//!
//! The engine passes the rules over pods to a [`PodResolver`]. The resolver answers with the containers that each rule
//! selects now ([`PodSelection`]). From there on the BPF programs decide: a container is a control group, and a rule covers
//! all processes in that group and below it, present and future ones.

use std::collections::{BTreeMap, BTreeSet};

use gannet_proto::control::Match;

use super::RuleId;
use crate::cgroup::CgroupNames;

/// The part of a rule that needs pod metadata.
#[derive(Clone, Debug, PartialEq)]
pub struct PodQuery {
    /// The rule's name.
    pub rule_id: RuleId,
    /// The rule's match. The resolver evaluates `namespaces`, `pod_labels`, `containers` and `workloads`; the BPF programs
    /// and the engine compare the other fields.
    pub matches: Match,
}

/// Resolves rules over pods to containers. The engine calls it on its own thread, so no method may block. Answers go through
/// [`crate::engine::ContainerSelector`].
pub trait PodResolver: Send {
    /// Replaces all rules over pods. Called once at the beginning, then whenever they change.
    fn set_queries(&mut self, queries: Vec<PodQuery>);

    /// Reports a container with a process (its PID) that is sampled or that a rule selects, once in each window. The container may end
    /// soon, so a resolver that must ask another server for its pod asks at once.
    fn container_seen(&mut self, container: &CgroupNames, pid: u32) {
        let _ = (container, pid);
    }
}

impl<F: FnMut(Vec<PodQuery>) + Send> PodResolver for F {
    fn set_queries(&mut self, queries: Vec<PodQuery>) {
        self(queries);
    }
}

/// The answer of a [`PodResolver`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSelection {
    /// For each rule over pods the ids of the control groups of its containers. An id is the inode number of the group's
    /// directory in the hierarchy that the BPF programs read ([`crate::kernel::KernelOptions::hierarchy`]).
    pub rules: Vec<(RuleId, BTreeSet<u64>)>,
    /// Containers that must not be profiled, whatever rules ask for.
    pub denied: BTreeSet<u64>,
}

/// Owns the current containers of each rule over pods.
#[derive(Debug, Default)]
pub(super) struct PodContainers {
    /// None: this node has no pod metadata.
    by_rule: Option<BTreeMap<RuleId, BTreeSet<u64>>>,
}

impl PodContainers {
    /// Reports whether this node has pod metadata.
    pub(super) fn is_enabled(&self) -> bool {
        self.by_rule.is_some()
    }

    /// Returns true if pod metadata was not available before.
    pub(super) fn enable(&mut self) -> bool {
        let was_enabled = self.is_enabled();
        self.by_rule.get_or_insert_default();
        !was_enabled
    }

    /// Returns true if the rule had other containers before.
    pub(super) fn set(&mut self, rule_id: &str, containers: BTreeSet<u64>) -> bool {
        let by_rule = self.by_rule.get_or_insert_default();
        if by_rule.get(rule_id) == Some(&containers) {
            return false;
        }
        by_rule.insert(rule_id.to_owned(), containers);
        true
    }

    /// Returns the containers of a rule over pods; none of them before the resolver's first answer.
    pub(super) fn of(&self, rule_id: &str) -> &BTreeSet<u64> {
        static NONE: BTreeSet<u64> = BTreeSet::new();
        self.by_rule.as_ref().and_then(|by_rule| by_rule.get(rule_id)).unwrap_or(&NONE)
    }
}
