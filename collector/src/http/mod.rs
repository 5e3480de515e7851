//! The page, the HTTP API, metrics and probes.

mod json;
// Its face is public in itself, so that it can be tested alone.
#[allow(unreachable_pub)]
mod page;

use std::{collections::HashMap, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Path, Query as UrlQuery, Request, State},
    http::{HeaderValue, StatusCode, header},
    middleware::{Next, from_fn, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::get,
};
use bytes::Bytes;
use serde_json::json;
use tonic::Code;

use crate::{
    auth::{Auth, Role},
    metrics::Metrics,
    query::{Query, QueryError, Selection, profile_id_from},
    store::{Store, StoreError},
    time,
    tls::Peer,
    triggers::Triggers,
};

/// What the handlers answer from.
#[derive(Clone)]
pub(crate) struct Face {
    pub(crate) query: Arc<Query>,
    pub(crate) store: Arc<Store>,
    pub(crate) triggers: Triggers,
    pub(crate) metrics: Metrics,
    pub(crate) auth: Arc<Auth>,
}

/// Everything that is served over HTTP.
pub(crate) fn router(face: Face) -> Router {
    let api = Router::new()
        .route("/labels", get(label_names))
        .route("/labels/{name}/values", get(label_values))
        .route("/series", get(series))
        .route("/profiles", get(profiles))
        .route("/profiles/{id}", get(profile))
        .route("/merge", get(merge))
        .route("/flamegraph", get(flamegraph))
        .route("/top", get(top))
        .route("/timeline", get(timeline))
        .route("/nodes", get(nodes))
        .route("/rules", get(rules))
        .route("/rollout", get(rollout))
        .fallback(|| async { Failure(StatusCode::NOT_FOUND, "there is no such path in /api/v1".into()) });
    Router::new()
        .nest("/api/v1", api)
        .route("/metrics", get(metrics))
        .merge(page::router())
        .layer(from_fn_with_state(face.clone(), known_clients))
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(readyz))
        .layer(from_fn(safe_headers))
        .with_state(face)
}

/// The same for who is on this machine: without a certificate, and by a local name only, so that a page elsewhere cannot
/// read it through somebody's browser.
pub(crate) fn local_router(face: Face) -> Router {
    router(Face { auth: Auth::open(), ..face }).layer(from_fn(local_name))
}

async fn local_name(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("");
    let name = if host.ends_with(']') { host } else { host.rsplit_once(':').map_or(host, |(name, _)| name) };
    if gannet_proto::connect::is_loopback(name) {
        return next.run(request).await;
    }
    Failure(StatusCode::FORBIDDEN, "--http-local answers to localhost only".to_owned()).into_response()
}

/// An error for people.
struct Failure(StatusCode, String);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, axum::Json(json!({ "error": self.1 }))).into_response()
    }
}

impl From<QueryError> for Failure {
    fn from(error: QueryError) -> Self {
        let status = match &error {
            QueryError::Bad(_) => StatusCode::BAD_REQUEST,
            QueryError::NotFound(_) => StatusCode::NOT_FOUND,
            QueryError::TooMuch(_) => StatusCode::UNPROCESSABLE_ENTITY,
            QueryError::Store(StoreError::Damaged(_)) => StatusCode::INTERNAL_SERVER_ERROR,
            QueryError::Busy(_) | QueryError::Store(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self(status, error.to_string())
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        let code = match status.code() {
            Code::InvalidArgument => StatusCode::BAD_REQUEST,
            Code::NotFound => StatusCode::NOT_FOUND,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self(code, status.message().to_owned())
    }
}

fn bad(text: String) -> Failure {
    Failure(StatusCode::BAD_REQUEST, text)
}

type Answer<T = axum::Json<serde_json::Value>> = Result<T, Failure>;
type Params = UrlQuery<HashMap<String, String>>;

/// The parameters of one request, each of which must be one that the path knows.
struct Asked(HashMap<String, String>);

const RANGE: [&str; 3] = ["query", "from", "until"];
const GRAPH: [&str; 8] =
    ["query", "from", "until", "profile_id", "type", "base_query", "base_from", "base_until"];

impl Asked {
    fn new(params: Params, known: &[&str], and: &[&str]) -> Result<Self, Failure> {
        let stranger = params.0.keys().find(|k| !known.contains(&k.as_str()) && !and.contains(&k.as_str()));
        match stranger {
            None => Ok(Self(params.0)),
            Some(stranger) => {
                let known: Vec<&str> = known.iter().chain(and).copied().collect();
                Err(bad(format!("parameter `{stranger}` is not known here; there are: {}", known.join(", "))))
            }
        }
    }

    fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    fn number<T: std::str::FromStr + Default>(&self, name: &str) -> Result<T, Failure> {
        match self.text(name) {
            "" => Ok(T::default()),
            text => {
                text.parse().map_err(|_| bad(format!("parameter {name}: `{text}` is not a number that fits")))
            }
        }
    }

    fn moment(&self, name: &str) -> Result<Option<u64>, Failure> {
        match self.text(name) {
            "" => Ok(None),
            text => {
                let at =
                    time::parse(text, time::now_ms()).map_err(|e| bad(format!("parameter {name}: {e}")))?;
                Ok(Some(at))
            }
        }
    }

    fn selection(&self) -> Result<Selection, Failure> {
        Ok(Selection::new(
            self.text("query"),
            self.moment("from")?,
            self.moment("until")?,
            self.text("profile_id"),
        )?)
    }

    /// Given by any of its three parameters; what is not given is as in the main selection.
    fn base(&self) -> Result<Option<Selection>, Failure> {
        if ["base_query", "base_from", "base_until"].iter().all(|name| self.text(name).is_empty()) {
            return Ok(None);
        }
        let or_main =
            |base: &'static str, main: &'static str| if self.text(base).is_empty() { main } else { base };
        let query = self.text(or_main("base_query", "query"));
        let from = self.moment(or_main("base_from", "from"))?;
        let until = self.moment(or_main("base_until", "until"))?;
        Ok(Some(Selection::new(query, from, until, "").map_err(|e| bad(format!("base: {e}")))?))
    }
}

fn download(name: &str, bytes: Bytes) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{name}.pb.gz\"")),
    ];
    (headers, Body::from(bytes)).into_response()
}

async fn label_names(State(face): State<Face>, params: Params) -> Answer {
    let asked = Asked::new(params, &RANGE, &[])?;
    Ok(axum::Json(json!({ "names": face.query.label_names(&asked.selection()?)? })))
}

async fn label_values(State(face): State<Face>, Path(name): Path<String>, params: Params) -> Answer {
    let asked = Asked::new(params, &RANGE, &[])?;
    Ok(axum::Json(json!({ "values": face.query.label_values(&asked.selection()?, &name)? })))
}

async fn series(State(face): State<Face>, params: Params) -> Answer {
    let asked = Asked::new(params, &RANGE, &[])?;
    Ok(axum::Json(json::series(&face.query.series(asked.selection()?).await?)))
}

async fn profiles(State(face): State<Face>, params: Params) -> Answer {
    let asked = Asked::new(params, &RANGE, &["limit", "page_token"])?;
    let (limit, token) = (asked.number("limit")?, asked.text("page_token").to_owned());
    let (profiles, next) = face.query.list(asked.selection()?, limit, token).await?;
    Ok(axum::Json(json::profiles(&profiles, &next)))
}

async fn profile(State(face): State<Face>, Path(id): Path<String>, params: Params) -> Answer<Response> {
    Asked::new(params, &[], &[])?;
    let id = profile_id_from(&id)?;
    let bytes = face.query.profile(id).await?;
    Ok(download(&id.to_string(), bytes))
}

async fn merge(State(face): State<Face>, params: Params) -> Answer<Response> {
    let asked = Asked::new(params, &RANGE, &["profile_id", "type"])?;
    let bytes = face.query.merge(&asked.selection()?, asked.text("type"), &Arc::default()).await?;
    Ok(download("gannet", bytes))
}

async fn flamegraph(State(face): State<Face>, params: Params) -> Answer<Response> {
    let asked = Asked::new(params, &GRAPH, &["max_nodes"])?;
    let (of, base, max_nodes) = (asked.selection()?, asked.base()?, asked.number("max_nodes")?);
    let graph = face.query.flamegraph(&of, base.as_ref(), asked.text("type"), max_nodes).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], json::flamegraph(&graph)).into_response())
}

async fn top(State(face): State<Face>, params: Params) -> Answer {
    let asked = Asked::new(params, &GRAPH, &["limit"])?;
    let (of, base, limit) = (asked.selection()?, asked.base()?, asked.number("limit")?);
    Ok(axum::Json(json::top(&face.query.top(&of, base.as_ref(), asked.text("type"), limit).await?)))
}

async fn timeline(State(face): State<Face>, params: Params) -> Answer {
    let asked = Asked::new(params, &RANGE, &["type", "step_ms"])?;
    let step = if asked.text("step_ms").is_empty() { None } else { Some(asked.number("step_ms")?) };
    let timeline = face.query.timeline(asked.selection()?, asked.text("type").to_owned(), step).await?;
    Ok(axum::Json(json::timeline(&timeline)))
}

async fn nodes(State(face): State<Face>, params: Params) -> Answer {
    Asked::new(params, &[], &[])?;
    let newest = face.triggers.rules.revision(0).ok().flatten().map_or(0, |(revision, _)| revision);
    Ok(axum::Json(json::nodes(&face.triggers.fleet.nodes(), newest)))
}

async fn rules(State(face): State<Face>, params: Params) -> Answer {
    Asked::new(params, &[], &[])?;
    let (scopes, revision) = face.triggers.rules.scopes().map_err(tonic::Status::from)?;
    Ok(axum::Json(json::scopes(&scopes, revision)))
}

async fn rollout(State(face): State<Face>, params: Params) -> Answer {
    let asked = Asked::new(params, &["revision"], &[])?;
    Ok(axum::Json(json::rollout(&face.triggers.rollout(asked.number("revision")?)?)))
}

async fn metrics(State(face): State<Face>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], face.metrics.text()).into_response()
}

/// Everything that a caller relies on works.
async fn readyz(State(face): State<Face>) -> Response {
    let mut wrong = Vec::new();
    if let Err(error) = face.triggers.rules.health() {
        wrong.push(error.to_string());
    }
    let store = Arc::clone(&face.store);
    match tokio::task::spawn_blocking(move || store.index().known([])).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => wrong.push(error.to_string()),
        Err(_) => wrong.push(StoreError::Ended.to_string()),
    }
    if wrong.is_empty() {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, wrong.join("\n") + "\n").into_response()
    }
}

/// Where clients must be known, those that are not learn so in words.
async fn known_clients(State(face): State<Face>, request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<ConnectInfo<Peer>>().map(|info| info.0.clone());
    let token = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let token = token.map(str::to_owned);
    let who = face.auth.who(peer.as_ref(), token.as_deref()).await;
    match who.and_then(|who| face.auth.allow(&who, Role::Viewer)) {
        Ok(()) => next.run(request).await,
        Err(status) => {
            tracing::debug!(peer = ?peer.map(|p| p.addr), %status, "refused");
            let code = match status.code() {
                Code::Unauthenticated => StatusCode::UNAUTHORIZED,
                Code::PermissionDenied => StatusCode::FORBIDDEN,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            Failure(code, status.message().to_owned()).into_response()
        }
    }
}

/// For every answer; the page brings its own policy.
async fn safe_headers(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.entry(header::X_CONTENT_TYPE_OPTIONS).or_insert(HeaderValue::from_static("nosniff"));
    headers
        .entry(header::CONTENT_SECURITY_POLICY)
        .or_insert(HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}
