//! The kubelet's stream of pods, on a socket of the node (Kubernetes 1.36 and later).
//!
//! The messages come from `proto/kubelet/pods/v1alpha1/pods.proto`. The numbers of the event types differ between Kubernetes
//! versions, and so does the socket's path. So the agent ignores the type of an event: it applies the pod in the event as it
//! is, and then requests the list, because only a list shows reliably which pods are gone.

use std::{os::unix::fs::FileTypeExt as _, path::PathBuf, time::Duration};

use futures::stream::{self, BoxStream, StreamExt as _};
use gannet_proto::foreign::kubelet as wire;
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
    PodChange, PodFeed, PodFeedError, PodFeedKind, PodFeedOptions, PodList,
    error::{quote, root_cause},
};
use crate::pods::model::{Pod, ReportedPod};

/// Packages that may contain the service, the present one first. The generated client knows only the first.
const PACKAGES: [&str; 3] = ["v1alpha1", "v1beta1", "v1"];
/// Maximum size of a message. A list contains complete pods.
const MAX_BYTES: usize = 64 << 20;
/// Time limit for an answer.
const TIMEOUT: Duration = Duration::from_secs(20);
/// How long after an event the agent requests the list. Further events in this time cause no further list.
const DEBOUNCE: Duration = Duration::from_secs(2);
/// How often the agent requests the list without events.
const LIST_PAUSE: Duration = Duration::from_secs(60);

/// The kubelet's stream.
pub(super) struct PodInfo {
    sockets: Vec<PathBuf>,
}

impl PodInfo {
    pub(super) fn new(options: &PodFeedOptions) -> Self {
        Self { sockets: options.podinfo_sockets.clone() }
    }

    fn socket(&self) -> Option<&PathBuf> {
        self.sockets
            .iter()
            .find(|path| std::fs::metadata(path).is_ok_and(|found| found.file_type().is_socket()))
    }

    async fn open(&self) -> Result<Session, PodFeedError> {
        let Some(socket) = self.socket() else {
            let names: Vec<_> = self.sockets.iter().map(|path| path.display().to_string()).collect();
            return Err(PodFeedError::Absent(format!("there is no socket at {}", names.join(" or "))));
        };
        let at = format!("the kubelet at {}", socket.display());
        let unreachable = |error: &tonic::transport::Error| PodFeedError::Unreachable {
            at: at.clone(),
            reason: root_cause(error),
        };
        let channel = Endpoint::from_shared(format!("unix:{}", socket.display()))
            .map_err(|error| unreachable(&error))?
            .connect_timeout(TIMEOUT)
            .connect()
            .await
            .map_err(|error| unreachable(&error))?;
        let mut client = Grpc::new(channel).max_decoding_message_size(MAX_BYTES);
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

impl PodFeed for PodInfo {
    fn kind(&self) -> PodFeedKind {
        PodFeedKind::PodInfo
    }

    fn is_present(&self) -> bool {
        self.socket().is_some()
    }

    fn changes<'a>(&'a self, _requested: &'a Notify) -> BoxStream<'a, Result<PodChange, PodFeedError>> {
        // The inner None stands before the first item; the outer None after an error ends the stream.
        stream::unfold(Some(None::<Session>), move |session| async move {
            let mut session = match session? {
                Some(session) => session,
                None => match timeout(TIMEOUT, self.open()).await {
                    Ok(Ok(session)) => session,
                    Ok(Err(error)) => return Some((Err(error), None)),
                    Err(_) => {
                        let at = "the kubelet's socket".into();
                        let error = PodFeedError::Timeout { at, seconds: TIMEOUT.as_secs() };
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
    /// When to request the list next. At the beginning that is now.
    list_at: Instant,
}

impl Session {
    async fn next(&mut self) -> Result<PodChange, PodFeedError> {
        loop {
            if self.list_at <= Instant::now() {
                let Ok(list) = timeout(TIMEOUT, self.list()).await else {
                    return Err(PodFeedError::Timeout { at: self.at.clone(), seconds: TIMEOUT.as_secs() });
                };
                let list = list?;
                self.list_at = Instant::now() + LIST_PAUSE;
                return Ok(PodChange::All(list));
            }
            let event = tokio::select! {
                () = sleep_until(self.list_at) => continue,
                event = self.events.message() => event.map_err(|status| ended(&self.at, &status))?,
            };
            let Some(event) = event else {
                return Err(PodFeedError::Ended { at: self.at.clone(), said: String::new() });
            };
            if event.pod.is_empty() {
                // The event that ends the initial pods. The list shows them too.
                continue;
            }
            self.list_at = self.list_at.min(Instant::now() + DEBOUNCE);
            let pod = self.decode(&event.pod)?;
            // The event of a deleted pod may contain only its names. The store already has more than that.
            if !(pod.containers.is_empty() && pod.labels.is_empty() && !pod.denied) {
                return Ok(PodChange::Set(pod));
            }
        }
    }

    async fn list(&mut self) -> Result<PodList, PodFeedError> {
        self.client
            .ready()
            .await
            .map_err(|error| PodFeedError::Unreachable { at: self.at.clone(), reason: error.to_string() })?;
        let codec = ProstCodec::<wire::ListPodsRequest, wire::ListPodsResponse>::default();
        let answer = self
            .client
            .unary(Request::new(wire::ListPodsRequest {}), path(self.package, "ListPods"), codec)
            .await
            .map_err(|status| ended(&self.at, &status))?;
        answer.into_inner().pods.iter().map(|pod| self.decode(pod)).collect()
    }

    fn decode(&self, bytes: &[u8]) -> Result<Pod, PodFeedError> {
        let pod = wire::Pod::decode(bytes)
            .map_err(|error| PodFeedError::Invalid { at: self.at.clone(), reason: error.to_string() })?;
        Ok(Pod::from(ReportedPod::from(pod)))
    }
}

async fn watch(client: &mut Grpc<Channel>, package: &str) -> Result<Streaming<wire::WatchPodsEvent>, Status> {
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let codec = ProstCodec::<wire::WatchPodsRequest, wire::WatchPodsEvent>::default();
    let request = Request::new(wire::WatchPodsRequest {});
    Ok(client.server_streaming(request, path(package, "WatchPods"), codec).await?.into_inner())
}

fn path(package: &str, method: &str) -> PathAndQuery {
    // PROOF: both arguments are constants that form a valid path; a test requests each.
    PathAndQuery::try_from(format!("/{package}.Pods/{method}"))
        .unwrap_or_else(|_| PathAndQuery::from_static("/"))
}

fn ended(at: &str, status: &Status) -> PodFeedError {
    PodFeedError::Ended {
        at: at.to_owned(),
        said: format!(" ({:?}){}", status.code(), quote(status.message())),
    }
}

impl From<wire::Pod> for ReportedPod {
    fn from(pod: wire::Pod) -> Self {
        let wire::ObjectMeta { name, namespace, uid, labels, annotations, owner_references } =
            pod.metadata.unwrap_or_default();
        let status = pod.status.unwrap_or_default();
        let controller = owner_references.into_iter().find(|owner| owner.controller);
        let of_state = |state: Option<wire::ContainerState>| {
            state.and_then(|state| state.terminated).map_or_else(String::new, |ended| ended.container_id)
        };
        let containers = status
            .container_statuses
            .into_iter()
            .chain(status.init_container_statuses)
            .chain(status.ephemeral_container_statuses)
            .flat_map(|status| {
                let wire::ContainerStatus { name, state, last_state, container_id } = status;
                [container_id, of_state(state), of_state(last_state)].map(|id| (name.clone(), id))
            })
            .collect();
        Self {
            uid,
            namespace,
            name,
            labels,
            labels_left_out: 0,
            annotations,
            controller: controller.map(|owner| (owner.kind, owner.name)),
            containers,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, pin::Pin, sync::Arc};

    use futures::Stream;
    use parking_lot::Mutex;
    use tokio::{net::UnixListener, sync::mpsc};
    use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
    use tonic::{Response, transport::Server};
    use wire::pods_server::{Pods, PodsServer};

    use super::*;
    use crate::pods::feed::feeds;

    /// Serves `ListPods` and `WatchPods` of the package `v1alpha1`, as the kubelet does.
    #[derive(Clone)]
    struct FakeKubelet(Arc<Mutex<State>>);

    struct State {
        pods: Vec<wire::Pod>,
        watchers: Vec<mpsc::Sender<Result<wire::WatchPodsEvent, Status>>>,
        lists: usize,
    }

    #[tonic::async_trait]
    impl Pods for FakeKubelet {
        type WatchPodsStream = Pin<Box<dyn Stream<Item = Result<wire::WatchPodsEvent, Status>> + Send>>;

        async fn list_pods(
            &self,
            _: Request<wire::ListPodsRequest>,
        ) -> Result<Response<wire::ListPodsResponse>, Status> {
            let mut state = self.0.lock();
            state.lists += 1;
            let pods = state.pods.iter().map(prost::Message::encode_to_vec).collect();
            Ok(Response::new(wire::ListPodsResponse { pods }))
        }

        async fn watch_pods(
            &self,
            _: Request<wire::WatchPodsRequest>,
        ) -> Result<Response<Self::WatchPodsStream>, Status> {
            let (sender, receiver) = mpsc::channel(64);
            let mut state = self.0.lock();
            // The initial pods, then the event without a pod.
            let initial: Vec<_> = state
                .pods
                .iter()
                .map(|pod| wire::WatchPodsEvent { r#type: 1, pod: pod.encode_to_vec() })
                .chain([wire::WatchPodsEvent { r#type: 4, pod: Vec::new() }])
                .map(Ok)
                .collect();
            state.watchers.push(sender);
            Ok(Response::new(Box::pin(stream::iter(initial).chain(ReceiverStream::new(receiver)))))
        }
    }

    impl FakeKubelet {
        fn start(socket: &std::path::Path, pods: Vec<wire::Pod>) -> Self {
            let kubelet = Self(Arc::new(Mutex::new(State { pods, watchers: Vec::new(), lists: 0 })));
            let incoming = UnixListenerStream::new(UnixListener::bind(socket).unwrap());
            let service = PodsServer::new(kubelet.clone());
            tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
            kubelet
        }

        /// Replaces the pods, and sends an event with one of them to each watcher.
        fn change(&self, pods: Vec<wire::Pod>, number: i32, changed: &wire::Pod) {
            let mut state = self.0.lock();
            state.pods = pods;
            for watcher in &state.watchers {
                let event = wire::WatchPodsEvent { r#type: number, pod: changed.encode_to_vec() };
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
                labels: BTreeMap::from([("pod-template-hash".into(), "77".into())]),
                annotations: BTreeMap::from([("gannet.dev/profile".into(), "false".into())]),
                owner_references: vec![wire::OwnerReference {
                    kind: "ReplicaSet".into(),
                    name: "checkout-77".into(),
                    controller: true,
                }],
            }),
            status: Some(wire::PodStatus {
                container_statuses: vec![wire::ContainerStatus {
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
    async fn the_stream_reports_new_and_deleted_pods() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("pods.sock");
        let kubelet = FakeKubelet::start(&socket, vec![pod("1", "a")]);
        let options = PodFeedOptions {
            only: Some(PodFeedKind::PodInfo),
            podinfo_sockets: vec!["/nonexistent/kubelet.sock".into(), socket],
            ..PodFeedOptions::default()
        };
        let feed = feeds(&options).remove(0);
        assert!(feed.is_present());
        let requested = Notify::new();
        let mut changes = feed.changes(&requested);
        let mut next =
            async || timeout(Duration::from_secs(60), changes.next()).await.unwrap().unwrap().unwrap();

        let PodChange::All(PodList { pods, .. }) = next().await else { panic!("the first is all pods") };
        assert_eq!((pods.len(), pods[0].name.as_str(), pods[0].denied), (1, "pod-1", true));
        assert_eq!(pods[0].workload.as_ref().unwrap().name, "checkout");
        let ids: Vec<_> = pods[0].containers.iter().map(|container| container.id.as_str()).collect();
        assert_eq!(ids, ["a", "former-a"]);

        // Whatever the event type: the pod is applied at once, and the list shows which pods exist.
        kubelet.change(vec![pod("1", "a"), pod("2", "b")], 0, &pod("2", "b"));
        while next().await != PodChange::Set(Pod::from(ReportedPod::from(pod("2", "b")))) {}
        loop {
            match next().await {
                PodChange::All(PodList { pods, .. }) if pods.len() == 2 => break,
                _ => {}
            }
        }
        // The event of a deleted pod contains only names.
        let mut bare = pod("1", "a");
        bare.status = None;
        let metadata = bare.metadata.as_mut().unwrap();
        metadata.labels.clear();
        metadata.annotations.clear();
        kubelet.change(vec![pod("2", "b")], 2, &bare);
        loop {
            match next().await {
                PodChange::All(PodList { pods, .. }) if pods.len() == 1 && pods[0].uid == "2" => break,
                PodChange::Set(pod) => assert!(!pod.labels.is_empty(), "{pod:?}"),
                _ => {}
            }
        }
        let lists = kubelet.0.lock().lists;
        assert!(lists <= 6, "{lists} lists for two events");
    }

    #[tokio::test]
    async fn the_error_names_a_missing_or_foreign_socket() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("pods.sock");
        let first = async |socket: &std::path::Path| {
            let options =
                PodFeedOptions { podinfo_sockets: vec![socket.to_owned()], ..PodFeedOptions::default() };
            let (feed, requested) = (PodInfo::new(&options), Notify::new());
            feed.changes(&requested).next().await.unwrap().unwrap_err().to_string()
        };
        assert!(first(&socket).await.contains("there is no socket at"));
        let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
        let (_, health) = tonic_health::server::health_reporter();
        tokio::spawn(Server::builder().add_service(health).serve_with_incoming(incoming));
        let error = first(&socket).await;
        assert!(error.contains("Unimplemented"), "{error}");
    }
}
