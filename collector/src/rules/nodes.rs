//! The interface through which the rule store sees nodes. The fleet, which lies above, implements it.

use std::collections::BTreeMap;

use gannet_proto::control::Rollout;
use tokio::sync::watch;

/// The states of nodes.
pub(crate) trait NodeStates: Send + Sync {
    /// Subscribes to a counter of changes in a rollout.
    fn changes(&self) -> watch::Receiver<u64>;
    /// Returns the state of every node for this revision. `made_ms`: time of the revision.
    fn rollout(&self, revision: u64, made_ms: u64) -> Rollout;
    /// Returns the labels of a node. An unknown node has none.
    fn labels(&self, node: &str) -> BTreeMap<String, String>;
}
