//! The kubelet's own stream of pods, on a socket of the node (Kubernetes 1.36 and later).
//!
//! Facts, from kubernetes/kubernetes `staging/src/k8s.io/kubelet/pkg/apis/pods/v1alpha1/api.proto` and the documentation
//! of 1.36 and 1.37: `service Pods` with `WatchPods` and `ListPods`; pods are `v1.Pod` in protobuf within `bytes` fields.
//! The numbers of the event types have changed between versions, and so has the socket's path. So a list says who is
//! there, and an event says what has changed: the pod in it is taken in as it is, and the list is asked for again, since
//! that alone tells surely who has gone.

use std::{collections::HashMap, os::unix::fs::FileTypeExt as _, path::PathBuf, time::Duration};

use futures::stream::{self, BoxStream, StreamExt as _};
use prost::Message as _;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until, timeout},
};
use tonic::{
    Code, Request, Status, Streaming,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use super::{
    Change, PodSource, SourceError, SourceKind, SourceOptions,
    json::MOST_PODS,
    model::{ANNOTATIONS, MOST_CONTAINERS, MOST_LABELS, Pod, Told},
    source::said,
};

/// The packages under which the service has been, or may come to be.
const PACKAGES: [&str; 3] = ["v1alpha1", "v1beta1", "v1"];
/// One message: a list holds whole pods.
const MOST_BYTES: usize = 64 << 20;
/// How long an answer may take.
const LONGEST: Duration = Duration::from_secs(20);
/// How long after an event the list is asked for; more events in between make no more lists.
const SETTLED: Duration = Duration::from_secs(2);
/// How often it is asked for in any case.
const ANYHOW: Duration = Duration::from_secs(60);

/// The kubelet's stream.
pub(super) struct PodInfo {
    sockets: Vec<PathBuf>,
}

impl PodInfo {
    pub(super) fn new(options: &SourceOptions) -> Self {
        Self { sockets: options.podinfo_sockets.clone() }
    }

    fn socket(&self) -> Option<&PathBuf> {
        self.sockets
            .iter()
            .find(|path| std::fs::metadata(path).is_ok_and(|found| found.file_type().is_socket()))
    }

    async fn open(&self) -> Result<Session, SourceError> {
        let Some(socket) = self.socket() else {
            let names: Vec<_> = self.sockets.iter().map(|path| path.display().to_string()).collect();
            return Err(SourceError::Absent(format!("there is no socket at {}", names.join(" or "))));
        };
        let at = format!("the kubelet at {}", socket.display());
        let unreachable = |error: &tonic::transport::Error| {
            // tonic says "transport error", and what it is about only below.
            let mut error: &dyn std::error::Error = error;
            while let Some(source) = error.source() {
                error = source;
            }
            SourceError::Unreachable { at: at.clone(), reason: error.to_string() }
        };
        let channel = Endpoint::from_shared(format!("unix:{}", socket.display()))
            .map_err(|error| unreachable(&error))?
            .connect_timeout(LONGEST)
            .connect()
            .await
            .map_err(|error| unreachable(&error))?;
        let mut client = Grpc::new(channel).max_decoding_message_size(MOST_BYTES);
        let mut refusal = Status::unimplemented("");
        for package in PACKAGES {
            match watch(&mut client, package).await {
                Ok(events) => return Ok(Session { at, client, package, events, list_at: Instant::now() }),
                Err(status) if status.code() == Code::Unimplemented => refusal = status,
                Err(status) => return Err(ended(&at, &status)),
            }
        }
        Err(ended(&at, &refusal))
    }
}

impl PodSource for PodInfo {
    fn kind(&self) -> SourceKind {
        SourceKind::PodInfo
    }

    fn is_there(&self) -> bool {
        self.socket().is_some()
    }

    fn changes<'a>(&'a self, _wanted: &'a Notify) -> BoxStream<'a, Result<Change, SourceError>> {
        // None: before the first; after an error there is no next.
        stream::unfold(Some(None::<Session>), move |session| async move {
            let mut session = match session? {
                Some(session) => session,
                None => match timeout(LONGEST, self.open()).await {
                    Ok(Ok(session)) => session,
                    Ok(Err(error)) => return Some((Err(error), None)),
                    Err(_) => {
                        let error = SourceError::Slow {
                            at: "the kubelet's socket".into(),
                            seconds: LONGEST.as_secs(),
                        };
                        return Some((Err(error), None));
                    }
                },
            };
            let next = session.next().await;
            let session = next.is_ok().then_some(Some(session));
            Some((next, session))
        })
        .boxed()
    }
}

/// One open stream of events.
struct Session {
    at: String,
    client: Grpc<Channel>,
    package: &'static str,
    events: Streaming<wire::WatchPodsEvent>,
    /// When the list is to be asked for. At once, at first.
    list_at: Instant,
}

impl Session {
    async fn next(&mut self) -> Result<Change, SourceError> {
        loop {
            let event = tokio::select! {
                biased;
                () = sleep_until(self.list_at) => {
                    let list = match timeout(LONGEST, self.list()).await {
                        Ok(list) => list?,
                        Err(_) => {
                            return Err(SourceError::Slow { at: self.at.clone(), seconds: LONGEST.as_secs() });
                        }
                    };
                    self.list_at = Instant::now() + ANYHOW;
                    return Ok(Change::All(list));
                }
                event = self.events.message() => event.map_err(|status| ended(&self.at, &status))?,
            };
            let Some(event) = event else {
                return Err(SourceError::Ended { at: self.at.clone(), said: String::new() });
            };
            if event.pod.is_empty() {
                // The end of what was there at first; the list tells that too.
                continue;
            }
            self.list_at = self.list_at.min(Instant::now() + SETTLED);
            let pod = self.decode(&event.pod)?;
            // Of a deleted pod only the names may be left: what is known of it already is more.
            if !(pod.containers.is_empty() && pod.labels.is_empty() && !pod.denied) {
                return Ok(Change::Set(pod));
            }
        }
    }

    async fn list(&mut self) -> Result<Vec<Pod>, SourceError> {
        let failed = |at: &str, status: &Status| ended(at, status);
        self.client
            .ready()
            .await
            .map_err(|error| SourceError::Unreachable { at: self.at.clone(), reason: error.to_string() })?;
        let codec = ProstCodec::<wire::ListPodsRequest, wire::ListPodsResponse>::default();
        let answer = self
            .client
            .unary(Request::new(wire::ListPodsRequest {}), path(self.package, "ListPods"), codec)
            .await
            .map_err(|status| failed(&self.at, &status))?;
        answer.into_inner().pods.iter().take(MOST_PODS).map(|pod| self.decode(pod)).collect()
    }

    fn decode(&self, bytes: &[u8]) -> Result<Pod, SourceError> {
        let pod = wire::Pod::decode(bytes)
            .map_err(|error| SourceError::Garbage { at: self.at.clone(), reason: error.to_string() })?;
        Ok(Pod::from(Told::from(pod)))
    }
}

async fn watch(client: &mut Grpc<Channel>, package: &str) -> Result<Streaming<wire::WatchPodsEvent>, Status> {
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let codec = ProstCodec::<wire::WatchPodsRequest, wire::WatchPodsEvent>::default();
    let request = Request::new(wire::WatchPodsRequest {});
    Ok(client.server_streaming(request, path(package, "WatchPods"), codec).await?.into_inner())
}

fn path(package: &str, method: &str) -> PathAndQuery {
    // PROOF: made of constants that are paths; a test asks for each.
    PathAndQuery::try_from(format!("/{package}.Pods/{method}"))
        .unwrap_or_else(|_| PathAndQuery::from_static("/"))
}

fn ended(at: &str, status: &Status) -> SourceError {
    SourceError::Ended {
        at: at.to_owned(),
        said: format!(" ({:?}){}", status.code(), said(status.message())),
    }
}

impl From<wire::Pod> for Told {
    fn from(pod: wire::Pod) -> Self {
        let wire::ObjectMeta { name, namespace, uid, labels, annotations, owner_references } =
            pod.metadata.unwrap_or_default();
        let status = pod.status.unwrap_or_default();
        let controller = owner_references.into_iter().find(|owner| owner.controller);
        let of_state = |state: Option<wire::ContainerState>| {
            state.and_then(|state| state.terminated).map_or_else(String::new, |ended| ended.container_id)
        };
        let containers = status
            .main
            .into_iter()
            .chain(status.init)
            .chain(status.ephemeral)
            .flat_map(|status| {
                let wire::ContainerStatus { name, state, last_state, container_id } = status;
                [container_id, of_state(state), of_state(last_state)].map(|id| (name.clone(), id))
            })
            .filter(|(_, id)| !id.is_empty())
            .take(MOST_CONTAINERS)
            .collect();
        Self {
            uid,
            namespace,
            name,
            labels: labels.into_iter().take(MOST_LABELS).collect(),
            annotations: annotations
                .into_iter()
                .filter(|(key, _)| ANNOTATIONS.contains(&key.as_str()))
                .collect(),
            controller: controller.map(|owner| (owner.kind, owner.name)),
            containers,
        }
    }
}

/// The messages, as far as they are of use. Numbers of the pod's fields: `k8s.io/api/core/v1/generated.proto` and
/// `k8s.io/apimachinery/pkg/apis/meta/v1/generated.proto`, which never change.
mod wire {
    use super::HashMap;

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct WatchPodsRequest {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct WatchPodsEvent {
        #[prost(int32, tag = "1")]
        pub(super) r#type: i32,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) pod: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ListPodsRequest {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ListPodsResponse {
        #[prost(bytes = "vec", repeated, tag = "1")]
        pub(super) pods: Vec<Vec<u8>>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Pod {
        #[prost(message, optional, tag = "1")]
        pub(super) metadata: Option<ObjectMeta>,
        #[prost(message, optional, tag = "3")]
        pub(super) status: Option<PodStatus>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ObjectMeta {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(string, tag = "3")]
        pub(super) namespace: String,
        #[prost(string, tag = "5")]
        pub(super) uid: String,
        #[prost(map = "string, string", tag = "11")]
        pub(super) labels: HashMap<String, String>,
        #[prost(map = "string, string", tag = "12")]
        pub(super) annotations: HashMap<String, String>,
        #[prost(message, repeated, tag = "13")]
        pub(super) owner_references: Vec<OwnerReference>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct OwnerReference {
        #[prost(string, tag = "1")]
        pub(super) kind: String,
        #[prost(string, tag = "3")]
        pub(super) name: String,
        #[prost(bool, tag = "6")]
        pub(super) controller: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct PodStatus {
        #[prost(message, repeated, tag = "8")]
        pub(super) main: Vec<ContainerStatus>,
        #[prost(message, repeated, tag = "10")]
        pub(super) init: Vec<ContainerStatus>,
        #[prost(message, repeated, tag = "13")]
        pub(super) ephemeral: Vec<ContainerStatus>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ContainerStatus {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(message, optional, tag = "2")]
        pub(super) state: Option<ContainerState>,
        #[prost(message, optional, tag = "3")]
        pub(super) last_state: Option<ContainerState>,
        #[prost(string, tag = "8")]
        pub(super) container_id: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ContainerState {
        #[prost(message, optional, tag = "3")]
        pub(super) terminated: Option<ContainerStateTerminated>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ContainerStateTerminated {
        #[prost(string, tag = "7")]
        pub(super) container_id: String,
    }
}
