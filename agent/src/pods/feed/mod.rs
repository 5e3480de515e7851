//! Pod feeds: sources of this node's pods behind one trait.

mod apiserver;
mod error;
mod follow;
pub mod fuzz;
mod json;
mod kubelet;
mod podinfo;
mod tls;

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use futures::stream::BoxStream;
use tokio::sync::Notify;

pub(crate) use self::kubelet::check_kubelet_address;
use self::{apiserver::ApiServer, kubelet::Kubelet, podinfo::PodInfo};
pub use self::{error::PodFeedError, follow::follow};
use super::model::Pod;

/// Maximum of pods of a node. A kubelet runs 110 unless configured otherwise.
pub(super) const MAX_PODS: usize = 10_000;
/// The usual [`PodFeedOptions::kubelet_timeout`].
pub const KUBELET_TIMEOUT: Duration = Duration::from_secs(20);

/// A message of a pod feed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "one change at a time is in memory")]
pub enum PodChange {
    /// All pods of the node. Pods that are not in the list are gone.
    All(PodList),
    /// One new or changed pod.
    Set(Pod),
    /// The uid of a deleted pod.
    Gone(String),
}

/// Pods of the node, with a bound.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodList {
    /// The first [`MAX_PODS`] pods.
    pub pods: Vec<Pod>,
    /// The number of pods beyond them.
    pub left_out: u64,
}

impl PodList {
    fn push(&mut self, pod: Pod) {
        if self.pods.len() < MAX_PODS {
            self.pods.push(pod);
        } else {
            self.left_out += 1;
        }
    }
}

impl FromIterator<Pod> for PodList {
    fn from_iter<T: IntoIterator<Item = Pod>>(pods: T) -> Self {
        let mut list = Self::default();
        pods.into_iter().for_each(|pod| list.push(pod));
        list
    }
}

impl From<Vec<Pod>> for PodList {
    fn from(pods: Vec<Pod>) -> Self {
        pods.into_iter().collect()
    }
}

/// A source of this node's pods.
pub trait PodFeed: Send + Sync {
    /// Returns the kind of the feed.
    fn kind(&self) -> PodFeedKind;

    /// Reports whether anything indicates that the feed exists on this node. A feed that does not exist is no fault.
    fn is_present(&self) -> bool;

    /// Starts the feed. The first item contains all pods. The stream ends with its first error. The caller notifies
    /// `requested` when it waits for an unknown container; a feed that polls then polls at once.
    fn changes<'a>(&'a self, requested: &'a Notify) -> BoxStream<'a, Result<PodChange, PodFeedError>>;
}

/// The kinds of pod feeds, the preferred one first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PodFeedKind {
    /// The kubelet's stream of pods, on a socket of the node.
    PodInfo,
    /// The kubelet's list of pods, over HTTPS.
    Kubelet,
    /// A watch at the API server.
    ApiServer,
}

impl PodFeedKind {
    /// All kinds, the preferred one first.
    pub(crate) const ALL: [Self; 3] = [Self::PodInfo, Self::Kubelet, Self::ApiServer];

    /// Returns the name in the option `--pod-source`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::PodInfo => "podinfo",
            Self::Kubelet => "kubelet",
            Self::ApiServer => "apiserver",
        }
    }

    /// Reports whether the feed reports changes at once. Rules over pods are then in force before a container's first sample;
    /// otherwise within one poll.
    pub(crate) fn streams(self) -> bool {
        self != Self::Kubelet
    }
}

impl fmt::Display for PodFeedKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How to reach the pod feeds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFeedOptions {
    /// None: the first kind that works.
    pub only: Option<PodFeedKind>,
    /// This node's name in Kubernetes.
    pub node: String,
    /// Paths at which the kubelet's socket may be.
    pub podinfo_sockets: Vec<PathBuf>,
    /// The kubelet's address: `HOST`, `HOST:PORT` or a URL.
    pub kubelet_address: String,
    /// Certificates of the authority that signed the kubelet's certificate (PEM).
    pub kubelet_ca: PathBuf,
    /// The kubelet's own certificate (PEM), if no authority signed it. Takes precedence over `kubelet_ca`.
    pub kubelet_certificate: Option<PathBuf>,
    /// Accepts any certificate of the kubelet.
    pub kubelet_insecure: bool,
    /// File of the bearer token. The agent reads it for each request.
    pub token_file: PathBuf,
    /// Time limit for a complete answer of the kubelet.
    pub kubelet_timeout: Duration,
    /// The environment names a cluster: this process runs in a pod, or KUBECONFIG is set.
    pub apiserver: bool,
}

/// Builds the feeds to try, the preferred one first.
pub fn feeds(options: &PodFeedOptions) -> Vec<Arc<dyn PodFeed>> {
    let all: [Arc<dyn PodFeed>; 3] =
        [Arc::new(PodInfo::new(options)), Arc::new(Kubelet::new(options)), Arc::new(ApiServer::new(options))];
    all.into_iter().filter(|feed| options.only.is_none_or(|only| feed.kind() == only)).collect()
}
