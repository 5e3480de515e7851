//! Where pods come from, behind one trait.

mod apiserver;
mod follow;
mod json;
mod kubelet;
mod podinfo;
mod tls;

use std::{fmt, io, path::PathBuf, sync::Arc, time::Duration};

use futures::stream::BoxStream;
use tokio::sync::Notify;

use self::{apiserver::ApiServer, kubelet::Kubelet, podinfo::PodInfo};
pub use self::{follow::follow, kubelet::check_address};
use super::{Pods, model::Pod};

/// More pods than that are on no node: the kubelet takes 110 unless told otherwise.
pub(super) const MOST_PODS: usize = 10_000;

/// What a source tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// All pods of the node; what is not among them is gone.
    All(Vec<Pod>),
    /// One pod is new or has changed.
    Set(Pod),
    /// The pod with this uid is gone.
    Gone(String),
}

/// A source of this node's pods.
pub trait PodSource: Send + Sync {
    /// Which.
    fn kind(&self) -> SourceKind;

    /// Something speaks for it being there at all: what is not even there is no fault.
    fn is_there(&self) -> bool;

    /// What it tells from now on. The first is all pods; the stream ends with its first error. `wanted` is notified when
    /// somebody waits for a container that is not known: a source that asks in intervals asks at once then.
    fn changes<'a>(&'a self, wanted: &'a Notify) -> BoxStream<'a, Result<Change, SourceError>>;
}

/// The kinds of sources, the best one first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceKind {
    /// The kubelet's own stream of pods, on a socket of the node.
    PodInfo,
    /// The kubelet's list of pods, by HTTPS.
    Kubelet,
    /// A watch at the API server.
    ApiServer,
}

impl SourceKind {
    /// As `--pod-source` names it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PodInfo => "podinfo",
            Self::Kubelet => "kubelet",
            Self::ApiServer => "apiserver",
        }
    }

    /// Whether it tells of changes by itself, so that rules over pods are in force before a container's first sample; else
    /// within one poll.
    pub fn streams(self) -> bool {
        self != Self::Kubelet
    }
}

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why a source does not tell.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Nothing speaks for it being there.
    #[error("{0}")]
    Absent(String),
    /// A file that it needs.
    #[error("cannot read {what} {}: {source}; {cure}", path.display())]
    File {
        /// What it is.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What to do.
        cure: &'static str,
    },
    /// An address that is none.
    #[error("`{0}` is no address of a kubelet: write HOST, HOST:PORT or https://HOST:PORT, IPv6 in brackets")]
    Address(String),
    /// Certificates that are none.
    #[error("the certificates in {} cannot be used: {reason}", path.display())]
    Certificates {
        /// Where.
        path: PathBuf,
        /// What is wrong with them.
        reason: String,
    },
    /// Nobody answers there.
    #[error("cannot reach {at}: {reason}")]
    Unreachable {
        /// Where.
        at: String,
        /// What the system said.
        reason: String,
    },
    /// It is somebody else.
    #[error(
        "{at} shows a certificate that is not trusted: {reason}; give its authority with --kubelet-ca, or its own \
         certificate with --kubelet-certificate (kubeadm: /var/lib/kubelet/pki/kubelet.crt)"
    )]
    Untrusted {
        /// Where.
        at: String,
        /// What is wrong with it.
        reason: String,
    },
    /// 401.
    #[error(
        "{at} does not know the token (401): is {} of this cluster, and does the kubelet run with webhook \
         authentication (authentication.webhook.enabled)?",
        token.display()
    )]
    Unauthenticated {
        /// Where.
        at: String,
        /// The token's file.
        token: PathBuf,
    },
    /// 403.
    #[error("{at} does not allow it (403){said}; the service account needs a ClusterRole with {rule}")]
    Forbidden {
        /// Where.
        at: String,
        /// What it said, with a colon before it; or nothing.
        said: String,
        /// The rule that is missing.
        rule: &'static str,
    },
    /// Another answer than 200.
    #[error("{at} answered {status}{said}")]
    Status {
        /// Where.
        at: String,
        /// The number.
        status: u16,
        /// What it said, with a colon before it; or nothing.
        said: String,
    },
    /// Not in time.
    #[error("{at} did not answer within {seconds} s")]
    Slow {
        /// Where.
        at: String,
        /// How long was waited.
        seconds: u64,
    },
    /// Too much.
    #[error("{at} answered with more than {most_bytes} bytes, which is no list of one node's pods")]
    TooLarge {
        /// Where.
        at: String,
        /// How much would be read.
        most_bytes: u64,
    },
    /// What came is no list of pods.
    #[error("{at} answered with something else than pods: {reason}")]
    Garbage {
        /// Where.
        at: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It ended the stream.
    #[error("{at} ended the stream{said}")]
    Ended {
        /// Where.
        at: String,
        /// What it said, with a colon before it; or nothing.
        said: String,
    },
}

/// How to reach the sources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceOptions {
    /// None: whichever works, the best first.
    pub only: Option<SourceKind>,
    /// This node's name in Kubernetes.
    pub node: String,
    /// Sockets at which the kubelet may stream pods.
    pub podinfo_sockets: Vec<PathBuf>,
    /// The kubelet's address: `HOST`, `HOST:PORT` or a URL.
    pub kubelet_address: String,
    /// Whose certificate the kubelet must have (PEM).
    pub kubelet_ca: PathBuf,
    /// The kubelet's own certificate (PEM), where nobody has signed it; goes before `kubelet_ca`.
    pub kubelet_certificate: Option<PathBuf>,
    /// Any certificate will do.
    pub kubelet_insecure: bool,
    /// The bearer token, read for each request.
    pub token_file: PathBuf,
    /// How long the kubelet may take for a whole answer.
    pub patience: Duration,
    /// The environment names a cluster: this is a pod, or KUBECONFIG is set.
    pub apiserver: bool,
}

/// [`SourceOptions::patience`], unless told otherwise.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The sources to be tried, in this order.
pub fn sources(options: &SourceOptions) -> Vec<Arc<dyn PodSource>> {
    let all: [Arc<dyn PodSource>; 3] =
        [Arc::new(PodInfo::new(options)), Arc::new(Kubelet::new(options)), Arc::new(ApiServer::new(options))];
    all.into_iter().filter(|source| options.only.is_none_or(|only| source.kind() == only)).collect()
}

/// What a server said, for an error: one line, not endless.
pub(super) fn said(text: &str) -> String {
    let line: String =
        text.lines().next().unwrap_or("").chars().filter(|c| !c.is_control()).take(200).collect();
    if line.trim().is_empty() { String::new() } else { format!(": {}", line.trim()) }
}

impl Pods {
    /// What is notified when a container is asked for.
    pub(super) fn wanted(&self) -> &Notify {
        &self.0.wanted
    }
}
