//! Where rules over pods meet the containers of this node.
//!
//! Whoever knows pods is told which rules ask for them, and says for each of them which containers it means now. From
//! there on the kernel side decides: a container is a control group, and all processes in it and in what lies within
//! are meant, those of today and those that will be started.

use std::collections::BTreeSet;

use gannet_proto::control::Match;

use crate::cgroup::CgroupNames;

/// A rule over pods, for whoever knows pods.
#[derive(Clone, Debug, PartialEq)]
pub struct PodRule {
    /// Its name.
    pub rule_id: String,
    /// What it asks for: `namespaces`, `pod_labels`, `containers` and `workloads` are to be resolved; the other fields are
    /// compared elsewhere.
    pub matches: Match,
}

/// Knows pods. Called on the engine's thread: it must not wait. Answers through [`crate::engine::Containers`].
pub trait PodSource: Send {
    /// The rules over pods are now these, all of them. Called once at the beginning, then whenever they change.
    fn rules(&mut self, rules: Vec<PodRule>);

    /// A process of this container is sampled, or is wanted by a rule: told once in each window. Its pod may be gone in a
    /// moment, so whoever has to ask somebody had better ask now.
    fn seen(&mut self, container: &CgroupNames) {
        let _ = container;
    }
}

impl<F: FnMut(Vec<PodRule>) + Send> PodSource for F {
    fn rules(&mut self, rules: Vec<PodRule>) {
        self(rules);
    }
}

/// What is known of the containers of this node, as far as rules go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// For each rule over pods the ids of the control groups of its containers, in the hierarchy that the kernel side
    /// reads ([`crate::kernel::KernelOptions::hierarchy`]): the inode number of the group's directory.
    pub rules: Vec<(String, BTreeSet<u64>)>,
    /// Containers that must not be profiled, whatever rules ask for.
    pub denied: BTreeSet<u64>,
}
