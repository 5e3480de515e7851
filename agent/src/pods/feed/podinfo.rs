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

use super::{Change, MOST_PODS, PodSource, SourceError, SourceKind, SourceOptions, said};
use crate::pods::model::{ANNOTATIONS, MOST_CONTAINERS, MOST_LABELS, Pod, Told};

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
            if self.list_at <= Instant::now() {
                let list = match timeout(LONGEST, self.list()).await {
                    Ok(list) => list?,
                    Err(_) => {
                        return Err(SourceError::Slow { at: self.at.clone(), seconds: LONGEST.as_secs() });
                    }
                };
                self.list_at = Instant::now() + ANYHOW;
                return Ok(Change::All(list));
            }
            let event = tokio::select! {
                () = sleep_until(self.list_at) => continue,
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

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        pin::Pin,
        sync::{Arc, Mutex},
        task::{Context, Poll},
    };

    use futures::{Stream, stream};
    use tokio::{net::UnixListener, sync::mpsc};
    use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
    use tonic::{
        Response,
        body::Body,
        codegen::{BoxFuture, Service, http},
        server::{NamedService, ServerStreamingService, UnaryService},
        transport::Server,
    };

    use super::*;
    use crate::pods::feed::sources;

    /// As the kubelet serves it: `ListPods` and `WatchPods` of package `v1alpha1`.
    #[derive(Clone)]
    struct FakeKubelet(Arc<Mutex<State>>);

    struct State {
        pods: Vec<wire::Pod>,
        watchers: Vec<mpsc::Sender<Result<wire::WatchPodsEvent, Status>>>,
        lists: usize,
    }

    impl NamedService for FakeKubelet {
        const NAME: &'static str = "v1alpha1.Pods";
    }

    impl UnaryService<wire::ListPodsRequest> for FakeKubelet {
        type Response = wire::ListPodsResponse;
        type Future = BoxFuture<Response<Self::Response>, Status>;

        fn call(&mut self, _: Request<wire::ListPodsRequest>) -> Self::Future {
            let mut state = self.0.lock().unwrap();
            state.lists += 1;
            let pods = state.pods.iter().map(prost::Message::encode_to_vec).collect();
            Box::pin(async { Ok(Response::new(wire::ListPodsResponse { pods })) })
        }
    }

    impl ServerStreamingService<wire::WatchPodsRequest> for FakeKubelet {
        type Response = wire::WatchPodsEvent;
        type ResponseStream = Pin<Box<dyn Stream<Item = Result<wire::WatchPodsEvent, Status>> + Send>>;
        type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

        fn call(&mut self, _: Request<wire::WatchPodsRequest>) -> Self::Future {
            let (sender, receiver) = mpsc::channel(64);
            let mut state = self.0.lock().unwrap();
            // What is there at first, then the mark without a pod.
            let at_first: Vec<_> = state
                .pods
                .iter()
                .map(|pod| wire::WatchPodsEvent { r#type: 1, pod: pod.encode_to_vec() })
                .chain([wire::WatchPodsEvent { r#type: 4, pod: Vec::new() }])
                .map(Ok)
                .collect();
            state.watchers.push(sender);
            let events = stream::iter(at_first).chain(ReceiverStream::new(receiver));
            Box::pin(async { Ok(Response::new(Box::pin(events) as Self::ResponseStream)) })
        }
    }

    impl Service<http::Request<Body>> for FakeKubelet {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            let me = self.clone();
            Box::pin(async move {
                Ok(match request.uri().path() {
                    "/v1alpha1.Pods/ListPods" => {
                        let codec = ProstCodec::<wire::ListPodsResponse, wire::ListPodsRequest>::default();
                        tonic::server::Grpc::new(codec).unary(me, request).await
                    }
                    "/v1alpha1.Pods/WatchPods" => {
                        let codec = ProstCodec::<wire::WatchPodsEvent, wire::WatchPodsRequest>::default();
                        tonic::server::Grpc::new(codec).server_streaming(me, request).await
                    }
                    _ => Status::unimplemented("").into_http(),
                })
            })
        }
    }

    impl FakeKubelet {
        fn start(socket: &std::path::Path, pods: Vec<wire::Pod>) -> Self {
            let me = Self(Arc::new(Mutex::new(State { pods, watchers: Vec::new(), lists: 0 })));
            let incoming = UnixListenerStream::new(UnixListener::bind(socket).unwrap());
            tokio::spawn(Server::builder().add_service(me.clone()).serve_with_incoming(incoming));
            me
        }

        /// The pods are these now, and each watcher is told of one.
        fn change(&self, pods: Vec<wire::Pod>, number: i32, told: &wire::Pod) {
            let mut state = self.0.lock().unwrap();
            state.pods = pods;
            for watcher in &state.watchers {
                let event = wire::WatchPodsEvent { r#type: number, pod: told.encode_to_vec() };
                watcher.try_send(Ok(event)).unwrap();
            }
        }
    }

    fn pod(uid: &str, container: &str) -> wire::Pod {
        wire::Pod {
            metadata: Some(wire::ObjectMeta {
                name: format!("pod-{uid}"),
                namespace: "shop".into(),
                uid: uid.into(),
                labels: HashMap::from([("pod-template-hash".into(), "77".into())]),
                annotations: HashMap::from([("gannet.dev/profile".into(), "false".into())]),
                owner_references: vec![wire::OwnerReference {
                    kind: "ReplicaSet".into(),
                    name: "checkout-77".into(),
                    controller: true,
                }],
            }),
            status: Some(wire::PodStatus {
                main: vec![wire::ContainerStatus {
                    name: "app".into(),
                    container_id: format!("containerd://{container}"),
                    last_state: Some(wire::ContainerState {
                        terminated: Some(wire::ContainerStateTerminated {
                            container_id: format!("containerd://former-{container}"),
                        }),
                    }),
                    ..wire::ContainerStatus::default()
                }],
                ..wire::PodStatus::default()
            }),
        }
    }

    #[tokio::test]
    async fn the_stream_tells_of_pods_as_they_come_and_go() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("pods.sock");
        let kubelet = FakeKubelet::start(&socket, vec![pod("1", "a")]);
        let options = SourceOptions {
            only: Some(SourceKind::PodInfo),
            podinfo_sockets: vec!["/nonexistent/kubelet.sock".into(), socket],
            ..SourceOptions::default()
        };
        let source = sources(&options).remove(0);
        assert!(source.is_there());
        let wanted = Notify::new();
        let mut changes = source.changes(&wanted);
        let mut next =
            async || timeout(Duration::from_secs(60), changes.next()).await.unwrap().unwrap().unwrap();

        let Change::All(pods) = next().await else { panic!("the first is all pods") };
        assert_eq!((pods.len(), pods[0].name.as_str(), pods[0].denied), (1, "pod-1", true));
        assert_eq!(pods[0].workload.as_ref().unwrap().name, "checkout");
        let ids: Vec<_> = pods[0].containers.iter().map(|container| container.id.as_str()).collect();
        assert_eq!(ids, ["a", "former-a"]);

        // Whatever number the event has: the pod is taken in at once, and the list says who is there.
        kubelet.change(vec![pod("1", "a"), pod("2", "b")], 0, &pod("2", "b"));
        while next().await != Change::Set(Pod::from(Told::from(pod("2", "b")))) {}
        loop {
            match next().await {
                Change::All(pods) if pods.len() == 2 => break,
                _ => {}
            }
        }
        // Of a deleted pod there are only names.
        let mut bare = pod("1", "a");
        bare.status = None;
        let metadata = bare.metadata.as_mut().unwrap();
        metadata.labels.clear();
        metadata.annotations.clear();
        kubelet.change(vec![pod("2", "b")], 2, &bare);
        loop {
            match next().await {
                Change::All(pods) if pods.len() == 1 && pods[0].uid == "2" => break,
                Change::Set(pod) => assert!(!pod.labels.is_empty(), "{pod:?}"),
                _ => {}
            }
        }
        let lists = kubelet.0.lock().unwrap().lists;
        assert!(lists <= 6, "{lists} lists for two events");
    }

    #[tokio::test]
    async fn a_socket_that_is_not_there_or_no_kubelets_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("pods.sock");
        let first = async |socket: &std::path::Path| {
            let options =
                SourceOptions { podinfo_sockets: vec![socket.to_owned()], ..SourceOptions::default() };
            let (source, wanted) = (PodInfo::new(&options), Notify::new());
            source.changes(&wanted).next().await.unwrap().unwrap_err().to_string()
        };
        assert!(first(&socket).await.contains("there is no socket at"));
        let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
        let (_, health) = tonic_health::server::health_reporter();
        tokio::spawn(Server::builder().add_service(health).serve_with_incoming(incoming));
        let error = first(&socket).await;
        assert!(error.contains("Unimplemented"), "{error}");
    }
}
