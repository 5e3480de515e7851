//! The tasks of the daemon. All of them end when [`Tasks::stop`] cancels them.

use std::sync::Arc;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{
    RunError,
    follow::{SwitchSignals, follow_files, follow_supplied, follow_switch},
    parts::Parts,
};
use crate::{
    control::{Control, LastGoodRules},
    debug::Listeners,
    pods,
    rules::files::RuleFilesStamp,
    tables::SuppliedStamp,
};

pub(super) struct Tasks {
    cancel: CancellationToken,
    /// Serves HTTP. Open requests may outlast the cancellation.
    serving: JoinHandle<()>,
    /// The other tasks; they end soon after the cancellation.
    others: Vec<JoinHandle<()>>,
}

impl Tasks {
    /// Starts all tasks. The stamps are of the rule files and the supplied unwind tables in force. `active` is the revision and
    /// digest of the collector's rules in force.
    pub(super) fn start(
        parts: &Parts,
        listeners: Listeners,
        switch: SwitchSignals,
        (rule_files, supplied): (Option<RuleFilesStamp>, SuppliedStamp),
        store: LastGoodRules,
        active: (u64, String),
    ) -> Result<Self, RunError> {
        let Parts { node, groups, queries, .. } = parts;
        let cancel = CancellationToken::new();
        let serving = tokio::spawn(listeners.serve(Arc::clone(node), cancel.clone()));
        let mut others = vec![
            tokio::spawn(follow_files(Arc::clone(node), rule_files, cancel.clone())),
            tokio::spawn(follow_switch(Arc::clone(node), switch, cancel.clone())),
            tokio::spawn(follow_supplied(Arc::clone(node), supplied, cancel.clone())),
        ];
        if let Some(dial) = &node.config.dial {
            let control = Control::new(Arc::clone(node), dial, store, active)?;
            others.push(tokio::spawn(control.run(cancel.clone())));
        }
        if let Some(options) = &node.config.pods {
            if options.kubelet_insecure {
                tracing::warn!("--kubelet-insecure: the agent trusts any server at the kubelet's address");
            }
            let feeds = pods::feeds(options);
            let only = options.only.is_some();
            others.push(tokio::spawn(pods::follow(node.pods.clone(), feeds, only, cancel.clone())));
        }
        if let Some(groups) = groups {
            let containers = node.engine.containers();
            let select = move |selection| containers.select(selection);
            others.push(tokio::spawn(pods::keep_resolving(
                node.pods.clone(),
                Arc::clone(groups),
                queries.clone(),
                select,
                cancel.clone(),
            )));
        }
        Ok(Self { cancel, serving, others })
    }

    /// Cancels the tasks and waits for them.
    pub(super) async fn stop(self) {
        self.cancel.cancel();
        for task in self.others {
            let _ = task.await;
        }
        // Open requests hold the node too.
        self.serving.abort();
        let _ = self.serving.await;
    }
}
