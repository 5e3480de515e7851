//! Staged rollouts: the fleet completes one when its nodes have run the new rules long enough.

use std::time::Duration;

use gannet_proto::{
    control::{ResumeRolloutRequest, Staged, node_rollout::State},
    rules,
};

use super::Fleet;
use crate::{rules::COLLECTOR, time};

/// Time between two checks of the staged rollouts.
pub(crate) const STAGING_INTERVAL: Duration = Duration::from_millis(500);

impl Fleet {
    /// Brings staged rule sets to all nodes, if they have soaked without a rejection. Blocking.
    pub(crate) fn complete_staged(&self) {
        for (scope, (revision, staged)) in self.rules.staged() {
            if !self.is_soaked(revision, &staged) {
                continue;
            }
            let request = ResumeRolloutRequest { scope: scope.clone(), percent: 0 };
            if let Err(error) = self.rules.resume(&request, COLLECTOR) {
                tracing::warn!(scope, "cannot bring the staged rules to all nodes: {error}");
            }
        }
    }

    fn is_soaked(&self, revision: u64, staged: &Staged) -> bool {
        let Some(soak) = staged.soak.and_then(|soak| Duration::try_from(soak).ok()) else { return false };
        let since_ms = staged.since.as_ref().and_then(time::to_ms).unwrap_or(u64::MAX);
        let is_over = |at_ms: u64| u128::from(time::now_ms()) >= u128::from(at_ms) + soak.as_millis();
        if !staged.paused.is_empty() || !is_over(since_ms) {
            return false;
        }
        let nodes = self.nodes.lock();
        let mut canaries = nodes
            .iter()
            .filter(|(name, known)| known.connection.is_some() && rules::canary_rank(name) < staged.percent)
            .peekable();
        // Without a node that runs the rules the soak proves nothing.
        canaries.peek().is_some()
            && canaries.all(|(_, known)| {
                known
                    .answer_to(revision)
                    .is_some_and(|answer| answer.state != State::Rejected && is_over(answer.since_ms))
            })
    }
}
