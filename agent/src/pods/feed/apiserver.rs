//! A watch at the API server for the pods of this node. It costs the API server a stream per node, so the feeds of the
//! kubelet take precedence.

use futures::stream::{self, BoxStream, StreamExt as _};
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod as ApiPod};
use kube::{
    Api, Client, Config,
    runtime::watcher::{self, Event, watcher},
};
use tokio::sync::Notify;

use super::{
    PodChange, PodFeed, PodFeedError, PodFeedKind, PodFeedOptions, PodList,
    error::{quote, root_cause},
};
use crate::pods::model::{Pod, ReportedPod};

const AT: &str = "the API server";
const RBAC: &str = "apiGroups [\"\"], resources [\"pods\"], verbs [\"list\", \"watch\"]";
/// Pods in one page of the first list.
const PAGE_SIZE: u32 = 250;

/// A watch for the pods of one node.
pub(super) struct ApiServer {
    node: String,
    /// The user has named this feed.
    required: bool,
    is_present: bool,
}

impl ApiServer {
    pub(super) fn new(options: &PodFeedOptions) -> Self {
        Self {
            node: options.node.clone(),
            required: options.only == Some(PodFeedKind::ApiServer),
            is_present: options.apiserver,
        }
    }

    async fn client(&self) -> Result<Client, PodFeedError> {
        if !self.required && !self.is_present {
            return Err(PodFeedError::Absent(
                "this is no pod (KUBERNETES_SERVICE_HOST is not set), and KUBECONFIG names no cluster".into(),
            ));
        }
        let unreachable = |reason: String| PodFeedError::Unreachable { at: AT.into(), reason };
        let config = Config::infer().await.map_err(|error| unreachable(error.to_string()))?;
        Client::try_from(config).map_err(|error| unreachable(error.to_string()))
    }

    fn watch(&self, client: Client) -> BoxStream<'static, watcher::Result<Event<ApiPod>>> {
        let config =
            watcher::Config::default().fields(&format!("spec.nodeName={}", self.node)).page_size(PAGE_SIZE);
        watcher(Api::<ApiPod>::all(client), config).boxed()
    }
}

impl PodFeed for ApiServer {
    fn kind(&self) -> PodFeedKind {
        PodFeedKind::ApiServer
    }

    fn is_present(&self) -> bool {
        self.is_present
    }

    fn changes<'a>(&'a self, _requested: &'a Notify) -> BoxStream<'a, Result<PodChange, PodFeedError>> {
        // The inner None stands before the first item; the outer None after an error ends the stream.
        stream::unfold(Some(None), move |session| async move {
            let mut events = match session? {
                Some(events) => events,
                None => match self.client().await {
                    Ok(client) => self.watch(client),
                    Err(error) => return Some((Err(error), None)),
                },
            };
            let next = next(&mut events).await;
            let events = next.is_ok().then_some(Some(events));
            Some((next, events))
        })
        .boxed()
    }
}

/// Returns the next complete change. A list counts when its last page has arrived.
async fn next(
    events: &mut BoxStream<'static, watcher::Result<Event<ApiPod>>>,
) -> Result<PodChange, PodFeedError> {
    let mut list = PodList::default();
    while let Some(event) = events.next().await {
        match event.map_err(|error| failed(&error))? {
            Event::Init => list = PodList::default(),
            Event::InitApply(pod) => list.push(Pod::from(ReportedPod::from(pod))),
            Event::InitDone => return Ok(PodChange::All(list)),
            Event::Apply(pod) => return Ok(PodChange::Set(Pod::from(ReportedPod::from(pod)))),
            Event::Delete(pod) => return Ok(PodChange::Gone(pod.metadata.uid.unwrap_or_default())),
        }
    }
    Err(PodFeedError::Ended { at: AT.into(), said: String::new() })
}

fn failed(error: &watcher::Error) -> PodFeedError {
    let status = match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status,
        error => {
            return PodFeedError::Unreachable { at: AT.into(), reason: root_cause(error) };
        }
    };
    let said = quote(&status.message);
    match status.code {
        403 => PodFeedError::Forbidden { at: AT.into(), said, rule: RBAC },
        code => PodFeedError::Status { at: AT.into(), status: code, said },
    }
}

impl From<ApiPod> for ReportedPod {
    fn from(pod: ApiPod) -> Self {
        let meta = pod.metadata;
        let status = pod.status.unwrap_or_default();
        let controller = meta
            .owner_references
            .unwrap_or_default()
            .into_iter()
            .find(|owner| owner.controller == Some(true));
        let of_state = |state: Option<ContainerState>| {
            state.and_then(|state| state.terminated).and_then(|ended| ended.container_id).unwrap_or_default()
        };
        let containers =
            [status.container_statuses, status.init_container_statuses, status.ephemeral_container_statuses]
                .into_iter()
                .flatten()
                .flatten()
                .flat_map(|status| {
                    let ContainerStatus { name, container_id, state, last_state, .. } = status;
                    [container_id.unwrap_or_default(), of_state(state), of_state(last_state)]
                        .map(|id| (name.clone(), id))
                })
                .collect();
        Self {
            uid: meta.uid.unwrap_or_default(),
            namespace: meta.namespace.unwrap_or_default(),
            name: meta.name.unwrap_or_default(),
            labels: meta.labels.unwrap_or_default(),
            labels_left_out: 0,
            annotations: meta.annotations.unwrap_or_default(),
            controller: controller.map(|owner| (owner.kind, owner.name)),
            containers,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, Mutex},
        time::Duration,
    };

    use axum::{
        Router,
        body::{Body, Bytes},
        extract::{RawQuery, State},
        http::StatusCode,
        response::{IntoResponse as _, Response},
        routing::get,
    };
    use tokio::{net::TcpListener, sync::mpsc, time::timeout};
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;
    use crate::pods::feed::json::read_pods;

    type Lines = mpsc::Receiver<Result<Bytes, std::io::Error>>;

    /// Lists the real pods, then streams the given lines; or refuses all requests.
    #[derive(Clone)]
    struct FakeServer {
        queries: Arc<Mutex<Vec<String>>>,
        lines: Arc<Mutex<Option<Lines>>>,
        refuses: bool,
    }

    async fn pods(State(server): State<FakeServer>, RawQuery(query): RawQuery) -> Response {
        let query = query.unwrap_or_default();
        server.queries.lock().unwrap().push(query.clone());
        if server.refuses {
            let status = r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure",
                "message":"pods is forbidden: User \"gannet\" cannot list","reason":"Forbidden","code":403}"#;
            return (StatusCode::FORBIDDEN, status).into_response();
        }
        if query.contains("watch=true") {
            let lines = server.lines.lock().unwrap().take().unwrap();
            return Body::from_stream(ReceiverStream::new(lines)).into_response();
        }
        let text = include_str!("../../../tests/data/kubelet-pods-1.20.2.json");
        text.replacen("\"metadata\":{}", "\"metadata\":{\"resourceVersion\":\"7\"}", 1).into_response()
    }

    async fn start(refuses: bool) -> (FakeServer, mpsc::Sender<Result<Bytes, std::io::Error>>, Client) {
        let (sender, lines) = mpsc::channel(8);
        let server =
            FakeServer { queries: Arc::default(), lines: Arc::new(Mutex::new(Some(lines))), refuses };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().route("/api/v1/pods", get(pods)).with_state(server.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        let client = Client::try_from(Config::new(url.parse().unwrap())).unwrap();
        (server, sender, client)
    }

    fn feed() -> ApiServer {
        ApiServer::new(&PodFeedOptions { node: "worker-1".into(), ..PodFeedOptions::default() })
    }

    #[tokio::test]
    async fn only_this_nodes_pods_are_listed_and_watched() {
        let (server, lines, client) = start(false).await;
        let mut events = feed().watch(client);
        let mut next_change =
            async || timeout(Duration::from_secs(60), next(&mut events)).await.unwrap().unwrap();
        let PodChange::All(PodList { pods, .. }) = next_change().await else {
            panic!("the first is all pods")
        };
        assert_eq!(pods.len(), 5);
        let event = |kind: &str, uid: &str| {
            let text = format!(
                r#"{{"type":"{kind}","object":{{"kind":"Pod","apiVersion":"v1","metadata":{{"name":"new",
                    "namespace":"shop","uid":"{uid}","resourceVersion":"8"}}}}}}"#
            );
            Ok(Bytes::from(text.replace('\n', " ") + "\n"))
        };
        lines.send(event("ADDED", "u1")).await.unwrap();
        lines.send(event("DELETED", "u1")).await.unwrap();
        let PodChange::Set(pod) = next_change().await else { panic!("a pod is new") };
        assert_eq!((pod.namespace.as_str(), pod.name.as_str()), ("shop", "new"));
        assert_eq!(next_change().await, PodChange::Gone("u1".into()));
        // The API server filters by node.
        let queries = server.queries.lock().unwrap().clone();
        assert!(
            queries.iter().all(|query| query.contains("fieldSelector=spec.nodeName%3Dworker-1")),
            "{queries:?}"
        );
    }

    #[tokio::test]
    async fn an_error_names_the_missing_right() {
        let (_server, _lines, client) = start(true).await;
        let error = next(&mut feed().watch(client)).await.unwrap_err().to_string();
        assert!(error.contains("[\"pods\"]") && error.contains("cannot list"), "{error}");
    }

    #[tokio::test]
    async fn outside_of_a_cluster_the_feed_is_absent() {
        let requested = Notify::new();
        let error = feed().changes(&requested).next().await.unwrap().unwrap_err();
        assert!(matches!(error, PodFeedError::Absent(_)), "{error}");
    }

    #[test]
    fn the_api_server_and_the_kubelet_report_equal_pods() {
        let text = include_str!("../../../tests/data/kubelet-pods-1.20.2.json");
        let list: k8s_openapi::List<ApiPod> = serde_json::from_str(text).unwrap();
        let pods: Vec<Pod> = list.items.into_iter().map(|pod| Pod::from(ReportedPod::from(pod))).collect();
        assert_eq!(pods, read_pods(text.as_bytes()).unwrap().pods);
    }
}
