//! Rules as custom resources, on a small API server with versions, conflicts and watches.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path as UrlPath, Query, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::{get, patch, post},
};
use futures::stream;
use gannet_collector::{Collector, Config, RulesLocation, custom_resource};
use gannet_proto::control::{GetTriggersRequest, ListScopesRequest, SetTriggersRequest};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{
    fleet::Agent,
    support::{config_with, eventually},
    triggers::{one, triggers},
};

#[derive(Default)]
struct Objects {
    version: u64,
    /// Objects by kind and name.
    there: BTreeMap<(String, String), Value>,
    /// Watch events: version, kind, event.
    events: Vec<(u64, String, Value)>,
}

#[derive(Clone)]
struct Api {
    objects: Arc<Mutex<Objects>>,
    changed: watch::Sender<u64>,
}

type Answer = (StatusCode, Json<Value>);

fn failure(code: StatusCode, reason: &str) -> Answer {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code.as_u16(), "message": reason,
    });
    (code, Json(status))
}

impl Api {
    fn new() -> Self {
        Self { objects: Arc::default(), changed: watch::Sender::new(0) }
    }

    /// Writes an object as this client. An unchanged object makes no event.
    fn put(&self, kind: &str, mut object: Value, manager: &str) -> Value {
        let mut objects = self.objects.lock().unwrap();
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let key = (kind.to_owned(), name.clone());
        let before = objects.there.get(&key).cloned();
        let metadata = &mut object["metadata"];
        metadata["uid"] = json!(format!("uid-{name}"));
        metadata["namespace"] = json!("gannet");
        metadata["managedFields"] = json!([{ "manager": manager, "operation": "Update" }]);
        if let Some(before) = &before {
            metadata["resourceVersion"] = before["metadata"]["resourceVersion"].clone();
            if *before == object {
                return object;
            }
        }
        objects.version += 1;
        object["metadata"]["resourceVersion"] = json!(objects.version.to_string());
        let event = json!({ "type": if before.is_some() { "MODIFIED" } else { "ADDED" }, "object": object });
        let version = objects.version;
        objects.events.push((version, kind.to_owned(), event));
        objects.there.insert(key, object.clone());
        self.changed.send_replace(version);
        object
    }

    fn get(&self, kind: &str, name: &str) -> Option<Value> {
        self.objects.lock().unwrap().there.get(&(kind.to_owned(), name.to_owned())).cloned()
    }

    fn delete(&self, kind: &str, name: &str) -> Option<Value> {
        let mut objects = self.objects.lock().unwrap();
        let object = objects.there.remove(&(kind.to_owned(), name.to_owned()))?;
        objects.version += 1;
        let version = objects.version;
        objects.events.push((version, kind.to_owned(), json!({ "type": "DELETED", "object": object })));
        self.changed.send_replace(version);
        Some(object)
    }

    /// Applies a TriggerRule as `kubectl apply` does.
    fn apply(&self, name: &str, spec: &Value) {
        let mut object = self.get("triggerrules", name).unwrap_or_else(|| {
            json!({ "apiVersion": "gannet.dev/v1alpha1", "kind": "TriggerRule", "metadata": { "name": name } })
        });
        object["spec"] = spec.clone();
        self.put("triggerrules", object, "kubectl");
    }

    fn status(&self, name: &str) -> Value {
        self.get("triggerrules", name).map_or(Value::Null, |object| object["status"].clone())
    }

    /// Returns the reasons of the Events about a TriggerRule, in order.
    fn told(&self, name: &str) -> Vec<String> {
        let objects = self.objects.lock().unwrap();
        let mut events: Vec<&Value> = objects
            .there
            .iter()
            .filter(|((kind, _), event)| kind == "events" && event["regarding"]["name"] == name)
            .map(|(_, event)| event)
            .collect();
        events.sort_by_key(|event| event["eventTime"].as_str());
        events.iter().map(|event| event["reason"].as_str().unwrap().to_owned()).collect()
    }

    async fn serve(&self, dir: &Path) -> PathBuf {
        // The group does not matter here, because the kinds have different names.
        let router = Router::new()
            .route("/api/v1/namespaces/gannet/{kind}", get(list).post(create))
            .route("/api/v1/namespaces/gannet/{kind}/{name}", get(read).put(replace))
            .route("/apis/gannet.dev/v1alpha1/namespaces/gannet/{kind}", get(list).post(create))
            .route(
                "/apis/gannet.dev/v1alpha1/namespaces/gannet/{kind}/{name}",
                get(read).put(replace).delete(remove),
            )
            .route("/apis/gannet.dev/v1alpha1/namespaces/gannet/{kind}/{name}/status", patch(patch_status))
            .route("/apis/events.k8s.io/v1/namespaces/gannet/{kind}", post(create))
            .with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        kubeconfig(dir, &server)
    }
}

/// Writes a kubeconfig file for this server.
pub fn kubeconfig(dir: &Path, server: &str) -> PathBuf {
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{ "name": "c", "cluster": { "server": server } }],
        "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u", "namespace": "gannet" } }],
        "users": [{ "name": "u", "user": {} }],
    });
    let path = dir.join("kubeconfig.json");
    std::fs::write(&path, kubeconfig.to_string()).unwrap();
    path
}

async fn list(
    State(api): State<Api>,
    UrlPath(kind): UrlPath<String>,
    Query(params): Query<BTreeMap<String, String>>,
) -> Response {
    if params.get("watch").is_none_or(|watch| watch != "true") {
        let objects = api.objects.lock().unwrap();
        let items: Vec<&Value> =
            objects.there.iter().filter(|((k, _), _)| *k == kind).map(|(_, object)| object).collect();
        let list = json!({
            "apiVersion": "v1", "kind": "List", "metadata": { "resourceVersion": objects.version.to_string() },
            "items": items,
        });
        return Json(list).into_response();
    }
    let from: u64 = params.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
    let changed = api.changed.subscribe();
    let events = stream::unfold((api, changed, from, kind), |(api, mut changed, from, kind)| async move {
        loop {
            changed.mark_unchanged();
            let next = {
                let objects = api.objects.lock().unwrap();
                objects.events.iter().find(|(version, k, _)| *version > from && *k == kind).cloned()
            };
            if let Some((version, _, event)) = next {
                let line = Bytes::from(format!("{event}\n"));
                return Some((Ok::<_, std::io::Error>(line), (api, changed, version, kind)));
            }
            if changed.changed().await.is_err() {
                return None;
            }
        }
    });
    Body::from_stream(events).into_response()
}

async fn create(State(api): State<Api>, UrlPath(kind): UrlPath<String>, Json(object): Json<Value>) -> Answer {
    if api.get(&kind, object["metadata"]["name"].as_str().unwrap()).is_some() {
        return failure(StatusCode::CONFLICT, "AlreadyExists");
    }
    (StatusCode::CREATED, Json(api.put(&kind, object, "gannet-collector")))
}

async fn read(State(api): State<Api>, UrlPath((kind, name)): UrlPath<(String, String)>) -> Answer {
    match api.get(&kind, &name) {
        Some(object) => (StatusCode::OK, Json(object)),
        None => failure(StatusCode::NOT_FOUND, "NotFound"),
    }
}

async fn replace(
    State(api): State<Api>,
    UrlPath((kind, name)): UrlPath<(String, String)>,
    Json(object): Json<Value>,
) -> Answer {
    let Some(there) = api.get(&kind, &name) else { return failure(StatusCode::NOT_FOUND, "NotFound") };
    if there["metadata"]["resourceVersion"] != object["metadata"]["resourceVersion"] {
        return failure(StatusCode::CONFLICT, "Conflict");
    }
    (StatusCode::OK, Json(api.put(&kind, object, "gannet-collector")))
}

async fn remove(State(api): State<Api>, UrlPath((kind, name)): UrlPath<(String, String)>) -> Answer {
    match api.delete(&kind, &name) {
        Some(object) => (StatusCode::OK, Json(object)),
        None => failure(StatusCode::NOT_FOUND, "NotFound"),
    }
}

async fn patch_status(
    State(api): State<Api>,
    UrlPath((kind, name)): UrlPath<(String, String)>,
    body: Bytes,
) -> Answer {
    fn merge(into: &mut Value, from: &Value) {
        let Some(fields) = from.as_object() else {
            *into = from.clone();
            return;
        };
        if !into.is_object() {
            *into = json!({});
        }
        for (name, value) in fields {
            if value.is_null() {
                into.as_object_mut().unwrap().remove(name);
            } else {
                merge(&mut into[name], value);
            }
        }
    }
    let Some(mut object) = api.get(&kind, &name) else { return failure(StatusCode::NOT_FOUND, "NotFound") };
    let patch: Value = serde_json::from_slice(&body).unwrap();
    merge(&mut object["status"], &patch["status"]);
    let manager = object["metadata"]["managedFields"][0]["manager"].as_str().unwrap().to_owned();
    (StatusCode::OK, Json(api.put(&kind, object, &manager)))
}

fn on(dir: &Path, name: &str, kubeconfig: &Path) -> Config {
    config_with(&dir.join(name), |config| {
        config.rules_store = RulesLocation::Kubernetes(None);
        config.kubeconfig = Some(kubeconfig.to_owned());
    })
}

async fn next_ids(agent: &mut Agent) -> Vec<String> {
    let set = agent.rules().await;
    agent.apply(&set, Vec::new()).await;
    set.rules.into_iter().map(|rule| rule.id).collect()
}

#[tokio::test]
async fn resources_and_calls_change_one_shared_rule_store() {
    let dir = tempfile::tempdir().unwrap();
    let api = Api::new();
    let kubeconfig = api.serve(dir.path()).await;
    // Two resources exist before any collector: a valid one and an invalid one.
    api.apply("applied", &json!({ "match": { "comm": ["shop"] } }));
    api.apply("wrong", &json!({ "match": { "com": ["shop"] } }));

    let left = Collector::start(on(dir.path(), "left", &kubeconfig)).await.unwrap();
    let right = Collector::start(on(dir.path(), "right", &kubeconfig)).await.unwrap();
    let (mut to_left, mut to_right) = (triggers(&left).await, triggers(&right).await);
    let mut agent = Agent::connect(&left, "n1", "").await;
    assert_eq!(next_ids(&mut agent).await, ["applied"]);
    eventually("the valid one shows its nodes", || async {
        let status = api.status("applied");
        status["applied"] == 1 && status["conditions"][0]["status"] == "True"
    })
    .await;
    eventually("the invalid one shows its fault", || async {
        let message = api.status("wrong")["conditions"][0]["message"].clone();
        message.as_str().is_some_and(|words| words.contains("match.com"))
    })
    .await;
    let scope =
        to_left.get_triggers(GetTriggersRequest::default()).await.unwrap().into_inner().scope.unwrap();
    assert_eq!((scope.rules.len(), scope.changed_by.as_str()), (1, "Kubernetes: kubectl"));

    eventually("the Events are there", || async {
        let told = api.told("applied");
        told.iter().any(|reason| reason == "Accepted")
            && told.iter().any(|reason| reason == "Applied")
            && api.told("wrong").iter().any(|reason| reason == "Invalid")
    })
    .await;

    // A call at one collector makes a resource and reaches the nodes of the other.
    let request = SetTriggersRequest { scope: "team".into(), ..one("called") };
    to_right.set_triggers(request).await.unwrap();
    assert_eq!(next_ids(&mut agent).await, ["applied", "called"]);
    eventually("the resource is there", || async { api.get("triggerrules", "called").is_some() }).await;
    let called = api.get("triggerrules", "called").unwrap();
    assert_eq!(called["metadata"]["labels"]["gannet.dev/scope"], "team");
    assert_eq!(called["spec"], json!({ "match": { "comm": ["shop"] } }));

    // What only a node can refuse: the API server and the collector accept it, its status says that the node does not.
    let condition = |name: &str, kind: &str| {
        let status = api.status(name);
        let found = status["conditions"].as_array().unwrap().iter().find(|one| one["type"] == kind).cloned();
        found.unwrap_or_default()
    };
    eventually("it is in force", || async { condition("applied", "Applied")["status"] == "True" }).await;
    api.apply("applied", &json!({ "match": { "comm": ["shop"] }, "capture": { "hz": 18 } }));
    let set = agent.rules().await;
    agent.reject(&set, "capture.hz").await;
    eventually("the refusal shows", || async {
        let (applied, accepted) = (condition("applied", "Applied"), condition("applied", "Accepted"));
        let message = applied["message"].as_str().unwrap_or_default();
        accepted["status"] == "True"
            && applied["reason"] == "Rejected"
            && message.contains("capture.hz: too much")
    })
    .await;
    // The node rejected the whole set, so the other rule is not in force in its newest form either.
    eventually("the refusal shows at the other rule too", || async {
        condition("called", "Applied")["reason"] == "Rejected"
    })
    .await;
    api.apply("applied", &json!({ "match": { "comm": ["shop"] }, "capture": { "hz": 17 } }));
    assert_eq!(next_ids(&mut agent).await, ["applied", "called"]);
    eventually("it is in force again", || async { condition("applied", "Applied")["status"] == "True" })
        .await;

    // A broken resource leaves the rule in force. Repairs and removals take effect.
    api.apply("applied", &json!({ "match": { "comm": ["shop"] }, "capture": { "hz": 5000 } }));
    eventually("it is not accepted any more", || async {
        api.status("applied")["conditions"][0]["status"] == "False"
    })
    .await;
    agent.receives_nothing().await;
    api.apply("applied", &json!({ "match": { "comm": ["shop", "cart"] } }));
    let set = agent.rules().await;
    agent.apply(&set, Vec::new()).await;
    assert_eq!(set.rules[0].r#match.as_ref().unwrap().comm, ["shop", "cart"]);
    api.delete("triggerrules", "called").unwrap();
    let set = agent.rules().await;
    agent.apply(&set, Vec::new()).await;
    assert_eq!((set.rules.len(), set.rules[0].id.as_str()), (1, "applied"));
    eventually("both collectors hold the same", || async {
        let list = |client: &crate::triggers::Triggers| {
            let mut client = client.clone();
            async move { client.list_scopes(ListScopesRequest {}).await.unwrap().into_inner() }
        };
        let (left, right) = (list(&to_left).await, list(&to_right).await);
        left == right && left.scopes.len() == 1
    })
    .await;

    // The invalid resource stays, and a node that changes collectors needs nothing.
    assert!(api.get("triggerrules", "wrong").is_some());
    drop(agent);
    let mut agent = Agent::connect(&right, "n1", &set.digest).await;
    agent.receives_nothing().await;
    left.shutdown().await;
    right.shutdown().await;
}

#[tokio::test]
async fn no_rules_are_sent_before_the_api_server_answers() {
    let dir = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let kubeconfig = kubeconfig(dir.path(), &format!("http://127.0.0.1:{port}"));
    let running = Collector::start(on(dir.path(), "data", &kubeconfig)).await.unwrap();
    let status = triggers(&running).await.set_triggers(one("a")).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    let mut agent = Agent::connect(&running, "n1", "some-digest").await;
    agent.receives_nothing().await;
    let ready = crate::support::get(running.http_addr, "/readyz").await;
    assert!(ready.status == 503 && ready.text().contains("cannot read the rules"), "{}", ready.text());
    running.shutdown().await;
}

#[test]
fn the_shipped_definition_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm/gannet/files/triggerrules.yaml");
    let shipped = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        shipped == custom_resource().unwrap(),
        "run: gannet-collector crd > helm/gannet/files/triggerrules.yaml"
    );
}
