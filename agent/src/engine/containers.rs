//! The engine's side of rules over pods: tells the pod resolver which rules there are and which containers it sees.

use std::collections::HashSet;

use crate::{
    process::Process,
    rules::{PodQuery, PodResolver},
};

#[derive(Default)]
pub(super) struct ContainerReports {
    /// `None` if the agent has no pod source.
    resolver: Option<Box<dyn PodResolver>>,
    /// The containers reported in this window, by id.
    reported: HashSet<String>,
}

impl ContainerReports {
    pub(super) fn set_resolver(&mut self, resolver: Box<dyn PodResolver>) {
        self.resolver = Some(resolver);
    }

    pub(super) fn set_queries(&mut self, queries: Vec<PodQuery>) {
        if let Some(resolver) = &mut self.resolver {
            resolver.set_queries(queries);
        }
    }

    /// Reports the container of a sampled process, once in each window.
    pub(super) fn report(&mut self, process: &Process) {
        let id = &process.names.container_id;
        if let Some(resolver) = &mut self.resolver
            && !id.is_empty()
            && !self.reported.contains(id)
        {
            self.reported.insert(id.clone());
            resolver.container_seen(&process.names, process.key.process.tgid);
        }
    }

    pub(super) fn next_window(&mut self) {
        self.reported.clear();
    }
}
